//! The wire: generated messages, the chunk codec, and the checks that everything from outside passes.

use std::hash::Hasher;
use stream::ChunkHead;
pub use twox_hash::XxHash3_64 as Checksum;
use unisono_common::kernels;
use unisono_common::layout::Layout;
use unisono_common::loss::LossSums;
use unisono_common::tree::Node;

pub mod identity;
pub mod shm;
pub mod stream;
pub mod tls;

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
/// A job and what is known of its data, at most: the names of classes, words and items are among it.
pub const MAX_JOB: usize = 128 << 20;
/// HTTP/2 stream window.
pub const STREAM_WINDOW: u32 = 4 << 20;
/// HTTP/2 connection window.
pub const CONNECTION_WINDOW: u32 = 8 << 20;
/// Largest HTTP/2 frame that the protocol allows; must be set on both ends.
pub const MAX_FRAME: u32 = (1 << 24) - 1;

/// Each side asks the other this often whether it is there, and waits this long for the answer.
pub const KEEPALIVE: std::time::Duration = std::time::Duration::from_secs(15);

/// Has TCP send steadily: BBR all but stops a connection for 200 ms every 10 s (ProbeRTT, draft-cardwell-iccrg-bbr-congestion-control,
/// 4.3.4), and a step waits for the slowest of all. Gives the congestion control that is used then.
///
/// # Errors
/// A system that does not say, or does not let us choose.
#[cfg(target_os = "linux")]
pub fn steady(socket: impl std::os::fd::AsFd) -> std::io::Result<String> {
    use rustix::net::sockopt::{set_tcp_congestion, tcp_congestion};
    if tcp_congestion(&socket)? == "bbr" {
        set_tcp_congestion(&socket, "cubic")?;
    }
    Ok(tcp_congestion(&socket)?)
}

/// Has TCP send steadily: there is nothing to choose on this system.
///
/// # Errors
/// Always.
#[cfg(not(target_os = "linux"))]
pub fn steady(_: impl std::os::fd::AsFd) -> std::io::Result<String> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Compute threads of a worker, at most.
pub const MAX_THREADS: u32 = 4096;

/// What was wrong with something that came over the wire.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum WireError {
    #[error("chunk {index} does not exist: the layout has {chunks} chunks")]
    NoSuchChunk { index: u32, chunks: usize },
    #[error("chunk {index} has {got} bytes, the layout says {want}: was the other side built from another version?")]
    ChunkLength { index: u32, got: usize, want: usize },
    #[error("chunk {index} was damaged on the way: its checksum is {got:016x}, it should be {want:016x}")]
    Checksum { index: u32, got: u64, want: u64 },
    #[error("chunk {index} has no checksum, and needs one where it is not encrypted")]
    Unsummed { index: u32 },
    #[error("chunk {index} holds a value that is not finite, in tensor `{tensor}`")]
    NotFinite { index: u32, tensor: String },
    #[error("{lo}..{hi} is not a node of the tree over {partitions} partitions")]
    NoSuchNode { lo: u32, hi: u32, partitions: u32 },
    #[error("chunk {index} came twice")]
    Twice { index: u32 },
    #[error("the gradients of rows are not what was announced: {0}")]
    Rows(&'static str),
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
    let node = node(h.node, partitions)?;
    Ok(shm::frame::Header { step: h.step, generation: h.generation, node, sums, rows: h.rows })
}

/// What a worker says that it spent, from the wire.
pub fn spent(s: &v1::Spent) -> shm::frame::Spent {
    let &v1::Spent { data, forward, backward, encode, encoded } = s;
    shm::frame::Spent { data, forward, ahead: 0, backward, encode, encoded }
}

/// A tree node for the wire.
pub fn to_wire(node: Node) -> v1::TreeNode {
    v1::TreeNode { lo: node.lo, hi: node.hi }
}

/// XXH3 of bytes, 64 bits, with seed 0 (Collet, "xxHash fast digest algorithm", the format of XXH3).
pub fn checksum(bytes: &[u8]) -> u64 {
    Checksum::oneshot(bytes)
}

/// Checks a chunk that is coming in: its number, which it gives back, and its length in bytes.
pub fn check_head(layout: &Layout, index: u32, len: usize) -> Result<usize, WireError> {
    if index as usize >= layout.chunks() {
        return Err(WireError::NoSuchChunk { index, chunks: layout.chunks() });
    }
    let want = layout.chunk(index as usize).len() * 4;
    if len == want { Ok(index as usize) } else { Err(WireError::ChunkLength { index, got: len, want }) }
}

