//! `unisono`: a distributed data-parallel trainer for CPUs, in one program; and, as a library, the same program with layers,
//! losses and data formats of one's own ([`main`]).

mod bench;
mod cert;
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
mod progress;
mod recommend;
mod show;
mod simulate;
mod trained;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
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
use unisono_coordinator::{Begin, Entrance};
use unisono_proto::identity::Identity;
use unisono_worker::Address;

/// The job that `unisono local` runs when none is named.
const DIGITS: &str = include_str!("../../examples/digits-mlp.toml");

#[derive(Parser)]
#[command(
    version,
    long_version = package::version(),
    about = "Trains models on CPUs: the result does not depend on the number of workers, to the last bit"
)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Args, Clone)]
pub(crate) struct JobArgs {
    /// Overrides a key of the job, as in train.steps=200 (VALUE is TOML; a bare word is a string); repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Continues from the newest whole checkpoint; with =auto, begins where there are none
    #[arg(long, value_enum, value_name = "auto", num_args = 0..=1, require_equals = true, default_missing_value = "always", hide_possible_values = true)]
    resume: Option<Resume>,
    /// Prints the summary as one JSON object on the last line of stdout
    #[arg(long)]
    json: bool,
    /// Prints only warnings and the summary
    #[arg(long)]
    quiet: bool,
    /// Prints log lines, in detail, instead of progress lines
    #[arg(short, long)]
    verbose: bool,
    /// A worker is lost after this many seconds without a sign of life
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    heartbeat_timeout: f64,
    /// How gradients and weights travel
    #[arg(long, value_enum, default_value_t)]
    transport: Transport,
}

/// When a run goes on from a checkpoint.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Resume {
    Always,
    Auto,
}

impl JobArgs {
    pub(crate) fn begin(&self) -> Begin {
        match self.resume {
            None => Begin::Afresh,
            Some(Resume::Always) => Begin::Resumed,
            Some(Resume::Auto) => Begin::Either,
        }
    }
}

/// The environment variable that names the folder of an identity.
pub(crate) const IDENTITY: &str = "UNISONO_IDENTITY";

/// The environment variable that says where the coordinator is.
const COORDINATOR: &str = "UNISONO_COORDINATOR";

/// The folder of an identity, as the command line or the environment names it.
#[derive(Args, Clone)]
pub(crate) struct IdentityArg {
    /// The folder of an identity, as `unisono cert` makes them: ca.crt, and tls.crt with tls.key, or token
    #[arg(long, value_name = "DIR", env = IDENTITY)]
    identity: Option<PathBuf>,
}

impl IdentityArg {
    /// The identity, where one is named.
    fn open(&self) -> Result<Option<Identity>> {
        let opened = self.identity.as_deref().map(Identity::open);
        opened.transpose().map_err(|e| Wrong(e.into()).into())
    }
}

/// A coordinator, and what is shown there.
#[derive(Args, Clone)]
pub(crate) struct Reach {
    /// The coordinator's URL, as https://HOST:PORT, or http://HOST:PORT without TLS
    #[arg(long, value_name = "URL", env = COORDINATOR)]
    coordinator: String,
    #[command(flatten)]
    identity: IdentityArg,
}

impl Reach {
    pub(crate) fn address(&self) -> Result<Address> {
        let identity = self.identity.open()?;
        Ok(Address::new(&self.coordinator, identity.as_ref()).map_err(Wrong)?)
    }
}

/// How gradients and weights get from process to process.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Transport {
    /// Shared memory for workers on the coordinator's host, gRPC for others
    #[default]
    Auto,
    /// Shared memory; a worker that has none with the coordinator is an error
    Shm,
    /// gRPC everywhere
    Grpc,
}

impl Transport {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Transport::Auto => "auto",
            Transport::Shm => "shm",
            Transport::Grpc => "grpc",
        }
    }
}

impl From<Transport> for unisono_worker::Transport {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Auto => unisono_worker::Transport::Auto,
            Transport::Shm => unisono_worker::Transport::Shm,
            Transport::Grpc => unisono_worker::Transport::Grpc,
        }
    }
}

