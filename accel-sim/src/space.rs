//! One region as one launch uses it: where its pages are for the device.
//!
//! The pages that a region only partly covers, its *edges*, never move. A launch that holds the borrow works on copies of
//! them in the window, made before it and written back after it; a shared view uses them in place. Pages wholly inside, the
//! *body*, have translations in the region's [table](crate::table).

use std::ops::Range;

use svm::addr::PAGE_SIZE;
use svm::{MappedRef, RegionRef};

use crate::device::Sim;
use crate::shootdown::Rights;
use crate::table::{Extent, Place};

/// How a launch's views use a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// They hold a borrow of it: nobody else touches it during the launch.
    Borrowed,
    /// Both sides run.
    Shared,
}

/// A region as a launch uses it. Pages are counted from the region's base.
#[derive(Debug)]
pub(crate) struct Space {
    mapped: MappedRef<Sim>,
    base: usize,
    body: Range<usize>,
    offset: isize,
    sharing: Sharing,
    in_place: bool,
}

impl Space {
    pub(crate) fn new(mapped: MappedRef<Sim>, region: RegionRef<'_>, sharing: Sharing) -> Space {
        let base = region.base();
        let start = (region.addr() - base).div_ceil(PAGE_SIZE);
        let end = (region.addr() + region.len_bytes() - base) / PAGE_SIZE;
        Space {
            base,
            body: start..end.max(start),
            offset: mapped.offset(),
            in_place: region.is_in_place(),
            mapped,
            sharing,
        }
    }

    pub(crate) fn mapped(&self) -> &MappedRef<Sim> {
        &self.mapped
    }

    pub(crate) fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// The page of a host page number.
    #[inline]
    pub(crate) fn page(&self, host_page: u64) -> usize {
        host_page as usize - self.base / PAGE_SIZE
    }

    /// The pages that hold bytes `addr..addr + len`, of which there is one at least.
    #[inline]
    pub(crate) fn pages(&self, addr: usize, len: usize) -> Range<usize> {
        let first = addr - self.base;
        first / PAGE_SIZE..(first + len - 1) / PAGE_SIZE + 1
    }

    /// The host page numbers of `pages`.
    #[inline]
    pub(crate) fn host_pages(&self, pages: &Range<usize>) -> Range<u64> {
        let base = self.base / PAGE_SIZE;
        (base + pages.start) as u64..(base + pages.end) as u64
    }

    /// The host address of `page`.
    pub(crate) fn addr_of(&self, page: usize) -> usize {
        self.base + page * PAGE_SIZE
    }

    /// What to add to a host address for the same byte at `place`.
    #[inline]
    pub(crate) fn offset(&self, place: Place) -> isize {
        match place {
            Place::Window => self.offset,
            Place::Host => 0,
        }
    }

    /// Where most pages of the region are for the device.
    #[inline]
    pub(crate) fn usual_place(&self) -> Place {
        if self.in_place {
            Place::Host
        } else {
            Place::Window
        }
    }

    fn edges(&self) -> Place {
        match self.sharing {
            Sharing::Borrowed => Place::Window,
            Sharing::Shared => Place::Host,
        }
    }

    /// Where the device finds `page`, if it may access it so.
    pub(crate) fn place(&self, page: usize, rights: Rights) -> Option<Place> {
        if self.in_place {
            Some(Place::Host)
        } else if self.body.contains(&page) {
            self.mapped.table().bits().place(page, rights)
        } else {
            Some(self.edges())
        }
    }

    /// Where the device finds all of `pages`, or the first that it has no translation for.
    pub(crate) fn extent(&self, pages: &Range<usize>, rights: Rights) -> Result<Extent, usize> {
        if self.in_place {
            return Ok(Extent::InPlace);
        }
        let body = self.body_of(pages);
        let extent = self.mapped.table().bits().extent(&body, rights)?;
        let edges = match self.edges() {
            Place::Window => Extent::Window,
            Place::Host => Extent::InPlace,
        };
        Ok(if body == *pages || extent == edges {
            extent
        } else if body.is_empty() {
            edges
        } else {
            Extent::Mixed
        })
    }

    /// As [`extent`](Self::extent), and sets the bit in `on_host` of each of `pages` that is at its host address.
    ///
    /// To be asked while the pages are published: what it says holds until they are withdrawn, even when the table has changed since.
    pub(crate) fn places(
        &self,
        pages: &Range<usize>,
        rights: Rights,
        on_host: &mut [u64],
    ) -> Result<Extent, usize> {
        let extent = self.extent(pages, rights)?;
        on_host.fill(0);
        for (i, page) in pages.clone().enumerate() {
            let host = match extent {
                Extent::Window => break,
                Extent::InPlace => true,
                Extent::Mixed => self.place(page, rights).ok_or(page)? == Place::Host,
            };
            on_host[i / 64] |= u64::from(host) << (i % 64);
        }
        Ok(extent)
    }

    /// How many of `pages` lack a translation.
    pub(crate) fn nr_missing(&self, pages: &Range<usize>, rights: Rights) -> usize {
        if self.in_place {
            0
        } else {
            self.mapped
                .table()
                .bits()
                .nr_missing(&self.body_of(pages), rights)
        }
    }

    /// The part of `pages` that can move.
    pub(crate) fn body_of(&self, pages: &Range<usize>) -> Range<usize> {
        let start = pages.start.clamp(self.body.start, self.body.end);
        start..pages.end.clamp(start, self.body.end.max(start))
    }
}
