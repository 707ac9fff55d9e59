//! What is read, and how mistakes are named.

use super::*;
use proptest::prelude::*;

const JOB: &str = "name = \"t\"\nseed = 7\n[data]\nformat = \"digits\"\n[model]\nkind = \"mlp\"\nhidden = [8]\n\
                   [train]\nepochs = 3\noptimizer = \"adamw\"\n";

fn read(text: &str, set: &[&str]) -> Result<Job> {
    let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
    parse(JobText { file: "job.toml".into(), base: "/base".into(), toml: text.into(), overrides: set })
}

fn message(text: &str, set: &[&str]) -> String {
    read(text, set).unwrap_err().to_string()
}

/// A job with these data, model and train parts.
fn job(data: &str, model: &str, train: &str) -> Job {
    let text = format!("data = {{ {data} }}\nmodel = {{ {model} }}\ntrain = {{ epochs = 1, {train} }}");
    let job = read(&text, &[]).unwrap_or_else(|e| panic!("{e}\n{text}"));
    assert_eq!(serde_json::from_str::<Job>(&serde_json::to_string(&job).unwrap()).unwrap(), job, "JSON form");
    job
}

const DIGITS: &str = "format = \"digits\"";
const LINEAR: &str = "kind = \"linear\"";

#[test]
fn defaults_are_filled_in() {
    let got = job(DIGITS, LINEAR, "");
    let want = Job {
        text: got.text.clone(),
        name: "job".into(),
        seed: 0,
        data: Data {
            source: Source::Digits,
            normalize: true,
            ship: None,
            hashed: false,
            augment: None,
            on_error: OnError::Stop,
        },
        model: Model::Linear,
        train: Train {
            partitions: 8,
            micro_batch: 16,
            length: Length::Epochs(1),
            loss: Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None },
            optimizer: Optimizer::AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 },
            groups: vec![],
            ema: None,
            accumulate: 1,
            tables: None,
            schedule: Schedule { kind: ScheduleKind::Constant, warmup_steps: 0 },
            clip_norm: None,
            clip_value: None,
            eval_every: None,
            early_stopping: None,
            top_k: None,
        },
        checkpoint: Checkpoint { dir: "runs/job".into(), every_steps: 500, keep: 3 },
    };
    assert_eq!(got, want);
    let toml = JOB.trim_start_matches("name = \"t\"\n").to_string();
    let text = |file: &str| JobText { file: file.into(), toml: toml.clone(), ..want.text.clone() };
    let named = |file| parse(text(file)).unwrap().name;
    assert_eq!([named("a/big run.toml"), named(".toml"), named("..")], ["big-run", "job", "job"]);
}

