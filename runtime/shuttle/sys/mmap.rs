//! Memory of the runtime's own, from the heap, and reservations, of model addresses.

use crate::addr::PageRange;
use crate::kernel;
use bytemuck::Zeroable;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

const ALIGN: usize = 4096;

fn layout(len_bytes: usize) -> io::Result<Layout> {
    Layout::from_size_align(len_bytes.max(1), ALIGN).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

pub(super) fn map_anonymous(len_bytes: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: the layout's size is not zero.
    let at = unsafe { alloc_zeroed(layout(len_bytes)?) };
    NonNull::new(at).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// # Safety
///
/// `map_anonymous(len_bytes)` gave `addr`, and nothing uses it any more.
pub(super) unsafe fn unmap(addr: usize, len_bytes: usize) {
    let Ok(layout) = layout(len_bytes) else {
        return;
    };
    // SAFETY: by contract; it was allocated with this layout.
    unsafe { dealloc(std::ptr::with_exposed_provenance_mut(addr), layout) };
}

pub(super) fn state_len(len_bytes: usize) -> Option<usize> {
    Some(len_bytes)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Advice {
    HugePage,
    NoHugePage,
    DontFork,
    DoFork,
    WipeOnFork,
    PopulateWrite,
}

pub(crate) fn advise(range: PageRange, advice: Advice) -> io::Result<()> {
    if advice == Advice::PopulateWrite {
        kernel::populate_write(range);
    }
    Ok(())
}

/// # Safety
///
/// None is needed: it is model memory.
pub(crate) unsafe fn discard(range: PageRange) -> io::Result<()> {
    kernel::madvise_dontneed(range);
    Ok(())
}

#[derive(Debug)]
pub(crate) struct Reservation(PageRange);

impl Reservation {
    pub(crate) fn congruent_to(like: PageRange) -> io::Result<Self> {
        Ok(Self(kernel::with(|kernel| kernel.reserve(like))))
    }

    pub(crate) fn range(&self) -> PageRange {
        self.0
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        std::ptr::without_provenance_mut(self.0.start())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        kernel::munmap(self.0);
    }
}

/// Not in the models: buffers are memory that the CPU reads for real.
#[derive(Debug)]
pub(crate) struct Memory(std::convert::Infallible);

impl Memory {
    pub(crate) fn aligned(_: usize, _: usize) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn huge_pages(&self) {
        match self.0 {}
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        match self.0 {}
    }
}

/// An array that does not move.
#[derive(Debug)]
pub(crate) struct MapArray<T>(Box<[T]>);

impl<T> MapArray<T> {
    pub(crate) fn zeroed(len: usize) -> io::Result<Self>
    where
        T: Zeroable,
    {
        let layout = Layout::array::<T>(len.max(1)).map_err(|_| io::ErrorKind::OutOfMemory)?;
        // SAFETY: no array here is of a type without size.
        let at = unsafe { alloc_zeroed(layout) }.cast::<T>();
        let all = std::ptr::slice_from_raw_parts_mut(at, len.max(1));
        // SAFETY: allocated as a box of this slice is, and zero bytes are a `T`.
        Ok(Self(unsafe { Box::from_raw(all) }))
    }

    pub(crate) fn from_fn(len: usize, init: impl FnMut(usize) -> T) -> io::Result<Self> {
        Ok(Self((0..len).map(init).collect()))
    }
}

impl<T> Deref for MapArray<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> DerefMut for MapArray<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

/// A value that does not move.
#[derive(Debug)]
pub(crate) struct MapBox<T>(Box<T>);

impl<T> MapBox<T> {
    pub(crate) fn new(value: T) -> io::Result<Self> {
        Ok(Self(Box::new(value)))
    }

    pub(crate) fn leak(this: Self) -> &'static mut T {
        Box::leak(this.0)
    }
}

impl<T> Deref for MapBox<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for MapBox<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}
