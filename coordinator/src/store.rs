//! The parameter store: weights and optimizer state in chunks, the open reduction tree of each, and the update.
//!
//! Weights are replaced, never changed in place, so a chunk's bytes are shared by every stream that sends it and by a
//! checkpoint that is being written. Optimizer state is changed in place, unless a checkpoint still holds it.

use bytes::Bytes;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::watch;
use unisono_common::ids::Step;
use unisono_common::layout::{Layout, Role, le_bytes};
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
    Raw(Bytes),
    Sum(Vec<f32>),
}

impl Gradient {
    fn into_sum(self) -> Vec<f32> {
        match self {
            Gradient::Raw(bytes) => {
                let mut out = vec![0.0; bytes.len() / 4];
                unisono_proto::decode_into(&bytes, &mut out);
                out
            }
            Gradient::Sum(sum) => sum,
        }
    }
}

fn add(left: Part, right: Part) -> Part {
    let gradient = match (left.gradient, right.gradient) {
        (Gradient::Sum(mut sum), Gradient::Raw(bytes)) | (Gradient::Raw(bytes), Gradient::Sum(mut sum)) => {
            unisono_proto::add_into(&bytes, &mut sum);
            sum
        }
        (left, right) => {
            let (mut sum, other) = (left.into_sum(), right.into_sum());
            sum.iter_mut().zip(&other).for_each(|(s, o)| *s += o);
            sum
        }
    };
    Part { gradient: Gradient::Sum(gradient), sums: left.sums + right.sums }
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

struct Chunk {
    /// The step whose weights these are.
    version: Step,
    weights: Weights,
    /// The weights of the step before, until that step is committed: whoever joins or is slow still needs them.
    previous: Option<Weights>,
    slots: Vec<Arc<Vec<f32>>>,
    open: Open<Part>,
    /// The whole sums, while they wait for the global norm.
    reduced: Option<(Vec<f32>, LossSums)>,
}

/// Everything that a checkpoint keeps, shared with the store, chunk by chunk.
pub struct Snapshot {
    pub weights: Vec<Arc<Vec<f32>>>,
    /// Slot by slot of the optimizer, in the order of its names.
    pub slots: Vec<Vec<Arc<Vec<f32>>>>,
}

impl Snapshot {
    /// The weights in order.
    pub fn pieces(&self) -> impl Iterator<Item = &[f32]> {
        self.weights.iter().map(|c| c.as_slice())
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
    /// Learning rate of the open step.
    lr: Mutex<f32>,
    pending: AtomicUsize,
    diverged: AtomicBool,
    changed: watch::Sender<u64>,
    applied: Box<dyn Fn(Applied) + Send + Sync>,
    /// Bytes of gradients accepted.
    pub bytes_pushed: AtomicU64,
    /// Bytes of weights sent.
    pub bytes_pulled: AtomicU64,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
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
                let range = layout.chunk(i);
                let trained = range.start.min(layout.trainable())..range.end.min(layout.trainable());
                let slots = (0..optimizer.slots())
                    .map(|s| match slots.get(s) {
                        Some(values) => Arc::new(values[trained.clone()].to_vec()),
                        None => Arc::new(vec![optimizer.init_slot(s); trained.len()]),
                    })
                    .collect();
                Mutex::new(Chunk {
                    version: step,
                    weights: Weights::new(weights[range].to_vec()),
                    previous: None,
                    slots,
                    open: Open::new(partitions),
                    reduced: None,
                })
            })
            .collect::<Vec<_>>();
        Store {
            pending: AtomicUsize::new(chunks.len()),
            chunks,
            layout,
            optimizer,
            clip,
            lr: Mutex::new(0.0),
            diverged: AtomicBool::new(false),
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
        self.chunks.iter().for_each(|chunk| lock(chunk).previous = None);
        self.pending.store(self.chunks.len(), Ordering::SeqCst);
    }

    /// Takes one checked chunk of a node's gradient sum, with the node's loss sums; the last one of the step runs the
    /// optimizer on the chunk.
    pub fn accept(&self, step: Step, node: Node, sums: LossSums, index: usize, bytes: Bytes) {
        self.bytes_pushed.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut chunk = lock(&self.chunks[index]);
        if chunk.version != step || chunk.reduced.is_some() {
            return; // late: the step has this chunk already
        }
        let part = Part { gradient: Gradient::Raw(bytes), sums };
        if chunk.open.offer(node, part, add) != Offer::Complete {
            return;
        }
        let Some(Part { gradient, sums }) = chunk.open.take_root() else { return };
        let mut gradient = gradient.into_sum();
        let inverse = (1.0 / sums.weight) as f32;
        gradient[..self.trained(index)].iter_mut().for_each(|g| *g *= inverse);
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
                squares += optim::sum_squares(&gradient[..self.trained(i)]);
            }
        }
        let factor = optim::clip_factor(squares.sqrt() as f32, self.clip.norm.unwrap_or(f32::INFINITY));
        for (i, chunk) in self.chunks.iter().enumerate() {
            let mut chunk = lock(chunk);
            if let Some((mut gradient, sums)) = chunk.reduced.take() {
                gradient[..self.trained(i)].iter_mut().for_each(|g| *g *= factor);
                self.update(&mut chunk, i, gradient, sums);
            }
            drop(chunk);
            self.changed.send_modify(|n| *n += 1);
        }
    }

    /// Number of values at the beginning of chunk `i` that are trainable.
    fn trained(&self, i: usize) -> usize {
        let range = self.layout.chunk(i);
        range.end.min(self.layout.trainable()).saturating_sub(range.start)
    }

    /// New weights from the mean gradient (trainable part) and the sums of statistics (running part).
    fn update(&self, chunk: &mut Chunk, index: usize, mut gradient: Vec<f32>, sums: LossSums) {
        let (step, lr) = (chunk.version, *lock(&self.lr));
        let trained = self.trained(index);
        if let Some(limit) = self.clip.value {
            optim::clip_value(&mut gradient[..trained], limit);
        }
        let weights = chunk.weights.values.clone();
        let mut out = vec![0.0; weights.len()];
        {
            let mut state: Vec<&mut [f32]> = chunk.slots.iter_mut().map(|s| Arc::make_mut(s).as_mut_slice()).collect();
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
        if !out.iter().all(|v| v.is_finite()) {
            self.diverged.store(true, Ordering::SeqCst);
        }
        chunk.previous = Some(std::mem::replace(&mut chunk.weights, Weights::new(out)));
        chunk.version = step.next();
    }

    fn finish(&self, step: Step, sums: LossSums) {
        let event = if self.diverged.load(Ordering::SeqCst) {
            let tensor = self.chunks.iter().enumerate().find_map(|(i, chunk)| {
                let bad = lock(chunk).weights.values.iter().position(|v| !v.is_finite())?;
                self.layout.tensor_at(self.layout.chunk(i).start + bad).map(|t| t.name.clone())
            });
            Applied::Diverged { step, tensor: tensor.unwrap_or_default() }
        } else {
            Applied::Done { step, sums }
        };
        (self.applied)(event);
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

    /// The state at the beginning of `step`, shared; `None` where some chunks are of another step.
    pub fn snapshot(&self, step: Step) -> Option<Snapshot> {
        let mut snapshot = Snapshot { weights: Vec::new(), slots: vec![Vec::new(); self.optimizer.slots()] };
        for chunk in &self.chunks {
            let chunk = lock(chunk);
            if chunk.version != step {
                return None;
            }
            snapshot.weights.push(chunk.weights.values.clone());
            snapshot.slots.iter_mut().zip(&chunk.slots).for_each(|(all, slot)| all.push(slot.clone()));
        }
        Some(snapshot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_common::job;
    use unisono_common::layout::{CHUNK, Init, Tensor};

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
        assert!(store.snapshot(Step(7)).is_none() && store.snapshot(Step(8)).is_none(), "half a step was kept");
        // Who joins now still gets the open step's weights of every chunk, and then what is already there of the next.
        assert_eq!(version(0, None), Some((Step(7), value(1.0))));
        assert_eq!(version(0, Some(Step(7))), Some((Step(8), value(-1.0))));
        assert_eq!(version(0, Some(Step(8))), None);
        assert_eq!(version(1, None), Some((Step(7), value(1.0))));
        assert_eq!(version(1, Some(Step(7))), None);

        push(Step(7), 1, 5);
        assert_eq!(done.load(Ordering::SeqCst), 1);
        let kept = store.snapshot(Step(8)).expect("the step is whole");
        assert!(kept.pieces().flatten().all(|v| *v == -1.0));
        store.begin(1.0);
        assert_eq!(version(0, None), Some((Step(8), value(-1.0))));
    }
}
