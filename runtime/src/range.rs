//! [`Range`]: the one way a device gets translations.
//!
//! The seed's `hmm_range`, its life spelt as types:
//!
//! ```text
//! range.start_update(&mapped, pages, timeout)   -> Update      begins the critical section; Timeout is a final fault
//!     update.fault(access)                                     populates: moves or duplicates pages; holds no lock after
//!     update.migrate()                                         or moves pages, whatever the policy; leaves what cannot move
//!     update.snapshot()                                        or only looks; never faults anything in
//!     update.needs_retry()                                     a hint in mid-work: true is reliable, false is not
//!     device.lock()              -> guard
//!     update.end_update(&guard)  -> Ok(&[Valid]) | Interrupted consumes the update: no translation without it
//! ```
//!
//! [`Range::fault_in`] is the whole loop for pages of one block, and what a worker's far fault calls. It differs in one
//! thing: it takes its token and commits *inside* the block's round, so that only changes made behind the runtime's back can
//! interrupt it, and a storm of our own invalidations cannot starve a fault (protocol.md section 5).
//!
//! # One round on one block
//! 1. Enter the gate, lock the block: this is the block's round, and there is one at a time (hazards P2).
//! 2. [`BlockState::plan`]: what has to change so that the device may do what it wants.
//! 3. Reserve device memory for what will be filled; if it is full, let go of everything and evict first.
//! 4. Open a bracket, invalidate the other holders, and wait for them as a CPU fault does.
//! 5. Move, one call per run.
//! 6. Commit, or remember what became valid; close the bracket; unlock.

use core::fmt;
use core::ops::{Deref, Range as Pages};
use core::sync::atomic::Ordering;
use core::time::Duration;

use crate::addr::{BLOCK_SIZE, PAGES_PER_BLOCK, PageRange};
use crate::block::{BlockState, DeviceId, OnRead, Plan};
use crate::device::{
    AnyMapped, Attached, Device, DeviceGuard, Invalidation, Keep, Mapped, MappedRef,
};
use crate::error::{Access, DeviceFault, DeviceFaultKind, Result};
use crate::evict;
use crate::fault::{Flight, invalidate, wait_quiesced};
use crate::mask::PageMask;
use crate::movement::{Mover, Stall, granules_of};
use crate::notifier::{BeginError, Hub, RangeKey, Subscription, Token};
use crate::pin;
use crate::region::{Region, RegionKind};
use crate::rights::Rights;
use crate::scratch::Scratch;
use crate::space::{AddressSpace, Inside};
use crate::stats::{Cause, count};
use crate::sync::Deadline;
use crate::sys::arc::MapArc;
use crate::sys::mmap::{self, Advice};
use crate::sys::{clock, process};

/// Blocks that one movement takes at most: of huge pages, microseconds' work while their locks are held.
const MAX_BLOCKS_AT_ONCE: usize = 32;

/// Pages of one block that a device may establish translations to, and with which rights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Valid {
    block: usize,
    readable: PageMask,
    writable: PageMask,
    in_place: PageMask,
}

impl Valid {
    /// The block, counted from the region's base.
    #[must_use]
    pub fn block(&self) -> usize {
        self.block
    }

    /// Pages that may be read.
    #[must_use]
    pub fn readable(&self) -> &PageMask {
        &self.readable
    }

    /// Pages that may be written.
    #[must_use]
    pub fn writable(&self) -> &PageMask {
        &self.writable
    }

    /// Those of the readable and writable pages that are accessed at the host's address; all others are in the window.
    #[must_use]
    pub fn in_place(&self) -> &PageMask {
        &self.in_place
    }
}

/// An update was interrupted by an invalidation of its range: begin again at `start_update`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted;

/// A region's hub, kept alive with the region.
struct HubOf(MapArc<Region>);

impl Deref for HubOf {
    type Target = Hub;
    fn deref(&self) -> &Hub {
        self.0.hub()
    }
}

/// What one worker faults pages in with. One thread uses it at a time.
///
/// Made by [`Attachment::range`](crate::Attachment::range).
pub struct Range<D: Device> {
    attached: MapArc<Attached<D>>,
    subscriptions: Vec<(u64, Subscription<HubOf>)>,
    scratch: Scratch,
    valid: Vec<Valid>,
}

/// An update in progress: the critical section between `start_update` and `end_update`.
pub struct Update<'r, D: Device> {
    range: &'r mut Range<D>,
    mapped: MappedRef<D>,
    subscription: usize,
    pages: Pages<usize>,
    token: Token,
    deadline: Deadline,
}

/// What a round came to.
enum Outcome<T> {
    /// It was committed.
    Done(T),
    /// Something is in the way that passes by itself.
    Again,
    /// The page was lent to the CPU until then.
    WaitUntil(u64),
    /// Device memory is full; so many pages are needed.
    Full(usize),
    /// The device would not allocate, whatever is evicted: try with less.
    NoFrames,
    /// The kernel would not move this page.
    Stuck(usize, Stall),
    /// It will not work.
    Fault(usize, DeviceFaultKind),
}

impl<D: Device> Range<D> {
    pub(crate) fn new(attached: MapArc<Attached<D>>) -> Result<Self> {
        let scratch = Scratch::new(AddressSpace::get("range")?)?;
        Ok(Self {
            attached,
            subscriptions: Vec::new(),
            scratch,
            valid: Vec::new(),
        })
    }

