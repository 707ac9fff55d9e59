//! Losses on logits, in stable form. Sums and their denominators travel; division happens once, where the tree ends.

use crate::data::Targets;
use crate::extend::{self, Target, TargetLoss};
use crate::job;
use crate::kernels::{LANES, largest, math, vectorized};
use ndarray::ArrayView2;
use std::ops::Range;
use std::sync::Arc;

/// The numerator and denominator of a mean loss, and the samples behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSums {
    pub loss: f64,
    /// What PyTorch's `reduction="mean"` divides by.
    pub weight: f64,
    pub samples: u64,
}

impl std::ops::Add for LossSums {
    type Output = LossSums;

    fn add(self, other: LossSums) -> LossSums {
        LossSums {
            loss: self.loss + other.loss,
            weight: self.weight + other.weight,
            samples: self.samples + other.samples,
        }
    }
}

/// Why a loss does not fit its model or data.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LossError {
    #[error(
        "train.loss.class_weights has {got} entries, the data has {want} classes; write one for each, in their order"
    )]
    ClassWeights { got: usize, want: usize },
    #[error("train.loss \"{loss}\" needs {need}, the model has {outputs} outputs")]
    Outputs { loss: &'static str, need: &'static str, outputs: usize },
    #[error("train.loss \"{loss}\" needs {need}; choose another loss, or data.task")]
    Targets { loss: &'static str, need: &'static str },
    #[error(
        "train.loss \"{loss}\" is for values or two classes, the data has more classes; use \"cross-entropy\", or data.task = \"regression\""
    )]
    OneOutput { loss: &'static str },
    #[error("train.loss {kind:?}: {why}")]
    Added { kind: String, why: String },
    #[error("sample {sample} has class {class}, but the model has {classes} classes")]
    Class { sample: usize, class: u32, classes: usize },
}

/// A loss over `outputs` logits a target; where a sample has one target, targets are samples.
#[derive(Clone)]
pub struct Loss {
    kind: job::Loss,
    outputs: usize,
    /// The one that the program has added.
    added: Option<Arc<dyn TargetLoss>>,
}

impl Loss {
    /// Checks that the loss fits a model with `outputs` outputs.
    pub fn new(kind: &job::Loss, outputs: usize) -> Result<Loss, LossError> {
        let classes = if outputs == 1 { 2 } else { outputs };
        match kind {
            job::Loss::CrossEntropy { .. } if outputs < 2 => {
                return Err(LossError::Outputs { loss: "cross-entropy", need: "2 or more", outputs });
            }
            job::Loss::BinaryCrossEntropy { .. } if outputs != 1 => {
                return Err(LossError::Outputs { loss: "binary-cross-entropy", need: "exactly 1", outputs });
            }
            job::Loss::Bpr if outputs != 1 => {
                return Err(LossError::Outputs { loss: "bpr", need: "exactly 1", outputs });
            }
            _ => {}
        }
        if let Some(weights) = class_weights(kind).filter(|weights| weights.len() != classes) {
            return Err(LossError::ClassWeights { got: weights.len(), want: classes });
        }
        let added = match kind {
            job::Loss::Added { name, options } => {
                Some(extend::loss(name, options).map_err(|why| LossError::Added { kind: name.clone(), why })?)
            }
            _ => None,
        };
        Ok(Loss { kind: kind.clone(), outputs, added })
    }

