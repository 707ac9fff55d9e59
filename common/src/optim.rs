//! Optimizers as pure, element-wise functions over chunks, with exactly PyTorch's definitions where it has them; and gradient
//! clipping.
//!
//! An update reads weights and gradient, changes the state in place and writes the new weights beside the old ones. No
//! element looks at another, so chunks may be updated in any order, on any thread. The one exception, Lamb, is two passes over
//! a step: directions, whose lengths are added up tensor by tensor ([`Lengths`]), and then the steps along them.

use crate::job;
use crate::kernels::{self, FAR, LANES, fetch, vectorized};
use crate::layout::le_bytes;

/// State vectors of an optimizer, at most.
pub const MAX_SLOTS: usize = 4;

/// The name of the state vector that is the average of the weights.
pub const EMA: &str = "ema";

/// An optimizer, built from its part of the job; and the average of what it makes.
#[derive(Clone, Debug)]
pub struct Optimizer {
    kind: job::Optimizer,
    /// What an exponential moving average of the weights keeps of itself in a step, where there is one.
    ema: Option<f32>,
}

impl Optimizer {
    /// The optimizer that `job` describes, and an average of the weights where `ema` is its decay.
    pub fn new(job: &job::Optimizer, ema: Option<f32>) -> Optimizer {
        Optimizer { kind: job.clone(), ema }
    }

    /// The same with another rate, or another decay.
    pub fn with(&self, lr: Option<f32>, weight_decay: Option<f32>) -> Optimizer {
        let mut other = self.clone();
        let [own_lr, own_decay] = other.kind.settings();
        *own_lr = lr.unwrap_or(*own_lr);
        *own_decay = weight_decay.unwrap_or(*own_decay);
        other
    }

    /// Whether how far a value moves depends on all of its tensor: [`Update::run`] gives directions then, and
    /// [`Update::along`] goes them.
    pub fn is_layerwise(&self) -> bool {
        matches!(self.kind, job::Optimizer::Lamb { .. })
    }

    /// Names of the state vectors, each as long as the trainable parameters. The average of the weights is the last one.
    pub fn slot_names(&self) -> Vec<&'static str> {
        let mut names = match self.kind {
            job::Optimizer::Sgd { momentum: 0.0, .. } => vec![],
            job::Optimizer::Sgd { .. } => vec!["momentum_buffer"],
            job::Optimizer::Adam { .. } | job::Optimizer::AdamW { .. } | job::Optimizer::Lamb { .. } => {
                vec!["exp_avg", "exp_avg_sq"]
            }
            job::Optimizer::Adagrad { .. } => vec!["sum"],
            job::Optimizer::Lion { .. } => vec!["exp_avg"],
            job::Optimizer::RmsProp { centered, momentum, .. } => {
                let mut names = vec!["square_avg"];
                names.extend(centered.then_some("grad_avg"));
                names.extend((momentum > 0.0).then_some("momentum_buffer"));
                names
            }
        };
        names.extend(self.ema.map(|_| EMA));
        names
    }

    /// Number of state vectors.
    pub fn slots(&self) -> usize {
        self.slot_names().len()
    }

    /// What the state vectors of these weights are at first.
    pub fn first_slots(&self, weights: &[f32]) -> Vec<Vec<f32>> {
        let value = match self.kind {
            job::Optimizer::Adagrad { initial_accumulator, .. } => initial_accumulator,
            _ => 0.0,
        };
        let first = |name| if name == EMA { weights.to_vec() } else { vec![value; weights.len()] };
        self.slot_names().into_iter().map(first).collect()
    }

    /// What it does in `step`, which counts from 1, with `factor` times its rate.
    pub fn at(&self, step: u64, factor: f64) -> Update<'_> {
        let [lr, _] = self.kind.clone().settings().map(|value| *value);
        let lr = (lr as f64 * factor) as f32;
        let (mut rate, mut root) = (lr, 1.0);
        let correction = |beta: f32| 1.0 - libm::pow(beta as f64, step as f64);
        match self.kind {
            job::Optimizer::Adam { beta1, beta2, .. } | job::Optimizer::AdamW { beta1, beta2, .. } => {
                rate = (lr as f64 / correction(beta1)) as f32;
                root = libm::sqrt(correction(beta2)) as f32;
            }
            job::Optimizer::Lamb { beta1, beta2, .. } => {
                rate = (1.0 / correction(beta1)) as f32;
                root = libm::sqrt(correction(beta2)) as f32;
            }
            job::Optimizer::Adagrad { lr_decay, .. } => rate = lr / (1.0 + (step - 1) as f32 * lr_decay),
            job::Optimizer::Sgd { .. } | job::Optimizer::Lion { .. } | job::Optimizer::RmsProp { .. } => {}
        }
        // The first step's average is of the weights that it made, as PyTorch's AveragedModel has it.
        let keep = self.ema.map(|decay| if step == 1 { 0.0 } else { decay });
        Update { optimizer: &self.kind, first: step == 1, lr, rate, root, keep }
    }
}

