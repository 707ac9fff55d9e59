//! Tables of text: numbers as they are, categories one-hot encoded over the training set's values.

use super::tokenizer::{Encoder, Tokenizer};
use super::{
    Column, DataError, Dataset, Features, IdField, Ids, Prepared, Raw, Scale, Targets, TextColumn, Tokens, find,
    newlines, read_text,
};
use crate::job::{self, Task};
use crate::rng::{Key, Purpose};
use ::csv::{ReaderBuilder, StringRecord, Trim};
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::rc::Rc;

/// More values than this in a categorical column or target are a mistake (an identifier, a measurement), not categories.
const MOST_VALUES: usize = 10_000;

/// One file: its text and the names of its columns.
#[derive(Clone)]
struct Table<'a> {
    path: String,
    text: Rc<str>,
    names: Vec<String>,
    spec: &'a job::Csv,
    part: Option<Part>,
}

/// One of two parts of a file's lines, which the hash of what is learnt from decides between.
#[derive(Clone)]
struct Part {
    key: Key,
    /// Of the lines that are held out.
    share: f64,
    held_out: bool,
    /// Places of the columns that are learnt from.
    columns: Vec<usize>,
}

impl Part {
    fn has(&self, record: &StringRecord) -> bool {
        let key = self.columns.iter().fold(self.key, |key, column| key.named(&record[*column]));
        ((key.uniform(0) as f64) < self.share) == self.held_out
    }
}

impl<'a> Table<'a> {
    fn open(root: Option<&Path>, spec: &'a job::Csv, path: &str) -> Result<Table<'a>, DataError> {
        let found = find(root, &spec.base, path)?;
        let path = found.display().to_string();
        if !spec.separator.is_ascii() || ['"', '\n', '\r'].contains(&spec.separator) {
            return Err(DataError::Separator { separator: spec.separator });
        }
        let text = read_text(&found)?;
        let mut table = Table { path, text: text.into(), names: Vec::new(), spec, part: None };
        table.names = match (&spec.columns, spec.header) {
            (Some(names), _) => names.clone(),
            (None, true) => table.first_line()?,
            (None, false) => return Err(DataError::NoNames { path: table.path }),
        };
        let mut seen = BTreeSet::new();
        match table.names.iter().find(|name| !seen.insert(*name)).cloned() {
            Some(column) => Err(DataError::SameName { path: table.path, column }),
            None => Ok(table),
        }
    }

    fn lines(&self) -> ::csv::Reader<&[u8]> {
        ReaderBuilder::new()
            .delimiter(self.spec.separator as u8)
            .has_headers(false)
            .flexible(true)
            .trim(Trim::All)
            .from_reader(self.text.as_bytes())
    }

    fn unreadable(&self, e: ::csv::Error) -> DataError {
        DataError::Read { path: self.path.clone(), source: io::Error::other(e) }
    }

    fn first_line(&self) -> Result<Vec<String>, DataError> {
        match self.lines().records().next() {
            Some(record) => Ok(record.map_err(|e| self.unreadable(e))?.iter().map(String::from).collect()),
            None => Err(DataError::Empty { path: self.path.clone() }),
        }
    }

    /// Calls `row` with the number of the line and the trimmed cells, as many as there are columns, for each data line.
    fn rows(&self, mut row: impl FnMut(usize, &StringRecord) -> Result<(), DataError>) -> Result<(), DataError> {
        let mut lines = self.lines();
        let mut record = StringRecord::new();
        let (mut header, mut any) = (self.spec.header, false);
        let (mut line, mut counted) = (1, 0);
        loop {
            let at = lines.position().byte() as usize;
            if !lines.read_record(&mut record).map_err(|e| self.unreadable(e))? {
                break;
            }
            // The reader stands before blank lines, and before the second half of a CR LF.
            let bytes = self.text.as_bytes();
            let at = at + bytes[at..].iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
            line += newlines(&bytes[counted..at]);
            counted = at;
            let blank = record.len() == 1 && record[0].is_empty() && self.names.len() > 1;
            if blank || std::mem::take(&mut header) {
                continue;
            }
            if record.len() != self.names.len() {
                let (got, want) = (record.len(), self.names.len());
                return Err(DataError::Ragged { path: self.path.clone(), line, got, want });
            }
            if self.part.as_ref().is_none_or(|part| part.has(&record)) {
                any = true;
                row(line, &record)?;
            }
        }
        match &self.part {
            _ if any => Ok(()),
            None => Err(DataError::Empty { path: self.path.clone() }),
            Some(Part { share, held_out, .. }) => {
                let (share, what) = (*share, if *held_out { "test on" } else { "train on" });
                Err(DataError::Holdout { share, path: self.path.clone(), what })
            }
        }
    }

    /// The index of a column that the job names.
    fn index(&self, key: &'static str, column: &str) -> Result<usize, DataError> {
        self.names.iter().position(|name| name == column).ok_or_else(|| {
            let alike = |name: &&String| strsim::jaro_winkler(name, column);
            let nearest = self.names.iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
            let nearest = nearest.cloned().unwrap_or_default();
            DataError::NoColumn { key, column: column.into(), path: self.path.clone(), nearest }
        })
    }

    fn not_a_number(&self, line: usize, column: usize, cell: &str) -> DataError {
        DataError::Number { path: self.path.clone(), line, column: self.names[column].clone(), cell: cell.into() }
    }

    /// Appends a text's tokens, each one more than its tokenizer says, and fills up with 0.
    fn text(
        &self,
        line: usize,
        cell: &str,
        encoder: &Encoder<'_>,
        text: &job::TextColumn,
        out: &mut Vec<u32>,
    ) -> Result<(), DataError> {
        let (path, column) = (|| self.path.clone(), text.column.clone());
        let tokens = match encoder.encode(cell) {
            Ok(tokens) if tokens.is_empty() => return Err(DataError::NoText { path: path(), line, column }),
            Ok(tokens) => tokens,
            // Only the test set can have one that the tokenizer did not learn.
            Err(DataError::Character { character }) => {
                return Err(DataError::NewCharacter { path: path(), line, column, character });
            }
            Err(other) => return Err(other),
        };
        fill_up(&tokens, text.context, text.truncate, out).map_err(|tokens| DataError::LongText {
            path: path(),
            line,
            column,
            tokens,
            context: text.context,
        })
    }

    /// The target's cell; a class has no full stop at its end.
    fn target<'r>(&self, line: usize, record: &'r StringRecord, target: usize) -> Result<&'r str, DataError> {
        match (&record[target], self.spec.task) {
            (cell, _) if is_missing(cell, &self.spec.missing) => {
                Err(DataError::NoTarget { path: self.path.clone(), line, column: self.spec.target.clone() })
            }
            (cell, Task::Classification) => Ok(cell.strip_suffix('.').unwrap_or(cell)),
            (cell, Task::Regression) => Ok(cell),
        }
    }
}

