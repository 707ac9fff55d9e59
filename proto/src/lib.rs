//! The wire: generated messages, the chunk codec, and the checks that everything from outside passes.

use bytes::Bytes;
use unisono_common::layout::Layout;
use unisono_common::loss::LossSums;
use unisono_common::tree::Node;

pub mod shm;
pub mod stream;

/// Generated from `unisono/v1/unisono.proto`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("unisono.v1");
}

/// The encoded file descriptors, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The version that both sides must share.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Largest message either side accepts: a chunk and its frame.
pub const MAX_MESSAGE: usize = 4 << 20;
/// HTTP/2 stream window.
pub const STREAM_WINDOW: u32 = 4 << 20;
/// HTTP/2 connection window.
pub const CONNECTION_WINDOW: u32 = 8 << 20;
/// Largest HTTP/2 frame that the protocol allows; must be set on both ends.
pub const MAX_FRAME: u32 = (1 << 24) - 1;

/// Each side asks the other this often whether it is there, and waits this long for the answer.
pub const KEEPALIVE: std::time::Duration = std::time::Duration::from_secs(15);

/// Compute threads of a worker, at most.
pub const MAX_THREADS: u32 = 4096;

/// What was wrong with something that came over the wire.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WireError {
    #[error("chunk {index} does not exist: the layout has {chunks} chunks")]
    NoSuchChunk { index: u32, chunks: usize },
    #[error("chunk {index} has {got} bytes, the layout says {want}: was the other side built from another version?")]
    ChunkLength { index: u32, got: usize, want: usize },
    #[error("chunk {index} was damaged on the way: its checksum is {got:08x}, it should be {want:08x}")]
    Checksum { index: u32, got: u32, want: u32 },
    #[error("chunk {index} holds a value that is not finite, in tensor `{tensor}`")]
    NotFinite { index: u32, tensor: String },
    #[error("{lo}..{hi} is not a node of the tree over {partitions} partitions")]
    NoSuchNode { lo: u32, hi: u32, partitions: u32 },
    #[error("chunk {index} came twice")]
    Twice { index: u32 },
    #[error("slot {slot} holds no gradient")]
    Slot { slot: u32 },
    #[error("the field `{0}` is missing")]
    Missing(&'static str),
    #[error("the field `{0}` must be 32 bytes")]
    Digest(&'static str),
    #[error("the field `{field}` is {value}, which is out of range")]
    Range { field: &'static str, value: String },
}

impl From<WireError> for tonic::Status {
    fn from(e: WireError) -> Self {
        tonic::Status::invalid_argument(e.to_string())
    }
}

/// A 32-byte digest from the wire.
pub fn digest(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], WireError> {
    bytes.try_into().map_err(|_| WireError::Digest(field))
}

/// A tree node from the wire.
pub fn node(n: Option<v1::TreeNode>, partitions: u32) -> Result<Node, WireError> {
    let n = n.ok_or(WireError::Missing("node"))?;
    checked(Node { lo: n.lo, hi: n.hi }, partitions)
}

/// A node that is one of the tree over `partitions` leaves.
pub fn checked(node: Node, partitions: u32) -> Result<Node, WireError> {
    if node.is_in_tree(partitions) {
        Ok(node)
    } else {
        Err(WireError::NoSuchNode { lo: node.lo, hi: node.hi, partitions })
    }
}

/// A push's header from the wire.
pub fn header(h: &v1::NodeHeader, partitions: u32) -> Result<shm::frame::Header, WireError> {
    let sums = LossSums { loss: h.loss, weight: h.weight, samples: h.samples };
    Ok(shm::frame::Header { step: h.step, generation: h.generation, node: node(h.node, partitions)?, sums })
}

/// What a worker says that it spent, from the wire.
pub fn spent(s: &v1::Spent) -> shm::frame::Spent {
    let &v1::Spent { data, forward, backward, encode, encoded } = s;
    shm::frame::Spent { data, forward, backward, encode, encoded }
}

/// A tree node for the wire.
pub fn to_wire(node: Node) -> v1::TreeNode {
    v1::TreeNode { lo: node.lo, hi: node.hi }
}

/// The values of a chunk as little-endian bytes.
pub fn encode_values(values: &[f32]) -> Bytes {
    let mut out = Vec::with_capacity(values.len() * 4);
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    out.into()
}

/// CRC-32 of a chunk.
pub fn crc(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Checks a chunk that is coming in: its number, which it gives back, and its length in bytes.
pub fn check_head(layout: &Layout, index: u32, len: usize) -> Result<usize, WireError> {
    if index as usize >= layout.chunks() {
        return Err(WireError::NoSuchChunk { index, chunks: layout.chunks() });
    }
    let want = layout.chunk(index as usize).len() * 4;
    if len == want { Ok(index as usize) } else { Err(WireError::ChunkLength { index, got: len, want }) }
}

/// Checks a chunk that came in: its number, length, checksum, and that every value is finite.
pub fn check_chunk(layout: &Layout, index: u32, want_crc: u32, values: &[u8]) -> Result<(), WireError> {
    let range = layout.chunk(check_head(layout, index, values.len())?);
    let got = crc(values);
    if got != want_crc {
        return Err(WireError::Checksum { index, got, want: want_crc });
    }
    if let Some(i) = first_not_finite(values) {
        let tensor = layout.tensor_at(range.start + i).map(|t| t.name.clone()).unwrap_or_default();
        return Err(WireError::NotFinite { index, tensor });
    }
    Ok(())
}

fn values_of(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))
}

fn first_not_finite(bytes: &[u8]) -> Option<usize> {
    // One pass without branches first: the exponent's bits are all ones where a value is not finite.
    let bad = bytes.as_chunks::<4>().0.iter().fold(0u32, |acc, b| {
        let exponent = u32::from_le_bytes(*b) & 0x7f80_0000;
        acc | u32::from(exponent == 0x7f80_0000)
    });
    if bad == 0 { None } else { values_of(bytes).position(|v| !v.is_finite()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_common::layout::{Init, Role, Tensor};

    #[test]
    fn a_bad_chunk_is_named() {
        let layout = Layout::new(vec![Tensor {
            name: "0.weight".into(),
            shape: vec![3],
            role: Role::Trainable,
            init: Init::Constant(0.0),
        }]);
        let good = encode_values(&[1.0, -2.0, 3.5]);
        assert_eq!(check_chunk(&layout, 0, crc(&good), &good), Ok(()));
        assert!(matches!(check_chunk(&layout, 1, crc(&good), &good), Err(WireError::NoSuchChunk { .. })));
        assert!(matches!(check_chunk(&layout, 0, crc(&good) ^ 1, &good), Err(WireError::Checksum { .. })));
        assert!(matches!(check_chunk(&layout, 0, crc(&good[..8]), &good[..8]), Err(WireError::ChunkLength { .. })));
        let bad = encode_values(&[1.0, f32::NAN, 3.5]);
        let error = check_chunk(&layout, 0, crc(&bad), &bad).unwrap_err();
        assert_eq!(error, WireError::NotFinite { index: 0, tensor: "0.weight".into() });
    }
}
