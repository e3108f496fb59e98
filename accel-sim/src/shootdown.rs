//! The shootdown handshake: no access with a translation that was taken away.
//!
//! # Participants
//!
//! *Workers* use translations: bits of a [table](crate::table) that say "page p of this region may be read, or written,
//! at its place in device memory". A *shooter* takes some away and must not go on (move the page home, hand it to
//! another device) while an access that relies on them is in flight. A shooter is any thread of the process, as a rule
//! inside a signal handler, so all state here lives in mappings of our own, nothing is allocated and nothing is locked.
//!
//! # What a worker publishes
//!
//! Each worker owns one [`Slot`] that only it writes:
//!
//! | word           | value                       | meaning                                                      |
//! |----------------|-----------------------------|--------------------------------------------------------------|
//! | `access`       | 0                           | no element access in flight                                  |
//! |                | page << 2 \| write << 1 \| 1| one in flight on that host page                              |
//! | `mode`         | 0 / 1                       | this worker makes no element accesses now / may make some    |
//! | `spans[i].end` | 0                           | span i is closed                                             |
//! |                | page number                 | span i holds the host pages from `first >> 1` up to this one |
//! | `spans[i].first` | page << 1 \| write        | where it begins, and whether it writes                       |
//!
//! Pages are *host* page numbers (address / 4096): one name for a page in all regions.
//!
//! # Rules
//!
//! S1. A worker publishes, fences, and only then checks the bits. All spans of an item are checked together: either all
//!     are valid, or all are withdrawn before the worker waits for anything (hazards W1: no hold-and-wait).
//! S2. A shooter clears the bits, bumps the generation, fences, and only then looks at the slots.
//! S3. A shooter waits only for spans and accesses that *intersect* what it took away, and, when readers may stay, only
//!     for writers. A worker that takes a CPU fault inside a span therefore never waits for itself.
//! S4. The epoch covers the access: it is withdrawn (Release) after the last access, and the shooter's look is an Acquire.
//! S5. A cached translation is used only under the generation that was read *before* the walk that filled it.
//! S6. While the generation is odd the device is *paused*: no access begins. A hit needs no test for it, since no cached
//!     translation is stamped with an odd generation; a walk and the opening of spans look for it.
//!
//! # Why it is safe
//!
//! Worker and shooter are the store-buffering litmus test; with a fence on both sides at least one sees the other:
//!
//! ```text
//!   worker                              shooter
//!   W1 store slot                       S1 clear bits; bump generation
//!   -- fence (SeqCst) --                -- fence (SeqCst) --
//!   W2 load bits                        S2 load slot
//! ```
//!
//! Either W2 sees the bits cleared, and the worker withdraws without an access; or S2 sees the slot, and the shooter waits
//! until the worker has closed it. A slot is two words, and a shooter may see only one of them new: then one of the worker's
//! stores before its fence was not seen, hence W2 sees S1, and the worker withdraws. A span that is mistaken for open only
//! costs another look.
//!
//! *Element accesses* run the same protocol with the cost moved to the shooter: the worker's fence is a compiler fence and the
//! shooter's a [`heavy_fence`] (a membarrier), which it issues only if some worker is in *element mode*. Entering that mode is a store
//! and a full fence, so a shooter that sees no mode set has its bumped generation seen by the worker's next access. The check is
//! one comparison of the generation with the one a cached translation was filled under.
//!
//! # Why it is live
//!
//! Nobody acknowledges anything: a shooter waits for accesses to end, and they end by themselves. A worker whose check
//! failed has withdrawn, so two that wait for each other do not arise. A span that never ends is cut by the caller's deadline.

use std::ops::Range;

use crate::sync::{AtomicU64, Ordering, Rule, broken, fence, heavy_fence, ordering};

/// Spans that an item can hold at once: six views, and one for an element that lies across pages.
pub(crate) const MAX_SPANS: usize = 7;

/// The span that an element lying across pages takes; the views have those before it.
pub(crate) const STRADDLE: usize = MAX_SPANS - 1;

/// What an access does to its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    /// Loads only.
    Read,
    /// Stores, and read-modify-writes.
    Write,
}

impl Rights {
    const fn bit(self) -> u64 {
        match self {
            Rights::Read => 0,
            Rights::Write => 1,
        }
    }
}

/// Which users of the pages a shooter waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Users {
    /// Readers and writers: the pages go away.
    All,
    /// Writers only: the pages stay readable.
    Writers,
}

#[derive(Debug)]
struct Span {
    first: AtomicU64,
    end: AtomicU64,
}

