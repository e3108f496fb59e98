//! [`munmap`], [`mremap`], [`madvise`] and [`mprotect`] with true brackets.
//!
//! A bare system call on mirrored memory is heard of by an event, and events give half of a bracket each (see the module
//! `events`); of `mprotect` there is none. These functions make the same calls and are both halves. Between the first
//! and the last step no device can establish a translation to what changes:
//!
//! 1. Find the regions that the range meets; open a bracket of each one's hub over the pages concerned: all of them, or none.
//! 2. Take the translations from every device, in place or not; then wait until no access through one is in flight.
//! 3. Make the system call. It may wait for the reader of a userfaultfd, which needs the gate and never a bracket; so nothing
//!    is held here but brackets and the turn, and whoever waits for those waits outside the gate.
//! 4. The call has returned, so its events are read; and they were read with the gate closed, which opens when they are
//!    applied. Once through the gate is enough.
//! 5. Wait until nothing of the range is pending: the pages that a `madvise` discarded are gone when it has returned, which
//!    the reader sees as soon as it looks; ring it up.
//! 6. Close the brackets.
//!
//! Calls that vacate addresses are made in turn, one at a time, on memory that is mirrored. The kernel tells of a change some time after
//! it has made it, and what is vacant it gives to the next who asks: an unmapping of which is read after the event of a mapping that was
//! moved there since looks as if it were of that. (With bare calls this can happen; see the module `events`.) Where the kernel does not
//! tell of everything, mirrors are registered in turn with them, and so are calls on memory that is not mirrored yet.
//!
//! # Without events
//!
//! A kernel, or a test, may lack the events; and where there is no `UFFDIO_MOVE` removal events are not asked for. Then step 3
//! does what the reader would have done:
//!
//! | change | before the call | after it |
//! |---|---|---|
//! | discarding | the pages are pending: their faults wait | every copy is stale, the pages are zero-fill; no longer pending |
//! | unmapping, moving | every page comes home, and is pending | what is no longer mapped there has left its region |
//!
//! The last is done on every kernel without `UFFDIO_MOVE`: there a round takes a page by copying it and discarding what is at its
//! address, which is another's memory if the page was unmapped in between (hazards M1).
//!
//! The kernel moves a mapping without its registration where it does not tell of it: at the new address it is memory like any
//! other. A discarding call is made piece by piece, so that it is known what a call that fails half-way has discarded.

use core::ops::Range;
use core::sync::atomic::Ordering;

use crate::addr::{PAGE_SIZE, PageRange};
use crate::block::{BlockState, DeviceSet};
use crate::device::{Invalidation, Keep};
use crate::error::{Error, ErrorKind, Result};
use crate::events::{self, PendingList, blocks};
use crate::fault::{self, Flight};
use crate::mask::PageMask;
use crate::notifier::{Bracket, Full, Interval};
use crate::overrun;
use crate::release::{self, Stale};
use crate::scratch::Scratch;
use crate::space::{AddressSpace, PlaceKind};
use crate::stats::Cause;
use crate::sys::event::Event;
use crate::sys::mmap::{self, Advice};
use crate::sys::signal::AsyncSignalsBlocked;
use crate::sys::{calls, clock, process};

// Linux's numbers; `libc` has them on Linux alone.
const PROT_READ: i32 = 1;
const PROT_WRITE: i32 = 2;
const MREMAP_FIXED: i32 = 2;
const MREMAP_DONTUNMAP: i32 = 4;
const MADV_DONTNEED: i32 = 4;
const MADV_FREE: i32 = 8;
const MADV_REMOVE: i32 = 9;
const MADV_DONTNEED_LOCKED: i32 = 24;
const MADV_GUARD_INSTALL: i32 = 102;

/// How long a call waits for its range to cease to be pending. It does within moments; where other threads discard the same
/// range without end it may not.
const PENDING_NS: u64 = 1_000_000_000;

