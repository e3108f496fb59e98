//! A mutual-exclusion lock of one word.
//!
//! | word | meaning | who may set it |
//! |---|---|---|
//! | 0 | unlocked | the holder, unlocking |
//! | 1 | locked, nobody sleeps | a locker, from 0 |
//! | 2 | locked, somebody may sleep | a locker that is going to sleep, or that slept |
//!
//! A locker that once found the lock taken sets 2 from then on, even when that gets it the lock: it cannot know whether
//! others sleep still, and a wake too many costs a system call where a wake too few costs a thread.
//! (Drepper, "Futexes are tricky", mutex 2.)
//!
//! *Safety.* The word leaves 0 only by a read-modify-write that finds it 0, and returns to 0 only by its holder. Unlock's
//! Release pairs with every such read-modify-write's Acquire.
//!
//! *Liveness.* Whoever sleeps has set 2 and slept only if it was still 2. The next unlock takes the 2 away and wakes one, which
//! sets 2 again for those behind it. A locker that gives up at its deadline leaves the 2: a wake too many.
//!
//! There is no poisoning: a guard dropped by a panic unlocks. Whoever can panic with the data torn must not hold this lock.

use super::mutation::{Mutation, mutated, ordering};
use super::shim::atomic::Ordering::{Acquire, Relaxed, Release};
use super::shim::{Backoff, UnsafeCell, point};
use super::{Deadline, Futex, Woken};
use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};

const UNLOCKED: u32 = 0;
const LOCKED: u32 = 1;
const CONTENDED: u32 = 2;

/// A mutual-exclusion lock fit for a signal handler.
///
/// It does not allocate, needs no thread-local and no destructor, and zero bytes followed by zero bytes valid for `T` are an
/// unlocked lock, so that an array of them can live in a fresh mapping.
///
/// Not re-entrant, not fair. A thread that holds one which a handler may take must keep that handler out: by not touching
/// memory that can fault, and by masking asynchronous signals.
#[repr(C)]
pub struct Mutex<T> {
    word: Futex,
    value: UnsafeCell<T>,
}

// SAFETY: the lock hands out access to `value` to one thread at a time, and moving the lock moves `T`.
unsafe impl<T: Send> Send for Mutex<T> {}
// SAFETY: as above; `&Mutex<T>` gives a `&mut T` on whichever thread holds the lock, so `T: Send` is what it takes.
unsafe impl<T: Send> Sync for Mutex<T> {}

/// Holds a [`Mutex`]; dropping it unlocks.
#[must_use = "the lock is held only while the guard lives"]
pub struct MutexGuard<'a, T> {
    lock: &'a Mutex<T>,
    /// Not `Send`: what runs between lock and unlock is one thread with its signals masked.
    _here: PhantomData<*const ()>,
}

// SAFETY: a shared guard gives `&T` only.
unsafe impl<T: Sync> Sync for MutexGuard<'_, T> {}

impl<T> Mutex<T> {
    /// An unlocked lock.
    #[cfg(not(svm_loom))]
    pub const fn new(value: T) -> Self {
        Self {
            word: Futex::new(UNLOCKED),
            value: UnsafeCell::new(value),
        }
    }

    /// An unlocked lock.
    #[cfg(svm_loom)]
    pub fn new(value: T) -> Self {
        Self {
            word: Futex::new(UNLOCKED),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        if !self.try_acquire() {
            self.lock_contended(Deadline::NEVER);
        }
        self.guard()
    }

    /// Takes the lock if nobody holds it.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.try_acquire().then(|| self.guard())
    }

