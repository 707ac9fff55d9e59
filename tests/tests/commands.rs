//! Using what was trained: eval, predict, export.

use prost::Message;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Instant;
use unisono_tests::{command, finish, free_port, program, root, run, start, summary};

/// A short run on the digits; its summary and checkpoint.
fn trained(dir: &Path) -> (Value, PathBuf) {
    let summary = summary(&run(dir, &["local", "--quiet", "--json", "--workers", "2", "--set", "train.steps=150"]));
    let checkpoint = dir.join(summary["checkpoint"].as_str().expect("a checkpoint"));
    (summary, checkpoint)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn refused(output: &Output, words: &[&str]) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(words.iter().all(|w| error.contains(w)) && !error.contains("panicked"), "{error}");
}

/// A full disk is nothing that is wrong with what was asked, and whoever reads no more has enough of it.
fn ends_well_where_nothing_can_be_written(dir: &Path, args: &[&str]) {
    let into = |out: Stdio| {
        let out = command(dir, args).stdout(out).stderr(Stdio::piped()).output().expect("it runs");
        (out.status.code(), String::from_utf8_lossy(&out.stderr).to_string())
    };
    let full = std::fs::File::options().write(true).open("/dev/full").expect("Linux has it");
    let (code, said) = into(full.into());
    assert_eq!(said.matches("cannot write to the standard output: No space left").count(), 1, "{said}");
    assert_eq!(code, Some(1), "{said}");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    assert_eq!(into(writer.into()), (Some(0), String::new()));
}

/// The README's first command.
#[test]
fn the_digits_are_learnt_within_seconds() {
    let dir = tempfile::tempdir().expect("a folder");
    let summary = summary(&run(dir.path(), &["local", "--json", "--quiet"]));
    assert!(summary["eval"]["accuracy"].as_f64() >= Some(0.97), "{summary}");
    assert_eq!((&summary["status"], &summary["epochs"]), (&"done".into(), &40.into()));
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    assert_eq!(summary["workers"].as_u64(), Some(cores.min(8) as u64), "{summary}");
}

#[test]
fn eval_repeats_the_runs_own_numbers_to_the_bit() {
    let dir = tempfile::tempdir().expect("a folder");
    let (run_summary, checkpoint) = trained(dir.path());
    let eval = summary(&run(dir.path(), &["eval", text(&checkpoint), "--json"]));
    assert_eq!(eval["eval"], run_summary["eval"]);
    assert_eq!(eval["weights_digest"], run_summary["weights_digest"]);
    let newest = summary(&run(dir.path(), &["eval", "runs/digits-mlp", "--json"]));
    assert_eq!(newest, eval);
    // The digits come about as often as each other.
    let most = eval["most_frequent"]["accuracy"].as_f64();
    assert!(most > Some(0.1) && most < Some(0.13), "{eval}");
}

