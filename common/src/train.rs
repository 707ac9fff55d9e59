//! The hot path: the gradient of one tree node, and evaluation.

use crate::data::Batch;
use crate::layers::{Begun, Grads, Layer, Params, Pass, Rows, Segments};
use crate::loss::{Loss, LossSums};
use crate::memory::zeros;
use crate::model::Model;
use crate::rng::{Key, Purpose};
use crate::tree::Node;
use ndarray::ArrayView2;
use std::cell::RefCell;
use std::ops::Range;

/// All memory that a step needs, planned once for the largest batch.
pub struct Workspace {
    logits: Vec<f32>,
    d_logits: Vec<f32>,
    saved: Vec<f32>,
    scratch: Vec<f32>,
    /// Whether the gradients of rows are final as early as can be, and said to be, because it takes long to change them.
    pub rows_first: bool,
}

/// How far [`ahead`] has come with a forward pass, in a workspace that nothing else has used since.
#[derive(Default)]
pub struct Ahead(Begun);

impl Workspace {
    /// Room for batches of up to `rows` samples in up to `segments` partitions, on the current thread pool.
    pub fn new(model: &Model, rows: usize, segments: usize) -> Workspace {
        let logits = rows * model.targets() * model.outputs();
        Workspace {
            logits: zeros(logits),
            d_logits: zeros(logits),
            saved: zeros(model.net().saved(rows, segments)),
            scratch: zeros(model.net().scratch(rows, segments)),
            rows_first: false,
        }
    }
}

/// Where a pass gets its parameters from, some of which may still be on their way.
pub trait Source {
    /// Those at `range` of the flat vector, as soon as they are there; `None` where they will not come.
    fn get(&self, range: Range<usize>) -> Option<&[f32]>;
}

impl Source for [f32] {
    fn get(&self, range: Range<usize>) -> Option<&[f32]> {
        self.get(range)
    }
}

/// A part of the gradients that is not touched any more.
pub enum Final<'a> {
    /// The trainable one from this place on, up to where the one before began.
    From(usize, &'a [f32]),
    /// Those of all rows of sparse tables, where they come first.
    Rows,
}

/// Gradient **sum** over the samples of `batch` into `grads` (as long as the layout) and `d_rows` (as long as the batch's rows),
/// and the loss sums: [`forward`], then [`backward`].
pub fn gradient(
    model: &Model,
    loss: &Loss,
    params: &[f32],
    batch: &Batch,
    segments: &Segments,
    key: Key,
    workspace: &mut Workspace,
    grads: &mut [f32],
    d_rows: &mut [f32],
    finished: &mut dyn FnMut(Final<'_>, LossSums),
) -> LossSums {
    let ahead = Ahead::default();
    forward(model, params, batch, segments, key, workspace, ahead).expect("all parameters are there");
    backward(model, loss, params, batch, segments, key, workspace, grads, d_rows, finished)
}

/// What a model's sparse tables hold of a batch.
fn rows<'a>(model: &Model, batch: &'a Batch) -> Rows<'a> {
    Rows { lookups: &batch.lookups, values: &batch.rows, width: model.rows().width(), factors: &batch.factors }
}

/// The outputs of a training step, and what [`backward`] needs of the way to them, into `workspace`.
///
/// Parameters are asked for layer by layer, from the first to the last, so that it may begin before all have come; `None`
/// where some do not. What has run `ahead` with the same arguments is not run again.
pub fn forward(
    model: &Model,
    params: &(impl Source + ?Sized),
    batch: &Batch,
    segments: &Segments,
    key: Key,
    workspace: &mut Workspace,
    mut ahead: Ahead,
) -> Option<()> {
    run(model, params, batch, segments, key, workspace, &mut ahead.0, false)
}

/// The beginning of [`forward`], before all parameters have changed: the outputs of a linear layer, if it is the first that has
/// parameters, for which `params` has them already. It goes on from where it has come `ahead`, and gives whether it could go further
/// when there are more.
pub fn ahead(
    model: &Model,
    params: &(impl Source + ?Sized),
    batch: &Batch,
    segments: &Segments,
    key: Key,
    workspace: &mut Workspace,
    ahead: &mut Ahead,
) -> bool {
    run(model, params, batch, segments, key, workspace, &mut ahead.0, true);
    model.net().goes_on(&ahead.0)
}

fn run(
    model: &Model,
    params: &(impl Source + ?Sized),
    batch: &Batch,
    segments: &Segments,
    key: Key,
    workspace: &mut Workspace,
    begun: &mut Begun,
    ahead: bool,
) -> Option<()> {
    let Workspace { logits, saved, scratch, .. } = workspace;
    let (net, samples, parts) = (model.net(), batch.samples, segments.len());
    let logits = &mut logits[..samples * model.targets() * model.outputs()];
    let (saved, scratch) = (&mut saved[..net.saved(samples, parts)], &mut scratch[..net.scratch(samples, parts)]);
    let pass = Pass { segments, train: true, key, first: 0, finished: &|_, _| {}, finished_rows: None };
    let rows = self::rows(model, batch);
    let of_layer = |trainable, _| Some(Params { trainable: params.get(trainable)?, running: &[], rows });
    net.run(&pass, of_layer, &batch.inputs, logits, saved, scratch, begun, ahead)
}

