//! `unisono bench`: how fast this machine trains, and where the time of a step goes.

mod limits;
mod memory;
mod report;

use crate::local::Workers;
use crate::{Transport, Wrong};
use anyhow::{Result, anyhow};
use limits::Limits;
use report::Report;
use std::num::NonZeroU16;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::Level;
use unisono_common::job::{self, Job, JobText};
use unisono_coordinator::{Options, Window};

/// What comes before the measured seconds, and after them.
const WARM_STEPS: u64 = 5;
const WARM: Duration = Duration::from_millis(500);
const AFTER: Duration = Duration::from_millis(300);

/// Batches of each worker thread, as the peers have it: an epoch is so many steps.
const BATCHES: usize = 8;

/// Where rows are to be new for long.
const MANY_BATCHES: usize = 256;

/// Compute threads of all workers together, at most.
const MOST_THREADS: usize = 4096;

/// What is trained: the shapes, batches and optimizer of `tests/peers/torch_ddp.py`.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Workload {
    /// Softmax regression on 784 values, 7,850 parameters, batches of 256
    Softmax,
    /// 784-512-256-10, 535,818 parameters, batches of 128
    Mlp,
    /// 784-4096-4096-10, 20 million parameters, batches of 64
    MlpWide,
    /// Two convolutions and two linear layers on 28 x 28 pixels, 1.2 million parameters, batches of 64
    Cnn,
    /// A decoder of 4 layers, 4 heads and width 128 on 64 of 65 tokens, 0.8 million parameters, batches of 12
    Gpt,
    /// 13 numbers and 26 ids of 520,000 possible ones, rows of 16 values and two mlps, batches of 512
    Dlrm,
    /// The same with 20 million possible ids, and more batches
    DlrmLarge,
}

impl Workload {
    const ALL: [Workload; 7] = [
        Workload::Softmax,
        Workload::Mlp,
        Workload::MlpWide,
        Workload::Cnn,
        Workload::Gpt,
        Workload::Dlrm,
        Workload::DlrmLarge,
    ];

    fn name(self) -> &'static str {
        match self {
            Workload::Softmax => "softmax",
            Workload::Mlp => "mlp",
            Workload::MlpWide => "mlp-wide",
            Workload::Cnn => "cnn",
            Workload::Gpt => "gpt",
            Workload::Dlrm => "dlrm",
            Workload::DlrmLarge => "dlrm-large",
        }
    }

    fn toml(self) -> &'static str {
        match self {
            Workload::Softmax => include_str!("softmax.toml"),
            Workload::Mlp => include_str!("mlp.toml"),
            Workload::MlpWide => include_str!("mlp-wide.toml"),
            Workload::Cnn => include_str!("cnn.toml"),
            Workload::Gpt => include_str!("gpt.toml"),
            Workload::Dlrm | Workload::DlrmLarge => include_str!("dlrm.toml"),
        }
    }

    /// Batches of each worker thread, where the command line names no number.
    fn batches(self) -> usize {
        if self == Workload::DlrmLarge { MANY_BATCHES } else { BATCHES }
    }

    /// The job for so many partitions, each of which gives one of so many batches to a step.
    fn job(self, partitions: usize, batches: usize) -> Result<Job> {
        let with = |overrides| -> Result<Job> {
            let (file, toml) = (format!("the workload {}", self.name()), self.toml().into());
            Ok(job::parse(JobText { file, base: ".".into(), toml, overrides })?)
        };
        let batch = with(vec![])?.train.micro_batch;
        let samples = batches * batch * partitions;
        let mut overrides = vec![format!("train.partitions={partitions}"), format!("data.samples={samples}")];
        overrides.extend((self == Workload::DlrmLarge).then(|| "data.vocabulary=769231".to_string()));
        with(overrides)
    }
}

#[derive(clap::Args)]
pub struct Args {
    /// What to train; without it, --limits alone
    workload: Option<Workload>,
    /// Worker processes [default: one per core]
    #[arg(long)]
    workers: Option<usize>,
    /// Compute threads of each worker
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// How gradients and weights travel
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,
    /// Encrypts what travels by gRPC, with certificates made for the run
    #[arg(long)]
    pub tls: bool,
    /// Batches of synthetic data for each worker thread: an epoch is so many steps [default: 8; 256 for dlrm-large]
    #[arg(long)]
    batches: Option<NonZeroU16>,
    /// Length of the measurement; what warms up comes before it
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Measures also what the machine can do at most: products, memory, loopback, gRPC
    #[arg(long)]
    limits: bool,
    /// Prints one JSON object on the last line of stdout
    #[arg(long)]
    json: bool,
}

