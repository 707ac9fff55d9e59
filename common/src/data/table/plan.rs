//! What the training set teaches: which cells are features, and how they are encoded.

use super::Table;
use super::cells::{fill_up, is_missing, number, scaled};
use crate::data::dataset::is_weight;
use crate::data::error::At;
use crate::data::tokenizer::{Count, Encoder, Tokenizer, Wanted};
use crate::data::{Column, DataError, Dataset, Features, IdField, Ids, Prepared, Targets};
use crate::job::{self, Task};
use ::csv::StringRecord;
use std::collections::BTreeSet;

/// More values than this in a categorical column or target are a mistake (an identifier, a measurement), not categories.
pub(in crate::data) const MOST_VALUES: usize = 10_000;

/// What a column is, as the job says.
#[derive(Clone, Copy, PartialEq)]
enum Use {
    Number {
        log: bool,
    },
    Category,
    /// The target, a part of an id, a text, or nothing.
    Other,
}

/// What the columns of a table are for, before anything is learnt.
pub(super) struct Roles<'a> {
    spec: &'a job::Table,
    names: Vec<String>,
    uses: Vec<Use>,
    /// What the ids are, each with its columns' places in a row.
    ids: Vec<(Vec<usize>, IdField)>,
    /// The only column that is learnt from, where samples are texts.
    text: Option<Text<'a>>,
    target: usize,
    /// Where samples count differently.
    weight: Option<(usize, &'a str)>,
}

/// The column whose texts are samples.
struct Text<'a> {
    /// Its place in a row.
    place: usize,
    spec: &'a job::TextColumn,
    wanted: &'a Wanted,
    count: Box<Count<'a>>,
}

impl Text<'_> {
    fn too_long(&self, at: &At, tokens: usize) -> DataError {
        let job::TextColumn { column, context, .. } = self.spec;
        DataError::LongText { at: at.clone(), column: column.clone(), tokens, context: *context }
    }

    /// What is wrong with a row, where the tokenizer says it of its text.
    fn refused(&self, at: &At, error: DataError) -> DataError {
        let (at, column) = (at.clone(), self.spec.column.clone());
        match error {
            // Only a text that the tokenizer was not learnt from can have one.
            DataError::Character { character } => DataError::NewCharacter { at, column, character },
            DataError::NoTokens { why } => DataError::CellTokens { at, column, why },
            other => other,
        }
    }
}

