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

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PAGES_PER_BLOCK};
use crate::block::{DeviceId, MAX_DEVICES};
use crate::error::{Access, DeviceFault, DeviceFaultKind, Error, ErrorKind, Result};
use crate::evict;
use crate::mask::PageMask;
pub use crate::notifier::{Blocking, WouldBlock};
use crate::region::{Region, RegionKind};
use crate::scratch::Scratch;
use crate::space::{AddressSpace, Gated};
use crate::stats::{Cause, Counters, Stats};
use crate::sync::{Mutex, MutexGuard};
use crate::sys::arc::{MapArc, MapSlice};
use crate::sys::mmap::MapArray;
use crate::sys::signal::AsyncSignalsBlocked;
use crate::window::Window;

/// A device: something that keeps translations to memory and can give them up.
///
/// # Safety
/// The runtime moves pages when `invalidate` and `quiesced` have said that no translation of them is in use. So:
///
/// - After `invalidate(table, inv)` returned `Ok`, no new access through a translation of `inv.pages()` may begin (no
///   *write*, if [`Invalidation::keep`] is [`Keep::Reads`]) until a later [`Valid`](crate::Valid) covers it again.
/// - `quiesced(table, inv)` may return true only when every access that had begun has ended.
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

    /// Second pass: whether every access through a removed translation has ended.
    fn quiesced(&self, table: &Self::Table, inv: &Invalidation) -> bool;

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

/// How much memory a device has, and the like.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct AttachOptions {
    /// Bytes of device memory; `None` is without limit. Rounded down to pages.
    pub memory_bytes: Option<usize>,
}

impl AttachOptions {
    /// No limit on device memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Limits device memory.
    #[must_use]
    pub fn memory_bytes(mut self, bytes: usize) -> Self {
        self.memory_bytes = Some(bytes);
        self
    }
}

/// Device memory in pages: how much is used, and the limit.
#[derive(Debug)]
pub(crate) struct Residency {
    resident: AtomicUsize,
    capacity: usize,
    /// How many of the next allocations are made to fail.
    failures: AtomicUsize,
}

impl Residency {
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn resident(&self) -> usize {
        self.resident.load(Ordering::Relaxed)
    }

    /// Whether the allocation that comes now was made to fail. Asked once for each.
    pub(crate) fn take_failure(&self) -> bool {
        self.failures.load(Ordering::Relaxed) != 0
            && self
                .failures
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                .is_ok()
    }

    /// Counts `pages` in if they fit.
    pub(crate) fn reserve(&self, pages: usize) -> bool {
        self.resident
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                (n.checked_add(pages)? <= self.capacity).then_some(n + pages)
            })
            .is_ok()
    }

    /// Counts `pages` out.
    pub(crate) fn release(&self, pages: usize) {
        let before = self.resident.fetch_sub(pages, Ordering::Relaxed);
        debug_assert!(before >= pages, "device memory accounting went below zero");
    }
}

/// State of an attached device, shared by its attachment, its mapped regions and its ranges.
pub(crate) struct Attached<D: Device> {
    pub(crate) id: DeviceId,
    pub(crate) device: D,
    pub(crate) residency: Residency,
    space: &'static AddressSpace,
    /// The device is going: no page goes to it any more.
    detached: AtomicBool,
    /// What happened in regions that are gone.
    retired: Counters,
    mapped: Gated<MapSlice<MapArc<Mapped<D>>>>,
    /// Serialises mapping and unmapping; never taken on the fault path.
    control: std::sync::Mutex<()>,
    /// Where the eviction clock's hand stands: index of the mapped region, and block.
    pub(crate) hand: Mutex<(usize, usize)>,
}

/// One region as one device sees it: its window and its translations.
pub struct Mapped<D: Device> {
    attached: MapArc<Attached<D>>,
    region: MapArc<Region>,
    window: Window,
    table: D::Table,
    counters: Counters,
    /// Per block: touched since the eviction clock's hand last passed.
    touched: MapArray<AtomicU8>,
    edges: crate::edge::Edges,
    /// For opaque memory: where pages pass through.
    bounce: Option<Mutex<MapArray<u8>>>,
}