    /// Waits for the lock until `deadline`.
    #[inline]
    pub fn lock_until(&self, deadline: Deadline) -> Option<MutexGuard<'_, T>> {
        (self.try_acquire() || self.lock_contended(deadline)).then(|| self.guard())
    }

    /// Whether somebody holds the lock at this moment: for assertions and reports.
    pub fn is_locked(&self) -> bool {
        self.word.load(Relaxed) != UNLOCKED
    }

    fn guard(&self) -> MutexGuard<'_, T> {
        MutexGuard {
            lock: self,
            _here: PhantomData,
        }
    }

    #[inline]
    fn try_acquire(&self) -> bool {
        point();
        // Acquire: pairs with the Release in `unlock`.
        self.word
            .compare_exchange(
                UNLOCKED,
                LOCKED,
                ordering(Acquire, Mutation::MutexLockRelaxed),
                Relaxed,
            )
            .is_ok()
    }

    #[cold]
    fn lock_contended(&self, deadline: Deadline) -> bool {
        if mutated(Mutation::MutexBarges) {
            return true;
        }
        let mut backoff = Backoff::default();
        while self.word.load(Relaxed) == LOCKED && !backoff.spin() {}
        if self.try_acquire() {
            return true;
        }
        // Acquire: pairs with the Release in `unlock`, for the swap that finds 0.
        let sleeping = if mutated(Mutation::MutexForgetsSleepers) {
            LOCKED
        } else {
            CONTENDED
        };
        let acquire = ordering(Acquire, Mutation::MutexContendedRelaxed);
        while self.word.swap(sleeping, acquire) != UNLOCKED {
            if self.word.wait(sleeping, deadline) == Woken::TimedOut {
                let acquire = ordering(Acquire, Mutation::MutexTimedOutRelaxed);
                return self.word.swap(CONTENDED, acquire) == UNLOCKED;
            }
        }
        true
    }

    #[inline]
    fn unlock(&self) {
        // Release: pairs with the Acquire of the read-modify-write that next finds 0.
        if self
            .word
            .swap(UNLOCKED, ordering(Release, Mutation::MutexUnlockRelaxed))
            == CONTENDED
        {
            self.word.wake_one();
        }
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> fmt::Debug for Mutex<T> {
    /// Does not lock, hence does not show the value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mutex")
            .field("is_locked", &self.is_locked())
            .finish_non_exhaustive()
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard holds the lock, so no `&mut T` exists but through this guard, whose borrow forbids it now.
        self.lock.value.with(|value| unsafe { &*value })
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard holds the lock and is borrowed uniquely, so this is the only reference to the value.
        self.lock.value.with_mut(|value| unsafe { &mut *value })
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.lock.unlock();
    }
}

impl<T: fmt::Debug> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        T::fmt(self, f)
    }
}

/// The same interface over loom's own lock, for models of what is built on a lock.
///
/// `models::mutex` shows that the word above excludes, orders and wakes as loom's lock does; that done, modelling each lock
/// operation of a larger protocol as a word with a futex would multiply schedules and find nothing new. It has no `try_lock`:
/// loom switches threads at a lock and not at an unlock, so a lock that is held is rarely seen held.
#[cfg(svm_loom)]
pub(crate) mod ideal {
    /// See [`super::Mutex`].
    #[derive(Debug)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
            self.0.lock().expect("loom does not poison")
        }
    }
}

#[cfg(all(test, not(svm_loom)))]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicU64;
    use core::time::Duration;
    use std::thread;

    #[test]
    fn excludes() {
        let lock = Mutex::new((0_u64, 0_u64));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        let mut pair = lock.lock();
                        pair.0 += 1;
                        let half = pair.0;
                        pair.1 += 1;
                        assert_eq!(half, pair.1);
                    }
                });
            }
        });
        assert_eq!(*lock.lock(), (80_000, 80_000));
        assert!(!lock.is_locked());
    }

    #[test]
    fn gives_up_at_the_deadline_and_not_before() {
        let lock = Mutex::new(());
        let held = lock.lock();
        assert!(lock.try_lock().is_none());
        assert!(lock.lock_until(Deadline::PASSED).is_none());
        let begun = std::time::Instant::now();
        assert!(
            lock.lock_until(Deadline::after(Duration::from_millis(20)))
                .is_none()
        );
        assert!(begun.elapsed() >= Duration::from_millis(20));
        drop(held);
        assert!(lock.lock_until(Deadline::PASSED).is_some());
    }

    #[test]
    fn a_panic_unlocks() {
        let lock = Mutex::new(7);
        let panicked = thread::scope(|scope| {
            scope
                .spawn(|| {
                    let _held = lock.lock();
                    std::panic::resume_unwind(Box::new(()));
                })
                .join()
        });
        assert!(panicked.is_err());
        assert_eq!(*lock.try_lock().expect("the unwinding guard unlocked"), 7);
    }

    #[test]
    fn zero_bytes_are_an_unlocked_lock() {
        let mut raw = core::mem::MaybeUninit::<[Mutex<AtomicU64>; 3]>::zeroed();
        // SAFETY: a lock is a word and a cell; zero is `UNLOCKED` and an `AtomicU64` of zero.
        let locks = unsafe { raw.assume_init_mut() };
        for lock in locks {
            assert_eq!(lock.try_lock().expect("unlocked").load(Relaxed), 0);
        }
    }
}
