//! Row-wise optimizers: an update looks at one row of one table, and at its own state beside it. A row that a step does not touch
//! stays as it is.

use super::RowLayout;
use crate::job;
use crate::kernels;
use std::ops::Range;

/// A tables' optimizer, in rows that hold a model's tables: a row's values, then its state, table by table.
#[derive(Clone, Debug)]
pub struct RowOptimizer {
    kind: job::RowOptimizer,
    /// For each table the places of its values and of its state.
    parts: Vec<(Range<usize>, Range<usize>)>,
    /// Values, and values and state.
    width: usize,
    len: usize,
}

/// What it does in one step.
#[derive(Clone, Copy)]
pub struct RowUpdate<'a> {
    optimizer: &'a RowOptimizer,
    lr: f32,
    /// Adam's, with both of its corrections.
    corrected: f32,
}

impl RowOptimizer {
    /// The optimizer that a job describes, for rows of `layout`.
    pub fn new(kind: &job::RowOptimizer, layout: &RowLayout) -> RowOptimizer {
        let width = layout.width();
        let mut len = width;
        let mut parts = Vec::new();
        for (table, start) in layout.tables() {
            let state: usize = kind.slots(table.width).iter().map(|(_, len)| len).sum();
            parts.push((start..start + table.width, len..len + state));
            len += state;
        }
        RowOptimizer { kind: kind.clone(), parts, width, len }
    }

    /// Values of a row and its state together.
    pub fn row_len(&self) -> usize {
        self.len
    }

    /// Values of a row's state.
    pub fn state_len(&self) -> usize {
        self.len - self.width
    }

    /// What is remembered of each row: names, and where it lies in a row.
    pub fn state(&self, layout: &RowLayout) -> Vec<(String, Range<usize>)> {
        let mut all = Vec::new();
        for ((table, _), (_, state)) in layout.tables().zip(&self.parts) {
            let mut start = state.start;
            for (name, len) in self.kind.slots(table.width) {
                all.push((format!("{}.{name}", table.name), start..start + len));
                start += len;
            }
        }
        all
    }

    /// The base learning rate.
    pub fn lr(&self) -> f32 {
        match self.kind {
            job::RowOptimizer::Sgd { lr }
            | job::RowOptimizer::Adagrad { lr, .. }
            | job::RowOptimizer::RowAdagrad { lr, .. }
            | job::RowOptimizer::LazyAdam { lr, .. }
            | job::RowOptimizer::Ftrl { lr, .. } => lr,
        }
    }

    /// The first state of a row with these values.
    pub fn first_state(&self, values: &[f32], state: &mut [f32]) {
        match self.kind {
            job::RowOptimizer::Adagrad { initial_accumulator, .. }
            | job::RowOptimizer::RowAdagrad { initial_accumulator, .. } => state.fill(initial_accumulator),
            job::RowOptimizer::Sgd { .. } | job::RowOptimizer::LazyAdam { .. } => state.fill(0.0),
            // What the paper's weights would be these values by: it begins with weights of 0.
            job::RowOptimizer::Ftrl { lr, beta, l1, l2 } => {
                state.fill(0.0);
                for (at, of_state) in &self.parts {
                    let zs = &mut state[of_state.start - self.width..][..at.len()];
                    for (z, w) in zs.iter_mut().zip(&values[at.clone()]) {
                        *z = if *w == 0.0 { 0.0 } else { -(w * (beta / lr + l2) + l1.copysign(*w)) };
                    }
                }
            }
        }
    }

    /// What it does in `step`, which counts from 1.
    pub fn at(&self, step: u64, lr: f32) -> RowUpdate<'_> {
        let mut corrected = lr;
        if let job::RowOptimizer::LazyAdam { beta1, beta2, .. } = self.kind {
            let correction = |beta: f32| 1.0 - libm::pow(beta as f64, step as f64);
            corrected = (lr as f64 * libm::sqrt(correction(beta2)) / correction(beta1)) as f32;
        }
        RowUpdate { optimizer: self, lr, corrected }
    }
}

