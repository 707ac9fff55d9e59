//! A trained model as an ONNX file: raw features, or tokens, in; logits out.

use super::graph::{Graph, ML, Value};
use super::layers;
use super::proto::{
    DimensionProto, GraphProto, ModelProto, OperatorSetIdProto, StringStringEntryProto, ValueInfoProto,
};
use prost::Message;
use std::path::Path;
use unisono_common::data::{Column, Prepared};
use unisono_common::job::{Job, Layer};
use unisono_common::model::{self, Model};
use unisono_common::rows::RowBlock;

/// The version of the operators: the first with layer normalisation. What runs them is as old as 2022.
const OPERATORS: i64 = 17;
/// The version of those that look for ids.
const ML_OPERATORS: i64 = 2;
/// The version of the file that goes with it.
const FILE: i64 = 8;

/// The names of what goes in and out.
const FEATURES: &str = "features";
const TOKENS: &str = "tokens";
const LOGITS: &str = "logits";

/// Why a model cannot be an ONNX file.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum OnnxError {
    #[error("the ONNX file would have {0} bytes, and can have 2^31 - 1: export the weights with --format safetensors")]
    TooLarge(usize),
    #[error(
        "the layer {0:?} is not one of unisono's, which knows no form of it in ONNX: export the weights with --format safetensors"
    )]
    Added(String),
}

/// The first of these layers, or of those inside them, that the program has added.
fn added(layers: &[Layer]) -> Option<&str> {
    layers.iter().find_map(|layer| match layer {
        Layer::Added { name, .. } => Some(name.as_str()),
        Layer::TiedEmbedding { layers, .. } => added(layers),
        Layer::Residual { layers, shortcut } => added(layers).or_else(|| added(shortcut)),
        Layer::Parallel { branches, .. } => branches.iter().find_map(|branch| added(branch)),
        _ => None,
    })
}

/// The file's contents.
///
/// # Errors
/// A model that is too large for one, and a layer that has no form in it.
pub fn file(
    job: &Job,
    prepared: &Prepared,
    model: &Model,
    weights: &[f32],
    rows: &RowBlock,
) -> Result<ModelProto, OnnxError> {
    let signature = prepared.signature(&job.train.loss);
    let (specs, shape) = model::layers(&job.model, &signature);
    if let Some(name) = added(&specs) {
        return Err(OnnxError::Added(name.into()));
    }
    let tokens = prepared.tokens.is_some();
    let input = if tokens { TOKENS } else { FEATURES };
    let (mut g, raw) = Graph::new(model, weights, rows, input, tokens, &signature.input);
    if signature.ids > 0 {
        g.ids(signature.ids, prepared.sparse.is_some());
    }
    let mut x = if tokens { raw } else { normalise(&mut g, prepared, raw) };
    if x.shape != shape {
        x = layers::flatten(&mut g, "input", &x);
    }
    let result = layers::chain(&mut g, "", &specs, x);
    let file = ModelProto {
        ir_version: FILE,
        producer_name: "unisono".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(g.end(&job.name, &result, LOGITS)),
        opset_import: [("", OPERATORS)]
            .into_iter()
            .chain((signature.ids > 0).then_some((ML, ML_OPERATORS)))
            .map(|(domain, version)| OperatorSetIdProto { domain: domain.into(), version })
            .collect(),
        metadata_props: names(prepared),
    };
    match file.encoded_len() {
        bytes if bytes > i32::MAX as usize => Err(OnnxError::TooLarge(bytes)),
        _ => Ok(file),
    }
}

/// From values as the data set has them to what the first layer takes.
fn normalise(g: &mut Graph<'_>, prepared: &Prepared, raw: Value) -> Value {
    let shape: &[usize] = if prepared.mean.len() == 1 { &[] } else { &prepared.shape };
    let mut name = raw.name;
    if prepared.mean.iter().any(|&mean| mean != 0.0) {
        let mean = g.floats("mean".into(), shape, &prepared.mean);
        name = g.node("input", "Sub", &[&name, &mean], vec![]);
    }
    if prepared.inv_std.iter().any(|&inverse| inverse != 1.0) {
        let inverse = g.floats("inverse deviation".into(), shape, &prepared.inv_std);
        name = g.node("input", "Mul", &[&name, &inverse], vec![]);
    }
    Value { name, shape: raw.shape }
}

