//! From TOML to a [`Job`]: every key read once, every range checked, every default in one place.

use super::reader::{Kind, Kinds, Node, Range, Reader, Result, SIZE, float, size, text, whole};
use super::*;
use crate::data::tokenizer::{MOST_NGRAMS, MOST_WORDS};
use crate::data::{MOST_CONTEXT, MOST_TOKENS};

mod pictures;

pub use super::reader::JobError;

/// Reads a job.
///
/// # Errors
/// Unknown, missing and ill-typed keys and values out of range, with `FILE:LINE` or the override they came from.
pub fn parse(text: JobText) -> Result<Job> {
    let (file, base) = (&text.file, &text.base);
    let mut root = Node::parse(&text.toml, file)?;
    for option in &text.overrides {
        root.set(option)?;
    }
    let top = Reader::new(&root, "")?;
    top.only(&["name", "seed", "data", "model", "train", "checkpoint"])?;
    let name = |k: &Kind| if let Kind::Text(t) = k { Some(t.clone()).filter(|t| names_a_folder(t)) } else { None };
    let name = top.get("name", "a text that can name a folder", name)?.or(default_name(file));
    let seed = top.integer("seed", 0..=u64::MAX)?.or(0);
    let data = data(top.node("data").needed("[data]` and below it `format = \"digits\"")?, base)?;
    let model = model(top.node("model").needed("[model]` and below it `kind = \"linear\"")?)?;
    let train = train(top.node("train").needed("[train]` and below it `epochs = 3")?)?;
    let checkpoint = checkpoint(top.node("checkpoint").or(&Node::empty_table("".into())), &name)?;
    Ok(Job { text, name, seed, data, model, train, checkpoint })
}

fn names_a_folder(name: &str) -> bool {
    (1..=200).contains(&name.len())
        && name.trim() == name
        && !name.starts_with('.')
        && !name.contains(|c: char| c.is_control() || c == '/' || c == '\\')
}

/// The file's name without its ending.
fn default_name(file: &str) -> String {
    let stem = std::path::Path::new(file).file_stem().map(|s| s.to_string_lossy().replace(' ', "-"));
    stem.filter(|s| names_a_folder(s)).unwrap_or_else(|| "job".into())
}

const ANY: Range = Range { what: "a finite number", fits: |_| true };
const POSITIVE: Range = Range { what: "a number above 0", fits: |v| v > 0.0 };
const NOT_NEGATIVE: Range = Range { what: "a number of at least 0", fits: |v| v >= 0.0 };
/// Rates, betas: 1 is excluded.
const FRACTION: Range = Range { what: "a number from 0 to below 1", fits: |v| (0.0..1.0).contains(&v) };
const UP_TO_ONE: Range = Range { what: "a number from 0 to 1", fits: |v| (0.0..=1.0).contains(&v) };
const BETWEEN: Range = Range { what: "a number above 0 and below 1", fits: |v| v > 0.0 && v < 1.0 };

/// The bound of rows' first values.
pub(crate) const ROW_BOUND: f32 = 0.05;

/// Steps, epochs, samples: far beyond any run, and products of two such numbers fit in 128 bits.
const COUNT: std::ops::RangeInclusive<u64> = 1..=1 << 40;
const COUNT_OR_0: std::ops::RangeInclusive<u64> = 0..=1 << 40;

const FORMATS: &Kinds = &[
    ("digits", &[]),
    ("idx", &["train", "test", "classes", "augment"]),
    ("cifar", &["train", "test", "classes", "augment"]),
    ("images", &["train", "test", "holdout", "size", "channels", "augment"]),
    (
        "csv",
        &[
            "train",
            "test",
            "holdout",
            "header",
            "columns",
            "target",
            "categorical",
            "ids",
            "log",
            "ignore",
            "missing",
            "separator",
            "task",
            "text",
            "tokenizer",
            "context",
            "truncate",
        ],
    ),
    ("text", &["train", "test", "holdout", "tokenizer", "context"]),
    (
        "synthetic",
        &[
            "task",
            "shape",
            "classes",
            "numbers",
            "fields",
            "vocabulary",
            "zipf",
            "users",
            "items",
            "rank",
            "noise",
            "context",
            "samples",
            "test_samples",
            "augment",
        ],
    ),
];