#[test]
fn every_source_has_its_defaults_and_every_key_counts() {
    let idx = |images: &str| IdxPaths { base: "/base".into(), images: images.into(), labels: "l".into() };
    let idx_job = job("format = \"idx\", train = { images = \"a\", labels = \"l\" }", LINEAR, "");
    assert_eq!(idx_job.data.source, Source::Idx { train: idx("a"), test: None, classes: None });
    let both =
        "format = \"idx\", train = { images = \"a\", labels = \"l\" }, test = { images = \"b\", labels = \"l\" }";
    let full =
        job(&format!("{both}, classes = 7, normalize = false, ship = true, partition = \"hashed\""), LINEAR, "").data;
    let source = Source::Idx { train: idx("a"), test: Some(idx("b")), classes: Some(7) };
    assert_eq!(
        full,
        Data { source, normalize: false, ship: Some(true), hashed: true, augment: None, on_error: OnError::Stop }
    );

    let form = |columns, header, separator| Form::Csv { columns, header, separator, quoting: true };
    let csv = Table {
        base: "/base".into(),
        form: form(None, true, ','),
        train: "a.csv".into(),
        test: None,
        target: "y".into(),
        weight: None,
        categorical: vec![],
        ids: vec![],
        log: vec![],
        ignore: vec![],
        missing: "?".into(),
        task: Task::Classification,
        holdout: None,
        holdout_by: vec![],
        text: None,
    };
    let plain_csv = csv.clone();
    let some_csv = "format = \"csv\", train = \"a.csv\", target = \"y\"";
    assert_eq!(job(some_csv, LINEAR, "").data.source, Source::Table(csv.clone().into()));
    let columns = Some(vec!["x".into(), "y".into()]);
    let headless = Table { form: form(columns.clone(), false, ','), ..csv.clone() };
    assert_eq!(
        job(&format!("{some_csv}, columns = [\"x\", \"y\"]"), LINEAR, "").data.source,
        Source::Table(headless.into())
    );
    let all = "test = \"b.csv\", columns = [\"x\", \"y\"], header = true, categorical = [\"x\"], ignore = [\"z\"], \
               weight = \"w\", missing = \"\", separator = \"\\t\", task = \"regression\"";
    let full = Table {
        form: form(columns, true, '\t'),
        test: Some("b.csv".into()),
        weight: Some("w".into()),
        categorical: vec!["x".into()],
        ignore: vec!["z".into()],
        missing: "".into(),
        task: Task::Regression,
        ..csv
    };
    assert_eq!(job(&format!("{some_csv}, {all}"), LINEAR, "").data.source, Source::Table(full.into()));

    let plain_text = Form::Csv { columns: None, header: true, separator: ',', quoting: false };
    let by =
        Table { form: plain_text, holdout: Some(0.5), holdout_by: vec!["a".into(), "b".into()], ..plain_csv.clone() };
    let keys = "quoting = false, holdout = 0.5, holdout_by = [\"a\", \"b\"]";
    assert_eq!(job(&format!("{some_csv}, {keys}"), LINEAR, "").data.source, Source::Table(by.into()));

    let id = |columns: &[&str], size| Id { columns: columns.iter().map(|c| c.to_string()).collect(), size };
    let ids = vec![id(&["a"], None), id(&["b"], None), id(&["c"], Some(1 << 48)), id(&["d", "a", "e"], None)];
    let keys = "ids = [\"a\", { column = \"b\" }, { column = \"c\", size = 281474976710656 }, { cross = [\"d\", \"a\", \"e\"] }], \
                log = [\"f\", \"g\"]";
    let of_ids = Table { ids, log: vec!["f".into(), "g".into()], ..plain_csv.clone() };
    assert_eq!(job(&format!("{some_csv}, {keys}"), LINEAR, "").data.source, Source::Table(of_ids.into()));

    for (format, form) in [("json-lines", Form::JsonLines), ("parquet", Form::Parquet)] {
        let spec = format!("format = {format:?}, train = \"a.csv\", target = \"y\"");
        assert_eq!(job(&spec, LINEAR, "").data.source, Source::Table(Table { form, ..plain_csv.clone() }.into()));
    }
    let Source::Table(criteo) = job("format = \"criteo\", train = \"a\", holdout = 0.1", LINEAR, "").data.source else {
        panic!()
    };
    let Form::Csv { columns: Some(columns), header: false, separator: '\t', quoting: false } = &criteo.form else {
        panic!("{criteo:?}")
    };
    assert_eq!((columns.len(), &columns[..2], &columns[39][..]), (40, &["label".into(), "I1".into()][..], "C26"));
    assert_eq!((criteo.ids.len(), criteo.log.len(), criteo.missing.as_str(), criteo.holdout), (26, 13, "", Some(0.1)));
    let lines = LibSvm {
        base: "/base".into(),
        train: "a".into(),
        test: None,
        holdout: None,
        task: Task::Classification,
        size: None,
    };
    let some = "format = \"libsvm\", train = \"a\"";
    assert_eq!(job(some, LINEAR, "").data.source, Source::LibSvm(lines.clone()));
    let all = LibSvm { test: Some("b".into()), task: Task::Regression, size: Some(9), ..lines };
    let keys = "test = \"b\", task = \"regression\", size = 9";
    assert_eq!(job(&format!("{some}, {keys}"), LINEAR, "").data.source, Source::LibSvm(all));
    let on_error = |keys: &str| job(&format!("{some}{keys}"), LINEAR, "");
    assert_eq!(on_error(", on_error = \"skip\"").data.on_error, OnError::Skip { most: 100 });
    assert_eq!(on_error(", on_error = \"skip\", max_errors = 0").data.on_error, OnError::Skip { most: 0 });
    assert_eq!(on_error(", on_error = \"stop\"").data.on_error, OnError::Stop);
    // What is left out decides the result; how much may be, does not.
    assert_ne!(on_error(", on_error = \"skip\"").digest(), on_error("").digest());
    assert_eq!(on_error(", on_error = \"skip\"").digest(), on_error(", on_error = \"skip\", max_errors = 7").digest());

    let made = job("format = \"synthetic\", shape = [1, 2, 3], classes = 4, samples = 5", LINEAR, "").data;
    let shape = vec![1, 2, 3];
    let source = Source::Synthetic { task: Task::Classification, shape, classes: 4, samples: 5, test_samples: 1 };
    assert_eq!(
        made,
        Data { source, normalize: false, ship: None, hashed: false, augment: None, on_error: OnError::Stop }
    );
    let spec = "format = \"synthetic\", task = \"regression\", shape = [9], samples = 80, normalize = true";
    let made = job(spec, LINEAR, "").data;
    let source =
        Source::Synthetic { task: Task::Regression, shape: vec![9], classes: 0, samples: 80, test_samples: 10 };
    assert_eq!((made.source, made.normalize), (source, true));
    let tests = job("format = \"synthetic\", shape = [9], classes = 2, samples = 80, test_samples = 3", LINEAR, "");
    assert!(matches!(tests.data.source, Source::Synthetic { test_samples: 3, .. }));

    let language = "format = \"synthetic\", task = \"language\", vocabulary = 5, context = 4, samples = 80";
    let source = Source::SyntheticText { vocabulary: 5, context: 4, samples: 80, test_samples: 10 };
    assert_eq!(job(language, LINEAR, "").data.source, source);

    let clicks = "format = \"synthetic\", task = \"clicks\", vocabulary = 9, samples = 80";
    let plain = Clicks { numbers: 13, fields: 26, vocabulary: 9, zipf: 1.0, samples: 80, test_samples: 10 };
    let made = job(clicks, LINEAR, "").data;
    assert_eq!(
        made,
        Data {
            source: Source::Clicks(plain.clone()),
            normalize: false,
            ship: None,
            hashed: false,
            augment: None,
            on_error: OnError::Stop
        }
    );
    let all = Clicks { numbers: 2, fields: 3, zipf: 0.0, test_samples: 0, ..plain };
    let keys = "numbers = 2, fields = 3, zipf = 0, test_samples = 0";
    assert_eq!(job(&format!("{clicks}, {keys}"), LINEAR, "").data.source, Source::Clicks(all));

    let plain = "format = \"text\", train = \"a.txt\", context = 4";
    let text = Text {
        base: "/base".into(),
        train: "a.txt".into(),
        test: None,
        holdout: None,
        column: None,
        tokenizer: Tokenizer::Bytes,
        context: 4,
    };
    assert_eq!(job(plain, LINEAR, "").data.source, Source::Text(text.clone()));
    let characters = Text { tokenizer: Tokenizer::Characters, holdout: Some(0.25), ..text.clone() };
    let got = job(&format!("{plain}, tokenizer = \"characters\", holdout = 0.25"), LINEAR, "");
    assert_eq!(got.data.source, Source::Text(characters));
    let words = |most, ngrams, buckets| Tokenizer::Words { most, ngrams, buckets };
    let of_words = job(&format!("{plain}, tokenizer = {{ kind = \"words\", most = 5 }}"), LINEAR, "").data.source;
    assert_eq!(of_words, Source::Text(Text { tokenizer: words(5, 1, 1 << 16), ..text.clone() }));
    let file = Tokenizer::File { path: "t.json".into() };
    let of_file =
        job(&format!("{plain}, tokenizer = {{ kind = \"file\", path = \"t.json\" }}"), LINEAR, "").data.source;
    assert_eq!(of_file, Source::Text(Text { tokenizer: file, ..text.clone() }));
    let texts = |keys: &str| job(&format!("{some_csv}, text = \"x\", context = 9{keys}"), LINEAR, "").data.source;
    let column = |tokenizer, truncate| TextColumn { column: "x".into(), tokenizer, context: 9, truncate };
    let some = Table { text: Some(column(words(50_000, 1, 1 << 16), false)), ..plain_csv.clone() };
    assert_eq!(texts(""), Source::Table(some.into()));
    let all = Table { holdout: Some(0.5), text: Some(column(words(50_000, 3, 7), true)), ..plain_csv };
    let keys = ", holdout = 0.5, truncate = true, tokenizer = { kind = \"words\", ngrams = 3, buckets = 7 }";
    assert_eq!(texts(keys), Source::Table(all.into()));
    let separated = |separator| Form::Csv { columns: None, header: true, separator, quoting: true };
    for (end, form) in [
        ("jsonl", Form::JsonLines),
        ("ndjson.gz", Form::JsonLines),
        ("csv.gz", separated(',')),
        ("tsv", separated('\t')),
        ("parquet", Form::Parquet),
    ] {
        let (train, test) = (format!("a.b.{end}"), format!("c.{end}"));
        let keys = format!("format = \"text\", context = 4, text = \"x\", train = {train:?}, test = {test:?}");
        let want = Text { train, test: Some(test), column: Some(("x".into(), form)), ..text.clone() };
        assert_eq!(job(&keys, LINEAR, "").data.source, Source::Text(want));
    }
    let tested = Text { test: Some("b.txt".into()), ..text };
    assert_eq!(job(&format!("{plain}, test = \"b.txt\""), LINEAR, "").data.source, Source::Text(tested));
}

