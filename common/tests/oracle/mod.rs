//! Layers and losses once more, naively and in f64: what the kernels are held against.

use std::cell::Cell;
use std::collections::BTreeMap;
use unisono_common::data::Targets;
use unisono_common::job::{Activation, Join, Layer, Loss};
use unisono_common::layers::Segments;
use unisono_common::model::Model;
use unisono_common::rng::Key;
use unisono_common::rows::lookup::NOWHERE;

/// Samples, each with its values.
type Rows = Vec<Vec<f64>>;

/// A model in training mode on one batch.
pub struct Oracle<'a> {
    pub layers: &'a [Layer],
    pub shape: &'a [usize],
    pub segments: &'a Segments,
    /// Of each sample's ids, among the rows of sparse tables.
    pub places: &'a [u32],
    /// What each of them is multiplied by; empty: 1.
    pub factors: &'a [f32],
    /// Seed and step, as the layers get them.
    pub key: Key,
    /// How near any value came to a kink (of relu, of a maximum): there, a slope means nothing.
    pub margin: Cell<f64>,
}

/// A model's tensors by name.
pub type Tensors = BTreeMap<String, Vec<f64>>;

/// `values` in f64, by name.
pub fn tensors(model: &Model, values: &[f32]) -> Tensors {
    let named = model.layout().tensors().map(|(t, range)| (t.name.clone(), range));
    named.map(|(name, range)| (name, values[range].iter().map(|v| *v as f64).collect())).collect()
}

