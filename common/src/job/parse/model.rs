//! `[model]`.

use super::*;

const ACTIVATIONS: &Kinds =
    &[("relu", &[]), ("leaky-relu", &["slope"]), ("gelu", &[]), ("silu", &[]), ("tanh", &[]), ("sigmoid", &[])];

fn activation(name: &str, r: &Reader<'_>) -> Result<Activation> {
    Ok(match name {
        "relu" => Activation::Relu,
        "leaky-relu" => Activation::LeakyRelu { slope: r.f32("slope", &ANY)?.or(0.01) },
        "gelu" => Activation::Gelu,
        "silu" => Activation::Silu,
        "tanh" => Activation::Tanh,
        _ => Activation::Sigmoid,
    })
}

const MODELS: &Kinds = &[
    ("linear", &[]),
    ("mlp", &["hidden", "activation", "dropout"]),
    ("gpt", &["layers", "heads", "width", "hidden", "feed_forward", "norm", "positions", "bias", "tie", "dropout"]),
    ("text-classifier", &["width", "hidden", "dropout"]),
    ("logistic", &[]),
    ("matrix-factorization", &["width"]),
    ("wide-deep", &["width", "hidden", "dropout"]),
    ("deepfm", &["width", "hidden", "dropout"]),
    ("dlrm", &["width", "bottom", "top", "interaction"]),
    ("resnet", &["depth", "width"]),
    ("layers", &["layers"]),
];

pub(super) fn model(node: &Node) -> Result<Model> {
    let r = Reader::new(node, "model")?;
    Ok(match r.kind("kind", "model kind", MODELS, &[])? {
        "linear" => Model::Linear,
        "mlp" => {
            let hidden = r.list("hidden", SIZE, size)?.needed("hidden = [512, 256]")?;
            if hidden.is_empty() {
                return r.refuse("hidden", "is empty; write at least one width, or kind = \"linear\"");
            }
            let activation = |n| choice(n, "activation", "model.activation", ACTIVATIONS, &[], activation);
            Model::Mlp {
                hidden,
                activation: r.node("activation").optional().map_or(Ok(Activation::Relu), activation)?,
                dropout: r.f32("dropout", &FRACTION)?.or(0.0),
            }
        }
        "gpt" => Model::Gpt(gpt(&r)?),
        "text-classifier" => Model::TextClassifier {
            width: r.size("width")?.or(32),
            hidden: r.list("hidden", SIZE, size)?.or(Vec::new()),
            dropout: r.f32("dropout", &FRACTION)?.or(0.0),
        },
        "logistic" => Model::Logistic,
        "matrix-factorization" => Model::MatrixFactorization { width: r.size("width")?.or(16) },
        kind @ ("wide-deep" | "deepfm") => {
            let deep = Deep {
                width: r.size("width")?.or(16),
                hidden: r.list("hidden", SIZE, size)?.or(vec![256, 128]),
                dropout: r.f32("dropout", &FRACTION)?.or(0.0),
            };
            if kind == "deepfm" { Model::DeepFm(deep) } else { Model::WideDeep(deep) }
        }
        "dlrm" => Model::Dlrm {
            width: r.size("width")?.or(16),
            bottom: r.list("bottom", SIZE, size)?.or(vec![64]),
            top: r.list("top", SIZE, size)?.or(vec![256, 64]),
            interaction: match r.word("interaction", "interaction", &["dot", "concat"])?.or("dot") {
                "concat" => Interaction::Concat,
                _ => Interaction::Dot,
            },
        },
        "resnet" => {
            let depth = r.integer("depth", 8..=1202)?.needed("depth = 20")? as usize;
            if depth % 6 != 2 {
                return r.refuse("depth", &format!("is {depth}; it must be 8, 14, 20, 26, 32 or another 6 n + 2"));
            }
            Model::Resnet { depth, width: r.size("width")?.or(16) }
        }
        _ => {
            let list = r.node("layers").needed("layers = [{ op = \"linear\", units = 10 }]")?;
            Model::Layers { layers: layers(list, "model.layers")? }
        }
    })
}

