//! [`Pin`]: pages that are home and stay home, as `get_user_pages` keeps them in the kernel.
//!
//! A pin marks its pages first, so that from then on devices access them in place; then it brings home what is away,
//! un-protects what is shared and populates what nobody has touched, so that the kernel can read and write all of it.
//!
//! The runtime pins pages for its own ends, too ([`with_pinned`]). Then devices wait: the application, which knows nothing of it, may
//! unmap the memory at any time, and the kernel tells of that when a translation in place leads nowhere already.

use core::fmt;
use core::ops::Range;

use crate::addr::{PAGE_SIZE, PAGES_PER_BLOCK, PageRange};
use crate::block::{BlockState, DeviceSet};
use crate::device::{Invalidation, Keep};
use crate::error::{Error, ErrorKind, Result};
use crate::fault::{self, Flight};
use crate::mask::PageMask;
use crate::movement::{Mover, Stall};
use crate::overrun::{self, Shot};
use crate::region::{Region, RegionKind};
use crate::space::{AddressSpace, Inside};
use crate::stats::Cause;
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::arc::MapArc;
use crate::sys::process;
use crate::sys::signal::AsyncSignalsBlocked;

/// Keeps pages home while it lives. Made by [`Mirror::pin`](crate::Mirror::pin).
#[must_use = "the pages stay home only while the guard lives"]
pub struct Pin<'a> {
    region: &'a MapArc<Region>,
    /// Page indices from the region's base; empty if nothing can move anyway.
    pages: Range<usize>,
}

/// What devices do that want a page that is pinned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meanwhile {
    InPlace,
    Wait,
}

/// Pins `elements`, which are in bounds, of `element_size` bytes each, the first of them at `addr`.
pub(crate) fn pin<'a>(
    region: &'a MapArc<Region>,
    addr: usize,
    element_size: usize,
    elements: Range<usize>,
) -> Result<Pin<'a>> {
    let (start, end) = (elements.start, elements.end);
    let none = Pin {
        region,
        pages: 0..0,
    };
    let bytes = addr + start * element_size..addr + end * element_size;
    let (Some(body), RegionKind::Managed) = (region.body(), region.kind()) else {
        return Ok(none);
    };
    let Some(pages) =
        PageRange::containing(bytes.start, bytes.len()).and_then(|p| p.intersect(body))
    else {
        return Ok(none);
    };
    if region.door().is_disowned() {
        return Err(Error::new("pin", ErrorKind::Forked).at(addr));
    }
    let _signals = AsyncSignalsBlocked::new();
    let pages =
        (pages.start() - region.base()) / PAGE_SIZE..(pages.end() - region.base()) / PAGE_SIZE;
    region.add_pin(pages.clone());
    // From here on dropping the guard takes back whatever was done.
    let pin = Pin { region, pages };
    for (block, mask) in blocks(&pin.pages) {
        pin_block(region, block, mask, Meanwhile::InPlace)?;
    }
    Ok(pin)
}

/// The blocks that a range of page indices touches, with its pages in each.
fn blocks(pages: &Range<usize>) -> impl Iterator<Item = (usize, PageMask)> + use<> {
    let pages = pages.clone();
    (pages.start / PAGES_PER_BLOCK..pages.end.div_ceil(PAGES_PER_BLOCK)).map(move |block| {
        let origin = block * PAGES_PER_BLOCK;
        let (start, end) = (
            pages.start.max(origin),
            pages.end.min(origin + PAGES_PER_BLOCK),
        );
        (block, PageMask::range(start - origin..end - origin))
    })
}

fn pin_block(region: &Region, block: usize, pages: PageMask, devices: Meanwhile) -> Result<()> {
    loop {
        match try_pin_block(region, block, pages, devices) {
            Ok(true) => return Ok(()),
            Ok(false) | Err(Stall::Changing | Stall::NoMemory) => process::sched_yield(),
            Err(Stall::Busy(page) | Stall::Refused(page) | Stall::Lost(page)) => {
                let _gate = AddressSpace::global().gate().enter();
                region.lock_block(block).end_pinning(pages);
                return Err(Error::new("pin", ErrorKind::Unmapped).at(region.addr_of(block, page)));
            }
        }
    }
}

