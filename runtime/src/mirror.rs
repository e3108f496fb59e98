//! Mirroring: [`mirror`], [`mirror_ref`], [`mirror_raw`], and what they give back.
//!
//! # Why this is sound
//! 1. A [`Mirror`] holds the address and a `PhantomData` of the borrow, never the `&mut [T]` itself: moving a reference
//!    into a function would claim that nobody else writes meanwhile, and a device may. The pointer is taken from the borrow
//!    once.
//! 2. CPU reads need `&self`, CPU writes `&mut self`, and so do views: `view()` borrows from `&`, `view_mut()` from `&mut`.
//!    A launch lives no longer than its views. So a program in which the CPU and a kernel race for plain data does not
//!    compile; [`Mirror::share`] is the explicit opt-in, and gives relaxed atomics only.
//! 3. `T: Pod`: a device may leave any bits.
//! 4. A page that is away is not unmapped memory: touching it faults and brings it home. So a leaked mirror stays correct
//!    memory for loads and stores.

use core::fmt;
use core::marker::PhantomData;
use core::ops::{Bound, ControlFlow, Deref, DerefMut, Range, RangeBounds};
use core::ptr::NonNull;

use bytemuck::Pod;

use crate::addr::{PAGE_SIZE, PageRange};
use crate::block::DeviceSet;
use crate::door::Role;
use crate::error::{Error, ErrorKind, Result};
use crate::fork;
use crate::mask::PageMask;
use crate::options::Options;
use crate::overrun;
use crate::pin::{self, Pin};
use crate::region::{Region, RegionKind};
use crate::release::{self, Stale};
use crate::scratch::Scratch;
use crate::share::Shared;
use crate::space::{AddressSpace, Inside, Orphaned, Place, PlaceKind};
use crate::stats::{Cause, Stats};
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::arc::MapArc;
use crate::sys::mmap::{self, Advice};
use crate::sys::signal::AsyncSignalsBlocked;
use crate::view::{View, ViewMut};

/// Mirrors a slice with the default [`Options`]: from here on devices can work on it, at the same addresses.
///
/// ```
/// # if !svm::Capabilities::probe().is_usable() { return Ok(()) }
/// let mut data = vec![1u64; 100_000];
/// let mut mirror = svm::mirror(&mut data)?;
/// mirror.as_mut_slice()[7] = 42;
/// mirror.close()?;
/// assert_eq!(data[7], 42);
/// # Ok::<(), svm::Error>(())
/// ```
///
/// # Which memory moves
/// Whole pages. The bytes at either end that share a page with something else stay where they are: a launch works on a copy of them, and
/// brings that back when it ends. So a slice in which no whole page lies never moves; an empty one is as good as any other.
///
/// | memory | what devices do with it |
/// |---|---|
/// | private anonymous: the heap, `mmap`, zeroed statics; 4 KiB pages, transparent huge pages, the huge zero page | pages migrate and are duplicated |
/// | the same, read-only (`mprotect`) | duplicated; the kernel would not move the CPU's page, which stays, write-protected |
/// | the same, `PROT_NONE` | faults with [`NoAccess`](crate::DeviceFaultKind::NoAccess) |
/// | holes in a mirrored range | faults with [`Unmapped`](crate::DeviceFaultKind::Unmapped), also when something is mapped there later |
/// | the same, locked in memory (`mlock`) | in place page by page: the kernel refuses to move each that a device asks for, which then stays in place for as long as the mirror lives; locked while it is away, it comes home by a copy |
/// | reserved huge pages (hugetlb), private or shared | in place |
/// | shared anonymous memory, memfd, shared file mappings | in place |
/// | private file mappings, initialised statics, a private memfd | in place: userfaultfd cannot register them, or would not move their pages |
/// | the stack that the calling thread runs on | in place: a thread whose own stack is away may not be able to fault it in |
/// | what another userfaultfd has registered | in place |
/// | what is mirrored already, in whole or in part; a null pointer, a range that wraps | refused: [`Overlap`](ErrorKind::Overlap), [`Invalid`](ErrorKind::Invalid) |
///
/// *In place* means that devices access it at the host's address: it is one memory, nothing moves and nothing is counted as
/// device memory. [`Mirror::is_in_place`] tells of ranges that are so as a whole, and [`snapshot`](crate::snapshot()) which pages
/// devices hold. A range that holds several kinds is in place as a whole, but for locked pages among others. Protection is looked up at
/// every device fault; `mprotect` tells nobody, so translations that exist last until the next launch begins.
///
/// # Errors
/// No userfaultfd here (the text says what would help), memory that overlaps another mirror, no room for bookkeeping, or a word in the
/// environment's `SVM_DISABLE` that is none (see [`Capabilities`](crate::Capabilities)).
// Each row of the table has a test in `tests/memory_kinds.rs`.
pub fn mirror<T: Pod>(slice: &mut [T]) -> Result<Mirror<'_, T>> {
    mirror_with(slice, &Options::default())
}

