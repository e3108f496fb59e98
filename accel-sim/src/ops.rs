//! What is done at an element's place: a load, a store, or an atomic update.

use std::marker::PhantomData;

use bytemuck::Pod;

use crate::shootdown::Rights;
use crate::words::{self, Atomic, word_bytes};

/// What is done at an element's place.
pub(crate) trait Op: Copy {
    type Out;

    const RIGHTS: Rights;
    const SIZE: usize;
    /// Bytes of the words it is done by: the alignment of elements, or 8.
    const WORD: usize;

    /// # Safety
    ///
    /// As [`words::load`] or [`words::store`].
    unsafe fn at(self, at: impl Fn(usize) -> usize) -> Self::Out;
}

#[derive(Clone, Copy)]
pub(crate) struct Load<T>(pub(crate) PhantomData<T>);

impl<T: Pod> Op for Load<T> {
    type Out = T;

    const RIGHTS: Rights = Rights::Read;
    const SIZE: usize = size_of::<T>();
    const WORD: usize = word_bytes::<T>();

    #[inline(always)]
    unsafe fn at(self, at: impl Fn(usize) -> usize) -> T {
        // SAFETY: by the same contract.
        unsafe { words::load(at) }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Store<T>(pub(crate) T);

impl<T: Pod> Op for Store<T> {
    type Out = ();

    const RIGHTS: Rights = Rights::Write;
    const SIZE: usize = size_of::<T>();
    const WORD: usize = word_bytes::<T>();

    #[inline(always)]
    unsafe fn at(self, at: impl Fn(usize) -> usize) {
        // SAFETY: by the same contract.
        unsafe { words::store(at, self.0) }
    }
}

/// An atomic update, which never lies across pages.
#[derive(Clone, Copy)]
pub(crate) struct Rmw<T, F>(F, PhantomData<T>);

impl<T: Atomic, R, F: Fn(usize) -> R + Copy> Op for Rmw<T, F> {
    type Out = R;

    const RIGHTS: Rights = Rights::Write;
    const SIZE: usize = size_of::<T>();
    const WORD: usize = word_bytes::<T>();

    #[inline(always)]
    unsafe fn at(self, at: impl Fn(usize) -> usize) -> R {
        (self.0)(at(0))
    }
}

pub(crate) fn rmw<T: Atomic, F>(f: F) -> Rmw<T, F> {
    Rmw(f, PhantomData)
}

const _: () = assert!(word_bytes::<u128>() == 8);