/// Bytes of a chunk that are looked at together: they stay in the first-level cache.
const BLOCK: usize = 16 << 10;

/// What a chunk's values are on the way.
pub struct Look {
    /// XXH3 (64 bits), where it was asked for.
    pub checksum: Option<u64>,
    /// Whether all are finite.
    pub finite: bool,
}

impl Look {
    /// Looks at all `values`, in one pass over memory, in which `also` gets each block of them, and where it begins; at their checksum
    /// where they are `summed`.
    pub fn at(values: &[u8], summed: bool, mut also: impl FnMut(usize, &[u8])) -> Look {
        let (mut checksum, mut finite) = (summed.then(Checksum::new), true);
        for (n, block) in values.chunks(BLOCK).enumerate() {
            also(n * BLOCK, block);
            checksum.iter_mut().for_each(|checksum| checksum.write(block));
            finite &= kernels::all_finite_bytes(block);
        }
        Look { checksum: checksum.map(|checksum| checksum.finish()), finite }
    }
}

/// Checks a chunk that came in: its number, length, checksum where it has one, and that every value is finite; `also` as in
/// [`Look::at`].
pub fn check_chunk(
    layout: &Layout,
    head: ChunkHead,
    values: &[u8],
    also: impl FnMut(usize, &[u8]),
) -> Result<(), WireError> {
    let index = head.index;
    let range = layout.chunk(check_head(layout, index, values.len())?);
    let look = Look::at(values, head.checksum.is_some(), also);
    head.check(|| look.checksum.unwrap_or_default())?;
    if !look.finite {
        let tensor = layout.tensor_at(range.start + first_not_finite(values)).map(|t| t.name.clone());
        return Err(WireError::NotFinite { index, tensor: tensor.unwrap_or_default() });
    }
    Ok(())
}

/// The place of the first value that is not finite, or 0.
pub fn first_not_finite(values: &[u8]) -> usize {
    let mut values = values.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
    values.position(|v| !v.is_finite()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_common::layout::{Init, Kind, Role, Tensor, le_bytes};

    #[test]
    fn a_bad_chunk_is_named() {
        let layout = Layout::new(vec![Tensor {
            name: "0.weight".into(),
            shape: vec![3],
            role: Role::Trainable,
            kind: Kind::Weight,
            init: Init::Constant(0.0),
        }]);
        let good = le_bytes(&[1.0, -2.0, 3.5]);
        let check = |index, checksum, values: &[u8]| {
            check_chunk(&layout, ChunkHead { index, checksum: Some(checksum), ..Default::default() }, values, |_, _| ())
        };
        // As other implementations have it.
        let long: Vec<u8> = (0..5000).map(|i| (i % 251) as u8).collect();
        assert_eq!((checksum(b""), checksum(&long)), (0x2d06_8005_38d3_94c2, 0xb418_500f_c423_20ee));
        assert_eq!(check(0, checksum(good), good), Ok(()));
        assert!(matches!(check(1, checksum(good), good), Err(WireError::NoSuchChunk { .. })));
        assert!(matches!(check(0, checksum(good) ^ 1, good), Err(WireError::Checksum { .. })));
        assert!(matches!(check(0, checksum(&good[..8]), &good[..8]), Err(WireError::ChunkLength { .. })));
        let bad = le_bytes(&[1.0, f32::NAN, 3.5]);
        assert_eq!(check(0, checksum(bad), bad), Err(WireError::NotFinite { index: 0, tensor: "0.weight".into() }));
    }

    #[test]
    fn a_look_sees_every_byte_wherever_it_lies() {
        let values: Vec<f32> = (0..3 * BLOCK / 4 + 5).map(|i| i as f32).collect();
        for shift in 0..4 {
            let mut bytes = vec![0; shift];
            bytes.extend(le_bytes(&values));
            let bytes = &mut bytes[shift..];
            let mut copy = vec![0; bytes.len()];
            let look = Look::at(bytes, true, |at, block| copy[at..at + block.len()].copy_from_slice(block));
            assert!(copy == bytes && look.finite && look.checksum == Some(checksum(bytes)), "{shift}");
            for at in [0, BLOCK / 4 - 1, BLOCK / 4, values.len() - 1] {
                let place = &mut bytes[4 * at..4 * at + 4];
                let good: [u8; 4] = place.try_into().expect("four bytes");
                place.copy_from_slice(&f32::INFINITY.to_le_bytes());
                assert!(!Look::at(bytes, false, |_, _| ()).finite && first_not_finite(bytes) == at, "{shift} {at}");
                bytes[4 * at..4 * at + 4].copy_from_slice(&good);
            }
        }
    }
}