    /// Begins an update of the pages `pages` (indices from the region's base): waits until no invalidation overlaps them.
    ///
    /// # Errors
    /// [`DeviceFaultKind::Timeout`] if overlapping invalidations did not end in time. A *collision* is no error here: it
    /// shows in `end_update`.
    pub fn start_update(
        &mut self,
        mapped: &MappedRef<D>,
        pages: Pages<usize>,
        timeout: Duration,
    ) -> Result<Update<'_, D>, DeviceFault> {
        let deadline = Deadline::after(timeout);
        let region = mapped.shared_region();
        let addr = region.base() + pages.start * crate::addr::PAGE_SIZE;
        if region.door().is_disowned() {
            return Err(DeviceFault::new(
                addr,
                Access::Read,
                DeviceFaultKind::Forked,
            ));
        }
        let covered = covered_by_granules(region, &pages);
        let at = self.subscription(region);
        let (_, subscription) = &mut self.subscriptions[at];
        let token = subscription
            .begin_at(interval_of(region, &covered), deadline)
            .map_err(|e| DeviceFault::new(addr, Access::Read, kind_of(e)))?;
        let nr_blocks = covered.end.div_ceil(PAGES_PER_BLOCK) - covered.start / PAGES_PER_BLOCK;
        self.valid.clear();
        self.valid.reserve(nr_blocks);
        Ok(Update {
            range: self,
            mapped: mapped.clone(),
            subscription: at,
            pages,
            token,
            deadline,
        })
    }

    /// Faults `pages` (indices from the region's base, within one block) in for `access` and hands what became valid to
    /// `install`, under the device lock. The whole loop, with retries, eviction and a deadline that starts anew with each
    /// progress. `attempt` counts the tries of an access that needs several ranges at once: it earns the pages a lease.
    ///
    /// More than was asked for may become valid: a granule moves as a whole.
    ///
    /// # Errors
    /// The fault that ends the access.
    ///
    /// # Panics
    /// If `pages` is empty or spans blocks: a bug of the device.
    pub fn fault_in(
        &mut self,
        mapped: &MappedRef<D>,
        pages: Pages<usize>,
        access: Access,
        attempt: u32,
        timeout: Duration,
        mut install: impl FnMut(&Valid, &DeviceGuard<'_>),
    ) -> Result<(), DeviceFault> {
        let block = pages.start / PAGES_PER_BLOCK;
        assert!(
            !pages.is_empty() && (pages.end - 1) / PAGES_PER_BLOCK == block,
            "fault_in serves pages of one block"
        );
        let region = mapped.shared_region();
        let addr = region.base() + pages.start * crate::addr::PAGE_SIZE;
        let fault = |kind| DeviceFault::new(addr, access, kind);
        if region.door().is_disowned() {
            return Err(fault(DeviceFaultKind::Forked));
        }
        if access == Access::Write && !region.is_writable() {
            return Err(fault(DeviceFaultKind::Protection));
        }
        count_round(mapped, access);
        let want = PageMask::range(
            pages.start - block * PAGES_PER_BLOCK..pages.end - block * PAGES_PER_BLOCK,
        );
        let at = self.subscription(region);
        let covered = interval_of(region, &covered_by_granules(region, &pages));
        // Set at the first wait: a round that has nothing to wait for does not ask what time it is.
        let mut deadline = None;
        let mut retries = 0;
        let (mut stuck, mut appetite, mut rest) = (None, Appetite::Granules, want);
        let mut is_first = true;
        self.subscriptions[at].1.move_to(covered);
        loop {
            let subscription = &self.subscriptions[at].1;
            // Waits here, where nothing is held, if there was something to wait for. The token that counts is taken under the
            // block's lock, under which every change of ours starts its bracket: so nothing of ours can come between it and
            // the commit.
            if !core::mem::take(&mut is_first) {
                let until = *deadline.get_or_insert_with(|| Deadline::after(timeout));
                let _ = subscription.begin(until).map_err(|e| fault(kind_of(e)))?;
            }
            if self.scratch.ensure(region.door()).is_err() {
                return Err(fault(DeviceFaultKind::OutOfMemory));
            }
            let (want, alone) = appetite.of(rest);
            let key = Some(subscription.key());
            let round = Round {
                mapped,
                region,
                block,
                want,
                access,
                key,
                attempt,
                alone,
                cause: Cause::Demand,
            };
            let begin = || subscription.begin(Deadline::PASSED).ok();
            let outcome = round.run_with(&mut self.scratch, begin, |valid, token| {
                let device = &self.attached.device;
                let guard = device.lock().lock();
                if subscription.interrupted(token) {
                    return Err(Interrupted);
                }
                install(valid, &guard);
                Ok(())
            });
            match outcome {
                Outcome::Done(Ok(())) if rest == want => return Ok(()),
                Outcome::Done(Ok(())) => rest -= want,
                Outcome::NoFrames => appetite.refused(&round),
                Outcome::Done(Err(Interrupted)) => {
                    count(&mapped.counters().retries, 1);
                    retries += 1;
                }
                other => {
                    // An interruption alone is no progress (protocol.md section 5).
                    if self.between_rounds(&round_info(mapped, block, access), other, &mut stuck)?
                        == Progress::Made
                    {
                        deadline = None;
                    }
                }
            }
            if deadline
                .get_or_insert_with(|| Deadline::after(timeout))
                .has_passed()
            {
                return Err(fault(DeviceFaultKind::Timeout));
            }
            if retries > 0 {
                process::sched_yield();
            }
        }
    }

    /// The subscription to `region`'s hub, made on first use.
    fn subscription(&mut self, region: &MapArc<Region>) -> usize {
        if let Some(at) = self
            .subscriptions
            .iter()
            .position(|(id, _)| *id == region.id())
        {
            return at;
        }
        const KEPT: usize = 16;
        if self.subscriptions.len() >= KEPT {
            drop(self.subscriptions.remove(0));
        }
        let whole = crate::notifier::Interval::new(region.base() as u64, region.base() as u64 + 1);
        let subscription = Subscription::insert(HubOf(region.clone()), whole);
        self.subscriptions.push((region.id(), subscription));
        self.subscriptions.len() - 1
    }

    /// Lets go of what this range keeps of regions, so that they can be freed. For when a launch has ended.
    pub fn park(&mut self) {
        self.subscriptions.clear();
    }

    /// Does, with no lock held, what a round could not go on without.
    fn between_rounds<T>(
        &mut self,
        info: &RoundInfo<'_, D>,
        outcome: Outcome<T>,
        stuck: &mut Option<usize>,
    ) -> Result<Progress, DeviceFault> {
        let region = info.mapped.shared_region();
        let fault = |page: usize, kind| {
            DeviceFault::new(region.addr_of(info.block, page), info.access, kind)
        };
        match outcome {
            Outcome::Done(_) => Ok(Progress::Made),
            Outcome::Again => {
                count(&region.counters().waits, 1);
                process::sched_yield();
                Ok(Progress::None)
            }
            Outcome::WaitUntil(ns) => {
                count(&region.counters().waits, 1);
                clock::sleep_until(ns);
                Ok(Progress::None)
            }
            Outcome::Full(needed) => {
                let freed = evict::make_room(&self.attached, needed, &mut self.scratch)
                    .map_err(|_| fault(0, DeviceFaultKind::OutOfMemory))?;
                if freed == 0 {
                    if needed > self.attached.residency.capacity() {
                        return Err(fault(0, DeviceFaultKind::OutOfMemory));
                    }
                    // All of it is in use at this moment: the others will be done with theirs.
                    count(&region.counters().waits, 1);
                    process::sched_yield();
                    return Ok(Progress::None);
                }
                Ok(Progress::Made)
            }
            Outcome::Stuck(page, stall) => {
                let first_time = stuck.replace(page) != Some(page);
                unstick(region, info, page, stall, first_time).map_err(|kind| fault(page, kind))?;
                Ok(Progress::Made)
            }
            Outcome::NoFrames => Ok(Progress::None),
            Outcome::Fault(page, kind) => Err(fault(page, kind)),
        }
    }
}

/// How much a fault asks for at once: less after each allocation that the device refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Appetite {
    /// All that is wanted, and what lies beside it.
    Granules,
    /// One page.
    Page,
}

