//! The promise: the number of workers, their threads and their deaths never change a bit of the result.

use std::path::Path;
use std::process::Child;
use unisono_tests::{finish, free_port, run, signal, start, summary, wait_until};

const STEPS: &str = "train.steps=120";

/// The digest of the digits job under these options.
fn local(options: &[&str]) -> String {
    let dir = tempfile::tempdir().expect("a folder");
    let args: Vec<&str> = ["local", "--json", "--quiet", "--set", STEPS].iter().chain(options).copied().collect();
    summary(&run(dir.path(), &args))["weights_digest"].as_str().expect("a digest").to_string()
}

#[test]
fn any_number_of_workers_and_threads_gives_the_same_weights() {
    let calm = local(&["--workers", "1"]);
    for (workers, threads) in [("2", "1"), ("3", "2"), ("5", "1"), ("8", "1"), ("1", "4")] {
        assert_eq!(local(&["--workers", workers, "--threads", threads]), calm, "{workers} workers, {threads} threads");
    }
}

#[test]
fn another_seed_or_another_cut_gives_other_weights() {
    let calm = local(&["--workers", "2"]);
    assert_ne!(local(&["--workers", "2", "--set", "seed=12345"]), calm);
    assert_ne!(local(&["--workers", "2", "--set", "train.partitions=7"]), calm);
}

#[test]
fn partitions_that_workers_do_not_divide_and_uneven_ends_give_the_same_weights() {
    let odd = ["--set", "train.partitions=7", "--set", "train.micro_batch=9", "--set", "data.partition=hashed"];
    let with = |workers| local(&[&odd[..], &["--workers", workers]].concat());
    let calm = with("1");
    assert_eq!(with("2"), calm);
    assert_eq!(with("5"), calm);
}

/// A coordinator and workers of its own, so that each can be killed by its id.
struct Cluster<'a> {
    dir: &'a Path,
    url: String,
    coordinator: Option<Child>,
    workers: Vec<Child>,
    job: String,
}

impl<'a> Cluster<'a> {
    fn start(dir: &'a Path, steps: u32) -> Cluster<'a> {
        let job = unisono_tests::root().join("examples/digits-mlp.toml").display().to_string();
        let url = format!("127.0.0.1:{}", free_port());
        let mut cluster = Cluster { dir, url, coordinator: None, workers: Vec::new(), job };
        cluster.coordinate(steps, &[]);
        cluster
    }

    fn coordinate(&mut self, steps: u32, more: &[&str]) {
        let steps = format!("train.steps={steps}");
        let mut args = vec!["coordinator", &self.job, "--listen", &self.url, "--json", "--quiet", "--set", &steps];
        args.extend(["--heartbeat-timeout", "1", "--set", "checkpoint.every_steps=50"]);
        args.extend(more);
        self.coordinator = Some(start(self.dir, &args));
    }

    fn worker(&mut self) {
        self.workers.push(start(self.dir, &["worker", "--coordinator", &self.url]));
    }

    fn step(&self) -> u64 {
        let out = run(self.dir, &["status", "--coordinator", &self.url]);
        let text = String::from_utf8_lossy(&out.stdout).to_string();
        text.split("step ").nth(1).and_then(|t| t.split(' ').next()?.parse().ok()).unwrap_or(0)
    }

    fn reach(&self, step: u64) {
        wait_until("the run to move on", || self.step() >= step);
    }

    fn end(mut self) -> serde_json::Value {
        let summary = finish(self.coordinator.take().expect("it was started"));
        for worker in &mut self.workers {
            worker.wait().expect("a worker ends with its job");
        }
        summary
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        for child in self.workers.iter_mut().chain(&mut self.coordinator) {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

#[test]
fn kills_pauses_and_joins_give_the_same_weights() {
    let steps = 3000;
    let calm_dir = tempfile::tempdir().expect("a folder");
    let mut calm = Cluster::start(calm_dir.path(), steps);
    calm.worker();
    let calm = calm.end();

    let dir = tempfile::tempdir().expect("a folder");
    let mut stormy = Cluster::start(dir.path(), steps);
    stormy.worker();
    stormy.worker();
    stormy.worker();
    stormy.reach(100);
    signal(&stormy.workers[0], "KILL");
    stormy.reach(300);
    signal(&stormy.workers[1], "STOP");
    stormy.worker();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    signal(&stormy.workers[1], "CONT");
    let storm = stormy.end();

    assert_eq!(storm["weights_digest"], calm["weights_digest"]);
    assert_eq!(storm["train_loss"], calm["train_loss"]);
    assert_eq!(storm["eval"], calm["eval"]);
    assert!(storm["workers_lost"].as_u64() >= Some(1), "{storm}");
}

#[test]
fn a_killed_coordinator_resumes_to_the_same_weights() {
    let steps = 2000;
    let calm_dir = tempfile::tempdir().expect("a folder");
    let mut calm = Cluster::start(calm_dir.path(), steps);
    calm.worker();
    let calm = calm.end();

    let dir = tempfile::tempdir().expect("a folder");
    let mut cluster = Cluster::start(dir.path(), steps);
    cluster.worker();
    cluster.worker();
    cluster.reach(200);
    let mut dead = cluster.coordinator.take().expect("it runs");
    dead.kill().expect("SIGKILL");
    dead.wait().expect("it is dead");
    cluster.coordinate(steps, &["--resume"]);
    let resumed = cluster.end();
    assert_eq!(resumed["weights_digest"], calm["weights_digest"]);
    assert_eq!(resumed["eval"], calm["eval"]);
    assert_eq!(resumed["samples"], calm["samples"]);
}
