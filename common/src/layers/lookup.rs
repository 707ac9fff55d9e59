//! Rows of a sparse table, chosen by the ids of a sample.

use super::{Grads, Layer, Params, Pass, over_rows};
use crate::kernels::{self, vectorized};
use crate::layout::Init;
use crate::rows::lookup::NOWHERE;
use crate::rows::{Table, sums};
use rayon::prelude::*;

/// The table's values for each id of a sample, times the id's factor where ids have some, `[ids, width]`; for an id that is none,
/// zeros. What the layer takes is not looked at:
/// ids are beside the sample's numbers. Its values and their gradients are in [`Params::rows`] and [`Grads::rows`].
pub struct Lookup {
    /// `[ids, width]`.
    pub shape: [usize; 2],
    /// Where the table's values begin in a row.
    pub at: usize,
    pub init: Init,
}

/// Rows whose gradients a thread sums up at once.
const ROWS: usize = 64;

impl Lookup {
    fn spare(&self, segments: usize) -> usize {
        sums::spare(segments, self.shape[1])
    }
}

impl Layer for Lookup {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    fn tables(&self) -> Vec<Table> {
        vec![Table { name: "weight".into(), width: self.shape[1], init: self.init }]
    }

    /// What each thread needs to sum a row's gradients in the tree.
    fn scratch(&self, _: usize, segments: usize) -> usize {
        kernels::lanes() * self.spare(segments)
    }

    fn forward(&self, _: &Pass<'_>, params: Params<'_>, _: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let ([_, width], rows) = (self.shape, params.rows);
        let places = rows.lookups.places();
        // A place is 4 bytes, as a value is: they are split alike.
        let each = places.len().div_ceil(kernels::lanes()).max(1);
        y.par_chunks_mut(each * width).zip(places.par_chunks(each)).for_each(|(y, places)| {
            vectorized(
                #[inline(always)]
                || {
                    for (y, &place) in y.chunks_exact_mut(width).zip(places) {
                        match place {
                            NOWHERE => y.fill(0.0),
                            place => kernels::copy(y, &rows.values[place as usize * rows.width + self.at..][..width]),
                        }
                    }
                },
            );
        });
        // The kernel above is that of ids without factors, which most are.
        y.par_chunks_mut(each * width).zip(rows.factors.par_chunks(each)).for_each(|(y, factors)| {
            for (y, factor) in y.chunks_exact_mut(width).zip(factors) {
                y.iter_mut().for_each(|y| *y *= factor);
            }
        });
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        _: &[f32],
        _: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        _: &mut [f32],
        scratch: &mut [f32],
    ) {
        let ([ids, width], rows, segments) = (self.shape, params.rows, pass.segments);
        let spare = self.spare(segments.len()).max(1);
        let end = |segment: usize| (segments.starts[segment + 1] * ids) as u32;
        let gradient = |id: u32| &dy[id as usize * width..][..width];
        let each = rows.lookups.keys().len().div_ceil(kernels::lanes()).max(ROWS);
        let work = |(i, (out, spare)): (usize, (&mut [f32], &mut [f32]))| {
            for (j, row) in out.chunks_exact_mut(rows.width).enumerate() {
                let at = rows.lookups.of_row(i * each + j);
                let sum = &mut row[self.at..self.at + width];
                let parts = (0, segments.len());
                match rows.factors {
                    [] => sums::tree_sum(parts, at, &end, &gradient, &|_| 1.0, sum, spare),
                    factors => sums::tree_sum(parts, at, &end, &gradient, &|id| factors[id as usize], sum, spare),
                }
            }
        };
        let out = grads.rows.par_chunks_mut(each * rows.width);
        if scratch.is_empty() {
            out.enumerate().for_each(|(i, out)| work((i, (out, &mut []))));
        } else {
            out.zip(scratch.par_chunks_mut(spare)).enumerate().for_each(work);
        }
        pass.finish_rows();
        // Ids have no slope.
        if let Some(dx) = dx {
            dx.fill(0.0);
        }
    }
}

/// A part of a row of values.
pub struct Slice {
    pub from: usize,
    pub len: [usize; 1],
    /// Values of a sample that goes in.
    pub of: usize,
}

impl Layer for Slice {
    fn out_shape(&self) -> &[usize] {
        &self.len
    }

    fn forward(&self, pass: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let ([len], of) = (self.len, self.of);
        over_rows(pass.segments.total(), (y, len), (x, of), |_, y, x| {
            for (y, x) in y.chunks_exact_mut(len).zip(x.chunks_exact(of)) {
                y.copy_from_slice(&x[self.from..][..len]);
            }
        });
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        _: Params<'_>,
        _: &[f32],
        _: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        _: Grads<'_>,
        _: &mut [f32],
        _: &mut [f32],
    ) {
        let ([len], of) = (self.len, self.of);
        let Some(dx) = dx else { return };
        over_rows(pass.segments.total(), (dx, of), (dy, len), |_, dx, dy| {
            dx.fill(0.0);
            for (dx, dy) in dx.chunks_exact_mut(of).zip(dy.chunks_exact(len)) {
                dx[self.from..][..len].copy_from_slice(dy);
            }
        });
    }
}