/// [`Mapped`] without the device's type: what the CPU's side needs of it.
pub(crate) trait AnyMapped: Send + Sync {
    fn id(&self) -> DeviceId;
    fn window(&self) -> &Window;
    fn counters(&self) -> &Counters;
    fn residency(&self) -> &Residency;
    fn invalidate(&self, inv: &Invalidation) -> Result<(), WouldBlock>;
    fn quiesced(&self, inv: &Invalidation) -> bool;
    fn pause(&self);
    fn is_paused(&self) -> bool;
    fn resume(&self);
    /// A block's worth of plain memory between host and device, if the device's memory is opaque; one user at a time.
    fn bounce(&self) -> Option<MutexGuard<'_, MapArray<u8>>>;
    /// Copies `pages` (from the region's base) to opaque memory. `from` is readable and nobody writes there.
    fn copy_to_device(&self, pages: Range<usize>, from: usize);
    /// Copies `pages` from opaque memory into the bounce buffer.
    fn copy_to_bounce(&self, pages: Range<usize>, bounce: &mut MapArray<u8>);
    /// The region is going: forget it.
    fn unmap(&self);
}

impl<D: Device> AnyMapped for Mapped<D> {
    fn id(&self) -> DeviceId {
        self.attached.id
    }

    fn window(&self) -> &Window {
        &self.window
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn residency(&self) -> &Residency {
        &self.attached.residency
    }

    fn invalidate(&self, inv: &Invalidation) -> Result<(), WouldBlock> {
        crate::stats::count(&self.counters.invalidations, 1);
        self.attached.device.invalidate(&self.table, inv)
    }

    fn quiesced(&self, inv: &Invalidation) -> bool {
        self.attached.device.quiesced(&self.table, inv)
    }

    fn bounce(&self) -> Option<MutexGuard<'_, MapArray<u8>>> {
        self.bounce.as_ref().map(Mutex::lock)
    }

    fn copy_to_device(&self, pages: Range<usize>, from: usize) {
        let from = core::ptr::with_exposed_provenance(from);
        // SAFETY: `movement`, the only caller, gives a run of populated window pages, or the bounce buffer, whose lock it holds;
        // the block's lock keeps others from the window pages.
        unsafe {
            self.attached
                .device
                .copy_to_device(&self.table, pages, from);
        };
    }

    fn copy_to_bounce(&self, pages: Range<usize>, bounce: &mut MapArray<u8>) {
        debug_assert!(pages.len() <= PAGES_PER_BLOCK);
        // SAFETY: the buffer is a block long, and exclusively borrowed.
        unsafe {
            self.attached
                .device
                .copy_to_host(&self.table, pages, bounce.as_mut_ptr());
        };
    }

    fn pause(&self) {
        self.attached.device.pause();
    }

    fn is_paused(&self) -> bool {
        self.attached.device.is_paused()
    }

    fn resume(&self) {
        self.attached.device.resume();
    }

    fn unmap(&self) {
        self.attached.retired.absorb(&self.counters.snapshot());
        let gate = AddressSpace::global().gate();
        retry_no_memory(|| {
            self.attached.mapped.update(gate, |list| {
                MapSlice::collect(
                    list.iter()
                        .filter(|m| m.region.id() != self.region.id())
                        .cloned(),
                )
            })
        });
    }
}

impl<D: Device> Mapped<D> {
    /// The device's translations of this region.
    #[must_use]
    pub fn table(&self) -> &D::Table {
        &self.table
    }

    /// Distance from a host address to the same byte in the window (wrapping).
    #[must_use]
    pub fn offset(&self) -> isize {
        self.window
            .base()
            .wrapping_sub(self.region.base())
            .cast_signed()
    }

    /// The region.
    #[must_use]
    pub fn region(&self) -> RegionRef<'_> {
        RegionRef {
            region: &self.region,
        }
    }

    pub(crate) fn shared_region(&self) -> &MapArc<Region> {
        &self.region
    }

    pub(crate) fn attached(&self) -> &MapArc<Attached<D>> {
        &self.attached
    }

    pub(crate) fn edges(&self) -> &crate::edge::Edges {
        &self.edges
    }

    /// Marks a block as recently faulted on.
    pub(crate) fn touch(&self, block: usize) {
        self.touched[block].store(1, Ordering::Relaxed);
    }

    /// Whether the block was touched since the last call.
    pub(crate) fn take_touched(&self, block: usize) -> bool {
        self.touched[block].swap(0, Ordering::Relaxed) != 0
    }
}

