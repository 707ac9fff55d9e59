//! PyTorch agrees: every layer, loss, optimizer and schedule, from the same weights and batches (`tests/golden/make.py`).

use serde_json::Value;
use unisono_common::data::{Batch, Targets};
use unisono_common::job::{self, Metric, ScheduleKind};
use unisono_common::layers::Segments;
use unisono_common::layout::Role;
use unisono_common::loss::Loss;
use unisono_common::model::{Model, Signature};
use unisono_common::optim::{Optimizer, Sums, clip_factor, sum_squares};
use unisono_common::rng::{Key, Purpose};
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

/// Where `got` and `want` differ by more than the tolerance.
fn differs(what: &str, got: &[f32], want: &[f32]) -> Option<String> {
    assert_eq!(got.len(), want.len(), "{what}");
    // A gradient that is 0 but for rounding (a bias before batch-norm) has no scale of its own.
    let scale = want.iter().fold(0.02f32, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs() / scale).fold(0.0, f32::max);
    (worst.is_nan() || worst > TOLERANCE).then(|| format!("{what}: {worst:e}\n  got  {got:?}\n  want {want:?}"))
}

/// Everything about one case that does not agree.
fn check(case: &Value, rows: usize) -> Vec<String> {
    let name = case["name"].as_str().expect("a name");
    let shape: Vec<usize> = serde_json::from_value(case["shape"].clone()).expect("a shape");
    let spec: job::Model = serde_json::from_value(case["model"].clone()).expect("a model");
    let loss: job::Loss = serde_json::from_value(case["loss"].clone()).expect("a loss");
    let optimizer_job: job::Optimizer = serde_json::from_value(case["optimizer"].clone()).expect("an optimizer");
    let signature = match case["vocabulary"].as_u64().map(|n| n as usize) {
        Some(n) if case["one_target"] == true => {
            Signature { vocabulary: Some(n), ..Signature::new(&shape, floats(&case["outputs"]).len() / rows) }
        }
        Some(n) => Signature { ids: 0, vocabulary: Some(n), output: vec![shape[0], n], input: shape, causal: false },
        None => Signature::new(&shape, floats(&case["outputs"]).len() / rows),
    };
    let model = Model::build(&spec, &signature).expect("the model fits");
    let loss = Loss::new(&loss, model.outputs()).expect("the loss fits");
    let optimizer = Optimizer::new(&optimizer_job);
    let (layout, trainable) = (model.layout(), model.layout().trainable());
    let mut weights = vec![0.0; layout.len()];
    for (tensor, range) in layout.tensors() {
        weights[range].copy_from_slice(&floats(&case["weights"][&tensor.name]));
    }
    let targets = floats(&case["targets"]);
    let targets = if case["classes"] == true {
        Targets::Class(targets.iter().map(|t| *t as u32).collect())
    } else {
        Targets::Value(targets)
    };
    let batch = Batch { inputs: floats(&case["inputs"]), targets, samples: rows, ..Batch::empty() };
    let mut workspace = Workspace::new(&model, rows, 1);
    let mut slots: Vec<Vec<f32>> = (0..optimizer.slots()).map(|s| vec![optimizer.init_slot(s); trainable]).collect();
    let mut wrong = Vec::new();
    let before = evaluate(&model, &weights, &batch, &mut workspace).iter().copied().collect::<Vec<f32>>();
    wrong.extend(differs("outputs", &before, &floats(&case["outputs"])));
    let mut losses = Vec::new();
    for step in 1..=floats(&case["losses"]).len() as u64 {
        let mut grads = vec![0.0; layout.len()];
        let key = Key::new(0, Purpose::Dropout).with(step);
        let segments = Segments::one(rows);
        let sums = gradient(
            &model,
            &loss,
            &weights,
            &batch,
            &segments,
            key,
            &mut workspace,
            &mut grads,
            &mut [],
            &mut |_, _| {},
        );
        losses.push((sums.loss / sums.weight) as f32);
        grads[..trainable].iter_mut().for_each(|g| *g /= sums.weight as f32);
        for (tensor, range) in layout.tensors() {
            if step == 1 && tensor.role == Role::Trainable {
                let want = floats(&case["gradients"][&tensor.name]);
                wrong.extend(differs(&format!("gradient of {}", tensor.name), &grads[range.clone()], &want));
            }
            if let Role::Running { momentum } = tensor.role {
                for i in range {
                    weights[i] = (1.0 - momentum) * weights[i] + momentum * grads[i] / rows as f32;
                }
            }
        }
        let mut sums = Sums::mean(&grads[..trainable]);
        if let Some(norm) = case["clip_norm"].as_f64() {
            sums.factor = clip_factor(sum_squares(&grads[..trainable]).sqrt() as f32, norm as f32);
        }
        sums.limit = case["clip_value"].as_f64().map(|value| value as f32);
        let mut out = vec![0.0; trainable];
        let mut state: Vec<&mut [f32]> = slots.iter_mut().map(|s| s.as_mut_slice()).collect();
        let lr = Optimizer::lr(&optimizer_job);
        assert!(optimizer.at(step, lr).run(&weights[..trainable], sums, &mut state, &mut out), "{name}");
        weights[..trainable].copy_from_slice(&out);
    }
    for (step, (got, want)) in losses.iter().zip(floats(&case["losses"])).enumerate() {
        wrong.extend(differs(&format!("loss of step {step}"), &[*got], &[want]));
    }
    let after = evaluate(&model, &weights, &batch, &mut workspace).iter().copied().collect::<Vec<f32>>();
    wrong.extend(differs("outputs after training", &after, &floats(&case["trained_outputs"])));
    wrong.into_iter().map(|w| format!("{name}, {w}")).collect()
}

#[test]
fn layers_losses_and_optimizers_are_pytorchs() {
    let values = values();
    let rows = values["rows"].as_u64().expect("rows") as usize;
    let cases = values["cases"].as_array().expect("cases");
    assert!(cases.len() > 30, "{} cases", cases.len());
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
