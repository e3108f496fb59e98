//! Giving device memory back: eviction when it is full, release on request, and the way home when a mirror is dropped.
//!
//! Victims are whole blocks, found by a clock over the device's regions: a block that was faulted on since the hand last
//! passed is spared once. A victim's lock is only ever *tried*, and none is held meanwhile (hazards W3); a victim with an
//! access in flight, or whose device is busy with its table, is passed over. Stale pages go first: they cost one move and nobody misses them.

use crate::addr::PAGES_PER_BLOCK;
use crate::attachment::Attached;
use crate::block::{BlockState, DeviceSet};
use crate::device::{Device, Invalidation, Keep};
use crate::error::{Error, ErrorKind, Result};
use crate::fault::{Flight, wait_until_quiesced};
use crate::mapped::AnyMapped;
use crate::mask::PageMask;
use crate::movement::{Mover, Stall};
use crate::overrun::{self, Shot};
use crate::region::{Region, RegionKind};
use crate::scratch::Scratch;
use crate::space::AddressSpace;
use crate::stats::{Cause, count};
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::{clock, process};

/// Frees at least `needed` pages of the device's memory if it can; says how many it freed. No lock is held.
pub(crate) fn make_room<D: Device>(
    attached: &Attached<D>,
    needed: usize,
    scratch: &mut Scratch,
) -> Result<usize> {
    let goal = needed.max(attached.residency.capacity().min(PAGES_PER_BLOCK * 8) / 8);
    let mut freed = 0;
    let mut sweeps = 0;
    while freed < needed && sweeps < 3 {
        let Some((mapped, block, wrapped)) = next_victim(attached) else {
            return Ok(freed);
        };
        sweeps += usize::from(wrapped);
        if mapped.take_touched(block) && sweeps < 2 {
            continue;
        }
        let leased = if sweeps < 2 {
            Leased::Spare
        } else {
            Leased::Take
        };
        freed += evict_block(
            &*mapped,
            mapped.shared_region(),
            block,
            goal - freed.min(goal),
            leased,
            scratch,
        )?;
    }
    Ok(freed)
}

/// Advances the clock's hand by one block; says whether it came around.
fn next_victim<D: Device>(
    attached: &Attached<D>,
) -> Option<(
    crate::sys::arc::MapArc<crate::mapped::Mapped<D>>,
    usize,
    bool,
)> {
    let mut hand = attached.hand.lock();
    let (mapped, nr_mapped) = attached.mapped_at(hand.0)?;
    let block = hand
        .1
        .min(mapped.shared_region().nr_blocks().saturating_sub(1));
    let mut wrapped = false;
    hand.1 = block + 1;
    if hand.1 >= mapped.shared_region().nr_blocks() {
        wrapped = hand.0 + 1 >= nr_mapped;
        *hand = (if wrapped { 0 } else { hand.0 + 1 }, 0);
    }
    drop(hand);
    Some((mapped, block, wrapped))
}

/// What to do with a block whose pages a worker was promised for a while (hazards W4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leased {
    Spare,
    Take,
}

/// Evicts up to `max` pages of one block, if nobody is busy with it; says how many.
fn evict_block(
    device: &dyn AnyMapped,
    region: &Region,
    block: usize,
    max: usize,
    leased: Leased,
    scratch: &mut Scratch,
) -> Result<usize> {
    scratch.ensure(region.door())?;
    let gate = AddressSpace::global().gate().enter();
    let Some(mut state) = region.try_lock_block(block) else {
        return Ok(0);
    };
    let resident = state.resident(device.id());
    let before = resident.count();
    let until = state.lease().device_until_ns;
    let is_leased = || until != 0 && until > clock::monotonic_ns();
    if before == 0 || (leased == Leased::Spare && is_leased()) {
        return Ok(0);
    }
    let victims = choose(&state, device, max);
    let interval = region.interval(block, victims.bounds().unwrap_or(0..1));
    let Ok(bracket) = region.hub().start(interval, None) else {
        return Ok(0);
    };
    let inv = Invalidation::new(block, victims & state.frames(device.id()), Keep::Nothing);
    let inv = inv.without_waiting();
    let is_over = || device.quiesced(&inv) || mutated(Mutation::EvictBusy);
    if !inv.pages().is_empty() && (device.invalidate(&inv).is_err() || !is_over()) {
        return Ok(0);
    }
    point!(EvictExcluding, region.addr_of(block, 0));
    // A stall ends this victim early; what was freed until then counts.
    let _ = give_up(
        &mut Mover::new(region, block, &mut state),
        device,
        victims,
        scratch,
        Cause::Evict,
    );
    let freed = before - state.resident(device.id()).count();
    if !mutated(Mutation::EvictUncounted) {
        device.residency().release(freed);
    }
    count(&device.counters().evicted_pages, freed as u64);
    drop(bracket);
    drop(state);
    drop(gate);
    Ok(freed)
}