    fn name(&self) -> &'static str {
        match self.kind {
            job::Loss::Added { .. } => "added",
            job::Loss::CrossEntropy { .. } => "cross-entropy",
            job::Loss::BinaryCrossEntropy { .. } => "binary-cross-entropy",
            job::Loss::Mse => "mse",
            job::Loss::Mae => "mae",
            job::Loss::Huber { .. } => "huber",
            job::Loss::Hinge { .. } => "hinge",
            job::Loss::Focal { .. } => "focal",
            job::Loss::Bpr => "bpr",
        }
    }

    /// Checks that every target is one that the loss can take.
    pub fn check_targets(&self, targets: &Targets) -> Result<(), LossError> {
        if let (job::Loss::Added { name, .. }, Some(loss)) = (&self.kind, &self.added) {
            return loss.check(targets).map_err(|why| LossError::Added { kind: name.clone(), why });
        }
        let classes = if self.outputs == 1 { 2 } else { self.outputs };
        match (targets, &self.kind) {
            (Targets::Seen(_), job::Loss::Bpr | job::Loss::BinaryCrossEntropy { .. }) => Ok(()),
            (Targets::Seen(_), _) => Err(LossError::Targets { loss: self.name(), need: "no data.implicit" }),
            (_, job::Loss::Bpr) => Err(LossError::Targets { loss: self.name(), need: "data.implicit" }),
            (Targets::Class(_), job::Loss::Mse | job::Loss::Mae | job::Loss::Huber { .. }) => {
                Err(LossError::Targets { loss: self.name(), need: "values as targets, the data has classes" })
            }
            (Targets::Class(labels), _) => match labels.iter().position(|&c| c as usize >= classes) {
                Some(_) if self.outputs == 1 => Err(LossError::OneOutput { loss: self.name() }),
                Some(sample) => Err(LossError::Class { sample, class: labels[sample], classes }),
                None => Ok(()),
            },
            (Targets::Value(_), job::Loss::CrossEntropy { .. } | job::Loss::Hinge { .. } | job::Loss::Focal { .. }) => {
                Err(LossError::Targets { loss: self.name(), need: "classes as targets" })
            }
            (Targets::Value(v), job::Loss::BinaryCrossEntropy { .. }) => {
                if v.iter().all(|z| (0.0..=1.0).contains(z)) {
                    Ok(())
                } else {
                    Err(LossError::Targets { loss: self.name(), need: "targets between 0 and 1" })
                }
            }
            (Targets::Value(_), _) => Ok(()),
            (Targets::Next, job::Loss::CrossEntropy { .. }) => Ok(()),
            (Targets::Next, _) => {
                Err(LossError::Targets { loss: self.name(), need: "one target a sample, not the next token of each" })
            }
        }
    }

    /// Loss sums of `rows`, and the gradient of the **sum** with respect to their logits.
    ///
    /// `logits` and `d_logits` are `(targets, outputs)`; other rows are not touched. Each target counts `weights` times, once where
    /// there are none.
    pub fn forward_backward(
        &self,
        logits: &[f32],
        targets: &Targets,
        weights: &[f32],
        rows: Range<usize>,
        d_logits: &mut [f32],
    ) -> LossSums {
        let n = self.outputs;
        let mut sums = LossSums { samples: rows.len() as u64, ..Default::default() };
        let values = rows.start * n..rows.end * n;
        let (x, d) = (&logits[values.clone()], &mut d_logits[values]);
        let weights = if weights.is_empty() { &[] } else { &weights[rows.clone()] };
        if let (job::Loss::CrossEntropy { label_smoothing, class_weights }, Targets::Class(labels)) =
            (&self.kind, targets)
        {
            let smoothing = *label_smoothing as f64;
            let loss = CrossEntropy { classes: n, weights: class_weights.as_deref(), smoothing };
            loss.rows(x, &labels[rows], weights, d, &mut sums);
            return sums;
        }
        // Of what users take, each counts once.
        if let (job::Loss::Bpr, Targets::Value(chosen)) = (&self.kind, targets) {
            bpr(x, &chosen[rows], d, &mut sums);
            return sums;
        }
        let classes = class_weights(&self.kind);
        for (i, (x, d)) in x.chunks_exact(n).zip(d.chunks_exact_mut(n)).enumerate() {
            let (loss, weight) = self.row(x, targets, rows.start + i, d);
            let of_class = match (classes, targets) {
                (Some(classes), Targets::Class(labels)) => classes[labels[rows.start + i] as usize],
                _ => 1.0,
            };
            let times = of_class * weights.get(i).unwrap_or(&1.0);
            if times != 1.0 {
                d.iter_mut().for_each(|d| *d *= times);
            }
            sums.loss += loss * times as f64;
            sums.weight += weight * times as f64;
        }
        sums
    }

    /// The loss without smoothing and weights, where it has them: the surprise, in nats.
    pub fn plain(&self) -> Option<Loss> {
        match &self.kind {
            job::Loss::CrossEntropy { label_smoothing, class_weights } => {
                let plain = *label_smoothing == 0.0 && class_weights.is_none();
                let kind = job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None };
                (!plain).then_some(Loss { kind, outputs: self.outputs, added: None })
            }
            _ => None,
        }
    }

    /// Loss sums of `logits`, `(targets, outputs)`, with weights as above.
    pub fn forward(&self, logits: ArrayView2<'_, f32>, targets: &Targets, weights: &[f32]) -> LossSums {
        let (rows, logits) = (logits.nrows(), logits.as_standard_layout());
        let mut d_logits = vec![0.0; logits.len()];
        let logits = logits.as_slice().unwrap_or_default(); // in standard layout: always there
        self.forward_backward(logits, targets, weights, 0..rows, &mut d_logits)
    }

    /// One sample: its loss and weight, and the gradient into `d`.
    fn row(&self, x: &[f32], targets: &Targets, row: usize, d: &mut [f32]) -> (f64, f64) {
        let value = |_: usize| match targets {
            Targets::Class(c) => c[row] as f32,
            Targets::Value(v) => v[row],
            Targets::Next => panic!("a batch has classes instead"),
            Targets::Seen(_) => panic!("a batch has values instead"),
        };
        let class = || value(0) as usize;
        let each = |d: &mut [f32], f: &dyn Fn(f32) -> (f64, f32)| {
            let mut loss = 0.0;
            for (i, (d, &x)) in d.iter_mut().zip(x).enumerate() {
                let (l, g) = f(x - value(i));
                loss += l;
                *d = g;
            }
            (loss, x.len() as f64)
        };
        match &self.kind {
            job::Loss::Added { .. } => {
                let target = match targets {
                    Targets::Class(c) => Target::Class(c[row]),
                    Targets::Value(_) | Targets::Next | Targets::Seen(_) => Target::Value(value(0)),
                };
                (self.added.as_ref().expect("Loss::new has built it").value(x, target, d), 1.0)
            }
            job::Loss::CrossEntropy { .. } => panic!("Loss::check_targets asks for classes"),
            job::Loss::Bpr => panic!("a batch of implicit feedback has values"),
            job::Loss::BinaryCrossEntropy { positive_weight } => {
                // PyTorch's binary_cross_entropy_with_logits: (1-z) x + (1 + (p-1) z) log(1 + e^-x), stable for any x.
                let (x, z, p) = (x[0] as f64, value(0) as f64, *positive_weight as f64);
                let soft = libm::log1p(libm::exp(-x.abs())) + (-x).max(0.0);
                let sigmoid = 1.0 / (1.0 + libm::exp(-x));
                let scale = 1.0 + (p - 1.0) * z;
                d[0] = ((1.0 - z) + scale * (sigmoid - 1.0)) as f32;
                ((1.0 - z) * x + scale * soft, 1.0)
            }
            job::Loss::Mse => each(d, &|e| (e as f64 * e as f64, 2.0 * e)),
            job::Loss::Mae => each(d, &|e| (e.abs() as f64, if e == 0.0 { 0.0 } else { e.signum() })),
            job::Loss::Huber { delta } => each(d, &|e| {
                let (a, t) = (e.abs() as f64, *delta as f64);
                if a <= t { (0.5 * a * a, e) } else { (t * (a - 0.5 * t), delta * e.signum()) }
            }),
            job::Loss::Focal { gamma, .. } => focal(*gamma as f64, x, class(), d),
            job::Loss::Hinge { .. } if x.len() == 1 => {
                let y = if class() == 1 { 1.0 } else { -1.0 };
                let slack = 1.0 - y * x[0];
                d[0] = if slack > 0.0 { -y } else { 0.0 };
                (slack.max(0.0) as f64, 1.0)
            }
            job::Loss::Hinge { .. } => {
                // PyTorch's MultiMarginLoss: sum over other classes of max(0, 1 - x_y + x_i), over the classes.
                let (y, share) = (class(), 1.0 / x.len() as f32);
                let (mut loss, mut hits) = (0.0, 0.0);
                for i in 0..x.len() {
                    let slack = 1.0 - x[y] + x[i];
                    let hit = i != y && slack > 0.0;
                    d[i] = if hit { share } else { 0.0 };
                    if hit {
                        loss += slack as f64;
                        hits += share;
                    }
                }
                d[y] = -hits;
                (loss * share as f64, 1.0)
            }
        }
    }
}