impl<'a> Roles<'a> {
    /// Those of the training set's columns; `wanted` is there where a text column is.
    ///
    /// # Errors
    /// Columns that are not there, or are two things at once.
    pub fn new(train: &Table<'a>, wanted: Option<&'a Wanted>) -> Result<Roles<'a>, DataError> {
        let spec = train.spec;
        let target = train.index("target", &spec.target)?;
        let mut uses = vec![Use::Number { log: false }; train.names().len()];
        for name in &spec.categorical {
            uses[train.index("categorical", name)?] = Use::Category;
        }
        for name in &spec.ignore {
            uses[train.index("ignore", name)?] = Use::Other;
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
            places.iter().for_each(|&i| uses[i] = Use::Other);
            ids.push((places, field));
        }
        if std::mem::replace(&mut uses[target], Use::Other) == Use::Other {
            let column = spec.target.clone();
            return Err(DataError::Twice { column, one: "data.target", other: "in data.ignore" });
        }
        for name in &spec.log {
            match &mut uses[train.index("log", name)?] {
                Use::Number { log } => *log = true,
                Use::Category | Use::Other => return Err(DataError::NotNumeric { column: name.clone() }),
            }
        }
        let text = spec.text.as_ref().zip(wanted).map(|(spec, wanted)| {
            Ok(Text { place: train.index("text", &spec.column)?, spec, wanted, count: wanted.counter() })
        });
        let text = text.transpose()?;
        if text.as_ref().is_some_and(|text| text.place == target) {
            return Err(DataError::TargetText { column: spec.target.clone() });
        }
        let weight = spec.weight.as_ref().map(|name| Ok((train.index("weight", name)?, name.as_str()))).transpose()?;
        if let Some((i, name)) = weight {
            let number = matches!(uses[i], Use::Number { log: false });
            let other = match i {
                _ if i == target => Some("data.target"),
                _ if text.as_ref().is_some_and(|text| text.place == i) => Some("data.text"),
                _ if number => None,
                _ => Some("in another list of [data]"),
            };
            if let Some(other) = other {
                return Err(DataError::Twice { column: name.into(), one: "data.weight", other });
            }
            uses[i] = Use::Other;
        }
        if text.is_some() {
            uses.fill(Use::Other);
        } else if uses.iter().all(|one| *one == Use::Other) && ids.is_empty() {
            return Err(DataError::NoFeatures { path: train.path.to_string() });
        }
        Ok(Roles { spec, names: train.names().into(), uses, ids, text, target, weight })
    }

    /// Whether a row can be used, as far as that does not depend on others; into `numbers` goes what each column of numbers holds,
    /// and NaN where that is missing.
    pub fn check(&self, at: &At, row: &StringRecord, numbers: &mut Vec<f32>) -> Result<(), DataError> {
        numbers.clear();
        for (i, cell) in row.iter().enumerate().filter(|(i, _)| matches!(self.uses[*i], Use::Number { .. })) {
            let missing = is_missing(cell, &self.spec.missing);
            let number = if missing { Some(f32::NAN) } else { number(cell) };
            numbers.push(number.ok_or_else(|| self.not_a_number(at, i, cell))?);
        }
        if let Some(text) = &self.text {
            let tokens = (text.count)(&row[text.place]).map_err(|error| text.refused(at, error))?;
            if tokens == 0 {
                return Err(DataError::NoText { at: at.clone(), column: text.spec.column.clone() });
            }
            if tokens > text.spec.context && !text.spec.truncate {
                return Err(text.too_long(at, tokens));
            }
        }
        self.ids.iter().try_for_each(|field| self.id(at, row, field).map(|_| ()))?;
        self.weight(at, row)?;
        let target = self.target(at, row)?;
        match self.spec.task {
            Task::Regression => self.value(at, target).map(|_| ()),
            Task::Classification => Ok(()),
        }
    }

    fn not_a_number(&self, at: &At, column: usize, cell: &str) -> DataError {
        DataError::Number { at: at.clone(), column: self.names[column].clone(), cell: cell.into() }
    }

    fn id(&self, at: &At, row: &StringRecord, (places, field): &(Vec<usize>, IdField)) -> Result<u64, DataError> {
        field.id(places.iter().map(|&i| &row[i]), &self.spec.missing).map_err(|cell| DataError::Id {
            at: at.clone(),
            column: field.columns[0].clone(),
            cell: cell.into(),
            size: field.size.unwrap_or_default(),
        })
    }

    /// How much the row counts, where rows count differently.
    fn weight(&self, at: &At, row: &StringRecord) -> Result<Option<f32>, DataError> {
        let Some((i, name)) = self.weight else { return Ok(None) };
        let weight = number(&row[i]).filter(|weight| is_weight(*weight));
        weight.map(Some).ok_or_else(|| DataError::Weight { at: at.clone(), column: name.into(), cell: row[i].into() })
    }

    /// The target's cell; a class has no full stop at its end.
    fn target<'r>(&self, at: &At, row: &'r StringRecord) -> Result<&'r str, DataError> {
        match (&row[self.target], self.spec.task) {
            (cell, _) if is_missing(cell, &self.spec.missing) => {
                Err(DataError::NoTarget { at: at.clone(), column: self.spec.target.clone() })
            }
            (cell, Task::Classification) => Ok(cell.strip_suffix('.').unwrap_or(cell)),
            (cell, Task::Regression) => Ok(cell),
        }
    }

    /// The target's cell as a number.
    fn value(&self, at: &At, cell: &str) -> Result<f32, DataError> {
        number(cell).ok_or_else(|| DataError::TargetNumber {
            at: at.clone(),
            column: self.spec.target.clone(),
            cell: cell.into(),
        })
    }
}

/// What the training set teaches.
pub(super) struct Plan<'a> {
    roles: Roles<'a>,
    /// In the order of the file, each with its place in a row.
    columns: Vec<(usize, Column)>,
    /// Where samples are texts.
    pub tokenizer: Option<Tokenizer>,
    /// Sorted; `None` for regression.
    pub classes: Option<Vec<String>>,
}

