//! Whatever is wrong with a job, its data, its shapes or its folder: one clear message, the right exit status, nothing left.

use std::path::Path;
use std::time::{Duration, Instant};
use unisono_tests::{root, run, summary};

/// A job that trains; each test makes one thing wrong with it.
const JOB: &str = r#"name = "bad"
[data]
format = "digits"
[model]
kind = "mlp"
hidden = [16, 16]
[train]
partitions = 4
steps = 20
optimizer = { kind = "sgd", lr = 0.05 }
[checkpoint]
dir = "kept"
every_steps = 10
"#;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) {
    std::fs::write(dir.join(name), content).expect("written");
}

/// Every path below `dir`.
fn below(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    entries.flat_map(|p| if p.is_dir() { [vec![p.clone()], below(&p)].concat() } else { vec![p] }).collect()
}

/// Processes that work in `dir`; none where there is no /proc.
fn processes(dir: &Path) -> usize {
    let dir = dir.canonicalize().expect("the folder is there");
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter(|p| std::fs::read_link(p.path().join("cwd")).is_ok_and(|cwd| cwd == dir)).count()
}

/// No checkpoint is half-written, and no process stays.
fn nothing_is_left(dir: &Path) {
    for path in below(dir) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_string();
        assert!(!name.ends_with(".partial"), "{} was left", path.display());
        let half = name.starts_with("step-") && !path.join("manifest.json").exists();
        assert!(!half, "{} has no manifest", path.display());
    }
    let start = Instant::now();
    while processes(dir) > 0 {
        assert!(start.elapsed() < Duration::from_secs(5), "{} processes are left", processes(dir));
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs the program, which must end with `code` and one message that holds all `words`; gives stderr.
fn fails(dir: &Path, args: &[&str], code: i32, words: &[&str]) -> String {
    let output = run(dir, args);
    let error = String::from_utf8_lossy(&output.stderr).to_string();
    let context = format!("{args:?} ended with {}:\n{error}", output.status);
    assert!(!error.contains("panicked"), "{context}");
    let said: Vec<&str> = error.lines().filter(|l| l.starts_with("unisono: ")).collect();
    assert_eq!(said.len(), 1, "not one message: {context}");
    for word in words {
        assert!(said[0].contains(word), "no {word:?}: {context}");
    }
    assert_eq!(output.status.code(), Some(code), "{context}");
    assert!(output.stdout.is_empty(), "a failed command printed {}", String::from_utf8_lossy(&output.stdout));
    nothing_is_left(dir);
    error
}

/// `unisono local` on a job that is refused before anything starts.
fn refused(dir: &Path, job: &str, words: &[&str]) {
    write(dir, "job.toml", job);
    fails(dir, &["local", "job.toml", "--quiet", "--json", "--workers", "2"], 2, words);
    assert!(!dir.join("kept").exists(), "a refused job made its checkpoint folder");
}

/// [`JOB`] with one text replaced.
fn with(from: &str, to: &str) -> String {
    assert_eq!(JOB.matches(from).count(), 1, "{from:?} must be in the job once");
    JOB.replace(from, to)
}

#[test]
fn the_job_that_the_others_spoil_is_good() {
    let dir = folder();
    write(dir.path(), "job.toml", JOB);
    let summary = summary(&run(dir.path(), &["local", "job.toml", "--quiet", "--json", "--workers", "2"]));
    assert_eq!(summary["steps"], 20);
    nothing_is_left(dir.path());
}

#[test]
fn wrong_keys_in_the_file_are_named_with_their_line() {
    let dir = folder();
    let cases: &[(&str, &str, &[&str])] = &[
        ("partitions = 4", "partitons = 4", &["job.toml:8", "`train.partitons`", "did you mean `partitions`"]),
        ("name = \"bad\"", "nmae = \"bad\"", &["job.toml:1", "`nmae`", "did you mean `name`"]),
        ("format = \"digits\"", "", &["job.toml", "`data.format` is missing", "write for example"]),
        ("hidden = [16, 16]", "", &["`model.hidden` is missing"]),
        ("steps = 20", "", &["`train.epochs` or `train.steps` is missing"]),
        ("partitions = 4", "partitions = \"four\"", &["job.toml:8", "`train.partitions` must be a whole number"]),
        ("partitions = 4", "partitions = 0", &["job.toml:8", "`train.partitions`", "from 1 to"]),
        ("hidden = [16, 16]", "hidden = 16", &["job.toml:6", "`model.hidden` must be a list"]),
        ("kind = \"sgd\"", "kind = \"sdg\"", &["job.toml:10", "\"sdg\"", "did you mean \"sgd\""]),
        ("lr = 0.05", "lr = nan", &["job.toml:10", "`train.optimizer.lr`", "above 0"]),
        ("[model]", "[model", &["job.toml:4", "this is not TOML"]),
    ];
    for (from, to, words) in cases {
        refused(dir.path(), &with(from, to), words);
    }
}

#[test]
fn wrong_options_are_named() {
    let dir = folder();
    write(dir.path(), "job.toml", JOB);
    let cases: &[(&str, &[&str])] = &[
        ("train.step=3", &["--set train.step=3", "unknown key `train.step`", "did you mean `steps`"]),
        ("train.steps=-1", &["`train.steps` must be a whole number", "-1"]),
        ("train.steps=many", &["`train.steps` must be a whole number", "\"many\""]),
        ("train.steps", &["no `=`", "KEY=VALUE"]),
        ("=3", &["--set =3", "empty part"]),
        ("model.hidden=[1", &["neither TOML nor a bare word"]),
        ("data.format=xls", &["--set data.format=xls", "no data format", "digits"]),
        ("name.first=a", &["`name`", "holds no `first`"]),
    ];
    for (set, words) in cases {
        fails(dir.path(), &["local", "job.toml", "--quiet", "--set", set], 2, words);
    }
    // As many would call it.
    fails(dir.path(), &["train", "nowhere.toml"], 2, &["there is no job file nowhere.toml"]);
    fails(dir.path(), &["local", "nowhere.toml"], 2, &["there is no job file nowhere.toml", "unisono init"]);
    fails(dir.path(), &["local", "job.toml", "--workers", "0"], 2, &["--workers", "at least 1"]);
    fails(dir.path(), &["local", "job.toml", "--heartbeat-timeout", "nan"], 2, &["--heartbeat-timeout", "positive"]);
}

/// An IDX file.
fn idx(magic: u32, sizes: &[u32], bytes: &[u8]) -> Vec<u8> {
    std::iter::once(&magic).chain(sizes).flat_map(|n| n.to_be_bytes()).chain(bytes.iter().copied()).collect()
}

#[test]
fn broken_idx_files_are_named() {
    let dir = folder();
    let job = with(
        "format = \"digits\"",
        "format = \"idx\"\ntrain = { images = \"i\", labels = \"l\" }\ntest = { images = \"ti\", labels = \"tl\" }",
    );
    let images = idx(0x803, &[8, 2, 2], &[7; 32]);
    let labels = idx(0x801, &[8], &[0, 1, 2, 0, 1, 2, 0, 1]);
    let good = [("i", &images), ("l", &labels), ("ti", &images), ("tl", &labels)];
    let missing = ["there is no file", "`l`", "UNISONO_DATA"];
    type Case<'a> = (&'a str, Option<Vec<u8>>, &'a [&'a str]);
    let cases: &[Case<'_>] = &[
        ("l", None, &missing),
        ("i", Some(images[..40].to_vec()), &["ends too early", "32 bytes", "24 are there"]),
        ("i", Some(images[..6].to_vec()), &["ends within its header"]),
        ("i", Some(labels.clone()), &["0x00000801", "swapped"]),
        ("l", Some(b"what is this, not a file of labels".to_vec()), &["IDX", "starts with"]),
        ("l", Some(idx(0x801, &[7], &[0; 7])), &["8 images", "7 labels"]),
        ("l", Some(idx(0x801, &[0], &[])), &["holds no samples"]),
        ("tl", Some(idx(0x801, &[8], &[0, 0, 0, 9, 0, 0, 0, 0])), &["sample 3 has label 9", "end at 2"]),
        ("ti", Some(idx(0x803, &[8, 1, 4], &[7; 32])), &["shape [1, 1, 4]", "[1, 2, 2]"]),
    ];
    for (name, content, words) in cases {
        good.iter().for_each(|(name, bytes)| write(dir.path(), name, bytes));
        match content {
            Some(bytes) => write(dir.path(), name, bytes),
            None => std::fs::remove_file(dir.path().join(name)).expect("removed"),
        }
        refused(dir.path(), &job, words);
    }
}

