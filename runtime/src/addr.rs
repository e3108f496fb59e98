//! Addresses, pages and blocks.
//!
//! ```text
//! page   4 KiB   the unit the kernel maps and moves
//! block  2 MiB   512 pages, 2 MiB-aligned: the unit of locking, and of a huge page
//! ```
//!
//! Addresses are plain `usize` values: the runtime names memory it must never dereference (a page
//! may be away, or gone), so a pointer would promise too much. [`PageRange`] is the currency of every
//! interface that deals in whole pages: it can't be built unaligned, empty or wrapping.

use core::fmt;

/// Base-2 logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page. A kernel with another page size is refused when the runtime starts.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// Base-2 logarithm of [`BLOCK_SIZE`].
pub const BLOCK_SHIFT: u32 = 21;
/// Bytes in a block.
pub const BLOCK_SIZE: usize = 1 << BLOCK_SHIFT;
/// Pages in a block.
pub const PAGES_PER_BLOCK: usize = BLOCK_SIZE / PAGE_SIZE;

/// Rounds `addr` down to the start of its page.
#[inline]
pub const fn page_floor(addr: usize) -> usize {
    addr & !(PAGE_SIZE - 1)
}

/// Rounds `addr` down to the start of its block.
#[inline]
pub const fn block_floor(addr: usize) -> usize {
    addr & !(BLOCK_SIZE - 1)
}

/// A non-empty run of whole pages, `start..end` in bytes.
///
/// # Invariants
///
/// `start` and `end` are multiples of [`PAGE_SIZE`], and `start < end`. Constructors establish this
/// and nothing breaks it, so holders need not check.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    start: usize,
    end: usize,
}

impl PageRange {
    /// The range `start..end`, if both are page-aligned and `start < end`.
    #[inline]
    pub const fn new(start: usize, end: usize) -> Option<Self> {
        if start < end && (start | end).is_multiple_of(PAGE_SIZE) {
            Some(Self { start, end })
        } else {
            None
        }
    }

    /// `nr_pages` pages from `start`, if `start` is page-aligned, the count is not zero and the
    /// range does not wrap.
    #[inline]
    pub const fn from_pages(start: usize, nr_pages: usize) -> Option<Self> {
        let Some(len) = nr_pages.checked_mul(PAGE_SIZE) else {
            return None;
        };
        let Some(end) = start.checked_add(len) else {
            return None;
        };
        Self::new(start, end)
    }

    /// The fewest pages that contain all of `addr..addr + len`. `None` if `len` is zero or the range
    /// wraps.
    #[inline]
    pub const fn containing(addr: usize, len: usize) -> Option<Self> {
        if len == 0 {
            return None;
        }
        let Some(end) = addr.checked_add(len) else {
            return None;
        };
        let Some(end) = end.checked_next_multiple_of(PAGE_SIZE) else {
            return None;
        };
        Self::new(page_floor(addr), end)
    }

    /// The whole pages that lie inside `addr..addr + len`. `None` if there is none.
    #[inline]
    pub const fn inside(addr: usize, len: usize) -> Option<Self> {
        let Some(end) = addr.checked_add(len) else {
            return None;
        };
        let Some(start) = addr.checked_next_multiple_of(PAGE_SIZE) else {
            return None;
        };
        Self::new(start, page_floor(end))
    }

    /// First byte.
    #[inline]
    pub const fn start(self) -> usize {
        self.start
    }

    /// One past the last byte.
    #[inline]
    pub const fn end(self) -> usize {
        self.end
    }

    /// Length in bytes; never zero.
    #[inline]
    pub const fn len_bytes(self) -> usize {
        self.end - self.start
    }

    /// Length in pages; never zero.
    #[inline]
    pub const fn nr_pages(self) -> usize {
        self.len_bytes() >> PAGE_SHIFT
    }

    /// Whether the two ranges share a page.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether `addr` lies in the range.
    #[inline]
    pub const fn contains_addr(self, addr: usize) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Whether all of `other` lies in the range.
    #[inline]
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The pages both ranges have.
    #[inline]
    pub const fn intersect(self, other: Self) -> Option<Self> {
        let start = if self.start > other.start {
            self.start
        } else {
            other.start
        };
        let end = if self.end < other.end {
            self.end
        } else {
            other.end
        };
        Self::new(start, end)
    }

