//! Rows of sparse tables in memory that processes share: one writes, the others only read, and rows take memory when they are
//! written, a huge page ahead.
//!
//! An index (`index.rs`) says where the row of a key lies. It grows by generations, each twice as large as the one before, one behind
//! another; rows stay where they are. The file behind the memory is as large as the rows may become, and takes memory for that huge
//! page and what was written before it.

mod index;

use super::memory::{HUGE, Memory, PAGE, whole_pages};
use index::{ENTRY, Found, Index, NOWHERE};
use rayon::prelude::*;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use unisono_common::kernels;

/// Entries and rows that are fetched while one is worked on.
const AHEAD: usize = 32;

/// Entries of the first generation.
const FIRST: usize = 1024;

/// Words of the header: the generation, and how many rows there are.
const GENERATION: usize = 0;
const ROWS: usize = 1;

/// How large the rows may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Values of a row, and of its state.
    pub width: usize,
    pub state: usize,
    pub rows: u32,
}

impl Capacity {
    /// Rows that take no more than so many bytes, index and all: an entry for two rows at least, in generations.
    pub fn of_bytes(width: usize, state: usize, bytes: u64) -> Capacity {
        let capacity = Capacity { width, state, rows: 1 };
        let each = 4 * (capacity.record() + 8 * ENTRY) as u64;
        Capacity { rows: (bytes / each).clamp(1, 1 << 30) as u32, ..capacity }
    }

    /// Values of a row and its state together.
    fn record(self) -> usize {
        self.width + self.state
    }

    fn generations(self) -> u32 {
        let entries = (2 * self.rows as usize).next_power_of_two().max(FIRST);
        (entries / FIRST).trailing_zeros() + 1
    }

    /// Where a generation of the index begins, and the one before it ends.
    fn index_at(self, generation: u32) -> usize {
        PAGE + FIRST * ((1 << generation) - 1) * ENTRY * 4
    }

    /// Bytes of the memory, most of which are never touched.
    pub fn bytes(self) -> usize {
        self.rows_at() + whole_pages(self.rows as usize * self.record() * 4)
    }

    fn rows_at(self) -> usize {
        self.index_at(self.generations())
    }
}

/// The rows, for reading.
pub struct Rows {
    memory: Memory,
    capacity: Capacity,
}

impl Rows {
    /// Rows in a memory of [`Capacity::bytes`] that another process gave.
    pub fn of(memory: Memory, capacity: Capacity) -> Rows {
        Rows { memory, capacity }
    }

    fn header(&self) -> &[AtomicU32] {
        self.memory.read_words(0, 2)
    }

