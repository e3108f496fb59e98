//! [`Scratch`]: where stale pages are moved to be thrown away.
//!
//! `madvise(DONTNEED)` on a registered range posts an event and sleeps until it is read (hazards M4), so a page cannot be
//! dropped that way while a lock is held. It is moved here instead, by the same call as every other movement, and the
//! area is emptied by its owner *between* rounds, where no lock and no gate is held.

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PAGES_PER_BLOCK, PageRange};
use crate::door::Role;
use crate::error::{Error, ErrorKind, Result};
use crate::space::{AddressSpace, Door};
use crate::sys::mmap::Reservation;

/// Pages of an area: eight blocks, so that it is emptied seldom.
const CAPACITY: usize = 8 * PAGES_PER_BLOCK;
/// What one round may discard at most: a block, and as much again for parts that stalled.
const ROUND: usize = 3 * PAGES_PER_BLOCK;

/// An area for stale pages, per door it was needed for.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    areas: [Option<Area>; 2],
}

#[derive(Debug)]
struct Area {
    reservation: Option<Reservation>,
    registered: PageRange,
    door: &'static Door,
    next: usize,
}

impl Scratch {
    /// No area yet; they are made by [`ensure`](Self::ensure).
    pub(crate) fn new(_space: &AddressSpace) -> Result<Self> {
        Ok(Self::default())
    }

    /// Makes room for one round of a region behind `door`, emptying the area if need be. Outside every lock and the gate.
    #[inline]
    pub(crate) fn ensure(&mut self, door: &'static Door) -> Result<()> {
        self.reserve(door)
            .map_err(|errno| Error::new("scratch area", ErrorKind::OutOfMemory).errno(errno))
    }

    /// [`ensure`](Self::ensure) for the fault path: an `Error` is on the heap. `Err` gives the errno.
    #[inline]
    pub(crate) fn reserve(&mut self, door: &'static Door) -> Result<(), i32> {
        if self.is_ready(door) {
            return Ok(());
        }
        self.make_room(door)
    }

    /// Whether there is room for one round of a region behind `door` as it is.
    #[inline]
    pub(crate) fn is_ready(&self, door: &'static Door) -> bool {
        self.area(door).is_some_and(Area::has_room)
    }

    /// Whether there is an area for `door` that has no such room any more.
    pub(crate) fn is_full(&self, door: &'static Door) -> bool {
        self.area(door).is_some_and(|area| !area.has_room())
    }

    #[inline]
    fn area(&self, door: &'static Door) -> Option<&Area> {
        self.areas[door.index()].as_ref()
    }

    #[cold]
    fn make_room(&mut self, door: &'static Door) -> Result<(), i32> {
        match &mut self.areas[door.index()] {
            Some(area) => area.empty()?,
            none => *none = Some(Area::new(door)?),
        }
        Ok(())
    }

    /// The address of `pages` empty pages for those of a region behind `door`, a whole block's at a multiple of 2 MiB; none, where no
    /// area was made.
    ///
    /// A round that discards more than room was made for is a bug; it gets none.
    pub(crate) fn take(&mut self, door: &'static Door, pages: usize) -> Option<usize> {
        let area = self.areas[door.index()].as_mut()?;
        if pages == PAGES_PER_BLOCK {
            area.next = area.next.next_multiple_of(PAGES_PER_BLOCK);
        }
        let at = area.registered.start() + area.next * PAGE_SIZE;
        let has_room = area.next + pages <= CAPACITY;
        debug_assert!(has_room, "a round discarded more than it ensured");
        if !has_room {
            return None;
        }
        area.next += pages;
        Some(at)
    }
}

impl Area {
    fn new(door: &'static Door) -> Result<Self, i32> {
        let like =
            PageRange::new(BLOCK_SIZE, BLOCK_SIZE + CAPACITY * PAGE_SIZE).ok_or(libc::EINVAL)?;
        let reservation = Reservation::congruent_to(like)
            .map_err(|e| e.raw_os_error().unwrap_or(libc::ENOMEM))?;
        let registered = reservation.range();
        door.register(registered, Role::Scratch)?;
        Ok(Self {
            reservation: Some(reservation),
            registered,
            door,
            next: 0,
        })
    }
}

impl Area {
    /// Whether what one round may discard still fits.
    fn has_room(&self) -> bool {
        self.next + ROUND <= CAPACITY
    }

    /// Drops everything in it. While it is not registered, so that no event comes of it.
    fn empty(&mut self) -> Result<(), i32> {
        self.door.unregister(self.registered);
        if self.next > 0
            && !self
                .door
                .discard(self.registered.start(), self.next * PAGE_SIZE)
        {
            return Err(libc::EBUSY);
        }
        self.door.register(self.registered, Role::Scratch)?;
        self.next = 0;
        Ok(())
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.door.is_disowned() {
            core::mem::forget(self.reservation.take());
            return;
        }
        // Before the reservation is unmapped, which would else post an event and wait for its reader.
        self.door.unregister(self.registered);
    }
}

const _: () = assert!(ROUND <= CAPACITY && BLOCK_SIZE == PAGES_PER_BLOCK * PAGE_SIZE);
