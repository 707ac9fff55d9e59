//! The parameter store: weights and optimizer state in chunks, the open reduction tree of each, and the update.
//!
//! Weights are replaced, never changed in place, so a chunk's bytes are shared by every stream that sends it and by a
//! checkpoint that is being written. Optimizer state is changed in place, unless a checkpoint still holds it.

use bytes::Bytes;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::watch;
use unisono_common::ids::Step;
use unisono_common::layout::{Layout, Role};
use unisono_common::loss::LossSums;
use unisono_common::optim::{self, Optimizer};
use unisono_common::tree::{Node, Offer, Open};

#[cfg(target_endian = "big")]
compile_error!("chunks are shared with the wire as little-endian memory");

struct Shared(Arc<Vec<f32>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// A node's sum of one chunk: as it came, or added up.
enum Part {
    Raw(Bytes),
    Sum(Vec<f32>),
}

impl Part {
    fn into_sum(self) -> Vec<f32> {
        match self {
            Part::Raw(bytes) => {
                let mut out = vec![0.0; bytes.len() / 4];
                unisono_proto::decode_into(&bytes, &mut out);
                out
            }
            Part::Sum(sum) => sum,
        }
    }
}

fn add(left: Part, right: Part) -> Part {
    match (left, right) {
        (Part::Sum(mut sum), Part::Raw(bytes)) | (Part::Raw(bytes), Part::Sum(mut sum)) => {
            unisono_proto::add_into(&bytes, &mut sum);
            Part::Sum(sum)
        }
        (left, right) => {
            let (mut sum, other) = (left.into_sum(), right.into_sum());
            sum.iter_mut().zip(&other).for_each(|(s, o)| *s += o);
            Part::Sum(sum)
        }
    }
}

struct Chunk {
    /// The step whose weights these are.
    version: Step,
    weights: Arc<Vec<f32>>,
    slots: Vec<Arc<Vec<f32>>>,
    open: Open<Part>,
    /// The whole gradient sum, while it waits for the global norm.
    reduced: Option<Vec<f32>>,
}

struct Current {
    step: Step,
    lr: f32,
    sums: Open<LossSums>,
}

/// Everything that a checkpoint keeps, shared with the store.
pub struct Snapshot {
    pub weights: Vec<Arc<Vec<f32>>>,
    pub slots: Vec<Vec<Arc<Vec<f32>>>>,
}

impl Snapshot {
    /// The weights as one flat vector.
    pub fn flat_weights(&self) -> Vec<f32> {
        self.weights.iter().flat_map(|c| c.iter().copied()).collect()
    }

    /// Slot `i` of the optimizer as one flat vector.
    pub fn flat_slot(&self, i: usize) -> Vec<f32> {
        self.slots.iter().flat_map(|c| c[i].iter().copied()).collect()
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
    partitions: u32,
    chunks: Vec<Mutex<Chunk>>,
    current: Mutex<Current>,
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
                    weights: Arc::new(weights[range].to_vec()),
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
            partitions,
            current: Mutex::new(Current { step, lr: 0.0, sums: Open::new(partitions) }),
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

    /// Opens a step: pushes for it are taken from now on.
    pub fn begin(&self, step: Step, lr: f32) {
        *lock(&self.current) = Current { step, lr, sums: Open::new(self.partitions) };
        self.pending.store(self.chunks.len(), Ordering::SeqCst);
    }

    /// Takes a node's loss sums; its chunks come after it.
    pub fn accept_sums(&self, step: Step, node: Node, sums: LossSums) {
        let mut current = lock(&self.current);
        if current.step == step {
            current.sums.offer(node, sums, LossSums::add);
        }
    }

    /// Takes one checked chunk of a node's gradient sum; the last one of the step runs the optimizer on the chunk.
    pub fn accept(&self, step: Step, node: Node, index: usize, bytes: Bytes) {
        self.bytes_pushed.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let mut chunk = lock(&self.chunks[index]);
        if chunk.version != step || chunk.reduced.is_some() {
            return; // late: the step has this chunk already
        }
        if chunk.open.offer(node, Part::Raw(bytes), add) != Offer::Complete {
            return;
        }
        let Some(root) = chunk.open.take_root() else { return };
        let gradient = root.into_sum();
        if self.clip.norm.is_some() {
            chunk.reduced = Some(gradient);
            drop(chunk);
            if self.pending.fetch_sub(1, Ordering::SeqCst) == 1 {
                self.apply_clipped(step);
            }
        } else {
            self.apply(&mut chunk, index, gradient, 1.0);
            drop(chunk);
            self.changed.send_modify(|n| *n += 1);
            if self.pending.fetch_sub(1, Ordering::SeqCst) == 1 {
                self.finish(step);
            }
        }
    }

    fn sums(&self) -> (Step, f32, LossSums) {
        let mut current = lock(&self.current);
        let sums = current.sums.take_root().unwrap_or_default();
        current.sums.offer(Node::root(self.partitions), sums, LossSums::add);
        (current.step, current.lr, sums)
    }

    /// All chunks are reduced: the global norm of the mean gradient, in chunk order, then every update.
    fn apply_clipped(&self, step: Step) {
        let (_, _, sums) = self.sums();
        let inverse = (1.0 / sums.weight) as f32;
        let mut squares = 0.0;
        for (i, chunk) in self.chunks.iter().enumerate() {
            let mut chunk = lock(chunk);
            let trained = self.trained(i);
            if let Some(gradient) = &mut chunk.reduced {
                let gradient = &mut gradient[..trained];
                gradient.iter_mut().for_each(|g| *g *= inverse);
                squares += optim::sum_squares(gradient);
            }
        }
        let factor = optim::clip_factor(squares.sqrt() as f32, self.clip.norm.unwrap_or(f32::INFINITY));
        for (i, chunk) in self.chunks.iter().enumerate() {
            let mut chunk = lock(chunk);
            if let Some(mut gradient) = chunk.reduced.take() {
                // The mean is taken already: undo nothing, only scale.
                gradient[..self.trained(i)].iter_mut().for_each(|g| *g *= factor);
                self.update(&mut chunk, i, gradient, sums);
            }
            drop(chunk);
            self.changed.send_modify(|n| *n += 1);
        }
        self.finish(step);
    }

    /// Number of values at the beginning of chunk `i` that are trainable.
    fn trained(&self, i: usize) -> usize {
        let range = self.layout.chunk(i);
        range.end.min(self.layout.trainable()).saturating_sub(range.start)
    }

    fn apply(&self, chunk: &mut Chunk, index: usize, mut gradient: Vec<f32>, factor: f32) {
        let (_, _, sums) = self.sums();
        let inverse = (1.0 / sums.weight) as f32 * factor;
        gradient[..self.trained(index)].iter_mut().for_each(|g| *g *= inverse);
        self.update(chunk, index, gradient, sums);
    }

    /// New weights from the mean gradient (trainable part) and the sums of statistics (running part).
    fn update(&self, chunk: &mut Chunk, index: usize, mut gradient: Vec<f32>, sums: LossSums) {
        let (step, lr) = {
            let current = lock(&self.current);
            (current.step, current.lr)
        };
        let trained = self.trained(index);
        if let Some(limit) = self.clip.value {
            optim::clip_value(&mut gradient[..trained], limit);
        }
        let mut out = vec![0.0; chunk.weights.len()];
        {
            let mut state: Vec<&mut [f32]> =
                chunk.slots.iter_mut().map(|s| Arc::make_mut(s).as_mut_slice()).collect();
            self.optimizer.update(
                step.0 + 1,
                lr,
                &chunk.weights[..trained],
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
                out[i] = (1.0 - momentum) * chunk.weights[i] + momentum * mean;
            }
        }
        if !out.iter().all(|v| v.is_finite()) {
            self.diverged.store(true, Ordering::SeqCst);
        }
        chunk.weights = Arc::new(out);
        chunk.version = step.next();
    }

    fn finish(&self, step: Step) {
        let (_, _, sums) = self.sums();
        let event = if self.diverged.load(Ordering::SeqCst) {
            let tensor = self.chunks.iter().enumerate().find_map(|(i, chunk)| {
                let bad = lock(chunk).weights.iter().position(|v| !v.is_finite())?;
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

    /// Chunk `index` where its version is newer than `than`: shared bytes, not a copy.
    pub fn newer(&self, index: usize, than: Option<Step>) -> Option<(Step, Bytes)> {
        let chunk = lock(&self.chunks[index]);
        (than.is_none_or(|t| chunk.version > t))
            .then(|| (chunk.version, Bytes::from_owner(Shared(chunk.weights.clone()))))
    }

    /// The state between two steps, shared.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot { weights: Vec::new(), slots: Vec::new() };
        for chunk in &self.chunks {
            let chunk = lock(chunk);
            snapshot.weights.push(chunk.weights.clone());
            snapshot.slots.push(chunk.slots.clone());
        }
        snapshot
    }
}
