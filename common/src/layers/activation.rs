//! Element-wise non-linearities.

use super::{Grads, Layer, Params, Pass, over_rows};
use crate::job;
use crate::kernels::gemm::Through;
use crate::kernels::{Finish, LANES, math, vectorized};
use rayon::prelude::*;
use std::ops::Range;

/// Values that one thread takes at a time: they stay in the first-level cache.
const BLOCK: usize = 1 << 12;

/// `y = f(x)`, value by value.
pub struct Activation {
    pub kind: job::Activation,
    pub shape: Vec<usize>,
}

/// `y[i] = f(y[i])`.
#[inline(always)]
fn map(y: &mut [f32], f: impl Fn(f32) -> f32) {
    vectorized(
        #[inline(always)]
        || y.iter_mut().for_each(|y| *y = f(*y)),
    );
}

/// `out[i] = f(a[i], b[i])`, on all threads.
#[inline(always)]
fn map2(out: &mut [f32], a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) {
    let blocks = out.par_chunks_mut(BLOCK).zip(a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK)));
    blocks.for_each(|(out, (a, b))| {
        vectorized(
            #[inline(always)]
            || out.iter_mut().zip(a.iter().zip(b)).for_each(|(out, (a, b))| *out = f(*a, *b)),
        );
    });
}

/// [`map`] by an `f` that gives value and slope, of which the slope is kept where it is wanted.
#[inline(always)]
fn map_and_slope(y: &mut [f32], slopes: Option<&mut [f32]>, f: impl Fn(f32) -> (f32, f32)) {
    let Some(slopes) = slopes else {
        return map(
            y,
            #[inline(always)]
            |x| f(x).0,
        );
    };
    vectorized(
        #[inline(always)]
        || {
            let ((y, y_tail), (slopes, slopes_tail)) = (y.as_chunks_mut::<LANES>(), slopes.as_chunks_mut::<LANES>());
            // Arrays of their own between loads and stores: only so do both results stay in vectors.
            for (y, slopes) in y.iter_mut().zip(slopes) {
                let (mut values, mut at) = ([0.0; LANES], [0.0; LANES]);
                for l in 0..LANES {
                    (values[l], at[l]) = f(y[l]);
                }
                (*y, *slopes) = (values, at);
            }
            for (y, slope) in y_tail.iter_mut().zip(slopes_tail) {
                (*y, *slope) = f(*y);
            }
        },
    );
}

/// Value and slope of `x` times the normal distribution function (Hendrycks and Gimpel, 2016, eq. 2).
#[inline(always)]
fn gelu(x: f32) -> (f32, f32) {
    let (below, density) = math::normal(x);
    (x * below, below + x * density)
}

/// Value and slope of `x` times its logistic function (Elfwing et al., 2018, eq. 5).
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let s = math::sigmoid(x);
    (x * s, s * (1.0 + x * (1.0 - s)))
}

/// Value and slope of `x` where `x > 0`, else `slope x`.
#[inline(always)]
fn leaky(slope: f32, x: f32) -> (f32, f32) {
    if x > 0.0 { (x, 1.0) } else { (slope * x, slope) }
}

/// How a product computes the activation at its end, if it can: if the output tells where the gradient goes.
pub(crate) fn finish(kind: job::Activation) -> Option<Finish> {
    match kind {
        job::Activation::Relu => Some(Finish::Relu),
        job::Activation::LeakyRelu { slope } if slope > 0.0 => Some(Finish::LeakyRelu { slope }),
        job::Activation::LeakyRelu { .. } => None,
        job::Activation::Gelu | job::Activation::Silu | job::Activation::Tanh | job::Activation::Sigmoid => None,
    }
}

/// Whether the slopes are kept for the way back: where the output does not tell them.
pub(super) fn keeps_slopes(kind: job::Activation) -> bool {
    finish(kind).is_none() && !matches!(kind, job::Activation::Tanh | job::Activation::Sigmoid)
}

/// `y = f(y)`, and the slopes there, where they are kept and wanted. One thread.
pub(super) fn activate(kind: job::Activation, y: &mut [f32], slopes: Option<&mut [f32]>) {
    match kind {
        job::Activation::Relu => map(y, |x| Finish::Relu.of(x)),
        job::Activation::LeakyRelu { slope } => map_and_slope(y, slopes, move |x| leaky(slope, x)),
        job::Activation::Gelu => map_and_slope(y, slopes, gelu),
        job::Activation::Silu => map_and_slope(y, slopes, silu),
        job::Activation::Tanh => map(y, math::tanh),
        job::Activation::Sigmoid => map(y, math::sigmoid),
    }
}

/// [`activate`] for these columns of rows of `width` values.
pub(super) fn activate_columns(
    kind: job::Activation,
    y: &mut [f32],
    mut slopes: Option<&mut [f32]>,
    width: usize,
    columns: Range<usize>,
) {
    if columns.len() == width {
        return activate(kind, y, slopes);
    }
    for (n, row) in y.chunks_exact_mut(width).enumerate() {
        let slopes = slopes.as_deref_mut().map(|slopes| &mut slopes[n * width..][columns.clone()]);
        activate(kind, &mut row[columns.clone()], slopes);
    }
}