/// Appends `tokens`, each one more than it was, and zeros up to `context`; gives how many there are where they are too many.
fn fill_up(tokens: &[u32], context: usize, truncate: bool, out: &mut Vec<u32>) -> Result<(), usize> {
    if tokens.len() > context && !truncate {
        return Err(tokens.len());
    }
    let end = out.len() + context;
    out.extend(tokens.iter().take(context).map(|token| token + 1));
    out.resize(end, 0);
    Ok(())
}

/// One new text's tokens, as those of the training set were; `encoder` is that of `prepared`'s tokenizer.
///
/// # Errors
/// A character without a token, an empty text, and one that is too long.
pub fn encode_text(prepared: &Prepared, encoder: &Encoder<'_>, text: &str) -> Result<Vec<u32>, DataError> {
    let tokens = encoder.encode(text.trim())?;
    if tokens.is_empty() {
        return Err(DataError::RowEmpty);
    }
    let truncate = prepared.tokens.as_ref().and_then(|t| t.column.as_ref()).is_some_and(|column| column.truncate);
    let (context, mut out) = (prepared.shape[0], Vec::new());
    match fill_up(&tokens, context, truncate, &mut out) {
        Ok(()) => Ok(out),
        Err(tokens) => Err(DataError::RowText { tokens, context }),
    }
}

pub(super) fn is_missing(cell: &str, missing: &str) -> bool {
    cell.is_empty() || cell == missing.trim()
}

fn number(cell: &str) -> Option<f32> {
    cell.parse().ok().filter(|x: &f32| x.is_finite())
}

