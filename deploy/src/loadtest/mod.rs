//! `unisono loadtest`: how a job scales with its workers, measured.

mod bytes;
mod figures;
pub mod fleet;
mod page;
mod report;
mod usage;

use crate::local::Workers;
use crate::simulate::Scaling;
use crate::simulate::cluster;
use crate::simulate::trace::{self, Trace};
use crate::simulate::units::{Counts, Seconds};
use crate::{Transport, Wrong, interruption, read_job, show};
use anyhow::{Context, Result, anyhow, bail};
use figures::{Moves, Size};
use fleet::{Fleet, Pretence};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::Level;
use unisono_common::protocol::Patience;
use unisono_coordinator::{Entrance, Options, Progress, Ready, Window};

/// What comes before the measured seconds, once all workers are there.
const WARM_STEPS: u64 = 2;
const WARM: Duration = Duration::from_millis(500);
/// Steps that are measured, at least.
const STEPS: u64 = 5;
/// Workers are started one after another, so long apart.
const APART: Duration = Duration::from_millis(2);
/// Workers that are started and not there yet, at most: a coordinator lets few in at once whom it does not know.
const COMING: usize = 32;
/// The most workers of a run that calibrates the simulation.
const CALIBRATES: usize = 8;
/// Workers that are started in a second, at most: a coordinator lets no more of one address in.
const MOST_CHURN: f64 = 50.0;
/// While fewer workers are there than were started, another comes within this time.
const PATIENCE: Duration = Duration::from_secs(120);
/// Workers of this machine may be starved of it for long: they are slow, not gone. Those that end are missed at once.
const SILENCE: Duration = Duration::from_secs(60);
/// Simulated workers, at most: they share one process.
const MOST_SIMULATED: usize = 1000;

#[derive(clap::Args)]
pub struct Args {
    /// The job file
    job: PathBuf,
    /// Numbers of workers, as in 1,2,4,8; or the first and the last, as in 1..64, with their doublings between
    #[arg(long, default_value = "1,2,4,8,16,32,64")]
    workers: Counts,
    /// Compute threads of each worker
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// How gradients and weights travel
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,
    /// What grows with the workers [default: both, one after the other]
    #[arg(long, value_enum)]
    scaling: Option<Scaling>,
    /// Workers that wait instead of computing, all in one process, and push zeros; their sessions and bytes are real
    #[arg(long)]
    simulated_workers: bool,
    /// How long simulated workers compute for a partition [default: as long as one real worker is seen to take]
    #[arg(long, value_name = "TIME", requires = "simulated_workers", conflicts_with = "from")]
    compute: Option<Seconds>,
    /// Takes that from a run that `--trace FILE` has written
    #[arg(long, value_name = "FILE", requires = "simulated_workers")]
    from: Option<PathBuf>,
    /// Length of each measurement
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// After each measurement, for as long, so many workers a second are ended and others started; 0 for none
    #[arg(long, value_name = "PER_SECOND", default_value_t = 1.0)]
    churn: f64,
    /// Overrides a key of the job, as in train.partitions=64; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Prints one JSON object on the last line of stdout
    #[arg(long)]
    json: bool,
    /// Writes a page with tables and plots
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Writes what `unisono simulate --from FILE` needs
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

/// One measurement to make.
#[derive(Clone, Copy)]
struct Run<'a> {
    args: &'a Args,
    scaling: Scaling,
    fewest: usize,
    workers: usize,
    pretence: Option<&'a Pretence>,
    churn: f64,
}

