//! Half-open intervals.

use core::fmt;

/// A half-open interval `start..end`. One that is empty overlaps nothing, whatever its bounds.
///
/// The unit is the caller's: the hub compares, it does not count pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Interval {
    /// The first position inside.
    pub start: u64,
    /// The first position after it.
    pub end: u64,
}

impl Interval {
    /// Overlaps nothing.
    pub const EMPTY: Self = Self::new(0, 0);

    /// Overlaps everything that is not empty.
    pub const ALL: Self = Self::new(0, u64::MAX);

    /// `start..end`.
    #[must_use]
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end }
    }

    /// Whether there is nothing inside.
    #[must_use]
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.start >= self.end
    }

    /// Whether some position is inside both.
    ///
    /// For intervals that are not empty this is `self.start < other.end && other.start < self.end`.
    #[must_use]
    #[inline]
    pub fn overlaps(self, other: Self) -> bool {
        self.start.max(other.start) < self.end.min(other.end)
    }

    /// The positions inside both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }
}

impl From<core::ops::Range<u64>> for Interval {
    fn from(range: core::ops::Range<u64>) -> Self {
        Self::new(range.start, range.end)
    }
}

impl fmt::Debug for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

#[cfg(all(test, not(svm_loom)))]
mod tests {
    use super::*;

    #[test]
    fn overlap_means_a_common_position() {
        let bounds = 0..6_u64;
        for (a, b) in bounds
            .clone()
            .flat_map(|a| bounds.clone().map(move |b| (a, b)))
        {
            for (c, d) in bounds
                .clone()
                .flat_map(|c| bounds.clone().map(move |d| (c, d)))
            {
                let (one, two) = (Interval::new(a, b), Interval::new(c, d));
                let common = bounds
                    .clone()
                    .any(|at| (a..b).contains(&at) && (c..d).contains(&at));
                assert_eq!(one.overlaps(two), common, "{one:?} and {two:?}");
                assert_eq!(
                    !one.intersection(two).is_empty(),
                    common,
                    "{one:?} and {two:?}"
                );
            }
        }
    }
}
