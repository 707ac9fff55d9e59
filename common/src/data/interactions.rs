//! Files of interactions: a user and an item a line, mostly with a rating and a time.
//!
//! Users are known by the hash of their text, items by their place among all of the training file, in ascending order: their names are
//! kept with what is learnt.

use super::bad::Bad;
use super::error::At;
use super::implicit::MOST_ITEMS;
use super::{Candidates, DataError, Dataset, Files, IdField, Raw, Scale, Seen, Targets, read_bytes};
use crate::job::{HeldOut, Implicit, OnError, RatingFiles, Separator};
use crate::rng::{Key, Purpose};
use crate::rows::NO_ID;
use ::csv::{ReaderBuilder, StringRecord};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Bytes of all items' names, at most: they travel in one message.
const MOST_NAMES: usize = 32 << 20;

/// What a line's cells are where nothing is said; a file may leave the last ones out.
const CELLS: [&str; 4] = ["user", "item", "rating", "time"];

/// Places of what is read in a line of `width` cells.
#[derive(Clone, Copy, Debug)]
struct Cells {
    width: usize,
    user: usize,
    item: usize,
    rating: Option<usize>,
    time: Option<usize>,
}

/// One file, and what is where in it.
struct File<'a> {
    path: String,
    bytes: &'a [u8],
    spec: &'a RatingFiles,
    cells: Cells,
}

/// One line.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Line {
    /// Numbers in the order in which they were first read.
    user: u32,
    item: u32,
    /// 0 where there is none.
    rating: f32,
    /// 0 unless it is asked for.
    time: f64,
}

/// Texts, numbered in the order in which they first came.
#[derive(Default)]
struct Names<'a> {
    numbers: HashMap<Cow<'a, str>, u32>,
    names: Vec<Cow<'a, str>>,
}

impl<'a> Names<'a> {
    fn number(&mut self, name: Cow<'a, str>) -> u32 {
        if let Some(number) = self.numbers.get(&name) {
            return *number;
        }
        let number = self.names.len() as u32;
        self.names.push(name.clone());
        self.numbers.insert(name, number);
        number
    }
}

/// The trimmed cells of a line.
fn split<'a>(line: &'a str, separator: &Separator, cells: &mut Vec<Cow<'a, str>>) {
    cells.clear();
    match separator {
        Separator::Whitespace => cells.extend(line.split_whitespace().map(Cow::Borrowed)),
        // A quoted cell may hold the separator.
        Separator::Text(text) if text.len() == 1 && line.contains('"') => {
            let mut reader =
                ReaderBuilder::new().delimiter(text.as_bytes()[0]).has_headers(false).from_reader(line.as_bytes());
            let mut record = StringRecord::new();
            // In memory and in UTF-8: it can be read.
            reader.read_record(&mut record).ok();
            cells.extend(record.iter().map(|cell| Cow::Owned(cell.trim().to_string())));
        }
        Separator::Text(text) => cells.extend(line.split(text.as_str()).map(|cell| Cow::Borrowed(cell.trim()))),
    }
}

