//! A fault of the CPU, through both doors.

use std::sync::atomic::Ordering;

use svm::{Access, Delivery, Options};

use crate::rig::{Rig, write_by_another};
use crate::tracer::{ByThread, step, traced};
use crate::{BLOCK, LEN, MOVED, moved};

const NOTHING: ByThread = &[];
/// The look at the clock is for the lease of a thread that fetches a page again and again.
const MOVE_HOME: ByThread = &[(
    "caller",
    &["SIGBUS", "MOVE", "clock_gettime", "rt_sigreturn"],
)];
const COLLAPSE: ByThread = &[(
    "caller",
    &["SIGBUS", "WRITEPROTECT", "clock_gettime", "rt_sigreturn"],
)];

#[test]
fn a_cpu_touch_of_a_device_page_inline_is_one_move() {
    traced(
        "cpu::a_cpu_touch_of_a_device_page_inline_is_one_move",
        || {
            for (options, granule) in moved() {
                let mut rig = Rig::new(LEN, &options);
                (0..3).for_each(|n| rig.fault(n * granule, Access::Write));
                rig.write(0);
                step(|| rig.write(granule));
                step(|| assert_eq!(rig.read(2 * granule), 1));
                // What is home is memory like any other.
                step(|| rig.write(granule));
            }
        },
        &[MOVE_HOME, MOVE_HOME, NOTHING].repeat(MOVED.len()),
    );
}

#[test]
fn a_cpu_write_to_a_shared_page_inline_is_one_call() {
    traced(
        "cpu::a_cpu_write_to_a_shared_page_inline_is_one_call",
        || {
            for (options, granule) in moved() {
                let mut rig = Rig::new(LEN, &options.read_mostly(true));
                (0..2).for_each(|n| rig.fault(n * granule, Access::Read));
                rig.write(0);
                // Shared, it is read as if nobody else had it.
                step(|| assert_eq!(rig.read(granule), 1));
                step(|| rig.write(granule));
            }
        },
        &[NOTHING, COLLAPSE].repeat(MOVED.len()),
    );
}

#[test]
fn a_cpu_touch_of_a_device_page_is_one_move_of_the_monitor() {
    const BY_MONITOR: ByThread = &[("svm-monitor", &["read", "MOVE", "poll"])];
    traced(
        "cpu::a_cpu_touch_of_a_device_page_is_one_move_of_the_monitor",
        || {
            for (options, granule) in moved() {
                let mut rig = Rig::new(LEN, &options.delivery(Delivery::Thread));
                (0..3).for_each(|n| rig.fault(n * granule, Access::Write));
                write_by_another(&mut rig.buffer, 0);
                step(|| rig.write(granule));
                step(|| assert_eq!(rig.read(2 * granule), 1));
            }
        },
        &[BY_MONITOR; 2 * MOVED.len()],
    );
}

#[test]
fn a_cpu_write_to_a_shared_page_is_one_call_of_the_monitor() {
    const BY_MONITOR: ByThread = &[("svm-monitor", &["read", "WRITEPROTECT", "poll"])];
    traced(
        "cpu::a_cpu_write_to_a_shared_page_is_one_call_of_the_monitor",
        || {
            for (options, granule) in moved() {
                let options = options.delivery(Delivery::Thread).read_mostly(true);
                let mut rig = Rig::new(LEN, &options);
                (0..2).for_each(|n| rig.fault(n * granule, Access::Read));
                write_by_another(&mut rig.buffer, 0);
                step(|| rig.write(granule));
            }
        },
        &[BY_MONITOR; MOVED.len()],
    );
}

/// Whoever waits for an access that goes on looks whether it does, and at the clock: until when it may, and each time that it does still.
/// No thread is interrupted, and none is woken, for a device does not tell. (After a hundred looks it yields in between.)
#[test]
fn a_wait_for_an_access_in_flight_only_looks_at_the_clock() {
    const TIMES: u64 = 4;
    traced(
        "cpu::a_wait_for_an_access_in_flight_only_looks_at_the_clock",
        || {
            let mut rig = Rig::new(LEN, &Options::new());
            (0..2).for_each(|n| rig.fault(n * BLOCK, Access::Write));
            rig.write(0);
            let device = rig.attachment.device();
            let asked = device.seen.asked.load(Ordering::SeqCst);
            // The first answer is that before the wait, and the last is that nothing goes on any more.
            device.busy.store(asked + TIMES, Ordering::SeqCst);
            step(|| rig.write(BLOCK));
        },
        &[&[(
            "caller",
            &[
                "SIGBUS",
                "clock_gettime",
                "clock_gettime",
                "clock_gettime",
                "clock_gettime",
                "MOVE",
                "clock_gettime",
                "rt_sigreturn",
            ],
        )]],
    );
}
