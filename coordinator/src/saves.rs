//! The checkpoints of a run: what they hold besides weights and optimizer state, and when one is written, beside training.

use crate::files::{self, Writing};
use crate::shared::{Input, Shared};
use crate::store::Keep;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use unisono_common::checkpoint::Manifest;
use unisono_common::ids::Step;
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
    pub fn of(manifest: Manifest) -> anyhow::Result<Learning> {
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

    /// The manifest of a checkpoint, but for the digests of what is not written yet.
    fn manifest(&self, shared: &Shared, epoch: u64) -> anyhow::Result<Manifest> {
        let job = &shared.job;
        Ok(Manifest {
            digest: String::new(),
            format_version: files::FORMAT,
            name: job.name.clone(),
            job: job.clone(),
            job_digest: crate::hex(job.digest()),
            layout_digest: crate::hex(shared.model_digest),
            prepared: shared.prepared.clone(),
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
    /// The step of the one that is being written, or was written last, while that is all there is to keep of the step.
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

    /// There is more to keep of a step than what was written of it.
    pub fn outdated(&mut self) {
        self.at = None;
    }

    /// Begins to write what there is to keep between two steps; while one is being written, it is due after it. False, and none is
    /// begun, where a part of the next step has been applied already.
    ///
    /// # Errors
    /// Where there is no thread to write it, or the manifest cannot be made. That a checkpoint cannot be written comes as an
    /// [`Input::Saved`].
    pub fn begin(&mut self, shared: &Arc<Shared>, learning: &Learning, epoch: u64) -> anyhow::Result<bool> {
        self.again = self.is_writing;
        if self.is_writing {
            return Ok(true);
        }
        self.is_writing = true;
        let dir = match self.to_write(shared, learning.step) {
            Ok(dir) => dir,
            Err(saved) => {
                shared.input(Input::Saved(Ok(saved)));
                return Ok(true);
            }
        };
        self.at = Some(learning.step);
        match self.open(&dir, shared, learning.step) {
            Ok(Some(writing)) => {
                let (manifest, shared) = (learning.manifest(shared, epoch)?, shared.clone());
                std::thread::Builder::new().name("checkpoint".into()).spawn(move || {
                    shared.store.flush(&*writing);
                    shared.input(Input::Saved(writing.finish(manifest, shared.job.checkpoint.keep)));
                })?;
            }
            Ok(None) => {
                (self.is_writing, self.at) = (false, None);
                return Ok(false);
            }
            Err(e) => shared.input(Input::Saved(Err(e))),
        }
        Ok(true)
    }

    /// Where a checkpoint of `step` is to be written, or what is there instead.
    fn to_write(&self, shared: &Shared, step: Step) -> Result<PathBuf, Saved> {
        let Some(dir) = &self.dir else { return Err(Saved::default()) };
        if let Some(last) = self.last.as_ref().filter(|_| self.at == Some(step)) {
            return Err(last.clone());
        }
        if self.is_new && step.0 == 0 && files::are_there(dir) {
            // Nothing was learnt, and what an earlier run has learnt keeps its place.
            return Err((PathBuf::new(), shared.store.untrained(shared.job.seed)));
        }
        Ok(dir.clone())
    }

    /// Opens the checkpoint of `step`, to which the store promises its state, where it is whole.
    fn open(&mut self, dir: &Path, shared: &Shared, step: Step) -> anyhow::Result<Option<Arc<Writing>>> {
        if self.is_new
            && let Some(previous) = files::set_aside(dir)?
        {
            tracing::warn!("checkpoints of an earlier run are now in {}", previous.display());
        }
        self.is_new = false;
        let store = &shared.store;
        let slots = store.groups().optimizer().slot_names();
        let writing = Writing::begin(dir, step.0, store.layout().clone(), &slots, store.tables.as_ref())?;
        let writing = Arc::new(writing);
        if store.keep(step, &(writing.clone() as Arc<dyn Keep>)) {
            return Ok(Some(writing));
        }
        writing.abandon();
        Ok(None)
    }

    /// What came of the one that was being written.
    ///
    /// # Errors
    /// Why there is none.
    pub fn ended(&mut self, result: anyhow::Result<Saved>) -> anyhow::Result<()> {
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