/// What the features and outputs are called, as lists in JSON.
fn names(prepared: &Prepared) -> Vec<StringStringEntryProto> {
    let of_column = |Column { name, values, .. }: &Column| match values {
        None => vec![name.clone()],
        Some(values) => values.iter().map(|value| format!("{name}={value}")).collect(),
    };
    let features: Vec<String> = prepared.columns.iter().flat_map(of_column).collect();
    let entry = |key: &str, names: &[String]| StringStringEntryProto {
        key: key.into(),
        value: serde_json::json!(names).to_string(),
    };
    let features = (!features.is_empty()).then(|| entry("features", &features));
    let classes = prepared.classes.as_ref().map(|classes| entry("classes", classes));
    features.into_iter().chain(classes).collect()
}

/// Sizes as one reads them: `[batch, 8, 8]`.
fn sizes(value: &ValueInfoProto) -> String {
    let tensor = value.kind.as_ref().and_then(|kind| kind.tensor_type.as_ref());
    let dims = tensor.and_then(|tensor| tensor.shape.as_ref()).map_or(&[][..], |shape| &shape.dim);
    let size = |dim: &DimensionProto| match (dim.dim_value, &dim.dim_param) {
        (Some(size), _) => size.to_string(),
        (None, name) => name.clone().unwrap_or_default(),
    };
    format!("[{}]", dims.iter().map(size).collect::<Vec<_>>().join(", "))
}

/// Prints what was written to `out`.
pub fn show(out: &Path, file: &ModelProto) {
    let Some(GraphProto { node, initializer, input, output, .. }) = &file.graph else { return };
    println!(
        "{}: {} nodes, {} tensors, operators of version {OPERATORS}",
        out.display(),
        node.len(),
        initializer.len()
    );
    for value in input.iter().chain(output) {
        println!("  {:<24} {}", value.name, sizes(value));
    }
    let inputs: Vec<String> = input.iter().map(|value| format!("{:?}: ...", value.name)).collect();
    println!(
        "In Python: onnxruntime.InferenceSession({:?}).run([{LOGITS:?}], {{{}}})",
        out.display().to_string(),
        inputs.join(", ")
    );
}

#[cfg(test)]
mod tests {
    use super::super::proto::{FLOAT, INT64, TensorProto};
    use super::*;
    use std::collections::BTreeSet;
    use unisono_common::job::{self, JobText};
    use unisono_common::{data, layout, rows};

