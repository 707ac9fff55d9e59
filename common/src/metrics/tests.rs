use super::*;
use ndarray::Array2;
use proptest::prelude::*;

proptest! {
    #[test]
    fn ranks_are_those_of_a_sorted_list_and_ties_count_against_a_sample(
        // Few values: many ties.
        samples in prop::collection::vec(prop::collection::vec(0u8..6, 1..9), 0..12), k in 1u32..6, cut in 0usize..12,
    ) {
        let kind = EvalKind::Ranking { k };
        let of = |samples: &[Vec<u8>]| {
            let scores: Vec<f32> = samples.concat().iter().map(|x| *x as f32 - 2.5).collect();
            let chosen = samples.iter().flat_map(|s| (0..s.len()).map(|i| if i == 0 { 1.0 } else { 0.0 })).collect();
            let mut sums = EvalSums::new(kind);
            let logits = Array2::from_shape_vec((scores.len(), 1), scores).unwrap();
            sums.add_batch(&Loss::new(&crate::job::Loss::Bpr, 1).unwrap(), logits.view(), &Targets::Value(chosen), &[]);
            sums
        };
        let (mut hits, mut gain) = (0, 0.0);
        for sample in &samples {
            let mut sorted = sample.clone();
            sorted.sort_unstable_by(|a, b| b.cmp(a));
            // The last place of those with the same score.
            let rank = sorted.iter().rposition(|score| *score == sample[0]).unwrap() + 1;
            if rank <= k as usize {
                hits += 1;
                gain += 1.0 / (1.0 + rank as f64).log2();
            }
        }
        let sums = of(&samples);
        let n = samples.len().max(1) as f64;
        let summary = sums.summary();
        prop_assert_eq!(sums.targets(), samples.len() as u64);
        prop_assert_eq!((summary.hit_rate, summary.k), (Some(hits as f64 / n), Some(k)));
        prop_assert!((summary.ndcg.unwrap() - gain / n).abs() < 1e-12);
        prop_assert!(summary.rmse.is_none() && summary.accuracy.is_none() && summary.auc.is_none());
        prop_assert!(kind.metrics().iter().all(|metric| summary.get(*metric).is_some()));
        let (a, b) = samples.split_at(cut.min(samples.len()));
        let merged = of(a).merge(of(b));
        prop_assert_eq!((merged.correct, merged.targets()), (sums.correct, sums.targets()));
        prop_assert!((merged.gain - sums.gain).abs() < 1e-12);
        // Over the wire and back; what cannot be is refused.
        let (parts, counts) = sums.to_parts();
        prop_assert_eq!(EvalSums::from_parts(kind, &parts, &counts), Some(sums.clone()));
        let with = |at: usize, value: f64| {
            let mut parts = parts.clone();
            parts[at] = value;
            EvalSums::from_parts(kind, &parts, &counts)
        };
        let gain = parts.len() - 1;
        for impossible in [f64::NAN, -0.5, sums.correct as f64 + 0.5, f64::INFINITY] {
            prop_assert_eq!(with(gain, impossible), None);
        }
        prop_assert_eq!(EvalSums::from_parts(kind, &parts, &[counts[0], counts[0] + 1, 0]), None);
        prop_assert_eq!(EvalSums::from_parts(kind, &parts[..gain], &counts), None);
        prop_assert_eq!(EvalSums::from_parts(kind, &parts, &[&counts[..], &[0]].concat()), None);
    }

    /// The coefficient of determination by its definition, over the wire and back; the mean has 0, and what never differs none.
    #[test]
    fn r2_is_the_share_of_the_variance_that_is_explained(
        // Few targets: now and then all are the same; far from 0, where their squares say nothing of how they differ.
        rows in prop::collection::vec((-9.0f32..9.0, -2i8..2), 2..9), shift in prop_oneof![-1000..1000, 8_000_000..8_000_100], cut in 0usize..9,
    ) {
        let targets: Vec<f32> = rows.iter().map(|row| (shift + i32::from(row.1)) as f32).collect();
        let of = |predictions: &[f32], targets: &[f32]| {
            let mut sums = EvalSums::new(EvalKind::Regression);
            let outputs = Array2::from_shape_vec((predictions.len(), 1), predictions.to_vec()).unwrap();
            let loss = Loss::new(&crate::job::Loss::Mse, 1).unwrap();
            sums.add_batch(&loss, outputs.view(), &Targets::Value(targets.to_vec()), &[]);
            sums
        };
        let predictions: Vec<f32> = rows.iter().map(|row| shift as f32 + row.0).collect();
        let cut = cut.min(rows.len());
        let merged = of(&predictions[..cut], &targets[..cut]).merge(of(&predictions[cut..], &targets[cut..]));
        let (sums, counts) = merged.to_parts();
        prop_assert_eq!(EvalSums::from_parts(EvalKind::Regression, &sums, &counts), Some(merged.clone()));
        let mean = targets.iter().map(|y| f64::from(*y)).sum::<f64>() / targets.len() as f64;
        let spread: f64 = targets.iter().map(|y| (f64::from(*y) - mean).powi(2)).sum();
        let wrong: f64 = targets.iter().zip(&predictions).map(|(y, x)| f64::from(y - x).powi(2)).sum();
        match merged.summary().r2 {
            Some(r2) => prop_assert!((r2 - (1.0 - wrong / spread)).abs() < 1e-6 * (1.0 + wrong / spread), "{r2}"),
            None => prop_assert_eq!(spread, 0.0),
        }
        // Where a target can be their mean.
        if shift < 1000 {
            let means = vec![mean as f32; targets.len()];
            prop_assert!(of(&means, &targets).summary().r2.is_none_or(|r2| r2.abs() < 1e-5));
        }
        prop_assert_eq!(of(&targets, &targets).summary().r2.is_some(), spread > 0.0);
    }

    #[test]
    fn auc_is_the_share_of_ordered_pairs_and_sums_add_up(
        rows in prop::collection::vec((-4.0f32..4.0, 0u32..2), 2..80), cut in 0usize..80,
    ) {
        let loss = Loss::new(&crate::job::Loss::BinaryCrossEntropy { positive_weight: 1.0 }, 1).unwrap();
        let of = |rows: &[(f32, u32)]| {
            let mut sums = EvalSums::new(EvalKind::Binary);
            let logits = Array2::from_shape_fn((rows.len(), 1), |(i, _)| rows[i].0);
            let labels = Targets::Class(rows.iter().map(|r| r.1).collect());
            sums.add_batch(&loss, logits.view(), &labels, &[]);
            sums
        };
        let (a, b) = rows.split_at(cut.min(rows.len()));
        let merged = of(a).merge(of(b));
        let whole = of(&rows);
        prop_assert_eq!(merged.correct, whole.correct);
        prop_assert_eq!(&merged.histogram, &whole.histogram);
        let (sums, counts) = whole.to_parts();
        prop_assert_eq!(EvalSums::from_parts(EvalKind::Binary, &sums, &counts), Some(whole.clone()));
        prop_assert_eq!(EvalSums::from_parts(EvalKind::Classes { classes: 3, top: None }, &sums, &counts), None);
        let (mut pairs, mut all, mut in_one_bin) = (0.0, 0.0, 0.0);
        for p in rows.iter().filter(|r| r.1 == 1) {
            for n in rows.iter().filter(|r| r.1 == 0) {
                all += 1.0;
                in_one_bin += if bin(p.0) == bin(n.0) { 1.0 } else { 0.0 };
                pairs += if p.0 > n.0 { 1.0 } else if p.0 == n.0 { 0.5 } else { 0.0 };
            }
        }
        match whole.summary().auc {
            // Pairs that share a bin count half, whichever is larger.
            Some(auc) => prop_assert!((auc - pairs / all).abs() <= 0.5 * in_one_bin / all + 1e-12, "{auc}"),
            None => prop_assert_eq!(all, 0.0),
        }
    }
}
proptest! {
    /// F1, the accuracy among the top classes and the confusions by their definitions, with ties; over the wire and back.
    #[test]
    fn classes_are_counted(
        // Few values: many ties.
        rows in prop::collection::vec((prop::collection::vec(0u8..4, 5), 0u32..5), 1..40), top in 1u32..6, cut in 0usize..40,
    ) {
        let loss = crate::job::Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None };
        let (loss, kind) = (Loss::new(&loss, 5).unwrap(), EvalKind::Classes { classes: 5, top: Some(top) });
        let of = |rows: &[(Vec<u8>, u32)]| {
            let mut sums = EvalSums::new(kind).with_confusions();
            let logits = Array2::from_shape_fn((rows.len(), 5), |(i, j)| rows[i].0[j] as f32);
            let labels = Targets::Class(rows.iter().map(|row| row.1).collect());
            sums.add_batch(&loss, logits.view(), &labels, &[]);
            sums
        };
        let (a, b) = rows.split_at(cut.min(rows.len()));
        let (whole, merged) = (of(&rows), of(a).merge(of(b)));
        prop_assert_eq!((&whole.classes, whole.among_top, &whole.confusions),
                        (&merged.classes, merged.among_top, &merged.confusions));
        let order = |scores: &[u8]| {
            let mut order: Vec<usize> = (0..5).collect();
            order.sort_by_key(|i| std::cmp::Reverse(scores[*i]));
            order
        };
        let (mut pairs, mut among) = ([[0u64; 5]; 5], 0);
        for (scores, own) in &rows {
            let order = order(scores);
            pairs[*own as usize][order[0]] += 1;
            among += u64::from(order[..5.min(top as usize)].contains(&(*own as usize)));
        }
        prop_assert_eq!(whole.confusions().iter().copied().collect::<Vec<_>>(), pairs.as_flattened());
        let f1 = |c: usize| {
            let (right, own) = (pairs[c][c] as f64, pairs[c].iter().sum::<u64>() as f64);
            let taken = pairs.iter().map(|row| row[c]).sum::<u64>() as f64;
            let (precision, recall) = (right / taken, right / own);
            if right > 0.0 { Some(2.0 * precision * recall / (precision + recall)) } else { (taken + own > 0.0).then_some(0.0) }
        };
        let known: Vec<f64> = (0..5).filter_map(f1).collect();
        let summary = whole.summary();
        prop_assert!((summary.f1.unwrap() - known.iter().sum::<f64>() / known.len() as f64).abs() < 1e-12);
        prop_assert_eq!(summary.top_k_accuracy, Some(among as f64 / rows.len() as f64));
        prop_assert!(kind.metrics().iter().all(|metric| summary.get(*metric).is_some()));
        let (sums, counts) = whole.to_parts();
        prop_assert_eq!(EvalSums::from_parts(kind, &sums, &counts).map(EvalSums::with_confusions),
                        Some(EvalSums { confusions: vec![0; 25], ..whole.clone() }));
        for at in 0..counts.len() {
            let mut counts = counts.clone();
            counts[at] += 1 + u64::from(at == 2) * rows.len() as u64;
            prop_assert_eq!(EvalSums::from_parts(kind, &sums, &counts), None, "count {} is impossible", at);
        }
    }
}

