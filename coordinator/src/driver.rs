//! The driver: one thread that feeds the protocol's machine and carries out its commands.
//!
//! It sleeps on one bell, which rings for whatever comes by gRPC and for what workers of this host put into their lanes, so
//! that a step over shared memory costs one wake on each side.

use crate::lanes::LaneEnd;
use crate::lock;
use crate::measure::Measure;
use crate::pace::Pace;
use crate::saves::{Learning, Saves};
use crate::shared::{Input, Shared, ToWorker};
use crate::store::Applied;
use crate::sum::Gradient;
use crate::{Progress, Summary};
use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use unisono_common::data::partition::Partitions;
use unisono_common::ids::WorkerId;
use unisono_common::job::ScheduleKind;
use unisono_common::metrics::{EvalKind, EvalSummary, EvalSums};
use unisono_common::protocol::{Command, Event, Kind, Reason};
use unisono_common::schedule;
use unisono_common::tree::{Offer, Open};
use unisono_proto::v1;

/// How often silence and lateness are looked for.
const TICK: Duration = Duration::from_millis(100);

/// How often a log line says where the run stands.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// The least time between two log lines that say what a test gave, but for the first and the last.
const TESTS_EVERY: Duration = Duration::from_secs(1);

pub(crate) struct Driver {
    pub shared: Arc<Shared>,
    pub learning: Learning,
    pub total_steps: u64,
    pub steps_per_epoch: u64,
    pub eval_kind: EvalKind,
    pub sessions: BTreeMap<WorkerId, ToWorker>,
    /// Of the sessions, those that share memory with this process.
    pub lanes: BTreeMap<WorkerId, LaneEnd>,
    /// Whether any worker used shared memory, and gRPC.
    pub transports: [bool; 2],
    /// The instruction sets of all workers.
    pub isas: BTreeSet<String>,
    pub evals: Open<EvalSums>,
    pub saves: Saves,
    pub stop: bool,
    /// Whether it stops because this process is to end, and whether somebody goes on with the run then.
    pub interrupted: bool,
    pub is_resumed: bool,
    /// Whether the first step of a measurement is not open yet.
    pub waiting: bool,
    pub started: Instant,
    pub pace: Pace,
    /// When the last log line said where the run stands, and when one said what a test gave.
    pub said: Instant,
    pub tested: Option<Instant>,
    pub joined: u64,
    pub most_workers: usize,
    pub finishing: bool,
}

impl Driver {
    /// Runs until the job is done, on the calling thread.
    pub(crate) fn run(mut self) -> Result<Summary> {
        let ended = self.serve();
        if let Err(e) = &ended {
            self.dismiss(&v1::Goodbye { reason: format!("the run failed: {e:#}"), rejoin: false });
            self.settle();
        }
        ended
    }

    fn serve(&mut self) -> Result<Summary> {
        if self.shared.test_parts.is_some() && self.is_evaluation_owed() {
            self.evaluate();
        } else {
            self.next()?;
        }
        let mut tick = Instant::now();
        loop {
            if let Some(input) = self.wait(Some(tick))
                && let Some(summary) = self.take(input)?
            {
                return Ok(summary);
            }
            if Instant::now() >= tick {
                tick = Instant::now() + TICK;
                self.machine(Event::Tick);
                self.report();
                self.stop_alone()?;
            }
        }
    }

