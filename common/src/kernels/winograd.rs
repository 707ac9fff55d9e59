//! Convolution with 3x3 windows at stride 1 by minimal filtering: 2.25 times fewer multiply-adds than its patches need.
//!
//! F(2x2, 3x3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, section 4.1. A tile of
//! 2x2 outputs `y` is computed from the 4x4 inputs `d` under it and a filter `g`, summed over the channels:
//!
//! ```text
//! y = A^T [(G g G^T) * (B^T d B)] A        * value by value
//!
//!       1  0 -1  0           1    0    0
//! B^T = 0  1  1  0      G =  1/2  1/2  1/2      A^T = 1  1  1  0
//!       0 -1  1  0           1/2 -1/2  1/2            0  1 -1 -1
//!       0  1  0 -1           0    0    1
//! ```
//!
//! For each of the 16 values of a tile that is a matrix product over the channels. The gradients are the adjoint maps, of
//! the same products: with `z = A dy A^T`, those of the filter and of the inputs are
//!
//! ```text
//! dg = G^T [z * (B^T d B)] G               dd = B [(G g G^T) * z] B^T
//! ```
//!
//! where the sum over `dg` runs over all tiles, and the `dd` of overlapping tiles are added, tile after tile. So every value
//! has one order of additions, whatever is computed beside it.
//!
//! In here pixels come one after another, each with all its channels ("channels last"), in whole vectors: the transforms run
//! over channels, and what they write are the rows of the products.

mod tile;

use super::conv::Window;
use super::gemm::{self, even, transpose};
use super::{Finish, LANES, Mat, Start};
use pulp::{Simd, WithSimd};
use std::ops::Range;
use tile::{Maps, both, channels_last, gather, planes, scatter, vectors, vectors_mut};

/// Values of a transformed tile: the products that are computed.
const VALUES: usize = 16;

/// Tiles that are transformed at once: their values stay in the second-level cache until they are multiplied.
const TILES: usize = 64;

/// Values of a gradient's sums that are open at once.
const SUMS: usize = 1 << 16;

/// A convolution of this kind.
#[derive(Clone, Copy)]
pub struct Winograd {
    window: Window,
    filters: usize,
}

/// Where one thread works, all of it beginning at a cache line.
struct Room<'a> {
    /// Inputs: some images `(rows, columns, channels)`, padded for whole tiles.
    inputs: &'a mut [f32],
    /// Their gradient.
    d_inputs: &'a mut [f32],
    /// `B^T d B`, or its gradient: `(16, tiles, channels)`.
    windows: &'a mut [f32],
    /// What becomes outputs, or their gradient's transform: `(16, tiles, filters)`.
    products: &'a mut [f32],
    /// Outputs or their gradient: some images `(rows, columns, filters)` of whole tiles.
    outputs: &'a mut [f32],
    /// The gradient of an image's sums: `(filters, out height, out width)`.
    masked: &'a mut [f32],
}

/// Some images' outputs `y = finish(sums)` and their gradient, `(filters, out height, out width)` each.
#[derive(Clone, Copy)]
pub struct Outputs<'a> {
    pub finish: Finish,
    pub y: &'a [f32],
    pub dy: &'a [f32],
}

/// Where gradients of filters go, summed over the images.
pub struct WeightsGradient<'a> {
    /// The images, `(channels, height, width)` each.
    pub x: &'a [f32],
    /// The filters that are wanted.
    pub range: Range<usize>,
    /// `(filters of the range, channels, 3, 3)`
    pub dw: &'a mut [f32],
    /// One a filter of the range, if it has one.
    pub db: &'a mut [f32],
}

/// Where the gradient of the images goes.
pub struct InputsGradient<'a> {
    /// [`Winograd::prepare_inputs`].
    pub prepared: &'a [f32],
    /// `(channels, height, width)` each.
    pub dx: &'a mut [f32],
}

fn padded(channels: usize) -> usize {
    channels.next_multiple_of(LANES)
}

/// From each of a tile's 16 values to the next, where some tiles are transformed: not a power of two, or all 16 would meet in
/// the same few places of a cache.
fn distance(channels: usize) -> usize {
    TILES * channels + LANES
}

