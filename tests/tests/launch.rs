//! `unisono launch` with an ssh whose hosts are folders of this machine. Processes are looked up in /proc.
//! Real hosts, with an sshd each, are in `tests/hosts`.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use unisono_tests::cluster::{SHORT, same_result, undisturbed};
use unisono_tests::{Signal, program, run, signal, signal_id, summary, wait_until};

const SSH: &str = r#"#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
home="$(cd "$(dirname "$0")" && pwd)/${1#*@}"
if [ -e "$home.denied" ]; then echo "$1: Permission denied (publickey)." >&2; exit 255; fi
if [ ! -d "$home" ]; then echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255; fi
export HOME="$home" SSH_CONNECTION="127.0.0.1 1 127.0.0.1 22"
unset XDG_CACHE_HOME
cd "$home" && shift && exec sh -c "$*"
"#;

/// Too long to end by itself.
const LONG: &[&str] = &["--set", "train.steps=100000000", "--set", "train.schedule=constant"];

/// A folder with hosts in it.
struct Hosts(tempfile::TempDir);

impl Hosts {
    /// These hosts, of which those in `up` can be reached.
    fn new(file: &str, up: &[&str]) -> Hosts {
        let hosts = Hosts(tempfile::tempdir().expect("a folder"));
        fs::write(hosts.dir().join("hosts"), file).expect("written");
        let ssh = hosts.dir().join("ssh");
        fs::write(&ssh, SSH).expect("written");
        fs::set_permissions(&ssh, PermissionsExt::from_mode(0o700)).expect("its own");
        up.iter().for_each(|host| hosts.up(host));
        hosts
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }

    fn up(&self, host: &str) {
        fs::create_dir(self.dir().join(host)).expect("a folder");
    }

    fn args<'a>(&self, more: &[&'a str]) -> Vec<&'a str> {
        [&["launch", "--hosts", "hosts", "--ssh", "./ssh", "--transport", "grpc", "--json"], more].concat()
    }

    fn launch(&self, more: &[&str]) -> Output {
        run(self.dir(), &self.args(more))
    }

    /// The same in the background; its log is a file.
    fn start(&self, more: &[&str]) -> Launch<'_> {
        let log = File::create(self.dir().join("log")).expect("a file");
        let mut command = Command::new(program());
        let child = command.args(self.args(more)).current_dir(self.dir()).stdin(Stdio::null()).stdout(Stdio::piped());
        Launch { hosts: self, child: Some(child.stderr(log).spawn().expect("the program starts")) }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir().join("log")).expect("a log")
    }

    /// The workers on a host, which work in its folder.
    fn workers(&self, host: &str) -> Vec<u32> {
        let home = self.dir().canonicalize().expect("a folder").join(host);
        let is_worker = |id: &u32| {
            let process = PathBuf::from(format!("/proc/{id}"));
            let in_it = fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == home);
            in_it && fs::read(process.join("cmdline")).is_ok_and(|line| text(&line).contains("unisono\0worker"))
        };
        let all = fs::read_dir("/proc").expect("/proc").flatten();
        all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_worker).collect()
    }

    /// The files on a host.
    fn files(&self, host: &str) -> Vec<PathBuf> {
        let (mut folders, mut files) = (vec![self.dir().join(host)], Vec::new());
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("a folder").flatten() {
                if entry.path().is_dir() { folders.push(entry.path()) } else { files.push(entry.path()) }
            }
        }
        files
    }
}

/// A run; it ends with the test.
struct Launch<'a> {
    hosts: &'a Hosts,
    child: Option<Child>,
}

impl Launch<'_> {
    fn signal(&self, kind: Signal) {
        signal(self.child.as_ref().expect("it runs"), kind);
    }

    /// Waits until a host has so many workers, and the run has more than begun.
    fn has(&self, host: &str, workers: usize) -> Vec<u32> {
        wait_until(&format!("{workers} workers of {host}"), || self.hosts.workers(host).len() == workers);
        wait_until("a step", || self.hosts.log().contains("step "));
        self.hosts.workers(host)
    }

    /// Where its coordinator listens.
    fn url(&self) -> String {
        let log = self.hosts.log();
        let port = log.split("listening on https://0.0.0.0:").nth(1).and_then(|rest| rest.split_whitespace().next());
        format!("https://127.0.0.1:{}", port.expect("it says where"))
    }

    fn end(mut self) -> Output {
        self.child.take().expect("it runs").wait_with_output().expect("it ends")
    }
}

