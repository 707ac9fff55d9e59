//! Tables: rows of cells, of which numbers are taken as they are, and categories one-hot encoded over the training set's values.
//!
//! | module | what it does |
//! | --- | --- |
//! | `csv`, `json_lines`, `parquet` | files as rows of cells, each a text |
//! | `plan` | what the columns are for, what the training set teaches, and samples |
//! | `cells` | from a cell to numbers; also those of new samples |

mod cells;
mod csv;
mod json_lines;
#[cfg(feature = "parquet")]
mod parquet;
mod plan;

pub(super) use cells::is_missing;
pub use cells::{encode, encode_ids, encode_text};
pub(super) use plan::MOST_VALUES;

use self::csv::Csv;
use self::json_lines::JsonLines;
use self::plan::{Plan, Roles};
use super::bad::Bad;
use super::error::At;
use super::tokenizer::Wanted;
use super::{DataError, Files, Prepared, Raw, Scale, TextColumn, Tokens, read_bytes};
use crate::job::{self, Form};
use crate::rng::{Key, Purpose};
use ::csv::StringRecord;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

/// What is done with a row: its number, and its cells, or why it has none.
type Take<'t> = dyn FnMut(usize, Result<&StringRecord, DataError>) -> Result<(), DataError> + 't;

/// A file as rows of cells: trimmed texts, as many as there are columns; a missing one is empty.
trait Rows {
    fn names(&self) -> &[String];

    /// Whether rows are lines of the file, and their numbers those of the lines.
    fn are_lines(&self) -> bool;

    /// Takes all rows, in the order of the file.
    ///
    /// # Errors
    /// What `row` gives back; a file that ends too early, or is no such file. What is wrong with one row, `row` is told.
    fn each(&self, row: &mut Take<'_>) -> Result<(), DataError>;

    /// Learns the columns anew where rows decide what they are, without these ones.
    fn forget(&mut self, _bad: &BTreeSet<usize>) {}
}

#[cfg(feature = "parquet")]
fn parquet(path: Arc<str>, bytes: Vec<u8>, spec: &job::Table) -> Result<Rc<dyn Rows>, DataError> {
    Ok(Rc::new(parquet::Parquet::open(path, bytes, spec)?))
}

#[cfg(not(feature = "parquet"))]
fn parquet(path: Arc<str>, _: Vec<u8>, _: &job::Table) -> Result<Rc<dyn Rows>, DataError> {
    Err(DataError::WithoutParquet { path: path.to_string() })
}

/// One file, and which of its rows are looked at.
#[derive(Clone)]
struct Table<'a> {
    path: Arc<str>,
    spec: &'a job::Table,
    file: Rc<dyn Rows + 'a>,
    /// Rows that are left out, by their numbers.
    bad: Rc<BTreeSet<usize>>,
    part: Option<Part>,
}

/// One of two parts of a file's rows, which the hash of some cells decides between.
#[derive(Clone)]
struct Part {
    key: Key,
    /// Of the rows that are held out.
    share: f64,
    held_out: bool,
    /// Places of the columns that are hashed.
    columns: Vec<usize>,
}

impl Part {
    fn has(&self, row: &StringRecord) -> bool {
        let key = self.columns.iter().fold(self.key, |key, column| key.named(&row[*column]));
        ((key.uniform(0) as f64) < self.share) == self.held_out
    }
}

