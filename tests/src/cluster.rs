//! A running job and one honest worker, for what happens around them.

use crate::{finish, free_port, root, run, start, summary, wait_until};
use std::path::Path;
use std::process::{Child, Output};

/// Steps that take a few seconds.
pub const SHORT: u64 = 6000;

fn train(steps: u64) -> String {
    format!("train.steps={steps}")
}

fn digits() -> String {
    root().join("examples/digits-mlp.toml").display().to_string()
}

/// A coordinator and one honest worker; both end with the test.
pub struct Cluster<'a> {
    dir: &'a Path,
    pub address: String,
    pub coordinator: Option<Child>,
    worker: Child,
}

impl<'a> Cluster<'a> {
    /// Starts the digits job of so many steps, and waits until it moves on.
    pub fn start(dir: &'a Path, steps: u64) -> Cluster<'a> {
        Cluster::of(dir, &digits(), steps)
    }

    /// The same with the job of a file.
    pub fn of(dir: &'a Path, job: &str, steps: u64) -> Cluster<'a> {
        Cluster::by("auto", dir, job, steps)
    }

    /// The digits job of so many steps, whose honest worker shares no memory with the coordinator.
    pub fn by_grpc(dir: &'a Path, steps: u64) -> Cluster<'a> {
        Cluster::by("grpc", dir, &digits(), steps)
    }

    fn by(transport: &str, dir: &'a Path, job: &str, steps: u64) -> Cluster<'a> {
        let address = format!("127.0.0.1:{}", free_port());
        let options = ["--json", "--quiet", "--heartbeat-timeout", "5", "--set", &train(steps)];
        let coordinator = [&["coordinator", job, "--listen", &address], &options[..]].concat();
        let coordinator = Some(start(dir, &coordinator));
        let worker = start(dir, &["worker", "--coordinator", &address, "--transport", transport]);
        let cluster = Cluster { dir, address, coordinator, worker };
        wait_until("the run to move on", || cluster.step() >= Some(20));
        cluster
    }

    /// Runs one of the program's commands about the coordinator.
    pub fn ask(&self, command: &[&str]) -> Output {
        run(self.dir, &[command, &["--coordinator", &self.address]].concat())
    }

    /// The step that `status` shows; `None` where nobody answers.
    pub fn step(&self) -> Option<u64> {
        let out = self.ask(&["status"]);
        let text = String::from_utf8_lossy(&out.stdout).to_string();
        text.split("step ").nth(1)?.split(' ').next()?.parse().ok()
    }

    /// The summary, once both have ended well.
    pub fn end(mut self) -> serde_json::Value {
        let summary = finish(self.coordinator.take().expect("it runs"));
        assert!(self.worker.wait().expect("the worker ends").success(), "the honest worker failed");
        summary
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        for child in self.coordinator.iter_mut().chain([&mut self.worker]) {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// The summary of the same job without strangers.
pub fn undisturbed(steps: u64) -> serde_json::Value {
    undisturbed_of(&digits(), steps)
}

/// The same with the job of a file.
pub fn undisturbed_of(job: &str, steps: u64) -> serde_json::Value {
    let dir = tempfile::tempdir().expect("a folder");
    summary(&run(dir.path(), &["local", job, "--json", "--quiet", "--workers", "1", "--set", &train(steps)]))
}

/// Equal weights, losses and metrics.
pub fn same_result(got: &serde_json::Value, calm: &serde_json::Value) {
    assert_eq!(got["weights_digest"], calm["weights_digest"]);
    assert_eq!(got["train_loss"], calm["train_loss"]);
    assert_eq!(got["eval"], calm["eval"]);
}
