//! Evaluation: sums that add up over partitions, and the metrics that come of them.

use crate::data::{Prepared, Targets, Tokens};
use crate::job::Metric;
use crate::loss::{Loss, LossSums};
use ndarray::{ArrayView1, ArrayView2};
use serde::{Deserialize, Serialize};
use std::fmt;

/// More classes than this are not counted one by one: neither F1 nor confusions are known.
pub const MOST_CLASSES: usize = 4096;

/// Bins of the histograms that AUC is computed from.
const BINS: usize = 8192;

/// Which metrics a task has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum EvalKind {
    Regression,
    /// Two classes, from one logit or two: accuracy, AUC, and the second class' F1.
    Binary,
    /// More classes: accuracy, F1, and whether a sample's own is among the `top` ones.
    Classes {
        classes: usize,
        top: Option<u32>,
    },
    /// The next token: accuracy, perplexity, and bits per character, of which a token is not one always.
    Next {
        tokens_per_character: f64,
    },
    /// Each sample's own item among its candidates: whether it is among the first `k`, and where.
    Ranking {
        k: u32,
    },
}

impl EvalKind {
    /// The kind for these data, where the accuracy among the `top` classes is asked for.
    pub fn of(prepared: &Prepared, top: Option<u32>) -> EvalKind {
        if let Some(candidates) = prepared.implicit {
            return EvalKind::Ranking { k: candidates.k };
        }
        match (&prepared.classes, &prepared.tokens) {
            (_, Some(Tokens { tokens_per_character, column: None, .. })) => {
                EvalKind::Next { tokens_per_character: *tokens_per_character }
            }
            (None, _) => EvalKind::Regression,
            (Some(classes), _) if classes.len() == 2 => EvalKind::Binary,
            (Some(classes), _) => EvalKind::Classes { classes: classes.len(), top },
        }
    }

    /// What is measured.
    pub fn metrics(self) -> &'static [Metric] {
        match self {
            EvalKind::Regression => &[Metric::Loss, Metric::Rmse, Metric::Mae, Metric::R2],
            EvalKind::Binary => &[Metric::Loss, Metric::LogLoss, Metric::Accuracy, Metric::Auc, Metric::F1],
            EvalKind::Classes { classes, top: Some(_) } if classes > MOST_CLASSES => {
                &[Metric::Loss, Metric::LogLoss, Metric::Accuracy, Metric::TopKAccuracy]
            }
            EvalKind::Classes { top: Some(_), .. } => {
                &[Metric::Loss, Metric::LogLoss, Metric::Accuracy, Metric::F1, Metric::TopKAccuracy]
            }
            EvalKind::Classes { classes, .. } if classes > MOST_CLASSES => {
                &[Metric::Loss, Metric::LogLoss, Metric::Accuracy]
            }
            EvalKind::Classes { .. } => &[Metric::Loss, Metric::LogLoss, Metric::Accuracy, Metric::F1],
            EvalKind::Next { .. } => &[Metric::Loss, Metric::Perplexity, Metric::BitsPerCharacter, Metric::Accuracy],
            EvalKind::Ranking { .. } => &[Metric::Loss, Metric::HitRate, Metric::Ndcg],
        }
    }

    /// Classes that are counted one by one.
    pub fn counted(self) -> usize {
        match self {
            EvalKind::Binary => 2,
            EvalKind::Classes { classes, .. } if classes <= MOST_CLASSES => classes,
            _ => 0,
        }
    }
}

/// Sums over targets.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalSums {
    kind: EvalKind,
    /// Its `samples` are targets; of rankings, samples.
    loss: LossSums,
    /// `-ln` of the probability that each target's own class has, or its token; above 0 where it is known.
    surprise: f64,
    /// Of rankings, the samples whose own item is among the first `k`.
    correct: u64,
    squared: f64,
    absolute: f64,
    /// Of the targets that are values, as many as samples: their mean, and the sum of their squared distances from it.
    spread: (f64, f64),
    /// Of rankings, `1 / log2(1 + rank)` of the same.
    gain: f64,
    /// Samples whose own class is among the top ones.
    among_top: u64,
    /// Samples by score, first those of class 0, then those of class 1; empty unless binary.
    histogram: Vec<u64>,
    /// Of each class, samples that are right, samples that are taken for it, and samples of it.
    classes: Vec<[u64; 3]>,
    /// Samples of a class that are taken for a class, `(classes, classes)`; empty unless they are asked for.
    confusions: Vec<u64>,
}