#[test]
fn every_model_and_layer_has_its_defaults_and_every_key_counts() {
    let mlp = |keys: &str| job(DIGITS, &format!("kind = \"mlp\", hidden = [4, 2]{keys}"), "").model;
    let want = |activation, dropout| Model::Mlp { hidden: vec![4, 2], activation, dropout };
    assert_eq!(mlp(""), want(Activation::Relu, 0.0));
    assert_eq!(mlp(", activation = \"gelu\", dropout = 0.5"), want(Activation::Gelu, 0.5));
    assert_eq!(mlp(", activation = \"leaky-relu\""), want(Activation::LeakyRelu { slope: 0.01 }, 0.0));
    let leaky = ", activation = { kind = \"leaky-relu\", slope = 0.25 }";
    assert_eq!(mlp(leaky), want(Activation::LeakyRelu { slope: 0.25 }, 0.0));

    let gpt = |keys: &str| job(DIGITS, &format!("kind = \"gpt\", layers = 2, heads = 3, width = 12{keys}"), "").model;
    let plain = Gpt {
        layers: 2,
        heads: 3,
        width: 12,
        hidden: 48,
        feed_forward: FeedForward::Gelu,
        norm: Norm::LayerNorm,
        positions: PositionKind::Learned,
        bias: true,
        tie: false,
        dropout: 0.0,
    };
    assert_eq!(gpt(""), Model::Gpt(plain.clone()));
    let keys = ", feed_forward = \"swiglu\", norm = \"rms-norm\", positions = \"rotary\", bias = false, tie = true, dropout = 0.5";
    let llama = Gpt {
        hidden: 32,
        feed_forward: FeedForward::Swiglu,
        norm: Norm::RmsNorm,
        positions: PositionKind::Rotary,
        bias: false,
        tie: true,
        dropout: 0.5,
        ..plain
    };
    assert_eq!(gpt(keys), Model::Gpt(llama.clone()));
    assert_eq!(gpt(&format!("{keys}, hidden = 7")), Model::Gpt(Gpt { hidden: 7, ..llama }));

    let texts = |keys: &str| job(DIGITS, &format!("kind = \"text-classifier\"{keys}"), "").model;
    assert_eq!(texts(""), Model::TextClassifier { width: 32, hidden: vec![], dropout: 0.0 });
    let all = texts(", width = 8, hidden = [4], dropout = 0.5");
    assert_eq!(all, Model::TextClassifier { width: 8, hidden: vec![4], dropout: 0.5 });

    let resnet = |keys: &str| job(DIGITS, &format!("kind = \"resnet\", depth = {keys}"), "").model;
    assert_eq!(resnet("20"), Model::Resnet { depth: 20, width: 16 });
    assert_eq!(resnet("8, width = 4"), Model::Resnet { depth: 8, width: 4 });

    let of_ids = |kind: &str, keys: &str| job(DIGITS, &format!("kind = \"{kind}\"{keys}"), "").model;
    assert_eq!(of_ids("logistic", ""), Model::Logistic);
    assert_eq!(of_ids("matrix-factorization", ""), Model::MatrixFactorization { width: 16 });
    assert_eq!(of_ids("matrix-factorization", ", width = 3"), Model::MatrixFactorization { width: 3 });
    let deep = Deep { width: 16, hidden: vec![256, 128], dropout: 0.0 };
    assert_eq!(of_ids("wide-deep", ""), Model::WideDeep(deep.clone()));
    assert_eq!(of_ids("deepfm", ""), Model::DeepFm(deep));
    let deep = Deep { width: 3, hidden: vec![], dropout: 0.5 };
    let keys = ", width = 3, hidden = [], dropout = 0.5";
    assert_eq!(of_ids("wide-deep", keys), Model::WideDeep(deep.clone()));
    assert_eq!(of_ids("deepfm", keys), Model::DeepFm(deep));
    let dlrm = |width, bottom, top, interaction| Model::Dlrm { width, bottom, top, interaction };
    assert_eq!(of_ids("dlrm", ""), dlrm(16, vec![64], vec![256, 64], Interaction::Dot));
    let keys = ", width = 3, bottom = [4, 5], top = [], interaction = \"concat\"";
    assert_eq!(of_ids("dlrm", keys), dlrm(3, vec![4, 5], vec![], Interaction::Concat));

    let act = |activation| Layer::Activation { activation };
    let lookup = |init| Layer::Lookup { width: 8, init };
    let conv =
        |stride, padding, bias, init| Layer::Conv2d { filters: 5, kernel: 3, stride, padding, groups: 1, bias, init };
    let cases = [
        ("op = \"linear\", units = 3", Layer::Linear { units: 3, bias: true, init: None }),
        (
            "op = \"linear\", units = 3, bias = false, init = \"xavier-normal\"",
            Layer::Linear { units: 3, bias: false, init: Some(WeightInit::XavierNormal) },
        ),
        ("op = \"conv2d\", filters = 5, kernel = 3", conv(1, 0, true, None)),
        (
            "op = \"conv2d\", filters = 5, kernel = 3, stride = 2, padding = 1, bias = false, init = \"kaiming-normal\"",
            conv(2, 1, false, Some(WeightInit::KaimingNormal)),
        ),
        (
            "op = \"conv2d\", filters = 6, kernel = 3, groups = 3",
            Layer::Conv2d { filters: 6, kernel: 3, stride: 1, padding: 0, groups: 3, bias: true, init: None },
        ),
        ("op = \"max-pool2d\", size = 2", Layer::MaxPool2d { size: 2, stride: 2 }),
        ("op = \"max-pool2d\", size = 3, stride = 1", Layer::MaxPool2d { size: 3, stride: 1 }),
        ("op = \"avg-pool2d\", size = 2", Layer::AvgPool2d { size: 2, stride: 2 }),
        ("op = \"global-avg-pool\"", Layer::GlobalAvgPool),
        ("op = \"flatten\"", Layer::Flatten),
        ("op = \"relu\"", act(Activation::Relu)),
        ("op = \"leaky-relu\"", act(Activation::LeakyRelu { slope: 0.01 })),
        ("op = \"leaky-relu\", slope = 1", act(Activation::LeakyRelu { slope: 1.0 })),
        ("op = \"gelu\"", act(Activation::Gelu)),
        ("op = \"tanh\"", act(Activation::Tanh)),
        ("op = \"sigmoid\"", act(Activation::Sigmoid)),
        ("op = \"dropout\"", Layer::Dropout { rate: 0.5 }),
        ("op = \"dropout\", rate = 0", Layer::Dropout { rate: 0.0 }),
        ("op = \"batch-norm\"", Layer::BatchNorm { momentum: 0.1, eps: 1e-5 }),
        ("op = \"batch-norm\", momentum = 1, eps = 0.5", Layer::BatchNorm { momentum: 1.0, eps: 0.5 }),
        ("op = \"layer-norm\"", Layer::LayerNorm { dims: None, eps: 1e-5 }),
        ("op = \"layer-norm\", eps = 0.5", Layer::LayerNorm { dims: None, eps: 0.5 }),
        ("op = \"layer-norm\", dims = 1", Layer::LayerNorm { dims: Some(1), eps: 1e-5 }),
        ("op = \"rms-norm\"", Layer::RmsNorm { dims: None, eps: 1e-5 }),
        ("op = \"rms-norm\", dims = 2, eps = 0.5", Layer::RmsNorm { dims: Some(2), eps: 0.5 }),
        ("op = \"silu\"", act(Activation::Silu)),
        ("op = \"swiglu\"", Layer::Swiglu),
        ("op = \"embedding\", width = 8", Layer::Embedding { width: 8, init: None }),
        (
            "op = \"embedding\", width = 8, init = { kind = \"normal\", std = 0.5 }",
            Layer::Embedding { width: 8, init: Some(WeightInit::Normal { std: 0.5 }) },
        ),
        (
            "op = \"tied-embedding\", width = 8, layers = [{ op = \"swiglu\" }]",
            Layer::TiedEmbedding { width: 8, init: None, layers: vec![Layer::Swiglu] },
        ),
        ("op = \"embedding-bag\", width = 8", Layer::EmbeddingBag { width: 8, init: None }),
        ("op = \"positions\"", Layer::Positions { init: None }),
        ("op = \"attention\", heads = 2", Layer::Attention { heads: 2, causal: false, rotary: None }),
        (
            "op = \"attention\", heads = 2, causal = true, rotary = 100",
            Layer::Attention { heads: 2, causal: true, rotary: Some(100.0) },
        ),
        (
            "op = \"residual\", layers = [{ op = \"tanh\" }]",
            Layer::Residual { layers: vec![act(Activation::Tanh)], shortcut: vec![] },
        ),
        (
            "op = \"residual\", layers = [{ op = \"tanh\" }], shortcut = [{ op = \"flatten\" }]",
            Layer::Residual { layers: vec![act(Activation::Tanh)], shortcut: vec![Layer::Flatten] },
        ),
        ("op = \"lookup\", width = 8", lookup(RowInit::Uniform { bound: 0.05 })),
        ("op = \"lookup\", width = 8, init = \"uniform\"", lookup(RowInit::Uniform { bound: 0.05 })),
        (
            "op = \"lookup\", width = 8, init = { kind = \"uniform\", bound = 0.5 }",
            lookup(RowInit::Uniform { bound: 0.5 }),
        ),
        ("op = \"lookup\", width = 8, init = { kind = \"normal\", std = 2 }", lookup(RowInit::Normal { std: 2.0 })),
        ("op = \"lookup\", width = 8, init = \"zeros\"", lookup(RowInit::Zeros)),
        ("op = \"slice\", len = 3", Layer::Slice { from: 0, len: 3 }),
        ("op = \"slice\", from = 2, len = 3", Layer::Slice { from: 2, len: 3 }),
        ("op = \"sum\"", Layer::Sum),
        ("op = \"factorization-machine\", width = 4", Layer::FactorizationMachine { width: 4 }),
        ("op = \"dot-interaction\", width = 4", Layer::DotInteraction { width: 4 }),
        (
            "op = \"parallel\", branches = [[], [{ op = \"sum\" }, { op = \"tanh\" }]]",
            Layer::Parallel { join: Join::Concat, branches: vec![vec![], vec![Layer::Sum, act(Activation::Tanh)]] },
        ),
        (
            "op = \"parallel\", join = \"sum\", branches = [[{ op = \"sum\" }]]",
            Layer::Parallel { join: Join::Sum, branches: vec![vec![Layer::Sum]] },
        ),
    ];
    for (text, layer) in cases {
        let got = job(DIGITS, &format!("kind = \"layers\", layers = [{{ {text} }}]"), "").model;
        assert_eq!(got, Model::Layers { layers: vec![layer] }, "{text}");
    }
    let tables = JOB.replace("kind = \"mlp\"\nhidden = [8]", "kind = \"layers\"\n[[model.layers]]\nop = \"flatten\"");
    assert_eq!(read(&tables, &[]).unwrap().model, Model::Layers { layers: vec![Layer::Flatten] });
}

