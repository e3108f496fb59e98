//! One round of a device fault on one block.
//!
//! 1. Enter the gate, lock the block: this is the block's round, and there is one at a time (hazards P2).
//! 2. If the pages are all the CPU's alone, or the device's window holds stale copies of them, the short ways of [`quick`] serve.
//!    Otherwise [`BlockState::plan`] says what has to change so that the device may do what it wants.
//! 3. Reserve device memory for what will be filled; if it is full, let go of everything and evict first.
//! 4. Open a bracket, invalidate the other holders, and wait for them as a CPU fault does.
//! 5. Move, one call per run.
//! 6. Commit, or remember what became valid; close the bracket; unlock.
//!
//! A round never waits for anything but locks: what it cannot go on without is its [`Outcome`], and [`crate::range`] sees to it
//! with nothing held.

mod quick;

use core::ops::Range as Pages;
use core::sync::atomic::Ordering;

use crate::block::{BlockState, DeviceId, Plan};
use crate::device::{Device, Invalidation, Keep};
use crate::error::{Access, DeviceFaultKind};
use crate::fault::{Flight, invalidate};
use crate::mapped::{AnyMapped, MappedRef};
use crate::mask::PageMask;
use crate::movement::{Mover, Stall};
use crate::notifier::RangeKey;
use crate::overrun::{self, Shot};
use crate::region::{Region, RegionKind};
use crate::rights::Rights;
use crate::scratch::Scratch;
use crate::space::{AddressSpace, Inside};
use crate::stats::{Cause, count};
use crate::sync::mutation::{Mutation, mutated};
use crate::sync::{GateGuard, MutexGuard};
use crate::sys::clock;

/// Pages of one block that a device may establish translations to, and with which rights.
///
/// It is the leave to do so, and exists for a device only while its lock is held: borrowed from what
/// [`Update::end_update`](crate::Update::end_update) returns, or as an argument of the callback of
/// [`Range::fault_in`](crate::Range::fault_in). So it can't be made, copied or kept; what it *says* can, by the masks, and is then no
/// more than a record of what was once so.
#[derive(Debug, PartialEq, Eq)]
pub struct Valid {
    block: usize,
    readable: PageMask,
    writable: PageMask,
    in_place: PageMask,
}

impl Valid {
    /// Another one: for the runtime, which hands it out under the device's lock alone.
    pub(crate) fn copy(&self) -> Self {
        Self { ..*self }
    }

    /// No page of no block: an entry that is not in use.
    pub(crate) fn nothing() -> Self {
        Self {
            block: 0,
            readable: PageMask::EMPTY,
            writable: PageMask::EMPTY,
            in_place: PageMask::EMPTY,
        }
    }

    /// A whole block in the window.
    #[inline]
    fn all_of(block: usize, is_writable: bool) -> Self {
        Self {
            block,
            readable: PageMask::FULL,
            writable: if is_writable {
                PageMask::FULL
            } else {
                PageMask::EMPTY
            },
            in_place: PageMask::EMPTY,
        }
    }

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

/// What a round came to.
pub(crate) enum Outcome<T> {
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

/// One device round on one block.
pub(crate) struct Round<'a, D: Device> {
    pub(crate) mapped: &'a MappedRef<D>,
    pub(crate) region: &'a Region,
    pub(crate) block: usize,
    pub(crate) want: PageMask,
    pub(crate) access: Access,
    pub(crate) key: Option<RangeKey>,
    pub(crate) attempt: u32,
    /// Whether only the wanted pages are to move, and nothing beside them.
    pub(crate) alone: bool,
    pub(crate) cause: Cause,
}

impl<D: Device> Round<'_, D> {
    pub(crate) fn id(&self) -> DeviceId {
        self.mapped.id()
    }

    /// Runs the round; `commit` sees what is valid, with the block locked.
    pub(crate) fn run<T>(
        &self,
        scratch: &mut Scratch,
        commit: impl FnOnce(&Valid) -> T,
    ) -> Outcome<T> {
        self.run_with(scratch, || Some(()), |valid, ()| commit(valid))
    }

