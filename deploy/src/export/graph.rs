//! A graph that grows node by node.

use super::proto::{
    AttributeProto, DimensionProto, FLOAT, GraphProto, INT64, IS_FLOAT, IS_INT, IS_INTS, NodeProto, TensorProto,
    TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
};
use std::collections::BTreeSet;
use std::ops::Range;
use unisono_common::layout::{Layout, Tensor, le_bytes};
use unisono_common::model::Model;
use unisono_common::rows::{self, RowBlock, RowLayout};

/// The name of the input that chooses rows of sparse tables.
pub const IDS: &str = "ids";

/// The name of the input that they are multiplied by, where samples have such values.
pub const VALUES: &str = "values";

/// The domain of the operator that looks for numbers among others, which runtimes have as a rule.
pub const ML: &str = "ai.onnx.ml";

/// A value between two nodes.
#[derive(Clone, Debug)]
pub struct Value {
    pub name: String,
    /// Of a sample: the batch comes before it.
    pub shape: Vec<usize>,
}

/// Nodes, and the tensors that they read: parameters under the names of `weights.safetensors`, and constants.
pub struct Graph<'a> {
    layout: &'a Layout,
    weights: &'a [f32],
    /// Rows of sparse tables, and where the places of a sample's ids among them are.
    tables: &'a RowLayout,
    rows: &'a RowBlock,
    places: Option<(String, usize)>,
    /// Whether these rows are multiplied by values.
    factors: bool,
    proto: GraphProto,
    /// Of values and tensors: no two are the same.
    names: BTreeSet<String>,
}

pub fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: name.into(), i: Some(value), kind: IS_INT, ..Default::default() }
}

pub fn ints(name: &str, values: impl Into<Vec<i64>>) -> AttributeProto {
    AttributeProto { name: name.into(), ints: values.into(), kind: IS_INTS, ..Default::default() }
}

pub fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto { name: name.into(), f: Some(value), kind: IS_FLOAT, ..Default::default() }
}

/// What is known of a value whose samples have this shape.
fn info(name: &str, elem_type: i32, shape: &[usize]) -> ValueInfoProto {
    let batch = DimensionProto { dim_value: None, dim_param: Some("batch".into()) };
    let sizes = shape.iter().map(|&size| DimensionProto { dim_value: Some(size as i64), dim_param: None });
    let shape = TensorShapeProto { dim: [batch].into_iter().chain(sizes).collect() };
    let tensor_type = TensorTypeProto { elem_type, shape: Some(shape) };
    ValueInfoProto { name: name.into(), kind: Some(TypeProto { tensor_type: Some(tensor_type) }) }
}

fn dims(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|&size| size as i64).collect()
}

impl<'a> Graph<'a> {
    /// A graph of one input, for the parameters of a model, with these values and rows of its sparse tables.
    pub fn new(
        model: &'a Model,
        weights: &'a [f32],
        rows: &'a RowBlock,
        input: &str,
        tokens: bool,
        shape: &[usize],
    ) -> (Self, Value) {
        let input = Value { name: input.into(), shape: shape.into() };
        let proto = GraphProto {
            input: vec![info(&input.name, if tokens { INT64 } else { FLOAT }, shape)],
            ..Default::default()
        };
        let names = [input.name.clone()].into();
        let (layout, tables) = (model.layout(), model.rows());
        (Graph { layout, weights, tables, rows, places: None, factors: false, proto, names }, input)
    }

    /// Takes a sample's ids, so many, as another input, and as one more what their rows are multiplied by, if by something.
    pub fn ids(&mut self, ids: usize, factors: bool) {
        self.proto.input.push(info(IDS, INT64, &[ids]));
        let known = self.rows.keys.iter().map(|key| rows::id(*key) as i64).collect::<Vec<i64>>();
        let count = known.len() as i64;
        let attributes = vec![
            ints("keys_int64s", known),
            ints("values_int64s", (0..count).collect::<Vec<i64>>()),
            int("default_int64", count),
        ];
        let place = self.node("ids", "LabelEncoder", &[IDS], attributes);
        if let Some(node) = self.proto.node.last_mut() {
            node.domain = ML.into();
        }
        self.places = Some((place, ids));
        if factors {
            self.proto.input.push(info(VALUES, FLOAT, &[ids]));
            self.names.insert(VALUES.into());
            self.factors = true;
        }
    }

    /// Whether the rows of [`Graph::table`] are multiplied by [`VALUES`].
    pub fn has_factors(&self) -> bool {
        self.factors
    }

    /// The places of a sample's ids among the rows of [`Graph::table`], and how many ids it has.
    ///
    /// # Panics
    /// Where the graph has no ids.
    pub fn places(&self) -> (String, usize) {
        self.places.clone().expect("a model that looks ids up has some")
    }

