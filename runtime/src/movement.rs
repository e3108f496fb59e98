//! Moving pages: the only code that changes which memory holds what.
//!
//! A [`Mover`] works on one block whose lock is held. Each method acts on one *run* of pages with one system call where
//! the kernel allows, and records in the directory what became true directly after the call (D4 of [`crate::block`]). So
//! a method may stop half-way at any page: the directory is exact, and the caller's next try goes on from there.
//!
//! | method | from → to | call |
//! |---|---|---|
//! | [`take`](Mover::take) | CPU → window | `UFFDIO_MOVE`; holes are zero-filled in the window |
//! | [`duplicate`](Mover::duplicate) | CPU → window, both keep it | `UFFDIO_WRITEPROTECT`, then `UFFDIO_COPY`: for mappings that MOVE refuses, being read-only |
//! | [`bring_home`](Mover::bring_home) | window → CPU | `UFFDIO_MOVE` |
//! | [`share_home`](Mover::share_home) | window → CPU, both keep it | `UFFDIO_COPY` with `MODE_WP`: protected from its first instant |
//! | [`copy_between`](Mover::copy_between) | window → other window, both keep it | `UFFDIO_COPY` |
//! | [`move_between`](Mover::move_between) | window → other window | `UFFDIO_MOVE` |
//! | [`discard`](Mover::discard), [`drop_host`](Mover::drop_host) | window or CPU → scratch | `UFFDIO_MOVE` |
//! | [`unprotect`](Mover::unprotect) | CPU may write again | `UFFDIO_WRITEPROTECT` |
//!
//! Nothing here waits, brackets or invalidates: the callers ([`crate::fault`], [`crate::round`]) do, before and after.
//! Nothing is discarded by `madvise`, which would post an event to ourselves (hazards M4): stale pages MOVE to a scratch
//! area that its owner empties where no lock is held.
//!
//! # Opaque device memory
//! A device whose memory the CPU cannot reach copies instead: out, the pages are moved to the window as above, handed to
//! the device from there, and discarded; home, the device fills a bounce buffer, and `UFFDIO_COPY` makes pages of it. A frame is then
//! the device's own affair; its window page is empty.
//!
//! # Without `UFFDIO_MOVE` (Linux < 6.8, or `SVM_DISABLE=move`)
//! A page is taken by write-protecting it, copying it and discarding the CPU's copy: between the first and the last step
//! it cannot be written, so no write is lost. Discards are `MADV_DONTNEED`; this is legal under the block's lock only
//! because removal events are not asked for on such kernels (see [`crate::Capabilities`]).
//!
//! # Outcomes of the kernel (kernel-facts section 4)
//! On Linux 6.18 `UFFDIO_MOVE` can report EEXIST or ENOENT of a page that it *did* move. Every such answer is therefore
//! checked against both ends before anything is decided; see [`Mover::settle`].

use core::ops::Range;

use crate::addr::{PAGE_SIZE, PAGES_PER_BLOCK};
use crate::block::{BlockState, DeviceId};
use crate::error::Access;
use crate::mapped::AnyMapped;
use crate::mask::PageMask;
use crate::region::Region;
use crate::scratch::Scratch;
use crate::space::AddressSpace;
use crate::stats::count;
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::uffd::{Moved, Protect, Stop};

/// Why a movement stopped before its end. The directory is exact; nothing was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stall {
    /// An event waits to be read, or its caller has not run yet. Let go of everything, yield, and come back.
    Changing,
    /// The CPU's page is shared with another process or pinned for DMA. Break the sharing outside every lock, try once
    /// more, then serve in place (hazards M3).
    Busy(usize),
    /// The kernel refuses to move this page: its mapping is protected, locked, of another kind, or gone.
    Refused(usize),
    /// The page is nowhere: neither with the CPU nor in the window that should hold it.
    Lost(usize),
    /// The kernel has no memory.
    NoMemory,
}

type Movement = Result<(), Stall>;

/// One block under its lock, and the means to move its pages.
pub(crate) struct Mover<'a> {
    region: &'a Region,
    block: usize,
    pub(crate) state: &'a mut BlockState,
    /// Whether somebody may sleep at a page that is served now: every call wakes who waits for what it did, but a page that is there
    /// without a call, or for all that the call said, has woken nobody.
    asleep: bool,
}

/// What both ends of a movement hold at one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ends {
    source: bool,
    destination: bool,
}

/// What to do about a page at which a movement stopped.
enum Settled {
    /// The page had moved; go on behind it.
    Moved,
    /// The source is empty.
    Hole,
    /// Something else is in the way at the destination.
    Blocked,
    /// Both ends look as they should; the same call may work now.
    Again,
}

/// Where a call over several pages met the border of a mapping.
enum Border {
    /// After so many of them.
    At(usize),
    /// One side is not mapped.
    Unmapped,
    /// Nowhere any more, or it was no border: `mprotect` splits a mapping, and joins it again, at any time.
    Gone,
}