    /// What is left when the first `bytes` are taken off. `None` if nothing is, or if `bytes` is not
    /// a whole number of pages.
    #[inline]
    pub const fn skip(self, bytes: usize) -> Option<Self> {
        let Some(start) = self.start.checked_add(bytes) else {
            return None;
        };
        Self::new(start, self.end)
    }

    /// The addresses of the pages, ascending.
    pub fn pages(self) -> impl DoubleEndedIterator<Item = usize> + ExactSizeIterator + Clone {
        (0..self.nr_pages()).map(move |page| self.start + (page << PAGE_SHIFT))
    }

    /// The range cut at every [`BLOCK_SIZE`] boundary, ascending.
    pub fn blocks(self) -> impl Iterator<Item = Self> + Clone {
        let mut rest = Some(self);
        core::iter::from_fn(move || {
            let range = rest?;
            // A block that ends at the top of the address space ends where the range does.
            let cut = block_floor(range.start)
                .checked_add(BLOCK_SIZE)
                .map_or(range.end, |cut| cut.min(range.end));
            rest = Self::new(cut, range.end);
            Self::new(range.start, cut)
        })
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(range: Option<PageRange>, expected: Option<(usize, usize)>) {
        assert_eq!(range.map(|r| (r.start() / 4096, r.end() / 4096)), expected);
    }

    const fn range(start_page: usize, end_page: usize) -> PageRange {
        PageRange::new(start_page * 4096, end_page * 4096).unwrap()
    }

    #[test]
    fn constructors_refuse_what_is_not_whole_pages() {
        check(PageRange::new(4096, 8192), Some((1, 2)));
        check(PageRange::new(4096, 4096), None);
        check(PageRange::new(8192, 4096), None);
        check(PageRange::new(4097, 8192), None);
        check(PageRange::new(4096, 8191), None);
        check(PageRange::from_pages(4096, 3), Some((1, 4)));
        check(PageRange::from_pages(4096, 0), None);
        check(PageRange::from_pages(4096, usize::MAX), None);
    }

    #[test]
    fn containing_rounds_outwards() {
        check(PageRange::containing(4096, 1), Some((1, 2)));
        check(PageRange::containing(4095, 2), Some((0, 2)));
        check(PageRange::containing(8191, 1), Some((1, 2)));
        check(PageRange::containing(4096, 0), None);
        check(PageRange::containing(usize::MAX, 1), None);
        check(PageRange::containing(usize::MAX - 1, 1), None);
    }

    #[test]
    fn inside_rounds_inwards() {
        check(PageRange::inside(4096, 4096), Some((1, 2)));
        check(PageRange::inside(4095, 4098), Some((1, 2)));
        check(PageRange::inside(4097, 4096), None);
        check(PageRange::inside(4096, 4095), None);
        check(PageRange::inside(0, 0), None);
        check(PageRange::inside(usize::MAX, 0), None);
        check(PageRange::inside(usize::MAX, usize::MAX), None);
    }

    #[test]
    fn set_operations_are_half_open() {
        let middle = range(2, 5);
        assert!(!middle.overlaps(range(0, 2)) && !middle.overlaps(range(5, 9)));
        assert!(middle.overlaps(range(4, 9)) && middle.overlaps(range(3, 4)));
        check(middle.intersect(range(4, 9)), Some((4, 5)));
        check(middle.intersect(range(5, 9)), None);
        assert!(middle.contains(range(2, 5)) && !middle.contains(range(2, 6)));
        assert!(middle.contains_addr(2 * 4096) && !middle.contains_addr(5 * 4096));
        check(middle.skip(4096), Some((3, 5)));
        check(middle.skip(3 * 4096), None);
        check(middle.skip(1), None);
    }

    #[test]
    fn blocks_cut_at_2_mib_and_cover_everything_once() {
        let pieces: Vec<_> = range(500, 1030).blocks().collect();
        assert_eq!(
            pieces,
            [range(500, 512), range(512, 1024), range(1024, 1030)]
        );
        assert_eq!(range(512, 1024).blocks().count(), 1);
        let top = PageRange::new(block_floor(usize::MAX), page_floor(usize::MAX)).unwrap();
        assert_eq!(top.blocks().collect::<Vec<_>>(), [top]);
    }

    #[test]
    fn pages_are_all_of_them() {
        assert_eq!(range(2, 4).pages().collect::<Vec<_>>(), [8192, 12288]);
        assert_eq!(range(2, 4).to_string(), "0x2000..0x4000");
    }
}
