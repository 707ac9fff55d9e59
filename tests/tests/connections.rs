//! Connections that nobody vouches for: they are few and short, hold little, and keep nobody out.
#![cfg(target_os = "linux")]

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::Write;
use std::net::TcpStream;
use std::process::Child;
use std::time::{Duration, Instant};
use tonic::transport::Endpoint;
use unisono_proto::{VERSION, v1};
use unisono_tests::cluster::{same_result, undisturbed};
use unisono_tests::{finish, free_port, peak, root, run, start, wait_until};

/// Those who may be there at once and are not known: silent ones, those that speak HTTP/2, and those of whom a request was admitted.
const SILENT: usize = 704;
const SPEAKING: usize = 64;
const GUESTS: usize = 256;

/// So long a stranger may stay.
const PATIENCE: Duration = Duration::from_secs(10);

const STEPS: u64 = 200;

/// A coordinator that waits for workers; it ends with the test.
struct Waiting {
    dir: tempfile::TempDir,
    address: String,
    coordinator: Option<Child>,
    /// Its open files when nobody is there.
    calm: usize,
}

impl Waiting {
    fn new() -> Waiting {
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("more open files");
        let (dir, address) = (tempfile::tempdir().expect("a folder"), format!("127.0.0.1:{}", free_port()));
        let (job, steps) = (root().join("examples/digits-mlp.toml"), format!("train.steps={STEPS}"));
        let job = job.to_str().expect("UTF-8");
        let args = ["coordinator", job, "--listen", &address, "--json", "--quiet", "--set", &steps];
        let coordinator = Some(start(dir.path(), &args));
        let mut waiting = Waiting { dir, address, coordinator, calm: 0 };
        wait_until("it to listen", || waiting.answers());
        wait_until("the question to be over", || {
            let now = waiting.open();
            std::mem::replace(&mut waiting.calm, now) == now
        });
        waiting
    }

    fn answers(&self) -> bool {
        let asked = run(self.dir.path(), &["health", "--coordinator", &self.address]);
        eprint!("{}", String::from_utf8_lossy(&asked.stderr));
        asked.status.success()
    }

    /// Its open files.
    fn open(&self) -> usize {
        let id = self.coordinator.as_ref().expect("it runs").id();
        std::fs::read_dir(format!("/proc/{id}/fd")).expect("its files").count()
    }

