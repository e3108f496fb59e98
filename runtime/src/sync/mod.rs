//! Synchronisation that may be used where a fault is being served.
//!
//! The fault path can run inside a signal handler that interrupted anything, malloc included. So nothing here
//! allocates, panics, logs, or has a lazily initialised thread-local; every type holds its state inline; all blocking is a
//! futex; and every wait takes a [`Deadline`].
//!
//! | type | what it is | cost when nobody contends |
//! |---|---|---|
//! | [`Mutex`] | a lock of one word; zero bytes are an unlocked one | one compare-exchange, one swap |
//! | [`WaitQueue`] | sleeps until a condition holds; the condition is the caller's | waking nobody: one fence, one load |
//! | `Copiers` | what sections copy from that wait for the closer | two compare-exchanges, five stores |
//! | [`Gate`] | sections that run side by side, against a closer that runs alone, with grace periods | two read-modify-writes on a line of few threads |
//!
//! This module is also the one place where the code meets its model checker: everything here and in
//! [`notifier`](crate::notifier) takes atomics, cells, fences, threads and the futex from the private shim below. With
//! `--cfg svm_loom` they are loom's, and the models (`ci/models.sh`) explore the schedules and the weak-memory outcomes of
//! *this* code, not of a copy; which model shows what, and the mutation that breaks it, is in the tables of
//! [`notifier`](crate::notifier). With `--cfg svm_shuttle` they are the machine's, but the futex is a model's, and each lock and each
//! entry of the gate is a point at which Shuttle may switch threads (`runtime/shuttle`): for paths too long for loom.

#[cfg(all(test, svm_loom))]
pub(crate) mod checker;
mod copiers;
mod deadline;
mod futex;
mod gate;
#[cfg(all(test, svm_loom))]
mod models;
mod mutex;
mod wait;

pub(crate) mod mutation;

#[cfg(not(svm_loom))]
pub(crate) use copiers::Copier;
pub(crate) use copiers::{Copiers, PATIENCE};
pub use deadline::Deadline;
pub(crate) use futex::{Futex, Woken};
pub use gate::{Closed, Gate, GateGuard};
#[cfg(svm_loom)]
pub(crate) use mutex::ideal;
pub use mutex::{Mutex, MutexGuard};
pub use wait::WaitQueue;

/// The shim: the machine's primitives, or the model checker's.
pub(crate) mod shim {
    #[cfg(not(svm_loom))]
    pub(crate) mod atomic {
        pub(crate) use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
    }
    #[cfg(svm_loom)]
    pub(crate) mod atomic {
        //! Loom's atomics, made to conflict.
        //!
        //! To decide which schedules can differ, loom 0.7 keeps for each atomic the *last* access alone, and takes two loads
        //! not to conflict. A thread that loads and then stores has itself as the last access before its store, and a
        //! load by another thread before that is forgotten: the schedule in which that load comes in between, or after, is
        //! never tried. (The mutation `HubEventReadLate` was missed so.) Here each access first writes to a companion that is
        //! read by nobody, so that any two accesses conflict and the last one is enough. The write is relaxed and orders
        //! nothing; loads still return every value that the memory model allows.

        pub(crate) use loom::sync::atomic::{Ordering, fence};
        use std::fmt;

        macro_rules! atomic {
            ($name:ident, $value:ty) => {
                pub(crate) struct $name {
                    value: loom::sync::atomic::$name,
                    touched: loom::sync::atomic::AtomicBool,
                }

                #[allow(dead_code, reason = "each has what one of them needs")]
                impl $name {
                    pub(crate) fn new(value: $value) -> Self {
                        Self {
                            value: loom::sync::atomic::$name::new(value),
                            touched: loom::sync::atomic::AtomicBool::new(false),
                        }
                    }

                    fn touch(&self) -> &loom::sync::atomic::$name {
                        self.touched.store(true, Ordering::Relaxed);
                        &self.value
                    }

                    pub(crate) fn load(&self, order: Ordering) -> $value {
                        self.touch().load(order)
                    }

                    pub(crate) fn store(&self, value: $value, order: Ordering) {
                        self.touch().store(value, order);
                    }

                    pub(crate) fn swap(&self, value: $value, order: Ordering) -> $value {
                        self.touch().swap(value, order)
                    }

                    pub(crate) fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                        self.touch().fetch_add(value, order)
                    }

                    pub(crate) fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                        self.touch().fetch_sub(value, order)
                    }

                    pub(crate) fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                        self.touch().fetch_and(value, order)
                    }