impl Appetite {
    /// What to ask for of `want`, and whether alone.
    fn of(self, want: PageMask) -> (PageMask, bool) {
        match (self, want.first_from(0)) {
            (Self::Page, Some(page)) => (PageMask::page(page), true),
            _ => (want, false),
        }
    }

    /// After a refusal: less. A page that the device has no memory for stays with the CPU, and is served in place.
    fn refused<D: Device>(&mut self, round: &Round<'_, D>) {
        if *self == Self::Page {
            let _gate = AddressSpace::global().gate().enter();
            round
                .region
                .lock_block(round.block)
                .set_unmovable(round.want);
        }
        *self = Self::Page;
    }
}

fn kind_of(error: BeginError) -> DeviceFaultKind {
    match error {
        BeginError::Timeout => DeviceFaultKind::Timeout,
        BeginError::Released => DeviceFaultKind::Closed,
    }
}

/// Whether something was achieved between two rounds, so that the fault's deadline starts anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Made,
    None,
}

struct RoundInfo<'a, D: Device> {
    mapped: &'a MappedRef<D>,
    block: usize,
    access: Access,
}

fn round_info<D: Device>(mapped: &MappedRef<D>, block: usize, access: Access) -> RoundInfo<'_, D> {
    RoundInfo {
        mapped,
        block,
        access,
    }
}

fn count_round<D: Device>(mapped: &Mapped<D>, access: Access) {
    let counters = AnyMapped::counters(mapped);
    count(
        if access == Access::Write {
            &counters.device_write_faults
        } else {
            &counters.device_read_faults
        },
        1,
    );
}

/// The kernel refused to move `page`. First break a sharing with other processes (hazards M3); if it is refused again, look
/// whether the mapping permits the access at all, and if so serve the page in place from now on.
fn unstick<D: Device>(
    region: &Region,
    info: &RoundInfo<'_, D>,
    page: usize,
    stall: Stall,
    first_time: bool,
) -> Result<(), DeviceFaultKind> {
    let addr = region.addr_of(info.block, page);
    if let Stall::Lost(_) = stall {
        return Err(DeviceFaultKind::Lost);
    }
    let Some(vma) = AddressSpace::global().vma(addr) else {
        return Err(DeviceFaultKind::Unmapped);
    };
    if !vma.readable || (info.access == Access::Write && !vma.writable) {
        return Err(DeviceFaultKind::Protection);
    }
    if first_time && vma.writable && matches!(stall, Stall::Busy(_)) {
        // The neighbours were shared by the same fork, most likely: all at once, not one fault each.
        let granule = region.granule() * crate::addr::PAGE_SIZE;
        let body = region.body().and_then(|body| {
            PageRange::containing(addr & !(granule - 1), granule)?.intersect(body)
        });
        if let Some(pages) = body.and_then(|p| p.intersect(vma.range)) {
            // Pinned meanwhile: home and un-protected, or the write that breaks the sharing would itself fault.
            if pin::with_pinned(region, pages, || {
                drop(mmap::advise(pages, Advice::PopulateWrite));
            })
            .is_err()
            {
                process::sched_yield();
            }
        }
        return Ok(());
    }
    let mark = || {
        let _gate = AddressSpace::global().gate().enter();
        region
            .lock_block(info.block)
            .set_unmovable(PageMask::page(page));
    };
    // The CPU's alone and un-protected before devices use it there: a store in place to a page that is still shared would
    // fault, and wait for the very worker that made it.
    let own = PageRange::containing(addr, 1).and_then(|p| p.intersect(region.body()?));
    if own.is_none_or(|pages| pin::with_pinned(region, pages, mark).is_err()) {
        mark();
    }
    Ok(())
}

/// The pages that granules around `pages` cover: what may become valid by faulting `pages` in.
fn covered_by_granules(region: &Region, pages: &Pages<usize>) -> Pages<usize> {
    let granule = region.granule();
    pages.start & !(granule - 1)..pages.end.next_multiple_of(granule)
}

fn interval_of(region: &Region, pages: &Pages<usize>) -> crate::notifier::Interval {
    let at = |page: usize| (region.base() + page * crate::addr::PAGE_SIZE) as u64;
    crate::notifier::Interval::new(at(pages.start), at(pages.end))
}

/// One device round on one block.
struct Round<'a, D: Device> {
    mapped: &'a MappedRef<D>,
    region: &'a Region,
    block: usize,
    want: PageMask,
    access: Access,
    key: Option<RangeKey>,
    attempt: u32,
    /// Whether only the wanted pages are to move, and nothing beside them.
    alone: bool,
    cause: Cause,
}

