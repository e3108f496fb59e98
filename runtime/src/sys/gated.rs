//! [`Gated`]: a value that readers inside the gate see whole, and that is replaced, never changed.
//!
//! Read-copy-update with the [`Gate`] as the grace period. Readers load one pointer, wait for nobody and allocate
//! nothing; a writer puts a new value in its place and frees the old one when every section that may still refer to it
//! has left the gate.

use core::fmt;
use core::marker::PhantomData;
use core::sync::atomic::{AtomicPtr, Ordering};

use super::arc::MapArc;
use crate::sync::{Closed, Gate, GateGuard, Mutex};

/// Proof of being where no grace period can end: inside the gate, or its closer.
pub(crate) trait Inside {}

impl Inside for GateGuard<'_> {}
impl Inside for Closed<'_> {}

/// See the [module](self).
pub(crate) struct Gated<T> {
    current: AtomicPtr<()>,
    /// Serialises writers. Its holder only maps memory, it never waits for the gate.
    writer: Mutex<()>,
    _owns: PhantomData<MapArc<T>>,
}

impl<T> Gated<T> {
    /// A first value. `Err` gives the errno.
    pub(crate) fn new(value: T) -> Result<Self, i32> {
        let current = AtomicPtr::new(MapArc::new(value)?.into_raw());
        Ok(Self {
            current,
            writer: Mutex::new(()),
            _owns: PhantomData,
        })
    }

    /// The value now. It stays valid while the caller is inside the gate.
    pub(crate) fn load<'g>(&'g self, _gate: &'g impl Inside) -> &'g T {
        // Acquire pairs with the Release of `update`: the value is seen initialised.
        let current = self.current.load(Ordering::Acquire);
        // SAFETY: `current` came from `MapArc::into_raw` and its reference is given up only by `update`, after a grace
        // period that the caller's guard holds back, or by `drop`, which has `self` alone.
        unsafe { MapArc::<T>::borrow_raw(current) }
    }

    /// Replaces the value by what `f` makes of it, and frees the old one after a grace period. Not inside the gate, which
    /// would wait for itself, and not while it is closed: the closer sees one value from beginning to end. If `f` fails, for
    /// want of memory, nothing changes.
    pub(crate) fn update(
        &self,
        gate: &Gate,
        f: impl FnOnce(&T) -> Result<T, i32>,
    ) -> Result<(), i32> {
        let old = gate.change(|| self.exchange(f))?;
        // SAFETY: `old` is unreachable for new readers, and the grace period has ended the old ones.
        drop(unsafe { MapArc::<T>::from_raw(old) });
        Ok(())
    }

    /// [`update`](Self::update) by the closer of the gate: nobody is inside, so there is nobody to wait for.
    pub(crate) fn update_closed(
        &self,
        _closed: &Closed<'_>,
        f: impl FnOnce(&T) -> Result<T, i32>,
    ) -> Result<(), i32> {
        let old = self.exchange(f)?;
        // SAFETY: `old` is unreachable for new readers, and there are no old ones while the gate is closed.
        drop(unsafe { MapArc::<T>::from_raw(old) });
        Ok(())
    }

    /// Puts what `f` makes of the value in its place, and returns the reference to the old one.
    fn exchange(&self, f: impl FnOnce(&T) -> Result<T, i32>) -> Result<*mut (), i32> {
        let _writer = self.writer.lock();
        let current = self.current.load(Ordering::Relaxed);
        // SAFETY: as in `load`; the writer's lock keeps others from replacing it meanwhile.
        let value = f(unsafe { MapArc::<T>::borrow_raw(current) })?;
        let new = MapArc::new(value)?.into_raw();
        // Release pairs with the Acquire of `load`.
        self.current.store(new, Ordering::Release);
        Ok(current)
    }
}

impl<T> Drop for Gated<T> {
    fn drop(&mut self) {
        let current = *self.current.get_mut();
        // SAFETY: the reference that `new` or `update` put here; `&mut self` excludes readers.
        drop(unsafe { MapArc::<T>::from_raw(current) });
    }
}

impl<T> fmt::Debug for Gated<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gated").finish_non_exhaustive()
    }
}