#[test]
fn broken_csv_files_are_named_with_line_and_column() {
    let dir = folder();
    let job = with("format = \"digits\"", "format = \"csv\"\ntrain = \"t.csv\"\ntarget = \"y\"");
    let cases: &[(&str, &[&str])] = &[
        ("a,b,y\n1,2,0\n3,1\n", &["t.csv:3", "2 cells", "3 columns"]),
        ("a,b,y\n1,2,0\n3,4,1,5\n", &["t.csv:3", "4 cells", "3 columns"]),
        ("a,b,y\n1,2,0\n3,old,1\n", &["t.csv:3", "column `b`", "`old`", "not a finite number"]),
        ("a,b,y\n1,2,0\nNaN,4,1\n", &["t.csv:3", "column `a`", "`NaN`", "not a finite number"]),
        ("a,b,y\n1,2,0\n1e99,4,1\n", &["t.csv:3", "column `a`", "`1e99`", "not a finite number"]),
        ("a,b,y\n1,2,0\n3,4,\n", &["t.csv:3", "target `y` is missing"]),
        ("a,b,z\n1,2,0\n", &["data.target", "`y`", "nearest is `z`"]),
        ("a,a,y\n1,2,0\n", &["two columns `a`"]),
        ("a,b,y\n", &["holds no samples"]),
        ("a,b,y\n1,2,0\n3,4,1\n", &["2 samples do not fill 4 partitions", "train.partitions"]),
    ];
    for (text, words) in cases {
        write(dir.path(), "t.csv", text);
        refused(dir.path(), &job, words);
    }
    write(dir.path(), "t.csv", b"a,b,y\n1,\xff,0\n");
    refused(dir.path(), &job, &["t.csv:2", "not UTF-8"]);
    write(dir.path(), "t.csv", "a,b,y\n1,2,0\n1,2,1\n1,2,2\n3,4,1\n");
    let binary = job.replace("steps = 20", "steps = 20\nloss = \"binary-cross-entropy\"");
    refused(dir.path(), &binary, &["binary"]);
}