    fn index(&self, generation: u32) -> Index<'_> {
        let generation = generation.min(self.capacity.generations() - 1);
        let bits = FIRST.trailing_zeros() + generation;
        Index { words: self.memory.read_words(self.capacity.index_at(generation), ENTRY << bits), bits }
    }

    /// How many rows there are.
    pub fn len(&self) -> u32 {
        self.header()[ROWS].load(Ordering::Acquire).min(self.capacity.rows)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values of a row, and its state.
    #[allow(unsafe_code, reason = "shared memory")]
    pub fn row(&self, place: u32) -> &[f32] {
        let (len, rows) = (self.capacity.record(), self.capacity.rows);
        assert!(place < rows, "row {place} of {rows}");
        let at = place as usize * len;
        // SAFETY: rows are written between two steps, through the one `RowStore`, which is borrowed for it in its process; who reads
        // elsewhere has an order of the open step, or is given up and reads values of any kind.
        unsafe { self.memory.values(self.capacity.rows_at(), at..at + len) }
    }

    /// The values of a row.
    pub fn values(&self, place: u32) -> &[f32] {
        &self.row(place)[..self.capacity.width]
    }

    /// Copies each key's row to `out`, `(keys, width)`; `absent` fills those of a row that nobody has
    /// touched.
    pub fn read(&self, keys: &[u64], out: &mut [f32], mut absent: impl FnMut(u64, &mut [f32])) {
        let width = self.capacity.width;
        kernels::vectorized(
            #[inline(always)]
            || {
                self.each_place(
                    keys,
                    |_, _| true,
                    #[inline(always)]
                    |i, place| {
                        let out = &mut out[i * width..(i + 1) * width];
                        match place {
                            NOWHERE => absent(keys[i], out),
                            place => kernels::copy(out, self.values(place)),
                        }
                    },
                );
            },
        );
    }

    /// Passes on each key's number and the place of its row, whose values were fetched while others were passed on; [`NOWHERE`] for a
    /// key without a row, or one whose entry in the index is not `wanted`.
    #[inline(always)]
    fn each_place(&self, keys: &[u64], wanted: impl Fn(&Index<'_>, usize) -> bool, mut give: impl FnMut(usize, u32)) {
        let index = self.index(self.header()[GENERATION].load(Ordering::Acquire));
        let found = index.places(keys, self.capacity.rows);
        let mut found = found.map(|(place, at)| {
            let place = if place != NOWHERE && wanted(&index, at) { place } else { NOWHERE };
            self.come(place);
            place
        });
        let mut coming = [NOWHERE; AHEAD];
        coming.iter_mut().zip(&mut found).for_each(|(to, place)| *to = place);
        for i in 0..keys.len() {
            let place = coming[i % AHEAD];
            if let Some(ahead) = found.next() {
                coming[i % AHEAD] = ahead;
            }
            give(i, place);
        }
    }

    /// Says that a row is wanted soon: it is somewhere in a large memory, and others are looked for meanwhile.
    fn come(&self, place: u32) {
        if place < self.capacity.rows {
            let len = self.capacity.record();
            let row = self.memory.read_words(self.capacity.rows_at() + 4 * place as usize * len, len);
            (0..len).step_by(64 / 4).for_each(|at| kernels::fetch(row, at));
        }
    }
}

/// No more rows fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// The rows, for the one who writes them.
pub struct RowStore {
    rows: Rows,
    /// Up to where memory is there for rows.
    backed: usize,
    /// Whether anybody has asked which rows have changed. Until then entries are not told: of a large index that is a write to memory
    /// for each row.
    is_asked: AtomicBool,
    /// The last step whose changes the entries were not told.
    untold: AtomicU64,
}

impl std::ops::Deref for RowStore {
    type Target = Rows;

    fn deref(&self) -> &Rows {
        &self.rows
    }
}

impl RowStore {
    /// No rows yet, in memory that others may read.
    ///
    /// # Errors
    /// Where the system has not so much address space to give.
    pub fn create(capacity: Capacity) -> io::Result<RowStore> {
        Ok(RowStore::of(Memory::create("unisono-rows", capacity.bytes(), true)?, capacity))
    }

    /// No rows yet, in memory of this process alone.
    ///
    /// # Errors
    /// Where the system has not so much address space to give.
    pub fn private(capacity: Capacity) -> io::Result<RowStore> {
        Ok(RowStore::of(Memory::private(capacity.bytes())?, capacity))
    }

    fn of(memory: Memory, capacity: Capacity) -> RowStore {
        // Few rows take no more than what they need.
        let backed = (capacity.rows_at() + HUGE).next_multiple_of(HUGE);
        RowStore {
            rows: Rows::of(memory, capacity),
            backed,
            is_asked: AtomicBool::new(false),
            untold: AtomicU64::new(0),
        }
    }

    /// Passes on the number and the values of each key that has a row; with `since`, of all whose row has changed since it was that
    /// of this step, which is less than 2^31 steps ago, and not many others: those that have not changed for 2^31 steps, and all of
    /// them where nobody had asked before the step after `since` was made.
    pub fn each_row(&self, keys: &[u64], since: Option<u64>, mut give: impl FnMut(usize, &[f32])) {
        self.is_asked.store(true, Ordering::Relaxed);
        let since = since.filter(|since| *since >= self.untold.load(Ordering::Relaxed));
        let wanted = |index: &Index<'_>, at| since.is_none_or(|since| index.has_changed(at, since));
        self.each_place(keys, wanted, |i, place| {
            if place != NOWHERE {
                give(i, self.values(place));
            }
        });
    }

    /// The memory, to give it away.
    pub fn memory(&self) -> &Memory {
        &self.rows.memory
    }

    /// How large it may become.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// The place of a key's row; where it is new, `first` fills its values and its state, as they are at `step`.
    ///
    /// # Errors
    /// No room for a new one.
    pub fn place(&mut self, key: u64, step: u64, first: impl FnOnce(&mut [f32])) -> Result<u32, Full> {
        let generation = self.header()[GENERATION].load(Ordering::Relaxed);
        let free = match self.index(generation).find(key) {
            Found::Row(row, _) => return Ok(row),
            Found::Free(at) => at,
        };
        let row = self.len();
        if row == self.capacity.rows {
            return Err(Full);
        }
        first(self.row_mut(row));
        self.index(generation).put(free, key, row, step as u32);
        self.grow_to(row + 1);
        Ok(row)
    }

    /// Says that there are so many rows, in an index that is large enough.
    fn grow_to(&mut self, rows: u32) {
        let mut generation = self.header()[GENERATION].load(Ordering::Relaxed);
        while 2 * rows as usize > FIRST << generation && generation + 1 < self.capacity.generations() {
            self.grow(generation);
            generation += 1;
        }
        let end = self.capacity.rows_at() + rows as usize * self.capacity.record() * 4;
        if self.backed < end {
            let to = end.next_multiple_of(HUGE);
            self.memory().back(self.backed..to);
            self.backed = to;
        }
        self.memory().words(0, 2)[ROWS].store(rows, Ordering::Release);
    }

    /// Copies a generation's entries to the next one, which nobody looks at yet.
    fn grow(&mut self, generation: u32) {
        let (old, new) = (self.index(generation), self.index(generation + 1));
        self.memory().back(self.capacity.index_at(generation + 1)..self.capacity.index_at(generation + 2));
        for at in 0..1usize << old.bits {
            let entry = old.entry(at);
            let row = entry[2].load(Ordering::Relaxed);
            if row > 0 {
                let half = |i: usize| entry[i].load(Ordering::Relaxed) as u64;
                let key = half(0) | half(1) << 32;
                if let Found::Free(free) = new.find(key) {
                    new.put(free, key, row - 1, entry[3].load(Ordering::Relaxed));
                }
            }
        }
        self.memory().words(0, 2)[GENERATION].store(generation + 1, Ordering::Release);
    }

    #[allow(unsafe_code, reason = "shared memory")]
    fn row_mut(&mut self, place: u32) -> &mut [f32] {
        // SAFETY: the one who writes is borrowed.
        unsafe { self.row_of_one(place) }
    }

    /// What keys' rows become at `step`, on the current thread pool: what `make` gives, for some of them at once, gets a key and
    /// its number, whether it has no row yet, and the row to change. The rows that there are stay as they are, but
    /// count as changed, where anybody asks for that. `spare` is memory to work with.
    ///
    /// # Panics
    /// Where keys are not ascending.
    pub fn plan<M>(&self, keys: Vec<u64>, step: u64, spare: Vec<f32>, make: impl Fn() -> M + Sync) -> Plan
    where
        M: FnMut((u64, usize), bool, &mut [f32]),
    {
        self.plan_where(keys, step, spare, make, false)
    }

    /// [`RowStore::plan`] where nobody needs the rows as they are: those that there are change at once, and [`RowStore::put`] has
    /// only those to put that are new.
    ///
    /// # Panics
    /// Where keys are not ascending.
    pub fn plan_in_place<M>(&mut self, keys: Vec<u64>, step: u64, spare: Vec<f32>, make: impl Fn() -> M + Sync) -> Plan
    where
        M: FnMut((u64, usize), bool, &mut [f32]),
    {
        self.plan_where(keys, step, spare, make, true)
    }

    #[allow(unsafe_code, reason = "shared memory")]
    fn plan_where<M>(
        &self,
        keys: Vec<u64>,
        step: u64,
        spare: Vec<f32>,
        make: impl Fn() -> M + Sync,
        is_in_place: bool,
    ) -> Plan
    where
        M: FnMut((u64, usize), bool, &mut [f32]),
    {
        assert!(keys.is_sorted_by(|a, b| a < b), "keys are ascending");
        let (mut places, mut rows) = (vec![NOWHERE; keys.len()], spare);
        let (len, each) = (self.capacity.record(), each(keys.len()));
        rows.resize(keys.len() * len, 0.0);
        let is_told = self.is_asked.load(Ordering::Relaxed);
        if !is_told {
            self.untold.store(step, Ordering::Relaxed);
        }
        let tell = |index: &Index<'_>, at| {
            if is_told {
                index.tell(at, step);
            }
            true
        };
        let all = keys.par_chunks(each).zip(places.par_chunks_mut(each)).zip(rows.par_chunks_mut(each * len));
        all.enumerate().for_each(|(chunk, ((keys, places), rows))| {
            let mut make = make();
            kernels::vectorized(
                #[inline(always)]
                || {
                    self.each_place(
                        keys,
                        tell,
                        #[inline(always)]
                        |i, place| {
                            places[i] = place;
                            let (key, row) = ((keys[i], chunk * each + i), &mut rows[i * len..(i + 1) * len]);
                            match place {
                                NOWHERE => make(key, true, row),
                                place if is_in_place => {
                                    // SAFETY: keys are different, so no place is there twice, and each is given to one
                                    // thread; the one who writes is borrowed by `RowStore::plan_in_place`.
                                    make(key, false, unsafe { self.row_of_one(place) });
                                }
                                place => {
                                    kernels::copy(row, self.row(place));
                                    make(key, false, row);
                                }
                            }
                        },
                    );
                },
            );
        });
        Plan { step, keys, places, rows, is_in_place }
    }

    /// Puts what was planned in its place, on the current thread pool; nothing else was put since.
    ///
    /// # Errors
    /// No room for all that are new: then none is put.
    #[allow(unsafe_code, reason = "shared memory")]
    pub fn put(&mut self, plan: &mut Plan) -> Result<(), Full> {
        let Plan { step, keys, places, rows, is_in_place } = plan;
        let before = self.len();
        let new = places.iter().filter(|place| **place == NOWHERE).count();
        if new > (self.capacity.rows - before) as usize {
            return Err(Full);
        }
        self.grow_to(before + new as u32);
        let index = self.index(self.header()[GENERATION].load(Ordering::Relaxed));
        let absent = places.iter_mut().zip(&*keys).filter(|(place, _)| **place == NOWHERE);
        for (row, (place, key)) in (before..).zip(absent) {
            *place = row;
            if let Found::Free(free) = index.find(*key) {
                index.put(free, *key, row, *step as u32);
            }
        }
        if *is_in_place && new == 0 {
            return Ok(());
        }
        let (len, each, store) = (self.capacity.record(), each(places.len()), &*self);
        let from = if *is_in_place { before } else { 0 };
        places.par_chunks(each).zip(rows.par_chunks(each * len)).for_each(|(places, rows)| {
            let wanted = |place: &u32| *place >= from;
            for (i, row) in rows.chunks_exact(len).enumerate() {
                places.get(i + AHEAD).filter(|place| wanted(place)).into_iter().for_each(|place| store.come(*place));
                if wanted(&places[i]) {
                    // SAFETY: keys are different, so no place is there twice, and each is given to one thread; the one who writes
                    // is borrowed.
                    kernels::copy(unsafe { store.row_of_one(places[i]) }, row);
                }
            }
        });
        Ok(())
    }

    /// A row, to be changed.
    ///
    /// # Safety
    /// Nobody else in this process has it. (Nobody elsewhere has an order to read rows that change.)
    #[inline(always)]
    #[allow(unsafe_code, clippy::mut_from_ref, reason = "shared memory")]
    unsafe fn row_of_one(&self, place: u32) -> &mut [f32] {
        let (len, rows) = (self.capacity.record(), self.capacity.rows);
        assert!(place < rows, "row {place} of {rows}");
        let at = place as usize * len;
        // SAFETY: as promised.
        unsafe { self.memory().values_mut(self.capacity.rows_at(), at..at + len) }
    }
}

/// What rows become, beside those that there are.
pub struct Plan {
    step: u64,
    keys: Vec<u64>,
    /// [`NOWHERE`] for a key that has no row yet.
    places: Vec<u32>,
    /// `(keys, values and state)`
    rows: Vec<f32>,
    /// Whether the rows that there were are those already.
    is_in_place: bool,
}

impl Plan {
    /// Its keys, and their rows' places; once it was put, those of all.
    pub fn places(&self) -> impl Iterator<Item = (u64, u32)> {
        self.keys.iter().copied().zip(self.places.iter().copied())
    }

    /// The memory that it was made in.
    pub fn into_spare(self) -> Vec<f32> {
        self.rows
    }
}

/// Of so many rows those that a thread takes at once: few, so that nobody waits long for a thread that has no core.
fn each(rows: usize) -> usize {
    rows.div_ceil(8 * rayon::current_num_threads()).max(256)
}

#[cfg(test)]
mod tests;
