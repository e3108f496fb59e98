//! What a script plays with: one page among a few, mirrored, and two devices.
//!
//! The page has three words that matter. The first is the device's to write, the second the CPU's, the third the other
//! device's; whoever reads, reads all three. So what was seen tells what came before, and what is there in the end tells
//! whether a write was lost.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use svm::{
    Access, AttachOptions, Attachment, Delivery, Device, DeviceFault, DeviceFaultKind, DeviceGuard,
    DeviceLock, Granule, Invalidation, Keep, MapInfo, MappedRef, Mirror, Options, PageBits, Valid,
    WouldBlock,
};

use crate::director::{self, Actor};

pub(crate) const PAGE: usize = 4096;
const NR_PAGES: usize = 8;
/// The page that everybody wants.
pub(crate) const SUBJECT: usize = 2;
/// How long a device fault may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The three words.
pub(crate) type Words = [u64; 3];
/// What they are at first.
pub(crate) const BEFORE: Words = [1, 1, 1];

/// A device whose accesses happen under its lock, and which can pretend that one goes on.
#[derive(Debug, Default)]
pub(crate) struct Probe {
    lock: DeviceLock,
    busy: AtomicBool,
    pub(crate) invalidations: AtomicU64,
}

/// Its translations.
#[derive(Debug)]
pub(crate) struct Table {
    readable: PageBits,
    writable: PageBits,
    in_place: PageBits,
}

// SAFETY: translations are used under the device lock alone, which `invalidate` takes; no lock but that, and no allocation.
unsafe impl Device for Probe {
    type Table = Table;

    fn map(&self, map: &MapInfo) -> svm::Result<Table> {
        let bits = || PageBits::new(map.nr_pages);
        Ok(Table {
            readable: bits()?,
            writable: bits()?,
            in_place: bits()?,
        })
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

    fn quiesced(&self, _: &Table, _: &Invalidation) -> bool {
        !self.busy.load(Ordering::SeqCst)
    }
}

impl Probe {
    /// The device lock.
    pub(crate) fn lock_it(&self) -> DeviceGuard<'_> {
        self.lock.lock()
    }

    /// Whether an access through any translation is in flight from now on, as far as the runtime is told.
    pub(crate) fn set_busy(&self, busy: bool) {
        self.busy.store(busy, Ordering::SeqCst);
    }
}

/// A device access: what it does to the three words, and the word it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write { word: usize, value: u64 },
}

impl Op {
    fn access(self) -> Access {
        match self {
            Self::Read => Access::Read,
            Self::Write { .. } => Access::Write,
        }
    }
}

/// How a device gets its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// By the driver's own loop: `start_update`, `fault`, `end_update`. Nothing is held between its steps.
    Update,
    /// By `fault_in`, whose token and commit are inside the block's round.
    Round,
}

/// One worker of a device, on one region.
pub(crate) struct Worker<'d> {
    device: &'d Attachment<Probe>,
    mapped: MappedRef<Probe>,
    range: svm::Range<Probe>,
    /// Updates that were interrupted.
    pub(crate) interrupted: usize,
    /// Rounds through [`Self::access`].
    pub(crate) rounds: usize,
}

impl<'d> Worker<'d> {
    pub(crate) fn new(device: &'d Attachment<Probe>, mirror: &Mirror<'static, u8>) -> Self {
        Self {
            device,
            mapped: device.map(mirror.view().region()).unwrap(),
            range: device.range().unwrap(),
            interrupted: 0,
            rounds: 0,
        }
    }

    /// What a script needs to go through an update by hand: the mapping, the range, and the index of `page`.
    pub(crate) fn parts(
        &mut self,
        page: usize,
    ) -> (MappedRef<Probe>, &mut svm::Range<Probe>, usize) {
        let index = self.index(page);
        (self.mapped.clone(), &mut self.range, index)
    }

    fn index(&self, page: usize) -> usize {
        (self.mapped.region().addr() - self.mapped.region().base()) / PAGE + page
    }

    /// The access to `page`, through the table, if it has a translation. The device lock is held.
    fn through_table(&self, page: usize, op: Op) -> Option<Words> {
        let (table, index) = (self.mapped.table(), self.index(page));
        let bits = match op {
            Op::Read => &table.readable,
            Op::Write { .. } => &table.writable,
        };
        if !bits.contains(index, Ordering::Acquire) {
            return None;
        }
        let host = self.mapped.region().addr() + page * PAGE;
        let at = if table.in_place.contains(index, Ordering::Acquire) {
            host
        } else {
            host.wrapping_add_signed(self.mapped.offset())
        };
        let words: *mut Words = ptr::with_exposed_provenance_mut(at);
        if let Op::Write { word, value } = op {
            // SAFETY: the table says the page may be written, and the device lock, which is held, keeps it so.
            unsafe { (&raw mut (*words)[word]).write_volatile(value) };
        }
        // SAFETY: as above, for reading.
        Some(unsafe { words.read_volatile() })
    }

