//! What launches of the accelerator take.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use accel_sim::{Accelerator, ElementsMut, Lane};
use svm::{Access, AttachOptions, Buffer, Options, Stats};
use tests::Idle;
use tests::idle::fault_in;

use crate::{BLOCK, GRANULE, PAGE, alone, assert_quiet, cpu_faults, filled, granules, taken};

const LEN: usize = 2 * BLOCK;

/// What a launch over slices by one worker took of a buffer that was away: each block of the view is one fault and one move.
#[track_caller]
fn assert_one_move_a_block(stats: &Stats, faults: u64) {
    assert_quiet(stats);
    let counts = (
        faults,
        stats.move_calls,
        stats.movement_calls(),
        stats.to_device_runs,
        cpu_faults(stats),
    );
    const BLOCKS: u64 = (LEN / BLOCK) as u64;
    assert_eq!(counts, (BLOCKS, BLOCKS, BLOCKS, BLOCKS, 0), "{stats:?}");
    let bytes = (
        stats.to_device_pages() as usize * PAGE,
        stats.to_host_pages(),
    );
    assert_eq!(bytes, (LEN, 0), "{stats:?}");
}

/// What a walk of the CPU over a buffer took that a device had: each granule is one fault and one move.
#[track_caller]
fn assert_one_move_home_a_granule(stats: &Stats, granule: usize) {
    assert_quiet(stats);
    let granules = (LEN / granule) as u64;
    let counts = (
        cpu_faults(stats),
        stats.move_calls,
        stats.movement_calls(),
        stats.to_host_runs,
    );
    assert_eq!(
        counts,
        (granules, granules, granules, granules),
        "{stats:?}"
    );
    let bytes = (
        stats.to_host_pages() as usize * PAGE,
        stats.to_device_pages(),
    );
    assert_eq!(bytes, (LEN, 0), "{stats:?}");
}

/// Work is given to the accelerator, its result read, and its input made anew; twice, since the first time no page has a place there.
#[test]
fn an_offload_by_one_worker_faults_once_a_block_and_home_once_a_granule() {
    alone("offload", || {
        for options in granules() {
            let granule = options.granule.bytes();
            let (mut x, mut y) = (filled(LEN, &options), filled(LEN, &options));
            let accel = one_worker();
            for _ in 0..2 {
                let before = x.stats();
                let written = taken(&mut y, |y| add(&accel, &x, y));
                let read = x.stats() - before;
                assert_one_move_a_block(&written, written.device_write_faults);
                assert_one_move_a_block(&read, read.device_read_faults);
                // In place: nothing at all.
                let again = taken(&mut y, |y| add(&accel, &x, y));
                assert_eq!(again, Stats::default());
                let home = taken(&mut y, |y| assert!(y.as_slice().iter().all(|&b| b == 3)));
                assert_one_move_home_a_granule(&home, granule);
                let anew = taken(&mut x, |x| x.as_mut_slice().fill(1));
                assert_one_move_home_a_granule(&anew, granule);
                y.as_mut_slice().fill(1);
            }
        }
    });
}

fn one_worker() -> Accelerator {
    Accelerator::with_options(accel_sim::Options::new().workers(1)).unwrap()
}

/// Adds one array to the other, in slices.
fn add(accel: &Accelerator, x: &Buffer<u8>, y: &mut Buffer<u8>) {
    let kernel = |(y, x): (&mut [u8], &[u8])| {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += *x);
    };
    accel.run((y.view_mut(), x.view()), kernel).unwrap();
}

#[test]
fn an_element_kernel_faults_once_a_granule_and_hits_from_then_on() {
    alone("elements", || {
        for options in granules() {
            let mut data = filled(LEN, &options);
            let accel = one_worker();
            let run = |data: &mut Buffer<u8>| {
                let kernel = |_: &Lane<'_>, i, data: &ElementsMut<'_, u8>| data.store(i * PAGE, 9);
                accel
                    .run_items(LEN / PAGE, data.view_mut(), kernel)
                    .unwrap();
            };
            let first = taken(&mut data, run);
            assert_quiet(&first);
            let granules = (LEN / options.granule.bytes()) as u64;
            let counts = (
                first.device_write_faults,
                first.move_calls,
                first.movement_calls(),
                first.to_device_pages() as usize * PAGE,
            );
            assert_eq!(counts, (granules, granules, granules, LEN), "{first:?}");
            let again = taken(&mut data, run);
            assert_eq!(again, Stats::default());
            assert!(data.as_slice().iter().step_by(PAGE).all(|&b| b == 9));
        }
    });
}

