//! TOML with places: every value knows the line, or the `--set`, that it came from.

use super::parse::data::FORMATS;
use std::borrow::Cow;
use std::fmt;
use std::ops::RangeInclusive;
use std::rc::Rc;
use toml_edit::{Document, Item, TableLike, Value};

/// Why a job file is refused: where, what, and what to do.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{place}: {message}")]
pub struct JobError {
    /// `FILE:LINE`, or `--set KEY=VALUE`.
    pub place: String,
    pub message: String,
}

pub(super) type Result<T> = std::result::Result<T, JobError>;

/// Where a value stands.
pub(super) type Place = Rc<str>;

/// A value and its place.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub place: Place,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Text(String),
    Integer(i64),
    Float(f64),
    Bool(bool),
    Other(&'static str),
    List(Vec<Node>),
    Table(Vec<(String, Node)>),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Text(t) => write!(f, "the text {t:?}"),
            Kind::Integer(i) => write!(f, "{i}"),
            Kind::Float(v) => write!(f, "{v:?}"),
            Kind::Bool(b) => write!(f, "{b}"),
            Kind::Other(what) => write!(f, "{what}"),
            Kind::List(_) => write!(f, "a list"),
            Kind::Table(_) => write!(f, "a table"),
        }
    }
}

/// Whether a section's keys are those of this crate: the keys of a data format that a program adds mean anything.
fn are_ours(section: &str, table: &[(String, Node)]) -> bool {
    let format = table.iter().find_map(|(key, node)| if key == "format" { Some(&node.kind) } else { None });
    section != "data" || matches!(format, Some(Kind::Text(name)) if FORMATS.iter().any(|(known, _)| known == name))
}

/// Of two ways to say something in a section, with the keys of each, a job has one.
const INSTEAD: [(&str, [&[&str]; 2]); 2] =
    [("train", [&["steps"], &["epochs"]]), ("data", [&["test"], &["holdout", "holdout_by"]])];

/// Tables that `"name"` is short for, as `{ kind = "name" }`, and what they are when nothing is said.
const SHORTHANDS: [(&str, &str); 6] = [
    ("data.tokenizer", "words"),
    ("model.activation", "relu"),
    ("train.loss", "cross-entropy"),
    ("train.optimizer", "adamw"),
    ("train.schedule", "constant"),
    ("train.tables.optimizer", "adagrad"),
];

/// No key of a job is deeper than three; trees of thousands would overflow the stack.
const DEEPEST: usize = 8;

