//! Copies from the application's pages, made inside the gate.
//!
//! Where a door serves the kernel's accesses, too, a copy from a page that is missing has the kernel wait for the monitor, which waits for
//! the gate (hazards G5). The page was there when the copy began, and its block is locked; but a bare `mremap` may have taken it away since,
//! which nobody has heard of yet. No system call copies and never waits, a signal does not end the wait, and until the event is read no
//! page can be brought there either. But what has left is the mirror's no more. So whoever waits for the gate has the kernel forget that
//! it is registered ([`Gate::nudging`](crate::sync::Gate::nudging)): then it reads as the zeros that it is, and the copy goes on. What it
//! copied is taken from the device again when the event is applied.

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::addr::{PAGE_SIZE, PageRange};

/// Copies at once; more than that are tried again later.
const MAX_COPIES: usize = 64;

const FREE: u32 = 0;
const TAKEN: u32 = 1;
const COPYING: u32 = 2;
/// Somebody looks at it: it does not end meanwhile.
const HELD: u32 = 3;

#[derive(Debug)]
pub(crate) struct Copiers([Slot; MAX_COPIES]);

#[derive(Debug)]
struct Slot {
    state: AtomicU32,
    start: AtomicUsize,
    end: AtomicUsize,
}

/// A copy that is known while this lives.
#[derive(Debug)]
pub(crate) struct Copier<'a>(&'a Slot);

impl Copiers {
    pub(crate) const fn new() -> Self {
        Self(
            [const {
                Slot {
                    state: AtomicU32::new(FREE),
                    start: AtomicUsize::new(0),
                    end: AtomicUsize::new(0),
                }
            }; MAX_COPIES],
        )
    }

    /// A copy from `pages`, of one block, which is locked. `None` if there are too many.
    pub(crate) fn begin(&self, pages: PageRange) -> Option<Copier<'_>> {
        let take = |slot: &&Slot| slot.change(FREE, TAKEN);
        let slot = self.0.iter().find(take)?;
        slot.start.store(pages.start(), Ordering::Relaxed);
        slot.end.store(pages.end(), Ordering::Relaxed);
        // Release: pairs with the Acquire of `change` in `let_go_on`, which reads the range.
        slot.state.store(COPYING, Ordering::Release);
        Some(Copier(slot))
    }

    /// Gives the pages that are missing, of all that is being copied from, to `forget`. They have left: had they been moved, it would
    /// have been under the lock that the copier holds, and goes on to hold until this is done with it.
    pub(crate) fn let_go_on(&self, is_there: impl Fn(usize) -> bool, forget: impl Fn(PageRange)) {
        for slot in self.0.iter().filter(|slot| slot.change(COPYING, HELD)) {
            let range = slot.start.load(Ordering::Relaxed)..slot.end.load(Ordering::Relaxed);
            range
                .step_by(PAGE_SIZE)
                .filter(|&page| !is_there(page))
                .filter_map(|page| PageRange::from_pages(page, 1))
                .for_each(&forget);
            // Release: the copier ends after what was done here.
            slot.state.store(COPYING, Ordering::Release);
        }
    }
}

impl Slot {
    fn change(&self, from: u32, to: u32) -> bool {
        // Acquire: pairs with the Release stores of what is read or done next.
        self.state
            .compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }
}

impl Drop for Copier<'_> {
    fn drop(&mut self) {
        while !self.0.change(COPYING, FREE) {
            core::hint::spin_loop();
        }
    }
}