#[test]
fn shapes_that_do_not_fit_are_named_with_the_layer() {
    let dir = folder();
    let image = "{ format = \"synthetic\", shape = [1, 8, 8], classes = 4, samples = 64 }";
    let cases: &[(&str, &[&str])] = &[
        (
            r#"{ op = "flatten" }, { op = "conv2d", filters = 2, kernel = 3 }"#,
            &["model.layers[1] (conv2d)", "shape [64]", "before \"flatten\""],
        ),
        (r#"{ op = "linear", units = 4 }"#, &["model.layers[0] (linear)", "[1, 8, 8]", "flatten"]),
        (r#"{ op = "flatten" }, { op = "linear", units = 5 }"#, &["gives [5]", "need 4", "units = 4"]),
        (r#"{ op = "max-pool2d", size = 9 }"#, &["model.layers[0] (max-pool2d)", "at least 9"]),
        (
            r#"{ op = "flatten" }, { op = "residual", layers = [{ op = "linear", units = 3 }] }"#,
            &["model.layers[1] (residual)", "same shape", "[3]"],
        ),
    ];
    for (layers, words) in cases {
        let text = format!(
            "data = {image}\nmodel = {{ kind = \"layers\", layers = [{layers}] }}\ntrain = {{ steps = 5 }}\n\
             checkpoint = {{ dir = \"kept\" }}\n"
        );
        refused(dir.path(), &text, words);
    }
}

#[test]
fn texts_and_models_that_do_not_fit_are_named() {
    let dir = folder();
    write(dir.path(), "short.txt", "to be");
    write(dir.path(), "empty.txt", "");
    write(dir.path(), "latin.txt", b"a\nb \xe9\n");
    let text = |file: &str, more: &str| format!("format = \"text\"\ntrain = \"{file}\"\ncontext = 4\n{more}");
    let of =
        |data: &str, model: &str| with("format = \"digits\"", data).replace("kind = \"mlp\"\nhidden = [16, 16]", model);
    let gpt = "kind = \"gpt\"\nlayers = 1\nheads = 2\nwidth = 8";
    for (job, words) in [
        (of(&text("short.txt", ""), gpt), &["short.txt", "5 tokens", "data.context = 4", "at least 8"][..]),
        (of(&text("empty.txt", ""), gpt), &["empty.txt", "0 tokens"]),
        (of(&text("latin.txt", ""), gpt), &["latin.txt:2", "UTF-8"]),
        (of(&text("none.txt", ""), gpt), &["none.txt", "UNISONO_DATA"]),
        (
            of(&text("short.txt", "holdout = 0.5\ntest = \"short.txt\""), gpt),
            &["job.toml:6", "data.holdout", "data.test"],
        ),
        (of(&text("short.txt", "holdout = 1.5"), gpt), &["job.toml:6", "above 0 and below 1"]),
        (of(&text("short.txt", ""), "kind = \"linear\""), &["5 tokens"]),
        (of("format = \"digits\"", gpt), &["model.layers[0]", "embedding", "tokens", "first"]),
        (
            of("format = \"digits\"", &gpt.replace("heads = 2", "heads = 3")),
            &["job.toml:7", "model.heads", "divide", "8"],
        ),
    ] {
        refused(dir.path(), &job, words);
    }
    let language = "format = \"synthetic\"\ntask = \"language\"\nvocabulary = 9\ncontext = 4\nsamples = 40";
    for (model, words) in [
        ("kind = \"linear\"", &["tokens", "embedding", "gpt"][..]),
        ("kind = \"layers\"\nlayers = [{ op = \"embedding\", width = 8 }]", &["[4, 8]", "[4, 9]", "units = 9"]),
        (
            "kind = \"layers\"\nlayers = [{ op = \"embedding\", width = 8 }, { op = \"attention\", heads = 2 }]",
            &["model.layers[1] (attention)", "[4, 8]", "queries, keys and values of 2 heads"],
        ),
        (
            "kind = \"layers\"\nlayers = [{ op = \"embedding\", width = 12 }, { op = \"attention\", heads = 2 }]",
            &["model.layers[1] (attention)", "causal = true"],
        ),
        (
            "kind = \"layers\"\nlayers = [{ op = \"embedding\", width = 12 }, { op = \"layer-norm\" }]",
            &["model.layers[1] (layer-norm)", "dims = 1"],
        ),
        (
            "kind = \"layers\"\nlayers = [{ op = \"embedding\", width = 9 }, { op = \"embedding\", width = 8 }]",
            &["model.layers[1] (embedding)", "first"],
        ),
    ] {
        refused(dir.path(), &of(language, model), words);
    }
    write(dir.path(), "texts.tsv", "text\tkind\nhello you\tham\nwin a prize now\tspam\nbye\tham\nwin\tspam\n");
    let table =
        |more: &str| format!("format = \"csv\"\ntrain = \"texts.tsv\"\nseparator = \"\\t\"\ntarget = \"kind\"\n{more}");
    let bag = "kind = \"text-classifier\"";
    for (data, model, words) in [
        (
            "text = \"text\"\ncontext = 3",
            bag,
            &["texts.tsv:3", "`text`", "4 tokens", "data.context = 3", "truncate"][..],
        ),
        ("text = \"text\"", bag, &["data.context", "missing"]),
        ("text = \"text\"\ncontext = 4\nignore = [\"kind\"]", bag, &["job.toml:9", "data.ignore", "data.text"]),
        ("context = 4", bag, &["job.toml:7", "data.context", "data.text"]),
        ("text = \"txt\"\ncontext = 4", bag, &["data.text", "`txt`", "nearest is `text`"]),
        ("text = \"text\"\ncontext = 4", "kind = \"linear\"", &["tokens", "text-classifier"]),
    ] {
        refused(dir.path(), &of(&table(data), model), words);
    }
    let mse = of(language, gpt).replace("steps = 20", "steps = 20\nloss = \"mse\"");
    refused(dir.path(), &mse, &["mse", "next token"]);
}

/// [`JOB`] on a table with ids.
fn of_ids(ids: &str, model: &str) -> String {
    let data = format!("format = \"csv\"\ntrain = \"clicks.csv\"\ntarget = \"clicked\"\n{ids}");
    let job = with("format = \"digits\"", &data).replace("kind = \"mlp\"\nhidden = [16, 16]", model);
    job.replace("steps = 20", "steps = 20\nloss = \"binary-cross-entropy\"")
}

/// Lines with users from 0 to 4.
fn clicks() -> String {
    let line = |i: usize| format!("{},{},{},{}\n", i % 5, ["news", "maps", "mail"][i % 3], i, ["no", "yes"][i / 2 % 2]);
    (0..24).fold("user,site,visits,clicked\n".into(), |table, i| table + &line(i))
}

#[test]
fn ids_and_models_that_do_not_fit_are_named() {
    let dir = folder();
    write(dir.path(), "clicks.csv", clicks());
    let (user, deep) = ("ids = [\"site\", { column = \"user\", size = 3 }]", "kind = \"wide-deep\"\nhidden = [4]");
    let good = "ids = [\"site\", { column = \"user\", size = 5 }]";
    for (job, words) in [
        (of_ids(user, deep), &["clicks.csv:5", "column `user` holds `3`", "whole number below 3", "data.ids"][..]),
        (
            of_ids("ids = [\"site\", { column = \"site\", size = 3 }]", deep),
            &["clicks.csv:2", "column `site` holds `news`", "leave `size` out"],
        ),
        (of_ids("ids = [\"sites\"]", deep), &["data.ids names the column `sites`", "nearest is `site`"]),
        (of_ids("ids = [\"clicked\"]", deep), &["`clicked` is in data.ids and data.target"]),
        (
            of_ids("ids = [\"site\"]\nignore = [\"site\"]", deep),
            &["`site` is in data.ids and in data.ignore", "take it out of one"],
        ),
        (
            of_ids("ids = [\"site\"]\nlog = [\"site\"]", deep),
            &["data.log names the column `site`", "does not hold numbers", "data.ids"],
        ),
        (
            of_ids(good, "kind = \"mlp\"\nhidden = [4]"),
            &["the data has 2 ids a sample", "looks none of them up", "\"wide-deep\"", "take data.ids out"],
        ),
        (
            of_ids(good, "kind = \"layers\"\nlayers = [{ op = \"lookup\", width = 1 }, { op = \"sum\" }]"),
            &["no parameters to train, but for sparse tables", "linear"],
        ),
        (
            of_ids(good, "kind = \"layers\"\nlayers = [{ op = \"slice\", len = 3 }, { op = \"linear\", units = 1 }]"),
            &["model.layers[0] (slice)", "[1]", "at least 3 values"],
        ),
        (
            of_ids(good, "kind = \"deepfm\"").replace("binary-cross-entropy", "cross-entropy"),
            &["kind = \"deepfm\" gives one value", "need 2", "train.loss = \"binary-cross-entropy\""],
        ),
        (
            with("kind = \"mlp\"\nhidden = [16, 16]", "kind = \"wide-deep\""),
            &["the model looks ids up", "the data has none", "data.ids", "kind = \"mlp\""],
        ),
        (
            with(
                "kind = \"mlp\"\nhidden = [16, 16]",
                "kind = \"layers\"\nlayers = [{ op = \"flatten\" }, { op = \"lookup\", width = 4 }]",
            ),
            &["the model looks ids up (model.layers[1])", "the data has none"],
        ),
    ] {
        refused(dir.path(), &job, words);
    }
    // A row with an id that the model cannot know.
    write(dir.path(), "job.toml", of_ids(good, deep));
    summary(&run(dir.path(), &["local", "job.toml", "--quiet", "--json", "--workers", "2"]));
    write(dir.path(), "rows.jsonl", "{\"site\":\"maps\",\"user\":5,\"visits\":1}\n");
    let words = ["rows.jsonl:1", "column `user` is `5`", "whole number below 5"];
    fails(dir.path(), &["predict", "kept", "rows.jsonl"], 2, &words);
    write(dir.path(), "rows.jsonl", "{\"site\":\"maps\",\"visits\":1}\n");
    fails(dir.path(), &["predict", "kept", "rows.jsonl"], 2, &["rows.jsonl:1", "column `user` is not given"]);
}

/// [`JOB`] on other data and a linear model.
fn of_data(keys: &str) -> String {
    with("format = \"digits\"", keys).replace("kind = \"mlp\"\nhidden = [16, 16]", "kind = \"linear\"")
}

#[test]
fn tables_of_every_format_that_do_not_fit_are_named() {
    let dir = folder();
    let good = "{\"x\": 1, \"kind\": \"a\"}\n{\"x\": 2, \"kind\": \"b\"}\n";
    write(dir.path(), "cut.jsonl", format!("{good}{{\"x\": 3, \"kin"));
    write(dir.path(), "deep.jsonl", format!("{good}{{\"x\": {{\"of\": 3}}, \"kind\": \"a\"}}\n"));
    write(dir.path(), "text.jsonl", format!("{good}{{\"x\": \"three\", \"kind\": \"a\"}}\n"));
    write(dir.path(), "rows.csv", "x,kind\n1,a\n");
    let lines = |of: &str| format!("1 1:0.5\n-1 2:1\n1 {of}\n");
    for (name, of) in [("pair.svm", "3=4"), ("query.svm", "qid:4 3:4"), ("size.svm", "12:1")] {
        write(dir.path(), name, lines(of));
    }
    write(dir.path(), "click.txt", format!("1\t{}\n", ["5"; 38].join("\t")));
    let json = |file: &str, more: &str| {
        of_data(&format!("format = \"json-lines\"\ntrain = {file:?}\ntarget = \"kind\"{more}"))
    };
    let libsvm = |file: &str, more: &str| {
        of_data(&format!("format = \"libsvm\"\ntrain = {file:?}{more}")).replace("linear", "logistic")
    };
    for (job, words) in [
        (json("cut.jsonl", ""), &["cut.jsonl:3: this is not one JSON object", "EOF", "data.on_error"][..]),
        (json("deep.jsonl", ""), &["deep.jsonl:3: column `x` holds an object", "data.ignore"]),
        (
            json("text.jsonl", ""),
            &["text.jsonl:3: column `x` holds `three`", "not a finite number", "data.categorical"],
        ),
        (json("text.jsonl", "\nignore = [\"y\"]"), &["data.ignore names the column `y`", "text.jsonl does not have"]),
        (json("text.jsonl", "\nseparator = \";\""), &["job.toml:6", "unknown key `data.separator`"]),
        (
            json("text.jsonl", "\non_error = \"skip\"\nmax_errors = 0"),
            &["1 of the rows or files cannot be used, and data.max_errors = 0", "correct them, or raise it"],
        ),
        (json("text.jsonl", "\nmax_errors = 3"), &["job.toml:6", "data.max_errors", "data.on_error = \"skip\""]),
        (json("text.jsonl", "\non_error = \"ignore\""), &["job.toml:6", "\"ignore\"", "`stop`, `skip`"]),
        (
            of_data("format = \"parquet\"\ntrain = \"rows.csv\"\ntarget = \"kind\""),
            &["rows.csv cannot be read as Parquet", "copy it again"],
        ),
        (libsvm("pair.svm", ""), &["pair.svm:3: `3=4` is not `feature:value`"]),
        (libsvm("query.svm", ""), &["query.svm:3: `qid:4` names a query", "take the qid fields out"]),
        (libsvm("size.svm", "\nsize = 11"), &["size.svm:3: feature 12 is above data.size = 11"]),
        (
            libsvm("size.svm", "").replace("logistic", "linear"),
            &["the data has 1 ids a sample", "looks none of them up", "the features of `libsvm` are ids"],
        ),
        (
            of_data("format = \"criteo\"\ntrain = \"click.txt\"").replace("linear", "logistic"),
            &["click.txt:1: 39 cells, but there are 40 columns"],
        ),
    ] {
        refused(dir.path(), &job, words);
    }
}

#[test]
fn tokenizers_that_are_none_are_named() {
    let dir = folder();
    write(dir.path(), "book.txt", "a b ".repeat(200));
    write(dir.path(), "rows.csv", "x,kind\na b,no\nb new,yes\n");
    let file = |model: &str| format!(r#"{{ "model": {model}, "pre_tokenizer": {{ "type": "Whitespace" }} }}"#);
    let words = r#"{ "type": "WordLevel", "vocab": { "a": 0, "b": 1 }, "unk_token": "<unk>" }"#;
    write(dir.path(), "good.json", file(words));
    write(dir.path(), "prose.json", "once upon a time");
    write(dir.path(), "other.json", "{\"vocab\": [\"a\", \"b\"]}");
    write(dir.path(), "twice.json", file(&words.replace('1', "0")));
    write(dir.path(), "panic.json", file(words).replace("\"Whitespace\"", "\"FixedLength\", \"length\": \"five\""));
    let of = |data: &str, tokenizer: &str| {
        with("format = \"digits\"", &format!("{data}\ncontext = 4\ntokenizer = {tokenizer}"))
            .replace("kind = \"mlp\"\nhidden = [16, 16]", "kind = \"text-classifier\"")
    };
    let texts = "format = \"text\"\ntrain = \"book.txt\"";
    let rows = "format = \"csv\"\ntrain = \"rows.csv\"\ntarget = \"kind\"\ntext = \"x\"";
    let path = |path: &str| format!("{{ kind = \"file\", path = {path:?} }}");
    for data in [texts, rows] {
        for (tokenizer, words) in [
            ("\"file\"".into(), &["job.toml:", "`data.tokenizer.path` is missing", "path = \"tokenizer.json\""][..]),
            (path("none.json"), &["there is no file `none.json`", "UNISONO_DATA"]),
            (path("prose.json"), &["prose.json is no tokenizer", "line 1 column 1", "give a tokenizer.json"]),
            (path("other.json"), &["other.json is no tokenizer", "missing field `model`"]),
            (path("twice.json"), &["twice.json is no tokenizer", "two of its tokens have the id 0"]),
            (path("panic.json"), &["panic.json is no tokenizer"]),
        ] {
            refused(dir.path(), &of(data, &tokenizer), words);
        }
    }
    let good = path("good.json");
    write(dir.path(), "book.txt", "a b c ".repeat(200));
    refused(dir.path(), &of(texts, &good), &["the tokenizer has no tokens for ", "book.txt: ", "[UNK]"]);
    let row = ["rows.csv:3: the tokenizer has no tokens for the text of column `x`", "data.on_error = \"skip\""];
    refused(dir.path(), &of(rows, &good), &row);
}

/// Tables that grow beyond what they may take end the run, and what was kept is gone on with when they may take more.
#[test]
fn tables_above_their_memory_end_the_run_and_keep_its_last_checkpoint() {
    let dir = folder();
    let job = r#"
        name = "full"
        data = { format = "synthetic", task = "clicks", fields = 8, vocabulary = 1000000, zipf = 0, samples = 4096 }
        model = { kind = "logistic" }
        train = { partitions = 4, micro_batch = 56, steps = 12, loss = "binary-cross-entropy", tables = { memory_mb = 1 } }
        checkpoint = { dir = "kept", every_steps = 2 }
    "#;
    write(dir.path(), "job.toml", job);
    let local = ["local", "job.toml", "--quiet", "--json", "--workers", "2"];
    let words = [
        "step 4: ",
        "the sparse tables have room for ",
        "train.tables.memory_mb = 1, and need more: raise it",
        "data.ids",
        "The last good checkpoint is kept/step-0000000",
    ];
    let error = fails(dir.path(), &local, 1, &words);
    // The one that it names is the newest, also where it was being written.
    let eval = summary(&run(dir.path(), &["eval", "kept", "--json"]));
    assert!(error.contains(&format!("kept/step-{:08}\n", eval["step"].as_u64().expect("a step"))), "{error}{eval}");
    let more = ["--set", "train.tables.memory_mb=16"];
    let resumed = summary(&run(dir.path(), &[&local[..], &["--resume"], &more].concat()));
    let calm = folder();
    write(calm.path(), "job.toml", job);
    let calm = summary(&run(calm.path(), &[&local[..], &more].concat()));
    assert_eq!((&resumed["weights_digest"], &resumed["eval"]), (&calm["weights_digest"], &calm["eval"]));
}

#[test]
fn pictures_that_do_not_fit_are_named() {
    let dir = folder();
    let of =
        |data: &str, model: &str| with("format = \"digits\"", data).replace("kind = \"mlp\"\nhidden = [16, 16]", model);
    let resnet = "kind = \"resnet\"\ndepth = 8\nwidth = 2";
    write(dir.path(), "batch.bin", [1; 3073 * 8 + 1]);
    let cifar = "format = \"cifar\"\ntrain = [\"batch.bin\"]";
    refused(dir.path(), &of(cifar, resnet), &["batch.bin", "24585 bytes", "3073", "copy the file again"]);
    write(dir.path(), "batch.bin", [11; 3073 * 8]);
    refused(dir.path(), &of(cifar, resnet), &["batch.bin", "sample 0 has label 11", "end at 9"]);
    write(dir.path(), "batch.bin", [1; 3073 * 8]);
    let crop = format!("{cifar}\naugment = {{ crop = 32 }}");
    refused(dir.path(), &of(&crop, resnet), &["data.augment.crop = 32", "32x32"]);

    let images = "format = \"images\"\ntrain = \"pictures\"\nsize = [8, 8]";
    refused(dir.path(), &of(images, resnet), &["there is no folder `pictures`", "UNISONO_DATA"]);
    for class in ["cat", "dog"] {
        std::fs::create_dir_all(dir.path().join("pictures").join(class)).expect("made");
        write(dir.path(), &format!("pictures/{class}/1.png"), "no picture");
    }
    refused(dir.path(), &of(images, resnet), &["pictures/", "1.png", "cannot be read as a picture", "PNG or JPEG"]);

    let rows = "format = \"synthetic\"\nshape = [8]\nclasses = 4\nsamples = 64\naugment = { flip = true }";
    refused(dir.path(), &of(rows, "kind = \"linear\""), &["data.augment", "shape [8]", "leave it out"]);
    refused(dir.path(), &of("format = \"digits\"", resnet), &["model.layers[0] (conv2d)", "[64]", "image data"]);
    let deep = resnet.replace('8', "9");
    refused(dir.path(), &of("format = \"digits\"", &deep), &["job.toml:6", "`model.depth` is 9", "6 n + 2"]);
    let planes = "format = \"synthetic\"\nshape = [4, 8, 8]\nclasses = 4\nsamples = 64";
    for (layer, words) in [
        ("{ op = \"conv2d\", filters = 6, kernel = 3, groups = 3 }", &["model.layers[0] (conv2d)", "3 groups"][..]),
        (
            "{ op = \"residual\", layers = [{ op = \"relu\" }], shortcut = [{ op = \"flatten\" }] }",
            &["model.layers[0] (residual)", "shortcut", "[4, 8, 8]", "[256]"],
        ),
    ] {
        refused(dir.path(), &of(planes, &format!("kind = \"layers\"\nlayers = [{layer}]")), words);
    }
}

#[test]
fn a_taken_port_is_named() {
    let dir = folder();
    write(dir.path(), "job.toml", JOB);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    fails(
        dir.path(),
        &["coordinator", "job.toml", "--listen", &address],
        2,
        &["cannot listen on", &address, "--listen"],
    );
    fails(dir.path(), &["coordinator", "job.toml", "--listen", "nonsense"], 2, &["cannot listen on nonsense"]);
}

/// Trains [`JOB`] in `dir` up to `steps`, with more options.
fn train<'a>(dir: &Path, steps: &'a str, more: &[&'a str]) -> std::process::Output {
    write(dir, "job.toml", JOB);
    let args = ["local", "job.toml", "--quiet", "--json", "--workers", "2", "--set", steps];
    run(dir, &[&args[..], more].concat())
}

#[test]
fn divergence_names_step_partition_and_tensor_and_keeps_the_last_good_checkpoint() {
    let dir = folder();
    let good = summary(&train(dir.path(), "train.steps=20", &[]));
    let resume = ["local", "job.toml", "--quiet", "--resume", "--set", "train.steps=40"];
    let error = fails(
        dir.path(),
        &[&resume[..], &["--set", "train.optimizer.lr=1e30"]].concat(),
        1,
        &["step 2", "diverged", "is not finite in partition ", "`", "learning rate", "kept/step-00000020"],
    );
    let step = error.split("step ").nth(1).and_then(|t| t.split(' ').next()?.parse::<u64>().ok());
    assert!(step.is_some_and(|s| (20..40).contains(&s)), "{error}");
    let eval = summary(&run(dir.path(), &["eval", "kept", "--json"]));
    assert_eq!(eval["weights_digest"], good["weights_digest"], "the last good checkpoint changed");
}

#[test]
fn divergence_before_any_checkpoint_says_so() {
    let dir = folder();
    write(dir.path(), "job.toml", JOB);
    let args = ["local", "job.toml", "--quiet", "--set", "train.optimizer.lr=1e30"];
    fails(dir.path(), &args, 1, &["diverged", "is not finite", "no checkpoint yet"]);
}

#[test]
fn an_evaluation_that_is_not_finite_ends_the_run() {
    let dir = folder();
    write(dir.path(), "job.toml", JOB);
    let args = ["local", "job.toml", "--quiet", "--set", "train.optimizer.lr=1e25", "--set", "train.eval_every=1"];
    fails(dir.path(), &args, 1, &["step 1 diverged", "loss of the evaluation", " in partition", "learning rate"]);
}

#[test]
fn metrics_that_nobody_measures_are_refused() {
    let dir = folder();
    let early = |metric: &str| {
        with("steps = 20", &format!("steps = 20\nearly_stopping = {{ metric = \"{metric}\", patience = 2 }}"))
    };
    refused(
        dir.path(),
        &early("auc"),
        &["train.early_stopping", "\"auc\"", "\"loss\" or \"log-loss\" or \"accuracy\""],
    );
    let image = "format = \"synthetic\"\nshape = [8]\nclasses = 4\nsamples = 64\ntest_samples = 0";
    let blind = early("loss").replace("format = \"digits\"", image);
    refused(dir.path(), &blind, &["train.early_stopping", "test set", "data.test"]);
    let mse = with("steps = 20", "steps = 20\nloss = \"mse\"");
    refused(dir.path(), &mse, &["mse", "values as targets"]);
}

#[test]
fn wrong_options_of_a_worker_are_named() {
    let dir = folder();
    fails(dir.path(), &["worker", "--coordinator", "not a url"], 2, &["not a url", "http://HOST:PORT"]);
    let args = ["worker", "--coordinator", "127.0.0.1:1", "--threads", "5000"];
    fails(dir.path(), &args, 2, &["--threads", "4096", "5000"]);
}

#[test]
fn a_damaged_checkpoint_is_passed_over_and_named() {
    let calm = folder();
    let calm = summary(&train(calm.path(), "train.steps=30", &[]));
    type Damage = fn(&Path);
    let damages: &[(Damage, &str)] = &[
        (
            |newest| {
                let path = newest.join("weights.safetensors");
                let mut bytes = std::fs::read(&path).expect("there");
                let last = bytes.len() - 1;
                bytes[last] ^= 1;
                std::fs::write(path, bytes).expect("written");
            },
            "weights.safetensors is damaged",
        ),
        (|newest| std::fs::remove_file(newest.join("manifest.json")).expect("removed"), "cannot read its manifest"),
        (|newest| std::fs::write(newest.join("manifest.json"), "{").expect("written"), "manifest.json is damaged"),
        (
            |newest| {
                let path = newest.join("manifest.json");
                let text = std::fs::read_to_string(&path).expect("there").replace("\"step\": 20", "\"step\": 15");
                std::fs::write(path, text).expect("written");
            },
            "manifest.json is damaged: its digest is",
        ),
        (|newest| std::fs::write(newest.join("optimizer.safetensors"), "").expect("written"), "optimizer.safetensors"),
    ];
    for (damage, words) in damages {
        let dir = folder();
        summary(&train(dir.path(), "train.steps=20", &[]));
        damage(&dir.path().join("kept/step-00000020"));
        let output = train(dir.path(), "train.steps=30", &["--resume"]);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains("passed over") && error.contains("step-00000020") && error.contains(words), "{error}");
        assert!(!error.contains("panicked"), "{error}");
        assert_eq!(summary(&output)["weights_digest"], calm["weights_digest"], "resumed from step 10");
        nothing_is_left(dir.path());
    }
}

#[test]
fn there_must_be_something_to_resume() {
    let dir = folder();
    write(dir.path(), "job.toml", JOB);
    let resume = ["local", "job.toml", "--quiet", "--resume"];
    let words = ["no whole checkpoint", "kept", "--resume"];
    fails(dir.path(), &resume, 2, &words);
    std::fs::create_dir(dir.path().join("kept")).expect("made");
    fails(dir.path(), &resume, 2, &words);
}

#[test]
fn other_data_than_the_checkpoints_is_refused() {
    let dir = folder();
    let job = with("format = \"digits\"", "format = \"csv\"\ntrain = \"t.csv\"\ntarget = \"y\"");
    let table = |n: usize| (0..n).map(|i| format!("{i},{},{}\n", i * i % 7, i % 3)).collect::<String>();
    write(dir.path(), "t.csv", format!("a,b,y\n{}", table(40)));
    write(dir.path(), "job.toml", &job);
    summary(&run(dir.path(), &["local", "job.toml", "--quiet", "--json", "--workers", "1"]));
    write(dir.path(), "t.csv", format!("a,b,y\n{}", table(41)));
    let args = ["local", "job.toml", "--quiet", "--resume", "--set", "train.steps=30"];
    fails(dir.path(), &args, 2, &["kept/step-00000020", "other data", "--resume"]);
}

#[test]
fn a_folder_that_another_run_writes_to_is_refused() {
    let dir = folder();
    write(dir.path(), "job.toml", JOB);
    let long = ["coordinator", "job.toml", "--quiet", "--json", "--listen", "127.0.0.1:0"];
    let mut first = unisono_tests::start(dir.path(), &long);
    unisono_tests::wait_until("the first run's lock", || dir.path().join("kept/.lock").exists());
    // The lock is taken right after the file is made.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let second = run(dir.path(), &["local", "job.toml", "--quiet"]);
    first.kill().expect("it runs");
    first.wait().expect("it is dead");
    let error = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(2), "{error}");
    assert!(error.contains("another run") && error.contains("kept") && error.contains("checkpoint.dir"), "{error}");
    // A killed run's lock is gone with it.
    summary(&run(dir.path(), &["local", "job.toml", "--quiet", "--json", "--workers", "1"]));
}

/// Workers of a run that fails are told so, and end.
#[test]
fn workers_end_with_a_run_that_fails() {
    let dir = folder();
    write(dir.path(), "job.toml", JOB);
    let address = format!("127.0.0.1:{}", unisono_tests::free_port());
    let diverges = ["coordinator", "job.toml", "--quiet", "--listen", &address, "--set", "train.optimizer.lr=1e30"];
    let coordinator = unisono_tests::start(dir.path(), &diverges);
    let worker = run(dir.path(), &["worker", "--coordinator", &address, "--patience", "60"]);
    assert_eq!(coordinator.wait_with_output().expect("it ends").status.code(), Some(1));
    let error = String::from_utf8_lossy(&worker.stderr);
    assert!(worker.status.success() && error.contains("the run failed: step"), "{error}");
}

#[test]
fn another_models_checkpoint_is_refused() {
    let dir = folder();
    summary(&train(dir.path(), "train.steps=20", &[]));
    let args = ["local", "job.toml", "--quiet", "--resume", "--set", "train.steps=30", "--set", "model.hidden=[9]"];
    fails(dir.path(), &args, 2, &["kept/step-00000020", "another model"]);
}

#[test]
fn another_optimizers_checkpoint_is_refused() {
    let dir = folder();
    summary(&train(dir.path(), "train.steps=20", &[]));
    let args = ["local", "job.toml", "--quiet", "--resume", "--set", "train.steps=30"];
    fails(dir.path(), &[&args[..], &["--set", "train.optimizer=adamw"]].concat(), 2, &["optimizer"]);
}

#[test]
fn a_file_in_the_place_of_the_checkpoint_folder_is_named() {
    let dir = folder();
    write(dir.path(), "job.toml", JOB);
    write(dir.path(), "kept", "I am a file");
    fails(dir.path(), &["local", "job.toml", "--quiet"], 2, &["checkpoint folder", "kept", "checkpoint.dir"]);
    assert_eq!(std::fs::read(dir.path().join("kept")).expect("still there"), b"I am a file");
}

#[test]
fn the_examples_are_read() {
    let dir = folder();
    let entries = std::fs::read_dir(root().join("examples")).expect("examples").flatten().map(|entry| entry.path());
    for job in entries.filter(|path| path.extension().is_some_and(|ending| ending == "toml")) {
        let job = job.display().to_string();
        // The last thing that is checked of a job is one of its options: everything else was accepted.
        let words = ["--set checkpoint.keep=0"];
        fails(dir.path(), &["local", &job, "--quiet", "--set", "checkpoint.keep=0"], 2, &words);
    }
}