    fn install(table: &Table, valid: &Valid) {
        table.in_place.install_places(valid);
        table.readable.install(valid, Access::Read);
        table.writable.install(valid, Access::Write);
    }

    /// A fault for reading, without a look at the table first.
    pub(crate) fn fault(&mut self, page: usize) -> Result<(), DeviceFaultKind> {
        let _signals = svm::worker_thread();
        let index = self.index(page);
        let mapped = self.mapped.clone();
        self.range
            .fault_in(
                &mapped,
                index..index + 1,
                Access::Read,
                0,
                TIMEOUT,
                |valid, _| Self::install(mapped.table(), valid),
            )
            .map_err(|fault| fault.kind)
    }

    /// A fault for reading of `nr` pages at once, without a look at the table first; what they hold then.
    pub(crate) fn fault_many(
        &mut self,
        page: usize,
        nr: usize,
    ) -> Result<Vec<Words>, DeviceFaultKind> {
        let _signals = svm::worker_thread();
        let index = self.index(page);
        let (mapped, mut found) = (self.mapped.clone(), Vec::new());
        let host = mapped.region().addr() + page * PAGE;
        let window = host.wrapping_add_signed(mapped.offset());
        let outcome = self.range.fault_in(
            &mapped,
            index..index + nr,
            Access::Read,
            0,
            TIMEOUT,
            |_, _| {
                let words = |at: usize| ptr::with_exposed_provenance::<Words>(window + at * PAGE);
                // SAFETY: the pages are the device's for reading, and the device lock, which is held, keeps them so.
                found = (0..nr)
                    .map(|at| unsafe { words(at).read_volatile() })
                    .collect();
            },
        );
        outcome.map(|()| found).map_err(|fault| fault.kind)
    }

    /// The access. Interrupted, it lets `rival` finish before it begins anew, where one is named.
    pub(crate) fn access(
        &mut self,
        shape: Shape,
        page: usize,
        op: Op,
        rival: Option<Actor>,
    ) -> Result<Words, DeviceFaultKind> {
        let _signals = svm::worker_thread();
        let kind = |fault: DeviceFault| fault.kind;
        let index = self.index(page);
        loop {
            {
                let _guard = self.device.device().lock.lock();
                if let Some(words) = self.through_table(page, op) {
                    return Ok(words);
                }
            }
            self.rounds += 1;
            match shape {
                Shape::Update => {
                    let mut update = self
                        .range
                        .start_update(&self.mapped, index..index + 1, TIMEOUT)
                        .map_err(kind)?;
                    update.fault(op.access()).map_err(kind)?;
                    let guard = self.device.device().lock.lock();
                    match update.end_update(&guard) {
                        Ok(valid) => {
                            let table = self.mapped.table();
                            valid.iter().for_each(|valid| Self::install(table, valid));
                            // Committed and used under one hold of the lock, but for the script that wants to come between.
                            if !director::is_wanted_at_own_point() {
                                return Ok(self.through_table(page, op).expect("just installed"));
                            }
                            drop(guard);
                            director::own_point();
                        }
                        Err(svm::Interrupted) => {
                            drop(guard);
                            self.interrupted += 1;
                            rival.into_iter().for_each(director::wait_done);
                        }
                    }
                }
                Shape::Round => {
                    let (mapped, range) = (self.mapped.clone(), &mut self.range);
                    let mut done = None;
                    let host = self.mapped.region().addr() + page * PAGE;
                    range
                        .fault_in(
                            &mapped,
                            index..index + 1,
                            op.access(),
                            0,
                            TIMEOUT,
                            |valid, _| {
                                Self::install(mapped.table(), valid);
                                let in_place =
                                    mapped.table().in_place.contains(index, Ordering::Acquire);
                                let at = if in_place {
                                    host
                                } else {
                                    host.wrapping_add_signed(mapped.offset())
                                };
                                let words: *mut Words = ptr::with_exposed_provenance_mut(at);
                                if let Op::Write { word, value } = op {
                                    // SAFETY: valid for writing, and the device lock is held.
                                    unsafe { (&raw mut (*words)[word]).write_volatile(value) };
                                }
                                // SAFETY: valid for reading, and the device lock is held.
                                done = Some(unsafe { words.read_volatile() });
                            },
                        )
                        .map_err(kind)?;
                    if let Some(words) = done {
                        return Ok(words);
                    }
                }
            }
        }
    }
}

