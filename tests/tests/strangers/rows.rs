//! Gradients and pulls of rows of sparse tables.

use super::{Client, chunk, goodbye, header, honest_join, joined, of, push, refused};
use tonic::codegen::tokio_stream::{self as stream, StreamExt};
use tonic::{Code, Status};
use unisono_proto::{self as wire, v1};
use unisono_tests::cluster::{Cluster, same_result, undisturbed_of};

/// A job with sparse tables: rows of 3 values, of which a step asks for 48 at most.
const CLICKS: &str = r#"
data = { format = "synthetic", task = "clicks", numbers = 2, fields = 3, vocabulary = 500, samples = 400 }
model = { kind = "wide-deep", width = 2, hidden = [4] }
train = { partitions = 4, micro_batch = 4, steps = 1, loss = "binary-cross-entropy" }
checkpoint = { every_steps = 0 }
"#;

/// Rows that a step, and an evaluation, ask for at most.
const STEP_ROWS: u64 = 48;
const MOST_ROWS: u64 = 3 * 256;

/// Steps of that job that take longer than its strangers.
const OF_CLICKS: u64 = 20_000;

pub fn piece(index: u32, keys: &[u64], gradients: &[f32]) -> v1::RowPiece {
    let keys = keys.iter().flat_map(|key| key.to_le_bytes());
    let values = keys.chain(gradients.iter().flat_map(|value| value.to_le_bytes())).collect::<Vec<u8>>();
    v1::RowPiece { index, checksum: Some(wire::checksum(&values)), values: values.into() }
}

/// Gradients of rows that are not what they must be.
async fn wrong_rows(client: &mut Client) {
    use v1::push_part::Kind::{Chunk, Node, Rows};
    let (job, layout, join) = honest_join(client).await;
    let p = job.train.partitions;
    let with = |rows: u32| Node(v1::NodeHeader { rows, ..header(0, 0, p) });
    let zeros = |rows: usize| vec![0.0; 3 * rows];
    let keys = |rows: u64| (0..rows).collect::<Vec<u64>>();
    let damaged = v1::RowPiece { checksum: Some(1), ..piece(0, &[5], &zeros(1)) };
    let long = vec![0; (1 << 20) + 20];
    let long = v1::RowPiece { index: 0, checksum: Some(wire::checksum(&long)), values: long.into() };
    let cases: Vec<(Vec<_>, &[&str])> = vec![
        (vec![with(2), Rows(piece(0, &[5, 3], &zeros(2)))], &["gradients of rows", "not in order"]),
        (vec![with(2), Rows(piece(0, &[5, 5], &zeros(2)))], &["not in order"]),
        (vec![with(3), Rows(piece(0, &[3, 5], &zeros(2))), Rows(piece(1, &[4], &zeros(1)))], &["not in order"]),
        (vec![with(1), Rows(piece(0, &[5], &[0.0, f32::NAN, 0.0]))], &["not finite"]),
        (vec![with(1), Rows(piece(0, &[5], &[0.0, f32::INFINITY, 0.0]))], &["not finite"]),
        (vec![with(1), Rows(piece(0, &[5], &zeros(1)[1..]))], &["does not hold whole rows"]),
        (vec![with(1), Rows(piece(0, &[], &[0.0]))], &["does not hold whole rows"]),
        (vec![with(1), Rows(piece(0, &[3, 5], &zeros(2)))], &["more rows than can be"]),
        (
            vec![with(u32::MAX), Rows(piece(0, &keys(STEP_ROWS + 1), &zeros(STEP_ROWS as usize + 1)))],
            &["more rows than can be"],
        ),
        (vec![with(1), Rows(piece(0, &[], &[]))], &["a piece has none"]),
        (vec![with(1), Rows(piece(1, &[5], &zeros(1)))], &["not the next one"]),
        (vec![with(1), Rows(long)], &["more than 1 MiB"]),
        (vec![with(1), Rows(damaged)], &["checksum", "damaged"]),
        (vec![with(1), Rows(v1::RowPiece { checksum: None, ..piece(0, &[5], &zeros(1)) })], &["no checksum"]),
        (vec![with(0), Rows(piece(0, &[], &[])), Rows(piece(1, &[], &[]))], &["came twice"]),
        (vec![Rows(piece(0, &[5], &zeros(1)))], &["more rows than can be"]),
        (vec![Rows(piece(0, &[], &[]))], &["came twice"]),
    ];
    for (parts, words) in cases {
        let (mine, mut session) = joined(client, join.clone()).await;
        refused(push(client, [vec![of(&mine)], parts].concat()).await, Code::InvalidArgument, words);
        let goodbye = goodbye(&mut session).await;
        assert!(goodbye.rejoin && words.iter().all(|w| goodbye.reason.contains(w)), "{goodbye:?}");
    }
    // Well-formed, and late: it has no effect.
    let (mine, session) = joined(client, join).await;
    let chunks = (0..layout.chunks()).map(|i| Chunk(chunk(i as u32, &vec![7.0; layout.chunk(i).len()])));
    let rows = Rows(piece(0, &keys(STEP_ROWS), &vec![7.0; 3 * STEP_ROWS as usize]));
    let parts = [of(&mine), with(STEP_ROWS as u32), rows].into_iter().chain(chunks);
    push(client, parts.collect()).await.expect("nobody waits for it");
    drop(session);
}

