//! A cluster on this machine: the coordinator in this process, workers as children that never outlive it.

use crate::progress::View;
use crate::{JobArgs, Transport, Wrong, interruption, options, read_job, show};
use anyhow::{Context, Result, bail};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use unisono_coordinator::Progress;

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

fn spawn(url: &str, threads: usize, transport: Transport) -> Result<Child> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    Command::new(program)
        .args(["worker", "--coordinator", url])
        .args(["--transport", transport.name()])
        .args(["--threads", &threads.to_string(), "--parent", &std::process::id().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start a worker process")
}

/// Keeps the workers alive; ends only with an error.
async fn supervise(
    url: String,
    workers: usize,
    threads: usize,
    transport: Transport,
    stopping: watch::Receiver<bool>,
) -> Result<std::convert::Infallible> {
    let mut children = (0..workers).map(|_| spawn(&url, threads, transport)).collect::<Result<Vec<_>>>()?;
    let mut died = VecDeque::new();
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        for child in &mut children {
            let Some(status) = child.try_wait()? else { continue };
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
            *child = spawn(&url, threads, transport)?;
        }
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
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let workers = workers.unwrap_or(cores.min(partitions));
    if workers == 0 {
        return Err(Wrong(anyhow::anyhow!("--workers must be at least 1")).into());
    }
    unisono_worker::check_threads(threads).map_err(Wrong)?;
    if workers > partitions {
        tracing::warn!("{workers} workers share {partitions} partitions: {} will have none", workers - partitions);
    }
    let options = options(&args, started)?;
    let ready = unisono_coordinator::prepare(job, args.resume).map_err(Wrong)?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let (progress, watching) = watch::channel(Progress::default());
    let interrupted = interruption();
    let shown = view.show(watching);
    let summary = tokio::select! {
        summary = unisono_coordinator::run(ready, options, listener, progress, interrupted.clone()) => summary,
        failed = supervise(url, workers, threads, args.transport, interrupted.clone()) => failed.map(|never| match never {}),
    };
    shown.end().await;
    let summary = summary?;
    show::summary(&summary, args.json)?;
    Ok(show::exit_code(&summary, *interrupted.borrow()))
}
