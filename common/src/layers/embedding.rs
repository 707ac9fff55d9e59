//! Rows of a table, chosen by the tokens of a sample.

use super::{Blocks, Grads, Layer, Params, Pass, Sequential, over_rows, over_samples, tree_spare, tree_sum};
use crate::kernels::{Mat, column_sums, gemm, vectorized};
use crate::layout::{Init, Kind, Role, Tensor};
use std::ops::Range;

/// A learnt table `(vocabulary, width)`, whose rows tokens choose: whole numbers below `vocabulary`, as data sets of tokens give
/// them.
pub struct Table {
    pub vocabulary: usize,
    pub width: usize,
    pub init: Init,
}

impl Table {
    fn len(&self) -> usize {
        self.vocabulary * self.width
    }

    fn tensor(&self) -> Tensor {
        let shape = vec![self.vocabulary, self.width];
        Tensor { name: "weight".into(), shape, role: Role::Trainable, kind: Kind::Embedding, init: self.init }
    }

    /// Of its gradient; a block of it goes through all tokens of its segment.
    fn blocks(&self) -> Blocks {
        Blocks { rows: self.vocabulary, row_len: self.width, limit: 1 << 18, most: self.vocabulary, extra: 0 }
    }

    /// `y`: the rows of the tokens `x`, one after another.
    fn look_up(&self, table: &[f32], x: &[f32], y: &mut [f32]) {
        let width = self.width;
        over_rows(x.len(), (y, width), (x, 1), |_, y, x| {
            for (y, token) in y.chunks_exact_mut(width).zip(x) {
                y.copy_from_slice(&table[*token as usize * width..][..width]);
            }
        });
    }

    /// Adds tokens' gradients, each with its share of it, to those rows of the table that `block` holds, in the tokens' order.
    fn add_rows<'d>(
        &self,
        tokens: impl Iterator<Item = (&'d f32, f32, &'d [f32])>,
        rows: Range<usize>,
        block: &mut [f32],
    ) {
        vectorized(
            #[inline(always)]
            || {
                for (token, share, dy) in tokens {
                    let token = *token as usize;
                    if rows.contains(&token) {
                        let row = &mut block[(token - rows.start) * self.width..][..self.width];
                        row.iter_mut().zip(dy).for_each(|(row, dy)| *row += share * dy);
                    }
                }
            },
        );
    }

    /// Tokens, each with a gradient of its own.
    fn each<'d>(&self, tokens: &'d [f32], dy: &'d [f32]) -> impl Iterator<Item = (&'d f32, f32, &'d [f32])> + use<'d> {
        tokens.iter().zip(dy.chunks_exact(self.width)).map(|(token, dy)| (token, 1.0, dy))
    }
}

/// Tokens have no slope.
fn no_slope(dx: Option<&mut [f32]>) {
    if let Some(dx) = dx {
        dx.fill(0.0);
    }
}

/// Each token's row of a table: `[positions]` to `[positions, width]`. It is the first layer of its model.
pub struct Embedding {
    pub table: Table,
    /// `[positions, width]`.
    pub shape: [usize; 2],
}

impl Layer for Embedding {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        vec![self.table.tensor()]
    }

    fn scratch(&self, _: usize, segments: usize) -> usize {
        self.table.blocks().scratch(segments)
    }

    fn forward(&self, _: &Pass<'_>, params: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        self.table.look_up(params.trainable, x, y);
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        _: Params<'_>,
        x: &[f32],
        _: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        _: &mut [f32],
        scratch: &mut [f32],
    ) {
        let ([positions, width], segments) = (self.shape, pass.segments);
        self.table.blocks().sum(segments.len(), grads.trainable, scratch, |segment, rows, block, _| {
            let samples = segments.rows(segment);
            let tokens = samples.start * positions..samples.end * positions;
            block.fill(0.0);
            let dy = &dy[tokens.start * width..tokens.end * width];
            self.table.add_rows(self.table.each(&x[tokens], dy), rows, block);
        });
        pass.finish(grads.trainable);
        no_slope(dx);
    }
}

