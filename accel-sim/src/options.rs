//! How an accelerator is built.

use std::time::Duration;

use crate::error::Error;

/// Workers that an accelerator can have.
pub const MAX_WORKERS: usize = 256;

/// Entries that a worker's translation cache has at least.
pub const MIN_CACHE_ENTRIES: usize = 8;

/// Entries that a worker's translation cache can have.
pub const MAX_CACHE_ENTRIES: usize = 1 << 16;

/// The shape of an accelerator. `Options::new()` has a worker for each CPU and device memory without limit.
///
/// ```
/// let options = accel_sim::Options::new().workers(2).memory_bytes(64 << 20);
/// assert_eq!(options.workers, 2);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Number of worker threads.
    pub workers: usize,
    /// Bytes of device memory; `None` is without limit. With less than a working set, pages are evicted.
    pub memory_bytes: Option<usize>,
    /// Entries of each worker's translation cache: a power of two.
    pub cache_entries: usize,
    /// How long a far fault may go without progress before it ends its launch.
    pub fault_timeout: Duration,
    /// How long the CPU, or another device, waits for a slice kernel that holds a page it needs. Past that the page is taken, and a
    /// kernel that touches it afterwards ends its launch with [`DeviceFaultKind::Stuck`](svm::DeviceFaultKind::Stuck).
    ///
    /// Its frames stay where they are, and never run again; what the launch has borrowed is the caller's once more. That is sound for
    /// a kernel whose borrows are used by its own thread. One that lends them to threads which it starts (`std::thread::scope`, rayon, a
    /// launch on another accelerator) and waits for must not be late: they would go on with what is not theirs any more. Give such
    /// a launch a deadline that it cannot miss: `Duration::MAX` is for ever.
    pub span_deadline: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            workers: std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_WORKERS)),
            memory_bytes: None,
            cache_entries: 256,
            fault_timeout: Duration::from_secs(1),
            span_deadline: Duration::from_secs(2),
        }
    }
}

impl Options {
    /// A worker for each CPU, device memory without limit.
    #[must_use]
    pub fn new() -> Options {
        Options::default()
    }

    /// Sets the number of workers.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Options {
        self.workers = workers;
        self
    }

    /// Limits device memory.
    #[must_use]
    pub fn memory_bytes(mut self, bytes: usize) -> Options {
        self.memory_bytes = Some(bytes);
        self
    }

    /// Sets the entries of each worker's translation cache.
    #[must_use]
    pub fn cache_entries(mut self, entries: usize) -> Options {
        self.cache_entries = entries;
        self
    }

    /// Sets how long a far fault may go without progress.
    #[must_use]
    pub fn fault_timeout(mut self, timeout: Duration) -> Options {
        self.fault_timeout = timeout;
        self
    }

    /// Sets how long others wait for a slice kernel that holds a page they need.
    #[must_use]
    pub fn span_deadline(mut self, deadline: Duration) -> Options {
        self.span_deadline = deadline;
        self
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.workers == 0 || self.workers > MAX_WORKERS {
            return Err(Error::BadWorkerCount(self.workers));
        }
        let sizes = MIN_CACHE_ENTRIES..=MAX_CACHE_ENTRIES;
        if !self.cache_entries.is_power_of_two() || !sizes.contains(&self.cache_entries) {
            return Err(Error::BadCacheSize(self.cache_entries));
        }
        if self.memory_bytes == Some(0) {
            return Err(Error::NoDeviceMemory);
        }
        Ok(())
    }
}
