//! Kernels at the shapes of the benchmark workloads, one thread: `cargo bench -p unisono-common`.
//!
//! Products are counted in multiply-adds (items), passes over memory in bytes.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use unisono_common::kernels::{Mat, gemm};

fn main() {
    divan::main();
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 % 1013) as f32 - 506.0) / 506.0).collect()
}

/// `(m, k, n)`: samples, inputs, outputs of linear layers; filters, patch, positions of convolutions.
const SHAPES: [(usize, usize, usize); 8] = [
    (512, 512, 512),
    (256, 784, 10),
    (128, 784, 512),
    (128, 512, 256),
    (64, 4096, 4096),
    (64, 784, 4096),
    (64, 288, 576),
    (64, 9216, 128),
];

/// `y = x w^T`: a linear layer's forward.
#[divan::bench(args = SHAPES)]
fn gemm_forward(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let (a, b, mut c) = (values(m * k), values(n * k), vec![0.0; m * n]);
    bencher.counter(ItemsCount::new(m * k * n)).bench_local(|| {
        gemm(black_box(&mut c), Mat::new(&a, m, k), Mat::new(&b, n, k).t(), false);
    });
}

/// `dw = dy^T x`: its weights' gradient.
#[divan::bench(args = SHAPES)]
fn gemm_weights(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let (a, b, mut c) = (values(m * n), values(m * k), vec![0.0; n * k]);
    bencher.counter(ItemsCount::new(m * k * n)).bench_local(|| {
        gemm(black_box(&mut c), Mat::new(&a, m, n).t(), Mat::new(&b, m, k), false);
    });
}

/// `dx = dy w`: its inputs' gradient; `w cols` of a convolution.
#[divan::bench(args = SHAPES)]
fn gemm_inputs(bencher: Bencher<'_, '_>, (m, k, n): (usize, usize, usize)) {
    let (a, b, mut c) = (values(m * n), values(n * k), vec![0.0; m * k]);
    bencher.counter(ItemsCount::new(m * k * n)).bench_local(|| {
        gemm(black_box(&mut c), Mat::new(&a, m, n), Mat::new(&b, n, k), false);
    });
}

/// Memory copy, for comparison.
#[divan::bench(args = [1 << 16, 1 << 20, 64 << 20])]
fn copy(bencher: Bencher<'_, '_>, bytes: usize) {
    let (a, mut b) = (values(bytes / 4), vec![0.0; bytes / 4]);
    bencher.counter(BytesCount::new(2 * bytes)).bench_local(|| black_box(&mut b).copy_from_slice(black_box(&a)));
}
