//! What the mappings permit: protection, looked up when a fault is served.
//!
//! `mprotect` tells nobody (hazards E2). So every device round asks the kernel which mappings cover its pages and what they
//! permit, one query per mapping, and a page's protection bounds what becomes valid: a device reads no `PROT_NONE` page and
//! writes no read-only one, wherever the page is. Translations that exist already are revoked by the next
//! [`begin_use`](crate::MappedRef::begin_use), which a launch begins with.

use core::ops::ControlFlow;

use crate::addr::{PAGE_SIZE, PageRange};
use crate::block::DeviceSet;
use crate::device::{Device, Invalidation, Keep};
use crate::error::{Access, DeviceFaultKind};
use crate::fault::{self, Flight};
use crate::mapped::{AnyMapped, MappedRef};
use crate::mask::PageMask;
use crate::overrun;
use crate::region::{Region, RegionKind};
use crate::space::AddressSpace;
use crate::sys::process;
use crate::sys::signal::AsyncSignalsBlocked;

/// What the mappings permit of some pages of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rights {
    /// Some mapping covers the page.
    pub(crate) mapped: PageMask,
    pub(crate) readable: PageMask,
    /// Readable as well.
    pub(crate) writable: PageMask,
}

impl Rights {
    const ALL: Self = Self {
        mapped: PageMask::FULL,
        readable: PageMask::FULL,
        writable: PageMask::FULL,
    };
    const NONE: Self = Self {
        mapped: PageMask::EMPTY,
        readable: PageMask::EMPTY,
        writable: PageMask::EMPTY,
    };

    /// The rights to `pages` of `block`. An input has no say of its own: nobody may change it while it is mirrored.
    pub(crate) fn of(space: &AddressSpace, region: &Region, block: usize, pages: PageMask) -> Self {
        if region.kind() == RegionKind::Input {
            return Self::ALL;
        }
        let mut rights = Self::NONE;
        let Some(bounds) = pages.bounds() else {
            return rights;
        };
        let Some(range) = PageRange::from_pages(region.addr_of(block, bounds.start), bounds.len())
        else {
            return rights;
        };
        // A walk that fails has seen a part: what is not seen is not permitted.
        let _ = space.maps().walk(range, |vma| {
            if let Some(part) = vma.range.intersect(range) {
                let first = (part.start() - region.addr_of(block, 0)) / PAGE_SIZE;
                let covered = PageMask::range(first..first + part.nr_pages());
                rights.mapped |= covered;
                if vma.readable {
                    rights.readable |= covered;
                    rights.writable |= if vma.writable {
                        covered
                    } else {
                        PageMask::EMPTY
                    };
                }
            }
            ControlFlow::Continue(())
        });
        rights
    }

    /// Pages that permit `access`.
    pub(crate) fn to(&self, access: Access) -> PageMask {
        match access {
            Access::Read => self.readable,
            Access::Write => self.writable,
        }
    }

    /// The first of `want` that does not permit `access`, and why.
    pub(crate) fn refusal(
        &self,
        want: PageMask,
        access: Access,
    ) -> Option<(usize, DeviceFaultKind)> {
        let page = (want - self.to(access)).first_from(0)?;
        let kind = if !self.mapped.contains(page) {
            DeviceFaultKind::Unmapped
        } else if !self.readable.contains(page) {
            DeviceFaultKind::NoAccess
        } else {
            DeviceFaultKind::Protection
        };
        Some((page, kind))
    }
}

impl<D: Device> MappedRef<D> {
    /// Takes from the device the translations that the mappings no longer permit: `mprotect` tells nobody. Done by
    /// [`begin_use`](Self::begin_use); a device that works without launches calls it at the start of an operation.
    ///
    /// One query of the kernel per mapping if nothing is protected.
    pub fn revalidate_protections(&self) {
        let region = self.shared_region();
        let Some(body) = region
            .body()
            .filter(|_| region.kind() == RegionKind::Managed && !region.door().is_disowned())
        else {
            return;
        };
        let _signals = AsyncSignalsBlocked::new();
        let mut first = None;
        let mut end = body.start();
        let _ = AddressSpace::global().maps().walk(body, |vma| {
            let whole = vma.readable && vma.writable && vma.range.start() <= end;
            if !whole {
                first = Some(end);
                return ControlFlow::Break(());
            }
            end = vma.range.end();
            ControlFlow::Continue(())
        });
        let Some(first) = first.or((end < body.end()).then_some(end)) else {
            return;
        };
        for block in region.locate(first).0..region.nr_blocks() {
            for (access, keep) in [(Access::Read, Keep::Nothing), (Access::Write, Keep::Reads)] {
                self.revoke_what_is_not_permitted(block, access, keep);
            }
        }
    }

    fn revoke_what_is_not_permitted(&self, block: usize, access: Access, keep: Keep) {
        let (space, region) = (AddressSpace::global(), self.shared_region());
        loop {
            let gate = space.gate().enter();
            let state = region.lock_block(block);
            let pages = region.body_mask(block) & state.frames(self.id());
            let pages = pages - Rights::of(space, region, block, pages).to(access);
            let Some(bounds) = pages.bounds() else { return };
            // The bracket: a round that has looked at the old protection does not commit.
            let Ok(bracket) = region.hub().start(region.interval(block, bounds), None) else {
                drop((state, gate));
                process::sched_yield();
                continue;
            };
            let inv = Invalidation::new(block, pages, keep);
            if !fault::invalidate(region, &gate, DeviceSet::one(self.id()), &inv) {
                let flight = Flight::begin(region);
                drop((state, gate));
                let holder = DeviceSet::one(self.id());
                let _ = overrun::shoot_down(space, flight.region(), holder, &inv);
            }
            drop(bracket);
            return;
        }
    }
}
