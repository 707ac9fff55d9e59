//! Samples in memory as they were read, and as bytes.

use super::{DataError, Seen};
use crate::kernels::fetch_all;
use std::ops::Range;
use std::sync::Arc;

/// The raw samples of one split, before normalisation; sample-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// One sample's shape: `[features]`, `[channels, height, width]`, or of tokens all that are stored of it.
    pub shape: Vec<usize>,
    pub features: Features,
    pub ids: Ids,
    pub targets: Targets,
    /// How much each sample counts in the loss, at least 0; empty where all count the same, as where samples have several targets.
    pub weights: Vec<f32>,
}

/// Ids of rows of sparse tables, `(samples, fields)`; no fields in most data sets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ids {
    pub fields: usize,
    pub values: Vec<u64>,
    /// What the row of each id is multiplied by; empty where all rows count as they are.
    pub factors: Vec<f32>,
}

impl Ids {
    /// Those of one sample.
    pub fn of(&self, sample: usize) -> &[u64] {
        &self.values[sample * self.fields..(sample + 1) * self.fields]
    }

    /// What their rows are multiplied by, if by anything.
    pub fn factors_of(&self, sample: usize) -> &[f32] {
        if self.factors.is_empty() {
            return &[];
        }
        &self.factors[sample * self.fields..(sample + 1) * self.fields]
    }
}

/// Feature values as they are stored: pixels stay bytes until a batch is made.
#[derive(Clone, Debug, PartialEq)]
pub enum Features {
    /// Pixels, or tokens of a small vocabulary.
    U8(Vec<u8>),
    F32(Vec<f32>),
    /// Tokens.
    U32(Vec<u32>),
}

impl Features {
    /// Asks for the values at `range`, which need not exist.
    pub(super) fn fetch(&self, range: Range<usize>) {
        match self {
            Features::U8(values) => fetch_all(values, range),
            Features::F32(values) => fetch_all(values, range),
            Features::U32(values) => fetch_all(values, range),
        }
    }
}

/// What is to be learnt of a data set's samples, or of those of a batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// Labels (classes `0..n`), one a sample of a data set, and one a target of a batch.
    Class(Vec<u32>),
    /// One a sample.
    Value(Vec<f32>),
    /// Of a data set of tokens: each token's target is the next one. In a batch they are classes.
    Next,
    /// Of a data set of implicit feedback, whose samples are users and what they took: what their users have in the training set.
    /// In a batch they are values, 1 for what a user took and 0 for each item that is drawn beside it.
    Seen(Arc<Seen>),
}

/// What the kind of targets is marked with, in bytes, where there are ids behind them.
const WITH_IDS: u8 = 0x80;
/// The same where each id has a factor.
const WITH_FACTORS: u8 = 0x40;
/// What it is marked with where each sample has a weight.
const WITH_WEIGHTS: u8 = 0x20;

/// Whether a sample can have this weight: what weights add up to has an inverse.
pub(super) fn is_weight(weight: f32) -> bool {
    weight == 0.0 || (weight > 1e-37 && weight.is_finite())
}

fn gather<T: Copy>(values: &[T], width: usize, rows: &[usize]) -> Vec<T> {
    let mut out = Vec::with_capacity(rows.len() * width);
    for &row in rows {
        out.extend_from_slice(&values[row * width..][..width]);
    }
    out
}

/// Splits `n` bytes off the front.
pub(super) fn take<'a>(rest: &mut &'a [u8], n: Option<usize>) -> Result<&'a [u8], DataError> {
    let (head, tail) = n.and_then(|n| rest.split_at_checked(n)).ok_or(DataError::Encoded("they end too early"))?;
    *rest = tail;
    Ok(head)
}

pub(super) fn take_size(rest: &mut &[u8]) -> Result<usize, DataError> {
    let mut size = [0; 8];
    size.copy_from_slice(take(rest, Some(8))?);
    usize::try_from(u64::from_le_bytes(size)).map_err(|_| DataError::Encoded("a size is too large"))
}

fn words<T>(bytes: &[u8], from: impl Fn([u8; 4]) -> T) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|&word| from(word)).collect()
}

fn put_words<T: Copy>(values: &[T], to: impl Fn(T) -> [u8; 4], put: &mut impl FnMut(&[u8])) {
    let mut block = [[0; 4]; 1024];
    for values in values.chunks(block.len()) {
        for (word, &value) in block.iter_mut().zip(values) {
            *word = to(value);
        }
        put(block[..values.len()].as_flattened());
    }
}

impl Dataset {
    /// Samples without ids that all count the same.
    pub fn new(shape: Vec<usize>, features: Features, targets: Targets) -> Dataset {
        Dataset { shape, features, ids: Ids::default(), targets, weights: Vec::new() }
    }