fn data(node: &Node, base: &str) -> Result<Data> {
    let r = Reader::new(node, "data")?;
    let source = match r.kind("format", "data format", FORMATS, &["normalize", "ship", "partition"])? {
        "digits" => Source::Digits,
        "idx" => Source::Idx {
            train: idx_paths(
                r.node("train").needed("train = { images = \"images.gz\", labels = \"labels.gz\" }")?,
                base,
                "data.train",
            )?,
            test: r.node("test").optional().map(|n| idx_paths(n, base, "data.test")).transpose()?,
            classes: r.integer("classes", 2..=256)?.optional().map(|n| n as usize),
        },
        "csv" => Source::Csv(csv(&r, base)?),
        "text" => Source::Text(plain_text(&r, base)?),
        "cifar" => Source::Cifar(pictures::cifar(&r, base)?),
        "images" => Source::Images(pictures::images(&r, base)?),
        _ => synthetic(&r)?,
    };
    let made = matches!(
        source,
        Source::Synthetic { .. } | Source::SyntheticText { .. } | Source::Clicks(_) | Source::Ratings(_)
    );
    let hashed = r.word("partition", "partition", &["contiguous", "hashed"])?.or("contiguous") == "hashed";
    let normalize = r.flag("normalize")?.or(!made);
    let augment = r.node("augment").optional().map(pictures::augment).transpose()?;
    Ok(Data { source, normalize, ship: r.flag("ship")?.optional(), hashed, augment })
}

fn idx_paths(node: &Node, base: &str, path: &str) -> Result<IdxPaths> {
    let r = Reader::new(node, path)?;
    r.only(&["images", "labels"])?;
    Ok(IdxPaths {
        base: base.into(),
        images: r.text("images")?.needed("images = \"mnist/train-images-idx3-ubyte.gz\"")?,
        labels: r.text("labels")?.needed("labels = \"mnist/train-labels-idx1-ubyte.gz\"")?,
    })
}

fn task(r: &Reader<'_>) -> Result<Task> {
    Ok(match r.word("task", "task", &["classification", "regression"])?.or("classification") {
        "regression" => Task::Regression,
        _ => Task::Classification,
    })
}

fn csv(r: &Reader<'_>, base: &str) -> Result<Csv> {
    let names = |key| r.list(key, "a text", text);
    let columns = names("columns")?.optional();
    let separator = |k: &Kind| {
        let Kind::Text(t) = k else { return None };
        // One byte, and not what quoting and lines are made of.
        t.chars().next().filter(|c| t.len() == 1 && !['"', '\n', '\r'].contains(c))
    };
    let (test, holdout) = test_set(r)?;
    let text_column = match r.text("text")?.optional() {
        Some(column) => {
            r.not_with(&["categorical", "ids", "log", "ignore"], "data.text", "the text is all that is learnt from")?;
            let truncate = r.flag("truncate")?.or(false);
            Some(TextColumn { column, tokenizer: tokenizer(r, WORDS)?, context: context(r)?, truncate })
        }
        None => {
            r.only_with(&["tokenizer", "context", "truncate"], "data.text")?;
            None
        }
    };
    Ok(Csv {
        base: base.into(),
        train: r.text("train")?.needed("train = \"train.csv\"")?,
        test,
        holdout,
        text: text_column,
        header: r.flag("header")?.or(columns.is_none()),
        columns,
        target: r.text("target")?.needed("target = \"label\"")?,
        categorical: names("categorical")?.or(Vec::new()),
        ids: r.node("ids").optional().map_or(Ok(Vec::new()), ids)?,
        log: names("log")?.or(Vec::new()),
        ignore: names("ignore")?.or(Vec::new()),
        missing: r.get("missing", "a text", text)?.or("?".into()),
        separator: r.get("separator", "one plain character, such as \";\" or \"\\t\"", separator)?.or(','),
        task: task(r)?,
    })
}

