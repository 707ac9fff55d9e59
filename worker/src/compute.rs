//! The compute thread: weights in, gradient sums out. It knows nothing of the network but its link.

mod passes;
#[cfg(all(test, target_os = "linux"))]
mod tests;

use crate::Simulated;
use crate::link::{Announcement, Link, Order};
use crate::rows::{Asked, Source};
use crate::samples::Samples;
use crate::weights::Reading;
use anyhow::{Context, Result, ensure};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use unisono_common::data::partition::{Feeder, Partitions};
use unisono_common::data::{Batch, Draw, Prepared};
use unisono_common::job::Job;
use unisono_common::layers::Segments;
use unisono_common::layout::Layout;
use unisono_common::loss::{Loss, LossSums};
use unisono_common::metrics::{EvalKind, EvalSums};
use unisono_common::model::Model;
use unisono_common::rng::{Key, Purpose};
use unisono_common::rows::First;
use unisono_common::train::{self, Ahead, Final, Source as _, Workspace};
use unisono_common::tree::Node;
use unisono_proto::shm::frame::Spent;
use unisono_proto::{self as wire, v1};

/// Samples of the test set that are evaluated at once; of tokens so many positions, of candidates so many of them, at least those of
/// one sample.
const EVAL_ROWS: usize = 256;

/// Everything that a worker computes with.
pub struct Compute {
    job: Job,
    samples: Samples,
    prepared: Prepared,
    model: Arc<Model>,
    loss: Loss,
    /// An evaluation of nothing.
    no_sums: EvalSums,
    feeder: Feeder,
    train_parts: Partitions,
    test_parts: Option<Partitions>,
    workspace: Option<(usize, Workspace)>,
    batch: Batch,
    /// Whose samples the batch holds.
    filled: Option<Filled>,
    /// The next step's, in a batch of its own, whose rows are asked for while this one is computed.
    ahead: Option<Filled>,
    next: Batch,
    /// What rows of sparse tables are at first.
    first: First,
    /// Gradients of passes that are to be added to others.
    spare: Vec<Vec<f32>>,
}

/// What came of an order.
struct Computed<'a> {
    announcement: Announcement<'a>,
    sums: LossSums,
    spent: Spent,
}

/// A node's samples in a step, as a batch.
struct Filled {
    step: u64,
    node: Node,
    segments: Segments,
    /// Its rows, where they were asked for and are not there yet.
    asked: Option<Asked>,
    /// Whether all that it needs is there.
    ready: bool,
    /// How far its forward pass has run ahead of its order, and what that took.
    ahead: (Ahead, Spent),
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

impl Compute {
    /// Plans the work of `job`, whose data was described by `prepared`.
    pub fn new(job: Job, samples: Samples, prepared: Prepared, model: Arc<Model>) -> Result<Compute> {
        let p = job.train.partitions;
        let train_parts = Partitions::new(prepared.train_samples as usize, p, job.data.hashed.then_some(job.seed))?;
        // The coordinator knows whether it is divided into as many.
        let test_parts = Partitions::new(prepared.test_samples as usize, p, None).ok();
        let loss = Loss::new(&job.train.loss, model.outputs())?;
        Ok(Compute {
            batch: Batch::empty(),
            filled: None,
            ahead: None,
            next: Batch::empty(),
            first: model.rows().first(job.seed),
            spare: Vec::new(),
            workspace: None,
            no_sums: EvalSums::new(EvalKind::of(&prepared, job.train.top_k)),
            feeder: Feeder::new(train_parts.clone(), job.seed, job.train.micro_batch),
            job,
            samples,
            prepared,
            model,
            loss,
            train_parts,
            test_parts,
        })
    }

    /// Counts confusions of classes in evaluations as well.
    pub fn counting_confusions(self) -> Compute {
        Compute { no_sums: self.no_sums.with_confusions(), ..self }
    }

    /// How long it takes where it only pretends to compute.
    fn simulated(&self) -> Option<&Simulated> {
        match &self.samples {
            Samples::Simulated(simulated) => Some(simulated),
            Samples::Read(_) | Samples::Sent(_) => None,
        }
    }

    fn workspace(&mut self, rows: usize) -> &mut Workspace {
        if self.workspace.as_ref().is_none_or(|(have, _)| *have < rows) {
            let segments = self.job.train.partitions as usize;
            self.workspace = Some((rows, Workspace::new(&self.model, rows, segments)));
            // What was in it is lost.
            self.filled.iter_mut().for_each(|filled| filled.ahead = Default::default());
        }
        &mut self.workspace.as_mut().expect("just made").1
    }