impl<D: Device> Round<'_, D> {
    fn id(&self) -> DeviceId {
        self.mapped.id()
    }

    /// Runs the round; `commit` sees what is valid, with the block locked.
    fn run<T>(&self, scratch: &mut Scratch, commit: impl FnOnce(&Valid) -> T) -> Outcome<T> {
        self.run_with(scratch, || Some(()), |valid, ()| commit(valid))
    }

    /// Runs the round. `begin` is called as soon as the block is locked; if it gives nothing, an invalidation is under way.
    fn run_with<T, B>(
        &self,
        scratch: &mut Scratch,
        begin: impl FnOnce() -> Option<B>,
        commit: impl FnOnce(&Valid, B) -> T,
    ) -> Outcome<T> {
        let space = AddressSpace::global();
        let gate = space.gate().enter();
        // SeqCst, with the grace period of `fork::prepare`: either this sees the flag, or prepare waits for this section.
        if space.forking().load(Ordering::SeqCst) != 0 {
            return Outcome::Again;
        }
        // Likewise, against the teardown of the mirror or of the device.
        if self.is_over() {
            return Outcome::Fault(0, DeviceFaultKind::Closed);
        }
        let mut state = self.region.lock_block(self.block);
        let Some(begun) = begin() else {
            return Outcome::Again;
        };
        let commit = |valid: &Valid| commit(valid, begun);
        let is_whole =
            self.region.is_whole(self.block) && self.region.kind() != RegionKind::InPlace;
        if !is_whole && let Some(outside) = (self.want - self.servable()).first_from(0) {
            return Outcome::Fault(outside, DeviceFaultKind::OutOfViews);
        }
        let plain = self.plain(&state);
        let stale = if plain.is_none() {
            self.stale(&state)
        } else {
            None
        };
        if plain.is_none() && stale.is_none() {
            if let Some(gone) = (self.want & state.gone()).first_from(0) {
                return Outcome::Fault(gone, DeviceFaultKind::Unmapped);
            }
            // Pages at which the kernel or a pin is at work: a pin marks its pages, lets go of the lock while accesses end, and
            // only then brings them home; until it has, they can be used neither in place nor elsewhere.
            if (state.pending() | state.pins_in_progress()).intersects(&self.want) {
                return Outcome::Again;
            }
        }
        if let Some(until) = lease_of_cpu(&mut state) {
            return Outcome::WaitUntil(until);
        }
        if self.region.kind() == RegionKind::Input {
            return self.run_input(&mut state, scratch, commit);
        }
        if let Some(pages) = plain {
            match self.take_plain(&mut state, pages, scratch) {
                Ok(valid) => return Outcome::Done(self.commit(&mut state, &valid, commit)),
                Err(Some(outcome)) => return outcome,
                // Not as plain as it looked: the mapping is protected, or of another kind.
                Err(None) => {}
            }
        }
        if let Some(pages) = stale {
            match self.copy_over_stale(&mut state, pages) {
                Ok(valid) => return Outcome::Done(self.commit(&mut state, &valid, commit)),
                Err(Some(outcome)) => return outcome,
                // Something is missing or may not be read: that is for a round with a plan.
                Err(None) => {}
            }
        }
        let rights = self.rights(space);
        if let Some((page, kind)) = rights.refusal(self.want, self.access) {
            return Outcome::Fault(page, kind);
        }
        if self.region.kind() == RegionKind::InPlace {
            let valid = self.valid(&state, self.want, &rights);
            return Outcome::Done(self.commit(&mut state, &valid, commit));
        }
        let (want, plan) = self.plan(&state, &rights);
        if plan.is_empty() {
            let valid = self.valid(&state, want, &rights);
            if !self.is_served(&valid) {
                // A pin in progress: the page is neither the device's to use nor home yet.
                return Outcome::Again;
            }
            return Outcome::Done(self.commit(&mut state, &valid, commit));
        }
        let fill = plan.take | plan.duplicate | plan.from_device;
        let needed = (fill - state.resident(self.id())).count();
        if needed > 0 && self.mapped.residency().take_failure() {
            return Outcome::NoFrames;
        }
        if !self.mapped.residency().reserve(needed) {
            return Outcome::Full(needed);
        }
        let changes = plan.changes().bounds().unwrap_or(0..1);
        let Ok(bracket) = self
            .region
            .hub()
            .start(self.region.interval(self.block, changes), self.key)
        else {
            self.mapped.residency().release(needed);
            return Outcome::Again;
        };
        if !self.exclude_others(&gate, &state, &plan) {
            count(&self.region.counters().waits, 1);
            let flight = Flight::begin(self.region);
            drop(state);
            drop(gate);
            self.wait_for_others(space, flight.region(), &plan);
            let gate = space.gate().enter();
            let mut state = self.region.lock_block(self.block);
            // Eviction may have emptied stale pages meanwhile, which no plan shows: then more is needed than was reserved.
            let stop = self.is_over() || space.forking().load(Ordering::SeqCst) != 0;
            let same = self.rights(space) == rights && self.plan(&state, &rights) == (want, plan);
            if stop || !same || (fill - state.resident(self.id())).count() != needed {
                self.mapped.residency().release(needed);
                drop(bracket);
                return Outcome::Again;
            }
            return self.finish(
                &gate, &mut state, want, &rights, &plan, needed, scratch, commit,
            );
        }
        self.finish(
            &gate, &mut state, want, &rights, &plan, needed, scratch, commit,
        )
    }

    /// Whether the mirror or the device is going: what is moved now would not be brought home. Inside the gate.
    fn is_over(&self) -> bool {
        self.region.is_closing() || self.mapped.attached().is_detached()
    }

    /// The wanted pages and what lies beside them, if they are all the CPU's alone and are to move: the most frequent round by
    /// far. It goes without a plan.
    fn plain(&self, state: &BlockState) -> Option<PageMask> {
        // Without MOVE nothing else would look at the mapping's protection.
        if !self.region.door().has_move() {
            return None;
        }
        let moves = self.access == Access::Write || self.region.on_read() == OnRead::Migrate;
        if !moves || self.region.kind() != RegionKind::Managed {
            return None;
        }
        let pages = self.want | self.company();
        state.is_plain_for(self.id(), &pages).then_some(pages)
    }

    /// The round on such pages: nobody is to be told, so the bracket is there for ranges alone. `Err(None)` if the kernel would not
    /// move them: they are not what they seemed, and the round is to be planned.
    fn take_plain<T>(
        &self,
        state: &mut BlockState,
        pages: PageMask,
        scratch: &mut Scratch,
    ) -> Result<Valid, Option<Outcome<T>>> {
        let needed = pages.count();
        let residency = self.mapped.residency();
        if residency.take_failure() {
            return Err(Some(Outcome::NoFrames));
        }
        if !residency.reserve(needed) {
            return Err(Some(Outcome::Full(needed)));
        }
        let bounds = pages.bounds().unwrap_or(0..1);
        let interval = self.region.interval(self.block, bounds.clone());
        let Ok(_bracket) = self.region.hub().start(interval, self.key) else {
            residency.release(needed);
            return Err(Some(Outcome::Again));
        };
        let mut mover = Mover::new(self.region, self.block, state);
        let moved = if bounds.len() == needed {
            // One run, as nearly always.
            let moved = mover.take(&**self.mapped, bounds, self.access, scratch);
            if moved.is_ok() {
                let demand = self.want.count();
                self.mapped.counters().to_device(
                    self.cause,
                    demand as u64,
                    (needed - demand) as u64,
                );
            }
            moved
        } else {
            pages.runs().try_for_each(|run| {
                mover.take(&**self.mapped, run.clone(), self.access, scratch)?;
                self.count_arrival(&run);
                Ok(())
            })
        };
        debug_assert!(
            state.is_consistent(),
            "the directory lost a holder: {state:?}"
        );
        // All of them, unless the movement stopped half-way. Then the CPU may still hold some, and others may be stale already.
        let (resident, readable, owned) = if moved.is_ok() {
            (pages, pages, pages)
        } else {
            let id = self.id();
            let readable = pages & state.frames(id);
            (
                pages & state.resident(id),
                readable,
                pages & state.exclusive_to(id),
            )
        };
        if moved.is_err() {
            residency.release(needed - resident.count());
        }
        let writable = if self.region.is_writable() {
            owned
        } else {
            PageMask::EMPTY
        };
        let served = match self.access {
            Access::Read => &readable,
            Access::Write => &writable,
        };
        if served.contains_all(&self.want) {
            return Ok(Valid {
                block: self.block,
                readable,
                writable,
                in_place: PageMask::EMPTY,
            });
        }
        match moved {
            Err(Stall::Refused(_)) => Err(None),
            moved => Err(Some(stopped(moved))),
        }
    }

    /// The wanted pages and what lies beside them, if they are the CPU's alone and to be duplicated, and the window has a
    /// stale copy of each: the round of a device that reads again what the CPU has written again.
    fn stale(&self, state: &BlockState) -> Option<PageMask> {
        let duplicates = self.access == Access::Read && self.region.on_read() == OnRead::Duplicate;
        if !duplicates || self.region.kind() != RegionKind::Managed {
            return None;
        }
        let pages = self.want | self.company();
        state.is_stale_for(self.id(), &pages).then_some(pages)
    }

    /// The round on such pages, without a plan, and without a look at the mappings: the copy itself shows that they may be read.
    /// `Err(None)` if it does not come to all of them; what it came to is recorded.
    fn copy_over_stale<T>(
        &self,
        state: &mut BlockState,
        pages: PageMask,
    ) -> Result<Valid, Option<Outcome<T>>> {
        let bounds = pages.bounds().unwrap_or(0..1);
        let interval = self.region.interval(self.block, bounds);
        let Ok(_bracket) = self.region.hub().start(interval, self.key) else {
            return Err(Some(Outcome::Again));
        };
        let mut mover = Mover::new(self.region, self.block, state);
        for run in pages.runs() {
            let done = match mover.duplicate_over_junk(&**self.mapped, run.clone()) {
                Ok(done) => done,
                Err(stall) => return Err(Some(stopped(Err(stall)))),
            };
            self.count_arrival(&(run.start..done));
            if done < run.end {
                return Err(None);
            }
        }
        Ok(Valid {
            block: self.block,
            readable: pages,
            writable: PageMask::EMPTY,
            in_place: PageMask::EMPTY,
        })
    }

    /// The round on `nr` whole blocks at once, from this one on, by one movement: where both sides are huge the system call is
    /// most of what a block costs. Takes as many as nothing stands in the way of, pushes what became valid to `valid`, which
    /// has room, and says how many. None is no failure: everything else is for rounds on single blocks.
    ///
    /// Several block locks are held, and none was waited for: all are tried (hazards W3).
    fn take_blocks(&self, nr: usize, scratch: &mut Scratch, valid: &mut Vec<Valid>) -> usize {
        let (space, region, id) = (AddressSpace::global(), self.region, self.id());
        let moves = self.access == Access::Write || region.on_read() == OnRead::Migrate;
        // Opaque memory is filled from the window, in rounds.
        let is_opaque = self.mapped.bounce().is_some();
        if !moves || is_opaque || region.kind() != RegionKind::Managed || !region.door().has_move()
        {
            return 0;
        }
        let _gate = space.gate().enter();
        if space.forking().load(Ordering::SeqCst) != 0 || self.is_over() {
            return 0;
        }
        let mut states = [const { None }; MAX_BLOCKS_AT_ONCE];
        let mut n = 0;
        for slot in states.iter_mut().take(nr) {
            let block = self.block + n;
            let Some(mut state) = region.try_lock_block(block) else {
                break;
            };
            let is_plain = region.is_whole(block) && state.is_plain_for(id, &PageMask::FULL);
            if !is_plain || lease_of_cpu(&mut state).is_some() {
                break;
            }
            *slot = Some(state);
            n += 1;
        }
        let needed = n * PAGES_PER_BLOCK;
        let residency = self.mapped.residency();
        if n < 2 || residency.take_failure() || !residency.reserve(needed) {
            return 0;
        }
        let addr = region.addr_of(self.block, 0);
        let interval = crate::notifier::Interval::new(addr as u64, (addr + n * BLOCK_SIZE) as u64);
        let Ok(_bracket) = region.hub().start(interval, self.key) else {
            self.mapped.residency().release(needed);
            return 0;
        };
        count(&region.counters().move_calls, 1);
        let moved = region.door().move_pages(
            self.mapped.window().addr_of(self.block, 0),
            addr,
            n * BLOCK_SIZE,
        );
        let nr_moved = moved.bytes / crate::addr::PAGE_SIZE;
        let mut nr_arrived = 0;
        let mut nr_complete = 0;
        for (i, state) in states.iter_mut().flatten().enumerate() {
            let here = nr_moved
                .saturating_sub(i * PAGES_PER_BLOCK)
                .min(PAGES_PER_BLOCK);
            if here > 0 {
                state.moved_out(id, PageMask::range(0..here));
            }
            if i == nr_moved / PAGES_PER_BLOCK {
                // Where it stopped: to find out why, page by page, under the same hold of the lock (D4). What that leaves is
                // the single round's.
                let mut mover = Mover::new(region, self.block + i, state);
                let _ = mover.take(&**self.mapped, here..PAGES_PER_BLOCK, self.access, scratch);
            }
            nr_arrived += state.resident(id).count();
            if nr_complete == i && state.exclusive_to(id) == PageMask::FULL {
                nr_complete += 1;
                self.mapped.touch(self.block + i);
                let writable = if region.is_writable() {
                    PageMask::FULL
                } else {
                    PageMask::EMPTY
                };
                let block = self.block + i;
                valid.push(Valid {
                    block,
                    readable: PageMask::FULL,
                    writable,
                    in_place: PageMask::EMPTY,
                });
            }
        }
        self.mapped.residency().release(needed - nr_arrived);
        self.mapped
            .counters()
            .to_device(self.cause, nr_arrived as u64, 0);
        nr_complete
    }

    /// What to fault in, the wanted pages and what lies beside them, and what that takes.
    fn plan(&self, state: &BlockState, rights: &Rights) -> (PageMask, Plan) {
        let beside = (self.company() & rights.to(self.access))
            - state.gone()
            - state.pending()
            - state.in_place()
            - state.held_by_devices(Some(self.id()));
        let all = self.want | beside;
        (
            all,
            state.plan(self.id(), all, self.access, self.region.on_read()),
        )
    }

    /// The pages that rounds may serve: those of the body, or all that hold bytes of the range where nothing ever moves.
    fn servable(&self) -> PageMask {
        match self.region.kind() {
            RegionKind::InPlace => self.region.cover_mask(self.block),
            RegionKind::Managed | RegionKind::Input => self.region.body_mask(self.block),
        }
    }

    /// What the mappings permit of the wanted pages and those beside them.
    fn rights(&self, space: &AddressSpace) -> Rights {
        Rights::of(space, self.region, self.block, self.want | self.company())
    }

    /// The granules around the wanted pages, cut down where device memory is small: a fault for one page must not claim
    /// more than a quarter of it.
    fn company(&self) -> PageMask {
        let quarter = (self.mapped.residency().capacity() / 4).max(1);
        let granule = self.region.granule().min(1 << quarter.ilog2());
        if self.alone {
            return PageMask::EMPTY;
        }
        let granules = granules_of(self.want, granule);
        if self.region.is_whole(self.block) {
            granules
        } else {
            granules & self.region.body_mask(self.block)
        }
    }

    fn invalidations(&self, plan: &Plan) -> [Invalidation; 2] {
        [
            Invalidation::new(self.block, plan.revoke, Keep::Nothing),
            Invalidation::new(self.block, plan.downgrade, Keep::Reads),
        ]
    }

    /// First pass over the other devices, then whether they are done.
    fn exclude_others(&self, gate: &impl Inside, state: &BlockState, plan: &Plan) -> bool {
        // Every device is told before any is waited for (I9): no short cut here.
        let mut over = true;
        for inv in self
            .invalidations(plan)
            .iter()
            .filter(|inv| !inv.pages().is_empty())
        {
            over &= invalidate(
                self.region,
                gate,
                state.holders(inv.pages()).without(self.id()),
                inv,
            );
        }
        over
    }

    fn wait_for_others(&self, space: &AddressSpace, region: &Region, plan: &Plan) {
        let mut others = crate::block::DeviceSet::all();
        others = others.without(self.id());
        for inv in self
            .invalidations(plan)
            .iter()
            .filter(|inv| !inv.pages().is_empty())
        {
            wait_quiesced(space, region, others, inv);
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the tail of one function, split where it is entered from two places"
    )]
    fn finish<T>(
        &self,
        gate: &impl Inside,
        state: &mut BlockState,
        want: PageMask,
        rights: &Rights,
        plan: &Plan,
        reserved: usize,
        scratch: &mut Scratch,
        commit: impl FnOnce(&Valid) -> T,
    ) -> Outcome<T> {
        let before = state.resident(self.id()).count();
        let moved = self.execute(gate, state, rights, plan, scratch);
        debug_assert!(
            state.is_consistent(),
            "the directory lost a holder: {state:?}"
        );
        let after = state.resident(self.id()).count();
        self.mapped.residency().release(before + reserved - after);
        let valid = self.valid(state, want, rights);
        if self.is_served(&valid) {
            // Whatever happened to the company: what was wanted is there.
            return Outcome::Done(self.commit(state, &valid, commit));
        }
        stopped(moved)
    }

    /// The movements of a plan. The other holders have been excluded.
    fn execute(
        &self,
        gate: &impl Inside,
        state: &mut BlockState,
        rights: &Rights,
        plan: &Plan,
        scratch: &mut Scratch,
    ) -> Result<(), Stall> {
        let me: &dyn AnyMapped = &**self.mapped;
        let id = self.id();
        let mut mover = Mover::new(self.region, self.block, state);
        // What the device's window still holds of an earlier copy is copied over; what that leaves, below.
        for run in (plan.duplicate & mover.state.junk(id)).runs() {
            let done = mover.duplicate_over_junk(me, run.clone())?;
            self.count_arrival(&(run.start..done));
        }
        let duplicate = plan.duplicate - mover.state.frames(id);
        mover.clear_junk(me, plan.take | duplicate | plan.from_device, scratch)?;
        for run in plan.from_device.runs() {
            self.fetch_from_devices(gate, &mut mover, run, scratch)?;
        }
        mover
            .state
            .revoked_all(plan.revoke & mover.state.frames(id), Some(id));
        for run in ((plan.take | duplicate) - rights.writable).runs() {
            mover.duplicate(me, run.clone(), scratch)?;
            self.count_arrival(&run);
        }
        for run in (plan.take & rights.writable).runs() {
            mover
                .state
                .revoked_all(PageMask::range(run.clone()), Some(id));
            mover.take(me, run.clone(), self.access, scratch)?;
            self.count_arrival(&run);
        }
        for run in (duplicate & rights.writable).runs() {
            mover.take(me, run.clone(), Access::Read, scratch)?;
            mover.share_home(me, run.clone())?;
            self.count_arrival(&run);
        }
        for run in plan.drop_host.runs() {
            count(&self.region.counters().collapsed_pages, run.len() as u64);
            mover.drop_host(run, scratch)?;
        }
        Ok(())
    }

    /// Gets a run from the windows of the devices that hold it.
    fn fetch_from_devices(
        &self,
        gate: &impl Inside,
        mover: &mut Mover<'_>,
        run: Pages<usize>,
        scratch: &mut Scratch,
    ) -> Result<(), Stall> {
        let me: &dyn AnyMapped = &**self.mapped;
        let mut at = run.start;
        while at < run.end {
            let others = || (0..crate::block::MAX_DEVICES).filter(|&d| d != self.id().index());
            let holder = others()
                .filter_map(|d| self.region.devices(gate)[d].as_deref())
                .find(|d| mover.state.frames(d.id()).contains(at));
            let Some(holder) = holder else {
                return Err(Stall::Lost(at));
            };
            let held = mover.state.frames(holder.id()) & PageMask::range(at..run.end);
            let part = at..held.run_around(at).end;
            match self.access {
                Access::Read => mover.copy_between(holder, me, part.clone(), scratch)?,
                Access::Write => {
                    let before = mover.state.resident(holder.id()).count();
                    let moved = mover.move_between(holder, me, part.clone(), scratch);
                    holder
                        .residency()
                        .release(before - mover.state.resident(holder.id()).count());
                    moved?;
                    mover
                        .state
                        .revoked_all(PageMask::range(part.clone()), Some(self.id()));
                }
            }
            self.count_arrival(&part);
            at = part.end;
        }
        Ok(())
    }

    fn count_arrival(&self, run: &Pages<usize>) {
        if run.is_empty() {
            return;
        }
        let demand = (PageMask::range(run.clone()) & self.want).count() as u64;
        self.mapped
            .counters()
            .to_device(self.cause, demand, run.len() as u64 - demand);
    }

    /// Whether everything that was wanted is valid.
    fn is_served(&self, valid: &Valid) -> bool {
        match self.access {
            Access::Read => valid.readable.contains_all(&self.want),
            Access::Write => valid.writable.contains_all(&self.want),
        }
    }

    fn valid(&self, state: &BlockState, want: PageMask, rights: &Rights) -> Valid {
        let in_place = match self.region.kind() {
            RegionKind::InPlace => want,
            RegionKind::Managed | RegionKind::Input => state.in_place() & (want - state.away()),
        } & rights.readable;
        let in_window = state.frames(self.id()) & want & (rights.readable - in_place);
        let writable = ((state.exclusive_to(self.id()) & in_window) | in_place) & rights.writable;
        Valid {
            block: self.block,
            readable: in_window | in_place,
            writable: if self.region.is_writable() {
                writable
            } else {
                PageMask::EMPTY
            },
            in_place,
        }
    }

    fn commit<T>(
        &self,
        state: &mut BlockState,
        valid: &Valid,
        commit: impl FnOnce(&Valid) -> T,
    ) -> T {
        const SLICE_NS: u64 = 10_000;
        const MAX_SHIFT: u32 = 12;
        self.mapped.touch(self.block);
        if self.attempt > 1 {
            state.lease().device_until_ns =
                clock::monotonic_ns() + (SLICE_NS << self.attempt.min(MAX_SHIFT));
        }
        if !valid.in_place.is_empty() {
            count(
                &AnyMapped::counters(&**self.mapped).in_place_pages,
                (valid.in_place & self.want).count() as u64,
            );
        }
        commit(valid)
    }

    /// A round on memory that nobody writes: copy what is not there yet.
    fn run_input<T>(
        &self,
        state: &mut BlockState,
        scratch: &mut Scratch,
        commit: impl FnOnce(&Valid) -> T,
    ) -> Outcome<T> {
        let id = self.id();
        let all = self.want | self.company();
        let fill = all - state.frames(id);
        let needed = (fill - state.resident(id)).count();
        if !self.mapped.residency().reserve(needed) {
            return Outcome::Full(needed);
        }
        let before = state.resident(id).count();
        let mut mover = Mover::new(self.region, self.block, state);
        // A release that stalled half-way has left stale pages.
        let mut stalled = mover.clear_junk(&**self.mapped, fill, scratch);
        for run in fill.runs() {
            if stalled.is_err() {
                break;
            }
            stalled = mover.fill_from_input(&**self.mapped, run.clone(), scratch);
            if stalled.is_ok() {
                self.count_arrival(&run);
            }
        }
        self.mapped
            .residency()
            .release(before + needed - state.resident(id).count());
        let valid = self.valid(
            state,
            all,
            &Rights::of(AddressSpace::global(), self.region, self.block, all),
        );
        if valid.readable.contains_all(&self.want) {
            return Outcome::Done(self.commit(state, &valid, commit));
        }
        match stalled {
            Ok(()) | Err(Stall::Changing) => Outcome::Again,
            Err(Stall::NoMemory) => Outcome::Fault(0, DeviceFaultKind::OutOfMemory),
            Err(Stall::Busy(page) | Stall::Refused(page) | Stall::Lost(page)) => {
                Outcome::Fault(page, DeviceFaultKind::Unmapped)
            }
        }
    }
}

