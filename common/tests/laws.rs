//! What every layer and loss must keep: they are what their oracles are, their gradients are the slopes of those, and a
//! batch's gradient is the tree sum of its partitions' gradients, to the last bit, on any number of threads.

mod oracle;

use oracle::{Oracle, Tensors};
use proptest::prelude::*;
use unisono_common::data::{Batch, Targets};
use unisono_common::job::{Activation, Join, Layer, Loss as LossKind, Model as Spec, RowInit};
use unisono_common::layers::Segments;
use unisono_common::layout::{CHUNK, Role};
use unisono_common::loss::{Loss, LossSums};
use unisono_common::model::{Model, Signature};
use unisono_common::rng::{Key, Purpose};
use unisono_common::rows::{NO_ID, sums::RowSums};
use unisono_common::train::{Final, Workspace, gradient};
use unisono_common::tree::Node;

/// What f32 leaves of a gradient: a share of its tensor's largest value, and of a tenth of the model's (that of a bias before
/// batch-norm is 0 but for the rounding of others).
const TOLERANCE: f64 = 1e-4;

fn linear(units: usize) -> Layer {
    Layer::Linear { units, bias: true, init: None }
}

fn conv(filters: usize, kernel: usize, stride: usize, padding: usize) -> Layer {
    grouped(1, filters, kernel, stride, padding)
}

fn grouped(groups: usize, filters: usize, kernel: usize, stride: usize, padding: usize) -> Layer {
    Layer::Conv2d { filters, kernel, stride, padding, groups, bias: true, init: None }
}

fn act(activation: Activation) -> Layer {
    Layer::Activation { activation }
}

fn batch(shape: &[usize], samples: usize, targets: Targets, salt: u64) -> Batch {
    let key = Key::new(salt, Purpose::Synthetic);
    let n = samples * shape.iter().product::<usize>();
    Batch { inputs: (0..n as u64).map(|i| key.normal(i)).collect(), targets, samples, ..Batch::empty() }
}

/// Parameters around their first values, so that scales are not all 1 and shifts not all 0.
fn params(model: &Model, salt: u64) -> Vec<f32> {
    let key = Key::new(salt, Purpose::Init).with(77);
    let trainable = model.layout().trainable() as u64;
    let mut values = model.layout().init(salt);
    (0..trainable).for_each(|i| values[i as usize] += 0.1 * key.normal(i));
    values
}

/// Targets of any kind that `loss` can take.
fn targets(kind: &LossKind, count: usize, classes: u64, salt: u64) -> Targets {
    let random = Key::new(salt, Purpose::Synthetic).with(9);
    let below = |n: u64| Targets::Class((0..count as u64).map(|i| random.below(i, n) as u32).collect());
    match kind {
        LossKind::CrossEntropy { .. } => below(classes),
        LossKind::BinaryCrossEntropy { .. } | LossKind::Hinge { .. } | LossKind::Focal { .. } => below(2),
        _ => Targets::Value((0..count as u64).map(|i| random.normal(i)).collect()),
    }
}

/// Outputs and gradients of `layers` and a last linear layer, against the oracle's outputs and slopes.
fn check(shape: &[usize], layers: Vec<Layer>, kind: &LossKind, rows: usize, salt: u64) -> Result<(), TestCaseError> {
    // A layer before those that are looked at: its gradients show that theirs for their inputs are right.
    let before = vec![Layer::Residual { layers: vec![Layer::LayerNorm { dims: None, eps: 1e-3 }], shortcut: vec![] }];
    let outputs = if matches!(kind, LossKind::CrossEntropy { .. }) { 4 } else { 1 };
    let layers = [before, layers, vec![Layer::Flatten, linear(outputs)]].concat();
    let random = Key::new(salt, Purpose::Synthetic).with(8);
    let mut batch = batch(shape, rows, targets(kind, rows, 4, salt), salt);
    if salt.is_multiple_of(2) {
        batch.weights = (0..rows as u64).map(|i| 3.0 * random.uniform(i)).collect();
    }
    agree(layers, &Signature::new(shape, outputs), kind, &batch, salt)
}

