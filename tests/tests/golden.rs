//! PyTorch agrees: every layer, loss, optimizer and schedule, from the same weights and batches (`tests/golden/make.py`).

use serde_json::Value;
use std::collections::BTreeMap;
use unisono_common::data::{Batch, Targets};
use unisono_common::groups::Groups;
use unisono_common::job::{self, Metric, ScheduleKind};
use unisono_common::layers::Segments;
use unisono_common::layout::Role;
use unisono_common::loss::Loss;
use unisono_common::model::{Model, Signature};
use unisono_common::optim::{Lengths, Optimizer, Sums, clip_factor, sum_squares};
use unisono_common::rng::{Key, Purpose};
use unisono_common::rows::optim::RowOptimizer;
use unisono_common::rows::{self, RowLayout};
use unisono_common::schedule::{PlateauState, factor};
use unisono_common::train::{Workspace, evaluate, gradient};

/// Largest difference, relative to the largest magnitude of the tensor.
const TOLERANCE: f32 = 1e-5;

fn values() -> Value {
    let path = unisono_tests::root().join("tests/golden/values.json");
    serde_json::from_str(&std::fs::read_to_string(path).expect("the values are in the repository")).expect("JSON")
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number") as f32).collect()
}

/// First values of a tensor: those that are there, or drawn as `noise` of the script draws them.
fn first(value: &Value, len: usize) -> Vec<f32> {
    let Some(seed) = value["seed"].as_u64() else { return floats(value) };
    let bound = value["bound"].as_f64().expect("a number") as f32;
    let one = |i: u32| {
        let x = (seed as u32).wrapping_add(i).wrapping_mul(0x9e37_79b1);
        let x = (x ^ x >> 15).wrapping_mul(0x85eb_ca77);
        ((x ^ x >> 13) >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len as u32).map(|i| one(i) * bound).collect()
}

/// Of the values as many as the file has, at equal distances: of large tensors it has not all.
fn thin(values: &[f32], kept: usize) -> Vec<f32> {
    values.iter().step_by(values.len().div_ceil(kept.max(1))).copied().collect()
}

/// The rows of a case's sparse tables by their keys, each with its state.
struct Known {
    ids: Vec<u64>,
    layout: RowLayout,
    optimizer: RowOptimizer,
    rows: BTreeMap<u64, Vec<f32>>,
}

impl Known {
    fn new(case: &Value, layout: &RowLayout) -> Option<Known> {
        let ids: Vec<u64> = serde_json::from_value(case.get("known")?.clone()).expect("ids");
        let kind: job::RowOptimizer = serde_json::from_value(case["row_optimizer"].clone()).expect("an optimizer");
        let optimizer = RowOptimizer::new(&kind, layout);
        let mut all = vec![vec![0.0; optimizer.row_len()]; ids.len()];
        for (table, at) in layout.tables() {
            let values = first(&case["rows"][&table.name], ids.len() * table.width);
            for (row, values) in all.iter_mut().zip(values.chunks_exact(table.width)) {
                row[at..at + table.width].copy_from_slice(values);
            }
        }
        for row in &mut all {
            let (values, state) = row.split_at_mut(layout.width());
            optimizer.first_state(values, state);
        }
        let rows = ids.iter().map(|id| rows::key(*id)).zip(all).collect();
        Some(Known { ids, layout: layout.clone(), optimizer, rows })
    }

    /// Puts the rows that a batch asks for there.
    fn fill(&self, batch: &mut Batch) {
        let width = self.layout.width();
        batch.rows = batch.lookups.keys().iter().flat_map(|key| &self.rows[key][..width]).copied().collect();
    }

    /// One step, by the mean gradients of the rows at `keys`.
    fn step(&mut self, step: u64, keys: &[u64], gradients: &[f32]) {
        let (width, update) = (self.layout.width(), self.optimizer.at(step, self.optimizer.lr()));
        for (key, gradient) in keys.iter().zip(gradients.chunks_exact(width)) {
            let (values, state) = self.rows.get_mut(key).expect("each is known").split_at_mut(width);
            assert!(update.run(gradient, values, state));
        }
    }

    /// Where a table's part of the rows of all ids, 0 for those that `row` has not, is not what `want` says.
    fn differ<'a>(&self, what: &str, row: impl Fn(u64) -> Option<&'a [f32]>, want: &Value) -> Vec<String> {
        let check = |(table, at): (&rows::Table, usize)| {
            let part =
                |id: &u64| row(rows::key(*id)).map_or(vec![0.0; table.width], |row| row[at..][..table.width].into());
            let got: Vec<f32> = self.ids.iter().flat_map(part).collect();
            let want = floats(&want[&table.name]);
            differs(&format!("{what} {}", table.name), &thin(&got, want.len()), &want)
        };
        self.layout.tables().filter_map(check).collect()
    }
}