/// `scratch`, from its first cache line on.
fn aligned(scratch: &mut [f32]) -> &mut [f32] {
    let begin = scratch.as_ptr().align_offset(64).min(LANES);
    &mut scratch[begin..]
}

impl Winograd {
    /// For convolutions that gain by it: with 3x3 windows at stride 1, and enough channels for the products.
    pub fn of(window: Window, filters: usize) -> Option<Winograd> {
        let fits = window.kernel == 3 && window.stride == 1 && window.channels.min(filters) >= LANES;
        fits.then_some(Winograd { window, filters })
    }

    /// Rows and columns of tiles.
    fn grid(&self) -> (usize, usize) {
        (self.window.out_height().div_ceil(2), self.window.out_width().div_ceil(2))
    }

    /// Tiles of an image.
    fn tiles(&self) -> usize {
        self.grid().0 * self.grid().1
    }

    /// Images that are computed together: more than one where an image has few tiles.
    fn together(&self) -> usize {
        (TILES / self.tiles()).max(1)
    }

    fn channels(&self) -> usize {
        padded(self.window.channels)
    }

    fn in_len(&self) -> usize {
        self.window.channels * self.window.height * self.window.width
    }

    fn out_len(&self) -> usize {
        self.filters * self.window.positions()
    }

    /// Pixels of an image's inputs and outputs under whole tiles.
    fn pixels(&self) -> (usize, usize) {
        let (rows, columns) = self.grid();
        ((2 * rows + 2) * (2 * columns + 2), 4 * rows * columns)
    }

    /// Multiply-adds in products, for one image.
    pub fn multiply_adds(&self) -> usize {
        VALUES * self.tiles() * self.window.channels * self.filters
    }

    /// Values of transformed filters ([`Winograd::prepare_forward`], [`Winograd::prepare_inputs`]).
    pub fn prepared(&self) -> usize {
        let (c, f) = (self.channels(), padded(self.filters));
        LANES + VALUES * c * f + 10 * c.max(f)
    }

    /// Filters whose gradient is best computed at once: as many as keep its sums in the cache, but enough to make up for
    /// transforming the inputs.
    pub fn most_filters(&self) -> usize {
        (SUMS / (VALUES * self.channels())).next_multiple_of(LANES).max(2 * LANES)
    }

    /// Values of scratch for one thread.
    pub fn scratch(&self) -> usize {
        let ((inputs, outputs), filters) = (self.pixels(), padded(self.filters));
        let images = self.together() * (2 * inputs * self.channels() + outputs * filters) + self.out_len();
        LANES + images + VALUES * (distance(self.channels()) + distance(filters))
    }

    /// Values of scratch for one thread that computes the gradient of `filters` filters.
    pub fn weights_scratch(&self, filters: usize) -> usize {
        let some = Winograd { filters, ..*self };
        some.scratch() + VALUES * padded(filters) * self.channels()
    }

