use super::*;
use proptest::prelude::*;

fn job(source: job::Source, normalize: bool) -> job::Data {
    job::Data { source, normalize, ship: None, hashed: false, augment: None, on_error: job::OnError::Stop }
}

fn synthetic(task: job::Task) -> job::Source {
    job::Source::Synthetic { task, shape: vec![5], classes: 3, samples: 400, test_samples: 50 }
}

fn dataset() -> impl Strategy<Value = Dataset> {
    (prop::collection::vec(1usize..4, 1..4), 0usize..6, 0..6, 0usize..3, any::<u64>()).prop_map(
        |(shape, samples, kind, fields, seed)| {
            let fields = if kind == 5 { 2 } else { fields };
            let key = crate::rng::Key::new(seed, crate::rng::Purpose::Synthetic);
            let values = 0..(samples * shape.iter().product::<usize>()) as u64;
            let features = match kind {
                0 | 1 => Features::U8(values.map(|i| key.u64(i) as u8).collect()),
                2 | 3 => Features::F32(values.map(|i| key.normal(i)).collect()),
                _ => Features::U32(values.map(|i| key.u64(i) as u32).collect()),
            };
            let targets = match kind {
                0 | 2 => Targets::Class((0..samples as u64).map(|i| key.u64(i) as u32).collect()),
                1 | 3 => Targets::Value((0..samples as u64).map(|i| key.uniform(i)).collect()),
                4 => Targets::Next,
                _ => Targets::Seen(Seen::new((0..9).map(|i| (key.u64(i), i as u32)).collect()).into()),
            };
            let ids = Ids {
                fields,
                values: (0..(samples * fields) as u64).map(|i| key.u64(i)).collect(),
                factors: (0..if seed.is_multiple_of(2) { samples * fields } else { 0 } as u64)
                    .map(|i| key.normal(i))
                    .collect(),
            };
            let weighed = matches!(targets, Targets::Class(_) | Targets::Value(_)) && seed % 3 == 0;
            let weights = (0..if weighed { samples as u64 } else { 0 }).map(|i| key.uniform(i)).collect();
            Dataset { shape, features, ids, targets, weights }
        },
    )
}

