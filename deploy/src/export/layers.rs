//! The job's layers as nodes of a graph: one function each, for samples with a batch before them.
//!
//! What each computes is said beside it in `common/src/layers`; that the model fits its data was checked when it was built.

use super::graph::{Graph, VALUES, Value, float, int, ints};
use super::proto::{AttributeProto, FLOAT};
use unisono_common::job::{Activation, Join, Layer};
use unisono_common::layers::Rotary;

/// Layers one after another; `path` is what comes before their numbers.
pub fn chain(g: &mut Graph<'_>, path: &str, layers: &[Layer], mut x: Value) -> Value {
    for (i, spec) in layers.iter().enumerate() {
        let y = layer(g, &format!("{path}{i}"), spec, &x);
        if y.name != x.name {
            g.note(&y);
        }
        x = y;
    }
    x
}

fn layer(g: &mut Graph<'_>, at: &str, spec: &Layer, x: &Value) -> Value {
    match spec {
        Layer::Linear { units, bias, init: _ } => linear(g, at, x, *units, *bias),
        Layer::Conv2d { filters, kernel, stride, padding, groups, bias, init: _ } => {
            let bias = bias.then(|| g.parameter(at, "bias"));
            conv2d(g, at, x, *filters, Window { size: *kernel, stride: *stride, padding: *padding }, *groups, bias)
        }
        Layer::MaxPool2d { size, stride } => {
            pool2d(g, at, x, "MaxPool", Window { size: *size, stride: *stride, padding: 0 })
        }
        Layer::AvgPool2d { size, stride } => {
            pool2d(g, at, x, "AveragePool", Window { size: *size, stride: *stride, padding: 0 })
        }
        Layer::GlobalAvgPool => global_avg_pool(g, at, x),
        Layer::Flatten => flatten(g, at, x),
        Layer::Activation { activation } => Value { name: activate(g, at, &x.name, *activation), ..x.clone() },
        // It only drops in training.
        Layer::Dropout { rate: _ } => x.clone(),
        Layer::BatchNorm { momentum: _, eps } => batch_norm(g, at, x, *eps),
        Layer::LayerNorm { dims, eps } => layer_norm(g, at, x, dims.unwrap_or(x.shape.len()), *eps),
        Layer::RmsNorm { dims, eps } => rms_norm(g, at, x, dims.unwrap_or(x.shape.len()), *eps),
        Layer::Embedding { width, init: _ } => embedding(g, at, x, *width),
        Layer::EmbeddingBag { width, init: _ } => embedding_bag(g, at, x, *width),
        Layer::TiedEmbedding { width, init: _, layers } => tied_embedding(g, at, x, *width, layers),
        Layer::Positions { init: _ } => positions(g, at, x),
        Layer::Attention { heads, causal, rotary } => attention(g, at, x, *heads, *causal, *rotary),
        Layer::Swiglu => swiglu(g, at, x),
        Layer::Residual { layers, shortcut } => residual(g, at, x, layers, shortcut),
        Layer::Added { name, .. } => panic!("{name} has no nodes, which `onnx::file` says first"),
        Layer::Lookup { width, init: _ } => lookup(g, at, *width),
        Layer::Slice { from, len } => slice(g, at, x, *from, *len),
        Layer::Sum => sum(g, at, x),
        Layer::FactorizationMachine { width } => factorization_machine(g, at, x, *width),
        Layer::DotInteraction { width } => dot_interaction(g, at, x, *width),
        Layer::Parallel { join, branches } => parallel(g, at, x, *join, branches),
    }
}

/// The same with another last dimension.
fn with_last(shape: &[usize], last: usize) -> Vec<usize> {
    [&shape[..shape.len() - 1], &[last]].concat()
}

/// `x w^T` for rows of any number of dimensions; `w` is `(outputs, inputs)`.
fn product(g: &mut Graph<'_>, at: &str, x: &str, weight: &str) -> String {
    let turned = g.node(at, "Transpose", &[weight], vec![ints("perm", [1, 0])]);
    g.node(at, "MatMul", &[x, &turned], vec![])
}

