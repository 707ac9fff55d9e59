//! The worker: it leases partitions, computes their gradient sums, and pushes them.

pub mod compute;
pub mod session;

use anyhow::{Result, bail};
use session::{End, Kept};
use std::time::Duration;

/// How a worker runs; none of it changes the result.
#[derive(Clone, Debug)]
pub struct Options {
    pub url: String,
    pub threads: usize,
    pub name: String,
    /// Give up after this long without a coordinator.
    pub patience: Duration,
}

/// Serves the coordinator at `options.url` until its job ends; joins again after every break.
pub async fn run(options: Options) -> Result<()> {
    let mut kept = Kept::default();
    let mut alone_since = tokio::time::Instant::now();
    let mut pause = Duration::from_millis(50);
    loop {
        match session::session(&options.url, options.threads, &options.name, &mut kept).await {
            Ok(End::Done(why)) => {
                tracing::info!("{why}");
                return Ok(());
            }
            Ok(End::Refused(why)) => bail!("{why}"),
            Ok(End::Again(why)) => {
                tracing::warn!("{why}; joining again");
                alone_since = tokio::time::Instant::now();
                pause = Duration::from_millis(50);
            }
            Err(e) => {
                if alone_since.elapsed() > options.patience {
                    bail!("{e:#} (tried for {} s)", options.patience.as_secs());
                }
                tracing::debug!("{e:#}");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}