impl Oracle<'_> {
    /// The model's outputs, a row a sample.
    pub fn forward(&self, tensors: &Tensors, inputs: &[f32]) -> Rows {
        let len: usize = self.shape.iter().product();
        let rows = inputs.chunks_exact(len).map(|row| row.iter().map(|v| *v as f64).collect()).collect();
        self.chain(tensors, self.layers, "", self.shape.to_vec(), rows, self.key)
    }

    fn near(&self, distance: f64) {
        self.margin.set(self.margin.get().min(distance.abs()));
    }

    fn chain(&self, t: &Tensors, layers: &[Layer], prefix: &str, shape: Vec<usize>, x: Rows, key: Key) -> Rows {
        self.chain_and_shape(t, layers, prefix, shape, x, key).1
    }

    fn chain_and_shape(
        &self,
        t: &Tensors,
        layers: &[Layer],
        prefix: &str,
        mut shape: Vec<usize>,
        mut x: Rows,
        key: Key,
    ) -> (Vec<usize>, Rows) {
        for (i, layer) in layers.iter().enumerate() {
            (shape, x) = self.layer(t, layer, &format!("{prefix}{i}."), shape, x, key.with(i as u64));
        }
        (shape, x)
    }

    fn layer(
        &self,
        t: &Tensors,
        layer: &Layer,
        name: &str,
        shape: Vec<usize>,
        x: Rows,
        key: Key,
    ) -> (Vec<usize>, Rows) {
        let tensor = |which: &str| t[&format!("{name}{which}")].as_slice();
        let each = |f: &dyn Fn(&[f64]) -> Vec<f64>| -> Rows { x.iter().map(|x| f(x)).collect() };
        match layer {
            Layer::Added { name, .. } => panic!("{name} is not one of ours"),
            Layer::Linear { units, bias, .. } => {
                let (w, n) = (tensor("weight"), shape[shape.len() - 1]);
                let unit = |x: &[f64], o: usize| -> f64 {
                    let sum: f64 = (0..n).map(|i| w[o * n + i] * x[i]).sum();
                    sum + if *bias { tensor("bias")[o] } else { 0.0 }
                };
                let rows = |x: &[f64]| x.chunks(n).flat_map(|x| (0..*units).map(|o| unit(x, o))).collect();
                ([&shape[..shape.len() - 1], &[*units]].concat(), each(&rows))
            }
            Layer::Conv2d { filters, kernel, stride, padding, groups, bias, .. } => {
                let (w, patch) = (tensor("weight"), shape[0] / groups * kernel * kernel);
                let (shape, windows) = windows(&shape, *kernel, *stride, *padding);
                let value = |x: &[f64], f: usize, (y, x0): (usize, usize)| -> f64 {
                    let group = f / (filters / groups);
                    let own = windows(y, x0).into_iter().filter(|(_, k)| k / patch == group);
                    let terms = own.filter_map(|(at, k)| Some(w[f * patch + k % patch] * x[at?]));
                    terms.sum::<f64>() + if *bias { tensor("bias")[f] } else { 0.0 }
                };
                let out = |x: &[f64]| {
                    (0..*filters)
                        .flat_map(|f| places(&shape).map(move |p| (f, p)))
                        .map(|(f, p)| value(x, f, p))
                        .collect()
                };
                (vec![*filters, shape[1], shape[2]], each(&out))
            }
            Layer::MaxPool2d { size, stride } | Layer::AvgPool2d { size, stride } => {
                let max = matches!(layer, Layer::MaxPool2d { .. });
                let plane: usize = shape[1] * shape[2];
                let plane_shape = [1, shape[1], shape[2]];
                let (one, windows) = windows(&plane_shape, *size, *stride, 0);
                let value = |x: &[f64], (y, x0): (usize, usize)| -> f64 {
                    let mut under: Vec<f64> = windows(y, x0).into_iter().filter_map(|(at, _)| Some(x[at?])).collect();
                    if !max {
                        return under.iter().sum::<f64>() / (size * size) as f64;
                    }
                    under.sort_by(|a, b| b.total_cmp(a));
                    under.windows(2).take(1).for_each(|w| self.near(w[0] - w[1]));
                    under[0]
                };
                let out = |x: &[f64]| x.chunks(plane).flat_map(|x| places(&one).map(|p| value(x, p))).collect();
                (vec![shape[0], one[1], one[2]], each(&out))
            }
            Layer::GlobalAvgPool => {
                let plane: usize = shape[1..].iter().product();
                (vec![shape[0]], each(&|x| x.chunks(plane).map(|x| x.iter().sum::<f64>() / plane as f64).collect()))
            }
            Layer::Flatten => (vec![shape.iter().product()], x),
            Layer::Activation { activation } => {
                let f = |x: f64| match activation {
                    Activation::Relu => {
                        self.near(x);
                        x.max(0.0)
                    }
                    Activation::LeakyRelu { slope } => {
                        self.near(x);
                        if x > 0.0 { x } else { *slope as f64 * x }
                    }
                    Activation::Gelu => 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())),
                    Activation::Silu => x / (1.0 + (-x).exp()),
                    Activation::Tanh => x.tanh(),
                    Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
                };
                (shape, each(&|x| x.iter().map(|x| f(*x)).collect()))
            }
            Layer::Dropout { rate } => {
                let keeps = |segment: usize, at: usize| {
                    let key = key.with(self.segments.lo as u64 + segment as u64);
                    key.u32_fast(at as u32) >= (*rate as f64 * 4_294_967_296.0) as u32
                };
                let mut y = x;
                for s in 0..self.segments.len() {
                    for (at, y) in y[self.segments.rows(s)].iter_mut().flatten().enumerate() {
                        *y = if keeps(s, at) { *y / (1.0 - *rate as f64) } else { 0.0 };
                    }
                }
                (shape, y)
            }
            Layer::BatchNorm { eps, .. } => {
                let plane: usize = shape[1..].iter().product();
                let mut y = x.clone();
                for s in 0..self.segments.len() {
                    let rows = self.segments.rows(s);
                    for c in 0..shape[0] {
                        let at = c * plane..(c + 1) * plane;
                        let all: Vec<f64> = x[rows.clone()].iter().flat_map(|x| x[at.clone()].to_vec()).collect();
                        let scaled = normal(&all, *eps);
                        for (i, y) in y[rows.clone()].iter_mut().flat_map(|y| &mut y[at.clone()]).enumerate() {
                            *y = scaled[i] * tensor("weight")[c] + tensor("bias")[c];
                        }
                    }
                }
                (shape, y)
            }
            Layer::LayerNorm { eps, .. } => {
                let (w, b) = (tensor("weight"), tensor("bias"));
                let group = |x: &[f64]| -> Vec<f64> {
                    normal(x, *eps).iter().zip(w.iter().zip(b)).map(|(x, (w, b))| x * w + b).collect()
                };
                (shape, each(&|x| x.chunks(w.len()).flat_map(group).collect()))
            }
            Layer::RmsNorm { eps, .. } => {
                let w = tensor("weight");
                let group = |x: &[f64]| -> Vec<f64> {
                    let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
                    x.iter().zip(w).map(|(x, w)| x / (square + *eps as f64).sqrt() * w).collect()
                };
                (shape, each(&|x| x.chunks(w.len()).flat_map(group).collect()))
            }
            Layer::Embedding { width, .. } => {
                let w = tensor("weight");
                let row = |token: &f64| w[*token as usize * width..][..*width].to_vec();
                (vec![shape[0], *width], each(&|x| x.iter().flat_map(row).collect()))
            }
            Layer::EmbeddingBag { width, .. } => {
                let w = tensor("weight");
                let mean = |x: &[f64]| -> Vec<f64> {
                    let tokens: Vec<usize> = x.iter().map(|t| *t as usize).filter(|t| *t != 0).collect();
                    let sum = |i: usize| tokens.iter().map(|t| w[t * width + i]).sum::<f64>();
                    (0..*width).map(|i| sum(i) / tokens.len().max(1) as f64).collect()
                };
                (vec![*width], each(&mean))
            }
            Layer::TiedEmbedding { width, layers, .. } => {
                let w = tensor("weight");
                let row = |token: &f64| w[*token as usize * width..][..*width].to_vec();
                let rows = each(&|x| x.iter().flat_map(row).collect());
                let body = self.chain(t, layers, name, vec![shape[0], *width], rows, key);
                let logit = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
                let logits = |x: &Vec<f64>| {
                    x.chunks(*width).flat_map(|x| w.chunks(*width).map(|w| logit(x, w)).collect::<Vec<_>>()).collect()
                };
                (vec![shape[0], w.len() / width], body.iter().map(logits).collect())
            }
            Layer::Positions { .. } => {
                let w = tensor("weight");
                (shape, each(&|x| x.iter().zip(w).map(|(x, w)| x + w).collect()))
            }
            Layer::Attention { heads, causal, rotary } => {
                let (positions, width) = (shape[0], shape[1] / 3);
                let out = |x: &[f64]| attention(x, width, *heads, *causal, *rotary);
                (vec![positions, width], each(&out))
            }
            Layer::Swiglu => {
                let (rest, width) = (&shape[..shape.len() - 1], shape[shape.len() - 1] / 2);
                let row = |x: &[f64]| -> Vec<f64> {
                    (0..width).map(|i| x[i] / (1.0 + (-x[i]).exp()) * x[width + i]).collect()
                };
                ([rest, &[width]].concat(), each(&|x| x.chunks(2 * width).flat_map(row).collect()))
            }
            Layer::Lookup { width, .. } => {
                let (w, ids) = (tensor("weight"), self.places.len() / x.len().max(1));
                let row = |at: usize| match self.places[at] {
                    NOWHERE => vec![0.0; *width],
                    place => {
                        let factor = self.factors.get(at).map_or(1.0, |factor| *factor as f64);
                        w[place as usize * width..][..*width].iter().map(|w| w * factor).collect()
                    }
                };
                let rows = (0..x.len()).map(|i| (i * ids..(i + 1) * ids).flat_map(row).collect());
                (vec![ids, *width], rows.collect())
            }
            Layer::Slice { from, len } => (vec![*len], each(&|x| x[*from..from + len].to_vec())),
            Layer::Sum => {
                let width = shape[shape.len() - 1];
                let sum = |x: &[f64], f: usize| x.iter().skip(f).step_by(width).sum::<f64>();
                (vec![width], each(&|x| (0..width).map(|f| sum(x, f)).collect()))
            }
            Layer::FactorizationMachine { width } | Layer::DotInteraction { width } => {
                let products = |x: &[f64]| -> Vec<f64> {
                    let v: Vec<&[f64]> = x.chunks(*width).collect();
                    let dot = |i: usize, j: usize| v[i].iter().zip(v[j]).map(|(a, b)| a * b).sum();
                    (0..v.len()).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| dot(i, j)).collect()
                };
                let y = match layer {
                    Layer::DotInteraction { .. } => each(&|x| [&x[..*width], &products(x)].concat()),
                    _ => each(&|x| vec![products(x).iter().sum()]),
                };
                (vec![y.first().map_or(0, Vec::len)], y)
            }
            Layer::Parallel { join, branches } => {
                let branch = |(i, layers): (usize, &Vec<Layer>)| {
                    self.chain(t, layers, &format!("{name}{i}."), shape.clone(), x.clone(), key.with(i as u64))
                };
                let all: Vec<Rows> = branches.iter().enumerate().map(branch).collect();
                let join = |row: usize| -> Vec<f64> {
                    let parts = all.iter().map(|y| y[row].clone());
                    match join {
                        Join::Concat => parts.flatten().collect(),
                        Join::Sum => parts.reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect()).unwrap(),
                    }
                };
                let y: Rows = (0..x.len()).map(join).collect();
                (vec![y.first().map_or(0, Vec::len)], y)
            }
            Layer::Residual { layers, shortcut } => {
                let body = self.chain(t, layers, name, shape.clone(), x.clone(), key);
                let key = key.named("shortcut");
                let (shape, around) = self.chain_and_shape(t, shortcut, &format!("{name}shortcut."), shape, x, key);
                (shape, around.iter().zip(body).map(|(x, y)| x.iter().zip(y).map(|(x, y)| x + y).collect()).collect())
            }
        }
    }
}

