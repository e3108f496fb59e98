//! The device, as the runtime sees it: a table per region, and two callbacks that take translations away.

use std::ops::Range;

use svm::addr::{PAGE_SIZE, PAGES_PER_BLOCK};
use svm::{
    Device, DeviceGuard, DeviceLock, Invalidation, Keep, MapInfo, PageBits, PageMask, Valid,
    WouldBlock,
};

use crate::options::MAX_WORKERS;
use crate::shootdown::{Generation, Slot, Users, quiesced};
use crate::sync::AtomicU64;
use crate::table::{self, Table, Words};

/// Words of a block in a bitmap.
const BLOCK_WORDS: usize = PAGES_PER_BLOCK / table::WORD;

/// The simulated device. It lies, whole, in a mapping of the runtime's own: signal handlers read and write it.
#[derive(Debug)]
pub(crate) struct Sim {
    lock: DeviceLock,
    generation: Generation,
    slots: [Slot; MAX_WORKERS],
    nr_workers: usize,
}

impl Sim {
    pub(crate) fn new(nr_workers: usize) -> Sim {
        assert!(nr_workers <= MAX_WORKERS);
        Sim {
            lock: DeviceLock::new(),
            generation: Generation::new(),
            slots: std::array::from_fn(|_| Slot::new()),
            nr_workers,
        }
    }

    /// What worker `i` publishes.
    #[inline]
    pub(crate) fn slot(&self, i: usize) -> &Slot {
        &self.slots[i]
    }

    /// The flush generation of all translation caches.
    #[inline]
    pub(crate) fn generation(&self) -> &AtomicU64 {
        self.generation.word()
    }

    fn workers(&self) -> &[Slot] {
        &self.slots[..self.nr_workers]
    }
}

/// The translations of one mapped region.
#[derive(Debug)]
pub(crate) struct RegionTable {
    table: Table<PageBits>,
    /// Host page number of page 0.
    first_page: u64,
}

impl Words for PageBits {
    #[inline]
    fn word(&self, i: usize) -> &AtomicU64 {
        &self.words()[i]
    }
}

impl RegionTable {
    pub(crate) fn bits(&self) -> &Table<PageBits> {
        &self.table
    }

    /// Establishes what a round of the range protocol found valid. The guard shows that the device is locked (T1).
    pub(crate) fn install(&self, valid: &Valid, _device: &DeviceGuard<'_>) {
        let first = valid.block() * BLOCK_WORDS;
        let masks = valid
            .readable()
            .words()
            .iter()
            .zip(valid.writable().words())
            .zip(valid.in_place().words());
        for (i, ((&readable, &writable), &in_place)) in masks.enumerate() {
            self.table.install(first + i, readable, writable, in_place);
        }
    }

    /// The pages of `block` that lie in a run of host pages.
    fn pages_of_block(&self, block: usize, host_pages: &Range<u64>) -> PageMask {
        let origin = self.first_page + (block * PAGES_PER_BLOCK) as u64;
        let clip = |page: u64| page.saturating_sub(origin).min(PAGES_PER_BLOCK as u64) as usize;
        PageMask::range(clip(host_pages.start)..clip(host_pages.end))
    }
}

fn users(inv: &Invalidation) -> Users {
    match inv.keep() {
        Keep::Nothing => Users::All,
        Keep::Reads => Users::Writers,
    }
}

// SAFETY: `invalidate` clears the bits under the device lock and then announces it, after which no worker begins an access
// with them (see `shootdown`, rules S1 and S2); `quiesced` looks at every worker's slot, which covers each access from before
// its check until after its end (S4). Translations are installed by `RegionTable::install` alone, from `Range::fault_in`'s
// callback, under the guard. Neither callback allocates, panics, logs, waits for anything but the device lock, or uses a
// thread-local; what they touch is `self` and the table, which the runtime keeps in mappings of its own.
unsafe impl Device for Sim {
    type Table = RegionTable;

    fn map(&self, map: &MapInfo) -> Result<RegionTable, svm::Error> {
        let bits = || PageBits::new(map.nr_pages);
        Ok(RegionTable {
            table: Table::new(bits()?, bits()?, bits()?),
            first_page: (map.host_base / PAGE_SIZE) as u64,
        })
    }

    fn lock(&self) -> &DeviceLock {
        &self.lock
    }

    fn invalidate(&self, table: &RegionTable, inv: &Invalidation) -> Result<(), WouldBlock> {
        let device = self.lock.lock_for(inv.blocking())?;
        self.generation.take_away(|| {
            let first = inv.block() * BLOCK_WORDS;
            for (i, &pages) in inv.pages().words().iter().enumerate() {
                if pages != 0 {
                    table.table.clear(first + i, pages, users(inv));
                }
            }
        });
        drop(device);
        self.generation.announce(self.workers());
        Ok(())
    }

    fn quiesced(&self, table: &RegionTable, inv: &Invalidation) -> bool {
        quiesced(self.workers(), users(inv), |host_pages| {
            inv.pages()
                .intersects(&table.pages_of_block(inv.block(), &host_pages))
        })
    }

    fn pause(&self) {
        let device = self.lock.lock();
        self.generation.toggle_pause();
        drop(device);
        self.generation.announce(self.workers());
    }

    fn is_paused(&self) -> bool {
        quiesced(self.workers(), Users::All, |_| true)
    }

    fn resume(&self) {
        let _device = self.lock.lock();
        self.generation.toggle_pause();
    }
}