/// `unisono loadtest`.
pub async fn run(args: Args) -> Result<ExitCode> {
    // Workers that leave are no news here.
    crate::log(Level::ERROR);
    check(&args).map_err(Wrong)?;
    let job = read_job(Some(&args.job), &args.set)?;
    let counts = &args.workers.0;
    let scalings = args.scaling.map_or(vec![Scaling::Strong, Scaling::Weak], |one| vec![one]);
    let seed = job.seed;
    let pretence = match (args.simulated_workers, &args.from, args.compute) {
        (false, ..) => None,
        (true, Some(path), _) => Some(Trace::read(path).map_err(Wrong)?.compute_seconds),
        (true, None, Some(Seconds(compute))) => Some(vec![compute]),
        (true, None, None) => {
            let run = Run { args: &args, scaling: Scaling::Strong, fewest: 1, workers: 1, pretence: None, churn: 0.0 };
            let Some(size) = run.measure().await? else { return Ok(interrupted()) };
            eprintln!(
                "one real worker takes {:.2} ms for a partition, in the median",
                median(&size.trace.compute_seconds) * 1e3
            );
            Some(size.trace.compute_seconds)
        }
    };
    let pretence = pretence.map(|compute_seconds| Pretence { compute_seconds, seed });
    // What cannot be measured is found before the first measurement.
    for &scaling in &scalings {
        let most = counts[counts.len() - 1];
        let run = Run { args: &args, scaling, fewest: counts[0], workers: most, pretence: None, churn: 0.0 };
        let ready = run.prepare();
        let ready = ready.map_err(|e| Wrong(e.context(format!("{} scaling to {most} workers", scaling.name()))))?;
        if args.trace.is_some() && !ready.model().rows().is_empty() {
            return Err(Wrong(anyhow!("--trace: sparse tables are not simulated: leave --trace out")).into());
        }
    }
    let mut all = Vec::new();
    let mut failed = None;
    'all: for scaling in scalings {
        let mut sizes: Vec<Size> = Vec::new();
        for &workers in counts {
            let (pretence, churn) = (pretence.as_ref(), args.churn);
            let run = Run { args: &args, scaling, fewest: counts[0], workers, pretence, churn };
            let mut size = match run.measure().await {
                Ok(Some(size)) => size,
                Ok(None) => return Ok(interrupted()),
                // What was measured is not lost.
                Err(e) => {
                    failed = Some(e.context(format!("{} scaling with {workers} workers", scaling.name())));
                    predict(&mut sizes);
                    all.extend(sizes);
                    break 'all;
                }
            };
            let (fewest, rate) =
                sizes.first().map_or((workers, size.samples_per_second), |s| (s.workers, s.samples_per_second));
            size.efficiency = size.samples_per_second / rate * fewest as f64 / workers as f64;
            eprintln!(
                "{} scaling, {workers} workers: {:.0} samples/s, {:.0}%, held up by {}",
                scaling.name(),
                size.samples_per_second,
                size.efficiency * 100.0,
                size.bottleneck.text()
            );
            sizes.push(size);
        }
        predict(&mut sizes);
        all.extend(sizes);
    }
    if let Some(path) = &args.trace {
        let trace = all
            .iter()
            .find(|size| size.calibrates)
            .map(|size| &size.trace)
            .context("there is no size of 8 workers or fewer")?;
        write(path, &serde_json::to_string_pretty(trace)?)?;
    }
    // After all sizes, whose memory is measured.
    for &workers in counts {
        let sizes = all.iter_mut().filter(|size| size.workers == workers && size.trace.transport == "grpc");
        let mut sizes: Vec<&mut Size> = sizes.collect();
        let Some(model) = sizes.first().map(|size| size.trace.bytes_pulled as usize / workers) else { continue };
        eprintln!("moving the bytes of {} that do nothing else", show::count(workers, "worker"));
        let mut interrupted = interruption();
        let cost = tokio::select! {
            cost = bytes::cost(workers, model) => cost,
            _ = interrupted.wait_for(|now| *now) => break,
        };
        match cost {
            Ok(cost) => sizes.iter_mut().for_each(|size| size.own_us = Some(bytes::beyond(cost, &size.trace))),
            // What was measured is not lost.
            Err(e) => eprintln!("unisono: it is not known what moving bytes costs: {e:#}"),
        }
    }
    let report = report::Report { job: &job, args: &args, sizes: &all, pretence: pretence.as_ref() };
    if let Some(path) = &args.report {
        write(path, &report.html()?)?;
    }
    report.print()?;
    failed.map_or(Ok(ExitCode::SUCCESS), Err)
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

