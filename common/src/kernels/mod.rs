//! Kernels over slices. They know no layers: lengths and strides come in, values go out.
//!
//! Every loop is written once, without intrinsics, and compiled for the widest vectors of the machine at run time
//! ([`vectorized`]). Element-wise loops give the same bits at any width, because Rust never contracts `a * b + c`;
//! reductions add in [`LANES`] fixed lanes, so neither the width nor the tail nor the threads move a bit.

pub mod conv;
mod depthwise;
pub mod gemm;
pub mod isa;
pub mod math;
mod pool;
pub mod winograd;

pub use gemm::{Finish, Mat, Start, gemm, product};
pub use isa::{Isa, isa, with_isa};

use std::ops::Range;

/// Lanes of every reduction.
pub const LANES: usize = 16;

/// Runs `f`, compiled for the vectors of [`isa()`]. What `f` calls must be `#[inline(always)]`, and so must a closure of more
/// than a line: the compiler leaves a long one where it is, compiled for no vectors at all.
#[inline]
pub fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    isa::arch().dispatch(f)
}

/// Threads that a batch is split over.
pub fn lanes() -> usize {
    rayon::current_num_threads().max(1)
}

/// Joins the lanes in a fixed tree.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = join(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// `sum f(a[i], b[i])` in fixed lanes; both slices have the same length.
#[inline(always)]
pub(crate) fn reduce(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    let mut sums = [0.0f32; LANES];
    let ((a, at), (b, bt)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    // Whole arrays at every turn, the tail's too, so that the sums stay in registers.
    let mut add = |values: [f32; LANES]| sums.iter_mut().zip(values).for_each(|(sum, v)| *sum += v);
    for (a, b) in a.iter().zip(b) {
        add(std::array::from_fn(|l| f(a[l], b[l])));
    }
    // Sums that begin with 0 are never -0: adding 0 to them would change nothing.
    if !at.is_empty() {
        let mut tail = [0.0; LANES];
        tail.iter_mut().zip(at.iter().zip(bt)).for_each(|(v, (a, b))| *v = f(*a, *b));
        add(tail);
    }
    fold(sums, |a, b| a + b)
}

/// `x[i] = f(x[i], a[i])`, for short rows: a plain loop is compiled for many vectors at once, or for single values.
#[inline(always)]
pub(crate) fn zip(x: &mut [f32], a: &[f32], f: impl Fn(f32, f32) -> f32) {
    debug_assert_eq!(x.len(), a.len());
    let ((x, x_tail), (a, a_tail)) = (x.as_chunks_mut::<LANES>(), a.as_chunks::<LANES>());
    for (x, a) in x.iter_mut().zip(a) {
        // An array of its own, so that the values stay in a vector until they are stored.
        let mut values = [0.0; LANES];
        for l in 0..LANES {
            values[l] = f(x[l], a[l]);
        }
        *x = values;
    }
    x_tail.iter_mut().zip(a_tail).for_each(|(x, a)| *x = f(*x, *a));
}

/// Sum of the values.
#[inline(always)]
pub fn sum(a: &[f32]) -> f32 {
    reduce(a, a, |a, _| a)
}

/// Dot product.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    reduce(a, b, |a, b| a * b)
}

/// Sum of squared distances from `center`.
#[inline(always)]
pub fn sum_squared_from(a: &[f32], center: f32) -> f32 {
    reduce(a, a, |a, _| (a - center) * (a - center))
}

/// The largest value; NaN is passed over.
#[inline(always)]
pub(crate) fn largest(x: &[f32]) -> f32 {
    let pick = |top: f32, x: f32| if x > top { x } else { top };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, tail) = x.as_chunks::<LANES>();
    for block in blocks {
        lanes.iter_mut().zip(block).for_each(|(lane, x)| *lane = pick(*lane, *x));
    }
    let top = if blocks.is_empty() { f32::NEG_INFINITY } else { fold(lanes, pick) };
    tail.iter().copied().fold(top, pick)
}

/// `out = a`, for short rows: in place of a call. Inside of [`vectorized`], whole vectors.
#[inline(always)]
pub fn copy(out: &mut [f32], a: &[f32]) {
    let ((out, out_tail), (a, tail)) = (out.as_chunks_mut::<LANES>(), a.as_chunks::<LANES>());
    out.iter_mut().zip(a).for_each(|(out, a)| *out = *a);
    out_tail.copy_from_slice(tail);
}

/// Asks for the cache line of `data[at]`, which need not exist.
#[inline(always)]
#[allow(unsafe_code, reason = "the only door to the instruction, which has no effect but time")]
pub fn fetch<T>(data: &[T], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint; it reads nothing, and faults nowhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.as_ptr().wrapping_add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, at);
}