/// Each sample once, in the row of its class and the column of what it is taken for: the accuracy is the share of the diagonal.
#[test]
fn confusions_are_counted_where_there_are_classes() {
    let dir = tempfile::tempdir().expect("a folder");
    let (_, checkpoint) = trained(dir.path());
    let eval = summary(&run(dir.path(), &["eval", text(&checkpoint), "--confusion", "taken.csv", "--json"]));
    let table = std::fs::read_to_string(dir.path().join("taken.csv")).expect("it is written");
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split(',').collect()).collect();
    let counts: Vec<Vec<u64>> =
        rows[1..].iter().map(|row| row[1..].iter().map(|n| n.parse().expect("a count")).collect()).collect();
    assert_eq!((counts.len(), rows[0].len(), rows[0][1], rows[10][0]), (10, 11, "0", "9"), "{table}");
    let samples: u64 = counts.iter().flatten().sum();
    let right: u64 = (0..10).map(|class| counts[class][class]).sum();
    assert_eq!(eval["samples"].as_u64(), Some(samples), "{table}");
    assert_eq!(eval["eval"]["accuracy"].as_f64(), Some(right as f64 / samples as f64), "{table}");
    // Rows are what samples are, columns what they are taken for.
    let most = counts.iter().map(|row| row.iter().sum::<u64>()).max().expect("ten");
    assert_eq!(eval["most_frequent"]["accuracy"].as_f64(), Some(most as f64 / samples as f64), "{table}");

    let job = "data = { format = \"synthetic\", task = \"regression\", shape = [3], samples = 64 }
        model = { kind = \"linear\" }
        train = { partitions = 1, micro_batch = 8, steps = 2, loss = \"mse\" }
        checkpoint = { dir = \"values\" }";
    std::fs::write(dir.path().join("values.toml"), job).expect("written");
    summary(&run(dir.path(), &["local", "values.toml", "--quiet", "--json"]));
    // Before anything is looked at: there is no such job.
    let asked = run(dir.path(), &["eval", "values", "none.toml", "--confusion", "none.csv"]);
    refused(&asked, &["step-00000002 predicts values", "--confusion", "a model of classes"]);
    assert!(!dir.path().join("none.csv").exists());
}

#[test]
fn predictions_name_classes_in_both_formats_and_bad_rows_are_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let (_, checkpoint) = trained(dir.path());
    let pixels: Vec<String> = (0..64).map(|i| (i % 17).to_string()).collect();
    let header: Vec<String> = (0..64).map(|i| format!("p{i}")).collect();
    let rows = dir.path().join("rows.csv");
    std::fs::write(&rows, format!("{}\n{}\n", header.join(","), pixels.join(","))).expect("written");
    let csv = run(dir.path(), &["predict", text(&checkpoint), text(&rows)]);
    let csv = String::from_utf8_lossy(&csv.stdout).to_string();
    let lines: Vec<Vec<&str>> = csv.lines().map(|l| l.split(',').collect()).collect();
    assert_eq!(&lines[0][64..], ["prediction", "probability"]);
    let lined = dir.path().join("rows.jsonl");
    std::fs::write(&lined, format!("{{\"id\":5,\"features\":[{}]}}\n", pixels.join(","))).expect("written");
    let json: Value = summary(&run(dir.path(), &["predict", text(&checkpoint), text(&lined)]));
    assert_eq!(json["prediction"].as_str(), Some(lines[1][64]));
    assert_eq!(json["probability"].to_string(), lines[1][65]);
    assert_eq!(json["id"], 5);
    let read = std::fs::File::open(&rows).expect("there");
    let mut piped = command(dir.path(), &["predict", text(&checkpoint), "-", "--format", "csv"]);
    let piped = piped.stdin(read).output().expect("it runs");
    assert_eq!(String::from_utf8_lossy(&piped.stdout), csv);
    // Answers that are written at once, and such as are more than is written at once.
    let [many, many_lined] = ["many.csv", "many.jsonl"].map(|name| dir.path().join(name));
    let row =
        |name: &Path| std::fs::read_to_string(name).expect("there").lines().last().expect("a row").to_string() + "\n";
    std::fs::write(&many, format!("{}\n{}", header.join(","), row(&rows).repeat(300))).expect("written");
    std::fs::write(&many_lined, row(&lined).repeat(300)).expect("written");
    for rows in [&rows, &lined, &many, &many_lined] {
        ends_well_where_nothing_can_be_written(dir.path(), &["predict", text(&checkpoint), text(rows)]);
    }

    std::fs::write(&lined, "{\"features\":[1,2]}\n").expect("written");
    refused(&run(dir.path(), &["predict", text(&checkpoint), text(&lined)]), &["rows.jsonl:1", "2 values", "takes 64"]);
    std::fs::write(&rows, format!("{}\n{}\n", header.join(","), pixels.join(",").replace("16", "x"))).expect("written");
    let wrong = run(dir.path(), &["predict", text(&checkpoint), text(&rows)]);
    refused(&wrong, &["rows.csv:2", "\"x\"", "not a finite number"]);
    assert!(wrong.stdout.is_empty(), "names without a row: {}", String::from_utf8_lossy(&wrong.stdout));
}

/// Of short epochs only some tests are logged, the first and the last among them.
#[test]
fn tests_are_logged_now_and_then() {
    let dir = tempfile::tempdir().expect("a folder");
    let job = root().join("examples/digits-mlp.toml");
    program(); // it may have to be built
    let began = Instant::now();
    let out = run(
        dir.path(),
        &["local", text(&job), "--workers", "1", "--set", "train.eval_every=1", "--set", "train.steps=150"],
    );
    let (said, seconds) = (String::from_utf8_lossy(&out.stderr).to_string(), began.elapsed().as_secs() as usize);
    let tests: Vec<&str> = said.lines().filter(|line| line.contains(": test loss")).collect();
    let (first, last) = (tests.first().expect("a line"), tests.last().expect("a line"));
    assert!(first.contains("step 1: ") && last.contains("step 150: "), "{said}");
    assert!(tests.len() <= 2 + seconds, "{} lines in {seconds} s: {said}", tests.len());
}

#[test]
fn exports_are_the_checkpoints_tensors_and_damage_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let (_, checkpoint) = trained(dir.path());
    let to = dir.path().join("model.safetensors");
    let export = ["export", text(&checkpoint), "--out", text(&to)];
    assert!(run(dir.path(), &export).status.success());
    let weights = checkpoint.join("weights.safetensors");
    assert_eq!(std::fs::read(&to).expect("exported"), std::fs::read(&weights).expect("there"));
    refused(&run(dir.path(), &export), &["exists", "--force"]);
    let other = ["export", text(&checkpoint), "--out", "model.bin"];
    refused(&run(dir.path(), &other), &["model.bin", "*.onnx", "--format"]);

    let mut bytes = std::fs::read(&weights).expect("there");
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    std::fs::write(&weights, bytes).expect("written");
    refused(&run(dir.path(), &["eval", text(&checkpoint)]), &["weights.safetensors is damaged", "digest"]);
    refused(&run(dir.path(), &["eval", "nowhere"]), &["there is no nowhere", "runs/NAME"]);
}