/// Mirrors a slice.
///
/// # Errors
/// As [`mirror`].
pub fn mirror_with<'a, T: Pod>(slice: &'a mut [T], options: &Options) -> Result<Mirror<'a, T>> {
    const { assert_alignment::<T>() };
    let ptr = NonNull::from(&mut *slice).cast::<T>();
    let raw = Raw::new(
        "mirror",
        ptr.as_ptr().expose_provenance(),
        size_of_val(slice),
        options,
    )?;
    Ok(Mirror {
        raw,
        ptr,
        len: slice.len(),
        _borrow: PhantomData,
    })
}

/// Mirrors an input: devices get copies of it, and it is never moved, protected or registered, since nobody can write it.
///
/// # Errors
/// As [`mirror`].
pub fn mirror_ref<T: Pod>(slice: &[T]) -> Result<MirrorRef<'_, T>> {
    mirror_ref_with(slice, &Options::default())
}

/// [`mirror_ref`] with options.
///
/// # Errors
/// As [`mirror`].
pub fn mirror_ref_with<'a, T: Pod>(slice: &'a [T], options: &Options) -> Result<MirrorRef<'a, T>> {
    const { assert_alignment::<T>() };
    let addr = slice.as_ptr().expose_provenance();
    let raw = Raw::input(addr, size_of_val(slice), options)?;
    Ok(MirrorRef { raw, slice })
}

/// Devices keep an element's address modulo a page, and no more.
const fn assert_alignment<T>() {
    assert!(
        align_of::<T>() <= PAGE_SIZE,
        "mirrored elements are aligned to a page at most"
    );
}

/// Mirrors memory that is no slice: of an `mmap`, or of another language.
///
/// # Errors
/// As [`mirror`], and for a null pointer or a range that wraps.
///
/// # Safety
/// The memory is readable and writable for as long as the mirror lives, unless it is unmapped, moved or protected by system
/// calls, which devices then observe as faults. Whoever else accesses it while kernels write it does so by atomics, or
/// synchronises with their launches. The same holds for the slices that the mirror gives out, and
/// [`into_inner`](Mirror::into_inner)'s, whose `'static` is then a promise of the caller's.
pub unsafe fn mirror_raw(
    ptr: *mut u8,
    len_bytes: usize,
    options: &Options,
) -> Result<Mirror<'static, u8>> {
    let Some(start) = NonNull::new(ptr) else {
        return Err(Error::invalid("mirror", "the pointer is null"));
    };
    let addr = ptr.expose_provenance();
    if addr.checked_add(len_bytes).is_none() {
        return Err(Error::invalid("mirror", "the range wraps around the address space").at(addr));
    }
    let raw = Raw::new("mirror", addr, len_bytes, options)?;
    Ok(Mirror {
        raw,
        ptr: start,
        len: len_bytes,
        _borrow: PhantomData,
    })
}

/// Mirrors pages that a [`Buffer`](crate::Buffer) owns, as `len` elements.
pub(crate) fn mirror_raw_typed<T: Pod>(
    start: NonNull<u8>,
    len_bytes: usize,
    len: usize,
    options: &Options,
) -> Result<Mirror<'static, T>> {
    let raw = Raw::new(
        "buffer",
        start.as_ptr().expose_provenance(),
        len_bytes,
        options,
    )?;
    Ok(Mirror {
        raw,
        ptr: start.cast(),
        len,
        _borrow: PhantomData,
    })
}