/// Those of the loss, where they multiply the whole of a sample's or are mixed in as PyTorch's cross_entropy does.
fn class_weights(loss: &job::Loss) -> Option<&[f32]> {
    match loss {
        job::Loss::CrossEntropy { class_weights, .. }
        | job::Loss::Hinge { class_weights }
        | job::Loss::Focal { class_weights, .. } => class_weights.as_deref(),
        job::Loss::BinaryCrossEntropy { .. }
        | job::Loss::Mse
        | job::Loss::Mae
        | job::Loss::Huber { .. }
        | job::Loss::Added { .. }
        | job::Loss::Bpr => None,
    }
}

/// Bayesian personalised ranking (Rendle et al., 2009, eq. 6 without its regularisation): `-ln sigmoid(x_0 - x_i)` for each of a
/// sample's candidates `i` but its own, 0. The mean is over these pairs.
///
/// `x`, `chosen` and `d` are of whole samples: a row with the target 1 is a sample's own, and those up to the next one its others.
fn bpr(x: &[f32], chosen: &[f32], d: &mut [f32], sums: &mut LossSums) {
    let mut at = 0;
    while at < x.len() {
        let others = chosen[at + 1..].iter().position(|target| *target == 1.0).unwrap_or(x.len() - at - 1);
        let (own, mut pull) = (x[at] as f64, 0.0);
        for (x, d) in x[at + 1..][..others].iter().zip(&mut d[at + 1..]) {
            let margin = own - *x as f64;
            // Of two wrongs one that stays finite: ln(1 + e^-margin), and its slope by -margin.
            sums.loss += libm::log1p(libm::exp(-margin.abs())) + (-margin).max(0.0);
            let slope = 1.0 / (1.0 + libm::exp(margin));
            *d = slope as f32;
            pull += slope;
        }
        d[at] = -pull as f32;
        sums.weight += others as f64;
        at += 1 + others;
    }
}

