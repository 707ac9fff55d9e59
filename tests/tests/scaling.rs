//! `unisono loadtest` and `unisono simulate`: what they report, and what belongs together. Never how fast.
#![cfg(target_os = "linux")]

use serde_json::Value;
use std::path::Path;
use unisono_tests::{run, summary};

const JOB: &str = r#"
name = "load"
[data]
format = "synthetic"
task = "classification"
shape = [16]
classes = 3
samples = 1920
[model]
kind = "mlp"
hidden = [8]
[train]
partitions = 4
micro_batch = 8
epochs = 2
loss = "cross-entropy"
optimizer = { kind = "sgd", lr = 0.01 }
"#;

/// A folder with the job.
fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("job.toml"), JOB).expect("written");
    dir
}

fn loadtest(dir: &Path, args: &[&str]) -> Value {
    summary(&run(dir, &[&["loadtest", "job.toml", "--json"], args].concat()))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// What holds for each size of any load test.
fn check(size: &Value) {
    let number = |key: &str| number(&size[key]);
    assert!(number("samples_per_second") > 0.0 && number("steps") >= 5.0, "{size}");
    assert!(number("bytes_pushed_per_second") > 0.0 && number("bytes_pulled_per_second") > 0.0, "{size}");
    let of = |quantile: &str| size["step_ms"][quantile].as_f64().expect("a number");
    assert!(0.0 < of("p50") && of("p50") <= of("p99") && of("p99") <= of("max"), "{size}");
    assert!(number("coordinator_us") > 0.0 && number("coordinator_memory_mib") > 1.0, "{size}");
    // By gRPC it is known what the bytes cost by themselves.
    assert!(number("own_us").abs() <= number("coordinator_us"), "{size}");
    let phases = size["phases"].as_object().expect("phases").values();
    let all: f64 = phases.map(|ms| ms.as_f64().expect("a number")).sum();
    // The mean of the steps, which are 8 x 4 samples each.
    let mean = 1e3 * 8.0 * number("partitions") / number("samples_per_second");
    assert!((all / mean - 1.0).abs() < 0.05, "{all} ms of phases, {mean} ms a step: {size}");
}

#[test]
fn processes_are_measured_strong_and_weak_and_their_trace_is_for_simulate() {
    let dir = folder();
    let (page, trace) = (dir.path().join("page.html"), dir.path().join("trace.json"));
    let args = ["--workers", "1,2,6", "--seconds", "0.3", "--churn", "10", "--transport", "grpc"];
    let files = ["--report", page.to_str().expect("a name"), "--trace", trace.to_str().expect("a name")];
    let got = loadtest(dir.path(), &[&args[..], &files].concat());
    assert_eq!((&got["transport"], &got["workers"]), (&"grpc".into(), &"processes".into()), "{got}");
    let sizes = got["sizes"].as_array().expect("sizes");
    let shapes: Vec<_> =
        sizes.iter().map(|s| (s["scaling"].as_str(), s["workers"].as_u64(), s["partitions"].as_u64())).collect();
    let (strong, weak) = (Some("strong"), Some("weak"));
    let want = [(strong, 1, 4), (strong, 2, 4), (strong, 6, 4), (weak, 1, 4), (weak, 2, 8), (weak, 6, 24)];
    assert_eq!(shapes, want.map(|(scaling, workers, partitions)| (scaling, Some(workers), Some(partitions))));
    for size in sizes {
        check(size);
        assert!(number(&size["predicted"]) > 0.0, "{size}");
        // Each was ended and started at a time of its own, and seen to come or to have come by the end.
        let churn = &size["churn"];
        assert!(churn["joins"].as_u64() >= Some(1) && churn["joins"] == churn["leaves"], "{size}");
        assert!(number(&churn["join_ms"]["max"]) > 0.0 && number(&churn["step_ms"]["p50"]) > 0.0, "{size}");
    }
    assert_eq!((number(&sizes[0]["efficiency"]), number(&sizes[3]["efficiency"])), (1.0, 1.0));
    assert_eq!(sizes[2]["bottleneck"], "partitions", "two of six workers have none");
    let calibrates: Vec<bool> = sizes.iter().map(|size| size["calibrates"].as_bool().expect("a flag")).collect();
    assert_eq!(calibrates, [false, false, true, false, false, true]);

    let page = std::fs::read_to_string(page).expect("a page");
    assert!(page.matches("<svg").count() == 12 && page.contains("prefers-color-scheme: dark"));
    assert!(!page.contains("src=") && !page.contains("href=") && !page.contains("@import"), "it stands alone");
    let rest = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!rest.contains("http"), "it stands alone");

    let simulate = |more: &[&str]| {
        let args = ["simulate", "job.toml", "--json", "--workers", "1..8", "--from", "trace.json"];
        summary(&run(dir.path(), &[&args[..], more].concat()))
    };
    let got = simulate(&[]);
    let sizes = got["sizes"].as_array().expect("sizes");
    assert_eq!(sizes.iter().map(|size| size["workers"].as_u64()).collect::<Vec<_>>(), [1, 2, 4, 8].map(Some));
    // Two epochs of 1920 samples.
    let hours = |size: &Value| 3840.0 / number(&size["samples_per_second"]) / 3600.0 * number(&size["workers"]);
    for size in sizes {
        assert!((number(&size["worker_hours"]) / hours(size) - 1.0).abs() < 1e-6, "{size}");
    }
    let more = number(&sizes[3]["samples_per_second"]) / number(&sizes[2]["samples_per_second"]);
    assert!(more <= 1.001, "4 of 8 have no partition: {more}");
    assert_eq!(got["sizes"], simulate(&["--seed", "0"])["sizes"], "time is virtual");
    let slow = simulate(&["--rtt", "50ms"]);
    assert!(number(&slow["sizes"][0]["samples_per_second"]) < number(&sizes[0]["samples_per_second"]) / 2.0, "{slow}");
}

