//! The way home on request, and when a mirror or a device ends: everything a device holds of some pages.
//!
//! Unlike [`crate::evict`] it waits: for the block's lock, for accesses in flight, for what the kernel is about to do with a page.

use core::ops::Range;

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PAGES_PER_BLOCK};
use crate::block::{BlockState, DeviceSet};
use crate::device::{Invalidation, Keep};
use crate::error::{Error, ErrorKind, Result};
use crate::fault::{Flight, wait_until_quiesced};
use crate::mapped::AnyMapped;
use crate::mask::PageMask;
use crate::movement::{Mover, Stall};
use crate::notifier::Interval;
use crate::overrun::{self, Shot};
use crate::region::{Region, RegionKind};
use crate::scratch::Scratch;
use crate::space::AddressSpace;
use crate::stats::{Cause, count};
use crate::sys::process;

/// Takes `pages` from `device`, whose translations are gone: the last holder's pages go home, the others are discarded.
pub(crate) fn give_up(
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
    run: Range<usize>,
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
    let pages = 0..region.nr_blocks() * PAGES_PER_BLOCK;
    release_range(device, region, pages, scratch, cause, stale)
}

/// [`release_region`] for some pages, counted from the region's base.
pub(crate) fn release_range(
    device: &dyn AnyMapped,
    region: &Region,
    pages: Range<usize>,
    scratch: &mut Scratch,
    cause: Cause,
    stale: Stale,
) -> Result<()> {
    let end = pages.end.min(region.nr_blocks() * PAGES_PER_BLOCK);
    let (mut at, mut released) = (pages.start, Ok(()));
    while at < end {
        let (block, page) = (at / PAGES_PER_BLOCK, at % PAGES_PER_BLOCK);
        if page == 0 {
            let nr = release_blocks(device, region, block..end / PAGES_PER_BLOCK, cause);
            at += nr * PAGES_PER_BLOCK;
            if nr > 0 {
                continue;
            }
        }
        let nr_pages = (end - at).min(PAGES_PER_BLOCK - page);
        let part = PageMask::range(page..page + nr_pages);
        let came = release_pages(device, region, block, part, scratch, cause, stale);
        released = released.and(came);
        at += nr_pages;
    }
    released
}

