//! One membership: join, take work and weights, push gradients, until the coordinator says goodbye.

use crate::cache::Cache;
use crate::compute::Compute;
use crate::connect::{Client, answer, call};
use crate::link::{Link, Order};
use crate::push;
use crate::rows;
use crate::samples::{Samples, Sent};
use crate::weights::{Coming, Incoming};
use crate::{Options, Transport};
use anyhow::{Context, Result, bail};
use http_body_util::Full;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::body::Body;
use unisono_common::data::partition::Partitions;
use unisono_common::data::{self, Prepared};
use unisono_common::ids::{Step, Version};
use unisono_common::job::{Job, Source};
use unisono_common::kernels;
use unisono_common::layout::{Layout, le_bytes_mut};
use unisono_common::loss::Loss;
use unisono_common::model::Model;
use unisono_common::protocol::Kind;
use unisono_common::protocol::worker::{Command, Event, Machine, Work};
use unisono_common::rows::optim::RowOptimizer;
use unisono_common::tree::Node;
use unisono_proto::shm::door::Opened;
use unisono_proto::shm::{Capacity, Lane, SlotSize};
use unisono_proto::stream::{Reader, why};
use unisono_proto::{self as wire, v1};

/// This process' numerics, whichever of its workers asks for them.
static FINGERPRINT: LazyLock<[u8; 32]> = LazyLock::new(unisono_common::train::fingerprint);

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The run is over, or this worker is not wanted any more.
    Done(String),
    /// The worker was taken for lost, or the connection broke: join again.
    Again(String),
    /// The coordinator refuses this worker, and will again.
    Refused(String),
}

/// What stays in memory from session to session: data and model of the job that was last read.
#[derive(Default)]
pub struct Kept {
    job: Option<KeptJob>,
}

#[derive(Clone)]
struct KeptJob {
    text: String,
    job: Job,
    prepared: Prepared,
    samples: Samples,
    model: Arc<Model>,
}

/// Whether a refusal will be the same the next time.
fn is_final(refused: &tonic::Status) -> bool {
    use tonic::Code::{FailedPrecondition, InvalidArgument, PermissionDenied, Unauthenticated};
    matches!(refused.code(), FailedPrecondition | InvalidArgument | PermissionDenied | Unauthenticated)
}

async fn prepare(client: &mut Client, kept: &mut Kept, options: &Options) -> Result<Result<(), String>> {
    let mut asking = client.clone().max_decoding_message_size(wire::MAX_JOB);
    let reply = match answer(options, asking.get_job(v1::GetJobRequest { version: wire::VERSION.into() })).await {
        Ok(reply) => reply.into_inner(),
        Err(e) if is_final(&e) => return Ok(Err(e.message().into())),
        Err(e) => return Err(options.coordinator.plain(&e)),
    };
    let prepared: Prepared = serde_json::from_str(&reply.prepared).context("the coordinator's data description")?;
    prepared.check().context("the coordinator's data description")?;
    if kept.job.as_ref().is_some_and(|k| k.text == reply.job && k.prepared == prepared) {
        return Ok(Ok(()));
    }
    let job: Job = serde_json::from_str(&reply.job).context("the coordinator's job cannot be read")?;
    let cache = options.cache.as_ref();
    let sent = Samples::Sent(Sent::new(cache.map(|folder| Cache::new(folder.clone(), &job, &prepared))));
    let samples = if let Some(simulated) = &options.simulated {
        Samples::Simulated(simulated.clone())
    } else if job.data.ship == Some(true) {
        sent
    } else {
        let (files, data, seed) = (options.files.clone(), job.data.clone(), job.seed);
        match tokio::task::spawn_blocking(move || data::open(&files, &data, seed)).await? {
            Ok(opened) if opened.prepared == prepared => Samples::Read(Box::new(opened)),
            Ok(_) => {
                let what = "this worker's data files differ from the coordinator's";
                return Ok(Err(format!("{what}: copy them from there, or set data.ship = true in the job")));
            }
            Err(e)
                if job.data.ship == Some(false)
                    || matches!(
                        job.data.source,
                        Source::Digits | Source::Synthetic { .. } | Source::SyntheticText { .. }
                    ) =>
            {
                return Ok(Err(format!("this worker cannot read the job's data: {e}")));
            }
            Err(e) => {
                tracing::info!("the coordinator sends the data, as this worker cannot read it itself: {e}");
                sent
            }
        }
    };
    let model = Arc::new(Model::build(&job.model, &prepared.signature(&job.train.loss))?);
    kept.job = Some(KeptJob { text: reply.job, job, prepared, samples, model });
    Ok(Ok(()))
}

