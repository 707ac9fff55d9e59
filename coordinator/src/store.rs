//! The parameter store: weights and optimizer state in chunks, the open reduction tree of each, and the update.
//!
//! Weights are replaced, never changed in place, so a chunk's bytes are shared by every stream that sends it. Everything
//! else is changed in place, in buffers that are used again: a steady step takes no new memory. A checkpoint that is being
//! written copies nothing either: what it has not yet written of a chunk is written by the update that would replace it.

use crate::lock;
use bytes::Bytes;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::sync::watch;
use unisono_common::ids::Step;
use unisono_common::kernels;
use unisono_common::layout::{CHUNK, Layout, Role, le_bytes};
use unisono_common::loss::LossSums;
use unisono_common::optim::{self, Optimizer};
use unisono_common::tree::{Node, Offer, Open};

struct Shared(Arc<Vec<f32>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        le_bytes(&self.0)
    }
}

/// A node's sums of one chunk. The loss sums travel with each chunk, so that a chunk is whole by itself: a worker that
/// breaks off between two chunks leaves nothing half known.
struct Part {
    gradient: Gradient,
    sums: LossSums,
}

/// As it came, or added up.
enum Gradient {
    Came(Bytes),
    Sum(Vec<f32>),
}

/// Buffers of a chunk's length that are not in use.
#[derive(Default)]
struct Spare(Mutex<Vec<Vec<f32>>>);

impl Spare {
    /// A buffer of `len` values, which hold anything.
    fn take(&self, len: usize) -> Vec<f32> {
        let mut buffer = lock(&self.0).pop().unwrap_or_else(|| Vec::with_capacity(CHUNK));
        buffer.resize(len, 0.0);
        buffer
    }

    fn put(&self, buffer: Vec<f32>) {
        lock(&self.0).push(buffer);
    }

    fn sum(&self, gradient: Gradient) -> Vec<f32> {
        match gradient {
            Gradient::Came(bytes) => {
                let mut sum = self.take(bytes.len() / 4);
                unisono_proto::decode_into(&bytes, &mut sum);
                sum
            }
            Gradient::Sum(sum) => sum,
        }
    }

    fn add(&self, left: Part, right: Part) -> Part {
        let gradient = match (left.gradient, right.gradient) {
            (Gradient::Sum(mut sum), Gradient::Came(bytes)) | (Gradient::Came(bytes), Gradient::Sum(mut sum)) => {
                unisono_proto::add_into(&bytes, &mut sum);
                sum
            }
            (left, right) => {
                let (mut sum, other) = (self.sum(left), self.sum(right));
                kernels::add_into(&mut sum, &other);
                self.put(other);
                sum
            }
        };
        Part { gradient: Gradient::Sum(gradient), sums: left.sums + right.sums }
    }
}

/// The weights of one step, and their checksum, which is taken once for all workers.
#[derive(Clone)]
struct Weights {
    values: Arc<Vec<f32>>,
    crc: u32,
}

impl Weights {
    fn new(values: Vec<f32>) -> Weights {
        Weights { crc: unisono_proto::crc(le_bytes(&values)), values: Arc::new(values) }
    }

    /// For the wire: shared bytes, not a copy.
    fn share(&self, step: Step) -> Sent {
        Sent { step, crc: self.crc, bytes: Bytes::from_owner(Shared(self.values.clone())) }
    }
}

/// A chunk of weights that a stream sends.
pub struct Sent {
    pub step: Step,
    pub crc: u32,
    pub bytes: Bytes,
}

/// Takes the chunks of a checkpoint, in any order, from any thread.
pub trait Keep: Send + Sync {
    /// A chunk's weights, and its part of each of the optimizer's state vectors.
    fn chunk(&self, index: usize, weights: &[f32], slots: &[Vec<f32>]);
}

struct Chunk {
    /// The step whose weights these are.
    version: Step,
    weights: Weights,
    /// The weights of the step before, until that step is committed: whoever joins or is slow still needs them.
    previous: Option<Weights>,
    slots: Vec<Vec<f32>>,
    open: Open<Part>,
    /// The whole sums, while they wait for the global norm.
    reduced: Option<(Vec<f32>, LossSums)>,
    /// The checkpoint that has not taken this chunk yet.
    keep: Option<Arc<dyn Keep>>,
}

impl Chunk {
    fn flush(&mut self, index: usize) {
        if let Some(keep) = self.keep.take() {
            keep.chunk(index, &self.weights.values, &self.slots);
        }
    }
}

