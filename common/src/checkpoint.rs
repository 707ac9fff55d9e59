//! Checkpoint bytes: what the files of a checkpoint hold. Where and how they are written is the coordinator's affair.

use crate::data::Prepared;
use crate::job::Job;
use crate::layout::{Layout, le_bytes};
use crate::rows::optim::RowOptimizer;
use crate::rows::{self, RowBlock, RowLayout};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::ops::Range;

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileDigest {
    pub bytes: u64,
    /// Hex.
    pub blake3: String,
}

/// Everything but tensors that the next step reads; written last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// blake3 (hex) of the manifest as compact JSON with this field empty.
    pub digest: String,
    pub format_version: u32,
    pub name: String,
    pub job: Job,
    pub job_digest: String,
    pub layout_digest: String,
    pub prepared: Prepared,
    /// The step that comes next; shuffle, dropout and schedule are functions of it.
    pub step: u64,
    pub epoch: u64,
    /// Samples that entered committed steps.
    pub samples: u64,
    pub weights_digest: String,
    /// The step of the last evaluation that schedule and early stopping have seen.
    pub evaluated: Option<u64>,
    pub plateau: serde_json::Value,
    pub early: serde_json::Value,
    pub train_loss: f64,
    pub eval: serde_json::Value,
    pub files: BTreeMap<String, FileDigest>,
}

impl Manifest {
    /// What `digest` must be.
    pub fn own_digest(&self) -> String {
        let bare = Manifest { digest: String::new(), ..self.clone() };
        blake3::hash(&serde_json::to_vec(&bare).expect("a manifest is plain data")).to_hex().to_string()
    }
}

/// Why a file of a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("the checkpoint is damaged: {0}")]
    Damaged(#[from] safetensors::SafeTensorError),
    #[error("the checkpoint has no tensor `{0}`: it belongs to another model or optimizer")]
    Missing(String),
    #[error(
        "tensor `{name}` of the checkpoint is {got:?} ({dtype:?}), this model's is {want:?} (F32): it belongs to another model"
    )]
    Shape { name: String, got: Vec<usize>, dtype: Dtype, want: Vec<usize> },
}

/// The beginning of a safetensors file of f32 tensors, whose values follow one another in this order. The values are not
/// here, so that a file can be written from wherever they are, without a second copy of the model.
fn header<'a>(tensors: impl Iterator<Item = (&'a str, &'a [usize])>) -> Vec<u8> {
    header_of(tensors.map(|(name, shape)| (name, "F32", 4, shape)))
}

