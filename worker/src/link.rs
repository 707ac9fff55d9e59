//! What connects the compute thread with the coordinator: orders and weights in, gradients out.
//!
//! Either way a gradient is computed into a slot of a lane and announced from its end to its beginning, while the rest is
//! still being computed. Over shared memory the coordinator reads it there; over streams its chunks are sent from there.

use crate::rows;
use crate::session::FetchOrder;
use crate::weights::{Coming, Early, Reading};
use anyhow::{Context, Result};
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::mpsc;
use unisono_common::ids::{Step, Version};
use unisono_common::layout::{CHUNK, Layout};
use unisono_common::loss::LossSums;
use unisono_common::tree::Node;
pub use unisono_proto::shm::frame::Order;
use unisono_proto::shm::frame::{Header, Report, Spent};
use unisono_proto::shm::memory::BellMemory;
use unisono_proto::shm::{Hold, Lane, Part, RowPart, Weights};

/// Chunks for which a coordinator that sleeps is woken, where more are to come and it has a core to itself: to wake it takes as long as
/// to add one up.
const CHUNKS_A_RING: usize = 4;

/// What the push stream sends.
pub enum Piece {
    /// The chunks that follow are this node's.
    Node(Header),
    /// A chunk of it; with the last one comes what it took to compute, and when that was over.
    Chunk { index: usize, part: Part, spent: Option<(Spent, Instant)> },
    /// The gradients of its rows.
    Rows(RowPart),
}

/// The compute thread's end of a session.
pub struct Link {
    lane: Arc<Lane>,
    way: Way,
    /// Where rows of sparse tables come from.
    rows: rows::Source,
}

enum Way {
    Shared { weights: Weights, coordinator: BellMemory, fetch: mpsc::UnboundedSender<FetchOrder> },
    Streams { orders: std::sync::mpsc::Receiver<Order>, coming: Arc<Coming>, push: mpsc::UnboundedSender<Piece> },
}

impl Link {
    /// Through shared memory; partitions that are not at hand are asked for through `fetch`.
    pub fn shared(
        lane: Arc<Lane>,
        weights: Weights,
        coordinator: BellMemory,
        rows: rows::Source,
        fetch: mpsc::UnboundedSender<FetchOrder>,
    ) -> Link {
        Link { lane, way: Way::Shared { weights, coordinator, fetch }, rows }
    }

    /// Through streams; `lane` is this process's own.
    pub fn streams(
        lane: Arc<Lane>,
        orders: std::sync::mpsc::Receiver<Order>,
        coming: Arc<Coming>,
        rows: rows::Source,
        push: mpsc::UnboundedSender<Piece>,
    ) -> Link {
        Link { lane, way: Way::Streams { orders, coming, push }, rows }
    }

    /// Waits for the next order; `None` when the session is over. Where it has not come yet, `meanwhile` is run first, and over shared
    /// memory again when weights have changed for as long as it says that it could do more then.
    pub fn next(&self, mut meanwhile: impl FnMut() -> bool) -> Option<Order> {
        match &self.way {
            Way::Shared { .. } => self.lane.next_order(meanwhile),
            Way::Streams { orders, .. } => orders.try_recv().ok().or_else(|| {
                meanwhile();
                orders.recv().ok()
            }),
        }
    }

    /// The weights that an order is computed with, or their `average`; `None` where nobody waits for what would be computed.
    pub fn weights(&self, order: &Order, average: bool) -> Option<Reading<'_>> {
        let version = Version { step: Step(order.step), average };
        match &self.way {
            Way::Shared { weights, .. } => Some(Reading::whole(weights, version)),
            Way::Streams { coming, .. } => Reading::coming(coming, version),
        }
    }

    /// Those of a step that nothing is ordered of yet, where they can be seen to change.
    pub fn early(&self, step: u64) -> Option<Early<'_>> {
        match &self.way {
            Way::Shared { weights, .. } => Some(Early { weights, step }),
            Way::Streams { .. } => None,
        }
    }

    /// Waits until these partitions are at hand; over streams they are before the order comes.
    ///
    /// # Errors
    /// When the session is over.
    pub fn fetch(&self, partitions: Vec<u32>, test: bool) -> Result<()> {
        let Way::Shared { fetch, .. } = &self.way else { return Ok(()) };
        let (done, wait) = std::sync::mpsc::channel();
        fetch.send(FetchOrder { partitions, test, done }).ok().context("the session ended")?;
        wait.recv().context("the session ended")
    }

    /// Waits for a free slot to compute a gradient into; `None` when the session is over.
    pub fn slot(&self) -> Option<u32> {
        self.lane.take_slot()
    }

    /// The values of a taken slot.
    #[allow(clippy::mut_from_ref, reason = "as Lane::slot")]
    pub fn gradient(&self, slot: u32) -> &mut [f32] {
        self.lane.slot(slot)
    }

    /// The keys and gradients of `rows` rows of sparse tables in a taken slot.
    #[allow(clippy::mut_from_ref, reason = "as Lane::slot")]
    pub fn rows_of(&self, slot: u32, rows: usize) -> (&mut [u64], &mut [f32]) {
        self.lane.slot_rows(slot, rows)
    }

    /// Where rows of sparse tables come from.
    pub fn rows(&self) -> &rows::Source {
        &self.rows
    }

    /// Frees a slot whose gradient is of no use.
    pub fn drop_slot(&self, slot: u32) {
        drop(Hold::of(&self.lane, slot));
    }

    /// Begins to announce the gradient of `order` in `slot`, with those of so many rows of sparse tables.
    pub fn announce<'a>(&'a self, layout: &'a Layout, slot: u32, order: &Order, rows: usize) -> Announcement<'a> {
        let whole = if layout.trainable() == layout.len() { layout.chunks() } else { layout.trainable() / CHUNK };
        Announcement {
            link: self,
            layout,
            slot,
            order: (order.step, order.generation, order.node),
            rows: rows as u32,
            wakes: order.wakes,
            hold: match &self.way {
                Way::Streams { .. } => Hold::of(&self.lane, slot),
                Way::Shared { .. } => None, // it is the coordinator's to free
            },
            begun: Cell::new(false),
            are_rows_said: Cell::new(matches!(self.rows, rows::Source::None)),
            trained: whole,
            said: Cell::new(whole),
        }
    }
}

