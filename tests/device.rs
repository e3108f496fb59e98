//! [`TestDevice`]: the twin of the kernel's `lib/test_hmm.c`, a device that reads and writes through its own page table.
//!
//! It has no worker threads: an operation runs on the calling thread, faults in what its table lacks, and copies through
//! the table under the device lock, so that an invalidation finds no access in flight.

use std::ops::Range as Pages;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use svm::{
    Access, AttachOptions, Attachment, Device, DeviceFault, DeviceLock, Error, Invalidation, Keep,
    MapInfo, MappedRef, Mirror, PageBits, PageMask, RegionRef, UseGuard, Valid, WorkerThread,
    WouldBlock,
};

/// How long an operation may take without progress, unless the test says otherwise.
const TIMEOUT: Duration = Duration::from_secs(10);
const PAGE: usize = 4096;

/// The device the runtime sees: a lock, and a table per region.
#[derive(Debug, Default)]
pub struct Dummy {
    lock: DeviceLock,
    /// Invalidations that came, for tests that count them.
    pub invalidations: AtomicU64,
    /// An access is in flight, as of a kernel in the middle of a span, for as long as a test says so.
    pub never_quiet: AtomicBool,
}

/// Translations of one region.
#[derive(Debug)]
pub struct Table {
    readable: PageBits,
    writable: PageBits,
    in_place: PageBits,
    /// Writable pages that were taken for atomics: nobody else has had them since.
    exclusive: PageBits,
}

impl Table {
    fn rights(&self, access: Access) -> &PageBits {
        if access == Access::Write {
            &self.writable
        } else {
            &self.readable
        }
    }

    fn install(&self, valid: &Valid) {
        self.in_place.install_places(valid);
        self.readable.install(valid, Access::Read);
        self.writable.install(valid, Access::Write);
    }

    fn remove(&self, block: usize, pages: &PageMask) {
        for bits in [&self.readable, &self.writable, &self.exclusive] {
            bits.remove(block, pages);
        }
    }
}

// SAFETY: translations are used only under the device lock (`TestDevice::copy`), which `invalidate` takes: when it
// returns, no access is in flight. It takes no other lock and allocates nothing.
unsafe impl Device for Dummy {
    type Table = Table;

    fn map(&self, map: &MapInfo) -> Result<Table, Error> {
        let bits = || PageBits::new(map.nr_pages);
        Ok(Table {
            readable: bits()?,
            writable: bits()?,
            in_place: bits()?,
            exclusive: bits()?,
        })
    }

    fn lock(&self) -> &DeviceLock {
        &self.lock
    }

    fn invalidate(&self, table: &Table, inv: &Invalidation) -> Result<(), WouldBlock> {
        let _guard = self.lock.lock_for(inv.blocking())?;
        self.invalidations.fetch_add(1, Ordering::Relaxed);
        table.writable.remove(inv.block(), inv.pages());
        table.exclusive.remove(inv.block(), inv.pages());
        if inv.keep() == Keep::Nothing {
            table.readable.remove(inv.block(), inv.pages());
        }
        Ok(())
    }

    fn quiesced(&self, _table: &Table, _inv: &Invalidation) -> bool {
        !self.never_quiet.load(Ordering::SeqCst)
    }
}