impl<D: Device> fmt::Debug for Mapped<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapped")
            .field("device", &self.attached.id)
            .field("region", &*self.region)
            .finish_non_exhaustive()
    }
}

/// A mirrored range, as a device author names it.
#[derive(Clone, Copy)]
pub struct RegionRef<'a> {
    pub(crate) region: &'a MapArc<Region>,
}

impl RegionRef<'_> {
    /// A number that no other region of this process has had.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.region.id()
    }

    /// First byte of the range.
    #[must_use]
    pub fn addr(&self) -> usize {
        self.region.addr()
    }

    /// Length of the range.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.region.len_bytes()
    }

    /// Whether no page of it can move: devices access it at the host's address.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.region.kind() == RegionKind::InPlace
    }

    /// Whether the page of `addr` can move: it lies wholly in the range, and was not unmapped or moved elsewhere since. What was
    /// unmapped before the call is seen.
    #[must_use]
    pub fn is_movable(&self, addr: usize) -> bool {
        let region = self.region;
        let body = region
            .body()
            .filter(|body| region.kind() == RegionKind::Managed && body.contains_addr(addr));
        body.is_some() && {
            let _signals = AsyncSignalsBlocked::new();
            let _gate = AddressSpace::global().gate().enter();
            let (block, page) = region.locate(addr);
            !region.lock_block(block).gone().contains(page)
        }
    }

    /// The address that page indices count from: [`Self::addr`] rounded down to 2 MiB.
    #[must_use]
    pub fn base(&self) -> usize {
        self.region.base()
    }

    /// Pages that one fault moves at most.
    #[must_use]
    pub fn granule_pages(&self) -> usize {
        self.region.granule()
    }
}

impl fmt::Debug for RegionRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.region.fmt(f)
    }
}

/// An attached device. Dropping it brings every page home and detaches.
pub struct Attachment<D: Device> {
    attached: MapArc<Attached<D>>,
}

/// A shared handle to a [`Mapped`] region.
pub struct MappedRef<D: Device>(pub(crate) MapArc<Mapped<D>>);

impl<D: Device> Clone for MappedRef<D> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D: Device> core::ops::Deref for MappedRef<D> {
    type Target = Mapped<D>;
    fn deref(&self) -> &Mapped<D> {
        &self.0
    }
}

impl<D: Device> fmt::Debug for MappedRef<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// Attaches a device to the address space.
///
/// # Errors
/// Device memory below one page, too many devices, no userfaultfd here, or a forked child.
pub fn attach<D: Device>(device: D, options: AttachOptions) -> Result<Attachment<D>> {
    let space = AddressSpace::get("attach")?;
    let capacity = match options.memory_bytes {
        None => usize::MAX / PAGE_SIZE,
        Some(bytes) if bytes < PAGE_SIZE => {
            return Err(Error::invalid(
                "attach",
                "device memory is below one page (4096 bytes); give it more",
            ));
        }
        Some(bytes) => bytes / PAGE_SIZE,
    };
    let Some(id) = space.claim_device() else {
        return Err(Error::invalid(
            "attach",
            "8 devices are attached already; drop one first",
        ));
    };
    let no_memory = |errno| {
        space.release_device(id);
        Error::new("attach", ErrorKind::OutOfMemory).errno(errno)
    };
    let attached = Attached {
        id,
        device,
        residency: Residency {
            resident: AtomicUsize::new(0),
            capacity,
            failures: AtomicUsize::new(0),
        },
        space,
        detached: AtomicBool::new(false),
        retired: Counters::default(),
        mapped: Gated::new(MapSlice::empty()).map_err(no_memory)?,
        control: std::sync::Mutex::new(()),
        hand: Mutex::new((0, 0)),
    };
    Ok(Attachment {
        attached: MapArc::new(attached).map_err(no_memory)?,
    })
}

impl<D: Device> Attachment<D> {
    /// The device.
    #[must_use]
    pub fn device(&self) -> &D {
        &self.attached.device
    }

