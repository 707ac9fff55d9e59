//! The named kinds of models, as the layers that they are short for.

use super::{Signature, product};
use crate::job::{
    Activation, Deep, FeedForward, Gpt, Interaction, Join, Layer, Model, Norm, PositionKind, ROW_BOUND, RowInit,
    WeightInit,
};

fn linear(units: usize) -> Layer {
    Layer::Linear { units, bias: true, init: None }
}

/// Hidden layers.
fn mlp(hidden: &[usize], dropout: f32) -> Vec<Layer> {
    let mut layers = Vec::new();
    for &units in hidden {
        layers.extend([linear(units), Layer::Activation { activation: Activation::Relu }]);
        layers.extend((dropout > 0.0).then_some(Layer::Dropout { rate: dropout }));
    }
    layers
}

fn sum(branches: Vec<Vec<Layer>>) -> Layer {
    Layer::Parallel { join: Join::Sum, branches }
}

fn lookup(width: usize) -> Layer {
    Layer::Lookup { width, init: RowInit::Uniform { bound: ROW_BOUND } }
}

/// The ids' vectors, and behind them the numbers.
fn vectors(width: usize) -> Layer {
    Layer::Parallel { join: Join::Concat, branches: vec![vec![lookup(width)], vec![]] }
}

/// A linear function of the numbers, and a value for each id, as branches to be added up.
fn wide(outputs: usize) -> Vec<Vec<Layer>> {
    vec![vec![linear(outputs)], vec![Layer::Lookup { width: outputs, init: RowInit::Zeros }, Layer::Sum]]
}

/// A model's layers, and the shape of what they take.
pub fn layers(spec: &Model, signature: &Signature) -> (Vec<Layer>, Vec<usize>) {
    let Signature { input, output, .. } = signature;
    let outputs = output[output.len() - 1];
    let row = vec![product(input)];
    match spec {
        Model::Linear => (vec![linear(outputs)], row),
        Model::Mlp { hidden, activation, dropout } => {
            let mut layers = Vec::new();
            for &units in hidden {
                layers.extend([linear(units), Layer::Activation { activation: *activation }]);
                layers.extend((*dropout > 0.0).then_some(Layer::Dropout { rate: *dropout }));
            }
            layers.push(linear(outputs));
            (layers, row)
        }
        Model::Gpt(gpt) => (gpt_layers(gpt, outputs), input.clone()),
        Model::TextClassifier { width, hidden, dropout } => {
            // Small, so that what was hardly seen says hardly anything.
            let init = Some(WeightInit::Normal { std: 0.02 });
            let mut layers = vec![Layer::EmbeddingBag { width: *width, init }];
            layers.extend((*dropout > 0.0).then_some(Layer::Dropout { rate: *dropout }));
            layers.extend(mlp(hidden, *dropout));
            layers.push(linear(outputs));
            (layers, input.clone())
        }
        Model::Logistic => (vec![sum(wide(outputs))], row),
        Model::MatrixFactorization { width } => {
            let machine = vec![lookup(*width), Layer::FactorizationMachine { width: *width }];
            (vec![sum([wide(outputs), vec![machine]].concat())], row)
        }
        Model::WideDeep(deep) => {
            let mlp = [vec![vectors(deep.width)], mlp(&deep.hidden, deep.dropout), vec![linear(outputs)]].concat();
            (vec![sum([wide(outputs), vec![mlp]].concat())], row)
        }
        Model::DeepFm(Deep { width, hidden, dropout }) => {
            // Both parts learn the same vectors.
            let machine = vec![
                Layer::Slice { from: 0, len: signature.ids * width },
                Layer::FactorizationMachine { width: *width },
            ];
            let mlp = [mlp(hidden, *dropout), vec![linear(outputs)]].concat();
            let both = vec![vectors(*width), sum(vec![machine, mlp])];
            (vec![sum([wide(outputs), vec![both]].concat())], row)
        }
        Model::Dlrm { width, bottom, top, interaction } => {
            let numbers = [mlp(bottom, 0.0), vec![linear(*width)]].concat();
            let branches = vec![numbers, vec![lookup(*width)]];
            let mut layers = vec![Layer::Parallel { join: Join::Concat, branches }];
            layers.extend((*interaction == Interaction::Dot).then_some(Layer::DotInteraction { width: *width }));
            layers.extend(mlp(top, 0.0));
            layers.push(linear(outputs));
            (layers, row)
        }
        Model::Resnet { depth, width } => (resnet_layers((depth - 2) / 6, *width, outputs), input.clone()),
        Model::Layers { layers } => (layers.clone(), input.clone()),
    }
}

