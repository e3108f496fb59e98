//! How a device attaches: its slot, its memory and the regions it has mapped.

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use core::time::Duration;

use crate::addr::PAGE_SIZE;
use crate::block::DeviceId;
use crate::device::Device;
use crate::error::{Access, DeviceFault, DeviceFaultKind, Error, ErrorKind, Result};
use crate::mapped::{AnyMapped, Mapped, MappedRef, RegionRef};
use crate::release::{self, Stale};
use crate::scratch::Scratch;
use crate::space::{AddressSpace, Gated};
use crate::stats::{Cause, Counters, Stats};
use crate::sync::Mutex;
use crate::sys::arc::{MapArc, MapSlice};
use crate::sys::signal::AsyncSignalsBlocked;

/// How much memory a device has, and the like.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AttachOptions {
    /// Bytes of device memory; `None` is without limit. Rounded down to pages.
    pub memory_bytes: Option<usize>,
    /// How long the others wait for a span that is open on a page they need, before it is taken from under it
    /// ([`Device::overrun`]).
    pub span_deadline: Duration,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self {
            memory_bytes: None,
            span_deadline: Duration::from_secs(2),
        }
    }
}

impl AttachOptions {
    /// No limit on device memory; two seconds for a span.
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

    /// Sets how long the others wait for a span.
    #[must_use]
    pub fn span_deadline(mut self, deadline: Duration) -> Self {
        self.span_deadline = deadline;
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
    #[inline]
    pub(crate) fn take_failure(&self) -> bool {
        self.failures.load(Ordering::Relaxed) != 0
            && self
                .failures
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                .is_ok()
    }

    /// Counts `pages` in if they fit.
    #[inline]
    pub(crate) fn reserve(&self, pages: usize) -> bool {
        self.resident
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                (n.checked_add(pages)? <= self.capacity).then_some(n + pages)
            })
            .is_ok()
    }

    /// Counts `pages` out.
    #[inline]
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
    pub(crate) span_deadline_ns: u64,
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

/// An attached device. Dropping it brings every page home and detaches.
pub struct Attachment<D: Device> {
    attached: MapArc<Attached<D>>,
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
        span_deadline_ns: u64::try_from(options.span_deadline.as_nanos()).unwrap_or(u64::MAX),
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
        self.attached.is_forked()
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
        let attached = &self.attached;
        // Before any lock: its holder may have stayed in the parent.
        if self.is_forked() || region.region.door().is_disowned() {
            return Err(Error::new("map", ErrorKind::Forked).at(region.addr()));
        }
        let space = attached.space;
        let _signals = AsyncSignalsBlocked::new();
        let _control = attached
            .control
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if attached.is_detached() {
            return Err(
                DeviceFault::new(region.addr(), Access::Read, DeviceFaultKind::Closed).into(),
            );
        }
        if let Some(known) = attached.with_mapped(|list| {
            list.iter()
                .find(|m| m.shared_region().id() == region.id())
                .cloned()
        }) {
            return Ok(MappedRef(known));
        }
        let region = region.region;
        let no_memory = |errno| {
            Error::new("map", ErrorKind::OutOfMemory)
                .at(region.addr())
                .errno(errno)
        };
        let mapped = MapArc::new(Mapped::new(attached, region)?).map_err(no_memory)?;
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

    /// A range for one worker thread. It lies in mappings of its own, and so does what faults add to it: nothing of it comes from
    /// `malloc`, whose memory may be mirrored.
    ///
    /// # Errors
    /// No memory for it, or a forked child.
    pub fn range(&self) -> Result<crate::Range<D>> {
        if self.is_forked() {
            return Err(Error::new("range", ErrorKind::Forked));
        }
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
        self.release_all(Stale::Kept)
    }

