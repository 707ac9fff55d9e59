//! Rows of sparse tables: read in the coordinator's memory, or pulled from it, ahead of the step that needs them.

use crate::connect::Client;
use std::collections::HashMap;
use std::hash::Hasher;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Status;
use unisono_common::data::Batch;
use unisono_common::layout::le_bytes_mut;
use unisono_common::rows::First;
use unisono_proto::shm::Rows;
use unisono_proto::{self as wire, v1};

/// Keys of a request, at most.
const KEYS: usize = 131_072;

/// A pull that the compute thread asks for.
pub struct Ask {
    step: u64,
    keys: Vec<u64>,
    answer: std::sync::mpsc::Sender<v1::RowReply>,
}

/// Where rows come from.
pub enum Source {
    /// A model without sparse tables.
    None,
    /// The coordinator's memory.
    Shared(Rows),
    /// A stream of pulls.
    Pulled(mpsc::UnboundedSender<Ask>),
}

/// The rows of a step that were asked for.
pub struct Asked(std::sync::mpsc::Receiver<v1::RowReply>);

impl Source {
    /// Whether they have to be asked for.
    pub fn is_pulled(&self) -> bool {
        matches!(self, Source::Pulled(_))
    }

    /// Asks for the rows of a batch ahead of its step, where they have to be asked for.
    pub fn ask(&self, step: u64, batch: &Batch) -> Option<Asked> {
        let Source::Pulled(asks) = self else { return None };
        let (answer, answers) = std::sync::mpsc::channel();
        asks.send(Ask { step, keys: batch.lookups.keys().to_vec(), answer }).ok()?;
        Some(Asked(answers))
    }

    /// Puts the rows of `step`, of `width` values, into the batch that asks for them; those that nobody has touched are as they are
    /// at first. `None` where nobody waits for what would be computed with them.
    pub fn fill(&self, step: u64, asked: Option<Asked>, first: &First, width: usize, batch: &mut Batch) -> Option<()> {
        match self {
            Source::None => Some(()),
            Source::Shared(rows) => {
                batch.make_room(width);
                rows.read(batch.lookups.keys(), &mut batch.rows, |key, row| first.fill(key, row));
                Some(())
            }
            Source::Pulled(_) => {
                let asked = asked.or_else(|| self.ask(step, batch))?;
                batch.make_room(width);
                let (keys, rows) = (batch.lookups.keys(), &mut batch.rows);
                // Whether each row has come.
                let mut came = vec![false; keys.len()];
                loop {
                    let reply = asked.0.recv().ok()?;
                    if reply.late {
                        return None;
                    }
                    let places = reply.places.as_chunks::<4>().0.iter();
                    let places = places.map(|place| u32::from_le_bytes(*place) as usize);
                    for (i, values) in places.zip(reply.values.chunks_exact(4 * width)) {
                        le_bytes_mut(rows.get_mut(i * width..(i + 1) * width)?).copy_from_slice(values);
                        came[i] = true;
                    }
                    if reply.last {
                        let all = keys.iter().zip(rows.chunks_exact_mut(width)).zip(&came);
                        all.filter(|(_, came)| !**came).for_each(|((key, row), _)| first.fill(*key, row));
                        return Some(());
                    }
                }
            }
        }
    }
}

/// Starts the pulls of one session, whose replies are checked against rows of `width` values.
pub fn start(
    mut client: Client,
    session: bytes::Bytes,
    width: usize,
    mut asks: mpsc::UnboundedReceiver<Ask>,
) -> JoinHandle<Result<(), Status>> {
    tokio::spawn(async move {
        let (requests, outgoing) = mpsc::unbounded_channel();
        // The first request, without keys, says whose pulls they are.
        let hello = v1::RowRequest { session, ..Default::default() };
        requests.send(hello).ok();
        let mut replies = client.pull_rows(UnboundedReceiverStream::new(outgoing)).await?.into_inner();
        let (mut last, mut waiting) = (0, HashMap::new());
        loop {
            tokio::select! {
                ask = asks.recv() => {
                    let Some(Ask { step, keys, answer }) = ask else { return Ok(()) };
                    last += 1;
                    waiting.insert(last, (answer, keys.len()));
                    let pieces = keys.len().div_ceil(KEYS).max(1);
                    for piece in 0..pieces {
                        let keys = &keys[piece * KEYS..((piece + 1) * KEYS).min(keys.len())];
                        let keys = keys.iter().flat_map(|key| key.to_le_bytes()).collect::<Vec<u8>>().into();
                        let more = piece + 1 < pieces;
                        let request = v1::RowRequest { pull: last, step, keys, more, ..Default::default() };
                        requests.send(request).ok();
                    }
                }
                reply = replies.message() => {
                    let Some(reply) = reply? else { return Ok(()) };
                    let (pull, over) = (reply.pull, reply.last);
                    let Some((answer, keys)) = waiting.get(&pull) else {
                        return Err(Status::invalid_argument("there is no such pull"));
                    };
                    check(&reply, *keys, width)?;
                    // Where nobody waits any more, the step was given to another.
                    answer.send(reply).ok();
                    if over {
                        waiting.remove(&pull);
                    }
                }
            }
        }
    })
}

/// Whether a reply to a pull of so many keys is whole: it came as it was sent, of keys that there are, and values are finite.
fn check(reply: &v1::RowReply, keys: usize, width: usize) -> Result<(), Status> {
    let v1::RowReply { places, values, checksum, late, .. } = reply;
    let mut got = wire::Checksum::new();
    got.write(places);
    got.write(values);
    let rows = places.len() / 4;
    let known = places.as_chunks::<4>().0.iter().all(|place| (u32::from_le_bytes(*place) as usize) < keys);
    let whole = known && places.len() == 4 * rows && values.len() == 4 * rows * width;
    let sound = whole && (*late || got.finish() == *checksum) && unisono_common::kernels::all_finite_bytes(values);
    if sound { Ok(()) } else { Err(Status::data_loss("rows were damaged on the way")) }
}
