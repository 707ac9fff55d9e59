//! What the processes of a run use: memory of the coordinator, and time of the workers.

use anyhow::Result;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::watch;
use unisono_coordinator::Progress;

/// What was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Used {
    /// The coordinator's memory at most, in MiB.
    pub memory_mib: f64,
    /// Processor seconds of all workers while the window was open.
    pub workers_cpu_seconds: f64,
}

/// Looks at this process, which is the coordinator, and at its workers while they run.
pub struct Watch {
    stop: mpsc::Sender<()>,
    thread: JoinHandle<Used>,
}

/// How often. The window's ends are noticed so late at most.
const EVERY: Duration = Duration::from_millis(20);
/// At one of so many looks memory is looked at, too.
const MEMORY: u64 = 10;

impl Watch {
    pub fn new(progress: watch::Receiver<Progress>, workers: watch::Receiver<Vec<u32>>) -> Result<Watch> {
        let (stop, stopped) = mpsc::channel();
        let look = move || {
            let (mut used, mut measuring, mut before) = (Used::default(), false, 0.0);
            // To look takes time of the process that is looked at.
            for turn in 0u64.. {
                if stopped.recv_timeout(EVERY) != Err(RecvTimeoutError::Timeout) {
                    break;
                }
                if turn.is_multiple_of(MEMORY) {
                    used.memory_mib = used.memory_mib.max(memory_mib().unwrap_or(0.0));
                }
                let now = progress.borrow().measuring;
                if now != measuring {
                    let seconds: f64 = workers.borrow().iter().filter_map(|id| cpu_seconds(*id)).sum();
                    match now {
                        true => before = seconds,
                        false => used.workers_cpu_seconds = (seconds - before).max(0.0),
                    }
                    measuring = now;
                }
            }
            used
        };
        Ok(Watch { stop, thread: std::thread::Builder::new().name("usage".into()).spawn(look)? })
    }

    /// What was seen until now.
    pub fn end(self) -> Used {
        drop(self.stop);
        self.thread.join().unwrap_or_default()
    }
}

/// The memory of this process.
fn memory_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB"))?;
    Some(kib.trim().parse::<f64>().ok()? / 1024.0)
}

/// Processor seconds that a process has had (proc_pid_stat(5): fields 14 and 15, after a name that may hold anything).
fn cpu_seconds(id: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_process_is_seen_to_work_and_to_hold_memory() {
        let me = std::process::id();
        let before = cpu_seconds(me).expect("this process");
        let (began, mut sum) = (Instant::now(), 0u64);
        while began.elapsed() < Duration::from_millis(200) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu_seconds(me).expect("this process") > before);
        let small = memory_mib().expect("this process");
        let held = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(memory_mib().expect("this process") > small + 32.0);
        drop(held);
        assert_eq!(cpu_seconds(u32::MAX), None);
    }
}
