//! One run of pages by one system call, as often as it takes: [`move_run`](Mover::move_run), [`copy_run`](Mover::copy_run).
//!
//! # Outcomes of the kernel (kernel-facts section 4)
//! On Linux 6.18 `UFFDIO_MOVE` can report EEXIST or ENOENT of a page that it *did* move. Every such answer is therefore
//! checked against both ends before anything is decided; see [`Mover::ends`] and [`settle`].
//!
//! Nor is every such answer seen. A call that has moved something, and lost the count of what it moved next, says EAGAIN and how far it
//! counted; what is left is asked for again, and if a mapping is changing by then, or has changed, *that* is the answer. So wherever a
//! movement stops it is looked whether the page is there already.

use core::ops::Range;

use super::{Movement, Mover, Stall};
use crate::addr::PAGE_SIZE;
use crate::block::BlockState;
use crate::mask::PageMask;
use crate::space::AddressSpace;
use crate::stats::count;
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::uffd::{Moved, Protect, Stop};

/// What both ends of a movement hold at one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ends {
    source: bool,
    destination: bool,
}

impl Ends {
    /// Whether the page has moved all the same.
    fn has_moved(self) -> bool {
        !self.source && self.destination
    }
}

/// What to do about a page that did not move for what is, or is not, at an end.
enum Settled {
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

/// Decides what an EEXIST or ENOENT of a MOVE means of a page that has not moved.
fn settle(stop: Stop, ends: Ends) -> Settled {
    match (stop, ends.source, ends.destination) {
        (Stop::NotPresent, false, false) => Settled::Hole,
        (Stop::Exists, _, true) => Settled::Blocked,
        _ => Settled::Again,
    }
}

/// How often one page may answer "again" before it is refused: a bug is reported, not looped on (hazards M2).
const MAX_AGAIN: u32 = 64;

/// How often a call is made again after a border that is not there.
const MAX_GONE: u32 = 8;

impl Mover<'_> {
    /// `UFFDIO_MOVE` of `run` between two places that are linear in the page index; `moved` records each part.
    pub(super) fn move_run(
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
            // Where it stopped.
            let (src, dst) = (source(self, at), destination(self, at));
            let ends = self.ends(stop, src, dst);
            if ends.has_moved() {
                let len = self.moved_len(src, dst, run.end - at);
                self.asleep = true;
                moved(self.state, PageMask::range(at..at + len));
                at += len;
                again = 0;
                continue;
            }
            match stop {
                Stop::Complete => {}
                Stop::Exists | Stop::NotPresent => match settle(stop, ends) {
                    Settled::Hole => {
                        let len = self.hole_len(src, run.end - at);
                        hole(self, at..at + len)?;
                        at += len;
                    }
                    Settled::Blocked => return Err(Stall::Refused(at)),
                    Settled::Again => {}
                },
                Stop::Busy => return Err(Stall::Busy(at)),
                Stop::Changing => {
                    count(&self.region.counters().changing_outcomes, 1);
                    return Err(Stall::Changing);
                }
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

    /// `UFFDIO_COPY` of `run`; `copied` records each part, `exists` decides about a page that is populated already.
    pub(super) fn copy_run(
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
            // Where it stopped.
            let (src, dst) = (source(self, at), destination(self, at));
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

    /// What both ends hold of the page at which a movement stopped. Not looked at where it stopped of itself, or for the use of a page, which
    /// is there then.
    fn ends(&self, stop: Stop, source: usize, destination: usize) -> Ends {
        let (source, destination) = match stop {
            Stop::Complete | Stop::Busy => (true, false),
            Stop::NotPresent if mutated(Mutation::MoveErrorBelieved) => (false, false),
            Stop::Exists if mutated(Mutation::MoveErrorBelieved) => (true, true),
            Stop::Exists | Stop::NotPresent => {
                (self.is_populated(source), self.is_populated(destination))
            }
            _ if mutated(Mutation::ChangeHidesMove) => (true, false),
            _ => (self.is_populated(source), self.is_populated(destination)),
        };
        Ends {
            source,
            destination,
        }
    }

    /// How many of the `max` pages from here on have moved; at least one, for the caller saw the first. The kernel loses count of as many as
    /// it moves at once.
    fn moved_len(&self, source: usize, destination: usize, max: usize) -> usize {
        count(&self.region.counters().scan_calls, 2);
        let space = AddressSpace::global();
        let empty = space.nr_empty(source, max);
        empty.min(space.nr_populated(destination, max)).max(1)
    }

    /// How many of the `max` pages from `addr` on are holes; at least one, for the caller saw the first.
    pub(super) fn hole_len(&self, addr: usize, max: usize) -> usize {
        count(&self.region.counters().scan_calls, 1);
        AddressSpace::global().nr_empty(addr, max).max(1)
    }
}
