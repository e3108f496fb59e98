//! Changes of the CPU's page table that we are only told of: `madvise`, `munmap`, `mremap`.
//!
//! The kernel gives half of each bracket (kernel-facts section 3): REMOVE comes *before* the pages go, and its caller goes
//! on the moment it is read; UNMAP and REMAP come *after*, and the address may be in use for something else when they are
//! read. What closes the gaps is the gate (hazards G1):
//!
//! 1. A message waits. Close the gate: no section that could act on the old picture is inside, none gets in.
//! 2. Pause the devices, for a moment at most (G2): no hit is served from a translation that is about to go.
//! 3. Read **one** event. Its caller may run from here on, and all it can find is a closed gate.
//! 4. Apply it: invalidate, and re-key the directory. Nothing is moved here and nothing waited for (G5).
//! 5. Resume, open. Only the range itself stays [`Pending`]: its bracket open, its faults waiting, until the kernel has
//!    zapped it and no access to a frame that was given up is in flight.
//!
//! | event | directory | pending until |
//! |---|---|---|
//! | REMOVE | every copy becomes stale; the pages are zero-fill again | nothing of the range is present any more (bounded: MADV_FREE keeps pages), and devices are quiesced |
//! | UNMAP | the pages are gone | devices are quiesced |
//! | REMAP | the pages are displaced: those away come home at the new address, by later faults | devices are quiesced |
//!
//! Through the thread door faults come by the same descriptor, so devices are not paused before each read; there, a
//! device may use a stale translation for the moment between the read and step 4.

use core::ops::Range;

use crate::addr::{PAGE_SIZE, PAGES_PER_BLOCK, PageRange};
use crate::block::DeviceSet;
use crate::device::{Invalidation, Keep};
use crate::fault::{Flight, deadline, invalidate, quiesced};
use crate::mask::PageMask;
use crate::notifier::Bracket;
use crate::options::Delivery;
use crate::overrun;
use crate::region::Region;
use crate::space::{AddressSpace, Door, Place, PlaceKind};
use crate::stats::count;
use crate::sync::Closed;
use crate::sys::event::Event;
use crate::sys::{clock, process};

/// How long the reader waits for paused devices before it reads all the same: the access that does not end may be the
/// event's own cause, a `free` inside a kernel.
const PAUSE_NS: u64 = 1_000_000;

/// How long a discarded range stays pending if it does not become empty: `MADV_FREE` leaves the pages there.
const ZAP_NS: u64 = 20_000_000;

/// Pages of one block on which the kernel, or a device, is still at work after an event.
pub(crate) struct Pending {
    flight: Flight,
    bracket: Option<Bracket<Flight>>,
    block: usize,
    inv: Invalidation,
    /// Some page was present when a REMOVE was read: the zap is still to come.
    zap: bool,
    since_ns: u64,
    /// When the accesses that are in flight still have had their time.
    until_ns: u64,
}

impl Pending {
    /// Ends it if nobody is at work any more; says whether it did.
    pub(crate) fn poll(&mut self, space: &AddressSpace) -> bool {
        if meddled_zap!() {
            return false;
        }
        let region = self.flight.region();
        let gate = space.gate().enter();
        let late = clock::monotonic_ns() > self.since_ns + ZAP_NS;
        if self.zap && !late && self.is_present(space, region) {
            return false;
        }
        if !quiesced(region, &gate, DeviceSet::all(), &self.inv) {
            drop(gate);
            // Past its time, or the kernel is at work on the mappings: looked at again.
            if clock::monotonic_ns() < self.until_ns
                || overrun::sever_once(space, region, DeviceSet::all(), &self.inv).is_err()
            {
                return false;
            }
        } else {
            drop(gate);
        }
        let _gate = space.gate().enter();
        region
            .lock_block(self.block)
            .set_pending(*self.inv.pages(), false);
        self.bracket = None;
        true
    }

    fn is_present(&self, space: &AddressSpace, region: &Region) -> bool {
        self.inv.pages().runs().any(|run| {
            let len = run.len();
            space.nr_empty(region.addr_of(self.block, run.start), len) < len
        })
    }
}

