//! [`Ptr`]: a pointer that means the same on both sides.

use core::fmt;
use core::hash::{Hash, Hasher};
use core::marker::PhantomData;

use bytemuck::{Pod, Zeroable};

/// The address of a `T` in mirrored memory, or null.
///
/// It is plain data, eight bytes, so nodes can hold it: lists, trees and graphs are shared with a device as they are, with
/// no translation of links. Only a device follows one, and only inside the views of its launch; on the CPU it is an
/// address to compare, or to index with through [`index_in`](Self::index_in).
///
/// ```
/// use svm::Ptr;
/// #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
/// #[repr(C)]
/// struct Node { value: u64, next: Ptr<Node> }
///
/// let mut nodes = [Node { value: 7, next: Ptr::null() }; 2];
/// nodes[0].next = Ptr::to(&nodes[1]);
/// assert_eq!(nodes[0].next.index_in(&nodes), Some(1));
/// assert!(nodes[1].next.is_null());
/// ```
#[repr(transparent)]
pub struct Ptr<T> {
    addr: u64,
    _to: PhantomData<fn() -> T>,
}

// SAFETY: `repr(transparent)` over a `u64`, for which zero is a value (null).
unsafe impl<T> Zeroable for Ptr<T> {}
// SAFETY: `repr(transparent)` over a `u64`: any bits are a value, there is no padding, and nothing is borrowed: following
// it on the CPU takes `unsafe` of the caller's own. `'static` is required of `T` by the trait.
unsafe impl<T: 'static> Pod for Ptr<T> {}

impl<T> Ptr<T> {
    /// Points nowhere.
    #[must_use]
    pub const fn null() -> Self {
        Self {
            addr: 0,
            _to: PhantomData,
        }
    }

    /// Points at `target`.
    #[must_use]
    pub fn to(target: &T) -> Self {
        Self::from_addr(core::ptr::from_ref(target).expose_provenance())
    }

    /// Points at address `addr`.
    #[must_use]
    pub const fn from_addr(addr: usize) -> Self {
        Self {
            addr: addr as u64,
            _to: PhantomData,
        }
    }

    /// The address; 0 for null.
    #[must_use]
    pub const fn addr(self) -> usize {
        self.addr as usize
    }

    /// Whether it points nowhere.
    #[must_use]
    pub const fn is_null(self) -> bool {
        self.addr == 0
    }

    /// The index of the element of `slice` it points at, if it points at one.
    #[must_use]
    pub fn index_in(self, slice: &[T]) -> Option<usize> {
        let offset = self.addr().checked_sub(slice.as_ptr().addr())?;
        let size = size_of::<T>();
        (size > 0 && offset.is_multiple_of(size) && offset / size < slice.len())
            .then(|| offset / size)
    }

    /// Points `count` elements further.
    #[must_use]
    pub const fn add(self, count: usize) -> Self {
        Self::from_addr(self.addr().wrapping_add(count.wrapping_mul(size_of::<T>())))
    }

    /// The same address, taken for that of a `U`.
    #[must_use]
    pub const fn cast<U>(self) -> Ptr<U> {
        Ptr::from_addr(self.addr())
    }
}

impl<T> Clone for Ptr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ptr<T> {}

impl<T> PartialEq for Ptr<T> {
    fn eq(&self, other: &Self) -> bool {
        self.addr == other.addr
    }
}

impl<T> Eq for Ptr<T> {}

impl<T> Hash for Ptr<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.addr.hash(state);
    }
}

impl<T> Default for Ptr<T> {
    fn default() -> Self {
        Self::null()
    }
}

impl<T> fmt::Debug for Ptr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_null() {
            f.write_str("null")
        } else {
            write!(f, "{:#x}", self.addr)
        }
    }
}
