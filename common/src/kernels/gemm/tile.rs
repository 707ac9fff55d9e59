//! The register tile: the one loop in which multiply-adds happen.

use super::LINE;
use super::finish::{Finish, PassLines, Through};
use crate::kernels::fetch;
use pulp::{Simd, WithSimd};
use std::marker::PhantomData;
use std::ops::Range;

/// What a sum starts with.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    Zero,
    /// The value that is there.
    Old,
    /// A value a column.
    Columns(&'a [f32]),
    /// A value a row.
    Rows(&'a [f32]),
}

/// How a few rows lie in a slice.
#[derive(Clone, Copy)]
pub enum Lie {
    /// Each row's values side by side, so far from row to row; those of the next strip are fetched early.
    Rows(usize),
    /// Each column's values side by side, so far from column to column; the next columns are fetched early, where they lie apart.
    Columns(usize),
}

/// `c = finish(start + a b)`, which may go on through an activation, for a few rows and all columns of a block of `b`, panel by panel.
#[derive(Clone, Copy)]
pub struct Strip<'a> {
    pub a: &'a [f32],
    /// How the rows lie in `a`.
    pub lie: Lie,
    pub b: &'a [f32],
    /// Values between rows of a panel; without, it is as wide as its vectors.
    pub b_stride: Option<usize>,
    /// Steps of `k` in `b`, those before the first, and all that are taken.
    pub b_depth: usize,
    pub before: usize,
    pub depth: usize,
    /// Values between rows of `c`; between columns, where `across`.
    pub c_stride: usize,
    /// Whether `c` is the product's transpose.
    pub across: bool,
    pub columns: usize,
    /// Columns of all panels but the last, which may have fewer: whole vectors.
    pub panel: usize,
    /// Of these rows and columns.
    pub start: Start<'a>,
    pub finish: Finish,
    /// Where the product goes on through an activation's gradient: from the strip's first value on.
    pub through: Option<Through<'a>>,
}

impl Strip<'_> {
    /// For `rows` in `1..=8` and panels of up to 3 vectors, or what [`super::tile`] says; each pair has its own loop.
    #[inline(always)]
    pub fn run<S: Simd>(self, simd: S, rows: usize, c: &mut [f32]) {
        let most = super::tile::<S>();
        macro_rules! tiles {
            ($panels:expr, $($rows:literal),+; $vectors:tt) => {
                match rows {
                    $($rows if $rows <= most.0 => tiles!($panels, $rows, $vectors),)+
                    _ => unreachable!("{rows} rows"),
                }
            };
            ($panels:expr, $rows:literal, [$($vectors:literal),+]) => {{
                let (strip, panels): (Self, std::ops::Range<usize>) = (self, $panels);
                match (strip.columns.min(panels.start + strip.panel) - panels.start).div_ceil(S::F32_LANES) {
                    $($vectors if $vectors <= most.1 => {
                        simd.vectorize(Panels::<S, $rows, $vectors> { simd, strip, panels, c: &mut *c })
                    })+
                    vectors => unreachable!("{vectors} vectors"),
                }
            }};
        }
        let whole = self.columns / self.panel * self.panel;
        for panels in [0..whole, whole..self.columns] {
            if !panels.is_empty() {
                tiles!(panels, 1, 2, 3, 4, 5, 6, 7, 8; [1, 2, 3]);
            }
        }
    }
}

/// The columns `panels` of a strip with `ROWS` rows, in panels of `VECTORS` vectors.
struct Panels<'a, S: Simd, const ROWS: usize, const VECTORS: usize> {
    simd: S,
    strip: Strip<'a>,
    panels: Range<usize>,
    c: &'a mut [f32],
}

