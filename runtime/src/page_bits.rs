//! [`PageBits`]: one bit per page, for the translation tables of devices.

use core::fmt;
use core::sync::atomic::Ordering;

use crate::addr::PAGES_PER_BLOCK;
use crate::error::{Access, Error, ErrorKind, Result};
use crate::mask::PageMask;
use crate::round::Valid;
use crate::sys::mmap::MapArray;

/// An atomic bitmap with one bit per page, in memory that the fault path may read: what a [`Device::Table`](crate::Device::Table) is made of.
///
/// A bit says that there is a translation, and is set with the proof that there may be one: a [`Valid`], which nobody has without
/// the device's lock and an update that was not interrupted. To be cleared it needs no leave.
pub struct PageBits {
    words: MapArray<core::sync::atomic::AtomicU64>,
}

impl PageBits {
    /// `nr_pages` bits, all clear.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(nr_pages: usize) -> Result<Self> {
        let words = MapArray::zeroed(nr_pages.div_ceil(64).max(8)).map_err(|e| {
            Error::new("page bits", ErrorKind::OutOfMemory)
                .errno(e.raw_os_error().unwrap_or(libc::ENOMEM))
        })?;
        Ok(Self { words })
    }

    /// The words, 64 pages each, least significant bit first: for workers that look at many pages at once, and for tables that are
    /// written in a way of their own. Who sets bits here answers for it alone.
    #[must_use]
    pub fn words(&self) -> &[core::sync::atomic::AtomicU64] {
        &self.words
    }

    /// Whether `page` is set.
    #[must_use]
    pub fn contains(&self, page: usize, order: Ordering) -> bool {
        self.words[page / 64].load(order) >> (page % 64) & 1 == 1
    }

    /// Sets the pages that may be accessed so. A load and a store per word, not a read-modify-write: the device lock is held.
    #[inline]
    pub fn install(&self, valid: &Valid, access: Access) {
        self.change(valid.block(), rights(valid, access), |old, bits| old | bits);
    }

    /// [`install`](Self::install), of the pages in `within` alone.
    pub fn install_within(&self, valid: &Valid, access: Access, within: &PageMask) {
        let pages = *rights(valid, access) & *within;
        self.change(valid.block(), &pages, |old, bits| old | bits);
    }

    /// Of a table's bitmap of pages that are accessed at the host's address: sets those that are, clears those that are in the window, and
    /// leaves the others. Before the rights are installed, so that who sees a right sees the place as well.
    pub fn install_places(&self, valid: &Valid) {
        let in_window = (*valid.readable() | *valid.writable()) - *valid.in_place();
        self.remove(valid.block(), &in_window);
        self.change(valid.block(), valid.in_place(), |old, bits| old | bits);
    }

    /// Clears the pages of `mask` in `block`. Under the device lock.
    pub fn remove(&self, block: usize, mask: &PageMask) {
        self.change(block, mask, |old, bits| old & !bits);
    }

    #[inline]
    fn change(&self, block: usize, mask: &PageMask, f: impl Fn(u64, u64) -> u64) {
        let first = block * (PAGES_PER_BLOCK / 64);
        for (word, &bits) in self.words[first..].iter().zip(mask.words()) {
            if bits != 0 {
                // The writers exclude each other by the device lock. Release: pairs with readers that load with Acquire,
                // so that who sees a translation also sees the page it leads to.
                word.store(f(word.load(Ordering::Relaxed), bits), Ordering::Release);
            }
        }
    }
}

#[inline]
fn rights(valid: &Valid, access: Access) -> &PageMask {
    match access {
        Access::Read => valid.readable(),
        Access::Write => valid.writable(),
    }
}

impl fmt::Debug for PageBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set: u32 = self
            .words
            .iter()
            .map(|w| w.load(Ordering::Relaxed).count_ones())
            .sum();
        f.debug_struct("PageBits")
            .field("nr_pages", &(self.words.len() * 64))
            .field("set", &set)
            .finish()
    }
}