    /// Whether this is a forked child and the device was attached in the parent: its threads, if it had any, are not here.
    #[must_use]
    pub fn is_forked(&self) -> bool {
        !self.attached.space.is_usable()
    }

    /// Bytes of device memory, `None` for no limit.
    #[must_use]
    pub fn memory_bytes(&self) -> Option<usize> {
        self.attached
            .residency
            .capacity()
            .checked_mul(PAGE_SIZE)
            .filter(|&b| b < usize::MAX - PAGE_SIZE)
    }

    /// Bytes of device memory in use, stale pages included.
    #[must_use]
    pub fn resident_bytes(&self) -> usize {
        self.attached.residency.resident() * PAGE_SIZE
    }

    /// Maps a region: reserves its window and asks the device for a table. The same region gives the same mapping.
    ///
    /// # Errors
    /// No address space, descriptors or memory for the window, or what [`Device::map`] says.
    pub fn map(&self, region: RegionRef<'_>) -> Result<MappedRef<D>> {
        let _signals = AsyncSignalsBlocked::new();
        let attached = &self.attached;
        let _control = attached
            .control
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let space = AddressSpace::get("map")?;
        if !core::ptr::eq(space, attached.space) || region.region.door().is_disowned() {
            return Err(Error::new("map", ErrorKind::Forked).at(region.addr()));
        }
        if attached.is_detached() {
            return Err(
                DeviceFault::new(region.addr(), Access::Read, DeviceFaultKind::Closed).into(),
            );
        }
        if let Some(known) =
            attached.with_mapped(|list| list.iter().find(|m| m.region.id() == region.id()).cloned())
        {
            return Ok(MappedRef(known));
        }
        let region = region.region;
        let no_memory = |errno| {
            Error::new("map", ErrorKind::OutOfMemory)
                .at(region.addr())
                .errno(errno)
        };
        let window = Window::new(region, attached.id)?;
        let info = MapInfo {
            host_base: region.base(),
            window_base: window.base(),
            nr_pages: region.nr_blocks() * PAGES_PER_BLOCK,
            first_page: (region.addr() - region.base()) / PAGE_SIZE,
            end_page: (region.end() - region.base()).div_ceil(PAGE_SIZE),
            in_place: region.kind() == RegionKind::InPlace,
        };
        let mapped = MapArc::new(Mapped {
            attached: attached.clone(),
            region: region.clone(),
            table: attached.device.map(&info)?,
            window,
            counters: Counters::default(),
            touched: MapArray::zeroed(region.nr_blocks().max(1))
                .map_err(|e| no_memory(e.raw_os_error().unwrap_or(libc::ENOMEM)))?,
            edges: crate::edge::Edges::new(),
            bounce: match attached.device.memory() {
                DeviceMemory::Window => None,
                DeviceMemory::Opaque => {
                    let buffer = MapArray::zeroed(BLOCK_SIZE);
                    Some(Mutex::new(buffer.map_err(|e| {
                        no_memory(e.raw_os_error().unwrap_or(libc::ENOMEM))
                    })?))
                }
            },
        })
        .map_err(no_memory)?;
        let gate = space.gate();
        let erased: MapArc<dyn AnyMapped> = mapped.clone().erase(|p| p);
        space.publish_window(region, mapped.window(), attached.id)?;
        let known = attached.mapped.update(gate, |list| {
            MapSlice::collect(list.iter().cloned().chain([mapped.clone()]))
        });
        let told = known.and_then(|()| {
            region.devices_cell().update(gate, |table| {
                let mut table = table.clone();
                table[attached.id.index()] = Some(erased.clone());
                Ok(table)
            })
        });
        // A mirror that is being closed has looked at its devices already, or is about to.
        let closing = region.is_closing();
        if told.is_err() || closing {
            // Undone in reverse: no page has gone there yet.
            retry_no_memory(|| {
                region.devices_cell().update(gate, |table| {
                    let mut table = table.clone();
                    table[attached.id.index()] = None;
                    Ok(table)
                })
            });
            mapped.unmap();
            space.unpublish_window(mapped.window());
            let closed =
                || DeviceFault::new(region.addr(), Access::Read, DeviceFaultKind::Closed).into();
            return Err(told.map_or_else(no_memory, |()| closed()));
        }
        Ok(MappedRef(mapped))
    }

