//! What a measurement came to, as a table or as JSON.

use super::limits::Limits;
use crate::local::Workers;
use crate::show::{count, isa, machine, thousands};
use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Value, json};
use unisono_common::optim::Optimizer;
use unisono_coordinator::{Measured, Ready, Summary};

/// What a step does, whatever its speed.
#[derive(Clone, Copy)]
pub struct Work {
    /// Floating point operations of a worker's matrix products, forward and backward.
    forward: f64,
    backward: f64,
    /// Bytes that a worker reads and writes to gather its samples.
    data: f64,
    /// Bytes that the optimizer reads and writes.
    optimizer: f64,
    /// Samples of a worker's batch.
    batch: usize,
}

impl Work {
    /// Of a job whose partitions are one for each worker thread.
    pub fn of(ready: &Ready, workers: Workers) -> Work {
        let (job, model) = (ready.job(), ready.model());
        let batch = job.train.micro_batch * workers.threads;
        let [forward, backward] = model.multiply_adds().map(|n| 2.0 * n as f64 * batch as f64);
        let slots = Optimizer::new(&job.train.optimizer, job.train.ema).slots();
        Work {
            forward,
            backward,
            data: (2 * 4 * model.input_len() * batch) as f64,
            // The old weights are read and the new ones written; state is both.
            optimizer: ((2 + 2 * slots) * 4 * model.layout().len()) as f64,
            batch,
        }
    }
}

/// How fast a phase does what it does.
#[derive(Clone, Copy)]
enum Rate {
    Gflops(f64),
    GbPerSecond(f64),
}

/// One phase of a step.
struct Row {
    name: &'static str,
    ms: f64,
    percent: f64,
    rate: Option<Rate>,
    /// Of what the machine can do.
    percent_of_limit: Option<f64>,
}

/// A measurement.
pub struct Report<'a> {
    workload: &'static str,
    workers: Workers,
    summary: &'a Summary,
    measured: &'a Measured,
    work: Work,
    peak_memory_mib: Option<f64>,
    limits: Option<Limits>,
}

fn gigabytes(bytes: f64) -> String {
    match bytes {
        1e9.. => format!("{:.2} GB", bytes / 1e9),
        1e6.. => format!("{:.1} MB", bytes / 1e6),
        _ => format!("{:.1} kB", bytes / 1e3),
    }
}

fn line(name: &str, value: String) {
    println!("  {name:<12} {value}");
}

fn print_limits(limits: &Limits) {
    println!("\n  this machine at most");
    let row = |what: &str, rate: f64, unit: &str| println!("  {what:<34} {rate:>7.2} {unit}");
    row("products 512 x 512 x 512, 1 thread", limits.gemm_gflops, "GFLOP/s");
    row("memory copy, 1 thread", limits.copy_gb_per_second, "GB/s read and written");
    row("TCP over loopback", limits.tcp_gb_per_second, "GB/s one way");
    row("gRPC over loopback", limits.grpc_gb_per_second, "GB/s each way at once");
    row("... of gradients and weights", limits.push_broadcast_gb_per_second, "GB/s each way at once");
}

/// Prints what the machine can do, alone.
pub fn limits(limits: Option<Limits>, json: bool) {
    if json {
        println!("{}", json!({ "limits": limits }));
    } else if let Some(limits) = limits {
        println!();
        line("machine", machine());
        print_limits(&limits);
    }
}