/// What it takes to fetch a partition.
#[derive(Clone)]
struct Fetcher {
    client: Client,
    session: bytes::Bytes,
    sent: Sent,
    prepared: Prepared,
    loss: Loss,
    parts: Partitions,
    test_parts: Option<Partitions>,
}

impl Fetcher {
    /// Fetches partitions, one after another.
    async fn fetch(mut self, partitions: Vec<u32>, test: bool) -> Result<()> {
        for partition in partitions {
            let parts = if test { self.test_parts.as_ref().context("there is no test set")? } else { &self.parts };
            let (of, expected) = ((partition, test), parts.len(partition));
            self.sent.fetch(&mut self.client, &self.session, of, expected, &self.prepared, &self.loss).await?;
        }
        Ok(())
    }
}

/// What to do where shared memory was wanted and there is none.
const ELSEWHERE: &str = "use --transport auto, or run both on one Linux host as one user";

/// Partitions that the compute thread needs before it goes on.
pub struct FetchOrder {
    pub partitions: Vec<u32>,
    pub test: bool,
    /// Told when they are at hand.
    pub done: std::sync::mpsc::Sender<()>,
}

/// Weights in and gradients out where there is no shared memory.
struct Streams {
    receiving: JoinHandle<String>,
    pushing: JoinHandle<Result<(), tonic::Status>>,
    /// Rows of sparse tables, of models that have some.
    pulling: Option<JoinHandle<Result<(), tonic::Status>>>,
    machine: Machine,
    coming: Arc<Coming>,
    orders: std::sync::mpsc::Sender<Order>,
}

