//! [`AddressSpace`]: the one per process, as `mm_struct` is: regions, doors, devices, and the gate before them all.
//!
//! # Who may touch what
//!
//! | state | read | changed |
//! |---|---|---|
//! | [`Places`] (which address belongs to which region or window) | inside the gate | by replacement, freed after a grace period |
//! | [`Door`]s | any time once made | made once, live for ever: a uffd is never closed while a page may be away (design rule 2) |
//! | device slots | any time | compare-and-swap |
//!
//! A region is published *before* it is registered and unpublished *after* it is unregistered, so that no fault can come
//! for an address that nobody knows (hazards G6).

use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex as StdMutex, OnceLock, PoisonError};

use crate::addr::PageRange;
use crate::block::{DeviceId, MAX_DEVICES};
use crate::error::{Error, ErrorKind, Result};
use crate::options::Delivery;
use crate::region::Region;
use crate::sync::Gate;
pub(crate) use crate::sync::GateGuard;
use crate::sys::arc::{MapArc, MapSlice};
pub(crate) use crate::sys::gated::Gated;
use crate::sys::uffd::{Features, Uffd};
use crate::window::Window;
use crate::{inline, monitor, sys};

/// A userfaultfd and how faults on it are delivered. It lives as long as the process.
#[derive(Debug)]
pub(crate) struct Door {
    uffd: Uffd,
    delivery: Delivery,
}

impl Door {
    pub(crate) fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    pub(crate) fn delivery(&self) -> Delivery {
        self.delivery
    }

    /// Whether pages can be moved, or must be copied.
    pub(crate) fn has_move(&self) -> bool {
        self.uffd.features().contains(Features::MOVE)
    }

    /// Index of this door, below 2.
    pub(crate) fn index(&self) -> usize {
        match self.delivery {
            Delivery::Inline => 0,
            Delivery::Thread => 1,
        }
    }
}

/// What an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PlaceKind {
    /// The body of a region.
    Body,
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

/// All published ranges, sorted, none overlapping another.
type Places = MapSlice<Place>;

/// See the [module](self).
pub(crate) struct AddressSpace {
    gate: Gate,
    places: Gated<Places>,
    doors: [OnceLock<Door>; 2],
    /// Serialises set-up; never taken on the fault path.
    control: StdMutex<()>,
    devices: AtomicU8,
    forked: AtomicBool,
}

static SPACE: OnceLock<AddressSpace> = OnceLock::new();

impl AddressSpace {
    /// The address space, made on first use. For control paths.
    pub(crate) fn get(operation: &'static str) -> Result<&'static Self> {
        let space = match SPACE.get() {
            Some(space) => space,
            None => {
                let places = Gated::new(MapSlice::empty())
                    .map_err(|errno| Error::new(operation, ErrorKind::OutOfMemory).errno(errno))?;
                SPACE.get_or_init(|| Self {
                    gate: Gate::new(),
                    places,
                    doors: [const { OnceLock::new() }; 2],
                    control: StdMutex::new(()),
                    devices: AtomicU8::new(0),
                    forked: AtomicBool::new(false),
                })
            }
        };
        if space.forked.load(Ordering::Relaxed) {
            return Err(Error::new(operation, ErrorKind::Forked));
        }
        Ok(space)
    }

    /// The address space, if anything was ever mirrored or attached. For the fault path: one load, no initialisation.
    pub(crate) fn existing() -> Option<&'static Self> {
        SPACE.get()
    }

