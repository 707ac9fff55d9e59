//! Layers, losses and data formats that a program adds to those that are here: see `examples/custom-model`.
//!
//! They are named once, before the first job is read, and jobs use them as they use all others: `{ op = "NAME", ... }` among
//! `model.layers`, `train.loss = { kind = "NAME", ... }`, `data.format = "NAME"`. Their other keys are read by serde into a type
//! of theirs (`#[serde(deny_unknown_fields)]` makes a misspelt one an error). Coordinator and workers are the same program, so
//! each knows them. What they compute must be a function of what they are given: then the result depends on the workers as
//! little as ever.

use crate::data::{DataError, Dataset, Targets};
use crate::layers::Layer;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// The loss of one target.
pub trait TargetLoss: Send + Sync {
    /// The loss of `target`, and its gradient with respect to the model's outputs `x` for it into `d`, which is as long. What a
    /// sample weighs is no business of it: the mean over all targets is what training makes small.
    fn value(&self, x: &[f32], target: Target, d: &mut [f32]) -> f64;

    /// Outputs of a model for one target, of so many classes (`None`: of values).
    fn outputs(&self, classes: Option<usize>) -> usize {
        classes.unwrap_or(1)
    }

    /// Whether it is for such targets.
    ///
    /// # Errors
    /// What it needs instead, as in "needs values as targets".
    fn check(&self, targets: &Targets) -> Result<(), String>;
}

/// What is to be learnt of a sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// Its class, from 0 on.
    Class(u32),
    Value(f32),
}

/// What a data format gives.
pub struct Samples {
    pub train: Dataset,
    /// Of the same shape.
    pub test: Option<Dataset>,
    /// Names of the classes, where targets are some.
    pub classes: Option<Vec<String>>,
}

/// What a data format may look at beside its options.
pub struct Place<'a> {
    /// The job's.
    pub seed: u64,
    pub(crate) find: &'a dyn Fn(&str) -> Result<PathBuf, DataError>,
}

impl Place<'_> {
    /// A file of the job: in the folder that `UNISONO_DATA` names, or beside the job file.
    ///
    /// # Errors
    /// Where it is in neither; the message says where it was looked for.
    pub fn find(&self, path: &str) -> Result<PathBuf, DataError> {
        (self.find)(path)
    }
}

/// What reading data comes to; the error is shown with the format's name.
pub type Read = Result<Samples, Box<dyn Error + Send + Sync>>;