/// How often a call is made again after a border that is not there.
const MAX_GONE: u32 = 8;

/// How often one page may answer "again" before it is refused: a bug is reported, not looped on (hazards M2).
const MAX_AGAIN: u32 = 64;

impl<'a> Mover<'a> {
    pub(crate) fn new(region: &'a Region, block: usize, state: &'a mut BlockState) -> Self {
        Self {
            region,
            block,
            state,
            asleep: false,
        }
    }

    /// Whether everybody who waited for a page that is served has been woken.
    pub(crate) fn has_woken(&self) -> bool {
        !self.asleep
    }

    fn host(&self, page: usize) -> usize {
        self.region.host_addr_of(self.block, page)
    }

    fn frame(&self, device: &dyn AnyMapped, page: usize) -> usize {
        device.window().addr_of(self.block, page)
    }

    fn has_move(&self) -> bool {
        self.region.door().has_move()
    }

    /// `UFFDIO_MOVE` of `run` between two places that are linear in the page index; `moved` records each part.
    fn move_run(
        &mut self,
        run: Range<usize>,
        source: impl Fn(&Self, usize) -> usize,
        destination: impl Fn(&Self, usize) -> usize,
        mut moved: impl FnMut(&mut BlockState, PageMask),
        mut hole: impl FnMut(&mut Self, Range<usize>) -> Movement,
    ) -> Movement {
        let mut at = run.start;
        let mut again = 0;
        // A move must not cross the border of a mapping (hazards M5): up to here it does not, as far as we know.
        let mut limit = run.end;
        while at < run.end {
            if at >= limit {
                limit = run.end;
            }
            let (src, dst) = (source(self, at), destination(self, at));
            count(&self.region.counters().move_calls, 1);
            let Moved { bytes, stop } =
                self.region
                    .door()
                    .move_pages(dst, src, (limit - at) * PAGE_SIZE);
            let n = bytes / PAGE_SIZE;
            if n > 0 {
                moved(self.state, PageMask::range(at..at + n));
                at += n;
                again = 0;
            }
            if at == run.end {
                break;
            }
            match stop {
                Stop::Complete => {}
                Stop::Exists | Stop::NotPresent => {
                    match self.settle(stop, source(self, at), destination(self, at)) {
                        Settled::Moved => {
                            self.asleep = true;
                            moved(self.state, PageMask::page(at));
                            at += 1;
                        }
                        Settled::Hole => {
                            let len = self.hole_len(source(self, at), run.end - at);
                            hole(self, at..at + len)?;
                            at += len;
                        }
                        Settled::Blocked => return Err(Stall::Refused(at)),
                        Settled::Again => {}
                    }
                }
                Stop::Changing => {
                    count(&self.region.counters().changing_outcomes, 1);
                    return Err(Stall::Changing);
                }
                Stop::Busy => return Err(Stall::Busy(at)),
                Stop::NoMemory => return Err(Stall::NoMemory),
                Stop::Invalid => match self.border(src, dst, limit - at) {
                    Border::At(pages) => limit = at + pages,
                    // As a rule it is for something else that it says so: protected, locked.
                    Border::Gone if again == 0 => {}
                    Border::Gone | Border::Unmapped => return Err(Stall::Refused(at)),
                },
                Stop::Fault | Stop::Other(_) => return Err(Stall::Refused(at)),
            }
            again += 1;
            if again > MAX_AGAIN {
                count(&self.region.counters().anomalies, 1);
                return Err(Stall::Refused(at));
            }
        }
        Ok(())
    }

    /// Where the mappings of either side end that a call over `pages` pages has refused.
    fn border(&self, source: usize, destination: usize, pages: usize) -> Border {
        let space = AddressSpace::global();
        let left = |addr: usize| Some((space.mapping_end(addr)? - addr) / PAGE_SIZE);
        match left(source).zip(left(destination)) {
            None => Border::Unmapped,
            Some((source, destination)) if source.min(destination) < pages => {
                Border::At(source.min(destination))
            }
            Some(_) => Border::Gone,
        }
    }

    /// Decides what an EEXIST or ENOENT of a MOVE means by looking at both ends.
    fn settle(&self, stop: Stop, source: usize, destination: usize) -> Settled {
        let ends = Ends {
            source: self.is_populated(source),
            destination: self.is_populated(destination),
        };
        if mutated(Mutation::MoveErrorBelieved) {
            return if stop == Stop::NotPresent {
                Settled::Hole
            } else {
                Settled::Blocked
            };
        }
        match (stop, ends) {
            (
                _,
                Ends {
                    source: false,
                    destination: true,
                },
            ) => Settled::Moved,
            (
                Stop::NotPresent,
                Ends {
                    source: false,
                    destination: false,
                },
            ) => Settled::Hole,
            (
                Stop::Exists,
                Ends {
                    destination: true, ..
                },
            ) => Settled::Blocked,
            _ => Settled::Again,
        }
    }

