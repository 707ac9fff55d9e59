//! The command line.

use crate::{Wrong, bench, cert, doctor, export, generate, init, launch, loadtest, package, predict, simulate};
use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use unisono_coordinator::Begin;
use unisono_proto::identity::Identity;
use unisono_worker::Address;

#[derive(Parser)]
#[command(
    version,
    long_version = package::version(),
    about = "Trains models on CPUs: the result does not depend on the number of workers, to the last bit"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Cmd,
}

#[derive(Args, Clone)]
pub struct JobArgs {
    /// Overrides a key of the job, as in train.steps=200 (VALUE is TOML; a bare word is a string); repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Continues from the newest whole checkpoint; with =auto, begins where there are none
    #[arg(long, value_enum, value_name = "auto", num_args = 0..=1, require_equals = true, default_missing_value = "always", hide_possible_values = true)]
    pub resume: Option<Resume>,
    /// Prints the summary as one JSON object on the last line of stdout
    #[arg(long)]
    pub json: bool,
    /// Prints only warnings and the summary
    #[arg(long)]
    pub quiet: bool,
    /// Prints log lines, in detail, instead of progress lines
    #[arg(short, long)]
    pub verbose: bool,
    /// A worker is lost after this many seconds without a sign of life
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    pub heartbeat_timeout: f64,
    /// How gradients and weights travel
    #[arg(long, value_enum, default_value_t)]
    pub transport: Transport,
}

/// When a run goes on from a checkpoint.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    Always,
    Auto,
}

impl JobArgs {
    pub fn begin(&self) -> Begin {
        match self.resume {
            None => Begin::Afresh,
            Some(Resume::Always) => Begin::Resumed,
            Some(Resume::Auto) => Begin::Either,
        }
    }
}

/// The environment variable that names the folder of an identity.
pub const IDENTITY: &str = "UNISONO_IDENTITY";

/// The environment variable that says where the coordinator is.
pub const COORDINATOR: &str = "UNISONO_COORDINATOR";

/// The folder of an identity, as the command line or the environment names it.
#[derive(Args, Clone)]
pub struct IdentityArg {
    /// The folder of an identity, as `unisono cert` makes them: ca.crt, and tls.crt with tls.key, or token
    #[arg(long, value_name = "DIR", env = IDENTITY)]
    pub identity: Option<PathBuf>,
}

impl IdentityArg {
    /// The identity, where one is named.
    pub fn open(&self) -> Result<Option<Identity>> {
        let opened = self.identity.as_deref().map(Identity::open);
        opened.transpose().map_err(|e| Wrong(e.into()).into())
    }
}

/// A coordinator, and what is shown there.
#[derive(Args, Clone)]
pub struct Reach {
    /// The coordinator's URL, as https://HOST:PORT, or http://HOST:PORT without TLS
    #[arg(long, value_name = "URL", env = COORDINATOR)]
    pub coordinator: String,
    #[command(flatten)]
    pub identity: IdentityArg,
}

impl Reach {
    pub fn address(&self) -> Result<Address> {
        let identity = self.identity.open()?;
        Ok(Address::new(&self.coordinator, identity.as_ref()).map_err(Wrong)?)
    }
}

/// How gradients and weights get from process to process.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory for workers on the coordinator's host, gRPC for others
    #[default]
    Auto,
    /// Shared memory; a worker that has none with the coordinator is an error
    Shm,
    /// gRPC everywhere
    Grpc,
}

impl Transport {
    pub fn name(self) -> &'static str {
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
pub enum Cmd {
    /// Trains on this machine: a coordinator and worker processes, which end with it
    #[command(
        aliases = ["train", "run"],
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
        /// Gives up after this many seconds without a coordinator; at once where its certificate is of another CA, or not for its host
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
        /// CSV with a header, JSON lines (.json, .jsonl), or libsvm lines (.svm, .libsvm) [default: stdin, also given as -]
        ///
        /// Rows have the columns that the model was trained on; models of other data take one column a value, or
        /// {"features": [...]}. Values are raw: they are normalised as the training data was. For --top-k, rows have the
        /// column of users; they come with `rank`, `item` and `score`, a line for each item, or with a list `items`.
        #[arg(verbatim_doc_comment)]
        input: Option<PathBuf>,
        /// The format of rows from stdin, or of a file whose name does not say it
        #[arg(long)]
        format: Option<predict::Format>,
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
        after_help = "Examples:\n  unisono drain 3 --coordinator https://train.example.org:7070 --identity certs/operator\n  unisono drain node2:4711 --coordinator https://train.example.org:7070 --identity certs/operator"
    )]
    Drain {
        /// The worker's id or its name, as `status` shows them; a number is a name where no worker has that id
        worker: String,
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
    pub fn encrypts(&self) -> bool {
        match self {
            Cmd::Coordinator { identity, .. } => identity.identity.is_some(),
            Cmd::Launch(_) => true,
            Cmd::Bench(args) => args.tls,
            _ => false,
        }
    }
}
