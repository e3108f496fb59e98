//! [`Flight`]: a reference to a region that outlives the gate section it was found in.

use core::ops::Deref;
use core::ptr::NonNull;

use crate::notifier::Hub;
use crate::region::Region;

/// A fault that refers to its region outside the gate.
///
/// Whoever closes a region first makes it unreachable for new flights, and then waits until the count of these is zero
/// before it frees it. Dropping one frees nothing, so it is legal on the fault path.
#[derive(Debug)]
pub(crate) struct Flight(NonNull<Region>);

// SAFETY: it is a counted `&Region`, and `Region` is `Sync`.
unsafe impl Send for Flight {}

impl Flight {
    /// Inside the gate, where `region` was found, or by somebody who has another flight or reference to it.
    pub(crate) fn begin(region: &Region) -> Self {
        region.enter_flight();
        Self(NonNull::from(region))
    }

    pub(crate) fn region(&self) -> &Region {
        // SAFETY: `begin` counted this reference before the region could become unreachable, so the closer, which waits
        // for a grace period and then for the count, has not freed the region.
        unsafe { self.0.as_ref() }
    }
}

impl Deref for Flight {
    type Target = Hub;
    fn deref(&self) -> &Hub {
        self.region().hub()
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.region().leave_flight();
    }
}
