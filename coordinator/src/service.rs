//! The gRPC service: checks what comes in, and turns it into the driver's inputs and the store's chunks.

use crate::entrance::{Peer, STALL, admit};
use crate::pulls;
use crate::rate::{Bucket, Rate};
use crate::shared::{Input, Shared, Token};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{self, error::SendTimeoutError};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream, wrappers::UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use unisono_common::ids::{Step, WorkerId};
use unisono_common::protocol::Kind;
use unisono_proto::identity::Role;
use unisono_proto::{self as wire, v1};

/// A piece of a partition is taken so soon by those who do not read slowly.
const IN_TIME: Duration = Duration::from_secs(1);

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Both services over the shared state of one run.
#[derive(Clone)]
pub struct Service(pub Arc<Shared>);

/// A session's next message comes so soon, until its worker is a member.
const SOON: Duration = Duration::from_secs(10);
/// Messages of a member: a sign of life each second, and what it has evaluated.
const MESSAGES: Rate = Rate { burst: 10_000.0, each_second: 1000.0 };

/// What a session says next; `None` where that does not come soon, or is nothing.
async fn word(incoming: &mut Streaming<v1::FromWorker>) -> Option<v1::from_worker::Kind> {
    tokio::time::timeout(SOON, incoming.message()).await.ok()?.ok()??.kind
}

/// Tells the driver that a session is over, however it ended.
struct SessionGuard {
    shared: Arc<Shared>,
    worker: WorkerId,
    token: Token,
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.shared.leave(self.worker);
        // It may have gone through the door and not said so.
        self.shared.door.as_ref().map(|door| door.lane(&self.token));
        self.shared.input(Input::Left { worker: self.worker });
    }
}

fn check_version(version: &str) -> Result<(), Status> {
    if version == wire::VERSION {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "this worker is unisono {version}, the coordinator is {}: install the same version on both machines",
        wire::VERSION
    )))
}