    /// Samples of two ids each, and of no numbers (of which a model takes one).
    pub(super) fn pairs(ids: Vec<u64>, targets: Targets) -> Dataset {
        let features = Features::F32(vec![0.0; ids.len() / 2]);
        let ids = Ids { fields: 2, values: ids, ..Ids::default() };
        Dataset { ids, ..Dataset::new(vec![1], features, targets) }
    }

    /// How many samples there are.
    pub fn samples(&self) -> usize {
        match &self.targets {
            Targets::Class(t) => t.len(),
            Targets::Value(t) => t.len(),
            Targets::Next => self.features.len() / self.sample_len(),
            Targets::Seen(_) => self.ids.values.len() / self.ids.fields,
        }
    }

    /// Features a sample.
    pub fn sample_len(&self) -> usize {
        self.shape.iter().product()
    }

    /// A copy of the given samples, in the given order.
    pub fn select(&self, rows: &[usize]) -> Dataset {
        let width = self.sample_len();
        Dataset {
            shape: self.shape.clone(),
            features: match &self.features {
                Features::U8(v) => Features::U8(gather(v, width, rows)),
                Features::F32(v) => Features::F32(gather(v, width, rows)),
                Features::U32(v) => Features::U32(gather(v, width, rows)),
            },
            ids: Ids {
                fields: self.ids.fields,
                values: gather(&self.ids.values, self.ids.fields, rows),
                factors: match &self.ids.factors[..] {
                    [] => Vec::new(),
                    factors => gather(factors, self.ids.fields, rows),
                },
            },
            targets: match &self.targets {
                Targets::Class(t) => Targets::Class(gather(t, 1, rows)),
                Targets::Value(t) => Targets::Value(gather(t, 1, rows)),
                Targets::Next => Targets::Next,
                Targets::Seen(seen) => Targets::Seen(seen.select(rows.iter().map(|row| self.ids.of(*row)[0])).into()),
            },
            weights: if self.weights.is_empty() { Vec::new() } else { gather(&self.weights, 1, rows) },
        }
    }

    /// The encoding, in pieces: kinds of features and targets (and whether there are ids), dimensions (a byte each), samples and
    /// shape (`u64`), features, targets; where there are ids, their fields (`u64`), the ids, and their factors if they have some;
    /// the weights if there are some; little-endian.
    fn encode(&self, mut put: impl FnMut(&[u8])) {
        let features = match self.features {
            Features::U8(_) => 0,
            Features::F32(_) => 1,
            Features::U32(_) => 2,
        };
        let targets = match self.targets {
            Targets::Class(_) => 0,
            Targets::Value(_) => 1,
            Targets::Next => 2,
            Targets::Seen(_) => 3,
        };
        let ids = if self.ids.fields > 0 { WITH_IDS } else { 0 };
        let factors = if self.ids.factors.is_empty() { 0 } else { WITH_FACTORS };
        let weights = if self.weights.is_empty() { 0 } else { WITH_WEIGHTS };
        put(&[features, targets | ids | factors | weights, self.shape.len() as u8]);
        for size in std::iter::once(self.samples()).chain(self.shape.iter().copied()) {
            put(&(size as u64).to_le_bytes());
        }
        match &self.features {
            Features::U8(v) => put(v),
            Features::F32(v) => put_words(v, f32::to_le_bytes, &mut put),
            Features::U32(v) => put_words(v, u32::to_le_bytes, &mut put),
        }
        match &self.targets {
            Targets::Class(t) => put_words(t, u32::to_le_bytes, &mut put),
            Targets::Value(t) => put_words(t, f32::to_le_bytes, &mut put),
            Targets::Next => {}
            Targets::Seen(seen) => seen.encode(&mut put),
        }
        if self.ids.fields > 0 {
            put(&(self.ids.fields as u64).to_le_bytes());
            self.ids.values.iter().for_each(|id| put(&id.to_le_bytes()));
            put_words(&self.ids.factors, f32::to_le_bytes, &mut put);
        }
        put_words(&self.weights, f32::to_le_bytes, &mut put);
    }

    /// The data set as bytes, the same on every machine.
    pub fn to_bytes(&self) -> Vec<u8> {
        let features = match &self.features {
            Features::U8(v) => v.len(),
            Features::F32(_) | Features::U32(_) => 4 * self.features.len(),
        };
        let ids = 8 * (1 + self.ids.values.len()) + 4 * self.ids.factors.len();
        let targets = 4 * (self.samples() + self.weights.len());
        let mut bytes = Vec::with_capacity(3 + 8 * (1 + self.shape.len()) + features + targets + ids);
        self.encode(|piece| bytes.extend_from_slice(piece));
        bytes
    }