/// What came of the last chunk of a step.
#[derive(Debug)]
pub enum Applied {
    /// The weights of `step + 1` are there; these are the sums of its losses.
    Done { step: Step, sums: LossSums },
    /// A value is not finite after reduction or update.
    Diverged { step: Step, tensor: String },
}

/// Limits on gradients.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clip {
    pub norm: Option<f32>,
    pub value: Option<f32>,
}

/// The parameter store.
pub struct Store {
    layout: Arc<Layout>,
    optimizer: Optimizer,
    clip: Clip,
    chunks: Vec<Mutex<Chunk>>,
    spare: Spare,
    /// Learning rate of the open step.
    lr: Mutex<f32>,
    pending: AtomicUsize,
    /// Place of the first value that is not finite.
    diverged: Mutex<Option<usize>>,
    changed: watch::Sender<u64>,
    applied: Box<dyn Fn(Applied) + Send + Sync>,
    /// Bytes of gradients accepted.
    pub bytes_pushed: AtomicU64,
    /// Bytes of weights sent.
    pub bytes_pulled: AtomicU64,
}

impl Store {
    /// A store at `step` with these weights and optimizer slots (each of the trainable length; empty: fresh ones).
    pub fn new(
        layout: Arc<Layout>,
        optimizer: Optimizer,
        clip: Clip,
        partitions: u32,
        step: Step,
        weights: &[f32],
        slots: &[Vec<f32>],
        applied: Box<dyn Fn(Applied) + Send + Sync>,
    ) -> Store {
        let chunks = (0..layout.chunks())
            .map(|i| {
                let trained = layout.trainable_of(i);
                let slots = (0..optimizer.slots())
                    .map(|s| match slots.get(s) {
                        Some(values) => values[trained.clone()].to_vec(),
                        None => vec![optimizer.init_slot(s); trained.len()],
                    })
                    .collect();
                Mutex::new(Chunk {
                    version: step,
                    weights: Weights::new(weights[layout.chunk(i)].to_vec()),
                    previous: None,
                    slots,
                    open: Open::new(partitions),
                    reduced: None,
                    keep: None,
                })
            })
            .collect::<Vec<_>>();
        Store {
            pending: AtomicUsize::new(chunks.len()),
            chunks,
            layout,
            optimizer,
            clip,
            spare: Spare::default(),
            lr: Mutex::new(0.0),
            diverged: Mutex::new(None),
            changed: watch::Sender::new(0),
            applied,
            bytes_pushed: AtomicU64::new(0),
            bytes_pulled: AtomicU64::new(0),
        }
    }

    /// The layout of the flat vector.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Opens a step, whose updates use `lr`.
    pub fn begin(&self, lr: f32) {
        *lock(&self.lr) = lr;
        for chunk in &self.chunks {
            // Its memory takes the next weights, unless a stream is still sending it.
            let old = lock(chunk).previous.take().and_then(|old| Arc::into_inner(old.values));
            old.into_iter().for_each(|old| self.spare.put(old));
        }
        self.pending.store(self.chunks.len(), Ordering::SeqCst);
    }

    /// Takes one checked chunk of a node's gradient sum, with the node's loss sums; the last one of the step runs the
    /// optimizer on the chunk.
    pub fn accept(&self, step: Step, node: Node, sums: LossSums, index: usize, bytes: Bytes) {
        self.bytes_pushed.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut chunk = lock(&self.chunks[index]);
        if chunk.version != step || chunk.reduced.is_some() || chunk.open.holds(node) {
            return; // late, or there already
        }
        let came = Gradient::Came(bytes);
        // What has to wait is copied: a message's bytes hold on to the receive buffer around them.
        let gradient = if chunk.open.merges(node) { came } else { Gradient::Sum(self.spare.sum(came)) };
        if chunk.open.offer(node, Part { gradient, sums }, |l, r| self.spare.add(l, r)) != Offer::Complete {
            return;
        }
        let Some(Part { gradient, sums }) = chunk.open.take_root() else { return };
        let mut gradient = self.spare.sum(gradient);
        self.check(index, &gradient);
        // Without any weight (all of class_weights 0) there is no loss, and no gradient.
        let inverse = if sums.weight > 0.0 { (1.0 / sums.weight) as f32 } else { 0.0 };
        kernels::scale(&mut gradient[..self.layout.trainable_of(index).len()], inverse);
        let clipped = self.clip.norm.is_some();
        if clipped {
            chunk.reduced = Some((gradient, sums));
            drop(chunk);
        } else {
            self.update(&mut chunk, index, gradient, sums);
            drop(chunk);
            self.changed.send_modify(|n| *n += 1);
        }
        if self.pending.fetch_sub(1, Ordering::SeqCst) == 1 {
            if clipped {
                self.apply_clipped();
            }
            self.finish(step, sums);
        }
    }

