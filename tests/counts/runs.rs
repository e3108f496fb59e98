//! A fault where not all of a granule is alike, or cannot move: a call for each run of pages.

use svm::{Buffer, Capabilities, Capability, Delivery, Granule, Options, Stats};
use tests::{TestDevice, in_own_process};

use crate::{
    GRANULE, PAGE, alone, assert_quiet, cpu_faults, device_reads, device_writes, filled, taken,
};

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
    let test = "runs::without_move_a_run_is_protected_copied_and_dropped_by_one_call_each";
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
