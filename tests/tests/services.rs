//! What managers of processes need: a health check, workers that leave in order, and coordinators that go on by themselves.

use std::path::{Path, PathBuf};
use std::process::{Child, Output};
use unisono_tests::cluster::{same_result, undisturbed};
use unisono_tests::{Signal, finish, free_port, root, run, signal, start, summary, wait_until};

/// Steps that take a few seconds.
const STEPS: u64 = 8000;

fn error(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into()
}

/// A coordinator's address and folder, and the processes around it, which end with the test.
struct Place {
    dir: tempfile::TempDir,
    address: String,
    children: Vec<Child>,
}

impl Place {
    fn new() -> Place {
        let address = format!("127.0.0.1:{}", free_port());
        Place { dir: tempfile::tempdir().expect("a folder"), address, children: Vec::new() }
    }

    fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn coordinator(&self, steps: u64, more: &[&str]) -> Child {
        let (job, steps) = (root().join("examples/digits-mlp.toml"), format!("train.steps={steps}"));
        let job = job.to_str().expect("UTF-8");
        let args = ["coordinator", job, "--listen", &self.address, "--json", "--set", &steps];
        start(self.dir(), &[&args[..], more].concat())
    }

    fn worker(&self, transport: &str) -> Child {
        start(self.dir(), &["worker", "--coordinator", &self.address, "--transport", transport, "--patience", "60"])
    }

    /// Keeps a process until the test ends, and gives its place.
    fn keep(&mut self, child: Child) -> usize {
        self.children.push(child);
        self.children.len() - 1
    }

    fn take(&mut self) -> Child {
        self.children.remove(0)
    }

    fn status(&self) -> Option<serde_json::Value> {
        let out = run(self.dir(), &["status", "--json", "--coordinator", &self.address]);
        out.status.success().then(|| summary(&out))
    }

    /// Waits until so many workers have come so far.
    fn wait_for(&self, workers: usize, step: u64) {
        wait_until("the workers", || {
            self.status().is_some_and(|s| {
                s["workers"].as_array().is_some_and(|all| all.len() == workers) && s["steps"].as_u64() >= Some(step)
            })
        });
    }