    fn room<'a>(&self, scratch: &'a mut [f32]) -> (Room<'a>, &'a mut [f32]) {
        let ((inputs, outputs), filters) = (self.pixels(), padded(self.filters));
        let inputs = self.together() * inputs * self.channels();
        let (inputs, rest) = aligned(scratch).split_at_mut(inputs);
        let (d_inputs, rest) = rest.split_at_mut(inputs.len());
        let (windows, rest) = rest.split_at_mut(VALUES * distance(self.channels()));
        let (products, rest) = rest.split_at_mut(VALUES * distance(filters));
        let (outputs, rest) = rest.split_at_mut(self.together() * outputs * filters);
        let (masked, rest) = rest.split_at_mut(self.out_len());
        // What the padding and unfinished tiles read.
        inputs.fill(0.0);
        d_inputs.fill(0.0);
        outputs.fill(0.0);
        (Room { inputs, d_inputs, windows, products, outputs, masked }, rest)
    }

    /// The places of the first inputs and outputs of `tiles`, counted in pixels over images one after another.
    fn places(&self, tiles: Range<usize>) -> impl Iterator<Item = (usize, usize)> + use<> {
        let ((rows, columns), pixels) = (self.grid(), self.pixels());
        tiles.map(move |tile| {
            let (image, row, column) = (tile / (rows * columns), tile / columns % rows, tile % columns);
            let at = |width: usize| 2 * row * width + 2 * column;
            (image * pixels.0 + at(2 * columns + 2), image * pixels.1 + at(2 * columns))
        })
    }

    /// `prepared = G g G^T`, `(16, channels, filters)`, and the bias, for [`Winograd::forward`].
    pub fn prepare_forward(&self, weights: &[f32], bias: Option<&[f32]>, prepared: &mut [f32]) {
        let (c, f) = (self.window.channels, self.filters);
        let (to, rest) = aligned(prepared).split_at_mut(VALUES * self.channels() * padded(f));
        let (b_f, scratch) = rest.split_at_mut(padded(f));
        b_f.fill(0.0);
        b_f.iter_mut().zip(bias.unwrap_or_default()).for_each(|(to, b)| *to = *b);
        super::isa::arch().dispatch(Prepare { weights, lines: (c, 9), columns: (f, 9 * c), to, scratch });
    }

    /// `prepared = G g G^T`, `(16, filters, channels)`, for [`Winograd::backward`].
    pub fn prepare_inputs(&self, weights: &[f32], prepared: &mut [f32]) {
        let (c, f) = (self.window.channels, self.filters);
        let (to, scratch) = aligned(prepared).split_at_mut(VALUES * self.channels() * padded(f));
        super::isa::arch().dispatch(Prepare { weights, lines: (f, 9 * c), columns: (c, 9), to, scratch });
    }

    /// `y = finish(b + w * x)` of the images `x`, `(channels, height, width)` each; `y`: `(filters, out height, out width)`.
    pub fn forward(&self, prepared: &[f32], x: &[f32], y: &mut [f32], finish: Finish, scratch: &mut [f32]) {
        let (room, _) = self.room(scratch);
        super::isa::arch().dispatch(Forward { of: self, prepared: ready(prepared), x, y, finish, room });
    }

    /// The gradients that are wanted, at the price of one transform of the outputs' gradient.
    ///
    /// # Panics
    /// Where the inputs' gradient is wanted of some of the filters alone.
    pub fn backward(
        &self,
        outputs: Outputs<'_>,
        weights: Option<WeightsGradient<'_>>,
        inputs: Option<InputsGradient<'_>>,
        scratch: &mut [f32],
    ) {
        let range = weights.as_ref().map_or(0..self.filters, |weights| weights.range.clone());
        assert!(inputs.is_none() || range == (0..self.filters), "an input's gradient of filters {range:?}");
        let of = &Winograd { filters: range.len(), ..*self };
        let (room, rest) = of.room(scratch);
        let to_weights = weights.map(|to| {
            let sums = &mut rest[..VALUES * padded(of.filters) * of.channels()];
            sums.fill(0.0);
            to.db.fill(0.0);
            Sums { to, sums }
        });
        let inputs = inputs.map(|to| InputsGradient { prepared: ready(to.prepared), ..to });
        let (dy_len, positions) = (self.out_len(), self.window.positions());
        let wanted = range.start * positions..range.end * positions;
        super::isa::arch().dispatch(Backward { of, outputs, dy_len, wanted, to_weights, to_inputs: inputs, room });
    }
}

/// `prepared`, from its first cache line on, as [`aligned`] has it.
fn ready(prepared: &[f32]) -> &[f32] {
    let begin = prepared.as_ptr().align_offset(64).min(LANES);
    &prepared[begin..]
}

impl Winograd {
    /// `windows = B^T d B` of `tiles`, `(16, tiles, channels)`.
    #[inline(always)]
    fn transform_inputs<S: Simd>(&self, simd: S, tiles: Range<usize>, inputs: &[f32], windows: &mut [f32]) {
        let (groups, columns) = (self.channels() / S::F32_LANES, 2 * self.grid().1 + 2);
        let len = distance(self.channels()) / S::F32_LANES;
        let (inputs, windows) = (vectors::<S>(inputs), vectors_mut::<S>(windows));
        for (i, (at, _)) in self.places(tiles).enumerate() {
            for g in 0..groups {
                let tile = gather(simd, |row, column| inputs[(at + row * columns + column) * groups + g]);
                let to = &mut windows[i * groups + g..];
                scatter(both(simd, |x| Maps(simd).windows(x), tile), |i, j, v| to[(4 * i + j) * len] = v);
            }
        }
    }