    /// Samples of the test set that are evaluated at once.
    fn eval_samples(&self) -> usize {
        (EVAL_ROWS / (self.model.positions() * self.prepared.rows_of_a_sample(true))).max(1)
    }

    /// Rows of a batch that they are, at most.
    fn eval_rows(&self) -> usize {
        self.eval_samples() * self.prepared.rows_of_a_sample(true)
    }

    /// Puts a node's samples into the batch, where they are not in it, and asks for their rows of sparse tables.
    fn fill(&mut self, step: u64, node: Node, rows: &Source) {
        if self.filled.as_ref().is_some_and(|filled| (filled.step, filled.node) == (step, node)) {
            return;
        }
        if let Some(filled) = self.ahead.take_if(|ahead| (ahead.step, ahead.node) == (step, node)) {
            std::mem::swap(&mut self.batch, &mut self.next);
            self.filled = Some(filled);
            return;
        }
        let mut segments = Segments { lo: node.lo, starts: vec![0] };
        self.batch.clear();
        let draw = Draw::new(self.job.seed, self.feeder.epoch(step), self.job.data.augment);
        for partition in node.lo..node.hi {
            let rows = self.feeder.positions(step, partition).iter().map(|&i| i as usize);
            self.samples.fill(&mut self.batch, &self.prepared, &self.train_parts, (partition, false), rows, Some(draw));
            segments.starts.push(self.batch.samples);
        }
        self.batch.look_up();
        let asked = rows.ask(step, &self.batch);
        self.filled = Some(Filled { step, node, segments, asked, ready: false, ahead: Default::default() });
    }

    /// Asks for the rows of the next step before this one is computed, where they have to be asked for.
    fn ask_ahead(&mut self, step: u64, node: Node, rows: &Source) {
        if !rows.is_pulled()
            || self.simulated().is_some()
            || self.ahead.as_ref().is_some_and(|ahead| ahead.step == step + 1)
        {
            return;
        }
        let now = self.filled.take();
        std::mem::swap(&mut self.batch, &mut self.next);
        self.fill(step + 1, node, rows);
        std::mem::swap(&mut self.batch, &mut self.next);
        self.ahead = std::mem::replace(&mut self.filled, now);
    }

    /// How many rows of sparse tables the batch asks for.
    fn rows(&self) -> usize {
        self.batch.lookups.keys().len()
    }

    /// Gets a node's samples ready, and the rows that they ask for; what gathering the samples took. `None` where the rows do not
    /// come.
    fn prepare(&mut self, step: u64, node: Node, rows: &Source) -> Option<Duration> {
        let began = Instant::now();
        if self.simulated().is_some() {
            return Some(Duration::ZERO);
        }
        self.fill(step, node, rows);
        let gathered = began.elapsed();
        let filled = self.filled.as_mut().expect("just filled");
        if !filled.ready {
            rows.fill(step, filled.asked.take(), &self.first, self.model.rows().width(), &mut self.batch)?;
            filled.ready = true;
        }
        Some(gathered)
    }

    /// Makes room for a node's pass; gives what its layers draw their numbers by.
    fn plan(&mut self, step: u64, node: Node) -> Key {
        let rows = node.len() as usize * self.job.train.micro_batch * self.prepared.rows_of_a_sample(false);
        self.workspace(rows.max(self.eval_rows()));
        Key::new(self.job.seed, Purpose::Dropout).with(step)
    }

    /// Begins, or goes on, with a node that is most likely the next: gathers its samples, and computes with those weights that have
    /// changed already. Gives whether there will be more to do when others have.
    fn begin(&mut self, step: u64, node: Node, link: &Link) -> bool {
        if self.simulated().is_some() {
            return false;
        }
        let began = Instant::now();
        self.fill(step, node, link.rows());
        // What tables hold changes last of all.
        let Some(early) = link.early(step).filter(|_| self.batch.lookups.keys().is_empty()) else {
            return false;
        };
        let (data, key) = (began.elapsed(), self.plan(step, node));
        let (_, workspace) = self.workspace.as_mut().expect("planned above");
        let filled = self.filled.as_mut().expect("filled above");
        let (ahead, before) = &mut filled.ahead;
        let more = train::ahead(&self.model, &early, &self.batch, &filled.segments, key, workspace, ahead);
        let [data, all] = [data, began.elapsed()].map(nanos);
        before.data += data;
        before.forward += all - data;
        before.ahead += all;
        more
    }

