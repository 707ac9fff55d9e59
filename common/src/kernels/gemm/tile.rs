//! The register tile: the one loop in which multiply-adds happen.

use super::LINE;
use pulp::{Simd, WithSimd};
use std::marker::PhantomData;

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

/// What becomes of a sum when it is complete.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Finish {
    Keep,
    /// `max(x, 0)`; NaN stays.
    Relu,
    /// `x` where `x > 0`, else `slope x`.
    LeakyRelu {
        slope: f32,
    },
}

impl Finish {
    /// Of one value.
    #[inline(always)]
    pub fn of(self, x: f32) -> f32 {
        match self {
            Finish::Keep => x,
            Finish::Relu => {
                if x > 0.0 || x.is_nan() {
                    x
                } else {
                    0.0
                }
            }
            Finish::LeakyRelu { slope } => {
                if x > 0.0 {
                    x
                } else {
                    slope * x
                }
            }
        }
    }

    /// The gradient of what it took, from that of its outputs `y`, which tell where it goes.
    #[inline(always)]
    pub fn gradient(self, y: &[f32], dy: &[f32], dx: &mut [f32]) {
        let all = dx.iter_mut().zip(y.iter().zip(dy));
        match self {
            Finish::Keep => dx.copy_from_slice(dy),
            Finish::Relu => all.for_each(|(dx, (y, dy))| *dx = if *y > 0.0 { *dy } else { 0.0 }),
            Finish::LeakyRelu { slope } => all.for_each(|(dx, (y, dy))| *dx = if *y > 0.0 { *dy } else { slope * dy }),
        }
    }

    /// Of a vector of them.
    #[inline(always)]
    pub fn of_vector<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        let zero = simd.splat_f32s(0.0);
        match self {
            Finish::Keep => x,
            Finish::Relu => simd.select_f32s(simd.less_than_or_equal_f32s(x, zero), zero, x),
            Finish::LeakyRelu { slope } => {
                let scaled = simd.mul_f32s(simd.splat_f32s(slope), x);
                simd.select_f32s(simd.greater_than_f32s(x, zero), x, scaled)
            }
        }
    }
}

/// `c = finish(start + a b)` for a few rows and a few vectors of columns.
pub struct Step<'a> {
    /// `a[r * a_strides.0 + k * a_strides.1]`.
    pub a: &'a [f32],
    pub a_strides: (usize, usize),
    /// Values of `a` between these rows and those of the next tile, to fetch them early.
    pub ahead: Option<usize>,
    /// `(depth, vectors of columns)`.
    pub b: &'a [f32],
    /// Values between rows of `b`.
    pub b_stride: usize,
    /// Rows of `b`.
    pub depth: usize,
    pub c: &'a mut [f32],
    /// Values between rows of `c`; between columns, where `across`.
    pub c_stride: usize,
    /// Whether the tile is to be stored as its transpose.
    pub across: bool,
    /// Columns that exist.
    pub columns: usize,
    /// Of this tile's rows and columns.
    pub start: Start<'a>,
    pub finish: Finish,
}

impl Step<'_> {
    /// For `rows` in `1..=8` and `vectors` in `1..=3`, each pair of which has its own loop.
    #[inline(always)]
    pub fn run<S: Simd>(self, simd: S, rows: usize, vectors: usize) {
        macro_rules! tiles {
            ($($rows:literal),+; $vectors:tt) => {
                match rows {
                    $($rows => tiles!($rows, $vectors),)+
                    _ => unreachable!("{rows} rows"),
                }
            };
            ($rows:literal, [$($vectors:literal),+]) => {
                match vectors {
                    $($vectors => simd.vectorize(Tile::<S, $rows, $vectors> { simd, step: self }),)+
                    _ => unreachable!("{vectors} vectors"),
                }
            };
        }
        tiles!(1, 2, 3, 4, 5, 6, 7, 8; [1, 2, 3]);
    }
}

/// A step for `ROWS` rows and `VECTORS` vectors.
struct Tile<'a, S: Simd, const ROWS: usize, const VECTORS: usize> {
    simd: S,
    step: Step<'a>,
}

