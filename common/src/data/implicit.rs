//! Implicit feedback: what users took, and items that they did not take, drawn beside it.
//!
//! A sample is a user and an item that the user took. In a batch it is several rows, its candidates: first its own item, whose
//! target is 1, then items that the user has nothing to do with in the training set, whose targets are 0. Which they are is a
//! function of the seed, the epoch and the sample's number, so whoever makes a batch has to know what its users have: a data
//! set's targets are that ([`Seen`]), and travel with the samples.

use super::DataError;
use super::dataset::{take, take_size};
use crate::rng::Key;
use serde::{Deserialize, Serialize};

/// Items of a catalogue, at most.
pub(super) const MOST_ITEMS: usize = 1 << 24;

/// Which items some users have in the training set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// Their ids, ascending.
    users: Vec<u64>,
    /// Where the items of each end.
    ends: Vec<usize>,
    /// Those of user `i`, ascending: `items[ends[i - 1]..ends[i]]`.
    items: Vec<u32>,
}

impl Seen {
    /// From pairs of users' ids and items, in any order and as often as they like.
    pub fn new(mut pairs: Vec<(u64, u32)>) -> Seen {
        pairs.sort_unstable();
        pairs.dedup();
        let mut seen = Seen { items: pairs.iter().map(|(_, item)| *item).collect(), ..Seen::default() };
        for (at, (user, _)) in pairs.iter().enumerate() {
            if seen.users.last() != Some(user) {
                seen.users.push(*user);
                seen.ends.push(at);
            }
            seen.ends[seen.users.len() - 1] = at + 1;
        }
        seen
    }

    /// What a user has, ascending; nothing where the user is not known.
    pub fn of(&self, user: u64) -> &[u32] {
        self.users.binary_search(&user).map_or(&[], |at| self.at(at))
    }

    fn at(&self, at: usize) -> &[u32] {
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.items[start..self.ends[at]]
    }

    /// The part of some users.
    pub(super) fn select(&self, users: impl Iterator<Item = u64>) -> Seen {
        let mut users: Vec<u64> = users.collect();
        users.sort_unstable();
        users.dedup();
        let mut seen = Seen::default();
        for user in users {
            let items = self.of(user);
            if !items.is_empty() {
                seen.users.push(user);
                seen.items.extend_from_slice(items);
                seen.ends.push(seen.items.len());
            }
        }
        seen
    }

    /// How many users and items there are (`u64`); users (`u64`), ends (`u64`), items (`u32`).
    pub(super) fn encode(&self, put: &mut impl FnMut(&[u8])) {
        for size in [self.users.len(), self.items.len()] {
            put(&(size as u64).to_le_bytes());
        }
        self.users.iter().for_each(|user| put(&user.to_le_bytes()));
        self.ends.iter().for_each(|end| put(&(*end as u64).to_le_bytes()));
        self.items.iter().for_each(|item| put(&item.to_le_bytes()));
    }

    /// Bytes of what so many users and items are encoded as.
    pub fn encoded_len(users: u64, items: u64) -> u64 {
        16 + 16 * users + 4 * items
    }

    /// What [`Seen::encode`] gave, from the front of `rest`, which may hold anything.
    pub(super) fn decode(rest: &mut &[u8]) -> Result<Seen, DataError> {
        let (users, items) = (take_size(rest)?, take_size(rest)?);
        let words = |rest: &mut &[u8]| -> Result<Vec<u64>, DataError> {
            Ok(take(rest, users.checked_mul(8))?.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect())
        };
        let (users, ends) = (words(rest)?, words(rest)?);
        let ends = ends.into_iter().map(usize::try_from).collect::<Result<Vec<usize>, _>>();
        let ends = ends.map_err(|_| DataError::Encoded("a size is too large"))?;
        let items =
            take(rest, items.checked_mul(4))?.as_chunks().0.iter().map(|item| u32::from_le_bytes(*item)).collect();
        let seen = Seen { users, ends, items };
        let ascending = |values: &[u32]| values.is_sorted_by(|a, b| a < b);
        let sound = seen.users.is_sorted_by(|a, b| a < b)
            && seen.ends.is_sorted_by(|a, b| a < b)
            && seen.ends.first() != Some(&0)
            && seen.ends.last().copied().unwrap_or(0) == seen.items.len()
            && (0..seen.users.len()).all(|at| ascending(seen.at(at)));
        if sound { Ok(seen) } else { Err(DataError::Encoded("what users have is out of order")) }
    }

    /// How many pairs of a user and an item there are.
    pub(super) fn pairs(&self) -> u64 {
        self.items.len() as u64
    }

