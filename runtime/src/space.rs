//! [`AddressSpace`]: the one per process, as `mm_struct` is: regions, doors, devices, and the gate before them all.
//!
//! # Who may touch what
//!
//! | state | read | changed |
//! |---|---|---|
//! | [`Places`] (which address belongs to which region or window) | inside the gate | by replacement, freed after a grace period |
//! | [`Door`]s | any time once made | made once, live for ever: a uffd is never closed while a page may be away (design rule 2) |
//! | device slots | any time | compare-and-swap |
//! | claims | control paths | under their lock |
//!
//! A region is published *before* it is registered and unpublished *after* it is unregistered, so that no fault can come
//! for an address that nobody knows (hazards G6).

use core::ops::{ControlFlow, Range};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex as StdMutex, MutexGuard, OnceLock, PoisonError, TryLockError};

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PageRange};
use crate::block::{DeviceId, MAX_DEVICES};
pub(crate) use crate::door::Door;
use crate::door::index_of;
use crate::error::{Error, ErrorKind, Result};
use crate::options::Delivery;
use crate::region::Region;
use crate::sync::{Closed, Gate};
use crate::sys::arc::{MapArc, MapSlice};
pub(crate) use crate::sys::gated::{Gated, Inside};
use crate::sys::maps::{Maps, Vma};
use crate::sys::mmap::{self, Advice, MapArray, MapBox};
use crate::sys::pagemap::{PageState, Pagemap};
use crate::sys::process;
use crate::sys::uffd::Stop;
use crate::window::Window;
use crate::{inline, monitor};

/// What an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PlaceKind {
    /// The body of a region.
    Body,
    /// Where the kernel has moved part of a body to, from the address given: what was away comes home here.
    Moved(usize),
    /// What a growing `mremap` has added behind such a part: registered as well, and nobody else's.
    Tail,
    /// The window of a device: nothing ever faults there but by a bug, or after a stuck span was overrun.
    Window(DeviceId),
}

/// One published range.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) range: PageRange,
    pub(crate) kind: PlaceKind,
    pub(crate) region: MapArc<Region>,
}

impl Place {
    /// What is left of the place without `range`: nothing, itself, or up to two parts. Windows stay whole.
    fn without(&self, range: PageRange) -> impl Iterator<Item = Place> + Clone + use<> {
        let part = |start: usize, end: usize| {
            let range = PageRange::new(start, end)?;
            let kind = match self.kind {
                PlaceKind::Moved(from) => PlaceKind::Moved(from + (start - self.range.start())),
                kind => kind,
            };
            Some(Place {
                range,
                kind,
                region: self.region.clone(),
            })
        };
        let parts = if matches!(self.kind, PlaceKind::Window(_)) || !self.range.overlaps(range) {
            [Some(self.clone()), None]
        } else {
            [
                part(self.range.start(), range.start().min(self.range.end())),
                part(range.end().max(self.range.start()), self.range.end()),
            ]
        };
        parts.into_iter().flatten()
    }
}

/// Bytes that a mirror has to itself and that lie in no [`Place`] of its: its edges, or all of it if it is accessed in place or has no
/// whole page.
#[derive(Debug)]
struct Claim {
    region: u64,
    bytes: Range<usize>,
}

/// Mappings that what has grown is looked for in.
const MAX_MAPPINGS: usize = 16;
/// Slots for threads whose fault found no place; those that share one only try once more.
const MISS_SLOTS: usize = 64;

/// All published ranges, sorted, none overlapping another.
type Places = MapSlice<Place>;

