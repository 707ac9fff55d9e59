//! Losses on logits, in stable form. Sums and their denominators travel; division happens once, where the tree ends.

use crate::data::Targets;
use crate::job;
use ndarray::ArrayView2;
use std::ops::Range;

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
    #[error("train.loss.class_weights has {got} entries, the model has {want} outputs")]
    ClassWeights { got: usize, want: usize },
    #[error("train.loss \"{loss}\" needs {need}, the model has {outputs} outputs")]
    Outputs { loss: &'static str, need: &'static str, outputs: usize },
    #[error("train.loss \"{loss}\" needs {need}; choose another loss, or data.task")]
    Targets { loss: &'static str, need: &'static str },
    #[error(
        "train.loss \"{loss}\" is for values or two classes, the data has more classes; use \"cross-entropy\", or data.task = \"regression\""
    )]
    OneOutput { loss: &'static str },
    #[error("sample {sample} has class {class}, but the model has {classes} classes")]
    Class { sample: usize, class: u32, classes: usize },
}

/// A loss over `outputs` logits a sample.
#[derive(Clone, Debug)]
pub struct Loss {
    kind: job::Loss,
    outputs: usize,
}

impl Loss {
    /// Checks that the loss fits a model with `outputs` outputs.
    pub fn new(kind: &job::Loss, outputs: usize) -> Result<Loss, LossError> {
        match kind {
            job::Loss::CrossEntropy { class_weights: Some(w), .. } if w.len() != outputs => {
                return Err(LossError::ClassWeights { got: w.len(), want: outputs });
            }
            job::Loss::CrossEntropy { .. } if outputs < 2 => {
                return Err(LossError::Outputs { loss: "cross-entropy", need: "2 or more", outputs });
            }
            job::Loss::BinaryCrossEntropy { .. } if outputs != 1 => {
                return Err(LossError::Outputs { loss: "binary-cross-entropy", need: "exactly 1", outputs });
            }
            _ => {}
        }
        Ok(Loss { kind: kind.clone(), outputs })
    }

