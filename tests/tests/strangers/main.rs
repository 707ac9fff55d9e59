//! A running job among strangers: what they send is refused or ignored, and the result is that of an undisturbed run.

mod rows;

use rows::{piece, pull};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::pin::pin;
use std::time::Duration;
use tonic::codegen::tokio_stream::{self as stream, StreamExt};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use unisono_common::data::partition::Partitions;
use unisono_common::job::Job;
use unisono_common::layout::{Layout, le_bytes};
use unisono_common::model::Model;
use unisono_proto::shm::SlotSize;
use unisono_proto::shm::door::Opened;
use unisono_proto::{self as wire, v1};
use unisono_tests::cluster::{Cluster, SHORT, same_result, undisturbed};
use unisono_tests::peak;

/// Steps that take longer than all strangers together.
const LONG: u64 = 40_000;

type Parameters = v1::parameters_client::ParametersClient<Channel>;

/// A connection of its own.
fn connect(cluster: &Cluster<'_>, runtime: &tokio::runtime::Runtime) -> Channel {
    let channel = Channel::from_shared(format!("http://{}", cluster.address)).expect("a URL");
    runtime.block_on(channel.connect()).expect("the coordinator answers")
}

/// Generated clients, which any language has; the program's own are written by hand.
#[derive(Clone)]
struct Client {
    coordinator: v1::coordinator_client::CoordinatorClient<Channel>,
    parameters: Parameters,
}

impl Client {
    fn of(cluster: &Cluster<'_>, runtime: &tokio::runtime::Runtime) -> Client {
        let channel = connect(cluster, runtime);
        let coordinator = v1::coordinator_client::CoordinatorClient::new(channel.clone());
        Client { coordinator, parameters: Parameters::new(channel).max_encoding_message_size(usize::MAX) }
    }
}

/// The job as a worker learns it, and the Join that would be accepted.
async fn honest_join(client: &mut Client) -> (Job, Layout, v1::Join) {
    let reply = client
        .coordinator
        .get_job(v1::GetJobRequest { version: wire::VERSION.into() })
        .await
        .expect("the job")
        .into_inner();
    let job: Job = serde_json::from_str(&reply.job).expect("a job");
    let prepared: unisono_common::data::Prepared = serde_json::from_str(&reply.prepared).expect("prepared");
    let model = Model::build(&job.model, &prepared.signature(&job.train.loss)).expect("a model");
    let join = v1::Join {
        version: wire::VERSION.into(),
        job_digest: job.digest().to_vec().into(),
        layout_digest: model.digest().to_vec().into(),
        fingerprint: unisono_common::train::fingerprint().to_vec().into(),
        threads: 1,
        name: "stranger\u{7}".into(),
        shared_memory: false,
        isa: "none\u{7}".into(),
        simulated: false,
    };
    (job, model.layout().clone(), join)
}

fn from_worker(kind: v1::from_worker::Kind) -> v1::FromWorker {
    v1::FromWorker { kind: Some(kind) }
}

/// Opens a session with `join` and `more`; it stays open as long as what this returns.
async fn session(
    client: &mut Client,
    join: v1::Join,
    more: Vec<v1::FromWorker>,
) -> Result<Streaming<v1::ToWorker>, Status> {
    let first = from_worker(v1::from_worker::Kind::Join(join));
    let messages = stream::iter([first].into_iter().chain(more)).chain(stream::pending());
    client.coordinator.session(messages).await.map(|r| r.into_inner())
}

/// What proves a membership.
type Token = Vec<u8>;

/// A sign of life.
fn heartbeat() -> v1::FromWorker {
    from_worker(v1::from_worker::Kind::Heartbeat(v1::Heartbeat {}))
}

/// Joins, and gives the proof with the open session.
async fn joined(client: &mut Client, join: v1::Join) -> (Token, Streaming<v1::ToWorker>) {
    let mut session = session(client, join, vec![heartbeat()]).await.expect("joined");
    (welcome(&mut session).await.session.to_vec(), session)
}

/// The first that a session hears.
async fn welcome(session: &mut Streaming<v1::ToWorker>) -> v1::Joined {
    match session.message().await.expect("a message").and_then(|m| m.kind) {
        Some(v1::to_worker::Kind::Joined(joined)) => joined,
        other => panic!("not joined: {other:?}"),
    }
}