/// `munmap(2)`, for memory that may be mirrored.
///
/// On memory that is not mirrored it is the system call and nothing else; where the kernel does not tell of unmapping it takes its turn
/// with other such calls. What is mirrored leaves its mirror: when the function returns no device has a translation to it, and a device
/// that touches it faults with [`Unmapped`](crate::DeviceFaultKind::Unmapped), also when something else is mapped there later. The rest
/// of the mirror lives on.
///
/// ```
/// # #[cfg(target_os = "linux")] {
/// # if !svm::Capabilities::probe().is_usable() { return Ok(()) }
/// # let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
/// // SAFETY: a fresh mapping.
/// let at = unsafe { libc::mmap(std::ptr::null_mut(), 8 * 4096, prot, flags, -1, 0) }.cast::<u8>();
/// // SAFETY: it is readable and writable, and what is unmapped below is not used again.
/// let mirror = unsafe { svm::mirror_raw(at, 8 * 4096, &svm::Options::new()) }?;
/// // SAFETY: nobody uses the second half any more.
/// unsafe { svm::munmap(at.add(4 * 4096), 4 * 4096) }?;
/// mirror.close()?; // the first half
/// # }
/// # Ok::<(), svm::Error>(())
/// ```
///
/// # Errors
/// The system call's, with its number in [`os_error`](Error::os_error): [`Invalid`](ErrorKind::Invalid) for `EINVAL`,
/// [`OutOfMemory`](ErrorKind::OutOfMemory) where unmapping a middle needs one mapping more than the process may have.
///
/// # Safety
/// As the system call: nobody refers to the memory any more, but by a mirror made with [`mirror_raw`](crate::mirror_raw). It is not
/// called from a signal handler. A kernel that calls it on pages of which it has a span open waits for itself until the
/// deadline for stuck spans.
pub unsafe fn munmap(ptr: *mut u8, len_bytes: usize) -> Result<()> {
    let addr = ptr.expose_provenance();
    let range = pages(addr, len_bytes);
    let change = Change::begin_in_turn([range], |_| true);
    let home = change.hold_home()?;
    // SAFETY: by the caller's contract.
    let outcome = unsafe { calls::munmap(addr, len_bytes) };
    change.let_go(home, |_| match outcome {
        Ok(()) => Fate::gone(range),
        Err(_) => Fate::Unknown,
    });
    change.end();
    outcome.map_err(|e| refused("munmap", addr, &e))
}

/// `mremap(2)`, for memory that may be mirrored. `new_addr` is used where `flags` say so (`MREMAP_FIXED`, or with
/// `MREMAP_DONTUNMAP`); gives the address of the mapping.
///
/// Memory that is not mirrored it treats as [`munmap`] does. A mirrored mapping that moves takes its contents along: pages that a
/// device had come home at the new address. But it is out of the devices' reach there, until it is mirrored anew: a device that touches
/// the old addresses faults. What `MREMAP_FIXED` replaces, or what is cut off, is unmapped as by [`munmap`]. With `MREMAP_DONTUNMAP`
/// the old range stays, as zeros.
///
/// ```
/// # #[cfg(target_os = "linux")] {
/// # if !svm::Capabilities::probe().is_usable() { return Ok(()) }
/// # let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
/// // SAFETY: a fresh mapping.
/// let at = unsafe { libc::mmap(std::ptr::null_mut(), 8 * 4096, prot, flags, -1, 0) }.cast::<u8>();
/// // SAFETY: it is readable and writable.
/// let mirror = unsafe { svm::mirror_raw(at, 8 * 4096, &svm::Options::new()) }?;
/// // SAFETY: in the mapping.
/// unsafe { at.write(7) };
/// // SAFETY: nobody uses the old address any more.
/// let now = unsafe { svm::mremap(at, 8 * 4096, 16 * 4096, libc::MREMAP_MAYMOVE, std::ptr::null_mut()) }?;
/// // SAFETY: in the mapping, where it is now.
/// assert_eq!(unsafe { now.read() }, 7);
/// mirror.close()?;
/// # }
/// # Ok::<(), svm::Error>(())
/// ```
///
/// # Errors
/// The system call's, as [`munmap`]; [`Unmapped`](ErrorKind::Unmapped) for `EFAULT`. (Beside a fork, where one mapping may be two for a
/// moment, the call is made again for up to a second, if it has unmapped nothing.)
///
/// # Safety
/// As [`munmap`], for the old range and for what the mapping replaces.
pub unsafe fn mremap(
    ptr: *mut u8,
    old_len_bytes: usize,
    new_len_bytes: usize,
    flags: i32,
    new_addr: *mut u8,
) -> Result<*mut u8> {
    const TRIES: u32 = 20;
    const PAUSE_NS: u64 = 200_000;
    /// How long forks under way are waited for.
    const PATIENCE_NS: u64 = 1_000_000_000;
    let (addr, target) = (ptr.expose_provenance(), new_addr.expose_provenance());
    let call = RemapCall {
        addr,
        old_len_bytes,
        new_len_bytes,
        flags,
        target,
    };
    let (mut tries, deadline) = (0, clock::monotonic_ns() + PATIENCE_NS);
    let is_early = |tries| {
        let forks = AddressSpace::forking().load(Ordering::SeqCst) != 0;
        tries < TRIES || forks && clock::monotonic_ns() < deadline
    };
    loop {
        // SAFETY: by the caller's contract.
        let (outcome, may_repeat) = unsafe { call.make() }?;
        match outcome {
            Ok(now) => return Ok(core::ptr::with_exposed_provenance_mut(now)),
            // While a thread forks, memory that is one mapping may be two for a moment, which the system does not move.
            Err(e) if may_repeat && e.raw_os_error() == Some(libc::EFAULT) && is_early(tries) => {
                tries += 1;
                clock::sleep_until(clock::monotonic_ns() + PAUSE_NS);
            }
            Err(e) => return Err(refused("mremap", addr, &e)),
        }
    }
}

