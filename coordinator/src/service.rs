//! The gRPC service: checks what comes in, and turns it into the driver's inputs and the store's chunks.

use crate::driver::{Input, Shared};
use crate::store::Sent;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream, wrappers::UnboundedReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use unisono_common::ids::{Step, WorkerId};
use unisono_common::loss::LossSums;
use unisono_common::protocol::Kind;
use unisono_proto::{self as wire, v1};

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Both services over the shared state of one run.
#[derive(Clone)]
pub struct Service(pub Arc<Shared>);

/// Tells the driver that a session is over, however it ended.
struct SessionGuard {
    shared: Arc<Shared>,
    worker: WorkerId,
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.shared.input(Input::Left { worker: self.worker });
    }
}

impl Service {
    fn check_join(&self, join: &v1::Join) -> Result<(), Status> {
        let s = &self.0;
        let refuse = |message: String| Err(Status::failed_precondition(message));
        if join.version != wire::VERSION {
            return refuse(format!(
                "this worker is unisono {}, the coordinator is {}: install the same version on both machines",
                join.version,
                wire::VERSION
            ));
        }
        if !(1..=wire::MAX_THREADS).contains(&join.threads) {
            return Err(wire::WireError::Range { field: "threads", value: join.threads.to_string() }.into());
        }
        if wire::digest("job_digest", &join.job_digest)? != s.job.digest() {
            return refuse("this worker read another job than the coordinator's".into());
        }
        if wire::digest("layout_digest", &join.layout_digest)? != s.store.layout().digest() {
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
        let version = request.into_inner().version;
        if version != wire::VERSION {
            return Err(Status::failed_precondition(format!(
                "this worker is unisono {version}, the coordinator is {}: install the same version on both machines",
                wire::VERSION
            )));
        }
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
        let mut incoming = request.into_inner();
        let first = tokio::time::timeout(std::time::Duration::from_secs(10), incoming.message())
            .await
            .map_err(|_| Status::deadline_exceeded("nothing came for 10 s; the first message must be Join"))??;
        let Some(v1::from_worker::Kind::Join(join)) = first.and_then(|m| m.kind) else {
            return Err(Status::invalid_argument("the first message of a session must be Join"));
        };
        self.check_join(&join)?;
        let shared = self.0.clone();
        let worker = shared.new_worker_id();
        let (to_worker, outgoing) = mpsc::unbounded_channel();
        let joined = v1::Joined { worker_id: worker.0, heartbeat_ms: shared.heartbeat_ms };
        to_worker.send(Ok(v1::ToWorker { kind: Some(v1::to_worker::Kind::Joined(joined)) })).ok();
        let name: String = join.name.chars().filter(|c| !c.is_control()).take(64).collect();
        shared.input(Input::Join { worker, threads: join.threads, name, to_worker });
        let guard = SessionGuard { shared: shared.clone(), worker };
        tokio::spawn(async move {
            let guard = guard;
            let partitions = shared.job.train.partitions;
            while let Some(Ok(message)) = incoming.next().await {
                match message.kind {
                    Some(v1::from_worker::Kind::Heartbeat(_)) => shared.input(Input::Heartbeat { worker }),
                    Some(v1::from_worker::Kind::EvalDone(done)) => match wire::node(done.node, partitions) {
                        Ok(node) => shared.input(Input::EvalDone {
                            worker,
                            step: Step(done.step),
                            node,
                            sums: done.sums,
                            counts: done.counts,
                        }),
                        Err(_) => break,
                    },
                    Some(v1::from_worker::Kind::Diverged(d)) => shared.input(Input::Diverged {
                        worker,
                        step: Step(d.step),
                        partition: d.partition,
                        tensor: d.tensor.chars().filter(|c| !c.is_control()).take(128).collect(),
                    }),
                    Some(v1::from_worker::Kind::Join(_)) | None => break,
                }
            }
            drop(guard);
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(outgoing))))
    }

