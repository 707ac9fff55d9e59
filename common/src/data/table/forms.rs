//! What all forms of a table have in common, and what is wrong with each.

use super::tests::{csv, id, says, spec};
use super::*;
use crate::data::{Features, Targets};
use crate::job::{OnError, Task};
use proptest::prelude::*;
use tempfile::TempDir;

const SKIP: OnError = OnError::Skip { most: 1000 };

/// Reads a table from files with these contents.
fn read_as(
    spec: job::Table,
    train: impl AsRef<[u8]>,
    test: Option<&[u8]>,
    on_error: OnError,
) -> Result<Raw, DataError> {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("train"), train).unwrap();
    if let Some(test) = test {
        std::fs::write(dir.path().join("test"), test).unwrap();
    }
    let (base, name) = (dir.path().display().to_string(), test.map(|_| "test".into()));
    read(&Files::default(), &job::Table { base, train: "train".into(), test: name, ..spec }, 7, None, on_error)
}

/// One of JSON lines with the columns `x`, `s`, `u` and `kind`: a number, a category, an id and the target.
fn json_spec() -> job::Table {
    let ids = vec![id(&["u"], Some(5)), id(&["u", "s"], None)];
    job::Table { form: Form::JsonLines, categorical: vec![], log: vec!["x".into()], ids, ..spec() }
}

fn json(lines: &str) -> Result<Raw, DataError> {
    read_as(json_spec(), lines, None, OnError::Stop)
}

/// All that is learnt and read.
fn parts(raw: Raw) -> impl PartialEq + std::fmt::Debug {
    (raw.train, raw.test, raw.classes, raw.columns, raw.ids, raw.missing)
}

/// A row: a number, a text, an id, a truth, and a class; `None` is missing.
type Cells = (Option<f64>, Option<String>, Option<u64>, bool, bool);

fn rows() -> impl Strategy<Value = Vec<Cells>> {
    let number = prop_oneof![-1e6f64..1e6, (-9i32..9).prop_map(f64::from)];
    let text = "[ a-c\"',é{]{1,3}".prop_map(|text: String| text.trim().to_string());
    use prop::option::weighted;
    let row = (weighted(0.8, number), weighted(0.8, text), weighted(0.8, 0u64..5), any::<bool>(), any::<bool>());
    let first = (Just(Some(1.5)), Just(Some("b".to_string())), Just(Some(1)), Just(true), Just(true));
    // The first rows hold something of everything, in both parts of most.
    (prop::collection::vec(row, 20..60), first).prop_map(|(rows, first)| [vec![first], rows].concat())
}

const NAMES: [&str; 5] = ["x", "s", "u", "t", "kind"];

/// A line of CSV.
fn csv_line((x, s, u, t, kind): &Cells) -> String {
    let s = s.as_ref().map_or(String::new(), |s| format!("\"{}\"", s.replace('"', "\"\"")));
    let (x, u) = (x.map_or(String::new(), |x| x.to_string()), u.map_or(String::new(), |u| u.to_string()));
    format!("{x},{s},{u},{t},{}\n", if *kind { "yes" } else { "no" })
}

/// The same as JSON: what is missing is null, or not there, by `absent`.
fn json_line((x, s, u, t, kind): &Cells, absent: bool) -> String {
    let kind = if *kind { "yes" } else { "no" };
    let all = [
        ("x", serde_json::json!(x)),
        ("s", serde_json::json!(s)),
        ("u", serde_json::json!(u)),
        ("t", serde_json::json!(t)),
        ("kind", serde_json::json!(kind)),
    ];
    let some = all.iter().filter(|(_, value)| !(absent && value.is_null()));
    let entries: Vec<String> = some.map(|(key, value)| format!("{key:?}: {value}")).collect();
    format!("{{{}}}\n", entries.join(", "))
}

