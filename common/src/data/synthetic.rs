//! Samples made from a seed, for measuring; a planted linear teacher decides the targets, so that a loss can fall.

use super::text::windows;
use super::{DataError, Dataset, Features, Raw, Scale, Targets, Tokens, numbered};
use crate::job::Task;
use crate::rng::{Key, Purpose};

/// The teacher reads at most so many features, evenly spaced: large images stay cheap to label.
const TEACHER_READS: usize = 256;

/// The deviation of the noise on values; the teacher's own deviation is about 1.
const NOISE: f32 = 0.1;

struct Teacher {
    /// The features it reads.
    reads: Vec<usize>,
    /// `(reads, outputs)`.
    weights: Vec<f32>,
    outputs: usize,
}

impl Teacher {
    fn new(key: Key, features: usize, outputs: usize) -> Teacher {
        let count = features.min(TEACHER_READS);
        let reads = (0..count).map(|i| (i as u128 * features as u128 / count as u128) as usize).collect();
        let scale = (1.0 / libm::sqrt(count as f64)) as f32;
        let weights = (0..(count * outputs) as u64).map(|i| key.normal(i) * scale).collect();
        Teacher { reads, weights, outputs }
    }

    /// `out = x . W`, summed in the order of the features.
    fn answer(&self, x: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        for (&feature, weights) in self.reads.iter().zip(self.weights.chunks_exact(self.outputs)) {
            for (out, weight) in out.iter_mut().zip(weights) {
                *out += x[feature] * weight;
            }
        }
    }
}

/// A nearly normal number of mean 0 and deviation 1 from 32 random bits: the sum of their four bytes, exact up to the
/// last multiplication.
#[inline(always)]
fn nearly_normal(bits: u32) -> f32 {
    // Pairs of bytes, then both pairs: each byte has mean 127.5 and variance (256^2 - 1) / 12.
    let pairs = (bits & 0x00ff_00ff) + ((bits >> 8) & 0x00ff_00ff);
    let sum = (pairs & 0xffff) + (pairs >> 16);
    (sum as i32 - 510) as f32 * 0.006_765_875
}

fn split(
    key: Key,
    task: Task,
    shape: &[usize],
    classes: usize,
    from: usize,
    samples: usize,
) -> Result<Dataset, DataError> {
    let width: usize = shape.iter().product();
    let too_large = || DataError::TooLarge { samples, features: width };
    let mut x: Vec<f32> = Vec::new();
    x.try_reserve_exact(samples.checked_mul(width).ok_or_else(too_large)?).map_err(|_| too_large())?;
    let outputs = match task {
        Task::Classification => classes,
        Task::Regression => 1,
    };
    let teacher = Teacher::new(key.named("teacher"), width, outputs);
    let (features, noise) = (key.named("features"), key.named("noise"));
    let mut answer = vec![0.0; outputs];
    let (mut labels, mut values) = (Vec::new(), Vec::new());
    for sample in (from..).take(samples) {
        let draw = features.with(sample as u64);
        let start = x.len();
        x.extend((0..width as u32).map(|f| nearly_normal(draw.u32_fast(f))));
        teacher.answer(&x[start..], &mut answer);
        match task {
            Task::Classification => {
                let best = (1..outputs).fold(0, |best, c| if answer[c] > answer[best] { c } else { best });
                labels.push(best as u32);
            }
            Task::Regression => values.push(answer[0] + NOISE * noise.normal(sample as u64)),
        }
    }
    let targets = match task {
        Task::Classification => Targets::Class(labels),
        Task::Regression => Targets::Value(values),
    };
    Ok(Dataset::new(shape.to_vec(), Features::F32(x), targets))
}

/// Makes both splits; the test set's samples follow those of the training set.
pub(super) fn make(
    seed: u64,
    task: Task,
    shape: &[usize],
    classes: usize,
    samples: usize,
    test_samples: usize,
) -> Result<Raw, DataError> {
    let need = |what, key| Err(DataError::Synthetic { what, key });
    match shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) {
        Some(0) => return need("at least one feature", "shape"),
        Some(features) if !shape.is_empty() && features <= u32::MAX as usize => {}
        _ => return need("a shape of at most 4,294,967,295 features", "shape"),
    }
    if samples == 0 {
        return need("at least one sample", "samples");
    }
    if task == Task::Classification && classes < 2 {
        return need("at least two classes", "classes");
    }
    let key = Key::new(seed, Purpose::Synthetic);
    let make = |from, samples| split(key, task, shape, classes, from, samples);
    let test = if test_samples > 0 { Some(make(samples, test_samples)?) } else { None };
    let classes = (task == Task::Classification).then(|| numbered(classes));
    Ok(Raw::new(make(0, samples)?, test, classes, Scale { per_feature: true, unit: 1.0 }))
}