impl Drop for Launch<'_> {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into()
}

#[test]
fn hosts_give_the_local_runs_weights_and_get_the_program_once() {
    let hosts = Hosts::new("# both\none slots=2 threads=1\nme@two threads=2\n", &["one", "two"]);
    let calm = undisturbed(SHORT);
    let steps = format!("train.steps={SHORT}");
    let dir = |name: &str| format!("checkpoint.dir={name}");
    let copied = |out: &Output| text(&out.stderr).matches("copying unisono to ").count();
    let out = hosts.launch(&["--set", &steps]);
    let done = summary(&out);
    same_result(&done, &calm);
    assert_eq!((&done["workers"], &done["transport"]), (&3.into(), &"grpc".into()));
    assert_eq!(copied(&out), 2, "{}", text(&out.stderr));
    for line in ["one/1| ", "one/2| ", "two| "] {
        assert!(text(&out.stderr).lines().any(|l| l.starts_with(line)), "no line of {line}: {}", text(&out.stderr));
    }
    assert!(["one", "two"].iter().all(|host| hosts.workers(host).is_empty()), "a worker outlives the run");
    assert!(!text(&out.stderr).contains("took no part"), "{}", text(&out.stderr));

    // It is there now, but not where a copy was broken off.
    let there = hosts.files("one");
    assert_eq!(there.len(), 1, "{there:?}");
    assert_eq!(fs::metadata(&there[0]).expect("a file").permissions().mode() & 0o777, 0o700);
    fs::rename(&there[0], there[0].with_file_name("part.x")).expect("renamed");
    let again = hosts.launch(&["--set", &steps, "--quiet", "--set", &dir("again")]);
    assert_eq!(summary(&again)["weights_digest"], calm["weights_digest"]);
    assert_eq!(text(&again.stderr), "", "quiet is quiet on all hosts");
    assert_eq!(hosts.files("one").len(), 2);
    // One that is there by itself is used as it is.
    fs::write(hosts.dir().join("hosts"), format!("one binary={}\n", program().display())).expect("written");
    fs::remove_dir_all(hosts.dir().join("one/.cache")).expect("removed");
    let own = hosts.launch(&["--set", &steps, "--set", &dir("own")]);
    assert_eq!((&summary(&own)["weights_digest"], copied(&own)), (&calm["weights_digest"], 0));
    assert_eq!(hosts.files("one"), [""; 0].map(PathBuf::from));
}

#[test]
fn ctrl_c_and_kill_9_leave_nothing_on_any_host() {
    let hosts = Hosts::new("one slots=2\ntwo\n", &["one", "two"]);
    for kind in [Signal::INT, Signal::KILL] {
        let launch = hosts.start(LONG);
        launch.has("one", 2);
        launch.has("two", 1);
        launch.signal(kind);
        let out = launch.end();
        if kind == Signal::INT {
            assert_eq!(out.status.code(), Some(130), "{}", hosts.log());
            let done: serde_json::Value = serde_json::from_str(text(&out.stdout).trim()).expect("a summary");
            assert_eq!(done["status"], "stopped");
            assert!(["one", "two"].iter().all(|host| hosts.workers(host).is_empty()), "a worker outlives the run");
        }
        wait_until("all to be gone", || ["one", "two"].iter().all(|host| hosts.workers(host).is_empty()));
    }
}

#[test]
fn who_is_dead_is_started_again_and_the_others_go_on() {
    let hosts = Hosts::new("one\ntwo\n", &["one"]);
    let launch = hosts.start(LONG);
    let first = launch.has("one", 1)[0];
    assert!(hosts.log().contains("two: ssh: connect to host two port 22: No route to host"), "{}", hosts.log());
    hosts.up("two");
    launch.has("two", 1);
    signal_id(first, Signal::KILL);
    wait_until("another worker", || hosts.workers("one").first().is_some_and(|id| *id != first));
    assert!(hosts.log().contains("one: ") && hosts.log().contains("trying again in 1 s"), "{}", hosts.log());
    launch.signal(Signal::INT);
    let out = launch.end();
    let done: serde_json::Value = serde_json::from_str(text(&out.stdout).trim()).expect("a summary");
    assert!(done["workers_lost"].as_u64() >= Some(1), "{done}");
    let steps = format!("train.steps={}", done["steps"]);
    let calm = ["local", "--json", "--quiet", "--workers", "1", "--set", "train.schedule=constant", "--set", &steps];
    let calm = summary(&run(hosts.dir(), &[&calm[..], &["--set", "checkpoint.dir=calm"]].concat()));
    assert_eq!(done["weights_digest"], calm["weights_digest"]);
}

