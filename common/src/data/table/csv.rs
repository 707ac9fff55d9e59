//! Lines of cells with a separator between them.

use super::{Rows, Take};
use crate::data::error::At;
use crate::data::{DataError, newlines};
use ::csv::{ByteRecord, ReaderBuilder, StringRecord};
use std::io;
use std::sync::Arc;

/// One file.
pub(super) struct Csv {
    path: Arc<str>,
    bytes: Vec<u8>,
    names: Vec<String>,
    header: bool,
    separator: u8,
}

impl Csv {
    /// `columns` are its names, where the job gives some; otherwise they are in the first line, if there is a header.
    pub fn open(
        path: Arc<str>,
        bytes: Vec<u8>,
        columns: Option<&[String]>,
        header: bool,
        separator: char,
    ) -> Result<Csv, DataError> {
        if !separator.is_ascii() || ['"', '\n', '\r'].contains(&separator) {
            return Err(DataError::Separator { separator });
        }
        let mut csv = Csv { path, bytes, names: Vec::new(), header, separator: separator as u8 };
        csv.names = match (columns, header) {
            (Some(names), _) => names.into(),
            (None, true) => csv.first_line()?,
            (None, false) => return Err(DataError::NoNames { path: csv.path.to_string() }),
        };
        Ok(csv)
    }

    fn lines(&self) -> ::csv::Reader<&[u8]> {
        let mut reader = ReaderBuilder::new();
        reader.delimiter(self.separator).has_headers(false).flexible(true).from_reader(&self.bytes)
    }

    fn unreadable(&self, e: ::csv::Error) -> DataError {
        DataError::Read { path: self.path.to_string(), source: io::Error::other(e) }
    }

    fn first_line(&self) -> Result<Vec<String>, DataError> {
        let mut record = ByteRecord::new();
        if !self.lines().read_byte_record(&mut record).map_err(|e| self.unreadable(e))? {
            return Err(DataError::Empty { path: self.path.to_string() });
        }
        Ok(self.cells(1, record)?.iter().map(String::from).collect())
    }

    /// The trimmed cells of a line.
    fn cells(&self, line: usize, record: ByteRecord) -> Result<StringRecord, DataError> {
        let mut cells = StringRecord::from_byte_record(record)
            .map_err(|_| DataError::RowNotText { at: At { path: self.path.clone(), row: line, lines: true } })?;
        cells.trim();
        Ok(cells)
    }
}

impl Rows for Csv {
    fn names(&self) -> &[String] {
        &self.names
    }

    fn are_lines(&self) -> bool {
        true
    }

    fn each(&self, row: &mut Take<'_>) -> Result<(), DataError> {
        let mut lines = self.lines();
        let mut record = ByteRecord::new();
        let mut header = self.header;
        let (mut line, mut counted) = (1, 0);
        loop {
            let at = lines.position().byte() as usize;
            if !lines.read_byte_record(&mut record).map_err(|e| self.unreadable(e))? {
                return Ok(());
            }
            // The reader stands before blank lines, and before the second half of a CR LF.
            let at = at + self.bytes[at..].iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
            line += newlines(&self.bytes[counted..at]);
            counted = at;
            let blank = record.len() == 1 && record[0].trim_ascii().is_empty() && self.names.len() > 1;
            if blank || std::mem::take(&mut header) {
                continue;
            }
            match self.cells(line, std::mem::take(&mut record)) {
                Ok(cells) if cells.len() == self.names.len() => {
                    row(line, Ok(&cells))?;
                    record = cells.into_byte_record();
                }
                Ok(cells) => {
                    let at = At { path: self.path.clone(), row: line, lines: true };
                    row(line, Err(DataError::Ragged { at, got: cells.len(), want: self.names.len() }))?;
                }
                Err(e) => row(line, Err(e))?,
            }
        }
    }
}