#[derive(Subcommand)]
enum Cmd {
    /// Trains on this machine: a coordinator and worker processes, which end with it
    #[command(
        after_help = "Examples:\n  unisono local\n  unisono local examples/mnist-mlp.toml --workers 4 --set train.epochs=5"
    )]
    Local {
        /// The job file; without it, the embedded handwritten digits
        job: Option<PathBuf>,
        /// Worker processes [default: one per core, at most the partitions]
        #[arg(long)]
        workers: Option<usize>,
        /// Compute threads of each worker
        #[arg(long, default_value_t = 1)]
        threads: usize,
        #[command(flatten)]
        args: JobArgs,
    },
    /// Runs the coordinator alone; it ends when the job is done
    #[command(
        after_help = "Examples:\n  unisono coordinator job.toml --listen 0.0.0.0:7070 --identity certs/coordinator\n  unisono coordinator job.toml --listen 0.0.0.0:7070 --identity certs/coordinator --resume=auto --linger"
    )]
    Coordinator {
        /// The job file
        job: PathBuf,
        /// Address to listen on
        #[arg(long, default_value = "127.0.0.1:7070")]
        listen: String,
        #[command(flatten)]
        identity: IdentityArg,
        /// Listens beyond this machine without TLS: whoever reaches the address can join, stop the run, and read all that is sent
        #[arg(long, conflicts_with = "identity")]
        insecure: bool,
        /// Stays when the job is done, and answers `health` until it is interrupted: for services that are started again when they
        /// end
        #[arg(long)]
        linger: bool,
        #[command(flatten)]
        args: JobArgs,
    },
    /// Runs one worker; it may start at any time, and ends when the job does
    #[command(
        after_help = "Example:\n  unisono worker --coordinator https://train.example.org:7070 --identity certs/worker --threads 8"
    )]
    Worker {
        #[command(flatten)]
        reach: Reach,
        /// Compute threads
        #[arg(long, default_value_t = 1)]
        threads: usize,
        /// How gradients and weights travel
        #[arg(long, value_enum, default_value_t)]
        transport: Transport,
        /// Gives up after this many seconds without a coordinator
        #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
        patience: f64,
        /// Its name in logs and `status` [default: its host and process]
        #[arg(long)]
        name: Option<String>,
        /// Keeps the partitions that the coordinator sends in DIR, by digest, for the next run on the same data
        #[arg(long, value_name = "DIR")]
        cache: Option<PathBuf>,
        /// A folder that a job may make this worker read, with all below it; repeatable [default: UNISONO_DATA, and the working
        /// folder]
        #[arg(long, value_name = "DIR")]
        data_root: Vec<PathBuf>,
        /// Ends when this process, which must be the parent, ends
        #[arg(long, hide = true)]
        parent: Option<u32>,
        /// Takes the identity from stdin, and ends when that does
        #[arg(long, hide = true, conflicts_with = "parent")]
        identity_stdin: bool,
        /// Prints only warnings
        #[arg(long, conflicts_with = "verbose")]
        quiet: bool,
        /// Prints more
        #[arg(short, long)]
        verbose: bool,
    },
    /// Trains on several machines: the coordinator here, and workers on the hosts of a file by ssh, which end with it
    Launch(launch::Args),
    /// Writes a job file for your data: format, columns, task and model are guessed, and each guess is explained
    Init(init::Args),
    /// Measures how fast this machine trains, and where the time of a step goes
    #[command(
        after_help = "Examples:\n  unisono bench mlp --workers 2\n  unisono bench mlp-wide --workers 2 --transport grpc --limits"
    )]
    Bench(bench::Args),
    /// Measures how a job scales with its workers: what so many of them do, and what holds them up
    #[command(
        after_help = "Examples:\n  unisono loadtest job.toml --workers 1,2,4 --report scaling.html\n  unisono loadtest job.toml --workers 1..64 --transport grpc --simulated-workers --compute 40ms"
    )]
    Loadtest(loadtest::Args),
    /// Predicts how a job scales on machines that one does not have yet, and what would move it
    #[command(
        after_help = "Examples:\n  unisono simulate job.toml --workers 1..4096 --link 25Gbit --rtt 0.2ms --compute 40ms\n  unisono simulate job.toml --workers 1..64 --from trace.json --stragglers 0.01x5 --failures 24h"
    )]
    Simulate(simulate::Args),
    /// Holds the simulated workers of a load test
    #[command(hide = true)]
    SimulatedWorkers {
        #[arg(long)]
        coordinator: String,
        #[arg(long, value_enum)]
        transport: Transport,
        #[arg(long)]
        parent: u32,
    },
    /// Evaluates a checkpoint on its test set, or on the data of another job
    #[command(
        after_help = "Examples:\n  unisono eval runs/mnist-mlp\n  unisono eval runs/mnist-mlp --confusion digits.svg"
    )]
    Eval {
        /// A checkpoint (runs/NAME/step-...), or a run's folder: its newest whole one
        checkpoint: PathBuf,
        /// A job whose data is used instead of the checkpoint's own
        job: Option<PathBuf>,
        /// Overrides a key of JOB, as in data.test=other.csv; repeatable
        #[arg(long = "set", value_name = "KEY=VALUE", requires = "job")]
        set: Vec<String>,
        /// Prints one JSON object on the last line of stdout
        #[arg(long)]
        json: bool,
        /// Writes how many samples of each class are taken for which: a table (.csv) or a picture (.svg)
        #[arg(long, value_name = "FILE")]
        confusion: Option<PathBuf>,
    },
    /// Predicts for new inputs: CSV or JSON lines in, the same with `prediction` out, or with the best items for each user
    #[command(
        after_help = "Examples:\n  unisono predict runs/adult people.csv\n  unisono predict runs/movies users.csv --top-k 10\n  unisono predict runs/shakespeare --generate \"ROMEO:\" --temperature 0.8"
    )]
    Predict {
        /// A checkpoint (runs/NAME/step-...), or a run's folder: its newest whole one
        checkpoint: PathBuf,
        /// CSV with a header, JSON lines (.json, .jsonl), or libsvm lines (.svm, .libsvm) [default: stdin]
        ///
        /// Rows have the columns that the model was trained on; models of other data take one column a value, or
        /// {"features": [...]}. Values are raw: they are normalised as the training data was. For --top-k, rows have the
        /// column of users; they come with `rank`, `item` and `score`, a line for each item, or with a list `items`.
        #[arg(verbatim_doc_comment)]
        input: Option<PathBuf>,
        /// The format of rows from stdin, or of a file whose name does not say it
        #[arg(long)]
        format: Option<trained::Format>,
        /// Goes on with a text instead, as a language model was trained to
        #[arg(long, value_name = "PROMPT", num_args = 0..=1, default_missing_value = "", conflicts_with_all = ["input", "format"])]
        generate: Option<String>,
        #[command(flatten)]
        sampling: generate::Sampling,
        /// With --top-k: ranks also what a user has in the training set; otherwise its data are read, and that is left out
        #[arg(long, requires = "top_k", conflicts_with = "generate")]
        with_seen: bool,
    },
    /// Writes a checkpoint for other programs: its weights with PyTorch's names and layouts, or the model as ONNX
    #[command(
        after_help = "Examples:\n  unisono export runs/mnist-mlp --out mlp.safetensors\n  unisono export runs/mnist-mlp --out mlp.onnx"
    )]
    Export {
        /// A checkpoint (runs/NAME/step-...), or a run's folder: its newest whole one
        checkpoint: PathBuf,
        /// What to write [default: what the name of FILE ends in]
        #[arg(long)]
        format: Option<export::Format>,
        /// The file to write
        #[arg(long, value_name = "FILE", alias = "to")]
        out: PathBuf,
        /// Replaces FILE where it exists
        #[arg(long)]
        force: bool,
    },
    /// Shows where a running job stands
    #[command(
        after_help = "Example:\n  unisono status --coordinator https://train.example.org:7070 --identity certs/operator"
    )]
    Status {
        #[command(flatten)]
        reach: Reach,
        /// Prints one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Finds out whether a coordinator serves, which needs no certificate: the status is 0, else 1
    #[command(
        after_help = "Examples:\n  unisono health\n  unisono health --coordinator https://train.example.org:7070 --identity certs/worker"
    )]
    Health {
        /// The coordinator's URL
        #[arg(long, value_name = "URL", env = COORDINATOR, default_value = "127.0.0.1:7070")]
        coordinator: String,
        #[command(flatten)]
        identity: IdentityArg,
    },
    /// Takes a worker out of a running job after its current step
    #[command(
        after_help = "Example:\n  unisono drain 3 --coordinator https://train.example.org:7070 --identity certs/operator"
    )]
    Drain {
        /// The worker's id, as `status` shows it
        worker: u64,
        #[command(flatten)]
        reach: Reach,
    },
    /// Ends a running job after its current step, with a checkpoint
    #[command(
        after_help = "Example:\n  unisono stop --coordinator https://train.example.org:7070 --identity certs/operator"
    )]
    Stop {
        #[command(flatten)]
        reach: Reach,
    },
    /// Prints what a shell needs to complete this program's commands and options
    #[command(after_help = "Example:\n  unisono completions bash > ~/.local/share/bash-completion/completions/unisono")]
    Completions { shell: clap_complete::Shell },
    /// Writes manual pages, one for each command
    #[command(after_help = "Example:\n  unisono man ~/.local/share/man/man1")]
    Man {
        /// The folder to write them to, which is made where there is none
        dir: PathBuf,
    },
    /// Looks at this machine, a job's data, credentials and a coordinator, and says what to change
    Doctor(doctor::Args),
    /// Makes certificates and a join token, for runs on several machines
    Cert(cert::Args),
}

