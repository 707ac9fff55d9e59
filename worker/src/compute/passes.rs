//! Gradient accumulation: a node in several passes, whose sums are added up where the tree adds them up, so that their number
//! changes no bit.

use super::{Compute, Computed, nanos};
use crate::link::{Link, Order};
use crate::rows::Source;
use crate::weights::Reading;
use unisono_common::kernels;
use unisono_common::layout::Layout;
use unisono_common::loss::LossSums;
use unisono_common::rows::sums::RowSums;
use unisono_common::tree::Node;
use unisono_proto::shm::frame::Spent;

/// The sums of a node beside its gradient.
struct Passed {
    sums: LossSums,
    rows: RowSums,
    spent: Spent,
}

/// What all passes of an order have in common.
struct Passes<'a> {
    step: u64,
    /// Partitions of a pass, at most.
    most: u32,
    weights: &'a Reading<'a>,
    rows: &'a Source,
}

impl Compute {
    /// Partitions of `node` that a pass takes, at most.
    fn most(&self, node: Node) -> u32 {
        node.len().div_ceil(self.job.train.accumulate)
    }

    /// What the first pass over `node` takes; all of it where it is the only one.
    pub(super) fn first_pass(&self, node: Node) -> Node {
        let (mut first, most) = (node, self.most(node));
        while let Some((left, _)) = first.children().filter(|_| first.len() > most) {
            first = left;
        }
        first
    }

    /// The sums of an order, of whose first pass the samples are ready, into a slot; `None` where the weights or the rows of a later
    /// pass do not come.
    pub(super) fn in_passes<'a>(
        &mut self,
        order: &Order,
        link: &'a Link,
        weights: &Reading<'_>,
        slot: u32,
        layout: &'a Layout,
    ) -> Option<Computed<'a>> {
        let passes = Passes { step: order.step, most: self.most(order.node), weights, rows: link.rows() };
        let Passed { sums, rows, spent } = self.add_up(&passes, order.node, link.gradient(slot))?;
        let (keys, d_rows) = link.rows_of(slot, rows.keys.len());
        keys.copy_from_slice(&rows.keys);
        d_rows.copy_from_slice(&rows.values);
        Some(Computed { announcement: link.announce(layout, slot, order, rows.keys.len()), sums, spent })
    }

    /// The sums of `node`, the gradient into `out`.
    fn add_up(&mut self, passes: &Passes<'_>, node: Node, out: &mut [f32]) -> Option<Passed> {
        let Passes { step, most, weights, rows } = *passes;
        let Some((left, right)) = node.children().filter(|_| node.len() > most) else {
            let gathered = self.prepare(step, node, rows)?;
            let mut values = vec![0.0; self.batch.rows.len()];
            let (sums, spent) = self.gradient(step, node, weights, false, out, &mut values, &mut |_, _| {})?;
            let rows = RowSums { keys: self.batch.lookups.keys().to_vec(), values };
            return Some(Passed { sums, rows, spent: Spent { data: spent.data + nanos(gathered), ..spent } });
        };
        let left = self.add_up(passes, left, out)?;
        let mut other = self.spare.pop().unwrap_or_default();
        other.resize(out.len(), 0.0);
        let right = self.add_up(passes, right, &mut other);
        right.iter().for_each(|_| kernels::add_into(out, &other));
        self.spare.push(other);
        let right = right?;
        Some(Passed {
            sums: left.sums + right.sums,
            rows: RowSums::of_both(left.rows.parts(), right.rows.parts(), self.model.rows().width()),
            spent: Spent {
                data: left.spent.data + right.spent.data,
                forward: left.spent.forward + right.spent.forward,
                backward: left.spent.backward + right.spent.backward,
                ..left.spent
            },
        })
    }
}