    const IMAGES: &str = r#"{ format = "synthetic", task = "classification", shape = [2, 8, 7], classes = 3, samples = 40,
        test_samples = 4, normalize = true }"#;
    const ROWS: &str = r#"{ format = "synthetic", task = "regression", shape = [6], samples = 40, test_samples = 4 }"#;
    const TOKENS: &str =
        r#"{ format = "synthetic", task = "language", vocabulary = 9, context = 5, samples = 40, test_samples = 4 }"#;
    const TEXTS: &str = r#"{ format = "csv", train = "texts.tsv", separator = "\t", target = "kind", text = "said",
        context = 6, tokenizer = "words" }"#;

    const CLICKS: &str = r#"{ format = "synthetic", task = "clicks", vocabulary = 9, fields = 4, numbers = 2, samples = 40,
        test_samples = 4 }"#;

    const SPARSE: &str = r#"{ format = "libsvm", train = "lines.svm" }"#;

    /// Data and models that have each layer and activation somewhere.
    const MODELS: [(&str, &str); 14] = [
        (IMAGES, r#"{ kind = "linear" }"#),
        (ROWS, r#"{ kind = "mlp", hidden = [4, 5], activation = "gelu", dropout = 0.5 }"#),
        (
            IMAGES,
            r#"{ kind = "layers", layers = [
                { op = "conv2d", filters = 4, kernel = 3, padding = 1 }, { op = "batch-norm" }, { op = "relu" },
                { op = "max-pool2d", size = 2 },
                { op = "residual", layers = [{ op = "conv2d", filters = 4, kernel = 1, bias = false }, { op = "silu" }] },
                { op = "layer-norm" }, { op = "avg-pool2d", size = 2, stride = 1 }, { op = "leaky-relu", slope = 0.1 },
                { op = "global-avg-pool" }, { op = "linear", units = 3 }, { op = "dropout" },
            ] }"#,
        ),
        (
            IMAGES,
            r#"{ kind = "layers", layers = [
                { op = "flatten" }, { op = "linear", units = 6, bias = false }, { op = "tanh" }, { op = "rms-norm" },
                { op = "swiglu" }, { op = "sigmoid" }, { op = "linear", units = 3 },
            ] }"#,
        ),
        (TOKENS, r#"{ kind = "gpt", layers = 2, heads = 2, width = 8 }"#),
        (
            TOKENS,
            r#"{ kind = "gpt", layers = 2, heads = 2, width = 8, positions = "rotary", feed_forward = "swiglu",
                norm = "rms-norm", tie = true, bias = false }"#,
        ),
        (TEXTS, r#"{ kind = "text-classifier", width = 4, hidden = [3] }"#),
        (
            TEXTS,
            r#"{ kind = "layers", layers = [
                { op = "embedding", width = 4 }, { op = "positions" }, { op = "linear", units = 12 },
                { op = "attention", heads = 2 }, { op = "flatten" }, { op = "linear", units = 2 },
            ] }"#,
        ),
        (IMAGES, r#"{ kind = "resnet", depth = 8, width = 2 }"#),
        (
            IMAGES,
            r#"{ kind = "layers", layers = [
                { op = "conv2d", filters = 4, kernel = 3, groups = 2 }, { op = "flatten" }, { op = "linear", units = 3 },
            ] }"#,
        ),
        (CLICKS, r#"{ kind = "deepfm", width = 3, hidden = [4] }"#),
        (CLICKS, r#"{ kind = "dlrm", width = 3, bottom = [4], top = [5] }"#),
        (SPARSE, r#"{ kind = "matrix-factorization", width = 3 }"#),
        (
            ROWS,
            r#"{ kind = "layers", layers = [{ op = "linear", units = 1 }, { op = "residual", layers = [{ op = "dropout" }] }] }"#,
        ),
    ];

    struct Case {
        job: Job,
        prepared: Prepared,
        model: Model,
        weights: Vec<f32>,
        rows: RowBlock,
        graph: GraphProto,
        file: ModelProto,
    }

    fn case((data, model): (&str, &str)) -> Case {
        let folder = tempfile::tempdir().expect("a folder");
        let texts: String = (0..20).map(|i| format!("number {i} of some\t{}\n", ["odd", "even"][i % 2])).collect();
        std::fs::write(folder.path().join("texts.tsv"), format!("said\tkind\n{texts}")).expect("written");
        let lines: String = (0..20).map(|i| format!("{} {i}:1.5 7:{i}\n", i % 2)).collect();
        std::fs::write(folder.path().join("lines.svm"), lines).expect("written");
        let loss = match data {
            ROWS => "mse",
            CLICKS | SPARSE => "binary-cross-entropy",
            _ => "cross-entropy",
        };
        let toml = format!("data = {data}\nmodel = {model}\ntrain = {{ partitions = 1, steps = 1, loss = {loss:?} }}");
        let base = folder.path().display().to_string();
        let job = job::parse(JobText { file: "job.toml".into(), base, toml, overrides: Vec::new() }).expect("a job");
        let prepared = data::open(&data::Files::any(), &job.data, job.seed).expect("data").prepared;
        let model = Model::build(&job.model, &prepared.signature(&job.train.loss)).expect("a model");
        let weights = model.layout().init(5);
        // Some of the ids were touched.
        let (keys, width) = ((0..3).map(rows::key).collect(), model.rows().width());
        let rows = RowBlock { keys, rows: (0..3 * width).map(|i| i as f32).collect() };
        let file = file(&job, &prepared, &model, &weights, &rows).expect("a file");
        let read = ModelProto::decode(&file.encode_to_vec()[..]).expect("a whole file");
        assert_eq!(read, file);
        Case { graph: read.graph.clone().expect("a graph"), job, prepared, model, weights, rows, file: read }
    }

    #[test]
    fn values_are_given_once_and_before_they_are_read() {
        for model in MODELS {
            let graph = case(model).graph;
            let inputs = graph.input.iter().map(|value| &value.name);
            let mut known = BTreeSet::new();
            for name in inputs.chain(graph.initializer.iter().map(|tensor| &tensor.name)) {
                assert!(known.insert(name), "{name} is there twice");
            }
            for node in &graph.node {
                let missing: Vec<_> = node.input.iter().filter(|name| !known.contains(name)).collect();
                assert!(missing.is_empty(), "{} reads {missing:?} before it is there", node.name);
                node.output.iter().for_each(|name| assert!(known.insert(name), "{name} is given twice"));
            }
            let told = graph.output.iter().chain(&graph.value_info);
            told.for_each(|value| assert!(known.contains(&value.name), "nobody gives {}", value.name));
        }
    }

    #[test]
    fn all_that_is_there_is_read() {
        for model in MODELS {
            let graph = case(model).graph;
            let mut read: BTreeSet<&String> = graph.node.iter().flat_map(|node| &node.input).collect();
            read.extend(graph.output.iter().map(|value| &value.name));
            let tensors = graph.initializer.iter().map(|tensor| &tensor.name);
            let given = graph.node.iter().map(|node| &node.output);
            // Of several results of a node one may be superfluous; of nodes and tensors none is.
            tensors.for_each(|name| assert!(read.contains(name), "nobody reads {name}"));
            given.for_each(|names| assert!(names.iter().any(|name| read.contains(name)), "nobody reads {names:?}"));
        }
    }

    #[test]
    fn parameters_are_those_of_the_layout_and_tensors_are_whole() {
        for model in MODELS {
            let Case { graph, model, weights, .. } = case(model);
            let find = |name: &str| graph.initializer.iter().find(|tensor| tensor.name == name);
            for (tensor, range) in model.layout().tensors() {
                let TensorProto { dims, data_type, raw_data, .. } = find(&tensor.name).expect("each is there");
                let shape: Vec<i64> = tensor.shape.iter().map(|&size| size as i64).collect();
                assert_eq!((dims, *data_type), (&shape, FLOAT), "{}", tensor.name);
                assert_eq!(raw_data, layout::le_bytes(&weights[range]), "{}", tensor.name);
            }
            for TensorProto { name, dims, data_type, raw_data } in &graph.initializer {
                let width = if *data_type == INT64 { 8 } else { 4 };
                assert_eq!(dims.iter().product::<i64>() as usize * width, raw_data.len(), "{name}");
            }
        }
    }

    #[test]
    fn raw_samples_go_in_and_the_models_outputs_come_out() {
        for model in MODELS {
            let Case { graph, job, prepared, .. } = case(model);
            let signature = prepared.signature(&job.train.loss);
            let kind =
                |value: &ValueInfoProto| value.kind.as_ref()?.tensor_type.as_ref().map(|tensor| tensor.elem_type);
            let batch = |shape: &[usize]| {
                let sizes = shape.iter().map(usize::to_string);
                format!("[{}]", ["batch".to_string()].into_iter().chain(sizes).collect::<Vec<_>>().join(", "))
            };
            let (input, ids) = graph.input.split_first().expect("an input");
            let of_ids = ids.iter().map(|value| (value.name.as_str(), kind(value), sizes(value)));
            let of_each = batch(&[signature.ids]);
            let values = prepared.sparse.is_some().then(|| ("values", Some(FLOAT), of_each.clone()));
            let want = (signature.ids > 0).then_some(("ids", Some(INT64), of_each));
            assert!(of_ids.eq(want.into_iter().chain(values)));
            let want = if prepared.tokens.is_some() { ("tokens", INT64) } else { ("features", FLOAT) };
            assert_eq!((input.name.as_str(), kind(input)), (want.0, Some(want.1)));
            assert_eq!(sizes(input), batch(&prepared.shape));
            let [output] = &graph.output[..] else { panic!("one output") };
            assert_eq!((output.name.as_str(), kind(output)), (LOGITS, Some(FLOAT)));
            assert_eq!(sizes(output), batch(&signature.output));
        }
    }

    /// Layers of one kind share what they have in common; others do not.
    #[test]
    fn constants_are_there_once() {
        let names = |model: usize| -> Vec<String> {
            let constant = |tensor: TensorProto| (!tensor.name.ends_with("weight")).then_some(tensor.name);
            case(MODELS[model]).graph.initializer.into_iter().filter_map(constant).collect()
        };
        let starting = |names: &[String], start: &str| names.iter().filter(|name| name.starts_with(start)).count();
        let rotary = names(5);
        assert_eq!(["cos", "sin", "keys", "queries"].map(|start| starting(&rotary, start)), [1; 4], "{rotary:?}");
        assert_eq!(starting(&names(7), "keys"), 0, "full attention sees all");
    }

    #[test]
    fn the_file_says_what_its_numbers_are_called() {
        let of = |file: &ModelProto, key: &str| {
            let entry = file.metadata_props.iter().find(|entry| entry.key == key);
            entry.map(|entry| serde_json::from_str::<Vec<String>>(&entry.value).expect("a list"))
        };
        let texts = case(MODELS[6]).file;
        assert_eq!(of(&texts, "classes").expect("classes").len(), 2);
        assert_eq!(of(&case(MODELS[1]).file, "classes"), None, "values have no classes");
        let Case { job, mut prepared, model, weights, rows, .. } = case(MODELS[1]);
        let column = |name: &str, values: Option<&[&str]>| Column {
            name: name.into(),
            values: values.map(|values| values.iter().map(|&value| value.into()).collect()),
            fill: 0.0,
            log: false,
        };
        prepared.columns = vec![column("age", None), column("colour", Some(&["red", "blue"]))];
        let named = file(&job, &prepared, &model, &weights, &rows).expect("a file");
        assert_eq!(of(&named, "features").expect("features"), ["age", "colour=red", "colour=blue"]);
    }
}
