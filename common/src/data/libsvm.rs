//! LIBSVM's format: a line a sample, `label feature:value feature:value ...`, with what is not 0.
//!
//! A feature is an id, whose row of a sparse table is multiplied by the feature's value. All samples have as many places for ids as
//! the longest line has features; the places that are left hold no id.

use super::bad::Bad;
use super::error::At;
use super::table::MOST_VALUES;
use super::{DataError, Dataset, Features, Files, Ids, Raw, Scale, Sparse, Targets, read_bytes};
use crate::job::{self, Task};
use crate::rng::{Key, Purpose};
use crate::rows::NO_ID;
use std::sync::Arc;

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Wrong {
    #[error("the line has no label; a line is `label feature:value ...`")]
    NoLabel,
    #[error("the label is `{0}`, which is not a finite number; correct it (there is one label a line)")]
    Label(String),
    #[error("`{0}` names a query, and nothing is learnt about queries; take the qid fields out")]
    Query(String),
    #[error(
        "`{0}` is not `feature:value`, where the feature is a whole number below 2^64 - 1; correct it, or put `#` before a comment"
    )]
    Pair(String),
    #[error("feature {feature} has the value `{value}`, which is not a finite number; correct it")]
    Value { feature: u64, value: String },
    #[error("feature {feature} is above data.size = {size}; correct it, or raise data.size, or leave it out")]
    Size { feature: u64, size: u64 },
    #[error("there are {found} features, and the model takes at most {most} a sample")]
    Many { found: usize, most: usize },
}

/// Reads a line's features that are not 0 into `ids` and `factors`, and gives its label. `None`: the line holds nothing.
///
/// # Errors
/// What is wrong with it.
pub fn parse<'l>(
    line: &'l str,
    size: Option<u64>,
    ids: &mut Vec<u64>,
    factors: &mut Vec<f32>,
) -> Result<Option<Option<&'l str>>, Wrong> {
    let line = line.split_once('#').map_or(line, |(before, _)| before);
    let mut words = line.split_whitespace().peekable();
    if words.peek().is_none() {
        return Ok(None);
    }
    let label = words.next_if(|word| !word.contains(':'));
    for word in words {
        let pair = || Wrong::Pair(word.into());
        let (feature, value) = word.split_once(':').ok_or_else(pair)?;
        if feature.eq_ignore_ascii_case("qid") {
            return Err(Wrong::Query(word.into()));
        }
        let feature = feature.parse::<u64>().ok().filter(|feature| *feature != NO_ID).ok_or_else(pair)?;
        let finite = value.parse::<f32>().ok().filter(|value| value.is_finite());
        let value = finite.ok_or_else(|| Wrong::Value { feature, value: value.into() })?;
        match size {
            Some(size) if feature > size => return Err(Wrong::Size { feature, size }),
            Some(_) | None if value == 0.0 => {}
            Some(_) | None => {
                ids.push(feature);
                factors.push(value);
            }
        }
    }
    Ok(Some(label))
}

/// A label as a number; that of -0 is 0.
fn number(label: &str) -> Result<f64, Wrong> {
    let number = label.parse::<f64>().ok().filter(|number| (*number as f32).is_finite());
    number.map(|number| number + 0.0).ok_or_else(|| Wrong::Label(label.into()))
}

/// The samples of a file.
struct File {
    path: Arc<str>,
    samples: Vec<Sample>,
    ids: Vec<u64>,
    factors: Vec<f32>,
}

#[derive(Clone)]
struct Sample {
    line: usize,
    label: f64,
    /// Where its features begin and end.
    features: (usize, usize),
}