/// Each adds one to every byte, in slices.
fn add_one(workers: usize, memory_bytes: Option<usize>, data: &mut Buffer<u8>) {
    let mut options = accel_sim::Options::new().workers(workers);
    options.memory_bytes = memory_bytes;
    let accel = Accelerator::with_options(options).unwrap();
    accel
        .run(data.view_mut(), |data| {
            data.iter_mut().for_each(|x| *x += 1);
        })
        .unwrap();
}

#[test]
fn slices_move_by_blocks_however_many_workers_share_them() {
    alone("slices", || {
        let mut data = filled(4 * BLOCK, &Options::new());
        let base = data.as_slice().as_ptr().addr();
        let blocks = ((base + 4 * BLOCK).div_ceil(BLOCK) - base / BLOCK) as u64;
        for workers in [1, 2, 64] {
            let launch = taken(&mut data, |data| add_one(workers, None, data));
            assert_eq!((launch.retries, launch.anomalies), (0, 0), "{launch:?}");
            assert_eq!(launch.device_write_faults, blocks, "{launch:?}");
            assert_eq!(launch.to_device_runs, blocks, "{launch:?}");
            assert_eq!(launch.to_device_pages() as usize * PAGE, 4 * BLOCK);
            assert!(data.as_slice().iter().all(|&x| x == data.as_slice()[0]));
            data.as_mut_slice().fill(1);
        }
    });
}

/// Where the views do not all have room, what one brings along would drive out what another is about to use.
#[test]
fn slices_in_little_memory_move_once() {
    alone("slices in little memory", || {
        const LEN: usize = 4 << 20;
        const MEMORY: usize = 3 << 20;
        let mut sums = filled(LEN, &Options::new());
        let mut addends = filled(LEN, &Options::new());
        // One worker: several may drive out each other's pages before they are used.
        let options = accel_sim::Options::new().workers(1).memory_bytes(MEMORY);
        let accel = Accelerator::with_options(options).unwrap();
        let launch = taken(&mut sums, |sums| {
            accel
                .run((sums.view_mut(), addends.view_mut()), |(sums, addends)| {
                    for (x, y) in sums.iter_mut().zip(addends) {
                        *x += *y;
                    }
                })
                .unwrap();
        });
        assert_eq!(launch.to_device_pages() as usize * PAGE, LEN, "{launch:?}");
        assert!(sums.as_slice().iter().all(|&x| x == 2));
    });
}

/// Workers that fault on one page at the same time: one fetches it, and the others, who have waited for their turn, find it there.
#[test]
fn far_faults_of_many_workers_on_one_page_are_one_round() {
    alone("coalesced", || {
        const WORKERS: usize = 4;
        let buffer = filled(GRANULE, &Options::new());
        let options = accel_sim::Options::new()
            .workers(WORKERS)
            .fault_timeout(Duration::from_secs(30));
        let accel = Accelerator::with_options(options).unwrap();
        let patient = AttachOptions::new().span_deadline(Duration::from_secs(30));
        let other = svm::attach(Idle::default(), patient).unwrap();
        // How many wait is not to be seen from outside, and one that comes late finds the page by itself: so more than once.
        let mut coalesced = 0;
        for _ in 0..20 {
            let (before, of_runtime) = (accel.stats().total(), buffer.stats());
            // Another device has the page, and does not let go of it: so the round that wants it lasts.
            let mapped = other.map(buffer.view().region()).unwrap();
            let page = (buffer.view().addr() - mapped.region().base()) / PAGE;
            fault_in(
                &mut other.range().unwrap(),
                &mapped,
                page..page + 1,
                Access::Write,
            )
            .unwrap();
            other.device().stuck.store(!0, Ordering::SeqCst);
            let arrived = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while arrived.load(Ordering::SeqCst) < WORKERS {
                        std::thread::yield_now();
                    }
                    std::thread::sleep(Duration::from_millis(5));
                    other.device().stuck.store(0, Ordering::SeqCst);
                });
                let view = buffer.view();
                let load = |_: &Lane<'_>, _, data: &accel_sim::Elements<'_, u8>| {
                    arrived.fetch_add(1, Ordering::SeqCst);
                    data.load(0).map(|byte| assert_eq!(byte, 1))
                };
                accel.run_items(WORKERS, view, load).unwrap();
            });
            let after = accel.stats().total();
            let rounds = buffer.stats() - of_runtime;
            // One for the other device, one for all workers.
            let faults = (
                rounds.device_write_faults,
                rounds.device_read_faults + rounds.device_spurious_faults,
                after.far_faults - before.far_faults,
            );
            assert_eq!(faults, (1, 1, 1), "{rounds:?}");
            coalesced += after.coalesced - before.coalesced;
            assert!(coalesced <= 20 * (WORKERS as u64 - 1));
            // Out of the accelerator's memory and its workers' caches.
            accel.release().unwrap();
        }
        assert!(
            coalesced > 0,
            "nobody has waited for another's fault in 20 rounds"
        );
    });
}
