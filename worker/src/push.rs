//! The push stream: chunks are checked, summed up and sent beside the compute thread, from where they were computed.

use crate::connect::{Channel, call};
use crate::link::Piece;
use bytes::Bytes;
use http_body::Frame;
use http_body_util::StreamBody;
use std::convert::Infallible;
use std::ops::Range;
use std::time::Instant;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::body::Body;
use unisono_common::kernels;
use unisono_common::layout::{Layout, le_bytes};
use unisono_proto::shm::frame::{Header, Spent};
use unisono_proto::stream::{self, ChunkHead};
use unisono_proto::{self as wire, v1};

/// Frames that wait for the socket, at most: four chunks.
const AHEAD: usize = 8;

type Data = Result<Frame<Bytes>, Infallible>;

fn short(kind: v1::push_part::Kind) -> Data {
    Ok(Frame::data(stream::short(&v1::PushPart { kind: Some(kind) })))
}

/// Starts the stream of one session.
pub fn start(
    channel: Channel,
    session: Bytes,
    layout: Layout,
    pieces: mpsc::UnboundedReceiver<Piece>,
    to_coordinator: &mpsc::UnboundedSender<v1::FromWorker>,
) -> JoinHandle<Result<(), Status>> {
    let (send, parts) = mpsc::channel(AHEAD);
    let (to_coordinator, needs_checksum) = (to_coordinator.clone(), channel.needs_checksum());
    tokio::spawn(async move {
        let body = Body::new(StreamBody::new(ReceiverStream::new(parts)));
        let pushed = async { call(channel, "Push", body).await?.short::<v1::PushReply>().await };
        let sent = async {
            if send.send(short(v1::push_part::Kind::Session(session))).await.is_ok() {
                encode(layout, pieces, needs_checksum, send, to_coordinator).await;
            }
        };
        let (pushed, ()) = tokio::join!(pushed, sent);
        pushed.map(|_| ())
    })
}

/// Makes messages of pieces, until nobody has more.
async fn encode(
    layout: Layout,
    mut pieces: mpsc::UnboundedReceiver<Piece>,
    needs_checksum: bool,
    send: mpsc::Sender<Data>,
    to_coordinator: mpsc::UnboundedSender<v1::FromWorker>,
) {
    let mut of: Option<Header> = None;
    // When each of the node's chunks was encoded, and its bytes.
    let mut encoded: Vec<(Range<Instant>, usize)> = Vec::new();
    while let Some(piece) = pieces.recv().await {
        match piece {
            Piece::Node(header) => {
                let Header { step, generation, node, sums, rows } = header;
                of = Some(header);
                encoded.clear();
                let node = Some(wire::to_wire(node));
                let (loss, weight, samples) = (sums.loss, sums.weight, sums.samples);
                let header = v1::NodeHeader { step, generation, node, loss, weight, samples, rows };
                if send.send(short(v1::push_part::Kind::Node(header))).await.is_err() {
                    return;
                }
            }
            Piece::Rows(part) => {
                let Some(header) = of else { continue };
                let (keys, values) = part.values();
                if !kernels::all_finite(values) {
                    let tensor = "a sparse table".into();
                    let (step, node) = (header.step, Some(wire::to_wire(header.node)));
                    let diverged = v1::from_worker::Kind::Diverged(v1::Diverged { step, node, tensor });
                    to_coordinator.send(v1::FromWorker { kind: Some(diverged) }).ok();
                    of = None;
                    continue;
                }
                let width = values.len() / keys.len().max(1);
                let each = (stream::ROW_PIECE / (8 + 4 * width)).max(1);
                for index in 0..keys.len().div_ceil(each).max(1) {
                    let some = index * each..((index + 1) * each).min(keys.len());
                    let mut bytes = Vec::with_capacity(some.len() * (8 + 4 * width));
                    keys[some.clone()].iter().for_each(|key| bytes.extend_from_slice(&key.to_le_bytes()));
                    bytes.extend_from_slice(le_bytes(&values[some.start * width..some.end * width]));
                    let (bytes, index) = (Bytes::from(bytes), index as u32);
                    let head = ChunkHead {
                        index,
                        checksum: needs_checksum.then(|| wire::checksum(&bytes)),
                        ..ChunkHead::default()
                    };
                    for data in stream::rows(head, &bytes) {
                        if send.send(Ok(Frame::data(data))).await.is_err() {
                            return;
                        }
                    }
                }
            }
            Piece::Chunk { index, part, spent } => {
                let Some(header) = of else { continue };
                let began = Instant::now();
                let values = Bytes::from_owner(part);
                let look = wire::Look::at(&values, needs_checksum, |_, _| ());
                if !look.finite {
                    let bad = wire::first_not_finite(&values);
                    let tensor = layout.tensor_at(layout.chunk(index).start + bad).map(|t| t.name.clone());
                    let (node, tensor) = (Some(wire::to_wire(header.node)), tensor.unwrap_or_default());
                    let diverged = v1::Diverged { step: header.step, node, tensor };
                    to_coordinator.send(v1::FromWorker { kind: Some(v1::from_worker::Kind::Diverged(diverged)) }).ok();
                    of = None;
                    continue;
                }
                encoded.push((began..Instant::now(), values.len()));
                if let Some((spent, computed)) = spent {
                    let spent = with_encoding(spent, computed, &encoded);
                    if send.send(short(v1::push_part::Kind::Spent(spent))).await.is_err() {
                        return;
                    }
                }
                let head = ChunkHead { index: index as u32, checksum: look.checksum, ..ChunkHead::default() };
                for data in stream::gradient(head, &values) {
                    if send.send(Ok(Frame::data(data))).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// Adds what was encoded after the gradient was computed: before that, it was done beside.
fn with_encoding(spent: Spent, computed: Instant, encoded: &[(Range<Instant>, usize)]) -> v1::Spent {
    let Spent { data, forward, ahead: _, backward, mut encode, encoded: mut bytes } = spent;
    for (time, len) in encoded {
        let (whole, after) = (time.end - time.start, time.end.saturating_duration_since(computed.max(time.start)));
        encode += after.as_nanos() as u64;
        bytes += (*len as f64 * after.as_secs_f64() / whole.as_secs_f64().max(1e-9)) as u64;
    }
    v1::Spent { data, forward, backward, encode, encoded: bytes }
}
