//! Pooling over planes.

use super::{Grads, Layer, Params, Pass, over_samples};
use crate::kernels::{self, conv::Window, vectorized};
use rayon::prelude::*;

/// Largest or mean value of each window.
pub struct Pool2d {
    pub window: Window,
    pub out_shape: [usize; 3],
    pub max: bool,
}

impl Pool2d {
    /// The common case, which has loops of its own: windows of 2 x 2, side by side.
    fn quarters(&self) -> bool {
        let Window { kernel, stride, padding, .. } = self.window;
        (kernel, stride, padding) == (2, 2, 0)
    }
}

/// [`Window::max_pool`] where [`Pool2d::quarters`].
#[inline(always)]
fn max_of_quarters(window: &Window, x: &[f32], y: &mut [f32]) {
    let (width, out_width) = (window.width, window.out_width());
    let pick = |top: f32, v: f32| if v > top || v.is_nan() { v } else { top };
    let planes = x.chunks_exact(window.height * width).zip(y.chunks_exact_mut(window.positions()));
    for (x, y) in planes {
        for (x, y) in x.chunks_exact(2 * width).zip(y.chunks_exact_mut(out_width)) {
            let (above, below) = x.split_at(width);
            let pairs = above.as_chunks::<2>().0.iter().zip(below.as_chunks::<2>().0);
            for (y, ([a, b], [c, d])) in y.iter_mut().zip(pairs) {
                *y = [*a, *b, *c, *d].into_iter().fold(f32::NEG_INFINITY, pick);
            }
        }
    }
}

/// [`Window::max_pool_backward`] where [`Pool2d::quarters`].
#[inline(always)]
fn max_of_quarters_backward(window: &Window, x: &[f32], y: &[f32], dy: &[f32], dx: &mut [f32]) {
    let (width, out_width) = (window.width, window.out_width());
    let (plane, positions) = (window.height * width, window.positions());
    if plane != 4 * positions {
        dx.fill(0.0); // an odd row or column is under no window
    }
    let outs = y.chunks_exact(positions).zip(dy.chunks_exact(positions));
    for ((x, dx), (y, dy)) in x.chunks_exact(plane).zip(dx.chunks_exact_mut(plane)).zip(outs) {
        let outs = y.chunks_exact(out_width).zip(dy.chunks_exact(out_width));
        for ((x, dx), (y, dy)) in x.chunks_exact(2 * width).zip(dx.chunks_exact_mut(2 * width)).zip(outs) {
            let ((x0, x1), (dx0, dx1)) = (x.split_at(width), dx.split_at_mut(width));
            give_to_first(x0, x1, y, dy, dx0, dx1);
        }
    }
}

/// The gradient of one row of windows: each `dy` goes to the first of its four values that is `y`.
///
/// A function of its own, as arguments are known not to overlap: what the loop needs to be vectorised.
#[inline(always)]
fn give_to_first(x0: &[f32], x1: &[f32], y: &[f32], dy: &[f32], dx0: &mut [f32], dx1: &mut [f32]) {
    let x = x0.as_chunks::<2>().0.iter().zip(x1.as_chunks::<2>().0);
    let dx = dx0.as_chunks_mut::<2>().0.iter_mut().zip(dx1.as_chunks_mut::<2>().0);
    for (((x0, x1), (dx0, dx1)), (y, dy)) in x.zip(dx).zip(y.iter().zip(dy)) {
        let top = [x0[0] == *y, x0[1] == *y, x1[0] == *y, x1[1] == *y];
        // Masks, not choices, which would become jumps.
        let give = |first: bool| f32::from_bits(dy.to_bits() & u32::from(first).wrapping_neg());
        *dx0 = [give(top[0]), give(top[1] & !top[0])];
        *dx1 = [give(top[2] & !(top[0] | top[1])), give(top[3] & !(top[0] | top[1] | top[2]))];
    }
}

impl Layer for Pool2d {
    fn out_shape(&self) -> &[usize] {
        &self.out_shape
    }