                    pub(crate) fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                        self.touch().fetch_or(value, order)
                    }

                    pub(crate) fn fetch_xor(&self, value: $value, order: Ordering) -> $value {
                        self.touch().fetch_xor(value, order)
                    }

                    pub(crate) fn compare_exchange(
                        &self,
                        current: $value,
                        new: $value,
                        success: Ordering,
                        failure: Ordering,
                    ) -> Result<$value, $value> {
                        self.touch()
                            .compare_exchange(current, new, success, failure)
                    }

                    pub(crate) fn compare_exchange_weak(
                        &self,
                        current: $value,
                        new: $value,
                        success: Ordering,
                        failure: Ordering,
                    ) -> Result<$value, $value> {
                        self.touch()
                            .compare_exchange_weak(current, new, success, failure)
                    }
                }

                impl fmt::Debug for $name {
                    /// Not an access of the model's.
                    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.debug_struct(stringify!($name)).finish_non_exhaustive()
                    }
                }
            };
        }

        atomic!(AtomicU32, u32);
        atomic!(AtomicU64, u64);
    }

    #[cfg(svm_loom)]
    pub(crate) use loom::cell::UnsafeCell;

    /// `core`'s cell with loom's interface: the access is a closure, so that the model checker can see it.
    #[cfg(not(svm_loom))]
    #[repr(transparent)]
    #[derive(Debug)]
    pub(crate) struct UnsafeCell<T: ?Sized>(core::cell::UnsafeCell<T>);

    #[cfg(not(svm_loom))]
    impl<T> UnsafeCell<T> {
        pub(crate) const fn new(value: T) -> Self {
            Self(core::cell::UnsafeCell::new(value))
        }

        #[inline]
        pub(crate) fn with<R>(&self, access: impl FnOnce(*const T) -> R) -> R {
            access(self.0.get().cast_const())
        }

        #[inline]
        pub(crate) fn with_mut<R>(&self, access: impl FnOnce(*mut T) -> R) -> R {
            access(self.0.get())
        }
    }

    /// A full fence that only the model checker needs.
    ///
    /// Loom gives a `SeqCst` *access* the strength of acquire-release and models the total order of `SeqCst` *fences* alone
    /// (loom issue 180). Where the code has all four accesses of a store-buffering pair `SeqCst`, which is enough by the
    /// language's memory model and on x86 free after a read-modify-write, this tells loom so.
    #[inline(always)]
    pub(crate) fn fence_for_model() {
        #[cfg(svm_loom)]
        atomic::fence(atomic::Ordering::SeqCst);
    }

    /// A point at which a model of whole fault paths may let another thread run (`runtime/shuttle`): before whatever takes a lock or
    /// enters the gate. Shuttle sees no atomics of its own in here; loom does, and the machine has all the points there are.
    #[inline(always)]
    pub(crate) fn point() {
        #[cfg(svm_shuttle)]
        crate::kernel::point();
    }

    /// In a loop that waits for somebody who is not long about it, but may have to run first.
    pub(crate) fn relax(backoff: &mut Backoff) {
        point();
        #[cfg(svm_loom)]
        loom::thread::yield_now();
        if backoff.spin() {
            #[cfg(not(svm_loom))]
            crate::sys::process::sched_yield();
        }
    }

    /// Whether the model has failed and its threads are being taken down: what is dropped then can do nothing any more.
    #[inline(always)]
    pub(crate) fn model_has_failed() -> bool {
        cfg!(svm_loom) && std::thread::panicking()
    }

    /// Lets the holder of something briefly held go on: first by spinning, then by giving up the processor.
    ///
    /// A model does not spin: that would only be the same schedule several times.
    #[derive(Debug, Default)]
    pub(crate) struct Backoff(u32);

    impl Backoff {
        const SPINS: u32 = 7;

        /// `true` once spinning has been enough and the caller should sleep.
        #[inline]
        pub(crate) fn spin(&mut self) -> bool {
            if cfg!(any(svm_loom, svm_shuttle)) || self.0 >= Self::SPINS {
                return true;
            }
            for _ in 0..1_u32 << self.0 {
                core::hint::spin_loop();
            }
            self.0 += 1;
            false
        }
    }
}