fn linear(g: &mut Graph<'_>, at: &str, x: &Value, units: usize, bias: bool) -> Value {
    let weight = g.parameter(at, "weight");
    let mut name = product(g, at, &x.name, &weight);
    if bias {
        let bias = g.parameter(at, "bias");
        name = g.node(at, "Add", &[&name, &bias], vec![]);
    }
    Value { name, shape: with_last(&x.shape, units) }
}

/// What slides over planes.
struct Window {
    size: usize,
    stride: usize,
    padding: usize,
}

impl Window {
    fn attributes(&self) -> Vec<AttributeProto> {
        let Window { size, stride, padding } = *self;
        vec![
            ints("kernel_shape", [size as i64; 2]),
            ints("strides", [stride as i64; 2]),
            ints("pads", [padding as i64; 4]),
        ]
    }

    /// `[channels, height, width]` behind it.
    fn over(&self, shape: &[usize], channels: usize) -> Vec<usize> {
        let places = |len: &usize| (len + 2 * self.padding - self.size) / self.stride + 1;
        [channels].into_iter().chain(shape[1..].iter().map(places)).collect()
    }
}

fn conv2d(
    g: &mut Graph<'_>,
    at: &str,
    x: &Value,
    filters: usize,
    window: Window,
    groups: usize,
    bias: Option<String>,
) -> Value {
    let weight = g.parameter(at, "weight");
    let inputs: Vec<&str> = [&x.name, &weight].into_iter().chain(&bias).map(String::as_str).collect();
    let attributes = [window.attributes(), vec![int("group", groups as i64)]].concat();
    let name = g.node(at, "Conv", &inputs, attributes);
    Value { name, shape: window.over(&x.shape, filters) }
}

fn pool2d(g: &mut Graph<'_>, at: &str, x: &Value, op: &str, window: Window) -> Value {
    let name = g.node(at, op, &[&x.name], window.attributes());
    Value { name, shape: window.over(&x.shape, x.shape[0]) }
}

fn global_avg_pool(g: &mut Graph<'_>, at: &str, x: &Value) -> Value {
    let means = g.node(at, "GlobalAveragePool", &[&x.name], vec![]);
    flatten(g, at, &Value { name: means, shape: vec![x.shape[0]] })
}

/// One row a sample, from samples of any shape.
pub fn flatten(g: &mut Graph<'_>, at: &str, x: &Value) -> Value {
    let name = g.node(at, "Flatten", &[&x.name], vec![int("axis", 1)]);
    Value { name, shape: vec![x.shape.iter().product()] }
}

fn activate(g: &mut Graph<'_>, at: &str, x: &str, activation: Activation) -> String {
    match activation {
        Activation::Relu => g.node(at, "Relu", &[x], vec![]),
        Activation::LeakyRelu { slope } => g.node(at, "LeakyRelu", &[x], vec![float("alpha", slope)]),
        Activation::Tanh => g.node(at, "Tanh", &[x], vec![]),
        Activation::Sigmoid => g.node(at, "Sigmoid", &[x], vec![]),
        Activation::Silu => {
            let gate = g.node(at, "Sigmoid", &[x], vec![]);
            g.node(at, "Mul", &[x, &gate], vec![])
        }
        Activation::Gelu => {
            // The normal distribution function is (1 + erf(x / sqrt 2)) / 2.
            let (root, one, half) = (g.number(std::f32::consts::SQRT_2), g.number(1.0), g.number(0.5));
            let scaled = g.node(at, "Div", &[x, &root], vec![]);
            let erf = g.node(at, "Erf", &[&scaled], vec![]);
            let twice = g.node(at, "Add", &[&erf, &one], vec![]);
            let product = g.node(at, "Mul", &[x, &twice], vec![]);
            g.node(at, "Mul", &[&product, &half], vec![])
        }
    }
}

fn batch_norm(g: &mut Graph<'_>, at: &str, x: &Value, eps: f32) -> Value {
    let [weight, bias, mean, var] = ["weight", "bias", "running_mean", "running_var"].map(|name| g.parameter(at, name));
    let inputs = [&x.name[..], &weight, &bias, &mean, &var];
    Value { name: g.node(at, "BatchNormalization", &inputs, vec![float("epsilon", eps)]), ..x.clone() }
}

