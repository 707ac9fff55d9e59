//! Which samples belong to which partition, and which of them a step uses: pure in (seed, step, partition).

use super::DataError;
use crate::rng::{Key, Purpose};
use std::sync::Arc;

/// A data set cut into partitions, none of them empty.
#[derive(Clone, Debug)]
pub struct Partitions {
    samples: usize,
    partitions: u32,
    /// `None`: contiguous ranges.
    hashed: Option<Arc<Hashed>>,
}

/// Partition `p` holds `order[starts[p]..starts[p + 1]]`, ascending.
#[derive(Debug)]
struct Hashed {
    starts: Vec<usize>,
    order: Vec<u32>,
}

impl Partitions {
    /// Cuts `samples` samples into contiguous ranges whose sizes differ by at most one, or, with the seed `hashed`,
    /// sends each to the partition that its hash names.
    pub fn new(samples: usize, partitions: u32, hashed: Option<u64>) -> Result<Partitions, DataError> {
        if partitions == 0 {
            return Err(DataError::NoPartitions);
        }
        if samples > u32::MAX as usize {
            return Err(DataError::TooManySamples { samples });
        }
        if samples < partitions as usize {
            return Err(DataError::TooFewSamples { samples, partitions });
        }
        let hashed = hashed.map(|seed| Hashed::new(samples, partitions, seed)).transpose()?.map(Arc::new);
        Ok(Partitions { samples, partitions, hashed })
    }

    fn start(&self, p: u32) -> usize {
        match &self.hashed {
            Some(hashed) => hashed.starts[p as usize],
            None => {
                // The first `extra` partitions have one sample more.
                let (each, extra) = (self.samples / self.partitions as usize, self.samples % self.partitions as usize);
                p as usize * each + extra.min(p as usize)
            }
        }
    }

    /// The number of samples in partition `p`.
    pub fn len(&self, p: u32) -> usize {
        self.start(p + 1) - self.start(p)
    }

    /// The `i`-th sample of partition `p`, as an index into the data set.
    pub fn sample(&self, p: u32, i: usize) -> usize {
        let at = self.start(p) + i;
        self.hashed.as_ref().map_or(at, |hashed| hashed.order[at] as usize)
    }

    /// The size of the largest partition.
    pub fn largest(&self) -> usize {
        match &self.hashed {
            Some(hashed) => hashed.starts.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0),
            None => self.samples.div_ceil(self.partitions as usize),
        }
    }

    /// The positions within partition `p`'s order that a step takes, `micro_batch` (at least 1) at a time; `step` counts from
    /// the epoch's start.
    pub fn batch(&self, p: u32, step: u64, micro_batch: usize) -> std::ops::Range<usize> {
        let len = self.len(p);
        let start = (step as usize).saturating_mul(micro_batch).min(len);
        start..start.saturating_add(micro_batch).min(len)
    }

    /// Steps until the largest partition has given each of its samples, `micro_batch` (at least 1) a step.
    pub fn steps_per_epoch(&self, micro_batch: usize) -> usize {
        self.largest().div_ceil(micro_batch)
    }
}

impl Hashed {
    fn new(samples: usize, partitions: u32, seed: u64) -> Result<Hashed, DataError> {
        let key = Key::new(seed, Purpose::Partition);
        let partition = |i: u32| key.below(i as u64, partitions as u64) as usize;
        let mut starts = vec![0; partitions as usize + 1];
        for i in 0..samples as u32 {
            starts[partition(i) + 1] += 1;
        }
        if let Some(empty) = starts[1..].iter().position(|&n| n == 0) {
            return Err(DataError::EmptyPartition { partition: empty as u32, partitions, samples });
        }
        for p in 0..partitions as usize {
            starts[p + 1] += starts[p];
        }
        let mut next = starts.clone();
        let mut order = vec![0; samples];
        for i in 0..samples as u32 {
            let at = &mut next[partition(i)];
            order[*at] = i;
            *at += 1;
        }
        Ok(Hashed { starts, order })
    }
}

/// Gives each step the samples of a partition that it trains on, in an order that every epoch shuffles anew.
///
/// Each epoch gives each sample exactly once: nothing is padded or dropped. A partition that is smaller than the
/// largest has shorter or empty micro-batches at the epoch's end.
#[derive(Clone, Debug)]
pub struct Feeder {
    parts: Partitions,
    key: Key,
    micro_batch: usize,
    steps_per_epoch: u64,
    /// One a partition, made when first asked for: the epoch, and its order of the partition's samples.
    orders: Vec<Option<(u64, Vec<u32>)>>,
}

impl Feeder {
    /// A feeder of micro-batches of `micro_batch` (at least 1) samples.
    pub fn new(parts: Partitions, seed: u64, micro_batch: usize) -> Feeder {
        Feeder {
            key: Key::new(seed, Purpose::Shuffle),
            micro_batch,
            steps_per_epoch: parts.steps_per_epoch(micro_batch) as u64,
            orders: vec![None; parts.partitions as usize],
            parts,
        }
    }

