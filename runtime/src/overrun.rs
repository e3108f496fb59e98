//! A span that outstays a shootdown (hazards W2).
//!
//! An access of a device is over in nanoseconds, and whoever needs its page waits for it. But a *span*, device memory that a
//! kernel holds by reference, is open for as long as the kernel likes, which may be for ever; and a thread of the CPU cannot
//! be kept waiting for ever. Nor can the span be closed from outside: it is references, in registers, in code that is not ours.
//! So its pages are taken from under it, in such a way that the late access which may follow finds *no* memory, and never the
//! wrong one.
//!
//! # The course of it
//! 1. *Wait.* The translations are gone, the bracket is open: no new span of the pages begins. Whoever waits does so until the
//!    deadline of the device ([`AttachOptions::span_deadline`](crate::AttachOptions::span_deadline)). One that wanted only the
//!    right to write back (a CPU read) then begins anew and wants everything: a page that a late span can still write is no
//!    duplicate of anything.
//! 2. *Sever* ([`sever_once`]). The pages come home, to the CPU alone: what is away moves there, what is shared is
//!    un-protected. What the late span's device still has of them in its window, stale copies included, is discarded. So
//!    every window page under the span is empty, and armed. The wait is over, and who waited begins anew.
//! 3. *Quarantine.* The pages are marked [`severed`](crate::block). Until the span is over no window page is filled there: a late
//!    access to a page that had come back meanwhile, for another worker, would be an access without a translation, and the
//!    device's own writers would not be alone. Devices access these pages in place, at the host's address, where nothing
//!    depends on who holds a translation.
//! 4. *Lift* ([`lift`]). The next launch on the region, or device round that wants a severed page, takes the mark away if it finds
//!    that no span is open on the page any more.
//! 5. *Late access* ([`touched`]). If the span touches a page of its own after step 2 the access traps. The thread can neither
//!    go on nor return: it is asked of the device ([`Device::overrun`](crate::Device::overrun)), which ends the work
//!    that it did with an error, and is *parked* for good.
//!
//! # A span that ends without touching its pages again
//! All it read, it read before step 2, when the pages were its own; all it wrote was moved along. Its work is whole: to the others it
//! looks as if it had ended at the deadline. So nothing is reported, and the mark is lifted.
//!
//! # Where there is no `UFFDIO_MOVE`
//! A page is taken by a copy, and a late access might come between the copy and the discard. There windows are registered for write
//! protection too, and are protected before the copy, so that a late store traps like any other; and the CPU's copy is
//! protected until the window is empty, so that a late load finds what is current. (Where there is MOVE but it refuses a
//! page, which `mprotect` has made read-only or `mlock` has locked, the copy goes without: for those few microseconds a late
//! access finds the old page.) A span may end between: then it has not been taken, and a protection that stays is lifted at the
//! device's next store ([`lift_protection`]); a system call that stores there is refused.
//!
//! # The doors
//! Inline, the late thread finds itself in the `SIGBUS` handler. Through the thread door it sleeps in its fault, of which the
//! monitor reads; that sends the thread a `SIGBUS` of its own, with the address, and so into the same handler.
//! It is parked there with nothing of ours in its hands: not the gate, not a stack of the pool.
//!
//! # What a device's memory must be for this
//! A window. An access to opaque memory does not trap, and is the device's own to stop.

use crate::addr::{PAGE_SIZE, page_floor};
use crate::block::{BlockState, DeviceSet};
use crate::device::{Invalidation, Keep, LateAccess, Overrun, ThreadId};
use crate::error::Access;
use crate::fault::{self, quiesced, wait_until_quiesced};
use crate::mapped::AnyMapped;
use crate::mask::PageMask;
use crate::movement::{Mover, Stall};
use crate::region::{Region, RegionKind};
use crate::scratch::Scratch;
use crate::space::{AddressSpace, Inside, PlaceKind};
use crate::stats::{Cause, count};
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::process;
use crate::sys::uffd::Stop;

