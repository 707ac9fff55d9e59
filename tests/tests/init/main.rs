//! From data alone to a trained model: `init` writes a job that trains, whatever it is pointed at, or says why not and writes nothing.

mod forms;
mod tables;

use std::path::Path;
use unisono_tests::{run, summary};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into()
}

fn put(dir: &Path, name: &str, content: impl AsRef<[u8]>) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    std::fs::write(path, content).expect("written");
}

/// What `init` says of DATA, and the job that it writes.
fn init(dir: &Path, args: &[&str]) -> (String, String) {
    let out = run(dir, &[&["init"], args].concat());
    assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
    let job = std::fs::read_to_string(dir.join("job.toml")).expect("a job");
    for line in job.lines() {
        assert!(line.chars().count() <= 130, "{line}");
    }
    (text(&out.stdout), job)
}

/// Trains what was written, and gives a metric of the test.
fn trained(dir: &Path, metric: &str, more: &[&str]) -> f64 {
    let done = summary(&run(dir, &[&["local", "job.toml", "--quiet", "--json", "--workers", "2"], more].concat()));
    assert_eq!(done["status"], "done", "{done}");
    done["eval"][metric].as_f64().unwrap_or_else(|| panic!("no {metric}: {done}"))
}

/// Numbers in 0..1 that look like chance, and are the same in every run.
fn chance(i: u64, what: u64) -> f64 {
    let mixed = (i * 1000 + what + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 11) as f64 / (1u64 << 53) as f64
}

/// Flowers of three kinds by their sizes, sorted by kind as such files are.
fn flowers() -> String {
    let row = |i: u64| {
        let kind = (i / 50) as usize;
        let size = |what| [1.0, 4.0, 6.0][kind] + 2.0 * chance(i, what);
        format!(
            "{:.1},{:.1},{:.1},{}\n",
            size(0),
            size(1),
            9.0 * chance(i, 2),
            ["setosa", "versicolor", "virginica"][kind]
        )
    };
    format!("length,width,weight,species\n{}", (0..150).map(row).collect::<String>())
}

#[test]
fn what_cannot_be_learnt_from_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a folder");
    let rows = |of: &dyn Fn(u64) -> String| (0..60).map(of).collect::<String>();
    put(dir.path(), "empty.csv", "\n \n");
    put(dir.path(), "one.csv", format!("x\n{}", rows(&|i| format!("{i}\n"))));
    put(dir.path(), "same.csv", format!("x,kind\n{}", rows(&|i| format!("{},yes\n", i % 7))));
    put(dir.path(), "few.csv", "x,kind\n1,yes\n2,no\n");
    put(dir.path(), "names.csv", format!("x,who\n{}", rows(&|i| format!("{},person {i}\n", i % 7))));
    put(dir.path(), "ids.csv", format!("id,day,kind\n{}", rows(&|i| format!("{i},2024-01-1{},{}\n", i % 9, i % 2))));
    put(dir.path(), "twice.csv", format!("x,x,kind\n{}", rows(&|i| format!("{},{},{}\n", i % 7, i % 5, i % 2))));
    put(dir.path(), "bytes.dat", [0xffu8, 0, 1, 2]);
    put(dir.path(), "list.json", "[{\"x\": 1}, {\"x\": 2}]");
    put(dir.path(), "pictures/a/x.png", "no picture");
    put(dir.path(), "two/a.csv", "x,y\n1,2\n");
    put(dir.path(), "two/b.csv", "x,y\n1,2\n");
    put(dir.path(), "short.txt", "To be, or not\n");
    put(dir.path(), "same.svm", rows(&|i| format!("1 {}:1\n", i % 7)));
    put(dir.path(), "pictures/b/y.png", "no picture");
    put(dir.path(), "good.csv", flowers());
    for (args, words) in [
        (&["none.csv"][..], &["there is no none.csv"][..]),
        (&["empty.csv"], &["empty.csv is empty"]),
        (&["one.csv"], &["one column"]),
        (&["same.csv"], &["`kind`", "`yes` in all rows", "--target", "x, kind"]),
        (&["few.csv"], &["2 rows", "20 at least"]),
        (&["names.csv"], &["`who`", "60 different texts", "--target"]),
        (&["ids.csv"], &["no column to learn `kind` from", "`id`: the rows' own numbers", "`day`: dates"]),
        (&["twice.csv"], &["nothing was written", "two columns `x`"]),
        (&["bytes.dat"], &["bytes.dat", "UTF-8"]),
        (&["list.json"], &["list.json", "an object on each line"]),
        (&["pictures"], &["x.png cannot be read as a picture"]),
        (&["two"], &["several files", "a.csv, b.csv"]),
        (&["short.txt"], &["nothing was written", "short.txt", "use more text"]),
        (&["same.svm"], &["nothing was written", "all samples to train on are of the class `1`"]),
        (&["good.csv", "--target", "speces"], &["no column `speces`", "length, width, weight, species"]),
        (&["short.txt", "--target", "x"], &["--target x is for tables"]),
        (&["good.csv", "--out", "nowhere/job.toml"], &["there is no folder nowhere"]),
    ] {
        let out = run(dir.path(), &[&["init"], args].concat());
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!(words.iter().all(|word| said.contains(word)) && !said.contains("panicked"), "{args:?}: {said}");
        assert!(!dir.path().join("job.toml").exists(), "{args:?}");
    }
    put(dir.path(), "job.toml", "mine");
    let out = run(dir.path(), &["init", "good.csv"]);
    assert!(out.status.code() == Some(2) && text(&out.stderr).contains("job.toml exists; add --force"), "{out:?}");
    let out = run(dir.path(), &["init", "godo.csv"]);
    assert!(out.status.code() == Some(2) && text(&out.stderr).contains("there is no godo.csv"), "{out:?}");
    // A failure keeps it, with --force too.
    assert_eq!(run(dir.path(), &["init", "same.csv", "--force"]).status.code(), Some(2));
    assert_eq!(std::fs::read(dir.path().join("job.toml")).expect("there"), b"mine");
    assert!(init(dir.path(), &["good.csv", "--force"]).1.contains("good.csv"));
}

