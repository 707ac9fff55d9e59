//! Layers: functions over slices, with their gradients.
//!
//! A batch is the concatenation of several partitions' micro-batches ([`Segments`]). Rows (samples) never mix, except in
//! two places that are computed segment by segment: batch-norm's statistics, and parameter gradients, which are summed
//! over the segments in the fixed tree of [`crate::tree`]. So the bits of a gradient depend on the partitions alone, not
//! on how many of them a worker computes at once, nor on its threads.
//!
//! All memory is planned once: a layer says how many floats it needs to keep between forward and backward (`saved`) and
//! how many while it runs (`scratch`), and gets slices of exactly that length.

mod activation;
mod attention;
mod batch_norm;
mod conv2d;
mod dropout;
mod embedding;
mod grouped_conv2d;
mod interaction;
mod layer_norm;
mod linear;
mod lookup;
mod parallel;
mod pool;
mod sequential;

pub(crate) use activation::finish;
pub use activation::{Activation, Swiglu};
pub use attention::{Attention, Rotary};
pub use batch_norm::BatchNorm;
pub use conv2d::Conv2d;
pub use dropout::Dropout;
pub use embedding::{Embedding, EmbeddingBag, Positions, Table, TiedEmbedding};
pub use grouped_conv2d::GroupedConv2d;
pub use interaction::{DotInteraction, FactorizationMachine, Sum};
pub use layer_norm::LayerNorm;
pub use linear::Linear;
pub use lookup::{Lookup, Slice};
pub use parallel::Parallel;
pub use pool::{GlobalAvgPool, Pool2d};
pub(crate) use sequential::Begun;
pub use sequential::{Flatten, Residual, Sequential};

use crate::kernels;
use crate::layout::Tensor;
use crate::rng::Key;
use crate::rows::{Lookups, Table as RowTable};
use crate::tree::Node;
use rayon::prelude::*;
use std::ops::Range;

/// The partitions of a batch: rows `starts[i]..starts[i+1]` belong to leaf `lo + i` of the tree. Empty ranges are allowed.
#[derive(Clone, Debug, Default)]
pub struct Segments {
    /// First partition.
    pub lo: u32,
    /// `partitions + 1` row numbers, the first 0, the last the batch's rows.
    pub starts: Vec<usize>,
}

impl Segments {
    /// One partition of `rows` samples.
    pub fn one(rows: usize) -> Segments {
        Segments { lo: 0, starts: vec![0, rows] }
    }

    /// Number of partitions.
    #[allow(clippy::len_without_is_empty)] // a batch has at least one partition
    pub fn len(&self) -> usize {
        self.starts.len() - 1
    }

    /// The rows of the `i`-th partition.
    pub fn rows(&self, i: usize) -> Range<usize> {
        self.starts[i]..self.starts[i + 1]
    }

    /// Samples in all partitions.
    pub fn total(&self) -> usize {
        self.starts[self.len()]
    }
}

/// What a layer may know about the pass it runs in.
pub struct Pass<'a> {
    pub segments: &'a Segments,
    pub train: bool,
    /// Seed and step: `key.with(partition)...` for dropout; rows are numbered within their partition.
    pub key: Key,
    /// Where the layer's trainable values begin in the flat vector.
    pub first: usize,
    /// Takes gradients that are final, and where they begin in the flat vector: from the last layer's to the first's.
    pub finished: &'a dyn Fn(usize, &[f32]),
    /// Hears of each sparse table whose rows' gradients are final, where they are to come before others.
    pub finished_rows: Option<&'a dyn Fn()>,
}

impl Pass<'_> {
    /// Announces the layer's trainable gradient, which is not touched any more: it may travel while others are computed.
    pub fn finish(&self, grads: &[f32]) {
        self.finish_from(0, grads);
    }

    /// `out` = the sum over the batch's samples, for gradients of parameters: `of(samples, out)` overwrites it with that of one
    /// partition's samples, one after the other, and partitions are added up in the fixed tree.
    pub fn sum(&self, out: &mut [f32], mut of: impl FnMut(Range<usize>, &mut [f32])) {
        let partitions = self.segments.len();
        let mut spare = vec![0.0; tree_spare(partitions, out.len())];
        tree_sum(0, partitions, out, &mut spare, &mut |partition, out| of(self.segments.rows(partition), out));
    }

    /// Announces the gradients of a sparse table's rows, as [`Pass::finish`] does those of tensors.
    pub fn finish_rows(&self) {
        if let Some(finished) = self.finished_rows {
            finished();
        }
    }

    /// Announces a part of it, which begins at its value `from` and ends where the part before began.
    fn finish_from(&self, from: usize, grads: &[f32]) {
        (self.finished)(self.first + from, grads);
    }
}

