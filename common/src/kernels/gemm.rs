//! Matrix products by faer, and the law that the trainer leans on.
//!
//! **Every value of `A B` is one defined sum**: over `k` in order, by fused multiply-adds, in slices of [`DEPTH`] that are
//! added up in order. So it does not depend on how many rows or columns are computed beside it, and a batch may be cut and
//! joined for any number of threads and partitions. faer's large kernel computes that sum; what faer would give to other
//! kernels (a lone row or column, a small product, an outer product) is kept from it.

use super::vectorized;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use std::cell::RefCell;

/// Products that are summed up at once, and then added to the slices before.
pub const DEPTH: usize = 512;

/// Multiply-adds up to which faer takes another kernel.
const SMALL: usize = 4096;

/// A row-major matrix with a row stride, or the transpose of one.
#[derive(Clone, Copy)]
pub struct Mat<'a>(MatRef<'a, f32>);

impl<'a> Mat<'a> {
    /// `rows x cols` values, row after row.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Mat<'a> {
        Mat(MatRef::from_row_major_slice(&data[..rows * cols], rows, cols))
    }

    /// The columns `from..from + cols` of a row-major matrix whose rows are `stride` long.
    pub fn columns(data: &'a [f32], rows: usize, stride: usize, from: usize, cols: usize) -> Mat<'a> {
        Mat(MatRef::from_row_major_slice(&data[..rows * stride], rows, stride).subcols(from, cols))
    }

    /// The transpose; nothing is moved.
    pub fn t(self) -> Mat<'a> {
        Mat(self.0.transpose())
    }
}

/// `c = a b`, or `c += a b`; `a`: `(m, k)`, `b`: `(k, n)`, `c`: `(m, n)` row-major. One thread.
///
/// # Panics
/// Where the shapes do not fit.
pub fn gemm(c: &mut [f32], a: Mat<'_>, b: Mat<'_>, add: bool) {
    let (m, n) = (a.0.nrows(), b.0.ncols());
    if m == 0 || n == 0 {
        return;
    }
    if a.0.ncols() == 0 {
        if !add {
            c.fill(0.0);
        }
        return;
    }
    match (m, n) {
        (1, _) => lone_row(&mut c[..n], a.0, b.0, add),
        (_, 1) => lone_row(&mut c[..m], b.0.transpose(), a.0.transpose(), add),
        _ => product(&mut c[..m * n], a.0, b.0, add),
    }
}

/// A lone row is computed twice over, as two equal ones, and so is a lone value.
fn lone_row(c: &mut [f32], a: MatRef<'_, f32>, b: MatRef<'_, f32>, add: bool) {
    TWICE.with_borrow_mut(|[a_twice, b_twice, c_twice]| {
        let (k, n) = (b.nrows(), b.ncols().max(2));
        a_twice.clear();
        a_twice.extend(a.row(0).iter().chain(a.row(0).iter()));
        let b = if b.ncols() == n {
            b
        } else {
            b_twice.clear();
            b_twice.extend(b.col(0).iter().flat_map(|v| [*v, *v]));
            MatRef::from_row_major_slice(b_twice, k, n)
        };
        c_twice.clear();
        c_twice.resize(2 * n, 0.0);
        c_twice.chunks_exact_mut(n).for_each(|twice| twice[..c.len()].copy_from_slice(c));
        product(c_twice, MatRef::from_row_major_slice(a_twice, 2, k), b, add);
        c.copy_from_slice(&c_twice[..c.len()]);
    });
}

thread_local! {
    /// The doubled rows of [`lone_row`].
    static TWICE: RefCell<[Vec<f32>; 3]> = const { RefCell::new([Vec::new(), Vec::new(), Vec::new()]) };
}

fn product(c: &mut [f32], a: MatRef<'_, f32>, b: MatRef<'_, f32>, add: bool) {
    for from in (0..a.ncols()).step_by(DEPTH) {
        let depth = DEPTH.min(a.ncols() - from);
        let (a, b, add) = (a.subcols(from, depth), b.subrows(from, depth), add || from > 0);
        if depth == 1 || a.nrows() * b.ncols() * depth <= SMALL {
            small(c, a, b, add);
        } else {
            let c = MatMut::from_row_major_slice_mut(c, a.nrows(), b.ncols());
            matmul(c, if add { Accum::Add } else { Accum::Replace }, a, b, 1.0, Par::Seq);
        }
    }
}