/// The arguments of an `mremap`.
struct RemapCall {
    addr: usize,
    old_len_bytes: usize,
    new_len_bytes: usize,
    flags: i32,
    target: usize,
}

impl RemapCall {
    /// Makes it once: what the system says, and, if it refuses, whether the call may be repeated: something was mirrored there, and nothing
    /// has been unmapped. (Before Linux 6.17 that comes first, and then the look whether all is one mapping; what was vacated may be
    /// somebody else's by the time of another call.)
    ///
    /// # Safety
    /// As [`mremap`].
    unsafe fn make(&self) -> Result<(std::io::Result<usize>, bool)> {
        let Self {
            addr,
            old_len_bytes,
            new_len_bytes,
            flags,
            target,
        } = *self;
        let (old, new) = (pages(addr, old_len_bytes), pages(addr, new_len_bytes));
        // All of the old range: whether it moves nobody knows before the call.
        let replaced = pages(target, new_len_bytes).filter(|_| flags & MREMAP_FIXED != 0);
        // One that overlaps the other the kernel refuses, and nothing happens to either.
        let replaced = replaced.filter(|there| old.is_none_or(|old| !old.overlaps(*there)));
        let change = Change::begin_in_turn([old, replaced], |_| true);
        let home = change.hold_home()?;
        let was_held = home.as_ref().is_some_and(|home| !home.heard);
        let space = AddressSpace::existing().filter(|_| !change.parts.is_empty());
        let cut_off = old
            .zip(new)
            .and_then(|(old, new)| PageRange::new(new.end(), old.end()));
        let mapped = || {
            let vacated = [replaced, cut_off];
            vacated.map(|range| Some(space?.vma(range?.start())?.range))
        };
        let before = mapped();
        // SAFETY: by the caller's contract.
        let outcome = unsafe { calls::mremap(addr, old_len_bytes, new_len_bytes, flags, target) };
        change.let_go(home, |part| match outcome {
            Err(_) => Fate::Unknown,
            _ if replaced.is_some_and(|replaced| replaced.overlaps(part)) => Fate::gone(replaced),
            Ok(now) if now != addr && flags & MREMAP_DONTUNMAP != 0 => Fate::Emptied,
            Ok(now) if now != addr => Fate::gone(old),
            // Cut off, if anything.
            Ok(_) => match (old, new) {
                (Some(old), Some(new)) => Fate::gone(PageRange::new(new.end(), old.end())),
                _ => Fate::Unchanged,
            },
        });
        if let Ok(now) = outcome
            && let Some(there) = pages(now, new_len_bytes).filter(|_| was_held && now != addr)
        {
            // No memory of ours any more, so nobody would have children inherit it.
            let _ = mmap::advise(there, Advice::DoFork);
        }
        let may_repeat = outcome.is_err() && space.is_some() && mapped() == before;
        change.end();
        Ok((outcome, may_repeat))
    }
}

