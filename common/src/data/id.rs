//! Ids: what chooses rows of sparse tables.

use super::table::is_missing;
use crate::rng::{Key, Purpose};
use crate::rows::NO_ID;
use serde::{Deserialize, Serialize};

/// Where one of a sample's ids comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IdField {
    /// The columns whose values together are the id.
    pub columns: Vec<String>,
    /// Values are whole numbers below it; `None`: any text, which its hash stands for.
    pub size: Option<u64>,
    /// The id of the value 0, where they are numbers, and of the first of `values`.
    pub first: u64,
    /// Ascending: of each value its place among them is the number, where there are some.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<String>,
}

impl IdField {
    /// Fields of declared sizes, whose ids follow one another, and others.
    pub fn all(fields: impl Iterator<Item = (Vec<String>, Option<u64>)>) -> Vec<IdField> {
        let mut next = 0;
        let mut field = |(columns, size): (Vec<String>, Option<u64>)| {
            let first = if size.is_some() { next } else { 0 };
            next += size.unwrap_or(0);
            IdField { columns, size, first, values: Vec::new() }
        };
        fields.map(&mut field).collect()
    }

    /// The id that the columns' cells stand for, none where one is missing; the cell that is none of the declared values is the
    /// error.
    ///
    /// # Errors
    /// A cell that is no whole number below the declared size, or none of the known values.
    pub fn id<'c>(&self, cells: impl Iterator<Item = &'c str> + Clone, missing: &str) -> Result<u64, &'c str> {
        if cells.clone().any(|cell| is_missing(cell, missing)) {
            return Ok(NO_ID);
        }
        match self.size {
            Some(size) => {
                let cell = cells.last().unwrap_or_default();
                let value = match self.values.is_empty() {
                    true => cell.parse::<u64>().ok().filter(|value| *value < size),
                    false => self.values.binary_search_by(|value| value.as_str().cmp(cell)).ok().map(|at| at as u64),
                };
                value.map(|value| self.first + value).ok_or(cell)
            }
            None => {
                let key = self.columns.iter().fold(Key::new(0, Purpose::Id), |key, column| key.named(column));
                Ok(cells.fold(key, |key, cell| key.named(cell)).bits().min(NO_ID - 1))
            }
        }
    }

    /// The value with this number.
    pub fn value(&self, number: u64) -> String {
        self.values.get(number as usize).cloned().unwrap_or_else(|| number.to_string())
    }
}
