//! A CPU fault on mirrored memory, from the faulting address to the moment the access can be tried again.
//!
//! Both doors, the signal handler ([`crate::inline`]) and the monitor ([`crate::monitor`]), call [`resolve`]; nothing here
//! knows which. It may run in a signal handler that interrupted anything: design rule 1 holds throughout.
//!
//! # One fault, step by step
//!
//! 1. Enter the gate, find the region, lock the block.
//! 2. [`classify`]: the directory, not the fault, says what is to be done, for it may have changed since the fault.
//! 3. Open a bracket of the range protocol over the run of pages that will change (P1: always, even if no device maps
//!    them). From here on no device can establish a translation to them.
//! 4. Invalidate the holders: all translations for a write, only the right to write for a read (a CPU read never waits
//!    for a device reader, W1).
//! 5. If some access is still in flight, let go of the block and the gate, *keep the bracket*, wait, come back, and go on
//!    only if nothing changed (W3: no wait holds a lock). An access that does not end is [`crate::overrun`]'s affair.
//! 6. One system call changes the page table ([`crate::movement`]).
//! 7. Close the bracket, unlock, leave the gate.

use core::cell::Cell;
use core::ops::Range;

use crate::addr::{PAGE_SIZE, page_floor};
use crate::block::{BlockState, DeviceSet};
use crate::device::{Invalidation, Keep};
use crate::door::Door;
use crate::error::Access;
use crate::mapped::AnyMapped;
use crate::mask::PageMask;
use crate::movement::{Mover, Stall};
use crate::notifier::{self, Bracket, Interval};
use crate::overrun;
use crate::region::{Region, RegionKind};
use crate::space::{AddressSpace, Inside, PlaceKind};
use crate::stats::{Cause, count};
use crate::sync::mutation::{Mutation, mutated};
pub(crate) use crate::sys::flight::Flight;
use crate::sys::uffd::{Protect, Stop};
use crate::sys::{clock, process};

/// What the hardware or the kernel said about a CPU fault.
#[derive(Clone, Debug)]
pub(crate) struct CpuFault {
    pub(crate) addr: usize,
    /// A load or a store, where that is known.
    pub(crate) access: Option<Access>,
    /// Whether the page was present, that is write-protected, where that is known.
    pub(crate) protection: Option<bool>,
    /// Identity of the faulting thread while it lives.
    pub(crate) thread: usize,
    /// The door that told of it: then the page is registered with that.
    pub(crate) door: Option<&'static Door>,
    /// Since when it is kept for a mapping that is changing; 0 if it is not.
    pub(crate) kept_since_ns: Cell<u64>,
}

impl CpuFault {
    /// Whether it is to be kept while mappings change. Not for ever: others may go on changing theirs.
    fn has_patience(&self) -> bool {
        const PATIENCE_NS: u64 = 1_000_000_000;
        let now = clock::monotonic_ns();
        if self.kept_since_ns.get() == 0 {
            self.kept_since_ns.set(now);
        }
        now - self.kept_since_ns.get() < PATIENCE_NS
    }
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Try the access again.
    Resolved,
    /// Try the access again; the call that resolved it has woken who sleeps in it.
    Woken,
    /// The address is none of ours, or the page cannot be served: it goes to whoever handled such faults before us.
    NotOurs,
    /// An empty page of a device's window was touched.
    Window,
}

/// What a fault on a page calls for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Class {
    /// The page left the region, or was lost.
    Gone,
    /// A device holds it: move this run home, the CPU becomes its only holder.
    MoveHome(Range<usize>),
    /// A device holds it and goes on reading: give the CPU a write-protected copy.
    ShareHome(Range<usize>),
    /// The CPU and devices share it, and the CPU writes: un-protect this run.
    Collapse(Range<usize>),
    /// It is shared, but the CPU's copy is missing (discarded meanwhile): copy it back (hazards G4).
    Restore,
    /// The kernel is at work on the page.
    Pending,
    /// Nobody holds anything: zero-fill.
    ZeroFill,
    /// Write-protected without reason: clear it.
    StaleProtection,
}