/// [`fetch`]es the values at `range`, or the first of them, as many as a first-level cache holds beside what is worked on.
pub fn fetch_all<T>(data: &[T], range: Range<usize>) {
    range.step_by(64 / size_of::<T>()).take(256).for_each(|at| fetch(data, at));
}

/// Values, half a page of them, between those that a pass over memory works on and those that it asks for: processors look ahead by
/// themselves, but only to the end of a page, and the first lines of the next one are slow to come.
pub(crate) const FAR: usize = 512;

/// `out[i] = f(out[i], [a[i], b[i], ...])` of as many little-endian values wherever they lie, in one pass over memory. What lies
/// behind them is asked for, too: passes go over one block of a chunk after another.
#[inline(always)]
fn pass<const N: usize>(out: &mut [f32], all: [&[u8]; N], f: impl Fn(f32, [f32; N]) -> f32) {
    let value = |bytes: &[u8], i: usize| f32::from_le_bytes(*bytes[4 * i..].first_chunk().expect("a value's bytes"));
    assert!(all.iter().all(|a| a.len() == 4 * out.len()), "not as many values everywhere");
    let (blocks, tail) = out.as_chunks_mut::<LANES>();
    let all = all.map(|a| {
        let (of_blocks, of_tail) = a.as_chunks::<{ 4 * LANES }>();
        (&of_blocks[..blocks.len()], of_tail)
    });
    for (i, out) in blocks.iter_mut().enumerate() {
        fetch(out, FAR);
        let blocks = all.map(|(blocks, _)| &blocks[i]);
        blocks.iter().for_each(|block| fetch(*block, 4 * FAR));
        // An array of its own, so that the values stay in a vector until they are stored.
        let mut values = [0.0; LANES];
        for l in 0..LANES {
            values[l] = f(out[l], blocks.map(|block| value(block, l)));
        }
        *out = values;
    }
    for (i, out) in tail.iter_mut().enumerate() {
        *out = f(*out, all.map(|(_, tail)| value(tail, i)));
    }
}

/// `out[i] += a[i]`.
pub fn add_into(out: &mut [f32], a: &[f32]) {
    add_bytes_into(out, crate::layout::le_bytes(a));
}

/// `out = a + b`.
pub fn add(out: &mut [f32], a: &[f32], b: &[f32]) {
    add_bytes(out, crate::layout::le_bytes(a), crate::layout::le_bytes(b));
}

/// `a[i] *= factor`.
pub fn scale(a: &mut [f32], factor: f32) {
    vectorized(|| a.iter_mut().for_each(|a| *a *= factor));
}

/// Whether no value is infinite or NaN.
pub fn all_finite(a: &[f32]) -> bool {
    all_finite_bytes(crate::layout::le_bytes(a))
}

/// [`all_finite`], of little-endian values wherever they lie.
pub fn all_finite_bytes(a: &[u8]) -> bool {
    vectorized(|| a.as_chunks::<4>().0.iter().fold(0, |bad, v| bad | not_finite(u32::from_le_bytes(*v)))) == 0
}

/// [`all_finite`] of a short row: in place of a call, inside of [`vectorized`].
#[inline(always)]
pub fn finite(a: &[f32]) -> bool {
    a.iter().fold(0, |bad, v| bad | not_finite(v.to_bits())) == 0
}

/// Where `a` has an infinite value or NaN, the same place of `noted` becomes other than 0.
#[inline(always)]
pub(crate) fn note_infinite(a: &[f32], noted: &mut [u32]) {
    for (noted, a) in noted.iter_mut().zip(a) {
        *noted |= not_finite(a.to_bits());
    }
}

/// 1 where these are the bits of an infinite value or NaN, without a branch: the exponent's are all ones.
#[inline(always)]
fn not_finite(bits: u32) -> u32 {
    const EXPONENT: u32 = 0x7f80_0000;
    u32::from(bits & EXPONENT == EXPONENT)
}

/// [`add_into`], of little-endian values wherever they lie.
pub fn add_bytes_into(out: &mut [f32], a: &[u8]) {
    vectorized(
        #[inline(always)]
        || pass(out, [a], |sum, [a]| sum + a),
    );
}

/// `out = a + b`, of little-endian values wherever they lie.
pub fn add_bytes(out: &mut [f32], a: &[u8], b: &[u8]) {
    vectorized(
        #[inline(always)]
        || pass(out, [a, b], |_, [a, b]| a + b),
    );
}

