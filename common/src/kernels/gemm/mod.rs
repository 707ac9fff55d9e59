//! Matrix products, and the law that the trainer leans on.
//!
//! **Every value of `A B` is one defined sum**: a chain of fused multiply-adds over `k` in order, from a start (zero, the
//! old value, or a bias), rounded once a step:
//!
//! ```text
//! c = start;  for k in 0..depth { c = fma(a[i, k], b[k, j], c) };  c = finish(c)
//! ```
//!
//! So it depends neither on how many rows or columns are computed beside it, nor on where it lies, nor on threads, vectors
//! or cache blocks: a block of `k` goes on from what the block before left in `c`. A batch may be cut and joined for any
//! number of threads and partitions, and machines with different instruction sets train together.
//!
//! The structure is that of BLIS (Van Zee and van de Geijn, "BLIS: A Framework for Rapidly Instantiating BLAS
//! Functionality", ACM TOMS 41(3), 2015, section 5): the right matrix is packed into panels a few vectors wide that stay in
//! the second-level cache ([`Right::pack`]), and a tile of sums in registers (`tile.rs`) runs over a panel and a few rows of
//! the left matrix, which stay in the first-level one. What can be read as fast where it lies is not packed
//! ([`Right::unpacked`]). Which of the two matrices is the right one is free, as a product is the transpose of the
//! transposes' product.

mod tile;

pub use tile::{Finish, Start};

use pulp::{Simd, WithSimd};
use std::cell::Cell;
use std::ops::Range;
use tile::{Lie, Strip};

/// A matrix in a slice: row-major with a row stride, or the transpose of one.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    /// Values from one row to the next, and from one column to the next. One of them is 1.
    strides: (usize, usize),
}

impl<'a> Mat<'a> {
    /// `rows x cols` values, row after row.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Mat<'a> {
        Mat { data: &data[..rows * cols], rows, cols, strides: (cols, 1) }
    }

    /// The columns `from..from + cols` of a matrix that is not a transpose.
    pub fn part(self, from: usize, cols: usize) -> Mat<'a> {
        assert!(self.strides.1 == 1 && from + cols <= self.cols, "columns {from}..{} of {}", from + cols, self.cols);
        Mat { data: &self.data[from.min(self.data.len())..], cols, ..self }
    }

    /// Some of its rows, of a matrix that is not a transpose.
    pub fn lines(self, rows: Range<usize>) -> Mat<'a> {
        assert!(self.strides.1 == 1 && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        Mat { data: &self.data[(rows.start * self.strides.0).min(self.data.len())..], rows: rows.len(), ..self }
    }

    /// Its rows, of a matrix that is not a transpose.
    pub fn each_line(self) -> impl Iterator<Item = &'a [f32]> {
        assert_eq!(self.strides.1, 1, "a transpose");
        (0..self.rows).map(move |i| &self.data[i * self.strides.0..][..self.cols])
    }

    /// The transpose; nothing is moved.
    pub fn t(self) -> Mat<'a> {
        Mat { rows: self.cols, cols: self.rows, strides: (self.strides.1, self.strides.0), ..self }
    }
}

/// `c = a b`, or `c += a b`; `a`: `(m, k)`, `b`: `(k, n)`, `c`: `(m, n)` row-major. One thread.
///
/// # Panics
/// Where the shapes do not fit.
pub fn gemm(c: &mut [f32], a: Mat<'_>, b: Mat<'_>, add: bool) {
    product(c, a, b, if add { Start::Old } else { Start::Zero }, Finish::Keep);
}

/// `c = finish(start + a b)`, with the shapes of [`gemm`].
///
/// # Panics
/// Where the shapes do not fit.
pub fn product(c: &mut [f32], a: Mat<'_>, b: Mat<'_>, start: Start<'_>, finish: Finish) {
    assert_eq!(a.cols, b.rows, "a product of {}x{} and {}x{}", a.rows, a.cols, b.rows, b.cols);
    let c = &mut c[..a.rows * b.cols];
    if !c.is_empty() {
        super::isa::arch().dispatch(Either { c, a, b, start, finish });
    }
}