/// What is looked at in an ONNX file, by the numbers that its public definition gives the fields.
mod onnx {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub struct Model {
        #[prost(message, optional, tag = "7")]
        pub graph: Option<Graph>,
        #[prost(message, repeated, tag = "14")]
        pub notes: Vec<Note>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Note {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(string, tag = "2")]
        pub value: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Graph {
        #[prost(message, repeated, tag = "1")]
        pub nodes: Vec<Node>,
        #[prost(message, repeated, tag = "5")]
        pub tensors: Vec<Tensor>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Node {
        #[prost(string, repeated, tag = "1")]
        pub inputs: Vec<String>,
        #[prost(string, repeated, tag = "2")]
        pub outputs: Vec<String>,
        #[prost(string, tag = "4")]
        pub op: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub struct Tensor {
        #[prost(int64, repeated, tag = "1")]
        pub sizes: Vec<i64>,
        #[prost(string, tag = "8")]
        pub name: String,
        #[prost(bytes = "vec", tag = "9")]
        pub bytes: Vec<u8>,
    }

    /// The operators of an mlp, of one sample.
    pub fn run(op: &str, inputs: &[&Vec<f32>]) -> Vec<f32> {
        let each = |f: fn(f32, f32) -> f32| {
            let (x, y) = (inputs[0], inputs[1]);
            x.iter().zip(y.iter().cycle().take(x.len())).map(|(x, y)| f(*x, *y)).collect()
        };
        match op {
            "Sub" => each(|x, y| x - y),
            "Mul" => each(|x, y| x * y),
            "Add" => each(|x, y| x + y),
            "Relu" => inputs[0].iter().map(|x| x.max(0.0)).collect(),
            // Tables stay as they are: the product below reads them by what are their columns then.
            "Identity" | "Transpose" => inputs[0].clone(),
            "MatMul" => {
                let (x, columns) = (inputs[0], inputs[1].chunks_exact(inputs[0].len()));
                columns.map(|column| x.iter().zip(column).map(|(x, w)| x * w).sum()).collect()
            }
            other => panic!("an mlp has no {other}"),
        }
    }
}

/// The nodes of the file, computed here one after another, give the program's own prediction for raw pixels.
#[test]
fn an_onnx_file_computes_what_predict_says() {
    let dir = tempfile::tempdir().expect("a folder");
    let (_, checkpoint) = trained(dir.path());
    let out = run(dir.path(), &["export", text(&checkpoint), "--format", "onnx", "--out", "model"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let said = String::from_utf8_lossy(&out.stdout).to_string();
    assert!(said.contains("[batch, 64]") && said.contains("[batch, 10]"), "{said}");
    let bytes = std::fs::read(dir.path().join("model")).expect("exported");
    let onnx::Model { graph, notes } = onnx::Model::decode(&bytes[..]).expect("a whole file");
    let onnx::Graph { nodes, tensors } = graph.expect("a graph");
    assert!(tensors.iter().any(|tensor| tensor.name == "0.weight" && tensor.sizes == [128, 64]));

    let pixels: Vec<f32> = (0..64).map(|i| (i % 17) as f32).collect();
    let floats = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let mut values: HashMap<String, Vec<f32>> = tensors.iter().map(|t| (t.name.clone(), floats(&t.bytes))).collect();
    values.insert("features".into(), pixels.clone());
    for node in nodes {
        let inputs: Vec<&Vec<f32>> = node.inputs.iter().map(|name| &values[name]).collect();
        let result = onnx::run(&node.op, &inputs);
        values.insert(node.outputs[0].clone(), result);
    }
    let logits = &values["logits"];
    let (best, top) = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).expect("some");
    let probability = 1.0 / logits.iter().map(|logit| (logit - top).exp()).sum::<f32>();

    std::fs::write(dir.path().join("row.jsonl"), format!("{{\"features\":{pixels:?}}}\n")).expect("written");
    let answer = summary(&run(dir.path(), &["predict", text(&checkpoint), "row.jsonl"]));
    let classes = notes.iter().find(|note| note.key == "classes").expect("the classes' names");
    let classes: Vec<String> = serde_json::from_str(&classes.value).expect("a list");
    assert_eq!(answer["prediction"].as_str(), Some(classes[best].as_str()));
    let apart = answer["probability"].as_f64().expect("a number") - probability as f64;
    assert!(apart.abs() < 1e-5, "{answer}, by the file {probability}");
}

#[test]
fn partitions_that_were_sent_are_kept_by_digest_and_damaged_ones_are_fetched_again() {
    let dir = tempfile::tempdir().expect("a folder");
    let job = root().join("examples/digits-mlp.toml").display().to_string();
    let train = || {
        let address = format!("127.0.0.1:{}", free_port());
        let options = ["--json", "--quiet", "--set", "data.ship=true", "--set", "train.steps=30"];
        let coordinator = start(dir.path(), &[&["coordinator", &job, "--listen", &address], &options[..]].concat());
        let worker = run(dir.path(), &["worker", "--coordinator", &address, "--cache", "cache"]);
        assert!(worker.status.success(), "{}", String::from_utf8_lossy(&worker.stderr));
        finish(coordinator)["weights_digest"].clone()
    };
    let files = || -> std::collections::BTreeMap<std::path::PathBuf, (std::time::SystemTime, u64)> {
        let entries =
            std::fs::read_dir(dir.path().join("cache")).expect("the cache").map(|e| e.expect("a file").path());
        entries
            .map(|path| {
                let meta = path.metadata().expect("its size");
                (path, (meta.modified().expect("a time"), meta.len()))
            })
            .collect()
    };
    let first = train();
    let kept = files();
    assert_eq!(kept.len(), 16, "8 partitions for training, 8 of the test set: {kept:?}");
    let (damaged, (_, whole)) = kept.first_key_value().expect("some");
    let mut bytes = std::fs::read(damaged).expect("there");
    bytes[40] ^= 1;
    bytes.pop();
    std::fs::write(damaged, bytes).expect("written");
    assert_eq!(train(), first);
    let again = files();
    assert_eq!(again[damaged].1, *whole, "the damaged partition was not fetched again");
    assert_eq!(again.iter().skip(1).collect::<Vec<_>>(), kept.iter().skip(1).collect::<Vec<_>>(), "fetched twice");
}

/// A text of two characters that take turns is learnt by heart, and gone on with.
#[test]
fn a_language_model_writes_what_it_learnt() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("book.txt"), "ab\n".repeat(400)).expect("written");
    let job = dir.path().join("job.toml");
    let toml = r#"
        name = "writer"
        data = { format = "text", train = "book.txt", holdout = 0.1, tokenizer = "characters", context = 8 }
        model = { kind = "gpt", layers = 1, heads = 2, width = 16 }
        train = { partitions = 4, micro_batch = 4, steps = 150, optimizer = { kind = "adamw", lr = 1e-2 } }
    "#;
    std::fs::write(&job, toml).expect("written");
    let done = summary(&run(dir.path(), &["local", text(&job), "--quiet", "--json", "--workers", "2"]));
    // All but the first token of a window is certain: one of 8 is one of three, at best.
    let eval = &done["eval"];
    assert!(eval["perplexity"].as_f64() < Some(1.2) && eval["bits_per_character"].as_f64() < Some(0.26), "{done}");
    let again = summary(&run(dir.path(), &["eval", "runs/writer", "--json"]));
    assert_eq!(&again["eval"], eval);
    let write = |more: &[&str]| {
        let out = run(dir.path(), &[&["predict", "runs/writer", "--generate"], more].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("text")
    };
    assert_eq!(write(&["b\na", "--tokens", "10", "--temperature", "0"]), "b\nab\nab\nab\nab\n");
    assert_eq!(write(&["--tokens", "5", "--top-k", "1"]), "ab\nab\n");
    ends_well_where_nothing_can_be_written(
        dir.path(),
        &["predict", "runs/writer", "--generate", "b\na", "--tokens", "10"],
    );
    let hot = |seed: &str| write(&["--tokens", "40", "--temperature", "20", "--seed", seed]);
    assert!(hot("3") == hot("3") && hot("3") != hot("4"));
    // Another text, as the model's own characters.
    std::fs::write(dir.path().join("other.txt"), "a\nb".repeat(400)).expect("written");
    let other = ["eval", "runs/writer", text(&job), "--json", "--set", "data.train=other.txt"];
    assert!(summary(&run(dir.path(), &other))["eval"]["perplexity"].as_f64() > Some(5.0));
    std::fs::write(dir.path().join("other.txt"), "abc".repeat(400)).expect("written");
    refused(&run(dir.path(), &other), &["'c'"]);
    let refuses = |args: &[&str], words| refused(&run(dir.path(), &[&["predict"], args].concat()), words);
    refuses(&["runs/writer", "--generate", "abc"], &["prompt", "'c'"]);
    refuses(&["runs/writer", "--generate", "a", "--temperature=-1"], &["--temperature", "-1"]);
    refuses(&["runs/writer", "--generate", "a", "--top-p", "0"], &["--top-p", "0"]);
    refuses(&["runs/writer"], &["--generate"]);
    let (_, digits) = trained(dir.path());
    refuses(&[text(&digits), "--generate", "a"], &["--generate"]);
}

/// The tokenizer is the model's own once it is trained: its file may go, and no other takes its place.
#[test]
fn a_model_keeps_the_tokenizer_of_its_file() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("book.txt"), "le café\n".repeat(300)).expect("written");
    // Bytes as letters, of which "Ã" and "©" are those of "é", and some of them in pairs and triples.
    let tokenizer = r#"{
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
        "truncation": { "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 },
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "vocab": { "a": 0, "c": 1, "e": 2, "f": 3, "l": 4, "Ã": 5, "©": 6, "Ġ": 7, "Ċ": 8, "le": 9, "Ġc": 10, "Ġca": 11 },
            "merges": [["l", "e"], ["Ġ", "c"], ["Ġc", "a"]]
        }
    }"#;
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer).expect("written");
    let job = dir.path().join("job.toml");
    let toml = r#"
        name = "writer"
        data = { format = "text", train = "book.txt", holdout = 0.1, context = 8,
                 tokenizer = { kind = "file", path = "tokenizer.json" } }
        model = { kind = "gpt", layers = 1, heads = 2, width = 16 }
        train = { partitions = 4, micro_batch = 4, steps = 120, optimizer = { kind = "adamw", lr = 1e-2 } }
    "#;
    std::fs::write(&job, toml).expect("written");
    let train = |workers: &str, more: &[&str]| {
        let options = ["local", text(&job), "--quiet", "--json", "--workers", workers];
        summary(&run(dir.path(), &[&options[..], more].concat()))
    };
    let done = train("3", &[]);
    // Six tokens are "le", " ca", "f", two of "é", and "\n", for eight characters; each is certain after the one before it.
    let eval = &done["eval"];
    let (loss, bits) = (eval["loss"].as_f64(), eval["bits_per_character"].as_f64());
    let (loss, bits) = (loss.expect("a loss"), bits.expect("bits"));
    assert!(loss < 0.05 && (bits - loss / 2f64.ln() * 6.0 / 8.0).abs() < 1e-5, "{done}");
    for (workers, more) in [("1", &["checkpoint.dir=one"][..]), ("2", &["checkpoint.dir=sent", "data.ship=true"])] {
        let more: Vec<&str> = more.iter().flat_map(|set| ["--set", set]).collect();
        assert_eq!(train(workers, &more)["weights_digest"], done["weights_digest"]);
    }

    let eval = |more: &[&str]| run(dir.path(), &[&["eval", "runs/writer", "--json"], more].concat());
    // Other tokens than the model's.
    std::fs::write(&path, tokenizer.replace("\"le\": 9", "\"le\": 12")).expect("written");
    let other = ["a tokenizer that is not the model's", "tokenizer.json"];
    refused(&eval(&[]), &other);
    refused(&eval(&[text(&job)]), &other);
    refused(&eval(&[text(&job), "--set", "data.tokenizer=bytes"]), &other[..1]);
    refused(&run(dir.path(), &["eval", "one", text(&job), "--set", "data.tokenizer=bytes"]), &other[..1]);
    std::fs::remove_file(&path).expect("removed");
    assert_eq!(summary(&eval(&[]))["eval"], done["eval"]);
    assert_eq!(summary(&eval(&[text(&job)]))["eval"], done["eval"]);
    let write = |more: &[&str]| {
        let out = run(dir.path(), &[&["predict", "runs/writer", "--generate"], more].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("text")
    };
    assert_eq!(write(&["le ca", "--tokens", "10", "--temperature", "0"]), "le café\nle café\n\n");
    // The last token is a half of "é".
    assert_eq!(write(&["le", "--tokens", "3", "--temperature", "0"]), "le caf\u{fffd}\n");
    let onnx = run(dir.path(), &["export", "runs/writer", "--format", "onnx", "--out", "writer.onnx"]);
    assert!(onnx.status.success(), "{}", String::from_utf8_lossy(&onnx.stderr));
}

