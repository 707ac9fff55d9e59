//! Users, items and what they think of them: from a file to the best items for a user, and what is said of bad ones.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Output;
use unisono_tests::{run, summary};

/// Twenty users in two groups, and as many items, of which each group likes its half; user `uN` has not taken four of them. The last
/// line of each user is one that its group likes. Others' items are rated low.
fn ratings() -> String {
    let mut lines = String::new();
    for user in 0..20 {
        let like = |i: usize| i % 2 * 10 + (user * 3 + i / 2) % 10;
        for i in 0..20 {
            let (item, group) = (like(i), user % 2);
            let liked = item / 10 == group;
            // Of what is liked, two are left out, and of the rest all but three.
            if (liked && i < 16) || (!liked && i < 6) {
                let time = if i / 2 == 7 && liked { 100 } else { i };
                lines += &format!("u{user}::item {item}::{}::{time}\n", if liked { 5 } else { 1 });
            }
        }
    }
    lines
}

const JOB: &str = r#"name = "taken"
seed = 3
data = { format = "ratings", train = "ratings.dat", separator = "::", holdout = "last",
         implicit = { negatives = 3, threshold = 4, eval_negatives = "all", k = 3 } }
model = { kind = "matrix-factorization", width = 2 }
[train]
partitions = 4
micro_batch = 8
epochs = 10
loss = "bpr"
optimizer = { kind = "adamw", lr = 1e-2 }
tables = { optimizer = { kind = "adagrad", lr = 0.2 } }
early_stopping = { metric = "ndcg", patience = 100 }
schedule = { kind = "plateau", metric = "hit-rate", patience = 50 }
"#;

fn write(dir: &Path, name: &str, content: &str) {
    std::fs::write(dir.join(name), content).expect("written");
}

fn predict(dir: &Path, args: &[&str]) -> Output {
    run(dir, &[&["predict"], args].concat())
}

/// What was printed, of a command that must succeed.
fn said(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).to_string()
}

fn refused(output: &Output, words: &[&str]) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(words.iter().all(|w| error.contains(w)) && !error.contains("panicked"), "{words:?}: {error}");
}

/// The items of each user in the file, by the rating that they have at least.
fn items(file: &str, user: &str, least: u32) -> BTreeSet<String> {
    let cells = file.lines().map(|line| line.split("::").collect::<Vec<_>>());
    let of_user = cells.filter(|cells| cells[0] == user && cells[2].parse::<u32>().expect("a rating") >= least);
    of_user.map(|cells| cells[1].to_string()).collect()
}