/// What a movement that left wanted pages behind makes of its round.
fn stopped<T>(moved: Result<(), Stall>) -> Outcome<T> {
    match moved {
        Ok(()) | Err(Stall::Changing) => Outcome::Again,
        Err(Stall::NoMemory) => Outcome::Fault(0, DeviceFaultKind::OutOfMemory),
        Err(stall @ (Stall::Busy(page) | Stall::Refused(page) | Stall::Lost(page))) => {
            Outcome::Stuck(page, stall)
        }
    }
}

/// What an explicit migration does next with a block.
enum Migration {
    /// The other devices give up their copies of these pages, which the CPU has as well.
    Release(PageMask),
    /// A round on these pages.
    Run(PageMask, Access),
    /// Nothing, before this was seen to.
    Stop(Outcome<()>),
    /// Nothing more: what can move has moved.
    Done(Valid),
}

impl<D: Device> Round<'_, D> {
    /// The next step of migrating the wanted pages.
    fn next_migration(&self) -> Migration {
        let space = AddressSpace::global();
        let _gate = space.gate().enter();
        let state = self.region.lock_block(self.block);
        let rights = self.rights(space);
        if let Some((page, kind)) = rights.refusal(self.want, Access::Read) {
            return Migration::Stop(Outcome::Fault(page, kind));
        }
        if state.pending().intersects(&self.want) {
            return Migration::Stop(Outcome::Again);
        }
        let others = state.held_by_devices(Some(self.id()));
        let fixed =
            state.gone() | state.in_place() | ((others & state.away()) - state.frames(self.id()));
        let movable = match self.region.kind() {
            RegionKind::InPlace => PageMask::EMPTY,
            RegionKind::Managed | RegionKind::Input => {
                self.want & (self.region.body_mask(self.block) - fixed)
            }
        };
        let writable = if self.region.is_writable() {
            rights.writable
        } else {
            PageMask::EMPTY
        };
        let write = movable & (writable - state.exclusive_to(self.id()));
        let read = movable - writable - state.frames(self.id());
        let shared = (movable & others) - writable;
        if !shared.is_empty() {
            Migration::Release(shared)
        } else if !write.is_empty() {
            Migration::Run(write, Access::Write)
        } else if !read.is_empty() {
            Migration::Run(read, Access::Read)
        } else {
            Migration::Done(self.valid(
                &state,
                self.want & (self.servable() - state.gone()),
                &rights,
            ))
        }
    }
}

