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
//! [`Range::fault_in`] is the whole loop, and what a worker's far fault calls. It differs in one
//! thing: block by block it takes its token and commits *inside* the block's round, so that only changes made behind the runtime's back can
//! interrupt it, and a storm of our own invalidations cannot starve a fault (protocol.md section 5).

mod dma;
mod migrate;
mod valid_list;

pub use dma::{NotMapped, PageMapper};
pub(crate) use valid_list::ValidList;

use core::fmt;
use core::ops::{Deref, Range as Pages};
use core::time::Duration;

use crate::addr::{PAGE_SIZE, PAGES_PER_BLOCK, PageRange};
use crate::attachment::Attached;
use crate::device::{Device, DeviceGuard};
use crate::error::{Access, DeviceFault, DeviceFaultKind, Error, ErrorKind, Result};
use crate::evict;
use crate::mapped::{AnyMapped, Mapped, MappedRef};
use crate::mask::PageMask;
use crate::movement::Stall;
use crate::notifier::{BeginError, Hub, NoMemory, Subscription, Token};
use crate::pin::{self, Meanwhile};
use crate::region::{Region, RegionKind};
use crate::round::{Outcome, Round, Valid};
use crate::scratch::Scratch;
use crate::space::AddressSpace;
use crate::stats::{Cause, count};
use crate::sync::Deadline;
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::arc::MapArc;
use crate::sys::mmap::{self, Advice, MapBox};
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
    /// In a mapping of its own (hazards W6): a round uses it with its block and the device locked.
    state: MapBox<State<D>>,
}

/// What a [`Range`] is.
struct State<D: Device> {
    attached: MapArc<Attached<D>>,
    /// To the hubs of the regions it has worked on last.
    subscriptions: [Option<Subscribed>; KEPT],
    /// The one that makes room for the next.
    oldest: usize,
    scratch: Scratch,
    valid: ValidList,
    /// Updates interrupted since the last one that was not.
    interruptions: u32,
}

/// Regions whose hubs a range knows.
const KEPT: usize = 16;

struct Subscribed {
    /// The region's number.
    region: u64,
    subscription: Subscription<HubOf>,
}

/// An update in progress: the critical section between `start_update` and `end_update`.
pub struct Update<'r, D: Device> {
    range: &'r mut State<D>,
    mapped: MappedRef<D>,
    subscription: usize,
    pages: Pages<usize>,
    token: Token,
    patience: Patience,
}

/// How long a fault goes on without progress: its timeout, counted from its first wait, and anew after each progress (protocol.md
/// section 5). Who has nothing to wait for does not ask what time it is.
#[derive(Clone, Copy, Debug)]
struct Patience {
    timeout: Duration,
    until: Option<Deadline>,
}

impl Patience {
    fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            until: None,
        }
    }

    fn until(&mut self) -> Deadline {
        let timeout = self.timeout;
        *self.until.get_or_insert_with(|| Deadline::after(timeout))
    }

    /// Whether the fault may go on, after a step that came to `progress`.
    fn lasts(&mut self, progress: Progress) -> bool {
        if progress == Progress::Made {
            self.until = None;
            return true;
        }
        !self.until().has_passed()
    }
}

impl<D: Device> Range<D> {
    pub(crate) fn new(attached: MapArc<Attached<D>>) -> Result<Self> {
        let scratch = Scratch::new(AddressSpace::get("range")?)?;
        let no_memory = |errno| Error::new("range", ErrorKind::OutOfMemory).errno(errno);
        let state = State {
            attached,
            subscriptions: [const { None }; KEPT],
            oldest: 0,
            scratch,
            valid: ValidList::new().map_err(no_memory)?,
            interruptions: 0,
        };
        let state =
            MapBox::new(state).map_err(|e| no_memory(e.raw_os_error().unwrap_or(libc::ENOMEM)))?;
        Ok(Self { state })
    }

