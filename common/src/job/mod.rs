//! The job: one TOML file, parsed once into values that are always right.
//!
//! [`parse`] reads TOML and reports file, line and the nearest known name; everything downstream takes a [`Job`] as it is.
//! To workers and into checkpoints goes the text ([`JobText`]), which whoever takes it parses again: there is no second way
//! in.

mod parse;
mod reader;
pub(crate) use parse::ROW_BOUND;
pub use parse::{JobError, parse};

use serde::{Deserialize, Serialize};

/// A whole job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "JobText", into = "JobText")]
pub struct Job {
    /// What it was read from.
    pub text: JobText,
    pub name: String,
    pub seed: u64,
    pub data: Data,
    pub model: Model,
    pub train: Train,
    pub checkpoint: Checkpoint,
}

/// What a job is read from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobText {
    /// The file's name, for messages.
    pub file: String,
    /// The job file's folder (absolute), where relative data paths start.
    pub base: String,
    pub toml: String,
    /// `KEY=VALUE` texts that override keys.
    pub overrides: Vec<String>,
}

impl TryFrom<JobText> for Job {
    type Error = JobError;

    fn try_from(text: JobText) -> Result<Job, JobError> {
        parse(text)
    }
}

impl From<Job> for JobText {
    fn from(job: Job) -> JobText {
        job.text
    }
}

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Data {
    pub source: Source,
    /// Scale inputs to mean 0 and deviation 1 with statistics of the training set.
    pub normalize: bool,
    /// `Some(true)`: the coordinator sends workers their partitions; `Some(false)`: workers read the paths themselves;
    /// `None`: they read, and are sent what they cannot read.
    #[serde(skip)]
    pub ship: Option<bool>,
    /// Hash samples to partitions instead of cutting contiguous ranges.
    pub hashed: bool,
    /// How pictures change from epoch to epoch of training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub augment: Option<Augment>,
}

/// Where samples come from (`data.format`).
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "format", rename_all = "kebab-case")]
pub enum Source {
    /// The embedded UCI digits, 8x8 in 0..=16; a fifth, chosen by hash of (seed, index), is the test set.
    Digits,
    Idx {
        train: IdxPaths,
        test: Option<IdxPaths>,
        /// `None`: as many as the training set's labels say.
        classes: Option<usize>,
    },
    Csv(Csv),
    Text(Text),
    Cifar(Cifar),
    Images(Images),
    Synthetic {
        task: Task,
        shape: Vec<usize>,
        classes: usize,
        samples: usize,
        test_samples: usize,
    },
    /// `synthetic` with `task = "clicks"`.
    Clicks(Clicks),
    /// `synthetic` with `task = "ratings"`.
    Ratings(Ratings),
    /// `synthetic` with `task = "language"`.
    SyntheticText {
        vocabulary: usize,
        context: usize,
        samples: usize,
        test_samples: usize,
    },
}

/// Paths are as the job file has them; `base` is the job file's folder (absolute).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct IdxPaths {
    #[serde(skip)]
    pub base: String,
    pub images: String,
    pub labels: String,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Csv {
    #[serde(skip)]
    pub base: String,
    pub train: String,
    pub test: Option<String>,
    /// Column names, where the file has no header line.
    pub columns: Option<Vec<String>>,
    /// Whether the first line holds column names.
    pub header: bool,
    pub target: String,
    /// Columns that are one-hot encoded; other columns must be numbers.
    pub categorical: Vec<String>,
    /// Columns whose values are ids of rows of sparse tables.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<Id>,
    /// Columns of numbers of which the logarithm is taken: `sign(x) ln(1 + |x|)`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
    /// Columns that are left out.
    pub ignore: Vec<String>,
    /// The text that stands for a missing value (an empty field always does).
    pub missing: String,
    pub separator: char,
    pub task: Task,
    /// The share of the training file's lines that is the test set, by hash of the cells that are learnt from; only where `test`
    /// is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holdout: Option<f64>,
    /// The only column that is learnt from, where it is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<TextColumn>,
}

