//! What the whole-system tests share: running the real program, and reading its summary.

pub use rustix::process::Signal;
pub mod cluster;

use rustix::process::{Pid, kill_process};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The program under test, built once.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        // With the tests' own profile and features: `cargo test` alone is enough, and has built all but the program.
        let mut command = Command::new(cargo);
        // What cargo tells a test of its package would have crates built anew that ask for it.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"].iter().any(|own| name.starts_with(own)) {
                command.env_remove(&*name);
            }
        }
        let built = command
            .args(["build", "--workspace", "--all-targets", "--profile", "test", "--message-format=json"])
            .current_dir(root())
            .stderr(Stdio::inherit())
            .output()
            .expect("cargo runs");
        assert!(built.status.success(), "the program does not build");
        String::from_utf8_lossy(&built.stdout)
            .lines()
            .filter_map(|l| serde_json::from_str::<Value>(l).ok())
            .find(|m| m["target"]["kind"][0] == "bin" && m["profile"]["test"] == false && m["executable"].is_string())
            .map(|m| PathBuf::from(m["executable"].as_str().unwrap_or_default()))
            .expect("cargo names the program")
    })
}

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the root")
}

/// The program in a folder of its own.
pub fn command(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(args).current_dir(dir).stdin(Stdio::null());
    command
}

/// Runs the program in a folder of its own and gives what it printed.
pub fn run(dir: &Path, args: &[&str]) -> Output {
    command(dir, args).output().expect("the program starts")
}

/// [`run`] with the kernels of one instruction set.
pub fn run_on(isa: &str, dir: &Path, args: &[&str]) -> Output {
    command(dir, args).env("UNISONO_ISA", isa).output().expect("the program starts")
}

/// Starts the program in the background; its stdout is kept for [`finish`].
pub fn start(dir: &Path, args: &[&str]) -> Child {
    command(dir, args).stdout(Stdio::piped()).spawn().expect("the program starts")
}

/// [`start`] with the kernels of one instruction set.
pub fn start_on(isa: &str, dir: &Path, args: &[&str]) -> Child {
    command(dir, args).env("UNISONO_ISA", isa).stdout(Stdio::piped()).spawn().expect("the program starts")
}

/// The summary of a run that must succeed.
pub fn summary(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}\n{text}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(text.lines().last().expect("a summary")).expect("the summary is JSON")
}

/// Waits for a child and gives its summary.
pub fn finish(child: Child) -> Value {
    summary(&child.wait_with_output().expect("the program ends"))
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it has an address").port()
}

/// Waits until `ready` is true, at most a minute.
pub fn wait_until(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited a minute for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a signal to a process of ours.
pub fn signal(child: &Child, signal: Signal) {
    signal_id(child.id(), signal);
}

/// Sends a signal to a process by its id.
pub fn signal_id(id: u32, signal: Signal) {
    let id = Pid::from_raw(id as i32).expect("an id");
    kill_process(id, signal).expect("the process is there");
}

/// The most memory that a process has held, in MiB; `None` where the system does not say, or it is gone.
pub fn peak(child: &Child) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
    let kib: f64 = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib / 1024.0)
}
