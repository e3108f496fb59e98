//! Opaque device memory: a device whose memory the CPU cannot reach copies.
//!
//! Out, the pages are moved to the window as any others, handed to the device from there, and discarded; home, the device fills a bounce
//! buffer, and `UFFDIO_COPY` makes pages of it. A frame is then the device's own affair; its window page is empty.

use core::ops::Range;

use super::{Movement, Mover, Stall};
use crate::addr::{PAGE_SIZE, PAGES_PER_BLOCK};
use crate::block::BlockState;
use crate::mapped::AnyMapped;
use crate::mask::PageMask;
use crate::scratch::Scratch;
use crate::space::AddressSpace;
use crate::stats::count;
use crate::sys::uffd::Protect;

impl Mover<'_> {
    /// For opaque memory: gives the device those pages of `run` that are in its window, and empties the window. Where that stalls
    /// the pages are the device's all the same, and what is left is cleared before the window is filled there again.
    pub(super) fn hand_over(
        &mut self,
        device: &dyn AnyMapped,
        run: Range<usize>,
        scratch: &mut Scratch,
    ) {
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
    pub(super) fn clear_leftovers(
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
            count(&self.region.counters().scan_calls, 1);
            at += AddressSpace::global().nr_empty(self.frame(device, at), body.end - at);
            if at == body.end {
                break;
            }
            count(&self.region.counters().scan_calls, 1);
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
        let base = scratch.take(self.region.door(), run.len());
        let base = base.ok_or(Stall::NoMemory)?;
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
    pub(super) fn copy_from_opaque(
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
}
