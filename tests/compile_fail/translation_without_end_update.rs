//! A translation is established with what `end_update` gave, not with the pages that were asked for.

use svm::{Access, DeviceFault, DeviceLock, PageBits, PageMask, Update};
use tests::Dummy;

fn commit(
    table: &PageBits,
    lock: &DeviceLock,
    mut update: Update<'_, Dummy>,
) -> Result<(), DeviceFault> {
    update.fault(Access::Write)?;
    let _guard = lock.lock();
    table.install(&PageMask::page(0), Access::Write);
    Ok(())
}

fn main() {}
