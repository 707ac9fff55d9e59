//! Rows of sparse tables for workers that cannot read them in place.
//!
//! A worker asks for the rows of its next batch while it computes this one: it is sent at once what there is, and when the step
//! is committed only what has changed since.

use crate::rows::{Pulled, Tables};
use crate::shared::{Input, Shared};
use bytes::Bytes;
use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use unisono_common::ids::Step;
use unisono_proto::{self as wire, v1};

/// Pulls of a session that wait at once, at most: one for each step that can be asked for, and some that nobody waits for any more.
const AT_ONCE: usize = 16;

/// Bytes of a reply, at most.
const PIECE: usize = 1 << 20;

/// What a session's stream of replies is fed by.
pub type Replies = mpsc::Sender<Result<v1::RowReply, Status>>;

/// One pull.
struct Pull {
    id: u64,
    step: Step,
    keys: Vec<u64>,
    whole: bool,
    /// The step whose rows it was sent.
    sent: Option<Step>,
}

/// Answers the pulls of one session until it ends.
pub async fn serve(shared: Arc<Shared>, mut requests: Streaming<v1::RowRequest>, replies: Replies) {
    let mut session = None;
    if let Err(refused) = answer(&shared, &mut session, &mut requests, &replies).await {
        // A worker that gets no rows is of no use: it leaves, and what it owes is done by others.
        if let Some(worker) = session.and_then(|session| shared.member(&session).ok()) {
            shared.input(Input::Broken { worker, why: unisono_proto::stream::why(&refused).into() });
        }
        replies.send(Err(refused)).await.ok();
    }
}

async fn answer(
    shared: &Arc<Shared>,
    session: &mut Option<Bytes>,
    requests: &mut Streaming<v1::RowRequest>,
    replies: &Replies,
) -> Result<(), Status> {
    let tables =
        || shared.store.tables.as_ref().ok_or_else(|| Status::failed_precondition("the model has no sparse tables"));
    let mut committed = tables()?.committed();
    let mut pulls: Vec<Pull> = Vec::new();
    loop {
        tokio::select! {
            request = requests.message() => {
                let Some(request) = request? else { return Ok(()) };
                take(shared, session, &mut pulls, request)?;
            }
            changed = committed.changed() => if changed.is_err() { return Ok(()) },
        }
        if let Some(session) = &*session {
            shared.member(session)?;
        }
        for pull in pulls.iter_mut().filter(|pull| pull.whole) {
            send(shared, tables()?, pull, replies).await?;
        }
        pulls.retain(|pull| pull.sent.is_none_or(|sent| sent < pull.step));
    }
}

/// Takes a request's keys.
fn take(
    shared: &Shared,
    session: &mut Option<Bytes>,
    pulls: &mut Vec<Pull>,
    request: v1::RowRequest,
) -> Result<(), Status> {
    if session.is_none() {
        shared.member(&request.session)?;
        *session = Some(request.session);
        return Ok(());
    }
    let (keys, rest) = request.keys.as_chunks::<8>();
    let most = shared.most_rows();
    let open = pulls.iter().position(|pull| pull.id == request.pull);
    if open.is_none() && pulls.len() == AT_ONCE {
        return Err(Status::resource_exhausted(format!("{AT_ONCE} pulls wait already")));
    }
    let at = open.unwrap_or_else(|| {
        let (id, step) = (request.pull, Step(request.step));
        pulls.push(Pull { id, step, keys: Vec::new(), whole: false, sent: None });
        pulls.len() - 1
    });
    let pull = &mut pulls[at];
    if pull.whole || !rest.is_empty() || pull.keys.len() + keys.len() > most {
        return Err(Status::invalid_argument(format!("a pull has up to {most} whole keys, and comes once")));
    }
    pull.keys.extend(keys.iter().map(|key| u64::from_le_bytes(*key)));
    pull.whole = !request.more;
    Ok(())
}

/// Sends what a pull has not been sent.
async fn send(shared: &Shared, tables: &Tables, pull: &mut Pull, replies: &Replies) -> Result<(), Status> {
    if pull.sent.is_some() && tables.is_before(pull.step) {
        return Ok(()); // it has what there is
    }
    let Pulled { step: at, places, values } = tables.pull(&pull.keys, pull.sent);
    let gone = |_| Status::cancelled("nobody takes the rows");
    if at > pull.step {
        pull.sent = Some(at);
        let late = v1::RowReply { pull: pull.id, last: true, late: true, ..Default::default() };
        return replies.send(Ok(late)).await.map_err(gone);
    }
    if pull.step > at.next() {
        return Err(Status::invalid_argument(format!("step {} is asked for, and step {at} is open", pull.step)));
    }
    let width = tables.layout().width();
    let each = (PIECE / (4 + 4 * width)).max(1);
    let mut pieces = pieces(places.into(), values.into(), width, each).peekable();
    while let Some((places, values)) = pieces.next() {
        shared.store.bytes_pulled.fetch_add((places.len() + values.len()) as u64, Ordering::Relaxed);
        let mut checksum = wire::Checksum::new();
        checksum.write(&places);
        checksum.write(&values);
        let checksum = checksum.finish();
        let last = pieces.peek().is_none() && at == pull.step;
        let reply = v1::RowReply { pull: pull.id, places, values, checksum, last, late: false };
        replies.send(Ok(reply)).await.map_err(gone)?;
    }
    pull.sent = Some(at);
    Ok(())
}

/// Places and values of rows, `each` of them at most in a piece; one piece at least.
fn pieces(mut places: Bytes, mut values: Bytes, width: usize, each: usize) -> impl Iterator<Item = (Bytes, Bytes)> {
    let pieces = (places.len() / 4).div_ceil(each).max(1);
    (0..pieces).map(move |_| {
        let rows = each.min(places.len() / 4);
        (places.split_to(4 * rows), values.split_to(4 * rows * width))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_all_rows_in_their_order() {
        let (width, each) = (3, 10);
        for rows in [0, 1, 9, 10, 11, 20, 21] {
            let places: Vec<u8> = (0..rows as u32).flat_map(u32::to_le_bytes).collect();
            let values: Vec<u8> = (0..4 * rows * width).map(|i| i as u8).collect();
            let all: Vec<_> = pieces(places.clone().into(), values.clone().into(), width, each).collect();
            assert_eq!(all.len(), rows.div_ceil(each).max(1), "{rows} rows");
            assert!(
                all.iter().all(|(places, values)| places.len() <= 4 * each && values.len() == places.len() * width)
            );
            assert_eq!((all.iter().flat_map(|piece| piece.0.to_vec())).collect::<Vec<u8>>(), places);
            assert_eq!((all.iter().flat_map(|piece| piece.1.to_vec())).collect::<Vec<u8>>(), values);
        }
    }
}