    fn name(&self) -> &'static str {
        match self.kind {
            job::Loss::CrossEntropy { .. } => "cross-entropy",
            job::Loss::BinaryCrossEntropy { .. } => "binary-cross-entropy",
            job::Loss::Mse => "mse",
            job::Loss::Mae => "mae",
            job::Loss::Huber { .. } => "huber",
            job::Loss::Hinge => "hinge",
        }
    }

    /// Checks that every target is one that the loss can take.
    pub fn check_targets(&self, targets: &Targets) -> Result<(), LossError> {
        let classes = if self.outputs == 1 { 2 } else { self.outputs };
        match (targets, &self.kind) {
            (Targets::Class(_), job::Loss::Mse | job::Loss::Mae | job::Loss::Huber { .. }) => {
                Err(LossError::Targets { loss: self.name(), need: "values as targets, the data has classes" })
            }
            (Targets::Class(labels), _) => match labels.iter().position(|&c| c as usize >= classes) {
                Some(_) if self.outputs == 1 => Err(LossError::OneOutput { loss: self.name() }),
                Some(sample) => Err(LossError::Class { sample, class: labels[sample], classes }),
                None => Ok(()),
            },
            (Targets::Value(_), job::Loss::CrossEntropy { .. } | job::Loss::Hinge) => {
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
        }
    }

    /// Loss sums of `rows`, and the gradient of the **sum** with respect to their logits.
    ///
    /// `logits` and `d_logits` are `(batch, outputs)`; other rows are not touched.
    pub fn forward_backward(
        &self,
        logits: &[f32],
        targets: &Targets,
        rows: Range<usize>,
        d_logits: &mut [f32],
    ) -> LossSums {
        let n = self.outputs;
        let mut sums = LossSums { samples: rows.len() as u64, ..Default::default() };
        for row in rows {
            let x = &logits[row * n..(row + 1) * n];
            let d = &mut d_logits[row * n..(row + 1) * n];
            let (loss, weight) = self.row(x, targets, row, d);
            sums.loss += loss;
            sums.weight += weight;
        }
        sums
    }

    /// Loss sums of `logits`, `(samples, outputs)`.
    pub fn forward(&self, logits: ArrayView2<'_, f32>, targets: &Targets) -> LossSums {
        let mut sums = LossSums { samples: logits.nrows() as u64, ..Default::default() };
        let (mut x, mut d) = (vec![0.0; self.outputs], vec![0.0; self.outputs]);
        for (row, logits) in logits.rows().into_iter().enumerate() {
            x.iter_mut().zip(logits).for_each(|(x, logit)| *x = *logit);
            let (loss, weight) = self.row(&x, targets, row, &mut d);
            sums.loss += loss;
            sums.weight += weight;
        }
        sums
    }

    /// One sample: its loss and weight, and the gradient into `d`.
    fn row(&self, x: &[f32], targets: &Targets, row: usize, d: &mut [f32]) -> (f64, f64) {
        let value = |_: usize| match targets {
            Targets::Class(c) => c[row] as f32,
            Targets::Value(v) => v[row],
        };
        let class = || match targets {
            Targets::Class(c) => c[row] as usize,
            Targets::Value(v) => v[row] as usize,
        };
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
            job::Loss::CrossEntropy { label_smoothing, class_weights } => {
                cross_entropy(x, class(), *label_smoothing, class_weights.as_deref(), d)
            }
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
            job::Loss::Hinge if x.len() == 1 => {
                let y = if class() == 1 { 1.0 } else { -1.0 };
                let slack = 1.0 - y * x[0];
                d[0] = if slack > 0.0 { -y } else { 0.0 };
                (slack.max(0.0) as f64, 1.0)
            }
            job::Loss::Hinge => {
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

/// PyTorch's cross_entropy with probabilities smoothed towards uniform, and weights per class.
fn cross_entropy(x: &[f32], y: usize, smoothing: f32, weights: Option<&[f32]>, d: &mut [f32]) -> (f64, f64) {
    let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0f64;
    for (d, &x) in d.iter_mut().zip(x) {
        *d = libm::expf(x - top);
        total += *d as f64;
    }
    let log_total = libm::log(total) + top as f64;
    let weight = |c: usize| weights.map_or(1.0, |w| w[c]) as f64;
    let (hit, spread) = ((1.0 - smoothing as f64) * weight(y), smoothing as f64 / x.len() as f64);
    let mut loss = hit * (log_total - x[y] as f64);
    let mut mass = hit;
    if spread > 0.0 {
        for (c, &x) in x.iter().enumerate() {
            loss += spread * weight(c) * (log_total - x as f64);
            mass += spread * weight(c);
        }
    }
    let scale = mass / total;
    for (c, d) in d.iter_mut().enumerate() {
        let pull = spread * weight(c) + if c == y { hit } else { 0.0 };
        *d = (*d as f64 * scale - pull) as f32;
    }
    (loss, weight(y))
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
            (job::Loss::Hinge, 1),
            (job::Loss::Hinge, 4),
        ]
    }

    proptest! {
        #[test]
        fn gradients_are_finite_differences(x in prop::collection::vec(-3.0f32..3.0, 4), y in 0u32..4) {
            for (kind, n) in kinds() {
                let loss = Loss::new(&kind, n).unwrap();
                let targets = Targets::Class(vec![if n == 1 { y % 2 } else { y }]);
                let at = |x: &[f32]| loss.forward_backward(x, &targets, 0..1, &mut vec![0.0; n]).loss;
                let mut d = vec![0.0; n];
                loss.forward_backward(&x[..n], &targets, 0..1, &mut d);
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

    #[test]
    fn saturated_logits_stay_finite() {
        for (kind, n) in kinds() {
            let loss = Loss::new(&kind, n).unwrap();
            for x in [1e4f32, -1e4] {
                let mut d = vec![0.0; n];
                let sums = loss.forward_backward(&vec![x; n], &Targets::Class(vec![1]), 0..1, &mut d);
                assert!(sums.loss.is_finite() && d.iter().all(|d| d.is_finite()), "{kind:?}");
            }
        }
    }

    #[test]
    fn a_class_out_of_range_is_named() {
        let loss = Loss::new(&job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None }, 3).unwrap();
        let error = loss.check_targets(&Targets::Class(vec![0, 2, 3])).unwrap_err();
        assert_eq!(error, LossError::Class { sample: 2, class: 3, classes: 3 });
    }
}
