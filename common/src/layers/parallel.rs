//! Chains of layers beside each other, which all take the same.

use super::{Grads, Layer, Params, Pass, Sequential, over_rows};
use crate::job::Join;
use crate::kernels;
use crate::layout::{Role, Tensor};
use crate::rows::Table;

/// `y` = what the branches give for the same `x`, one after another or added up; tensors are named `branch.index.name`.
pub struct Parallel {
    branches: Vec<Sequential>,
    join: Join,
    /// Values of a sample that enters, and of what each branch gives.
    in_len: usize,
    lens: Vec<usize>,
    out_shape: Vec<usize>,
    /// Trainable and running values of each branch.
    sizes: Vec<(usize, usize)>,
}

impl Parallel {
    /// Joins `branches`, each of which takes samples of `in_len` values; to be added up, all must give the same shape.
    pub fn new(in_len: usize, branches: Vec<Sequential>, join: Join) -> Parallel {
        let lens: Vec<usize> = branches.iter().map(|b| b.out_shape().iter().product()).collect();
        let out_shape = match join {
            Join::Concat => vec![lens.iter().sum()],
            Join::Sum => branches[0].out_shape().to_vec(),
        };
        let size = |branch: &Sequential, trainable: bool| {
            branch.tensors().iter().filter(|t| (t.role == Role::Trainable) == trainable).map(Tensor::len).sum()
        };
        let sizes = branches.iter().map(|b| (size(b, true), size(b, false))).collect();
        Parallel { branches, join, in_len, lens, out_shape, sizes }
    }

    /// Values of a sample that all branches give.
    fn total(&self) -> usize {
        self.lens.iter().sum()
    }

    /// Puts a part of each sample of `y`, or adds to all of it, where it is not the first.
    fn join(&self, branch: usize, rows: usize, out: &[f32], y: &mut [f32]) {
        let (len, before) = (self.lens[branch], self.lens[..branch].iter().sum::<usize>());
        match self.join {
            Join::Concat => {
                let of = self.total();
                over_rows(rows, (y, of), (out, len), |_, y, out| {
                    for (y, out) in y.chunks_exact_mut(of).zip(out.chunks_exact(len)) {
                        y[before..before + len].copy_from_slice(out);
                    }
                });
            }
            Join::Sum => over_rows(rows, (y, len), (out, len), |_, y, out| match branch {
                0 => y.copy_from_slice(out),
                _ => kernels::add_into(y, out),
            }),
        }
    }
}

impl Layer for Parallel {
    fn out_shape(&self) -> &[usize] {
        &self.out_shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        let named = |(i, branch): (usize, &Sequential)| {
            branch.tensors().into_iter().map(move |t| Tensor { name: format!("{i}.{}", t.name), ..t })
        };
        self.branches.iter().enumerate().flat_map(named).collect()
    }

    fn tables(&self) -> Vec<Table> {
        let named = |(i, branch): (usize, &Sequential)| {
            branch.tables().into_iter().map(move |t| Table { name: format!("{i}.{}", t.name), ..t })
        };
        self.branches.iter().enumerate().flat_map(named).collect()
    }

    /// What each branch gives, then what each keeps.
    fn saved(&self, rows: usize, segments: usize) -> usize {
        rows * self.total() + self.branches.iter().map(|b| b.saved(rows, segments)).sum::<usize>()
    }

    /// The gradients of one branch's outputs and inputs, and what it needs.
    fn scratch(&self, rows: usize, segments: usize) -> usize {
        let widest = self.lens.iter().max().copied().unwrap_or(0);
        let inner = self.branches.iter().map(|b| b.scratch(rows, segments)).max().unwrap_or(0);
        rows * (widest + self.in_len) + inner
    }

    fn multiply_adds(&self) -> u64 {
        self.branches.iter().map(|b| b.multiply_adds()).sum()
    }

    fn input_multiply_adds(&self) -> u64 {
        self.branches.iter().map(|b| b.input_multiply_adds()).sum()
    }

    fn forward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        y: &mut [f32],
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (rows, segments) = (pass.segments.total(), pass.segments.len());
        let (mut outs, mut kept) = saved.split_at_mut(rows * self.total());
        let (mut trainable, mut running) = (0, 0);
        for (i, (branch, &(t, r))) in self.branches.iter().zip(&self.sizes).enumerate() {
            let mine = params.part(trainable..trainable + t, running..running + r);
            (trainable, running) = (trainable + t, running + r);
            let (out, rest) = outs.split_at_mut(rows * self.lens[i]);
            outs = rest;
            let (saved, rest) = kept.split_at_mut(branch.saved(rows, segments));
            kept = rest;
            let pass = Pass { key: pass.key.with(i as u64), ..*pass };
            branch.forward(&pass, mine, x, out, saved, &mut scratch[..branch.scratch(rows, segments)]);
            self.join(i, rows, out, y);
        }
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        _: &[f32],
        dy: &[f32],
        mut dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (rows, segments) = (pass.segments.total(), pass.segments.len());
        let (mut outs, mut kept) = saved.split_at_mut(rows * self.total());
        let widest = self.lens.iter().max().copied().unwrap_or(0);
        let (d_out, scratch) = scratch.split_at_mut(rows * widest);
        let (d_in, scratch) = scratch.split_at_mut(rows * self.in_len);
        let Grads { trainable: mut d_trainable, running: mut d_running, rows: d_rows } = grads;
        let all: usize = self.total();
        let (mut before, mut first) = (all, true);
        // From the last branch to the first, as gradients are announced.
        for (i, branch) in self.branches.iter().enumerate().rev() {
            let (t, r) = self.sizes[i];
            let (rest, grad_t) = d_trainable.split_at_mut(d_trainable.len() - t);
            d_trainable = rest;
            let (rest, grad_r) = d_running.split_at_mut(d_running.len() - r);
            d_running = rest;
            let mine = params.part(d_trainable.len()..d_trainable.len() + t, d_running.len()..d_running.len() + r);
            let (rest, saved) = kept.split_at_mut(kept.len() - branch.saved(rows, segments));
            kept = rest;
            let len = self.lens[i];
            let (rest, out) = outs.split_at_mut(outs.len() - rows * len);
            outs = rest;
            before -= len;
            let d_out = &mut d_out[..rows * len];
            let dy = match self.join {
                Join::Concat => {
                    over_rows(rows, (d_out, len), (dy, all), |_, d_out, dy| {
                        for (d_out, dy) in d_out.chunks_exact_mut(len).zip(dy.chunks_exact(all)) {
                            d_out.copy_from_slice(&dy[before..before + len]);
                        }
                    });
                    &*d_out
                }
                Join::Sum => dy,
            };
            let pass = Pass { key: pass.key.with(i as u64), first: pass.first + d_trainable.len(), ..*pass };
            let into = Grads { trainable: grad_t, running: grad_r, rows: &mut *d_rows };
            let scratch = &mut scratch[..branch.scratch(rows, segments)];
            match &mut dx {
                Some(dx) if first => branch.backward(&pass, mine, x, out, dy, Some(dx), into, saved, scratch),
                Some(dx) => {
                    branch.backward(&pass, mine, x, out, dy, Some(&mut *d_in), into, saved, scratch);
                    let len = self.in_len;
                    over_rows(rows, (dx, len), (&*d_in, len), |_, dx, d_in| kernels::add_into(dx, d_in));
                }
                None => branch.backward(&pass, mine, x, out, dy, None, into, saved, scratch),
            }
            first = false;
        }
    }
}
