//! Layers: functions over slices, with their gradients.
//!
//! A batch is the concatenation of several partitions' micro-batches ([`Segments`]). Rows (samples) never mix, except in
//! two places that are computed segment by segment: batch-norm's statistics, and parameter gradients, which are summed
//! over the segments in the fixed tree of [`crate::tree`]. So the bits of a gradient depend on the partitions alone, not
//! on how many of them a worker computes at once, nor on its threads.
//!
//! All memory is planned once: a layer says how many floats it needs to keep between forward and backward (`saved`) and
//! how many while it runs (`scratch`), and gets slices of exactly that length.

use crate::layout::Tensor;
use crate::rng::Key;

/// The partitions of a batch: rows `starts[i]..starts[i+1]` belong to leaf `lo + i` of the tree. Empty ranges are allowed.
#[derive(Clone, Debug, Default)]
pub struct Segments {
    /// First partition.
    pub lo: u32,
    /// `partitions + 1` row numbers, the first 0, the last the batch's rows.
    pub starts: Vec<usize>,
}

/// What a layer may know about the pass it runs in.
pub struct Pass<'a> {
    pub segments: &'a Segments,
    pub train: bool,
    /// Seed and step: `key.with(partition)...` for dropout; rows are numbered within their partition.
    pub key: Key,
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

    /// Floats kept from forward to backward, for a batch of `rows`.
    fn saved(&self, _rows: usize) -> usize {
        0
    }

    /// Floats needed while forward or backward runs, for a batch of `rows` in `segments` segments.
    fn scratch(&self, _rows: usize, _segments: usize) -> usize {
        0
    }

    /// `y = f(x)`.
    fn forward(&self, pass: &Pass<'_>, params: Params<'_>, x: &[f32], y: &mut [f32], saved: &mut [f32], scratch: &mut [f32]);

    /// `dx = f'(x)^T dy` (where wanted), and the **sum** over samples of the parameter gradients into `grads`, overwritten;
    /// running tensors get `segment rows x segment statistic`, summed over the tree.
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
    pub running: &'a [f32],
}

/// Where a layer's gradients and statistics go.
pub struct Grads<'a> {
    pub trainable: &'a mut [f32],
    pub running: &'a mut [f32],
}
