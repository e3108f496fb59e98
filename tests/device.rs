//! [`TestDevice`]: the twin of the kernel's `lib/test_hmm.c`, a device that reads and writes through its own page table.
//!
//! It has no worker threads: an operation runs on the calling thread, faults in what its table lacks, and copies through
//! the table under the device lock, so that an invalidation finds no access in flight.

use std::ops::Range as Pages;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use svm::{
    Access, AttachOptions, Attachment, Device, DeviceFault, DeviceLock, Error, Invalidation, Keep, MapInfo, MappedRef,
    PageBits, RegionRef, Valid, WouldBlock,
};

/// How long an operation may take without progress.
const TIMEOUT: Duration = Duration::from_secs(10);
const PAGE: usize = 4096;

/// The device the runtime sees: a lock, and a table per region.
#[derive(Debug, Default)]
pub struct Dummy {
    lock: DeviceLock,
    /// Invalidations that came, for tests that count them.
    pub invalidations: AtomicU64,
}

/// Translations of one region.
#[derive(Debug)]
pub struct Table {
    readable: PageBits,
    writable: PageBits,
    in_place: PageBits,
}

// SAFETY: translations are used only under the device lock (`TestDevice::copy`), which `invalidate` takes: when it
// returns, no access is in flight. It takes no other lock and allocates nothing.
unsafe impl Device for Dummy {
    type Table = Table;

    fn map(&self, map: &MapInfo) -> Result<Table, Error> {
        let bits = || PageBits::new(map.nr_pages);
        Ok(Table { readable: bits()?, writable: bits()?, in_place: bits()? })
    }

    fn lock(&self) -> &DeviceLock {
        &self.lock
    }

    fn invalidate(&self, table: &Table, inv: &Invalidation) -> Result<(), WouldBlock> {
        let _guard = self.lock.lock_for(inv.blocking())?;
        self.invalidations.fetch_add(1, Ordering::Relaxed);
        table.writable.remove(inv.block(), inv.pages());
        if inv.keep() == Keep::Nothing {
            table.readable.remove(inv.block(), inv.pages());
        }
        Ok(())
    }

    fn quiesced(&self, _table: &Table, _inv: &Invalidation) -> bool {
        true
    }
}

/// An attached [`Dummy`] and the operations of `test_hmm.c` on it.
#[derive(Debug)]
pub struct TestDevice {
    attachment: Attachment<Dummy>,
    /// Fault rounds so far.
    pub rounds: AtomicU64,
}

impl TestDevice {
    /// Attaches a device without a memory limit.
    ///
    /// # Errors
    /// As [`svm::attach`].
    pub fn new() -> Result<Self, Error> {
        Self::with_options(AttachOptions::new())
    }

    /// Attaches a device.
    ///
    /// # Errors
    /// As [`svm::attach`].
    pub fn with_options(options: AttachOptions) -> Result<Self, Error> {
        Ok(Self { attachment: svm::attach(Dummy::default(), options)?, rounds: AtomicU64::new(0) })
    }

    /// The attachment.
    #[must_use]
    pub fn attachment(&self) -> &Attachment<Dummy> {
        &self.attachment
    }

    /// Reads `out.len()` bytes from `addr` through the device's page table.
    ///
    /// # Errors
    /// The device fault that ended it.
    pub fn read(&self, region: RegionRef<'_>, addr: usize, out: &mut [u8]) -> Result<(), Error> {
        self.copy(region, addr, out.len(), Access::Read, |at, done, len| {
            // SAFETY: the table says the page is readable, and the device lock keeps it so; `out` has room.
            unsafe { ptr::copy_nonoverlapping(ptr::with_exposed_provenance(at), out.as_mut_ptr().add(done), len) }
        })
    }

    /// Writes `data` to `addr` through the device's page table.
    ///
    /// # Errors
    /// The device fault that ended it.
    pub fn write(&self, region: RegionRef<'_>, addr: usize, data: &[u8]) -> Result<(), Error> {
        self.copy(region, addr, data.len(), Access::Write, |at, done, len| {
            // SAFETY: the table says the page is writable, and the device lock keeps it so.
            unsafe { ptr::copy_nonoverlapping(data.as_ptr().add(done), ptr::with_exposed_provenance_mut(at), len) }
        })
    }

