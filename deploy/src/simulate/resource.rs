//! What many use at once, the cores of a host or one way of a link; and what happens at a time that is known.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// Something that has its turn at a certain point; of two at the same, what came first.
struct Entry<J> {
    point: f64,
    turn: u64,
    job: J,
}

impl<J> PartialEq for Entry<J> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<J> Eq for Entry<J> {}

impl<J> PartialOrd for Entry<J> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<J> Ord for Entry<J> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.point.total_cmp(&other.point).then(self.turn.cmp(&other.turn))
    }
}

/// Entries, the first on top.
struct Queue<J> {
    entries: BinaryHeap<Reverse<Entry<J>>>,
    came: u64,
}

impl<J> Queue<J> {
    fn new() -> Queue<J> {
        Queue { entries: BinaryHeap::new(), came: 0 }
    }

    fn add(&mut self, point: f64, job: J) {
        self.came += 1;
        self.entries.push(Reverse(Entry { point, turn: self.came, job }));
    }

    fn first(&self) -> Option<f64> {
        self.entries.peek().map(|Reverse(entry)| entry.point)
    }

    fn take(&mut self) -> Option<(f64, J)> {
        self.entries.pop().map(|Reverse(entry)| (entry.point, entry.job))
    }
}

/// What happens at a time that is known.
pub struct Timers<J>(Queue<J>);

impl<J> Default for Timers<J> {
    fn default() -> Self {
        Timers(Queue::new())
    }
}

impl<J> Timers<J> {
    pub fn add(&mut self, at: f64, job: J) {
        self.0.add(at, job);
    }

    pub fn next(&self) -> Option<f64> {
        self.0.first()
    }

    pub fn take(&mut self) -> Option<J> {
        self.0.take().map(|(_, job)| job)
    }
}

/// A resource that is shared evenly: each of its users gets the same share, and at most `each`.
///
/// All users progress alike, so the order in which they end is known when they come: the k-th unit of service that everybody has had
/// ends whoever asked for so much (a fluid queue under processor sharing).
pub struct Resource<J> {
    /// Units a second in all, and for one user at most.
    capacity: f64,
    each: f64,
    /// Units that a user who was always there has had.
    served: f64,
    /// Until when that holds.
    now: f64,
    /// By the service at which they end.
    users: Queue<J>,
    /// Units in all.
    given: f64,
}

impl<J> Resource<J> {
    /// With `capacity` units a second, of which a user gets `each` at most.
    pub fn new(capacity: f64, each: f64) -> Resource<J> {
        Resource { capacity, each, served: 0.0, now: 0.0, users: Queue::new(), given: 0.0 }
    }

    /// Units a second that each user gets now.
    fn rate(&self) -> f64 {
        self.each.min(self.capacity / self.users.entries.len().max(1) as f64)
    }

    fn advance(&mut self, now: f64) {
        let more = self.rate() * (now - self.now).max(0.0);
        self.served += more;
        self.given += more * self.users.entries.len() as f64;
        self.now = self.now.max(now);
    }

    /// A user comes, who wants `units`.
    pub fn add(&mut self, now: f64, units: f64, job: J) {
        self.advance(now);
        self.users.add(self.served + units.max(0.0), job);
    }

    /// When the next user ends.
    pub fn next(&self) -> Option<f64> {
        Some(self.now + (self.users.first()? - self.served).max(0.0) / self.rate())
    }

    /// Takes the next user, whose end is now.
    pub fn take(&mut self, now: f64) -> Option<J> {
        self.advance(now);
        let (end, job) = self.users.take()?;
        // What rounding has left of it.
        self.served = self.served.max(end);
        Some(job)
    }

    /// Units that were given so far.
    pub fn given(&self) -> f64 {
        self.given
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes all that end, with when they do.
    fn drain(resource: &mut Resource<u32>) -> Vec<(u32, f64)> {
        let mut ended = Vec::new();
        while let Some(at) = resource.next() {
            ended.push((resource.take(at).expect("one ends"), at));
        }
        ended
    }

    fn same(got: &[(u32, f64)], want: &[(u32, f64)]) {
        let near = |(a, b): (&(u32, f64), &(u32, f64))| a.0 == b.0 && (a.1 - b.1).abs() < 1e-9;
        assert!(got.len() == want.len() && got.iter().zip(want).all(near), "{got:?}, not {want:?}");
    }

    #[test]
    fn users_share_evenly_and_nobody_gets_more_than_its_own_rate() {
        // Two cores: one job takes its own time, three share.
        let mut cores = Resource::new(2.0, 1.0);
        cores.add(1.0, 3.0, 0);
        same(&drain(&mut cores), &[(0, 4.0)]);
        for (job, work) in [(1, 1.0), (2, 2.0), (3, 3.0)] {
            cores.add(10.0, work, job);
        }
        // At 2/3 each until 11.5; the two that are left have a core each.
        same(&drain(&mut cores), &[(1, 11.5), (2, 12.5), (3, 13.5)]);
        assert!((cores.given() - 9.0).abs() < 1e-9, "{}", cores.given());
    }

    #[test]
    fn who_comes_later_slows_the_others_down() {
        let mut link = Resource::new(10.0, 10.0);
        link.add(0.0, 100.0, 0);
        link.add(5.0, 10.0, 1);
        same(&drain(&mut link), &[(1, 7.0), (0, 11.0)]);
    }
}
