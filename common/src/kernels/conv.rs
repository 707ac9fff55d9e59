//! One image at a time: patches for convolution by GEMM, and pooling.

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

    /// The output columns whose window covers a real column at kernel offset `kx`, and the first one's input column.
    fn inside(&self, kx: usize) -> (usize, usize) {
        let first = self.padding.saturating_sub(kx).div_ceil(self.stride);
        // ox * stride + kx - padding < width
        let last = (self.width + self.padding).saturating_sub(kx).div_ceil(self.stride).min(self.out_width());
        (first.min(last), last)
    }

    /// Calls `f(row of cols, range of its columns, input index of the first, input step)` for all that is not padding,
    /// and `f` of an empty input for what is: `(row, range, None)`.
    #[inline(always)]
    fn walk(&self, mut f: impl FnMut(std::ops::Range<usize>, Option<usize>)) {
        let (oh, ow, n) = (self.out_height(), self.out_width(), self.positions());
        for c in 0..self.channels {
            for ky in 0..self.kernel {
                for kx in 0..self.kernel {
                    let row = ((c * self.kernel + ky) * self.kernel + kx) * n;
                    let (first, last) = self.inside(kx);
                    for oy in 0..oh {
                        let at = row + oy * ow;
                        let iy = (oy * self.stride + ky).wrapping_sub(self.padding);
                        if iy >= self.height || first == last {
                            f(at..at + ow, None);
                            continue;
                        }
                        f(at..at + first, None);
                        let ix = first * self.stride + kx - self.padding;
                        f(at + first..at + last, Some((c * self.height + iy) * self.width + ix));
                        f(at + last..at + ow, None);
                    }
                }
            }
        }
    }

    /// `cols`: `(patch, positions)`, the values under each position of the window; padding is 0.
    pub fn im2col(&self, image: &[f32], cols: &mut [f32]) {
        self.walk(|to, from| match from {
            None => cols[to].fill(0.0),
            Some(from) if self.stride == 1 => {
                let n = to.len();
                cols[to].copy_from_slice(&image[from..from + n]);
            }
            Some(from) => cols[to].iter_mut().zip(image[from..].iter().step_by(self.stride)).for_each(|(c, x)| *c = *x),
        });
    }

    /// `image += ` every value of `cols` where [`Window::im2col`] took it from.
    pub fn col2im_add(&self, cols: &[f32], image: &mut [f32]) {
        self.walk(|from, to| {
            if let Some(to) = to {
                image[to..].iter_mut().step_by(self.stride).zip(&cols[from]).for_each(|(x, c)| *x += c);
            }
        });
    }

    /// The real input rows and columns under the window at `(oy, ox)`.
    #[inline(always)]
    fn under(&self, oy: usize, ox: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let span = |o: usize, size: usize| {
            let from = o * self.stride;
            from.saturating_sub(self.padding)..(from + self.kernel).saturating_sub(self.padding).min(size)
        };
        (span(oy, self.height), span(ox, self.width))
    }

    /// Largest value of each window, plane by plane.
    pub fn max_pool(&self, x: &[f32], y: &mut [f32]) {
        self.pool(x, y, |rows, cols, plane| {
            let mut top = f32::NEG_INFINITY;
            for iy in rows {
                for ix in cols.clone() {
                    let v = plane[iy * self.width + ix];
                    top = if v > top || v.is_nan() { v } else { top };
                }
            }
            top
        });
    }

    /// Mean of each window, plane by plane.
    pub fn avg_pool(&self, x: &[f32], y: &mut [f32]) {
        let share = 1.0 / (self.kernel * self.kernel) as f32;
        self.pool(x, y, |rows, cols, plane| {
            let mut sum = 0.0;
            for iy in rows {
                for ix in cols.clone() {
                    sum += plane[iy * self.width + ix];
                }
            }
            sum * share
        });
    }

    #[inline(always)]
    fn pool(
        &self,
        x: &[f32],
        y: &mut [f32],
        f: impl Fn(std::ops::Range<usize>, std::ops::Range<usize>, &[f32]) -> f32,
    ) {
        let planes = x.chunks_exact(self.height * self.width).zip(y.chunks_exact_mut(self.positions()));
        for (plane, out) in planes {
            for oy in 0..self.out_height() {
                for ox in 0..self.out_width() {
                    let (rows, cols) = self.under(oy, ox);
                    out[oy * self.out_width() + ox] = f(rows, cols, plane);
                }
            }
        }
    }

    /// Gradient of [`Window::max_pool`]: to the first largest value under each window.
    pub fn max_pool_backward(&self, x: &[f32], y: &[f32], dy: &[f32], dx: &mut [f32]) {
        dx.fill(0.0);
        let (plane, n) = (self.height * self.width, self.positions());
        for (p, (x, dx)) in x.chunks_exact(plane).zip(dx.chunks_exact_mut(plane)).enumerate() {
            for oy in 0..self.out_height() {
                for ox in 0..self.out_width() {
                    let o = p * n + oy * self.out_width() + ox;
                    let (rows, cols) = self.under(oy, ox);
                    'window: for iy in rows {
                        for ix in cols.clone() {
                            if x[iy * self.width + ix] == y[o] {
                                dx[iy * self.width + ix] += dy[o];
                                break 'window;
                            }
                        }
                    }
                }
            }
        }
    }

    /// Gradient of [`Window::avg_pool`].
    pub fn avg_pool_backward(&self, dy: &[f32], dx: &mut [f32]) {
        dx.fill(0.0);
        let (plane, n) = (self.height * self.width, self.positions());
        let share = 1.0 / (self.kernel * self.kernel) as f32;
        for (p, dx) in dx.chunks_exact_mut(plane).enumerate() {
            for oy in 0..self.out_height() {
                for ox in 0..self.out_width() {
                    let d = dy[p * n + oy * self.out_width() + ox] * share;
                    let (rows, cols) = self.under(oy, ox);
                    for iy in rows {
                        dx[iy * self.width..][cols.clone()].iter_mut().for_each(|v| *v += d);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
            let mut cols = vec![f32::NAN; w.patch() * w.positions()];
            w.im2col(&image, &mut cols);
            let mut count = vec![0.0; image.len()];
            for c in 0..w.channels { for ky in 0..w.kernel { for kx in 0..w.kernel {
                for oy in 0..w.out_height() { for ox in 0..w.out_width() {
                    let (y, x) = ((oy * w.stride + ky) as isize - w.padding as isize, (ox * w.stride + kx) as isize - w.padding as isize);
                    let real = y >= 0 && x >= 0 && (y as usize) < w.height && (x as usize) < w.width;
                    let at = if real { (c * w.height + y as usize) * w.width + x as usize } else { 0 };
                    let want = if real { count[at] += 1.0; image[at] } else { 0.0 };
                    let row = (c * w.kernel + ky) * w.kernel + kx;
                    prop_assert_eq!(cols[row * w.positions() + oy * w.out_width() + ox], want);
                }}
            }}}
            let mut back = vec![0.0; image.len()];
            w.col2im_add(&cols, &mut back);
            for i in 0..image.len() { prop_assert_eq!(back[i], image[i] * count[i]); }
        }
    }
}
