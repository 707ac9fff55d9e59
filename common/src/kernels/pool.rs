//! Pooling of planes, for windows that lie inside of them: a row of windows at a time, place by place under all of them.

use super::conv::Window;
use super::vectorized;

/// Windows of a row that are taken at once.
const SOME: usize = 64;

/// Calls `$f::<stride>`, which is compiled for the usual strides; `0` stands for all others.
macro_rules! by_stride {
    ($stride:expr, $f:ident($($argument:expr),*)) => {
        match $stride {
            1 => $f::<1>($($argument),*),
            2 => $f::<2>($($argument),*),
            3 => $f::<3>($($argument),*),
            _ => $f::<0>($($argument),*),
        }
    };
}

impl Window {
    /// Largest value of each window, plane by plane. NaN is larger than any.
    pub fn max_pool(&self, x: &[f32], y: &mut [f32]) {
        let pick = |top: f32, v: f32| if v > top || v.is_nan() { v } else { top };
        vectorized(
            #[inline(always)]
            || self.pool(x, y, f32::NEG_INFINITY, pick),
        );
    }

    /// Mean of each window, plane by plane.
    pub fn avg_pool(&self, x: &[f32], y: &mut [f32]) {
        let share = self.share();
        vectorized(
            #[inline(always)]
            || {
                self.pool(x, y, 0.0, |sum, v| sum + v);
                y.iter_mut().for_each(|y| *y *= share);
            },
        );
    }

    /// Gradient of [`Window::max_pool`]: to the first largest value under each window.
    pub fn max_pool_backward(&self, x: &[f32], y: &[f32], dy: &[f32], dx: &mut [f32]) {
        vectorized(
            #[inline(always)]
            || {
                dx.fill(0.0);
                let width = self.out_width();
                for (row, at) in self.rows() {
                    for some in (0..width).step_by(SOME).map(|from| from..width.min(from + SOME)) {
                        let outs = row * width + some.start..row * width + some.end;
                        let (y, dy, mut given) = (&y[outs.clone()], &dy[outs], [0u32; SOME]);
                        for at in self.places(at + some.start * self.stride) {
                            let given = &mut given[..y.len()];
                            by_stride!(self.stride, give(&x[at..], y, dy, given, &mut dx[at..], self.stride));
                        }
                    }
                }
            },
        );
    }

    /// Gradient of [`Window::avg_pool`].
    pub fn avg_pool_backward(&self, dy: &[f32], dx: &mut [f32]) {
        let share = self.share();
        vectorized(
            #[inline(always)]
            || {
                dx.fill(0.0);
                for ((_, at), dy) in self.rows().zip(dy.chunks_exact(self.out_width())) {
                    for at in self.places(at) {
                        by_stride!(self.stride, spread(dy, share, &mut dx[at..], self.stride));
                    }
                }
            },
        );
    }

    fn share(&self) -> f32 {
        1.0 / (self.kernel * self.kernel) as f32
    }

    /// Rows of windows, over all planes, and where the first window of each begins.
    #[inline(always)]
    fn rows(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let Window { channels, height, width, stride, .. } = *self;
        let rows = self.out_height();
        (0..channels * rows).map(move |row| (row, row / rows * height * width + row % rows * stride * width))
    }

    /// The places under a window that begins at `at`.
    #[inline(always)]
    fn places(&self, at: usize) -> impl Iterator<Item = usize> + use<> {
        let Window { kernel, width, .. } = *self;
        (0..kernel * kernel).map(move |i| at + i / kernel * width + i % kernel)
    }

    #[inline(always)]
    fn pool(&self, x: &[f32], y: &mut [f32], start: f32, f: impl Fn(f32, f32) -> f32 + Copy) {
        y.fill(start);
        for ((_, at), y) in self.rows().zip(y.chunks_exact_mut(self.out_width())) {
            for at in self.places(at) {
                by_stride!(self.stride, fold(&x[at..], y, f, self.stride));
            }
        }
    }
}

/// The stride, known to the compiler where `S` is not 0.
#[inline(always)]
fn known<const S: usize>(stride: usize) -> usize {
    if S == 0 { stride } else { S }
}

// Below, all windows of a row but the last have a whole stride in the plane.

/// `y[i] = f(y[i], x[i * stride])`.
#[inline(always)]
fn fold<const S: usize>(x: &[f32], y: &mut [f32], f: impl Fn(f32, f32) -> f32, stride: usize) {
    let stride = known::<S>(stride);
    let Some((last, y)) = y.split_last_mut() else { return };
    *last = f(*last, x[y.len() * stride]);
    y.iter_mut().zip(x.chunks_exact(stride)).for_each(|(y, x)| *y = f(*y, x[0]));
}