async fn push(client: &mut Client, parts: Vec<v1::push_part::Kind>) -> Result<(), Status> {
    let parts = parts.into_iter().map(|kind| v1::PushPart { kind: Some(kind) });
    client.parameters.push(stream::iter(parts.collect::<Vec<_>>())).await.map(|_| ())
}

/// The first message of a push.
fn of(session: &[u8]) -> v1::push_part::Kind {
    v1::push_part::Kind::Session(session.to_vec().into())
}

/// Reads a session to its goodbye.
async fn goodbye(session: &mut Streaming<v1::ToWorker>) -> v1::Goodbye {
    loop {
        match session.message().await.expect("a message").and_then(|m| m.kind) {
            Some(v1::to_worker::Kind::Goodbye(goodbye)) => return goodbye,
            Some(_) => {}
            None => panic!("the session ended without a goodbye"),
        }
    }
}

fn chunk(index: u32, values: &[f32]) -> v1::GradientChunk {
    let values = le_bytes(values).to_vec();
    v1::GradientChunk { index, checksum: Some(wire::checksum(&values)), values: values.into() }
}

fn header(step: u64, lo: u32, hi: u32) -> v1::NodeHeader {
    let node = Some(v1::TreeNode { lo, hi });
    v1::NodeHeader { step, generation: 0, node, loss: 1.0, weight: 1.0, samples: 1, rows: 0 }
}

fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, words: &[&str]) {
    let status = result.expect_err("it was accepted");
    let message = status.message();
    assert!(status.code() == code && words.iter().all(|w| message.contains(w)), "{words:?}: {status:?}");
}

/// Joins that must be refused, each with a message that names both sides.
async fn wrong_joins(client: &mut Client) {
    let (_, _, good) = honest_join(client).await;
    let other = || vec![0xab; 32].into();
    let hex = |d: &[u8]| d[..4].iter().map(|b| format!("{b:02x}")).collect::<String>();
    let fingerprint = hex(&good.fingerprint);
    let precondition: &[(v1::Join, &[&str])] = &[
        (v1::Join { version: "0.0.0-old".into(), ..good.clone() }, &["0.0.0-old", wire::VERSION, "same version"]),
        (v1::Join { simulated: true, ..good.clone() }, &["pretends", "not a measurement"]),
        (v1::Join { job_digest: other(), ..good.clone() }, &["another job"]),
        (v1::Join { layout_digest: other(), ..good.clone() }, &["another model"]),
        (v1::Join { fingerprint: other(), ..good.clone() }, &["abababab", &fingerprint, "other bits"]),
    ];
    for (join, words) in precondition {
        refused(session(client, join.clone(), Vec::new()).await, Code::FailedPrecondition, words);
    }
    let invalid: &[(v1::Join, &[&str])] = &[
        (v1::Join { job_digest: vec![1; 31].into(), ..good.clone() }, &["job_digest", "32 bytes"]),
        (v1::Join { fingerprint: Vec::new().into(), ..good.clone() }, &["fingerprint", "32 bytes"]),
        (v1::Join { threads: 0, ..good.clone() }, &["threads", "out of range"]),
        (v1::Join { threads: u32::MAX, ..good.clone() }, &["threads", "out of range"]),
    ];
    for (join, words) in invalid {
        refused(session(client, join.clone(), Vec::new()).await, Code::InvalidArgument, words);
    }
    let beat = from_worker(v1::from_worker::Kind::Heartbeat(v1::Heartbeat {}));
    assert!(client.coordinator.session(stream::iter([beat])).await.is_err(), "a session without a join");
    assert!(
        client.coordinator.session(stream::iter([v1::FromWorker { kind: None }])).await.is_err(),
        "a session of nothing"
    );
    let old = client.coordinator.get_job(v1::GetJobRequest { version: "9.9.9".into() }).await;
    refused(old, Code::FailedPrecondition, &["9.9.9", wire::VERSION]);
}