/// What the training set teaches: which cells are features, and how they are encoded.
struct Plan {
    /// In the order of the file, each with its place in a line.
    columns: Vec<(usize, Column)>,
    /// What the ids are, each with its columns' places in a line.
    ids: Vec<(Vec<usize>, IdField)>,
    /// The only column that is learnt from, where samples are texts, and its place in a line.
    text: Option<(usize, Tokenizer)>,
    target: usize,
    /// Sorted; `None` for regression.
    classes: Option<Vec<String>>,
}

/// What is gathered about one column while the training set is read.
enum Seen {
    Number { sum: f64, count: u64 },
    Values(BTreeSet<String>),
}

impl Plan {
    fn learn(train: &Table<'_>, known: Option<&Tokenizer>) -> Result<Plan, DataError> {
        let spec = train.spec;
        let target = train.index("target", &spec.target)?;
        let mut seen: Vec<Option<Seen>> =
            train.names.iter().map(|_| Some(Seen::Number { sum: 0.0, count: 0 })).collect();
        for name in &spec.categorical {
            seen[train.index("categorical", name)?] = Some(Seen::Values(BTreeSet::new()));
        }
        for name in &spec.ignore {
            seen[train.index("ignore", name)?] = None;
        }
        let fields = spec.ids.iter().map(|id| (id.columns.clone(), id.size));
        let mut ids = Vec::new();
        for field in IdField::all(fields) {
            let places: Vec<usize> =
                field.columns.iter().map(|name| train.index("ids", name)).collect::<Result<_, _>>()?;
            let target = std::slice::from_ref(&spec.target);
            for (other, names) in
                [("data.target", target), ("in data.categorical", &spec.categorical), ("in data.ignore", &spec.ignore)]
            {
                if let Some(column) = field.columns.iter().find(|column| names.contains(column)).cloned() {
                    return Err(DataError::Twice { column, one: "in data.ids", other });
                }
            }
            places.iter().for_each(|&i| seen[i] = None);
            ids.push((places, field));
        }
        if seen[target].take().is_none() {
            let column = spec.target.clone();
            return Err(DataError::Twice { column, one: "data.target", other: "in data.ignore" });
        }
        for name in &spec.log {
            let i = train.index("log", name)?;
            if !matches!(seen[i], Some(Seen::Number { .. })) {
                return Err(DataError::NotNumeric { column: name.clone() });
            }
        }
        let text = spec.text.as_ref().map(|text| Ok((train.index("text", &text.column)?, text))).transpose()?;
        if text.is_some_and(|(i, _)| i == target) {
            return Err(DataError::TargetText { column: spec.target.clone() });
        }
        if text.is_some() {
            seen.fill_with(|| None);
        } else if seen.iter().all(Option::is_none) && ids.is_empty() {
            return Err(DataError::NoFeatures { path: train.path.clone() });
        }
        let mut texts = Vec::new();
        let mut classes = BTreeSet::new();
        train.rows(|line, record| {
            for (i, (cell, seen)) in record.iter().zip(&mut seen).enumerate() {
                match seen {
                    Some(_) if is_missing(cell, &spec.missing) => {}
                    Some(Seen::Number { sum, count }) => {
                        let number = number(cell).ok_or_else(|| train.not_a_number(line, i, cell))?;
                        *sum += scaled(number, spec.log.contains(&train.names[i])) as f64;
                        *count += 1;
                    }
                    Some(Seen::Values(values)) => insert(values, cell),
                    None => {}
                }
            }
            texts.extend(text.map(|(i, _)| record[i].to_string()));
            let label = train.target(line, record, target)?;
            match spec.task {
                Task::Classification => insert(&mut classes, label),
                Task::Regression => {}
            }
            Ok(())
        })?;
        let mut columns = Vec::new();
        for (i, (name, seen)) in train.names.iter().zip(seen).enumerate() {
            let (path, name) = (train.path.clone(), name.clone());
            columns.push(match seen {
                None => continue,
                Some(Seen::Number { count: 0, .. }) => return Err(DataError::NoValues { path, column: name }),
                Some(Seen::Values(values)) if values.is_empty() => {
                    return Err(DataError::NoValues { path, column: name });
                }
                Some(Seen::Values(values)) if values.len() > MOST_VALUES => {
                    let (values, most) = (values.len(), MOST_VALUES);
                    return Err(DataError::TooManyValues { path, column: name, values, most });
                }
                Some(Seen::Number { sum, count }) => {
                    let log = spec.log.contains(&name);
                    (i, Column { name, values: None, fill: (sum / count as f64) as f32, log })
                }
                Some(Seen::Values(values)) => {
                    (i, Column { name, values: Some(values.into_iter().collect()), fill: 0.0, log: false })
                }
            });
        }
        let classes = match spec.task {
            Task::Classification if classes.len() > MOST_VALUES => {
                let (path, column) = (train.path.clone(), spec.target.clone());
                return Err(DataError::TooManyClasses { path, column, classes: classes.len(), most: MOST_VALUES });
            }
            Task::Classification => Some(classes.into_iter().collect()),
            Task::Regression => None,
        };
        let learn = |(i, text): (usize, &job::TextColumn)| {
            let learn = || Tokenizer::learn(&text.tokenizer, texts.iter().map(String::as_str));
            (i, known.cloned().unwrap_or_else(learn))
        };
        Ok(Plan { columns, ids, text: text.map(learn), target, classes })
    }

