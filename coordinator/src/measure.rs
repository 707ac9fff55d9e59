//! A measured window of a run: how fast it is, and where the time of a step goes on its critical path.

use crate::lock;
use crate::store::{Store, Timers};
use rustix::time::ClockId;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use unisono_common::ids::WorkerId;
use unisono_proto::shm::frame::Spent;

/// A part of a run that is measured; the run ends after it.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Workers that are there before anything counts, at least.
    pub workers: usize,
    /// Steps that come before it, at least.
    pub warm_steps: u64,
    /// Time that comes before it, at least.
    pub warm: Duration,
    /// Steps in it, at least.
    pub steps: u64,
    /// How long it is, at least.
    pub length: Duration,
    /// How long the run goes on after it.
    pub after: Duration,
}

/// Where a step's time went, in milliseconds; together the time from one commit to the next.
///
/// A step's critical worker is the one whose gradient was complete last. What it did ahead of its order counts as its data and
/// forward pass; what lay between two steps meanwhile (reduction, update, waiting, wire) was hidden, and counts for as much less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Phases {
    /// The critical worker gathered its samples.
    pub data: f64,
    pub forward: f64,
    /// Loss and backward pass.
    pub backward: f64,
    /// It made messages of its gradient, as far as that was not hidden behind the backward pass.
    pub encode: f64,
    /// From its order to its last chunk's arrival, without the phases above: orders, weights and gradients on their way.
    pub wire: f64,
    /// From the last chunk's arrival to the commit, as far as gradients were added up. The last addition is a part of the
    /// update's pass: it gets its share of the bytes of that pass' time.
    pub reduce: f64,
    /// ... and as far as the weights were updated.
    pub optimizer: f64,
    /// All that is left.
    pub wait: f64,
}

