//! Views as arguments of a launch.
//!
//! A launch takes one view, or a tuple of up to six. What its kernel gets for each depends on the kind of launch:
//!
//! | argument            | slice kernels ([`run`])         | element kernels ([`run_items`]) |
//! |---------------------|---------------------------------|---------------------------------|
//! | [`View`]            | `&[T]`, a chunk                 | [`Elements`]: loads             |
//! | [`ViewMut`]         | `&mut [T]`, a chunk of its own  | [`ElementsMut`]: all accesses   |
//! | [`SharedView`]      | not allowed                     | [`ElementsMut`]                 |
//! | [`Buffer`], owned   | as `ViewMut`                    | as `ViewMut`                    |
//! | [`indices()`]       | the chunk's index range         | `()`                            |
//!
//! The chunks of one item cover the same index range in all views, and no two items share an index.
//!
//! [`run`]: crate::Accelerator::run
//! [`run_items`]: crate::Accelerator::run_items

use std::ops::Range;
use std::ptr::{slice_from_raw_parts, slice_from_raw_parts_mut, with_exposed_provenance_mut};

use bytemuck::Pod;
use svm::{Buffer, RegionRef, SharedView, View, ViewMut};

use crate::elements::{Elements, ElementsMut};
use crate::lane::Lane;
use crate::shootdown::Rights;
use crate::space::Sharing;

/// The largest number of views in one launch.
pub const MAX_VIEWS: usize = 6;

/// The index range of each chunk, as one more argument of a slice kernel.
///
/// ```
/// # fn demo(accel: &accel_sim::Accelerator, y: &mut svm::Mirror<'_, u64>) -> Result<(), accel_sim::Error> {
/// accel.run((accel_sim::indices(), y.view_mut()), |(range, y)| {
///     for (i, y) in range.zip(y) { *y = i as u64 }
/// })
/// # }
/// ```
#[must_use]
pub fn indices() -> Indices {
    Indices(())
}

/// See [`indices()`].
#[derive(Clone, Copy, Debug)]
pub struct Indices(());

pub(crate) mod sealed {
    use super::*;

