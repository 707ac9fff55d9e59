//! The lanes of workers that share memory with this process, as the driver sees them.

use crate::push::{Chunk, Push, check_keys};
use crate::rows::RowGradient;
use crate::shared::Shared;
use crate::sum::Gradient;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use unisono_common::ids::{Generation, Step, WorkerId};
use unisono_common::protocol::Kind;
use unisono_common::tree::Node;
use unisono_proto::WireError;
use unisono_proto::shm::frame::{Order, Report};
use unisono_proto::shm::{Hold, Lane, Part, RowPart};

/// One worker's lane, and what is coming through it.
pub struct LaneEnd {
    lane: Arc<Lane>,
    /// The worker's compute threads.
    threads: usize,
    push: Push,
    /// The slot that the open node's sums are in, and how many rows of sparse tables it has.
    hold: Option<(u32, Arc<Hold>, u32)>,
    /// The last step whose weights the worker was asked to read.
    reads: Option<Step>,
}

impl LaneEnd {
    /// The lane of `worker`, which has so many compute threads.
    pub fn new(worker: WorkerId, threads: u32, lane: Arc<Lane>, shared: &Shared) -> LaneEnd {
        let push = Push::of(worker, shared.store.layout().chunks());
        LaneEnd { lane, threads: threads as usize, push, hold: None, reads: None }
    }

    /// The lane, and the worker's compute threads.
    pub fn beside(&self) -> (Arc<Lane>, usize) {
        (self.lane.clone(), self.threads)
    }

    /// Orders nodes; false where the worker takes none.
    pub fn order(&mut self, shared: &Shared, step: Step, generation: Generation, kind: Kind, nodes: &[Node]) -> bool {
        if self.reads.replace(step) != Some(step) {
            shared.store.bytes_pulled.fetch_add(shared.store.layout().len() as u64 * 4, Ordering::Relaxed);
        }
        let (evaluate, rows_first) = (kind == Kind::Evaluate, shared.store.rows_first());
        let wakes = shared.store.takes_early();
        nodes.iter().all(|&node| {
            let order = Order { step: step.0, generation: generation.0, node, evaluate, rows_first, wakes };
            self.lane.order(order)
        })
    }

    /// Takes what the worker has reported. Chunks that have to wait are put aside; the others go to `ready`.
    ///
    /// # Errors
    /// A report that makes no sense: the worker is broken.
    pub fn take(&mut self, shared: &Shared, ready: &mut Vec<(Chunk, Part)>) -> Result<bool, WireError> {
        let mut any = false;
        while let Some(report) = self.lane.report()? {
            any = true;
            match report {
                Report::Begin { slot, header } => {
                    let taken = Hold::of(&self.lane, slot).ok_or(WireError::Slot { slot })?;
                    // Nobody waits for what is not owed, and the slot is free at once.
                    self.hold = self.push.begin(shared, &header)?.then_some((slot, taken, header.rows));
                }
                Report::Ready { slot, from, to, spent } => {
                    for index in (from..to).rev() {
                        let chunk = self.push.chunk(shared, index, spent)?;
                        let Some((chunk, (held, hold, _))) = chunk.zip(self.hold.as_ref()) else { continue };
                        if *held != slot {
                            return Err(WireError::Slot { slot });
                        }
                        let part = Part::new(hold, shared.store.layout().chunk(index as usize));
                        if chunk.is_work(shared) {
                            ready.push((chunk, part));
                        } else {
                            chunk.accept(shared, Gradient::Slot(part));
                        }
                    }
                }
                Report::Rows { slot } => {
                    let rows = self.push.rows()?;
                    if let Some((rows, (held, hold, count))) = rows.zip(self.hold.as_ref()) {
                        let part = RowPart::new(hold, *count as usize).filter(|_| *held == slot);
                        let part = part.ok_or(WireError::Slot { slot })?;
                        // A copy, which nobody changes after it was checked.
                        let keys = part.values().0.to_vec();
                        check_keys(&keys)?;
                        rows.accept(shared, RowGradient::Slot(keys, part));
                    }
                }
            }
            if self.push.is_whole() {
                self.hold = None; // the parts hold what they need
            }
        }
        Ok(any)
    }
}
