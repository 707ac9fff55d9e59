//! Scaled dot-product attention of several heads.

use super::{Grads, Layer, Params, Pass, rows_each};
use crate::kernels::gemm::{GROUP, Triangle, gemm_of_triangle, transposed};
use crate::kernels::{self, Mat, math, vectorized, zip};
use rayon::prelude::*;
use std::ops::Range;

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

    /// Turns the rows of a head, which begin `stride` apart, the first of them at position 0; back, where `sign` is -1.
    fn turn(&self, rows: &mut [f32], stride: usize, sign: f32) {
        for (row, turns) in rows.chunks_mut(stride).zip(self.turns.chunks_exact(self.half)) {
            let (a, b) = row[..2 * self.half].split_at_mut(self.half);
            for ((a, b), [cos, sin]) in a.iter_mut().zip(b).zip(turns) {
                (*a, *b) = (*a * cos - *b * sin * sign, *b * cos + *a * sin * sign);
            }
        }
    }
}

/// One head of one sample: each `(positions, d)`.
struct Head<'a> {
    q: Mat<'a>,
    k: Mat<'a>,
    v: Mat<'a>,
    /// The queries divided by `sqrt(d)`, each block of them transposed.
    q_t: &'a [f32],
}

/// What is seen of a block of keys, `(keys, queries)`: all of it, or by each query the keys up to its own.
#[derive(Clone, Copy)]
struct Seen {
    diagonal: bool,
}

impl Seen {
    /// What products may leave out.
    fn triangle(self, triangle: Triangle) -> Triangle {
        if self.diagonal { triangle } else { Triangle::Full }
    }

    /// The first query whose group sees key `j`: no product takes those before it.
    #[inline(always)]
    fn from(self, j: usize) -> usize {
        if self.diagonal { j - j % GROUP } else { 0 }
    }

    /// Puts `value` in place of what is hidden in the row of key `j`.
    #[inline(always)]
    fn hide(self, row: &mut [f32], j: usize, value: f32) {
        if self.diagonal {
            row[self.from(j)..j].fill(value);
        }
    }
}

/// Multiplies the first `d` values of each row by a factor; rows begin `width` apart.
#[inline(always)]
fn scale_rows(rows: &mut [f32], width: usize, d: usize, factors: &[f32]) {
    for (row, factor) in rows.chunks_mut(width).zip(factors) {
        row[..d].iter_mut().for_each(|v| *v *= factor);
    }
}

