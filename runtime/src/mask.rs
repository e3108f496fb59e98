//! [`PageMask`]: a set of the 512 pages of one block.
//!
//! Everything that is true of some pages of a block and not of others is one of these masks, and every movement acts on
//! a mask's *runs*: one system call per maximal run of consecutive pages, never one per page.

use core::fmt;
use core::ops::{BitAnd, BitAndAssign, BitOr, BitOrAssign, Not, Range, Sub, SubAssign};

use crate::addr::PAGES_PER_BLOCK;

const WORDS: usize = PAGES_PER_BLOCK / 64;

/// A set of pages of one 2 MiB block, one bit per page.
#[derive(Clone, Copy, PartialEq, Eq, Default, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct PageMask([u64; WORDS]);

impl PageMask {
    /// No page.
    pub const EMPTY: Self = Self([0; WORDS]);
    /// All 512 pages.
    pub const FULL: Self = Self([!0; WORDS]);

    /// The pages `range.start .. range.end` (indices within the block, `end <= 512`).
    #[must_use]
    #[inline]
    pub fn range(range: Range<usize>) -> Self {
        debug_assert!(range.end <= PAGES_PER_BLOCK);
        // Most ranges lie in one word: a loop over the words they touch is less code to fetch than eight words done alike.
        let mut mask = Self::EMPTY;
        let mut at = range.start;
        while at < range.end
            && let Some(bits) = mask.0.get_mut(at / 64)
        {
            let end = range.end.min((at | 63) + 1);
            *bits = (!0 >> (64 - (end - at))) << (at % 64);
            at = end;
        }
        mask
    }

    /// The set of one page.
    #[must_use]
    #[inline]
    pub fn page(page: usize) -> Self {
        let mut mask = Self::EMPTY;
        mask.0[page / 64] |= 1 << (page % 64);
        mask
    }

    /// Builds a mask from its eight words, least significant page first.
    #[must_use]
    #[inline]
    pub const fn from_words(words: [u64; WORDS]) -> Self {
        Self(words)
    }

    /// The eight words, least significant page first.
    #[must_use]
    #[inline]
    pub const fn words(&self) -> &[u64; WORDS] {
        &self.0
    }

    /// Whether `page` is in the set.
    #[must_use]
    #[inline]
    pub const fn contains(&self, page: usize) -> bool {
        self.0[page / 64] >> (page % 64) & 1 == 1
    }

