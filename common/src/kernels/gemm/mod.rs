//! Matrix products, and the law that the trainer leans on.
//!
//! **Every value of `A B` is one defined sum**: a chain of fused multiply-adds over `k` in order, from a start (zero, the
//! old value, or a bias), rounded once a step:
//!
//! ```text
//! c = start;  for k in 0..depth { c = fma(a[i, k], b[k, j], c) };  c = finish(c)
//! ```
//!
//! A gradient may then go on through an activation ([`Through`]): once, when its sum is complete.
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

mod finish;
mod pack;
mod tile;
mod triangle;

pub use finish::{Finish, Through};
pub(super) use pack::transpose;
pub use pack::{pack_columns, pack_rows, transposed};
pub use tile::Start;
pub use triangle::{GROUP, Triangle};

use pack::pack_strips;
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
    product_apart(c, b.cols, a, b, start, finish);
}

/// [`product`] with rows of `c` that begin `c_stride` apart; what lies between them stays as it is.
///
/// # Panics
/// Where the shapes do not fit.
pub fn product_apart(c: &mut [f32], c_stride: usize, a: Mat<'_>, b: Mat<'_>, start: Start<'_>, finish: Finish) {
    either(Either { c, c_stride, a, b, start, finish, through: None });
}

/// `c = a b`, the gradient of an activation's outputs, or, `through` it, that of its inputs; with the shapes of [`gemm`], and at least
/// `(m, n)` values, row-major, that tell the slopes.
///
/// # Panics
/// Where the shapes do not fit.
pub fn product_through(c: &mut [f32], a: Mat<'_>, b: Mat<'_>, through: Option<Through<'_>>) {
    assert!(through.is_none_or(|through| through.values().len() >= a.rows * b.cols), "slopes for all values");
    either(Either { c, c_stride: b.cols, a, b, start: Start::Zero, finish: Finish::Keep, through });
}

/// Runs it, with values of `c` that belong to it alone.
fn either(Either { c, c_stride, a, b, start, finish, through }: Either<'_>) {
    assert_eq!(a.cols, b.rows, "a product of {}x{} and {}x{}", a.rows, a.cols, b.rows, b.cols);
    assert!(c_stride >= b.cols, "rows of {} values {c_stride} apart", b.cols);
    if a.rows > 0 && b.cols > 0 {
        let c = &mut c[..(a.rows - 1) * c_stride + b.cols];
        super::isa::arch().dispatch(Either { c, c_stride, a, b, start, finish, through });
    }
}

/// [`product`] with any right matrix.
///
/// # Panics
/// Where the shapes do not fit.
pub fn product_with<R: Right>(c: &mut [f32], a: Mat<'_>, right: R, start: Start<'_>, finish: Finish) {
    let columns = right.columns();
    product_with_apart(c, columns, a, right, start, finish);
}