/// A region and the duty to close it.
#[derive(Debug)]
pub(crate) struct Raw {
    region: MapArc<Region>,
    /// Whether the region ends with this handle, or belongs to a mirror that this one looks through.
    owner: bool,
    open: bool,
}

impl Raw {
    fn new(
        operation: &'static str,
        addr: usize,
        len_bytes: usize,
        options: &Options,
    ) -> Result<Self> {
        let _signals = AsyncSignalsBlocked::new();
        let space = AddressSpace::get(operation)?;
        let door = space.door(operation, options.delivery, options.transparent_syscalls)?;
        let kind = kind_of(space, addr, len_bytes);
        let region = Region::new(addr, len_bytes, kind, true, door, options)?;
        let open = |region| Self {
            region,
            owner: true,
            open: true,
        };
        let in_place = |region: MapArc<Region>| {
            space.admit(&region, || space.publish_in_place(&region))?;
            Ok(open(region))
        };
        if kind == RegionKind::InPlace {
            return in_place(region);
        }
        let Some(body) = region.body() else {
            space.admit(&region, || Ok(()))?;
            return Ok(open(region));
        };
        space.settle();
        // Until the look behind the registration: no call of ours unmaps beside it what it would not find published.
        let alone = space.is_hard_of_hearing().then(|| space.vacating());
        let mapped = mapped_runs(space, body);
        leave_out_holes(space, &region, body, &mapped);
        space.admit(&region, || space.publish_region(&region, &mapped))?;
        let withdraw = || {
            space.unpublish_region(&region);
            space.dismiss(&region);
            // An event may have come meanwhile, which refers to it still.
            region.wait_landed();
        };
        let registered = door.register(body, Role::Body);
        let same = registered.is_err() || mapped_runs(space, body) == mapped;
        if registered.is_ok() && same {
            fork::keep_from_children(space, &region, body);
        }
        drop(alone);
        match registered {
            // Unmapped, or mapped, by another thread between the look and the registration, of which no event tells: look again.
            Ok(()) if !same => {
                door.unregister(body);
                withdraw();
                Self::new(operation, addr, len_bytes, options)
            }
            Ok(()) => Ok(open(region)),
            Err(errno) => {
                withdraw();
                match errno {
                    // Another userfaultfd has it, or it is of a kind that cannot be registered: it stays where it is.
                    libc::EBUSY | libc::EINVAL | libc::EPERM => {
                        let kind = RegionKind::InPlace;
                        in_place(Region::new(addr, len_bytes, kind, true, door, options)?)
                    }
                    libc::ENOMEM => Err(Error::new(operation, ErrorKind::OutOfMemory)
                        .at(addr)
                        .errno(errno)),
                    _ => Err(Error::new(operation, ErrorKind::System)
                        .at(addr)
                        .errno(errno)),
                }
            }
        }
    }

    fn input(addr: usize, len_bytes: usize, options: &Options) -> Result<Self> {
        let _signals = AsyncSignalsBlocked::new();
        let space = AddressSpace::get("mirror_ref")?;
        if let Some(region) = space.region_containing(addr, len_bytes) {
            return Ok(Self {
                region,
                owner: false,
                open: true,
            });
        }
        // Of part of a mirror: its pages may be away, where a copy does not reach them, or waits for the thread that waits for it.
        if space.is_published(&(addr..addr + len_bytes)) {
            space.drain_events();
            if space.is_published(&(addr..addr + len_bytes)) {
                return Err(Error::new("mirror_ref", ErrorKind::Overlap).at(addr));
            }
        }
        let door = space.door("mirror_ref", options.delivery, options.transparent_syscalls)?;
        let region = Region::new(addr, len_bytes, RegionKind::Input, false, door, options)?;
        Ok(Self {
            region,
            owner: true,
            open: true,
        })
    }

