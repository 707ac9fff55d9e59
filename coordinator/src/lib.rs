//! The coordinator: it owns weights, optimizer state and membership, and turns gradient sums into steps.
//!
//! [`run`] takes a listener and an interruption signal, so a test binds port 0.

mod access;
mod bare;
mod copies;
mod door;
mod driver;
mod entrance;
pub mod files;
mod lanes;
mod line;
mod measure;
mod pace;
mod parameters;
mod probe;
mod pulls;
mod push;
mod rate;
mod rows;
mod saves;
mod service;
mod shared;
mod store;
mod sum;
mod turns;

pub use access::check_identity;
use anyhow::{Context, Result, bail};
pub use bare::Bare;
use driver::Driver;
pub use entrance::Entrance;
use entrance::{asks, counts};
pub use line::workers_at_once;
use measure::Measure;
pub use measure::{Measured, Phases, Window};
use pace::Pace;
use rows::Tables;
use saves::{Learning, Saved, Saves};
use serde::Serialize;
use shared::{Input, Shared};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::sync::{oneshot, watch};
use tonic::service::interceptor::InterceptedService;
use unisono_common::checkpoint;
use unisono_common::data::{self, Prepared, Skipped, partition::Partitions};
use unisono_common::groups::Groups;
use unisono_common::job::{self, Job, Length, Metric, ScheduleKind};
use unisono_common::loss::Loss;
use unisono_common::metrics::{EvalKind, EvalSummary};
use unisono_common::model::Model;
use unisono_common::optim::Optimizer;
use unisono_common::protocol::{Machine, Patience};
use unisono_common::rows::{RowBlock, optim::RowOptimizer};
use unisono_common::tree::Open;
use unisono_proto::identity::Role;
use unisono_proto::v1;

/// Where a run stands.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    pub step: u64,
    pub total_steps: u64,
    pub epoch: u64,
    pub loss: f64,
    pub samples_per_second: f64,
    /// Whether the window that is measured is open.
    pub measuring: bool,
    /// In rank order.
    pub workers: Vec<Member>,
    pub eval: Option<EvalSummary>,
}

/// One worker of a run.
#[derive(Clone, Debug)]
pub struct Member {
    pub id: u64,
    pub name: Arc<str>,
    pub threads: u32,
    /// Partitions of its lease.
    pub partitions: u32,
    /// Time since its last sign of life.
    pub silent: std::time::Duration,
}

/// Durations of steps, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct StepMs {
    pub p50: f64,
    pub p99: f64,
}

/// What a run came to.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub job: String,
    pub status: String,
    pub steps: u64,
    pub epochs: u64,
    pub samples: u64,
    pub parameters: usize,
    pub partitions: u32,
    pub workers: usize,
    /// "shm", "grpc", or "shm+grpc".
    pub transport: String,
    /// The instruction sets that workers computed with, joined by "+"; the result does not depend on them.
    pub isa: String,
    pub wall_seconds: f64,
    pub train_seconds: f64,
    /// `None` where this run made no step; so are the two below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples_per_second: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_ms: Option<StepMs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<EvalSummary>,
    pub weights_digest: String,
    pub checkpoint: String,
    pub bytes_pushed: u64,
    pub bytes_pulled: u64,
    pub workers_joined: u64,
    pub workers_lost: u64,
    pub partitions_reissued: u64,
    /// Samples that cannot be read, and were left out; `None` where the job stops at them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<usize>,
    /// Where a window of the run was measured.
    #[serde(skip)]
    pub measured: Option<Measured>,
}

/// How a coordinator runs; none of it changes the result.
#[derive(Clone, Debug)]
pub struct Options {
    /// When the command began.
    pub started: Instant,
    /// Threads for reduction and optimizer.
    pub threads: usize,
    /// Whether workers of this host are offered shared memory.
    pub shared_memory: bool,
    pub patience: Patience,
    /// Whether somebody goes on with the run where it is interrupted: then its workers wait, otherwise they go home.
    pub is_resumed: bool,
    /// What is measured. A run that is measured ends after that, not at its last step, and evaluates nothing.
    pub window: Option<Window>,
}