impl Service {
    fn check_join(&self, join: &v1::Join) -> Result<(), Status> {
        let s = &self.0;
        let refuse = |message: String| Err(Status::failed_precondition(message));
        check_version(&join.version)?;
        if !(1..=wire::MAX_THREADS).contains(&join.threads) {
            return Err(wire::WireError::Range { field: "threads", value: join.threads.to_string() }.into());
        }
        if join.simulated && s.measure.is_none() {
            return refuse("this worker only pretends to compute, and this run is not a measurement".into());
        }
        if wire::digest("job_digest", &join.job_digest)? != s.job.digest() {
            return refuse(
                "this worker has another job than the coordinator's: start it again, it asks for the job then".into(),
            );
        }
        if wire::digest("layout_digest", &join.layout_digest)? != s.model_digest {
            return refuse(
                "this worker built another model from the same job: was it built from other sources?".into(),
            );
        }
        let fingerprint = wire::digest("fingerprint", &join.fingerprint)?;
        if fingerprint != s.fingerprint {
            let short = |d: &[u8; 32]| d[..4].iter().map(|b| format!("{b:02x}")).collect::<String>();
            return refuse(format!(
                "this machine computes other bits than the coordinator's (numerics fingerprint {} here, {} there): \
                 use machines of one type",
                short(&fingerprint),
                short(&s.fingerprint)
            ));
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl v1::coordinator_server::Coordinator for Service {
    async fn get_job(&self, request: Request<v1::GetJobRequest>) -> Result<Response<v1::GetJobReply>, Status> {
        Peer::of(&request)?.take_job()?;
        check_version(&request.into_inner().version)?;
        let json = |e: serde_json::Error| Status::internal(e.to_string());
        Ok(Response::new(v1::GetJobReply {
            job: serde_json::to_string(&self.0.job).map_err(json)?,
            prepared: serde_json::to_string(&self.0.prepared).map_err(json)?,
        }))
    }

    type SessionStream = Out<v1::ToWorker>;

    async fn session(
        &self,
        request: Request<Streaming<v1::FromWorker>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let peer = Peer::of(&request)?.clone();
        let mut incoming = request.into_inner();
        let first = tokio::time::timeout(SOON, incoming.message())
            .await
            .map_err(|_| Status::deadline_exceeded("nothing came for 10 s; the first message must be Join"))??;
        let Some(v1::from_worker::Kind::Join(join)) = first.and_then(|m| m.kind) else {
            return Err(Status::invalid_argument("the first message of a session must be Join"));
        };
        self.check_join(&join)?;
        let shared = self.0.clone();
        let (worker, token, comes_in) = shared.enter().map_err(|e| Status::internal(e.to_string()))?;
        let (to_worker, outgoing) = mpsc::unbounded_channel();
        let guard = SessionGuard { shared: shared.clone(), worker, token };
        let session = token.to_vec().into();
        let door = shared.door.as_ref().filter(|_| join.shared_memory).map(|door| door.name().to_string());
        let offered = door.is_some();
        let door = door.unwrap_or_default();
        let joined = v1::Joined { worker_id: worker.0, heartbeat_ms: shared.heartbeat_ms, session, door };
        to_worker.send(Ok(v1::ToWorker { kind: Some(v1::to_worker::Kind::Joined(joined)) })).ok();
        let plain = |text: &str| text.chars().filter(|c| !c.is_control()).take(64).collect::<String>();
        let (name, isa) = (plain(&join.name), plain(&join.isa));
        tokio::spawn(async move {
            let guard = guard;
            // A worker that was offered shared memory says first whether it has got it.
            let mut lane = None;
            if offered {
                let Some(v1::from_worker::Kind::SharedMemory(answer)) = word(&mut incoming).await else { return };
                lane = shared.door.as_ref().and_then(|door| door.lane(&token)).filter(|_| answer.used);
            }
            // Who says no more than that it joins stays a stranger, and holds up no step.
            let Some(v1::from_worker::Kind::Heartbeat(_)) = word(&mut incoming).await else { return };
            let _belongs = peer.belongs();
            shared.input(Input::Join { worker, threads: join.threads, name, isa, to_worker, lane });
            comes_in.send_replace(true);
            let (partitions, mut left) = (shared.job.train.partitions, Bucket::new(MESSAGES, Instant::now()));
            while let Some(Ok(message)) = incoming.next().await {
                match message.kind {
                    Some(v1::from_worker::Kind::Heartbeat(_)) => shared.heard(worker, Instant::now()),
                    Some(v1::from_worker::Kind::Leave(_)) => shared.input(Input::Drain { worker }),
                    Some(v1::from_worker::Kind::EvalDone(done)) => {
                        let (step, Ok(node)) = (Step(done.step), wire::node(done.node, partitions)) else { break };
                        if shared.owes(worker, step, Kind::Evaluate, node) {
                            let (sums, counts) = (done.sums, done.counts);
                            shared.input(Input::EvalDone { worker, step, node, sums, counts });
                            continue; // it was asked for, however often
                        }
                    }
                    Some(v1::from_worker::Kind::Diverged(d)) => {
                        let Ok(node) = wire::node(d.node, partitions) else { break };
                        let tensor = d.tensor.chars().filter(|c| !c.is_control()).take(128).collect();
                        shared.input(Input::Diverged { worker, step: Step(d.step), node, tensor });
                    }
                    Some(v1::from_worker::Kind::Join(_) | v1::from_worker::Kind::SharedMemory(_)) | None => break,
                }
                if !left.take(MESSAGES, Instant::now()) {
                    let why = "it sends too many messages: 1,000 a second may come".into();
                    shared.input(Input::Broken { worker, why });
                    break;
                }
            }
            drop(guard);
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(outgoing))))
    }

    type FetchPartitionStream = Out<v1::DataPiece>;

    async fn fetch_partition(
        &self,
        request: Request<v1::FetchRequest>,
    ) -> Result<Response<Self::FetchPartitionStream>, Status> {
        let request = request.into_inner();
        let shared = self.0.clone();
        let session = shared.session(&request.session)?;
        if request.partition >= shared.job.train.partitions {
            return Err(wire::WireError::Range { field: "partition", value: request.partition.to_string() }.into());
        }
        // A partition in memory twice is enough, and once more for each member that reads slowly.
        let over = |_| Status::unavailable("the run is over");
        let reading = session.reading.lock_owned().await;
        let turn = shared.encoding.clone().acquire_owned().await.map_err(over)?;
        shared.member(&request.session)?;
        let of = shared.clone();
        let encode = move || (of.partition_bytes(request.partition, request.test), turn);
        let encoded = tokio::task::spawn_blocking(encode).await;
        let (bytes, turn) = encoded.map_err(|_| Status::internal("the partition could not be read"))?;
        let (send, receive) = mpsc::channel(2);
        tokio::spawn(async move {
            let (total, _reading, mut turn) = (bytes.len() as u64, reading, Some(turn));
            for at in (0..bytes.len()).step_by(1 << 20) {
                let piece = bytes.slice(at..(at + (1 << 20)).min(bytes.len()));
                let checksum = wire::checksum(&piece);
                let piece = match send.send_timeout(Ok(v1::DataPiece { bytes: piece, checksum, total }), IN_TIME).await
                {
                    Ok(()) => continue,
                    Err(SendTimeoutError::Closed(_)) => return,
                    Err(SendTimeoutError::Timeout(piece)) => piece,
                };
                // Who reads slowly keeps nobody from theirs, and is sent no more when it is no member any more.
                turn = None;
                if shared.member(&request.session).is_err() || send.send_timeout(piece, STALL).await.is_err() {
                    return;
                }
            }
            drop(turn);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    type PullRowsStream = Out<v1::RowReply>;

    async fn pull_rows(
        &self,
        request: Request<Streaming<v1::RowRequest>>,
    ) -> Result<Response<Self::PullRowsStream>, Status> {
        let (send, receive) = mpsc::channel(2);
        tokio::spawn(pulls::serve(self.0.clone(), request.into_inner(), send));
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}

#[tonic::async_trait]
impl v1::operator_server::Operator for Service {
    async fn status(&self, request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        admit(&request, None)?;
        Ok(Response::new(self.0.status(Instant::now())))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        admit(&request, Some(Role::Operator))?;
        let worker = WorkerId(request.into_inner().worker_id);
        if !self.0.members(Instant::now()).iter().any(|m| m.id == worker.0) {
            return Err(Status::not_found(format!("there is no worker {worker}: `unisono status` lists them")));
        }
        self.0.input(Input::Drain { worker });
        Ok(Response::new(v1::DrainReply {}))
    }

    async fn stop(&self, request: Request<v1::StopRequest>) -> Result<Response<v1::StopReply>, Status> {
        admit(&request, Some(Role::Operator))?;
        self.0.input(Input::Stop);
        Ok(Response::new(v1::StopReply {}))
    }
}
