//! Asking and steering a running job.

use anyhow::{Context, Result, anyhow};
use std::process::ExitCode;
use unisono_proto::v1;

type Client = v1::operator_client::OperatorClient<tonic::transport::Channel>;

async fn client(url: &str) -> Result<Client> {
    let url = if url.contains("://") { url.to_string() } else { format!("http://{url}") };
    Client::connect(url.clone()).await.with_context(|| format!("cannot reach a coordinator at {url}"))
}

fn plain(e: tonic::Status) -> anyhow::Error {
    anyhow!("{}", e.message())
}

/// Prints where the run stands.
pub async fn status(url: &str) -> Result<ExitCode> {
    let s = client(url).await?.status(v1::StatusRequest {}).await.map_err(plain)?.into_inner();
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
    client(url).await?.drain(v1::DrainRequest { worker_id: worker }).await.map_err(plain)?;
    println!("worker {worker} leaves after its current step");
    Ok(ExitCode::SUCCESS)
}

/// Ends the run.
pub async fn stop(url: &str) -> Result<ExitCode> {
    client(url).await?.stop(v1::StopRequest {}).await.map_err(plain)?;
    println!("the run ends after its current step, with a checkpoint");
    Ok(ExitCode::SUCCESS)
}