impl Node {
    pub fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(JobError { place: self.place.to_string(), message: message.into() })
    }

    pub fn empty_table(place: Place) -> Node {
        Node { place, kind: Kind::Table(Vec::new()) }
    }

    /// `{ kind = "name" }` for `"name"`.
    pub fn expanded(&self) -> Cow<'_, Node> {
        match &self.kind {
            Kind::Text(_) => {
                let kind = Kind::Table(vec![("kind".into(), self.clone())]);
                Cow::Owned(Node { place: self.place.clone(), kind })
            }
            _ => Cow::Borrowed(self),
        }
    }

    /// Of a table: the text under `key`, and the others as JSON, without those that are `not` wanted.
    pub fn others(&self, key: &str, not: &[&str]) -> Result<(Option<&str>, serde_json::Value)> {
        let Kind::Table(entries) = &self.kind else { return Ok((None, serde_json::Value::Null)) };
        let name = entries.iter().find(|(k, _)| k == key).and_then(|(_, node)| match &node.kind {
            Kind::Text(name) => Some(name.as_str()),
            _ => None,
        });
        let others = entries.iter().filter(|(k, _)| k != key && !not.contains(&k.as_str()));
        Ok((name, others.map(|(k, node)| Ok((k.clone(), node.json()?))).collect::<Result<_>>()?))
    }

    fn json(&self) -> Result<serde_json::Value> {
        Ok(match &self.kind {
            Kind::Text(t) => t.as_str().into(),
            Kind::Integer(i) => (*i).into(),
            Kind::Float(v) => (*v).into(),
            Kind::Bool(b) => (*b).into(),
            Kind::Other(what) => return self.error(format!("{what} is of no use here; write a text or a number")),
            Kind::List(items) => items.iter().map(Node::json).collect::<Result<_>>()?,
            Kind::Table(entries) => {
                entries.iter().map(|(key, node)| Ok((key.clone(), node.json()?))).collect::<Result<_>>()?
            }
        })
    }

    fn of_table(table: &dyn TableLike, place: Place, at: &dyn Fn(usize) -> Place) -> Node {
        let entry = |(key, item): (&str, &Item)| {
            let span = table.key(key).and_then(|k| k.span()).or_else(|| item.span());
            (key.to_string(), Node::of_item(item, span.map_or(place.clone(), |s| at(s.start)), at))
        };
        Node { kind: Kind::Table(table.iter().map(entry).collect()), place }
    }

    fn of_item(item: &Item, place: Place, at: &dyn Fn(usize) -> Place) -> Node {
        match item {
            Item::Value(value) => Node::of_value(value, place, at),
            Item::Table(table) => Node::of_table(table, place, at),
            Item::ArrayOfTables(tables) => {
                let one = |t: &toml_edit::Table| Node::of_table(t, t.span().map_or(place.clone(), |s| at(s.start)), at);
                Node { kind: Kind::List(tables.iter().map(one).collect()), place }
            }
            Item::None => Node { place, kind: Kind::Other("nothing") },
        }
    }

    fn of_value(value: &Value, place: Place, at: &dyn Fn(usize) -> Place) -> Node {
        let kind = match value {
            Value::String(s) => Kind::Text(s.value().clone()),
            Value::Integer(i) => Kind::Integer(*i.value()),
            Value::Float(f) => Kind::Float(*f.value()),
            Value::Boolean(b) => Kind::Bool(*b.value()),
            Value::Datetime(_) => Kind::Other("a date"),
            Value::Array(list) => {
                let one = |v: &Value| Node::of_value(v, v.span().map_or(place.clone(), |s| at(s.start)), at);
                Kind::List(list.iter().map(one).collect())
            }
            Value::InlineTable(table) => return Node::of_table(table, place, at),
        };
        Node { place, kind }
    }

    /// Reads a whole file.
    pub fn parse(text: &str, file: &str) -> Result<Node> {
        let at = |offset: usize| -> Place {
            let line = 1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|b| **b == b'\n').count();
            format!("{file}:{line}").into()
        };
        let document = Document::parse(text).map_err(|e| JobError {
            place: at(e.span().map_or(0, |s| s.start)).to_string(),
            message: format!("this is not TOML: {}", e.message().trim().replace('\n', ", ")),
        })?;
        Ok(Node::of_table(document.as_table(), at(0), &at))
    }

    /// Puts the value of `--set KEY=VALUE` into the tree.
    pub fn set(&mut self, option: &str) -> Result<()> {
        let place: Place = format!("--set {option}").into();
        let wrong = |message: String| Err(JobError { place: place.to_string(), message });
        let Some((path, text)) = option.split_once('=') else {
            return wrong("there is no `=`; write KEY=VALUE, for example train.steps=200".into());
        };
        let text = text.trim();
        let value = match text.parse::<Value>() {
            Ok(value) => Node::of_value(&value, place.clone(), &|_| place.clone()),
            Err(_) if !text.is_empty() && !text.contains(['{', '}', '[', ']', '"', '\'', '\n']) => {
                Node { place: place.clone(), kind: Kind::Text(text.into()) }
            }
            Err(_) => {
                return wrong("the value is neither TOML nor a bare word; quote the whole option for the shell".into());
            }
        };
        let keys: Vec<&str> = path.split('.').map(str::trim).collect();
        if keys.iter().any(|k| k.is_empty()) {
            return wrong("the key has an empty part; write for example train.steps=200".into());
        }
        if keys.len() > DEEPEST {
            return wrong("no key is nested that deeply; write for example train.optimizer.lr=0.1".into());
        }
        // Of keys that say the same thing the later word counts.
        if let [section, last] = keys[..]
            && let Some((_, ways)) = INSTEAD.iter().find(|(of, ways)| *of == section && ways.concat().contains(&last))
            && let Kind::Table(top) = &mut self.kind
            && let Some((_, Node { kind: Kind::Table(table), .. })) = top.iter_mut().find(|(k, _)| k == section)
            && are_ours(section, table)
        {
            let other = |key: &str| ways.iter().any(|way| way.contains(&key) && !way.contains(&last));
            table.retain(|(key, _)| !other(key));
        }
        let mut node = self;
        for (depth, key) in keys.iter().enumerate() {
            let so_far = keys[..depth].join(".");
            if let Some((_, default)) = SHORTHANDS.iter().find(|(path, _)| *path == so_far) {
                if matches!(&node.kind, Kind::Table(table) if table.is_empty()) {
                    node.kind = Kind::Text((*default).into());
                }
                *node = node.expanded().into_owned();
            }
            let found = node.kind.to_string();
            let Kind::Table(table) = &mut node.kind else {
                return wrong(format!("`{so_far}` is {found}, and holds no `{key}`; set `{so_far}` as a whole"));
            };
            let index = table.iter().position(|(k, _)| k == key).unwrap_or_else(|| {
                table.push(((*key).into(), Node::empty_table(place.clone())));
                table.len() - 1
            });
            node = &mut table[index].1;
        }
        *node = value;
        Ok(())
    }
}

