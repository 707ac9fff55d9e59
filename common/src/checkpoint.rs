//! Checkpoint bytes: what the files of a checkpoint hold. Where and how they are written is the coordinator's affair.

use crate::data::Prepared;
use crate::job::Job;
use crate::layout::Layout;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;

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
    let (mut entries, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let end = at + 4 * shape.iter().product::<usize>();
        entries.insert(name.into(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [at, end] }));
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

/// The beginning of `optimizer.safetensors`: each state vector, flat over the `len` trainable values. They follow.
pub fn state_header(len: usize, names: &[&str]) -> Vec<u8> {
    let shape = [len];
    header(names.iter().map(|name| (*name, shape.as_slice())))
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
    use crate::layout::{Init, Role, Tensor, le_bytes};

    #[test]
    fn weights_and_state_come_back_and_strangers_are_named() {
        let tensor = |name: &str, shape: &[usize]| Tensor {
            name: name.into(),
            shape: shape.into(),
            role: Role::Trainable,
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
}
