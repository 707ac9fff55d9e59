//! Scaled dot-product attention of several heads.

use super::{Grads, Layer, Params, Pass, rows_each};
use crate::kernels::{self, Finish, Mat, Start, gemm, largest, math, product, vectorized};
use rayon::prelude::*;

/// Queries, and keys, that are worked on together: their products stay in the first-level cache.
const BLOCK: usize = 64;

/// `softmax(q k^T / sqrt(d)) v` for each head (Vaswani et al., 2017, eq. 1), of samples `[positions, 3 width]` whose rows
/// are a position's query, key and value, each of all heads one after another; the result is `[positions, width]`.
///
/// The products of queries and keys exist block by block only, beside a running softmax, and are computed anew on the way
/// back (Dao et al., "FlashAttention", 2022, algorithms 1 and 4): memory is linear in the positions.
pub struct Attention {
    /// `[positions, width]`.
    pub shape: [usize; 2],
    pub heads: usize,
    /// Whether a position sees only itself and those before it.
    pub causal: bool,
    /// Turns queries and keys by their position.
    pub rotary: Option<Rotary>,
}

/// Rotary position embedding (Su et al., "RoFormer", 2021, eq. 34), with the halves of a head as its pairs, as GPT-NeoX and
/// Llama have it: value `i` and value `i + d/2` turn by `position * base^(-2i/d)`.
pub struct Rotary {
    /// `(positions, d/2)`: cosine and sine.
    turns: Vec<[f32; 2]>,
    half: usize,
}

impl Rotary {
    /// For heads of `width` values, an even number.
    pub fn new(positions: usize, width: usize, base: f64) -> Rotary {
        let half = width / 2;
        let turn = |at: usize| {
            let angle = (at / half) as f64 * libm::pow(base, -((at % half) as f64) / half as f64);
            [libm::cos(angle) as f32, libm::sin(angle) as f32]
        };
        Rotary { turns: (0..positions * half).map(turn).collect(), half }
    }

    /// `(positions, d/2)`: cosine and sine of the angle by which each pair turns.
    pub fn turns(&self) -> &[[f32; 2]] {
        &self.turns
    }

    /// Turns rows of a head, the first of them at position 0; back, where `sign` is -1.
    fn turn(&self, rows: &mut [f32], sign: f32) {
        for (row, turns) in rows.chunks_exact_mut(2 * self.half).zip(self.turns.chunks_exact(self.half)) {
            let (a, b) = row.split_at_mut(self.half);
            for ((a, b), [cos, sin]) in a.iter_mut().zip(b).zip(turns) {
                (*a, *b) = (*a * cos - *b * sin * sign, *b * cos + *a * sin * sign);
            }
        }
    }
}

/// One head of one sample: rows of `d` values one after another.
struct Head<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    y: &'a mut [f32],
    /// Of each position: what the softmax of its products is divided by, as a logarithm.
    log_sums: &'a mut [f32],
    /// Products of a block of queries and one of keys.
    block: &'a mut [f32],
    rest: &'a mut [f32],
}

/// Gradients of a [`Head`], and what they need.
struct HeadBack<'a> {
    dq: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    dy: &'a mut [f32],
    /// Of each position: the product of its output and that output's gradient.
    dots: &'a mut [f32],
    block: &'a mut [f32],
}

/// Rows of a matrix whose rows have `d` values.
fn rows(all: &[f32], d: usize, range: std::ops::Range<usize>) -> Mat<'_> {
    Mat::new(&all[range.start * d..range.end * d], range.len(), d)
}

impl Attention {
    fn positions(&self) -> usize {
        self.shape[0]
    }

    /// Values of a head.
    fn d(&self) -> usize {
        self.shape[1] / self.heads
    }

    fn scale(&self) -> f32 {
        1.0 / libm::sqrtf(self.d() as f32)
    }