/// See the [module](self).
pub(crate) struct AddressSpace {
    gate: Gate,
    places: Gated<Places>,
    /// Regions that are accessed where they are: nobody faults on them, but who changes their mappings by our calls is heard.
    in_place: Gated<MapSlice<MapArc<Region>>>,
    doors: [OnceLock<Door>; 2],
    /// Which doors are served: their handler is installed, and their reader runs.
    served: [AtomicBool; 2],
    /// Serialises set-up; never taken on the fault path.
    control: StdMutex<()>,
    devices: AtomicU8,
    forked: AtomicBool,
    /// How often `places` was replaced.
    nr_changes: AtomicU64,
    /// The last fault that found no place, of the threads that hash to each slot: see [`Self::has_missed_before`].
    misses: [AtomicU64; MISS_SLOTS],
    /// The same of the last fault that found a place, or what has grown behind one, and was refused all the same.
    refusals: [AtomicU64; MISS_SLOTS],
    fork_bracket: StdMutex<()>,
    /// Held across a call of [`crate::calls`] that vacates addresses, until it is applied.
    vacating: StdMutex<()>,
    /// What mirrors have to themselves beside `places`. Held while one is published, so that of two that overlap one is refused.
    claims: StdMutex<Vec<Claim>>,
    pagemap: Pagemap,
    maps: Maps,
    /// A block of zeros to copy from: never written, so it costs no memory.
    zeros: MapArray<u8>,
    /// A page that nobody touches.
    hole: MapArray<u8>,
}

/// The current address space; null before the first, never changed but by a forked child's first use.
static SPACE: AtomicPtr<AddressSpace> = AtomicPtr::new(core::ptr::null_mut());

/// How many forks this process has under way. Not of a space: the first may be made while somebody forks.
static FORKING: AtomicU32 = AtomicU32::new(0);

/// The lock of whoever makes an address space: the process that holds it, or 0.
static MAKING: AtomicU32 = AtomicU32::new(0);

/// Holds [`MAKING`].
struct Making;

impl Making {
    /// Waits for the lock. In a forked child it is free: whoever held it is in the parent, and no handler of ours may have run.
    fn lock() -> Self {
        let me = std::process::id();
        loop {
            let holder = MAKING.load(Ordering::Relaxed);
            let taken =
                || MAKING.compare_exchange(holder, me, Ordering::Acquire, Ordering::Relaxed);
            if holder != me && taken().is_ok() {
                return Self;
            }
            process::sched_yield();
        }
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        MAKING.store(0, Ordering::Release);
    }
}

/// Proof of being in a forked child, about what was the parent's: nobody replaces any of it any more, and nobody can be waited for,
/// for the threads that were at it are not here.
pub(crate) struct Orphaned(());

impl Inside for Orphaned {}

impl Orphaned {
    /// Whether what is behind this door was left behind by a fork.
    pub(crate) fn behind(door: &Door) -> Option<Self> {
        door.is_disowned().then_some(Self(()))
    }
}

/// A page that stays empty: not part of a huge one that a neighbour's touch brings.
fn new_hole() -> std::io::Result<MapArray<u8>> {
    let hole = MapArray::<u8>::zeroed(PAGE_SIZE)?;
    if let Some(page) = PageRange::from_pages(hole.as_ptr().addr(), 1) {
        // Where it fails there are no huge pages.
        let _ = mmap::advise(page, Advice::NoHugePage);
    }
    Ok(hole)
}

/// Who waits for the gate calls it, or for a block: see `sync/copiers.rs`.
pub(crate) fn let_copiers_go_on() {
    if let Some(space) = AddressSpace::existing() {
        for door in space.doors.iter().filter_map(OnceLock::get) {
            door.let_copiers_go_on(|page| space.is_populated(page));
        }
    }
}

