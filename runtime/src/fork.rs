//! Forking.
//!
//! A child of `fork` has its own memory, with the contents of that moment. userfaultfd gives it neither the faults nor the
//! pages that are away, which it would read as zeros. So (hazards F1, F2):
//!
//! 1. Mirrored bodies are `MADV_DONTFORK`, windows and scratch areas always: a raw `clone` that runs no handler gets a
//!    child that faults where it would read zeros.
//! 2. *prepare*, in the forking thread: from now on device rounds wait; every page comes home; bodies are `DOFORK`.
//!    Threads that fork at once are counted: the last closes this bracket.
//! 3. *parent*: bodies are `DONTFORK` again, device rounds go on. Pages are shared copy-on-write with the child until written;
//!    what refuses to move for that reason is written to first ([`crate::range`]).
//! 4. *child*: the parent's descriptors are disowned, handles of the parent answer [`Forked`](crate::ErrorKind::Forked), and
//!    the next mirror starts an address space of the child's own.

use core::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::{Duration, Instant};

use crate::addr::PageRange;
use crate::region::Region;
use crate::release::{self, Stale};
use crate::scratch::Scratch;
use crate::space::{AddressSpace, Inside, Place, PlaceKind};
use crate::stats::Cause;
use crate::sys::arc::MapArc;
use crate::sys::mmap::{self, Advice};
use crate::sys::process;
use crate::sys::signal::{self, AsyncSignalsBlocked};
use crate::sys::thread;

/// Has libc call the three handlers around every fork of this process, once. One caller at a time. (In the child of a fork that came
/// in between they may be called twice, which is once too often and does no harm.)
pub(crate) fn install() -> std::io::Result<()> {
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    if !INSTALLED.load(Ordering::Relaxed) {
        process::at_fork(prepare, parent, child)?;
        INSTALLED.store(true, Ordering::Relaxed);
    }
    Ok(())
}

fn regions(space: &AddressSpace) -> Vec<MapArc<Region>> {
    loop {
        let count = space.places(&space.gate().enter()).len();
        let mut regions: Vec<MapArc<Region>> = Vec::with_capacity(count);
        let gate = space.gate().enter();
        let places = space.places(&gate);
        if places.len() <= count {
            let bodies = places
                .iter()
                .filter(|place| !matches!(place.kind, PlaceKind::Window(_)));
            regions.extend(bodies.map(|place| place.region.clone()));
            return regions;
        }
    }
}

/// How long memory may go on moving ahead of those who go through the bodies.
const PATIENCE: Duration = Duration::from_secs(1);

/// Gives the advice for all bodies, but those of the regions `except`, by number.
fn advise_bodies(space: &AddressSpace, advice: Advice, except: &[u64]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let before = space.nr_changes();
        let in_doubt = advise_each(space, advice, except);
        if in_doubt.is_empty() && space.nr_changes() == before {
            return;
        }
        space.settle();
        if advice == Advice::DontFork {
            in_doubt.iter().for_each(|&run| give_back(space, run));
        }
        if Instant::now() > deadline {
            return;
        }
        // What moved meanwhile, from where we had not been yet to where we had, is not advised: once more.
    }
}

/// Goes through the bodies once. Those that the kernel may have been changing when they were advised are in doubt.
fn advise_each(space: &AddressSpace, advice: Advice, except: &[u64]) -> Vec<PageRange> {
    let (mut next, mut in_doubt) = (0, Vec::new());
    loop {
        // Inside the gate: who unmaps part of it waits until that is heard of, and does not map there anew what would then be
        // kept from children for ever. One at a time, for `madvise` takes the mmap lock.
        let gate = space.gate().enter();
        let Some(run) = next_run(space, &gate, next, except) else {
            return in_doubt;
        };
        // Where part of it was unmapped meanwhile there is nothing to inherit.
        let _ = mmap::advise(run, advice);
        // Inside the gate, too, where nobody reads of what is changing.
        let is_changing = space.is_changing();
        drop(gate);
        if is_changing {
            in_doubt.push(run);
        }
        next = run.end();
    }
}

/// From `from` on the next bodies without a gap between them, and what has grown behind them. All by one call, for no moment passes in
/// it: memory that is one mapping stays one, so that the application may move it, and whose faults are ours shows (see
/// [`AddressSpace::grown`]).
fn next_run(
    space: &AddressSpace,
    gate: &impl Inside,
    from: usize,
    except: &[u64],
) -> Option<PageRange> {
    let places = space.places(gate);
    let first = places.partition_point(|place| place.range.start() < from);
    let mut run: Option<PageRange> = None;
    for place in bodies(&places[first..]).filter(|p| !except.contains(&p.region.id())) {
        let start = run.map_or(place.range.start(), PageRange::start);
        if run.is_some_and(|run| run.end() != place.range.start()) {
            break;
        }
        let grown = space.with_grown(gate, place.range, &place.region);
        run = PageRange::new(start, grown.end());
    }
    run
}