    pub(crate) fn region(&self) -> &MapArc<Region> {
        &self.region
    }

    fn stats(&self) -> Stats {
        let _signals = AsyncSignalsBlocked::new();
        if let Some(orphaned) = Orphaned::behind(self.region.door()) {
            return self.region.stats(&orphaned);
        }
        self.region.stats(&AddressSpace::global().gate().enter())
    }

    /// Brings everything home and ends the region. Numbered as the teardown in ARCHITECTURE.md.
    fn close(&mut self) -> Result<()> {
        if !core::mem::replace(&mut self.open, false) || !self.owner {
            return Ok(());
        }
        let _signals = AsyncSignalsBlocked::new();
        let region = &self.region;
        if region.door().is_disowned() {
            // A forked child: its memory is plain, and every page was home when it was made.
            return Ok(());
        }
        let space = AddressSpace::global();
        // 1. No new update begins, whoever waits to begin one is told, and rounds under way are over.
        region.hub().release();
        region.set_closing();
        if !mutated(Mutation::CloseWithoutGrace) {
            space.gate().synchronize();
        }
        point!(CloseReleased, region.addr());
        // 2. Every page home, every window empty.
        let mut scratch = Scratch::new(space)?;
        let devices = {
            let gate = space.gate().enter();
            region.devices(&gate).clone()
        };
        let mut result = Ok(());
        for device in devices.iter().flatten() {
            // All of it, whatever each comes to.
            let withdrawn = release::withdraw_in_place(&**device, region);
            let (cause, stale) = (Cause::Drop, Stale::GoWithWindow);
            let released = release::release_region(&**device, region, &mut scratch, cause, stale);
            result = result.and(withdrawn).and(released);
        }
        if result.is_ok() && region.has_away() {
            // A device that is no longer there still holds pages: never let the kernel show zeros in their place.
            result = Err(Error::new("close", ErrorKind::Lost).at(region.addr()));
        }
        if result.is_err() {
            // Contents are stuck in a window: the uffd and the window stay, so that a touch faults instead of reading zeros.
            core::mem::forget(region.clone());
            return result;
        }
        // 3. The kernel has the faults again; 4. nobody finds the region; 5. nobody refers to it any more.
        if let (RegionKind::Managed, Some(body)) = (region.kind(), region.body()) {
            // What has grown is looked up by the mappings, which are to be those that we know.
            let has_grown = tails(space, &space.gate().enter(), region).next().is_some();
            if has_grown {
                space.settle();
            }
            {
                // What a fork gives to children and takes from them again must not be taken from memory that is ours no more.
                let _bracket = space.fork_bracket();
                region.set_shielded(false);
                unregister_what_is_left(region, body);
                space.unpublish_region(region);
            }
            region.wait_landed();
        } else if region.kind() == RegionKind::InPlace {
            space.unpublish_in_place(region);
            region.wait_landed();
        }
        space.dismiss(region);
        // 6. The windows go, but for one that a span is still open on: that stays, empty, until its device is detached.
        let mut kept = [const { None }; crate::block::MAX_DEVICES];
        for device in devices.iter().flatten() {
            if overrun::is_outstayed(space, region, DeviceSet::one(device.id())) {
                kept[device.id().index()] = Some(device.clone());
                continue;
            }
            space.unpublish_window(device.window());
            device.unmap();
        }
        if devices.iter().any(Option::is_some) {
            crate::attachment::retry_no_memory(|| {
                region
                    .devices_cell()
                    .update(space.gate(), |_| Ok(kept.clone()))
            });
        }
        result
    }
}

/// The parts of `body` where something is mapped, in order.
fn mapped_runs(space: &AddressSpace, body: PageRange) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    // A walk that fails has seen a part; the rest is left out.
    let _ = space.maps().walk(body, |vma| {
        if let Some(part) = vma.range.intersect(body) {
            let before = runs.pop_if(|run| run.end() == part.start());
            let start = before.map_or(part.start(), PageRange::start);
            runs.extend(PageRange::new(start, part.end()));
        }
        ControlFlow::Continue(())
    });
    runs
}

