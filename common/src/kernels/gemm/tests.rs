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
                // The same in wider rows, of which the rest stays as it is.
                let mut rows = vec![7.5; m * (n + 3)];
                (0..m).for_each(|i| rows[i * (n + 3)..][..n].copy_from_slice(&old[i * n..][..n]));
                let apart = || product_apart(&mut rows, n + 3, mat_a, mat_b, start, finish);
                with_isa(isa, apart).expect("it is available");
                for (at, got) in rows.iter().enumerate() {
                    let (i, j) = (at / (n + 3), at % (n + 3));
                    let want = if j < n { c[i * n + j] } else { 7.5 };
                    assert!(
                        got.to_bits() == want.to_bits(),
                        "({i}, {j}) of {m}x{k}x{n} in wider rows: {got}, not {want}"
                    );
                }
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
        // What goes on through an activation is the product, and then its gradient.
        if matches!((start, finish), (Start::Zero, Finish::Keep)) {
            let special = [f32::NAN, -0.0, 0.0, f32::INFINITY, f32::NEG_INFINITY];
            let at: Vec<f32> = old.iter().enumerate().map(|(i, v)| *special.get(i % 9).unwrap_or(v)).collect();
            for (through, slope) in [
                (Through::Slopes(&at), (|at, d| d * at) as fn(f32, f32) -> f32),
                (Through::Outputs(Finish::Keep, &at), |_, d| d),
                (Through::Outputs(Finish::Relu, &at), |at, d| if at > 0.0 { d } else { 0.0 }),
                (Through::Outputs(Finish::LeakyRelu { slope: 0.1 }, &at), |at, d| if at > 0.0 { d } else { 0.1 * d }),
            ] {
                for isa in Isa::available() {
                    let mut got = vec![f32::NAN; m * n];
                    with_isa(isa, || product_through(&mut got, mat_a, mat_b, Some(through))).expect("it is available");
                    for (i, (got, (d, at))) in got.iter().zip(c.iter().zip(&at)).enumerate() {
                        let want = slope(*at, *d);
                        let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                        assert!(same, "value {i} of {what}, {isa:?}: {got}, not {want}, of {d} through {at}");
                    }
                }
            }
        }
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

/// Left matrices whose lines lie 512 values apart, and are packed on every instruction set: several strips, and blocks of steps.
#[test]
fn every_value_is_the_defined_sum_of_packed_strips() {
    for rows in [509, 461] {
        check(rows, 1100, 50);
    }
    check_triangle(512, 600, 3, 0);
}

proptest! {
    #[test]
    fn every_value_is_the_defined_sum(m in 0usize..68, k in 0usize..68, n in 0usize..68, deep in 0usize..3) {
        check(m, k, n);
        check(m % 4, k + deep * 500, n % 5);
    }
}

/// The product without what a triangle leaves out is the defined sum of the rest, whatever would come after or before; it writes to
/// its own columns only. `b` is a part of wider rows; what is left out of `a` is 0, next to values of `b` that are not finite.
fn check_triangle(m: usize, k: usize, n: usize, apart: usize) {
    let (mut a, mut b, old) = (values(m * k, 1), values(k * (n + apart), 2), values(m * (n + 3), 3));
    for (of, there) in [
        (Triangle::Full, (|_, _| true) as fn(usize, usize) -> bool),
        (Triangle::LeftLower, |i, l| l <= i),
        (Triangle::LeftUpper, |i, l| l >= i),
        (Triangle::Upper, |_, _| true),
    ] {
        a.iter_mut().enumerate().filter(|(at, _)| !there(at / k, at % k)).for_each(|(_, a)| *a = 0.0);
        b[k / 2 * (n + apart) + apart] = if of.cuts() { f32::INFINITY } else { 1.0 };
        let a_t: Vec<f32> = (0..k * m).map(|at| a[at % m * k + at / m]).collect();
        let steps = |i: usize| of.steps(&(i - i % GROUP..i + 1), 0..k);
        for (transposed, add, isa) in Isa::available().flat_map(|isa| (0..4).map(move |i| (i & 1 > 0, i & 2 > 0, isa)))
        {
            let a_mat = if transposed { Mat::new(&a_t, k, m).t() } else { Mat::new(&a, m, k) };
            let b_mat = Mat::new(&b, k, n + apart).part(apart, n);
            let mut c = old.clone();
            with_isa(isa, || gemm_of_triangle(&mut c, n + 3, a_mat, b_mat, add, of)).expect("it is available");
            for (at, (c, old)) in c.iter().zip(&old).enumerate() {
                let (i, j) = (at / (n + 3), at % (n + 3));
                let pairs = || steps(i).map(|l| (a[i * k + l], b[l * (n + apart) + apart + j])).collect::<Vec<_>>();
                let want = if j < n { defined(if add { *old } else { 0.0 }, &pairs()) } else { *old };
                let any = of == Triangle::Upper && j < i && j < n;
                let same = c.to_bits() == want.to_bits() || c.is_nan() && want.is_nan();
                assert!(any || same, "({i}, {j}) of {m}x{k}x{n}, {of:?}, {isa:?}: {c} instead of {want}");
            }
        }
    }
}

/// Several blocks of steps, and of columns, begin and end inside of a triangle.
#[test]
fn triangles_are_the_defined_sums_in_several_blocks() {
    check_triangle(1900, 1800, 2, 0);
    check_triangle(40, 1800, 80, 16);
    check_triangle(90, 600, 320, 0);
}

proptest! {
    #[test]
    fn triangles_are_the_defined_sums(m in 1usize..70, k in 1usize..70, n in 1usize..70, apart in 0usize..40) {
        check_triangle(m, k, n, apart);
        check_triangle(m, k, n.next_multiple_of(16), apart);
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
