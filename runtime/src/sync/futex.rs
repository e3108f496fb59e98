//! A word that threads can sleep on.
//!
//! One interface, two bodies. Outside models it is `futex(2)` with an absolute `CLOCK_MONOTONIC` deadline. In a model it is the
//! kernel's algorithm on loom's primitives: the *bucket* lock makes "compare, then sleep" atomic against "wake", as the hash
//! bucket's lock does in `kernel/futex`. That is all the code above relies on:
//!
//! * F1 a `wait(expected)` that finds another value does not sleep;
//! * F2 a write to the word followed by a `wake` leaves no thread asleep that slept before the write was to be seen: whoever
//!   takes the bucket second sees the other. The write itself may be relaxed.

use super::Deadline;
use super::shim::atomic::AtomicU32;
#[cfg(not(svm_loom))]
use crate::sys::{self, futex::Waited};
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
#[cfg_attr(not(svm_loom), repr(transparent))]
pub(crate) struct Futex {
    word: AtomicU32,
    #[cfg(svm_loom)]
    bucket: loom::sync::Mutex<()>,
    #[cfg(svm_loom)]
    sleepers: loom::sync::Condvar,
}

impl Deref for Futex {
    type Target = AtomicU32;

    #[inline]
    fn deref(&self) -> &AtomicU32 {
        &self.word
    }
}

#[cfg(not(svm_loom))]
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
        match sys::futex::wait(&self.word, expected, deadline.as_ns()) {
            Waited::TimedOut => Woken::TimedOut,
            Waited::Woken | Waited::Changed | Waited::Interrupted => Woken::LookAgain,
        }
    }

    /// Wakes one sleeper, if there is any.
    #[cold]
    pub(crate) fn wake_one(&self) {
        sys::futex::wake(&self.word, 1);
    }

    /// Wakes every sleeper.
    #[cold]
    pub(crate) fn wake_all(&self) {
        sys::futex::wake_all(&self.word);
    }
}

#[cfg(svm_loom)]
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

#[cfg(svm_loom)]
pub(super) fn monotonic_ns() -> u64 {
    0
}

#[cfg(not(svm_loom))]
pub(super) use sys::clock::monotonic_ns;