    /// Whether all items are among the first `items`, of which no user has every one.
    pub(super) fn fits(&self, items: u32) -> bool {
        (0..self.users.len()).all(|at| self.at(at).last() < Some(&items) && self.at(at).len() < items as usize)
    }
}

/// What becomes of samples of implicit feedback: kept with what is learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidates {
    /// How many items there are; their ids follow one another.
    pub items: u32,
    /// Different pairs of a user and an item in the training set.
    pub pairs: u64,
    /// Items that are drawn beside a sample's own, in training.
    pub negatives: u32,
    /// Those of a test; `None`: all that the user does not have.
    pub tested: Option<u32>,
    /// Places that the metrics look at.
    pub k: u32,
}

impl Candidates {
    /// Rows of a sample in a batch, at most.
    pub fn rows(&self, test: bool) -> usize {
        let others = self.items.saturating_sub(1);
        1 + if test { self.tested.map_or(others, |tested| tested.min(others)) } else { self.negatives } as usize
    }

    /// The items beside a sample's own, `item`, of a user who has `seen` (ascending). In training each is drawn among all others that the
    /// user does not have, and may come twice; a test draws different ones.
    pub(super) fn draw(&self, seen: &[u32], item: u32, key: Key, test: bool, out: &mut Vec<u32>) {
        out.clear();
        let others = Others::new(self.items, seen, item);
        let count = others.count as u64;
        if count == 0 {
            return;
        }
        match (test, self.tested) {
            (false, _) => out.extend((0..self.negatives as u64).map(|i| key.below(i, count) as u32)),
            (true, Some(tested)) if (tested as u64) < count => {
                // Floyd's sample without replacement (Bentley and Floyd, "Programming pearls: a sample of brilliance", 1987).
                for last in count - tested as u64..count {
                    let drawn = key.below(last, last + 1) as u32;
                    match out.binary_search(&drawn) {
                        Err(at) => out.insert(at, drawn),
                        Ok(_) => out.push(last as u32), // larger than all before it
                    }
                }
            }
            (true, _) => out.extend(0..others.count),
        }
        out.iter_mut().for_each(|place| *place = others.nth(*place));
    }
}

/// Items that are neither a sample's own nor among those that its user has, in their order.
struct Others<'a> {
    seen: &'a [u32],
    count: u32,
    /// The place of the sample's own item among those that the user does not have, where it is one.
    own: Option<u32>,
}

