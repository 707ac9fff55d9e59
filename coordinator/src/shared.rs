//! What service, broadcast and driver share: the run's fixed parts, its members, and what their messages are checked against.

use crate::door::Door;
use crate::lock;
use crate::measure::Measure;
use crate::saves::Saved;
use crate::store::{Applied, Store};
use crate::{Member, Progress};
use anyhow::{Result, anyhow};
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};
use tokio::sync::{mpsc, watch};
use tonic::Status;
use unisono_common::data::partition::Partitions;
use unisono_common::data::{Opened, Prepared};
use unisono_common::ids::{Step, WorkerId};
use unisono_common::job::Job;
use unisono_common::loss::LossSums;
use unisono_common::protocol::{Event, Kind, Machine};
use unisono_common::tree::Node;
use unisono_proto::shm::{Lane, SlotSize, door, frame::Header, memory::BellMemory};
use unisono_proto::{self as wire, WireError, v1};

/// Sends messages to one worker's session.
pub type ToWorker = mpsc::UnboundedSender<Result<v1::ToWorker, Status>>;

/// What the driver reacts to.
pub enum Input {
    Join {
        worker: WorkerId,
        threads: u32,
        name: String,
        /// The instruction set that it computes with.
        isa: String,
        to_worker: ToWorker,
        /// Where it pushes by shared memory.
        lane: Option<Arc<Lane>>,
    },
    Left {
        worker: WorkerId,
    },
    /// Its pushes ended, or were refused.
    Broken {
        worker: WorkerId,
        why: String,
    },
    EvalDone {
        worker: WorkerId,
        step: Step,
        node: Node,
        sums: Vec<f64>,
        counts: Vec<u64>,
    },
    Diverged {
        worker: WorkerId,
        step: Step,
        node: Node,
        tensor: String,
    },
    Applied(Applied),
    /// Somebody at the keyboard wants the run to end.
    Interrupted,
    /// Nobody waits for the run's end any more.
    Abandoned,
    Drain {
        worker: WorkerId,
    },
    Stop,
    /// A checkpoint's path, and the digest of its weights.
    Saved(Result<Saved>),
}

/// Samples that workers evaluate at once.
const EVAL_ROWS: usize = 256;

/// What proves that a stream is a member's.
pub type Token = [u8; door::SECRET];

/// What waits for the driver, and the bell that wakes it; workers ring the same bell from their lanes.
pub struct Inbox {
    inputs: Mutex<VecDeque<Input>>,
    pub bell: BellMemory,
}

impl Inbox {
    /// An empty one.
    ///
    /// # Errors
    /// Where the system has no memory to give.
    pub fn new() -> std::io::Result<Inbox> {
        Ok(Inbox { inputs: Mutex::default(), bell: BellMemory::create()? })
    }

    /// Puts an input in, and wakes the driver.
    pub fn put(&self, input: Input) {
        lock(&self.inputs).push_back(input);
        self.bell.bell().ring();
    }

    /// The oldest input.
    pub fn take(&self) -> Option<Input> {
        lock(&self.inputs).pop_front()
    }
}

/// A session, from its Join to its end.
#[derive(Clone)]
pub(crate) struct Session {
    worker: WorkerId,
    /// Whether it has given a sign of life; the other end is dropped with the session.
    is_in: watch::Receiver<bool>,
    /// It reads one partition at a time.
    pub reading: Arc<tokio::sync::Mutex<()>>,
}

/// What service and driver share.
pub struct Shared {
    pub job: Job,
    pub prepared: Prepared,
    pub fingerprint: [u8; 32],
    /// Of all that is learnt: names, shapes, roles.
    pub model_digest: [u8; 32],
    pub store: Store,
    pub heartbeat_ms: u32,
    pub(crate) opened: Opened,
    pub(crate) train_parts: Partitions,
    pub(crate) test_parts: Option<Partitions>,
    pub(crate) machine: Mutex<Machine>,
    pub(crate) inbox: Arc<Inbox>,
    /// Where a part of the run is measured.
    pub(crate) measure: Option<Measure>,
    /// What this coordinator offers to workers of its host.
    pub(crate) door: Option<Door>,
    pub(crate) next_id: AtomicU64,
    pub(crate) names: Mutex<BTreeMap<WorkerId, Arc<str>>>,
    pub(crate) tokens: Mutex<BTreeMap<Token, Session>>,
    /// Turns to encode and send a partition.
    pub(crate) encoding: Arc<tokio::sync::Semaphore>,
    pub(crate) progress: watch::Sender<Progress>,
}

impl Shared {
    pub(crate) fn input(&self, input: Input) {
        self.inbox.put(input);
    }

    /// A new member's id, what will prove that it is that member, and what is told its first sign of life.
    pub(crate) fn enter(&self) -> Result<(WorkerId, Token, watch::Sender<bool>)> {
        let mut token = Token::default();
        getrandom::fill(&mut token).map_err(|e| anyhow!("this machine gives no random numbers: {e}"))?;
        let worker = WorkerId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (comes_in, is_in) = watch::channel(false);
        lock(&self.tokens).insert(token, Session { worker, is_in, reading: Arc::default() });
        Ok((worker, token, comes_in))
    }

    /// Forgets a member: its streams are nobody's from now on.
    pub(crate) fn leave(&self, worker: WorkerId) {
        lock(&self.tokens).retain(|_, session| session.worker != worker);
        lock(&self.names).remove(&worker);
    }

    /// A member, for people: its number, and its name.
    pub(crate) fn called(&self, worker: WorkerId) -> String {
        let name = lock(&self.names).get(&worker).map(|name| format!(" ({name})"));
        format!("worker {worker}{}", name.unwrap_or_default())
    }

