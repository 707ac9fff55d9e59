//! Kernels at the shapes of the benchmark workloads, one thread: `cargo bench -p unisono-common`.
//!
//! Products are counted in multiply-adds (items), passes over memory in bytes.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use unisono_common::kernels::conv::{Patches, PatchesT, Window};
use unisono_common::kernels::gemm::product_with;
use unisono_common::kernels::winograd::{InputsGradient, Outputs, WeightsGradient, Winograd};
use unisono_common::kernels::{Finish, Mat, Start, gemm};

fn main() {
    divan::main();
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 % 1013) as f32 - 506.0) / 506.0).collect()
}

/// `(m, k, n)`: samples, inputs, outputs of linear layers; filters, patch, positions of convolutions.
const SHAPES: [(usize, usize, usize); 13] = [
    (512, 512, 512),
    (256, 784, 10),
    (128, 784, 512),
    (128, 512, 256),
    (64, 4096, 4096),
    (64, 784, 4096),
    (64, 288, 576),
    (64, 9216, 128),
    // Of gpt: queries, keys and values, the way back, the feed-forward network, and a block of attention.
    (768, 128, 384),
    (768, 128, 128),
    (768, 128, 512),
    (768, 512, 128),
    (64, 32, 64),
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

/// Images that a convolution is measured with.
const IMAGES: usize = 8;

/// `(channels, filters, side)` of convolutions with 3x3 windows.
const CONVOLUTIONS: [(usize, usize, usize); 2] = [(1, 32, 28), (32, 64, 26)];

/// A convolution's window, with its images, weights and outputs, and the multiply-adds of all images.
fn convolution(channels: usize, filters: usize, side: usize) -> (Window, Vec<f32>, Vec<f32>, Vec<f32>, ItemsCount) {
    let window = Window { channels, height: side, width: side, kernel: 3, stride: 1, padding: 0 };
    let (inputs, outputs) = (IMAGES * channels * side * side, IMAGES * filters * window.positions());
    let count = ItemsCount::new(outputs * window.patch());
    (window, values(inputs), values(filters * window.patch()), values(outputs), count)
}

/// `y = relu(w patches(x) + b)`.
#[divan::bench(args = CONVOLUTIONS)]
fn conv_forward(bencher: Bencher<'_, '_>, (channels, filters, side): (usize, usize, usize)) {
    let (window, x, w, mut y, count) = convolution(channels, filters, side);
    let (mut shifted, bias) = (vec![0.0; window.shifted()], values(filters));
    bencher.counter(count).bench_local(|| {
        let images =
            x.chunks_exact(x.len() / IMAGES).zip(black_box(&mut y).chunks_exact_mut(filters * window.positions()));
        for (x, y) in images {
            window.shift(x, &mut shifted);
            let patches = Patches { window, shifted: &shifted };
            product_with(y, Mat::new(&w, filters, window.patch()), patches, Start::Rows(&bias), Finish::Relu);
        }
    });
}

/// `dw = sum over images of dy patches(x)^T`.
#[divan::bench(args = CONVOLUTIONS)]
fn conv_weights(bencher: Bencher<'_, '_>, (channels, filters, side): (usize, usize, usize)) {
    let (window, x, mut dw, dy, count) = convolution(channels, filters, side);
    let mut shifted = vec![0.0; window.shifted()];
    bencher.counter(count).bench_local(|| {
        let n = window.positions();
        black_box(&mut dw).fill(0.0);
        for (x, dy) in x.chunks_exact(x.len() / IMAGES).zip(dy.chunks_exact(filters * n)) {
            window.shift(x, &mut shifted);
            let patches = PatchesT(Patches { window, shifted: &shifted });
            product_with(&mut dw, Mat::new(dy, filters, n), patches, Start::Old, Finish::Keep);
        }
    });
}

/// `dx = unpatch(w^T dy)`.
#[divan::bench(args = CONVOLUTIONS)]
fn conv_inputs(bencher: Bencher<'_, '_>, (channels, filters, side): (usize, usize, usize)) {
    let (window, mut dx, w, dy, count) = convolution(channels, filters, side);
    let (patch, n) = (window.patch(), window.positions());
    let (mut shifted, mut cols) = (vec![0.0; window.shifted()], vec![0.0; patch * n]);
    bencher.counter(count).bench_local(|| {
        let images = black_box(&mut dx).chunks_exact_mut(channels * side * side).zip(dy.chunks_exact(filters * n));
        for (dx, dy) in images {
            gemm(&mut cols, Mat::new(&w, filters, patch).t(), Mat::new(dy, filters, n), false);
            window.unpatch(&cols, &mut shifted, dx);
        }
    });
}

/// The same by minimal filtering; counted as the multiply-adds of the direct way.
#[divan::bench]
fn winograd_forward(bencher: Bencher<'_, '_>) {
    let (window, x, w, mut y, count) = convolution(32, 64, 26);
    let of = Winograd::of(window, 64).expect("it has many channels");
    let (mut prepared, mut scratch) = (vec![0.0; of.prepared()], vec![0.0; of.scratch()]);
    bencher.counter(count).bench_local(|| {
        of.prepare_forward(&w, None, &mut prepared);
        of.forward(&prepared, black_box(&x), &mut y, Finish::Relu, &mut scratch);
    });
}

/// The gradients by minimal filtering: of the filters, of the inputs, and of both at once.
#[divan::bench(args = ["weights", "inputs", "both"])]
fn winograd_backward(bencher: Bencher<'_, '_>, wanted: &str) {
    let (window, x, w, dy, count) = convolution(32, 64, 26);
    let of = Winograd::of(window, 64).expect("it has many channels");
    let (mut prepared, mut scratch) = (vec![0.0; of.prepared()], vec![0.0; of.weights_scratch(64)]);
    let (mut dx, mut dw, mut db) = (vec![0.0; x.len()], vec![0.0; w.len()], vec![0.0; 64]);
    bencher.counter(count).bench_local(|| {
        let outputs = Outputs { finish: Finish::Relu, y: black_box(&dy), dy: &dy };
        let weights = WeightsGradient { x: &x, range: 0..64, dw: &mut dw, db: &mut db };
        of.prepare_inputs(&w, &mut prepared);
        let inputs = InputsGradient { prepared: &prepared, dx: &mut dx };
        let (weights, inputs) = ((wanted != "inputs").then_some(weights), (wanted != "weights").then_some(inputs));
        of.backward(outputs, weights, inputs, &mut scratch);
    });
}

/// Memory copy, for comparison.
#[divan::bench(args = [1 << 16, 1 << 20, 64 << 20])]
fn copy(bencher: Bencher<'_, '_>, bytes: usize) {
    let (a, mut b) = (values(bytes / 4), vec![0.0; bytes / 4]);
    bencher.counter(BytesCount::new(2 * bytes)).bench_local(|| black_box(&mut b).copy_from_slice(black_box(&a)));
}
