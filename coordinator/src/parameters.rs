//! Gradients in and weights out, as a gRPC service by hand: a generated one would copy each chunk on its way. Here a chunk of
//! a gradient is added up from the memory it came in, and all streams send the same bytes of a chunk of weights.

use crate::entrance::Peer;
use crate::line::IN_TIME;
use crate::push::{Push, check_keys};
use crate::rows::RowGradient;
use crate::shared::{Input, Shared};
use crate::sum::Gradient;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, header::CONTENT_TYPE};
use http_body::Frame;
use http_body_util::StreamBody;
use std::convert::Infallible;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Status, codegen::Service};
use unisono_common::ids::{Version, WorkerId};
use unisono_common::kernels;
use unisono_common::rows::sums::RowSums;
use unisono_proto::stream::{self, ChunkHead, Part, Reader};
use unisono_proto::{self as wire, WireError, v1};

/// Chunks of one push whose updates run at once, at most.
const AT_ONCE: usize = 8;

/// Frames that wait for one stream's socket, at most: those of four chunks. A run sends a worker's chunks one by one.
pub const AHEAD: usize = 8;

/// What answers the calls of the service.
pub trait Answer: Clone + Send + 'static {
    /// The response to one.
    ///
    /// # Errors
    /// Why there is none.
    fn answer(self, request: Request<Body>) -> impl Future<Output = Result<Response<Body>, Status>> + Send;
}

/// The service `Parameters` of the proto file, over the shared state of one run, or over nothing ([`crate::bare`]).
#[derive(Clone)]
pub struct Parameters<T>(pub T);

impl<T> NamedService for Parameters<T> {
    const NAME: &'static str = "unisono.v1.Parameters";
}

impl<T: Answer> Service<Request<Body>> for Parameters<T> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answers = self.0.clone();
        Box::pin(async move { Ok(answers.answer(request).await.unwrap_or_else(Status::into_http)) })
    }
}

impl Answer for Arc<Shared> {
    async fn answer(self, request: Request<Body>) -> Result<Response<Body>, Status> {
        answer(self, request).await
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Body>) -> Result<Response<Body>, Status> {
    let (send, receive) = mpsc::channel(AHEAD);
    let peer = request.extensions().get::<Peer>().cloned();
    match request.uri().path() {
        "/unisono.v1.Parameters/Broadcast" => {
            let mut reader = Reader::new(request.into_body());
            let asked: v1::BroadcastRequest = first(reader.short()).await?;
            let worker = shared.member_in(&asked.session).await?;
            tokio::spawn(async move {
                let _belongs = peer.map(Peer::belongs);
                broadcast(shared, worker, asked.session, send).await;
            });
        }
        "/unisono.v1.Parameters/Push" => {
            let mut reader = Reader::new(request.into_body());
            let Part::Short(v1::push_part::Kind::Session(session)) = first(reader.part()).await? else {
                return Err(Status::invalid_argument("the first message of a push must be the session"));
            };
            let worker = shared.member_in(&session).await?;
            let _belongs = peer.map(Peer::belongs);
            let taken = take(&shared, worker, reader).await;
            // A worker that cannot push is of no use: it leaves, and what it owes is done by others.
            let why = taken.as_ref().err().map_or("its pushes ended", stream::why).to_string();
            shared.input(Input::Broken { worker, why });
            taken?;
            send.send(Ok(Frame::data(stream::short(&v1::PushReply {})))).await.ok();
            finish(&send).await;
        }
        _ => return Err(Status::unimplemented("the service Parameters has two methods, Push and Broadcast")),
    }
    Ok(streamed(receive))
}

/// The response whose frames these are.
pub fn streamed(frames: mpsc::Receiver<Result<Frame<Bytes>, Status>>) -> Response<Body> {
    let mut response = Response::new(Body::new(StreamBody::new(ReceiverStream::new(frames))));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// The first message of a request, which must come soon.
pub async fn first<M>(message: impl Future<Output = Result<Option<M>, Status>>) -> Result<M, Status> {
    let message = tokio::time::timeout(Duration::from_secs(10), message).await;
    let message = message.map_err(|_| Status::deadline_exceeded("no request came for 10 s"))??;
    message.ok_or_else(|| Status::invalid_argument("the request is empty"))
}

/// Ends a stream well.
pub async fn finish(send: &mpsc::Sender<Result<Frame<Bytes>, Status>>) {
    let mut status = HeaderMap::new();
    status.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
    send.send(Ok(Frame::trailers(status))).await.ok();
}

/// Takes the nodes and chunks of one worker, until its stream ends or something in it is wrong.
async fn take(shared: &Arc<Shared>, worker: WorkerId, mut reader: Reader<Body>) -> Result<(), Status> {
    let layout = shared.store.layout();
    let mut push = Push::of(worker, layout.chunks());
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut spent = None;
    let mut coming = Coming::default();
    let mut adding = None::<JoinHandle<()>>;
    while let Some(part) = reader.part().await? {
        match part {
            Part::Short(v1::push_part::Kind::Node(header)) => {
                end(&mut adding).await?;
                spent = None;
                push.begin(shared, &wire::header(&header, shared.job.train.partitions)?)?;
                coming = Coming { rows: header.rows as usize, ..Coming::default() };
            }
            Part::Short(v1::push_part::Kind::Spent(said)) if spent.is_none() => spent = Some(wire::spent(&said)),
            Part::Chunk(head, len) => {
                wire::check_head(layout, head.index, len)?;
                // Room first: a worker whose chunks wait is not read from.
                let turn = turns.clone().acquire_owned().await.map_err(|_| Status::unavailable("the run is over"))?;
                let values = reader.values().await?;
                wire::check_chunk(layout, head.summed(shared.store.needs_checksum)?, &values, |_, _| ())?;
                if let Some(chunk) = push.chunk(shared, head.index, spent)? {
                    // Here, while it is in the cache: to wake another thread takes longer than to add it up.
                    if let Some(index) = chunk.add(shared, Gradient::Wire(values)) {
                        let shared = shared.clone();
                        shared.clone().store.pool.spawn(move || {
                            shared.store.complete(index);
                            drop(turn);
                        });
                    }
                }
            }
            Part::Rows(head, len) => {
                if len > stream::ROW_PIECE {
                    return Err(WireError::Rows("a piece has more than 1 MiB").into());
                }
                let values = reader.values().await?;
                if let Some(sums) = coming.add(shared, head, &values)?
                    && let Some(rows) = push.rows()?
                {
                    // They may be the last of a step: what all rows become is computed while chunks come.
                    let shared = shared.clone();
                    let accept = move || rows.accept(&shared, RowGradient::Sums(sums));
                    adding = Some(tokio::task::spawn_blocking(accept));
                }
            }
            Part::Short(_) => {
                return Err(Status::invalid_argument(
                    "after its first message a push holds nodes and chunks, and what a node took, once",
                ));
            }
        }
        if push.is_whole() {
            end(&mut adding).await?;
        }
    }
    Ok(())
}

/// Waits until a node's rows are added.
async fn end(adding: &mut Option<JoinHandle<()>>) -> Result<(), Status> {
    match adding.take() {
        Some(adding) => adding.await.map_err(|_| Status::internal("the rows could not be added")),
        None => Ok(()),
    }
}

/// The rows of an open node, piece by piece.
#[derive(Default)]
struct Coming {
    /// How many were announced.
    rows: usize,
    pieces: u32,
    sums: RowSums,
}

impl Coming {
    /// Adds a piece; gives all rows when they are there.
    fn add(&mut self, shared: &Shared, head: ChunkHead, values: &Bytes) -> Result<Option<RowSums>, WireError> {
        let wrong = |what| Err(WireError::Rows(what));
        let Some(tables) = &shared.store.tables else { return wrong("the model has no sparse tables") };
        let width = tables.layout().width();
        let (each, rows) = (8 + 4 * width, values.len() / (8 + 4 * width));
        head.summed(shared.store.needs_checksum)?.check(|| wire::checksum(values))?;
        let all = self.sums.keys.len() + rows;
        let most = self.rows.min(shared.slots().rows);
        if values.len() != rows * each {
            return wrong("a piece does not hold whole rows");
        }
        if head.index != self.pieces {
            return wrong("a piece is not the next one");
        }
        if all > most || rows == 0 && all < self.rows {
            return wrong("there are more rows than can be, or a piece has none");
        }
        let (keys, gradients) = values.split_at(8 * rows);
        if !kernels::all_finite_bytes(gradients) {
            return wrong("a value is not finite");
        }
        self.sums.keys.extend(keys.as_chunks::<8>().0.iter().map(|key| u64::from_le_bytes(*key)));
        self.sums.values.extend(gradients.as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)));
        self.pieces += 1;
        if all < self.rows {
            return Ok(None);
        }
        let sums = std::mem::take(&mut self.sums);
        // Also of a node that is not owed any more: who sends such rows is of no use.
        check_keys(&sums.keys)?;
        Ok(Some(sums))
    }
}

