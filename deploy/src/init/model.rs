//! `[model]` and `[train]` of the job: sizes that suit the data.

use super::data::{Kind, note};
use anyhow::{Result, bail};
use unisono_common::data::{Opened, Targets};

/// A global batch's samples in each of 8 partitions, by how many samples there are.
fn micro_batch(samples: usize) -> usize {
    match samples {
        0..2_000 => 2,
        2_000..20_000 => 4,
        20_000..200_000 => 16,
        _ => 64,
    }
}

/// As many partitions as both sets fill: each needs a sample.
fn partitions(opened: &Opened) -> usize {
    let least = opened.test.as_ref().map_or(usize::MAX, |test| test.samples()).min(opened.train.samples());
    [8, 4, 2].into_iter().find(|p| *p <= least).unwrap_or(1)
}

/// The root of the mean square of the values to predict, where they are much larger than what a model begins with.
fn scale(opened: &Opened) -> Option<f64> {
    let Targets::Value(values) = &opened.train.targets else { return None };
    let square: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
    let scale = (square / values.len() as f64).sqrt();
    (scale > 5.0).then_some(scale)
}

/// Layers for pictures of `[channels, height, width]`: each stage halves them.
fn convolutions(height: usize, width: usize, classes: usize) -> String {
    let stages = [(8, 32), (16, 64), (48, 128)].into_iter().filter(|(least, _)| height.min(width) >= *least);
    let stage = |(_, filters): (usize, usize)| {
        format!(
            "  {{ op = \"conv2d\", filters = {filters}, kernel = 3, padding = 1 }}, {{ op = \"relu\" }}, {{ op = \"max-pool2d\", size = 2 }},\n"
        )
    };
    format!(
        "layers = [\n{}  {{ op = \"flatten\" }}, {{ op = \"linear\", units = 128 }}, {{ op = \"relu\" }}, {{ op = \"dropout\", rate = 0.25 }},\n  \
         {{ op = \"linear\", units = {classes} }},\n]\n",
        stages.map(stage).collect::<String>()
    )
}

/// In a few words: an mlp with such hidden layers.
fn mlp(hidden: &[usize]) -> String {
    let units: Vec<_> = hidden.iter().map(usize::to_string).collect();
    match &units[..] {
        [one] => format!("mlp with a hidden layer of {one} units"),
        several => format!("mlp with hidden layers of {} units", several.join(" and ")),
    }
}

/// What a model is, and how it is trained.
struct Chosen {
    /// The comment above `[model]`, and its keys.
    comment: &'static str,
    model: String,
    /// In a few words, for who has started the command.
    says: String,
    loss: &'static str,
    lr: f64,
    /// Of rows of sparse tables.
    row_lr: Option<f64>,
    /// The tensors of the last layer, where its values have to become as large as what is predicted.
    last: Option<String>,
    /// About how many steps are made, in at least and at most so many epochs.
    steps: usize,
    epochs: [usize; 2],
}

fn choose(kind: &Kind, opened: &Opened) -> Chosen {
    let prepared = &opened.prepared;
    let (samples, classes) = (opened.train.samples(), prepared.classes.as_ref().map_or(0, Vec::len));
    let loss = match classes {
        0 => "mse",
        2 => "binary-cross-entropy",
        _ => "cross-entropy",
    };
    let scale = scale(opened);
    let plain = |comment, model: &str, says: &str| Chosen {
        comment,
        model: model.into(),
        says: says.into(),
        loss,
        lr: 1e-3,
        row_lr: None,
        last: None,
        steps: if classes == 0 { 4000 } else { 2000 },
        epochs: [2, 200],
    };
    match kind {
        Kind::Table if opened.train.ids.fields > 0 => match scale {
            None => Chosen {
                row_lr: Some(0.05),
                // Beyond that, rows are learnt by heart.
                epochs: [2, 6],
                ..plain(
                    "A linear function of all columns, and a network over vectors of the values of `ids`. Others: \"deepfm\", \"dlrm\", \"logistic\".",
                    "kind = \"wide-deep\"\nwidth = 8\nhidden = [64, 32]\n",
                    "wide-deep: a linear function, and a network over vectors of the categories' values",
                )
            },
            // Rows of a network's vectors and of the linear part have one rate, which only the latter could take.
            Some(scale) => Chosen {
                lr: 0.01 * scale,
                row_lr: Some(0.1 * scale),
                epochs: [5, 50],
                ..plain(
                    "A linear function of the numbers, and a value for each of `ids`. A network over vectors of these, where what is predicted \
                     is about 1: kind = \"wide-deep\".",
                    "kind = \"logistic\"\n",
                    "logistic: a linear function of the numbers, and a value for each category's value",
                )
            },
        },
        Kind::Table => {
            let hidden: &[usize] = match samples {
                0..1_000 => &[32],
                1_000..10_000 => &[64, 32],
                _ => &[128, 64],
            };
            let last = scale.map(|_| format!("{}.*", 2 * hidden.len()));
            let comment = "Hidden layers of so many units. Where it learns by heart: fewer, or dropout = 0.2; the simplest model: kind = \"linear\" alone.";
            let model = format!("kind = \"mlp\"\nhidden = {hidden:?}\n");
            let plain = plain(comment, &model, &mlp(hidden));
            // A measurement takes longer than a class, and its steps are short.
            let steps = if classes == 0 { 20_000 } else { plain.steps };
            Chosen { last, steps, ..plain }
        }
        Kind::Texts => Chosen {
            lr: 3e-3,
            last: scale.map(|_| "1.*".into()),
            steps: 1000,
            epochs: [3, 30],
            ..plain(
                "The mean of what was learnt of a text's words, and a linear layer. Layers between: hidden = [32].",
                "kind = \"text-classifier\"\nwidth = 32\n",
                "text-classifier: the mean of what is learnt of each word",
            )
        },
        Kind::Language(characters) => {
            let (layers, heads, width, steps) =
                if *characters >= 100_000 { (4, 4, 128, 2000) } else { (2, 2, 64, 1000) };
            Chosen {
                steps,
                loss: "cross-entropy",
                ..plain(
                    "A decoder. Larger ones learn more from more text: layers, heads and width, which heads divide.",
                    &format!("kind = \"gpt\"\nlayers = {layers}\nheads = {heads}\nwidth = {width}\n"),
                    &format!("gpt with {layers} layers of width {width}"),
                )
            }
        }
        Kind::Pictures => match prepared.shape[..] {
            [_, height, width] if height.min(width) >= 8 => Chosen {
                loss: "cross-entropy",
                steps: 1500,
                epochs: [3, 60],
                ..plain(
                    "Convolutions, each followed by half as many pixels. Deeper, for more pictures: kind = \"resnet\", without layers.",
                    &format!("kind = \"layers\"\n{}", convolutions(height, width, classes)),
                    "cnn: convolutions, and a hidden layer of 128 units",
                )
            },
            _ => plain("Hidden layers.", "kind = \"mlp\"\nhidden = [128, 64]\n", &mlp(&[128, 64])),
        },
        Kind::Ratings => Chosen {
            lr: 1e-2 * scale.unwrap_or(1.0),
            // Products of two vectors become as large as ratings.
            row_lr: Some(0.2 * scale.map_or(1.0, f64::sqrt)),
            epochs: [10, 20],
            ..plain(
                "What users and items have in common, as vectors of so many values, beside what each is rated on the whole.",
                "kind = \"matrix-factorization\"\nwidth = 8\n",
                "matrix-factorization: a vector for each user and item",
            )
        },
        Kind::Sparse => Chosen {
            lr: 1e-2 * scale.unwrap_or(1.0),
            row_lr: Some(0.1 * scale.unwrap_or(1.0)),
            epochs: [3, 50],
            ..plain(
                "A linear function of the features. With products of each two: kind = \"matrix-factorization\", width = 8.",
                "kind = \"logistic\"\n",
                "logistic: a linear function of the features",
            )
        },
    }
}

