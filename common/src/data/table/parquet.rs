//! Parquet files: columns of numbers, texts and truths, as rows of cells.

use super::{Rows, Take};
use crate::data::DataError;
use crate::data::error::At;
use crate::job;
use ::csv::StringRecord;
use ::parquet::basic::{ConvertedType, LogicalType, Repetition, Type as Physical};
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::FileReader;
use ::parquet::file::serialized_reader::SerializedFileReader;
use ::parquet::record::Field;
use ::parquet::schema::types::Type;
use bytes::Bytes;
use std::borrow::Cow;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// One file.
pub(super) struct Parquet {
    path: Arc<str>,
    file: SerializedFileReader<Bytes>,
    names: Vec<String>,
    /// The columns that are looked at, and each one's place among all.
    read: Type,
    places: Vec<usize>,
}

/// What a column holds, where that cannot be a cell.
fn unfit(column: &Type) -> Option<&'static str> {
    let about = column.get_basic_info();
    if !column.is_primitive() || about.has_repetition() && about.repetition() == Repetition::REPEATED {
        return Some("lists or other nested values");
    }
    use ConvertedType as C;
    let times = "dates or times";
    match (about.logical_type_ref(), column.get_physical_type(), about.converted_type()) {
        (Some(LogicalType::Date | LogicalType::Time(_) | LogicalType::Timestamp(_)), _, _) => Some(times),
        (_, Physical::INT96, _) | (_, _, C::DATE | C::INTERVAL) => Some(times),
        (_, _, C::TIME_MILLIS | C::TIME_MICROS | C::TIMESTAMP_MILLIS | C::TIMESTAMP_MICROS) => Some(times),
        (_, Physical::BOOLEAN | Physical::FLOAT | Physical::DOUBLE, _) => None,
        (_, Physical::INT32, C::NONE | C::INT_8 | C::INT_16 | C::INT_32 | C::DECIMAL) => None,
        (_, Physical::INT32, C::UINT_8 | C::UINT_16 | C::UINT_32) => None,
        (_, Physical::INT64, C::NONE | C::INT_64 | C::UINT_64 | C::DECIMAL) => None,
        (_, Physical::BYTE_ARRAY, C::NONE | C::UTF8 | C::ENUM | C::JSON | C::DECIMAL) => None,
        (Some(LogicalType::Float16), Physical::FIXED_LEN_BYTE_ARRAY, _) => None,
        (_, Physical::FIXED_LEN_BYTE_ARRAY, C::DECIMAL) => None,
        (_, _, _) => Some("values of a kind that is neither a number nor a text"),
    }
}

/// A value as the text of a cell: numbers as they are written in CSV and JSON. `None`: it is none.
fn cell(field: &Field) -> Option<Cow<'_, str>> {
    fn shown<'f>(value: impl Display) -> Option<Cow<'f, str>> {
        Some(value.to_string().into())
    }
    match field {
        Field::Null => Some("".into()),
        Field::Bool(value) => shown(value),
        Field::Byte(value) => shown(value),
        Field::Short(value) => shown(value),
        Field::Int(value) => shown(value),
        Field::Long(value) => shown(value),
        Field::UByte(value) => shown(value),
        Field::UShort(value) => shown(value),
        Field::UInt(value) => shown(value),
        Field::ULong(value) => shown(value),
        Field::Float16(value) => shown(value.to_f32()),
        Field::Float(value) => shown(value),
        Field::Double(value) => shown(value),
        Field::Decimal(_) => shown(field),
        Field::Str(text) => Some(text.trim().into()),
        // Some programs write texts so.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok().map(|text| text.trim().into()),
        Field::Date(_)
        | Field::TimeMillis(_)
        | Field::TimeMicros(_)
        | Field::TimestampMillis(_)
        | Field::TimestampMicros(_)
        | Field::Group(_)
        | Field::ListInternal(_)
        | Field::MapInternal(_) => None,
    }
}

/// What the reader gives. It panics at some damaged files, which is an error as any other.
fn guarded<T>(path: &str, read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, DataError> {
    let why = match catch_unwind(AssertUnwindSafe(read)) {
        Ok(Ok(read)) => return Ok(read),
        Ok(Err(e)) => e.to_string(),
        Err(_) => "it is damaged".into(),
    };
    Err(DataError::Parquet { path: path.into(), why })
}

impl Parquet {
    /// Columns that are looked at must be numbers, texts or truths.
    pub fn open(path: Arc<str>, bytes: Vec<u8>, spec: &job::Table) -> Result<Parquet, DataError> {
        let file = guarded(&path, || SerializedFileReader::new(Bytes::from(bytes)))?;
        let schema = file.metadata().file_metadata().schema();
        let (mut names, mut fields, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (place, column) in schema.get_fields().iter().enumerate() {
            let name = column.name().to_string();
            if spec.reads(&name) {
                if let Some(what) = unfit(column) {
                    return Err(DataError::ParquetColumn { path: path.to_string(), column: name, what });
                }
                fields.push(column.clone());
                places.push(place);
            }
            names.push(name);
        }
        let read = guarded(&path, || Type::group_type_builder(schema.name()).with_fields(fields).build())?;
        Ok(Parquet { path, file, names, read, places })
    }
}

impl Rows for Parquet {
    fn names(&self) -> &[String] {
        &self.names
    }

    fn are_lines(&self) -> bool {
        false
    }

    fn each(&self, row: &mut Take<'_>) -> Result<(), DataError> {
        let mut rows = guarded(&self.path, || self.file.get_row_iter(Some(self.read.clone())))?;
        let mut record = StringRecord::new();
        for number in 1.. {
            let Some(fields) = guarded(&self.path, || rows.next().transpose())? else { break };
            let mut cells = self.places.iter().zip(fields.get_column_iter()).peekable();
            let mut wrong = None;
            record.clear();
            for (place, name) in self.names.iter().enumerate() {
                let found = cells.next_if(|(of, _)| **of == place).map(|(_, (_, field))| cell(field));
                record.push_field(found.clone().flatten().as_deref().unwrap_or_default());
                if found == Some(None) {
                    wrong = wrong.or(Some(name));
                }
            }
            let at = || At { path: self.path.clone(), row: number, lines: false };
            match wrong {
                None => row(number, Ok(&record))?,
                Some(column) => {
                    let (column, what) = (column.clone(), "bytes that are no text");
                    row(number, Err(DataError::Nested { at: at(), column, what }))?;
                }
            }
        }
        Ok(())
    }
}