/// The same of tensors of any type, of so many bytes a value.
fn header_of<'a>(tensors: impl Iterator<Item = (&'a str, &'a str, usize, &'a [usize])>) -> Vec<u8> {
    let (mut entries, mut at) = (serde_json::Map::new(), 0);
    for (name, dtype, bytes, shape) in tensors {
        let end = at + bytes * shape.iter().product::<usize>();
        entries.insert(name.into(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let mut text = serde_json::Value::Object(entries).to_string();
    // Readers map the values into memory: they begin at a multiple of eight.
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// The beginning of `weights.safetensors`: every tensor under its name, in PyTorch's shape. The flat vector follows.
pub fn weights_header(layout: &Layout) -> Vec<u8> {
    header(layout.tensors().map(|(t, _)| (t.name.as_str(), t.shape.as_slice())))
}

/// All of `weights.safetensors`.
pub fn weights_to_safetensors(layout: &Layout, weights: &[f32]) -> Vec<u8> {
    [&weights_header(layout), le_bytes(weights)].concat()
}

/// The beginning of `optimizer.safetensors`: each state vector, flat over the `len` trainable values. They follow.
pub fn state_header(len: usize, names: &[&str]) -> Vec<u8> {
    let shape = [len];
    header(names.iter().map(|name| (*name, shape.as_slice())))
}

/// `rows-NNNNN.safetensors`: ids (`u64`), each table's values, and what the optimizer remembers of them, a row an id.
pub fn rows_to_safetensors(layout: &RowLayout, optimizer: &RowOptimizer, block: &RowBlock) -> Vec<u8> {
    let rows = block.keys.len();
    let parts = row_parts(layout, optimizer);
    let shapes: Vec<(&str, [usize; 2])> = parts.iter().map(|(name, at)| (name.as_str(), [rows, at.len()])).collect();
    let ids = [rows];
    let values = shapes.iter().map(|(name, shape)| (*name, "F32", 4, &shape[..]));
    let mut bytes = header_of(std::iter::once((IDS, "U64", 8, &ids[..])).chain(values));
    bytes.reserve(rows * (8 + 4 * optimizer.row_len()));
    block.keys.iter().for_each(|key| bytes.extend_from_slice(&rows::id(*key).to_le_bytes()));
    for (_, at) in parts {
        for row in block.rows.chunks_exact(optimizer.row_len()) {
            bytes.extend_from_slice(le_bytes(&row[at.clone()]));
        }
    }
    bytes
}

/// Every tensor, and the rows of sparse tables (values without state): `ids`, and under each table's name a row an id.
pub fn with_rows_to_safetensors(layout: &Layout, weights: &[f32], tables: &RowLayout, rows: &RowBlock) -> Vec<u8> {
    let (count, width) = (rows.keys.len(), tables.width());
    let shapes: Vec<(&str, [usize; 2])> = tables.tables().map(|(t, _)| (t.name.as_str(), [count, t.width])).collect();
    let ids = [count];
    let dense = layout.tensors().map(|(t, _)| (t.name.as_str(), "F32", 4, t.shape.as_slice()));
    let of_tables = shapes.iter().map(|(name, shape)| (*name, "F32", 4, &shape[..]));
    // Ids come first, where every size keeps them aligned.
    let mut bytes = header_of(std::iter::once((IDS, "U64", 8, &ids[..])).chain(dense).chain(of_tables));
    rows.keys.iter().for_each(|key| bytes.extend_from_slice(&rows::id(*key).to_le_bytes()));
    bytes.extend_from_slice(le_bytes(weights));
    for (table, start) in tables.tables() {
        for row in rows.rows.chunks_exact(width) {
            bytes.extend_from_slice(le_bytes(&row[start..start + table.width]));
        }
    }
    bytes
}

/// Names, and places in a row, of all that is kept of it.
fn row_parts(layout: &RowLayout, optimizer: &RowOptimizer) -> Vec<(String, Range<usize>)> {
    let values = layout.tables().map(|(table, start)| (table.name.clone(), start..start + table.width));
    values.chain(optimizer.state(layout)).collect()
}

const IDS: &str = "ids";

/// The rows of such a file.
///
/// # Errors
/// As for [`weights_from_safetensors`].
pub fn rows_from_safetensors(
    layout: &RowLayout,
    optimizer: &RowOptimizer,
    bytes: &[u8],
) -> Result<RowBlock, CheckpointError> {
    let file = SafeTensors::deserialize(bytes)?;
    let ids = file.tensor(IDS).map_err(|_| CheckpointError::Missing(IDS.into()))?;
    let rows = ids.shape().first().copied().unwrap_or_default();
    if ids.dtype() != Dtype::U64 || ids.shape() != [rows] {
        let (got, dtype) = (ids.shape().to_vec(), ids.dtype());
        return Err(CheckpointError::Shape { name: IDS.into(), got, dtype, want: vec![rows] });
    }
    let keys = ids.data().as_chunks::<8>().0.iter().map(|id| rows::key(u64::from_le_bytes(*id))).collect();
    let len = optimizer.row_len();
    let mut block = RowBlock { keys, rows: vec![0.0; rows * len] };
    for (name, at) in row_parts(layout, optimizer) {
        let mut values = Vec::with_capacity(rows * at.len());
        read(&file, &name, &[rows, at.len()], &mut values)?;
        for (row, values) in block.rows.chunks_exact_mut(len).zip(values.chunks_exact(at.len().max(1))) {
            row[at.clone()].copy_from_slice(values);
        }
    }
    Ok(block)
}

fn read(file: &SafeTensors<'_>, name: &str, want: &[usize], out: &mut Vec<f32>) -> Result<(), CheckpointError> {
    let tensor = file.tensor(name).map_err(|_| CheckpointError::Missing(name.into()))?;
    if tensor.dtype() != Dtype::F32 || tensor.shape() != want {
        let (got, dtype) = (tensor.shape().to_vec(), tensor.dtype());
        return Err(CheckpointError::Shape { name: name.into(), got, dtype, want: want.into() });
    }
    out.extend(tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
    Ok(())
}

/// The flat vector from `weights.safetensors`.
///
/// # Errors
/// Damaged bytes, and tensors that are missing or of another shape.
pub fn weights_from_safetensors(layout: &Layout, bytes: &[u8]) -> Result<Vec<f32>, CheckpointError> {
    let file = SafeTensors::deserialize(bytes)?;
    let mut out = Vec::with_capacity(layout.len());
    for (t, _) in layout.tensors() {
        read(&file, &t.name, &t.shape, &mut out)?;
    }
    Ok(out)
}

/// The state vectors called `names`.
///
/// # Errors
/// As for [`weights_from_safetensors`].
pub fn state_from_safetensors(len: usize, names: &[&str], bytes: &[u8]) -> Result<Vec<Vec<f32>>, CheckpointError> {
    let file = SafeTensors::deserialize(bytes)?;
    let one = |name: &&str| {
        let mut out = Vec::with_capacity(len);
        read(&file, name, &[len], &mut out).map(|()| out)
    };
    names.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job;
    use crate::layout::{Init, Kind, Role, Tensor};
    use crate::rows::Table;

    #[test]
    fn weights_and_state_come_back_and_strangers_are_named() {
        let tensor = |name: &str, shape: &[usize]| Tensor {
            name: name.into(),
            shape: shape.into(),
            role: Role::Trainable,
            kind: Kind::Weight,
            init: Init::Normal { std: 1.0 },
        };
        let layout = Layout::new(vec![tensor("b.weight", &[3, 2]), tensor("a", &[5])]);
        let values = layout.init(3);
        let bytes = [&weights_header(&layout), le_bytes(&values)].concat();
        assert_eq!(weights_from_safetensors(&layout, &bytes).unwrap(), values);
        let other = Layout::new(vec![tensor("b.weight", &[2, 3])]);
        let error = weights_from_safetensors(&other, &bytes).unwrap_err().to_string();
        assert!(error.contains("b.weight") && error.contains("[3, 2]") && error.contains("[2, 3]"), "{error}");
        assert!(weights_from_safetensors(&layout, &bytes[..bytes.len() - 1]).is_err());
        let bytes = [&state_header(values.len(), &["exp_avg"]), le_bytes(&values)].concat();
        assert_eq!(state_from_safetensors(values.len(), &["exp_avg"], &bytes).unwrap(), [values]);
        assert!(state_from_safetensors(11, &["exp_avg_sq"], &bytes).is_err());
    }

    #[test]
    fn rows_come_back_with_their_state() {
        let table = |name: &str, width| Table { name: name.into(), width, init: Init::Constant(0.0) };
        let layout = RowLayout::new(vec![table("0.weight", 1), table("1.weight", 3)]);
        for (kind, state) in [
            (job::RowOptimizer::Sgd { lr: 1.0 }, 0),
            (job::RowOptimizer::RowAdagrad { lr: 1.0, eps: 1e-8, initial_accumulator: 0.0 }, 2),
            (job::RowOptimizer::Ftrl { lr: 1.0, beta: 1.0, l1: 0.0, l2: 0.0 }, 8),
        ] {
            let optimizer = RowOptimizer::new(&kind, &layout);
            assert_eq!(optimizer.row_len(), 4 + state);
            let keys: Vec<u64> = [5, 3, u64::MAX - 1].map(rows::key).to_vec();
            let block = RowBlock { rows: (0..3 * (4 + state)).map(|i| i as f32).collect(), keys };
            let bytes = rows_to_safetensors(&layout, &optimizer, &block);
            assert_eq!(rows_from_safetensors(&layout, &optimizer, &bytes).unwrap(), block);
            let file = SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(file.tensor("ids").unwrap().data()[..8], 5u64.to_le_bytes());
            assert_eq!(file.tensor("1.weight").unwrap().shape(), [3, 3]);
            let other = RowLayout::new(vec![table("0.weight", 2), table("1.weight", 3)]);
            assert!(rows_from_safetensors(&other, &RowOptimizer::new(&kind, &other), &bytes).is_err());
        }
    }
}
