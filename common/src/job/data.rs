//! `[data]` as values.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Data {
    pub source: Source,
    /// Scale inputs to mean 0 and deviation 1 with statistics of the training set.
    pub normalize: bool,
    /// `Some(true)`: the coordinator sends workers their partitions; `Some(false)`: workers read the paths themselves;
    /// `None`: they read, and are sent what they cannot read.
    #[serde(skip)]
    pub ship: Option<bool>,
    /// Hash samples to partitions instead of cutting contiguous ranges.
    pub hashed: bool,
    /// How pictures change from epoch to epoch of training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub augment: Option<Augment>,
    /// What is done about samples that cannot be read.
    #[serde(skip_serializing_if = "OnError::is_stop")]
    pub on_error: OnError,
}

/// What is done about rows and pictures that cannot be read (`data.on_error`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum OnError {
    /// The first is the run's error.
    #[default]
    Stop,
    /// They are left out, up to `most` (`data.max_errors`) in the training and test set together.
    Skip {
        #[serde(skip)]
        most: usize,
    },
}

impl OnError {
    /// Whether it is what is done where nothing is said.
    pub fn is_stop(&self) -> bool {
        *self == OnError::Stop
    }
}

/// Where samples come from (`data.format`).
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "format", rename_all = "kebab-case")]
pub enum Source {
    /// The embedded UCI digits, 8x8 in 0..=16; a fifth, chosen by hash of (seed, index), is the test set.
    Digits,
    Idx {
        train: IdxPaths,
        test: Option<IdxPaths>,
        /// `None`: as many as the training set's labels say.
        classes: Option<usize>,
    },
    Table(Box<Table>),
    #[serde(rename = "libsvm")]
    LibSvm(LibSvm),
    Text(Text),
    Cifar(Cifar),
    Images(Images),
    Synthetic {
        task: Task,
        shape: Vec<usize>,
        classes: usize,
        samples: usize,
        test_samples: usize,
    },
    /// One that the program has added ([`crate::extend`]).
    Added {
        #[serde(skip)]
        base: String,
        name: String,
        options: serde_json::Value,
    },
    /// `synthetic` with `task = "clicks"`.
    Clicks(Clicks),
    /// `synthetic` with `task = "ratings"`.
    Ratings(Ratings),
    /// `ratings`.
    RatingFiles(RatingFiles),
    /// `synthetic` with `task = "language"`.
    SyntheticText {
        vocabulary: usize,
        context: usize,
        samples: usize,
        test_samples: usize,
    },
}

/// Paths are as the job file has them; `base` is the job file's folder (absolute).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct IdxPaths {
    #[serde(skip)]
    pub base: String,
    pub images: String,
    pub labels: String,
}

/// Rows of cells, some of whose columns are learnt from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Table {
    #[serde(skip)]
    pub base: String,
    pub form: Form,
    pub train: String,
    pub test: Option<String>,
    pub target: String,
    /// The column that says how much each sample counts in the loss; where there is none, they count the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<String>,
    /// Columns that are one-hot encoded; other columns must be numbers.
    pub categorical: Vec<String>,
    /// Columns whose values are ids of rows of sparse tables.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<Id>,
    /// Columns of numbers of which the logarithm is taken: `sign(x) ln(1 + |x|)`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
    /// Columns that are left out.
    pub ignore: Vec<String>,
    /// The text that stands for a missing value (an empty cell always does).
    pub missing: String,
    pub task: Task,
    /// The share of the training file's rows that is the test set, by hash of the cells that are learnt from; only where `test`
    /// is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holdout: Option<f64>,
    /// The columns whose cells are hashed instead, so that rows with the same ones are on one side; they may be left out otherwise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub holdout_by: Vec<String>,
    /// The only column that is learnt from, where it is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<TextColumn>,
}

/// How a table's files are written.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Form {
    Csv {
        /// Column names, where the file has no header line.
        columns: Option<Vec<String>>,
        /// Whether the first line holds column names.
        header: bool,
        separator: char,
        /// Whether a cell may be in quotes, and hold separators and line ends then.
        quoting: bool,
    },
    /// A JSON object a line, with its cells by column name.
    JsonLines,
    Parquet,
}

impl Form {
    /// That of a table in a file of this name, gzipped or not.
    pub fn of(path: &str) -> Option<Form> {
        let csv = |separator| Form::Csv { columns: None, header: true, separator, quoting: true };
        match path.strip_suffix(".gz").unwrap_or(path).rsplit_once('.')?.1 {
            "csv" => Some(csv(',')),
            "tsv" => Some(csv('\t')),
            "jsonl" | "ndjson" => Some(Form::JsonLines),
            "parquet" => Some(Form::Parquet),
            _ => None,
        }
    }
}