/// What children are kept from and given, in the order of addresses. Under the fork bracket.
fn bodies(places: &[Place]) -> impl Iterator<Item = &Place> {
    places
        .iter()
        .filter(|place| !matches!(place.kind, PlaceKind::Window(_)) && place.region.is_shielded())
}

/// Mapped over by `MAP_FIXED` when it was advised, but not heard of yet, part of `range` may have been somebody else's memory
/// already: what is no place now that all is heard of is inherited like any other.
fn give_back(space: &AddressSpace, range: PageRange) {
    let mut from = range.start();
    while from < range.end() {
        let gate = space.gate().enter();
        let places = space.places(&gate);
        // A body that is not registered yet is given back, too: when it is, [`keep_from_children`] sees to it.
        let ours = |place: &Place| match place.kind {
            PlaceKind::Window(_) => Some(place.range),
            _ if !place.region.is_shielded() => None,
            _ => Some(space.with_grown(&gate, place.range, &place.region)),
        };
        // The last one before may have grown as far.
        let first = places.partition_point(|place| place.range.end() <= from);
        let near = &places[first.saturating_sub(1)..];
        let next = near
            .iter()
            .filter_map(ours)
            .find(|place| place.end() > from);
        let start = next.map_or(range.end(), PageRange::start).min(range.end());
        if let Some(other) = PageRange::new(from, start) {
            let _ = mmap::advise(other, Advice::DoFork);
        }
        from = next.map_or(range.end(), PageRange::end);
    }
}

extern "C" fn prepare() {
    // SeqCst: see `crate::range`. Rounds that have not seen it are over after the grace period. Before the look for a space, for
    // another thread may be at its first use: either it is seen here, or its mirrors see that there is a fork.
    AddressSpace::forking().fetch_add(1, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    let Some(space) = AddressSpace::existing().filter(|s| s.is_usable()) else {
        return;
    };
    let _signals = AsyncSignalsBlocked::new();
    let _bracket = space.fork_bracket();
    space.gate().synchronize();
    point!(ForkClosed, 0);
    // A region of which a page cannot come home is not inherited: the child faults there, which is better than a zero.
    let mut stuck = Vec::new();
    let mut scratch = Scratch::default();
    for region in regions(space) {
        let devices = region.devices(&space.gate().enter()).clone();
        let mut is_home = true;
        for device in devices.iter().flatten() {
            let released = release::release_region(
                &**device,
                &region,
                &mut scratch,
                Cause::Explicit,
                Stale::Kept,
            );
            is_home &= released.is_ok();
        }
        if !is_home && region.has_away() {
            stuck.push(region.id());
        }
    }
    // Not the first alone: what was moved since, ahead of those who went through the bodies before us, is not inherited yet.
    advise_bodies(space, Advice::DoFork, &stuck);
}

extern "C" fn parent() {
    let usable = || AddressSpace::existing().filter(|s| s.is_usable());
    let _signals = AsyncSignalsBlocked::new();
    if let Some(space) = usable() {
        let _bracket = space.fork_bracket();
        // Another thread may be between its prepare and its fork: the last one closes the bracket, before a page goes away again.
        if AddressSpace::forking().load(Ordering::SeqCst) == 1 {
            advise_bodies(space, Advice::DontFork, &[]);
        }
        AddressSpace::forking().fetch_sub(1, Ordering::SeqCst);
        return;
    }
    AddressSpace::forking().fetch_sub(1, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    // Made by another thread since the look: its mirrors saw a fork under way.
    if let Some(space) = usable() {
        let _bracket = space.fork_bracket();
        if AddressSpace::forking().load(Ordering::SeqCst) == 0 {
            advise_bodies(space, Advice::DontFork, &[]);
        }
    }
}

/// A new body, registered: not for children that nobody has prepared, unless a fork is being prepared at this moment, which sees to it.
pub(crate) fn keep_from_children(space: &AddressSpace, region: &Region, body: PageRange) {
    let _bracket = space.fork_bracket();
    region.set_shielded(true);
    if AddressSpace::forking().load(Ordering::SeqCst) == 0 {
        // Inside the gate, as in `advise_each`. Advice: where it fails a child of a raw clone reads zeros, as it would without us.
        let gate = space.gate().enter();
        let _ = mmap::advise(body, Advice::DontFork);
        let is_changing = space.is_changing();
        drop(gate);
        if is_changing {
            space.settle();
            give_back(space, body);
        }
    }
}

extern "C" fn child() {
    thread::enter_child();
    signal::enter_child();
    AddressSpace::abandon_in_child();
}
