//! A training step and its parts outside of matrix products, one thread: `cargo bench -p unisono-common --bench step`.
//!
//! The steps are those of `tests/peers`, one partition a worker; passes over memory are counted in bytes, read and written.

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use unisono_common::data::partition::{Feeder, Partitions};
use unisono_common::data::{Batch, Dataset, Features, Prepared, Targets};
use unisono_common::job::{self, Activation as Act, Layer as Op, Loss as LossKind, Model as Spec};
use unisono_common::kernels::{self, conv::Window};
use unisono_common::layers::{
    Activation, Attention, BatchNorm, Dropout, Grads, Layer, LayerNorm, Params, Pass, Pool2d, Rows, Segments,
};
use unisono_common::layout::{CHUNK, Role, Tensor, le_bytes};
use unisono_common::loss::Loss;
use unisono_common::model::{Model, Signature};
use unisono_common::optim::{self, Optimizer, Sums};
use unisono_common::rng::{Key, Purpose};
use unisono_common::train::{Workspace, gradient};

fn main() {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("the first pool");
    divan::main();
}

fn values(n: usize) -> Vec<f32> {
    let key = Key::new(1, Purpose::Synthetic);
    (0..n as u64).map(|i| key.normal(i)).collect()
}

fn labels(rows: usize, classes: usize) -> Targets {
    Targets::Class((0..rows).map(|i| (i * 7 % classes) as u32).collect())
}

fn key() -> Key {
    Key::new(1, Purpose::Dropout)
}

fn cross_entropy(classes: usize) -> Loss {
    Loss::new(&LossKind::CrossEntropy { label_smoothing: 0.0, class_weights: None }, classes).expect("it fits")
}

/// `deploy/src/bench/NAME.toml`: the model, what goes in and comes out, and the samples of a step.
fn workload(name: &str) -> (Spec, Signature, usize) {
    let mlp = |hidden: &[usize]| Spec::Mlp { hidden: hidden.into(), activation: Act::Relu, dropout: 0.0 };
    let conv = |filters| Op::Conv2d { filters, kernel: 3, stride: 1, padding: 0, groups: 1, bias: true, init: None };
    let linear = |units| Op::Linear { units, bias: true, init: None };
    let relu = Op::Activation { activation: Act::Relu };
    let pixels = Signature::new(&[784], 10);
    match name {
        "softmax" => (Spec::Linear, pixels, 256),
        "mlp" => (mlp(&[512, 256]), pixels, 128),
        "mlp-wide" => (mlp(&[4096, 4096]), pixels, 64),
        "gpt" => {
            let gpt = job::Gpt {
                layers: 4,
                heads: 4,
                width: 128,
                hidden: 512,
                feed_forward: job::FeedForward::Gelu,
                norm: job::Norm::LayerNorm,
                positions: job::PositionKind::Learned,
                bias: true,
                tie: false,
                dropout: 0.0,
            };
            (
                Spec::Gpt(gpt),
                Signature { ids: 0, input: vec![64], vocabulary: Some(65), output: vec![64, 65], causal: false },
                12,
            )
        }
        "dlrm" => {
            let dlrm =
                Spec::Dlrm { width: 16, bottom: vec![64], top: vec![256, 64], interaction: job::Interaction::Concat };
            (dlrm, Signature { ids: 26, ..Signature::new(&[13], 1) }, 512)
        }
        _ => {
            let pool = Op::MaxPool2d { size: 2, stride: 2 };
            let features = [conv(32), relu.clone(), conv(64), relu.clone(), pool, Op::Flatten];
            let layers = [&features[..], &[linear(128), relu, linear(10)]].concat();
            (Spec::Layers { layers }, Signature::new(&[1, 28, 28], 10), 64)
        }
    }
}

