//! What a run was seen to take, and what follows from it for others.

use super::cluster::{self, Bytes, Hosts, Load};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use unisono_common::job::{Job, Length};
use unisono_coordinator::Ready;

/// What moving a byte costs each side by gRPC where nothing was measured, in processor seconds.
const BYTES: Bytes = Bytes { coordinator: 0.5e-9, worker: 0.5e-9 };

/// A short run that was measured, with all its processes on one host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    pub job: String,
    /// What a partition's step is: see [`work`].
    pub work: String,
    pub transport: String,
    pub workers: u32,
    pub partitions: u32,
    /// Whether the workers waited instead of computing.
    pub simulated: bool,
    /// Of the host.
    pub cores: f64,
    /// Steps that were measured.
    pub steps: u64,
    /// Means of a step: seconds, samples, and bytes each way.
    pub step_seconds: f64,
    pub samples: f64,
    pub bytes_pushed: f64,
    pub bytes_pulled: f64,
    /// Nodes that are pushed.
    pub nodes: f64,
    /// Seconds of a partition's gradient, at evenly spaced quantiles.
    pub compute_seconds: Vec<f64>,
    /// Processor seconds of a step: the coordinator's, of them those of the update, and all workers'.
    pub coordinator_cpu_seconds: f64,
    pub update_cpu_seconds: f64,
    pub workers_cpu_seconds: f64,
}

/// The digest of a job but for what scaling changes: its partitions and its length.
pub fn work(job: &Job) -> String {
    let mut job = job.clone();
    (job.train.partitions, job.train.length) = (1, Length::Steps(1));
    blake3::Hash::from_bytes(job.digest()).to_hex()[..16].to_string()
}

impl Trace {
    /// Reads one.
    ///
    /// # Errors
    /// A file that is none.
    pub fn read(path: &Path) -> Result<Trace> {
        let from = || format!("{} is no trace: write one with `unisono loadtest JOB --trace FILE`", path.display());
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read the trace {}", path.display()))?;
        let trace: Trace = serde_json::from_str(&text).with_context(from)?;
        let numbers = [trace.step_seconds, trace.samples, trace.cores, trace.nodes];
        let whole = trace.workers > 0 && trace.partitions > 0 && !trace.compute_seconds.is_empty();
        let all = numbers.iter().chain(&trace.compute_seconds);
        anyhow::ensure!(
            whole && all.clone().all(|n| n.is_finite() && *n >= 0.0) && numbers.iter().all(|n| *n > 0.0),
            from()
        );
        Ok(trace)
    }

    /// What a step asked of everybody. Of the coordinator's time, what the update did not take is that of moving bytes.
    pub fn load(&self) -> Load {
        let moved = (self.bytes_pushed + self.bytes_pulled).max(1.0);
        let coordinator = (self.coordinator_cpu_seconds - self.update_cpu_seconds).max(0.0) / moved;
        let computed =
            self.compute_seconds.iter().sum::<f64>() / self.compute_seconds.len() as f64 * self.partitions as f64;
        // A worker that computes is seen to work at both: the bytes cost it what they cost the coordinator, and what is left is its
        // computing, however long that took where cores were scarce.
        let (worker, scale) = match self.simulated {
            true => (self.workers_cpu_seconds / moved, 1.0),
            false => {
                let computing = (self.workers_cpu_seconds - coordinator * moved).max(0.0);
                (coordinator, (computing / computed.max(f64::MIN_POSITIVE)).min(1.0))
            }
        };
        let mut load = Load {
            partitions: self.partitions,
            samples: self.samples,
            weights: self.bytes_pulled / self.workers as f64,
            gradient: self.bytes_pushed / self.nodes,
            compute: self.compute_seconds.iter().map(|seconds| seconds * scale).collect(),
            computes: !self.simulated,
            bytes: Bytes { coordinator, worker },
            update: self.update_cpu_seconds,
            rest: 0.0,
        };
        let explained = cluster::run(&load, &self.host(), self.workers, 50, 0);
        let explained = explained.map_or(0.0, |outcome| load.samples / outcome.samples_per_second);
        load.rest = (self.step_seconds - explained).max(0.0);
        load
    }

    /// Where it ran.
    pub fn host(&self) -> Hosts {
        Hosts::one(self.cores)
    }
}

/// What a job asks of everybody whose partitions take so many seconds each.
pub fn load(ready: &Ready, compute: f64) -> Load {
    let (train, bytes) = (&ready.job().train, 4.0 * ready.model().layout().len() as f64);
    Load {
        partitions: train.partitions,
        samples: train.partitions as f64 * train.micro_batch as f64,
        weights: bytes,
        gradient: bytes,
        compute: vec![compute],
        computes: true,
        bytes: BYTES,
        // Weights and gradients, and as much state, read and written once.
        update: bytes * 0.5e-9,
        rest: 0.0,
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Of a run that nobody has made.
    pub fn example() -> Trace {
        Trace {
            job: "a job".into(),
            work: "0123".into(),
            transport: "grpc".into(),
            workers: 8,
            partitions: 8,
            simulated: true,
            cores: 2.0,
            steps: 100,
            step_seconds: 0.050,
            samples: 512.0,
            bytes_pushed: 8e6,
            bytes_pulled: 8e6,
            nodes: 8.0,
            compute_seconds: vec![0.019, 0.020, 0.021],
            coordinator_cpu_seconds: 0.011,
            update_cpu_seconds: 0.001,
            workers_cpu_seconds: 0.012,
        }
    }

    #[test]
    fn a_trace_explains_the_run_that_it_was_taken_of() {
        let trace = example();
        let load = trace.load();
        let again = cluster::run(&load, &trace.host(), 8, 200, 1).expect("it ends");
        let seconds = load.samples / again.samples_per_second;
        assert!((seconds / 0.050 - 1.0).abs() < 0.02, "{seconds}");
        assert!((load.bytes.coordinator - 0.010 / 16e6).abs() < 1e-15);
        let path = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(&path, serde_json::to_string(&trace).expect("text")).expect("written");
        assert_eq!(Trace::read(path.path()).expect("a trace"), trace);
        std::fs::write(&path, "{}").expect("written");
        assert!(format!("{:#}", Trace::read(path.path()).unwrap_err()).contains("--trace FILE"));
    }
}
