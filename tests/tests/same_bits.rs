//! The promise: the number of workers, their threads and their deaths never change a bit of the result.

use std::path::Path;
use std::process::Child;
use unisono_common::kernels::Isa;
use unisono_tests::{Signal, finish, free_port, root, run, run_on, signal, start, start_on, summary, wait_until};

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
    for (workers, threads) in [("1", "1"), ("2", "1"), ("3", "2"), ("5", "1"), ("8", "1"), ("1", "4")] {
        for transport in ["shm", "grpc"] {
            let got = local(&["--workers", workers, "--threads", threads, "--transport", transport]);
            assert_eq!(got, calm, "{workers} workers, {threads} threads, {transport}");
        }
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
    assert_eq!(local(&[&odd[..], &["--workers", "5", "--transport", "grpc"]].concat()), calm);
}

#[test]
fn data_that_is_sent_gives_the_weights_of_data_that_is_read() {
    for transport in ["shm", "grpc"] {
        let sent = local(&["--workers", "3", "--set", "data.ship=true", "--transport", transport]);
        assert_eq!(sent, local(&["--workers", "1"]), "{transport}");
    }
}

/// One by one, and in one run: workers of unlike machines train together.
#[test]
fn every_instruction_set_gives_the_same_weights() {
    // Long enough for the last worker to come before it is over.
    for (job, steps) in [(IMAGES, 200), (TEXT, 100), (DOTS, 3000)] {
        let dir = tempfile::tempdir().expect("a folder");
        let job = written(dir.path(), job);
        let steps = format!("train.steps={steps}");
        let job = [job.as_str(), "--set", &steps];
        let calm = calm(&job);
        for isa in Isa::available() {
            let dir = tempfile::tempdir().expect("a folder");
            let args = [&["local", "--json", "--quiet", "--workers", "2"], &job[..]].concat();
            let got = summary(&run_on(isa.name(), dir.path(), &args));
            assert_eq!((&got["weights_digest"], &got["isa"]), (&calm["weights_digest"], &isa.name().into()));
        }
        let mut cluster = Cluster::start(dir.path(), &job, 0);
        for isa in Isa::available() {
            let worker = ["worker", "--coordinator", &cluster.address];
            cluster.workers.push(start_on(isa.name(), dir.path(), &worker));
        }
        let mixed = cluster.end();
        assert_eq!(mixed["weights_digest"], calm["weights_digest"], "{mixed}");
    }
    let dir = tempfile::tempdir().expect("a folder");
    let wrong = run_on("mmx", dir.path(), &["local"]);
    let said = String::from_utf8_lossy(&wrong.stderr).to_string();
    assert!(wrong.status.code() == Some(2) && said.contains("UNISONO_ISA") && said.contains("portable"), "{said}");
}

/// A small convolutional network with batch-norm and dropout, whose partitions and last batches are uneven.
const IMAGES: &str = r#"
data = { format = "synthetic", shape = [1, 8, 8], classes = 4, samples = 1421, test_samples = 101 }
train = { partitions = 7, micro_batch = 9, steps = 400, optimizer = "adamw" }
[model]
kind = "layers"
layers = [
  { op = "conv2d", filters = 16, kernel = 3 }, { op = "batch-norm" }, { op = "relu" },
  { op = "residual", layers = [{ op = "conv2d", filters = 16, kernel = 3, padding = 1 }, { op = "gelu" }] },
  { op = "avg-pool2d", size = 2 }, { op = "flatten" }, { op = "linear", units = 128 }, { op = "layer-norm" },
  { op = "relu" }, { op = "dropout", rate = 0.25 }, { op = "linear", units = 4 },
]
"#;

/// [`IMAGES`] with steps as long as their tensors, settings of some of them, and an average that is evaluated again and again.
fn craft() -> String {
    IMAGES.replace(
        "optimizer = \"adamw\" }",
        "optimizer = \"lamb\", ema = 0.9, eval_every = 7, clip_norm = 0.5, schedule = { kind = \"plateau\", patience = 2 },\n  \
         groups = [{ params = [\"biases\", \"norms\"], weight_decay = 0.0 }, { params = [\"0.*\"], lr = 0.002 }] }",
    )
}