    /// Whether the page is in memory: neither absent, nor swapped out, nor a bare marker.
    fn is_present(&self, addr: usize) -> bool {
        count(&self.region.counters().scan_calls, 1);
        AddressSpace::global().is_present(addr)
    }

    fn is_populated(&self, addr: usize) -> bool {
        count(&self.region.counters().scan_calls, 1);
        AddressSpace::global().is_populated(addr)
    }

    /// Whether the CPU's page table has the page, whatever the directory says.
    pub(crate) fn is_with_host(&self, page: usize) -> bool {
        self.is_populated(self.host(page))
    }

    /// How many of the `max` pages from `addr` on are holes; at least one, for the caller saw the first.
    fn hole_len(&self, addr: usize, max: usize) -> usize {
        count(&self.region.counters().scan_calls, 1);
        AddressSpace::global().nr_empty(addr, max).max(1)
    }

    /// `UFFDIO_COPY` of `run`; `copied` records each part, `exists` decides about a page that is populated already.
    fn copy_run(
        &mut self,
        run: Range<usize>,
        source: impl Fn(&Self, usize) -> usize,
        destination: impl Fn(&Self, usize) -> usize,
        mode: Protect,
        mut copied: impl FnMut(&mut BlockState, PageMask),
    ) -> Movement {
        let mut at = run.start;
        let mut again = 0;
        // A copy must not cross the border of a mapping either; it says ENOENT.
        let mut limit = run.end;
        while at < run.end {
            if at >= limit {
                limit = run.end;
            }
            let (src, dst) = (source(self, at), destination(self, at));
            count(&self.region.counters().copy_calls, 1);
            let Moved { bytes, stop } =
                self.region
                    .door()
                    .copy(dst, src, (limit - at) * PAGE_SIZE, mode);
            let n = bytes / PAGE_SIZE;
            if n > 0 {
                copied(self.state, PageMask::range(at..at + n));
                at += n;
                again = 0;
            }
            if at == run.end {
                break;
            }
            match stop {
                Stop::Complete => {}
                // A marker (write-protect, poison, guard) on an empty entry says EEXIST too (hazards M2): clear it and
                // try again; a page that is really there is somebody's contents and must not be taken for ours.
                Stop::Exists if !self.is_present(dst) => {
                    let _ = self.region.door().unprotect(dst, PAGE_SIZE);
                }
                Stop::Changing => {
                    count(&self.region.counters().changing_outcomes, 1);
                    return Err(Stall::Changing);
                }
                Stop::NoMemory => return Err(Stall::NoMemory),
                Stop::NotPresent => match self.border(src, dst, limit - at) {
                    Border::At(pages) if pages > 0 => limit = at + pages,
                    Border::Gone if again < MAX_GONE => {}
                    // Unmapped just now: the call had looked for a change before, and nobody has heard of it.
                    _ if self
                        .region
                        .door()
                        .is_changing(AddressSpace::global().zeros()) =>
                    {
                        return Err(Stall::Changing);
                    }
                    _ => return Err(Stall::Refused(at)),
                },
                Stop::Exists | Stop::Busy | Stop::Invalid | Stop::Fault | Stop::Other(_) => {
                    return Err(Stall::Refused(at));
                }
            }
            again += 1;
            if again > MAX_AGAIN {
                count(&self.region.counters().anomalies, 1);
                return Err(Stall::Refused(at));
            }
        }
        Ok(())
    }

    /// Moves the CPU's pages of `run` into `device`'s window, which becomes their only holder. Pages that nobody has
    /// populated become zero-filled window pages, private ones if a write is to follow.
    pub(crate) fn take(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
        access: Access,
        scratch: &mut Scratch,
    ) -> Movement {
        self.clear_leftovers(device, run.clone(), scratch)?;
        let taken = self.take_to_window(device, run.clone(), access);
        // Also after a stall: what has left the CPU must get to the device.
        self.hand_over(device, run, scratch);
        taken
    }

    /// Gives `device` copies of the CPU's pages of `run`, whose mapping is read-only, so that the kernel would not move them.
    /// Both hold them: the CPU's are write-protected, for `mprotect` may make them writable and tells nobody. Holes become
    /// zero-filled window pages.
    pub(crate) fn duplicate(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
        scratch: &mut Scratch,
    ) -> Movement {
        self.clear_leftovers(device, run.clone(), scratch)?;
        let copied = self.for_each_extent(run.clone(), |m, part, populated| {
            if populated {
                count(&m.region.counters().duplicated_pages, part.len() as u64);
                m.protect_and_copy(device, part)
            } else {
                m.zero_fill_frames(device, part, Access::Read)
            }
        });
        self.hand_over(device, run, scratch);
        copied
    }

