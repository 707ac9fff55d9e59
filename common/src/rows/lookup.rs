//! Which rows a batch asks for.

use super::{NO_ID, key};

/// The place of an id that has no row.
pub const NOWHERE: u32 = u32::MAX;

/// The rows of a batch, each once and in the order of their keys, and for which of its ids each of them is.
#[derive(Clone, Debug, Default)]
pub struct Lookups {
    keys: Vec<u64>,
    /// For each id of the batch the place of its row among `keys`, or [`NOWHERE`].
    places: Vec<u32>,
    /// The ids of row `i`: `of_rows[starts[i]..starts[i + 1]]`, ascending.
    starts: Vec<u32>,
    of_rows: Vec<u32>,
    /// Memory to sort in.
    sorted: Vec<(u64, u32)>,
    ends: Vec<u32>,
}

/// Where the keys of a bucket are this many, they may be sorted as anything else is.
const MANY: usize = 24;

impl Lookups {
    /// Those of no ids.
    pub const fn none() -> Lookups {
        Lookups {
            keys: Vec::new(),
            places: Vec::new(),
            starts: Vec::new(),
            of_rows: Vec::new(),
            sorted: Vec::new(),
            ends: Vec::new(),
        }
    }

    /// Finds the rows of `ids`; takes memory only where there was no batch as large.
    pub fn plan(&mut self, ids: &[u64]) {
        self.sort(ids);
        self.keys.clear();
        self.starts.clear();
        self.of_rows.clear();
        self.places.clear();
        self.places.resize(ids.len(), NOWHERE);
        for &(key, at) in &self.sorted {
            if self.keys.last() != Some(&key) {
                self.keys.push(key);
                self.starts.push(self.of_rows.len() as u32);
            }
            self.places[at as usize] = self.keys.len() as u32 - 1;
            self.of_rows.push(at);
        }
        self.starts.push(self.of_rows.len() as u32);
    }

    /// Keys and places of the ids, sorted: by the keys' first bits into as many buckets as there are ids, then in each bucket.
    fn sort(&mut self, ids: &[u64]) {
        let bits = ids.len().next_power_of_two().trailing_zeros().clamp(1, 24);
        let bucket = |key: u64| (key >> (64 - bits)) as usize;
        let some = || ids.iter().enumerate().filter(|(_, id)| **id != NO_ID).map(|(at, id)| (key(*id), at as u32));
        self.ends.clear();
        self.ends.resize((1 << bits) + 1, 0);
        some().for_each(|(key, _)| self.ends[bucket(key) + 1] += 1);
        let mut sum = 0;
        for end in &mut self.ends {
            sum += *end;
            *end = sum;
        }
        self.sorted.clear();
        self.sorted.resize(sum as usize, (0, 0));
        // Each bucket's entry is where its next pair goes, so that in the end it is the bucket's end.
        for (key, at) in some() {
            let next = &mut self.ends[bucket(key)];
            self.sorted[*next as usize] = (key, at);
            *next += 1;
        }
        let mut start = 0;
        for &end in &self.ends[..1 << bits] {
            let pairs = &mut self.sorted[start..end as usize];
            start = end as usize;
            if pairs.len() > MANY && !pairs.is_sorted() {
                pairs.sort_unstable();
            } else {
                for i in 1..pairs.len() {
                    let mut j = i;
                    while j > 0 && pairs[j - 1].0 > pairs[j].0 {
                        pairs.swap(j - 1, j);
                        j -= 1;
                    }
                }
            }
        }
    }

    /// The rows' keys, ascending.
    pub fn keys(&self) -> &[u64] {
        &self.keys
    }

    /// For each id the place of its row among the keys, or [`NOWHERE`].
    pub fn places(&self) -> &[u32] {
        &self.places
    }

    /// The ids of the batch, by their places in it, that row `i` is for; ascending.
    pub fn of_row(&self, i: usize) -> &[u32] {
        &self.of_rows[self.starts[i] as usize..self.starts[i + 1] as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn each_row_is_there_once_with_all_its_ids(batches in prop::collection::vec(
            prop::collection::vec(prop_oneof![0u64..5, 0u64..1000, any::<u64>(), Just(NO_ID)], 0..300), 1..3)) {
            let mut lookups = Lookups::default();
            for ids in batches {
                lookups.plan(&ids);
                let mut want: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
                for (at, id) in ids.iter().enumerate().filter(|(_, id)| **id != NO_ID) {
                    want.entry(key(*id)).or_default().push(at as u32);
                }
                prop_assert_eq!(lookups.keys(), want.keys().copied().collect::<Vec<_>>());
                for (i, at) in want.values().enumerate() {
                    prop_assert_eq!(lookups.of_row(i), at);
                    prop_assert!(at.iter().all(|at| lookups.places()[*at as usize] == i as u32));
                }
                let nowhere = lookups.places().iter().filter(|place| **place == NOWHERE).count();
                prop_assert_eq!(nowhere, ids.iter().filter(|id| **id == NO_ID).count());
                prop_assert_eq!(lookups.places().len(), ids.len());
            }
        }
    }
}
