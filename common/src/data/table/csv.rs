//! Lines of cells with a separator between them.

use super::{Rows, Take};
use crate::data::error::At;
use crate::data::{DataError, newlines};
use ::csv::{ByteRecord, ReaderBuilder, StringRecord};
use std::io::{self, Read};
use std::sync::Arc;

/// Behind the last line there is one more, so that a record that has not ended before is known.
const END: &[u8] = b"\n\0";

/// One file.
pub(super) struct Csv {
    path: Arc<str>,
    bytes: Vec<u8>,
    names: Vec<String>,
    header: bool,
    separator: u8,
    quoting: bool,
}

impl Csv {
    /// `columns` are its names, where the job gives some; otherwise they are in the first line, if there is a header.
    pub fn open(
        path: Arc<str>,
        bytes: Vec<u8>,
        columns: Option<&[String]>,
        header: bool,
        separator: char,
        quoting: bool,
    ) -> Result<Csv, DataError> {
        if !separator.is_ascii() || ['"', '\n', '\r'].contains(&separator) {
            return Err(DataError::Separator { separator });
        }
        let mut csv = Csv { path, bytes, names: Vec::new(), header, separator: separator as u8, quoting };
        csv.names = match (columns, header) {
            (Some(names), _) => names.into(),
            (None, true) => csv.first_line()?,
            (None, false) => return Err(DataError::NoNames { path: csv.path.to_string() }),
        };
        Ok(csv)
    }

    /// The records from a byte on.
    fn lines(&self, from: usize) -> ::csv::Reader<impl Read> {
        let mut reader = ReaderBuilder::new();
        reader.delimiter(self.separator).quoting(self.quoting).has_headers(false).flexible(true);
        reader.from_reader(self.bytes[from..].chain(END))
    }

    /// Whether the record that ended at a byte is one whose last quote was not closed.
    fn is_open(&self, end: u64) -> bool {
        end > self.bytes.len() as u64 + 1
    }

    fn at(&self, line: usize) -> At {
        At { path: self.path.clone(), row: line, lines: true }
    }

    fn unreadable(&self, e: ::csv::Error) -> DataError {
        DataError::Read { path: self.path.to_string(), source: io::Error::other(e) }
    }

    fn first_line(&self) -> Result<Vec<String>, DataError> {
        let mut record = ByteRecord::new();
        if self.bytes.trim_ascii().is_empty() {
            return Err(DataError::Empty { path: self.path.to_string() });
        }
        let mut lines = self.lines(0);
        lines.read_byte_record(&mut record).map_err(|e| self.unreadable(e))?;
        if self.is_open(lines.position().byte()) {
            return Err(DataError::OpenQuote { at: self.at(1) });
        }
        Ok(self.cells(1, record)?.iter().map(String::from).collect())
    }

    /// The trimmed cells of a line.
    fn cells(&self, line: usize, record: ByteRecord) -> Result<StringRecord, DataError> {
        let mut cells =
            StringRecord::from_byte_record(record).map_err(|_| DataError::RowNotText { at: self.at(line) })?;
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
        let (mut from, mut lines) = (0, self.lines(0));
        let mut record = ByteRecord::new();
        let mut header = self.header;
        let (mut line, mut counted) = (1, 0);
        loop {
            let at = from + lines.position().byte() as usize;
            lines.read_byte_record(&mut record).map_err(|e| self.unreadable(e))?;
            // The reader stands before blank lines, and before the second half of a CR LF.
            let rest = self.bytes.get(at..).unwrap_or_default();
            let at = at + rest.iter().take_while(|b| matches!(b, b'\r' | b'\n')).count();
            if at >= self.bytes.len() {
                return Ok(());
            }
            line += newlines(&self.bytes[counted..at]);
            counted = at;
            if self.is_open(from as u64 + lines.position().byte()) {
                if !std::mem::take(&mut header) {
                    row(line, Err(DataError::OpenQuote { at: self.at(line) }))?;
                }
                // It has swallowed all others: they begin behind its line.
                let end = self.bytes[at..].iter().position(|b| *b == b'\n');
                from = end.map_or(self.bytes.len(), |end| at + end + 1);
                lines = self.lines(from);
                continue;
            }
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
                    let at = self.at(line);
                    row(line, Err(DataError::Ragged { at, got: cells.len(), want: self.names.len() }))?;
                }
                Err(e) => row(line, Err(e))?,
            }
        }
    }
}
