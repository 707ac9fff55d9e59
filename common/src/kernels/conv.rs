//! One image at a time: patches for convolution by GEMM, and pooling.
//!
//! The matrix of patches (im2col: Chellapilla, Puri and Simard, "High Performance Convolutional Neural Networks for Document
//! Processing", 2006, section 3) is never written out: its rows are lines of a shifted image ([`Window::shift`]), from which
//! the product packs its panels.

use super::gemm::{Right, pack_columns, pack_rows};
use super::vectorized;
use pulp::Simd;
use std::ops::Range;

/// A window that slides over planes of `height x width`.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
}

impl Window {
    /// Output height.
    pub fn out_height(&self) -> usize {
        (self.height + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Output width.
    pub fn out_width(&self) -> usize {
        (self.width + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Positions of the window.
    pub fn positions(&self) -> usize {
        self.out_height() * self.out_width()
    }

    /// Values under the window.
    pub fn patch(&self) -> usize {
        self.channels * self.kernel * self.kernel
    }

    /// The output columns whose window covers a real column at kernel offset `kx`.
    fn inside(&self, kx: usize) -> Range<usize> {
        let first = self.padding.saturating_sub(kx).div_ceil(self.stride);
        // ox * stride + kx - padding < width
        let last = (self.width + self.padding).saturating_sub(kx).div_ceil(self.stride).min(self.out_width());
        first.min(last)..last
    }

    /// Rows of one shifted plane, and the planes a channel and kernel column: one for each kernel row up to the stride.
    fn shifts(&self) -> (usize, usize) {
        (self.out_height() + (self.kernel - 1) / self.stride, self.stride.min(self.kernel))
    }

    /// Values of a shifted image ([`Window::shift`]).
    pub fn shifted(&self) -> usize {
        let (rows, phases) = self.shifts();
        self.channels * self.kernel * phases * rows * self.out_width()
    }

    /// Where row `p` of the patches begins in a shifted image, all of its positions one after another.
    pub(super) fn line(&self, p: usize) -> usize {
        let (rows, phases) = self.shifts();
        let (ky, kx) = (p / self.kernel % self.kernel, p % self.kernel);
        let plane = (p / (self.kernel * self.kernel) * self.kernel + kx) * phases + ky % self.stride;
        (plane * rows + ky / self.stride) * self.out_width()
    }

    /// Calls `f(range of a shifted image, index of its first value in the image)`, values `stride` apart there, and `None`
    /// for padding.
    #[inline(always)]
    fn walk(&self, mut f: impl FnMut(Range<usize>, Option<usize>)) {
        let ((rows, phases), width) = (self.shifts(), self.out_width());
        let mut at = 0;
        for c in 0..self.channels {
            for kx in 0..self.kernel {
                let inside = self.inside(kx);
                for phase in 0..phases {
                    for row in 0..rows {
                        let y = (row * self.stride + phase).wrapping_sub(self.padding);
                        if y >= self.height || inside.is_empty() {
                            f(at..at + width, None);
                        } else {
                            let x = inside.start * self.stride + kx - self.padding;
                            f(at..at + inside.start, None);
                            f(at + inside.start..at + inside.end, Some((c * self.height + y) * self.width + x));
                            f(at + inside.end..at + width, None);
                        }
                        at += width;
                    }
                }
            }
        }
    }

    /// `shifted`: for each channel and kernel column, the image's values under that column, output column by output column.
    ///
    /// A patch's rows are contiguous in it: kernel rows differ by whole lines, so it holds every value `kernel` times, where
    /// the patches hold it `kernel^2` times.
    pub fn shift(&self, image: &[f32], shifted: &mut [f32]) {
        vectorized(|| {
            self.walk(|to, from| match from {
                None => shifted[to].iter_mut().for_each(|s| *s = 0.0),
                Some(from) if self.stride == 1 => {
                    shifted[to].iter_mut().zip(&image[from..]).for_each(|(s, x)| *s = *x);
                }
                Some(from) => {
                    shifted[to].iter_mut().zip(image[from..].iter().step_by(self.stride)).for_each(|(s, x)| *s = *x);
                }
            });
        });
    }

    /// `image` = the sum of all values of `cols`, `(patch, positions)`, that patches take from it; `shifted` is scratch.
    pub fn unpatch(&self, cols: &[f32], shifted: &mut [f32], image: &mut [f32]) {
        let n = self.positions();
        vectorized(|| {
            shifted.iter_mut().for_each(|s| *s = 0.0);
            for (p, cols) in cols.chunks_exact(n).enumerate() {
                shifted[self.line(p)..][..n].iter_mut().zip(cols).for_each(|(s, c)| *s += c);
            }
            image.iter_mut().for_each(|x| *x = 0.0);
            self.walk(|from, to| match to {
                None => {}
                Some(to) if self.stride == 1 => {
                    image[to..].iter_mut().zip(&shifted[from]).for_each(|(x, s)| *x += s);
                }
                Some(to) => {
                    image[to..].iter_mut().step_by(self.stride).zip(&shifted[from]).for_each(|(x, s)| *x += s);
                }
            });
        });
    }
}

/// The patches of a shifted image, `(patch, positions)`: the right matrix of a convolution.
pub struct Patches<'a> {
    pub window: Window,
    pub shifted: &'a [f32],
}

impl Right for Patches<'_> {
    fn rows(&self) -> usize {
        self.window.patch()
    }

    fn columns(&self) -> usize {
        self.window.positions()
    }

    #[inline(always)]
    fn pack<S: Simd>(&self, simd: S, k: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        pack_rows(simd, k.len(), columns.len(), out, |i| {
            &self.shifted[self.window.line(k.start + i)..][columns.clone()]
        });
    }
}

/// Their transpose, `(positions, patch)`: the right matrix of a convolution's weights' gradient.
pub struct PatchesT<'a>(pub Patches<'a>);

impl Right for PatchesT<'_> {
    fn rows(&self) -> usize {
        self.0.window.positions()
    }

