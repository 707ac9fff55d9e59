//! A run in virtual time: the coordinator's own machine, over a model of hosts, links, stragglers and failures.

use super::resource::{Resource, Timers};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};
use unisono_common::ids::{Step, WorkerId};
use unisono_common::layout::CHUNK;
use unisono_common::protocol::{Command, Event, Kind, Machine, Patience};
use unisono_common::rng::{Key, Purpose};
use unisono_common::tree::Node;
use unisono_coordinator::workers_at_once;

/// Processor seconds that it takes to send bytes, or to take them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bytes {
    /// Of the coordinator and of the worker, for each byte.
    pub coordinator: f64,
    pub worker: f64,
}

/// What a step asks of everybody.
#[derive(Clone, Debug, PartialEq)]
pub struct Load {
    pub partitions: u32,
    /// Of a step.
    pub samples: f64,
    /// Bytes of the weights, and of a node's gradient.
    pub weights: f64,
    pub gradient: f64,
    /// Seconds that the gradient of one partition takes, at evenly spaced quantiles.
    pub compute: Vec<f64>,
    /// Whether that is work of a core of the worker's host, or time that passes.
    pub computes: bool,
    /// What moving a byte costs.
    pub bytes: Bytes,
    /// Processor seconds of the coordinator for a step, whatever the number of workers: the end of the sums, and the optimizer.
    pub update: f64,
    /// Seconds of a step that nothing above explains.
    pub rest: f64,
}

impl Load {
    /// The same with another number of partitions of the same size.
    pub fn with_partitions(&self, partitions: u32) -> Load {
        let samples = self.samples / self.partitions as f64 * partitions as f64;
        Load { partitions, samples, ..self.clone() }
    }
}

/// Now and then a worker takes longer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stragglers {
    /// How often, of a worker's steps.
    pub share: f64,
    /// How many times as long.
    pub factor: f64,
}

/// Now and then a worker dies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Failures {
    /// Seconds between two failures of one worker, in the mean.
    pub between: f64,
    /// Seconds until another takes its place.
    pub restart: f64,
}

/// Where it runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hosts {
    /// Cores of the coordinator's host.
    pub cores: f64,
    /// Whether the workers are on it as well; otherwise each has a host of its own.
    pub together: bool,
    /// Bytes a second of each host's link, each way; that of one host to itself is not looked at.
    pub link: f64,
    /// Seconds there and back.
    pub rtt: f64,
    pub stragglers: Option<Stragglers>,
    pub failures: Option<Failures>,
}

impl Hosts {
    /// One host for all.
    pub fn one(cores: f64) -> Hosts {
        let (link, rtt) = (f64::INFINITY, 0.0);
        Hosts { cores, together: true, link, rtt, stragglers: None, failures: None }
    }
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub samples_per_second: f64,
    /// Of each step that counts, in seconds, ascending.
    pub steps: Vec<f64>,
    /// How busy each was, of what it can do at most: the coordinator's cores, its link outwards and inwards.
    pub cores: f64,
    pub out: f64,
    pub inward: f64,
    /// The part of the time in which a worker computed, in the mean.
    pub computing: f64,
}

/// Steps that do not count.
const WARM: u64 = 2;

/// How often the machine looks at its clock.
const TICK: f64 = 0.1;

/// A node that a worker was asked for, in a step.
#[derive(Clone, Copy, Debug)]
struct Task {
    worker: WorkerId,
    step: u64,
    node: Node,
}

/// What ends, or happens.
#[derive(Debug)]
enum Happened {
    /// The coordinator has given the weights of a step to its link, they have left it, they are with a worker's host, and the worker
    /// has them.
    Sent(WorkerId, u64),
    Left(WorkerId, u64),
    Delivered(WorkerId, u64),
    Ready(WorkerId, u64),
    /// A worker has its order, the gradient, and has given that to its link.
    Ordered(Task),
    Computed(Task),
    Pushed(Task),
    /// The node reaches the coordinator's link, is with its host, and is added up.
    Coming(Task),
    Arrived(Task),
    Taken(Task),
    /// A thread's part of the update is done.
    Updated,
    /// The step is over.
    Committed,
    Fails(WorkerId),
    Joins,
    Tick,
}