    /// The address space that something which exists belongs to.
    pub(crate) fn global() -> &'static Self {
        SPACE.get().expect("a mirror or device exists, so its address space does")
    }

    /// Whether this process may still use it: not a forked child.
    pub(crate) fn is_usable(&self) -> bool {
        !self.forked.load(Ordering::Relaxed)
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The door of this delivery, opened on first use.
    pub(crate) fn door(&'static self, operation: &'static str, delivery: Delivery, transparent: bool) -> Result<&'static Door> {
        let slot = &self.doors[match delivery {
            Delivery::Inline => 0,
            Delivery::Thread => 1,
        }];
        if let Some(door) = slot.get() {
            return check_transparent(operation, door, transparent);
        }
        let _control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(door) = slot.get() {
            return check_transparent(operation, door, transparent);
        }
        let door = Door { uffd: sys::uffd::Uffd::open(delivery, transparent).map_err(|e| e.for_operation(operation))?, delivery };
        let door = slot.get_or_init(|| door);
        // Windows fault by SIGBUS handling too where a span was overrun, so the handler serves both doors.
        inline::install(operation)?;
        monitor::spawn(operation, self, door)?;
        check_transparent(operation, door, transparent)
    }

    /// The place that `addr` lies in.
    pub(crate) fn lookup<'g>(&'g self, gate: &'g GateGuard<'_>, addr: usize) -> Option<&'g Place> {
        let places = self.places.load(gate);
        let after = places.partition_point(|p| p.range.start() <= addr);
        let place = &places[after.checked_sub(1)?];
        (addr < place.range.end()).then_some(place)
    }

    /// Makes `region` known to faults.
    pub(crate) fn publish_region(&self, region: &MapArc<Region>) -> Result<()> {
        let Some(body) = region.body() else { return Ok(()) };
        self.publish("mirror", Place { range: body, kind: PlaceKind::Body, region: region.clone() })
    }

    /// Makes a window known to faults.
    pub(crate) fn publish_window(&self, region: &MapArc<Region>, window: &Window, device: DeviceId) -> Result<()> {
        let Some(range) = window.registered() else { return Ok(()) };
        self.publish("map", Place { range, kind: PlaceKind::Window(device), region: region.clone() })
    }

    fn publish(&self, operation: &'static str, place: Place) -> Result<()> {
        let start = place.range.start();
        let mut overlaps = false;
        let result = self.places.update(&self.gate, |places| {
            overlaps = places.iter().any(|p| p.range.overlaps(&place.range));
            let at = places.partition_point(|p| p.range.start() < start);
            if overlaps {
                return Err(libc::EEXIST);
            }
            MapSlice::collect(places[..at].iter().chain([&place]).chain(&places[at..]).cloned())
        });
        result.map_err(|errno| {
            let kind = if overlaps { ErrorKind::Overlap } else { ErrorKind::OutOfMemory };
            Error::new(operation, kind).at(start).errno(errno)
        })
    }

    /// Makes a region unknown again, and waits until no fault can still refer to it through the map.
    pub(crate) fn unpublish_region(&self, region: &Region) {
        self.unpublish(|p| p.kind == PlaceKind::Body && p.region.id() == region.id());
    }

    /// Makes a window unknown again.
    pub(crate) fn unpublish_window(&self, window: &Window) {
        self.unpublish(|p| p.kind == PlaceKind::Window(window.device()) && Some(p.range) == window.registered());
    }

    fn unpublish(&self, gone: impl Fn(&Place) -> bool + Clone) {
        while self
            .places
            .update(&self.gate, |places| MapSlice::collect(places.iter().filter(|p| !gone(p)).cloned()))
            .is_err()
        {
            // No memory for a shorter map: it will come back, and leaving a dead entry is no choice.
            std::thread::yield_now();
        }
    }

    /// The region whose body contains all of `addr .. addr + len`, if any.
    pub(crate) fn region_containing(&self, addr: usize, len: usize) -> Option<MapArc<Region>> {
        let gate = self.gate.enter();
        let place = self.lookup(&gate, addr)?;
        (place.kind == PlaceKind::Body && addr + len <= place.region.end()).then(|| place.region.clone())
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
            match self.devices.compare_exchange(taken, taken | 1 << slot, Ordering::Acquire, Ordering::Relaxed) {
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

fn check_transparent(operation: &'static str, door: &'static Door, transparent: bool) -> Result<&'static Door> {
    if transparent && !door.uffd().handles_kernel_faults() {
        let why = "this process may not handle faults of the kernel: give it CAP_SYS_PTRACE, access to /dev/userfaultfd, or \
                   set the sysctl vm.unprivileged_userfaultfd=1; or use pin() around system calls";
        return Err(Error::new(operation, ErrorKind::Unsupported(why.into())));
    }
    Ok(door)
}