impl Streams {
    /// Waits until one of the streams ends, and says why.
    async fn end(streams: &mut Option<Streams>) -> String {
        let Some(Streams { receiving, pushing, pulling, .. }) = streams else { return std::future::pending().await };
        let pulled = async {
            match pulling {
                Some(pulling) => pulling.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            why = receiving => why.unwrap_or_else(|_| "the broadcast ended".into()),
            pushed = pushing => match pushed {
                Ok(Err(refused)) => format!("the coordinator took no more pushes: {}", why(&refused)),
                Ok(Ok(())) | Err(_) => "the pushes ended".into(),
            },
            pulled = pulled => match pulled {
                Ok(Err(refused)) => format!("the coordinator gave no more rows: {}", why(&refused)),
                Ok(Ok(())) | Err(_) => "the pulls ended".into(),
            },
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.receiving.abort();
        self.pushing.abort();
        if let Some(pulling) = &self.pulling {
            pulling.abort();
        }
        self.coming.close();
    }
}

/// Puts the chunks of a broadcast into their places, until it ends; gives why it does.
async fn receive(mut broadcast: Reader<Body>, mut incoming: Incoming, layout: Layout, needs_checksum: bool) -> String {
    loop {
        match receive_chunk(&mut broadcast, &mut incoming, &layout, needs_checksum).await {
            Ok(true) => {}
            Ok(false) => return "the broadcast ended".into(),
            Err(e) => return format!("the broadcast broke off: {}", why(&e)),
        }
    }
}

/// The next chunk of weights; false where none comes.
async fn receive_chunk(
    broadcast: &mut Reader<Body>,
    incoming: &mut Incoming,
    layout: &Layout,
    needs_checksum: bool,
) -> Result<bool, tonic::Status> {
    let Some((chunk, len)) = broadcast.weights().await? else { return Ok(false) };
    let chunk = chunk.summed(needs_checksum)?;
    let index = wire::check_head(layout, chunk.index, len)?;
    let values = broadcast.values().await?;
    let version = Version { step: Step(chunk.step), average: chunk.average };
    let room = incoming.room(index, version).ok_or_else(|| {
        tonic::Status::invalid_argument(format!("chunk {index} of step {version} came when it was not its turn"))
    })?;
    let to = le_bytes_mut(room);
    wire::check_chunk(layout, chunk, &values, |at, block| to[at..at + block.len()].copy_from_slice(block))?;
    incoming.arrived(index, version);
    Ok(true)
}

/// Waits until `leave` turns true; for ever where nobody can turn it.
pub(crate) async fn asked(leave: &mut watch::Receiver<bool>) {
    if leave.wait_for(|now| *now).await.is_err() {
        std::future::pending().await
    }
}

/// Runs one membership.
pub async fn session(options: &Options, kept: &mut Kept, leave: &mut watch::Receiver<bool>) -> Result<End> {
    let Options { coordinator, threads, transport, name, .. } = options;
    let channel = coordinator.connect().await?;
    let mut client = Client::new(channel.clone()).max_decoding_message_size(wire::MAX_MESSAGE);
    if let Err(refused) = prepare(&mut client, kept, options).await? {
        return Ok(End::Refused(refused));
    }
    let Some(KeptJob { job, prepared, samples, model, .. }) = kept.job.clone() else { bail!("no job") };
    let partitions = job.train.partitions;
    let layout = model.layout().clone();
    let join = v1::Join {
        version: wire::VERSION.into(),
        job_digest: job.digest().to_vec().into(),
        layout_digest: model.digest().to_vec().into(),
        fingerprint: FINGERPRINT.to_vec().into(),
        threads: *threads as u32,
        name: name.clone(),
        shared_memory: *transport != Transport::Grpc,
        simulated: options.simulated.is_some(),
        isa: kernels::isa().map(|isa| isa.name().into()).unwrap_or_default(),
    };
    let (to_coordinator, outgoing) = mpsc::unbounded_channel();
    to_coordinator.send(v1::FromWorker { kind: Some(v1::from_worker::Kind::Join(join)) })?;
    let mut incoming = match answer(options, client.session(UnboundedReceiverStream::new(outgoing))).await {
        Ok(reply) => reply.into_inner(),
        Err(e) if is_final(&e) => return Ok(End::Refused(e.message().into())),
        Err(e) => return Err(coordinator.plain(&e)),
    };
    let joined =
        match answer(options, incoming.message()).await.map_err(|e| coordinator.plain(&e))?.and_then(|m| m.kind) {
            Some(v1::to_worker::Kind::Joined(joined)) => joined,
            Some(v1::to_worker::Kind::Goodbye(bye)) => return Ok(End::Done(bye.reason)),
            Some(v1::to_worker::Kind::Work(_)) | None => bail!("the coordinator did not answer the join"),
        };

    let tables = job.train.tables();
    let width = model.rows().width();
    let slots = match width {
        0 => SlotSize::dense(layout.len()),
        width => SlotSize { len: layout.len(), rows: prepared.rows_of_a_step(&job.train), width },
    };
    let state = RowOptimizer::new(&tables.optimizer, model.rows()).state_len();
    let capacity = (width > 0).then(|| Capacity::of_bytes(width, state, tables.memory));
    let mut shared = None;
    if !joined.door.is_empty() {
        let (door, secret) = (joined.door.clone(), joined.session.clone());
        let opened =
            tokio::task::spawn_blocking(move || wire::shm::door::knock(&door, &secret, slots, capacity)).await?;
        let used = v1::SharedMemory { used: opened.is_ok() };
        to_coordinator.send(v1::FromWorker { kind: Some(v1::from_worker::Kind::SharedMemory(used)) })?;
        match opened {
            Ok(opened) => shared = Some(opened),
            Err(e) if *transport == Transport::Shm => {
                return Ok(End::Refused(format!("no shared memory with the coordinator ({e}): {ELSEWHERE}")));
            }
            Err(e) => tracing::debug!("no shared memory with the coordinator: {e}"),
        }
    } else if *transport == Transport::Shm {
        return Ok(End::Refused(format!("the coordinator offers no shared memory: {ELSEWHERE}")));
    }

    // The coordinator gives nothing to do to who says no more than that it joins.
    to_coordinator.send(v1::FromWorker { kind: Some(v1::from_worker::Kind::Heartbeat(v1::Heartbeat {})) })?;
    let way = if shared.is_some() { "shared memory" } else { "gRPC" };
    tracing::info!("joined {} as worker {} by {way}", coordinator.url(), joined.worker_id);
    let fetcher = match &samples {
        Samples::Read(_) | Samples::Simulated(_) => None,
        Samples::Sent(sent) => Some(Fetcher {
            client: client.clone(),
            session: joined.session.clone(),
            sent: sent.clone(),
            prepared: prepared.clone(),
            loss: Loss::new(&job.train.loss, model.outputs())?,
            parts: Partitions::new(prepared.train_samples as usize, partitions, job.data.hashed.then_some(job.seed))?,
            test_parts: Partitions::new(prepared.test_samples as usize, partitions, None).ok(),
        }),
    };
    let (fetch, mut to_fetch) = mpsc::unbounded_channel();
    let (link, lane, mut streams) = match shared {
        Some(Opened { weights, lane, bell, rows }) => {
            let lane = Arc::new(lane);
            let rows = rows.map_or(rows::Source::None, rows::Source::Shared);
            (Link::shared(lane.clone(), weights, bell, rows, fetch), lane, None)
        }
        None => {
            let lane = Arc::new(Lane::private(slots).context("no memory for the gradients")?);
            let (orders, taken) = std::sync::mpsc::channel();
            let (push, pieces) = mpsc::unbounded_channel();
            // Weights have a connection of their own: each is served by one thread at a time.
            let other = coordinator.connect().await?;
            let request = wire::stream::short(&v1::BroadcastRequest { session: joined.session.clone() });
            let broadcast = call(other, "Broadcast", Body::new(Full::new(request)));
            let broadcast = answer(options, broadcast).await.map_err(|e| coordinator.plain(&e))?;
            let (coming, incoming) = Coming::new(&layout).context("no memory for the weights")?;
            let (rows, pulling) = if width > 0 {
                let (ask, asks) = mpsc::unbounded_channel();
                let pulling = rows::start(client.clone(), joined.session.clone(), width, asks);
                (rows::Source::Pulled(ask), Some(pulling))
            } else {
                (rows::Source::None, None)
            };
            let streams = Streams {
                pulling,
                receiving: tokio::spawn(receive(broadcast, incoming, layout.clone(), channel.needs_checksum())),
                pushing: push::start(channel, joined.session.clone(), layout.clone(), pieces, &to_coordinator),
                machine: Machine::new(fetcher.as_ref().map(|f| f.sent.at_hand())),
                coming: coming.clone(),
                orders,
            };
            (Link::streams(lane.clone(), taken, coming, rows, push), lane, Some(streams))
        }
    };
    let (fetched_in, mut fetched) = mpsc::unbounded_channel();
    let (over, mut compute_over) = mpsc::channel::<()>(1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(*threads).build()?;
    let session_out = to_coordinator.clone();
    std::thread::Builder::new().name("compute".into()).spawn(move || {
        let _over = over;
        let ended = pool.install(|| Compute::new(job, samples, prepared, model)?.serve(link, session_out));
        if let Err(e) = ended {
            tracing::debug!("compute ended: {e:#}");
        }
    })?;

    let mut heartbeat = tokio::time::interval(Duration::from_millis(joined.heartbeat_ms.clamp(10, 60_000) as u64));
    let mut leaving = false;
    let end = loop {
        let event = tokio::select! {
            message = incoming.message() => match message {
                Ok(Some(v1::ToWorker { kind: Some(v1::to_worker::Kind::Work(work)) })) => {
                    let nodes: Result<Vec<Node>, _> =
                        work.nodes.iter().map(|n| wire::node(Some(*n), partitions)).collect();
                    let kind = if work.evaluate { Kind::Evaluate } else { Kind::Train };
                    match nodes {
                        Ok(nodes) => {
                            Event::Work(Work { step: Step(work.step), generation: work.generation, kind, nodes })
                        }
                        Err(e) => break End::Again(e.to_string()),
                    }
                }
                Ok(Some(v1::ToWorker { kind: Some(v1::to_worker::Kind::Goodbye(bye)) })) => {
                    break sent_away(bye);
                }
                Ok(Some(_)) => break End::Again("the coordinator sent something unexpected".into()),
                Ok(None) => break End::Again("the coordinator closed the session".into()),
                Err(e) => break End::Again(format!("the session broke off: {}", why(&e))),
            },
            why = Streams::end(&mut streams) => break ended(&mut incoming, why).await,
            Some(result) = fetched.recv() => match result {
                Ok(()) => Event::Fetched,
                Err(e) => break End::Again(format!("cannot fetch a partition: {e:#}")),
            },
            Some(FetchOrder { partitions, test, done }) = to_fetch.recv() => {
                let Some(fetcher) = fetcher.clone() else { break End::Again("there is nothing to fetch".into()) };
                let failed = fetched_in.clone();
                tokio::spawn(async move {
                    match fetcher.fetch(partitions, test).await {
                        Ok(()) => { done.send(()).ok(); }
                        Err(e) => { failed.send(Err(e)).ok(); }
                    }
                });
                continue;
            }
            _ = compute_over.recv() => break ended(&mut incoming, "the compute thread ended".into()).await,
            () = asked(leave), if !leaving => {
                leaving = true;
                tracing::info!("leaving after this step");
                let leave = v1::FromWorker { kind: Some(v1::from_worker::Kind::Leave(v1::Leave {})) };
                if to_coordinator.send(leave).is_err() {
                    break End::Again("the session ended".into());
                }
                continue;
            }
            _ = heartbeat.tick() => {
                let beat = v1::FromWorker { kind: Some(v1::from_worker::Kind::Heartbeat(v1::Heartbeat {})) };
                if to_coordinator.send(beat).is_err() {
                    break End::Again("the session ended".into());
                }
                continue;
            }
        };
        let Some(streams) = &mut streams else { continue };
        for command in streams.machine.handle(event) {
            match command {
                Command::Fetch { kind, partitions } => {
                    let Some(fetcher) = fetcher.clone() else { continue };
                    let done = fetched_in.clone();
                    tokio::spawn(
                        async move { done.send(fetcher.fetch(partitions, kind == Kind::Evaluate).await).ok() },
                    );
                }
                Command::Compute(Work { step, generation, kind, nodes }) => {
                    for node in nodes {
                        let evaluate = kind == Kind::Evaluate;
                        // Where compute has ended, the loop hears of it.
                        // The coordinator's cores are, as a rule, its own; what is sent wakes it.
                        let (step, rows_first, wakes) = (step.0, true, false);
                        streams.orders.send(Order { step, generation, node, evaluate, rows_first, wakes }).ok();
                    }
                }
            }
        }
    };
    lane.close();
    drop((streams, incoming, to_coordinator, to_fetch));
    // The compute thread ends when its channels do; the next session's begins with an idle machine.
    tokio::time::timeout(Duration::from_secs(60), compute_over.recv()).await.ok();
    Ok(end)
}

fn sent_away(bye: v1::Goodbye) -> End {
    if bye.rejoin { End::Again(bye.reason) } else { End::Done(bye.reason) }
}

/// How a session ends of which something else has ended, because of `why`: a coordinator that sends a worker away ends all of it,
/// and what it says of that may come last.
async fn ended(incoming: &mut tonic::Streaming<v1::ToWorker>, why: String) -> End {
    let goodbye = async {
        while let Ok(Some(message)) = incoming.message().await {
            if let Some(v1::to_worker::Kind::Goodbye(bye)) = message.kind {
                return Some(bye);
            }
        }
        None
    };
    let goodbye = tokio::time::timeout(Duration::from_secs(1), goodbye).await;
    goodbye.ok().flatten().map_or(End::Again(why), sent_away)
}
