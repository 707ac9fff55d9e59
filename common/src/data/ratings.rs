//! Made-up ratings: what users say of items, or which they take, from planted vectors and biases, and noise.

use super::implicit::MOST_ITEMS;
use super::{DataError, Dataset, IdField, Raw, Scale, Seen, Targets};
use crate::job;
use crate::rng::{Key, Purpose};

/// The deviation of users' and of items' biases.
const BIAS: f32 = 0.3;

/// The mean of all ratings.
const MEAN: f32 = 3.5;

/// Pairs of users and items that are looked at to find what users take, at most.
const MOST_PAIRS: u64 = 1 << 32;

/// What is planted of one user or item: a bias, and a vector of `rank` values.
fn planted(key: Key, who: &str, id: u64, rank: usize) -> (f32, Vec<f32>) {
    let of = key.named(who).with(id);
    (BIAS * of.normal(0), (1..=rank as u64).map(|f| of.normal(f)).collect())
}

/// How a user likes all items: `b_i + p_u . q_i`, with products of a deviation of 1; `items` as [`planted`] gives them.
fn liking(user: &(f32, Vec<f32>), items: &[(f32, Vec<f32>)]) -> Vec<f32> {
    let scale = 1.0 / libm::sqrtf(user.1.len() as f32);
    let product = |item: &Vec<f32>| user.1.iter().zip(item).map(|(p, q)| p * q).sum::<f32>();
    items.iter().map(|(bias, item)| bias + scale * product(item)).collect()
}

