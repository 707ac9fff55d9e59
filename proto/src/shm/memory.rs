//! Memory that processes share: an anonymous file, sealed against resizing, mapped by both sides.
//!
//! It has no name in any file system, so nothing stays behind whatever dies, and nobody opens it who was not given it.
#![allow(unsafe_code, reason = "memory that another process sees has to be mapped")]

use super::ring::Bell;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::mm::{MapFlags, ProtFlags};
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use unisono_common::layout::CHUNK;

/// Parts of a memory begin at multiples of this: no page, and no line of a cache, belongs to two of them.
pub const PAGE: usize = 4096;

/// Bytes of a huge page: one entry of the table in which the processor looks addresses up, in place of 512. Where memory is read here
/// and there, that table's misses are most of the time.
pub(super) const HUGE: usize = 2 << 20;

/// `bytes`, rounded up to whole pages.
pub const fn whole_pages(bytes: usize) -> usize {
    bytes.div_ceil(PAGE) * PAGE
}

/// As in Linux' asm-generic/mman-common.h; not every libc has it.
#[cfg(target_os = "linux")]
const COLLAPSE: libc::c_int = 25;

/// A mapping, and the file behind it where other processes can be given it.
pub struct Memory {
    start: NonNull<u8>,
    bytes: usize,
    writable: bool,
    file: Option<OwnedFd>,
}