/// The rows as a Parquet file: its pages in groups of so many rows.
#[cfg(feature = "parquet")]
pub(super) fn parquet_file(rows: &[Cells], group: usize, compression: ::parquet::basic::Compression) -> Vec<u8> {
    use ::parquet::data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int64Type};
    use ::parquet::file::properties::WriterProperties;
    use ::parquet::file::writer::SerializedFileWriter;
    let schema = "message rows { optional double x; optional binary s (utf8); optional int64 u; required boolean t; \
                  required binary kind; }";
    let schema = Arc::new(::parquet::schema::parser::parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties).unwrap();
    for rows in rows.chunks(group) {
        /// Those that are there, and where they are.
        fn some<T>(of: impl Iterator<Item = Option<T>>) -> (Vec<T>, Vec<i16>) {
            let (mut there, mut levels) = (Vec::new(), Vec::new());
            for value in of {
                levels.push(i16::from(value.is_some()));
                there.extend(value);
            }
            (there, levels)
        }
        let text = |text: &str| ByteArray::from(text.as_bytes().to_vec());
        let mut group = writer.next_row_group().unwrap();
        let (x, levels) = some(rows.iter().map(|row| row.0));
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<DoubleType>().write_batch(&x, Some(&levels), None).unwrap();
        column.close().unwrap();
        let (s, levels) = some(rows.iter().map(|row| row.1.as_deref().map(text)));
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&s, Some(&levels), None).unwrap();
        column.close().unwrap();
        let (u, levels) = some(rows.iter().map(|row| row.2.map(|u| u as i64)));
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&u, Some(&levels), None).unwrap();
        column.close().unwrap();
        let t: Vec<bool> = rows.iter().map(|row| row.3).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<BoolType>().write_batch(&t, None, None).unwrap();
        column.close().unwrap();
        let kinds: Vec<ByteArray> = rows.iter().map(|row| text(if row.4 { "yes" } else { "no" })).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&kinds, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.into_inner().unwrap()
}

/// The table of [`rows`], with a share held out.
fn of_rows(form: Form) -> job::Table {
    let categorical = vec!["s".into(), "t".into()];
    let ids = vec![id(&["u"], Some(5))];
    job::Table { form, categorical, ids, holdout: Some(0.4), ..spec() }
}