    /// Floats of a [`Head`] and of a [`HeadBack`].
    fn head(&self) -> usize {
        self.positions() * (8 * self.d() + 2) + 2 * BLOCK * BLOCK
    }

    fn split<'a>(&self, scratch: &'a mut [f32]) -> Head<'a> {
        let len = self.positions() * self.d();
        let (q, rest) = scratch.split_at_mut(len);
        let (k, rest) = rest.split_at_mut(len);
        let (v, rest) = rest.split_at_mut(len);
        let (y, rest) = rest.split_at_mut(len);
        let (log_sums, rest) = rest.split_at_mut(self.positions());
        let (block, rest) = rest.split_at_mut(BLOCK * BLOCK);
        Head { q, k, v, y, log_sums, block, rest }
    }

    fn split_back<'a>(&self, scratch: &'a mut [f32]) -> HeadBack<'a> {
        let len = self.positions() * self.d();
        let (dq, rest) = scratch.split_at_mut(len);
        let (dk, rest) = rest.split_at_mut(len);
        let (dv, rest) = rest.split_at_mut(len);
        let (dy, rest) = rest.split_at_mut(len);
        let (dots, block) = rest.split_at_mut(self.positions());
        HeadBack { dq, dk, dv, dy, dots, block }
    }

    /// A head's queries (already divided by `sqrt(d)`), keys and values, out of a sample.
    fn load(&self, x: &[f32], head: usize, q: &mut [f32], k: &mut [f32], v: &mut [f32]) {
        let (d, width, scale) = (self.d(), self.shape[1], self.scale());
        vectorized(
            #[inline(always)]
            || {
                let rows = q.chunks_exact_mut(d).zip(k.chunks_exact_mut(d)).zip(v.chunks_exact_mut(d));
                for (((q, k), v), x) in rows.zip(x.chunks_exact(3 * width)) {
                    let part = |i: usize| &x[i * width + head * d..][..d];
                    q.iter_mut().zip(part(0)).for_each(|(q, x)| *q = x * scale);
                    k.copy_from_slice(part(1));
                    v.copy_from_slice(part(2));
                }
            },
        );
        if let Some(rotary) = &self.rotary {
            rotary.turn(q, 1.0);
            rotary.turn(k, 1.0);
        }
    }

    /// The blocks of positions.
    fn blocks(&self) -> impl Iterator<Item = std::ops::Range<usize>> + Clone + use<> {
        let positions = self.positions();
        (0..positions).step_by(BLOCK).map(move |from| from..(from + BLOCK).min(positions))
    }

    /// The products of some queries and some keys, `(queries, keys)`; minus infinity, where a query does not see a key.
    fn products(&self, out: &mut [f32], q: Mat<'_>, k: Mat<'_>, diagonal: bool, keys: usize) {
        product(out, q, k.t(), Start::Zero, Finish::Keep);
        if diagonal {
            for (i, row) in out.chunks_exact_mut(keys).enumerate() {
                row[i + 1..].fill(f32::NEG_INFINITY);
            }
        }
    }

    fn forward_head(&self, head: &mut Head<'_>) {
        let d = self.d();
        for queries in self.blocks() {
            let y = &mut head.y[queries.start * d..queries.end * d];
            let sums = &mut head.log_sums[queries.clone()];
            let mut tops = [f32::NEG_INFINITY; BLOCK];
            y.fill(0.0);
            sums.fill(0.0);
            for keys in self.blocks().take_while(|keys| !self.causal || keys.start <= queries.start) {
                let p = &mut head.block[..queries.len() * keys.len()];
                let diagonal = self.causal && keys == queries;
                self.products(p, rows(head.q, d, queries.clone()), rows(head.k, d, keys.clone()), diagonal, keys.len());
                vectorized(
                    #[inline(always)]
                    || {
                        let rows = p.chunks_exact_mut(keys.len()).zip(y.chunks_exact_mut(d));
                        for ((p, y), (top, sum)) in rows.zip(tops.iter_mut().zip(&mut *sums)) {
                            let largest = largest(p);
                            let now = if largest > *top { largest } else { *top };
                            p.iter_mut().for_each(|p| *p = math::exp(*p - now));
                            // Nothing is there yet before the first block.
                            let shrink = math::exp(*top - now);
                            y.iter_mut().for_each(|y| *y *= shrink);
                            (*top, *sum) = (now, *sum * shrink + kernels::sum(p));
                        }
                    },
                );
                let (p, v) = (Mat::new(p, queries.len(), keys.len()), rows(head.v, d, keys.clone()));
                gemm(y, p, v, true);
            }
            vectorized(
                #[inline(always)]
                || {
                    for ((y, sum), top) in y.chunks_exact_mut(d).zip(sums).zip(tops) {
                        let share = 1.0 / *sum;
                        y.iter_mut().for_each(|y| *y *= share);
                        *sum = top + math::ln(*sum as f64) as f32;
                    }
                },
            );
        }
    }

    fn backward_head(&self, head: &mut Head<'_>, back: &mut HeadBack<'_>) {
        let d = self.d();
        vectorized(
            #[inline(always)]
            || {
                for ((dot, y), dy) in back.dots.iter_mut().zip(head.y.chunks_exact(d)).zip(back.dy.chunks_exact(d)) {
                    *dot = kernels::dot(y, dy);
                }
            },
        );
        for gradient in [&mut back.dq, &mut back.dk, &mut back.dv] {
            gradient.fill(0.0);
        }
        for keys in self.blocks() {
            let of_keys = keys.start * d..keys.end * d;
            for queries in self.blocks().skip_while(|queries| self.causal && queries.start < keys.start) {
                let of_queries = queries.start * d..queries.end * d;
                let len = queries.len() * keys.len();
                let (p, dp) = (&mut head.block[..len], &mut back.block[..len]);
                let (q, k) = (rows(head.q, d, queries.clone()), rows(head.k, d, keys.clone()));
                let (dy, v) = (rows(back.dy, d, queries.clone()), rows(head.v, d, keys.clone()));
                self.products(p, q, k, self.causal && keys == queries, keys.len());
                product(dp, dy, v.t(), Start::Zero, Finish::Keep);
                let (log_sums, dots) = (&head.log_sums[queries.clone()], &back.dots[queries.clone()]);
                vectorized(
                    #[inline(always)]
                    || {
                        let rows = p.chunks_exact_mut(keys.len()).zip(dp.chunks_exact_mut(keys.len()));
                        for ((p, dp), (log_sum, dot)) in rows.zip(log_sums.iter().zip(dots)) {
                            for (p, dp) in p.iter_mut().zip(dp) {
                                *p = math::exp(*p - log_sum);
                                *dp = *p * (*dp - dot);
                            }
                        }
                    },
                );
                let (p, ds) = (Mat::new(p, queries.len(), keys.len()), Mat::new(dp, queries.len(), keys.len()));
                gemm(&mut back.dv[of_keys.clone()], p.t(), dy, true);
                gemm(&mut back.dq[of_queries], ds, k, true);
                gemm(&mut back.dk[of_keys.clone()], ds.t(), q, true);
            }
        }
    }
}

