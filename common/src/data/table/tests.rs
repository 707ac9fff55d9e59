use super::plan::MOST_VALUES;
use super::*;
use crate::data::{Batch, Dataset, Features, Opened, Prepared, Targets};
use crate::job::Task;
use crate::rows::NO_ID;
use proptest::prelude::*;
use std::collections::HashMap;
use std::io;
use tempfile::TempDir;

const TABLE: &str = "age, city, height, kind\n10, Rom, 1.5, yes.\n?, Oslo, 2.5, no\n20, ?, 3.5, yes\n30, Oslo,, no.\n";

pub(super) fn csv(columns: Option<Vec<String>>, header: bool, separator: char) -> Form {
    Form::Csv { columns, header, separator, quoting: true }
}

pub(super) fn spec() -> job::Table {
    job::Table {
        base: String::new(),
        train: "train.csv".into(),
        test: None,
        form: csv(None, true, ','),
        target: "kind".into(),
        weight: None,
        categorical: vec!["city".into()],
        ids: vec![],
        log: vec![],
        ignore: vec![],
        missing: "?".into(),
        task: Task::Classification,
        holdout: None,
        holdout_by: vec![],
        text: None,
    }
}

/// Reads a table, and a test table where there is one.
fn both(spec: job::Table, train: impl AsRef<[u8]>, test: Option<&str>) -> Result<Raw, DataError> {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("train.csv"), train).unwrap();
    if let Some(test) = test {
        std::fs::write(dir.path().join("test.csv"), test).unwrap();
    }
    let base = dir.path().display().to_string();
    read(
        &Files::default(),
        &job::Table { base, test: test.map(|_| "test.csv".into()), ..spec },
        7,
        None,
        job::OnError::Stop,
    )
}

fn one(spec: job::Table, train: impl AsRef<[u8]>) -> Result<Raw, DataError> {
    both(spec, train, None)
}

fn features(set: &Dataset) -> &[f32] {
    let Features::F32(x) = &set.features else { panic!() };
    x
}

pub(super) fn says(result: Result<Raw, DataError>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

#[test]
fn categories_are_one_hot_and_missing_cells_are_filled() {
    let raw = one(spec(), TABLE).unwrap();
    // age (mean of 10, 20, 30), Oslo, Rom, height (mean of 1.5, 2.5, 3.5): the order of the file.
    let want = [10.0, 0.0, 1.0, 1.5, 20.0, 1.0, 0.0, 2.5, 20.0, 0.0, 0.0, 3.5, 30.0, 1.0, 0.0, 2.5];
    assert_eq!(features(&raw.train), want);
    assert_eq!(raw.train.shape, [4]);
    assert_eq!(raw.classes.unwrap(), ["no", "yes"]);
    assert_eq!(raw.train.targets, Targets::Class(vec![1, 0, 1, 0]));
    assert_eq!(raw.columns[1].values.as_ref().unwrap(), &["Oslo", "Rom"]);
}

#[test]
fn the_test_set_is_encoded_as_the_training_set() {
    let test = "age,city,height,kind\n,Paris,0,no.\n7,Rom,?,yes\n";
    let raw = both(spec(), TABLE, Some(test)).unwrap();
    let test = raw.test.unwrap();
    assert_eq!(features(&test), [20.0, 0.0, 0.0, 0.0, 7.0, 0.0, 1.0, 2.5]);
    assert_eq!(test.targets, Targets::Class(vec![0, 1]));
}

#[test]
fn names_separators_line_ends_and_packing_do_not_matter() {
    let want = one(spec(), TABLE).unwrap().train;
    let columns = Some(["age", "city", "height", "kind"].map(String::from).to_vec());
    let headless = TABLE.split_once('\n').unwrap().1;
    assert_eq!(one(job::Table { form: csv(columns.clone(), false, ','), ..spec() }, headless).unwrap().train, want);
    let renamed = TABLE.replacen("age", "years", 1);
    assert_eq!(one(job::Table { form: csv(columns, true, ','), ..spec() }, renamed).unwrap().train, want);
    let tabs = TABLE.replace(',', "\t");
    assert_eq!(one(job::Table { form: csv(None, true, '\t'), ..spec() }, tabs).unwrap().train, want);
    let windows = format!("\u{feff}{}", TABLE.replace('\n', "\r\n\r\n  \r\n"));
    assert_eq!(one(spec(), windows).unwrap().train, want);
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    io::Write::write_all(&mut packed, TABLE.as_bytes()).unwrap();
    assert_eq!(one(spec(), packed.finish().unwrap()).unwrap().train, want);
}

#[test]
fn a_quote_that_nothing_closes_is_its_lines_mistake() {
    let single = "age,city,kind\n1,\"Ro\"\"m\",yes\n\n2,\"Oslo,no\n3,Oslo,no\n4,Rom,yes";
    let here = || job::Table { categorical: vec!["city".into()], ..spec() };
    says(one(here(), single), &["train.csv:4:", "quote", "data.quoting = false"]);
    let skip = job::OnError::Skip { most: 1 };
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("train.csv"), single).unwrap();
    let base = dir.path().display().to_string();
    let raw = read(&Files::default(), &job::Table { base, ..here() }, 7, None, skip).unwrap();
    assert_eq!((raw.train.samples(), raw.skipped.unwrap().samples), (3, 1));
    assert_eq!(raw.columns[1].values.as_ref().unwrap(), &["Oslo", "Ro\"m", "Rom"]);
    let plain =
        job::Table { form: Form::Csv { columns: None, header: true, separator: ',', quoting: false }, ..here() };
    let raw = one(plain, single).unwrap();
    assert_eq!(raw.columns[1].values.as_ref().unwrap(), &["\"Oslo", "\"Ro\"\"m\"", "Oslo", "Rom"]);
    says(one(here(), "age,\"city,kind\n1,Rom,yes\n"), &["train.csv:1:", "quote"]);
}

