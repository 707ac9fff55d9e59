//! What a table is written as does not change what is learnt from it; rows that are left out might as well not be there.

use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::writer::SerializedFileWriter;
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use unisono_tests::{run, summary};

/// A number, a text and a whole number, which may be missing, and a class.
type Row = (Option<f64>, Option<&'static str>, Option<i64>, &'static str);

fn rows() -> Vec<Row> {
    let row = |i: i64| {
        let x = (i % 7 != 3).then(|| (i * 37 % 101) as f64 / 8.0 - 3.0);
        let city = (i % 11 != 5).then(|| ["Rom", "Oslo", "São Paulo", "a, b"][i as usize * 5 % 4]);
        (x, city, (i % 13 != 2).then_some(i * 17 % 6), ["no", "yes"][usize::from(i * 37 % 101 + i * 17 % 6 > 50)])
    };
    (0..240).map(row).collect()
}

fn csv(rows: &[Row]) -> String {
    let cell = |cell: Option<String>| cell.unwrap_or_default();
    let line = |(x, city, user, kind): &Row| {
        let city = cell(city.map(|city| format!("{city:?}")));
        format!("{},{city},{},{kind}\n", cell(x.map(|x| x.to_string())), cell(user.map(|user| user.to_string())))
    };
    format!("x,city,user,kind\n{}", rows.iter().map(line).collect::<String>())
}

/// Keys are in the order of the columns: that is the order in which they first appear.
fn json_lines(rows: &[Row]) -> String {
    let line = |(x, city, user, kind): &Row| {
        let user = user.map_or(String::new(), |user| format!("\"user\": {user}, "));
        format!("{{\"x\": {}, \"city\": {}, {user}\"kind\": {kind:?}}}\n", json!(x), json!(city))
    };
    rows.iter().map(line).collect()
}

fn parquet(rows: &[Row]) -> Vec<u8> {
    let schema =
        "message rows { optional double x; optional binary city (utf8); optional int64 user; required binary kind; }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).expect("a schema"));
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::default()).expect("a file");
    let text = |text: &str| ByteArray::from(text.as_bytes().to_vec());
    for rows in rows.chunks(100) {
        let mut group = writer.next_row_group().expect("a group");
        macro_rules! column {
            ($kind:ty, $of:expr) => {{
                let (mut values, mut levels) = (Vec::new(), Vec::new());
                for value in rows.iter().map($of) {
                    levels.push(i16::from(value.is_some()));
                    values.extend(value);
                }
                let mut column = group.next_column().expect("a column").expect("one more");
                column.typed::<$kind>().write_batch(&values, Some(&levels), None).expect("written");
                column.close().expect("written");
            }};
        }
        column!(DoubleType, |row| row.0);
        column!(ByteArrayType, |row| row.1.map(text));
        column!(Int64Type, |row| row.2);
        column!(ByteArrayType, |row| Some(text(row.3)));
        group.close().expect("written");
    }
    writer.into_inner().expect("written")
}

/// A job on a file of such rows.
fn job(format: &str, train: &str, more: &str) -> String {
    format!(
        r#"name = "formats"
[data]
format = {format:?}
train = {train:?}
target = "kind"
categorical = ["city"]
ids = [{{ column = "user", size = 6 }}]
holdout = 0.25
{more}
[model]
kind = "wide-deep"
width = 4
hidden = [8]
[train]
partitions = 4
micro_batch = 8
steps = 30
loss = "binary-cross-entropy"
"#
    )
}

fn train(dir: &Path, job: &str, more: &[&str]) -> Value {
    std::fs::write(dir.join("job.toml"), job).expect("written");
    summary(&run(dir, &[&["local", "job.toml", "--quiet", "--json", "--workers", "2"], more].concat()))
}

#[test]
fn the_same_rows_give_the_same_weights_in_every_format() {
    let dir = tempfile::tempdir().expect("a folder");
    let rows = rows();
    std::fs::write(dir.path().join("rows.csv"), csv(&rows)).expect("written");
    std::fs::write(dir.path().join("rows.parquet"), parquet(&rows)).expect("written");
    let pack = |name: &str, text: &str| {
        let packed = std::fs::File::create(dir.path().join(name)).expect("a file");
        let mut packed = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
        packed.write_all(text.as_bytes()).expect("written");
        packed.finish().expect("written");
    };
    pack("rows.jsonl.gz", &json_lines(&rows));
    let of = |format, file| train(dir.path(), &job(format, file, ""), &[]);
    let want = of("csv", "rows.csv");
    assert!(want["eval"]["loss"].as_f64() > Some(0.0) && want.get("skipped").is_none(), "{want}");
    for (format, file) in [("json-lines", "rows.jsonl.gz"), ("parquet", "rows.parquet")] {
        let got = of(format, file);
        assert_eq!((&got["weights_digest"], &got["eval"]), (&want["weights_digest"], &want["eval"]), "{format}");
    }
    // Predictions are for rows as they are, or packed.
    let whole: Vec<Row> = rows.iter().filter(|row| row.2.is_some()).copied().collect();
    std::fs::write(dir.path().join("new.jsonl"), json_lines(&whole)).expect("written");
    pack("new.jsonl.gz", &json_lines(&whole));
    let predict = |file| run(dir.path(), &["predict", "runs/formats", file]);
    let [plain, packed] = ["new.jsonl", "new.jsonl.gz"].map(|file| predict(file).stdout);
    let lines = plain.iter().filter(|byte| **byte == b'\n').count();
    assert!(plain == packed && lines == whole.len(), "{lines} lines of {}", whole.len());
    let refused = predict("rows.parquet");
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.status.code() == Some(2) && said.contains("rows.parquet is Parquet"), "{said}");
}