/// The mean of the tokens' rows of a table: `[positions]` to `[width]`. Token 0 fills samples up and is passed over; the mean of no
/// tokens is 0.
pub struct EmbeddingBag {
    pub table: Table,
    pub positions: usize,
    pub width: [usize; 1],
}

/// What each token of a sample has of its mean.
#[inline(always)]
fn share(tokens: &[f32]) -> f32 {
    1.0 / tokens.iter().filter(|token| **token != 0.0).count().max(1) as f32
}

impl Layer for EmbeddingBag {
    fn out_shape(&self) -> &[usize] {
        &self.width
    }

    fn tensors(&self) -> Vec<Tensor> {
        vec![self.table.tensor()]
    }

    fn scratch(&self, _: usize, segments: usize) -> usize {
        self.table.blocks().scratch(segments)
    }

    fn forward(&self, pass: &Pass<'_>, params: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let [width] = self.width;
        over_samples(pass.segments.total(), (y, width), (x, self.positions), |_, y, tokens| {
            let share = share(tokens);
            vectorized(
                #[inline(always)]
                || {
                    y.fill(0.0);
                    for token in tokens.iter().filter(|token| **token != 0.0) {
                        let row = &params.trainable[*token as usize * width..][..width];
                        y.iter_mut().zip(row).for_each(|(y, row)| *y += row);
                    }
                    y.iter_mut().for_each(|y| *y *= share);
                },
            );
        });
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        _: Params<'_>,
        x: &[f32],
        _: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        _: &mut [f32],
        scratch: &mut [f32],
    ) {
        let ([width], segments) = (self.width, pass.segments);
        self.table.blocks().sum(segments.len(), grads.trainable, scratch, |segment, rows, block, _| {
            block.fill(0.0);
            for sample in segments.rows(segment) {
                let tokens = &x[sample * self.positions..][..self.positions];
                let (share, dy) = (share(tokens), &dy[sample * width..][..width]);
                let some = tokens.iter().filter(|token| **token != 0.0);
                self.table.add_rows(some.map(|token| (token, share, dy)), rows.clone(), block);
            }
        });
        pass.finish(grads.trainable);
        no_slope(dx);
    }
}

/// A table that is used twice (Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017): the tokens'
/// rows of it go through `body`, and the result's products with all its rows are the logits, `[positions, vocabulary]`.
pub struct TiedEmbedding {
    pub table: Table,
    pub body: Sequential,
    /// `[positions, vocabulary]`.
    pub shape: [usize; 2],
}

impl TiedEmbedding {
    /// Values of a sample before the body, and behind it.
    fn inner(&self) -> usize {
        self.shape[0] * self.table.width
    }
}

impl Layer for TiedEmbedding {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    /// The table, then those of the body.
    fn tensors(&self) -> Vec<Tensor> {
        [self.table.tensor()].into_iter().chain(self.body.tensors()).collect()
    }

    /// The body's inputs and outputs, and what it keeps.
    fn saved(&self, rows: usize, segments: usize) -> usize {
        2 * rows * self.inner() + self.body.saved(rows, segments)
    }

    /// Their gradients, and what the body and the table's gradient need, one after the other.
    fn scratch(&self, rows: usize, segments: usize) -> usize {
        2 * rows * self.inner() + self.body.scratch(rows, segments).max(self.table.blocks().scratch(segments))
    }

    fn multiply_adds(&self) -> u64 {
        self.body.multiply_adds() + (self.shape[0] * self.table.len()) as u64
    }

    /// None: the body's inputs have a gradient, too.
    fn input_multiply_adds(&self) -> u64 {
        0
    }

