//! Two-dimensional convolution (cross-correlation, as every framework has it).

use super::activation::masked;
use super::{Blocks, Grads, Layer, Params, Pass, Segments, rows_each, tree_spare, tree_sum};
use crate::kernels::conv::{Patches, PatchesT, Window};
use crate::kernels::gemm::product_with;
use crate::kernels::winograd::{InputsGradient, Outputs, WeightsGradient, Winograd};
use crate::kernels::{self, Finish, Mat, Start, gemm};
use crate::layout::{Init, Kind, Role, Tensor};
use crate::tree::Node;
use rayon::prelude::*;
use std::ops::Range;

/// `y[f] = finish(b[f] + sum over c of w[f, c] * x[c])`; `w`: `(filters, channels, kernel, kernel)`, planes row-major.
pub struct Conv2d {
    pub window: Window,
    pub out_shape: [usize; 3],
    pub bias: bool,
    pub init: Init,
    /// The activation behind it, if it is one that is computed with the product.
    pub finish: Finish,
}

impl Conv2d {
    fn filters(&self) -> usize {
        self.out_shape[0]
    }

    fn in_len(&self) -> usize {
        self.window.channels * self.window.height * self.window.width
    }

    fn out_len(&self) -> usize {
        self.filters() * self.window.positions()
    }

    /// The quick way, for the convolutions that it fits.
    fn winograd(&self) -> Option<Winograd> {
        Winograd::of(self.window, self.filters())
    }

    /// Whether a thread computes all gradients of some images at once, so that they share what they are computed from: as
    /// long as the sums of all filters stay in the cache.
    fn at_once(&self) -> bool {
        self.winograd().map_or(self.weights() <= 1 << 15, |winograd| winograd.most_filters() >= self.filters())
    }

    /// What [`AtOnce::sum`] needs beside its result: for `tasks`, each with the sums that are open in it, one for each of
    /// them to be added to another, and what a leaf needs.
    fn spare(&self, tasks: usize, depth: usize) -> usize {
        let plain = || self.lane_scratch() + self.out_len();
        let leaf = self.winograd().map_or_else(plain, |winograd| winograd.weights_scratch(self.filters()));
        tasks * leaf + (tasks * depth + tasks - 1) * (self.weights() + self.filters())
    }

    /// What a thread needs for samples' outputs or inputs' gradient: a shifted image and its patches, on the plain way.
    fn lane_scratch(&self) -> usize {
        let patches = || self.window.shifted() + self.window.patch() * self.window.positions();
        self.winograd().map_or_else(patches, |winograd| winograd.scratch())
    }

    /// What all threads share while they compute them.
    fn prepared(&self) -> usize {
        self.winograd().map_or(0, |winograd| winograd.prepared())
    }

    fn weights(&self) -> usize {
        self.filters() * self.window.patch()
    }

    fn blocks(&self) -> Blocks {
        let (rows, row_len, limit) = (self.filters(), self.window.patch(), 1 << 18);
        match self.winograd() {
            None => Blocks { rows, row_len, limit, most: rows, extra: self.window.shifted() },
            Some(winograd) => {
                let most = winograd.most_filters().min(rows);
                Blocks { rows, row_len, limit, most, extra: winograd.weights_scratch(most) }
            }
        }
    }
}

/// The weight and bias of filters that see what lies under `window`.
pub(super) fn tensors(filters: usize, window: &Window, bias: bool, init: Init) -> Vec<Tensor> {
    let tensor = |name: &str, shape: &[usize], init| Tensor {
        name: name.into(),
        shape: shape.into(),
        role: Role::Trainable,
        kind: if name == "bias" { Kind::Bias } else { Kind::Weight },
        init,
    };
    let mut all = vec![tensor("weight", &[filters, window.channels, window.kernel, window.kernel], init)];
    if bias {
        let bound = 1.0 / libm::sqrtf(window.patch() as f32);
        all.push(tensor("bias", &[filters], Init::Uniform { bound }));
    }
    all
}