    /// Whether the set has no page.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&w| w == 0)
    }

    /// Number of pages in the set.
    #[must_use]
    #[inline]
    pub fn count(&self) -> usize {
        // Most words are all or nothing, and the instruction that counts ones is not everywhere.
        let ones = |&w: &u64| match w {
            0 => 0,
            u64::MAX => 64,
            some => some.count_ones() as usize,
        };
        self.0.iter().map(ones).sum()
    }

    /// The set's one word that is not empty, and its index; `None` if it has pages in several words, or in none.
    #[inline]
    pub(crate) fn as_word(&self) -> Option<(usize, u64)> {
        let word = self.0.iter().position(|&w| w != 0)?;
        let rest = self.0[word + 1..].iter().fold(0, |rest, w| rest | w);
        (rest == 0).then_some((word, self.0[word]))
    }

    /// Adds the pages `bits` of word `word`.
    #[inline]
    pub(crate) fn insert_word(&mut self, word: usize, bits: u64) {
        if let Some(place) = self.0.get_mut(word) {
            *place |= bits;
        }
    }

    /// Word `word`: 64 pages.
    #[inline]
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.0.get(word).copied().unwrap_or(0)
    }

    /// The aligned group of `group` pages around `page`. `group` is a power of two up to a block.
    #[inline]
    pub(crate) fn group_around(page: usize, group: usize) -> Self {
        debug_assert!(group.is_power_of_two() && group <= PAGES_PER_BLOCK);
        let start = page & !(group - 1);
        Self::range(start..start + group)
    }

    /// Every page of each aligned group of `group` pages of which some page is in the set. `group` is a power of two up to a block.
    #[inline]
    pub(crate) fn grown(mut self, group: usize) -> Self {
        debug_assert!(group.is_power_of_two() && group <= PAGES_PER_BLOCK);
        if group == 1 {
            return self;
        }
        if group <= 64 {
            for word in &mut self.0 {
                *word = grow_word(*word, group);
            }
            return self;
        }
        let mut next = 0;
        while let Some(page) = self.first_from(next) {
            self |= Self::group_around(page, group);
            next = (page | (group - 1)) + 1;
        }
        self
    }

    /// Whether every page of `other` is in the set.
    #[must_use]
    #[inline]
    pub fn contains_all(&self, other: &Self) -> bool {
        (*other - *self).is_empty()
    }

    /// Whether some page is in both sets.
    #[must_use]
    #[inline]
    pub fn intersects(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).any(|(a, b)| a & b != 0)
    }

    /// The first page at or after `from` that is in the set.
    #[must_use]
    #[inline]
    pub fn first_from(&self, from: usize) -> Option<usize> {
        scan(&self.0, from, 0)
    }

    /// The first page at or after `from` that is *not* in the set.
    #[must_use]
    #[inline]
    pub fn first_absent_from(&self, from: usize) -> Option<usize> {
        scan(&self.0, from, !0)
    }

    /// The smallest range of pages that covers the set; `None` if it is empty.
    #[must_use]
    #[inline]
    pub fn bounds(&self) -> Option<Range<usize>> {
        let start = self.first_from(0)?;
        let word = self.0.iter().rposition(|&w| w != 0)?;
        Some(start..word * 64 + 64 - self.0[word].leading_zeros() as usize)
    }

    /// The maximal runs of consecutive pages, in ascending order.
    #[must_use]
    #[inline]
    pub fn runs(&self) -> Runs {
        Runs {
            mask: *self,
            next: 0,
        }
    }

    /// The maximal run that `page` lies in; empty if `page` is not in the set.
    #[must_use]
    #[inline]
    pub fn run_around(&self, page: usize) -> Range<usize> {
        if !self.contains(page) {
            return page..page;
        }
        let end = self.first_absent_from(page).unwrap_or(PAGES_PER_BLOCK);
        let (mut word, bit) = (page / 64, page % 64);
        // Absent pages at or below `page`, the nearest one highest.
        let mut absent = !self.0[word] << (63 - bit);
        if absent != 0 {
            return page + 1 - absent.leading_zeros() as usize..end;
        }
        while word > 0 {
            word -= 1;
            absent = !self.0[word];
            if absent != 0 {
                return word * 64 + 64 - absent.leading_zeros() as usize..end;
            }
        }
        0..end
    }
}

/// Every page of each aligned group of `group` pages of one word of which some page is in it. `group` is a power of two up to 64.
#[inline]
pub(crate) fn grow_word(word: u64, group: usize) -> u64 {
    debug_assert!(group.is_power_of_two() && group <= 64);
    let ones = u64::MAX >> (64 - group);
    // A one at the lowest page of each group.
    let lowest = u64::MAX / ones;
    let mut any = word;
    let mut shift = 1;
    while shift < group {
        any |= any >> shift;
        shift *= 2;
    }
    (any & lowest).wrapping_mul(ones)
}

/// First bit at or after `from` in `words ^ flip`.
#[inline]
fn scan(words: &[u64; WORDS], from: usize, flip: u64) -> Option<usize> {
    let mut word = from / 64;
    if word >= WORDS {
        return None;
    }
    let mut bits = (words[word] ^ flip) & (!0 << (from % 64));
    loop {
        if bits != 0 {
            return Some(word * 64 + bits.trailing_zeros() as usize);
        }
        word += 1;
        if word == WORDS {
            return None;
        }
        bits = words[word] ^ flip;
    }
}

/// Iterator over the maximal runs of a [`PageMask`].
#[derive(Clone, Debug)]
pub struct Runs {
    mask: PageMask,
    next: usize,
}

impl Iterator for Runs {
    type Item = Range<usize>;

    #[inline]
    fn next(&mut self) -> Option<Range<usize>> {
        let start = self.mask.first_from(self.next)?;
        let end = self
            .mask
            .first_absent_from(start)
            .unwrap_or(PAGES_PER_BLOCK);
        self.next = end;
        Some(start..end)
    }
}

macro_rules! word_wise {
    ($op:ident $f:ident $assign:ident $g:ident, $a:ident $b:ident => $e:expr) => {
        impl $op for PageMask {
            type Output = Self;
            #[inline]
            fn $f(mut self, other: Self) -> Self {
                self.$g(other);
                self
            }
        }
        impl $assign for PageMask {
            #[inline]
            fn $g(&mut self, other: Self) {
                for (a, b) in self.0.iter_mut().zip(other.0) {
                    let ($a, $b) = (*a, b);
                    *a = $e;
                }
            }
        }
    };
}

