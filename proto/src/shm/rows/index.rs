//! Where the row of a key lies: open addressing by the key's first bits, so that keys in their order are found in the order of memory.

use super::AHEAD;
use std::sync::atomic::{AtomicU32, Ordering};
use unisono_common::kernels;

/// Words of an entry: the key's two halves, one more than the row's place (0: nothing is there), and the last 32 bits of the
/// step that comes after the row's last change that was told.
pub const ENTRY: usize = 4;

/// The place of a key without a row.
pub const NOWHERE: u32 = u32::MAX;

/// One generation of the index.
pub struct Index<'a> {
    pub words: &'a [AtomicU32],
    pub bits: u32,
}

/// What stands at a key's place.
pub enum Found {
    /// A row, and the entry that says so.
    Row(u32, usize),
    /// Nothing, in this entry.
    Free(usize),
}

impl Index<'_> {
    /// The words of an entry.
    pub fn entry(&self, at: usize) -> &[AtomicU32] {
        &self.words[at * ENTRY..(at + 1) * ENTRY]
    }

    /// Where a key is looked for first.
    fn start(&self, key: u64) -> usize {
        (key >> (64 - self.bits)) as usize
    }

    /// Looks for a key. What a stranger to the current step sees may be anything, and is looked at so often at most.
    pub fn find(&self, key: u64) -> Found {
        let entries = 1usize << self.bits;
        let mut at = self.start(key);
        for _ in 0..entries {
            let entry = self.entry(at);
            let row = entry[2].load(Ordering::Acquire);
            if row == 0 {
                break;
            }
            let half = |i: usize| entry[i].load(Ordering::Relaxed) as u64;
            if half(0) | half(1) << 32 == key {
                return Found::Row(row - 1, at);
            }
            at = (at + 1) % entries;
        }
        Found::Free(at)
    }

    /// The places of keys' rows among so many, or [`NOWHERE`], and their entries; entries are somewhere in a large memory, and fetched
    /// while others are looked at.
    #[inline(always)]
    pub fn places(&self, keys: &[u64], rows: u32) -> impl Iterator<Item = (u32, usize)> {
        let fetch = |key: u64| kernels::fetch(self.words, self.start(key) * ENTRY);
        keys.iter().take(AHEAD).for_each(|key| fetch(*key));
        keys.iter().enumerate().map(move |(i, key)| {
            if let Some(ahead) = keys.get(i + AHEAD) {
                fetch(*ahead);
            }
            match self.find(*key) {
                Found::Row(row, at) if row < rows => (row, at),
                Found::Row(_, at) | Found::Free(at) => (NOWHERE, at),
            }
        })
    }

    /// Whether the row of an entry has changed since it was that of step `since`.
    pub fn has_changed(&self, at: usize, since: u64) -> bool {
        self.entry(at)[3].load(Ordering::Relaxed).wrapping_sub(since as u32).cast_signed() > 0
    }

    /// Tells an entry that its row changes at `step`.
    pub fn tell(&self, at: usize, step: u64) {
        self.entry(at)[3].store(step as u32, Ordering::Relaxed);
    }

    /// An entry says where the row of a key is, and that it changed last at `step`.
    pub fn put(&self, at: usize, key: u64, row: u32, step: u32) {
        let entry = self.entry(at);
        entry[0].store(key as u32, Ordering::Relaxed);
        entry[1].store((key >> 32) as u32, Ordering::Relaxed);
        entry[3].store(step, Ordering::Relaxed);
        entry[2].store(row + 1, Ordering::Release);
    }
}