    /// For opaque memory: gives the device those pages of `run` that are in its window, and empties the window. Where that stalls
    /// the pages are the device's all the same, and what is left is cleared before the window is filled there again.
    fn hand_over(&mut self, device: &dyn AnyMapped, run: Range<usize>, scratch: &mut Scratch) {
        if device.bounce().is_none() {
            return;
        }
        let arrived = self.state.frames(device.id()) & PageMask::range(run);
        for run in arrived.runs() {
            device.copy_to_device(self.based(&run), self.frame(device, run.start));
            if self.empty_window(device, run, scratch).is_err() {
                device.set_leftovers(self.block, true);
            }
        }
    }

    /// For opaque memory: empties the window of the block, which `run` is about to come through. What was left there by a hand-over
    /// that could not empty it would be taken for what comes.
    fn clear_leftovers(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
        scratch: &mut Scratch,
    ) -> Movement {
        if !device.has_leftovers(self.block) {
            return Ok(());
        }
        let body = self.region.body_mask(self.block).bounds().unwrap_or(run);
        let mut at = body.start;
        while at < body.end {
            count(&self.region.counters().scan_calls, 2);
            at += AddressSpace::global().nr_empty(self.frame(device, at), body.end - at);
            let left = AddressSpace::global().nr_populated(self.frame(device, at), body.end - at);
            if left > 0 {
                self.empty_window(device, at..at + left, scratch)?;
            }
            at += left;
        }
        device.set_leftovers(self.block, false);
        Ok(())
    }

    /// Page indices from the region's base.
    fn based(&self, run: &Range<usize>) -> Range<usize> {
        self.block * PAGES_PER_BLOCK + run.start..self.block * PAGES_PER_BLOCK + run.end
    }

    /// Drops pages by `madvise`, where there is no MOVE. False if the kernel would not.
    fn drop_pages(&self, at: usize, nr_pages: usize) -> bool {
        count(&self.region.counters().discard_calls, 1);
        self.region.door().discard(at, nr_pages * PAGE_SIZE)
    }

    /// Throws window pages away that nobody needs any more. The directory is not concerned.
    fn empty_window(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
        scratch: &mut Scratch,
    ) -> Movement {
        if !self.has_move() {
            return if self.drop_pages(self.frame(device, run.start), run.len()) {
                Ok(())
            } else {
                Err(Stall::Refused(run.start))
            };
        }
        let base = scratch.take(run.len(), self.frame(device, run.start));
        let start = run.start;
        self.move_run(
            run,
            |m, page| m.frame(device, page),
            |_, page| base + (page - start) * PAGE_SIZE,
            |_, _| {},
            |_, _| Ok(()),
        )
    }

    /// For opaque memory: makes pages of `run` at `destination` from what the device has.
    fn copy_from_opaque(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
        destination: impl Fn(&Self, usize) -> usize,
        mode: Protect,
        copied: impl FnMut(&mut BlockState, PageMask),
    ) -> Movement {
        let Some(mut bounce) = device.bounce() else {
            return Err(Stall::Lost(run.start));
        };
        device.copy_to_bounce(self.based(&run), &mut bounce);
        let (buffer, start) = (bounce.as_ptr().expose_provenance(), run.start);
        self.copy_run(
            run,
            |_, page| buffer + (page - start) * PAGE_SIZE,
            destination,
            mode,
            copied,
        )
    }

    fn take_to_window(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
        access: Access,
    ) -> Movement {
        let id = device.id();
        if !self.has_move() {
            return self.take_by_copy(device, run, access);
        }
        self.move_run(
            run,
            |m, page| m.host(page),
            |m, page| m.frame(device, page),
            |state, pages| state.moved_out(id, pages),
            |m, hole| m.zero_fill_frames(device, hole, access),
        )
    }

    /// Duplicates the CPU's pages of `run` into window pages of `device` that are populated and stale: protects them, then
    /// copies over what is there. Says how far it came; from there on [`take`](Self::take) and
    /// [`share_home`](Self::share_home) do it, for the usual reason is a page that is missing here.
    ///
    /// Stale window pages were copies for reading, and no translation leads to them any more, so nobody notices the copy.
    pub(crate) fn duplicate_over_junk(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
    ) -> Result<usize, Stall> {
        let door = self.region.door();
        // W5: where the kernel's own accesses wait for our monitor, it must not make one of a registered page here.
        // And opaque memory has no window page to copy over.
        if door.is_transparent() || run.is_empty() || device.bounce().is_some() {
            return Ok(run.start);
        }
        let (host, frame, len) = (
            self.host(run.start),
            self.frame(device, run.start),
            run.len() * PAGE_SIZE,
        );
        count(&self.region.counters().write_protect_calls, 1);
        let protected = if mutated(Mutation::DuplicateUnprotected) {
            Stop::Complete
        } else {
            door.protect(host, len)
        };
        match protected {
            Stop::Complete => {}
            Stop::Changing => return Err(Stall::Changing),
            // Stale protection, if any: the next fault there finds nothing that explains it, and lifts it.
            _ => return Ok(run.start),
        }
        count(&self.region.counters().kernel_copy_calls, 1);
        let done = run.start + door.copy_over(frame, host, len) / PAGE_SIZE;
        let pages = PageMask::range(run.start..done);
        self.state.filled(device.id(), pages);
        count(
            &self.region.counters().duplicated_pages,
            pages.count() as u64,
        );
        Ok(done)
    }

