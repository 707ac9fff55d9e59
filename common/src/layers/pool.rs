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

impl Layer for Pool2d {
    fn out_shape(&self) -> &[usize] {
        &self.out_shape
    }

    fn forward(&self, pass: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let w = &self.window;
        let (y_len, x_len) = (self.out_shape.iter().product(), w.channels * w.height * w.width);
        over_samples(pass.segments.total(), (y, y_len), (x, x_len), |_, y, x| {
            if self.max { w.max_pool(x, y) } else { w.avg_pool(x, y) }
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
            if self.max {
                w.max_pool_backward(&x[row * x_len..][..x_len], &y[row * y_len..][..y_len], dy, dx);
            } else {
                w.avg_pool_backward(dy, dx);
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
        planes.with_min_len(64).for_each(|(y, x)| *y = vectorized(|| kernels::sum(x)) / self.plane as f32);
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