#[test]
fn rows_that_are_left_out_are_counted_and_change_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let rows = rows();
    let clean = csv(&rows);
    let mut lines: Vec<&str> = clean.lines().collect();
    lines.insert(200, "1,Rom,1");
    lines.insert(90, "1,Rom,1,");
    lines.insert(20, "many,Rom,1,yes");
    std::fs::write(dir.path().join("clean.csv"), &clean).expect("written");
    std::fs::write(dir.path().join("dirty.csv"), lines.join("\n")).expect("written");
    let want = train(dir.path(), &job("csv", "clean.csv", ""), &[]);
    // Workers that read the file leave the same rows out; others are sent the samples.
    for (ship, transport) in [("false", "shm"), ("false", "grpc"), ("true", "grpc")] {
        let more = format!("on_error = \"skip\"\nmax_errors = 3\nship = {ship}");
        std::fs::write(dir.path().join("job.toml"), job("csv", "dirty.csv", &more)).expect("written");
        let args = ["local", "job.toml", "--quiet", "--json", "--workers", "2", "--transport", transport];
        let output = run(dir.path(), &args);
        let got = summary(&output);
        assert_eq!(
            (&got["weights_digest"], &got["skipped"]),
            (&want["weights_digest"], &json!(3)),
            "{ship} {transport}"
        );
        let said = String::from_utf8_lossy(&output.stderr);
        let warnings: Vec<&str> = said.lines().filter(|line| line.contains("left out")).collect();
        assert!(warnings.len() == 1 && warnings[0].contains("3 samples were left out"), "{said}");
        assert!(warnings[0].contains("dirty.csv:21: column `x` holds `many`"), "{said}");
    }
    let eval = summary(&run(dir.path(), &["eval", "runs/formats", "--json"]));
    assert_eq!((&eval["eval"], &eval["skipped"]), (&want["eval"], &json!(3)));
}

#[test]
fn samples_count_as_their_weights_say_wherever_they_are_computed() {
    let dir = tempfile::tempdir().expect("a folder");
    let table = csv(&rows());
    let line = |(i, line): (usize, &str)| match i {
        0 => format!("{line},two,share\n"),
        _ => format!("{line},2,{}\n", (i * 7 % 5) as f64 / 4.0),
    };
    std::fs::write(dir.path().join("rows.csv"), table.lines().enumerate().map(line).collect::<String>())
        .expect("written");
    let of = |more: &str, args: &[&str]| {
        let got = train(dir.path(), &job("csv", "rows.csv", more), args);
        (got["weights_digest"].clone(), got["eval"].clone())
    };
    let plain = of("ignore = [\"two\", \"share\"]", &[]);
    // Doubling is exact, and a mean does not see it.
    assert_eq!(of("weight = \"two\"\nignore = [\"share\"]", &[]), plain);
    let weighed = of("weight = \"share\"\nignore = [\"two\"]", &[]);
    assert!(weighed.0 != plain.0 && weighed.1["loss"] != plain.1["loss"], "{weighed:?} {plain:?}");
    // Sent samples bring their weights; other workers read them.
    for ship in ["true", "false"] {
        let more = format!("weight = \"share\"\nignore = [\"two\"]\nship = {ship}");
        assert_eq!(of(&more, &["--transport", "grpc", "--set", "train.accumulate=2"]), weighed, "{ship}");
    }
    let eval = summary(&run(dir.path(), &["eval", "runs/formats", "--json"]));
    assert_eq!(eval["eval"], weighed.1);
}