#[divan::bench(args = ["softmax", "mlp", "mlp-wide", "cnn", "gpt", "dlrm"])]
fn step(bencher: Bencher<'_, '_>, name: &str) {
    let (spec, signature, samples) = workload(name);
    let model = Model::build(&spec, &signature).expect("it fits");
    let inputs = match signature.vocabulary {
        Some(n) => (0..samples * model.input_len()).map(|i| (i * 7 % n) as f32).collect(),
        None => values(samples * model.input_len()),
    };
    let (targets, loss) = match name {
        "dlrm" => {
            let loss = Loss::new(&LossKind::BinaryCrossEntropy { positive_weight: 1.0 }, 1).expect("it fits");
            (Targets::Value((0..samples).map(|i| (i % 2) as f32).collect()), loss)
        }
        _ => (labels(samples * model.targets(), model.outputs()), cross_entropy(model.outputs())),
    };
    // 20,000 ids a field, a few of which come up often, as in torch_ddp.py. Finding and getting their rows is not timed.
    let id = |i: usize| (i % signature.ids * 20_000) as u64 + (20_000.0 * key().uniform(i as u64).powi(4)) as u64;
    let ids = (0..samples * signature.ids).map(id).collect();
    let mut batch = Batch { inputs, ids, targets, samples, ..Batch::empty() };
    batch.look_up();
    batch.put_rows(&model.rows().first(1), model.rows().width());
    let segments = Segments::one(samples);
    let params = model.layout().init(1);
    let (mut grads, mut d_rows) = (vec![0.0; params.len()], vec![0.0; batch.rows.len()]);
    let mut workspace = Workspace::new(&model, samples, 1);
    bencher.counter(ItemsCount::new(samples)).bench_local(|| {
        let (workspace, grads, d_rows) = (&mut workspace, &mut grads, &mut d_rows);
        gradient(&model, &loss, &params, &batch, &segments, key(), workspace, grads, d_rows, &mut |_, _| {})
    });
}

/// 256 shuffled samples of 784 values: raw pixels or floats, with no scale, one for all, or one a feature.
#[divan::bench(args = ["f32", "f32 scaled", "f32 per feature", "u8 scaled"])]
fn fill(bencher: Bencher<'_, '_>, name: &str) {
    const WIDTH: usize = 784;
    let (samples, rows) = (8192, 256);
    let features = match name {
        "u8 scaled" => Features::U8((0..samples * WIDTH).map(|i| (i * 31) as u8).collect()),
        _ => Features::F32(values(samples * WIDTH)),
    };
    let data = Dataset::new(vec![WIDTH], features, labels(samples, 10));
    let (mean, inv_std) = match name {
        "f32" => (vec![0.0], vec![1.0]),
        "f32 per feature" => (values(WIDTH), values(WIDTH)),
        _ => (vec![0.1], vec![0.3]),
    };
    let prepared = Prepared {
        shape: data.shape.clone(),
        classes: None,
        mean,
        inv_std,
        train_samples: samples as u64,
        test_samples: 0,
        digest: String::new(),
        columns: Vec::new(),
        missing: String::new(),
        tokens: None,
        ids: Vec::new(),
        implicit: None,
        sparse: None,
        weighted: false,
    };
    let parts = Partitions::new(samples, 1, None).expect("it can be cut");
    let mut feeder = Feeder::new(parts, 1, rows);
    feeder.positions(0, 0);
    let (mut batch, mut step) = (Batch::empty(), 0);
    bencher.counter(BytesCount::new(2 * rows * WIDTH * 4)).bench_local(|| {
        step = (step + 1) % (samples / rows) as u64;
        let positions = feeder.positions(step, 0).iter().map(|&i| i as usize);
        batch.fill(black_box(&data), &prepared, positions, None, false);
    });
}

/// The order of an epoch's 8192 samples, which is made once.
#[divan::bench]
fn shuffle(bencher: Bencher<'_, '_>) {
    let parts = Partitions::new(8192, 1, None).expect("it can be cut");
    bencher.counter(ItemsCount::new(8192usize)).bench_local(|| Feeder::new(parts.clone(), 1, 256).positions(3, 0)[0]);
}