#[test]
fn every_loss_has_its_defaults_and_every_key_counts() {
    let cases = [
        ("\"cross-entropy\"", Loss::CrossEntropy { label_smoothing: 0.0, class_weights: None }),
        (
            "{ kind = \"cross-entropy\", label_smoothing = 0.5, class_weights = [0, 2.5] }",
            Loss::CrossEntropy { label_smoothing: 0.5, class_weights: Some(vec![0.0, 2.5]) },
        ),
        ("\"binary-cross-entropy\"", Loss::BinaryCrossEntropy { positive_weight: 1.0 }),
        ("{ kind = \"binary-cross-entropy\", positive_weight = 3 }", Loss::BinaryCrossEntropy { positive_weight: 3.0 }),
        ("\"mse\"", Loss::Mse),
        ("\"mae\"", Loss::Mae),
        ("\"huber\"", Loss::Huber { delta: 1.0 }),
        ("{ kind = \"huber\", delta = 0.5 }", Loss::Huber { delta: 0.5 }),
        ("\"hinge\"", Loss::Hinge { class_weights: None }),
        ("{ kind = \"hinge\", class_weights = [1, 0] }", Loss::Hinge { class_weights: Some(vec![1.0, 0.0]) }),
        ("\"focal\"", Loss::Focal { gamma: 2.0, class_weights: None }),
        (
            "{ kind = \"focal\", gamma = 0.5, class_weights = [2] }",
            Loss::Focal { gamma: 0.5, class_weights: Some(vec![2.0]) },
        ),
    ];
    for (text, loss) in cases {
        assert_eq!(job(DIGITS, LINEAR, &format!("loss = {text}")).train.loss, loss, "{text}");
    }
}

#[test]
fn every_optimizer_has_pytorchs_defaults_and_every_key_counts() {
    let sgd = |lr, momentum, dampening, nesterov, weight_decay| Optimizer::Sgd {
        lr,
        momentum,
        dampening,
        nesterov,
        weight_decay,
    };
    let adagrad = |lr, lr_decay, eps, weight_decay, initial_accumulator| Optimizer::Adagrad {
        lr,
        lr_decay,
        eps,
        weight_decay,
        initial_accumulator,
    };
    let rms = |lr, alpha, eps, momentum, centered, weight_decay| Optimizer::RmsProp {
        lr,
        alpha,
        eps,
        momentum,
        centered,
        weight_decay,
    };
    let adam = |lr, beta1, beta2, eps, weight_decay| Optimizer::Adam { lr, beta1, beta2, eps, weight_decay };
    let adamw = |lr, beta1, beta2, eps, weight_decay| Optimizer::AdamW { lr, beta1, beta2, eps, weight_decay };
    let cases = [
        ("\"sgd\"", sgd(0.01, 0.0, 0.0, false, 0.0)),
        (
            "{ kind = \"sgd\", lr = 1, momentum = 0.5, dampening = 0.25, weight_decay = 2 }",
            sgd(1.0, 0.5, 0.25, false, 2.0),
        ),
        ("{ kind = \"sgd\", momentum = 0.9, nesterov = true }", sgd(0.01, 0.9, 0.0, true, 0.0)),
        ("\"adam\"", adam(1e-3, 0.9, 0.999, 1e-8, 0.0)),
        (
            "{ kind = \"adam\", lr = 1, beta1 = 0.5, beta2 = 0, eps = 0.25, weight_decay = 2 }",
            adam(1.0, 0.5, 0.0, 0.25, 2.0),
        ),
        ("\"adamw\"", adamw(1e-3, 0.9, 0.999, 1e-8, 0.01)),
        (
            "{ kind = \"adamw\", lr = 1, beta1 = 0.5, beta2 = 0, eps = 0.25, weight_decay = 0 }",
            adamw(1.0, 0.5, 0.0, 0.25, 0.0),
        ),
        ("\"lion\"", Optimizer::Lion { lr: 1e-4, beta1: 0.9, beta2: 0.99, weight_decay: 0.0 }),
        (
            "{ kind = \"lion\", lr = 1, beta1 = 0.5, beta2 = 0.25, weight_decay = 4 }",
            Optimizer::Lion { lr: 1.0, beta1: 0.5, beta2: 0.25, weight_decay: 4.0 },
        ),
        ("\"adagrad\"", adagrad(0.01, 0.0, 1e-10, 0.0, 0.0)),
        (
            "{ kind = \"adagrad\", lr = 1, lr_decay = 2, eps = 3, weight_decay = 4, initial_accumulator = 5 }",
            adagrad(1.0, 2.0, 3.0, 4.0, 5.0),
        ),
        ("\"rmsprop\"", rms(0.01, 0.99, 1e-8, 0.0, false, 0.0)),
        (
            "{ kind = \"rmsprop\", lr = 1, alpha = 0.5, eps = 3, momentum = 4, centered = true, weight_decay = 5 }",
            rms(1.0, 0.5, 3.0, 4.0, true, 5.0),
        ),
    ];
    for (text, optimizer) in cases {
        assert_eq!(job(DIGITS, LINEAR, &format!("optimizer = {text}")).train.optimizer, optimizer, "{text}");
    }
}

#[test]
fn every_row_optimizer_has_its_defaults_and_every_key_counts() {
    let tables = |keys: &str| job(DIGITS, LINEAR, &format!("tables = {{ {keys} }}")).train.tables();
    let adagrad = |lr, eps, initial_accumulator| RowOptimizer::Adagrad { lr, eps, initial_accumulator };
    let by_row = |lr, eps, initial_accumulator| RowOptimizer::RowAdagrad { lr, eps, initial_accumulator };
    let adam = |lr, beta1, beta2, eps| RowOptimizer::LazyAdam { lr, beta1, beta2, eps };
    let ftrl = |lr, beta, l1, l2| RowOptimizer::Ftrl { lr, beta, l1, l2 };
    let cases = [
        ("\"adagrad\"", adagrad(0.01, 1e-10, 0.0)),
        ("{ kind = \"adagrad\", lr = 1, eps = 2, initial_accumulator = 3 }", adagrad(1.0, 2.0, 3.0)),
        ("\"sgd\"", RowOptimizer::Sgd { lr: 0.01 }),
        ("{ kind = \"sgd\", lr = 1 }", RowOptimizer::Sgd { lr: 1.0 }),
        ("\"row-adagrad\"", by_row(0.01, 1e-10, 0.0)),
        ("{ kind = \"row-adagrad\", lr = 1, eps = 2, initial_accumulator = 3 }", by_row(1.0, 2.0, 3.0)),
        ("\"lazy-adam\"", adam(1e-3, 0.9, 0.999, 1e-8)),
        ("{ kind = \"lazy-adam\", lr = 1, beta1 = 0.5, beta2 = 0, eps = 0.25 }", adam(1.0, 0.5, 0.0, 0.25)),
        ("\"ftrl\"", ftrl(0.05, 1.0, 0.0, 0.0)),
        ("{ kind = \"ftrl\", lr = 1, beta = 0, l1 = 2, l2 = 3 }", ftrl(1.0, 0.0, 2.0, 3.0)),
    ];
    for (text, optimizer) in cases {
        let want = Tables { optimizer, memory: 4096 << 20 };
        assert_eq!(tables(&format!("optimizer = {text}")), want, "{text}");
    }
    let plain = Tables { optimizer: adagrad(0.01, 1e-10, 0.0), memory: 4096 << 20 };
    assert_eq!((tables(""), job(DIGITS, LINEAR, "").train.tables()), (plain.clone(), plain.clone()));
    assert_eq!(tables("memory_mb = 7"), Tables { memory: 7 << 20, ..plain.clone() });
    let lr = read(JOB, &["train.tables.optimizer.lr=0.5"]).unwrap().train.tables();
    assert_eq!(lr, Tables { optimizer: adagrad(0.5, 1e-10, 0.0), ..plain });
    // Where rows lie does not decide what is learnt; how they change does.
    let digest = |keys: &str| job(DIGITS, LINEAR, &format!("tables = {{ {keys} }}")).digest();
    assert_eq!(digest("memory_mb = 7"), digest(""));
    assert_ne!(digest("optimizer = \"sgd\""), digest(""));
}