    /// Makes `pages` accessible without accessing them.
    ///
    /// # Errors
    /// The device fault that ended it.
    pub fn fault_in(&self, region: RegionRef<'_>, addr: usize, len: usize, access: Access) -> Result<(), Error> {
        self.copy(region, addr, len, access, |_, _, _| {})
    }

    fn copy(
        &self,
        region: RegionRef<'_>,
        addr: usize,
        len: usize,
        access: Access,
        mut bytes: impl FnMut(usize, usize, usize),
    ) -> Result<(), Error> {
        let _worker = svm::worker_thread();
        let mapped = self.attachment.map(region)?;
        let session = mapped.begin_use(access)?;
        let edges: Vec<usize> = session.edge_pages().collect();
        let mut range = self.attachment.range()?;
        let mut done = 0;
        while done < len {
            let at = addr + done;
            let page = (at - region.base()) / PAGE;
            let part = (PAGE - at % PAGE).min(len - done);
            let last = (addr + len - 1 - region.base()) / PAGE;
            let device = self.attachment.device();
            let guard = device.lock.lock();
            let table = mapped.table();
            let right = if access == Access::Write { &table.writable } else { &table.readable };
            if region.is_in_place() || table.in_place.contains(page, Ordering::Acquire) && right.contains(page, Ordering::Acquire) {
                bytes(at, done, part);
                done += part;
            } else if edges.contains(&page) || right.contains(page, Ordering::Acquire) {
                bytes(at.wrapping_add_signed(mapped.offset()), done, part);
                done += part;
            } else {
                drop(guard);
                self.rounds.fetch_add(1, Ordering::Relaxed);
                let end = (page..=last).find(|p| edges.contains(p)).unwrap_or(last + 1);
                self.round(&mut range, &mapped, page..end, access)?;
            }
        }
        session.finish()
    }

    /// One fault round over all that is left, as the kernel's test device does it: the loop a driver author writes.
    fn round(
        &self,
        range: &mut svm::Range<Dummy>,
        mapped: &MappedRef<Dummy>,
        pages: Pages<usize>,
        access: Access,
    ) -> Result<(), DeviceFault> {
        loop {
            let mut update = range.start_update(mapped, pages.clone(), TIMEOUT)?;
            update.fault(access)?;
            let guard = self.attachment.device().lock.lock();
            match update.end_update(&guard) {
                Ok(valid) => {
                    valid.iter().for_each(|valid| install(mapped.table(), valid));
                    return Ok(());
                }
                Err(svm::Interrupted) => {}
            }
        }
    }

    /// What the device could do with each page of `pages` now, without faulting: readable, writable, in device memory.
    ///
    /// # Errors
    /// As [`Attachment::map`], or an overlapping invalidation that does not end.
    pub fn snapshot(&self, region: RegionRef<'_>, pages: Pages<usize>) -> Result<Vec<Valid>, Error> {
        let _worker = svm::worker_thread();
        let mapped = self.attachment.map(region)?;
        let mut range = self.attachment.range()?;
        loop {
            let mut update = range.start_update(&mapped, pages.clone(), TIMEOUT)?;
            update.snapshot();
            let guard = self.attachment.device().lock.lock();
            if let Ok(valid) = update.end_update(&guard) {
                return Ok(valid.to_vec());
            }
        }
    }

    /// Brings everything home.
    ///
    /// # Errors
    /// As [`Attachment::release`].
    pub fn release(&self) -> Result<(), Error> {
        self.attachment.release()
    }
}

fn install(table: &Table, valid: &Valid) {
    table.readable.insert(valid.block(), valid.readable());
    table.writable.insert(valid.block(), valid.writable());
    let in_window = (*valid.readable() | *valid.writable()) - *valid.in_place();
    table.in_place.remove(valid.block(), &in_window);
    table.in_place.insert(valid.block(), valid.in_place());
}