    /// The gradient sums of one node that [`Compute::prepare`] got ready, into `out` and `d_rows`, and what that took; `ready` hears
    /// what is final, of rows if they come first. `None` where the weights do not come.
    fn gradient(
        &mut self,
        step: u64,
        node: Node,
        weights: &Reading<'_>,
        rows_first: bool,
        out: &mut [f32],
        d_rows: &mut [f32],
        ready: &mut dyn FnMut(Final<'_>, LossSums),
    ) -> Option<(LossSums, Spent)> {
        if let Some(Simulated { partition, seed }) = self.simulated() {
            weights.get(0..out.len())?;
            let key = Key::new(*seed, Purpose::Synthetic).with(step);
            let seconds = |p: u32| partition[key.below(p as u64, partition.len() as u64) as usize];
            let forward = Duration::from_secs_f64((node.lo..node.hi).map(seconds).sum());
            std::thread::sleep(forward);
            out.fill(0.0);
            let samples = (node.lo..node.hi).map(|p| self.feeder.positions(step, p).len() as u64).sum();
            let spent = Spent { forward: nanos(forward), ..Spent::default() };
            return Some((LossSums { loss: 0.0, weight: samples as f64, samples }, spent));
        }
        let key = self.plan(step, node);
        let (_, workspace) = self.workspace.as_mut().expect("planned above");
        workspace.rows_first = rows_first;
        let Filled { segments, ahead, .. } = self.filled.as_mut().expect("filled above");
        let (model, loss, batch) = (&self.model, &self.loss, &self.batch);
        let (ahead, early) = std::mem::take(ahead);
        let (filled, waited) = (Instant::now(), weights.waited());
        train::forward(model, weights, batch, segments, key, workspace, ahead)?;
        let weights_all = weights.get(0..model.layout().len())?;
        let forwarded = Instant::now();
        let sums = train::backward(model, loss, weights_all, batch, segments, key, workspace, out, d_rows, ready);
        let spent = Spent {
            forward: early.forward + nanos((forwarded - filled).saturating_sub(weights.waited() - waited)),
            backward: nanos(forwarded.elapsed()),
            ..early
        };
        Some((sums, spent))
    }

    /// The evaluation sums of one node, partition by partition.
    ///
    /// `rows` puts the rows of sparse tables into a batch; where it gives `None`, so does this.
    pub fn evaluate(
        &mut self,
        node: Node,
        weights: &[f32],
        rows: &mut dyn FnMut(&First, &mut Batch) -> Option<()>,
    ) -> Option<EvalSums> {
        if let Some((left, right)) = node.children() {
            let left = self.evaluate(left, weights, rows)?;
            return Some(left.merge(self.evaluate(right, weights, rows)?));
        }
        let mut sums = self.no_sums.clone();
        let Some(count) = self.test_parts.as_ref().map(|parts| parts.len(node.lo)) else { return Some(sums) };
        let eval_samples = self.eval_samples();
        self.workspace(self.eval_rows());
        let draw = Draw::test(self.job.seed);
        let (Some(parts), Some((_, workspace))) = (&self.test_parts, &mut self.workspace) else { return Some(sums) };
        for at in (0..count).step_by(eval_samples) {
            let samples = at..(at + eval_samples).min(count);
            self.filled = None;
            self.batch.clear();
            self.samples.fill(&mut self.batch, &self.prepared, parts, (node.lo, true), samples, Some(draw));
            self.batch.look_up();
            rows(&self.first, &mut self.batch)?;
            let logits = train::evaluate(&self.model, weights, &self.batch, workspace);
            sums.add_batch(&self.loss, logits, &self.batch.targets, &self.batch.weights);
        }
        Some(sums)
    }

    /// The first partition of `node` whose loss or gradient is not finite, and the tensor's name.
    fn blame(&mut self, step: u64, node: Node, weights: &Reading<'_>, rows: &Source) -> v1::Diverged {
        let diverged =
            |node, tensor: &str| v1::Diverged { step, node: Some(wire::to_wire(node)), tensor: tensor.into() };
        // Rare, and the slot may be read by others: it gets memory of its own.
        let mut gradient = vec![0.0; self.model.layout().len()];
        for leaf in (node.lo..node.hi).map(Node::leaf) {
            if self.prepare(step, leaf, rows).is_none() {
                break;
            }
            let mut d_rows = vec![0.0; self.batch.rows.len()];
            let computed = self.gradient(step, leaf, weights, false, &mut gradient, &mut d_rows, &mut |_, _| {});
            let Some((sums, _)) = computed else { break };
            if !sums.loss.is_finite() {
                return diverged(leaf, "loss");
            }
            if let Some(bad) = gradient.iter().position(|g| !g.is_finite()) {
                return diverged(leaf, self.model.layout().tensor_at(bad).map_or("", |t| &t.name));
            }
        }
        diverged(node, "the sum of the gradients")
    }

    /// Gets the partitions of a node that the coordinator has to send.
    fn fetch(&self, link: &Link, node: Node, test: bool) -> Result<()> {
        let Samples::Sent(sent) = &self.samples else { return Ok(()) };
        let at_hand = sent.at_hand();
        let missing: Vec<u32> = (node.lo..node.hi).filter(|p| !at_hand.contains(&(*p, test))).collect();
        if missing.is_empty() { Ok(()) } else { link.fetch(missing, test) }
    }

    /// Serves orders until the session is over.
    pub fn serve(mut self, link: Link, session: mpsc::UnboundedSender<v1::FromWorker>) -> Result<()> {
        // The first node of the last step is most likely that of the next one.
        let mut first: Option<(u64, Node)> = None;
        while let Some(order) = link.next(|| first.is_some_and(|(step, node)| self.begin(step + 1, node, &link))) {
            let tell = |kind| session.send(v1::FromWorker { kind: Some(kind) }).ok().context("the session ended");
            let (step, node) = (order.step, order.node);
            self.fetch(&link, node, order.evaluate)?;
            let average = order.evaluate && self.job.train.ema.is_some();
            let Some(weights) = link.weights(&order, average) else { continue };
            if order.evaluate {
                ensure!(self.simulated().is_none(), "a worker that computes nothing cannot evaluate");
                let Some(all) = weights.get(0..self.model.layout().len()) else { continue };
                let width = self.model.rows().width();
                let mut rows = |first: &First, batch: &mut Batch| link.rows().fill(step, None, first, width, batch);
                let Some(sums) = self.evaluate(node, all, &mut rows) else { continue };
                drop(weights);
                if !sums.is_finite() {
                    let (node, tensor) = (Some(wire::to_wire(node)), "loss of the evaluation".into());
                    tell(v1::from_worker::Kind::Diverged(v1::Diverged { step, node, tensor }))?;
                    continue;
                }
                let (sums, counts) = sums.to_parts();
                let done = v1::EvalDone { step, node: Some(wire::to_wire(node)), sums, counts };
                tell(v1::from_worker::Kind::EvalDone(done))?;
                continue;
            }
            let pass = self.first_pass(node);
            first = first.filter(|(of, _)| *of == step).or(Some((step, pass)));
            let Some(gathered) = self.prepare(step, pass, link.rows()) else { continue };
            if first == Some((step, pass)) {
                self.ask_ahead(step, pass, link.rows());
            }
            let Some(slot) = link.slot() else { break };
            let model = self.model.clone();
            let computed = if pass == node {
                self.in_one_pass(&order, &link, &weights, slot, model.layout())
            } else {
                self.in_passes(&order, &link, &weights, slot, model.layout())
            };
            let Some(Computed { announcement, sums, mut spent }) = computed else {
                link.drop_slot(slot);
                continue;
            };
            if sums.loss.is_finite() {
                // Before the last announcement: then others may be written over them.
                drop(weights);
                spent.data += nanos(gathered);
                announcement.finish(sums, spent);
            } else {
                link.drop_slot(slot);
                tell(v1::from_worker::Kind::Diverged(self.blame(step, node, &weights, link.rows())))?;
            }
        }
        Ok(())
    }

    /// The sums of an order whose samples are ready, into a slot; announced as they come. `None` where the weights do not come.
    fn in_one_pass<'a>(
        &mut self,
        order: &Order,
        link: &'a Link,
        weights: &Reading<'_>,
        slot: u32,
        layout: &'a Layout,
    ) -> Option<Computed<'a>> {
        let (keys, d_rows) = link.rows_of(slot, self.rows());
        keys.copy_from_slice(self.batch.lookups.keys());
        let announcement = link.announce(layout, slot, order, keys.len());
        let mut telling = Duration::ZERO;
        let mut ready = |part: Final<'_>, sums| {
            let began = Instant::now();
            match part {
                Final::From(from, _) => announcement.ready(from, sums),
                Final::Rows => announcement.ready_rows(sums),
            }
            telling += began.elapsed();
        };
        let Order { step, node, rows_first, .. } = *order;
        let (sums, mut spent) =
            self.gradient(step, node, weights, rows_first, link.gradient(slot), d_rows, &mut ready)?;
        let telling = nanos(telling);
        (spent.backward, spent.encode) = (spent.backward.saturating_sub(telling), telling);
        Some(Computed { announcement, sums, spent })
    }
}