/// Sums of squares, of a tensor's values and of the direction that Lamb moves them in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lengths {
    pub weights: f64,
    pub direction: f64,
}

impl Lengths {
    /// Of a part of a tensor.
    pub fn of(weights: &[f32], direction: &[f32]) -> Lengths {
        Lengths { weights: sum_squares(weights), direction: sum_squares(direction) }
    }

    /// How many times the direction's length the tensor moves for a rate of 1: the "trust ratio" of You et al., 2020, where
    /// `phi(z) = z`; 1 where either has no length.
    pub fn ratio(self) -> f32 {
        if self.weights > 0.0 && self.direction > 0.0 { libm::sqrt(self.weights / self.direction) as f32 } else { 1.0 }
    }
}

impl std::ops::AddAssign for Lengths {
    fn add_assign(&mut self, other: Lengths) {
        self.weights += other.weights;
        self.direction += other.direction;
    }
}

/// A gradient on its way to the weights.
#[derive(Clone, Copy)]
pub struct Sums<'a> {
    /// Little-endian f32, wherever they lie: of the whole tree, or of the root's first half,
    pub first: &'a [u8],
    /// to which those of its second are still to be added.
    pub second: Option<&'a [u8]>,
    /// What makes a mean of the sum.
    pub factor: f32,
    /// The mean is clamped to `-limit..=limit`.
    pub limit: Option<f32>,
}

impl<'a> Sums<'a> {
    /// A gradient that is used as it is.
    pub fn mean(values: &'a [f32]) -> Sums<'a> {
        Sums { first: le_bytes(values), second: None, factor: 1.0, limit: None }
    }
}

/// Values whose passes follow each other so closely that they overlap in the processor: for it they are one, over memory.
const TOGETHER: usize = 64;

/// So many, in whole cache lines: what lies across two is slow to read where it was just written.
#[repr(align(64))]
struct Few<T>([T; TOGETHER]);

/// An optimizer in one step.
pub struct Update<'a> {
    optimizer: &'a job::Optimizer,
    /// Whether the step is the first of all.
    first: bool,
    lr: f32,
    /// Adam's and Adagrad's learning rate of the step, Lamb's first correction, and the root of Adam's second correction.
    rate: f32,
    root: f32,
    /// What the average of the weights keeps of itself.
    keep: Option<f32>,
}

