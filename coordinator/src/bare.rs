//! The streams of [`crate::parameters`] with nothing behind them: what moving bytes costs by itself.

use crate::lock;
use crate::parameters::{AHEAD, Answer, Parameters, finish, first, streamed};
use crate::turns::Turns;
use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tonic::Status;
use tonic::body::Body;
use tonic::transport::server::TcpIncoming;
use unisono_proto::stream::{self, ChunkHead, Part, Reader};
use unisono_proto::v1;

/// A server on this machine that takes chunks of gradients, and sends each session a chunk of weights for each that came of it; it
/// ends when this is dropped.
pub struct Bare {
    pub url: String,
    /// Bytes of gradients so far.
    pub came: Arc<AtomicU64>,
    _server: JoinSet<Result<(), tonic::transport::Error>>,
}

impl Bare {
    /// Listens on a free port; each chunk of weights has so many bytes, and so many go ahead.
    ///
    /// # Errors
    /// Where there is no port.
    pub async fn listen(chunk: usize, ahead: usize) -> io::Result<Bare> {
        let came = Arc::new(AtomicU64::new(0));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let streams = Streams { came: came.clone(), values: vec![0; chunk].into(), ahead, owed: Arc::default() };
        // Read as those of a run are.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).map(|wire| wire.map(Turns::new));
        let server = crate::server().add_service(Parameters(streams)).serve_with_incoming(incoming);
        Ok(Bare { url, came, _server: JoinSet::from_iter([server]) })
    }
}

#[derive(Clone)]
struct Streams {
    came: Arc<AtomicU64>,
    values: Bytes,
    ahead: usize,
    /// Chunks that each session is still to be sent.
    owed: Arc<Mutex<HashMap<Bytes, Arc<Semaphore>>>>,
}

impl Streams {
    fn owed(&self, session: Bytes) -> Arc<Semaphore> {
        let first = || Arc::new(Semaphore::new(self.ahead));
        lock(&self.owed).entry(session).or_insert_with(first).clone()
    }
}

impl Answer for Streams {
    async fn answer(self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (send, receive) = mpsc::channel(AHEAD);
        let is_push = request.uri().path().ends_with("/Push");
        let mut reader = Reader::new(request.into_body());
        if !is_push {
            let asked: v1::BroadcastRequest = first(reader.short()).await?;
            tokio::spawn(async move {
                let owed = self.owed(asked.session);
                while let Ok(one) = owed.acquire().await {
                    one.forget();
                    for part in stream::weights(ChunkHead::default(), &self.values) {
                        if send.send(Ok(Frame::data(part))).await.is_err() {
                            return;
                        }
                    }
                }
            });
        } else {
            let Part::Short(v1::push_part::Kind::Session(session)) = first(reader.part()).await? else {
                return Err(Status::invalid_argument("the first message of a push must be the session"));
            };
            let owed = self.owed(session);
            while let Some(part) = reader.part().await? {
                if let Part::Chunk(..) | Part::Rows(..) = part {
                    self.came.fetch_add(reader.values().await?.len() as u64, Ordering::Relaxed);
                    owed.add_permits(1);
                }
            }
            send.send(Ok(Frame::data(stream::short(&v1::PushReply {})))).await.ok();
            finish(&send).await;
        }
        Ok(streamed(receive))
    }
}
