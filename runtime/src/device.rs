//! What a device implements, and how it attaches.
//!
//! A driver implements [`Device`]: a table of translations per mapped region, and two callbacks that take translations
//! away. It never sees userfaultfd. It gets translations *in* through a [`Range`](crate::Range), and in no other way:
//!
//! ```text
//! start_update(timeout)       wait until no invalidation overlaps the range, take its sequence number
//! fault(access)               the runtime moves or duplicates the pages; no lock is held afterwards
//! device.lock()               the driver's own lock, the seed's `driver->update`
//! end_update(&guard)          Ok(valid pages): install them before letting go of the lock; or Interrupted: start over
//! ```
//!
//! # Who calls what
//! The runtime calls [`Device::invalidate`] between the start of an invalidation and the change of the page tables, and
//! then polls [`Device::quiesced`] until it says true; only then does the change happen. `invalidate` takes the device
//! lock, so a translation is either installed before it and removed by it, or its `end_update` comes after and says
//! `Interrupted` (protocol I2).

use core::ops::Range;

use crate::addr::PAGES_PER_BLOCK;
use crate::error::{Access, Result};
use crate::mask::PageMask;
pub use crate::notifier::{Blocking, WouldBlock};
use crate::sync::{Mutex, MutexGuard};

/// A device: something that keeps translations to memory and can give them up.
///
/// # Safety
/// The runtime moves pages when `invalidate` and `quiesced` have said that no translation of them is in use. So:
///
/// - After `invalidate(table, inv)` returned `Ok`, no new access through a translation of `inv.pages()` may begin (no
///   *write*, if [`Invalidation::keep`] is [`Keep::Reads`]) until a later [`Valid`](crate::Valid) covers it again.
/// - `quiesced(table, inv)` may return true only when every access that had begun has ended.
/// - `overrun` says [`Overrun::Park`] only of a thread that is the device's own, and that may stop where it is, for good and
///   without unwinding: what others would wait for, its open accesses above all, is released before the return, and
///   nothing it has borrowed or locked is waited for by anybody.
/// - A translation is installed only with what `end_update` returned, before the device lock is let go of.
///
/// Both callbacks may run on any thread inside a signal handler that interrupted anything, `malloc` included. They must
/// not allocate, block, log, panic, use a lazily initialised thread-local, touch mirrored memory, or take a lock other
/// than the device lock and ones that are only ever held under these same rules.
pub unsafe trait Device: Send + Sync + 'static {
    /// The translations of one mapped region.
    type Table: Send + Sync + 'static;

    /// Makes an empty table for a region; called once per region and device, where allocation is allowed.
    ///
    /// # Errors
    /// Whatever keeps the device from mapping the region; the launch that wanted it fails with it.
    fn map(&self, map: &MapInfo) -> Result<Self::Table>;

    /// The lock under which translations are installed and removed.
    fn lock(&self) -> &DeviceLock;

    /// First pass: removes translations, and does not wait for accesses in flight.
    ///
    /// # Errors
    /// [`WouldBlock`] if `inv.blocking()` is [`Blocking::No`] and the device lock is taken. Nothing may have changed then.
    fn invalidate(&self, table: &Self::Table, inv: &Invalidation) -> Result<(), WouldBlock>;

    /// The invalidation, which this device had been told of, will not take place: another one refused. What was removed comes
    /// back by faults.
    fn cancel(&self, table: &Self::Table, inv: &Invalidation) {
        let _ = (table, inv);
    }

    /// Second pass: whether every access through a removed translation has ended.
    fn quiesced(&self, table: &Self::Table, inv: &Invalidation) -> bool;

    /// A thread touched memory of the device's window that is gone. If it is a worker of the device's, a span of its has
    /// outstayed a shootdown by [`span_deadline`](crate::AttachOptions::span_deadline), and its pages were taken: `late` says
    /// which thread and which page. The device may write the thread off and say [`Overrun::Park`].
    ///
    /// Called on that thread, in a signal handler, under the rules of the callbacks. The default knows nobody: the fault goes to the
    /// handler that was there before, as a rule the end of the process.
    fn overrun(&self, table: &Self::Table, late: &LateAccess) -> Overrun {
        let _ = (table, late);
        Overrun::Stranger
    }

    /// Where the device keeps its copies. A device with memory that the CPU cannot reach says [`DeviceMemory::Opaque`] and
    /// implements the two copies below.
    fn memory(&self) -> DeviceMemory {
        DeviceMemory::Window
    }

    /// Copies `pages` (indices from the region's base) from host memory at `from` to the device. Only for opaque memory;
    /// called with the block locked, under the rules of the callbacks.
    ///
    /// # Safety
    /// `from` is readable for as many pages, and nobody writes there meanwhile.
    unsafe fn copy_to_device(&self, table: &Self::Table, pages: Range<usize>, from: *const u8) {
        let _ = (table, pages, from);
    }

    /// Copies `pages` from the device to host memory at `to`. Only for opaque memory; called with the block locked, perhaps
    /// in a signal handler, under the rules of the callbacks.
    ///
    /// # Safety
    /// `to` is writable for as many pages, and nobody else uses it meanwhile.
    unsafe fn copy_to_host(&self, table: &Self::Table, pages: Range<usize>, to: *mut u8) {
        let _ = (table, pages, to);
    }

    /// Stops accesses: until [`resume`](Self::resume), none begins through any translation. Called, by one thread at a time,
    /// before an event is read, for with the reading its cause goes on. A device without it may serve an access of
    /// memory that was just unmapped for as long as the event takes to apply: microseconds.
    fn pause(&self) {}

    /// Whether every access that had begun before [`pause`](Self::pause) has ended. Polled for a short while only.
    fn is_paused(&self) -> bool {
        true
    }

    /// Ends a pause.
    fn resume(&self) {}
}