/// [`product`] with any right matrix.
///
/// # Panics
/// Where the shapes do not fit.
pub fn product_with<R: Right>(c: &mut [f32], a: Mat<'_>, right: R, start: Start<'_>, finish: Finish) {
    assert_eq!(a.cols, right.rows(), "a product of {} columns and {} rows", a.cols, right.rows());
    let c = &mut c[..a.rows * right.columns()];
    if !c.is_empty() {
        super::isa::arch().dispatch(Product { finish, ..Product::of(c, a, right, start) });
    }
}

/// `c = a b`, or `c += a b`, with the shapes of [`gemm`] but rows of `c` that begin `c_stride` apart, without what a triangle leaves
/// out.
///
/// # Panics
/// Where the shapes do not fit.
pub fn gemm_of_triangle(c: &mut [f32], c_stride: usize, a: Mat<'_>, b: Mat<'_>, add: bool, triangle: Triangle) {
    assert_eq!(a.cols, b.rows, "a product of {}x{} and {}x{}", a.rows, a.cols, b.rows, b.cols);
    assert!(c_stride >= b.cols, "rows of {} values {c_stride} apart", b.cols);
    if a.rows > 0 && b.cols > 0 {
        let start = if add { Start::Old } else { Start::Zero };
        super::isa::arch().dispatch(Product { c_stride, triangle, ..Product::of(c, a, b, start) });
    }
}

/// `c = start + a b`, with the shapes of [`gemm`], inside of a kernel.
#[inline(always)]
pub(super) fn multiply<S: Simd>(simd: S, c: &mut [f32], a: Mat<'_>, b: Mat<'_>, start: Start<'_>) {
    Product::of(c, a, b, start).with_simd(simd);
}

/// `out`, `(n, m)`, becomes the transpose of `a`, `(m, n)`, which is not one itself.
///
/// # Panics
/// Where the shapes do not fit.
pub fn transposed(out: &mut [f32], a: Mat<'_>) {
    assert_eq!(a.strides.1, 1, "a transpose");
    super::isa::arch().dispatch(Transposed { out: &mut out[..a.rows * a.cols], a });
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

/// What of a product is a triangle, and is left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Triangle {
    /// Nothing.
    Full,
    /// `a[i, k]` is 0 where `k > i`: a sum ends with the last `k` of its row's [`GROUP`].
    LeftLower,
    /// `a[i, k]` is 0 where `k < i`: a sum begins with the first `k` of its row's [`GROUP`].
    LeftUpper,
    /// `c[i, j]` is of no interest where `j < i`: it becomes anything, or stays what it was.
    Upper,
}

/// Rows of a triangle, from a multiple of it, that leave out the same steps. It is the same on every instruction set, so that a sum's
/// definition does not depend on it, also of values that are not finite.
pub const GROUP: usize = 16;

impl Triangle {
    /// Whether it leaves out steps of `k`.
    fn cuts(self) -> bool {
        matches!(self, Triangle::LeftLower | Triangle::LeftUpper)
    }

    /// The steps, among `k`, that a group's `rows` take.
    fn steps(self, rows: &Range<usize>, k: Range<usize>) -> Range<usize> {
        match self {
            Triangle::LeftLower => k.start..rows.start.saturating_add(GROUP).clamp(k.start, k.end),
            Triangle::LeftUpper => rows.start.clamp(k.start, k.end)..k.end,
            Triangle::Full | Triangle::Upper => k,
        }
    }

    /// The columns, among these, that `rows` have.
    fn columns<S: Simd>(self, rows: &Range<usize>, columns: Range<usize>) -> Range<usize> {
        match self {
            Triangle::Upper => {
                let before = rows.start.saturating_sub(columns.start);
                columns.end.min(columns.start + before - before % S::F32_LANES)..columns.end
            }
            _ => columns,
        }
    }
}