#[test]
fn a_column_says_how_much_samples_count() {
    let weighed = || job::Table { weight: Some("height".into()), ..spec() };
    let table = TABLE.replace("Oslo,,", "Oslo, 0,");
    let raw = one(weighed(), &table).unwrap();
    assert_eq!(raw.train.weights, [1.5, 2.5, 3.5, 0.0]);
    // It is not learnt from.
    assert_eq!(raw.train.shape, [3]);
    assert_eq!(
        features(&raw.train),
        features(&one(job::Table { ignore: vec!["height".into()], ..spec() }, TABLE).unwrap().train)
    );
    let Opened { train, prepared, .. } = raw.prepare(true);
    assert!(prepared.check_samples(&train).is_ok());
    let without = Dataset { weights: Vec::new(), ..(*train).clone() };
    assert!(prepared.check_samples(&without).unwrap_err().to_string().contains("weights"));
    for cell in ["-1", "many", "", "inf", "?", "1e-40"] {
        let table = TABLE.replace("Oslo,,", &format!("Oslo, {cell},"));
        says(
            one(weighed(), table),
            &["train.csv:5", "`height` (data.weight)", &format!("`{cell}`"), "no weight (0, or"],
        );
    }
    let nothing = "age, city, height, kind\n10, Rom, 0, yes\n20, Rom, 0, no\n";
    says(one(weighed(), nothing), &["all weights", "`height`", "train.csv", "train on", "are 0"]);
    for (weight, word) in [("kind", "data.target"), ("city", "in another list"), ("hight", "nearest is `height`")] {
        let wrong = job::Table { weight: Some(weight.into()), ..spec() };
        says(one(wrong, &table), &[&format!("`{weight}`"), "data.weight", word]);
    }
}

#[test]
fn ignored_columns_may_hold_anything() {
    let raw = one(job::Table { ignore: vec!["height".into()], ..spec() }, TABLE.replace("1.5", "tall")).unwrap();
    assert_eq!(raw.train.shape, [3]);
}

#[test]
fn regression_reads_values() {
    let spec = job::Table {
        target: "height".into(),
        task: Task::Regression,
        categorical: vec!["city".into(), "kind".into()],
        ..spec()
    };
    let raw = one(spec.clone(), TABLE.replace("Oslo,,", "Oslo,-4e1,")).unwrap();
    assert_eq!(raw.train.targets, Targets::Value(vec![1.5, 2.5, 3.5, -40.0]));
    assert!(raw.classes.is_none());
    says(one(spec.clone(), TABLE), &["train.csv:5", "target `height` is missing"]);
    says(
        one(spec, TABLE.replace("Oslo,,", "Oslo,1,").replace("1.5", "tall")),
        &["train.csv:2", "`height`", "`tall`", "data.task"],
    );
}

