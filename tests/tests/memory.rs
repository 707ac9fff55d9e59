//! What the two sides hold, in units of the parameters' size: a worker its gradient and two versions of the weights, the
//! coordinator two versions of the weights, the optimizer's state and the open tree; checkpoints included. Over shared
//! memory the weights are there once for all.

use std::process::Child;
use unisono_tests::{finish, free_port, peak, start};

/// 20 million parameters and nothing else of size.
const JOB: &str = r#"
data = { format = "synthetic", shape = [784], classes = 10, samples = 64 }
model = { kind = "mlp", hidden = [4096, 4096] }
train = { partitions = 2, micro_batch = 2, steps = 8, optimizer = { kind = "sgd", lr = 0.01, momentum = 0.9 } }
checkpoint = { dir = "kept", every_steps = 3 }
"#;

/// The program itself, its samples, activations, and what is on the way, in MiB.
const ELSE: f64 = 64.0;

/// What a process holds now, in MiB, memory that `n` share counted as one `n`-th for each.
fn share(child: &Child) -> Option<f64> {
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", child.id())).ok()?;
    let kib: f64 = rollup.lines().find_map(|l| l.strip_prefix("Pss:"))?.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib / 1024.0)
}

/// A coordinator and two workers, watched until they end: the size of the parameters in MiB, and what `look` saw.
fn watch(transport: &str, mut look: impl FnMut(&[Child])) -> f64 {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("job.toml"), JOB).expect("written");
    let address = format!("127.0.0.1:{}", free_port());
    let coordinator = start(dir.path(), &["coordinator", "job.toml", "--listen", &address, "--json", "--quiet"]);
    let worker = || start(dir.path(), &["worker", "--coordinator", &address, "--transport", transport]);
    let mut all = [coordinator, worker(), worker()];
    while all[0].try_wait().expect("it is ours").is_none() {
        look(&all);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let [coordinator, workers @ ..] = all;
    let summary = finish(coordinator);
    for mut worker in workers {
        assert!(worker.wait().expect("it ends").success());
    }
    assert_eq!(summary["transport"], transport);
    summary["parameters"].as_f64().expect("a number") * 4.0 / (1 << 20) as f64
}

/// The weights twice, the momentum, and a gradient of each worker: nothing else of size, and none of it twice.
#[test]
#[cfg(target_os = "linux")]
fn over_shared_memory_nothing_is_held_twice() {
    let mut most = 0.0f64;
    let copy = watch("shm", |all| most = most.max(all.iter().filter_map(share).sum()));
    println!("MiB: all three {most:.0}; the parameters are {copy:.0}");
    assert!(most > 4.0 * copy, "nothing was measured: {most:.0}");
    assert!(most < 5.0 * copy + 3.0 * ELSE, "the three held {most:.0} MiB");
}

#[test]
fn no_side_holds_more_copies_of_the_parameters_than_it_needs() {
    let mut peaks = [0.0; 3];
    let copy = watch("grpc", |all| {
        for (most, child) in peaks.iter_mut().zip(all) {
            *most = peak(child).unwrap_or(*most);
        }
    });
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

/// Clicks on so many possible ids, all of which come as often as each other.
fn clicks(vocabulary: u64) -> String {
    format!(
        r#"
data = {{ format = "synthetic", task = "clicks", numbers = 1, fields = 8, vocabulary = {vocabulary}, zipf = 0.0, samples = 65536, test_samples = 0 }}
model = {{ kind = "deepfm", width = 63, hidden = [8] }}
train = {{ partitions = 2, micro_batch = 256, epochs = 2, loss = "binary-cross-entropy", tables = {{ optimizer = {{ kind = "sgd", lr = 0.1 }} }} }}
checkpoint = {{ dir = "kept", every_steps = 0 }}
"#
    )
}

/// What a worker that pulls rows by gRPC held at most, and what the rows in the checkpoint take, in MiB.
fn pulling(vocabulary: u64) -> (f64, f64) {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("job.toml"), clicks(vocabulary)).expect("written");
    let address = format!("127.0.0.1:{}", free_port());
    let mut coordinator = start(dir.path(), &["coordinator", "job.toml", "--listen", &address, "--json", "--quiet"]);
    let mut worker = start(dir.path(), &["worker", "--coordinator", &address, "--transport", "grpc"]);
    let mut most = 0.0;
    while coordinator.try_wait().expect("it is ours").is_none() {
        most = peak(&worker).unwrap_or(most);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let summary = finish(coordinator);
    assert!(worker.wait().expect("it ends").success());
    let checkpoint = dir.path().join(summary["checkpoint"].as_str().expect("a checkpoint"));
    let files = std::fs::read_dir(checkpoint).expect("a folder").flatten();
    let rows = files.filter(|file| file.file_name().to_string_lossy().starts_with("rows-"));
    let bytes: u64 = rows.map(|file| file.metadata().expect("its length").len()).sum();
    (most, bytes as f64 / (1 << 20) as f64)
}

/// As many samples, of hundreds of ids or of eight million: only the coordinator holds what was learnt of all. In the second epoch all
/// rows travel.
#[test]
#[cfg(target_os = "linux")]
fn a_workers_memory_does_not_grow_with_the_tables() {
    let [(few, small), (many, large)] = [pulling(100), pulling(1_000_000)];
    println!("MiB: a worker {few:.0} with tables of {small:.0}, and {many:.0} with tables of {large:.0}");
    assert!(few > 1.0 && small < 1.0 && large > 100.0, "nothing was measured: {few} {small} {large}");
    // A batch asks for 4096 rows where it asked for 800, and a few batches are there at once.
    assert!(many < few + ELSE / 2.0 && many < large, "a worker held {many:.0} MiB, with small tables {few:.0}");
}
