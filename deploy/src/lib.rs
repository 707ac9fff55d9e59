//! `unisono`: a distributed data-parallel trainer for CPUs, in one program; and, as a library, the same program with layers,
//! losses and data formats of one's own ([`main`]).

#[macro_use]
mod out;

mod bench;
mod cert;
mod cli;
mod confusion;
mod doctor;
mod export;
mod generate;
mod init;
mod launch;
mod loadtest;
mod local;
mod operate;
mod package;
mod predict;
mod progress;
mod recommend;
mod show;
mod simulate;
mod trained;

use anyhow::{Context, Result, bail};
use clap::Parser;
use cli::{Cli, Cmd, IDENTITY, IdentityArg, JobArgs, Transport};
use progress::View;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::Level;
use tracing_subscriber::filter::Targets;
pub use unisono_common as common;
use unisono_common::data::Files;
pub use unisono_common::extend::Extensions;
use unisono_common::job::{self, Job, JobText};
use unisono_coordinator::Entrance;
use unisono_proto::identity::Identity;
use unisono_worker::{Address, Refused};

/// The job that `unisono local` runs when none is named.
const DIGITS: &str = include_str!("../../examples/digits-mlp.toml");

/// A mistake in the command line or the job: nothing was started.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub(crate) struct Wrong(pub anyhow::Error);

struct LogLine;

impl std::io::Write for LogLine {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        progress::write(line).map(|()| line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Writes log lines of our own up to `level`, and the warnings of libraries, to stderr.
pub(crate) fn log(level: Level) {
    use tracing_subscriber::prelude::*;
    let ours = ["unisono", "unisono_coordinator", "unisono_worker"].map(|name| (name, level));
    let lines = tracing_subscriber::fmt::layer()
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(|| LogLine);
    let filter = Targets::new().with_default(level.min(Level::WARN)).with_targets(ours);
    tracing_subscriber::registry().with(lines.with_filter(filter)).init();
}

pub(crate) fn read_job(path: Option<&PathBuf>, set: &[String]) -> Result<Job> {
    let read = || -> Result<Job> {
        let text = |file: String, base, toml| JobText { file, base, toml, overrides: set.to_vec() };
        let Some(path) = path else {
            return Ok(job::parse(text("the embedded job".into(), ".".into(), DIGITS.into()))?);
        };
        if path.is_dir() {
            bail!(
                "{} is a folder; give the job file that it is of (with --resume to go on), or use `eval`, `predict` or `export`",
                path.display()
            );
        }
        let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
        if ["csv", "tsv", "jsonl", "parquet", "svm", "libsvm"].contains(&ending) {
            bail!("{0} looks like data, not like a job: `unisono init {0}` writes a job for it", path.display());
        }
        let toml = match std::fs::read_to_string(path) {
            Err(e) if e.kind() == ErrorKind::InvalidData => bail!("{} is no text, so no job file", path.display()),
            Err(e) if e.kind() == ErrorKind::NotFound => bail!(
                "there is no job file {}; `unisono init DATA` writes one for your data, and `unisono local` alone trains on \
                 digits that need none",
                path.display()
            ),
            read => read.with_context(|| format!("cannot read the job file {}", path.display()))?,
        };
        let base = std::path::absolute(path)?.parent().map(|p| p.display().to_string()).unwrap_or_default();
        Ok(job::parse(text(path.display().to_string(), base, toml))?)
    };
    read().map_err(|e| Wrong(e).into())
}

pub(crate) fn options(args: &JobArgs, started: Instant) -> Result<unisono_coordinator::Options> {
    if !(args.heartbeat_timeout > 0.0 && args.heartbeat_timeout < 1e6) {
        return Err(Wrong(anyhow::anyhow!("--heartbeat-timeout must be a positive number of seconds")).into());
    }
    let silence = Duration::from_secs_f64(args.heartbeat_timeout);
    Ok(unisono_coordinator::Options {
        started,
        threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        shared_memory: args.transport != Transport::Grpc,
        patience: unisono_common::protocol::Patience { silence, ..Default::default() },
        is_resumed: false,
        window: None,
    })
}

/// Turns true at the first Ctrl-C or SIGTERM; a second Ctrl-C ends the process at once. A second SIGTERM does not: what
/// manages processes may send it to each of them and to all.
pub(crate) fn interruption() -> watch::Receiver<bool> {
    let (send, receive) = watch::channel(false);
    tokio::spawn(async move {
        use tokio::signal::unix::{SignalKind, signal};
        let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
            return;
        };
        loop {
            let at_keyboard = tokio::select! { _ = int.recv() => true, _ = term.recv() => false };
            if send.send_replace(true) && at_keyboard {
                eprintln!("unisono: ended at once");
                std::process::exit(130);
            }
        }
    });
    receive
}

/// Binds a coordinator's address: beyond this machine only when it is `settled` who may join.
async fn listen(address: &str, settled: bool) -> Result<tokio::net::TcpListener> {
    let listener = tokio::net::TcpListener::bind(address).await.map_err(|e| {
        let other = "choose another address with --listen, as HOST:PORT";
        Wrong(anyhow::anyhow!("cannot listen on {address}: {e}; {other}"))
    })?;
    if settled || listener.local_addr()?.ip().to_canonical().is_loopback() {
        return Ok(listener);
    }
    Err(Wrong(anyhow::anyhow!(
        "{address} can be reached from other machines: make certificates with `unisono cert certs` and add --identity \
         certs/coordinator, or add --insecure if whoever reaches it may join, stop the run, and read all that is sent"
    ))
    .into())
}

/// The folders that a job may make a worker read.
fn data_roots(named: Vec<PathBuf>) -> Result<Vec<PathBuf>> {
    if let Some(none) = named.iter().find(|dir| !dir.is_dir()) {
        return Err(Wrong(anyhow::anyhow!("--data-root {} is no folder", none.display())).into());
    }
    if named.is_empty() {
        let data = std::env::var_os("UNISONO_DATA").filter(|dir| !dir.is_empty());
        // A service's working folder is often the root: that is no choice of anybody's.
        let here =
            Some(PathBuf::from(".")).filter(|here| here.canonicalize().is_ok_and(|here| here.parent().is_some()));
        return Ok(data.into_iter().map(PathBuf::from).chain(here).collect());
    }
    Ok(named)
}

/// As many open files as the system allows: each worker is a connection or two.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // What it was is enough for few workers.
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).ok();
}

