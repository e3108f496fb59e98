//! Changes of the CPU's page table that we are only told of: `madvise`, `munmap`, `mremap`.
//!
//! The kernel gives half of each bracket (kernel-facts section 3): REMOVE comes *before* the pages go, and its caller goes
//! on the moment it is read; UNMAP and REMAP come *after*, and the address may be in use for something else when they are
//! read. What closes the gaps is the gate (hazards G1):
//!
//! 1. A message waits. Close the gate: no section that could act on the old picture is inside, none gets in.
//! 2. Pause the devices, for a moment at most (G2): no hit is served from a translation that is about to go. An access that
//!    outstays that moment is counted.
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
//! With `MREMAP_DONTUNMAP` no UNMAP follows a REMAP: the old range stays mapped, registered and empty. It is published as memory
//! that is merely zero-filled until an UNMAP says otherwise.
//!
//! An event names addresses, and says nothing of when it was: the kernel makes the change, lets go of the map, and posts the event
//! then. What is mirrored anew at vacated addresses waits until no such event is outstanding ([`AddressSpace::settle`]). What the
//! application *moves* there by a bare `mremap`, in the microseconds between another thread's change and its event, cannot be told
//! from what was there before. The calls of [`crate::calls`] wait for each other, and are safe of it.
//!
//! Through the thread door faults come by the same descriptor, so devices are not paused before each read; there, a
//! device may use a stale translation for the moment between the read and step 4, and the caller may have returned by then.
//! How long that is, from the return of a bare `madvise` or `munmap`, is measured by `cargo bench -p benches --bench protocol -- window`,
//! which fails if there is such a moment inline, but for an access that outstays the pause (step 2), or with the calls of [`crate::calls`].

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
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::arc::MapArc;
use crate::sys::event::Event;
use crate::sys::mmap::MapArray;
use crate::sys::{clock, process};

/// How long the reader waits for paused devices before it reads all the same: the access that does not end may be the
/// event's own cause, a `free` inside a kernel.
const PAUSE_NS: u64 = 1_000_000;

/// How long a discarded range stays pending if it does not become empty, from when its caller has run: `MADV_FREE` leaves the
/// pages there.
const ZAP_NS: u64 = 20_000_000;

/// How long it is at most believed that the caller has not run yet. The kernel says so of all callers together, and where
/// mappings change without end there is always one that has not.
const UNSCHEDULED_NS: u64 = 1_000_000_000;

/// Pages of one block on which the kernel, or a device, is still at work after an event.
pub(crate) struct Pending {
    flight: Flight,
    bracket: Option<Bracket<Flight>>,
    block: usize,
    inv: Invalidation,
    /// Some page was present when a REMOVE was read: the zap is still to come.
    zap: bool,
    since_ns: u64,
    /// When the REMOVE's caller was first known to have run: the zap follows at once, unless it is preempted.
    running_since_ns: Option<u64>,
    /// When the accesses that are in flight still have had their time.
    until_ns: u64,
}

impl Pending {
    /// Whether nobody is at work any more. `changing`: the door said, after the event was read, that some event's caller has not run
    /// yet.
    fn is_over(&mut self, space: &AddressSpace, changing: bool) -> bool {
        if self.zap && meddled_zap!() {
            return false;
        }
        let region = self.flight.region();
        let gate = space.gate().enter();
        let now = clock::monotonic_ns();
        if self.running_since_ns.is_none() && (!changing || now > self.since_ns + UNSCHEDULED_NS) {
            self.running_since_ns = Some(now);
        }
        let late = self
            .running_since_ns
            .is_some_and(|since| now > since + ZAP_NS);
        if self.zap && !late && self.is_present(space, region) {
            return false;
        }
        if !quiesced(region, &gate, DeviceSet::all(), &self.inv) {
            drop(gate);
            // Past its time, or the kernel is at work on the mappings: looked at again.
            if now < self.until_ns
                || overrun::sever_once(space, region, DeviceSet::all(), &self.inv).is_err()
            {
                return false;
            }
        }
        true
    }

