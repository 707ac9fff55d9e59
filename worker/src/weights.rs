//! The weights that a worker computes with: in the coordinator's memory, or in its own while they come by a stream.

use crate::lock;
use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use unisono_common::ids::Version;
use unisono_common::layout::{CHUNK, Layout};
use unisono_common::protocol::worker::Arrivals;
use unisono_common::train::Source;
use unisono_proto::shm::{Piece, Weights};

/// Weights that come by a stream, and are computed with from the first chunk on.
pub struct Coming {
    weights: Arc<Weights>,
    /// `None` when no more come.
    arrivals: Mutex<Option<Arrivals>>,
    changed: Condvar,
}

/// Where the chunks of a stream are put.
pub struct Incoming {
    coming: Arc<Coming>,
    chunks: Vec<Piece>,
}

impl Coming {
    /// Memory for the weights of two steps, and the end that fills it.
    ///
    /// # Errors
    /// Where the system has not so much memory to give.
    pub fn new(layout: &Layout) -> io::Result<(Arc<Coming>, Incoming)> {
        let weights = Arc::new(Weights::private(layout.len())?);
        let chunks = weights.pieces((0..layout.chunks()).map(|i| layout.chunk(i)));
        let arrivals = Mutex::new(Some(Arrivals::new(layout.chunks())));
        let coming = Arc::new(Coming { weights, arrivals, changed: Condvar::new() });
        Ok((coming.clone(), Incoming { coming, chunks }))
    }

    /// No more come: nobody waits for them any more.
    pub fn close(&self) {
        *lock(&self.arrivals) = None;
        self.changed.notify_all();
    }

    /// Waits until the first `chunks` chunks of `version` are there, and adds the time to `waited`; `None` where they will not be.
    fn wait(&self, version: Version, chunks: usize, waited: &Cell<Duration>) -> Option<()> {
        let mut arrivals = lock(&self.arrivals);
        let mut began = None;
        while arrivals.as_mut()?.leading(version)? < chunks {
            began = began.or_else(|| Some(Instant::now()));
            arrivals = self.changed.wait(arrivals).unwrap_or_else(|e| e.into_inner());
        }
        waited.set(waited.get() + began.map_or(Duration::ZERO, |began| began.elapsed()));
        Some(())
    }
}

impl Incoming {
    /// Where chunk `index` of `version` belongs; `None` where that is no time for it.
    pub fn room(&mut self, index: usize, version: Version) -> Option<&mut [f32]> {
        let admitted = lock(&self.coming.arrivals).as_mut()?.admit(index, version);
        admitted.then(|| self.chunks[index].begin(version.place()))
    }

    /// Chunk `index` of `version` is where it belongs.
    pub fn arrived(&self, index: usize, version: Version) {
        if let Some(arrivals) = lock(&self.coming.arrivals).as_mut() {
            arrivals.arrived(index, version);
        }
        self.coming.changed.notify_all();
    }
}

/// The weights of one version, which stay as they are until this is dropped.
pub struct Reading<'a> {
    weights: &'a Weights,
    version: Version,
    /// Where they come by a stream.
    coming: Option<&'a Coming>,
    waited: Cell<Duration>,
}

impl<'a> Reading<'a> {
    /// Weights that are all there.
    pub fn whole(weights: &'a Weights, version: Version) -> Reading<'a> {
        Reading { weights, version, coming: None, waited: Cell::default() }
    }

    /// Weights that come; `None` where those of `version` are of no use to anybody.
    pub fn coming(coming: &'a Coming, version: Version) -> Option<Reading<'a>> {
        let begun = lock(&coming.arrivals).as_mut()?.begin(version);
        begun.then(|| Reading { weights: &coming.weights, version, coming: Some(coming), waited: Cell::default() })
    }

    /// How long it was waited for them.
    pub fn waited(&self) -> Duration {
        self.waited.get()
    }
}

/// The weights of a step that nothing is ordered of yet, as far as they are there.
pub struct Early<'a> {
    pub weights: &'a Weights,
    pub step: u64,
}

impl Source for Early<'_> {
    fn get(&self, range: Range<usize>) -> Option<&[f32]> {
        let there = self.weights.has(self.step, range.clone());
        there.then(|| self.weights.of_step(self.step, range))
    }
}