impl File {
    /// `most`: features that a sample may have.
    fn read(
        files: &Files,
        spec: &job::LibSvm,
        path: &str,
        most: Option<usize>,
        bad: &mut Bad,
    ) -> Result<File, DataError> {
        let found = files.find(&spec.base, path)?;
        let path: Arc<str> = found.display().to_string().into();
        let mut file = File { path, samples: Vec::new(), ids: Vec::new(), factors: Vec::new() };
        for (line, bytes) in (1..).zip(read_bytes(&found)?.split(|byte| *byte == b'\n')) {
            let start = file.ids.len();
            match file.line(line, bytes, spec, most) {
                Ok(None) => {}
                Ok(Some(label)) => {
                    file.samples.push(Sample { line, label, features: (start, file.ids.len()) });
                }
                Err(error) => {
                    bad.take(error)?;
                    file.ids.truncate(start);
                    file.factors.truncate(start);
                }
            }
        }
        bad.check()?;
        if file.samples.is_empty() {
            return Err(DataError::Empty { path: file.path.to_string() });
        }
        Ok(file)
    }

    fn at(&self, line: usize) -> At {
        At { path: self.path.clone(), row: line, lines: true }
    }

    /// The label of a line that has one, whose features are appended.
    fn line(
        &mut self,
        line: usize,
        bytes: &[u8],
        spec: &job::LibSvm,
        most: Option<usize>,
    ) -> Result<Option<f64>, DataError> {
        let text = std::str::from_utf8(bytes).map_err(|_| DataError::RowNotText { at: self.at(line) })?;
        let start = self.ids.len();
        let parsed = parse(text, spec.size, &mut self.ids, &mut self.factors).and_then(|label| {
            let Some(label) = label else { return Ok(None) };
            let found = self.ids.len() - start;
            if let Some(most) = most.filter(|most| found > *most) {
                return Err(Wrong::Many { found, most });
            }
            number(label.ok_or(Wrong::NoLabel)?).map(Some)
        });
        parsed.map_err(|why| DataError::LibSvm { at: self.at(line), why })
    }

    /// Features of a sample, at most.
    fn longest(&self) -> usize {
        self.samples.iter().map(|sample| sample.features.1 - sample.features.0).max().unwrap_or(0)
    }

    /// Takes those out that are held out, by hash of their features.
    fn split(&mut self, key: Key, share: f64) -> Result<File, DataError> {
        let (ids, factors) = (&self.ids, &self.factors);
        let held_out = |Sample { features: (start, end), .. }: &Sample| {
            let features = ids[*start..*end].iter().zip(&factors[*start..*end]);
            let key = features.fold(key, |key, (id, factor)| key.with(*id).with(factor.to_bits() as u64));
            f64::from(key.uniform(0)) < share
        };
        let (test, train): (Vec<Sample>, Vec<Sample>) = self.samples.drain(..).partition(held_out);
        for (samples, what) in [(&train, "train on"), (&test, "test on")] {
            if samples.is_empty() {
                return Err(DataError::Holdout { share, path: self.path.to_string(), what });
            }
        }
        self.samples = train;
        Ok(File { path: self.path.clone(), samples: test, ids: self.ids.clone(), factors: self.factors.clone() })
    }

    fn dataset(&self, fields: usize, classes: Option<&[f64]>) -> Result<Dataset, DataError> {
        let too_large = || DataError::SparseTooLarge { samples: self.samples.len(), fields };
        let (mut values, mut factors) = (Vec::new(), Vec::new());
        let all = self.samples.len().checked_mul(fields).ok_or_else(too_large)?;
        values.try_reserve_exact(all).map_err(|_| too_large())?;
        factors.try_reserve_exact(all).map_err(|_| too_large())?;
        for (end, Sample { features: (from, to), .. }) in (1..).zip(&self.samples) {
            values.extend_from_slice(&self.ids[*from..*to]);
            factors.extend_from_slice(&self.factors[*from..*to]);
            values.resize(end * fields, NO_ID);
            factors.resize(end * fields, 0.0);
        }
        let targets = match classes {
            Some(classes) => {
                let class = |sample: &Sample| {
                    let found = classes.binary_search_by(|class| class.total_cmp(&sample.label));
                    found.map(|class| class as u32).map_err(|_| self.unknown(sample))
                };
                Targets::Class(self.samples.iter().map(class).collect::<Result<_, _>>()?)
            }
            None => Targets::Value(self.samples.iter().map(|sample| sample.label as f32).collect()),
        };
        // A model takes numbers: there is one that says nothing.
        let features = Features::F32(vec![0.0; self.samples.len()]);
        Ok(Dataset { ids: Ids { fields, values, factors }, ..Dataset::new(vec![1], features, targets) })
    }