    /// `products = A dy A^T` of `tiles`, `(16, tiles, filters)`.
    #[inline(always)]
    fn transform_outputs<S: Simd>(&self, simd: S, tiles: Range<usize>, outputs: &[f32], products: &mut [f32]) {
        let (groups, columns) = (padded(self.filters) / S::F32_LANES, 2 * self.grid().1);
        let len = distance(padded(self.filters)) / S::F32_LANES;
        let (outputs, products) = (vectors::<S>(outputs), vectors_mut::<S>(products));
        for (i, (_, at)) in self.places(tiles).enumerate() {
            for g in 0..groups {
                let tile = gather(simd, |row, column| outputs[(at + row * columns + column) * groups + g]);
                let to = &mut products[i * groups + g..];
                scatter(both(simd, |x| Maps(simd).outputs_t(x), tile), |i, j, v| to[(4 * i + j) * len] = v);
            }
        }
    }

    /// Adds `B windows B^T` of `tiles`, `(16, tiles, channels)`, to the inputs' gradient.
    #[inline(always)]
    fn add_windows<S: Simd>(&self, simd: S, tiles: Range<usize>, windows: &[f32], d_inputs: &mut [f32]) {
        let (groups, columns) = (self.channels() / S::F32_LANES, 2 * self.grid().1 + 2);
        let len = distance(self.channels()) / S::F32_LANES;
        let (windows, d_inputs) = (vectors::<S>(windows), vectors_mut::<S>(d_inputs));
        for (i, (at, _)) in self.places(tiles).enumerate() {
            for g in 0..groups {
                let from = &windows[i * groups + g..];
                let tile = gather(simd, |i, j| from[(4 * i + j) * len]);
                scatter(both(simd, |x| Maps(simd).windows_t(x), tile), |i, j, dd| {
                    let sum = &mut d_inputs[(at + i * columns + j) * groups + g];
                    *sum = simd.add_f32s(*sum, dd);
                });
            }
        }
    }

    /// `dw = G^T sums G`, `(filters, channels, 3, 3)`, by way of some `scratch`.
    #[inline(always)]
    fn transform_sums<S: Simd>(&self, simd: S, sums: &[f32], scratch: &mut [f32], dw: &mut [f32]) {
        let (c, f) = (self.channels(), padded(self.filters));
        let (groups, sums) = (c / S::F32_LANES, vectors::<S>(sums));
        for (i, dw) in dw.chunks_exact_mut(9 * self.window.channels).enumerate() {
            let filters = vectors_mut::<S>(&mut scratch[..9 * c]);
            for g in 0..groups {
                let tile = gather(simd, |row, column| sums[((4 * row + column) * f + i) * groups + g]);
                scatter(both(simd, |x| Maps(simd).filters_t(x), tile), |i, j, v| filters[(3 * i + j) * groups + g] = v);
            }
            let line = |k| &scratch[k * c..][..self.window.channels];
            transpose(simd, 9, line, (self.window.channels, 9), dw, 9);
        }
    }
}

struct Prepare<'a> {
    weights: &'a [f32],
    /// How many rows of a product's right matrix there are, and the distance of their filters' first values.
    lines: (usize, usize),
    /// The same of its columns.
    columns: (usize, usize),
    to: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl WithSimd for Prepare<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Prepare { weights, lines, columns, to, scratch } = self;
        let width = padded(columns.0);
        let filters = &mut scratch[..9 * width];
        let (to, groups) = (vectors_mut::<S>(to), width / S::F32_LANES);
        let len = to.len() / VALUES;
        for line in 0..lines.0 {
            let column = |j| &weights[line * lines.1 + j * columns.1..][..9];
            transpose(simd, columns.0, column, (9, width), filters, width);
            let filters = vectors::<S>(filters);
            for g in 0..groups {
                let filter = gather(simd, |i, j| filters[(3 * i + j) * groups + g]);
                let to = &mut to[line * groups + g..];
                scatter(both(simd, |x| Maps(simd).filters(x), filter), |i, j, v| to[(4 * i + j) * len] = v);
            }
        }
        for value in to.chunks_exact_mut(len) {
            value[lines.0 * groups..].fill(simd.splat_f32s(0.0));
        }
    }
}