#[test]
fn wrong_cells_are_named_with_file_line_and_column() {
    for cell in ["old", "NaN", "inf", "1e99", "1 0"] {
        says(one(spec(), TABLE.replace("20,", &format!("{cell},"))), &["train.csv:4:", "`age`", &format!("`{cell}`")]);
    }
    says(one(spec(), TABLE.replace("3.5, yes", "3.5")), &["train.csv:4: 3 cells", "4 columns"]);
    says(one(spec(), TABLE.replace("3.5, yes", "3.5, yes, 1")), &["train.csv:4: 5 cells", "4 columns"]);
    says(one(spec(), TABLE.replace("3.5, yes", "3.5, ?")), &["train.csv:4: target `kind` is missing"]);
    says(one(spec(), TABLE.replace("3.5, yes", "3.5,")), &["train.csv:4: target `kind` is missing"]);
    let test = "age,city,height,kind\n1,Rom,1,maybe\n";
    says(both(spec(), TABLE, Some(test)), &["test.csv:2", "`kind` is `maybe`", "training set does not have"]);
    says(both(spec(), TABLE, Some(&test.replace(",1,", ",x,"))), &["test.csv:2", "`height`", "`x`"]);
}

#[test]
fn lines_are_counted_past_blank_lines_and_quoted_line_ends() {
    for end in ["\n", "\r\n", "\n\n", "\r\n\r\n"] {
        let text = ["age,city,height,kind", "1,\"a\nb\",1,yes", "2,c,2,no", "x,c,2,no"].join(end);
        let line = 2 + text.split("\nx").next().unwrap().matches('\n').count();
        says(one(spec(), &text), &[&format!("train.csv:{line}:"), "`x`"]);
    }
}

#[test]
fn wrong_columns_are_named() {
    says(one(job::Table { target: "knd".into(), ..spec() }, TABLE), &["data.target", "`knd`", "nearest is `kind`"]);
    says(
        one(job::Table { categorical: vec!["town".into()], ..spec() }, TABLE),
        &["data.categorical", "`town`", "train.csv"],
    );
    says(one(job::Table { ignore: vec!["hight".into()], ..spec() }, TABLE), &["data.ignore", "nearest is `height`"]);
    says(
        one(job::Table { ignore: vec!["kind".into()], ..spec() }, TABLE),
        &["`kind` is data.target and in data.ignore"],
    );
    let all = ["age", "city", "height"].map(String::from).to_vec();
    says(one(job::Table { ignore: all, ..spec() }, TABLE), &["no columns left"]);
    says(one(job::Table { form: csv(None, false, ','), ..spec() }, TABLE), &["data.header", "data.columns"]);
    says(one(spec(), TABLE.replacen("age", "city", 1)), &["two columns `city`"]);
    says(
        both(spec(), TABLE, Some("age,height,city,kind\n1,1,Rom,no\n")),
        &["test.csv", "age,height,city,kind", "same order"],
    );
    says(
        one(job::Table { categorical: vec![], ..spec() }, TABLE),
        &["train.csv:2", "`city`", "`Rom`", "data.categorical"],
    );
    says(one(spec(), "age,city,height,kind\n?,Rom,1,no\n"), &["`age`", "missing in every line"]);
    says(one(spec(), "age,city,height,kind\n1,?,1,no\n"), &["`city`", "missing in every line"]);
    let many: String = (0..=MOST_VALUES).map(|i| format!("1,c,1,{i}.5\n")).collect();
    says(one(spec(), format!("age,city,height,kind\n{many}")), &["`kind`", "10001 different values", "regression"]);
    let many: String = (0..=MOST_VALUES).map(|i| format!("1,c{i},1,no\n")).collect();
    says(one(spec(), format!("age,city,height,kind\n{many}")), &["`city`", "10001 different values", "10000"]);
}