/// Where one of a sample's ids comes from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Id {
    /// Several are crossed: each combination of their values is an id.
    pub columns: Vec<String>,
    /// Values are whole numbers below it; `None`: any text, by its hash.
    pub size: Option<u64>,
}

/// Made-up clicks: `numbers` normal numbers, and `fields` ids of `vocabulary` each, of which the `k`-th comes as often as
/// `k^-zipf`; a planted teacher decides which samples are clicked on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Clicks {
    pub numbers: usize,
    pub fields: usize,
    pub vocabulary: u64,
    pub zipf: f64,
    pub samples: usize,
    pub test_samples: usize,
}

/// Made-up ratings of `items` by `users`, of planted vectors of `rank` values, with noise of this deviation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratings {
    pub users: u64,
    pub items: u64,
    pub rank: usize,
    pub noise: f32,
    pub samples: usize,
    pub test_samples: usize,
}

/// The binary files of CIFAR-10 or CIFAR-100.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cifar {
    #[serde(skip)]
    pub base: String,
    pub train: Vec<String>,
    /// None of them: there is no test set.
    pub test: Vec<String>,
    /// 10 or 100.
    pub classes: usize,
}

/// Folders with a folder of pictures for each class.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Images {
    #[serde(skip)]
    pub base: String,
    pub train: String,
    pub test: Option<String>,
    /// The share of the training set, by hash of the pictures, that is the test set; only where `test` is none.
    pub holdout: Option<f64>,
    /// Height and width that pictures are cropped and scaled to.
    pub size: [usize; 2],
    /// 1 or 3.
    pub channels: usize,
}

/// Chance in training, where it is anew in each epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Augment {
    /// Pixels that a picture is padded by, on each side, before a part of its old size is cropped from it.
    pub crop: usize,
    /// Whether half of the pictures are mirrored.
    pub flip: bool,
}

/// Windows of a plain text, each of whose tokens is to be predicted from those before it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Text {
    #[serde(skip)]
    pub base: String,
    pub train: String,
    pub test: Option<String>,
    /// The share of the training text, at its end, that is the test set; only where `test` is none.
    pub holdout: Option<f64>,
    pub tokenizer: Tokenizer,
    /// Tokens of a window.
    pub context: usize,
}

/// What a token of a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Tokenizer {
    Bytes,
    Characters,
    /// The most frequent words, and hashed runs of up to `ngrams` words.
    Words {
        most: usize,
        ngrams: usize,
        buckets: usize,
    },
}

/// A column of a table whose text is a sample.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextColumn {
    pub column: String,
    pub tokenizer: Tokenizer,
    /// Tokens of a text, at most.
    pub context: usize,
    /// Whether a longer text loses its end; otherwise it is an error.
    pub truncate: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    Classification,
    Regression,
}

/// `[model]`; all other kinds are short for `layers`, and are expanded in [`crate::model`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Model {
    Linear,
    Mlp {
        hidden: Vec<usize>,
        activation: Activation,
        dropout: f32,
    },
    Gpt(Gpt),
    /// The mean of the embeddings of a text's tokens, and an mlp (Joulin et al., 2016, section 2).
    TextClassifier {
        width: usize,
        hidden: Vec<usize>,
        dropout: f32,
    },
    /// A linear function of the numbers, and a value for each id.
    Logistic,
    /// [`Model::Logistic`], and the products of each two ids' vectors (Rendle, 2010): of users and items a factorization of the
    /// matrix of ratings with biases (Koren et al., 2009, eq. 4).
    MatrixFactorization {
        width: usize,
    },
    /// [`Model::Logistic`] and an mlp over the ids' vectors and the numbers, added up (Cheng et al., 2016, eq. 3).
    WideDeep(Deep),
    /// [`Model::MatrixFactorization`] and an mlp over the same vectors and the numbers, added up (Guo et al., 2017, eq. 1).
    #[serde(rename = "deepfm")]
    DeepFm(Deep),
    /// An mlp over what another makes of the numbers and the ids' vectors, or over their products (Naumov et al., 2019).
    Dlrm {
        width: usize,
        bottom: Vec<usize>,
        top: Vec<usize>,
        interaction: Interaction,
    },
    /// Residual blocks of two convolutions in three stages (He et al., 2016, section 4.2).
    Resnet {
        /// Layers with weights: `6 n + 2`, for `n` blocks a stage.
        depth: usize,
        /// Filters of the first stage; each other one has twice those of the one before.
        width: usize,
    },
    Layers {
        layers: Vec<Layer>,
    },
}

