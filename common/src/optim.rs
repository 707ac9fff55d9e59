//! Optimizers as pure, element-wise functions over chunks, with exactly PyTorch's definitions; and gradient clipping.
//!
//! An update reads weights and gradient, changes the state in place and writes the new weights beside the old ones. No
//! element looks at another, so chunks may be updated in any order, on any thread.

use crate::job;
use crate::kernels::vectorized;

/// An optimizer, built from its part of the job.
#[derive(Clone, Debug)]
pub struct Optimizer(job::Optimizer);

impl Optimizer {
    /// The optimizer that `job` describes.
    pub fn new(job: &job::Optimizer) -> Optimizer {
        Optimizer(job.clone())
    }

    /// The base learning rate.
    pub fn lr(job: &job::Optimizer) -> f32 {
        match *job {
            job::Optimizer::Sgd { lr, .. }
            | job::Optimizer::Adam { lr, .. }
            | job::Optimizer::AdamW { lr, .. }
            | job::Optimizer::Adagrad { lr, .. }
            | job::Optimizer::RmsProp { lr, .. } => lr,
        }
    }

    /// Names of the state vectors, each as long as the trainable parameters.
    pub fn slot_names(&self) -> Vec<&'static str> {
        match self.0 {
            job::Optimizer::Sgd { momentum: 0.0, .. } => vec![],
            job::Optimizer::Sgd { .. } => vec!["momentum_buffer"],
            job::Optimizer::Adam { .. } | job::Optimizer::AdamW { .. } => vec!["exp_avg", "exp_avg_sq"],
            job::Optimizer::Adagrad { .. } => vec!["sum"],
            job::Optimizer::RmsProp { centered, momentum, .. } => {
                let mut names = vec!["square_avg"];
                names.extend(centered.then_some("grad_avg"));
                names.extend((momentum > 0.0).then_some("momentum_buffer"));
                names
            }
        }
    }

    /// Number of state vectors.
    pub fn slots(&self) -> usize {
        self.slot_names().len()
    }

    /// First value of a state vector.
    pub fn init_slot(&self, _slot: usize) -> f32 {
        match self.0 {
            job::Optimizer::Adagrad { initial_accumulator, .. } => initial_accumulator,
            _ => 0.0,
        }
    }

    /// One step on one chunk: `out` gets the new weights. `step` counts from 1; `grads` is the mean gradient.
    pub fn update(
        &self,
        step: u64,
        lr: f32,
        weights: &[f32],
        grads: &[f32],
        state: &mut [&mut [f32]],
        out: &mut [f32],
    ) {
        vectorized(
            #[inline(always)]
            || self.loops(step, lr, weights, grads, state, out),
        );
    }

    #[inline(always)]
    fn loops(&self, step: u64, lr: f32, w: &[f32], g: &[f32], state: &mut [&mut [f32]], out: &mut [f32]) {
        let n = out.len();
        let (w, g) = (&w[..n], &g[..n]);
        match self.0 {
            job::Optimizer::Sgd { momentum, dampening, nesterov, weight_decay, .. } => match state {
                [buffer] => {
                    // The first step's buffer is the gradient itself (dampening starts with the second).
                    let keep = if step == 1 { 0.0 } else { momentum };
                    let take = if step == 1 { 1.0 } else { 1.0 - dampening };
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
                adam(step, lr, [beta1, beta2, eps], weight_decay, 1.0, w, g, first, second, out);
            }
            job::Optimizer::AdamW { beta1, beta2, eps, weight_decay, .. } => {
                let [first, second] = state else { return };
                adam(step, lr, [beta1, beta2, eps], 0.0, 1.0 - lr * weight_decay, w, g, first, second, out);
            }
            job::Optimizer::Adagrad { lr_decay, eps, weight_decay, .. } => {
                let rate = lr / (1.0 + (step - 1) as f32 * lr_decay);
                let [sum] = state else { return };
                let sum = &mut sum[..n];
                for i in 0..n {
                    let grad = g[i] + weight_decay * w[i];
                    sum[i] += grad * grad;
                    out[i] = w[i] - rate * grad / (sum[i].sqrt() + eps);
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

/// Adam (Kingma and Ba, 2015, algorithm 1) and AdamW (Loshchilov and Hutter, 2019, algorithm 2) in PyTorch's order of
/// operations; `shrink` is AdamW's factor on the weights.
#[inline(always)]
fn adam(
    step: u64,
    lr: f32,
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
    let correction = |beta: f32| 1.0 - libm::pow(beta as f64, step as f64);
    let size = (lr as f64 / correction(beta1)) as f32;
    let root = libm::sqrt(correction(beta2)) as f32;
    for i in 0..n {
        let grad = g[i] + weight_decay * w[i];
        first[i] += (1.0 - beta1) * (grad - first[i]);
        second[i] = beta2 * second[i] + (1.0 - beta2) * grad * grad;
        out[i] = w[i] * shrink - size * (first[i] / (second[i].sqrt() / root + eps));
    }
}

/// Clamps every value to `-limit..=limit`.
pub fn clip_value(grads: &mut [f32], limit: f32) {
    vectorized(
        #[inline(always)]
        || grads.iter_mut().for_each(|g| *g = g.clamp(-limit, limit)),
    );
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

    /// Minimises (w - 3)^2 with every optimizer.
    #[test]
    fn every_optimizer_finds_a_minimum_and_does_not_mind_the_cut() {
        let all = [
            job::Optimizer::Sgd { lr: 0.1, momentum: 0.0, dampening: 0.0, nesterov: false, weight_decay: 0.0 },
            job::Optimizer::Sgd { lr: 0.05, momentum: 0.9, dampening: 0.0, nesterov: true, weight_decay: 0.0 },
            job::Optimizer::Adam { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 },
            job::Optimizer::AdamW { lr: 0.1, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 },
            job::Optimizer::Adagrad { lr: 1.0, lr_decay: 0.0, eps: 1e-10, weight_decay: 0.0, initial_accumulator: 0.0 },
            job::Optimizer::RmsProp {
                lr: 0.02,
                alpha: 0.99,
                eps: 1e-8,
                momentum: 0.5,
                centered: true,
                weight_decay: 0.0,
            },
        ];
        for kind in all {
            let optimizer = Optimizer::new(&kind);
            let lr = Optimizer::lr(&kind);
            let run = |n: usize| {
                let mut w: Vec<f32> = (0..n).map(|i| i as f32 * 0.1).collect();
                let mut slots: Vec<Vec<f32>> =
                    (0..optimizer.slots()).map(|s| vec![optimizer.init_slot(s); n]).collect();
                for step in 1..=800 {
                    let g: Vec<f32> = w.iter().map(|w| 2.0 * (w - 3.0)).collect();
                    let mut out = vec![0.0; n];
                    let mut state: Vec<&mut [f32]> = slots.iter_mut().map(|s| s.as_mut_slice()).collect();
                    optimizer.update(step, lr, &w, &g, &mut state, &mut out);
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

    /// Two steps of AdamW worked out by hand from the paper's algorithm 2 in f64.
    #[test]
    fn adamw_is_the_papers() {
        let kind = job::Optimizer::AdamW { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };
        let optimizer = Optimizer::new(&kind);
        let (mut w, mut m, mut v) = (vec![0.5f32], vec![0.0f32], vec![0.0f32]);
        let (mut rw, mut rm, mut rv) = (0.5f64, 0.0f64, 0.0f64);
        for (step, g) in [(1u64, 0.3f32), (2, -0.7)] {
            let mut out = vec![0.0];
            optimizer.update(step, 0.01, &w, &[g], &mut [&mut m, &mut v], &mut out);
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
