//! What the columns of a table are, by all of their cells.

use super::find::csv;
use anyhow::{Result, bail};
use csv::StringRecord;
use std::collections::BTreeMap;
use std::path::Path;
use unisono_common::data::{DataError, Files, table};
use unisono_common::job::{Form, Table as Spec, Task};

/// Different values of a column that are told apart.
const MOST_VALUES: usize = 10_000;
/// Texts that often stand for a missing value.
const MISSING: [&str; 15] =
    ["?", "NA", "N/A", "n/a", "na", "NaN", "nan", "NULL", "null", "None", "none", "-", "--", ".", "missing"];
/// Rows of a table, at least: a fifth of fewer says nothing.
const LEAST_ROWS: usize = 20;
/// Values of a category that is one-hot encoded, at most.
const MOST_CATEGORIES: usize = 1000;
/// Of so many cells of a column of numbers, or dates, one may be none, by mistake.
const MOST_RIGHT: usize = 200;
/// Classes that are whole numbers, at most: more are measurements.
const MOST_NUMBERED: usize = 20;
/// Values that are shown with how often they come.
const SHOWN: usize = 6;
/// Characters of each.
const LONGEST: usize = 30;

/// The beginning of a cell, on one line.
fn short(cell: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let more = if cell.chars().nth(LONGEST).is_some() { "..." } else { "" };
    cell.chars().take(LONGEST).map(plain).chain(more.chars()).collect()
}

/// What is known of a column.
#[derive(Default)]
pub struct Column {
    pub name: String,
    /// Cells that are not empty.
    filled: usize,
    numbers: usize,
    whole: usize,
    dates: usize,
    /// A cell that is no number, nor stands for a missing one.
    odd: Option<String>,
    words: usize,
    longest: usize,
    /// How often each value comes; when there were too many, how many cells had been filled.
    values: BTreeMap<String, usize>,
    full_at: Option<usize>,
    /// The first and the last number.
    ends: Option<[f64; 2]>,
    /// Whether each number is one more than that before it.
    counts: bool,
}

/// What a column is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    Number,
    Category,
    /// So many values that each is a row of a sparse table.
    Id,
    Text,
    /// Nothing is learnt from it, because its cells are so.
    Out(&'static str),
}

/// A date or a time in digits: `2024-05-01`, `1/5/24 12:30`, `2024-05-01T12:30:00Z`.
fn is_date(cell: &str) -> bool {
    let signs = cell.matches(['-', '/', ':', '.']).count();
    let digits = cell.bytes().filter(u8::is_ascii_digit).count();
    let known = |c: char| c.is_ascii_digit() || "-/:.TZ+ ".contains(c);
    (6..=35).contains(&cell.len())
        && cell.starts_with(|c: char| c.is_ascii_digit())
        && digits >= 3
        && signs >= 2
        && cell.chars().all(known)
}

/// Whether a name says that its column tells rows, users or items apart.
fn names_an_id(name: &str) -> bool {
    let camel = name.strip_suffix("Id").or(name.strip_suffix("ID")).is_some_and(|n| n.ends_with(char::is_lowercase));
    let name = name.to_lowercase();
    camel
        || ["id", "index", "uuid", "guid", ""].contains(&&*name)
        || ["_id", "-id", " id", ".id"].iter().any(|end| name.ends_with(end))
}

impl Column {
    fn take(&mut self, cell: &str) {
        if cell.is_empty() {
            return;
        }
        self.filled += 1;
        match cell.parse::<f64>().ok().filter(|number| (*number as f32).is_finite()) {
            Some(number) => {
                self.numbers += 1;
                self.whole += usize::from(number.fract() == 0.0);
                self.counts = self.ends.map_or(self.filled == 1, |[_, last]| self.counts && number == last + 1.0);
                self.ends = Some([self.ends.map_or(number, |[first, _]| first), number]);
            }
            None => {
                self.dates += usize::from(is_date(cell));
                self.ends.iter_mut().for_each(|[_, last]| *last += 1.0); // where rows are counted, it is one, too
                if self.odd.is_none() && !MISSING.contains(&cell) {
                    self.odd = Some(cell.into());
                }
            }
        }
        let words = cell.split_whitespace().count();
        self.words += words;
        self.longest = self.longest.max(words);
        if let Some(count) = self.values.get_mut(cell) {
            *count += 1;
        } else if self.values.len() < MOST_VALUES {
            self.values.insert(cell.into(), 1);
        } else {
            self.full_at.get_or_insert(self.filled);
        }
    }