#[test]
fn users_get_the_best_items_that_they_do_not_have() {
    let dir = tempfile::tempdir().expect("a folder");
    let (dir, file) = (dir.path(), ratings());
    write(dir, "ratings.dat", &file);
    write(dir, "job.toml", JOB);
    let done = summary(&run(dir, &["local", "job.toml", "--quiet", "--json", "--workers", "2"]));
    let eval = &done["eval"];
    // The one that was kept back, and the two that nobody in the group has not: three of their kind, before seven others.
    assert!(eval["hit_rate"].as_f64() >= Some(0.9) && eval["ndcg"].as_f64() >= Some(0.5), "{done}");
    let again = summary(&run(dir, &["eval", "runs/taken", "--json"]));
    assert_eq!((&again["eval"], &again["samples"]), (eval, &20.into()));
    let shown = said(&run(dir, &["eval", "runs/taken"]));
    assert!(shown.contains("HR@3 ") && shown.contains("NDCG@3 "), "{shown}");

    write(dir, "users.csv", "n,user\n1,u4\n2,u7\n3,u4\n");
    let csv = said(&predict(dir, &["runs/taken", "users.csv", "--top-k", "3"]));
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!((lines[0].join(","), lines.len()), ("n,user,rank,item,score".into(), 1 + 3 * 3));
    let answers = |user: &str, n: &str| -> Vec<String> {
        let of_row = lines.iter().filter(|cells| cells[0] == n && cells[1] == user);
        of_row.map(|cells| cells[3].to_string()).collect()
    };
    assert_eq!(answers("u4", "1"), answers("u4", "3"));
    for (user, n, group) in [("u4", "1", 0), ("u7", "2", 1)] {
        let best: BTreeSet<String> = answers(user, n).into_iter().collect();
        // The one that was kept back is no part of the training set.
        let kept: BTreeSet<String> = (0..20).filter(|i| i / 10 == group).map(|i| format!("item {i}")).collect();
        let kept = &(&kept - &items(&file, user, 0)) | &last_of(&file, user);
        assert_eq!(best, kept, "{csv}");
        let scores: Vec<f64> = lines.iter().filter(|c| c[0] == n).map(|c| c[4].parse().expect("a number")).collect();
        let ranks: Vec<&str> = lines.iter().filter(|c| c[0] == n).map(|c| c[2]).collect();
        assert!(scores.is_sorted_by(|a, b| a >= b) && ranks == ["1", "2", "3"], "{csv}");
    }

    // JSON has the same, and a prediction is the score.
    write(dir, "users.jsonl", "{\"user\":\"u7\",\"x\":[1]}\n\n{\"user\":\" u4 \"}\n");
    let json = said(&predict(dir, &["runs/taken", "users.jsonl", "--top-k", "3"]));
    let objects: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).expect("an object")).collect();
    let names = |object: &Value| -> Vec<String> {
        let items = object["items"].as_array().expect("items");
        items.iter().map(|item| item["item"].as_str().expect("a name").to_string()).collect()
    };
    assert_eq!((names(&objects[0]), names(&objects[1])), (answers("u7", "2"), answers("u4", "1")));
    assert_eq!((&objects[0]["x"], &objects[0]["items"][1]["rank"]), (&serde_json::json!([1]), &2.into()));
    let first = &objects[0]["items"][0];
    write(dir, "pair.jsonl", &format!("{{\"user\":\"u7\",\"item\":{}}}\n", first["item"]));
    let pair: Value = serde_json::from_str(&said(&predict(dir, &["runs/taken", "pair.jsonl"]))).expect("an object");
    assert_eq!(pair["prediction"], first["score"]);
    write(dir, "pair.jsonl", "{\"user\":\"u7\",\"item\":\"item 99\"}\n");
    refused(&predict(dir, &["runs/taken", "pair.jsonl"]), &["pair.jsonl:1", "`item 99`", "not trained on"]);

    // With what they have, all of their group come before the others.
    let all = said(&predict(dir, &["runs/taken", "users.jsonl", "--top-k", "99", "--with-seen"]));
    let all: Value = serde_json::from_str(all.lines().next().expect("a line")).expect("an object");
    assert_eq!(names(&all).len(), 20);
    assert!(
        names(&all)[..10].iter().all(|item| item["item ".len()..].parse::<u32>().expect("a number") >= 10),
        "{all}"
    );
    let few = said(&predict(dir, &["runs/taken", "users.jsonl", "--top-k", "99"]));
    let few: Value = serde_json::from_str(few.lines().next().expect("a line")).expect("an object");
    let had = &items(&file, "u7", 0) - &last_of(&file, "u7");
    assert_eq!(names(&few).len(), 20 - had.len(), "only what is left");
    assert!(names(&few).iter().all(|item| !had.contains(item)), "{few}");

    write(dir, "users.csv", "user\nu4\nu99\n");
    refused(&predict(dir, &["runs/taken", "users.csv", "--top-k", "3"]), &["users.csv:3", "`u99`", "learnt nothing"]);
    write(dir, "users.csv", "user,x\n,1\n");
    refused(&predict(dir, &["runs/taken", "users.csv", "--top-k", "3"]), &["users.csv:2", "`user` is empty"]);
    write(dir, "users.csv", "users\nu4\n");
    refused(&predict(dir, &["runs/taken", "users.csv", "--top-k", "3"]), &["users.csv:1", "`user` is not given"]);
    refused(&predict(dir, &["runs/taken", "users.csv", "--with-seen"]), &["--top-k"]);
    write(dir, "users.csv", "user\nu4\n");
    write(dir, "ratings.dat", &file.replacen("::5::", "::1::", 1));
    refused(&predict(dir, &["runs/taken", "users.csv", "--top-k", "3"]), &["data have changed", "--with-seen"]);
    std::fs::remove_file(dir.join("ratings.dat")).expect("removed");
    refused(&predict(dir, &["runs/taken", "users.csv", "--top-k", "3"]), &["ratings.dat", "--with-seen"]);
    said(&predict(dir, &["runs/taken", "users.csv", "--top-k", "3", "--with-seen"]));
}

/// The item of a user that is last by its time, of those that are liked.
fn last_of(file: &str, user: &str) -> BTreeSet<String> {
    let cells = file.lines().map(|line| line.split("::").collect::<Vec<_>>());
    cells.filter(|cells| cells[0] == user && cells[3] == "100").map(|cells| cells[1].to_string()).collect()
}

