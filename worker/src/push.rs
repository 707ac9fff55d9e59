//! The push stream: chunks are checked, summed up and sent beside the compute thread, from where they were computed.

use crate::connect::Client;
use crate::link::Piece;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use unisono_common::kernels;
use unisono_common::layout::Layout;
use unisono_proto::shm::frame::Header;
use unisono_proto::{self as wire, v1};

/// Chunks that wait for the socket, at most.
const AHEAD: usize = 4;

/// Starts the stream of one session.
pub fn start(
    mut client: Client,
    session: Bytes,
    layout: Layout,
    pieces: mpsc::UnboundedReceiver<Piece>,
    to_coordinator: &mpsc::UnboundedSender<v1::FromWorker>,
) -> JoinHandle<Result<(), Status>> {
    let (send, parts) = mpsc::channel(AHEAD);
    let to_coordinator = to_coordinator.clone();
    tokio::spawn(async move {
        let pushed = client.push(ReceiverStream::new(parts));
        let sent = async {
            let first = v1::PushPart { kind: Some(v1::push_part::Kind::Session(session)) };
            if send.send(first).await.is_ok() {
                encode(layout, pieces, send, to_coordinator).await;
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
    send: mpsc::Sender<v1::PushPart>,
    to_coordinator: mpsc::UnboundedSender<v1::FromWorker>,
) {
    let mut of: Option<Header> = None;
    while let Some(piece) = pieces.recv().await {
        let kind = match piece {
            Piece::Node(header) => {
                let Header { step, generation, node, sums } = header;
                of = Some(header);
                let node = Some(wire::to_wire(node));
                let (loss, weight, samples) = (sums.loss, sums.weight, sums.samples);
                v1::push_part::Kind::Node(v1::NodeHeader { step, generation, node, loss, weight, samples })
            }
            Piece::Chunk { index, part } => {
                let Some(header) = of else { continue };
                if !kernels::all_finite(part.values()) {
                    let bad = part.values().iter().position(|v| !v.is_finite()).unwrap_or(0);
                    let tensor = layout.tensor_at(layout.chunk(index).start + bad).map(|t| t.name.clone());
                    let (node, tensor) = (Some(wire::to_wire(header.node)), tensor.unwrap_or_default());
                    let diverged = v1::Diverged { step: header.step, node, tensor };
                    to_coordinator.send(v1::FromWorker { kind: Some(v1::from_worker::Kind::Diverged(diverged)) }).ok();
                    of = None;
                    continue;
                }
                let values = Bytes::from_owner(part);
                let crc = wire::crc(&values);
                v1::push_part::Kind::Chunk(v1::GradientChunk { index: index as u32, crc, values })
            }
        };
        if send.send(v1::PushPart { kind: Some(kind) }).await.is_err() {
            return;
        }
    }
}