    /// A range for one worker thread, preallocated: faulting with it allocates nothing.
    ///
    /// # Errors
    /// No address space for its scratch area.
    pub fn range(&self) -> Result<crate::Range<D>> {
        crate::Range::new(self.attached.clone())
    }

    /// Brings home every page the device holds, and empties its memory. Waits for accesses in flight.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if a page could not be brought home.
    pub fn release(&self) -> Result<()> {
        if self.is_forked() {
            return Err(Error::new("release", ErrorKind::Forked));
        }
        let _signals = AsyncSignalsBlocked::new();
        let mut scratch = Scratch::new(self.attached.space)?;
        for mapped in self.attached.mapped_list() {
            evict::release_region(&*mapped, &mapped.region, &mut scratch, Cause::Explicit)?;
        }
        Ok(())
    }

    /// Brings home what the device holds of `pages` (indices from the region's base), and empties its memory there: the
    /// counterpart of [`Update::migrate`](crate::Update::migrate). Waits for accesses in flight. Pages that it does not hold are
    /// home already, as far as this device goes.
    ///
    /// # Errors
    /// As [`map`](Self::map), and [`ErrorKind::Lost`] if a page could not be brought home.
    pub fn bring_home(&self, region: RegionRef<'_>, pages: Range<usize>) -> Result<()> {
        let mapped = self.map(region)?;
        let _signals = AsyncSignalsBlocked::new();
        let mut scratch = Scratch::new(self.attached.space)?;
        let end = pages.end.min(region.region.nr_blocks() * PAGES_PER_BLOCK);
        let mut at = pages.start;
        while at < end {
            let origin = at / PAGES_PER_BLOCK * PAGES_PER_BLOCK;
            let part = at..end.min(origin + PAGES_PER_BLOCK);
            let mask = PageMask::range(part.start - origin..part.end - origin);
            evict::release_pages(
                &*mapped.0,
                region.region,
                origin / PAGES_PER_BLOCK,
                mask,
                &mut scratch,
                Cause::Explicit,
            )?;
            at = part.end;
        }
        Ok(())
    }

    /// Has the next `count` allocations of device memory fail, as under pressure that eviction cannot relieve: a fault that
    /// wanted many pages is then served page by page, and a page that still gets none is served in place.
    pub fn fail_next_allocations(&self, count: usize) {
        self.attached
            .residency
            .failures
            .store(count, Ordering::Relaxed);
    }

    pub(crate) fn id(&self) -> DeviceId {
        self.attached.id
    }

    /// Totals of what this device did, over all its regions, those that are gone included.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let _signals = AsyncSignalsBlocked::new();
        let mut stats = self.attached.retired.snapshot();
        for mapped in self.attached.mapped_list() {
            stats += mapped.counters.snapshot();
        }
        stats
    }
}

impl<D: Device> Attached<D> {
    /// Whether the device is going. Inside the gate.
    pub(crate) fn is_detached(&self) -> bool {
        self.detached.load(Ordering::SeqCst)
    }

    fn with_mapped<R>(&self, f: impl FnOnce(&MapSlice<MapArc<Mapped<D>>>) -> R) -> R {
        let gate = self.space.gate().enter();
        f(self.mapped.load(&gate))
    }

    /// The mapped regions now; for control paths, since it allocates.
    fn mapped_list(&self) -> Vec<MapArc<Mapped<D>>> {
        // Counted first and cloned into room that is already there: nothing allocates inside the gate.
        loop {
            let mut list = Vec::with_capacity(self.with_mapped(|l| l.len()));
            let fits = self.with_mapped(|l| {
                let fits = l.len() <= list.capacity();
                if fits {
                    list.extend(l.iter().cloned());
                }
                fits
            });
            if fits {
                return list;
            }
        }
    }

    /// The mapped region at `index` (modulo how many there are), and how many there are. Allocates nothing.
    pub(crate) fn mapped_at(&self, index: usize) -> Option<(MapArc<Mapped<D>>, usize)> {
        self.with_mapped(|l| (!l.is_empty()).then(|| (l[index % l.len()].clone(), l.len())))
    }
}