    /// Gives `device` zero-filled window pages for a hole in the CPU's memory.
    fn zero_fill_frames(
        &mut self,
        device: &dyn AnyMapped,
        hole: Range<usize>,
        access: Access,
    ) -> Movement {
        let id = device.id();
        match access {
            Access::Write => self.copy_run(
                hole.clone(),
                |_, page| AddressSpace::global().zeros() + (page - hole.start) * PAGE_SIZE,
                |m, page| m.frame(device, page),
                Protect::No,
                |state, pages| state.moved_out(id, pages),
            ),
            Access::Read => {
                count(&self.region.counters().zeropage_calls, 1);
                let at = self.frame(device, hole.start);
                let Moved { bytes, stop } = self.region.door().zeropage(at, hole.len() * PAGE_SIZE);
                let done = hole.start..hole.start + bytes / PAGE_SIZE;
                self.state.moved_out(id, PageMask::range(done.clone()));
                match stop {
                    Stop::Complete => Ok(()),
                    Stop::Changing => Err(Stall::Changing),
                    Stop::NoMemory => Err(Stall::NoMemory),
                    _ => Err(Stall::Refused(done.end)),
                }
            }
        }
    }

    /// The CPU's touch of a page that nobody holds: zero-fills it. A store gets a private page at once.
    pub(crate) fn zero_fill_host(&mut self, page: usize, access: Access) -> Movement {
        let at = self.host(page);
        let door = self.region.door();
        let progress = match access {
            Access::Write => {
                count(&self.region.counters().copy_calls, 1);
                door.copy(at, AddressSpace::global().zeros(), PAGE_SIZE, Protect::No)
            }
            Access::Read => {
                count(&self.region.counters().zeropage_calls, 1);
                door.zeropage(at, PAGE_SIZE)
            }
        };
        match progress.stop {
            Stop::Complete => Ok(()),
            // No longer registered: the mirror was closed meanwhile, and the page is the kernel's affair.
            Stop::NotPresent => {
                self.asleep = true;
                Ok(())
            }
            Stop::Exists if self.is_present(at) => {
                // Somebody populated it between the fault and here; waiters of the other door want a wake-up.
                door.wake(at, PAGE_SIZE);
                Ok(())
            }
            // A marker is in the way: clear it, and let the access fault again.
            Stop::Exists => {
                self.asleep = true;
                count(&self.region.counters().write_protect_calls, 1);
                let _ = door.unprotect(at, PAGE_SIZE);
                Ok(())
            }
            Stop::Changing => Err(Stall::Changing),
            Stop::NoMemory => Err(Stall::NoMemory),
            _ => Err(Stall::Refused(page)),
        }
    }

    /// Populates the holes of `run` on the CPU's side, so that the kernel can use all of it.
    pub(crate) fn populate_host(&mut self, run: Range<usize>) -> Movement {
        let mut at = run.start;
        while at < run.end {
            count(&self.region.counters().scan_calls, 2);
            at += AddressSpace::global().nr_populated(self.host(at), run.end - at);
            if at < run.end {
                let hole = AddressSpace::global()
                    .nr_empty(self.host(at), run.end - at)
                    .max(1);
                let zeros = AddressSpace::global().zeros();
                let start = at;
                let source = |_: &Self, page: usize| zeros + (page - start) * PAGE_SIZE;
                self.copy_run(
                    at..at + hole,
                    source,
                    |m, page| m.host(page),
                    Protect::No,
                    |_, _| {},
                )?;
                at += hole;
            }
        }
        Ok(())
    }

