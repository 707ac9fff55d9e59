//! The coordinator's machine: who is in, who computes what, and what happens next. Events in, commands out.
//!
//! It holds no floats and reads no clock. A *round* is either the gradients of one step or an evaluation; in both, the
//! partitions are leased in contiguous ranges, and a lost worker's missing nodes are given to others in the same round.

use crate::ids::{Generation, Step, WorkerId};
use crate::tree::{Node, cover};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// What a round computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The gradient sums of one step.
    Train,
    /// The evaluation sums of the test set.
    Evaluate,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A worker passed the checks of join.
    Joined { worker: WorkerId, threads: u32 },
    /// A worker's session ended.
    Disconnected { worker: WorkerId },
    /// A sign of life.
    Heartbeat { worker: WorkerId },
    /// All of a node's sums arrived.
    NodeDone { worker: WorkerId, step: Step, kind: Kind, node: Node },
    /// The whole tree is reduced and, for training, the optimizer has run: the weights are those of `step + 1`.
    RoundApplied,
    /// Start a round; asked by the driver once the last one was applied.
    Open { step: Step, kind: Kind },
    /// Take a worker out when its current round is over.
    Drain { worker: WorkerId },
    /// Time passed.
    Tick,
}

/// Why a worker is sent away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No sign of life for this long.
    Silent { for_ms: u64 },
    /// It holds the round up for others that are done, far longer than its own history, or that of others, explains.
    Late { for_ms: u64, usual_ms: Option<u64> },
    /// An operator asked for it.
    Drained,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::Silent { for_ms } => {
                write!(f, "no sign of life for {:.1} s: is its machine, or the network, down?", *for_ms as f64 / 1e3)
            }
            Reason::Late { for_ms, usual_ms } => {
                write!(f, "its share takes {:.1} s, ", *for_ms as f64 / 1e3)?;
                match usual_ms {
                    Some(usual) => write!(f, "usually {:.3} s", *usual as f64 / 1e3)?,
                    None => f.write_str("and nobody has done one yet")?,
                }
                f.write_str(": is its machine busy, or does it wait for its data?")
            }
            Reason::Drained => write!(f, "drained"),
        }
    }
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Send a worker these nodes to compute.
    Work { worker: WorkerId, step: Step, generation: Generation, kind: Kind, nodes: Vec<Node> },
    /// End a worker's session.
    Evict { worker: WorkerId, reason: Reason },
    /// Work was taken from a lost worker and given to others.
    Reissued { nodes: usize, partitions: u32 },
    /// No worker is left; the round waits.
    WaitingForWorkers { missing: u32 },
}

/// Limits on patience.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// A worker is lost after this long without a sign of life.
    pub silence: Duration,
    /// A share is never late before this.
    pub least_late: Duration,
    /// ... nor before this many times its usual duration.
    pub late_factor: f64,
    /// Where nobody has a history: it is late after this long, and after twice as long each time that one was. It may be that the
    /// work takes so long.
    pub first_late: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let [silence, least_late, first_late] = [5, 10, 60].map(Duration::from_secs);
        Patience { silence, least_late, late_factor: 20.0, first_late }
    }
}

#[derive(Debug)]
struct Member {
    threads: u32,
    heard: Instant,
    /// Nodes of the open round that it still owes, and since when.
    owes: BTreeSet<Node>,
    since: Instant,
    /// Moving averages of seconds per partition, of training and of evaluation.
    usual: [Option<f64>; 2],
    leased: u32,
    draining: bool,
}

#[derive(Debug)]
struct Round {
    step: Step,
    kind: Kind,
    /// Nodes nobody computes.
    orphans: BTreeSet<Node>,
    /// Partitions not yet delivered.
    missing: u32,
}

/// The coordinator's machine.
#[derive(Debug)]
pub struct Machine {
    partitions: u32,
    patience: Patience,
    generation: Generation,
    members: BTreeMap<WorkerId, Member>,
    round: Option<Round>,
    reissued: u64,
    lost: u64,
    /// Workers that were late when nobody had a history.
    late_at_first: u32,
    ticked: Option<Instant>,
}