    /// Ends it, but for the pages that are pending on account of `others` too.
    fn end(&mut self, space: &AddressSpace, others: PageMask) {
        let _gate = space.gate().enter();
        self.flight
            .region()
            .lock_block(self.block)
            .set_pending(*self.inv.pages() - others, false);
        self.bracket = None;
    }

    fn is_of_the_block_of(&self, other: &Self) -> bool {
        self.block == other.block && self.flight.region().id() == other.flight.region().id()
    }

    fn is_present(&self, space: &AddressSpace, region: &Region) -> bool {
        self.inv
            .pages()
            .runs()
            .any(|run| is_present(space, region, self.block, run))
    }
}

/// Whether any page of `run` is present where the CPU has it; displaced ones may be anywhere.
fn is_present(space: &AddressSpace, region: &Region, block: usize, run: Range<usize>) -> bool {
    let (first, last) = (run.start, run.end - 1);
    let len = run.len();
    let at = region.host_addr_of(block, first);
    if region.host_addr_of(block, last) == at + (len - 1) * PAGE_SIZE {
        return space.nr_empty(at, len) < len;
    }
    run.into_iter()
        .any(|page| space.nr_empty(region.host_addr_of(block, page), 1) == 0)
}

/// What is pending after the events of one door, in a mapping of its own: it grows without `malloc`, under whose locks the
/// caller of the event may be (hazards W6).
pub(crate) struct PendingList {
    /// `slots[..len]` are taken.
    slots: MapArray<Option<Pending>>,
    len: usize,
    /// Some page may be pending on account of two of them.
    overlap: bool,
}

