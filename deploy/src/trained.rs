//! What was trained: a checkpoint as it is read, and its metrics on a data set.

use crate::{Wrong, confusion, read_job};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use unisono_common::checkpoint::{Manifest, rows_from_safetensors, state_from_safetensors, weights_from_safetensors};
use unisono_common::data::{self, Batch, Opened, Prepared, Skipped};
use unisono_common::job::Job;
use unisono_common::model::Model;
use unisono_common::optim;
use unisono_common::rows::optim::RowOptimizer;
use unisono_common::rows::{self, First, RowBlock};
use unisono_common::tree::Node;
use unisono_coordinator::files;
use unisono_worker::compute::Compute;
use unisono_worker::samples::Samples;

/// A model as a checkpoint holds it.
pub struct Trained {
    pub path: PathBuf,
    pub manifest: Manifest,
    pub model: Model,
    /// Their average, where the job has one.
    pub weights: Vec<f32>,
    /// Rows of sparse tables, their values without state.
    pub blocks: RowBlock,
    /// Where each of them is.
    pub rows: Rows,
}

/// Rows of sparse tables, and what those are that nobody has touched.
pub struct Rows {
    first: First,
    width: usize,
    places: HashMap<u64, usize>,
}

impl Rows {
    fn new(model: &Model, seed: u64, rows: &RowBlock) -> Rows {
        let places = rows.keys.iter().enumerate().map(|(place, key)| (*key, place)).collect();
        Rows { first: model.rows().first(seed), width: model.rows().width(), places }
    }

    /// Whether training has touched the row of an id.
    pub fn has(&self, id: u64) -> bool {
        self.places.contains_key(&rows::key(id))
    }

    /// Puts those of `rows` into a batch that it asks for.
    pub fn fill(&self, rows: &RowBlock, batch: &mut Batch) {
        batch.look_up();
        batch.put_rows(&self.first, self.width);
        for (key, row) in batch.lookups.keys().iter().zip(batch.rows.chunks_exact_mut(self.width.max(1))) {
            if let Some(place) = self.places.get(key) {
                row.copy_from_slice(&rows.rows[place * self.width..][..self.width]);
            }
        }
    }
}

/// Reads a checkpoint, or the newest whole one of a run's folder.
pub fn load(path: &Path) -> Result<Trained> {
    if !path.exists() {
        bail!("there is no {}; give a checkpoint (runs/NAME/step-...) or a run's folder (runs/NAME)", path.display());
    }
    if path.extension().is_some_and(|ending| ending == "toml") && path.is_file() {
        bail!("{} is a job; give the folder of its run, as in runs/NAME", path.display());
    }
    let loaded = if path.join("manifest.json").exists() || !path.is_dir() {
        files::read(path)?
    } else {
        let (found, passed_over) = files::newest(path);
        passed_over.iter().for_each(|why| eprintln!("passed over: {why}"));
        found.with_context(|| files::none_whole(path))?
    };
    let manifest = loaded.manifest.clone();
    let model = Model::build(&manifest.job.model, &manifest.prepared.signature(&manifest.job.train.loss))?;
    let mut weights = weights_from_safetensors(model.layout(), &loaded.weights)
        .with_context(|| format!("{}", loaded.path.display()))?;
    let job = &manifest.job;
    let optimizer = RowOptimizer::new(&job.train.tables().optimizer, model.rows());
    let blocks = loaded.rows.iter().map(|file| rows_from_safetensors(model.rows(), &optimizer, file));
    let blocks = blocks.collect::<Result<Vec<_>, _>>().with_context(|| format!("{}", loaded.path.display()))?;
    let mut digest = model.layout().weights_digest(&weights);
    if !model.rows().is_empty() {
        let mut with_rows = rows::Digest::new(model.rows());
        blocks.iter().for_each(|block| with_rows.add(block, optimizer.row_len()));
        digest = with_rows.finish(&digest);
    }
    let width = model.rows().width();
    let values = |block: &RowBlock| -> Vec<f32> {
        block.rows.chunks_exact(optimizer.row_len().max(1)).flat_map(|row| row[..width].to_vec()).collect()
    };
    let keys = blocks.iter().flat_map(|block| block.keys.iter().copied()).collect();
    let blocks = RowBlock { keys, rows: blocks.iter().flat_map(values).collect() };
    let rows = Rows::new(&model, job.seed, &blocks);
    if digest != manifest.weights_digest {
        bail!("{} holds weights {digest}, its manifest says {}", loaded.path.display(), manifest.weights_digest);
    }
    if job.train.ema.is_some() {
        let trained = model.layout().trainable();
        let average = state_from_safetensors(trained, &[optim::EMA], &loaded.optimizer);
        let average = average.with_context(|| format!("{}", loaded.path.display()))?;
        weights[..trained].copy_from_slice(&average[0]);
    }
    Ok(Trained { path: loaded.path, manifest, model, weights, blocks, rows })
}

/// Whether a job tests a part of the data that a model was trained on, which was not held out then.
fn tests_what_was_trained(trained: &Job, source: &Job) -> bool {
    let (then, now) = (trained.data.split(trained.seed), source.data.split(source.seed));
    then.zip(now).is_some_and(|(then, now)| {
        then.train == now.train && now.share > 0.0 && (then.share < now.share || then.rule != now.rule)
    })
}