// SAFETY: the mapping lives as long as the value, and belongs to no thread. What may be read and written when is said at
// `values` and `values_mut`.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `bytes` of zeros; where this system can, they can be given to other processes, for reading only if `read_only`.
    ///
    /// # Errors
    /// Where the system has not so much memory to give.
    pub fn create(name: &str, bytes: usize, read_only: bool) -> io::Result<Memory> {
        let bytes = whole_pages(bytes.max(1));
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{MemfdFlags, Mode, SealFlags};
            let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR)?;
            rustix::fs::ftruncate(&file, bytes as u64)?;
            let memory = Memory::map(file, bytes, true)?;
            let mut seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            if read_only {
                seals |= SealFlags::FUTURE_WRITE;
            }
            rustix::fs::fcntl_add_seals(memory.file().ok_or(io::ErrorKind::Other)?, seals)?;
            Ok(memory)
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = (name, read_only);
            Memory::private(bytes)
        }
    }

    /// `bytes` of zeros for this process alone.
    ///
    /// # Errors
    /// Where the system has not so much memory to give.
    pub fn private(bytes: usize) -> io::Result<Memory> {
        let bytes = whole_pages(bytes.max(1));
        // SAFETY: a new mapping, wherever there is room, overlaps nothing.
        let start = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE)?
        };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::Other)?;
        Ok(Memory { start, bytes, writable: true, file: None })
    }

    /// An address at which `bytes` may be mapped so that a huge page begins there: a wish, as another thread may be faster.
    #[cfg(target_os = "linux")]
    fn wish(bytes: usize) -> *mut std::ffi::c_void {
        let (any, bytes) = (std::ptr::null_mut(), bytes + HUGE);
        // SAFETY: a new mapping, in which nobody may look, overlaps nothing, and nobody knows of it when it goes.
        unsafe {
            let Ok(room) = rustix::mm::mmap_anonymous(any, bytes, ProtFlags::empty(), MapFlags::PRIVATE) else {
                return any;
            };
            rustix::mm::munmap(room, bytes).ok();
            room.wrapping_byte_add(room.cast::<u8>().align_offset(HUGE))
        }
    }

    /// Maps the file that another process gave, which must have this size and keep it.
    ///
    /// # Errors
    /// Another size, a file that could shrink under its readers, and no memory.
    #[cfg(target_os = "linux")]
    pub fn open(file: OwnedFd, bytes: usize, writable: bool) -> io::Result<Memory> {
        use rustix::fs::SealFlags;
        let bytes = whole_pages(bytes.max(1));
        let wrong = |what: String| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        let size = rustix::fs::fstat(&file)?.st_size as u64;
        if size != bytes as u64 {
            return wrong(format!("the shared memory has {size} bytes, not {bytes}"));
        }
        let seals = rustix::fs::fcntl_get_seals(&file)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return wrong("the shared memory could be resized".into());
        }
        Memory::map(file, bytes, writable)
    }

    #[cfg(target_os = "linux")]
    fn map(file: OwnedFd, bytes: usize, writable: bool) -> io::Result<Memory> {
        let access = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let wish = Memory::wish(bytes);
        // SAFETY: a new mapping, wherever there is room, overlaps nothing. The file keeps its size: it is sealed.
        let start = unsafe { rustix::mm::mmap(wish, bytes, access, MapFlags::SHARED, &file, 0)? };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::Other)?;
        Ok(Memory { start, bytes, writable, file: Some(file) })
    }

    /// Gives the huge pages that lie in `bytes` their memory, which is going to be written; where the system has none, it comes page
    /// by page.
    ///
    /// Shared memory has huge pages where an administrator has said so, and where they are asked for (madvise(2), MADV_COLLAPSE,
    /// Linux 6.1). That is cheaper where small ones are there, and to allocate those together takes a third of what it takes to touch
    /// them.
    pub(super) fn back(&self, bytes: Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Some(file) = self.file() {
            let (start, end) = (bytes.start.next_multiple_of(HUGE), bytes.end.min(self.bytes) / HUGE * HUGE);
            let (all, len) = (rustix::fs::FallocateFlags::empty(), end.saturating_sub(start));
            if len > 0 && rustix::fs::fallocate(file, all, start as u64, len as u64).is_ok() {
                // SAFETY: within the mapping, whose content stays as it is.
                unsafe { libc::madvise(self.at(start, len).as_ptr().cast(), len, COLLAPSE) };
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = bytes;
    }

    /// The file to give to another process; `None` where only this one has the memory.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd)
    }

    fn at(&self, byte: usize, bytes: usize) -> NonNull<u8> {
        assert!(byte.is_multiple_of(PAGE) || byte.is_multiple_of(4), "parts are aligned");
        assert!(byte.checked_add(bytes).is_some_and(|end| end <= self.bytes), "outside of the memory");
        // SAFETY: within the mapping, as just checked.
        unsafe { self.start.add(byte) }
    }

    /// Words that both sides may read and write at any time.
    ///
    /// # Panics
    /// Outside of the memory, and where it may only be read.
    pub fn words(&self, byte: usize, words: usize) -> &[AtomicU32] {
        assert!(self.writable, "this memory may only be read");
        let start = self.at(byte, words * 4);
        // SAFETY: within the mapping and aligned; atomics may be shared with anybody, and any bits are one.
        unsafe { std::slice::from_raw_parts(start.cast().as_ptr(), words) }
    }

    /// Words that the other side may write at any time, to be loaded and never stored.
    ///
    /// # Panics
    /// Outside of the memory.
    pub(super) fn read_words(&self, byte: usize, words: usize) -> &[AtomicU32] {
        let start = self.at(byte, words * 4);
        // SAFETY: within the mapping and aligned; any bits are an atomic word, and one of memory for reading may be loaded.
        unsafe { std::slice::from_raw_parts(start.cast().as_ptr(), words) }
    }

    /// Values that nobody changes now.
    ///
    /// # Safety
    /// As long as the slice lives, nobody whose word counts writes to it: the protocol has said that they are final, and
    /// not yet that they are free. (For who was given up, or looks ahead, it may: then the values are anything, but are values.)
    pub(super) unsafe fn values(&self, byte: usize, range: Range<usize>) -> &[f32] {
        let start = self.at(byte + range.start * 4, range.len() * 4);
        // SAFETY: within the mapping and aligned; any bits are an f32; the rest is the caller's.
        unsafe { std::slice::from_raw_parts(start.cast().as_ptr(), range.len()) }
    }

    /// Values that only the caller looks at now.
    ///
    /// # Safety
    /// As long as the slice lives, nobody whose word counts reads what is written through it.
    #[allow(clippy::mut_from_ref, reason = "who may write is the protocol's to say")]
    pub(super) unsafe fn values_mut(&self, byte: usize, range: Range<usize>) -> &mut [f32] {
        assert!(self.writable, "this memory may only be read");
        let start = self.at(byte + range.start * 4, range.len() * 4);
        // SAFETY: within the mapping and aligned; any bits are an f32; the rest is the caller's.
        unsafe { std::slice::from_raw_parts_mut(start.cast().as_ptr(), range.len()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and every slice of it borrows from the value.
        unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes).ok() };
    }
}

