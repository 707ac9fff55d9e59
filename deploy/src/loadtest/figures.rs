//! What one number of workers came to, and what held it up.

use super::usage::Used;
use crate::simulate::Scaling;
use crate::simulate::trace::Trace;
use serde::Serialize;
use std::time::{Duration, Instant};
use unisono_coordinator::{Measured, Phases, Summary};

/// Parts of something that was seen many times.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Quantiles {
    /// Of at least one value.
    pub fn of(mut values: Vec<f64>) -> Option<Quantiles> {
        values.sort_by(f64::total_cmp);
        let at = |q: f64| values[((values.len() - 1) as f64 * q).round() as usize];
        (!values.is_empty()).then(|| Quantiles { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) })
    }

    /// Of the moments between these points in time: the length of the span that a moment lies in. A stall counts for as long as it
    /// lasts, however few steps there are beside it.
    pub fn of_moments(points: &[Instant]) -> Option<Quantiles> {
        let mut spans: Vec<f64> = points.windows(2).map(|two| ms(two[1] - two[0])).collect();
        spans.sort_by(f64::total_cmp);
        let all: f64 = spans.iter().sum();
        let at = |q: f64| {
            let mut before = 0.0;
            let reached = |span: &&f64| {
                before += **span;
                before >= q * all
            };
            spans.iter().find(reached).or(spans.last()).copied()
        };
        Some(Quantiles { p50: at(0.5)?, p90: at(0.9)?, p99: at(0.99)?, max: at(1.0)? })
    }
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What holds a run up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bottleneck {
    /// There are more workers than partitions.
    Partitions,
    /// The cores of this machine are all busy: with the workers, or with the coordinator.
    WorkersOnThisMachine,
    CoordinatorOnThisMachine,
    /// Workers compute.
    Compute,
    /// Gradients and weights are on their way.
    Wire,
    /// Gradients are added up and weights updated.
    Update,
    /// None of these: orders, and waiting for the slowest worker.
    Waiting,
}

impl Bottleneck {
    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Bottleneck::Partitions => "too few partitions",
            Bottleneck::WorkersOnThisMachine => "this machine's cores, busy with workers",
            Bottleneck::CoordinatorOnThisMachine => "this machine's cores, busy with the coordinator",
            Bottleneck::Compute => "the workers' computing",
            Bottleneck::Wire => "the wire",
            Bottleneck::Update => "sums and updates",
            Bottleneck::Waiting => "waiting",
        }
    }

    fn of(workers: usize, partitions: u32, busy: Busy, phases: Phases) -> Bottleneck {
        if workers > partitions as usize {
            return Bottleneck::Partitions;
        }
        if busy.coordinator + busy.workers >= 0.9 * busy.cores {
            return match busy.coordinator > busy.workers {
                true => Bottleneck::CoordinatorOnThisMachine,
                false => Bottleneck::WorkersOnThisMachine,
            };
        }
        let Phases { data, forward, backward, encode, wire, reduce, optimizer, wait } = phases;
        let each = [
            (Bottleneck::Compute, data + forward + backward),
            (Bottleneck::Wire, encode + wire),
            (Bottleneck::Update, reduce + optimizer),
            (Bottleneck::Waiting, wait),
        ];
        each.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("there are four").0
    }
}

/// Cores that were busy, and how many there are.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Busy {
    pub coordinator: f64,
    pub workers: f64,
    pub cores: f64,
}

/// What happened while workers came and went.
#[derive(Clone, Debug, Serialize)]
pub struct Churn {
    pub samples_per_second: f64,
    pub joins: usize,
    pub leaves: usize,
    /// From when a worker was to start until its first gradient was there; for one that never came, until the end.
    pub join_ms: Option<Quantiles>,
    /// From when a worker was ended until the next step was committed.
    pub leave_ms: Option<Quantiles>,
    /// Of all moments, the length of the step that it lay in.
    pub step_ms: Option<Quantiles>,
}

/// When workers were to start, and when others were ended.
#[derive(Clone, Debug, Default)]
pub struct Moves {
    pub began: Option<Instant>,
    pub starts: Vec<(usize, Instant)>,
    pub stops: Vec<Instant>,
}

impl Churn {
    /// From what was done and what the coordinator saw; `None` where nothing was done.
    pub fn of(moves: &Moves, measured: &Measured) -> Option<Churn> {
        let (began, end) = (moves.began?, measured.commits.last()?.0);
        let before = measured.commits.iter().rposition(|(at, _)| *at <= began).unwrap_or(0);
        let commits = &measured.commits[before..];
        let points: Vec<Instant> = commits.iter().map(|(at, _)| *at).collect();
        let first_of = |number: usize| measured.firsts.get(&super::fleet::name(number)).copied();
        let took = |&(number, at): &(usize, Instant)| ms(first_of(number).unwrap_or(end).saturating_duration_since(at));
        let next =
            |at: &Instant| ms(points.iter().find(|point| *point > at).map_or(Duration::ZERO, |point| *point - *at));
        let seconds = (end - points[0]).as_secs_f64();
        let samples: u64 = commits[1..].iter().map(|(_, samples)| samples).sum();
        Some(Churn {
            samples_per_second: samples as f64 / seconds.max(f64::MIN_POSITIVE),
            joins: moves.starts.len(),
            leaves: moves.stops.len(),
            join_ms: Quantiles::of(moves.starts.iter().filter(|(_, at)| *at < end).map(took).collect()),
            leave_ms: Quantiles::of(moves.stops.iter().filter(|at| **at < end).map(next).collect()),
            step_ms: Quantiles::of_moments(&points),
        })
    }
}