    /// What the launch needs to know of an argument.
    #[derive(Debug)]
    pub struct Description<'r> {
        pub(crate) addr: usize,
        pub(crate) len: usize,
        pub(crate) size: usize,
        pub(crate) rights: Rights,
        pub(crate) sharing: Sharing,
        pub(crate) region: RegionRef<'r>,
    }

    /// One argument's chunk of one item: a raw slice.
    #[derive(Clone, Copy, Debug)]
    pub struct Chunk {
        /// Address of its first element, for the device.
        pub(crate) addr: usize,
        /// Index of its first element.
        pub(crate) first: usize,
        /// Number of elements.
        pub(crate) len: usize,
    }

    /// One argument, seen from a lane.
    #[derive(Clone, Copy, Debug)]
    pub struct Handle<'s> {
        pub(crate) lane: &'s Lane<'s>,
        pub(crate) view: usize,
    }

    #[diagnostic::on_unimplemented(
        message = "`{Self}` cannot be an argument of a launch",
        note = "a launch takes views, `mirror.view()` or `mirror.view_mut()`, or an owned `Buffer`; one, or a tuple of up to six"
    )]
    pub trait Operand {
        type Elements<'s>;

        /// `None` for an argument that is no view.
        fn describe(&self) -> Option<Description<'_>>;
        fn elements<'s>(handle: Handle<'s>) -> Self::Elements<'s>;
    }

    #[diagnostic::on_unimplemented(
        message = "`{Self}` cannot be an argument of a launch over slices",
        note = "it takes `mirror.view()`, `mirror.view_mut()`, `indices()` or an owned `Buffer`; memory that is shared needs `run_items`"
    )]
    pub trait SpanOperand: Operand {
        type Span<'s>;

        /// # Safety
        ///
        /// The chunk's address is exposed, aligned for the elements, and valid for `'s` for loads; for a mutable view also for
        /// stores, and then nothing else accesses the chunk during `'s`.
        unsafe fn span<'s>(chunk: Chunk) -> Self::Span<'s>;
    }

    pub trait Operands {
        type Elements<'s>;

        fn for_each(&self, f: &mut dyn FnMut(Option<Description<'_>>));
        fn elements<'s>(lane: &'s Lane<'s>) -> Self::Elements<'s>;
    }

    pub trait SpanOperands: Operands {
        type Spans<'s>;

        /// # Safety
        ///
        /// As [`SpanOperand::span`], for each chunk; `chunk` gives those of this item in order.
        unsafe fn spans<'s>(chunk: &mut dyn FnMut() -> Chunk) -> Self::Spans<'s>;
    }
}

use sealed::{Chunk, Description, Handle, Operand, Operands, SpanOperand, SpanOperands};

/// Arguments of an element kernel: a view, or a tuple of up to six. Sealed.
pub trait ViewSet: sealed::Operands {
    /// What the kernel gets: a handle for each view.
    type Elements<'s>;

    /// # Safety
    ///
    /// `lane` is of a launch with these very views.
    #[doc(hidden)]
    unsafe fn elements<'s>(lane: &'s Lane<'s>) -> <Self as ViewSet>::Elements<'s>;
}

/// Arguments of a slice kernel: a [`View`], a [`ViewMut`], [`Indices`], or a tuple of up to six. Sealed.
pub trait SpanSet: sealed::SpanOperands {
    /// What the kernel gets: a slice for each view.
    type Spans<'s>;

    /// # Safety
    ///
    /// As `SpanOperands::spans`.
    #[doc(hidden)]
    unsafe fn spans<'s>(chunk: &mut dyn FnMut() -> Chunk) -> <Self as SpanSet>::Spans<'s>;
}

impl<V: Operands> ViewSet for V {
    type Elements<'s> = <V as Operands>::Elements<'s>;

    unsafe fn elements<'s>(lane: &'s Lane<'s>) -> <Self as ViewSet>::Elements<'s> {
        <V as Operands>::elements(lane)
    }
}

impl<V: SpanOperands> SpanSet for V {
    type Spans<'s> = <V as SpanOperands>::Spans<'s>;

    unsafe fn spans<'s>(chunk: &mut dyn FnMut() -> Chunk) -> <Self as SpanSet>::Spans<'s> {
        // SAFETY: by the same contract.
        unsafe { <V as SpanOperands>::spans(chunk) }
    }
}

impl<T: Pod> Operand for View<'_, T> {
    type Elements<'s> = Elements<'s, T>;

    fn describe(&self) -> Option<Description<'_>> {
        Some(Description {
            addr: self.addr(),
            len: self.len(),
            size: size_of::<T>(),
            rights: Rights::Read,
            sharing: Sharing::Borrowed,
            region: self.region(),
        })
    }

    fn elements<'s>(handle: Handle<'s>) -> Elements<'s, T> {
        Elements::new(handle)
    }
}

impl<T: Pod> SpanOperand for View<'_, T> {
    type Span<'s> = &'s [T];

    unsafe fn span<'s>(chunk: Chunk) -> &'s [T] {
        let slice = slice_from_raw_parts(with_exposed_provenance_mut::<T>(chunk.addr), chunk.len);
        // SAFETY: by contract aligned and valid for loads during 's, and nobody writes it: every view of it is a shared borrow.
        unsafe { &*slice }
    }
}

impl<T: Pod> Operand for ViewMut<'_, T> {
    type Elements<'s> = ElementsMut<'s, T>;

    fn describe(&self) -> Option<Description<'_>> {
        Some(Description {
            addr: self.addr(),
            len: self.len(),
            size: size_of::<T>(),
            rights: Rights::Write,
            sharing: Sharing::Borrowed,
            region: self.region(),
        })
    }

    fn elements<'s>(handle: Handle<'s>) -> ElementsMut<'s, T> {
        ElementsMut::new(handle)
    }
}

impl<T: Pod> SpanOperand for ViewMut<'_, T> {
    type Span<'s> = &'s mut [T];

    unsafe fn span<'s>(chunk: Chunk) -> &'s mut [T] {
        let slice =
            slice_from_raw_parts_mut(with_exposed_provenance_mut::<T>(chunk.addr), chunk.len);
        // SAFETY: by contract aligned, valid for loads and stores during 's, and accessed by nothing else.
        unsafe { &mut *slice }
    }
}