/// Where nothing is mapped there is nothing to mirror: what is mapped there later is not registered, and must not be moved.
fn leave_out_holes(space: &AddressSpace, region: &Region, body: PageRange, mapped: &[PageRange]) {
    let ends = mapped.iter().map(|run| run.end());
    let starts = mapped.iter().map(|run| run.start());
    for (start, end) in core::iter::once(body.start())
        .chain(ends)
        .zip(starts.chain([body.end()]))
    {
        let Some(hole) = PageRange::new(start, end) else {
            continue;
        };
        for part in hole.blocks() {
            let (block, first) = region.locate(part.start());
            let _gate = space.gate().enter();
            region
                .lock_block(block)
                .left(PageMask::range(first..first + part.nr_pages()));
        }
    }
}

/// Makes pages ordinary memory again.
fn restore(region: &Region, pages: PageRange) {
    region.door().unregister(pages);
    let _ = mmap::advise(pages, Advice::DoFork);
}

/// What belongs to the region and is not its body, nor has ever been.
fn tails<'g>(
    space: &'g AddressSpace,
    gate: &'g impl Inside,
    region: &'g Region,
) -> impl Iterator<Item = PageRange> {
    let is_its = |place: &&Place| {
        !matches!(place.kind, PlaceKind::Window(_)) && place.region.id() == region.id()
    };
    space
        .places(gate)
        .iter()
        .filter(is_its)
        .filter_map(|place| {
            let grown = space.with_grown(gate, place.range, region);
            let start = match place.kind {
                PlaceKind::Tail => grown.start(),
                _ => place.range.end(),
            };
            PageRange::new(start, grown.end())
        })
}