fn layer_norm(g: &mut Graph<'_>, at: &str, x: &Value, dims: usize, eps: f32) -> Value {
    let [weight, bias] = ["weight", "bias"].map(|name| g.parameter(at, name));
    let attributes = vec![int("axis", -(dims as i64)), float("epsilon", eps)];
    Value { name: g.node(at, "LayerNormalization", &[&x.name, &weight, &bias], attributes), ..x.clone() }
}

fn rms_norm(g: &mut Graph<'_>, at: &str, x: &Value, dims: usize, eps: f32) -> Value {
    let (weight, eps) = (g.parameter(at, "weight"), g.number(eps));
    let squares = g.node(at, "Mul", &[&x.name, &x.name], vec![]);
    let last: Vec<i64> = (-(dims as i64)..0).collect();
    let mean = g.node(at, "ReduceMean", &[&squares], vec![ints("axes", last), int("keepdims", 1)]);
    let shifted = g.node(at, "Add", &[&mean, &eps], vec![]);
    let root = g.node(at, "Sqrt", &[&shifted], vec![]);
    let normal = g.node(at, "Div", &[&x.name, &root], vec![]);
    Value { name: g.node(at, "Mul", &[&normal, &weight], vec![]), ..x.clone() }
}

fn embedding(g: &mut Graph<'_>, at: &str, tokens: &Value, width: usize) -> Value {
    let table = g.parameter(at, "weight");
    let name = g.node(at, "Gather", &[&table, &tokens.name], vec![int("axis", 0)]);
    Value { name, shape: [&tokens.shape[..], &[width]].concat() }
}

/// The mean, as a product with a row that is 1 for each token, and 0 for the token 0.
fn embedding_bag(g: &mut Graph<'_>, at: &str, tokens: &Value, width: usize) -> Value {
    let rows = embedding(g, at, tokens, width);
    let sign = g.node(at, "Sign", &[&tokens.name], vec![]);
    let some = g.node(at, "Cast", &[&sign], vec![int("to", FLOAT.into())]);
    let (axis, one) = (g.whole("axis 1".into(), &[1], &[1]), g.number(1.0));
    let row = g.node(at, "Unsqueeze", &[&some, &axis], vec![]);
    let sum = g.node(at, "MatMul", &[&row, &rows.name], vec![]);
    let sum = g.node(at, "Squeeze", &[&sum, &axis], vec![]);
    let count = g.node(at, "ReduceSum", &[&some, &axis], vec![int("keepdims", 1)]);
    let count = g.node(at, "Max", &[&count, &one], vec![]);
    Value { name: g.node(at, "Div", &[&sum, &count], vec![]), shape: vec![width] }
}

fn tied_embedding(g: &mut Graph<'_>, at: &str, tokens: &Value, width: usize, layers: &[Layer]) -> Value {
    let rows = embedding(g, at, tokens, width);
    let out = chain(g, &format!("{at}."), layers, rows);
    let (table, shape) = (g.parameter(at, "weight"), &g.tensor(at, "weight").0.shape);
    Value { name: product(g, at, &out.name, &table), shape: with_last(&out.shape, shape[0]) }
}

fn positions(g: &mut Graph<'_>, at: &str, x: &Value) -> Value {
    let weight = g.parameter(at, "weight");
    Value { name: g.node(at, "Add", &[&x.name, &weight], vec![]), ..x.clone() }
}

/// Turns halves of the heads' rows, `(batch, heads, positions, d)`, by their position.
fn turn(g: &mut Graph<'_>, at: &str, rows: &str, [cos, sin]: [&str; 2]) -> String {
    let [a, b] = g.nodes(at, "Split", &[rows], vec![int("axis", -1)]);
    let mut times = |x: &str, y: &str| g.node(at, "Mul", &[x, y], vec![]);
    let [a_cos, b_sin, b_cos, a_sin] = [times(&a, cos), times(&b, sin), times(&b, cos), times(&a, sin)];
    let first = g.node(at, "Sub", &[&a_cos, &b_sin], vec![]);
    let second = g.node(at, "Add", &[&b_cos, &a_sin], vec![]);
    g.node(at, "Concat", &[&first, &second], vec![int("axis", -1)])
}