#[test]
fn explicit_ratings_are_learnt_and_ranked_too() {
    let dir = tempfile::tempdir().expect("a folder");
    let (dir, file) = (dir.path(), ratings());
    write(dir, "ratings.dat", &file);
    let explicit = JOB.lines().filter(|line| !line.contains("implicit") && !line.contains("metric"));
    let explicit = explicit.collect::<Vec<_>>().join("\n").replace("\"last\",", "0.1 }").replace("bpr", "mse");
    write(dir, "job.toml", &explicit);
    let done = summary(&run(dir, &["local", "job.toml", "--quiet", "--json", "--workers", "2"]));
    assert!(done["eval"]["rmse"].as_f64() < Some(0.7), "{done}");
    write(dir, "users.csv", "user\nu4\n");
    let csv = said(&predict(dir, &["runs/taken", "users.csv", "--top-k", "20", "--with-seen"]));
    let items: Vec<&str> = csv.lines().skip(1).map(|line| line.split(',').nth(2).expect("an item")).collect();
    assert!(items.len() == 20 && items[..10].iter().all(|item| item.len() == "item 0".len()), "{csv}");
    let left = said(&predict(dir, &["runs/taken", "users.csv", "--top-k", "20"]));
    assert!((8..20).contains(&left.lines().count()), "{left}");

    // Of no other model.
    let digits = summary(&run(dir, &["local", "--quiet", "--json", "--set", "train.steps=1"]));
    let checkpoint = digits["checkpoint"].as_str().expect("a checkpoint");
    refused(&predict(dir, &[checkpoint, "users.csv", "--top-k", "2"]), &["no model of users and items", "--top-k"]);
}

/// `unisono local` on a job that is refused before anything starts.
fn refuses(dir: &Path, job: &str, words: &[&str]) {
    write(dir, "job.toml", job);
    let output = run(dir, &["local", "job.toml", "--quiet", "--json", "--workers", "2"]);
    refused(&output, words);
    assert!(output.stdout.is_empty() && !dir.join("runs").exists());
}

#[test]
fn bad_ratings_and_jobs_are_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path();
    let file = ratings();
    let with = |from: &str, to: &str| {
        assert!(JOB.contains(from), "{from}");
        JOB.replace(from, to)
    };
    write(dir, "ratings.dat", &file);
    refuses(dir, &with("\"::\"", "\";\""), &["ratings.dat:1", "1 cells", "data.separator"]);
    refuses(dir, &with("\"::\"", "\"\""), &["job.toml:3", "`data.separator`", "\"whitespace\""]);
    refuses(dir, &with("threshold = 4", "threshold = 6"), &["ratings.dat", "data.implicit.threshold = 6"]);
    refuses(dir, &with("\"bpr\"", "\"mse\""), &["job.toml:10", "`train.loss`", "\"bpr\""]);
    let explicit = with(",\n         implicit = { negatives = 3, threshold = 4, eval_negatives = \"all\", k = 3 }", "");
    refuses(dir, &explicit, &["`train.loss` is \"bpr\"", "data.implicit"]);
    refuses(dir, &explicit.replace("bpr", "mse"), &["train.schedule follows \"hit-rate\"", "\"rmse\""]);
    refuses(dir, &with("\"matrix-factorization\", width = 2", "\"linear\""), &["2 ids", "\"matrix-factorization\""]);
    write(dir, "ratings.dat", &(file.clone() + "u3::item 1::good::4\n"));
    let line = format!("ratings.dat:{}", file.lines().count() + 1);
    refuses(dir, JOB, &[&line, "column `rating`", "`good`"]);
    write(dir, "ratings.dat", &(file.clone() + "u3::item 1::5::yesterday\n"));
    refuses(dir, JOB, &[&line, "column `time`", "`yesterday`"]);
    write(dir, "ratings.dat", &(file.clone() + "u3::item 1\n"));
    refuses(dir, JOB, &[&line, "2 cells", "4 columns"]);
    let all: String = (0..20).map(|i| format!("all::item {i}::5::{i}\n")).collect();
    write(dir, "ratings.dat", &(file.clone() + &all + "all::item 3::5::99\n"));
    refuses(dir, JOB, &["the user `all`", "all 20 items"]);
    write(dir, "ratings.dat", &file);
    write(dir, "test.dat", "");
    let tested = with("holdout = \"last\"", "test = \"test.dat\"");
    refuses(dir, &tested, &["test.dat holds no samples"]);
    write(dir, "test.dat", "u1::item 4::5::3\nu1::item 44::5::3\n");
    refuses(dir, &tested, &["test.dat:2", "the item `item 44`"]);
}
