//! The coordinator: it owns weights, optimizer state and membership, and turns gradient sums into steps.
//!
//! [`run`] takes a listener and an interruption signal, so a test binds port 0.

mod driver;
pub mod files;
mod service;
mod store;

use anyhow::{Context, Result, bail};
use driver::{Driver, Input, Learning, Shared};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use unisono_common::checkpoint;
use unisono_common::data::{self, partition::Partitions};
use unisono_common::ids::Step;
use unisono_common::job::{Job, Length};
use unisono_common::loss::Loss;
use unisono_common::metrics::{EvalKind, EvalSummary};
use unisono_common::model::Model;
use unisono_common::optim::Optimizer;
use unisono_common::protocol::{Machine, Patience};
use unisono_common::schedule::{EarlyState, PlateauState};
use unisono_common::tree::Open;
use unisono_proto::v1;

/// Where a run stands.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    pub step: u64,
    pub total_steps: u64,
    pub epoch: u64,
    pub loss: f64,
    pub samples_per_second: f64,
    pub workers: usize,
    pub eval: Option<EvalSummary>,
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
    pub transport: String,
    pub wall_seconds: f64,
    pub train_seconds: f64,
    pub samples_per_second: f64,
    pub step_ms: StepMs,
    pub train_loss: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<EvalSummary>,
    pub weights_digest: String,
    pub checkpoint: String,
    pub bytes_pushed: u64,
    pub bytes_pulled: u64,
    pub workers_joined: u64,
    pub workers_lost: u64,
    pub partitions_reissued: u64,
}

/// How a coordinator runs; none of it changes the result.
#[derive(Clone, Debug)]
pub struct Options {
    pub resume: bool,
    /// Threads for reduction and optimizer.
    pub threads: usize,
    pub patience: Patience,
}

/// A job that was checked as far as it can be before anything starts.
pub struct Ready {
    job: Job,
    opened: data::Opened,
    model: Model,
    train_parts: Partitions,
    test_parts: Option<Partitions>,
}

/// Reads the data and builds the model: errors here are the job's, nothing was started.
pub fn prepare(job: Job) -> Result<Ready> {
    let opened = data::open(&job.data, job.seed)?;
    let outputs = opened.prepared.outputs(&job.train.loss);
    let model = Model::build(&job.model, &opened.prepared.shape, outputs)?;
    let loss = Loss::new(&job.train.loss, outputs)?;
    loss.check_targets(&opened.train.targets)?;
    if let Some(test) = &opened.test {
        loss.check_targets(&test.targets)?;
    }
    let p = job.train.partitions;
    let train_parts = Partitions::new(opened.train.samples(), p, job.data.hashed.then_some(job.seed))?;
    let test_parts = match &opened.test {
        Some(test) => Some(Partitions::new(test.samples(), p, None)?),
        None => None,
    };
    Ok(Ready { job, opened, model, train_parts, test_parts })
}

