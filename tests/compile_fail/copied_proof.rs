//! A copy would be good beyond the guard; so there is none.

use svm::{DeviceLock, Interrupted, Update, Valid};
use tests::Dummy;

fn commit(lock: &DeviceLock, update: Update<'_, Dummy>) -> Result<Vec<Valid>, Interrupted> {
    let guard = lock.lock();
    let committed = update.end_update(&guard)?;
    Ok(committed.to_vec())
}

fn main() {}