/// What became of a shootdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Shot {
    /// Nobody uses the pages any more, as far as `inv` went, or they cannot be taken: the caller goes on.
    Quiet,
    /// Somebody did not stop. The pages were taken, and are home: the caller begins anew.
    Severed,
}

/// Waits until `holders`, which were told of `inv` inside a bracket that is open still, are done with the pages; past the
/// deadline, severs them. No lock is held; for threads that may wait.
pub(crate) fn shoot_down(
    space: &AddressSpace,
    region: &Region,
    holders: DeviceSet,
    inv: &Invalidation,
) -> Shot {
    if wait_until_quiesced(space, region, holders, inv, None) {
        return Shot::Quiet;
    }
    // What is taken is taken from every device that holds it: the caller's own, which a round does not tell, and those that an eviction has
    // left alone. They are told now, and get as much time; so do readers, who were not asked to stop until now.
    let (all, told) = escalate(space, region, inv);
    let asked_now = match inv.keep() {
        Keep::Nothing => told.minus(holders),
        Keep::Reads => told,
    };
    if !asked_now.is_empty()
        && wait_until_quiesced(space, region, asked_now, &all, None)
        && inv.keep() == Keep::Reads
    {
        return Shot::Severed;
    }
    let (inv, holders) = (all, told.union(holders));
    loop {
        match sever_once(space, region, holders, &inv) {
            Ok(()) => return Shot::Severed,
            Err(Stall::Changing | Stall::NoMemory) => process::sched_yield(),
            // The caller's own attempt will say so.
            Err(Stall::Busy(_) | Stall::Refused(_) | Stall::Lost(_)) => return Shot::Quiet,
        }
    }
}

/// Has the holders of the pages stop altogether.
pub(crate) fn escalate(
    space: &AddressSpace,
    region: &Region,
    inv: &Invalidation,
) -> (Invalidation, DeviceSet) {
    let all = Invalidation::new(inv.block(), *inv.pages(), Keep::Nothing);
    let gate = space.gate().enter();
    let holders = region.lock_block(inv.block()).holders(inv.pages());
    fault::invalidate(region, &gate, holders, &all);
    (all, holders)
}

/// Takes the pages of `inv` from those of `holders` that still use them. They were told, inside a bracket that is open still, to
/// stop altogether, and had their time. After `Changing` and `NoMemory` try again later, holding nothing.
pub(crate) fn sever_once(
    space: &AddressSpace,
    region: &Region,
    holders: DeviceSet,
    inv: &Invalidation,
) -> Result<(), Stall> {
    let mut scratch = Scratch::default();
    // Outside the gate: it maps memory.
    scratch
        .reserve(region.door())
        .map_err(|_errno| Stall::NoMemory)?;
    let gate = space.gate().enter();
    let mut state = region.lock_block(inv.block());
    // Being discarded by a call of ours, see `release_attempt`. (Displaced pages are pending for the span that is to be severed.)
    let held = state.held_by_devices(None) & state.away();
    if ((held & state.pending()) - state.displaced()).intersects(inv.pages()) {
        return Err(Stall::Changing);
    }
    let mut late = DeviceSet::default();
    for id in holders.iter() {
        if !quiesced(region, &gate, DeviceSet::one(id), inv) {
            late.insert(id);
        }
    }
    if late.is_empty() {
        return Ok(());
    }
    let taken = take_home(region, &gate, &mut state, inv, late, &mut scratch);
    debug_assert!(
        state.is_consistent(),
        "the directory lost a holder: {state:?}"
    );
    if let Err(stall @ (Stall::Changing | Stall::NoMemory)) = taken {
        return Err(stall);
    }
    // Also where one cannot come home.
    state.set_severed(*inv.pages(), !mutated(Mutation::SeveredRefilled));
    region.set_has_severed();
    taken?;
    count(&region.counters().severed_pages, inv.pages().count() as u64);
    Ok(())
}

