//! Evaluation: sums that add up over partitions, and the metrics that come of them.

use crate::data::{Prepared, Targets, Tokens};
use crate::job::Metric;
use crate::loss::{Loss, LossSums};
use ndarray::{ArrayView1, ArrayView2};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Bins of the histograms that AUC is computed from.
const BINS: usize = 8192;

/// Which metrics a task has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EvalKind {
    Regression,
    /// Two classes, from one logit or two: accuracy and AUC.
    Binary,
    /// More classes: accuracy.
    Classes,
    /// The next token: accuracy, perplexity, and bits per character, of which a token is not one always.
    Next {
        tokens_per_character: f64,
    },
}

impl EvalKind {
    /// The kind for these data.
    pub fn of(prepared: &Prepared) -> EvalKind {
        match (&prepared.classes, &prepared.tokens) {
            (_, Some(Tokens { tokens_per_character, column: None, .. })) => {
                EvalKind::Next { tokens_per_character: *tokens_per_character }
            }
            (None, _) => EvalKind::Regression,
            (Some(classes), _) if classes.len() == 2 => EvalKind::Binary,
            (Some(_), _) => EvalKind::Classes,
        }
    }

    /// What is measured.
    pub fn metrics(self) -> &'static [Metric] {
        match self {
            EvalKind::Regression => &[Metric::Loss, Metric::Rmse, Metric::Mae],
            EvalKind::Binary => &[Metric::Loss, Metric::Accuracy, Metric::Auc],
            EvalKind::Classes => &[Metric::Loss, Metric::Accuracy],
            EvalKind::Next { .. } => &[Metric::Loss, Metric::Perplexity, Metric::BitsPerCharacter, Metric::Accuracy],
        }
    }
}

/// Sums over targets.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalSums {
    kind: EvalKind,
    /// Its `samples` are targets.
    loss: LossSums,
    /// Of the loss without smoothing and weights; 0 unless tokens are predicted.
    surprise: f64,
    correct: u64,
    squared: f64,
    absolute: f64,
    /// Samples by score, first those of class 0, then those of class 1; empty unless binary.
    histogram: Vec<u64>,
}

/// The bin of a logit difference: monotone, and finest around 0.
fn bin(margin: f32) -> usize {
    let squashed = 0.5 * (1.0 + margin as f64 / (1.0 + margin.abs() as f64));
    ((squashed * BINS as f64) as usize).min(BINS - 1)
}

impl EvalSums {
    /// Of no samples.
    pub fn new(kind: EvalKind) -> EvalSums {
        let bins = if kind == EvalKind::Binary { 2 * BINS } else { 0 };
        let histogram = vec![0; bins];
        EvalSums { kind, loss: LossSums::default(), surprise: 0.0, correct: 0, squared: 0.0, absolute: 0.0, histogram }
    }

    /// Adds the rows of `logits`, `(targets, outputs)`.
    pub fn add_batch(&mut self, loss: &Loss, logits: ArrayView2<'_, f32>, targets: &Targets) {
        let sums = loss.forward(logits, targets);
        self.loss = self.loss + sums;
        if let EvalKind::Next { .. } = self.kind {
            self.surprise += loss.plain().map_or(sums, |plain| plain.forward(logits, targets)).loss;
        }
        for (row, x) in logits.rows().into_iter().enumerate() {
            match targets {
                Targets::Class(labels) => {
                    let label = labels[row];
                    self.correct += u64::from(predicted(x) == label as usize);
                    if self.kind == EvalKind::Binary {
                        let margin = if x.len() == 1 { x[0] } else { x[1] - x[0] };
                        self.histogram[label.min(1) as usize * BINS + bin(margin)] += 1;
                    }
                }
                Targets::Value(values) => {
                    let error = x[0] as f64 - values[row] as f64;
                    self.squared += error * error;
                    self.absolute += error.abs();
                }
                Targets::Next => panic!("a batch has classes instead"),
            }
        }
    }

    /// Both together.
    pub fn merge(mut self, other: EvalSums) -> EvalSums {
        self.loss = self.loss + other.loss;
        self.surprise += other.surprise;
        self.correct += other.correct;
        self.squared += other.squared;
        self.absolute += other.absolute;
        self.histogram.iter_mut().zip(&other.histogram).for_each(|(a, b)| *a += b);
        self
    }

    /// For the wire.
    pub fn to_parts(&self) -> (Vec<f64>, Vec<u64>) {
        let counts = [self.loss.samples, self.correct].into_iter().chain(self.histogram.iter().copied()).collect();
        (vec![self.loss.loss, self.loss.weight, self.surprise, self.squared, self.absolute], counts)
    }

    /// Whether no sum has overflowed or become NaN.
    pub fn is_finite(&self) -> bool {
        [self.loss.loss, self.surprise, self.squared, self.absolute].iter().all(|sum| sum.is_finite())
    }

    /// From the wire; `None` where lengths are wrong, a sum is impossible, or counts exceed the samples.
    pub fn from_parts(kind: EvalKind, sums: &[f64], counts: &[u64]) -> Option<EvalSums> {
        let (&[loss, weight, surprise, squared, absolute], [samples, correct, histogram @ ..]) = (sums, counts) else {
            return None;
        };
        let empty = EvalSums::new(kind);
        let counted = histogram.iter().try_fold(0u64, |sum, n| sum.checked_add(*n))?;
        let sound = sums.iter().all(|s| s.is_finite())
            && weight >= 0.0
            && histogram.len() == empty.histogram.len()
            && correct <= samples
            && *samples < 1 << 48
            && (histogram.is_empty() || counted == *samples);
        sound.then(|| EvalSums {
            loss: LossSums { loss, weight, samples: *samples },
            surprise,
            correct: *correct,
            squared,
            absolute,
            histogram: histogram.to_vec(),
            ..empty
        })
    }

