//! One worker's lane: a bell that wakes it, orders down, reports up, and two slots for gradients.
//!
//! A worker without shared memory has a lane too, for itself alone: its slots are what it sends from.

use super::frame::{Order, Report};
use super::memory::{Memory, PAGE, whole_pages};
use super::ring::{Bell, FRAME, Ring};
use crate::WireError;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Slots of a lane. A gradient in the first waits there until it is needed; one in the second is taken out at once, so that
/// a worker of many nodes never waits for itself. Most workers never touch the second.
pub const SLOTS: u32 = 2;

/// Frames of each ring: a worker owes few nodes, and says a few things of each.
const FRAMES: usize = 256;

const RING: usize = Ring::<AtomicU32>::words(FRAMES);
const BELL: usize = Bell::<AtomicU32>::WORDS;
/// Words before the slots: the bell, a line for the slots' states, the two rings.
const WORDS: usize = BELL + 16 + 2 * RING;

/// What a slot has room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotSize {
    /// Values of a gradient.
    pub len: usize,
    /// Rows of sparse tables, and values of each.
    pub rows: usize,
    pub width: usize,
}

impl SlotSize {
    /// Of a model without sparse tables.
    pub fn dense(len: usize) -> SlotSize {
        SlotSize { len, ..SlotSize::default() }
    }

    /// The gradient's bytes, the rows' keys', and the rows' gradients'.
    fn parts(self) -> [usize; 3] {
        [self.len * 4, self.rows * 8, self.rows * self.width * 4].map(whole_pages)
    }

    fn bytes(self) -> usize {
        self.parts().iter().sum()
    }
}

/// One worker's lane.
pub struct Lane {
    memory: Memory,
    size: SlotSize,
    /// Ends the worker's waiting; of this process only.
    closed: AtomicBool,
}

impl Lane {
    /// Bytes of the memory for slots of a size.
    pub fn bytes(size: SlotSize) -> usize {
        whole_pages(WORDS * 4) + SLOTS as usize * size.bytes()
    }

    /// A lane that can be given to a worker.
    ///
    /// # Errors
    /// Where the system has not so much memory to give.
    pub fn create(size: SlotSize) -> io::Result<Lane> {
        Ok(Lane::of(Memory::create("unisono-lane", Lane::bytes(size), false)?, size))
    }

    /// A lane for this process alone.
    ///
    /// # Errors
    /// Where the system has not so much memory to give.
    pub fn private(size: SlotSize) -> io::Result<Lane> {
        Ok(Lane::of(Memory::private(Lane::bytes(size))?, size))
    }

    /// A lane with slots of a size in a memory of [`Lane::bytes`].
    pub fn of(memory: Memory, size: SlotSize) -> Lane {
        Lane { memory, size, closed: AtomicBool::new(false) }
    }