/// Three stages of `blocks` blocks. Where a stage begins with a stride or more filters, its shortcut is a convolution with
/// batch-norm ("option B" of He et al., 2016, section 3.3); weights begin as in He et al., 2015.
fn resnet_layers(blocks: usize, width: usize, classes: usize) -> Vec<Layer> {
    let relu = || Layer::Activation { activation: Activation::Relu };
    let normed = |filters, kernel, stride| {
        let (padding, init) = (kernel / 2, Some(WeightInit::KaimingNormal));
        let conv = Layer::Conv2d { filters, kernel, stride, padding, groups: 1, bias: false, init };
        [conv, Layer::BatchNorm { momentum: 0.1, eps: 1e-5 }]
    };
    let mut layers = normed(width, 3, 1).to_vec();
    layers.push(relu());
    for (stage, block) in (0..3).flat_map(|stage| (0..blocks).map(move |block| (stage, block))) {
        let (filters, first) = (width << stage, stage > 0 && block == 0);
        let stride = if first { 2 } else { 1 };
        let [conv, norm] = normed(filters, 3, stride);
        let body = [conv, norm, relu()].into_iter().chain(normed(filters, 3, 1)).collect();
        let shortcut = if first { normed(filters, 1, stride).to_vec() } else { vec![] };
        layers.extend([Layer::Residual { layers: body, shortcut }, relu()]);
    }
    layers.extend([Layer::GlobalAvgPool, linear(classes)]);
    layers
}

/// Weights begin as GPT-2's do: normal with deviation 0.02, and smaller by the root of their number for those whose outputs
/// are added up along the blocks (Radford et al., 2019, section 2.3).
fn gpt_layers(gpt: &Gpt, vocabulary: usize) -> Vec<Layer> {
    let &Gpt { layers, heads, width, hidden, bias, .. } = gpt;
    let init = |std| Some(WeightInit::Normal { std });
    let (plain, added) = (init(0.02), init(0.02 / libm::sqrtf(2.0 * layers as f32)));
    let norm = || match gpt.norm {
        Norm::LayerNorm => Layer::LayerNorm { dims: Some(1), eps: 1e-5 },
        Norm::RmsNorm => Layer::RmsNorm { dims: Some(1), eps: 1e-5 },
    };
    let dropout = || (gpt.dropout > 0.0).then_some(Layer::Dropout { rate: gpt.dropout });
    let rotary = (gpt.positions == PositionKind::Rotary).then_some(10_000.0);
    let linear = |units, init| Layer::Linear { units, bias, init };
    let mut body = Vec::new();
    body.extend(rotary.is_none().then_some(Layer::Positions { init: plain }));
    body.extend(dropout());
    for _ in 0..layers {
        let attention = Layer::Attention { heads, causal: true, rotary };
        let attention = [norm(), linear(3 * width, plain), attention, linear(width, added)];
        let (inner, between) = match gpt.feed_forward {
            FeedForward::Gelu => (hidden, Layer::Activation { activation: Activation::Gelu }),
            FeedForward::Swiglu => (2 * hidden, Layer::Swiglu),
        };
        let feed_forward = [norm(), linear(inner, plain), between, linear(width, added)];
        for part in [attention, feed_forward] {
            body.push(Layer::Residual { layers: part.into_iter().chain(dropout()).collect(), shortcut: vec![] });
        }
    }
    body.push(norm());
    if gpt.tie {
        return vec![Layer::TiedEmbedding { width, init: plain, layers: body }];
    }
    let head = Layer::Linear { units: vocabulary, bias: false, init: plain };
    [Layer::Embedding { width, init: plain }].into_iter().chain(body).chain([head]).collect()
}