impl<S: Simd, const ROWS: usize, const VECTORS: usize> WithSimd for Panels<'_, S, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<T: Simd>(self, _: T) {
        let Strip { a, lie, depth, .. } = self.strip;
        match lie {
            Lie::Rows(stride) => self.run(Rows::<ROWS, false>::new(a, stride, depth)),
            Lie::Columns(stride) => self.run(Rows::<ROWS, true>::new(a, stride, depth)),
        }
    }
}

impl<S: Simd, const ROWS: usize, const VECTORS: usize> Panels<'_, S, ROWS, VECTORS> {
    #[inline(always)]
    fn run<const COLUMNS: bool>(self, a: Rows<'_, ROWS, COLUMNS>) {
        let Panels { simd, strip, panels, c } = self;
        let width = VECTORS * S::F32_LANES;
        for from in panels.clone().step_by(width) {
            let columns = width.min(panels.end - from);
            let b = match strip.b_stride {
                // Without any steps of `k` it has no values.
                Some(stride) => {
                    let b = strip.b.get(from + strip.before * stride..).unwrap_or(&[]);
                    Lines::<S::f32s, VECTORS>::new(b, stride, strip.depth)
                }
                None => {
                    let b = &strip.b[from * strip.b_depth + strip.before * width..];
                    Lines::<S::f32s, VECTORS>::new(b, width, strip.depth)
                }
            };
            let at = if strip.across { from * strip.c_stride } else { from };
            let (c, through) = (&mut c[at..], strip.through.map(|through| through.from(at)));
            let mut tile = Tile::<S, ROWS, VECTORS> { simd, c, stride: strip.c_stride, columns };
            let start = match strip.start {
                Start::Columns(values) => Start::Columns(&values[from..][..columns]),
                same => same,
            };
            let sums = if strip.across {
                tile.load_across(start)
            } else {
                if strip.depth > 2 * LINE {
                    tile.fetch(tile.c);
                    if let Some(through) = through {
                        tile.fetch(through.values());
                    }
                }
                tile.load(start)
            };
            let fetches = if COLUMNS { a.stride > ROWS } else { from == 0 };
            let sums = multiply_add(simd, a, b, fetches, sums);
            // By value, so that the sums above are never indexed at run time, and live in registers.
            let sums = sums.map(|row| row.map(|x| strip.finish.of_vector(simd, x)));
            if strip.across {
                tile.store_across(sums)
            } else {
                tile.store(sums)
            }
            if let Some(through) = through {
                let (lines, len) = if strip.across { (columns, ROWS) } else { (ROWS, columns) };
                simd.vectorize(PassLines { through, c: tile.c, stride: strip.c_stride, lines, len });
            }
        }
    }
}

/// `ROWS` rows of `VECTORS` vectors, of which only `columns` values may exist.
type Sums<S, const ROWS: usize, const VECTORS: usize> = [[<S as Simd>::f32s; VECTORS]; ROWS];

/// Where a tile's sums come from, and go.
struct Tile<'a, S: Simd, const ROWS: usize, const VECTORS: usize> {
    simd: S,
    c: &'a mut [f32],
    stride: usize,
    columns: usize,
}