/// `db`: the bias' gradient, from `dy: (rows, filters, positions)`, summed over the segments.
pub(super) fn sum_planes(segments: &Segments, dy: &[f32], positions: usize, db: &mut [f32], scratch: &mut [f32]) {
    let out_len = db.len() * positions;
    tree_sum(0, segments.len(), db, scratch, &mut |segment, out| {
        out.fill(0.0);
        for row in segments.rows(segment) {
            let planes = dy[row * out_len..(row + 1) * out_len].chunks_exact(positions);
            kernels::vectorized(
                #[inline(always)]
                || {
                    for (o, dy) in out.iter_mut().zip(planes) {
                        *o += kernels::sum(dy);
                    }
                },
            );
        }
    });
}

impl Layer for Conv2d {
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
        if self.at_once() {
            let spare = self.spare(tasks(), depth(segments));
            return self.prepared() + spare.max(kernels::lanes() * self.lane_scratch());
        }
        let masked = if self.finish == Finish::Keep { 0 } else { rows * self.out_len() };
        let lanes = self.prepared() + kernels::lanes() * self.lane_scratch();
        masked + lanes.max(self.blocks().scratch(segments)).max(tree_spare(segments, self.filters()))
    }

    fn multiply_adds(&self) -> u64 {
        let plain = || self.weights() * self.window.positions();
        self.winograd().map_or_else(plain, |winograd| winograd.multiply_adds()) as u64
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
        let (window, f) = (self.window, self.filters());
        let (w_fp, b_f) = params.trainable.split_at(self.weights());
        let each = rows_each(pass.segments.total());
        let (prepared, scratch) = scratch.split_at_mut(self.prepared());
        let lanes = y.par_chunks_mut(each * self.out_len()).zip(x.par_chunks(each * self.in_len()));
        let lanes = lanes.zip(scratch.par_chunks_mut(self.lane_scratch()));
        if let Some(winograd) = self.winograd() {
            winograd.prepare_forward(w_fp, self.bias.then_some(b_f), prepared);
            lanes.for_each(|((y, x), scratch)| winograd.forward(prepared, x, y, self.finish, scratch));
            return;
        }
        lanes.for_each(|((y, x), shifted)| {
            let shifted = &mut shifted[..window.shifted()];
            for (y, x) in y.chunks_exact_mut(self.out_len()).zip(x.chunks_exact(self.in_len())) {
                window.shift(x, shifted);
                let start = if self.bias { Start::Rows(b_f) } else { Start::Zero };
                let w_fp = Mat::new(w_fp, f, window.patch());
                product_with(y, w_fp, Patches { window, shifted }, start, self.finish);
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
        let window = self.window;
        let (patch, n, f) = (window.patch(), window.positions(), self.filters());
        let (in_len, out_len) = (self.in_len(), self.out_len());
        let segments = pass.segments;
        if self.at_once() {
            let (prepared, scratch) = scratch.split_at_mut(self.prepared());
            if let (Some(winograd), Some(_)) = (self.winograd(), &dx) {
                winograd.prepare_inputs(params.trainable, prepared);
            }
            let weights = &params.trainable[..self.weights()];
            let at_once = AtOnce { layer: self, weights, prepared, x, y, dy, depth: depth(segments.len()) };
            at_once.sum(Part::all(segments), tasks(), grads.trainable, scratch, dx);
            return pass.finish(grads.trainable);
        }
        let (dy, scratch) = masked(self.finish, y, dy, scratch);
        let outputs = |range: Range<usize>| Outputs { finish: Finish::Keep, y: &dy[range.clone()], dy: &dy[range] };
        let (dw_fp, db_f) = grads.trainable.split_at_mut(self.weights());
        self.blocks().sum(segments.len(), dw_fp, scratch, |segment, block, out, scratch| {
            let rows = segments.rows(segment);
            if let Some(winograd) = self.winograd() {
                let x = &x[rows.start * in_len..rows.end * in_len];
                let weights = WeightsGradient { x, range: block, dw: out, db: &mut [] };
                let outputs = outputs(rows.start * out_len..rows.end * out_len);
                return winograd.backward(outputs, Some(weights), None, scratch);
            }
            let shifted = scratch;
            out.fill(0.0);
            for row in rows {
                window.shift(&x[row * in_len..(row + 1) * in_len], shifted);
                let dy_fn = &dy[row * out_len..][block.start * n..block.end * n];
                let patches = PatchesT(Patches { window, shifted });
                product_with(out, Mat::new(dy_fn, block.len(), n), patches, Start::Old, Finish::Keep);
            }
        });
        if self.bias {
            sum_planes(segments, dy, n, db_f, scratch);
        }
        pass.finish(grads.trainable);
        if let Some(dx) = dx {
            let w_fp = Mat::new(params.trainable, f, patch);
            let each = rows_each(segments.total());
            let (prepared, scratch) = scratch.split_at_mut(self.prepared());
            let lanes = dx.par_chunks_mut(each * in_len).zip(dy.par_chunks(each * out_len));
            let lanes = lanes.zip(scratch.par_chunks_mut(self.lane_scratch()));
            if let Some(winograd) = self.winograd() {
                winograd.prepare_inputs(params.trainable, prepared);
                lanes.for_each(|((dx, dy), scratch)| {
                    let outputs = Outputs { finish: Finish::Keep, y: dy, dy };
                    winograd.backward(outputs, None, Some(InputsGradient { prepared, dx }), scratch);
                });
                return;
            }
            lanes.for_each(|((dx, dy), scratch)| {
                let (shifted, cols) = scratch.split_at_mut(window.shifted());
                for (dx, dy) in dx.chunks_exact_mut(in_len).zip(dy.chunks_exact(out_len)) {
                    gemm(cols, w_fp.t(), Mat::new(dy, f, n), false);
                    window.unpatch(cols, shifted, dx);
                }
            });
        }
    }
}

/// Images of a leaf of [`AtOnce::sum`], at least, and leaves of a partition, at most: these decide on bits.
const LEAF: usize = 8;
const LEAVES: usize = 8;

/// Sums that are computed beside each other: more than threads, as they take turns.
fn tasks() -> usize {
    if kernels::lanes() == 1 { 1 } else { 2 * kernels::lanes() }
}

/// Levels of the tree over the leaves of some partitions.
fn depth(segments: usize) -> usize {
    (segments.next_power_of_two() * LEAVES).trailing_zeros() as usize
}

/// Rows of a batch whose gradients are a node of one tree: over the partitions, and below each of them over its leaves.
#[derive(Clone, Copy)]
struct Part<'a> {
    segments: &'a Segments,
    node: Node,
    /// Of a single partition.
    leaves: Option<Node>,
}

impl<'a> Part<'a> {
    fn all(segments: &'a Segments) -> Part<'a> {
        Part { segments, node: Node::root(segments.len() as u32), leaves: None }
    }

    fn of_segments(self) -> Range<usize> {
        self.segments.starts[self.node.lo as usize]..self.segments.starts[self.node.hi as usize]
    }

    /// The tree over the leaves of its rows, if they are a partition.
    fn root(self) -> Node {
        Node::root((self.of_segments().len() / LEAF).clamp(1, LEAVES) as u32)
    }

    fn rows(self) -> Range<usize> {
        let (rows, count) = (self.of_segments(), self.root().len() as usize);
        let at = |leaf: u32| rows.start + rows.len() * leaf as usize / count;
        self.leaves.map_or(rows.clone(), |leaves| at(leaves.lo)..at(leaves.hi))
    }

    fn children(self) -> Option<(Part<'a>, Part<'a>)> {
        if let (None, Some((left, right))) = (self.leaves, self.node.children()) {
            return Some((Part { node: left, ..self }, Part { node: right, ..self }));
        }
        let (left, right) = self.leaves.unwrap_or(self.root()).children()?;
        Some((Part { leaves: Some(left), ..self }, Part { leaves: Some(right), ..self }))
    }
}

/// All gradients of a layer, for some images after others.
struct AtOnce<'a> {
    layer: &'a Conv2d,
    weights: &'a [f32],
    /// [`Winograd::prepare_inputs`]
    prepared: &'a [f32],
    x: &'a [f32],
    y: &'a [f32],
    dy: &'a [f32],
    depth: usize,
}

impl AtOnce<'_> {
    /// `out`: the weights' gradient and the bias', if there is one, summed over the rows of `part`; `dx`: that of its inputs.
    fn sum(&self, part: Part<'_>, tasks: usize, out: &mut [f32], spare: &mut [f32], dx: Option<&mut [f32]>) {
        let Some((left, right)) = part.children() else {
            return self.leaf(part.rows(), out, dx, spare);
        };
        let (other, spare) = spare.split_at_mut(out.len());
        let (dx_left, dx_right) = dx.map(|dx| dx.split_at_mut(left.rows().len() * self.layer.in_len())).unzip();
        if tasks == 1 {
            self.sum(left, 1, out, spare, dx_left);
            self.sum(right, 1, other, spare, dx_right);
        } else {
            let (some, rest) = (tasks / 2, tasks - tasks / 2);
            let (spare_left, spare_right) = spare.split_at_mut(self.layer.spare(some, self.depth));
            rayon::join(
                || self.sum(left, some, out, spare_left, dx_left),
                || self.sum(right, rest, other, spare_right, dx_right),
            );
        }
        kernels::add_into(out, other);
    }

    fn leaf(&self, rows: Range<usize>, out: &mut [f32], dx: Option<&mut [f32]>, scratch: &mut [f32]) {
        let AtOnce { layer, weights, prepared, .. } = *self;
        let (window, f, in_len, out_len) = (layer.window, layer.filters(), layer.in_len(), layer.out_len());
        let (patch, n) = (window.patch(), window.positions());
        let (ins, outs) = (rows.start * in_len..rows.end * in_len, rows.start * out_len..rows.end * out_len);
        let (x, outputs) =
            (&self.x[ins], Outputs { finish: layer.finish, y: &self.y[outs.clone()], dy: &self.dy[outs] });
        out.fill(0.0);
        let (dw, db) = out.split_at_mut(layer.weights());
        if let Some(winograd) = layer.winograd() {
            let weights = WeightsGradient { x, range: 0..f, dw, db };
            return winograd.backward(outputs, Some(weights), dx.map(|dx| InputsGradient { prepared, dx }), scratch);
        }
        let (masked, scratch) = scratch.split_at_mut(out_len);
        let (shifted, scratch) = scratch.split_at_mut(window.shifted());
        let cols = &mut scratch[..patch * n];
        let mut dx = dx.into_iter().flat_map(|dx| dx.chunks_exact_mut(in_len));
        for ((x, y), dy) in
            x.chunks_exact(in_len).zip(outputs.y.chunks_exact(out_len)).zip(outputs.dy.chunks_exact(out_len))
        {
            kernels::vectorized(
                #[inline(always)]
                || {
                    layer.finish.gradient(y, dy, masked);
                    db.iter_mut().zip(masked.chunks_exact(n)).for_each(|(db, dy)| *db += kernels::sum(dy));
                },
            );
            let dy = Mat::new(masked, f, n);
            window.shift(x, shifted);
            product_with(dw, dy, PatchesT(Patches { window, shifted }), Start::Old, Finish::Keep);
            if let Some(dx) = dx.next() {
                gemm(cols, Mat::new(weights, f, patch).t(), dy, false);
                window.unpatch(cols, shifted, dx);
            }
        }
    }
}