/// An attached [`Dummy`] and the operations of `test_hmm.c` on it.
#[derive(Debug)]
pub struct TestDevice {
    attachment: Attachment<Dummy>,
    /// Fault rounds so far.
    pub rounds: AtomicU64,
    timeout_ms: AtomicU64,
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
        Ok(Self {
            attachment: svm::attach(Dummy::default(), options)?,
            rounds: AtomicU64::new(0),
            timeout_ms: AtomicU64::new(TIMEOUT.as_millis() as u64),
        })
    }

    /// Sets how long an operation may take without progress.
    pub fn set_timeout(&self, timeout: Duration) {
        let ms = timeout.as_millis() as u64;
        self.timeout_ms.store(ms, Ordering::Relaxed);
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed))
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
            unsafe {
                ptr::copy_nonoverlapping(
                    ptr::with_exposed_provenance(at),
                    out.as_mut_ptr().add(done),
                    len,
                );
            }
        })
    }

    /// Writes `data` to `addr` through the device's page table.
    ///
    /// # Errors
    /// The device fault that ended it.
    pub fn write(&self, region: RegionRef<'_>, addr: usize, data: &[u8]) -> Result<(), Error> {
        self.copy(region, addr, data.len(), Access::Write, |at, done, len| {
            // SAFETY: the table says the page is writable, and the device lock keeps it so.
            unsafe {
                ptr::copy_nonoverlapping(
                    data.as_ptr().add(done),
                    ptr::with_exposed_provenance_mut(at),
                    len,
                );
            }
        })
    }

    /// Makes `pages` accessible without accessing them.
    ///
    /// # Errors
    /// The device fault that ended it.
    pub fn fault_in(
        &self,
        region: RegionRef<'_>,
        addr: usize,
        len: usize,
        access: Access,
    ) -> Result<(), Error> {
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
        let mut session = self.begin(region, access)?;
        let mut done = 0;
        while done < len {
            let part = addr + done..addr + len;
            let before = done;
            done += session.copy_translated(part.clone(), |at, offset, len| {
                bytes(at, before + offset, len);
            });
            if done < len {
                self.rounds.fetch_add(1, Ordering::Relaxed);
                session.fault(addr + done..addr + len)?;
            }
        }
        session.finish()
    }

    /// Begins an operation on `region`: what a launch is for a device with kernels.
    ///
    /// # Errors
    /// As [`Attachment::map`] and [`MappedRef::begin_use`].
    pub fn begin(&self, region: RegionRef<'_>, access: Access) -> Result<Session<'_>, Error> {
        let worker = svm::worker_thread();
        let mapped = self.attachment.map(region)?;
        if region.is_in_place() {
            // Nobody tells of changes to such memory: what the device knew of it is forgotten at each operation.
            let _guard = self.attachment.device().lock.lock();
            let first = (region.addr() - region.base()) / PAGE;
            let end = (region.addr() + region.len_bytes() - region.base()).div_ceil(PAGE);
            (first / 512..end.div_ceil(512))
                .for_each(|block| mapped.table().remove(block, &PageMask::FULL));
        }
        // SAFETY: whoever tests keeps the mirror, and leaves its edges alone, while there is a session.
        let use_guard = unsafe { mapped.begin_use(access) }?;
        let edges = use_guard.edge_pages().collect();
        Ok(Session {
            device: self,
            mapped,
            range: self.attachment.range()?,
            access,
            edges,
            use_guard,
            _worker: worker,
        })
    }

    /// Moves the pages to device memory and installs translations. Says whether all of them are there now: those that cannot
    /// move, or that another device holds, stay where they are.
    ///
    /// # Errors
    /// A page that is not mapped or permits no access.
    pub fn migrate_to_device(
        &self,
        region: RegionRef<'_>,
        addr: usize,
        nr_pages: usize,
    ) -> Result<bool, Error> {
        let _worker = svm::worker_thread();
        let mapped = self.attachment.map(region)?;
        let mut range = self.attachment.range()?;
        let first = (addr - region.base()) / PAGE;
        loop {
            let mut update =
                range.start_update(&mapped, first..first + nr_pages, self.timeout())?;
            update.migrate()?;
            let guard = self.attachment.device().lock.lock();
            if let Ok(valid) = update.end_update(&guard) {
                valid.iter().for_each(|valid| mapped.table().install(valid));
                let migrated: usize = valid
                    .iter()
                    .map(|v| (*v.readable() - *v.in_place()).count())
                    .sum();
                return Ok(migrated == nr_pages);
            }
        }
    }

    /// Brings the pages home.
    ///
    /// # Errors
    /// As [`Attachment::bring_home`].
    pub fn migrate_to_system(
        &self,
        region: RegionRef<'_>,
        addr: usize,
        nr_pages: usize,
    ) -> Result<(), Error> {
        let first = (addr - region.base()) / PAGE;
        self.attachment.bring_home(region, first..first + nr_pages)
    }

    /// Takes the pages for the device alone, for atomics, until anybody else touches them. Says whether it could: memory that
    /// is accessed in place is never the device's alone.
    ///
    /// # Errors
    /// The device fault that ended it.
    pub fn make_exclusive(
        &self,
        region: RegionRef<'_>,
        addr: usize,
        nr_pages: usize,
    ) -> Result<bool, Error> {
        let mut session = self.begin(region, Access::Write)?;
        let exclusive = session.fault_with(addr..addr + nr_pages * PAGE, |table, valid| {
            let alone = *valid.writable() - *valid.in_place();
            table.exclusive.install_within(valid, Access::Write, &alone);
            alone.count()
        })?;
        session.finish()?;
        Ok(exclusive == nr_pages)
    }

    /// How many of the pages the device has had to itself since it took them.
    ///
    /// # Errors
    /// As [`Attachment::map`].
    pub fn nr_exclusive(
        &self,
        region: RegionRef<'_>,
        addr: usize,
        nr_pages: usize,
    ) -> Result<usize, Error> {
        let mapped = self.attachment.map(region)?;
        let first = (addr - region.base()) / PAGE;
        let _guard = self.attachment.device().lock.lock();
        Ok((first..first + nr_pages)
            .filter(|&page| mapped.table().exclusive.contains(page, Ordering::Acquire))
            .count())
    }

    /// How many of the pages from `addr` on the device has translations to at this moment that permit `access`.
    ///
    /// # Errors
    /// As [`Attachment::map`].
    pub fn nr_translated(
        &self,
        region: RegionRef<'_>,
        addr: usize,
        nr_pages: usize,
        access: Access,
    ) -> Result<usize, Error> {
        let mapped = self.attachment.map(region)?;
        let first = (addr - region.base()) / PAGE;
        let _guard = self.attachment.device().lock.lock();
        let right = mapped.table().rights(access);
        Ok((first..first + nr_pages)
            .filter(|&page| right.contains(page, Ordering::Acquire))
            .count())
    }

    /// What the device could do now, without faulting, with the pages of each block that `pages` touch: which it could write, and which
    /// it would access where the CPU has them.
    ///
    /// # Errors
    /// As [`Attachment::map`], or an overlapping invalidation that does not end.
    pub fn snapshot(
        &self,
        region: RegionRef<'_>,
        pages: Pages<usize>,
    ) -> Result<Vec<(PageMask, PageMask)>, Error> {
        let _worker = svm::worker_thread();
        let mapped = self.attachment.map(region)?;
        let mut range = self.attachment.range()?;
        loop {
            let mut update = range.start_update(&mapped, pages.clone(), self.timeout())?;
            update.snapshot();
            let guard = self.attachment.device().lock.lock();
            if let Ok(valid) = update.end_update(&guard) {
                let masks = valid.iter().map(|v| (*v.writable(), *v.in_place()));
                return Ok(masks.collect());
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

/// One operation on one region.
#[derive(Debug)]
pub struct Session<'d> {
    device: &'d TestDevice,
    mapped: MappedRef<Dummy>,
    range: svm::Range<Dummy>,
    access: Access,
    edges: Vec<usize>,
    use_guard: UseGuard<Dummy>,
    _worker: WorkerThread,
}

impl Session<'_> {
    /// Calls `bytes(address, offset, length)` for the pages of `part`, in order, while there are translations; says how many
    /// bytes were covered.
    pub fn copy_translated(
        &mut self,
        part: Pages<usize>,
        mut bytes: impl FnMut(usize, usize, usize),
    ) -> usize {
        let region = self.mapped.region();
        let table = self.mapped.table();
        let right = table.rights(self.access);
        let mut at = part.start;
        while at < part.end {
            let page = (at - region.base()) / PAGE;
            let len = (PAGE - at % PAGE).min(part.end - at);
            let _guard = self.device.attachment.device().lock.lock();
            let edge = self.edges.contains(&page);
            if !edge && !right.contains(page, Ordering::Acquire) {
                break;
            }
            if !edge && table.in_place.contains(page, Ordering::Acquire) {
                if region.is_in_place() && !self.permits(at, len) {
                    // Protected or unmapped behind the device's back: a fault says what it is.
                    table.remove(page / 512, &PageMask::page(page % 512));
                    break;
                }
                bytes(at, at - part.start, len);
            } else {
                bytes(
                    at.wrapping_add_signed(self.mapped.offset()),
                    at - part.start,
                    len,
                );
            }
            at += len;
        }
        at - part.start
    }

    /// Whether an access in place would work now, by the kernel's word: a load or a store could only die of it.
    fn permits(&self, at: usize, len: usize) -> bool {
        let mut byte = 0u8;
        let local = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        [at, at + len - 1].iter().all(|&at| {
            let remote = libc::iovec {
                iov_base: ptr::with_exposed_provenance_mut(at),
                iov_len: 1,
            };
            // SAFETY: getpid has no preconditions.
            let pid = unsafe { libc::getpid() };
            // SAFETY: reads one byte of our own memory, if it is there, into `byte`.
            let read = unsafe {
                libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0)
            };
            // SAFETY: writes back the byte just read, to memory that the operation is about to write.
            let write = || unsafe {
                libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0)
            };
            read == 1 && (self.access == Access::Read || write() == 1)
        })
    }

    /// One fault round over all of `part`.
    ///
    /// # Errors
    /// The fault.
    pub fn fault(&mut self, part: Pages<usize>) -> Result<(), DeviceFault> {
        self.fault_with(part, |_, _| 0).map(drop)
    }

    /// One fault round over all that is left, as the kernel's test device does it: the loop a driver author writes. `installed`
    /// is called under the device lock; gives the sum of its results.
    fn fault_with(
        &mut self,
        part: Pages<usize>,
        mut installed: impl FnMut(&Table, &Valid) -> usize,
    ) -> Result<usize, DeviceFault> {
        let base = self.mapped.region().base();
        let (first, end) = ((part.start - base) / PAGE, (part.end - base).div_ceil(PAGE));
        let end = (first..end)
            .find(|page| self.edges.contains(page))
            .unwrap_or(end);
        let mapped = &self.mapped;
        loop {
            let mut update = self
                .range
                .start_update(mapped, first..end, self.device.timeout())?;
            update.fault(self.access)?;
            let guard = self.device.attachment.device().lock.lock();
            if let Ok(valid) = update.end_update(&guard) {
                valid.iter().for_each(|valid| mapped.table().install(valid));
                let within = |valid: &Valid| installed(mapped.table(), valid);
                return Ok(valid.iter().map(within).sum());
            }
        }
    }

    /// Ends the operation.
    ///
    /// # Errors
    /// What was written to an edge could not be copied back.
    pub fn finish(self) -> Result<(), Error> {
        self.use_guard.finish()
    }
}

/// Makes `n` pages of a mirror accessible, from its page `first` on, without accessing them.
///
/// # Panics
/// If that ends in a device fault.
pub fn fault_in(
    device: &TestDevice,
    mirror: &Mirror<'_, u8>,
    first: usize,
    n: usize,
    access: Access,
) {
    let view = mirror.view();
    device
        .fault_in(view.region(), view.addr() + first * PAGE, n * PAGE, access)
        .unwrap();
}
