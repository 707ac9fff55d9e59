//! Data sets in memory, and the batches made of them.
//!
//! | module | what it reads or does |
//! | --- | --- |
//! | `dataset`, `batch` | samples as they were read; those of a step, as a model takes them |
//! | `files` | where a job's files are, and which may be read |
//! | `digits` | the embedded UCI digits |
//! | `idx` | IDX files, gzipped or not (MNIST's format) |
//! | `cifar` | the binary files of CIFAR-10 and CIFAR-100 |
//! | `images`, `picture` | folders of PNG and JPEG files, and one of these |
//! | `augment` | pictures that are a little different in each epoch |
//! | [`table`] | CSV, JSON lines and Parquet: numbers, and categories one-hot encoded |
//! | `bad` | rows and pictures that are left out |
//! | [`libsvm`] | lines of features that are not 0 |
//! | `interactions` | users, items, ratings and times |
//! | `implicit` | items that users did not take, beside what they took |
//! | `text` | windows of plain text, as tokens |
//! | [`id`] | what the ids are that choose rows of sparse tables |
//! | [`tokenizer`] | from text to tokens, and back |
//! | `synthetic`, `clicks`, `ratings` | samples made from a seed, for measuring; those with ids |
//! | [`partition`] | which samples belong to which partition and step |
//!
//! A format yields raw samples; [`open`] learns from the training set how they are normalised ([`Prepared`]).

mod augment;
mod bad;
mod batch;
mod cifar;
mod clicks;
mod dataset;
mod digits;
mod error;
mod files;
pub mod id;
mod idx;
mod images;
mod implicit;
mod interactions;
pub mod libsvm;
pub mod partition;
pub mod picture;
mod ratings;
mod synthetic;
pub mod table;
mod text;
pub mod tokenizer;

pub use augment::Draw;
pub use bad::Skipped;
pub use batch::Batch;
pub use dataset::{Dataset, Features, Ids, Targets};
pub use error::DataError;
pub use files::Files;
pub use id::IdField;
pub use implicit::{Candidates, Seen};
pub use tokenizer::Tokenizer;

use crate::extend::{self, Place, Samples};
use crate::job;
use crate::model::Signature;
use crate::rng::Key;
use implicit::MOST_ITEMS;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

/// What is learnt from the training set and belongs to the model: how raw features become inputs. Kept in checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prepared {
    pub shape: Vec<usize>,
    /// `None` for regression.
    pub classes: Option<Vec<String>>,
    /// `input = (raw - mean[f]) * inv_std[f]`; one entry for all features, one a channel of pictures, or one a feature.
    pub mean: Vec<f32>,
    pub inv_std: Vec<f32>,
    pub train_samples: u64,
    pub test_samples: u64,
    /// blake3 of the raw samples of both splits, hex: a worker that reads other data is noticed.
    pub digest: String,
    /// For tables: how columns become features.
    pub columns: Vec<Column>,
    /// For tables: the text that stands for a missing value (an empty cell always does).
    #[serde(default)]
    pub missing: String,
    /// Where samples are tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Tokens>,
    /// What the ids of samples are; none in most data sets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<IdField>,
    /// Where feedback is implicit; there are two ids then, of users and of items.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub implicit: Option<Candidates>,
    /// Where ids are the features that a sample has, in any place, each with its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparse: Option<Sparse>,
    /// Whether samples have weights.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub weighted: bool,
}

/// Features of which a sample has a few: ids, whose rows are multiplied by the features' values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sparse {
    /// Features of a sample, at most; others are filled up with ids that are none.
    pub fields: usize,
    /// The largest number of a feature; `None`: any of 64 bits.
    pub size: Option<u64>,
}

/// Samples that are tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tokens {
    /// How they were text; synthetic ones never were.
    pub tokenizer: Option<Tokenizer>,
    /// How many different ones there are.
    pub vocabulary: usize,
    /// In the text that is tested (or in the training text, where none is).
    pub tokens_per_character: f64,
    /// Where each sample is a text of its own: token 0 is none, and others are one more than their tokenizer says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<TextColumn>,
}

/// The column whose texts are samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TextColumn {
    pub name: String,
    /// Whether longer texts lose their end.
    pub truncate: bool,
}

/// One column of a table: a number, or a categorical value one-hot encoded over `values` (an unknown value is all zeros).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Column {
    pub name: String,
    /// `None`: numeric, with the training set's mean for missing cells.
    pub values: Option<Vec<String>>,
    pub fill: f32,
    /// Whether its logarithm is taken (`fill` is one already).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub log: bool,
}