    fn encode(&self, table: &Table<'_>) -> Result<Dataset, DataError> {
        let spec = table.spec;
        let (mut features, mut labels, mut values) = (Vec::new(), Vec::new(), Vec::new());
        let text =
            self.text.as_ref().zip(spec.text.as_ref()).map(|((i, tokenizer), text)| (*i, tokenizer.encoder(), text));
        let (mut tokens, mut ids) = (Vec::new(), Vec::new());
        // A model takes numbers: where there are none, there is one that says nothing.
        let alone = self.columns.is_empty() && text.is_none();
        table.rows(|line, record| {
            if let Some((i, encoder, text)) = &text {
                table.text(line, &record[*i], encoder, text, &mut tokens)?;
            }
            for (i, column) in &self.columns {
                column
                    .encode(&record[*i], &spec.missing, &mut features)
                    .ok_or_else(|| table.not_a_number(line, *i, &record[*i]))?;
            }
            for (places, field) in &self.ids {
                let id = field.id(places.iter().map(|&i| &record[i]), &spec.missing);
                ids.push(id.map_err(|cell| DataError::Id {
                    path: table.path.clone(),
                    line,
                    column: field.columns[0].clone(),
                    cell: cell.into(),
                    size: field.size.unwrap_or_default(),
                })?);
            }
            features.extend(alone.then_some(0.0));
            let cell = table.target(line, record, self.target)?;
            let (path, column) = (|| table.path.clone(), || spec.target.clone());
            match &self.classes {
                Some(classes) => {
                    labels.push(classes.binary_search_by(|c| c.as_str().cmp(cell)).map_err(|_| {
                        DataError::UnknownLabel { path: path(), line, column: column(), label: cell.into() }
                    })? as u32)
                }
                None => values.push(number(cell).ok_or_else(|| DataError::TargetNumber {
                    path: path(),
                    line,
                    column: column(),
                    cell: cell.into(),
                })?),
            }
            Ok(())
        })?;
        features.shrink_to_fit();
        Ok(Dataset {
            shape: vec![match &text {
                Some((_, _, text)) => text.context,
                None => self.columns.iter().map(|(_, column)| column.features()).sum::<usize>() + usize::from(alone),
            }],
            features: if text.is_some() { Features::U32(tokens) } else { Features::F32(features) },
            ids: Ids { fields: self.ids.len(), values: ids },
            targets: match self.classes {
                Some(_) => Targets::Class(labels),
                None => Targets::Value(values),
            },
        })
    }
}

/// A number, or its logarithm on both sides of 0.
fn scaled(x: f32, log: bool) -> f32 {
    if log { (libm::log1p(x.abs() as f64) as f32).copysign(x) } else { x }
}

fn insert(values: &mut BTreeSet<String>, value: &str) {
    if !values.contains(value) {
        values.insert(value.into());
    }
}

impl Column {
    /// How many features the column becomes.
    pub fn features(&self) -> usize {
        self.values.as_ref().map_or(1, Vec::len)
    }

    /// Appends a cell's features to `out`; `None` where it should be a finite number and is not.
    fn encode(&self, cell: &str, missing: &str, out: &mut Vec<f32>) -> Option<()> {
        match &self.values {
            None if is_missing(cell, missing) => out.push(self.fill),
            None => out.push(scaled(number(cell)?, self.log)),
            Some(values) => {
                let start = out.len();
                out.resize(start + values.len(), 0.0);
                if !is_missing(cell, missing)
                    && let Ok(i) = values.binary_search_by(|v| v.as_str().cmp(cell))
                {
                    out[start + i] = 1.0;
                }
            }
        }
        Some(())
    }
}