impl<T: Pod> Operand for SharedView<'_, T> {
    type Elements<'s> = ElementsMut<'s, T>;

    fn describe(&self) -> Option<Description<'_>> {
        Some(Description {
            addr: self.addr(),
            len: self.len(),
            size: size_of::<T>(),
            rights: Rights::Write,
            sharing: Sharing::Shared,
            region: self.region(),
        })
    }

    fn elements<'s>(handle: Handle<'s>) -> ElementsMut<'s, T> {
        ElementsMut::new(handle)
    }
}

impl<T: Pod> Operand for Buffer<T> {
    type Elements<'s> = ElementsMut<'s, T>;

    fn describe(&self) -> Option<Description<'_>> {
        let view = self.view();
        Some(Description {
            addr: view.addr(),
            len: view.len(),
            size: size_of::<T>(),
            rights: Rights::Write,
            sharing: Sharing::Borrowed,
            region: view.region(),
        })
    }

    fn elements<'s>(handle: Handle<'s>) -> ElementsMut<'s, T> {
        ElementsMut::new(handle)
    }
}

impl<T: Pod> SpanOperand for Buffer<T> {
    type Span<'s> = &'s mut [T];

    unsafe fn span<'s>(chunk: Chunk) -> &'s mut [T] {
        // SAFETY: by the same contract.
        unsafe { ViewMut::<T>::span(chunk) }
    }
}

impl Operand for Indices {
    type Elements<'s> = ();

    fn describe(&self) -> Option<Description<'_>> {
        None
    }

    fn elements<'s>(_: Handle<'s>) {}
}

impl SpanOperand for Indices {
    type Span<'s> = Range<usize>;

    unsafe fn span<'s>(chunk: Chunk) -> Self::Span<'s> {
        chunk.first..chunk.first + chunk.len
    }
}

impl<V: Operand> Operands for V {
    type Elements<'s> = V::Elements<'s>;

    fn for_each(&self, f: &mut dyn FnMut(Option<Description<'_>>)) {
        f(self.describe());
    }

    fn elements<'s>(lane: &'s Lane<'s>) -> Self::Elements<'s> {
        V::elements(Handle { lane, view: 0 })
    }
}

impl<V: SpanOperand> SpanOperands for V {
    type Spans<'s> = V::Span<'s>;

    unsafe fn spans<'s>(chunk: &mut dyn FnMut() -> Chunk) -> Self::Spans<'s> {
        // SAFETY: by the same contract.
        unsafe { V::span(chunk()) }
    }
}

macro_rules! tuples {
    ($(($($view:ident $i:literal),+))*) => { $(
        impl<$($view: Operand),+> Operands for ($($view,)+) {
            type Elements<'s> = ($($view::Elements<'s>,)+);

            #[allow(non_snake_case, reason = "one name for the type and its value")]
            fn for_each(&self, f: &mut dyn FnMut(Option<Description<'_>>)) {
                let ($($view,)+) = self;
                $( f($view.describe()); )+
            }

            fn elements<'s>(lane: &'s Lane<'s>) -> Self::Elements<'s> {
                ($($view::elements(Handle { lane, view: $i }),)+)
            }
        }

        impl<$($view: SpanOperand),+> SpanOperands for ($($view,)+) {
            type Spans<'s> = ($($view::Span<'s>,)+);

            unsafe fn spans<'s>(chunk: &mut dyn FnMut() -> Chunk) -> Self::Spans<'s> {
                ($(
                    // SAFETY: by the same contract; tuple elements are evaluated in order.
                    unsafe { $view::span(chunk()) },
                )+)
            }
        }
    )* };
}

tuples! {
    (A 0)
    (A 0, B 1)
    (A 0, B 1, C 2)
    (A 0, B 1, C 2, D 3)
    (A 0, B 1, C 2, D 3, E 4)
    (A 0, B 1, C 2, D 3, E 4, F 5)
}