word_wise!(BitAnd bitand BitAndAssign bitand_assign, a b => a & b);
word_wise!(BitOr bitor BitOrAssign bitor_assign, a b => a | b);
word_wise!(Sub sub SubAssign sub_assign, a b => a & !b);

impl Not for PageMask {
    type Output = Self;
    #[inline]
    fn not(self) -> Self {
        Self::FULL - self
    }
}

impl fmt::Debug for PageMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.runs()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_sets_exactly_its_pages() {
        for (start, end) in [
            (0, 0),
            (0, 1),
            (0, 512),
            (5, 6),
            (63, 65),
            (64, 128),
            (100, 511),
            (511, 512),
        ] {
            let mask = PageMask::range(start..end);
            for page in 0..512 {
                assert_eq!(
                    mask.contains(page),
                    (start..end).contains(&page),
                    "{start}..{end} page {page}"
                );
            }
            assert_eq!(mask.count(), end - start);
            assert_eq!(mask.bounds(), (start < end).then_some(start..end));
        }
    }

    #[test]
    fn runs_around_and_groups_agree_with_a_search() {
        let words = [0x8000_0000_0000_0001, !0, 0, 0xF0F0, !0, !0, 1 << 40, !1];
        let mask = PageMask::from_words(words);
        for page in 0..512 {
            let run = mask
                .runs()
                .find(|run| run.contains(&page))
                .unwrap_or(page..page);
            assert_eq!(mask.run_around(page), run, "page {page}");
        }
        let sparse = PageMask::page(200) | PageMask::page(511);
        let groups = (0..=9).map(|n| 1 << n);
        for (mask, group) in groups.flat_map(|group| [(mask, group), (sparse, group)]) {
            let grown = mask.grown(group);
            for page in 0..512 {
                let start = page & !(group - 1);
                let any = (start..start + group).any(|p| mask.contains(p));
                assert_eq!(
                    PageMask::group_around(page, group),
                    PageMask::range(start..start + group)
                );
                assert_eq!(grown.contains(page), any, "group {group} page {page}");
            }
        }
    }

    #[test]
    fn runs_are_maximal_and_cover_the_set() {
        let mask = PageMask::range(0..3) | PageMask::range(60..70) | PageMask::page(511);
        assert_eq!(mask.runs().collect::<Vec<_>>(), [0..3, 60..70, 511..512]);
        assert_eq!(mask.run_around(64), 60..70);
        assert_eq!(mask.run_around(5), 5..5);
        assert!(PageMask::FULL.runs().eq(std::iter::once(0..512)));
        assert_eq!(PageMask::EMPTY.runs().next(), None);
    }

    #[test]
    fn a_set_within_one_word_is_that_word() {
        assert_eq!(PageMask::EMPTY.as_word(), None);
        assert_eq!(PageMask::FULL.as_word(), None);
        assert_eq!(PageMask::range(63..65).as_word(), None);
        for start in 0..PAGES_PER_BLOCK {
            for len in [1, 16, 64] {
                let end = (start + len).min(PAGES_PER_BLOCK);
                let mask = PageMask::range(start..end);
                assert_eq!(mask.count(), end - start);
                let (first, last) = (start / 64, (end - 1) / 64);
                let expected = (first == last).then(|| (first, mask.word(first)));
                assert_eq!(mask.as_word(), expected, "{start}..{end}");
                if let Some((word, bits)) = expected {
                    let mut by_word = PageMask::EMPTY;
                    by_word.insert_word(word, bits);
                    assert_eq!(by_word, mask);
                    by_word.insert_word(word, grow_word(bits, 16));
                    assert_eq!(by_word, mask.grown(16));
                }
            }
        }
    }

    #[test]
    fn set_algebra() {
        let a = PageMask::range(10..20);
        let b = PageMask::range(15..25);
        assert_eq!(a & b, PageMask::range(15..20));
        assert_eq!(a | b, PageMask::range(10..25));
        assert_eq!(a - b, PageMask::range(10..15));
        assert!(a.intersects(&b) && !a.contains_all(&b) && a.contains_all(&(a & b)));
        assert_eq!(!PageMask::FULL, PageMask::EMPTY);
    }
}
