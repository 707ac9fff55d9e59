//! Who may join and steer a run: certificates, join tokens, roles; what is refused is said on both sides, and the run goes on.

use std::cell::RefCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tonic::transport::{Certificate, Channel, ClientTlsConfig};
use tonic::{Code, Status};
use unisono_proto::identity::Role;
use unisono_proto::v1;
use unisono_tests::cluster::{SHORT, same_result, undisturbed};
use unisono_tests::{free_port, program, root, run, summary, wait_until};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into()
}

/// Fails with this status, and says these words, whatever else it says.
fn fails(out: &Output, code: i32, words: &[&str]) {
    let error = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{words:?}: {error}");
    assert!(words.iter().all(|word| error.contains(word)) && !error.contains("panicked"), "{words:?}: {error}");
}

/// A folder with the identities of `unisono cert`.
fn certs(dir: &Path, name: &str) -> PathBuf {
    let made = run(dir, &["cert", name, "--host", "127.0.0.1"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    dir.join(name)
}

/// A copy of an identity, of which `change` makes another.
fn changed(of: &Path, name: &str, change: impl FnOnce(&Path)) -> PathBuf {
    let to = of.parent().expect("a folder").join(name);
    fs::create_dir(&to).expect("a folder");
    for file in fs::read_dir(of).expect("a folder") {
        let file = file.expect("a file").path();
        fs::copy(&file, to.join(file.file_name().expect("a name"))).expect("copied");
    }
    change(&to);
    to
}

/// Signs a worker's certificate that has expired.
fn expired(ca: &Path, identity: &Path) {
    let read = |file: &str| fs::read_to_string(ca.join(file)).expect("a file");
    let key = rcgen::KeyPair::from_pem(&read("ca.key")).expect("a key");
    let issuer = rcgen::Issuer::from_ca_cert_pem(&read("ca.crt"), key).expect("an authority");
    let mut params = rcgen::CertificateParams::new(vec![Role::Worker.name().into()]).expect("a name");
    (params.not_before, params.not_after) = (rcgen::date_time_ymd(2020, 1, 1), rcgen::date_time_ymd(2021, 1, 1));
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let mine = rcgen::KeyPair::generate().expect("a key");
    fs::write(identity.join("tls.crt"), params.signed_by(&mine, &issuer).expect("signed").pem()).expect("written");
    fs::write(identity.join("tls.key"), mine.serialize_pem()).expect("written");
}

/// A run by TLS: a coordinator and a worker that log all they can.
struct Run<'a> {
    dir: &'a Path,
    certs: PathBuf,
    url: String,
    children: Vec<Child>,
    /// What commands about it have printed.
    said: RefCell<String>,
}

impl<'a> Run<'a> {
    fn start(dir: &'a Path, steps: u64) -> Run<'a> {
        let certs = certs(dir, "certs");
        let address = format!("127.0.0.1:{}", free_port());
        let url = format!("https://{address}");
        let mut run = Run { dir, certs, url, children: Vec::new(), said: RefCell::default() };
        let (job, steps) = (root().join("examples/digits-mlp.toml"), format!("train.steps={steps}"));
        let job = job.to_str().expect("UTF-8");
        let coordinator = ["coordinator", job, "--listen", &address, "--json", "-v", "--set", &steps];
        run.child("coordinator", &coordinator, None);
        run.child("worker", &["worker", "--coordinator", &run.url.clone(), "--transport", "grpc", "-v"], None);
        wait_until("the run to move on", || {
            let status = text(&run.ask("operator", &["status"]).stdout);
            status.split("step ").nth(1).is_some_and(|rest| !rest.starts_with("0 "))
        });
        run
    }

    /// Starts a command as the one of this name, with a token in its environment; its log is a file of this name.
    fn child(&mut self, name: &str, args: &[&str], token: Option<&str>) {
        let log = File::create(self.dir.join(name).with_extension("log")).expect("a file");
        let mut command = Command::new(program());
        command.args(args).current_dir(self.dir).env("UNISONO_IDENTITY", self.certs.join(name));
        command.envs(token.map(|token| ("UNISONO_TOKEN", token)));
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn();
        self.children.push(child.expect("the program starts"));
    }

    /// A command about the coordinator, with the identity of a folder.
    fn ask(&self, identity: &str, command: &[&str]) -> Output {
        let identity = self.certs.join(identity);
        let more = ["--coordinator", &self.url, "--identity", identity.to_str().expect("UTF-8")];
        let out = run(self.dir, &[command, &more].concat());
        self.said.borrow_mut().extend([text(&out.stdout), text(&out.stderr)]);
        out
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(name).with_extension("log")).expect("a log")
    }

    /// The summary, once all have ended well.
    fn end(mut self) -> serde_json::Value {
        let mut ended = self.children.drain(..);
        let coordinator = ended.next().expect("it runs").wait_with_output().expect("it ends");
        for worker in ended {
            assert!(worker.wait_with_output().expect("it ends").status.success(), "a worker failed");
        }
        summary(&coordinator)
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        for child in &mut self.children {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// A worker that the coordinator will not have; it must not try again and again.
const WORKER: &[&str] = &["worker", "--patience", "20"];

#[test]
fn only_who_shows_the_right_credentials_joins_and_steers() {
    let dir = tempfile::tempdir().expect("a folder");
    let run = Run::start(dir.path(), SHORT);
    let folder = run.certs.clone();
    let of = |name: &str| folder.join(name);
    let (worker, join) = (of("worker"), of("join"));

    // Of another authority: the coordinator's is not believed, and with its CA at hand, the worker's is not.
    let other = certs(dir.path(), "other");
    changed(&worker, "stranger-there", |to| {
        fs::copy(other.join("ca/ca.crt"), to.join("ca.crt")).expect("copied");
    });
    let mistaken = run.ask("stranger-there", WORKER);
    fails(&mistaken, 1, &["the certificate of https://", "of another CA", "--identity"]);
    assert!(!text(&mistaken.stderr).contains("tried for"), "it tried again: {}", text(&mistaken.stderr));
    changed(&worker, "stranger", |to| {
        for file in ["tls.crt", "tls.key"] {
            fs::copy(other.join("worker").join(file), to.join(file)).expect("copied");
        }
    });
    fails(
        &run.ask("stranger", WORKER),
        1,
        &["the certificate is of another CA than the coordinator's", "unisono cert"],
    );
    changed(&worker, "old", |to| expired(&of("ca"), to));
    fails(&run.ask("old", WORKER), 1, &["the certificate has expired", "unisono cert"]);
    let guess = "0123456789abcdef0123";
    changed(&join, "guess", |to| fs::write(to.join("token"), guess).expect("written"));
    fails(&run.ask("guess", WORKER), 1, &["the join token is not this coordinator's", "token"]);

    // The right ones, for what is another's.
    for command in [&["stop"][..], &["drain", "1"]] {
        fails(&run.ask("worker", command), 1, &["operator's", "the one shown is a worker's", "--identity"]);
        fails(&run.ask("join", command), 1, &["a join token lets workers in", "operator's certificate"]);
    }
    fails(&run.ask("operator", WORKER), 1, &["worker's", "the one shown is an operator's"]);
    fails(&run.ask("coordinator", &["stop"]), 1, &["the certificate is not accepted", "unisono cert"]);
    for reader in ["worker", "operator", "join"] {
        assert!(run.ask(reader, &["status"]).status.success(), "status is for all who are let in: {reader}");
    }

    // No certificate at all, as another program would come; and no TLS.
    let ca = Certificate::from_pem(fs::read(of("ca").join("ca.crt")).expect("a file"));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let tls = ClientTlsConfig::new().ca_certificate(ca);
        let channel = Channel::from_shared(run.url.clone()).expect("a URL").tls_config(tls).expect("TLS");
        let channel = channel.connect().await.expect("the coordinator answers");
        let refused = |e: Status, words: &[&str]| {
            assert_eq!(e.code(), Code::Unauthenticated, "{e:?}");
            assert!(words.iter().all(|word| e.message().contains(word)), "{words:?}: {e:?}");
        };
        let mut worker = v1::coordinator_client::CoordinatorClient::new(channel.clone());
        let asked = worker.get_job(v1::GetJobRequest { version: unisono_proto::VERSION.into() }).await;
        refused(asked.expect_err("nobody is let in"), &["worker's certificate or the join token", "none was shown"]);
        let mut operator = v1::operator_client::OperatorClient::new(channel.clone());
        let stopped = operator.stop(v1::StopRequest {}).await.expect_err("nobody stops it");
        refused(stopped, &["operator's certificate", "none was shown"]);
        let mut parameters = v1::parameters_client::ParametersClient::new(channel);
        let broadcast = parameters.broadcast(v1::BroadcastRequest { session: vec![0; 16].into() }).await;
        refused(broadcast.expect_err("nobody is let in"), &["none was shown"]);
    });
    let plain = run.url.replace("https:", "http:");
    let out = unisono_tests::run(dir.path(), &["status", "--coordinator", &plain]);
    fails(&out, 1, &["asks for TLS", "https://"]);

    // A token is enough for a worker, from a file or from the environment; the operator ends the run.
    let token = fs::read_to_string(join.join("token")).expect("a token").trim().to_string();
    changed(&join, "environment", |to| fs::remove_file(to.join("token")).expect("removed"));
    fails(&run.ask("environment", WORKER), 2, &["neither tls.crt with tls.key nor token", "UNISONO_TOKEN is not set"]);
    let mut run = run;
    let url = run.url.clone();
    for (name, token) in [("join", None), ("environment", Some(&*token))] {
        run.child(name, &["worker", "--coordinator", &url, "--transport", "grpc", "-v"], token);
    }
    wait_until("the workers with a token", || text(&run.ask("operator", &["status"]).stdout).lines().count() == 5);

    // Each refusal is in the coordinator's log, with where it came from; no secret is in any log or command line.
    let log = run.log("coordinator");
    for word in [
        "another CA",
        "expired",
        "join token",
        "the one shown is a worker's",
        "the one shown is an operator's",
        "does not accept this coordinator's certificate",
        "its URL has to begin with https://",
    ] {
        let said = log.lines().any(|line| line.contains("turned away 127.0.0.1") && line.contains(word));
        assert!(said, "{word}:\n{log}");
    }
    let mut secrets = vec![token, guess.to_string()];
    for name in ["coordinator", "worker", "operator"] {
        let key = fs::read_to_string(of(name).join("tls.key")).expect("a key");
        secrets.extend(key.lines().filter(|line| !line.starts_with("-----")).map(String::from));
    }
    assert_eq!(secrets.len(), 2 + 3 * 3, "two tokens, and three lines of each key");
    let mut shown = ["coordinator", "worker", "join", "environment"].map(|name| run.log(name)).to_vec();
    shown.push(run.said.take());
    for child in &run.children {
        shown.push(text(&fs::read(format!("/proc/{}/cmdline", child.id())).unwrap_or_default()));
    }
    for secret in &secrets {
        assert!(shown.iter().all(|text| !text.contains(secret)), "a secret is shown: {secret}");
    }
    same_result(&run.end(), &undisturbed(SHORT));
}

#[test]
fn an_operators_certificate_stops_a_run_also_one_that_was_renewed_during_it() {
    for renewed in [false, true] {
        let dir = tempfile::tempdir().expect("a folder");
        let run = Run::start(dir.path(), 1_000_000);
        if renewed {
            certs(dir.path(), "certs");
        }
        let stopped = run.ask("operator", &["stop"]);
        assert!(stopped.status.success(), "{}", text(&stopped.stderr));
        assert_eq!(run.end()["status"], "stopped");
    }
}

#[test]
fn names_that_a_certificate_loses_are_told() {
    let dir = tempfile::tempdir().expect("a folder");
    let cert = |hosts: &[&str]| {
        let hosts: Vec<&str> = hosts.iter().flat_map(|host| ["--host", host]).collect();
        let made = run(dir.path(), &[&["cert", "certs"], &hosts[..]].concat());
        assert!(made.status.success(), "{}", text(&made.stderr));
        text(&made.stderr)
    };
    let lost = " any more: ";
    assert!(!cert(&["train.example.org", "fd00:0::7", "10.0.0.7"]).contains(lost));
    assert!(!cert(&["10.0.0.7", "fd00:0::7", "Train.example.org", "more.example.org"]).contains(lost));
    let said = cert(&["train.example.org"]);
    for (name, told) in [("10.0.0.7", true), ("fd00::7", true), ("more.example.org", true), ("localhost", false)] {
        let line = said.lines().find(|line| line.contains(lost)).unwrap_or_default();
        assert_eq!(line.contains(name), told, "{name}: {said}");
    }
}

#[test]
fn beyond_this_machine_nobody_listens_without_credentials() {
    let dir = tempfile::tempdir().expect("a folder");
    let job = root().join("examples/digits-mlp.toml");
    let job = job.to_str().expect("UTF-8");
    let listen = |address: &str, more: &[&str]| {
        let port = free_port();
        run(dir.path(), &[&["coordinator", job, "--listen", &format!("{address}:{port}")], more].concat())
    };
    for address in ["0.0.0.0", "[::]"] {
        fails(&listen(address, &[]), 2, &[address, "unisono cert", "--identity", "--insecure"]);
    }
    fails(
        &run(dir.path(), &["coordinator", job, "--listen", "here"]),
        2,
        &["cannot listen on here", "--listen", "HOST:PORT"],
    );
    fails(&listen("0.0.0.0", &["--identity", "nowhere"]), 2, &["no folder nowhere", "unisono cert"]);
    let certs = certs(dir.path(), "certs");
    let worker = certs.join("worker");
    let mine = listen("0.0.0.0", &["--identity", worker.to_str().expect("UTF-8")]);
    fails(&mine, 2, &["worker/tls.crt", "it is a worker's or an operator's", "certs/coordinator"]);
    fails(
        &listen("0.0.0.0", &["--identity", certs.to_str().expect("UTF-8")]),
        2,
        &["several identities", "certs/worker"],
    );
    let join = certs.join("join");
    fails(&listen("0.0.0.0", &["--identity", join.to_str().expect("UTF-8")]), 2, &["tls.crt", "needs a certificate"]);
    let broken =
        changed(&certs.join("coordinator"), "broken", |to| fs::write(to.join("tls.key"), "x").expect("written"));
    fails(&listen("0.0.0.0", &["--identity", broken.to_str().expect("UTF-8")]), 2, &["tls.key cannot be used"]);

    // Where it is asked for, anybody joins.
    let address = format!("0.0.0.0:{}", free_port());
    let args = ["coordinator", job, "--listen", &address, "--insecure", "--json", "--set", "train.steps=50"];
    let coordinator = unisono_tests::start(dir.path(), &args);
    let url = format!("http://{}", address.replace("0.0.0.0", "127.0.0.1"));
    assert!(run(dir.path(), &["worker", "--coordinator", &url]).status.success());
    assert_eq!(unisono_tests::finish(coordinator)["steps"], 50);
}

#[test]
fn urls_and_identities_go_together() {
    let dir = tempfile::tempdir().expect("a folder");
    let certs = certs(dir.path(), "certs");
    let identity = certs.join("worker");
    let identity = identity.to_str().expect("UTF-8");
    let status = |more: &[&str]| run(dir.path(), &[&["status"], more].concat());
    fails(&status(&["--coordinator", "http://127.0.0.1:1", "--identity", identity]), 2, &["without TLS", "https://"]);
    fails(&status(&["--coordinator", "https://127.0.0.1:1"]), 2, &["with TLS", "--identity", "unisono cert"]);
    fails(&status(&["--coordinator", "ftp://127.0.0.1:1"]), 2, &["not a coordinator's URL", "https://HOST:PORT"]);
    fails(
        &status(&["--coordinator", "127.0.0.1:1", "--identity", identity]),
        1,
        &["cannot reach", "https://127.0.0.1:1"],
    );
}

#[test]
fn certificates_are_renewed_and_keys_are_their_owners() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a folder");
    let certs = certs(dir.path(), "certs");
    let read = |file: &str| fs::read_to_string(certs.join(file)).expect("a file");
    let all = ["ca/ca.crt", "ca/ca.key", "join/token", "coordinator/token", "worker/tls.crt", "worker/tls.key"];
    let before = all.map(read);
    assert_eq!(before[2], before[3]);
    for secret in ["ca/ca.key", "join/token", "coordinator/tls.key", "worker/tls.key", "operator/tls.key"] {
        let mode = fs::metadata(certs.join(secret)).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{secret}");
    }
    assert!(run(dir.path(), &["cert", "certs"]).status.success());
    let after = all.map(read);
    assert_eq!(before[..4], after[..4], "authority and token stay");
    assert!(before[4] != after[4] && before[5] != after[5], "certificates are new");
    fails(&run(dir.path(), &["cert", "x", "--host", "https://a:1"]), 2, &["--host", "https://a:1"]);
    assert!(!dir.path().join("x").exists(), "nothing was made");
    assert!(run(dir.path(), &["cert", "others"]).status.success());
    fs::copy(dir.path().join("others/ca/ca.key"), certs.join("ca/ca.key")).expect("copied");
    fails(&run(dir.path(), &["cert", "certs"]), 2, &["ca.key is not the key of certs/ca/ca.crt", "another folder"]);
    assert_eq!(after[4..], all.map(read)[4..], "nothing was made");
    fs::remove_file(certs.join("ca/ca.key")).expect("removed");
    fails(&run(dir.path(), &["cert", "certs"]), 1, &["ca.key", "another folder"]);
}

/// A job that names a file that this worker is not allowed to read.
#[test]
fn a_job_cannot_make_a_worker_read_elsewhere() {
    let (dir, elsewhere) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let rows: String = (0..64).map(|i| format!("{},{},{}\n", i % 7, i % 5, i % 2)).collect();
    fs::write(elsewhere.path().join("rows.csv"), format!("a,b,label\n{rows}")).expect("written");
    let job = elsewhere.path().join("job.toml");
    let toml = |ship: &str| {
        format!(
            "[data]\nformat = \"csv\"\ntrain = \"rows.csv\"\ntarget = \"label\"\ntask = \"classification\"\n{ship}\n[model]\nkind = \
             \"linear\"\n[train]\npartitions = 2\nmicro_batch = 8\nsteps = 20\nloss = \"cross-entropy\"\noptimizer = {{ kind = \
             \"sgd\", lr = 0.1 }}\n"
        )
    };
    let cluster = |ship: &str, more: &[&str]| {
        fs::write(&job, toml(ship)).expect("written");
        let address = format!("127.0.0.1:{}", free_port());
        let job = job.to_str().expect("UTF-8");
        let coordinator = unisono_tests::start(dir.path(), &["coordinator", job, "--listen", &address, "--json"]);
        let worker = run(dir.path(), &[&["worker", "--coordinator", &address], more].concat());
        (coordinator, worker)
    };
    // It is sent what it may not read; the result is that of one that may.
    let (coordinator, worker) = cluster("", &[]);
    assert!(worker.status.success() && text(&worker.stderr).contains("--data-root"), "{}", text(&worker.stderr));
    let sent = unisono_tests::finish(coordinator);
    let allowed = ["--data-root", elsewhere.path().to_str().expect("UTF-8")];
    let (coordinator, worker) = cluster("ship = false", &allowed);
    assert!(worker.status.success(), "{}", text(&worker.stderr));
    assert_eq!(unisono_tests::finish(coordinator)["weights_digest"], sent["weights_digest"]);
    let (mut coordinator, worker) = cluster("ship = false", &[]);
    fails(&worker, 1, &["rows.csv is outside the folders that this worker may read", "--data-root"]);
    coordinator.kill().and_then(|()| coordinator.wait()).expect("ended");
    fails(&run(dir.path(), &["worker", "--coordinator", "127.0.0.1:1", "--data-root", "nowhere"]), 2, &["nowhere"]);
}
