//! Explicit migration to a device: the kernel's `migrate_vma`.

use super::{Appetite, Progress, Update, round_info};
use crate::addr::PAGES_PER_BLOCK;
use crate::device::Device;
use crate::error::{Access, DeviceFault, DeviceFaultKind, Result};
use crate::mapped::{AnyMapped, MappedRef};
use crate::mask::PageMask;
use crate::region::RegionKind;
use crate::release::{self, Stale};
use crate::round::{Outcome, Round, Valid};
use crate::space::AddressSpace;
use crate::stats::Cause;

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

/// Whether fewer pages of a block are left for some step than ever before: what others have taken back meanwhile was no progress.
fn fewer(least: &mut usize, left: &PageMask) -> Progress {
    if left.count() >= *least {
        return Progress::None;
    }
    *least = left.count();
    Progress::Made
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

impl<D: Device> Update<'_, D> {
    /// Moves the pages to device memory, whatever the policy says and without an access: the kernel's `migrate_vma`.
    ///
    /// What cannot move stays where it is: edges, pinned pages, memory of a kind that is served in place, and pages that are with
    /// another device alone. `end_update` then gives those pages as in place, or not at all. Read-only pages are duplicated: the
    /// kernel would not move them.
    ///
    /// # Errors
    /// A page is not mapped or permits no access, device memory is exhausted, or the timeout passed without progress.
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
        if self.is_forked() {
            return Err(fault(self.pages.start, DeviceFaultKind::Forked));
        }
        if self.pages.len() > mapped.residency().capacity() && region.kind() != RegionKind::InPlace
        {
            return Err(fault(self.pages.start, DeviceFaultKind::OutOfMemory));
        }
        self.range.valid.clear();
        let (mut at, mut stuck, mut appetite) = (self.pages.start, None, Appetite::Granules);
        let mut left = [PAGES_PER_BLOCK + 1; 3];
        while at < self.pages.end {
            let block = at / PAGES_PER_BLOCK;
            let origin = block * PAGES_PER_BLOCK;
            let end = self.pages.end.min(origin + PAGES_PER_BLOCK);
            let want = PageMask::range(at - origin..end - origin);
            if self.range.scratch.ensure(region.door()).is_err() {
                return Err(fault(at, DeviceFaultKind::OutOfMemory));
            }
            let key = Some(self.range.subscribed(self.subscription).key());
            let (access, cause) = (Access::Read, Cause::Explicit);
            let round = Round {
                mapped: &mapped,
                region,
                block,
                want,
                access,
                key,
                attempt: self.range.attempt(),
                alone: true,
                cause,
            };
            let progress = match round.next_migration() {
                Migration::Done(valid) => {
                    self.range.valid.push(valid);
                    at = end;
                    (stuck, left) = (None, [PAGES_PER_BLOCK + 1; 3]);
                    Progress::Made
                }
                Migration::Stop(outcome) => {
                    let info = round_info(&mapped, block, access);
                    self.range.between_rounds(&info, outcome, &mut stuck)?
                }
                Migration::Release(pages) => {
                    let progress = fewer(&mut left[2], &pages);
                    self.release_others(&mapped, block, pages)
                        .map_err(|_| fault(at, DeviceFaultKind::Lost))?;
                    progress
                }
                Migration::Run(want, access) => {
                    let round = Round {
                        want: appetite.of(want).0,
                        access,
                        ..round
                    };
                    match round.run(&mut self.range.scratch, |_| ()) {
                        Outcome::Done(()) => {
                            let least = &mut left[usize::from(access == Access::Write)];
                            fewer(least, &(want - round.want))
                        }
                        Outcome::NoFrames => appetite.refused(&round),
                        outcome => {
                            let info = round_info(&mapped, block, Access::Read);
                            self.range.between_rounds(&info, outcome, &mut stuck)?
                        }
                    }
                }
            };
            if !self.patience.lasts(progress) {
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
                release::release_pages(
                    &*other,
                    region,
                    block,
                    pages,
                    &mut self.range.scratch,
                    Cause::Explicit,
                    Stale::Kept,
                )?;
            }
        }
        Ok(())
    }
}