impl Table {
    /// One of which nothing but a column of texts is read.
    pub fn of_texts(base: &str, path: &str, column: &str, form: &Form) -> Table {
        let (tokenizer, context, truncate) = (Tokenizer::Bytes, 1, false);
        Table {
            base: base.into(),
            form: form.clone(),
            train: path.into(),
            test: None,
            target: column.into(),
            weight: None,
            categorical: Vec::new(),
            ids: Vec::new(),
            log: Vec::new(),
            ignore: Vec::new(),
            missing: String::new(),
            task: Task::Classification,
            holdout: None,
            holdout_by: Vec::new(),
            text: Some(TextColumn { column: column.into(), tokenizer, context, truncate }),
        }
    }

    /// Whether a column's cells are looked at.
    pub fn reads(&self, column: &str) -> bool {
        let is = |name: &String| name == column;
        let beside = *column == self.target || self.weight.as_ref().is_some_and(is) || self.holdout_by.iter().any(is);
        beside || self.learns_from(column)
    }

    /// Whether a column's cells are learnt from.
    pub fn learns_from(&self, column: &str) -> bool {
        match &self.text {
            Some(text) => column == text.column,
            None => {
                let is = |name: &String| name == column;
                column != self.target && !self.weight.as_ref().is_some_and(is) && !self.ignore.iter().any(is)
            }
        }
    }
}

/// Lines of a label and `feature:value` for what is not 0.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LibSvm {
    #[serde(skip)]
    pub base: String,
    pub train: String,
    pub test: Option<String>,
    /// The share of the training file's lines that is the test set, by hash of their features; only where `test` is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holdout: Option<f64>,
    pub task: Task,
    /// The largest number of a feature; `None`: any of 64 bits.
    pub size: Option<u64>,
}

/// Where one of a sample's ids comes from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Id {
    /// Several are crossed: each combination of their values is an id.
    pub columns: Vec<String>,
    /// Values are whole numbers below it; `None`: any text, by its hash.
    pub size: Option<u64>,
}

/// Made-up clicks: `numbers` normal numbers, and `fields` ids of `vocabulary` each, of which the `k`-th comes as often as
/// `k^-zipf`; a planted teacher decides which samples are clicked on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Clicks {
    pub numbers: usize,
    pub fields: usize,
    pub vocabulary: u64,
    pub zipf: f64,
    pub samples: usize,
    pub test_samples: usize,
}

/// Made-up ratings of `items` by `users`, of planted vectors of `rank` values, with noise of this deviation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratings {
    pub users: u64,
    pub items: u64,
    pub rank: usize,
    pub noise: f32,
    pub samples: usize,
    pub test_samples: usize,
    /// Users do not rate items, but take those that they like.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub implicit: Option<Implicit>,
}

/// Files of a user, an item and mostly a rating and a time a line.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RatingFiles {
    #[serde(skip)]
    pub base: String,
    pub train: String,
    pub test: Option<String>,
    /// What is tested of the training file; only where `test` is none.
    pub holdout: Option<HeldOut>,
    /// What a line's cells are: `user`, `item`, `rating`, `time`; others are passed over.
    pub columns: Option<Vec<String>>,
    /// Whether the first line holds names.
    pub header: bool,
    pub separator: Separator,
    pub implicit: Option<Implicit>,
}

/// What of a file of ratings is the test set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum HeldOut {
    /// A share of the lines, by hash of user and item.
    Share(f64),
    /// All lines of a share of the users, or of the items, by their hash.
    Users(f64),
    Items(f64),
    /// The last sample of each user who has more than one.
    Last,
}

/// What is between two cells.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Separator {
    Text(String),
    /// Any run of spaces and tabs.
    Whitespace,
}

/// Implicit feedback: samples say what users took, and items that they did not take are drawn beside them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Implicit {
    /// Items that are drawn for each sample in training.
    pub negatives: u32,
    /// The least rating of what a user took; `None`: any, and none at all.
    pub threshold: Option<f32>,
    /// Items that a sample of the test set is ranked among, beside its own; `None`: all that its user does not have.
    pub eval_negatives: Option<u32>,
    /// Places that `hit-rate` and `ndcg` look at.
    pub k: u32,
}

/// What of the training data is the test set.
#[derive(Debug, PartialEq)]
pub struct Split {
    /// The file or folder.
    pub train: PathBuf,
    /// 0: nothing. Of two shares by the same rule the smaller one is a part of the other.
    pub share: f64,
    /// All else that decides what it is.
    pub rule: String,
}

