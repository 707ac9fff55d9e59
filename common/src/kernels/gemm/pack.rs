//! Brings values to where a tile reads them: side by side, in the order of its steps.

use super::{LINE, Mat, ROWS, even, panels, whole};
use crate::kernels::{fetch, isa};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// [`super::Right::pack`] from `depth` rows of `columns` values.
#[inline(always)]
pub fn pack_rows<'a, S: Simd>(
    simd: S,
    depth: usize,
    columns: usize,
    out: &mut [f32],
    row: impl Fn(usize) -> &'a [f32],
) {
    let width = panels::<S>(columns).next().map_or(0, |panel| whole::<S>(panel.len()));
    let (most, rest) = (columns - columns % width.max(1), columns % width.max(1));
    let (panels, last) = out.split_at_mut(most * depth);
    for i in 0..depth {
        if i + AHEAD < depth {
            let row = row(i + AHEAD);
            (0..columns).step_by(LINE).for_each(|at| fetch(row, at));
        }
        let row = row(i);
        match width / S::F32_LANES {
            1 => copy_apart::<S, 1>(&row[..most], panels, i, depth),
            2 => copy_apart::<S, 2>(&row[..most], panels, i, depth),
            3 => copy_apart::<S, 3>(&row[..most], panels, i, depth),
            _ => {}
        }
        if rest > 0 {
            let width = whole::<S>(rest);
            copy(simd, &row[most..columns], &mut last[i * width..][..width]);
        }
    }
}

/// Every `N` vectors of `row` become line `i` of a panel of `depth` lines.
#[inline(always)]
fn copy_apart<S: Simd, const N: usize>(row: &[f32], panels: &mut [f32], i: usize, depth: usize) {
    let panels = S::as_mut_simd_f32s(panels).0.chunks_exact_mut(N * depth);
    for (from, panel) in S::as_simd_f32s(row).0.chunks_exact(N).zip(panels) {
        panel[i * N..][..N].copy_from_slice(from);
    }
}

/// [`super::Right::pack`] from `columns` lines of `depth` values, each a column.
#[inline(always)]
pub fn pack_columns<'a, S: Simd>(
    simd: S,
    depth: usize,
    columns: usize,
    out: &mut [f32],
    column: impl Fn(usize) -> &'a [f32],
) {
    for panel in panels::<S>(columns) {
        let width = whole::<S>(panel.len());
        let out = &mut out[panel.start * depth..][..width * depth];
        transpose(simd, panel.len(), |j| column(panel.start + j), (depth, width), out, width);
    }
}

/// Rows between that which is packed, and that which is fetched.
const AHEAD: usize = 4;

/// Lines of a left matrix between them, which are shorter.
const LINES_AHEAD: usize = 16;

/// Columns between them, where they are transposed.
const COLUMNS_AHEAD: usize = 3 * SIDE;

/// `to` = `from`, then zeros.
#[inline(always)]
fn copy<S: Simd>(simd: S, from: &[f32], to: &mut [f32]) {
    let (vectors, tail) = S::as_simd_f32s(from);
    let (to, _) = S::as_mut_simd_f32s(to);
    let (whole, rest) = to.split_at_mut(vectors.len());
    whole.iter_mut().zip(vectors).for_each(|(to, from)| *to = *from);
    if let [last] = rest {
        *last = simd.partial_load_f32s(tail);
    }
}

/// Packs `rows` values of each of `depth` lines, `each` for a strip and then those that are left; strips lie `apart` in `out`, each
/// with room for [`ROWS`] values more behind it.
///
/// Line by line: lines may share the same few places of the caches, where they would be gone before the next strip.
#[inline(always)]
pub(super) fn pack_strips<'a>(
    line: impl Fn(usize) -> &'a [f32],
    depth: usize,
    rows: usize,
    each: usize,
    out: &mut [f32],
    apart: usize,
) {
    debug_assert!(apart >= depth * each + ROWS, "strips of {depth} lines of {each} values {apart} apart");
    let (strips, rest) = (rows / each, rows % each);
    for k in 0..depth {
        if k + LINES_AHEAD < depth {
            let line = line(k + LINES_AHEAD);
            (0..rows).step_by(LINE).for_each(|at| fetch(line, at));
        }
        let line = line(k);
        for strip in 0..strips {
            copy_short(&line[strip * each..], &mut out[strip * apart + k * each..], each);
        }
        if rest > 0 {
            copy_short(&line[strips * each..], &mut out[strips * apart + k * rest..], rest);
        }
    }
}

