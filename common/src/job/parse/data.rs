//! `[data]`.

use super::*;
use crate::data::tokenizer::{MOST_NGRAMS, MOST_WORDS};
use crate::data::{MOST_CONTEXT, MOST_TOKENS};

/// The keys of all tables, and more.
macro_rules! table_keys {
    ($($more:literal),*) => {
        &[
            "train",
            "test",
            "holdout",
            "holdout_by",
            "target",
            "weight",
            "categorical",
            "ids",
            "log",
            "ignore",
            "missing",
            "task",
            "text",
            "tokenizer",
            "context",
            "truncate",
            "on_error",
            "max_errors",
            $($more),*
        ]
    };
}

pub(in crate::job) const FORMATS: &Kinds = &[
    ("digits", &[]),
    ("idx", &["train", "test", "classes", "augment"]),
    ("cifar", &["train", "test", "classes", "augment"]),
    ("images", &["train", "test", "holdout", "size", "channels", "augment", "on_error", "max_errors"]),
    ("csv", table_keys!("header", "columns", "separator", "quoting")),
    ("json-lines", table_keys!()),
    ("parquet", table_keys!()),
    ("criteo", &["train", "test", "holdout", "on_error", "max_errors"]),
    ("libsvm", &["train", "test", "holdout", "task", "size", "on_error", "max_errors"]),
    ("text", &["train", "test", "holdout", "text", "tokenizer", "context"]),
    (
        "ratings",
        &[
            "train",
            "test",
            "holdout",
            "holdout_by",
            "columns",
            "header",
            "separator",
            "implicit",
            "on_error",
            "max_errors",
        ],
    ),
    (
        "synthetic",
        &[
            "task",
            "shape",
            "classes",
            "numbers",
            "fields",
            "vocabulary",
            "zipf",
            "users",
            "items",
            "rank",
            "noise",
            "implicit",
            "context",
            "samples",
            "test_samples",
            "augment",
        ],
    ),
];

pub(super) fn data(node: &Node, base: &str) -> Result<Data> {
    let r = Reader::new(node, "data")?;
    let names = Names::formats();
    const COMMON: [&str; 4] = ["normalize", "ship", "partition", "augment"];
    let source = if let Some((name, options)) = added(node, "format", &names, &COMMON)? {
        Source::Added { base: base.into(), name, options }
    } else {
        of_format(&r, r.kind("format", "data format", &with_added(FORMATS, &names), &COMMON[..3])?, base)?
    };
    let made = matches!(
        source,
        Source::Synthetic { .. } | Source::SyntheticText { .. } | Source::Clicks(_) | Source::Ratings(_)
    );
    let hashed = r.word("partition", "partition", &["contiguous", "hashed"])?.or("contiguous") == "hashed";
    let normalize = r.flag("normalize")?.or(!made);
    let augment = r.node("augment").optional().map(pictures::augment).transpose()?;
    Ok(Data { source, normalize, ship: r.flag("ship")?.optional(), hashed, augment, on_error: on_error(&r)? })
}

fn of_format(r: &Reader<'_>, format: &str, base: &str) -> Result<Source> {
    Ok(match format {
        "digits" => Source::Digits,
        "idx" => Source::Idx {
            train: idx_paths(
                r.node("train").needed("train = { images = \"images.gz\", labels = \"labels.gz\" }")?,
                base,
                "data.train",
            )?,
            test: r.node("test").optional().map(|n| idx_paths(n, base, "data.test")).transpose()?,
            classes: r.integer("classes", 2..=256)?.optional().map(|n| n as usize),
        },
        "csv" => Source::Table(Box::new(table(r, base, csv(r)?, "train.csv")?)),
        "json-lines" => Source::Table(Box::new(table(r, base, Form::JsonLines, "train.jsonl")?)),
        "parquet" => Source::Table(Box::new(table(r, base, Form::Parquet, "train.parquet")?)),
        "criteo" => Source::Table(Box::new(criteo(r, base)?)),
        "libsvm" => Source::LibSvm(libsvm(r, base)?),
        "text" => Source::Text(plain_text(r, base)?),
        "ratings" => Source::RatingFiles(ratings::files(r, base)?),
        "cifar" => Source::Cifar(pictures::cifar(r, base)?),
        "images" => Source::Images(pictures::images(r, base)?),
        _ => synthetic(r)?,
    })
}

