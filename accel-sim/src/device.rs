//! The device, as the runtime sees it: a table per region, and two callbacks that take translations away.

use std::ops::Range;

use svm::addr::{PAGE_SIZE, PAGES_PER_BLOCK};
use svm::sync::{Deadline, WaitQueue};
use svm::{
    Access, Device, DeviceFault, DeviceFaultKind, DeviceGuard, DeviceLock, Invalidation, Keep,
    LateAccess, MapInfo, Overrun, PageBits, PageMask, ThreadId, Valid, WouldBlock,
};

use crate::options::MAX_WORKERS;
use crate::shootdown::{Generation, Slot, Users, quiesced};
use crate::sync::{AtomicU64, Ordering};
use crate::table::{self, Table, Words};

/// Words of a block in a bitmap.
const BLOCK_WORDS: usize = PAGES_PER_BLOCK / table::WORD;

/// The simulated device. It lies, whole, in a mapping of the runtime's own: signal handlers read and write it.
#[derive(Debug)]
pub(crate) struct Sim {
    lock: DeviceLock,
    generation: Generation,
    slots: [Slot; MAX_WORKERS],
    posts: [Post; MAX_WORKERS],
    /// Where the relief sleeps.
    bell: WaitQueue,
    nr_workers: usize,
}

/// Which thread is a worker, and whether it was lost.
#[derive(Debug)]
struct Post {
    /// The thread's [`ThreadId`], or 0.
    thread: AtomicU64,
    /// Where it touched a page that was taken from it, and whether by a store: `addr << 1 | store`; 0 for a thread that works.
    lost: AtomicU64,
}

impl Sim {
    pub(crate) fn new(nr_workers: usize) -> Sim {
        assert!(nr_workers <= MAX_WORKERS);
        Sim {
            lock: DeviceLock::new(),
            generation: Generation::new(),
            slots: std::array::from_fn(|_| Slot::new()),
            posts: std::array::from_fn(|_| Post {
                thread: AtomicU64::new(0),
                lost: AtomicU64::new(0),
            }),
            bell: WaitQueue::new(),
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

    /// `thread` is worker `i` from now on. Called by that thread.
    pub(crate) fn take_post(&self, i: usize, thread: ThreadId) {
        // Relaxed: only the thread itself will look for itself.
        self.posts[i]
            .thread
            .store(thread.as_usize() as u64, Ordering::Relaxed);
    }

    /// The thread that was worker `i` ends, and its name may become another's.
    pub(crate) fn leave_post(&self, i: usize) {
        self.posts[i].thread.store(0, Ordering::Relaxed);
    }

    /// The next worker that was lost, and what it was lost to; its thread is parked, or about to be. Waits until there is one, or
    /// `is_over`, which whoever makes it true [announces](Self::ring).
    pub(crate) fn wait_for_loss(&self, is_over: impl Fn() -> bool) -> Option<(usize, DeviceFault)> {
        let find = || {
            self.posts[..self.nr_workers]
                .iter()
                // Acquire: pairs with the Release in `overrun`. The thread's accesses are over, and its slot is free.
                .position(|post| post.lost.load(Ordering::Acquire) != 0)
        };
        self.bell
            .wait_until(Deadline::NEVER, || find().is_some() || is_over());
        let i = find()?;
        let post = &self.posts[i];
        // Relaxed, both: the parked thread looks no more, and its successor is started after this.
        post.thread.store(0, Ordering::Relaxed);
        let lost = post.lost.swap(0, Ordering::Relaxed);
        let access = if lost & 1 == 1 {
            Access::Write
        } else {
            Access::Read
        };
        let fault = DeviceFault::new((lost >> 1) as usize, access, DeviceFaultKind::Stuck);
        Some((i, fault))
    }

    /// Wakes the relief, to look.
    pub(crate) fn ring(&self) {
        self.bell.wake_all();
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
// callback, under the guard. `overrun` gives up a worker's thread alone, after ending all that it had in flight; what else it
// might be waited for is seen to by the relief (see `relief`), and a kernel's borrows end only when it can never run again. No
// callback allocates, panics, logs, waits for anything but the device lock, or uses a thread-local; what they touch is `self`
// and the table, which the runtime keeps in mappings of its own.
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

    fn overrun(&self, _table: &RegionTable, late: &LateAccess) -> Overrun {
        let thread = late.thread.as_usize() as u64;
        // Relaxed: it was stored by this very thread, or is another's.
        let mine = |post: &Post| post.thread.load(Ordering::Relaxed) == thread;
        let Some(i) = self.posts[..self.nr_workers].iter().position(mine) else {
            return Overrun::Stranger;
        };
        // From here on nobody waits for an access of this worker.
        self.slots[i].abandon();
        let store = u64::from(late.access == Some(Access::Write));
        // Release: pairs with the Acquire in `wait_for_loss`.
        self.posts[i]
            .lost
            .store((late.addr as u64) << 1 | store, Ordering::Release);
        self.ring();
        Overrun::Park
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
