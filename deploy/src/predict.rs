//! `unisono predict`: what a trained model says of new inputs, row by row, in the format that they come in.

use crate::out::{self, Out};
use crate::trained::{Trained, load};
use crate::{Wrong, recommend};
use anyhow::{Context, Result, anyhow, bail};
use ndarray::{ArrayView1, ArrayView2};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use unisono_common::checkpoint::Manifest;
use unisono_common::data::table::{encode, encode_ids, encode_text};
use unisono_common::data::tokenizer::Encoder;
use unisono_common::data::{Batch, DataError, Dataset, Features, Ids, Prepared, Targets, libsvm};
use unisono_common::job::{self, Form, Source};
use unisono_common::kernels::math;
use unisono_common::metrics::predicted;
use unisono_common::rows::NO_ID;
use unisono_common::train::{self, Workspace};

/// Rows and predictions in the same format.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    Csv,
    Json,
    /// Lines of `feature:value`, with or without a label; CSV out
    Libsvm,
}

/// Names and their values.
pub type Fields = Vec<(String, Value)>;

/// One input row: its own fields in order, and the raw features.
pub struct Row {
    fields: Fields,
    features: Vec<f32>,
    pub ids: Vec<u64>,
    /// Of ids, where they have some.
    factors: Vec<f32>,
}

/// What is said of rows.
pub trait Answers {
    /// Names of the columns that every table of rows must have.
    fn needs(&self) -> Vec<&str>;

    /// Names of what is added to a row.
    fn columns(&self) -> Vec<&'static str>;

    /// A row's raw features, and its ids.
    ///
    /// # Errors
    /// Fields that a model does not take.
    fn read(&self, fields: &[(String, Value)]) -> Result<(Vec<f32>, Vec<u64>)>;

    /// The values under [`Answers::columns`] for each row: one answer, or where they have a `list` any number.
    fn answer(&mut self, rows: &[Row]) -> Vec<Vec<Fields>>;

    /// Under which name a row's answers are a list in JSON.
    fn list(&self) -> Option<&'static str>;

    /// What whoever reads the answers should know of the rows.
    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }
}

/// A field as a table has it.
pub fn cell(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// What turns a row's fields into a model's inputs.
struct Inputs<'a> {
    prepared: &'a Prepared,
    /// Of a model that takes texts: the name of their field.
    text: Option<(&'a str, Encoder<'a>)>,
    /// What a column holds that a row does not have; `None`: it must have all.
    absent: Option<&'static str>,
    /// Values of categorical columns that training did not have: a column's first one, and how many.
    new: RefCell<BTreeMap<String, (String, u64)>>,
}

impl<'a> Inputs<'a> {
    fn new(Manifest { prepared, job, .. }: &'a Manifest) -> Inputs<'a> {
        let text = prepared
            .tokens
            .as_ref()
            .and_then(|tokens| Some((tokens.column.as_ref()?.name.as_str(), tokens.tokenizer.as_ref()?.encoder())));
        // As the lines that the model was trained on.
        let lacking = matches!(&job.data.source, Source::Table(table) if matches!(table.form, Form::JsonLines));
        Inputs { prepared, text, absent: lacking.then_some(""), new: RefCell::default() }
    }

    /// Notes the values of a row that training did not have.
    fn note<'c>(&self, cell: impl Fn(&str) -> Option<&'c str>) {
        for column in self.prepared.columns.iter().filter(|column| column.values.is_some()) {
            if let Some(value) = cell(&column.name).map(str::trim).filter(|v| column.is_new(v, &self.prepared.missing))
            {
                let mut new = self.new.borrow_mut();
                new.entry(column.name.clone()).or_insert_with(|| (value.into(), 0)).1 += 1;
            }
        }
    }
}