/// The mlp over ids' vectors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Deep {
    /// Values of an id's vector.
    pub width: usize,
    pub hidden: Vec<usize>,
    pub dropout: f32,
}

/// What is made of the vectors of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interaction {
    /// One after another.
    Concat,
    /// The products of each two of them, behind the first.
    Dot,
}

/// A decoder of blocks of causal attention and a feed-forward network, each normalised before and added to its input
/// (Radford et al., 2019, section 2.3).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpt {
    /// Blocks.
    pub layers: usize,
    /// Attention heads of a block.
    pub heads: usize,
    /// Values of a position.
    pub width: usize,
    /// Values of a position inside the feed-forward network.
    pub hidden: usize,
    pub feed_forward: FeedForward,
    pub norm: Norm,
    pub positions: PositionKind,
    /// Whether the linear layers of the blocks have a bias.
    pub bias: bool,
    /// Whether the logits are products with the embedding's table, instead of with a table of their own.
    pub tie: bool,
    pub dropout: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FeedForward {
    Gelu,
    Swiglu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Norm {
    LayerNorm,
    RmsNorm,
}

/// How a model knows where in its context a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PositionKind {
    Learned,
    Rotary,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    Relu,
    LeakyRelu { slope: f32 },
    Gelu,
    Silu,
    Tanh,
    Sigmoid,
}

/// One entry of `model.layers` (`op`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Layer {
    Linear {
        units: usize,
        bias: bool,
        init: Option<WeightInit>,
    },
    #[serde(rename = "conv2d")]
    Conv2d {
        filters: usize,
        kernel: usize,
        stride: usize,
        padding: usize,
        /// Of channels and filters that see only each other.
        #[serde(default = "one", skip_serializing_if = "is_one")]
        groups: usize,
        bias: bool,
        init: Option<WeightInit>,
    },
    #[serde(rename = "max-pool2d")]
    MaxPool2d {
        size: usize,
        stride: usize,
    },
    #[serde(rename = "avg-pool2d")]
    AvgPool2d {
        size: usize,
        stride: usize,
    },
    GlobalAvgPool,
    Flatten,
    Activation {
        activation: Activation,
    },
    Dropout {
        rate: f32,
    },
    BatchNorm {
        momentum: f32,
        eps: f32,
    },
    LayerNorm {
        /// How many of the last dimensions are normalised together; `None`: all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        dims: Option<usize>,
        eps: f32,
    },
    RmsNorm {
        dims: Option<usize>,
        eps: f32,
    },
    /// `[positions]` tokens to `[positions, width]`.
    Embedding {
        width: usize,
        init: Option<WeightInit>,
    },
    /// `[positions]` tokens to the mean of their embeddings, `[width]`.
    EmbeddingBag {
        width: usize,
        init: Option<WeightInit>,
    },
    /// [`Layer::Embedding`], `layers`, and the products with the embedding's table: `[positions, vocabulary]`.
    TiedEmbedding {
        width: usize,
        init: Option<WeightInit>,
        layers: Vec<Layer>,
    },
    /// Adds a learnt value to each.
    Positions {
        init: Option<WeightInit>,
    },
    /// `[positions, 3 width]`, queries, keys and values, to `[positions, width]`.
    Attention {
        heads: usize,
        causal: bool,
        /// The base of rotary position embedding, where there is one.
        rotary: Option<f64>,
    },
    /// Halves the last dimension.
    Swiglu,
    /// The ids' rows of a sparse table: whatever goes in, `[ids, width]` comes out.
    Lookup {
        width: usize,
        init: RowInit,
    },
    /// `len` values from `from` on.
    Slice {
        from: usize,
        len: usize,
    },
    /// The sum over all dimensions but the last.
    Sum,
    /// Vectors of `width` values to the sum of the products of each two of them.
    FactorizationMachine {
        width: usize,
    },
    /// Vectors of `width` values to the first of them and the products of each two.
    DotInteraction {
        width: usize,
    },
    /// What all branches make of the same.
    Parallel {
        join: Join,
        branches: Vec<Vec<Layer>>,
    },
    /// `y = x + body(x)`, or `shortcut(x) + body(x)`.
    Residual {
        layers: Vec<Layer>,
        /// None of them: the inputs themselves.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        shortcut: Vec<Layer>,
    },
}

