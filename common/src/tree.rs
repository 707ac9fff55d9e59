//! The fixed binary tree over the partitions `0..P`, the one order in which gradients are added.
//!
//! A node is a range of partitions. A node of more than one partition splits after the largest power of two that is
//! smaller than its length, so every node's range is `[i*2^k, min((i+1)*2^k, P))`. Leases cut the partitions anywhere;
//! [`cover`] gives the largest whole nodes inside a lease. Addition of two f32 is commutative to the bit, so only the
//! shape of the tree matters, never which child came first.

use serde::{Deserialize, Serialize};

/// A node of the tree: the partitions `lo..hi`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Node {
    pub lo: u32,
    pub hi: u32,
}

impl Node {
    /// The whole tree over `partitions` leaves.
    pub fn root(partitions: u32) -> Node {
        Node { lo: 0, hi: partitions }
    }

    /// One partition.
    pub fn leaf(partition: u32) -> Node {
        Node { lo: partition, hi: partition + 1 }
    }

    /// Number of partitions below the node.
    #[allow(clippy::len_without_is_empty)] // a node is never empty
    pub fn len(self) -> u32 {
        self.hi - self.lo
    }

    /// The two halves that are added to make this node; `None` for a leaf.
    pub fn children(self) -> Option<(Node, Node)> {
        let n = self.len();
        if n <= 1 {
            return None;
        }
        let mid = self.lo + n.next_power_of_two() / 2;
        Some((Node { lo: self.lo, hi: mid }, Node { lo: mid, hi: self.hi }))
    }

    /// Whether `self` holds every partition of `other`.
    pub fn contains(self, other: Node) -> bool {
        self.lo <= other.lo && other.hi <= self.hi
    }

    /// Whether this range is a node of the tree over `partitions` leaves.
    pub fn is_in_tree(self, partitions: u32) -> bool {
        if self.lo >= self.hi || self.hi > partitions {
            return false;
        }
        let mut at = Node::root(partitions);
        while at != self {
            match at.children() {
                Some((left, _)) if left.contains(self) => at = left,
                Some((_, right)) if right.contains(self) => at = right,
                _ => return false,
            }
        }
        true
    }

    /// The other child of this node's parent, and the parent; `None` for the root.
    pub fn sibling_and_parent(self, partitions: u32) -> Option<(Node, Node)> {
        let mut at = Node::root(partitions);
        loop {
            let (left, right) = at.children()?;
            if left == self {
                return Some((right, at));
            }
            if right == self {
                return Some((left, at));
            }
            at = if left.contains(self) {
                left
            } else if right.contains(self) {
                right
            } else {
                return None;
            };
        }
    }
}

/// The largest whole nodes of the tree over `partitions` leaves inside `lo..hi`, from left to right.
pub fn cover(partitions: u32, lo: u32, hi: u32) -> Vec<Node> {
    fn walk(node: Node, lo: u32, hi: u32, out: &mut Vec<Node>) {
        if node.hi <= lo || hi <= node.lo {
            return;
        }
        if lo <= node.lo && node.hi <= hi {
            out.push(node);
            return;
        }
        if let Some((left, right)) = node.children() {
            walk(left, lo, hi, out);
            walk(right, lo, hi, out);
        }
    }
    let mut out = Vec::new();
    if partitions > 0 {
        walk(Node::root(partitions), lo, hi, &mut out);
    }
    out
}

/// Finishes the tree: takes the sums of nodes in any order and adds siblings as soon as both are there.
#[derive(Debug)]
pub struct Open<T> {
    partitions: u32,
    /// No two have a partition in common.
    parts: std::collections::BTreeMap<Node, T>,
}

/// What became of a node's sum that was offered to an [`Open`] tree.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Offer {
    /// Taken; other nodes are still missing.
    Taken,
    /// Taken, and the root is whole: [`Open::take_root`] gives it.
    Complete,
    /// These partitions are in the sum already; the offer was dropped.
    Duplicate,
}

impl<T> Open<T> {
    /// An empty tree over `partitions` leaves.
    pub fn new(partitions: u32) -> Self {
        Open { partitions, parts: Default::default() }
    }

    /// Whether some of `node`'s partitions are in the sum already.
    pub fn holds(&self, node: Node) -> bool {
        let mut before_its_end = self.parts.range(..Node { lo: node.hi, hi: 0 });
        before_its_end.next_back().is_some_and(|(last, _)| node.lo < last.hi)
    }