    /// Takes the cell that stands before all others.
    fn take_before(&mut self, cell: &str) {
        let follows = |[first, _]: [f64; 2]| cell.parse() == Ok(first - 1.0);
        let counts = self.counts && self.ends.is_some_and(follows);
        self.take(cell);
        self.counts = counts;
    }

    /// Takes back the cells that stand for a missing value.
    fn without(&mut self, missing: &str) {
        if let Some(count) = self.values.remove(missing) {
            self.filled -= count;
            self.words -= count;
        }
    }

    /// The text for missing values, where all other cells are numbers but for mistakes.
    fn odd_one_out(&self) -> Option<(&'static str, usize)> {
        let count = |word: &&'static str| Some((*word, *self.values.get(*word)?));
        let rest = |count: usize| self.filled.saturating_sub(self.numbers + count);
        MISSING.iter().filter_map(count).find(|(_, count)| self.numbers > 0 && self.are_mistakes(rest(*count)))
    }

    /// The most frequent values, and how often each comes.
    pub fn frequent(&self) -> String {
        let mut all: Vec<_> = self.values.iter().collect();
        all.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
        let shown: Vec<String> = all.iter().take(SHOWN).map(|(value, n)| format!("{} ({n})", short(value))).collect();
        format!("{}{}", shown.join(", "), if all.len() > SHOWN { ", ..." } else { "" })
    }

    /// The texts that come once, where they are few: they may be misspelt.
    pub fn once(&self) -> Vec<String> {
        let once: Vec<_> = self.values.iter().filter(|(_, n)| **n == 1).map(|(value, _)| short(value)).collect();
        if self.is_number() || once.len() > (self.values.len() / 10).max(3) { Vec::new() } else { once }
    }

    pub fn different(&self) -> usize {
        self.values.len()
    }

    /// How many cells there are for each that is new, from 1 (each differs) on.
    fn repeats(&self) -> f64 {
        self.full_at.unwrap_or(self.filled) as f64 / self.values.len().max(1) as f64
    }

    /// Whether so many cells that are no numbers, if any, are so few among so many different numbers that they must be mistakes.
    fn are_mistakes(&self, cells: usize) -> bool {
        cells == 0 || (self.are_few(cells) && self.different() > MOST_NUMBERED + cells)
    }

    fn are_few(&self, cells: usize) -> bool {
        self.filled >= LEAST_ROWS && cells <= (self.filled / MOST_RIGHT).max(1)
    }

    /// How many cells of a column of numbers are none, and one of them.
    pub fn mistakes(&self) -> Option<(usize, &str)> {
        let count = self.filled - self.numbers;
        let other = || MISSING.into_iter().find(|word| self.values.contains_key(*word));
        Some((count, self.odd.as_deref().or_else(other)?)).filter(|_| count > 0 && self.are_mistakes(count))
    }

    /// Whether what is no number is so rare that it is no code, either.
    fn has_no_codes(&self) -> bool {
        let again = |odd: &str| self.values.get(odd).is_some_and(|times| *times > 1);
        self.mistakes().is_none_or(|(_, odd)| !again(odd))
    }

    /// Cells that are numbers, or were meant to be.
    fn meant(&self, numbers: usize) -> usize {
        numbers + self.mistakes().map_or(0, |(count, _)| count)
    }

    fn is_number(&self) -> bool {
        self.filled > 0 && self.meant(self.numbers) == self.filled
    }

    fn is_whole(&self) -> bool {
        self.filled > 0 && self.meant(self.whole) == self.filled
    }

    /// Words of the longest text.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Whether its texts are sentences, which say more than what stands beside them.
    fn is_prose(&self) -> bool {
        self.words >= 8 * self.filled
    }

    fn role(&self, rows: usize) -> Role {
        let unique = self.full_at.is_none() && self.different() == self.filled && self.filled > LEAST_ROWS / 2;
        let (few, repeats) = (self.different() <= MOST_NUMBERED, self.repeats());
        match () {
            () if self.filled == 0 => Role::Out("empty"),
            () if self.different() == 1 && self.filled == rows => Role::Out("the same in all rows"),
            () if self.is_whole()
                && (self.counts || (unique && names_an_id(&self.name)))
                && self.filled == rows
                && !few =>
            {
                Role::Out("the rows' own numbers")
            }
            () if self.is_whole() && names_an_id(&self.name) => {
                if few {
                    Role::Category
                } else {
                    Role::Id
                }
            }
            () if self.is_number() && self.has_no_codes() => Role::Number,
            () if self.dates == self.filled || self.are_few(self.filled - self.dates) => Role::Out("dates or times"),
            () if self.words >= 4 * self.filled && repeats < 2.0 => Role::Text,
            () if repeats < 2.0 && !few => Role::Out("another text in almost every row"),
            () if self.different() <= MOST_CATEGORIES => Role::Category,
            () => Role::Id,
        }
    }
}

