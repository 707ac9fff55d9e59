//! Gradients of rows on their way through the reduction tree: a row that only one of two siblings has stays as it is.

use crate::kernels;
use crate::tree::Node;
use std::cmp::Ordering;

/// `out` = the sum of `gradient(id) * factor(id)` over `ids`, partition by partition of `segments`, in the fixed tree. Ids are ascending, and
/// those of partition `i` come before `end(i)`. `spare` holds [`spare`] floats.
pub fn tree_sum<'a>(
    segments: (usize, usize),
    ids: &[u32],
    end: &impl Fn(usize) -> u32,
    gradient: &impl Fn(u32) -> &'a [f32],
    factor: &impl Fn(u32) -> f32,
    out: &mut [f32],
    spare: &mut [f32],
) {
    let (lo, hi) = segments;
    let children = Node { lo: lo as u32, hi: hi as u32 }.children();
    let (Some((left, right)), 2..) = (children, ids.len()) else {
        if let Some((first, others)) = ids.split_first() {
            kernels::copy(out, gradient(*first));
            let scale = factor(*first);
            out.iter_mut().for_each(|out| *out *= scale);
            others.iter().for_each(|id| add(out, gradient(*id), factor(*id)));
        }
        return;
    };
    let mid = end(left.hi as usize - 1);
    let (of_left, of_right) = ids.split_at(ids.partition_point(|id| *id < mid));
    let (left, right) = ((left.lo as usize, left.hi as usize), (right.lo as usize, right.hi as usize));
    match (of_left.is_empty(), of_right.is_empty()) {
        (false, false) => {
            tree_sum(left, of_left, end, gradient, factor, out, spare);
            let (other, spare) = spare.split_at_mut(out.len());
            tree_sum(right, of_right, end, gradient, factor, other, spare);
            add(out, other, 1.0);
        }
        (false, true) => tree_sum(left, of_left, end, gradient, factor, out, spare),
        (true, _) => tree_sum(right, of_right, end, gradient, factor, out, spare),
    }
}

/// Floats that [`tree_sum`] needs beside its result of `width`.
pub fn spare(segments: usize, width: usize) -> usize {
    segments.next_power_of_two().trailing_zeros() as usize * width
}

/// Rows are short: no kernel is chosen for each.
fn add(out: &mut [f32], other: &[f32], factor: f32) {
    out.iter_mut().zip(other).for_each(|(out, other)| *out += other * factor);
}

/// The gradient sums of some rows, in the order of their keys.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowSums {
    pub keys: Vec<u64>,
    /// `(keys, width)`
    pub values: Vec<f32>,
}

/// A row of one of two siblings, or of both: its places in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Left(usize),
    Right(usize),
    Both(usize, usize),
}

/// Calls `row` for each key of either, in their order.
pub fn merge(left: &[u64], right: &[u64], mut row: impl FnMut(u64, Side)) {
    let (mut l, mut r) = (0, 0);
    loop {
        let order = match (left.get(l), right.get(r)) {
            (Some(left), Some(right)) => left.cmp(right),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return,
        };
        match order {
            Ordering::Less => {
                row(left[l], Side::Left(l));
                l += 1;
            }
            Ordering::Greater => {
                row(right[r], Side::Right(r));
                r += 1;
            }
            Ordering::Equal => {
                row(left[l], Side::Both(l, r));
                (l, r) = (l + 1, r + 1);
            }
        }
    }
}

impl RowSums {
    /// The sums of two siblings, each keys and rows of `width` values.
    pub fn of_both(left: (&[u64], &[f32]), right: (&[u64], &[f32]), width: usize) -> RowSums {
        let most = left.0.len() + right.0.len();
        let mut sums = RowSums { keys: Vec::with_capacity(most), values: Vec::with_capacity(most * width) };
        merge(left.0, right.0, |key, side| {
            sums.keys.push(key);
            let start = sums.values.len();
            sums.values.resize(start + width, 0.0);
            side.read((left.1, right.1), width, &mut sums.values[start..]);
        });
        sums
    }

