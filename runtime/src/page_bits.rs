//! [`PageBits`]: one bit per page, for the translation tables of devices.

use core::fmt;
use core::sync::atomic::Ordering;

use crate::addr::PAGES_PER_BLOCK;
use crate::error::{Error, ErrorKind, Result};
use crate::mask::PageMask;
use crate::sys::mmap::MapArray;

/// An atomic bitmap with one bit per page, in memory that the fault path may read: what a [`Device::Table`](crate::Device::Table) is made of.
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

    /// The words, 64 pages each, least significant bit first.
    #[must_use]
    pub fn words(&self) -> &[core::sync::atomic::AtomicU64] {
        &self.words
    }

    /// Whether `page` is set.
    #[must_use]
    pub fn contains(&self, page: usize, order: Ordering) -> bool {
        self.words[page / 64].load(order) >> (page % 64) & 1 == 1
    }

    /// Sets the pages of `mask` in `block`. Under the device lock: a load and a store per word, not a read-modify-write.
    pub fn insert(&self, block: usize, mask: &PageMask) {
        self.change(block, mask, |old, bits| old | bits);
    }

    /// Clears the pages of `mask` in `block`. Under the device lock.
    pub fn remove(&self, block: usize, mask: &PageMask) {
        self.change(block, mask, |old, bits| old & !bits);
    }

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