    /// The epoch that `step` belongs to.
    pub fn epoch(&self, step: u64) -> u64 {
        step / self.steps_per_epoch
    }

    /// The samples that `partition` gives to `step`, as positions within the partition ([`Partitions::sample`] says where
    /// they are in the data set); allocates where the epoch is another.
    pub fn positions(&mut self, step: u64, partition: u32) -> &[u32] {
        let (epoch, step) = (self.epoch(step), step % self.steps_per_epoch);
        let (parts, key) = (&self.parts, self.key);
        let order = &mut self.orders[partition as usize];
        if order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            *order = Some((epoch, key.with(epoch).with(partition as u64).permutation(parts.len(partition))));
        }
        let rows = order.as_ref().map_or(&[][..], |(_, rows)| rows);
        &rows[parts.batch(partition, step, self.micro_batch)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cut() -> impl Strategy<Value = (usize, u32, Option<u64>)> {
        (1u32..12).prop_flat_map(|p| (p as usize..300, Just(p), any::<Option<u64>>()))
    }

    proptest! {
        #[test]
        fn partitions_cover_each_sample_once((samples, p, hashed) in cut()) {
            let parts = match Partitions::new(samples, p, hashed) {
                Err(DataError::EmptyPartition { .. }) if hashed.is_some() => return Ok(()),
                parts => parts.unwrap(),
            };
            let sizes: Vec<usize> = (0..p).map(|p| parts.len(p)).collect();
            let (least, most) = (*sizes.iter().min().unwrap(), *sizes.iter().max().unwrap());
            prop_assert!(least > 0 && most == parts.largest());
            let mut all: Vec<usize> = (0..p).flat_map(|p| (0..parts.len(p)).map(|i| parts.sample(p, i)).collect::<Vec<_>>()).collect();
            if hashed.is_none() {
                prop_assert!(most - least <= 1);
                prop_assert!(all.is_sorted());
            }
            all.sort();
            prop_assert_eq!(all, (0..samples).collect::<Vec<_>>());
        }

        #[test]
        fn each_epoch_gives_each_sample_once((samples, p, hashed) in cut(), micro_batch in 1usize..40, seed in any::<u64>(), epoch in 0u64..1000) {
            let Ok(parts) = Partitions::new(samples, p, hashed) else { return Ok(()) };
            let steps = parts.steps_per_epoch(micro_batch) as u64;
            let mut feeder = Feeder::new(parts.clone(), seed, micro_batch);
            let mut all = Vec::new();
            for step in epoch * steps..(epoch + 1) * steps {
                let mut any = false;
                for p in 0..p {
                    let rows = feeder.positions(step, p);
                    prop_assert!(rows.len() <= micro_batch);
                    any |= !rows.is_empty();
                    all.extend(rows.iter().map(|&r| parts.sample(p, r as usize) as u32));
                }
                prop_assert!(any, "a step without samples");
            }
            all.sort();
            prop_assert_eq!(all, (0..samples as u32).collect::<Vec<_>>());
        }

        #[test]
        fn a_feeder_has_no_history((samples, p, hashed) in cut(), micro_batch in 1usize..9, steps in prop::collection::vec(0u64..500, 1..20)) {
            let Ok(parts) = Partitions::new(samples, p, hashed) else { return Ok(()) };
            let mut old = Feeder::new(parts.clone(), 1, micro_batch);
            for step in steps {
                let mut new = Feeder::new(parts.clone(), 1, micro_batch);
                prop_assert_eq!(old.positions(step, p - 1), new.positions(step, p - 1));
            }
        }
    }

    #[test]
    fn epochs_partitions_and_seeds_have_their_own_order() {
        let parts = Partitions::new(200, 2, None).unwrap();
        let order = |seed, step, p| Feeder::new(parts.clone(), seed, 100).positions(step, p).to_vec();
        let first = order(1, 0, 0);
        assert!(!first.is_sorted());
        for other in [order(1, 1, 0), order(1, 0, 1), order(2, 0, 0)] {
            assert_ne!(first, other);
        }
    }

    #[test]
    fn within_an_epoch_nothing_is_allocated() {
        let mut feeder = Feeder::new(Partitions::new(100, 2, None).unwrap(), 1, 5);
        let first = feeder.positions(0, 1).as_ptr();
        for step in 1..10 {
            assert_eq!(feeder.positions(step, 1).as_ptr(), first.wrapping_add(5 * step as usize));
        }
    }

    #[test]
    fn what_cannot_be_cut_is_refused() {
        let says = |samples, p, hashed, part: &str| {
            let message = Partitions::new(samples, p, hashed).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        says(7, 8, None, "lower train.partitions to at most 7");
        says(0, 1, None, "0 samples");
        says(7, 0, None, "at least 1");
        says(u32::MAX as usize + 1, 1, None, "leave some out");
        // Eight samples in eight partitions by hash: some partition stays empty for all but 8!/8^8 of the seeds.
        says(8, 8, Some(1), "choose another seed");
    }
}