fn on_error(r: &Reader<'_>) -> Result<OnError> {
    if r.word("on_error", "way to go on", &["stop", "skip"])?.or("stop") == "stop" {
        r.only_with(&["max_errors"], "data.on_error = \"skip\"")?;
        return Ok(OnError::Stop);
    }
    Ok(OnError::Skip { most: r.integer("max_errors", COUNT_OR_0)?.or(100) as usize })
}

fn idx_paths(node: &Node, base: &str, path: &str) -> Result<IdxPaths> {
    let r = Reader::new(node, path)?;
    r.only(&["images", "labels"])?;
    Ok(IdxPaths {
        base: base.into(),
        images: r.text("images")?.needed("images = \"mnist/train-images-idx3-ubyte.gz\"")?,
        labels: r.text("labels")?.needed("labels = \"mnist/train-labels-idx1-ubyte.gz\"")?,
    })
}

fn task(r: &Reader<'_>) -> Result<Task> {
    Ok(match r.word("task", "task", &["classification", "regression"])?.or("classification") {
        "regression" => Task::Regression,
        _ => Task::Classification,
    })
}

fn csv(r: &Reader<'_>) -> Result<Form> {
    let columns = r.list("columns", "a text", text)?.optional();
    let separator = |k: &Kind| {
        let Kind::Text(t) = k else { return None };
        // One byte, and not what quoting and lines are made of.
        t.chars().next().filter(|c| t.len() == 1 && !['"', '\n', '\r'].contains(c))
    };
    Ok(Form::Csv {
        header: r.flag("header")?.or(columns.is_none()),
        columns,
        separator: r.get("separator", "one plain character, such as \";\" or \"\\t\"", separator)?.or(','),
        quoting: r.flag("quoting")?.or(true),
    })
}

fn table(r: &Reader<'_>, base: &str, form: Form, example: &str) -> Result<Table> {
    let names = |key| r.list(key, "a text", text);
    let (test, holdout) = test_set(r)?;
    let holdout_by = names("holdout_by")?.or(Vec::new());
    if holdout.is_none() {
        r.only_with(&["holdout_by"], "data.holdout")?;
    }
    let text_column = match r.text("text")?.optional() {
        Some(column) => {
            r.not_with(&["categorical", "ids", "log", "ignore"], "data.text", "the text is all that is learnt from")?;
            let truncate = r.flag("truncate")?.or(false);
            Some(TextColumn { column, tokenizer: tokenizer(r, WORDS)?, context: context(r)?, truncate })
        }
        None => {
            r.only_with(&["tokenizer", "context", "truncate"], "data.text")?;
            None
        }
    };
    Ok(Table {
        base: base.into(),
        form,
        train: r.text("train")?.needed(&format!("train = {example:?}"))?,
        test,
        holdout,
        holdout_by,
        text: text_column,
        target: r.text("target")?.needed("target = \"label\"")?,
        weight: r.text("weight")?.optional(),
        categorical: names("categorical")?.or(Vec::new()),
        ids: r.node("ids").optional().map_or(Ok(Vec::new()), ids)?,
        log: names("log")?.or(Vec::new()),
        ignore: names("ignore")?.or(Vec::new()),
        missing: r.get("missing", "a text", text)?.or("?".into()),
        task: task(r)?,
    })
}

