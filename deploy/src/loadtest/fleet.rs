//! The workers of a load test: a process each, or simulated ones that share one process.

use crate::local::Workers;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use unisono_worker::{Address, Simulated, Transport};

/// How long simulated workers compute.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pretence {
    /// Seconds of a partition's gradient, at evenly spaced quantiles.
    pub compute_seconds: Vec<f64>,
    pub seed: u64,
}

/// What this process tells the one that holds simulated workers, a line each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    Pretend(Pretence),
    Start(usize),
    Stop(usize),
}

/// Workers by number; each number is used once.
pub enum Fleet {
    Processes { workers: Workers, url: String, running: BTreeMap<usize, Child> },
    Simulated { process: Child, orders: ChildStdin },
}

/// A worker's name in the run.
pub fn name(number: usize) -> String {
    format!("load-{number}")
}

impl Fleet {
    /// None yet, at the coordinator of `url`.
    pub async fn new(workers: Workers, url: String, pretence: Option<&Pretence>) -> Result<Fleet> {
        let Some(pretence) = pretence else {
            return Ok(Fleet::Processes { workers, url, running: BTreeMap::new() });
        };
        let mut process = Command::new(std::env::current_exe().context("cannot find this program's own file")?)
            .args(["simulated-workers", "--coordinator", &url, "--transport", workers.transport.name()])
            .args(["--parent", &std::process::id().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the process of the simulated workers")?;
        let orders = process.stdin.take().context("it has no stdin")?;
        let mut fleet = Fleet::Simulated { process, orders };
        fleet.order(&Order::Pretend(pretence.clone())).await?;
        Ok(fleet)
    }

    async fn order(&mut self, order: &Order) -> Result<()> {
        let Fleet::Simulated { orders, .. } = self else { return Ok(()) };
        let line = serde_json::to_string(order)? + "\n";
        orders.write_all(line.as_bytes()).await.context("the process of the simulated workers has ended")
    }

    /// Starts one.
    pub async fn start(&mut self, number: usize) -> Result<()> {
        if let Fleet::Processes { workers, url, running } = self {
            running.insert(number, workers.spawn(url, None, Some(&name(number)))?);
            return Ok(());
        }
        self.order(&Order::Start(number)).await
    }

    /// Ends one as a crash would.
    pub async fn stop(&mut self, number: usize) -> Result<()> {
        if let Fleet::Processes { running, .. } = self {
            // One that has ended by itself, as all do at the run's end, is none to end.
            if let Some(mut child) = running.remove(&number)
                && child.try_wait()?.is_none()
            {
                child.kill().await.context("cannot end a worker process")?;
            }
            return Ok(());
        }
        self.order(&Order::Stop(number)).await
    }

    /// Its processes.
    pub fn ids(&self) -> Vec<u32> {
        match self {
            Fleet::Processes { running, .. } => running.values().filter_map(Child::id).collect(),
            Fleet::Simulated { process, .. } => process.id().into_iter().collect(),
        }
    }

    /// Finds out whether all are still there.
    ///
    /// # Errors
    /// One that is not.
    pub fn check(&mut self) -> Result<()> {
        let ended = match self {
            Fleet::Processes { running, .. } => {
                let mut ended = running.values_mut().map(Child::try_wait);
                ended.find_map(|status| status.transpose()).transpose()?
            }
            Fleet::Simulated { process, .. } => process.try_wait()?,
        };
        match ended.filter(|status| !status.success()) {
            Some(status) => bail!("a worker process ended with {status}; what it wrote is above"),
            None => Ok(()),
        }
    }
}

/// Holds simulated workers, and starts and ends them as stdin says, until it ends.
pub async fn serve(coordinator: Address, transport: Transport) -> Result<()> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut running: BTreeMap<usize, JoinHandle<()>> = BTreeMap::new();
    let mut simulated: Option<Simulated> = None;
    while let Some(line) = lines.next_line().await? {
        match serde_json::from_str(&line).context("an order that cannot be read")? {
            Order::Pretend(Pretence { compute_seconds, seed }) => {
                simulated = Some(Simulated { partition: compute_seconds.into(), seed });
            }
            Order::Start(number) => {
                let simulated = simulated.as_ref().context("nobody has said how long to compute")?;
                let options = unisono_worker::Options {
                    coordinator: coordinator.clone(),
                    threads: 1,
                    transport,
                    name: name(number),
                    patience: Duration::from_secs(60),
                    cache: None,
                    files: Default::default(),
                    simulated: Some(Simulated {
                        partition: Arc::clone(&simulated.partition),
                        seed: simulated.seed + number as u64,
                    }),
                };
                let worker = async move {
                    if let Err(e) = unisono_worker::run(options, watch::channel(false).1).await {
                        tracing::warn!("simulated worker {number}: {e:#}");
                    }
                };
                running.insert(number, tokio::spawn(worker));
            }
            Order::Stop(number) => {
                if let Some(worker) = running.remove(&number) {
                    worker.abort();
                }
            }
        }
    }
    Ok(())
}