/// `["a", { column = "b", size = 10 }, { cross = ["c", "d"] }]`
fn ids(node: &Node) -> Result<Vec<Id>> {
    let Kind::List(items) = &node.kind else {
        return node.error(format!("`data.ids` must be a list of columns, not {}", node.kind));
    };
    let one = |(i, node): (usize, &Node)| {
        if let Kind::Text(column) = &node.kind {
            return Ok(Id { columns: vec![column.clone()], size: None });
        }
        let r = Reader::new(node, format!("data.ids[{i}]"))?;
        r.only(&["column", "size", "cross"])?;
        let column = r.text("column")?.optional();
        let cross = r.list("cross", "a text", text)?.optional();
        match (column, cross) {
            (Some(column), None) => {
                Ok(Id { columns: vec![column], size: r.integer("size", 1..=1 << 48)?.optional() })
            }
            (None, Some(columns)) if columns.len() > 1 => {
                r.not_with(&["size"], &r.full("cross"), "combinations are known by their hash")?;
                Ok(Id { columns, size: None })
            }
            _ => r.error(format!(
                "`data.ids[{i}]` must be a column's name, {{ column = \"user\", size = 1000 }} or {{ cross = [\"a\", \"b\"] }}"
            )),
        }
    };
    items.iter().enumerate().map(one).collect()
}

fn plain_text(r: &Reader<'_>, base: &str) -> Result<Text> {
    let (test, holdout) = test_set(r)?;
    let tokenizer = tokenizer(r, Tokenizer::Bytes)?;
    if matches!(tokenizer, Tokenizer::Words { ngrams: 2.., .. }) {
        return r.refuse("tokenizer", "has `ngrams`, which are for classes of texts; leave it out");
    }
    Ok(Text {
        base: base.into(),
        train: r.text("train")?.needed("train = \"book.txt\"")?,
        test,
        holdout,
        tokenizer,
        context: context(r)?,
    })
}

/// A file of its own, or a share of the training set.
fn test_set(r: &Reader<'_>) -> Result<(Option<String>, Option<f64>)> {
    let test = r.text("test")?.optional();
    let holdout = r.f64("holdout", &BETWEEN)?.optional();
    if test.is_some() && holdout.is_some() {
        return r.refuse("holdout", "and `data.test` are both given; keep one of them");
    }
    Ok((test, holdout))
}

fn context(r: &Reader<'_>) -> Result<usize> {
    Ok(r.integer("context", 1..=MOST_CONTEXT as u64)?.needed("context = 64")? as usize)
}

const TOKENIZERS: &Kinds = &[("bytes", &[]), ("characters", &[]), ("words", &["most", "ngrams", "buckets"])];

const WORDS: Tokenizer = Tokenizer::Words { most: 50_000, ngrams: 1, buckets: 1 << 16 };

fn tokenizer(r: &Reader<'_>, default: Tokenizer) -> Result<Tokenizer> {
    let read = |node| {
        choice(node, "tokenizer", "data.tokenizer", TOKENIZERS, &[], |name, r| match (name, WORDS) {
            ("words", Tokenizer::Words { most, ngrams, buckets }) => Ok(Tokenizer::Words {
                most: r.integer("most", 1..=MOST_WORDS as u64)?.or(most as u64) as usize,
                ngrams: r.integer("ngrams", 1..=MOST_NGRAMS as u64)?.or(ngrams as u64) as usize,
                buckets: r.integer("buckets", 1..=MOST_WORDS as u64)?.or(buckets as u64) as usize,
            }),
            ("characters", _) => Ok(Tokenizer::Characters),
            _ => Ok(Tokenizer::Bytes),
        })
    };
    r.node("tokenizer").optional().map_or(Ok(default), read)
}

