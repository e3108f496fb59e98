//! The regression guard for speed: counts, which are the same on every machine, and not times. One test per kind of fault, and
//! one per way to work through an array with one worker: how many faults, system calls, retries and bytes each takes.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use svm::{
    Access, AttachOptions, Buffer, Capabilities, Capability, Delivery, Granule, Options, Stats,
    View, ViewMut,
};
use tests::idle::fault_in;
use tests::{Idle, TestDevice, Watchdog, in_own_process, usable};

const PAGE: usize = 4096;
/// 64 KiB, what one fault moves unless told otherwise.
const GRANULE: usize = 16 * PAGE;

/// The tests count what a whole address space does, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

fn alone(name: &'static str, test: impl FnOnce()) {
    let _turn = TURN
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let _watchdog = Watchdog::new(name);
    if usable() {
        test();
    }
}

fn filled(len: usize, options: &Options) -> Buffer<u8> {
    let mut buffer = Buffer::with_options(len, options).unwrap();
    buffer.as_mut_slice().fill(1);
    buffer
}

/// What `job` takes of `buffer`.
fn taken(buffer: &mut Buffer<u8>, job: impl FnOnce(&mut Buffer<u8>)) -> Stats {
    let before = buffer.stats();
    job(buffer);
    buffer.stats() - before
}

/// One device fault at the beginning of `view`.
fn device_writes(device: &TestDevice, view: &ViewMut<'_, u8>) {
    device
        .fault_in(view.region(), view.addr(), 1, Access::Write)
        .unwrap();
}

/// One device fault for a load, at the beginning of `view`.
fn device_reads(device: &TestDevice, view: &View<'_, u8>) {
    device
        .fault_in(view.region(), view.addr(), 1, Access::Read)
        .unwrap();
}

/// CPU faults of every kind.
fn cpu_faults(s: &Stats) -> u64 {
    s.cpu_read_faults
        + s.cpu_write_faults
        + s.cpu_protect_faults
        + s.cpu_zero_fills
        + s.cpu_spurious_faults
}

#[track_caller]
fn assert_quiet(s: &Stats) {
    let wasted = (
        s.retries,
        s.waits,
        s.scan_calls,
        s.changing_outcomes,
        s.cpu_spurious_faults,
        s.device_spurious_faults,
        s.anomalies,
    );
    assert_eq!(wasted, (0, 0, 0, 0, 0, 0, 0), "{s:?}");
}

#[test]
fn a_migration_is_one_call_of_a_granule_each_way() {
    alone("migration", || {
        for (granule, nr_pages) in [(Granule::Page, 1), (Granule::Big, 16), (Granule::Huge, 512)] {
            for huge in [false, true] {
                let mut buffer = filled(4 << 20, &Options::new().granule(granule).huge_pages(huge));
                let device = TestDevice::new().unwrap();
                let out = taken(&mut buffer, |b| {
                    let view = b.view_mut();
                    device
                        .fault_in(view.region(), view.addr(), 1, Access::Write)
                        .unwrap();
                });
                assert_quiet(&out);
                assert_eq!(
                    (
                        out.device_write_faults,
                        out.move_calls,
                        out.movement_calls(),
                        cpu_faults(&out)
                    ),
                    (1, 1, 1, 0),
                    "{out:?}"
                );
                assert_eq!(
                    (out.to_device_pages(), out.to_device_demand_pages),
                    (nr_pages, 1)
                );
                let home = taken(&mut buffer, |b| b.as_mut_slice()[0] = 2);
                assert_quiet(&home);
                assert_eq!(
                    (
                        home.cpu_write_faults,
                        home.move_calls,
                        home.movement_calls(),
                        home.invalidations
                    ),
                    (1, 1, 1, 1),
                    "{home:?}"
                );
                assert_eq!((home.to_host_pages(), cpu_faults(&home)), (nr_pages, 1));
            }
        }
    });
}