/// Unregisters the body but for the parts that left it: at their addresses there may be somebody else's memory by now. Inside the gate:
/// what is unmapped meanwhile stays vacant until that is heard of.
fn unregister_what_is_left(region: &Region, body: PageRange) {
    let space = AddressSpace::global();
    let gate = space.gate().enter();
    tails(space, &gate, region).for_each(|tail| restore(region, tail));
    let gone = |block: usize| region.lock_block(block).gone();
    if (0..region.nr_blocks()).all(|block| gone(block).is_empty()) {
        restore(region, body);
        return;
    }
    drop(gate);
    for block in 0..region.nr_blocks() {
        let _gate = space.gate().enter();
        let (left, displaced) = {
            let state = region.lock_block(block);
            (region.body_mask(block) - state.gone(), state.displaced())
        };
        for page in displaced.runs().flatten() {
            if let Some(page) = PageRange::from_pages(region.host_addr_of(block, page), 1) {
                restore(region, page);
            }
        }
        for run in left.runs() {
            if let Some(pages) = PageRange::from_pages(region.addr_of(block, run.start), run.len())
            {
                restore(region, pages);
            }
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // What could not be brought home stays reachable through the window; `close` reports it.
        let _ = self.close();
    }
}

/// What kind of region the memory makes.
fn kind_of(space: &AddressSpace, addr: usize, len_bytes: usize) -> RegionKind {
    let Some(pages) = PageRange::containing(addr, len_bytes) else {
        return RegionKind::InPlace;
    };
    let marker = 0u8;
    let stack = (&raw const marker).addr();
    let mut movable = true;
    let walked = space.maps().walk(pages, |vma| {
        // A thread whose own stack page is away may not even be able to run its handler (hazards S3).
        movable &= vma.kind.is_anonymous() && !vma.shared && !vma.range.contains_addr(stack);
        if movable {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    if movable && walked.is_ok() {
        RegionKind::Managed
    } else {
        RegionKind::InPlace
    }
}

/// A mirrored slice: the borrow of it, for as long as devices may use it.
///
/// Dropping it brings every page home. `mem::forget` leaves correct memory: pages come home when they are touched.
pub struct Mirror<'a, T: Pod> {
    raw: Raw,
    ptr: NonNull<T>,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Mirror` is an `&mut [T]` in every respect but its validity for the optimiser; the runtime's own state behind
// it is `Sync`.
unsafe impl<T: Pod + Send> Send for Mirror<'_, T> {}
// SAFETY: `&Mirror` gives `&[T]` and read views, as `&&mut [T]` gives `&[T]`.
unsafe impl<T: Pod + Sync> Sync for Mirror<'_, T> {}

impl<'a, T: Pod> Mirror<'a, T> {
    /// The elements, for reading on the CPU.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `ptr` and `len` are those of the borrowed slice, which is initialised. No kernel writes it meanwhile:
        // write views borrow from `&mut self`.
        unsafe { core::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }

    /// The elements, for writing on the CPU.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and `&mut self` excludes every view.
        unsafe { core::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }

    /// Lends the elements to kernels that read them.
    #[must_use]
    pub fn view(&self) -> View<'_, T> {
        View::new(self.raw.region(), self.ptr.as_ptr().addr(), self.len)
    }

    /// Lends the elements to kernels that read and write them.
    #[must_use]
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut::new(self.raw.region(), self.ptr.as_ptr().addr(), self.len)
    }

    /// Opens the elements to both sides at once, by relaxed atomic accesses only.
    #[must_use]
    pub fn share(&mut self) -> Shared<'_, T> {
        Shared::new(self.raw.region(), self.ptr, self.len)
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the memory is of a [kind that cannot move](mirror#which-memory-moves) (a file mapping, a stack, somebody else's
    /// userfaultfd): devices then access it where it is. Not so of a slice in which no whole page lies: that does not move either, but
    /// launches work on copies.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.raw.region().kind() == RegionKind::InPlace
    }

    /// Says that devices mostly read (true): they get duplicates at once. Or takes that back. Changes time, never results.
    pub fn advise_read_mostly(&self, yes: bool) {
        self.raw.region().set_read_mostly(yes);
    }

    /// Brings the pages of `elements` home and keeps them there while the guard lives, so that system calls can read them.
    ///
    /// ```
    /// # use std::io::Write;
    /// # if !svm::Capabilities::probe().is_usable() { return Ok(()) }
    /// # let mut data = vec![1u8; 100_000];
    /// let mirror = svm::mirror(&mut data)?;
    /// let pin = mirror.pin(..1000)?;
    /// std::io::sink().write_all(&mirror.as_slice()[..1000]).expect("a sink takes everything");
    /// drop(pin);
    /// # Ok::<(), svm::Error>(())
    /// ```
    ///
    /// # Errors
    /// The range is out of bounds, or a page could not be brought home.
    pub fn pin(&self, elements: impl RangeBounds<usize>) -> Result<Pin<'_>> {
        let bounds = self.bounds(&elements)?;
        pin::pin(
            self.raw.region(),
            self.ptr.as_ptr().addr(),
            size_of::<T>(),
            bounds,
        )
    }

    /// [`pin`](Self::pin) for system calls that write: the guard is the elements.
    ///
    /// ```
    /// # use std::io::Read;
    /// # if !svm::Capabilities::probe().is_usable() { return Ok(()) }
    /// # let mut data = vec![1u8; 100_000];
    /// let mut mirror = svm::mirror(&mut data)?;
    /// std::io::repeat(7).read_exact(&mut mirror.pin_mut(..1000)?).expect("there is no end of sevens");
    /// assert_eq!(mirror.as_slice()[999..1001], [7, 1]);
    /// # Ok::<(), svm::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`pin`](Self::pin).
    pub fn pin_mut(&mut self, elements: impl RangeBounds<usize>) -> Result<PinMut<'_, T>> {
        let bounds = self.bounds(&elements)?;
        // SAFETY: within the mirror, by the check above.
        let start = unsafe { self.ptr.add(bounds.start) };
        let slice = NonNull::slice_from_raw_parts(start, bounds.len());
        Ok(PinMut {
            _pin: self.pin(bounds)?,
            slice,
            _borrow: PhantomData,
        })
    }

    fn bounds(&self, elements: &impl RangeBounds<usize>) -> Result<Range<usize>> {
        let start = match elements.start_bound() {
            Bound::Included(&n) => n,
            Bound::Excluded(&n) => n.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match elements.end_bound() {
            Bound::Included(&n) => n.saturating_add(1),
            Bound::Excluded(&n) => n,
            Bound::Unbounded => self.len,
        };
        if start > end || end > self.len {
            let addr = self.ptr.as_ptr().addr();
            let len = self.len;
            let why =
                format!("elements {start}..{end} are not a range of the {len} that are mirrored");
            return Err(Error::invalid("pin", why).at(addr));
        }
        Ok(start..end)
    }

    /// What was done with this memory so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.raw.stats()
    }

    /// Brings every page home and ends the mirror, as dropping does, and says whether that worked.
    ///
    /// # Errors
    /// A page could not be brought home; it stays reachable, by faults.
    pub fn close(mut self) -> Result<()> {
        self.raw.close()
    }

    /// [`close`](Self::close), and the slice back.
    ///
    /// # Errors
    /// As [`close`](Self::close).
    pub fn into_inner(mut self) -> Result<&'a mut [T]> {
        self.raw.close()?;
        // SAFETY: `ptr` and `len` are those of the `&'a mut [T]` that made the mirror, which ends here.
        Ok(unsafe { core::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) })
    }
}