impl AddressSpace {
    fn new() -> std::io::Result<Self> {
        // Without membarrier(2) both halves of the asymmetric fence are full ones, and nothing else changes.
        let _ = crate::sys::membarrier::init();
        // First, for it says best what is wrong on a system that is not Linux.
        let pagemap = Pagemap::open()?;
        crate::sys::disable::check()?;
        Ok(Self {
            gate: Gate::nudging(let_copiers_go_on),
            places: Gated::new(MapSlice::empty()).map_err(std::io::Error::from_raw_os_error)?,
            in_place: Gated::new(MapSlice::empty()).map_err(std::io::Error::from_raw_os_error)?,
            doors: [const { OnceLock::new() }; 2],
            served: [const { AtomicBool::new(false) }; 2],
            control: StdMutex::new(()),
            devices: AtomicU8::new(0),
            forked: AtomicBool::new(false),
            nr_changes: AtomicU64::new(0),
            misses: [const { AtomicU64::new(0) }; MISS_SLOTS],
            refusals: [const { AtomicU64::new(0) }; MISS_SLOTS],
            fork_bracket: StdMutex::new(()),
            vacating: StdMutex::new(()),
            claims: StdMutex::new(Vec::new()),
            pagemap,
            maps: Maps::open()?,
            zeros: MapArray::zeroed(BLOCK_SIZE)?,
            hole: new_hole()?,
        })
    }

    /// Address of a block of zeros.
    pub(crate) fn zeros(&self) -> usize {
        self.zeros.as_ptr().addr()
    }

    /// Address of a page that nobody touches, so that it is empty (but for `mlockall`, or a debugger; then it is a page of zeros).
    fn hole(&self) -> usize {
        self.hole.as_ptr().addr()
    }

    /// Whether the page-table entry of `addr` is not empty: a page that is present or swapped out, or a marker, which looks like
    /// one swapped out (hazards G3). None of ours makes markers, so this is whether there are contents.
    pub(crate) fn is_populated(&self, addr: usize) -> bool {
        self.pagemap
            .page(addr)
            .is_ok_and(|state| state.intersects(PageState::PRESENT | PageState::SWAPPED))
    }

    /// What the CPU's page table says of the page of `addr`.
    pub(crate) fn page_state(&self, addr: usize) -> PageState {
        self.pagemap.page(addr).unwrap_or_default()
    }

    pub(crate) fn pagemap(&self) -> &Pagemap {
        &self.pagemap
    }

    /// Whether the page of `addr` is in memory.
    pub(crate) fn is_present(&self, addr: usize) -> bool {
        self.pagemap
            .page(addr)
            .is_ok_and(|state| state.contains(PageState::PRESENT))
    }

    /// How many of the `max` pages from `addr` on are empty before the first that is not.
    pub(crate) fn nr_empty(&self, addr: usize, max: usize) -> usize {
        let Some(range) = PageRange::from_pages(addr, max) else {
            return 0;
        };
        let mut end = range.end();
        let _ = self.pagemap.walk(range, |extent| {
            end = extent.range.start();
            ControlFlow::Break(())
        });
        (end - addr) / PAGE_SIZE
    }

    /// How many of the `max` pages from `addr` on are populated before the first that is not.
    pub(crate) fn nr_populated(&self, addr: usize, max: usize) -> usize {
        let Some(range) = PageRange::from_pages(addr, max) else {
            return 0;
        };
        let mut end = addr;
        let _ = self.pagemap.walk(range, |extent| {
            if extent.range.start() != end {
                return ControlFlow::Break(());
            }
            end = extent.range.end();
            ControlFlow::Continue(())
        });
        (end - addr) / PAGE_SIZE
    }

    /// Where the mapping that covers `addr` ends.
    pub(crate) fn mapping_end(&self, addr: usize) -> Option<usize> {
        self.maps.end_of(addr)
    }

    /// The mapping at `addr`.
    pub(crate) fn vma(&self, addr: usize) -> Option<Vma> {
        self.maps.covering(addr).ok().flatten()
    }

    pub(crate) fn maps(&self) -> &Maps {
        &self.maps
    }