/// The focal loss of one sample (Lin et al., 2017, eq. 4), `-(1 - p)^gamma ln p`, with the probability `p` that a sigmoid or a
/// softmax gives to its class; its weight, and its gradient into `d`.
fn focal(gamma: f64, x: &[f32], class: usize, d: &mut [f32]) -> (f64, f64) {
    let top = x.iter().fold(f64::NEG_INFINITY, |top, x| top.max(*x as f64));
    let total: f64 = x.iter().map(|x| libm::exp(*x as f64 - top)).sum();
    // The class' logit against the others.
    let toward = if class == 1 { x[0] as f64 } else { -x[0] as f64 };
    let log_p = match x.len() {
        1 => toward.min(0.0) - libm::log1p(libm::exp(-toward.abs())),
        _ => x[class] as f64 - top - libm::log(total),
    };
    let (p, rest) = (libm::exp(log_p), -libm::expm1(log_p));
    let focus = libm::pow(rest, gamma);
    let sharper = if rest > 0.0 { gamma * libm::pow(rest, gamma - 1.0) * p * log_p } else { 0.0 };
    let slope = sharper - focus;
    if let [d] = d {
        *d = (slope * rest * if class == 1 { 1.0 } else { -1.0 }) as f32;
    } else {
        for (c, (d, x)) in d.iter_mut().zip(x).enumerate() {
            let hit = if c == class { 1.0 } else { 0.0 };
            *d = (slope * (hit - libm::exp(*x as f64 - top) / total)) as f32;
        }
    }
    (-focus * log_p, 1.0)
}