#[test]
fn every_schedule_has_its_defaults_and_every_key_counts() {
    use ScheduleKind::*;
    let plateau = |factor, patience, threshold, metric| Plateau { factor, patience, threshold, metric };
    let cases = [
        ("\"constant\"", Constant, 0),
        ("{ kind = \"step\", every = 9 }", Step { every: 9, gamma: 0.1 }, 0),
        ("{ kind = \"step\", every = 9, gamma = 0.5, warmup_steps = 4 }", Step { every: 9, gamma: 0.5 }, 4),
        (
            "{ kind = \"multi-step\", milestones = [1, 5], gamma = 2 }",
            MultiStep { milestones: vec![1, 5], gamma: 2.0 },
            0,
        ),
        ("{ kind = \"exponential\", gamma = 0.5 }", Exponential { gamma: 0.5 }, 0),
        ("\"cosine\"", Cosine { min_factor: 0.0 }, 0),
        ("{ kind = \"cosine\", min_factor = 0.5 }", Cosine { min_factor: 0.5 }, 0),
        ("\"linear\"", Linear { end_factor: 0.0 }, 0),
        ("{ kind = \"linear\", end_factor = 0.5 }", Linear { end_factor: 0.5 }, 0),
        ("\"polynomial\"", Polynomial { power: 1.0, end_factor: 0.0 }, 0),
        ("{ kind = \"polynomial\", power = 2, end_factor = 0.5 }", Polynomial { power: 2.0, end_factor: 0.5 }, 0),
        ("\"one-cycle\"", OneCycle { start_fraction: 0.3, div_factor: 25.0, final_div_factor: 1e4 }, 0),
        (
            "{ kind = \"one-cycle\", start_fraction = 0.5, div_factor = 2, final_div_factor = 3 }",
            OneCycle { start_fraction: 0.5, div_factor: 2.0, final_div_factor: 3.0 },
            0,
        ),
        ("{ kind = \"inverse-sqrt\", warmup_steps = 100 }", InverseSqrt, 100),
        ("\"plateau\"", plateau(0.1, 10, 1e-4, Metric::Loss), 0),
        (
            "{ kind = \"plateau\", factor = 0.5, patience = 0, threshold = 0, metric = \"auc\" }",
            plateau(0.5, 0, 0.0, Metric::Auc),
            0,
        ),
    ];
    for (text, kind, warmup_steps) in cases {
        let got = job(DIGITS, LINEAR, &format!("schedule = {text}")).train.schedule;
        assert_eq!(got, Schedule { kind, warmup_steps }, "{text}");
    }
}

#[test]
fn every_other_key_counts() {
    let keys = "partitions = 2, micro_batch = 3, clip_norm = 1, clip_value = 0.5, eval_every = 6, \
                early_stopping = { metric = \"rmse\", patience = 4, min_delta = 0.25 }";
    let train = job(DIGITS, LINEAR, keys).train;
    assert_eq!((train.partitions, train.micro_batch, train.eval_every), (2, 3, Some(6)));
    assert_eq!((train.clip_norm, train.clip_value), (Some(1.0), Some(0.5)));
    assert_eq!(train.early_stopping, Some(EarlyStopping { metric: Metric::Rmse, patience: 4, min_delta: 0.25 }));
    let short = job(DIGITS, LINEAR, "early_stopping = { patience = 2 }").train.early_stopping;
    assert_eq!(short, Some(EarlyStopping { metric: Metric::Loss, patience: 2, min_delta: 0.0 }));
    let text = format!("{JOB}[checkpoint]\ndir = \"d\"\nevery_steps = 0\nkeep = 1\n");
    assert_eq!(read(&text, &[]).unwrap().checkpoint, Checkpoint { dir: "d".into(), every_steps: 0, keep: 1 });
    assert_eq!(read(JOB, &[]).unwrap().checkpoint.dir, "runs/t");
}

#[test]
fn overrides_replace_expand_and_exclude() {
    let job = read(JOB, &["train.steps=200", "train.optimizer.lr=0.5", "name=other", "model.hidden=[4, 4]"]).unwrap();
    assert_eq!(job.train.length, Length::Steps(200));
    assert!(matches!(job.train.optimizer, Optimizer::AdamW { lr: 0.5, .. }));
    assert_eq!((job.name.as_str(), job.checkpoint.dir.as_str()), ("other", "runs/other"));
    assert!(matches!(&job.model, Model::Mlp { hidden, .. } if hidden == &[4, 4]));
    // What a table is by default, it also is for a key inside it.
    let job = read(JOB, &["train.schedule.warmup_steps=5", "train.loss.label_smoothing=0.5"]).unwrap();
    assert_eq!(job.train.schedule, Schedule { kind: ScheduleKind::Constant, warmup_steps: 5 });
    assert!(matches!(job.train.loss, Loss::CrossEntropy { label_smoothing: 0.5, .. }));
    let job =
        read(JOB, &["train.optimizer.kind=sgd", "train.steps=2", "train.epochs=9", "checkpoint.keep = 7"]).unwrap();
    assert!(matches!(job.train.optimizer, Optimizer::Sgd { lr: 0.01, .. }));
    assert_eq!((job.train.length, job.checkpoint.keep), (Length::Epochs(9), 7));
    let table = "{ format = \"csv\", train = \"a\", target = \"t\", task = \"regression\", holdout = 0.1, holdout_by = [\"u\"] }";
    let table = JOB.replace("format = \"digits\"", "").replace("[data]", &format!("data = {table}"));
    for (set, test, holdout) in [("data.test=b", Some("b"), None), ("data.holdout=0.5", None, Some(0.5))] {
        let Source::Table(of) = read(&table, &[set]).unwrap().data.source else { panic!("no table") };
        assert_eq!((of.test.as_deref(), of.holdout, of.holdout_by.is_empty()), (test, holdout, test.is_some()));
    }
}

