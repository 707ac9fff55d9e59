//! A cluster on this machine: the coordinator in this process, workers as children that never outlive it.

use crate::{JobArgs, Wrong, interruption, options, read_job, show};
use anyhow::{Context, Result, bail};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use unisono_coordinator::Progress;

/// Workers that died and were started again, at most.
const RESTARTS: usize = 10;

/// Makes this process end when its parent does, kill -9 included.
pub fn end_with(parent: u32) -> Result<()> {
    let is_parent = move || rustix::process::getppid().is_some_and(|p| p.as_raw_nonzero().get() as u32 == parent);
    #[cfg(target_os = "linux")]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    if !is_parent() {
        bail!("the parent process is gone");
    }
    // A terminal's Ctrl-C reaches the whole group; the coordinator decides when workers leave.
    tokio::spawn(async move { while tokio::signal::ctrl_c().await.is_ok() {} });
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

fn spawn(url: &str, threads: usize) -> Result<Child> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    Command::new(program)
        .args(["worker", "--coordinator", url])
        .args(["--threads", &threads.to_string(), "--parent", &std::process::id().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start a worker process")
}

/// Keeps the workers alive; ends only with an error.
async fn supervise(url: String, workers: usize, threads: usize) -> Result<std::convert::Infallible> {
    let mut children = (0..workers).map(|_| spawn(&url, threads)).collect::<Result<Vec<_>>>()?;
    let mut restarts = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        for child in &mut children {
            let Some(status) = child.try_wait()? else { continue };
            if status.success() {
                continue;
            }
            if status.code().is_some() || restarts == RESTARTS {
                bail!("a worker ended with {status}");
            }
            tracing::warn!("a worker died ({status}); starting another");
            restarts += 1;
            *child = spawn(&url, threads)?;
        }
    }
}

/// A progress line for the run, and one for each worker, ten times a second.
async fn draw(progress: watch::Receiver<Progress>) {
    let style = |template| ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let lines = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    let run = lines.add(ProgressBar::new(0).with_style(style("{bar:24} {pos}/{len}, {eta} left, {wide_msg}")));
    let mut workers: Vec<ProgressBar> = Vec::new();
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    while progress.has_changed().is_ok() {
        tick.tick().await;
        let p = progress.borrow().clone();
        run.set_length(p.total_steps);
        run.set_position(p.step);
        let eval = p.eval.map(|e| format!(", test {e}")).unwrap_or_default();
        run.set_message(format!("epoch {}, loss {:.4}, {:.0} samples/s{eval}", p.epoch, p.loss, p.samples_per_second));
        while workers.len() > p.workers.len() {
            if let Some(line) = workers.pop() {
                lines.remove(&line);
            }
        }
        while workers.len() < p.workers.len() {
            workers.push(lines.add(ProgressBar::new(0).with_style(style("  {wide_msg}"))));
        }
        for (line, w) in workers.iter().zip(p.workers) {
            let late = if w.silent > Duration::from_secs(2) {
                format!(", silent for {} s", w.silent.as_secs())
            } else {
                String::new()
            };
            let (threads, s) = (w.threads, if w.threads == 1 { "" } else { "s" });
            line.set_message(format!(
                "worker {} ({}): {threads} thread{s}, {} partitions{late}",
                w.id, w.name, w.partitions
            ));
        }
    }
    lines.clear().ok();
}

/// `unisono local`.
pub async fn run(
    job: Option<PathBuf>,
    workers: Option<usize>,
    threads: usize,
    args: JobArgs,
    started: Instant,
) -> Result<ExitCode> {
    let terminal = std::io::stderr().is_terminal() && !args.quiet && !args.verbose;
    crate::log(if args.quiet || terminal { tracing::Level::WARN } else { tracing::Level::INFO });
    let job = read_job(job.as_ref(), &args.set)?;
    let partitions = job.train.partitions as usize;
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let workers = workers.unwrap_or(cores.min(partitions));
    if workers == 0 || threads == 0 {
        return Err(Wrong(anyhow::anyhow!("--workers and --threads must be at least 1")).into());
    }
    let options = options(&args, started)?;
    let ready = unisono_coordinator::prepare(job, args.resume).map_err(Wrong)?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let (progress, watching) = watch::channel(Progress::default());
    let interrupted = interruption();
    if terminal {
        tokio::spawn(draw(watching));
    }
    let summary = tokio::select! {
        summary = unisono_coordinator::run(ready, options, listener, progress, interrupted.clone()) => summary?,
        failed = supervise(url, workers, threads) => match failed? {},
    };
    show::summary(&summary, args.json)?;
    Ok(show::exit_code(&summary, *interrupted.borrow()))
}