    /// Moves `device`'s pages of `run` to the CPU. Other devices' copies are the caller's to revoke.
    pub(crate) fn bring_home(&mut self, device: &dyn AnyMapped, run: Range<usize>) -> Movement {
        let id = device.id();
        let lost = self.state.lost() & PageMask::range(run.clone());
        if let Some(page) = lost.first_from(run.start) {
            if run.start < page {
                self.bring_home(device, run.start..page)?;
            }
            return Err(Stall::Lost(page));
        }
        if run.len() > 1
            && self
                .state
                .displaced()
                .intersects(&PageMask::range(run.clone()))
        {
            // Not one run on the CPU's side: some of it, or all, is elsewhere.
            return run
                .into_iter()
                .try_for_each(|page| self.bring_home(device, page..page + 1));
        }
        if device.bounce().is_some() {
            return self.copy_from_opaque(device, run, Self::host, Protect::No, |state, pages| {
                state.moved_home(id, pages);
            });
        }
        if !self.has_move() {
            return self.bring_home_by_copy(device, run);
        }
        let (mut at, mut busy) = (run.start, 0);
        while at < run.end {
            let moved = self.move_run(
                at..run.end,
                |m, page| m.frame(device, page),
                |m, page| m.host(page),
                |state, pages| state.moved_home(id, pages),
                |_, hole| Err(Stall::Lost(hole.start)),
            );
            match moved {
                // Somebody looks at the frame through the kernel (ptrace, process_vm_readv): that is over soon. A frame that stays
                // pinned is a device's own DMA, which its invalidation should have ended.
                Err(Stall::Busy(page)) if busy < MAX_AGAIN => {
                    busy += 1;
                    at = page;
                    core::hint::spin_loop();
                }
                // Not movable here (protected, locked, a marker): a copy is, even into PROT_NONE.
                Err(Stall::Refused(page) | Stall::Busy(page)) => {
                    self.bring_home_by_copy(device, page..page + 1)?;
                    at = page + 1;
                }
                other => return other,
            }
        }
        Ok(())
    }

    fn bring_home_by_copy(&mut self, device: &dyn AnyMapped, run: Range<usize>) -> Movement {
        let id = device.id();
        let copied = self.copy_run(
            run,
            |m, page| m.frame(device, page),
            |m, page| m.host(page),
            Protect::No,
            |state, pages| {
                state.copied_home(pages);
                state.revoked(id, pages);
            },
        );
        match copied {
            // Nothing there to copy.
            Err(Stall::Refused(page)) if !self.is_populated(self.frame(device, page)) => {
                Err(Stall::Lost(page))
            }
            other => other,
        }
    }

    /// Gives the CPU a copy of `device`'s pages of `run`, write-protected from the first instant; both are holders.
    pub(crate) fn share_home(&mut self, device: &dyn AnyMapped, run: Range<usize>) -> Movement {
        let pages = run.len() as u64;
        if device.bounce().is_some() {
            self.copy_from_opaque(
                device,
                run,
                Self::host,
                Protect::Yes,
                BlockState::copied_home,
            )?;
        } else {
            let mode = if mutated(Mutation::ShareHomeWritable) {
                Protect::No
            } else {
                Protect::Yes
            };
            self.copy_run(
                run,
                |m, page| m.frame(device, page),
                |m, page| m.host(page),
                mode,
                BlockState::copied_home,
            )?;
        }
        count(&self.region.counters().duplicated_pages, pages);
        Ok(())
    }

    /// Copies from `from`'s window to `to`'s; both are holders.
    pub(crate) fn copy_between(
        &mut self,
        from: &dyn AnyMapped,
        to: &dyn AnyMapped,
        run: Range<usize>,
        scratch: &mut Scratch,
    ) -> Movement {
        let id = to.id();
        self.clear_leftovers(to, run.clone(), scratch)?;
        let target = |m: &Self, page: usize| m.frame(to, page);
        let filled = |state: &mut BlockState, pages: PageMask| state.filled(id, pages);
        let copied = if from.bounce().is_some() {
            self.copy_from_opaque(from, run.clone(), target, Protect::No, filled)
        } else {
            self.copy_run(
                run.clone(),
                |m, page| m.frame(from, page),
                target,
                Protect::No,
                filled,
            )
        };
        self.hand_over(to, run, scratch);
        copied
    }

    /// Moves from `from`'s window to `to`'s.
    pub(crate) fn move_between(
        &mut self,
        from: &dyn AnyMapped,
        to: &dyn AnyMapped,
        run: Range<usize>,
        scratch: &mut Scratch,
    ) -> Movement {
        let (source, destination) = (from.id(), to.id());
        if !self.has_move() || from.bounce().is_some() || to.bounce().is_some() {
            self.copy_between(from, to, run.clone(), scratch)?;
            self.state.revoked(source, PageMask::range(run));
            return Ok(());
        }
        self.move_run(
            run,
            |m, page| m.frame(from, page),
            |m, page| m.frame(to, page),
            |state, pages| {
                state.filled(destination, pages);
                state.emptied(source, pages);
            },
            |_, hole| Err(Stall::Lost(hole.start)),
        )
    }

    /// Fills `device`'s window from memory that no protocol guards: the source of a [`MirrorRef`](crate::MirrorRef).
    pub(crate) fn fill_from_input(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
        scratch: &mut Scratch,
    ) -> Movement {
        let id = device.id();
        self.clear_leftovers(device, run.clone(), scratch)?;
        let filled = self.copy_run(
            run.clone(),
            |m, page| m.host(page),
            |m, page| m.frame(device, page),
            Protect::No,
            |state, pages| state.filled(id, pages),
        );
        self.hand_over(device, run, scratch);
        filled
    }