/// The same of tokens, each of which has a target; `layers` are all.
fn check_tokens(layers: Vec<Layer>, positions: usize, rows: usize, salt: u64) -> Result<(), TestCaseError> {
    let (vocabulary, key) = (7, Key::new(salt, Purpose::Synthetic));
    let signature = Signature {
        ids: 0,
        input: vec![positions],
        vocabulary: Some(vocabulary),
        output: vec![positions, vocabulary],
        causal: false,
    };
    let kind = LossKind::CrossEntropy { label_smoothing: 0.0, class_weights: None };
    let inputs = (0..(rows * positions) as u64).map(|i| key.below(i, vocabulary as u64) as f32).collect();
    let targets = targets(&kind, rows * positions, vocabulary as u64, salt);
    agree(layers, &signature, &kind, &Batch { inputs, targets, samples: rows, ..Batch::empty() }, salt)
}

/// A model against the oracle.
fn agree(
    layers: Vec<Layer>,
    signature: &Signature,
    kind: &LossKind,
    batch: &Batch,
    salt: u64,
) -> Result<(), TestCaseError> {
    let model = Model::build(&Spec::Layers { layers: layers.clone() }, signature).expect("the model fits");
    let loss = Loss::new(kind, model.outputs()).expect("it fits");
    let random = Key::new(salt, Purpose::Synthetic).with(9);
    let rows = batch.samples;
    let segments = Segments { lo: 3, starts: vec![0, rows / 2, rows] };
    let weights = params(&model, salt);
    let (shape, margin) = (&signature.input[..], f64::INFINITY.into());
    let places = batch.lookups.places();
    let oracle =
        Oracle { layers: &layers, shape, segments: &segments, places, factors: &batch.factors, key: random, margin };
    let expected = |tensors: &Tensors| -> f64 {
        let logits = oracle.forward(tensors, &batch.inputs);
        let losses = logits.iter().flat_map(|x| x.chunks(model.outputs())).enumerate().map(|(row, x)| {
            let (loss, _, margin) = oracle::loss(kind, x, &batch.targets, row);
            oracle.margin.set(oracle.margin.get().min(margin));
            loss * batch.weights.get(row).map_or(1.0, |weight| *weight as f64)
        });
        losses.sum()
    };
    let mut tensors = oracle::tensors(&model, &weights);
    let width = model.rows().width();
    let of_table = |values: &[f32], at: usize, len: usize| -> Vec<f32> {
        values.chunks(width.max(1)).flat_map(|row| row[at..at + len].to_vec()).collect()
    };
    for (table, at) in model.rows().tables() {
        let values = of_table(&batch.rows, at, table.width).into_iter().map(|v| v as f64).collect();
        tensors.insert(table.name.clone(), values);
    }
    let want = expected(&tensors);
    prop_assume!(oracle.margin.get() > 1e-4);

    let mut grads = vec![0.0; weights.len()];
    let mut d_rows = vec![f32::NAN; batch.rows.len()];
    let mut workspace = Workspace::new(&model, rows, 2);
    let sums = gradient(
        &model,
        &loss,
        &weights,
        batch,
        &segments,
        random,
        &mut workspace,
        &mut grads,
        &mut d_rows,
        &mut |_, _| {},
    );
    prop_assert_eq!(sums.samples as usize, rows);
    prop_assert!((sums.loss - want).abs() < TOLERANCE * (1.0 + want.abs()), "{layers:?}: {} {want}", sums.loss);
    let largest = |got: &[f32]| got.iter().fold(0.0f64, |m, g| m.max(g.abs() as f64));
    let floor = 0.1 * largest(&grads[..model.layout().trainable()]);
    let trained = model.layout().tensors().filter(|(t, _)| t.role == Role::Trainable);
    let dense = trained.map(|(tensor, range)| (tensor.name.clone(), grads[range].to_vec()));
    let of_rows = model.rows().tables().map(|(table, at)| (table.name.clone(), of_table(&d_rows, at, table.width)));
    for (name, got) in dense.chain(of_rows).filter(|(_, got)| !got.is_empty()) {
        let scale = largest(&got).max(floor);
        // Some of the values, each by a central difference.
        for at in (0..8).map(|i| random.below(1000 + i, got.len() as u64) as usize) {
            let h = 1e-6;
            let mut moved = |by: f64| {
                let start = tensors[&name][at];
                tensors.get_mut(&name).expect("it is there")[at] = start + by;
                let loss = expected(&tensors);
                tensors.get_mut(&name).expect("it is there")[at] = start;
                loss
            };
            let slope = (moved(h) - moved(-h)) / (2.0 * h);
            let error = (got[at] as f64 - slope).abs() / scale.max(1e-3);
            prop_assert!(error < TOLERANCE, "{layers:?}, {name}[{at}]: {error:e} of {slope}");
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
            // Depthwise, one filter a channel and several; then groups of several channels.
            vec![grouped(channels, channels, kernel, stride, padding), act(Activation::Relu)],
            vec![grouped(channels, channels * filters, kernel, stride, padding)],
            vec![conv(6, 1, 1, 0), grouped(1 + channels % 3, 6 * filters, kernel, stride, padding)],
            vec![conv(2, 1, 1, 0), Layer::MaxPool2d { size: kernel, stride }],
            vec![conv(2, 1, 1, 0), Layer::AvgPool2d { size: kernel, stride }],
            vec![conv(3, 2, 1, 1), Layer::GlobalAvgPool],
            vec![Layer::Flatten, linear(5), act(Activation::Relu)],
            vec![Layer::Flatten, linear(5), act(Activation::LeakyRelu { slope: 0.1 })],
            vec![Layer::Flatten, linear(5), act(Activation::Gelu)],
            vec![Layer::Flatten, linear(5), act(Activation::Tanh), linear(3), act(Activation::Sigmoid)],
            vec![Layer::Flatten, linear(6), Layer::Dropout { rate: 0.3 }, Layer::LayerNorm { dims: None, eps: 1e-2 }],
            vec![Layer::Residual { layers: vec![conv(channels, 3, 1, 1), act(Activation::Tanh)], shortcut: vec![] }],
            vec![Layer::Residual {
                layers: vec![conv(filters, 3, stride, 1), Layer::Dropout { rate: 0.3 }],
                shortcut: vec![conv(filters, 1, stride, 0), Layer::Dropout { rate: 0.3 }, act(Activation::Tanh)],
            }],
        ];
        for layers in cases {
            check(&image, layers, &LossKind::Mse, rows, salt)?;
        }
    }

    #[test]
    fn layers_of_sequences_are_their_oracles_and_their_gradients_the_slopes(
        positions in prop_oneof![1usize..9, 60usize..70, 125usize..132], heads in 1usize..4, half in prop_oneof![1usize..4, Just(8)],
        rows in 1usize..4, salt in any::<u64>(), causal in any::<bool>(), rotary in any::<bool>(), tied in any::<bool>(),
    ) {
        let width = heads * 2 * half;
        let attention = Layer::Attention { heads, causal, rotary: rotary.then_some(100.0) };
        let norm = Layer::LayerNorm { dims: Some(1), eps: 1e-2 };
        let of_blocks = vec![
            Layer::Positions { init: None },
            Layer::Residual { layers: vec![norm, linear(3 * width), attention, linear(width)], shortcut: vec![] },
            Layer::RmsNorm { dims: Some(1), eps: 1e-2 },
            linear(2 * width),
            Layer::Swiglu,
            act(Activation::Silu),
        ];
        let layers = if tied {
            vec![Layer::TiedEmbedding { width, init: None, layers: of_blocks }]
        } else {
            [vec![Layer::Embedding { width, init: None }], of_blocks, vec![linear(7)]].concat()
        };
        check_tokens(layers, positions, rows, salt)?;
    }

    #[test]
    fn a_bag_of_embeddings_is_its_oracle_and_its_gradient_the_slope(
        positions in 1usize..20, width in 1usize..40, rows in 1usize..6, salt in any::<u64>(),
    ) {
        let key = Key::new(salt, Purpose::Synthetic);
        // Many of them are none, so that some samples have no tokens at all.
        let token = |i: u64| key.below(2 * i, 7) as f32 * key.below(2 * i + 1, 2) as f32;
        let inputs = (0..(rows * positions) as u64).map(token).collect();
        let kind = LossKind::CrossEntropy { label_smoothing: 0.0, class_weights: None };
        let batch = Batch { inputs, targets: targets(&kind, rows, 4, salt), samples: rows, ..Batch::empty() };
        let signature = Signature { ids: 0, input: vec![positions], vocabulary: Some(7), output: vec![4], causal: false };
        agree(vec![Layer::EmbeddingBag { width, init: None }, linear(4)], &signature, &kind, &batch, salt)?;
    }

    #[test]
    fn layers_over_ids_are_their_oracles_and_their_gradients_the_slopes(
        ids in 2usize..6, width in 1usize..20, rows in 1usize..9, salt in any::<u64>(), numbers in 1usize..4,
        factors in any::<bool>(),
    ) {
        let key = Key::new(salt, Purpose::Synthetic);
        let lookup = |width| Layer::Lookup { width, init: RowInit::Normal { std: 1.0 } };
        let join = |join, branches| Layer::Parallel { join, branches };
        // Two tables, of which one is looked up through a layer that needs its input's slope.
        let before = vec![linear(width), act(Activation::Tanh)];
        let vectors = join(Join::Concat, vec![before, vec![lookup(width)]]);
        let machine = vec![Layer::Slice { from: width, len: ids * width }, Layer::FactorizationMachine { width }];
        let dots = vec![Layer::DotInteraction { width }, linear(1)];
        let deep = vec![vectors, join(Join::Sum, vec![machine, dots, vec![Layer::Dropout { rate: 0.2 }, linear(1)]])];
        let layers = vec![join(Join::Sum, vec![deep, vec![lookup(1), Layer::Sum], vec![linear(1)]])];
        let id = |i: u64| match key.below(2 * i, 6) {
            0 => NO_ID,
            n => n * key.below(2 * i + 1, 3),
        };
        let mut batch = batch(&[numbers], rows, targets(&LossKind::Mse, rows, 1, salt), salt);
        batch.ids = (0..(rows * ids) as u64).map(id).collect();
        if factors {
            batch.factors = (0..(rows * ids) as u64).map(|i| key.with(5).normal(i)).collect();
        }
        batch.look_up();
        let signature = Signature { ids, ..Signature::new(&[numbers], 1) };
        let model = Model::build(&Spec::Layers { layers: layers.clone() }, &signature).expect("the model fits");
        prop_assert_eq!(model.rows().width(), width + 1);
        batch.put_rows(&model.rows().first(salt), width + 1);
        agree(layers, &signature, &LossKind::Mse, &batch, salt)?;
    }

    #[test]
    fn every_loss_is_its_oracle_and_its_gradient_the_slope(
        features in 1usize..9, rows in 1usize..9, salt in any::<u64>(), knob in 0.1f32..3.0,
        class_weights in prop::collection::vec(0.1f32..3.0, 4),
    ) {
        for kind in [
            LossKind::CrossEntropy { label_smoothing: 0.0, class_weights: None },
            LossKind::CrossEntropy { label_smoothing: knob / 4.0, class_weights: Some(class_weights.clone()) },
            LossKind::BinaryCrossEntropy { positive_weight: knob },
            LossKind::Mse,
            LossKind::Mae,
            LossKind::Huber { delta: knob },
            LossKind::Hinge { class_weights: None },
            LossKind::Hinge { class_weights: Some(class_weights[..2].into()) },
            LossKind::Focal { gamma: knob, class_weights: None },
            LossKind::Focal { gamma: knob, class_weights: Some(class_weights[..2].into()) },
        ] {
            check(&[features], vec![], &kind, rows, salt)?;
        }
    }

    #[test]
    fn gradients_are_announced_once_from_the_last_to_the_first_and_stay(rows in 1usize..5, salt in any::<u64>()) {
        let norm = Layer::BatchNorm { momentum: 0.1, eps: 1e-5 };
        let inner = Layer::Residual { layers: vec![norm.clone(), conv(2, 3, 1, 1)], shortcut: vec![] };
        let deep = vec![
            conv(2, 3, 1, 1), norm.clone(), Layer::Residual { layers: vec![conv(2, 1, 1, 0), inner, act(Activation::Tanh)], shortcut: vec![] },
            Layer::Flatten, Layer::Residual { layers: vec![], shortcut: vec![] }, linear(6), Layer::LayerNorm { dims: None, eps: 1e-5 }, linear(3),
        ];
        let around = vec![Layer::Residual { layers: vec![conv(3, 3, 2, 1), norm.clone()], shortcut: vec![conv(3, 1, 2, 0), norm] },
            Layer::Flatten, linear(3)];
        // A first layer of more than a chunk is announced in parts.
        let wide = vec![Layer::Flatten, linear(2 * CHUNK / 40), linear(3)];
        let tied = vec![Layer::TiedEmbedding { width: 6, init: None, layers: vec![Layer::Positions { init: None }, linear(6)] }];
        let images = Signature::new(&[2, 4, 5], 3);
        let tokens = Signature { ids: 0, input: vec![40], vocabulary: Some(3), output: vec![40, 3], causal: false };
        for (layers, parts, signature) in [(deep, 1, &images), (around, 1, &images), (wide, 2, &images), (tied, 1, &tokens)] {
            let model = Model::build(&Spec::Layers { layers }, signature).expect("the model fits");
            let loss = Loss::new(&LossKind::CrossEntropy { label_smoothing: 0.0, class_weights: None }, 3).expect("it fits");
            let mut batch = batch(&signature.input, rows, Targets::Class(vec![1; rows * model.targets()]), salt);
            if signature.vocabulary.is_some() {
                batch.inputs.iter_mut().for_each(|x| *x = x.abs().min(2.0).floor());
            }
            let (weights, segments) = (params(&model, salt), Segments { lo: 0, starts: vec![0, rows / 2, rows] });
            let mut grads = vec![f32::NAN; weights.len()];
            let mut workspace = Workspace::new(&model, rows, 2);
            let (mut starts, mut announced) = (Vec::new(), vec![f32::NAN; model.layout().trainable()]);
            let mut keep = |part: Final<'_>, _: LossSums| {
                let Final::From(from, values) = part else { return };
                starts.push(from);
                announced[from..from + values.len()].copy_from_slice(values);
            };
            let key = Key::new(salt, Purpose::Dropout);
            gradient(&model, &loss, &weights, &batch, &segments, key, &mut workspace, &mut grads, &mut [], &mut keep);
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
    fn rows_are_announced_once_and_before_the_layer_above_their_tables(rows in 1usize..5, salt in any::<u64>()) {
        let lookup = |width| vec![Layer::Lookup { width, init: RowInit::Normal { std: 1.0 } }];
        let join = |join, branches| Layer::Parallel { join, branches };
        let (concat, sum) = (Join::Concat, Join::Sum);
        let above = || vec![linear(6), act(Activation::Relu), linear(3)];
        let both = join(concat, vec![vec![linear(4)], lookup(4), [lookup(2), vec![Layer::Sum]].concat()]);
        let dots = vec![join(concat, vec![vec![linear(4)], lookup(4)]), Layer::DotInteraction { width: 4 }];
        let branch = [vec![join(concat, vec![vec![linear(4)], lookup(4)])], above()].concat();
        // Of each the weights that the rows come before, and how many tensors with weights come before the rows.
        let kinds = [
            ([vec![both], above()].concat(), "1.weight", 1),
            ([dots, above()].concat(), "2.weight", 1),
            ([lookup(4), vec![Layer::Sum], above()].concat(), "2.weight", 1),
            // Gradients are announced from the last to the first: those of a branch behind the table, and so of all above it, come first.
            ([vec![join(concat, vec![lookup(4), vec![linear(4)]])], above()].concat(), "", 3),
            (vec![join(sum, vec![branch.clone(), vec![linear(3)]])], "0.0.1.weight", 2),
            // A chain whose inputs' gradient somebody wants does not wait.
            (vec![linear(2), join(sum, vec![branch, vec![linear(3)]])], "1.0.0.0.0.weight", 3),
        ];
        for (layers, before, count) in kinds {
            let signature = Signature { ids: 2, ..Signature::new(&[2], 3) };
            let model = Model::build(&Spec::Layers { layers }, &signature).expect("the model fits");
            let loss = Loss::new(&LossKind::CrossEntropy { label_smoothing: 0.0, class_weights: None }, 3).expect("it fits");
            let mut batch = batch(&[2], rows, Targets::Class(vec![1; rows]), salt);
            batch.ids = (0..2 * rows as u64).map(|i| i % 3).collect();
            batch.look_up();
            batch.put_rows(&model.rows().first(salt), model.rows().width());
            let (weights, segments) = (params(&model, salt), Segments::one(rows));
            let (mut grads, mut d_rows) = (vec![f32::NAN; weights.len()], vec![f32::NAN; batch.rows.len()]);
            let mut said = Vec::new();
            let mut keep = |part: Final<'_>, _: LossSums| said.push(match part {
                Final::From(from, _) => model.layout().tensor_at(from).map(|t| t.name.clone()),
                Final::Rows => None,
            });
            let (key, mut workspace) = (Key::new(salt, Purpose::Dropout), Workspace::new(&model, rows, 1));
            workspace.rows_first = true;
            gradient(&model, &loss, &weights, &batch, &segments, key, &mut workspace, &mut grads, &mut d_rows, &mut keep);
            let mut of_rows = (0..said.len()).filter(|i| said[*i].is_none());
            let (at, again) = (of_rows.next().expect("they are announced"), of_rows.next());
            let next = said[at + 1..].iter().flatten().find(|name| name.ends_with("weight"));
            let weights_of = said[..at].iter().flatten().filter(|name| name.ends_with("weight")).count();
            prop_assert_eq!((again, next.map_or("", |name| name.as_str()), weights_of), (None, before, count), "{:?}", said);
        }
    }

    #[test]
    fn a_batchs_gradient_is_the_tree_sum_of_its_partitions(
        sizes in prop::collection::vec(0usize..20, 1..9), lo in 0u32..5, salt in any::<u64>(), threads in 1usize..5,
    ) {
        let images = vec![
            conv(5, 3, 1, 1), Layer::BatchNorm { momentum: 0.1, eps: 1e-5 }, act(Activation::Relu),
            Layer::MaxPool2d { size: 2, stride: 2 },
            Layer::Residual { layers: vec![conv(5, 3, 1, 1), act(Activation::Gelu)], shortcut: vec![] },
            // Few channels and many, by minimal filtering and not.
            conv(16, 1, 1, 0), conv(64, 3, 1, 0), act(Activation::Relu), conv(80, 3, 1, 1), conv(410, 1, 1, 0),
            grouped(5, 10, 3, 2, 1), act(Activation::Relu), grouped(10, 30, 3, 1, 1), grouped(30, 30, 3, 1, 1),
            Layer::Residual {
                layers: vec![conv(20, 3, 2, 1), act(Activation::Relu)],
                shortcut: vec![conv(20, 1, 2, 0), Layer::BatchNorm { momentum: 0.1, eps: 1e-5 }],
            },
            Layer::Flatten, linear(96), Layer::LayerNorm { dims: None, eps: 1e-5 }, act(Activation::Tanh),
            Layer::Dropout { rate: 0.4 }, linear(4),
        ];
        let norm = Layer::LayerNorm { dims: Some(1), eps: 1e-5 };
        let attention = Layer::Attention { heads: 2, causal: true, rotary: Some(1e4) };
        let inner = vec![
            Layer::Positions { init: None },
            Layer::Residual { layers: vec![norm, linear(36), attention, linear(12)], shortcut: vec![] },
            linear(400), Layer::Swiglu, Layer::RmsNorm { dims: Some(1), eps: 1e-5 }, Layer::Dropout { rate: 0.2 },
            linear(12),
        ];
        let tied = vec![Layer::TiedEmbedding { width: 12, init: None, layers: inner.clone() }];
        // A table of several blocks.
        let apart = [vec![Layer::Embedding { width: 12, init: None }], inner, vec![linear(4)]].concat();
        let tokens = |vocabulary, outputs| Signature { ids: 0, input: vec![5], vocabulary: Some(vocabulary), output: vec![5, outputs], causal: false };
        let of_images = Signature::new(&[2, 6, 8], 4);
        let bag = vec![Layer::EmbeddingBag { width: 12, init: None }, linear(4)];
        let of_texts = Signature { output: vec![4], ..tokens(40_000, 4) };
        let lookup = |width| Layer::Lookup { width, init: RowInit::Normal { std: 1.0 } };
        let both = vec![vec![linear(7)], vec![lookup(7)], vec![lookup(3), Layer::Sum]];
        let clicks = vec![Layer::Parallel { join: Join::Concat, branches: both }, linear(6), act(Activation::Relu), linear(4)];
        let of_clicks = Signature { ids: 3, ..Signature::new(&[2], 4) };
        of_parts_and_whole(clicks, &of_clicks, &sizes, lo, salt, threads)?;
        for (layers, signature) in [(bag, of_texts), (images, of_images), (tied, tokens(50, 50)), (apart, tokens(40_000, 4))] {
            of_parts_and_whole(layers, &signature, &sizes, lo, salt, threads)?;
        }
    }
}

