//! A reference to a region that outlives the gate section it was found in.

use core::ptr::NonNull;

use crate::region::Region;

/// Keeps a region from being freed: whoever closes it waits until the region's count of these is zero, after it made the
/// region unreachable for new ones. Dropping it frees nothing, so it is legal on the fault path.
#[derive(Debug)]
pub(crate) struct Pinned(NonNull<Region>);

impl Pinned {
    /// Inside the gate, where `region` was found.
    pub(crate) fn new(region: &Region) -> Self {
        region.enter_flight();
        Self(NonNull::from(region))
    }

    pub(crate) fn region(&self) -> &Region {
        // SAFETY: `new` counted this reference inside the gate, so the closer, which unpublishes, waits for a grace period
        // and then for the count, has not freed the region.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.region().leave_flight();
    }
}