    /// Reads what [`Dataset::to_bytes`] wrote; `bytes` may be anything, and memory is taken only for what is there.
    ///
    /// Whether shape and classes are those of the job is the caller's to check.
    pub fn from_bytes(bytes: &[u8]) -> Result<Dataset, DataError> {
        let mut rest = bytes;
        let kinds = take(&mut rest, Some(3))?;
        let samples = take_size(&mut rest)?;
        let shape = (0..kinds[2]).map(|_| take_size(&mut rest)).collect::<Result<Vec<usize>, DataError>>()?;
        if shape.is_empty() || shape.contains(&0) {
            return Err(DataError::Encoded("a sample has no features"));
        }
        // The width is checked apart: without samples, nothing else would find it too large.
        let width = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let values = width.ok_or(DataError::Encoded("a size is too large"))?.checked_mul(samples);
        let features = match kinds[0] {
            0 => Features::U8(take(&mut rest, values)?.to_vec()),
            1 => Features::F32(words(take(&mut rest, values.and_then(|n| n.checked_mul(4)))?, f32::from_le_bytes)),
            2 => Features::U32(words(take(&mut rest, values.and_then(|n| n.checked_mul(4)))?, u32::from_le_bytes)),
            _ => return Err(DataError::Encoded("the kind of features is unknown")),
        };
        let targets = match kinds[1] & !(WITH_IDS | WITH_FACTORS | WITH_WEIGHTS) {
            0 => Targets::Class(words(take(&mut rest, samples.checked_mul(4))?, u32::from_le_bytes)),
            1 => Targets::Value(words(take(&mut rest, samples.checked_mul(4))?, f32::from_le_bytes)),
            2 => Targets::Next,
            3 if kinds[1] & WITH_IDS != 0 => Targets::Seen(Seen::decode(&mut rest)?.into()),
            _ => return Err(DataError::Encoded("the kind of targets is unknown")),
        };
        let mut ids = Ids::default();
        if kinds[1] & WITH_IDS != 0 {
            ids.fields = take_size(&mut rest)?;
            if ids.fields == 0 {
                return Err(DataError::Encoded("a sample has no ids"));
            }
            let count = ids.fields.checked_mul(samples);
            let all = take(&mut rest, count.and_then(|n| n.checked_mul(8)))?.as_chunks().0;
            ids.values = all.iter().map(|id| u64::from_le_bytes(*id)).collect();
            if kinds[1] & WITH_FACTORS != 0 {
                ids.factors = words(take(&mut rest, count.and_then(|n| n.checked_mul(4)))?, f32::from_le_bytes);
            }
        }
        if kinds[1] & WITH_FACTORS != 0 && ids.factors.is_empty() {
            return Err(DataError::Encoded("there are no ids for factors"));
        }
        let mut weights = Vec::new();
        if kinds[1] & WITH_WEIGHTS != 0 {
            if !matches!(targets, Targets::Class(_) | Targets::Value(_)) {
                return Err(DataError::Encoded("there are weights for several targets a sample"));
            }
            weights = words(take(&mut rest, samples.checked_mul(4))?, f32::from_le_bytes);
            if weights.is_empty() {
                return Err(DataError::Encoded("there are no samples for weights"));
            }
            if !weights.iter().all(|weight| is_weight(*weight)) {
                return Err(DataError::Encoded("a weight is neither 0 nor a finite number above 1e-37"));
            }
        }
        if !rest.is_empty() {
            return Err(DataError::Encoded("they go on after their end"));
        }
        let finite = |values: &Vec<f32>| crate::kernels::all_finite(values);
        if !finite(&ids.factors)
            || matches!(&features, Features::F32(v) if !finite(v))
            || matches!(&targets, Targets::Value(v) if !finite(v))
        {
            return Err(DataError::Encoded("a value is not finite"));
        }
        Ok(Dataset { shape, features, ids, targets, weights })
    }

    /// blake3 of [`Dataset::to_bytes`], without the copy.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        self.encode(|piece| {
            hasher.update(piece);
        });
        *hasher.finalize().as_bytes()
    }
}

impl Features {
    /// Values of all samples together.
    pub(super) fn len(&self) -> usize {
        match self {
            Features::U8(v) => v.len(),
            Features::F32(v) => v.len(),
            Features::U32(v) => v.len(),
        }
    }
}

impl Targets {
    /// Those of a batch of no samples.
    pub(super) fn of_batch(&self) -> Targets {
        match self {
            Targets::Class(_) | Targets::Next => Targets::Class(Vec::new()),
            Targets::Value(_) | Targets::Seen(_) => Targets::Value(Vec::new()),
        }
    }
}
