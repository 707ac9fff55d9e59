use super::*;
use unisono_common::job;
use unisono_common::layout::{CHUNK, Init, Kind, Tensor};
use unisono_common::optim::{self, Lengths, Optimizer};

/// The chunks that came, each with its first weight.
#[derive(Default)]
struct Kept(Mutex<Vec<(usize, f32)>>);

impl Keep for Kept {
    fn chunk(&self, index: usize, weights: &[f32], _: &[Vec<f32>]) {
        lock(&self.0).push((index, weights[0]));
    }

    fn rows(&self, _: &RowBlock) {}
}

#[test]
fn an_open_steps_weights_stay_until_it_is_committed() {
    let tensor = |name: &str, len| Tensor {
        name: name.into(),
        shape: vec![len],
        role: Role::Trainable,
        kind: Kind::Weight,
        init: Init::Constant(1.0),
    };
    let layout = Arc::new(Layout::new(vec![tensor("a", CHUNK), tensor("b", 5)]));
    let sgd = job::Optimizer::Sgd { lr: 1.0, momentum: 0.0, dampening: 0.0, nesterov: false, weight_decay: 0.0 };
    let done = Arc::new(AtomicUsize::new(0));
    let (counted, weights) = (done.clone(), layout.init(0));
    let count = move |_: Applied| {
        counted.fetch_add(1, Ordering::SeqCst);
    };
    let groups = Groups::new(Optimizer::new(&sgd, None), &[], &layout).expect("no groups");
    let store = Store::new(layout, None, groups, Clip::default(), 1, Step(7), &weights, &[], 1, Box::new(count))
        .expect("memory");
    let sums = LossSums { loss: 1.0, weight: 2.0, samples: 2 };
    let push = |step, index: usize, len: usize| {
        if store.add(step, Node { lo: 0, hi: 1 }, sums, index, Gradient::Sum(vec![4.0; len])) {
            store.complete(index);
        }
    };
    let version = |index, than| {
        let sent = store.next_of(index, than)?;
        assert_eq!(sent.checksum, Some(unisono_proto::checksum(&sent.bytes)));
        Some((sent.version, sent.bytes[..4].to_vec()))
    };
    let of = |step| Version::of(Step(step));
    let value = |v: f32| v.to_le_bytes().to_vec();

    store.begin(1.0);
    push(Step(7), 0, CHUNK);
    push(Step(7), 0, CHUNK);
    assert_eq!(done.load(Ordering::SeqCst), 0, "one chunk is not a step");
    let said = |step| [0, 1].map(|index| store.weights.has(step, store.layout.chunk(index)));
    assert_eq!((said(7), said(8)), ([false, false], [true, false]), "who looks ahead sees what has changed");
    assert!(!store.is_at(Step(7)) && !store.is_at(Step(8)), "half a step would be kept");
    // Who joins now still gets the open step's weights of every chunk, and then what is already there of the next.
    assert_eq!(version(0, None), Some((of(7), value(1.0))));
    assert_eq!(version(0, Some(of(7))), Some((of(8), value(-1.0))));
    assert_eq!(version(0, Some(of(8))), None);
    assert_eq!(version(0, None), Some((of(7), value(1.0))));
    assert_eq!(version(1, None), Some((of(7), value(1.0))));
    assert_eq!(version(1, Some(of(7))), None);

    push(Step(7), 1, 5);
    assert_eq!(done.load(Ordering::SeqCst), 1);
    assert!(store.is_at(Step(8)));
    // A checkpoint is promised the state of now: the update of chunk 0 gives it away before it changes it.
    let kept = Arc::new(Kept::default());
    let keep = kept.clone() as Arc<dyn Keep>;
    assert!(!store.keep(Step(7), &keep) && store.keep(Step(8), &keep));
    store.begin(1.0);
    assert_eq!(version(0, None), Some((of(8), value(-1.0))));
    // Where somebody listens, an update makes what is sent; what is on its way stays as it was.
    let _stream = store.changes();
    let on_its_way = store.next_of(0, None).expect("there is a version");
    push(Step(8), 0, CHUNK);
    assert_eq!(version(0, Some(of(8))), Some((of(9), value(-3.0))));
    assert_eq!(version(0, None), Some((of(8), value(-1.0))));
    assert_eq!(on_its_way.bytes[..4], value(-1.0));
    assert!(!lock(&store.chunks[0]).copies.any_waits(), "all streams have taken it");
    assert!(!store.keep(Step(8), &keep) && !store.keep(Step(9), &keep), "half a step would be kept");
    store.flush(&*kept);
    store.flush(&*kept);
    assert_eq!(*lock(&kept.0), [(0, -1.0), (1, -1.0)]);
    let of_all = |sent: [u64; 2]| store.next(&sent.map(of).map(Some)).map(|(index, sent)| (index, sent.version.step.0));
    assert_eq!((of_all([7, 7]), of_all([8, 7]), of_all([9, 8])), (Some((0, 8)), Some((0, 9)), None));
    push(Step(8), 1, 5);
    assert_eq!((of_all([8, 8]), of_all([9, 8]), of_all([9, 9])), (Some((0, 9)), Some((1, 9)), None));
    drop(store.next_of(1, Some(of(8))));
    // Where nothing gets through, updates make no more than so many.
    let mut stuck = vec![on_its_way];
    for step in 9..9 + copies::AT_ONCE as u64 {
        store.begin(1.0);
        push(Step(step), 0, CHUNK);
        push(Step(step), 1, 5);
        drop(store.next_of(1, Some(of(step))));
        let made = lock(&store.chunks[0]).copies.any_waits();
        assert_eq!(made, stuck.len() < copies::AT_ONCE, "{} are on their way", stuck.len());
        stuck.extend(store.next_of(0, Some(of(step))));
    }
    assert!(stuck.len() > copies::AT_ONCE);
    drop(stuck);
    assert_eq!(Arc::strong_count(&store.spare), 1, "all buffers are back");
}