/// Stops the devices behind `door` before an event is read. Which devices these are does not change before [`resume`]: the set
/// of mappings changes only while the gate is open, and an event takes no window away.
pub(crate) fn pause(space: &AddressSpace, door: &Door, closed: &Closed<'_>) {
    if door.delivery() != Delivery::Inline {
        return;
    }
    for_each_device(space, door, closed, |device| device.pause());
    let deadline = clock::monotonic_ns() + PAUSE_NS;
    for_each_device(space, door, closed, |device| {
        while !device.is_paused() && clock::monotonic_ns() < deadline {
            process::sched_yield();
        }
    });
}

/// Lets the devices go on.
pub(crate) fn resume(space: &AddressSpace, door: &Door, closed: &Closed<'_>) {
    if door.delivery() == Delivery::Inline {
        for_each_device(space, door, closed, |device| device.resume());
    }
}

fn for_each_device(
    space: &AddressSpace,
    door: &Door,
    closed: &Closed<'_>,
    mut f: impl FnMut(&dyn crate::mapped::AnyMapped),
) {
    let mut seen = DeviceSet::default();
    for place in space.places(closed) {
        if core::ptr::eq(place.region.door(), door) {
            for device in place.region.devices(closed).iter().flatten() {
                if !seen.contains(device.id()) {
                    seen.insert(device.id());
                    f(&**device);
                }
            }
        }
    }
}

/// Applies one event. What is not over with it goes to `pending`.
pub(crate) fn apply(
    space: &AddressSpace,
    closed: &Closed<'_>,
    event: &Event,
    pending: &mut Vec<Pending>,
) {
    match *event {
        Event::Remove(range) => {
            point!(EventRead, range.start());
            for_each_part(space, closed, range, |place, part| {
                give_up(space, closed, place, part, What::Discarded, pending);
            });
        }
        Event::Unmap(range) => {
            point!(EventRead, range.start());
            for_each_part(space, closed, range, |place, part| {
                give_up(space, closed, place, part, What::Gone, pending);
            });
            republish(space, closed, range, &[]);
        }
        Event::Remap { from, to, len } => {
            point!(EventRead, from);
            let Some(range) = PageRange::new(from, from + len) else {
                return;
            };
            let mut moved: [Option<Place>; 16] = [const { None }; 16];
            let mut next = 0;
            for_each_part(space, closed, range, |place, part| {
                give_up(
                    space,
                    closed,
                    place,
                    part,
                    What::Displaced(part.start() - from + to),
                    pending,
                );
                if let (Some(slot), Some(target)) = (
                    moved.get_mut(next),
                    PageRange::from_pages(part.start() - from + to, part.nr_pages()),
                ) {
                    let origin = place.original(part.start());
                    *slot = Some(Place {
                        range: target,
                        kind: PlaceKind::Moved(origin),
                        region: place.region.clone(),
                    });
                    next += 1;
                }
            });
            // What earlier moves have added goes along.
            for place in space
                .places(closed)
                .iter()
                .filter(|p| p.kind == PlaceKind::Tail)
            {
                if let (Some(slot), Some(part)) =
                    (moved.get_mut(next), place.range.intersect(range))
                {
                    let target = PageRange::from_pages(part.start() - from + to, part.nr_pages());
                    *slot = target.map(|range| Place {
                        range,
                        kind: PlaceKind::Tail,
                        region: place.region.clone(),
                    });
                    next += usize::from(slot.is_some());
                }
            }
            if next > 0 {
                let tail = grown_tail(space, closed, to, len, &moved[0]);
                if let Some(slot) = moved.get_mut(next) {
                    *slot = tail;
                }
            }
            republish(space, closed, range, &moved);
        }
        // Asked for by nobody, or of a version to come: nothing of ours has changed.
        Event::PageFault { .. } | Event::Fork(_) | Event::Unknown(_) => {}
    }
}

/// The memory behind `len` bytes at `to` that belongs to the same mapping and is not published.
fn grown_tail(
    space: &AddressSpace,
    closed: &Closed<'_>,
    to: usize,
    len: usize,
    moved: &Option<Place>,
) -> Option<Place> {
    let end = space.vma(to)?.range.end();
    let next = space
        .places(closed)
        .iter()
        .map(|p| p.range.start())
        .filter(|&s| s >= to + len)
        .min();
    let range = PageRange::new(to + len, end.min(next.unwrap_or(end)))?;
    Some(Place {
        range,
        kind: PlaceKind::Tail,
        region: moved.as_ref()?.region.clone(),
    })
}