/// A job's data, read and ready for batches; cheap to clone.
#[derive(Clone, Debug)]
pub struct Opened {
    pub train: Arc<Dataset>,
    pub test: Option<Arc<Dataset>>,
    pub prepared: Prepared,
    /// What was left out, where the job allows that.
    pub skipped: Option<Skipped>,
}

/// What a format yields: both splits, and how they may be normalised.
struct Raw {
    train: Dataset,
    test: Option<Dataset>,
    classes: Option<Vec<String>>,
    columns: Vec<Column>,
    missing: String,
    tokens: Option<Tokens>,
    ids: Vec<IdField>,
    implicit: Option<Candidates>,
    sparse: Option<Sparse>,
    skipped: Option<Skipped>,
    scale: Scale,
}

/// How features are brought to a common scale.
struct Scale {
    /// Each feature has its own statistics; otherwise, as for the pixels of an image, all of a channel share one mean and
    /// deviation.
    per_feature: bool,
    /// Where data are not normalised, inputs are `raw * unit`.
    unit: f32,
}

/// Tokens of a sample, and of a vocabulary, at most: the latter are whole numbers in 32 bits' floats.
pub(crate) const MOST_CONTEXT: usize = 1 << 20;
pub(crate) const MOST_TOKENS: usize = 1 << 24;

/// Reads the data of a job.
pub fn open(files: &Files, data: &job::Data, seed: u64) -> Result<Opened, DataError> {
    open_as(files, data, seed, None)
}

/// [`open`], for a model that was prepared already: texts become its tokens, and samples have as many ids as its have.
pub fn open_as(files: &Files, data: &job::Data, seed: u64, known: Option<&Prepared>) -> Result<Opened, DataError> {
    let tokenizer = known.and_then(|known| known.tokens.as_ref()?.tokenizer.as_ref());
    let raw = match &data.source {
        job::Source::Digits => digits::read(seed),
        job::Source::Idx { train, test, classes } => idx::read(files, train, test.as_ref(), *classes)?,
        job::Source::Table(spec) => table::read(files, spec, seed, known, data.on_error)?,
        job::Source::LibSvm(spec) => {
            let fields = known.and_then(|known| Some(known.sparse.as_ref()?.fields));
            libsvm::read(files, spec, seed, fields, data.on_error)?
        }
        job::Source::Text(spec) => text::read(files, spec, tokenizer)?,
        job::Source::Cifar(spec) => cifar::read(files, spec)?,
        job::Source::Images(spec) => images::read(files, spec, seed, data.on_error)?,
        job::Source::Synthetic { task, shape, classes, samples, test_samples } => {
            synthetic::make(seed, *task, shape, *classes, *samples, *test_samples)?
        }
        job::Source::SyntheticText { vocabulary, context, samples, test_samples } => {
            synthetic::text(seed, *vocabulary, *context, *samples, *test_samples)?
        }
        job::Source::Added { base, name, options } => {
            let place = Place { seed, find: &|path| files.find(base, path) };
            let read = extend::data(name, options, &place);
            let samples = read.map_err(|source| DataError::Added { format: name.clone(), source })?;
            Raw::of_others(name, samples)?
        }
        job::Source::Clicks(spec) => clicks::make(seed, spec)?,
        job::Source::Ratings(spec) => ratings::make(seed, spec)?,
        job::Source::RatingFiles(spec) => interactions::read(files, spec, seed, data.on_error)?,
    };
    if let Some(augment) = data.augment {
        augment::check(augment, &raw.train.shape)?;
    }
    Ok(raw.prepare(data.normalize))
}

impl Raw {
    /// Of samples without columns and tokens.
    fn new(train: Dataset, test: Option<Dataset>, classes: Option<Vec<String>>, scale: Scale) -> Raw {
        let (columns, missing, ids) = (Vec::new(), String::new(), Vec::new());
        Raw {
            train,
            test,
            classes,
            columns,
            missing,
            tokens: None,
            ids,
            implicit: None,
            sparse: None,
            skipped: None,
            scale,
        }
    }

