//! What moves because it is asked for, or for want of room.

use std::sync::atomic::Ordering::SeqCst;
use std::thread;

use svm::{Access, AttachOptions, Granule, Options};
use tests::TestDevice;
use tests::idle::{Idle, TIMEOUT};

use crate::{GRANULE, PAGE, alone, assert_quiet, cpu_faults, filled, taken};

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
                (calls, NR_BLOCKS * 512),
                "{home:?}"
            );
        }
    });
}

/// Those before it come home by one call, it by one when it is no longer in use, and those behind it by one.
/// The kernel itself may stop a move of huge pages half-way, which is looked at page by page (one try in some hundreds): hence three tries.
#[test]
fn a_huge_block_in_use_keeps_none_before_it_from_coming_home_at_once() {
    alone("in use", || {
        let tries: Vec<_> = (0..3).map(|_| calls_around_a_block_in_use()).collect();
        assert!(tries.contains(&(1, 3)), "{tries:?}");
    });
}

/// Calls until the release waits for the block that is in use, and in all.
fn calls_around_a_block_in_use() -> (u64, u64) {
    const BLOCK: usize = 2 << 20;
    const NR_BLOCKS: usize = 5;
    const IN_USE: usize = 2;
    let options = Options::new().granule(Granule::Huge).huge_pages(true);
    let buffer = filled(NR_BLOCKS * BLOCK, &options);
    let device = Idle::attach().unwrap();
    let mapped = device.map(buffer.view().region()).unwrap();
    let first = (buffer.view().addr() - mapped.region().base()) / PAGE;
    let mut range = device.range().unwrap();
    let pages = first..first + NR_BLOCKS * 512;
    let mut update = range.start_update(&mapped, pages, TIMEOUT).unwrap();
    update.fault(Access::Write).unwrap();
    drop(update.end_update(&device.device().device_lock().lock()));
    let in_use = 1 << (first / 512 + IN_USE);
    device.device().stuck.store(in_use, SeqCst);
    let before = buffer.stats();
    let until_it_waits = thread::scope(|scope| {
        let release = scope.spawn(|| device.release().unwrap());
        while buffer.stats().waits == before.waits {
            thread::yield_now();
        }
        let left = (NR_BLOCKS - IN_USE) * BLOCK;
        assert_eq!(device.resident_bytes(), left);
        let calls = (buffer.stats() - before).movement_calls();
        assert!(!release.is_finished());
        device.device().stuck.store(0, SeqCst);
        calls
    });
    let home = buffer.stats() - before;
    let came = home.to_host_explicit_pages as usize;
    assert_eq!((came, device.resident_bytes()), (NR_BLOCKS * 512, 0));
    (until_it_waits, home.movement_calls())
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
        let counts = (
            pinned.move_calls,
            pinned.write_protect_calls,
            pinned.movement_calls(),
            pinned.scan_calls,
            pinned.to_host_explicit_pages,
        );
        let expected = (NR_BLOCKS, NR_BLOCKS, 2 * NR_BLOCKS, NR_BLOCKS, pages);
        assert_eq!(counts, expected, "{pinned:?}");
        // What is home already stays where it is.
        let again = taken(&mut buffer, |b| drop(b.pin(..).unwrap()));
        let counts = (
            again.write_protect_calls,
            again.movement_calls(),
            again.scan_calls,
            again.to_host_pages(),
        );
        assert_eq!(counts, (NR_BLOCKS, NR_BLOCKS, NR_BLOCKS, 0), "{again:?}");
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
        // No more than had to go, an eighth of the memory at once; and a call for each granule that goes out, and each of these.
        assert_eq!(scan.to_host_evict_pages as usize * PAGE, MEMORY, "{scan:?}");
        let calls = (scan.move_calls, scan.movement_calls());
        assert_eq!(calls, (granules + 8, granules + 8), "{scan:?}");
    });
}