impl Update<'_> {
    /// New weights (Lamb: directions) from a gradient of the same length, into `out`, in one pass; false where a sum or a new
    /// weight is not finite.
    pub fn run(&self, weights: &[f32], sums: Sums<'_>, state: &mut [&mut [f32]], out: &mut [f32]) -> bool {
        vectorized(
            #[inline(always)]
            || self.pass(weights, sums, state, out),
        )
    }

    /// New weights from a direction, which is in `out`: `ratio` times the rate along it. False where one is not finite.
    pub fn along(&self, weights: &[f32], ratio: f32, state: &mut [&mut [f32]], out: &mut [f32]) -> bool {
        let length = self.lr * ratio;
        vectorized(
            #[inline(always)]
            || {
                out.iter_mut().zip(weights).for_each(|(out, w)| *out = w - length * *out);
                self.average(state, out);
            },
        );
        kernels::all_finite(out)
    }

    /// Brings the average, which is the last state vector, to the new weights.
    #[inline(always)]
    fn average(&self, state: &mut [&mut [f32]], out: &[f32]) {
        let (Some(keep), Some(average)) = (self.keep, state.last_mut()) else { return };
        average.iter_mut().zip(out).for_each(|(average, w)| *average = keep * *average + (1.0 - keep) * w);
    }

    #[inline(always)]
    fn pass(&self, weights: &[f32], sums: Sums<'_>, state: &mut [&mut [f32]], out: &mut [f32]) -> bool {
        let rest = out.len() % TOGETHER;
        let mut infinite = Few([0; TOGETHER]);
        for from in (0..out.len() - rest).step_by(TOGETHER) {
            self.few(from, TOGETHER, weights, sums, state, out, &mut infinite);
        }
        self.few(out.len() - rest, rest, weights, sums, state, out, &mut infinite);
        infinite.0.iter().all(|infinite| *infinite == 0)
    }

    /// [`Update::pass`] over `len` values from `from` on.
    #[inline(always)]
    fn few(
        &self,
        from: usize,
        len: usize,
        weights: &[f32],
        sums: Sums<'_>,
        state: &mut [&mut [f32]],
        out: &mut [f32],
        infinite: &mut Few<u32>,
    ) {
        let mut room = Few([0.0; TOGETHER]);
        let ahead = (from + FAR..from + FAR + len).step_by(LANES);
        for all in [weights, out].into_iter().chain(state.iter().map(|state| &**state)) {
            ahead.clone().for_each(|line| fetch(all, line));
        }
        for all in [sums.first].into_iter().chain(sums.second) {
            ahead.clone().for_each(|line| fetch(all, 4 * line));
        }
        let g = &mut room.0[..len];
        let first = &sums.first.as_chunks::<4>().0[from..][..len];
        g.iter_mut().zip(first).for_each(|(g, a)| *g = f32::from_le_bytes(*a));
        if let Some(second) = sums.second {
            let second = &second.as_chunks::<4>().0[from..][..len];
            g.iter_mut().zip(second).for_each(|(g, a)| *g += f32::from_le_bytes(*a));
        }
        g.iter_mut().for_each(|g| *g *= sums.factor);
        if let Some(limit) = sums.limit {
            // Where an infinite gradient does not make an infinite weight or NaN.
            kernels::note_infinite(g, &mut infinite.0);
            g.iter_mut().for_each(|g| *g = g.clamp(-limit, limit));
        }
        let mut states: [&mut [f32]; MAX_SLOTS] = Default::default();
        let vectors = state.len();
        for (to, state) in states.iter_mut().zip(state.iter_mut()) {
            *to = &mut state[from..][..len];
        }
        let out = &mut out[from..][..len];
        let own = vectors - usize::from(self.keep.is_some());
        self.block(&weights[from..][..len], g, &mut states[..own], out);
        if !matches!(self.optimizer, job::Optimizer::Lamb { .. }) {
            self.average(&mut states[..vectors], out);
        }
        kernels::note_infinite(out, &mut infinite.0);
    }

    #[inline(always)]
    fn block(&self, w: &[f32], g: &[f32], state: &mut [&mut [f32]], out: &mut [f32]) {
        let (n, lr) = (out.len(), self.lr);
        let (w, g) = (&w[..n], &g[..n]);
        match *self.optimizer {
            job::Optimizer::Sgd { momentum, dampening, nesterov, weight_decay, .. } => match state {
                [buffer] => {
                    // The first step's buffer is the gradient itself (dampening starts with the second).
                    let keep = if self.first { 0.0 } else { momentum };
                    let take = if self.first { 1.0 } else { 1.0 - dampening };
                    let buffer = &mut buffer[..n];
                    for i in 0..n {
                        let grad = g[i] + weight_decay * w[i];
                        buffer[i] = keep * buffer[i] + take * grad;
                        let direction = if nesterov { grad + momentum * buffer[i] } else { buffer[i] };
                        out[i] = w[i] - lr * direction;
                    }
                }
                _ => {
                    for i in 0..n {
                        out[i] = w[i] - lr * (g[i] + weight_decay * w[i]);
                    }
                }
            },
            job::Optimizer::Adam { beta1, beta2, eps, weight_decay, .. } => {
                let [first, second] = state else { return };
                self.adam([beta1, beta2, eps], weight_decay, 1.0, w, g, first, second, out);
            }
            job::Optimizer::AdamW { beta1, beta2, eps, weight_decay, .. } => {
                let [first, second] = state else { return };
                self.adam([beta1, beta2, eps], 0.0, 1.0 - lr * weight_decay, w, g, first, second, out);
            }
            job::Optimizer::Adagrad { eps, weight_decay, .. } => {
                let [sum] = state else { return };
                let sum = &mut sum[..n];
                for i in 0..n {
                    let grad = g[i] + weight_decay * w[i];
                    sum[i] += grad * grad;
                    out[i] = w[i] - self.rate * grad / (sum[i].sqrt() + eps);
                }
            }
            // You et al., "Large Batch Optimization for Deep Learning", 2020, algorithm 2, up to the length of the step.
            job::Optimizer::Lamb { beta1, beta2, eps, weight_decay, .. } => {
                let [first, second] = state else { return };
                let (first, second) = (&mut first[..n], &mut second[..n]);
                for i in 0..n {
                    first[i] = beta1 * first[i] + (1.0 - beta1) * g[i];
                    second[i] = beta2 * second[i] + (1.0 - beta2) * g[i] * g[i];
                    out[i] = self.rate * first[i] / (second[i].sqrt() / self.root + eps) + weight_decay * w[i];
                }
            }
            // Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, program 1.
            job::Optimizer::Lion { beta1, beta2, weight_decay, .. } => {
                let [average] = state else { return };
                let average = &mut average[..n];
                for i in 0..n {
                    let direction = beta1 * average[i] + (1.0 - beta1) * g[i];
                    let sign = f32::from(direction > 0.0) - f32::from(direction < 0.0);
                    // What is not a number has no sign, and must not be lost.
                    out[i] = w[i] - lr * (sign + weight_decay * w[i]) + 0.0 * direction;
                    average[i] = beta2 * average[i] + (1.0 - beta2) * g[i];
                }
            }
            job::Optimizer::RmsProp { alpha, eps, momentum, centered, weight_decay, .. } => {
                let [square, others @ ..] = state else { return };
                let (average, buffer): (&mut [f32], &mut [f32]) = match others {
                    [average, buffer] => (average, buffer),
                    [average] if centered => (average, &mut []),
                    [buffer] => (&mut [], buffer),
                    _ => (&mut [], &mut []),
                };
                rms_prop(lr, [alpha, eps, momentum], weight_decay, w, g, square, average, buffer, out);
            }
        }
    }

    /// Adam (Kingma and Ba, 2015, algorithm 1) and AdamW (Loshchilov and Hutter, 2019, algorithm 2) in PyTorch's order of
    /// operations; `shrink` is AdamW's factor on the weights.
    #[inline(always)]
    fn adam(
        &self,
        [beta1, beta2, eps]: [f32; 3],
        weight_decay: f32,
        shrink: f32,
        w: &[f32],
        g: &[f32],
        first: &mut [f32],
        second: &mut [f32],
        out: &mut [f32],
    ) {
        let n = out.len();
        let (first, second) = (&mut first[..n], &mut second[..n]);
        for i in 0..n {
            let grad = g[i] + weight_decay * w[i];
            first[i] += (1.0 - beta1) * (grad - first[i]);
            second[i] = beta2 * second[i] + (1.0 - beta2) * grad * grad;
            out[i] = w[i] * shrink - self.rate * (first[i] / (second[i].sqrt() / self.root + eps));
        }
    }
}

