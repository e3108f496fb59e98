//! What the workers did.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

/// One worker's counters. That worker alone writes them, so a count is a load and a store; anyone may read them.
#[derive(Debug, Default)]
pub(crate) struct Counters(CachePadded<Inner>);

#[derive(Debug, Default)]
struct Inner {
    hits: AtomicU64,
    misses: AtomicU64,
    far_faults: AtomicU64,
    coalesced: AtomicU64,
    items: AtomicU64,
    bounced: AtomicU64,
}

fn add(counter: &AtomicU64, n: u64) {
    // Relaxed: a statistic orders nothing.
    counter.store(counter.load(Ordering::Relaxed) + n, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn looked_up(&self, hits: u64, misses: u64) {
        add(&self.0.hits, hits);
        add(&self.0.misses, misses);
    }

    pub(crate) fn far_fault(&self) {
        add(&self.0.far_faults, 1);
    }

    pub(crate) fn coalesced(&self) {
        add(&self.0.coalesced, 1);
    }

    pub(crate) fn item(&self) {
        add(&self.0.items, 1);
    }

    pub(crate) fn bounced(&self) {
        add(&self.0.bounced, 1);
    }

    pub(crate) fn snapshot(&self) -> WorkerStats {
        let read = |c: &AtomicU64| c.load(Ordering::Relaxed);
        WorkerStats {
            tlb_hits: read(&self.0.hits),
            tlb_misses: read(&self.0.misses),
            far_faults: read(&self.0.far_faults),
            coalesced: read(&self.0.coalesced),
            items: read(&self.0.items),
            bounced: read(&self.0.bounced),
        }
    }
}

/// What one worker did since the accelerator was built, as of the end of its last batch of items.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerStats {
    /// Element accesses whose translation was in the worker's cache.
    pub tlb_hits: u64,
    /// Element accesses whose translation was not, and was walked to or faulted in.
    pub tlb_misses: u64,
    /// Rounds of the range protocol that this worker ran to get pages.
    pub far_faults: u64,
    /// Far faults that found their pages there, since another worker had just fetched them.
    pub coalesced: u64,
    /// Work items: chunks of slices, and batches of element items.
    pub items: u64,
    /// Spans that were worked on in a copy: they lay partly in device memory and partly not, or device memory was too tight for all spans
    /// of their item.
    pub bounced: u64,
}

impl std::ops::AddAssign for WorkerStats {
    fn add_assign(&mut self, other: WorkerStats) {
        self.tlb_hits += other.tlb_hits;
        self.tlb_misses += other.tlb_misses;
        self.far_faults += other.far_faults;
        self.coalesced += other.coalesced;
        self.items += other.items;
        self.bounced += other.bounced;
    }
}

/// What an accelerator did since it was built.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Stats {
    /// What its workers did.
    pub workers: Vec<WorkerStats>,
    /// What the runtime did for it: pages moved by cause, retries, invalidations.
    pub runtime: svm::Stats,
}

impl Stats {
    /// All workers together.
    #[must_use]
    pub fn total(&self) -> WorkerStats {
        let mut total = WorkerStats::default();
        for worker in &self.workers {
            total += *worker;
        }
        total
    }

    /// Share of element accesses that hit the translation cache, if there were any.
    #[must_use]
    pub fn tlb_hit_rate(&self) -> Option<f64> {
        let total = self.total();
        let lookups = total.tlb_hits + total.tlb_misses;
        (lookups > 0).then(|| total.tlb_hits as f64 / lookups as f64)
    }
}