/// What one worker publishes about its accesses in flight. Written by that worker alone.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Slot {
    access: AtomicU64,
    mode: AtomicU64,
    spans: [Span; MAX_SPANS],
}

impl Slot {
    /// A slot of a worker that does nothing. All zero bytes, as the slots' mapping is when it is fresh.
    pub(crate) fn new() -> Slot {
        Slot {
            access: AtomicU64::new(0),
            mode: AtomicU64::new(0),
            spans: std::array::from_fn(|_| Span {
                first: AtomicU64::new(0),
                end: AtomicU64::new(0),
            }),
        }
    }

    /// Publishes that span `i` uses the host `pages`.
    #[inline]
    fn publish_span(&self, i: usize, pages: &Range<u64>, rights: Rights) {
        // Relaxed, both: the fence in `try_open` orders them before the check, and a torn pair is harmless (see above).
        self.spans[i]
            .first
            .store(pages.start << 1 | rights.bit(), Ordering::Relaxed);
        self.spans[i].end.store(pages.end, Ordering::Relaxed);
    }

    /// Opens spans `at..at + spans.len()`, all or none: publishes them, then asks `valid` whether every page of all of them is there.
    ///
    /// On `None` nothing is published any more, and the worker may block.
    #[inline]
    pub(crate) fn try_open<R>(
        &self,
        at: usize,
        spans: &[(Range<u64>, Rights)],
        valid: impl FnOnce() -> Option<R>,
    ) -> Option<R> {
        if broken(Rule::PublishFirst) {
            let checked = valid();
            for (i, (pages, rights)) in spans.iter().enumerate() {
                self.publish_span(at + i, pages, *rights);
            }
            return checked;
        }
        for (i, (pages, rights)) in spans.iter().enumerate() {
            self.publish_span(at + i, pages, *rights);
        }
        if !broken(Rule::WorkerFence) {
            // S1. Pairs with the fence in `Generation::announce`.
            fence(Ordering::SeqCst);
        }
        let checked = valid();
        if checked.is_none() && !broken(Rule::Withdraws) {
            self.close(at, spans.len());
        }
        checked
    }

    /// Closes `nr` spans from `at` on. The accesses made inside them happen before whatever the shooter does next.
    #[inline]
    pub(crate) fn close(&self, at: usize, nr: usize) {
        for span in &self.spans[at..at + nr] {
            // S4. Release: pairs with the Acquire in `Slot::uses`.
            span.end
                .store(0, ordering(Ordering::Release, Rule::CloseRelease));
        }
    }

    /// Enters element mode: from here until [`Slot::leave_element_mode`] shooters pay for the fences of this worker's accesses.
    #[inline]
    pub(crate) fn enter_element_mode(&self) {
        self.mode.store(1, Ordering::Relaxed);
        if !broken(Rule::ModeFence) {
            // Pairs with the fence in `Generation::announce`: it sees the mode, or our next access sees its generation.
            fence(Ordering::SeqCst);
        }
    }

    /// Leaves element mode. No access may be in flight.
    #[inline]
    pub(crate) fn leave_element_mode(&self) {
        // Release: the accesses made in the mode stay before it, should a shooter skip the heavy fence because of it.
        self.mode
            .store(0, ordering(Ordering::Release, Rule::ModeRelease));
    }

    /// Runs one element access on `page`, if `check` (the look-up, given the generation it must be good for) finds a translation.
    ///
    /// `access` is inside the epoch with the check: this is the hit path. `light_fence` is that of [`sync`](crate::sync), or its
    /// `compiler_fence` where that is enough.
    #[inline(always)]
    pub(crate) fn access<T, R>(
        &self,
        light_fence: impl FnOnce(),
        generation: &AtomicU64,
        page: u64,
        rights: Rights,
        check: impl FnOnce(u64) -> Option<T>,
        access: impl FnOnce(T) -> R,
    ) -> Option<R> {
        // Relaxed, and the fence is the compiler's: the shooter's `heavy_fence` makes it a full one when it matters.
        self.access
            .store(page << 2 | rights.bit() << 1 | 1, Ordering::Relaxed);
        light_fence();
        // Acquire (free on x86-64): a walk in `check` that sees generation g sees the bits cleared before g. Pairs with the Release in `Generation::bump`.
        let acquire = ordering(Ordering::Acquire, Rule::GenerationAcquire);
        let checked = check(generation.load(acquire));
        if broken(Rule::CoverAccess) {
            self.access.store(0, Ordering::Release);
            return checked.map(access);
        }
        let result = checked.map(access);
        // S4. Release: pairs with the Acquire in `Slot::uses`.
        self.access
            .store(0, ordering(Ordering::Release, Rule::AccessRelease));
        result
    }