fn lease_of_cpu(state: &mut BlockState) -> Option<u64> {
    let until = state.lease().cpu_until_ns;
    (until != 0 && until > clock::monotonic_ns()).then_some(until)
}

impl<D: Device> Update<'_, D> {
    /// Makes the pages accessible to the device: moves or duplicates them. May serve some blocks and fail at a later one.
    ///
    /// # Errors
    /// The fault that ends the update.
    pub fn fault(&mut self, access: Access) -> Result<(), DeviceFault> {
        let mapped = self.mapped.clone();
        let region = mapped.shared_region();
        let fault = |page: usize, kind| {
            DeviceFault::new(region.base() + page * crate::addr::PAGE_SIZE, access, kind)
        };
        if access == Access::Write && !region.is_writable() {
            return Err(fault(self.pages.start, DeviceFaultKind::Protection));
        }
        if self.pages.len() > mapped.residency().capacity() && region.kind() != RegionKind::InPlace
        {
            // All of the pages are to be there at once.
            return Err(fault(self.pages.start, DeviceFaultKind::OutOfMemory));
        }
        count_round(&mapped, access);
        self.range.valid.clear();
        let (mut at, mut stuck, mut appetite) = (self.pages.start, None, Appetite::Granules);
        while at < self.pages.end {
            let block = at / PAGES_PER_BLOCK;
            let origin = block * PAGES_PER_BLOCK;
            let end = self.pages.end.min(origin + PAGES_PER_BLOCK);
            let (want, alone) = appetite.of(PageMask::range(at - origin..end - origin));
            if self.range.scratch.ensure(region.door()).is_err() {
                return Err(fault(at, DeviceFaultKind::OutOfMemory));
            }
            let key = Some(self.range.subscriptions[self.subscription].1.key());
            let round = Round {
                mapped: &mapped,
                region,
                block,
                want,
                access,
                key,
                attempt: 0,
                alone,
                cause: Cause::Demand,
            };
            let nr_whole = (self.pages.end - at) / PAGES_PER_BLOCK;
            if at == origin && nr_whole > 1 && !alone && region.options().huge_pages {
                let Range { scratch, valid, .. } = &mut *self.range;
                let nr_taken = round.take_blocks(nr_whole.min(MAX_BLOCKS_AT_ONCE), scratch, valid);
                if nr_taken > 0 {
                    at += nr_taken * PAGES_PER_BLOCK;
                    continue;
                }
            }
            match round.run(&mut self.range.scratch, Valid::clone) {
                Outcome::Done(valid) => {
                    self.range.valid.push(valid);
                    at += want.count();
                    stuck = None;
                }
                Outcome::NoFrames => appetite.refused(&round),
                other => {
                    self.range.between_rounds(
                        &round_info(&mapped, block, access),
                        other,
                        &mut stuck,
                    )?;
                }
            }
            if self.deadline.has_passed() {
                return Err(fault(at, DeviceFaultKind::Timeout));
            }
        }
        Ok(())
    }

    /// Moves the pages to device memory, whatever the policy says and without an access: the kernel's `migrate_vma`.
    ///
    /// What cannot move stays where it is: edges, pinned pages, memory of a kind that is served in place, and pages that are with
    /// another device alone. `end_update` then gives those pages as in place, or not at all. Read-only pages are duplicated: the
    /// kernel would not move them.
    ///
    /// # Errors
    /// A page is not mapped or permits no access, device memory is exhausted, or the deadline passed.
    pub fn migrate(&mut self) -> Result<(), DeviceFault> {
        let mapped = self.mapped.clone();
        let region = mapped.shared_region();
        let fault = |page: usize, kind| {
            DeviceFault::new(
                region.base() + page * crate::addr::PAGE_SIZE,
                Access::Read,
                kind,
            )
        };
        if self.pages.len() > mapped.residency().capacity() && region.kind() != RegionKind::InPlace
        {
            return Err(fault(self.pages.start, DeviceFaultKind::OutOfMemory));
        }
        self.range.valid.clear();
        let (mut at, mut stuck, mut appetite) = (self.pages.start, None, Appetite::Granules);
        while at < self.pages.end {
            let block = at / PAGES_PER_BLOCK;
            let origin = block * PAGES_PER_BLOCK;
            let end = self.pages.end.min(origin + PAGES_PER_BLOCK);
            let want = PageMask::range(at - origin..end - origin);
            if self.range.scratch.ensure(region.door()).is_err() {
                return Err(fault(at, DeviceFaultKind::OutOfMemory));
            }
            let key = Some(self.range.subscriptions[self.subscription].1.key());
            let (access, cause) = (Access::Read, Cause::Explicit);
            let round = Round {
                mapped: &mapped,
                region,
                block,
                want,
                access,
                key,
                attempt: 0,
                alone: true,
                cause,
            };
            let outcome = match round.next_migration() {
                Migration::Done(valid) => {
                    self.range.valid.push(valid);
                    at = end;
                    stuck = None;
                    continue;
                }
                Migration::Stop(outcome) => outcome,
                Migration::Release(pages) => {
                    self.release_others(&mapped, block, pages)
                        .map_err(|_| fault(at, DeviceFaultKind::Lost))?;
                    continue;
                }
                Migration::Run(want, access) => {
                    let round = Round {
                        want: appetite.of(want).0,
                        access,
                        ..round
                    };
                    match round.run(&mut self.range.scratch, |_| ()) {
                        Outcome::NoFrames => {
                            appetite.refused(&round);
                            continue;
                        }
                        Outcome::Done(()) => continue,
                        outcome => outcome,
                    }
                }
            };
            self.range.between_rounds(
                &round_info(&mapped, block, Access::Read),
                outcome,
                &mut stuck,
            )?;
            if self.deadline.has_passed() {
                return Err(fault(at, DeviceFaultKind::Timeout));
            }
        }
        Ok(())
    }

    /// Has the other devices give up what they hold of `pages`.
    fn release_others(
        &mut self,
        mapped: &MappedRef<D>,
        block: usize,
        pages: PageMask,
    ) -> Result<()> {
        let region = mapped.shared_region();
        for slot in (0..crate::block::MAX_DEVICES).filter(|&slot| slot != mapped.id().index()) {
            let other = region.devices(&AddressSpace::global().gate().enter())[slot].clone();
            if let Some(other) = other {
                evict::release_pages(
                    &*other,
                    region,
                    block,
                    pages,
                    &mut self.range.scratch,
                    Cause::Explicit,
                )?;
            }
        }
        Ok(())
    }

    /// What the device could access now without faulting anything in.
    pub fn snapshot(&mut self) {
        let mapped = self.mapped.clone();
        let region = mapped.shared_region();
        self.range.valid.clear();
        let mut at = self.pages.start;
        while at < self.pages.end {
            let block = at / PAGES_PER_BLOCK;
            let origin = block * PAGES_PER_BLOCK;
            let end = self.pages.end.min(origin + PAGES_PER_BLOCK);
            let want = PageMask::range(at - origin..end - origin);
            let round = Round {
                mapped: &mapped,
                region,
                block,
                want,
                access: Access::Read,
                key: None,
                attempt: 0,
                alone: true,
                cause: Cause::Explicit,
            };
            let want = want & round.servable();
            let space = AddressSpace::global();
            let _gate = space.gate().enter();
            let state = region.lock_block(block);
            self.range
                .valid
                .push(round.valid(&state, want - state.gone(), &round.rights(space)));
            at = end;
        }
    }

    /// Whether the update has been interrupted already. True is reliable; false is not, outside the device lock.
    #[must_use]
    pub fn needs_retry(&self) -> bool {
        self.range.subscriptions[self.subscription]
            .1
            .interrupted(self.token)
    }

    /// Ends the update: what `fault` or `snapshot` found is still true, and may be installed while `guard` lives.
    ///
    /// # Errors
    /// [`Interrupted`]: an invalidation of the range began meanwhile. Start over.
    ///
    /// # Panics
    /// If `guard` is not of this device's lock: the answer would mean nothing.
    pub fn end_update<'g>(self, guard: &'g DeviceGuard<'_>) -> Result<Committed<'g>, Interrupted>
    where
        Self: 'g,
    {
        assert!(
            guard.is_of(self.range.attached.device.lock()),
            "end_update needs the guard of its own device's lock"
        );
        if self.needs_retry() {
            count(&AnyMapped::counters(&*self.mapped.0).retries, 1);
            return Err(Interrupted);
        }
        Ok(Committed {
            valid: &self.range.valid,
        })
    }
}

/// What may be installed while the device lock's guard lives. See [`Update::end_update`].
#[derive(Debug)]
pub struct Committed<'g> {
    valid: &'g [Valid],
}

impl Deref for Committed<'_> {
    type Target = [Valid];
    fn deref(&self) -> &[Valid] {
        self.valid
    }
}

impl<D: Device> fmt::Debug for Range<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Range")
            .field("device", &self.attached.id)
            .finish_non_exhaustive()
    }
}

impl<D: Device> fmt::Debug for Update<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Update")
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}
