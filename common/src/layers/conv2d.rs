//! Two-dimensional convolution (cross-correlation, as every framework has it).

use super::{Blocks, Grads, Layer, Params, Pass, rows_each, tree_spare, tree_sum};
use crate::kernels::{self, Mat, conv::Window, gemm};
use crate::layout::{Init, Role, Tensor};
use rayon::prelude::*;

/// `y[f] = b[f] + sum over c of w[f, c] * x[c]`; `w`: `(filters, channels, kernel, kernel)`, planes row-major.
pub struct Conv2d {
    pub window: Window,
    pub out_shape: [usize; 3],
    pub bias: bool,
    pub init: Init,
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

    fn cols(&self) -> usize {
        self.window.patch() * self.window.positions()
    }

    fn weights(&self) -> usize {
        self.filters() * self.window.patch()
    }

    fn blocks(&self) -> Blocks {
        Blocks { rows: self.filters(), row_len: self.window.patch(), limit: 1 << 18, extra: self.cols() }
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

    fn scratch(&self, _: usize, segments: usize) -> usize {
        let lanes = kernels::lanes() * self.cols();
        lanes.max(self.blocks().scratch(segments)).max(tree_spare(segments, self.filters()))
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
        let (patch, n, f) = (self.window.patch(), self.window.positions(), self.filters());
        let (w_fp, b_f) = params.trainable.split_at(self.weights());
        let each = rows_each(pass.segments.total());
        let lanes = y.par_chunks_mut(each * self.out_len()).zip(x.par_chunks(each * self.in_len()));
        lanes.zip(scratch.par_chunks_mut(self.cols())).for_each(|((y, x), cols)| {
            for (y, x) in y.chunks_exact_mut(self.out_len()).zip(x.chunks_exact(self.in_len())) {
                self.window.im2col(x, cols);
                if self.bias {
                    y.chunks_exact_mut(n).zip(b_f).for_each(|(y, b)| y.fill(*b));
                }
                gemm(y, Mat::new(w_fp, f, patch), Mat::new(cols, patch, n), self.bias);
            }
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
        _: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (patch, n, f) = (self.window.patch(), self.window.positions(), self.filters());
        let (in_len, out_len) = (self.in_len(), self.out_len());
        let segments = pass.segments;
        let (dw_fp, db_f) = grads.trainable.split_at_mut(self.weights());
        self.blocks().sum(segments.len(), dw_fp, scratch, |segment, block, out, cols| {
            out.fill(0.0);
            for row in segments.rows(segment) {
                self.window.im2col(&x[row * in_len..(row + 1) * in_len], cols);
                let dy_fn = &dy[row * out_len..][block.start * n..block.end * n];
                gemm(out, Mat::new(dy_fn, block.len(), n), Mat::new(cols, patch, n).t(), true);
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
            lanes.zip(scratch.par_chunks_mut(self.cols())).for_each(|((dx, dy), cols)| {
                for (dx, dy) in dx.chunks_exact_mut(in_len).zip(dy.chunks_exact(out_len)) {
                    gemm(cols, w_fp.t(), Mat::new(dy, f, n), false);
                    dx.fill(0.0);
                    self.window.col2im_add(cols, dx);
                }
            });
        }
    }
}