/// Where `got` and `want` differ by more than the tolerance.
fn differs(what: &str, got: &[f32], want: &[f32]) -> Option<String> {
    assert_eq!(got.len(), want.len(), "{what}");
    // A gradient that is 0 but for rounding (a bias before batch-norm) has no scale of its own.
    let scale = want.iter().fold(0.02f32, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs() / scale).fold(0.0, f32::max);
    (worst.is_nan() || worst > TOLERANCE).then(|| format!("{what}: {worst:e}\n  got  {got:?}\n  want {want:?}"))
}

/// The batches of a case, which come in turn.
fn batches(case: &Value, rows: usize, input_len: usize, fields: usize) -> Vec<Batch> {
    let (inputs, targets) = (floats(&case["inputs"]), floats(&case["targets"]));
    let ids: Vec<u64> = case.get("ids").map_or(Vec::new(), |ids| serde_json::from_value(ids.clone()).expect("ids"));
    let inputs = inputs.chunks_exact(rows * input_len);
    let each = targets.len() / inputs.len();
    let batch = |(i, (inputs, targets)): (usize, (&[f32], &[f32]))| {
        let targets = match case["classes"] == true {
            true => Targets::Class(targets.iter().map(|t| *t as u32).collect()),
            false => Targets::Value(targets.into()),
        };
        let ids = ids[i * rows * fields..][..rows * fields].into();
        let mut batch = Batch { inputs: inputs.into(), ids, targets, samples: rows, ..Batch::empty() };
        batch.look_up();
        batch
    };
    inputs.zip(targets.chunks_exact(each)).enumerate().map(batch).collect()
}

fn group(group: &Value) -> job::Group {
    let number = |key: &str| group[key].as_f64().map(|value| value as f32);
    let params = serde_json::from_value(group["params"].clone()).expect("texts");
    job::Group { params, lr: number("lr"), weight_decay: number("weight_decay") }
}

