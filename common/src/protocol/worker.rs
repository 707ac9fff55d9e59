//! The worker's machine: which weights are whole, which partitions are at hand, and so which work can begin.
//!
//! Weights come chunk by chunk, a newer version of one chunk perhaps before the old version of another has come. As soon
//! as all chunks are of one step they are *adopted*; only then may the next version be written. A whole version of step
//! `s + 1` exists only where step `s` was committed, so work for an older step is of no use to anybody and is dropped.

use super::Kind;
use crate::ids::Step;
use crate::tree::Node;
use std::collections::{BTreeSet, VecDeque};

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The coordinator asks for these nodes.
    Work(Work),
    /// A chunk of the weights of `step` came and was written into the memory for incoming weights.
    Chunk { index: usize, step: Step },
    /// All partitions of the last [`Command::Fetch`] are at hand.
    Fetched,
}

/// Nodes to compute.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    pub step: Step,
    pub generation: u64,
    pub kind: Kind,
    pub nodes: Vec<Node>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// The incoming weights are whole: compute with them from now on, and take the next ones into the memory of the last.
    Adopt { step: Step },
    /// Get these partitions; [`Event::Fetched`] follows.
    Fetch { kind: Kind, partitions: Vec<u32> },
    /// Compute with the adopted weights.
    Compute(Work),
}

/// The worker's machine.
#[derive(Debug)]
pub struct Machine {
    versions: Vec<Option<Step>>,
    /// The newest version that came, and the number of chunks that have it.
    newest: Option<Step>,
    count: usize,
    adopted: Option<Step>,
    waiting: VecDeque<Work>,
    /// Partitions at hand, by whether they are of the test set; `None` where the worker reads all data itself.
    at_hand: Option<BTreeSet<(u32, bool)>>,
    fetching: Option<(Kind, Vec<u32>)>,
}

impl Machine {
    /// A machine for weights in `chunks` chunks, that has these partitions (`None`: all).
    pub fn new(chunks: usize, at_hand: Option<BTreeSet<(u32, bool)>>) -> Machine {
        Machine {
            versions: vec![None; chunks],
            newest: None,
            count: 0,
            adopted: None,
            waiting: VecDeque::new(),
            at_hand,
            fetching: None,
        }
    }

    /// Takes one event and says what follows from it.
    pub fn handle(&mut self, event: Event) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::Work(work) => self.waiting.push_back(work),
            Event::Chunk { index, step } => {
                if self.newest.is_none_or(|newest| step > newest) {
                    (self.newest, self.count) = (Some(step), 0);
                }
                let before = self.versions[index].replace(step);
                self.count += usize::from(Some(step) == self.newest && before != self.newest);
                if self.count == self.versions.len() && self.adopted != self.newest {
                    self.adopted = self.newest;
                    out.push(Command::Adopt { step });
                }
            }
            Event::Fetched => {
                if let (Some(at_hand), Some((kind, partitions))) = (&mut self.at_hand, self.fetching.take()) {
                    at_hand.extend(partitions.into_iter().map(|p| (p, kind == Kind::Evaluate)));
                }
            }
        }
        self.start(&mut out);
        out
    }

    fn start(&mut self, out: &mut Vec<Command>) {
        while let Some(work) = self.waiting.front() {
            if self.adopted.is_some_and(|adopted| adopted > work.step) {
                self.waiting.pop_front(); // that step is committed
                continue;
            }
            let missing = self.missing(work);
            if !missing.is_empty() {
                if self.fetching.is_none() {
                    self.fetching = Some((work.kind, missing.clone()));
                    out.push(Command::Fetch { kind: work.kind, partitions: missing });
                }
                return;
            }
            if self.adopted != Some(work.step) {
                return;
            }
            out.extend(self.waiting.pop_front().map(Command::Compute));
        }
    }

    fn missing(&self, work: &Work) -> Vec<u32> {
        let Some(at_hand) = &self.at_hand else { return Vec::new() };
        let all = work.nodes.iter().flat_map(|n| n.lo..n.hi);
        all.filter(|p| !at_hand.contains(&(*p, work.kind == Kind::Evaluate))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn work(step: u64, kind: Kind) -> Work {
        Work { step: Step(step), generation: 1, kind, nodes: vec![Node { lo: 0, hi: 2 }] }
    }

    #[test]
    fn work_waits_for_its_weights_and_its_partitions() {
        let mut m = Machine::new(2, Some(BTreeSet::new()));
        let chunk = |index, step| Event::Chunk { index, step: Step(step) };
        let fetch = |kind| Command::Fetch { kind, partitions: vec![0, 1] };
        assert_eq!(m.handle(Event::Work(work(5, Kind::Train))), [fetch(Kind::Train)]);
        assert_eq!(m.handle(chunk(0, 5)), []);
        assert_eq!(m.handle(Event::Fetched), []);
        let begin = [Command::Adopt { step: Step(5) }, Command::Compute(work(5, Kind::Train))];
        assert_eq!(m.handle(chunk(1, 5)), begin);
        // Given anew while the next version is on its way: the adopted weights are still there.
        assert_eq!(m.handle(chunk(1, 6)), []);
        assert_eq!(m.handle(Event::Work(work(5, Kind::Train))), [Command::Compute(work(5, Kind::Train))]);
        assert_eq!(m.handle(chunk(0, 6)), [Command::Adopt { step: Step(6) }]);
        // Too late: nobody waits for it, and what is behind it goes on.
        assert_eq!(m.handle(Event::Work(work(5, Kind::Train))), []);
        assert_eq!(m.handle(Event::Work(work(6, Kind::Evaluate))), [fetch(Kind::Evaluate)]);
        assert_eq!(m.handle(Event::Fetched), [Command::Compute(work(6, Kind::Evaluate))]);
    }

    proptest! {
        /// However the versions of the chunks interleave, weights are adopted in order, whole, and as often as they come.
        #[test]
        fn every_whole_version_is_adopted_once(chunks in 1usize..6, order in prop::collection::vec(0usize..6, 0..200)) {
            let mut m = Machine::new(chunks, None);
            let mut versions = vec![0u64; chunks];
            let mut adopted = 0;
            for index in order.into_iter().map(|i| i % chunks) {
                // No chunk runs ahead of a commit: versions differ by one at most.
                if versions[index] > *versions.iter().min().expect("there are chunks") { continue; }
                versions[index] += 1;
                let got = m.handle(Event::Chunk { index, step: Step(versions[index]) });
                if versions.iter().all(|v| *v == versions[0]) {
                    adopted += 1;
                    prop_assert_eq!(got, [Command::Adopt { step: Step(adopted) }]);
                } else {
                    prop_assert_eq!(got, []);
                }
            }
        }
    }
}
