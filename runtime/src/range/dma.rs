//! Ending an update of a device that has to *make* something for each page before it can install a translation: an entry of an
//! IOMMU, a DMA address, a slot of a table that may have to grow. The kernel's `hmm_range_dma_map` (mm/hmm.c, until 5.4) and
//! `hmm_dma_map_pfn` (since 6.16) do that.
//!
//! Making such a thing may take long, allocate or fail, so it happens *before* the device lock is taken; and since an
//! invalidation may come meanwhile, what was made is undone unless the update turns out to be valid under the lock. Here no
//! path keeps a mapping that was not handed over: interrupted, failed and panicked updates undo theirs, the last made first.

use super::{Interrupted, Update};
use crate::addr::{PAGE_SIZE, PAGES_PER_BLOCK};
use crate::device::{Device, DeviceGuard};
use crate::error::{Access, DeviceFault, DeviceFaultKind};
use crate::mask::PageMask;

/// Makes what a device needs for each page before it can translate to it.
pub trait PageMapper {
    /// What is made: a DMA address, say.
    type Mapping;

    /// Makes the mapping of the page with index `page` (from the region's base), for reading or for both. No lock is held; it may
    /// allocate and take its time.
    ///
    /// # Errors
    /// The fault that the update ends with.
    fn map(&mut self, page: usize, access: Access) -> Result<Self::Mapping, DeviceFaultKind>;

    /// Undoes a mapping that was never handed over. No lock is held.
    fn unmap(&mut self, page: usize, mapping: Self::Mapping);
}

/// Why an update ended without its mappings. They have all been undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotMapped {
    /// An invalidation of the range began meanwhile: begin again at `start_update`.
    Interrupted,
    /// The mapper refused a page.
    Fault(DeviceFault),
}

impl From<Interrupted> for NotMapped {
    fn from(_: Interrupted) -> Self {
        Self::Interrupted
    }
}

/// The mappings made so far, undone when it is dropped.
struct Made<'m, M: PageMapper> {
    mapper: &'m mut M,
    mappings: Vec<(usize, M::Mapping)>,
}

impl<M: PageMapper> Drop for Made<'_, M> {
    fn drop(&mut self) {
        while let Some((page, mapping)) = self.mappings.pop() {
            self.mapper.unmap(page, mapping);
        }
    }
}

impl<D: Device> Update<'_, D> {
    /// Ends the update of a device that maps pages first: [`PageMapper::map`] for each page that became valid, in order; then,
    /// under the device lock, `install` with the mappings, if what they lead to is still true.
    ///
    /// It allocates: it is for devices whose mappings do so anyway.
    ///
    /// # Errors
    /// [`NotMapped`]; every mapping that was made has been undone by [`PageMapper::unmap`], the last one first.
    ///
    /// # Panics
    /// If the mapper does. Its mappings are undone then too.
    pub fn end_update_mapped<M: PageMapper, R>(
        self,
        mapper: &mut M,
        install: impl FnOnce(Vec<(usize, M::Mapping)>, &DeviceGuard<'_>) -> R,
    ) -> Result<R, NotMapped> {
        let mut made = Made {
            mapper,
            mappings: Vec::new(),
        };
        for valid in &*self.range.valid {
            let origin = valid.block() * PAGES_PER_BLOCK;
            for page in valid.readable().runs().flatten() {
                // A hint, which spares the rest of the work: what counts is looked at below.
                if self.needs_retry() {
                    return Err(NotMapped::Interrupted);
                }
                let access = if valid.writable().intersects(&PageMask::page(page)) {
                    Access::Write
                } else {
                    Access::Read
                };
                let page = origin + page;
                let refused = |kind| {
                    let addr = self.mapped.shared_region().base() + page * PAGE_SIZE;
                    NotMapped::Fault(DeviceFault::new(addr, access, kind))
                };
                let mapping = made.mapper.map(page, access).map_err(refused)?;
                made.mappings.push((page, mapping));
            }
        }
        let attached = self.mapped.attached().clone();
        if self.is_forked() {
            // Who has the device locked may have stayed in the parent.
            return Err(NotMapped::Interrupted);
        }
        // Declared after `made`, so that nothing is undone with the lock held.
        let guard = attached.device.lock().lock();
        self.end_update(&guard)?;
        Ok(install(core::mem::take(&mut made.mappings), &guard))
    }
}