/// A job that was checked as far as it can be before anything starts.
pub struct Ready {
    job: Job,
    opened: data::Opened,
    model: Model,
    train_parts: Partitions,
    test_parts: Option<Partitions>,
    groups: Groups,
    /// Where checkpoints are written, locked; `None` where nothing is kept.
    dir: Option<(PathBuf, files::Lock)>,
    from: Option<Resumed>,
}

impl Ready {
    /// The job.
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// Its data.
    pub fn data(&self) -> &data::Opened {
        &self.opened
    }

    /// Its model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The same, which is tested where it has a test set.
    ///
    /// # Errors
    /// Fewer samples in it than partitions.
    pub fn tested(self) -> Result<Ready> {
        let partitions = self.job.train.partitions;
        let parts = self.opened.test.as_ref().map(|test| Partitions::new(test.samples(), partitions, None));
        Ok(Ready { test_parts: parts.transpose().context("the test set")?, ..self })
    }

    fn steps_per_epoch(&self) -> u64 {
        self.train_parts.steps_per_epoch(self.job.train.micro_batch) as u64
    }

    /// Steps that it takes.
    pub fn total_steps(&self) -> u64 {
        match self.job.train.length {
            Length::Steps(n) => n,
            Length::Epochs(n) => n * self.steps_per_epoch(),
        }
    }
}

/// Where an earlier run left off.
struct Resumed {
    saved: Saved,
    weights: Vec<f32>,
    slots: Vec<Vec<f32>>,
    rows: Vec<RowBlock>,
    learning: Learning,
}

/// A lock that outlives a panic of another thread: what it guards is changed whole.
fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn hex(digest: [u8; 32]) -> String {
    blake3::Hash::from_bytes(digest).to_hex().to_string()
}

/// Where a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// At its first step; checkpoints of an earlier run are set aside.
    Afresh,
    /// At the newest whole checkpoint, which must be there.
    Resumed,
    /// At the newest whole checkpoint, or at the first step where there are no checkpoints. Where there are some and none is
    /// whole, somebody has to look: that is an error.
    Either,
}

/// Reads the data, builds the model, and finds the checkpoint to resume from: errors here are the job's or the command
/// line's, nothing was started.
pub fn prepare(job: Job, begin: Begin) -> Result<Ready> {
    let ready = prepare_unkept(job)?.tested()?;
    let dir = PathBuf::from(&ready.job.checkpoint.dir);
    if begin == Begin::Resumed && !dir.exists() {
        bail!("{}: {AFRESH}", files::none_whole(&dir));
    }
    let lock = files::check(&dir)?;
    let resume = match begin {
        Begin::Afresh => false,
        Begin::Resumed => true,
        Begin::Either => !files::list(&dir).is_empty(),
    };
    let Ready { job, opened, model, groups, .. } = &ready;
    let from = if resume { Some(find(job, &opened.prepared, &dir, model, groups.optimizer())?) } else { None };
    Ok(Ready { dir: Some((dir, lock)), from, ..ready })
}

/// The same for a run that writes no checkpoints and evaluates nothing.
pub fn prepare_unkept(job: Job) -> Result<Ready> {
    let opened = data::open(&data::Files::any(), &job.data, job.seed)?;
    prepare_opened(job, opened)
}