    /// The memory, to give it away.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The bell that wakes the worker.
    pub fn bell(&self) -> Bell<'_, AtomicU32> {
        Bell(self.memory.words(0, BELL))
    }

    fn down(&self) -> Ring<'_, AtomicU32> {
        Ring(self.memory.words((BELL + 16) * 4, RING))
    }

    fn up(&self) -> Ring<'_, AtomicU32> {
        Ring(self.memory.words((BELL + 16 + RING) * 4, RING))
    }

    /// 1 where the worker waits, and would be at work if weights changed.
    fn looks(&self) -> &AtomicU32 {
        &self.memory.words((BELL + SLOTS as usize) * 4, 1)[0]
    }

    /// 0 where the slot is free; the worker sets it, the coordinator clears it.
    fn taken(&self, slot: u32) -> &AtomicU32 {
        &self.memory.words((BELL + slot as usize) * 4, 1)[0]
    }

    fn slot_at(&self, slot: u32) -> usize {
        whole_pages(WORDS * 4) + slot as usize * self.size.bytes()
    }

    /// What the slots have room for.
    pub fn size(&self) -> SlotSize {
        self.size
    }

    // The coordinator's side.

    /// Sends an order; false where the worker does not take them.
    pub fn order(&self, order: Order) -> bool {
        let sent = self.down().push(&order.to_frame());
        self.bell().ring();
        sent
    }

    /// Wakes the worker where it waits for weights to change: those of the next step, for all or some of which it looks.
    pub fn weights_changed(&self) {
        if self.looks().load(Ordering::Relaxed) != 0 {
            self.bell().ring();
        }
    }

    /// The worker's next report.
    ///
    /// # Errors
    /// A frame that is none.
    pub fn report(&self) -> Result<Option<Report>, WireError> {
        self.up().pop().map(|frame| Report::from_frame(&frame)).transpose()
    }

    // The worker's side.

    /// Wakes the worker for good: from now on it waits for nothing.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.bell().ring();
    }

    /// What `look` finds, as soon as it finds something; `None` when the lane is closed.
    fn wait_for<T>(&self, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        loop {
            let heard = self.bell().listen();
            if self.closed.load(Ordering::SeqCst) {
                return None;
            }
            if let Some(found) = look() {
                return Some(found);
            }
            self.bell().sleep(heard, None);
        }
    }

    /// Waits for the next order; `None` when the lane is closed, or what came was none. Where it has not come yet, `meanwhile` is run
    /// first, and again when weights have changed for as long as it says that it could do more then.
    pub fn next_order(&self, mut meanwhile: impl FnMut() -> bool) -> Option<Order> {
        let frame = self.wait_for(|| {
            self.down().pop().or_else(|| {
                self.looks().store(meanwhile().into(), Ordering::Relaxed);
                self.down().pop()
            })
        });
        self.looks().store(0, Ordering::Relaxed);
        let frame: [u32; FRAME] = frame?;
        Order::from_frame(&frame).ok()
    }

    /// Waits for a free slot, and takes it; `None` when the lane is closed.
    pub fn take_slot(&self) -> Option<u32> {
        let slot = self.wait_for(|| (0..SLOTS).find(|&slot| self.taken(slot).load(Ordering::Acquire) == 0))?;
        self.taken(slot).store(1, Ordering::Relaxed);
        Some(slot)
    }

    /// Sends a report; the coordinator sees it when `bell`, its own, rings. Where it is far behind, for hundreds of frames, it rings here.
    pub fn tell(&self, report: Report, bell: &Bell<'_, AtomicU32>) {
        let frame = report.to_frame();
        while !self.up().push(&frame) && !self.closed.load(Ordering::SeqCst) {
            bell.ring();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// The gradient in a slot that the worker has taken, to be filled.
    ///
    /// What was reported as ready must not be written any more; it is read by others.
    #[allow(
        clippy::mut_from_ref,
        reason = "the slot is the worker's while it is taken, and a worker has one thread for it"
    )]
    #[allow(unsafe_code, reason = "shared memory")]
    pub fn slot(&self, slot: u32) -> &mut [f32] {
        assert!(slot < SLOTS && self.taken(slot).load(Ordering::Relaxed) != 0, "the slot is taken first");
        // SAFETY: nobody reads of a taken slot what its worker has not reported as ready, and then the worker writes it no more.
        unsafe { self.memory.values_mut(self.slot_at(slot), 0..self.size.len) }
    }

    /// The keys and gradients of `rows` rows in a slot that the worker has taken, to be filled; as [`Lane::slot`].
    #[allow(clippy::mut_from_ref, reason = "as Lane::slot")]
    #[allow(unsafe_code, reason = "shared memory")]
    pub fn slot_rows(&self, slot: u32, rows: usize) -> (&mut [u64], &mut [f32]) {
        assert!(slot < SLOTS && self.taken(slot).load(Ordering::Relaxed) != 0, "the slot is taken first");
        assert!(rows <= self.size.rows, "{rows} rows in a slot for {}", self.size.rows);
        let [gradient, keys, _] = self.size.parts();
        let at = self.slot_at(slot) + gradient;
        // SAFETY: as for the slot's gradient; the two do not overlap.
        let (keys, values) = unsafe {
            (self.memory.values_mut(at, 0..2 * rows), self.memory.values_mut(at + keys, 0..rows * self.size.width))
        };
        (bytemuck::cast_slice_mut(keys), values)
    }
}