/// How soon a fault on a page that the kernel is at work on looks again.
const PENDING_POLL_NS: u64 = 50_000;

/// Resolves a CPU fault in the thread that may wait for it: the faulting one.
pub(crate) fn resolve(space: &'static AddressSpace, fault: &CpuFault) -> Verdict {
    let mut attempt = begin(space, fault, First::Yes);
    loop {
        attempt = match attempt {
            Attempt::Done(verdict) => return verdict,
            Attempt::Again => {
                process::sched_yield();
                begin(space, fault, First::No)
            }
            Attempt::WaitUntil(ns) => {
                clock::sleep_until(ns);
                begin(space, fault, First::No)
            }
            Attempt::Pending(pending) => {
                point!(FaultWaiting, fault.addr);
                let region = pending.flight.region();
                let until = Some(pending.until_ns);
                wait_until_quiesced(space, region, pending.holders, &pending.inv, until);
                pending.finish(space, fault)
            }
        };
    }
}

/// Whether this is the first try of a fault: only that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum First {
    Yes,
    No,
}

/// How far one try of a fault got.
pub(crate) enum Attempt {
    /// To its end.
    Done(Verdict),
    /// Something passing was in the way: begin anew, after others had a chance to run.
    Again,
    /// A device was granted the page until then: begin anew.
    WaitUntil(u64),
    /// The devices' translations are gone, but some access through one is still in flight.
    Pending(Pending),
}

/// A fault that waits for accesses in flight. No lock is held, but the bracket is open: no device gets the pages meanwhile.
pub(crate) struct Pending {
    flight: Flight,
    bracket: Bracket<Flight>,
    class: Class,
    page: (usize, usize),
    holders: DeviceSet,
    inv: Invalidation,
    /// When the accesses that are in flight still have had their time.
    until_ns: u64,
}

impl Pending {
    /// Whether the wait is over: nothing is in flight any more, or its deadline has passed.
    pub(crate) fn is_ready(&self, space: &AddressSpace) -> bool {
        let region = self.flight.region();
        let gate = space.gate().enter();
        quiesced(region, &gate, self.holders, &self.inv) || clock::monotonic_ns() > self.until_ns
    }

    /// Goes on where the fault left off, if nothing else has changed.
    pub(crate) fn finish(self, space: &AddressSpace, fault: &CpuFault) -> Attempt {
        let region = self.flight.region();
        if quiesced(region, &space.gate().enter(), self.holders, &self.inv) {
            self.go_on(space, fault)
        } else {
            self.overrun(space, fault)
        }
    }

    fn go_on(self, space: &AddressSpace, fault: &CpuFault) -> Attempt {
        let Self {
            flight,
            bracket,
            class,
            page: (block, page),
            ..
        } = self;
        let region = flight.region();
        let gate = space.gate().enter();
        let mut state = region.lock_block(block);
        let same = classify(region, &state, block, page, fault) == class;
        let attempt = if same || mutated(Mutation::FinishWithoutLook) {
            act(region, &gate, block, &mut state, &class, page, fault)
        } else {
            Attempt::Again
        };
        drop(bracket);
        attempt
    }

    /// Goes on where an access did not end in time. Waits for nothing: the monitor calls it.
    fn overrun(mut self, space: &AddressSpace, fault: &CpuFault) -> Attempt {
        let region = self.flight.region();
        if self.inv.keep == Keep::Reads {
            // The readers, which could stay until now, get as much time as the writers had.
            (self.inv, self.holders) = overrun::escalate(space, region, &self.inv);
            self.until_ns = deadline(region, &space.gate().enter(), self.holders);
            return Attempt::Pending(self);
        }
        match overrun::sever_once(space, region, self.holders, &self.inv) {
            Ok(()) => Attempt::Again,
            // Passing. Its time is over, so that it is looked at again at once.
            Err(Stall::Changing | Stall::NoMemory) => {
                process::sched_yield();
                Attempt::Pending(self)
            }
            // What cannot be taken cannot be had by a fault either, which says so.
            Err(Stall::Busy(_) | Stall::Refused(_) | Stall::Lost(_)) => self.go_on(space, fault),
        }
    }
}