fn synthetic(r: &Reader<'_>) -> Result<Source> {
    let task = r
        .word("task", "task", &["classification", "regression", "language", "clicks", "ratings"])?
        .or("classification");
    let samples = r.integer("samples", COUNT)?.needed("samples = 65536")?;
    let test_samples = r.integer("test_samples", COUNT_OR_0)?.or((samples / 8).max(1));
    let (samples, test_samples) = (samples as usize, test_samples as usize);
    let not_for = |keys: &[&'static str]| r.only_with(keys, &format!("another `data.task` than {task:?}"));
    if task == "ratings" {
        not_for(&["shape", "classes", "numbers", "fields", "vocabulary", "zipf", "context"])?;
        return Ok(Source::Ratings(Ratings {
            users: r.integer("users", 1..=1 << 40)?.needed("users = 1000")?,
            items: r.integer("items", 1..=1 << 40)?.needed("items = 500")?,
            rank: r.integer("rank", 1..=1 << 12)?.or(4) as usize,
            noise: r.f32("noise", &NOT_NEGATIVE)?.or(0.5),
            samples,
            test_samples,
        }));
    }
    not_for(&["users", "items", "rank", "noise"])?;
    if task == "clicks" {
        not_for(&["shape", "classes", "context"])?;
        return Ok(Source::Clicks(Clicks {
            numbers: r.integer("numbers", 1..=1 << 16)?.or(13) as usize,
            fields: r.integer("fields", 1..=1 << 12)?.or(26) as usize,
            vocabulary: r.integer("vocabulary", 1..=1 << 40)?.needed("vocabulary = 20000")?,
            zipf: r.f64("zipf", &NOT_NEGATIVE)?.or(1.0),
            samples,
            test_samples,
        }));
    }
    not_for(&["numbers", "fields", "zipf"])?;
    if task == "language" {
        not_for(&["shape", "classes", "augment"])?;
        let vocabulary = r.integer("vocabulary", 2..=MOST_TOKENS as u64)?.needed("vocabulary = 65")? as usize;
        let context = context(r)?;
        return Ok(Source::SyntheticText { vocabulary, context, samples, test_samples });
    }
    not_for(&["vocabulary", "context"])?;
    let shape = r.list("shape", SIZE, size)?.needed("shape = [784]")?;
    if !matches!(shape.len(), 1 | 3) || shape.iter().map(|&d| d as u128).product::<u128>() > 1 << 31 {
        return r
            .refuse("shape", "must be [features] or [channels, height, width], with at most 2147483648 values in all");
    }
    let (task, classes) = if task == "regression" {
        not_for(&["classes"])?;
        (Task::Regression, 0)
    } else {
        (Task::Classification, r.integer("classes", 2..=1 << 24)?.needed("classes = 10")? as usize)
    };
    Ok(Source::Synthetic { task, shape, classes, samples, test_samples })
}

/// `"name"` or `{ kind = "name", ... }`.
fn choice<T>(
    node: &Node,
    what: &str,
    path: &str,
    kinds: &Kinds,
    common: &[&'static str],
    build: impl FnOnce(&'static str, &Reader<'_>) -> Result<T>,
) -> Result<T> {
    let table = node.expanded();
    let r = Reader::new(&table, path)?;
    build(r.kind("kind", what, kinds, common)?, &r)
}

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

fn model(node: &Node) -> Result<Model> {
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
    let r = Reader::new(node, path)?;
    let bias = || Ok(r.flag("bias")?.or(true));
    let stride = |default| Ok(r.size("stride")?.or(default));
    let eps = || Ok(r.f32("eps", &POSITIVE)?.or(1e-5));
    Ok(match r.kind("op", "layer", LAYERS, &[])? {
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

fn train(node: &Node) -> Result<Train> {
    let r = Reader::new(node, "train")?;
    r.only(&[
        "partitions",
        "micro_batch",
        "epochs",
        "steps",
        "loss",
        "optimizer",
        "tables",
        "schedule",
        "clip_norm",
        "clip_value",
        "eval_every",
        "early_stopping",
    ])?;
    let length = match (r.integer("epochs", COUNT)?.optional(), r.integer("steps", COUNT)?.optional()) {
        (Some(n), None) => Length::Epochs(n),
        (None, Some(n)) => Length::Steps(n),
        (Some(_), Some(_)) => {
            return r.refuse("steps", "and `train.epochs` are both given; keep one of them");
        }
        (None, None) => {
            let way_out = "write for example `epochs = 3` or `steps = 2000`";
            return r.error(format!("`train.epochs` or `train.steps` is missing; {way_out}"));
        }
    };
    let loss_default = Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None };
    let optimizer_default = Optimizer::AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let schedule_default = Schedule { kind: ScheduleKind::Constant, warmup_steps: 0 };
    Ok(Train {
        partitions: r.integer("partitions", 1..=65_536)?.or(8) as u32,
        micro_batch: r.integer("micro_batch", 1..=1_000_000)?.or(16) as usize,
        length,
        loss: r.node("loss").optional().map_or(Ok(loss_default), loss)?,
        optimizer: r.node("optimizer").optional().map_or(Ok(optimizer_default), optimizer)?,
        tables: r.node("tables").optional().map(tables).transpose()?,
        schedule: r.node("schedule").optional().map_or(Ok(schedule_default), schedule)?,
        clip_norm: r.f32("clip_norm", &POSITIVE)?.optional(),
        clip_value: r.f32("clip_value", &POSITIVE)?.optional(),
        eval_every: r.integer("eval_every", COUNT)?.optional(),
        early_stopping: r.node("early_stopping").optional().map(early_stopping).transpose()?,
    })
}

const LOSSES: &Kinds = &[
    ("cross-entropy", &["label_smoothing", "class_weights"]),
    ("binary-cross-entropy", &["positive_weight"]),
    ("mse", &[]),
    ("mae", &[]),
    ("huber", &["delta"]),
    ("hinge", &[]),
    ("focal", &["gamma"]),
];

fn loss(node: &Node) -> Result<Loss> {
    choice(node, "loss", "train.loss", LOSSES, &[], |name, r| {
        Ok(match name {
            "cross-entropy" => {
                let weight = |k: &Kind| float(k).filter(|v| *v >= 0.0);
                let class_weights = r.list("class_weights", NOT_NEGATIVE.what, weight)?.optional();
                if class_weights.as_ref().is_some_and(|w| w.iter().all(|v| *v == 0.0)) {
                    return r.refuse("class_weights", "needs a weight above 0; write one for each class");
                }
                Loss::CrossEntropy { label_smoothing: r.f32("label_smoothing", &FRACTION)?.or(0.0), class_weights }
            }
            "binary-cross-entropy" => {
                Loss::BinaryCrossEntropy { positive_weight: r.f32("positive_weight", &POSITIVE)?.or(1.0) }
            }
            "mse" => Loss::Mse,
            "mae" => Loss::Mae,
            "huber" => Loss::Huber { delta: r.f32("delta", &POSITIVE)?.or(1.0) },
            "hinge" => Loss::Hinge,
            _ => Loss::Focal { gamma: r.f32("gamma", &NOT_NEGATIVE)?.or(2.0) },
        })
    })
}

const OPTIMIZERS: &Kinds = &[
    ("adamw", &["beta1", "beta2", "eps"]),
    ("adam", &["beta1", "beta2", "eps"]),
    ("sgd", &["momentum", "dampening", "nesterov"]),
    ("adagrad", &["lr_decay", "eps", "initial_accumulator"]),
    ("lion", &["beta1", "beta2"]),
    ("rmsprop", &["alpha", "eps", "momentum", "centered"]),
];

fn optimizer(node: &Node) -> Result<Optimizer> {
    choice(node, "optimizer", "train.optimizer", OPTIMIZERS, &["lr", "weight_decay"], |name, r| {
        let lr = |default| Ok(r.f32("lr", &POSITIVE)?.or(default));
        let eps = |default| Ok(r.f32("eps", &POSITIVE)?.or(default));
        let beta = |key, default| Ok(r.f32(key, &FRACTION)?.or(default));
        let momentum = || Ok(r.f32("momentum", &NOT_NEGATIVE)?.or(0.0));
        let weight_decay = r.f32("weight_decay", &NOT_NEGATIVE)?.or(if name == "adamw" { 0.01 } else { 0.0 });
        Ok(match name {
            "adamw" | "adam" => {
                let (lr, beta1, beta2, eps) = (lr(1e-3)?, beta("beta1", 0.9)?, beta("beta2", 0.999)?, eps(1e-8)?);
                if name == "adamw" {
                    Optimizer::AdamW { lr, beta1, beta2, eps, weight_decay }
                } else {
                    Optimizer::Adam { lr, beta1, beta2, eps, weight_decay }
                }
            }
            "sgd" => {
                let (lr, momentum, dampening) = (lr(0.01)?, momentum()?, r.f32("dampening", &ANY)?.or(0.0));
                let nesterov = r.flag("nesterov")?.or(false);
                if nesterov && (momentum == 0.0 || dampening != 0.0) {
                    return r.refuse(
                        "nesterov",
                        "needs `momentum` above 0 and no `dampening`; write for example `momentum = 0.9`",
                    );
                }
                Optimizer::Sgd { lr, momentum, dampening, nesterov, weight_decay }
            }
            "lion" => {
                let (lr, beta1, beta2) = (lr(1e-4)?, beta("beta1", 0.9)?, beta("beta2", 0.99)?);
                Optimizer::Lion { lr, beta1, beta2, weight_decay }
            }
            "adagrad" => Optimizer::Adagrad {
                lr: lr(0.01)?,
                lr_decay: r.f32("lr_decay", &NOT_NEGATIVE)?.or(0.0),
                eps: eps(1e-10)?,
                weight_decay,
                initial_accumulator: r.f32("initial_accumulator", &NOT_NEGATIVE)?.or(0.0),
            },
            _ => Optimizer::RmsProp {
                lr: lr(0.01)?,
                alpha: beta("alpha", 0.99)?,
                eps: eps(1e-8)?,
                momentum: momentum()?,
                centered: r.flag("centered")?.or(false),
                weight_decay,
            },
        })
    })
}

fn tables(node: &Node) -> Result<Tables> {
    let r = Reader::new(node, "train.tables")?;
    r.only(&["optimizer", "memory_mb"])?;
    let Tables { optimizer, memory } = Tables::default();
    Ok(Tables {
        optimizer: r.node("optimizer").optional().map_or(Ok(optimizer), row_optimizer)?,
        memory: r.integer("memory_mb", 1..=1 << 24)?.or(memory >> 20) << 20,
    })
}

const ROW_OPTIMIZERS: &Kinds = &[
    ("adagrad", &["eps", "initial_accumulator"]),
    ("sgd", &[]),
    ("row-adagrad", &["eps", "initial_accumulator"]),
    ("lazy-adam", &["beta1", "beta2", "eps"]),
    ("ftrl", &["beta", "l1", "l2"]),
];

fn row_optimizer(node: &Node) -> Result<RowOptimizer> {
    choice(node, "optimizer", "train.tables.optimizer", ROW_OPTIMIZERS, &["lr"], |name, r| {
        let value = |key, range, default| Ok(r.f32(key, range)?.or(default));
        let accumulator = || value("initial_accumulator", &NOT_NEGATIVE, 0.0);
        let lr = |default| value("lr", &POSITIVE, default);
        Ok(match name {
            "sgd" => RowOptimizer::Sgd { lr: lr(0.01)? },
            "row-adagrad" => RowOptimizer::RowAdagrad {
                lr: lr(0.01)?,
                eps: value("eps", &POSITIVE, 1e-10)?,
                initial_accumulator: accumulator()?,
            },
            "lazy-adam" => RowOptimizer::LazyAdam {
                lr: lr(1e-3)?,
                beta1: value("beta1", &FRACTION, 0.9)?,
                beta2: value("beta2", &FRACTION, 0.999)?,
                eps: value("eps", &POSITIVE, 1e-8)?,
            },
            "ftrl" => RowOptimizer::Ftrl {
                lr: lr(0.05)?,
                beta: value("beta", &NOT_NEGATIVE, 1.0)?,
                l1: value("l1", &NOT_NEGATIVE, 0.0)?,
                l2: value("l2", &NOT_NEGATIVE, 0.0)?,
            },
            _ => RowOptimizer::Adagrad {
                lr: lr(0.01)?,
                eps: value("eps", &POSITIVE, 1e-10)?,
                initial_accumulator: accumulator()?,
            },
        })
    })
}

const SCHEDULES: &Kinds = &[
    ("constant", &[]),
    ("step", &["every", "gamma"]),
    ("multi-step", &["milestones", "gamma"]),
    ("exponential", &["gamma"]),
    ("cosine", &["min_factor"]),
    ("linear", &["end_factor"]),
    ("polynomial", &["power", "end_factor"]),
    ("one-cycle", &["start_fraction", "div_factor", "final_div_factor"]),
    ("inverse-sqrt", &[]),
    ("plateau", &["factor", "patience", "threshold", "metric"]),
];

fn schedule(node: &Node) -> Result<Schedule> {
    choice(node, "schedule", "train.schedule", SCHEDULES, &["warmup_steps"], |name, r| {
        let value = |key, default, range| Ok(r.f64(key, range)?.or(default));
        let gamma = || value("gamma", 0.1, &POSITIVE);
        let kind = match name {
            "constant" => ScheduleKind::Constant,
            "step" => ScheduleKind::Step { every: r.integer("every", COUNT)?.needed("every = 1000")?, gamma: gamma()? },
            "multi-step" => {
                let step = |k: &Kind| whole(k).filter(|n| COUNT.contains(n));
                let milestones = r.list("milestones", "the number of a step, from 1 on", step)?;
                ScheduleKind::MultiStep { milestones: milestones.needed("milestones = [1000, 2000]")?, gamma: gamma()? }
            }
            "exponential" => ScheduleKind::Exponential { gamma: r.f64("gamma", &POSITIVE)?.needed("gamma = 0.999")? },
            "cosine" => ScheduleKind::Cosine { min_factor: value("min_factor", 0.0, &NOT_NEGATIVE)? },
            "linear" => ScheduleKind::Linear { end_factor: value("end_factor", 0.0, &NOT_NEGATIVE)? },
            "polynomial" => ScheduleKind::Polynomial {
                power: value("power", 1.0, &POSITIVE)?,
                end_factor: value("end_factor", 0.0, &NOT_NEGATIVE)?,
            },
            "one-cycle" => ScheduleKind::OneCycle {
                start_fraction: value("start_fraction", 0.3, &BETWEEN)?,
                div_factor: value("div_factor", 25.0, &POSITIVE)?,
                final_div_factor: value("final_div_factor", 1e4, &POSITIVE)?,
            },
            "inverse-sqrt" => ScheduleKind::InverseSqrt,
            _ => ScheduleKind::Plateau {
                factor: value("factor", 0.1, &BETWEEN)?,
                patience: r.integer("patience", COUNT_OR_0)?.or(10),
                threshold: value("threshold", 1e-4, &NOT_NEGATIVE)?,
                metric: metric(r)?,
            },
        };
        Ok(Schedule { kind, warmup_steps: r.integer("warmup_steps", COUNT_OR_0)?.or(0) })
    })
}

const METRICS: [&str; 7] = ["loss", "accuracy", "auc", "rmse", "mae", "perplexity", "bits-per-character"];

fn metric(r: &Reader<'_>) -> Result<Metric> {
    Ok(match r.word("metric", "metric", &METRICS)?.or("loss") {
        "accuracy" => Metric::Accuracy,
        "auc" => Metric::Auc,
        "rmse" => Metric::Rmse,
        "mae" => Metric::Mae,
        "perplexity" => Metric::Perplexity,
        "bits-per-character" => Metric::BitsPerCharacter,
        _ => Metric::Loss,
    })
}

fn early_stopping(node: &Node) -> Result<EarlyStopping> {
    let r = Reader::new(node, "train.early_stopping")?;
    r.only(&["metric", "patience", "min_delta"])?;
    Ok(EarlyStopping {
        metric: metric(&r)?,
        patience: r.integer("patience", COUNT_OR_0)?.needed("patience = 3")?,
        min_delta: r.f64("min_delta", &NOT_NEGATIVE)?.or(0.0),
    })
}

fn checkpoint(node: &Node, name: &str) -> Result<Checkpoint> {
    let r = Reader::new(node, "checkpoint")?;
    r.only(&["dir", "every_steps", "keep"])?;
    Ok(Checkpoint {
        dir: r.text("dir")?.or(format!("runs/{name}")),
        every_steps: r.integer("every_steps", COUNT_OR_0)?.or(500),
        keep: r.integer("keep", 1..=1 << 20)?.or(3) as usize,
    })
}

#[cfg(test)]
mod tests;