async fn run(command: Cmd, started: Instant) -> Result<ExitCode> {
    unisono_common::kernels::isa().map_err(|e| Wrong(anyhow::anyhow!(e)))?;
    match command {
        Cmd::Local { job, workers, threads, args } => local::run(job, workers, threads, args, started).await,
        Cmd::Coordinator { job, listen: address, identity, insecure, linger, args } => {
            let view = View::new(&args);
            let (job, options) = (read_job(Some(&job), &args.set)?, options(&args, started)?);
            let options = unisono_coordinator::Options { is_resumed: true, ..options };
            let identity = identity.open()?;
            let ready = unisono_coordinator::prepare(job, args.begin()).map_err(Wrong)?;
            let listener = listen(&address, identity.is_some() || insecure).await?;
            let bound = listener.local_addr()?;
            let entrance = Entrance::new(listener, identity.as_ref()).map_err(|e| Wrong(e.into()))?;
            if !args.quiet {
                let scheme = if identity.is_some() { "https" } else { "http" };
                eprintln!("listening on {scheme}://{bound}");
                let there =
                    if bound.ip().is_unspecified() { format!("HOST:{}", bound.port()) } else { bound.to_string() };
                let proof = if identity.is_some() { " --identity DIR/worker" } else { "" };
                eprintln!("workers join by `unisono worker --coordinator {scheme}://{there}{proof}`");
            }
            let (progress, watching) = watch::channel(Default::default());
            let shown = view.show(watching);
            let interrupted = interruption();
            let summary = unisono_coordinator::run(ready, options, entrance, progress, interrupted.clone()).await;
            shown.end();
            let summary = summary?;
            show::summary(&summary, args.json)?;
            if linger && summary.status == "done" && !*interrupted.borrow() {
                let listener = listen(&address, true).await.context("cannot stay to answer")?;
                unisono_coordinator::linger(Entrance::new(listener, identity.as_ref())?, interrupted.clone()).await?;
            }
            Ok(show::exit_code(&summary, *interrupted.borrow()))
        }
        Cmd::Worker {
            reach,
            threads,
            transport,
            patience,
            name,
            cache,
            data_root,
            parent,
            identity_stdin,
            quiet,
            verbose,
        } => {
            log(match (verbose, parent) {
                (true, _) => Level::DEBUG,
                (false, None) if quiet => Level::WARN,
                (false, None) => Level::INFO,
                (false, Some(_)) => Level::ERROR,
            });
            // A local run's workers leave when their coordinator says so.
            let leave = match parent {
                Some(parent) => local::end_with(parent).map(|()| watch::channel(false).1)?,
                None => interruption(),
            };
            let name = name.unwrap_or_else(|| format!("{}:{}", cert::hostname(), std::process::id()));
            let patience = Duration::from_secs_f64(patience.clamp(0.0, 1e9));
            unisono_worker::check_threads(threads).map_err(Wrong)?;
            let coordinator = match identity_stdin {
                true => Address::new(&reach.coordinator, Some(&launch::take()?))?,
                false => reach.address()?,
            };
            let transport = transport.into();
            let (files, simulated) = (Files::below(data_roots(data_root)?), None);
            let options =
                unisono_worker::Options { coordinator, threads, transport, name, patience, cache, files, simulated };
            let served = unisono_worker::run(options, leave.clone()).await;
            // A launcher need not try it again.
            served.map_err(|e| if identity_stdin && e.is::<Refused>() { Wrong(e).into() } else { e })?;
            Ok(if *leave.borrow() { ExitCode::from(130) } else { ExitCode::SUCCESS })
        }
        Cmd::Doctor(args) => doctor::run(args).await,
        Cmd::Bench(args) => bench::run(args, started).await,
        Cmd::Loadtest(args) => loadtest::run(args).await,
        Cmd::Simulate(args) => simulate::run(&args),
        Cmd::SimulatedWorkers { coordinator, transport, parent } => {
            log(Level::WARN);
            local::end_with(parent)?;
            loadtest::fleet::serve(Address::new(&coordinator, None)?, transport.into()).await?;
            Ok(ExitCode::SUCCESS)
        }
        Cmd::Launch(args) => launch::run(args, started).await,
        Cmd::Init(args) => init::run(&args),
        Cmd::Eval { checkpoint, job, set, json, confusion } => {
            trained::eval(&checkpoint, job.as_ref(), &set, json, confusion.as_ref())
        }
        Cmd::Predict { checkpoint, generate: Some(prompt), sampling, .. } => {
            generate::generate(&checkpoint, &prompt, sampling)
        }
        Cmd::Predict { checkpoint, input, format, sampling, with_seen, .. } => {
            let top = sampling.top_k.map(|k| recommend::Top { k, with_seen });
            predict::predict(&checkpoint, input.as_ref(), format, top)
        }
        Cmd::Export { checkpoint, format, out, force } => export::export(&checkpoint, format, &out, force),
        Cmd::Status { reach, json } => operate::status(&reach.address()?, json).await,
        Cmd::Health { coordinator, identity } => {
            // Its authority is enough; a coordinator's own certificate is none to come with.
            let known = identity.open()?.map(|mine| Identity { certificate: None, token: None, ..mine });
            operate::health(&Address::new(&coordinator, known.as_ref()).map_err(Wrong)?).await
        }
        Cmd::Drain { worker, reach } => operate::drain(&reach.address()?, &worker).await,
        Cmd::Stop { reach } => operate::stop(&reach.address()?).await,
        Cmd::Cert(args) => cert::run(args),
        Cmd::Completions { shell } => package::completions(shell),
        Cmd::Man { dir } => package::man(&dir),
    }
}