/// Opens a stream of pulls, and gives all its replies until it ends.
pub async fn pull(
    client: &mut Client,
    session: &[u8],
    requests: Vec<v1::RowRequest>,
) -> Result<Vec<v1::RowReply>, Status> {
    let hello = v1::RowRequest { session: session.to_vec().into(), ..Default::default() };
    let requests = stream::iter([hello].into_iter().chain(requests)).chain(stream::pending());
    let mut replies = client.coordinator.pull_rows(requests).await?.into_inner();
    let mut all = Vec::new();
    while let Some(reply) = replies.message().await? {
        let late = reply.late;
        all.push(reply);
        if late {
            break;
        }
    }
    Ok(all)
}

/// Pulls of rows that nobody may ask for.
async fn wrong_pulls(client: &mut Client) {
    let (_, _, join) = honest_join(client).await;
    let ask = |pull, step, keys: u64, more| {
        let keys = (0..keys).flat_map(u64::to_le_bytes).collect::<Vec<u8>>().into();
        v1::RowRequest { pull, step, keys, more, ..Default::default() }
    };
    for token in [vec![], vec![0; 16], vec![0; 17]] {
        refused(pull(client, &token, vec![ask(1, 0, 1, false)]).await, Code::NotFound, &["join first"]);
    }
    let cut = v1::RowRequest { keys: vec![0; 15].into(), ..ask(1, 0, 0, false) };
    let most = format!("up to {MOST_ROWS} whole keys");
    let cases: Vec<(Vec<_>, Code, Vec<&str>)> = vec![
        (vec![cut], Code::InvalidArgument, vec![&most]),
        (vec![ask(1, 0, MOST_ROWS + 1, false)], Code::InvalidArgument, vec![&most]),
        (vec![ask(1, 0, MOST_ROWS, true), ask(1, 0, 1, true)], Code::InvalidArgument, vec![&most]),
        (vec![ask(1, 1 << 40, 1, false)], Code::InvalidArgument, vec!["step 1099511627776 is asked for", "is open"]),
        (vec![ask(1, u64::MAX, 1, false)], Code::InvalidArgument, vec!["step 18446744073709551615 is asked for"]),
        ((0..17).map(|i| ask(i, 0, 1, true)).collect(), Code::ResourceExhausted, vec!["16 pulls wait already"]),
    ];
    for (requests, code, words) in cases {
        let (mine, mut session) = joined(client, join.clone()).await;
        refused(pull(client, &mine, requests).await, code, &words);
        let goodbye = goodbye(&mut session).await;
        assert!(goodbye.rejoin && words.iter().all(|w| goodbye.reason.contains(w)), "{goodbye:?}");
        refused(pull(client, &mine, vec![]).await, Code::NotFound, &["join first"]);
    }
    // Of a step that is over: there is nothing to wait for.
    let (mine, session) = joined(client, join).await;
    let replies = pull(client, &mine, vec![ask(9, 0, 3, false)]).await.expect("an answer");
    let late = v1::RowReply { pull: 9, last: true, late: true, ..Default::default() };
    assert_eq!(replies, [late]);
    // Whose pushes have ended leaves at once.
    push(client, vec![of(&mine)]).await.expect("nothing is wrong with it");
    drop(session);
}

#[test]
fn strangers_change_no_rows_of_sparse_tables() {
    let dir = tempfile::tempdir().expect("a folder");
    let job = dir.path().join("job.toml");
    std::fs::write(&job, CLICKS).expect("written");
    let job = job.to_str().expect("a path in UTF-8");
    let cluster = Cluster::of(dir.path(), job, OF_CLICKS);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut client = Client::of(&cluster, &runtime);
    runtime.block_on(async {
        wrong_rows(&mut client).await;
        wrong_pulls(&mut client).await;
    });
    assert!(cluster.step().is_some_and(|s| s < OF_CLICKS), "the run ended before the strangers did: make it longer");
    same_result(&cluster.end(), &undisturbed_of(job, OF_CLICKS));
}