/// A taken slot: it is free again when the last part of it is dropped.
pub struct Hold {
    lane: Arc<Lane>,
    slot: u32,
}

impl Hold {
    /// Holds a slot of `lane`; `None` where it is taken by nobody.
    pub fn of(lane: &Arc<Lane>, slot: u32) -> Option<Arc<Hold>> {
        let taken = slot < SLOTS && lane.taken(slot).load(Ordering::Acquire) != 0;
        taken.then(|| Arc::new(Hold { lane: lane.clone(), slot }))
    }

    /// Whether gradients may wait in this slot.
    pub fn may_wait(&self) -> bool {
        self.slot == 0
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.lane.taken(self.slot).store(0, Ordering::Release);
        self.lane.bell().ring();
    }
}

/// Values of a slot that were reported as ready.
pub struct Part {
    hold: Arc<Hold>,
    range: Range<usize>,
}

impl Part {
    /// The values at `range`.
    pub fn new(hold: &Arc<Hold>, range: Range<usize>) -> Part {
        Part { hold: hold.clone(), range }
    }

    /// Whether they may stay where they are for long.
    pub fn may_wait(&self) -> bool {
        self.hold.may_wait()
    }

    /// The values.
    #[allow(unsafe_code, reason = "shared memory")]
    pub fn values(&self) -> &[f32] {
        let lane = &self.hold.lane;
        // SAFETY: they are final, and the slot is not free before this part is dropped.
        unsafe { lane.memory.values(lane.slot_at(self.hold.slot), self.range.clone()) }
    }
}

/// The rows of a slot that were reported as ready.
pub struct RowPart {
    hold: Arc<Hold>,
    rows: usize,
}

impl RowPart {
    /// The first `rows` rows; `None` where a slot has no room for so many.
    pub fn new(hold: &Arc<Hold>, rows: usize) -> Option<RowPart> {
        (rows <= hold.lane.size.rows).then(|| RowPart { hold: hold.clone(), rows })
    }

    /// Whether they may stay where they are for long.
    pub fn may_wait(&self) -> bool {
        self.hold.may_wait()
    }

    /// Their keys, and their gradients, `(keys, width)`.
    #[allow(unsafe_code, reason = "shared memory")]
    pub fn values(&self) -> (&[u64], &[f32]) {
        let (lane, size) = (&self.hold.lane, self.hold.lane.size);
        let [gradient, keys, _] = size.parts();
        let at = lane.slot_at(self.hold.slot) + gradient;
        // SAFETY: they are final, and the slot is not free before this part is dropped.
        let (keys, values) = unsafe {
            (lane.memory.values(at, 0..2 * self.rows), lane.memory.values(at + keys, 0..self.rows * size.width))
        };
        (bytemuck::cast_slice(keys), values)
    }
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        unisono_common::layout::le_bytes(self.values())
    }
}

