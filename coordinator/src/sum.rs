//! Gradient sums on their way through the reduction tree, chunk by chunk.

use crate::lock;
use bytes::Bytes;
use std::ops::Range;
use std::sync::Mutex;
use unisono_common::kernels;
use unisono_common::layout::{CHUNK, le_bytes, le_bytes_mut};
use unisono_common::loss::LossSums;
use unisono_proto::shm;

/// A node's sums of one chunk. The loss sums travel with each chunk, so that a chunk is whole by itself: a worker that
/// breaks off between two chunks leaves nothing half known.
pub struct Part {
    pub gradient: Gradient,
    pub sums: LossSums,
    /// Partitions below the node.
    pub partitions: u32,
}

/// A chunk of a gradient sum.
pub enum Gradient {
    /// Where its worker computed it.
    Slot(shm::Part),
    /// As it came over the wire.
    Wire(Bytes),
    /// Added up.
    Sum(Vec<f32>),
    /// Two that are still to be added.
    Both(Box<[Gradient; 2]>),
}

impl Gradient {
    /// Copies the values at `range` into `out`.
    pub fn read(&self, range: Range<usize>, out: &mut [f32]) {
        match self {
            Gradient::Both(both) => kernels::add_bytes(out, both[0].bytes(range.clone()), both[1].bytes(range)),
            one => le_bytes_mut(out).copy_from_slice(one.bytes(range)),
        }
    }

    /// The bytes at `range` of the values that are still to be added up, one or two.
    pub fn halves(&self, range: Range<usize>) -> (&[u8], Option<&[u8]>) {
        match self {
            Gradient::Both(both) => (both[0].bytes(range.clone()), Some(both[1].bytes(range))),
            one => (one.bytes(range), None),
        }
    }

    /// The bytes of the values at `range`.
    fn bytes(&self, range: Range<usize>) -> &[u8] {
        match self {
            Gradient::Slot(part) => le_bytes(&part.values()[range]),
            Gradient::Wire(values) => &values[4 * range.start..4 * range.end],
            Gradient::Sum(sum) => le_bytes(&sum[range]),
            Gradient::Both(_) => unreachable!("only the root's two halves wait to be added"),
        }
    }

    fn len(&self) -> usize {
        match self {
            Gradient::Slot(part) => part.values().len(),
            Gradient::Wire(values) => values.len() / 4,
            Gradient::Sum(sum) => sum.len(),
            Gradient::Both(both) => both[0].len(),
        }
    }
}

/// Values that are worked on together, added up or updated and copied: they stay in the first-level cache.
pub const BLOCK: usize = 4096;

/// A range in blocks of up to [`BLOCK`] values.
pub fn blocks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(BLOCK).map(move |from| from..(from + BLOCK).min(range.end))
}

/// `out` is the sum of the values at `at` of `all`, two or more, one after another.
fn added(all: &[Gradient], at: Range<usize>, out: &mut [f32]) {
    kernels::add_bytes(out, all[0].bytes(at.clone()), all[1].bytes(at.clone()));
    all[2..].iter().for_each(|one| kernels::add_bytes_into(out, one.bytes(at.clone())));
}

/// Buffers of a chunk's length that are not in use.
#[derive(Default)]
pub struct Spare(Mutex<Vec<Vec<f32>>>);

impl Spare {
    /// A buffer of `len` values, which hold anything.
    pub fn take(&self, len: usize) -> Vec<f32> {
        let mut buffer = lock(&self.0).pop().unwrap_or_else(|| Vec::with_capacity(len.min(CHUNK)));
        buffer.resize(len, 0.0);
        buffer
    }

    /// Gives a buffer back.
    pub fn put(&self, buffer: Vec<f32>) {
        lock(&self.0).push(buffer);
    }

    /// Gives back what a gradient took.
    pub fn free(&self, gradient: Gradient) {
        match gradient {
            Gradient::Sum(sum) => self.put(sum),
            Gradient::Both(both) => both.into_iter().for_each(|half| self.free(half)),
            Gradient::Slot(_) | Gradient::Wire(_) => {}
        }
    }

    /// The values in a buffer of their own.
    pub fn sum(&self, gradient: Gradient) -> Vec<f32> {
        match gradient {
            Gradient::Sum(sum) => sum,
            Gradient::Both(both) => self.chain(Vec::from(*both)),
            one => {
                let mut sum = self.take(one.len());
                one.read(0..sum.len(), &mut sum);
                sum
            }
        }
    }

