//! Made-up clicks: numbers and ids of skewed frequencies, and a planted teacher that knows an effect of each of them.

use super::{Column, DataError, Dataset, Features, IdField, Ids, Raw, Scale, Targets, numbered};
use crate::job;
use crate::rng::{Key, Purpose};

/// The deviation of all numbers' effects together, and of all ids'.
const OF_NUMBERS: f32 = 0.5;
const OF_IDS: f32 = 1.5;

/// What decides about clicks.
pub struct Teacher<'a> {
    spec: &'a job::Clicks,
    key: Key,
}

/// The logistic function.
fn sigmoid(x: f32) -> f64 {
    1.0 / (1.0 + libm::exp(-x as f64))
}

impl<'a> Teacher<'a> {
    /// The one of a seed.
    pub fn new(seed: u64, spec: &'a job::Clicks) -> Teacher<'a> {
        Teacher { spec, key: Key::new(seed, Purpose::Synthetic).named("clicks") }
    }

    /// Appends the numbers and the ids of a sample, and gives the logit of the chance that it is clicked on.
    pub fn draw(&self, sample: u64, numbers: &mut Vec<f32>, ids: &mut Vec<u64>) -> f32 {
        let job::Clicks { numbers: wide, fields, vocabulary, zipf, .. } = *self.spec;
        let (random, effect) = (self.key.named("sample").with(sample), self.key.named("effect"));
        let (of_number, of_id) = (OF_NUMBERS / libm::sqrtf(wide.max(1) as f32), OF_IDS / libm::sqrtf(fields as f32));
        let mut logit = 0.0;
        for i in 0..wide as u64 {
            let number = random.normal(i);
            numbers.push(number);
            logit += number * effect.normal(i) * of_number;
        }
        let (random, effect) = (random.named("ids"), effect.named("ids"));
        for field in 0..fields as u64 {
            let uniform = (random.u64(field) >> 11) as f64 / (1u64 << 53) as f64;
            let id = field * vocabulary + rank(uniform, vocabulary, zipf);
            ids.push(id);
            logit += effect.normal(id) * of_id;
        }
        logit
    }

    fn split(&self, from: usize, samples: usize) -> Result<Dataset, DataError> {
        let job::Clicks { numbers: wide, fields, .. } = *self.spec;
        let too_large = || DataError::TooLarge { samples, features: wide + 2 * fields };
        let (mut numbers, mut ids, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        let all = |of: usize| samples.checked_mul(of).ok_or_else(too_large);
        numbers.try_reserve_exact(all(wide)?).map_err(|_| too_large())?;
        ids.try_reserve_exact(all(fields)?).map_err(|_| too_large())?;
        let chance = self.key.named("chance");
        for sample in (from as u64..).take(samples) {
            let logit = self.draw(sample, &mut numbers, &mut ids);
            labels.push(u32::from((chance.uniform(sample) as f64) < sigmoid(logit)));
        }
        let ids = Ids { fields, values: ids, ..Ids::default() };
        Ok(Dataset { ids, ..Dataset::new(vec![wide], Features::F32(numbers), Targets::Class(labels)) })
    }
}

/// A number below `n`, from 0 on ever rarer: the continuous form of Zipf's law, with a density of `x^-zipf`, from a uniform number.
fn rank(uniform: f64, n: u64, zipf: f64) -> u64 {
    let (n_f, rest) = (n as f64, 1.0 - zipf);
    let x = if rest > 1e-9 {
        n_f * libm::pow(uniform, 1.0 / rest)
    } else if rest > -1e-9 {
        libm::pow(n_f + 1.0, uniform) - 1.0
    } else {
        libm::pow(1.0 - uniform * (1.0 - libm::pow(n_f + 1.0, rest)), 1.0 / rest) - 1.0
    };
    (x as u64).min(n - 1)
}

/// Makes both splits; the test set's samples follow those of the training set.
pub(super) fn make(seed: u64, spec: &job::Clicks) -> Result<Raw, DataError> {
    let teacher = Teacher::new(seed, spec);
    let test = if spec.test_samples > 0 { Some(teacher.split(spec.samples, spec.test_samples)?) } else { None };
    let scale = Scale { per_feature: true, unit: 1.0 };
    let field = |i: usize| (vec![format!("id{i}")], Some(spec.vocabulary));
    let ids = IdField::all((0..spec.fields).map(field));
    // New samples are asked for by these names.
    let column = |i| Column { name: format!("number{i}"), values: None, fill: 0.0, log: false };
    let columns = (0..spec.numbers).map(column).collect();
    Ok(Raw { columns, ids, ..Raw::new(teacher.split(0, spec.samples)?, test, Some(numbered(2)), scale) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::Loss;
    use crate::metrics::{EvalKind, EvalSums};
    use ndarray::ArrayView2;

    #[test]
    fn ids_are_as_skewed_as_was_said() {
        for (zipf, n) in [(0.0, 1000), (0.75, 20_000), (1.0, 50_000), (1.3, 10_000_000u64)] {
            let key = Key::new(3, Purpose::Synthetic);
            let draws: Vec<u64> = (0..200_000).map(|i| rank(key.uniform(i) as f64, n, zipf)).collect();
            let share = |k: u64| draws.iter().filter(|id| **id < k).count() as f64 / draws.len() as f64;
            let rest = 1.0 - zipf;
            for k in [1, 10, 1000] {
                let want = if zipf == 1.0 {
                    ((k + 1) as f64).ln() / ((n + 1) as f64).ln()
                } else if zipf < 1.0 {
                    (k as f64 / n as f64).powf(rest)
                } else {
                    (1.0 - ((k + 1) as f64).powf(rest)) / (1.0 - ((n + 1) as f64).powf(rest))
                };
                assert!((share(k) - want).abs() < 0.005, "{zipf} {n}: {} of {k}, not {want}", share(k));
            }
            assert!(draws.iter().all(|id| *id < n));
        }
    }

    /// What the example's first lines say, and what its run in `.ci/run` is held against.
    #[test]
    fn the_teacher_of_the_example_has_the_auc_that_it_says() {
        let example = include_str!("../../../examples/clicks.toml");
        let text = job::JobText { file: String::new(), base: String::new(), toml: example.into(), overrides: vec![] };
        let job = job::parse(text).unwrap();
        let job::Source::Clicks(spec) = &job.data.source else { panic!("clicks") };
        let teacher = Teacher::new(job.seed, spec);
        let test = teacher.split(spec.samples, spec.test_samples).unwrap();
        let samples = spec.samples as u64..(spec.samples + spec.test_samples) as u64;
        let logits: Vec<f32> = samples.map(|i| teacher.draw(i, &mut Vec::new(), &mut Vec::new())).collect();
        let mut sums = EvalSums::new(EvalKind::Binary);
        let loss = Loss::new(&job.train.loss, 1).unwrap();
        sums.add_batch(&loss, ArrayView2::from_shape((logits.len(), 1), &logits).unwrap(), &test.targets, &[]);
        let auc = sums.summary().auc.unwrap();
        assert!(example.contains("AUC of 0.8241") && (auc - 0.8241).abs() < 0.0005, "{auc}");
    }

    #[test]
    fn clicks_are_as_likely_as_the_teacher_says() {
        let spec =
            job::Clicks { numbers: 3, fields: 4, vocabulary: 100, zipf: 0.75, samples: 20_000, test_samples: 10 };
        let raw = make(5, &spec).unwrap();
        let Targets::Class(labels) = &raw.train.targets else { panic!() };
        let teacher = Teacher::new(5, &spec);
        let mut bins = [(0.0, 0.0, 0.0); 5];
        for (sample, label) in labels.iter().enumerate() {
            let chance = sigmoid(teacher.draw(sample as u64, &mut Vec::new(), &mut Vec::new()));
            let bin = &mut bins[((chance * 5.0) as usize).min(4)];
            *bin = (bin.0 + 1.0, bin.1 + chance, bin.2 + *label as f64);
        }
        for (n, chance, clicks) in bins {
            assert!(n > 500.0 && ((chance - clicks) / n).abs() < 0.05, "{n} {chance} {clicks}");
        }
        // The test set is what follows, and each field has ids of its own.
        let longer = make(5, &job::Clicks { samples: 20_010, test_samples: 0, ..spec.clone() }).unwrap();
        assert_eq!(raw.test.unwrap(), longer.train.select(&(20_000..20_010).collect::<Vec<_>>()));
        for (i, id) in raw.train.ids.values.iter().enumerate() {
            assert!((100 * (i as u64 % 4)..100 * (i as u64 % 4 + 1)).contains(id));
        }
        assert_eq!((raw.train.ids.fields, raw.columns.len()), (raw.ids.len(), 3));
    }
}