impl RowUpdate<'_> {
    /// Changes a row and its state by its mean gradient; false where a value or the gradient is not finite.
    #[inline(always)]
    pub fn run(&self, gradient: &[f32], values: &mut [f32], states: &mut [f32]) -> bool {
        let RowOptimizer { kind, parts, width, .. } = self.optimizer;
        for (at, state) in parts {
            let state = &mut states[state.start - width..state.end - width];
            self.one(kind, &gradient[at.clone()], &mut values[at.clone()], state);
        }
        // Weights may be finite where what follows from their state is not any more.
        kernels::finite(gradient) & kernels::finite(values) & kernels::finite(states)
    }

    #[inline(always)]
    fn one(&self, kind: &job::RowOptimizer, g: &[f32], w: &mut [f32], state: &mut [f32]) {
        let lr = self.lr;
        match *kind {
            job::RowOptimizer::Sgd { .. } => w.iter_mut().zip(g).for_each(|(w, g)| *w -= lr * g),
            // PyTorch's Adagrad on sparse gradients.
            job::RowOptimizer::Adagrad { eps, .. } => {
                for ((w, g), sum) in w.iter_mut().zip(g).zip(state) {
                    *sum += g * g;
                    *w -= lr * g / (sum.sqrt() + eps);
                }
            }
            // One accumulator a row: the mean of its squares (Mudigere et al., 2022, section 4.1.1).
            job::RowOptimizer::RowAdagrad { eps, .. } => {
                let square = g.iter().fold(0.0, |sum, g| sum + g * g) / g.len() as f32;
                state[0] += square;
                let rate = lr / (state[0].sqrt() + eps);
                w.iter_mut().zip(g).for_each(|(w, g)| *w -= rate * g);
            }
            // PyTorch's SparseAdam: moments of untouched rows stay, the corrections go by the run's steps.
            job::RowOptimizer::LazyAdam { beta1, beta2, eps, .. } => {
                let (first, second) = state.split_at_mut(w.len());
                for ((w, g), (m, v)) in w.iter_mut().zip(g).zip(first.iter_mut().zip(second)) {
                    *m += (1.0 - beta1) * (g - *m);
                    *v += (1.0 - beta2) * (g * g - *v);
                    *w -= self.corrected * *m / (v.sqrt() + eps);
                }
            }
            // McMahan et al., "Ad Click Prediction: a View from the Trenches", 2013, algorithm 1.
            job::RowOptimizer::Ftrl { beta, l1, l2, .. } => {
                let (zs, ns) = state.split_at_mut(w.len());
                for ((w, g), (z, n)) in w.iter_mut().zip(g).zip(zs.iter_mut().zip(ns)) {
                    let root = n.sqrt();
                    *n += g * g;
                    let sigma = (n.sqrt() - root) / lr;
                    *z += g - sigma * *w;
                    let beyond = (z.abs() - l1).max(0.0);
                    // Not by what may be 0 itself.
                    *w = if beyond == 0.0 { 0.0 } else { -beyond.copysign(*z) / ((beta + n.sqrt()) / lr + l2) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Init;
    use crate::rows::Table;

    fn all() -> Vec<job::RowOptimizer> {
        vec![
            job::RowOptimizer::Sgd { lr: 0.1 },
            job::RowOptimizer::Adagrad { lr: 1.0, eps: 1e-10, initial_accumulator: 0.0 },
            job::RowOptimizer::RowAdagrad { lr: 1.0, eps: 1e-10, initial_accumulator: 0.1 },
            job::RowOptimizer::LazyAdam { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8 },
            job::RowOptimizer::Ftrl { lr: 1.0, beta: 1.0, l1: 0.0, l2: 0.0 },
        ]
    }

    #[test]
    fn every_optimizer_finds_a_minimum_and_tables_do_not_mix() {
        let table = |name: &str, width| Table { name: name.into(), width, init: Init::Constant(0.5) };
        let both = RowLayout::new(vec![table("a", 1), table("b", 5)]);
        for kind in all() {
            let run = |layout: &RowLayout, goals: &[f32]| {
                let optimizer = RowOptimizer::new(&kind, layout);
                let mut row = vec![f32::NAN; optimizer.row_len()];
                layout.first(1).fill(3, &mut row[..layout.width()]);
                let (values, state) = row.split_at_mut(layout.width());
                optimizer.first_state(values, state);
                for step in 1..=800 {
                    let g: Vec<f32> = values.iter().zip(goals).map(|(w, goal)| 2.0 * (w - goal)).collect();
                    assert!(optimizer.at(step, optimizer.lr()).run(&g, values, state), "{kind:?}");
                }
                values.to_vec()
            };
            let goals = [3.0, -1.0, 0.0, 2.0, 1.0, 0.5];
            let rows = run(&both, &goals);
            assert!(rows.iter().zip(goals).all(|(w, goal)| (w - goal).abs() < 0.1), "{kind:?}: {rows:?}");
            let apart = [
                run(&RowLayout::new(vec![table("a", 1)]), &goals[..1]),
                run(&RowLayout::new(vec![table("b", 5)]), &goals[1..]),
            ];
            assert_eq!(apart.concat(), rows, "{kind:?}");
        }
    }

    /// Whatever a row is at first, and also where nothing but its gradient could divide: without one it stays as it is.
    #[test]
    fn ftrl_begins_with_a_rows_first_values() {
        let layout = RowLayout::new(vec![Table { name: "a".into(), width: 4, init: Init::Constant(0.0) }]);
        let first = [0.5f32, -0.25, 0.0, 1e-3];
        for (beta, l1, l2) in [(1.0, 0.0, 0.0), (1.0, 0.01, 0.1), (0.5, 2.0, 0.0), (0.0, 0.0, 1.0)] {
            let optimizer = RowOptimizer::new(&job::RowOptimizer::Ftrl { lr: 0.1, beta, l1, l2 }, &layout);
            let (mut values, mut state) = (first, [f32::NAN; 8]);
            optimizer.first_state(&values, &mut state);
            assert!(optimizer.at(1, 0.1).run(&[0.0; 4], &mut values, &mut state));
            let near = values.iter().zip(first).all(|(w, first)| (w - first).abs() <= 1e-6);
            assert!(near, "{values:?} with beta {beta}, l1 {l1}, l2 {l2}");
        }
        let optimizer = RowOptimizer::new(&job::RowOptimizer::Ftrl { lr: 0.1, beta: 0.0, l1: 0.0, l2: 0.0 }, &layout);
        let (mut values, mut state) = ([0.0; 4], [f32::NAN; 8]);
        optimizer.first_state(&values, &mut state);
        assert!(optimizer.at(1, 0.1).run(&[0.0; 4], &mut values, &mut state) && values == [0.0; 4]);
    }

    #[test]
    fn what_is_not_finite_is_noticed() {
        let layout = RowLayout::new(vec![Table { name: "a".into(), width: 3, init: Init::Constant(0.5) }]);
        for kind in all() {
            let optimizer = RowOptimizer::new(&kind, &layout);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut row = vec![0.5; optimizer.row_len()];
                let (values, state) = row.split_at_mut(3);
                optimizer.first_state(values, state);
                assert!(!optimizer.at(1, 0.1).run(&[0.0, bad, 1.0], values, state), "{kind:?}: {bad}");
            }
        }
    }
}