#[test]
fn a_host_that_took_no_part_is_named_at_the_end() {
    let hosts = Hosts::new("one\ntwo\n", &["one"]);
    let out = hosts.launch(&["--set", "train.steps=50"]);
    assert_eq!(summary(&out)["workers"], 1);
    let last = text(&out.stderr).lines().last().map(String::from).unwrap_or_default();
    assert!(last.contains("two took no part: ssh: connect to host two port 22"), "{last}");
    assert!(!text(&out.stderr).contains("one took no part"), "{}", text(&out.stderr));
}

#[test]
fn where_no_host_works_each_is_named_with_a_way_out() {
    let hosts = Hosts::new("one\nme@two slots=3\n", &[]);
    File::create(hosts.dir().join("one.denied")).expect("a file");
    let out = hosts.launch(&[]);
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{error}");
    let (_, end) = error.split_once("unisono: no host works:\n").expect("it says so");
    let lines: Vec<&str> = end.lines().collect();
    assert_eq!(lines.len(), 2, "{end}");
    assert!(
        lines[0].contains("one (hosts:1): one: Permission denied") && lines[0].contains("ssh-copy-id one"),
        "{end}"
    );
    assert!(lines[1].contains("two (hosts:2): ssh: connect") && lines[1].contains("`ssh me@two`"), "{end}");

    // A program that is for something else, or is not there.
    fs::write(hosts.dir().join("hosts"), "three binary=/bin/none\n").expect("written");
    hosts.up("three");
    let out = hosts.launch(&[]);
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(error.contains("there is no program /bin/none there") && error.contains("`binary` in hosts:1"), "{error}");
    fs::write(hosts.dir().join("hosts"), "three\n").expect("written");
    let other = SSH.replace("cd \"$home\"", "PATH=\"$home:$PATH\"; cd \"$home\"");
    fs::write(hosts.dir().join("ssh"), other).expect("written");
    fs::write(hosts.dir().join("three/uname"), "#!/bin/sh\necho Linux riscv64\n").expect("written");
    fs::set_permissions(hosts.dir().join("three/uname"), PermissionsExt::from_mode(0o700)).expect("its own");
    let out = hosts.launch(&[]);
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(
        error.contains("it is Linux riscv64, and this program is for Linux ") && error.contains("binary=PATH"),
        "{error}"
    );
}

/// What asks for shared memory where the run has none, and so is refused.
const REFUSED: &str = r#"#!/bin/sh
for a; do shift; if [ "$a" = grpc ]; then a=shm; fi; set -- "$@" "$a"; done
exec PROGRAM "$@"
"#;

#[test]
fn a_worker_that_is_refused_is_not_tried_again() {
    let hosts = Hosts::new("one binary=~/refused\n", &["one"]);
    let refused = hosts.dir().join("one/refused");
    fs::write(&refused, REFUSED.replace("PROGRAM", program().to_str().expect("UTF-8"))).expect("written");
    fs::set_permissions(&refused, PermissionsExt::from_mode(0o700)).expect("its own");
    let out = hosts.launch(LONG);
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{error}");
    assert!(error.contains("the coordinator offers no shared memory") && error.contains("not tried again"), "{error}");
    assert!(error.contains("no host works:\n  one (hosts:1): the worker ended"), "{error}");
    // Others go on.
    fs::write(hosts.dir().join("hosts"), "one binary=~/refused\ntwo\n").expect("written");
    hosts.up("two");
    let out = hosts.launch(&["--set", &format!("train.steps={SHORT}")]);
    same_result(&summary(&out), &undisturbed(SHORT));
}