#[test]
fn a_duplicate_is_two_calls_and_its_collapse_one() {
    alone("duplicate", || {
        let mut buffer = filled(1 << 20, &Options::new().read_mostly(true));
        let device = TestDevice::new().unwrap();
        let read = |b: &mut Buffer<u8>| {
            let view = b.view();
            device
                .fault_in(view.region(), view.addr(), 1, Access::Read)
                .unwrap();
        };
        let first = taken(&mut buffer, read);
        assert_quiet(&first);
        assert_eq!(
            (
                first.move_calls,
                first.copy_calls,
                first.movement_calls(),
                first.duplicated_pages
            ),
            (1, 1, 2, 16),
            "{first:?}"
        );
        let collapse = |b: &mut Buffer<u8>| b.as_mut_slice()[PAGE] = 7;
        for _ in 0..3 {
            let written = taken(&mut buffer, collapse);
            assert_quiet(&written);
            assert_eq!(
                (
                    written.cpu_protect_faults,
                    written.write_protect_calls,
                    written.movement_calls()
                ),
                (1, 1, 1),
                "{written:?}"
            );
            assert_eq!(
                (
                    cpu_faults(&written),
                    written.collapsed_pages,
                    written.invalidations
                ),
                (1, 16, 1)
            );
            // From the second time on the window has pages to copy over: nothing is moved, nothing thrown away.
            let again = taken(&mut buffer, read);
            assert_quiet(&again);
            let calls = (
                again.write_protect_calls,
                again.kernel_copy_calls,
                again.movement_calls(),
            );
            assert_eq!(calls, (1, 1, 2), "{again:?}");
            assert_eq!((again.duplicated_pages, again.to_device_pages()), (16, 16));
            let mut byte = [0];
            let view = buffer.view();
            device
                .read(view.region(), view.addr() + PAGE, &mut byte)
                .unwrap();
            assert_eq!(byte, [7]);
        }
    });
}

#[test]
fn an_update_of_many_blocks_is_one_call_a_block_and_one_in_all_for_huge_pages() {
    alone("prefetch", || {
        const NR_BLOCKS: u64 = 8;
        for huge in [false, true] {
            let mut buffer = filled(
                NR_BLOCKS as usize * (2 << 20),
                &Options::new().granule(Granule::Huge).huge_pages(huge),
            );
            let device = TestDevice::new().unwrap();
            let out = taken(&mut buffer, |b| {
                let view = b.view_mut();
                device
                    .fault_in(view.region(), view.addr(), view.len(), Access::Write)
                    .unwrap();
            });
            assert_quiet(&out);
            let calls = if huge { 1 } else { NR_BLOCKS };
            assert_eq!(
                (
                    out.device_write_faults,
                    out.movement_calls(),
                    out.to_device_pages()
                ),
                (1, calls, NR_BLOCKS * 512),
                "{out:?}"
            );
            assert_eq!(device.attachment().resident_bytes(), buffer.len());
            let home = taken(&mut buffer, |_| device.release().unwrap());
            assert_eq!(
                (home.movement_calls(), home.to_host_explicit_pages),
                (NR_BLOCKS, NR_BLOCKS * 512),
                "{home:?}"
            );
        }
    });
}

#[test]
fn a_scan_by_one_worker_faults_once_a_granule_and_never_twice() {
    alone("scan", || {
        const LEN: usize = 4 << 20;
        const GRANULES: u64 = (LEN / GRANULE) as u64;
        let (mut x, mut y) = (filled(LEN, &Options::new()), filled(LEN, &Options::new()));
        let accel =
            accel_sim::Accelerator::with_options(accel_sim::Options::new().workers(1)).unwrap();
        let run = |x: &Buffer<u8>, y: &mut Buffer<u8>| {
            accel
                .run((y.view_mut(), x.view()), |(y, x)| {
                    y.iter_mut()
                        .zip(x)
                        .for_each(|(y, x)| *y = y.wrapping_add(*x));
                })
                .unwrap();
        };
        let before = x.stats();
        let written = taken(&mut y, |y| run(&x, y));
        let read = x.stats() - before;
        for (stats, faults) in [
            (&written, written.device_write_faults),
            (&read, read.device_read_faults),
        ] {
            assert_quiet(stats);
            assert!(faults <= GRANULES, "{stats:?}");
            assert_eq!(stats.movement_calls(), stats.to_device_runs, "{stats:?}");
            assert!(stats.movement_calls() <= GRANULES, "{stats:?}");
            assert_eq!(
                (stats.to_device_pages() as usize * PAGE, cpu_faults(stats)),
                (LEN, 0),
                "{stats:?}"
            );
        }
        // In place: nothing at all.
        let again = taken(&mut y, |y| run(&x, y));
        assert_eq!(
            (
                again.device_write_faults,
                again.movement_calls(),
                again.retries
            ),
            (0, 0, 0),
            "{again:?}"
        );
        // The CPU reads the result: one fault and one call a granule.
        let home = taken(&mut y, |y| assert!(y.as_slice().iter().all(|&b| b == 3)));
        assert_quiet(&home);
        assert_eq!(
            (cpu_faults(&home), home.move_calls, home.movement_calls()),
            (GRANULES, GRANULES, GRANULES),
            "{home:?}"
        );
        assert_eq!(home.to_host_pages() as usize * PAGE, LEN);
        x.as_mut_slice()[0] = 1;
    });
}