/// `dx[i * stride] += share dy[i]`.
#[inline(always)]
fn spread<const S: usize>(dy: &[f32], share: f32, dx: &mut [f32], stride: usize) {
    let stride = known::<S>(stride);
    let Some((last, dy)) = dy.split_last() else { return };
    dx[dy.len() * stride] += share * last;
    dx.chunks_exact_mut(stride).zip(dy).for_each(|(dx, dy)| dx[0] += share * dy);
}

/// `dx[i * stride] += dy[i]` where `x[i * stride]` is the first that is `y[i]`, as `given` keeps in mind.
#[inline(always)]
fn give<const S: usize>(x: &[f32], y: &[f32], dy: &[f32], given: &mut [u32], dx: &mut [f32], stride: usize) {
    let stride = known::<S>(stride);
    // Masks, not choices, which would become jumps.
    let give = |x: f32, y: f32, dy: f32, given: &mut u32, dx: &mut f32| {
        let first = u32::from(x == y).wrapping_neg() & !*given;
        *given |= first;
        *dx += f32::from_bits(dy.to_bits() & first);
    };
    let n = y.len() - 1;
    give(x[n * stride], y[n], dy[n], &mut given[n], &mut dx[n * stride]);
    let outs = y[..n].iter().zip(dy).zip(given);
    let ins = x.chunks_exact(stride).zip(dx.chunks_exact_mut(stride));
    outs.zip(ins).for_each(|(((y, dy), given), (x, dx))| give(x[0], *y, *dy, given, &mut dx[0]));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Isa, with_isa};
    use crate::rng::{Key, Purpose};
    use proptest::prelude::*;

    /// The windows, each with its values' places.
    fn windows(w: &Window) -> Vec<Vec<usize>> {
        let all = (0..w.channels * w.positions()).map(|i| {
            let (channel, row, column) = (i / w.positions(), i / w.out_width() % w.out_height(), i % w.out_width());
            let places =
                (0..w.kernel * w.kernel).map(|p| (row * w.stride + p / w.kernel, column * w.stride + p % w.kernel));
            places.map(|(y, x)| (channel * w.height + y) * w.width + x).collect()
        });
        all.collect()
    }

    proptest! {
        /// With many equal values, and a few that are not numbers.
        #[test]
        fn pooling_equals_its_oracle(
            (channels, height, width) in (1usize..3, 1usize..12, 1usize..80),
            (kernel, stride) in (1usize..5, 1usize..6), salt in any::<u64>(),
        ) {
            let (height, width) = (height.max(kernel), width.max(kernel));
            let w = Window { channels, height, width, kernel, stride, padding: 0 };
            let key = Key::new(salt, Purpose::Synthetic);
            let value = |i: u64| if key.below(i, 40) == 0 { f32::NAN } else { key.below(i, 5) as f32 - 2.0 };
            let x: Vec<f32> = (0..(channels * height * width) as u64).map(value).collect();
            let dy: Vec<f32> = (0..(channels * w.positions()) as u64).map(|i| key.below(i, 9) as f32 - 4.0).collect();
            let share = 1.0 / (kernel * kernel) as f32;
            let (mut top, mut mean) = (Vec::new(), Vec::new());
            let (mut to_top, mut to_all) = (vec![0.0f32; x.len()], vec![0.0f32; x.len()]);
            for (places, dy) in windows(&w).iter().zip(&dy) {
                let nan = places.iter().find(|&&at| x[at].is_nan()).map(|_| f32::NAN);
                top.push(nan.unwrap_or(places.iter().map(|&at| x[at]).fold(f32::NEG_INFINITY, f32::max)));
                mean.push(places.iter().map(|&at| x[at]).sum::<f32>() * share);
                if let Some(&at) = places.iter().find(|&&at| x[at] == top[top.len() - 1]) {
                    to_top[at] += dy;
                }
                places.iter().for_each(|&at| to_all[at] += share * dy);
            }
            let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a == b || a.is_nan() && b.is_nan());
            let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
            for isa in Isa::available() {
                let (mut y, mut dx) = (vec![7.0; top.len()], vec![7.0; x.len()]);
                with_isa(isa, || w.max_pool(&x, &mut y));
                prop_assert!(same(&y, &top), "{:?}: {:?} instead of {:?}", isa, y, top);
                with_isa(isa, || w.max_pool_backward(&x, &y, &dy, &mut dx));
                prop_assert!(same(&dx, &to_top), "{:?}: {:?} instead of {:?}", isa, dx, to_top);
                with_isa(isa, || w.avg_pool(&x, &mut y));
                prop_assert!(same(&y, &mean), "{:?}: {:?} instead of {:?}", isa, y, mean);
                with_isa(isa, || w.avg_pool_backward(&dy, &mut dx));
                prop_assert!(close(&dx, &to_all), "{:?}: {:?} instead of {:?}", isa, dx, to_all);
            }
        }
    }
}