/// Whatever the loss makes of it, and however often samples count in that: the mean of `-ln` of the probability of each sample's class.
#[test]
fn the_log_loss_is_that_of_the_probabilities_whatever_the_loss_is() {
    use crate::job::Loss::*;
    let of_classes = |classes: usize| {
        let weights: Vec<f32> = (0..classes).map(|class| 0.5 + class as f32).collect();
        let (some, none) = (Some(weights), None);
        vec![
            Focal { gamma: 2.0, class_weights: none.clone() },
            Hinge { class_weights: none.clone() },
            Hinge { class_weights: some.clone() },
            if classes == 2 {
                BinaryCrossEntropy { positive_weight: 3.0 }
            } else {
                CrossEntropy { label_smoothing: 0.1, class_weights: some }
            },
            if classes == 2 {
                BinaryCrossEntropy { positive_weight: 1.0 }
            } else {
                CrossEntropy { label_smoothing: 0.0, class_weights: none }
            },
        ]
    };
    for (classes, outputs, kind) in [(2, 1, EvalKind::Binary), (3, 3, EvalKind::Classes { classes: 3, top: None })] {
        let logits = Array2::from_shape_fn((40, outputs), |(i, j)| ((i * 7 + j * 5) % 11) as f32 - 5.0);
        let labels: Vec<u32> = (0..40).map(|i| (i * i % classes) as u32).collect();
        let surprise = |row: usize| {
            let x = logits.row(row).mapv(f64::from);
            let own = labels[row] as usize;
            match outputs {
                1 => (1.0 + (if own == 1 { -x[0] } else { x[0] }).exp()).ln(),
                _ => x.mapv(f64::exp).sum().ln() - x[own],
            }
        };
        let want = (0..40).map(surprise).sum::<f64>() / 40.0;
        let all = of_classes(classes);
        for (i, loss) in all.iter().enumerate() {
            for weights in [vec![], (0..40).map(|i| 0.5 + i as f32).collect::<Vec<f32>>()] {
                let mut sums = EvalSums::new(kind);
                let loss = Loss::new(loss, outputs).unwrap();
                sums.add_batch(&loss, logits.view(), &Targets::Class(labels.clone()), &weights);
                let summary = sums.summary();
                let log_loss = summary.get(Metric::LogLoss).unwrap();
                assert!((log_loss - want).abs() < 1e-6, "{:?}: {log_loss}, not {want}", all[i]);
                // The loss of the last is the same to the bit, and is not said twice.
                let same = i + 1 == all.len() && weights.is_empty();
                assert_eq!(summary.loss == log_loss, same, "{summary:?}");
                assert_eq!(summary.to_string().contains("log loss"), !same, "{summary}");
                let (parts, counts) = sums.to_parts();
                assert_eq!(EvalSums::from_parts(kind, &parts, &counts).unwrap().summary(), summary);
            }
        }
    }
}
