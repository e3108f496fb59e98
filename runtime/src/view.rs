//! Views: what a launch borrows of a mirror.
//!
//! A view says which elements a kernel may use and how. It holds no `&[T]`: while a device may write the memory, a
//! reference would promise what is not so. [`ViewMut`] is exclusive, as `&mut` is, so its holder may hand out disjoint
//! `&mut [T]` chunks; [`View`] is shared and read-only; [`SharedView`] is for memory that both sides use at once, by
//! relaxed atomic accesses only.

use core::fmt;
use core::marker::PhantomData;

use bytemuck::Pod;

use crate::mapped::RegionRef;
use crate::region::Region;
use crate::sys::arc::MapArc;

macro_rules! view {
    ($(#[$doc:meta])* $name:ident, $borrow:ty) => {
        $(#[$doc])*
        pub struct $name<'a, T: Pod> {
            region: &'a MapArc<Region>,
            addr: usize,
            len: usize,
            _borrow: PhantomData<$borrow>,
        }

        impl<'a, T: Pod> $name<'a, T> {
            pub(crate) fn new(region: &'a MapArc<Region>, addr: usize, len: usize) -> Self {
                Self { region, addr, len, _borrow: PhantomData }
            }

            /// Address of the first element: the same for the CPU and for every device.
            #[must_use]
            pub fn addr(&self) -> usize {
                self.addr
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

            /// Bytes of all elements.
            #[must_use]
            pub fn len_bytes(&self) -> usize {
                self.len * size_of::<T>()
            }

            /// The mirrored range the view is of.
            #[must_use]
            pub fn region(&self) -> RegionRef<'a> {
                RegionRef { region: self.region }
            }

            /// Address of element `index`, for kernels that follow pointers.
            ///
            /// # Panics
            /// If `index` is out of bounds.
            #[must_use]
            pub fn ptr(&self, index: usize) -> crate::Ptr<T> {
                assert!(index < self.len, "element {index} of {}", self.len);
                crate::Ptr::from_addr(self.addr + index * size_of::<T>())
            }
        }

        impl<T: Pod> fmt::Debug for $name<'_, T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name))
                    .field("addr", &format_args!("{:#x}", self.addr))
                    .field("len", &self.len)
                    .finish_non_exhaustive()
            }
        }
    };
}

view! {
    /// Elements a kernel may read.
    View, &'a [T]
}

view! {
    /// Elements a kernel may read and write, and nobody else meanwhile.
    ViewMut, &'a mut [T]
}

view! {
    /// Elements that kernels and the CPU use at the same time, by relaxed atomic accesses.
    SharedView, &'a crate::Shared<'a, T>
}

impl<T: Pod> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Pod> Copy for View<'_, T> {}

impl<T: Pod> Clone for SharedView<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Pod> Copy for SharedView<'_, T> {}