/// What one number of workers came to.
#[derive(Clone, Debug, Serialize)]
pub struct Size {
    pub scaling: &'static str,
    pub workers: usize,
    pub partitions: u32,
    pub steps: u64,
    pub samples_per_second: f64,
    /// Of what so many workers should do by what the fewest did.
    pub efficiency: f64,
    pub step_ms: Quantiles,
    pub bytes_pushed_per_second: f64,
    pub bytes_pulled_per_second: f64,
    pub busy: Busy,
    /// The coordinator's processor time for a worker and step, in microseconds.
    pub coordinator_us: f64,
    /// Of them, what is beyond moving the same bytes through as many streams with nothing behind them; where it was measured.
    pub own_us: Option<f64>,
    pub coordinator_memory_mib: f64,
    /// Milliseconds of a step on its critical path.
    pub phases: Phases,
    pub bottleneck: Bottleneck,
    /// What `simulate` expects, calibrated by the size that says so.
    pub predicted: Option<f64>,
    pub calibrates: bool,
    /// Whether the simulation knows all that such a run does.
    #[serde(skip)]
    pub is_modelled: bool,
    pub churn: Option<Churn>,
    #[serde(skip)]
    pub trace: Trace,
}

impl Size {
    pub fn new(
        scaling: Scaling,
        workers: usize,
        work: String,
        simulated: bool,
        used: Used,
        moves: &Moves,
        summary: &Summary,
        m: &Measured,
    ) -> Size {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get()) as f64;
        let (steps, seconds) = (m.steps as f64, m.seconds);
        let coordinator_us = m.cpu_seconds / steps / workers as f64 * 1e6;
        let busy = Busy { coordinator: m.cpu_seconds / seconds, workers: used.workers_cpu_seconds / seconds, cores };
        let trace = Trace {
            job: summary.job.clone(),
            work,
            transport: summary.transport.clone(),
            workers: workers as u32,
            partitions: summary.partitions,
            simulated,
            cores,
            steps: m.steps,
            step_seconds: seconds / steps,
            samples: m.samples as f64 / steps,
            bytes_pushed: m.bytes_pushed as f64 / steps,
            bytes_pulled: m.bytes_pulled as f64 / steps,
            nodes: m.nodes as f64 / steps,
            compute_seconds: m.compute_seconds.clone(),
            coordinator_cpu_seconds: m.cpu_seconds / steps,
            update_cpu_seconds: m.optimizer_seconds,
            workers_cpu_seconds: used.workers_cpu_seconds / steps,
        };
        Size {
            scaling: scaling.name(),
            workers,
            partitions: summary.partitions,
            steps: m.steps,
            samples_per_second: m.samples as f64 / seconds,
            efficiency: 1.0,
            step_ms: Quantiles::of(m.step_ms.clone()).expect("a window has a step"),
            bytes_pushed_per_second: m.bytes_pushed as f64 / seconds,
            bytes_pulled_per_second: m.bytes_pulled as f64 / seconds,
            busy,
            coordinator_us,
            own_us: None,
            coordinator_memory_mib: used.memory_mib,
            phases: m.phases,
            bottleneck: Bottleneck::of(workers, summary.partitions, busy, m.phases),
            predicted: None,
            calibrates: false,
            is_modelled: true,
            churn: Churn::of(moves, m),
            trace,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_counts_for_as_long_as_it_lasts() {
        let start = Instant::now();
        // A hundred steps of 10 ms, then one of a second: half of all moments lie in it.
        let mut points: Vec<Instant> = (0..=100).map(|i| start + Duration::from_millis(10 * i)).collect();
        points.push(start + Duration::from_millis(2000));
        let moments = Quantiles::of_moments(&points).expect("some");
        assert!((moments.p50 - 10.0).abs() < 1e-9 && (moments.p90 - 1000.0).abs() < 1e-9, "{moments:?}");
        let steps = Quantiles::of(points.windows(2).map(|two| ms(two[1] - two[0])).collect()).expect("some");
        assert!((steps.p99 - 10.0).abs() < 1e-9 && (steps.max - 1000.0).abs() < 1e-9, "{steps:?}");
        assert!(Quantiles::of_moments(&points[..1]).is_none() && Quantiles::of(vec![]).is_none());
    }

    #[test]
    fn what_holds_a_run_up_has_a_name() {
        let phases = Phases { forward: 3.0, wire: 5.0, wait: 4.0, ..Default::default() };
        let idle = Busy { coordinator: 0.2, workers: 0.5, cores: 2.0 };
        let of = |workers, busy, phases| Bottleneck::of(workers, 8, busy, phases);
        assert_eq!(of(9, idle, phases), Bottleneck::Partitions);
        assert_eq!(of(8, idle, phases), Bottleneck::Wire);
        assert_eq!(of(8, idle, Phases { backward: 3.0, ..phases }), Bottleneck::Compute);
        assert_eq!(of(8, idle, Phases { optimizer: 9.0, ..phases }), Bottleneck::Update);
        assert_eq!(of(8, Busy { workers: 1.7, ..idle }, phases), Bottleneck::WorkersOnThisMachine);
        assert_eq!(of(8, Busy { coordinator: 1.4, ..idle }, phases), Bottleneck::CoordinatorOnThisMachine);
    }
}