fn attention(g: &mut Graph<'_>, at: &str, x: &Value, heads: usize, causal: bool, rotary: Option<f64>) -> Value {
    let (positions, width) = (x.shape[0], x.shape[1] / 3);
    let d = width / heads;
    let of_heads = g.shape(&[positions, heads, d]);
    let parts: [String; 3] = g.nodes(at, "Split", &[&x.name], vec![int("axis", -1)]);
    // Each (batch, heads, positions, d).
    let [q, k, v] = parts.map(|part| {
        let rows = g.node(at, "Reshape", &[&part, &of_heads], vec![]);
        g.node(at, "Transpose", &[&rows], vec![ints("perm", [0, 2, 1, 3])])
    });
    let scale = g.number(1.0 / (d as f32).sqrt());
    let mut q = g.node(at, "Mul", &[&q, &scale], vec![]);
    let mut k = k;
    if let Some(base) = rotary {
        let turns = Rotary::new(positions, d, base);
        let [cos, sin] = [("cos", 0), ("sin", 1)].map(|(name, part)| {
            let values: Vec<f32> = turns.turns().iter().map(|turn| turn[part]).collect();
            g.floats(format!("{name} {positions} {d} {base}"), &[positions, d / 2], &values)
        });
        [q, k] = [q, k].map(|rows| turn(g, at, &rows, [&cos, &sin]));
    }
    let k = g.node(at, "Transpose", &[&k], vec![ints("perm", [0, 1, 3, 2])]);
    let mut products = g.node(at, "MatMul", &[&q, &k], vec![]);
    if causal {
        let places: Vec<i64> = (0..positions as i64).collect();
        let queries = g.whole(format!("queries {positions}"), &[positions, 1], &places);
        let keys = g.whole(format!("keys {positions}"), &[1, positions], &places);
        let seen = g.node(at, "LessOrEqual", &[&keys, &queries], vec![]);
        let nothing = g.number(f32::NEG_INFINITY);
        products = g.node(at, "Where", &[&seen, &products, &nothing], vec![]);
    }
    let shares = g.node(at, "Softmax", &[&products], vec![int("axis", -1)]);
    let y = g.node(at, "MatMul", &[&shares, &v], vec![]);
    let y = g.node(at, "Transpose", &[&y], vec![ints("perm", [0, 2, 1, 3])]);
    let together = g.shape(&[positions, width]);
    Value { name: g.node(at, "Reshape", &[&y, &together], vec![]), shape: vec![positions, width] }
}

fn swiglu(g: &mut Graph<'_>, at: &str, x: &Value) -> Value {
    let [a, b] = g.nodes(at, "Split", &[&x.name], vec![int("axis", -1)]);
    let gate = activate(g, at, &a, Activation::Silu);
    let name = g.node(at, "Mul", &[&gate, &b], vec![]);
    Value { name, shape: with_last(&x.shape, x.shape[x.shape.len() - 1] / 2) }
}

fn residual(g: &mut Graph<'_>, at: &str, x: &Value, layers: &[Layer], shortcut: &[Layer]) -> Value {
    let body = chain(g, &format!("{at}."), layers, x.clone());
    let around = chain(g, &format!("{at}.shortcut."), shortcut, x.clone());
    Value { name: g.node(at, "Add", &[&around.name, &body.name], vec![]), ..body }
}

fn lookup(g: &mut Graph<'_>, at: &str, width: usize) -> Value {
    let (table, (places, ids)) = (g.table(at), g.places());
    let mut name = g.node(at, "Gather", &[&table, &places], vec![int("axis", 0)]);
    if g.has_factors() {
        let axis = g.whole("axis 2".into(), &[1], &[2]);
        let factors = g.node(at, "Unsqueeze", &[VALUES, &axis], vec![]);
        name = g.node(at, "Mul", &[&name, &factors], vec![]);
    }
    Value { name, shape: vec![ids, width] }
}