    async fn push(&self, request: Request<Streaming<v1::PushPart>>) -> Result<Response<v1::PushReply>, Status> {
        let mut parts = request.into_inner();
        let first = parts.message().await?.and_then(|p| p.kind);
        let Some(v1::push_part::Kind::WorkerId(id)) = first else {
            return Err(Status::invalid_argument("the first message of a push must be the worker's id"));
        };
        let (shared, worker) = (self.0.clone(), WorkerId(id));
        let layout = shared.store.layout().clone();
        // The node that chunks belong to; `None` while it is not owed (late, or of another step).
        let mut open = None;
        let mut came = vec![false; layout.chunks()];
        while let Some(part) = parts.message().await? {
            match part.kind {
                Some(v1::push_part::Kind::Node(header)) => {
                    let node = wire::node(header.node, shared.job.train.partitions)?;
                    let sums = LossSums { loss: header.loss, weight: header.weight, samples: header.samples };
                    let most = node.len() as u64 * shared.job.train.micro_batch as u64;
                    let sound = sums.loss.is_finite() && sums.weight.is_finite() && sums.weight >= 0.0;
                    if !sound || sums.samples > most {
                        return Err(wire::WireError::Range {
                            field: "loss, weight or samples",
                            value: format!("{sums:?}"),
                        }
                        .into());
                    }
                    let step = Step(header.step);
                    if header.generation > shared.generation() {
                        let value = header.generation.to_string();
                        return Err(wire::WireError::Range { field: "generation", value }.into());
                    }
                    came.fill(false);
                    let left = Arc::new(AtomicUsize::new(layout.chunks()));
                    open = shared.owes(worker, step, Kind::Train, node).then_some((step, node, sums, left));
                }
                Some(v1::push_part::Kind::Chunk(chunk)) => {
                    wire::check_chunk(&layout, chunk.index, chunk.crc, &chunk.values)?;
                    if std::mem::replace(&mut came[chunk.index as usize], true) {
                        return Err(Status::invalid_argument(format!("chunk {} came twice", chunk.index)));
                    }
                    let Some((step, node, sums, left)) = open.clone() else { continue };
                    let shared = shared.clone();
                    self.0.pool.spawn(move || {
                        if left.fetch_sub(1, Ordering::SeqCst) == 1 {
                            shared.input(Input::NodeDone { worker, step, node });
                        }
                        shared.store.accept(step, node, sums, chunk.index as usize, chunk.values);
                    });
                }
                Some(v1::push_part::Kind::WorkerId(_)) | None => {
                    return Err(Status::invalid_argument("a push holds nodes and chunks after its first message"));
                }
            }
        }
        Ok(Response::new(v1::PushReply {}))
    }

    type BroadcastStream = Out<v1::WeightChunk>;

    async fn broadcast(
        &self,
        request: Request<v1::BroadcastRequest>,
    ) -> Result<Response<Self::BroadcastStream>, Status> {
        let worker = WorkerId(request.into_inner().worker_id);
        let shared = self.0.clone();
        if !shared.knows(worker) {
            return Err(Status::not_found(format!("worker {worker} has no session: join first")));
        }
        let (send, receive) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut changes = shared.store.changes();
            let mut sent = vec![None; shared.store.layout().chunks()];
            loop {
                changes.borrow_and_update();
                let mut idle = true;
                for (index, sent) in sent.iter_mut().enumerate() {
                    let Some(Sent { step, crc, bytes: values }) = shared.store.next(index, *sent) else { continue };
                    shared.store.bytes_pulled.fetch_add(values.len() as u64, Ordering::Relaxed);
                    let chunk = v1::WeightChunk { step: step.0, index: index as u32, crc, values };
                    if send.send(Ok(chunk)).await.is_err() {
                        return;
                    }
                    *sent = Some(step);
                    idle = false;
                }
                if idle && changes.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }

    type FetchPartitionStream = Out<v1::DataPiece>;

    async fn fetch_partition(
        &self,
        request: Request<v1::FetchRequest>,
    ) -> Result<Response<Self::FetchPartitionStream>, Status> {
        let request = request.into_inner();
        let shared = self.0.clone();
        if !shared.knows(WorkerId(request.worker_id)) {
            return Err(Status::not_found("join first"));
        }
        if request.partition >= shared.job.train.partitions {
            return Err(wire::WireError::Range { field: "partition", value: request.partition.to_string() }.into());
        }
        let encode = move || shared.partition_bytes(request.partition, request.test);
        let encoded = tokio::task::spawn_blocking(encode).await;
        let bytes = encoded.map_err(|_| Status::internal("the partition could not be read"))?;
        let (send, receive) = mpsc::channel(2);
        tokio::spawn(async move {
            let total = bytes.len() as u64;
            for at in (0..bytes.len()).step_by(1 << 20) {
                let piece = bytes.slice(at..(at + (1 << 20)).min(bytes.len()));
                let crc = wire::crc(&piece);
                if send.send(Ok(v1::DataPiece { bytes: piece, crc, total })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}

#[tonic::async_trait]
impl v1::operator_server::Operator for Service {
    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        Ok(Response::new(self.0.status(Instant::now())))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        let worker = WorkerId(request.into_inner().worker_id);
        if !self.0.knows(worker) {
            return Err(Status::not_found(format!("there is no worker {worker}: `unisono status` lists them")));
        }
        self.0.input(Input::Drain { worker });
        Ok(Response::new(v1::DrainReply {}))
    }

    async fn stop(&self, _: Request<v1::StopRequest>) -> Result<Response<v1::StopReply>, Status> {
        self.0.input(Input::Stop);
        Ok(Response::new(v1::StopReply {}))
    }
}