    /// Opens connections to it, on each of which `say` is called with its number; they stay open as long as what this gives.
    fn come(&self, connections: usize, say: &dyn Fn(usize, &mut TcpStream)) -> Vec<TcpStream> {
        let connect = |i: usize| {
            let mut wire = TcpStream::connect(&self.address).expect("a connection");
            wire.set_write_timeout(Some(Duration::from_millis(10))).expect("a time limit");
            say(i, &mut wire);
            wire
        };
        (0..connections).map(connect).collect()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.coordinator {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// Twice as many connections as there may be, `most`, say something: the oldest have to go before their time is over, all after it,
/// and others are answered meanwhile. While as many are there again, a worker comes, and the run ends as it must.
fn strangers(most: usize, say: impl Fn(usize, &mut TcpStream)) {
    let mut coordinator = Waiting::new();
    let began = Instant::now();
    let first = coordinator.come(2 * most, &say);
    wait_until("the oldest to go", || coordinator.open() <= coordinator.calm + most);
    assert!(began.elapsed() < PATIENCE, "they went when their time was over: {:?}", began.elapsed());
    assert!(coordinator.answers(), "others are answered meanwhile");
    wait_until("all to go", || coordinator.open() <= coordinator.calm);
    drop(first);
    let again = coordinator.come(2 * most, &say);
    let address = coordinator.address.clone();
    let worker = start(coordinator.dir.path(), &["worker", "--coordinator", &address, "--transport", "grpc"]);
    let peak = coordinator.coordinator.as_ref().and_then(peak);
    let got = finish(coordinator.coordinator.take().expect("it runs"));
    assert!(worker.wait_with_output().expect("it ends").status.success());
    drop(again);
    same_result(&got, &undisturbed(STEPS));
    assert!(peak.is_none_or(|peak| peak < 192.0), "the coordinator took {peak:?} MiB");
}

#[test]
fn who_says_nothing_has_to_go() {
    strangers(SILENT, |_, _| ());
}

/// Also who begins well.
#[test]
fn who_says_what_is_not_understood_has_to_go() {
    strangers(SILENT, |i, wire| {
        let said = [&[0xab; 100][..], &PREFACE[..10], &PREFACE[..1], &[]][i % 4];
        wire.write_all(said).ok();
    });
}

/// What HTTP/2 begins with (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame (RFC 9113, 4.1) of a stream.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let len = u8::try_from(payload.len()).expect("a short one");
    [&[0, 0, len, kind, flags, 0, 0, 0, stream], payload].concat()
}

/// Preface and settings, of which the last gives streams no window (RFC 9113, 6.5.2).
fn hello() -> Vec<u8> {
    [&PREFACE[..], &frame(4, 0, 0, &[0, 4, 0, 0, 0, 0])].concat()
}

/// Each ping asks for an answer (RFC 9113, 6.7), and nobody takes it.
#[test]
fn who_takes_no_answers_has_to_go() {
    let pings = frame(6, 0, 0, &[7; 8]).repeat(60_000);
    strangers(SPEAKING, |_, wire| {
        wire.write_all(&hello()).ok();
        wire.write_all(&pings).ok();
    });
}

/// One of almost 16 MiB, the longest that the coordinator's settings allow, of which a part comes.
fn long_frame(wire: &mut TcpStream) {
    wire.write_all(b"\xff\xff\xff\0\0\0\0\0\x01").ok();
    wire.write_all(&vec![0; 8 << 20]).ok();
}

#[test]
fn a_long_frame_is_not_kept() {
    strangers(SPEAKING, |_, wire| {
        wire.write_all(&hello()).ok();
        long_frame(wire);
    });
}

/// Calls of GetJob, which anybody may make here, whose answers may not be sent.
fn calls(many: u8) -> Vec<u8> {
    // A header field without indexing (RFC 7541, 6.2.2).
    let field = |name: &str, value: &str| {
        [&[0, name.len() as u8], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
    };
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/unisono.v1.Coordinator/GetJob"),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let head = fields.map(|(name, value)| field(name, value)).concat();
    let version = VERSION.as_bytes();
    let message = [&[0, 0, 0, 0, 2 + version.len() as u8, 0x0a, version.len() as u8], version].concat();
    let call = |stream| [frame(1, 4, stream, &head), frame(0, 1, stream, &message)].concat();
    [hello(), (0..many).flat_map(|i| call(2 * i + 1)).collect()].concat()
}

#[test]
fn who_asks_and_does_not_join_gives_way() {
    let calls = calls(60);
    strangers(GUESTS, |_, wire| {
        wire.write_all(&calls).ok();
    });
}

#[test]
fn a_long_frame_of_one_who_has_asked_is_not_kept_either() {
    let call = calls(1);
    strangers(GUESTS, |_, wire| {
        wire.write_all(&call).ok();
        std::thread::sleep(Duration::from_millis(5)); // it is a guest then
        long_frame(wire);
    });
}

/// They come and go, many within one's time, a hundred at once at most.
#[test]
fn who_has_gone_holds_no_memory() {
    let coordinator = Waiting::new();
    let come = |hundreds| {
        for _ in 0..hundreds {
            coordinator.come(100, &|_, wire: &mut TcpStream| wire.write_all(&hello()).expect("sent"));
            wait_until("all to go", || coordinator.open() <= coordinator.calm);
        }
        coordinator.coordinator.as_ref().and_then(peak).expect("its memory")
    };
    let (few, many) = (come(3), come(30));
    assert!(many - few < 10.0, "3,000 more took {} MiB", many - few);
}

/// As a worker that takes long to read its data, between asking for the job and joining.
#[tokio::test]
async fn who_gave_way_may_come_again() {
    let coordinator = Waiting::new();
    let channel = Endpoint::new(format!("http://{}", coordinator.address)).expect("a URL").connect().await;
    let mut client = v1::coordinator_client::CoordinatorClient::new(channel.expect("a connection"));
    let request = || v1::GetJobRequest { version: VERSION.into() };
    client.get_job(request()).await.expect("the job");
    let open = coordinator.open();
    let call = calls(1);
    let others = coordinator.come(2 * GUESTS, &|_, wire: &mut TcpStream| wire.write_all(&call).expect("sent"));
    wait_until("the oldest to go", || (open..=coordinator.calm + GUESTS).contains(&coordinator.open()));
    let mut tries = 0;
    while let Err(e) = client.get_job(request()).await {
        tries += 1;
        assert!(tries < 3, "{e}");
    }
    drop(others);
}