/// Loss and gradients of what [`forward`] computed from the same arguments.
///
/// `segments` says which rows belong to which partition; the result is the node's sum in the fixed tree.
///
/// `finished` is called while the backward pass runs, with what is final and the loss sums of the whole batch: with the trainable
/// gradient from the last layer to the first (the first values go up to
/// [`Layout::trainable`](crate::layout::Layout::trainable), the last ones begin at 0), and once when the sums of the rows' gradients
/// are in `d_rows`, where these come first ([`Workspace::rows_first`]). Running statistics are final when this returns.
pub fn backward(
    model: &Model,
    loss: &Loss,
    params: &[f32],
    batch: &Batch,
    segments: &Segments,
    key: Key,
    workspace: &mut Workspace,
    grads: &mut [f32],
    d_rows: &mut [f32],
    finished: &mut dyn FnMut(Final<'_>, LossSums),
) -> LossSums {
    let Workspace { logits, d_logits, saved, scratch, rows_first } = workspace;
    let (net, targets, trainable) = (model.net(), model.targets(), model.layout().trainable());
    let (rows, parts) = (batch.samples, segments.len());
    let values = rows * targets * model.outputs();
    let (logits, d_logits) = (&mut logits[..values], &mut d_logits[..values]);
    let (saved, scratch) = (&mut saved[..net.saved(rows, parts)], &mut scratch[..net.scratch(rows, parts)]);
    let (w, running) = params.split_at(trainable);
    let (dw, d_running) = grads.split_at_mut(trainable);

    let sums = loss_sums(Node { lo: 0, hi: parts as u32 }, &mut |segment| {
        let samples = segments.rows(segment);
        let rows = samples.start * targets..samples.end * targets;
        LossSums {
            samples: batch.samples_of(samples) as u64,
            ..loss.forward_backward(logits, &batch.targets, &batch.weights, rows, d_logits)
        }
    });
    let open = RefCell::new((trainable, model.rows().tables().count(), finished));
    let announce = |from: usize, values: &[f32]| {
        let (end, _, finished) = &mut *open.borrow_mut();
        assert_eq!(from + values.len(), *end, "gradients are finished from the last layer to the first");
        *end = from;
        finished(Final::From(from, values), sums);
    };
    let announce_rows = || {
        let (_, tables, finished) = &mut *open.borrow_mut();
        *tables -= 1;
        if *tables == 0 {
            finished(Final::Rows, sums);
        }
    };
    let finished_rows = rows_first.then_some(&announce_rows as &dyn Fn());
    let pass = Pass { segments, train: true, key, first: 0, finished: &announce, finished_rows };
    let params = Params { trainable: w, running, rows: self::rows(model, batch) };
    let into = Grads { trainable: dw, running: d_running, rows: d_rows };
    net.backward(&pass, params, &batch.inputs, logits, d_logits, None, into, saved, scratch);
    let (trainable, tables, _) = open.into_inner();
    assert_eq!(trainable, 0, "every layer finishes its gradient");
    assert!(tables == 0 || !*rows_first, "every table's gradient is finished");
    sums
}

fn loss_sums(node: Node, leaf: &mut impl FnMut(usize) -> LossSums) -> LossSums {
    match node.children() {
        None => leaf(node.lo as usize),
        Some((left, right)) => {
            let left = loss_sums(left, leaf);
            left + loss_sums(right, leaf)
        }
    }
}

/// The model's outputs for `batch`, `(targets, outputs)`, in evaluation mode.
pub fn evaluate<'w>(model: &Model, params: &[f32], batch: &Batch, workspace: &'w mut Workspace) -> ArrayView2<'w, f32> {
    let Workspace { logits, saved, scratch, .. } = workspace;
    let (net, rows) = (model.net(), batch.samples);
    let segments = Segments::one(rows);
    let targets = rows * model.targets();
    let logits = &mut logits[..targets * model.outputs()];
    let (saved, scratch) = (&mut saved[..net.saved(rows, 1)], &mut scratch[..net.scratch(rows, 1)]);
    let (trainable, running) = params.split_at(model.layout().trainable());
    let key = Key::new(0, Purpose::Dropout);
    let pass = Pass { segments: &segments, train: false, key, first: 0, finished: &|_, _| {}, finished_rows: None };
    let params = Params { trainable, running, rows: self::rows(model, batch) };
    net.forward(&pass, params, &batch.inputs, logits, saved, scratch);
    ArrayView2::from_shape((targets, model.outputs()), logits).expect("as long as its shape")
}