    /// Empties window pages of `device` whose contents are stale, or held elsewhere. One that somebody has pinned keeps none of the
    /// others; it is what the error names.
    pub(crate) fn discard(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
        scratch: &mut Scratch,
    ) -> Movement {
        let id = device.id();
        if device.bounce().is_some() {
            self.state.emptied(id, PageMask::range(run));
            return Ok(());
        }
        if !self.has_move() {
            if !self.drop_pages(self.frame(device, run.start), run.len()) {
                return Err(Stall::Refused(run.start));
            }
            self.state.emptied(id, PageMask::range(run));
            return Ok(());
        }
        // Once for all of the run: each page has its place, whatever stops on the way.
        let base = scratch.take(run.len(), self.frame(device, run.start));
        let (mut at, mut discarded) = (run.start, Ok(()));
        while at < run.end {
            let moved = self.move_run(
                at..run.end,
                |m, page| m.frame(device, page),
                |_, page| base + (page - run.start) * PAGE_SIZE,
                |state, pages| state.emptied(id, pages),
                |m, hole| {
                    m.state.emptied(id, PageMask::range(hole));
                    Ok(())
                },
            );
            match moved {
                Err(Stall::Busy(page)) => {
                    discarded = Err(Stall::Busy(page));
                    at = page + 1;
                }
                other => {
                    other?;
                    break;
                }
            }
        }
        discarded
    }

    /// Throws the CPU's copy of `run` away; some device holds the pages.
    pub(crate) fn drop_host(&mut self, run: Range<usize>, scratch: &mut Scratch) -> Movement {
        if !self.has_move() {
            return self.discard_host(run);
        }
        let base = scratch.take(run.len(), self.host(run.start));
        let start = run.start;
        self.move_run(
            run,
            |m, page| m.host(page),
            |_, page| base + (page - start) * PAGE_SIZE,
            BlockState::host_dropped,
            |m, hole| {
                m.state.host_dropped(PageMask::range(hole));
                Ok(())
            },
        )
    }

    /// Lets the CPU write `run` again, and makes what devices hold of it stale.
    pub(crate) fn unprotect(&mut self, run: Range<usize>) -> Movement {
        count(&self.region.counters().write_protect_calls, 1);
        let at = self.host(run.start);
        // Before the call, which may do a part and then fail: a page that is the CPU's alone and still protected is found and
        // cleared by its next write; one that is writable and still shared would be wrong.
        self.state.revoked_all(PageMask::range(run.clone()), None);
        match self.region.door().unprotect(at, run.len() * PAGE_SIZE) {
            Stop::Complete => {
                count(&self.region.counters().collapsed_pages, run.len() as u64);
                Ok(())
            }
            Stop::Changing => Err(Stall::Changing),
            _ => Err(Stall::Refused(run.start)),
        }
    }

    /// Clears a write-protection that no holder explains.
    pub(crate) fn clear_stale_protection(&mut self, page: usize) -> Movement {
        count(&self.region.counters().write_protect_calls, 1);
        match self.region.door().unprotect(self.host(page), PAGE_SIZE) {
            Stop::Complete => Ok(()),
            Stop::Changing => Err(Stall::Changing),
            _ => Err(Stall::Refused(page)),
        }
    }

    /// [`take`](Self::take) where the kernel has no MOVE: protect, copy, discard.
    fn take_by_copy(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
        access: Access,
    ) -> Movement {
        self.for_each_extent(run, |m, part, populated| {
            if populated {
                m.take_populated_by_copy(device, part)
            } else {
                m.zero_fill_frames(device, part, access)
            }
        })
    }

    /// Calls `act` with each part of `run` that the CPU has populated, and each that it has not.
    fn for_each_extent(
        &mut self,
        run: Range<usize>,
        mut act: impl FnMut(&mut Self, Range<usize>, bool) -> Movement,
    ) -> Movement {
        let mut at = run.start;
        while at < run.end {
            let populated = self.is_populated(self.host(at));
            let len = self.extent_len(at, run.end - at, populated);
            act(self, at..at + len, populated)?;
            at += len;
        }
        Ok(())
    }

    fn extent_len(&self, page: usize, max: usize, populated: bool) -> usize {
        let addr = self.host(page);
        if !populated {
            return self.hole_len(addr, max);
        }
        count(&self.region.counters().scan_calls, 1);
        AddressSpace::global().nr_populated(addr, max).max(1)
    }

    fn take_populated_by_copy(&mut self, device: &dyn AnyMapped, run: Range<usize>) -> Movement {
        self.protect_and_copy(device, run.clone())?;
        self.discard_host(run)
    }