#[test]
fn wrong_files_are_named() {
    says(one(spec(), ""), &["train.csv", "no samples"]);
    says(one(spec(), "age,city,height,kind\n"), &["train.csv", "no samples"]);
    says(one(spec(), b"age,city,height,kind\n1,Troms\xf8,1,no\n"), &["train.csv:2", "UTF-8"]);
    says(one(job::Table { form: csv(None, true, '·'), ..spec() }, TABLE), &["data.separator", "'·'"]);
    says(one(job::Table { train: "other.csv".into(), ..spec() }, TABLE), &["other.csv", "UNISONO_DATA"]);
}

#[test]
fn new_rows_are_encoded_as_training_rows() {
    let Opened { train, prepared, .. } = one(spec(), TABLE).unwrap().prepare(true);
    // The preparation is kept in checkpoints.
    let prepared: Prepared = serde_json::from_str(&serde_json::to_string(&prepared).unwrap()).unwrap();
    let mut cells = HashMap::from([("age", " ?"), ("city", "Oslo "), ("height", "2.5")]);
    assert_eq!(encode(&prepared, |c| cells.get(c).copied()).unwrap(), features(&train)[4..8]);
    cells.insert("height", "tall");
    let wrong = encode(&prepared, |c| cells.get(c).copied()).unwrap_err().to_string();
    assert!(wrong.contains("`height` is `tall`"), "{wrong}");
    cells.remove("height");
    let absent = encode(&prepared, |c| cells.get(c).copied()).unwrap_err().to_string();
    assert!(absent.contains("`height` is not given"), "{absent}");
}

#[test]
fn every_feature_is_normalised() {
    let Opened { train, prepared, .. } = one(spec(), TABLE).unwrap().prepare(true);
    let mut batch = Batch::empty();
    batch.fill(&train, &prepared, 0..4, None, true);
    for f in 0..4 {
        let column = || batch.inputs.iter().skip(f).step_by(4).map(|&x| x as f64);
        let (mean, square) = (column().sum::<f64>() / 4.0, column().map(|x| x * x).sum::<f64>() / 4.0);
        assert!(mean.abs() < 1e-6 && (square - 1.0).abs() < 1e-6, "{mean} {square}");
    }
}

const IDS: &str = "age,site,user,city,kind\n10,a,0,Rom,yes\n20,b,2,Oslo,no\n30, a ,?,Rom,yes\n40,,1,Rom,no\n";

pub(super) fn id(columns: &[&str], size: Option<u64>) -> job::Id {
    job::Id { columns: columns.iter().map(|column| column.to_string()).collect(), size }
}

/// A spec whose columns `ids` are ids, and no others categories.
fn of_ids(ids: Vec<job::Id>) -> job::Table {
    job::Table { categorical: vec![], ids, ..spec() }
}

/// Hashed, declared, crossed, and declared behind that.
fn every_kind() -> job::Table {
    of_ids(vec![id(&["site"], None), id(&["user"], Some(3)), id(&["site", "city"], None), id(&["age"], Some(50))])
}

#[test]
fn ids_are_declared_hashed_or_crossed_and_missing_cells_have_none() {
    let Raw { train, ids, .. } = one(every_kind(), IDS).unwrap();
    assert_eq!((train.ids.fields, ids.iter().map(|field| field.first).collect::<Vec<_>>()), (4, vec![0, 0, 0, 3]));
    let column = |i: usize| (0..4).map(|sample| train.ids.of(sample)[i]).collect::<Vec<_>>();
    // Those of declared sizes follow one another.
    assert_eq!((column(1), column(3)), (vec![0, 2, NO_ID, 1], vec![13, 23, 33, 43]));
    for hashed in [column(0), column(2)] {
        assert!(hashed[0] == hashed[2] && hashed[0] != hashed[1] && hashed[3] == NO_ID, "{hashed:?}");
        assert!(!hashed[..2].contains(&NO_ID));
    }
    assert_ne!(column(0)[0], column(2)[0]);
    // No numbers are left, so there is one that says nothing.
    assert_eq!((train.shape, train.features), (vec![1], Features::F32(vec![0.0; 4])));
    let some = one(of_ids(vec![id(&["site"], None), id(&["user"], None), id(&["city"], None)]), IDS).unwrap();
    assert_eq!((some.train.shape, some.train.features), (vec![1], Features::F32(vec![10.0, 20.0, 30.0, 40.0])));
}