/// Digest of the gradients of three small models that together run every kernel: machines that disagree cannot train together.
pub fn fingerprint() -> [u8; 32] {
    use crate::data::Targets;
    use crate::job::{Activation, Join, Layer as Op, Loss as LossKind, Model as Spec, RowInit};
    use crate::model::Signature;
    let act = |activation| Op::Activation { activation };
    let linear = |units| Op::Linear { units, bias: true, init: None };
    let images = vec![
        Op::Conv2d { filters: 17, kernel: 3, stride: 1, padding: 1, groups: 1, bias: true, init: None },
        Op::BatchNorm { momentum: 0.1, eps: 1e-5 },
        act(Activation::Gelu),
        Op::MaxPool2d { size: 2, stride: 2 },
        Op::Residual {
            layers: vec![
                Op::Conv2d { filters: 17, kernel: 3, stride: 1, padding: 1, groups: 1, bias: false, init: None },
                act(Activation::Tanh),
            ],
            shortcut: vec![],
        },
        Op::Conv2d { filters: 34, kernel: 3, stride: 2, padding: 1, groups: 17, bias: true, init: None },
        Op::Conv2d { filters: 18, kernel: 3, stride: 1, padding: 1, groups: 2, bias: true, init: None },
        Op::AvgPool2d { size: 2, stride: 1 },
        Op::Flatten,
        linear(300),
        act(Activation::Relu),
        Op::LayerNorm { dims: None, eps: 1e-5 },
        Op::Dropout { rate: 0.3 },
        linear(65),
        act(Activation::Sigmoid),
        linear(33),
        act(Activation::Gelu),
        linear(17),
        act(Activation::Relu),
        linear(50),
        act(Activation::LeakyRelu { slope: 0.1 }),
        linear(10),
    ];
    let attention = |rotary: Option<f64>| Op::Attention { heads: 2, causal: rotary.is_some(), rotary };
    let text = vec![Op::TiedEmbedding {
        width: 32,
        init: None,
        layers: vec![
            Op::Positions { init: None },
            Op::RmsNorm { dims: Some(1), eps: 1e-5 },
            linear(96),
            attention(Some(10_000.0)),
            linear(96),
            attention(None),
            linear(64),
            Op::Swiglu,
            act(Activation::Silu),
        ],
    }];
    let (samples, key) = (13, Key::new(1, Purpose::Synthetic));
    let (words, positions) = (33, 70);
    let tokens = Signature {
        ids: 0,
        input: vec![positions],
        vocabulary: Some(words),
        output: vec![positions, words],
        causal: false,
    };
    let width = 16;
    let lookup = Op::Lookup { width, init: RowInit::Normal { std: 1.0 } };
    let ids = vec![
        Op::Parallel { join: Join::Concat, branches: vec![vec![linear(width)], vec![lookup]] },
        Op::Parallel {
            join: Join::Concat,
            branches: vec![vec![Op::FactorizationMachine { width }], vec![Op::DotInteraction { width }]],
        },
        linear(10),
    ];
    let clicks = Signature { ids: 5, ..Signature::new(&[3], 10) };
    let mut digest = blake3::Hasher::new();
    for (layers, signature) in [(images, Signature::new(&[2, 12, 11], 10)), (text, tokens), (ids, clicks)] {
        let kind = LossKind::CrossEntropy { label_smoothing: 0.1, class_weights: None };
        let outputs = signature.output[signature.output.len() - 1];
        let model = Model::build(&Spec::Layers { layers }, &signature);
        let (Ok(model), Ok(loss)) = (model, Loss::new(&kind, outputs)) else { return [0; 32] };
        let input = |i: u64| match signature.vocabulary {
            Some(vocabulary) => key.below(i, vocabulary as u64) as f32,
            None => key.normal(i),
        };
        let mut batch = Batch {
            ids: (0..(samples * signature.ids) as u64).map(|i| key.below(i, 20)).collect(),
            inputs: (0..(samples * model.input_len()) as u64).map(input).collect(),
            targets: Targets::Class((0..(samples * model.targets()) as u32).map(|i| i % outputs as u32).collect()),
            samples,
            ..Batch::empty()
        };
        batch.look_up();
        batch.put_rows(&model.rows().first(1), model.rows().width());
        let segments = Segments { lo: 2, starts: vec![0, 5, 6, samples] };
        let params = model.layout().init(1);
        let mut grads = vec![0.0; params.len()];
        let mut workspace = Workspace::new(&model, samples, 3);
        let mut d_rows = vec![0.0; batch.rows.len()];
        let (into, rows) = (&mut grads, &mut d_rows);
        let sums = gradient(&model, &loss, &params, &batch, &segments, key, &mut workspace, into, rows, &mut |_, _| {});
        digest.update(&sums.loss.to_le_bytes());
        grads.iter().chain(&d_rows).for_each(|g| {
            digest.update(&g.to_le_bytes());
        });
    }
    *digest.finalize().as_bytes()
}