    /// Begins an update of the pages `pages` (indices from the region's base): waits until no invalidation overlaps them. `timeout` is
    /// for this wait, and then for each step of the update: it is counted anew whenever progress was made.
    ///
    /// # Errors
    /// [`DeviceFaultKind::Timeout`] if overlapping invalidations did not end in time; [`DeviceFaultKind::OutOfViews`] if pages lie
    /// outside the region. A *collision* is no error here: it shows in `end_update`.
    ///
    /// # Panics
    /// If `mapped` is of another attachment, under whose lock nothing would be decided.
    pub fn start_update(
        &mut self,
        mapped: &MappedRef<D>,
        pages: Pages<usize>,
        timeout: Duration,
    ) -> Result<Update<'_, D>, DeviceFault> {
        self.state.start_update(mapped, pages, timeout)
    }

    /// Faults `pages` (indices from the region's base) in for `access` and hands what became valid to `install`, under the device lock.
    /// The whole loop, with retries, eviction and a deadline that starts anew with each progress. `attempt` counts the tries of an access
    /// that needs several ranges at once: it earns the pages a lease.
    ///
    /// More than was asked for may become valid: a granule moves as a whole. It goes block by block, in order, and `install` is called at
    /// least once for each; between two the lock is free, so that what the first was given may be taken away before the last is there.
    /// A device that must have all of a range at once begins an [`Update`].
    ///
    /// # Errors
    /// The fault that ends the access. What was installed before it stays until it is invalidated.
    ///
    /// # Panics
    /// If `mapped` is of another attachment: a bug of the device.
    pub fn fault_in(
        &mut self,
        mapped: &MappedRef<D>,
        pages: Pages<usize>,
        access: Access,
        attempt: u32,
        timeout: Duration,
        mut install: impl FnMut(&Valid, &DeviceGuard<'_>),
    ) -> Result<(), DeviceFault> {
        let state = &mut *self.state;
        state.check_is_ours(mapped);
        check_pages(mapped.shared_region(), &pages, access)?;
        let mut at = pages.start;
        while at < pages.end {
            let end = pages.end.min((at / PAGES_PER_BLOCK + 1) * PAGES_PER_BLOCK);
            state.fault_in_block(mapped, at..end, access, attempt, timeout, &mut install)?;
            at = end;
        }
        Ok(())
    }

    /// Lets go of what this range keeps of regions, so that they can be freed. For when a launch has ended.
    pub fn park(&mut self) {
        self.state.park();
    }
}

impl<D: Device> State<D> {
    fn check_is_ours(&self, mapped: &MappedRef<D>) {
        assert!(
            core::ptr::eq(&raw const *self.attached, &raw const **mapped.attached()),
            "a range serves the regions that its own attachment has mapped"
        );
    }