const _: () = assert!(FRAMES.is_power_of_two() && PAGE >= BELL * 4, "a ring's counters wrap around");

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use unisono_common::tree::Node;

    fn order(step: u64) -> Order {
        Order { step, generation: 1, node: Node { lo: 0, hi: 2 }, evaluate: false, rows_first: true, wakes: false }
    }

    #[test]
    fn orders_go_down_reports_go_up_and_slots_come_back() {
        let size = SlotSize { len: 10, rows: 600, width: 3 };
        let lane = Arc::new(Lane::create(size).expect("memory"));
        for step in 0..1000 {
            assert!(lane.order(order(step)));
            assert_eq!(lane.next_order(|| panic!("an order is there")), Some(order(step)));
            let slot = lane.take_slot().expect("free");
            assert_eq!(slot, 0);
            lane.slot(slot).fill(step as f32);
            lane.tell(Report::Ready { slot, from: 0, to: 1, spent: None }, &lane.bell());
            assert_eq!(lane.report(), Ok(Some(Report::Ready { slot, from: 0, to: 1, spent: None })));
            let hold = Hold::of(&lane, slot).expect("taken");
            let (a, b) = (Part::new(&hold, 0..4), Part::new(&hold, 4..10));
            drop(hold);
            assert_eq!(lane.take_slot(), Some(1), "the first is in use");
            drop(a);
            assert_eq!(b.values(), [step as f32; 6]);
            let (keys, values) = lane.slot_rows(1, 600);
            keys.fill(step);
            values.fill(-1.0);
            let hold = Hold::of(&lane, 1).expect("taken");
            let rows = RowPart::new(&hold, 600).expect("room");
            assert_eq!(rows.values(), (&[step; 600][..], &[-1.0; 1800][..]));
            assert!(RowPart::new(&hold, 601).is_none() && b.values() == [step as f32; 6]);
            drop((b, rows, hold));
        }
        assert_eq!(lane.report(), Ok(None));
        assert!(Hold::of(&lane, 0).is_none() && Hold::of(&lane, SLOTS).is_none());
        // What is done meanwhile may take until the order comes.
        let mut times = 0;
        let came = lane.next_order(|| {
            times += 1;
            lane.order(order(7))
        });
        assert_eq!((came, times), (Some(order(7)), 1));
        let waiting = std::thread::spawn({
            let lane = lane.clone();
            move || lane.next_order(|| false)
        });
        lane.close();
        assert_eq!(waiting.join().expect("no panic"), None);
        assert!(lane.order(order(8)));
        assert_eq!(lane.next_order(|| false), None, "a closed lane gives no orders");
        assert!((0..=FRAMES as u64).any(|step| !lane.order(order(step))), "a worker that takes no orders is noticed");
    }

    #[test]
    fn weights_that_change_wake_whom_they_give_work() {
        let lane = Arc::new(Lane::create(SlotSize::dense(1)).expect("memory"));
        let (says, said) = std::sync::mpsc::channel();
        let worker = std::thread::spawn({
            let (lane, mut left) = (lane.clone(), 2);
            move || {
                lane.next_order(|| {
                    left -= 1;
                    says.send(left).expect("somebody listens");
                    left > 0
                })
            }
        });
        let first = said.recv_timeout(Duration::from_secs(60));
        // It may be about to say that it looks.
        let woken = std::iter::repeat_with(|| {
            lane.weights_changed();
            said.recv_timeout(Duration::from_millis(10))
        });
        let second = woken.take(1000).find(Result::is_ok);
        while second.is_some() && lane.looks().load(Ordering::Relaxed) != 0 {
            std::thread::yield_now();
        }
        let bell = lane.bell().listen();
        lane.weights_changed();
        let is_silent = lane.bell().listen() == bell;
        lane.order(order(3));
        let came = worker.join().expect("no panic");
        assert_eq!((first, second, came), (Ok(1), Some(Ok(0)), Some(order(3))));
        assert!(is_silent, "who has nothing to do is woken");
    }

    #[test]
    fn who_sleeps_is_woken_where_there_is_no_room_for_a_report() {
        let lane = Lane::create(SlotSize::dense(1)).expect("memory");
        let words: Vec<_> = (0..Bell::<AtomicU32>::WORDS).map(|_| AtomicU32::new(0)).collect();
        let bell = Bell(&words);
        let reports = (0..=FRAMES as u32).map(|slot| Report::Rows { slot });
        let mut rang = false;
        std::thread::scope(|scope| {
            let heard = bell.listen();
            scope.spawn(|| reports.clone().for_each(|report| lane.tell(report, &bell)));
            bell.sleep(heard, Some(Duration::from_secs(60)));
            rang = bell.listen() != heard;
            for report in reports.clone() {
                let came = std::iter::repeat_with(|| lane.report().expect("a frame")).find_map(|came| came);
                assert_eq!(came, Some(report));
            }
        });
        assert!(rang, "nobody was woken");
    }
}