    fn health(&self, more: &[&str]) -> Output {
        run(self.dir(), &[&["health", "--coordinator", &self.address], more].concat())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for child in &mut self.children {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

#[test]
fn a_worker_that_is_told_to_end_does_its_share_first() {
    for transport in ["shm", "grpc"] {
        let mut place = Place::new();
        place.keep(place.coordinator(STEPS, &[]));
        place.keep(place.worker(transport));
        let leaving = place.keep(place.worker(transport));
        place.wait_for(2, 20);
        // Managers of processes may send it more than once.
        signal(&place.children[leaving], Signal::TERM);
        signal(&place.children[leaving], Signal::TERM);
        let ended = place.children.remove(leaving).wait_with_output().expect("it ends");
        assert_eq!(ended.status.code(), Some(130));
        let summary = finish(place.take());
        assert_eq!((&summary["workers_lost"], &summary["partitions_reissued"]), (&0.into(), &0.into()));
        assert_eq!(summary["workers_joined"], 2);
        same_result(&summary, &undisturbed(STEPS));
    }
}

#[test]
fn a_worker_that_has_not_joined_ends_at_once() {
    let mut place = Place::new();
    place.keep(place.worker("auto"));
    #[cfg(target_os = "linux")]
    wait_until("it to listen to signals", || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", place.children[0].id())).expect("it runs");
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).expect("proc_pid_status(5)");
        u64::from_str_radix(caught.trim(), 16).expect("a mask") & 1 << (Signal::TERM.as_raw() - 1) != 0
    });
    #[cfg(not(target_os = "linux"))]
    std::thread::sleep(std::time::Duration::from_secs(2));
    signal(&place.children[0], Signal::TERM);
    assert_eq!(place.take().wait_with_output().expect("it ends").status.code(), Some(130));
}

#[test]
fn workers_wait_for_an_interrupted_coordinator_which_goes_on() {
    let mut place = Place::new();
    let auto = ["--resume=auto", "--set", "checkpoint.every_steps=0"];
    place.keep(place.coordinator(STEPS, &auto));
    place.keep(place.worker("auto"));
    place.wait_for(1, 20);
    let interrupted = place.take();
    signal(&interrupted, Signal::TERM);
    signal(&interrupted, Signal::TERM);
    let out = interrupted.wait_with_output().expect("it ends");
    assert_eq!(out.status.code(), Some(130));
    let text = String::from_utf8_lossy(&out.stdout).to_string();
    let stopped: serde_json::Value = serde_json::from_str(text.lines().last().expect("a summary")).expect("JSON");
    assert!(stopped["steps"].as_u64().is_some_and(|steps| (20..STEPS).contains(&steps)), "{stopped}");
    let resumed = finish(place.coordinator(STEPS, &auto));
    assert!(place.take().wait_with_output().expect("it ends").status.success(), "the worker did not wait");
    assert_eq!(resumed["workers_joined"], 1);
    same_result(&resumed, &undisturbed(STEPS));
    // Once more, and there is nothing to do.
    same_result(&finish(place.coordinator(STEPS, &auto)), &resumed);
}

#[test]
fn a_run_that_has_trained_nothing_leaves_an_earlier_one_where_it_is() {
    let mut place = Place::new();
    let train = |place: &Place| {
        let args = ["local", "--quiet", "--json", "--workers", "1", "--set", "train.steps=20"];
        summary(&run(place.dir(), &args))
    };
    let before = train(&place);
    let checkpoint = place.dir().join(before["checkpoint"].as_str().expect("a path"));
    let previous = checkpoint.parent().expect("the run's folder").join("previous-1");
    place.keep(place.coordinator(STEPS, &[]));
    wait_until("it to listen", || place.health(&[]).status.success());
    signal(&place.children[0], Signal::TERM);
    let out = place.take().wait_with_output().expect("it ends");
    assert_eq!(out.status.code(), Some(130), "{}", error(&out));
    let stopped: serde_json::Value = serde_json::from_slice(&out.stdout).expect("a summary");
    assert_eq!((&stopped["steps"], &stopped["checkpoint"]), (&0.into(), &"".into()));
    assert!(checkpoint.is_dir() && !previous.exists());
    // One that trains moves it, and says where what was there is.
    assert_eq!(train(&place)["weights_digest"], before["weights_digest"]);
    assert!(checkpoint.is_dir() && previous.is_dir());
    std::fs::remove_dir_all(&checkpoint).expect("removed");
    let out = run(place.dir(), &["local", "--resume", "--quiet", "--set", "train.steps=20"]);
    assert!(
        error(&out).contains("those of an earlier run are in") && error(&out).contains("previous-1"),
        "{}",
        error(&out)
    );
}

#[test]
fn damaged_checkpoints_are_no_reason_to_begin_afresh() {
    let dir = tempfile::tempdir().expect("a folder");
    let local = |more: &[&str]| {
        let args = ["local", "--quiet", "--json", "--workers", "1", "--set", "train.steps=20", "--resume=auto"];
        run(dir.path(), &[&args[..], more].concat())
    };
    let checkpoint = PathBuf::from(summary(&local(&[]))["checkpoint"].as_str().expect("a path"));
    std::fs::write(dir.path().join(checkpoint).join("weights.safetensors"), "x").expect("written");
    let out = local(&[]);
    assert_eq!(out.status.code(), Some(2), "{}", error(&out));
    assert!(error(&out).contains("damaged") && error(&out).contains("no whole checkpoint"), "{}", error(&out));
    let wrong = local(&["--resume=perhaps"]);
    assert_eq!(wrong.status.code(), Some(2), "{}", error(&wrong));
}

#[test]
fn health_is_asked_for_and_a_coordinator_that_lingers_has_it() {
    let mut place = Place::new();
    let nobody = place.health(&[]);
    assert_eq!(nobody.status.code(), Some(1), "{}", error(&nobody));
    assert!(error(&nobody).contains("cannot reach a coordinator"), "{}", error(&nobody));

    assert!(run(place.dir(), &["cert", "certs"]).status.success());
    place.keep(place.coordinator(50, &["--identity", "certs/coordinator", "--linger"]));
    let healthy = |place: &Place, identity: &str| place.health(&["--identity", identity]).status.code() == Some(0);
    wait_until("the coordinator", || healthy(&place, "certs/coordinator"));
    let join = ["worker", "--coordinator", &place.address, "--identity", "certs/join"];
    assert!(run(place.dir(), &join).status.success());
    // The run is over, and those who ask for no more than that it serves are answered.
    for identity in ["certs/coordinator", "certs/worker", "certs/join"] {
        wait_until("the coordinator", || healthy(&place, identity));
    }
    assert_eq!(place.health(&[]).status.code(), Some(1), "it speaks TLS");
    let late = run(place.dir(), &[&join[..], &["--patience", "1"]].concat());
    assert_eq!(late.status.code(), Some(1), "a worker waits for the next run: {}", error(&late));
    assert!(place.children[0].try_wait().expect("it is ours").is_none(), "it did not linger");
    signal(&place.children[0], Signal::TERM);
    assert_eq!(finish(place.take())["status"], "done");
}
