//! unisono with a layer, a loss and a data format of one's own:
//!
//!     cargo run --release --manifest-path examples/custom-model/Cargo.toml -- local examples/custom-model/job.toml
//!
//! It is the whole program: `worker`, `eval`, `predict` and all others know them too.

use serde::Deserialize;
use std::error::Error;
use std::f32::consts::PI;
use std::process::ExitCode;
use unisono::Extensions;
use unisono::common::data::{Dataset, Features, Targets};
use unisono::common::extend::{Place, Samples, Target, TargetLoss};
use unisono::common::layers::{Grads, Layer, Params, Pass};
use unisono::common::layout::{Init, Tensor};
use unisono::common::rng::{Key, Purpose};

fn main() -> ExitCode {
    unisono::main(Extensions::default().layer("prelu", prelu).loss("quantile", quantile).format("friedman", friedman))
}

/// `y = x` above 0, and `slope x` below, where each feature's slope is learnt (He et al., 2015, section 2.1).
struct Prelu {
    shape: Vec<usize>,
    slope: f32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Slope {
    slope: f32,
}

fn prelu(keys: Slope, shape: &[usize]) -> Result<Prelu, String> {
    Ok(Prelu { shape: shape.into(), slope: keys.slope })
}

impl Layer for Prelu {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        vec![Tensor::trainable("weight", &self.shape, Init::Constant(self.slope))]
    }

    fn forward(&self, _: &Pass, params: Params, x: &[f32], y: &mut [f32], _saved: &mut [f32], _scratch: &mut [f32]) {
        let slopes = params.trainable.iter().cycle();
        y.iter_mut().zip(x).zip(slopes).for_each(|((y, x), slope)| *y = if *x > 0.0 { *x } else { slope * x });
    }

    fn backward(
        &self,
        pass: &Pass,
        params: Params,
        x: &[f32],
        _y: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: Grads,
        _saved: &mut [f32],
        _scratch: &mut [f32],
    ) {
        let width = params.trainable.len();
        pass.sum(grads.trainable, |samples, sum| {
            sum.fill(0.0);
            for at in samples.start * width..samples.end * width {
                sum[at % width] += dy[at] * x[at].min(0.0);
            }
        });
        pass.finish(grads.trainable);
        let slopes = params.trainable.iter().cycle();
        for (((dx, x), dy), slope) in dx.into_iter().flatten().zip(x).zip(dy).zip(slopes) {
            *dx = if *x > 0.0 { *dy } else { slope * dy };
        }
    }
}

/// What is least where a `quantile` of the targets is below the output (Koenker and Bassett, 1978, eq. 1.2).
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Quantile {
    quantile: f32,
}

fn quantile(keys: Quantile) -> Result<Quantile, String> {
    let inside = keys.quantile > 0.0 && keys.quantile < 1.0;
    if inside { Ok(keys) } else { Err(format!("`quantile` must be above 0 and below 1, not {}", keys.quantile)) }
}

impl TargetLoss for Quantile {
    fn value(&self, x: &[f32], target: Target, d: &mut [f32]) -> f64 {
        let Target::Value(value) = target else { unreachable!("`check` asks for values") };
        d[0] = if value > x[0] { -self.quantile } else { 1.0 - self.quantile };
        ((x[0] - value) * d[0]).into()
    }

    fn check(&self, targets: &Targets) -> Result<(), String> {
        let values = matches!(targets, Targets::Value(_));
        values.then_some(()).ok_or("it needs values as targets, the data has classes".into())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Friedman {
    samples: usize,
    noise: f32,
}

/// `10 sin(pi a b) + 20 (c - 0.5)^2 + 10 d + 5 e` of the first five of ten uniform numbers, with noise (Friedman, 1991,
/// section 4.3).
fn friedman(keys: Friedman, place: &Place) -> Result<Samples, Box<dyn Error + Send + Sync>> {
    let key = Key::new(place.seed, Purpose::Synthetic);
    let made = |from: usize, samples: usize| {
        let inputs: Vec<f32> =
            (from * 10..(from + samples) * 10).map(|i| key.named("inputs").uniform(i as u64)).collect();
        let value = |(i, x): (usize, &[f32])| {
            let exact = 10.0 * (PI * x[0] * x[1]).sin() + 20.0 * (x[2] - 0.5).powi(2) + 10.0 * x[3] + 5.0 * x[4];
            exact + keys.noise * key.named("noise").normal((from + i) as u64)
        };
        let targets = Targets::Value(inputs.chunks(10).enumerate().map(value).collect());
        Dataset::new(vec![10], Features::F32(inputs), targets)
    };
    Ok(Samples { train: made(0, keys.samples), test: Some(made(keys.samples, keys.samples / 8)), classes: None })
}