#[test]
fn rows_and_test_files_that_cannot_be_used_are_told_and_left_out() {
    let dir = tempfile::tempdir().expect("a folder");
    // A quote that nothing closes, in a file with tabs; a line that is too short; one without a class; a class that is there once.
    let row = |i: u64| match i {
        40 => "1\n".to_string(),
        50 => "1\t\"b\t\n".into(),
        60 => "1\tb\tmaybe\n".into(),
        _ => format!("{:.2}\t\"{}\t{}\n", chance(i, 0), i % 3, if chance(i, 0) < 0.5 { "no" } else { "yes" }),
    };
    put(dir.path(), "train.tsv", format!("x\tb\tkind\n{}", (0..200).map(row).collect::<String>()));
    put(dir.path(), "test.tsv", "x\tb\n1\t2\n");
    let (says, job) = init(dir.path(), &["train.tsv"]);
    for words in [
        "1, left out; the first:",
        "train.tsv:42",
        "1, left out: no `kind`",
        "a fifth, held out; ",
        "test.tsv cannot be one",
    ] {
        assert!(says.contains(words), "{words}: {says}");
    }
    assert!(job.contains("quoting = false") && job.contains("on_error = \"skip\""), "{job}");
    assert!(trained(dir.path(), "accuracy", &[]) > 0.8);
    put(dir.path(), "test.tsv", "x\tb\tkind\n0.1\t\"1\tno\n0.9\t\"1\tyes\n");
    assert!(init(dir.path(), &["train.tsv", "--force"]).1.contains("test = \"test.tsv\""));
    assert!(trained(dir.path(), "accuracy", &[]) > 0.8);
}

/// What comes of a data set that is not in the repository: `init` with a path below UNISONO_DATA, and some steps.
fn known(data: &str, metric: &str, steps: u64) -> Option<(String, f64)> {
    if std::env::var_os("UNISONO_DATA").is_none() {
        eprintln!("skipped: set UNISONO_DATA to the folder of the data sets to run {data}");
        return None;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let (_, job) = init(dir.path(), &[data]);
    Some((job, trained(dir.path(), metric, &["--set", &format!("train.steps={steps}")])))
}

#[test]
fn census_messages_digits_and_plays_are_learnt() {
    let has = |job: &str, lines: &[&str]| lines.iter().for_each(|line| assert!(job.contains(line), "{line}: {job}"));
    if let Some((job, auc)) = known("adult", "auc", 500) {
        has(
            &job,
            &[
                "train = \"adult/adult-train.csv\"\ntest = \"adult/adult-test.csv\"",
                "target = \"c15\"",
                "categorical = [\"c2\", \"c4\"",
            ],
        );
        assert!(auc > 0.88, "{auc}");
    }
    if let Some((job, f1)) = known("sms-spam/sms.tsv", "f1", 300) {
        has(&job, &["separator = \"\\t\"", "text = \"sentence\"", "target = \"label\"", "kind = \"text-classifier\""]);
        assert!(f1 > 0.95, "{f1}");
    }
    if let Some((job, accuracy)) = known("mnist", "accuracy", 30) {
        has(&job, &["format = \"idx\"", "t10k-labels", "op = \"conv2d\"", "units = 10"]);
        assert!(accuracy > 0.6, "{accuracy}");
    }
    if let Some((job, perplexity)) = known("tinyshakespeare/input.txt", "perplexity", 60) {
        has(&job, &["format = \"text\"", "tokenizer = \"characters\"", "holdout = 0.1", "kind = \"gpt\""]);
        // Of 65 characters; by how often each comes, it is 28.
        assert!(perplexity < 20.0, "{perplexity}");
    }
}