#[test]
fn a_hash_is_of_a_columns_name_and_text_alone() {
    let hashes = |columns: &[&str], table: &str| {
        let others = table.lines().next().unwrap().split(',').filter(|name| *name != "kind" && !columns.contains(name));
        let ignore = others.map(String::from).collect();
        one(job::Table { ignore, ..of_ids(vec![id(columns, None)]) }, table).unwrap().train.ids.values
    };
    for columns in [&["site"][..], &["site", "city"]] {
        let all = hashes(columns, IDS);
        for (line, want) in IDS.lines().skip(1).zip(&all).take(2) {
            // Alone, and in a file with other columns in another order.
            let cells: Vec<&str> = line.split(',').collect();
            let [age, site, user, city, kind] = cells[..] else { panic!("five cells") };
            assert_eq!(hashes(columns, &format!("age,site,user,city,kind\n{line}\n")), [*want]);
            let turned = format!("kind,more,city,site,age\n{kind},{user},{city},{site},{age}\n");
            assert_eq!(hashes(columns, &turned), [*want]);
        }
    }
    // Neither another column's text, nor texts that only together are the same.
    let table = "a,b,kind\nx,x,no\n";
    assert_ne!(hashes(&["a"], &table.replace('b', "c")), hashes(&["b"], &table.replace('a', "c")));
    let cut = |a: &str, b: &str| hashes(&["a", "b"], &format!("a,b,kind\n{a},{b},no\n"));
    assert_ne!(cut("xy", "z"), cut("x", "yz"));
}

#[test]
fn ids_that_were_not_declared_are_named_with_file_line_and_column() {
    for cell in ["3", "-1", "x", "1.0", "18446744073709551616"] {
        let line = format!("20,b,{cell},Oslo");
        let words = ["train.csv:3:", "`user`", &format!("`{cell}`"), "below 3", "data.ids"];
        says(one(every_kind(), IDS.replace("20,b,2,Oslo", &line)), &words);
    }
    let test = "age,site,user,city,kind\n1,never seen,0,Rom,no\n50,a,0,Rom,no\n";
    says(both(every_kind(), IDS, Some(test)), &["test.csv:3:", "`age`", "`50`", "below 50"]);
    let with = |ids| job::Table { ignore: vec!["age".into()], categorical: vec!["city".into()], ..of_ids(ids) };
    for (columns, words) in [
        (&["sit"][..], &["data.ids", "`sit`", "nearest is `site`"][..]),
        (&["kind"], &["`kind`", "in data.ids and data.target"]),
        (&["site", "age"], &["`age`", "in data.ids and in data.ignore"]),
        (&["city"], &["`city`", "in data.ids and in data.categorical"]),
    ] {
        says(one(with(vec![id(columns, None)]), IDS), words);
    }
}

#[test]
fn logarithms_are_taken_on_both_sides_of_0_before_the_mean() {
    let spec = job::Table { categorical: vec![], log: vec!["age".into()], ..spec() };
    let raw = one(spec.clone(), "age,high,kind\n0,1,no\n-1.5,2,no\n?,3,no\n1e6,4,yes\n").unwrap();
    let (small, large) = (-(2.5f64.ln()), 1_000_001f64.ln());
    let want = [0.0, 1.0, small, 2.0, (small + large) / 3.0, 3.0, large, 4.0];
    let got = features(&raw.train);
    assert!(got.len() == 8 && got.iter().zip(want).all(|(got, want)| (*got as f64 - want).abs() < 1e-5), "{got:?}");
    let Opened { train, prepared, .. } = raw.prepare(false);
    let cells = HashMap::from([("age", "-1.5"), ("high", "2")]);
    assert_eq!(encode(&prepared, |c| cells.get(c).copied()).unwrap(), features(&train)[2..4]);
    for (log, ids) in [("kind", vec![]), ("age", vec![id(&["age"], None)])] {
        says(
            one(job::Table { log: vec![log.into()], ids, ..spec.clone() }, "age,high,kind\n0,1,no\n"),
            &["data.log", &format!("`{log}`"), "take it out"],
        );
    }
}