/// `to = from`, for a few values; what lies behind them in `to` may be anything.
#[inline(always)]
fn copy_short(from: &[f32], to: &mut [f32], len: usize) {
    match (from.first_chunk::<ROWS>(), to.first_chunk_mut::<ROWS>()) {
        (Some(from), Some(to)) => *to = *from,
        _ => to[..len].copy_from_slice(&from[..len]),
    }
}

/// `out[k * stride + j] = line(j)[k]` for `k` in `0..depth` and `j` in `0..width`: zeros from `lines` on.
#[inline(always)]
pub(in crate::kernels) fn transpose<'a, S: Simd>(
    simd: S,
    lines: usize,
    line: impl Fn(usize) -> &'a [f32],
    (depth, width): (usize, usize),
    out: &mut [f32],
    stride: usize,
) {
    // As many at once as stay in the first-level cache.
    for ks in even(depth, S::F32_LANES, AT_ONCE) {
        let bring = |lines: Range<usize>| {
            for line in lines.map(&line) {
                ks.clone().step_by(LINE).for_each(|k| fetch(line, k));
            }
        };
        bring(0..lines.min(COLUMNS_AHEAD));
        for j in (0..width).step_by(SIDE) {
            bring(lines.min(j + COLUMNS_AHEAD)..lines.min(j + COLUMNS_AHEAD + SIDE));
            let mut block: [&[f32]; SIDE] = [&[]; SIDE];
            for (line_j, j) in block.iter_mut().zip(j..lines) {
                *line_j = &line(j)[ks.clone()];
            }
            if S::F32_LANES < SIDE || width - j < SIDE {
                for (j, line) in (j..width).zip(block) {
                    for (i, k) in ks.clone().enumerate() {
                        out[k * stride + j] = line.get(i).copied().unwrap_or(0.0);
                    }
                }
                continue;
            }
            let vectors = block.map(|line| S::as_simd_f32s(line).0);
            let (mut k, whole) = (ks.start, vectors[SIDE - 1].len());
            for i in 0..whole {
                let [a, b, c, d] = vectors;
                put(simd, [a[i], b[i], c[i], d[i]], S::F32_LANES, &mut out[k * stride + j..], stride);
                k += S::F32_LANES;
            }
            while k < ks.end {
                let rest = |line: &[f32]| simd.partial_load_f32s(&line[line.len().min(k - ks.start)..]);
                let [a, b, c, d] = block;
                put(simd, [rest(a), rest(b), rest(c), rest(d)], ks.end - k, &mut out[k * stride + j..], stride);
                k += S::F32_LANES;
            }
        }
    }
}

/// Values of a line that are transposed together with those of all others.
const AT_ONCE: usize = 64;

/// Side of the squares that are transposed in vectors.
const SIDE: usize = 4;

/// `out[k * stride + l] = lines[l][k]` for `k` in `0..depth`, at most the lanes of a vector.
#[inline(always)]
fn put<S: Simd>(simd: S, lines: [S::f32s; SIDE], depth: usize, out: &mut [f32], stride: usize) {
    // Transposes each square of 4 lanes of the 4 vectors.
    let squares: [S::f32s; SIDE] = simd.deinterleave_shfl_f32s(lines);
    let quads: &[[f32; SIDE]] = bytemuck::cast_slice(&squares);
    for (l, quads) in quads.chunks_exact(S::F32_LANES / SIDE).enumerate() {
        for (square, quad) in quads.iter().enumerate() {
            let k = square * SIDE + l;
            if k < depth {
                out[k * stride..][..SIDE].copy_from_slice(quad);
            }
        }
    }
}

/// `out`, `(n, m)`, becomes the transpose of `a`, `(m, n)`, which is not one itself.
///
/// # Panics
/// Where the shapes do not fit.
pub fn transposed(out: &mut [f32], a: Mat<'_>) {
    assert_eq!(a.strides.1, 1, "a transpose");
    isa::arch().dispatch(Transposed { out: &mut out[..a.rows * a.cols], a });
}

/// [`transposed`].
struct Transposed<'a> {
    out: &'a mut [f32],
    a: Mat<'a>,
}

impl WithSimd for Transposed<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Transposed { out, a } = self;
        let row = |i| &a.data[i * a.strides.0..][..a.cols];
        transpose(simd, a.rows, row, (a.cols, a.rows), out, a.rows);
    }
}