/// Criteo's display advertising data: a label, 13 counts and 26 categories, without names.
fn criteo(r: &Reader<'_>, base: &str) -> Result<Table> {
    let (test, holdout) = test_set(r)?;
    let named = |letter: char, n: usize| (1..=n).map(move |i| format!("{letter}{i}"));
    let columns = ["label".to_string()].into_iter().chain(named('I', 13)).chain(named('C', 26)).collect();
    Ok(Table {
        base: base.into(),
        form: Form::Csv { columns: Some(columns), header: false, separator: '\t', quoting: false },
        train: r.text("train")?.needed("train = \"criteo/train.txt.gz\"")?,
        test,
        target: "label".into(),
        weight: None,
        categorical: Vec::new(),
        ids: named('C', 26).map(|column| Id { columns: vec![column], size: None }).collect(),
        log: named('I', 13).collect(),
        ignore: Vec::new(),
        missing: String::new(),
        task: Task::Classification,
        holdout,
        holdout_by: Vec::new(),
        text: None,
    })
}

fn libsvm(r: &Reader<'_>, base: &str) -> Result<LibSvm> {
    let (test, holdout) = test_set(r)?;
    Ok(LibSvm {
        base: base.into(),
        train: r.text("train")?.needed("train = \"train.svm\"")?,
        test,
        holdout,
        task: task(r)?,
        size: r.integer("size", 1..=1 << 48)?.optional(),
    })
}

/// `["a", { column = "b", size = 10 }, { cross = ["c", "d"] }]`
fn ids(node: &Node) -> Result<Vec<Id>> {
    let Kind::List(items) = &node.kind else {
        return node.error(format!("`data.ids` must be a list of columns, not {}", node.kind));
    };
    let one = |(i, node): (usize, &Node)| {
        if let Kind::Text(column) = &node.kind {
            return Ok(Id { columns: vec![column.clone()], size: None });
        }
        let r = Reader::new(node, format!("data.ids[{i}]"))?;
        r.only(&["column", "size", "cross"])?;
        let column = r.text("column")?.optional();
        let cross = r.list("cross", "a text", text)?.optional();
        match (column, cross) {
            (Some(column), None) => {
                Ok(Id { columns: vec![column], size: r.integer("size", 1..=1 << 48)?.optional() })
            }
            (None, Some(columns)) if columns.len() > 1 => {
                r.not_with(&["size"], &r.full("cross"), "combinations are known by their hash")?;
                Ok(Id { columns, size: None })
            }
            _ => r.error(format!(
                "`data.ids[{i}]` must be a column's name, {{ column = \"user\", size = 1000 }} or {{ cross = [\"a\", \"b\"] }}"
            )),
        }
    };
    items.iter().enumerate().map(one).collect()
}

fn plain_text(r: &Reader<'_>, base: &str) -> Result<Text> {
    let (test, holdout) = test_set(r)?;
    let tokenizer = tokenizer(r, Tokenizer::Bytes)?;
    if matches!(tokenizer, Tokenizer::Words { ngrams: 2.., .. }) {
        return r.refuse("tokenizer", "has `ngrams`, which are for classes of texts; leave it out");
    }
    let train = r.text("train")?.needed("train = \"book.txt\"")?;
    let column = match r.text("text")?.optional() {
        Some(column) => {
            let form = Form::of(&train);
            let Some(form) = form.filter(|form| test.as_ref().is_none_or(|test| Form::of(test).as_ref() == Some(form)))
            else {
                let files = "files that end in .jsonl, .ndjson, .csv, .tsv or .parquet (or one of these and .gz), train and test alike";
                return r.refuse("text", &format!("names a column of {files}; leave it out for plain text"));
            };
            Some((column, form))
        }
        None => None,
    };
    Ok(Text { base: base.into(), train, test, holdout, column, tokenizer, context: context(r)? })
}

/// A file of its own, or a share of the training set.
pub(super) fn test_set(r: &Reader<'_>) -> Result<(Option<String>, Option<f64>)> {
    let test = r.text("test")?.optional();
    let holdout = r.f64("holdout", &BETWEEN)?.optional();
    if test.is_some() && holdout.is_some() {
        return r.refuse("holdout", "and `data.test` are both given; keep one of them");
    }
    Ok((test, holdout))
}

