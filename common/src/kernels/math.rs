//! Elementary functions for whole slices: branch-free, so that they vectorise, and within a few units in the last place, unless they
//! say otherwise.

/// The polynomial with these coefficients, from that of the highest power (Horner's rule).
#[inline(always)]
fn polynomial<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    coefficients[1..].iter().fold(coefficients[0], |p, c| p.mul_add(x, *c))
}

/// `e^x`: argument reduction by multiples of ln 2 in two parts, then the Taylor polynomial of degree 7 on
/// `|r| <= ln(2)/2`, whose remainder is below 1e-9. Overflows to infinity and underflows to 0 within `[-87.3, 88.7]`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    let clamped = x.clamp(-87.0, 88.0);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let k = shifted - ROUND;
    let r = k.mul_add(-LN2_LO, k.mul_add(-LN2_HI, clamped));
    let p = polynomial(r, [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0]);
    // The low bits of `shifted` are k; a conversion would saturate, which does not vectorise.
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let y = p * power;
    let y = if x > 88.7 { f32::INFINITY } else { y };
    let y = if x < -87.3 { 0.0 } else { y };
    if x.is_nan() { x } else { y }
}

/// Natural logarithm of a normal positive number, infinity or NaN, within 1e-13: `x = 2^k m` with `m` around 1, and the
/// series of `ln m = 2 artanh s` for `s = (m - 1) / (m + 1)`, `|s| < 0.172`.
#[inline(always)]
pub fn ln(x: f64) -> f64 {
    const INTEGER: f64 = 4_503_599_627_370_496.0; // 2^52: the low bits of 2^52 + k are k
    let root_half = std::f64::consts::FRAC_1_SQRT_2.to_bits();
    let above = x.to_bits().wrapping_sub(root_half);
    // k + 1023 stays positive, as the mantissa of a float; its bits below 52 are those of m / sqrt(1/2).
    let k = f64::from_bits(INTEGER.to_bits() | (above.wrapping_add(1023 << 52) >> 52)) - INTEGER - 1023.0;
    let m = f64::from_bits((above & ((1 << 52) - 1)) + root_half);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let mut p = 1.0 / 17.0;
    for c in [1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 0.2, 1.0 / 3.0, 1.0] {
        p = p * z + c;
    }
    let y = k * std::f64::consts::LN_2 + 2.0 * s * p;
    if x < f64::INFINITY { y } else { x }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent: its odd Taylor series near 0, where the exponential form cancels.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let z = x * x;
    const SERIES: [f32; 6] =
        [21_844.0 / 6_081_075.0, -1_382.0 / 155_925.0, 62.0 / 2_835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0];
    let small = (x * z).mul_add(polynomial(z, SERIES), x);
    let e = exp(2.0 * x.abs());
    let large = (1.0 - 2.0 / (e + 1.0)).copysign(x);
    if x.abs() < 0.4 { small } else { large }
}

/// The standard normal distribution up to `x`, within 2e-7, and its density there.
#[inline(always)]
pub fn normal(x: f32) -> (f32, f32) {
    const ROOT: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
    let half = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let e = exp(-half * half);
    let beyond = 0.5 * erfc(half, e);
    (if x < 0.0 { beyond } else { 1.0 - beyond }, ROOT * e)
}

/// `1 - erf x` of what is not negative, with `e = e^-x^2` at hand: Abramowitz and Stegun 7.1.26, absolute error below 2e-7.
#[inline(always)]
fn erfc(x: f32, e: f32) -> f32 {
    let t = 1.0 / 0.327_591_1f32.mul_add(x, 1.0);
    polynomial(t, [1.061_405_4, -1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6]) * t * e
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_equal_their_oracles() {
        for i in -4000..=4000 {
            let x = i as f32 * 0.0217;
            let near = |got: f32, want: f64, relative: f64| {
                let bound = relative * want.abs().max(1e-30) + 1e-37;
                assert!((got as f64 - want).abs() <= bound, "{x}: {got} {want}");
            };
            near(exp(x), libm::exp(x as f64), 5e-7);
            near(sigmoid(x), 1.0 / (1.0 + libm::exp(-x as f64)), 1e-6);
            near(tanh(x), libm::tanh(x as f64), 5e-7);
            near(tanh(x * 1e-3), libm::tanh((x * 1e-3) as f64), 5e-7);
            let (below, density) = normal(x);
            let half = x as f64 / std::f64::consts::SQRT_2;
            assert!((below as f64 - 0.5 * libm::erfc(-half)).abs() < 2e-7, "{x}: {below}");
            // The exponent's rounding counts as often as it is large.
            let want = libm::exp(-half * half) / libm::sqrt(2.0 * std::f64::consts::PI);
            near(density, want, 1e-6 + 2e-7 * half * half);
        }
        assert_eq!((exp(f32::INFINITY), exp(f32::NEG_INFINITY), exp(0.0)), (f32::INFINITY, 0.0, 1.0));
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan() && normal(f32::NAN).0.is_nan());
    }

    #[test]
    fn logarithms_equal_their_oracle() {
        let numbers = (-2000..2000).map(|i| libm::exp(i as f64 * 0.0473) * (1.0 + i as f64 * 1e-9));
        for x in numbers.chain((0..100).map(|i| 1.0 + i as f64 * 1e-9)).chain([f64::MIN_POSITIVE, f64::MAX]) {
            let (got, want) = (ln(x), libm::log(x));
            assert!((got - want).abs() <= 1e-13 * want.abs(), "{x}: {got} {want}");
        }
        assert!(ln(1.0) == 0.0 && ln(f64::INFINITY) == f64::INFINITY && ln(f64::NAN).is_nan());
    }

    /// A function of its own for each `f`, so that it is compiled for vectors, and beside them for single values.
    fn agrees(f: impl Fn(f32) -> f32) {
        for n in 0..=67 {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 - 30.0) * 0.21).collect();
            let mut y = vec![0.0; n];
            crate::kernels::vectorized(
                #[inline(always)]
                || y.iter_mut().zip(&x).for_each(|(y, x)| *y = f(*x)),
            );
            assert!(y.iter().zip(&x).all(|(y, x)| y.to_bits() == f(*x).to_bits()));
        }
    }

    #[test]
    fn vectors_and_single_values_agree_to_the_bit() {
        agrees(exp);
        agrees(sigmoid);
        agrees(tanh);
        agrees(|x| normal(x).0);
        agrees(|x| normal(x).1);
    }
}