    fn release_all(&self, stale: Stale) -> Result<()> {
        let mut scratch = Scratch::new(self.attached.space)?;
        let mapped = self.attached.mapped_list();
        let mut release = |mapped: &MapArc<Mapped<D>>| {
            let (region, cause) = (mapped.shared_region(), Cause::Explicit);
            release::release_region(&**mapped, region, &mut scratch, cause, stale)
        };
        mapped.iter().map(&mut release).fold(Ok(()), Result::and)
    }

    /// Brings home what the device holds of `pages` (indices from the region's base), and empties its memory there: the
    /// counterpart of [`Update::migrate`](crate::Update::migrate). Waits for accesses in flight. Pages that it does not hold are
    /// home already, as far as this device goes. A page that cannot be brought home keeps no other from it.
    ///
    /// # Errors
    /// As [`map`](Self::map), and [`ErrorKind::Lost`] if a page could not be brought home.
    pub fn bring_home(&self, region: RegionRef<'_>, pages: Range<usize>) -> Result<()> {
        let mapped = self.map(region)?;
        let _signals = AsyncSignalsBlocked::new();
        let mut scratch = Scratch::new(self.attached.space)?;
        let (cause, stale) = (Cause::Explicit, Stale::Kept);
        release::release_range(&*mapped.0, region.region, pages, &mut scratch, cause, stale)
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

    /// Totals of what this device did, over all its regions, those that are gone included. In a forked child: before the fork.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let _signals = AsyncSignalsBlocked::new();
        let mut stats = self.attached.retired.snapshot();
        for mapped in self.attached.mapped_list() {
            stats += mapped.counters().snapshot();
        }
        stats
    }
}

impl<D: Device> Attached<D> {
    /// Whether the device is going. Inside the gate.
    #[inline]
    pub(crate) fn is_detached(&self) -> bool {
        self.detached.load(Ordering::SeqCst)
    }

    /// A mapped region is going: what happened there is kept, and it is known no more.
    pub(crate) fn forget(&self, mapped: &Mapped<D>) {
        self.retired.absorb(&mapped.counters().snapshot());
        let id = mapped.shared_region().id();
        let others = |list: &MapSlice<MapArc<Mapped<D>>>| {
            let others = list.iter().filter(|m| m.shared_region().id() != id);
            MapSlice::collect(others.cloned())
        };
        retry_no_memory(|| self.mapped.update(self.space.gate(), others));
    }

    fn with_mapped<R>(&self, f: impl FnOnce(&MapSlice<MapArc<Mapped<D>>>) -> R) -> R {
        if let Some(orphaned) = self.space.orphaned() {
            return f(self.mapped.load(&orphaned));
        }
        let gate = self.space.gate().enter();
        f(self.mapped.load(&gate))
    }

    /// Whether this is a forked child, and the device was attached in the parent.
    #[inline]
    pub(crate) fn is_forked(&self) -> bool {
        !self.space.is_usable()
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
        if self.is_forked() {
            return;
        }
        // SeqCst, and the grace period: rounds that have not seen it are over, and what they moved is released next.
        self.attached.detached.store(true, Ordering::SeqCst);
        let gate = space.gate();
        gate.synchronize();
        let mapped = self.attached.mapped_list();
        let withdraw = |mapped: &MapArc<Mapped<D>>| {
            release::withdraw_in_place(&**mapped, mapped.shared_region())
        };
        let withdrawn = mapped.iter().map(withdraw).fold(Ok(()), Result::and);
        if withdrawn
            .and(self.release_all(Stale::GoWithWindow))
            .is_err()
        {
            // Contents are stuck in a window: the device stays known, so that a touch faults instead of reading zeros.
            return;
        }
        for mapped in self.attached.mapped_list() {
            space.unpublish_window(mapped.window());
            retry_no_memory(|| {
                mapped.shared_region().devices_cell().update(gate, |table| {
                    let mut table = table.clone();
                    table[self.attached.id.index()] = None;
                    Ok(table)
                })
            });
            mapped
                .shared_region()
                .counters()
                .absorb(&mapped.counters().snapshot());
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