fn context(r: &Reader<'_>) -> Result<usize> {
    Ok(r.integer("context", 1..=MOST_CONTEXT as u64)?.needed("context = 64")? as usize)
}

const TOKENIZERS: &Kinds =
    &[("bytes", &[]), ("characters", &[]), ("words", &["most", "ngrams", "buckets"]), ("file", &["path"])];

const WORDS: Tokenizer = Tokenizer::Words { most: 50_000, ngrams: 1, buckets: 1 << 16 };

fn tokenizer(r: &Reader<'_>, default: Tokenizer) -> Result<Tokenizer> {
    let read = |node| {
        choice(node, "tokenizer", "data.tokenizer", TOKENIZERS, &[], |name, r| match (name, WORDS) {
            ("words", Tokenizer::Words { most, ngrams, buckets }) => Ok(Tokenizer::Words {
                most: r.integer("most", 1..=MOST_WORDS as u64)?.or(most as u64) as usize,
                ngrams: r.integer("ngrams", 1..=MOST_NGRAMS as u64)?.or(ngrams as u64) as usize,
                buckets: r.integer("buckets", 1..=MOST_WORDS as u64)?.or(buckets as u64) as usize,
            }),
            ("characters", _) => Ok(Tokenizer::Characters),
            ("file", _) => Ok(Tokenizer::File { path: r.text("path")?.needed("path = \"tokenizer.json\"")? }),
            _ => Ok(Tokenizer::Bytes),
        })
    };
    r.node("tokenizer").optional().map_or(Ok(default), read)
}

fn synthetic(r: &Reader<'_>) -> Result<Source> {
    let task = r
        .word("task", "task", &["classification", "regression", "language", "clicks", "ratings"])?
        .or("classification");
    let samples = r.integer("samples", COUNT)?.needed("samples = 65536")?;
    let test_samples = r.integer("test_samples", COUNT_OR_0)?.or((samples / 8).max(1));
    let (samples, test_samples) = (samples as usize, test_samples as usize);
    let not_for = |keys: &[&'static str]| r.only_with(keys, &format!("another `data.task` than {task:?}"));
    if task == "ratings" {
        not_for(&["shape", "classes", "numbers", "fields", "vocabulary", "zipf", "context"])?;
        return Ok(Source::Ratings(ratings::made_up(r, samples, test_samples)?));
    }
    not_for(&["users", "items", "rank", "noise", "implicit"])?;
    if task == "clicks" {
        not_for(&["shape", "classes", "context"])?;
        return Ok(Source::Clicks(Clicks {
            numbers: r.integer("numbers", 1..=1 << 16)?.or(13) as usize,
            fields: r.integer("fields", 1..=1 << 12)?.or(26) as usize,
            vocabulary: r.integer("vocabulary", 1..=1 << 40)?.needed("vocabulary = 20000")?,
            zipf: r.f64("zipf", &NOT_NEGATIVE)?.or(1.0),
            samples,
            test_samples,
        }));
    }
    not_for(&["numbers", "fields", "zipf"])?;
    if task == "language" {
        not_for(&["shape", "classes", "augment"])?;
        let vocabulary = r.integer("vocabulary", 2..=MOST_TOKENS as u64)?.needed("vocabulary = 65")? as usize;
        let context = context(r)?;
        return Ok(Source::SyntheticText { vocabulary, context, samples, test_samples });
    }
    not_for(&["vocabulary", "context"])?;
    let shape = r.list("shape", SIZE, size)?.needed("shape = [784]")?;
    if !matches!(shape.len(), 1 | 3) || shape.iter().map(|&d| d as u128).product::<u128>() > 1 << 31 {
        return r
            .refuse("shape", "must be [features] or [channels, height, width], with at most 2147483648 values in all");
    }
    let (task, classes) = if task == "regression" {
        not_for(&["classes"])?;
        (Task::Regression, 0)
    } else {
        (Task::Classification, r.integer("classes", 2..=1 << 24)?.needed("classes = 10")? as usize)
    };
    Ok(Source::Synthetic { task, shape, classes, samples, test_samples })
}