/// The coordinator's bell, in memory of its own: every worker of the host may ring it.
pub struct BellMemory(Memory);

/// Bytes of a [`BellMemory`].
pub const BELL_BYTES: usize = PAGE;

impl BellMemory {
    /// A bell that nobody waits for.
    ///
    /// # Errors
    /// Where the system has no memory to give.
    pub fn create() -> io::Result<BellMemory> {
        Memory::create("unisono-bell", BELL_BYTES, false).map(BellMemory)
    }

    /// The bell in a memory of [`BELL_BYTES`] that another process gave.
    pub fn of(memory: Memory) -> BellMemory {
        BellMemory(memory)
    }

    /// The memory, to give it away.
    pub fn memory(&self) -> &Memory {
        &self.0
    }

    /// The bell itself.
    pub fn bell(&self) -> Bell<'_, AtomicU32> {
        Bell(self.0.words(0, Bell::<AtomicU32>::WORDS))
    }
}

/// The weights of two steps, one beside the other, and for each chunk a word that says whose step's weights were written last.
pub struct Weights {
    memory: Memory,
    len: usize,
}

impl Weights {
    /// Bytes of a memory for `len` weights.
    pub fn bytes(len: usize) -> usize {
        2 * whole_pages(len * 4) + len.div_ceil(CHUNK) * 4
    }

    /// Memory for `len` weights that others may read.
    ///
    /// # Errors
    /// Where the system has not so much memory to give.
    pub fn create(len: usize) -> io::Result<Weights> {
        Ok(Weights { memory: Memory::create("unisono-weights", Weights::bytes(len), true)?, len })
    }

    /// Memory for `len` weights of this process alone.
    ///
    /// # Errors
    /// Where the system has not so much memory to give.
    pub fn private(len: usize) -> io::Result<Weights> {
        Ok(Weights { memory: Memory::private(Weights::bytes(len))?, len })
    }

    /// `len` weights in a memory of [`Weights::bytes`] that another process gave.
    pub fn of(memory: Memory, len: usize) -> Weights {
        Weights { memory, len }
    }

    /// The memory, to give it away.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    fn buffer(&self, step: u64) -> usize {
        if step.is_multiple_of(2) { 0 } else { whole_pages(self.len * 4) }
    }

    /// What a chunk's word says of `step`: not 0, which is what it says at first.
    fn word(step: u64) -> u32 {
        (step % u64::from(u32::MAX)) as u32 + 1
    }

    /// Says that the weights of `step` at chunk `index` are there, for all who look.
    ///
    /// # Panics
    /// Where this process may only read them.
    pub fn say(&self, index: usize, step: u64) {
        let words = self.memory.words(2 * self.buffer(1), self.len.div_ceil(CHUNK));
        words[index].store(Weights::word(step), Ordering::Release);
    }

    /// Whether the last that was said of each chunk at `range` is that the weights of `step` are there. They are looked at ahead of
    /// the step's orders, and stay as they are for whom it is going to ask: what others see may change.
    pub fn has(&self, step: u64, range: Range<usize>) -> bool {
        let words = self.memory.read_words(2 * self.buffer(1), self.len.div_ceil(CHUNK));
        let there = |word: &AtomicU32| word.load(Ordering::Acquire) == Weights::word(step);
        words[range.start / CHUNK..range.end.div_ceil(CHUNK)].iter().all(there)
    }

    /// The weights of `step` at `range`, which have come, and which the coordinator has ordered something to be computed with, or
    /// which there are ([`Weights::has`]).
    pub fn of_step(&self, step: u64, range: Range<usize>) -> &[f32] {
        assert!(range.end <= self.len, "{range:?} of {} weights", self.len);
        // SAFETY: no update writes them before all orders of this step are answered, of which there may be none for who looks ahead:
        // then nobody takes what follows from them; see the module's documentation.
        unsafe { self.memory.values(self.buffer(step), range) }
    }

    /// Cuts the weights, which become their parts' alone.
    ///
    /// # Panics
    /// Where `ranges` are not one after the other.
    pub fn pieces(self: &Arc<Self>, ranges: impl Iterator<Item = Range<usize>>) -> Vec<Piece> {
        let mut end = 0;
        let mut piece = |range: Range<usize>| {
            assert!(range.start == end && range.end <= self.len, "pieces are one after the other");
            end = range.end;
            Piece { weights: self.clone(), range }
        };
        ranges.map(&mut piece).collect()
    }
}