impl<T: Pod> Drop for Mirror<'_, T> {
    // What there is to do `Raw` does. But that knows of no lifetime, and a type that drops nothing itself is done with its borrow at its
    // last use: the memory could be freed, or mirrored anew, while this one lives on to the end of its scope.
    fn drop(&mut self) {}
}

impl<T: Pod> fmt::Debug for Mirror<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror")
            .field("region", self.raw.region())
            .field("len", &self.len)
            .finish()
    }
}

/// Elements that are home and stay home while it lives. Made by [`Mirror::pin_mut`].
pub struct PinMut<'a, T: Pod> {
    _pin: Pin<'a>,
    slice: NonNull<[T]>,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it is an exclusive borrow of the elements, and a pin, which any thread may end.
unsafe impl<T: Pod + Send> Send for PinMut<'_, T> {}
// SAFETY: `&PinMut` gives `&[T]` and nothing more.
unsafe impl<T: Pod + Sync> Sync for PinMut<'_, T> {}

impl<T: Pod> Deref for PinMut<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: elements of the mirror, which is borrowed exclusively for as long, so no kernel can run on it.
        unsafe { self.slice.as_ref() }
    }
}

impl<T: Pod> DerefMut for PinMut<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`.
        unsafe { self.slice.as_mut() }
    }
}

impl<T: Pod> fmt::Debug for PinMut<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinMut")
            .field("len", &self.slice.len())
            .finish_non_exhaustive()
    }
}

/// A mirrored input. Devices get copies of it: nothing of it moves, so system calls need no pin.
///
/// Of a slice that lies in a [`Mirror`] or [`Buffer`](crate::Buffer), it is a view through that mirror, whose pages move, and which has the
/// pins.
pub struct MirrorRef<'a, T: Pod> {
    raw: Raw,
    slice: &'a [T],
}

impl<T: Pod> MirrorRef<'_, T> {
    /// The elements.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        self.slice
    }

    /// Lends the elements to kernels.
    #[must_use]
    pub fn view(&self) -> View<'_, T> {
        View::new(
            self.raw.region(),
            self.slice.as_ptr().addr(),
            self.slice.len(),
        )
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slice.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slice.is_empty()
    }

    /// What was done with this memory so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.raw.stats()
    }

    /// Ends the mirror, as dropping does, and says whether that worked.
    ///
    /// # Errors
    /// A window could not be emptied.
    pub fn close(mut self) -> Result<()> {
        self.raw.close()
    }
}

impl<T: Pod> Drop for MirrorRef<'_, T> {
    // For the borrow's sake, as a `Mirror`'s.
    fn drop(&mut self) {}
}

impl<T: Pod> fmt::Debug for MirrorRef<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MirrorRef")
            .field("region", self.raw.region())
            .field("len", &self.slice.len())
            .finish()
    }
}