/// What is gathered about one column while the training set is read.
enum Seen {
    Number { sum: f64, count: u64, log: bool },
    Values(BTreeSet<String>),
}

fn insert(values: &mut BTreeSet<String>, value: &str) {
    if !values.contains(value) {
        values.insert(value.into());
    }
}

impl<'a> Plan<'a> {
    pub fn learn(train: &Table<'a>, roles: Roles<'a>) -> Result<Plan<'a>, DataError> {
        let (spec, path) = (roles.spec, || train.path.to_string());
        let mut seen: Vec<Option<Seen>> = roles
            .uses
            .iter()
            .map(|one| match one {
                Use::Number { log } => Some(Seen::Number { sum: 0.0, count: 0, log: *log }),
                Use::Category => Some(Seen::Values(BTreeSet::new())),
                Use::Other => None,
            })
            .collect();
        let (mut texts, mut classes, mut numbers) = (Vec::new(), BTreeSet::new(), Vec::new());
        train.rows(|at, row| {
            roles.check(at, row, &mut numbers)?;
            let mut numbers = numbers.iter();
            for (cell, seen) in row.iter().zip(&mut seen) {
                match seen {
                    Some(Seen::Number { sum, count, log }) => {
                        if let Some(number) = numbers.next().filter(|number| !number.is_nan()) {
                            *sum += scaled(*number, *log) as f64;
                            *count += 1;
                        }
                    }
                    Some(Seen::Values(values)) if !is_missing(cell, &spec.missing) => insert(values, cell),
                    Some(Seen::Values(_)) | None => {}
                }
            }
            texts.extend(roles.text.as_ref().map(|text| row[text.place].to_string()));
            match spec.task {
                Task::Classification => insert(&mut classes, roles.target(at, row)?),
                Task::Regression => {}
            }
            Ok(())
        })?;
        let mut columns = Vec::new();
        for (i, (name, seen)) in train.names().iter().zip(seen).enumerate() {
            let name = name.clone();
            columns.push(match seen {
                None => continue,
                Some(Seen::Number { count: 0, .. }) => return Err(DataError::NoValues { path: path(), column: name }),
                Some(Seen::Values(values)) if values.is_empty() => {
                    return Err(DataError::NoValues { path: path(), column: name });
                }
                Some(Seen::Values(values)) if values.len() > MOST_VALUES => {
                    let (values, most) = (values.len(), MOST_VALUES);
                    return Err(DataError::TooManyValues { path: path(), column: name, values, most });
                }
                Some(Seen::Number { sum, count, log }) => {
                    (i, Column { name, values: None, fill: (sum / count as f64) as f32, log })
                }
                Some(Seen::Values(values)) => {
                    (i, Column { name, values: Some(values.into_iter().collect()), fill: 0.0, log: false })
                }
            });
        }
        let classes = match spec.task {
            Task::Classification if classes.len() > MOST_VALUES => {
                let (column, classes) = (spec.target.clone(), classes.len());
                return Err(DataError::TooManyClasses { path: path(), column, classes, most: MOST_VALUES });
            }
            Task::Classification => Some(classes.into_iter().collect()),
            Task::Regression => None,
        };
        let tokenizer = roles.text.as_ref().map(|text| text.wanted.learn(texts.iter().map(String::as_str)));
        Ok(Plan { roles, columns, tokenizer, classes })
    }

    /// What the training set of a model has taught, in place of what this one has, where that has the same columns.
    pub fn take_over(&mut self, known: &Prepared) {
        let kind = |column: &Column| (column.name.clone(), column.values.is_some(), column.log);
        if self.columns.iter().map(|(_, column)| kind(column)).eq(known.columns.iter().map(kind)) {
            self.columns.iter_mut().zip(&known.columns).for_each(|((_, ours), theirs)| ours.clone_from(theirs));
            if self.classes.is_some() && known.classes.is_some() {
                self.classes.clone_from(&known.classes);
            }
        }
    }

    /// Columns that became features, and what the ids are.
    pub fn into_parts(self) -> (Vec<Column>, Vec<IdField>, Option<Vec<String>>, Option<Tokenizer>) {
        let columns = self.columns.into_iter().map(|(_, column)| column).collect();
        (columns, self.roles.ids.into_iter().map(|(_, field)| field).collect(), self.classes, self.tokenizer)
    }

    fn label(&self, at: &At, classes: &[String], cell: &str) -> Result<u32, DataError> {
        let found = classes.binary_search_by(|class| class.as_str().cmp(cell));
        let column = || self.roles.spec.target.clone();
        found.map(|i| i as u32).map_err(|_| DataError::UnknownLabel {
            at: at.clone(),
            column: column(),
            label: cell.into(),
        })
    }

    /// Appends a text's tokens, each one more than its tokenizer says, and fills up with 0.
    fn text(
        &self,
        at: &At,
        (text, encoder): &(&Text<'_>, Encoder<'_>),
        row: &StringRecord,
        out: &mut Vec<u32>,
    ) -> Result<(), DataError> {
        let tokens = encoder.encode(&row[text.place]).map_err(|error| text.refused(at, error))?;
        let job::TextColumn { context, truncate, .. } = text.spec;
        fill_up(&tokens, *context, *truncate, out).map_err(|tokens| text.too_long(at, tokens))
    }

    fn encoder(&self) -> Option<(&Text<'a>, Encoder<'_>)> {
        Some((self.roles.text.as_ref()?, self.tokenizer.as_ref()?.encoder()))
    }

    /// What finds out whether a row, which nothing was learnt from, can be used.
    pub fn checks(&self) -> impl FnMut(&At, &StringRecord) -> Result<(), DataError> {
        let (mut numbers, mut tokens, encoder) = (Vec::new(), Vec::new(), self.encoder());
        move |at, row| {
            self.roles.check(at, row, &mut numbers)?;
            if let Some(encoder) = &encoder {
                tokens.clear();
                self.text(at, encoder, row, &mut tokens)?;
            }
            match &self.classes {
                Some(classes) => self.label(at, classes, self.roles.target(at, row)?).map(|_| ()),
                None => Ok(()),
            }
        }
    }

    pub fn encode(&self, table: &Table<'_>) -> Result<Dataset, DataError> {
        let (roles, missing) = (&self.roles, &self.roles.spec.missing);
        let (mut features, mut labels, mut values) = (Vec::new(), Vec::new(), Vec::new());
        let (mut tokens, mut ids, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let text = self.encoder();
        // A model takes numbers: where there are none, there is one that says nothing.
        let alone = self.columns.is_empty() && text.is_none();
        let mut numbers = Vec::new();
        table.rows(|at, row| {
            roles.check(at, row, &mut numbers)?;
            if let Some(text) = &text {
                self.text(at, text, row, &mut tokens)?;
            }
            for (i, column) in &self.columns {
                let encoded = column.encode(&row[*i], missing, &mut features);
                encoded.ok_or_else(|| roles.not_a_number(at, *i, &row[*i]))?;
            }
            for field in &roles.ids {
                ids.push(roles.id(at, row, field)?);
            }
            features.extend(alone.then_some(0.0));
            weights.extend(roles.weight(at, row)?);
            let cell = roles.target(at, row)?;
            match &self.classes {
                Some(classes) => labels.push(self.label(at, classes, cell)?),
                None => values.push(roles.value(at, cell)?),
            }
            Ok(())
        })?;
        features.shrink_to_fit();
        if let Some((_, column)) = roles.weight.filter(|_| weights.iter().all(|weight| *weight == 0.0)) {
            let what = if table.part.as_ref().is_some_and(|part| part.held_out) { "test on" } else { "train on" };
            return Err(DataError::NoWeight { path: table.path.to_string(), column: column.into(), what });
        }
        Ok(Dataset {
            shape: vec![match &text {
                Some((text, _)) => text.spec.context,
                None => self.columns.iter().map(|(_, column)| column.features()).sum::<usize>() + usize::from(alone),
            }],
            features: if text.is_some() { Features::U32(tokens) } else { Features::F32(features) },
            ids: Ids { fields: roles.ids.len(), values: ids, ..Ids::default() },
            targets: match self.classes {
                Some(_) => Targets::Class(labels),
                None => Targets::Value(values),
            },
            weights,
        })
    }
}
