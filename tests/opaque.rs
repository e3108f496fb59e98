//! A device whose memory the CPU cannot reach: pages are copied to it and back, by the same protocol.

use std::cell::UnsafeCell;
use std::ops::Range as Pages;
use std::time::Duration;

use svm::{
    Access, AttachOptions, Device, DeviceLock, DeviceMemory, Error, Granule, Invalidation, Keep,
    MapInfo, Options, PageBits, WouldBlock,
};
use tests::{TestDevice, Watchdog, each_option, usable};

const PAGE: usize = 4096;

#[derive(Default)]
struct Opaque {
    lock: DeviceLock,
}

struct Table {
    readable: PageBits,
    writable: PageBits,
    /// The device's own memory: a page of it for each page of the region.
    memory: UnsafeCell<Vec<u8>>,
}

// SAFETY: `memory` is touched only by the runtime's copies, with the page's block locked, and by `Rig`, under the device lock with a
// translation to the page.
unsafe impl Sync for Table {}

impl Table {
    fn page(&self, page: usize) -> *mut u8 {
        // SAFETY: the vector is never resized; the pointer is only used as said above.
        let memory = unsafe { &mut *self.memory.get() };
        memory[page * PAGE..].as_mut_ptr()
    }
}

// SAFETY: translations are used under the device lock only, which `invalidate` takes.
unsafe impl Device for Opaque {
    type Table = Table;

    fn map(&self, map: &MapInfo) -> Result<Table, Error> {
        let memory = UnsafeCell::new(vec![0xee; map.nr_pages * PAGE]);
        Ok(Table {
            readable: PageBits::new(map.nr_pages)?,
            writable: PageBits::new(map.nr_pages)?,
            memory,
        })
    }

    fn lock(&self) -> &DeviceLock {
        &self.lock
    }

    fn invalidate(&self, table: &Table, inv: &Invalidation) -> Result<(), WouldBlock> {
        let _guard = self.lock.lock_for(inv.blocking())?;
        table.writable.remove(inv.block(), inv.pages());
        if inv.keep() == Keep::Nothing {
            table.readable.remove(inv.block(), inv.pages());
        }
        Ok(())
    }

    fn quiesced(&self, _table: &Table, _inv: &Invalidation) -> bool {
        true
    }

    fn memory(&self) -> DeviceMemory {
        DeviceMemory::Opaque
    }

    unsafe fn copy_to_device(&self, table: &Table, pages: Pages<usize>, from: *const u8) {
        // SAFETY: `from` is readable by contract; the pages are the table's own.
        unsafe { from.copy_to_nonoverlapping(table.page(pages.start), pages.len() * PAGE) }
    }

    unsafe fn copy_to_host(&self, table: &Table, pages: Pages<usize>, to: *mut u8) {
        // SAFETY: `to` is writable by contract; the pages are the table's own.
        unsafe { to.copy_from_nonoverlapping(table.page(pages.start), pages.len() * PAGE) }
    }
}

struct Rig(svm::Attachment<Opaque>);

impl Rig {
    fn new(memory: Option<usize>) -> Self {
        let options = memory.map_or_else(AttachOptions::new, |bytes| {
            AttachOptions::new().memory_bytes(bytes)
        });
        Self(svm::attach(Opaque::default(), options).unwrap())
    }

    /// Adds `by` (0 to only read) to the first word of each page of the view, and returns what they were.
    fn add(&self, region: svm::RegionRef<'_>, pages: Pages<usize>, by: u64) -> Vec<u64> {
        let _worker = svm::worker_thread();
        let mapped = self.0.map(region).unwrap();
        let mut range = self.0.range().unwrap();
        let access = if by == 0 { Access::Read } else { Access::Write };
        let mut old = Vec::new();
        let origin = (region.addr() - region.base()) / PAGE;
        for page in pages.map(|page| page + origin) {
            loop {
                {
                    let _guard = self.0.device().lock.lock();
                    let table = mapped.table();
                    let right = if by == 0 {
                        &table.readable
                    } else {
                        &table.writable
                    };
                    if right.contains(page, std::sync::atomic::Ordering::Acquire) {
                        let word = table.page(page).cast::<u64>();
                        // SAFETY: a translation to the page, under the device lock; pages are aligned enough in practice, so unaligned.
                        let value = unsafe { word.read_unaligned() };
                        if by != 0 {
                            // SAFETY: as above, with the right to write.
                            unsafe { word.write_unaligned(value + by) };
                        }
                        old.push(value);
                        break;
                    }
                }
                range
                    .fault_in(
                        &mapped,
                        page..page + 1,
                        access,
                        0,
                        Duration::from_secs(10),
                        |valid, _| {
                            mapped.table().readable.install(valid, Access::Read);
                            mapped.table().writable.install(valid, Access::Write);
                        },
                    )
                    .unwrap();
            }
        }
        old
    }
}

