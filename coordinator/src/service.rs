//! The gRPC service: checks what comes in, and turns it into the driver's inputs and the store's chunks.

use crate::entrance::{Peer, admit};
use crate::pulls;
use crate::shared::{Input, Shared, Token};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream, wrappers::UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use unisono_common::ids::{Step, WorkerId};
use unisono_common::protocol::Kind;
use unisono_proto::identity::Role;
use unisono_proto::{self as wire, v1};

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Both services over the shared state of one run.
#[derive(Clone)]
pub struct Service(pub Arc<Shared>);

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
            return refuse("this worker read another job than the coordinator's".into());
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
        let first = tokio::time::timeout(Duration::from_secs(10), incoming.message())
            .await
            .map_err(|_| Status::deadline_exceeded("nothing came for 10 s; the first message must be Join"))??;
        let Some(v1::from_worker::Kind::Join(join)) = first.and_then(|m| m.kind) else {
            return Err(Status::invalid_argument("the first message of a session must be Join"));
        };
        self.check_join(&join)?;
        peer.belongs();
        let shared = self.0.clone();
        let (worker, token) = shared.enter().map_err(|e| Status::internal(e.to_string()))?;
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
        let enter = move |lane| Input::Join { worker, threads: join.threads, name, isa, to_worker, lane };
        // A worker that was offered shared memory says first whether it has got it. Another one is in before it knows its
        // session: what it does with it comes after.
        let waits = if offered {
            Some(enter)
        } else {
            shared.input(enter(None));
            None
        };
        tokio::spawn(async move {
            let guard = guard;
            if let Some(enter) = waits {
                let answer = tokio::time::timeout(Duration::from_secs(10), incoming.message()).await;
                let Ok(Ok(Some(v1::FromWorker { kind: Some(v1::from_worker::Kind::SharedMemory(answer)) }))) = answer
                else {
                    return;
                };
                let lane = shared.door.as_ref().and_then(|door| door.lane(&token));
                shared.input(enter(lane.filter(|_| answer.used)));
            }
            let partitions = shared.job.train.partitions;
            while let Some(Ok(message)) = incoming.next().await {
                match message.kind {
                    Some(v1::from_worker::Kind::Heartbeat(_)) => shared.heard(worker, Instant::now()),
                    Some(v1::from_worker::Kind::Leave(_)) => shared.input(Input::Drain { worker }),
                    Some(v1::from_worker::Kind::EvalDone(done)) => {
                        let (step, Ok(node)) = (Step(done.step), wire::node(done.node, partitions)) else { break };
                        if shared.owes(worker, step, Kind::Evaluate, node) {
                            let (sums, counts) = (done.sums, done.counts);
                            shared.input(Input::EvalDone { worker, step, node, sums, counts });
                        }
                    }
                    Some(v1::from_worker::Kind::Diverged(d)) => {
                        let Ok(node) = wire::node(d.node, partitions) else { break };
                        let tensor = d.tensor.chars().filter(|c| !c.is_control()).take(128).collect();
                        shared.input(Input::Diverged { worker, step: Step(d.step), node, tensor });
                    }
                    Some(v1::from_worker::Kind::Join(_) | v1::from_worker::Kind::SharedMemory(_)) | None => break,
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
        shared.member(&request.session)?;
        if request.partition >= shared.job.train.partitions {
            return Err(wire::WireError::Range { field: "partition", value: request.partition.to_string() }.into());
        }
        // A partition in memory twice is enough, whoever asks for how many.
        let turn = shared.encoding.clone().acquire_owned().await.map_err(|_| Status::unavailable("the run is over"))?;
        let encode = move || shared.partition_bytes(request.partition, request.test);
        let encoded = tokio::task::spawn_blocking(encode).await;
        let bytes = encoded.map_err(|_| Status::internal("the partition could not be read"))?;
        let (send, receive) = mpsc::channel(2);
        tokio::spawn(async move {
            let _turn = turn;
            let total = bytes.len() as u64;
            for at in (0..bytes.len()).step_by(1 << 20) {
                let piece = bytes.slice(at..(at + (1 << 20)).min(bytes.len()));
                let checksum = wire::checksum(&piece);
                // Who does not read what it asked for keeps others from theirs.
                let sent =
                    send.send_timeout(Ok(v1::DataPiece { bytes: piece, checksum, total }), Duration::from_secs(30));
                if sent.await.is_err() {
                    return;
                }
            }
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