fn interrupted() -> ExitCode {
    eprintln!("unisono: ended before the measurements did: there are no figures");
    ExitCode::from(130)
}

fn median(quantiles: &[f64]) -> f64 {
    quantiles[quantiles.len() / 2]
}

/// Says what is wrong with the command line.
fn check(args: &Args) -> Result<()> {
    if !(args.seconds > 0.0 && args.seconds <= 86_400.0) {
        bail!("--seconds must be above 0, and a day at most, not {}", args.seconds);
    }
    if !(0.0..=MOST_CHURN).contains(&args.churn) {
        bail!("--churn must be from 0 to {MOST_CHURN} workers a second, not {}", args.churn);
    }
    let most = args.workers.0[args.workers.0.len() - 1];
    if args.simulated_workers && most > MOST_SIMULATED {
        bail!("--workers: {most} simulated workers are too many for one process; {MOST_SIMULATED} at most");
    }
    if args.trace.is_some() && args.transport != Transport::Grpc {
        bail!("--trace is of workers by gRPC, as they are on other machines: add --transport grpc");
    }
    if args.trace.is_some() && args.threads > 1 {
        bail!("--trace is for workers of one thread: leave --threads out");
    }
    if args.trace.is_some() && args.workers.0[0] > CALIBRATES {
        bail!("--trace needs a run with {CALIBRATES} workers or fewer: add one to --workers");
    }
    for (option, path) in [("--report", &args.report), ("--trace", &args.trace)] {
        let Some(path) = path else { continue };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        if path.is_dir() || folder.is_some_and(|folder| !folder.is_dir()) {
            bail!("{option} {}: name a file in a folder that exists", path.display());
        }
    }
    unisono_worker::check_threads(args.threads)
}

/// Adds what the simulation expects of each size, calibrated by the largest of the small ones.
fn predict(sizes: &mut [Size]) {
    let Some(at) = sizes.iter().rposition(|size| size.workers <= CALIBRATES && size.is_modelled) else { return };
    let trace = sizes[at].trace.clone();
    let load = trace.load();
    sizes[at].calibrates = true;
    for size in sizes {
        let load = load.with_partitions(size.partitions);
        let outcome = cluster::run(&load, &trace.host(), size.workers as u32, 50, 0);
        size.predicted = outcome.map(|outcome| outcome.samples_per_second);
    }
}

impl Run<'_> {
    /// The job of this size.
    fn prepare(&self) -> Result<Ready> {
        let Run { args, scaling, fewest, workers, .. } = *self;
        let mut set = args.set.clone();
        if scaling == Scaling::Weak {
            let partitions = read_job(Some(&args.job), &args.set)?.train.partitions;
            set.push(format!("train.partitions={}", scaling.partitions(partitions, fewest, workers)));
        }
        unisono_coordinator::prepare_unkept(read_job(Some(&args.job), &set)?)
    }

    /// Trains for a while, with all workers there; `None` where somebody at the keyboard ended it.
    async fn measure(self) -> Result<Option<Size>> {
        let Run { args, scaling, workers, pretence, churn, .. } = self;
        let ready = self.prepare()?;
        let is_modelled = args.threads == 1 && ready.model().rows().is_empty();
        let work = trace::work(ready.job());
        let length = Duration::from_secs_f64(args.seconds);
        let options = Options {
            started: Instant::now(),
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            shared_memory: args.transport != Transport::Grpc,
            patience: Patience { silence: SILENCE, ..Default::default() },
            is_resumed: false,
            window: Some(Window {
                workers,
                warm_steps: WARM_STEPS,
                warm: WARM,
                steps: STEPS,
                length,
                // Who comes last has time to come to something.
                after: if churn > 0.0 { length + (length / 2).max(Duration::from_secs(1)) } else { Duration::ZERO },
            }),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let (progress, watching) = watch::channel(Progress::default());
        let (ids, workers_ids) = watch::channel(Vec::new());
        let usage = usage::Watch::new(watching.clone(), workers_ids)?;
        let fleet =
            Fleet::new(Workers::new(Some(workers), usize::MAX, args.threads, args.transport)?, url, pretence).await?;
        let moves = Arc::new(Mutex::new(Moves::default()));
        let interrupted = interruption();
        let lead = lead(fleet, workers, (churn, length), watching, ids, moves.clone());
        let coordinator =
            unisono_coordinator::run(ready, options, Entrance::new(listener, None)?, progress, interrupted.clone());
        let summary = tokio::select! {
            summary = coordinator => summary?,
            failed = lead => match failed? {},
        };
        let used = usage.end();
        let Some(measured) = summary.measured.as_ref().filter(|_| !*interrupted.borrow()) else { return Ok(None) };
        let moves = moves.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let simulated = pretence.is_some();
        let size = Size::new(scaling, workers, work, simulated, used, &moves, &summary, measured);
        Ok(Some(Size { is_modelled, ..size }))
    }
}