/// Pushes that must be refused, or, where they are only late or unknown, change nothing.
async fn wrong_pushes(client: &mut Client) {
    use v1::push_part::Kind::{Chunk, Node, Rows, Spent};
    let (job, layout, join) = honest_join(client).await;
    let zeros = vec![0.0; layout.chunk(0).len()];
    let every = || (0..layout.chunks()).map(|i| Chunk(chunk(i as u32, &vec![7.0; layout.chunk(i).len()])));
    let p = job.train.partitions;
    // Well-formed, for steps that are not open: no error is needed, but no effect is allowed.
    let (mine, session) = joined(client, join.clone()).await;
    for step in [0, 1 << 40, u64::MAX - 1, u64::MAX] {
        let parts = [of(&mine), Node(header(step, 0, p))].into_iter().chain(every());
        push(client, parts.collect()).await.ok();
    }
    drop(session);
    // From nobody.
    for token in [vec![], vec![0; 16], vec![0; 17], 1u64.to_be_bytes().to_vec()] {
        let parts = [of(&token), Node(header(1, 0, p))].into_iter().chain(every());
        refused(push(client, parts.collect()).await, Code::NotFound, &["no such session", "join first"]);
    }
    let mut nan = zeros.clone();
    nan[zeros.len() / 2] = f32::NAN;
    let (chunks, bytes) = (layout.chunks() as u32, zeros.len() * 4);
    let cases: Vec<(Vec<_>, Vec<String>)> = vec![
        (vec![Chunk(chunk(chunks, &zeros))], vec![format!("chunk {chunks} does not exist")]),
        (vec![Chunk(chunk(u32::MAX, &zeros))], vec!["does not exist".into(), chunks.to_string()]),
        (vec![Chunk(chunk(0, &zeros[1..]))], vec![format!("{} bytes", bytes - 4), format!("says {bytes}")]),
        (vec![Chunk(chunk(0, &[]))], vec!["chunk 0 has 0 bytes".into()]),
        (
            vec![Chunk(v1::GradientChunk { checksum: Some(1), ..chunk(0, &zeros) })],
            vec!["checksum".into(), "damaged".into()],
        ),
        (vec![Chunk(v1::GradientChunk { checksum: None, ..chunk(0, &zeros) })], vec!["chunk 0 has no checksum".into()]),
        (vec![Chunk(chunk(0, &nan))], vec!["not finite".into(), "tensor `".into()]),
        (vec![Node(header(0, 0, p)), Chunk(chunk(0, &zeros)), Chunk(chunk(0, &zeros))], vec!["twice".into()]),
        (vec![Node(header(1, 3, 3))], vec!["3..3 is not a node".into()]),
        (vec![Node(header(1, 0, p + 1))], vec!["not a node".into(), format!("{p} partitions")]),
        (vec![Node(v1::NodeHeader { node: None, ..header(1, 0, 1) })], vec!["`node` is missing".into()]),
        (vec![Node(v1::NodeHeader { loss: f64::NAN, ..header(1, 0, 1) })], vec!["out of range".into()]),
        (vec![Node(v1::NodeHeader { weight: -1.0, ..header(1, 0, 1) })], vec!["out of range".into()]),
        (vec![Node(v1::NodeHeader { samples: u64::MAX, ..header(1, 0, 1) })], vec!["out of range".into()]),
        (vec![of(&[1; 16])], vec!["nodes and chunks".into()]),
        (vec![Node(header(0, 0, p)), Rows(piece(0, &[], &[]))], vec!["the model has no sparse tables".into()]),
        (vec![Node(header(0, 0, p)), Spent(Default::default()), Spent(Default::default())], vec!["once".into()]),
    ];
    for (parts, words) in cases {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        // Whoever is refused is sent away, and joins again.
        let (mine, mut session) = joined(client, join.clone()).await;
        refused(push(client, [vec![of(&mine)], parts].concat()).await, Code::InvalidArgument, &words);
        let goodbye = goodbye(&mut session).await;
        assert!(goodbye.rejoin && words.iter().all(|w| goodbye.reason.contains(w)), "{goodbye:?}");
        refused(push(client, vec![of(&mine)]).await, Code::NotFound, &["join first"]);
    }
    let nameless = push(client, vec![Chunk(chunk(0, &zeros))]).await;
    refused(nameless, Code::InvalidArgument, &["first message", "session"]);
    let (mine, session) = joined(client, join.clone()).await;
    let too_long = push(client, vec![of(&mine), Chunk(chunk(0, &vec![0.0; wire::MAX_MESSAGE / 2]))]).await;
    assert!(too_long.is_err(), "8 MiB in one message");
    drop(session);
}