#[test]
fn sparse_lines_are_learnt_from_predicted_and_sent() {
    let dir = tempfile::tempdir().expect("a folder");
    let line = |i: u64| {
        let label = if i * 7 % 10 < 5 { "+1" } else { "-1" };
        let more = if i.is_multiple_of(4) { " 9:1 10:1" } else { "" };
        format!("{label} {}:1 100:{}{more} # {i}\n", i * 7 % 10, i as f64 / 100.0)
    };
    let lines: String = (0..160).map(line).collect();
    std::fs::write(dir.path().join("lines.svm"), &lines).expect("written");
    let job = |kind: &str| {
        format!(
            "name = \"sparse\"\n[data]\nformat = \"libsvm\"\ntrain = \"lines.svm\"\nholdout = 0.2\n[model]\nkind = {kind:?}\n\
             [train]\npartitions = 4\nmicro_batch = 8\nepochs = 60\nloss = \"binary-cross-entropy\"\n\
             tables = {{ optimizer = {{ kind = \"adagrad\", lr = 0.5 }} }}\n"
        )
    };
    for kind in ["matrix-factorization", "logistic"] {
        let want = train(dir.path(), &job(kind), &[]);
        assert!(want["eval"]["accuracy"].as_f64() > Some(0.95), "{want}");
        for more in
            [&["--transport", "grpc"][..], &["--transport", "grpc", "--set", "data.ship=true", "--workers", "3"]]
        {
            let args = ["local", "job.toml", "--quiet", "--json"];
            let workers: &[&str] = if more.contains(&"--workers") { &[] } else { &["--workers", "1"] };
            let got = summary(&run(dir.path(), &[&args[..], more, workers].concat()));
            assert_eq!(
                (&got["weights_digest"], &got["eval"]),
                (&want["weights_digest"], &want["eval"]),
                "{kind} {more:?}"
            );
        }
        let eval = summary(&run(dir.path(), &["eval", "runs/sparse", "--json"]));
        assert_eq!(eval["eval"], want["eval"]);
    }
    // With labels and without; a feature that nobody knows says nothing in this model.
    std::fs::write(dir.path().join("new.svm"), "0:1 100:0.5\n\n+1 7:1 100:0.5 # not looked at\n7:1 100:0.5 555:3\n")
        .expect("written");
    let said = run(dir.path(), &["predict", "runs/sparse", "new.svm"]);
    let said = String::from_utf8_lossy(&said.stdout).to_string();
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!((lines[0], lines.len()), ("prediction,probability", 4), "{said}");
    assert!(lines[1].starts_with("1,0.") && lines[2].starts_with("-1,0.") && lines[2] == lines[3], "{said}");
    // Other data with shorter lines has the model's places.
    std::fs::write(dir.path().join("other.svm"), "+1 0:1\n-1 7:1\n+1 0:1\n-1 7:1\n").expect("written");
    let set = ["--set", "data.train=other.svm", "--set", "data.holdout=0.5"];
    let eval = run(dir.path(), &[&["eval", "runs/sparse", "--json", "job.toml"], &set[..]].concat());
    assert!(eval.status.success() || String::from_utf8_lossy(&eval.stderr).contains("data.holdout"), "{eval:?}");
    // What is written before: names and one row, or nothing at all.
    for (args, words, lines) in [
        (&["predict", "runs/sparse", "new.svm", "--format", "csv"][..], "takes such; use --format libsvm", 0),
        (
            &["predict", "runs/sparse", "many.svm"],
            "many.svm:2: there are 5 features, and the model takes at most 4 a sample",
            2,
        ),
        (&["predict", "runs/sparse", "bad.svm"], "bad.svm:1: feature 3 has the value `x`", 0),
    ] {
        std::fs::write(dir.path().join("many.svm"), "1:1\n1:1 2:1 3:1 4:1 5:1\n").expect("written");
        std::fs::write(dir.path().join("bad.svm"), "3:x\n").expect("written");
        let output = run(dir.path(), args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(words), "{args:?}: {said}");
        assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), lines, "{args:?}: {output:?}");
    }
}

#[test]
fn criteos_lines_are_learnt_from() {
    let dir = tempfile::tempdir().expect("a folder");
    let line = |i: u64| {
        let number = |k: u64| if (i + k).is_multiple_of(5) { String::new() } else { (i * k % 90).to_string() };
        let category = |k: u64| if (i + k).is_multiple_of(9) { String::new() } else { format!("{:08x}", i * k % 7) };
        let cells = (1..=13).map(number).chain((1..=26).map(category));
        format!("{}\t{}\n", i % 7 / 4, cells.collect::<Vec<_>>().join("\t"))
    };
    std::fs::write(dir.path().join("day.txt"), (0..200).map(line).collect::<String>()).expect("written");
    let job = "name = \"criteo\"\n[data]\nformat = \"criteo\"\ntrain = \"day.txt\"\nholdout = 0.2\n[model]\nkind = \"dlrm\"\nwidth = 4\n\
               bottom = [8]\ntop = [8]\n[train]\npartitions = 4\nsteps = 60\nloss = \"binary-cross-entropy\"\n";
    let done = train(dir.path(), job, &[]);
    assert!(done["eval"]["auc"].as_f64() > Some(0.9), "{done}");
}