/// The tensors of a safetensors file: types and shapes by name, and the numbers of `ids`.
fn tensors(bytes: &[u8]) -> (Value, Vec<u64>) {
    let (length, rest) = bytes.split_first_chunk::<8>().expect("a length");
    let (header, values) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header).expect("a header");
    let at = |i: usize| header["ids"]["data_offsets"][i].as_u64().expect("a place") as usize;
    let ids = values[at(0)..at(1)].as_chunks::<8>().0.iter().map(|id| u64::from_le_bytes(*id)).collect();
    (header, ids)
}

/// Clicks depend on the user and on the pair of site and device, whose rows a small model learns.
#[test]
fn a_model_of_ids_is_evaluated_asked_and_exported() {
    let dir = tempfile::tempdir().expect("a folder");
    let (users, sites) = (10, ["news", "maps", "mail"]);
    let clicked = |i: usize| i % users < 5 && (i.is_multiple_of(3) == i.is_multiple_of(2));
    let line = |i: usize| {
        let (user, site) = (i % users, sites[i % 3]);
        format!("{user},{site},{},{},{}\n", ["phone", "desk"][i % 2], i * i % 1000, ["no", "yes"][clicked(i) as usize])
    };
    let table = |range: std::ops::Range<usize>| {
        format!("user,site,device,visits,clicked\n{}", range.map(line).collect::<String>())
    };
    std::fs::write(dir.path().join("train.csv"), table(0..600)).expect("written");
    std::fs::write(dir.path().join("test.csv"), table(600..700)).expect("written");
    let job = dir.path().join("job.toml");
    let toml = r#"
        name = "clicks"
        data = { format = "csv", train = "train.csv", test = "test.csv", target = "clicked", log = ["visits"],
                 ids = [{ column = "user", size = 12 }, "site", { cross = ["site", "device"] }] }
        model = { kind = "wide-deep", width = 4, hidden = [16] }
        train = { partitions = 4, micro_batch = 8, epochs = 20, loss = "binary-cross-entropy", optimizer = { kind = "adamw", lr = 1e-2 },
                  tables = { optimizer = { kind = "adagrad", lr = 0.1 } } }
    "#;
    std::fs::write(&job, toml).expect("written");
    let done = summary(&run(dir.path(), &["local", text(&job), "--quiet", "--json", "--workers", "2"]));
    assert!(done["eval"]["accuracy"].as_f64() >= Some(0.99), "{done}");
    let again = summary(&run(dir.path(), &["eval", "runs/clicks", "--json"]));
    assert_eq!((&again["eval"], &again["weights_digest"]), (&done["eval"], &done["weights_digest"]));

    // A known row, one with cells that are missing, and one of a site that nobody has seen.
    let (rows, lines) = (dir.path().join("rows.csv"), dir.path().join("rows.jsonl"));
    std::fs::write(&rows, "n,user,site,device,visits\n7,2,news,phone,0\n8,,?,phone,\n9,3,new,desk,5\n")
        .expect("written");
    let asked = |file: &Path| {
        let out = run(dir.path(), &["predict", "runs/clicks", text(file)]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("text")
    };
    let csv = asked(&rows);
    let cells: Vec<Vec<&str>> = csv.lines().skip(1).map(|line| line.split(',').collect()).collect();
    assert_eq!((cells.len(), cells[0][5]), (3, "yes"), "{csv}");
    let json = "{\"n\":7,\"user\":2,\"site\":\"news\",\"device\":\"phone\",\"visits\":0}\n\
                {\"n\":8,\"user\":null,\"site\":\"?\",\"device\":\"phone\",\"visits\":\"\"}\n\
                {\"n\":9,\"user\":\"3\",\"site\":\"new\",\"device\":\"desk\",\"visits\":5.0}\n";
    std::fs::write(&lines, json).expect("written");
    for (line, cells) in asked(&lines).lines().zip(&cells) {
        let line: Value = serde_json::from_str(line).expect("an object");
        let got = [
            line["n"].to_string(),
            line["prediction"].as_str().unwrap_or_default().into(),
            line["probability"].to_string(),
        ];
        assert_eq!(got, [cells[0], cells[5], cells[6]]);
    }

    let out = run(dir.path(), &["export", "runs/clicks", "--format", "safetensors", "--out", "model"]);
    let said = String::from_utf8_lossy(&out.stdout).to_string();
    assert!(out.status.success() && said.contains("tensors.pop(\"ids\")"), "{said}");
    let (header, ids) = tensors(&std::fs::read(dir.path().join("model")).expect("exported"));
    // All users, three sites and their six pairs with devices, each once; users 10 and 11 have never been there.
    let mut sorted = ids.clone();
    sorted.sort();
    sorted.dedup();
    assert_eq!((ids.len(), sorted.len(), &sorted[..users]), (19, 19, &(0..10).collect::<Vec<u64>>()[..]));
    assert_eq!((&header["ids"]["dtype"], &header["ids"]["shape"]), (&"U64".into(), &serde_json::json!([19])));
    let shapes: Vec<String> = header.as_object().expect("tensors").values().map(|t| t["shape"].to_string()).collect();
    assert!(shapes.contains(&"[19,1]".into()) && shapes.contains(&"[19,4]".into()), "{header}");
    assert!(said.contains("[19, 1]") && said.contains("[19, 4]"), "{said}");
}

/// Made-up clicks are asked about by the names of their numbers and ids.
#[test]
fn made_up_clicks_can_be_predicted() {
    let dir = tempfile::tempdir().expect("a folder");
    let job = dir.path().join("job.toml");
    let toml = r#"
        name = "made"
        data = { format = "synthetic", task = "clicks", numbers = 2, fields = 2, vocabulary = 9, samples = 80 }
        model = { kind = "dlrm", width = 3, bottom = [4], top = [4] }
        train = { partitions = 2, steps = 3, loss = "binary-cross-entropy" }
    "#;
    std::fs::write(&job, toml).expect("written");
    summary(&run(dir.path(), &["local", text(&job), "--quiet", "--json", "--workers", "1"]));
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, "{\"number0\":0.5,\"number1\":-1,\"id0\":8,\"id1\":0}\n").expect("written");
    let answer = summary(&run(dir.path(), &["predict", "runs/made", text(&rows)]));
    assert!(answer["probability"].as_f64() >= Some(0.5), "{answer}");
    std::fs::write(&rows, "{\"number0\":0.5,\"number1\":-1,\"id0\":8}\n").expect("written");
    refused(&run(dir.path(), &["predict", "runs/made", text(&rows)]), &["rows.jsonl:1", "`id1` is not given"]);
}

