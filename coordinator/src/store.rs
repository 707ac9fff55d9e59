//! The parameter store: weights and optimizer state in chunks, the open reduction tree of each, and the update.
//!
//! Weights lie in two buffers, those of the open step and those of the next, in memory that workers of this host read in
//! place; a steady step takes no new memory. The sums that complete a chunk's tree, their mean, the clipping, the optimizer
//! and the checks are one pass over memory. A checkpoint that is being written copies nothing: what it has not yet written
//! of a chunk is written by the update that would replace it.

mod together;

use crate::copies::{self, Copies, Copying, Sent};
use crate::line::Line;
use crate::lock;
use crate::measure::{THREAD, cpu_time};
use crate::rows::{Failed, RowGradient, Tables, Update};
use crate::sum::{BLOCK, Gradient, Part, Spare, blocks};
use anyhow::Context;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use unisono_common::groups::Groups;
use unisono_common::ids::{Step, Version};
use unisono_common::kernels;
use unisono_common::layout::{Layout, Role};
use unisono_common::loss::LossSums;
use unisono_common::optim::{MAX_SLOTS, Sums};
use unisono_common::rows::{self, RowBlock};
use unisono_common::tree::{Node, Offer, Open};
use unisono_proto::shm::{Lane, Piece, Weights};

/// Takes the chunks of a checkpoint, in any order, from any thread.
pub trait Keep: Send + Sync {
    /// A chunk's weights, and its part of each of the optimizer's state vectors.
    fn chunk(&self, index: usize, weights: &[f32], slots: &[Vec<f32>]);

    /// Rows of sparse tables, in their order.
    fn rows(&self, block: &RowBlock);
}

struct Chunk {
    /// The step whose weights were written last.
    step: Step,
    piece: Piece,
    /// What lies beside them.
    beside: Beside,
    copies: Copies,
    slots: Vec<Vec<f32>>,
    open: Open<Part>,
    /// The whole sums, while they wait for the global norm.
    reduced: Option<(Vec<f32>, LossSums)>,
    /// The checkpoint that has not taken this chunk yet.
    keep: Option<Arc<dyn Keep>>,
}

/// What lies in the other of two buffers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    /// Nothing that anybody still needs.
    Nothing,
    /// The weights of the step before, which is open still: whoever joins or is slow needs them.
    Previous,
    /// The average, which is being evaluated.
    Average,
}

impl Chunk {
    fn flush(&mut self, index: usize) {
        if let Some(keep) = self.keep.take() {
            keep.chunk(index, self.piece.of_step(self.step.0), &self.slots);
        }
    }

    /// Its version after `than`, of those that are there.
    fn after(&self, than: Option<Version>) -> Option<Version> {
        let weights = Version::of(self.step);
        let [first, second] = match self.beside {
            Beside::Nothing => [None, Some(weights)],
            Beside::Previous => [self.step.0.checked_sub(1).map(|before| Version::of(Step(before))), Some(weights)],
            Beside::Average => [Some(weights), Some(Version { average: true, ..weights })],
        };
        [first, second].into_iter().flatten().find(|version| than.is_none_or(|than| than < *version))
    }
}

/// What came of the last chunk of a step.
#[derive(Debug)]
pub enum Applied {
    /// The weights of `step + 1` are there; these are the sums of its losses.
    Done { step: Step, sums: LossSums },
    /// A value is not finite after reduction or update.
    Diverged { step: Step, tensor: String },
    /// The sparse tables have no room for more rows.
    Full { step: Step, why: String },
}

/// What makes a mean of the sums: without any weight (all of class_weights or data.weight 0) there is no loss, and no gradient.
fn inverse(sums: LossSums) -> f32 {
    if sums.weight > 0.0 { (1.0 / sums.weight) as f32 } else { 0.0 }
}

/// How long all threads together have added gradients up, and have updated weights.
#[derive(Default)]
pub struct Timers {
    reduce: AtomicU64,
    optimizer: AtomicU64,
}

