//! The layout of the flat parameter vector: which tensor lies where, and how it is cut into chunks.
//!
//! Trainable tensors come first, buffers (running statistics) after them. Every tensor is row-major in PyTorch's shape
//! order, under the name that PyTorch's `nn.Sequential` would give it.

use serde::{Deserialize, Serialize};

/// Values in a chunk: 256 KiB of f32, so that what an update of it touches fits into a second-level cache.
pub const CHUNK: usize = 65_536;

/// How a tensor changes from step to step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Role {
    /// Moved by the optimizer along its gradient.
    Trainable,
    /// A running statistic: `(1 - momentum) * old + momentum * (sum over samples / samples)`.
    Running { momentum: f32 },
}

/// How a tensor's first values are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Init {
    Constant(f32),
    /// Uniform in `[-bound, bound)`.
    Uniform {
        bound: f32,
    },
    /// Normal with mean 0.
    Normal {
        std: f32,
    },
}

/// What a layer does with a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Multiplies inputs by it.
    Weight,
    /// Adds it.
    Bias,
    /// Scales or shifts what it has normalised.
    Norm,
    /// Looks rows of it up.
    Embedding,
}

/// One named tensor of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub role: Role,
    pub kind: Kind,
    pub init: Init,
}

impl Tensor {
    /// A trainable tensor of a layer that is not one of ours.
    pub fn trainable(name: &str, shape: &[usize], init: Init) -> Tensor {
        Tensor { name: name.into(), shape: shape.into(), role: Role::Trainable, kind: Kind::Weight, init }
    }

    /// Number of values.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All tensors of a model, in order, and their places in the flat vector.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Layout {
    tensors: Vec<Tensor>,
    offsets: Vec<usize>,
    len: usize,
    trainable: usize,
}

impl Layout {
    /// Lays `tensors` out; trainable ones are moved before running ones, otherwise the order is kept.
    pub fn new(mut tensors: Vec<Tensor>) -> Layout {
        tensors.sort_by_key(|t| t.role != Role::Trainable);
        let mut offsets = Vec::with_capacity(tensors.len());
        let (mut len, mut trainable) = (0, 0);
        for t in &tensors {
            offsets.push(len);
            len += t.len();
            if t.role == Role::Trainable {
                trainable = len;
            }
        }
        Layout { tensors, offsets, len, trainable }
    }

    /// Number of values in the flat vector.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the model has no tensors at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of trainable values; they are the vector's beginning.
    pub fn trainable(&self) -> usize {
        self.trainable
    }

    /// The tensors with their ranges in the flat vector.
    pub fn tensors(&self) -> impl Iterator<Item = (&Tensor, std::ops::Range<usize>)> {
        self.tensors.iter().zip(&self.offsets).map(|(t, &o)| (t, o..o + t.len()))
    }

    /// The range of the tensor called `name`.
    pub fn range(&self, name: &str) -> Option<std::ops::Range<usize>> {
        self.tensors().find(|(t, _)| t.name == name).map(|(_, r)| r)
    }

    /// The tensor that holds the value at `index`.
    pub fn tensor_at(&self, index: usize) -> Option<&Tensor> {
        self.tensors().find(|(_, r)| r.contains(&index)).map(|(t, _)| t)
    }

    /// Number of chunks.
    pub fn chunks(&self) -> usize {
        self.len.div_ceil(CHUNK)
    }

    /// The range of chunk `i`.
    pub fn chunk(&self, i: usize) -> std::ops::Range<usize> {
        i * CHUNK..((i + 1) * CHUNK).min(self.len)
    }

    /// The trainable values of chunk `i`, which are its beginning.
    pub fn trainable_of(&self, i: usize) -> std::ops::Range<usize> {
        let chunk = self.chunk(i);
        chunk.start.min(self.trainable)..chunk.end.min(self.trainable)
    }

    /// The first values of every tensor: a function of (seed, name, index).
    pub fn init(&self, seed: u64) -> Vec<f32> {
        let key = crate::rng::Key::new(seed, crate::rng::Purpose::Init);
        let mut out = Vec::with_capacity(self.len);
        for t in &self.tensors {
            let key = key.named(&t.name);
            out.extend((0..t.len() as u64).map(|i| match t.init {
                Init::Constant(c) => c,
                Init::Uniform { bound } => (2.0 * key.uniform(i) - 1.0) * bound,
                Init::Normal { std } => key.normal(i) * std,
            }));
        }
        out
    }

    /// Digest of names, shapes and roles: two builds that disagree cannot train together.
    pub fn digest(&self) -> [u8; 32] {
        *blake3::hash(&serde_json::to_vec(&self.tensors).expect("a layout is plain data")).as_bytes()
    }

    /// `blake3:` digest over names, shapes and little-endian values in layout order.
    pub fn weights_digest(&self, weights: &[f32]) -> String {
        let digest: Result<String, std::convert::Infallible> = self.digest_of_pieces(|range| Ok(&weights[range]));
        digest.unwrap_or_else(|never| match never {})
    }

    /// [`Layout::weights_digest`] of values that come in pieces of up to [`CHUNK`], where `read` gives those of a range.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn digest_of_pieces<V: AsRef<[f32]>, E>(
        &self,
        mut read: impl FnMut(std::ops::Range<usize>) -> Result<V, E>,
    ) -> Result<String, E> {
        let mut h = blake3::Hasher::new();
        for (t, range) in self.tensors() {
            h.update(&(t.name.len() as u64).to_le_bytes());
            h.update(t.name.as_bytes());
            h.update(&(t.shape.len() as u64).to_le_bytes());
            for &d in &t.shape {
                h.update(&(d as u64).to_le_bytes());
            }
            for from in range.clone().step_by(CHUNK) {
                h.update(le_bytes(read(from..range.end.min(from + CHUNK))?.as_ref()));
            }
        }
        Ok(format!("blake3:{}", h.finalize().to_hex()))
    }
}

#[cfg(target_endian = "big")]
compile_error!("values go to the wire and to files as little-endian memory");

/// The values' memory, which is what the wire and the files hold.
pub fn le_bytes(values: &[f32]) -> &[u8] {
    bytemuck::cast_slice(values)
}

/// [`le_bytes`] to write into.
pub fn le_bytes_mut(values: &mut [f32]) -> &mut [u8] {
    bytemuck::cast_slice_mut(values)
}