/// One try of a fault, up to where it would have to wait.
pub(crate) fn begin(space: &AddressSpace, fault: &CpuFault, first: First) -> Attempt {
    point!(FaultEntering, fault.addr);
    let gate = space.gate().enter();
    let Some(place) = space.lookup(&gate, fault.addr) else {
        // Told of a change that nobody has applied yet, look again when it is; that was no miss.
        if space.has_unread_events() && fault.has_patience() {
            return Attempt::Again;
        }
        let stranger = space.has_missed_before(&gate, fault.addr, fault.thread);
        // Or when the kernel has got to telling: no message yet, but a change.
        if stranger && space.is_changing() && fault.has_patience() {
            return Attempt::Again;
        }
        // Memory that has grown in place, of which the kernel tells nobody: the new part is registered like the old.
        let door = || Some(space.grown(&gate, fault.addr)?.door());
        if stranger && let Some(door) = fault.door.or_else(door) {
            return zero_fill_tail(space, &gate, door, fault);
        }
        // Unregistered since the fault, perhaps, by the end of its mirror: once more.
        let refused = stranger && space.was_refused_before(&gate, fault.addr, fault.thread);
        return Attempt::Done(if refused {
            Verdict::NotOurs
        } else {
            Verdict::Resolved
        });
    };
    let region = &*place.region;
    let (block, page) = match place.kind {
        PlaceKind::Body => region.locate(fault.addr),
        PlaceKind::Moved(from) => region.locate(fault.addr - place.range.start() + from),
        PlaceKind::Tail => return zero_fill_tail(space, &gate, region.door(), fault),
        PlaceKind::Window(_) => return Attempt::Done(Verdict::Window),
    };
    let mut state = region.lock_block(block);
    if matches!(place.kind, PlaceKind::Body) && state.displaced().contains(page) {
        let stranger = space.has_missed_before(&gate, fault.addr, fault.thread);
        return Attempt::Done(if stranger {
            Verdict::NotOurs
        } else {
            Verdict::Resolved
        });
    }
    let class = classify(region, &state, block, page, fault);
    if first == First::Yes {
        count_fault(region, &class, fault);
    }
    point!(FaultLocked, fault.addr);
    let run = match &class {
        Class::Gone => return Attempt::Done(Verdict::NotOurs),
        Class::Pending => {
            count(&region.counters().waits, 1);
            return Attempt::WaitUntil(clock::monotonic_ns() + PENDING_POLL_NS);
        }
        Class::MoveHome(run) | Class::ShareHome(run) | Class::Collapse(run) => run.clone(),
        Class::Restore | Class::ZeroFill | Class::StaleProtection => page..page + 1,
    };
    if let Some(until) = lease_of_device(&mut state, &class) {
        count(&region.counters().waits, 1);
        return Attempt::WaitUntil(until);
    }
    let interval = if mutated(Mutation::FaultWithoutBracket) {
        Interval::EMPTY
    } else {
        region.interval(block, run.clone())
    };
    if mutated(Mutation::UnprotectFirst) && matches!(class, Class::Collapse(_)) {
        let at = region.host_addr_of(block, run.start);
        let _ = region.door().unprotect(at, run.len() * PAGE_SIZE);
    }
    let Ok(bracket) = Bracket::start(Flight::begin(region), interval, None) else {
        return Attempt::Again;
    };
    let keep = if matches!(class, Class::ShareHome(_) | Class::Restore) {
        Keep::Reads
    } else {
        Keep::Nothing
    };
    let inv = Invalidation::new(block, PageMask::range(run), keep);
    let holders = state.holders(inv.pages());
    if holders.is_empty() || invalidate(region, &gate, holders, &inv) {
        return act(region, &gate, block, &mut state, &class, page, fault);
    }
    count(&region.counters().waits, 1);
    let flight = Flight::begin(region);
    Attempt::Pending(Pending {
        flight,
        bracket,
        class,
        page: (block, page),
        until_ns: deadline(region, &gate, holders),
        holders,
        inv,
    })
}