/// Brings home whole blocks that `device` alone holds, from the first of `blocks` on and as many as nothing stands in the way of, by one
/// movement, and says how many: where both sides are huge the system call is most of what a block costs. None is no failure:
/// everything else is [`release_pages`]'s.
///
/// Several block locks are held, and none was waited for: all are tried (hazards W3).
pub(crate) fn release_blocks(
    device: &dyn AnyMapped,
    region: &Region,
    blocks: Range<usize>,
    cause: Cause,
) -> usize {
    let id = device.id();
    let may_move = region.options().huge_pages && region.door().has_move();
    if blocks.len() < 2 || !may_move || device.bounce().is_some() {
        return 0;
    }
    let _gate = AddressSpace::global().gate().enter();
    let states = region.try_lock_blocks(blocks.clone(), |state| state.is_all_with(id));
    let nr = states.iter().flatten().count();
    if nr < 2 {
        return 0;
    }
    let blocks = blocks.start..blocks.start + nr;
    let (host, window) = (
        region.addr_of(blocks.start, 0),
        device.window().addr_of(blocks.start, 0),
    );
    let interval = Interval::new(host as u64, (host + nr * BLOCK_SIZE) as u64);
    let Ok(_bracket) = region.hub().start(interval, None) else {
        return 0;
    };
    let invalidations = || {
        blocks
            .clone()
            .map(|block| Invalidation::new(block, PageMask::FULL, Keep::Nothing))
    };
    invalidations().for_each(|inv| {
        let _ = device.invalidate(&inv);
    });
    point!(ReleaseExcluding, host);
    // Waiting for a worker is for one block at a time: up to there.
    let nr = invalidations()
        .take_while(|inv| device.quiesced(inv))
        .count();
    if nr == 0 {
        return 0;
    }
    count(&region.counters().move_calls, 1);
    let moved = region.door().move_pages(host, window, nr * BLOCK_SIZE);
    let nr_moved = moved.bytes / PAGE_SIZE;
    let nr_whole = nr_moved / PAGES_PER_BLOCK;
    let mut states = states.into_iter().flatten();
    for mut state in states.by_ref().take(nr_whole) {
        state.moved_home(id, PageMask::FULL);
    }
    device.residency().release(nr_whole * PAGES_PER_BLOCK);
    if nr_moved > 0 {
        device.counters().to_host(cause, nr_moved as u64, 0);
    }
    if nr_whole == nr {
        return nr;
    }
    if let Some(mut state) = states.next() {
        // Where it stopped: to find out why, page by page, under the same hold of the lock (D4), and of no other. What that leaves is
        // `release_pages`'s.
        drop(states);
        let here = nr_moved % PAGES_PER_BLOCK;
        state.moved_home(id, PageMask::range(0..here));
        let mut mover = Mover::new(region, blocks.start + nr_whole, &mut state);
        let _ = bring_home(&mut mover, device, here..PAGES_PER_BLOCK, cause);
        let left = state.resident(id).count();
        device.residency().release(PAGES_PER_BLOCK - left);
    }
    nr_whole
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
        match release_attempt(device, region, block, pages, scratch, (cause, stale)) {
            Ok(Attempt::Done) => return Ok(()),
            // As a rule everything comes home by itself, and an area for what does not is system calls.
            Ok(Attempt::NeedsScratch) => scratch.ensure(region.door())?,
            // Something may have come by a copy, and left a stale page.
            Err(_) if !scratch.is_ready(region.door()) => scratch.ensure(region.door())?,
            Ok(Attempt::Again) | Err(Stall::Changing | Stall::NoMemory) => process::sched_yield(),
            Err(Stall::Busy(page) | Stall::Refused(page) | Stall::Lost(page)) => {
                return Err(Error::new("release", ErrorKind::Lost).at(region.addr_of(block, page)));
            }
        }
    }
}

/// How far one try of a release got.
enum Attempt {
    /// To its end.
    Done,
    /// Something that passes is in the way.
    Again,
    /// Some pages are to be thrown away, and there is no place for them.
    NeedsScratch,
}

fn release_attempt(
    device: &dyn AnyMapped,
    region: &Region,
    block: usize,
    pages: PageMask,
    scratch: &mut Scratch,
    how: (Cause, Stale),
) -> Result<Attempt, Stall> {
    point!(ReleaseEntering, region.addr_of(block, 0));
    let space = AddressSpace::global();
    let gate = space.gate().enter();
    let mut state = region.lock_block(block);
    let resident = state.resident(device.id()) & pages;
    if resident.intersects(&state.pending()) {
        return Ok(Attempt::Again);
    }
    let Some(bounds) = resident.bounds() else {
        return Ok(Attempt::Done);
    };
    let moves = region.door().has_move() && device.bounce().is_none();
    let all_come_home = moves && state.exclusive_to(device.id()).contains_all(&resident);
    let door = region.door();
    if scratch.is_full(door) || !all_come_home && !scratch.is_ready(door) {
        return Ok(Attempt::NeedsScratch);
    }
    let Ok(bracket) = region.hub().start(region.interval(block, bounds), None) else {
        return Ok(Attempt::Again);
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
            return Ok(Attempt::Again);
        }
        let _gate = space.gate().enter();
        let mut state = region.lock_block(block);
        if resident.intersects(&state.pending()) {
            // Being discarded by a call that has begun since: what came home now would be what is to be gone.
            return Ok(Attempt::Again);
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
) -> Result<Attempt, Stall> {
    let id = device.id();
    let before = state.resident(id).count();
    let mut given_up = give_up(
        &mut Mover::new(region, block, state),
        device,
        pages,
        scratch,
        cause,
    );
    // Without a place for them nothing is known of the others: with one, once more.
    let pinned = matches!(given_up, Err(Stall::Busy(_))) && scratch.is_ready(region.door());
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
    Ok(if pinned || !state.resident(id).intersects(&pages) {
        Attempt::Done
    } else {
        Attempt::Again
    })
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