impl Data {
    /// What of the training data is held out, under the run's `seed`; `None`: of these data nothing can be.
    pub fn split(&self, seed: u64) -> Option<Split> {
        let (base, train, share, rule) = match &self.source {
            Source::Digits => ("", "", 0.2, format!("{seed}")),
            Source::Table(t) => (&*t.base, &*t.train, t.holdout.unwrap_or(0.0), format!("{seed} {:?}", t.holdout_by)),
            Source::LibSvm(l) => (&*l.base, &*l.train, l.holdout.unwrap_or(0.0), format!("{seed}")),
            Source::Images(i) => (&*i.base, &*i.train, i.holdout.unwrap_or(0.0), format!("{seed}")),
            Source::Text(t) => (&*t.base, &*t.train, t.holdout.unwrap_or(0.0), String::new()),
            Source::RatingFiles(r) => {
                let (share, rule) = match r.holdout {
                    None => (0.0, String::new()),
                    Some(HeldOut::Share(share)) => (share, format!("{seed} lines")),
                    Some(HeldOut::Users(share)) => (share, format!("{seed} users")),
                    Some(HeldOut::Items(share)) => (share, format!("{seed} items")),
                    Some(HeldOut::Last) => {
                        (1.0, format!("last {:?}", r.implicit.and_then(|implicit| implicit.threshold)))
                    }
                };
                (&*r.base, &*r.train, share, rule)
            }
            Source::Idx { .. }
            | Source::Cifar(_)
            | Source::Synthetic { .. }
            | Source::Added { .. }
            | Source::Clicks(_)
            | Source::Ratings(_)
            | Source::SyntheticText { .. } => return None,
        };
        Some(Split { train: Path::new(base).join(train), share, rule })
    }

    /// How feedback is implicit, where it is.
    pub fn implicit(&self) -> Option<Implicit> {
        match &self.source {
            Source::Ratings(spec) => spec.implicit,
            Source::RatingFiles(spec) => spec.implicit,
            Source::Digits
            | Source::Idx { .. }
            | Source::Table(_)
            | Source::LibSvm(_)
            | Source::Text(_)
            | Source::Cifar(_)
            | Source::Images(_)
            | Source::Synthetic { .. }
            | Source::Clicks(_)
            | Source::SyntheticText { .. }
            | Source::Added { .. } => None,
        }
    }
}

/// The binary files of CIFAR-10 or CIFAR-100.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cifar {
    #[serde(skip)]
    pub base: String,
    pub train: Vec<String>,
    /// None of them: there is no test set.
    pub test: Vec<String>,
    /// 10 or 100.
    pub classes: usize,
}

/// Folders with a folder of pictures for each class.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Images {
    #[serde(skip)]
    pub base: String,
    pub train: String,
    pub test: Option<String>,
    /// The share of the training set, by hash of the pictures, that is the test set; only where `test` is none.
    pub holdout: Option<f64>,
    /// Height and width that pictures are cropped and scaled to.
    pub size: [usize; 2],
    /// 1 or 3.
    pub channels: usize,
}

/// Chance in training, where it is anew in each epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Augment {
    /// Pixels that a picture is padded by, on each side, before a part of its old size is cropped from it.
    pub crop: usize,
    /// Whether half of the pictures are mirrored.
    pub flip: bool,
}

/// Windows of a plain text, each of whose tokens is to be predicted from those before it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Text {
    #[serde(skip)]
    pub base: String,
    pub train: String,
    pub test: Option<String>,
    /// The share of the training text, at its end, that is the test set; only where `test` is none.
    pub holdout: Option<f64>,
    /// The column of a table whose cells are the text, in place of the whole file; both files are of its form.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub column: Option<(String, Form)>,
    pub tokenizer: Tokenizer,
    /// Tokens of a window.
    pub context: usize,
}

/// What a token of a text is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Tokenizer {
    Bytes,
    Characters,
    /// The most frequent words, and hashed runs of up to `ngrams` words.
    Words {
        most: usize,
        ngrams: usize,
        buckets: usize,
    },
    /// What a `tokenizer.json` says.
    File {
        path: String,
    },
}

/// A column of a table whose text is a sample.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextColumn {
    pub column: String,
    pub tokenizer: Tokenizer,
    /// Tokens of a text, at most.
    pub context: usize,
    /// Whether a longer text loses its end; otherwise it is an error.
    pub truncate: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    Classification,
    Regression,
}
