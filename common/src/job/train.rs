//! `[train]` as values.

use serde::{Deserialize, Serialize};

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Train {
    pub partitions: u32,
    pub micro_batch: usize,
    pub length: Length,
    pub loss: Loss,
    pub optimizer: Optimizer,
    /// Parameters with settings of their own, each those of the first group that it belongs to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Group>,
    /// What an exponential moving average of the weights keeps of itself in a step, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<f32>,
    /// Passes that a worker computes its share of a step in; the result does not depend on it.
    #[serde(skip)]
    pub accumulate: u32,
    /// `None`: [`Tables::default`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tables: Option<Tables>,
    pub schedule: Schedule,
    pub clip_norm: Option<f32>,
    pub clip_value: Option<f32>,
    /// Evaluate on the test set every so many steps; `None`: after each epoch. The end is always evaluated.
    pub eval_every: Option<u64>,
    pub early_stopping: Option<EarlyStopping>,
    /// How many classes a sample's own may be among, where that is measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
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
    CrossEntropy {
        label_smoothing: f32,
        class_weights: Option<Vec<f32>>,
    },
    BinaryCrossEntropy {
        positive_weight: f32,
    },
    Mse,
    Mae,
    Huber {
        delta: f32,
    },
    Hinge {
        class_weights: Option<Vec<f32>>,
    },
    Focal {
        gamma: f32,
        class_weights: Option<Vec<f32>>,
    },
    /// One that the program has added ([`crate::extend`]).
    Added {
        name: String,
        options: serde_json::Value,
    },
    /// Bayesian personalised ranking, of implicit feedback.
    Bpr,
}

/// Parameters, and what is different for them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Group {
    /// "biases", "norms", "embeddings", and names of tensors, in which `*` stands for any text.
    pub params: Vec<String>,
    pub lr: Option<f32>,
    pub weight_decay: Option<f32>,
}

/// With exactly PyTorch's definitions and defaults; Lion and Lamb with those of their papers.
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
    /// AdamW's direction, and a step along it that is as long as the tensor, times the rate.
    Lamb {
        lr: f32,
        beta1: f32,
        beta2: f32,
        eps: f32,
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

impl Optimizer {
    /// Its rate and its weight decay.
    pub(crate) fn settings(&mut self) -> [&mut f32; 2] {
        match self {
            Optimizer::Sgd { lr, weight_decay, .. }
            | Optimizer::Adam { lr, weight_decay, .. }
            | Optimizer::AdamW { lr, weight_decay, .. }
            | Optimizer::Adagrad { lr, weight_decay, .. }
            | Optimizer::Lion { lr, weight_decay, .. }
            | Optimizer::Lamb { lr, weight_decay, .. }
            | Optimizer::RmsProp { lr, weight_decay, .. } => [lr, weight_decay],
        }
    }
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
    LogLoss,
    Accuracy,
    Auc,
    F1,
    TopKAccuracy,
    Rmse,
    Mae,
    R2,
    Perplexity,
    BitsPerCharacter,
    HitRate,
    Ndcg,
}

impl Metric {
    /// All of them, the default first.
    pub const ALL: [Metric; 13] = [
        Metric::Loss,
        Metric::LogLoss,
        Metric::Accuracy,
        Metric::Auc,
        Metric::F1,
        Metric::TopKAccuracy,
        Metric::Rmse,
        Metric::Mae,
        Metric::R2,
        Metric::Perplexity,
        Metric::BitsPerCharacter,
        Metric::HitRate,
        Metric::Ndcg,
    ];

    /// Whether a larger value is better.
    pub fn maximize(self) -> bool {
        !matches!(
            self,
            Metric::Loss | Metric::LogLoss | Metric::Rmse | Metric::Mae | Metric::Perplexity | Metric::BitsPerCharacter
        )
    }

    /// As the job file has it.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Loss => "loss",
            Metric::LogLoss => "log-loss",
            Metric::Accuracy => "accuracy",
            Metric::Auc => "auc",
            Metric::F1 => "f1",
            Metric::TopKAccuracy => "top-k-accuracy",
            Metric::Rmse => "rmse",
            Metric::Mae => "mae",
            Metric::R2 => "r2",
            Metric::Perplexity => "perplexity",
            Metric::BitsPerCharacter => "bits-per-character",
            Metric::HitRate => "hit-rate",
            Metric::Ndcg => "ndcg",
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