#[test]
fn the_thread_door_makes_the_same_calls() {
    alone("thread door", || {
        let options = Options::new().delivery(Delivery::Thread);
        let mut moved = filled(1 << 20, &options);
        let mut shared = filled(1 << 20, &options.clone().read_mostly(true));
        let device = TestDevice::new().unwrap();
        device_writes(&device, &moved.view_mut());
        let home = taken(&mut moved, |b| b.as_mut_slice()[0] = 2);
        assert_quiet(&home);
        let counts = (cpu_faults(&home), home.move_calls, home.movement_calls());
        assert_eq!(counts, (1, 1, 1), "{home:?}");
        device_reads(&device, &shared.view());
        let collapse = taken(&mut shared, |b| b.as_mut_slice()[0] = 2);
        assert_quiet(&collapse);
        let counts = (
            collapse.cpu_protect_faults,
            collapse.write_protect_calls,
            collapse.movement_calls(),
        );
        assert_eq!(counts, (1, 1, 1), "{collapse:?}");
    });
}

#[test]
fn a_write_after_a_read_that_moved_the_page_takes_nothing() {
    alone("promotion", || {
        let mut buffer = filled(1 << 20, &Options::new());
        let device = TestDevice::new().unwrap();
        let read = taken(&mut buffer, |b| device_reads(&device, &b.view()));
        assert_eq!((read.device_read_faults, read.movement_calls()), (1, 1));
        let written = taken(&mut buffer, |b| {
            let view = b.view_mut();
            device.write(view.region(), view.addr(), &[7]).unwrap();
        });
        assert_quiet(&written);
        let counts = (
            written.device_write_faults,
            written.movement_calls(),
            written.invalidations,
        );
        assert_eq!(counts, (0, 0, 0), "{written:?}");
        assert_eq!(buffer.as_slice()[0], 7);
    });
}

/// Calls by kind: move, copy, zeropage, write-protect, discard; and looks at the page table.
type Calls = [u64; 6];

fn calls(stats: &Stats) -> Calls {
    let calls = [
        stats.move_calls,
        stats.copy_calls,
        stats.zeropage_calls,
        stats.write_protect_calls,
        stats.discard_calls,
        stats.scan_calls,
    ];
    let others = stats.movement_calls() - calls[..5].iter().sum::<u64>();
    assert_eq!(others, 0, "{stats:?}");
    calls
}