/// `madvise(2)`, for memory that may be mirrored. `advice` is the system's number.
///
/// Memory that is not mirrored it treats as [`munmap`] does. Advice that discards (`MADV_DONTNEED`, `MADV_DONTNEED_LOCKED`, `MADV_FREE`,
/// `MADV_REMOVE`) discards what devices hold as well: when the function returns neither the CPU nor a device finds anything of the old
/// contents, but zeros. `MADV_FREE` on mirrored memory, which permits the kernel to discard
/// at any time from then on, does so at once. `MADV_GUARD_INSTALL` discards in the same way; devices are not to touch guards.
/// Other advice changes no contents, and reaches the kernel as it is.
///
/// **Where the kernel has no `UFFDIO_MOVE` this is the only way to discard mirrored memory**: a bare `madvise` is not heard of there,
/// and a device goes on with what it has.
///
/// ```
/// # #[cfg(target_os = "linux")] {
/// # if !svm::Capabilities::probe().is_usable() { return Ok(()) }
/// let mut buffer = svm::Buffer::<u64>::zeroed(4096)?;
/// buffer.as_mut_slice().fill(7);
/// let at = buffer.as_mut_slice().as_mut_ptr().cast::<u8>();
/// // SAFETY: the buffer is exclusively ours, and zeros are numbers.
/// unsafe { svm::madvise(at, 2 * 4096, libc::MADV_DONTNEED) }?;
/// assert_eq!(buffer.as_slice()[0], 0);
/// assert_eq!(buffer.as_slice()[2 * 512], 7);
/// # }
/// # Ok::<(), svm::Error>(())
/// ```
///
/// # Errors
/// The system call's, as [`munmap`]; [`Unmapped`](ErrorKind::Unmapped) for `ENOMEM`: part of the range is not mapped, and the rest
/// was done.
///
/// # Safety
/// As the system call: nobody counts on the contents that go. The rest as for [`munmap`].
pub unsafe fn madvise(ptr: *mut u8, len_bytes: usize, advice: i32) -> Result<()> {
    let addr = ptr.expose_provenance();
    let discards = matches!(
        advice,
        MADV_DONTNEED | MADV_DONTNEED_LOCKED | MADV_FREE | MADV_REMOVE | MADV_GUARD_INSTALL
    );
    let range = pages(addr, len_bytes).filter(|_| discards);
    // Of guards no event tells, whatever was asked for.
    let unheard = |part: &Part| {
        part.published.is_some()
            && (advice == MADV_GUARD_INSTALL || !part.flight.region().door().hears_of_removal())
    };
    let change = Change::begin_in_turn([range], unheard);
    let outcome = match range {
        // SAFETY: by the caller's contract.
        Some(range) if change.parts.iter().any(unheard) => unsafe {
            change.discard_piecewise(range, advice, unheard)
        },
        // SAFETY: by the caller's contract.
        _ => unsafe { calls::madvise(addr, len_bytes, advice) },
    };
    if advice == MADV_FREE && outcome.is_ok() {
        for part in change.parts.iter().filter_map(|part| part.published) {
            // SAFETY: the caller has just given its contents up. Where it fails the kernel discards when it likes.
            let _ = unsafe { calls::madvise(part.start(), part.len_bytes(), MADV_DONTNEED) };
        }
    }
    change.wait_while_pending();
    change.end();
    outcome.map_err(|e| refused("madvise", addr, &e))
}

/// `mprotect(2)`, for memory that may be mirrored. `prot` is the system's number.
///
/// On memory that is not mirrored it is the system call and nothing else. Of mirrored memory the devices' translations that the
/// protection no longer permits are gone when the function returns, so that a device's next access looks at the protection:
/// any access to a `PROT_NONE` page faults with [`NoAccess`](crate::DeviceFaultKind::NoAccess), a write to a read-only one with
/// [`Protection`](crate::DeviceFaultKind::Protection). (A bare `mprotect` tells nobody: there it is looked at when a page faults in, and
/// when a launch begins.) The contents stay where they are, and a page that comes home comes home protected.
///
/// ```
/// # #[cfg(target_os = "linux")] {
/// # if !svm::Capabilities::probe().is_usable() { return Ok(()) }
/// let mut buffer = svm::Buffer::<u64>::zeroed(4096)?;
/// buffer.as_mut_slice().fill(7);
/// let at = buffer.as_mut_slice().as_mut_ptr().cast::<u8>();
/// // SAFETY: nobody writes it until it is writable again.
/// unsafe { svm::mprotect(at, 4096, libc::PROT_READ) }?;
/// assert_eq!(buffer.as_slice()[0], 7);
/// // SAFETY: this permits more.
/// unsafe { svm::mprotect(at, 4096, libc::PROT_READ | libc::PROT_WRITE) }?;
/// # }
/// # Ok::<(), svm::Error>(())
/// ```
///
/// # Errors
/// The system call's, as [`munmap`]; [`Unmapped`](ErrorKind::Unmapped) for `ENOMEM` where part of the range is not mapped,
/// [`Protection`](ErrorKind::Protection) for `EACCES`.
///
/// # Safety
/// As the system call: nobody makes an access that is no longer permitted, but devices that work on a mirror made with
/// [`mirror_raw`](crate::mirror_raw). The rest as for [`munmap`].
pub unsafe fn mprotect(ptr: *mut u8, len_bytes: usize, prot: i32) -> Result<()> {
    let addr = ptr.expose_provenance();
    let keep = match (prot & PROT_READ != 0, prot & PROT_WRITE != 0) {
        (true, true) => None,
        (true, false) => Some(Keep::Reads),
        (false, _) => Some(Keep::Nothing),
    };
    let change = Change::begin([pages(addr, len_bytes)], keep);
    // SAFETY: by the caller's contract.
    let outcome = unsafe { calls::mprotect(addr, len_bytes, prot) };
    change.end();
    outcome.map_err(|e| refused("mprotect", addr, &e))
}