#[test]
fn simulated_workers_have_sessions_and_bytes_and_wait_as_long_as_they_are_told() {
    let dir = folder();
    let args = ["--workers", "20", "--seconds", "0.3", "--churn", "20", "--transport", "grpc", "--scaling", "weak"];
    let got = loadtest(dir.path(), &[&args[..], &["--simulated-workers", "--compute", "5ms"]].concat());
    assert_eq!(got["workers"], "simulated", "{got}");
    let size = &got["sizes"][0];
    check(size);
    assert_eq!((size["workers"].as_u64(), size["partitions"].as_u64()), (Some(20), Some(20)), "at least one each");
    assert!(number(&size["phases"]["forward"]) >= 5.0 && number(&size["step_ms"]["p50"]) >= 5.0, "{size}");
    assert!(size["churn"]["joins"].as_u64() >= Some(1), "{size}");
}

#[test]
fn what_cannot_be_measured_or_simulated_is_said_before_anything_starts() {
    let dir = folder();
    std::fs::write(dir.path().join("other.json"), "{}").expect("written");
    let cases: [(&[&str], &str); 10] = [
        (&["loadtest", "job.toml", "--workers", "0"], "1,2,4,8"),
        (&["loadtest", "job.toml", "--seconds", "0"], "--seconds"),
        (&["loadtest", "job.toml", "--churn", "1001"], "--churn"),
        (&["loadtest", "job.toml", "--simulated-workers", "--workers", "2000"], "1000 at most"),
        (
            &["loadtest", "job.toml", "--workers", "16", "--transport", "grpc", "--trace", "t.json"],
            "8 workers or fewer",
        ),
        (&["loadtest", "job.toml", "--trace", "t.json"], "--transport grpc"),
        (&["loadtest", "job.toml", "--report", "no/such/page.html"], "a folder that exists"),
        (&["simulate", "job.toml"], "--compute"),
        (&["simulate", "job.toml", "--compute", "40"], "40ms"),
        (&["simulate", "job.toml", "--from", "other.json"], "--trace FILE"),
    ];
    for (args, wanted) in cases {
        let output = run(dir.path(), args);
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && message.contains(wanted), "{args:?}: {}: {message}", output.status);
    }
}