/// The defined sum in plain loops.
fn small(c: &mut [f32], a: MatRef<'_, f32>, b: MatRef<'_, f32>, add: bool) {
    const WIDTH: usize = 64;
    let width = WIDTH.min(b.ncols());
    vectorized(|| {
        for (i, c) in c.chunks_exact_mut(b.ncols()).enumerate() {
            for (block, c) in c.chunks_mut(width).enumerate() {
                let mut sums = [0.0f32; WIDTH];
                for k in 0..a.ncols() {
                    let a = a[(i, k)];
                    let b = b.row(k).subcols(block * width, c.len());
                    match b.try_as_row_major() {
                        Some(b) => sums.iter_mut().zip(b.as_slice()).for_each(|(sum, b)| *sum = a.mul_add(*b, *sum)),
                        None => sums.iter_mut().zip(b.iter()).for_each(|(sum, b)| *sum = a.mul_add(*b, *sum)),
                    }
                }
                c.iter_mut().zip(&sums).for_each(|(c, sum)| *c = if add { *c + sum } else { *sum });
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Normal values with zeros among them, as after a relu.
    fn values(n: usize, salt: u64) -> Vec<f32> {
        let key = crate::rng::Key::new(salt, crate::rng::Purpose::Synthetic);
        (0..n as u64).map(|i| if i % 5 == 2 { 0.0 } else { key.normal(i) }).collect()
    }

    /// One value of a product, as the module's documentation defines it.
    fn defined(start: Option<f32>, pairs: &[(f32, f32)]) -> f32 {
        let slices = pairs.chunks(DEPTH).map(|slice| slice.iter().fold(0.0, |sum, (a, b)| a.mul_add(*b, sum)));
        start.into_iter().chain(slices).reduce(|c, sum| c + sum).unwrap_or(0.0)
    }

    /// Every orientation that layers ask for; `a` and `b` may be transposes, `a` columns of a wider matrix.
    fn check(m: usize, k: usize, n: usize) {
        let (a, b, wide) = (values(m * k, 1), values(k * n, 2), values(k * (m + 3), 3));
        let a_at = |how: usize, i: usize, l: usize| if how == 0 { a[i * k + l] } else { wide[l * (m + 3) + 2 + i] };
        let b_at = |how: usize, l: usize, j: usize| if how == 0 { b[l * n + j] } else { b[j * k + l] };
        for (how_a, how_b, add) in (0..8).map(|i| (i & 1, i >> 1 & 1, i >> 2 == 1)) {
            let mut c = values(m * n, 4);
            let start = c.clone();
            let mat_a = if how_a == 0 { Mat::new(&a, m, k) } else { Mat::columns(&wide, k, m + 3, 2, m).t() };
            let mat_b = if how_b == 0 { Mat::new(&b, k, n) } else { Mat::new(&b, n, k).t() };
            gemm(&mut c, mat_a, mat_b, add);
            // All rows and columns of the small ones, some of the large ones.
            for i in (0..m).step_by(1 + m / 40) {
                for j in (0..n).step_by(1 + n / 40) {
                    let pairs: Vec<_> = (0..k).map(|l| (a_at(how_a, i, l), b_at(how_b, l, j))).collect();
                    let (got, want) = (c[i * n + j], defined(add.then_some(start[i * n + j]), &pairs));
                    let what = format!("({i}, {j}) of {m}x{k}x{n}, a {how_a}, b {how_b}, add {add}");
                    assert_eq!(got.to_bits(), want.to_bits(), "{what}: {got} instead of {want}");
                }
            }
        }
    }

    /// Shapes of the examples' layers, forward and backward, with many rows and with few.
    #[test]
    fn every_value_is_the_defined_sum_at_the_layers_shapes() {
        for (inputs, outputs) in [(64, 128), (784, 512), (9216, 128), (107, 1), (784, 2), (1, 3)] {
            for rows in [1, 2, 3, 5, 8, 24, 48, 130] {
                check(rows, inputs, outputs);
                check(rows, outputs, inputs);
                check(outputs, rows, inputs);
            }
        }
        for (filters, patch, positions) in [(32, 9, 676), (64, 288, 576), (3, 700, 2), (2, 1, 1)] {
            check(filters, patch, positions);
            check(filters, positions, patch);
            check(patch, filters, positions);
        }
    }

    proptest! {
        #[test]
        fn every_value_is_the_defined_sum(m in 0usize..68, k in 0usize..68, n in 0usize..68, deep in 0usize..3) {
            check(m, k, n);
            check(m % 4, k + deep * 500, n % 5);
        }
    }
}