#[test]
fn new_rows_have_the_ids_of_training_rows() {
    let Opened { train, prepared, .. } = one(every_kind(), IDS).unwrap().prepare(true);
    let prepared: Prepared = serde_json::from_str(&serde_json::to_string(&prepared).unwrap()).unwrap();
    let names: Vec<&str> = IDS.lines().next().unwrap().split(',').collect();
    for (sample, line) in IDS.lines().skip(1).enumerate() {
        let cells: HashMap<&str, &str> = names.iter().copied().zip(line.split(',')).collect();
        let cell = |name: &str| cells.get(name).copied();
        assert_eq!(encode_ids(&prepared, cell).unwrap(), train.ids.of(sample));
        assert_eq!(encode(&prepared, cell).unwrap(), [0.0]);
    }
    let says = |user: Option<&str>, words: &[&str]| {
        let cells: HashMap<&str, &str> =
            [("site", "a"), ("city", "Rom"), ("age", "1")].into_iter().chain(user.map(|user| ("user", user))).collect();
        let message = encode_ids(&prepared, |name| cells.get(name).copied()).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    };
    says(Some("3"), &["`user` is `3`", "below 3"]);
    says(None, &["`user` is not given"]);
}

/// The text column `x` of a table.
fn texts(train: &str, test: Option<&str>, change: impl Fn(&mut job::Table)) -> Result<Raw, DataError> {
    let tokenizer = job::Tokenizer::Words { most: 9, ngrams: 1, buckets: 1 };
    let text = job::TextColumn { column: "x".into(), tokenizer, context: 4, truncate: false };
    let mut spec = job::Table { categorical: vec![], text: Some(text), ..spec() };
    change(&mut spec);
    both(spec, train, test)
}

#[test]
fn texts_become_tokens_that_are_filled_up() {
    let raw = texts("id,x,kind\n1,b a a,ham\n2,\"A, c\",spam\n", Some("id,x,kind\n3,new a,ham\n"), |_| {}).unwrap();
    // By how often they come, then by letters: a, ",", b, c; and 1 more for each, as 0 is none.
    assert_eq!(raw.train.features, Features::U32(vec![3, 1, 1, 0, 1, 2, 4, 0]));
    assert_eq!((raw.train.targets, raw.train.shape), (Targets::Class(vec![0, 1]), vec![4]));
    assert_eq!(raw.test.unwrap().features, Features::U32(vec![5, 1, 0, 0]));
    assert_eq!(raw.tokens.unwrap().vocabulary, 6);
}

#[test]
fn texts_that_cannot_be_taken_are_named_with_their_line() {
    let says = |raw: Result<Raw, DataError>, part: &str| {
        let message = raw.map(|_| ()).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    };
    let long = "x,kind\na b,ham\na b c d e,spam\n";
    says(texts(long, None, |_| {}), "train.csv:3");
    says(texts(long, None, |_| {}), "has 5 tokens, more than data.context = 4");
    let cut = texts(long, None, |spec| spec.text.as_mut().unwrap().truncate = true).unwrap();
    assert_eq!(cut.train.samples(), 2);
    says(texts("x,kind\n ,ham\n", None, |_| {}), "train.csv:2: the text of column `x` is empty");
    says(texts("y,kind\na,ham\n", None, |_| {}), "data.text names the column `x`");
    says(texts("x,kind\na,b\n", None, |spec| spec.target = "x".into()), "data.target and data.text");
    let characters = |spec: &mut job::Table| spec.text.as_mut().unwrap().tokenizer = job::Tokenizer::Characters;
    says(
        texts("x,kind\na,b\n", Some("x,kind\nz,b\n"), characters),
        "test.csv:2: the text of column `x` has the character 'z'",
    );
    says(texts("x,kind\na,b\n", None, |spec| spec.holdout = Some(1e-9)), "data.holdout");
}

