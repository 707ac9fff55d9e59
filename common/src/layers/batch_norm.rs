//! Normalisation over the samples of a partition, with learnt scale and shift.

use super::{Grads, Layer, Params, Pass, tree_spare, tree_sum};
use crate::kernels::{self, vectorized};
use crate::layout::{Init, Kind, Role, Tensor};

fn tensor(name: &str, shape: &[usize], role: Role, value: f32) -> Tensor {
    Tensor { name: name.into(), shape: shape.into(), role, kind: Kind::Norm, init: Init::Constant(value) }
}

/// Batch normalisation (Ioffe and Szegedy, 2015) per channel, over the samples **of one partition** and their planes: with
/// the whole batch's statistics a result could not be the sum of its partitions. Evaluation uses running statistics, which
/// are averaged over the partitions like gradients.
pub struct BatchNorm {
    pub shape: Vec<usize>,
    pub momentum: f32,
    pub eps: f32,
}

impl BatchNorm {
    fn channels(&self) -> usize {
        self.shape[0]
    }

    fn plane(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// `out[c] += sum of f(c, plane)` over the samples of a segment.
    #[inline(always)]
    fn per_channel(&self, x: &[f32], out: &mut [f32], f: impl Fn(usize, &[f32]) -> f32) {
        for sample in x.chunks_exact(self.channels() * self.plane()) {
            for (c, (o, x)) in out.iter_mut().zip(sample.chunks_exact(self.plane())).enumerate() {
                *o += f(c, x);
            }
        }
    }

    /// Applies `f(c, y, x)` to every plane.
    #[inline(always)]
    fn map(&self, x: &[f32], y: &mut [f32], mut f: impl FnMut(usize, &mut [f32], &[f32])) {
        let planes = y.chunks_exact_mut(self.plane()).zip(x.chunks_exact(self.plane()));
        for (i, (y, x)) in planes.enumerate() {
            f(i % self.channels(), y, x);
        }
    }
}

impl Layer for BatchNorm {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        let (c, running) = ([self.channels()], Role::Running { momentum: self.momentum });
        vec![
            tensor("weight", &c, Role::Trainable, 1.0),
            tensor("bias", &c, Role::Trainable, 0.0),
            tensor("running_mean", &c, running, 0.0),
            tensor("running_var", &c, running, 1.0),
        ]
    }

    /// Per segment: mean, variance (biased), `1 / sqrt(variance + eps)`.
    fn saved(&self, _: usize, segments: usize) -> usize {
        3 * self.channels() * segments
    }