/// What users take: each as many different items as any other (or one more), drawn one after another with a chance that grows with
/// `e^(liking / noise)`, and for a test one more, which is any of these.
fn taken(key: Key, spec: &job::Ratings, implicit: job::Implicit) -> Result<Raw, DataError> {
    let job::Ratings { users, items, rank, noise, samples, test_samples, .. } = *spec;
    let wrong = |what, key| Err(DataError::Synthetic { what, key });
    if items > MOST_ITEMS as u64 || users.saturating_mul(items) > MOST_PAIRS {
        return wrong(
            "at most 16777216 items, and 4294967296 pairs of a user and an item, where users take items",
            "items",
        );
    }
    if test_samples as u64 > users {
        return wrong("at most one sample of each user to test on", "test_samples");
    }
    if (samples as u64).div_ceil(users) + 2 > items {
        return wrong("fewer samples, so that each user leaves at least one item", "samples");
    }
    let of_items: Vec<_> = (0..items).map(|item| planted(key, "item", item, rank)).collect();
    let (mut train, mut test) = (Vec::new(), Vec::new());
    let take = key.named("take");
    for user in 0..users {
        let random = take.with(user);
        let tested = user < test_samples as u64;
        let count = samples as u64 / users + u64::from(user < samples as u64 % users) + u64::from(tested);
        // The largest of these are a draw without replacement (Gumbel-top-k: Kool et al., 2019).
        let gumbel = |item: u64| {
            let uniform = ((random.u64(item) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
            -libm::log(-libm::log(uniform))
        };
        let liking = liking(&planted(key, "user", user, rank), &of_items).into_iter().zip(0..items);
        let mut best: Vec<(f64, u64)> =
            liking.map(|(liking, item)| (liking as f64 + noise as f64 * gumbel(item), item)).collect();
        best.select_nth_unstable_by(count as usize, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut took: Vec<u64> = best[..count as usize].iter().map(|(_, item)| *item).collect();
        took.sort_unstable();
        if tested {
            test.extend([user, users + took.swap_remove(random.named("test").below(0, count) as usize)]);
        }
        train.extend(took.iter().flat_map(|item| [user, users + item]));
    }
    let seen = Seen::new(train.chunks_exact(2).map(|ids| (ids[0], (ids[1] - users) as u32)).collect());
    let candidates = implicit.among(items as u32, &seen);
    let targets = Targets::Seen(seen.into());
    let dataset = |ids| Dataset::pairs(ids, targets.clone());
    let scale = Scale { per_feature: true, unit: 1.0 };
    let test = (!test.is_empty()).then(|| dataset(test));
    let raw = Raw::new(dataset(train), test, None, scale);
    Ok(Raw { ids: fields(spec), implicit: Some(candidates), ..raw })
}

fn fields(spec: &job::Ratings) -> Vec<IdField> {
    let fields = [("user", spec.users), ("item", spec.items)];
    IdField::all(fields.into_iter().map(|(name, size)| (vec![name.into()], Some(size))))
}

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
    Ok(Dataset::pairs(ids, Targets::Value(values)))
}

/// Makes both splits; the test set's samples follow those of the training set.
pub(super) fn make(seed: u64, spec: &job::Ratings) -> Result<Raw, DataError> {
    let key = Key::new(seed, Purpose::Synthetic).named("ratings");
    if let Some(implicit) = spec.implicit {
        return taken(key, spec, implicit);
    }
    let test = if spec.test_samples > 0 { Some(split(key, spec, spec.samples, spec.test_samples)?) } else { None };
    let scale = Scale { per_feature: true, unit: 1.0 };
    Ok(Raw { ids: fields(spec), ..Raw::new(split(key, spec, 0, spec.samples)?, test, None, scale) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_take_what_they_like_and_are_tested_on_something_else() {
        let implicit = job::Implicit { negatives: 2, threshold: None, eval_negatives: None, k: 10 };
        let spec = job::Ratings {
            users: 50,
            items: 40,
            rank: 3,
            noise: 0.5,
            samples: 520,
            test_samples: 20,
            implicit: Some(implicit),
        };
        let raw = make(5, &spec).unwrap();
        let Targets::Seen(seen) = &raw.train.targets else { panic!() };
        assert_eq!((raw.train.samples(), raw.test.as_ref().unwrap().samples()), (520, 20));
        for user in 0..50 {
            assert_eq!(seen.of(user).len(), 10 + usize::from(user < 20), "{user}");
        }
        for ids in raw.train.ids.values.chunks(2) {
            assert!(seen.of(ids[0]).contains(&((ids[1] - 50) as u32)));
        }
        let key = Key::new(5, Purpose::Synthetic).named("ratings");
        let items: Vec<_> = (0..40).map(|item| planted(key, "item", item, 3)).collect();
        // How many of the others somebody likes better than what was taken; of chance, half of them.
        let better = |ids: &[u64]| {
            let liking = liking(&planted(key, "user", ids[0], 3), &items);
            liking.iter().filter(|other| **other > liking[(ids[1] - 50) as usize]).count()
        };
        let test = &raw.test.unwrap().ids.values;
        for ids in test.chunks(2) {
            assert!(!seen.of(ids[0]).contains(&((ids[1] - 50) as u32)));
        }
        let mean = |ids: &[u64]| ids.chunks(2).map(better).sum::<usize>() as f64 / (ids.len() / 2) as f64;
        let (train, test) = (mean(&raw.train.ids.values), mean(test));
        assert!(train < 10.0 && (train - test).abs() < 3.0, "{train} {test}");
        let greedy = job::Ratings { noise: 0.0, test_samples: 0, samples: 500, ..spec };
        assert_eq!(mean(&make(5, &greedy).unwrap().train.ids.values), 4.5, "without noise, the best ten");
        for wrong in [
            job::Ratings { items: 1 << 25, ..greedy.clone() },
            job::Ratings { test_samples: 51, ..greedy.clone() },
            job::Ratings { samples: 39 * 50, ..greedy },
        ] {
            assert!(matches!(make(5, &wrong), Err(DataError::Synthetic { .. })), "{wrong:?}");
        }
    }

    /// The figures that examples/implicit.toml is held against.
    #[test]
    fn the_example_is_between_what_is_popular_and_what_was_planted() {
        let toml = include_str!("../../../examples/implicit.toml").into();
        let text = job::JobText { file: "implicit.toml".into(), base: ".".into(), toml, overrides: vec![] };
        let example = job::parse(text).unwrap();
        let job::Source::Ratings(spec) = &example.data.source else { panic!() };
        let raw = make(example.seed, spec).unwrap();
        let Targets::Seen(seen) = &raw.train.targets else { panic!() };
        let key = Key::new(example.seed, Purpose::Synthetic).named("ratings");
        let items: Vec<_> = (0..spec.items).map(|item| planted(key, "item", item, spec.rank)).collect();
        let mut popular = vec![0.0; items.len()];
        raw.train.ids.values.chunks(2).for_each(|ids| popular[(ids[1] - spec.users) as usize] += 1.0);
        let (mut by_liking, mut by_popularity) = (0, 0);
        for ids in raw.test.as_ref().unwrap().ids.values.chunks(2) {
            let (own, seen) = ((ids[1] - spec.users) as usize, seen.of(ids[0]));
            let hit = |scores: &[f32]| {
                let before = (0..items.len()).filter(|i| scores[*i] > scores[own] && !seen.contains(&(*i as u32)));
                u64::from(before.count() < 10)
            };
            by_liking += hit(&liking(&planted(key, "user", ids[0], spec.rank), &items));
            by_popularity += hit(&popular);
        }
        let share = |hits: u64| (1000.0 * hits as f64 / spec.test_samples as f64).round() / 10.0;
        assert_eq!((share(by_liking), share(by_popularity)), (65.1, 9.2), "as the example says");
    }

    #[test]
    fn ratings_are_of_the_deviations_that_were_said() {
        let spec = job::Ratings {
            users: 300,
            items: 200,
            rank: 3,
            noise: 0.5,
            samples: 40_000,
            test_samples: 10,
            implicit: None,
        };
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
