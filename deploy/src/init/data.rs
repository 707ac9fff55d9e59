//! `[data]` of the job: what was found, as keys.

use super::columns::{Column, Plan, Role, Table, ratings};
use super::find::{self, Found, Pair, find};
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use unisono_common::data::reader;
use unisono_common::job::{Form, Task};

/// More values of all categories together become rows of sparse tables.
const MOST_ONE_HOT: usize = 200;
/// Characters that are tokens of their own, at most.
const MOST_CHARACTERS: usize = 256;
/// The share that is held out.
const SHARE: &str = "holdout = 0.2\n";

/// What decides about the model, beside what opened data are.
pub enum Kind {
    Table,
    /// A column of texts.
    Texts,
    /// Plain text of so many characters.
    Language(usize),
    Pictures,
    Ratings,
    Sparse,
}

/// A test set: its key, and what is said of it.
pub struct Tested {
    pub keys: String,
    pub says: String,
}

/// `[data]`, but for the test set.
pub struct Section {
    pub kind: Kind,
    /// Its keys up to the training set, and those behind the test set.
    pub head: String,
    pub keys: String,
    /// Test sets, the best first.
    pub tested: Vec<Tested>,
    /// What was guessed, for who has started the command.
    pub says: Vec<(&'static str, String)>,
}

/// Where the job will lie, and how it can name files.
pub struct Place {
    /// The job's folder.
    pub base: PathBuf,
    /// That of UNISONO_DATA.
    pub root: Option<PathBuf>,
}

impl Place {
    /// DATA, as the command line names it: where it is, or below UNISONO_DATA.
    pub fn find(&self, data: &Path) -> PathBuf {
        let below = self.root.as_ref().map(|root| root.join(data)).filter(|below| !data.exists() && below.exists());
        below.unwrap_or_else(|| data.into())
    }

    /// A path for the job, where it finds just this file: from its own folder if that can be, or from that of UNISONO_DATA.
    fn name(&self, path: &Path) -> Result<String> {
        let whole = std::path::absolute(path)?;
        let below = |folder: &Path| {
            whole.strip_prefix(folder).ok().filter(|path| !path.as_os_str().is_empty()).map(Path::to_path_buf)
        };
        let first = |path: &PathBuf| self.root.as_ref().is_none_or(|root| !root.join(path).exists());
        let own = below(&self.base).filter(first);
        let best = own.or_else(|| self.root.as_deref().and_then(below)).unwrap_or(whole);
        let text = best.to_str().with_context(|| format!("{} is no UTF-8, and a job is; rename it", best.display()));
        Ok(text?.into())
    }

    fn key(&self, key: &str, path: &Path) -> Result<String> {
        Ok(format!("{key} = {}\n", quote(&self.name(path)?)))
    }
}

/// A text in TOML, which takes JSON's escapes.
pub fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// A comment, in lines that are not too long.
pub fn note(text: &str) -> String {
    let mut lines = vec![String::from("#")];
    for word in text.split(' ') {
        if lines.last().is_some_and(|line| line.len() + word.len() > 126) {
            lines.push("#".into());
        }
        if let Some(line) = lines.last_mut() {
            *line += &format!(" {word}");
        }
    }
    lines.join("\n") + "\n"
}

/// A key with a list of texts, in lines that are not too long.
fn list(key: &str, items: &[String]) -> String {
    let items: Vec<String> = items.iter().map(|item| quote(item)).collect();
    let one = format!("{key} = [{}]\n", items.join(", "));
    if one.len() <= 120 {
        return one;
    }
    let mut lines = vec![String::new()];
    for item in items {
        if lines.last().is_some_and(|line| !line.is_empty() && line.len() + item.len() > 115) {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            *line += &format!("{}{item},", if line.is_empty() { "  " } else { " " });
        }
    }
    format!("{key} = [\n{}\n]\n", lines.join("\n"))
}

/// Names for a sentence: not all, where there are many.
fn few(names: &[String]) -> String {
    match names.len() {
        0 => "none".into(),
        1..=8 => names.join(", "),
        n => format!("{}, ... ({n})", names[..8].join(", ")),
    }
}

impl Section {
    /// `train` and `keys` are lines of the job.
    fn new(kind: Kind, about: &str, format: &str, train: &str, keys: String) -> Section {
        let head = format!("{}[data]\nformat = {format:?}\n{train}", note(about));
        Section { kind, head, keys, tested: Vec::new(), says: Vec::new() }
    }

    /// The whole section, with a test set.
    pub fn with(&self, test: &Tested) -> String {
        format!("{}{}{}", self.head, test.keys, self.keys)
    }