    /// The next input, or nothing at `until`; what comes through lanes is taken meanwhile.
    fn wait(&mut self, until: Option<Instant>) -> Option<Input> {
        let shared = self.shared.clone();
        let bell = shared.inbox.bell.bell();
        loop {
            let heard = bell.listen();
            if let Some(input) = shared.inbox.take() {
                return Some(input);
            }
            if self.take_lanes() {
                continue;
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            bell.sleep(heard, left);
        }
    }

    /// Takes what workers of this host have reported; false where that is nothing.
    fn take_lanes(&mut self) -> bool {
        let (mut any, mut ready) = (false, Vec::new());
        for (&worker, lane) in &mut self.lanes {
            match lane.take(&self.shared, &mut ready) {
                Ok(some) => any |= some,
                Err(e) => self.shared.input(Input::Broken { worker, why: e.to_string() }),
            }
        }
        // The first is done here, which for a small model is the whole step; the others beside it. Weights that workers look for in
        // order change in that order.
        let mut ready = ready.into_iter();
        let first = ready.next();
        for (chunk, part) in ready {
            let shared = self.shared.clone();
            self.shared.store.pool.spawn(move || chunk.accept(&shared, Gradient::Slot(part)));
        }
        if let Some((chunk, part)) = first {
            chunk.accept(&self.shared, Gradient::Slot(part));
        }
        any
    }

    /// Ends a run that is to stop and has no worker to finish its step, from where the step began. A step that has begun to
    /// change the weights waits for a worker: there is no way back from it.
    fn stop_alone(&mut self) -> Result<()> {
        let alone = self.stop && !self.finishing && self.sessions.is_empty();
        if alone && self.shared.store.is_at(self.learning.step) {
            self.finishing = true;
            self.save()?;
        }
        Ok(())
    }

    fn machine(&mut self, event: Event) {
        let commands = lock(&self.shared.machine).handle(Instant::now(), event);
        for command in commands {
            self.command(command);
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Work { worker, step, generation, kind, nodes } => {
                if let Some(measure) = &self.shared.measure {
                    measure.ordered(worker, Instant::now(), nodes.iter().map(|node| node.len()).sum());
                }
                if let Some(lane) = self.lanes.get_mut(&worker) {
                    if !lane.order(&self.shared, step, generation, kind, &nodes) {
                        self.shared.input(Input::Broken { worker, why: "it does not take its orders".into() });
                    }
                    return;
                }
                let work = v1::Work {
                    step: step.0,
                    generation: generation.0,
                    nodes: nodes.into_iter().map(unisono_proto::to_wire).collect(),
                    evaluate: kind == Kind::Evaluate,
                };
                self.tell(worker, v1::to_worker::Kind::Work(work));
            }
            Command::Evict { worker, reason } => {
                let rejoin = reason != Reason::Drained;
                if rejoin {
                    tracing::warn!("{} is out: {reason}", self.shared.called(worker));
                } else {
                    tracing::info!("{} is drained", self.shared.called(worker));
                }
                let goodbye = v1::Goodbye { reason: reason.to_string(), rejoin };
                self.part(worker, goodbye);
            }
            Command::Reissued { partitions, .. } => tracing::debug!("{partitions} partitions are leased anew"),
            Command::WaitingForWorkers { missing } => tracing::info!("waiting for workers: {missing} partitions to do"),
        }
    }

    fn part(&mut self, worker: WorkerId, goodbye: v1::Goodbye) {
        // Who hears of it is out already: nothing that it sends then is taken.
        self.shared.leave(worker);
        self.tell(worker, v1::to_worker::Kind::Goodbye(goodbye));
        self.forget(worker);
    }

    /// Lets go of a worker's session and lane; false where it has none.
    fn forget(&mut self, worker: WorkerId) -> bool {
        self.lanes.remove(&worker);
        self.share_cores();
        self.sessions.remove(&worker).is_some()
    }

    /// Tells the store who computes beside it.
    fn share_cores(&self) {
        *lock(&self.shared.store.beside) = self.lanes.values().map(LaneEnd::beside).collect();
    }

    fn tell(&self, worker: WorkerId, kind: v1::to_worker::Kind) {
        if let Some(session) = self.sessions.get(&worker) {
            session.send(Ok(v1::ToWorker { kind: Some(kind) })).ok();
        }
    }

    fn take(&mut self, input: Input) -> Result<Option<Summary>> {
        match input {
            // The run ends where its last checkpoint is; what comes now is too late.
            Input::Applied(_) | Input::Diverged { .. } if self.finishing => {}
            Input::Join { worker, to_worker, .. } if self.finishing || !self.shared.is_member(worker) => {
                let refused =
                    || v1::Goodbye { reason: "what it sent before it joined was refused".into(), rejoin: true };
                let goodbye = if self.finishing { self.goodbye() } else { refused() };
                to_worker.send(Ok(v1::ToWorker { kind: Some(v1::to_worker::Kind::Goodbye(goodbye)) })).ok();
            }
            Input::Join { worker, threads, name, isa, to_worker, lane } => {
                if self.sessions.is_empty() {
                    self.pace.begin(Instant::now());
                }
                let by = if lane.is_some() { "shared memory" } else { "gRPC" };
                tracing::info!("worker {worker} ({name}, {threads} threads, {isa}) joined by {by}");
                self.isas.insert(isa);
                if let Some(lane) = lane {
                    self.lanes.insert(worker, LaneEnd::new(worker, threads, lane, &self.shared));
                    self.share_cores();
                    self.transports[0] = true;
                } else {
                    self.transports[1] = true;
                }
                if let Some(measure) = &self.shared.measure {
                    measure.joined(worker, &name);
                }
                lock(&self.shared.names).insert(worker, name.into());
                self.sessions.insert(worker, to_worker);
                self.joined += 1;
                self.machine(Event::Joined { worker, threads });
                self.most_workers = self.most_workers.max(self.sessions.len());
                self.report(); // the run may be over before the next tick
                if self.waiting {
                    self.next()?;
                }
            }
            Input::Left { worker } => {
                if self.forget(worker) {
                    tracing::warn!("{} left", self.shared.called(worker));
                }
                self.shared.leave(worker); // its join may not have been taken yet
                self.machine(Event::Disconnected { worker });
            }
            Input::Broken { worker, why } => {
                if self.sessions.contains_key(&worker) {
                    tracing::warn!("{} is out: {why}", self.shared.called(worker));
                    self.part(worker, v1::Goodbye { reason: why, rejoin: true });
                } else {
                    self.shared.leave(worker); // its join may not have been taken yet
                }
                self.machine(Event::Disconnected { worker });
            }
            Input::EvalDone { worker, step, node, sums, counts } => {
                if !self.shared.owes(worker, step, Kind::Evaluate, node) {
                    return Ok(None);
                }
                let samples = |parts: &Partitions| (node.lo..node.hi).map(|p| parts.len(p) as u64).sum::<u64>();
                let each = self.shared.prepared.targets() as u64;
                let want = each * self.shared.test_parts.as_ref().map_or(0, samples);
                let sums = EvalSums::from_parts(self.eval_kind, &sums, &counts).filter(|sums| sums.targets() == want);
                let Some(sums) = sums else {
                    let why = "its evaluation sums are not those of its partitions".into();
                    return self.take(Input::Broken { worker, why });
                };
                self.machine(Event::NodeDone { worker, step, kind: Kind::Evaluate, node });
                if self.evals.offer(node, sums, EvalSums::merge) == Offer::Complete {
                    let sums = self.evals.take_root().context("a complete tree has a root")?;
                    self.machine(Event::RoundApplied);
                    self.evaluated(sums.summary())?;
                }
            }
            Input::Diverged { worker, step, node, tensor } => {
                let partition = match node.len() {
                    1 => format!("partition {}", node.lo),
                    _ => format!("partitions {} to {}", node.lo, node.hi - 1),
                };
                if step == self.learning.step && lock(&self.shared.machine).is_busy(worker, step) {
                    bail!(
                        "step {step} diverged: `{tensor}` is not finite in {partition}; try a smaller \
                         learning rate or `clip_norm`. {}",
                        self.kept()
                    );
                }
            }
            Input::Applied(Applied::Diverged { step, tensor }) => {
                bail!(
                    "step {step} diverged: `{tensor}` is not finite after the update; try a smaller learning rate or \
                     `clip_norm`. {}",
                    self.kept()
                );
            }
            Input::Applied(Applied::Full { step, why }) => bail!("step {step}: {why}. {}", self.kept()),
            Input::Applied(Applied::Done { step, sums }) => {
                self.machine(Event::RoundApplied);
                let now = Instant::now();
                self.pace.commit(now, sums.samples);
                let measure = self.shared.measure.as_ref();
                let turned = measure
                    .is_some_and(|measure| measure.commit(now, sums.samples, self.sessions.len(), &self.shared.store));
                if measure.is_some_and(|measure| measure.is_over(now)) {
                    self.total_steps = step.next().0;
                }
                self.learning.step = step.next();
                self.learning.samples += sums.samples;
                self.learning.train_loss = sums.loss / sums.weight.max(f64::MIN_POSITIVE);
                if turned {
                    self.report();
                }
                let step = self.learning.step.0;
                if self.shared.test_parts.is_some() && (self.is_evaluation_due(step) || self.stop) {
                    self.evaluate();
                } else {
                    self.after_step()?;
                }
            }
            Input::Drain { worker } => self.machine(Event::Drain { worker }),
            Input::Stop => self.stop = true,
            Input::Interrupted => {
                self.interrupted = true;
                if !std::mem::replace(&mut self.stop, true) {
                    let step = if self.sessions.is_empty() { "" } else { " after this step" };
                    tracing::warn!("stopping{step}; Ctrl-C once more ends at once");
                }
                self.stop_alone()?;
            }
            Input::Abandoned => bail!("the run was given up"),
            Input::Saved(result) => {
                match self.saves.ended(result) {
                    Err(e) if self.finishing && !self.saves.is_due() => return Err(e),
                    Err(e) => tracing::error!("no checkpoint was written: {e:#}; training goes on"),
                    Ok(()) => {}
                }
                if self.finishing && self.saves.is_due() {
                    self.save()?;
                } else if self.finishing {
                    return self.finish().map(Some);
                }
            }
        }
        Ok(None)
    }

    /// Waits for the checkpoint that is being written: nothing half-written stays when a run fails.
    fn settle(&mut self) {
        while self.saves.is_writing() {
            let Some(Input::Saved(result)) = self.wait(None) else { continue };
            if let Err(e) = self.saves.ended(result) {
                tracing::error!("no checkpoint was written: {e:#}");
            }
        }
    }

    /// Where a run that fails can be gone on with.
    fn kept(&mut self) -> String {
        self.settle();
        match self.saves.last() {
            Some((path, _)) => format!("The last good checkpoint is {}", path.display()),
            None => "There is no checkpoint yet".into(),
        }
    }

    fn is_evaluation_due(&self, step: u64) -> bool {
        let every = self.shared.job.train.eval_every.unwrap_or(self.steps_per_epoch);
        step.is_multiple_of(every) || step >= self.total_steps
    }

    /// Whether the run was stopped after a step, but before the evaluation that was due after it.
    fn is_evaluation_owed(&self) -> bool {
        let step = self.learning.step.0;
        step > 0 && self.is_evaluation_due(step) && self.learning.evaluated != Some(step)
    }

    /// Opens an evaluation of the weights, or of their average where there is one.
    fn evaluate(&mut self) {
        if self.shared.job.train.ema.is_some() {
            self.shared.store.show_average();
        }
        self.machine(Event::Open { step: self.learning.step, kind: Kind::Evaluate });
    }

    fn evaluated(&mut self, eval: EvalSummary) -> Result<()> {
        let job = &self.shared.job;
        // An evaluation because of a stop must not change what a resumed run does.
        let due = self.is_evaluation_due(self.learning.step.0);
        if due {
            self.learning.evaluated = Some(self.learning.step.0);
            self.saves.outdated();
        }
        if due
            && let ScheduleKind::Plateau { metric, .. } = job.train.schedule.kind
            && let Some(value) = eval.get(metric)
        {
            self.learning.plateau.observe(&job.train.schedule.kind, value);
        }
        let early = job.train.early_stopping.as_ref().filter(|early| {
            due && eval.get(early.metric).is_some_and(|value| self.learning.early.observe(early, value))
        });
        if early.is_some() {
            self.total_steps = self.learning.step.0;
        }
        let is_last = self.stop || self.learning.step.0 >= self.total_steps;
        if is_last || self.tested.is_none_or(|tested| tested.elapsed() >= TESTS_EVERY) {
            self.tested = Some(Instant::now());
            tracing::info!("step {}: test {}", self.learning.step, eval);
        } else {
            tracing::debug!("step {}: test {}", self.learning.step, eval);
        }
        if let Some(early) = early {
            let (metric, patience) = (early.metric.name(), early.patience);
            tracing::info!("{metric} has not improved for more than {patience} evaluations: stopping");
        }
        self.learning.eval = Some(eval);
        self.after_step()
    }

    fn after_step(&mut self) -> Result<()> {
        let step = self.learning.step.0;
        if step >= self.total_steps || self.stop {
            self.finishing = true;
            return self.save();
        }
        let every = self.shared.job.checkpoint.every_steps;
        if self.saves.is_due() || every > 0 && step.is_multiple_of(every) {
            self.save()?;
        }
        self.next()
    }

    /// Opens the next training step, or ends where there is none. The first one of a measurement waits for its workers.
    fn next(&mut self) -> Result<()> {
        let step = self.learning.step;
        let waits = |measure: &Measure| self.pace.is_new() && measure.waits(self.sessions.len());
        self.waiting = self.shared.measure.as_ref().is_some_and(waits);
        if self.waiting {
            return Ok(());
        }
        if step.0 >= self.total_steps {
            self.finishing = true;
            return self.save();
        }
        let train = &self.shared.job.train;
        let factor = schedule::factor(&train.schedule, step.0, self.total_steps) * self.learning.plateau.factor;
        self.shared.store.begin(factor);
        self.pace.open(Instant::now());
        self.machine(Event::Open { step, kind: Kind::Train });
        Ok(())
    }

    /// Shows where the run stands, and says so now and then.
    fn report(&mut self) {
        let learning = &self.learning;
        self.shared.progress.send_replace(Progress {
            step: learning.step.0,
            total_steps: self.total_steps,
            epoch: learning.step.0 / self.steps_per_epoch,
            loss: learning.train_loss,
            samples_per_second: self.pace.recent(),
            measuring: self.shared.measure.as_ref().is_some_and(Measure::is_open),
            workers: self.shared.members(Instant::now()),
            eval: learning.eval.clone(),
        });
        if self.said.elapsed() > SAY_EVERY && learning.step.0 > 0 {
            self.said = Instant::now();
            tracing::info!(
                "step {} of {}, epoch {}, loss {:.4}, {:.0} samples/s, {} workers",
                learning.step,
                self.total_steps,
                learning.step.0 / self.steps_per_epoch,
                learning.train_loss,
                self.pace.recent(),
                self.sessions.len()
            );
        }
    }

    /// Writes a checkpoint beside training. Called between steps only.
    fn save(&mut self) -> Result<()> {
        let epoch = self.learning.step.0 / self.steps_per_epoch;
        if !self.saves.begin(&self.shared, &self.learning, epoch) {
            // What a worker had sent before it left is being applied: the step must be finished, by whoever comes.
            ensure!(self.finishing, "a step was open when a checkpoint was due");
            self.finishing = false;
        }
        Ok(())
    }

    /// What workers are told at the end. Those of an interrupted run wait for who goes on with it.
    fn goodbye(&self) -> v1::Goodbye {
        if self.interrupted && self.is_resumed && self.learning.step.0 < self.total_steps {
            v1::Goodbye { reason: "the coordinator was interrupted".into(), rejoin: true }
        } else {
            v1::Goodbye { reason: "the run is over".into(), rejoin: false }
        }
    }

    /// Sends all workers away.
    fn dismiss(&self, goodbye: &v1::Goodbye) {
        for &worker in self.sessions.keys() {
            self.tell(worker, v1::to_worker::Kind::Goodbye(goodbye.clone()));
        }
    }

    fn finish(&mut self) -> Result<Summary> {
        self.dismiss(&self.goodbye());
        let shared = &self.shared;
        let layout = shared.store.layout();
        let (reissued, lost) = lock(&shared.machine).losses();
        let step = self.learning.step.0;
        let (path, digest) = self.saves.last().context("the last checkpoint was not written")?;
        Ok(Summary {
            job: shared.job.name.clone(),
            status: if step >= self.total_steps { "done" } else { "stopped" }.into(),
            steps: step,
            epochs: step / self.steps_per_epoch,
            samples: self.learning.samples,
            parameters: layout.trainable(),
            partitions: shared.job.train.partitions,
            workers: self.most_workers,
            transport: match self.transports {
                [true, true] => "shm+grpc",
                [true, false] => "shm",
                [false, _] => "grpc",
            }
            .into(),
            isa: self.isas.iter().map(String::as_str).collect::<Vec<_>>().join("+"),
            wall_seconds: self.started.elapsed().as_secs_f64(),
            train_seconds: self.pace.train_seconds(),
            samples_per_second: self.pace.rate(),
            step_ms: self.pace.quantile(0.5).zip(self.pace.quantile(0.99)).map(|(p50, p99)| crate::StepMs { p50, p99 }),
            train_loss: (step > 0).then_some(self.learning.train_loss),
            eval: self.learning.eval.clone(),
            weights_digest: digest.clone(),
            checkpoint: path.display().to_string(),
            bytes_pushed: shared.store.bytes_pushed.load(Ordering::Relaxed),
            bytes_pulled: shared.store.bytes_pulled.load(Ordering::Relaxed),
            workers_joined: self.joined,
            workers_lost: lost,
            partitions_reissued: reissued,
            skipped: shared.opened.skipped.as_ref().map(|skipped| skipped.samples),
            measured: shared.measure.as_ref().and_then(Measure::measured),
        })
    }
}