/// Attention as its formula has it, of one sample.
fn attention(x: &[f64], width: usize, heads: usize, causal: bool, rotary: Option<f64>) -> Vec<f64> {
    let (d, positions) = (width / heads, x.len() / 3 / width);
    let part = |t: usize, which: usize, h: usize| x[t * 3 * width + which * width + h * d..][..d].to_vec();
    let turned = |t: usize, which: usize, h: usize| {
        let (x, half) = (part(t, which, h), d / 2);
        let Some(base) = rotary else { return x };
        let turn = |i: usize| (t as f64 * base.powf(-2.0 * (i % half) as f64 / d as f64)).sin_cos();
        let (first, second) = x.split_at(half);
        let low = (0..half).map(|i| first[i] * turn(i).1 - second[i] * turn(i).0);
        low.chain((0..half).map(|i| first[i] * turn(i).0 + second[i] * turn(i).1)).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut y = vec![0.0; positions * width];
    for (h, t) in (0..heads).flat_map(|h| (0..positions).map(move |t| (h, t))) {
        let seen = if causal { t + 1 } else { positions };
        let q = turned(t, 0, h);
        let weights: Vec<f64> = (0..seen).map(|s| (dot(&q, &turned(s, 1, h)) / (d as f64).sqrt()).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (s, weight) in weights.iter().enumerate() {
            let y = &mut y[t * width + h * d..][..d];
            y.iter_mut().zip(part(s, 2, h)).for_each(|(y, v)| *y += weight / sum * v);
        }
    }
    y
}

/// `(x - mean) / sqrt(variance + eps)`.
fn normal(x: &[f64], eps: f32) -> Vec<f64> {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
    x.iter().map(|x| (x - mean) / (variance + eps as f64).sqrt()).collect()
}

fn places(shape: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    let (height, width) = (shape[1], shape[2]);
    (0..height).flat_map(move |y| (0..width).map(move |x| (y, x)))
}

/// What lies under a window: the input's index (`None`: padding) and the kernel's.
type Under = Vec<(Option<usize>, usize)>;

/// The shape of what a window of `kernel x kernel` leaves of `[channels, height, width]`, and what lies under it at a place.
fn windows(
    shape: &[usize],
    kernel: usize,
    stride: usize,
    padding: usize,
) -> (Vec<usize>, impl Fn(usize, usize) -> Under) {
    let (channels, height, width) = (shape[0], shape[1], shape[2]);
    let out = |size: usize| (size + 2 * padding - kernel) / stride + 1;
    let under = move |y: usize, x: usize| {
        let mut all = Vec::new();
        for c in 0..channels {
            for (ky, kx) in (0..kernel).flat_map(|ky| (0..kernel).map(move |kx| (ky, kx))) {
                let inside =
                    |o: usize, k: usize, size: usize| (o * stride + k).checked_sub(padding).filter(|i| *i < size);
                let at = inside(y, ky, height).zip(inside(x, kx, width)).map(|(y, x)| (c * height + y) * width + x);
                all.push((at, (c * kernel + ky) * kernel + kx));
            }
        }
        all
    };
    (vec![channels, out(height), out(width)], under)
}

/// The loss of one sample, as PyTorch sums it, and its weight; and how near it is to a kink.
pub fn loss(kind: &Loss, x: &[f64], targets: &Targets, row: usize) -> (f64, f64, f64) {
    let (class, value) = match targets {
        Targets::Class(classes) => (classes[row] as usize, classes[row] as f64),
        Targets::Value(values) => (0, values[row] as f64),
        Targets::Next | Targets::Seen(_) => panic!("a batch has classes or values instead"),
    };
    let all = |f: &dyn Fn(f64) -> f64| x.iter().map(|x| f(x - value)).sum::<f64>();
    let smooth = f64::INFINITY;
    if let Loss::Focal { class_weights: classes @ Some(_), .. } | Loss::Hinge { class_weights: classes @ Some(_) } =
        kind
    {
        let plain = match kind {
            Loss::Focal { gamma, .. } => Loss::Focal { gamma: *gamma, class_weights: None },
            _ => Loss::Hinge { class_weights: None },
        };
        let times = classes.as_ref().expect("there are some")[class] as f64;
        let (sum, weight, margin) = loss(&plain, x, targets, row);
        return (times * sum, times * weight, margin);
    }
    match kind {
        Loss::CrossEntropy { label_smoothing, class_weights } => {
            let total: f64 = x.iter().map(|x| x.exp()).sum();
            let weight = |c: usize| class_weights.as_ref().map_or(1.0, |w| w[c] as f64);
            let hit = |c: usize| weight(c) * (total.ln() - x[c]);
            let (smoothing, n) = (*label_smoothing as f64, x.len());
            let spread = (0..n).map(hit).sum::<f64>() / n as f64;
            ((1.0 - smoothing) * hit(class) + smoothing * spread, weight(class), smooth)
        }
        Loss::BinaryCrossEntropy { positive_weight } => {
            let p = 1.0 / (1.0 + (-x[0]).exp());
            (-(*positive_weight as f64 * value * p.ln() + (1.0 - value) * (1.0 - p).ln()), 1.0, smooth)
        }
        Loss::Mse => (all(&|e| e * e), x.len() as f64, smooth),
        Loss::Mae => (all(&f64::abs), x.len() as f64, x.iter().fold(smooth, |m, x| m.min((x - value).abs()))),
        Loss::Huber { delta } => {
            let d = *delta as f64;
            let f = |e: f64| if e.abs() <= d { 0.5 * e * e } else { d * (e.abs() - 0.5 * d) };
            (all(&f), x.len() as f64, smooth)
        }
        Loss::Focal { gamma, .. } => {
            let total: f64 = x.iter().map(|x| x.exp()).sum();
            let p = match x.len() {
                1 => 1.0 / (1.0 + (x[0] * (1.0 - 2.0 * value)).exp()),
                _ => x[class].exp() / total,
            };
            (-(1.0 - p).powf(*gamma as f64) * p.ln(), 1.0, smooth)
        }
        Loss::Added { name, .. } => panic!("{name} is not one of ours"),
        Loss::Bpr => panic!("it is of several rows: loss.rs tries it"),
        Loss::Hinge { .. } if x.len() == 1 => {
            let gap = 1.0 - (2.0 * value - 1.0) * x[0];
            (gap.max(0.0), 1.0, gap.abs())
        }
        Loss::Hinge { .. } => {
            let gaps: Vec<f64> = (0..x.len()).filter(|c| *c != class).map(|c| 1.0 - x[class] + x[c]).collect();
            let sum: f64 = gaps.iter().map(|gap| gap.max(0.0)).sum();
            (sum / x.len() as f64, 1.0, gaps.iter().fold(smooth, |m, gap| m.min(gap.abs())))
        }
    }
}