/// Pages, mirrored.
pub(crate) struct Memory {
    start: usize,
    len: usize,
}

impl Memory {
    pub(crate) fn new() -> Self {
        Self::sized(NR_PAGES)
    }

    pub(crate) fn sized(nr_pages: usize) -> Self {
        let memory = Self {
            start: map(nr_pages),
            len: nr_pages * PAGE,
        };
        for page in 0..nr_pages {
            // SAFETY: inside the mapping, which nobody else knows yet.
            unsafe { memory.at(page).write(BEFORE) };
        }
        memory
    }

    pub(crate) fn addr(&self, page: usize) -> usize {
        self.start + page * PAGE
    }

    pub(crate) fn at(&self, page: usize) -> *mut Words {
        ptr::with_exposed_provenance_mut(self.addr(page))
    }

    pub(crate) fn mirror(&self, options: &Options) -> Mirror<'static, u8> {
        // SAFETY: anonymous read-write memory; what becomes of it is what the replay is about.
        unsafe { svm::mirror_raw(self.at(0).cast(), self.len, options) }.unwrap()
    }

    /// The CPU reads.
    pub(crate) fn load(&self, page: usize) -> Words {
        // SAFETY: the scripts read only pages that are mapped.
        unsafe { self.at(page).read_volatile() }
    }

    /// The CPU writes one word.
    pub(crate) fn store(&self, page: usize, word: usize, value: u64) {
        // SAFETY: as in `load`; devices that write meanwhile write other words.
        unsafe { (&raw mut (*self.at(page))[word]).write_volatile(value) };
    }

    pub(crate) fn discard(&self, page: usize) {
        // SAFETY: the script's own page.
        let outcome = unsafe { libc::madvise(self.at(page).cast(), PAGE, libc::MADV_DONTNEED) };
        assert_eq!(outcome, 0);
    }

    /// Keeps one page in memory, once it is there; false if the system permits nothing of the kind.
    pub(crate) fn lock(&self, page: usize) -> bool {
        // SAFETY: it changes no contents.
        let outcome = unsafe { libc::mlock2(self.at(page).cast(), PAGE, libc::MLOCK_ONFAULT) };
        if outcome != 0 {
            tests::skip(format!("mlock2: {}", std::io::Error::last_os_error()));
        }
        outcome == 0
    }

    pub(crate) fn unmap(&self, page: usize) {
        // SAFETY: the script's own page, which it touches no more.
        let outcome = unsafe { libc::munmap(self.at(page).cast(), PAGE) };
        assert_eq!(outcome, 0);
    }

    /// Maps other memory where a page was.
    pub(crate) fn map_anew(&self, page: usize) {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
        );
        let at = self.at(page).cast();
        // SAFETY: a fresh mapping, over none.
        let mapped = unsafe { libc::mmap(at, PAGE, protection, flags, -1, 0) };
        assert_eq!(mapped, at, "it is mapped still");
    }

    /// Moves one page to other memory, and gives that.
    pub(crate) fn remap(&self, page: usize) -> Self {
        let target = Self {
            start: map(1),
            len: PAGE,
        };
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the script's own page, and a mapping that nobody else knows.
        let moved = unsafe { libc::mremap(self.at(page).cast(), PAGE, PAGE, flags, target.at(0)) };
        assert_ne!(moved, libc::MAP_FAILED);
        target
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and a mirror of it has been closed.
        unsafe { libc::munmap(self.at(0).cast(), self.len) };
    }
}

fn map(nr_pages: usize) -> usize {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: a fresh mapping.
    let at = unsafe { libc::mmap(ptr::null_mut(), nr_pages * PAGE, protection, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.expose_provenance()
}

pub(crate) fn options(delivery: Delivery) -> Options {
    Options::new().delivery(delivery).granule(Granule::Page)
}

pub(crate) fn attach(memory_bytes: Option<usize>) -> Attachment<Probe> {
    let mut options = AttachOptions::new();
    options.memory_bytes = memory_bytes;
    attach_with(options)
}

pub(crate) fn attach_with(options: AttachOptions) -> Attachment<Probe> {
    svm::attach(Probe::default(), options).unwrap()
}