/// Step 2: the pages go to the CPU alone, and leave nothing in the windows of `late`.
///
/// The order is that of what a late span may see. While the CPU cannot write a page, what a window still has of it is not stale: so
/// each copy that has a twin goes first, and the right to write is given back last.
fn take_home(
    region: &Region,
    gate: &impl Inside,
    state: &mut BlockState,
    inv: &Invalidation,
    late: DeviceSet,
    scratch: &mut Scratch,
) -> Result<(), Stall> {
    let pages = *inv.pages();
    let mut mover = Mover::new(region, inv.block(), state);
    let late = || late.iter().filter_map(|id| region.device(gate, id));
    let mut protected = mover.state.shared() & pages;
    for device in late() {
        let twins = pages - mover.state.exclusive_to(device.id());
        empty(&mut mover, device, twins, scratch)?;
    }
    if !region.door().has_move() {
        for device in late() {
            let alone = mover.state.exclusive_to(device.id()) & pages;
            mover.protect_frames(device, alone)?;
            for run in parts(mover.state, alone) {
                mover.share_home(device, run.clone())?;
                protected |= PageMask::range(run);
            }
            empty(&mut mover, device, alone, scratch)?;
        }
    }
    loop {
        let held = mover.state.away() & pages & mover.state.held_by_devices(None);
        let Some((page, holder)) = held
            .first_from(0)
            .and_then(|page| Some((page, mover.state.holder_of(page)?)))
        else {
            break;
        };
        let with_holder = held & mover.state.frames(holder);
        let run = if mover.state.displaced().contains(page) {
            page..page + 1
        } else {
            (with_holder - mover.state.displaced()).run_around(page)
        };
        fault::move_home(&mut mover, region, gate, page, &run, Cause::Demand)?;
    }
    for device in late() {
        // What was copied home, since the kernel would not move it.
        empty(&mut mover, device, pages, scratch)?;
    }
    mover.state.revoked_all(pages, None);
    if region.kind() == RegionKind::Managed {
        for run in parts(mover.state, protected - mover.state.away()) {
            mover.unprotect(run)?;
        }
    }
    Ok(())
}

/// The runs of `pages`, displaced ones one by one: their neighbours may be elsewhere.
fn parts(
    state: &BlockState,
    pages: PageMask,
) -> impl Iterator<Item = core::ops::Range<usize>> + use<> {
    let displaced = state.displaced() & pages;
    let single = displaced.runs().flatten().map(|page| page..page + 1);
    (pages - displaced).runs().chain(single)
}

/// Discards what `device` has of `pages` in its window, current copies included: they have a twin.
fn empty(
    mover: &mut Mover<'_>,
    device: &dyn AnyMapped,
    pages: PageMask,
    scratch: &mut Scratch,
) -> Result<(), Stall> {
    let id = device.id();
    mover
        .state
        .revoked(id, pages - mover.state.exclusive_to(id));
    let before = mover.state.resident(id).count();
    let cleared = mover.clear_junk(device, pages, scratch);
    device
        .residency()
        .release(before - mover.state.resident(id).count());
    cleared
}

/// Step 4: those of `pages` that no span is open on any more may go to devices again. Says whether there were any; the caller
/// then begins its round anew.
pub(crate) fn lift(
    region: &Region,
    gate: &impl Inside,
    block: usize,
    state: &mut BlockState,
    pages: PageMask,
) -> bool {
    let pages = state.severed() & pages;
    let Some(bounds) = pages.bounds() else {
        return false;
    };
    let inv = Invalidation::new(block, pages, Keep::Nothing);
    // A look before anybody is told: while the span is open the others keep their translations in place.
    if !quiesced(region, gate, DeviceSet::all(), &inv) {
        return false;
    }
    let Ok(_bracket) = region.hub().start(region.interval(block, bounds), None) else {
        return false;
    };
    // Translations in place must go before the pages can.
    let over = fault::invalidate(region, gate, DeviceSet::all(), &inv);
    if over {
        state.set_severed(pages, false);
    }
    over
}

