//! Shared memory between a coordinator and the workers of its host: gradients and weights stay where they are computed,
//! and only short frames pass.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`memory`] | memory that processes share, the only `unsafe` code of the crate |
//! | [`ring`] | the protocol's order: a ring of frames for one sender and one receiver, and a bell to wait for |
//! | [`frame`] | what the frames say |
//! | [`lane`] | one worker's part: two rings, a bell, and two slots for gradients |
//! | [`rows`] | rows of sparse tables, and where each lies |
//! | [`door`] | how a worker gets at it: a Unix socket, a nonce, and open files |
//!
//! **Why no step tears another.** Weights lie in two buffers, those of step `s` in buffer `s % 2`. An update of step `s`
//! reads that buffer and writes the other; an order to compute step `s` is sent after all updates of `s - 1` were written,
//! and step `s` is committed, so that buffer `s % 2` may be written again, only when no member owes it anything. Who was
//! given up may still read; what it computes is refused. So may who has no order yet, and looks ahead at chunks that have changed: what
//! it computes counts only if it is asked for, and then they stay as they are. A worker to which weights come by a stream has such
//! buffers of its own: it reads a chunk when it has come, and writes none that it may be reading, whatever comes. A gradient is
//! written by its worker until the frame `Ready` says that it is final, and from then on only read, until the coordinator frees the
//! slot.

pub mod door;
pub mod frame;
pub mod lane;
pub mod memory;
pub mod ring;
pub mod rows;

pub use lane::{Hold, Lane, Part, RowPart, SlotSize};
pub use memory::{Memory, Piece, Weights};
pub use rows::{Capacity, Full, Plan, RowStore, Rows};