/// Requests for what is not there.
async fn wrong_requests(client: &mut Client, from: &mut Parameters) {
    let (job, _, join) = honest_join(client).await;
    let (mine, session) = joined(client, join).await;
    let ask = |session: &[u8], partition, test| v1::FetchRequest { session: session.to_vec().into(), partition, test };
    let weights = |session: &[u8]| v1::BroadcastRequest { session: session.to_vec().into() };
    for partition in [job.train.partitions, u32::MAX] {
        for test in [false, true] {
            let got = client.coordinator.fetch_partition(ask(&mine, partition, test)).await;
            refused(got, Code::InvalidArgument, &["partition", &partition.to_string(), "out of range"]);
        }
    }
    refused(client.coordinator.fetch_partition(ask(&[1; 16], 0, false)).await, Code::NotFound, &["join first"]);
    refused(from.broadcast(weights(&[1; 16])).await, Code::NotFound, &["join first"]);
    refused(pull(client, &mine, vec![]).await, Code::FailedPrecondition, &["no sparse tables"]);
    let long = from.broadcast(weights(&[1; 5000])).await;
    refused(long, Code::InvalidArgument, &["cannot be read"]);
    // Takes weights and data as a member may, and leaves in the middle.
    let mut sent = from.broadcast(weights(&mine)).await.expect("weights").into_inner();
    sent.message().await.expect("a chunk");
    let fetch = client.coordinator.fetch_partition(ask(&mine, 0, false)).await;
    fetch.expect("a partition").into_inner().message().await.expect("a piece");
    drop(session);
}

/// Members that take work and misbehave: nonsense for evaluation sums, a second Join, an empty message.
async fn wrong_members(client: &mut Client) {
    let (job, _, join) = honest_join(client).await;
    let node = |lo, hi| Some(v1::TreeNode { lo, hi });
    let done = |step, node, values: usize| {
        let (sums, counts) = (vec![f64::NAN; values], vec![u64::MAX; values]);
        from_worker(v1::from_worker::Kind::EvalDone(v1::EvalDone { step, node, sums, counts }))
    };
    let late = v1::Diverged { step: u64::MAX, node: node(7, u32::MAX), tensor: "a\nb".repeat(1000) };
    let nonsense = [
        done(0, None, 1),
        done(0, node(7, 3), 1),
        done(u64::MAX, node(0, job.train.partitions), 1000),
        from_worker(v1::from_worker::Kind::Join(join.clone())),
        from_worker(v1::from_worker::Kind::Diverged(late)),
        v1::FromWorker { kind: None },
    ];
    for message in nonsense {
        for before in [vec![], vec![heartbeat()]] {
            let more = [before, vec![message.clone()]].concat();
            let mut session = session(client, join.clone(), more).await.expect("joined");
            session.message().await.expect("Joined");
        }
    }
    let flood = vec![heartbeat(); 30_000];
    let mut session = session(client, join, flood).await.expect("joined");
    let goodbye = goodbye(&mut session).await;
    // As soon as the driver sees it, or before it is in.
    let said = ["too many messages", "before it joined"].iter().any(|why| goodbye.reason.contains(why));
    assert!(goodbye.rejoin && said, "{goodbye:?}");
}

/// Joins with the offer of shared memory; what is sent into the first that this gives goes into the session.
#[cfg(target_os = "linux")]
async fn offered(
    client: &mut Client,
    join: &v1::Join,
) -> (tokio::sync::mpsc::UnboundedSender<v1::FromWorker>, v1::Joined, Streaming<v1::ToWorker>) {
    let (says, hears) = tokio::sync::mpsc::unbounded_channel();
    says.send(from_worker(v1::from_worker::Kind::Join(join.clone()))).expect("it is read");
    let messages = stream::wrappers::UnboundedReceiverStream::new(hears);
    let mut session = client.coordinator.session(messages).await.expect("joined").into_inner();
    (says, welcome(&mut session).await, session)
}

