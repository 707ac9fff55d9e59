//! Products of which a triangle is left out.

use pulp::Simd;
use std::ops::Range;

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
    pub(super) fn cuts(self) -> bool {
        matches!(self, Triangle::LeftLower | Triangle::LeftUpper)
    }

    /// The steps, among `k`, that a group's `rows` take.
    pub(super) fn steps(self, rows: &Range<usize>, k: Range<usize>) -> Range<usize> {
        match self {
            Triangle::LeftLower => k.start..rows.start.saturating_add(GROUP).clamp(k.start, k.end),
            Triangle::LeftUpper => rows.start.clamp(k.start, k.end)..k.end,
            Triangle::Full | Triangle::Upper => k,
        }
    }

    /// The columns, among these, that `rows` have.
    pub(super) fn columns<S: Simd>(self, rows: &Range<usize>, columns: Range<usize>) -> Range<usize> {
        match self {
            Triangle::Upper => {
                let before = rows.start.saturating_sub(columns.start);
                columns.end.min(columns.start + before - before % S::F32_LANES)..columns.end
            }
            _ => columns,
        }
    }
}
