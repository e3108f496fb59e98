//! What `end_update` gave is good while the guard lives: an invalidation comes as soon as the lock is free.

use svm::{Access, DeviceLock, Interrupted, PageBits, Update};
use tests::Dummy;

fn commit(
    table: &PageBits,
    lock: &DeviceLock,
    update: Update<'_, Dummy>,
) -> Result<(), Interrupted> {
    let guard = lock.lock();
    let committed = update.end_update(&guard)?;
    drop(guard);
    table.install(&committed[0], Access::Write);
    Ok(())
}

fn main() {}