/// An access through a span, after its page was taken from it: what [`Device::overrun`] is told.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LateAccess {
    /// The address it was for, in the mirrored range.
    pub addr: usize,
    /// What it wanted, where the system tells.
    pub access: Option<Access>,
    /// Who made it.
    pub thread: ThreadId,
}

/// What is to become of a thread that touched memory its device does not have any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overrun {
    /// It is no worker of this device's.
    Stranger,
    /// It never runs again. Its stack and what it owns stay as they are for as long as the process lives.
    Park,
}

/// Names a thread while it lives. A worker learns its own from [`WorkerThread::id`](crate::WorkerThread::id).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ThreadId(usize);

impl ThreadId {
    pub(crate) const fn of(thread: usize) -> Self {
        Self(thread)
    }

    /// As a number, for storing in an atomic; never 0.
    #[must_use]
    pub const fn as_usize(self) -> usize {
        self.0
    }
}

/// Where a device keeps its copies of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceMemory {
    /// In the window: page *i* of the region is page *i* of the window, and pages move there without a copy.
    Window,
    /// Somewhere else, behind [`Device::copy_to_device`] and [`Device::copy_to_host`], as the kernel's `drm_pagemap` has it.
    Opaque,
}

/// The lock of a device, under which its translations change.
#[derive(Debug, Default)]
pub struct DeviceLock(Mutex<()>);

/// Proof that a device's lock is held.
#[derive(Debug)]
pub struct DeviceGuard<'a> {
    lock: &'a DeviceLock,
    _held: MutexGuard<'a, ()>,
}

impl DeviceLock {
    /// An unlocked lock.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(()))
    }

    /// Locks; usable inside a signal handler, provided that every holder has asynchronous signals masked, as
    /// [`worker_thread`](crate::worker_thread) does for a thread's life and the runtime does around its callbacks.
    #[inline]
    pub fn lock(&self) -> DeviceGuard<'_> {
        DeviceGuard {
            lock: self,
            _held: self.0.lock(),
        }
    }

    /// Locks if nobody holds it.
    pub fn try_lock(&self) -> Option<DeviceGuard<'_>> {
        Some(DeviceGuard {
            lock: self,
            _held: self.0.try_lock()?,
        })
    }

    /// Locks, or refuses where waiting is not allowed.
    ///
    /// # Errors
    /// [`WouldBlock`] if `blocking` is [`Blocking::No`] and somebody holds the lock.
    pub fn lock_for(&self, blocking: Blocking) -> Result<DeviceGuard<'_>, WouldBlock> {
        match blocking {
            Blocking::Yes => Ok(self.lock()),
            Blocking::No => self.try_lock().ok_or(WouldBlock),
        }
    }
}

impl DeviceGuard<'_> {
    /// Whether this guard is of `lock`.
    #[must_use]
    pub fn is_of(&self, lock: &DeviceLock) -> bool {
        core::ptr::eq(self.lock, lock)
    }
}

/// What may stay after an invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: all translations go.
    Nothing,
    /// Read translations stay; the right to write goes.
    Reads,
}

/// An invalidation of some pages of one region, within one block.
#[derive(Clone, Debug)]
pub struct Invalidation {
    pub(crate) block: usize,
    pub(crate) pages: PageMask,
    pub(crate) keep: Keep,
    pub(crate) blocking: Blocking,
}

impl Invalidation {
    pub(crate) fn new(block: usize, pages: PageMask, keep: Keep) -> Self {
        Self {
            block,
            pages,
            keep,
            blocking: Blocking::Yes,
        }
    }

    /// The same, of a caller that will not wait for a device's lock.
    pub(crate) fn without_waiting(self) -> Self {
        Self {
            blocking: Blocking::No,
            ..self
        }
    }

    /// The block, counted from the region's base.
    #[must_use]
    pub fn block(&self) -> usize {
        self.block
    }

    /// The pages of that block.
    #[must_use]
    pub fn pages(&self) -> &PageMask {
        &self.pages
    }

    /// The smallest range of page indices, counted from the region's base, that covers the pages.
    #[must_use]
    pub fn bounds(&self) -> Range<usize> {
        let bounds = self.pages.bounds().unwrap_or(0..0);
        let origin = self.block * PAGES_PER_BLOCK;
        origin + bounds.start..origin + bounds.end
    }

    /// What may stay.
    #[must_use]
    pub fn keep(&self) -> Keep {
        self.keep
    }

    /// Whether the callback may wait for the device lock.
    #[must_use]
    pub fn blocking(&self) -> Blocking {
        self.blocking
    }
}

/// How a device reaches a region: what [`Device::map`] is told.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MapInfo {
    /// The block-aligned address that page indices count from.
    pub host_base: usize,
    /// Where page index 0 lies in the window; congruent to `host_base` modulo 2 MiB.
    pub window_base: usize,
    /// Number of page indices, edges included: a table needs this many entries.
    pub nr_pages: usize,
    /// The page indices that hold bytes of the range: `first..end`.
    pub first_page: usize,
    /// One past the last page index that holds bytes of the range.
    pub end_page: usize,
    /// Whether the whole region is accessed at the host's address, and no page ever moves.
    pub in_place: bool,
}