/// A small language model whose windows are longer than a block of attention; partitions and last batches are uneven.
const TEXT: &str = r#"
data = { format = "synthetic", task = "language", vocabulary = 50, context = 70, samples = 221, test_samples = 30 }
train = { partitions = 7, micro_batch = 3, steps = 60, optimizer = "adamw" }
[model]
kind = "gpt"
layers = 1
heads = 2
width = 32
positions = "rotary"
feed_forward = "swiglu"
norm = "rms-norm"
tie = true
dropout = 0.1
"#;

/// Sparse tables beside dense layers, under one norm; partitions and last batches are uneven, and some rows are touched for the
/// first time late in the run.
const CLICKS: &str = r#"
data = { format = "synthetic", task = "clicks", numbers = 3, fields = 5, vocabulary = 3000, samples = 2021, test_samples = 301 }
[model]
kind = "deepfm"
width = 5
hidden = [12]
dropout = 0.1
[train]
partitions = 7
micro_batch = 9
steps = 80
loss = "binary-cross-entropy"
optimizer = "adamw"
clip_norm = 0.05
tables = { optimizer = { kind = "lazy-adam", lr = 0.01 } }
"#;

/// What users take, beside items that are drawn for each sample anew in each epoch, whoever has it; hashed partitions and last batches
/// are uneven.
const TAKEN: &str = r#"
data = { format = "synthetic", task = "ratings", users = 60, items = 90, samples = 1021, test_samples = 41, partition = "hashed",
         implicit = { negatives = 3, eval_negatives = 20, k = 5 } }
[model]
kind = "deepfm"
width = 5
hidden = [12]
dropout = 0.1
[train]
partitions = 7
micro_batch = 9
steps = 80
loss = "bpr"
optimizer = "adamw"
clip_norm = 0.05
tables = { optimizer = { kind = "lazy-adam", lr = 0.01 } }
"#;

/// Products of vectors, and FTRL.
const DOTS: &str = r#"
data = { format = "synthetic", task = "clicks", numbers = 3, fields = 5, vocabulary = 3000, samples = 721, test_samples = 101 }
model = { kind = "dlrm", width = 6, bottom = [8], top = [9] }
[train]
partitions = 5
micro_batch = 7
steps = 60
loss = "binary-cross-entropy"
clip_value = 0.01
tables = { optimizer = { kind = "ftrl", l1 = 0.001 } }
"#;

/// Bags of words and pairs of words, a part of which is held out.
const TEXTS: &str = r#"
data = { format = "csv", train = "texts.csv", target = "kind", text = "text", context = 12, holdout = 0.2,
         tokenizer = { kind = "words", ngrams = 2, buckets = 500 }, truncate = true }
train = { partitions = 7, micro_batch = 5, steps = 80, optimizer = "adamw" }
model = { kind = "text-classifier", width = 9, hidden = [7], dropout = 0.1 }
"#;

/// Texts of several lengths, some of them too long.
fn texts() -> String {
    let word = |i: usize| ["red", "green", "blue", "one", "two", "three", "on", "off"][i % 8];
    let line = |i: usize| {
        let words: Vec<&str> = (0..1 + i % 9).map(|j| word(i * i + j * (i % 5 + 1))).collect();
        format!("{} {i},{}\n", words.join(" "), ["a", "b", "c"][i * i % 3 + i % 2])
    };
    format!("text,kind\n{}", (0..331).map(line).collect::<String>())
}

/// A residual network on pictures that are cropped and mirrored anew in each epoch, whoever has them; hashed partitions and
/// last batches are uneven.
const PICTURES: &str = r#"
data = { format = "idx", train = { images = "pictures", labels = "labels" }, partition = "hashed",
         augment = { crop = 2, flip = true } }
train = { partitions = 7, micro_batch = 5, steps = 60, optimizer = { kind = "sgd", lr = 0.05, momentum = 0.9 } }
model = { kind = "resnet", depth = 8, width = 4 }
"#;

