//! However a run ends, it leaves a whole checkpoint or none, and no process. Processes are looked up in /proc.
#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use unisono_tests::{Signal, command, free_port, program, root, signal, signal_id, start, summary, wait_until};

/// The length of a job must not change its learning rate here.
const SHORT: &[&str] = &["local", "--json", "--quiet", "--set", "train.schedule=constant"];

/// Too long to end by itself.
const LONG: &[&str] = &["--workers", "3", "--set", "train.steps=100000000", "--set", "checkpoint.every_steps=20"];

/// State and parent of a process; `None` where there is none.
fn process(id: u32) -> Option<(char, u32)> {
    let text = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// The ids of the processes that `parent` has started.
fn children(parent: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc").expect("/proc").flatten();
    let ids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id| process(*id).is_some_and(|(_, of)| of == parent)).collect()
}

/// Whether a process is there and not just waiting to be taken note of.
fn lives(id: u32) -> bool {
    process(id).is_some_and(|(state, _)| state != 'Z')
}

/// What is in /dev/shm, by name.
fn shared() -> Vec<String> {
    let all = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    all.map(|entry| entry.file_name().to_string_lossy().to_string()).filter(|name| name.contains("unisono")).collect()
}

/// A local run that has begun, with its workers' ids; it ends with the test at the latest.
struct Running {
    child: Option<Child>,
    workers: Vec<u32>,
}

impl Running {
    fn start(dir: &Path, options: &[&str]) -> Running {
        let mut command = command(dir, options);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        let mut run = Running { workers: Vec::new(), child: Some(child) };
        wait_until("the workers", || {
            run.workers = children(run.child().id());
            run.workers.len() == 3
        });
        wait_until("the first checkpoint", || {
            let folder = std::fs::read_dir(dir.join("runs/digits-mlp")).into_iter().flatten().flatten();
            folder.into_iter().any(|e| e.file_name().to_string_lossy().starts_with("step-"))
        });
        run
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("it runs")
    }

    fn end(mut self) -> Output {
        let out = self.child.take().expect("it runs").wait_with_output().expect("it ends");
        wait_until("the workers to be gone", || !self.workers.iter().any(|id| lives(*id)));
        out
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

#[test]
fn ctrl_c_writes_a_checkpoint_and_the_run_goes_on_from_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut run = Running::start(dir.path(), &[SHORT, LONG].concat());
    signal(run.child(), Signal::INT);
    let out = run.end();
    assert_eq!(out.status.code(), Some(130));
    let text = String::from_utf8_lossy(&out.stdout).to_string();
    let stopped: serde_json::Value = serde_json::from_str(text.lines().last().expect("a summary")).expect("JSON");
    assert_eq!(stopped["status"], "stopped");
    let more = format!("train.steps={}", stopped["steps"].as_u64().expect("a number") + 10);
    let options = [SHORT, &["--set", &more]].concat();
    let resumed = unisono_tests::run(dir.path(), &[&options[..], &["--resume"]].concat());
    let calm = tempfile::tempdir().expect("a folder");
    let calm = unisono_tests::run(calm.path(), &[&options[..], &["--workers", "1"]].concat());
    assert_eq!(summary(&resumed)["weights_digest"], summary(&calm)["weights_digest"]);
}

/// Of the tests of a second one is logged, but the last of all is, wherever the run is stopped.
#[test]
fn the_last_test_of_a_stopped_run_is_logged() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut run = Running::start(dir.path(), &[&["local", "--set", "train.eval_every=1"], LONG].concat());
    signal(run.child(), Signal::INT);
    let out = run.end();
    let said = String::from_utf8_lossy(&out.stderr).to_string();
    let tested = said.lines().rfind(|line| line.contains(": test loss")).expect("a test");
    let kept = std::fs::read_dir(dir.path().join("runs/digits-mlp")).expect("a run").flatten();
    let steps = kept.filter_map(|e| e.file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok());
    let last = steps.max().expect("a checkpoint");
    assert!(tested.contains(&format!("step {last}: ")), "{last}: {said}");
}

