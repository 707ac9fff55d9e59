//! The checkpoints of a run: what they hold besides weights and optimizer state, and when one is written, beside training.

use crate::files::{self, Writing};
use crate::shared::{Input, Shared};
use crate::store::Keep;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::sync::Arc;
use unisono_common::checkpoint::Manifest;
use unisono_common::data::Prepared;
use unisono_common::ids::Step;
use unisono_common::job::Job;
use unisono_common::metrics::EvalSummary;
use unisono_common::schedule::{EarlyState, PlateauState};

/// What training remembers besides weights and optimizer state.
#[derive(Clone, Default)]
pub struct Learning {
    pub step: Step,
    pub samples: u64,
    pub train_loss: f64,
    pub plateau: PlateauState,
    pub early: EarlyState,
    pub eval: Option<EvalSummary>,
    /// The step of the last evaluation that schedule and early stopping have seen.
    pub evaluated: Option<u64>,
}

impl Learning {
    /// As a checkpoint holds it.
    ///
    /// # Errors
    /// Where it is of another form.
    pub fn of(manifest: Manifest) -> Result<Learning> {
        Ok(Learning {
            step: Step(manifest.step),
            samples: manifest.samples,
            train_loss: manifest.train_loss,
            plateau: serde_json::from_value(manifest.plateau)?,
            early: serde_json::from_value(manifest.early)?,
            eval: serde_json::from_value(manifest.eval)?,
            evaluated: manifest.evaluated,
        })
    }

    /// The manifest of a checkpoint of a model whose layout has the digest `model`, but for the digests of what is not written yet.
    pub fn manifest(&self, job: &Job, prepared: &Prepared, model: [u8; 32], epoch: u64) -> Result<Manifest> {
        Ok(Manifest {
            digest: String::new(),
            format_version: files::FORMAT,
            name: job.name.clone(),
            job: job.clone(),
            job_digest: crate::hex(job.digest()),
            layout_digest: crate::hex(model),
            prepared: prepared.clone(),
            step: self.step.0,
            epoch,
            samples: self.samples,
            weights_digest: String::new(),
            evaluated: self.evaluated,
            plateau: serde_json::to_value(&self.plateau)?,
            early: serde_json::to_value(&self.early)?,
            train_loss: self.train_loss,
            eval: serde_json::to_value(&self.eval)?,
            files: Default::default(),
        })
    }
}

/// A whole checkpoint: its folder, and the digest of its weights.
pub type Saved = (PathBuf, String);

/// Writes checkpoints, one at a time; what comes of each is an [`Input::Saved`].
pub struct Saves {
    /// Where they are written; `None` where nothing is kept.
    dir: Option<PathBuf>,
    is_writing: bool,
    /// Whether another is to be written after the one that is.
    again: bool,
    last: Option<Saved>,
    /// The step of the one that is being written, or was written last; nothing where that failed, or the step was tested since.
    at: Option<Step>,
    /// Whether the run began afresh and has not written one yet: those of an earlier run are where they were.
    is_new: bool,
}

impl Saves {
    /// Of a run that begins, or goes on from the checkpoint `last` of a step.
    pub fn new(dir: Option<PathBuf>, last: Option<(Saved, Step)>) -> Saves {
        let (last, at) = last.unzip();
        Saves { dir, is_writing: false, again: false, is_new: last.is_none(), last, at }
    }

    /// The last whole one.
    pub fn last(&self) -> Option<&Saved> {
        self.last.as_ref()
    }

    pub fn is_writing(&self) -> bool {
        self.is_writing
    }

    /// Whether one waited for another, which is written.
    pub fn is_due(&self) -> bool {
        self.again && !self.is_writing
    }

    /// A step was tested, which the checkpoint of it does not know.
    pub fn outdated(&mut self) {
        self.at = None;
    }

    /// Begins to write what there is to keep between two steps; while one is being written, it is due after it. False, and none is
    /// begun, where a part of the next step has been applied already. What cannot be written comes as an [`Input::Saved`].
    pub fn begin(&mut self, shared: &Arc<Shared>, learning: &Learning, epoch: u64) -> bool {
        self.again = self.is_writing;
        if self.is_writing {
            return true;
        }
        self.is_writing = true;
        if let Some(saved) = self.there(shared, learning.step) {
            shared.input(Input::Saved(Ok(saved)));
            return true;
        }
        self.at = Some(learning.step);
        match self.write(shared, learning, epoch) {
            Ok(true) => {}
            Ok(false) => {
                (self.is_writing, self.at) = (false, None);
                return false;
            }
            Err(e) => shared.input(Input::Saved(Err(e))),
        }
        true
    }

    /// What there is of `step` already, where it need not be written.
    fn there(&self, shared: &Shared, step: Step) -> Option<Saved> {
        let Some(dir) = &self.dir else { return Some(Saved::default()) };
        if self.at == Some(step) && self.last.is_some() {
            return self.last.clone();
        }
        // Where nothing was learnt, what an earlier run has learnt keeps its place.
        let untouched = self.is_new && step.0 == 0 && files::are_there(dir);
        untouched.then(|| (PathBuf::new(), shared.store.untrained(shared.job.seed)))
    }

    /// Writes a checkpoint on a thread of its own, where the store can promise the state at the beginning of the step.
    fn write(&mut self, shared: &Arc<Shared>, learning: &Learning, epoch: u64) -> Result<bool> {
        let dir = self.dir.as_deref().context("there is no folder for checkpoints")?;
        let manifest = learning.manifest(&shared.job, &shared.prepared, shared.model_digest, epoch)?;
        if self.is_new
            && let Some(previous) = files::set_aside(dir)?
        {
            tracing::warn!("checkpoints of an earlier run are now in {}", previous.display());
        }
        self.is_new = false;
        let (shared, step) = (shared.clone(), learning.step);
        let store = &shared.store;
        let slots = store.groups().optimizer().slot_names();
        let writing = Writing::begin(dir, step.0, store.layout().clone(), &slots, store.tables.as_ref())?;
        let writing = Arc::new(writing);
        if !store.keep(step, &(writing.clone() as Arc<dyn Keep>)) {
            writing.abandon();
            return Ok(false);
        }
        std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
            shared.store.flush(&*writing);
            shared.input(Input::Saved(writing.finish(manifest, shared.job.checkpoint.keep)));
        })?;
        Ok(true)
    }

    /// What came of the one that was being written.
    ///
    /// # Errors
    /// Why there is none.
    pub fn ended(&mut self, result: Result<Saved>) -> Result<()> {
        self.is_writing = false;
        match result {
            Ok(saved) => self.last = Some(saved),
            Err(e) => {
                self.at = None;
                return Err(e);
            }
        }
        Ok(())
    }
}