/// [`product_apart`] with any right matrix.
///
/// # Panics
/// Where the shapes do not fit.
pub fn product_with_apart<R: Right>(
    c: &mut [f32],
    c_stride: usize,
    a: Mat<'_>,
    right: R,
    start: Start<'_>,
    finish: Finish,
) {
    assert_eq!(a.cols, right.rows(), "a product of {} columns and {} rows", a.cols, right.rows());
    assert!(c_stride >= right.columns(), "rows of {} values {c_stride} apart", right.columns());
    if a.rows > 0 && right.columns() > 0 {
        let c = &mut c[..(a.rows - 1) * c_stride + right.columns()];
        super::isa::arch().dispatch(Product { c_stride, finish, ..Product::of(c, a, right, start) });
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
    /// second, where they are read a few times only: somewhat more often, where a tile reads whole cache lines of each that do not share
    /// places, either. If they are read often, panels in order are worth their packing.
    #[inline(always)]
    fn unpacked<S: Simd>(&self, rows: usize) -> Option<(&[f32], usize)> {
        let lie_in_rows = self.rows > 0 && self.strides.1 == 1 && self.strides.0 >= self.cols;
        let whole = lie_in_rows && self.cols.is_multiple_of(S::F32_LANES);
        let (values, apart) = (self.rows * self.cols, !self.strides.0.is_multiple_of(16 * LINE));
        let small = values <= NEAR && (apart || self.strides.0 == self.cols);
        let often = if S::F32_LANES >= LINE && apart { 32 * ROWS } else { 4 * ROWS };
        let near = values <= 2 * PACKED && rows <= often;
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
    /// of the first-level cache. Narrow panels are many: for them all has to lie in that cache. Columns as short as a tile lie as
    /// packed ones do.
    #[inline(always)]
    fn unpacked_left<S: Simd>(&self, columns: usize) -> Option<Lie> {
        let (rows, apart) = self.strides;
        let few = columns <= FEW * tile::<S>().1 * S::F32_LANES && !apart.is_multiple_of(32 * LINE);
        let near = if has_wide_panels::<S>() {
            apart <= 16 * LINE
        } else {
            self.rows * self.cols <= NEAR && (apart == self.rows || !apart.is_multiple_of(16 * LINE))
        };
        match apart {
            1 => Some(Lie::Rows(rows)),
            _ => (apart > ROWS && (near || few)).then_some(Lie::Columns(apart)),
        }
    }

    /// [`pack_strips`] of `rows`, of a left matrix that lies by columns.
    #[inline(always)]
    fn pack_left<S: Simd>(&self, rows: &Range<usize>, k: Range<usize>, each: usize, out: &mut [f32], apart: usize) {
        let line = |i| &self.data[(k.start + i) * self.strides.1 + rows.start..];
        let most = tile::<S>().0;
        // Most are as high as a tile may be, and have code of their own.
        if each == most {
            pack_strips(line, k.len(), rows.len(), most, out, apart);
        } else {
            pack_strips(line, k.len(), rows.len(), each, out, apart);
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

/// Rows of a tile, at most.
const ROWS: usize = 8;

/// Tiles' rows of the left matrix that are packed together: so many, which are whole cache lines of it, or fewer where blocks are deep,
/// two at least where they fit; and values.
const TILES: usize = 8;
const LEFT: usize = TILES * ROWS * (DEPTH + 1);

/// Panels of a product whose left matrix is read as it lies by columns, at most: for more of them it is as well to pack it.
const FEW: usize = 3;

/// Values of a cache line.
const LINE: usize = 16;

/// The most rows and vectors of a tile, whose sums fill the registers but for the operands.
#[inline(always)]
fn tile<S: Simd>() -> (usize, usize) {
    if S::REGISTER_COUNT >= 32 { (ROWS, 3) } else { (6, 2) }
}

/// Whether a tile has columns of several cache lines, as with AVX-512.
#[inline(always)]
fn has_wide_panels<S: Simd>() -> bool {
    tile::<S>().1 * S::F32_LANES >= 2 * LINE
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

/// A product of which either matrix may become the packed one.
struct Either<'a> {
    c: &'a mut [f32],
    c_stride: usize,
    a: Mat<'a>,
    b: Mat<'a>,
    start: Start<'a>,
    finish: Finish,
    through: Option<Through<'a>>,
}

impl WithSimd for Either<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Either { c, c_stride, a, b, start, finish, through } = self;
        // About the cycles: a multiply-add a vector, and moving what is packed or stored across.
        let cost = |left: Mat<'_>, right: Mat<'_>| {
            let (rows, packed) = (left.rows * left.cols, right.rows * right.cols);
            rows * right.cols.div_ceil(S::F32_LANES)
                + if left.unpacked_left::<S>(right.cols).is_some() { 0 } else { rows / 2 }
                + match (right.unpacked::<S>(left.rows), right.strides.1) {
                    (Some(_), _) => 0,
                    (None, 1) => packed / 8,
                    (None, _) if has_wide_panels::<S>() => packed / 2,
                    (None, _) => 2 * packed,
                }
        };
        let across = 2 * a.rows * b.cols * a.cols.div_ceil(depth::<S>(a.rows));
        if cost(b.t(), a.t()) + across < cost(a, b) {
            let start = match start {
                Start::Rows(bias) => Start::Columns(bias),
                Start::Columns(bias) => Start::Rows(bias),
                same @ (Start::Zero | Start::Old) => same,
            };
            Product { c_stride, across: true, finish, through, ..Product::of(c, b.t(), a.t(), start) }.with_simd(simd);
        } else {
            Product { c_stride, finish, through, ..Product::of(c, a, b, start) }.with_simd(simd);
        }
    }
}

/// Steps of `k` in a block, more where there are few columns.
const DEPTH: usize = 512;

/// Values of the right matrix that are packed at once: half of a second-level cache.
const PACKED: usize = 1 << 17;

/// Values that stay in a first-level cache.
const NEAR: usize = 1 << 13;

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
    through: Option<Through<'a>>,
    triangle: Triangle,
}

impl<'a, R: Right> Product<'a, R> {
    /// All of `c = start + left right`.
    fn of(c: &'a mut [f32], left: Mat<'a>, right: R, start: Start<'a>) -> Product<'a, R> {
        let (c_stride, finish, triangle) = (right.columns(), Finish::Keep, Triangle::Full);
        Product { c, c_stride, across: false, left, right, start, finish, through: None, triangle }
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
        let Product { c, c_stride, across, left, right, start, finish, through, triangle } = self;
        let rows_max = tile::<S>().0;
        let blocks = || blocks::<S>(left.cols, right.columns());
        // The first one is the largest.
        let (depth_max, right_len) =
            blocks().next().map_or((0, 0), |(columns, k)| (k.len(), k.len() * whole::<S>(columns.len())));
        // A cache line to begin on.
        let left_each = rows_max * depth_max + ROWS;
        let tiles = (LEFT / left_each / 2 * 2).clamp(if triangle.cuts() { GROUP.div_ceil(rows_max) } else { 1 }, TILES);
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
                    let each = rows().next().map_or(0, |rows| rows.len());
                    left.pack_left::<S>(&some, steps.clone(), each, packed_left, left_each);
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
                        through: through.filter(|_| last).map(|through| through.from(at)),
                    };
                    strip.run(simd, rows.len(), &mut c[at..]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
