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
//!     update.end_update_mapped(mapper, install)                the same for a device that maps pages first, and undoes that
//! ```
//!
//! [`Range::fault_in`] is the whole loop for pages of one block, and what a worker's far fault calls. It differs in one
//! thing: it takes its token and commits *inside* the block's round, so that only changes made behind the runtime's back can
//! interrupt it, and a storm of our own invalidations cannot starve a fault (protocol.md section 5).

mod dma;
mod migrate;

pub use dma::{NotMapped, PageMapper};

use core::fmt;
use core::ops::{Deref, Range as Pages};
use core::time::Duration;

use crate::addr::{PAGES_PER_BLOCK, PageRange};
use crate::attachment::Attached;
use crate::device::{Device, DeviceGuard};
use crate::error::{Access, DeviceFault, DeviceFaultKind, Result};
use crate::evict;
use crate::mapped::{AnyMapped, Mapped, MappedRef};
use crate::mask::PageMask;
use crate::movement::Stall;
use crate::notifier::{BeginError, Hub, NoMemory, Subscription, Token};
use crate::pin;
use crate::region::{Region, RegionKind};
use crate::round::{Outcome, Round, Valid};
use crate::scratch::Scratch;
use crate::space::AddressSpace;
use crate::stats::{Cause, count};
use crate::sync::Deadline;
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::arc::MapArc;
use crate::sys::mmap::{self, Advice};
use crate::sys::{clock, process};

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
    /// Updates interrupted since the last one that was not.
    interruptions: u32,
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

impl<D: Device> Range<D> {
    pub(crate) fn new(attached: MapArc<Attached<D>>) -> Result<Self> {
        let scratch = Scratch::new(AddressSpace::get("range")?)?;
        Ok(Self {
            attached,
            subscriptions: Vec::new(),
            scratch,
            valid: Vec::new(),
            interruptions: 0,
        })
    }

