//! Convolution of one channel: a filter sees too few values for a matrix product to be worth its packing.
//!
//! `shifted` is the channel's plane as [`Window::shift`] writes it, in which what lies under one value of the window is
//! contiguous over all positions. Every sum over the window runs in its order, and every sum over positions in fixed lanes.

use super::conv::Window;
use super::{Finish, dot, vectorized};

impl Window {
    /// `y = finish(start + sum over the window of w * x)`; `w`: `(kernel, kernel)`, `y`: the positions.
    pub fn filter(&self, w: &[f32], start: f32, shifted: &[f32], finish: Finish, y: &mut [f32]) {
        vectorized(
            #[inline(always)]
            || {
                y.iter_mut().for_each(|y| *y = start);
                for (p, w) in w.iter().enumerate() {
                    y.iter_mut().zip(&shifted[self.line(p)..]).for_each(|(y, x)| *y += w * x);
                }
                y.iter_mut().for_each(|y| *y = finish.of(*y));
            },
        );
    }

    /// `dw += ` the gradient of the filter.
    pub fn filter_weights(&self, dy: &[f32], shifted: &[f32], dw: &mut [f32]) {
        vectorized(
            #[inline(always)]
            || {
                for (p, dw) in dw.iter_mut().enumerate() {
                    *dw += dot(dy, &shifted[self.line(p)..][..dy.len()]);
                }
            },
        );
    }

    /// `cols`: the gradient of all that lies under the window, `(kernel * kernel, positions)`, from that of filters' outputs;
    /// `w`: `(filters, kernel, kernel)`, `dy`: `(filters, positions)`.
    pub fn filter_inputs(&self, w: &[f32], dy: &[f32], cols: &mut [f32]) {
        let filters = || w.chunks_exact(self.patch()).zip(dy.chunks_exact(self.positions()));
        vectorized(
            #[inline(always)]
            || {
                for (p, cols) in cols.chunks_exact_mut(self.positions()).enumerate() {
                    cols.iter_mut().for_each(|c| *c = 0.0);
                    for (w, dy) in filters() {
                        let w = w[p];
                        cols.iter_mut().zip(dy).for_each(|(c, dy)| *c += w * dy);
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Isa, with_isa};
    use proptest::prelude::*;

    fn dyadic(n: usize, salt: usize) -> Vec<f32> {
        // Small whole numbers: every sum is exact, so that each order gives the same.
        (0..n).map(|i| ((i * 37 + salt * 11) % 23) as f32 - 11.0).collect()
    }

    proptest! {
        #[test]
        fn a_filter_and_its_gradients_are_their_sums(
            (height, width) in (1usize..12, 1usize..40), kernel in 1usize..5, stride in 1usize..4, padding in 0usize..3,
            filters in 1usize..4,
        ) {
            let (height, width) = (height.max(kernel), width.max(kernel));
            let window = Window { channels: 1, height, width, kernel, stride, padding: padding.min(kernel - 1) };
            let (n, patch) = (window.positions(), window.patch());
            let (x, w, dy) = (dyadic(height * width, 1), dyadic(filters * patch, 2), dyadic(filters * n, 3));
            // What lies under place `p` of the window at a position.
            let under = |p: usize, at: usize| {
                let (y, x0) = (at / window.out_width() * stride + p / kernel, at % window.out_width() * stride + p % kernel);
                let (y, x0) = (y.checked_sub(window.padding)?, x0.checked_sub(window.padding)?);
                (y < height && x0 < width).then(|| x[y * width + x0])
            };
            let mut shifted = vec![f32::NAN; window.shifted()];
            window.shift(&x, &mut shifted);
            for isa in Isa::available() {
                let (mut y, mut dw, mut cols) = (vec![f32::NAN; n], vec![1.0; patch], vec![f32::NAN; patch * n]);
                with_isa(isa, || {
                    window.filter(&w[..patch], 0.5, &shifted, Finish::Relu, &mut y);
                    window.filter_weights(&dy[..n], &shifted, &mut dw);
                    window.filter_inputs(&w, &dy, &mut cols);
                });
                for at in 0..n {
                    let sum: f32 = (0..patch).filter_map(|p| Some(w[p] * under(p, at)?)).sum();
                    prop_assert_eq!(y[at], (sum + 0.5).max(0.0));
                }
                for p in 0..patch {
                    let sum: f32 = (0..n).filter_map(|at| Some(dy[at] * under(p, at)?)).sum();
                    prop_assert_eq!(dw[p], sum + 1.0);
                    for at in 0..n {
                        let sum: f32 = (0..filters).map(|f| w[f * patch + p] * dy[f * n + at]).sum();
                        prop_assert_eq!(cols[p * n + at], sum);
                    }
                }
            }
        }

        #[test]
        fn the_vectors_move_no_bit(width in 1usize..70, salt in any::<u64>()) {
            let key = crate::rng::Key::new(salt, crate::rng::Purpose::Synthetic);
            let window = Window { channels: 1, height: 5, width, kernel: 3, stride: 1, padding: 1 };
            let n = window.positions();
            let normal = |from: u64, n: usize| (from..from + n as u64).map(|i| key.normal(i)).collect::<Vec<f32>>();
            let (x, w, dy) = (normal(0, 5 * width), normal(1000, 9), normal(2000, n));
            let mut shifted = vec![f32::NAN; window.shifted()];
            window.shift(&x, &mut shifted);
            let all = |isa| with_isa(isa, || {
                let (mut y, mut dw, mut cols) = (vec![0.0; n], vec![0.0; 9], vec![0.0; 9 * n]);
                window.filter(&w, 0.3, &shifted, Finish::Keep, &mut y);
                window.filter_weights(&dy, &shifted, &mut dw);
                window.filter_inputs(&w, &dy, &mut cols);
                [y, dw, cols].concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
            });
            let bits: Vec<_> = Isa::available().map(all).collect();
            prop_assert!(bits.windows(2).all(|w| w[0] == w[1]));
        }
    }
}
