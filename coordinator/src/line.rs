//! Who is sent weights next.
//!
//! Streams are sent chunks a few at once. Were all of a small model's sent at once, all workers would have their weights at the end; by
//! ranks, the first ones compute and push while others are sent theirs. Their gradients come in about the order of the reduction tree
//! then: few have to wait for their siblings, and those are in the cache still.

use crate::copies;
use crate::lock;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use unisono_common::ids::WorkerId;

/// Streams that are sent a chunk at once, at most, of those that take one in time, for each thread that sends. With [`IN_TIME`] a
/// thread can still send 1 GB/s, which is as much as it can do.
const PLACES: usize = 4;

/// How long a stream may take for a chunk. One that takes longer, because its worker or its link is slow, needs no place for the next:
/// it would only keep it from others.
pub const IN_TIME: Duration = Duration::from_millis(1);

/// Workers that a thread sends a model of so many chunks at once, each from its first chunk to its last; `None` where all are.
pub fn workers_at_once(chunks: usize) -> Option<usize> {
    (chunks <= copies::AT_ONCE).then_some(PLACES)
}

/// A line for places.
pub struct Line(Mutex<State>);

struct State {
    free: usize,
    /// What tells those who wait that a place is theirs; the number tells them apart.
    waiting: BTreeMap<(usize, WorkerId, u64), oneshot::Sender<Place>>,
    last: u64,
}

impl Line {
    /// One in which nobody waits, for streams of the runtime that this is called in.
    pub fn new() -> Arc<Line> {
        let threads = Handle::try_current().map_or(1, |runtime| runtime.metrics().num_workers());
        Arc::new(Line(Mutex::new(State { free: PLACES * threads, waiting: BTreeMap::new(), last: 0 })))
    }

    /// A place for chunk `index` of so many for `worker`. Those of a model of which updates leave copies of all chunks go by ranks;
    /// of a larger one all workers are sent a chunk while there is a copy of it. Whoever stops waiting leaves the line.
    pub async fn place(self: &Arc<Line>, worker: WorkerId, index: usize, chunks: usize) -> Place {
        let (tell, told) = oneshot::channel();
        {
            let mut state = lock(&self.0);
            state.last += 1;
            let turn = (workers_at_once(chunks).map_or(index, |_| 0), worker, state.last);
            state.waiting.insert(turn, tell);
        }
        self.serve();
        told.await.expect("who waits is told")
    }

    /// Gives away the places that are free.
    fn serve(self: &Arc<Line>) {
        loop {
            let tell = {
                let mut state = lock(&self.0);
                let first = if state.free > 0 { state.waiting.pop_first() } else { None };
                let Some((_, tell)) = first else { return };
                state.free -= 1;
                tell
            };
            // One that waits no more gives its place back by dropping it.
            drop(tell.send(Place(self.clone())));
        }
    }
}

/// A place, free again when this is dropped.
pub struct Place(Arc<Line>);

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.0.0).free += 1;
        self.0.serve();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    /// Looks whether it is somebody's turn.
    fn look(turn: &mut Pin<Box<impl Future<Output = Place>>>) -> Option<Place> {
        match turn.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(place) => Some(place),
            Poll::Pending => None,
        }
    }

    /// Free places, and who waits.
    fn state(line: &Line) -> (usize, usize) {
        let state = lock(&line.0);
        (state.free, state.waiting.len())
    }

    #[test]
    fn places_go_by_rank_or_by_chunk_and_outlive_those_who_wait_no_more() {
        let (few, many) = (copies::AT_ONCE, copies::AT_ONCE + 1);
        for (chunks, order) in [(few, [1, 0, 3, 2]), (many, [0, 1, 2, 3])] {
            let line = Line::new();
            let place = |worker, index| Box::pin(line.place(WorkerId(worker), index, chunks));
            let mut taken: Vec<_> = (0..PLACES as u64).map(|i| look(&mut place(9 + i, 0)).expect("room")).collect();
            let mut all = [place(5, 0), place(4, 1), place(8, 2), place(7, 3)];
            assert!(all.iter_mut().all(|turn| look(turn).is_none()), "there is no place");
            // One leaves before its turn, one when it is told and has not looked.
            let mut gone = place(1, 0);
            assert!(look(&mut gone).is_none());
            drop(gone);
            let mut late = place(2, 0);
            assert!(look(&mut late).is_none());
            taken.pop();
            drop(late);
            // The place has gone to the first, the next one goes to the second.
            let mut served = Vec::new();
            for next in order {
                for i in (0..4).filter(|i| !served.contains(i)).collect::<Vec<usize>>() {
                    if let Some(place) = look(&mut all[i]) {
                        taken.push(place);
                        served.push(i);
                    }
                }
                assert_eq!(served.last(), Some(&next), "of {chunks} chunks");
                taken.remove(0);
            }
            assert_eq!(served, order);
            drop(taken);
            assert_eq!(state(&line), (PLACES, 0));
        }
    }

    #[test]
    fn places_are_not_lost_between_threads() {
        let line = Line::new();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let mut all = tokio::task::JoinSet::new();
            for worker in 0..200 {
                let line = line.clone();
                all.spawn(async move {
                    for index in 0..50 {
                        let place = line.place(WorkerId(worker), index, 1);
                        let hold = async {
                            let _place = place.await;
                            tokio::task::yield_now().await;
                        };
                        // Some give up, while they wait or hold it.
                        if (worker + index as u64).is_multiple_of(3) {
                            tokio::time::timeout(Duration::from_micros(worker), hold).await.ok();
                        } else {
                            hold.await;
                        }
                    }
                });
            }
            all.join_all().await;
        });
        assert_eq!(state(&line), (PLACES, 0));
    }
}