impl<'a> Table<'a> {
    /// `train` are the training set's columns, where it is not that itself; `lenient`: rows may be left out.
    fn open(
        files: &Files,
        spec: &'a job::Table,
        path: &str,
        train: Option<&[String]>,
        lenient: bool,
    ) -> Result<Table<'a>, DataError> {
        let found = files.find(&spec.base, path)?;
        let path: Arc<str> = found.display().to_string().into();
        let bytes = read_bytes(&found)?;
        let file: Rc<dyn Rows + 'a> = match &spec.form {
            Form::Csv { columns, header, separator, quoting } => {
                Rc::new(Csv::open(path.clone(), bytes, columns.as_deref(), *header, *separator, *quoting)?)
            }
            Form::Parquet => parquet(path.clone(), bytes, spec)?,
            Form::JsonLines => Rc::new(JsonLines::open(path.clone(), bytes, spec, train, lenient)?),
        };
        let table = Table { path, spec, file, bad: Rc::default(), part: None };
        let mut seen = BTreeSet::new();
        if let Some(column) = table.names().iter().find(|name| !seen.insert(*name)).cloned() {
            return Err(DataError::SameName { path: table.path.to_string(), column });
        }
        match train {
            Some(train) if train != table.names() => {
                let list = |names: &[String]| names.join(",");
                let (test, train) = (list(table.names()), list(train));
                Err(DataError::TestColumns { path: table.path.to_string(), test, train })
            }
            Some(_) | None => Ok(table),
        }
    }

    fn names(&self) -> &[String] {
        self.file.names()
    }

    /// Takes the rows that are looked at.
    fn rows(&self, mut row: impl FnMut(&At, &StringRecord) -> Result<(), DataError>) -> Result<(), DataError> {
        let (mut any, lines) = (false, self.file.are_lines());
        self.file.each(&mut |number, cells| {
            if self.bad.contains(&number) {
                return Ok(());
            }
            let cells = cells?;
            if self.part.as_ref().is_none_or(|part| part.has(cells)) {
                any = true;
                row(&At { path: self.path.clone(), row: number, lines }, cells)?;
            }
            Ok(())
        })?;
        let path = self.path.to_string();
        match &self.part {
            _ if any => Ok(()),
            None => Err(DataError::Empty { path }),
            Some(Part { share, held_out, .. }) => {
                let (share, what) = (*share, if *held_out { "test on" } else { "train on" });
                Err(DataError::Holdout { share, path, what })
            }
        }
    }

    /// Finds out which rows cannot be used, where such rows are left out; whether there are any.
    fn screen(
        &mut self,
        bad: &mut Bad,
        mut check: impl FnMut(&At, &StringRecord) -> Result<(), DataError>,
    ) -> Result<bool, DataError> {
        if !bad.skips() {
            return Ok(false);
        }
        let (mut found, lines) = ((*self.bad).clone(), self.file.are_lines());
        self.file.each(&mut |number, cells| {
            if self.bad.contains(&number) {
                return Ok(());
            }
            let at = At { path: self.path.clone(), row: number, lines };
            let usable = cells.and_then(|cells| match &self.part {
                Some(part) if !part.has(cells) => Ok(()),
                Some(_) | None => check(&at, cells),
            });
            if let Err(error) = usable {
                bad.take(error)?;
                found.insert(number);
            }
            Ok(())
        })?;
        bad.check()?;
        let more = found.len() > self.bad.len();
        self.bad = found.into();
        Ok(more)
    }

    /// The index of a column that the job names.
    fn index(&self, key: &'static str, column: &str) -> Result<usize, DataError> {
        self.names().iter().position(|name| name == column).ok_or_else(|| {
            let alike = |name: &&String| strsim::jaro_winkler(name, column);
            let nearest = self.names().iter().max_by(|a, b| alike(a).total_cmp(&alike(b)));
            let (nearest, path) = (nearest.cloned().unwrap_or_default(), self.path.to_string());
            DataError::NoColumn { key, column: column.into(), path, nearest }
        })
    }
}

/// Tells `row` of all rows of a table's training file, of which nothing is known yet but its form: their cells, or what is wrong with
/// them; gives the names of the columns.
///
/// # Errors
/// What `row` gives back; a file that is no such table.
pub fn look(
    files: &Files,
    spec: &job::Table,
    mut row: impl FnMut(Result<&StringRecord, DataError>) -> Result<(), DataError>,
) -> Result<Vec<String>, DataError> {
    let table = Table::open(files, spec, &spec.train, None, true)?;
    table.file.each(&mut |_, cells| row(cells))?;
    Ok(table.names().into())
}