impl Timers {
    fn add(&self, reduce: Duration, optimizer: Duration) {
        self.reduce.fetch_add(reduce.as_nanos() as u64, Ordering::Relaxed);
        self.optimizer.fetch_add(optimizer.as_nanos() as u64, Ordering::Relaxed);
    }

    /// For adding up, and for updating.
    pub fn totals(&self) -> [Duration; 2] {
        [&self.reduce, &self.optimizer].map(|sum| Duration::from_nanos(sum.load(Ordering::Relaxed)))
    }
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
    /// The model's sparse tables, where it has any.
    pub tables: Option<Tables>,
    groups: Groups,
    clip: Clip,
    partitions: u32,
    weights: Arc<Weights>,
    chunks: Vec<Mutex<Chunk>>,
    /// The last version of each chunk, to look at while others work on it: twice its step, and one more for the average.
    versions: Vec<AtomicU64>,
    /// Buffers of a chunk's length.
    spare: Arc<Spare>,
    /// What all learning rates are multiplied by in the open step.
    factor: Mutex<f64>,
    pending: AtomicUsize,
    /// Place of the first value that is not finite.
    diverged: Mutex<Option<usize>>,
    changed: watch::Sender<u64>,
    /// Where streams wait to be sent chunks.
    pub line: Arc<Line>,
    applied: Box<dyn Fn(Applied) + Send + Sync>,
    /// Threads that reduce and update.
    pub pool: rayon::ThreadPool,
    /// The workers that compute gradients on this host and share memory with it, and their threads.
    pub beside: Mutex<Vec<(Arc<Lane>, usize)>>,
    /// Whether chunks for the wire need a checksum: what is encrypted has a better one.
    pub needs_checksum: bool,
    /// Where somebody wants to know.
    pub timers: Option<Timers>,
    /// Bytes of gradients accepted.
    pub bytes_pushed: AtomicU64,
    /// Bytes of weights sent, or read in place.
    pub bytes_pulled: AtomicU64,
}

