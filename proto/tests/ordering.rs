//! The order of shared memory, under every interleaving that the memory model allows: the real ring and bell, over a model
#![allow(unsafe_code, reason = "the cells of the model are read and written as shared memory is")]

//! checker's words.

use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex, atomic};
use loom::thread;
use std::sync::atomic::Ordering;
use std::time::Duration;
use unisono_proto::shm::ring::{Bell, FRAME, Ring, Word};

/// A word, and the system's queue of those that wait for it.
struct Modelled {
    word: atomic::AtomicU32,
    queue: Mutex<()>,
    woken: Condvar,
}

impl Modelled {
    fn new() -> Modelled {
        Modelled { word: atomic::AtomicU32::new(0), queue: Mutex::new(()), woken: Condvar::new() }
    }
}

impl Word for Modelled {
    fn fence() {
        atomic::fence(Ordering::SeqCst);
    }

    fn load(&self, order: Ordering) -> u32 {
        self.word.load(order)
    }

    fn store(&self, value: u32, order: Ordering) {
        self.word.store(value, order);
    }

    fn fetch_add(&self, value: u32, order: Ordering) -> u32 {
        self.word.fetch_add(value, order)
    }

    fn fetch_sub(&self, value: u32, order: Ordering) -> u32 {
        self.word.fetch_sub(value, order)
    }

    /// As the system does it: the word is looked at once more while nobody can wake. A wake that is lost is a deadlock,
    /// which the checker reports.
    fn wait(&self, seen: u32, _: Option<Duration>) {
        let held = self.queue.lock().unwrap();
        if self.word.load(Ordering::Relaxed) == seen {
            drop(self.woken.wait(held).unwrap());
        }
    }

    fn wake(&self) {
        drop(self.queue.lock().unwrap());
        self.woken.notify_all();
    }
}

/// One side's view of a lane: a ring each way, a bell for each side, whether the slot is taken, the slot, and the weights.
struct Model {
    down: Vec<Modelled>,
    up: Vec<Modelled>,
    worker: Vec<Modelled>,
    coordinator: Vec<Modelled>,
    taken: Modelled,
    /// The checker fails where one thread reads what another may be writing.
    slot: UnsafeCell<u64>,
    weights: [UnsafeCell<u64>; 2],
}

fn words(n: usize) -> Vec<Modelled> {
    (0..n).map(|_| Modelled::new()).collect()
}

impl Model {
    fn new() -> Model {
        let ring = || words(Ring::<Modelled>::words(1));
        Model {
            down: ring(),
            up: ring(),
            worker: words(2),
            coordinator: words(2),
            taken: Modelled::new(),
            slot: UnsafeCell::new(0),
            weights: [UnsafeCell::new(1), UnsafeCell::new(0)],
        }
    }

    fn wait<T>(bell: &[Modelled], mut look: impl FnMut() -> Option<T>) -> T {
        loop {
            let heard = Bell(bell).listen();
            if let Some(found) = look() {
                return found;
            }
            Bell(bell).sleep(heard, None);
        }
    }

    /// Gets an order, reads the weights of its step, fills the slot, reports it.
    fn work(&self, steps: u32) {
        for _ in 0..steps {
            let step = Self::wait(&self.worker, || Ring(&self.down).pop())[0];
            Self::wait(&self.worker, || (self.taken.load(Ordering::Acquire) == 0).then_some(()));
            self.taken.store(1, Ordering::Relaxed);
            let weights = self.weights[step as usize % 2].with(|w| unsafe { *w });
            self.slot.with_mut(|slot| unsafe { *slot = 10 * weights });
            let mut frame = [0; FRAME];
            frame[0] = step;
            assert!(Ring(&self.up).push(&frame), "there is room for one");
            Bell(&self.coordinator).ring();
        }
    }

    /// Orders a step, takes the gradient from the slot, writes the next step's weights, frees the slot.
    fn coordinate(&self, steps: u32) {
        for step in 0..steps {
            let mut frame = [0; FRAME];
            frame[0] = step;
            assert!(Ring(&self.down).push(&frame), "there is room for one");
            Bell(&self.worker).ring();
            let reported = Self::wait(&self.coordinator, || Ring(&self.up).pop());
            assert_eq!(reported[0], step);
            let old = self.weights[step as usize % 2].with(|w| unsafe { *w });
            let gradient = self.slot.with(|slot| unsafe { *slot });
            assert_eq!(gradient, 10 * old, "the gradient of this step's weights");
            self.weights[(step as usize + 1) % 2].with_mut(|w| unsafe { *w = old + gradient });
            self.taken.store(0, Ordering::Release);
            Bell(&self.worker).ring();
        }
    }
}

#[test]
fn no_step_tears_another_and_no_wake_is_lost() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let model = Arc::new(Model::new());
        let worker = thread::spawn({
            let model = model.clone();
            move || model.work(2)
        });
        model.coordinate(2);
        worker.join().unwrap();
        assert_eq!(model.weights[0].with(|w| unsafe { *w }), 121);
    });
}
