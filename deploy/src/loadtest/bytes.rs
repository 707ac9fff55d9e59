//! What moving bytes costs by itself: the coordinator's gRPC server with nothing behind it, and as many connections as there are
//! workers.

use crate::bench::limits::{Bare, part};
use anyhow::{Result, anyhow};
use rustix::time::{ClockId, clock_gettime};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use unisono_proto::v1::BroadcastRequest;
use unisono_proto::v1::parameters_client::ParametersClient;
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
    /// Moves chunks through so many connections, one way after the other, as fast as they go.
    ///
    /// # Errors
    /// Where they cannot be opened.
    pub async fn measure(connections: usize) -> Result<Cost> {
        let bare = Bare::listen().await?;
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
    let pushing = clients.iter().cloned().map(|mut client| async move {
        client.push(tokio_stream::iter(std::iter::repeat(part()))).await.ok();
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
