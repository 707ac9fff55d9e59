//! What DATA is: a file by how it begins, a folder by what is in it.

use anyhow::{Context, Result, anyhow, bail};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use unisono_common::data::{libsvm, picture, reader};
use unisono_common::job::Form;

/// As much of a file as is looked at to know what it is.
const HEAD: u64 = 1 << 16;
/// Pictures that are measured.
const PICTURES: usize = 32;
/// Pictures are made at most as large as this.
const MOST_PIXELS: usize = 64;

/// A file of samples, and the one beside it that looks like its test set.
pub struct Pair<T> {
    pub train: T,
    pub test: Option<T>,
}

/// A form of data, and where they are.
pub enum Found {
    /// Of lines of cells, how many cells these mostly have.
    Table {
        form: Form,
        cells: usize,
        files: Pair<PathBuf>,
    },
    /// Users, items and ratings between colons.
    Colons(Pair<PathBuf>),
    LibSvm(Pair<PathBuf>),
    Text(Pair<PathBuf>),
    Images {
        folders: Pair<PathBuf>,
        size: [usize; 2],
        channels: usize,
    },
    /// Images and labels.
    Idx(Pair<[PathBuf; 2]>),
    Cifar {
        files: Pair<Vec<PathBuf>>,
        classes: usize,
    },
}

pub fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into()).unwrap_or_default()
}

/// What is in a folder and not hidden, by name.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = || std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    let mut all = read().with_context(|| format!("cannot read the folder {}", folder.display()))?;
    all.retain(|path| !name(path).starts_with('.'));
    all.sort();
    Ok(all)
}

/// How a file begins, unpacked; and whether that is all of it.
fn head(path: &Path) -> Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::new();
    let read = reader(path).and_then(|file| file.take(HEAD + 1).read_to_end(&mut bytes));
    read.with_context(|| format!("cannot read {}", path.display()))?;
    let whole = bytes.len() as u64 <= HEAD;
    bytes.truncate(HEAD as usize);
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    Ok((bytes, whole))
}

/// The file, with the one beside it whose name says "test" where its own says "train".
fn with_test(train: PathBuf) -> Pair<PathBuf> {
    let own = name(&train);
    let test =
        [("train", "test"), ("Train", "Test"), ("TRAIN", "TEST")].into_iter().find_map(|(train_word, test_word)| {
            let other = train.with_file_name(own.replace(train_word, test_word));
            (own.contains(train_word) && other.is_file()).then_some(other)
        });
    Pair { train, test }
}

/// What a file or a folder is.
///
/// # Errors
/// What it is not, and what to give instead.
pub fn find(data: &Path) -> Result<Found> {
    if !data.exists() {
        bail!("there is no {}; give a file, or a folder of files or pictures", data.display());
    }
    if data.is_dir() { folder(data) } else { file(data) }
}

