//! JSON objects, one a line, with their cells by column name.

use super::{Rows, Take};
use crate::data::DataError;
use crate::data::error::At;
use crate::job;
use ::csv::StringRecord;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

/// One file. A key that a line lacks is an empty cell, and so is null.
pub(super) struct JsonLines<'a> {
    path: Arc<str>,
    bytes: Vec<u8>,
    spec: &'a job::Table,
    names: Vec<String>,
}

/// A value as the text of a cell, or why it is none.
enum Cell<'j> {
    Text(Cow<'j, str>),
    Nested(&'static str),
}

struct CellVisitor;

impl<'j> Visitor<'j> for CellVisitor {
    type Value = Cell<'j>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Cell<'j>, E> {
        Ok(Cell::Text(if value { "true" } else { "false" }.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Cell<'j>, E> {
        Ok(Cell::Text(value.to_string().into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Cell<'j>, E> {
        Ok(Cell::Text(value.to_string().into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Cell<'j>, E> {
        Ok(Cell::Text(value.to_string().into()))
    }

    fn visit_borrowed_str<E>(self, value: &'j str) -> Result<Cell<'j>, E> {
        Ok(Cell::Text(value.trim().into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Cell<'j>, E> {
        Ok(Cell::Text(value.trim().to_string().into()))
    }

    fn visit_unit<E>(self) -> Result<Cell<'j>, E> {
        Ok(Cell::Text("".into()))
    }

    fn visit_seq<A: SeqAccess<'j>>(self, mut items: A) -> Result<Cell<'j>, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Cell::Nested("a list"))
    }

    fn visit_map<A: MapAccess<'j>>(self, mut entries: A) -> Result<Cell<'j>, A::Error> {
        while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Cell::Nested("an object"))
    }
}

impl<'j> Deserialize<'j> for Cell<'j> {
    fn deserialize<D: Deserializer<'j>>(from: D) -> Result<Cell<'j>, D::Error> {
        from.deserialize_any(CellVisitor)
    }
}

/// A line's keys and values, in their order.
struct Object<'j>(Vec<(Cow<'j, str>, Cell<'j>)>);

struct ObjectVisitor;

impl<'j> Visitor<'j> for ObjectVisitor {
    type Value = Object<'j>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object, { \"column\": value, ... }")
    }

    fn visit_map<A: MapAccess<'j>>(self, mut entries: A) -> Result<Object<'j>, A::Error> {
        let mut all = Vec::new();
        while let Some((Key(key), cell)) = entries.next_entry()? {
            all.push((key, cell));
        }
        Ok(Object(all))
    }
}

impl<'j> Deserialize<'j> for Object<'j> {
    fn deserialize<D: Deserializer<'j>>(from: D) -> Result<Object<'j>, D::Error> {
        from.deserialize_map(ObjectVisitor)
    }
}

/// A key, borrowed where it has no escapes.
#[derive(serde::Deserialize)]
struct Key<'j>(#[serde(borrow)] Cow<'j, str>);

impl<'a> JsonLines<'a> {
    /// Its columns are `names`, or, where these are not known yet, the keys of its lines in the order in which they first appear;
    /// `lenient`: of those that are objects.
    pub fn open(
        path: Arc<str>,
        bytes: Vec<u8>,
        spec: &'a job::Table,
        names: Option<&[String]>,
        lenient: bool,
    ) -> Result<JsonLines<'a>, DataError> {
        let mut lines = JsonLines { path, bytes, spec, names: names.unwrap_or_default().into() };
        if names.is_none()
            && let Some(wrong) = lines.learn(&BTreeSet::new())
            && (!lenient || lines.names.is_empty())
        {
            return Err(wrong);
        }
        Ok(lines)
    }

    /// The lines that are not blank, with their numbers.
    fn lines(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let lines = self.bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        (1..).zip(lines).filter(|(_, line)| !line.is_empty())
    }

    fn at(&self, line: usize) -> At {
        At { path: self.path.clone(), row: line, lines: true }
    }

    fn object<'j>(&self, line: usize, bytes: &'j [u8]) -> Result<Object<'j>, DataError> {
        let text = std::str::from_utf8(bytes).map_err(|_| DataError::RowNotText { at: self.at(line) })?;
        serde_json::from_str(text).map_err(|e| {
            // The line is known better, and the column is all that is left of the place.
            let (why, column) = (e.to_string(), e.column());
            let why = why.split(" at line ").next().unwrap_or_default();
            DataError::Json { at: self.at(line), why: format!("{why} (character {column})") }
        })
    }

    /// Fills `cells`, one a column; other keys are left out.
    fn cells(
        &self,
        line: usize,
        bytes: &[u8],
        places: &HashMap<&str, usize>,
        cells: &mut [Option<String>],
    ) -> Result<(), DataError> {
        cells.fill(None);
        for (key, cell) in self.object(line, bytes)?.0 {
            let Some(&place) = places.get(key.as_ref()) else { continue };
            let text = match cell {
                Cell::Text(text) => text.into_owned(),
                Cell::Nested(what) if self.spec.reads(&key) => {
                    return Err(DataError::Nested { at: self.at(line), column: key.into(), what });
                }
                Cell::Nested(_) => String::new(),
            };
            if cells[place].replace(text).is_some() {
                return Err(DataError::SameKey { at: self.at(line), column: key.into() });
            }
        }
        Ok(())
    }

    /// Learns the columns; gives what is wrong with the first line that has none.
    fn learn(&mut self, without: &BTreeSet<usize>) -> Option<DataError> {
        let (mut names, mut seen, mut wrong): (Vec<String>, BTreeSet<String>, _) = (Vec::new(), BTreeSet::new(), None);
        for (line, bytes) in self.lines().filter(|(line, _)| !without.contains(line)) {
            match self.object(line, bytes) {
                Ok(Object(entries)) => {
                    for (key, _) in entries {
                        if !seen.contains(key.as_ref()) {
                            seen.insert(key.to_string());
                            names.push(key.into());
                        }
                    }
                }
                Err(error) => wrong = wrong.or(Some(error)),
            }
        }
        self.names = names;
        wrong.or_else(|| self.names.is_empty().then(|| DataError::Empty { path: self.path.to_string() }))
    }
}

impl Rows for JsonLines<'_> {
    fn names(&self) -> &[String] {
        &self.names
    }

    fn are_lines(&self) -> bool {
        true
    }

    fn forget(&mut self, bad: &BTreeSet<usize>) {
        self.learn(bad);
    }

    fn each(&self, row: &mut Take<'_>) -> Result<(), DataError> {
        let places: HashMap<&str, usize> = self.names.iter().map(String::as_str).zip(0..).collect();
        let mut cells = vec![None; self.names.len()];
        let mut record = StringRecord::new();
        for (line, bytes) in self.lines() {
            match self.cells(line, bytes, &places, &mut cells) {
                Ok(()) => {
                    record.clear();
                    cells.iter().for_each(|cell| record.push_field(cell.as_deref().unwrap_or_default()));
                    row(line, Ok(&record))?;
                }
                Err(e) => row(line, Err(e))?,
            }
        }
        Ok(())
    }
}