    fn forward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        y: &mut [f32],
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (samples, len, width) = (pass.segments.total(), self.inner(), self.table.width);
        let (table, of_body) = params.trainable.split_at(self.table.len());
        let (into, saved) = saved.split_at_mut(samples * len);
        let (out, saved) = saved.split_at_mut(samples * len);
        self.table.look_up(table, x, into);
        let of_body = Params { trainable: of_body, ..params };
        self.body.forward(
            pass,
            of_body,
            into,
            out,
            saved,
            &mut scratch[..self.body.scratch(samples, pass.segments.len())],
        );
        let table = Mat::new(table, self.table.vocabulary, width);
        over_rows(samples * self.shape[0], (y, self.shape[1]), (out, width), |_, y, out| {
            gemm(y, Mat::new(out, out.len() / width, width), table.t(), false);
        });
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        _: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (segments, [positions, vocabulary]) = (pass.segments, self.shape);
        let (samples, len, width) = (segments.total(), self.inner(), self.table.width);
        let (table, of_body) = params.trainable.split_at(self.table.len());
        let (d_table, d_body) = grads.trainable.split_at_mut(self.table.len());
        let (into, saved) = saved.split_at_mut(samples * len);
        let (out, saved) = saved.split_at_mut(samples * len);
        let (d_into, scratch) = scratch.split_at_mut(samples * len);
        let (d_out, scratch) = scratch.split_at_mut(samples * len);
        let table = Mat::new(table, vocabulary, width);
        over_rows(samples * positions, (d_out, width), (dy, vocabulary), |_, d_out, dy| {
            gemm(d_out, Mat::new(dy, dy.len() / vocabulary, vocabulary), table, false);
        });
        let of_body = Params { trainable: of_body, ..params };
        let into_body = Grads { trainable: d_body, ..grads };
        let within = Pass { first: pass.first + d_table.len(), ..*pass };
        let body_scratch = &mut scratch[..self.body.scratch(samples, segments.len())];
        self.body.backward(&within, of_body, into, out, d_out, Some(d_into), into_body, saved, body_scratch);
        // A segment's gradient is one sum of both uses.
        self.table.blocks().sum(segments.len(), d_table, scratch, |segment, rows, block, _| {
            let samples = segments.rows(segment);
            let at = samples.start * positions..samples.end * positions;
            let dy = Mat::new(&dy[at.start * vocabulary..at.end * vocabulary], at.len(), vocabulary);
            let inner = at.start * width..at.end * width;
            let out = Mat::new(&out[inner.clone()], at.len(), width);
            gemm(block, dy.part(rows.start, rows.len()).t(), out, false);
            self.table.add_rows(self.table.each(&x[at], &d_into[inner]), rows, block);
        });
        pass.finish(d_table);
        no_slope(dx);
    }
}

/// Adds a learnt value to each of a sample's: with samples `[positions, width]`, a learnt row for each position.
pub struct Positions {
    pub shape: Vec<usize>,
    pub init: Init,
}

impl Positions {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Layer for Positions {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        vec![Tensor {
            name: "weight".into(),
            shape: self.shape.clone(),
            role: Role::Trainable,
            kind: Kind::Embedding,
            init: self.init,
        }]
    }

    fn scratch(&self, _: usize, segments: usize) -> usize {
        tree_spare(segments, self.len())
    }

    fn forward(&self, pass: &Pass<'_>, params: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let len = self.len();
        over_rows(pass.segments.total(), (y, len), (x, len), |_, y, x| {
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(len).zip(x.chunks_exact(len)) {
                        y.iter_mut().zip(x.iter().zip(params.trainable)).for_each(|(y, (x, p))| *y = x + p);
                    }
                },
            );
        });
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        _: Params<'_>,
        _: &[f32],
        _: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        _: &mut [f32],
        scratch: &mut [f32],
    ) {
        let len = self.len();
        tree_sum(0, pass.segments.len(), grads.trainable, scratch, &mut |segment, out| {
            let rows = pass.segments.rows(segment);
            column_sums(&dy[rows.start * len..rows.end * len], out);
        });
        pass.finish(grads.trainable);
        if let Some(dx) = dx {
            over_rows(pass.segments.total(), (dx, len), (dy, len), |_, dx, dy| dx.copy_from_slice(dy));
        }
    }
}