/// The right matrix of a product, `(k, n)`, wherever it is.
pub trait Right {
    /// Its rows.
    fn rows(&self) -> usize;

    /// Its columns.
    fn columns(&self) -> usize;

    /// Its values and the distance of its rows, where it can as well be read as it lies by so many rows of the left one.
    fn unpacked<S: Simd>(&self, _rows: usize) -> Option<(&[f32], usize)> {
        None
    }

    /// What [`Right::pack`] would put out for a block, where it is there already.
    fn packed<S: Simd>(&self, _k: Range<usize>, _columns: Range<usize>) -> Option<&[f32]> {
        None
    }

    /// `out`: the panels of `columns` one after another, each `(k.len(), its width)`; zeros behind the last column.
    fn pack<S: Simd>(&self, simd: S, k: Range<usize>, columns: Range<usize>, out: &mut [f32]);
}

impl Right for Mat<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn columns(&self) -> usize {
        self.cols
    }

    /// Rows of whole vectors, all of which stay in the first-level cache, and do not share the same few places of it; or in the
    /// second, where they are read a few times only, or a tile reads whole cache lines of each that do not share places, either.
    #[inline(always)]
    fn unpacked<S: Simd>(&self, rows: usize) -> Option<(&[f32], usize)> {
        let lie_in_rows = self.rows > 0 && self.strides.1 == 1 && self.strides.0 >= self.cols;
        let whole = lie_in_rows && self.cols.is_multiple_of(S::F32_LANES);
        let (values, apart) = (self.rows * self.cols, !self.strides.0.is_multiple_of(16 * LINE));
        let small = values <= PACKED / 16 && (apart || self.strides.0 == self.cols);
        let near = values <= 2 * PACKED && (rows <= 4 * ROWS || S::F32_LANES >= LINE && apart);
        (whole && (small || near)).then_some((self.data, self.strides.0))
    }

    #[inline(always)]
    fn pack<S: Simd>(&self, simd: S, k: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        if self.strides.1 == 1 {
            pack_rows(simd, k.len(), columns.len(), out, |i| {
                &self.data[(k.start + i) * self.strides.0..][columns.clone()]
            });
        } else {
            let column = |j| &self.data[(columns.start + j) * self.strides.1..][k.clone()];
            pack_columns(simd, k.len(), columns.len(), out, column);
        }
    }
}

impl Mat<'_> {
    /// How it lies, where it can as well be read as it lies, as the left matrix of a product of so many columns. By rows it always
    /// can; by columns where they are near each other, or where few panels read them, unless their lines share the same few places
    /// of the first-level cache. Columns as short as a tile lie as packed ones do.
    #[inline(always)]
    fn unpacked_left<S: Simd>(&self, columns: usize) -> Option<Lie> {
        let (rows, apart) = self.strides;
        let few = columns <= FEW * tile::<S>().1 * S::F32_LANES && !apart.is_multiple_of(32 * LINE);
        match apart {
            1 => Some(Lie::Rows(rows)),
            _ => (apart > ROWS && (apart <= 16 * LINE || few)).then_some(Lie::Columns(apart)),
        }
    }
}

/// A right matrix for several products, packed once.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    mat: Mat<'a>,
    /// All blocks one after another; nothing, where it is read as it lies.
    blocks: &'a [f32],
    /// The panels that it was packed for.
    panel: usize,
}

impl<'a> Packed<'a> {
    /// Values that a `(k, n)` matrix needs.
    pub fn room(k: usize, n: usize) -> usize {
        k * n.next_multiple_of(LINE) + LINE
    }

    /// Packs `mat` for left matrices of about `rows` rows into `room`, of [`Packed::room`].
    pub fn of(mat: Mat<'a>, rows: usize, room: &'a mut [f32]) -> Packed<'a> {
        super::isa::arch().dispatch(PackAll { mat, rows, room })
    }
}

/// [`Packed::of`].
struct PackAll<'a> {
    mat: Mat<'a>,
    rows: usize,
    room: &'a mut [f32],
}

