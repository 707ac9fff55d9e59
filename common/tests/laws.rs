//! What every layer and loss must keep: they are what their oracles are, their gradients are the slopes of those, and a
//! batch's gradient is the tree sum of its partitions' gradients, to the last bit, on any number of threads.

mod oracle;

use oracle::{Oracle, Tensors};
use proptest::prelude::*;
use unisono_common::data::{Batch, Targets};
use unisono_common::job::{Activation, Layer, Loss as LossKind, Model as Spec};
use unisono_common::layers::Segments;
use unisono_common::layout::{CHUNK, Role};
use unisono_common::loss::Loss;
use unisono_common::model::Model;
use unisono_common::rng::{Key, Purpose};
use unisono_common::train::{Final, Workspace, gradient};
use unisono_common::tree::Node;

/// What f32 leaves of a gradient: a share of its tensor's largest value, and of a tenth of the model's (that of a bias before
/// batch-norm is 0 but for the rounding of others).
const TOLERANCE: f64 = 1e-4;

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

/// Outputs and gradients of `layers` and a last linear layer, against the oracle's outputs and slopes.
fn check(shape: &[usize], layers: Vec<Layer>, kind: &LossKind, rows: usize, salt: u64) -> Result<(), TestCaseError> {
    // A layer before those that are looked at: its gradients show that theirs for their inputs are right.
    let before = vec![Layer::Residual { layers: vec![Layer::LayerNorm { eps: 1e-3 }] }];
    let outputs = if matches!(kind, LossKind::CrossEntropy { .. }) { 4 } else { 1 };
    let layers = [before, layers, vec![Layer::Flatten, linear(outputs)]].concat();
    let model = Model::build(&Spec::Layers { layers: layers.clone() }, shape, outputs).expect("the model fits");
    let loss = Loss::new(kind, outputs).expect("it fits");
    let random = Key::new(salt, Purpose::Synthetic).with(9);
    let targets = match kind {
        LossKind::CrossEntropy { .. } => Targets::Class((0..rows as u64).map(|i| random.below(i, 4) as u32).collect()),
        LossKind::BinaryCrossEntropy { .. } | LossKind::Hinge => {
            Targets::Class((0..rows as u64).map(|i| random.below(i, 2) as u32).collect())
        }
        _ => Targets::Value((0..rows as u64).map(|i| random.normal(i)).collect()),
    };
    let batch = batch(shape, rows, targets, salt);
    let segments = Segments { lo: 3, starts: vec![0, rows / 2, rows] };
    let weights = params(&model, salt);
    let oracle = Oracle { layers: &layers, shape, segments: &segments, key: random, margin: f64::INFINITY.into() };
    let expected = |tensors: &Tensors| -> f64 {
        let logits = oracle.forward(tensors, &batch.inputs);
        let losses = logits.iter().enumerate().map(|(row, x)| {
            let (loss, _, margin) = oracle::loss(kind, x, &batch.targets, row);
            oracle.margin.set(oracle.margin.get().min(margin));
            loss
        });
        losses.sum()
    };
    let mut tensors = oracle::tensors(&model, &weights);
    let want = expected(&tensors);
    prop_assume!(oracle.margin.get() > 1e-4);

    let mut grads = vec![0.0; weights.len()];
    let mut workspace = Workspace::new(&model, rows, 2);
    let sums = gradient(&model, &loss, &weights, &batch, &segments, random, &mut workspace, &mut grads, &mut |_, _| {});
    prop_assert!((sums.loss - want).abs() < TOLERANCE * (1.0 + want.abs()), "{layers:?}: {} {want}", sums.loss);
    let largest = |got: &[f32]| got.iter().fold(0.0f64, |m, g| m.max(g.abs() as f64));
    let floor = 0.1 * largest(&grads[..model.layout().trainable()]);
    for (tensor, range) in model.layout().tensors().filter(|(t, _)| t.role == Role::Trainable) {
        let got = &grads[range.clone()];
        let scale = largest(got).max(floor);
        // Some of the values, each by a central difference.
        for at in (0..8).map(|i| random.below(1000 + i, range.len() as u64) as usize) {
            let h = 1e-6;
            let mut moved = |by: f64| {
                let start = tensors[&tensor.name][at];
                tensors.get_mut(&tensor.name).expect("it is there")[at] = start + by;
                let loss = expected(&tensors);
                tensors.get_mut(&tensor.name).expect("it is there")[at] = start;
                loss
            };
            let slope = (moved(h) - moved(-h)) / (2.0 * h);
            let error = (got[at] as f64 - slope).abs() / scale.max(1e-3);
            prop_assert!(error < TOLERANCE, "{layers:?}, {}[{at}]: {error:e} of {slope}", tensor.name);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn every_layer_is_its_oracle_and_its_gradient_the_slope(
        (channels, height, width) in (1usize..4, 4usize..8, 4usize..8), rows in 2usize..6, salt in any::<u64>(),
        (kernel, stride, padding, filters) in (1usize..4, 1usize..4, 0usize..3, 1usize..4),
    ) {
        let padding = padding.min(kernel - 1);
        let image = [channels, height, width];
        let cases: Vec<Vec<Layer>> = vec![
            vec![conv(filters, kernel, stride, padding)],
            vec![conv(filters, kernel, stride, padding), Layer::BatchNorm { momentum: 0.1, eps: 1e-2 }],
            vec![conv(2, 1, 1, 0), Layer::MaxPool2d { size: kernel, stride }],
            vec![conv(2, 1, 1, 0), Layer::AvgPool2d { size: kernel, stride }],
            vec![conv(3, 2, 1, 1), Layer::GlobalAvgPool],
            vec![Layer::Flatten, linear(5), act(Activation::Relu)],
            vec![Layer::Flatten, linear(5), act(Activation::LeakyRelu { slope: 0.1 })],
            vec![Layer::Flatten, linear(5), act(Activation::Gelu)],
            vec![Layer::Flatten, linear(5), act(Activation::Tanh), linear(3), act(Activation::Sigmoid)],
            vec![Layer::Flatten, linear(6), Layer::Dropout { rate: 0.3 }, Layer::LayerNorm { eps: 1e-2 }],
            vec![Layer::Residual { layers: vec![conv(channels, 3, 1, 1), act(Activation::Tanh)] }],
        ];
        for layers in cases {
            check(&image, layers, &LossKind::Mse, rows, salt)?;
        }
    }

    #[test]
    fn every_loss_is_its_oracle_and_its_gradient_the_slope(
        features in 1usize..9, rows in 1usize..9, salt in any::<u64>(), knob in 0.1f32..3.0,
        class_weights in prop::collection::vec(0.1f32..3.0, 4),
    ) {
        for kind in [
            LossKind::CrossEntropy { label_smoothing: 0.0, class_weights: None },
            LossKind::CrossEntropy { label_smoothing: knob / 4.0, class_weights: Some(class_weights) },
            LossKind::BinaryCrossEntropy { positive_weight: knob },
            LossKind::Mse,
            LossKind::Mae,
            LossKind::Huber { delta: knob },
            LossKind::Hinge,
        ] {
            check(&[features], vec![], &kind, rows, salt)?;
        }
    }

    #[test]
    fn gradients_are_announced_once_from_the_last_to_the_first_and_stay(rows in 1usize..5, salt in any::<u64>()) {
        let norm = Layer::BatchNorm { momentum: 0.1, eps: 1e-5 };
        let inner = Layer::Residual { layers: vec![norm.clone(), conv(2, 3, 1, 1)] };
        let deep = vec![
            conv(2, 3, 1, 1), norm.clone(), Layer::Residual { layers: vec![conv(2, 1, 1, 0), inner, act(Activation::Tanh)] },
            Layer::Flatten, Layer::Residual { layers: vec![] }, linear(6), Layer::LayerNorm { eps: 1e-5 }, linear(3),
        ];
        // A first layer of more than a chunk is announced in parts.
        let wide = vec![Layer::Flatten, linear(2 * CHUNK / 40), linear(3)];
        for layers in [deep, wide] {
            let parts = if layers.len() == 3 { 2 } else { 1 };
            let model = Model::build(&Spec::Layers { layers }, &[2, 4, 5], 3).expect("the model fits");
            let loss = Loss::new(&LossKind::CrossEntropy { label_smoothing: 0.0, class_weights: None }, 3).expect("it fits");
            let batch = batch(&[2, 4, 5], rows, Targets::Class(vec![1; rows]), salt);
            let (weights, segments) = (params(&model, salt), Segments { lo: 0, starts: vec![0, rows / 2, rows] });
            let mut grads = vec![f32::NAN; weights.len()];
            let mut workspace = Workspace::new(&model, rows, 2);
            let (mut starts, mut announced) = (Vec::new(), vec![f32::NAN; model.layout().trainable()]);
            let mut keep = |from: usize, Final { values, .. }: Final<'_>| {
                starts.push(from);
                announced[from..from + values.len()].copy_from_slice(values);
            };
            let key = Key::new(salt, Purpose::Dropout);
            gradient(&model, &loss, &weights, &batch, &segments, key, &mut workspace, &mut grads, &mut keep);
            prop_assert!(starts.is_sorted_by(|a, b| a > b), "{:?}", starts);
            // What every layer with parameters begins with.
            let mut layers = model.layout().tensors().filter(|(t, _)| t.name.ends_with("weight")).map(|(_, r)| r);
            prop_assert!(layers.all(|weight| starts.contains(&weight.start)), "{:?}", starts);
            let first = model.layout().tensors().next().expect("it has parameters").1;
            prop_assert!(starts.iter().filter(|start| first.contains(start)).count() >= parts, "{:?}", starts);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&announced), bits(&grads[..announced.len()]));
        }
    }

    #[test]
    fn a_batchs_gradient_is_the_tree_sum_of_its_partitions(
        sizes in prop::collection::vec(0usize..20, 1..9), lo in 0u32..5, salt in any::<u64>(), threads in 1usize..5,
    ) {
        let layers = vec![
            conv(5, 3, 1, 1), Layer::BatchNorm { momentum: 0.1, eps: 1e-5 }, act(Activation::Relu),
            Layer::MaxPool2d { size: 2, stride: 2 },
            Layer::Residual { layers: vec![conv(5, 3, 1, 1), act(Activation::Gelu)] },
            // Few channels and many, by minimal filtering and not.
            conv(16, 1, 1, 0), conv(64, 3, 1, 0), act(Activation::Relu), conv(80, 3, 1, 1), conv(410, 1, 1, 0),
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
                let sums = gradient(&model, &loss, &weights, batch, segments, key, &mut workspace, &mut grads, &mut |_, _| {});
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