/// One layer. `x`: `(rows, in)`, `y`: `(rows, out)`, row-major, `in` and `out` the products of the sample shapes.
///
/// `params` and `grads` are the layer's own tensors, concatenated in the order of [`Layer::tensors`], trainable and
/// running ones apart.
pub trait Layer: Send + Sync {
    /// The shape of one output sample.
    fn out_shape(&self) -> &[usize];

    /// The layer's tensors; names without prefix ("weight").
    fn tensors(&self) -> Vec<Tensor> {
        Vec::new()
    }

    /// The layer's sparse tables; names as those of tensors.
    fn tables(&self) -> Vec<RowTable> {
        Vec::new()
    }

    /// How many of the job's layers it stands for.
    fn span(&self) -> usize {
        1
    }

    /// Floats kept from forward to backward, for a batch of `rows` in `segments` segments.
    fn saved(&self, _rows: usize, _segments: usize) -> usize {
        0
    }

    /// Floats needed while forward or backward runs, for a batch of `rows` in `segments` segments.
    fn scratch(&self, _rows: usize, _segments: usize) -> usize {
        0
    }

    /// Multiply-adds of a sample's forward pass in matrix products. The backward pass takes as many for the parameters'
    /// gradient, and as many again for the input's.
    fn multiply_adds(&self) -> u64 {
        0
    }

    /// Those for the input's gradient, which a model's first layer with parameters is not asked for.
    fn input_multiply_adds(&self) -> u64 {
        self.multiply_adds()
    }

    /// The layer itself, where its outputs may be computed in parts, as their parameters come, and gradients may come as those of its
    /// sums; never a layer inside of it.
    fn as_linear(&self) -> Option<&Linear> {
        None
    }

    /// `y = f(x)`.
    fn forward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        y: &mut [f32],
        saved: &mut [f32],
        scratch: &mut [f32],
    );

    /// `dx = f'(x)^T dy` (where wanted), and the **sum** over samples of the parameter gradients into `grads`, overwritten;
    /// running tensors get `segment rows x segment statistic`, summed over the tree.
    ///
    /// A layer with trainable tensors announces their gradient as early as it can: before it computes `dx`, unless rows of sparse
    /// tables below it come first. One with such tables announces each.
    fn backward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        y: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        saved: &mut [f32],
        scratch: &mut [f32],
    );
}

/// A layer's parameters.
#[derive(Clone, Copy)]
pub struct Params<'a> {
    pub trainable: &'a [f32],
    /// Running statistics; nothing in a forward pass of training, which does not read them.
    pub running: &'a [f32],
    /// Those of sparse tables that the batch asks for; not the layer's alone, but the whole model's.
    pub rows: Rows<'a>,
}

/// Rows of sparse tables.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Which rows they are, and for which ids of the batch.
    pub lookups: &'a Lookups,
    /// `(keys, width)`
    pub values: &'a [f32],
    /// Values of a row.
    pub width: usize,
    /// What the row of each of the batch's ids is multiplied by; empty where all count as they are.
    pub factors: &'a [f32],
}

impl Rows<'_> {
    /// Those of a model without sparse tables.
    pub const NONE: Rows<'static> = Rows { lookups: &Lookups::none(), values: &[], width: 0, factors: &[] };
}

impl<'a> Params<'a> {
    /// Those at these places; of running statistics where there are any.
    fn part(self, trainable: Range<usize>, running: Range<usize>) -> Params<'a> {
        let running = if self.running.is_empty() { self.running } else { &self.running[running] };
        Params { trainable: &self.trainable[trainable], running, ..self }
    }
}

/// Where a layer's gradients and statistics go.
pub struct Grads<'a> {
    pub trainable: &'a mut [f32],
    pub running: &'a mut [f32],
    /// The **sums** of rows' gradients, `(keys, width)`; a layer overwrites its table's part of each.
    pub rows: &'a mut [f32],
}