fn slice(g: &mut Graph<'_>, at: &str, x: &Value, from: usize, len: usize) -> Value {
    let x = flatten(g, at, x);
    let mut one = |what: &str, value: usize| g.whole(format!("{what} {value}"), &[1], &[value as i64]);
    let [start, end, axis] = [one("from", from), one("to", from + len), one("axis", 1)];
    Value { name: g.node(at, "Slice", &[&x.name, &start, &end, &axis], vec![]), shape: vec![len] }
}

/// As so many vectors of `width` values.
fn vectors(g: &mut Graph<'_>, at: &str, x: &Value, width: usize) -> Value {
    let shape = vec![x.shape.iter().product::<usize>() / width, width];
    let to = g.shape(&shape);
    Value { name: g.node(at, "Reshape", &[&x.name, &to], vec![]), shape }
}

/// The sum over a dimension of a batch, which is left out.
fn sum_over(g: &mut Graph<'_>, at: &str, x: &str, axis: usize) -> String {
    let axis = g.whole(format!("axis {axis}"), &[1], &[axis as i64]);
    g.node(at, "ReduceSum", &[x, &axis], vec![int("keepdims", 0)])
}

fn sum(g: &mut Graph<'_>, at: &str, x: &Value) -> Value {
    let width = x.shape[x.shape.len() - 1];
    let x = vectors(g, at, x, width);
    Value { name: sum_over(g, at, &x.name, 1), shape: vec![width] }
}

fn factorization_machine(g: &mut Graph<'_>, at: &str, x: &Value, width: usize) -> Value {
    let x = vectors(g, at, x, width);
    let sum = sum_over(g, at, &x.name, 1);
    let square = |g: &mut Graph<'_>, x: &str| g.node(at, "Mul", &[x, x], vec![]);
    let (of_sum, squares) = (square(g, &sum), square(g, &x.name));
    let squares = sum_over(g, at, &squares, 1);
    let twice = g.node(at, "Sub", &[&of_sum, &squares], vec![]);
    let (axis, half) = (g.whole("axis 1".into(), &[1], &[1]), g.number(0.5));
    let twice = g.node(at, "ReduceSum", &[&twice, &axis], vec![int("keepdims", 1)]);
    Value { name: g.node(at, "Mul", &[&twice, &half], vec![]), shape: vec![1] }
}

fn dot_interaction(g: &mut Graph<'_>, at: &str, x: &Value, width: usize) -> Value {
    let x = vectors(g, at, x, width);
    let n = x.shape[0];
    let turned = g.node(at, "Transpose", &[&x.name], vec![ints("perm", [0, 2, 1])]);
    let products = g.node(at, "MatMul", &[&x.name, &turned], vec![]);
    let products = flatten(g, at, &Value { name: products, shape: vec![n, n] });
    let pairs: Vec<i64> = (1..n).flat_map(|i| (0..i).map(move |j| (i * n + j) as i64)).collect();
    let some = g.whole(format!("pairs {n}"), &[pairs.len()], &pairs);
    let some = g.node(at, "Gather", &[&products.name, &some], vec![int("axis", 1)]);
    let first = slice(g, at, &x, 0, width);
    let name = g.node(at, "Concat", &[&first.name, &some], vec![int("axis", 1)]);
    Value { name, shape: vec![width + pairs.len()] }
}

fn parallel(g: &mut Graph<'_>, at: &str, x: &Value, join: Join, branches: &[Vec<Layer>]) -> Value {
    let branch = |g: &mut Graph<'_>, (i, layers): (usize, &Vec<Layer>)| {
        let y = chain(g, &format!("{at}.{i}."), layers, x.clone());
        match join {
            Join::Concat => flatten(g, at, &y),
            Join::Sum => y,
        }
    };
    let all: Vec<Value> = branches.iter().enumerate().map(|branch_of| branch(g, branch_of)).collect();
    let names: Vec<&str> = all.iter().map(|y| y.name.as_str()).collect();
    match join {
        Join::Concat => {
            let name = g.node(at, "Concat", &names, vec![int("axis", 1)]);
            Value { name, shape: vec![all.iter().map(|y| y.shape[0]).sum()] }
        }
        Join::Sum => Value { name: g.node(at, "Sum", &names, vec![]), shape: all[0].shape.clone() },
    }
}