fn csv_text(rows: &[Cells]) -> String {
    format!("{}\n{}", NAMES.join(","), rows.iter().map(csv_line).collect::<String>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_same_rows_are_the_same_samples_in_every_form(rows in rows()) {
        let text = csv_text(&rows);
        let want = read_as(of_rows(csv(None, true, ',')), text, None, OnError::Stop);
        // Where a part is empty, it is in all forms.
        prop_assume!(want.is_ok());
        let want = parts(want.unwrap());
        let lines: String = rows.iter().enumerate().map(|(i, row)| json_line(row, i % 2 == 1)).collect();
        let got = read_as(of_rows(Form::JsonLines), lines, None, OnError::Stop).unwrap();
        prop_assert_eq!(&parts(got), &want);
        #[cfg(feature = "parquet")]
        for compression in [
            ::parquet::basic::Compression::UNCOMPRESSED, ::parquet::basic::Compression::SNAPPY,
            ::parquet::basic::Compression::GZIP(Default::default()),
            #[cfg(feature = "parquet-zstd")]
            ::parquet::basic::Compression::ZSTD(Default::default()),
        ] {
            let file = parquet_file(&rows, 7, compression);
            let got = read_as(of_rows(Form::Parquet), file, None, OnError::Stop).unwrap();
            prop_assert_eq!(&parts(got), &want);
        }
    }

    /// Whatever is wrong with rows that are left out, nothing is learnt from them.
    #[test]
    fn rows_that_are_left_out_might_as_well_not_be_there(
        rows in rows(), bad in prop::collection::vec((any::<prop::sample::Index>(), 0usize..9), 1..12),
    ) {
        let of_csv = [
            "1,a,1,true", "x,a,1,true,yes", "1,a,5,true,yes", "1,new,1,true,", "1,a,1,true,yes,1", "nan,other,,,no",
            "1,\u{fffd},1,true,yes", "1,a,-1,maybe,yes", "inf,a,1,true,never seen",
        ];
        let of_json = [
            "{\"x\": 1", "{\"x\": \"many\", \"kind\": \"yes\"}", "{\"u\": 5, \"kind\": \"yes\"}",
            "{\"error\": \"timeout\", \"x\": 3}", "[1, 2]", "{\"s\": [1], \"kind\": \"no\"}", "{\"x\": 1e999, \"kind\": \"no\"}",
            "{\"kind\": \"no\", \"x\": 1, \"x\": 2}", "\u{fffd}",
        ];
        let clean = csv_text(&rows);
        let want = read_as(of_rows(csv(None, true, ',')), &clean, None, OnError::Stop);
        prop_assume!(want.is_ok());
        let want = parts(want.unwrap());
        // Each mistake before a good row, by its number.
        let mut at: Vec<(usize, usize)> = bad.iter().map(|(at, kind)| (at.index(rows.len()), *kind)).collect();
        at.sort();
        let with = |header: &str, line: &dyn Fn(usize) -> String, mistakes: &[&str]| -> Vec<u8> {
            let mut bytes = header.as_bytes().to_vec();
            for i in 0..rows.len() {
                for (_, kind) in at.iter().filter(|(before, _)| *before == i) {
                    // No character of UTF-8 stands for one that is not.
                    let mistake = mistakes[*kind].bytes().map(|b| if mistakes[*kind].contains('\u{fffd}') && b >= 0x80 { 0xff } else { b });
                    bytes.extend(mistake);
                    bytes.push(b'\n');
                }
                bytes.extend(line(i).bytes());
            }
            bytes
        };
        let dirty = with(&format!("{}\n", NAMES.join(",")), &|i| csv_line(&rows[i]), &of_csv);
        let dirty_json = with("", &|i| json_line(&rows[i], i % 2 == 1), &of_json);
        for (form, dirty) in [(csv(None, true, ','), dirty), (Form::JsonLines, dirty_json)] {
            let got = read_as(of_rows(form.clone()), &dirty, None, SKIP).unwrap();
            prop_assert_eq!(got.skipped.as_ref().unwrap().samples, at.len());
            let first = got.skipped.as_ref().unwrap().first.clone().unwrap();
            let line = 1 + at[0].0 + usize::from(form != Form::JsonLines);
            prop_assert!(first.contains(&format!("train:{line}: ")), "{first}, not {line}");
            prop_assert_eq!(&parts(got), &want);
            // As many are allowed, and not one fewer.
            read_as(of_rows(form.clone()), &dirty, None, OnError::Skip { most: at.len() }).unwrap();
            let few = read_as(of_rows(form.clone()), &dirty, None, OnError::Skip { most: at.len() - 1 });
            says(few, &[&format!("{} of the rows", at.len()), &format!("data.max_errors = {}:", at.len() - 1), first.split("/train").last().unwrap()]);
            prop_assert!(read_as(of_rows(form), &dirty, None, OnError::Stop).is_err());
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..120), json in "[{}\\[\\]\":,a-c0-9.e\n -]{0,80}", skip in any::<bool>()) {
        let on_error = if skip { SKIP } else { OnError::Stop };
        for form in [csv(None, true, ','), Form::JsonLines] {
            let _ = read_as(of_rows(form), &bytes, None, on_error);
        }
        let _ = read_as(json_spec(), json, None, on_error);
    }
}

#[test]
fn rows_of_the_test_set_are_left_out_by_what_the_training_set_teaches() {
    let train = "x,s,u,t,kind\n1,a,1,true,no\n2,b,2,false,yes\n";
    let test = "x,s,u,t,kind\n3,c,3,true,maybe\n4,a,4,true,yes\nfive,a,4,true,no\n";
    let spec = job::Table { holdout: None, ..of_rows(csv(None, true, ',')) };
    let raw = read_as(spec.clone(), train, Some(test.as_bytes()), SKIP).unwrap();
    assert_eq!(raw.test.unwrap().targets, Targets::Class(vec![1]));
    let skipped = raw.skipped.unwrap();
    assert!(skipped.samples == 2 && skipped.first.as_ref().unwrap().contains("test:2: target `kind` is `maybe`"));
    // The limit is one of both files together.
    let train = format!("{train}?,a,7,true,no\n");
    says(
        read_as(spec.clone(), &train, Some(test.as_bytes()), OnError::Skip { most: 2 }),
        &["3 of", "data.max_errors = 2", "train:4: ", "holds `7`", "test:2: ", "test:4: "],
    );
    let none = "x,s,u,t,kind\nx,a,1,true,no\n";
    says(read_as(spec, none, None, SKIP), &["holds no samples"]);
}

/// Also a class that no other row has.
#[cfg(feature = "tokenizers")]
#[test]
fn rows_that_a_files_tokenizer_has_no_tokens_for_are_named_and_left_out() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("tokenizer.json").display().to_string();
    let model = r#"{ "type": "WordLevel", "vocab": { "a": 0, "b": 1 }, "unk_token": "<unk>" }"#;
    std::fs::write(&path, format!(r#"{{ "model": {model}, "pre_tokenizer": {{ "type": "Whitespace" }} }}"#)).unwrap();
    let tokenizer = job::Tokenizer::File { path };
    let text = job::TextColumn { column: "x".into(), tokenizer, context: 3, truncate: false };
    let of = |form| job::Table { form, categorical: vec![], text: Some(text.clone()), ..spec() };
    let lines = r#"{"x": "b a", "kind": "no"}
{"x": "a new", "kind": "maybe"}
{"x": "a b b", "kind": "yes"}
{"x": "a b b a", "kind": "no"}
"#;
    let table = "x,kind\nb a,no\na new,maybe\na b b,yes\na b b a,no\n";
    for (form, train, line) in [(Form::JsonLines, lines, 2), (csv(None, true, ','), table, 3)] {
        let stop = read_as(of(form.clone()), train, None, OnError::Stop);
        let at = format!("train:{line}: the tokenizer has no tokens for the text of column `x`");
        says(stop, &[&at, "[UNK]", "data.on_error"]);
        let raw = read_as(of(form.clone()), train, Some(train.as_bytes()), SKIP).unwrap();
        assert_eq!(raw.train.features, Features::U32(vec![2, 1, 0, 1, 2, 2]));
        assert_eq!((&raw.test.unwrap(), raw.classes.unwrap()), (&raw.train, vec!["no".to_string(), "yes".into()]));
        assert_eq!((raw.tokens.unwrap().vocabulary, raw.skipped.unwrap().samples), (3, 4));
    }
}

#[test]
fn keys_are_columns_in_the_order_in_which_they_first_appear() {
    let lines = "{\"kind\": \"no\", \"u\": 1}\n\n{\"x\": -1.5, \"kind\": \"yes\", \"s\": true}\r\n{\"w\": 2, \"u\": 4, \"kind\": \"no\"}";
    let raw = json(lines).unwrap();
    let names: Vec<&str> = raw.columns.iter().map(|column| column.name.as_str()).collect();
    assert_eq!(names, ["x", "w"]);
    let log = -(2.5f32.ln());
    assert_eq!(raw.train.features, Features::F32(vec![log, 2.0, log, 2.0, log, 2.0]));
    assert_eq!(raw.train.targets, Targets::Class(vec![0, 1, 0]));
    assert_eq!((raw.train.ids.values[0], raw.train.ids.values[4]), (1, 4));
    // The test set's lines have the training set's columns, whatever their own keys are.
    let test = "{\"more\": {}, \"kind\": \"yes\", \"w\": 7}\n";
    let raw = read_as(json_spec(), lines, Some(test.as_bytes()), OnError::Stop).unwrap();
    assert_eq!(raw.test.unwrap().features, Features::F32(vec![log, 7.0]));
}

#[test]
fn wrong_lines_are_named_with_what_is_wrong() {
    let first = "{\"x\": 1, \"kind\": \"no\", \"u\": 0, \"s\": null}\n\n";
    for (line, words) in [
        ("{\"x\": 1,", &["train:3: this is not one JSON object", "EOF", "(character 8)", "data.on_error"][..]),
        ("{\"x\": 1} {}", &["train:3:", "trailing characters"]),
        ("[1]", &["train:3:", "expected an object"]),
        ("7", &["train:3:", "expected an object"]),
        ("{\"x\": 1e999}", &["train:3:", "out of range"]),
        ("{\"x\": {\"a\": 1}, \"kind\": \"no\"}", &["train:3: column `x` holds an object", "data.ignore"]),
        ("{\"x\": [1], \"kind\": \"no\"}", &["train:3: column `x` holds a list", "data.ignore"]),
        ("{\"x\": 1, \"kind\": \"no\", \"x\": 1}", &["train:3: the key `x` is there twice"]),
        ("{\"x\": \"a\", \"kind\": \"no\"}", &["train:3: column `x` holds `a`", "not a finite number"]),
        ("{\"x\": true, \"kind\": \"no\"}", &["train:3: column `x` holds `true`", "not a finite number"]),
        ("{\"x\": 1}", &["train:3: target `kind` is missing"]),
        ("{\"x\": 1, \"kind\": null}", &["train:3: target `kind` is missing"]),
        ("{\"u\": 5, \"kind\": \"no\"}", &["train:3: column `u` holds `5`", "below 5"]),
    ] {
        says(json(&format!("{first}{line}\n")), words);
    }
    says(
        read_as(json_spec(), [first.as_bytes(), b"{\"s\": \"\xff\"}"].concat(), None, OnError::Stop),
        &["train:3:", "UTF-8"],
    );
    says(json(""), &["holds no samples"]);
    says(read_as(json_spec(), "{}\n{}", None, SKIP), &["holds no samples"]);
    says(read_as(json_spec(), "a,b\n1,2\n", None, SKIP), &["train:1: this is not one JSON object"]);
    says(json("{\"knd\": 1}"), &["data.target names the column `kind`", "nearest is `knd`"]);
    // What is not looked at may be anything.
    let ignore = vec!["y".into()];
    let spec =
        job::Table { ignore, task: Task::Regression, target: "x".into(), log: vec![], ids: vec![], ..json_spec() };
    let lines = "{\"x\": 1, \"y\": {\"deep\": []}, \"z\": 2}\n{\"y\": 3, \"x\": 4}\n";
    assert_eq!(read_as(spec, lines, None, OnError::Stop).unwrap().train.targets, Targets::Value(vec![1.0, 4.0]));
}

#[cfg(feature = "parquet")]
mod parquet {
    use super::*;
    use ::parquet::basic::Compression;
    use ::parquet::data_type::Int64Type;
    use ::parquet::file::writer::SerializedFileWriter;

    fn good(n: usize) -> Vec<Cells> {
        (0..n)
            .map(|i| (Some(i as f64), Some("ab"[i % 2..][..1].into()), Some(i as u64 % 5), i % 3 == 0, i % 2 == 0))
            .collect()
    }

    fn of_file(rows: &[Cells], on_error: OnError) -> Result<Raw, DataError> {
        let spec = job::Table { holdout: None, ..of_rows(Form::Parquet) };
        read_as(spec, parquet_file(rows, 4, Compression::SNAPPY), None, on_error)
    }

    #[test]
    fn wrong_rows_are_named_by_their_number_and_may_be_left_out() {
        let mut rows = good(12);
        let want = parts(of_file(&rows, OnError::Stop).unwrap());
        rows.insert(9, (Some(1.0), None, Some(7), true, true));
        rows.insert(5, (Some(f64::NAN), None, Some(1), true, true));
        says(of_file(&rows, OnError::Stop), &["train, row 6: column `x` holds `NaN`", "data.missing"]);
        let got = of_file(&rows, SKIP).unwrap();
        assert_eq!(got.skipped.as_ref().unwrap().samples, 2);
        assert_eq!(parts(got), want);
        rows.remove(5);
        says(of_file(&rows, OnError::Stop), &["train, row 10: column `u` holds `7`", "below 5"]);
    }

    #[test]
    fn files_and_columns_that_cannot_be_read_are_named() {
        let of = |bytes: &[u8]| read_as(of_rows(Form::Parquet), bytes, None, OnError::Stop);
        says(of(b"x,s,u,t,kind\n1,a,1,true,no\n"), &["train cannot be read as Parquet", "copy it again"]);
        says(of(b""), &["train cannot be read as Parquet"]);
        // A column of moments and a list beside numbers.
        let schema =
            "message rows { required int64 kind; required int64 at (timestamp(millis, true)); repeated int64 list; }";
        let schema = Arc::new(::parquet::schema::parser::parse_message_type(schema).unwrap());
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for levels in [None, None, Some(&[1i16, 1][..])] {
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<Int64Type>().write_batch(&[3, 4], levels, levels.map(|_| &[0i16, 0][..])).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        let file = writer.into_inner().unwrap();
        let of = |ignore: &[&str]| {
            let ignore = ignore.iter().map(|name| name.to_string()).collect();
            let spec = job::Table { form: Form::Parquet, categorical: vec![], ignore, ..spec() };
            read_as(spec, &file, None, OnError::Stop)
        };
        says(of(&["list"]), &["column `at` of", "holds dates or times", "data.ignore"]);
        says(of(&["at"]), &["column `list` of", "nested values", "data.ignore"]);
        says(of(&["at", "list"]), &["no columns left to learn from"]);
    }

    /// Damage is an error or other values, and never the end of the program.
    #[test]
    fn damaged_files_never_panic() {
        let whole = parquet_file(&good(12), 6, Compression::UNCOMPRESSED);
        let of = |bytes: &[u8]| read_as(of_rows(Form::Parquet), bytes, None, SKIP).err().map(|e| e.to_string());
        for end in 0..whole.len() {
            assert!(of(&whole[..end]).is_some(), "{end}");
        }
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= [1, 0x80, 0xff][at % 3];
            of(&damaged);
        }
    }
}