/// The whole program, with what is added to it: its command line, and the exit status.
pub fn main(extensions: Extensions) -> ExitCode {
    let started = Instant::now();
    extensions.add();
    raise_open_files();
    let cli = Cli::parse();
    // A worker's streams are its own, and one thread serves them without waking another. A coordinator has those of all
    // workers, and leaves cores to the threads that reduce, unless it has to encrypt.
    let mut runtime = match cli.command {
        Cmd::Worker { .. } => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if cli.command.encrypts() { cores } else { cores / 2 };
    // What another thread has woken, an order to a worker or the next weights, is looked for at every second task: by itself tokio
    // looks the less often the shorter most tasks are, and those between may copy a chunk each.
    let runtime = runtime.worker_threads(threads.clamp(1, 8)).global_queue_interval(2);
    let runtime = match runtime.enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("unisono: cannot start: {e}");
            return ExitCode::from(1);
        }
    };
    let result = runtime.block_on(run(cli.command, started));
    runtime.shutdown_timeout(Duration::from_millis(200));
    match result {
        Ok(ExitCode::SUCCESS) if !out::is_whole() => ExitCode::from(1),
        Ok(code) => code,
        Err(e) => {
            eprintln!("unisono: {e:#}");
            ExitCode::from(if e.is::<Wrong>() { 2 } else { 1 })
        }
    }
}