impl<S: Simd, const ROWS: usize, const VECTORS: usize> Tile<'_, S, ROWS, VECTORS> {
    const WIDTH: usize = VECTORS * S::F32_LANES;

    /// Brings closer the tile's values of what lies as `c` does.
    #[inline(always)]
    fn fetch(&self, values: &[f32]) {
        for r in 0..ROWS {
            for at in (0..Self::WIDTH).step_by(LINE) {
                fetch(values, r * self.stride + at);
            }
        }
    }

    /// What the sums start with, but for old values.
    #[inline(always)]
    fn first(&self, start: Start<'_>) -> Option<Sums<S, ROWS, VECTORS>> {
        let simd = self.simd;
        match start {
            Start::Zero => Some([[simd.splat_f32s(0.0); VECTORS]; ROWS]),
            Start::Rows(values) => {
                let values: &[f32; ROWS] = values.try_into().expect("a value a row");
                Some(values.map(|value| [simd.splat_f32s(value); VECTORS]))
            }
            Start::Columns(values) => Some([load(simd, values, self.columns); ROWS]),
            Start::Old => None,
        }
    }

    #[inline(always)]
    fn load(&self, start: Start<'_>) -> Sums<S, ROWS, VECTORS> {
        let row = |r| load(self.simd, &self.c[r * self.stride..], self.columns);
        self.first(start).unwrap_or_else(|| std::array::from_fn(row))
    }

    #[inline(always)]
    fn load_across(&self, start: Start<'_>) -> Sums<S, ROWS, VECTORS> {
        self.first(start).unwrap_or_else(|| {
            let mut lines = [[0.0; MOST]; ROWS];
            for j in 0..self.columns {
                let from = &self.c[j * self.stride..][..ROWS];
                for r in 0..ROWS {
                    lines[r][j] = from[r];
                }
            }
            lines.map(|line| load(self.simd, &line, Self::WIDTH))
        })
    }

    #[inline(always)]
    fn store(&mut self, sums: Sums<S, ROWS, VECTORS>) {
        for (r, row) in sums.into_iter().enumerate() {
            let to = &mut self.c[r * self.stride..][..self.columns];
            match <&mut [S::f32s; VECTORS]>::try_from(S::as_mut_simd_f32s(to).0) {
                Ok(whole) => *whole = row,
                Err(_) => store(self.simd, to, row),
            }
        }
    }

    #[inline(always)]
    fn store_across(&mut self, sums: Sums<S, ROWS, VECTORS>) {
        let mut lines = [[0.0; MOST]; ROWS];
        lines.iter_mut().zip(sums).for_each(|(line, row)| store(self.simd, &mut line[..Self::WIDTH], row));
        for j in 0..self.columns {
            let to = &mut self.c[j * self.stride..][..ROWS];
            for r in 0..ROWS {
                to[r] = lines[r][j];
            }
        }
    }
}

/// Steps of `k` whose code is written out.
const UNROLLED: usize = 4;

/// `sums + a b`.
#[inline(always)]
fn multiply_add<S: Simd, const ROWS: usize, const VECTORS: usize, const COLUMNS: bool>(
    simd: S,
    a: Rows<'_, ROWS, COLUMNS>,
    b: Lines<'_, S::f32s, VECTORS>,
    fetches: bool,
    mut sums: [[S::f32s; VECTORS]; ROWS],
) -> [[S::f32s; VECTORS]; ROWS] {
    macro_rules! add {
        ($k:expr) => {
            let b = b.at($k);
            for r in 0..ROWS {
                let a = simd.splat_f32s(a.at(r, $k));
                for v in 0..VECTORS {
                    sums[r][v] = simd.mul_add_f32s(a, b[v], sums[r][v]);
                }
            }
        };
    }
    // Between two rounds of fetching ahead, a cache line of steps.
    for line in (0..a.depth).step_by(LINE) {
        if fetches {
            a.fetch(line);
        }
        let end = a.depth.min(line + LINE);
        let mut k = line;
        while k + UNROLLED <= end {
            for i in 0..UNROLLED {
                add!(k + i);
            }
            k += UNROLLED;
        }
        for k in k..end {
            add!(k);
        }
    }
    sums
}

/// Columns of the widest tile.
const MOST: usize = 48;

/// The first `len` values, then zeros.
#[inline(always)]
fn load<S: Simd, const VECTORS: usize>(simd: S, from: &[f32], len: usize) -> [S::f32s; VECTORS] {
    let from = &from[..len];
    match S::as_simd_f32s(from).0.first_chunk() {
        Some(whole) => *whole,
        None => std::array::from_fn(|v| simd.partial_load_f32s(&from[len.min(v * S::F32_LANES)..])),
    }
}

