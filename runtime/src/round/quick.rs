//! The short ways of a [`Round`]: pages that are the CPU's alone, pages that the device held before, and many whole blocks at
//! once. Each does what the planned round would do, for the directory shows that nobody else has to be told.

use core::sync::atomic::Ordering;

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PAGES_PER_BLOCK};
use crate::block::{BlockState, OnRead};
use crate::device::Device;
use crate::error::Access;
use crate::mapped::AnyMapped;
use crate::mask::{PageMask, grow_word};
use crate::movement::{Mover, Stall};
use crate::range::ValidList;
use crate::region::RegionKind;
use crate::round::{Outcome, Round, Valid, lease_of_cpu, stopped};
use crate::scratch::Scratch;
use crate::space::AddressSpace;
use crate::stats::count;
use crate::sync::mutation::{Mutation, mutated};

/// One run of pages that are all the CPU's alone.
pub(super) struct Run {
    pages: core::ops::Range<usize>,
    /// Where they lie in one word of the block's masks, that and their bits there; else they are the whole block.
    word: Option<(usize, u64)>,
}

impl<D: Device> Round<'_, D> {
    /// [`plain`](Self::plain) for a granule that is one run, and either lies in one word of the masks, as up to 256 KiB do, or is a
    /// block in which no device has anything. What a fault costs beside its system call is, for the most part, fetching the code
    /// that makes it: this is a tenth of the code. It is inlined so that it lies together as well: after the move of a huge page every
    /// page of code is one more walk of the page tables (docs/fault-cost.md).
    #[inline(always)]
    pub(super) fn one_run(&self, state: &BlockState) -> Option<Run> {
        let moves = self.access == Access::Write || self.region.on_read() == OnRead::Migrate;
        let is_managed = self.region.kind() == RegionKind::Managed;
        // As in `plain`; and opaque memory is filled from the window, run by run.
        let may_move = moves && is_managed && self.region.door().has_move();
        if !may_move || self.mapped.is_opaque() {
            return None;
        }
        let granule = if self.alone { 1 } else { self.granule() };
        if granule == PAGES_PER_BLOCK && self.region.is_whole(self.block) {
            return state.is_at_rest().then_some(Run {
                pages: 0..PAGES_PER_BLOCK,
                word: None,
            });
        }
        let (word, want) = self.want.as_word()?;
        if granule > 64 {
            return None;
        }
        let addr = |bit: u32| self.region.addr_of(self.block, word * 64 + bit as usize);
        let ends = |bits: u64| (bits.trailing_zeros(), 64 - bits.leading_zeros());
        let body = self.region.body()?;
        let mut bits = grow_word(want, granule);
        let (mut low, mut high) = ends(bits);
        if addr(low) < body.start() || addr(high) > body.end() {
            bits &= self.region.body_mask(self.block).word(word);
            (low, high) = ends(bits);
        }
        let is_one_run = high.saturating_sub(low) == bits.count_ones();
        if want & !bits != 0 || !is_one_run || !state.is_plain_word(self.id(), word, bits) {
            return None;
        }
        Some(Run {
            pages: word * 64 + low as usize..word * 64 + high as usize,
            word: Some((word, bits)),
        })
    }

    /// [`take_plain`](Self::take_plain) for such pages: writes to `valid`, which had nothing, what it comes to.
    #[inline(always)]
    pub(super) fn take_run<T>(
        &self,
        state: &mut BlockState,
        run: &Run,
        scratch: &mut Scratch,
        valid: &mut Valid,
    ) -> Result<(), Option<Outcome<T>>> {
        debug_assert_eq!(*valid, Valid::nothing());
        let (run, word, needed) = (run.pages.clone(), run.word, run.pages.len());
        let residency = self.mapped.residency();
        if residency.take_failure() {
            return Err(Some(Outcome::NoFrames));
        }
        if !residency.reserve(needed) {
            return Err(Some(Outcome::Full(needed)));
        }
        let interval = self.region.interval(self.block, run.clone());
        let Ok(_bracket) = self.region.hub().start(interval, self.key) else {
            residency.release(needed);
            return Err(Some(Outcome::Again));
        };
        count(&self.region.counters().move_calls, 1);
        let moved = self.region.door().move_pages(
            self.mapped.window().addr_of(self.block, run.start),
            self.region.addr_of(self.block, run.start),
            needed * PAGE_SIZE,
        );
        let nr_moved = moved.bytes / PAGE_SIZE;
        if nr_moved < needed {
            *valid = self.take_rest(state, run, nr_moved, scratch)?;
            return Ok(());
        }
        let demand = match word {
            Some((word, bits)) => {
                state.moved_out_word(self.id(), word, bits);
                valid.readable.insert_word(word, bits);
                self.want.word(word).count_ones() as usize
            }
            None => {
                state.moved_out_whole(self.id());
                valid.readable = PageMask::FULL;
                self.want.count()
            }
        };
        debug_assert!(
            state.is_consistent(),
            "the directory lost a holder: {state:?}"
        );
        valid.block = self.block;
        if self.region.is_writable() {
            valid.writable = valid.readable;
        }
        self.mapped
            .counters()
            .to_device(self.cause, demand as u64, (needed - demand) as u64);
        Ok(())
    }

    /// Of `run` the first `nr_moved` pages have moved, and then the kernel stopped: finds out why, page by page, under the same
    /// hold of the lock (D4). The bracket is open.
    #[cold]
    fn take_rest<T>(
        &self,
        state: &mut BlockState,
        run: core::ops::Range<usize>,
        nr_moved: usize,
        scratch: &mut Scratch,
    ) -> Result<Valid, Option<Outcome<T>>> {
        let stopped_at = run.start + nr_moved;
        if nr_moved > 0 {
            state.moved_out(self.id(), PageMask::range(run.start..stopped_at));
        }
        let pages = PageMask::range(run.clone());
        let mut mover = Mover::new(self.region, self.block, state);
        let moved = mover.take(&**self.mapped, stopped_at..run.end, self.access, scratch);
        if moved.is_ok() {
            self.count_arrival(&run);
        }
        self.served(state, pages, moved)
    }

    /// The wanted pages and what lies beside them, if they are all the CPU's alone and are to move: the most frequent round by
    /// far. It goes without a plan.
    pub(super) fn plain(&self, state: &BlockState) -> Option<PageMask> {
        // Without MOVE nothing else would look at the mapping's protection.
        if !self.region.door().has_move() {
            return None;
        }
        let moves = self.access == Access::Write || self.region.on_read() == OnRead::Migrate;
        if !moves || self.region.kind() != RegionKind::Managed {
            return None;
        }
        let pages = self.want | self.company();
        let plain = state.is_plain_for(self.id(), &pages) || mutated(Mutation::MovesAgain);
        plain.then_some(pages)
    }

    /// The round on such pages: nobody is to be told, so the bracket is there for ranges alone. `Err(None)` if the kernel would not
    /// move them: they are not what they seemed, and the round is to be planned.
    pub(super) fn take_plain<T>(
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
        self.served(state, pages, moved)
    }

    /// What a movement of plain `pages` came to, device memory for all of which was reserved.
    fn served<T>(
        &self,
        state: &BlockState,
        pages: PageMask,
        moved: Result<(), Stall>,
    ) -> Result<Valid, Option<Outcome<T>>> {
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
            self.mapped
                .residency()
                .release(pages.count() - resident.count());
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
    pub(super) fn stale(&self, state: &BlockState) -> Option<PageMask> {
        let duplicates = self.access == Access::Read && self.region.on_read() == OnRead::Duplicate;
        if !duplicates || self.region.kind() != RegionKind::Managed {
            return None;
        }
        let pages = self.want | self.company();
        state.is_stale_for(self.id(), &pages).then_some(pages)
    }

    /// The round on such pages, without a plan, and without a look at the mappings: the copy itself shows that they may be read.
    /// `Err(None)` if it does not come to all of them; what it came to is recorded.
    pub(super) fn copy_over_stale<T>(
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
    pub(crate) fn take_blocks(
        &self,
        nr: usize,
        scratch: &mut Scratch,
        valid: &mut ValidList,
    ) -> usize {
        let (space, region, id) = (AddressSpace::global(), self.region, self.id());
        let moves = self.access == Access::Write || region.on_read() == OnRead::Migrate;
        // Opaque memory is filled from the window, in rounds.
        let is_opaque = self.mapped.is_opaque();
        if !moves || is_opaque || region.kind() != RegionKind::Managed || !region.door().has_move()
        {
            return 0;
        }
        let _gate = space.gate().enter();
        if AddressSpace::forking().load(Ordering::SeqCst) != 0 || self.is_over() {
            return 0;
        }
        let mut states = region.try_lock_blocks(self.block..self.block + nr, |state| {
            state.is_at_rest() && lease_of_cpu(state).is_none()
        });
        let n = states.iter().flatten().count();
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
        let nr_moved = moved.bytes / PAGE_SIZE;
        let nr_whole = nr_moved / PAGES_PER_BLOCK;
        let mut nr_arrived = nr_whole * PAGES_PER_BLOCK;
        let mut nr_complete = 0;
        let mut complete = |block| {
            self.mapped.touch(block);
            valid.push(Valid::all_of(block, region.is_writable()));
            nr_complete += 1;
        };
        let mut states = states.iter_mut().flatten();
        for (i, state) in states.by_ref().take(nr_whole).enumerate() {
            state.moved_out_whole(id);
            complete(self.block + i);
        }
        if let Some(state) = states.next() {
            // Where it stopped: to find out why, page by page, under the same hold of the lock (D4). What that leaves is the
            // single round's.
            let (block, here) = (self.block + nr_whole, nr_moved % PAGES_PER_BLOCK);
            if here > 0 {
                state.moved_out(id, PageMask::range(0..here));
            }
            let mut mover = Mover::new(region, block, state);
            let _ = mover.take(&**self.mapped, here..PAGES_PER_BLOCK, self.access, scratch);
            nr_arrived += state.resident(id).count();
            if state.exclusive_to(id) == PageMask::FULL {
                complete(block);
            }
        }
        self.mapped.residency().release(needed - nr_arrived);
        self.mapped
            .counters()
            .to_device(self.cause, nr_arrived as u64, 0);
        nr_complete
    }
}
