//! Made-up ratings: what users say of items, from planted vectors and biases, and noise.

use super::{DataError, Dataset, Features, IdField, Ids, Raw, Scale, Targets};
use crate::job;
use crate::rng::{Key, Purpose};

/// The deviation of users' and of items' biases.
const BIAS: f32 = 0.3;

/// The mean of all ratings.
const MEAN: f32 = 3.5;

/// `mean + b_u + b_i + p_u . q_i + noise`, with products of a deviation of 1.
fn rating(key: Key, spec: &job::Ratings, sample: u64) -> (u64, u64, f32) {
    let random = key.named("sample").with(sample);
    let (user, item) = (random.below(0, spec.users), random.below(1, spec.items));
    let of = |who: &str, id: u64| key.named(who).with(id);
    let (of_user, of_item) = (of("user", user), of("item", item));
    let scale = 1.0 / libm::sqrtf(spec.rank as f32);
    let product: f32 = (1..=spec.rank as u64).map(|f| of_user.normal(f) * of_item.normal(f)).sum();
    let noise = spec.noise * random.named("noise").normal(0);
    (user, item, MEAN + BIAS * (of_user.normal(0) + of_item.normal(0)) + product * scale + noise)
}

fn split(key: Key, spec: &job::Ratings, from: usize, samples: usize) -> Result<Dataset, DataError> {
    let too_large = || DataError::TooLarge { samples, features: 5 };
    let (mut ids, mut values): (Vec<u64>, Vec<f32>) = Default::default();
    ids.try_reserve_exact(samples.checked_mul(2).ok_or_else(too_large)?).map_err(|_| too_large())?;
    values.try_reserve_exact(samples).map_err(|_| too_large())?;
    for sample in (from as u64..).take(samples) {
        let (user, item, rating) = rating(key, spec, sample);
        ids.extend([user, spec.users + item]);
        values.push(rating);
    }
    let features = Features::F32(vec![0.0; samples]); // none, of which a model takes one
    Ok(Dataset {
        shape: vec![1],
        features,
        ids: Ids { fields: 2, values: ids, ..Ids::default() },
        targets: Targets::Value(values),
    })
}

/// Makes both splits; the test set's samples follow those of the training set.
pub(super) fn make(seed: u64, spec: &job::Ratings) -> Result<Raw, DataError> {
    let key = Key::new(seed, Purpose::Synthetic).named("ratings");
    let test = if spec.test_samples > 0 { Some(split(key, spec, spec.samples, spec.test_samples)?) } else { None };
    let fields = [("user", spec.users), ("item", spec.items)];
    let ids = IdField::all(fields.into_iter().map(|(name, size)| (vec![name.into()], Some(size))));
    let scale = Scale { per_feature: true, unit: 1.0 };
    Ok(Raw { ids, ..Raw::new(split(key, spec, 0, spec.samples)?, test, None, scale) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratings_are_of_the_deviations_that_were_said() {
        let spec = job::Ratings { users: 300, items: 200, rank: 3, noise: 0.5, samples: 40_000, test_samples: 10 };
        let raw = make(5, &spec).unwrap();
        let Targets::Value(values) = &raw.train.targets else { panic!() };
        let mean = values.iter().map(|v| *v as f64).sum::<f64>() / 4e4;
        let variance = values.iter().map(|v| (*v as f64 - mean).powi(2)).sum::<f64>() / 4e4;
        // Of the vectors there are few: their products' deviation is 1 only nearly.
        let want = 0.5 * 0.5 + 2.0 * (BIAS as f64).powi(2) + 1.0;
        assert!((mean - MEAN as f64).abs() < 0.15 && (variance / want - 1.0).abs() < 0.15, "{mean} {variance} {want}");
        for ids in raw.train.ids.values.chunks(2) {
            assert!(ids[0] < 300 && (300..500).contains(&ids[1]));
        }
        let longer = make(5, &job::Ratings { samples: 40_010, test_samples: 0, ..spec }).unwrap();
        assert_eq!(raw.test.unwrap(), longer.train.select(&(40_000..40_010).collect::<Vec<_>>()));
    }
}
