//! A fault takes the same calls however much memory is mirrored, and however many mirrors there are.

use svm::{Access, AttachOptions, Buffer, Delivery, Options};

use crate::PAGE;
use crate::rig::{Rig, write_by_another};
use crate::tracer::{ByThread, step, traced};

/// What grows: the bytes of the region, of which a few pages are populated, and how many other regions the device has mapped.
const GROWN: [(usize, usize); 3] = [(4 << 20, 0), (4 << 30, 0), (4 << 20, 999)];

const MOVE: ByThread = &[("caller", &["MOVE"])];
const DUPLICATE: ByThread = &[("caller", &["PROCMAP_QUERY", "MOVE", "COPY"])];

/// A fault of each kind, in the middle of the region: of the device, and of the CPU on what that has taken; and the same of copies.
fn faults(delivery: Delivery) {
    let options = Options::new().delivery(delivery);
    let granule = options.granule.bytes();
    for (len, nr_others) in GROWN {
        let buffer = Buffer::with_options(len, &options).unwrap();
        let mut rig = Rig::on(buffer, AttachOptions::new());
        let other = |_| Buffer::<u8>::with_options(PAGE, &options).unwrap();
        let others: Vec<_> = (0..nr_others).map(other).collect();
        for other in &others {
            rig.attachment.map(other.view().region()).unwrap();
        }
        let at = |n: usize| len / 2 + n * granule;
        (at(0)..at(4)).step_by(PAGE).for_each(|at| rig.write(at));
        rig.fault(at(0), Access::Write);
        write_by_another(&mut rig.buffer, at(0));
        step(|| rig.fault(at(1), Access::Write));
        step(|| rig.write(at(1)));
        rig.buffer.advise_read_mostly(true);
        rig.fault(at(2), Access::Read);
        rig.write(at(2));
        step(|| rig.fault(at(3), Access::Read));
        step(|| rig.write(at(3)));
        // They end with the process: there are many.
        std::mem::forget((rig, others));
    }
}

#[test]
fn the_calls_of_a_fault_inline_do_not_grow() {
    const HOME: ByThread = &[(
        "caller",
        &["SIGBUS", "MOVE", "clock_gettime", "rt_sigreturn"],
    )];
    const COLLAPSE: ByThread = &[(
        "caller",
        &["SIGBUS", "WRITEPROTECT", "clock_gettime", "rt_sigreturn"],
    )];
    traced(
        "growth::the_calls_of_a_fault_inline_do_not_grow",
        || faults(Delivery::Inline),
        &[MOVE, HOME, DUPLICATE, COLLAPSE].repeat(GROWN.len()),
    );
}

#[test]
fn the_calls_of_a_fault_through_the_thread_door_do_not_grow() {
    const HOME: ByThread = &[("svm-monitor", &["read", "MOVE", "poll"])];
    const COLLAPSE: ByThread = &[("svm-monitor", &["read", "WRITEPROTECT", "poll"])];
    traced(
        "growth::the_calls_of_a_fault_through_the_thread_door_do_not_grow",
        || faults(Delivery::Thread),
        &[MOVE, HOME, DUPLICATE, COLLAPSE].repeat(GROWN.len()),
    );
}