/// What happens in one step at most for each worker and partition, before it is given up.
const PATIENCE: u64 = 10_000;

/// Runs so many steps; `None` where one does not come to its end, because no worker lives long enough for its share.
pub fn run(load: &Load, hosts: &Hosts, workers: u32, steps: u64, seed: u64) -> Option<Outcome> {
    let mut run = Run {
        load,
        hosts,
        key: Key::new(seed, Purpose::Synthetic).named("simulate"),
        machine: Machine::new(load.partitions, Patience::default()),
        began: Instant::now(),
        now: 0.0,
        timers: Timers::default(),
        cores: Resource::new(hosts.cores, 1.0),
        out: Resource::new(hosts.link, hosts.link),
        inward: Resource::new(hosts.link, hosts.link),
        members: BTreeMap::new(),
        line: BTreeSet::new(),
        places: workers_at_once((load.weights / (4 * CHUNK) as f64).ceil() as usize).unwrap_or(usize::MAX),
        joined: 0,
        step: 0,
        missing: 0,
        updating: 0,
        commits: Vec::new(),
        computed: 0.0,
    };
    for _ in 0..workers {
        run.join();
    }
    run.timers.add(TICK, Happened::Tick);
    run.open();
    let mut before = [0.0; 4];
    let most = PATIENCE * (u64::from(workers) + u64::from(load.partitions));
    let mut turns = 0;
    while (run.commits.len() as u64) < WARM + steps {
        let commits = run.commits.len();
        run.turn();
        turns += 1;
        if run.commits.len() > commits {
            turns = 0;
            if run.commits.len() as u64 == WARM {
                before = run.given();
            }
        }
        if turns > most {
            return None;
        }
    }
    let counted = &run.commits[WARM as usize - 1..];
    let seconds = counted[counted.len() - 1] - counted[0];
    let mut each: Vec<f64> = counted.windows(2).map(|two| two[1] - two[0]).collect();
    each.sort_by(f64::total_cmp);
    let [cores, out, inward, computed] = std::array::from_fn(|i| (run.given()[i] - before[i]) / seconds);
    Some(Outcome {
        samples_per_second: load.samples * steps as f64 / seconds,
        steps: each,
        cores: cores / hosts.cores,
        out: out / hosts.link,
        inward: inward / hosts.link,
        computing: computed / workers as f64,
    })
}

/// A worker.
#[derive(Default)]
struct Member {
    /// The step whose weights it has.
    has: Option<u64>,
    /// What it was asked for in the open step, and has not begun.
    owes: VecDeque<Node>,
    is_busy: bool,
}

struct Run<'a> {
    load: &'a Load,
    hosts: &'a Hosts,
    key: Key,
    machine: Machine,
    /// The machine's clock at 0.
    began: Instant,
    now: f64,
    timers: Timers<Happened>,
    cores: Resource<Happened>,
    out: Resource<Happened>,
    inward: Resource<Happened>,
    members: BTreeMap<WorkerId, Member>,
    /// Those who wait for weights, and the places that are free.
    line: BTreeSet<WorkerId>,
    places: usize,
    joined: u64,
    step: u64,
    missing: u32,
    /// Threads that are updating weights.
    updating: u32,
    commits: Vec<f64>,
    /// Seconds of computing, of all workers.
    computed: f64,
}

