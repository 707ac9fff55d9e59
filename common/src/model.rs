//! Models: layers built from the job, with every shape checked before anything runs.

use crate::job::{self, Activation as Act, WeightInit};
use crate::kernels::{Finish, conv::Window};
use crate::layers::{
    Activation, BatchNorm, Conv2d, Dropout, Flatten, GlobalAvgPool, Layer, LayerNorm, Linear, Pool2d, Residual,
    Sequential, finish,
};
use crate::layout::{Init, Layout};

/// Why a model cannot be built on a data set.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ModelError {
    #[error("model.layers[{at}] ({op}) got samples of shape {got:?}; it needs {need}")]
    Shape { at: String, op: &'static str, got: Vec<usize>, need: String },
    #[error(
        "the model gives {got:?} values a sample, the data and the loss need {want}: end it with {{ op = \"linear\", units = {want} }}"
    )]
    Outputs { got: Vec<usize>, want: usize },
    #[error("the model has {0} parameters; at most 2^31 are possible")]
    TooLarge(u128),
    #[error("the model has no parameters to train; add for example {{ op = \"linear\", units = {0} }}")]
    Nothing(usize),
}

/// A model: its layers and the layout of their parameters.
pub struct Model {
    net: Sequential,
    layout: Layout,
    input_len: usize,
    outputs: usize,
}