/// RMSprop (Hinton's lecture 6e, 2012) in PyTorch's order of operations; `average` is empty where it is not centered, and
/// `buffer` without momentum.
#[inline(always)]
fn rms_prop(
    lr: f32,
    [alpha, eps, momentum]: [f32; 3],
    weight_decay: f32,
    w: &[f32],
    g: &[f32],
    square: &mut [f32],
    average: &mut [f32],
    buffer: &mut [f32],
    out: &mut [f32],
) {
    let n = out.len();
    let square = &mut square[..n];
    let grad = |i: usize| g[i] + weight_decay * w[i];
    for i in 0..n {
        square[i] = alpha * square[i] + (1.0 - alpha) * grad(i) * grad(i);
        out[i] = square[i];
    }
    for (i, (average, spread)) in average.iter_mut().zip(out.iter_mut()).enumerate() {
        *average += (1.0 - alpha) * (grad(i) - *average);
        *spread -= *average * *average;
    }
    for i in 0..n {
        out[i] = grad(i) / (out[i].sqrt() + eps);
    }
    for (buffer, direction) in buffer.iter_mut().zip(out.iter_mut()) {
        *buffer = momentum * *buffer + *direction;
        *direction = *buffer;
    }
    for i in 0..n {
        out[i] = w[i] - lr * out[i];
    }
}