/// A table, as far as it is known.
pub struct Table {
    pub form: Form,
    pub rows: usize,
    pub columns: Vec<Column>,
    /// Columns whose cells are lists, dates of Parquet, or the like.
    pub nested: Vec<String>,
    /// Rows that cannot be used, and what is wrong with the first.
    pub bad: usize,
    pub first_bad: Option<String>,
    pub missing: &'static str,
}

/// `path` is absolute: another is looked for below UNISONO_DATA first.
fn spec(form: &Form, path: &Path, ignore: &[String]) -> Spec {
    let none = Vec::new;
    Spec {
        base: String::new(),
        form: form.clone(),
        train: path.display().to_string(),
        test: None,
        target: String::new(),
        weight: None,
        categorical: none(),
        ids: Vec::new(),
        log: none(),
        ignore: ignore.into(),
        missing: String::new(),
        task: Task::Classification,
        holdout: None,
        holdout_by: none(),
        text: None,
    }
}

/// Whether the first line holds names: it is unlike the cells below it more often than like them.
fn is_header(first: &StringRecord, columns: &[Column]) -> bool {
    let like = |(cell, column): (&str, &Column)| match cell.parse::<f64>() {
        Ok(_) if column.numbers > 0 => -1,
        Err(_) if 2 * column.numbers > column.filled => 1,
        Ok(_) | Err(_) if column.repeats() >= 2.0 && column.values.contains_key(cell) => -1,
        Ok(_) | Err(_) => 0,
    };
    let says: i32 = first.iter().zip(columns).map(like).sum();
    let mut names: Vec<&str> = first.iter().collect();
    names.sort_unstable();
    names.dedup();
    says > 0 || (says == 0 && names.len() == first.len() && !names.contains(&""))
}

impl Table {
    /// Looks at all rows of a file; of lines of cells, these have so many.
    pub fn look(form: &Form, cells: usize, path: &Path) -> Result<Table> {
        let plain = Table::look_as(form.clone(), cells, path)?;
        match form {
            // Where quotes are a part of the text, as in many files with tabs, more rows can be read so.
            Form::Csv { separator, quoting: true, .. } if plain.bad > 0 || *separator == '\t' => {
                let other = Table::look_as(csv(*separator, false), cells, path)?;
                let better = (other.bad, plain.rows) < (plain.bad, other.rows);
                Ok(if better { other } else { plain })
            }
            Form::Csv { .. } | Form::JsonLines | Form::Parquet => Ok(plain),
        }
    }

    fn look_as(mut form: Form, cells: usize, path: &Path) -> Result<Table> {
        if let Form::Csv { columns, .. } = &mut form {
            *columns = Some((1..=cells).map(|i| format!("c{i}")).collect());
        }
        let of_lines = matches!(form, Form::Csv { .. });
        let path = &std::path::absolute(path)?;
        let mut nested = Vec::new();
        let (names, mut table, first) = loop {
            let mut table = Table {
                form: form.clone(),
                rows: 0,
                columns: Vec::new(),
                nested: Vec::new(),
                bad: 0,
                first_bad: None,
                missing: "?",
            };
            let mut first = None;
            let looked = table::look(&Files::any(), &spec(&form, path, &nested), |row| {
                match row {
                    Ok(row) if of_lines && first.is_none() && table.bad == 0 => first = Some(row.clone()),
                    Ok(row) => table.take(row),
                    Err(nested @ DataError::Nested { .. }) => return Err(nested),
                    Err(error) => {
                        table.bad += 1;
                        table.first_bad.get_or_insert(error.to_string());
                    }
                }
                Ok(())
            });
            match looked {
                Ok(names) => break (names, table, first),
                Err(DataError::Nested { column, .. } | DataError::ParquetColumn { column, .. })
                    if !nested.contains(&column) =>
                {
                    nested.push(column);
                }
                Err(error) => return Err(error.into()),
            }
        };
        table.columns.resize_with(names.len(), Column::default);
        let header = first.as_ref().filter(|first| is_header(first, &table.columns));
        let names = header.map_or(names, |first| first.iter().map(String::from).collect());
        if let Form::Csv { columns, header: has, .. } = &mut table.form {
            *has = header.is_some();
            *columns = columns.take().filter(|_| !*has);
        }
        if let (Some(first), false) = (&first, header.is_some()) {
            table.rows += 1;
            table.columns.iter_mut().zip(first).for_each(|(column, cell)| column.take_before(cell));
        }
        for (column, name) in table.columns.iter_mut().zip(names) {
            column.name = name;
        }
        table.nested = nested;
        table.settle();
        Ok(table)
    }

