//! How fast bytes come and go, for who wants to know before it joins.

use crate::entrance::Peer;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use unisono_proto::v1::probe_server::ProbeServer;
use unisono_proto::v1::{self, DownloadRequest, Filler, UploadReply};

/// Bytes of one call, at most, and of a message.
const MOST: u64 = 64 << 20;
const PIECE: usize = 256 << 10;
/// How long a call waits for its turn, and how long it lasts at most.
const PATIENCE: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(15);

/// The service `Probe` of the proto file.
pub struct Probe {
    /// One call at a time: those who train are disturbed by no more.
    turn: Arc<Semaphore>,
}

impl Probe {
    /// The service, as a server has it.
    pub fn server() -> ProbeServer<Probe> {
        let probe = Probe { turn: Arc::new(Semaphore::new(1)) };
        ProbeServer::new(probe).max_decoding_message_size(PIECE + (1 << 10))
    }

    async fn turn(&self) -> Result<OwnedSemaphorePermit, Status> {
        let turn = tokio::time::timeout(PATIENCE, self.turn.clone().acquire_owned()).await;
        let busy = || Status::resource_exhausted("somebody else measures the bandwidth: try again soon");
        turn.ok().and_then(Result::ok).ok_or_else(busy)
    }
}

#[tonic::async_trait]
impl v1::probe_server::Probe for Probe {
    type DownloadStream = ReceiverStream<Result<Filler, Status>>;

    async fn download(&self, request: Request<DownloadRequest>) -> Result<Response<Self::DownloadStream>, Status> {
        let peer = Peer::of(&request)?.clone();
        let mut left = request.into_inner().bytes;
        if left > MOST {
            return Err(Status::invalid_argument(format!("{left} bytes are too many: {MOST} at most")));
        }
        let turn = self.turn().await?;
        // Who measures one way measures the other way next, and begins to send before anybody can say so.
        peer.allow(MOST + MOST / 8);
        let (send, receive) = mpsc::channel(2);
        tokio::spawn(async move {
            let _turn = turn;
            let zeros = Bytes::from(vec![0; PIECE]);
            let sending = async {
                while left > 0 {
                    let bytes = zeros.slice(..PIECE.min(left as usize));
                    left -= bytes.len() as u64;
                    if send.send(Ok(Filler { bytes })).await.is_err() {
                        return;
                    }
                }
            };
            tokio::time::timeout(LONGEST, sending).await.ok();
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn upload(&self, request: Request<Streaming<Filler>>) -> Result<Response<UploadReply>, Status> {
        let _turn = self.turn().await?;
        let (mut pieces, mut bytes) = (request.into_inner(), 0);
        let taking = async {
            while let Some(piece) = pieces.message().await? {
                bytes += piece.bytes.len() as u64;
                if bytes >= MOST {
                    break;
                }
            }
            Ok(Response::new(UploadReply { bytes }))
        };
        let late = |_| Status::deadline_exceeded("the bytes did not come within 15 s");
        tokio::time::timeout(LONGEST, taking).await.map_err(late)?
    }
}
