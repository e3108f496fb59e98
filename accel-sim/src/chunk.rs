//! How a launch over slices is cut into work items.
//!
//! The views of a launch have one length; an item is an index range, the same for all of them. Borders are chosen by the
//! address of the *lead* view (the first that is written, else the first): at multiples of the chunk size, so that no page of
//! it is shared by two items, except where an element itself straddles the border.
//!
//! The chunk size balances four wishes: several items for each worker; no fewer than a granule, or neighbours fetch each
//! other's pages; no more than a block, the unit of locking; and the spans of all workers together must fit in half the
//! device's memory, or the workers evict each other's pages before they have used them.

use std::ops::Range;

use svm::addr::{BLOCK_SIZE, PAGE_SIZE};

/// Where one view's elements lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Host address of element 0.
    pub(crate) addr: usize,
    /// Bytes of an element.
    pub(crate) size: usize,
    /// Number of elements.
    pub(crate) len: usize,
}

/// What a launch may use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    pub(crate) nr_workers: usize,
    /// Bytes that a far fault brings at least, where it can.
    pub(crate) granule: usize,
    /// Bytes of device memory, if there is a limit.
    pub(crate) memory_bytes: Option<usize>,
}

/// The items of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunks {
    lead: Extent,
    chunk_bytes: usize,
    nr_items: usize,
    all_fit: bool,
}

/// Device memory too small for the spans that the workers hold at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooSmall {
    /// Bytes that would do.
    pub(crate) needed: usize,
}

impl Chunks {
    /// Cuts `views`, of one length, whose borders follow view `lead`.
    pub(crate) fn new(views: &[Extent], lead: usize, budget: Budget) -> Result<Chunks, TooSmall> {
        let lead = views[lead];
        let total = lead.size * lead.len;
        if total == 0 {
            // Nothing, or elements without bytes: one item with all of them.
            return Ok(Chunks {
                lead,
                chunk_bytes: BLOCK_SIZE,
                nr_items: usize::from(lead.len > 0),
                all_fit: false,
            });
        }
        // Four items a worker even out what faults and preemption disturb.
        let wish = (total / (4 * budget.nr_workers)).next_power_of_two();
        let mut chunk_bytes = wish.clamp(budget.granule.clamp(PAGE_SIZE, BLOCK_SIZE), BLOCK_SIZE);
        if let Some(memory_bytes) = budget.memory_bytes {
            while budget.nr_workers * held_bytes(views, lead, chunk_bytes) > memory_bytes / 2
                && chunk_bytes > PAGE_SIZE
            {
                chunk_bytes /= 2;
            }
            let needed = budget.nr_workers * held_bytes(views, lead, chunk_bytes);
            if needed > memory_bytes {
                return Err(TooSmall { needed });
            }
        }
        let nr_items = (lead.addr + total).div_ceil(chunk_bytes) - lead.addr / chunk_bytes;
        let room = budget.memory_bytes.map(|bytes| bytes / 2);
        Ok(Chunks {
            lead,
            chunk_bytes,
            nr_items,
            all_fit: room.is_none_or(|room| held_bytes(views, lead, total) <= room),
        })
    }

    /// Whether all views have room in half of the device's memory, so that what is fetched for a later item is still there when its
    /// turn comes.
    pub(crate) fn all_fit(&self) -> bool {
        self.all_fit
    }

    pub(crate) fn nr_items(&self) -> usize {
        self.nr_items
    }

    /// The elements of item `i`; may be empty where elements are larger than a chunk.
    pub(crate) fn elements(&self, i: usize) -> Range<usize> {
        if self.lead.size == 0 {
            return 0..self.lead.len;
        }
        let first = self.lead.addr / self.chunk_bytes;
        self.border(first + i)..self.border(first + i + 1)
    }

    /// The first element that begins at or after chunk border `k`.
    fn border(&self, k: usize) -> usize {
        (k * self.chunk_bytes)
            .saturating_sub(self.lead.addr)
            .div_ceil(self.lead.size)
            .min(self.lead.len)
    }
}

/// Bytes of the pages that one item of `chunk_bytes` of the lead view can touch in all views.
fn held_bytes(views: &[Extent], lead: Extent, chunk_bytes: usize) -> usize {
    let elements = chunk_bytes.div_ceil(lead.size);
    let pages = |v: &Extent| {
        if v.size == 0 {
            return 0;
        }
        // A run of bytes that begins anywhere touches one page more than it fills.
        ((elements.min(v.len) * v.size).div_ceil(PAGE_SIZE) + 1)
            .min((v.len * v.size).div_ceil(PAGE_SIZE) + 1)
    };
    views.iter().map(pages).sum::<usize>() * PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget {
        nr_workers: 2,
        granule: 64 << 10,
        memory_bytes: None,
    };

    #[track_caller]
    fn covers(views: &[Extent], lead: usize, budget: Budget) -> Chunks {
        let chunks = Chunks::new(views, lead, budget).expect("memory is enough");
        let mut next = 0;
        for i in 0..chunks.nr_items() {
            let elements = chunks.elements(i);
            assert_eq!(elements.start, next, "item {i} follows the one before");
            next = elements.end;
        }
        assert_eq!(next, views[lead].len);
        chunks
    }

    #[test]
    fn items_partition_the_elements() {
        for size in [1, 4, 8, 12, 24, 40, 4096, 5000, 200_000] {
            for len in [0, 1, 2, 3, 100, 4097, 30_000] {
                for addr in [0x10_0000, 0x10_0004, 0x1f_fff8, 0x20_0000] {
                    covers(&[Extent { addr, size, len }], 0, BUDGET);
                }
            }
        }
        covers(
            &[Extent {
                addr: 8,
                size: 0,
                len: 17,
            }],
            0,
            BUDGET,
        );
    }

    #[test]
    fn borders_fall_on_chunk_borders_of_the_lead() {
        let lead = Extent {
            addr: 0x40_0010,
            size: 16,
            len: 1 << 20,
        };
        let chunks = covers(
            &[
                Extent {
                    addr: 4,
                    size: 4,
                    len: 1 << 20,
                },
                lead,
            ],
            1,
            BUDGET,
        );
        assert_eq!(chunks.chunk_bytes, BLOCK_SIZE);
        for i in 1..chunks.nr_items() {
            assert_eq!(
                (lead.addr + chunks.elements(i).start * lead.size) % chunks.chunk_bytes,
                0
            );
        }
    }

    #[test]
    fn a_small_launch_takes_granules_and_a_large_one_blocks() {
        let size = |len| {
            covers(
                &[Extent {
                    addr: 0x40_0000,
                    size: 4,
                    len,
                }],
                0,
                BUDGET,
            )
            .chunk_bytes
        };
        assert_eq!(size(100), 64 << 10);
        assert_eq!(size(1 << 20), 512 << 10);
        assert_eq!(size(1 << 28), BLOCK_SIZE);
    }

    #[test]
    fn little_memory_makes_small_chunks_and_too_little_is_refused() {
        let view = Extent {
            addr: 0x40_0000,
            size: 4,
            len: 1 << 20,
        };
        let with = |memory_bytes| {
            Chunks::new(
                &[view, view],
                0,
                Budget {
                    memory_bytes: Some(memory_bytes),
                    ..BUDGET
                },
            )
        };
        assert_eq!(with(1 << 20).expect("enough").chunk_bytes, 64 << 10);
        assert_eq!(with(32 << 10).expect("enough").chunk_bytes, 4 << 10);
        // Two workers with two views each, and each span may touch two pages.
        assert_eq!(with(28 << 10), Err(TooSmall { needed: 32 << 10 }));
    }
}
