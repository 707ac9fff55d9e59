//! The fully connected layer.

use super::{Blocks, Grads, Layer, Params, Pass, over_rows, tree_spare, tree_sum};
use crate::kernels::{Mat, column_sums, gemm};
use crate::layout::{Init, Role, Tensor};

/// `y = x w^T + b`; `w`: `(outputs, inputs)`, `b`: `(outputs)`.
pub struct Linear {
    pub inputs: usize,
    pub outputs: [usize; 1],
    pub bias: bool,
    pub init: Init,
}

impl Linear {
    fn weights(&self) -> usize {
        self.inputs * self.outputs[0]
    }

    fn blocks(&self) -> Blocks {
        Blocks { rows: self.outputs[0], row_len: self.inputs, limit: 1 << 16, extra: 0 }
    }
}

impl Layer for Linear {
    fn out_shape(&self) -> &[usize] {
        &self.outputs
    }

    fn tensors(&self) -> Vec<Tensor> {
        let tensor = |name: &str, shape: &[usize], init| Tensor {
            name: name.into(),
            shape: shape.into(),
            role: Role::Trainable,
            init,
        };
        let mut all = vec![tensor("weight", &[self.outputs[0], self.inputs], self.init)];
        if self.bias {
            let bound = 1.0 / libm::sqrtf(self.inputs as f32);
            all.push(tensor("bias", &self.outputs, Init::Uniform { bound }));
        }
        all
    }

    fn scratch(&self, _: usize, segments: usize) -> usize {
        self.blocks().scratch(segments).max(tree_spare(segments, self.outputs[0]))
    }

    fn multiply_adds(&self) -> u64 {
        self.weights() as u64
    }

    fn forward(&self, pass: &Pass<'_>, params: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let (i, o) = (self.inputs, self.outputs[0]);
        let (w_oi, b_o) = params.trainable.split_at(self.weights());
        over_rows(pass.segments.total(), (y, o), (x, i), |_, y, x| {
            if self.bias {
                y.chunks_exact_mut(o).for_each(|y| y.copy_from_slice(b_o));
            }
            gemm(y, Mat::new(x, x.len() / i, i), Mat::new(w_oi, o, i).t(), self.bias);
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
        let (i, o) = (self.inputs, self.outputs[0]);
        let (dw_oi, db_o) = grads.trainable.split_at_mut(self.weights());
        let segments = pass.segments;
        self.blocks().sum(segments.len(), dw_oi, scratch, |segment, block, out, _| {
            let rows = segments.rows(segment);
            let (n, dy, x) = (rows.len(), &dy[rows.start * o..rows.end * o], &x[rows.start * i..rows.end * i]);
            gemm(out, Mat::columns(dy, n, o, block.start, block.len()).t(), Mat::new(x, n, i), false);
        });
        if self.bias {
            tree_sum(0, segments.len(), db_o, scratch, &mut |segment, out| {
                let rows = segments.rows(segment);
                column_sums(&dy[rows.start * o..rows.end * o], out);
            });
        }
        pass.finish(grads.trainable);
        if let Some(dx) = dx {
            let w_oi = Mat::new(params.trainable, o, i);
            over_rows(segments.total(), (dx, i), (dy, o), |_, dx, dy| {
                gemm(dx, Mat::new(dy, dy.len() / o, o), w_oi, false);
            });
        }
    }
}