/// Shared memory is for who joined and was told so, and for nobody twice over; who says nonsense through it is sent away.
#[cfg(target_os = "linux")]
async fn wrong_knocks(client: &mut Client) {
    use v1::from_worker::Kind;
    use wire::shm::{door::knock, frame::Report};
    let (_, layout, join) = honest_join(client).await;
    let join = v1::Join { shared_memory: true, ..join };
    // What it sends before it has said whether it has shared memory waits until it has, and until its first sign of life.
    let (says, joined, mut session) = offered(client, &join).await;
    let nonsense = v1::push_part::Kind::Chunk(chunk(u32::MAX, &[]));
    let mut other = client.clone();
    let mut early = pin!(push(&mut other, vec![of(&joined.session), nonsense]));
    for word in [from_worker(Kind::SharedMemory(v1::SharedMemory { used: false })), heartbeat()] {
        assert!(tokio::time::timeout(Duration::from_millis(100), &mut early).await.is_err(), "it was looked at");
        says.send(word).expect("it is read");
    }
    refused(early.await, Code::InvalidArgument, &["does not exist"]);
    let early = goodbye(&mut session).await;
    assert!(early.rejoin && early.reason.contains("does not exist"), "{early:?}");
    for used in [false, true] {
        let (says, joined, mut session) = offered(client, &join).await;
        assert!(
            knock(&joined.door, &[7; 16], SlotSize::dense(layout.len()), None).is_err(),
            "let in without the secret"
        );
        assert!(
            knock(&joined.door, &joined.session, SlotSize::dense(layout.len() + 5000), None).is_err(),
            "let in with another layout"
        );
        let slots = SlotSize::dense(layout.len());
        let Opened { weights, lane, bell, .. } = knock(&joined.door, &joined.session, slots, None).expect("let in");
        assert!(weights.of_step(0, 0..layout.len()).len() == layout.len());
        says.send(from_worker(Kind::SharedMemory(v1::SharedMemory { used }))).expect("it is read");
        says.send(heartbeat()).expect("it is read");
        if used {
            lane.tell(Report::Ready { slot: 9, from: 0, to: u32::MAX, spent: None }, &bell.bell());
            bell.bell().ring();
            let goodbye = goodbye(&mut session).await;
            assert!(goodbye.rejoin && goodbye.reason.contains("does not exist"), "{goodbye:?}");
        }
    }
}

/// A member that announces a node of its lease and sends a chunk that is refused, but goes on to be there.
async fn half_a_node(client: &mut Client) -> Streaming<v1::ToWorker> {
    use v1::push_part::Kind::{Chunk, Node};
    let (job, layout, join) = honest_join(client).await;
    let reply = client
        .coordinator
        .get_job(v1::GetJobRequest { version: wire::VERSION.into() })
        .await
        .expect("the job")
        .into_inner();
    let prepared: unisono_common::data::Prepared = serde_json::from_str(&reply.prepared).expect("prepared");
    let parts = Partitions::new(prepared.train_samples as usize, job.train.partitions, None).expect("enough samples");
    let steps = parts.steps_per_epoch(job.train.micro_batch) as u64;
    for wrong in 0..3 {
        let (mine, mut session, work) = loop {
            let (mine, mut session) = joined(client, join.clone()).await;
            match session.message().await.expect("a message").and_then(|m| m.kind) {
                Some(v1::to_worker::Kind::Work(work)) if !work.evaluate => break (mine, session, work),
                // It came in the middle of an evaluation.
                Some(v1::to_worker::Kind::Work(_)) => {}
                other => panic!("the run ended before there was work: {other:?}"),
            }
        };
        let node = work.nodes[0];
        let batch = |p| parts.batch(p, work.step % steps, job.train.micro_batch).len() as u64;
        let samples = (node.lo..node.hi).map(batch).sum();
        let header = v1::NodeHeader { generation: work.generation, samples, ..header(work.step, node.lo, node.hi) };
        let zeros = vec![0.0; layout.chunk(0).len()];
        let (pushed, words): (_, &[&str]) = match wrong {
            0 => (vec![Node(header), Chunk(chunk(0, &[1.0]))], &["chunk 0 has 4 bytes"]),
            1 => {
                (vec![Node(header), Chunk(v1::GradientChunk { checksum: Some(1), ..chunk(0, &zeros) })], &["checksum"])
            }
            _ => (vec![Node(v1::NodeHeader { samples: 0, ..header })], &["samples", "out of range"]),
        };
        let refusal = push(client, [vec![of(&mine)], pushed].concat()).await;
        // Where others were faster, the node is not owed any more, and how many samples it has is not looked at.
        if wrong < 2 || refusal.is_err() {
            refused(refusal, Code::InvalidArgument, words);
        }
        assert!(goodbye(&mut session).await.rejoin);
        if wrong == 2 {
            return session;
        }
    }
    unreachable!("the third case returns")
}

