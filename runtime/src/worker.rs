//! What a device's own threads need of the runtime.

use core::fmt;

use crate::device::ThreadId;
use crate::sys::membarrier;
use crate::sys::signal::{self, AsyncSignalsBlocked};
use crate::sys::thread::{self, Thread};

/// Masks asynchronous signals on this thread while it lives.
///
/// A device's worker takes the device lock and, through [`Range`](crate::Range), locks of the runtime. A signal handler that
/// interrupted it there and touched mirrored memory would wait for those very locks. So every worker begins with this, and
/// keeps it for its life.
#[must_use = "signals are unmasked again when it is dropped"]
pub struct WorkerThread {
    _signals: AsyncSignalsBlocked,
}

impl WorkerThread {
    /// The calling thread's name, for [`Device::overrun`](crate::Device::overrun): the guard is of the thread that made it.
    #[must_use]
    pub fn id(&self) -> ThreadId {
        ThreadId::of(signal::thread_pointer())
    }
}

/// Makes the calling thread fit to be a device's worker. See [`WorkerThread`].
pub fn worker_thread() -> WorkerThread {
    WorkerThread {
        _signals: AsyncSignalsBlocked::new(),
    }
}

/// A thread that [`spawn_thread`] has started. Dropped, it is left to itself.
#[derive(Debug)]
pub struct ThreadHandle(Thread);

impl ThreadHandle {
    /// Waits until the thread has ended, also if by a panic.
    pub fn join(self) {
        self.0.join();
    }
}

/// Starts a thread of a device, as [`std::thread::Builder`] does, and also in a forked child: there a thread of `std`'s may hang for
/// ever as it starts, for a lock that another thread of the parent had at the fork.
///
/// ```
/// let worker = svm::spawn_thread("worker", || assert_eq!(1 + 1, 2))?;
/// worker.join();
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// The system's, if there is no thread to be had; `name` contains a zero byte.
///
/// # Panics
/// As [`std::thread::Builder::spawn`], if `name` contains a zero byte.
pub fn spawn_thread(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> std::io::Result<ThreadHandle> {
    thread::spawn(name, body).map(ThreadHandle)
}

/// A barrier on every running thread of the process, paid for by the caller alone.
///
/// Pairs with a compiler fence on the other side: each thread's accesses before its fence are visible to the caller after
/// this returns, or the thread's accesses after its fence see what the caller did before. `membarrier(2)`,
/// `PRIVATE_EXPEDITED`; where the kernel has none, [`light_barrier`] is a full fence and this one too.
pub fn heavy_barrier() {
    membarrier::heavy();
}

/// The cheap side of [`heavy_barrier`]: a compiler fence, where the kernel has `membarrier(2)`.
#[inline]
pub fn light_barrier() {
    membarrier::light();
}

/// Whether [`light_barrier`] is a compiler fence and no more, so that a hit path may have that instead. Decided once, at the first use of
/// the runtime, and for good.
#[must_use]
pub fn barriers_are_asymmetric() -> bool {
    membarrier::is_asymmetric()
}

impl fmt::Debug for WorkerThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerThread").finish_non_exhaustive()
    }
}