impl Source for Reading<'_> {
    fn get(&self, range: Range<usize>) -> Option<&[f32]> {
        if let (Some(coming), false) = (self.coming, range.is_empty()) {
            coming.wait(self.version, range.end.div_ceil(CHUNK), &self.waited)?;
        }
        Some(self.weights.of_step(self.version.place(), range))
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if let Some(coming) = self.coming {
            lock(&coming.arrivals).as_mut().map(Arrivals::end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::sync::mpsc;
    use unisono_common::data::{Batch, Targets};
    use unisono_common::ids::Step;
    use unisono_common::job::{self, Activation, Model as Spec};
    use unisono_common::layers::Segments;
    use unisono_common::loss::Loss;
    use unisono_common::model::{Model, Signature};
    use unisono_common::rng::{Key, Purpose};
    use unisono_common::train::{self, Ahead, Workspace};

    /// Says what it was asked for, and when it has answered.
    struct Told<'a>(Reading<'a>, mpsc::Sender<(Range<usize>, bool)>);

    impl Source for Told<'_> {
        fn get(&self, range: Range<usize>) -> Option<&[f32]> {
            let tell = |there| self.1.send((range.clone(), there)).expect("somebody listens");
            tell(false);
            let values = self.0.get(range.clone())?;
            tell(true);
            Some(values)
        }
    }

    /// Says what it was asked for ahead of an order, and whether it had that.
    struct Asked<'a>(Early<'a>, RefCell<Vec<(Range<usize>, bool)>>);

    impl Source for Asked<'_> {
        fn get(&self, range: Range<usize>) -> Option<&[f32]> {
            let values = self.0.get(range.clone());
            self.1.borrow_mut().push((range, values.is_some()));
            values
        }
    }

    /// A pass ahead of its order looks at weights that are said to be there only, from the first layer's last outputs on; the pass that
    /// goes on from there gives the same bits, without looking at them again.
    #[test]
    fn a_pass_begins_with_the_weights_that_have_changed() {
        let spec = Spec::Mlp { hidden: vec![700, 20], activation: Activation::Relu, dropout: 0.5 };
        let model = Model::build(&spec, &Signature::new(&[500], 3)).expect("a model");
        let (layout, whole) = (model.layout(), model.layout().init(1));
        let (samples, step, first) = (5, 8, 700 * 501);
        let inputs = (0..samples * 500).map(|i| (i % 17) as f32 - 8.0).collect();
        let targets = Targets::Class((0..samples as u32).map(|i| i % 3).collect());
        let batch = Batch { inputs, targets, samples, ..Batch::empty() };
        let (segments, key) = (Segments { lo: 0, starts: vec![0, 2, samples] }, Key::new(1, Purpose::Dropout));
        let loss = job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None };
        let loss = Loss::new(&loss, model.outputs()).expect("a loss");
        let weights = Arc::new(Weights::private(layout.len()).expect("memory"));
        let mut pieces = weights.pieces((0..layout.chunks()).map(|i| layout.chunk(i)));
        let mut put = |index: usize, values: &[f32]| pieces[index].begin(step).copy_from_slice(values);
        let pools = [1, 2].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("a pool"));
        let mut run = |ahead: usize| {
            (0..layout.chunks()).for_each(|i| put(i, &vec![f32::NAN; layout.chunk(i).len()]));
            let asked = Asked(Early { weights: &weights, step }, RefCell::default());
            let (mut workspace, mut begun) = (Workspace::new(&model, samples, 2), Ahead::default());
            for some in [ahead / 2, ahead] {
                for i in (layout.chunks() - some..layout.chunks()).rev() {
                    put(i, &whole[layout.chunk(i)]);
                    weights.say(i, step);
                }
                // What was missing is asked for once more.
                asked.1.borrow_mut().retain(|(_, there)| *there);
                train::ahead(&model, &asked, &batch, &segments, key, &mut workspace, &mut begun);
            }
            // What was computed with is gone, but for later layers; the rest comes.
            for i in 0..layout.chunks() {
                let range = layout.chunk(i);
                let used = asked.1.borrow().iter().any(|(asked, there)| *there && asked.start <= range.start);
                let values =
                    if used && range.end <= first { vec![f32::NAN; range.len()] } else { whole[range].to_vec() };
                put(i, &values);
            }
            let mut gradient = vec![f32::NAN; layout.len()];
            let reading = Reading::whole(&weights, Version::of(Step(step)));
            train::forward(&model, &reading, &batch, &segments, key, &mut workspace, begun).expect("all are there");
            let (values, work) = (reading.get(0..layout.len()).expect("all"), &mut workspace);
            let sums = train::backward(
                &model,
                &loss,
                values,
                &batch,
                &segments,
                key,
                work,
                &mut gradient,
                &mut [],
                &mut |_, _| {},
            );
            (0..layout.chunks()).for_each(|i| weights.say(i, step - 2));
            assert!(sums.loss.is_finite());
            (asked.1.into_inner(), sums.loss.to_bits(), gradient.iter().map(|g| g.to_bits()).collect::<Vec<_>>())
        };
        let (none, loss, gradient) = pools[0].install(|| run(0));
        assert!(none.len() == 1 && !none[0].1, "{none:?}");
        for (pool, ahead) in pools.iter().flat_map(|pool| (1..=layout.chunks()).map(move |ahead| (pool, ahead))) {
            let (asked, some_loss, some_gradient) = pool.install(|| run(ahead));
            assert!(some_loss == loss && some_gradient == gradient, "with {ahead} chunks ahead: {asked:?}");
            let from = layout.chunk(layout.chunks() - ahead).start;
            assert!(
                asked.iter().all(|(range, there)| *there == (range.start >= from) && range.end == first),
                "{asked:?}"
            );
            assert!(asked.is_sorted_by(|a, b| a.0.start > b.0.start), "{asked:?}");
            assert_eq!(asked.last().is_some_and(|(range, there)| *there && range.start == 0), ahead == layout.chunks());
            assert!(asked.len() > 2 || ahead < 3, "{asked:?}");
        }
    }

    #[test]
    fn a_forward_pass_runs_as_far_as_weights_have_come() {
        let spec = Spec::Mlp { hidden: vec![300, 300], activation: Activation::Relu, dropout: 0.0 };
        let model = Model::build(&spec, &Signature::new(&[500], 3)).expect("a model");
        let (layout, whole) = (model.layout(), model.layout().init(1));
        let batch =
            Batch { inputs: vec![0.5; 1000], targets: Targets::Class(vec![0, 2]), samples: 2, ..Batch::empty() };
        let (segments, key) = (Segments::one(2), Key::new(1, Purpose::Dropout));
        let mut workspace = Workspace::new(&model, 2, 1);
        assert_eq!(layout.chunks(), 4);
        let layers = [0..500 * 300 + 300, 150_300..150_300 + 300 * 300 + 300, 240_600..layout.len()];

        let (coming, mut incoming) = Coming::new(layout).expect("memory");
        let mut put = |index, step| {
            incoming.room(index, step).expect("its turn").copy_from_slice(&whole[layout.chunk(index)]);
            incoming.arrived(index, step);
        };
        let (tell, told) = mpsc::channel();
        std::thread::scope(|scope| {
            let pass = scope.spawn(|| {
                let source = Told(Reading::coming(&coming, Version::of(Step(7))).expect("it is open"), tell);
                train::forward(&model, &source, &batch, &segments, key, &mut workspace, Ahead::default())?;
                Some(source.0.waited())
            });
            // Each layer runs as soon as its last chunk is there, and the next one waits for its own.
            for (layer, chunks) in layers.into_iter().zip([vec![1, 0, 2], vec![3], vec![]]) {
                let next = || told.recv().expect("the pass runs");
                assert_eq!(next(), (layer.clone(), false));
                for chunk in chunks {
                    let early = told.recv_timeout(Duration::from_millis(20));
                    assert!(early.is_err(), "chunk {chunk} has not come: {early:?}");
                    put(chunk, Version::of(Step(7)));
                }
                assert_eq!(next(), (layer, true));
            }
            assert!(pass.join().expect("no panic").expect("all came") > Duration::ZERO);
        });
        // Those of the step after the next would lie over them; whose reader has gone, may.
        let reading = Reading::coming(&coming, Version::of(Step(7))).expect("it is open");
        assert_eq!(reading.get(0..layout.len()), Some(&whole[..]));
        assert!(incoming.room(0, Version::of(Step(9))).is_none() && incoming.room(0, Version::of(Step(7))).is_none());
        drop(reading);
        assert!(incoming.room(0, Version::of(Step(9))).is_some());
        assert!(Reading::coming(&coming, Version::of(Step(7))).is_none());

        // A pass waits for ever neither where its step was committed without it, nor where the session ends.
        let ends = |step, end: &mut dyn FnMut()| {
            std::thread::scope(|scope| {
                let reading = Reading::coming(&coming, step).expect("it may come");
                let waiting = scope.spawn(move || reading.get(0..1).is_some());
                std::thread::sleep(Duration::from_millis(20));
                assert!(!waiting.is_finished(), "nothing has come");
                end();
                assert!(!waiting.join().expect("no panic"));
            });
        };
        ends(Version::of(Step(10)), &mut || {
            for index in 0..layout.chunks() {
                incoming.room(index, Version::of(Step(11))).expect("its turn");
                incoming.arrived(index, Version::of(Step(11)));
            }
        });
        ends(Version::of(Step(12)), &mut || coming.close());
        assert!(incoming.room(0, Version::of(Step(12))).is_none());
    }
}