    /// Whether it has entered, and was not sent away since.
    pub(crate) fn is_member(&self, worker: WorkerId) -> bool {
        lock(&self.tokens).values().any(|session| session.worker == worker)
    }

    /// The session that this proves.
    pub(crate) fn session(&self, proof: &[u8]) -> Result<Session, Status> {
        let known = Token::try_from(proof).ok().and_then(|token| lock(&self.tokens).get(&token).cloned());
        known.ok_or_else(|| Status::not_found("there is no such session: join first"))
    }

    /// The member whose session this is.
    pub(crate) fn member(&self, proof: &[u8]) -> Result<WorkerId, Status> {
        self.session(proof).map(|session| session.worker)
    }

    /// The same, when it has given its first sign of life, which may be on its way by another connection.
    pub(crate) async fn member_in(&self, proof: &[u8]) -> Result<WorkerId, Status> {
        let Session { worker, mut is_in, .. } = self.session(proof)?;
        let over = |_| Status::not_found("the session ended before its first sign of life: join again");
        is_in.wait_for(|is_in| *is_in).await.map_err(over)?;
        Ok(worker)
    }

    /// Checks a node's header as far as it can be without knowing whose it is.
    pub(crate) fn check_header(&self, header: &Header) -> Result<(Step, Node, LossSums), WireError> {
        let (node, sums) = (wire::checked(header.node, self.job.train.partitions)?, header.sums);
        let most = node.len() as u64 * self.job.train.micro_batch as u64;
        if !(sums.loss.is_finite() && sums.weight.is_finite() && sums.weight >= 0.0) || sums.samples > most {
            return Err(WireError::Range { field: "loss, weight or samples", value: format!("{sums:?}") });
        }
        if header.generation > lock(&self.machine).generation().0 {
            return Err(WireError::Range { field: "generation", value: header.generation.to_string() });
        }
        Ok((Step(header.step), node, sums))
    }

    /// Checks that a node has just the samples that its partitions give to a step.
    pub(crate) fn check_samples(&self, step: Step, node: Node, samples: u64) -> Result<(), WireError> {
        let (parts, micro_batch) = (&self.train_parts, self.job.train.micro_batch);
        let in_epoch = step.0 % parts.steps_per_epoch(micro_batch) as u64;
        let want: usize = (node.lo..node.hi).map(|p| parts.batch(p, in_epoch, micro_batch).len()).sum();
        if samples != want as u64 {
            return Err(WireError::Range { field: "samples", value: format!("{samples}, not {want}") });
        }
        Ok(())
    }

    /// What a worker's slots have room for.
    pub(crate) fn slots(&self) -> SlotSize {
        let len = self.store.layout().len();
        match &self.store.tables {
            Some(tables) => {
                let (rows, width) = (self.prepared.rows_of_a_step(&self.job.train), tables.layout().width());
                SlotSize { len, rows, width }
            }
            None => SlotSize::dense(len),
        }
    }

    /// Rows of sparse tables that a worker asks for at once, at most.
    pub(crate) fn most_rows(&self) -> usize {
        let of_a_test = EVAL_ROWS.max(self.prepared.rows_of_a_sample(true));
        self.slots().rows.max(of_a_test * self.prepared.id_fields())
    }

    /// A sign of life.
    pub(crate) fn heard(&self, worker: WorkerId, now: Instant) {
        lock(&self.machine).handle(now, Event::Heartbeat { worker });
    }

    /// All of a node that was owed has come. Nothing follows from it, so the driver sleeps on.
    pub(crate) fn done(&self, worker: WorkerId, step: Step, node: Node) {
        let done = Event::NodeDone { worker, step, kind: Kind::Train, node };
        let commands = lock(&self.machine).handle(Instant::now(), done);
        debug_assert!(commands.is_empty(), "{commands:?}");
    }

    pub(crate) fn owes(&self, worker: WorkerId, step: Step, kind: Kind, node: Node) -> bool {
        lock(&self.machine).owes(worker, step, kind, node)
    }

    /// One partition's samples, encoded.
    pub(crate) fn partition_bytes(&self, partition: u32, test: bool) -> Bytes {
        let (set, parts) = match (test, &self.opened.test, &self.test_parts) {
            (true, Some(set), Some(parts)) => (set, parts),
            (true, _, _) => return Bytes::new(),
            (false, _, _) => (&self.opened.train, &self.train_parts),
        };
        let rows: Vec<usize> = (0..parts.len(partition)).map(|i| parts.sample(partition, i)).collect();
        set.select(&rows).to_bytes().into()
    }

    pub(crate) fn members(&self, now: Instant) -> Vec<Member> {
        let names = lock(&self.names);
        let member = |(id, threads, partitions, heard): (WorkerId, u32, u32, Instant)| Member {
            id: id.0,
            name: names.get(&id).cloned().unwrap_or_default(),
            threads,
            partitions,
            silent: now.saturating_duration_since(heard),
        };
        lock(&self.machine).members().map(member).collect()
    }

    pub(crate) fn status(&self, now: Instant) -> v1::StatusReply {
        let p = self.progress.borrow().clone();
        let workers = self
            .members(now)
            .into_iter()
            .enumerate()
            .map(|(rank, m)| v1::WorkerStatus {
                worker_id: m.id,
                rank: rank as u32,
                name: m.name.to_string(),
                threads: m.threads,
                partitions: m.partitions,
                silent_ms: m.silent.as_millis() as u64,
            })
            .collect();
        v1::StatusReply {
            job: self.job.name.clone(),
            step: p.step,
            total_steps: p.total_steps,
            epoch: p.epoch,
            loss: p.loss,
            samples_per_second: p.samples_per_second,
            workers,
            version: wire::VERSION.into(),
            fingerprint: self.fingerprint.to_vec().into(),
            unix_ms: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_millis() as u64),
        }
    }
}
