//! [`Shared`]: memory that the CPU and kernels use at the same time.
//!
//! All access is by relaxed atomics on words of the largest size that the element's alignment allows: an element larger
//! than a word can be seen half-written, as on any machine, but no access is ever undefined. Never volatile, which gives
//! no guarantee against a concurrent write in Rust.

use core::fmt;
use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use bytemuck::Pod;

use crate::region::Region;
use crate::sys::arc::MapArc;
use crate::view::SharedView;

/// A mirrored slice while both sides may use it. Made by [`Mirror::share`](crate::Mirror::share).
pub struct Shared<'a, T: Pod> {
    region: &'a MapArc<Region>,
    ptr: NonNull<T>,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: every access is atomic, and the memory is exclusively borrowed for `'a`; so it is as shareable as a slice of
// atomics.
unsafe impl<T: Pod + Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Pod + Send> Sync for Shared<'_, T> {}

impl<'a, T: Pod> Shared<'a, T> {
    pub(crate) fn new(region: &'a MapArc<Region>, ptr: NonNull<T>, len: usize) -> Self {
        Self {
            region,
            ptr,
            len,
            _borrow: PhantomData,
        }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Lends the elements to kernels, while this side goes on using them.
    #[must_use]
    pub fn view(&self) -> SharedView<'_, T> {
        SharedView::new(self.region, self.ptr.as_ptr().addr(), self.len)
    }

    fn at(&self, index: usize) -> *mut T {
        assert!(index < self.len, "element {index} of {}", self.len);
        // SAFETY: `index` is in bounds of the borrowed slice.
        unsafe { self.ptr.as_ptr().add(index) }
    }

    /// Loads element `index`, relaxed.
    ///
    /// # Panics
    /// If `index` is out of bounds.
    #[must_use]
    pub fn load(&self, index: usize) -> T {
        // SAFETY: the element is in bounds, and everybody accesses it atomically while it is shared.
        unsafe { atomic_load(self.at(index)) }
    }

    /// Stores element `index`, relaxed.
    ///
    /// # Panics
    /// If `index` is out of bounds.
    pub fn store(&self, index: usize, value: T) {
        // SAFETY: as in `load`.
        unsafe { atomic_store(self.at(index), value) }
    }
}

macro_rules! integers {
    ($($int:ty, $atomic:ident;)*) => {$(
        impl Shared<'_, $int> {
            /// Adds to element `index` and returns what it was; wraps.
            ///
            /// # Panics
            /// If `index` is out of bounds.
            pub fn fetch_add(&self, index: usize, value: $int, order: Ordering) -> $int {
                self.atomic(index).fetch_add(value, order)
            }

            /// Element `index` as an atomic.
            ///
            /// # Panics
            /// If `index` is out of bounds.
            #[must_use]
            pub fn atomic(&self, index: usize) -> &core::sync::atomic::$atomic {
                // SAFETY: in bounds, aligned for the integer and so for its atomic, and accessed atomically by everybody
                // while it is shared.
                unsafe { core::sync::atomic::$atomic::from_ptr(self.at(index)) }
            }
        }
    )*};
}

integers! {
    u8, AtomicU8; i8, AtomicI8;
    u16, AtomicU16; i16, AtomicI16;
    u32, AtomicU32; i32, AtomicI32;
    u64, AtomicU64; i64, AtomicI64;
    usize, AtomicUsize; isize, AtomicIsize;
}

impl<T: Pod> fmt::Debug for Shared<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("region", &**self.region)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// The word that elements of this alignment and size are accessed by, in bytes.
const fn word_of<T>() -> usize {
    let align = align_of::<T>();
    if align >= 8 { 8 } else { align }
}

/// Loads a `T` by relaxed atomic words.
///
/// # Safety
/// `at` is aligned and readable, and every concurrent access to it is atomic and of the same word size.
pub(crate) unsafe fn atomic_load<T: Pod>(at: *const T) -> T {
    let mut value = T::zeroed();
    let bytes = size_of::<T>();
    let (source, target) = (
        at.cast::<u8>().cast_mut(),
        core::ptr::from_mut(&mut value).cast::<u8>(),
    );
    macro_rules! words {
        ($atomic:ident, $int:ty) => {
            for offset in (0..bytes).step_by(size_of::<$int>()) {
                // SAFETY: inside the element, aligned for the word, atomic by the caller's promise.
                let atomic = unsafe { $atomic::from_ptr(source.add(offset).cast()) };
                let word = atomic.load(Ordering::Relaxed);
                // SAFETY: `value` is a local of this size; the offset is aligned as the element is.
                unsafe { target.add(offset).cast::<$int>().write(word) };
            }
        };
    }
    match word_of::<T>() {
        8 => words!(AtomicU64, u64),
        4 => words!(AtomicU32, u32),
        2 => words!(AtomicU16, u16),
        _ => words!(AtomicU8, u8),
    }
    value
}

/// Stores a `T` by relaxed atomic words.
///
/// # Safety
/// `at` is aligned and writable, and every concurrent access to it is atomic and of the same word size.
pub(crate) unsafe fn atomic_store<T: Pod>(at: *mut T, value: T) {
    let bytes = size_of::<T>();
    let (source, target) = (core::ptr::from_ref(&value).cast::<u8>(), at.cast::<u8>());
    macro_rules! words {
        ($atomic:ident, $int:ty) => {
            for offset in (0..bytes).step_by(size_of::<$int>()) {
                // SAFETY: inside `value`, aligned as the element is.
                let word = unsafe { source.add(offset).cast::<$int>().read() };
                // SAFETY: inside the element, aligned for the word, atomic by the caller's promise.
                unsafe { $atomic::from_ptr(target.add(offset).cast()) }
                    .store(word, Ordering::Relaxed);
            }
        };
    }
    match word_of::<T>() {
        8 => words!(AtomicU64, u64),
        4 => words!(AtomicU32, u32),
        2 => words!(AtomicU16, u16),
        _ => words!(AtomicU8, u8),
    }
}