/// Up to `max` resident pages of the block, stale ones first.
fn choose(state: &BlockState, device: &dyn AnyMapped, max: usize) -> PageMask {
    let ours = !state.pending();
    let (junk, frames) = (
        state.junk(device.id()) & ours,
        state.frames(device.id()) & ours,
    );
    let max = max.max(1);
    if junk.count() + frames.count() <= max {
        return junk | frames;
    }
    let mut chosen = PageMask::EMPTY;
    for set in [junk, frames] {
        for run in set.runs() {
            let room = max - chosen.count();
            chosen |= PageMask::range(run.start..run.end.min(run.start + room));
            if chosen.count() == max {
                return chosen;
            }
        }
    }
    chosen
}

/// Takes `pages` from `device`, whose translations are gone: the last holder's pages go home, the others are discarded.
fn give_up(
    mover: &mut Mover<'_>,
    device: &dyn AnyMapped,
    pages: PageMask,
    scratch: &mut Scratch,
    cause: Cause,
) -> Result<(), Stall> {
    let id = device.id();
    let exclusive = mover.state.exclusive_to(id) & pages;
    let came = exclusive
        .runs()
        .map(|run| bring_home(mover, device, run, cause))
        .fold(Ok(()), Result::and);
    let duplicates = mover.state.frames(id) & (pages - exclusive);
    mover.state.revoked(id, duplicates);
    let cleared = mover.clear_junk(device, pages, scratch);
    came.and(cleared)
}

/// Brings a run home. A page that is lost, or refused, keeps none of the others away; the first of them is the error's.
fn bring_home(
    mover: &mut Mover<'_>,
    device: &dyn AnyMapped,
    run: core::ops::Range<usize>,
    cause: Cause,
) -> Result<(), Stall> {
    let (mut at, mut came) = (run.start, Ok(()));
    while at < run.end {
        let moved = mover.bring_home(device, at..run.end);
        at = match moved {
            Err(stall @ (Stall::Lost(page) | Stall::Refused(page) | Stall::Busy(page))) => {
                if let Stall::Lost(_) = stall {
                    mover.state.set_lost(page);
                }
                came = came.and(Err(stall));
                page + 1
            }
            Err(stall) => {
                came = came.and(Err(stall));
                break;
            }
            Ok(()) => run.end,
        };
    }
    let home = (PageMask::range(run) - mover.state.away()).count() as u64;
    if home > 0 {
        device.counters().to_host(cause, home, 0);
    }
    came
}

/// What becomes of stale window pages that the kernel will not part with, for somebody has them pinned: contents they are nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stale {
    /// They stay, and take room, until they can be discarded.
    Kept,
    /// The window is about to be unmapped, and they with it.
    GoWithWindow,
}

/// Brings home everything `device` holds of `region` and empties its window, waiting for accesses in flight. What cannot come home
/// keeps nothing else from it.
pub(crate) fn release_region(
    device: &dyn AnyMapped,
    region: &Region,
    scratch: &mut Scratch,
    cause: Cause,
    stale: Stale,
) -> Result<()> {
    let all = PageMask::FULL;
    (0..region.nr_blocks())
        .map(|block| release_pages(device, region, block, all, scratch, cause, stale))
        .fold(Ok(()), Result::and)
}

/// [`release_region`] for some pages of one block.
pub(crate) fn release_pages(
    device: &dyn AnyMapped,
    region: &Region,
    block: usize,
    pages: PageMask,
    scratch: &mut Scratch,
    cause: Cause,
    stale: Stale,
) -> Result<()> {
    loop {
        scratch.ensure(region.door())?;
        match release_attempt(device, region, block, pages, scratch, (cause, stale)) {
            Ok(true) => return Ok(()),
            Ok(false) | Err(Stall::Changing | Stall::NoMemory) => process::sched_yield(),
            Err(Stall::Busy(page) | Stall::Refused(page) | Stall::Lost(page)) => {
                return Err(Error::new("release", ErrorKind::Lost).at(region.addr_of(block, page)));
            }
        }
    }
}