#[test]
fn whoever_drains_all_workers_is_told_so() {
    let hosts = Hosts::new("one\n", &["one"]);
    let launch = hosts.start(&[&["--certs", "certs"], LONG].concat());
    launch.has("one", 1);
    let drained = run(hosts.dir(), &["drain", "1", "--coordinator", &launch.url(), "--identity", "certs/operator"]);
    assert!(drained.status.success(), "{}", text(&drained.stderr));
    wait_until("it to be said", || hosts.log().contains("none comes from any host"));
    launch.signal(Signal::INT);
    assert_eq!(launch.end().status.code(), Some(130));
}

#[test]
fn mistakes_of_the_command_line_start_nothing() {
    let hosts = Hosts::new("one\ntwo slot=2\n", &["one", "two"]);
    let wrong = |more: &[&str], words: &[&str]| {
        let out = hosts.launch(more);
        let error = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{words:?}: {error}");
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    };
    wrong(&[], &["hosts:2: unknown key `slot`", "slots"]);
    fs::write(hosts.dir().join("hosts"), "one\n").expect("written");
    wrong(&["--listen", "here"], &["cannot listen on here", "--listen"]);
    let out = run(hosts.dir(), &["launch", "--hosts", "hosts", "--ssh", " "]);
    assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("--ssh names no program"), "{}", text(&out.stderr));
    wrong(&["--advertise", "here:7070"], &["--advertise is a name or an address", "`here:7070`", "--listen"]);
    wrong(&["nothing.toml"], &["nothing.toml"]);
    fs::remove_file(hosts.dir().join("hosts")).expect("removed");
    wrong(&[], &["hosts file hosts"]);
    assert!(hosts.files("one").is_empty() && !hosts.dir().join("runs").exists(), "something was started");
}

#[test]
fn keys_are_in_no_log_no_list_of_processes_and_on_no_host() {
    let hosts = Hosts::new("one\ntwo\n", &["one", "two"]);
    let launch = hosts.start(&[&["--certs", "certs", "-v"], LONG].concat());
    let workers = [launch.has("one", 1), launch.has("two", 1)].concat();
    let read = |file: &str| fs::read_to_string(hosts.dir().join("certs").join(file)).expect("a file");
    let files = ["ca/ca.key", "coordinator/tls.key", "worker/tls.key", "operator/tls.key", "join/token"];
    // The longest line is the secret, the others are PEM's frame.
    let secrets = files.map(|file| read(file).lines().max_by_key(|line| line.len()).expect("a line").to_string());
    let mut seen = vec![hosts.log()];
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let of = |file: &str| text(&fs::read(entry.path().join(file)).unwrap_or_default());
        seen.extend([of("cmdline"), of("environ")]);
    }
    for secret in &secrets {
        assert!(secret.len() > 40 && !seen.iter().any(|text| text.contains(secret)), "a secret can be seen");
    }
    for host in ["one", "two"] {
        let files = hosts.files(host);
        assert!(files.iter().all(|file| file.file_name().is_some_and(|name| name == "unisono")), "{files:?}");
    }
    // Whoever has the operator's may steer it.
    let url = launch.url();
    wait_until("both to be seen by their names", || {
        let status = run(hosts.dir(), &["status", "--coordinator", &url, "--identity", "certs/operator"]);
        ["  one", "  two"].iter().all(|name| text(&status.stdout).contains(name))
    });
    assert!(run(hosts.dir(), &["stop", "--coordinator", &url, "--identity", "certs/operator"]).status.success());
    let out = launch.end();
    assert_eq!(summary(&out)["status"], "stopped");
    assert!(!workers.iter().any(|id| Path::new(&format!("/proc/{id}")).exists()), "a worker outlives the run");

    // Without --certs nothing of them stays here, either.
    fs::create_dir(hosts.dir().join("tmp")).expect("a folder");
    let mut command = Command::new(program());
    command
        .args(hosts.args(&["--set", "train.steps=20"]))
        .current_dir(hosts.dir())
        .env("TMPDIR", hosts.dir().join("tmp"));
    summary(&command.stdin(Stdio::null()).output().expect("the program starts"));
    assert_eq!(fs::read_dir(hosts.dir().join("tmp")).expect("a folder").count(), 0);
}

#[test]
fn a_worker_takes_no_identity_but_a_launchers() {
    let dir = tempfile::tempdir().expect("a folder");
    let out = run(dir.path(), &["worker", "--coordinator", "https://127.0.0.1:1", "--identity-stdin"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("no identity of `unisono launch`"), "{}", text(&out.stderr));
}