/// PyTorch's cross_entropy with probabilities smoothed towards uniform, and weights per class.
///
/// With the targets `t_c = hit [c = y] + share_c`, whose sum is `mass`, and `total = sum of e^(x_c - top)`: the loss is
/// `sum of t_c (top + ln(total) - x_c)`, and its slope `mass e^(x_c - top) / total - t_c`.
struct CrossEntropy<'a> {
    classes: usize,
    weights: Option<&'a [f32]>,
    smoothing: f64,
}

/// Rows that are worked on together, at most: short rows fill whole vectors only side by side.
const ROWS: usize = 32;

/// Values that are worked on together: they stay in the first cache.
const VALUES: usize = 4096;

impl CrossEntropy<'_> {
    #[inline(always)]
    fn weight(&self, class: usize) -> f64 {
        self.weights.map_or(1.0, |w| w[class] as f64)
    }

    /// The losses of some rows are added to `sums` in their order, and their gradients go to `d`; `x` and `d`: `(rows, classes)`.
    fn rows(&self, x: &[f32], labels: &[u32], times: &[f32], d: &mut [f32], sums: &mut LossSums) {
        let n = self.classes;
        let rows = (VALUES / n).clamp(1, ROWS);
        let mut times = times.chunks(rows);
        for (labels, (x, d)) in labels.chunks(rows).zip(x.chunks(rows * n).zip(d.chunks_mut(rows * n))) {
            let times = times.next().unwrap_or_default();
            vectorized(
                #[inline(always)]
                || self.block(x, labels, times, d, sums),
            );
        }
    }

    #[inline(always)]
    fn block(&self, x: &[f32], labels: &[u32], times: &[f32], d: &mut [f32], sums: &mut LossSums) {
        let n = self.classes;
        let (mut tops, mut totals, mut logs) = ([0.0f32; ROWS], [1.0f64; ROWS], [0.0f64; ROWS]);
        for ((x, d), top) in x.chunks_exact(n).zip(d.chunks_exact_mut(n)).zip(&mut tops) {
            *top = largest(x);
            d.iter_mut().zip(x).for_each(|(d, x)| *d = x - *top);
        }
        d.iter_mut().for_each(|d| *d = math::exp(*d));
        for (d, total) in d.chunks_exact(n).zip(&mut totals) {
            *total = sum(d, |_, e| e as f64);
        }
        logs.iter_mut().zip(&totals).for_each(|(log, total)| *log = math::ln(*total));
        let rows = x.chunks_exact(n).zip(d.chunks_exact_mut(n)).zip(labels);
        for (row, ((x, d), &label)) in rows.enumerate() {
            let (label, log) = (label as usize, logs[row] + tops[row] as f64);
            let times = times.get(row).map_or(1.0, |times| *times as f64);
            let weight = self.weight(label) * times;
            let hit = (1.0 - self.smoothing) * weight;
            let share = |c: usize| self.smoothing / n as f64 * self.weight(c) * times;
            let (mut loss, mut mass) = (hit * (log - x[label] as f64), hit);
            if self.smoothing > 0.0 {
                loss += sum(x, |c, x| share(c) * (log - x as f64));
                mass += sum(x, |c, _| share(c));
            }
            let scale = mass / totals[row];
            let at_label = d[label] as f64 * scale - share(label) - hit;
            d.iter_mut().enumerate().for_each(|(c, d)| *d = (*d as f64 * scale - share(c)) as f32);
            d[label] = at_label as f32;
            sums.loss += loss;
            sums.weight += weight;
        }
    }
}