    fn forward(&self, pass: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let w = &self.window;
        let (y_len, x_len) = (self.out_shape.iter().product(), w.channels * w.height * w.width);
        over_samples(pass.segments.total(), (y, y_len), (x, x_len), |_, y, x| match (self.max, self.quarters()) {
            (true, true) => vectorized(
                #[inline(always)]
                || max_of_quarters(w, x, y),
            ),
            (true, false) => w.max_pool(x, y),
            (false, _) => w.avg_pool(x, y),
        });
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        _: Params<'_>,
        x: &[f32],
        y: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        _: Grads<'_>,
        _: &mut [f32],
        _: &mut [f32],
    ) {
        let Some(dx) = dx else { return };
        let w = &self.window;
        let (y_len, x_len): (usize, usize) = (self.out_shape.iter().product(), w.channels * w.height * w.width);
        over_samples(pass.segments.total(), (dx, x_len), (dy, y_len), |row, dx, dy| {
            let (x, y) = (&x[row * x_len..][..x_len], &y[row * y_len..][..y_len]);
            match (self.max, self.quarters()) {
                (true, true) => vectorized(
                    #[inline(always)]
                    || max_of_quarters_backward(w, x, y, dy, dx),
                ),
                (true, false) => w.max_pool_backward(x, y, dy, dx),
                (false, _) => w.avg_pool_backward(dy, dx),
            }
        });
    }
}

/// Mean of each plane: `(channels, height, width)` to `(channels)`.
pub struct GlobalAvgPool {
    pub channels: [usize; 1],
    pub plane: usize,
}

impl Layer for GlobalAvgPool {
    fn out_shape(&self) -> &[usize] {
        &self.channels
    }

    fn forward(&self, _: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let planes = y.par_iter_mut().zip(x.par_chunks_exact(self.plane));
        planes.with_min_len(64).for_each(|(y, x)| {
            *y = vectorized(
                #[inline(always)]
                || kernels::sum(x),
            ) / self.plane as f32
        });
    }

    fn backward(
        &self,
        _: &Pass<'_>,
        _: Params<'_>,
        _: &[f32],
        _: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        _: Grads<'_>,
        _: &mut [f32],
        _: &mut [f32],
    ) {
        if let Some(dx) = dx {
            dx.chunks_exact_mut(self.plane).zip(dy).for_each(|(dx, dy)| dx.fill(dy / self.plane as f32));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Key, Purpose};

    /// Even and odd planes, with many equal values and a few that are not numbers.
    #[test]
    fn quarters_are_windows_of_two_by_two() {
        let key = Key::new(1, Purpose::Synthetic);
        for (height, width) in (2..9).flat_map(|h| [2, 3, 5, 8, 17, 24, 37, 66].map(|w| (h, w))) {
            let window = Window { channels: 2, height, width, kernel: 2, stride: 2, padding: 0 };
            let value = |i: u64| if key.below(i, 40) == 0 { f32::NAN } else { key.below(i, 5) as f32 - 2.0 };
            let x: Vec<f32> = (0..2 * (height * width) as u64).map(value).collect();
            let dy: Vec<f32> = (0..2 * window.positions() as u64).map(|i| key.normal(i)).collect();
            let (mut want, mut got) = (vec![7.0; dy.len()], vec![7.0; dy.len()]);
            window.max_pool(&x, &mut want);
            max_of_quarters(&window, &x, &mut got);
            assert!(got.iter().zip(&want).all(|(got, want)| got.to_bits() == want.to_bits()), "{height} x {width}");
            let (mut want_dx, mut got_dx) = (vec![7.0; x.len()], vec![7.0; x.len()]);
            window.max_pool_backward(&x, &want, &dy, &mut want_dx);
            max_of_quarters_backward(&window, &x, &want, &dy, &mut got_dx);
            assert_eq!(got_dx, want_dx, "{height} x {width}");
        }
    }
}
