//! Arrays that grow without moving, for state that is read while a fault is being served.
//!
//! Segment *k* holds 2^k times as many elements as the first, and never moves: growing is hanging in one more segment,
//! which is allocated before any lock is taken.

use std::sync::OnceLock;

use super::hub::NoMemory;

/// The memory of one segment: a mapping of our own, for malloc's may become mirrored (hazards W6).
#[cfg(not(svm_loom))]
pub(super) type Chunk<T> = crate::sys::mmap::MapArray<T>;

/// The memory of one segment.
#[cfg(svm_loom)]
pub(super) type Chunk<T> = Box<[T]>;

/// Elements of segment 0.
pub(super) const FIRST: usize = if cfg!(svm_loom) { 2 } else { 64 };

/// Segments at most: more elements than a `u32` index is worth to a region.
pub(super) const SEGMENTS: usize = if cfg!(svm_loom) { 3 } else { 20 };

/// The memory of segment `segment`: a system call, so not for the fault path and not under a lock.
#[cfg(not(svm_loom))]
pub(super) fn allocate<T>(
    segment: usize,
    mut element: impl FnMut() -> T,
) -> Result<Chunk<T>, NoMemory> {
    Chunk::from_fn(FIRST << segment, |_| element()).map_err(|_| NoMemory)
}

/// The memory of segment `segment`.
#[cfg(svm_loom)]
pub(super) fn allocate<T>(
    segment: usize,
    element: impl FnMut() -> T,
) -> Result<Chunk<T>, NoMemory> {
    Ok(core::iter::repeat_with(element)
        .take(FIRST << segment)
        .collect())
}

/// Where the element `index` lives: segment, and place in it.
#[inline]
fn place(index: u32) -> (usize, usize) {
    let index = index as usize;
    if index < FIRST {
        return (0, index);
    }
    let segment = (index / FIRST + 1).ilog2() as usize;
    (segment, index - first_of(segment))
}

/// The index of a segment's first element; also, how many elements the segments below it hold.
#[inline]
pub(super) fn first_of(segment: usize) -> usize {
    FIRST * ((1 << segment) - 1)
}

/// A growing array under somebody's lock.
#[derive(Debug)]
pub(super) struct Owned<T> {
    segments: [Option<Chunk<T>>; SEGMENTS],
    nr_segments: usize,
}

impl<T> Owned<T> {
    pub(super) const fn new() -> Self {
        Self {
            segments: [const { None }; SEGMENTS],
            nr_segments: 0,
        }
    }

    pub(super) fn nr_segments(&self) -> usize {
        self.nr_segments
    }

    /// Hangs in the next segment.
    pub(super) fn grow(&mut self, chunk: Chunk<T>) {
        self.segments[self.nr_segments] = Some(chunk);
        self.nr_segments += 1;
    }

    /// The element `index`, which must have been grown to: indices come from the hub's own free list.
    #[inline]
    pub(super) fn at(&self, index: u32) -> &T {
        let (segment, offset) = place(index);
        match &self.segments[segment] {
            Some(chunk) => &chunk[offset],
            None => unreachable!("index {index} was never handed out"),
        }
    }

    /// As [`at`](Self::at), to change.
    #[inline]
    pub(super) fn at_mut(&mut self, index: u32) -> &mut T {
        let (segment, offset) = place(index);
        match &mut self.segments[segment] {
            Some(chunk) => &mut chunk[offset],
            None => unreachable!("index {index} was never handed out"),
        }
    }
}

/// A growing array that is read without a lock.
#[derive(Debug)]
pub(super) struct Shared<T> {
    segments: [OnceLock<Chunk<T>>; SEGMENTS],
}

impl<T> Shared<T> {
    pub(super) const fn new() -> Self {
        Self {
            segments: [const { OnceLock::new() }; SEGMENTS],
        }
    }

    /// Hangs in the segment `segment`. The caller holds the lock under which segments are added, so this never blocks.
    pub(super) fn grow(&self, segment: usize, chunk: Chunk<T>) {
        let added = self.segments[segment].set(chunk);
        debug_assert!(added.is_ok(), "segment {segment} added twice");
    }

    /// The element `index`, if the array has grown to it.
    #[inline]
    pub(super) fn get(&self, index: u32) -> Option<&T> {
        let (segment, offset) = place(index);
        self.segments[segment].get().map(|chunk| &chunk[offset])
    }
}

#[cfg(all(test, not(svm_loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_index_has_its_own_place() {
        let mut next = (0, 0);
        for index in 0..100_000_u32 {
            assert_eq!(place(index), next, "index {index}");
            next.1 += 1;
            if next.1 == FIRST << next.0 {
                next = (next.0 + 1, 0);
                assert_eq!(first_of(next.0), index as usize + 1);
            }
        }
    }

    #[test]
    fn growing_moves_nothing() {
        let array = Shared::new();
        array.grow(0, allocate(0, || 7).unwrap());
        let first = core::ptr::from_ref(array.get(0).expect("grown"));
        assert!(array.get(FIRST as u32).is_none());
        array.grow(1, allocate(1, || 8).unwrap());
        assert_eq!(array.get(FIRST as u32), Some(&8));
        assert_eq!(
            core::ptr::from_ref(array.get(0).expect("still there")),
            first
        );
    }
}