/// Makes windows of `context` tokens of a made-up language: half of its tokens are a function of the two before them, the
/// others are any.
pub(super) fn text(
    seed: u64,
    vocabulary: usize,
    context: usize,
    samples: usize,
    test_samples: usize,
) -> Result<Raw, DataError> {
    let too_large = || DataError::TooLarge { samples, features: context };
    let all = samples.checked_add(test_samples).and_then(|n| n.checked_add(2)?.checked_mul(context));
    let mut tokens: Vec<u32> = Vec::new();
    tokens.try_reserve_exact(all.ok_or_else(too_large)?).map_err(|_| too_large())?;
    let key = Key::new(seed, Purpose::Synthetic);
    let (rule, noise) = (key.named("rule"), key.named("noise"));
    let (mut before, mut last) = (0, 0);
    for i in 0..tokens.capacity().min(all.unwrap_or(0)) as u64 {
        let of = |key: Key, i: u64| key.below(i, vocabulary as u64) as u32;
        let token =
            if noise.u64(i) & 1 == 0 { of(rule.with(before as u64).with(last as u64), 0) } else { of(noise, i) };
        (before, last) = (last, token);
        tokens.push(token);
    }
    let (train, test) = tokens.split_at((samples + 1) * context);
    let test = (test_samples > 0).then(|| windows(test, vocabulary, context, true));
    let scale = Scale { per_feature: false, unit: 1.0 };
    let tokens = Some(Tokens { tokenizer: None, vocabulary, tokens_per_character: 1.0, column: None });
    Ok(Raw { tokens, ..Raw::new(windows(train, vocabulary, context, true), test, None, scale) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(set: &Dataset) -> &[f32] {
        let Features::F32(x) = &set.features else { panic!() };
        x
    }

    #[test]
    fn features_are_nearly_normal_and_uncorrelated() {
        let set = make(3, Task::Classification, &[20], 4, 5000, 0).unwrap().train;
        let x = features(&set);
        let moment = |k: i32| x.iter().map(|x| x.powi(k) as f64).sum::<f64>() / x.len() as f64;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.02 && moment(3).abs() < 0.04);
        for (a, b) in [(0, 1), (0, 19), (7, 8), (3, 13)] {
            let r: f64 = x.chunks(20).map(|row| (row[a] * row[b]) as f64).sum::<f64>() / 5000.0;
            assert!(r.abs() < 0.06, "features {a} and {b}: {r}");
        }
        let r: f64 = x.windows(21).map(|w| (w[0] * w[20]) as f64).sum::<f64>() / x.len() as f64;
        assert!(r.abs() < 0.02, "samples: {r}");
    }

    #[test]
    fn classes_are_all_used_and_known_to_the_teacher() {
        let raw = make(3, Task::Classification, &[3, 4, 5], 7, 2000, 0).unwrap();
        let Targets::Class(labels) = &raw.train.targets else { panic!() };
        for c in 0..7 {
            assert!(labels.iter().filter(|l| **l == c).count() > 100);
        }
        // Class means of the features differ far more than those of as many random groups would (about 60 / 286).
        let mut means = vec![0.0f64; 7 * 60];
        let mut counts = [0.0f64; 7];
        for (row, &c) in features(&raw.train).chunks(60).zip(labels) {
            counts[c as usize] += 1.0;
            row.iter().enumerate().for_each(|(f, &x)| means[c as usize * 60 + f] += x as f64);
        }
        for c in 0..7 {
            let length: f64 = means[c * 60..][..60].iter().map(|m| (m / counts[c]).powi(2)).sum();
            assert!(length > 0.8, "{c}: {length}");
        }
        assert_eq!(raw.train.shape, [3, 4, 5]);
    }

    #[test]
    fn values_are_the_teachers_with_little_noise() {
        let set = make(3, Task::Regression, &[6], 0, 4000, 0).unwrap().train;
        let Targets::Value(y) = &set.targets else { panic!() };
        let teacher = Teacher::new(Key::new(3, Purpose::Synthetic).named("teacher"), 6, 1);
        let mut squares = 0.0;
        for (x, y) in features(&set).chunks(6).zip(y) {
            let mut answer = [0.0];
            teacher.answer(x, &mut answer);
            squares += (y - answer[0]).powi(2) / 4000.0;
        }
        assert!((squares.sqrt() - NOISE).abs() < 0.01, "{squares}");
    }

    #[test]
    fn the_test_set_is_what_follows() {
        let longer = make(5, Task::Classification, &[4], 3, 30, 0).unwrap();
        let raw = make(5, Task::Classification, &[4], 3, 20, 10).unwrap();
        assert_eq!(raw.test.unwrap(), longer.train.select(&(20..30).collect::<Vec<_>>()));
        assert_eq!(raw.train, longer.train.select(&(0..20).collect::<Vec<_>>()));
        assert!(longer.test.is_none());
        assert_ne!(make(6, Task::Classification, &[4], 3, 20, 0).unwrap().train, raw.train);
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        let says = |shape: &[usize], classes, samples, part: &str| {
            let message =
                make(1, Task::Classification, shape, classes, samples, 0).err().expect("an error").to_string();
            assert!(message.contains(part), "{message}");
        };
        says(&[3, 0], 2, 10, "data.shape");
        says(&[], 2, 10, "data.shape");
        says(&[usize::MAX, 2], 2, 10, "data.shape");
        says(&[3], 1, 10, "data.classes");
        says(&[3], 2, 0, "data.samples");
        says(&[1 << 30], 2, usize::MAX / 2, "memory");
        says(&[1 << 30], 2, 1 << 32, "memory");
    }
}
