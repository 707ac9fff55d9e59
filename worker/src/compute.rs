//! The compute thread: weights in, gradient sums out. It knows nothing of the network but the channels it is given.

use crate::samples::Samples;
use anyhow::{Context, Result};
use std::sync::Arc;
use tokio::sync::mpsc;
use unisono_common::data::partition::{Feeder, Partitions};
use unisono_common::data::{Batch, Prepared};
use unisono_common::job::Job;
use unisono_common::layers::Segments;
use unisono_common::loss::{Loss, LossSums};
use unisono_common::metrics::{EvalKind, EvalSums};
use unisono_common::model::Model;
use unisono_common::rng::{Key, Purpose};
use unisono_common::train::{self, Workspace};
use unisono_common::tree::Node;
use unisono_proto::{self as wire, v1};

/// Rows of the test set that are evaluated at once.
const EVAL_ROWS: usize = 256;

/// One order: this node, with these weights.
pub struct Order {
    pub step: u64,
    pub generation: u64,
    pub node: Node,
    pub evaluate: bool,
    pub weights: Arc<Vec<f32>>,
}

/// Everything that a worker computes with.
pub struct Compute {
    job: Job,
    samples: Samples,
    prepared: Prepared,
    model: Arc<Model>,
    loss: Loss,
    eval_kind: EvalKind,
    feeder: Feeder,
    train_parts: Partitions,
    test_parts: Option<Partitions>,
    workspace: Option<(usize, Workspace)>,
    batch: Batch,
    gradient: Vec<f32>,
}

impl Compute {
    /// Plans the work of `job`, whose data was described by `prepared`.
    pub fn new(job: Job, samples: Samples, prepared: Prepared, model: Arc<Model>) -> Result<Compute> {
        let p = job.train.partitions;
        let train_parts = Partitions::new(prepared.train_samples as usize, p, job.data.hashed.then_some(job.seed))?;
        let test_parts = match prepared.test_samples as usize {
            0 => None,
            test => Some(Partitions::new(test, p, None).context("the test set")?),
        };
        let loss = Loss::new(&job.train.loss, model.outputs())?;
        Ok(Compute {
            gradient: vec![0.0; model.layout().len()],
            batch: Batch::empty(),
            workspace: None,
            eval_kind: EvalKind::of(prepared.classes.as_ref().map(Vec::len)),
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

    fn workspace(&mut self, rows: usize) -> &mut Workspace {
        if self.workspace.as_ref().is_none_or(|(have, _)| *have < rows) {
            let segments = self.job.train.partitions as usize;
            self.workspace = Some((rows, Workspace::new(&self.model, rows, segments)));
        }
        &mut self.workspace.as_mut().expect("just made").1
    }

    /// The gradient sums of one node, into `self.gradient`.
    fn gradient(&mut self, step: u64, node: Node, weights: &[f32]) -> LossSums {
        let mut segments = Segments { lo: node.lo, starts: vec![0] };
        self.batch.clear();
        for partition in node.lo..node.hi {
            let rows = self.feeder.positions(step, partition).iter().map(|&i| i as usize);
            self.samples.fill(&mut self.batch, &self.prepared, &self.train_parts, (partition, false), rows);
            segments.starts.push(self.batch.samples);
        }
        let rows = (node.len() as usize * self.job.train.micro_batch).max(EVAL_ROWS);
        self.workspace(rows);
        let (_, workspace) = self.workspace.as_mut().expect("planned above");
        let key = Key::new(self.job.seed, Purpose::Dropout).with(step);
        let (model, loss, batch) = (&self.model, &self.loss, &self.batch);
        train::gradient(model, loss, weights, batch, &segments, key, workspace, &mut self.gradient, &mut |_, _| {})
    }

    /// The evaluation sums of one node, partition by partition.
    pub fn evaluate(&mut self, node: Node, weights: &[f32]) -> EvalSums {
        if let Some((left, right)) = node.children() {
            return self.evaluate(left, weights).merge(self.evaluate(right, weights));
        }
        let mut sums = EvalSums::new(self.eval_kind);
        let Some(count) = self.test_parts.as_ref().map(|parts| parts.len(node.lo)) else { return sums };
        self.workspace(EVAL_ROWS);
        let (Some(parts), Some((_, workspace))) = (&self.test_parts, &mut self.workspace) else { return sums };
        for at in (0..count).step_by(EVAL_ROWS) {
            let rows = at..(at + EVAL_ROWS).min(count);
            self.batch.clear();
            self.samples.fill(&mut self.batch, &self.prepared, parts, (node.lo, true), rows.clone());
            let logits = train::evaluate(&self.model, weights, &self.batch, workspace);
            sums.add_batch(&self.loss, logits, &self.batch.targets);
        }
        sums
    }

    /// The first partition of `node` whose loss or gradient is not finite, and the tensor's name.
    fn blame(&mut self, step: u64, node: Node, weights: &[f32]) -> v1::Diverged {
        let (mut partition, mut tensor) = (node.lo, "the sum of the gradients".to_string());
        for p in node.lo..node.hi {
            let sums = self.gradient(step, Node::leaf(p), weights);
            let bad = self.gradient.iter().position(|g| !g.is_finite());
            if !sums.loss.is_finite() || bad.is_some() {
                partition = p;
                let name = bad.and_then(|i| self.model.layout().tensor_at(i)).map(|t| t.name.clone());
                tensor = if sums.loss.is_finite() { name.unwrap_or_default() } else { "loss".into() };
                break;
            }
        }
        v1::Diverged { step, partition, tensor }
    }

    /// Serves orders until the channel closes.
    pub fn serve(
        mut self,
        orders: std::sync::mpsc::Receiver<Order>,
        session: mpsc::UnboundedSender<v1::FromWorker>,
        push: mpsc::Sender<v1::PushPart>,
    ) -> Result<()> {
        for Order { step, generation, node, evaluate, weights } in orders {
            let tell = |kind| session.send(v1::FromWorker { kind: Some(kind) }).ok().context("the session ended");
            if evaluate {
                let sums = self.evaluate(node, &weights);
                drop(weights);
                if !sums.is_finite() {
                    let tensor = "loss of the evaluation".into();
                    tell(v1::from_worker::Kind::Diverged(v1::Diverged { step, partition: node.lo, tensor }))?;
                    continue;
                }
                let (sums, counts) = sums.to_parts();
                let done = v1::EvalDone { step, node: Some(wire::to_wire(node)), sums, counts };
                tell(v1::from_worker::Kind::EvalDone(done))?;
                continue;
            }
            let LossSums { loss, weight, samples } = self.gradient(step, node, &weights);
            if !loss.is_finite() || self.gradient.iter().any(|g| !g.is_finite()) {
                tell(v1::from_worker::Kind::Diverged(self.blame(step, node, &weights)))?;
                continue;
            }
            // Before the last push: the next step's weights come into this memory.
            drop(weights);
            let send = |kind| push.blocking_send(v1::PushPart { kind: Some(kind) }).ok().context("the push ended");
            let header = v1::NodeHeader { step, generation, node: Some(wire::to_wire(node)), loss, weight, samples };
            send(v1::push_part::Kind::Node(header))?;
            let layout = self.model.layout();
            for index in (0..layout.chunks()).rev() {
                let values = wire::encode_values(&self.gradient[layout.chunk(index)]);
                send(v1::push_part::Kind::Chunk(v1::GradientChunk {
                    index: index as u32,
                    crc: wire::crc(&values),
                    values,
                }))?;
            }
        }
        Ok(())
    }
}