    /// Whether an offer of `node` would be added to a sum that waits for it.
    pub fn merges(&self, node: Node) -> bool {
        node.sibling_and_parent(self.partitions).is_some_and(|(sibling, _)| self.parts.contains_key(&sibling))
    }

    /// Adds `value` as the sum of `node`; `add(left, right)` merges siblings.
    pub fn offer(&mut self, node: Node, value: T, mut add: impl FnMut(T, T) -> T) -> Offer {
        let pair = |value, (at, other): (Node, T)| if at.lo < node.lo { add(other, value) } else { add(value, other) };
        self.offer_to_all(node, value, |value, siblings| siblings.into_iter().fold(value, pair))
    }

    /// [`Open::offer`] where `add` gets all siblings that wait, one or more, at once, each with its node: `value` is to be added to the
    /// first, that sum to the second, and so on up the tree.
    pub fn offer_to_all(&mut self, node: Node, value: T, add: impl FnOnce(T, Vec<(Node, T)>) -> T) -> Offer {
        if self.holds(node) {
            return Offer::Duplicate;
        }
        let (mut node, mut siblings) = (node, Vec::new());
        while let Some((sibling, parent)) = node.sibling_and_parent(self.partitions)
            && let Some(other) = self.parts.remove(&sibling)
        {
            siblings.push((sibling, other));
            node = parent;
        }
        let value = if siblings.is_empty() { value } else { add(value, siblings) };
        self.parts.insert(node, value);
        if node == Node::root(self.partitions) { Offer::Complete } else { Offer::Taken }
    }

    /// The finished sum, leaving the tree empty for the next step; `None` while nodes are missing.
    pub fn take_root(&mut self) -> Option<T> {
        self.parts.remove(&Node::root(self.partitions))
    }

    /// Forgets everything that came.
    pub fn clear(&mut self) {
        self.parts.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_cover_is_the_range_and_only_nodes(p in 1u32..70, a in 0u32..70, b in 0u32..70) {
            let (lo, hi) = (a.min(b).min(p), a.max(b).min(p));
            let nodes = cover(p, lo, hi);
            let mut at = lo;
            for n in &nodes {
                prop_assert_eq!(n.lo, at);
                prop_assert!(n.is_in_tree(p));
                at = n.hi;
            }
            if lo < hi { prop_assert_eq!(at, hi); }
        }

        #[test]
        fn any_cut_and_any_order_give_the_same_bits(p in 1u32..40, cuts in prop::collection::vec(0u32..40, 0..6), order in any::<u64>()) {
            let leaf = |i: u32| ((i as f32 + 1.3).sin() * 1e3f32).powi(3);
            fn whole(n: Node, leaf: &dyn Fn(u32) -> f32) -> f32 {
                match n.children() { None => leaf(n.lo), Some((l, r)) => whole(l, leaf) + whole(r, leaf) }
            }
            let mut cuts: Vec<u32> = cuts.into_iter().map(|c| c.min(p)).chain([0, p]).collect();
            cuts.sort();
            let mut nodes: Vec<Node> = cuts.windows(2).flat_map(|w| cover(p, w[0], w[1])).collect();
            nodes.sort_by_key(|n| (n.lo as u64 + 1).wrapping_mul(order | 1).rotate_left(17));
            let mut open = Open::new(p);
            let mut last = Offer::Taken;
            for n in &nodes {
                let (merges, before) = (open.merges(*n), open.parts.len());
                prop_assert!(!open.holds(*n));
                // The left one always comes first: for some sums that is not the same.
                last = open.offer(*n, (*n, whole(*n, &leaf)), |(left, a), (right, b)| {
                    assert_eq!(left.hi, right.lo);
                    (Node { lo: left.lo, hi: right.hi }, a + b)
                });
                prop_assert!(open.holds(*n));
                prop_assert_eq!(merges, open.parts.len() <= before);
            }
            prop_assert_eq!(last, Offer::Complete);
            prop_assert_eq!(open.offer(nodes[0], (nodes[0], 1.0), |a, _| a), Offer::Duplicate);
            prop_assert_eq!(open.take_root().unwrap().1.to_bits(), whole(Node::root(p), &leaf).to_bits());
        }
    }
}