/// `sum f(i, x[i])` in fixed lanes, then the tail in order.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(usize, f32) -> f64) -> f64 {
    let mut lanes = [0.0; LANES];
    let (blocks, tail) = x.as_chunks::<LANES>();
    for (b, block) in blocks.iter().enumerate() {
        let values: [f64; LANES] = std::array::from_fn(|l| f(b * LANES + l, block[l]));
        lanes.iter_mut().zip(values).for_each(|(lane, v)| *lane += v);
    }
    let whole = if blocks.is_empty() { 0.0 } else { lanes.into_iter().sum() };
    let first = blocks.len() * LANES;
    tail.iter().enumerate().fold(whole, |sum, (i, x)| sum + f(first + i, *x))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kinds() -> Vec<(job::Loss, usize)> {
        vec![
            (job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None }, 4),
            (job::Loss::CrossEntropy { label_smoothing: 0.1, class_weights: Some(vec![0.5, 1.0, 2.0, 1.5]) }, 4),
            (job::Loss::BinaryCrossEntropy { positive_weight: 2.5 }, 1),
            (job::Loss::Mse, 1),
            (job::Loss::Mae, 1),
            (job::Loss::Huber { delta: 0.7 }, 1),
            (job::Loss::Focal { gamma: 2.0, class_weights: None }, 1),
            (job::Loss::Focal { gamma: 0.5, class_weights: Some(vec![0.5, 1.0, 2.0, 1.5]) }, 4),
            (job::Loss::Hinge { class_weights: Some(vec![0.5, 3.0]) }, 1),
            (job::Loss::Hinge { class_weights: None }, 4),
        ]
    }

    proptest! {
        #[test]
        fn gradients_are_finite_differences(x in prop::collection::vec(-3.0f32..3.0, 4), y in 0u32..4) {
            for (kind, n) in kinds() {
                let loss = Loss::new(&kind, n).unwrap();
                let targets = Targets::Class(vec![if n == 1 { y % 2 } else { y }]);
                let at = |x: &[f32]| loss.forward_backward(x, &targets, &[], 0..1, &mut vec![0.0; n]).loss;
                let mut d = vec![0.0; n];
                loss.forward_backward(&x[..n], &targets, &[], 0..1, &mut d);
                for i in 0..n {
                    let (mut up, mut down) = (x[..n].to_vec(), x[..n].to_vec());
                    up[i] += 1e-3;
                    down[i] -= 1e-3;
                    let slope = |a: &[f32], b: &[f32]| (at(a) - at(b)) / (a[i] - b[i]) as f64;
                    // Beside a kink (of mae, of hinge) the slope of one side is right.
                    let slopes = [slope(&up, &down), slope(&up, &x[..n]), slope(&x[..n], &down)];
                    let right = slopes.iter().any(|slope| (slope - d[i] as f64).abs() < 2e-3);
                    prop_assert!(right, "{kind:?} {slopes:?} {}", d[i]);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn bpr_compares_each_sample_with_its_own_candidates(
            samples in prop::collection::vec(prop::collection::vec(-4.0f32..4.0, 1..6), 1..5), skipped in 0usize..3,
        ) {
            let loss = Loss::new(&job::Loss::Bpr, 1).unwrap();
            let before = samples.len().min(skipped);
            let x: Vec<f32> = samples.concat();
            let chosen: Vec<f32> = samples.iter().flat_map(|s| (0..s.len()).map(|i| if i == 0 { 1.0 } else { 0.0 })).collect();
            let targets = Targets::Value(chosen);
            let rows = samples[..before].iter().map(Vec::len).sum()..x.len();
            let mut d = vec![7.0; x.len()];
            let sums = loss.forward_backward(&x, &targets, &[], rows.clone(), &mut d);
            prop_assert!(d[..rows.start].iter().all(|d| *d == 7.0), "other rows are touched");
            // By its definition, in f64.
            let of = |x: &[f64]| -> f64 {
                let (mut at, mut sum) = (rows.start, 0.0);
                for sample in &samples[before..] {
                    let own = x[at];
                    sum += x[at + 1..at + sample.len()].iter().map(|x| -(1.0 / (1.0 + (x - own).exp())).ln()).sum::<f64>();
                    at += sample.len();
                }
                sum
            };
            let exact: Vec<f64> = x.iter().map(|x| *x as f64).collect();
            let pairs: usize = samples[before..].iter().map(|sample| sample.len() - 1).sum();
            prop_assert!((sums.loss - of(&exact)).abs() < 1e-9 * (1.0 + sums.loss));
            prop_assert_eq!(sums.weight, pairs as f64);
            for i in rows.clone() {
                let (mut up, mut down) = (exact.clone(), exact.clone());
                up[i] += 1e-5;
                down[i] -= 1e-5;
                let slope = (of(&up) - of(&down)) / 2e-5;
                prop_assert!((slope - d[i] as f64).abs() < 1e-5, "{slope} {}", d[i]);
            }
        }
    }

    #[test]
    fn bpr_stays_finite_and_is_for_implicit_feedback_alone() {
        let loss = Loss::new(&job::Loss::Bpr, 1).unwrap();
        for x in [[1e30f32, -1e30], [-1e30, 1e30], [f32::MAX, f32::MIN]] {
            let mut d = [0.0; 2];
            let sums = loss.forward_backward(&x, &Targets::Value(vec![1.0, 0.0]), &[], 0..2, &mut d);
            assert!(sums.loss.is_finite() && d.iter().all(|d| d.is_finite()), "{x:?} {sums:?} {d:?}");
        }
        let seen = Targets::Seen(Default::default());
        assert!(loss.check_targets(&seen).is_ok());
        assert!(loss.check_targets(&Targets::Value(vec![1.0])).unwrap_err().to_string().contains("data.implicit"));
        let binary = Loss::new(&job::Loss::BinaryCrossEntropy { positive_weight: 1.0 }, 1).unwrap();
        assert!(binary.check_targets(&seen).is_ok());
        let mse = Loss::new(&job::Loss::Mse, 1).unwrap();
        assert!(mse.check_targets(&seen).unwrap_err().to_string().contains("data.implicit"));
        assert!(matches!(Loss::new(&job::Loss::Bpr, 2), Err(LossError::Outputs { .. })));
    }

    #[test]
    fn saturated_logits_stay_finite() {
        for (kind, n) in kinds() {
            let loss = Loss::new(&kind, n).unwrap();
            for x in [1e4f32, -1e4] {
                let mut d = vec![0.0; n];
                let sums = loss.forward_backward(&vec![x; n], &Targets::Class(vec![1]), &[], 0..1, &mut d);
                assert!(sums.loss.is_finite() && d.iter().all(|d| d.is_finite()), "{kind:?}");
            }
        }
    }

    /// Numbers of classes around the lanes and the values of a block, with and without smoothing and weights.
    #[test]
    fn a_rows_bits_do_not_depend_on_the_rows_beside_it() {
        let key = crate::rng::Key::new(1, crate::rng::Purpose::Synthetic);
        for (n, smooth) in [2, 10, 15, 16, 33, 130, 5000].into_iter().flat_map(|n| [(n, false), (n, true)]) {
            let class_weights = smooth.then(|| (0..n as u64).map(|i| key.uniform(i)).collect());
            let label_smoothing = if smooth { 0.1 } else { 0.0 };
            let loss = Loss::new(&job::Loss::CrossEntropy { label_smoothing, class_weights }, n).unwrap();
            let rows = 70;
            let x: Vec<f32> = (0..(rows * n) as u64).map(|i| 3.0 * key.normal(i)).collect();
            let targets = Targets::Class((0..rows as u64).map(|i| key.below(i, n as u64) as u32).collect());
            let mut together = vec![0.0; x.len()];
            let sums = loss.forward_backward(&x, &targets, &[], 0..rows, &mut together);
            let mut apart = vec![0.0; x.len()];
            let each = (0..rows).map(|row| loss.forward_backward(&x, &targets, &[], row..row + 1, &mut apart));
            assert_eq!(each.fold(LossSums::default(), |a, b| a + b), sums, "{n}");
            assert_eq!(apart, together, "{n}");
            // The gradient of a row sums to nothing.
            assert!(together.chunks(n).all(|d| d.iter().sum::<f32>().abs() < 1e-5), "{n}");
        }
    }

    #[test]
    fn a_logit_that_is_not_a_number_spoils_the_loss() {
        let loss = Loss::new(&job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None }, 20).unwrap();
        for (at, bad) in [(3, f32::NAN), (18, f32::NAN), (3, f32::INFINITY), (18, f32::INFINITY)] {
            let (mut x, mut d) = (vec![0.5; 20], vec![0.0; 20]);
            x[at] = bad;
            let sums = loss.forward_backward(&x, &Targets::Class(vec![1]), &[], 0..1, &mut d);
            assert!(!sums.loss.is_finite() && !d[1].is_finite(), "{bad} at {at}: {sums:?}");
        }
    }

    proptest! {
        #[test]
        fn a_weight_is_how_often_a_target_is_there(x in prop::collection::vec(-3.0f32..3.0, 12), y in prop::collection::vec(0u32..4, 3)) {
            for (kind, n) in kinds() {
                let loss = Loss::new(&kind, n).unwrap();
                let labels: Vec<u32> = y.iter().map(|y| if n == 1 { y % 2 } else { *y }).collect();
                let x = &x[..3 * n];
                let (mut weighed, mut plain) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                let sums = loss.forward_backward(x, &Targets::Class(labels.clone()), &[2.0, 0.0, 1.0], 0..3, &mut weighed);
                let twice = [&x[..n], &x[..n], &x[2 * n..]].concat();
                let targets = Targets::Class(vec![labels[0], labels[0], labels[2]]);
                let want = loss.forward_backward(&twice, &targets, &[], 0..3, &mut plain);
                prop_assert!((sums.loss - want.loss).abs() < 1e-9 && (sums.weight - want.weight).abs() < 1e-9, "{kind:?}");
                for (i, d) in weighed.iter().enumerate() {
                    let want = [plain[i] + plain[n + i % n], 0.0, plain[i]][i / n];
                    prop_assert!((d - want).abs() < 1e-6, "{kind:?} {i}: {d} {want}");
                }
                // The rows before do not change which weight is whose.
                let mut apart = vec![0.0; x.len()];
                let targets = Targets::Class(labels.clone());
                let last = loss.forward_backward(x, &targets, &[2.0, 0.0, 1.0], 2..3, &mut apart);
                prop_assert_eq!(&apart[2 * n..], &weighed[2 * n..]);
                let mut d = vec![0.0; n];
                let alone = Targets::Class(vec![labels[2]]);
                let want = loss.forward_backward(&x[2 * n..], &alone, &[], 0..1, &mut d);
                prop_assert_eq!((last.weight, last.loss), (want.weight, want.loss));
            }
        }
    }

    #[test]
    fn each_class_needs_a_weight() {
        let focal = |weights: &[f32]| job::Loss::Focal { gamma: 2.0, class_weights: Some(weights.into()) };
        assert_eq!(Loss::new(&focal(&[1.0]), 1).err(), Some(LossError::ClassWeights { got: 1, want: 2 }));
        assert_eq!(Loss::new(&focal(&[1.0; 2]), 3).err(), Some(LossError::ClassWeights { got: 2, want: 3 }));
        assert!(Loss::new(&focal(&[1.0; 2]), 1).is_ok());
    }

    #[test]
    fn a_class_out_of_range_is_named() {
        let loss = Loss::new(&job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None }, 3).unwrap();
        let error = loss.check_targets(&Targets::Class(vec![0, 2, 3])).unwrap_err();
        assert_eq!(error, LossError::Class { sample: 2, class: 3, classes: 3 });
    }
}
