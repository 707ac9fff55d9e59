//! Lines of features with values are, to a linear model, what a table of the same numbers is.

use proptest::prelude::*;
use std::fmt::Write;
use unisono_common::data::{self, Batch, Opened};
use unisono_common::job::{self, JobText};
use unisono_common::layers::Segments;
use unisono_common::loss::Loss;
use unisono_common::model::Model;
use unisono_common::rng::{Key, Purpose};
use unisono_common::rows::id;
use unisono_common::train::{Workspace, gradient};

const FEATURES: usize = 6;

/// Data, a model of them, its loss and one batch of all samples.
fn prepare(folder: &tempfile::TempDir, data: &str, kind: &str) -> (Opened, Model, Loss, Batch) {
    let toml = format!(
        "data = {{ {data}, normalize = false }}\nmodel = {{ kind = {kind:?} }}\n\
         train = {{ partitions = 1, steps = 1, loss = \"binary-cross-entropy\" }}"
    );
    let base = folder.path().display().to_string();
    let job = job::parse(JobText { file: "job.toml".into(), base, toml, overrides: vec![] }).expect("a job");
    let opened = data::open(&data::Files::any(), &job.data, job.seed).expect("data");
    let model = Model::build(&job.model, &opened.prepared.signature(&job.train.loss)).expect("a model");
    let loss = Loss::new(&job.train.loss, model.outputs()).expect("it fits");
    let mut batch = Batch::empty();
    batch.fill(&opened.train, &opened.prepared, 0..opened.train.samples(), None, false);
    batch.look_up();
    batch.make_room(model.rows().width());
    (opened, model, loss, batch)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn a_linear_model_of_sparse_lines_is_one_of_the_same_numbers_in_a_table(
        samples in prop::collection::vec((any::<bool>(), prop::collection::vec((0..FEATURES, -4i32..5), 0..8)), 2..12),
        salt in any::<u64>(),
    ) {
        prop_assume!(samples.iter().any(|s| s.0) && samples.iter().any(|s| !s.0));
        let folder = tempfile::tempdir().expect("a folder");
        let (mut lines, mut table) = (String::new(), String::from("f0,f1,f2,f3,f4,f5,label\n"));
        for (label, features) in &samples {
            // A feature that comes twice counts twice.
            let mut dense = [0; FEATURES];
            let label = if *label { "+1" } else { "-1" };
            write!(lines, "{label}").expect("written");
            for (feature, value) in features {
                dense[*feature] += value;
                write!(lines, " {feature}:{value}").expect("written");
            }
            lines += "\n";
            dense.iter().for_each(|value| write!(table, "{value},").expect("written"));
            writeln!(table, "{}", if label == "+1" { "b" } else { "a" }).expect("written");
        }
        std::fs::write(folder.path().join("lines.svm"), lines).expect("written");
        std::fs::write(folder.path().join("table.csv"), table).expect("written");
        let key = Key::new(salt, Purpose::Synthetic);
        let weight = |feature: u64| key.normal(feature);
        let (_, sparse, loss, mut batch) = prepare(&folder, "format = \"libsvm\", train = \"lines.svm\"", "logistic");
        for (key, row) in batch.lookups.keys().iter().zip(&mut batch.rows) {
            *row = weight(id(*key));
        }
        let csv = "format = \"csv\", train = \"table.csv\", target = \"label\"";
        let (_, linear, _, dense) = prepare(&folder, csv, "linear");
        let bias = key.normal(100);
        let run = |model: &Model, params: &[f32], batch: &Batch| {
            let (mut grads, mut d_rows) = (vec![0.0; params.len()], vec![0.0; batch.rows.len()]);
            let (segments, mut memory) = (Segments::one(batch.samples), Workspace::new(model, batch.samples, 1));
            let (into, rows) = (&mut grads, &mut d_rows);
            let sums = gradient(model, &loss, params, batch, &segments, key, &mut memory, into, rows, &mut |_, _| {});
            (sums.loss, grads, d_rows)
        };
        // A weight for the number that says nothing, and the bias.
        let (got, d_params, d_rows) = run(&sparse, &[3.0, bias], &batch);
        let weights: Vec<f32> = (0..FEATURES as u64).map(weight).chain([bias]).collect();
        let (want, d_weights, _) = run(&linear, &weights, &dense);
        let near = |got: f64, want: f64| (got - want).abs() < 1e-4 * (1.0 + want.abs());
        prop_assert!(near(got, want), "{got} {want}");
        prop_assert!(d_params[0] == 0.0 && near(d_params[1] as f64, d_weights[FEATURES] as f64));
        for (key, slope) in batch.lookups.keys().iter().zip(&d_rows) {
            let want = d_weights[id(*key) as usize];
            prop_assert!(near(*slope as f64, want as f64), "{}: {slope} {want}", id(*key));
        }
        // What no line names has no slope.
        for (feature, slope) in d_weights[..FEATURES].iter().enumerate() {
            prop_assert!(*slope == 0.0 || batch.lookups.keys().iter().any(|key| id(*key) == feature as u64));
        }
    }
}
