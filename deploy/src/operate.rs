//! Asking and steering a running job.

use crate::Wrong;
use anyhow::{Result, bail};
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;
use unisono_proto::v1;
use unisono_worker::plain;

type Client = v1::operator_client::OperatorClient<tonic::transport::Channel>;

async fn client(url: &str) -> Result<Client> {
    let limit = Duration::from_secs(5);
    let endpoint = unisono_worker::endpoint(url).map_err(Wrong)?.timeout(limit);
    match tokio::time::timeout(limit, endpoint.connect()).await {
        Ok(connected) => Ok(Client::new(connected.map_err(|e| unisono_worker::unreachable(url, &e))?)),
        Err(_) => bail!("cannot reach a coordinator at {url}: nothing answers"),
    }
}

/// Prints where the run stands.
pub async fn status(url: &str, json: bool) -> Result<ExitCode> {
    let s = client(url).await?.status(v1::StatusRequest {}).await.map_err(|e| plain(url, &e))?.into_inner();
    if json {
        let worker = |w: &v1::WorkerStatus| {
            json!({ "worker": w.worker_id, "rank": w.rank, "name": w.name, "threads": w.threads,
                    "partitions": w.partitions, "silent_ms": w.silent_ms })
        };
        let workers: Vec<_> = s.workers.iter().map(worker).collect();
        println!(
            "{}",
            json!({ "job": s.job, "steps": s.step, "total_steps": s.total_steps, "epochs": s.epoch, "train_loss": s.loss,
                    "samples_per_second": s.samples_per_second, "workers": workers })
        );
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{}: step {} of {}, epoch {}, loss {:.5}, {:.0} samples/s",
        s.job, s.step, s.total_steps, s.epoch, s.loss, s.samples_per_second
    );
    println!("{:>6} {:>5} {:>8} {:>11} {:>10}  name", "worker", "rank", "threads", "partitions", "silent ms");
    for w in s.workers {
        println!(
            "{:>6} {:>5} {:>8} {:>11} {:>10}  {}",
            w.worker_id, w.rank, w.threads, w.partitions, w.silent_ms, w.name
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes a worker out.
pub async fn drain(url: &str, worker: u64) -> Result<ExitCode> {
    client(url).await?.drain(v1::DrainRequest { worker_id: worker }).await.map_err(|e| plain(url, &e))?;
    println!("worker {worker} leaves after its current step");
    Ok(ExitCode::SUCCESS)
}

/// Ends the run.
pub async fn stop(url: &str) -> Result<ExitCode> {
    client(url).await?.stop(v1::StopRequest {}).await.map_err(|e| plain(url, &e))?;
    println!("the run ends after its current step, with a checkpoint");
    Ok(ExitCode::SUCCESS)
}
