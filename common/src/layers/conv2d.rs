//! Two-dimensional convolution (cross-correlation, as every framework has it).

use super::activation::masked;
use super::{Blocks, Grads, Layer, Params, Pass, rows_each, tree_spare, tree_sum};
use crate::kernels::conv::{Patches, PatchesT, Window};
use crate::kernels::gemm::product_with;
use crate::kernels::{self, Finish, Mat, Start, gemm};
use crate::layout::{Init, Role, Tensor};
use rayon::prelude::*;

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

    /// A shifted image and its patches: what a sample's inputs' gradient needs.
    fn sample_scratch(&self) -> usize {
        self.window.shifted() + self.window.patch() * self.window.positions()
    }

    fn weights(&self) -> usize {
        self.filters() * self.window.patch()
    }

    fn blocks(&self) -> Blocks {
        Blocks { rows: self.filters(), row_len: self.window.patch(), limit: 1 << 18, extra: self.window.shifted() }
    }
}

impl Layer for Conv2d {
    fn out_shape(&self) -> &[usize] {
        &self.out_shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        let w = &self.window;
        let tensor = |name: &str, shape: &[usize], init| Tensor {
            name: name.into(),
            shape: shape.into(),
            role: Role::Trainable,
            init,
        };
        let mut all = vec![tensor("weight", &[self.filters(), w.channels, w.kernel, w.kernel], self.init)];
        if self.bias {
            let bound = 1.0 / libm::sqrtf(w.patch() as f32);
            all.push(tensor("bias", &[self.filters()], Init::Uniform { bound }));
        }
        all
    }

    /// The job's layers that it stands for: its activation is one, too.
    fn span(&self) -> usize {
        if self.finish == Finish::Keep { 1 } else { 2 }
    }

    /// The sums' gradient, where it is not the output's, then what each of the gradients needs.
    fn scratch(&self, rows: usize, segments: usize) -> usize {
        let masked = if self.finish == Finish::Keep { 0 } else { rows * self.out_len() };
        let lanes = kernels::lanes() * self.sample_scratch();
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
        let (window, f) = (self.window, self.filters());
        let (w_fp, b_f) = params.trainable.split_at(self.weights());
        let each = rows_each(pass.segments.total());
        let lanes = y.par_chunks_mut(each * self.out_len()).zip(x.par_chunks(each * self.in_len()));
        lanes.zip(scratch.par_chunks_mut(window.shifted())).for_each(|((y, x), shifted)| {
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
        let (dy, scratch) = masked(self.finish, y, dy, scratch);
        let (dw_fp, db_f) = grads.trainable.split_at_mut(self.weights());
        self.blocks().sum(segments.len(), dw_fp, scratch, |segment, block, out, shifted| {
            out.fill(0.0);
            for row in segments.rows(segment) {
                window.shift(&x[row * in_len..(row + 1) * in_len], shifted);
                let dy_fn = &dy[row * out_len..][block.start * n..block.end * n];
                let patches = PatchesT(Patches { window, shifted });
                product_with(out, Mat::new(dy_fn, block.len(), n), patches, Start::Old, Finish::Keep);
            }
        });
        if self.bias {
            tree_sum(0, segments.len(), db_f, scratch, &mut |segment, out| {
                out.fill(0.0);
                for row in segments.rows(segment) {
                    let planes = dy[row * out_len..(row + 1) * out_len].chunks_exact(n);
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
        pass.finish(grads.trainable);
        if let Some(dx) = dx {
            let w_fp = Mat::new(params.trainable, f, patch);
            let each = rows_each(segments.total());
            let lanes = dx.par_chunks_mut(each * in_len).zip(dy.par_chunks(each * out_len));
            lanes.zip(scratch.par_chunks_mut(self.sample_scratch())).for_each(|((dx, dy), scratch)| {
                let (shifted, cols) = scratch.split_at_mut(window.shifted());
                for (dx, dy) in dx.chunks_exact_mut(in_len).zip(dy.chunks_exact(out_len)) {
                    gemm(cols, w_fp.t(), Mat::new(dy, f, n), false);
                    window.unpatch(cols, shifted, dx);
                }
            });
        }
    }
}
