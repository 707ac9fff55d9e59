//! Dropout (Srivastava et al., 2014), scaled while training.

use super::{Grads, Layer, Params, Pass};
use crate::kernels::vectorized;

/// Zeroes a value with probability `rate`, and divides the others by `1 - rate`. Which ones is a function of (seed, step,
/// layer, partition, row within the partition, value), so nothing is kept for the backward pass.
pub struct Dropout {
    pub rate: f32,
    pub shape: Vec<usize>,
}

impl Dropout {
    fn apply(&self, pass: &Pass<'_>, x: &[f32], y: &mut [f32]) {
        if !pass.train || self.rate == 0.0 {
            y.copy_from_slice(x);
            return;
        }
        let len: usize = self.shape.iter().product();
        let threshold = (self.rate as f64 * 4_294_967_296.0) as u32;
        let scale = 1.0 / (1.0 - self.rate);
        for i in 0..pass.segments.len() {
            let rows = pass.segments.rows(i);
            let key = pass.key.with(pass.segments.lo as u64 + i as u64);
            let (x, y) = (&x[rows.start * len..rows.end * len], &mut y[rows.start * len..rows.end * len]);
            vectorized(
                #[inline(always)]
                || {
                    for (j, (y, x)) in y.iter_mut().zip(x).enumerate() {
                        // The product before the choice: nothing is left to jump over.
                        let kept = x * scale;
                        *y = if key.u32_fast(j as u32) >= threshold { kept } else { 0.0 };
                    }
                },
            );
        }
    }
}

impl Layer for Dropout {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    fn forward(&self, pass: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        self.apply(pass, x, y);
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
        if let Some(dx) = dx {
            self.apply(pass, dy, dx);
        }
    }
}
