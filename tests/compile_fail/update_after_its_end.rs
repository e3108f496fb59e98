//! `end_update` consumes the update: another look at the page tables needs another begin.

use svm::{Access, DeviceLock, Update};
use tests::Dummy;

fn commit(lock: &DeviceLock, mut update: Update<'_, Dummy>) {
    let guard = lock.lock();
    if update.end_update(&guard).is_err() {
        drop(guard);
        update.fault(Access::Write).unwrap();
    }
}

fn main() {}