impl PendingList {
    const FIRST_LEN: usize = 256;

    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self {
            slots: MapArray::from_fn(Self::FIRST_LEN, |_| None)?,
            len: 0,
            overlap: false,
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn push(&mut self, pending: Pending) {
        while self.len == self.slots.len() {
            let (old, len) = (&mut self.slots, self.len);
            let grown = MapArray::from_fn(2 * len, |at| old.get_mut(at).and_then(Option::take));
            match grown {
                Ok(grown) => self.slots = grown,
                // No memory for a few pages: it will come, and an event may not be forgotten. Refused, nothing was taken out.
                Err(_) => process::sched_yield(),
            }
        }
        self.slots[self.len] = Some(pending);
        self.len += 1;
    }

    /// Ends what is over.
    pub(crate) fn poll(&mut self, space: &AddressSpace, changing: bool) {
        let mut kept = 0;
        for at in 0..self.len {
            let Some(mut pending) = self.slots[at].take() else {
                continue;
            };
            if pending.is_over(space, changing) {
                let others = self.others(&pending);
                pending.end(space, others);
            } else {
                self.slots[kept] = Some(pending);
                kept += 1;
            }
        }
        self.len = kept;
        self.overlap &= kept > 0;
    }

    /// The pages of the block of `pending`, which is not in the list, that are pending on account of those that are.
    fn others(&self, pending: &Pending) -> PageMask {
        if !self.overlap {
            return PageMask::EMPTY;
        }
        let others = self.slots[..self.len].iter().flatten();
        others
            .filter(|other| other.is_of_the_block_of(pending))
            .fold(PageMask::EMPTY, |pages, other| pages | *other.inv.pages())
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
        while !device.is_paused() {
            if clock::monotonic_ns() >= deadline {
                count(&device.counters().outstayed_pauses, 1);
                break;
            }
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
    pending: &mut PendingList,
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
            republish(space, closed, [range, range], |_| [None, None], None);
        }
        Event::Remap { from, to, len } => {
            point!(EventRead, from);
            let (Some(range), Some(target)) = (
                PageRange::new(from, from + len),
                PageRange::new(to, to + len),
            ) else {
                return;
            };
            for_each_part(space, closed, range, |place, part| {
                let to = part.start() - from + to;
                give_up(space, closed, place, part, What::Displaced(to), pending);
            });
            let is_last = |place: &&Place| {
                !matches!(place.kind, PlaceKind::Window(_)) && place.range.overlaps(range)
            };
            let last = space.places(closed).iter().rfind(is_last);
            let tail = last.and_then(|place| grown_tail(space, closed, target, &place.region));
            let follow = |place: &Place| match place.kind {
                PlaceKind::Window(_) => [None, None],
                _ => match place.range.intersect(range) {
                    Some(part) => followed(place, part, part.start() - from + to),
                    None => [None, None],
                },
            };
            // What was taken for a tail of other memory there, which the kernel had joined with this before it told of either.
            republish(space, closed, [range, target], follow, tail);
        }
        // Asked for by nobody, or of a version to come: nothing of ours has changed.
        Event::PageFault { .. } | Event::Fork(_) | Event::Unknown(_) => {}
    }
}

/// What is published of `part` of a place when the kernel has moved it to `to`: the part there, and what is left behind. What
/// earlier moves have added goes along.
fn followed(place: &Place, part: PageRange, to: usize) -> [Option<Place>; 2] {
    let kind = match place.kind {
        PlaceKind::Tail => PlaceKind::Tail,
        _ => PlaceKind::Moved(place.original(part.start())),
    };
    let moved = PageRange::from_pages(to, part.nr_pages()).map(|range| Place {
        range,
        kind,
        region: place.region.clone(),
    });
    let left_behind = Place {
        range: part,
        kind: PlaceKind::Tail,
        region: place.region.clone(),
    };
    [moved, Some(left_behind)]
}

/// The memory behind `target` that belongs to the same mapping and is not published.
fn grown_tail(
    space: &AddressSpace,
    closed: &Closed<'_>,
    target: PageRange,
    region: &MapArc<Region>,
) -> Option<Place> {
    let whole = space.with_grown(closed, target, region);
    Some(Place {
        range: PageRange::new(target.end(), whole.end())?,
        kind: PlaceKind::Tail,
        region: region.clone(),
    })
}

/// The addresses of both ranges are somebody else's from now on; what `follow` makes of each place is ours, and so is `more`.
fn republish(
    space: &AddressSpace,
    closed: &Closed<'_>,
    ranges: [PageRange; 2],
    follow: impl Fn(&Place) -> [Option<Place>; 2] + Copy,
    more: Option<Place>,
) {
    while space
        .republish(closed, ranges, follow, more.as_ref())
        .is_err()
    {
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
    pending: &mut PendingList,
) {
    let region = &*place.region;
    let start = place.original(part.start());
    if let What::Displaced(to) = what {
        // Its pages would be lost if it were forgotten: a page of memory will come.
        while PageRange::from_pages(start, part.nr_pages())
            .is_some_and(|from| region.displace(from, to).is_err())
        {
            process::sched_yield();
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
        // Translations in place are with devices that hold nothing.
        let holders = if state.in_place().intersects(&concerned) {
            DeviceSet::all()
        } else {
            state.holders(&concerned)
        };
        let over = invalidate(region, closed, holders, &inv);
        let zap = what == What::Discarded && {
            let present = concerned - state.away();
            let is_late = meddled_zap!();
            is_late
                || present
                    .runs()
                    .any(|run| is_present(space, region, block, run))
        };
        match what {
            What::Discarded => state.discarded(concerned),
            What::Gone | What::Displaced(_) if mutated(Mutation::EventNotRecorded) => {}
            What::Gone => state.left(concerned),
            What::Displaced(to) => {
                // Dropped by a round after the kernel had moved them, the round having copied them before: they are there.
                let shift = to.wrapping_sub(part.start());
                let origin = part.start().wrapping_sub(start);
                let is_there = |page: usize| {
                    let here = region.addr_of(block, page).wrapping_add(origin);
                    space.is_populated(here.wrapping_add(shift))
                };
                for page in (concerned & state.away()).runs().flatten() {
                    if is_there(page) {
                        state.discarded(PageMask::page(page));
                    }
                }
                state.displaced_to_new_address(concerned);
            }
        }
        point!(EventTold, part.start());
        if (zap || !over) && !mutated(Mutation::EventOverAtOnce) {
            pending.overlap |= state.pending().intersects(&concerned);
            state.set_pending(concerned, true);
            pending.push(Pending {
                flight: Flight::begin(region),
                bracket,
                block,
                inv,
                zap,
                since_ns: clock::monotonic_ns(),
                running_since_ns: None,
                until_ns: deadline(region, closed, DeviceSet::all()),
            });
        }
    }
}

/// Opens a bracket. Where all slots are taken, and the reader may not wait for one, there is none. Then updates that are under way are
/// interrupted all the same; one that begins now takes its snapshot inside the gate, which is closed until the event is applied;
/// and what is not over by then is pending, which holds rounds off.
fn open_bracket(region: &Region, block: usize, pages: Range<usize>) -> Option<Bracket<Flight>> {
    let interval = region.interval(block, pages);
    let bracket = Bracket::start(Flight::begin(region), interval, None).ok();
    if bracket.is_none() {
        region.hub().interrupt(interval);
    }
    bracket
}

/// The blocks that a range of page indices touches, with its pages in each.
pub(crate) fn blocks(pages: Range<usize>) -> impl Iterator<Item = (usize, PageMask)> {
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
    pub(crate) fn original(&self, addr: usize) -> usize {
        match self.kind {
            PlaceKind::Moved(from) => addr - self.range.start() + from,
            PlaceKind::Body | PlaceKind::Tail | PlaceKind::Window(_) => addr,
        }
    }
}

#[cfg(all(test, target_os = "linux", not(any(svm_loom, svm_shuttle, svm_points))))]
mod tests {
    use core::time::Duration;

    use crate::addr::PAGE_SIZE;
    use crate::device::{Device, DeviceLock, Invalidation, MapInfo, WouldBlock};
    use crate::error::{Access, Result};
    use crate::notifier::Interval;
    use crate::range::Interrupted;
    use crate::space::AddressSpace;
    use crate::{AttachOptions, Buffer, Capabilities, Capability, Delivery, Options};

    /// A device without a table.
    #[derive(Default)]
    struct Bare(DeviceLock);

    // SAFETY: it has no translations, and makes no access.
    unsafe impl Device for Bare {
        type Table = ();

        fn map(&self, _: &MapInfo) -> Result<()> {
            Ok(())
        }

        fn lock(&self) -> &DeviceLock {
            &self.0
        }

        fn invalidate(&self, (): &(), _: &Invalidation) -> Result<(), WouldBlock> {
            Ok(())
        }

        fn quiesced(&self, (): &(), _: &Invalidation) -> bool {
            true
        }
    }

    #[test]
    fn an_update_is_interrupted_though_no_slot_is_free() {
        // Without MOVE removal events are not asked for.
        let capabilities = Capabilities::probe();
        if !capabilities.has(Capability::Events) || !capabilities.has(Capability::Move) {
            return;
        }
        for delivery in [Delivery::Inline, Delivery::Thread] {
            let options = Options::new().delivery(delivery);
            let mut buffer = Buffer::<u8>::with_options(4 * PAGE_SIZE, &options).unwrap();
            let start = buffer.as_mut_slice().as_mut_ptr();
            let device = crate::attach(Bare::default(), AttachOptions::new()).unwrap();
            let mapped = device.map(buffer.view_mut().region()).unwrap();
            let region = mapped.shared_region();
            let mut range = device.range().unwrap();
            let _signals = crate::worker_thread();
            let page = (region.addr() - region.base()) / PAGE_SIZE;
            let mut update = range
                .start_update(&mapped, page..page + 1, Duration::from_secs(3))
                .unwrap();
            update.fault(Access::Write).unwrap();
            let mut brackets = Vec::new();
            while let Ok(bracket) = region.hub().start(Interval::new(0, 1), None) {
                brackets.push(bracket);
            }
            // SAFETY: the buffer's own page, whose contents nobody counts on.
            let outcome = unsafe { libc::madvise(start.cast(), PAGE_SIZE, libc::MADV_DONTNEED) };
            assert_eq!(outcome, 0);
            drop(AddressSpace::global().gate().enter());
            let guard = device.device().lock().lock();
            assert_eq!(update.end_update(&guard).err(), Some(Interrupted));
        }
    }
}
