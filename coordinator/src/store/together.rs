//! Updates that wait for all gradients of a step: those that are clipped by the global norm, and those by layers.

use super::{Chunk, Store, states};
use crate::lock;
use crate::sum::Gradient;
use rayon::prelude::*;
use std::sync::Mutex;
use unisono_common::optim::{self, Lengths, Sums};
use unisono_common::{groups, kernels};

impl Store {
    /// Whether a mean has to wait until all gradients are there.
    pub(super) fn waits(&self) -> bool {
        self.clip.norm.is_some() || self.groups.optimizer().is_layerwise()
    }

    /// All is reduced: the factor that clips it, then every update; gives what the mean of the rows' sums, `mean` times them, is
    /// still to be multiplied by.
    pub(super) fn apply_together(&self, mean: f32) -> f32 {
        let factor = self.clip.norm.map_or(1.0, |limit| optim::clip_factor(self.norm(mean), limit));
        let ratios = self.groups.optimizer().is_layerwise().then(|| self.directions(factor));
        let apply = |(i, chunk): (usize, &Mutex<Chunk>)| {
            let mut chunk = lock(chunk);
            if let Some((mean, sums)) = chunk.reduced.take() {
                let mean = Gradient::Sum(mean);
                self.update(&mut chunk, i, &mean, factor, sums, ratios.as_deref());
                self.spare.free(mean);
            }
            drop(chunk);
            self.weights_changed();
        };
        self.pool.install(|| self.chunks.par_iter().enumerate().for_each(apply));
        factor
    }

    /// The global norm of the mean gradient, in the order of the chunks; that of rows is `mean` times their sums.
    fn norm(&self, mean: f32) -> f32 {
        let square = |i: usize| {
            let chunk = lock(&self.chunks[i]);
            let mean = chunk.reduced.as_ref().map(|(mean, _)| &mean[..self.layout.trainable_of(i).len()]);
            kernels::vectorized(|| optim::sum_squares(mean.unwrap_or_default()))
        };
        let squares: Vec<f64> = self.pool.install(|| (0..self.chunks.len()).into_par_iter().map(square).collect());
        let of_rows = self.tables.as_ref().map_or(0.0, |tables| tables.sum_squares(mean));
        (squares.iter().sum::<f64>() + of_rows).sqrt() as f32
    }

    /// The directions of all weights, where the new ones will be, from the means times `factor`; gives the ratio of each run of
    /// the groups, whose lengths are added up in the order of the chunks.
    fn directions(&self, factor: f32) -> Vec<f32> {
        let rates = *lock(&self.factor);
        let lengths = |(i, chunk): (usize, &Mutex<Chunk>)| {
            let mut chunk = lock(chunk);
            chunk.flush(i);
            let (start, step) = (self.layout.chunk(i).start, chunk.step);
            let Chunk { piece, slots, reduced: Some((mean, _)), .. } = &mut *chunk else { return Vec::new() };
            let (old, new) = piece.update(step.0);
            let parts = self.groups.parts(self.layout.trainable_of(i));
            let of_part = |part: groups::Part<'_>| {
                let at = part.range.start - start..part.range.end - start;
                let sums = Sums { factor, limit: self.clip.value, ..Sums::mean(&mean[at.clone()]) };
                let update = part.optimizer.at(step.0 + 1, rates);
                let (old, new, vectors) = (&old[at.clone()], &mut new[at.clone()], slots.len());
                if !update.run(old, sums, &mut states(slots, at)[..vectors], new) {
                    self.check_at(part.range.start, new);
                }
                (part.run, Lengths::of(old, new))
            };
            parts.map(of_part).collect::<Vec<_>>()
        };
        let all: Vec<_> = self.pool.install(|| self.chunks.par_iter().enumerate().map(lengths).collect());
        let mut runs = vec![Lengths::default(); self.groups.runs()];
        all.into_iter().flatten().for_each(|(run, lengths)| runs[run] += lengths);
        runs.into_iter().map(Lengths::ratio).collect()
    }
}