#[divan::bench(args = [(256, 10), (64, 1000)])]
fn loss(bencher: Bencher<'_, '_>, (rows, classes): (usize, usize)) {
    let (loss, logits, targets) = (cross_entropy(classes), values(rows * classes), labels(rows, classes));
    let mut d = vec![0.0; logits.len()];
    bencher
        .counter(ItemsCount::new(rows * classes))
        .bench_local(|| loss.forward_backward(black_box(&logits), &targets, &[], 0..rows, black_box(&mut d)));
}

/// A layer, and the samples of the batch that it is measured with.
fn layer(name: &str) -> (Box<dyn Layer>, usize, usize) {
    let window = Window { channels: 64, height: 24, width: 24, kernel: 2, stride: 2, padding: 0 };
    let pool = |window: Window, max| Pool2d { out_shape: [64, window.out_height(), window.out_width()], window, max };
    match name {
        "max-pool 2" => (Box::new(pool(window, true)), 64 * 24 * 24, 64),
        "max-pool 3 stride 2" => (Box::new(pool(Window { kernel: 3, ..window }, true)), 64 * 24 * 24, 64),
        "avg-pool 2" => (Box::new(pool(window, false)), 64 * 24 * 24, 64),
        "dropout" => (Box::new(Dropout { rate: 0.3, shape: vec![4096] }), 4096, 128),
        "layer-norm" => (Box::new(LayerNorm { shape: vec![1024], dims: 1, centered: true, eps: 1e-5 }), 1024, 256),
        "attention" => (Box::new(Attention { shape: [64, 128], heads: 4, causal: true, rotary: None }), 64 * 384, 12),
        "gelu" => (Box::new(Activation { kind: Act::Gelu, shape: vec![512] }), 512, 768),
        _ => (Box::new(BatchNorm { shape: vec![64, 24, 24], momentum: 0.1, eps: 1e-5 }), 64 * 24 * 24, 64),
    }
}

const LAYERS: [&str; 8] =
    ["max-pool 2", "max-pool 3 stride 2", "avg-pool 2", "dropout", "layer-norm", "batch-norm", "attention", "gelu"];

/// Runs a layer forward, and backward where `back`; bytes are those of `x` and `y`, or of `dx` and `dy`.
fn run(bencher: Bencher<'_, '_>, name: &str, back: bool) {
    let (layer, in_len, rows) = layer(name);
    let out_len: usize = layer.out_shape().iter().product();
    let segments = Segments::one(rows);
    let pass =
        Pass { segments: &segments, train: true, key: key(), first: 0, finished: &|_, _| {}, finished_rows: None };
    let size = |trainable| -> usize {
        layer.tensors().iter().filter(|t| (t.role == Role::Trainable) == trainable).map(Tensor::len).sum()
    };
    let (trainable, running) = (vec![1.0; size(true)], vec![1.0; size(false)]);
    let (mut d_trainable, mut d_running) = (trainable.clone(), running.clone());
    let params = Params { trainable: &trainable, running: &running, rows: Rows::NONE };
    // As after a relu.
    let x: Vec<f32> = values(rows * in_len).into_iter().map(|v| v.max(0.0)).collect();
    let (dy, mut y, mut dx) = (values(rows * out_len), vec![0.0; rows * out_len], vec![0.0; rows * in_len]);
    let (mut saved, mut scratch) = (vec![0.0; layer.saved(rows, 1)], vec![0.0; layer.scratch(rows, 1)]);
    layer.forward(&pass, params, &x, &mut y, &mut saved, &mut scratch);
    bencher.counter(BytesCount::new(4 * rows * (in_len + out_len))).bench_local(|| {
        if back {
            let grads = Grads { trainable: &mut d_trainable, running: &mut d_running, rows: &mut [] };
            layer.backward(&pass, params, &x, &y, &dy, Some(&mut dx), grads, &mut saved, &mut scratch);
        } else {
            layer.forward(&pass, params, black_box(&x), black_box(&mut y), &mut saved, &mut scratch);
        }
    });
}

#[divan::bench(args = LAYERS)]
fn forward(bencher: Bencher<'_, '_>, name: &str) {
    run(bencher, name, false);
}