    /// Begins an update of the pages `pages` (indices from the region's base): waits until no invalidation overlaps them.
    ///
    /// # Errors
    /// [`DeviceFaultKind::Timeout`] if overlapping invalidations did not end in time; [`DeviceFaultKind::OutOfViews`] if pages lie
    /// outside the region. A *collision* is no error here: it shows in `end_update`.
    pub fn start_update(
        &mut self,
        mapped: &MappedRef<D>,
        pages: Pages<usize>,
        timeout: Duration,
    ) -> Result<Update<'_, D>, DeviceFault> {
        let deadline = Deadline::after(timeout);
        let region = mapped.shared_region();
        check_pages(region, &pages, Access::Read)?;
        let pages = pages.start..pages.end.max(pages.start);
        let addr = region.base() + pages.start * crate::addr::PAGE_SIZE;
        if region.door().is_disowned() {
            return Err(DeviceFault::new(
                addr,
                Access::Read,
                DeviceFaultKind::Forked,
            ));
        }
        let covered = covered_by_granules(region, &pages);
        let at = self
            .subscription(region)
            .map_err(|kind| DeviceFault::new(addr, Access::Read, kind))?;
        let (_, subscription) = &mut self.subscriptions[at];
        let token = subscription
            .begin_at(interval_of(region, &covered), deadline)
            .map_err(|e| DeviceFault::new(addr, Access::Read, kind_of(e)))?;
        let nr_blocks = covered.end.div_ceil(PAGES_PER_BLOCK) - covered.start / PAGES_PER_BLOCK;
        self.valid.clear();
        self.valid.reserve(nr_blocks);
        point!(UpdateBegun, addr);
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
        check_pages(region, &pages, access)?;
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
        let at = self.subscription(region).map_err(fault)?;
        let covered = interval_of(region, &covered_by_granules(region, &pages));
        // Set at the first wait: a round that has nothing to wait for does not ask what time it is.
        let mut deadline = None;
        let mut retries = 0;
        let (mut stuck, mut appetite, mut rest) = (None, Appetite::Granules, want);
        let mut is_first = true;
        loop {
            let subscription = &mut self.subscriptions[at].1;
            // Waits here, where nothing is held, if there was something to wait for. The token that counts is taken under the
            // block's lock, under which every change of ours starts its bracket: so nothing of ours can come between it and
            // the commit.
            if !core::mem::take(&mut is_first) {
                let until = *deadline.get_or_insert_with(|| Deadline::after(timeout));
                let _ = subscription
                    .begin_at(covered, until)
                    .map_err(|e| fault(kind_of(e)))?;
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
            // Points the range at the pages and begins, under one hold of the hub's lock.
            let begin = move || {
                let range = subscription;
                let token = range.begin_at(covered, Deadline::PASSED).ok()?;
                Some((token, &*range))
            };
            let outcome = round.run_with(&mut self.scratch, begin, |valid, (token, range)| {
                let device = &self.attached.device;
                let guard = device.lock().lock();
                point!(RoundCommitting, addr);
                if range.interrupted(token) && !mutated(Mutation::CommitWithoutCheck) {
                    return Err(Interrupted);
                }
                install(valid, &guard);
                point!(RoundCommitted, addr);
                Ok(())
            });
            match outcome {
                Outcome::Done(Ok(())) if !alone || rest == want => return Ok(()),
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

    /// What an update tells its rounds of the tries before it: nothing until interruptions are no accident any more, and then enough to
    /// earn the pages a lease that doubles with each (protocol.md section 5). What the kernel changes no lease keeps out.
    fn attempt(&self) -> u32 {
        const ACCIDENTS: u32 = 8;
        if self.interruptions < ACCIDENTS {
            0
        } else {
            self.interruptions
        }
    }

    /// The subscription to `region`'s hub, made on first use.
    fn subscription(&mut self, region: &MapArc<Region>) -> Result<usize, DeviceFaultKind> {
        if let Some(at) = self
            .subscriptions
            .iter()
            .position(|(id, _)| *id == region.id())
        {
            return Ok(at);
        }
        const KEPT: usize = 16;
        if self.subscriptions.len() >= KEPT {
            drop(self.subscriptions.remove(0));
        }
        let whole = crate::notifier::Interval::new(region.base() as u64, region.base() as u64 + 1);
        let subscription = Subscription::try_insert(HubOf(region.clone()), whole)
            .map_err(|NoMemory| DeviceFaultKind::OutOfMemory)?;
        self.subscriptions.push((region.id(), subscription));
        Ok(self.subscriptions.len() - 1)
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
        stuck: &mut Option<(usize, u32)>,
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
                let times = match *stuck {
                    Some((at, times)) if at == page => times + 1,
                    _ => 0,
                };
                *stuck = Some((page, times));
                unstick(region, info, page, stall, times).map_err(|kind| fault(page, kind))?;
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

/// The kernel refused to move `page`. First break a sharing with other processes (hazards M3); if it is refused again and again, look
/// whether the mapping permits the access at all, and if so serve the page in place from now on.
fn unstick<D: Device>(
    region: &Region,
    info: &RoundInfo<'_, D>,
    page: usize,
    stall: Stall,
    times: u32,
) -> Result<(), DeviceFaultKind> {
    let addr = region.addr_of(info.block, page);
    if let Stall::Lost(_) = stall {
        return Err(DeviceFaultKind::Lost);
    }
    // Unmapped or protected since the round began; and it may be a page beside those that are wanted, whose affair that is not. The
    // next round looks anew, leaves such neighbours out, and says of the others what it is.
    let vma = AddressSpace::global().vma(addr);
    let Some(vma) = vma.filter(|v| v.readable && (v.writable || info.access == Access::Read))
    else {
        process::sched_yield();
        return Ok(());
    };
    // Where processes fork all the time a page may be shared again before it has moved; one pinned for DMA stays as it is.
    const MAX_BROKEN: u32 = 8;
    if times < MAX_BROKEN && vma.writable && matches!(stall, Stall::Busy(_)) {
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

/// Whether the pages are the region's at all.
fn check_pages(region: &Region, pages: &Pages<usize>, access: Access) -> Result<(), DeviceFault> {
    let end = region.nr_blocks() * PAGES_PER_BLOCK;
    if pages.start.max(pages.end) <= end {
        return Ok(());
    }
    let addr = region.base() + pages.start.min(end) * crate::addr::PAGE_SIZE;
    Err(DeviceFault::new(addr, access, DeviceFaultKind::OutOfViews))
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
                attempt: self.range.attempt(),
                alone,
                cause: Cause::Demand,
            };
            let nr_whole = (self.pages.end - at) / PAGES_PER_BLOCK;
            if at == origin && nr_whole > 1 && !alone && region.options().huge_pages {
                let Range { scratch, valid, .. } = &mut *self.range;
                let nr_taken = round.take_blocks(nr_whole, scratch, valid);
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
                    continue;
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
        point!(UpdateFaulted, region.addr());
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
        point!(UpdateEnding, self.mapped.shared_region().addr());
        if self.needs_retry() && !mutated(Mutation::CommitWithoutCheck) {
            count(&AnyMapped::counters(&*self.mapped.0).retries, 1);
            self.range.interruptions = self.range.interruptions.saturating_add(1);
            return Err(Interrupted);
        }
        self.range.interruptions = 0;
        point!(UpdateEnded, self.mapped.shared_region().addr());
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