/// [`lift`] of the whole region, at the beginning of a launch.
pub(crate) fn lift_all(region: &Region) {
    if !region.take_has_severed() {
        return;
    }
    let space = AddressSpace::global();
    for block in 0..region.nr_blocks() {
        let gate = space.gate().enter();
        let mut state = region.lock_block(block);
        lift(region, &gate, block, &mut state, PageMask::FULL);
        if !state.severed().is_empty() {
            region.set_has_severed();
        }
    }
}

/// Whether a span of `device` is open on a page of `region` that was taken from it: its window has to stay.
pub(crate) fn is_outstayed(space: &AddressSpace, region: &Region, device: DeviceSet) -> bool {
    (0..region.nr_blocks()).any(|block| {
        let gate = space.gate().enter();
        let severed = region.lock_block(block).severed();
        let inv = Invalidation::new(block, severed, Keep::Nothing);
        !severed.is_empty() && !quiesced(region, &gate, device, &inv)
    })
}

/// What is to become of a thread that touched an empty or protected page of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It runs no more.
    Park,
    /// The address is in no window.
    NotThere,
    /// No device knows it: an access of somebody who has no business there.
    Stray,
}

/// Step 5: the calling thread touched `addr`, an empty or protected page of a window, and is in a signal handler.
pub(crate) fn touched(
    space: &AddressSpace,
    addr: usize,
    access: Option<Access>,
    thread: usize,
) -> Fate {
    let gate = space.gate().enter();
    let Some(place) = space.lookup(&gate, addr) else {
        return Fate::NotThere;
    };
    let PlaceKind::Window(id) = place.kind else {
        return Fate::NotThere;
    };
    let region = &*place.region;
    let fate = region.device(&gate, id).map(|device| {
        device.overrun(&LateAccess {
            addr: addr
                .wrapping_sub(device.window().base())
                .wrapping_add(region.base()),
            access,
            thread: ThreadId::of(thread),
        })
    });
    if fate == Some(Overrun::Park) {
        count(&region.counters().overruns, 1);
        Fate::Park
    } else {
        count(&region.counters().anomalies, 1);
        Fate::Stray
    }
}

/// Lifts the protection of a window page that is its device's alone, if that is what a store to `addr` met. It is of a shootdown without MOVE
/// that began to take the page, could not, and found the span over when it came back. `None` while a mapping is changing.
///
/// Who sleeps at the page is woken: so it is for the thread that faulted, or for the one that reads of such faults; never for a thread
/// that the reader has sent a signal, for of others that were read of, and woken here, it would tell when they have gone on.
pub(crate) fn lift_protection(
    space: &AddressSpace,
    gate: &impl Inside,
    addr: usize,
    access: Option<Access>,
) -> Option<bool> {
    let place = space.lookup(gate, addr);
    let window = place.and_then(|place| match place.kind {
        PlaceKind::Window(id) => Some((&*place.region, id)),
        _ => None,
    });
    let Some((region, id)) = window.filter(|_| access == Some(Access::Write)) else {
        return Some(false);
    };
    let Some(device) = region
        .device(gate, id)
        .filter(|_| !region.door().has_move())
    else {
        return Some(false);
    };
    let (block, page) = region.locate(region.base() + (addr - device.window().base()));
    let state = region.lock_block(block);
    let its_own = state.exclusive_to(id) - state.severed();
    let at = page_floor(addr);
    if !its_own.contains(page) || !space.is_present(at) {
        return Some(false);
    }
    match region.door().unprotect(at, PAGE_SIZE) {
        Stop::Complete => Some(true),
        Stop::Changing => None,
        _ => Some(false),
    }
}