    fn take(&mut self, row: &StringRecord) {
        self.rows += 1;
        self.columns.resize_with(row.len(), Column::default);
        self.columns.iter_mut().zip(row).for_each(|(column, cell)| column.take(cell));
    }

    /// Settles what stands for a missing value.
    fn settle(&mut self) {
        let mut counts = BTreeMap::new();
        for (word, count) in self.columns.iter().filter_map(Column::odd_one_out) {
            *counts.entry(word).or_insert(0) += count;
        }
        if let Some((word, _)) = counts.into_iter().max_by_key(|(_, count)| *count) {
            self.missing = word;
        }
        self.columns.iter_mut().for_each(|column| column.without(self.missing));
    }
}

/// What is to be predicted, and from which columns.
pub struct Plan<'t> {
    pub target: &'t Column,
    /// Why this one.
    pub because: &'static str,
    pub task: Task,
    /// All others, in their order.
    pub roles: Vec<(&'t Column, Role)>,
    /// The only column that is learnt from, where it is texts.
    pub text: Option<&'t Column>,
    /// Columns of numbers with cells that are none: how many, and one of them.
    pub mistakes: Vec<(&'t Column, usize, &'t str)>,
    /// Rows without a target or a text, and those of classes so rare that a held-out part may have all of one.
    pub without: usize,
    pub rare: usize,
}

impl Plan<'_> {
    /// The names of the columns that are for something.
    pub fn named(&self, is: impl Fn(Role) -> bool) -> Vec<String> {
        self.roles.iter().filter(|(_, role)| is(*role)).map(|(column, _)| column.name.clone()).collect()
    }
}

/// Names that a target often has.
const TARGETS: [&str; 7] = ["target", "label", "class", "y", "labels", "outcome", "category"];

