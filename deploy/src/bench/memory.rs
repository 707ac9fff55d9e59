//! The memory of a run's processes, each shared page counted once.

use anyhow::Result;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::watch;
use unisono_coordinator::Progress;

/// Looks at the memory of this process and its workers now and then, but not while a window is measured: looking takes time.
pub struct Peak {
    stop: mpsc::Sender<()>,
    thread: JoinHandle<Option<u64>>,
}

impl Peak {
    /// Begins to look.
    pub fn watch(progress: watch::Receiver<Progress>, workers: watch::Receiver<Vec<u32>>) -> Result<Peak> {
        let (stop, stopped) = mpsc::channel();
        let look = move || {
            let mut peak = None;
            while stopped.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout) {
                if !progress.borrow().measuring {
                    let ids: Vec<u32> = std::iter::once(std::process::id()).chain(workers.borrow().clone()).collect();
                    // A worker that has just ended has none.
                    peak = peak.max(ids.into_iter().map(pss).reduce(|a, b| Some(a? + b.unwrap_or(0))).flatten());
                }
            }
            peak
        };
        Ok(Peak { stop, thread: std::thread::Builder::new().name("memory".into()).spawn(look)? })
    }

    /// The most that was seen, in MiB; `None` where the system does not tell.
    pub fn end(self) -> Option<f64> {
        drop(self.stop);
        self.thread.join().ok().flatten().map(|kib| kib as f64 / 1024.0)
    }
}

/// A process's memory in KiB, of shared pages its share.
fn pss(id: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{id}/smaps_rollup")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix("kB")?.trim().parse().ok())
}
