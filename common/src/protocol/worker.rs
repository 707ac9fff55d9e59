//! The worker's machines: which weights have come, and which work can begin.
//!
//! Weights come chunk by chunk into two buffers, those of step `s` into buffer `s % 2`, and their average, where it is evaluated
//! before the step begins, into the other one. A chunk of step `s + 1` may come before
//! the last one of step `s`. A pass over step `s` begins with the first chunks and asks for more as it goes. Where step `s` was
//! committed without this worker, the others may never come: a pass gives up when all of step `s + 1` is there, or a chunk of
//! step `s + 2`, which is written only where nothing is read.

use super::Kind;
use crate::ids::{Step, Version};
use crate::tree::Node;
use std::cmp::Ordering;
use std::collections::{BTreeSet, VecDeque};

/// Which chunks of which weights are in the two buffers.
#[derive(Debug)]
pub struct Arrivals {
    buffers: [Buffer; 2],
    /// The weights that are computed with.
    read: Option<Version>,
}

#[derive(Debug)]
struct Buffer {
    version: Option<Version>,
    there: Vec<bool>,
    /// So many are there from the first one on.
    leading: usize,
}

impl Arrivals {
    /// None yet of so many chunks.
    pub fn new(chunks: usize) -> Arrivals {
        let empty = || Buffer { version: None, there: vec![false; chunks], leading: 0 };
        Arrivals { buffers: [empty(), empty()], read: None }
    }

    fn buffer(&mut self, version: Version) -> &mut Buffer {
        &mut self.buffers[(version.place() % 2) as usize]
    }

    /// Whether chunk `index` of `version` may be written: not what is read, what is there, or what is older.
    pub fn admit(&mut self, index: usize, version: Version) -> bool {
        let read = self.read;
        let buffer = self.buffer(version);
        if buffer.version < Some(version) && (buffer.version.is_none() || buffer.version != read) {
            (buffer.version, buffer.leading) = (Some(version), 0);
            buffer.there.fill(false);
        }
        buffer.version == Some(version) && !buffer.there[index]
    }

    /// Chunk `index` of `version`, which was admitted, is written.
    pub fn arrived(&mut self, index: usize, version: Version) {
        let buffer = self.buffer(version);
        buffer.there[index] = true;
        buffer.leading += buffer.there[buffer.leading..].iter().take_while(|there| **there).count();
    }

    /// Begins to compute with the weights of `version`, whether they have come or not; false where it is over for all workers.
    pub fn begin(&mut self, version: Version) -> bool {
        self.read = self.leading(version).map(|_| version);
        self.read.is_some()
    }

    /// Nothing is computed with any weights.
    pub fn end(&mut self) {
        self.read = None;
    }