/// One HTTP/2 frame.
fn frame(kind: u8, flags: u8, id: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &id.to_be_bytes()[..], payload].concat()
}

/// A call of `path` whose one message declares 4 GiB.
fn huge_call(path: &str) -> Vec<u8> {
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "x"),
        (":path", path),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ];
    // Literals without indexing, without Huffman: every length is below 127.
    let literal = |text: &str| [&[text.len() as u8], text.as_bytes()].concat();
    let head: Vec<u8> = fields.iter().flat_map(|(k, v)| [vec![0], literal(k), literal(v)].concat()).collect();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(frame(1, 4, 1, &head));
    bytes.extend(frame(0, 0, 1, &[0, 255, 255, 255, 255, 1, 2, 3]));
    bytes
}

/// Sends bytes as they are; gives what came back until the other side closes or a second passes.
fn raw(address: &str, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).expect("the port is open");
    socket.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
    socket.write_all(bytes).ok();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).ok();
    answer
}

/// The kinds of the frames in an answer, with their streams.
fn frames(mut bytes: &[u8]) -> Vec<(u8, u32)> {
    let mut found = Vec::new();
    while bytes.len() >= 9 {
        let length = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize;
        found.push((bytes[3], u32::from_be_bytes([bytes[5], bytes[6], bytes[7], bytes[8]])));
        bytes = bytes.get(9 + length..).unwrap_or_default();
    }
    found
}

#[test]
fn strangers_change_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(dir.path(), LONG);
    // Connections that say nothing stay until the end; so does a session that never joins.
    let _silent: Vec<TcpStream> = (0..50).map(|_| TcpStream::connect(&cluster.address).expect("open")).collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut client = Client::of(&cluster, &runtime);
    let mut weights = Parameters::new(connect(&cluster, &runtime));
    let mut mute = client.clone();
    runtime.spawn(async move { mute.coordinator.session(stream::pending::<v1::FromWorker>()).await.map(|_| ()) });

    let noise: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for bytes in
        [&noise[..], b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnot frames", b"\0"]
    {
        raw(&cluster.address, bytes);
    }
    for call in [
        "Coordinator/Push",
        "Coordinator/Session",
        "Coordinator/GetJob",
        "Parameters/Broadcast",
        "Parameters/Nothing",
        "Operator/Stop",
        "Nobody/Nothing",
    ] {
        let answer = frames(&raw(&cluster.address, &huge_call(&format!("/unisono.v1.{call}"))));
        assert!(answer.contains(&(1, 1)), "{call}: no answer to a message of 4 GiB: {answer:?}");
    }
    runtime.block_on(async {
        wrong_joins(&mut client).await;
        wrong_pushes(&mut client).await;
        wrong_requests(&mut client, &mut weights).await;
        wrong_members(&mut client).await;
        #[cfg(target_os = "linux")]
        wrong_knocks(&mut client).await;
    });
    let (step, peak) = (cluster.step(), cluster.coordinator.as_ref().and_then(peak));
    assert!(step.is_some_and(|s| s < LONG), "the run ended before the strangers did: make it longer");
    assert!(peak.is_none_or(|peak| peak < 512.0), "the coordinator took {peak:?} MiB");
    same_result(&cluster.end(), &undisturbed(LONG));
}

#[test]
fn a_member_that_breaks_off_in_the_middle_of_a_node_changes_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(dir.path(), SHORT);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut client = Client::of(&cluster, &runtime);
    let _open = runtime.block_on(half_a_node(&mut client));
    let summary = cluster.end();
    assert!(summary["partitions_reissued"].as_u64() >= Some(1), "the stranger had no lease: {summary}");
    same_result(&summary, &undisturbed(SHORT));
}