#[test]
fn mistakes_are_named_with_their_place_and_the_way_out() {
    let with = |from: &str, to: &str| {
        assert!(JOB.contains(from));
        JOB.replace(from, to)
    };
    let idx = with("\"digits\"", "\"idx\"\ntrain = { images = \"a\" }");
    let cases = [
        // Unknown.
        (with("epochs", "epochz"), "job.toml:9: unknown key `train.epochz`; did you mean `epochs`?"),
        (
            with("epochs = 3", "epochs = 3\nmico_batch = 4"),
            "job.toml:10: unknown key `train.mico_batch`; did you mean `micro_batch`?",
        ),
        (with("hidden", "hiden"), "job.toml:7: unknown key `model.hiden`; did you mean `hidden`?"),
        (
            with("[8]", "[8]\nzzz = 1"),
            "job.toml:8: unknown key `model.zzz`; the keys here are `kind`, `hidden`, `activation`, `dropout`",
        ),
        (with("[model]", "[modle]"), "job.toml:5: unknown key `modle`; did you mean `model`?"),
        (
            with("\"adamw\"", "{ knd = \"sgd\" }"),
            "job.toml:10: unknown key `train.optimizer.knd`; did you mean `kind`?",
        ),
        (
            with("\"adamw\"", "{ kind = \"sgd\", beta1 = 0.5 }"),
            "job.toml:10: unknown key `train.optimizer.beta1`; the keys here are `kind`, `momentum`, ",
        ),
        (
            with("\"adamw\"", "\"rmspropp\""),
            "job.toml:10: there is no optimizer \"rmspropp\"; did you mean \"rmsprop\"?",
        ),
        (
            with("\"digits\"", "\"hdf5\""),
            "job.toml:4: there is no data format \"hdf5\"; choose one of `digits`, `idx`, `cifar`, `images`, `csv`, `json-lines`, `parquet`, `criteo`, `libsvm`, `text`, `ratings`, `synthetic`",
        ),
        (
            with(
                "kind = \"mlp\"\nhidden = [8]",
                "kind = \"layers\"\nlayers = [\n  { op = \"relu\" },\n  { op = \"linear\", unit = 4 },\n]",
            ),
            "job.toml:9: unknown key `model.layers[1].unit`; did you mean `units`?",
        ),
        (
            with(
                "kind = \"mlp\"\nhidden = [8]",
                "kind = \"layers\"\nlayers = [{ op = \"residual\", layers = [{ op = \"relo\" }] }]",
            ),
            "job.toml:7: there is no layer \"relo\"; did you mean \"relu\"?",
        ),
        // Missing, with other keys there that are right.
        (
            with("[data]\nformat = \"digits\"\n", ""),
            "job.toml:1: `data` is missing; write for example `[data]` and below it `format = \"digits\"`",
        ),
        (
            with("hidden = [8]", "activation = \"relu\""),
            "job.toml:5: `model.hidden` is missing; write for example `hidden = [512, 256]`",
        ),
        (
            with("format = \"digits\"", "normalize = true"),
            "job.toml:3: `data.format` is missing; write for example `format = \"digits\"`",
        ),
        (
            with("epochs = 3\n", ""),
            "job.toml:8: `train.epochs` or `train.steps` is missing; write for example `epochs = 3` or `steps = 2000`",
        ),
        (
            with("\"adamw\"", "{ lr = 0.5 }"),
            "job.toml:10: `train.optimizer.kind` is missing; write for example `kind = \"adamw\"`",
        ),
        (idx, "job.toml:5: `data.train.labels` is missing; write for example `labels = "),
        // Ill-typed.
        (
            with("epochs = 3", "epochs = \"x\""),
            "job.toml:9: `train.epochs` must be a whole number from 1 to 1099511627776, not the text \"x\"",
        ),
        (
            with("[data]\nformat = \"digits\"", "data = 3"),
            "job.toml:3: `data` must be a table, not 3; write { ... } with its keys",
        ),
        (
            with("[8]", "8"),
            "job.toml:7: `model.hidden` must be a list, each item a whole number from 1 to 2147483648, not 8",
        ),
        (
            with("\"digits\"", "1979-05-27"),
            "job.toml:4: `data.format` must be one of `digits`, `idx`, `cifar`, `images`, `csv`, `json-lines`, `parquet`, `criteo`, `libsvm`, `text`, `ratings`, `synthetic`, not a date",
        ),
        (with("[8]", "[8"), "job.toml:8: this is not TOML: missing comma between array elements"),
        (with("seed = 7", "seed = 7\nseed = 8"), "job.toml:3: this is not TOML: duplicate key"),
        // Out of range.
        (
            with("kind = \"mlp\"\nhidden = [8]", "kind = \"resnet\"\ndepth = 18"),
            "job.toml:7: `model.depth` is 18; it must be 8, 14, 20, 26, 32 or another 6 n + 2",
        ),
        (
            with(
                "kind = \"mlp\"\nhidden = [8]",
                "kind = \"layers\"\nlayers = [{ op = \"conv2d\", filters = 6, kernel = 3, groups = 4 }]",
            ),
            "job.toml:7: `model.layers[0].groups` must divide `filters`, which is 6; change one of them",
        ),
        (with("seed = 7", "seed = -7"), "job.toml:2: `seed` must be a whole number of at least 0, not -7"),
        (
            with("[8]", "[\n  8,\n  0]"),
            "job.toml:9: each item of `model.hidden` must be a whole number from 1 to 2147483648, not 0",
        ),
        (with("[8]", "[]"), "job.toml:7: `model.hidden` is empty; write at least one width, or kind = \"linear\""),
        (with("\"t\"", "\"a/b\""), "job.toml:1: `name` must be a text that can name a folder, not the text \"a/b\""),
        (with("\"t\"", "\"..\""), "job.toml:1: `name` must be a text that can name a folder, not the text \"..\""),
        (
            with("epochs = 3", "epochs = 3\nsteps = 4"),
            "job.toml:10: `train.steps` and `train.epochs` are both given; keep one of them",
        ),
        (
            with("\"adamw\"", "{ kind = \"sgd\", nesterov = true }"),
            "job.toml:10: `train.optimizer.nesterov` needs `momentum` above 0 and no `dampening`",
        ),
    ];
    for (text, want) in cases {
        let got = message(&text, &[]);
        assert!(got.starts_with(want), "{got}\n(wanted {want})");
    }
}

#[test]
fn ratings_have_their_defaults_and_every_key_counts() {
    let with = |keys: &str, train: &str| job(&format!("format = \"ratings\", train = \"a\"{keys}"), LINEAR, train).data;
    let plain = RatingFiles {
        base: "/base".into(),
        train: "a".into(),
        test: None,
        holdout: None,
        columns: None,
        header: false,
        separator: Separator::Text(",".into()),
        implicit: None,
    };
    assert_eq!(with("", "").source, Source::RatingFiles(plain.clone()));
    let keys =
        ", test = \"b\", columns = [\"item\", \"user\", \"rating\", \"x\", \"x\"], header = true, separator = \"::\"";
    let columns = Some(["item", "user", "rating", "x", "x"].map(String::from).to_vec());
    let (test, separator) = (Some("b".into()), Separator::Text("::".into()));
    let all = RatingFiles { test, columns, header: true, separator, ..plain.clone() };
    assert_eq!(with(keys, "").source, Source::RatingFiles(all));
    let last = with(", holdout = \"last\", separator = \"whitespace\"", "").source;
    let want = RatingFiles { holdout: Some(HeldOut::Last), separator: Separator::Whitespace, ..plain.clone() };
    assert_eq!(last, Source::RatingFiles(want));
    for (by, holdout) in [("user", HeldOut::Users(0.5)), ("item", HeldOut::Items(0.5))] {
        let keyed = with(&format!(", holdout = 0.5, holdout_by = {by:?}"), "").source;
        assert_eq!(keyed, Source::RatingFiles(RatingFiles { holdout: Some(holdout), ..plain.clone() }));
    }
    let implicit = |keys: &str| with(&format!(", holdout = 0.5, implicit = {{ {keys} }}"), "loss = \"bpr\"");
    let plain =
        |implicit| Source::RatingFiles(RatingFiles { holdout: Some(HeldOut::Share(0.5)), implicit, ..plain.clone() });
    let defaults = Implicit { negatives: 4, threshold: None, eval_negatives: Some(100), k: 10 };
    assert_eq!((implicit("").implicit(), implicit("").source), (Some(defaults), plain(Some(defaults))));
    let all = Implicit { negatives: 9, threshold: Some(-1.5), eval_negatives: None, k: 3 };
    let keys = "negatives = 9, threshold = -1.5, eval_negatives = \"all\", k = 3";
    assert_eq!(implicit(keys).source, plain(Some(all)));
    assert_eq!(implicit("eval_negatives = 7").implicit().unwrap().eval_negatives, Some(7));
    // What is made up tests each user, where nothing is said.
    let made = |keys: &str| {
        let keys = format!(
            "format = \"synthetic\", task = \"ratings\", users = 30, items = 90, samples = 80, implicit = {{ k = 5 }}{keys}"
        );
        let source = job(&keys, LINEAR, "loss = \"binary-cross-entropy\"").data.source;
        if let Source::Ratings(spec) = source { (spec.test_samples, spec.implicit.map(|i| i.k)) } else { panic!() }
    };
    assert_eq!((made(""), made(", test_samples = 4")), ((30, Some(5)), (4, Some(5))));
}