impl Cmd {
    /// Whether it is a coordinator that speaks TLS.
    fn encrypts(&self) -> bool {
        match self {
            Cmd::Coordinator { identity, .. } => identity.identity.is_some(),
            Cmd::Launch(_) => true,
            Cmd::Bench(args) => args.tls,
            _ => false,
        }
    }
}

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
                "{} is a folder; give a job file, or use --resume, `eval`, `predict` or `export` for a run",
                path.display()
            );
        }
        let toml = match std::fs::read_to_string(path) {
            Err(e) if e.kind() == ErrorKind::InvalidData => bail!("{} is no text, so no job file", path.display()),
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
            if !args.quiet {
                let scheme = if identity.is_some() { "https" } else { "http" };
                eprintln!("listening on {scheme}://{}", listener.local_addr()?);
            }
            let entrance = Entrance::new(listener, identity.as_ref()).map_err(|e| Wrong(e.into()))?;
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
            unisono_worker::run(options, leave.clone()).await?;
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
            trained::predict(&checkpoint, input.as_ref(), format, top)
        }
        Cmd::Export { checkpoint, format, out, force } => export::export(&checkpoint, format, &out, force),
        Cmd::Status { reach, json } => operate::status(&reach.address()?, json).await,
        Cmd::Health { coordinator, identity } => {
            // Its authority is enough; a coordinator's own certificate is none to come with.
            let known = identity.open()?.map(|mine| Identity { certificate: None, token: None, ..mine });
            operate::health(&Address::new(&coordinator, known.as_ref()).map_err(Wrong)?).await
        }
        Cmd::Drain { worker, reach } => operate::drain(&reach.address()?, worker).await,
        Cmd::Stop { reach } => operate::stop(&reach.address()?).await,
        Cmd::Cert(args) => cert::run(args),
        Cmd::Completions { shell } => Ok(package::completions(shell)),
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
    let runtime = match runtime.worker_threads(threads.clamp(1, 8)).enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("unisono: cannot start: {e}");
            return ExitCode::from(1);
        }
    };
    let result = runtime.block_on(run(cli.command, started));
    runtime.shutdown_timeout(Duration::from_millis(200));
    match result {
        Ok(code) => code,
        Err(e) => {
            eprintln!("unisono: {e:#}");
            ExitCode::from(if e.is::<Wrong>() { 2 } else { 1 })
        }
    }
}