fn release_attempt(
    device: &dyn AnyMapped,
    region: &Region,
    block: usize,
    pages: PageMask,
    scratch: &mut Scratch,
    how: (Cause, Stale),
) -> Result<bool, Stall> {
    point!(ReleaseEntering, region.addr_of(block, 0));
    let space = AddressSpace::global();
    let gate = space.gate().enter();
    let mut state = region.lock_block(block);
    let resident = state.resident(device.id()) & pages;
    if resident.intersects(&state.pending()) {
        return Ok(false);
    }
    let Some(bounds) = resident.bounds() else {
        return Ok(true);
    };
    let Ok(bracket) = region.hub().start(region.interval(block, bounds), None) else {
        return Ok(false);
    };
    let inv = Invalidation::new(block, resident & state.frames(device.id()), Keep::Nothing);
    let _ = device.invalidate(&inv);
    point!(ReleaseExcluding, region.addr_of(block, 0));
    if !device.quiesced(&inv) {
        count(&region.counters().waits, 1);
        let flight = Flight::begin(region);
        drop(state);
        drop(gate);
        let holder = DeviceSet::one(device.id());
        if overrun::shoot_down(space, flight.region(), holder, &inv) == Shot::Severed {
            return Ok(false);
        }
        let _gate = space.gate().enter();
        let mut state = region.lock_block(block);
        if resident.intersects(&state.pending()) {
            // Being discarded by a call that has begun since: what came home now would be what is to be gone.
            return Ok(false);
        }
        return finish_release(device, region, block, &mut state, resident, scratch, how)
            .inspect(|_| drop(bracket));
    }
    finish_release(device, region, block, &mut state, resident, scratch, how)
}

fn finish_release(
    device: &dyn AnyMapped,
    region: &Region,
    block: usize,
    state: &mut BlockState,
    pages: PageMask,
    scratch: &mut Scratch,
    (cause, stale): (Cause, Stale),
) -> Result<bool, Stall> {
    let id = device.id();
    let before = state.resident(id).count();
    let mut given_up = give_up(
        &mut Mover::new(region, block, state),
        device,
        pages,
        scratch,
        cause,
    );
    let pinned = matches!(given_up, Err(Stall::Busy(_)));
    if pinned && !state.frames(id).intersects(&pages) {
        if stale == Stale::GoWithWindow {
            state.emptied(id, pages);
        }
        given_up = Ok(());
    }
    device
        .residency()
        .release(before - state.resident(id).count());
    given_up?;
    Ok(pinned || !state.resident(id).intersects(&pages))
}

/// Takes the translations in place that `device` may have of `region`, and waits for the accesses through them: for when the mirror
/// or the device ends, after which nobody would tell it of a change any more.
///
/// # Errors
/// [`ErrorKind::Timeout`] if a span outstays its deadline: there is no taking its memory from it.
pub(crate) fn withdraw_in_place(device: &dyn AnyMapped, region: &Region) -> Result<()> {
    (0..region.nr_blocks())
        .map(|block| withdraw_block(device, region, block))
        .fold(Ok(()), Result::and)
}

fn withdraw_block(device: &dyn AnyMapped, region: &Region, block: usize) -> Result<()> {
    let space = AddressSpace::global();
    loop {
        let gate = space.gate().enter();
        let state = region.lock_block(block);
        let pages = match region.kind() {
            RegionKind::InPlace => region.cover_mask(block),
            RegionKind::Managed | RegionKind::Input => state.in_place(),
        };
        let Some(bounds) = pages.bounds() else {
            return Ok(());
        };
        let interval = region.interval(block, bounds.clone());
        let Ok(_bracket) = region.hub().start(interval, None) else {
            drop(state);
            drop(gate);
            process::sched_yield();
            continue;
        };
        let inv = Invalidation::new(block, pages, Keep::Nothing);
        let _ = device.invalidate(&inv);
        drop(state);
        drop(gate);
        let holder = DeviceSet::one(device.id());
        if wait_until_quiesced(space, region, holder, &inv, None) {
            return Ok(());
        }
        // A span that pages were taken from sits on an empty window, which stays as long as it does: it is not waited for.
        let gate = space.gate().enter();
        let severed = region.lock_block(block).severed();
        let others = Invalidation::new(block, pages - severed, Keep::Nothing);
        if region.kind() != RegionKind::InPlace && device.quiesced(&others) {
            return Ok(());
        }
        drop(gate);
        return Err(Error::new("close", ErrorKind::Timeout).at(region.addr_of(block, bounds.start)));
    }
}
