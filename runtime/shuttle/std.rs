//! `std`, with threads, locks and time that Shuttle schedules.
//!
//! The crate root of the models says `extern crate std_for_models as std`. So the runtime's files, which are compiled there as
//! they are, get these in place of the system's: a lock that is held across a scheduling point, or a sleep, would otherwise stop the one thread
//! that all threads of a model are run by. Everything else is the real `std`.
#![cfg(svm_shuttle)]

pub use ::std::*;

/// `std::thread`, by Shuttle.
pub mod thread {
    pub use ::shuttle::thread::{
        JoinHandle, Thread, ThreadId, current, panicking, park, spawn, yield_now,
    };
    use ::std::io;
    use ::std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use ::std::time::Duration;

    /// What a thread that never ends otherwise is unwound with when its schedule is over.
    #[derive(Debug)]
    pub struct Over;

    /// Sleeps: time passes.
    pub fn sleep(duration: Duration) {
        super::time::pass(duration);
        yield_now();
    }

    /// `std::thread::Builder`, for threads that nobody joins.
    #[derive(Debug, Default)]
    pub struct Builder(::shuttle::thread::Builder);

    impl Builder {
        /// A thread without a name.
        #[must_use]
        pub fn new() -> Self {
            Self::default()
        }

        /// Names it.
        #[must_use]
        pub fn name(self, name: String) -> Self {
            Self(self.0.name(name))
        }

        /// Starts it. It may be unwound with [`Over`].
        ///
        /// # Errors
        /// None.
        pub fn spawn<F: FnOnce() + Send + 'static>(self, f: F) -> io::Result<JoinHandle<()>> {
            self.0.spawn(|| match catch_unwind(AssertUnwindSafe(f)) {
                Err(payload) if !payload.is::<Over>() => resume_unwind(payload),
                _ => {}
            })
        }
    }
}

/// `std::sync`, but for the lock.
pub mod sync {
    pub use ::std::sync::{MutexGuard, *};

    /// `std::sync::Mutex`, which lets other threads of the model go on while it is held.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(::std::sync::Mutex<T>);

    impl<T> Mutex<T> {
        /// An unlocked lock.
        pub const fn new(value: T) -> Self {
            Self(::std::sync::Mutex::new(value))
        }

        /// The lock, if nobody has it.
        ///
        /// # Errors
        /// As `std`'s.
        pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
            self.0.try_lock()
        }

        /// Waits for the lock. Who waits for ever is found by the bound on a schedule's steps.
        ///
        /// # Errors
        /// As `std`'s.
        pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
            loop {
                match self.0.try_lock() {
                    Ok(guard) => return Ok(guard),
                    Err(TryLockError::Poisoned(poisoned)) => return Err(poisoned),
                    Err(TryLockError::WouldBlock) => ::shuttle::thread::yield_now(),
                }
            }
        }
    }
}

/// `std::time`, but for what o'clock it is.
pub mod time {
    use ::std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    pub use ::std::time::Duration;

    static NOW_NS: AtomicU64 = AtomicU64::new(START_NS);
    const START_NS: u64 = 1_000_000_000;
    /// What reading the clock takes: time passes by being looked at, and by sleeping.
    const LOOK_NS: u64 = 100;

    /// A new schedule begins: so does time.
    pub fn restart() {
        NOW_NS.store(START_NS, Relaxed);
    }

    /// Nanoseconds on the models' monotonic clock.
    pub fn monotonic_ns() -> u64 {
        NOW_NS.fetch_add(LOOK_NS, Relaxed)
    }

    /// Time passes.
    pub fn pass(duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 2);
        NOW_NS.fetch_add(ns, Relaxed);
    }

    /// Time passes up to `at_ns`, if it is not later already.
    pub fn pass_until(at_ns: u64) {
        NOW_NS.fetch_max(at_ns, Relaxed);
    }

    /// `std::time::Instant` on that clock.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub struct Instant(u64);

    impl Instant {
        /// Now.
        #[must_use]
        pub fn now() -> Self {
            Self(monotonic_ns())
        }
    }

    impl ::std::ops::Add<Duration> for Instant {
        type Output = Self;
        fn add(self, duration: Duration) -> Self {
            Self(self.0 + u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 2))
        }
    }
}