#[test]
fn mistakes_about_ratings_are_named() {
    let data = |keys: &str| JOB.replace("\"digits\"", &format!("\"ratings\"\ntrain = \"a\"\n{keys}"));
    let made = |keys: &str| JOB.replace("\"digits\"", &format!("\"synthetic\"\nsamples = 9\n{keys}"));
    let cases = [
        (data("holdout = \"lst\""), "job.toml:6: `data.holdout` must be \"last\" or a number above 0 and below 1"),
        (data("holdout = 1"), "job.toml:6: `data.holdout` must be \"last\" or a number above 0 and below 1, not 1"),
        (data("test = \"b\"\nholdout = \"last\""), "job.toml:7: `data.holdout` and `data.test` are both given"),
        (
            data("holdout = \"last\"\nholdout_by = \"user\""),
            "job.toml:7: `data.holdout_by` is for a number as data.holdout",
        ),
        (data("holdout_by = \"user\""), "job.toml:6: `data.holdout_by` is for a number as data.holdout"),
        (data("holdout = 0.5\nholdout_by = \"time\""), "job.toml:7: there is no holdout_by \"time\""),
        (data("separator = \"\""), "job.toml:6: `data.separator` must be a text without quotes and line ends, such as"),
        (data("separator = \"\\n\""), "job.toml:6: `data.separator` must be a text without quotes"),
        (data("columns = [\"user\", \"item\"]"), "job.toml:6: `data.columns` has no \"rating\"; say which cell"),
        (
            data("columns = [\"user\", \"item\"]\nimplicit = { threshold = 3 }"),
            "job.toml:6: `data.columns` has no \"rating\"",
        ),
        (data("columns = [\"item\", \"rating\"]"), "job.toml:6: `data.columns` has no \"user\""),
        (data("columns = [\"user\", \"item\", \"rating\", \"user\"]"), "job.toml:6: `data.columns` has \"user\" twice"),
        (
            data("holdout = \"last\"\ncolumns = [\"user\", \"item\", \"rating\"]"),
            "job.toml:7: `data.columns` has no \"time\", and holdout = \"last\" goes by it",
        ),
        (
            data("implicit = { negative = 3 }"),
            "job.toml:6: unknown key `data.implicit.negative`; did you mean `negatives`?",
        ),
        (
            data("implicit = { negatives = 0 }"),
            "job.toml:6: `data.implicit.negatives` must be a whole number from 1 to 4096",
        ),
        (data("implicit = { k = 0 }"), "job.toml:6: `data.implicit.k` must be a whole number from 1"),
        (
            data("implicit = { eval_negatives = \"some\" }"),
            "job.toml:6: `data.implicit.eval_negatives` must be \"all\" or",
        ),
        (data("target = \"x\""), "job.toml:6: unknown key `data.target`"),
        (
            data("implicit = {}"),
            "job.toml:10: `train.loss` must be \"bpr\" or \"binary-cross-entropy\" for data.implicit",
        ),
        (
            data("implicit = {}").replace("epochs = 3", "epochs = 3\nloss = \"mse\""),
            "job.toml:12: `train.loss` must be \"bpr\"",
        ),
        (
            JOB.replace("epochs = 3", "epochs = 3\nloss = \"bpr\""),
            "job.toml:10: `train.loss` is \"bpr\", which compares",
        ),
        (
            made("task = \"clicks\"\nvocabulary = 3\nimplicit = {}"),
            "job.toml:8: `data.implicit` is for another `data.task`",
        ),
        (
            made("task = \"ratings\"\nusers = 3\nitems = 4\nimplicit = { threshold = 2 }"),
            "job.toml:9: `data.implicit` has a `threshold`",
        ),
    ];
    for (text, want) in cases {
        let got = message(&text, &[]);
        assert!(got.starts_with(want), "{got}\n(wanted {want})");
    }
}

#[test]
fn mistakes_about_ids_and_their_tables_are_named() {
    let data = |keys: &str| JOB.replace("\"digits\"", &format!("\"csv\"\ntrain = \"a\"\ntarget = \"y\"\n{keys}"));
    let clicks = |keys: &str| JOB.replace("\"digits\"", &format!("\"synthetic\"\nsamples = 9\n{keys}"));
    let model = |keys: &str| JOB.replace("kind = \"mlp\"\nhidden = [8]", keys);
    let layer = |keys: &str| model(&format!("kind = \"layers\"\nlayers = [{{ {keys} }}]"));
    let corpus = |train: &str, test: &str| {
        JOB.replace("\"digits\"", &format!("\"text\"\ncontext = 4\ntrain = {train:?}\ntext = \"x\"\ntest = {test:?}"))
    };
    let tables = |keys: &str| format!("{JOB}tables = {{ {keys} }}\n");
    let entry =
        "`data.ids[1]` must be a column's name, { column = \"user\", size = 1000 } or { cross = [\"a\", \"b\"] }";
    let cases = [
        (data("ids = \"a\""), "job.toml:7: `data.ids` must be a list of columns, not the text \"a\""),
        (data("ids = [\"a\",\n  {}]"), &format!("job.toml:8: {entry}")),
        (data("ids = [\"a\",\n  { cross = [\"a\"] }]"), &format!("job.toml:8: {entry}")),
        (data("ids = [\"a\",\n  { column = \"b\", cross = [\"a\", \"b\"] }]"), &format!("job.toml:8: {entry}")),
        (
            data("ids = [{ cross = [\"a\", \"b\"], size = 3 }]"),
            "job.toml:7: `data.ids[0].size` and `data.ids[0].cross` are both given, but combinations are known by their hash",
        ),
        (data("ids = [7]"), "job.toml:7: `data.ids[0]` must be a table, not 7"),
        (data("ids = [{ colum = \"a\" }]"), "job.toml:7: unknown key `data.ids[0].colum`; did you mean `column`?"),
        (
            data("ids = [{ column = \"a\", size = 0 }]"),
            "job.toml:7: `data.ids[0].size` must be a whole number from 1 to 281474976710656, not 0",
        ),
        (data("log = \"a\""), "job.toml:7: `data.log` must be a list, each item a text"),
        (
            data("text = \"x\"\ncontext = 4\nids = [\"a\"]"),
            "job.toml:9: `data.ids` and `data.text` are both given, but the text is all that is learnt from",
        ),
        (corpus("a.txt", "b.txt"), "job.toml:7: `data.text` names a column of files that end in .jsonl"),
        (corpus("a.jsonl", "b.csv"), "job.toml:7: `data.text` names a column of files that end in .jsonl"),
        (
            data("text = \"x\"\ncontext = 4\nlog = [\"a\"]"),
            "job.toml:9: `data.log` and `data.text` are both given, but the text is all that is learnt from",
        ),
        (
            clicks("task = \"clicks\""),
            "job.toml:3: `data.vocabulary` is missing; write for example `vocabulary = 20000`",
        ),
        (
            clicks("task = \"clicks\"\nvocabulary = 9\nshape = [3]"),
            "job.toml:8: `data.shape` is for another `data.task` than \"clicks\"",
        ),
        (
            clicks("shape = [3]\nclasses = 2\nzipf = 1"),
            "job.toml:8: `data.zipf` is for another `data.task` than \"classification\"",
        ),
        (
            clicks("task = \"clicks\"\nvocabulary = 9\nzipf = -1"),
            "job.toml:8: `data.zipf` must be a number of at least 0, not -1",
        ),
        (
            clicks("task = \"clicks\"\nvocabulary = 9\nfields = 0"),
            "job.toml:8: `data.fields` must be a whole number from 1 to 4096, not 0",
        ),
        (model("kind = \"logistic\"\nwidth = 4"), "job.toml:7: unknown key `model.width`; the keys here are `kind`"),
        (
            model("kind = \"deepfm\"\nwidth = 0"),
            "job.toml:7: `model.width` must be a whole number from 1 to 2147483648, not 0",
        ),
        (
            model("kind = \"dlrm\"\ninteraction = \"product\""),
            "job.toml:7: there is no interaction \"product\"; choose one of `dot`, `concat`",
        ),
        (layer("op = \"lookup\""), "job.toml:7: `model.layers[0].width` is missing; write for example `width = 16`"),
        (
            layer("op = \"lookup\", width = 4, init = \"kaiming-uniform\""),
            "job.toml:7: there is no init \"kaiming-uniform\"; ",
        ),
        (
            layer("op = \"lookup\", width = 4, init = { kind = \"uniform\", bound = 0 }"),
            "job.toml:7: `model.layers[0].init.bound` must be a number above 0, not 0",
        ),
        (
            layer("op = \"slice\", from = 2"),
            "job.toml:7: `model.layers[0].len` is missing; write for example `len = 16`",
        ),
        (
            layer("op = \"parallel\", branches = []"),
            "job.toml:7: `model.layers[0].branches` must be a list of lists of layers, not ",
        ),
        (
            layer("op = \"parallel\", branches = [[{ op = \"summ\" }]]"),
            "job.toml:7: there is no layer \"summ\"; did you mean \"sum\"?",
        ),
        (tables("memory = 4"), "job.toml:11: unknown key `train.tables.memory`; did you mean `memory_mb`?"),
        (
            tables("memory_mb = 0"),
            "job.toml:11: `train.tables.memory_mb` must be a whole number from 1 to 16777216, not 0",
        ),
        (tables("optimizer = \"adamw\""), "job.toml:11: there is no optimizer \"adamw\"; "),
        (
            tables("optimizer = { kind = \"sgd\", weight_decay = 0.1 }"),
            "job.toml:11: unknown key `train.tables.optimizer.weight_decay`; the keys here are `kind`, `lr`",
        ),
    ];
    for (text, want) in cases {
        let got = message(&text, &[]);
        assert!(got.starts_with(want), "{got}\n(wanted {want})");
    }
}