type Check = Box<dyn Fn(&Value) -> Result<(), String> + Send + Sync>;
type BuildLayer = Box<dyn Fn(&Value, &[usize]) -> Result<Box<dyn Layer>, String> + Send + Sync>;
type BuildLoss = Box<dyn Fn(&Value) -> Result<Arc<dyn TargetLoss>, String> + Send + Sync>;
type ReadData = Box<dyn Fn(&Value, &Place<'_>) -> Read + Send + Sync>;

/// What a program adds.
#[derive(Default)]
pub struct Extensions {
    layers: BTreeMap<&'static str, (Check, BuildLayer)>,
    losses: BTreeMap<&'static str, (Check, BuildLoss)>,
    formats: BTreeMap<&'static str, (Check, ReadData)>,
}

static ADDED: OnceLock<Extensions> = OnceLock::new();

/// What a job's keys are for one of them.
fn read<O: DeserializeOwned>(options: &Value) -> Result<O, String> {
    O::deserialize(options).map_err(|e| e.to_string())
}

fn check<O: DeserializeOwned>() -> Check {
    Box::new(|options| read::<O>(options).map(drop))
}

impl Extensions {
    /// Adds the layer `op`. `build` gives it for input samples of a shape, or says what it needs: "rows of an even width".
    pub fn layer<O, L>(mut self, op: &'static str, build: fn(O, &[usize]) -> Result<L, String>) -> Extensions
    where
        O: DeserializeOwned + 'static,
        L: Layer + 'static,
    {
        let built = move |options: &Value, shape: &[usize]| -> Result<Box<dyn Layer>, String> {
            Ok(Box::new(build(read(options)?, shape)?))
        };
        let before = self.layers.insert(op, (check::<O>(), Box::new(built)));
        assert!(before.is_none(), "the layer {op} is added twice");
        self
    }

    /// Adds the loss `kind`.
    pub fn loss<O, L>(mut self, kind: &'static str, build: fn(O) -> Result<L, String>) -> Extensions
    where
        O: DeserializeOwned + 'static,
        L: TargetLoss + 'static,
    {
        // What a loss is built of is all that can be wrong with it, so that a job says so at once.
        let check = move |options: &Value| build(read(options)?).map(drop);
        let built =
            move |options: &Value| -> Result<Arc<dyn TargetLoss>, String> { Ok(Arc::new(build(read(options)?)?)) };
        let before = self.losses.insert(kind, (Box::new(check), Box::new(built)));
        assert!(before.is_none(), "the loss {kind} is added twice");
        self
    }

    /// Adds the data format `format`. `read` is run by the coordinator, and by each worker that can; what it gives must be the
    /// same everywhere, which is checked.
    pub fn format<O: DeserializeOwned + 'static>(
        mut self,
        format: &'static str,
        read: fn(O, &Place<'_>) -> Read,
    ) -> Extensions {
        let data = move |options: &Value, place: &Place<'_>| read(self::read(options)?, place);
        let before = self.formats.insert(format, (check::<O>(), Box::new(data)));
        assert!(before.is_none(), "the format {format} is added twice");
        self
    }

    /// Makes them known to all of this process, once and before it reads a job.
    ///
    /// # Panics
    /// Where that was done before.
    pub fn add(self) {
        assert!(ADDED.set(self).is_ok(), "extensions are added once");
    }
}

/// The names of one kind that were added, and whether options of one are right.
pub(crate) struct Names {
    pub names: Vec<&'static str>,
    check: fn(&Extensions, &str, &Value) -> Option<Result<(), String>>,
}

impl Names {
    fn of<T>(
        map: fn(&Extensions) -> &BTreeMap<&'static str, T>,
        check: fn(&Extensions, &str, &Value) -> Option<Result<(), String>>,
    ) -> Names {
        Names { names: ADDED.get().map_or(Vec::new(), |added| map(added).keys().copied().collect()), check }
    }

    pub fn layers() -> Names {
        Names::of(|added| &added.layers, |added, name, options| Some(added.layers.get(name)?.0(options)))
    }

    pub fn losses() -> Names {
        Names::of(|added| &added.losses, |added, name, options| Some(added.losses.get(name)?.0(options)))
    }

    pub fn formats() -> Names {
        Names::of(|added| &added.formats, |added, name, options| Some(added.formats.get(name)?.0(options)))
    }

    /// Whether these are options of `name`, which is one of the names.
    pub fn check(&self, name: &str, options: &Value) -> Result<(), String> {
        ADDED.get().and_then(|added| (self.check)(added, name, options)).unwrap_or_else(|| Err(unknown(name)))
    }
}

fn unknown(name: &str) -> String {
    format!("this program does not know {name:?}: use the one that the job was made for")
}

pub(crate) fn layer(op: &str, options: &Value, shape: &[usize]) -> Result<Box<dyn Layer>, String> {
    let (_, build) = ADDED.get().and_then(|added| added.layers.get(op)).ok_or_else(|| unknown(op))?;
    build(options, shape)
}

pub(crate) fn loss(kind: &str, options: &Value) -> Result<Arc<dyn TargetLoss>, String> {
    let (_, build) = ADDED.get().and_then(|added| added.losses.get(kind)).ok_or_else(|| unknown(kind))?;
    build(options)
}

pub(crate) fn data(format: &str, options: &Value, place: &Place<'_>) -> Read {
    let (_, read) = ADDED.get().and_then(|added| added.formats.get(format)).ok_or_else(|| unknown(format))?;
    read(options, place)
}