impl<'a> File<'a> {
    /// `lenient`: lines may be left out.
    fn new(path: String, bytes: &'a [u8], spec: &'a RatingFiles, lenient: bool) -> Result<File<'a>, DataError> {
        let none = Cells { width: 0, user: 0, item: 0, rating: None, time: None };
        let mut file = File { path, bytes, spec, cells: none };
        let lines = numbered_lines(bytes).filter(|(_, line)| !line.trim_ascii().is_empty());
        let mut places = lines.map(|(number, line)| {
            let mut cells = Vec::new();
            if spec.columns.is_none() {
                split(file.text(number, line)?, &spec.separator, &mut cells);
            }
            file.places(number, &cells)
        });
        let first = places.next().unwrap_or_else(|| Err(DataError::Empty { path: file.path.clone() }));
        // A first line that does not say how long lines are may be a bad one.
        let other = if first.is_err() && lenient && !spec.header { places.find_map(Result::ok) } else { None };
        file.cells = match other {
            Some(cells) => cells,
            None => first?,
        };
        Ok(file)
    }

    /// Where cells are, which the job says or the first line.
    fn places(&self, number: usize, first: &[Cow<'_, str>]) -> Result<Cells, DataError> {
        let (spec, path) = (self.spec, || self.path.clone());
        let owned = |cells: &[Cow<'_, str>]| cells.iter().map(|cell| cell.to_string()).collect::<Vec<String>>();
        let needed = spec.needed();
        let names: Vec<String> = match (&spec.columns, spec.header) {
            (Some(columns), _) => columns.clone(),
            (None, true) => owned(first),
            (None, false) if (needed.len()..=CELLS.len()).contains(&first.len()) => {
                CELLS[..first.len()].iter().map(|name| name.to_string()).collect()
            }
            (None, false) if first.len() < needed.len() => {
                let names = needed.join(", ");
                return Err(DataError::FewCells {
                    path: path(),
                    line: number,
                    got: first.len(),
                    want: needed.len(),
                    names,
                });
            }
            (None, false) => {
                return Err(DataError::Ragged {
                    at: At::line(&self.path, number),
                    got: first.len(),
                    want: CELLS.len(),
                });
            }
        };
        let place = |name: &str| names.iter().position(|other| other == name);
        if let Some(missing) = needed.iter().find(|name| place(name).is_none()) {
            return Err(DataError::NoCell { path: path(), found: names.join(", "), missing });
        }
        let (user, item) = (place("user").unwrap_or(0), place("item").unwrap_or(1));
        Ok(Cells { width: names.len(), user, item, rating: place("rating"), time: place("time") })
    }

    /// All lines that are not empty, in their order. `known`: items that samples may have, where they may not have all.
    fn lines(
        &self,
        users: &mut Names<'a>,
        items: &mut Names<'a>,
        known: Option<&IdField>,
        bad: &mut Bad,
    ) -> Result<Vec<Line>, DataError> {
        let (mut header, mut lines, mut cells) = (self.spec.header, Vec::new(), Vec::new());
        for (number, text) in numbered_lines(self.bytes) {
            if text.trim_ascii().is_empty() || std::mem::take(&mut header) {
                continue;
            }
            match self.line(number, text, known, &mut cells) {
                Ok((rating, time)) => {
                    let user = users.number(cells[self.cells.user].clone());
                    let item = items.number(cells[self.cells.item].clone());
                    lines.push(Line { user, item, rating, time });
                }
                Err(error) => bad.take(error)?,
            }
        }
        bad.check()?;
        if lines.is_empty() { Err(DataError::Empty { path: self.path.clone() }) } else { Ok(lines) }
    }

    /// The rating and the time of a line, 0 where there is none, and its cells.
    fn line(
        &self,
        number: usize,
        text: &'a [u8],
        known: Option<&IdField>,
        cells: &mut Vec<Cow<'a, str>>,
    ) -> Result<(f32, f64), DataError> {
        let Cells { width, user, item, rating, time } = self.cells;
        let path = || self.path.clone();
        split(self.text(number, text)?, &self.spec.separator, cells);
        if cells.len() != width {
            return Err(DataError::Ragged { at: At::line(&self.path, number), got: cells.len(), want: width });
        }
        for (place, column) in [(user, "user"), (item, "item")] {
            if cells[place].is_empty() {
                return Err(DataError::EmptyCell { path: path(), line: number, column });
            }
        }
        let number_in = |place: Option<usize>, column| {
            let Some(cell) = place.map(|place| &cells[place]) else { return Ok(0.0) };
            let value = cell.parse().ok().filter(|value: &f64| (*value as f32).is_finite());
            value.ok_or_else(|| DataError::RatingNumber { path: path(), line: number, column, cell: cell.to_string() })
        };
        let rating = number_in(rating, "rating")? as f32;
        let time = number_in(time.filter(|_| self.spec.holdout == Some(HeldOut::Last)), "time")?;
        let unknown = |items: &IdField| items.id(std::iter::once(&*cells[item]), "").is_err();
        if self.spec.is_sample(rating) && known.is_some_and(unknown) {
            return Err(DataError::UnknownItem { path: path(), line: number, item: cells[item].to_string() });
        }
        Ok((rating, time))
    }

    fn text(&self, number: usize, line: &'a [u8]) -> Result<&'a str, DataError> {
        std::str::from_utf8(line).map_err(|_| DataError::RowNotText { at: At::line(&self.path, number) })
    }
}

/// Lines, each with its number, counted from 1.
fn numbered_lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    (1..).zip(bytes.split(|byte| *byte == b'\n'))
}

impl RatingFiles {
    /// Cells that every line has to have.
    fn needed(&self) -> &'static [&'static str] {
        match (self.implicit, self.holdout) {
            (Some(Implicit { threshold: None, .. }), Some(HeldOut::Last)) => &["user", "item", "time"],
            (_, Some(HeldOut::Last)) => &CELLS,
            (Some(Implicit { threshold: None, .. }), _) => &CELLS[..2],
            (Some(_) | None, _) => &CELLS[..3],
        }
    }

    /// Whether a line is a sample: of implicit feedback not all are.
    fn is_sample(&self, rating: f32) -> bool {
        self.implicit.and_then(|implicit| implicit.threshold).is_none_or(|threshold| rating >= threshold)
    }
}

