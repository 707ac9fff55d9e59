//! What every layer must keep: its gradient is the slope of its loss, and a batch's gradient is the tree sum of its
//! partitions' gradients, to the last bit, on any number of threads.

use proptest::prelude::*;
use unisono_common::data::{Batch, Targets};
use unisono_common::job::{Activation, Layer, Loss as LossKind, Model as Spec};
use unisono_common::layers::Segments;
use unisono_common::loss::Loss;
use unisono_common::model::Model;
use unisono_common::rng::{Key, Purpose};
use unisono_common::train::{Workspace, gradient};
use unisono_common::tree::Node;

fn linear(units: usize) -> Layer {
    Layer::Linear { units, bias: true, init: None }
}

fn conv(filters: usize, kernel: usize, stride: usize, padding: usize) -> Layer {
    Layer::Conv2d { filters, kernel, stride, padding, bias: true, init: None }
}

fn act(activation: Activation) -> Layer {
    Layer::Activation { activation }
}

fn batch(shape: &[usize], samples: usize, targets: Targets, salt: u64) -> Batch {
    let key = Key::new(salt, Purpose::Synthetic);
    let n = samples * shape.iter().product::<usize>();
    Batch { inputs: (0..n as u64).map(|i| key.normal(i)).collect(), targets, samples }
}

/// Parameters around their first values, so that scales are not all 1 and shifts not all 0.
fn params(model: &Model, salt: u64) -> Vec<f32> {
    let key = Key::new(salt, Purpose::Init).with(77);
    let trainable = model.layout().trainable() as u64;
    let mut values = model.layout().init(salt);
    (0..trainable).for_each(|i| values[i as usize] += 0.1 * key.normal(i));
    values
}

