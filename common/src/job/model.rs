//! `[model]` as values.

use serde::{Deserialize, Serialize};

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
    /// One that the program has added ([`crate::extend`]).
    Added {
        name: String,
        options: serde_json::Value,
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