    /// Tests on a file of its own, where there is one.
    fn test(mut self, place: &Place, test: Option<&Path>) -> Result<Section> {
        if let Some(test) = test {
            self.tested.push(Tested { keys: place.key("test", test)?, says: test.display().to_string() });
        }
        Ok(self)
    }

    /// Tests on a share of the training set, where there is nothing better.
    fn hold_out(mut self, keys: &str, says: &str) -> Section {
        self.tested.push(Tested { keys: keys.into(), says: says.into() });
        self
    }

    fn fifth(self) -> Section {
        self.hold_out(SHARE, "a fifth, held out")
    }

    fn say(mut self, what: &'static str, text: impl Into<String>) -> Section {
        self.says.push((what, text.into()));
        self
    }
}

/// What DATA is, as a job says it; `target`: the column to predict, where the command line names one.
pub fn section(data: &Path, place: &Place, target: Option<&str>) -> Result<Section> {
    let found = find(data)?;
    if let (Some(target), false) = (target, matches!(found, Found::Table { .. })) {
        bail!("--target {target} is for tables, which {} is not; leave it out", data.display());
    }
    match found {
        Found::Table { form, cells, files } => {
            let table = Table::look(&form, cells, &files.train)?;
            let shown = files.train.display().to_string();
            match (target, ratings(&table, &shown), &table.form) {
                (None, Some(columns), Form::Csv { separator, header, .. }) => {
                    let mut keys = list("columns", &columns.into_iter().map(String::from).collect::<Vec<_>>());
                    keys += if *header { "header = true\n" } else { "" };
                    rated(&files, place, &separator.to_string(), &keys)
                }
                _ => rows(&table, &files, place, target),
            }
        }
        Found::Colons(files) => rated(&files, place, "::", ""),
        Found::LibSvm(files) => {
            let about = "Lines of `label feature:value ...`. Labels that are measurements: task = \"regression\", and below loss = \"mse\".";
            let task = if measured(&files.train)? { "task = \"regression\"\n" } else { "" };
            let section =
                Section::new(Kind::Sparse, about, "libsvm", &place.key("train", &files.train)?, task.to_string());
            let section = section.say("data", "lines of a label and the features that are not 0");
            Ok(section.test(place, files.test.as_deref())?.fifth())
        }
        Found::Text(files) => text(&files, place),
        Found::Images { folders, size: [height, width], channels } => {
            let about = "Pictures in a folder for each class, scaled to size = [height, width]; channels = 1 is grey, 3 is coloured. Pictures \
                         that may be shifted and mirrored in training: augment = { crop = 4, flip = true }.";
            let keys = format!("size = [{height}, {width}]\nchannels = {channels}\n");
            let section = Section::new(Kind::Pictures, about, "images", &place.key("train", &folders.train)?, keys);
            let colour = if channels == 1 { "grey" } else { "coloured" };
            let says = format!("a folder of pictures for each class; {colour}, taken as {height}x{width} pixels");
            Ok(section.say("data", says).test(place, folders.test.as_deref())?.fifth())
        }
        Found::Idx(Pair { train, test }) => {
            let about = "IDX files, images with their labels. Pictures that may be shifted in training: augment = { crop = 2 }.";
            let pair = |key: &str, [images, labels]: &[PathBuf; 2]| -> Result<String> {
                let (images, labels) = (quote(&place.name(images)?), quote(&place.name(labels)?));
                Ok(format!("{key} = {{ images = {images}, labels = {labels} }}\n"))
            };
            let section = Section::new(Kind::Pictures, about, "idx", &pair("train", &train)?, String::new());
            let section = section.say("data", format!("IDX files of images and labels: {}", find::name(&train[0])));
            Ok(match test {
                Some(test) => section.hold_out(&pair("test", &test)?, &find::name(&test[0])),
                None => section.hold_out("", NO_TEST),
            })
        }
        Found::Cifar { files: Pair { train, test }, classes } => {
            let about = "CIFAR's binary files. Pictures that are shifted and mirrored in training: augment = { crop = 4, flip = true }.";
            let names = |files: &[PathBuf]| files.iter().map(|path| place.name(path)).collect::<Result<Vec<_>>>();
            let (train, keys) = (list("train", &names(&train)?), format!("classes = {classes}\n"));
            let section = Section::new(Kind::Pictures, about, "cifar", &train, keys);
            let section = section.say("data", format!("the binary files of CIFAR-{classes}"));
            Ok(match test {
                Some(test) => section.hold_out(&list("test", &names(&test)?), &few(&names(&test)?)),
                None => section.hold_out("", NO_TEST),
            })
        }
    }
}

const NO_TEST: &str = "none: there are no files for one, so nothing is evaluated";

/// Whether labels of libsvm's lines are measurements.
fn measured(path: &Path) -> Result<bool> {
    let mut text = String::new();
    let read = reader(path).and_then(|mut file| file.read_to_string(&mut text));
    read.with_context(|| format!("cannot read {}", path.display()))?;
    let labels: Vec<&str> = text.lines().filter_map(|line| line.split('#').next()?.split_whitespace().next()).collect();
    let different: BTreeSet<&str> = labels.iter().copied().collect();
    let whole = different.iter().all(|label| label.parse::<f64>().is_ok_and(|label| label.fract() == 0.0));
    Ok(different.len() > 2 && !(whole && different.len() <= 100 && labels.len() >= 4 * different.len()))
}

fn rated(files: &Pair<PathBuf>, place: &Place, separator: &str, cells: &str) -> Result<Section> {
    let about = "Users, items and ratings. What users take, in place of how they rate it: docs/recommendation.md. Where there are times, \
                 the last rating of each user as the test set: holdout = \"last\".";
    let separator = if separator == "," { String::new() } else { format!("separator = {}\n", quote(separator)) };
    let train = place.key("train", &files.train)?;
    let section = Section::new(Kind::Ratings, about, "ratings", &train, separator + cells);
    let section =
        section.say("data", "ratings of items by users (with --target COLUMN, a table)").say("target", "the rating");
    Ok(section.test(place, files.test.as_deref())?.fifth())
}

fn text(files: &Pair<PathBuf>, place: &Place) -> Result<Section> {
    let mut text = String::new();
    let read = reader(&files.train).and_then(|mut file| file.read_to_string(&mut text));
    read.with_context(|| format!("cannot read {}", files.train.display()))?;
    let characters = text.chars().count();
    let different = text.chars().collect::<BTreeSet<char>>().len();
    let tokenizer = if different <= MOST_CHARACTERS { "characters" } else { "bytes" };
    let context = if characters >= 20_000 { 64 } else { 16 };
    let about = "Plain text, of which the next token is predicted. Other tokens: tokenizer = \"bytes\", \"characters\", \"words\", or \
                 { kind = \"file\", path = \"tokenizer.json\" }; how many are seen at once: context.";
    let keys = format!("tokenizer = {tokenizer:?}\ncontext = {context}\n");
    let section = Section::new(Kind::Language(characters), about, "text", &place.key("train", &files.train)?, keys);
    let says = format!("plain text of {characters} characters, {different} of them different; tokens are {tokenizer}");
    let section = section.say("data", says).say("target", "the next token");
    Ok(section.test(place, files.test.as_deref())?.hold_out("holdout = 0.1\n", "the last tenth, held out"))
}

/// What is learnt from the columns of a table, as keys.
fn columns(table: &Table, plan: &Plan<'_>, sparse: bool) -> String {
    let mut keys = String::new();
    if let Form::Csv { columns, separator, quoting, .. } = &table.form {
        if *separator != ',' {
            keys += &format!("separator = {}\n", quote(&separator.to_string()));
        }
        keys += if *quoting { "" } else { "quoting = false\n" };
        keys += &columns.as_deref().map(|names| list("columns", names)).unwrap_or_default();
    }
    if table.missing != "?" {
        keys += &note("The text of a cell that is missing; an empty one always is.");
        keys += &format!("missing = {}\n", quote(table.missing));
    }
    keys += &match plan.task {
        Task::Classification => note(&format!(
            "What is predicted, {}: one of {} classes. A number: task = \"regression\", and below loss = \"mse\".",
            plan.because,
            plan.target.different()
        )),
        Task::Regression => note(&format!(
            "What is predicted, {}: a number. Classes: task = \"classification\", and below loss = \"cross-entropy\".",
            plan.because
        )),
    };
    keys += &format!("target = {}\n", quote(&plan.target.name));
    keys += if plan.task == Task::Regression { "task = \"regression\"\n" } else { "" };
    let categories = plan.named(|role| matches!(role, Role::Category | Role::Id));
    if !categories.is_empty() && sparse {
        keys += &note(
            "Texts, and numbers that only tell apart: each value is a row of a sparse table. Few values can be in `categorical` instead.",
        );
        keys += &list("ids", &categories);
    } else if !categories.is_empty() {
        keys += &note("Texts of a few values each, one-hot encoded. Numbers that stand for kinds belong here, too.");
        keys += &list("categorical", &categories);
    }
    if let Some(text) = plan.text {
        let context = (2 * text.longest()).next_power_of_two().clamp(16, 512);
        keys += &note(
            "The texts that are learnt from, as words and pairs of words; what is behind the first `context` of these is not seen.",
        );
        keys +=
            &format!("text = {}\ntokenizer = {{ kind = \"words\", ngrams = 2, buckets = 32768 }}\n", quote(&text.name));
        keys += &format!("context = {context}\ntruncate = true\n");
    }
    let out = plan.named(|role| matches!(role, Role::Out(_)));
    // Of other columns than a text nothing is learnt anyway.
    if !out.is_empty() && plan.text.is_none() {
        keys += &note("What is not learnt from.");
        keys += &list("ignore", &out);
    }
    let unusable =
        table.bad + plan.without + plan.rare + plan.mistakes.iter().map(|(_, count, _)| count).sum::<usize>();
    if unusable > 0 {
        keys += &note(
            "Rows that cannot be used (too few cells, no target, a text among numbers, a class that only tested rows have) are left out, up to max_errors of \
             them; \"stop\" makes the first an error.",
        );
        keys += &format!("on_error = \"skip\"\nmax_errors = {}\n", (2 * unusable).next_power_of_two().max(100));
    }
    keys
}

fn rows(table: &Table, files: &Pair<PathBuf>, place: &Place, target: Option<&str>) -> Result<Section> {
    let plan = table.plan(target, &files.train.display().to_string())?;
    let one_hot = plan.roles.iter().filter(|(_, role)| *role == Role::Category);
    let one_hot: usize = one_hot.map(|(column, _)| column.different()).sum();
    let sparse = one_hot > MOST_ONE_HOT || plan.roles.iter().any(|(_, role)| *role == Role::Id);
    let (format, names) = match &table.form {
        Form::Csv { header: true, .. } => ("csv", "with names in its first line"),
        Form::Csv { .. } => ("csv", "without names"),
        Form::JsonLines => ("json-lines", "as JSON lines"),
        Form::Parquet => ("parquet", "as Parquet"),
    };
    let about = match names {
        "without names" => "A table without a line of names: `columns` can have better ones. ",
        _ => "A table whose columns have names. ",
    };
    let about = format!("{about}A test set of its own: test = \"FILE\", in place of holdout.");
    let kind = if plan.text.is_some() { Kind::Texts } else { Kind::Table };
    let train = place.key("train", &files.train)?;
    let mut section = Section::new(kind, &about, format, &train, columns(table, &plan, sparse));
    section =
        section.say("data", format!("a table of {} rows and {} columns {names}", table.rows, table.columns.len()));
    let what = match plan.task {
        Task::Classification => format!("one of {} classes: {}", plan.target.different(), plan.target.frequent()),
        Task::Regression => "a number".into(),
    };
    let other = if target.is_none() { "; another: --target COLUMN" } else { "" };
    section = section.say("target", format!("{} ({}), {what}{other}", plan.target.name, plan.because));
    let once = plan.target.once();
    if plan.task == Task::Classification && !once.is_empty() {
        section = section.say("misspelt?", format!("classes of one row each: {}", few(&once)));
    }
    section = match plan.text {
        Some(text) => section.say("text", &*text.name),
        None => {
            let categories = plan.named(|role| matches!(role, Role::Category | Role::Id));
            section.say("numbers", few(&plan.named(|role| role == Role::Number))).say("categories", few(&categories))
        }
    };
    let why = |(column, role): &(&Column, Role)| match role {
        Role::Out(why) if column.name.is_empty() => Some(format!("one without a name ({why})")),
        Role::Out(why) => Some(format!("{} ({why})", column.name)),
        Role::Number | Role::Category | Role::Id | Role::Text => None,
    };
    let reasons: Vec<String> = plan.roles.iter().filter_map(why).collect();
    if !reasons.is_empty() {
        section = section.say("left out", few(&reasons));
    }
    if let Some(first) = &table.first_bad {
        section = section.say("bad rows", format!("{}, left out; the first: {first}", table.bad));
    }
    for (column, count, odd) in &plan.mistakes {
        let rows = if *count == 1 { "a row is" } else { &format!("{count} rows are") };
        section = section.say("no numbers", format!("{rows} left out: `{}` has {odd:?} among numbers", column.name));
    }
    if plan.without > 0 {
        let what = plan.text.map_or(String::new(), |text| format!(" or `{}`", text.name));
        section = section.say("empty rows", format!("{}, left out: no `{}`{what}", plan.without, plan.target.name));
    }
    Ok(section.test(place, files.test.as_deref())?.fifth())
}
