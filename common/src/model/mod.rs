//! Models: layers built from the job, with every shape checked before anything runs.

mod named;

pub use named::layers;

use crate::extend;
use crate::job::{self, WeightInit};
use crate::kernels::{Finish, conv::Window};
use crate::layers::{
    Activation, Attention, BatchNorm, Conv2d, DotInteraction, Dropout, Embedding, EmbeddingBag, FactorizationMachine,
    Flatten, GlobalAvgPool, GroupedConv2d, Layer, LayerNorm, Linear, Lookup, Parallel, Pool2d, Positions, Residual,
    Rotary, Sequential, Slice, Sum, Swiglu, Table, TiedEmbedding, finish,
};
use crate::layout::{Init, Layout};
use crate::rows::RowLayout;
use std::cell::Cell;

/// Why a model cannot be built on a data set.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ModelError {
    #[error("model.layers[{at}] ({op}) got samples of shape {got:?}: {why}")]
    Added { at: String, op: String, got: Vec<usize>, why: String },
    #[error("model.layers[{at}] ({op}) got samples of shape {got:?}; it needs {need}")]
    Shape { at: String, op: &'static str, got: Vec<usize>, need: String },
    #[error(
        "the model gives {got:?} values a sample, the data and the loss need {}: end it with {{ op = \"linear\", units = {} }}", words(want), want[want.len() - 1]
    )]
    Outputs { got: Vec<usize>, want: Vec<usize> },
    #[error(
        "the data's samples are tokens, which a model takes by {{ op = \"embedding\", width = 128 }}, \"embedding-bag\" or \
         \"tied-embedding\": begin model.layers with one of them, or use kind = \"gpt\" or \"text-classifier\""
    )]
    Tokens,
    #[error(
        "the model looks ids up (model.layers[{0}]), and the data has none: name columns in data.ids, or choose a model without \
         \"lookup\", such as kind = \"mlp\""
    )]
    NoIds(String),
    #[error(
        "the data has {0} ids a sample, and the model looks none of them up: use kind = \"logistic\", \"matrix-factorization\", \
         \"wide-deep\", \"deepfm\" or \"dlrm\", {{ op = \"lookup\", width = 16 }} among model.layers, or take data.ids out \
         (the features of `libsvm` are ids, which only these models take)"
    )]
    Ids(usize),
    #[error(
        "kind = {kind:?} gives one value a sample, and the data and the loss need {need}: set train.loss = \"binary-cross-entropy\" for \
         two classes, or use \"wide-deep\" or \"dlrm\""
    )]
    OneValue { kind: &'static str, need: usize },
    #[error("the model has {0} parameters; at most 2^31 are possible")]
    TooLarge(u128),
    #[error(
        "the model has no parameters to train, but for sparse tables; add for example {{ op = \"linear\", units = {0} }}"
    )]
    Nothing(usize),
}

/// A single size as a number.
fn words(shape: &[usize]) -> String {
    if let [size] = shape { size.to_string() } else { format!("{shape:?}") }
}

/// What goes into a model, and what has to come out.
#[derive(Clone, Debug, PartialEq)]
pub struct Signature {
    /// Of a sample.
    pub input: Vec<usize>,
    /// Ids that a sample has beside it, of rows of sparse tables.
    pub ids: usize,
    /// Where a sample's values are tokens: how many there are.
    pub vocabulary: Option<usize>,
    /// `[outputs]`, or `[positions, outputs]` where each position has a target.
    pub output: Vec<usize>,
    /// Whether what comes out at a position must not depend on those behind it: they hold its target.
    pub causal: bool,
}

impl Signature {
    /// For samples of `shape` that are no tokens, have no ids, and have one target each.
    pub fn new(shape: &[usize], outputs: usize) -> Signature {
        Signature { input: shape.into(), ids: 0, vocabulary: None, output: vec![outputs], causal: false }
    }
}

/// A model: its layers and the layout of their parameters.
pub struct Model {
    net: Sequential,
    layout: Layout,
    rows: RowLayout,
    input_len: usize,
    positions: usize,
    output: Vec<usize>,
}