struct Forward<'a> {
    of: &'a Winograd,
    prepared: &'a [f32],
    x: &'a [f32],
    y: &'a mut [f32],
    finish: Finish,
    room: Room<'a>,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { of, prepared, x, y, finish, room } = self;
        let Room { inputs, windows, products, outputs, .. } = room;
        let (window, (c, f), pixels) = (of.window, (of.channels(), padded(of.filters)), of.pixels());
        let (in_side, out_side) = ((window.height, window.width), (window.out_height(), window.out_width()));
        let (in_len, out_len, columns) = (of.in_len(), of.out_len(), 2 * of.grid().1);
        let (filters, bias) = prepared.split_at(VALUES * c * f);
        let (bias, groups) = (vectors::<S>(&bias[..f]), f / S::F32_LANES);
        let together = x.chunks(of.together() * in_len).zip(y.chunks_mut(of.together() * out_len));
        for (x, y) in together {
            let images = x.len() / in_len;
            for (x, inputs) in x.chunks_exact(in_len).zip(inputs.chunks_exact_mut(pixels.0 * c)) {
                channels_last(simd, x, in_side, inputs, (window.padding, columns + 2, c));
            }
            for tiles in even(images * of.tiles(), 8, TILES) {
                let n = tiles.len();
                of.transform_inputs(simd, tiles.clone(), inputs, windows);
                let factors = windows.chunks_exact(distance(c)).zip(filters.chunks_exact(c * f));
                for (product, (windows, filters)) in products.chunks_exact_mut(distance(f)).zip(factors) {
                    gemm::multiply(simd, product, Mat::new(windows, n, c), Mat::new(filters, c, f), Start::Zero);
                }
                let (len, products, outputs) =
                    (distance(f) / S::F32_LANES, vectors::<S>(products), vectors_mut::<S>(outputs));
                for (i, (_, at)) in of.places(tiles).enumerate() {
                    for g in 0..groups {
                        let from = &products[i * groups + g..];
                        let tile = gather(simd, |i, j| from[(4 * i + j) * len]);
                        scatter(both(simd, |x| Maps(simd).outputs(x), tile), |i, j, y| {
                            let y = finish.of_vector(simd, simd.add_f32s(y, bias[g]));
                            outputs[(at + i * columns + j) * groups + g] = y;
                        });
                    }
                }
            }
            for (outputs, y) in outputs.chunks_exact(pixels.1 * f).zip(y.chunks_exact_mut(out_len)) {
                planes(simd, outputs, (0, columns, f), y, out_side);
            }
        }
    }
}

struct Sums<'a> {
    to: WeightsGradient<'a>,
    /// `(16, filters, channels)`.
    sums: &'a mut [f32],
}

