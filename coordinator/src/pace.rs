//! How fast a run goes: the times of its steps, and samples a second.

use std::time::Instant;

/// Steps that the current rate is taken over.
const RECENT: usize = 50;

/// The times of a run's steps.
pub(crate) struct Pace {
    /// Steps at the beginning that are left out of the rate: 5% of all.
    warmup: usize,
    first: Option<Instant>,
    opened: Instant,
    last: Instant,
    /// When the rate's first step began, and the samples before it.
    warm: Option<(Instant, u64)>,
    samples: u64,
    step_ms: Vec<f32>,
    /// Milliseconds and samples of the last steps, in a ring.
    recent: [(f32, u64); RECENT],
}

impl Pace {
    /// For a run of `steps` steps, of which the first opens at `now`.
    pub fn new(now: Instant, steps: u64) -> Pace {
        Pace {
            warmup: steps.div_ceil(20) as usize,
            first: None,
            opened: now,
            last: now,
            warm: None,
            samples: 0,
            step_ms: Vec::new(),
            recent: [(0.0, 0); RECENT],
        }
    }

    /// A step opens.
    pub fn open(&mut self, now: Instant) {
        self.opened = now;
    }

    /// There are workers again: what the open step has waited for them is not its own time.
    pub fn begin(&mut self, now: Instant) {
        self.opened = now;
        self.first.get_or_insert(now);
    }

    /// The open step is committed.
    pub fn commit(&mut self, now: Instant, samples: u64) {
        let ms = (now - self.opened).as_secs_f32() * 1e3;
        self.recent[self.step_ms.len() % RECENT] = (ms, samples);
        self.step_ms.push(ms);
        self.samples += samples;
        self.last = now;
        if self.step_ms.len() == self.warmup {
            self.warm = Some((now, self.samples));
        }
    }

    /// Samples a second of the last steps.
    pub fn recent(&self) -> f64 {
        let ms: f32 = self.recent.iter().map(|r| r.0).sum();
        let samples: u64 = self.recent.iter().map(|r| r.1).sum();
        samples as f64 / (ms as f64 / 1e3).max(f64::MIN_POSITIVE)
    }

    /// Samples a second from the first step that counts to the last commit, evaluations and checkpoints included.
    pub fn rate(&self) -> Option<f64> {
        let counted = self.warm.filter(|(at, _)| *at < self.last).or(self.first.map(|at| (at, 0)));
        let (at, before) = counted.filter(|_| !self.step_ms.is_empty())?;
        Some((self.samples - before) as f64 / (self.last - at).as_secs_f64().max(f64::MIN_POSITIVE))
    }

    /// Seconds from the first step's start to the last commit.
    pub fn train_seconds(&self) -> f64 {
        self.first.map_or(0.0, |first| self.last.saturating_duration_since(first).as_secs_f64())
    }

    /// Whether no step has been committed yet.
    pub fn is_new(&self) -> bool {
        self.step_ms.is_empty()
    }

    /// The `q`-th quantile of the steps' milliseconds, 0 <= q <= 1; `None` before the first. It sorts them all.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let mut sorted = self.step_ms.clone();
        sorted.sort_by(f32::total_cmp);
        let at = (sorted.len().saturating_sub(1) as f64 * q).round() as usize;
        sorted.get(at).map(|ms| *ms as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn waiting_for_workers_and_the_first_steps_do_not_count() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::new(start, 40);
        assert_eq!((pace.rate(), pace.train_seconds(), pace.quantile(0.5)), (None, 0.0, None));
        assert!(pace.is_new());
        // Workers come after 500 ms; two slow steps, then 38 of 10 ms, each of them after a pause of 10 ms.
        pace.begin(at(500));
        pace.commit(at(800), 6);
        let is = |got: Option<f64>, want: f64| assert!((got.expect("some") - want).abs() < 1e-3, "{got:?} {want}");
        is(pace.rate(), 20.0); // nothing counts yet but the first steps
        pace.open(at(800));
        pace.commit(at(1000), 6);
        for step in 0..38 {
            pace.open(at(1010 + step * 20));
            pace.commit(at(1020 + step * 20), 6);
        }
        is(pace.rate(), 300.0);
        is(Some(pace.train_seconds()), 1.26);
        assert!(!pace.is_new());
        is(pace.quantile(0.5), 10.0);
        is(pace.quantile(1.0), 300.0);
        assert!((pace.recent() - 240.0 / 0.88).abs() < 1e-2, "{}", pace.recent());
    }
}
