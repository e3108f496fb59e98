//! What is copied where it would otherwise be moved: duplicates, pages that the kernel will not move, and everything where it has no
//! `UFFDIO_MOVE` (Linux < 6.8, or `SVM_DISABLE=move`).
//!
//! Without MOVE a page is taken by write-protecting it, copying it and discarding the CPU's copy: between the first and the last step
//! it cannot be written, so no write is lost. Discards are `MADV_DONTNEED`; this is legal under the block's lock only
//! because removal events are not asked for on such kernels (see [`crate::Capabilities`]).

use core::ops::Range;

use super::{Movement, Mover, Stall};
use crate::addr::{PAGE_SIZE, PageRange};
use crate::error::Access;
use crate::mapped::AnyMapped;
use crate::mask::PageMask;
use crate::scratch::Scratch;
use crate::space::AddressSpace;
use crate::stats::count;
use crate::sync::Copier;
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::uffd::{Protect, Stop};

impl Mover<'_> {
    /// Drops pages by `madvise`, where there is no MOVE. False if the kernel would not.
    pub(super) fn drop_pages(&self, at: usize, nr_pages: usize) -> bool {
        count(&self.region.counters().discard_calls, 1);
        self.region.door().discard(at, nr_pages * PAGE_SIZE)
    }

    /// [`take`](Self::take) where the kernel has no MOVE: protect, copy, discard.
    pub(super) fn take_by_copy(
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

    fn take_populated_by_copy(&mut self, device: &dyn AnyMapped, run: Range<usize>) -> Movement {
        self.protect_and_copy(device, run.clone())?;
        let discarded = self.discard_host(run.clone());
        if let Err(Stall::Refused(_)) = discarded {
            // No translation leads to the copies yet: devices will use the CPU's, in place.
            for kept in (PageMask::range(run) - self.state.away()).runs() {
                self.unprotect(kept)?;
            }
        }
        discarded
    }

    /// Where there is no MOVE: discards the CPU's copy of `run`, which is at its address, unless that is another's by now. The kernel
    /// has no call that asks and acts at once; so it is asked first, and our own calls exclude rounds (`calls.rs`). What is left is a bare
    /// `munmap` in this very moment whose address is given to another mapping in it as well.
    pub(super) fn discard_host(&mut self, run: Range<usize>) -> Movement {
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
    /// mapped no more. What is gone is the device's alone; of the rest the CPU keeps its copy, and both hold it as before.
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
        Err(Stall::Refused(kept.first_from(0).unwrap_or(run.start)))
    }

    pub(super) fn bring_home_by_copy(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
    ) -> Movement {
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
        point!(CopyProtected, self.region.addr_of(self.block, run.start));
        let pages = PageRange::new(at, at + len);
        let copier = self
            .region
            .door()
            .begin_copy_from(pages)
            .map_err(|_| Stall::Changing)?;
        let copied = self.copy_run(
            run.clone(),
            |m, page| m.host(page),
            |m, page| m.frame(device, page),
            Protect::No,
            |state, pages| state.filled(id, pages),
        );
        if copier.is_some_and(Copier::end) {
            // Something left meanwhile, and was copied as zeros. No translation leads to the copies yet.
            self.state.revoked(id, PageMask::range(run));
            self.region.register_again(pages);
            return Err(Stall::Changing);
        }
        copied
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
}