/// A range of the weights that only its owner writes.
pub struct Piece {
    weights: Arc<Weights>,
    range: Range<usize>,
}

impl Piece {
    /// The values of `step`.
    pub fn of_step(&self, step: u64) -> &[f32] {
        // SAFETY: the values are written through the only piece that has them, which is borrowed.
        unsafe { self.weights.memory.values(self.weights.buffer(step), self.range.clone()) }
    }

    /// The values of `step`, to be written: those of the first step of all, and those that come from elsewhere.
    pub fn begin(&mut self, step: u64) -> &mut [f32] {
        // SAFETY: this piece, which is borrowed, is the only one with this range; nothing was ordered yet, or nobody was told
        // that these values are there.
        unsafe { self.weights.memory.values_mut(self.weights.buffer(step), self.range.clone()) }
    }

    /// The values of `step`, and room for those of the next.
    pub fn update(&mut self, step: u64) -> (&[f32], &mut [f32]) {
        let (memory, range) = (&self.weights.memory, &self.range);
        // SAFETY: the buffers are two, and this piece, which is borrowed, is the only one with this range of them. No member
        // computes with the weights of the step before `step`, which lie in the second: it was committed.
        unsafe {
            let old = memory.values(self.weights.buffer(step), range.clone());
            (old, memory.values_mut(self.weights.buffer(step + 1), range.clone()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_of_two_steps_lie_beside_each_other() {
        let weights = Arc::new(Weights::create(5).expect("memory"));
        let mut pieces = weights.pieces([0..3, 3..5].into_iter());
        for step in 0..4u64 {
            for piece in &mut pieces {
                let (old, new) = piece.update(step);
                assert!(old.iter().all(|v| *v == step as f32), "{step}: {old:?}");
                new.fill(step as f32 + 1.0);
            }
            assert_eq!(weights.of_step(step + 1, 0..5), [step as f32 + 1.0; 5]);
            assert_eq!(weights.of_step(step, 1..4), [step as f32; 3]);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_is_given_away_keeps_its_size_and_weights_may_only_be_read() {
        let weights = Weights::create(5).expect("memory");
        let file = || weights.memory.file().expect("a file").try_clone_to_owned().expect("a second handle");
        assert!(Memory::open(file(), Weights::bytes(5) + PAGE, false).is_err(), "another size");
        assert!(Memory::open(file(), Weights::bytes(5), true).is_err(), "for writing");
        assert!(rustix::fs::ftruncate(file(), 0).is_err(), "it can be resized");
        let other = Weights::of(Memory::open(file(), Weights::bytes(5), false).expect("for reading"), 5);
        assert_eq!(other.of_step(0, 0..5), [0.0; 5]);
        assert!([0, u64::from(u32::MAX), u64::MAX].iter().all(|step| !other.has(*step, 0..5)), "nothing was said");
        assert!(other.has(0, 0..0));
        weights.say(0, 7);
        assert!(other.has(7, 0..5) && !other.has(6, 0..5) && !other.has(8, 0..1));
        let bell = BellMemory::create().expect("memory");
        let file = bell.memory().file().expect("a file").try_clone_to_owned().expect("a second handle");
        let theirs = BellMemory::of(Memory::open(file, BELL_BYTES, true).expect("for writing"));
        let heard = bell.bell().listen();
        theirs.bell().ring();
        assert_ne!(bell.bell().listen(), heard);
    }
}