    /// The address space, made on first use. For control paths.
    pub(crate) fn get(operation: &'static str) -> Result<&'static Self> {
        if let Some(space) = Self::existing().filter(|s| s.is_usable()) {
            return Ok(space);
        }
        let _making = Making::lock();
        if let Some(space) = Self::existing().filter(|s| s.is_usable()) {
            return Ok(space);
        }
        let failed = |e: std::io::Error| match e.raw_os_error() {
            Some(errno) => Error::new(operation, ErrorKind::System).errno(errno),
            None if e.kind() == std::io::ErrorKind::InvalidInput => {
                Error::invalid(operation, e.to_string())
            }
            None => Error::new(operation, ErrorKind::Unsupported(e.to_string())),
        };
        let space = MapBox::leak(MapBox::new(Self::new().map_err(failed)?).map_err(failed)?);
        crate::fork::install().map_err(failed)?;
        // Release pairs with the Acquire of `existing`; SeqCst: see `fork::prepare`.
        SPACE.store(core::ptr::from_mut(space), Ordering::SeqCst);
        Ok(space)
    }

    /// The address space, if anything was ever mirrored or attached. For the fault path: one load, no initialisation.
    #[inline]
    pub(crate) fn existing() -> Option<&'static Self> {
        // Acquire pairs with the Release of `get`.
        let space = SPACE.load(Ordering::Acquire);
        // SAFETY: null, or a leaked box that is never freed.
        unsafe { space.cast_const().as_ref() }
    }