impl<'a> WithSimd for PackAll<'a> {
    type Output = Packed<'a>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Packed<'a> {
        let PackAll { mat, rows, room } = self;
        let panel = tile::<S>().1 * S::F32_LANES;
        if mat.unpacked::<S>(rows).is_some() {
            return Packed { mat, blocks: &[], panel };
        }
        let begin = room.as_ptr().align_offset(64).min(LINE);
        let blocks = &mut room[begin..];
        for (columns, k) in self::blocks::<S>(mat.rows, mat.cols) {
            let at = columns.start * mat.rows + k.start * whole::<S>(columns.len());
            mat.pack(simd, k.clone(), columns.clone(), &mut blocks[at..][..k.len() * whole::<S>(columns.len())]);
        }
        Packed { mat, blocks, panel }
    }
}

impl Right for Packed<'_> {
    fn rows(&self) -> usize {
        self.mat.rows
    }

    fn columns(&self) -> usize {
        self.mat.cols
    }

    #[inline(always)]
    fn unpacked<S: Simd>(&self, rows: usize) -> Option<(&[f32], usize)> {
        self.mat.unpacked::<S>(rows)
    }

    #[inline(always)]
    fn packed<S: Simd>(&self, k: Range<usize>, columns: Range<usize>) -> Option<&[f32]> {
        let there = !self.blocks.is_empty() && self.panel == tile::<S>().1 * S::F32_LANES;
        there.then(|| &self.blocks[columns.start * self.mat.rows + k.start * whole::<S>(columns.len())..])
    }

    #[inline(always)]
    fn pack<S: Simd>(&self, simd: S, k: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        self.mat.pack(simd, k, columns, out);
    }
}

/// [`Right::pack`] from `depth` rows of `columns` values.
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
            (0..columns).step_by(LINE).for_each(|at| super::fetch(row, at));
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

/// [`Right::pack`] from `columns` lines of `depth` values, each a column.
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

/// Rows of a tile, at most.
const ROWS: usize = 8;

/// Tiles' rows of the left matrix that are packed together, while its cache lines stay in the first-level cache: so many, and
/// values.
const TILES: usize = 8;
const LEFT: usize = 1 << 14;

/// Panels of a product whose left matrix is read as it lies by columns, at most: for more of them it is as well to pack it.
const FEW: usize = 3;

/// Values of a cache line.
const LINE: usize = 16;

/// The most rows and vectors of a tile, whose sums fill the registers but for the operands.
#[inline(always)]
fn tile<S: Simd>() -> (usize, usize) {
    if S::REGISTER_COUNT >= 32 { (ROWS, 3) } else { (6, 2) }
}

/// `0..columns` in panels as wide as a tile at most.
#[inline(always)]
fn panels<S: Simd>(columns: usize) -> impl Iterator<Item = Range<usize>> {
    even(columns, S::F32_LANES, tile::<S>().1 * S::F32_LANES)
}