/// Texts are told apart by a pair of words, whose order is all that differs.
#[test]
fn a_text_classifier_reads_pairs_of_words() {
    let dir = tempfile::tempdir().expect("a folder");
    let line = |i: usize| match i % 2 {
        0 => format!("number {i}: black white\tdown\n"),
        _ => format!("number {i}: white black\tup\n"),
    };
    let table: String = (0..400).map(line).collect();
    std::fs::write(dir.path().join("texts.tsv"), format!("said\tway\n{table}")).expect("written");
    let job = dir.path().join("job.toml");
    let toml = r#"
        name = "reader"
        data = { format = "csv", train = "texts.tsv", separator = "\t", target = "way", text = "said", context = 16,
                 tokenizer = { kind = "words", ngrams = 2, buckets = 4096 }, holdout = 0.25 }
        model = { kind = "text-classifier", width = 8 }
        train = { partitions = 4, micro_batch = 4, epochs = 20, optimizer = { kind = "adamw", lr = 1e-2 } }
    "#;
    std::fs::write(&job, toml).expect("written");
    let done = summary(&run(dir.path(), &["local", text(&job), "--quiet", "--json", "--workers", "2"]));
    assert_eq!(done["eval"]["accuracy"], 1.0, "{done}");
    let again = summary(&run(dir.path(), &["eval", "runs/reader", "--json"]));
    assert_eq!(again["eval"], done["eval"]);
    // Who tests another part is told when it was trained on: a smaller one was not.
    for (set, told) in [("data.holdout=0.2", false), ("seed=0", false), ("data.holdout=0.3", true), ("seed=9", true)] {
        let eval = run(dir.path(), &["eval", "runs/reader", text(&job), "--set", set]);
        let (out, error) = (String::from_utf8_lossy(&eval.stdout), String::from_utf8_lossy(&eval.stderr));
        assert!(eval.status.success() && out.contains("of always \""), "{out}{error}");
        assert_eq!(error.contains("it tests what was trained on as well"), told, "{set}: {error}");
    }
    let none = toml.replace(", holdout = 0.25", "").replace("\"reader\"", "\"all\"");
    std::fs::write(dir.path().join("all.toml"), none).expect("written");
    summary(&run(dir.path(), &["local", "all.toml", "--quiet", "--json", "--workers", "1"]));
    let eval = run(dir.path(), &["eval", "runs/all", text(&job)]);
    assert!(String::from_utf8_lossy(&eval.stderr).contains("it tests what was trained on as well"), "{eval:?}");
    let rows = dir.path().join("rows.csv");
    std::fs::write(&rows, "id,said\n1,Black White!\n2,never seen: white black\n").expect("written");
    let csv = run(dir.path(), &["predict", "runs/reader", text(&rows)]);
    let csv = String::from_utf8_lossy(&csv.stdout).to_string();
    let said: Vec<&str> = csv.lines().skip(1).filter_map(|line| line.split(',').nth(2)).collect();
    assert_eq!(said, ["down", "up"], "{csv}");
    for (row, words) in
        [("1,", &["rows.csv:2", "empty"][..]), ("1,a b c d e f g h i j", &["rows.csv:2", "19 tokens", "16"])]
    {
        std::fs::write(&rows, format!("id,said\n{row}\n")).expect("written");
        refused(&run(dir.path(), &["predict", "runs/reader", text(&rows)]), words);
    }
}