/// The pages of a range as the system calls take it: the start is theirs to refuse, the length is rounded up.
fn pages(addr: usize, len_bytes: usize) -> Option<PageRange> {
    let len_bytes = len_bytes.checked_next_multiple_of(PAGE_SIZE)?;
    PageRange::new(addr, addr.checked_add(len_bytes)?)
}

/// A change of mappings while it is made: the brackets of all that is mirrored there.
struct Change {
    /// None where nothing was ever mirrored, or what was is the parent's.
    space: Option<&'static AddressSpace>,
    parts: Vec<Part>,
    /// One of each region that a part is of.
    brackets: Vec<Bracket<Flight>>,
    /// Held by those that are made one at a time: see [`begin_in_turn`](Self::begin_in_turn) for when it is taken.
    alone: Option<std::sync::MutexGuard<'static, ()>>,
    _signals: Option<AsyncSignalsBlocked>,
}

/// Pages of one region that a change is about.
struct Part {
    flight: Flight,
    /// Where they are published; none of a region that is accessed where it is.
    published: Option<PageRange>,
    /// Published elsewhere than at the region's own addresses.
    moved: bool,
    /// Their indices from the region's base.
    pages: Range<usize>,
}

/// What has become of a part that was held home.
enum Fate {
    /// What of this range is in the part was unmapped.
    Gone(PageRange),
    /// Its pages went elsewhere, and zeros are in their place.
    Emptied,
    /// Nothing has happened to it.
    Unchanged,
    /// The call has failed, and may have unmapped something before it did.
    Unknown,
}

impl Fate {
    fn gone(range: Option<PageRange>) -> Self {
        range.map_or(Self::Unchanged, Self::Gone)
    }
}

/// What is held home: of a kernel that does not tell of unmapping; or where pages are taken by a copy, and then discarded at an address
/// that may be another's by then.
struct HeldHome<'a> {
    /// The reader records what becomes of it.
    heard: bool,
    parts: Vec<&'a Part>,
    /// The pages that were made pending, of one block each.
    marked: Vec<(&'a Part, usize, PageMask)>,
    /// For what is to be applied after the call, when there is no way back any more.
    pending: PendingList,
}

impl HeldHome<'_> {
    /// Nothing of it is pending any more.
    fn unmark(&self, space: &AddressSpace) {
        for &(part, block, pages) in &self.marked {
            let _gate = space.gate().enter();
            let mut state = part.flight.region().lock_block(block);
            state.set_pending(pages, false);
        }
    }
}

impl Change {
    /// Steps 1 and 2 for the ranges; what `keep` says may stay with the devices, all of it if it says nothing.
    fn begin<const N: usize>(ranges: [Option<PageRange>; N], keep: Option<Keep>) -> Self {
        let mut change = Self::new();
        change.find_all(ranges);
        change.start(keep);
        change
    }

    /// Begins a change of which nothing may stay with the devices, and which is made in turn if a part of it `needs` that. What vacates
    /// addresses does: two of those could make a moved mapping look like the one that was there before it. So does what makes pages
    /// pending itself: two of those could each wait for pages that the other holds.
    ///
    /// Whose turn it is waits for no access: the code that makes it may be waiting for its own turn. And who waits for its turn has
    /// nothing that others wait for. So the accesses are waited for first, and the turn is taken only if it is free at that moment;
    /// otherwise all is let go of, and begun anew when it was.
    fn begin_in_turn<const N: usize>(
        ranges: [Option<PageRange>; N],
        needs: impl Fn(&Part) -> bool,
    ) -> Self {
        loop {
            let mut change = Self::new();
            // Where the kernel does not tell of all that these calls do, nobody mirrors anything until this is over, from before the
            // look: there the turn is taken first.
            if let Some(space) = change.space.filter(|space| space.is_hard_of_hearing()) {
                change.alone = Some(space.vacating());
            }
            change.find_all(ranges);
            change.start(Some(Keep::Nothing));
            let Some(space) = change.space else {
                return change;
            };
            if change.alone.is_some() || !change.parts.iter().any(&needs) {
                return change;
            }
            change.alone = space.try_vacating();
            if change.alone.is_some() {
                return change;
            }
            drop(change);
            drop(space.vacating());
        }
    }

    fn new() -> Self {
        let space = AddressSpace::existing().filter(|space| space.is_usable());
        Self {
            space,
            parts: Vec::new(),
            brackets: Vec::new(),
            alone: None,
            _signals: space.map(|_| AsyncSignalsBlocked::new()),
        }
    }

    fn find_all<const N: usize>(&mut self, ranges: [Option<PageRange>; N]) {
        let Some(space) = self.space else { return };
        for range in ranges.into_iter().flatten() {
            self.find(space, range);
        }
    }

