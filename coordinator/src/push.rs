//! What a worker pushes, node after node, whichever way it comes.

use crate::rows::RowGradient;
use crate::shared::Shared;
use crate::sum::Gradient;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use unisono_common::ids::{Step, WorkerId};
use unisono_common::loss::LossSums;
use unisono_common::protocol::Kind;
use unisono_common::rows::{NO_ID, key};
use unisono_common::tree::Node;
use unisono_proto::WireError;
use unisono_proto::shm::frame::{Header, Spent};

/// One worker's pushes.
pub struct Push {
    worker: WorkerId,
    /// The node that chunks belong to; `None` while it is not owed (late, or of another step).
    open: Option<Opened>,
    came: Vec<bool>,
    /// Whether the rows have come, or the model has none.
    rows: bool,
}

/// A node whose chunks are coming.
#[derive(Clone)]
struct Opened {
    step: Step,
    node: Node,
    sums: LossSums,
    left: Arc<AtomicUsize>,
}

/// One chunk of an owed node.
pub struct Chunk {
    worker: WorkerId,
    of: Opened,
    index: usize,
}

impl Push {
    /// The pushes of `worker`, in `chunks` chunks each.
    pub fn of(worker: WorkerId, chunks: usize) -> Push {
        Push { worker, open: None, came: vec![false; chunks], rows: true }
    }

    /// The chunks that follow are this node's. Gives whether it is owed.
    ///
    /// # Errors
    /// A header that nobody can have been asked for.
    pub fn begin(&mut self, shared: &Shared, header: &Header) -> Result<bool, WireError> {
        let (step, node, sums) = shared.check_header(header)?;
        self.came.fill(false);
        self.rows = shared.store.tables.is_none();
        self.open = if shared.owes(self.worker, step, Kind::Train, node) {
            shared.check_samples(step, node, sums.samples)?;
            let parts = self.came.len() + usize::from(!self.rows);
            Some(Opened { step, node, sums, left: Arc::new(AtomicUsize::new(parts)) })
        } else {
            None
        };
        Ok(self.open.is_some())
    }

    /// Whether all of the node has come.
    pub fn is_whole(&self) -> bool {
        self.rows && self.came.iter().all(|came| *came)
    }

    /// Chunk `index` of the node came, the last one with what the node took; `None` where nobody waits for it.
    ///
    /// # Errors
    /// A chunk that does not exist, and one that has come before.
    pub fn chunk(&mut self, shared: &Shared, index: u32, spent: Option<Spent>) -> Result<Option<Chunk>, WireError> {
        let chunks = self.came.len();
        let came = self.came.get_mut(index as usize).ok_or(WireError::NoSuchChunk { index, chunks })?;
        if std::mem::replace(came, true) {
            return Err(WireError::Twice { index });
        }
        if let (Some(measure), Some(_), true) = (&shared.measure, &self.open, self.is_whole()) {
            measure.arrived(self.worker, Instant::now(), spent.unwrap_or_default());
        }
        Ok(self.open.clone().map(|of| Chunk { worker: self.worker, of, index: index as usize }))
    }

    /// The node's rows came, before its last chunk; `None` where nobody waits for them.
    ///
    /// # Errors
    /// Rows that nobody can have been asked for, and those that have come before.
    pub fn rows(&mut self) -> Result<Option<Rows>, WireError> {
        if std::mem::replace(&mut self.rows, true) {
            return Err(WireError::Rows("they came twice, or the model has no sparse tables"));
        }
        Ok(self.open.clone().map(|of| Rows { worker: self.worker, of }))
    }
}

/// The rows of an owed node.
pub struct Rows {
    worker: WorkerId,
    of: Opened,
}

impl Rows {
    /// Gives their sums to the store, whose keys [`check_keys`] has looked at. A value that is not finite is found by the update,
    /// as those of chunks in slots are.
    pub fn accept(self, shared: &Shared, gradient: RowGradient) {
        let Rows { worker, of } = self;
        let (step, node, sums) = (of.step, of.node, of.sums);
        of.done(worker, shared);
        shared.store.accept_rows(step, node, sums, gradient);
    }
}

/// Checks the keys of a node's sums of rows: in order, each once, and each that of an id.
///
/// # Errors
/// Keys that are not so.
pub fn check_keys(keys: &[u64]) -> Result<(), WireError> {
    if !keys.is_sorted_by(|a, b| a < b) {
        return Err(WireError::Rows("keys are not in order"));
    }
    match keys.binary_search(&key(NO_ID)) {
        Ok(_) => Err(WireError::Rows("a key is that of no id")),
        Err(_) => Ok(()),
    }
}

impl Opened {
    /// One part less is missing; after the last one the node is not owed any more.
    fn done(&self, worker: WorkerId, shared: &Shared) {
        if self.left.fetch_sub(1, Ordering::SeqCst) == 1 {
            shared.done(worker, self.step, self.node);
        }
    }
}

impl Chunk {
    /// Whether taking it is more than putting it aside: there is something to add it to, or nothing to wait for.
    pub fn is_work(&self, shared: &Shared) -> bool {
        shared.store.merges(self.index, self.of.node)
    }

    /// Gives the chunk to the store; after its last one the node is not owed any more. Where all that the chunk's update needs is
    /// there, gives its index, for [`Store::complete`].
    ///
    /// [`Store::complete`]: crate::store::Store::complete
    pub fn add(self, shared: &Shared, gradient: Gradient) -> Option<usize> {
        let Chunk { worker, of, index } = self;
        of.done(worker, shared);
        shared.store.add(of.step, of.node, of.sums, index, gradient).then_some(index)
    }

    /// Gives the chunk to the store, and updates it where it is whole.
    pub fn accept(self, shared: &Shared, gradient: Gradient) {
        self.add(shared, gradient).into_iter().for_each(|index| shared.store.complete(index));
    }
}
