//! What moving bytes costs by itself: the coordinator's streams with nothing behind them, and as many workers' connections.

use crate::simulate::trace::Trace;
use anyhow::{Result, anyhow, ensure};
use rustix::time::{ClockId, clock_gettime};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use unisono_common::layout::CHUNK;
use unisono_coordinator::Bare;
use unisono_proto::v1::parameters_client::ParametersClient;
use unisono_proto::v1::push_part::Kind;
use unisono_proto::v1::{BroadcastRequest, GradientChunk, PushPart};
use unisono_worker::Address;

/// Before it counts, while buffers still grow, and how long it counts.
const WARM: Duration = Duration::from_secs(2);
const LENGTH: Duration = Duration::from_secs(6);

/// Microseconds of the coordinator, for a worker and step, that moving bytes does not explain where one costs so many processor
/// seconds.
pub fn beyond(byte: f64, trace: &Trace) -> f64 {
    let moving = (trace.bytes_pushed + trace.bytes_pulled) * byte;
    (trace.coordinator_cpu_seconds - moving) / trace.workers as f64 * 1e6
}

/// Processor seconds that a server takes to move a byte: so many workers' connections take as many chunks as a model has, and send
/// as many back, again and again, each by itself.
///
/// # Errors
/// Where they cannot be opened.
pub async fn cost(workers: usize, model_bytes: usize) -> Result<f64> {
    let chunks = model_bytes.div_ceil(4 * CHUNK).max(1);
    let bare = Bare::listen(4 * CHUNK, chunks).await?;
    let (url, came) = (bare.url.clone(), bare.came.clone());
    // The other side has a thread of its own, whose time is known.
    let clients = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(clients(&url, &came, workers, chunks))
    };
    tokio::task::spawn_blocking(clients).await.map_err(|e| anyhow!("{e}"))?
}

async fn clients(url: &str, came: &AtomicU64, workers: usize, chunks: usize) -> Result<f64> {
    let address = Address::new(url, None)?;
    let went = Arc::new(AtomicU64::new(0));
    let chunk = Kind::Chunk(GradientChunk { index: 0, checksum: None, values: vec![0; 4 * CHUNK].into() });
    // All connect before any begins. Each way has a connection of its own, as workers have it.
    let mut connected = Vec::with_capacity(workers);
    for _ in 0..workers {
        connected.push([address.connect().await?, address.connect().await?].map(ParametersClient::new));
    }
    let mut moving = JoinSet::new();
    for (worker, [mut pushing, pulling]) in connected.into_iter().enumerate() {
        let session = bytes::Bytes::from(worker.to_le_bytes().to_vec());
        let mut pulling = pulling.max_decoding_message_size(unisono_proto::MAX_MESSAGE);
        let (send, parts) = mpsc::channel(chunks + 1);
        send.try_send(PushPart { kind: Some(Kind::Session(session.clone())) })?;
        moving.spawn(async move { drop(pushing.push(ReceiverStream::new(parts)).await) });
        let (went, chunk) = (went.clone(), chunk.clone());
        moving.spawn(async move {
            let Ok(weights) = pulling.broadcast(BroadcastRequest { session }).await else { return };
            let mut weights = weights.into_inner();
            for turn in 1.. {
                let Ok(Some(some)) = weights.message().await else { return };
                went.fetch_add(some.values.len() as u64, Ordering::Relaxed);
                if turn % chunks == 0 {
                    for _ in 0..chunks {
                        if send.send(PushPart { kind: Some(chunk.clone()) }).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
    }
    tokio::time::sleep(WARM).await;
    let moved = || came.load(Ordering::Relaxed) + went.load(Ordering::Relaxed);
    let (seconds, before) = (others(), moved());
    tokio::time::sleep(LENGTH).await;
    let (seconds, moved) = (others() - seconds, moved() - before);
    moving.shutdown().await;
    ensure!(moved > 0, "no bytes came through");
    Ok(seconds / moved as f64)
}

/// Processor seconds of the threads of this process but this one.
fn others() -> f64 {
    let [all, own] = [ClockId::ProcessCPUTime, ClockId::ThreadCPUTime].map(|of| {
        let time = clock_gettime(of);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    });
    all - own
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::trace::tests::example;

    #[test]
    fn what_bytes_cost_is_taken_off() {
        // 11 ms for 8 workers, 8 MB each way.
        assert!((beyond(0.5e-9, &example()) - (11e3 - 8e3) / 8.0).abs() < 1e-6);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn moving_a_byte_takes_time() {
        let byte = cost(3, 1_000_000).await.expect("it is measured");
        assert!(byte > 0.0 && byte < 1e-6, "{byte}");
    }
}
