//! Memory of our own.
//!
//! Two kinds. A [`Reservation`] is a range of address space in which pages appear only when the
//! runtime puts them there: a device's window onto a region. [`MapArray`] and [`MapBox`] hold the
//! runtime's state: everything the fault path reads lies in them, because a page that malloc hands
//! out may share a page, or become one, with memory that is mirrored (hazard W6).

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytemuck::Zeroable;

use super::check;
use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PageRange};

/// Where to ask for the next mapping: far from everything, and never where something has been before.
///
/// Left to itself the kernel fills the smallest hole, and that may be one that the application has just made in a buffer of
/// its own; when it then unmaps the whole of the buffer, as it may, what lies in the hole goes too. A hint that is taken, or
/// beyond what the processor can address, is ignored.
fn hint(len_bytes: usize) -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};
    const START: usize = 0x1000_0000_0000;
    const BYTES: usize = 0x2000_0000_0000;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    // Relaxed: only uniqueness counts. A page stays free between neighbours.
    let offset = NEXT.fetch_add(
        len_bytes.next_multiple_of(PAGE_SIZE) + PAGE_SIZE,
        Ordering::Relaxed,
    );
    START + offset % BYTES
}

/// Maps `len_bytes` of zero-filled private anonymous memory, without reserving swap for it.
pub(super) fn map_anonymous(len_bytes: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: without MAP_FIXED the kernel picks a range that nothing uses.
    let address = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(hint(len_bytes)),
            len_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// # Safety
///
/// The range is a mapping of the caller's own that nothing uses any more.
pub(super) unsafe fn unmap(address: usize, len_bytes: usize) {
    if len_bytes > 0 {
        // SAFETY: by contract. A failure (only ENOMEM, when splitting a mapping exceeds the VMA
        // limit) leaks address space and nothing else.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(address), len_bytes) };
    }
}

/// Bytes of address space that `len_bytes` of the runtime's own state take: whole pages.
pub(super) fn state_len(len_bytes: usize) -> Option<usize> {
    len_bytes.checked_next_multiple_of(PAGE_SIZE)
}

/// Advice that changes cost, never contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Advice {
    /// Back the range with transparent huge pages.
    HugePage,
    /// Never do.
    NoHugePage,
    /// Leave the range out of a forked child.
    DontFork,
    /// Undo [`Advice::DontFork`].
    DoFork,
    /// Zero the range in a forked child (private anonymous memory only).
    WipeOnFork,
    /// Fault every page in for writing: afterwards no page is shared copy-on-write.
    PopulateWrite,
    #[cfg(test)]
    /// Make huge pages of what is there, now.
    Collapse,
}

impl Advice {
    const fn number(self) -> libc::c_int {
        match self {
            Self::HugePage => libc::MADV_HUGEPAGE,
            Self::NoHugePage => libc::MADV_NOHUGEPAGE,
            Self::DontFork => libc::MADV_DONTFORK,
            Self::DoFork => libc::MADV_DOFORK,
            Self::WipeOnFork => libc::MADV_WIPEONFORK,
            Self::PopulateWrite => libc::MADV_POPULATE_WRITE,
            #[cfg(test)]
            Self::Collapse => libc::MADV_COLLAPSE,
        }
    }
}

/// Gives the kernel advice about a range. Sends no event; takes the mmap lock (for writing, except to
/// populate). Populating a range that is registered needs somebody else to resolve its faults.
///
/// # Errors
///
/// `ENOMEM` if part of the range is not mapped, `EINVAL` for advice the kernel or the mapping does
/// not know, `EFAULT` or `EHWPOISON` from populating, `EAGAIN` or `EBUSY` from collapsing.
pub(crate) fn advise(range: PageRange, advice: Advice) -> io::Result<()> {
    // SAFETY: no advice above changes what this process reads from the range.
    let result = unsafe {
        libc::madvise(
            std::ptr::with_exposed_provenance_mut(range.start()),
            range.len_bytes(),
            advice.number(),
        )
    };
    check(libc::c_long::from(result)).map(drop)
}