/// Trains until the job is done or `interrupted` turns true.
pub async fn run(
    ready: Ready,
    options: Options,
    listener: TcpListener,
    progress: watch::Sender<Progress>,
    interrupted: watch::Receiver<bool>,
) -> Result<Summary> {
    let started = Instant::now();
    let Ready { job, opened, model, train_parts, test_parts } = ready;
    let layout = Arc::new(model.layout().clone());
    let steps_per_epoch = train_parts.steps_per_epoch(job.train.micro_batch) as u64;
    let total_steps = match job.train.length {
        Length::Steps(n) => n,
        Length::Epochs(n) => n * steps_per_epoch,
    };
    let dir = PathBuf::from(&job.checkpoint.dir);
    let mut learning = Learning {
        step: Step(0),
        samples: 0,
        train_loss: 0.0,
        plateau: PlateauState::default(),
        early: EarlyState::default(),
        eval: None,
    };
    let optimizer = Optimizer::new(&job.train.optimizer);
    let (mut weights, mut slots) = (None, Vec::new());
    let mut last_saved = None;
    if options.resume {
        let (found, passed_over) = files::newest(&dir);
        for why in passed_over {
            tracing::warn!("passed over: {why}");
        }
        let Some(found) = found else {
            bail!("there is no whole checkpoint in {} to resume from; leave --resume out to start afresh", dir.display())
        };
        let manifest = &found.manifest;
        if manifest.layout_digest != layout.digest().iter().map(|b| format!("{b:02x}")).collect::<String>() {
            bail!("{} belongs to another model than this job's", found.path.display());
        }
        if manifest.job_digest != job.digest().iter().map(|b| format!("{b:02x}")).collect::<String>() {
            tracing::warn!("the job has changed since {} was written: the result is not that of one undisturbed run", found.path.display());
        }
        weights = Some(checkpoint::weights_from_safetensors(&layout, &found.weights)?);
        slots = checkpoint::state_from_safetensors(layout.trainable(), &optimizer.slot_names(), &found.optimizer)?;
        learning = Learning {
            step: Step(manifest.step),
            samples: manifest.samples,
            train_loss: manifest.train_loss,
            plateau: serde_json::from_value(manifest.plateau.clone())?,
            early: serde_json::from_value(manifest.early.clone())?,
            eval: serde_json::from_value(manifest.eval.clone())?,
        };
        tracing::info!("resuming from {} at step {}", found.path.display(), manifest.step);
        last_saved = Some((manifest.step, found.path));
    } else {
        let moved = files::set_aside(&dir)?;
        if moved > 0 {
            tracing::info!("{moved} checkpoints of an earlier run are now in {}", dir.join("previous").display());
        }
    }
    let weights = weights.unwrap_or_else(|| layout.init(job.seed));
    let (inputs, received) = mpsc::unbounded_channel();
    let applied = inputs.clone();
    let clip = store::Clip { norm: job.train.clip_norm, value: job.train.clip_value };
    let p = job.train.partitions;
    let store = store::Store::new(
        layout,
        optimizer,
        clip,
        p,
        learning.step,
        &weights,
        &slots,
        Box::new(move |a| {
            applied.send(Input::Applied(a)).ok();
        }),
    );
    drop((weights, slots));
    let eval_kind = EvalKind::of(model.outputs(), opened.prepared.classes.as_ref().map(|c| c.len()));
    let shared = Arc::new(Shared {
        fingerprint: unisono_common::train::fingerprint(),
        prepared: opened.prepared.clone(),
        store,
        pool: rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|i| format!("reduce-{i}"))
            .build()?,
        heartbeat_ms: (options.patience.silence.as_millis() as u32 / 5).clamp(50, 1000),
        opened,
        train_parts,
        test_parts,
        machine: Mutex::new(Machine::new(p, options.patience)),
        inputs,
        next_id: std::sync::atomic::AtomicU64::new(1),
        names: Mutex::new(BTreeMap::new()),
        progress,
        job,
    });
    let service = service::Service(shared.clone());
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<v1::coordinator_server::CoordinatorServer<service::Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(unisono_proto::DESCRIPTORS)
        .build_v1()
        .context("cannot serve reflection")?;
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(unisono_proto::STREAM_WINDOW)
        .initial_connection_window_size(unisono_proto::CONNECTION_WINDOW)
        .max_frame_size(unisono_proto::MAX_FRAME)
        .tcp_nodelay(true)
        .add_service(health_service)
        .add_service(reflection)
        .add_service(
            v1::coordinator_server::CoordinatorServer::new(service.clone())
                .max_decoding_message_size(unisono_proto::MAX_MESSAGE),
        )
        .add_service(v1::operator_server::OperatorServer::new(service))
        .serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true)));
    let driver = Driver {
        shared,
        learning,
        total_steps,
        steps_per_epoch,
        eval_kind,
        dir,
        sessions: BTreeMap::new(),
        evals: Open::new(p),
        saving: false,
        save_again: false,
        last_saved,
        stop: false,
        started,
        first_step: None,
        last_commit: started,
        opened_at: started,
        step_ms: Vec::new(),
        step_samples: Vec::new(),
        joined: 0,
        most_workers: 0,
        finishing: false,
    };
    tokio::select! {
        summary = driver.run(received, interrupted) => {
            // Goodbyes leave before the server does.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            summary
        }
        served = server => {
            served.context("the gRPC server ended")?;
            bail!("the gRPC server ended")
        }
    }
}
