//! Moving pages: the code that changes which memory holds what. (Runs and blocks that
//! are one side's alone `round/quick.rs` and `release.rs` move by themselves, and leave what stops them to this.)
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
//! What one call does with one run, and what is made of the kernel's answer, is in [`runs`]; what is copied instead of moved, all of
//! it where the kernel has no MOVE, in [`by_copy`]; memory that the CPU cannot reach in [`opaque`].

mod by_copy;
mod opaque;
mod runs;

use core::ops::Range;

use crate::addr::PAGE_SIZE;
use crate::block::BlockState;
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
    /// The kernel has no memory, or there is no place for what must be thrown away.
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

/// Blocks that one movement takes at most: of huge pages that nothing keeps, microseconds' work while their locks are held.
pub(crate) const MAX_BLOCKS_AT_ONCE: usize = 32;

/// How often a frame that is in use is tried again before it is copied.
const MAX_BUSY: u32 = 64;

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
            count(&self.region.counters().scan_calls, 1);
            at += AddressSpace::global().nr_populated(self.host(at), run.end - at);
            if at < run.end {
                count(&self.region.counters().scan_calls, 1);
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
                Err(Stall::Busy(page)) if busy < MAX_BUSY => {
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
        let base = scratch.take(self.region.door(), run.len());
        let base = base.ok_or(Stall::NoMemory)?;
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
        let base = scratch.take(self.region.door(), run.len());
        let base = base.ok_or(Stall::NoMemory)?;
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
