//! The job: one TOML file, parsed once into values that are always right.
//!
//! [`parse`] reads TOML and reports file, line and the nearest known name; everything downstream takes a [`Job`] as it is.
//! To workers and into checkpoints goes the text ([`JobText`]), which whoever takes it parses again: there is no second way
//! in.

mod data;
mod model;
mod parse;
mod reader;
mod train;
pub use data::*;
pub use model::*;
pub(crate) use parse::ROW_BOUND;
pub use parse::{JobError, parse};
pub use reader::nearest;
pub use train::*;

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