/// What a device's fault takes on a granule of which the CPU has populated some pages and nobody the others.
#[track_caller]
fn fault_on_holes(write: bool, populated: &[usize], expected: Calls) {
    let mut buffer = Buffer::<u8>::zeroed(1 << 20).unwrap();
    let device = TestDevice::new().unwrap();
    // The CPU's first touch is a fault of the kernel's own, or ours with one call, but never a movement.
    let touched = taken(&mut buffer, |b| {
        let touch = |&page: &usize| b.as_mut_slice()[page * PAGE] = 1;
        populated.iter().for_each(touch);
    });
    assert_quiet(&touched);
    let moved = (
        touched.movement_calls(),
        touched.move_calls,
        touched.to_host_runs,
    );
    assert_eq!(moved, (cpu_faults(&touched), 0, 0), "{touched:?}");
    // The device gets a granule: the pages that are there, and zeros for those that are not.
    let hole = taken(&mut buffer, |b| {
        if write {
            device_writes(&device, &b.view_mut());
        } else {
            device_reads(&device, &b.view());
        }
    });
    let wasted = (hole.retries, hole.waits, hole.anomalies, cpu_faults(&hole));
    assert_eq!(wasted, (0, 0, 0, 0), "{hole:?}");
    let faults = hole.device_write_faults + hole.device_read_faults;
    let moved = (faults, hole.to_device_pages() as usize * PAGE);
    assert_eq!(moved, (1, GRANULE), "{hole:?}");
    assert_eq!(
        calls(&hole),
        expected,
        "write {write}, populated {populated:?}"
    );
}

/// The populated pages of a granule: none, the first, two runs, and every other.
const POPULATED: [&[usize]; 4] = [&[], &[0], &[0, 1, 2, 8, 9], &[0, 2, 4, 6, 8, 10, 12, 14]];

/// One call fills a run of holes, however many pages it has: a copy of zeros for a write, the page of zeros for a read. One MOVE takes a
/// run of pages, and one more is the guess that there are no holes.
#[test]
fn what_nobody_has_populated_is_filled_by_one_call_a_run() {
    alone("holes", || {
        for (populated, [moves, fills]) in
            POPULATED.into_iter().zip([[2, 1], [2, 1], [3, 2], [9, 8]])
        {
            fault_on_holes(true, populated, [moves, fills, 0, 0, 0, 3 * fills]);
            fault_on_holes(false, populated, [moves, 0, fills, 0, 0, 3 * fills]);
        }
    });
}

/// Without MOVE a run of pages is protected, copied and dropped by one call each; a run of holes is filled as with it.
#[test]
fn without_move_a_run_is_protected_copied_and_dropped_by_one_call_each() {
    let test = "without_move_a_run_is_protected_copied_and_dropped_by_one_call_each";
    in_own_process(test, &["move"], || {
        alone("without move", || {
            for (populated, [runs, fills]) in
                POPULATED.into_iter().zip([[0, 1], [1, 1], [2, 2], [8, 8]])
            {
                let scans = 2 * (runs + fills);
                fault_on_holes(true, populated, [0, runs + fills, 0, runs, runs, scans]);
                fault_on_holes(false, populated, [0, runs, fills, runs, runs, scans]);
            }
            let has_kernel_faults = Capabilities::probe().has(Capability::KernelFaults);
            for delivery in [Delivery::Inline, Delivery::Thread] {
                let waits = delivery == Delivery::Thread && has_kernel_faults;
                for granule in [Granule::Page, Granule::Big, Granule::Huge] {
                    let options = Options::new().delivery(delivery).granule(granule);
                    copies_both_ways(&options, granule.pages() as u64, waits);
                }
            }
        });
    });
}

