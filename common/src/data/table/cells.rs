//! From cells to numbers, one-hot features, ids and tokens.

use crate::data::tokenizer::Encoder;
use crate::data::{Column, DataError, IdField, Prepared};

pub(in crate::data) fn is_missing(cell: &str, missing: &str) -> bool {
    cell.is_empty() || cell == missing.trim()
}

pub(in crate::data) fn number(cell: &str) -> Option<f32> {
    cell.parse().ok().filter(|x: &f32| x.is_finite())
}

/// A number, or its logarithm on both sides of 0.
pub(super) fn scaled(x: f32, log: bool) -> f32 {
    if log { (libm::log1p(x.abs() as f64) as f32).copysign(x) } else { x }
}

/// Appends `tokens`, each one more than it was, and zeros up to `context`; gives how many there are where they are too many.
pub(super) fn fill_up(tokens: &[u32], context: usize, truncate: bool, out: &mut Vec<u32>) -> Result<(), usize> {
    if tokens.len() > context && !truncate {
        return Err(tokens.len());
    }
    let end = out.len() + context;
    out.extend(tokens.iter().take(context).map(|token| token + 1));
    out.resize(end, 0);
    Ok(())
}

impl Column {
    /// How many features the column becomes.
    pub fn features(&self) -> usize {
        self.values.as_ref().map_or(1, Vec::len)
    }

    /// Whether a cell is a value that no sample of the training set had: it counts as a missing one.
    pub fn is_new(&self, cell: &str, missing: &str) -> bool {
        let known = |values: &Vec<String>| values.binary_search_by(|v| v.as_str().cmp(cell)).is_ok();
        !is_missing(cell, missing) && self.values.as_ref().is_some_and(|values| !known(values))
    }

    /// Appends a cell's features to `out`; `None` where it should be a finite number and is not.
    pub(super) fn encode(&self, cell: &str, missing: &str, out: &mut Vec<f32>) -> Option<()> {
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
