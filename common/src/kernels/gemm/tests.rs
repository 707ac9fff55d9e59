use super::*;
use crate::kernels::{Isa, with_isa};
use proptest::prelude::*;

/// Normal values with zeros among them, as after a relu.
fn values(n: usize, salt: u64) -> Vec<f32> {
    let key = crate::rng::Key::new(salt, crate::rng::Purpose::Synthetic);
    (0..n as u64).map(|i| if i % 5 == 2 { 0.0 } else { key.normal(i) }).collect()
}

/// One value of a product, as the module's documentation defines it.
fn defined(start: f32, pairs: &[(f32, f32)]) -> f32 {
    pairs.iter().fold(start, |sum, (a, b)| a.mul_add(*b, sum))
}

/// Every orientation that layers ask for, on every instruction set; `a` and `b` may be transposes, `a` columns of a wider
/// matrix.
fn check(m: usize, k: usize, n: usize) {
    let (a, b, wide) = (values(m * k, 1), values(k * n, 2), values(k * (m + 3), 3));
    let (old, bias) = (values(m * n, 4), values(m.max(n), 5));
    let a_at = |how: usize, i: usize, l: usize| if how == 0 { a[i * k + l] } else { wide[l * (m + 3) + 2 + i] };
    let b_at = |how: usize, l: usize, j: usize| if how == 0 { b[l * n + j] } else { b[j * k + l] };
    let cases = [
        (Start::Zero, Finish::Keep),
        (Start::Old, Finish::LeakyRelu { slope: 0.1 }),
        (Start::Columns(&bias[..n]), Finish::Relu),
        (Start::Rows(&bias[..m]), Finish::Keep),
    ];
    for (how_a, how_b, (start, finish)) in (0..16).map(|i| (i & 1, i >> 1 & 1, cases[i >> 2])) {
        let mat_a = if how_a == 0 { Mat::new(&a, m, k) } else { Mat::new(&wide, k, m + 3).part(2, m).t() };
        let mat_b = if how_b == 0 { Mat::new(&b, k, n) } else { Mat::new(&b, n, k).t() };
        let results: Vec<_> = Isa::available()
            .map(|isa| {
                let mut c = old.clone();
                with_isa(isa, || product(&mut c, mat_a, mat_b, start, finish)).expect("it is available");
                (isa, c)
            })
            .collect();
        let what = format!("{m}x{k}x{n}, a {how_a}, b {how_b}, {start:?}, {finish:?}");
        // The same where the right matrix was packed before, whatever for.
        for isa in Isa::available().filter(|_| (how_a, how_b) == (1, 0)) {
            let (mut room, mut c) = (vec![0.0; Packed::room(k, n)], old.clone());
            let ready = with_isa(isa, || Packed::of(mat_b, m, &mut room)).expect("it is available");
            for run in Isa::available() {
                c.copy_from_slice(&old);
                with_isa(run, || product_with(&mut c, mat_a, ready, start, finish)).expect("it is available");
                assert!(c.iter().zip(&results[0].1).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?} for {run:?}");
            }
        }
        let c = &results[0].1;
        for (isa, other) in &results {
            assert!(c.iter().zip(other).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}: {isa:?} is another");
        }
        // All rows and columns of the small ones, some of the large ones.
        for i in (0..m).step_by(1 + m / 40) {
            for j in (0..n).step_by(1 + n / 40) {
                let start = match start {
                    Start::Zero => 0.0,
                    Start::Old => old[i * n + j],
                    Start::Columns(bias) => bias[j],
                    Start::Rows(bias) => bias[i],
                };
                let pairs: Vec<_> = (0..k).map(|l| (a_at(how_a, i, l), b_at(how_b, l, j))).collect();
                let (got, want) = (c[i * n + j], finish.of(defined(start, &pairs)));
                assert_eq!(got.to_bits(), want.to_bits(), "({i}, {j}) of {what}: {got} instead of {want}");
            }
        }
    }
}

/// Shapes of the examples' layers, forward and backward, with many rows and with few.
#[test]
fn every_value_is_the_defined_sum_at_the_layers_shapes() {
    for (inputs, outputs) in [(64, 128), (784, 300), (1700, 65), (107, 1), (784, 2), (1, 3)] {
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

/// `(rows, n)`, of which only those at the right places are there.
fn triangle(a: &[f32], n: usize, there: impl Fn(usize, usize) -> bool) -> Vec<f32> {
    a.iter().enumerate().map(|(at, v)| if there(at / n, at % n) { *v } else { 0.0 }).collect()
}

/// A triangle's product is that of the whole matrix, wherever it is of interest, and writes to its own columns only; `b` lies by
/// rows of whole vectors, of any values, and far apart.
fn check_triangle(m: usize, k: usize, n: usize, apart: usize) {
    let (lower, upper) = (|i, l| l <= i, |i, l| l >= i);
    let (a, b, old) = (values(m * k, 1), values(k * (n + apart) + 1, 2), values(m * (n + 3), 3));
    let b = Mat::new(&b, k, n + apart).part(apart, n);
    for (of, a) in [
        (Triangle::Full, a.clone()),
        (Triangle::Upper, a.clone()),
        (Triangle::LeftLower, triangle(&a, k, lower)),
        (Triangle::LeftUpper, triangle(&a, k, upper)),
    ] {
        let a_t: Vec<f32> = (0..k * m).map(|at| a[at % m * k + at / m]).collect();
        for (a, add, isa) in Isa::available().flat_map(|isa| {
            let whole = Mat::new(&a, m, k);
            [(whole, false, isa), (Mat::new(&a_t, k, m).t(), true, isa)]
        }) {
            let (mut c, mut want) = (old.clone(), vec![0.0; m * n]);
            with_isa(isa, || gemm_of_triangle(&mut c, n + 3, a, b, add, of)).expect("it is available");
            for (want, old) in want.chunks_exact_mut(n).zip(old.chunks_exact(n + 3)) {
                want.copy_from_slice(&old[..n]);
            }
            gemm(&mut want, a, b, add);
            for (at, (c, old)) in c.iter().zip(&old).enumerate() {
                let (i, j) = (at / (n + 3), at % (n + 3));
                let want = if j < n { want[i * n + j] } else { *old };
                let any = of == Triangle::Upper && j < i;
                assert!(any || c.to_bits() == want.to_bits(), "({i}, {j}) of {m}x{k}x{n}, {of:?}, {isa:?}: {c} {want}");
            }
        }
    }
}

proptest! {
    #[test]
    fn triangles_are_parts_of_the_whole(m in 1usize..70, k in 1usize..70, n in 1usize..70, apart in 0usize..40) {
        check_triangle(m, k, n, apart);
        check_triangle(m, k + 1000, n.next_multiple_of(16), apart);
    }

    #[test]
    fn a_transpose_is_one(m in 1usize..70, n in 1usize..70, apart in 0usize..20) {
        let a = values(m * (n + apart), 1);
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; m * n];
            with_isa(isa, || transposed(&mut out, Mat::new(&a, m, n + apart).part(apart, n))).expect("it is available");
            let want = (0..n * m).map(|at| a[at % m * (n + apart) + apart + at / m]);
            prop_assert!(out.iter().zip(want).all(|(out, want)| *out == want), "{isa:?}");
        }
    }
}