impl<'a> Others<'a> {
    fn new(items: u32, seen: &'a [u32], item: u32) -> Others<'a> {
        let own = seen.binary_search(&item).err().map(|below| item - below as u32);
        Others { seen, count: items - seen.len() as u32 - u32::from(own.is_some()), own }
    }

    /// The one at a place below `count`.
    fn nth(&self, place: u32) -> u32 {
        let place = place + u32::from(self.own.is_some_and(|own| place >= own));
        // Below the `i`-th that the user has there are `seen[i] - i` that the user does not have.
        let (mut low, mut high) = (0, self.seen.len());
        while low < high {
            let middle = (low + high) / 2;
            if self.seen[middle] - middle as u32 <= place { low = middle + 1 } else { high = middle }
        }
        place + low as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Purpose;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn pairs() -> impl Strategy<Value = Vec<(u64, u32)>> {
        prop::collection::vec((prop_oneof![0u64..4, any::<u64>()], 0u32..12), 0..60)
    }

    fn bytes(seen: &Seen) -> Vec<u8> {
        let mut bytes = Vec::new();
        seen.encode(&mut |piece| bytes.extend_from_slice(piece));
        bytes
    }

    proptest! {
        #[test]
        fn each_user_has_what_the_pairs_say(pairs in pairs(), chosen in prop::collection::vec(0u64..6, 0..5)) {
            let mut want: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
            pairs.iter().for_each(|(user, item)| { want.entry(*user).or_default().insert(*item); });
            let seen = Seen::new(pairs);
            for (user, items) in &want {
                prop_assert_eq!(seen.of(*user), items.iter().copied().collect::<Vec<u32>>());
            }
            let full = want.values().any(|items| items.len() == 12);
            prop_assert_eq!((seen.fits(12), seen.fits(13)), (!full, true));
            prop_assert!(want.is_empty() || !seen.fits(want.values().filter_map(|items| items.last()).max().copied().unwrap_or(0)));
            let part = seen.select(chosen.iter().copied());
            for user in (0..6).chain(want.keys().copied()) {
                prop_assert_eq!(part.of(user), if chosen.contains(&user) { seen.of(user) } else { &[] });
            }
            let encoded = bytes(&seen);
            prop_assert_eq!(encoded.len() as u64, Seen::encoded_len(seen.users.len() as u64, seen.items.len() as u64));
            prop_assert_eq!(Seen::decode(&mut &encoded[..]).unwrap(), seen);
        }

        #[test]
        fn whatever_comes_is_in_order_or_refused(pairs in pairs(), at in any::<prop::sample::Index>(), value in any::<u8>()) {
            let mut encoded = bytes(&Seen::new(pairs));
            prop_assert!(Seen::decode(&mut &encoded[..at.index(encoded.len())]).is_err());
            let at = at.index(encoded.len());
            encoded[at] = value;
            if let Ok(seen) = Seen::decode(&mut &encoded[..]) {
                for user in &seen.users {
                    prop_assert!(!seen.of(*user).is_empty() && seen.of(*user).is_sorted_by(|a, b| a < b));
                }
                prop_assert!(seen.users.is_sorted_by(|a, b| a < b));
            }
        }

        #[test]
        fn what_is_drawn_is_never_the_users(
            items in 1u32..40, seen in prop::collection::btree_set(0u32..40, 0..30), item in 0u32..40, negatives in 1u32..9,
            tested in prop::option::of(1u32..50), seed in any::<u64>(),
        ) {
            let seen: Vec<u32> = seen.into_iter().filter(|i| *i < items).collect();
            let item = item % items;
            let free: Vec<u32> = (0..items).filter(|i| *i != item && !seen.contains(i)).collect();
            let candidates = Candidates { items, pairs: 0, negatives, tested, k: 10 };
            let key = Key::new(seed, Purpose::Negative);
            let mut drawn = vec![7; 3];
            candidates.draw(&seen, item, key, false, &mut drawn);
            prop_assert_eq!(drawn.len(), if free.is_empty() { 0 } else { negatives as usize });
            prop_assert!(drawn.iter().all(|i| free.contains(i)), "{drawn:?} {free:?}");
            prop_assert!(drawn.len() < candidates.rows(false));
            candidates.draw(&seen, item, key, true, &mut drawn);
            prop_assert!(drawn.is_sorted_by(|a, b| a < b) && drawn.iter().all(|i| free.contains(i)), "{drawn:?} {free:?}");
            prop_assert_eq!(drawn.len(), free.len().min(tested.map_or(usize::MAX, |n| n as usize)));
            prop_assert!(drawn.len() < candidates.rows(true));
        }
    }

    #[test]
    fn each_of_the_others_is_drawn_as_often_as_any() {
        let candidates = Candidates { items: 9, pairs: 0, negatives: 2, tested: Some(3), k: 10 };
        let (mut counts, mut tested) = ([0u32; 9], [0u32; 9]);
        let mut out = Vec::new();
        for sample in 0..5000 {
            let key = Key::new(3, Purpose::Negative).with(sample);
            candidates.draw(&[1, 2, 7], 2, key, false, &mut out);
            out.iter().for_each(|i| counts[*i as usize] += 1);
            candidates.draw(&[1, 2], 7, key, true, &mut out);
            out.iter().for_each(|i| tested[*i as usize] += 1);
        }
        for item in [0, 3, 4, 5, 6, 8] {
            // 10,000 and 15,000 draws among six.
            assert!(
                (1550..1790).contains(&counts[item]) && (2380..2620).contains(&tested[item]),
                "{counts:?} {tested:?}"
            );
        }
    }

    #[test]
    fn what_is_out_of_order_is_refused() {
        let seen = |users: &[u64], ends: &[usize], items: &[u32]| {
            let seen = Seen { users: users.into(), ends: ends.into(), items: items.into() };
            Seen::decode(&mut &bytes(&seen)[..]).is_ok()
        };
        assert!(seen(&[3, 9], &[2, 3], &[1, 4, 0]) && seen(&[], &[], &[]));
        assert!(!seen(&[9, 3], &[2, 3], &[1, 4, 0]), "users");
        assert!(!seen(&[3, 3], &[2, 3], &[1, 4, 0]), "a user twice");
        assert!(!seen(&[3, 9], &[2, 3], &[4, 1, 0]), "items");
        assert!(!seen(&[3, 9], &[2, 3], &[4, 4, 0]), "an item twice");
        assert!(!seen(&[3, 9], &[3, 2], &[1, 4, 0]), "ends");
        assert!(!seen(&[3, 9], &[0, 3], &[0, 1, 4]), "a user with nothing");
        assert!(!seen(&[3, 9], &[2, 2], &[1, 4, 0]) && !seen(&[], &[], &[1]), "items of nobody");
        assert!(!seen(&[3, 9], &[2, 9], &[1, 4, 0]), "an end behind the items");
    }
}