impl Phases {
    /// Name and milliseconds of each, in the order of a step.
    pub fn each(&self) -> [(&'static str, f64); 8] {
        let &Phases { data, forward, backward, encode, wire, reduce, optimizer, wait } = self;
        [
            ("data", data),
            ("forward", forward),
            ("backward", backward),
            ("encode", encode),
            ("wire", wire),
            ("reduce", reduce),
            ("optimizer", optimizer),
            ("wait", wait),
        ]
    }

    fn from_each(ms: [f64; 8]) -> Phases {
        let [data, forward, backward, encode, wire, reduce, optimizer, wait] = ms;
        Phases { data, forward, backward, encode, wire, reduce, optimizer, wait }
    }

    fn map2(self, other: Phases, f: impl Fn(f64, f64) -> f64) -> Phases {
        let (a, b) = (self.each(), other.each());
        Phases::from_each(std::array::from_fn(|i| f(a[i].1, b[i].1)))
    }
}

/// What a window came to.
#[derive(Clone, Debug)]
pub struct Measured {
    pub steps: u64,
    pub samples: u64,
    /// Its length, from one commit to another.
    pub seconds: f64,
    /// Of each step, from commit to commit, ascending.
    pub step_ms: Vec<f64>,
    pub bytes_pushed: u64,
    pub bytes_pulled: u64,
    /// Means of the steps.
    pub phases: Phases,
    /// Seconds that a step takes to add gradients up, and to update weights: of all threads together, processor time but for
    /// the rows of tables.
    pub reduce_seconds: f64,
    pub optimizer_seconds: f64,
    /// Bytes of gradients that the critical worker encodes in the phase `encode`, a step.
    pub encoded: f64,
    /// Nodes that workers pushed.
    pub nodes: u64,
    /// Seconds that a worker took for one of its partitions, data to encoding: a hundred and one evenly spaced quantiles.
    pub compute_seconds: Vec<f64>,
    /// Of this process, on all its threads.
    pub cpu_seconds: f64,
    /// Each commit of the run, before and after the window as well, and its samples.
    pub commits: Vec<(Instant, u64)>,
    /// When the first node of each worker came, by its name.
    pub firsts: BTreeMap<String, Instant>,
}

/// What is known of a worker in the open step.
#[derive(Clone, Copy)]
struct Track {
    ordered: Instant,
    /// Of its orders.
    partitions: u32,
    /// When the last chunk of its last node came.
    arrived: Option<Instant>,
    /// Of all its nodes.
    spent: Spent,
}

impl Track {
    fn seconds_of_a_partition(&self) -> f32 {
        let Spent { data, forward, backward, encode, .. } = self.spent;
        let nanos = [data, forward, backward, encode].into_iter().fold(0, u64::saturating_add);
        nanos as f32 / 1e9 / self.partitions.max(1) as f32
    }
}

/// Sums that only grow.
#[derive(Clone, Copy, Default)]
struct Totals {
    reduce: Duration,
    optimizer: Duration,
    bytes_pushed: u64,
    bytes_pulled: u64,
    nodes: u64,
    /// Processor time of this process.
    cpu: Duration,
}

impl Totals {
    fn of(store: &Store, nodes: u64) -> Totals {
        let [reduce, optimizer] = store.timers.as_ref().map_or_else(Default::default, Timers::totals);
        let (pushed, pulled) = (&store.bytes_pushed, &store.bytes_pulled);
        let (bytes_pushed, bytes_pulled) = (pushed.load(Ordering::Relaxed), pulled.load(Ordering::Relaxed));
        Totals { reduce, optimizer, bytes_pushed, bytes_pulled, nodes, cpu: cpu_time(PROCESS) }
    }
}

/// Whose processor time is asked for.
pub(crate) const PROCESS: ClockId = ClockId::ProcessCPUTime;
pub(crate) const THREAD: ClockId = ClockId::ThreadCPUTime;

/// Processor time that this process, or this thread of it, has had.
pub(crate) fn cpu_time(of: ClockId) -> Duration {
    let time = rustix::time::clock_gettime(of);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Times of partitions that are kept, at most.
const KEPT: usize = 1 << 18;

#[derive(Default)]
struct State {
    workers: BTreeMap<WorkerId, Track>,
    names: BTreeMap<WorkerId, String>,
    firsts: BTreeMap<String, Instant>,
    commits: Vec<(Instant, u64)>,
    /// Seconds that workers took for a partition.
    partitions: Vec<f32>,
    nodes: u64,
    first: Option<Instant>,
    last: Option<Instant>,
    /// Steps so far, in all.
    steps: u64,
    totals: Totals,
    /// When the window began, and the totals then.
    began: Option<(Instant, Totals)>,
    /// When it ended, and the totals then.
    ended: Option<(Instant, Totals)>,
    samples: u64,
    step_ms: Vec<f64>,
    /// Sums over the window's steps.
    phases: Phases,
    encoded: u64,
}

/// Measures a window.
pub struct Measure {
    window: Window,
    state: Mutex<State>,
}

impl Measure {
    pub(crate) fn new(window: Window) -> Measure {
        Measure { window, state: Mutex::default() }
    }

    /// Whether so few members are too few to begin with: the first would be leased what all are to share.
    pub(crate) fn waits(&self, members: usize) -> bool {
        members < self.window.workers
    }

    /// A worker is a member.
    pub(crate) fn joined(&self, worker: WorkerId, name: &str) {
        lock(&self.state).names.insert(worker, name.into());
    }

    /// A worker is sent its first order of the open step, or another.
    pub(crate) fn ordered(&self, worker: WorkerId, now: Instant, partitions: u32) {
        let track = Track { ordered: now, partitions: 0, arrived: None, spent: Spent::default() };
        lock(&self.state).workers.entry(worker).or_insert(track).partitions += partitions;
    }

    /// The last chunk of a node came.
    pub(crate) fn arrived(&self, worker: WorkerId, now: Instant, spent: Spent) {
        let state = &mut *lock(&self.state);
        state.nodes += 1;
        if let Some(name) = state.names.remove(&worker) {
            state.firsts.entry(name).or_insert(now);
        }
        if let Some(track) = state.workers.get_mut(&worker) {
            track.arrived = Some(now);
            let sum = &mut track.spent;
            sum.data = sum.data.saturating_add(spent.data);
            sum.forward = sum.forward.saturating_add(spent.forward);
            sum.ahead = sum.ahead.saturating_add(spent.ahead);
            sum.backward = sum.backward.saturating_add(spent.backward);
            sum.encode = sum.encode.saturating_add(spent.encode);
            sum.encoded = sum.encoded.saturating_add(spent.encoded);
        }
    }

    /// The open step is committed, with so many members. Gives whether the window has just begun or ended.
    pub(crate) fn commit(&self, now: Instant, samples: u64, members: usize, store: &Store) -> bool {
        let mut state = lock(&self.state);
        let state = &mut *state;
        state.commits.push((now, samples));
        let totals = Totals::of(store, state.nodes);
        let before = std::mem::replace(&mut state.totals, totals);
        let workers = std::mem::take(&mut state.workers);
        let last = state.last.replace(now).unwrap_or(now);
        if state.first.is_none() && members < self.window.workers {
            return false;
        }
        let first = *state.first.get_or_insert(now);
        state.steps += 1;
        let (window, began, ended) = (&self.window, &mut state.began, &mut state.ended);
        match (&began, &ended) {
            (None, _) => {
                if state.steps >= window.warm_steps && now - first >= window.warm {
                    *began = Some((now, totals));
                }
                began.is_some()
            }
            (Some((at, _)), None) => {
                state.samples += samples;
                state.step_ms.push(ms(now - last));
                let adding = (totals.reduce - before.reduce, totals.optimizer - before.optimizer);
                let arrived = || workers.values().filter(|track| track.arrived.is_some());
                let room = KEPT.saturating_sub(state.partitions.len());
                state.partitions.extend(arrived().take(room).map(Track::seconds_of_a_partition));
                let critical = arrived().max_by_key(|t| t.arrived).copied();
                state.phases = state.phases.map2(phases(last, now, critical, adding), |a, b| a + b);
                state.encoded += critical.map_or(0, |track| track.spent.encoded);
                if now - *at >= window.length && state.step_ms.len() as u64 >= window.steps {
                    *ended = Some((now, totals));
                }
                ended.is_some()
            }
            (Some(_), Some(_)) => false,
        }
    }

    /// Whether the window is open.
    pub(crate) fn is_open(&self) -> bool {
        let state = lock(&self.state);
        state.began.is_some() && state.ended.is_none()
    }

    /// Whether the run has gone on long enough after it.
    pub(crate) fn is_over(&self, now: Instant) -> bool {
        lock(&self.state).ended.is_some_and(|(at, _)| now - at >= self.window.after)
    }

    /// What it came to; `None` where it did not end.
    pub(crate) fn measured(&self) -> Option<Measured> {
        let state = lock(&self.state);
        let ((from, before), (to, after)) = state.began.zip(state.ended)?;
        let steps = state.step_ms.len() as f64;
        let each = |time: Duration| time.as_secs_f64() / steps;
        let mut step_ms = state.step_ms.clone();
        step_ms.sort_by(f64::total_cmp);
        let mut partitions = state.partitions.clone();
        partitions.sort_by(f32::total_cmp);
        let quantile = |q: usize| Some(*partitions.get(partitions.len().saturating_sub(1) * q / 100)? as f64);
        Some(Measured {
            steps: state.step_ms.len() as u64,
            samples: state.samples,
            seconds: (to - from).as_secs_f64(),
            step_ms,
            bytes_pushed: after.bytes_pushed - before.bytes_pushed,
            bytes_pulled: after.bytes_pulled - before.bytes_pulled,
            phases: state.phases.map2(Phases::default(), |sum, _| sum / steps),
            reduce_seconds: each(after.reduce - before.reduce),
            optimizer_seconds: each(after.optimizer - before.optimizer),
            encoded: state.encoded as f64 / steps,
            nodes: after.nodes - before.nodes,
            compute_seconds: (0..=100).filter_map(quantile).collect(),
            cpu_seconds: (after.cpu - before.cpu).as_secs_f64(),
            commits: state.commits.clone(),
            firsts: state.firsts.clone(),
        })
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The phases of one step between two commits; what they cannot explain is `wait`. The time after the last chunk is split
/// as the step's time for `adding` up and for updating is.
fn phases(from: Instant, to: Instant, critical: Option<Track>, adding: (Duration, Duration)) -> Phases {
    let whole = ms(to - from);
    let Some((Track { ordered, spent, .. }, arrived)) = critical.and_then(|track| Some((track, track.arrived?))) else {
        return Phases { wait: whole, ..Default::default() };
    };
    let arrived = arrived.min(to);
    let span = ms(arrived.saturating_duration_since(ordered.max(from)));
    let of = |nanos: u64| nanos as f64 / 1e6;
    let all = of(spent.data) + of(spent.forward) + of(spent.backward) + of(spent.encode);
    let busy = (all - of(spent.ahead)).clamp(0.0, span);
    let after = ms(to - arrived);
    let (reducing, updating) = (ms(adding.0), ms(adding.1));
    let share = if updating > 0.0 { reducing / (reducing + updating) } else { 1.0 };
    let mut between = [after, (whole - span - after).max(0.0), span - busy];
    let mut ahead = 0.0;
    for part in &mut between {
        let hidden = (of(spent.ahead) - ahead).clamp(0.0, *part);
        (*part, ahead) = (*part - hidden, ahead + hidden);
    }
    let [after, wait, wire] = between;
    // Of several nodes, one is encoded while the next is computed: together they are not longer than it took.
    let fit = if all > busy + ahead { (busy + ahead) / all } else { 1.0 };
    Phases {
        data: of(spent.data) * fit,
        forward: of(spent.forward) * fit,
        backward: of(spent.backward) * fit,
        encode: of(spent.encode) * fit,
        wire,
        reduce: after * share,
        optimizer: after * (1.0 - share),
        wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_to_the_step_whatever_was_reported() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let track_ahead = |arrived: u64, each: u64, ahead: u64| {
            let (each, ahead) = (each * 1_000_000, ahead * 1_000_000);
            let spent = Spent { data: each, forward: each + ahead, ahead, backward: each, encode: each, encoded: 1 };
            Some(Track { ordered: at(2), partitions: 1, arrived: Some(at(arrived)), spent })
        };
        let track = |arrived, each| track_ahead(arrived, each, 0);
        let adding = (Duration::from_millis(1), Duration::from_millis(3));
        let got = phases(at(0), at(50), track(42, 5), adding);
        let [data, forward, backward, encode] = [5.0; 4];
        let near = |got: Phases, want: Phases| {
            assert!(got.each().iter().zip(want.each()).all(|(a, b)| (a.1 - b.1).abs() < 1e-9), "{got:?}");
        };
        let want = Phases { data, forward, backward, encode, wire: 20.0, reduce: 2.0, optimizer: 6.0, wait: 2.0 };
        near(got, want);
        // What was computed ahead hides others: the update, then what was waited, then the wire.
        let ahead = |ms| phases(at(0), at(50), track_ahead(42, 5, ms), adding);
        near(ahead(4), Phases { forward: 9.0, reduce: 1.0, optimizer: 3.0, ..want });
        near(ahead(9), Phases { forward: 14.0, reduce: 0.0, optimizer: 0.0, wait: 1.0, ..want });
        // Never more than there is: then all of its parts count for as much less.
        let fit = 50.0 / 119.0;
        let [data, backward, encode] = [5.0 * fit; 3];
        near(ahead(99), Phases { data, forward: 104.0 * fit, backward, encode, ..Phases::default() });
        for (arrived, each) in [(42, 5), (42, 1000), (2, 0), (60, 1), (1, 3), (50, u64::MAX >> 40)] {
            for adding in [(Duration::ZERO, Duration::ZERO), adding] {
                for ahead in [0, 1, 7, 1000] {
                    let got = phases(at(0), at(50), track_ahead(arrived, each, ahead), adding);
                    let sum: f64 = got.each().iter().map(|p| p.1).sum();
                    assert!((sum - 50.0).abs() < 1e-9, "{arrived} {each} {ahead}: {sum}");
                }
            }
        }
        assert_eq!(phases(at(0), at(50), None, adding), Phases { wait: 50.0, ..Default::default() });
    }
}