    /// [`Range::start_update`].
    fn start_update(
        &mut self,
        mapped: &MappedRef<D>,
        pages: Pages<usize>,
        timeout: Duration,
    ) -> Result<Update<'_, D>, DeviceFault> {
        self.check_is_ours(mapped);
        let mut patience = Patience::new(timeout);
        let region = mapped.shared_region();
        check_pages(region, &pages, Access::Read)?;
        let pages = pages.start..pages.end.max(pages.start);
        let addr = region.base() + pages.start * PAGE_SIZE;
        if self.attached.is_forked() || region.door().is_disowned() {
            let kind = DeviceFaultKind::Forked;
            return Err(DeviceFault::new(addr, Access::Read, kind));
        }
        let covered = covered_by_granules(region, &pages);
        let at = self
            .subscription(region)
            .map_err(|kind| DeviceFault::new(addr, Access::Read, kind))?;
        let token = self
            .subscribed(at)
            .begin_at(interval_of(region, &covered), patience.until())
            .map_err(|e| DeviceFault::new(addr, Access::Read, kind_of(e)))?;
        let nr_blocks = covered.end.div_ceil(PAGES_PER_BLOCK) - covered.start / PAGES_PER_BLOCK;
        self.valid.clear();
        let no_memory = |_errno| DeviceFault::new(addr, Access::Read, DeviceFaultKind::OutOfMemory);
        self.valid.reserve(nr_blocks).map_err(no_memory)?;
        point!(UpdateBegun, addr);
        Ok(Update {
            range: self,
            mapped: mapped.clone(),
            subscription: at,
            pages,
            token,
            patience,
        })
    }

    /// [`Range::fault_in`], of pages of one block.
    fn fault_in_block(
        &mut self,
        mapped: &MappedRef<D>,
        pages: Pages<usize>,
        access: Access,
        attempt: u32,
        timeout: Duration,
        install: &mut impl FnMut(&Valid, &DeviceGuard<'_>),
    ) -> Result<(), DeviceFault> {
        let block = pages.start / PAGES_PER_BLOCK;
        let region = mapped.shared_region();
        let addr = region.base() + pages.start * PAGE_SIZE;
        let fault = |kind| DeviceFault::new(addr, access, kind);
        if self.attached.is_forked() || region.door().is_disowned() {
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
        let mut patience = Patience::new(timeout);
        let mut retries = 0;
        let (mut stuck, mut appetite, mut rest) = (None, Appetite::Granules, want);
        let mut is_first = true;
        loop {
            let Some(Subscribed { subscription, .. }) = &mut self.subscriptions[at] else {
                unreachable!("a range has let go of the region that it works on");
            };
            // Waits here, where nothing is held, if there was something to wait for. The token that counts is taken under the
            // block's lock, under which every change of ours starts its bracket: so nothing of ours can come between it and
            // the commit.
            if !core::mem::take(&mut is_first) {
                let _ = subscription
                    .begin_at(covered, patience.until())
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
            let progress = match outcome {
                Outcome::Done(Ok(())) if !alone || rest == want => return Ok(()),
                Outcome::Done(Ok(())) => {
                    rest -= want;
                    Progress::Made
                }
                Outcome::NoFrames => appetite.refused(&round),
                // An interruption alone is no progress (protocol.md section 5).
                Outcome::Done(Err(Interrupted)) => {
                    count(&mapped.counters().retries, 1);
                    retries += 1;
                    Progress::None
                }
                other => {
                    self.between_rounds(&round_info(mapped, block, access), other, &mut stuck)?
                }
            };
            if !patience.lasts(progress) {
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
        let is_of = |known: &Option<Subscribed>| {
            known
                .as_ref()
                .is_some_and(|known| known.region == region.id())
        };
        if let Some(at) = self.subscriptions.iter().position(is_of) {
            return Ok(at);
        }
        let whole = crate::notifier::Interval::new(region.base() as u64, region.base() as u64 + 1);
        let subscription = Subscription::try_insert(HubOf(region.clone()), whole)
            .map_err(|NoMemory| DeviceFaultKind::OutOfMemory)?;
        let at = self.oldest;
        self.oldest = (at + 1) % KEPT;
        self.subscriptions[at] = Some(Subscribed {
            region: region.id(),
            subscription,
        });
        Ok(at)
    }

    /// What [`subscription`](Self::subscription) has found, and nothing has replaced since.
    fn subscribed(&mut self, at: usize) -> &mut Subscription<HubOf> {
        match &mut self.subscriptions[at] {
            Some(known) => &mut known.subscription,
            None => unreachable!("a range has let go of the region that it works on"),
        }
    }

    fn park(&mut self) {
        for known in &mut self.subscriptions {
            let known = known.take();
            if self.attached.is_forked() {
                // The hub is the parent's, and somebody there may hold its lock.
                core::mem::forget(known);
            }
        }
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
                // What does not help after so many times will not.
                Ok(if times <= MAX_BROKEN {
                    Progress::Made
                } else {
                    process::sched_yield();
                    Progress::None
                })
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
    #[inline]
    fn of(self, want: PageMask) -> (PageMask, bool) {
        match (self, want.first_from(0)) {
            (Self::Page, Some(page)) => (PageMask::page(page), true),
            _ => (want, false),
        }
    }

    /// After a refusal: less. A page that the device has no memory for stays with the CPU, and is served in place; one that another
    /// device has cannot be, and is asked for until there is memory, or the time is over.
    fn refused<D: Device>(&mut self, round: &Round<'_, D>) -> Progress {
        if *self == Self::Page {
            {
                let _gate = AddressSpace::global().gate().enter();
                round
                    .region
                    .lock_block(round.block)
                    .set_unmovable(round.want);
            }
            process::sched_yield();
            return Progress::None;
        }
        *self = Self::Page;
        Progress::Made
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

/// How often a sharing is broken for one page: where processes fork all the time it may be shared again before it has moved; one pinned
/// for DMA stays as it is.
const MAX_BROKEN: u32 = 8;

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
    if times < MAX_BROKEN && vma.writable && matches!(stall, Stall::Busy(_)) {
        // The neighbours were shared by the same fork, most likely: all at once, not one fault each. Unless one of them is gone.
        let granule = region.granule() * PAGE_SIZE;
        let around = PageRange::containing(addr & !(granule - 1), granule);
        let page = PageRange::containing(addr, 1);
        let is_broken = [around, page].into_iter().flatten().any(|pages| {
            let ours = pages
                .intersect(vma.range)
                .and_then(|p| p.intersect(region.body()?));
            // Pinned meanwhile: home and un-protected, or the write that breaks the sharing would itself fault.
            ours.is_some_and(|pages| {
                let populate = || drop(mmap::advise(pages, Advice::PopulateWrite));
                pin::with_pinned(region, pages, Meanwhile::Wait, populate).is_ok()
            })
        });
        if !is_broken {
            process::sched_yield();
        }
        return Ok(());
    }
    if times == 0 || AddressSpace::global().is_changing() {
        // Refused while a mapping was changing, perhaps.
        process::sched_yield();
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
    if own.is_none_or(|pages| pin::with_pinned(region, pages, Meanwhile::Wait, mark).is_err()) {
        mark();
    }
    Ok(())
}

/// Whether the pages are the region's at all.
#[inline]
fn check_pages(region: &Region, pages: &Pages<usize>, access: Access) -> Result<(), DeviceFault> {
    let end = region.nr_blocks() * PAGES_PER_BLOCK;
    if pages.start.max(pages.end) <= end {
        return Ok(());
    }
    let addr = region.base() + pages.start.min(end) * PAGE_SIZE;
    Err(DeviceFault::new(addr, access, DeviceFaultKind::OutOfViews))
}

/// The pages that granules around `pages` cover: what may become valid by faulting `pages` in.
fn covered_by_granules(region: &Region, pages: &Pages<usize>) -> Pages<usize> {
    let granule = region.granule();
    pages.start & !(granule - 1)..pages.end.next_multiple_of(granule)
}

fn interval_of(region: &Region, pages: &Pages<usize>) -> crate::notifier::Interval {
    let at = |page: usize| (region.base() + page * PAGE_SIZE) as u64;
    crate::notifier::Interval::new(at(pages.start), at(pages.end))
}

impl<D: Device> Update<'_, D> {
    /// Makes the pages accessible to the device: moves or duplicates them. May serve some blocks and fail at a later one. The timeout of
    /// the update starts anew with each progress.
    ///
    /// # Errors
    /// The fault that ends the update.
    pub fn fault(&mut self, access: Access) -> Result<(), DeviceFault> {
        let mapped = self.mapped.clone();
        let region = mapped.shared_region();
        let fault =
            |page: usize, kind| DeviceFault::new(region.base() + page * PAGE_SIZE, access, kind);
        if self.is_forked() {
            return Err(fault(self.pages.start, DeviceFaultKind::Forked));
        }
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
            let nr_left = (self.pages.end - at).div_ceil(PAGES_PER_BLOCK) + 1;
            if self.range.scratch.ensure(region.door()).is_err()
                || self.range.valid.reserve(nr_left).is_err()
            {
                return Err(fault(at, DeviceFaultKind::OutOfMemory));
            }
            let key = Some(self.range.subscribed(self.subscription).key());
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
                let State { scratch, valid, .. } = &mut *self.range;
                let nr_taken = round.take_blocks(nr_whole, scratch, valid);
                if nr_taken > 0 {
                    at += nr_taken * PAGES_PER_BLOCK;
                    self.patience.lasts(Progress::Made);
                    continue;
                }
            }
            let progress = match round.run(&mut self.range.scratch, Valid::copy) {
                Outcome::Done(valid) => {
                    self.range.valid.push(valid);
                    at += want.count();
                    stuck = None;
                    Progress::Made
                }
                Outcome::NoFrames => appetite.refused(&round),
                other => {
                    let info = round_info(&mapped, block, access);
                    self.range.between_rounds(&info, other, &mut stuck)?
                }
            };
            if !self.patience.lasts(progress) {
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
        if self.is_forked() {
            return;
        }
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
        let known = self.range.subscriptions[self.subscription].as_ref();
        let is_good = known.is_some_and(|known| !known.subscription.interrupted(self.token));
        self.is_forked() || !is_good
    }

    /// Whether a fork came between: the update was begun in the parent.
    fn is_forked(&self) -> bool {
        self.range.attached.is_forked()
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

impl<D: Device> Drop for State<D> {
    fn drop(&mut self) {
        self.park();
    }
}

impl<D: Device> fmt::Debug for Range<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Range")
            .field("device", &self.state.attached.id)
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