    /// All chunks are reduced: the global norm of the mean gradient, in chunk order, then every update.
    fn apply_clipped(&self) {
        let mut squares = 0.0;
        for (i, chunk) in self.chunks.iter().enumerate() {
            if let Some((gradient, _)) = &lock(chunk).reduced {
                squares += optim::sum_squares(&gradient[..self.layout.trainable_of(i).len()]);
            }
        }
        let factor = optim::clip_factor(squares.sqrt() as f32, self.clip.norm.unwrap_or(f32::INFINITY));
        for (i, chunk) in self.chunks.iter().enumerate() {
            let mut chunk = lock(chunk);
            if let Some((mut gradient, sums)) = chunk.reduced.take() {
                kernels::scale(&mut gradient[..self.layout.trainable_of(i).len()], factor);
                self.update(&mut chunk, i, gradient, sums);
            }
            drop(chunk);
            self.changed.send_modify(|n| *n += 1);
        }
    }

    /// New weights from the mean gradient (trainable part) and the sums of statistics (running part).
    fn update(&self, chunk: &mut Chunk, index: usize, mut gradient: Vec<f32>, sums: LossSums) {
        chunk.flush(index);
        let (step, lr) = (chunk.version, *lock(&self.lr));
        let trained = self.layout.trainable_of(index).len();
        if let Some(limit) = self.clip.value {
            optim::clip_value(&mut gradient[..trained], limit);
        }
        let weights = &chunk.weights.values;
        let mut out = self.spare.take(weights.len());
        {
            let mut state: Vec<&mut [f32]> = chunk.slots.iter_mut().map(|s| s.as_mut_slice()).collect();
            self.optimizer.update(
                step.0 + 1,
                lr,
                &weights[..trained],
                &gradient[..trained],
                &mut state,
                &mut out[..trained],
            );
        }
        let range = self.layout.chunk(index);
        for (tensor, at) in self.layout.tensors() {
            let Role::Running { momentum } = tensor.role else { continue };
            for i in at.start.max(range.start)..at.end.min(range.end) {
                let i = i - range.start;
                let mean = gradient[i] / sums.samples as f32;
                out[i] = (1.0 - momentum) * weights[i] + momentum * mean;
            }
        }
        self.spare.put(gradient);
        self.check(index, &out);
        chunk.previous = Some(std::mem::replace(&mut chunk.weights, Weights::new(out)));
        chunk.version = step.next();
    }

    /// Notes the first tensor, by its place in the layout, that is not finite.
    fn check(&self, index: usize, values: &[f32]) {
        if !kernels::all_finite(values)
            && let Some(bad) = values.iter().position(|v| !v.is_finite())
        {
            let mut diverged = lock(&self.diverged);
            let at = self.layout.chunk(index).start + bad;
            *diverged = Some(diverged.map_or(at, |first| first.min(at)));
        }
    }

    fn finish(&self, step: Step, sums: LossSums) {
        let diverged = lock(&self.diverged).and_then(|at| self.layout.tensor_at(at));
        (self.applied)(match diverged {
            Some(tensor) => Applied::Diverged { step, tensor: tensor.name.clone() },
            None => Applied::Done { step, sums },
        });
    }

    /// A receiver that wakes when any chunk has a new version.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The next version of chunk `index` after `than`. While a step is open that is never a version that would leave out
    /// the open step's.
    pub fn next(&self, index: usize, than: Option<Step>) -> Option<Sent> {
        let chunk = lock(&self.chunks[index]);
        if let Some(previous) = &chunk.previous
            && let Some(version) = chunk.version.0.checked_sub(1).map(Step)
            && than.is_none_or(|than| than < version)
        {
            return Some(previous.share(version));
        }
        than.is_none_or(|than| than < chunk.version).then(|| chunk.weights.share(chunk.version))
    }

