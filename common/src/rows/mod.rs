//! Sparse tables: rows of learnt values that keys choose, of which a batch touches a few.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`lookup`] | which rows a batch asks for, each once, and for what |
//! | [`sums`] | gradients of rows on their way through the reduction tree |
//! | [`optim`] | row-wise optimizers |
//!
//! A row holds the values of all of a model's tables for its key, one table after another. Rows that nobody has touched
//! take no memory: a row's first values are a function of (seed, table, key). Where rows lie is the coordinator's affair.

pub mod lookup;
pub mod optim;
pub mod sums;

pub use lookup::Lookups;

use crate::layout::{Init, le_bytes};
use crate::rng::{Key, Purpose, mix, unmix};
use serde::{Deserialize, Serialize};

/// An id that is none: it has no row, and what is looked up for it is 0.
pub const NO_ID: u64 = u64::MAX;

/// The key of the row of an id. Keys are as good as random whatever the ids are, and in their order all is sorted: rows of
/// similar keys lie beside each other where they are looked for. Different ids have different keys.
pub fn key(id: u64) -> u64 {
    mix(id)
}

/// The id of a key.
pub fn id(key: u64) -> u64 {
    unmix(key)
}

/// One of a model's tables: a part of each row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// As tensors are called ("0.weight").
    pub name: String,
    /// Values that it has of a row.
    pub width: usize,
    pub init: Init,
}

/// What a row holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RowLayout {
    tables: Vec<Table>,
}

impl RowLayout {
    /// Rows that hold these tables' values, one after another.
    pub fn new(tables: Vec<Table>) -> RowLayout {
        RowLayout { tables }
    }

    /// Whether there are no tables.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// Values of a row.
    pub fn width(&self) -> usize {
        self.tables.iter().map(|table| table.width).sum()
    }

    /// The tables, and where their values begin in a row.
    pub fn tables(&self) -> impl Iterator<Item = (&Table, usize)> {
        let starts = self.tables.iter().scan(0, |end, table| {
            let start = *end;
            *end += table.width;
            Some(start)
        });
        self.tables.iter().zip(starts)
    }

    /// The table that has value `at` of a row.
    pub fn table_at(&self, at: usize) -> Option<&Table> {
        self.tables().find(|(table, start)| (*start..start + table.width).contains(&at)).map(|(table, _)| table)
    }

    /// What makes first values, of a job's seed.
    pub fn first(&self, seed: u64) -> First {
        let key = Key::new(seed, Purpose::Init).named("rows");
        let tables = self.tables.iter().map(|table| (key.named(&table.name), table.width, table.init));
        First { tables: tables.collect() }
    }
}

/// The first values of rows: a function of (seed, table, key).
#[derive(Clone, Debug)]
pub struct First {
    tables: Vec<(Key, usize, Init)>,
}

impl First {
    /// Those of the row of `key`, as many as a row has.
    #[inline(always)]
    pub fn fill(&self, key: u64, row: &mut [f32]) {
        let mut rest = row;
        for &(table, width, init) in &self.tables {
            let (values, after) = std::mem::take(&mut rest).split_at_mut(width);
            rest = after;
            let random = table.with(key);
            match init {
                Init::Constant(value) => values.fill(value),
                Init::Uniform { bound } => {
                    for (i, value) in values.iter_mut().enumerate() {
                        // 24 bits, from -1 to below 1.
                        let whole = (random.u32_fast(i as u32) >> 8) as i32 - (1 << 23);
                        *value = whole as f32 * (1.0 / (1 << 23) as f32) * bound;
                    }
                }
                Init::Normal { std } => {
                    values.iter_mut().enumerate().for_each(|(i, value)| *value = random.normal(i as u64) * std);
                }
            }
        }
    }
}

/// Rows by key, and behind each row's values its state: `(keys, values and state)`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowBlock {
    pub keys: Vec<u64>,
    pub rows: Vec<f32>,
}

/// The digest of all that a model with sparse tables has learnt: over the digest of its tensors, the tables, and each row's id and
/// values, in the order in which rows were first touched.
pub struct Digest {
    hasher: blake3::Hasher,
    width: usize,
}

impl Digest {
    /// Of no rows yet.
    pub fn new(layout: &RowLayout) -> Digest {
        let mut hasher = blake3::Hasher::new();
        for (table, _) in layout.tables() {
            hasher.update(&(table.name.len() as u64).to_le_bytes());
            hasher.update(table.name.as_bytes());
            hasher.update(&(table.width as u64).to_le_bytes());
        }
        Digest { hasher, width: layout.width() }
    }

    /// Adds rows of `row_len` values and state.
    pub fn add(&mut self, block: &RowBlock, row_len: usize) {
        for (key, row) in block.keys.iter().zip(block.rows.chunks_exact(row_len)) {
            self.hasher.update(&id(*key).to_le_bytes());
            self.hasher.update(le_bytes(&row[..self.width]));
        }
    }

    /// With the digest of the tensors.
    pub fn finish(&self, tensors: &str) -> String {
        format!("blake3:{}", self.hasher.clone().update(tensors.as_bytes()).finalize().to_hex())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_values_are_a_function_of_seed_table_and_key() {
        let table = |name: &str, width, init| Table { name: name.into(), width, init };
        let layout = RowLayout::new(vec![
            table("wide", 1, Init::Constant(0.25)),
            table("deep", 16, Init::Uniform { bound: 0.5 }),
            table("other", 3, Init::Normal { std: 2.0 }),
        ]);
        assert_eq!(layout.width(), 20);
        let name = |at| layout.table_at(at).map(|table| table.name.as_str());
        assert_eq!(
            [name(0), name(1), name(16), name(17), name(20)],
            [Some("wide"), Some("deep"), Some("deep"), Some("other"), None]
        );
        let row = |seed, key| {
            let mut row = vec![9.0; 20];
            layout.first(seed).fill(key, &mut row);
            row
        };
        assert_eq!(row(1, 7), row(1, 7));
        assert!(row(1, 7)[1..] != row(2, 7)[1..] && row(1, 7)[1..] != row(1, 8)[1..]);
        let many: Vec<f32> = (0..1000).flat_map(|key| row(3, key)).collect();
        let moment = |range: std::ops::Range<usize>, k: i32| {
            let of = many.chunks(20).flat_map(|row| &row[range.clone()]);
            of.clone().map(|v| v.powi(k) as f64).sum::<f64>() / of.count() as f64
        };
        assert!(many.chunks(20).all(|row| row[0] == 0.25 && row[1..17].iter().all(|v| (-0.5..0.5).contains(v))));
        assert!(moment(1..17, 1).abs() < 0.01 && (moment(1..17, 2) - 0.25 / 3.0).abs() < 0.003);
        assert!(moment(17..20, 1).abs() < 0.15 && (moment(17..20, 2) - 4.0).abs() < 0.5);
    }

    #[test]
    fn a_key_has_one_id() {
        for i in [0, 1, 2, 12_345_678, 1 << 40, u64::MAX - 1, NO_ID] {
            assert_eq!((id(key(i)), key(id(i))), (i, i));
        }
    }
}