/// `unisono bench`.
pub async fn run(args: Args, started: Instant) -> Result<ExitCode> {
    crate::log(Level::WARN);
    if !(args.seconds > 0.0 && args.seconds <= 86_400.0) {
        return Err(Wrong(anyhow!("--seconds must be above 0, and a day at most, not {}", args.seconds)).into());
    }
    let workers = Workers { tls: args.tls, ..Workers::new(args.workers, usize::MAX, args.threads, args.transport)? };
    if args.workload.is_none() && !args.limits {
        let names = Workload::ALL.map(Workload::name).join(", ");
        return Err(Wrong(anyhow!("name a workload ({names}), or ask for --limits")).into());
    }
    let threads = workers.count.saturating_mul(workers.threads);
    if threads > MOST_THREADS {
        return Err(Wrong(anyhow!("--workers times --threads is {threads}; {MOST_THREADS} at most")).into());
    }
    let prepared = match args.workload {
        Some(workload) => {
            let job = workload
                .job(threads, args.batches.map_or(workload.batches(), |batches| batches.get().into()))
                .map_err(Wrong)?;
            Some((workload, unisono_coordinator::prepare_unkept(job).map_err(Wrong)?))
        }
        None => None,
    };
    let limits = if args.limits { Some(Limits::measure().await?) } else { None };
    let Some((workload, ready)) = prepared else {
        report::limits(limits, args.json);
        return Ok(ExitCode::SUCCESS);
    };
    let work = report::Work::of(&ready, workers);
    let options = Options {
        started,
        threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        shared_memory: args.transport != Transport::Grpc,
        patience: Default::default(),
        is_resumed: false,
        window: Some(Window {
            workers: workers.count,
            warm_steps: WARM_STEPS,
            warm: WARM,
            steps: 1,
            length: Duration::from_secs_f64(args.seconds),
            after: AFTER,
        }),
    };
    let (progress, watching) = watch::channel(Default::default());
    let (ids, workers_ids) = watch::channel(Vec::new());
    let peak = memory::Peak::watch(watching, workers_ids)?;
    let (summary, _) = workers.train(ready, options, progress, ids).await?;
    let peak = peak.end();
    let Some(measured) = &summary.measured else {
        eprintln!("unisono: ended before the measurement did: there are no figures");
        return Ok(ExitCode::from(130));
    };
    Report::new(workload.name(), workers, &summary, measured, work, peak, limits).print(args.json)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_are_the_peers() {
        let parameters = [7_850, 535_818, 20_037_642, 1_199_882, 818_176];
        for (workload, parameters) in Workload::ALL.into_iter().zip(parameters) {
            let job = workload.job(3, BATCHES).expect("a job");
            assert_eq!((job.train.partitions, job.name), (3, format!("bench-{}", workload.name())));
            let ready = unisono_coordinator::prepare_unkept(workload.job(1, BATCHES).expect("a job"))
                .expect("it can be trained");
            assert_eq!(ready.model().layout().trainable(), parameters, "{}", workload.name());
        }
        // (784 x 512 + 512 x 256 + 256 x 10) forward; backward both gradients, but not the first layer's input's.
        let ready = unisono_coordinator::prepare_unkept(Workload::Mlp.job(1, BATCHES).expect("a job"))
            .expect("it can be trained");
        assert_eq!(ready.model().multiply_adds(), [535_040, 2 * 535_040 - 784 * 512]);
        // 26 x 26 x 9 x 32 + (12 x 12 tiles) x 16 x 32 x 64 + 9216 x 128 + 128 x 10.
        let ready = unisono_coordinator::prepare_unkept(Workload::Cnn.job(1, BATCHES).expect("a job"))
            .expect("it can be trained");
        let (first, forward) = (194_688, 194_688 + 4_718_592 + 1_179_648 + 1_280);
        assert_eq!(ready.model().multiply_adds(), [forward, 2 * forward - first]);
        // Twelve matrices of 128 x 128 a layer and position; 128 values twice of each query and each key up to it; then the head.
        let ready = unisono_coordinator::prepare_unkept(Workload::Gpt.job(1, BATCHES).expect("a job"))
            .expect("it can be trained");
        let forward = 4 * (12 * 128 * 128 * 64 + 2 * (64 * 65 / 2) * 128) + 128 * 65 * 64;
        assert_eq!(ready.model().multiply_adds(), [forward, 2 * forward]);
    }
}
