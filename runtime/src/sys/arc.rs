//! [`MapArc`]: a reference-counted value in its own anonymous mapping.
//!
//! What the fault path reads must not live in `malloc`'s memory: after a leaked mirror, `malloc` may hand registered
//! pages to our own boxes, and a fault would be needed to serve a fault (hazards W6).

use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering, fence};

use super::mmap::state_len;

/// Maps at least `len_bytes` of zero-filled memory. `Err` gives the errno.
fn map_anonymous(len_bytes: usize) -> Result<NonNull<u8>, i32> {
    super::mmap::map_anonymous(state_len(len_bytes).ok_or(libc::ENOMEM)?)
        .map_err(|e| e.raw_os_error().unwrap_or(libc::ENOMEM))
}

/// Unmaps what `map_anonymous(len_bytes)` gave.
///
/// # Safety
/// Nothing uses it any more.
unsafe fn unmap(addr: usize, len_bytes: usize) {
    // SAFETY: by contract; the length is computed as it was for the mapping, which succeeded.
    unsafe { super::mmap::unmap(addr, state_len(len_bytes).unwrap_or(len_bytes)) };
}

#[repr(C)]
pub(crate) struct Shared<T: ?Sized> {
    count: AtomicUsize,
    mapped_bytes: usize,
    value: T,
}

/// A shared, reference-counted `T` that `malloc` knows nothing of.
pub(crate) struct MapArc<T: ?Sized> {
    shared: NonNull<Shared<T>>,
}

// SAFETY: as for `std::sync::Arc`: clones on several threads give `&T` on each (so `T: Sync`), and the last one to go
// drops the value wherever it is (so `T: Send`).
unsafe impl<T: ?Sized + Send + Sync> Send for MapArc<T> {}
// SAFETY: as above; `&MapArc<T>` gives `&T` and clones.
unsafe impl<T: ?Sized + Send + Sync> Sync for MapArc<T> {}

impl<T> MapArc<T> {
    /// Maps memory for `value` and moves it there. `Err` gives the errno.
    pub(crate) fn new(value: T) -> Result<Self, i32> {
        const {
            assert!(
                align_of::<Shared<T>>() <= 4096,
                "a mapping is aligned to a page, no more"
            );
        };
        let mapped_bytes = size_of::<Shared<T>>();
        let at = map_anonymous(mapped_bytes)?.cast::<Shared<T>>();
        // SAFETY: `at` is a fresh writable mapping of at least `size_of::<Shared<T>>()` bytes, page-aligned.
        unsafe {
            at.write(Shared {
                count: AtomicUsize::new(1),
                mapped_bytes,
                value,
            });
        };
        Ok(Self { shared: at })
    }

    /// The same value behind a trait object; `unsize` is `|p| p`.
    pub(crate) fn erase<U: ?Sized>(self, unsize: fn(*mut Shared<T>) -> *mut Shared<U>) -> MapArc<U>
    where
        T: Sized,
    {
        let shared = self.shared;
        core::mem::forget(self);
        let shared = NonNull::new(unsize(shared.as_ptr())).expect("unsizing keeps the address");
        MapArc { shared }
    }
}

impl<T> MapArc<T> {
    /// Gives the reference up as a bare pointer, for `from_raw`.
    pub(crate) fn into_raw(self) -> *mut () {
        let raw = self.shared.as_ptr().cast();
        core::mem::forget(self);
        raw
    }

    /// Takes back the reference that `into_raw` gave up.
    ///
    /// # Safety
    /// `raw` came from `into_raw` of a `MapArc<T>`, and this is the one call that takes that reference back.
    pub(crate) unsafe fn from_raw(raw: *mut ()) -> Self {
        // SAFETY: a MapArc's pointer is never null.
        let shared = unsafe { NonNull::new_unchecked(raw.cast()) };
        Self { shared }
    }

    /// The value behind a reference that `into_raw` gave up and nobody has taken back.
    ///
    /// # Safety
    /// `raw` came from `into_raw` of a `MapArc<T>`, and its reference outlives `'a`.
    pub(crate) unsafe fn borrow_raw<'a>(raw: *mut ()) -> &'a T {
        let shared = raw.cast::<Shared<T>>().cast_const();
        // SAFETY: the caller's promise: initialised, and alive for `'a`.
        unsafe { &(*shared).value }
    }
}