/// Everything about one case that does not agree.
fn check(case: &Value, rows: usize) -> Vec<String> {
    let name = case["name"].as_str().expect("a name");
    let shape: Vec<usize> = serde_json::from_value(case["shape"].clone()).expect("a shape");
    let spec: job::Model = serde_json::from_value(case["model"].clone()).expect("a model");
    let loss: job::Loss = serde_json::from_value(case["loss"].clone()).expect("a loss");
    let optimizer_job: job::Optimizer = serde_json::from_value(case["optimizer"].clone()).expect("an optimizer");
    let fields = case["fields"].as_u64().unwrap_or(0) as usize;
    let signature = match case["vocabulary"].as_u64().map(|n| n as usize) {
        Some(n) if case["one_target"] == true => {
            Signature { vocabulary: Some(n), ..Signature::new(&shape, floats(&case["outputs"]).len() / rows) }
        }
        Some(n) => Signature { ids: 0, vocabulary: Some(n), output: vec![shape[0], n], input: shape, causal: false },
        None => Signature { ids: fields, ..Signature::new(&shape, floats(&case["outputs"]).len() / rows) },
    };
    let model = Model::build(&spec, &signature).expect("the model fits");
    let loss = Loss::new(&loss, model.outputs()).expect("the loss fits");
    let ema = case["ema"].as_f64().map(|decay| decay as f32);
    let groups: Vec<job::Group> = case["groups"].as_array().map_or(vec![], |all| all.iter().map(group).collect());
    let groups =
        Groups::new(Optimizer::new(&optimizer_job, ema), &groups, model.layout()).expect("groups of the model");
    let (layout, trainable) = (model.layout(), model.layout().trainable());
    let mut weights = vec![0.0; layout.len()];
    for (tensor, range) in layout.tensors() {
        let len = range.len();
        weights[range].copy_from_slice(&first(&case["weights"][&tensor.name], len));
    }
    let mut known = Known::new(case, model.rows());
    let mut batches = batches(case, rows, model.input_len(), fields);
    let mut workspace = Workspace::new(&model, rows, 1);
    let mut slots = groups.optimizer().first_slots(&weights[..trainable]);
    let mut wrong = Vec::new();
    if let Some(known) = &known {
        known.fill(&mut batches[0]);
    }
    let before = evaluate(&model, &weights, &batches[0], &mut workspace).iter().copied().collect::<Vec<f32>>();
    wrong.extend(differs("outputs", &before, &floats(&case["outputs"])));
    let mut losses = Vec::new();
    for step in 1..=floats(&case["losses"]).len() as u64 {
        let turn = (step as usize - 1) % batches.len();
        let batch = &mut batches[turn];
        if let Some(known) = &known {
            known.fill(batch);
        }
        let mut d_rows = vec![0.0; batch.rows.len()];
        let mut grads = vec![0.0; layout.len()];
        let key = Key::new(0, Purpose::Dropout).with(step);
        let segments = Segments::one(rows);
        let sums = gradient(
            &model,
            &loss,
            &weights,
            batch,
            &segments,
            key,
            &mut workspace,
            &mut grads,
            &mut d_rows,
            &mut |_, _| {},
        );
        losses.push((sums.loss / sums.weight) as f32);
        grads[..trainable].iter_mut().chain(&mut d_rows).for_each(|g| *g /= sums.weight as f32);
        for (tensor, range) in layout.tensors() {
            if step == 1 && tensor.role == Role::Trainable {
                let want = floats(&case["gradients"][&tensor.name]);
                wrong.extend(differs(
                    &format!("gradient of {}", tensor.name),
                    &thin(&grads[range.clone()], want.len()),
                    &want,
                ));
            }
            if let Role::Running { momentum } = tensor.role {
                for i in range {
                    weights[i] = (1.0 - momentum) * weights[i] + momentum * grads[i] / rows as f32;
                }
            }
        }
        if let Some(known) = &mut known {
            let (keys, width) = (batch.lookups.keys(), model.rows().width());
            if step == 1 {
                let row = |key| keys.binary_search(&key).ok().map(|i| &d_rows[i * width..][..width]);
                wrong.extend(known.differ("gradient of", row, &case["gradients"]));
            }
            known.step(step, keys, &d_rows);
        }
        let mut sums = Sums::mean(&grads[..trainable]);
        if let Some(norm) = case["clip_norm"].as_f64() {
            sums.factor = clip_factor(sum_squares(&grads[..trainable]).sqrt() as f32, norm as f32);
        }
        sums.limit = case["clip_value"].as_f64().map(|value| value as f32);
        for part in groups.parts(0..trainable) {
            let (at, update) = (part.range, part.optimizer.at(step, 1.0));
            let (w, mut out) = (&mut weights[at.clone()], vec![0.0; at.len()]);
            let mut state: Vec<&mut [f32]> = slots.iter_mut().map(|s| &mut s[at.clone()]).collect();
            let sums = Sums { first: &sums.first[4 * at.start..4 * at.end], ..sums };
            let mut finite = update.run(w, sums, &mut state, &mut out);
            if part.optimizer.is_layerwise() {
                finite &= update.along(w, Lengths::of(w, &out).ratio(), &mut state, &mut out);
            }
            assert!(finite, "{name}");
            w.copy_from_slice(&out);
        }
    }
    for (step, (got, want)) in losses.iter().zip(floats(&case["losses"])).enumerate() {
        wrong.extend(differs(&format!("loss of step {step}"), &[*got], &[want]));
    }
    if let Some(known) = &known {
        known.fill(&mut batches[0]);
        let row = |key| known.rows.get(&key).map(Vec::as_slice);
        wrong.extend(known.differ("trained", row, &case["trained_rows"]));
    }
    if ema.is_some() {
        let average = slots.last().expect("the average is a state vector");
        weights[..trainable].copy_from_slice(average);
    }
    let after = evaluate(&model, &weights, &batches[0], &mut workspace).iter().copied().collect::<Vec<f32>>();
    wrong.extend(differs("outputs after training", &after, &floats(&case["trained_outputs"])));
    wrong.into_iter().map(|w| format!("{name}, {w}")).collect()
}