    fn start(&mut self, keep: Option<Keep>) {
        let Some(space) = self.space else { return };
        self.open_brackets();
        if let Some(keep) = keep {
            self.tell(space, keep);
        }
    }

    /// The parts of the range.
    fn find(&mut self, space: &AddressSpace, range: PageRange) {
        let mut from = range.start();
        while let Some((part, end)) = next_published(space, range, from) {
            self.parts.push(part);
            from = end;
        }
        let mut after = 0;
        while let Some((part, id)) = next_in_place(space, range, after) {
            self.parts.push(part);
            after = id;
        }
    }

    /// Opens one bracket for each region, over all its parts and what is between them: a region in many pieces has more of them than
    /// its hub has slots. All or none: of two changes that each hold slots and wait for the other's neither would ever go on.
    fn open_brackets(&mut self) {
        let mut hulls: Vec<(&Flight, Range<usize>)> = Vec::new();
        for part in &self.parts {
            let (flight, pages) = (&part.flight, part.pages.clone());
            let id = flight.region().id();
            match hulls
                .iter_mut()
                .find(|(known, _)| known.region().id() == id)
            {
                Some((_, hull)) => *hull = hull.start.min(pages.start)..hull.end.max(pages.end),
                None => hulls.push((flight, pages)),
            }
        }
        let open = |(flight, pages): &(&Flight, Range<usize>)| {
            let region = flight.region();
            let at = |page: usize| (region.base() + page * PAGE_SIZE) as u64;
            let interval = Interval::new(at(pages.start), at(pages.end));
            Bracket::start(Flight::begin(region), interval, None)
        };
        self.brackets = loop {
            match hulls.iter().map(open).collect() {
                Ok(brackets) => break brackets,
                // Those that were open are closed again.
                Err(Full) => process::sched_yield(),
            }
        };
    }

    /// Takes the translations, and waits until no access through one is in flight.
    fn tell(&self, space: &AddressSpace, keep: Keep) {
        // All are told before any is waited for (I9).
        let mut in_flight = Vec::new();
        for part in &self.parts {
            let region = part.flight.region();
            for (block, mask) in blocks(part.pages.clone()) {
                let inv = Invalidation::new(block, mask, keep);
                let gate = space.gate().enter();
                let over = fault::invalidate(region, &gate, DeviceSet::all(), &inv);
                drop(gate);
                if !over {
                    in_flight.push((&part.flight, inv));
                }
            }
        }
        for (flight, inv) in &in_flight {
            // A span that outstays it is severed: its pages are the CPU's, and the change is made to those.
            let _ = overrun::shoot_down(space, flight.region(), DeviceSet::all(), inv);
        }
    }

    /// Steps 4 and 6.
    fn end(self) {
        if let Some(space) = self.space.filter(|_| !self.parts.is_empty()) {
            drop(space.gate().enter());
        }
    }

    /// Step 5, for pages that were discarded, and step 4, which precedes it.
    fn wait_while_pending(&self) {
        let Some(space) = self.space else { return };
        let deadline = clock::monotonic_ns() + PENDING_NS;
        for part in self.parts.iter().filter(|part| part.published.is_some()) {
            while part.is_pending(space) && clock::monotonic_ns() < deadline {
                part.flight.region().door().doorbell().ring();
                process::sched_yield();
            }
        }
    }

