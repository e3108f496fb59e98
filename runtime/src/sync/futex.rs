//! A word that threads can sleep on.
//!
//! One interface, two bodies. On Linux it is `futex(2)` with an absolute `CLOCK_MONOTONIC` deadline. In a model it is the
//! kernel's algorithm on loom's primitives: the *bucket* lock makes "compare, then sleep" atomic against "wake", as the hash
//! bucket's lock does in `kernel/futex`. That is all the code above relies on:
//!
//! * F1 a `wait(expected)` that finds another value does not sleep;
//! * F2 a write to the word followed by a `wake` leaves no thread asleep that slept before the write was to be seen: whoever
//!   takes the bucket second sees the other. The write itself may be relaxed.

use super::Deadline;
use super::shim::atomic::AtomicU32;
use core::ops::Deref;

/// Why a sleeper woke.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// It was woken, or the word had changed, or for no reason: look again.
    LookAgain,
    /// The deadline has passed: look once more, then give up.
    TimedOut,
}

/// A 32-bit atomic word with sleepers.
#[derive(Debug)]
#[cfg_attr(not(loom), repr(transparent))]
pub(crate) struct Futex {
    word: AtomicU32,
    #[cfg(loom)]
    bucket: loom::sync::Mutex<()>,
    #[cfg(loom)]
    sleepers: loom::sync::Condvar,
}

impl Deref for Futex {
    type Target = AtomicU32;

    #[inline]
    fn deref(&self) -> &AtomicU32 {
        &self.word
    }
}

#[cfg(not(loom))]
impl Futex {
    pub(crate) const fn new(value: u32) -> Self {
        Self {
            word: AtomicU32::new(value),
        }
    }

    /// Sleeps while the word is `expected`, until woken or `deadline`.
    #[cold]
    pub(crate) fn wait(&self, expected: u32, deadline: Deadline) -> Woken {
        if deadline == Deadline::PASSED {
            return Woken::TimedOut;
        }
        host::wait(&self.word, expected, deadline)
    }

    /// Wakes one sleeper, if there is any.
    #[cold]
    pub(crate) fn wake_one(&self) {
        host::wake(&self.word, 1);
    }

    /// Wakes every sleeper.
    #[cold]
    pub(crate) fn wake_all(&self) {
        host::wake(&self.word, i32::MAX);
    }
}

#[cfg(loom)]
impl Futex {
    pub(crate) fn new(value: u32) -> Self {
        Self {
            word: AtomicU32::new(value),
            bucket: loom::sync::Mutex::new(()),
            sleepers: loom::sync::Condvar::new(),
        }
    }

    /// In a model a deadline has passed or never comes: loom has no time.
    pub(crate) fn wait(&self, expected: u32, deadline: Deadline) -> Woken {
        use super::shim::atomic::Ordering::Relaxed;
        if deadline.has_passed() {
            return Woken::TimedOut;
        }
        let bucket = self.bucket.lock().expect("loom does not poison");
        if self.word.load(Relaxed) == expected {
            drop(self.sleepers.wait(bucket));
        }
        Woken::LookAgain
    }

    pub(crate) fn wake_one(&self) {
        let _bucket = self.bucket.lock().expect("loom does not poison");
        self.sleepers.notify_one();
    }

    pub(crate) fn wake_all(&self) {
        let _bucket = self.bucket.lock().expect("loom does not poison");
        self.sleepers.notify_all();
    }
}

#[cfg(loom)]
pub(super) fn monotonic_ns() -> u64 {
    0
}

#[cfg(not(loom))]
pub(super) use host::monotonic_ns;

/// The system calls. They move to `sys::futex` and `sys::clock` when those are merged.
#[cfg(all(target_os = "linux", not(loom)))]
mod host {
    use super::{Deadline, Woken};
    use core::ptr;
    use core::sync::atomic::AtomicU32;

    pub(super) fn wait(word: &AtomicU32, expected: u32, deadline: Deadline) -> Woken {
        let timeout = deadline.as_ns().map(timespec);
        let timeout = timeout.as_ref().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: FUTEX_WAIT_BITSET reads `word`, which outlives the call by its borrow, and `timeout`, which is null or
        // points to a local; the bitset must not be zero, and is not. The call writes no memory of ours.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG,
                expected,
                timeout,
                ptr::null::<u32>(),
                libc::FUTEX_BITSET_MATCH_ANY,
            )
        };
        if rc == -1 && errno() == libc::ETIMEDOUT {
            Woken::TimedOut
        } else {
            Woken::LookAgain
        }
    }

    pub(super) fn wake(word: &AtomicU32, at_most: i32) {
        // SAFETY: FUTEX_WAKE uses the address of `word` as a key only.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                at_most,
            );
        }
    }

    pub(in crate::sync) fn monotonic_ns() -> u64 {
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `now` is a local that the call fills in.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
        // The monotonic clock is never negative.
        now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
    }

    fn timespec(at_ns: u64) -> libc::timespec {
        // A `u64` of nanoseconds is 585 years: the seconds fit any `time_t`, the rest is below 10^9.
        libc::timespec {
            tv_sec: (at_ns / 1_000_000_000)
                .try_into()
                .unwrap_or(libc::time_t::MAX),
            tv_nsec: (at_ns % 1_000_000_000).try_into().unwrap_or(0),
        }
    }

    fn errno() -> i32 {
        // SAFETY: no precondition. It is a plain, not a lazy, thread-local of the C library.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: the address of this thread's errno is valid, aligned and this thread's alone while the thread lives.
        unsafe { *errno }
    }
}

/// Elsewhere nothing can be mirrored; the primitives are correct, by giving up the processor in place of sleeping.
#[cfg(all(not(target_os = "linux"), not(loom)))]
mod host {
    use super::{Deadline, Woken};
    use core::sync::atomic::{AtomicU32, Ordering};
    use std::sync::OnceLock;
    use std::time::Instant;

    pub(super) fn wait(word: &AtomicU32, expected: u32, deadline: Deadline) -> Woken {
        while word.load(Ordering::Relaxed) == expected {
            if deadline.has_passed() {
                return Woken::TimedOut;
            }
            std::thread::yield_now();
        }
        Woken::LookAgain
    }

    pub(super) fn wake(_: &AtomicU32, _: i32) {}

    pub(in crate::sync) fn monotonic_ns() -> u64 {
        static ORIGIN: OnceLock<Instant> = OnceLock::new();
        let since = ORIGIN.get_or_init(Instant::now).elapsed().as_nanos();
        1 + u64::try_from(since).unwrap_or(u64::MAX - 1)
    }
}