    /// How many chunks of `version` are there from the first one on; `None` where the step is over for all workers: the next one's
    /// weights are whole, or others lie where these would.
    pub fn leading(&mut self, version: Version) -> Option<usize> {
        let next = Version::of(Step(version.step.0.wrapping_add(1)));
        let whole = |buffer: &Buffer| buffer.version == Some(next) && buffer.leading == buffer.there.len();
        if whole(self.buffer(next)) {
            return None;
        }
        let buffer = self.buffer(version);
        match buffer.version.cmp(&Some(version)) {
            Ordering::Less => Some(0),
            Ordering::Equal => Some(buffer.leading),
            Ordering::Greater => None,
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The coordinator asks for these nodes.
    Work(Work),
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
    /// Get these partitions; [`Event::Fetched`] follows.
    Fetch { kind: Kind, partitions: Vec<u32> },
    /// Compute this.
    Compute(Work),
}

/// Which partitions are at hand, and so which work can begin, in the order in which it came.
#[derive(Debug)]
pub struct Machine {
    waiting: VecDeque<Work>,
    /// Partitions at hand, by whether they are of the test set; `None` where the worker reads all data itself.
    at_hand: Option<BTreeSet<(u32, bool)>>,
    fetching: Option<(Kind, Vec<u32>)>,
}

impl Machine {
    /// A machine that has these partitions (`None`: all).
    pub fn new(at_hand: Option<BTreeSet<(u32, bool)>>) -> Machine {
        Machine { waiting: VecDeque::new(), at_hand, fetching: None }
    }

    /// Takes one event and says what follows from it.
    pub fn handle(&mut self, event: Event) -> Vec<Command> {
        let mut out = Vec::new();
        match event {
            Event::Work(work) => self.waiting.push_back(work),
            Event::Fetched => {
                if let (Some(at_hand), Some((kind, partitions))) = (&mut self.at_hand, self.fetching.take()) {
                    at_hand.extend(partitions.into_iter().map(|p| (p, kind == Kind::Evaluate)));
                }
            }
        }
        while let Some(work) = self.waiting.front() {
            let (kind, missing) = (work.kind, self.missing(work));
            if !missing.is_empty() {
                if self.fetching.is_none() {
                    self.fetching = Some((kind, missing.clone()));
                    out.push(Command::Fetch { kind, partitions: missing });
                }
                break;
            }
            out.extend(self.waiting.pop_front().map(Command::Compute));
        }
        out
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

    #[test]
    fn work_waits_for_its_partitions() {
        let work = |step, kind| Work { step: Step(step), generation: 1, kind, nodes: vec![Node { lo: 0, hi: 2 }] };
        let fetch = |kind| Command::Fetch { kind, partitions: vec![0, 1] };
        let mut m = Machine::new(Some(BTreeSet::new()));
        assert_eq!(m.handle(Event::Work(work(5, Kind::Train))), [fetch(Kind::Train)]);
        assert_eq!(m.handle(Event::Work(work(5, Kind::Evaluate))), []);
        let next = [Command::Compute(work(5, Kind::Train)), fetch(Kind::Evaluate)];
        assert_eq!(m.handle(Event::Fetched), next);
        assert_eq!(m.handle(Event::Fetched), [Command::Compute(work(5, Kind::Evaluate))]);
        assert_eq!(m.handle(Event::Work(work(6, Kind::Train))), [Command::Compute(work(6, Kind::Train))]);
        let all = Machine::new(None).handle(Event::Work(work(5, Kind::Train)));
        assert_eq!(all, [Command::Compute(work(5, Kind::Train))]);
    }

    #[test]
    fn what_is_computed_with_stays_until_it_is_over() {
        let of = |step| Version::of(Step(step));
        let mut a = Arrivals::new(2);
        let put = |a: &mut Arrivals, index, step| {
            let admitted = a.admit(index, Version::of(Step(step)));
            if admitted {
                a.arrived(index, Version::of(Step(step)));
            }
            admitted
        };
        assert!(a.begin(of(5)), "its weights may come yet");
        assert_eq!(a.leading(of(5)), Some(0));
        assert!(put(&mut a, 1, 5));
        assert_eq!(a.leading(of(5)), Some(0), "the first is missing");
        assert!(put(&mut a, 0, 5) && !put(&mut a, 0, 5));
        assert_eq!(a.leading(of(5)), Some(2));
        // The next step's lie beside them, those after it would lie over them.
        assert!(put(&mut a, 1, 6) && !put(&mut a, 1, 7));
        assert_eq!(a.leading(of(5)), Some(2));
        a.end();
        assert!(a.begin(of(5)), "a part of the work may be given anew");
        a.end();
        assert!(put(&mut a, 0, 6) && !a.begin(of(5)), "all of it was committed");
        assert_eq!(a.leading(of(5)), None);
        assert!(put(&mut a, 1, 7) && !put(&mut a, 0, 5));
        assert_eq!((a.leading(of(5)), a.leading(of(7)), a.leading(of(9))), (None, Some(0), Some(0)));
        assert!(a.begin(of(6)) && !put(&mut a, 0, 8));
        // A pass that waits for what the broadcast leaves out, as the step was committed without it.
        let mut b = Arrivals::new(2);
        assert!(b.begin(of(5)) && put(&mut b, 0, 5) && put(&mut b, 1, 6));
        assert_eq!(b.leading(of(5)), Some(1));
        assert!(put(&mut b, 0, 6));
        assert_eq!((b.leading(of(5)), b.leading(of(6))), (None, Some(2)));
    }

    proptest! {
        /// However chunks come: what a reader was told is there is never written again while it reads.
        #[test]
        fn no_read_chunk_is_written(
            chunks in 1usize..4,
            events in prop::collection::vec((0u8..4, 0usize..4, 0u64..6, any::<bool>()), 0..200),
        ) {
            let mut a = Arrivals::new(chunks);
            // What the memory would hold.
            let mut buffers = [vec![None; chunks], vec![None; chunks]];
            let mut reading: Option<(Version, usize)> = None;
            for (what, index, step, average) in events {
                let version = Version { step: Step(step), average };
                match what {
                    0 => reading = a.begin(version).then_some((version, 0)),
                    1 => { a.end(); reading = None; }
                    _ if a.admit(index % chunks, version) => {
                        buffers[(version.place() % 2) as usize][index % chunks] = Some(version);
                        a.arrived(index % chunks, version);
                    }
                    _ => {}
                }
                let Some((version, told)) = &mut reading else { continue };
                if let Some(now) = a.leading(*version) {
                    prop_assert!(now >= *told);
                    *told = now;
                }
                let all = buffers[(version.place() % 2) as usize][..*told].iter().all(|held| *held == Some(*version));
                prop_assert!(all, "{buffers:?} at {version}");
            }
        }
    }
}