/// The addresses of `range` are somebody else's from now on; those of `moved` are ours.
fn republish(space: &AddressSpace, closed: &Closed<'_>, range: PageRange, moved: &[Option<Place>]) {
    while space.republish(closed, range, moved).is_err() {
        // No memory for a table of a few pages: it will come, and the old picture must not stay.
        process::sched_yield();
    }
}

/// Calls `f` with each published body, or moved part of one, that `range` overlaps, and the overlap.
fn for_each_part(
    space: &AddressSpace,
    closed: &Closed<'_>,
    range: PageRange,
    mut f: impl FnMut(&Place, PageRange),
) {
    for place in space.places(closed) {
        if matches!(place.kind, PlaceKind::Window(_)) {
            if place.range.overlaps(range) {
                count(&place.region.counters().anomalies, 1);
            }
            continue;
        }
        if place.kind == PlaceKind::Tail {
            continue;
        }
        if let Some(part) = place.range.intersect(range) {
            f(place, part);
        }
    }
}

/// What has become of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Discarded,
    Gone,
    Displaced(usize),
}

fn give_up(
    space: &AddressSpace,
    closed: &Closed<'_>,
    place: &Place,
    part: PageRange,
    what: What,
    pending: &mut Vec<Pending>,
) {
    let region = &*place.region;
    let start = place.original(part.start());
    if let What::Displaced(to) = what {
        let remembered = PageRange::from_pages(start, part.nr_pages())
            .is_some_and(|from| region.displace(from, to));
        if !remembered {
            count(&region.counters().anomalies, 1);
        }
    }
    let first = (start - region.base()) / PAGE_SIZE;
    for (block, pages) in blocks(first..first + part.nr_pages()) {
        let mut state = region.lock_block(block);
        // The old place of displaced pages is of no account any more; the UNMAP that follows a REMAP is for it.
        let displaced = state.displaced();
        let concerned = if matches!(place.kind, PlaceKind::Body) {
            pages - displaced
        } else {
            pages & displaced
        };
        let Some(bounds) = concerned.bounds() else {
            continue;
        };
        let bracket = open_bracket(region, block, bounds);
        let inv = Invalidation::new(block, concerned, Keep::Nothing);
        let holders = state.holders(&concerned);
        let over = invalidate(region, closed, holders, &inv);
        let zap = what == What::Discarded && {
            let present = concerned - state.away();
            present
                .runs()
                .any(|run| space.nr_empty(region.addr_of(block, run.start), run.len()) < run.len())
        };
        match what {
            What::Discarded => state.discarded(concerned),
            What::Gone => state.left(concerned),
            What::Displaced(_) => state.displaced_to_new_address(concerned),
        }
        point!(EventTold, part.start());
        if zap || !over {
            state.set_pending(concerned, true);
            pending.push(Pending {
                flight: Flight::begin(region),
                bracket,
                block,
                inv,
                zap,
                since_ns: clock::monotonic_ns(),
                until_ns: deadline(region, closed, DeviceSet::all()),
            });
        }
    }
}

/// Opens a bracket. Where all slots are taken there is none: the pages are marked pending, which holds devices off too.
fn open_bracket(region: &Region, block: usize, pages: Range<usize>) -> Option<Bracket<Flight>> {
    Bracket::start(Flight::begin(region), region.interval(block, pages), None).ok()
}

fn blocks(pages: Range<usize>) -> impl Iterator<Item = (usize, PageMask)> {
    (pages.start / PAGES_PER_BLOCK..pages.end.div_ceil(PAGES_PER_BLOCK)).map(move |block| {
        let origin = block * PAGES_PER_BLOCK;
        let (start, end) = (
            pages.start.max(origin),
            pages.end.min(origin + PAGES_PER_BLOCK),
        );
        (block, PageMask::range(start - origin..end - origin))
    })
}

impl Place {
    /// The address in the region's own range that `addr`, in this place, stands for.
    fn original(&self, addr: usize) -> usize {
        match self.kind {
            PlaceKind::Moved(from) => addr - self.range.start() + from,
            PlaceKind::Body | PlaceKind::Tail | PlaceKind::Window(_) => addr,
        }
    }
}