impl Layer for Attention {
    fn out_shape(&self) -> &[usize] {
        &self.shape
    }

    /// Of each head and position: the logarithm of its softmax' sum.
    fn saved(&self, rows: usize, _: usize) -> usize {
        rows * self.heads * self.positions()
    }

    fn scratch(&self, _: usize, _: usize) -> usize {
        kernels::lanes() * self.head()
    }

    /// Products of queries and keys, and of them with values; a causal one computes about half of them.
    fn multiply_adds(&self) -> u64 {
        let blocks = self.blocks().map(|b| b.len() as u64);
        let seen = |queries: usize| -> u64 {
            let keys = self.blocks().map(|b| b.len() as u64);
            if self.causal { keys.take(queries + 1).sum() } else { keys.sum() }
        };
        let products: u64 = blocks.enumerate().map(|(i, len)| len * seen(i)).sum();
        2 * products * self.shape[1] as u64
    }

    fn forward(
        &self,
        pass: &Pass<'_>,
        _: Params<'_>,
        x: &[f32],
        y: &mut [f32],
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let ([t, width], d) = (self.shape, self.d());
        let each = rows_each(pass.segments.total());
        let of_lanes = y.par_chunks_mut(each * t * width).zip(x.par_chunks(each * t * 3 * width));
        let of_lanes =
            of_lanes.zip(saved.par_chunks_mut(each * self.heads * t)).zip(scratch.par_chunks_mut(self.head()));
        of_lanes.for_each(|(((y, x), saved), scratch)| {
            let mut head = self.split(scratch);
            let samples = y.chunks_exact_mut(t * width).zip(x.chunks_exact(t * 3 * width));
            for ((y, x), saved) in samples.zip(saved.chunks_exact_mut(self.heads * t)) {
                for (h, saved) in saved.chunks_exact_mut(t).enumerate() {
                    self.load(x, h, head.q, head.k, head.v);
                    self.forward_head(&mut head);
                    saved.copy_from_slice(head.log_sums);
                    for (y, out) in y.chunks_exact_mut(width).zip(head.y.chunks_exact(d)) {
                        y[h * d..][..d].copy_from_slice(out);
                    }
                }
            }
        });
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        _: Params<'_>,
        x: &[f32],
        y: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        _: Grads<'_>,
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let Some(dx) = dx else { return };
        let ([t, width], d, scale) = (self.shape, self.d(), self.scale());
        let each = rows_each(pass.segments.total());
        let of_lanes = dx.par_chunks_mut(each * t * 3 * width).zip(x.par_chunks(each * t * 3 * width));
        let of_lanes = of_lanes.zip(y.par_chunks(each * t * width).zip(dy.par_chunks(each * t * width)));
        let of_lanes = of_lanes.zip(saved.par_chunks(each * self.heads * t)).zip(scratch.par_chunks_mut(self.head()));
        of_lanes.for_each(|((((dx, x), (y, dy)), saved), scratch)| {
            let mut head = self.split(scratch);
            let mut back = self.split_back(std::mem::take(&mut head.rest));
            let samples = dx.chunks_exact_mut(t * 3 * width).zip(x.chunks_exact(t * 3 * width));
            let outs = y.chunks_exact(t * width).zip(dy.chunks_exact(t * width));
            for (((dx, x), (y, dy)), saved) in samples.zip(outs).zip(saved.chunks_exact(self.heads * t)) {
                for (h, saved) in saved.chunks_exact(t).enumerate() {
                    self.load(x, h, head.q, head.k, head.v);
                    head.log_sums.copy_from_slice(saved);
                    for (to, from) in [(&mut *head.y, y), (&mut *back.dy, dy)] {
                        for (to, from) in to.chunks_exact_mut(d).zip(from.chunks_exact(width)) {
                            to.copy_from_slice(&from[h * d..][..d]);
                        }
                    }
                    self.backward_head(&mut head, &mut back);
                    if let Some(rotary) = &self.rotary {
                        rotary.turn(back.dq, -1.0);
                        rotary.turn(back.dk, -1.0);
                    }
                    let parts = back.dq.chunks_exact(d).zip(back.dk.chunks_exact(d)).zip(back.dv.chunks_exact(d));
                    for (dx, ((dq, dk), dv)) in dx.chunks_exact_mut(3 * width).zip(parts) {
                        dx[h * d..][..d].iter_mut().zip(dq).for_each(|(dx, dq)| *dx = dq * scale);
                        dx[width + h * d..][..d].copy_from_slice(dk);
                        dx[2 * width + h * d..][..d].copy_from_slice(dv);
                    }
                }
            }
        });
    }
}
