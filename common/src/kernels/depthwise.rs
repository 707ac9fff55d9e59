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
