//! Learning-rate schedules: the factor on the base rate is a pure function of the step.

use crate::job::{EarlyStopping, Schedule, ScheduleKind};
use serde::{Deserialize, Serialize};

/// The factor on the base learning rate at `step` (from 0) of `total` steps.
///
/// Warm-up rises linearly from `1 / warmup_steps`; the main schedule runs over the steps after it, as PyTorch's scheduler
/// of the same name does when it is stepped once a step.
pub fn factor(schedule: &Schedule, step: u64, total: u64) -> f64 {
    let warmup = schedule.warmup_steps;
    if step < warmup {
        return (step + 1) as f64 / warmup as f64;
    }
    let t = step - warmup;
    let span = total.saturating_sub(warmup).max(1) as f64;
    let done = (t as f64 / span).min(1.0);
    match &schedule.kind {
        ScheduleKind::Constant | ScheduleKind::Plateau { .. } => 1.0,
        ScheduleKind::Step { every, gamma } => libm::pow(*gamma, (t / every) as f64),
        ScheduleKind::MultiStep { milestones, gamma } => {
            libm::pow(*gamma, milestones.iter().filter(|&&m| m <= t).count() as f64)
        }
        ScheduleKind::Exponential { gamma } => libm::pow(*gamma, t as f64),
        ScheduleKind::Cosine { min_factor } => cosine(1.0, *min_factor, done),
        ScheduleKind::Linear { end_factor } => 1.0 + (end_factor - 1.0) * done,
        ScheduleKind::Polynomial { power, end_factor } => {
            end_factor + (1.0 - end_factor) * libm::pow(1.0 - done, *power)
        }
        ScheduleKind::OneCycle { start_fraction, div_factor, final_div_factor } => {
            let (first, last) = (1.0 / div_factor, 1.0 / (div_factor * final_div_factor));
            let up = start_fraction * span - 1.0;
            let t = t as f64;
            if t < up {
                cosine(first, 1.0, t / up)
            } else {
                cosine(1.0, last, ((t - up) / (span - 1.0 - up).max(f64::MIN_POSITIVE)).min(1.0))
            }
        }
        ScheduleKind::InverseSqrt => {
            let scale = warmup.max(1) as f64;
            libm::sqrt(scale / (step + 1) as f64).min(1.0)
        }
    }
}

/// From `a` to `b` along half a cosine.
fn cosine(a: f64, b: f64, done: f64) -> f64 {
    b + (a - b) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * done))
}

/// What reducing on a plateau remembers (PyTorch's ReduceLROnPlateau, relative threshold).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlateauState {
    pub factor: f64,
    pub best: Option<f64>,
    pub bad: u64,
}

impl Default for PlateauState {
    fn default() -> Self {
        PlateauState { factor: 1.0, best: None, bad: 0 }
    }
}

impl PlateauState {
    /// Takes one evaluation's metric.
    pub fn observe(&mut self, kind: &ScheduleKind, value: f64) {
        let ScheduleKind::Plateau { factor, patience, threshold, metric } = kind else { return };
        let better = match self.best {
            None => true,
            Some(best) if metric.maximize() => value > best * (1.0 + threshold),
            Some(best) => value < best * (1.0 - threshold),
        };
        if better {
            self.best = Some(value);
            self.bad = 0;
        } else {
            self.bad += 1;
            if self.bad > *patience {
                self.factor *= factor;
                self.bad = 0;
            }
        }
    }
}

/// What early stopping remembers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EarlyState {
    pub best: Option<f64>,
    pub bad: u64,
}

impl EarlyState {
    /// Takes one evaluation's metric; true when the run should end.
    pub fn observe(&mut self, early: &EarlyStopping, value: f64) -> bool {
        let better = match self.best {
            None => true,
            Some(best) if early.metric.maximize() => value > best + early.min_delta,
            Some(best) => value < best - early.min_delta,
        };
        if better {
            self.best = Some(value);
            self.bad = 0;
        } else {
            self.bad += 1;
        }
        self.is_over(early)
    }

    /// Whether the run should have ended.
    pub fn is_over(&self, early: &EarlyStopping) -> bool {
        self.bad > early.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Metric;

    fn at(kind: ScheduleKind, warmup_steps: u64, step: u64) -> f64 {
        factor(&Schedule { kind, warmup_steps }, step, 110)
    }

    #[test]
    fn schedules_pass_through_their_known_points() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(at(ScheduleKind::Constant, 10, 0), 0.1);
        close(at(ScheduleKind::Constant, 10, 9), 1.0);
        close(at(ScheduleKind::Cosine { min_factor: 0.1 }, 10, 10), 1.0);
        close(at(ScheduleKind::Cosine { min_factor: 0.1 }, 10, 60), 0.55);
        close(at(ScheduleKind::Cosine { min_factor: 0.1 }, 10, 110), 0.1);
        close(at(ScheduleKind::Step { every: 30, gamma: 0.5 }, 0, 29), 1.0);
        close(at(ScheduleKind::Step { every: 30, gamma: 0.5 }, 0, 60), 0.25);
        close(at(ScheduleKind::MultiStep { milestones: vec![10, 20], gamma: 0.1 }, 0, 20), 0.01);
        close(at(ScheduleKind::Linear { end_factor: 0.0 }, 0, 55), 0.5);
        close(at(ScheduleKind::Polynomial { power: 2.0, end_factor: 0.0 }, 0, 55), 0.25);
        let one = ScheduleKind::OneCycle { start_fraction: 0.3, div_factor: 25.0, final_div_factor: 1e4 };
        close(at(one.clone(), 0, 0), 1.0 / 25.0);
        close(at(one.clone(), 0, 32), 1.0);
        close(at(one, 0, 109), 1.0 / 25e4);
        close(at(ScheduleKind::InverseSqrt, 16, 63), 0.5);
    }

    #[test]
    fn no_schedule_gives_a_rate_that_is_none() {
        for total in 1..20 {
            for start_fraction in [0.01, 0.1, 0.5, 0.99] {
                let kind = ScheduleKind::OneCycle { start_fraction, div_factor: 25.0, final_div_factor: 1e4 };
                for warmup_steps in [0, 3] {
                    let schedule = Schedule { kind: kind.clone(), warmup_steps };
                    let factors = (0..total + 2).map(|step| factor(&schedule, step, total));
                    assert!(factors.into_iter().all(|f| f > 0.0 && f <= 1.0), "{schedule:?} {total}");
                }
            }
        }
    }

    #[test]
    fn a_plateau_lowers_the_rate_after_its_patience() {
        let kind = ScheduleKind::Plateau { factor: 0.5, patience: 1, threshold: 0.0, metric: Metric::Loss };
        let mut state = PlateauState::default();
        for (value, factor) in [(1.0, 1.0), (1.0, 1.0), (1.0, 0.5), (0.5, 0.5), (0.6, 0.5), (0.6, 0.25)] {
            state.observe(&kind, value);
            assert_eq!(state.factor, factor);
        }
    }
}