    fn unknown(&self, sample: &Sample) -> DataError {
        let (column, label) = ("label".into(), sample.label.to_string());
        DataError::UnknownLabel { at: self.at(sample.line), column, label }
    }
}

/// Reads both splits; `fields` are the places for ids of a model that was trained already.
pub(super) fn read(
    files: &Files,
    spec: &job::LibSvm,
    seed: u64,
    fields: Option<usize>,
    on_error: job::OnError,
) -> Result<Raw, DataError> {
    let mut bad = Bad::new(on_error);
    let mut train = File::read(files, spec, &spec.train, fields, &mut bad)?;
    let mut test = match (&spec.test, spec.holdout) {
        (Some(path), _) => Some(File::read(files, spec, path, fields, &mut bad)?),
        (None, Some(share)) => Some(train.split(Key::new(seed, Purpose::Split), share)?),
        (None, None) => None,
    };
    let classes = match spec.task {
        Task::Regression => None,
        Task::Classification => {
            let mut classes: Vec<f64> = train.samples.iter().map(|sample| sample.label).collect();
            classes.sort_by(f64::total_cmp);
            classes.dedup();
            if classes.len() > MOST_VALUES {
                let (path, column, classes) = (train.path.to_string(), "label".into(), classes.len());
                return Err(DataError::TooManyClasses { path, column, classes, most: MOST_VALUES });
            }
            Some(classes)
        }
    };
    if let (Some(test), Some(classes), true) = (&mut test, &classes, bad.skips()) {
        let samples = std::mem::take(&mut test.samples);
        for sample in samples {
            match classes.binary_search_by(|class| class.total_cmp(&sample.label)) {
                Ok(_) => test.samples.push(sample),
                Err(_) => bad.take(test.unknown(&sample))?,
            }
        }
        bad.check()?;
        if test.samples.is_empty() {
            return Err(DataError::Empty { path: test.path.to_string() });
        }
    }
    let longest = train.longest().max(test.as_ref().map_or(0, File::longest)).max(1);
    let fields = fields.unwrap_or(longest);
    let of = |file: &File| file.dataset(fields, classes.as_deref());
    let (train, test) = (of(&train)?, test.as_ref().map(of).transpose()?);
    let names = classes.map(|classes| classes.iter().map(f64::to_string).collect());
    let raw = Raw::new(train, test, names, Scale { per_feature: true, unit: 1.0 });
    Ok(Raw { sparse: Some(Sparse { fields, size: spec.size }), skipped: bad.skipped(), ..raw })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::OnError;
    use proptest::prelude::*;
    use std::io::Write;
    use tempfile::TempDir;

    fn spec() -> job::LibSvm {
        let train = "train.svm".into();
        job::LibSvm { base: String::new(), train, test: None, holdout: None, task: Task::Classification, size: None }
    }

    fn read_as(
        spec: job::LibSvm,
        train: impl AsRef<[u8]>,
        test: Option<&str>,
        fields: Option<usize>,
        on_error: OnError,
    ) -> Result<Raw, DataError> {
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("train.svm"), train).unwrap();
        if let Some(test) = test {
            std::fs::write(dir.path().join("test.svm"), test).unwrap();
        }
        let base = dir.path().display().to_string();
        read(
            &Files::default(),
            &job::LibSvm { base, test: test.map(|_| "test.svm".into()), ..spec },
            7,
            fields,
            on_error,
        )
    }

    fn one(text: &str) -> Result<Raw, DataError> {
        read_as(spec(), text, None, None, OnError::Stop)
    }

    fn says(result: Result<Raw, DataError>, parts: &[&str]) {
        let message = result.err().expect("an error").to_string();
        parts.iter().for_each(|part| assert!(message.contains(part), "{message:?} does not say {part:?}"));
    }

    const LINES: &str =
        "# what is not 0\n+1 3:0.5 7:-2 # the first\n-1 7:1e1 3:0 7:1\n\n1\r\n-1.0 18446744073709551614:4";

    #[test]
    fn features_are_ids_with_values_and_lines_are_filled_up() {
        let raw = one(LINES).unwrap();
        let most = u64::MAX - 1;
        assert_eq!(raw.train.ids.values, [3, 7, 7, 7, NO_ID, NO_ID, most, NO_ID]);
        assert_eq!(raw.train.ids.factors, [0.5, -2.0, 10.0, 1.0, 0.0, 0.0, 4.0, 0.0]);
        assert_eq!(
            (raw.train.targets, raw.classes.unwrap()),
            (Targets::Class(vec![1, 0, 1, 0]), vec!["-1".into(), "1".into()])
        );
        assert_eq!((raw.train.shape, raw.train.features), (vec![1], Features::F32(vec![0.0; 4])));
        assert_eq!(raw.sparse, Some(Sparse { fields: 2, size: None }));
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(LINES.as_bytes()).unwrap();
        let packed = read_as(spec(), packed.finish().unwrap(), None, None, OnError::Stop).unwrap();
        assert_eq!(packed.train.ids, raw.train.ids);
    }

    #[test]
    fn labels_are_values_or_classes_in_the_order_of_numbers() {
        let regression = job::LibSvm { task: Task::Regression, ..spec() };
        let raw = read_as(regression, "1.5 1:1\n-2e3 1:1\n", None, None, OnError::Stop).unwrap();
        assert_eq!((raw.train.targets, raw.classes), (Targets::Value(vec![1.5, -2000.0]), None));
        let raw = one("10 1:1\n9 1:1\n-0 1:1\n0.0 2:1\n").unwrap();
        assert_eq!(
            (raw.train.targets, raw.classes.unwrap()),
            (Targets::Class(vec![2, 1, 0, 0]), ["0", "9", "10"].map(String::from).to_vec())
        );
    }

    #[test]
    fn the_longer_of_both_files_says_how_many_places_there_are() {
        let raw = read_as(spec(), "1 1:1\n2 2:1\n", Some("1 4:1 5:1 6:1\n"), None, OnError::Stop).unwrap();
        assert_eq!(raw.sparse.unwrap().fields, 3);
        assert_eq!(raw.train.ids.values, [1, NO_ID, NO_ID, 2, NO_ID, NO_ID]);
        assert_eq!(raw.test.unwrap().ids.values, [4, 5, 6]);
        // A model that was trained already has its own number.
        let raw = read_as(spec(), "1 1:1\n2 2:1\n", None, Some(2), OnError::Stop).unwrap();
        assert_eq!(raw.train.ids.values, [1, NO_ID, 2, NO_ID]);
        says(
            read_as(spec(), "1 1:1\n2 2:1 3:1 4:1\n", None, Some(2), OnError::Stop),
            &["train.svm:2: there are 3 features", "at most 2"],
        );
    }

    #[test]
    fn wrong_lines_are_named_with_what_is_wrong() {
        for (line, parts) in [
            ("1:1 2:1", &["no label", "label feature:value"][..]),
            ("yes 1:1", &["the label is `yes`", "not a finite number"]),
            ("1,2 1:1", &["the label is `1,2`", "one label a line"]),
            ("nan 1:1", &["the label is `nan`"]),
            ("1 qid:3 1:1", &["`qid:3` names a query", "take the qid fields out"]),
            ("1 1", &["`1` is not `feature:value`"]),
            ("1 a:1", &["`a:1` is not `feature:value`"]),
            ("1 -1:1", &["`-1:1` is not `feature:value`"]),
            ("1 18446744073709551615:1", &["is not `feature:value`", "below 2^64 - 1"]),
            ("1 2:x", &["feature 2 has the value `x`", "not a finite number"]),
            ("1 2:1e99", &["feature 2 has the value `1e99`"]),
            ("1 2:", &["feature 2 has the value ``"]),
        ] {
            says(one(&format!("1 1:1\n\n{line}\n")), &[&["train.svm:3: "], parts].concat());
        }
        let sized = |size| job::LibSvm { size: Some(size), ..spec() };
        says(read_as(sized(6), LINES, None, None, OnError::Stop), &["train.svm:2: feature 7 is above data.size = 6"]);
        read_as(sized(7), "1 0:1 7:1\n2 1:1\n", None, None, OnError::Stop).unwrap();
        says(one("# nothing\n\n"), &["train.svm", "no samples"]);
        says(read_as(spec(), b"1 1:1\n1 \xff:1\n", None, None, OnError::Stop), &["train.svm:2", "UTF-8"]);
        says(
            read_as(spec(), "1 1:1\n", Some("2 1:1\n"), None, OnError::Stop),
            &["test.svm:1", "`label` is `2`", "training set does not have"],
        );
        let many: String = (0..=MOST_VALUES).map(|i| format!("{i}.5 1:1\n")).collect();
        says(one(&many), &["`label`", "10001", "regression"]);
    }

    proptest! {
        #[test]
        fn lines_that_are_left_out_might_as_well_not_be_there(
            good in prop::collection::vec((0u8..3, prop::collection::vec((0u64..9, -9i32..9), 0..4)), 8..30),
            bad in prop::collection::vec((any::<prop::sample::Index>(), 0usize..5), 1..6), holdout in any::<bool>(),
        ) {
            let line = |(label, features): &(u8, Vec<(u64, i32)>)| {
                features.iter().fold(label.to_string(), |line, (id, value)| format!("{line} {id}:{value}")) + "\n"
            };
            let mistakes = ["1 1:1 2:1 3:1 4:1 5:1 x", "7 100:1 1:x", "9 qid:1", "many 1:1", "1:1 2:3"];
            let clean: String = good.iter().map(line).collect();
            let mut dirty: Vec<String> = good.iter().map(line).collect();
            for (at, kind) in &bad {
                dirty.insert(at.index(dirty.len()), format!("{}\n", mistakes[*kind]));
            }
            let spec = job::LibSvm { holdout: holdout.then_some(0.4), ..spec() };
            let test = (!holdout).then_some("0 1:1\n7 100:2\n1 2:x\n1 3:1\n");
            let skip = |most| OnError::Skip { most };
            let want = read_as(spec.clone(), clean, test.map(|_| "0 1:1\n1 3:1\n"), None, OnError::Stop);
            prop_assume!(want.is_ok());
            let want = want.unwrap();
            let left_out = bad.len() + if holdout { 0 } else { 2 };
            let got = read_as(spec.clone(), dirty.concat(), test, None, skip(left_out)).unwrap();
            prop_assert_eq!((got.train, got.test, got.classes, got.sparse), (want.train, want.test, want.classes, want.sparse));
            prop_assert_eq!(got.skipped.unwrap().samples, left_out);
            says(read_as(spec, dirty.concat(), test, None, skip(left_out - 1)), &["data.max_errors"]);
        }

        #[test]
        fn equal_features_are_held_out_together(samples in prop::collection::vec((0u64..40, 0u8..2), 60..120), share in 0.2f64..0.8) {
            let text: String = samples.iter().map(|(id, label)| format!("{label} {id}:1 1000:{id}\n")).collect();
            let raw = read_as(job::LibSvm { holdout: Some(share), ..spec() }, text, None, None, OnError::Stop);
            prop_assume!(raw.is_ok());
            let raw = raw.unwrap();
            let ids = |set: &Dataset| set.ids.values.chunks(2).map(|ids| ids[0]).collect::<Vec<_>>();
            let (train, test) = (ids(&raw.train), ids(&raw.test.unwrap()));
            // Feature 0 has no value of its own, so its sample has one feature fewer.
            prop_assert!(train.iter().filter(|id| **id != 0).all(|id| !test.contains(id)));
            prop_assert_eq!(train.len() + test.len(), samples.len());
        }

        #[test]
        fn no_line_panics(line in "[0-9a-z:#. \\-+\n]{0,60}") {
            let _ = one(&line);
            let _ = read_as(spec(), line, None, None, OnError::Skip { most: 9 });
        }
    }
}