    /// Where there is no MOVE: discards the CPU's copy of `run`, which is at its address, unless that is another's by now. The kernel
    /// has no call that asks and acts at once; so it is asked first, and our own calls exclude rounds (`calls.rs`). What is left is a bare
    /// `munmap` in this very moment whose address is given to another mapping in it as well.
    fn discard_host(&mut self, run: Range<usize>) -> Movement {
        if self
            .region
            .door()
            .is_changing(AddressSpace::global().zeros())
        {
            return Err(Stall::Changing);
        }
        if !self.drop_pages(self.host(run.start), run.len()) {
            return self.not_all_discarded(run);
        }
        self.state.host_dropped(PageMask::range(run));
        Ok(())
    }

    /// The kernel refused to discard the CPU's pages of `run`, all or some: it stops at memory that is locked, and passes over what is
    /// mapped no more. What is gone is the device's alone; of the rest the CPU keeps its copy, and devices will use that one in place.
    fn not_all_discarded(&mut self, run: Range<usize>) -> Movement {
        let space = AddressSpace::global();
        let mut kept = PageMask::EMPTY;
        for page in run.clone() {
            let at = self.host(page);
            // Unmapped, and not heard of yet: perhaps it is elsewhere, with its contents.
            if self.is_populated(at) || space.vma(at).is_none() {
                kept |= PageMask::page(page);
            } else {
                self.state.host_dropped(PageMask::page(page));
            }
        }
        let first = kept.first_from(0).unwrap_or(run.start);
        for part in kept.runs() {
            self.unprotect(part)?;
        }
        Err(Stall::Refused(first))
    }

    /// Copies pages that the CPU can no longer write. Both hold them.
    fn protect_and_copy(&mut self, device: &dyn AnyMapped, run: Range<usize>) -> Movement {
        let id = device.id();
        let (at, len) = (self.host(run.start), run.len() * PAGE_SIZE);
        count(&self.region.counters().write_protect_calls, 1);
        let protected = if mutated(Mutation::CopyUnprotected) {
            Stop::Complete
        } else {
            self.region.door().protect(at, len)
        };
        match protected {
            Stop::Complete => {}
            Stop::Changing => return Err(Stall::Changing),
            _ => return Err(Stall::Refused(run.start)),
        }
        self.copy_run(
            run,
            |m, page| m.host(page),
            |m, page| m.frame(device, page),
            Protect::No,
            |state, pages| state.filled(id, pages),
        )
    }
}

impl Mover<'_> {
    /// Where pages leave a window by being copied: keeps `device` from writing what it holds of `pages` meanwhile, for good.
    pub(crate) fn protect_frames(&mut self, device: &dyn AnyMapped, pages: PageMask) -> Movement {
        if self.has_move() || device.bounce().is_some() {
            return Ok(());
        }
        for run in (self.state.frames(device.id()) & pages).runs() {
            count(&self.region.counters().write_protect_calls, 1);
            let (at, len) = (self.frame(device, run.start), run.len() * PAGE_SIZE);
            match self.region.door().protect(at, len) {
                Stop::Complete => {}
                Stop::Changing => return Err(Stall::Changing),
                _ => return Err(Stall::Refused(run.start)),
            }
        }
        Ok(())
    }

    /// Discards what is stale in `device`'s window at `pages`, so that they can be filled. One that somebody has pinned keeps none of
    /// the others.
    pub(crate) fn clear_junk(
        &mut self,
        device: &dyn AnyMapped,
        pages: PageMask,
        scratch: &mut Scratch,
    ) -> Movement {
        let junk = self.state.junk(device.id()) & pages;
        let mut cleared = Ok(());
        for run in junk.runs() {
            match self.discard(device, run, scratch) {
                Err(Stall::Busy(page)) => cleared = Err(Stall::Busy(page)),
                other => other?,
            }
        }
        cleared
    }
}

/// The pages of one granule around `page`: what one fault may move. `granule` is a power of two of pages.
pub(crate) fn granule_around(page: usize, granule: usize) -> PageMask {
    debug_assert!(granule.is_power_of_two() && granule <= PAGES_PER_BLOCK);
    let start = page & !(granule - 1);
    PageMask::range(start..start + granule)
}

/// The granules that `pages` touch.
pub(crate) fn granules_of(pages: PageMask, granule: usize) -> PageMask {
    debug_assert!(granule.is_power_of_two() && granule <= PAGES_PER_BLOCK);
    if granule <= 64 {
        return pages.grown_within_words(granule);
    }
    let mut grown = PageMask::EMPTY;
    let mut next = 0;
    while let Some(page) = pages.first_from(next) {
        grown |= granule_around(page, granule);
        next = (page | (granule - 1)) + 1;
    }
    grown
}

/// The device of `id` in diagnostics.
impl core::fmt::Display for DeviceId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "device {}", self.0)
    }
}