    /// Those of a format that the program has added, which are looked at like those that come from the wire.
    fn of_others(format: &str, Samples { train, test, classes }: Samples) -> Result<Raw, DataError> {
        let wrong = |why: String| DataError::Added { format: format.into(), source: why.into() };
        for data in [Some(&train), test.as_ref()].into_iter().flatten() {
            let same = Dataset::from_bytes(&data.to_bytes()).is_ok_and(|read| read == *data);
            let known = match (&data.targets, &classes) {
                (Targets::Class(labels), Some(names)) => labels.iter().all(|&class| (class as usize) < names.len()),
                (Targets::Value(_), None) => true,
                _ => false,
            };
            let kinds =
                |data: &Dataset| (data.ids.fields, std::mem::discriminant(&data.targets), data.weights.is_empty());
            let counts = data.weights.is_empty() || data.weights.iter().any(|weight| *weight > 0.0);
            let alike = data.shape == train.shape && kinds(data) == kinds(&train) && counts;
            let number = matches!(data.features, Features::U8(_) | Features::F32(_)) && data.ids.fields == 0;
            if !(same && known && alike && number && data.samples() > 0) {
                return Err(wrong(
                    "it gave samples that do not fit together: each set needs some, of one shape, with finite numbers or bytes \
                     for each, a value or one of the named classes to learn, and weights (not all 0) for all or for none"
                        .into(),
                ));
            }
        }
        let unit = if matches!(train.features, Features::U8(_)) { 1.0 / 255.0 } else { 1.0 };
        let per_feature = train.shape.len() == 1;
        Ok(Raw::new(train, test, classes, Scale { per_feature, unit }))
    }

    /// Learns the normalisation; there is at least one training sample.
    fn prepare(self, normalize: bool) -> Opened {
        let Raw { train, test, classes, columns, missing, tokens, ids, implicit, sparse, skipped, scale } = self;
        // How many statistics, and how many values that follow one another share them.
        let width = if scale.per_feature { train.sample_len() } else { channels(&train.shape) };
        let plane = train.sample_len() / width;
        let (mean, inv_std) = match &train.features {
            Features::U8(v) if normalize && tokens.is_none() => statistics(v, width, plane),
            Features::F32(v) if normalize => statistics(v, width, plane),
            Features::U8(_) | Features::F32(_) | Features::U32(_) => (vec![0.0], vec![scale.unit]),
        };
        let mut digest = blake3::Hasher::new();
        for split in [Some(&train), test.as_ref()].into_iter().flatten() {
            digest.update(&split.digest());
        }
        let prepared = Prepared {
            weighted: !train.weights.is_empty(),
            shape: match train.targets {
                Targets::Next => vec![train.sample_len() / 2],
                Targets::Class(_) | Targets::Value(_) | Targets::Seen(_) => train.shape.clone(),
            },
            classes,
            mean,
            inv_std,
            train_samples: train.samples() as u64,
            test_samples: test.as_ref().map_or(0, Dataset::samples) as u64,
            digest: digest.finalize().to_hex().to_string(),
            columns,
            missing,
            tokens,
            ids,
            implicit,
            sparse,
        };
        Opened { train: Arc::new(train), test: test.map(Arc::new), prepared, skipped }
    }
}

/// Channels of samples that are pictures; of others, 1.
fn channels(shape: &[usize]) -> usize {
    if let [channels, _, _] = shape { *channels } else { 1 }
}

/// Mean and inverse deviation of each of a sample's `width` runs of `plane` values, summed in f64 in the order of the samples.
///
/// Sums are of differences from the first sample, so that a constant feature has a deviation of exactly 0, for which
/// the inverse is 1.
fn statistics<T: Copy + Into<f64>>(values: &[T], width: usize, plane: usize) -> (Vec<f32>, Vec<f32>) {
    let samples = (values.len() / width) as f64;
    let first: Vec<f64> = values[..width * plane].iter().step_by(plane).map(|&x| x.into()).collect();
    let mut mean = vec![0.0f64; width];
    for row in values.chunks_exact(width * plane) {
        for ((sum, x), first) in mean.iter_mut().zip(row.chunks_exact(plane)).zip(&first) {
            x.iter().for_each(|&x| *sum += x.into() - first);
        }
    }
    for (mean, first) in mean.iter_mut().zip(&first) {
        *mean = first + *mean / samples;
    }
    let mut square = vec![0.0f64; width];
    for row in values.chunks_exact(width * plane) {
        for ((sum, x), mean) in square.iter_mut().zip(row.chunks_exact(plane)).zip(&mean) {
            for &x in x {
                let d = x.into() - mean;
                *sum += d * d;
            }
        }
    }
    let inverse = |square: f64| {
        let inverse = (1.0 / libm::sqrt(square / samples)) as f32;
        if inverse.is_finite() { inverse } else { 1.0 }
    };
    (mean.iter().map(|&m| m as f32).collect(), square.into_iter().map(inverse).collect())
}