/// A row's raw features, and its ids.
fn features(inputs: &Inputs<'_>, fields: &[(String, Value)]) -> Result<(Vec<f32>, Vec<u64>)> {
    let Inputs { prepared, text, absent, .. } = inputs;
    if let Some((name, encoder)) = text {
        let field = fields.iter().find(|(field, _)| field == name);
        let (_, field) =
            field.with_context(|| format!("there is no `{name}`; the model takes that text of each row"))?;
        let field = field.as_str().with_context(|| format!("`{name}` is {field}, which is not a text"))?;
        let tokens = encode_text(prepared, encoder, field)?.into_iter().map(|token| token as f32);
        return Ok((tokens.collect(), Vec::new()));
    }
    let want: usize = prepared.shape.iter().product();
    if !prepared.columns.is_empty() || !prepared.ids.is_empty() {
        let texts: Vec<(&str, String)> = fields.iter().map(|(name, value)| (name.as_str(), cell(value))).collect();
        let cell = |name: &str| texts.iter().find(|(n, _)| *n == name).map(|(_, t)| t.as_str()).or(*absent);
        let encoded = (encode(prepared, cell)?, encode_ids(prepared, cell)?);
        inputs.note(cell);
        return Ok(encoded);
    }
    let number = |v: &Value| match v {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => s.trim().parse().ok(),
        _ => None,
    };
    let values: Vec<&Value> = match fields.iter().find(|(name, _)| name == "features") {
        Some((_, Value::Array(values))) => values.iter().collect(),
        _ => fields.iter().map(|(_, v)| v).collect(),
    };
    if values.len() != want {
        bail!("there are {} values, the model takes {want}", values.len());
    }
    let one = |(i, v): (usize, &&Value)| {
        let number = number(v).map(|n| n as f32).filter(|n| n.is_finite());
        number.with_context(|| format!("value {} is {v}, which is not a finite number", i + 1))
    };
    let values = values.iter().enumerate().map(one).collect::<Result<_>>()?;
    Ok((values, Vec::new()))
}

/// `unisono predict`: rows in, the same rows with `prediction` (and `probability`) out, or with the `top` items for their users.
pub fn predict(
    checkpoint: &Path,
    input: Option<&PathBuf>,
    format: Option<Format>,
    top: Option<recommend::Top>,
) -> Result<ExitCode> {
    let trained = load(checkpoint).map_err(Wrong)?;
    if trained.manifest.prepared.predicts_next() {
        let what = "was trained to go on with a text; use --generate PROMPT";
        return Err(Wrong(anyhow!("{} {what}", trained.path.display())).into());
    }
    let input = input.filter(|path| path.as_os_str() != "-");
    let (mut reader, by_name): (Box<dyn Read>, _) = match input {
        None => (Box::new(std::io::stdin()), None),
        Some(path) => {
            let rows = unisono_common::data::reader(path);
            let rows = rows.with_context(|| format!("cannot read {}", path.display())).map_err(Wrong)?;
            let unpacked = if path.extension().is_some_and(|ending| ending == "gz") {
                path.with_extension("")
            } else {
                path.clone()
            };
            let by_name = match unpacked.extension().and_then(|ending| ending.to_str()) {
                Some("json" | "jsonl" | "ndjson") => Format::Json,
                Some("svm" | "libsvm") => Format::Libsvm,
                Some("parquet") => {
                    let what =
                        "is Parquet, which is for training: give its rows as CSV or JSON lines, with the same columns";
                    return Err(Wrong(anyhow!("{} {what}", path.display())).into());
                }
                Some(_) | None => Format::Csv,
            };
            (rows, Some(by_name))
        }
    };
    let name = input.map_or("stdin".into(), |p| p.display().to_string());
    let format =
        format.or(by_name).ok_or_else(|| Wrong(anyhow!("say --format csv, json or libsvm for rows from stdin")))?;
    let sparse = trained.manifest.prepared.sparse.is_some();
    if sparse != (format == Format::Libsvm) {
        let what = match sparse {
            true => "was trained on libsvm lines, and takes such; use --format libsvm",
            false => "was not trained on libsvm lines; give its columns as CSV or JSON lines",
        };
        return Err(Wrong(anyhow!("{} {what}", trained.path.display())).into());
    }
    let out = Out::new();
    let mut answers: Box<dyn Answers> = match top {
        Some(top) => Box::new(recommend::Recommender::new(&trained, top).map_err(Wrong)?),
        None => Box::new(Predictor::new(&trained, ROWS)),
    };
    let done = match format {
        Format::Libsvm => predict_libsvm(&trained, &mut reader, &name, out),
        Format::Json => predict_json(&mut *answers, &mut reader, &name, out),
        Format::Csv => {
            let (separator, quoting) = match &trained.manifest.job.data.source {
                Source::Table(table) => match table.form {
                    Form::Csv { separator, quoting, .. } => (separator as u8, quoting),
                    Form::JsonLines | Form::Parquet => (b',', true),
                },
                _ => (b',', true),
            };
            predict_csv(&mut *answers, reader, &name, out, (separator, quoting))
        }
    };
    answers.remarks().iter().for_each(|remark| eprintln!("{remark}"));
    match done {
        // Who reads the answers has enough of them.
        Err(e) if is_broken_pipe(&e) => Ok(ExitCode::SUCCESS),
        Err(e) if out::is_whole() => Err(Wrong(e).into()),
        done => done.map(|()| ExitCode::SUCCESS),
    }
}