    /// How many forks are under way: while there are, no page goes to a device.
    pub(crate) fn forking() -> &'static AtomicU32 {
        &FORKING
    }

    /// Serialises the changes of who is inherited by children; never held across a fork, never taken on the fault path.
    pub(crate) fn fork_bracket(&self) -> MutexGuard<'_, ()> {
        self.fork_bracket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Serialises the application's calls that vacate addresses, so that nothing mirrored moves to an address before everybody has heard
    /// that it is free; and, where that [`is_hard_of_hearing`](Self::is_hard_of_hearing), the registration of mirrors with them. Held
    /// while the kernel waits for a reader, which does not take it.
    pub(crate) fn vacating(&self) -> MutexGuard<'_, ()> {
        self.vacating.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`vacating`](Self::vacating), if nobody has it.
    pub(crate) fn try_vacating(&self) -> Option<MutexGuard<'_, ()>> {
        match self.vacating.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// In the child of a fork: the space there is was the parent's. Async-signal-safe.
    pub(crate) fn abandon_in_child() {
        FORKING.store(0, Ordering::Relaxed);
        let Some(space) = Self::existing() else {
            return;
        };
        space.forked.store(true, Ordering::Relaxed);
        for door in space.doors.iter().filter_map(OnceLock::get) {
            door.disown_in_child();
        }
    }

    /// The address space that something which exists belongs to.
    #[inline]
    pub(crate) fn global() -> &'static Self {
        Self::existing().expect("a mirror or device exists, so its address space does")
    }

    /// Whether this process may still use it: not a forked child.
    #[inline]
    pub(crate) fn is_usable(&self) -> bool {
        !self.forked.load(Ordering::Relaxed)
    }

    /// The opposite, as a proof.
    pub(crate) fn orphaned(&self) -> Option<Orphaned> {
        (!self.is_usable()).then_some(Orphaned(()))
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The door of this delivery, opened on first use.
    pub(crate) fn door(
        &'static self,
        operation: &'static str,
        delivery: Option<Delivery>,
        transparent: bool,
    ) -> Result<&'static Door> {
        let delivery = delivery.unwrap_or_else(Door::usual_delivery);
        let slot = &self.doors[index_of(delivery)];
        // Acquire pairs with the Release below: whoever gets a door gets one that is served.
        if !self.served[index_of(delivery)].load(Ordering::Acquire) {
            self.open_door(operation, delivery)?;
        }
        let door = slot.get().expect("a door that is served is open");
        check_transparent(operation, door, transparent)
    }

    /// Opens a door and has it served; goes on where an earlier attempt has failed.
    fn open_door(&'static self, operation: &'static str, delivery: Delivery) -> Result<()> {
        let slot = &self.doors[index_of(delivery)];
        let served = &self.served[index_of(delivery)];
        let _control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        // Relaxed: it is written under this lock.
        if served.load(Ordering::Relaxed) {
            return Ok(());
        }
        let door = match slot.get() {
            Some(door) => door,
            None => {
                let door = Door::open(operation, delivery)?;
                slot.get_or_init(|| door)
            }
        };
        // Windows fault by SIGBUS handling too where a span was overrun, so the handler serves both doors.
        inline::install(operation)?;
        monitor::spawn(operation, self, door)?;
        served.store(true, Ordering::Release);
        Ok(())
    }

    /// The place that `addr` lies in.
    pub(crate) fn lookup<'g>(&'g self, gate: &'g impl Inside, addr: usize) -> Option<&'g Place> {
        let places = self.places.load(gate);
        let after = places.partition_point(|p| p.range.start() <= addr);
        let place = &places[after.checked_sub(1)?];
        (addr < place.range.end()).then_some(place)
    }

    /// Notes that the fault at `addr` of `thread` has found no place, and says whether the same fault had found none before, in
    /// the same set of places.
    ///
    /// One miss is not enough to call a fault a stranger's (hazards G6): its region may have been closed, the page home and the
    /// registration over, between the fault and the look-up. Tried again, the access succeeds, or faults again.
    pub(crate) fn has_missed_before(
        &self,
        _gate: &impl Inside,
        addr: usize,
        thread: usize,
    ) -> bool {
        self.is_noted(&self.misses, addr, thread)
    }

    /// The same of a fault that was refused, which is looked at after the other: a fault that has missed twice may have been raised before
    /// its page was unregistered, and be looked at after.
    pub(crate) fn was_refused_before(
        &self,
        _gate: &impl Inside,
        addr: usize,
        thread: usize,
    ) -> bool {
        self.is_noted(&self.refusals, addr, thread)
    }

    /// Notes the fault among `notes`; whether it was there.
    fn is_noted(&self, notes: &[AtomicU64; MISS_SLOTS], addr: usize, thread: usize) -> bool {
        const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
        let thread = (thread as u64).wrapping_mul(ODD);
        // Relaxed: a thread asks for its own misses only, and a change that is seen late costs one more try.
        let changes = self.nr_changes();
        let miss = (thread ^ addr as u64)
            .wrapping_add(changes)
            .wrapping_mul(ODD)
            | 1;
        let slot = (thread >> 32) as usize % MISS_SLOTS;
        notes[slot].swap(miss, Ordering::Relaxed) == miss
    }

    /// Whether mappings may be emptied, unmapped or moved without an event.
    pub(crate) fn is_hard_of_hearing(&self) -> bool {
        self.doors
            .iter()
            .filter_map(OnceLock::get)
            .any(|door| !door.hears_of_unmapping() || !door.hears_of_removal())
    }

    /// Whether the kernel has changed a mapping, and the reader has not heard of it yet.
    pub(crate) fn has_unread_events(&self) -> bool {
        self.doors
            .iter()
            .filter_map(OnceLock::get)
            .any(|door| door.has_events() && door.has_message())
    }

    /// Whether the kernel has changed a mapping of which nobody has heard yet, or whose cause has not run since.
    pub(crate) fn is_changing(&self) -> bool {
        self.doors
            .iter()
            .filter_map(OnceLock::get)
            .any(|door| door.has_events() && door.is_changing(self.zeros()))
    }

    /// How often `places` was replaced.
    pub(crate) fn nr_changes(&self) -> u64 {
        // Relaxed: whoever compares two of them has entered the gate between, which orders what was published.
        self.nr_changes.load(Ordering::Relaxed)
    }

    /// The region whose memory `addr` has become part of, if it lies in no place itself: the kernel joins mappings, and lets one
    /// grow, only where all of it is registered with the same userfaultfd. What was protected in part since is several mappings; whether
    /// those behind the first are registered so, too, the kernel is asked. (Of one that is not writable it does not say.)
    pub(crate) fn grown<'g>(&'g self, gate: &'g impl Inside, addr: usize) -> Option<&'g Region> {
        let own = self.vma(addr)?;
        let mut mapping = own.range;
        for nr_before in 0..MAX_MAPPINGS {
            let inside = |place: &&Place| {
                !matches!(place.kind, PlaceKind::Window(_)) && mapping.overlaps(place.range)
            };
            if let Some(place) = self.places(gate).iter().find(inside) {
                let is_ours = nr_before == 0
                    || !own.writable
                    || place.region.door().ask(addr, self.hole()) != Stop::Invalid;
                return is_ours.then_some(&*place.region);
            }
            mapping = self.vma(mapping.start().checked_sub(PAGE_SIZE)?)?.range;
        }
        None
    }

    /// `range`, of a place of `region`, with what has grown behind it, of which the kernel tells nobody: the rest of its mapping, and the
    /// mappings behind that as far as the kernel says that they are registered likewise.
    pub(crate) fn with_grown(
        &self,
        gate: &impl Inside,
        range: PageRange,
        region: &Region,
    ) -> PageRange {
        let places = self.places(gate);
        let after = places.partition_point(|place| place.range.start() < range.end());
        let limit = places.get(after).map(|place| place.range.start());
        let mut end = range.end();
        let mut at = end - PAGE_SIZE;
        for nr_behind in 0..MAX_MAPPINGS {
            if limit.is_some_and(|limit| at.max(range.end()) >= limit) {
                break;
            }
            let Some(vma) = self.vma(at) else { break };
            if nr_behind == 0 || self.is_as_a_body(region.door(), at) {
                end = vma.range.end();
            }
            at = vma.range.end();
        }
        PageRange::new(range.start(), limit.map_or(end, |limit| end.min(limit))).unwrap_or(range)
    }

    /// Whether the page at `at` is registered with `door` as bodies are, with write protection: scratch areas, which are no places either,
    /// are not. Asked in this order, for to lift a protection the kernel does not ask whose userfaultfd the page is registered with.
    fn is_as_a_body(&self, door: &Door, at: usize) -> bool {
        matches!(
            door.ask(at, self.hole()),
            Stop::NotPresent | Stop::Exists | Stop::Complete
        ) && door.unprotect(at, PAGE_SIZE) == Stop::Complete
    }

    /// Waits until every change of the mappings that the kernel has made until now was read and applied. One that is made but
    /// not read of yet shows in the answer of each call on the descriptor, even before there is a message to read.
    ///
    /// Memory that is to be mirrored may be where other memory was: an UNMAP of that which was read later would be taken for
    /// one of this (hazards G7). Bounded, for others may go on changing mappings; what they change is not this memory.
    pub(crate) fn settle(&self) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(1);
        for door in self
            .doors
            .iter()
            .filter_map(OnceLock::get)
            .filter(|door| door.has_events())
        {
            while door.is_changing(self.zeros()) && std::time::Instant::now() < deadline {
                std::thread::yield_now();
            }
        }
        // Read is not applied: the reader holds the gate closed until it is.
        drop(self.gate.enter());
    }

    /// All published ranges.
    pub(crate) fn places<'g>(&'g self, gate: &'g impl Inside) -> &'g [Place] {
        self.places.load(gate)
    }

    /// While the gate is closed: takes two ranges out of every published body (or moved part of one), and publishes what `follow`
    /// makes of each place, and `more`.
    pub(crate) fn republish(
        &self,
        closed: &Closed<'_>,
        [from, to]: [PageRange; 2],
        follow: impl Fn(&Place) -> [Option<Place>; 2] + Copy,
        more: Option<&Place>,
    ) -> Result<(), i32> {
        self.nr_changes.fetch_add(1, Ordering::Relaxed);
        self.places.update_closed(closed, |places| {
            let left = places.iter().flat_map(|place| place.without(from));
            let left = left.flat_map(move |place| place.without(to));
            let followed = places
                .iter()
                .flat_map(|place| follow(place).into_iter().flatten());
            let mut all = MapSlice::collect(left.chain(followed).chain(more.cloned()))?;
            // The iterators are in no common order.
            all.sort_unstable_by_key(|place| place.range.start());
            Ok(all)
        })
    }

    /// Has `publish` make a mirror's region known, unless the mirror shares a byte with another: an error that changes nothing.
    ///
    /// Bytes, not pages: of two slices side by side each may have a part of the page between them, where nothing ever moves. What
    /// the kernel has taken from a mirror's body is that mirror's no more.
    pub(crate) fn admit(&self, region: &Region, publish: impl Fn() -> Result<()>) -> Result<()> {
        let admitted = || {
            let mut claims = self.claims();
            self.check_overlap(&claims, region)?;
            publish()?;
            let of_region = |bytes| Claim {
                region: region.id(),
                bytes,
            };
            let outside = region.outside_places().into_iter();
            claims.extend(outside.filter(|bytes| !bytes.is_empty()).map(of_region));
            Ok(())
        };
        admitted().or_else(|_| {
            // What it overlaps may be gone, and nobody has read of it yet.
            self.drain_events();
            admitted()
        })
    }

    /// Gives up what [`admit`](Self::admit) gave. The caller unpublishes it first.
    pub(crate) fn dismiss(&self, region: &Region) {
        self.claims().retain(|claim| claim.region != region.id());
    }

    fn claims(&self) -> MutexGuard<'_, Vec<Claim>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_overlap(&self, claims: &[Claim], region: &Region) -> Result<()> {
        let bytes = region.addr()..region.end();
        let claimed = claims.iter().find(|claim| share(&claim.bytes, &bytes));
        if claimed.is_some() || self.is_published(&bytes) {
            return Err(Error::new("mirror", ErrorKind::Overlap).at(region.addr()));
        }
        Ok(())
    }

    /// Whether one of `bytes` lies in a published range.
    pub(crate) fn is_published(&self, bytes: &Range<usize>) -> bool {
        let gate = self.gate.enter();
        self.places(&gate)
            .iter()
            .any(|place| share(&(place.range.start()..place.range.end()), bytes))
    }

    /// Makes those parts of `region` known to faults where something is mapped: all of them, or none.
    pub(crate) fn publish_region(
        &self,
        region: &MapArc<Region>,
        mapped: &[PageRange],
    ) -> Result<()> {
        for &range in mapped {
            let place = Place {
                range,
                kind: PlaceKind::Body,
                region: region.clone(),
            };
            self.publish("mirror", place)
                .inspect_err(|_| self.unpublish_region(region))?;
        }
        Ok(())
    }

    /// Makes a region known that is accessed where it is.
    pub(crate) fn publish_in_place(&self, region: &MapArc<Region>) -> Result<()> {
        let added = self.in_place.update(&self.gate, |regions| {
            MapSlice::collect(regions.iter().chain([region]).cloned())
        });
        added.map_err(|errno| {
            Error::new("mirror", ErrorKind::OutOfMemory)
                .at(region.addr())
                .errno(errno)
        })
    }

    /// Makes it unknown again.
    pub(crate) fn unpublish_in_place(&self, region: &Region) {
        while self
            .in_place
            .update(&self.gate, |regions| {
                MapSlice::collect(regions.iter().filter(|r| r.id() != region.id()).cloned())
            })
            .is_err()
        {
            std::thread::yield_now();
        }
    }

    /// The regions that are accessed where they are.
    pub(crate) fn in_place<'g>(&'g self, gate: &'g impl Inside) -> &'g [MapArc<Region>] {
        self.in_place.load(gate)
    }

    /// Makes a window known to faults.
    pub(crate) fn publish_window(
        &self,
        region: &MapArc<Region>,
        window: &Window,
        device: DeviceId,
    ) -> Result<()> {
        let Some(range) = window.registered() else {
            return Ok(());
        };
        self.publish(
            "map",
            Place {
                range,
                kind: PlaceKind::Window(device),
                region: region.clone(),
            },
        )
    }

    /// Waits until what the kernel has to tell was read and applied: memory whose UNMAP nobody has read yet looks as if it
    /// were still mirrored (hazards G7). A stream of faults through the thread door does not hold it up for ever.
    pub(crate) fn drain_events(&self) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(1);
        while self.has_unread_events() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        // Read is not applied: the reader holds the gate closed until it is.
        drop(self.gate.enter());
    }

    fn publish(&self, operation: &'static str, place: Place) -> Result<()> {
        let start = place.range.start();
        let mut overlaps = false;
        self.nr_changes.fetch_add(1, Ordering::Relaxed);
        let result = self.places.update(&self.gate, |places| {
            overlaps = places.iter().any(|p| p.range.overlaps(place.range));
            let at = places.partition_point(|p| p.range.start() < start);
            if overlaps {
                return Err(libc::EEXIST);
            }
            MapSlice::collect(
                places[..at]
                    .iter()
                    .chain([&place])
                    .chain(&places[at..])
                    .cloned(),
            )
        });
        result.map_err(|errno| {
            let kind = if overlaps {
                ErrorKind::Overlap
            } else {
                ErrorKind::OutOfMemory
            };
            Error::new(operation, kind).at(start).errno(errno)
        })
    }

    /// Makes a region unknown again, and waits until no fault can still refer to it through the map.
    pub(crate) fn unpublish_region(&self, region: &Region) {
        self.unpublish(|p| !matches!(p.kind, PlaceKind::Window(_)) && p.region.id() == region.id());
    }

    /// Makes a window unknown again.
    pub(crate) fn unpublish_window(&self, window: &Window) {
        self.unpublish(|p| {
            p.kind == PlaceKind::Window(window.device()) && Some(p.range) == window.registered()
        });
    }

    fn unpublish(&self, gone: impl Fn(&Place) -> bool + Clone) {
        self.nr_changes.fetch_add(1, Ordering::Relaxed);
        while self
            .places
            .update(&self.gate, |places| {
                MapSlice::collect(places.iter().filter(|p| !gone(p)).cloned())
            })
            .is_err()
        {
            // No memory for a shorter map: it will come back, and leaving a dead entry is no choice.
            std::thread::yield_now();
        }
    }

    /// The region that contains all of `addr .. addr + len`, if any: its body, and the edges beside it.
    pub(crate) fn region_containing(&self, addr: usize, len: usize) -> Option<MapArc<Region>> {
        let gate = self.gate.enter();
        let contains = |place: &&Place| {
            let region = &place.region;
            place.kind == PlaceKind::Body && region.addr() <= addr && addr + len <= region.end()
        };
        self.places(&gate)
            .iter()
            .find(contains)
            .map(|place| place.region.clone())
    }

    /// Takes a free device slot.
    pub(crate) fn claim_device(&self) -> Option<DeviceId> {
        let mut taken = self.devices.load(Ordering::Relaxed);
        loop {
            let slot = taken.trailing_ones();
            if slot as usize >= MAX_DEVICES {
                return None;
            }
            // Acquire pairs with the Release of `release_device`: the slot's former owner is done with it.
            match self.devices.compare_exchange(
                taken,
                taken | 1 << slot,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return u8::try_from(slot).ok().map(DeviceId),
                Err(now) => taken = now,
            }
        }
    }

    /// Gives a device slot back.
    pub(crate) fn release_device(&self, id: DeviceId) {
        self.devices.fetch_and(!(1 << id.0), Ordering::Release);
    }
}

/// Whether some byte is in both.
fn share(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

fn check_transparent(
    operation: &'static str,
    door: &'static Door,
    transparent: bool,
) -> Result<&'static Door> {
    if transparent && !door.is_transparent() {
        let why = "this process may not handle faults of the kernel: give it CAP_SYS_PTRACE, access to /dev/userfaultfd, or \
                   set the sysctl vm.unprivileged_userfaultfd=1; or use pin() around system calls";
        return Err(Error::new(operation, ErrorKind::Unsupported(why.into())));
    }
    Ok(door)
}