/// The same where the job's data were opened already.
pub fn prepare_opened(job: Job, opened: data::Opened) -> Result<Ready> {
    if let Some(warning) = opened.skipped.as_ref().and_then(Skipped::warning) {
        tracing::warn!("{warning}");
    }
    let model = Model::build(&job.model, &opened.prepared.signature(&job.train.loss))?;
    let loss = Loss::new(&job.train.loss, model.outputs())?;
    loss.check_targets(&opened.train.targets)?;
    if let Some(test) = &opened.test {
        loss.check_targets(&test.targets)?;
    }
    let p = job.train.partitions;
    let train_parts = Partitions::new(opened.train.samples(), p, job.data.hashed.then_some(job.seed))?;
    let kind = EvalKind::of(&opened.prepared, job.train.top_k);
    if let Some(top) = job.train.top_k
        && !matches!(kind, EvalKind::Classes { classes, .. } if classes > top as usize)
    {
        bail!("train.top_k = {top} is for data with more classes than that: lower it, or leave it out");
    }
    if job.train.top_k.is_some() && opened.prepared.classes.as_ref().is_some_and(|all| all.len() != model.outputs()) {
        bail!(
            "train.top_k is for models with an output for each class, and train.loss asks for {}: leave it out",
            model.outputs()
        );
    }
    let plateau = match job.train.schedule.kind {
        ScheduleKind::Plateau { metric, .. } => Some(("train.schedule", metric)),
        _ => None,
    };
    let early = job.train.early_stopping.as_ref().map(|early| ("train.early_stopping", early.metric));
    for (key, metric) in plateau.into_iter().chain(early) {
        if opened.test.is_none() {
            bail!("{key} follows a metric of the test set, and there is none: set data.test, or leave {key} out");
        }
        // What the outputs are to a loss of the program's own is not known.
        let is_known = |m: &&Metric| **m != Metric::LogLoss || !matches!(job.train.loss, job::Loss::Added { .. });
        let metrics = || kind.metrics().iter().filter(is_known);
        if !metrics().any(|m| *m == metric) {
            let names: Vec<String> = metrics().map(|m| format!("\"{}\"", m.name())).collect();
            bail!("{key} follows \"{}\", which this task does not have: choose {}", metric.name(), names.join(" or "));
        }
    }
    let optimizer = Optimizer::new(&job.train.optimizer, job.train.ema);
    let groups = Groups::new(optimizer, &job.train.groups, model.layout())?;
    Ok(Ready { job, opened, model, train_parts, test_parts: None, groups, dir: None, from: None })
}

const AFRESH: &str = "there is nothing to resume from; leave --resume out to start afresh";

/// The newest whole checkpoint of `dir`, which must be this job's.
fn find(job: &Job, prepared: &Prepared, dir: &Path, model: &Model, optimizer: &Optimizer) -> Result<Resumed> {
    let layout = model.layout();
    let (found, passed_over) = files::newest(dir);
    for why in passed_over {
        tracing::warn!("passed over: {why}");
    }
    let Some(files::Loaded { path, manifest, weights, optimizer: slots, rows }) = found else {
        bail!("{}: {AFRESH}", files::none_whole(dir))
    };
    if manifest.layout_digest != hex(model.digest()) {
        bail!(
            "{} belongs to another model than this job's; set checkpoint.dir to this job's, or leave --resume out",
            path.display()
        );
    }
    let mine = || format!("{} does not fit this job", path.display());
    if manifest.prepared != *prepared {
        bail!(
            "{} was trained on other data than what the job names now (a file has changed, or data.normalize): bring the \
             data back, set checkpoint.dir to another folder, or leave --resume out",
            path.display()
        );
    }
    let slots =
        checkpoint::state_from_safetensors(layout.trainable(), &optimizer.slot_names(), &slots).with_context(mine)?;
    let weights = checkpoint::weights_from_safetensors(layout, &weights).with_context(mine)?;
    let of_tables = RowOptimizer::new(&job.train.tables().optimizer, model.rows());
    // File by file: each is let go of when its rows are there.
    let rows = rows.into_iter().map(|file| checkpoint::rows_from_safetensors(model.rows(), &of_tables, &file));
    let rows = rows.collect::<Result<_, _>>().with_context(mine)?;
    if manifest.job_digest != hex(job.digest()) {
        tracing::warn!(
            "the job has changed since {} was written: the result is not that of one undisturbed run",
            path.display()
        );
    }
    let saved = (path.clone(), manifest.weights_digest.clone());
    let learning = Learning::of(manifest).with_context(mine)?;
    Ok(Resumed { saved, weights, slots, rows, learning })
}