/// One new sample's raw features, from its cells by column name, encoded as the training set was.
///
/// `cell` yields `None` for a column that is not there; an unknown value is an empty cell.
pub fn encode<'c>(prepared: &Prepared, cell: impl Fn(&str) -> Option<&'c str>) -> Result<Vec<f32>, DataError> {
    let mut row = Vec::with_capacity(prepared.shape.iter().product());
    for column in &prepared.columns {
        let cell = cell(&column.name).ok_or_else(|| DataError::CellAbsent { column: column.name.clone() })?.trim();
        column
            .encode(cell, &prepared.missing, &mut row)
            .ok_or_else(|| DataError::CellNumber { column: column.name.clone(), cell: cell.into() })?;
    }
    if prepared.columns.is_empty() {
        row.push(0.0);
    }
    Ok(row)
}

/// One new sample's ids, from its cells by column name.
///
/// # Errors
/// A column that is not there, and a value that is none of a declared vocabulary.
pub fn encode_ids<'c>(prepared: &Prepared, cell: impl Fn(&str) -> Option<&'c str>) -> Result<Vec<u64>, DataError> {
    let id = |field: &IdField| {
        let cell =
            |name: &String| cell(name).map(str::trim).ok_or_else(|| DataError::CellAbsent { column: name.clone() });
        let cells: Vec<&str> = field.columns.iter().map(cell).collect::<Result<_, _>>()?;
        field.id(cells.into_iter(), &prepared.missing).map_err(|cell| {
            let (column, cell, size) = (field.columns[0].clone(), cell.into(), field.size.unwrap_or_default());
            if field.values.is_empty() {
                DataError::CellId { column, cell, size }
            } else {
                DataError::CellUnknown { column, cell }
            }
        })
    };
    prepared.ids.iter().map(id).collect()
}

/// Reads both splits; everything that is learnt is learnt from the training set.
pub(super) fn read(
    root: Option<&Path>,
    spec: &job::Csv,
    seed: u64,
    known: Option<&Tokenizer>,
) -> Result<Raw, DataError> {
    let mut train = Table::open(root, spec, &spec.train)?;
    if let Some(share) = spec.holdout {
        let learnt = |name: &String| match &spec.text {
            Some(text) => *name == text.column,
            None => *name != spec.target && !spec.ignore.contains(name),
        };
        let columns = (0..train.names.len()).filter(|&i| learnt(&train.names[i])).collect();
        train.part = Some(Part { key: Key::new(seed, Purpose::Split), share, held_out: false, columns });
    }
    let plan = Plan::learn(&train, known)?;
    let test = match (&spec.test, &train.part) {
        (None, None) => None,
        (None, Some(part)) => {
            let held_out = Part { held_out: true, ..part.clone() };
            Some(plan.encode(&Table { part: Some(held_out), ..train.clone() })?)
        }
        (Some(path), _) => {
            let test = Table::open(root, spec, path)?;
            if test.names != train.names {
                let (path, list) = (test.path.clone(), |t: &Table<'_>| t.names.join(","));
                return Err(DataError::TestColumns { path, test: list(&test), train: list(&train) });
            }
            Some(plan.encode(&test)?)
        }
    };
    let train = plan.encode(&train)?;
    let columns = plan.columns.into_iter().map(|(_, column)| column).collect();
    let ids = plan.ids.into_iter().map(|(_, field)| field).collect();
    let raw = Raw::new(train, test, plan.classes, Scale { per_feature: true, unit: 1.0 });
    let tokens = plan.text.zip(spec.text.as_ref()).map(|((_, tokenizer), text)| Tokens {
        // Token 0 is none.
        vocabulary: tokenizer.vocabulary() + 1,
        tokenizer: Some(tokenizer),
        tokens_per_character: 1.0,
        column: Some(TextColumn { name: text.column.clone(), truncate: text.truncate }),
    });
    Ok(Raw { columns, missing: spec.missing.clone(), tokens, ids, ..raw })
}

#[cfg(test)]
mod tests;