/// A tensor that lies in several chunks moves as one, and its average is shown between two steps.
#[test]
fn lamb_looks_at_whole_tensors_and_averages_are_sent_until_the_next_step() {
    let tensor = |name: &str, len, std| Tensor {
        name: name.into(),
        shape: vec![len],
        role: Role::Trainable,
        kind: Kind::Weight,
        init: Init::Normal { std },
    };
    let layout = Arc::new(Layout::new(vec![tensor("a", 7, 0.1), tensor("b", 2 * CHUNK, 1.0), tensor("c", 9, 10.0)]));
    let lamb = job::Optimizer::Lamb { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-6, weight_decay: 0.01 };
    let optimizer = Optimizer::new(&lamb, Some(0.75));
    let groups = Groups::new(optimizer, &[], &layout).expect("no groups");
    let mut weights = layout.init(3);
    let done: Box<dyn Fn(Applied) + Send + Sync> =
        Box::new(|applied| assert!(matches!(applied, Applied::Done { .. }), "{applied:?}"));
    let clip = Clip { norm: Some(5.0), value: None };
    let store =
        Store::new(layout.clone(), None, groups.clone(), clip, 1, Step(0), &weights, &[], 2, done).expect("memory");
    let sums = LossSums { loss: 1.0, weight: 4.0, samples: 4 };
    let mut slots = groups.optimizer().first_slots(&weights);
    for step in 0..3u64 {
        let gradient: Vec<f32> = (0..layout.len()).map(|i| ((i as u64 * 37 + step * 11) % 101) as f32 - 40.0).collect();
        store.begin(0.5);
        for i in (0..layout.chunks()).rev() {
            let values = gradient[layout.chunk(i)].to_vec();
            assert!(store.add(Step(step), Node { lo: 0, hi: 1 }, sums, i, Gradient::Sum(values)));
            assert!((0..layout.chunks()).all(|i| !store.weights.has(step + 1, layout.chunk(i))), "directions only");
            store.complete(i);
        }
        let mean: Vec<f32> = gradient.iter().map(|g| g * 0.25).collect();
        let factor = optim::clip_factor(optim::sum_squares(&mean).sqrt() as f32, 5.0);
        for part in groups.parts(0..layout.len()) {
            let (at, update) = (part.range, part.optimizer.at(step + 1, 0.5));
            let mut state: Vec<&mut [f32]> = slots.iter_mut().map(|slot| &mut slot[at.clone()]).collect();
            let (w, mut out) = (&mut weights[at.clone()], vec![0.0; at.len()]);
            assert!(update.run(w, Sums { factor, ..Sums::mean(&mean[at.clone()]) }, &mut state, &mut out));
            assert!(update.along(w, Lengths::of(w, &out).ratio(), &mut state, &mut out));
            w.copy_from_slice(&out);
        }
        store.show_average();
        for i in 0..layout.chunks() {
            let now = Version::of(Step(step + 1));
            let [(first, new), (second, average)] = [None, Some(now)].map(|than| {
                let sent = store.next_of(i, than).expect("there are two");
                let values: Vec<f32> = sent.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                (sent.version, values)
            });
            assert_eq!((first, second), (now, Version { average: true, ..now }));
            assert!(store.next_of(i, Some(second)).is_none() && store.next(&[Some(second); 3]).is_none());
            // Lengths are added up chunk by chunk here, and all at once there.
            let close = |got: &[f32], want: &[f32]| got.iter().zip(want).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs());
            assert!(close(&new, &weights[layout.chunk(i)]) && close(&average, &slots[2][layout.chunk(i)]), "{step}");
            assert!(step == 0 || new != average);
            assert!(store.weights.has(step + 1, layout.chunk(i)), "the average is beside them");
        }
        assert!(store.is_at(Step(step + 1)));
    }
    store.begin(1.0);
    assert!(store.next_of(0, Some(Version::of(Step(3)))).is_none(), "the average is over");
}
