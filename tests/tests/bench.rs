//! `unisono bench`: its keys, what adds up, and that it leaves nothing behind. Never how fast.
#![cfg(target_os = "linux")]

use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use unisono_tests::{Signal, finish, program, run, signal, wait_until};

/// Names a run in the environment of all its processes.
const MARK: &str = "UNISONO_TEST_RUN";

/// A measurement in a folder of its own, which is its place for temporary files too.
struct Bench {
    dir: tempfile::TempDir,
    child: Child,
}

impl Bench {
    fn start(args: &[&str]) -> Bench {
        let dir = tempfile::tempdir().expect("a folder");
        let child = Command::new(program())
            .args([&["bench"], args].concat())
            .current_dir(dir.path())
            .env("TMPDIR", dir.path())
            .env(MARK, dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        Bench { dir, child }
    }

    /// The summary; nothing else must be left.
    fn end(self) -> Value {
        let summary = finish(self.child);
        nothing_is_left(self.dir.path());
        summary
    }
}

/// The processes of the run that is marked with `dir`.
fn processes(dir: &Path) -> usize {
    let mark = format!("{MARK}={}", dir.display());
    let all = std::fs::read_dir("/proc").expect("/proc").flatten();
    let is_marked = |environment: Vec<u8>| environment.split(|b| *b == 0).any(|word| word == mark.as_bytes());
    all.filter(|entry| std::fs::read(entry.path().join("environ")).is_ok_and(is_marked)).count()
}

fn nothing_is_left(dir: &Path) {
    wait_until("all processes to be gone", || processes(dir) == 0);
    let files: Vec<_> = std::fs::read_dir(dir).expect("a folder").flatten().map(|e| e.path()).collect();
    assert!(files.is_empty(), "{files:?} was left");
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

const PHASES: [&str; 8] = ["data", "forward", "backward", "encode", "wire", "reduce", "optimizer", "wait"];

/// What holds for every measurement with two workers.
fn check(summary: &Value, workload: &str, transport: &str) {
    for key in ["workload", "transport", "status"] {
        let want = match key {
            "workload" => workload,
            "transport" => transport,
            _ => "done",
        };
        assert_eq!(summary[key], want, "{summary}");
    }
    assert_eq!((&summary["workers"], &summary["threads"], &summary["workers_lost"]), (&2.into(), &1.into(), &0.into()));
    for key in ["samples_per_second", "train_seconds", "wall_seconds", "steps", "samples", "train_loss"] {
        assert!(number(&summary[key]) > 0.0, "{key}: {summary}");
    }
    // Both workers' gradients go up, and the weights down to both.
    let (moved, pushed) =
        (number(&summary["steps"]) * number(&summary["parameters"]) * 4.0 * 2.0, number(&summary["bytes_pushed"]));
    if workload.starts_with("dlrm") {
        // And gradients of rows: for each sample at most 26, of 16 values and a key of 8 bytes.
        let rows = number(&summary["samples"]) * 26.0 * (4.0 * 16.0 + 8.0);
        assert!(moved < pushed && pushed <= moved + rows, "{summary}");
    } else {
        assert_eq!(pushed, moved, "{summary}");
    }
    assert!(number(&summary["bytes_pulled"]) > 0.0, "{summary}");
    assert!(number(&summary["peak_memory_mib"]) > 1.0, "{summary}");
    let step = &summary["step_ms"];
    let (p50, p99, mean) = (number(&step["p50"]), number(&step["p99"]), number(&step["mean"]));
    assert!(0.0 < p50 && p50 <= p99, "{summary}");
    let phase = |name: &str| number(&summary["phases"][name]["ms"]);
    let sum: f64 = PHASES.iter().map(|name| phase(name)).sum();
    assert!((sum - mean).abs() < mean * 0.01, "the phases are {sum} ms, a step is {mean} ms: {summary}");
    // Over shared memory the next forward pass may hide all that comes after a step's last chunk.
    for name in ["data", "forward", "backward", "reduce", "optimizer"] {
        let may_hide = transport == "shm" && ["reduce", "optimizer"].contains(&name);
        assert!(phase(name) > 0.0 || may_hide, "{name}: {summary}");
    }
    for name in ["reduce", "optimizer"] {
        assert!(number(&summary["phases"][name]["gb_per_second"]) > 0.0, "{name}: {summary}");
    }
    for name in ["forward", "backward"] {
        assert!(number(&summary["phases"][name]["gflops"]) > 0.0, "{name}: {summary}");
    }
    for key in ["checkpoint", "weights_digest", "eval"] {
        assert!(summary[key].is_null(), "{key} means nothing here: {summary}");
    }
}

#[test]
fn every_workload_is_measured_and_leaves_nothing() {
    for workload in ["softmax", "mlp", "mlp-wide", "cnn", "gpt", "dlrm", "dlrm-large"] {
        // The default of `dlrm-large` is 256 batches, most of whose time goes into making them.
        let bench = Bench::start(&[workload, "--workers", "2", "--seconds", "0.2", "--batches", "8", "--json"]);
        check(&bench.end(), workload, "shm");
    }
}

#[test]
fn the_transport_is_what_was_asked_for_and_limits_come_with_it() {
    let options = ["mlp", "--workers", "2", "--seconds", "0.2", "--json", "--limits", "--transport"];
    let summary = Bench::start(&[&options[..], &["grpc"]].concat()).end();
    check(&summary, "mlp", "grpc");
    let phase = |name: &str, key: &str| number(&summary["phases"][name][key]);
    for name in ["encode", "wire"] {
        assert!(phase(name, "gb_per_second") > 0.0, "{summary}");
    }
    for name in ["data", "forward", "backward", "encode", "wire", "reduce", "optimizer"] {
        assert!(phase(name, "percent_of_limit") > 0.0, "{name}: {summary}");
    }
    let rates = ["copy", "tcp", "grpc", "push_broadcast"].map(|what| format!("{what}_gb_per_second"));
    for limit in rates.iter().map(String::as_str).chain(["gemm_gflops"]) {
        assert!(number(&summary["limits"][limit]) > 0.0, "{limit}: {summary}");
    }
}

#[test]
fn ctrl_c_ends_it_and_leaves_nothing() {
    let Bench { dir, mut child } = Bench::start(&["mlp", "--workers", "2", "--seconds", "600"]);
    wait_until("the workers", || processes(dir.path()) == 3);
    signal(&child, Signal::INT);
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    nothing_is_left(dir.path());
}

#[test]
fn what_cannot_be_measured_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    for (args, words) in [
        (vec!["bench"], vec!["softmax, mlp, mlp-wide, cnn", "--limits"]),
        (vec!["bench", "mpl"], vec!["mpl", "softmax, mlp, mlp-wide, cnn"]),
        (vec!["bench", "mlp", "--workers", "0"], vec!["--workers"]),
        (vec!["bench", "mlp", "--threads", "0"], vec!["--threads"]),
        (vec!["bench", "mlp", "--seconds", "0"], vec!["--seconds"]),
        (vec!["bench", "mlp", "--seconds", "NaN"], vec!["--seconds"]),
        (
            vec!["bench", "mlp", "--workers", "10000000", "--threads", "4096"],
            vec!["--workers times --threads", "4096 at most"],
        ),
    ] {
        let out = run(dir.path(), &args);
        let error = String::from_utf8_lossy(&out.stderr).to_string();
        assert_eq!(out.status.code(), Some(2), "{args:?}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{args:?}: {error}");
    }
}