    /// The first of two or more plus the second, plus the third, and so on, in one pass over memory: into the first that is a sum
    /// already, where one is.
    fn chain(&self, mut all: Vec<Gradient>) -> Vec<f32> {
        let place = all.iter().position(|one| matches!(one, Gradient::Sum(_))).unwrap_or(all.len());
        let mut after = all.split_off(place).into_iter();
        let before = all;
        let (mut sum, is_there) = match after.next() {
            Some(Gradient::Sum(sum)) => (sum, true),
            _ => (self.take(before[0].len()), false),
        };
        let mut block = [0.0; BLOCK];
        for at in blocks(0..sum.len()) {
            let sum = &mut sum[at.clone()];
            match &*before {
                [] => {}
                // Of two it does not matter which is added to which.
                [one] if is_there => kernels::add_bytes_into(sum, one.bytes(at.clone())),
                several if is_there => {
                    let block = &mut block[..at.len()];
                    added(several, at.clone(), block);
                    kernels::add_into(sum, block);
                }
                several => added(several, at.clone(), sum),
            }
            after.as_slice().iter().for_each(|one| kernels::add_bytes_into(sum, one.bytes(at.clone())));
        }
        before.into_iter().chain(after).for_each(|one| self.free(one));
        sum
    }

    /// What has to wait for another, so that it keeps nothing from its worker: a slot may be needed for the next node.
    pub fn keep(&self, gradient: Gradient) -> Gradient {
        match gradient {
            Gradient::Slot(part) if part.may_wait() => Gradient::Slot(part),
            Gradient::Wire(values) => Gradient::Wire(values),
            other => Gradient::Sum(self.sum(other)),
        }
    }

    /// Adds to a part its siblings in a tree over `partitions`, one or more, one after another, in one pass; the root's two halves are
    /// left to whoever reads them.
    pub fn add(&self, part: Part, siblings: impl Iterator<Item = Part>, partitions: u32) -> Part {
        let (mut all, mut sums, mut below) = (vec![part.gradient], part.sums, part.partitions);
        for sibling in siblings {
            all.push(sibling.gradient);
            (sums, below) = (sums + sibling.sums, below + sibling.partitions);
        }
        let half = all.pop_if(|_| below == partitions);
        let sum = match <[Gradient; 1]>::try_from(all) {
            Ok([one]) => one,
            Err(all) => Gradient::Sum(self.chain(all)),
        };
        let gradient = match half {
            Some(half) => Gradient::Both(Box::new([sum, half])),
            None => sum,
        };
        Part { gradient, sums, partitions: below }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of one chunk, whichever of them came over the wire.
    #[test]
    fn a_chain_is_added_one_after_another_and_gives_its_buffers_back() {
        let value = |which: usize, i: usize| ((which * 7919 + i) as f32 * 0.37).sin() * 1e4;
        for len in [1, BLOCK, 2 * BLOCK + 5] {
            for (all, wires) in (2..=4).flat_map(|all| (0..1 << all).map(move |wires| (all, wires))) {
                let is_wire = |which: usize| wires >> which & 1 == 1;
                let part = |which: usize| {
                    let values: Vec<f32> = (0..len).map(|i| value(which, i)).collect();
                    // The bytes lie anywhere.
                    let wire = || Bytes::from([&[0][..], le_bytes(&values)].concat()).slice(1..);
                    let gradient = if is_wire(which) { Gradient::Wire(wire()) } else { Gradient::Sum(values) };
                    Part { gradient, sums: LossSums { samples: 1, ..LossSums::default() }, partitions: 1 }
                };
                let expected: Vec<f32> =
                    (0..len).map(|i| (1..all).fold(value(0, i), |sum, which| sum + value(which, i))).collect();
                for partitions in [all as u32, 100] {
                    let spare = Spare::default();
                    let Part { gradient, sums, partitions: below } = spare.add(part(0), (1..all).map(part), partitions);
                    let is_open = matches!(gradient, Gradient::Both(_));
                    assert_eq!((is_open, sums.samples, below), (below == partitions, all as u64, all as u32));
                    let mut read = vec![0.0; len];
                    gradient.read(0..len, &mut read);
                    assert_eq!(
                        (read, spare.sum(gradient)),
                        (expected.clone(), expected.clone()),
                        "{len} {all} {wires:b}"
                    );
                    // A buffer is taken where no sum is there to add to.
                    let below_root = all - usize::from(is_open);
                    let is_taken = below_root > 1 && (0..below_root).all(is_wire);
                    let buffers = (0..all).filter(|which| !is_wire(*which)).count() + usize::from(is_taken);
                    assert_eq!(lock(&spare.0).len() + 1, buffers.max(1), "{len} {all} {wires:b} {is_open}");
                }
            }
        }
    }
}