pub fn is_broken_pipe(e: &anyhow::Error) -> bool {
    let kind = |cause: &(dyn std::error::Error + 'static)| {
        let io = cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        let csv = cause.downcast_ref::<csv::Error>().map(csv::Error::kind);
        io.or(match csv {
            Some(csv::ErrorKind::Io(e)) => Some(e.kind()),
            _ => None,
        })
    };
    e.chain().any(|cause| kind(cause) == Some(std::io::ErrorKind::BrokenPipe))
}

/// Rows that are read together, and computed together; of tokens, positions.
const ROWS: usize = 256;

fn predict_json(answers: &mut dyn Answers, input: &mut dyn Read, name: &str, mut out: impl Write) -> Result<()> {
    let mut rows = Vec::new();
    let mut write = |answers: &mut dyn Answers, rows: &mut Vec<Row>| -> Result<()> {
        for (said, row) in answers.answer(rows).into_iter().zip(std::mem::take(rows)) {
            let mut object: Map<String, Value> = row.fields.into_iter().collect();
            let object_of = |fields: Fields| fields.into_iter().collect::<Map<String, Value>>();
            match answers.list() {
                Some(list) => {
                    object
                        .insert(list.into(), said.into_iter().map(|fields| Value::Object(object_of(fields))).collect());
                }
                None => object.extend(said.into_iter().flat_map(object_of)),
            }
            writeln!(out, "{}", Value::Object(object))?;
        }
        Ok(())
    };
    for (i, line) in BufReader::new(input).lines().enumerate() {
        let at = || format!("{name}:{}", i + 1);
        let line = line.with_context(at)?;
        if line.trim().is_empty() {
            continue;
        }
        let parsed: Result<Row> = (|| {
            let object: Map<String, Value> =
                serde_json::from_str(&line).context("this is not one JSON object a line")?;
            let fields: Vec<(String, Value)> = object.into_iter().collect();
            let (features, ids) = answers.read(&fields)?;
            Ok(Row { features, ids, factors: Vec::new(), fields })
        })();
        match parsed {
            Ok(row) => rows.push(row),
            Err(e) => {
                write(answers, &mut rows)?;
                return Err(e.context(at()));
            }
        }
        if rows.len() == ROWS {
            write(answers, &mut rows)?;
        }
    }
    write(answers, &mut rows)
}

