//! What the vectors of a sample's fields have to do with each other; each sum in a fixed order.

use super::{Grads, Layer, Params, Pass, over_samples};
use crate::kernels::{self, vectorized};

/// The sum of a sample's vectors.
pub struct Sum {
    /// Vectors of a sample, and values of a vector.
    pub vectors: usize,
    pub width: [usize; 1],
}

impl Layer for Sum {
    fn out_shape(&self) -> &[usize] {
        &self.width
    }

    fn forward(&self, pass: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let [width] = self.width;
        over_samples(pass.segments.total(), (y, width), (x, self.vectors * width), |_, y, x| {
            y.fill(0.0);
            for v in x.chunks_exact(width) {
                y.iter_mut().zip(v).for_each(|(y, v)| *y += v);
            }
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
        _: Grads<'_>,
        _: &mut [f32],
        _: &mut [f32],
    ) {
        let [width] = self.width;
        if let Some(dx) = dx {
            over_samples(pass.segments.total(), (dx, self.vectors * width), (dy, width), |_, dx, dy| {
                dx.chunks_exact_mut(width).for_each(|dx| dx.copy_from_slice(dy));
            });
        }
    }
}

/// The second-order term of a factorization machine (Rendle, 2010, eq. 1 and lemma 3.1): of a sample's vectors `v_i` the sum of all
/// `v_i . v_j` with `i < j`, which is half of the sum over `f` of `(sum v_if)^2 - sum v_if^2`.
pub struct FactorizationMachine {
    /// Vectors of a sample, and values of a vector.
    pub fields: usize,
    pub width: usize,
}

impl Layer for FactorizationMachine {
    fn out_shape(&self) -> &[usize] {
        &[1]
    }

    /// The sum of each sample's vectors.
    fn saved(&self, rows: usize, _: usize) -> usize {
        rows * self.width
    }

    fn forward(&self, pass: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], saved: &mut [f32], _: &mut [f32]) {
        let (len, width) = (self.fields * self.width, self.width);
        over_samples(pass.segments.total(), (saved, width), (x, len), |_, sum, x| {
            sum.fill(0.0);
            for v in x.chunks_exact(width) {
                sum.iter_mut().zip(v).for_each(|(sum, v)| *sum += v);
            }
        });
        let saved = &*saved;
        over_samples(pass.segments.total(), (y, 1), (x, len), |row, y, x| {
            let sum = &saved[row * width..][..width];
            let whole: f32 = sum.iter().map(|s| s * s).sum();
            y[0] = 0.5 * x.iter().fold(whole, |rest, v| rest - v * v);
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
        _: Grads<'_>,
        saved: &mut [f32],
        _: &mut [f32],
    ) {
        let (len, width, saved) = (self.fields * self.width, self.width, &*saved);
        let Some(dx) = dx else { return };
        over_samples(pass.segments.total(), (dx, len), (x, len), |row, dx, x| {
            let (sum, dy) = (&saved[row * width..][..width], dy[row]);
            for (dx, x) in dx.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                dx.iter_mut().zip(sum.iter().zip(x)).for_each(|(dx, (sum, x))| *dx = dy * (sum - x));
            }
        });
    }
}

/// The first of a sample's vectors, and the products `v_i . v_j` of all pairs with `j < i` (Naumov et al., 2019, section 2.5):
/// `[width + n (n - 1) / 2]` of `n` vectors, in the order (1, 0), (2, 0), (2, 1), ...
pub struct DotInteraction {
    pub vectors: usize,
    pub width: usize,
    pub out_len: [usize; 1],
}

impl DotInteraction {
    /// Of `vectors` vectors of `width` values.
    pub fn new(vectors: usize, width: usize) -> DotInteraction {
        DotInteraction { vectors, width, out_len: [width + vectors * (vectors - 1) / 2] }
    }
}

/// All pairs with `j < i`.
fn pairs(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (1..n).flat_map(|i| (0..i).map(move |j| (i, j)))
}

impl Layer for DotInteraction {
    fn out_shape(&self) -> &[usize] {
        &self.out_len
    }

    fn forward(&self, pass: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let (n, width) = (self.vectors, self.width);
        over_samples(pass.segments.total(), (y, self.out_len[0]), (x, n * width), |_, y, x| {
            let (first, products) = y.split_at_mut(width);
            first.copy_from_slice(&x[..width]);
            vectorized(
                #[inline(always)]
                || {
                    for (y, (i, j)) in products.iter_mut().zip(pairs(n)) {
                        *y = kernels::dot(&x[i * width..][..width], &x[j * width..][..width]);
                    }
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
        _: Grads<'_>,
        _: &mut [f32],
        _: &mut [f32],
    ) {
        let (n, width, len) = (self.vectors, self.width, self.out_len[0]);
        let Some(dx) = dx else { return };
        over_samples(pass.segments.total(), (dx, n * width), (x, n * width), |row, dx, x| {
            let (first, products) = dy[row * len..][..len].split_at(width);
            let (head, rest) = dx.split_at_mut(width);
            head.copy_from_slice(first);
            rest.fill(0.0);
            vectorized(
                #[inline(always)]
                || {
                    for (d, (i, j)) in products.iter().zip(pairs(n)) {
                        for f in 0..width {
                            dx[i * width + f] += d * x[j * width + f];
                            dx[j * width + f] += d * x[i * width + f];
                        }
                    }
                },
            );
        });
    }
}