impl<T: ?Sized> MapArc<T> {
    fn shared(&self) -> &Shared<T> {
        // SAFETY: `shared` is initialised and stays mapped while any clone lives; only shared references are made.
        unsafe { self.shared.as_ref() }
    }
}

impl<T: ?Sized> Clone for MapArc<T> {
    fn clone(&self) -> Self {
        // Relaxed: whoever clones holds a reference already, as in std's Arc.
        self.shared().count.fetch_add(1, Ordering::Relaxed);
        Self {
            shared: self.shared,
        }
    }
}

impl<T: ?Sized> Deref for MapArc<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.shared().value
    }
}

impl<T: ?Sized> Drop for MapArc<T> {
    fn drop(&mut self) {
        // Release pairs with the Acquire fence below: every use through other clones happens before the drop.
        if self.shared().count.fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        fence(Ordering::Acquire);
        let bytes = self.shared().mapped_bytes;
        // SAFETY: the pointer is to an initialised, mapped `Shared<T>`; only the field's address is taken.
        let value = unsafe { &raw mut (*self.shared.as_ptr()).value };
        // SAFETY: the count is zero, so this was the last reference; the value is dropped once.
        unsafe { core::ptr::drop_in_place(value) };
        // SAFETY: `new` mapped exactly these bytes at this address, and nothing refers to them any more.
        unsafe { unmap(self.shared.as_ptr().expose_provenance(), bytes) };
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for MapArc<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// A fixed slice of values in its own mapping.
pub(crate) struct MapSlice<T> {
    items: NonNull<T>,
    len: usize,
}

// SAFETY: owns its items, as a `Box<[T]>` does.
unsafe impl<T: Send> Send for MapSlice<T> {}
// SAFETY: gives out `&T` only.
unsafe impl<T: Sync> Sync for MapSlice<T> {}

impl<T> MapSlice<T> {
    /// No items, no mapping.
    pub(crate) const fn empty() -> Self {
        Self {
            items: NonNull::dangling(),
            len: 0,
        }
    }

    /// The items of `iter`, which is walked twice: to count, and to move. `Err` gives the errno.
    pub(crate) fn collect(iter: impl Iterator<Item = T> + Clone) -> Result<Self, i32> {
        const {
            assert!(
                align_of::<T>() <= 4096,
                "a mapping is aligned to a page, no more"
            );
        };
        let len = iter.clone().count();
        if len == 0 {
            return Ok(Self::empty());
        }
        let items = map_anonymous(len * size_of::<T>().max(1))?.cast::<T>();
        let mut slice = Self { items, len: 0 };
        for item in iter.take(len) {
            // SAFETY: `slice.len < len`, and the mapping has room for `len` items.
            let at = unsafe { items.add(slice.len) };
            // SAFETY: `at` is inside the fresh writable mapping.
            unsafe { at.write(item) };
            slice.len += 1;
        }
        assert!(slice.len == len, "the iterator was shorter the second time");
        Ok(slice)
    }
}

impl<T> Deref for MapSlice<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `collect` initialised `len` items there; `empty` has none and a dangling, aligned pointer.
        unsafe { core::slice::from_raw_parts(self.items.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for MapSlice<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the borrow exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.items.as_ptr(), self.len) }
    }
}

impl<T> Drop for MapSlice<T> {
    fn drop(&mut self) {
        if self.len == 0 {
            return;
        }
        let all = core::ptr::slice_from_raw_parts_mut(self.items.as_ptr(), self.len);
        // SAFETY: the items are initialised and dropped once.
        unsafe { core::ptr::drop_in_place(all) };
        // SAFETY: `collect` mapped this many bytes here, and nothing refers to them any more.
        unsafe {
            unmap(
                self.items.as_ptr().expose_provenance(),
                self.len * size_of::<T>().max(1),
            );
        };
    }
}

impl<T: fmt::Debug> fmt::Debug for MapSlice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