/// A rate, short.
fn rate(lr: f64) -> String {
    format!("{lr:.1e}").replace(".0e", "e")
}

/// `[model]` and `[train]`, and the model in a few words.
///
/// # Errors
/// Data that there is nothing to learn from.
pub fn sections(kind: &Kind, opened: &Opened) -> Result<(String, String)> {
    if let Targets::Class(labels) = &opened.train.targets
        && labels.iter().all(|label| *label == labels[0])
    {
        let names = opened.prepared.classes.as_ref();
        let name = names.and_then(|names| names.get(labels[0] as usize)).cloned().unwrap_or_default();
        bail!(
            "all samples to train on are of the class `{name}`, so there is nothing to tell apart: add some of another class"
        );
    }
    let Chosen { comment, model, says, loss, lr, row_lr, last, steps, epochs: [least, most] } = choose(kind, opened);
    let (samples, partitions) = (opened.train.samples(), partitions(opened));
    let micro = if matches!(kind, Kind::Language(_)) { 2 } else { micro_batch(samples) };
    let an_epoch = samples.div_ceil(partitions * micro);
    let (length, steps) = match kind {
        Kind::Language(_) => (format!("steps = {steps}\neval_every = {}\n", steps / 4), steps),
        _ => {
            let epochs = steps.div_ceil(an_epoch).clamp(least, most);
            (format!("epochs = {epochs}\n"), epochs * an_epoch)
        }
    };
    let scale = scale(opened);
    let mut train = format!(
        "partitions = {partitions}\nmicro_batch = {micro}\n{length}loss = {loss:?}\noptimizer = {{ kind = \"adamw\", lr = {}{} }}\n",
        rate(lr),
        // It would be as much larger as the rate is.
        if scale.is_some() && lr > 5e-2 { ", weight_decay = 0.0" } else { "" }
    );
    if let Some(lr) = row_lr {
        train += &format!("tables = {{ optimizer = {{ kind = \"adagrad\", lr = {} }} }}\n", rate(lr));
    }
    if let (Some(last), Some(scale)) = (last, scale) {
        train += &format!(
            "{}groups = [{{ params = [{last:?}], lr = {}, weight_decay = 0.0 }}]\n",
            note(&format!("What is predicted is about {}: the last layer learns that much faster.", rate(scale))),
            rate(lr * scale)
        );
    }
    train += &format!("schedule = {{ kind = \"cosine\", warmup_steps = {} }}\n", (steps / 20).min(100));
    let samples = match opened.prepared.predicts_next() {
        true => format!("{samples} windows"),
        false => format!("{samples} samples"),
    };
    let about = format!(
        "{samples} to train on, in steps of partitions x micro_batch. What to change first: lr, and epochs (or steps). \
         early_stopping = {{ metric = \"loss\", patience = 3 }} ends where tests get no better."
    );
    let text = format!("{}[model]\n{model}\n{}[train]\n{train}", note(comment), note(&about));
    Ok((text, says))
}
