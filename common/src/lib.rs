//! The pure part of unisono: everything that decides the result of a run, and nothing that waits, sends or reads a clock.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`job`] | the validated job, parsed from TOML |
//! | [`data`] | data sets, normalisation, partitions, batches |
//! | [`kernels`] | slice kernels: GEMM, element-wise maths, pooling, norms |
//! | [`layers`], [`model`] | layers over slices, and models made of them |
//! | [`loss`], [`metrics`] | losses on logits, evaluation sums |
//! | [`optim`], [`schedule`] | optimizers, clipping, learning-rate schedules |
//! | [`tree`] | the fixed reduction tree over partitions |
//! | [`layout`] | the flat parameter vector: names, shapes, ranges, chunks |
//! | [`train`] | one tree node's gradient: the hot path |
//! | [`protocol`] | the coordinator's machine: events in, commands out |
//! | [`checkpoint`] | checkpoint bytes and manifest |
//! | [`rng`] | counter-based random numbers |
//! | [`rows`] | sparse tables: rows by key, their gradients and optimizers |

pub mod checkpoint;
pub mod data;
pub mod extend;
pub mod groups;
pub mod ids;
pub mod job;
pub mod kernels;
pub mod layers;
pub mod layout;
pub mod loss;
mod memory;
pub mod metrics;
pub mod model;
pub mod optim;
pub mod protocol;
pub mod rng;
pub mod rows;
pub mod schedule;
pub mod train;
pub mod tree;