    /// The sparse table at `at`: a row for each id that training has touched, and one of zeros for all others.
    ///
    /// # Panics
    /// Where the model has none there.
    pub fn table(&mut self, at: &str) -> String {
        let name = format!("{at}.weight");
        let found = self.tables.tables().find(|(table, _)| table.name == name);
        let (table, start) = found.unwrap_or_else(|| panic!("the model has no sparse table {name}"));
        let (width, rows) = (table.width, self.rows);
        let values = || {
            let some = rows.rows.chunks_exact(self.tables.width()).map(|row| &row[start..start + width]);
            let mut bytes: Vec<u8> = some.flat_map(le_bytes).copied().collect();
            bytes.resize(bytes.len() + 4 * width, 0);
            bytes
        };
        let bytes = values();
        self.constant(name, FLOAT, &[rows.keys.len() + 1, width], || bytes)
    }

    /// A node of the layer at `at`; the name of its result.
    pub fn node(&mut self, at: &str, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let [output] = self.nodes(at, op, inputs, attributes);
        output
    }

    /// [`Graph::node`] with several results.
    pub fn nodes<const N: usize>(
        &mut self,
        at: &str,
        op: &str,
        inputs: &[&str],
        attributes: Vec<AttributeProto>,
    ) -> [String; N] {
        let output = std::array::from_fn(|_| self.unused(format!("{at}/{op}")));
        self.proto.node.push(NodeProto {
            input: inputs.iter().map(|&name| name.into()).collect(),
            output: output.clone().into(),
            name: output[0].clone(),
            op_type: op.into(),
            attribute: attributes,
            domain: String::new(),
        });
        output
    }

    /// `name`, or the first of `name-2`, `name-3`, ... that nobody has.
    fn unused(&mut self, name: String) -> String {
        let numbered = (2..).map(|n| format!("{name}-{n}"));
        let free = [name.clone()].into_iter().chain(numbered).find(|name| !self.names.contains(name));
        let free = free.expect("numbers do not end");
        self.names.insert(free.clone());
        free
    }

    /// The model's tensor `at.name`, and its place among the weights.
    ///
    /// # Panics
    /// Where it has none: it was built from other layers.
    pub fn tensor(&self, at: &str, name: &str) -> (&'a Tensor, Range<usize>) {
        let name = format!("{at}.{name}");
        let found = self.layout.tensors().find(|(tensor, _)| tensor.name == name);
        found.unwrap_or_else(|| panic!("the model has no tensor {name}"))
    }

    /// [`Graph::tensor`], for nodes to read.
    pub fn parameter(&mut self, at: &str, name: &str) -> String {
        let (tensor, range) = self.tensor(at, name);
        let values = &self.weights[range];
        self.constant(tensor.name.clone(), FLOAT, &tensor.shape, || le_bytes(values).into())
    }

    /// A tensor that is one and the same wherever it is asked for.
    pub fn floats(&mut self, name: String, shape: &[usize], values: &[f32]) -> String {
        self.constant(name, FLOAT, shape, || le_bytes(values).into())
    }

    /// [`Graph::floats`], of whole numbers.
    pub fn whole(&mut self, name: String, shape: &[usize], values: &[i64]) -> String {
        self.constant(name, INT64, shape, || values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// A single number.
    pub fn number(&mut self, value: f32) -> String {
        self.floats(format!("number {value:e}"), &[], &[value])
    }

    /// What `Reshape` makes of a batch of samples.
    pub fn shape(&mut self, sample: &[usize]) -> String {
        // 0 is the size that is there.
        let sizes: Vec<i64> = [0].into_iter().chain(dims(sample)).collect();
        self.whole(format!("shape {sample:?}"), &[sizes.len()], &sizes)
    }

    fn constant(&mut self, name: String, data_type: i32, shape: &[usize], bytes: impl FnOnce() -> Vec<u8>) -> String {
        if self.names.insert(name.clone()) {
            let tensor = TensorProto { dims: dims(shape), data_type, name: name.clone(), raw_data: bytes() };
            self.proto.initializer.push(tensor);
        }
        name
    }

    /// Writes down the shape of a value, for those who look at the file.
    pub fn note(&mut self, value: &Value) {
        self.proto.value_info.push(info(&value.name, FLOAT, &value.shape));
    }

    /// The whole graph, which gives `result` under the name `output`.
    pub fn end(mut self, name: &str, result: &Value, output: &str) -> GraphProto {
        self.proto.node.push(NodeProto {
            input: vec![result.name.clone()],
            output: vec![output.into()],
            name: output.into(),
            op_type: "Identity".into(),
            attribute: Vec::new(),
            domain: String::new(),
        });
        let output = vec![info(output, FLOAT, &result.shape)];
        GraphProto { name: name.into(), output, ..self.proto }
    }
}