impl Run<'_> {
    fn given(&self) -> [f64; 4] {
        [self.cores.given(), self.out.given(), self.inward.given(), self.computed]
    }

    /// What happens next.
    fn turn(&mut self) {
        let ends = [self.timers.next(), self.cores.next(), self.out.next(), self.inward.next()];
        let at = |i: &usize| ends[*i].unwrap_or(f64::INFINITY);
        let first = (0..ends.len()).min_by(|a, b| at(a).total_cmp(&at(b))).expect("there are four");
        self.now = self.now.max(at(&first));
        let happened = match first {
            0 => self.timers.take(),
            1 => self.cores.take(self.now),
            2 => self.out.take(self.now),
            _ => self.inward.take(self.now),
        };
        self.happened(happened.expect("a clock ticks always"));
    }

    fn machine(&mut self, event: Event) {
        let now = self.began + Duration::from_secs_f64(self.now);
        for command in self.machine.handle(now, event) {
            match command {
                Command::Work { worker, step, nodes, .. } => {
                    for node in nodes {
                        self.after(self.hosts.rtt / 2.0, Happened::Ordered(Task { worker, step: step.0, node }));
                    }
                }
                Command::Evict { worker, .. } => {
                    self.members.remove(&worker);
                    self.line.remove(&worker);
                    self.after(self.hosts.rtt, Happened::Joins);
                }
                Command::Reissued { .. } | Command::WaitingForWorkers { .. } => {}
            }
        }
    }

    fn after(&mut self, seconds: f64, happened: Happened) {
        self.timers.add(self.now + seconds, happened);
    }

    /// Work of a worker's host, which does nothing else.
    fn work(&mut self, seconds: f64, then: Happened) {
        if self.hosts.together { self.cores.add(self.now, seconds, then) } else { self.after(seconds, then) }
    }

    fn key(&self, what: &str, worker: WorkerId) -> Key {
        self.key.named(what).with(worker.0)
    }

    fn join(&mut self) {
        let worker = WorkerId(self.joined);
        self.joined += 1;
        self.members.insert(worker, Member::default());
        if self.missing > 0 {
            self.line.insert(worker);
            self.send();
        }
        self.machine(Event::Joined { worker, threads: 1 });
        if let Some(Failures { between, .. }) = self.hosts.failures {
            // The time to a failure is exponential.
            let uniform = self.key("failure", worker).uniform(0) as f64;
            self.after(-between * (1.0 - uniform).ln(), Happened::Fails(worker));
        }
    }

    /// Sends the weights of the step to those who wait for them, as many at once as there are places: every worker does, whatever it is
    /// asked for.
    fn send(&mut self) {
        while self.places > 0
            && let Some(worker) = self.line.pop_first()
        {
            self.places -= 1;
            let seconds = self.load.weights * self.load.bytes.coordinator;
            self.cores.add(self.now, seconds, Happened::Sent(worker, self.step));
        }
    }

    fn open(&mut self) {
        self.missing = self.load.partitions;
        for member in self.members.values_mut() {
            member.owes.clear();
        }
        self.line = self.members.keys().copied().collect();
        self.send();
        self.machine(Event::Open { step: Step(self.step), kind: Kind::Train });
    }

    /// A worker begins with the next of its nodes, if it can.
    fn compute(&mut self, worker: WorkerId) {
        let (load, step) = (self.load, self.step);
        let Some(member) = self.members.get_mut(&worker) else { return };
        if member.is_busy || member.has != Some(step) {
            return;
        }
        let Some(node) = member.owes.pop_front() else { return };
        member.is_busy = true;
        let key = self.key.named("compute").with(step);
        let draw = |partition| load.compute[key.below(u64::from(partition), load.compute.len() as u64) as usize];
        let mut seconds: f64 = (node.lo..node.hi).map(draw).sum();
        if let Some(Stragglers { share, factor }) = self.hosts.stragglers
            && (self.key("straggler", worker).uniform(step) as f64) < share
        {
            seconds *= factor;
        }
        self.computed += seconds;
        let then = Happened::Computed(Task { worker, step, node });
        if load.computes { self.work(seconds, then) } else { self.after(seconds, then) }
    }

    /// Whether it still matters what a worker does for a step.
    fn counts(&self, worker: WorkerId, step: u64) -> bool {
        step == self.step && self.members.contains_key(&worker)
    }

    fn happened(&mut self, happened: Happened) {
        let Load { weights, gradient, bytes, .. } = *self.load;
        match happened {
            Happened::Sent(worker, step) => {
                // What waits for a link, whose workers take a chunk too slowly, keeps no place.
                self.places += 1;
                self.send();
                if self.counts(worker, step) && self.hosts.together {
                    self.happened(Happened::Delivered(worker, step));
                } else if self.counts(worker, step) {
                    self.out.add(self.now, weights, Happened::Left(worker, step));
                }
            }
            Happened::Left(worker, step) => self.after(self.hosts.rtt / 2.0, Happened::Delivered(worker, step)),
            Happened::Delivered(worker, step) if !self.counts(worker, step) => {}
            Happened::Delivered(worker, step) => self.work(weights * bytes.worker, Happened::Ready(worker, step)),
            Happened::Ready(worker, step) => {
                if let Some(member) = self.members.get_mut(&worker) {
                    member.has = Some(step);
                    self.compute(worker);
                }
            }
            Happened::Ordered(Task { worker, step, node }) => {
                if let Some(member) = self.members.get_mut(&worker).filter(|_| step == self.step) {
                    member.owes.push_back(node);
                    self.compute(worker);
                }
            }
            Happened::Computed(task) => {
                if let Some(member) = self.members.get_mut(&task.worker) {
                    member.is_busy = false;
                    // The next node is computed while this one is on its way.
                    self.work(gradient * bytes.worker, Happened::Pushed(task));
                    self.compute(task.worker);
                }
            }
            Happened::Pushed(Task { worker, step, .. })
            | Happened::Coming(Task { worker, step, .. })
            | Happened::Arrived(Task { worker, step, .. })
                if !self.counts(worker, step) => {}
            Happened::Pushed(task) if self.hosts.together => self.happened(Happened::Arrived(task)),
            Happened::Pushed(task) => self.after(self.hosts.rtt / 2.0, Happened::Coming(task)),
            Happened::Coming(task) => self.inward.add(self.now, gradient, Happened::Arrived(task)),
            Happened::Arrived(task) => self.cores.add(self.now, gradient * bytes.coordinator, Happened::Taken(task)),
            Happened::Taken(Task { worker, step, node }) => self.taken(worker, Step(step), node),
            Happened::Updated => {
                self.updating -= 1;
                if self.updating == 0 {
                    self.after(self.load.rest, Happened::Committed);
                }
            }
            Happened::Committed => {
                self.commits.push(self.now);
                self.machine(Event::RoundApplied);
                self.step += 1;
                self.open();
            }
            Happened::Fails(worker) => {
                if self.members.remove(&worker).is_some() {
                    self.line.remove(&worker);
                    self.machine(Event::Disconnected { worker });
                    self.after(self.hosts.failures.map_or(0.0, |f| f.restart), Happened::Joins);
                }
            }
            Happened::Joins => self.join(),
            Happened::Tick => {
                for worker in self.members.keys().copied().collect::<Vec<_>>() {
                    self.machine(Event::Heartbeat { worker });
                }
                self.machine(Event::Tick);
                self.after(TICK, Happened::Tick);
            }
        }
    }

    /// A node was added up; the step's last one lets the update begin.
    fn taken(&mut self, worker: WorkerId, step: Step, node: Node) {
        if !self.machine.owes(worker, step, Kind::Train, node) {
            return;
        }
        self.machine(Event::NodeDone { worker, step, kind: Kind::Train, node });
        self.missing -= node.len();
        if self.missing == 0 {
            self.updating = (self.hosts.cores as u32).max(1);
            for _ in 0..self.updating {
                self.cores.add(self.now, self.load.update / self.updating as f64, Happened::Updated);
            }
        }
    }
}
