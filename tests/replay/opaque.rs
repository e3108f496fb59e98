//! Opaque device memory while the kernel stops calls half-way: what was handed over counts, whatever became of the way it took.

use std::cell::UnsafeCell;
use std::ops::Range as Pages;
use std::sync::atomic::Ordering;
use std::time::Duration;

use svm::{
    Access, Attachment, Device, DeviceLock, DeviceMemory, Invalidation, Keep, MapInfo, Options,
    PageBits, WouldBlock,
};

use crate::director::Director;
use crate::random::set_changing;
use crate::rig::{Memory, PAGE, options};

/// A device with memory of its own, whose accesses happen under its lock.
#[derive(Default)]
struct Opaque(DeviceLock);

struct Table {
    readable: PageBits,
    writable: PageBits,
    /// A page for each page of the region.
    memory: UnsafeCell<Vec<[u64; PAGE / 8]>>,
}

// SAFETY: `memory` is touched by the runtime's copies, with the page's block locked, and under the device lock with a translation.
unsafe impl Sync for Table {}

impl Table {
    fn page(&self, page: usize) -> *mut u64 {
        // SAFETY: the vector is never resized; the pointer is only used as said above.
        let memory = unsafe { &mut *self.memory.get() };
        memory[page].as_mut_ptr()
    }
}

// SAFETY: translations are used under the device lock only, which `invalidate` takes.
unsafe impl Device for Opaque {
    type Table = Table;

    fn map(&self, map: &MapInfo) -> svm::Result<Table> {
        Ok(Table {
            readable: PageBits::new(map.nr_pages)?,
            writable: PageBits::new(map.nr_pages)?,
            memory: UnsafeCell::new(vec![[0xee; PAGE / 8]; map.nr_pages]),
        })
    }

    fn lock(&self) -> &DeviceLock {
        &self.0
    }

    fn invalidate(&self, table: &Table, inv: &Invalidation) -> Result<(), WouldBlock> {
        let _guard = self.0.lock_for(inv.blocking())?;
        table.writable.remove(inv.block(), inv.pages());
        if inv.keep() == Keep::Nothing {
            table.readable.remove(inv.block(), inv.pages());
        }
        Ok(())
    }

    fn quiesced(&self, _: &Table, _: &Invalidation) -> bool {
        true
    }

    fn memory(&self) -> DeviceMemory {
        DeviceMemory::Opaque
    }

    unsafe fn copy_to_device(&self, table: &Table, pages: Pages<usize>, from: *const u8) {
        let to = table.page(pages.start).cast();
        // SAFETY: `from` is readable by contract; the pages are the table's own.
        unsafe { from.copy_to_nonoverlapping(to, pages.len() * PAGE) }
    }

    unsafe fn copy_to_host(&self, table: &Table, pages: Pages<usize>, to: *mut u8) {
        let from = table.page(pages.start).cast_const().cast();
        // SAFETY: `to` is writable by contract; the pages are the table's own.
        unsafe { to.copy_from_nonoverlapping(from, pages.len() * PAGE) }
    }
}

/// Adds `by` to the first word of a page, for the device; says what it was.
fn add(device: &Attachment<Opaque>, region: svm::RegionRef<'_>, page: usize, by: u64) -> u64 {
    let _signals = svm::worker_thread();
    let mapped = device.map(region).unwrap();
    let mut range = device.range().unwrap();
    let index = (region.addr() - region.base()) / PAGE + page;
    loop {
        let guard = device.device().0.lock();
        if mapped.table().writable.contains(index, Ordering::Acquire) {
            // SAFETY: a translation to the page, under the device lock.
            let word = unsafe { &mut *mapped.table().page(index) };
            return core::mem::replace(word, *word + by);
        }
        drop(guard);
        let pages = index..index + 1;
        let timeout = Duration::from_secs(10);
        range
            .fault_in(&mapped, pages, Access::Write, 0, timeout, |valid, _| {
                let table = mapped.table();
                table.readable.insert(valid.block(), valid.readable());
                table.writable.insert(valid.block(), valid.writable());
            })
            .unwrap();
    }
}

/// A window page that was handed over and could not be emptied is stale at once. Filled again, it would be taken for what has come:
/// by a MOVE that says EEXIST, and finds nothing at its source, since the page was discarded meanwhile.
#[test]
fn what_is_left_in_the_window_is_never_taken_for_what_comes() {
    let _watchdog = crate::watch("opaque leftovers");
    for delivery in [svm::Delivery::Inline, svm::Delivery::Thread]
        .into_iter()
        .filter(|_| crate::usable())
    {
        let director = Director::new();
        for nth in 2..=7 {
            play(&options(delivery), nth);
        }
        drop(director);
    }
}

fn play(options: &Options, nth: u64) {
    const NR: usize = 6;
    let memory = Memory::new();
    let mirror = memory.mirror(options);
    let device = svm::attach(Opaque::default(), svm::AttachOptions::new()).unwrap();
    let mut expected = [1; NR];
    for round in 1..=12 {
        set_changing(nth);
        for (page, expected) in expected.iter_mut().enumerate() {
            let found = add(&device, mirror.view().region(), page, round);
            assert_eq!(found, *expected, "page {page}, round {round}, one in {nth}");
            *expected += round;
        }
        set_changing(0);
        for (page, expected) in expected.iter_mut().enumerate() {
            assert_eq!(
                memory.load(page)[0],
                *expected,
                "page {page}, round {round}"
            );
            // Every other page is a hole when the device comes for it again.
            if (page as u64 + round).is_multiple_of(2) {
                memory.discard(page);
                *expected = 0;
            }
        }
    }
    drop(device);
    mirror.close().unwrap();
}
