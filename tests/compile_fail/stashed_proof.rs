//! What `fault_in` hands out is good inside its callback only, which holds the device's lock.

use std::time::Duration;
use svm::{Access, DeviceFault, MappedRef, PageBits, Range, Valid};
use tests::Dummy;

fn commit(
    table: &PageBits,
    mapped: &MappedRef<Dummy>,
    range: &mut Range<Dummy>,
) -> Result<(), DeviceFault> {
    let mut stash: Option<&Valid> = None;
    let second = Duration::from_secs(1);
    range.fault_in(mapped, 0..1, Access::Write, 0, second, |valid, _| {
        stash = Some(valid);
    })?;
    table.install(stash.unwrap(), Access::Write);
    Ok(())
}

fn main() {}