/// Memory that a growing `mremap` added behind pages of ours: registered, for the kernel says so, and nobody else's.
/// Refused, it may have ceased to be registered this moment, its mirror closed: the access is tried once more (hazards G6). While a
/// mapping is changing the fault is kept: threads that were sent back to fault again would be read of before the event that they wait for.
fn zero_fill_tail(
    space: &AddressSpace,
    gate: &impl Inside,
    door: &Door,
    fault: &CpuFault,
) -> Attempt {
    let page = page_floor(fault.addr);
    let filled = door.copy(page, space.zeros(), PAGE_SIZE, Protect::No);
    Attempt::Done(match filled.stop {
        Stop::Changing => return Attempt::Again,
        Stop::Complete | Stop::Exists => Verdict::Resolved,
        _ if space.was_refused_before(gate, fault.addr, fault.thread) => Verdict::NotOurs,
        _ => Verdict::Resolved,
    })
}

fn classify(
    region: &Region,
    state: &BlockState,
    block: usize,
    page: usize,
    fault: &CpuFault,
) -> Class {
    if region.kind() != RegionKind::Managed {
        return Class::Gone;
    }
    let near = if region.is_whole(block) && !state.has_exceptions() {
        PageMask::FULL
    } else {
        match exception(region, state, block, page) {
            Ok(near) => near,
            Err(class) => return class,
        }
    };
    // Of these the granule's.
    let run_in = |pages: PageMask| {
        debug_assert!(region.granule().is_power_of_two());
        let group = page & !(region.granule() - 1);
        let run = (near & pages).run_around(page);
        run.start.max(group)..run.end.min(group + region.granule())
    };
    let reads = fault.access == Some(Access::Read);
    if state.away().contains(page) {
        let Some(holder) = state.holder_of(page) else {
            return Class::ZeroFill;
        };
        let run = run_in(state.away() & state.frames(holder));
        // While a launch goes on, a reader joins the readers (W1); otherwise moving is cheaper, and a write may follow.
        return if reads && region.in_use() {
            Class::ShareHome(run)
        } else {
            Class::MoveHome(run)
        };
    }
    let shared = state.shared();
    if shared.contains(page) {
        let missing = match fault.protection {
            Some(present) => !present,
            None => !AddressSpace::global().is_present(region.host_addr_of(block, page)),
        };
        return if missing {
            Class::Restore
        } else {
            Class::Collapse(run_in(shared))
        };
    }
    match fault.protection {
        Some(true) => Class::StaleProtection,
        _ => Class::ZeroFill,
    }
}

/// Where the body ends in the block, or some of its pages are not simply somebody's: the pages that may come home with `page`, or what else
/// is to be done about it.
fn exception(
    region: &Region,
    state: &BlockState,
    block: usize,
    page: usize,
) -> Result<PageMask, Class> {
    let displaced = state.displaced().contains(page);
    let gone = state.gone().contains(page) && !displaced;
    if gone || state.lost().contains(page) {
        return Err(Class::Gone);
    }
    if state.pending().contains(page) {
        return Err(Class::Pending);
    }
    // Displaced pages come home one by one: their neighbours may have gone elsewhere.
    Ok(if displaced {
        PageMask::page(page)
    } else {
        region.body_mask(block) - state.pending() - state.lost() - state.gone()
    })
}

fn count_fault(region: &Region, class: &Class, fault: &CpuFault) {
    let counters = region.counters();
    match class {
        Class::MoveHome(_) | Class::ShareHome(_) if fault.access == Some(Access::Write) => {
            count(&counters.cpu_write_faults, 1);
        }
        Class::MoveHome(_) | Class::ShareHome(_) | Class::Restore => {
            count(&counters.cpu_read_faults, 1);
        }
        Class::Collapse(_) => count(&counters.cpu_protect_faults, 1),
        Class::ZeroFill => count(&counters.cpu_zero_fills, 1),
        Class::StaleProtection | Class::Gone | Class::Pending => {
            count(&counters.cpu_spurious_faults, 1);
        }
    }
}

