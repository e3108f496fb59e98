//! Eviction: giving device memory back when it is full.
//!
//! Victims are whole blocks, found by a clock over the device's regions: a block that was faulted on since the hand last
//! passed is spared once. A victim's lock is only ever *tried*, and none is held meanwhile (hazards W3); a victim with an
//! access in flight, or whose device is busy with its table, is passed over. Stale pages go first: they cost one move and nobody misses them.

use crate::addr::PAGES_PER_BLOCK;
use crate::attachment::Attached;
use crate::block::BlockState;
use crate::device::{Device, Invalidation, Keep};
use crate::error::Result;
use crate::mapped::AnyMapped;
use crate::mask::PageMask;
use crate::movement::Mover;
use crate::region::Region;
use crate::release::give_up;
use crate::scratch::Scratch;
use crate::space::AddressSpace;
use crate::stats::{Cause, count};
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::clock;

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
