//! Each epoch takes each sample exactly once into a committed step, whatever joins, leaves, hangs or comes late.

use proptest::prelude::*;
use std::time::{Duration, Instant};
use unisono_common::data::partition::{Feeder, Partitions};
use unisono_common::ids::{Step, WorkerId};
use unisono_common::protocol::{Command, Event, Kind, Machine, Patience};
use unisono_common::tree::{Node, Offer, Open};

/// A gradient "sum" that remembers its samples: the concatenation of (epoch, sample, step).
type Trace = Vec<(u64, usize, u64)>;

struct Cluster {
    machine: Machine,
    now: Instant,
    alive: Vec<WorkerId>,
    /// Work in progress, of the living and of those taken for lost.
    pending: Vec<(WorkerId, Step, Node)>,
    next: u64,
}

impl Cluster {
    fn handle(&mut self, event: Event) {
        for command in self.machine.handle(self.now, event) {
            match command {
                Command::Work { worker, step, nodes, .. } => {
                    self.pending.extend(nodes.into_iter().map(|n| (worker, step, n)));
                }
                Command::Evict { worker, .. } => self.alive.retain(|w| *w != worker),
                Command::Reissued { .. } | Command::WaitingForWorkers { .. } => {}
            }
        }
    }

    fn join(&mut self, threads: u32) {
        let worker = WorkerId(self.next);
        self.next += 1;
        self.alive.push(worker);
        self.handle(Event::Joined { worker, threads });
    }
}

proptest! {
    #[test]
    fn each_sample_once_an_epoch_under_faults(
        (samples, p) in (1u32..9).prop_flat_map(|p| (p as usize..60, Just(p))),
        micro_batch in 1usize..6,
        faults in prop::collection::vec((0u8..6, any::<u16>()), 0..200),
    ) {
        let parts = Partitions::new(samples, p, None).expect("enough samples");
        let steps = 2 * parts.steps_per_epoch(micro_batch) as u64;
        let mut feeder = Feeder::new(parts.clone(), 5, micro_batch);
        let machine = Machine::new(p, Patience::default());
        let mut c = Cluster { machine, now: Instant::now(), alive: vec![], pending: vec![], next: 1 };
        let mut faults = faults.into_iter();
        let mut committed: Trace = Vec::new();
        for step in 0..steps {
            c.handle(Event::Open { step: Step(step), kind: Kind::Train });
            let mut open: Open<Trace> = Open::new(p);
            loop {
                let (what, which) = faults.next().unwrap_or((if c.alive.is_empty() { 0 } else { 5 }, 0));
                let which = which as usize;
                match what {
                    0 => c.join(1 + which as u32 % 3),
                    1 if !c.alive.is_empty() => {
                        // Dies; its work goes on in `pending`, as a push that was already on its way.
                        let worker = c.alive.remove(which % c.alive.len());
                        c.handle(Event::Disconnected { worker });
                    }
                    2 if !c.alive.is_empty() => {
                        // One hangs: the others are heard of, time passes, the machine gives it up.
                        let silent = c.alive[which % c.alive.len()];
                        for _ in 0..6 {
                            c.now += Duration::from_secs(1);
                            for worker in c.alive.clone().into_iter().filter(|w| *w != silent) {
                                c.handle(Event::Heartbeat { worker });
                            }
                            c.handle(Event::Tick);
                        }
                        prop_assert!(!c.alive.contains(&silent), "nobody noticed");
                    }
                    _ if !c.pending.is_empty() => {
                        // A push arrives, in any order; every third one twice.
                        let (worker, of, node) = c.pending.swap_remove(which % c.pending.len());
                        for _ in 0..1 + usize::from(which.is_multiple_of(3)) {
                            if c.machine.owes(worker, of, Kind::Train, node) {
                                let epoch = of.0 / (steps / 2);
                                let mut trace = Trace::new();
                                for partition in node.lo..node.hi {
                                    for &at in feeder.positions(of.0, partition) {
                                        trace.push((epoch, parts.sample(partition, at as usize), of.0));
                                    }
                                }
                                let taken = open.offer(node, trace, |mut a, b| { a.extend(b); a });
                                prop_assert!(taken != Offer::Duplicate, "the machine asked twice for {node:?}");
                                c.handle(Event::NodeDone { worker, step: of, kind: Kind::Train, node });
                            }
                        }
                    }
                    _ if c.alive.is_empty() => c.join(1),
                    _ => {}
                }
                if let Some(trace) = open.take_root() {
                    committed.extend(trace);
                    c.handle(Event::RoundApplied);
                    break;
                }
            }
        }
        for epoch in 0..2 {
            let mut seen: Vec<usize> = committed.iter().filter(|t| t.0 == epoch).map(|t| t.1).collect();
            seen.sort();
            prop_assert_eq!(seen, (0..samples).collect::<Vec<_>>(), "epoch {}", epoch);
        }
    }
}