    /// Whether the store is at the beginning of `step`, and no update of it has run.
    pub fn is_at(&self, step: Step) -> bool {
        self.chunks.iter().all(|chunk| lock(chunk).version == step)
    }

    /// Promises `keep` the state at the beginning of `step`: until [`Store::flush`] is through, an update gives a chunk away
    /// before it changes it. False, and no promise, where an update of that step has run.
    pub fn keep(&self, step: Step, keep: &Arc<dyn Keep>) -> bool {
        let mut chunks: Vec<_> = self.chunks.iter().map(lock).collect();
        let whole = chunks.iter().all(|chunk| chunk.version == step);
        if whole {
            chunks.iter_mut().for_each(|chunk| chunk.keep = Some(keep.clone()));
        }
        whole
    }

    /// Gives away all chunks that were promised and not given yet.
    pub fn flush(&self) {
        self.chunks.iter().enumerate().for_each(|(i, chunk)| lock(chunk).flush(i));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_common::job;
    use unisono_common::layout::{CHUNK, Init, Tensor};

    /// The chunks that came, each with its first weight.
    #[derive(Default)]
    struct Kept(Mutex<Vec<(usize, f32)>>);

    impl Keep for Kept {
        fn chunk(&self, index: usize, weights: &[f32], _: &[Vec<f32>]) {
            lock(&self.0).push((index, weights[0]));
        }
    }

    #[test]
    fn an_open_steps_weights_stay_until_it_is_committed() {
        let tensor = |name: &str, len| Tensor {
            name: name.into(),
            shape: vec![len],
            role: Role::Trainable,
            init: Init::Constant(1.0),
        };
        let layout = Arc::new(Layout::new(vec![tensor("a", CHUNK), tensor("b", 5)]));
        let sgd = job::Optimizer::Sgd { lr: 1.0, momentum: 0.0, dampening: 0.0, nesterov: false, weight_decay: 0.0 };
        let done = Arc::new(AtomicUsize::new(0));
        let (counted, weights) = (done.clone(), layout.init(0));
        let count = move |_: Applied| {
            counted.fetch_add(1, Ordering::SeqCst);
        };
        let optimizer = Optimizer::new(&sgd);
        let store = Store::new(layout, optimizer, Clip::default(), 1, Step(7), &weights, &[], Box::new(count));
        let sums = LossSums { loss: 1.0, weight: 2.0, samples: 2 };
        let push = |step, index: usize, len: usize| {
            let gradient = unisono_proto::encode_values(&vec![4.0; len]);
            store.accept(step, Node { lo: 0, hi: 1 }, sums, index, gradient);
        };
        let version = |index, than| store.next(index, than).map(|sent| (sent.step, sent.bytes[..4].to_vec()));
        let value = |v: f32| v.to_le_bytes().to_vec();

        store.begin(1.0);
        push(Step(7), 0, CHUNK);
        push(Step(7), 0, CHUNK);
        assert_eq!(done.load(Ordering::SeqCst), 0, "one chunk is not a step");
        assert!(!store.is_at(Step(7)) && !store.is_at(Step(8)), "half a step would be kept");
        // Who joins now still gets the open step's weights of every chunk, and then what is already there of the next.
        assert_eq!(version(0, None), Some((Step(7), value(1.0))));
        assert_eq!(version(0, Some(Step(7))), Some((Step(8), value(-1.0))));
        assert_eq!(version(0, Some(Step(8))), None);
        assert_eq!(version(1, None), Some((Step(7), value(1.0))));
        assert_eq!(version(1, Some(Step(7))), None);

        push(Step(7), 1, 5);
        assert_eq!(done.load(Ordering::SeqCst), 1);
        assert!(store.is_at(Step(8)));
        // A checkpoint is promised the state of now: the update of chunk 0 gives it away before it changes it.
        let kept = Arc::new(Kept::default());
        let keep = kept.clone() as Arc<dyn Keep>;
        assert!(!store.keep(Step(7), &keep) && store.keep(Step(8), &keep));
        store.begin(1.0);
        assert_eq!(version(0, None), Some((Step(8), value(-1.0))));
        push(Step(8), 0, CHUNK);
        assert_eq!(version(0, Some(Step(8))), Some((Step(9), value(-3.0))));
        assert!(!store.keep(Step(8), &keep) && !store.keep(Step(9), &keep), "half a step would be kept");
        store.flush();
        store.flush();
        assert_eq!(*lock(&kept.0), [(0, -1.0), (1, -1.0)]);
    }
}
