use super::*;
use proptest::prelude::*;

fn kinds() -> Vec<(job::Loss, usize)> {
    vec![
        (job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None }, 4),
        (job::Loss::CrossEntropy { label_smoothing: 0.1, class_weights: Some(vec![0.5, 1.0, 2.0, 1.5]) }, 4),
        (job::Loss::BinaryCrossEntropy { positive_weight: 2.5 }, 1),
        (job::Loss::Mse, 1),
        (job::Loss::Mae, 1),
        (job::Loss::Huber { delta: 0.7 }, 1),
        (job::Loss::Focal { gamma: 2.0, class_weights: None }, 1),
        (job::Loss::Focal { gamma: 0.5, class_weights: Some(vec![0.5, 1.0, 2.0, 1.5]) }, 4),
        (job::Loss::Hinge { class_weights: Some(vec![0.5, 3.0]) }, 1),
        (job::Loss::Hinge { class_weights: None }, 4),
    ]
}

proptest! {
    #[test]
    fn gradients_are_finite_differences(x in prop::collection::vec(-3.0f32..3.0, 4), y in 0u32..4) {
        for (kind, n) in kinds() {
            let loss = Loss::new(&kind, n).unwrap();
            let targets = Targets::Class(vec![if n == 1 { y % 2 } else { y }]);
            let at = |x: &[f32]| loss.forward_backward(x, &targets, &[], 0..1, &mut vec![0.0; n]).loss;
            let mut d = vec![0.0; n];
            loss.forward_backward(&x[..n], &targets, &[], 0..1, &mut d);
            for i in 0..n {
                let (mut up, mut down) = (x[..n].to_vec(), x[..n].to_vec());
                up[i] += 1e-3;
                down[i] -= 1e-3;
                let slope = |a: &[f32], b: &[f32]| (at(a) - at(b)) / (a[i] - b[i]) as f64;
                // Beside a kink (of mae, of hinge) the slope of one side is right.
                let slopes = [slope(&up, &down), slope(&up, &x[..n]), slope(&x[..n], &down)];
                let right = slopes.iter().any(|slope| (slope - d[i] as f64).abs() < 2e-3);
                prop_assert!(right, "{kind:?} {slopes:?} {}", d[i]);
            }
        }
    }
}

proptest! {
    #[test]
    fn bpr_compares_each_sample_with_its_own_candidates(
        samples in prop::collection::vec(prop::collection::vec(-4.0f32..4.0, 1..6), 1..5), skipped in 0usize..3,
    ) {
        let loss = Loss::new(&job::Loss::Bpr, 1).unwrap();
        let before = samples.len().min(skipped);
        let x: Vec<f32> = samples.concat();
        let chosen: Vec<f32> = samples.iter().flat_map(|s| (0..s.len()).map(|i| if i == 0 { 1.0 } else { 0.0 })).collect();
        let targets = Targets::Value(chosen);
        let rows = samples[..before].iter().map(Vec::len).sum()..x.len();
        let mut d = vec![7.0; x.len()];
        let sums = loss.forward_backward(&x, &targets, &[], rows.clone(), &mut d);
        prop_assert!(d[..rows.start].iter().all(|d| *d == 7.0), "other rows are touched");
        // By its definition, in f64.
        let of = |x: &[f64]| -> f64 {
            let (mut at, mut sum) = (rows.start, 0.0);
            for sample in &samples[before..] {
                let own = x[at];
                sum += x[at + 1..at + sample.len()].iter().map(|x| -(1.0 / (1.0 + (x - own).exp())).ln()).sum::<f64>();
                at += sample.len();
            }
            sum
        };
        let exact: Vec<f64> = x.iter().map(|x| *x as f64).collect();
        let pairs: usize = samples[before..].iter().map(|sample| sample.len() - 1).sum();
        prop_assert!((sums.loss - of(&exact)).abs() < 1e-9 * (1.0 + sums.loss));
        prop_assert_eq!(sums.weight, pairs as f64);
        for i in rows.clone() {
            let (mut up, mut down) = (exact.clone(), exact.clone());
            up[i] += 1e-5;
            down[i] -= 1e-5;
            let slope = (of(&up) - of(&down)) / 2e-5;
            prop_assert!((slope - d[i] as f64).abs() < 1e-5, "{slope} {}", d[i]);
        }
    }
}

#[test]
fn bpr_stays_finite_and_is_for_implicit_feedback_alone() {
    let loss = Loss::new(&job::Loss::Bpr, 1).unwrap();
    for x in [[1e30f32, -1e30], [-1e30, 1e30], [f32::MAX, f32::MIN]] {
        let mut d = [0.0; 2];
        let sums = loss.forward_backward(&x, &Targets::Value(vec![1.0, 0.0]), &[], 0..2, &mut d);
        assert!(sums.loss.is_finite() && d.iter().all(|d| d.is_finite()), "{x:?} {sums:?} {d:?}");
    }
    let seen = Targets::Seen(Default::default());
    assert!(loss.check_targets(&seen).is_ok());
    assert!(loss.check_targets(&Targets::Value(vec![1.0])).unwrap_err().to_string().contains("data.implicit"));
    let binary = Loss::new(&job::Loss::BinaryCrossEntropy { positive_weight: 1.0 }, 1).unwrap();
    assert!(binary.check_targets(&seen).is_ok());
    let mse = Loss::new(&job::Loss::Mse, 1).unwrap();
    assert!(mse.check_targets(&seen).unwrap_err().to_string().contains("data.implicit"));
    assert!(matches!(Loss::new(&job::Loss::Bpr, 2), Err(LossError::Outputs { .. })));
}