/// Drops the pages of a range; the next access finds zeros (or, where registered, faults).
///
/// On a registered range with EVENT_REMOVE this posts an event and sleeps until it is read: never
/// from the thread that reads (hazard M4).
///
/// # Errors
///
/// As madvise(2).
///
/// # Safety
///
/// The caller owns the contents of the range, and nobody holds a reference into it.
pub(crate) unsafe fn discard(range: PageRange) -> io::Result<()> {
    // SAFETY: by contract the contents may go.
    let result = unsafe {
        libc::madvise(
            std::ptr::with_exposed_provenance_mut(range.start()),
            range.len_bytes(),
            libc::MADV_DONTNEED,
        )
    };
    check(libc::c_long::from(result)).map(drop)
}

/// Address space of our own, read-write and empty: a device's window.
///
/// Not inherited by a forked child (hazard F1), and not counted against overcommit. Dropping unmaps
/// it: a caller who registered it unregisters it first, for otherwise the unmapping posts an event
/// and sleeps until it is read.
#[derive(Debug)]
pub(crate) struct Reservation {
    range: PageRange,
}

impl Reservation {
    /// Reserves `like.len_bytes()` bytes whose start is congruent to `like.start()` modulo 2 MiB, so
    /// that huge pages line up and a run of any length moves in one piece.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: no such hole, the VMA limit or RLIMIT_AS.
    pub(crate) fn congruent_to(like: PageRange) -> io::Result<Self> {
        let no_room = || io::Error::from_raw_os_error(libc::ENOMEM);
        let len = like.len_bytes();
        // One block more than needed contains an aligned start; the rest is cut off again.
        let padded_len = len.checked_add(BLOCK_SIZE).ok_or_else(no_room)?;
        let base = map_anonymous(padded_len)?.as_ptr().expose_provenance();
        let offset = like.start().wrapping_sub(base) % BLOCK_SIZE;
        let (start, end) = (base + offset, base + offset + len);
        // SAFETY: the head of the mapping just made; nothing uses it.
        unsafe { unmap(base, offset) };
        // SAFETY: its tail, likewise.
        unsafe { unmap(end, base + padded_len - end) };
        let reservation = Self {
            range: PageRange::new(start, end).ok_or_else(no_room)?,
        };
        advise(reservation.range, Advice::DontFork)?;
        Ok(reservation)
    }

    /// Where it is.
    pub(crate) fn range(&self) -> PageRange {
        self.range
    }

    #[cfg(test)]
    /// Its first byte, with provenance over all of it.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.range.start())
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own; whoever holds an address in it holds, by this
        // type's contract, the value too.
        unsafe { unmap(self.range.start(), self.range.len_bytes()) };
    }
}

/// Pages for an application's data: read-write, zero at first, inherited by a forked child as any memory.
#[derive(Debug)]
pub(crate) struct Memory {
    range: PageRange,
}

impl Memory {
    /// `len_bytes` bytes (a multiple of a page) whose start is a multiple of `align`, a page or a block.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn aligned(len_bytes: usize, align: usize) -> io::Result<Self> {
        let no_room = || io::Error::from_raw_os_error(libc::ENOMEM);
        let padded_len = len_bytes
            .checked_add(align - PAGE_SIZE)
            .ok_or_else(no_room)?;
        let base = map_anonymous(padded_len)?.as_ptr().expose_provenance();
        let start = base.next_multiple_of(align);
        let end = start + len_bytes;
        // SAFETY: the head of the mapping just made; nothing uses it.
        unsafe { unmap(base, start - base) };
        // SAFETY: its tail, likewise.
        unsafe { unmap(end, base + padded_len - end) };
        Ok(Self {
            range: PageRange::new(start, end).ok_or_else(no_room)?,
        })
    }

    /// Asks for transparent huge pages, and populates the memory with them: once it is registered with userfaultfd it
    /// would be populated page by page.
    pub(crate) fn huge_pages(&self) {
        // Advice: where it is refused the memory works all the same.
        let _ = advise(self.range, Advice::HugePage);
        let _ = advise(self.range, Advice::PopulateWrite);
    }

    /// Its first byte, with provenance over all of it.
    pub(crate) fn start(&self) -> NonNull<u8> {
        let start = std::ptr::with_exposed_provenance_mut(self.range.start());
        // SAFETY: a mapping never starts at address zero.
        unsafe { NonNull::new_unchecked(start) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own; whoever holds an address in it holds, by this type's contract, the
        // value too.
        unsafe { unmap(self.range.start(), self.range.len_bytes()) };
    }
}