proptest! {
    #[test]
    fn a_share_is_held_out_by_what_the_lines_say(
        cells in prop::collection::vec((0u32..40, 0u32..2), 60..120), share in 0.2f64..0.8,
    ) {
        let line = |(i, (x, kind)): (usize, &(u32, u32))| format!("{i},{x},{kind}\n");
        let table = format!("id,x,kind\n{}", cells.iter().enumerate().map(line).collect::<String>());
        let ignore = vec!["id".into()];
        let spec = job::Table { categorical: vec![], ignore, task: Task::Regression, holdout: Some(share), ..spec() };
        let raw = both(spec, &table, None).unwrap();
        let values = |set: &Dataset| match &set.features {
            Features::F32(x) => x.iter().map(|x| *x as u32).collect::<Vec<_>>(),
            _ => panic!("numbers"),
        };
        let (train, test) = (values(&raw.train), values(raw.test.as_ref().unwrap()));
        // Equal samples, whatever their targets, are on one side.
        prop_assert!(train.iter().all(|x| !test.contains(x)));
        let mut all = [train, test].concat();
        all.sort();
        let mut want: Vec<u32> = cells.iter().map(|c| c.0).collect();
        want.sort();
        prop_assert_eq!(all, want);
        // By a key: all of its rows are on one side, whatever they hold, and whether it is learnt from or not.
        let keyed = cells.iter().enumerate().map(|(i, (x, kind))| format!("{},{i},{kind}\n", 100 + x));
        let keyed = format!("key,x,kind\n{}", keyed.collect::<String>());
        for ignore in [vec![], vec!["key".into()]] {
            let by = job::Table { ignore, holdout_by: vec!["key".into()], ..self::spec() };
            let by = job::Table { categorical: vec![], task: Task::Regression, holdout: Some(share), ..by };
            let raw = both(by, &keyed, None).unwrap();
            let keys = |set: &Dataset| -> BTreeSet<u32> {
                let own = values(set).into_iter().skip(set.shape[0] - 1).step_by(set.shape[0]);
                own.map(|i| cells[i as usize].0).collect()
            };
            let (train, test) = (&raw.train, raw.test.as_ref().unwrap());
            prop_assert_eq!(train.samples() + test.samples(), cells.len());
            prop_assert!(keys(train).is_disjoint(&keys(test)));
        }
    }
}

#[test]
fn a_key_that_is_no_column_is_named() {
    let by = job::Table { holdout: Some(0.5), holdout_by: vec!["agee".into()], ..spec() };
    says(one(by, TABLE), &["data.holdout_by", "`agee`", "nearest is `age`"]);
}

proptest! {
    #[test]
    fn no_text_panics(text in "[a-z0-9,\" \n\r?é.-]{0,120}", header in any::<bool>()) {
        let columns = ["a", "b"].map(String::from).to_vec();
        let spec = job::Table { form: csv(Some(columns), header, ','), target: "b".into(), categorical: vec!["a".into()], ..spec() };
        if let Ok(raw) = one(spec, text) {
            prop_assert_eq!(features(&raw.train).len(), raw.train.samples() * raw.train.sample_len());
        }
    }
}

#[test]
fn adult_has_its_known_shape() {
    let Some(root) = std::env::var_os("UNISONO_DATA") else {
        eprintln!("skipped: UNISONO_DATA is not set");
        return;
    };
    let names = "age workclass fnlwgt education education-num marital-status occupation relationship race sex \
                 capital-gain capital-loss hours-per-week native-country income";
    let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
    let spec = job::Table {
        train: "adult/adult-train.csv".into(),
        test: Some("adult/adult-test.csv".into()),
        form: csv(Some(words(names)), false, ','),
        target: "income".into(),
        categorical: words("workclass education marital-status occupation relationship race sex native-country"),
        ..spec()
    };
    let raw = read(&Files::of(root.as_ref()), &spec, 7, None, job::OnError::Stop).unwrap();
    assert_eq!((raw.train.samples(), raw.test.unwrap().samples()), (32_561, 16_281));
    assert_eq!(raw.classes.unwrap(), ["<=50K", ">50K"]);
    // Six numbers, and 8 + 16 + 7 + 14 + 6 + 5 + 2 + 41 categories ("?" is none).
    assert_eq!(raw.train.shape, [105]);
}