/// How what branches give becomes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Join {
    /// One after another, as one row.
    Concat,
    /// Added up.
    Sum,
}

/// The first values of a sparse table's rows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RowInit {
    Zeros,
    /// From `-bound` to below `bound`.
    Uniform {
        bound: f32,
    },
    Normal {
        std: f32,
    },
}

fn one() -> usize {
    1
}

fn is_one(n: &usize) -> bool {
    *n == 1
}

/// `init` of a layer; the default is PyTorch's for that layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightInit {
    KaimingUniform,
    KaimingNormal,
    XavierUniform,
    XavierNormal,
    /// Weights of this deviation around 0; the bias begins at 0.
    Normal {
        std: f32,
    },
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Train {
    pub partitions: u32,
    pub micro_batch: usize,
    pub length: Length,
    pub loss: Loss,
    pub optimizer: Optimizer,
    /// `None`: [`Tables::default`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tables: Option<Tables>,
    pub schedule: Schedule,
    pub clip_norm: Option<f32>,
    pub clip_value: Option<f32>,
    /// Evaluate on the test set every so many steps; `None`: after each epoch. The end is always evaluated.
    pub eval_every: Option<u64>,
    pub early_stopping: Option<EarlyStopping>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Length {
    Epochs(u64),
    Steps(u64),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Loss {
    CrossEntropy { label_smoothing: f32, class_weights: Option<Vec<f32>> },
    BinaryCrossEntropy { positive_weight: f32 },
    Mse,
    Mae,
    Huber { delta: f32 },
    Hinge,
    Focal { gamma: f32 },
}

/// With exactly PyTorch's definitions and defaults; Lion with those of its paper.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Optimizer {
    Sgd {
        lr: f32,
        momentum: f32,
        dampening: f32,
        nesterov: bool,
        weight_decay: f32,
    },
    Adam {
        lr: f32,
        beta1: f32,
        beta2: f32,
        eps: f32,
        weight_decay: f32,
    },
    #[serde(rename = "adamw")]
    AdamW {
        lr: f32,
        beta1: f32,
        beta2: f32,
        eps: f32,
        weight_decay: f32,
    },
    Adagrad {
        lr: f32,
        lr_decay: f32,
        eps: f32,
        weight_decay: f32,
        initial_accumulator: f32,
    },
    Lion {
        lr: f32,
        beta1: f32,
        beta2: f32,
        weight_decay: f32,
    },
    #[serde(rename = "rmsprop")]
    RmsProp {
        lr: f32,
        alpha: f32,
        eps: f32,
        momentum: f32,
        centered: bool,
        weight_decay: f32,
    },
}

/// `train.tables`: what is done with sparse tables.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tables {
    pub optimizer: RowOptimizer,
    /// Bytes that rows and their state may take in the coordinator.
    #[serde(skip)]
    pub memory: u64,
}

impl Train {
    /// What is done with sparse tables.
    pub fn tables(&self) -> Tables {
        self.tables.clone().unwrap_or_default()
    }
}

