//! A step in the steady state allocates nothing: all memory is planned when the workspace is made.

use unisono_common::data::{Batch, Targets};
use unisono_common::job::{Activation, Layer, Loss as LossKind, Model as Spec};
use unisono_common::layers::Segments;
use unisono_common::loss::Loss;
use unisono_common::model::{Model, Signature};
use unisono_common::rng::{Key, Purpose};
use unisono_common::train::{Workspace, gradient};

#[test]
fn a_gradient_allocates_nothing_after_the_first() {
    let act = |activation| Layer::Activation { activation };
    let linear = |units| Layer::Linear { units, bias: true, init: None };
    let grouped =
        |groups, filters| Layer::Conv2d { filters, kernel: 3, stride: 1, padding: 1, groups, bias: true, init: None };
    let conv = |filters| grouped(1, filters);
    let layers = vec![
        conv(7),
        Layer::BatchNorm { momentum: 0.1, eps: 1e-5 },
        act(Activation::Gelu),
        Layer::MaxPool2d { size: 2, stride: 2 },
        Layer::Residual { layers: vec![conv(7), act(Activation::Relu)], shortcut: vec![] },
        grouped(7, 14),
        grouped(2, 8),
        Layer::Residual { layers: vec![conv(9)], shortcut: vec![grouped(1, 9), act(Activation::Relu)] },
        Layer::AvgPool2d { size: 2, stride: 1 },
        Layer::Flatten,
        linear(40),
        act(Activation::Gelu),
        Layer::LayerNorm { dims: None, eps: 1e-5 },
        act(Activation::Tanh),
        Layer::Dropout { rate: 0.3 },
        linear(10),
    ];
    let images = Signature::new(&[2, 10, 10], 10);
    let norm = Layer::LayerNorm { dims: Some(1), eps: 1e-5 };
    let attention = Layer::Attention { heads: 2, causal: true, rotary: Some(1e4) };
    let block = Layer::Residual {
        layers: vec![norm, linear(24), attention, linear(16), Layer::Swiglu, linear(8)],
        shortcut: vec![],
    };
    let sequences = vec![Layer::TiedEmbedding {
        width: 8,
        init: None,
        layers: vec![Layer::Positions { init: None }, block, Layer::RmsNorm { dims: Some(1), eps: 1e-5 }],
    }];
    let tokens = Signature { ids: 0, input: vec![70], vocabulary: Some(10), output: vec![70, 10], causal: false };
    for (layers, signature) in [(layers, images), (sequences, tokens)] {
        let counts = allocations(layers, &signature);
        assert_eq!(counts[1..], [0, 0], "allocations of three steps: {counts:?}");
    }
}

/// Of three steps, one after another.
fn allocations(layers: Vec<Layer>, signature: &Signature) -> [u64; 3] {
    let model = Model::build(&Spec::Layers { layers }, signature).expect("the model fits");
    let loss = Loss::new(&LossKind::CrossEntropy { label_smoothing: 0.1, class_weights: None }, 10).expect("it fits");
    let samples = 9;
    let key = Key::new(1, Purpose::Synthetic);
    let input = |i| if signature.vocabulary.is_some() { key.below(i, 10) as f32 } else { key.normal(i) };
    let batch = Batch {
        inputs: (0..(samples * model.input_len()) as u64).map(input).collect(),
        targets: Targets::Class((0..(samples * model.targets()) as u32).map(|i| i % 10).collect()),
        samples,
        ..Batch::empty()
    };
    // Partitions of several sizes, one of a single sample, one of none.
    let segments = Segments { lo: 4, starts: vec![0, 5, 6, 6, samples] };
    let params = model.layout().init(1);
    let mut grads = vec![0.0; params.len()];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    pool.install(|| {
        let mut workspace = Workspace::new(&model, samples, 4);
        [(); 3].map(|()| {
            let step = || {
                gradient(
                    &model,
                    &loss,
                    &params,
                    &batch,
                    &segments,
                    key,
                    &mut workspace,
                    &mut grads,
                    &mut [],
                    &mut |_, _| {},
                );
            };
            allocation_counter::measure(step).count_total
        })
    })
}
