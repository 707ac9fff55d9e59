//! Asking and steering a running job.

use anyhow::{Context, Result, bail};
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;
use tonic::Status;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use unisono_proto::v1;
use unisono_worker::{Address, Channel};

type Client = v1::operator_client::OperatorClient<Channel>;

/// How long a coordinator may take to answer.
const LIMIT: Duration = Duration::from_secs(5);

async fn connect(address: &Address) -> Result<Channel> {
    let connected = tokio::time::timeout(LIMIT, address.connect()).await;
    connected.with_context(|| format!("cannot reach a coordinator at {}: nothing answers", address.url()))?
}

async fn client(address: &Address) -> Result<Client> {
    Ok(Client::new(connect(address).await?))
}

/// The answer to a call, or an error where none comes.
async fn answer<T>(address: &Address, call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T> {
    let answered = tokio::time::timeout(LIMIT, call).await;
    let answered = answered.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
    Ok(answered.map_err(|e| address.plain(&e))?.into_inner())
}

/// Prints where the run stands.
pub async fn status(address: &Address, json: bool) -> Result<ExitCode> {
    let s = answer(address, client(address).await?.status(v1::StatusRequest {})).await?;
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
    if s.workers.is_empty() {
        println!("no worker is there: it waits for one");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:>6} {:>5} {:>8} {:>11} {:>10}  name", "worker", "rank", "threads", "partitions", "silent ms");
    for w in s.workers {
        println!(
            "{:>6} {:>5} {:>8} {:>11} {:>10}  {}",
            w.worker_id, w.rank, w.threads, w.partitions, w.silent_ms, w.name
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks the health service.
pub async fn health(address: &Address) -> Result<ExitCode> {
    let mut client = HealthClient::new(connect(address).await?);
    let status = answer(address, client.check(HealthCheckRequest::default())).await?.status();
    if status != ServingStatus::Serving {
        bail!(
            "the coordinator at {} says {}: it is about to end; its log says why",
            address.url(),
            status.as_str_name()
        );
    }
    println!("serving");
    Ok(ExitCode::SUCCESS)
}

/// Takes a worker out: of this id, or where there is none, of this name.
pub async fn drain(address: &Address, worker: &str) -> Result<ExitCode> {
    let mut client = client(address).await?;
    let workers = answer(address, client.status(v1::StatusRequest {})).await?.workers;
    let worker_id = match workers.iter().find(|w| worker.parse() == Ok(w.worker_id)) {
        Some(worker) => worker.worker_id,
        None => named(worker, &workers)?,
    };
    answer(address, client.drain(v1::DrainRequest { worker_id })).await?;
    println!("worker {worker_id} leaves after its current step");
    Ok(ExitCode::SUCCESS)
}

/// The id of the only worker with this name.
fn named(name: &str, workers: &[v1::WorkerStatus]) -> Result<u64> {
    let ids: Vec<_> = workers.iter().filter(|w| w.name == name).map(|w| w.worker_id).collect();
    match *ids {
        [id] => Ok(id),
        [] => bail!("there is no worker {name}: `unisono status` shows ids and names"),
        _ => bail!("several workers are named {name}: say which one by its id, one of {ids:?}"),
    }
}

/// Ends the run.
pub async fn stop(address: &Address) -> Result<ExitCode> {
    answer(address, client(address).await?.stop(v1::StopRequest {})).await?;
    println!("the run ends after its current step, with a checkpoint");
    Ok(ExitCode::SUCCESS)
}