impl Table {
    fn names(&self) -> String {
        self.columns.iter().map(|column| column.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// What is learnt, and from what.
    ///
    /// # Errors
    /// Why nothing can be, and what to do about it; `shown` is the file.
    pub fn plan(&self, wanted: Option<&str>, shown: &str) -> Result<Plan<'_>> {
        let Table { rows, columns, bad, .. } = self;
        let unread =
            self.first_bad.as_ref().map(|why| format!("; {bad} lines more cannot be read: {why}")).unwrap_or_default();
        if columns.len() < 2 {
            bail!("{shown} has one column, `{}`; a table needs one to predict and others to learn from", self.names());
        }
        if *rows < LEAST_ROWS || bad > rows {
            bail!(
                "{shown} holds {rows} rows, too few to learn from some and to test on others: give {LEAST_ROWS} at least{unread}"
            );
        }
        let (target, because) = match wanted {
            Some(name) => match columns.iter().find(|column| column.name == name) {
                Some(column) => (column, "as --target says"),
                None => bail!("--target: {shown} has no column `{name}`; it has {}", self.names()),
            },
            None => {
                let called = |name: &&str| columns.iter().find(|column| column.name.eq_ignore_ascii_case(name));
                let named = TARGETS.iter().find_map(called).map(|column| (column, "by its name"));
                named.unwrap_or((&columns[columns.len() - 1], "the last column"))
            }
        };
        let task = self.task(target, because, shown)?;
        let role = |column: &Column| match self.nested.contains(&column.name) {
            true => Role::Out("lists, dates or the like"),
            false => column.role(*rows),
        };
        let others = columns.iter().filter(|column| !std::ptr::eq(*column, target));
        let mut roles: Vec<(&Column, Role)> = others.map(|column| (column, role(column))).collect();
        let usable = |role: &Role| matches!(role, Role::Number | Role::Category | Role::Id);
        let longest = roles.iter().filter(|(_, role)| *role == Role::Text).max_by_key(|(column, _)| column.words);
        let text = longest.map(|(column, _)| *column);
        let text = text.filter(|text| text.is_prose() || !roles.iter().any(|(_, role)| usable(role)));
        for (column, role) in &mut roles {
            match role {
                Role::Out(_) => {}
                Role::Text if text.is_none() => *role = Role::Out("texts, which are learnt from alone or not at all"),
                _ if text.is_some_and(|text| !std::ptr::eq(text, *column)) => *role = Role::Out("beside the text"),
                Role::Number | Role::Category | Role::Id | Role::Text => {}
            }
        }
        if text.is_none() && !roles.iter().any(|(_, role)| usable(role)) {
            let why = |(column, role): &(&Column, Role)| match role {
                Role::Out(why) => format!("`{}`: {why}", column.name),
                _ => String::new(),
            };
            let why = roles.iter().map(why).collect::<Vec<_>>().join("; ");
            bail!("{shown} has no column to learn `{}` from ({why}); add one", target.name);
        }
        let numbers = roles.iter().filter(|(_, role)| *role == Role::Number).map(|(column, _)| *column);
        let measured = (task == Task::Regression).then_some(target);
        let mistakes = numbers.chain(measured).filter_map(|column| Some((column, column.mistakes()?)));
        let mistakes: Vec<_> = mistakes.map(|(column, (count, odd))| (column, count, odd)).collect();
        let spoilt: usize = mistakes.iter().map(|(_, count, _)| count).sum();
        if 20 * spoilt > *rows {
            let (column, _, odd) = mistakes[0];
            bail!(
                "{shown} has {spoilt} texts among the numbers of its columns, as {odd:?} in `{}`, too many to leave their rows out: mend \
                 them, or empty these cells",
                column.name
            );
        }
        let rare = |count: &&usize| **count < 5 && task == Task::Classification;
        let rare: usize = target.values.values().filter(rare).sum();
        let empty_texts = text.map_or(0, |text| rows - text.filled);
        let without = rows - target.filled + empty_texts;
        Ok(Plan { target, because, task, roles, text, mistakes, without, rare })
    }

    /// Whether a column's values are classes or measurements.
    fn task(&self, target: &Column, because: &str, shown: &str) -> Result<Task> {
        let (name, different) = (&target.name, target.different());
        let otherwise = format!("name another column with --target; {shown} has {}", self.names());
        if different < 2 {
            let only = target.values.keys().next().map_or("nothing".into(), |value| format!("`{value}`"));
            bail!("the target `{name}` ({because}) is {only} in all rows, so there is nothing to predict: {otherwise}");
        }
        let numbered = target.is_whole() && (different == 2 || different <= MOST_NUMBERED && target.repeats() >= 4.0);
        match target.is_number() {
            true if numbered => Ok(Task::Classification),
            true => Ok(Task::Regression),
            false if target.full_at.is_none() && different <= MOST_CATEGORIES && target.repeats() >= 2.0 => {
                Ok(Task::Classification)
            }
            false => {
                let most = if target.full_at.is_some() { "more than " } else { "" };
                bail!(
                    "the target `{name}` ({because}) has {most}{different} different texts in {} rows, too many to be classes: {otherwise}",
                    self.rows
                )
            }
        }
    }
}

/// The cells of a table of ratings, by its names or its numbers.
pub fn ratings(table: &Table, file: &str) -> Option<Vec<&'static str>> {
    let plain = |column: &Column| {
        let letters = column.name.to_lowercase().replace(|c: char| !c.is_alphanumeric(), "");
        letters.strip_suffix("id").map_or(letters.clone(), String::from)
    };
    let cell = |column: &Column| match &*plain(column) {
        "user" | "customer" | "reviewer" => "user",
        "item" | "movie" | "book" | "product" | "track" | "song" | "artist" => "item",
        "rating" | "stars" | "score" => "rating",
        "time" | "timestamp" | "date" => "time",
        _ => "-",
    };
    let columns = &table.columns;
    let cells: Vec<&str> = columns.iter().map(cell).collect();
    let once = |name: &str| cells.iter().filter(|cell| **cell == name).count() == 1;
    if columns.len() <= 5 && ["user", "item", "rating"].into_iter().all(once) {
        return Some(cells);
    }
    let Form::Csv { header: false, .. } = table.form else { return None };
    let seconds = |column: &Column| {
        column.is_whole() && column.values.keys().all(|value| value.parse::<f64>().is_ok_and(|t| t > 1e8))
    };
    let known = file.to_lowercase().contains("rating") || columns.get(3).is_some_and(seconds);
    let fits =
        matches!(columns.len(), 3 | 4) && columns[..2].iter().all(|column| column.is_whole() && column.repeats() > 1.0);
    let stars = fits && columns[2].is_number() && columns[2].different() <= MOST_NUMBERED;
    (known && stars).then(|| ["user", "item", "rating", "time"][..columns.len()].into())
}