/// A fixed-length array in a mapping of its own.
///
/// # Invariants
///
/// `data` is page-aligned, and the first element of `len` initialised `T`s in a private mapping of
/// `map_len` bytes that this value owns; with `map_len == 0` there is no mapping and no byte in use.
#[derive(Debug)]
pub(crate) struct MapArray<T> {
    data: NonNull<T>,
    len: usize,
    map_len: usize,
}

// SAFETY: it owns its elements, as a Box<[T]> does.
unsafe impl<T: Send> Send for MapArray<T> {}
// SAFETY: `&MapArray<T>` gives `&[T]` and nothing more.
unsafe impl<T: Sync> Sync for MapArray<T> {}

impl<T> MapArray<T> {
    /// Maps room for `len` elements, all bytes zero and no page touched yet.
    fn map(len: usize) -> io::Result<(NonNull<T>, usize)> {
        const { assert!(align_of::<T>() <= PAGE_SIZE) };
        let map_len = size_of::<T>()
            .checked_mul(len)
            .and_then(|bytes| {
                if bytes == 0 {
                    Some(0)
                } else {
                    state_len(bytes)
                }
            })
            .filter(|&bytes| bytes <= isize::MAX as usize)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        if map_len == 0 {
            return Ok((NonNull::dangling(), 0));
        }
        Ok((map_anonymous(map_len)?.cast(), map_len))
    }

    /// `len` elements of all zero bytes. Pages are populated as they are touched.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn zeroed(len: usize) -> io::Result<Self>
    where
        T: Zeroable,
    {
        let (data, map_len) = Self::map(len)?;
        // Anonymous memory reads as zeros, which is a valid `T` because it is Zeroable.
        Ok(Self { data, len, map_len })
    }

    /// `len` elements made by `init` from their indices, in order.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn from_fn(len: usize, mut init: impl FnMut(usize) -> T) -> io::Result<Self> {
        let (data, map_len) = Self::map(len)?;
        // `len` grows with each element, so that a panic in `init` drops what was made so far.
        let mut array = Self {
            data,
            len: 0,
            map_len,
        };
        while array.len < len {
            let value = init(array.len);
            // SAFETY: `map` made room for `len` elements (for a zero-sized `T`, any aligned pointer
            // will do), and the index is below.
            let slot = unsafe { data.add(array.len) };
            // SAFETY: the slot is in the mapping and holds nothing yet.
            unsafe { slot.write(value) };
            array.len += 1;
        }
        Ok(array)
    }

    /// The pages it lies in; `None` if it has none.
    pub(crate) fn pages(&self) -> Option<PageRange> {
        PageRange::containing(self.data.as_ptr().expose_provenance(), self.map_len)
    }
}

impl<T> Deref for MapArray<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: by the type's invariants, `len` initialised elements, borrowed as long as `self`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for MapArray<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as `deref`, and `&mut self` makes the borrow exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl<T> Drop for MapArray<T> {
    fn drop(&mut self) {
        let elements: *mut [T] = &raw mut **self;
        // SAFETY: the elements are initialised, and are not used again.
        unsafe { std::ptr::drop_in_place(elements) };
        // SAFETY: the mapping is this value's own, and its elements are gone.
        unsafe { unmap(self.data.as_ptr().expose_provenance(), self.map_len) };
    }
}

/// One value in a mapping of its own: a `Box` that malloc never sees.
#[derive(Debug)]
pub(crate) struct MapBox<T>(MapArray<T>);

impl<T> MapBox<T> {
    /// Moves `value` into a new mapping.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; the value is dropped.
    pub(crate) fn new(value: T) -> io::Result<Self> {
        let mut value = Some(value);
        // `from_fn` calls it once, for index 0.
        let array = MapArray::from_fn(1, |_| match value.take() {
            Some(value) => value,
            None => unreachable!("one element is made once"),
        })?;
        Ok(Self(array))
    }

    /// A value of all zero bytes, made in place: for what is too large for the stack.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn zeroed() -> io::Result<Self>
    where
        T: Zeroable,
    {
        Ok(Self(MapArray::zeroed(1)?))
    }

    /// Gives the mapping up for the rest of the process's life.
    pub(crate) fn leak(this: Self) -> &'static mut T {
        let array = std::mem::ManuallyDrop::new(this.0);
        // SAFETY: by the invariants of MapArray `data` is an initialised `T`; it is never unmapped
        // now, and there is no other way to it.
        unsafe { &mut *array.data.as_ptr() }
    }

    /// The pages it lies in; `None` for a zero-sized value.
    pub(crate) fn pages(this: &Self) -> Option<PageRange> {
        this.0.pages()
    }
}