/// A batch's gradient, and the tree sum of its partitions'.
fn of_parts_and_whole(
    layers: Vec<Layer>,
    signature: &Signature,
    sizes: &[usize],
    lo: u32,
    salt: u64,
    threads: usize,
) -> Result<(), TestCaseError> {
    let model = Model::build(&Spec::Layers { layers }, signature).expect("the model fits");
    let kind = LossKind::CrossEntropy { label_smoothing: 0.1, class_weights: None };
    let loss = Loss::new(&kind, model.outputs()).expect("it fits");
    let rows: usize = sizes.iter().sum();
    let (outputs, each) = (model.outputs() as u32, model.targets());
    let labels = Targets::Class((0..(rows * each) as u32).map(|i| i * 7 % outputs).collect());
    let mut all = batch(&signature.input, rows, labels, salt);
    if let Some(vocabulary) = signature.vocabulary {
        let key = Key::new(salt, Purpose::Synthetic);
        // Many of few tokens, and some of any.
        let below = |i: u64| if i.is_multiple_of(3) { vocabulary as u64 } else { 5 };
        all.inputs.iter_mut().zip(0..).for_each(|(x, i)| *x = key.below(i, below(i)) as f32);
    }
    let ids = signature.ids;
    let random = Key::new(salt, Purpose::Synthetic).with(3);
    all.ids = (0..(rows * ids) as u64).map(|i| random.below(2 * i, 1 + random.below(2 * i + 1, 100))).collect();
    if salt.is_multiple_of(2) {
        all.factors = (0..(rows * ids) as u64).map(|i| random.with(1).normal(i)).collect();
    }
    let width = model.rows().width();
    let ready = |mut batch: Batch| {
        batch.look_up();
        batch.put_rows(&model.rows().first(salt), width);
        batch
    };
    let all = ready(all);
    let mut starts = vec![0];
    sizes.iter().for_each(|n| starts.push(starts[starts.len() - 1] + n));
    let weights = params(&model, salt);
    let key = Key::new(salt, Purpose::Dropout);
    let run = |batch: &Batch, segments: &Segments, threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| {
            let mut grads = vec![f32::NAN; weights.len()];
            let mut d_rows = RowSums { keys: batch.lookups.keys().to_vec(), values: vec![f32::NAN; batch.rows.len()] };
            let mut workspace = Workspace::new(&model, rows.max(1), sizes.len());
            workspace.rows_first = segments.len() > 1;
            let sums = gradient(
                &model,
                &loss,
                &weights,
                batch,
                segments,
                key,
                &mut workspace,
                &mut grads,
                &mut d_rows.values,
                &mut |_, _| {},
            );
            (sums, grads, d_rows)
        })
    };
    let whole = run(&all, &Segments { lo, starts: starts.clone() }, threads);
    let alone = |i: usize| {
        let len = model.input_len();
        let inputs = all.inputs[starts[i] * len..starts[i + 1] * len].to_vec();
        let Targets::Class(labels) = &all.targets else { panic!("labels") };
        let targets = Targets::Class(labels[starts[i] * each..starts[i + 1] * each].to_vec());
        let ids = all.ids[starts[i] * ids..starts[i + 1] * ids].to_vec();
        let factors =
            all.factors.get(starts[i] * signature.ids..starts[i + 1] * signature.ids).map_or(vec![], Vec::from);
        let part = Batch { inputs, ids, factors, targets, samples: sizes[i], ..Batch::empty() };
        run(&ready(part), &Segments { lo: lo + i as u32, starts: vec![0, sizes[i]] }, 1)
    };
    fn tree<T>(node: Node, leaf: &impl Fn(usize) -> T, add: &impl Fn(T, T) -> T) -> T {
        match node.children() {
            None => leaf(node.lo as usize),
            Some((l, r)) => add(tree(l, leaf, add), tree(r, leaf, add)),
        }
    }
    let root = Node::root(sizes.len() as u32);
    let add = |a: Vec<f32>, b: Vec<f32>| a.iter().zip(b).map(|(a, b)| a + b).collect();
    let parts: Vec<f32> = tree(root, &|i| alone(i).1, &add);
    let rows_of_parts = tree(root, &|i| alone(i).2, &|a, b| RowSums::of_both(a.parts(), b.parts(), width));
    prop_assert_eq!(&rows_of_parts.keys, &whole.2.keys);
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    prop_assert_eq!(bits(&rows_of_parts.values), bits(&whole.2.values));
    for (i, (a, b)) in whole.1.iter().zip(&parts).enumerate() {
        prop_assert_eq!(a.to_bits(), b.to_bits(), "value {} of {:?}", i, model.layout().tensor_at(i).map(|t| &t.name));
    }
    prop_assert_eq!(whole.0.samples as usize, rows);
    Ok(())
}