fn product(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// PyTorch's `nn.init`, with the gain of relu for Kaiming; `None` is the layers' own default, kaiming_uniform(a = sqrt 5).
fn init(kind: Option<WeightInit>, fan_in: usize, fan_out: usize) -> Init {
    let (fan_in, both) = (fan_in as f32, (fan_in + fan_out) as f32);
    match kind {
        None => Init::Uniform { bound: 1.0 / libm::sqrtf(fan_in) },
        Some(WeightInit::KaimingUniform) => Init::Uniform { bound: libm::sqrtf(6.0 / fan_in) },
        Some(WeightInit::KaimingNormal) => Init::Normal { std: libm::sqrtf(2.0 / fan_in) },
        Some(WeightInit::XavierUniform) => Init::Uniform { bound: libm::sqrtf(6.0 / both) },
        Some(WeightInit::XavierNormal) => Init::Normal { std: libm::sqrtf(2.0 / both) },
        Some(WeightInit::Normal { std }) => Init::Normal { std },
    }
}

/// That of a table of embeddings; as PyTorch's `nn.Embedding`, where nothing is said.
fn table_init(kind: Option<WeightInit>, rows: usize, width: usize) -> Init {
    kind.map_or(Init::Normal { std: 1.0 }, |kind| init(Some(kind), rows, width))
}

/// The window of an operation on planes, where it fits.
fn window(
    op: &'static str,
    at: &str,
    shape: &[usize],
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Result<Window, ModelError> {
    let error = |need: String| Err(ModelError::Shape { at: at.into(), op, got: shape.into(), need });
    let &[channels, height, width] = shape else {
        return error("[channels, height, width]: put it before \"flatten\", or use image data".into());
    };
    if kernel > height + 2 * padding || kernel > width + 2 * padding {
        return error(format!("height and width of at least {kernel} with their padding"));
    }
    Ok(Window { channels, height, width, kernel, stride, padding })
}

/// What layers are built for.
struct Builder {
    vocabulary: Option<usize>,
    causal: bool,
    ids: usize,
    /// Values of a row of the sparse tables so far.
    row: Cell<usize>,
}

impl Builder {
    /// The layer of `spec`, and of the `activation` behind it, where it computes it.
    fn layer(
        &self,
        spec: &job::Layer,
        activation: Option<job::Activation>,
        at: &str,
        shape: &[usize],
    ) -> Result<Box<dyn Layer>, ModelError> {
        let whole = || shape.to_vec();
        let error = |op, need: String| ModelError::Shape { at: at.into(), op, got: shape.into(), need };
        let wrong = |op, need| Err(error(op, need));
        let table = |op, width, init| match (shape, self.vocabulary) {
            (&[positions], Some(vocabulary)) if at == "0" => {
                Ok((positions, Table { vocabulary, width, init: table_init(init, vocabulary, width) }))
            }
            _ => Err(error(op, "tokens, as text data have them: put it first, once".into())),
        };
        Ok(match spec {
            job::Layer::Linear { units, bias, init: kind } => {
                let (&[inputs] | &[_, inputs]) = shape else {
                    let need = "one row of values, or [positions, values]: put { op = \"flatten\" } before it";
                    return wrong("linear", need.into());
                };
                let init = init(*kind, inputs, *units);
                let bias = bias.then_some(match kind {
                    Some(WeightInit::Normal { .. }) => Init::Constant(0.0),
                    _ => Init::Uniform { bound: 1.0 / libm::sqrtf(inputs as f32) },
                });
                let out_shape = [&shape[..shape.len() - 1], &[*units]].concat();
                Box::new(Linear { inputs, out_shape, init, bias, activation })
            }
            job::Layer::Conv2d { filters, kernel, stride, padding, groups, bias, init: kind } => {
                let mut window = window("conv2d", at, shape, *kernel, *stride, *padding)?;
                if !window.channels.is_multiple_of(*groups) {
                    return wrong("conv2d", format!("channels that its {groups} groups can share"));
                }
                window.channels /= groups;
                let out_shape = [*filters, window.out_height(), window.out_width()];
                let init = init(*kind, window.patch(), filters * kernel * kernel);
                let finish = activation.and_then(finish).unwrap_or(Finish::Keep);
                match (*bias, *groups) {
                    (bias, 1) => Box::new(Conv2d { window, out_shape, bias, init, finish }),
                    (bias, groups) => Box::new(GroupedConv2d { window, groups, out_shape, bias, init, finish }),
                }
            }
            job::Layer::MaxPool2d { size, stride } | job::Layer::AvgPool2d { size, stride } => {
                let max = matches!(spec, job::Layer::MaxPool2d { .. });
                let window = window(if max { "max-pool2d" } else { "avg-pool2d" }, at, shape, *size, *stride, 0)?;
                let out_shape = [window.channels, window.out_height(), window.out_width()];
                Box::new(Pool2d { window, out_shape, max })
            }
            job::Layer::GlobalAvgPool => {
                let window = window("global-avg-pool", at, shape, 1, 1, 0)?;
                Box::new(GlobalAvgPool { channels: [window.channels], plane: window.height * window.width })
            }
            job::Layer::Flatten => Box::new(Flatten { len: [product(shape)] }),
            job::Layer::Activation { activation } => Box::new(Activation { kind: *activation, shape: whole() }),
            job::Layer::Dropout { rate } => Box::new(Dropout { rate: *rate, shape: whole() }),
            job::Layer::BatchNorm { momentum, eps } => {
                Box::new(BatchNorm { shape: whole(), momentum: *momentum, eps: *eps })
            }
            job::Layer::LayerNorm { dims, eps } | job::Layer::RmsNorm { dims, eps } => {
                let centered = matches!(spec, job::Layer::LayerNorm { .. });
                let dims = dims.unwrap_or(shape.len());
                let op = if centered { "layer-norm" } else { "rms-norm" };
                if dims > shape.len() {
                    return wrong(op, format!("samples of {dims} dimensions: lower its `dims`"));
                }
                if self.causal && dims > 1 {
                    let need = "`dims = 1`: over all positions, each would see the tokens that it is to predict";
                    return wrong(op, need.into());
                }
                Box::new(LayerNorm { shape: whole(), dims, centered, eps: *eps })
            }
            job::Layer::Residual { layers, shortcut } => {
                let body = self.chain(layers, &format!("{at}].layers["), shape)?;
                let around = || self.chain(shortcut, &format!("{at}].shortcut["), shape);
                let shortcut = (!shortcut.is_empty()).then(around).transpose()?;
                let (got, want) = (body.out_shape(), shortcut.as_ref().map_or(shape, |s| s.out_shape()));
                if got != want {
                    let need = match shortcut {
                        None => format!("a body that gives the same shape, or a `shortcut`; its body gives {got:?}"),
                        Some(_) => {
                            format!("a body and a shortcut that give the same shape; they give {got:?} and {want:?}")
                        }
                    };
                    return wrong("residual", need);
                }
                Box::new(Residual { body, shortcut })
            }
            job::Layer::Embedding { width, init } => {
                let (positions, table) = table("embedding", *width, *init)?;
                Box::new(Embedding { table, shape: [positions, *width] })
            }
            job::Layer::EmbeddingBag { width, init } => {
                let (positions, table) = table("embedding-bag", *width, *init)?;
                Box::new(EmbeddingBag { table, positions, width: [*width] })
            }
            job::Layer::TiedEmbedding { width, init, layers } => {
                let (positions, table) = table("tied-embedding", *width, *init)?;
                let want = [positions, *width];
                let body = self.chain(layers, &format!("{at}].layers["), &want)?;
                if body.out_shape() != want {
                    let got = body.out_shape();
                    return wrong("tied-embedding", format!("a body that gives {want:?}; its body gives {got:?}"));
                }
                Box::new(TiedEmbedding { shape: [positions, table.vocabulary], table, body })
            }
            job::Layer::Positions { init } => {
                let width = shape[shape.len() - 1];
                let init = table_init(*init, product(shape) / width, width);
                Box::new(Positions { shape: whole(), init })
            }
            job::Layer::Attention { heads, causal, rotary } => {
                let split = |width: usize| (width / 3).is_multiple_of(*heads) && width.is_multiple_of(3);
                let &[positions, width] = shape else {
                    let need = "[positions, 3 x width]: put { op = \"linear\", units = 3 x width } before it";
                    return wrong("attention", need.into());
                };
                if !split(width) {
                    return wrong("attention", format!("queries, keys and values of {heads} heads each"));
                }
                if self.causal && !causal {
                    let need = "`causal = true`: otherwise each position would see the token that it is to predict";
                    return wrong("attention", need.into());
                }
                let of_head = width / 3 / heads;
                if rotary.is_some() && positions.saturating_mul(of_head) > 1 << 28 {
                    return wrong("attention", "fewer positions, or narrower heads, for `rotary`".into());
                }
                if rotary.is_some() && !of_head.is_multiple_of(2) {
                    return wrong("attention", format!("heads of an even width for `rotary`, not of {of_head}"));
                }
                let rotary = rotary.map(|base| Rotary::new(positions, of_head, base));
                Box::new(Attention { shape: [positions, width / 3], heads: *heads, causal: *causal, rotary })
            }
            job::Layer::Swiglu => {
                let (width, rest) = shape.split_last().map_or((0, shape), |(width, rest)| (*width, rest));
                if !width.is_multiple_of(2) {
                    return wrong("swiglu", "rows of an even width".into());
                }
                Box::new(Swiglu { shape: [rest, &[width / 2]].concat() })
            }
            job::Layer::Added { name, options } => extend::layer(name, options, shape)
                .map_err(|why| ModelError::Added { at: at.into(), op: name.clone(), got: shape.into(), why })?,
            job::Layer::Lookup { width, init } => {
                if self.ids == 0 {
                    return Err(ModelError::NoIds(at.into()));
                }
                let init = match *init {
                    job::RowInit::Zeros => Init::Constant(0.0),
                    job::RowInit::Uniform { bound } => Init::Uniform { bound },
                    job::RowInit::Normal { std } => Init::Normal { std },
                };
                Box::new(Lookup { shape: [self.ids, *width], at: self.row.replace(self.row.get() + width), init })
            }
            job::Layer::Slice { from, len } => {
                let of = product(shape);
                if from.checked_add(*len).is_none_or(|end| end > of) {
                    return wrong("slice", format!("at least {} values", from.saturating_add(*len)));
                }
                Box::new(Slice { from: *from, len: [*len], of })
            }
            job::Layer::Sum => {
                let width = shape[shape.len() - 1];
                Box::new(Sum { vectors: product(shape) / width, width: [width] })
            }
            job::Layer::FactorizationMachine { width } | job::Layer::DotInteraction { width } => {
                let dot = matches!(spec, job::Layer::DotInteraction { .. });
                let op = if dot { "dot-interaction" } else { "factorization-machine" };
                let vectors = product(shape) / width;
                if !product(shape).is_multiple_of(*width) || vectors < 2 {
                    return wrong(op, format!("at least two whole vectors of {width} values"));
                }
                if dot {
                    Box::new(DotInteraction::new(vectors, *width))
                } else {
                    Box::new(FactorizationMachine { fields: vectors, width: *width })
                }
            }
            job::Layer::Parallel { join, branches } => {
                let branch =
                    |(i, specs): (usize, &Vec<job::Layer>)| self.chain(specs, &format!("{at}].branches[{i}]["), shape);
                let built: Vec<Sequential> = branches.iter().enumerate().map(branch).collect::<Result<_, _>>()?;
                let shapes: Vec<&[usize]> = built.iter().map(|b| b.out_shape()).collect();
                if *join == job::Join::Sum && shapes.iter().any(|s| *s != shapes[0]) {
                    return wrong("parallel", format!("branches that give the same shape to add up, not {shapes:?}"));
                }
                Box::new(Parallel::new(product(shape), built, *join))
            }
        })
    }

    fn chain(&self, specs: &[job::Layer], path: &str, in_shape: &[usize]) -> Result<Sequential, ModelError> {
        let mut layers: Vec<Box<dyn Layer>> = Vec::new();
        let mut i = 0;
        while let Some(spec) = specs.get(i) {
            let shape = layers.last().map_or(in_shape, |l| l.out_shape());
            let behind = match specs.get(i + 1) {
                Some(job::Layer::Activation { activation }) => Some(*activation),
                _ => None,
            };
            let activation = behind.filter(|kind| match spec {
                job::Layer::Linear { .. } => true,
                job::Layer::Conv2d { .. } => finish(*kind).is_some(),
                _ => false,
            });
            let next = self.layer(spec, activation, &format!("{path}{i}"), shape)?;
            i += next.span();
            layers.push(next);
        }
        Ok(Sequential::new(in_shape, layers))
    }
}

impl Model {
    /// Builds `spec` for what goes in and has to come out. `linear` and `mlp` take a sample as one row.
    pub fn build(spec: &job::Model, signature: &Signature) -> Result<Model, ModelError> {
        let &Signature { ref input, ids, vocabulary, ref output, causal } = signature;
        let need = output[output.len() - 1];
        let deep = matches!(spec, job::Model::DeepFm(_));
        if need > 1 && (deep || matches!(spec, job::Model::MatrixFactorization { .. })) {
            let kind = if deep { "deepfm" } else { "matrix-factorization" };
            return Err(ModelError::OneValue { kind, need });
        }
        let (specs, shape) = layers(spec, signature);
        let first = specs.first();
        let takes_tokens = matches!(
            first,
            Some(job::Layer::Embedding { .. } | job::Layer::EmbeddingBag { .. } | job::Layer::TiedEmbedding { .. })
        );
        if vocabulary.is_some() && !takes_tokens {
            return Err(ModelError::Tokens);
        }
        let net = Builder { vocabulary, causal, ids, row: Cell::new(0) }.chain(&specs, "", &shape)?;
        let rows = RowLayout::new(net.tables());
        if ids > 0 && rows.is_empty() {
            return Err(ModelError::Ids(ids));
        }
        if net.out_shape() != output {
            return Err(ModelError::Outputs { got: net.out_shape().into(), want: output.clone() });
        }
        let tensors = net.tensors();
        let size: u128 = tensors.iter().map(|t| t.shape.iter().map(|&d| d as u128).product::<u128>()).sum();
        if size > 1 << 31 {
            return Err(ModelError::TooLarge(size));
        }
        if size == 0 {
            return Err(ModelError::Nothing(output[output.len() - 1]));
        }
        let positions = vocabulary.map_or(1, |_| product(input));
        Ok(Model {
            layout: Layout::new(tensors),
            rows,
            input_len: product(input),
            positions,
            output: output.clone(),
            net,
        })
    }

    /// Where its parameters lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What the rows of its sparse tables hold.
    pub fn rows(&self) -> &RowLayout {
        &self.rows
    }

    /// Digest of names, shapes and roles of all that is learnt: two builds that disagree cannot train together.
    pub fn digest(&self) -> [u8; 32] {
        if self.rows.is_empty() {
            return self.layout.digest();
        }
        let rows = serde_json::to_vec(&self.rows).expect("a layout is plain data");
        *blake3::Hasher::new().update(&self.layout.digest()).update(&rows).finalize().as_bytes()
    }

    /// Values of one input sample.
    pub fn input_len(&self) -> usize {
        self.input_len
    }

    /// Logits, or predicted values, for a target.
    pub fn outputs(&self) -> usize {
        self.output[self.output.len() - 1]
    }

    /// Positions of a sample of tokens; otherwise 1.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Targets of a sample: positions that each have one, or 1.
    pub fn targets(&self) -> usize {
        product(&self.output[..self.output.len() - 1])
    }

    /// Multiply-adds of a sample in matrix products: forward, and backward (twice as many, without the input's gradient).
    pub fn multiply_adds(&self) -> [u64; 2] {
        let forward = self.net.multiply_adds();
        [forward, 2 * forward - self.net.input_multiply_adds()]
    }

    pub(crate) fn net(&self) -> &Sequential {
        &self.net
    }
}
