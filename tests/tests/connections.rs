//! Connections that nobody vouches for: they are few and short, hold little, and keep nobody out.
#![cfg(target_os = "linux")]

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;
use unisono_tests::cluster::{Cluster, same_result, undisturbed_of};
use unisono_tests::{peak, wait_until};

/// Without a schedule: its length does not change what a step does, so that it can be stopped when the strangers are gone.
const JOB: &str = r#"
name = "connections"
data = { format = "digits" }
model = { kind = "mlp", hidden = [32] }
[train]
partitions = 4
micro_batch = 8
steps = 1
eval_every = 1000000000
loss = "cross-entropy"
optimizer = { kind = "sgd", lr = 0.01 }
[checkpoint]
every_steps = 0
"#;
/// More than any run here gets to.
const ENDLESS: u64 = 1_000_000_000;

/// Strangers that may be there at once, and those of them that speak HTTP/2.
const STRANGERS: usize = 1024;
const SPEAKING: usize = 128;

/// The open files of a cluster's coordinator.
fn open(cluster: &Cluster<'_>) -> usize {
    let id = cluster.coordinator.as_ref().expect("it runs").id();
    std::fs::read_dir(format!("/proc/{id}/fd")).expect("its files").count()
}

/// Opens so many connections to the coordinator of a run, on each of which `say` is called with its number; then all but `most`
/// must be closed soon, and these after their time, while others are answered and the run ends as it must.
fn strangers(connections: usize, most: usize, say: impl Fn(usize, &mut TcpStream)) {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("more open files");
    let dir = tempfile::tempdir().expect("a folder");
    let job = dir.path().join("job.toml");
    std::fs::write(&job, JOB).expect("written");
    let job = job.to_str().expect("a name");
    let cluster = Cluster::of(dir.path(), job, ENDLESS);
    let calm = open(&cluster);
    let connect = |i: usize| {
        let mut wire = TcpStream::connect(&cluster.address).expect("a connection");
        wire.set_write_timeout(Some(Duration::from_millis(50))).expect("a time limit");
        say(i, &mut wire);
        wire
    };
    let held: Vec<TcpStream> = (0..connections).map(connect).collect();
    wait_until("most to be closed", || open(&cluster) <= calm + most + 8);
    assert!(cluster.step().is_some(), "status is answered meanwhile");
    wait_until("all to be closed", || open(&cluster) <= calm + 8);
    let peak = cluster.coordinator.as_ref().and_then(peak);
    assert!(peak.is_none_or(|peak| peak < 256.0), "the coordinator took {peak:?} MiB");
    drop(held);
    assert!(cluster.ask(&["stop"]).status.success());
    let got = cluster.end();
    same_result(&got, &undisturbed_of(job, got["steps"].as_u64().expect("a number")));
}

#[test]
fn who_says_nothing_or_nothing_that_is_understood_has_to_go() {
    strangers(3 * STRANGERS, STRANGERS, |i, wire| {
        if i % 2 == 1 {
            wire.write_all(&[0xab; 100]).ok();
        }
    });
}

/// What HTTP/2 begins with (RFC 9113, 3.4), with empty settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Each ping asks for an answer (RFC 9113, 6.7), and nobody takes it.
#[test]
fn who_takes_no_answers_has_to_go() {
    let pings = [&b"\0\0\x08\x06\0\0\0\0\0"[..], &[7; 8]].concat().repeat(60_000);
    strangers(200, SPEAKING, |_, wire| {
        wire.write_all(PREFACE).ok();
        wire.write_all(&pings).ok();
    });
}

/// A header field without indexing (RFC 7541, 6.2.2).
fn field(name: &str, value: &str) -> Vec<u8> {
    [&[0, name.len() as u8], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
}

/// A call of GetJob, which anybody may make here, whose answer may not be sent: the window is 0 (RFC 9113, 6.5.2).
#[test]
fn who_asks_but_does_not_join_gives_way() {
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/unisono.v1.Coordinator/GetJob"),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let head = fields.map(|(name, value)| field(name, value)).concat();
    let version = unisono_proto::VERSION.as_bytes();
    let message = [&[0, 0, 0, 0, 2 + version.len() as u8, 0x0a, version.len() as u8], version].concat();
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        [&[0, 0, payload.len() as u8, kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let settings = frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]);
    let call = [&PREFACE[..24], &settings, &frame(1, 4, 1, &head), &frame(0, 1, 1, &message)].concat();
    strangers(3 * STRANGERS, SPEAKING, |_, wire| {
        wire.write_all(&call).ok();
    });
}

/// One of almost 16 MiB, the longest that the coordinator's settings allow, of which a part comes.
#[test]
fn a_long_frame_is_not_kept() {
    let part = vec![0; 8 << 20];
    strangers(100, SPEAKING, |_, wire| {
        wire.write_all(PREFACE).ok();
        wire.write_all(b"\xff\xff\xff\0\0\0\0\0\x01").ok();
        wire.write_all(&part).ok();
    });
}
