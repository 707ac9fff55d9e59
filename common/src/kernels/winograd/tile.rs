//! Tiles of vectors and the linear maps that they go through, and the way from planes to channels last and back.

use crate::kernels::gemm::transpose;
use pulp::Simd;

/// A tile, or what it is transformed to.
pub(super) type Tile<V, const N: usize> = [[V; N]; N];

/// `m x m^T` for a linear map `m`, which a whole tile of vectors goes through in registers.
#[inline(always)]
pub(super) fn both<S: Simd, const N: usize, const M: usize>(
    simd: S,
    m: impl Fn([S::f32s; N]) -> [S::f32s; M],
    x: Tile<S::f32s, N>,
) -> Tile<S::f32s, M> {
    let zero = simd.splat_f32s(0.0);
    let (mut rows, mut out) = ([[zero; M]; N], [[zero; M]; M]);
    for i in 0..N {
        rows[i] = m(x[i]);
    }
    for j in 0..M {
        let mut column = [zero; N];
        for i in 0..N {
            column[i] = rows[i][j];
        }
        let column = m(column);
        for i in 0..M {
            out[i][j] = column[i];
        }
    }
    out
}

/// The maps, on vectors.
#[derive(Clone, Copy)]
pub(super) struct Maps<S>(pub(super) S);

impl<S: Simd> Maps<S> {
    /// `B^T`.
    #[inline(always)]
    pub(super) fn windows(self, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 4] {
        let s = self.0;
        [s.sub_f32s(a, c), s.add_f32s(b, c), s.sub_f32s(c, b), s.sub_f32s(b, d)]
    }

    /// `B`.
    #[inline(always)]
    pub(super) fn windows_t(self, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 4] {
        let s = self.0;
        let (difference, zero) = (s.sub_f32s(b, c), s.splat_f32s(0.0));
        [a, s.add_f32s(difference, d), s.sub_f32s(s.add_f32s(b, c), a), s.sub_f32s(zero, d)]
    }

    /// `A^T`.
    #[inline(always)]
    pub(super) fn outputs(self, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 2] {
        let s = self.0;
        [s.add_f32s(a, s.add_f32s(b, c)), s.sub_f32s(s.sub_f32s(b, c), d)]
    }

    /// `A`.
    #[inline(always)]
    pub(super) fn outputs_t(self, [a, b]: [S::f32s; 2]) -> [S::f32s; 4] {
        let s = self.0;
        [a, s.add_f32s(a, b), s.sub_f32s(a, b), s.sub_f32s(s.splat_f32s(0.0), b)]
    }

    /// `G`.
    #[inline(always)]
    pub(super) fn filters(self, [a, b, c]: [S::f32s; 3]) -> [S::f32s; 4] {
        let s = self.0;
        let half = |x| s.mul_f32s(s.splat_f32s(0.5), x);
        let outer = s.add_f32s(a, c);
        [a, half(s.add_f32s(outer, b)), half(s.sub_f32s(outer, b)), c]
    }

    /// `G^T`.
    #[inline(always)]
    pub(super) fn filters_t(self, [a, b, c, d]: [S::f32s; 4]) -> [S::f32s; 3] {
        let s = self.0;
        let half = |x| s.mul_f32s(s.splat_f32s(0.5), x);
        let inner = half(s.add_f32s(b, c));
        [s.add_f32s(a, inner), half(s.sub_f32s(b, c)), s.add_f32s(inner, d)]
    }
}

/// The vectors of `values`, which are whole ones.
#[inline(always)]
pub(super) fn vectors<S: Simd>(values: &[f32]) -> &[S::f32s] {
    S::as_simd_f32s(values).0
}

#[inline(always)]
pub(super) fn vectors_mut<S: Simd>(values: &mut [f32]) -> &mut [S::f32s] {
    S::as_mut_simd_f32s(values).0
}

/// A tile of the vectors `at(row, column)`.
#[inline(always)]
pub(super) fn gather<S: Simd, const N: usize>(simd: S, at: impl Fn(usize, usize) -> S::f32s) -> Tile<S::f32s, N> {
    let mut tile = [[simd.splat_f32s(0.0); N]; N];
    for i in 0..N {
        for j in 0..N {
            tile[i][j] = at(i, j);
        }
    }
    tile
}

/// Calls `f(row, column, vector)` for all of a tile.
#[inline(always)]
pub(super) fn scatter<V: Copy, const N: usize>(tile: Tile<V, N>, mut f: impl FnMut(usize, usize, V)) {
    for i in 0..N {
        for j in 0..N {
            f(i, j, tile[i][j]);
        }
    }
}

/// Channels last: `to`, `(rows, columns, width)`, holds the planes of `(height, width)` from row and column `pad` on.
#[inline(always)]
pub(super) fn channels_last<S: Simd>(
    simd: S,
    planes: &[f32],
    (h, w): (usize, usize),
    to: &mut [f32],
    (pad, columns, width): (usize, usize, usize),
) {
    let rows = if columns == w { 1 } else { h }; // all of them at once where nothing is between
    let len = h * w / rows;
    for row in 0..rows {
        let line = |channel| &planes[channel * h * w + row * len..][..len];
        let to = &mut to[((row + pad) * columns + pad) * width..];
        transpose(simd, planes.len() / (h * w), line, (len, width), to, width);
    }
}

/// The way back from [`channels_last`], for all planes.
#[inline(always)]
pub(super) fn planes<S: Simd>(
    simd: S,
    from: &[f32],
    (pad, columns, width): (usize, usize, usize),
    planes: &mut [f32],
    (h, w): (usize, usize),
) {
    let channels = planes.len() / (h * w);
    let rows = if columns == w { 1 } else { h };
    let len = h * w / rows;
    for row in 0..rows {
        let pixel = |i| &from[((row + pad) * columns + pad + i) * width..][..channels];
        transpose(simd, len, pixel, (channels, len), &mut planes[row * len..], h * w);
    }
}
