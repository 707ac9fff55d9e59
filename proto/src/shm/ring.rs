//! The order of things in shared memory: a ring of frames from one sender to one receiver, and a bell.
//!
//! Everything is made of words, so that no order of events, and nothing that the other side writes, is undefined; what a
//! frame says is final was written before the frame, and is read after it (release and acquire). `tests/ordering.rs` tries
//! all interleavings of a model.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A word of shared memory; the model checker has its own.
pub trait Word {
    fn load(&self, order: Ordering) -> u32;
    fn store(&self, value: u32, order: Ordering);
    fn fetch_add(&self, value: u32, order: Ordering) -> u32;
    fn fetch_sub(&self, value: u32, order: Ordering) -> u32;
    /// Returns at once where the word is not `seen`, else when it is woken, or after `most`, or for no reason.
    fn wait(&self, seen: u32, most: Option<Duration>);
    /// Wakes all that wait.
    fn wake(&self);
    /// Puts what this thread did before in front of what it does after, for all threads.
    fn fence();
}

impl Word for AtomicU32 {
    fn fence() {
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    fn load(&self, order: Ordering) -> u32 {
        AtomicU32::load(self, order)
    }

    fn store(&self, value: u32, order: Ordering) {
        AtomicU32::store(self, value, order);
    }

    fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
        AtomicU32::fetch_add(self, value, order)
    }

    fn fetch_sub(&self, value: u32, order: Ordering) -> u32 {
        AtomicU32::fetch_sub(self, value, order)
    }

    #[cfg(target_os = "linux")]
    fn wait(&self, seen: u32, most: Option<Duration>) {
        use rustix::thread::futex::{self, Flags, Timespec};
        let most = most.map(|d| Timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos() as _ });
        futex::wait(self, Flags::empty(), seen, most.as_ref()).ok();
    }

    #[cfg(target_os = "linux")]
    fn wake(&self) {
        use rustix::thread::futex::{self, Flags};
        futex::wake(self, Flags::empty(), i32::MAX as u32).ok();
    }

    #[cfg(not(target_os = "linux"))]
    fn wait(&self, seen: u32, most: Option<Duration>) {
        let held = elsewhere::LOCK.lock().unwrap_or_else(|e| e.into_inner());
        if self.load(Ordering::SeqCst) == seen {
            drop(elsewhere::WOKEN.wait_timeout(held, most.unwrap_or(Duration::from_secs(1))));
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn wake(&self) {
        drop(elsewhere::LOCK.lock());
        elsewhere::WOKEN.notify_all();
    }
}

/// Without futexes no memory is shared between processes, and one process's threads wait for each other here.
#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use std::sync::{Condvar, Mutex};
    pub static LOCK: Mutex<()> = Mutex::new(());
    pub static WOKEN: Condvar = Condvar::new();
}

/// Words of a frame.
pub const FRAME: usize = 16;

/// Words before the frames: what was written, and what was read, each in a cache line of its own.
const HEAD: usize = 32;

/// A ring in `HEAD + n * FRAME` words. One side only pushes, the other only pops.
pub struct Ring<'a, W>(pub &'a [W]);

impl<W: Word> Ring<'_, W> {
    /// Words of a ring of so many frames.
    pub const fn words(frames: usize) -> usize {
        HEAD + frames * FRAME
    }

    fn frames(&self) -> u32 {
        ((self.0.len() - HEAD) / FRAME) as u32
    }

    fn frame(&self, number: u32) -> &[W] {
        let at = HEAD + (number % self.frames()) as usize * FRAME;
        &self.0[at..at + FRAME]
    }

    /// Puts a frame in; false where there is no room.
    pub fn push(&self, frame: &[u32; FRAME]) -> bool {
        let (written, read) = (self.0[0].load(Ordering::Relaxed), self.0[HEAD / 2].load(Ordering::Acquire));
        if written.wrapping_sub(read) >= self.frames() {
            return false;
        }
        self.frame(written).iter().zip(frame).for_each(|(word, value)| word.store(*value, Ordering::Relaxed));
        self.0[0].store(written.wrapping_add(1), Ordering::Release);
        true
    }

    /// Takes the oldest frame out; all that its sender wrote before it is there now.
    pub fn pop(&self) -> Option<[u32; FRAME]> {
        let (read, written) = (self.0[HEAD / 2].load(Ordering::Relaxed), self.0[0].load(Ordering::Acquire));
        if written == read {
            return None;
        }
        let mut frame = [0; FRAME];
        frame.iter_mut().zip(self.frame(read)).for_each(|(value, word)| *value = word.load(Ordering::Relaxed));
        self.0[HEAD / 2].store(read.wrapping_add(1), Ordering::Release);
        Some(frame)
    }
}

/// A bell in two words: how often it rang, and how many wait for it.
///
/// Who waits listens, looks whether there is something to do, and sleeps on what it heard: a ring in between is not lost.
pub struct Bell<'a, W>(pub &'a [W]);

impl<W: Word> Bell<'_, W> {
    /// Words of a bell; the rest of a cache line stays empty.
    pub const WORDS: usize = 16;

    /// What [`Bell::sleep`] wants, taken before one looks for something to do.
    pub fn listen(&self) -> u32 {
        self.0[0].load(Ordering::Acquire)
    }

    /// Says that there may be something to do.
    pub fn ring(&self) {
        self.0[0].fetch_add(1, Ordering::Release);
        // Either the sleeper sees the ring, or the ringer sees the sleeper.
        W::fence();
        if self.0[1].load(Ordering::Relaxed) != 0 {
            self.0[0].wake();
        }
    }

    /// Waits for a ring since [`Bell::listen`], at most so long.
    pub fn sleep(&self, heard: u32, most: Option<Duration>) {
        self.0[1].fetch_add(1, Ordering::Relaxed);
        W::fence();
        if self.0[0].load(Ordering::Relaxed) == heard {
            self.0[0].wait(heard, most);
        }
        self.0[1].fetch_sub(1, Ordering::Relaxed);
    }
}