/// If the page was lent to a device that has not had its use of it yet: until when.
fn lease_of_device(state: &mut BlockState, class: &Class) -> Option<u64> {
    let takes = matches!(
        class,
        Class::MoveHome(_) | Class::Collapse(_) | Class::ShareHome(_)
    );
    let until = state.lease().device_until_ns;
    (takes && until != 0 && until > clock::monotonic_ns()).then_some(until)
}

/// First pass over `holders`, then whether all are quiesced already.
pub(crate) fn invalidate(
    region: &Region,
    gate: &impl Inside,
    holders: DeviceSet,
    inv: &Invalidation,
) -> bool {
    if mutated(Mutation::InvalidateNobody) {
        return true;
    }
    // Blocking invalidations are not refused.
    let _ = notifier::invalidate_all(listeners(region, gate, holders), inv);
    quiesced(region, gate, holders, inv)
}

/// Second pass: whether every device of `holders` is done with the pages.
pub(crate) fn quiesced(
    region: &Region,
    gate: &impl Inside,
    holders: DeviceSet,
    inv: &Invalidation,
) -> bool {
    mutated(Mutation::ShootdownNotAwaited)
        || notifier::all_quiesced(listeners(region, gate, holders), inv)
}

/// Those of `holders` that know the region.
fn listeners<'g>(
    region: &'g Region,
    gate: &'g impl Inside,
    holders: DeviceSet,
) -> impl Iterator<Item = &'g dyn AnyMapped> + Clone {
    holders.iter().filter_map(move |id| region.device(gate, id))
}

/// When accesses of `holders` that are in flight now will have had their time (hazards W2).
pub(crate) fn deadline(region: &Region, gate: &impl Inside, holders: DeviceSet) -> u64 {
    let longest = listeners(region, gate, holders)
        .map(|device| device.span_deadline_ns())
        .max();
    clock::monotonic_ns().saturating_add(longest.unwrap_or(0))
}

/// Waits until `holders` are done with the pages, or it is `until_ns`, or, without that, their deadline has passed; says
/// whether they are. No lock is held.
pub(crate) fn wait_until_quiesced(
    space: &AddressSpace,
    region: &Region,
    holders: DeviceSet,
    inv: &Invalidation,
    until_ns: Option<u64>,
) -> bool {
    let until_ns = until_ns.unwrap_or_else(|| deadline(region, &space.gate().enter(), holders));
    let mut spins = 0u32;
    loop {
        {
            let gate = space.gate().enter();
            if quiesced(region, &gate, holders, inv) {
                return true;
            }
        }
        if clock::monotonic_ns() > until_ns {
            return false;
        }
        spins += 1;
        if spins < 100 {
            core::hint::spin_loop();
        } else {
            process::sched_yield();
        }
    }
}