fn gpt(r: &Reader<'_>) -> Result<Gpt> {
    let (width, heads) = (r.size("width")?.needed("width = 128")?, r.size("heads")?.needed("heads = 4")?);
    if !width.is_multiple_of(heads) {
        return r.refuse("heads", &format!("must divide `model.width`, which is {width}"));
    }
    let feed_forward = match r.word("feed_forward", "feed-forward network", &["gelu", "swiglu"])?.or("gelu") {
        "swiglu" => FeedForward::Swiglu,
        _ => FeedForward::Gelu,
    };
    let positions = match r.word("positions", "kind of positions", &["learned", "rotary"])?.or("learned") {
        "rotary" if !(width / heads).is_multiple_of(2) => {
            let need =
                format!("\"rotary\" needs heads of an even width, not of {}; change `model.heads`", width / heads);
            return r.refuse("positions", &need);
        }
        "rotary" => PositionKind::Rotary,
        _ => PositionKind::Learned,
    };
    // Of the same size either way (Shazeer, 2020, section 3): a gated network has three matrices instead of two.
    let hidden = match feed_forward {
        FeedForward::Gelu => 4 * width,
        FeedForward::Swiglu => (8 * width).div_ceil(3),
    };
    Ok(Gpt {
        layers: r.size("layers")?.needed("layers = 4")?,
        heads,
        width,
        hidden: r.size("hidden")?.or(hidden),
        feed_forward,
        norm: match r.word("norm", "norm", &["layer-norm", "rms-norm"])?.or("layer-norm") {
            "rms-norm" => Norm::RmsNorm,
            _ => Norm::LayerNorm,
        },
        positions,
        bias: r.flag("bias")?.or(true),
        tie: r.flag("tie")?.or(false),
        dropout: r.f32("dropout", &FRACTION)?.or(0.0),
    })
}

fn layers(node: &Node, path: &str) -> Result<Vec<Layer>> {
    match &node.kind {
        Kind::List(items) if items.is_empty() => {
            node.error(format!("`{path}` is empty; write at least {{ op = \"linear\", units = 10 }}"))
        }
        Kind::List(items) => items.iter().enumerate().map(|(i, n)| layer(n, &format!("{path}[{i}]"))).collect(),
        other => node.error(format!("`{path}` must be a list of tables {{ op = ... }}, not {other}")),
    }
}

const LAYERS: &Kinds = &[
    ("linear", &["units", "bias", "init"]),
    ("conv2d", &["filters", "kernel", "stride", "padding", "groups", "bias", "init"]),
    ("max-pool2d", &["size", "stride"]),
    ("avg-pool2d", &["size", "stride"]),
    ("global-avg-pool", &[]),
    ("flatten", &[]),
    ("relu", &[]),
    ("leaky-relu", &["slope"]),
    ("gelu", &[]),
    ("silu", &[]),
    ("tanh", &[]),
    ("sigmoid", &[]),
    ("swiglu", &[]),
    ("dropout", &["rate"]),
    ("batch-norm", &["momentum", "eps"]),
    ("layer-norm", &["dims", "eps"]),
    ("rms-norm", &["dims", "eps"]),
    ("embedding", &["width", "init"]),
    ("embedding-bag", &["width", "init"]),
    ("tied-embedding", &["width", "init", "layers"]),
    ("positions", &["init"]),
    ("attention", &["heads", "causal", "rotary"]),
    ("residual", &["layers", "shortcut"]),
    ("lookup", &["width", "init"]),
    ("slice", &["from", "len"]),
    ("sum", &[]),
    ("factorization-machine", &["width"]),
    ("dot-interaction", &["width"]),
    ("parallel", &["join", "branches"]),
];

