//! The compute thread: weights in, gradient sums out. It knows nothing of the network but the channels it is given.

use anyhow::{Context, Result};
use std::sync::Arc;
use tokio::sync::mpsc;
use unisono_common::data::partition::{Feeder, Partitions};
use unisono_common::data::{Batch, Opened};
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

/// One order: these nodes, with these weights.
pub struct Order {
    pub step: u64,
    pub generation: u64,
    pub nodes: Vec<Node>,
    pub evaluate: bool,
    pub weights: Arc<Vec<f32>>,
}

/// Everything that a worker computes with.
pub struct Compute {
    job: Job,
    opened: Opened,
    model: Arc<Model>,
    loss: Loss,
    eval_kind: EvalKind,
    feeder: Feeder,
    test_parts: Option<Partitions>,
    workspace: Option<(usize, Workspace)>,
    batch: Batch,
    gradient: Vec<f32>,
}

impl Compute {
    /// Plans the work of `job` on data that was read already.
    pub fn new(job: Job, opened: Opened, model: Arc<Model>) -> Result<Compute> {
        let p = job.train.partitions;
        let parts = Partitions::new(opened.train.samples(), p, job.data.hashed.then_some(job.seed))?;
        let test_parts = match &opened.test {
            Some(test) => Some(Partitions::new(test.samples(), p, None)?),
            None => None,
        };
        let feeder = Feeder::new(parts, job.seed, job.train.micro_batch);
        let loss = Loss::new(&job.train.loss, model.outputs())?;
        let eval_kind = EvalKind::of(model.outputs(), opened.prepared.classes.as_ref().map(|c| c.len()));
        Ok(Compute {
            gradient: vec![0.0; model.layout().len()],
            batch: Batch::empty(),
            workspace: None,
            job,
            opened,
            model,
            loss,
            eval_kind,
            feeder,
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
            let rows = self.feeder.indices(step, partition);
            self.batch.fill(&self.opened.train, &self.opened.prepared, rows.iter().map(|&i| i as usize), true);
            segments.starts.push(self.batch.samples);
        }
        let rows = (node.len() as usize * self.job.train.micro_batch).max(EVAL_ROWS);
        self.workspace(rows);
        let (_, workspace) = self.workspace.as_mut().expect("planned above");
        let key = Key::new(self.job.seed, Purpose::Dropout).with(step);
        let (model, loss, batch) = (&self.model, &self.loss, &self.batch);
        train::gradient(model, loss, weights, batch, &segments, key, workspace, &mut self.gradient)
    }

    /// The evaluation sums of one node, partition by partition.
    fn evaluate(&mut self, node: Node, weights: &[f32]) -> EvalSums {
        if let Some((left, right)) = node.children() {
            return self.evaluate(left, weights).merge(self.evaluate(right, weights));
        }
        let mut sums = EvalSums::new(self.eval_kind);
        let (Some(test), Some(parts)) = (&self.opened.test, &self.test_parts) else { return sums };
        let rows: Vec<usize> = (0..parts.len(node.lo)).map(|i| parts.sample(node.lo, i)).collect();
        let test = test.select(&rows);
        self.workspace(EVAL_ROWS);
        for at in (0..rows.len()).step_by(EVAL_ROWS) {
            self.batch.clear();
            let until = (at + EVAL_ROWS).min(rows.len());
            self.batch.fill(&test, &self.opened.prepared, at..until, true);
            let (_, workspace) = self.workspace.as_mut().expect("planned above");
            let logits = train::evaluate(&self.model, &self.loss, weights, &self.batch, workspace);
            sums.add_batch(&self.loss, logits, &self.batch.targets, until - at, self.model.outputs());
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
        for order in orders {
            for node in order.nodes {
                if order.evaluate {
                    let (sums, counts) = self.evaluate(node, &order.weights).to_parts();
                    let done =
                        v1::EvalDone { step: order.step, node: Some(wire::to_wire(node)), sums, counts };
                    let message = v1::FromWorker { kind: Some(v1::from_worker::Kind::EvalDone(done)) };
                    session.send(message).ok().context("the session ended")?;
                    continue;
                }
                let sums = self.gradient(order.step, node, &order.weights);
                if !sums.loss.is_finite() || self.gradient.iter().any(|g| !g.is_finite()) {
                    let diverged = self.blame(order.step, node, &order.weights);
                    let message = v1::FromWorker { kind: Some(v1::from_worker::Kind::Diverged(diverged)) };
                    session.send(message).ok().context("the session ended")?;
                    continue;
                }
                let header = v1::NodeHeader {
                    step: order.step,
                    generation: order.generation,
                    node: Some(wire::to_wire(node)),
                    loss: sums.loss,
                    weight: sums.weight,
                    samples: sums.samples,
                };
                let part = |kind| v1::PushPart { kind: Some(kind) };
                push.blocking_send(part(v1::push_part::Kind::Node(header))).ok().context("the push ended")?;
                let layout = self.model.layout();
                for index in (0..layout.chunks()).rev() {
                    let values = wire::encode_values(&self.gradient[layout.chunk(index)]);
                    let chunk = v1::GradientChunk { index: index as u32, crc: wire::crc(&values), values };
                    push.blocking_send(part(v1::push_part::Kind::Chunk(chunk))).ok().context("the push ended")?;
                }
            }
        }
        Ok(())
    }
}