/// `unisono eval`: the metrics of a checkpoint on its own test set, or on the data of another job; and into a file which classes
/// are taken for which.
pub fn eval(
    checkpoint: &Path,
    other: Option<&PathBuf>,
    set: &[String],
    json: bool,
    confusion: Option<&PathBuf>,
) -> Result<ExitCode> {
    let Trained { path, manifest, model, weights, blocks, rows } = load(checkpoint).map_err(Wrong)?;
    let Manifest { job, prepared, step, weights_digest, .. } = manifest;
    confusion.map_or(Ok(()), |file| confusion::check(file, &path, &prepared)).map_err(Wrong)?;
    let source = match other {
        Some(_) => read_job(other, set)?,
        None => job.clone(),
    };
    // Another text has to become the model's tokens, and other lines as many ids. Its own table has to teach what it taught.
    let columns = other.map(|_| prepared.columns.clone()).unwrap_or_default();
    let known = Prepared { columns, ..prepared.clone() };
    let opened =
        data::open_as(&data::Files::any(), &source.data, source.seed, Some(&known)).map_err(|e| Wrong(e.into()))?;
    let Opened { train, test, prepared: found, skipped } = opened;
    if let Some(warning) = skipped.as_ref().and_then(Skipped::warning) {
        eprintln!("{warning}");
    }
    let tokens = |p: &Prepared| p.tokens.as_ref().map(|tokens| (tokens.tokenizer.clone(), tokens.vocabulary));
    let form = |p: &Prepared| {
        json!((&p.shape, &p.classes, &p.columns, tokens(p), &p.ids, p.id_fields(), p.implicit.is_some()))
    };
    if form(&found) != form(&prepared) {
        let kind = |p: &Prepared| match (&p.classes, &p.tokens) {
            (Some(classes), _) => format!("samples of shape {:?} in {} classes", p.shape, classes.len()),
            (None, Some(tokens)) => format!("windows of {} of {} tokens", p.shape[0], tokens.vocabulary),
            (None, None) => format!("samples of shape {:?} with values", p.shape),
        };
        let message = format!(
            "the data does not fit {}: the model was trained on {}, the data has {} (or other columns, ids, class names or tokens)",
            path.display(),
            kind(&prepared),
            kind(&found)
        );
        return Err(Wrong(anyhow!(message)).into());
    }
    if tests_what_was_trained(&job, &source) {
        eprintln!(
            "data.holdout, data.holdout_by or seed are not those of the training: it tests what was trained on as well"
        );
    }
    if test.is_none() {
        eprintln!("the data has no test set: evaluating on the training set");
    }
    let test = test.unwrap_or_else(|| train.clone());
    let samples = test.samples();
    // The training data's statistics, and the sums of training in the same tree: the same bits as in the run's summary.
    let (train_samples, test_samples) = (train.samples() as u64, samples as u64);
    let prepared = Prepared { train_samples, test_samples, tokens: found.tokens, implicit: found.implicit, ..prepared };
    let opened = Opened { train, test: Some(test), prepared: prepared.clone(), skipped: None };
    let root = Node::root(job.train.partitions);
    let (name, classes) = (job.name.clone(), prepared.classes.clone());
    let compute = Compute::new(job, Samples::Read(Box::new(opened)), prepared, Arc::new(model)).map_err(Wrong)?;
    let sums = compute
        .counting_confusions()
        .evaluate(root, &weights, &mut |_, batch| {
            rows.fill(&blocks, batch);
            Some(())
        })
        .context("the rows are all there")?;
    let (eval, confusions) = (sums.summary(), sums.confusions());
    // What a model is worth that says of all samples what most of them are.
    let each = confusions.rows().into_iter().map(|row| row.sum()).enumerate();
    let most = each.max_by_key(|(class, count)| (*count, std::cmp::Reverse(*class)));
    let most = classes.as_ref().zip(most).filter(|(_, (_, count))| *count > 0);
    let most = most.map(|(classes, (class, count))| (classes[class].clone(), count as f64 / confusions.sum() as f64));
    let table = match (confusion, classes.filter(|classes| classes.len() == confusions.nrows())) {
        (None, _) => None,
        (Some(_), None) => bail!("the classes were not counted"), // confusion::check: never
        (Some(path), Some(classes)) => {
            confusion::write(path, &classes, confusions)?;
            confusion::table(&classes, confusions)
        }
    };
    if json {
        let mut summary =
            json!({ "job": name, "step": step, "samples": samples, "eval": eval, "weights_digest": weights_digest });
        if let Some(skipped) = skipped {
            summary["skipped"] = skipped.samples.into();
        }
        if let Some((class, share)) = most {
            summary["most_frequent"] = json!({ "class": class, "accuracy": share });
        }
        println!("{summary}");
    } else {
        println!(
            "  checkpoint   {}\n  job          {name}, step {step}\n  samples      {samples}\n  test         {eval}",
            path.display()
        );
        if let Some((class, share)) = most {
            println!(
                "  {:<12} accuracy {:.2}%, of always {class:?}, its most frequent class",
                "to beat",
                share * 100.0
            );
        }
        print!("{}", table.map_or(String::new(), |table| format!("\n{table}")));
    }
    Ok(ExitCode::SUCCESS)
}
