//! Copies from the application's pages, made inside the gate.
//!
//! Where a door serves the kernel's accesses, too, a copy from a page that is missing has the kernel wait for the monitor, which waits for
//! the gate (hazards G5). The page was there when the copy began, and its block is locked; but a bare `mremap` may have taken it away since,
//! which nobody has heard of yet. No system call copies and never waits, a signal does not end the wait, and until the event is read no
//! page can be brought there either. But what has left is the mirror's no more. So whoever waits for the gate, or for the block, has the
//! kernel forget that it is registered ([`Gate::nudging`](super::Gate), `Region::lock_block`): then it reads as the zeros that it is, and the
//! copy goes on. Its copier is told, gives back what it copied, and begins anew; and what is the mirror's still, because nobody was to hear of
//! it (a bare `madvise` without MOVE), it registers again.

use super::mutation::{Mutation, mutated, ordering};
use super::shim::atomic::Ordering::{self, Acquire, Relaxed, Release};
use super::shim::atomic::{AtomicU32, AtomicU64};
use super::shim::{Backoff, relax};
use crate::addr::{PAGE_SIZE, PageRange};
use core::time::Duration;

/// How long who waits for the gate, or a block, takes it that nobody inside is held up: longer than sections take, and short for who waits.
pub(crate) const PATIENCE: Duration = Duration::from_millis(5);

/// Copies at once; more than that are tried again later.
const MAX_COPIES: usize = if cfg!(svm_loom) { 1 } else { 64 };

/// Nobody's.
const FREE: u32 = 0;
/// Its copier writes the range.
const TAKEN: u32 = 1;
/// The range can be read.
const COPYING: u32 = 2;
/// Somebody looks at the range, and the copier does not end meanwhile.
const HELD: u32 = 3;

/// The copies that are under way.
///
/// | word | written | read |
/// |---|---|---|
/// | `state` | by copiers from free to taken to copying, and from that back to taken and free; by who holds from copying to held and back | by all |
/// | `start`, `end` | by its copier, while taken | by who holds: Release of copying, Acquire of held; and Release of free, Acquire of taken |
/// | `forgot` | 0 by its copier, while taken; 1 by who holds | by its copier at the end: Release of copying, Acquire of taken |
///
/// The table in [`crate::notifier`] has these pairs, and the mutations that break them.
#[derive(Debug)]
pub(crate) struct Copiers([Slot; MAX_COPIES]);

#[derive(Debug)]
struct Slot {
    state: AtomicU32,
    start: AtomicU64,
    end: AtomicU64,
    /// Whether some page of the range was forgotten.
    forgot: AtomicU32,
}

/// A copy that is known while this lives.
#[derive(Debug)]
pub(crate) struct Copier<'a>(&'a Slot);

impl Copiers {
    pub(crate) fn new() -> Self {
        Self(core::array::from_fn(|_| Slot {
            state: AtomicU32::new(FREE),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            forgot: AtomicU32::new(0),
        }))
    }

    /// A copy from `pages`, of one block, which is locked. `None` if there are too many.
    pub(crate) fn begin(&self, pages: PageRange) -> Option<Copier<'_>> {
        // Acquire: pairs with the Release of the copier's end, before which is that of who held the slot: they have read the range
        // before it is written here.
        let take = |slot: &&Slot| slot.change(FREE, TAKEN, Acquire);
        let slot = self.0.iter().find(take)?;
        slot.start.store(pages.start() as u64, Relaxed);
        slot.end.store(pages.end() as u64, Relaxed);
        slot.forgot.store(0, Relaxed);
        // Release: pairs with the Acquire in `let_go_on`, behind which the range is read.
        slot.state
            .store(COPYING, ordering(Release, Mutation::CopierBeginRelaxed));
        Some(Copier(slot))
    }

    /// Gives the pages that are missing, of all that is being copied from, to `forget`. They have left, or were discarded: had they been
    /// moved, it would have been under the lock that the copier holds, and goes on to hold until this is done with it.
    pub(crate) fn let_go_on(&self, is_there: impl Fn(usize) -> bool, forget: impl Fn(PageRange)) {
        // Acquire: pairs with the Release in `begin`.
        let hold = |slot: &&Slot| slot.change(COPYING, HELD, Acquire);
        for slot in self.0.iter().filter(hold) {
            let (start, end) = (slot.start.load(Relaxed), slot.end.load(Relaxed));
            (start as usize..end as usize)
                .step_by(PAGE_SIZE)
                .filter(|&page| !is_there(page))
                .filter_map(|page| PageRange::from_pages(page, 1))
                .for_each(|page| {
                    slot.forgot.store(1, Relaxed);
                    forget(page);
                });
            // Release: pairs with the Acquire of the copier's end, which comes after what was done here.
            slot.state
                .store(COPYING, ordering(Release, Mutation::CopierHoldRelaxed));
        }
    }
}

impl Slot {
    fn change(&self, from: u32, to: u32, success: Ordering) -> bool {
        self.state
            .compare_exchange(from, to, success, Relaxed)
            .is_ok()
    }
}

impl Copier<'_> {
    /// Ends it; whether some page of it was forgotten.
    pub(crate) fn end(self) -> bool {
        self.let_go();
        let forgot = self.0.forgot.load(Relaxed) != 0;
        drop(self);
        forgot
    }

    /// Has nobody hold it from here on.
    fn let_go(&self) {
        if mutated(Mutation::CopierEndsHeld) {
            return self.0.state.store(TAKEN, Relaxed);
        }
        // Acquire: pairs with the Release of who held it.
        let acquire = ordering(Acquire, Mutation::CopierEndRelaxed);
        let mut backoff = Backoff::default();
        while self.0.state.load(Relaxed) != TAKEN && !self.0.change(COPYING, TAKEN, acquire) {
            // It makes system calls, and may be kept from running.
            relax(&mut backoff);
        }
    }
}

impl Drop for Copier<'_> {
    fn drop(&mut self) {
        self.let_go();
        // Release: pairs with the Acquire in `begin`.
        self.0.state.store(FREE, Release);
    }
}