    /// The keys, and the rows.
    pub fn parts(&self) -> (&[u64], &[f32]) {
        (&self.keys, &self.values)
    }
}

impl Side {
    /// The sum of the row's gradients in `(left, right)`, rows of `width` values, into `out`.
    #[inline(always)]
    pub fn read(self, (left, right): (&[f32], &[f32]), width: usize, out: &mut [f32]) {
        let row = |of: &'_ [f32], i: usize| -> std::ops::Range<usize> {
            debug_assert!((i + 1) * width <= of.len());
            i * width..(i + 1) * width
        };
        match self {
            Side::Left(l) => kernels::copy(out, &left[row(left, l)]),
            Side::Right(r) => kernels::copy(out, &right[row(right, r)]),
            Side::Both(l, r) => {
                let (left, right) = (&left[row(left, l)], &right[row(right, r)]);
                out.iter_mut().zip(left.iter().zip(right)).for_each(|(out, (l, r))| *out = l + r);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Offer, Open, cover};
    use proptest::prelude::*;

    /// The sums of a node, from the gradients of its partitions' ids: `(key, value)`.
    fn sums(node: Node, parts: &[Vec<(u64, f32)>]) -> RowSums {
        let of_node = &parts[node.lo as usize..node.hi as usize];
        let ids: Vec<(u64, f32)> = of_node.iter().flatten().copied().collect();
        let ends: Vec<u32> = of_node
            .iter()
            .scan(0, |end, part| {
                *end += part.len() as u32;
                Some(*end)
            })
            .collect();
        let mut keys: Vec<u64> = ids.iter().map(|(key, _)| *key).collect();
        keys.sort();
        keys.dedup();
        let mut room = vec![0.0; spare(of_node.len(), 1)];
        let mut out = RowSums { values: vec![0.0; keys.len()], keys };
        for (key, value) in out.keys.iter().zip(&mut out.values) {
            let at: Vec<u32> = (0..ids.len() as u32).filter(|i| ids[*i as usize].0 == *key).collect();
            let gradient = |i: u32| std::slice::from_ref(&ids[i as usize].1);
            tree_sum(
                (0, of_node.len()),
                &at,
                &|i| ends[i],
                &gradient,
                &|_| 1.0,
                std::slice::from_mut(value),
                &mut room,
            );
        }
        out
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_bits(
            parts in prop::collection::vec(prop::collection::vec((0u64..6, -1e3f32..1e3), 0..6), 1..20),
            cuts in prop::collection::vec(0u32..20, 0..5), order in any::<u64>(),
        ) {
            let p = parts.len() as u32;
            let whole = sums(Node::root(p), &parts);
            let mut cuts: Vec<u32> = cuts.into_iter().map(|c| c.min(p)).chain([0, p]).collect();
            cuts.sort();
            let mut nodes: Vec<Node> = cuts.windows(2).flat_map(|w| cover(p, w[0], w[1])).collect();
            nodes.sort_by_key(|n| (n.lo as u64 + 1).wrapping_mul(order | 1).rotate_left(17));
            let mut open = Open::new(p);
            let mut last = Offer::Taken;
            for n in &nodes {
                last = open.offer(*n, sums(*n, &parts), |l, r| RowSums::of_both(l.parts(), r.parts(), 1));
            }
            prop_assert_eq!(last, Offer::Complete);
            let got = open.take_root().expect("it is complete");
            let bits = |sums: &RowSums| sums.values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!((&got.keys, bits(&got)), (&whole.keys, bits(&whole)));
            prop_assert!(got.keys.is_sorted_by(|a, b| a < b) && got.values.len() == got.keys.len());
            // The same as in any order, up to rounding.
            for (key, value) in whole.keys.iter().zip(&whole.values) {
                let plain: f64 = parts.iter().flatten().filter(|(k, _)| k == key).map(|(_, v)| *v as f64).sum();
                prop_assert!((plain - *value as f64).abs() < 1e-2);
            }
        }
    }
}
