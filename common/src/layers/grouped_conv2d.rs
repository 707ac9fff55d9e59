//! Convolution whose channels and filters are in groups that do not see each other.

use super::activation::masked;
use super::conv2d::{sum_planes, tensors};
use super::{Blocks, Grads, Layer, Params, Pass, rows_each, tree_spare};
use crate::kernels::conv::{Patches, PatchesT, Window};
use crate::kernels::gemm::product_with;
use crate::kernels::{self, Finish, Mat, Start, gemm};
use crate::layout::{Init, Tensor};
use rayon::prelude::*;

/// [`Conv2d`](super::Conv2d) in `groups` (Krizhevsky, Sutskever and Hinton, 2012, section 3.5): the filters of a group see its
/// channels alone. With a channel a group it is depthwise. `w`: `(filters, channels of a group, kernel, kernel)`.
///
/// The planes of a group lie one after another, and so do the groups of a sample, so each is a small convolution of its own.
pub struct GroupedConv2d {
    /// Over the channels of a group.
    pub window: Window,
    pub groups: usize,
    pub out_shape: [usize; 3],
    pub bias: bool,
    pub init: Init,
    /// The activation behind it, if it is one that is computed with the product.
    pub finish: Finish,
}

impl GroupedConv2d {
    fn filters(&self) -> usize {
        self.out_shape[0]
    }

    /// Filters of a group.
    fn of_group(&self) -> usize {
        self.filters() / self.groups
    }

    /// Inputs and outputs of a group, in a sample.
    fn group_lens(&self) -> (usize, usize) {
        let Window { channels, height, width, .. } = self.window;
        (channels * height * width, self.of_group() * self.window.positions())
    }

    fn weights(&self) -> usize {
        self.filters() * self.window.patch()
    }

    fn depthwise(&self) -> bool {
        self.window.channels == 1
    }

    /// What a thread needs for a group's outputs or inputs' gradient: shifted planes and their patches.
    fn lane_scratch(&self) -> usize {
        self.window.shifted() + self.window.patch() * self.window.positions()
    }

    /// Those of the weights' gradient: a row is all of a group.
    fn blocks(&self) -> Blocks {
        let row_len = self.of_group() * self.window.patch();
        Blocks { rows: self.groups, row_len, limit: 1 << 18, most: self.groups, extra: self.window.shifted() }
    }

    /// The outputs of one group.
    fn outputs(&self, w: &[f32], b: Option<&[f32]>, shifted: &[f32], y: &mut [f32]) {
        let (window, patch) = (self.window, self.window.patch());
        if self.depthwise() {
            let filters = y.chunks_exact_mut(window.positions()).zip(w.chunks_exact(patch));
            for (f, (y, w)) in filters.enumerate() {
                window.filter(w, b.map_or(0.0, |b| b[f]), shifted, self.finish, y);
            }
            return;
        }
        let start = b.map_or(Start::Zero, Start::Rows);
        product_with(y, Mat::new(w, self.of_group(), patch), Patches { window, shifted }, start, self.finish);
    }

    /// Adds the gradient of one group's weights.
    fn add_weights(&self, dy: &[f32], shifted: &[f32], dw: &mut [f32]) {
        let (window, n) = (self.window, self.window.positions());
        if self.depthwise() {
            for (dw, dy) in dw.chunks_exact_mut(window.patch()).zip(dy.chunks_exact(n)) {
                window.filter_weights(dy, shifted, dw);
            }
            return;
        }
        let patches = PatchesT(Patches { window, shifted });
        product_with(dw, Mat::new(dy, self.of_group(), n), patches, Start::Old, Finish::Keep);
    }

    /// The gradient of one group's inputs.
    fn inputs(&self, w: &[f32], dy: &[f32], dx: &mut [f32], scratch: &mut [f32]) {
        let (window, filters) = (self.window, self.of_group());
        let (shifted, cols) = scratch.split_at_mut(window.shifted());
        let cols = &mut cols[..window.patch() * window.positions()];
        if self.depthwise() {
            window.filter_inputs(w, dy, cols);
        } else {
            gemm(cols, Mat::new(w, filters, window.patch()).t(), Mat::new(dy, filters, window.positions()), false);
        }
        window.unpatch(cols, shifted, dx);
    }
}

impl Layer for GroupedConv2d {
    fn out_shape(&self) -> &[usize] {
        &self.out_shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        tensors(self.filters(), &self.window, self.bias, self.init)
    }

    /// The job's layers that it stands for: its activation is one, too.
    fn span(&self) -> usize {
        if self.finish == Finish::Keep { 1 } else { 2 }
    }

    /// The sums' gradient, where it is not the output's, then what each of the gradients needs.
    fn scratch(&self, rows: usize, segments: usize) -> usize {
        let masked = if self.finish == Finish::Keep { 0 } else { rows * self.groups * self.group_lens().1 };
        let lanes = kernels::lanes() * self.lane_scratch();
        masked + lanes.max(self.blocks().scratch(segments)).max(tree_spare(segments, self.filters()))
    }

    fn multiply_adds(&self) -> u64 {
        (self.weights() * self.window.positions()) as u64
    }

    fn forward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        y: &mut [f32],
        _: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (w, b) = params.trainable.split_at(self.weights());
        let (in_len, out_len) = self.group_lens();
        let (filters, each) = (self.of_group(), rows_each(pass.segments.total()) * self.groups);
        let lanes = y.par_chunks_mut(each * out_len).zip(x.par_chunks(each * in_len));
        lanes.zip(scratch.par_chunks_mut(self.lane_scratch())).for_each(|((y, x), scratch)| {
            let shifted = &mut scratch[..self.window.shifted()];
            for (i, (y, x)) in y.chunks_exact_mut(out_len).zip(x.chunks_exact(in_len)).enumerate() {
                let own = i % self.groups * filters..(i % self.groups + 1) * filters;
                let w = &w[own.start * self.window.patch()..own.end * self.window.patch()];
                self.window.shift(x, shifted);
                self.outputs(w, self.bias.then(|| &b[own]), shifted, y);
            }
        });
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        y: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        _: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (in_len, out_len) = self.group_lens();
        let (segments, groups) = (pass.segments, self.groups);
        let weights = self.of_group() * self.window.patch();
        let (dy, scratch) = masked(self.finish, y, dy, scratch);
        let (dw, db) = grads.trainable.split_at_mut(self.weights());
        self.blocks().sum(segments.len(), dw, scratch, |segment, block, dw, shifted| {
            dw.fill(0.0);
            for row in segments.rows(segment) {
                for (group, dw) in block.clone().zip(dw.chunks_exact_mut(weights)) {
                    let at = row * groups + group;
                    self.window.shift(&x[at * in_len..][..in_len], shifted);
                    self.add_weights(&dy[at * out_len..][..out_len], shifted, dw);
                }
            }
        });
        if self.bias {
            sum_planes(segments, dy, self.window.positions(), db, scratch);
        }
        pass.finish(grads.trainable);
        let Some(dx) = dx else { return };
        let each = rows_each(segments.total()) * groups;
        let lanes = dx.par_chunks_mut(each * in_len).zip(dy.par_chunks(each * out_len));
        lanes.zip(scratch.par_chunks_mut(self.lane_scratch())).for_each(|((dx, dy), scratch)| {
            for (i, (dx, dy)) in dx.chunks_exact_mut(in_len).zip(dy.chunks_exact(out_len)).enumerate() {
                self.inputs(&params.trainable[i % groups * weights..][..weights], dy, dx, scratch);
            }
        });
    }
}