impl<S: Simd, const ROWS: usize, const VECTORS: usize> WithSimd for Tile<'_, S, ROWS, VECTORS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<T: Simd>(self, _: T) {
        let Tile { simd, step } = self;
        let width = VECTORS * S::F32_LANES;
        let zero = [simd.splat_f32s(0.0); VECTORS];
        let mut sums = match step.start {
            Start::Zero => [zero; ROWS],
            Start::Rows(values) => {
                let values: &[f32; ROWS] = values.try_into().expect("a value a row");
                values.map(|value| [simd.splat_f32s(value); VECTORS])
            }
            Start::Columns(values) => [load(simd, values, step.columns); ROWS],
            Start::Old if step.across => {
                let mut lines = [[0.0; MOST]; ROWS];
                for j in 0..step.columns {
                    let from = &step.c[j * step.c_stride..][..ROWS];
                    for r in 0..ROWS {
                        lines[r][j] = from[r];
                    }
                }
                lines.map(|line| load(simd, &line, width))
            }
            Start::Old => std::array::from_fn(|r| load(simd, &step.c[r * step.c_stride..], step.columns)),
        };

        let a = Strided::<ROWS>::new(step.a, step.a_strides, step.depth);
        if !step.across && step.depth > 2 * LINE {
            for r in 0..ROWS {
                fetch_all(&step.c[r * step.c_stride..][..step.columns]);
            }
        }
        let b = Lines::<S::f32s, VECTORS>::new(step.b, step.b_stride, step.depth);
        // Between two rounds of fetching ahead, a cache line of steps.
        for line in (0..step.depth).step_by(LINE) {
            if let Some(ahead) = step.ahead {
                a.fetch(line, ahead);
            }
            for k in line..step.depth.min(line + LINE) {
                let b = b.at(k);
                for r in 0..ROWS {
                    let a = simd.splat_f32s(a.at(r, k));
                    for v in 0..VECTORS {
                        sums[r][v] = simd.mul_add_f32s(a, b[v], sums[r][v]);
                    }
                }
            }
        }

        // By value, so that the sums above are never indexed at run time, and live in registers.
        let sums = sums.map(|row| row.map(|x| step.finish.of_vector(simd, x)));
        if step.across {
            let mut lines = [[0.0; MOST]; ROWS];
            lines.iter_mut().zip(sums).for_each(|(line, row)| store(simd, line, width, row));
            for j in 0..step.columns {
                let to = &mut step.c[j * step.c_stride..][..ROWS];
                for r in 0..ROWS {
                    to[r] = lines[r][j];
                }
            }
        } else if step.columns == width {
            for (r, row) in sums.into_iter().enumerate() {
                let to = S::as_mut_simd_f32s(&mut step.c[r * step.c_stride..][..width]).0;
                let to: &mut [S::f32s; VECTORS] = to.try_into().expect("whole vectors");
                *to = row;
            }
        } else {
            for (r, row) in sums.into_iter().enumerate() {
                store(simd, &mut step.c[r * step.c_stride..], step.columns, row);
            }
        }
    }
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

/// The first `len` values of the vectors.
#[inline(always)]
fn store<S: Simd, const VECTORS: usize>(simd: S, to: &mut [f32], len: usize, vectors: [S::f32s; VECTORS]) {
    for (v, vector) in vectors.into_iter().enumerate() {
        simd.partial_store_f32s(&mut to[len.min(v * S::F32_LANES)..len], vector);
    }
}

/// `ROWS` rows of values at fixed distances, all of them known to be inside their slice.
#[derive(Clone, Copy)]
struct Strided<'a, const ROWS: usize> {
    data: &'a [f32],
    strides: (usize, usize),
    depth: usize,
}

#[allow(unsafe_code, reason = "a check a value would cost as much as the multiply-adds")]
impl<'a, const ROWS: usize> Strided<'a, ROWS> {
    #[inline(always)]
    fn new(data: &'a [f32], strides: (usize, usize), depth: usize) -> Self {
        let last = (ROWS - 1).checked_mul(strides.0).zip(depth.saturating_sub(1).checked_mul(strides.1));
        let inside = last.and_then(|(r, k)| r.checked_add(k)).is_some_and(|last| last < data.len());
        assert!(inside || depth == 0, "{ROWS} rows of {depth} values at {strides:?} in {}", data.len());
        Strided { data, strides, depth }
    }

    /// The value `k` of row `r`, both of which must exist.
    #[inline(always)]
    fn at(&self, r: usize, k: usize) -> f32 {
        debug_assert!(r < ROWS && k < self.depth);
        // SAFETY: callers are in this file and ask for `r < ROWS`, `k < depth`; `new` checked that the last of them is inside.
        unsafe { *self.data.get_unchecked(r * self.strides.0 + k * self.strides.1) }
    }

    /// Brings what is `ahead` values behind `(0.., k)` closer.
    #[inline(always)]
    fn fetch(&self, k: usize, ahead: usize) {
        for r in 0..ROWS {
            fetch(self.data, r * self.strides.0 + k * self.strides.1 + ahead);
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

/// Asks for the cache line of `data[at]`, which need not exist.
#[inline(always)]
#[allow(unsafe_code, reason = "the only door to the instruction, which has no effect but time")]
fn fetch(data: &[f32], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint; it reads nothing, and faults nowhere.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.as_ptr().wrapping_add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, at);
}

/// Asks for the cache lines of `data`.
#[inline(always)]
fn fetch_all(data: &[f32]) {
    for at in (0..data.len()).step_by(LINE) {
        fetch(data, at);
    }
}