    /// Ends everything the worker has in flight, on its own thread, which makes no access ever after ([`crate::relief`]).
    #[allow(dead_code, reason = "the models have no thread that stops")]
    pub(crate) fn abandon(&self) {
        // Release, each: as in `close` and `leave_element_mode`.
        self.access.store(0, Ordering::Release);
        self.close(0, MAX_SPANS);
        self.leave_element_mode();
    }

    /// Whether an access or an open span of this worker, of the kind that counts, uses host pages for which `intersects` says true.
    pub(crate) fn uses(&self, users: Users, intersects: impl Fn(Range<u64>) -> bool) -> bool {
        let counts = |write: u64| users == Users::All || write == 1 || broken(Rule::WritersAlone);
        let intersects = |pages| intersects(pages) || broken(Rule::Intersects);
        // S4. Acquire, here and below: a closed span's accesses happen before what the shooter does next.
        let acquire = ordering(Ordering::Acquire, Rule::LookAcquire);
        let access = self.access.load(acquire);
        if access != 0 && counts(access >> 1 & 1) && intersects(access >> 2..(access >> 2) + 1) {
            return true;
        }
        self.spans.iter().any(|span| {
            let end = span.end.load(acquire);
            if end == 0 {
                return false;
            }
            let first = span.first.load(Ordering::Relaxed);
            // The pair may be torn (see the module): then the range may be empty or too long, and this look does not matter.
            counts(first & 1) && first >> 1 < end && intersects(first >> 1..end)
        })
    }
}

/// The flush generation, alone on its cache lines: read at every element access, written by shootdowns.
///
/// It lies at the end of its lines, because the worker's slot, a multiple of 128 bytes away, begins with the word that is stored just before
/// this one is loaded: at equal distances from a 4 KiB boundary the processor would take the load for one of that word, and wait.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct Generation {
    _apart: [u64; 15],
    current: AtomicU64,
}

impl Generation {
    /// The first generation: even, and no cached translation is stamped with 0.
    pub(crate) fn new() -> Generation {
        Generation {
            _apart: [0; 15],
            current: AtomicU64::new(2),
        }
    }

    /// The word, for [`Slot::access`].
    #[inline(always)]
    pub(crate) fn word(&self) -> &AtomicU64 {
        &self.current
    }

    /// Takes translations away: `clear` clears their bits. Called under the device lock, so that generations follow each other.
    ///
    /// Nothing may be concluded before [`Generation::announce`].
    pub(crate) fn take_away(&self, clear: impl FnOnce()) {
        if broken(Rule::BumpAfterClear) {
            self.bump(2);
            clear();
        } else {
            clear();
            self.bump(2);
        }
    }

    /// Pauses the device, or ends its pause (S6). Called under the device lock; a pause is to be announced.
    pub(crate) fn toggle_pause(&self) {
        self.bump(1);
    }

    /// Whether `generation`, as read from [`word`](Self::word), is that of a paused device.
    #[inline]
    pub(crate) const fn is_paused(generation: u64) -> bool {
        generation & 1 == 1
    }

    /// On return each worker either sees what was taken away before, or is seen by [`quiesced`]. Needs no lock; never waits.
    pub(crate) fn announce(&self, workers: &[Slot]) {
        if broken(Rule::ShooterFence) {
            return;
        }
        // S2. Pairs with the fences in `Slot::try_open` and `Slot::enter_element_mode`.
        fence(Ordering::SeqCst);
        // Acquire: pairs with the Release in `Slot::leave_element_mode`.
        let acquire = ordering(Ordering::Acquire, Rule::ModeAcquire);
        if workers.iter().any(|w| w.mode.load(acquire) != 0) {
            // Pairs with the light fence in `Slot::access`.
            heavy_fence();
        }
    }

    fn bump(&self, by: u64) {
        // One writer at a time (the device lock), so no read-modify-write. Release: pairs with the Acquire in `Slot::access`.
        let release = ordering(Ordering::Release, Rule::BumpRelease);
        self.current
            .store(self.current.load(Ordering::Relaxed) + by, release);
    }
}

/// Whether no access that relies on a translation taken away before is still in flight, on pages for which `intersects` says true.
///
/// A look, not a wait.
pub(crate) fn quiesced(
    workers: &[Slot],
    users: Users,
    intersects: impl Fn(Range<u64>) -> bool,
) -> bool {
    !workers.iter().any(|w| w.uses(users, &intersects))
}
