//! `unisono doctor`: what it finds well, and what it says to change.
#![cfg(target_os = "linux")]

use serde_json::Value;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use unisono_tests::cluster::Cluster;
use unisono_tests::{free_port, run};

/// Steps that take longer than the doctor does.
const LONG: u64 = 40_000;

/// For each kind of line whether it is well, and its text.
type Found = BTreeMap<String, (bool, String)>;

/// What it found, of which the exit status says the same; the last word of several lines of one kind counts.
fn doctor(dir: &Path, args: &[&str]) -> Found {
    let output = run(dir, &[&["doctor", "--json"], args].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    let found: Value = serde_json::from_str(text.lines().last().expect("a line")).expect("JSON");
    let lines = found["lines"].as_array().expect("lines");
    let line = |line: &Value| {
        let text = |key: &str| line[key].as_str().expect("a text").to_string();
        (text("what"), (line["ok"].as_bool().expect("a flag"), text("text")))
    };
    let lines: Found = lines.iter().map(line).collect();
    let all_well = lines.values().all(|(is_well, _)| *is_well);
    assert_eq!((found["ok"].as_bool(), output.status.code()), (Some(all_well), Some(i32::from(!all_well))), "{text}");
    lines
}

/// Whether nothing is to be changed, but how TCP sends, which is the machine's affair.
fn well(lines: &Found) -> bool {
    lines.iter().all(|(what, (is_well, _))| *is_well || what == "tcp")
}

#[test]
fn a_machine_that_can_join_a_run_is_well() {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = Cluster::start(dir.path(), LONG);
    let lines = doctor(dir.path(), &["--coordinator", &cluster.address]);
    assert!(well(&lines), "{lines:?}");
    for what in [
        "machine",
        "memory",
        "vectors",
        "numerics",
        "clock",
        "open files",
        "shared memory",
        "version",
        "same bits",
        "clocks",
    ] {
        assert!(lines.contains_key(what), "{what}: {lines:?}");
    }
    assert!(lines["bandwidth"].1.contains("MB/s from there"), "{lines:?}");
    assert!(lines["job's data"].1.starts_with("read here, "), "{lines:?}");
    assert!(cluster.step().is_some_and(|step| step < LONG), "the run goes on");
    drop(cluster);
}

#[test]
fn the_same_data_have_the_same_digest_and_others_another() {
    let dir = tempfile::tempdir().expect("a folder");
    let job = |target: &str| {
        format!(
            "name = \"d\"\ndata = {{ format = \"csv\", train = \"a.csv\", target = \"{target}\", task = \"regression\" }}\n[model]\nkind = \"linear\"\n\
             [train]\npartitions = 1\nmicro_batch = 2\nsteps = 1\nloss = \"mse\"\noptimizer = {{ kind = \"sgd\", lr = 0.1 }}\n"
        )
    };
    std::fs::write(dir.path().join("job.toml"), job("y")).expect("written");
    let digest = |rows: &str| {
        std::fs::write(dir.path().join("a.csv"), format!("x,y\n{rows}")).expect("written");
        let lines = doctor(dir.path(), &["job.toml"]);
        assert!(well(&lines), "{lines:?}");
        lines["data"].1.clone()
    };
    let first = digest("1,2\n3,4\n5,6\n");
    assert!(first.contains("3 samples for training (blake3:"), "{first}");
    assert_eq!(first, digest("1,2\n3,4\n5,6\n"));
    assert_ne!(first, digest("1,2\n3,4\n5,7\n"));
    std::fs::write(dir.path().join("job.toml"), job("z")).expect("written");
    let lines = doctor(dir.path(), &["job.toml"]);
    assert!(!lines["data"].0 && lines["data"].1.contains('z'), "{lines:?}");
}

#[test]
fn what_is_to_be_changed_is_said() {
    let dir = tempfile::tempdir().expect("a folder");
    let port = free_port().to_string();
    let nobody = format!("127.0.0.1:{port}");
    let lines = doctor(dir.path(), &["--coordinator", &nobody]);
    assert!(!lines["coordinator"].0 && lines["coordinator"].1.contains(&nobody), "{lines:?}");

    assert!(run(dir.path(), &["cert", "soon", "--days", "1"]).status.success());
    let lines = doctor(dir.path(), &["--identity", "soon/worker"]);
    let (is_well, text) = &lines["credentials"];
    assert!(!is_well && text.contains("expires in") && text.contains("unisono cert"), "{text}");

    assert!(run(dir.path(), &["cert", "certs"]).status.success());
    let lines = doctor(dir.path(), &["--identity", "certs/worker"]);
    let (is_well, text) = &lines["credentials"];
    assert!(well(&lines) && *is_well && text.contains("worker's") && text.contains("unisono CA"), "{text}");
    let key = dir.path().join("certs/worker/tls.key");
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).expect("its owner may");
    let lines = doctor(dir.path(), &["--identity", "certs/worker"]);
    assert!(!lines["credentials"].0 && lines["credentials"].1.contains("chmod 600"), "{lines:?}");

    // Files that do not belong together.
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).expect("its owner may");
    let lines = doctor(dir.path(), &["--identity", "certs/coordinator"]);
    assert!(well(&lines) && lines["credentials"].1.contains("a coordinator's"), "{lines:?}");
    for (file, words) in [("tls.key", "tls.key cannot be used"), ("ca.crt", "ca.crt beside it has not signed it")] {
        assert!(run(dir.path(), &["cert", file]).status.success());
        std::fs::copy(dir.path().join("certs/worker").join(file), dir.path().join(file).join("worker").join(file))
            .expect("copied");
        let lines = doctor(dir.path(), &["--identity", &format!("{file}/worker")]);
        let (is_well, text) = &lines["credentials"];
        assert!(!is_well && text.contains(words) && text.contains("unisono cert"), "{text}");
    }
}