/// Mean and deviation of each of `width` interleaved values.
fn moments(values: &[f32], width: usize) -> Vec<(f64, f64)> {
    let column = |f: usize| values.iter().skip(f).step_by(width).map(|&x| x as f64);
    let n = (values.len() / width) as f64;
    let each = |f: usize| {
        let mean = column(f).sum::<f64>() / n;
        (mean, (column(f).map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt())
    };
    (0..width).map(each).collect()
}

fn inputs(opened: &Opened) -> Vec<f32> {
    let mut batch = Batch::empty();
    batch.fill(&opened.train, &opened.prepared, 0..opened.train.samples(), None, true);
    assert_eq!(batch.samples, opened.train.samples());
    batch.inputs
}

#[test]
fn what_is_read_has_one_form_without_samples_too() {
    let empty = Dataset {
        shape: vec![1],
        features: Features::U8(vec![]),
        ids: Ids::default(),
        targets: Targets::Class(vec![]),
        weights: vec![],
    };
    for (at, value) in (0..empty.to_bytes().len()).flat_map(|at| (0..=255).map(move |value| (at, value))) {
        let mut bytes = empty.to_bytes();
        bytes[at] = value;
        if let Ok(read) = Dataset::from_bytes(&bytes) {
            assert_eq!(read.to_bytes(), bytes, "{value} at {at}");
        }
    }
}

proptest! {
    #[test]
    fn bytes_and_back_are_the_same_data(set in dataset()) {
        let bytes = set.to_bytes();
        prop_assert_eq!(Dataset::from_bytes(&bytes).unwrap(), set.clone());
        prop_assert_eq!(*blake3::hash(&bytes).as_bytes(), set.digest());
    }

    #[test]
    fn every_cut_and_every_addition_is_refused(set in dataset(), at in any::<prop::sample::Index>()) {
        let mut bytes = set.to_bytes();
        prop_assert!(Dataset::from_bytes(&bytes[..at.index(bytes.len())]).is_err());
        bytes.push(0);
        prop_assert!(Dataset::from_bytes(&bytes).is_err());
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Dataset::from_bytes(&bytes);
    }

    #[test]
    fn a_damaged_header_never_panics_and_takes_no_memory(set in dataset(), at in 0usize..35, value in any::<u8>()) {
        let mut bytes = set.to_bytes();
        let at = at.min(bytes.len() - 1);
        bytes[at] = value;
        if let Ok(read) = Dataset::from_bytes(&bytes) {
            prop_assert!(read.samples() <= bytes.len());
            prop_assert_eq!(read.to_bytes(), bytes);
        }
    }

    #[test]
    fn a_batch_is_its_rows_one_after_another(set in dataset(), rows in prop::collection::vec(any::<prop::sample::Index>(), 0..8), each in any::<bool>()) {
        prop_assume!(set.samples() > 0 && !matches!(set.targets, Targets::Next | Targets::Seen(_)));
        let rows: Vec<usize> = rows.iter().map(|i| i.index(set.samples())).collect();
        let width = set.sample_len();
        let (mean, inv_std) = if each { ((0..width).map(|f| f as f32).collect(), vec![0.5; width]) } else { (vec![1.0], vec![0.5]) };
        let opened = Raw::new(set.clone(), None, None, Scale { per_feature: false, unit: 1.0 }).prepare(false);
        let prepared = Prepared { mean: mean.clone(), inv_std, ..opened.prepared };
        let mut batch = Batch::empty();
        batch.fill(&set, &prepared, 0..1, None, false);
        let (first, second) = rows.split_at(rows.len() / 2);
        batch.fill(&set, &prepared, first.iter().copied(), None, false);
        batch.fill(&set, &prepared, second.iter().copied(), None, true);
        let chosen = set.select(&rows);
        let raw = match chosen.features { Features::U8(v) => v.into_iter().map(f32::from).collect(), Features::F32(v) => v, Features::U32(_) => panic!("tokens") };
        let want: Vec<f32> = raw.iter().enumerate().map(|(i, x)| (x - mean[i % width % mean.len()]) * 0.5).collect();
        prop_assert_eq!((batch.inputs, batch.ids, batch.samples), (want, chosen.ids.values, rows.len()));
        prop_assert_eq!((batch.factors, batch.weights), (chosen.ids.factors, chosen.weights));
        // With no rows there is nothing to compare but the kind.
        prop_assert_eq!(batch.targets, chosen.targets);
    }
}

#[test]
fn a_filled_batch_takes_no_more_memory() {
    let opened = open(&Files::default(), &job(job::Source::Digits, true), 1).unwrap();
    let mut batch = Batch::empty();
    batch.fill(&opened.train, &opened.prepared, 0..32, None, false);
    let at = (batch.inputs.as_ptr(), batch.inputs.capacity());
    for start in 1..100 {
        batch.fill(&opened.train, &opened.prepared, start..start + 32, None, false);
    }
    assert_eq!((batch.inputs.as_ptr(), batch.inputs.capacity()), at);
}

#[test]
fn normalised_training_features_have_mean_0_and_deviation_1() {
    for (source, width) in
        [(job::Source::Digits, 1), (synthetic(job::Task::Classification), 5), (synthetic(job::Task::Regression), 5)]
    {
        let opened = open(&Files::default(), &job(source, true), 3).unwrap();
        assert_eq!(opened.prepared.mean.len(), width);
        for (mean, deviation) in moments(&inputs(&opened), width) {
            assert!(mean.abs() < 1e-5 && (deviation - 1.0).abs() < 1e-5, "{mean} {deviation}");
        }
    }
}

#[test]
fn a_constant_feature_becomes_0() {
    // 0.1 is not a binary fraction: a plain sum of it is not n times it.
    let rows: Vec<f32> = (0..1000).flat_map(|i| [0.1, i as f32]).collect();
    let (mean, inv_std) = statistics(&rows, 2, 1);
    assert_eq!((mean[0], inv_std[0]), (0.1, 1.0));
    assert!(inv_std[1] < 1.0);
}

#[test]
fn without_normalisation_pixels_are_in_0_to_1() {
    let opened = open(&Files::default(), &job(job::Source::Digits, false), 3).unwrap();
    assert_eq!(inputs(&opened).into_iter().fold((1f32, 0f32), |(a, b), x| (a.min(x), b.max(x))), (0.0, 1.0));
    let opened = open(&Files::default(), &job(synthetic(job::Task::Regression), false), 3).unwrap();
    assert_eq!(Features::F32(inputs(&opened)), opened.train.features);
}

#[test]
fn outputs_follow_classes_and_loss() {
    let classes = |n: usize| Prepared {
        classes: (n > 0).then(|| numbered(n)),
        ..open(&Files::default(), &job(job::Source::Digits, false), 0).unwrap().prepared
    };
    let cross = job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None };
    let binary = job::Loss::BinaryCrossEntropy { positive_weight: 1.0 };
    for (loss, n, outputs) in [
        (&cross, 2, 2),
        (&cross, 7, 7),
        (&binary, 2, 1),
        (&binary, 3, 1),
        (&job::Loss::Hinge { class_weights: None }, 2, 1),
        (&job::Loss::Hinge { class_weights: None }, 3, 3),
        (&job::Loss::Focal { gamma: 1.0, class_weights: None }, 2, 1),
        (&job::Loss::Focal { gamma: 1.0, class_weights: None }, 3, 3),
        (&job::Loss::Mse, 0, 1),
    ] {
        assert_eq!(classes(n).outputs(loss), outputs, "{loss:?} {n}");
    }
}

#[test]
fn the_digest_tells_data_apart() {
    let digest = |seed| open(&Files::default(), &job(job::Source::Digits, true), seed).unwrap().prepared.digest;
    assert_eq!(digest(1), digest(1));
    assert_ne!(digest(1), digest(2));
    assert_eq!(digest(1).len(), 64);
}