fn file(path: &Path) -> Result<Found> {
    let shown = path.display();
    let (bytes, whole) = head(path)?;
    let form = |form, cells| Ok(Found::Table { form, cells, files: with_test(path.into()) });
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match &bytes[..] {
        b if b.trim_ascii().is_empty() => bail!("{shown} is empty; give a file that holds samples"),
        [b'P', b'A', b'R', b'1', ..] => return form(Form::Parquet, 0),
        [0, 0, 8, 1..=3, ..] => {
            bail!("{shown} is an IDX file, one of two that belong together: give their folder, {}", dir.display())
        }
        [0x89, b'P', b'N', b'G', ..] | [0xff, 0xd8, 0xff, ..] => {
            bail!("{shown} is one picture; give a folder that has a folder of pictures for each class")
        }
        b"" | [..] => {}
    }
    let text = match std::str::from_utf8(&bytes) {
        Ok(text) => text,
        // A character that is cut in two.
        Err(e) if e.error_len().is_none() && !whole => std::str::from_utf8(&bytes[..e.valid_up_to()])?,
        Err(_) => bail!(
            "{shown} is neither UTF-8 text nor Parquet; convert it to UTF-8, or give the folder of CIFAR's or IDX's files"
        ),
    };
    // What follows the last line end may be half a line.
    let text = if whole { text } else { text.rsplit_once('\n').map_or(text, |(lines, _)| lines) };
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let object = |line: &str| serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(line).is_ok();
    if lines[0].starts_with('{') && (object(lines[0]) || lines.iter().skip(1).any(|line| object(line))) {
        return form(Form::JsonLines, 0);
    }
    if text.trim_start().starts_with(['{', '[']) && name(path).contains(".json") {
        bail!(
            "{shown} is JSON, but not an object on each line; write it as JSON lines, for example with `jq -c '.[]'`"
        );
    }
    let mut samples = lines.iter().filter(|line| !line.starts_with('#')).take(100).peekable();
    if samples.peek().is_some() && samples.all(|line| is_libsvm(line)) {
        return Ok(Found::LibSvm(with_test(path.into())));
    }
    let colons = |line: &&str| line.split("::").count();
    if colons(&lines[0]) >= 3 && lines.iter().all(|line| colons(line) == colons(&lines[0])) {
        return Ok(Found::Colons(with_test(path.into())));
    }
    let name = name(path).to_lowercase();
    let named = [".csv", ".tsv", ".tab", ".data"].iter().any(|end| name.trim_end_matches(".gz").ends_with(end));
    match separator(text, if named { 1 } else { 2 }) {
        // Prose may have as many commas in each line, but has spaces behind them.
        Some((',', _)) if !named && text.contains(", ") => Ok(Found::Text(with_test(path.into()))),
        Some((separator, cells)) => form(csv(separator, true), cells),
        None if named => bail!(
            "{shown} has one column, or not as many cells in each line; a table needs a column to predict and others to learn from: \
             separate cells by a comma, a tab, a semicolon or a bar"
        ),
        None => Ok(Found::Text(with_test(path.into()))),
    }
}

pub fn csv(separator: char, quoting: bool) -> Form {
    Form::Csv { columns: None, header: false, separator, quoting }
}

fn is_libsvm(line: &str) -> bool {
    let (mut ids, mut factors) = (Vec::new(), Vec::new());
    let parsed = libsvm::parse(line, None, &mut ids, &mut factors);
    let label = |label: Option<&str>| label.is_none_or(|label| label.parse::<f32>().is_ok()) && !ids.is_empty();
    parsed.is_ok_and(|line| line.is_none_or(label))
}

/// What separates cells, and how many a line mostly has: more than one, in nine of ten lines, and in so many at least.
fn separator(text: &str, least: usize) -> Option<(char, usize)> {
    let count = |separator: char| {
        let mut reader = ::csv::ReaderBuilder::new();
        reader.delimiter(separator as u8).quoting(separator != '\t').flexible(true).has_headers(false);
        let mut widths = BTreeMap::new();
        for record in reader.from_reader(text.as_bytes()).byte_records().map_while(Result::ok) {
            *widths.entry(record.len()).or_insert(0) += 1;
        }
        let all: usize = widths.values().sum();
        let (cells, lines) = widths.into_iter().max_by_key(|(_, lines)| *lines)?;
        (cells > 1 && all >= least && 10 * lines >= 9 * all).then_some((lines, cells, separator))
    };
    let best = [',', ';', '|', '\t'].into_iter().filter_map(count).max_by_key(|(lines, cells, _)| (*lines, *cells));
    best.map(|(_, cells, separator)| (separator, cells))
}