impl Store {
    /// A store at `step` with these weights and optimizer slots (each of the trainable length; empty: fresh ones).
    ///
    /// # Errors
    /// Where the system has no memory for the weights, or no threads.
    pub fn new(
        layout: Arc<Layout>,
        tables: Option<Tables>,
        groups: Groups,
        clip: Clip,
        partitions: u32,
        step: Step,
        weights: &[f32],
        slots: &[Vec<f32>],
        threads: usize,
        applied: Box<dyn Fn(Applied) + Send + Sync>,
    ) -> anyhow::Result<Store> {
        let memory = Weights::create(layout.len()).context("no memory for the weights")?;
        let memory = Arc::new(memory);
        let pool =
            rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("reduce-{i}")).build()?;
        let pieces = memory.pieces((0..layout.chunks()).map(|i| layout.chunk(i)));
        let chunks: Vec<_> = pieces
            .into_iter()
            .enumerate()
            .map(|(i, mut piece)| {
                let trained = layout.trainable_of(i);
                let slots = match slots {
                    [] => groups.optimizer().first_slots(&weights[trained]),
                    slots => slots.iter().map(|values| values[trained.clone()].to_vec()).collect(),
                };
                piece.begin(step.0).copy_from_slice(&weights[layout.chunk(i)]);
                Mutex::new(Chunk {
                    step,
                    piece,
                    beside: Beside::Nothing,
                    copies: Copies::default(),
                    slots,
                    open: Open::new(partitions),
                    reduced: None,
                    keep: None,
                })
            })
            .collect();
        Ok(Store {
            pending: AtomicUsize::new(chunks.len() + usize::from(tables.is_some())),
            tables,
            versions: chunks.iter().map(|_| AtomicU64::new(number(Version::of(step)))).collect(),
            chunks,
            layout,
            groups,
            clip,
            partitions,
            weights: memory,
            spare: Arc::default(),
            factor: Mutex::new(1.0),
            diverged: Mutex::new(None),
            changed: watch::Sender::new(0),
            line: Line::new(),
            applied,
            pool,
            beside: Mutex::default(),
            needs_checksum: true,
            timers: None,
            bytes_pushed: AtomicU64::new(0),
            bytes_pulled: AtomicU64::new(0),
        })
    }

    /// The layout of the flat vector.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// What updates the weights.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// The weights, for workers that read them in place.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Opens a step, whose updates use `factor` times the learning rates.
    pub fn begin(&self, factor: f64) {
        *lock(&self.factor) = factor;
        self.chunks.iter().for_each(|chunk| lock(chunk).beside = Beside::Nothing);
        self.pending.store(self.chunks.len() + usize::from(self.tables.is_some()), Ordering::SeqCst);
    }

    /// Takes one checked chunk of a node's gradient sum, with the node's loss sums. Gives whether it was the last that was missing:
    /// who gave it has to [`Store::complete`] the chunk.
    pub fn add(&self, step: Step, node: Node, sums: LossSums, index: usize, gradient: Gradient) -> bool {
        self.bytes_pushed.fetch_add(self.layout.chunk(index).len() as u64 * 4, Ordering::Relaxed);
        let mut chunk = lock(&self.chunks[index]);
        if chunk.step != step || chunk.reduced.is_some() || chunk.open.holds(node) {
            return false; // late, or there already
        }
        let began = self.timers.as_ref().map(|timers| (timers, cpu_time(THREAD)));
        let gradient = if chunk.open.merges(node) { gradient } else { self.spare.keep(gradient) };
        let part = Part { gradient, sums, partitions: node.len() };
        // The last addition of all is a part of the update's pass.
        let add = |part, siblings: Vec<(Node, Part)>| {
            self.spare.add(part, siblings.into_iter().map(|(_, sibling)| sibling), self.partitions)
        };
        let offered = chunk.open.offer_to_all(node, part, add);
        if let Some((timers, began)) = began {
            timers.add(cpu_time(THREAD) - began, Duration::ZERO);
        }
        offered == Offer::Complete
    }

    /// Runs the optimizer on a chunk whose sums are all there, as far as it needs no others; after the last one, the step is over.
    pub fn complete(&self, index: usize) {
        let mut chunk = lock(&self.chunks[index]);
        let Some(Part { gradient, sums, .. }) = chunk.open.take_root() else { return };
        let step = chunk.step;
        if self.waits() {
            // The mean waits for all others: its norm, or its tensor's, is needed first.
            let mut mean = self.spare.sum(gradient);
            self.check(index, &mean);
            kernels::scale(&mut mean[..self.layout.trainable_of(index).len()], inverse(sums));
            chunk.reduced = Some((mean, sums));
            drop(chunk);
        } else {
            self.update(&mut chunk, index, &gradient, inverse(sums), sums, None);
            drop(chunk);
            self.spare.free(gradient);
            self.weights_changed();
        }
        self.one_less(step, sums);
    }

    /// Tells all who wait for the weights of the next step that more of them are there.
    fn weights_changed(&self) {
        self.changed.send_modify(|n| *n += 1);
        lock(&self.beside).iter().for_each(|(lane, _)| lane.weights_changed());
    }

    /// Takes the checked sums of a node's rows, as [`Store::add`] does those of its chunks; the last ones finish the step.
    pub fn accept_rows(&self, step: Step, node: Node, sums: LossSums, gradient: RowGradient) {
        let Some(tables) = &self.tables else { return };
        let (keys, values) = gradient.parts();
        self.bytes_pushed.fetch_add((8 * keys.len() + 4 * values.len()) as u64, Ordering::Relaxed);
        if let Some(sums) = tables.accept(step, node, sums, gradient) {
            if self.rows_first() {
                self.change_rows(inverse(sums), |tables, update| tables.prepare(update));
            }
            self.one_less(step, sums);
        }
    }

    /// The digest of the weights before the first step.
    pub fn untrained(&self, seed: u64) -> String {
        let weights = self.layout.weights_digest(&self.layout.init(seed));
        self.tables.as_ref().map_or(weights.clone(), |tables| rows::Digest::new(tables.layout()).finish(&weights))
    }

    /// A chunk, or the tables' gradient, is whole; the last one finishes the step.
    fn one_less(&self, step: Step, sums: LossSums) {
        if self.pending.fetch_sub(1, Ordering::SeqCst) != 1 {
            return;
        }
        let mean = inverse(sums);
        let factor = if self.waits() { mean * self.apply_together(mean) } else { mean };
        // Rows change in place, when nobody reads those of this step any more.
        let changed = self.change_rows(factor, |tables, update| tables.commit(update)).unwrap_or(Ok(()));
        self.finish(step, sums, changed);
    }

    /// A part of the update of rows by their gradients' sums times `factor`, where there are any; on the pool.
    fn change_rows<R: Send>(&self, factor: f32, change: impl FnOnce(&Tables, Update) -> R + Send) -> Option<R> {
        let tables = self.tables.as_ref()?;
        let began = self.timers.as_ref().map(|timers| (timers, Instant::now()));
        let lr = (tables.optimizer().lr() as f64 * *lock(&self.factor)) as f32;
        let done = self.pool.install(|| change(tables, Update { lr, factor, limit: self.clip.value }));
        if let Some((timers, began)) = began {
            timers.add(Duration::ZERO, began.elapsed());
        }
        Some(done)
    }

    /// Whether `node`'s sum of chunk `index` would be added to another, or is all there is to add.
    pub fn merges(&self, index: usize, node: Node) -> bool {
        node.len() == self.partitions || lock(&self.chunks[index]).open.merges(node)
    }

    /// Whether workers that share memory leave a core free: where they compute on all of them, an update would only interrupt them.
    fn has_a_core(&self) -> bool {
        lock(&self.beside).iter().map(|(_, threads)| threads).sum::<usize>() < self.pool.current_num_threads()
    }

    /// Whether chunks are to be taken while workers beside this store compute: where these leave it a core, and where streams wait
    /// for new weights.
    pub fn takes_early(&self) -> bool {
        self.has_a_core() || self.changed.receiver_count() > 0
    }

    /// Whether the next rows of sparse tables are computed as soon as their gradients are there: not where the global norm is
    /// needed first, and only beside workers that leave a core free.
    pub fn rows_first(&self) -> bool {
        self.tables.is_some() && self.clip.norm.is_none() && self.has_a_core()
    }

    /// New weights from a gradient times `factor` (trainable part) and the sums of statistics (running part), block by block. With
    /// `ratios` of the runs there are directions already, and the weights go along them.
    fn update(
        &self,
        chunk: &mut Chunk,
        index: usize,
        gradient: &Gradient,
        factor: f32,
        sums: LossSums,
        ratios: Option<&[f32]>,
    ) {
        chunk.flush(index);
        let (step, rates) = (chunk.step, *lock(&self.factor));
        let (range, trained) = (self.layout.chunk(index), self.layout.trainable_of(index).len());
        let Chunk { piece, slots, .. } = chunk;
        let (old, new) = piece.update(step.0);
        // Each copy holds the spare buffers, beside this store.
        let (streams, there) = (self.changed.receiver_count(), Arc::strong_count(&self.spare) - 1);
        let wanted = streams > 0 && there < copies::AT_ONCE;
        let mut copy =
            wanted.then(|| Copying::of(Version::of(step.next()), range.len(), self.needs_checksum, &self.spare));
        let began = self.timers.as_ref().map(|timers| (timers, cpu_time(THREAD)));
        let mut done = |at: Range<usize>, finite: bool, new: &[f32]| {
            if !finite {
                let mut read = vec![0.0; at.len()];
                gradient.read(at.clone(), &mut read);
                self.check_at(range.start + at.start, &read);
                self.check_at(range.start + at.start, new);
            }
            if let Some(copy) = &mut copy {
                copy.add(new);
            }
        };
        for part in self.groups.parts(range.start..range.start + trained) {
            let update = part.optimizer.at(step.0 + 1, rates);
            for at in blocks(part.range.start - range.start..part.range.end - range.start) {
                let (first, second) = gradient.halves(at.clone());
                let sums = Sums { first, second, factor, limit: self.clip.value };
                let (old, new) = (&old[at.clone()], &mut new[at.clone()]);
                let (vectors, states) = (slots.len(), &mut states(slots, at.clone()));
                let finite = match ratios {
                    Some(ratios) => update.along(old, ratios[part.run], &mut states[..vectors], new),
                    None => update.run(old, sums, &mut states[..vectors], new),
                };
                done(at, finite, new);
            }
        }
        for at in blocks(trained..range.len()) {
            let finite = self.blend_running(range.start, at.clone(), sums, gradient, old, new);
            done(at.clone(), finite, &new[at]);
        }
        if let Some((timers, began)) = began {
            // One pass does both: its time goes to each by the bytes that it moves.
            let (halves, whole) = (1 + usize::from(gradient.halves(0..0).1.is_some()), cpu_time(THREAD) - began);
            let reduce = whole.mul_f64(halves as f64 / (halves + 2 + 2 * slots.len()) as f64);
            timers.add(reduce, whole - reduce);
        }
        chunk.copies.updated(copy, streams);
        chunk.beside = Beside::Previous;
        chunk.step = step.next();
        self.versions[index].store(number(Version::of(chunk.step)), Ordering::Release);
        self.weights.say(index, chunk.step.0);
    }

    /// Puts the average of the weights beside them, between two steps, for those who evaluate it until the next step begins. Running
    /// statistics, which are averages themselves, are as they are.
    pub fn show_average(&self) {
        for (i, chunk) in self.chunks.iter().enumerate() {
            let mut chunk = lock(chunk);
            let (step, trained) = (chunk.step, self.layout.trainable_of(i).len());
            let Chunk { piece, slots, .. } = &mut *chunk;
            let (weights, beside) = piece.update(step.0);
            beside.copy_from_slice(weights);
            if let Some(average) = slots.last() {
                beside[..trained].copy_from_slice(average);
            }
            chunk.beside = Beside::Average;
            self.versions[i].store(number(Version { step, average: true }), Ordering::Release);
        }
        self.changed.send_modify(|n| *n += 1);
    }

    /// Running statistics at `at` of a chunk that begins at `start`: they follow the means over the step's samples. False where
    /// a value is not finite.
    fn blend_running(
        &self,
        start: usize,
        at: Range<usize>,
        sums: LossSums,
        gradient: &Gradient,
        old: &[f32],
        new: &mut [f32],
    ) -> bool {
        let mut block = [0.0; BLOCK];
        let g = &mut block[..at.len()];
        gradient.read(at.clone(), g);
        for (tensor, range) in self.layout.tensors() {
            let Role::Running { momentum } = tensor.role else { continue };
            for i in range.start.max(start + at.start)..range.end.min(start + at.end) {
                let i = i - start;
                let mean = g[i - at.start] / sums.samples as f32;
                new[i] = (1.0 - momentum) * old[i] + momentum * mean;
            }
        }
        kernels::all_finite(g) && kernels::all_finite(&new[at])
    }

    fn check(&self, index: usize, values: &[f32]) {
        self.check_at(self.layout.chunk(index).start, values);
    }

    /// Notes the first tensor, by its place in the layout, that is not finite.
    fn check_at(&self, start: usize, values: &[f32]) {
        if !kernels::all_finite(values)
            && let Some(bad) = values.iter().position(|v| !v.is_finite())
        {
            let mut diverged = lock(&self.diverged);
            let at = start + bad;
            *diverged = Some(diverged.map_or(at, |first| first.min(at)));
        }
    }

    fn finish(&self, step: Step, sums: LossSums, updated: Result<(), Failed>) {
        let diverged = lock(&self.diverged).and_then(|at| self.layout.tensor_at(at));
        (self.applied)(match (diverged, updated) {
            (Some(tensor), _) => Applied::Diverged { step, tensor: tensor.name.clone() },
            (None, Err(Failed::Diverged(tensor))) => Applied::Diverged { step, tensor },
            (None, Err(Failed::Full(why))) => Applied::Full { step, why },
            (None, Ok(())) => Applied::Done { step, sums },
        });
    }

    /// A receiver that wakes when any chunk has a new version.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The chunks with a newer version than was sent.
    pub fn newer(&self, sent: &[Option<Version>]) -> impl Iterator<Item = usize> {
        let last = |i: usize| self.versions[i].load(Ordering::Acquire);
        let newer = move |(i, sent): &(usize, &Option<Version>)| sent.is_none_or(|sent| number(sent) < last(*i));
        sent.iter().enumerate().filter(newer).map(|(i, _)| i)
    }

    /// The first of them, with its next version: a pass over the weights begins with it.
    pub fn next(&self, sent: &[Option<Version>]) -> Option<(usize, Sent)> {
        self.newer(sent).find_map(|i| Some((i, self.next_of(i, sent[i])?)))
    }

    /// The next version of chunk `index` after `than`. While a step is open that is never a version that would leave out
    /// the open step's.
    fn next_of(&self, index: usize, than: Option<Version>) -> Option<Sent> {
        let mut chunk = lock(&self.chunks[index]);
        let next = chunk.after(than)?;
        let Chunk { piece, copies, .. } = &mut *chunk;
        Some(copies.send(next, piece.of_step(next.place()), self.needs_checksum, &self.spare))
    }

    /// Whether the store is at the beginning of `step`, and no update of it has run.
    pub fn is_at(&self, step: Step) -> bool {
        let of_tables = self.tables.as_ref().is_none_or(|tables| tables.is_at(step));
        of_tables && self.chunks.iter().all(|chunk| lock(chunk).step == step)
    }

    /// Promises `keep` the state at the beginning of `step`: until [`Store::flush`] is through, an update gives a chunk away
    /// before it changes it. False, and no promise, where an update of that step has run.
    pub fn keep(&self, step: Step, keep: &Arc<dyn Keep>) -> bool {
        let mut chunks: Vec<_> = self.chunks.iter().map(lock).collect();
        // Rows are asked last: where all chunks are at the step's beginning, nobody who waits for one changes rows.
        let whole = chunks.iter().all(|chunk| chunk.step == step)
            && self.tables.as_ref().is_none_or(|tables| tables.is_at(step));
        if whole {
            chunks.iter_mut().for_each(|chunk| chunk.keep = Some(keep.clone()));
            if let Some(tables) = &self.tables {
                tables.keep();
            }
        }
        whole
    }

    /// Gives away all chunks that were promised and not given yet, and to `keep` all rows.
    pub fn flush(&self, keep: &dyn Keep) {
        self.chunks.iter().enumerate().for_each(|(i, chunk)| lock(chunk).flush(i));
        if let Some(tables) = &self.tables {
            tables.flush(|block| keep.rows(block));
        }
    }
}

/// In the order of the versions.
fn number(Version { step, average }: Version) -> u64 {
    2 * step.0 + u64::from(average)
}

/// The state vectors of the values at `at`.
fn states(slots: &mut [Vec<f32>], at: Range<usize>) -> [&mut [f32]; MAX_SLOTS] {
    let mut states: [&mut [f32]; MAX_SLOTS] = Default::default();
    states.iter_mut().zip(slots).for_each(|(state, slot)| *state = &mut slot[at.clone()]);
    states
}

#[cfg(test)]
mod tests;
