//! What becomes of a product's values: the activation behind it, or the way back through one.

use crate::kernels::zip;
use pulp::{Simd, WithSimd};

/// What becomes of a sum when it is complete.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Finish {
    Keep,
    /// `max(x, 0)`; NaN stays.
    Relu,
    /// `x` where `x > 0`, else `slope x`.
    LeakyRelu {
        slope: f32,
    },
}

impl Finish {
    /// Of one value.
    #[inline(always)]
    pub fn of(self, x: f32) -> f32 {
        match self {
            Finish::Keep => x,
            Finish::Relu => {
                if x > 0.0 || x.is_nan() {
                    x
                } else {
                    0.0
                }
            }
            Finish::LeakyRelu { slope } => {
                if x > 0.0 {
                    x
                } else {
                    slope * x
                }
            }
        }
    }

    /// The gradient of what it took, from that of its output `y`, which tells where it goes.
    #[inline(always)]
    fn back(self, y: f32, dy: f32) -> f32 {
        match self {
            Finish::Keep => dy,
            _ if y > 0.0 => dy,
            Finish::Relu => 0.0,
            Finish::LeakyRelu { slope } => slope * dy,
        }
    }

    /// The gradient of what it took, from that of its outputs `y`.
    #[inline(always)]
    pub fn gradient(self, y: &[f32], dy: &[f32], dx: &mut [f32]) {
        let all = dx.iter_mut().zip(y.iter().zip(dy));
        // Loops of their own, which are compiled for vectors.
        match self {
            Finish::Keep => dx.copy_from_slice(dy),
            Finish::Relu => all.for_each(|(dx, (y, dy))| *dx = Finish::Relu.back(*y, *dy)),
            Finish::LeakyRelu { slope } => {
                all.for_each(|(dx, (y, dy))| *dx = Finish::LeakyRelu { slope }.back(*y, *dy))
            }
        }
    }

    /// Of a vector of them.
    #[inline(always)]
    pub fn of_vector<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        let zero = simd.splat_f32s(0.0);
        match self {
            Finish::Keep => x,
            Finish::Relu => simd.select_f32s(simd.less_than_or_equal_f32s(x, zero), zero, x),
            Finish::LeakyRelu { slope } => {
                let scaled = simd.mul_f32s(simd.splat_f32s(slope), x);
                simd.select_f32s(simd.greater_than_f32s(x, zero), x, scaled)
            }
        }
    }
}

/// The way back through an activation: a product's values, the gradient of its outputs, become that of its inputs, each times the
/// slope there. What tells the slopes lies as the product does.
#[derive(Clone, Copy, Debug)]
pub enum Through<'a> {
    /// The slopes themselves.
    Slopes(&'a [f32]),
    /// The outputs of the activation, with which another product ended.
    Outputs(Finish, &'a [f32]),
}

impl<'a> Through<'a> {
    /// What tells the slopes.
    #[inline(always)]
    pub(super) fn values(self) -> &'a [f32] {
        let (Through::Slopes(values) | Through::Outputs(_, values)) = self;
        values
    }

    /// Of the values from `at` on.
    #[inline(always)]
    pub fn from(self, at: usize) -> Through<'a> {
        match self {
            Through::Slopes(values) => Through::Slopes(&values[at..]),
            Through::Outputs(finish, values) => Through::Outputs(finish, &values[at..]),
        }
    }

    /// The gradient of the activation's inputs, in place of that of its outputs.
    #[inline(always)]
    fn pass(self, d: &mut [f32]) {
        let at = &self.values()[..d.len()];
        match self {
            Through::Slopes(_) => zip(d, at, |d, slope| d * slope),
            Through::Outputs(Finish::Keep, _) => {}
            Through::Outputs(Finish::Relu, _) => zip(d, at, |d, y| Finish::Relu.back(y, d)),
            Through::Outputs(Finish::LeakyRelu { slope }, _) => {
                zip(d, at, |d, y| Finish::LeakyRelu { slope }.back(y, d))
            }
        }
    }
}

/// [`Through::pass`] for lines of values, in code of its own.
pub(super) struct PassLines<'a> {
    pub through: Through<'a>,
    pub c: &'a mut [f32],
    /// Values from line to line, in `c` and in what tells the slopes.
    pub stride: usize,
    pub lines: usize,
    pub len: usize,
}

impl WithSimd for PassLines<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for line in 0..self.lines {
            let at = line * self.stride;
            self.through.from(at).pass(&mut self.c[at..][..self.len]);
        }
    }
}