/// Sum of squares, in 16 fixed lanes: the same bits at any vector width.
pub fn sum_squares(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 16];
    let (blocks, tail) = values.as_chunks::<16>();
    vectorized(
        #[inline(always)]
        || {
            for block in blocks {
                let squares = block.map(|v| v as f64 * v as f64);
                lanes.iter_mut().zip(squares).for_each(|(lane, square)| *lane += square);
            }
        },
    );
    for (lane, &v) in lanes.iter_mut().zip(tail) {
        *lane += v as f64 * v as f64;
    }
    lanes.iter().sum()
}

/// The factor of PyTorch's `clip_grad_norm_`: `max / (norm + 1e-6)`, at most 1.
pub fn clip_factor(norm: f32, max: f32) -> f32 {
    (max / (norm + 1e-6)).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each kind.
    fn all() -> Vec<job::Optimizer> {
        vec![
            job::Optimizer::Sgd { lr: 0.1, momentum: 0.0, dampening: 0.0, nesterov: false, weight_decay: 0.0 },
            job::Optimizer::Sgd { lr: 0.05, momentum: 0.9, dampening: 0.0, nesterov: true, weight_decay: 0.0 },
            job::Optimizer::Adam { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 },
            job::Optimizer::AdamW { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 },
            job::Optimizer::Adagrad { lr: 1.0, lr_decay: 0.0, eps: 1e-10, weight_decay: 0.0, initial_accumulator: 0.0 },
            job::Optimizer::Lion { lr: 0.01, beta1: 0.9, beta2: 0.99, weight_decay: 0.0 },
            job::Optimizer::RmsProp {
                lr: 0.02,
                alpha: 0.99,
                eps: 1e-8,
                momentum: 0.5,
                centered: true,
                weight_decay: 0.0,
            },
        ]
    }

    /// Minimises (w - 3)^2 with every optimizer.
    #[test]
    fn every_optimizer_finds_a_minimum_and_does_not_mind_the_cut() {
        for kind in all() {
            let optimizer = Optimizer::new(&kind, None);
            let run = |n: usize| {
                let mut w: Vec<f32> = (0..n).map(|i| i as f32 * 0.1).collect();
                let mut slots = optimizer.first_slots(&w);
                for step in 1..=800 {
                    let g: Vec<f32> = w.iter().map(|w| 2.0 * (w - 3.0)).collect();
                    let mut out = vec![0.0; n];
                    let mut state: Vec<&mut [f32]> = slots.iter_mut().map(|s| s.as_mut_slice()).collect();
                    assert!(optimizer.at(step, 1.0).run(&w, Sums::mean(&g), &mut state, &mut out));
                    w = out;
                }
                w
            };
            let whole = run(37);
            assert!(whole.iter().all(|w| (w - 3.0).abs() < 0.1), "{kind:?}: {whole:?}");
            for n in 0..37 {
                assert_eq!(run(n), whole[..n], "{kind:?}");
            }
        }
    }

    /// Whatever comes: two halves are their sum, factor and limit do what they say, and what is not finite is noticed.
    #[test]
    fn every_optimizer_takes_halves_and_notices_what_is_not_finite() {
        for (kind, limit) in all().into_iter().flat_map(|kind| [(kind.clone(), None), (kind, Some(0.75))]) {
            let optimizer = Optimizer::new(&kind, None);
            let slots = || optimizer.first_slots(&[0.0; 150]);
            let run = |step, w: &[f32], sums: Sums<'_>, slots: &mut [Vec<f32>]| {
                let mut out = vec![0.0; w.len()];
                let mut state: Vec<&mut [f32]> = slots.iter_mut().map(|s| s.as_mut_slice()).collect();
                let finite = optimizer.at(step, 1.0).run(w, sums, &mut state, &mut out);
                (out, finite)
            };
            let weights: Vec<f32> = (0..150).map(|i| i as f32 * 0.01 - 0.5).collect();
            let (left, right): (Vec<f32>, Vec<f32>) = (0..150).map(|i| (0.1 * i as f32, 3.0 - i as f32)).unzip();
            let mean = |g: f32| limit.map_or(g * 0.5, |limit: f32| (g * 0.5).clamp(-limit, limit));
            let means: Vec<f32> = left.iter().zip(&right).map(|(a, b)| mean(a + b)).collect();
            // As they come over the wire: anywhere in memory.
            let bytes = [&[7], le_bytes(&right)].concat();
            let sums = Sums { first: le_bytes(&left), second: Some(&bytes[1..]), factor: 0.5, limit };
            let (mut of_halves, mut of_means) = (slots(), slots());
            for step in 1..3 {
                let got = run(step, &weights, sums, &mut of_halves);
                assert!(got.1 && got == run(step, &weights, Sums::mean(&means), &mut of_means), "{kind:?}, {limit:?}");
                assert_eq!(of_halves, of_means);
            }
            for (bad, at) in [(f32::NAN, 0), (f32::INFINITY, 63), (f32::NEG_INFINITY, 64), (f32::INFINITY, 149)] {
                let mut left = left.clone();
                left[at] = bad;
                let sums = Sums { first: le_bytes(&left), second: Some(&bytes[1..]), factor: 0.5, limit };
                for step in [1, 3] {
                    assert!(!run(step, &weights, sums, &mut of_halves.clone()).1, "{kind:?}, {limit:?}: {bad} at {at}");
                }
            }
        }
    }

    /// Two steps of AdamW worked out by hand from the paper's algorithm 2 in f64.
    #[test]
    fn adamw_is_the_papers() {
        let kind = job::Optimizer::AdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
        let optimizer = Optimizer::new(&kind, None);
        let (mut w, mut m, mut v) = (vec![0.5f32], vec![0.0f32], vec![0.0f32]);
        let (mut rw, mut rm, mut rv) = (0.5f64, 0.0f64, 0.0f64);
        for (step, g) in [(1u64, 0.3f32), (2, -0.7)] {
            let mut out = vec![0.0];
            assert!(optimizer.at(step, 1.0).run(&w, Sums::mean(&[g]), &mut [&mut m, &mut v], &mut out));
            w = out;
            let g = g as f64;
            rm = 0.9 * rm + 0.1 * g;
            rv = 0.99 * rv + 0.01 * g * g;
            let (mh, vh) = (rm / (1.0 - 0.9f64.powi(step as i32)), rv / (1.0 - 0.99f64.powi(step as i32)));
            rw = rw - 0.01 * 0.1 * rw - 0.01 * mh / (vh.sqrt() + 1e-8);
            assert!((w[0] as f64 - rw).abs() < 1e-6, "{} {rw}", w[0]);
        }
    }
}
