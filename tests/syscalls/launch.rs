//! A launch of the accelerator.

use std::sync::Barrier;

use accel_sim::{Accelerator, ElementsMut, Lane};
use svm::{Buffer, Delivery, Options};

use crate::rig::{write, write_by_another};
use crate::tracer::{ByThread, Calls, rest, step, traced};
use crate::{BLOCK, LEN, MOVED, PAGE, moved};

fn one_worker() -> Accelerator {
    Accelerator::with_options(accel_sim::Options::new().workers(1)).unwrap()
}

fn filled(options: &Options) -> Buffer<u8> {
    let mut buffer = Buffer::with_options(LEN, options).unwrap();
    buffer.as_mut_slice().fill(1);
    buffer
}

/// A kernel over slices.
fn add_one(accel: &Accelerator, data: &mut Buffer<u8>) {
    let kernel = |data: &mut [u8]| {
        // Until the caller sleeps: else it is chance whether it has to.
        rest();
        data.iter_mut().for_each(|x| *x += 1);
    };
    accel.run(data.view_mut(), kernel).unwrap();
}

/// What the launching thread asks for: whether the process is still the one that made the accelerator, before the launch and before the
/// wait; signals masked while the runtime's locks are held (the region is found, its protection looked at, its use begun); and two calls
/// for the worker, to wake it and to wait for it.
const LAUNCH: Calls = &[
    "getpid",
    "rt_sigprocmask",
    "rt_sigprocmask",
    "rt_sigprocmask",
    "rt_sigprocmask",
    "PROCMAP_QUERY",
    "rt_sigprocmask",
    "rt_sigprocmask",
    "futex wake",
    "getpid",
    "futex wait",
];

/// The worker ends the use of the region, wakes the caller, and yields before it sleeps.
#[test]
fn a_launch_on_what_is_in_place_only_wakes_the_worker_and_the_caller() {
    const WORKER: Calls = &[
        "rt_sigprocmask",
        "rt_sigprocmask",
        "futex wake",
        "sched_yield",
        "sched_yield",
        "sched_yield",
        "sched_yield",
        "futex wait",
    ];
    traced(
        "launch::a_launch_on_what_is_in_place_only_wakes_the_worker_and_the_caller",
        || {
            let accel = one_worker();
            let mut data = filled(&Options::new());
            add_one(&accel, &mut data);
            step(|| add_one(&accel, &mut data));
            assert_eq!(data.as_slice()[0], 3);
        },
        &[&[("accel-0", WORKER), ("caller", LAUNCH)]],
    );
}

/// Whatever the granule: an item's fault brings all of the view that lies in the block.
#[test]
fn a_scan_of_what_is_away_adds_one_move_a_block() {
    const WORKER: Calls = &[
        "MOVE",
        "MOVE",
        "MOVE",
        "MOVE",
        "rt_sigprocmask",
        "rt_sigprocmask",
        "futex wake",
        "sched_yield",
        "sched_yield",
        "sched_yield",
        "sched_yield",
        "futex wait",
    ];
    traced(
        "launch::a_scan_of_what_is_away_adds_one_move_a_block",
        || {
            for (options, _) in moved() {
                let (accel, mut data) = (one_worker(), filled(&options));
                add_one(&accel, &mut data);
                accel.release().unwrap();
                step(|| add_one(&accel, &mut data));
            }
        },
        &[&[("accel-0", WORKER), ("caller", LAUNCH)] as ByThread; MOVED.len()],
    );
}

/// Here it is the worker that makes the step.
#[test]
fn a_worker_faults_by_one_move_a_granule_and_hits_by_no_call() {
    const THREE_MOVES: ByThread = &[("caller", &["MOVE", "MOVE", "MOVE"])];
    const NOTHING: ByThread = &[];
    traced(
        "launch::a_worker_faults_by_one_move_a_granule_and_hits_by_no_call",
        || {
            for (options, granule) in moved() {
                let (accel, mut data) = (one_worker(), filled(&options));
                let kernel = |_: &Lane<'_>, _, data: &ElementsMut<'_, u8>| {
                    let store = |at| data.store(at, 2).unwrap();
                    store(0);
                    step(|| (1..4).for_each(|n| store(n * granule)));
                    // Of all that these have brought.
                    step(|| (0..4 * granule).step_by(PAGE).for_each(store));
                    Ok(())
                };
                accel.run_items(1, data.view_mut(), kernel).unwrap();
            }
        },
        &[THREE_MOVES, NOTHING].repeat(MOVED.len()),
    );
}

/// How a worker accesses memory.
#[derive(Clone, Copy)]
enum Way {
    Span,
    Elements,
}

/// The CPU takes from the accelerator what its worker, who is at work with something else, has used.
fn touch_beside(delivery: Delivery, way: Way) {
    let options = Options::new().delivery(delivery);
    let accel = one_worker();
    let mut wanted = filled(&options);
    accel.run(wanted.view_mut(), |_| ()).unwrap();
    write_by_another(&mut wanted, 0);
    let mut used = Buffer::<u8>::with_options(PAGE, &options).unwrap();
    let at_work = Barrier::new(2);
    let work = || {
        at_work.wait();
        at_work.wait();
    };
    accel
        .scope(|scope| {
            match way {
                Way::Span => scope.launch(used.view_mut(), |_| work())?,
                Way::Elements => scope.launch_items(1, used.view_mut(), |_, _, _| {
                    work();
                    Ok(())
                })?,
            };
            at_work.wait();
            step(|| write(&mut wanted, BLOCK));
            at_work.wait();
            Ok(())
        })
        .unwrap();
}

/// A span is published behind a fence of the worker's own, so that whoever takes pages away interrupts nobody; for elements, whose accesses
/// have no fence, the membarrier makes one on every CPU that runs a thread of the process.
#[test]
fn what_a_worker_is_not_at_is_taken_by_a_barrier_only_from_elements() {
    const FROM_SPAN: ByThread = &[(
        "caller",
        &["SIGBUS", "MOVE", "clock_gettime", "rt_sigreturn"],
    )];
    const FROM_ELEMENTS: ByThread = &[(
        "caller",
        &[
            "SIGBUS",
            "membarrier",
            "MOVE",
            "clock_gettime",
            "rt_sigreturn",
        ],
    )];
    const FROM_SPAN_BY_MONITOR: ByThread = &[("svm-monitor", &["read", "MOVE", "poll"])];
    const FROM_ELEMENTS_BY_MONITOR: ByThread =
        &[("svm-monitor", &["read", "membarrier", "MOVE", "poll"])];
    traced(
        "launch::what_a_worker_is_not_at_is_taken_by_a_barrier_only_from_elements",
        || {
            for delivery in [Delivery::Inline, Delivery::Thread] {
                touch_beside(delivery, Way::Span);
                touch_beside(delivery, Way::Elements);
            }
        },
        &[
            FROM_SPAN,
            FROM_ELEMENTS,
            FROM_SPAN_BY_MONITOR,
            FROM_ELEMENTS_BY_MONITOR,
        ],
    );
}