/// Rows with names in the first line, between which is what is between those of the training data, or else a comma.
fn predict_csv(
    answers: &mut dyn Answers,
    input: impl Read,
    name: &str,
    out: impl Write,
    (separator, quoting): (u8, bool),
) -> Result<()> {
    let mut input = BufReader::new(input);
    let first = input.fill_buf().with_context(|| name.to_string())?;
    let first = first.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let (separator, quoting) = if first.contains(&separator) { (separator, quoting) } else { (b',', true) };
    let mut reader = csv::ReaderBuilder::new();
    reader.delimiter(separator).quoting(quoting).trim(csv::Trim::All).flexible(true);
    let mut reader = reader.from_reader(input);
    let header: Vec<String> = reader.headers().with_context(|| name.to_string())?.iter().map(Into::into).collect();
    if header.iter().all(|name| name.is_empty() || name.parse::<f64>().is_ok()) {
        bail!("{name}:1: the first line must name the columns");
    }
    let needs = answers.needs();
    if let Some(&column) = needs.iter().find(|column| !header.iter().any(|name| name == *column)) {
        let others: Vec<&str> = header.iter().map(String::as_str).filter(|name| !needs.contains(name)).collect();
        let near = job::nearest(column, &others).map(|near| format!("; is it {near:?}?")).unwrap_or_default();
        bail!("{name}:1: {}{near}", DataError::CellAbsent { column: column.into() });
    }
    let mut out = csv::WriterBuilder::new().delimiter(separator).from_writer(out);
    // Where the first row is wrong, nothing is written.
    let mut names =
        Some(header.iter().cloned().chain(answers.columns().into_iter().map(String::from)).collect::<Vec<_>>());
    let mut rows = Vec::new();
    let mut write = |answers: &mut dyn Answers, rows: &mut Vec<Row>| -> Result<()> {
        if let Some(names) = names.take() {
            out.write_record(names)?;
        }
        for (said, row) in answers.answer(rows).into_iter().zip(std::mem::take(rows)) {
            for fields in said {
                out.write_record(row.fields.iter().chain(&fields).map(|(_, value)| cell(value)))?;
            }
        }
        out.flush()?;
        Ok(())
    };
    for record in reader.records() {
        let parsed: Result<Row> = (|| {
            let record = record.with_context(|| name.to_string())?;
            let line = record.position().map_or(0, |p| p.line());
            if record.len() != header.len() {
                bail!("{name}:{line}: {} cells, but the first line names {} columns", record.len(), header.len());
            }
            let fields: Vec<(String, Value)> =
                header.iter().cloned().zip(record.iter().map(|c| Value::String(c.into()))).collect();
            let (features, ids) = answers.read(&fields).with_context(|| format!("{name}:{line}"))?;
            Ok(Row { fields, features, ids, factors: Vec::new() })
        })();
        match parsed {
            Ok(row) => rows.push(row),
            Err(e) => {
                if !rows.is_empty() {
                    write(answers, &mut rows)?;
                }
                return Err(e);
            }
        }
        if rows.len() == ROWS {
            write(answers, &mut rows)?;
        }
    }
    write(answers, &mut rows)
}

fn predict_libsvm(trained: &Trained, input: &mut dyn Read, name: &str, out: impl Write) -> Result<()> {
    let mut predictor = Predictor::new(trained, ROWS);
    let sparse = trained.manifest.prepared.sparse.as_ref().context("the model takes no such lines")?;
    let mut out = csv::Writer::from_writer(out);
    let mut names = Some(predictor.columns());
    let mut rows: Vec<Row> = Vec::new();
    let mut write = |rows: &mut Vec<Row>| -> Result<()> {
        if let Some(names) = names.take() {
            out.write_record(names)?;
        }
        for answers in predictor.answer(rows).into_iter().flatten() {
            out.write_record(answers.into_iter().map(|(_, value)| match value {
                Value::String(text) => text,
                other => other.to_string(),
            }))?;
        }
        rows.clear();
        Ok(out.flush()?)
    };
    for (i, line) in BufReader::new(input).lines().enumerate() {
        let at = || format!("{name}:{}", i + 1);
        let mut row = Row { fields: Vec::new(), features: vec![0.0], ids: Vec::new(), factors: Vec::new() };
        let parsed: Result<bool> = (|| {
            let holds = libsvm::parse(&line?, sparse.size, &mut row.ids, &mut row.factors)?.is_some();
            if row.ids.len() > sparse.fields {
                return Err(libsvm::Wrong::Many { found: row.ids.len(), most: sparse.fields }.into());
            }
            Ok(holds)
        })();
        match parsed {
            Ok(false) => continue,
            Ok(true) => {
                row.ids.resize(sparse.fields, NO_ID);
                row.factors.resize(sparse.fields, 0.0);
                rows.push(row);
            }
            Err(e) => {
                if !rows.is_empty() {
                    write(&mut rows)?;
                }
                return Err(e.context(at()));
            }
        }
        if rows.len() == ROWS {
            write(&mut rows)?;
        }
    }
    write(&mut rows)
}

/// A model with the memory to run it.
pub struct Predictor<'a> {
    pub trained: &'a Trained,
    inputs: Inputs<'a>,
    /// Rows that are computed together.
    pub rows: usize,
    workspace: Workspace,
    batch: Batch,
}

