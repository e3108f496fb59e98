//! The handles by which an element kernel loads and stores the elements of its views.

use std::fmt;
use std::marker::PhantomData;

use bytemuck::Pod;
use svm::{DeviceFault, Ptr};

use crate::lane::{Lane, Reach};
use crate::ops::{Load, Op, Store, rmw};
use crate::view::sealed::Handle;
use crate::words::Atomic;

/// A view that an element kernel reads.
pub struct Elements<'s, T> {
    lane: &'s Lane<'s>,
    reach: Reach<'s>,
    addr: usize,
    len: usize,
    _elements: PhantomData<T>,
}

/// A view that an element kernel reads and writes. Several lanes may do so at once: every access is a relaxed atomic, by words.
pub struct ElementsMut<'s, T>(Elements<'s, T>);

impl<T> Clone for Elements<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Elements<'_, T> {}

impl<T> Clone for ElementsMut<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for ElementsMut<'_, T> {}

impl<T> fmt::Debug for Elements<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Elements")
            .field("addr", &format_args!("{:#x}", self.addr))
            .field("len", &self.len)
            .finish()
    }
}

impl<T> fmt::Debug for ElementsMut<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'s, T: Pod> Elements<'s, T> {
    pub(crate) fn new(handle: Handle<'s>) -> Elements<'s, T> {
        let view = handle.lane.views[handle.view]
            .as_ref()
            .expect("an argument with elements is a view");
        Elements {
            lane: handle.lane,
            reach: Reach::new(handle.lane.worker, handle.lane.spaces, view.space),
            addr: view.addr,
            len: view.len,
            _elements: PhantomData,
        }
    }

    /// Number of elements.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Loads element `i`.
    ///
    /// # Errors
    ///
    /// What keeps its page from coming.
    ///
    /// # Panics
    ///
    /// If there is no element `i`; that ends the launch with an error.
    #[inline]
    pub fn load(&self, i: usize) -> Result<T, DeviceFault> {
        self.access(i, Load(PhantomData))
    }

    /// The pointer to element `i`, for [`Lane::load`] and for storing in memory.
    ///
    /// # Panics
    ///
    /// If there is no element `i`.
    #[must_use]
    #[inline]
    pub fn ptr(&self, i: usize) -> Ptr<T> {
        Ptr::from_addr(self.addr_of(i))
    }

    #[inline(always)]
    #[track_caller]
    fn addr_of(&self, i: usize) -> usize {
        assert!(
            i < self.len,
            "index {i} is out of range for a view of {} elements",
            self.len
        );
        self.addr + i * size_of::<T>()
    }

    #[inline(always)]
    fn access<O: Op>(&self, i: usize, op: O) -> Result<O::Out, DeviceFault> {
        self.lane.access(self.reach, self.addr_of(i), op)
    }
}

impl<'s, T: Pod> ElementsMut<'s, T> {
    pub(crate) fn new(handle: Handle<'s>) -> ElementsMut<'s, T> {
        ElementsMut(Elements::new(handle))
    }

    /// Number of elements.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether there are none.
    #[must_use]
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// Loads element `i`.
    ///
    /// # Errors
    ///
    /// What keeps its page from coming.
    ///
    /// # Panics
    ///
    /// If there is no element `i`; that ends the launch with an error.
    #[inline]
    pub fn load(&self, i: usize) -> Result<T, DeviceFault> {
        self.0.load(i)
    }

    /// Stores element `i`.
    ///
    /// # Errors
    ///
    /// What keeps its page from coming, writable.
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load).
    #[inline]
    pub fn store(&self, i: usize, value: T) -> Result<(), DeviceFault> {
        self.0.access(i, Store(value))
    }

    /// The pointer to element `i`.
    ///
    /// # Panics
    ///
    /// If there is no element `i`.
    #[must_use]
    #[inline]
    pub fn ptr(&self, i: usize) -> Ptr<T> {
        self.0.ptr(i)
    }
}

impl<T: Atomic> ElementsMut<'_, T> {
    /// Atomically adds to element `i`; returns the value before.
    ///
    /// # Errors
    ///
    /// What keeps its page from coming, writable.
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load).
    #[inline]
    pub fn fetch_add(&self, i: usize, operand: T) -> Result<T, DeviceFault> {
        self.0.access(
            i,
            rmw::<T, _>(|at| {
                // SAFETY: `access` gives the address of an aligned element that is only accessed atomically.
                unsafe { T::fetch_add(at, operand) }
            }),
        )
    }

    /// Atomically lowers element `i` to `operand` if that is less; returns the value before.
    ///
    /// # Errors
    ///
    /// As [`fetch_add`](Self::fetch_add).
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load).
    #[inline]
    pub fn fetch_min(&self, i: usize, operand: T) -> Result<T, DeviceFault> {
        self.0.access(
            i,
            rmw::<T, _>(|at| {
                // SAFETY: as in `fetch_add`.
                unsafe { T::fetch_min(at, operand) }
            }),
        )
    }

    /// Atomically raises element `i` to `operand` if that is more; returns the value before.
    ///
    /// # Errors
    ///
    /// As [`fetch_add`](Self::fetch_add).
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load).
    #[inline]
    pub fn fetch_max(&self, i: usize, operand: T) -> Result<T, DeviceFault> {
        self.0.access(
            i,
            rmw::<T, _>(|at| {
                // SAFETY: as in `fetch_add`.
                unsafe { T::fetch_max(at, operand) }
            }),
        )
    }

    /// Atomically replaces element `i`; returns the value before.
    ///
    /// # Errors
    ///
    /// As [`fetch_add`](Self::fetch_add).
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load).
    #[inline]
    pub fn swap(&self, i: usize, value: T) -> Result<T, DeviceFault> {
        self.0.access(
            i,
            rmw::<T, _>(|at| {
                // SAFETY: as in `fetch_add`.
                unsafe { T::swap(at, value) }
            }),
        )
    }

    /// Atomically replaces element `i` if it is `current`. `Ok(Err(value))` says what was there instead.
    ///
    /// # Errors
    ///
    /// As [`fetch_add`](Self::fetch_add).
    ///
    /// # Panics
    ///
    /// As [`load`](Self::load).
    #[inline]
    pub fn compare_exchange(
        &self,
        i: usize,
        current: T,
        new: T,
    ) -> Result<Result<T, T>, DeviceFault> {
        self.0.access(
            i,
            rmw::<T, _>(|at| {
                // SAFETY: as in `fetch_add`.
                unsafe { T::compare_exchange(at, current, new) }
            }),
        )
    }
}