/// Mean and sum of squared distances from it of so many values and so many others together (Chan, Golub and LeVeque, 1979, "Updating
/// formulae and a pairwise algorithm for computing sample variances").
fn together((n, (mean, apart)): (u64, (f64, f64)), (others, (their_mean, theirs)): (u64, (f64, f64))) -> (f64, f64) {
    let (n, others) = (n as f64, others as f64);
    let (all, between) = ((n + others).max(1.0), their_mean - mean);
    (mean + between * others / all, apart + theirs + between * between * n * others / all)
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
        let loss = LossSums::default();
        EvalSums {
            kind,
            loss,
            surprise: 0.0,
            correct: 0,
            squared: 0.0,
            absolute: 0.0,
            spread: (0.0, 0.0),
            gain: 0.0,
            among_top: 0,
            histogram,
            classes: vec![[0; 3]; kind.counted()],
            confusions: Vec::new(),
        }
    }

    /// The same with [`EvalSums::confusions`], which do not travel.
    pub fn with_confusions(self) -> EvalSums {
        EvalSums { confusions: vec![0; self.classes.len() * self.classes.len()], ..self }
    }

    /// Samples of a class (rows) that are taken for a class (columns).
    pub fn confusions(&self) -> ArrayView2<'_, u64> {
        let classes = self.confusions.len().isqrt();
        ArrayView2::from_shape((classes, classes), &self.confusions).expect("a square")
    }

    /// Adds the rows of `logits`, `(targets, outputs)`; of rankings, whole samples.
    ///
    /// `weights` are of the loss alone, as [`Loss::forward_backward`] takes them: in all other metrics samples count the same.
    pub fn add_batch(&mut self, loss: &Loss, logits: ArrayView2<'_, f32>, targets: &Targets, weights: &[f32]) {
        let sums = loss.forward(logits, targets, weights);
        if let (EvalKind::Ranking { k }, Targets::Value(chosen)) = (self.kind, targets) {
            self.loss = self.loss + LossSums { samples: 0, ..sums };
            let scores: Vec<f32> = logits.column(0).to_vec();
            self.add_ranks(k, &scores, chosen);
            return;
        }
        let before = self.loss.samples;
        self.loss = self.loss + sums;
        if let Targets::Class(_) = targets {
            let known = loss.surprise(logits, targets, weights, sums).map(|sum| sum.max(f64::MIN_POSITIVE));
            self.surprise += match self.kind {
                EvalKind::Next { .. } => known.unwrap_or(sums.loss),
                _ => known.unwrap_or(0.0),
            };
        }
        for (row, x) in logits.rows().into_iter().enumerate() {
            match targets {
                Targets::Class(labels) => {
                    let (label, taken) = (labels[row], predicted(x));
                    self.correct += u64::from(taken == label as usize);
                    self.count(label as usize, taken);
                    if let EvalKind::Classes { top: Some(top), .. } = self.kind {
                        let (own, at) = (x[label as usize], label as usize);
                        // Of equals the first is before, as it is where only one counts.
                        let before = (0..x.len()).filter(|i| x[*i] > own || x[*i] == own && *i < at).count();
                        self.among_top += u64::from(before < top as usize && own.is_finite());
                    }
                    if self.kind == EvalKind::Binary {
                        let margin = if x.len() == 1 { x[0] } else { x[1] - x[0] };
                        self.histogram[label.min(1) as usize * BINS + bin(margin)] += 1;
                    }
                }
                Targets::Value(values) => {
                    let value = values[row] as f64;
                    let error = x[0] as f64 - value;
                    self.squared += error * error;
                    self.absolute += error.abs();
                    self.spread = together((before + row as u64, self.spread), (1, (value, 0.0)));
                }
                Targets::Next => panic!("a batch has classes instead"),
                Targets::Seen(_) => panic!("a batch has values instead"),
            }
        }
    }

    /// A sample of one class that is taken for another, or for its own.
    fn count(&mut self, own: usize, taken: usize) {
        let classes = self.classes.len();
        if own < classes && taken < classes {
            self.classes[own][0] += u64::from(own == taken);
            self.classes[taken][1] += 1;
            self.classes[own][2] += 1;
            if let Some(pair) = self.confusions.get_mut(own * classes + taken) {
                *pair += 1;
            }
        }
    }

    /// Ranks each sample's own item, which has the target 1, among those up to the next sample's: behind all that are not below it, so
    /// that a model that tells none apart has no hits.
    fn add_ranks(&mut self, k: u32, scores: &[f32], chosen: &[f32]) {
        let own = |at: &usize| chosen[*at] == 1.0;
        let mut starts = (0..chosen.len()).filter(own).peekable();
        while let Some(start) = starts.next() {
            let end = starts.peek().copied().unwrap_or(chosen.len());
            let below = scores[start + 1..end].iter().filter(|score| **score < scores[start]).count();
            let before = end - start - 1 - below;
            self.loss.samples += 1;
            if before < k as usize {
                self.correct += 1;
                self.gain += 1.0 / libm::log2(2.0 + before as f64);
            }
        }
    }

    /// Both together.
    pub fn merge(mut self, other: EvalSums) -> EvalSums {
        self.spread = together((self.loss.samples, self.spread), (other.loss.samples, other.spread));
        self.loss = self.loss + other.loss;
        self.surprise += other.surprise;
        self.correct += other.correct;
        self.squared += other.squared;
        self.absolute += other.absolute;
        self.gain += other.gain;
        self.among_top += other.among_top;
        let of_classes = (self.classes.as_flattened_mut(), other.classes.as_flattened());
        of_classes.0.iter_mut().zip(of_classes.1).for_each(|(a, b)| *a += b);
        self.confusions.iter_mut().zip(&other.confusions).for_each(|(a, b)| *a += b);
        self.histogram.iter_mut().zip(&other.histogram).for_each(|(a, b)| *a += b);
        self
    }

    /// For the wire.
    pub fn to_parts(&self) -> (Vec<f64>, Vec<u64>) {
        let counts = [self.loss.samples, self.correct, self.among_top].into_iter();
        let counts = counts.chain(self.classes.as_flattened().iter().chain(&self.histogram).copied()).collect();
        let (mean, apart) = self.spread;
        let LossSums { loss, weight, .. } = self.loss;
        (vec![loss, weight, self.surprise, self.squared, self.absolute, mean, apart, self.gain], counts)
    }

    /// Whether no sum has overflowed or become NaN.
    pub fn is_finite(&self) -> bool {
        self.to_parts().0.iter().all(|sum| sum.is_finite())
    }

    /// From the wire; `None` where lengths are wrong, a sum is impossible, or counts exceed the samples.
    pub fn from_parts(kind: EvalKind, sums: &[f64], counts: &[u64]) -> Option<EvalSums> {
        let &[loss, weight, surprise, squared, absolute, mean, apart, gain] = sums else { return None };
        let [samples, correct, among_top, counts @ ..] = counts else { return None };
        let empty = EvalSums::new(kind);
        let (classes, histogram) = counts.split_at_checked(3 * empty.classes.len())?;
        let classes = classes.as_chunks().0.to_vec();
        let total = |i: usize| classes.iter().try_fold(0u64, |sum, counts: &[u64; 3]| sum.checked_add(counts[i]));
        let of_classes = [total(0)?, total(1)?, total(2)?];
        let counted = histogram.iter().try_fold(0u64, |sum, n| sum.checked_add(*n))?;
        let sound = sums.iter().all(|s| s.is_finite())
            && weight >= 0.0
            && apart >= 0.0
            && (0.0..=*correct as f64).contains(&gain)
            && histogram.len() == empty.histogram.len()
            && correct <= samples
            && among_top <= samples
            && (classes.is_empty() || of_classes == [*correct, *samples, *samples])
            && classes.iter().all(|[right, taken, own]| right <= taken && right <= own)
            && *samples < 1 << 48
            && (histogram.is_empty() || counted == *samples);
        sound.then(|| EvalSums {
            loss: LossSums { loss, weight, samples: *samples },
            surprise,
            correct: *correct,
            squared,
            absolute,
            spread: (mean, apart),
            gain,
            among_top: *among_top,
            histogram: histogram.to_vec(),
            classes,
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

    /// `2 right / (taken + own)` (van Rijsbergen, 1979, with equal weights): of the second of two classes, and the mean of all of more;
    /// a class that no sample has or is taken for does not count.
    fn f1(&self) -> Option<f64> {
        let f1 = |[right, taken, own]: &[u64; 3]| (taken + own > 0).then(|| 2.0 * *right as f64 / (taken + own) as f64);
        match &self.classes[..] {
            [] => None,
            [_, second] => Some(f1(second).unwrap_or(0.0)),
            all => {
                let known: Vec<f64> = all.iter().filter_map(f1).collect();
                Some(known.iter().sum::<f64>() / known.len().max(1) as f64)
            }
        }
    }

    /// `1 - sum (x - y)^2 / sum (y - mean)^2`, the coefficient of determination: 1 at best, and 0 where always to say the targets' mean
    /// does as well. `None` where all targets are the same.
    fn r2(&self) -> Option<f64> {
        let (_, apart) = self.spread;
        (apart > 0.0).then(|| 1.0 - self.squared / apart)
    }

    /// The metrics.
    pub fn summary(&self) -> EvalSummary {
        let n = (self.loss.samples as f64).max(1.0);
        let top = if let EvalKind::Classes { top, .. } = self.kind { top } else { None };
        let k = if let EvalKind::Ranking { k } = self.kind { Some(k) } else { None };
        let classes = self.kind != EvalKind::Regression && k.is_none();
        let (surprise, tokens) = (
            self.surprise / n,
            match self.kind {
                EvalKind::Next { tokens_per_character } => Some(tokens_per_character),
                _ => None,
            },
        );
        let has_log_loss = self.kind.metrics().contains(&Metric::LogLoss) && self.surprise > 0.0;
        EvalSummary {
            loss: self.loss.loss / self.loss.weight.max(f64::MIN_POSITIVE),
            log_loss: has_log_loss.then_some(surprise),
            perplexity: tokens.map(|_| libm::exp(surprise)),
            bits_per_character: tokens.map(|tokens| surprise * tokens / std::f64::consts::LN_2),
            accuracy: classes.then_some(self.correct as f64 / n),
            auc: self.auc(),
            f1: self.f1(),
            top_k: top,
            top_k_accuracy: top.map(|_| self.among_top as f64 / n),
            rmse: (self.kind == EvalKind::Regression).then(|| libm::sqrt(self.squared / n)),
            mae: (self.kind == EvalKind::Regression).then_some(self.absolute / n),
            r2: self.r2(),
            k,
            hit_rate: k.map(|_| self.correct as f64 / n),
            ndcg: k.map(|_| self.gain / n),
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
    /// The mean of `-ln` of the probability that a sample's own class has, whatever the loss is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_loss: Option<f64>,
    /// `e` to the surprise of a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_character: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auc: Option<f64>,
    /// Of the second of two classes; the mean of those of more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f1: Option<f64>,
    /// Classes that the next one looks at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// The share of samples whose own class is among the first `top_k`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k_accuracy: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rmse: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mae: Option<f64>,
    /// The share of the targets' variance that is explained; below 0 where their mean alone does better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub r2: Option<f64>,
    /// Places that the next two look at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k: Option<u32>,
    /// The share of samples whose own item is among the first `k` of its candidates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hit_rate: Option<f64>,
    /// The mean of `1 / log2(1 + rank)`, 0 where the rank is above `k` (Järvelin and Kekäläinen, 2002, with one relevant item).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ndcg: Option<f64>,
}

impl EvalSummary {
    /// One metric; `None` where the task does not have it.
    pub fn get(&self, metric: Metric) -> Option<f64> {
        match metric {
            Metric::Loss => Some(self.loss),
            Metric::LogLoss => self.log_loss,
            Metric::Perplexity => self.perplexity,
            Metric::BitsPerCharacter => self.bits_per_character,
            Metric::Accuracy => self.accuracy,
            Metric::Auc => self.auc,
            Metric::F1 => self.f1,
            Metric::TopKAccuracy => self.top_k_accuracy,
            Metric::Rmse => self.rmse,
            Metric::Mae => self.mae,
            Metric::R2 => self.r2,
            Metric::HitRate => self.hit_rate,
            Metric::Ndcg => self.ndcg,
        }
    }
}

impl fmt::Display for EvalSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "loss {:.4}", self.loss)?;
        // Most losses are the same.
        if let Some(v) = self.log_loss.filter(|v| *v != self.loss) {
            write!(f, ", log loss {v:.4}")?;
        }
        for (name, value) in [("perplexity", self.perplexity), ("bits per character", self.bits_per_character)] {
            if let Some(v) = value {
                write!(f, ", {name} {v:.3}")?;
            }
        }
        if let Some(a) = self.accuracy {
            write!(f, ", accuracy {:.2}%", a * 100.0)?;
        }
        if let (Some(k), Some(a)) = (self.top_k, self.top_k_accuracy) {
            write!(f, ", top {k} {:.2}%", a * 100.0)?;
        }
        for (name, value) in
            [("AUC", self.auc), ("F1", self.f1), ("rmse", self.rmse), ("mae", self.mae), ("R2", self.r2)]
        {
            if let Some(v) = value {
                write!(f, ", {name} {v:.4}")?;
            }
        }
        if let (Some(k), Some(hit_rate), Some(ndcg)) = (self.k, self.hit_rate, self.ndcg) {
            write!(f, ", HR@{k} {:.2}%, NDCG@{k} {ndcg:.4}", hit_rate * 100.0)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