/// Changes the page table as `class` says. The holders are invalidated and quiesced, the bracket is open.
fn act(
    region: &Region,
    gate: &impl Inside,
    block: usize,
    state: &mut BlockState,
    class: &Class,
    page: usize,
    fault: &CpuFault,
) -> Attempt {
    let access = fault.access.unwrap_or(Access::Write);
    point!(FaultExcluding, fault.addr);
    let mut mover = Mover::new(region, block, state);
    // The fault may be older than the copy: another thread's fault on the page, or beside it, brought that meanwhile.
    if *class == Class::Restore && mover.is_with_host(page) {
        point!(FaultMoved, fault.addr);
        return Attempt::Done(Verdict::Resolved);
    }
    let moved = match class {
        Class::Gone | Class::Pending => return Attempt::Again,
        Class::MoveHome(run) => move_home(&mut mover, region, gate, page, run, Cause::Demand),
        Class::ShareHome(run) => share_home(&mut mover, region, gate, page, run),
        Class::Restore => share_home(&mut mover, region, gate, page, &(page..page + 1)),
        Class::Collapse(run) => mover.unprotect(run.clone()),
        Class::ZeroFill => mover.zero_fill_host(page, access),
        Class::StaleProtection => mover.clear_stale_protection(page),
    };
    match moved {
        Ok(()) => {
            let verdict = if mover.has_woken() {
                Verdict::Woken
            } else {
                Verdict::Resolved
            };
            note_fetch(state, class, page, fault);
            point!(FaultMoved, fault.addr);
            Attempt::Done(verdict)
        }
        Err(Stall::Changing | Stall::NoMemory) => {
            count(&region.counters().waits, 1);
            Attempt::Again
        }
        Err(Stall::Busy(at) | Stall::Refused(at) | Stall::Lost(at)) => {
            // Part of the run may be home, the faulting page among it.
            if at != page && !state.away().contains(page) {
                return Attempt::Done(Verdict::Resolved);
            }
            // The mirror ends: the page is home, and what the kernel refused was registered no more. It serves the access itself.
            if region.is_closing() && !state.away().contains(page) {
                return Attempt::Done(Verdict::Resolved);
            }
            if let Err(Stall::Lost(_)) = moved {
                state.set_lost(at);
                if at != page {
                    // It was in the way of this one, which is not lost: now it is left out.
                    return Attempt::Again;
                }
            }
            count(&region.counters().anomalies, 1);
            Attempt::Done(Verdict::NotOurs)
        }
    }
}

/// Moves a run home from whoever holds it; other holders' copies become stale.
pub(crate) fn move_home(
    mover: &mut Mover<'_>,
    region: &Region,
    gate: &impl Inside,
    page: usize,
    run: &Range<usize>,
    cause: Cause,
) -> Result<(), Stall> {
    let Some(device) = mover
        .state
        .holder_of(page)
        .and_then(|id| region.device(gate, id))
    else {
        return Err(Stall::Lost(page));
    };
    let before = mover.state.resident(device.id()).count();
    let moved = mover.bring_home(device, run.clone());
    let pages = PageMask::range(run.clone());
    if !mutated(Mutation::HomeLeavesCopies) {
        mover.state.revoked_all(pages - mover.state.away(), None);
    }
    device
        .residency()
        .release(before - mover.state.resident(device.id()).count());
    let home = (pages - mover.state.away()).count() as u64;
    if home > 0 {
        device.counters().to_host(cause, 1, home - 1);
    }
    moved
}

fn share_home(
    mover: &mut Mover<'_>,
    region: &Region,
    gate: &impl Inside,
    page: usize,
    run: &Range<usize>,
) -> Result<(), Stall> {
    let Some(device) = mover
        .state
        .holder_of(page)
        .and_then(|id| region.device(gate, id))
    else {
        return Err(Stall::Lost(page));
    };
    mover.share_home(device, run.clone())?;
    device
        .counters()
        .to_host(Cause::Demand, 1, run.len() as u64 - 1);
    Ok(())
}

/// A thread that fetches the same page again and again, since a device takes it before the thread's instruction has had
/// all the pages it needs, is granted a residency that doubles each time (hazards W4).
fn note_fetch(state: &mut BlockState, class: &Class, page: usize, fault: &CpuFault) {
    const REFAULT_NS: u64 = 200_000;
    const FIRST_SLICE_NS: u64 = 5_000;
    const MAX_SHIFT: u16 = 10;
    if !matches!(class, Class::MoveHome(_) | Class::Collapse(_)) {
        return;
    }
    let now = clock::monotonic_ns();
    let lease = state.lease();
    let same = lease.cpu_thread == fault.thread
        && usize::from(lease.cpu_page) == page
        && now - lease.cpu_fetched_ns < REFAULT_NS;
    lease.cpu_repeats = if same {
        lease.cpu_repeats.saturating_add(1)
    } else {
        0
    };
    lease.cpu_thread = fault.thread;
    lease.cpu_page = u16::try_from(page).unwrap_or(u16::MAX);
    lease.cpu_fetched_ns = now;
    if lease.cpu_repeats > 1 {
        lease.cpu_until_ns = now + (FIRST_SLICE_NS << lease.cpu_repeats.min(MAX_SHIFT));
    }
}