fn words(buffer: &svm::Buffer<u64>) -> Vec<u64> {
    buffer
        .as_slice()
        .iter()
        .step_by(PAGE / 8)
        .copied()
        .collect()
}

#[test]
fn pages_are_copied_both_ways_and_nothing_is_lost() {
    each_option("opaque", |options| {
        let mut buffer = svm::Buffer::<u64>::with_options(64 * PAGE / 8, options).unwrap();
        buffer
            .as_mut_slice()
            .iter_mut()
            .step_by(PAGE / 8)
            .zip(0..)
            .for_each(|(x, i)| *x = i);
        let rig = Rig::new(None);
        for round in 0..4 {
            let expected: Vec<u64> = (0..64).map(|i| i + 11 * round).collect();
            assert_eq!(
                rig.add(buffer.view().region(), 0..64, 0),
                expected,
                "{options:?}"
            );
            assert_eq!(rig.add(buffer.view().region(), 0..64, 10), expected);
            // Half of it is fetched by reads, half by writes; then all by one more.
            buffer.as_mut_slice()[PAGE / 8 * 40..]
                .iter_mut()
                .step_by(PAGE / 8)
                .for_each(|x| *x += 1);
            buffer.as_mut_slice()[..PAGE / 8 * 40]
                .iter_mut()
                .step_by(PAGE / 8)
                .for_each(|x| *x += 1);
        }
        assert_eq!(words(&buffer), (0..64).map(|i| i + 44).collect::<Vec<_>>());
        drop(rig);
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

#[test]
fn an_opaque_and_a_mapped_device_share_memory_and_small_memories_evict() {
    each_option("two kinds", |options| {
        let mut buffer = svm::Buffer::<u64>::with_options(64 * PAGE / 8, options).unwrap();
        let rig = Rig::new(Some(32 * PAGE));
        let mapped =
            TestDevice::with_options(AttachOptions::new().memory_bytes(32 * PAGE)).unwrap();
        for round in 0..4u64 {
            assert_eq!(
                rig.add(buffer.view_mut().region(), 0..64, 1),
                vec![round * 2; 64],
                "{options:?}"
            );
            for page in 0..64 {
                let view = buffer.view_mut();
                let mut word = [0; 8];
                mapped
                    .read(view.region(), view.addr() + page * PAGE, &mut word)
                    .unwrap();
                assert_eq!(u64::from_ne_bytes(word), round * 2 + 1);
                mapped
                    .write(
                        view.region(),
                        view.addr() + page * PAGE,
                        &(round * 2 + 2).to_ne_bytes(),
                    )
                    .unwrap();
            }
            assert_eq!(rig.add(buffer.view().region(), 0..1, 0), [round * 2 + 2]);
        }
        assert_eq!(words(&buffer), vec![8; 64]);
        assert!(rig.0.stats().evicted_pages > 0);
        drop((rig, mapped));
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

#[test]
fn an_update_of_many_huge_blocks_reaches_the_device() {
    let _watchdog = Watchdog::new("opaque blocks");
    if !usable() {
        return;
    }
    const NR_PAGES: usize = 3 * 512;
    let options = Options::new().granule(Granule::Huge).huge_pages(true);
    let mut buffer = svm::Buffer::<u64>::with_options(NR_PAGES * PAGE / 8, &options).unwrap();
    buffer
        .as_mut_slice()
        .iter_mut()
        .step_by(PAGE / 8)
        .zip(0..)
        .for_each(|(x, i)| *x = i);
    let rig = Rig::new(None);
    {
        let _worker = svm::worker_thread();
        let view = buffer.view_mut();
        let region = view.region();
        let mapped = rig.0.map(region).unwrap();
        let mut range = rig.0.range().unwrap();
        let first = (region.addr() - region.base()) / PAGE;
        let mut update = range
            .start_update(&mapped, first..first + NR_PAGES, Duration::from_secs(10))
            .unwrap();
        update.fault(Access::Write).unwrap();
        let guard = rig.0.device().lock.lock();
        for valid in update.end_update(&guard).unwrap().iter() {
            mapped.table().readable.install(valid, Access::Read);
            mapped.table().writable.install(valid, Access::Write);
        }
    }
    let seen = rig.add(buffer.view_mut().region(), 0..NR_PAGES, 5);
    assert!(seen.iter().zip(0..).all(|(&x, i)| x == i));
    assert!(words(&buffer).iter().zip(0..).all(|(&x, i)| x == i + 5));
    drop(rig);
    assert_eq!(buffer.stats().anomalies, 0);
}