/// One gradient on its way out.
pub struct Announcement<'a> {
    link: &'a Link,
    layout: &'a Layout,
    slot: u32,
    order: (u64, u64, Node),
    rows: u32,
    wakes: bool,
    hold: Option<Arc<Hold>>,
    begun: Cell<bool>,
    /// Whether the gradients of rows were announced, or there are none.
    are_rows_said: Cell<bool>,
    /// The chunks below hold nothing but trainable values.
    trained: usize,
    /// Of those, the ones from here on were announced.
    said: Cell<usize>,
}

impl Announcement<'_> {
    /// All trainable values from `from` on are final; the first chunk of all is kept for [`Announcement::finish`].
    pub fn ready(&self, from: usize, sums: LossSums) {
        let first = from.div_ceil(CHUNK).max(1);
        if first < self.said.get() && sums.loss.is_finite() {
            let before = self.said.replace(first);
            // Those that are left over ring when all is final.
            let rings = self.wakes && (first - 1) / CHUNKS_A_RING < (before - 1) / CHUNKS_A_RING;
            self.say(first..before, sums, None, rings);
        }
    }

    /// The gradients of all rows of sparse tables are final.
    pub fn ready_rows(&self, sums: LossSums) {
        if sums.loss.is_finite() {
            self.say_rows(sums);
            if let Way::Shared { coordinator, .. } = &self.link.way {
                coordinator.bell().ring();
            }
        }
    }

    /// All is final.
    pub fn finish(self, sums: LossSums, spent: Spent) {
        let (said, trained) = (self.said.get(), self.trained);
        self.say_rows(sums);
        self.say(trained..self.layout.chunks(), sums, (said == 0).then_some(spent), true);
        self.say(0..said, sums, Some(spent), true);
    }

    /// Announces the node, once.
    fn begin(&self, sums: LossSums) {
        if self.begun.replace(true) {
            return;
        }
        let ((step, generation, node), rows) = (self.order, self.rows);
        let header = Header { step, generation, node, sums, rows };
        match &self.link.way {
            Way::Shared { coordinator, .. } => {
                self.link.lane.tell(Report::Begin { slot: self.slot, header }, &coordinator.bell());
            }
            // Where the stream has ended, the session hears of it.
            Way::Streams { push, .. } => drop(push.send(Piece::Node(header))),
        }
    }

    /// Announces the gradients of the rows of a model that has sparse tables, once; the coordinator sees it when its bell rings.
    fn say_rows(&self, sums: LossSums) {
        if self.are_rows_said.replace(true) {
            return;
        }
        self.begin(sums);
        match &self.link.way {
            Way::Shared { coordinator, .. } => {
                self.link.lane.tell(Report::Rows { slot: self.slot }, &coordinator.bell());
            }
            Way::Streams { push, .. } => {
                let part = self.hold.as_ref().and_then(|hold| RowPart::new(hold, self.rows as usize));
                part.map(|part| push.send(Piece::Rows(part)));
            }
        }
    }

    /// Announces chunks, with what was spent where the first of all, which comes last, is one of them; a coordinator that sleeps beside
    /// shared memory hears of it where it `rings`.
    fn say(&self, chunks: Range<usize>, sums: LossSums, spent: Option<Spent>, rings: bool) {
        self.begin(sums);
        match &self.link.way {
            Way::Shared { coordinator, .. } => {
                let (lane, bell, slot) = (&self.link.lane, coordinator.bell(), self.slot);
                if !chunks.is_empty() {
                    lane.tell(Report::Ready { slot, from: chunks.start as u32, to: chunks.end as u32, spent }, &bell);
                    if rings {
                        bell.ring();
                    }
                }
            }
            Way::Streams { push, .. } => {
                let spent = spent.map(|spent| (spent, Instant::now()));
                for index in chunks.rev() {
                    let Some(hold) = &self.hold else { return };
                    let spent = spent.filter(|_| index == 0);
                    push.send(Piece::Chunk { index, part: Part::new(hold, self.layout.chunk(index)), spent }).ok();
                }
            }
        }
    }
}
