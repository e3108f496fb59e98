//! A region as one device sees it: its window, its translations, its counters.

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicU8, Ordering};

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PAGES_PER_BLOCK};
use crate::attachment::{Attached, Residency};
use crate::block::DeviceId;
use crate::device::{Device, DeviceMemory, Invalidation, LateAccess, MapInfo, Overrun, WouldBlock};
use crate::error::{Error, ErrorKind, Result};
use crate::notifier::Listener;
use crate::region::{Region, RegionKind};
use crate::space::AddressSpace;
use crate::stats::Counters;
use crate::sync::{Mutex, MutexGuard};
use crate::sys::arc::MapArc;
use crate::sys::mmap::MapArray;
use crate::sys::signal::AsyncSignalsBlocked;
use crate::window::Window;

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
    /// Per block, for opaque memory: some window page may still hold what was handed over through it.
    leftovers: MapArray<AtomicU8>,
}

/// [`Mapped`] without the device's type: what the CPU's side needs of it.
pub(crate) trait AnyMapped: Listener<Invalidation> + Send + Sync {
    fn id(&self) -> DeviceId;
    fn window(&self) -> &Window;
    fn counters(&self) -> &Counters;
    fn residency(&self) -> &Residency;
    /// How long accesses in flight are waited for.
    fn span_deadline_ns(&self) -> u64;
    /// A thread touched a window page that is gone.
    fn overrun(&self, late: &LateAccess) -> Overrun;
    fn pause(&self);
    fn is_paused(&self) -> bool;
    fn resume(&self);
    /// A block's worth of plain memory between host and device, if the device's memory is opaque; one user at a time.
    fn bounce(&self) -> Option<MutexGuard<'_, MapArray<u8>>>;
    /// Whether the window of a block, which is locked, may still hold what was handed over through it, for the kernel would not empty
    /// it just then.
    fn has_leftovers(&self, block: usize) -> bool;
    /// Remembers whether it may.
    fn set_leftovers(&self, block: usize, are_there: bool);
    /// Copies `pages` (from the region's base) to opaque memory. `from` is readable and nobody writes there.
    fn copy_to_device(&self, pages: Range<usize>, from: usize);
    /// Copies `pages` from opaque memory into the bounce buffer.
    fn copy_to_bounce(&self, pages: Range<usize>, bounce: &mut MapArray<u8>);
    /// The region is going: forget it.
    fn unmap(&self);
}

impl<D: Device> Listener<Invalidation> for Mapped<D> {
    fn invalidate(&self, inv: &Invalidation) -> Result<(), WouldBlock> {
        self.attached.device.invalidate(&self.table, inv)?;
        crate::stats::count(&self.counters.invalidations, 1);
        Ok(())
    }

    fn quiesced(&self, inv: &Invalidation) -> bool {
        self.attached.device.quiesced(&self.table, inv)
    }

    fn cancel(&self, inv: &Invalidation) {
        self.attached.device.cancel(&self.table, inv);
    }
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

    fn span_deadline_ns(&self) -> u64 {
        self.attached.span_deadline_ns
    }

    fn overrun(&self, late: &LateAccess) -> Overrun {
        self.attached.device.overrun(&self.table, late)
    }

    fn bounce(&self) -> Option<MutexGuard<'_, MapArray<u8>>> {
        self.bounce.as_ref().map(Mutex::lock)
    }

    fn has_leftovers(&self, block: usize) -> bool {
        // Relaxed: ordered by the block's lock.
        self.leftovers[block].load(Ordering::Relaxed) != 0
    }

    fn set_leftovers(&self, block: usize, are_there: bool) {
        self.leftovers[block].store(u8::from(are_there), Ordering::Relaxed);
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
        self.attached.forget(self);
    }
}

impl<D: Device> Mapped<D> {
    /// Whether the device's memory is reached by its copy functions alone.
    #[inline]
    pub(crate) fn is_opaque(&self) -> bool {
        self.bounce.is_some()
    }

    /// Reserves the window and asks the device for its table.
    pub(crate) fn new(attached: &MapArc<Attached<D>>, region: &MapArc<Region>) -> Result<Self> {
        let no_memory = |error: std::io::Error| {
            Error::new("map", ErrorKind::OutOfMemory)
                .at(region.addr())
                .errno(error.raw_os_error().unwrap_or(libc::ENOMEM))
        };
        let window = Window::new(region, attached.id)?;
        let table = attached.device.map(&MapInfo {
            host_base: region.base(),
            window_base: window.base(),
            nr_pages: region.nr_blocks() * PAGES_PER_BLOCK,
            first_page: (region.addr() - region.base()) / PAGE_SIZE,
            end_page: (region.end() - region.base()).div_ceil(PAGE_SIZE),
            in_place: region.kind() == RegionKind::InPlace,
        })?;
        let bounce = match attached.device.memory() {
            DeviceMemory::Window => None,
            DeviceMemory::Opaque => {
                Some(Mutex::new(MapArray::zeroed(BLOCK_SIZE).map_err(no_memory)?))
            }
        };
        Ok(Self {
            attached: attached.clone(),
            region: region.clone(),
            window,
            table,
            counters: Counters::default(),
            touched: MapArray::zeroed(region.nr_blocks().max(1)).map_err(no_memory)?,
            edges: crate::edge::Edges::new(),
            leftovers: MapArray::zeroed(region.nr_blocks().max(1)).map_err(no_memory)?,
            bounce,
        })
    }

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
    /// unmapped before the call is seen. In a forked child no page of a region of the parent's can.
    #[must_use]
    pub fn is_movable(&self, addr: usize) -> bool {
        let region = self.region;
        let may_move = region.kind() == RegionKind::Managed && !region.door().is_disowned();
        let body = region
            .body()
            .filter(|body| may_move && body.contains_addr(addr));
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