fn folder(folder: &Path) -> Result<Found> {
    let (folders, files): (Vec<PathBuf>, Vec<PathBuf>) = entries(folder)?.into_iter().partition(|path| path.is_dir());
    let called = |names: &[&str]| folders.iter().find(|path| names.contains(&&*name(path).to_lowercase())).cloned();
    if let Some(train) = called(&["train", "training"]) {
        let test = called(&["test", "testing", "val", "valid", "validation"]);
        return images(Pair { train, test });
    }
    let heads = files.iter().map(|path| Ok(head(path)?.0)).collect::<Result<Vec<_>>>()?;
    let idx = |path: &Path| {
        let labels = name(path).replace("images", "labels").replace("idx3", "idx1").replace("idx2", "idx1");
        let labels = path.with_file_name(labels);
        (labels != path && labels.is_file()).then(|| [path.to_path_buf(), labels])
    };
    let is_images = |head: &[u8]| matches!(head, [0, 0, 8, 2 | 3, ..]);
    let pairs = files.iter().zip(&heads).filter(|(_, head)| is_images(head)).filter_map(|(path, _)| idx(path));
    let (mut tests, mut trains): (Vec<_>, Vec<_>) =
        pairs.partition(|[images, _]| name(images).contains("test") || name(images).contains("t10k"));
    if let Some(train) = trains.pop().or_else(|| tests.pop()) {
        return Ok(Found::Idx(Pair { train, test: tests.pop() }));
    }
    let is_binary = |path: &&PathBuf| name(path).trim_end_matches(".gz").ends_with(".bin");
    let (test, train): (Vec<PathBuf>, Vec<PathBuf>) =
        files.iter().filter(is_binary).cloned().partition(|path| name(path).contains("test"));
    if let Some(first) = train.first() {
        let size = reader(first).and_then(|mut file| std::io::copy(&mut file, &mut std::io::sink()));
        let size = size.with_context(|| format!("cannot read {}", first.display()))?;
        let classes = if size.is_multiple_of(3073) { 10 } else { 100 };
        return Ok(Found::Cifar { files: Pair { train, test: Some(test).filter(|test| !test.is_empty()) }, classes });
    }
    if folders.len() > 1 {
        return images(Pair { train: folder.into(), test: None });
    }
    let ends = [".csv", ".tsv", ".tab", ".txt", ".json", ".jsonl", ".parquet", ".svm", ".libsvm", ".data", ".dat"];
    let mut all = files;
    all.retain(|path| {
        let name = name(path).to_lowercase();
        !name.starts_with("readme") && ends.iter().any(|end| name.trim_end_matches(".gz").ends_with(end))
    });
    let only = |is: fn(&str) -> bool| {
        let mut those = all.iter().filter(|path| is(&name(path)));
        those.next().filter(|_| those.next().is_none())
    };
    let train =
        only(|_| true).or_else(|| only(|name| name.contains("train"))).or_else(|| only(|n| n.contains("ratings")));
    let names = || all.iter().map(|path| name(path)).collect::<Vec<_>>().join(", ");
    file(train.ok_or_else(|| match all.len() {
        0 => anyhow!("{} holds neither files that are known nor folders of pictures", folder.display()),
        _ => anyhow!(
            "{} holds several files, and none says that it is the one to train on: give one of {}",
            folder.display(),
            names()
        ),
    })?)
}

/// Folders of pictures by class: how large they mostly are, and whether they have colours.
fn images(folders: Pair<PathBuf>) -> Result<Found> {
    let (mut sizes, mut grey) = (Vec::new(), true);
    let classes = entries(&folders.train)?.into_iter().filter(|path| path.is_dir());
    let each = classes.map(|class| entries(&class)).collect::<Result<Vec<_>>>()?;
    let most = each.iter().map(Vec::len).max().unwrap_or(0);
    // The first of each class, then the second of each.
    let taking_turns = (0..most).flat_map(|i| each.iter().filter_map(move |class| class.get(i)));
    for path in taking_turns.take(PICTURES) {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let measured = picture::measure(&bytes);
        let (size, is_grey) = measured.map_err(|why| {
            anyhow!(
                "{} cannot be read as a picture: {why}; a class's folder holds PNG and JPEG files alone",
                path.display()
            )
        })?;
        sizes.push(size);
        grey &= is_grey;
    }
    sizes.sort();
    let Some([height, width]) = sizes.get(sizes.len() / 2) else {
        bail!("{} holds no folders of pictures; give a folder that has one for each class", folders.train.display());
    };
    let longest = (*height).max(*width).max(MOST_PIXELS);
    let scaled = |side: usize| (side * MOST_PIXELS / longest).max(1);
    Ok(Found::Images { folders, size: [scaled(*height), scaled(*width)], channels: if grey { 1 } else { 3 } })
}