/// The directional derivative of the loss along random directions, by central differences, against the gradient.
fn check_slope(shape: &[usize], layers: Vec<Layer>, rows: usize, salt: u64) -> Result<(), TestCaseError> {
    let layers = [vec![Layer::Residual { layers: vec![Layer::LayerNorm { eps: 1e-3 }] }], layers].concat();
    let layers = [layers, vec![Layer::Flatten, linear(1)]].concat();
    let model = Model::build(&Spec::Layers { layers: layers.clone() }, shape, 1).expect("the model fits");
    let loss = Loss::new(&LossKind::Mse, 1).expect("it fits");
    let key = Key::new(salt, Purpose::Synthetic).with(9);
    let targets = Targets::Value((0..rows as u64).map(|i| key.normal(i)).collect());
    let batch = batch(shape, rows, targets, salt);
    let segments = Segments { lo: 3, starts: vec![0, rows / 2, rows] };
    let mut workspace = Workspace::new(&model, rows, 2);
    let start = params(&model, salt);
    let mut grads = vec![0.0; start.len()];
    let mut at = |values: &[f32], grads: &mut [f32]| {
        gradient(&model, &loss, values, &batch, &segments, key, &mut workspace, grads).loss
    };
    at(&start, &mut grads);
    let trainable = model.layout().trainable();
    for (tensor, range) in model.layout().tensors().filter(|(_, r)| r.end <= trainable) {
        let direction: Vec<f32> = range.clone().map(|i| key.normal(1000 + i as u64)).collect();
        let slope: f64 = grads[range.clone()].iter().zip(&direction).map(|(g, d)| *g as f64 * *d as f64).sum();
        let scale: f64 = grads[range.clone()].iter().zip(&direction).map(|(g, d)| (*g as f64 * *d as f64).abs()).sum();
        // The step that fits best: too long meets curvature, too short meets rounding. Beside a kink (of relu, of max) the
        // slope of one side is right.
        let middle = at(&start, &mut vec![0.0; start.len()]);
        let error = |h: f32| {
            let mut moved = |h: f32| {
                let mut values = start.clone();
                values[range.clone()].iter_mut().zip(&direction).for_each(|(v, d)| *v += h * d);
                at(&values, &mut vec![0.0; start.len()])
            };
            let (left, right) = ((middle - moved(-h)) / h as f64, (moved(h) - middle) / h as f64);
            [left, right, (left + right) / 2.0]
                .map(|measured| (measured - slope).abs())
                .into_iter()
                .fold(f64::NAN, f64::min)
        };
        let best = [3e-2f32, 1e-2, 3e-3, 1e-3, 3e-4].map(error).into_iter().fold(f64::INFINITY, f64::min);
        prop_assert!(best < 1e-2 * scale + 2e-3, "{layers:?}, {}: {best} of {slope}", tensor.name);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn gradients_are_slopes(
        (channels, height, width) in (1usize..4, 4usize..8, 4usize..8), rows in 2usize..6, salt in any::<u64>(),
        (kernel, stride, padding, filters) in (1usize..4, 1usize..3, 0usize..2, 1usize..4),
    ) {
        let padding = padding.min(kernel - 1);
        let image = [channels, height, width];
        let cases: Vec<Vec<Layer>> = vec![
            vec![conv(filters, kernel, stride, padding)],
            vec![conv(filters, kernel, stride, padding), Layer::BatchNorm { momentum: 0.1, eps: 1e-3 }],
            vec![conv(2, 1, 1, 0), Layer::MaxPool2d { size: kernel, stride }],
            vec![conv(2, 1, 1, 0), Layer::AvgPool2d { size: kernel, stride }],
            vec![conv(3, 2, 1, 1), Layer::GlobalAvgPool],
            vec![Layer::Flatten, linear(5), act(Activation::Relu)],
            vec![Layer::Flatten, linear(5), act(Activation::LeakyRelu { slope: 0.1 })],
            vec![Layer::Flatten, linear(5), act(Activation::Gelu)],
            vec![Layer::Flatten, linear(5), act(Activation::Tanh), linear(3), act(Activation::Sigmoid)],
            vec![Layer::Flatten, linear(6), Layer::Dropout { rate: 0.3 }, Layer::LayerNorm { eps: 1e-3 }],
            vec![Layer::Residual { layers: vec![conv(channels, 3, 1, 1), act(Activation::Tanh)] }],
        ];
        for layers in cases {
            check_slope(&image, layers, rows, salt)?;
        }
    }

    #[test]
    fn a_batchs_gradient_is_the_tree_sum_of_its_partitions(
        sizes in prop::collection::vec(0usize..5, 1..9), lo in 0u32..5, salt in any::<u64>(), threads in 1usize..5,
    ) {
        let layers = vec![
            conv(5, 3, 1, 1), Layer::BatchNorm { momentum: 0.1, eps: 1e-5 }, act(Activation::Relu),
            Layer::MaxPool2d { size: 2, stride: 2 },
            Layer::Residual { layers: vec![conv(5, 3, 1, 1), act(Activation::Gelu)] },
            Layer::Flatten, linear(96), Layer::LayerNorm { eps: 1e-5 }, act(Activation::Tanh),
            Layer::Dropout { rate: 0.4 }, linear(4),
        ];
        let shape = [2, 6, 8];
        let model = Model::build(&Spec::Layers { layers }, &shape, 4).expect("the model fits");
        let loss = Loss::new(&LossKind::CrossEntropy { label_smoothing: 0.1, class_weights: None }, 4).expect("it fits");
        let rows: usize = sizes.iter().sum();
        let labels = |n: usize| Targets::Class((0..n as u32).map(|i| i % 4).collect());
        let all = batch(&shape, rows, labels(rows), salt);
        let mut starts = vec![0];
        sizes.iter().for_each(|n| starts.push(starts[starts.len() - 1] + n));
        let weights = params(&model, salt);
        let key = Key::new(salt, Purpose::Dropout);
        let run = |batch: &Batch, segments: &Segments, threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| {
                let mut grads = vec![f32::NAN; weights.len()];
                let mut workspace = Workspace::new(&model, rows.max(1), sizes.len());
                let sums = gradient(&model, &loss, &weights, batch, segments, key, &mut workspace, &mut grads);
                (sums, grads)
            })
        };
        let whole = run(&all, &Segments { lo, starts: starts.clone() }, threads);
        let alone = |i: usize| {
            let inputs = all.inputs[starts[i] * 96..starts[i + 1] * 96].to_vec();
            let Targets::Class(labels) = &all.targets else { panic!("labels") };
            let targets = Targets::Class(labels[starts[i]..starts[i + 1]].to_vec());
            let part = Batch { inputs, targets, samples: sizes[i] };
            run(&part, &Segments { lo: lo + i as u32, starts: vec![0, sizes[i]] }, 1)
        };
        fn tree(node: Node, leaf: &impl Fn(usize) -> Vec<f32>) -> Vec<f32> {
            match node.children() {
                None => leaf(node.lo as usize),
                Some((l, r)) => tree(l, leaf).iter().zip(tree(r, leaf)).map(|(a, b)| a + b).collect(),
            }
        }
        let parts = tree(Node::root(sizes.len() as u32), &|i| alone(i).1);
        for (i, (a, b)) in whole.1.iter().zip(&parts).enumerate() {
            prop_assert_eq!(a.to_bits(), b.to_bits(), "value {} of {:?}", i, model.layout().tensor_at(i).map(|t| &t.name));
        }
        prop_assert_eq!(whole.0.samples as usize, rows);
    }
}
