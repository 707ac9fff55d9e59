//! Normalisation within a sample, with learnt scale and shift.

use super::{Grads, Layer, Params, Pass, over_rows, rows_each, tree_spare, tree_sum};
use crate::kernels::{self, vectorized};
use crate::layout::{Init, Kind, Role, Tensor};
use rayon::prelude::*;

/// Over the last dimensions of a sample. Layer normalisation (Ba, Kiros and Hinton, 2016, eq. 3) takes the mean away and
/// divides by the deviation; root mean square normalisation (Zhang and Sennrich, 2019, eq. 4) only divides, and has no shift.
pub struct LayerNorm {
    pub shape: Vec<usize>,
    /// How many dimensions are normalised together, at least 1.
    pub dims: usize,
    /// Whether the mean is taken away, and a shift is learnt.
    pub centered: bool,
    pub eps: f32,
}

impl LayerNorm {
    fn normalised(&self) -> &[usize] {
        &self.shape[self.shape.len() - self.dims..]
    }

    /// Values that are normalised together.
    fn len(&self) -> usize {
        self.normalised().iter().product()
    }

    /// Groups of such values in a sample.
    fn groups(&self) -> usize {
        self.shape[..self.shape.len() - self.dims].iter().product()
    }

    /// What is taken away from a group, and what it is then multiplied with.
    #[inline(always)]
    fn statistics(&self, x: &[f32]) -> [f32; 2] {
        let n = x.len() as f32;
        let mean = if self.centered { kernels::sum(x) / n } else { 0.0 };
        [mean, 1.0 / (kernels::sum_squared_from(x, mean) / n + self.eps).sqrt()]
    }
}

impl Layer for LayerNorm {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        let tensor = |name: &str, value| Tensor {
            name: name.into(),
            shape: self.normalised().into(),
            role: Role::Trainable,
            kind: Kind::Norm,
            init: Init::Constant(value),
        };
        let shift = self.centered.then(|| tensor("bias", 0.0));
        [tensor("weight", 1.0)].into_iter().chain(shift).collect()
    }

    /// The statistics of each group.
    fn saved(&self, rows: usize, _: usize) -> usize {
        2 * rows * self.groups()
    }

    fn scratch(&self, _: usize, segments: usize) -> usize {
        tree_spare(segments, 2 * self.len())
    }

    fn forward(&self, pass: &Pass<'_>, params: Params<'_>, x: &[f32], y: &mut [f32], saved: &mut [f32], _: &mut [f32]) {
        let n = self.len();
        let (gamma, beta) = params.trainable.split_at(n);
        let (saved, _) = saved.as_chunks_mut::<2>();
        let each = rows_each(pass.segments.total() * self.groups());
        let lanes = y.par_chunks_mut(each * n).zip(x.par_chunks(each * n)).zip(saved.par_chunks_mut(each));
        lanes.for_each(|((y, x), saved)| {
            vectorized(
                #[inline(always)]
                || {
                    for ((y, x), saved) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(saved) {
                        let [mean, inv] = self.statistics(x);
                        *saved = [mean, inv];
                        for ((y, x), gamma) in y.iter_mut().zip(x).zip(gamma) {
                            *y = (x - mean) * inv * gamma;
                        }
                        y.iter_mut().zip(beta).for_each(|(y, beta)| *y += beta);
                    }
                },
            );
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
        let (n, groups) = (self.len(), self.groups());
        let gamma = &params.trainable[..n];
        let (saved, _) = saved.as_chunks::<2>();
        tree_sum(0, pass.segments.len(), grads.trainable, scratch, &mut |i, out| {
            let samples = pass.segments.rows(i);
            out.fill(0.0);
            let (dscale, dshift) = out.split_at_mut(n);
            vectorized(
                #[inline(always)]
                || {
                    for row in samples.start * groups..samples.end * groups {
                        let (x, dy, [mean, inv]) =
                            (&x[row * n..(row + 1) * n], &dy[row * n..(row + 1) * n], saved[row]);
                        for (dscale, (x, dy)) in dscale.iter_mut().zip(x.iter().zip(dy)) {
                            *dscale += dy * ((x - mean) * inv);
                        }
                        dshift.iter_mut().zip(dy).for_each(|(dshift, dy)| *dshift += dy);
                    }
                },
            );
        });
        pass.finish(grads.trainable);
        let Some(dx) = dx else { return };
        over_rows(pass.segments.total() * groups, (dx, n), (dy, n), |first, dx, dy| {
            let rows = dx.chunks_exact_mut(n).zip(dy.chunks_exact(n)).enumerate();
            vectorized(
                #[inline(always)]
                || {
                    for (i, (dx, dy)) in rows {
                        let row = first + i;
                        let (x, [mean, inv]) = (&x[row * n..(row + 1) * n], saved[row]);
                        dx.iter_mut().zip(dy.iter().zip(gamma)).for_each(|(dx, (dy, gamma))| *dx = dy * gamma);
                        let a = if self.centered { kernels::sum(dx) / n as f32 } else { 0.0 };
                        let b = kernels::reduce(dx, x, |d, x| d * (x - mean)) * inv / n as f32;
                        dx.iter_mut().zip(x).for_each(|(dx, x)| *dx = inv * (*dx - a - (x - mean) * inv * b));
                    }
                },
            );
        });
    }
}