/// Sends `worker` every version of every chunk as it is ready, the first chunks first, until nobody listens or the session is over.
async fn broadcast(
    shared: Arc<Shared>,
    worker: WorkerId,
    session: Bytes,
    send: mpsc::Sender<Result<Frame<Bytes>, Status>>,
) {
    let store = &shared.store;
    let mut changes = store.changes();
    let mut sent = vec![None; store.layout().chunks()];
    // Whether the last chunk was.
    let mut is_in_time = true;
    loop {
        changes.borrow_and_update();
        let place = match store.newer(&sent).next() {
            Some(index) if is_in_time => tokio::select! {
                place = store.line.place(worker, index, sent.len()) => Some(place),
                () = send.closed() => return,
            },
            Some(_) | None => None,
        };
        // It may have left while it waited.
        if shared.member(&session).is_err() {
            break;
        }
        let Some((index, next)) = store.next(&sent) else {
            drop(place);
            tokio::select! {
                _ = changes.changed() => continue,
                () = send.closed() => return,
            }
        };
        store.bytes_pulled.fetch_add(next.bytes.len() as u64, Ordering::Relaxed);
        sent[index] = Some(next.version);
        let Version { step, average } = next.version;
        let head = ChunkHead { step: step.0, average, index: index as u32, checksum: next.checksum };
        let mut sending = pin!(through(&send, stream::weights(head, &next.bytes)));
        let in_time = tokio::time::timeout(IN_TIME, &mut sending).await;
        is_in_time = in_time.is_ok();
        drop(place);
        let is_through = match in_time {
            Ok(is_through) => is_through,
            Err(_) => sending.await,
        };
        if !is_through {
            return;
        }
    }
    finish(&send).await;
}

/// Sends a message's parts, and waits until they are on their way; false where nobody listens.
async fn through(send: &mpsc::Sender<Result<Frame<Bytes>, Status>>, parts: impl Iterator<Item = Bytes>) -> bool {
    for part in parts {
        if send.send(Ok(Frame::data(part))).await.is_err() {
            return false;
        }
    }
    send.reserve_many(AHEAD).await.is_ok()
}