/// `columns`, in whole vectors.
#[inline(always)]
fn whole<S: Simd>(columns: usize) -> usize {
    columns.div_ceil(S::F32_LANES) * S::F32_LANES
}

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
pub(super) fn transpose<'a, S: Simd>(
    simd: S,
    lines: usize,
    line: impl Fn(usize) -> &'a [f32],
    (depth, width): (usize, usize),
    out: &mut [f32],
    stride: usize,
) {
    // As many at once as stay in the first-level cache.
    for ks in even(depth, S::F32_LANES, AT_ONCE) {
        for j in (0..width).step_by(SIDE) {
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

/// A product of which either matrix may become the packed one.
struct Either<'a> {
    c: &'a mut [f32],
    a: Mat<'a>,
    b: Mat<'a>,
    start: Start<'a>,
    finish: Finish,
}

impl WithSimd for Either<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Either { c, a, b, start, finish } = self;
        // About the cycles: a multiply-add a vector, and moving what is packed or stored across.
        let cost = |left: Mat<'_>, right: Mat<'_>| {
            let (rows, packed) = (left.rows * left.cols, right.rows * right.cols);
            rows * right.cols.div_ceil(S::F32_LANES)
                + if left.unpacked_left::<S>(right.cols).is_some() { 0 } else { rows / 2 }
                + match (right.unpacked::<S>(left.rows), right.strides.1) {
                    (Some(_), _) => 0,
                    (None, 1) => packed / 8,
                    (None, _) => packed / 2,
                }
        };
        let across = 2 * c.len() * a.cols.div_ceil(depth::<S>(a.rows));
        let c_stride = b.cols;
        if cost(b.t(), a.t()) + across < cost(a, b) {
            let start = match start {
                Start::Rows(bias) => Start::Columns(bias),
                Start::Columns(bias) => Start::Rows(bias),
                same @ (Start::Zero | Start::Old) => same,
            };
            Product { c_stride, across: true, finish, ..Product::of(c, b.t(), a.t(), start) }.with_simd(simd);
        } else {
            Product { finish, ..Product::of(c, a, b, start) }.with_simd(simd);
        }
    }
}

/// Steps of `k` in a block, more where there are few columns.
const DEPTH: usize = 512;

/// Values of the right matrix that are packed at once: half of a second-level cache.
const PACKED: usize = 1 << 17;

/// Steps of `k` in a block of a right matrix with `columns`.
#[inline(always)]
fn depth<S: Simd>(columns: usize) -> usize {
    DEPTH.max(PACKED / whole::<S>(columns).max(1))
}

/// The blocks of a `(k, n)` right matrix that are packed at once: their columns, and steps of `k`.
#[inline(always)]
fn blocks<S: Simd>(k: usize, n: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    let panel = tile::<S>().1 * S::F32_LANES;
    let depth = k.min(depth::<S>(n)).max(1);
    let most = (PACKED / depth / panel).max(1) * panel;
    even(n, panel, most).flat_map(move |columns| even(k, 1, depth).map(move |k| (columns.clone(), k)))
}

thread_local! {
    /// The packed block of the right matrix, and the packed rows of the left one: taken while a product runs.
    static PACK: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// A product of rows and a packed matrix.
struct Product<'a, R> {
    c: &'a mut [f32],
    c_stride: usize,
    /// Whether `c` is the product's transpose.
    across: bool,
    left: Mat<'a>,
    right: R,
    start: Start<'a>,
    finish: Finish,
    triangle: Triangle,
}

impl<'a, R: Right> Product<'a, R> {
    /// All of `c = start + left right`.
    fn of(c: &'a mut [f32], left: Mat<'a>, right: R, start: Start<'a>) -> Product<'a, R> {
        let (c_stride, finish, triangle) = (right.columns(), Finish::Keep, Triangle::Full);
        Product { c, c_stride, across: false, left, right, start, finish, triangle }
    }
}

/// `0..len` in ranges of about the same length, a multiple of `unit` and `most` at most; an empty one where `len` is 0.
#[inline(always)]
pub(super) fn even(len: usize, unit: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let each = len.div_ceil(unit).div_ceil(len.div_ceil(most).max(1)).max(1) * unit;
    (0..len.div_ceil(each).max(1)).map(move |i| i * each..((i + 1) * each).min(len))
}

/// Packs a block, in code of its own.
struct Pack<'a, S, R> {
    simd: S,
    right: &'a R,
    k: Range<usize>,
    columns: Range<usize>,
    out: &'a mut [f32],
}

impl<S: Simd, R: Right> WithSimd for Pack<'_, S, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<T: Simd>(self, _: T) {
        self.right.pack(self.simd, self.k, self.columns, self.out);
    }
}

impl<R: Right> WithSimd for Product<'_, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut pack = PACK.take();
        self.run(simd, &mut pack);
        PACK.set(pack);
    }
}