#[test]
fn mistakes_in_overrides_are_named_with_the_override() {
    for (set, want) in [
        ("train.stps=200", "unknown key `train.stps`; did you mean `steps`?"),
        ("trian.steps=2", "unknown key `trian`; did you mean `train`?"),
        ("train", "there is no `=`; write KEY=VALUE, for example train.steps=200"),
        ("train..steps=1", "the key has an empty part; write for example train.steps=200"),
        ("train.steps=", "the value is neither TOML nor a bare word; quote the whole option for the shell"),
        ("train.steps=[1", "the value is neither TOML nor a bare word; quote the whole option for the shell"),
        ("train.micro_batch=0", "`train.micro_batch` must be a whole number from 1 to 1000000, not 0"),
        ("train.optimizer.beta=0.5", "unknown key `train.optimizer.beta`; did you mean `beta1`?"),
        ("data.format.x=1", "`data.format` is the text \"digits\", and holds no `x`; set `data.format` as a whole"),
        ("model.hidden.0=1", "`model.hidden` is a list, and holds no `0`; set `model.hidden` as a whole"),
        ("train.optimizer.lr=-1", "`train.optimizer.lr` must be a number above 0, not -1"),
    ] {
        let got = message(JOB, &[set]);
        assert!(got.starts_with(&format!("--set {set}: {want}")), "{got}\n(wanted {want})");
    }
    assert!(message(JOB, &[&format!("{}=1", vec!["a"; 200_000].join("."))]).contains("no key is nested that deeply"));
}

#[test]
fn numbers_are_in_range_after_rounding_to_32_bits() {
    for (key, value) in [("lr", "0"), ("lr", "1e-60"), ("lr", "1e300"), ("lr", "inf"), ("lr", "nan"), ("eps", "0.0")]
        .into_iter()
        .chain([("beta1", "1"), ("beta1", "-0.1"), ("beta2", "0.9999999999"), ("weight_decay", "-1e-9")])
    {
        let got = message(JOB, &[&format!("train.optimizer.{key}={value}")]);
        assert!(got.contains(&format!("`train.optimizer.{key}` must be a number ")), "{got}");
    }
    assert!(message(JOB, &["train.optimizer.lr=1e300"]).contains("a number above 0 (in 32 bits), not 1e300"));
    for set in
        ["train.loss={ kind = \"cross-entropy\", class_weights = [0, 0] }", "model.dropout=1", "train.clip_norm=0"]
            .into_iter()
            .chain([
                "train.partitions=65537",
                "train.eval_every=0",
                "checkpoint.keep=0",
                "train.loss.label_smoothing=1.0",
            ])
    {
        read(JOB, &[set]).expect_err(set);
    }
    for shape in ["[]", "[0]", "[2, 3]", "[65536, 65536, 65536]", "[2147483649]"] {
        let text = JOB.replace("\"digits\"", &format!("\"synthetic\"\nshape = {shape}\nclasses = 2\nsamples = 9"));
        assert!(message(&text, &[]).starts_with("job.toml:5: "), "{shape}");
    }
    for separator in ["", ";;", "é", "\\n", "\\\""] {
        let keys = format!("\"csv\"\ntrain = \"a\"\ntarget = \"y\"\nseparator = \"{separator}\"");
        let got = message(&JOB.replace("\"digits\"", &keys), &[]);
        assert!(got.starts_with("job.toml:7: `data.separator` must be one plain character"), "{got}");
    }
}

#[test]
fn the_examples_are_right_and_named_as_their_files() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "toml") {
            let text = std::fs::read_to_string(&path).unwrap();
            let file = path.display().to_string();
            let job = parse(JobText { file, base: "/".into(), toml: text.clone(), overrides: vec![] }).unwrap();
            assert_eq!(Some(job.name.as_ref()), path.file_stem());
            assert!(text.starts_with("# "), "{} does not say what it is", path.display());
            seen += 1;
        }
    }
    assert!(seen >= 6);
}

/// Values of every kind, right and wrong.
fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i64>().prop_map(|v| v.to_string()),
        (0i64..4).prop_map(|v| v.to_string()),
        any::<f64>().prop_map(|v| format!("{v:?}").to_lowercase()),
        any::<bool>().prop_map(|v| v.to_string()),
        Just("[]".into()),
        Just("{}".into()),
        Just("[{ op = \"residual\", layers = [{ op = \"conv2d\", filters = 1, kernel = 1 }] }]".into()),
        Just("1979-05-27".into()),
        "\"[a-z/]{0,5}\"",
        "\\[(-?[0-9]{1,3}, ?){0,4}\\]",
    ]
}

const SOME_KEYS: [&str; 24] = [
    "name",
    "seed",
    "data",
    "data.format",
    "data.ship",
    "data.shape",
    "data.ids",
    "model",
    "model.kind",
    "model.hidden",
    "model.layers",
    "model.activation",
    "model.dropout",
    "train",
    "train.steps",
    "train.loss",
    "train.optimizer",
    "train.optimizer.lr",
    "train.tables.optimizer.lr",
    "train.schedule.kind",
    "train.schedule.warmup_steps",
    "train.early_stopping.patience",
    "checkpoint",
    "checkpoint.dir",
];

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,80}", cut in 0usize..120, set in "\\PC{0,20}") {
        let _ = read(&text, &[&set]);
        let cut = JOB.char_indices().map(|(i, _)| i).nth(cut).unwrap_or(JOB.len());
        let _ = read(&(JOB[..cut].to_string() + &text), &[&set]);
    }

    /// A job with some values exchanged is read and survives its JSON form, or refused at a line or at an override.
    #[test]
    fn any_job_is_read_or_refused_at_a_place(
        changes in proptest::collection::vec((proptest::sample::select(&SOME_KEYS[..]), value()), 0..4),
        line in 0usize..12,
        raw in value(),
    ) {
        let mut lines: Vec<String> = JOB.lines().map(String::from).collect();
        if let Some((key, _)) = lines.get(line).and_then(|l| l.split_once('=')) {
            lines[line] = format!("{key}= {raw}");
        }
        let sets: Vec<String> = changes.iter().map(|(key, value)| format!("{key}={value}")).collect();
        match read(&lines.join("\n"), &sets.iter().map(String::as_str).collect::<Vec<_>>()) {
            Ok(job) => {
                let json = serde_json::to_string(&job).unwrap();
                prop_assert_eq!(serde_json::from_str::<Job>(&json).unwrap(), job);
            }
            Err(e) => {
                let in_file = e.place.strip_prefix("job.toml:").is_some_and(|n| n.parse::<usize>().is_ok());
                let in_set = e.place.strip_prefix("--set ").is_some_and(|s| sets.iter().any(|o| o == s));
                prop_assert!(in_file || in_set, "{}", e);
            }
        }
    }
}
