//! Whether an update is still good is a question for who holds the device's lock.

use svm::{Access, Interrupted, PageBits, Update};
use tests::Dummy;

fn commit(table: &PageBits, update: Update<'_, Dummy>) -> Result<(), Interrupted> {
    for valid in update.end_update()?.iter() {
        table.install(valid, Access::Write);
    }
    Ok(())
}

fn main() {}