fn layer(node: &Node, path: &str) -> Result<Layer> {
    let names = Names::layers();
    if let Some((name, options)) = added(node, "op", &names, &[])? {
        return Ok(Layer::Added { name, options });
    }
    let r = Reader::new(node, path)?;
    let bias = || Ok(r.flag("bias")?.or(true));
    let stride = |default| Ok(r.size("stride")?.or(default));
    let eps = || Ok(r.f32("eps", &POSITIVE)?.or(1e-5));
    Ok(match r.kind("op", "layer", &with_added(LAYERS, &names), &[])? {
        "linear" => Layer::Linear { units: r.size("units")?.needed("units = 128")?, bias: bias()?, init: init(&r)? },
        "conv2d" => {
            let filters = r.size("filters")?.needed("filters = 32")?;
            let kernel = r.size("kernel")?.needed("kernel = 3")?;
            // More would give outputs that see nothing but padding.
            let padding = r.integer("padding", 0..=kernel as u64 - 1)?.or(0) as usize;
            let groups = r.size("groups")?.or(1);
            if !filters.is_multiple_of(groups) {
                return r.refuse("groups", &format!("must divide `filters`, which is {filters}; change one of them"));
            }
            Layer::Conv2d { filters, kernel, stride: stride(1)?, padding, groups, bias: bias()?, init: init(&r)? }
        }
        pool @ ("max-pool2d" | "avg-pool2d") => {
            let size = r.size("size")?.needed("size = 2")?;
            let stride = stride(size)?;
            if pool == "max-pool2d" { Layer::MaxPool2d { size, stride } } else { Layer::AvgPool2d { size, stride } }
        }
        "global-avg-pool" => Layer::GlobalAvgPool,
        "flatten" => Layer::Flatten,
        "dropout" => Layer::Dropout { rate: r.f32("rate", &FRACTION)?.or(0.5) },
        "batch-norm" => Layer::BatchNorm { momentum: r.f32("momentum", &UP_TO_ONE)?.or(0.1), eps: eps()? },
        "layer-norm" => Layer::LayerNorm { dims: r.size("dims")?.optional(), eps: eps()? },
        "rms-norm" => Layer::RmsNorm { dims: r.size("dims")?.optional(), eps: eps()? },
        "embedding" => Layer::Embedding { width: r.size("width")?.needed("width = 128")?, init: init(&r)? },
        "embedding-bag" => Layer::EmbeddingBag { width: r.size("width")?.needed("width = 64")?, init: init(&r)? },
        "tied-embedding" => {
            let body = r.node("layers").needed("layers = [{ op = \"layer-norm\", dims = 1 }]")?;
            let layers = layers(body, &format!("{path}.layers"))?;
            Layer::TiedEmbedding { width: r.size("width")?.needed("width = 128")?, init: init(&r)?, layers }
        }
        "positions" => Layer::Positions { init: init(&r)? },
        "attention" => Layer::Attention {
            heads: r.size("heads")?.needed("heads = 4")?,
            causal: r.flag("causal")?.or(false),
            rotary: r.f64("rotary", &POSITIVE)?.optional(),
        },
        "swiglu" => Layer::Swiglu,
        "residual" => {
            let body = r.node("layers").needed("layers = [{ op = \"relu\" }]")?;
            let around = |node| layers(node, &format!("{path}.shortcut"));
            let shortcut = r.node("shortcut").optional().map(around).transpose()?.unwrap_or_default();
            Layer::Residual { layers: layers(body, &format!("{path}.layers"))?, shortcut }
        }
        "lookup" => Layer::Lookup { width: r.size("width")?.needed("width = 16")?, init: row_init(&r)? },
        "slice" => Layer::Slice {
            from: r.integer("from", 0..=1 << 31)?.or(0) as usize,
            len: r.size("len")?.needed("len = 16")?,
        },
        "sum" => Layer::Sum,
        "factorization-machine" => Layer::FactorizationMachine { width: r.size("width")?.needed("width = 16")? },
        "dot-interaction" => Layer::DotInteraction { width: r.size("width")?.needed("width = 16")? },
        "parallel" => {
            let join = match r.word("join", "join", &["concat", "sum"])?.or("concat") {
                "sum" => Join::Sum,
                _ => Join::Concat,
            };
            let node = r.node("branches").needed("branches = [[{ op = \"lookup\", width = 16 }], []]")?;
            let path = format!("{path}.branches");
            let branches = match &node.kind {
                Kind::List(items) if !items.is_empty() => {
                    let branch = |(i, n): (usize, &Node)| match &n.kind {
                        Kind::List(items) if items.is_empty() => Ok(Vec::new()),
                        _ => layers(n, &format!("{path}[{i}]")),
                    };
                    items.iter().enumerate().map(branch).collect::<Result<_>>()?
                }
                other => return node.error(format!("`{path}` must be a list of lists of layers, not {other}")),
            };
            Layer::Parallel { join, branches }
        }
        name => Layer::Activation { activation: activation(name, &r)? },
    })
}

const ROW_INITS: &Kinds = &[("uniform", &["bound"]), ("normal", &["std"]), ("zeros", &[])];

fn row_init(r: &Reader<'_>) -> Result<RowInit> {
    let one = |node| {
        choice(node, "init", &r.full("init"), ROW_INITS, &[], |name, r| {
            Ok(match name {
                "zeros" => RowInit::Zeros,
                "normal" => RowInit::Normal { std: r.f32("std", &POSITIVE)?.needed("std = 0.01")? },
                _ => RowInit::Uniform { bound: r.f32("bound", &POSITIVE)?.or(ROW_BOUND) },
            })
        })
    };
    r.node("init").optional().map_or(Ok(RowInit::Uniform { bound: ROW_BOUND }), one)
}

const INITS: &Kinds = &[
    ("kaiming-uniform", &[]),
    ("kaiming-normal", &[]),
    ("xavier-uniform", &[]),
    ("xavier-normal", &[]),
    ("normal", &["std"]),
];

fn init(r: &Reader<'_>) -> Result<Option<WeightInit>> {
    let one = |node| {
        choice(node, "init", &r.full("init"), INITS, &[], |name, r| {
            Ok(match name {
                "kaiming-uniform" => WeightInit::KaimingUniform,
                "kaiming-normal" => WeightInit::KaimingNormal,
                "xavier-uniform" => WeightInit::XavierUniform,
                "xavier-normal" => WeightInit::XavierNormal,
                _ => WeightInit::Normal { std: r.f32("std", &POSITIVE)?.needed("std = 0.02")? },
            })
        })
    };
    r.node("init").optional().map(one).transpose()
}