/// The gradient of what [`activate`] took, of `y`, which it put out, or of the `slopes` that it kept.
pub(super) fn deactivate(kind: job::Activation, y: &[f32], slopes: &[f32], dy: &[f32], dx: &mut [f32]) {
    match (through(kind, y, slopes), kind) {
        (Some(Through::Outputs(finish, y)), _) => unmask(finish, y, dy, dx),
        (Some(Through::Slopes(slopes)), _) => map2(dx, slopes, dy, |slope, d| d * slope),
        (None, job::Activation::Tanh) => map2(dx, y, dy, |y, d| d * (1.0 - y * y)),
        (None, _) => map2(dx, y, dy, |y, d| d * y * (1.0 - y)),
    }
}

/// How a product whose values are the gradient of what [`activate`] put out may go on to that of what it took: by the outputs `y`, or
/// by the `slopes` that were kept. Not for those whose slopes are computed from the outputs, as they are rare between linear layers.
pub(super) fn through<'a>(kind: job::Activation, y: &'a [f32], slopes: &'a [f32]) -> Option<Through<'a>> {
    match finish(kind) {
        Some(finish) => Some(Through::Outputs(finish, y)),
        None => keeps_slopes(kind).then_some(Through::Slopes(slopes)),
    }
}

/// The gradient of what `finish` took, of `y = finish(x)`, and the scratch that is left beside it.
pub(super) fn masked<'a>(
    finish: Finish,
    y: &[f32],
    dy: &'a [f32],
    scratch: &'a mut [f32],
) -> (&'a [f32], &'a mut [f32]) {
    if finish == Finish::Keep {
        return (dy, scratch);
    }
    let (dx, scratch) = scratch.split_at_mut(dy.len());
    unmask(finish, y, dy, dx);
    (dx, scratch)
}

/// That gradient, into `dx`.
fn unmask(finish: Finish, y: &[f32], dy: &[f32], dx: &mut [f32]) {
    let blocks = dx.par_chunks_mut(BLOCK).zip(y.par_chunks(BLOCK).zip(dy.par_chunks(BLOCK)));
    blocks.for_each(|(dx, (y, dy))| {
        vectorized(
            #[inline(always)]
            || finish.gradient(y, dy, dx),
        );
    });
}

impl Layer for Activation {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    /// The slopes, where they are kept.
    fn saved(&self, rows: usize, _: usize) -> usize {
        if keeps_slopes(self.kind) { rows * self.shape.iter().product::<usize>() } else { 0 }
    }

    fn forward(&self, pass: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], saved: &mut [f32], _: &mut [f32]) {
        let activate = |(y, x): (&mut [f32], &[f32]), slopes: Option<&mut [f32]>| {
            y.copy_from_slice(x);
            activate(self.kind, y, slopes);
        };
        let blocks = y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK));
        if pass.train && keeps_slopes(self.kind) {
            blocks.zip(saved.par_chunks_mut(BLOCK)).for_each(|(block, slopes)| activate(block, Some(slopes)));
        } else {
            blocks.for_each(|block| activate(block, None));
        }
    }

    fn backward(
        &self,
        _: &Pass<'_>,
        _: Params<'_>,
        _: &[f32],
        y: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        _: Grads<'_>,
        saved: &mut [f32],
        _: &mut [f32],
    ) {
        if let Some(dx) = dx {
            deactivate(self.kind, y, saved, dy, dx);
        }
    }
}

/// Gated halves (Shazeer, "GLU Variants Improve Transformer", 2020, eq. 5): a row `[a, b]` becomes `silu(a) * b`.
pub struct Swiglu {
    /// Of the outputs: the last dimension is half that of the inputs.
    pub shape: Vec<usize>,
}

impl Swiglu {
    /// Outputs of a row.
    fn width(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    /// Rows of a batch.
    fn rows(&self, pass: &Pass<'_>) -> usize {
        pass.segments.total() * self.shape[..self.shape.len() - 1].iter().product::<usize>()
    }
}

impl Layer for Swiglu {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    fn forward(&self, pass: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let width = self.width();
        over_rows(self.rows(pass), (y, width), (x, 2 * width), |_, y, x| {
            vectorized(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(2 * width)) {
                        let (a, b) = x.split_at(width);
                        y.iter_mut().zip(a.iter().zip(b)).for_each(|(y, (a, b))| *y = silu(*a).0 * b);
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
        let Some(dx) = dx else { return };
        let width = self.width();
        over_rows(self.rows(pass), (dx, 2 * width), (dy, width), |first, dx, dy| {
            let x = &x[first * 2 * width..][..dx.len()];
            vectorized(
                #[inline(always)]
                || {
                    let rows =
                        dx.chunks_exact_mut(2 * width).zip(x.chunks_exact(2 * width)).zip(dy.chunks_exact(width));
                    for ((dx, x), dy) in rows {
                        let ((a, b), (da, db)) = (x.split_at(width), dx.split_at_mut(width));
                        let values = a.iter().zip(b).zip(dy);
                        for ((da, db), ((a, b), dy)) in da.iter_mut().zip(db).zip(values) {
                            let (value, slope) = silu(*a);
                            (*da, *db) = (dy * b * slope, dy * value);
                        }
                    }
                },
            );
        });
    }
}