impl<R: Right> Product<'_, R> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S, pack: &mut Vec<f32>) {
        let Product { c, c_stride, across, left, right, start, finish, triangle } = self;
        let rows_max = tile::<S>().0;
        let blocks = || blocks::<S>(left.cols, right.columns());
        // The first one is the largest.
        let (depth_max, right_len) =
            blocks().next().map_or((0, 0), |(columns, k)| (k.len(), k.len() * whole::<S>(columns.len())));
        // A cache line to begin on.
        let left_each = rows_max * depth_max + ROWS;
        let tiles = (LEFT / left_each).clamp(if triangle.cuts() { GROUP.div_ceil(rows_max) } else { 1 }, TILES);
        let lie = left.unpacked_left::<S>(right.columns());
        let (unit, together) = match lie {
            _ if triangle.cuts() => (GROUP, GROUP),
            Some(_) => (rows_max, left.rows.max(1)),
            None => (rows_max, tiles * rows_max),
        };
        let room = right_len + tiles * left_each + LINE;
        if pack.len() < room {
            pack.resize(room, 0.0);
        }
        let begin = pack.as_ptr().align_offset(64).min(LINE);
        let (packed_right, packed_left) = pack[begin..].split_at_mut(right_len);

        for (columns, k) in blocks() {
            let panel = panels::<S>(columns.len()).next().map_or(1, |panel| whole::<S>(panel.len()));
            let (first, last) = (k.start == 0, k.end == left.cols);
            let packed = right.packed::<S>(k.clone(), columns.clone());
            let unpacked = right.unpacked::<S>(left.rows).filter(|_| packed.is_none());
            if packed.is_none() && unpacked.is_none() {
                let (k, columns, out) = (k.clone(), columns.clone(), &mut *packed_right);
                simd.vectorize(Pack { simd, right: &right, k, columns, out });
            }
            let (b, b_stride) = match unpacked {
                Some((b, stride)) => (&b[k.start * stride + columns.start..], Some(stride)),
                None => (packed.unwrap_or(packed_right), None),
            };
            for some in even(left.rows, unit, together) {
                let steps = triangle.steps(&some, k.clone());
                let rows = || even(some.len(), 1, rows_max).map(|rows| some.start + rows.start..some.start + rows.end);
                if lie.is_none() {
                    for (rows, to) in rows().zip(packed_left.chunks_exact_mut(left_each)) {
                        for (i, k) in steps.clone().enumerate() {
                            let from = &left.data[k * left.strides.1 + rows.start..];
                            copy_short(from, &mut to[i * rows.len()..], rows.len());
                        }
                    }
                }
                for (rows, at_left) in rows().zip((0..tiles).cycle().map(|i| i * left_each)) {
                    let all = columns.start;
                    // What is packed is a block's, of all its columns.
                    let columns = match b_stride {
                        Some(_) => triangle.columns::<S>(&rows, columns.clone()),
                        None => columns.clone(),
                    };
                    let at = if across {
                        columns.start * c_stride + rows.start
                    } else {
                        rows.start * c_stride + columns.start
                    };
                    let strip = Strip {
                        a: match lie {
                            // Without any steps of `k` it has no values.
                            Some(_) => {
                                let at = rows.start * left.strides.0 + steps.start * left.strides.1;
                                left.data.get(at..).unwrap_or(&[])
                            }
                            None => &packed_left[at_left..],
                        },
                        lie: lie.unwrap_or(Lie::Columns(rows.len())),
                        b: &b[columns.start - all..],
                        b_stride,
                        b_depth: k.len(),
                        before: steps.start - k.start,
                        depth: steps.len(),
                        c_stride,
                        across,
                        columns: columns.len(),
                        panel,
                        start: match start {
                            _ if !first => Start::Old,
                            Start::Columns(bias) => Start::Columns(&bias[columns.clone()]),
                            Start::Rows(bias) => Start::Rows(&bias[rows.clone()]),
                            same @ (Start::Zero | Start::Old) => same,
                        },
                        finish: if last { finish } else { Finish::Keep },
                    };
                    strip.run(simd, rows.len(), &mut c[at..]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