    /// Runs the round. `begin` is called as soon as the block is locked; if it gives nothing, an invalidation is under way.
    pub(crate) fn run_with<T, B>(
        &self,
        scratch: &mut Scratch,
        begin: impl FnOnce() -> Option<B>,
        commit: impl FnOnce(&Valid, B) -> T,
    ) -> Outcome<T> {
        let space = AddressSpace::global();
        point!(RoundEntering, self.region.addr_of(self.block, 0));
        let gate = space.gate().enter();
        // SeqCst, with the grace period of `fork::prepare`: either this sees the flag, or prepare waits for this section.
        if AddressSpace::forking().load(Ordering::SeqCst) != 0 && !mutated(Mutation::ForkNotSeen) {
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
        point!(RoundLocked, self.region.addr_of(self.block, 0));
        if let Some(run) = self.one_run(&state) {
            if let Some(until) = lease_of_cpu(&mut state) {
                return Outcome::WaitUntil(until);
            }
            let mut valid = Valid::nothing();
            match self.take_run(&mut state, &run, scratch, &mut valid) {
                Ok(()) => {
                    self.note_served(&mut state, &valid);
                    return Outcome::Done(commit(&valid));
                }
                Err(Some(outcome)) => return outcome,
                // Not as plain as it looked: the mapping is protected, or of another kind.
                Err(None) => {}
            }
        }
        self.run_longer(space, gate, state, scratch, commit)
    }

    /// The round where [`one_run`](Self::one_run) does not apply. Not inlined, so that the code of the rounds where it does lies on few pages
    /// (docs/fault-cost.md).
    #[inline(never)]
    fn run_longer<T>(
        &self,
        space: &AddressSpace,
        gate: GateGuard<'_>,
        mut state: MutexGuard<'_, BlockState>,
        scratch: &mut Scratch,
        commit: impl FnOnce(&Valid) -> T,
    ) -> Outcome<T> {
        let is_whole =
            self.region.is_whole(self.block) && self.region.kind() != RegionKind::InPlace;
        if !is_whole && let Some(outside) = (self.want - self.servable()).first_from(0) {
            return Outcome::Fault(outside, DeviceFaultKind::OutOfViews);
        }
        if state.severed().intersects(&self.want)
            && overrun::lift(self.region, &gate, self.block, &mut state, self.want)
        {
            return Outcome::Again;
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
            point!(RoundWaiting, flight.region().addr_of(self.block, 0));
            if self.wait_for_others(space, flight.region(), &plan) == Shot::Severed {
                self.mapped.residency().release(needed);
                drop(bracket);
                return Outcome::Again;
            }
            let gate = space.gate().enter();
            let mut state = self.region.lock_block(self.block);
            // Eviction may have emptied stale pages meanwhile, which no plan shows: then more is needed than was reserved. Nor does
            // it show that the kernel has begun to discard wanted pages, or a pin to bring them home: taken now, they would be
            // taken with contents that are to be gone when the kernel's caller returns.
            let busy = state.pending() | state.pins_in_progress() | state.gone();
            let stop = self.is_over()
                || AddressSpace::forking().load(Ordering::SeqCst) != 0
                || (busy.intersects(&self.want) && !mutated(Mutation::WaitedWithoutLook));
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
        (self.region.is_closing() && !mutated(Mutation::CloseNotSeen))
            || self.mapped.attached().is_detached()
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
    pub(crate) fn servable(&self) -> PageMask {
        match self.region.kind() {
            RegionKind::InPlace => self.region.cover_mask(self.block),
            RegionKind::Managed | RegionKind::Input => self.region.body_mask(self.block),
        }
    }

    /// What the mappings permit of the wanted pages and those beside them.
    pub(crate) fn rights(&self, space: &AddressSpace) -> Rights {
        Rights::of(space, self.region, self.block, self.want | self.company())
    }

    /// Pages of a granule, cut down where device memory is small: a fault for one page must not claim more than a quarter of it.
    #[inline]
    fn granule(&self) -> usize {
        let quarter = (self.mapped.residency().capacity() / 4).max(1);
        self.region.granule().min(1 << quarter.ilog2())
    }

    /// The granules around the wanted pages.
    fn company(&self) -> PageMask {
        if self.alone {
            return PageMask::EMPTY;
        }
        let granules = self.want.grown(self.granule());
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
        if mutated(Mutation::RoundTellsNobody) {
            return true;
        }
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
        point!(RoundExcluding, self.region.addr_of(self.block, 0));
        over
    }

    fn wait_for_others(&self, space: &AddressSpace, region: &Region, plan: &Plan) -> Shot {
        let mut others = crate::block::DeviceSet::all();
        others = others.without(self.id());
        for inv in self
            .invalidations(plan)
            .iter()
            .filter(|inv| !inv.pages().is_empty())
        {
            if overrun::shoot_down(space, region, others, inv) == Shot::Severed {
                return Shot::Severed;
            }
        }
        Shot::Quiet
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
            let holder = holder.filter(|_| !mover.state.lost().contains(at));
            let Some(holder) = holder else {
                return Err(Stall::Lost(at));
            };
            let held = mover.state.frames(holder.id()) & PageMask::range(at..run.end);
            let held = held - mover.state.lost();
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

    pub(crate) fn valid(&self, state: &BlockState, want: PageMask, rights: &Rights) -> Valid {
        let in_place = match self.region.kind() {
            RegionKind::InPlace => want,
            // Not while a pin is still bringing them home: those who would have to be told of that are its holders alone.
            RegionKind::Managed | RegionKind::Input => {
                state.in_place() & (want - state.away() - state.pins_in_progress())
            }
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
        self.note_served(state, valid);
        commit(valid)
    }

    /// Before the commit: what is counted and remembered of a round that has come to its end.
    #[inline(always)]
    fn note_served(&self, state: &mut BlockState, valid: &Valid) {
        const SLICE_NS: u64 = 10_000;
        const MAX_SHIFT: u32 = 12;
        point!(RoundMoved, self.region.addr_of(self.block, 0));
        self.mapped.touch(self.block);
        if self.attempt > 1 {
            state.lease().device_until_ns =
                clock::monotonic_ns() + (SLICE_NS << self.attempt.min(MAX_SHIFT));
        }
        if !valid.in_place.is_empty() {
            self.count_in_place(valid);
        }
    }

    #[cold]
    fn count_in_place(&self, valid: &Valid) {
        let nr_pages = (valid.in_place & self.want).count();
        let counters = AnyMapped::counters(&**self.mapped);
        count(&counters.in_place_pages, nr_pages as u64);
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
        let fill = all - state.frames(id) - state.in_place();
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

#[inline]
fn lease_of_cpu(state: &mut BlockState) -> Option<u64> {
    let until = state.lease().cpu_until_ns;
    (until != 0 && until > clock::monotonic_ns()).then_some(until)
}