impl Prepared {
    /// Whether its parts fit together, as they do where [`open`] made them.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self) -> Result<(), DataError> {
        let wrong = |what| Err(DataError::Encoded(what));
        let width = self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).unwrap_or(0);
        if self.shape.is_empty() || width == 0 {
            return wrong("a sample has no features");
        }
        if self.mean.len() != self.inv_std.len() || ![1, channels(&self.shape), width].contains(&self.mean.len()) {
            return wrong("their normalisation is of another shape");
        }
        if !crate::kernels::all_finite(&self.mean) || !crate::kernels::all_finite(&self.inv_std) {
            return wrong("their normalisation is not finite");
        }
        if !self.columns.is_empty() && self.columns.iter().map(Column::features).sum::<usize>() != width {
            return wrong("their columns are of another shape");
        }
        if let Some(Candidates { items, negatives, k, .. }) = self.implicit {
            let of_items = |field: &IdField| field.size == Some(items as u64) && field.first < 1 << 62;
            let of_items = self.ids.get(1).is_some_and(of_items);
            if self.ids.len() != 2 || !of_items || !(2..=MOST_ITEMS as u32).contains(&items) || negatives == 0 || k == 0
            {
                return wrong("their ids are not those of users and items");
            }
        }
        if self.sparse.is_some() && (!self.ids.is_empty() || self.id_fields() == 0) {
            return wrong("their sparse features are not ids alone");
        }
        match &self.tokens {
            Some(tokens)
                if self.shape.len() != 1
                    || self.shape[0] > MOST_CONTEXT
                    || !(1..=MOST_TOKENS).contains(&tokens.vocabulary)
                    || tokens.tokenizer.as_ref().is_some_and(|tokenizer| !tokenizer.is_sound())
                    || (&self.mean[..], &self.inv_std[..]) != (&[0.0], &[1.0]) =>
            {
                wrong("their tokens are not those of a text")
            }
            Some(Tokens { tokenizer: Some(tokenizer), vocabulary, column, .. })
                if tokenizer.vocabulary() + usize::from(column.is_some()) != *vocabulary =>
            {
                wrong("their tokenizer has other tokens")
            }
            _ => Ok(()),
        }
    }

    /// Whether each token's target is the next one.
    pub fn predicts_next(&self) -> bool {
        self.tokens.as_ref().is_some_and(|tokens| tokens.column.is_none())
    }

    /// Rows of sparse tables that all samples of a step ask for, at most.
    pub fn rows_of_a_step(&self, train: &job::Train) -> usize {
        let samples = (train.partitions as usize).saturating_mul(train.micro_batch).min(self.train_samples as usize);
        match self.implicit {
            // A user, and items.
            Some(candidates) => samples.saturating_mul(1 + candidates.rows(false)),
            None => samples.saturating_mul(self.id_fields()),
        }
    }

    /// Rows of a batch that a sample stands for, at most.
    pub fn rows_of_a_sample(&self, test: bool) -> usize {
        self.implicit.map_or(1, |candidates| candidates.rows(test))
    }

    /// Draws a sample's candidates beside its own item; none without a `draw`.
    fn candidates(&self, ids: &[u64], seen: &Seen, draw: Option<(Key, bool)>, out: &mut Vec<u32>) {
        out.clear();
        if let (Some(candidates), Some((key, test)), &[user, item]) = (self.implicit, draw, ids) {
            candidates.draw(seen.of(user), (item - self.ids[1].first) as u32, key, test, out);
        }
    }

    /// The id of an item by its number.
    pub fn item_id(&self, item: u32) -> u64 {
        self.ids[1].first + item as u64
    }

    /// Ids of a sample.
    pub fn id_fields(&self) -> usize {
        self.sparse.as_ref().map_or(self.ids.len(), |sparse| sparse.fields)
    }

    /// Targets of a sample.
    pub fn targets(&self) -> usize {
        if self.predicts_next() { self.shape[0] } else { 1 }
    }

    /// What a model for these samples takes and gives.
    pub fn signature(&self, loss: &job::Loss) -> Signature {
        let outputs = self.outputs(loss);
        let output = if self.predicts_next() { vec![self.shape[0], outputs] } else { vec![outputs] };
        let (vocabulary, causal) = (self.tokens.as_ref().map(|t| t.vocabulary), self.predicts_next());
        Signature { input: self.shape.clone(), ids: self.id_fields(), vocabulary, output, causal }
    }

    /// Whether samples that were sent are of the kind that was announced.
    ///
    /// # Errors
    /// What is different.
    pub fn check_samples(&self, data: &Dataset) -> Result<(), DataError> {
        let next = matches!(data.targets, Targets::Next);
        let shape = if next { vec![text::stored(self.shape[0])] } else { self.shape.clone() };
        let seen = if let Targets::Seen(seen) = &data.targets { Some(seen) } else { None };
        let same = next == self.predicts_next() && seen.is_some() == self.implicit.is_some();
        if data.shape != shape || !same || data.ids.fields != self.id_fields() {
            return Err(DataError::Encoded("they are of another shape or kind than was said"));
        }
        if let (Some(seen), Some(Candidates { items, .. })) = (seen, self.implicit) {
            let ids = self.ids[1].first..self.ids[1].first + items as u64;
            if !seen.fits(items) || !data.ids.values.iter().skip(1).step_by(2).all(|item| ids.contains(item)) {
                return Err(DataError::Encoded("an item is not one of the known"));
            }
        }
        if data.weights.is_empty() == (self.weighted && data.samples() > 0) {
            return Err(DataError::Encoded("they have weights, or have none, unlike what was said"));
        }
        if data.ids.factors.is_empty() == (self.sparse.is_some() && data.samples() > 0) {
            return Err(DataError::Encoded("their ids have values, or have none, unlike what was said"));
        }
        let vocabulary = self.tokens.as_ref().map_or(usize::MAX, |tokens| tokens.vocabulary);
        let known = match &data.features {
            Features::U8(v) => v.iter().all(|&token| (token as usize) < vocabulary),
            Features::U32(v) => self.tokens.is_some() && v.iter().all(|&token| (token as usize) < vocabulary),
            Features::F32(_) => self.tokens.is_none(),
        };
        if known { Ok(()) } else { Err(DataError::Encoded("a token is not one of the vocabulary")) }
    }

    /// The number of outputs of a model for one target; whether they fit the loss is the loss's to check.
    fn outputs(&self, loss: &job::Loss) -> usize {
        if let Some(tokens) = self.tokens.as_ref().filter(|_| self.predicts_next()) {
            return tokens.vocabulary;
        }
        match (loss, self.classes.as_ref().map_or(1, Vec::len)) {
            // What is wrong with it is said where it is built.
            (job::Loss::Added { name, options }, _) => {
                extend::loss(name, options).map_or(1, |loss| loss.outputs(self.classes.as_ref().map(Vec::len)))
            }
            (job::Loss::CrossEntropy { .. }, classes) => classes,
            (job::Loss::Hinge { .. } | job::Loss::Focal { .. }, classes) if classes > 2 => classes,
            (job::Loss::Hinge { .. } | job::Loss::Focal { .. } | job::Loss::BinaryCrossEntropy { .. }, _) => 1,
            (job::Loss::Mse | job::Loss::Mae | job::Loss::Huber { .. } | job::Loss::Bpr, _) => 1,
        }
    }
}

