//! What a program adds is used as what is here already, and what is wrong with it is said as clearly.

use serde::Deserialize;
use unisono_common::data::{Dataset, Features, Targets};
use unisono_common::extend::{Extensions, Samples, Target, TargetLoss};
use unisono_common::job::{self, Job, JobText};
use unisono_common::layers::{Grads, Layer, Params, Pass, Segments};
use unisono_common::layout::{Init, Tensor};
use unisono_common::loss::Loss;
use unisono_common::model::Model;
use unisono_common::rng::{Key, Purpose};
use unisono_common::{data, train};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    by: f32,
}

/// `y = by w x`, of which `w` is one value.
struct Scale {
    shape: Vec<usize>,
    by: f32,
}

impl Layer for Scale {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        vec![Tensor::trainable("factor", &[1], Init::Constant(1.5))]
    }

    fn forward(&self, _: &Pass<'_>, p: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = self.by * p.trainable[0] * x);
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        p: Params<'_>,
        x: &[f32],
        _: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        _: &mut [f32],
        _: &mut [f32],
    ) {
        let width = self.shape[0];
        pass.sum(grads.trainable, |samples, sum| {
            let at = samples.start * width..samples.end * width;
            sum[0] = x[at.clone()].iter().zip(&dy[at]).map(|(x, dy)| self.by * x * dy).sum();
        });
        pass.finish(grads.trainable);
        dx.into_iter().flatten().zip(dy).for_each(|(dx, dy)| *dx = self.by * p.trainable[0] * dy);
    }
}

/// `(x - value)^4`
struct Fourth;

impl TargetLoss for Fourth {
    fn value(&self, x: &[f32], target: Target, d: &mut [f32]) -> f64 {
        let Target::Value(value) = target else { panic!("`check` asks for values") };
        d[0] = 4.0 * (x[0] - value).powi(3);
        (x[0] - value).powi(4).into()
    }

