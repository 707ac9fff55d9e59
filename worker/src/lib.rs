//! The worker: it leases partitions, computes their gradient sums, and pushes them.

pub mod cache;
pub mod compute;
mod connect;
pub mod link;
mod push;
mod rows;
pub mod samples;
pub mod session;
mod weights;

use anyhow::{Result, bail};
pub use connect::{Address, Channel};
use session::{End, Kept};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::watch;
use unisono_common::data::Files;

/// Pauses between attempts to join.
const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);
/// A membership that lasted so long was no failed attempt.
const LONG: Duration = Duration::from_secs(2);

/// How gradients and weights get from process to process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory on the coordinator's host, gRPC elsewhere.
    #[default]
    Auto,
    /// Shared memory, or not at all.
    Shm,
    /// gRPC everywhere.
    Grpc,
}

/// How a worker runs; none of it changes the result.
#[derive(Clone, Debug)]
pub struct Options {
    pub coordinator: Address,
    pub threads: usize,
    pub transport: Transport,
    pub name: String,
    /// Give up after this long without a coordinator.
    pub patience: Duration,
    /// Where partitions that the coordinator sends are kept from run to run.
    pub cache: Option<std::path::PathBuf>,
    /// What a job may make it read.
    pub files: Files,
    /// Computes no gradients and pushes zeros, to measure what the rest can do: alone among these it changes the result.
    pub simulated: Option<Simulated>,
}

/// How long a worker takes that only pretends to compute.
#[derive(Clone, Debug)]
pub struct Simulated {
    /// Seconds of a partition, at evenly spaced quantiles; one of them is drawn for each.
    pub partition: Arc<[f64]>,
    pub seed: u64,
}

/// The coordinator does not want this worker, or is not the one that it wants, and the next time would be the same.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

/// Locks a mutex whose holders leave what they guard as it should be, whatever happens to them.
fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// Finds out whether a worker may have so many threads.
///
/// # Errors
/// None, or too many.
pub fn check_threads(threads: usize) -> Result<()> {
    let most = unisono_proto::MAX_THREADS as usize;
    if threads == 0 || threads > most {
        bail!("--threads must be from 1 to {most}, not {threads}");
    }
    Ok(())
}

/// Serves the coordinator until its job ends, or until `leave` turns true and its share of the open step is done; joins again
/// after every break.
pub async fn run(options: Options, mut leave: watch::Receiver<bool>) -> Result<()> {
    let mut kept = Kept::default();
    let mut alone_since = tokio::time::Instant::now();
    let (mut pause, mut said) = (SHORTEST, BTreeSet::new());
    loop {
        let began = tokio::time::Instant::now();
        match session::session(&options, &mut kept, &mut leave).await {
            Ok(End::Done(why)) => {
                tracing::info!("{why}");
                return Ok(());
            }
            Ok(End::Refused(why)) => return Err(Refused(why).into()),
            Err(e) if e.is::<Refused>() => return Err(e),
            Ok(End::Again(_)) | Err(_) if *leave.borrow() => return Ok(()),
            Ok(End::Again(why)) => {
                tracing::warn!("{why}; joining again");
                said.clear();
                alone_since = tokio::time::Instant::now();
                // Who is sent away again and again asks less and less often.
                if began.elapsed() > LONG {
                    pause = SHORTEST;
                }
            }
            Err(e) => {
                if alone_since.elapsed() > options.patience {
                    bail!("{e:#} (tried for {} s)", options.patience.as_secs());
                }
                let why = format!("{e:#}");
                // Each reason once, also where two take turns.
                if !said.contains(&why) {
                    let left = options.patience.saturating_sub(alone_since.elapsed());
                    tracing::warn!("{why}; trying for {} s", left.as_secs_f64().ceil());
                    said.insert(why);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = session::asked(&mut leave) => return Ok(()),
        }
        pause = (pause * 2).min(LONGEST);
    }
}