/// Pictures of 9x10 and their labels, as files of IDX.
fn pictures() -> [(&'static str, Vec<u8>); 2] {
    let file = |magic: u32, sizes: &[u32], bytes: Vec<u8>| {
        std::iter::once(&magic).chain(sizes).flat_map(|n| n.to_be_bytes()).chain(bytes).collect()
    };
    let pixel = |i: usize| (i % 90 * (i / 90 % 4 + 3) + i / 90 * 31) as u8;
    let labels = (0..331).map(|i| (i % 4) as u8).collect();
    [
        ("pictures", file(0x803, &[331, 9, 10], (0..331 * 90).map(pixel).collect())),
        ("labels", file(0x801, &[331], labels)),
    ]
}

/// The path of a job file with this text.
fn written(dir: &Path, job: &str) -> String {
    let path = dir.join("job.toml");
    std::fs::write(&path, job).expect("written");
    path.display().to_string()
}

/// A job file and options, as the commands take them.
type Run<'a> = &'a [&'a str];

/// The summary of an undisturbed run.
fn calm(job: Run<'_>) -> serde_json::Value {
    let dir = tempfile::tempdir().expect("a folder");
    summary(&run(dir.path(), &[&["local", "--json", "--quiet", "--workers", "1"], job].concat()))
}

/// A coordinator and workers of its own, so that each can be killed by its id.
struct Cluster<'a> {
    dir: &'a Path,
    job: Run<'a>,
    address: String,
    coordinator: Option<Child>,
    workers: Vec<Child>,
    /// Workers started so far; every second one uses gRPC, the others shared memory.
    started: usize,
}

impl<'a> Cluster<'a> {
    fn start(dir: &'a Path, job: Run<'a>, workers: usize) -> Cluster<'a> {
        let address = format!("127.0.0.1:{}", free_port());
        let mut cluster = Cluster { dir, job, address, coordinator: None, workers: Vec::new(), started: 0 };
        cluster.coordinate(&[]);
        (0..workers).for_each(|_| cluster.worker());
        cluster
    }

    fn coordinate(&mut self, more: &[&str]) {
        let options = ["--listen", &self.address, "--json", "--quiet", "--heartbeat-timeout", "1"];
        let often = ["--set", "checkpoint.every_steps=20"];
        let args = [&["coordinator"], self.job, &options, &often, more].concat();
        self.coordinator = Some(start(self.dir, &args));
    }

    fn worker(&mut self) {
        let transport = if self.started.is_multiple_of(2) { "grpc" } else { "shm" };
        self.started += 1;
        let args = ["worker", "--coordinator", &self.address, "--transport", transport];
        self.workers.push(start(self.dir, &args));
    }

    /// What `status` says; null where nobody answers.
    fn status(&self) -> serde_json::Value {
        let out = run(self.dir, &["status", "--json", "--coordinator", &self.address]);
        serde_json::from_slice(&out.stdout).unwrap_or_default()
    }

    fn step(&self) -> u64 {
        self.status()["steps"].as_u64().unwrap_or(0)
    }

    /// Whether a worker of this process id is a member.
    fn has(&self, id: u32) -> bool {
        let ends = format!(":{id}");
        let workers = self.status()["workers"].as_array().cloned().unwrap_or_default();
        workers.iter().any(|w| w["name"].as_str().is_some_and(|name| name.ends_with(&ends)))
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

/// One worker is killed in the middle of the run, one paused for longer than the limit and continued, one joins; then the
/// coordinator is killed and resumes: all that `job` comes to is what one undisturbed worker comes to.
fn a_storm_changes_nothing(job: Run<'_>) {
    let dir = tempfile::tempdir().expect("a folder");
    let mut cluster = Cluster::start(dir.path(), job, 3);
    cluster.reach(25);
    signal(&cluster.workers[0], Signal::KILL);
    cluster.reach(35);
    signal(&cluster.workers[1], Signal::STOP);
    cluster.worker();
    let paused = cluster.workers[1].id();
    wait_until("the paused worker to be given up", || !cluster.has(paused));
    signal(&cluster.workers[1], Signal::CONT);
    wait_until("it to come back", || cluster.has(paused));
    assert!(!cluster.status().is_null(), "the run ended before the coordinator could be killed: give it more steps");
    let mut dead = cluster.coordinator.take().expect("it runs");
    dead.kill().expect("SIGKILL");
    dead.wait().expect("it is dead");
    cluster.coordinate(&["--resume"]);
    let (storm, calm) = (cluster.end(), calm(job));
    for key in ["weights_digest", "train_loss", "eval", "samples", "steps"] {
        assert_eq!(storm[key], calm[key], "{key}");
    }
    assert_eq!(storm["transport"], "shm+grpc");
}

#[test]
fn a_storm_changes_nothing_for_digits() {
    let job = root().join("examples/digits-mlp.toml").display().to_string();
    a_storm_changes_nothing(&[&job, "--set", "train.steps=12000"]);
}

/// `job` with any number of workers and threads, over both transports, and in a storm of so many steps.
fn is_the_same_for_all(job: &str, storm: u32) {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("texts.csv"), texts()).expect("written");
    for (name, bytes) in pictures() {
        std::fs::write(dir.path().join(name), bytes).expect("written");
    }
    let job = written(dir.path(), job);
    let with = |more: &[&str]| {
        let dir = tempfile::tempdir().expect("a folder");
        let out = run(dir.path(), &[&["local", &job, "--json", "--quiet"], more].concat());
        let summary = summary(&out);
        (summary["weights_digest"].as_str().expect("a digest").to_string(), summary["eval"].clone())
    };
    let calm = with(&["--workers", "1"]);
    for (workers, threads) in [("2", "1"), ("3", "2"), ("5", "1"), ("7", "1"), ("1", "2"), ("1", "4")] {
        for transport in ["shm", "grpc"] {
            let got = with(&["--workers", workers, "--threads", threads, "--transport", transport]);
            assert_eq!(got, calm, "{workers} workers, {threads} threads, {transport}");
        }
    }
    assert_eq!(with(&["--workers", "2", "--set", "data.ship=true"]), calm);
    for (accumulate, workers, transport) in
        [("2", "1", "shm"), ("3", "1", "grpc"), ("2", "2", "grpc"), ("99", "2", "shm")]
    {
        let accumulate = format!("train.accumulate={accumulate}");
        let got = with(&["--workers", workers, "--transport", transport, "--set", &accumulate]);
        assert_eq!(got, calm, "{accumulate}, {workers} workers, {transport}");
    }
    assert_ne!(with(&["--workers", "2", "--set", "seed=9"]).0, calm.0);
    a_storm_changes_nothing(&[&job, "--set", &format!("train.steps={storm}")]);
}

#[test]
fn images_with_batch_norm_and_dropout_are_the_same_for_all() {
    is_the_same_for_all(IMAGES, 3000);
}

#[test]
fn steps_by_the_tensor_groups_and_averages_are_the_same_for_all() {
    is_the_same_for_all(&craft(), 1500);
    // Each key counts: the average for what is evaluated alone.
    let dir = tempfile::tempdir().expect("a folder");
    let job = written(dir.path(), &craft());
    let run = |more: &[&str]| {
        let summary =
            calm(&[&[job.as_str(), "--set", "train.steps=40", "--set", "train.schedule=constant"], more].concat());
        (summary["weights_digest"].clone(), summary["eval"].clone())
    };
    let (digest, eval) = run(&[]);
    let other = run(&["--set", "train.ema=0.5"]);
    assert!(other.0 == digest && other.1 != eval, "{other:?} beside {eval}");
    for set in ["train.groups=[]", "train.optimizer=adamw", "train.clip_norm=100"] {
        assert_ne!(run(&["--set", set]).0, digest, "{set}");
    }
}

#[test]
fn pictures_that_change_in_each_epoch_are_the_same_for_all() {
    is_the_same_for_all(PICTURES, 2000);
    // Each key counts.
    let dir = tempfile::tempdir().expect("a folder");
    for (name, bytes) in pictures() {
        std::fs::write(dir.path().join(name), bytes).expect("written");
    }
    let job = written(dir.path(), PICTURES);
    let digest = |more: &[&str]| calm(&[&[job.as_str()], more].concat())["weights_digest"].clone();
    let sets = ["data.augment.crop=2", "data.augment.crop=1", "data.augment.flip=false"];
    let digests = sets.map(|set| digest(&["--set", set]));
    assert_eq!(digests[0], digest(&[]));
    assert!(digests[1..].iter().all(|other| *other != digests[0]), "{digests:?}");
}

/// Files of three channels, which are read or sent.
#[test]
fn cifar_that_is_sent_gives_the_weights_of_cifar_that_is_read() {
    let dir = tempfile::tempdir().expect("a folder");
    let pixels = |i: usize| (0..3072).map(move |p| (p * (i % 7 + 1) / 9 + i * i) as u8);
    let file: Vec<u8> = (0..40).flat_map(|i| std::iter::once((i % 10) as u8).chain(pixels(i))).collect();
    std::fs::write(dir.path().join("batch.bin"), file).expect("written");
    let job = PICTURES.replace("steps = 60", "steps = 9").replace("\"idx\"", "\"cifar\"");
    let job = written(dir.path(), &job.replace("{ images = \"pictures\", labels = \"labels\" }", "[\"batch.bin\"]"));
    let read = calm(&[&job, "--set", "train.partitions=3"]);
    let sent = ["--set", "train.partitions=3", "--set", "data.ship=true"];
    assert_eq!(calm(&[&[job.as_str()], &sent[..]].concat())["weights_digest"], read["weights_digest"]);
}

#[test]
fn texts_with_classes_are_the_same_for_all() {
    is_the_same_for_all(TEXTS, 3000);
}

#[test]
fn clicks_with_sparse_tables_are_the_same_for_all() {
    is_the_same_for_all(CLICKS, 4000);
}

#[test]
fn candidates_that_are_drawn_are_the_same_for_all() {
    is_the_same_for_all(TAKEN, 4000);
    let dir = tempfile::tempdir().expect("a folder");
    let job = written(dir.path(), TAKEN);
    let with = |more: &[&str]| calm(&[&[job.as_str()], more].concat());
    let read = with(&[]);
    let eval = read["eval"].clone();
    assert!(eval["hit_rate"].as_f64() > Some(0.0) && eval["ndcg"].as_f64() < eval["hit_rate"].as_f64(), "{eval}");
    assert_eq!(eval["k"], 5);
    // Each key counts, in training or in the test.
    for (key, training) in [
        ("data.ship=true", None),
        ("data.implicit.negatives=2", Some(true)),
        ("train.loss=binary-cross-entropy", Some(true)),
        ("data.implicit.eval_negatives=all", Some(false)),
        ("data.implicit.k=2", Some(false)),
    ] {
        let got = with(&["--set", key]);
        assert_eq!(got["weights_digest"] == read["weights_digest"], training != Some(true), "{key}");
        assert_eq!(got["eval"] == eval, training.is_none(), "{key}");
        assert_eq!(got["samples"], read["samples"], "a sample is one, whatever is drawn beside it");
    }
}

/// Without a norm to wait for, rows come first wherever the coordinator has a core for them.
#[test]
fn a_dlrm_whose_rows_come_first_is_the_same_for_all() {
    is_the_same_for_all(DOTS, 4000);
}

#[test]
fn a_gpt_with_a_tied_table_and_dropout_is_the_same_for_all() {
    is_the_same_for_all(TEXT, 1500);
}

/// A model of several chunks, whose workers all die together, again and again, in the middle of their pushes.
#[test]
fn new_workers_finish_what_all_the_old_ones_left() {
    let dir = tempfile::tempdir().expect("a folder");
    let job = root().join("examples/digits-mlp.toml").display().to_string();
    let job = [&job, "--set", "model.hidden=[2000, 2000]", "--set", "train.steps=60"];
    let mut cluster = Cluster::start(dir.path(), &job, 2);
    for round in 1..=6 {
        cluster.reach(6 * round);
        for mut worker in std::mem::take(&mut cluster.workers) {
            signal(&worker, Signal::KILL);
            worker.wait().expect("it is dead");
        }
        (0..2).for_each(|_| cluster.worker());
    }
    let (storm, calm) = (cluster.end(), calm(&job));
    assert_eq!(storm["weights_digest"], calm["weights_digest"]);
    assert!(storm["workers_lost"].as_u64() >= Some(11), "{storm}");
}

/// What a killed worker takes with it is seen in the summary.
#[test]
fn losses_are_counted() {
    let dir = tempfile::tempdir().expect("a folder");
    let job = root().join("examples/digits-mlp.toml").display().to_string();
    let job = [&job, "--set", "train.steps=4000"];
    let cluster = Cluster::start(dir.path(), &job, 2);
    cluster.reach(100);
    signal(&cluster.workers[0], Signal::KILL);
    let summary = cluster.end();
    assert_eq!((&summary["workers_lost"], &summary["workers_joined"]), (&1.into(), &2.into()), "{summary}");
    assert!(summary["partitions_reissued"].as_u64() <= Some(8), "{summary}");
}

/// The digest of an example that needs data, cut to 100 steps; `None` where UNISONO_DATA is not set.
fn example(name: &str, options: &[&str]) -> Option<String> {
    if std::env::var_os("UNISONO_DATA").is_none() {
        eprintln!("skipped: set UNISONO_DATA to the folder of the data sets to run {name}");
        return None;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let job = root().join(format!("examples/{name}.toml")).display().to_string();
    let args = [&["local", &job, "--json", "--quiet", "--set", "train.steps=100"], options].concat();
    Some(summary(&run(dir.path(), &args))["weights_digest"].as_str().expect("a digest").to_string())
}

/// `storm` are options for a run that lasts some seconds.
fn example_is_the_same_for_all(name: &str, more: &[&str], storm: &[&str]) {
    let with = |options: &[&str]| example(name, &[more, options].concat());
    let Some(calm) = with(&["--workers", "1"]) else { return };
    for workers in ["2", "3", "5", "8"] {
        assert_eq!(with(&["--workers", workers]), Some(calm.clone()), "{name}, {workers} workers");
    }
    for (workers, threads) in [("1", "2"), ("1", "4"), ("3", "2")] {
        let got = with(&["--workers", workers, "--threads", threads]);
        assert_eq!(got, Some(calm.clone()), "{name}, {workers} workers of {threads} threads");
    }
    for transport in ["shm", "grpc"] {
        let got = with(&["--workers", "2", "--set", "data.ship=true", "--transport", transport]);
        assert_eq!(got, Some(calm.clone()), "{name}, data sent, {transport}");
    }
    assert_ne!(with(&["--workers", "2", "--set", "seed=8"]), Some(calm), "{name}, another seed");
    let job = root().join(format!("examples/{name}.toml")).display().to_string();
    a_storm_changes_nothing(&[&[job.as_str()], more, storm].concat());
}

/// Seven uneven partitions; 100 steps reach beyond the epoch's uneven end.
#[test]
fn mnist_mlp_is_the_same_for_all() {
    let uneven = ["--set", "train.partitions=7", "--set", "train.micro_batch=100"];
    example_is_the_same_for_all("mnist-mlp", &uneven, &["--set", "train.steps=250"]);
}

/// Convolution, batch-norm and dropout; small micro-batches keep it short.
#[test]
fn mnist_cnn_is_the_same_for_all() {
    example_is_the_same_for_all("mnist-cnn", &["--set", "train.micro_batch=3"], &["--set", "train.steps=120"]);
}

/// Seven uneven partitions; 100 steps reach beyond the epoch's uneven end.
#[test]
fn adult_is_the_same_for_all() {
    let uneven = ["--set", "train.partitions=7", "--set", "train.micro_batch=61"];
    example_is_the_same_for_all("adult", &uneven, &["--set", "train.steps=10000"]);
}

#[test]
fn sixty_four_workers_give_the_same_weights() {
    let odd = ["--set", "train.partitions=64", "--set", "train.micro_batch=1", "--set", "train.steps=40"];
    let calm = local(&[&odd[..], &["--workers", "1"]].concat());
    for transport in ["shm", "grpc"] {
        assert_eq!(local(&[&odd[..], &["--workers", "64", "--transport", transport]].concat()), calm, "{transport}");
    }
}