    fn check(&self, targets: &Targets) -> Result<(), String> {
        matches!(targets, Targets::Value(_)).then_some(()).ok_or("it needs values".into())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Made {
    samples: usize,
    #[serde(default)]
    damage: String,
}

fn made(keys: Made) -> Result<Samples, Box<dyn std::error::Error + Send + Sync>> {
    if keys.damage == "error" {
        return Err("the moon is full".into());
    }
    let set = |samples: usize| {
        let features = Features::F32((0..3 * samples).map(|i| (i % 7) as f32 - 3.0).collect());
        Dataset::new(vec![3], features, Targets::Value((0..samples).map(|i| (i % 5) as f32).collect()))
    };
    let (train, mut test) = (set(keys.samples), set(4));
    match keys.damage.as_str() {
        "shape" => test.shape = vec![1],
        "short" => test.features = Features::F32(vec![1.0; 11]),
        "infinite" => test.features = Features::F32(vec![f32::INFINITY; 12]),
        "classes" => test.targets = Targets::Class(vec![0; 4]),
        "tokens" => test.features = Features::U32(vec![0; 12]),
        _ => {}
    }
    Ok(Samples { train, test: Some(test), classes: None })
}

fn add() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    let scale = |keys: Keys, shape: &[usize]| match shape {
        [_] => Ok(Scale { shape: shape.into(), by: keys.by }),
        _ => Err("it needs one row of values".to_string()),
    };
    let fourth = |keys: Keys| if keys.by == 4.0 { Ok(Fourth) } else { Err("`by` must be 4".to_string()) };
    ONCE.call_once(|| {
        Extensions::default().layer("scale", scale).loss("fourth", fourth).format("made", |keys, _| made(keys)).add();
    });
}

const JOB: &str = r#"
data = { format = "made", samples = 23, normalize = false }
train = { steps = 1, partitions = 3, micro_batch = 4, loss = { kind = "fourth", by = 4 } }
[model]
kind = "layers"
layers = [
  { op = "scale", by = 0.5 },
  { op = "residual", layers = [{ op = "scale", by = 2.0 }] }, { op = "linear", units = 1 },
]
"#;

fn parse(toml: &str) -> Result<Job, String> {
    add();
    let text = JobText { file: "job.toml".into(), base: ".".into(), toml: toml.into(), overrides: vec![] };
    job::parse(text).map_err(|e| e.to_string())
}

/// By differences of the loss; and the same bits however many partitions a batch holds.
#[test]
fn gradients_are_the_losss_slopes() {
    let job = parse(JOB).expect("a job");
    let opened = data::open(&data::Files::any(), &job.data, job.seed).expect("its data");
    let model = Model::build(&job.model, &opened.prepared.signature(&job.train.loss)).expect("its model");
    let loss = Loss::new(&job.train.loss, model.outputs()).expect("its loss");
    loss.check_targets(&opened.train.targets).expect("values");
    let names: Vec<&str> = model.layout().tensors().map(|(tensor, _)| tensor.name.as_str()).collect();
    assert_eq!(names, ["0.factor", "1.0.factor", "2.weight", "2.bias"]);
    let params = model.layout().init(1);
    let gradient = |params: &[f32], rows: std::ops::Range<usize>, starts: Vec<usize>| {
        let mut batch = data::Batch::empty();
        batch.fill(&opened.train, &opened.prepared, rows, None, true);
        let segments = Segments { lo: 0, starts };
        let (mut workspace, mut grads) = (train::Workspace::new(&model, 23, 3), vec![0.0; params.len()]);
        let key = Key::new(1, Purpose::Dropout);
        let (into, work) = (&mut grads, &mut workspace);
        let sums = train::gradient(&model, &loss, params, &batch, &segments, key, work, into, &mut [], &mut |_, _| {});
        (sums.loss, grads)
    };
    let (_, all) = gradient(&params, 0..23, vec![0, 7, 23]);
    for i in 0..params.len() {
        let loss = |by: f32| {
            let mut params = params.clone();
            params[i] += by;
            gradient(&params, 0..23, vec![0, 23]).0
        };
        let slope = (loss(1e-3) - loss(-1e-3)) / 2e-3;
        assert!((slope - all[i] as f64).abs() < 2e-3 * slope.abs().max(1.0), "{i}: {slope} {}", all[i]);
    }
    let (left, right) = (gradient(&params, 0..7, vec![0, 7]).1, gradient(&params, 7..23, vec![0, 16]).1);
    assert!(all.iter().zip(left.iter().zip(&right)).all(|(all, (l, r))| *all == l + r));
}

#[test]
fn mistakes_are_named_with_their_place() {
    let says = |from: &str, to: &str, words: &[&str]| {
        assert!(JOB.contains(from), "{from}");
        let message = parse(&JOB.replacen(from, to, 1)).and_then(|job| {
            let opened = data::open(&data::Files::any(), &job.data, job.seed).map_err(|e| e.to_string())?;
            let signature = opened.prepared.signature(&job.train.loss);
            let model = Model::build(&job.model, &signature).map_err(|e| e.to_string())?;
            let loss = Loss::new(&job.train.loss, model.outputs()).map_err(|e| e.to_string())?;
            loss.check_targets(&opened.train.targets).map_err(|e| e.to_string())
        });
        let message = message.expect_err("a mistake");
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    says("by = 0.5", "bye = 0.5", &["job.toml:7", "\"scale\"", "bye"]);
    says("by = 0.5", "by = \"much\"", &["job.toml:7", "\"scale\"", "much"]);
    says("by = 0.5", "by = 1979-05-27", &["job.toml:7", "a date"]);
    says("op = \"scale\"", "op = \"scael\"", &["job.toml:7", "did you mean \"scale\""]);
    says("by = 4 }", "by = 5 }", &["job.toml:3", "\"fourth\"", "`by` must be 4"]);
    says("\"fourth\"", "\"forth\"", &["job.toml:3", "did you mean \"fourth\""]);
    says("samples = 23", "samples = -1", &["job.toml:2", "\"made\"", "-1"]);
    says("normalize = false", "normalise = false", &["job.toml:2", "normalise"]);
    says("{ op = \"scale\", by = 0.5 },", "{ op = \"scale\", by = 0.5 }, { op = \"lookup\", width = 2 },", &["ids"]);
    says("normalize = false", "damage = \"error\"", &["data.format \"made\"", "the moon is full"]);
    for damage in ["shape", "short", "infinite", "classes", "tokens"] {
        says("normalize = false", &format!("damage = {damage:?}"), &["data.format \"made\"", "do not fit together"]);
    }
    says("samples = 23", "samples = 0", &["data.format \"made\"", "needs some"]);
    // Others take no part in it.
    says("\"made\", samples = 23", "\"mad\", samples = 23", &["job.toml:2", "\"mad\""]);
    says("{ kind = \"fourth\", by = 4 }", "\"cross-entropy\"", &["cross-entropy"]);
    let residual = "{ op = \"residual\", layers = [{ op = \"scale\", by = 2.0 }] }";
    says(residual, "{ op = \"flatten\" }, { op = \"scale\" }", &["missing field `by`"]);
}