/// The text column's cells of a table's training file, one after another, with a line end between each two; empty ones are passed
/// over.
pub(super) fn texts(files: &Files, spec: &job::Table) -> Result<String, DataError> {
    let table = Table::open(files, spec, &spec.train, None, false)?;
    let (at, mut all) = (table.index("text", &spec.target)?, String::new());
    table.rows(|_, row| {
        if !all.is_empty() && !row[at].is_empty() {
            all.push('\n');
        }
        all.push_str(&row[at]);
        Ok(())
    })?;
    Ok(all)
}

/// Reads both splits; everything that is learnt is learnt from the training set, or was from that of a model whose data is `known`.
pub(super) fn read(
    files: &Files,
    spec: &job::Table,
    seed: u64,
    known: Option<&Prepared>,
    on_error: job::OnError,
) -> Result<Raw, DataError> {
    let mut bad = Bad::new(on_error);
    let tokenizer = known.and_then(|known| known.tokens.as_ref()?.tokenizer.as_ref());
    let wanted = |text: &job::TextColumn| Wanted::new(files, &spec.base, &text.tokenizer, tokenizer);
    let wanted = spec.text.as_ref().map(wanted).transpose()?;
    let mut train = Table::open(files, spec, &spec.train, None, bad.skips())?;
    let mut roles = Roles::new(&train, wanted.as_ref())?;
    let mut numbers = Vec::new();
    if train.screen(&mut bad, |at, row| roles.check(at, row, &mut numbers))? {
        // A column may have been in such rows alone.
        let without = train.bad.clone();
        if let Some(file) = Rc::get_mut(&mut train.file) {
            file.forget(&without);
        }
        roles = Roles::new(&train, wanted.as_ref())?;
    }
    if let Some(share) = spec.holdout {
        let columns = match &spec.holdout_by[..] {
            [] => (0..train.names().len()).filter(|&i| spec.learns_from(&train.names()[i])).collect(),
            by => by.iter().map(|name| train.index("holdout_by", name)).collect::<Result<_, _>>()?,
        };
        train.part = Some(Part { key: Key::new(seed, Purpose::Split), share, held_out: false, columns });
    }
    let mut plan = Plan::learn(&train, roles)?;
    if let Some(known) = known {
        plan.take_over(known);
        // Of other rows not all have a class that the model knows.
        train.screen(&mut bad, plan.checks())?;
    }
    let test = match (&spec.test, &train.part) {
        (None, None) => None,
        (None, Some(part)) => {
            let held_out = Part { held_out: true, ..part.clone() };
            Some(Table { part: Some(held_out), ..train.clone() })
        }
        (Some(path), _) => Some(Table::open(files, spec, path, Some(train.names()), bad.skips())?),
    };
    let test = match test {
        Some(mut test) => {
            test.screen(&mut bad, plan.checks())?;
            Some(plan.encode(&test)?)
        }
        None => None,
    };
    let train = plan.encode(&train)?;
    let (columns, ids, classes, tokenizer) = plan.into_parts();
    let raw = Raw::new(train, test, classes, Scale { per_feature: true, unit: 1.0 });
    let tokens = tokenizer.zip(spec.text.as_ref()).map(|(tokenizer, text)| Tokens {
        // Token 0 is none.
        vocabulary: tokenizer.vocabulary() + 1,
        tokenizer: Some(tokenizer),
        tokens_per_character: 1.0,
        column: Some(TextColumn { name: text.column.clone(), truncate: text.truncate }),
    });
    Ok(Raw { columns, missing: spec.missing.clone(), tokens, ids, skipped: bad.skipped(), ..raw })
}

#[cfg(test)]
mod forms;
#[cfg(test)]
mod tests;
