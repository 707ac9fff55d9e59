//! What moving bytes costs by itself: the coordinator's streams with nothing behind them, and as many connections as there are
//! workers.

use crate::simulate::trace::Trace;
use anyhow::{Result, anyhow};
use rustix::time::{ClockId, clock_gettime};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use unisono_common::layout::CHUNK;
use unisono_coordinator::Bare;
use unisono_proto::v1::parameters_client::ParametersClient;
use unisono_proto::v1::{BroadcastRequest, GradientChunk, PushPart, push_part};
use unisono_worker::Address;

/// Before it counts, and how long it counts.
const WARM: Duration = Duration::from_millis(300);
const LENGTH: Duration = Duration::from_secs(1);

/// Processor seconds that a server takes for a byte.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// One that comes, and one that goes.
    pub pushed: f64,
    pub pulled: f64,
}

impl Cost {
    /// Microseconds of the coordinator, for a worker and step, that moving bytes does not explain.
    pub fn beyond(self, trace: &Trace) -> f64 {
        let moving = trace.bytes_pushed * self.pushed + trace.bytes_pulled * self.pulled;
        (trace.coordinator_cpu_seconds - moving) / trace.workers as f64 * 1e6
    }

    /// Moves chunks through so many connections, one way after the other, as fast as they go.
    ///
    /// # Errors
    /// Where they cannot be opened.
    pub async fn measure(connections: usize) -> Result<Cost> {
        let bare = Bare::listen(4 * CHUNK).await?;
        let (url, came) = (bare.url.clone(), bare.came.clone());
        // The other side has a thread of its own, whose time is known.
        let clients = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(clients(&url, came, connections))
        };
        tokio::task::spawn_blocking(clients).await.map_err(|e| anyhow!("{e}"))?
    }
}

async fn clients(url: &str, came: Arc<AtomicU64>, connections: usize) -> Result<Cost> {
    let address = Address::new(url, None)?;
    let mut clients = Vec::new();
    for _ in 0..connections {
        let client = ParametersClient::new(address.connect().await?);
        clients.push(client.max_decoding_message_size(unisono_proto::MAX_MESSAGE));
    }
    let values = vec![0; 4 * CHUNK].into();
    let part = PushPart { kind: Some(push_part::Kind::Chunk(GradientChunk { index: 0, crc: 0, values })) };
    let pushing = clients.iter().cloned().map(|mut client| {
        let parts = std::iter::repeat(part.clone());
        async move { drop(client.push(tokio_stream::iter(parts)).await) }
    });
    let pushed = counted(pushing, &came).await?;
    let taken = Arc::new(AtomicU64::new(0));
    let pulling = clients.iter().cloned().map(|mut client| {
        let taken = taken.clone();
        async move {
            let Ok(chunks) = client.broadcast(BroadcastRequest::default()).await else { return };
            let mut chunks = chunks.into_inner();
            while let Ok(Some(chunk)) = chunks.message().await {
                taken.fetch_add(chunk.values.len() as u64, Ordering::Relaxed);
            }
        }
    });
    Ok(Cost { pushed, pulled: counted(pulling, &taken).await? })
}

/// What a byte costs the threads of this process but this one, while these streams move them.
async fn counted(
    streams: impl Iterator<Item = impl Future<Output = ()> + Send + 'static>,
    bytes: &AtomicU64,
) -> Result<f64> {
    let mut moving: JoinSet<()> = streams.collect();
    tokio::time::sleep(WARM).await;
    let (seconds, before) = (others(), bytes.load(Ordering::Relaxed));
    tokio::time::sleep(LENGTH).await;
    let (seconds, moved) = (others() - seconds, bytes.load(Ordering::Relaxed) - before);
    moving.shutdown().await;
    anyhow::ensure!(moved > 0, "no bytes came through the connections of the measurement of moving bytes");
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
        let cost = Cost { pushed: 0.5e-9, pulled: 0.25e-9 };
        assert!((cost.beyond(&example()) - (11e3 - 4e3 - 2e3) / 8.0).abs() < 1e-6);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn moving_a_byte_takes_time_each_way() {
        let Cost { pushed, pulled } = Cost::measure(3).await.expect("it is measured");
        assert!(pushed > 0.0 && pulled > 0.0, "{pushed} {pulled}");
    }
}
