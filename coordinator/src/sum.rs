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
            Gradient::Both(both) => match *both {
                // Which one is added to which does not matter: a sum of two is the same either way.
                [Gradient::Sum(mut sum), other] | [other, Gradient::Sum(mut sum)] => {
                    kernels::add_bytes_into(&mut sum, other.bytes(0..other.len()));
                    self.free(other);
                    sum
                }
                both => self.copy(Gradient::Both(Box::new(both))),
            },
            one => self.copy(one),
        }
    }

    /// The values in a buffer that is taken for them.
    fn copy(&self, gradient: Gradient) -> Vec<f32> {
        let mut sum = self.take(gradient.len());
        gradient.read(0..sum.len(), &mut sum);
        self.free(gradient);
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

    /// Adds two siblings of a tree over `partitions`; the root's are left to whoever reads them.
    pub fn add(&self, left: Part, right: Part, partitions: u32) -> Part {
        let (sums, below) = (left.sums + right.sums, left.partitions + right.partitions);
        let both = Gradient::Both(Box::new([left.gradient, right.gradient]));
        let gradient = if below == partitions { both } else { Gradient::Sum(self.sum(both)) };
        Part { gradient, sums, partitions: below }
    }
}
