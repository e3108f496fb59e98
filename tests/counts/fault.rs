//! One fault.

use svm::{Access, Buffer, Delivery, Options, Stats};
use tests::TestDevice;

use crate::{
    GRANULE, PAGE, alone, assert_quiet, cpu_faults, device_reads, device_writes, filled, granules,
    taken,
};

#[test]
fn a_migration_is_one_call_of_a_granule_each_way() {
    alone("migration", || {
        for options in granules() {
            let nr_pages = options.granule.pages() as u64;
            let mut buffer = filled(4 << 20, &options);
            let device = TestDevice::new().unwrap();
            let out = taken(&mut buffer, |b| device_writes(&device, &b.view_mut()));
            assert_quiet(&out);
            let counts = (
                out.device_write_faults,
                out.move_calls,
                out.movement_calls(),
                cpu_faults(&out),
            );
            assert_eq!(counts, (1, 1, 1, 0), "{out:?}");
            let pages = (out.to_device_demand_pages, out.to_device_pages());
            assert_eq!(pages, (1, nr_pages), "{out:?}");
            let home = taken(&mut buffer, |b| b.as_mut_slice()[0] = 2);
            assert_quiet(&home);
            assert_one_move_home(&home, nr_pages);
        }
    });
}

#[test]
fn a_duplicate_is_two_calls_and_its_collapse_one() {
    alone("duplicate", || {
        for options in granules() {
            duplicates(&options.read_mostly(true));
        }
    });
}

/// Shares a granule, and has the CPU write to it, again and again.
fn duplicates(options: &Options) {
    let nr_pages = options.granule.pages() as u64;
    let mut buffer = filled(4 << 20, options);
    let device = TestDevice::new().unwrap();
    let read = |b: &mut Buffer<u8>| device_reads(&device, &b.view());
    let first = taken(&mut buffer, read);
    assert_quiet(&first);
    let counts = (
        first.device_read_faults,
        first.move_calls,
        first.copy_calls,
        first.movement_calls(),
        first.duplicated_pages,
        first.to_device_pages(),
    );
    assert_eq!(counts, (1, 1, 1, 2, nr_pages, nr_pages), "{first:?}");
    for _ in 0..3 {
        let written = taken(&mut buffer, |b| b.as_mut_slice()[8] = 7);
        assert_quiet(&written);
        assert_one_collapse(&written, nr_pages);
        // From the second time on the window has pages to copy over: nothing is moved, nothing thrown away.
        let again = taken(&mut buffer, read);
        assert_quiet(&again);
        let calls = (
            again.write_protect_calls,
            again.kernel_copy_calls,
            again.movement_calls(),
        );
        assert_eq!(calls, (1, 1, 2), "{again:?}");
        let pages = (again.duplicated_pages, again.to_device_pages());
        assert_eq!(pages, (nr_pages, nr_pages), "{again:?}");
        let mut byte = [0];
        let view = buffer.view();
        device
            .read(view.region(), view.addr() + 8, &mut byte)
            .unwrap();
        assert_eq!(byte, [7]);
    }
}

/// A CPU's write to a shared granule: no page moves, to either side.
#[track_caller]
fn assert_one_collapse(written: &Stats, nr_pages: u64) {
    let counts = (
        cpu_faults(written),
        written.cpu_protect_faults,
        written.write_protect_calls,
        written.movement_calls(),
        written.invalidations,
    );
    assert_eq!(counts, (1, 1, 1, 1, 1), "{written:?}");
    let pages = (
        written.collapsed_pages,
        written.to_host_pages(),
        written.to_device_pages(),
    );
    assert_eq!(pages, (nr_pages, 0, 0), "{written:?}");
}

/// A CPU's touch of what a device has: one move of the granule.
#[track_caller]
fn assert_one_move_home(home: &Stats, nr_pages: u64) {
    let counts = (
        cpu_faults(home),
        home.cpu_write_faults,
        home.move_calls,
        home.movement_calls(),
        home.invalidations,
    );
    assert_eq!(counts, (1, 1, 1, 1, 1), "{home:?}");
    let pages = (home.to_host_demand_pages, home.to_host_pages());
    assert_eq!(pages, (1, nr_pages), "{home:?}");
}

#[test]
fn the_thread_door_makes_the_same_calls_for_as_many_bytes() {
    alone("thread door", || {
        for options in granules() {
            let options = options.delivery(Delivery::Thread);
            let nr_pages = options.granule.pages() as u64;
            let mut moved = filled(4 << 20, &options);
            let mut shared = filled(4 << 20, &options.clone().read_mostly(true));
            let device = TestDevice::new().unwrap();
            device_writes(&device, &moved.view_mut());
            let home = taken(&mut moved, |b| b.as_mut_slice()[0] = 2);
            assert_quiet(&home);
            assert_one_move_home(&home, nr_pages);
            device_reads(&device, &shared.view());
            let collapse = taken(&mut shared, |b| b.as_mut_slice()[0] = 2);
            assert_quiet(&collapse);
            assert_one_collapse(&collapse, nr_pages);
        }
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