fn product(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// PyTorch's `nn.init`, with the gain of relu for Kaiming; `None` is the layers' own default, kaiming_uniform(a = sqrt 5).
fn init(kind: Option<WeightInit>, fan_in: usize, fan_out: usize) -> Init {
    let (fan_in, both) = (fan_in as f32, (fan_in + fan_out) as f32);
    match kind {
        None => Init::Uniform { bound: 1.0 / libm::sqrtf(fan_in) },
        Some(WeightInit::KaimingUniform) => Init::Uniform { bound: libm::sqrtf(6.0 / fan_in) },
        Some(WeightInit::KaimingNormal) => Init::Normal { std: libm::sqrtf(2.0 / fan_in) },
        Some(WeightInit::XavierUniform) => Init::Uniform { bound: libm::sqrtf(6.0 / both) },
        Some(WeightInit::XavierNormal) => Init::Normal { std: libm::sqrtf(2.0 / both) },
    }
}

/// The window of an operation on planes, where it fits.
fn window(
    op: &'static str,
    at: &str,
    shape: &[usize],
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Result<Window, ModelError> {
    let error = |need: String| Err(ModelError::Shape { at: at.into(), op, got: shape.into(), need });
    let &[channels, height, width] = shape else {
        return error("[channels, height, width]: put it before \"flatten\", or use image data".into());
    };
    if kernel > height + 2 * padding || kernel > width + 2 * padding {
        return error(format!("height and width of at least {kernel} with their padding"));
    }
    Ok(Window { channels, height, width, kernel, stride, padding })
}

/// The layer of `spec`, and of the activation behind it where `finish` says that it computes it.
fn layer(spec: &job::Layer, finish: Finish, at: &str, shape: &[usize]) -> Result<Box<dyn Layer>, ModelError> {
    let whole = || shape.to_vec();
    Ok(match spec {
        job::Layer::Linear { units, bias, init: kind } => {
            let &[inputs] = shape else {
                let need = "one row of values: put { op = \"flatten\" } before it".into();
                return Err(ModelError::Shape { at: at.into(), op: "linear", got: whole(), need });
            };
            let init = init(*kind, inputs, *units);
            Box::new(Linear { inputs, outputs: [*units], bias: *bias, init, finish })
        }
        job::Layer::Conv2d { filters, kernel, stride, padding, bias, init: kind } => {
            let window = window("conv2d", at, shape, *kernel, *stride, *padding)?;
            let out_shape = [*filters, window.out_height(), window.out_width()];
            let init = init(*kind, window.patch(), filters * kernel * kernel);
            Box::new(Conv2d { window, out_shape, bias: *bias, init, finish })
        }
        job::Layer::MaxPool2d { size, stride } | job::Layer::AvgPool2d { size, stride } => {
            let max = matches!(spec, job::Layer::MaxPool2d { .. });
            let window = window(if max { "max-pool2d" } else { "avg-pool2d" }, at, shape, *size, *stride, 0)?;
            let out_shape = [window.channels, window.out_height(), window.out_width()];
            Box::new(Pool2d { window, out_shape, max })
        }
        job::Layer::GlobalAvgPool => {
            let window = window("global-avg-pool", at, shape, 1, 1, 0)?;
            Box::new(GlobalAvgPool { channels: [window.channels], plane: window.height * window.width })
        }
        job::Layer::Flatten => Box::new(Flatten { len: [product(shape)] }),
        job::Layer::Activation { activation } => Box::new(Activation { kind: *activation, shape: whole() }),
        job::Layer::Dropout { rate } => Box::new(Dropout { rate: *rate, shape: whole() }),
        job::Layer::BatchNorm { momentum, eps } => {
            Box::new(BatchNorm { shape: whole(), momentum: *momentum, eps: *eps })
        }
        job::Layer::LayerNorm { eps } => Box::new(LayerNorm { shape: whole(), eps: *eps }),
        job::Layer::Residual { layers } => {
            let body = chain(layers, &format!("{at}].layers["), shape)?;
            if body.out_shape() != shape {
                let need = format!("a body that gives the same shape; its body gives {:?}", body.out_shape());
                return Err(ModelError::Shape { at: at.into(), op: "residual", got: whole(), need });
            }
            Box::new(Residual { body })
        }
    })
}

fn chain(specs: &[job::Layer], path: &str, in_shape: &[usize]) -> Result<Sequential, ModelError> {
    let mut layers: Vec<Box<dyn Layer>> = Vec::new();
    let mut i = 0;
    while let Some(spec) = specs.get(i) {
        let shape = layers.last().map_or(in_shape, |l| l.out_shape());
        let finish = match (spec, specs.get(i + 1)) {
            (job::Layer::Linear { .. } | job::Layer::Conv2d { .. }, Some(job::Layer::Activation { activation })) => {
                finish(*activation).unwrap_or(Finish::Keep)
            }
            _ => Finish::Keep,
        };
        let next = layer(spec, finish, &format!("{path}{i}"), shape)?;
        i += next.span();
        layers.push(next);
    }
    Ok(Sequential::new(in_shape, layers))
}

impl Model {
    /// Builds `spec` for samples of `shape`, to give `outputs` values each. `linear` and `mlp` take a sample as one row.
    pub fn build(spec: &job::Model, shape: &[usize], outputs: usize) -> Result<Model, ModelError> {
        let linear = |units| job::Layer::Linear { units, bias: true, init: None };
        let (specs, shape) = match spec {
            job::Model::Linear => (vec![linear(outputs)], vec![product(shape)]),
            job::Model::Mlp { hidden, activation, dropout } => {
                let mut specs = Vec::new();
                for &units in hidden {
                    specs.extend([linear(units), job::Layer::Activation { activation: *activation as Act }]);
                    specs.extend((*dropout > 0.0).then_some(job::Layer::Dropout { rate: *dropout }));
                }
                specs.push(linear(outputs));
                (specs, vec![product(shape)])
            }
            job::Model::Layers { layers } => (layers.clone(), shape.to_vec()),
        };
        let net = chain(&specs, "", &shape)?;
        if net.out_shape() != [outputs] {
            return Err(ModelError::Outputs { got: net.out_shape().into(), want: outputs });
        }
        let tensors = net.tensors();
        let size: u128 = tensors.iter().map(|t| t.shape.iter().map(|&d| d as u128).product::<u128>()).sum();
        if size > 1 << 31 {
            return Err(ModelError::TooLarge(size));
        }
        if size == 0 {
            return Err(ModelError::Nothing(outputs));
        }
        Ok(Model { layout: Layout::new(tensors), input_len: product(&shape), outputs, net })
    }

    /// Where its parameters lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Values of one input sample.
    pub fn input_len(&self) -> usize {
        self.input_len
    }

    /// Logits, or predicted values, a sample.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Multiply-adds of a sample in matrix products: forward, and backward (twice as many, without the input's gradient).
    pub fn multiply_adds(&self) -> [u64; 2] {
        let forward = self.net.multiply_adds();
        [forward, 2 * forward - self.net.input_multiply_adds()]
    }

    pub(crate) fn net(&self) -> &Sequential {
        &self.net
    }
}