/// Which of the lines are held out.
fn held_out(spec: &RatingFiles, seed: u64, users: &Names<'_>, items: &Names<'_>, lines: &[Line]) -> Vec<bool> {
    let mut held = vec![false; lines.len()];
    match spec.holdout {
        None => {}
        Some(by @ (HeldOut::Share(share) | HeldOut::Users(share) | HeldOut::Items(share))) => {
            let key = Key::new(seed, Purpose::Split);
            for (held, line) in held.iter_mut().zip(lines) {
                let (user, item) = (&users.names[line.user as usize], &items.names[line.item as usize]);
                let key = match by {
                    HeldOut::Users(_) => key.named(user),
                    HeldOut::Items(_) => key.named(item),
                    HeldOut::Share(_) | HeldOut::Last => key.named(user).named(item),
                };
                *held = (key.uniform(0) as f64) < share;
            }
        }
        Some(HeldOut::Last) => {
            // Of each user the samples so far, and the last of them; of those of one time the last line.
            let mut last: BTreeMap<u32, (usize, usize)> = BTreeMap::new();
            for (at, line) in lines.iter().enumerate().filter(|(_, line)| spec.is_sample(line.rating)) {
                let (count, latest) = last.entry(line.user).or_insert((0, at));
                *count += 1;
                if line.time >= lines[*latest].time {
                    *latest = at;
                }
            }
            last.values().filter(|(count, _)| *count > 1).for_each(|(_, at)| held[*at] = true);
        }
    }
    held
}

/// What the training file teaches about users and items.
struct Known {
    user: IdField,
    item: IdField,
    implicit: Option<Arc<Seen>>,
}

impl Known {
    /// Users' ids, by their numbers.
    fn user_ids(&self, users: &Names<'_>) -> Vec<u64> {
        let id = |name: &Cow<'_, str>| self.user.id(std::iter::once(&**name), "").unwrap_or(NO_ID); // any text has one
        users.names.iter().map(id).collect()
    }

    /// Items' ids, by their numbers; none for those that the training file does not have.
    fn item_ids(&self, items: &Names<'_>) -> Vec<u64> {
        let id = |name: &Cow<'_, str>| self.item.id(std::iter::once(&**name), "").unwrap_or(NO_ID);
        items.names.iter().map(id).collect()
    }

    fn dataset(&self, lines: &[Line], users: &[u64], items: &[u64]) -> Dataset {
        let ids = lines.iter().flat_map(|line| [users[line.user as usize], items[line.item as usize]]).collect();
        let targets = match &self.implicit {
            Some(seen) => Targets::Seen(seen.clone()),
            None => Targets::Value(lines.iter().map(|line| line.rating).collect()),
        };
        Dataset::pairs(ids, targets)
    }
}