/// Requests that are open at once on one connection, at most.
const STREAMS: u32 = 64;
/// Bytes of a request's headers, at most.
const HEADERS: u32 = 16 << 10;

/// Bytes of a message of services that need few, at most: anybody asks for the health.
const SHORT: usize = 4 << 10;

/// A server with the wire's settings.
pub fn server() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .initial_stream_window_size(unisono_proto::STREAM_WINDOW)
        .initial_connection_window_size(unisono_proto::CONNECTION_WINDOW)
        .max_frame_size(unisono_proto::MAX_FRAME)
        .max_concurrent_streams(STREAMS)
        .http2_max_header_list_size(HEADERS)
        .http2_keepalive_interval(Some(unisono_proto::KEEPALIVE))
        .http2_keepalive_timeout(Some(unisono_proto::KEEPALIVE))
}

/// Trains until the job is done or `interrupted` turns true.
pub async fn run(
    ready: Ready,
    options: Options,
    entrance: Entrance,
    progress: watch::Sender<Progress>,
    interrupted: watch::Receiver<bool>,
) -> Result<Summary> {
    let (steps_per_epoch, ready_steps) = (ready.steps_per_epoch(), ready.total_steps());
    let Ready { job, opened, model, train_parts, test_parts, groups, dir, from } = ready;
    let (dir, _lock) = dir.unzip();
    let layout = Arc::new(model.layout().clone());
    let (mut total_steps, test_parts) = match options.window {
        Some(_) => (u64::MAX, None),
        None => (ready_steps, test_parts),
    };
    let (weights, slots, rows, learning, last) = match from {
        Some(Resumed { saved, weights, slots, rows, learning }) => {
            tracing::info!("resuming from {} at step {}", saved.0.display(), learning.step);
            if job.train.early_stopping.as_ref().is_some_and(|early| learning.early.is_over(early)) {
                tracing::info!("that run had stopped early");
                total_steps = learning.step.0;
            }
            if learning.step.0 >= total_steps {
                tracing::warn!("there is nothing to train: the run is at step {} of {total_steps}", learning.step);
            }
            (weights, slots, rows, learning, Some(saved))
        }
        None => (layout.init(job.seed), Vec::new(), Vec::new(), Learning::default(), None),
    };
    let first = learning.step;
    let pace = Pace::new(Instant::now(), total_steps.saturating_sub(first.0));
    let inbox = Arc::new(shared::Inbox::new().context("no memory for the driver's bell")?);
    let applied = inbox.clone();
    let clip = store::Clip { norm: job.train.clip_norm, value: job.train.clip_value };
    let p = job.train.partitions;
    let tables = match model.rows() {
        layout if layout.is_empty() => None,
        layout => {
            let of_job = job.train.tables();
            Some(Tables::new(layout.clone(), job.seed, &of_job, p, learning.step, &rows)?)
        }
    };
    let mut store = store::Store::new(
        layout,
        tables,
        groups,
        clip,
        p,
        learning.step,
        &weights,
        &slots,
        options.threads,
        Box::new(move |a| applied.put(Input::Applied(a))),
    )?;
    drop((weights, slots, rows));
    store.needs_checksum = !entrance.is_encrypted();
    store.timers = options.window.map(|_| Default::default());
    let eval_kind = EvalKind::of(&opened.prepared, job.train.top_k);
    let shared = Arc::new(Shared {
        fingerprint: unisono_common::train::fingerprint(),
        model_digest: model.digest(),
        prepared: opened.prepared.clone(),
        store,
        heartbeat_ms: (options.patience.silence.as_millis() as u32 / 5).clamp(50, 1000),
        opened,
        train_parts,
        test_parts,
        machine: Mutex::new(Machine::new(p, options.patience)),
        inbox,
        measure: options.window.map(Measure::new),
        door: if options.shared_memory { door::Door::open() } else { None },
        next_id: std::sync::atomic::AtomicU64::new(1),
        names: Mutex::new(BTreeMap::new()),
        tokens: Mutex::new(BTreeMap::new()),
        encoding: Arc::new(tokio::sync::Semaphore::new(2)),
        progress,
        job,
    });
    let (service, parameters) = (service::Service(shared.clone()), parameters::Parameters(shared.clone()));
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<v1::coordinator_server::CoordinatorServer<service::Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(unisono_proto::DESCRIPTORS)
        .build_v1()
        .context("cannot serve reflection")?;
    let coordinator = v1::coordinator_server::CoordinatorServer::new(service.clone())
        .max_decoding_message_size(unisono_proto::MAX_MESSAGE);
    let operator = v1::operator_server::OperatorServer::new(service).max_decoding_message_size(SHORT);
    // Health is everybody's; what an operator may ask and what only it may do, its service knows.
    let server = server()
        .add_service(InterceptedService::new(health_service.max_decoding_message_size(SHORT), counts))
        .add_service(InterceptedService::new(reflection, asks(None)))
        .add_service(InterceptedService::new(probe::Probe::server(), asks(None)))
        .add_service(InterceptedService::new(coordinator, asks(Some(Role::Worker))))
        .add_service(InterceptedService::new(parameters, asks(Some(Role::Worker))))
        .add_service(operator)
        .serve_with_incoming(entrance.open());
    let driver = Driver {
        shared: shared.clone(),
        learning,
        total_steps,
        steps_per_epoch,
        eval_kind,
        sessions: BTreeMap::new(),
        lanes: BTreeMap::new(),
        transports: [false; 2],
        isas: BTreeSet::new(),
        evals: Open::new(p),
        saves: Saves::new(dir, last.map(|saved| (saved, first))),
        stop: false,
        is_resumed: options.is_resumed,
        waiting: false,
        interrupted: false,
        started: options.started,
        pace,
        said: Instant::now(),
        tested: None,
        joined: 0,
        most_workers: 0,
        finishing: false,
    };
    let abandoned = Abandon(shared.clone());
    let (ended, mut end) = oneshot::channel();
    std::thread::Builder::new().name("driver".into()).spawn(move || ended.send(driver.run()).ok())?;
    tokio::select! {
        summary = &mut end => {
            // Goodbyes leave before the server does.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            drop(abandoned);
            summary.context("the driver ended")?
        }
        served = server => {
            served.context("the gRPC server ended")?;
            bail!("the gRPC server ended")
        }
        opened = door::Door::serve(shared.clone()) => {
            opened.context("shared memory ended")?;
            bail!("shared memory ended")
        }
        never = interruptions(&shared, interrupted) => match never {},
    }
}

/// Answers who asks for the health, when the run is done and until `interrupted` turns true: what watches over this process
/// need not start it again.
pub async fn linger(entrance: Entrance, mut interrupted: watch::Receiver<bool>) -> Result<()> {
    let (_health, service) = tonic_health::server::health_reporter();
    let served = server()
        .add_service(service.max_decoding_message_size(SHORT))
        .serve_with_incoming_shutdown(entrance.open(), async move { drop(interrupted.wait_for(|now| *now).await) });
    served.await.context("the gRPC server ended")
}

/// Ends the driver when nobody waits for it.
struct Abandon(Arc<Shared>);

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.input(Input::Abandoned);
    }
}

/// Passes an interruption on.
async fn interruptions(shared: &Shared, mut interrupted: watch::Receiver<bool>) -> std::convert::Infallible {
    let _ = interrupted.wait_for(|now| *now).await; // who can interrupt no more has done so for good
    shared.input(Input::Interrupted);
    std::future::pending().await
}
