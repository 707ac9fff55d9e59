//! A cluster on this machine: the coordinator in this process, workers as children that never outlive it.

use crate::progress::View;
use crate::{IDENTITY, JobArgs, Transport, Wrong, cert, interruption, options, read_job, show};
use anyhow::{Context, Result, bail};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use unisono_coordinator::{Entrance, Progress, Summary};
use unisono_proto::identity::Identity;

/// Workers that die within a minute and are replaced, at most.
const DEATHS: usize = 10;

/// Makes this process end when its parent does, kill -9 included.
pub fn end_with(parent: u32) -> Result<()> {
    let is_parent = move || rustix::process::getppid().is_some_and(|p| p.as_raw_nonzero().get() as u32 == parent);
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    if !is_parent() {
        bail!("the parent process is gone");
    }
    // A signal may reach the whole group; the coordinator decides when workers leave.
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        let mut signals = signal(kind)?;
        tokio::spawn(async move { while signals.recv().await.is_some() {} });
    }
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            if !is_parent() {
                std::process::exit(1);
            }
        }
    });
    Ok(())
}

/// The workers of a local run.
#[derive(Clone, Copy, Debug)]
pub struct Workers {
    pub count: usize,
    /// Compute threads of each.
    pub threads: usize,
    pub transport: Transport,
    /// Whether they reach their coordinator by TLS.
    pub tls: bool,
}

impl Workers {
    /// As the command line says; without a count, one for each core, but not more than `most`.
    pub fn new(count: Option<usize>, most: usize, threads: usize, transport: Transport) -> Result<Workers> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let count = count.unwrap_or(cores.min(most));
        if count == 0 {
            return Err(Wrong(anyhow::anyhow!("--workers must be at least 1")).into());
        }
        unisono_worker::check_threads(threads).map_err(Wrong)?;
        Ok(Workers { count, threads, transport, tls: false })
    }

    /// Starts one, whose name in the run is `name`, or its host and process.
    pub fn spawn(&self, url: &str, identity: Option<&Path>, name: Option<&str>) -> Result<Child> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut command = Command::new(program);
        // Without TLS there is no identity, whatever the environment says.
        command.env_remove(IDENTITY);
        if let Some(identity) = identity {
            command.env(IDENTITY, identity);
        }
        command
            .args(["worker", "--coordinator", url])
            .args(["--data-root", "/", "--transport", self.transport.name()])
            .args(["--threads", &self.threads.to_string(), "--parent", &std::process::id().to_string()])
            .args(name.iter().flat_map(|name| ["--name", *name]))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start a worker process")
    }

    /// Keeps them alive, and tells `ids` their processes; ends only with an error.
    async fn supervise(
        self,
        url: String,
        identity: Option<PathBuf>,
        stopping: watch::Receiver<bool>,
        ids: watch::Sender<Vec<u32>>,
    ) -> Result<std::convert::Infallible> {
        let mut children =
            (0..self.count).map(|_| self.spawn(&url, identity.as_deref(), None)).collect::<Result<Vec<_>>>()?;
        let tell = |children: &[Child]| ids.send_replace(children.iter().filter_map(Child::id).collect());
        tell(&children);
        let mut died = VecDeque::new();
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            for i in 0..children.len() {
                let Some(status) = children[i].try_wait()? else { continue };
                if status.success() || *stopping.borrow() && status.code().is_some() {
                    continue;
                }
                died.retain(|at: &Instant| at.elapsed() < Duration::from_secs(60));
                died.push_back(Instant::now());
                if status.code().is_some() {
                    bail!("a worker ended with {status}");
                }
                if died.len() > DEATHS {
                    bail!(
                        "workers died {} times within a minute, the last one by {status}: is there enough memory?",
                        died.len()
                    );
                }
                tracing::warn!("a worker died ({status}); starting another");
                children[i] = self.spawn(&url, identity.as_deref(), None)?;
                tell(&children);
            }
        }
    }

    /// Runs a coordinator in this process and the workers beside it; `ids` hears their processes. Gives whether somebody at
    /// the keyboard ended the run.
    pub async fn train(
        self,
        ready: unisono_coordinator::Ready,
        options: unisono_coordinator::Options,
        progress: watch::Sender<Progress>,
        ids: watch::Sender<Vec<u32>>,
    ) -> Result<(Summary, bool)> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let (scheme, certs) = if self.tls { ("https", Some(cert::Temporary::new(&[], 1)?)) } else { ("http", None) };
        let identity = certs.as_ref().map(|certs| Identity::open(&certs.identity(cert::COORDINATOR))).transpose()?;
        let of_workers = certs.as_ref().map(|certs| certs.identity(cert::WORKER));
        let url = format!("{scheme}://{}", listener.local_addr()?);
        let entrance = Entrance::new(listener, identity.as_ref())?;
        let interrupted = interruption();
        let summary = tokio::select! {
            summary = unisono_coordinator::run(ready, options, entrance, progress, interrupted.clone()) => summary?,
            failed = self.supervise(url, of_workers, interrupted.clone(), ids) => match failed? {},
        };
        let interrupted = *interrupted.borrow();
        Ok((summary, interrupted))
    }
}

/// `unisono local`.
pub async fn run(
    job: Option<PathBuf>,
    workers: Option<usize>,
    threads: usize,
    args: JobArgs,
    started: Instant,
) -> Result<ExitCode> {
    let view = View::new(&args);
    let job = read_job(job.as_ref(), &args.set)?;
    let partitions = job.train.partitions as usize;
    let workers = Workers::new(workers, partitions, threads, args.transport)?;
    if workers.count > partitions {
        let idle = workers.count - partitions;
        tracing::warn!("{} workers share {partitions} partitions: {idle} will have none", workers.count);
    }
    let options = options(&args, started)?;
    let ready = unisono_coordinator::prepare(job, args.begin()).map_err(Wrong)?;
    let (progress, watching) = watch::channel(Progress::default());
    let shown = view.show(watching);
    let trained = workers.train(ready, options, progress, watch::Sender::default()).await;
    shown.end();
    let (summary, interrupted) = trained?;
    show::summary(&summary, args.json)?;
    Ok(show::exit_code(&summary, interrupted))
}