fn try_pin_block(
    region: &Region,
    block: usize,
    pages: PageMask,
    devices: Meanwhile,
) -> Result<bool, Stall> {
    let space = AddressSpace::global();
    let gate = space.gate().enter();
    let mut state = region.lock_block(block);
    if let Some(gone) = (pages & state.gone()).first_from(0) {
        return Err(Stall::Refused(gone));
    }
    if state.pending().intersects(&pages) {
        return Ok(false);
    }
    state.set_pinned(pages, true);
    point!(PinMarked, region.addr_of(block, 0));
    let bounds = pages.bounds().unwrap_or(0..1);
    let Ok(bracket) = region.hub().start(region.interval(block, bounds), None) else {
        return Ok(false);
    };
    let inv = Invalidation::new(block, pages, Keep::Nothing);
    let holders = state.holders(&pages);
    if !holders.is_empty() && !fault::invalidate(region, &gate, holders, &inv) {
        let flight = Flight::begin(region);
        drop(state);
        drop(gate);
        if overrun::shoot_down(space, flight.region(), holders, &inv) == Shot::Severed {
            return Ok(false);
        }
        // The bracket is still open: no device has got the pages meanwhile.
        let gate = space.gate().enter();
        let mut state = region.lock_block(block);
        if pages.intersects(&(state.gone() | state.pending())) {
            return Ok(false);
        }
        return finish_pin(region, &gate, block, &mut state, pages, devices)
            .inspect(|_| drop(bracket));
    }
    finish_pin(region, &gate, block, &mut state, pages, devices).inspect(|_| drop(bracket))
}

/// Brings the pages home, un-protects them and populates them. Their holders are excluded, the bracket is open.
fn finish_pin(
    region: &Region,
    gate: &impl Inside,
    block: usize,
    state: &mut BlockState,
    pages: PageMask,
    devices: Meanwhile,
) -> Result<bool, Stall> {
    let mut mover = Mover::new(region, block, state);
    loop {
        let away = mover.state.away() & pages;
        let Some(page) = away.first_from(0) else {
            break;
        };
        let Some(holder) = mover.state.holder_of(page) else {
            return Err(Stall::Lost(page));
        };
        let run = (away & mover.state.frames(holder)).run_around(page);
        fault::move_home(&mut mover, region, gate, page, &run, Cause::Explicit)?;
    }
    // All of them: a page that a device shared until it evicted its copy may be write-protected still.
    for run in pages.runs() {
        mover.unprotect(run)?;
    }
    for run in pages.runs() {
        mover.populate_host(run)?;
    }
    if devices == Meanwhile::InPlace {
        mover.state.end_pinning(pages);
    }
    Ok(true)
}

/// Runs `f` while `pages`, of the body, are pinned. One at a time where devices wait, for as long as one holds they do.
pub(crate) fn with_pinned<R>(
    region: &Region,
    pages: PageRange,
    devices: Meanwhile,
    f: impl FnOnce() -> R,
) -> Result<R> {
    let _one = (devices == Meanwhile::Wait).then(|| region.pins_of_ours().lock());
    let pages =
        (pages.start() - region.base()) / PAGE_SIZE..(pages.end() - region.base()) / PAGE_SIZE;
    region.add_pin(pages.clone());
    let pin = |(block, mask)| pin_block(region, block, mask, devices);
    let result = blocks(&pages).try_for_each(pin).map(|()| f());
    if devices == Meanwhile::InPlace {
        unpin(region, &pages);
        return result;
    }
    // Nobody has come to use them in place: there is nobody to tell.
    region.remove_pin(&pages, |run| {
        for (block, mask) in blocks(&run) {
            let _gate = AddressSpace::global().gate().enter();
            region.lock_block(block).set_pinned(mask, false);
        }
    });
    for (block, mask) in blocks(&pages) {
        // Those that the application has pinned are in place again.
        let _gate = AddressSpace::global().gate().enter();
        region.lock_block(block).end_pinning(mask);
    }
    result
}

fn unpin(region: &Region, pages: &Range<usize>) {
    region.remove_pin(pages, |run| {
        for (block, mask) in blocks(&run) {
            unpin_block(region, block, mask);
        }
    });
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        if self.pages.is_empty() || self.region.door().is_disowned() {
            return;
        }
        let _signals = AsyncSignalsBlocked::new();
        // Not in the middle of one of ours, in which the pages would go on to be in place.
        let _none = self.region.pins_of_ours().lock();
        unpin(self.region, &self.pages);
    }
}

/// Lets the pages move again. First the devices' translations in place go, and the accesses through them end: left there, one
/// would lead to memory that has moved, and the CPU fault in its middle would wait for that very access.
fn unpin_block(region: &Region, block: usize, pages: PageMask) {
    let space = AddressSpace::global();
    let inv = Invalidation::new(block, pages, Keep::Nothing);
    let bounds = pages.bounds().unwrap_or(0..1);
    // Open until the pages are unpinned, so that no translation in place is established any more.
    let bracket = loop {
        if let Ok(bracket) = region
            .hub()
            .start(region.interval(block, bounds.clone()), None)
        {
            break bracket;
        }
        process::sched_yield();
    };
    let over = mutated(Mutation::UnpinTellsNobody) || {
        let gate = space.gate().enter();
        let _state = region.lock_block(block);
        fault::invalidate(region, &gate, DeviceSet::all(), &inv)
    };
    if !over {
        // A span in place that does not end: its pages stay in place until it does.
        let _ = overrun::shoot_down(space, region, DeviceSet::all(), &inv);
    }
    let _gate = space.gate().enter();
    region.lock_block(block).set_pinned(pages, false);
    drop(bracket);
}

impl fmt::Debug for Pin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin")
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}