    /// Where the kernel does not tell of unmapping, or cannot move pages: brings home what the parts have with devices, and makes
    /// them pending, so that it stays.
    fn hold_home(&self) -> Result<Option<HeldHome<'_>>> {
        let unheard = |part: &&Part| {
            let door = part.flight.region().door();
            part.published.is_some() && !(door.hears_of_unmapping() && door.has_move())
        };
        let Some(space) = self
            .space
            .filter(|_| self.parts.iter().any(|p| unheard(&p)))
        else {
            return Ok(None);
        };
        let no_memory = |e: std::io::Error| {
            Error::new("hold home", ErrorKind::OutOfMemory)
                .errno(e.raw_os_error().unwrap_or(libc::ENOMEM))
        };
        let hears = |part: &Part| part.flight.region().door().hears_of_unmapping();
        let mut held = HeldHome {
            heard: self.parts.iter().filter(unheard).all(hears),
            parts: self.parts.iter().filter(unheard).collect(),
            marked: Vec::new(),
            pending: PendingList::new().map_err(no_memory)?,
        };
        let mut scratch = Scratch::new(space)?;
        for part in self.parts.iter().filter(unheard) {
            for (block, mask) in blocks(part.pages.clone()) {
                match part.hold_block_home(space, block, mask, &mut scratch) {
                    Ok(marked) => held.marked.push((part, block, marked)),
                    Err(error) => {
                        held.unmark(space);
                        return Err(error);
                    }
                }
            }
        }
        Ok(Some(held))
    }

    /// After the call: records what has become of each part that was held home.
    fn let_go(&self, home: Option<HeldHome<'_>>, fate: impl Fn(PageRange) -> Fate) {
        let (Some(space), Some(mut home)) = (self.space, home) else {
            return;
        };
        let pending = &mut home.pending;
        let unrecorded = home.parts.iter().filter(|_| !home.heard);
        for part in unrecorded {
            let Some(published) = part.published else {
                continue;
            };
            match fate(published) {
                Fate::Gone(gone) => part.unmapped(space, published.intersect(gone), pending),
                Fate::Emptied => part.for_each_block(space, |state, mask| state.discarded(mask)),
                Fate::Unchanged => {}
                Fate::Unknown => {
                    for page in published.pages().filter(|&page| space.vma(page).is_none()) {
                        part.unmapped(space, PageRange::from_pages(page, 1), pending);
                    }
                }
            }
        }
        home.unmark(space);
    }

    /// Step 3 for discarding advice of which the kernel does not tell: mapping by mapping, as the kernel goes itself, so that it is
    /// known how far it came.
    ///
    /// # Safety
    /// As [`madvise`].
    unsafe fn discard_piecewise(
        &self,
        range: PageRange,
        advice: i32,
        unheard: impl Fn(&Part) -> bool,
    ) -> std::io::Result<()> {
        let Some(space) = self.space else {
            return Ok(());
        };
        let mut hole = None;
        let mut advise = |start: usize, end: usize| {
            if start == end {
                return Ok(());
            }
            // SAFETY: by the caller's contract.
            match unsafe { calls::madvise(start, end - start, advice) } {
                // A part that is not mapped: the kernel goes on, and says so in the end.
                Err(e) if e.raw_os_error() == Some(libc::ENOMEM) => {
                    hole = Some(e);
                    Ok(())
                }
                outcome => outcome,
            }
        };
        let mut at = range.start();
        for part in self.parts.iter().filter(|part| unheard(part)) {
            let Some(published) = part.published else {
                continue;
            };
            advise(at, published.start())?;
            part.make_pending(space);
            let mut outcome = Ok(());
            at = published.start();
            while at < published.end() && outcome.is_ok() {
                let end = space.mapping_end(at).unwrap_or(at + PAGE_SIZE);
                let end = end.min(published.end());
                outcome = advise(at, end);
                if outcome.is_ok() {
                    part.for_each_block_of(space, PageRange::new(at, end), |state, mask| {
                        state.discarded(mask);
                    });
                }
                at = end;
            }
            part.for_each_block(space, |state, mask| state.set_pending(mask, false));
            outcome?;
        }
        advise(at, range.end())?;
        hole.map_or(Ok(()), Err)
    }
}

impl Part {
    fn new(
        flight: Flight,
        published: Option<PageRange>,
        moved: bool,
        start: usize,
        nr_pages: usize,
    ) -> Self {
        let region = flight.region();
        let first = (start - region.base()) / PAGE_SIZE;
        Self {
            flight,
            published,
            moved,
            pages: first..first + nr_pages,
        }
    }

    /// Calls `f` with the directory of each block, locked, and the part's pages in it.
    fn for_each_block(&self, space: &AddressSpace, f: impl FnMut(&mut BlockState, PageMask)) {
        self.for_each_block_of(space, self.published, f);
    }

    /// The same for those pages that are published in `range`, within the part.
    fn for_each_block_of(
        &self,
        space: &AddressSpace,
        range: Option<PageRange>,
        mut f: impl FnMut(&mut BlockState, PageMask),
    ) {
        let (Some(published), Some(range)) = (self.published, range) else {
            return;
        };
        let first = self.pages.start + (range.start() - published.start()) / PAGE_SIZE;
        for (block, mask) in blocks(first..first + range.nr_pages()) {
            let _gate = space.gate().enter();
            let mut state = self.flight.region().lock_block(block);
            let mask = self.concerned(&state, mask);
            f(&mut state, mask);
        }
    }

    /// Which of `pages` are where the part is published: some may have gone elsewhere since.
    fn concerned(&self, state: &BlockState, pages: PageMask) -> PageMask {
        if self.moved {
            pages & state.displaced()
        } else {
            pages - state.displaced()
        }
    }

    fn is_pending(&self, space: &AddressSpace) -> bool {
        let mut is_pending = false;
        self.for_each_block(space, |state, mask| {
            is_pending |= state.pending().intersects(&mask);
        });
        is_pending
    }

