//! Data sets in memory, and the batches made of them.

use serde::{Deserialize, Serialize};

/// The raw samples of one split, before normalisation; sample-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// One sample's shape: `[features]`, or `[channels, height, width]`.
    pub shape: Vec<usize>,
    pub features: Features,
    pub targets: Targets,
}

/// Feature values as they are stored: pixels stay bytes until a batch is made.
#[derive(Clone, Debug, PartialEq)]
pub enum Features {
    U8(Vec<u8>),
    F32(Vec<f32>),
}

/// Labels (classes `0..n`) or values, one a sample.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    Class(Vec<u32>),
    Value(Vec<f32>),
}

/// What is learnt from the training set and belongs to the model: how raw features become inputs. Kept in checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prepared {
    pub shape: Vec<usize>,
    /// `None` for regression.
    pub classes: Option<Vec<String>>,
    /// `input = (raw - mean[f]) * inv_std[f]`; one entry for all features, or one a feature.
    pub mean: Vec<f32>,
    pub inv_std: Vec<f32>,
    pub train_samples: u64,
    pub test_samples: u64,
    /// blake3 of the raw samples of both splits, hex: a worker that reads other data is noticed.
    pub digest: String,
    /// For CSV: how columns become features.
    pub columns: Vec<Column>,
}

/// One CSV column: a number, or a categorical value one-hot encoded over `values` (an unknown value is all zeros).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    pub name: String,
    /// `None`: numeric, with the training set's mean for missing cells.
    pub values: Option<Vec<String>>,
    pub fill: f32,
}

/// A contiguous batch: inputs `(samples, features)` row-major, and targets.
#[derive(Clone, Debug)]
pub struct Batch {
    pub inputs: Vec<f32>,
    pub targets: Targets,
    pub samples: usize,
}