/// What a thread needs for one head after another.
struct Room<'a> {
    /// Queries and keys as they were turned, if they are.
    q: &'a mut [f32],
    k: &'a mut [f32],
    /// Queries divided by `sqrt(d)`, and the gradients of outputs, block by block transposed.
    q_t: &'a mut [f32],
    dy_t: &'a mut [f32],
    /// Of each position: the product of its output and that output's gradient.
    dots: &'a mut [f32],
    /// Products of a block of keys and one of queries, and their gradients.
    products: &'a mut [f32],
    gradients: &'a mut [f32],
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

    /// Floats of a [`Room`].
    fn room(&self) -> usize {
        self.positions() * (4 * self.d() + 1) + 2 * BLOCK * BLOCK
    }

    fn split<'a>(&self, scratch: &'a mut [f32]) -> Room<'a> {
        let len = self.positions() * self.d();
        let (q, rest) = scratch.split_at_mut(len);
        let (k, rest) = rest.split_at_mut(len);
        let (q_t, rest) = rest.split_at_mut(len);
        let (dy_t, rest) = rest.split_at_mut(len);
        let (dots, rest) = rest.split_at_mut(self.positions());
        let (products, gradients) = rest.split_at_mut(BLOCK * BLOCK);
        Room { q, k, q_t, dy_t, dots, products, gradients }
    }

    /// The blocks of positions.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + Clone + use<> {
        let positions = self.positions();
        (0..positions).step_by(BLOCK).map(move |from| from..(from + BLOCK).min(positions))
    }

    /// The transposes of all blocks of rows, one after another.
    fn transpose(&self, all: Mat<'_>, out: &mut [f32]) {
        let d = self.d();
        self.blocks().for_each(|block| transposed(&mut out[block.start * d..block.end * d], all.lines(block)));
    }

    /// One of these blocks, `(d, positions)`.
    fn block<'a>(&self, all: &'a [f32], block: &Range<usize>) -> Mat<'a> {
        let d = self.d();
        Mat::new(&all[block.start * d..block.end * d], d, block.len())
    }

    /// Head `h` of the sample `x`.
    fn head<'a>(&self, x: &'a [f32], h: usize, q: &'a mut [f32], k: &'a mut [f32], q_t: &'a mut [f32]) -> Head<'a> {
        let ([t, width], d) = (self.shape, self.d());
        let part = |i: usize| Mat::new(x, t, 3 * width).part(i * width + h * d, d);
        let turned = |i: usize, out: &'a mut [f32]| {
            let Some(rotary) = &self.rotary else { return part(i) };
            out.chunks_exact_mut(d).zip(part(i).each_line()).for_each(|(out, row)| out.copy_from_slice(row));
            rotary.turn(out, d, 1.0);
            Mat::new(out, t, d)
        };
        let (q, k) = (turned(0, q), turned(1, k));
        self.transpose(q, q_t);
        kernels::scale(q_t, self.scale());
        Head { q, k, v: part(2), q_t }
    }

    /// `y` begins with the head's part of the first position, and has a position's in every `width` values.
    fn forward_head(&self, head: &Head<'_>, y: &mut [f32], log_sums: &mut [f32], products: &mut [f32]) {
        let ([_, width], d) = (self.shape, self.d());
        for queries in self.blocks() {
            let n = queries.len();
            let y = &mut y[queries.start * width..];
            let sums = &mut log_sums[queries.clone()];
            let (mut tops, mut factors) = ([f32::NEG_INFINITY; BLOCK], [0.0; BLOCK]);
            let (tops, factors) = (&mut tops[..n], &mut factors[..n]);
            sums.fill(0.0);
            for keys in self.blocks().take_while(|keys| !self.causal || keys.start <= queries.start) {
                let first = keys.start == 0;
                let (p, seen) = (&mut products[..keys.len() * n], Seen { diagonal: self.causal && keys == queries });
                let (k, q_t) = (head.k.lines(keys.clone()), self.block(head.q_t, &queries));
                gemm_of_triangle(p, n, k, q_t, false, seen.triangle(Triangle::Upper));
                vectorized(
                    #[inline(always)]
                    || {
                        factors.copy_from_slice(tops);
                        for (j, p) in p.chunks_exact_mut(n).enumerate() {
                            let from = seen.from(j);
                            seen.hide(p, j, f32::NEG_INFINITY);
                            zip(&mut tops[from..], &p[from..], |top, p| if p > top { p } else { top });
                        }
                        // Nothing is there yet before the first block.
                        if !first {
                            zip(factors, tops, |old, top| math::exp(old - top));
                            zip(sums, factors, |sum, shrink| sum * shrink);
                            scale_rows(y, width, d, factors);
                        }
                        for (j, p) in p.chunks_exact_mut(n).enumerate() {
                            let from = seen.from(j);
                            zip(&mut p[from..], &tops[from..], |p, top| math::exp(p - top));
                            zip(&mut sums[from..], &p[from..], |sum, p| sum + p);
                        }
                    },
                );
                let p = Mat::new(p, keys.len(), n).t();
                gemm_of_triangle(y, width, p, head.v.lines(keys), !first, seen.triangle(Triangle::LeftLower));
            }
            vectorized(
                #[inline(always)]
                || {
                    zip(factors, sums, |_, sum| 1.0 / sum);
                    scale_rows(y, width, d, factors);
                    zip(sums, tops, |sum, top| top + math::ln(sum as f64) as f32);
                },
            );
        }
    }

    /// `dy` is the head's part of the outputs' gradients; `dx` begins with its part of the first position's queries, and has a
    /// position's queries, keys and values in every `3 width` values.
    fn backward_head(
        &self,
        head: &Head<'_>,
        dy: Mat<'_>,
        dy_t: &[f32],
        dots: &[f32],
        log_sums: &[f32],
        dx: &mut [f32],
        [products, gradients]: [&mut [f32]; 2],
    ) {
        let ([_, width], scale) = (self.shape, self.scale());
        let row = 3 * width;
        for keys in self.blocks() {
            for queries in self.blocks().skip_while(|queries| self.causal && queries.start < keys.start) {
                let n = queries.len();
                let (p, dp) = (&mut products[..keys.len() * n], &mut gradients[..keys.len() * n]);
                let seen = Seen { diagonal: self.causal && keys == queries };
                let (k, v, upper) =
                    (head.k.lines(keys.clone()), head.v.lines(keys.clone()), seen.triangle(Triangle::Upper));
                gemm_of_triangle(p, n, k, self.block(head.q_t, &queries), false, upper);
                gemm_of_triangle(dp, n, v, self.block(dy_t, &queries), false, upper);
                let (log_sums, dots) = (&log_sums[queries.clone()], &dots[queries.clone()]);
                vectorized(
                    #[inline(always)]
                    || {
                        for (j, (p, dp)) in p.chunks_exact_mut(n).zip(dp.chunks_exact_mut(n)).enumerate() {
                            let from = seen.from(j);
                            zip(&mut p[from..], &log_sums[from..], |p, log_sum| math::exp(p - log_sum));
                            zip(&mut dp[from..], &dots[from..], |dp, dot| dp - dot);
                            zip(&mut dp[from..], &p[from..], |dp, p| p * dp * scale);
                            seen.hide(p, j, 0.0);
                            seen.hide(dp, j, 0.0);
                        }
                    },
                );
                // Each gradient begins with the first block that it has a part of.
                let first_query = queries.start == if self.causal { keys.start } else { 0 };
                let (p, ds) = (Mat::new(p, keys.len(), n), Mat::new(dp, keys.len(), n));
                let (lower, left_upper) = (seen.triangle(Triangle::LeftLower), seen.triangle(Triangle::LeftUpper));
                let (q, dy) = (head.q.lines(queries.clone()), dy.lines(queries.clone()));
                gemm_of_triangle(&mut dx[queries.start * row..], row, ds.t(), k, keys.start > 0, lower);
                gemm_of_triangle(&mut dx[keys.start * row + width..], row, ds, q, !first_query, left_upper);
                gemm_of_triangle(&mut dx[keys.start * row + 2 * width..], row, p, dy, !first_query, left_upper);
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
        kernels::lanes() * self.room()
    }

    /// Of each query with the keys that it sees, and of that with their values.
    fn multiply_adds(&self) -> u64 {
        let [t, width] = self.shape.map(|n| n as u64);
        2 * width * if self.causal { t * (t + 1) / 2 } else { t * t }
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
            of_lanes.zip(saved.par_chunks_mut(each * self.heads * t)).zip(scratch.par_chunks_mut(self.room()));
        of_lanes.for_each(|(((y, x), saved), scratch)| {
            let Room { q, k, q_t, products, .. } = self.split(scratch);
            let samples = y.chunks_exact_mut(t * width).zip(x.chunks_exact(t * 3 * width));
            for ((y, x), saved) in samples.zip(saved.chunks_exact_mut(self.heads * t)) {
                for (h, log_sums) in saved.chunks_exact_mut(t).enumerate() {
                    self.forward_head(&self.head(x, h, q, k, q_t), &mut y[h * d..], log_sums, products);
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
        let ([t, width], d) = (self.shape, self.d());
        let each = rows_each(pass.segments.total());
        let of_lanes = dx.par_chunks_mut(each * t * 3 * width).zip(x.par_chunks(each * t * 3 * width));
        let of_lanes = of_lanes.zip(y.par_chunks(each * t * width).zip(dy.par_chunks(each * t * width)));
        let of_lanes = of_lanes.zip(saved.par_chunks(each * self.heads * t)).zip(scratch.par_chunks_mut(self.room()));
        of_lanes.for_each(|((((dx, x), (y, dy)), saved), scratch)| {
            let Room { q, k, q_t, dy_t, dots, products, gradients } = self.split(scratch);
            let samples = dx.chunks_exact_mut(t * 3 * width).zip(x.chunks_exact(t * 3 * width));
            let outs = y.chunks_exact(t * width).zip(dy.chunks_exact(t * width));
            for (((dx, x), (y, dy)), saved) in samples.zip(outs).zip(saved.chunks_exact(self.heads * t)) {
                for (h, log_sums) in saved.chunks_exact(t).enumerate() {
                    let head = self.head(x, h, q, k, q_t);
                    let (of_head, dx) = (h * d..(h + 1) * d, &mut dx[h * d..]);
                    vectorized(
                        #[inline(always)]
                        || {
                            let rows = y.chunks_exact(width).zip(dy.chunks_exact(width));
                            for (dot, (y, dy)) in dots.iter_mut().zip(rows) {
                                *dot = kernels::dot(&y[of_head.clone()], &dy[of_head.clone()]);
                            }
                        },
                    );
                    let dy = Mat::new(dy, t, width).part(h * d, d);
                    self.transpose(dy, dy_t);
                    self.backward_head(&head, dy, dy_t, dots, log_sums, dx, [products, gradients]);
                    if let Some(rotary) = &self.rotary {
                        rotary.turn(dx, 3 * width, -1.0);
                        rotary.turn(&mut dx[width..], 3 * width, -1.0);
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Rows, Segments};
    use super::*;
    use crate::kernels::{Isa, with_isa};
    use crate::rng::{Key, Purpose};

    /// Output, gradient and what is kept, of `samples`; nothing that was in memory before is read.
    fn run(attention: &Attention, samples: usize, isa: Isa) -> [Vec<f32>; 3] {
        let [t, width] = attention.shape;
        let values = |salt, n: usize| -> Vec<f32> {
            let key = Key::new(salt, Purpose::Synthetic);
            (0..n as u64).map(|i| key.normal(i)).collect()
        };
        let (x, dy) = (values(1, samples * t * 3 * width), values(2, samples * t * width));
        let none = |n| vec![f32::NAN; n];
        let (mut y, mut dx, mut saved) = (none(dy.len()), none(x.len()), none(attention.saved(samples, 1)));
        let (segments, key, finished) =
            (Segments::one(samples), Key::new(0, Purpose::Dropout), |_: usize, _: &[f32]| ());
        let pass = Pass { segments: &segments, train: true, key, first: 0, finished: &finished, finished_rows: None };
        let params = Params { trainable: &[], running: &[], rows: Rows::NONE };
        let grads = Grads { trainable: &mut [], running: &mut [], rows: &mut [] };
        let scratch = || none(attention.scratch(samples, 1));
        with_isa(isa, || {
            attention.forward(&pass, params, &x, &mut y, &mut saved, &mut scratch());
            attention.backward(&pass, params, &x, &y, &dy, Some(&mut dx), grads, &mut saved, &mut scratch());
        })
        .expect("it is available");
        [y, dx, saved]
    }

    /// Heads of whole vectors and others, blocks of keys and queries that are whole, several and short: all values are there, and
    /// the same on every instruction set.
    #[test]
    fn memory_may_hold_anything_and_vectors_move_no_bit() {
        for ((t, d), (causal, rotary)) in [(1, 16), (17, 2), (64, 32), (65, 16), (130, 6), (200, 128)]
            .into_iter()
            .flat_map(|shape| [(true, false), (true, true), (false, false)].map(|how| (shape, how)))
        {
            let rotary = rotary.then(|| Rotary::new(t, d, 100.0));
            let attention = Attention { shape: [t, 2 * d], heads: 2, causal, rotary };
            let all: Vec<_> = Isa::available().map(|isa| (isa, run(&attention, 2, isa))).collect();
            for (isa, got) in &all {
                assert!(got.iter().flatten().all(|v| v.is_finite()), "{t} positions, {d} wide, {causal}, {isa:?}");
                let same = got.iter().flatten().zip(all[0].1.iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{t} positions, {d} wide, causal: {causal}: {isa:?} is not {:?}", all[0].0);
            }
        }
    }
}