/// The first values of the vectors.
#[inline(always)]
fn store<S: Simd, const VECTORS: usize>(simd: S, to: &mut [f32], vectors: [S::f32s; VECTORS]) {
    for (v, vector) in vectors.into_iter().enumerate() {
        let from = to.len().min(v * S::F32_LANES);
        simd.partial_store_f32s(&mut to[from..], vector);
    }
}

/// `ROWS` rows of `depth` values, all of them known to be inside their slice: `stride` apart, or their `COLUMNS` are.
#[derive(Clone, Copy)]
struct Rows<'a, const ROWS: usize, const COLUMNS: bool> {
    data: &'a [f32],
    stride: usize,
    depth: usize,
}

#[allow(unsafe_code, reason = "a check a value would cost as much as the multiply-adds")]
impl<'a, const ROWS: usize, const COLUMNS: bool> Rows<'a, ROWS, COLUMNS> {
    #[inline(always)]
    fn new(data: &'a [f32], stride: usize, depth: usize) -> Self {
        let (rows, columns) = if COLUMNS { (1, stride) } else { (stride, 1) };
        let last = (ROWS - 1).checked_mul(rows).zip(depth.saturating_sub(1).checked_mul(columns));
        let inside = last.and_then(|(r, k)| r.checked_add(k)).is_some_and(|last| last < data.len());
        assert!(inside || depth == 0, "{ROWS} rows of {depth} values, {rows} and {columns} apart, in {}", data.len());
        Rows { data, stride, depth }
    }

    /// The place of value `k` of row `r`.
    #[inline(always)]
    fn place(&self, r: usize, k: usize) -> usize {
        if COLUMNS { k * self.stride + r } else { r * self.stride + k }
    }

    /// The value `k` of row `r`, both of which must exist.
    #[inline(always)]
    fn at(&self, r: usize, k: usize) -> f32 {
        debug_assert!(r < ROWS && k < self.depth);
        // SAFETY: callers are in this file and ask for `r < ROWS`, `k < depth`; `new` checked that the last of them is inside.
        unsafe { *self.data.get_unchecked(self.place(r, k)) }
    }

    /// Brings closer what follows a cache line of steps from `k`: as many columns, or the next strip's rows.
    #[inline(always)]
    fn fetch(&self, k: usize) {
        if COLUMNS {
            for k in k + LINE..k + 2 * LINE {
                fetch(self.data, self.place(0, k));
            }
        } else {
            for r in ROWS..2 * ROWS {
                fetch(self.data, self.place(r, k));
            }
        }
    }
}

/// `VECTORS` vectors at a fixed distance from line to line, all of them known to be inside their slice.
#[derive(Clone, Copy)]
struct Lines<'a, V, const VECTORS: usize> {
    data: &'a [f32],
    stride: usize,
    depth: usize,
    of: PhantomData<V>,
}

#[allow(unsafe_code, reason = "as above")]
impl<'a, V: bytemuck::AnyBitPattern, const VECTORS: usize> Lines<'a, V, VECTORS> {
    #[inline(always)]
    fn new(data: &'a [f32], stride: usize, depth: usize) -> Self {
        let (width, last) = (VECTORS * size_of::<V>() / size_of::<f32>(), depth.saturating_sub(1).checked_mul(stride));
        let inside = last.and_then(|last| last.checked_add(width)).is_some_and(|end| end <= data.len());
        assert!(inside || depth == 0, "{depth} lines of {width} values at {stride} in {}", data.len());
        Lines { data, stride, depth, of: PhantomData }
    }

    /// The vectors of line `k`, which must exist.
    #[inline(always)]
    fn at(&self, k: usize) -> [V; VECTORS] {
        debug_assert!(k < self.depth);
        // SAFETY: callers are in this file and ask for `k < depth`; `new` checked that the last line is inside. A vector may be
        // any bits, and is read from wherever it lies.
        unsafe { self.data.as_ptr().add(k * self.stride).cast::<[V; VECTORS]>().read_unaligned() }
    }
}