/// Members that say no more than that they join are leased nothing: no step waits for them.
#[test]
fn who_joins_and_says_no_more_holds_up_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(dir.path(), SHORT);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut client = Client::of(&cluster, &runtime);
    let _open = runtime.block_on(async {
        let (_, _, join) = honest_join(&mut client).await;
        let mut open = Vec::new();
        for _ in 0..STUCK {
            let mut session = session(&mut client, join.clone(), vec![]).await.expect("joined");
            welcome(&mut session).await;
            open.push(session);
        }
        open
    });
    let summary = cluster.end();
    assert_eq!((&summary["partitions_reissued"], &summary["workers_lost"]), (&0.into(), &0.into()), "{summary}");
    same_result(&summary, &undisturbed(SHORT));
}

/// A job whose partitions are sent, of 6 MiB each.
const SENT: &str = r#"
data = { format = "synthetic", task = "classification", shape = [3000], classes = 2, samples = 1024, ship = true }
model = { kind = "linear" }
train = { partitions = 2, micro_batch = 4, steps = 1, loss = "cross-entropy" }
checkpoint = { every_steps = 0 }
"#;

/// So long it is before who takes nothing has to go.
const STALL: Duration = Duration::from_secs(30);

/// Members that ask for partitions and take none of them: others get theirs before these have to go.
#[test]
fn who_does_not_read_its_partition_does_not_keep_others_from_theirs() {
    let dir = tempfile::tempdir().expect("a folder");
    let job = dir.path().join("job.toml");
    std::fs::write(&job, SENT).expect("written");
    let cluster = Cluster::of(dir.path(), job.to_str().expect("a path in UTF-8"), 1 << 40);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut client = Client::of(&cluster, &runtime);
    runtime.block_on(async {
        let (_, _, join) = honest_join(&mut client).await;
        let endpoint = Channel::from_shared(format!("http://{}", cluster.address)).expect("a URL");
        let channel = endpoint.initial_stream_window_size(1).connect().await.expect("the coordinator answers");
        let mut stuck = v1::coordinator_client::CoordinatorClient::new(channel);
        let ask = |session: &Token| v1::FetchRequest { session: session.clone().into(), partition: 0, test: false };
        let mut open = Vec::new();
        for _ in 0..2 {
            let (theirs, session) = joined(&mut client, join.clone()).await;
            let first = stuck.fetch_partition(ask(&theirs)).await.expect("it begins");
            // One who asks more than once waits for itself.
            let more = (0..20).map(|_| {
                let (mut stuck, request) = (stuck.clone(), ask(&theirs));
                tokio::spawn(async move { stuck.fetch_partition(request).await })
            });
            open.push((session, first, more.collect::<Vec<_>>()));
        }
        let (mine, _session) = joined(&mut client, join).await;
        let others = async {
            let mut pieces = client.coordinator.fetch_partition(ask(&mine)).await.expect("it begins").into_inner();
            let (mut came, mut total) = (0, None);
            while let Some(piece) = pieces.message().await.expect("a piece") {
                (came, total) = (came + piece.bytes.len() as u64, Some(piece.total));
            }
            (came, total)
        };
        let (came, total) = tokio::time::timeout(STALL, others).await.expect("others get theirs meanwhile");
        assert_eq!(Some(came), total, "all of it comes");
    });
}

/// More streams than a coordinator sends something at once.
const STUCK: usize = 40;

/// A member that takes no weights, by so many streams: others get theirs, and when it is silent for too
/// long they do what it owes.
#[test]
fn who_takes_no_weights_does_not_keep_others_from_theirs() {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::by_grpc(dir.path(), SHORT);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut client = Client::of(&cluster, &runtime);
    let _stuck = runtime.block_on(async {
        let (_, _, join) = honest_join(&mut client).await;
        let (mine, session) = joined(&mut client, join).await;
        let endpoint = Channel::from_shared(format!("http://{}", cluster.address)).expect("a URL");
        // There is no room for a chunk, and nobody makes any.
        let channel = endpoint.initial_stream_window_size(1).connect().await.expect("the coordinator answers");
        let mut streams = Vec::new();
        for _ in 0..STUCK {
            let request = v1::BroadcastRequest { session: mine.clone().into() };
            streams.push(Parameters::new(channel.clone()).broadcast(request).await.expect("weights"));
        }
        (session, streams)
    });
    let summary = cluster.end();
    assert!(summary["partitions_reissued"].as_u64() >= Some(1), "the stranger had no lease: {summary}");
    same_result(&summary, &undisturbed(SHORT));
}
