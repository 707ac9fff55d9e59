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

    /// The sum of `-ln` of the probability that a sigmoid or a softmax gives to each target's class, whatever the loss makes of it by
    /// smoothing, weights, a margin or a focus; `own` are its sums of the same. `None`: the program has added the loss, and it alone
    /// knows what outputs mean.
    pub fn surprise(
        &self,
        logits: ArrayView2<'_, f32>,
        targets: &Targets,
        weights: &[f32],
        own: LossSums,
    ) -> Option<f64> {
        let kind = match self.outputs {
            1 => job::Loss::BinaryCrossEntropy { positive_weight: 1.0 },
            _ => job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None },
        };
        if self.added.is_some() {
            return None;
        }
        if kind == self.kind && weights.is_empty() {
            return Some(own.loss);
        }
        Some(Loss { kind, outputs: self.outputs, added: None }.forward(logits, targets, &[]).loss)
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
mod tests;
