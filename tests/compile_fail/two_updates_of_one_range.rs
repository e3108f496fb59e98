//! A range has one update at a time: a second begin would make the first one's token good for other pages.

use std::time::Duration;
use svm::{Access, DeviceFault, MappedRef, Range};
use tests::Dummy;

fn fault(mapped: &MappedRef<Dummy>, range: &mut Range<Dummy>) -> Result<(), DeviceFault> {
    let mut first = range.start_update(mapped, 0..1, Duration::from_secs(1))?;
    let mut second = range.start_update(mapped, 1..2, Duration::from_secs(1))?;
    first.fault(Access::Write)?;
    second.fault(Access::Write)
}

fn main() {}