/// A granule goes to a device and comes home, twice; and is shared, collapsed, shared and taken.
fn copies_both_ways(options: &Options, nr_pages: u64, waits_for_monitor: bool) {
    let device = TestDevice::new().unwrap();
    let mut buffer = filled(4 << 20, options);
    for turn in 0..2 {
        let out = taken(&mut buffer, |b| device_writes(&device, &b.view_mut()));
        let wasted = (out.retries, out.waits, out.anomalies, cpu_faults(&out));
        assert_eq!(wasted, (0, 0, 0, 0), "{out:?}");
        assert_eq!(
            (out.device_write_faults, out.to_device_pages()),
            (1, nr_pages)
        );
        // The second time the window's stale copies are dropped first.
        assert_eq!(
            calls(&out),
            [0, 1, 0, 1, 1 + turn, 2],
            "turn {turn}: {out:?}"
        );
        let home = taken(&mut buffer, |b| b.as_mut_slice()[0] = 2);
        assert_quiet(&home);
        assert_eq!((cpu_faults(&home), home.to_host_pages()), (1, nr_pages));
        assert_eq!(calls(&home), [0, 1, 0, 0, 0, 0], "turn {turn}: {home:?}");
    }
    let mut shared = filled(4 << 20, &options.clone().read_mostly(true));
    let reads = |b: &mut Buffer<u8>| device_reads(&device, &b.view());
    // Taken as above, and copied home at once, protected.
    let out = taken(&mut shared, reads);
    let duplicated = (calls(&out), out.duplicated_pages);
    assert_eq!(duplicated, ([0, 2, 0, 1, 1, 2], nr_pages), "{out:?}");
    let collapse = taken(&mut shared, |b| b.as_mut_slice()[0] = 2);
    let collapsed = (calls(&collapse), collapse.collapsed_pages);
    assert_eq!(collapsed, ([0, 0, 0, 1, 0, 0], nr_pages), "{collapse:?}");
    // Where the kernel's copies do not wait for a monitor, they go over what the window still has; else all is as the first time, but
    // for the stale copies, which are dropped.
    let mut again = taken(&mut shared, reads);
    let over = std::mem::take(&mut again.kernel_copy_calls);
    assert_eq!(again.duplicated_pages, nr_pages, "{again:?}");
    let expected = if waits_for_monitor {
        (0, [0, 2, 0, 1, 2, 2])
    } else {
        (1, [0, 0, 0, 1, 0, 0])
    };
    assert_eq!((over, calls(&again)), expected, "{again:?}");
    let upgrade = taken(&mut shared, |b| device_writes(&device, &b.view_mut()));
    assert_eq!(calls(&upgrade), [0, 0, 0, 0, 1, 0], "{upgrade:?}");
}

#[test]
fn an_input_is_copied_once_and_its_end_takes_no_call() {
    alone("input", || {
        let data = vec![1_u8; 1 << 20];
        let device = TestDevice::new().unwrap();
        let input = svm::mirror_ref(&data).unwrap();
        let taken = || {
            let (before, view) = (input.stats(), input.view());
            // Not at the beginning, which shares its page with a neighbour on the heap.
            let addr = view.addr() + (256 << 10);
            device
                .fault_in(view.region(), addr, 1, Access::Read)
                .unwrap();
            input.stats() - before
        };
        let first = taken();
        assert_quiet(&first);
        let counts = (
            first.device_read_faults,
            first.move_calls,
            first.movement_calls(),
            first.to_device_pages() as usize * PAGE,
        );
        assert_eq!(counts, (1, 0, 1, GRANULE), "{first:?}");
        let again = taken();
        let counts = (again.movement_calls(), again.to_device_pages());
        assert_eq!(counts, (0, 0), "{again:?}");
        let stats = input.stats();
        assert_eq!(stats.to_host_pages(), 0, "{stats:?}");
    });
}

#[test]
fn explicit_movement_takes_a_call_a_block_and_a_pin_two() {
    alone("explicit", || {
        const NR_BLOCKS: u64 = 4;
        let mut buffer = filled(NR_BLOCKS as usize * (2 << 20), &Options::new());
        let device = TestDevice::new().unwrap();
        let out = taken(&mut buffer, |b| {
            let view = b.view_mut();
            device
                .migrate_to_device(view.region(), view.addr(), view.len() / PAGE)
                .unwrap();
        });
        assert_quiet(&out);
        let pages = NR_BLOCKS * 512;
        let counts = (out.movement_calls(), out.to_device_explicit_pages);
        assert_eq!(counts, (NR_BLOCKS, pages), "{out:?}");
        // A pin also lifts what protection there is, and populates what is not there, after a look.
        let pinned = taken(&mut buffer, |b| drop(b.pin(..).unwrap()));
        let wasted = (pinned.retries, pinned.waits, pinned.anomalies);
        assert_eq!(wasted, (0, 0, 0), "{pinned:?}");
        let counts = (pinned.move_calls, pinned.to_host_explicit_pages);
        assert_eq!(counts, (NR_BLOCKS, pages), "{pinned:?}");
        assert!(pinned.movement_calls() <= 2 * NR_BLOCKS, "{pinned:?}");
        assert!(pinned.scan_calls <= 2 * NR_BLOCKS, "{pinned:?}");
        // What is home already stays where it is.
        let again = taken(&mut buffer, |b| drop(b.pin(..).unwrap()));
        let counts = (again.move_calls, again.copy_calls, again.to_host_pages());
        assert_eq!(counts, (0, 0, 0), "{again:?}");
        assert!(again.movement_calls() <= NR_BLOCKS, "{again:?}");
    });
}