impl<T> Deref for MapBox<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: `data` points to the one initialised element, borrowed as long as `self`.
        unsafe { self.0.data.as_ref() }
    }
}

impl<T> DerefMut for MapBox<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as `deref`, and `&mut self` makes the borrow exclusive.
        unsafe { self.0.data.as_mut() }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::super::maps::Maps;
    use super::*;

    #[test]
    fn reservations_are_congruent_and_unmapped_on_drop() {
        let maps = Maps::open().unwrap();
        for start in [0x7000_0000_1000, 0x1234_5678_9000, 0x20_0000, 0x1F_F000] {
            for nr_pages in [1, 511, 512, 513, 5000] {
                let like = PageRange::from_pages(start, nr_pages).unwrap();
                let window = Reservation::congruent_to(like).unwrap();
                let range = window.range();
                assert_eq!(range.start() % BLOCK_SIZE, start % BLOCK_SIZE);
                assert_eq!(range.nr_pages(), nr_pages);
                let vma = maps.covering(range.start()).unwrap().unwrap();
                assert!(vma.range.contains(range) && vma.readable && vma.writable);
            }
        }
    }

    #[test]
    fn arrays_are_zero_page_aligned_and_their_own() {
        let array = MapArray::<u64>::zeroed(1000).unwrap();
        assert!(array.iter().all(|&word| word == 0));
        assert_eq!(array.pages().unwrap().nr_pages(), 2);
        assert_eq!(array.as_ptr().addr() % PAGE_SIZE, 0);
        assert!(MapArray::<u64>::zeroed(0).unwrap().is_empty());
        assert_eq!(MapArray::<()>::zeroed(7).unwrap().len(), 7);
        assert!(MapArray::<u64>::zeroed(usize::MAX / 4).is_err());
        // Larger than memory: only touched pages cost anything.
        let sparse = MapArray::<u8>::zeroed(1 << 38).unwrap();
        assert_eq!(sparse[(1 << 38) - 1], 0);
    }

    #[test]
    fn elements_are_made_in_order_and_dropped_once() {
        struct Counted<'a>(&'a Cell<usize>, usize);
        impl Drop for Counted<'_> {
            fn drop(&mut self) {
                self.0.set(self.0.get() + 1);
            }
        }
        let drops = Cell::new(0);
        let array = MapArray::from_fn(300, |index| Counted(&drops, index)).unwrap();
        assert!(array.iter().enumerate().all(|(i, c)| c.1 == i));
        drop(array);
        assert_eq!(drops.get(), 300);

        drops.set(0);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            MapArray::from_fn(300, |index| {
                assert!(index < 7, "eighth element");
                Counted(&drops, index)
            })
        }));
        assert!(result.is_err());
        assert_eq!(drops.get(), 7);

        drops.set(0);
        let mut boxed = MapBox::new(Counted(&drops, 1)).unwrap();
        boxed.1 = 2;
        assert_eq!(boxed.1, 2);
        drop(boxed);
        assert_eq!(drops.get(), 1);
    }

    #[test]
    fn leaked_boxes_stay() {
        let leaked = MapBox::leak(MapBox::new([7_u32; 4000]).unwrap());
        leaked[3999] += 1;
        assert_eq!((leaked[0], leaked[3999]), (7, 8));
    }

    #[test]
    fn discard_zeroes_and_advice_does_not() {
        let mut array = MapArray::<u8>::from_fn(2 * PAGE_SIZE, |_| 5).unwrap();
        let pages = array.pages().unwrap();
        advise(pages, Advice::DontFork).unwrap();
        advise(pages, Advice::DoFork).unwrap();
        advise(pages, Advice::PopulateWrite).unwrap();
        assert!(array.iter().all(|&byte| byte == 5));
        let second = pages.skip(PAGE_SIZE).unwrap();
        let _exclusive = &mut array;
        // SAFETY: the array is ours, is borrowed exclusively and not used until after.
        unsafe { discard(second) }.unwrap();
        assert_eq!((array[PAGE_SIZE - 1], array[PAGE_SIZE]), (5, 0));
    }
}