    fn scratch(&self, _: usize, segments: usize) -> usize {
        tree_spare(segments, 2 * self.channels()) + 2 * self.channels() * segments
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
        let (c, len) = (self.channels(), self.channels() * self.plane());
        let (gamma, beta) = params.trainable.split_at(c);
        if !pass.train {
            let (mean, var) = params.running.split_at(c);
            let inv = &mut scratch[..c];
            inv.iter_mut().zip(var).for_each(|(i, v)| *i = 1.0 / (v + self.eps).sqrt());
            return vectorized(
                #[inline(always)]
                || {
                    self.map(x, y, |c, y, x| {
                        let (scale, m, b) = (inv[c] * gamma[c], mean[c], beta[c]);
                        y.iter_mut().zip(x).for_each(|(y, x)| *y = (x - m) * scale + b);
                    });
                },
            );
        }
        for (i, saved) in saved.chunks_exact_mut(3 * c).enumerate() {
            let rows = pass.segments.rows(i);
            let count = (rows.len() * self.plane()).max(1) as f32;
            let (x, y) = (&x[rows.start * len..rows.end * len], &mut y[rows.start * len..rows.end * len]);
            let (mean, rest) = saved.split_at_mut(c);
            let (var, inv) = rest.split_at_mut(c);
            vectorized(
                #[inline(always)]
                || {
                    mean.fill(0.0);
                    self.per_channel(x, mean, |_, x| kernels::sum(x));
                    mean.iter_mut().for_each(|m| *m /= count);
                    var.fill(0.0);
                    self.per_channel(x, var, |c, x| kernels::sum_squared_from(x, mean[c]));
                    for (v, i) in var.iter_mut().zip(inv.iter_mut()) {
                        *v /= count;
                        *i = 1.0 / (*v + self.eps).sqrt();
                    }
                    self.map(x, y, |c, y, x| {
                        let (m, i, g, b) = (mean[c], inv[c], gamma[c], beta[c]);
                        y.iter_mut().zip(x).for_each(|(y, x)| *y = (x - m) * i * g + b);
                    });
                },
            );
        }
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
        let (c, len) = (self.channels(), self.channels() * self.plane());
        let gamma = &params.trainable[..c];
        let (sums, spare) = scratch.split_at_mut(2 * c * pass.segments.len());
        // Per segment: sum of dy * normalised x, and sum of dy.
        for (i, (sums, saved)) in sums.chunks_exact_mut(2 * c).zip(saved.chunks_exact(3 * c)).enumerate() {
            let rows = pass.segments.rows(i);
            let (dscale, dshift) = sums.split_at_mut(c);
            dscale.fill(0.0);
            dshift.fill(0.0);
            let (mean, inv) = (&saved[..c], &saved[2 * c..]);
            vectorized(
                #[inline(always)]
                || {
                    for row in rows {
                        for ch in 0..c {
                            let at = row * len + ch * self.plane();
                            let (x, dy) = (&x[at..at + self.plane()], &dy[at..at + self.plane()]);
                            let m = mean[ch];
                            dscale[ch] += kernels::reduce(x, dy, |x, d| (x - m) * d) * inv[ch];
                            dshift[ch] += kernels::sum(dy);
                        }
                    }
                },
            );
        }
        tree_sum(0, pass.segments.len(), grads.trainable, spare, &mut |i, out| {
            out.copy_from_slice(&sums[i * 2 * c..(i + 1) * 2 * c]);
        });
        tree_sum(0, pass.segments.len(), grads.running, spare, &mut |i, out| {
            let rows = pass.segments.rows(i).len();
            let count = (rows * self.plane()) as f32;
            let (mean, var) = out.split_at_mut(c);
            let s = &saved[i * 3 * c..];
            // PyTorch keeps the unbiased variance.
            let unbiased = if count > 1.0 { count / (count - 1.0) } else { 1.0 };
            mean.iter_mut().zip(s).for_each(|(o, m)| *o = rows as f32 * m);
            var.iter_mut().zip(&s[c..]).for_each(|(o, v)| *o = rows as f32 * v * unbiased);
        });
        pass.finish(grads.trainable);
        let Some(dx) = dx else { return };
        for i in 0..pass.segments.len() {
            let rows = pass.segments.rows(i);
            let count = (rows.len() * self.plane()).max(1) as f32;
            let (mean, inv) = (&saved[i * 3 * c..][..c], &saved[i * 3 * c + 2 * c..][..c]);
            let (dscale, dshift) = sums[i * 2 * c..(i + 1) * 2 * c].split_at(c);
            vectorized(
                #[inline(always)]
                || {
                    for row in rows {
                        for ch in 0..c {
                            let at = row * len + ch * self.plane();
                            let (x, dy) = (&x[at..at + self.plane()], &dy[at..at + self.plane()]);
                            let (m, scale) = (mean[ch], gamma[ch] * inv[ch]);
                            let (a, b) = (dshift[ch] / count, dscale[ch] / count * inv[ch]);
                            for (dx, (x, dy)) in dx[at..at + self.plane()].iter_mut().zip(x.iter().zip(dy)) {
                                *dx = scale * (dy - a - (x - m) * b);
                            }
                        }
                    }
                },
            );
        }
    }
}