impl Machine {
    /// A machine without members, over `partitions` leaves.
    pub fn new(partitions: u32, patience: Patience) -> Machine {
        Machine {
            partitions,
            patience,
            generation: Generation(0),
            members: BTreeMap::new(),
            round: None,
            reissued: 0,
            lost: 0,
            late_at_first: 0,
            ticked: None,
        }
    }

    /// The membership's version.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Members in rank order: id, threads, partitions leased, time of the last sign of life.
    pub fn members(&self) -> impl Iterator<Item = (WorkerId, u32, u32, Instant)> + '_ {
        self.members.iter().map(|(id, m)| (*id, m.threads, m.leased, m.heard))
    }

    /// Partitions that were given to another worker, and workers lost, in all.
    pub fn losses(&self) -> (u64, u64) {
        (self.reissued, self.lost)
    }

    /// Whether `worker` owes `node` to the open round; a push that it does not owe is late and is dropped.
    pub fn owes(&self, worker: WorkerId, step: Step, kind: Kind, node: Node) -> bool {
        self.round.as_ref().is_some_and(|r| r.step == step && r.kind == kind)
            && self.members.get(&worker).is_some_and(|m| m.owes.contains(&node))
    }

    /// Whether `worker` has work of the open round at `step`.
    pub fn is_busy(&self, worker: WorkerId, step: Step) -> bool {
        self.round.as_ref().is_some_and(|r| r.step == step)
            && self.members.get(&worker).is_some_and(|m| !m.owes.is_empty())
    }

    /// Takes one event and says what follows from it.
    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::Joined { worker, threads } => {
                self.generation.0 += 1;
                let member = Member {
                    threads: threads.max(1),
                    heard: now,
                    owes: BTreeSet::new(),
                    since: now,
                    usual: [None; 2],
                    leased: 0,
                    draining: false,
                };
                self.members.insert(worker, member);
                self.hand_out(now, &mut out);
            }
            Event::Disconnected { worker } => self.lose(now, worker, &mut out),
            Event::Heartbeat { worker } => {
                if let Some(m) = self.members.get_mut(&worker) {
                    m.heard = now;
                }
            }
            Event::NodeDone { worker, step, kind, node } => {
                if !self.owes(worker, step, kind, node) {
                    return out;
                }
                let m = self.members.get_mut(&worker).expect("it owes, so it is a member");
                m.heard = now;
                m.owes.remove(&node);
                if m.owes.is_empty() && m.leased > 0 {
                    let took = now.duration_since(m.since).as_secs_f64() / m.leased as f64;
                    let usual = &mut m.usual[kind as usize];
                    *usual = Some(usual.map_or(took, |u| 0.9 * u + 0.1 * took));
                }
                if let Some(r) = &mut self.round {
                    r.missing -= node.len();
                }
            }
            Event::Open { step, kind } => self.open(now, step, kind, &mut out),
            Event::RoundApplied => {
                self.round = None;
                let drained: Vec<WorkerId> =
                    self.members.iter().filter(|(_, m)| m.draining).map(|(id, _)| *id).collect();
                for worker in drained {
                    self.remove(worker);
                    out.push(Command::Evict { worker, reason: Reason::Drained });
                }
            }
            Event::Drain { worker } => {
                if let Some(m) = self.members.get_mut(&worker) {
                    m.draining = true;
                }
            }
            Event::Tick => self.tick(now, &mut out),
        }
        out
    }

    fn open(&mut self, now: Instant, step: Step, kind: Kind, out: &mut Vec<Command>) {
        let mut orphans = BTreeSet::new();
        let ranges = shares(self.partitions, &self.members.values().map(|m| m.threads).collect::<Vec<_>>());
        if self.members.is_empty() {
            orphans.insert(Node::root(self.partitions));
            out.push(Command::WaitingForWorkers { missing: self.partitions });
        }
        for ((id, member), (lo, hi)) in self.members.iter_mut().zip(ranges) {
            let nodes = cover(self.partitions, lo, hi);
            member.owes = nodes.iter().copied().collect();
            member.since = now;
            member.leased = hi - lo;
            if !nodes.is_empty() {
                out.push(Command::Work { worker: *id, step, generation: self.generation, kind, nodes });
            }
        }
        self.round = Some(Round { step, kind, orphans, missing: self.partitions });
    }

    fn remove(&mut self, worker: WorkerId) -> Option<Member> {
        let member = self.members.remove(&worker)?;
        self.generation.0 += 1;
        Some(member)
    }

    fn lose(&mut self, now: Instant, worker: WorkerId, out: &mut Vec<Command>) {
        let Some(member) = self.remove(worker) else {
            return;
        };
        if !member.draining {
            self.lost += 1;
        }
        if let Some(r) = &mut self.round {
            self.reissued += member.owes.iter().map(|n| n.len() as u64).sum::<u64>();
            r.orphans.extend(member.owes);
        }
        self.hand_out(now, out);
    }

    /// Gives orphaned nodes to the members, split where that spreads them better.
    fn hand_out(&mut self, now: Instant, out: &mut Vec<Command>) {
        let Some(r) = &mut self.round else { return };
        if r.orphans.is_empty() {
            return;
        }
        if self.members.is_empty() {
            out.push(Command::WaitingForWorkers { missing: r.missing });
            return;
        }
        let mut nodes: Vec<Node> = std::mem::take(&mut r.orphans).into_iter().collect();
        while nodes.len() < self.members.len() {
            let Some(widest) = (0..nodes.len()).max_by_key(|&i| nodes[i].len()) else {
                break;
            };
            let Some((left, right)) = nodes[widest].children() else {
                break;
            };
            nodes.splice(widest..=widest, [left, right]);
        }
        out.push(Command::Reissued { nodes: nodes.len(), partitions: nodes.iter().map(|n| n.len()).sum() });
        let mut given: BTreeMap<WorkerId, Vec<Node>> = BTreeMap::new();
        for node in nodes {
            let load = |m: &Member| m.owes.iter().map(|n| n.len()).sum::<u32>() as f64 / m.threads as f64;
            let (id, member) =
                self.members.iter_mut().min_by(|a, b| load(a.1).total_cmp(&load(b.1))).expect("there are members");
            if member.owes.is_empty() {
                member.since = now;
                member.leased = 0;
            }
            member.leased += node.len();
            member.owes.insert(node);
            given.entry(*id).or_default().push(node);
        }
        for (worker, nodes) in given {
            out.push(Command::Work { worker, step: r.step, generation: self.generation, kind: r.kind, nodes });
        }
    }

    fn tick(&mut self, now: Instant, out: &mut Vec<Command>) {
        // Where the coordinator itself stood still, its workers are not to blame for what it has not heard.
        let still = self.ticked.replace(now).map_or(Duration::ZERO, |last| now.duration_since(last));
        if still > self.patience.silence / 4 {
            for m in self.members.values_mut() {
                (m.heard, m.since) = ((m.heard + still).min(now), (m.since + still).min(now));
            }
        }
        let mut gone = Vec::new();
        // Who has no history yet is measured by the slowest of the others.
        let kind = self.round.as_ref().map_or(Kind::Train, |r| r.kind) as usize;
        let slowest = self.members.values().filter_map(|m| m.usual[kind]).reduce(f64::max);
        for (id, m) in &self.members {
            let silent = now.duration_since(m.heard);
            let late = now.duration_since(m.since);
            let Patience { silence, least_late, late_factor, first_late } = self.patience;
            let usual = m.usual[kind].or(slowest).map(|u| u * m.leased as f64);
            let limit = match usual {
                Some(usual) => usual * late_factor,
                None => first_late.as_secs_f64() * f64::from(self.late_at_first).exp2(),
            };
            if silent > silence {
                gone.push((*id, Reason::Silent { for_ms: silent.as_millis() as u64 }));
            } else if !m.owes.is_empty()
                && late > least_late
                && late.as_secs_f64() > limit
                && self.members.values().any(|o| o.owes.is_empty())
            {
                let usual_ms = usual.map(|usual| (usual * 1e3) as u64);
                gone.push((*id, Reason::Late { for_ms: late.as_millis() as u64, usual_ms }));
            }
        }
        // Where nobody has a history, one by one: what it owed goes to those who have nothing to do.
        let mut first = true;
        gone.retain(|(_, why)| !matches!(why, Reason::Late { usual_ms: None, .. }) || std::mem::take(&mut first));
        self.late_at_first += u32::from(!first);
        for (worker, reason) in gone {
            out.push(Command::Evict { worker, reason });
            self.lose(now, worker, out);
        }
    }
}

