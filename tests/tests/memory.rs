//! What the two sides hold, in units of the parameters' size: a worker its gradient and two versions of the weights, the
//! coordinator two versions of the weights, the optimizer's state and the open tree; checkpoints included.

use std::process::Child;
use unisono_tests::{finish, free_port, start};

/// 20 million parameters and nothing else of size.
const JOB: &str = r#"
data = { format = "synthetic", shape = [784], classes = 10, samples = 64 }
model = { kind = "mlp", hidden = [4096, 4096] }
train = { partitions = 2, micro_batch = 2, steps = 8, optimizer = { kind = "sgd", lr = 0.01, momentum = 0.9 } }
checkpoint = { dir = "kept", every_steps = 3 }
"#;

/// The program itself, its samples, activations, and what is on the way, in MiB.
const ELSE: f64 = 64.0;

/// The most memory that a process has held, in MiB; `None` where the system does not say, or it is gone.
fn peak(child: &Child) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
    let kib: f64 = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib / 1024.0)
}

#[test]
fn no_side_holds_more_copies_of_the_parameters_than_it_needs() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("job.toml"), JOB).expect("written");
    let address = format!("127.0.0.1:{}", free_port());
    let mut coordinator = start(dir.path(), &["coordinator", "job.toml", "--listen", &address, "--json", "--quiet"]);
    let mut workers = [(); 2].map(|()| start(dir.path(), &["worker", "--coordinator", &address]));
    let (mut peaks, mut ended) = ([0.0; 3], false);
    while !ended {
        ended = coordinator.try_wait().expect("it is ours").is_some();
        for (most, child) in peaks.iter_mut().zip([&coordinator].into_iter().chain(&workers)) {
            *most = peak(child).unwrap_or(*most);
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let summary = finish(coordinator);
    for worker in &mut workers {
        assert!(worker.wait().expect("it ends").success());
    }
    let copy = summary["parameters"].as_f64().expect("a number") * 4.0 / (1 << 20) as f64;
    println!(
        "MiB: coordinator {:.0}, workers {:.0} and {:.0}; the parameters are {copy:.0}",
        peaks[0], peaks[1], peaks[2]
    );
    if cfg!(target_os = "linux") {
        assert!(peaks.iter().all(|p| *p > copy), "nothing was measured: {peaks:?}");
    }
    // Weights twice, momentum, and the open tree: the sums of one worker that wait for the other's.
    assert!(peaks[0] < 4.0 * copy + ELSE, "the coordinator held {:.0} MiB", peaks[0]);
    for worker in &peaks[1..] {
        assert!(*worker < 3.0 * copy + ELSE, "a worker held {worker:.0} MiB");
    }
}