    fn columns(&self) -> usize {
        self.0.window.patch()
    }

    #[inline(always)]
    fn pack<S: Simd>(&self, simd: S, k: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let Patches { window, shifted } = &self.0;
        pack_columns(simd, k.len(), columns.len(), out, |j| &shifted[window.line(columns.start + j)..][k.clone()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Finish, Isa, Mat, Start, gemm::product_with, with_isa};
    use proptest::prelude::*;

    fn windows() -> impl Strategy<Value = Window> {
        (1usize..4, 1usize..9, 1usize..9, 1usize..5, 1usize..4, 0usize..3).prop_map(
            |(channels, height, width, kernel, stride, padding)| Window {
                channels,
                height: height.max(kernel),
                width: width.max(kernel),
                kernel,
                stride,
                padding: padding.min(kernel - 1),
            },
        )
    }

    proptest! {
        #[test]
        fn patches_equal_their_oracle_and_scatter_is_the_transpose(w in windows()) {
            let image: Vec<f32> = (0..w.channels * w.height * w.width).map(|i| i as f32 + 1.0).collect();
            let mut shifted = vec![f32::NAN; w.shifted()];
            w.shift(&image, &mut shifted);
            let (mut cols, mut count) = (vec![f32::NAN; w.patch() * w.positions()], vec![0.0; image.len()]);
            for c in 0..w.channels { for ky in 0..w.kernel { for kx in 0..w.kernel {
                for oy in 0..w.out_height() { for ox in 0..w.out_width() {
                    let (y, x) = ((oy * w.stride + ky) as isize - w.padding as isize, (ox * w.stride + kx) as isize - w.padding as isize);
                    let real = y >= 0 && x >= 0 && (y as usize) < w.height && (x as usize) < w.width;
                    let at = if real { (c * w.height + y as usize) * w.width + x as usize } else { 0 };
                    let want = if real { count[at] += 1.0; image[at] } else { 0.0 };
                    let (row, position) = ((c * w.kernel + ky) * w.kernel + kx, oy * w.out_width() + ox);
                    prop_assert_eq!(shifted[w.line(row) + position], want);
                    cols[row * w.positions() + position] = want;
                }}
            }}}
            // Both are right matrices: the product with the unit matrix is the matrix.
            let patches = || Patches { window: w, shifted: &shifted };
            let unit = |n: usize| (0..n * n).map(|i| f32::from(u8::from(i % (n + 1) == 0))).collect::<Vec<_>>();
            let (n, p) = (w.positions(), w.patch());
            for isa in Isa::available() {
                let mut got = vec![f32::NAN; p * n];
                with_isa(isa, || product_with(&mut got, Mat::new(&unit(p), p, p), patches(), Start::Zero, Finish::Keep));
                prop_assert_eq!(&got, &cols);
                with_isa(isa, || product_with(&mut got, Mat::new(&unit(n), n, n), PatchesT(patches()), Start::Zero, Finish::Keep));
                prop_assert!((0..p * n).all(|i| got[i] == cols[i % p * n + i / p]));
            }
            let mut back = vec![f32::NAN; image.len()];
            w.unpatch(&cols, &mut shifted, &mut back);
            for i in 0..image.len() { prop_assert_eq!(back[i], image[i] * count[i]); }
        }
    }
}