impl<'a> Predictor<'a> {
    /// For so many rows together; of tokens, positions.
    pub fn new(trained: &'a Trained, rows: usize) -> Predictor<'a> {
        let rows = (rows / trained.model.positions()).max(1);
        let (workspace, batch) = (Workspace::new(&trained.model, rows, 1), Batch::empty());
        Predictor { inputs: Inputs::new(&trained.manifest), rows, workspace, batch, trained }
    }

    /// The model's outputs, `(rows, outputs)`, for raw features, `(rows, features)`, and ids with their factors, where they have
    /// some, both `(rows, fields)`, of at most [`Predictor::rows`].
    pub fn logits(&mut self, features: Vec<f32>, ids: Vec<u64>, factors: Vec<f32>) -> ArrayView2<'_, f32> {
        let Trained { manifest, model, weights, blocks, rows: tables, .. } = self.trained;
        let prepared = &manifest.prepared;
        let rows = features.len() / prepared.shape.iter().product::<usize>();
        let (features, targets) = (Features::F32(features), Targets::Value(vec![0.0; rows]));
        let ids = Ids { fields: prepared.id_fields(), values: ids, factors };
        let data = Dataset { ids, ..Dataset::new(prepared.shape.clone(), features, targets) };
        self.batch.clear();
        self.batch.fill(&data, prepared, 0..rows, None, true);
        tables.fill(blocks, &mut self.batch);
        train::evaluate(model, weights, &self.batch, &mut self.workspace)
    }

    fn together(&mut self, rows: &[Row]) -> Vec<Vec<Fields>> {
        let (prepared, columns) = (&self.trained.manifest.prepared, self.columns());
        let features = rows.iter().flat_map(|r| r.features.iter().copied()).collect();
        let ids = rows.iter().flat_map(|r| r.ids.iter().copied()).collect();
        let logits = self.logits(features, ids, rows.iter().flat_map(|r| r.factors.iter().copied()).collect());
        let answer = |x: ArrayView1<'_, f32>| {
            let values = match &prepared.classes {
                None => vec![json!(x[0])],
                Some(classes) => {
                    let best = predicted(x);
                    let probability = match x.len() {
                        1 if best == 1 => math::sigmoid(x[0]),
                        1 => math::sigmoid(-x[0]),
                        _ => 1.0 / x.iter().map(|v| math::exp(v - x[best])).sum::<f32>(),
                    };
                    vec![json!(classes.get(best)), json!(probability)]
                }
            };
            vec![columns.iter().map(|c| c.to_string()).zip(values).collect()]
        };
        logits.rows().into_iter().map(answer).collect()
    }
}

impl Answers for Predictor<'_> {
    fn needs(&self) -> Vec<&str> {
        let Inputs { prepared, text, absent, .. } = &self.inputs;
        match (text, absent) {
            (Some((name, _)), _) => vec![name],
            (None, Some(_)) => vec![],
            (None, None) => {
                let columns = prepared.columns.iter().map(|column| column.name.as_str());
                columns.chain(prepared.ids.iter().flat_map(|field| field.columns.iter().map(String::as_str))).collect()
            }
        }
    }

    fn columns(&self) -> Vec<&'static str> {
        let manifest = &self.trained.manifest;
        let classes = manifest.prepared.classes.is_some();
        let probability = classes && !matches!(manifest.job.train.loss, job::Loss::Hinge { .. });
        ["prediction"].into_iter().chain(probability.then_some("probability")).collect()
    }

    fn read(&self, fields: &[(String, Value)]) -> Result<(Vec<f32>, Vec<u64>)> {
        features(&self.inputs, fields)
    }

    fn answer(&mut self, rows: &[Row]) -> Vec<Vec<Fields>> {
        rows.chunks(self.rows).flat_map(|rows| self.together(rows)).collect()
    }

    fn list(&self) -> Option<&'static str> {
        None
    }

    fn remarks(&self) -> Vec<String> {
        let remark = |(column, (value, n)): (&String, &(String, u64))| {
            let rows = if *n == 1 { "row has" } else { "rows have" };
            format!("{n} {rows} a value in `{column}` that training did not have, as {value:?}: it counts as missing")
        };
        self.inputs.new.borrow().iter().map(remark).collect()
    }
}
