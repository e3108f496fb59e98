//! A fault of a device.

use svm::{Access, AttachOptions, Granule, Options};

use crate::rig::Rig;
use crate::tracer::{ByThread, step, traced};
use crate::{BLOCK, LEN, MOVED, moved};

const ONE_MOVE: ByThread = &[("caller", &["MOVE"])];

#[test]
fn a_device_fault_that_migrates_is_one_move() {
    traced(
        "device::a_device_fault_that_migrates_is_one_move",
        || {
            for (options, granule) in moved() {
                let mut rig = Rig::new(LEN, &options);
                rig.fault(0, Access::Write);
                step(|| rig.fault(granule, Access::Write));
                step(|| rig.fault(2 * granule, Access::Read));
            }
        },
        &[ONE_MOVE; 2 * MOVED.len()],
    );
}

/// The first copy of a page is a look at what its mapping permits (which `mprotect` tells nobody of), a move out, and a copy back.
/// From then on the window has a page to copy over, and the copy itself shows whether it is permitted.
#[test]
fn a_device_fault_that_duplicates_is_two_calls() {
    const FIRST: ByThread = &[("caller", &["PROCMAP_QUERY", "MOVE", "COPY"])];
    const AGAIN: ByThread = &[("caller", &["WRITEPROTECT", "process_vm_readv"])];
    traced(
        "device::a_device_fault_that_duplicates_is_two_calls",
        || {
            for (options, granule) in moved() {
                let mut rig = Rig::new(LEN, &options.read_mostly(true));
                rig.fault(0, Access::Read);
                step(|| rig.fault(granule, Access::Read));
                rig.write(granule);
                step(|| rig.fault(granule, Access::Read));
            }
        },
        &[FIRST, AGAIN].repeat(MOVED.len()),
    );
}

/// But for what the mapping permits: nothing has to move that would show it.
#[test]
fn a_write_after_a_read_that_moved_the_page_moves_nothing() {
    traced(
        "device::a_write_after_a_read_that_moved_the_page_moves_nothing",
        || {
            let mut rig = Rig::new(1 << 20, &Options::new());
            rig.fault(0, Access::Read);
            step(|| rig.fault(0, Access::Write));
        },
        &[&[("caller", &["PROCMAP_QUERY"])]],
    );
}

/// The look at the clock is for the victim's lease.
#[test]
fn an_eviction_is_one_move_home_before_the_one_out() {
    traced(
        "device::an_eviction_is_one_move_home_before_the_one_out",
        || {
            let options = Options::new().granule(Granule::Huge);
            let attach = AttachOptions::new().memory_bytes(2 * BLOCK);
            let mut rig = Rig::with_memory(8 * BLOCK, &options, attach);
            (0..4).for_each(|n| rig.fault(n * BLOCK, Access::Write));
            step(|| rig.fault(4 * BLOCK, Access::Write));
        },
        &[&[("caller", &["MOVE", "clock_gettime", "MOVE"])]],
    );
}