#[divan::bench(args = LAYERS)]
fn backward(bencher: Bencher<'_, '_>, name: &str) {
    run(bencher, name, true);
}

/// Sum of the squares of one chunk, for its norm.
#[divan::bench]
fn sum_squares(bencher: Bencher<'_, '_>) {
    let gradient = values(CHUNK);
    bencher.counter(BytesCount::new(4 * CHUNK)).bench_local(|| optim::sum_squares(black_box(&gradient)));
}

/// One chunk of parameters: weights, gradient and state come in, weights and state go out.
#[divan::bench(args = ["sgd", "momentum", "adam", "adamw", "adagrad", "lamb", "lion", "rms-prop"])]
fn optimizer(bencher: Bencher<'_, '_>, name: &str) {
    let (lr, beta1, beta2, eps, weight_decay) = (0.01, 0.9, 0.999, 1e-8, 0.01);
    let sgd = |momentum| job::Optimizer::Sgd { lr, momentum, dampening: 0.0, nesterov: false, weight_decay };
    let kind = match name {
        "sgd" => sgd(0.0),
        "momentum" => sgd(0.9),
        "adam" => job::Optimizer::Adam { lr, beta1, beta2, eps, weight_decay },
        "adamw" => job::Optimizer::AdamW { lr, beta1, beta2, eps, weight_decay },
        "lamb" => job::Optimizer::Lamb { lr, beta1, beta2, eps, weight_decay },
        "lion" => job::Optimizer::Lion { lr, beta1: 0.9, beta2: 0.99, weight_decay },
        "adagrad" => job::Optimizer::Adagrad { lr, lr_decay: 0.1, eps, weight_decay, initial_accumulator: 0.0 },
        _ => job::Optimizer::RmsProp { lr, alpha: 0.99, eps, momentum: 0.9, centered: true, weight_decay },
    };
    let optimizer = Optimizer::new(&kind, None);
    let (weights, grads, mut out) = (values(CHUNK), values(CHUNK), vec![0.0; CHUNK]);
    let mut slots = vec![vec![0.1; CHUNK]; optimizer.slots()];
    bencher.counter(BytesCount::new(4 * CHUNK * (3 + 2 * slots.len()))).bench_local(|| {
        let mut state: Vec<&mut [f32]> = slots.iter_mut().map(|s| s.as_mut_slice()).collect();
        optimizer.at(2, 1.0).run(black_box(&weights), Sums::mean(&grads), &mut state, black_box(&mut out));
    });
}

/// Chunks far apart in more memory than most caches hold: a gradient added to another, two added up, and an update by two that are
/// still to be added.
#[divan::bench(args = ["add into", "add", "momentum"])]
fn from_memory(bencher: Bencher<'_, '_>, name: &str) {
    const CHUNKS: usize = 512;
    let kind = job::Optimizer::Sgd { lr: 0.01, momentum: 0.9, dampening: 0.0, nesterov: false, weight_decay: 0.0 };
    let optimizer = Optimizer::new(&kind, None);
    // Each has memory of its own, as those that come over the wire.
    let some = || vec![vec![0.5f32; CHUNK]; CHUNKS];
    let (weights, left, right, mut momentum, mut out) = (some(), some(), some(), some(), some());
    let mut next = (0..).map(|i| i * 149 % CHUNKS);
    let moved = if name == "momentum" { 6 } else { 3 };
    bencher.counter(BytesCount::new(4 * CHUNK * moved)).bench_local(|| {
        let i = next.next().expect("it has no end");
        let (left, right, out) = (le_bytes(&left[i]), le_bytes(&right[i]), &mut out[i]);
        match name {
            "add into" => kernels::add_bytes_into(black_box(out), left),
            "add" => kernels::add_bytes(black_box(out), left, right),
            _ => {
                let sums = Sums { first: left, second: Some(right), factor: 0.5, limit: None };
                optimizer.at(2, 1.0).run(&weights[i], sums, &mut [&mut momentum[i]], black_box(out));
            }
        }
    });
}