/// Waits until so many of all workers are there.
async fn arrived(
    fleet: &mut Fleet,
    progress: &mut watch::Receiver<Progress>,
    least: usize,
    workers: usize,
) -> Result<()> {
    let (mut there, mut since) = (0, Instant::now());
    loop {
        let now = progress.borrow_and_update().workers.len();
        if now >= least {
            return Ok(());
        }
        if now != there {
            (there, since) = (now, Instant::now());
        } else if since.elapsed() > PATIENCE {
            bail!(
                "{there} of {workers} workers are there, and no other has come for 120 s: are there enough memory, open files and threads?"
            );
        }
        turn(fleet, progress).await?;
    }
}

/// Waits until something has changed in the run, or a moment, in which a worker may have ended.
async fn turn(fleet: &mut Fleet, progress: &mut watch::Receiver<Progress>) -> Result<()> {
    tokio::select! {
        // Whoever showed the progress is gone: so is the run.
        changed = progress.changed() => if changed.is_err() { std::future::pending().await },
        () = tokio::time::sleep(Duration::from_millis(100)) => fleet.check()?,
    }
    Ok(())
}

/// Starts the workers; when the measurement is over, ends and starts some as often and as long as `churn` says, at times that were
/// set before: a run that stalls is not spared any. Ends only with an error.
async fn lead(
    mut fleet: Fleet,
    workers: usize,
    (churn, length): (f64, Duration),
    mut progress: watch::Receiver<Progress>,
    ids: watch::Sender<Vec<u32>>,
    moves: Arc<Mutex<Moves>>,
) -> Result<std::convert::Infallible> {
    for number in 0..workers {
        fleet.start(number).await?;
        ids.send_replace(fleet.ids());
        arrived(&mut fleet, &mut progress, (number + 1).saturating_sub(COMING), workers).await?;
        tokio::time::sleep(APART).await;
    }
    arrived(&mut fleet, &mut progress, workers, workers).await?;
    for open in [true, false] {
        while progress.borrow_and_update().measuring != open {
            turn(&mut fleet, &mut progress).await?;
        }
    }
    let began = Instant::now();
    let lock = || moves.lock().unwrap_or_else(PoisonError::into_inner);
    if churn > 0.0 {
        lock().began = Some(began);
    }
    for oldest in 0.. {
        let due = (oldest + 1) as f64 / churn; // infinite without churn
        if due > length.as_secs_f64() {
            break;
        }
        let (due, newest) = (began + Duration::from_secs_f64(due), oldest + workers);
        tokio::time::sleep_until(due.into()).await;
        lock().stops.push(due);
        fleet.stop(oldest).await?;
        lock().starts.push((newest, due));
        fleet.start(newest).await?;
        ids.send_replace(fleet.ids());
        fleet.check()?;
    }
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        fleet.check()?;
    }
}