/// Reads both splits; the vocabulary is that of the training file, also of what is held out of it.
pub(super) fn read(files: &Files, spec: &RatingFiles, seed: u64, on_error: OnError) -> Result<Raw, DataError> {
    let mut bad = Bad::new(on_error);
    let open = |path: &str| {
        let found = files.find(&spec.base, path)?;
        Ok((read_bytes(&found)?, found.display().to_string()))
    };
    let (bytes, path) = open(&spec.train)?;
    let (mut users, mut items) = (Names::default(), Names::default());
    let mut lines =
        File::new(path.clone(), &bytes, spec, bad.skips())?.lines(&mut users, &mut items, None, &mut bad)?;
    let mut values: Vec<String> = items.names.iter().map(|name| name.to_string()).collect();
    values.sort_unstable();
    let bytes = values.iter().map(String::len).sum();
    if values.len() > MOST_ITEMS || bytes > MOST_NAMES {
        return Err(DataError::TooManyItems { path, items: values.len(), bytes, most: MOST_ITEMS });
    }
    let count = values.len();
    let field =
        |column: &str, size: Option<u64>, values| IdField { columns: vec![column.into()], size, first: 0, values };
    let mut known =
        Known { user: field("user", None, vec![]), item: field("item", Some(count as u64), values), implicit: None };
    let (user_ids, item_ids) = (known.user_ids(&users), known.item_ids(&items));
    let held = held_out(spec, seed, &users, &items, &lines);
    let mut seen = Vec::new();
    if spec.implicit.is_some() {
        // Whatever a user has said of an item, it is none that the user has nothing to do with.
        let pair = |line: &Line| (user_ids[line.user as usize], item_ids[line.item as usize] as u32);
        seen.extend(lines.iter().zip(&held).filter(|(_, held)| !**held).map(|(line, _)| pair(line)));
    }
    let of_test = lines.iter().zip(&held).filter(|(_, held)| **held).map(|(line, _)| *line);
    let test: Vec<Line> = of_test.filter(|line| spec.is_sample(line.rating)).collect();
    let mut is_held = held.iter();
    lines.retain(|line| is_held.next() == Some(&false) && spec.is_sample(line.rating));
    let train = lines;
    if let (Some(Implicit { threshold: Some(threshold), .. }), true, true) =
        (spec.implicit, train.is_empty(), test.is_empty())
    {
        return Err(DataError::NoPositives { path, threshold });
    }
    match spec.holdout {
        Some(HeldOut::Share(share) | HeldOut::Users(share) | HeldOut::Items(share))
            if train.is_empty() || test.is_empty() =>
        {
            let what = if test.is_empty() { "test on" } else { "train on" };
            return Err(DataError::Holdout { share, path, what });
        }
        Some(HeldOut::Last) if test.is_empty() => return Err(DataError::NoLast { path }),
        Some(_) | None => {}
    }
    if spec.implicit.is_some() {
        let seen = Seen::new(seen);
        has_others(&seen, &path, train.iter().chain(&test), (&users, &user_ids), count)?;
        known.implicit = Some(seen.into());
    }
    let test = match (&spec.test, test.is_empty()) {
        (Some(test), _) => {
            let (bytes, path) = open(test)?;
            Some(read_test(&File::new(path, &bytes, spec, bad.skips())?, &known, &mut bad)?)
        }
        (None, false) => Some(known.dataset(&test, &user_ids, &item_ids)),
        (None, true) => None,
    };
    let train = known.dataset(&train, &user_ids, &item_ids);
    let implicit = spec.implicit.zip(known.implicit).map(|(implicit, seen)| implicit.among(count as u32, &seen));
    let raw = Raw::new(train, test, None, Scale { per_feature: true, unit: 1.0 });
    Ok(Raw { ids: vec![known.user, known.item], implicit, skipped: bad.skipped(), ..raw })
}

/// Samples of a file of its own.
fn read_test(file: &File<'_>, known: &Known, bad: &mut Bad) -> Result<Dataset, DataError> {
    let (mut users, mut items) = (Names::default(), Names::default());
    let must_be = known.implicit.is_some().then_some(&known.item);
    let mut lines = file.lines(&mut users, &mut items, must_be, bad)?;
    lines.retain(|line| file.spec.is_sample(line.rating));
    if let (Some(Implicit { threshold: Some(threshold), .. }), true) = (file.spec.implicit, lines.is_empty()) {
        return Err(DataError::NoPositives { path: file.path.clone(), threshold });
    }
    let user_ids = known.user_ids(&users);
    if let Some(seen) = &known.implicit {
        has_others(seen, &file.path, lines.iter(), (&users, &user_ids), known.item.values.len())?;
    }
    Ok(known.dataset(&lines, &user_ids, &known.item_ids(&items)))
}

/// Whether there is an item to compare each sample with that its user does not have in the training set.
fn has_others<'l>(
    seen: &Seen,
    path: &str,
    mut lines: impl Iterator<Item = &'l Line>,
    (users, ids): (&Names<'_>, &[u64]),
    items: usize,
) -> Result<(), DataError> {
    match lines.find(|line| seen.of(ids[line.user as usize]).len() == items) {
        Some(line) => {
            let user = users.names[line.user as usize].to_string();
            Err(DataError::AllItems { path: path.into(), user, items })
        }
        None => Ok(()),
    }
}

impl Implicit {
    /// What becomes of samples among so many items, of which users have some.
    pub(super) fn among(self, items: u32, seen: &Seen) -> Candidates {
        Candidates { items, pairs: seen.pairs(), negatives: self.negatives, tested: self.eval_negatives, k: self.k }
    }
}

#[cfg(test)]
mod tests;