/// Names that decide which keys a table has, each with its keys.
pub(super) type Kinds = [(&'static str, &'static [&'static str])];

/// A condition on numbers, and the words for it.
pub(super) struct Range {
    pub what: &'static str,
    pub fits: fn(f64) -> bool,
}

/// Reads the keys of one table.
pub(super) struct Reader<'a> {
    node: &'a Node,
    entries: &'a [(String, Node)],
    /// The table's dotted name; empty for the whole job.
    path: String,
}

/// What a table has for a key: to be completed with [`or`](Field::or), [`needed`](Field::needed) or [`optional`](Field::optional).
pub(super) struct Field<'r, 'a, T> {
    reader: &'r Reader<'a>,
    key: &'static str,
    value: Option<T>,
}

impl<T> Field<'_, '_, T> {
    pub fn or(self, default: T) -> T {
        self.value.unwrap_or(default)
    }

    pub fn optional(self) -> Option<T> {
        self.value
    }

    /// The value, or an error that shows a line to add.
    pub fn needed(self, line: &str) -> Result<T> {
        match self.value {
            Some(value) => Ok(value),
            None => {
                self.reader.error(format!("`{}` is missing; write for example `{line}`", self.reader.full(self.key)))
            }
        }
    }
}

impl<'a> Reader<'a> {
    /// Opens a table; call [`Reader::only`] or [`Reader::kind`] next.
    pub fn new(node: &'a Node, path: impl Into<String>) -> Result<Reader<'a>> {
        let path = path.into();
        match &node.kind {
            Kind::Table(entries) => Ok(Reader { node, entries, path }),
            other => node.error(format!("`{path}` must be a table, not {other}; write {{ ... }} with its keys")),
        }
    }

    pub fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        self.node.error(message)
    }

    /// An error about a key, at its place.
    pub fn refuse<T>(&self, key: &'static str, message: &str) -> Result<T> {
        self.find(key).unwrap_or(self.node).error(format!("`{}` {message}", self.full(key)))
    }

    /// Refuses keys that have no meaning here.
    pub fn only_with(&self, keys: &[&'static str], what: &str) -> Result<()> {
        self.absent(keys, &format!("is for {what}; leave it out, or change that"))
    }

    /// Refuses keys that contradict another one.
    pub fn not_with(&self, keys: &[&'static str], other: &str, why: &str) -> Result<()> {
        self.absent(keys, &format!("and `{other}` are both given, but {why}; leave one of them out"))
    }

    fn absent(&self, keys: &[&'static str], message: &str) -> Result<()> {
        match keys.iter().find(|key| self.find(key).is_some()) {
            Some(key) => self.refuse(key, message),
            None => Ok(()),
        }
    }

    /// A key's dotted name.
    pub fn full(&self, key: &str) -> String {
        if self.path.is_empty() { key.into() } else { format!("{}.{key}", self.path) }
    }

    /// Refuses all keys but these. It comes before any value is read: a misspelt key explains best why another is missing.
    pub fn only(&self, known: &[&'static str]) -> Result<()> {
        let Some((key, node)) = self.entries.iter().find(|(key, _)| !known.contains(&key.as_str())) else {
            return Ok(());
        };
        let advice = match nearest(key, known) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("the keys here are {}", listed(known)),
        };
        node.error(format!("unknown key `{}`; {advice}", self.full(key)))
    }

    /// One of the names in `kinds`, under `key`; the table may hold `key`, the keys of that name, and those in `common`.
    pub fn kind(&self, key: &'static str, what: &str, kinds: &Kinds, common: &[&'static str]) -> Result<&'static str> {
        let names: Vec<&'static str> = kinds.iter().map(|(name, _)| *name).collect();
        if let (None, Some((wrong, node))) =
            (self.find(key), self.entries.iter().find(|(k, _)| nearest(k, &[key]).is_some()))
        {
            return node.error(format!("unknown key `{}`; did you mean `{key}`?", self.full(wrong)));
        }
        let name = self.word(key, what, &names)?.needed(&format!("{key} = {:?}", names[0]))?;
        let own = kinds.iter().filter(|(n, _)| *n == name).flat_map(|(_, keys)| keys.iter());
        let known: Vec<&'static str> = [key].iter().chain(own).chain(common).copied().collect();
        self.only(&known)?;
        Ok(name)
    }

    fn find(&self, key: &str) -> Option<&'a Node> {
        self.entries.iter().find(|(k, _)| k == key).map(|(_, node)| node)
    }

    fn field<T>(&self, key: &'static str, read: impl FnOnce(&'a Node) -> Result<T>) -> Result<Field<'_, 'a, T>> {
        Ok(Field { reader: self, key, value: self.find(key).map(read).transpose()? })
    }

    /// A value as it is.
    pub fn node(&self, key: &'static str) -> Field<'_, 'a, &'a Node> {
        Field { reader: self, key, value: self.find(key) }
    }

    /// A value that `take` accepts; `what` says in words what that is.
    pub fn get<T>(
        &self,
        key: &'static str,
        what: &str,
        take: impl Fn(&'a Kind) -> Option<T>,
    ) -> Result<Field<'_, 'a, T>> {
        self.field(key, |node| match take(&node.kind) {
            Some(value) => Ok(value),
            None => node.error(format!("`{}` must be {what}, not {}", self.full(key), node.kind)),
        })
    }

    pub fn flag(&self, key: &'static str) -> Result<Field<'_, 'a, bool>> {
        self.get(key, "true or false", |k| if let Kind::Bool(b) = k { Some(*b) } else { None })
    }

    /// A text that is not empty.
    pub fn text(&self, key: &'static str) -> Result<Field<'_, 'a, String>> {
        self.get(key, "a text", |k| text(k).filter(|t| !t.is_empty()))
    }

    /// One of the `known` names.
    pub fn word(&self, key: &'static str, what: &str, known: &[&'static str]) -> Result<Field<'_, 'a, &'static str>> {
        self.field(key, |node| {
            let Kind::Text(got) = &node.kind else {
                return node.error(format!("`{}` must be one of {}, not {}", self.full(key), listed(known), node.kind));
            };
            if let Some(found) = known.iter().find(|k| *k == got) {
                return Ok(*found);
            }
            match nearest(got, known) {
                Some(near) => node.error(format!("there is no {what} {got:?}; did you mean {near:?}?")),
                None => node.error(format!("there is no {what} {got:?}; choose one of {}", listed(known))),
            }
        })
    }

    /// A whole number in `range`.
    pub fn integer(&self, key: &'static str, range: RangeInclusive<u64>) -> Result<Field<'_, 'a, u64>> {
        let what = match (range.start(), range.end()) {
            (low, &u64::MAX) => format!("a whole number of at least {low}"),
            (low, high) => format!("a whole number from {low} to {high}"),
        };
        self.get(key, &what, |k| whole(k).filter(|i| range.contains(i)))
    }

    /// A count of things that are held in memory.
    pub fn size(&self, key: &'static str) -> Result<Field<'_, 'a, usize>> {
        self.get(key, SIZE, size)
    }

    /// A finite number in `range`.
    pub fn f64(&self, key: &'static str, range: &Range) -> Result<Field<'_, 'a, f64>> {
        self.get(key, range.what, |k| number(k).filter(|v| (range.fits)(*v)))
    }

    /// As [`Reader::f64`]; the range holds for what remains in 32 bits, where 1e-50 is 0 and 0.999999999 is 1.
    pub fn f32(&self, key: &'static str, range: &Range) -> Result<Field<'_, 'a, f32>> {
        self.get(key, &format!("{} (in 32 bits)", range.what), |k| float(k).filter(|v| (range.fits)(*v as f64)))
            .or_else(|error| self.f64(key, range).and(Err(error)))
    }

    /// A list of what `take` accepts; `what` says in words what that is.
    pub fn list<T>(
        &self,
        key: &'static str,
        what: &str,
        take: impl Fn(&'a Kind) -> Option<T>,
    ) -> Result<Field<'_, 'a, Vec<T>>> {
        self.field(key, |node| {
            let full = self.full(key);
            let Kind::List(items) = &node.kind else {
                return node.error(format!("`{full}` must be a list, each item {what}, not {}", node.kind));
            };
            let one = |item: &'a Node| match take(&item.kind) {
                Some(value) => Ok(value),
                None => item.error(format!("each item of `{full}` must be {what}, not {}", item.kind)),
            };
            items.iter().map(one).collect()
        })
    }
}

/// What [`size`] accepts, in words.
pub(super) const SIZE: &str = "a whole number from 1 to 2147483648";

pub(super) fn text(kind: &Kind) -> Option<String> {
    if let Kind::Text(t) = kind { Some(t.clone()) } else { None }
}

pub(super) fn whole(kind: &Kind) -> Option<u64> {
    if let Kind::Integer(i) = kind { u64::try_from(*i).ok() } else { None }
}

pub(super) fn size(kind: &Kind) -> Option<usize> {
    whole(kind).filter(|i| (1..=1 << 31).contains(i)).and_then(|i| usize::try_from(i).ok())
}

/// A finite number, whole or not.
pub(super) fn number(kind: &Kind) -> Option<f64> {
    match kind {
        Kind::Float(f) if f.is_finite() => Some(*f),
        Kind::Integer(i) => Some(*i as f64),
        _ => None,
    }
}

/// A number that is finite in 32 bits.
pub(super) fn float(kind: &Kind) -> Option<f32> {
    number(kind).map(|v| v as f32).filter(|v| v.is_finite())
}

/// "`a`, `b`, `c`".
fn listed(names: &[&str]) -> String {
    names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ")
}

/// The known name that `got` is probably meant to be.
pub fn nearest<'a>(got: &str, known: &[&'a str]) -> Option<&'a str> {
    // One slip of the finger is nearest; of equally near names, the first.
    let score = |k: &str| if strsim::osa_distance(k, got) == 1 { 1.0 } else { strsim::jaro_winkler(k, got) };
    let scored = known.iter().rev().map(|k| (score(k), *k));
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(score, _)| *score > 0.75).map(|(_, name)| name)
}