impl<'a> Report<'a> {
    pub fn new(
        workload: &'static str,
        workers: Workers,
        summary: &'a Summary,
        measured: &'a Measured,
        work: Work,
        peak_memory_mib: Option<f64>,
        limits: Option<Limits>,
    ) -> Report<'a> {
        Report { workload, workers, summary, measured, work, peak_memory_mib, limits }
    }

    /// The mean of the steps.
    fn mean_ms(&self) -> f64 {
        self.measured.seconds * 1e3 / self.measured.steps as f64
    }

    /// The step time that a part `q` of all steps is within.
    fn quantile(&self, q: f64) -> f64 {
        let sorted = &self.measured.step_ms;
        sorted[((sorted.len() - 1) as f64 * q).round() as usize]
    }

    fn samples_per_second(&self) -> f64 {
        self.measured.samples as f64 / self.measured.seconds
    }

    fn rows(&self) -> Vec<Row> {
        let (m, work) = (self.measured, &self.work);
        let wired = (m.bytes_pushed + m.bytes_pulled) as f64 / m.steps as f64;
        let gflops = |work: f64, ms: f64| Rate::Gflops(work / ms / 1e6);
        let gb = |bytes: f64, seconds: f64| Rate::GbPerSecond(bytes / seconds / 1e9);
        let row = |(name, ms): (&'static str, f64)| {
            let seconds = ms / 1e3;
            let rate = match name {
                "data" => Some(gb(work.data, seconds)),
                "forward" => Some(gflops(work.forward, ms)),
                "backward" => Some(gflops(work.backward, ms)),
                "encode" if m.encoded > 0.0 => Some(gb(m.encoded, seconds)),
                "wire" if self.summary.transport == "grpc" => Some(gb(wired, seconds)),
                // Their rates are of one thread, over all that they do in a step; a part of it, or all, is off the critical path.
                "reduce" => Some(gb(m.bytes_pushed as f64 / m.steps as f64, m.reduce_seconds)),
                "optimizer" => Some(gb(work.optimizer, m.optimizer_seconds)),
                _ => None,
            };
            let rate = rate.filter(|rate| {
                let (Rate::Gflops(rate) | Rate::GbPerSecond(rate)) = rate;
                rate.is_finite()
            });
            let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
            let share = |limits: Limits| {
                Some(match rate? {
                    Rate::Gflops(rate) => rate / (limits.gemm_gflops * self.workers.threads.min(cores) as f64),
                    Rate::GbPerSecond(rate) if name == "wire" => rate / (2.0 * limits.grpc_gb_per_second),
                    Rate::GbPerSecond(rate) => rate / limits.copy_gb_per_second,
                })
            };
            let percent_of_limit = self.limits.and_then(share).map(|share| share * 100.0);
            Row { name, ms, percent: ms / self.mean_ms() * 100.0, rate, percent_of_limit }
        };
        m.phases.each().into_iter().map(row).collect()
    }

    /// Prints it: one JSON line on stdout, or tables.
    pub fn print(&self, json: bool) -> Result<()> {
        if json {
            println!("{}", serde_json::to_string(&self.json())?);
        } else {
            self.table();
        }
        Ok(())
    }

    fn json(&self) -> impl Serialize {
        let (s, m) = (self.summary, self.measured);
        let phase = |row: Row| {
            let mut phase = json!({ "ms": row.ms, "percent": row.percent });
            match row.rate {
                Some(Rate::Gflops(rate)) => phase["gflops"] = rate.into(),
                Some(Rate::GbPerSecond(rate)) => phase["gb_per_second"] = rate.into(),
                None => {}
            }
            if let Some(share) = row.percent_of_limit {
                phase["percent_of_limit"] = share.into();
            }
            (row.name.to_string(), phase)
        };
        let mut all = json!({
            "workload": self.workload,
            "job": s.job,
            "status": s.status,
            "steps": m.steps,
            "samples": m.samples,
            "parameters": s.parameters,
            "partitions": s.partitions,
            "workers": s.workers,
            "threads": self.workers.threads,
            "transport": s.transport,
            "wall_seconds": s.wall_seconds,
            "train_seconds": m.seconds,
            "samples_per_second": self.samples_per_second(),
            "step_ms": { "p50": self.quantile(0.5), "p99": self.quantile(0.99), "mean": self.mean_ms() },
            "train_loss": s.train_loss,
            "bytes_pushed": m.bytes_pushed,
            "bytes_pulled": m.bytes_pulled,
            "workers_joined": s.workers_joined,
            "workers_lost": s.workers_lost,
            "partitions_reissued": s.partitions_reissued,
            "phases": self.rows().into_iter().map(phase).collect::<Map<String, Value>>(),
        });
        if let Some(isa) = isa() {
            all["isa"] = isa.into();
        }
        if let Some(mib) = self.peak_memory_mib {
            all["peak_memory_mib"] = mib.into();
        }
        if let Some(limits) = self.limits {
            all["limits"] = json!(limits);
        }
        all
    }

    fn table(&self) {
        let (s, m) = (self.summary, self.measured);
        let a_step = |bytes: u64| gigabytes(bytes as f64 / m.steps as f64);
        println!();
        let parameters = thousands(s.parameters as f64);
        line("workload", format!("{}, {parameters} parameters, batches of {}", self.workload, self.work.batch));
        line("machine", machine());
        let (workers, threads) = (count(s.workers, "worker"), count(self.workers.threads, "thread"));
        line("workers", format!("{workers} of {threads} over {}", s.transport));
        let steps = count(m.steps as usize, "step");
        line("speed", format!("{} samples/s ({steps} in {:.2} s)", thousands(self.samples_per_second()), m.seconds));
        let (p50, p99) = (self.quantile(0.5), self.quantile(0.99));
        line("step", format!("{p50:.3} ms median, {p99:.3} ms p99, {:.3} ms mean", self.mean_ms()));
        line("a step moves", format!("{} pushed, {} pulled", a_step(m.bytes_pushed), a_step(m.bytes_pulled)));
        if let Some(mib) = self.peak_memory_mib {
            line("memory", format!("{} MiB at most, all processes", thousands(mib)));
        }
        let of_limit = if self.limits.is_some() { "of limit" } else { "" };
        let head = format!("  {:<12} {:>9} {:>6} {:>16} {of_limit:>9}", "phase", "ms", "%", "rate");
        println!("\n{}", head.trim_end());
        for Row { name, ms, percent, rate, percent_of_limit } in self.rows() {
            let rate = match rate {
                Some(Rate::Gflops(rate)) => format!("{rate:.1} GFLOP/s"),
                Some(Rate::GbPerSecond(rate)) => format!("{rate:.2} GB/s   "),
                None => String::new(),
            };
            let share = percent_of_limit.map(|share| format!("{share:.0}%")).unwrap_or_default();
            let row = format!("  {name:<12} {ms:>9.3} {percent:>6.1} {rate:>16} {share:>9}");
            println!("{}", row.trim_end());
        }
        println!("  {:<12} {:>9.3} {:>6.1}", "step", self.mean_ms(), 100.0);
        if let Some(limits) = &self.limits {
            print_limits(limits);
        }
    }
}