/// Contiguous ranges of `partitions`, in proportion to threads; sizes per thread differ by at most one partition.
pub fn shares(partitions: u32, threads: &[u32]) -> Vec<(u32, u32)> {
    let total: u64 = threads.iter().map(|&t| t as u64).sum();
    let mut before = 0u64;
    let cut = |t: u64| (partitions as u64 * t / total.max(1)) as u32;
    threads
        .iter()
        .map(|&t| {
            let lo = cut(before);
            before += t as u64;
            (lo, cut(before))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever joins, leaves and delivers, every partition is delivered exactly once, as long as somebody stays.
        #[test]
        fn every_partition_is_delivered_once(p in 1u32..33, moves in prop::collection::vec((0u8..4, 0u64..6), 0..60)) {
            let t0 = Instant::now();
            let mut m = Machine::new(p, Patience::default());
            let mut queue: Vec<(WorkerId, Node)> = Vec::new();
            let mut seen = vec![0; p as usize];
            let mut next = 0;
            let take = |cmds: Vec<Command>, queue: &mut Vec<(WorkerId, Node)>| {
                for c in cmds {
                    if let Command::Work { worker, nodes, .. } = c {
                        queue.extend(nodes.into_iter().map(|n| (worker, n)));
                    }
                }
            };
            let cmds = m.handle(t0, Event::Open { step: Step(0), kind: Kind::Train });
            take(cmds, &mut queue);
            let mut alive: Vec<WorkerId> = vec![];
            for (what, which) in moves.into_iter().chain([(0, 0)]).chain((0..200).map(|_| (1, 0))) {
                match what {
                    0 => {
                        let w = WorkerId(next); next += 1; alive.push(w);
                        let cmds = m.handle(t0, Event::Joined { worker: w, threads: 1 + (which as u32 % 3) });
                        take(cmds, &mut queue);
                    }
                    1 if !queue.is_empty() => {
                        let (worker, node) = queue.remove(which as usize % queue.len());
                        if m.owes(worker, Step(0), Kind::Train, node) {
                            for i in node.lo..node.hi { seen[i as usize] += 1; }
                        }
                        m.handle(t0, Event::NodeDone { worker, step: Step(0), kind: Kind::Train, node });
                    }
                    2 if alive.len() > 1 => {
                        let w = alive.remove(which as usize % alive.len());
                        let cmds = m.handle(t0, Event::Disconnected { worker: w });
                        take(cmds, &mut queue);
                    }
                    _ => {}
                }
            }
            prop_assert!(seen.iter().all(|&n| n == 1), "{seen:?}");
        }

        #[test]
        fn shares_cut_everything_in_proportion(p in 0u32..200, threads in prop::collection::vec(1u32..9, 1..20)) {
            let cuts = shares(p, &threads);
            prop_assert_eq!(cuts[0].0, 0);
            prop_assert_eq!(cuts[cuts.len() - 1].1, p);
            let total: u32 = threads.iter().sum();
            for (w, t) in cuts.iter().zip(&threads) {
                prop_assert!(((w.1 - w.0) as f64 - (p * t) as f64 / total as f64).abs() <= 1.0);
            }
            for w in cuts.windows(2) { prop_assert_eq!(w[0].1, w[1].0); }
        }
    }

    #[test]
    fn a_coordinator_that_stood_still_blames_nobody() {
        let t0 = Instant::now();
        let mut m = Machine::new(2, Patience::default());
        m.handle(t0, Event::Joined { worker: WorkerId(1), threads: 1 });
        m.handle(t0, Event::Tick);
        assert_eq!(m.handle(t0 + Duration::from_secs(60), Event::Tick), []);
        // From then on it counts again.
        let silent = (1..=60).find(|i| !m.handle(t0 + Duration::from_secs(60 + i), Event::Tick).is_empty());
        assert_eq!(silent, Some(6));
    }

    #[test]
    fn a_silent_worker_is_replaced_and_its_late_push_is_not_owed() {
        let t0 = Instant::now();
        let mut m = Machine::new(4, Patience::default());
        let (a, b) = (WorkerId(1), WorkerId(2));
        m.handle(t0, Event::Joined { worker: a, threads: 1 });
        m.handle(t0, Event::Joined { worker: b, threads: 1 });
        m.handle(t0, Event::Open { step: Step(3), kind: Kind::Train });
        let later = t0 + Duration::from_secs(6);
        m.handle(later, Event::Heartbeat { worker: b });
        let commands = m.handle(later, Event::Tick);
        assert!(commands.contains(&Command::Evict { worker: a, reason: Reason::Silent { for_ms: 6000 } }));
        assert!(commands.iter().any(|c| matches!(c, Command::Work { worker, .. } if *worker == b)));
        assert!(!m.owes(a, Step(3), Kind::Train, Node { lo: 0, hi: 2 }));
        assert_eq!(m.losses(), (2, 1));
    }

    /// Some give signs of life: the first second at which one of them has to go.
    fn late(m: &mut Machine, from: Instant, ids: &[WorkerId]) -> Option<(u64, Vec<Command>)> {
        (1..=600).find_map(|s| {
            let now = from + Duration::from_secs(s);
            ids.iter().for_each(|&worker| drop(m.handle(now, Event::Heartbeat { worker })));
            Some(m.handle(now, Event::Tick)).filter(|commands| !commands.is_empty()).map(|commands| (s, commands))
        })
    }

    #[test]
    fn who_does_nothing_while_others_have_nothing_to_do_is_replaced() {
        let t0 = Instant::now();
        let mut m = Machine::new(4, Patience::default());
        let ids: Vec<_> = (0..4).map(WorkerId).collect();
        // The first hangs with all of the work, before anybody has a history; so does the next, and may for twice as long.
        let mut now = t0;
        m.handle(now, Event::Joined { worker: ids[0], threads: 1 });
        m.handle(now, Event::Open { step: Step(0), kind: Kind::Train });
        for (i, seconds) in [(0, 61), (1, 121)] {
            m.handle(now, Event::Joined { worker: ids[i + 1], threads: 1 });
            let (after, commands) = late(&mut m, now, &ids[i..i + 2]).expect("it has to go");
            now += Duration::from_secs(after);
            assert_eq!(after, seconds);
            let gone = Reason::Late { for_ms: after * 1000, usual_ms: None };
            assert!(commands.contains(&Command::Evict { worker: ids[i], reason: gone }), "{commands:?}");
            assert!(m.is_busy(ids[i + 1], Step(0)));
        }
        // Of several the first makes room for who has nothing to do; the others may take so long.
        let mut several = Machine::new(3, Patience::default());
        ids[..3].iter().for_each(|&worker| drop(several.handle(t0, Event::Joined { worker, threads: 1 })));
        several.handle(t0, Event::Open { step: Step(0), kind: Kind::Train });
        several.handle(t0, Event::Joined { worker: ids[3], threads: 1 });
        let evicted = |commands: &[Command]| commands.iter().filter(|c| matches!(c, Command::Evict { .. })).count();
        let (after, commands) = late(&mut several, t0, &ids).expect("one has to go");
        assert_eq!((after, evicted(&commands)), (61, 1), "{commands:?}");
        assert_eq!(late(&mut several, t0 + Duration::from_secs(after), &ids), None, "nobody is idle any more");
        // With a history, 20 times as long as usual.
        let root = Node::root(4);
        m.handle(
            now + Duration::from_secs(4),
            Event::NodeDone { worker: ids[2], step: Step(0), kind: Kind::Train, node: root },
        );
        m.handle(now, Event::RoundApplied);
        m.handle(now, Event::Joined { worker: ids[3], threads: 1 });
        m.handle(now, Event::Open { step: Step(1), kind: Kind::Train });
        m.handle(
            now,
            Event::NodeDone { worker: ids[3], step: Step(1), kind: Kind::Train, node: Node { lo: 2, hi: 4 } },
        );
        let (after, commands) = late(&mut m, now, &ids[2..]).expect("it has to go");
        assert_eq!(after, 41);
        let gone = Reason::Late { for_ms: 41_000, usual_ms: Some(2000) };
        assert!(commands.contains(&Command::Evict { worker: ids[2], reason: gone }), "{commands:?}");
    }
}