    /// Makes all pages pending, once they are not any more on an event's account.
    fn make_pending(&self, space: &AddressSpace) {
        for (block, mask) in blocks(self.pages.clone()) {
            while self
                .try_make_pending(space, block, mask, |_, _| true)
                .is_none()
            {
                process::sched_yield();
            }
        }
    }

    /// Makes pages of one block pending, unless some are already, or are not as `if_` wants them. Says which.
    fn try_make_pending(
        &self,
        space: &AddressSpace,
        block: usize,
        pages: PageMask,
        if_: impl FnOnce(&BlockState, PageMask) -> bool,
    ) -> Option<PageMask> {
        let _gate = space.gate().enter();
        let mut state = self.flight.region().lock_block(block);
        let mask = self.concerned(&state, pages);
        let now = !state.pending().intersects(&mask) && if_(&state, mask);
        now.then(|| {
            state.set_pending(mask, true);
            mask
        })
    }

    /// Brings the pages of one block home, and makes them pending as soon as all of them are. Says which.
    fn hold_block_home(
        &self,
        space: &AddressSpace,
        block: usize,
        pages: PageMask,
        scratch: &mut Scratch,
    ) -> Result<PageMask> {
        let region = self.flight.region();
        let devices = region.devices(&space.gate().enter()).clone();
        loop {
            for device in devices.iter().flatten() {
                let (cause, stale) = (Cause::Explicit, Stale::Kept);
                release::release_pages(&**device, region, block, pages, scratch, cause, stale)?;
            }
            let is_home = |state: &BlockState, mask: PageMask| {
                !(state.away() | state.held_by_devices(None)).intersects(&mask)
            };
            if let Some(marked) = self.try_make_pending(space, block, pages, is_home) {
                return Ok(marked);
            }
            process::sched_yield();
        }
    }

    /// What the reader does when it is told of an unmapping.
    fn unmapped(&self, space: &AddressSpace, range: Option<PageRange>, pending: &mut PendingList) {
        let Some(range) = range else { return };
        let closed = space.gate().close();
        events::apply(space, &closed, &Event::Unmap(range), pending);
        drop(closed);
        while !pending.is_empty() {
            pending.poll(space, false);
        }
    }
}

/// The first part of `range` at or after `from` where pages of a region are published, and where it ends.
fn next_published(space: &AddressSpace, range: PageRange, from: usize) -> Option<(Part, usize)> {
    let range = PageRange::new(from, range.end())?;
    let (flight, part, moved, start) = {
        let gate = space.gate().enter();
        let places = space.places(&gate);
        let next = places.partition_point(|place| place.range.end() <= range.start());
        places[next..]
            .iter()
            .take_while(|place| place.range.start() < range.end())
            .find_map(|place| {
                let moved = match place.kind {
                    PlaceKind::Body => false,
                    PlaceKind::Moved(_) => true,
                    // Nobody but the CPU has ever touched it.
                    PlaceKind::Tail | PlaceKind::Window(_) => return None,
                };
                let part = place.range.intersect(range)?;
                let start = place.original(part.start());
                Some((Flight::begin(&place.region), part, moved, start))
            })?
    };
    Some((
        Part::new(flight, Some(part), moved, start, part.nr_pages()),
        part.end(),
    ))
}

/// The region with the lowest number above `after` that is accessed where it is, in `range`.
fn next_in_place(space: &AddressSpace, range: PageRange, after: u64) -> Option<(Part, u64)> {
    let (flight, part, id) = {
        let gate = space.gate().enter();
        space
            .in_place(&gate)
            .iter()
            .filter(|region| region.id() > after)
            .filter_map(|region| {
                let pages = PageRange::containing(region.addr(), region.len_bytes())?;
                Some((region, pages.intersect(range)?))
            })
            .min_by_key(|(region, _)| region.id())
            .map(|(region, part)| (Flight::begin(region), part, region.id()))?
    };
    Some((
        Part::new(flight, None, false, part.start(), part.nr_pages()),
        id,
    ))
}

/// What the kernel's refusal means.
fn refused(operation: &'static str, addr: usize, error: &std::io::Error) -> Error {
    let Some(errno) = error.raw_os_error() else {
        return Error::new(operation, ErrorKind::Unsupported(error.to_string())).at(addr);
    };
    let kind = match (errno, operation) {
        (libc::EINVAL, _) => ErrorKind::Invalid(
            "the kernel refuses the range, the argument, or this for memory of this kind".into(),
        ),
        (libc::EFAULT, _) | (libc::ENOMEM, "madvise" | "mprotect") => ErrorKind::Unmapped,
        (libc::ENOMEM, _) => ErrorKind::OutOfMemory,
        (libc::EACCES, _) => ErrorKind::Protection,
        _ => ErrorKind::System,
    };
    Error::new(operation, kind).at(addr).errno(errno)
}