    /// Targets in the sums: as many as samples, unless tokens are predicted.
    pub fn targets(&self) -> u64 {
        self.loss.samples
    }

    /// Area under the ROC curve: the share of pairs in order, ties counted half (Hanley and McNeil, 1982), up to the width
    /// of a bin. `None` while a class is missing.
    fn auc(&self) -> Option<f64> {
        let (negative, positive) = self.histogram.split_at(self.histogram.len() / 2);
        let (mut below, mut pairs) = (0u64, 0.0);
        for (n, p) in negative.iter().zip(positive) {
            pairs += *p as f64 * (below as f64 + 0.5 * *n as f64);
            below += n;
        }
        let all = below as f64 * positive.iter().sum::<u64>() as f64;
        (all > 0.0).then_some(pairs / all)
    }

    /// The metrics.
    pub fn summary(&self) -> EvalSummary {
        let n = (self.loss.samples as f64).max(1.0);
        let classes = self.kind != EvalKind::Regression;
        let (surprise, tokens) = (
            self.surprise / n,
            match self.kind {
                EvalKind::Next { tokens_per_character } => Some(tokens_per_character),
                _ => None,
            },
        );
        EvalSummary {
            loss: self.loss.loss / self.loss.weight.max(f64::MIN_POSITIVE),
            perplexity: tokens.map(|_| libm::exp(surprise)),
            bits_per_character: tokens.map(|tokens| surprise * tokens / std::f64::consts::LN_2),
            accuracy: classes.then_some(self.correct as f64 / n),
            auc: self.auc(),
            rmse: (!classes).then(|| libm::sqrt(self.squared / n)),
            mae: (!classes).then_some(self.absolute / n),
        }
    }
}

/// The class that a row of logits stands for: the largest (the first of equals), or the sign of a single one.
pub fn predicted(x: ArrayView1<'_, f32>) -> usize {
    match x.len() {
        1 => usize::from(x[0] > 0.0),
        n => (1..n).fold(0, |best, i| if x[i] > x[best] { i } else { best }),
    }
}

/// What an evaluation came to; what the task does not have is left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalSummary {
    pub loss: f64,
    /// `e` to the surprise of a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_character: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auc: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rmse: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mae: Option<f64>,
}

impl EvalSummary {
    /// One metric; `None` where the task does not have it.
    pub fn get(&self, metric: Metric) -> Option<f64> {
        match metric {
            Metric::Loss => Some(self.loss),
            Metric::Perplexity => self.perplexity,
            Metric::BitsPerCharacter => self.bits_per_character,
            Metric::Accuracy => self.accuracy,
            Metric::Auc => self.auc,
            Metric::Rmse => self.rmse,
            Metric::Mae => self.mae,
        }
    }
}

impl fmt::Display for EvalSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "loss {:.4}", self.loss)?;
        for (name, value) in [("perplexity", self.perplexity), ("bits per character", self.bits_per_character)] {
            if let Some(v) = value {
                write!(f, ", {name} {v:.3}")?;
            }
        }
        if let Some(a) = self.accuracy {
            write!(f, ", accuracy {:.2}%", a * 100.0)?;
        }
        for (name, value) in [("AUC", self.auc), ("rmse", self.rmse), ("mae", self.mae)] {
            if let Some(v) = value {
                write!(f, ", {name} {v:.4}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn auc_is_the_share_of_ordered_pairs_and_sums_add_up(
            rows in prop::collection::vec((-4.0f32..4.0, 0u32..2), 2..80), cut in 0usize..80,
        ) {
            let loss = Loss::new(&crate::job::Loss::BinaryCrossEntropy { positive_weight: 1.0 }, 1).unwrap();
            let of = |rows: &[(f32, u32)]| {
                let mut sums = EvalSums::new(EvalKind::Binary);
                let logits = Array2::from_shape_fn((rows.len(), 1), |(i, _)| rows[i].0);
                let labels = Targets::Class(rows.iter().map(|r| r.1).collect());
                sums.add_batch(&loss, logits.view(), &labels);
                sums
            };
            let (a, b) = rows.split_at(cut.min(rows.len()));
            let merged = of(a).merge(of(b));
            let whole = of(&rows);
            prop_assert_eq!(merged.correct, whole.correct);
            prop_assert_eq!(&merged.histogram, &whole.histogram);
            let (sums, counts) = whole.to_parts();
            prop_assert_eq!(EvalSums::from_parts(EvalKind::Binary, &sums, &counts), Some(whole.clone()));
            prop_assert_eq!(EvalSums::from_parts(EvalKind::Classes, &sums, &counts), None);
            let (mut pairs, mut all, mut in_one_bin) = (0.0, 0.0, 0.0);
            for p in rows.iter().filter(|r| r.1 == 1) {
                for n in rows.iter().filter(|r| r.1 == 0) {
                    all += 1.0;
                    in_one_bin += if bin(p.0) == bin(n.0) { 1.0 } else { 0.0 };
                    pairs += if p.0 > n.0 { 1.0 } else if p.0 == n.0 { 0.5 } else { 0.0 };
                }
            }
            match whole.summary().auc {
                // Pairs that share a bin count half, whichever is larger.
                Some(auc) => prop_assert!((auc - pairs / all).abs() <= 0.5 * in_one_bin / all + 1e-12, "{auc}"),
                None => prop_assert_eq!(all, 0.0),
            }
        }
    }
}
