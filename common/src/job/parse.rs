//! From TOML to a [`Job`]: every key read once, every range checked, every default in one place.

use super::reader::{Kind, Kinds, Node, Range, Reader, Result, SIZE, float, number, size, text, whole};
use super::*;
use crate::extend::Names;

pub(super) mod data;
mod model;
mod pictures;
mod ratings;
mod train;

pub use super::reader::JobError;

/// Reads a job.
///
/// # Errors
/// Unknown, missing and ill-typed keys and values out of range, with `FILE:LINE` or the override they came from.
pub fn parse(text: JobText) -> Result<Job> {
    let (file, base) = (&text.file, &text.base);
    let mut root = Node::parse(&text.toml, file)?;
    for option in &text.overrides {
        root.set(option)?;
    }
    let top = Reader::new(&root, "")?;
    top.only(&["name", "seed", "data", "model", "train", "checkpoint"])?;
    let name = |k: &Kind| if let Kind::Text(t) = k { Some(t.clone()).filter(|t| names_a_folder(t)) } else { None };
    let name = top.get("name", "a text that can name a folder", name)?.or(default_name(file));
    let seed = top.integer("seed", 0..=u64::MAX)?.or(0);
    let data = data::data(top.node("data").needed("[data]` and below it `format = \"digits\"")?, base)?;
    let model = model::model(top.node("model").needed("[model]` and below it `kind = \"linear\"")?)?;
    let train_node = top.node("train").needed("[train]` and below it `epochs = 3")?;
    let train = train::train(train_node)?;
    let of_implicit = matches!(train.loss, Loss::Bpr | Loss::BinaryCrossEntropy { .. });
    let wrong_loss = match (data.implicit(), &train.loss) {
        (Some(_), _) if !of_implicit => Some(
            "must be \"bpr\" or \"binary-cross-entropy\" for data.implicit; choose one, or leave data.implicit out",
        ),
        (None, Loss::Bpr) => Some(
            "is \"bpr\", which compares what users took with what they did not: set data.implicit = {} (of format = \"ratings\"), or choose \
             another loss",
        ),
        _ => None,
    };
    if let Some(message) = wrong_loss {
        return Reader::new(train_node, "train")?.refuse("loss", message);
    }
    let checkpoint = checkpoint(top.node("checkpoint").or(&Node::empty_table("".into())), &name)?;
    Ok(Job { text, name, seed, data, model, train, checkpoint })
}

fn names_a_folder(name: &str) -> bool {
    (1..=200).contains(&name.len())
        && name.trim() == name
        && !name.starts_with('.')
        && !name.contains(|c: char| c.is_control() || c == '/' || c == '\\')
}

/// The file's name without its ending.
fn default_name(file: &str) -> String {
    let stem = std::path::Path::new(file).file_stem().map(|s| s.to_string_lossy().replace(' ', "-"));
    stem.filter(|s| names_a_folder(s)).unwrap_or_else(|| "job".into())
}

const ANY: Range = Range { what: "a finite number", fits: |_| true };
const POSITIVE: Range = Range { what: "a number above 0", fits: |v| v > 0.0 };
const NOT_NEGATIVE: Range = Range { what: "a number of at least 0", fits: |v| v >= 0.0 };
/// Rates, betas: 1 is excluded.
const FRACTION: Range = Range { what: "a number from 0 to below 1", fits: |v| (0.0..1.0).contains(&v) };
const UP_TO_ONE: Range = Range { what: "a number from 0 to 1", fits: |v| (0.0..=1.0).contains(&v) };
const BETWEEN: Range = Range { what: "a number above 0 and below 1", fits: |v| v > 0.0 && v < 1.0 };

/// The bound of rows' first values.
pub(crate) const ROW_BOUND: f32 = 0.05;

/// Steps, epochs, samples: far beyond any run, and products of two such numbers fit in 128 bits.
const COUNT: std::ops::RangeInclusive<u64> = 1..=1 << 40;
const COUNT_OR_0: std::ops::RangeInclusive<u64> = 0..=1 << 40;

/// What the program has added under the name at `key`, and its options but those that are `not` its own; `None` where the name is
/// another.
fn added(node: &Node, key: &str, names: &Names, not: &[&str]) -> Result<Option<(String, serde_json::Value)>> {
    let table = node.expanded();
    let (Some(name), options) = table.others(key, not)? else { return Ok(None) };
    if !names.names.contains(&name) {
        return Ok(None);
    }
    match names.check(name, &options) {
        Ok(()) => Ok(Some((name.into(), options))),
        Err(why) => node.error(format!("{name:?}: {why}")),
    }
}

/// `kinds`, and the names that the program has added.
fn with_added(kinds: &Kinds, names: &Names) -> Vec<(&'static str, &'static [&'static str])> {
    kinds.iter().copied().chain(names.names.iter().map(|name| (*name, &[][..]))).collect()
}

/// `"name"` or `{ kind = "name", ... }`.
fn choice<T>(
    node: &Node,
    what: &str,
    path: &str,
    kinds: &Kinds,
    common: &[&'static str],
    build: impl FnOnce(&'static str, &Reader<'_>) -> Result<T>,
) -> Result<T> {
    let table = node.expanded();
    let r = Reader::new(&table, path)?;
    build(r.kind("kind", what, kinds, common)?, &r)
}

fn checkpoint(node: &Node, name: &str) -> Result<Checkpoint> {
    let r = Reader::new(node, "checkpoint")?;
    r.only(&["dir", "every_steps", "keep"])?;
    Ok(Checkpoint {
        dir: r.text("dir")?.or(format!("runs/{name}")),
        every_steps: r.integer("every_steps", COUNT_OR_0)?.or(500),
        keep: r.integer("keep", 1..=1 << 20)?.or(3) as usize,
    })
}

#[cfg(test)]
mod tests;