struct Backward<'a> {
    /// For the wanted filters.
    of: &'a Winograd,
    outputs: Outputs<'a>,
    /// Values of an image's outputs, and those that are wanted.
    dy_len: usize,
    wanted: Range<usize>,
    to_weights: Option<Sums<'a>>,
    to_inputs: Option<InputsGradient<'a>>,
    room: Room<'a>,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { of, outputs: Outputs { finish, y, dy }, dy_len, wanted, mut to_weights, mut to_inputs, room } =
            self;
        let Room { inputs, d_inputs, windows, products, outputs, masked } = room;
        let (window, (c, f), pixels) = (of.window, (of.channels(), padded(of.filters)), of.pixels());
        let (in_side, out_side) = ((window.height, window.width), (window.out_height(), window.out_width()));
        let (in_len, columns) = (of.in_len(), 2 * of.grid().1);
        for first in (0..dy.len() / dy_len).step_by(of.together()) {
            let images = first..(first + of.together()).min(dy.len() / dy_len);
            for (image, outputs) in images.clone().zip(outputs.chunks_exact_mut(pixels.1 * f)) {
                let of_image = image * dy_len + wanted.start..image * dy_len + wanted.end;
                let mut dy = &dy[of_image.clone()];
                if finish != Finish::Keep {
                    finish.gradient(&y[of_image], dy, masked);
                    dy = masked;
                }
                channels_last(simd, dy, out_side, outputs, (0, columns, f));
                if let Some(weights) = &mut to_weights {
                    let planes = dy.chunks_exact(window.positions());
                    weights.to.db.iter_mut().zip(planes).for_each(|(db, dy)| *db += super::sum(dy));
                }
            }
            if let Some(weights) = &to_weights {
                let x = &weights.to.x[images.start * in_len..images.end * in_len];
                for (x, inputs) in x.chunks_exact(in_len).zip(inputs.chunks_exact_mut(pixels.0 * c)) {
                    channels_last(simd, x, in_side, inputs, (window.padding, columns + 2, c));
                }
            }
            for tiles in even(images.len() * of.tiles(), 8, TILES) {
                let n = tiles.len();
                of.transform_outputs(simd, tiles.clone(), outputs, products);
                if let Some(weights) = &mut to_weights {
                    of.transform_inputs(simd, tiles.clone(), inputs, windows);
                    let factors = products.chunks_exact(distance(f)).zip(windows.chunks_exact(distance(c)));
                    for (sums, (outputs, windows)) in weights.sums.chunks_exact_mut(f * c).zip(factors) {
                        gemm::multiply(simd, sums, Mat::new(outputs, n, f).t(), Mat::new(windows, n, c), Start::Old);
                    }
                }
                if let Some(to) = &to_inputs {
                    let factors = products.chunks_exact(distance(f)).zip(to.prepared.chunks_exact(f * c));
                    for (window, (outputs, filters)) in windows.chunks_exact_mut(distance(c)).zip(factors) {
                        gemm::multiply(simd, window, Mat::new(outputs, n, f), Mat::new(filters, f, c), Start::Zero);
                    }
                    of.add_windows(simd, tiles, windows, d_inputs);
                }
            }
            if let Some(to) = &mut to_inputs {
                let dx = &mut to.dx[images.start * in_len..images.end * in_len];
                for (d_inputs, dx) in d_inputs.chunks_exact_mut(pixels.0 * c).zip(dx.chunks_exact_mut(in_len)) {
                    planes(simd, d_inputs, (window.padding, columns + 2, c), dx, in_side);
                    d_inputs.fill(0.0);
                }
            }
        }
        if let Some(Sums { to, sums }) = to_weights {
            of.transform_sums(simd, sums, windows, to.dw);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Isa, with_isa};
    use crate::rng::{Key, Purpose};
    use proptest::prelude::*;

    fn values(n: usize, salt: u64) -> Vec<f32> {
        let key = Key::new(salt, Purpose::Synthetic);
        (0..n as u64).map(|i| key.normal(i)).collect()
    }

    /// `f(output, weight, input)` for every product of a convolution of `images`, by their places.
    fn products(w: Window, filters: usize, images: usize, mut f: impl FnMut(usize, usize, usize)) {
        let (c, positions) = (w.channels, w.positions());
        for (image, filter, channel) in (0..images * filters * c).map(|i| (i / c / filters, i / c % filters, i % c)) {
            for (position, k) in (0..positions * 9).map(|i| (i / 9, i % 9)) {
                let y = (position / w.out_width() + k / 3).wrapping_sub(w.padding);
                let x = (position % w.out_width() + k % 3).wrapping_sub(w.padding);
                if y < w.height && x < w.width {
                    let input = ((image * c + channel) * w.height + y) * w.width + x;
                    f((image * filters + filter) * positions + position, (filter * c + channel) * 9 + k, input);
                }
            }
        }
    }

    /// Each as far from the sum in f64 as sums of its size may be.
    fn close(what: &str, got: &[f32], want: &[f64]) {
        let size = (want.iter().map(|w| w * w).sum::<f64>() / want.len() as f64).sqrt();
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((*got as f64 - want).abs() < 4e-6 * size, "{what} {i}: {got} instead of {want}");
        }
    }

    fn same(what: &str, a: &[f32], b: &[f32]) {
        assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn equals_the_convolution_and_its_gradients(
            (channels, filters, images) in (16usize..40, 16usize..40, 1usize..6),
            (height, width, padding) in (1usize..12, 1usize..20, 0usize..3),
            relu: bool,
        ) {
            let (height, width) = (height.max(3 - padding), width.max(3 - padding));
            let window = Window { channels, height, width, kernel: 3, stride: 1, padding };
            let of = Winograd::of(window, filters).expect("it has many channels");
            let (in_len, out_len) = (channels * height * width, filters * window.positions());
            let (x, w) = (values(images * in_len, 1), values(filters * channels * 9, 2));
            let (dy, bias) = (values(images * out_len, 3), values(filters, 4));
            let positions = window.positions();
            let mut y64: Vec<f64> = (0..dy.len()).map(|i| bias[i / positions % filters] as f64).collect();
            products(window, filters, images, |o, k, i| y64[o] += w[k] as f64 * x[i] as f64);
            let finish = if relu { Finish::Relu } else { Finish::Keep };
            // Outputs near zero may fall on either side of it: their gradient is left out.
            let dy: Vec<f32> = dy.iter().zip(&y64).map(|(dy, y)| if y.abs() < 1e-3 { 0.0 } else { *dy }).collect();
            let passes = |o: usize| !relu || y64[o] > 0.0;
            let (mut dx64, mut dw64, mut db64) = (vec![0.0; x.len()], vec![0.0; w.len()], vec![0.0; filters]);
            products(window, filters, images, |o, k, i| if passes(o) {
                dx64[i] += w[k] as f64 * dy[o] as f64;
                dw64[k] += x[i] as f64 * dy[o] as f64;
            });
            (0..dy.len()).filter(|&o| passes(o)).for_each(|o| db64[o / positions % filters] += dy[o] as f64);
            if relu {
                y64.iter_mut().for_each(|y| *y = y.max(0.0));
            }

            // Scratch and results begin with what a forgotten value would spread.
            let lost = |n: usize| vec![f32::NAN; n];
            let run = || {
                let mut prepared = lost(of.prepared());
                let (mut y, mut dx, mut dw, mut db) = (lost(dy.len()), lost(x.len()), lost(w.len()), lost(filters));
                of.prepare_forward(&w, Some(&bias), &mut prepared);
                of.forward(&prepared, &x, &mut y, finish, &mut lost(of.scratch()));
                of.prepare_inputs(&w, &mut prepared);
                let outputs = Outputs { finish, y: &y, dy: &dy };
                let weights = WeightsGradient { x: &x, range: 0..filters, dw: &mut dw, db: &mut db };
                let inputs = InputsGradient { prepared: &prepared, dx: &mut dx };
                of.backward(outputs, Some(weights), Some(inputs), &mut lost(of.weights_scratch(filters)));
                (y, dx, dw, db)
            };
            let all: Vec<_> = Isa::available().map(|isa| with_isa(isa, run).expect("it is available")).collect();
            let (y, dx, dw, db) = &all[0];
            close("output", y, &y64);
            close("input's gradient", dx, &dx64);
            close("weight's gradient", dw, &dw64);
            close("bias's gradient", db, &db64);
            for (other_y, other_dx, other_dw, other_db) in &all {
                same("an instruction set moved an output", y, other_y);
                same("an instruction set moved an input's gradient", dx, other_dx);
                same("an instruction set moved a weight's gradient", dw, other_dw);
                same("an instruction set moved a bias's gradient", db, other_db);
            }

            // One image alone, and some of the filters alone.
            let (mut prepared, mut scratch) = (lost(of.prepared()), lost(of.scratch()));
            of.prepare_forward(&w, Some(&bias), &mut prepared);
            let mut alone = lost(out_len);
            of.forward(&prepared, &x[x.len() - in_len..], &mut alone, finish, &mut scratch);
            same("the images beside it moved an output", &alone, &y[y.len() - out_len..]);
            of.prepare_inputs(&w, &mut prepared);
            let mut alone = lost(in_len);
            let last = dy.len() - out_len..;
            let outputs = Outputs { finish, y: &y[last.clone()], dy: &dy[last] };
            of.backward(outputs, None, Some(InputsGradient { prepared: &prepared, dx: &mut alone }), &mut scratch);
            same("what is beside it moved an input's gradient", &alone, &dx[dx.len() - in_len..]);
            let (some, row) = (filters / 3..filters / 3 + 5, channels * 9);
            let (mut alone, mut alone_db) = (lost(5 * row), lost(5));
            let weights = WeightsGradient { x: &x, range: some.clone(), dw: &mut alone, db: &mut alone_db };
            of.backward(Outputs { finish, y, dy: &dy }, Some(weights), None, &mut lost(of.weights_scratch(5)));
            same("what is beside it moved a weight's gradient", &alone, &dw[some.start * row..some.end * row]);
            same("what is beside it moved a bias's gradient", &alone_db, &db[some]);
        }
    }
}