/// The place of an optimizer among all: a new one does not compile before it has one, and then needs a case of make.py.
fn optimizer(optimizer: &job::Optimizer) -> usize {
    match optimizer {
        job::Optimizer::Sgd { .. } => 0,
        job::Optimizer::Adam { .. } => 1,
        job::Optimizer::AdamW { .. } => 2,
        job::Optimizer::Adagrad { .. } => 3,
        job::Optimizer::Lion { .. } => 4,
        job::Optimizer::Lamb { .. } => 5,
        job::Optimizer::RmsProp { .. } => 6,
    }
}

/// The same of row optimizers.
fn row_optimizer(optimizer: &job::RowOptimizer) -> usize {
    match optimizer {
        job::RowOptimizer::Sgd { .. } => 0,
        job::RowOptimizer::Adagrad { .. } => 1,
        job::RowOptimizer::RowAdagrad { .. } => 2,
        job::RowOptimizer::LazyAdam { .. } => 3,
        job::RowOptimizer::Ftrl { .. } => 4,
    }
}

/// That no case is lost: as many as there were, whole models among them, and every optimizer that the program knows.
fn what_there_is_has_a_case(cases: &[Value]) {
    assert!(cases.len() >= 71, "{} cases", cases.len());
    for model in ["gpt", "resnet", "deepfm", "dlrm"] {
        let case = cases.iter().find(|case| case["name"] == model);
        assert_eq!(case.map(|case| floats(&case["losses"]).len()), Some(20), "{model}");
    }
    let (mut optimizers, mut row_optimizers) = ([false; 7], [false; 5]);
    for case in cases {
        optimizers[optimizer(&serde_json::from_value(case["optimizer"].clone()).expect("an optimizer"))] = true;
        if let Some(of_rows) = case.get("row_optimizer") {
            row_optimizers[row_optimizer(&serde_json::from_value(of_rows.clone()).expect("an optimizer of rows"))] =
                true;
        }
    }
    assert_eq!((optimizers, row_optimizers), ([true; 7], [true; 5]), "some have no case");
}

#[test]
fn layers_losses_and_optimizers_are_pytorchs() {
    let values = values();
    let rows = values["rows"].as_u64().expect("rows") as usize;
    let cases = values["cases"].as_array().expect("cases");
    what_there_is_has_a_case(cases);
    let wrong: Vec<String> = cases.iter().flat_map(|c| check(c, rows)).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn schedules_are_pytorchs() {
    let values = &values()["schedules"];
    let total = values["total"].as_u64().expect("steps");
    for known in values["known"].as_array().expect("schedules") {
        let schedule: job::Schedule = serde_json::from_value(known["schedule"].clone()).expect("a schedule");
        let got: Vec<f32> = (0..total).map(|s| factor(&schedule, s, total) as f32).collect();
        assert_eq!(differs(&format!("{schedule:?}"), &got, &floats(&known["factors"])), None);
    }
    let p = &values["plateau"];
    let kind = ScheduleKind::Plateau {
        factor: p["factor"].as_f64().expect("a factor"),
        patience: p["patience"].as_u64().expect("a count"),
        threshold: p["threshold"].as_f64().expect("a threshold"),
        metric: Metric::Loss,
    };
    let mut state = PlateauState::default();
    let metrics = p["metrics"].as_array().expect("metrics").iter().map(|m| m.as_f64().expect("a number"));
    let got: Vec<f32> = metrics
        .map(|m| {
            state.observe(&kind, m);
            state.factor as f32
        })
        .collect();
    assert_eq!(got, floats(&p["rates"]));
}