impl Default for Tables {
    fn default() -> Tables {
        let optimizer = RowOptimizer::Adagrad { lr: 0.01, eps: 1e-10, initial_accumulator: 0.0 };
        Tables { optimizer, memory: 4 << 30 }
    }
}

/// Optimizers of sparse tables, which change only rows that a step touches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum RowOptimizer {
    Sgd {
        lr: f32,
    },
    Adagrad {
        lr: f32,
        eps: f32,
        initial_accumulator: f32,
    },
    /// Adagrad with one accumulator for all of a row.
    RowAdagrad {
        lr: f32,
        eps: f32,
        initial_accumulator: f32,
    },
    LazyAdam {
        lr: f32,
        beta1: f32,
        beta2: f32,
        eps: f32,
    },
    /// FTRL-proximal; `lr` is the paper's alpha.
    Ftrl {
        lr: f32,
        beta: f32,
        l1: f32,
        l2: f32,
    },
}

impl RowOptimizer {
    /// Names of what it remembers of a row with `width` values, and how many values each has.
    pub fn slots(&self, width: usize) -> Vec<(&'static str, usize)> {
        match self {
            RowOptimizer::Sgd { .. } => vec![],
            RowOptimizer::Adagrad { .. } => vec![("sum", width)],
            RowOptimizer::RowAdagrad { .. } => vec![("sum", 1)],
            RowOptimizer::LazyAdam { .. } => vec![("exp_avg", width), ("exp_avg_sq", width)],
            RowOptimizer::Ftrl { .. } => vec![("z", width), ("n", width)],
        }
    }
}

/// The factor on the base learning rate, as a function of the step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    pub kind: ScheduleKind,
    /// Linear rise from `lr / warmup_steps` over the first steps; the main schedule starts after it.
    pub warmup_steps: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum ScheduleKind {
    Constant,
    /// `gamma^(step / every)`.
    Step {
        every: u64,
        gamma: f64,
    },
    MultiStep {
        milestones: Vec<u64>,
        gamma: f64,
    },
    Exponential {
        gamma: f64,
    },
    /// From 1 to `min_factor` over the run.
    Cosine {
        min_factor: f64,
    },
    Linear {
        end_factor: f64,
    },
    Polynomial {
        power: f64,
        end_factor: f64,
    },
    /// PyTorch's OneCycleLR: the base rate is `max_lr`.
    OneCycle {
        start_fraction: f64,
        div_factor: f64,
        final_div_factor: f64,
    },
    InverseSqrt,
    /// Multiply by `factor` when the evaluation metric has not improved for `patience` evaluations.
    Plateau {
        factor: f64,
        patience: u64,
        threshold: f64,
        metric: Metric,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    Loss,
    Accuracy,
    Auc,
    Rmse,
    Mae,
    Perplexity,
    BitsPerCharacter,
}

impl Metric {
    /// Whether a larger value is better.
    pub fn maximize(self) -> bool {
        matches!(self, Metric::Accuracy | Metric::Auc)
    }

    /// As the job file has it.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Loss => "loss",
            Metric::Accuracy => "accuracy",
            Metric::Auc => "auc",
            Metric::Rmse => "rmse",
            Metric::Mae => "mae",
            Metric::Perplexity => "perplexity",
            Metric::BitsPerCharacter => "bits-per-character",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlyStopping {
    pub metric: Metric,
    /// Evaluations without improvement before the run ends.
    pub patience: u64,
    pub min_delta: f64,
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Relative to the working directory; default `runs/NAME`.
    pub dir: String,
    pub every_steps: u64,
    pub keep: usize,
}

impl Job {
    /// Digest of everything that decides the result: seed, data, model and train; not the name, nor folders, nor how the
    /// data gets to the workers.
    pub fn digest(&self) -> [u8; 32] {
        let decisive = (self.seed, &self.data, &self.model, &self.train);
        *blake3::hash(&serde_json::to_vec(&decisive).expect("a job is plain data")).as_bytes()
    }
}