/// `out[j] = sum over rows of x[row, j]`, rows in order; `x`: `(rows, out.len())`.
pub fn column_sums(x: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    if out.is_empty() {
        return;
    }
    let n = out.len();
    vectorized(
        #[inline(always)]
        || {
            // Several rows at a time, so that the sums are not loaded and stored for each.
            let mut several = x.chunks_exact(4 * n);
            for rows in &mut several {
                let ((a, b), (c, d)) = (rows[..2 * n].split_at(n), rows[2 * n..].split_at(n));
                for (o, (((a, b), c), d)) in out.iter_mut().zip(a.iter().zip(b).zip(c).zip(d)) {
                    *o = *o + a + b + c + d;
                }
            }
            for row in several.remainder().chunks_exact(n) {
                out.iter_mut().zip(row).for_each(|(o, v)| *o += v);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::le_bytes;

    /// Lengths around a vector's and what is asked for ahead, bytes anywhere in memory, every instruction set.
    #[test]
    fn sums_are_the_same_wherever_bytes_lie_and_vectors_end() {
        for n in (0..=67).chain(FAR - 1..=FAR + 17) {
            let values = |salt: usize| -> Vec<f32> { (0..n).map(|i| ((i * 31 + salt) as f32 * 0.7).sin()).collect() };
            let (a, b) = (values(1), values(2));
            let want: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
            for (isa, shift) in Isa::available().flat_map(|isa| (0..5).map(move |shift| (isa, shift))) {
                let bytes = |values| [&vec![0xff; shift][..], le_bytes(values)].concat();
                let (of_a, of_b) = (bytes(&a), bytes(&b));
                let sums = with_isa(isa, || {
                    let (mut out, mut into) = (vec![f32::NAN; n], a.clone());
                    add_bytes(&mut out, &of_a[shift..], &of_b[shift..]);
                    add_bytes_into(&mut into, &of_b[shift..]);
                    [out, into]
                });
                assert_eq!(sums, Some([want.clone(), want.clone()]), "{n} values, {isa:?}, {shift} bytes off");
            }
            let mut out = vec![f32::NAN; n];
            add(&mut out, &a, &b);
            assert_eq!(out, want, "{n} values");
        }
    }

    /// Every length up to four lanes and a tail, against the sum in f64.
    #[test]
    fn reductions_equal_their_oracles() {
        for n in 0..=67 {
            let a: Vec<f32> = (0..n).map(|i| ((i * 37 % 19) as f32 - 9.0) * 0.37).collect();
            let b: Vec<f32> = (0..n).map(|i| ((i * 23 % 17) as f32 - 8.0) * 0.11).collect();
            let close = |got: f32, want: f64| assert!((got as f64 - want).abs() < 1e-4, "{n}: {got} {want}");
            close(sum(&a), a.iter().map(|&v| v as f64).sum());
            close(dot(&a, &b), a.iter().zip(&b).map(|(&a, &b)| a as f64 * b as f64).sum());
            close(sum_squared_from(&a, 0.5), a.iter().map(|&v| (v as f64 - 0.5).powi(2)).sum());
            assert_eq!(vectorized(|| dot(&a, &b)).to_bits(), dot(&a, &b).to_bits(), "the width moved a bit");
            let mut out = b.clone();
            zip(&mut out, &a, |x, a| x - 2.0 * a);
            assert!(out.iter().zip(a.iter().zip(&b)).all(|(o, (a, b))| *o == b - 2.0 * a));
            out.copy_from_slice(&b);
            add_into(&mut out, &a);
            assert!(out.iter().zip(a.iter().zip(&b)).all(|(o, (a, b))| *o == a + b));
            out.fill(f32::NAN);
            add_bytes(&mut out, le_bytes(&a), le_bytes(&b));
            assert!(out.iter().zip(a.iter().zip(&b)).all(|(o, (a, b))| *o == a + b));
            scale(&mut out, 0.3);
            assert!(out.iter().zip(a.iter().zip(&b)).all(|(o, (a, b))| *o == (a + b) * 0.3));
            assert!(all_finite(&a));
            for (at, bad) in (0..n).zip([f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().cycle()) {
                let mut spoilt = a.clone();
                spoilt[at] = bad;
                assert!(!all_finite(&spoilt), "{bad} at {at} of {n}");
            }
            if n > 0 {
                // Every number of rows up to two passes of several: in order, which other orders are not.
                for rows in 0..=9 {
                    let x: Vec<f32> = (0..rows).flat_map(|row| if row % 2 == 0 { &a } else { &b }).copied().collect();
                    column_sums(&x, &mut out);
                    let want = |j: usize| (0..rows).fold(0.0, |sum, row| sum + x[row * n + j]);
                    let same = |(j, o): (usize, &f32)| o.to_bits() == want(j).to_bits();
                    assert!(out.iter().enumerate().all(same), "{rows} rows of {n}");
                }
            }
        }
    }
}