/// Makes a table smaller, which needs a page for the new one: it will come, and a dead entry must not stay.
pub(crate) fn retry_no_memory(mut update: impl FnMut() -> Result<(), i32>) {
    while update().is_err() {
        std::thread::yield_now();
    }
}

impl<D: Device> Drop for Attachment<D> {
    fn drop(&mut self) {
        let _signals = AsyncSignalsBlocked::new();
        let space = self.attached.space;
        if !space.is_usable() {
            return;
        }
        // SeqCst, and the grace period: rounds that have not seen it are over, and what they moved is released next.
        self.attached.detached.store(true, Ordering::SeqCst);
        let gate = space.gate();
        gate.synchronize();
        if self.release().is_err() {
            // Contents are stuck in a window: the device stays known, so that a touch faults instead of reading zeros.
            return;
        }
        for mapped in self.attached.mapped_list() {
            space.unpublish_window(mapped.window());
            retry_no_memory(|| {
                mapped.region.devices_cell().update(gate, |table| {
                    let mut table = table.clone();
                    table[self.attached.id.index()] = None;
                    Ok(table)
                })
            });
            mapped.region.counters().absorb(&mapped.counters.snapshot());
        }
        retry_no_memory(|| self.attached.mapped.update(gate, |_| Ok(MapSlice::empty())));
        space.release_device(self.attached.id);
    }
}

impl<D: Device> fmt::Debug for Attachment<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment")
            .field("device", &self.attached.id)
            .field("resident_bytes", &self.resident_bytes())
            .field("memory_bytes", &self.memory_bytes())
            .finish_non_exhaustive()
    }
}

/// An atomic bitmap with one bit per page, in memory that the fault path may read: what a [`Device::Table`] is made of.
pub struct PageBits {
    words: MapArray<core::sync::atomic::AtomicU64>,
}

impl PageBits {
    /// `nr_pages` bits, all clear.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(nr_pages: usize) -> Result<Self> {
        let words = MapArray::zeroed(nr_pages.div_ceil(64).max(8)).map_err(|e| {
            Error::new("page bits", ErrorKind::OutOfMemory)
                .errno(e.raw_os_error().unwrap_or(libc::ENOMEM))
        })?;
        Ok(Self { words })
    }

    /// The words, 64 pages each, least significant bit first.
    #[must_use]
    pub fn words(&self) -> &[core::sync::atomic::AtomicU64] {
        &self.words
    }

    /// Whether `page` is set.
    #[must_use]
    pub fn contains(&self, page: usize, order: Ordering) -> bool {
        self.words[page / 64].load(order) >> (page % 64) & 1 == 1
    }

    /// Sets the pages of `mask` in `block`. Under the device lock: a load and a store per word, not a read-modify-write.
    pub fn insert(&self, block: usize, mask: &PageMask) {
        self.change(block, mask, |old, bits| old | bits);
    }

    /// Clears the pages of `mask` in `block`. Under the device lock.
    pub fn remove(&self, block: usize, mask: &PageMask) {
        self.change(block, mask, |old, bits| old & !bits);
    }

    fn change(&self, block: usize, mask: &PageMask, f: impl Fn(u64, u64) -> u64) {
        let first = block * (PAGES_PER_BLOCK / 64);
        for (word, &bits) in self.words[first..].iter().zip(mask.words()) {
            if bits != 0 {
                // The writers exclude each other by the device lock. Release: pairs with readers that load with Acquire,
                // so that who sees a translation also sees the page it leads to.
                word.store(f(word.load(Ordering::Relaxed), bits), Ordering::Release);
            }
        }
    }
}

impl fmt::Debug for PageBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set: u32 = self
            .words
            .iter()
            .map(|w| w.load(Ordering::Relaxed).count_ones())
            .sum();
        f.debug_struct("PageBits")
            .field("nr_pages", &(self.words.len() * 64))
            .field("set", &set)
            .finish()
    }
}

const _: () = assert!(MAX_DEVICES <= 8 && BLOCK_SIZE == PAGES_PER_BLOCK * PAGE_SIZE);
