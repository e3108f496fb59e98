//! The device page table of one mapped region: three bits a page.
//!
//! A translation is the host address plus an offset that is the same for the whole region, so all a page needs is its validity:
//!
//! | readable | writable | in place | meaning                                               |
//! |----------|----------|----------|-------------------------------------------------------|
//! | 0        | 0        | -        | no translation: far fault                             |
//! | 1        | 0        | 0        | loads, at the page's place in the window              |
//! | 1        | 1        | 0        | loads and stores, in the window                       |
//! | 1        | 0 or 1   | 1        | the same, at the host address: the page is served there |
//!
//! # Rules
//!
//! T1. The bits change only under the device lock: they are set by the install of a far fault's round and cleared by an
//!     invalidation. Hence plain read-modify-writes by a single writer.
//! T2. `in place` is set when a translation is established and *stays* when it goes: it means nothing without one. A worker that
//!     reads the right first and the place second therefore never pairs a right with the wrong place.
//! T3. Workers read them without a lock, inside a published access (see [`shootdown`](crate::shootdown)), which is what makes a
//!     set bit mean something. The words live in a mapping of our own, since a signal handler clears them.

use std::ops::Range;

use crate::shootdown::{Rights, Users};
use crate::sync::{AtomicU64, Ordering, Rule, broken, ordering};

/// Bits in a word.
pub(crate) const WORD: usize = 64;

/// Words of a bitmap with one bit per page of a region.
pub(crate) trait Words {
    /// Word `i`: pages `64 * i..64 * i + 64`.
    fn word(&self, i: usize) -> &AtomicU64;
}

/// Where the pages of a range are for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// All in device memory.
    Window,
    /// All at their host addresses.
    InPlace,
    /// Some in each; ask [`Table::place`] page by page.
    Mixed,
}

/// Where one page is for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In device memory, at its place in the window.
    Window,
    /// At its host address.
    Host,
}

/// The translations of one mapped region. Pages are counted from the region's base.
#[derive(Debug)]
pub(crate) struct Table<W> {
    readable: W,
    writable: W,
    in_place: W,
}

/// The bits of word `i` that lie in `pages`.
pub(crate) fn mask(i: usize, pages: &Range<usize>) -> u64 {
    let start = pages.start.saturating_sub(i * WORD).min(WORD);
    let end = pages.end.saturating_sub(i * WORD).min(WORD);
    if start >= end {
        return 0;
    }
    (u64::MAX >> (WORD - (end - start))) << start
}

/// The words that `pages` touch.
pub(crate) fn words(pages: &Range<usize>) -> Range<usize> {
    if pages.is_empty() {
        0..0
    } else {
        pages.start / WORD..pages.end.div_ceil(WORD)
    }
}

impl<W: Words> Table<W> {
    /// A table without translations: the bitmaps are zero.
    pub(crate) fn new(readable: W, writable: W, in_place: W) -> Table<W> {
        Table {
            readable,
            writable,
            in_place,
        }
    }

    /// Establishes translations for word `i`: for the readable pages, some of which are writable too, and some in place. Pages in
    /// neither set keep what they have. T1: the caller holds the device lock, and the protocol's leave.
    pub(crate) fn install(&self, i: usize, readable: u64, writable: u64, in_place: u64) {
        let pages = readable | writable;
        if broken(Rule::PlaceFirst) {
            or(self.readable.word(i), pages);
            or(self.writable.word(i), writable);
        }
        // T2: the place first. Only pages that have no translation yet can change theirs.
        and(self.in_place.word(i), !pages | in_place);
        or(self.in_place.word(i), pages & in_place);
        or(self.readable.word(i), pages);
        or(self.writable.word(i), writable);
    }

    /// Takes the translations of word `i` that are in `bits` away, or only the right to write. T1: the caller holds the device lock.
    pub(crate) fn clear(&self, i: usize, bits: u64, users: Users) {
        if broken(Rule::PlaceStays) {
            and(self.in_place.word(i), !bits);
        }
        and(self.writable.word(i), !bits);
        if users == Users::All {
            and(self.readable.word(i), !bits);
        }
    }

    /// The pages of word `i` that can be used in their window, and those that can be used in place.
    #[inline]
    fn valid(&self, i: usize, rights: Rights) -> (u64, u64) {
        let right = match rights {
            Rights::Read => &self.readable,
            Rights::Write => &self.writable,
        };
        // Acquire: pairs with the Release in `or`, so that a page's place (T2) and contents are there when its right is.
        let valid = right
            .word(i)
            .load(ordering(Ordering::Acquire, Rule::RightAcquire));
        let in_place = self.in_place.word(i).load(Ordering::Relaxed);
        (valid & !in_place, valid & in_place)
    }

    /// Where the device finds `page`, if it has a translation with these rights.
    #[inline]
    pub(crate) fn place(&self, page: usize, rights: Rights) -> Option<Place> {
        let (window, in_place) = self.valid(page / WORD, rights);
        let bit = 1 << (page % WORD);
        if in_place & bit != 0 {
            Some(Place::Host)
        } else if window & bit != 0 {
            Some(Place::Window)
        } else {
            None
        }
    }

    /// Where the device finds all of `pages`, or the first of them that it has no translation for.
    #[inline]
    pub(crate) fn extent(&self, pages: &Range<usize>, rights: Rights) -> Result<Extent, usize> {
        let (mut any_window, mut any_in_place) = (false, false);
        for i in words(pages) {
            let mask = mask(i, pages);
            let (window, in_place) = self.valid(i, rights);
            let missing = mask & !(window | in_place);
            if missing != 0 {
                return Err(i * WORD + missing.trailing_zeros() as usize);
            }
            any_window |= window & mask != 0;
            any_in_place |= in_place & mask != 0;
        }
        Ok(match (any_window, any_in_place) {
            (true, true) => Extent::Mixed,
            (false, true) => Extent::InPlace,
            (_, false) => Extent::Window,
        })
    }

    /// How many of `pages` have no translation with these rights.
    pub(crate) fn nr_missing(&self, pages: &Range<usize>, rights: Rights) -> usize {
        words(pages)
            .map(|i| {
                let (window, in_place) = self.valid(i, rights);
                (mask(i, pages) & !(window | in_place)).count_ones() as usize
            })
            .sum()
    }
}

/// Sets bits, as the single writer (T1).
fn or(word: &AtomicU64, bits: u64) {
    if bits != 0 {
        // Release: pairs with the Acquire in `Table::valid`.
        word.store(
            word.load(Ordering::Relaxed) | bits,
            ordering(Ordering::Release, Rule::InstallRelease),
        );
    }
}

/// Clears bits, as the single writer (T1). What orders it against the workers is the handshake's fence.
fn and(word: &AtomicU64, keep: u64) {
    let old = word.load(Ordering::Relaxed);
    if old & !keep != 0 {
        word.store(old & keep, Ordering::Relaxed);
    }
}