#[test]
fn saturated_logits_stay_finite() {
    for (kind, n) in kinds() {
        let loss = Loss::new(&kind, n).unwrap();
        for x in [1e4f32, -1e4] {
            let mut d = vec![0.0; n];
            let sums = loss.forward_backward(&vec![x; n], &Targets::Class(vec![1]), &[], 0..1, &mut d);
            assert!(sums.loss.is_finite() && d.iter().all(|d| d.is_finite()), "{kind:?}");
        }
    }
}

/// Numbers of classes around the lanes and the values of a block, with and without smoothing and weights.
#[test]
fn a_rows_bits_do_not_depend_on_the_rows_beside_it() {
    let key = crate::rng::Key::new(1, crate::rng::Purpose::Synthetic);
    for (n, smooth) in [2, 10, 15, 16, 33, 130, 5000].into_iter().flat_map(|n| [(n, false), (n, true)]) {
        let class_weights = smooth.then(|| (0..n as u64).map(|i| key.uniform(i)).collect());
        let label_smoothing = if smooth { 0.1 } else { 0.0 };
        let loss = Loss::new(&job::Loss::CrossEntropy { label_smoothing, class_weights }, n).unwrap();
        let rows = 70;
        let x: Vec<f32> = (0..(rows * n) as u64).map(|i| 3.0 * key.normal(i)).collect();
        let targets = Targets::Class((0..rows as u64).map(|i| key.below(i, n as u64) as u32).collect());
        let mut together = vec![0.0; x.len()];
        let sums = loss.forward_backward(&x, &targets, &[], 0..rows, &mut together);
        let mut apart = vec![0.0; x.len()];
        let each = (0..rows).map(|row| loss.forward_backward(&x, &targets, &[], row..row + 1, &mut apart));
        assert_eq!(each.fold(LossSums::default(), |a, b| a + b), sums, "{n}");
        assert_eq!(apart, together, "{n}");
        // The gradient of a row sums to nothing.
        assert!(together.chunks(n).all(|d| d.iter().sum::<f32>().abs() < 1e-5), "{n}");
    }
}

#[test]
fn a_logit_that_is_not_a_number_spoils_the_loss() {
    let loss = Loss::new(&job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None }, 20).unwrap();
    for (at, bad) in [(3, f32::NAN), (18, f32::NAN), (3, f32::INFINITY), (18, f32::INFINITY)] {
        let (mut x, mut d) = (vec![0.5; 20], vec![0.0; 20]);
        x[at] = bad;
        let sums = loss.forward_backward(&x, &Targets::Class(vec![1]), &[], 0..1, &mut d);
        assert!(!sums.loss.is_finite() && !d[1].is_finite(), "{bad} at {at}: {sums:?}");
    }
}

proptest! {
    #[test]
    fn a_weight_is_how_often_a_target_is_there(x in prop::collection::vec(-3.0f32..3.0, 12), y in prop::collection::vec(0u32..4, 3)) {
        for (kind, n) in kinds() {
            let loss = Loss::new(&kind, n).unwrap();
            let labels: Vec<u32> = y.iter().map(|y| if n == 1 { y % 2 } else { *y }).collect();
            let x = &x[..3 * n];
            let (mut weighed, mut plain) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            let sums = loss.forward_backward(x, &Targets::Class(labels.clone()), &[2.0, 0.0, 1.0], 0..3, &mut weighed);
            let twice = [&x[..n], &x[..n], &x[2 * n..]].concat();
            let targets = Targets::Class(vec![labels[0], labels[0], labels[2]]);
            let want = loss.forward_backward(&twice, &targets, &[], 0..3, &mut plain);
            prop_assert!((sums.loss - want.loss).abs() < 1e-9 && (sums.weight - want.weight).abs() < 1e-9, "{kind:?}");
            for (i, d) in weighed.iter().enumerate() {
                let want = [plain[i] + plain[n + i % n], 0.0, plain[i]][i / n];
                prop_assert!((d - want).abs() < 1e-6, "{kind:?} {i}: {d} {want}");
            }
            // The rows before do not change which weight is whose.
            let mut apart = vec![0.0; x.len()];
            let targets = Targets::Class(labels.clone());
            let last = loss.forward_backward(x, &targets, &[2.0, 0.0, 1.0], 2..3, &mut apart);
            prop_assert_eq!(&apart[2 * n..], &weighed[2 * n..]);
            let mut d = vec![0.0; n];
            let alone = Targets::Class(vec![labels[2]]);
            let want = loss.forward_backward(&x[2 * n..], &alone, &[], 0..1, &mut d);
            prop_assert_eq!((last.weight, last.loss), (want.weight, want.loss));
        }
    }
}

#[test]
fn each_class_needs_a_weight() {
    let focal = |weights: &[f32]| job::Loss::Focal { gamma: 2.0, class_weights: Some(weights.into()) };
    assert_eq!(Loss::new(&focal(&[1.0]), 1).err(), Some(LossError::ClassWeights { got: 1, want: 2 }));
    assert_eq!(Loss::new(&focal(&[1.0; 2]), 3).err(), Some(LossError::ClassWeights { got: 2, want: 3 }));
    assert!(Loss::new(&focal(&[1.0; 2]), 1).is_ok());
}

#[test]
fn a_class_out_of_range_is_named() {
    let loss = Loss::new(&job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None }, 3).unwrap();
    let error = loss.check_targets(&Targets::Class(vec![0, 2, 3])).unwrap_err();
    assert_eq!(error, LossError::Class { sample: 2, class: 3, classes: 3 });
}