#[test]
fn a_second_ctrl_c_ends_at_once_and_leaves_no_worker() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut run = Running::start(dir.path(), &[SHORT, LONG].concat());
    // Paused workers cannot finish the step that the first one waits for.
    for id in &run.workers {
        signal_id(*id, Signal::STOP);
    }
    signal(run.child(), Signal::INT);
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(run.child().try_wait().expect("it is ours").is_none(), "the first Ctrl-C did not wait for the step");
    signal(run.child(), Signal::INT);
    assert_eq!(run.end().status.code(), Some(130));
}

#[test]
fn kill_9_of_the_parent_leaves_no_worker() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut run = Running::start(dir.path(), &[SHORT, LONG].concat());
    signal(run.child(), Signal::KILL);
    assert_eq!(run.end().status.code(), None);
    // Shared memory has no name, so nothing of it stays, and the next run begins as any.
    assert_eq!(shared(), [""; 0]);
    let next = unisono_tests::run(dir.path(), &[SHORT, &["--workers", "2", "--transport", "shm"]].concat());
    assert_eq!((&summary(&next)["status"], &summary(&next)["transport"]), (&"done".into(), &"shm".into()));
}

#[test]
fn a_coordinator_without_workers_stops_with_a_checkpoint() {
    let dir = tempfile::tempdir().expect("a folder");
    let job = root().join("examples/digits-mlp.toml").display().to_string();
    let address = format!("127.0.0.1:{}", free_port());
    let options = ["--json", "--quiet", "--set", "train.schedule=constant"];
    let begin = || start(dir.path(), &[&["coordinator", &job, "--listen", &address], &options[..]].concat());
    let answers = || unisono_tests::run(dir.path(), &["status", "--coordinator", &address]).status.success();

    let asked = begin();
    wait_until("the coordinator", answers);
    assert!(unisono_tests::run(dir.path(), &["stop", "--coordinator", &address]).status.success());
    let stopped = summary(&asked.wait_with_output().expect("it ends"));
    assert_eq!((&stopped["status"], &stopped["steps"]), (&"stopped".into(), &0.into()));

    let interrupted = begin();
    wait_until("the coordinator", answers);
    signal(&interrupted, Signal::INT);
    assert_eq!(interrupted.wait_with_output().expect("it ends").status.code(), Some(130));
    let worker = ["local", &job, "--resume", "--workers", "1"];
    let resumed = summary(&unisono_tests::run(dir.path(), &[&worker[..], &options[..]].concat()));
    assert_eq!(resumed["status"], "done");
}

/// A file system without room: checkpoints are refused with a reason, nothing half-written stays, and a run whose last one
/// cannot be written fails.
#[test]
fn a_full_disk_is_named_and_leaves_nothing_half_written() {
    let dir = tempfile::tempdir().expect("a folder");
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).expect("made");
    // A private mount, which needs no rights where user namespaces are allowed.
    let script = r#"
        mount -t tmpfs -o size=128k tmpfs disk || exit 99
        "$0" local --quiet --workers 2 --set checkpoint.dir=disk/kept --set checkpoint.every_steps=200
        code=$?
        find disk -name '*.partial' -o -name 'step-*'
        exit $code
    "#;
    let out = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script])
        .arg(program())
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .output();
    let Some(out) = out.ok().filter(|o| ![Some(99), None].contains(&o.status.code())) else {
        eprintln!("skipped: this machine does not let a test mount a small file system");
        return;
    };
    let error = String::from_utf8_lossy(&out.stderr).to_string();
    if error.contains("unshare") {
        eprintln!("skipped: {error}");
        return;
    }
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(error.contains("No space left on device") && error.contains("disk/kept"), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "", "left on the disk");
}