/// Opens a file, and unpacks it on the way where it is gzipped.
pub fn reader(path: &Path) -> io::Result<Box<dyn Read>> {
    let mut file = BufReader::with_capacity(1 << 16, File::open(path)?);
    let gzipped = file.fill_buf()?.starts_with(&[0x1f, 0x8b]);
    Ok(if gzipped { Box::new(flate2::bufread::MultiGzDecoder::new(file)) } else { Box::new(file) })
}

/// A whole file, without a byte order mark.
fn read_bytes(path: &Path) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    let read = reader(path).and_then(|mut file| file.read_to_end(&mut bytes));
    read.map_err(DataError::read(&path.display().to_string()))?;
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    Ok(bytes)
}

/// A whole file of text, without a byte order mark.
fn read_text(path: &Path) -> Result<String, DataError> {
    String::from_utf8(read_bytes(path)?).map_err(|e| {
        let line = 1 + newlines(&e.as_bytes()[..e.utf8_error().valid_up_to()]);
        DataError::NotText { path: path.display().to_string(), line }
    })
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&b| b == b'\n').count()
}

/// Class names for labels that are numbers.
fn numbered(classes: usize) -> Vec<String> {
    (0..classes).map(|c| c.to_string()).collect()
}

#[cfg(test)]
mod tests;