#[test]
fn a_mirror_that_nobody_uses_moves_nothing() {
    alone("unused", || {
        let mut data = vec![1_u8; 4 << 20];
        let mirror = svm::mirror(&mut data).unwrap();
        let device = TestDevice::new().unwrap();
        device.attachment().map(mirror.view().region()).unwrap();
        let stats = mirror.stats();
        assert_eq!((stats.movement_calls(), cpu_faults(&stats)), (0, 0));
        mirror.close().unwrap();
        assert_eq!(data[0], 1);
    });
}

#[test]
fn a_scan_of_twice_the_memory_evicts_each_page_once() {
    alone("eviction", || {
        const MEMORY: usize = 4 << 20;
        let mut buffer = filled(2 * MEMORY, &Options::new());
        let device = TestDevice::with_options(AttachOptions::new().memory_bytes(MEMORY)).unwrap();
        let scan = taken(&mut buffer, |b| {
            let view = b.view_mut();
            for at in (0..view.len()).step_by(GRANULE) {
                device
                    .fault_in(view.region(), view.addr() + at, 1, Access::Write)
                    .unwrap();
            }
        });
        let wasted = (scan.retries, scan.anomalies, cpu_faults(&scan));
        assert_eq!(wasted, (0, 0, 0), "{scan:?}");
        let granules = (2 * MEMORY / GRANULE) as u64;
        assert_eq!(scan.device_write_faults, granules, "{scan:?}");
        assert_eq!(scan.to_device_pages() as usize * PAGE, 2 * MEMORY);
        // No more than had to go, but for the last victim, of which whole granules go at once.
        let evicted = scan.to_host_evict_pages as usize * PAGE;
        assert!((MEMORY..=MEMORY + (2 << 20)).contains(&evicted), "{scan:?}");
        assert!(scan.movement_calls() <= 2 * granules, "{scan:?}");
    });
}

#[test]
fn an_element_kernel_faults_once_a_granule_and_hits_from_then_on() {
    alone("elements", || {
        const LEN: usize = 1 << 20;
        let mut data = filled(LEN, &Options::new());
        let options = accel_sim::Options::new().workers(1);
        let accel = accel_sim::Accelerator::with_options(options).unwrap();
        let run = |data: &mut Buffer<u8>| {
            accel
                .run_items(LEN / PAGE, data.view_mut(), |_lane, i, data| {
                    data.store(i * PAGE, 9)
                })
                .unwrap();
        };
        let first = taken(&mut data, run);
        assert_quiet(&first);
        let granules = (LEN / GRANULE) as u64;
        let counts = (first.device_write_faults, first.movement_calls());
        assert_eq!(counts, (granules, granules), "{first:?}");
        let again = taken(&mut data, run);
        let counts = (again.device_write_faults, again.movement_calls());
        assert_eq!(counts, (0, 0), "{again:?}");
        assert!(data.as_slice().iter().step_by(PAGE).all(|&b| b == 9));
    });
}

/// Each adds one to every byte, in slices.
fn add_one(workers: usize, memory_bytes: Option<usize>, data: &mut Buffer<u8>) {
    let mut options = accel_sim::Options::new().workers(workers);
    options.memory_bytes = memory_bytes;
    let accel = accel_sim::Accelerator::with_options(options).unwrap();
    accel
        .run(data.view_mut(), |data| {
            data.iter_mut().for_each(|x| *x += 1);
        })
        .unwrap();
}

#[test]
fn slices_move_by_blocks_however_many_workers_share_them() {
    alone("slices", || {
        const BLOCK: usize = 2 << 20;
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
        let accel = accel_sim::Accelerator::with_options(options).unwrap();
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
        let accel = accel_sim::Accelerator::with_options(options).unwrap();
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
                let load = |_: &accel_sim::Lane<'_>, _, data: &accel_sim::Elements<'_, u8>| {
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