/// `out` = the sum of `leaf(segment)` over the segments `lo..hi`, in the fixed tree. `spare` holds [`tree_spare`] floats.
fn tree_sum(lo: usize, hi: usize, out: &mut [f32], spare: &mut [f32], leaf: &mut impl FnMut(usize, &mut [f32])) {
    // The tree's shape below a node depends on its length alone, so numbers may start at 0.
    match (Node { lo: lo as u32, hi: hi as u32 }).children() {
        None => leaf(lo, out),
        Some((left, right)) => {
            tree_sum(left.lo as usize, left.hi as usize, out, spare, leaf);
            let (other, spare) = spare.split_at_mut(out.len());
            tree_sum(right.lo as usize, right.hi as usize, other, spare, leaf);
            kernels::add_into(out, other);
        }
    }
}

/// Floats that [`tree_sum`] needs beside its result of `len`.
fn tree_spare(segments: usize, len: usize) -> usize {
    segments.next_power_of_two().trailing_zeros() as usize * len
}

/// A parameter gradient `(rows, row_len)` that is summed over the segments block by block, so that the tree's open sums
/// stay in the cache, and never take more than a few blocks of memory. Blocks are whole rows.
struct Blocks {
    rows: usize,
    row_len: usize,
    /// Floats in a block, at most (one row at least).
    limit: usize,
    /// Rows in a block, at most.
    most: usize,
    /// Floats that a leaf needs for itself.
    extra: usize,
}

impl Blocks {
    /// A single segment has no open sums: its block may be all that a thread computes.
    fn block_rows(&self, segments: usize) -> usize {
        let most = self.rows.div_ceil(kernels::lanes()).min(self.most).max(1);
        if segments == 1 { most } else { (self.limit / self.row_len.max(1)).clamp(1, most) }
    }

    fn lane_scratch(&self, segments: usize) -> usize {
        tree_spare(segments, self.block_rows(segments) * self.row_len) + self.extra
    }

    fn scratch(&self, segments: usize) -> usize {
        kernels::lanes() * self.lane_scratch(segments)
    }

    /// `leaf(segment, rows of the block, block, extra)` overwrites the block with its segment's sum.
    fn sum(
        &self,
        segments: usize,
        out: &mut [f32],
        scratch: &mut [f32],
        leaf: impl Fn(usize, Range<usize>, &mut [f32], &mut [f32]) + Sync,
    ) {
        let (lane, block) = (self.lane_scratch(segments), self.block_rows(segments));
        let lane_rows = self.rows.div_ceil(kernels::lanes()).max(1);
        let work = |(i, (out, scratch)): (usize, (&mut [f32], &mut [f32]))| {
            let (extra, spare) = scratch.split_at_mut(self.extra);
            for (j, out) in out.chunks_mut(block * self.row_len).enumerate() {
                let from = i * lane_rows + j * block;
                let rows = from..from + out.len() / self.row_len;
                tree_sum(0, segments, out, spare, &mut |segment, out| leaf(segment, rows.clone(), out, extra));
            }
        };
        let outs = out.par_chunks_mut(lane_rows * self.row_len);
        if lane == 0 {
            outs.enumerate().for_each(|(i, out)| work((i, (out, &mut []))));
        } else {
            outs.zip(scratch.par_chunks_mut(lane)).enumerate().for_each(work);
        }
    }
}

/// Rows of a batch that one thread takes.
fn rows_each(rows: usize) -> usize {
    rows.div_ceil(kernels::lanes()).max(1)
}

/// Runs `f(first row, y, x)` over the rows of `y: (rows, y_len)` and `x: (rows, x_len)`, split over the threads.
fn over_rows(
    rows: usize,
    (y, y_len): (&mut [f32], usize),
    (x, x_len): (&[f32], usize),
    f: impl Fn(usize, &mut [f32], &[f32]) + Sync,
) {
    let each = rows_each(rows);
    let split = y.par_chunks_mut((each * y_len).max(1)).zip(x.par_chunks((each * x_len).max(1)));
    split.enumerate().for_each(|(i, (y, x))| f(i * each, y, x));
}

/// [`over_rows`], one sample at a time: `f(row, y, x)`.
fn over_samples(
    rows: usize,
    (y, y_len): (&mut [f32], usize),
    (x, x_len): (&[f32], usize),
    f: impl Fn(usize, &mut [f32], &[f32]) + Sync,
) {
    over_rows(rows, (y, y_len), (x, x_len), |first, y, x| {
        for (i, (y, x)) in y.chunks_exact_mut(y_len).zip(x.chunks_exact(x_len)).enumerate() {
            f(first + i, y, x);
        }
    });
}
