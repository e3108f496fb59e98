//! G: events of the kernel against everything else.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use svm::{Access, Capabilities, Capability, Delivery, DeviceFaultKind, Granule, Options};
use tests::mapping::READ_WRITE;
use tests::{Idle, Map, TestDevice, Watchdog, in_own_process, usable};

use crate::PAGE;
use crate::fixture::both_doors;

fn second_word(map: &Map, page: usize) -> *mut u64 {
    map.word(page).wrapping_add(1)
}

/// G4: a page that the CPU shares with a device is emptied behind our back, by a call that posts no event. What the device holds is
/// what the page holds: the next touch brings it back, and brings it back protected.
#[test]
fn a_shared_page_that_was_emptied_unheard_comes_back_from_its_duplicate() {
    const GUARD_INSTALL: i32 = 102;
    const GUARD_REMOVE: i32 = 103;
    both_doors("emptied unheard", |options| {
        let map = Map::new(8);
        for page in 0..8 {
            // SAFETY: in the mapping.
            unsafe { second_word(&map, page).write_volatile(50) };
        }
        let mirror = map.mirror(&options.clone().read_mostly(true));
        let device = TestDevice::new().unwrap();
        let view = mirror.view();
        let mut out = [0; 8 * PAGE];
        device.read(view.region(), view.addr(), &mut out).unwrap();
        // SAFETY: the test's mapping: a marker that makes an access to the page fail, and away with it again.
        let marked = unsafe { libc::madvise(map.at(1).cast(), 2 * PAGE, GUARD_INSTALL) };
        if marked != 0 {
            tests::skip("no guard pages before Linux 6.13");
            return;
        }
        // SAFETY: as above.
        let cleared = unsafe { libc::madvise(map.at(1).cast(), 2 * PAGE, GUARD_REMOVE) };
        assert_eq!(cleared, 0);
        assert_eq!(map.read(1), 2, "zeros for what a device still holds");
        let read = |page: usize| {
            let mut word = [0; 8];
            device
                .read(view.region(), map.addr + page * PAGE, &mut word)
                .unwrap();
            u64::from_ne_bytes(word)
        };
        for page in [1, 2] {
            map.write(page, 9);
            assert_eq!(read(page), 9, "written, and the device was not told");
            // SAFETY: in the mapping.
            let second = unsafe { second_word(&map, page).read_volatile() };
            assert_eq!(second, 50, "a store to the page lost the rest of it");
        }
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
        map.unmap();
    });
}

/// G2: before an event is read the devices are paused, for a moment. What outstays that is counted, for the event's cause may be a kernel
/// itself, and then it is nobody's fault.
#[test]
fn an_access_that_outstays_a_pause_is_counted() {
    let _watchdog = Watchdog::with_timeout("outstayed", Duration::from_secs(30));
    let capabilities = Capabilities::probe();
    if !usable() || !capabilities.has(Capability::Events) || !capabilities.has(Capability::Move) {
        return;
    }
    for delivery in [Delivery::Inline, Delivery::Thread] {
        let map = Map::new(4);
        let mirror = map.mirror(&Options::new().delivery(delivery));
        // Its accesses never end, by its own word.
        let device = Idle::attach().unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let before = mirror.stats().outstayed_pauses;
        discard(&map, 1..2);
        let after = mirror.stats().outstayed_pauses;
        // Through the thread door nobody is paused. Through the other it is also for what tests beside this one discard.
        assert_eq!(after > before, delivery == Delivery::Inline, "{delivery:?}");
        drop(mapped);
        mirror.close().unwrap();
        map.unmap();
    }
}

fn discard(map: &Map, pages: std::ops::Range<usize>) {
    let (at, len) = (map.at(pages.start), pages.len() * PAGE);
    // SAFETY: the test's mapping, whose contents nobody counts on.
    let outcome = unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) };
    assert_eq!(outcome, 0);
}

/// G3: a marker looks like a page that is swapped out, and no discard takes it away. So a discard that waited for every entry to be
/// empty would wait for ever; it waits for a moment.
#[test]
fn a_marker_holds_a_discard_up_for_a_moment_only() {
    const GUARD_INSTALL: i32 = 102;
    both_doors("marker", |options| {
        let map = Map::new(8);
        let mirror = map.mirror(options);
        let device = TestDevice::new().unwrap();
        // SAFETY: the test's mapping: a marker that makes an access to the page fail.
        if unsafe { libc::madvise(map.at(3).cast(), PAGE, GUARD_INSTALL) } != 0 {
            tests::skip("no guard pages before Linux 6.13");
            return;
        }
        discard(&map, 0..8);
        let (view, mut out) = (mirror.view(), [1; PAGE]);
        device
            .read(view.region(), view.addr() + 2 * PAGE, &mut out)
            .unwrap();
        assert_eq!(out, [0; PAGE], "a discarded page reads as zeros");
        assert_eq!(map.read(4), 0);
        let marked = svm::snapshot(map.addr, 8).unwrap()[3];
        assert!(!marked.is_present(), "the discard took the marker away");
        mirror.close().unwrap();
        map.unmap();
    });
}

/// G5: whoever copies pages inside the gate does not wait for the monitor, which waits for the gate. A page that the kernel takes away in
/// the middle of the copy is missing, and where the monitor serves the kernel's accesses, too, the copy is such an access.
#[test]
fn a_page_that_leaves_as_it_is_copied_holds_nobody_up() {
    // Others count calls, which a mapping that changes makes more of.
    in_own_process(
        "events::a_page_that_leaves_as_it_is_copied_holds_nobody_up",
        &[""],
        || both_doors("leaves as it is copied", leave_as_it_is_copied),
    );
}

fn leave_as_it_is_copied(options: &Options) {
    const PAGES: usize = 512;
    let device = TestDevice::new().unwrap();
    for round in 0..200 {
        let map = Map::new(PAGES);
        let mirror = map.mirror(&options.clone().granule(Granule::Huge));
        // What may not be written is copied, not moved.
        let protect = |prot| {
            // SAFETY: memory of the test's.
            let outcome = unsafe { libc::mprotect(map.at(0).cast(), PAGES * PAGE, prot) };
            assert_eq!(outcome, 0);
        };
        protect(libc::PROT_READ);
        let started = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !started.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                (0..round * 100).for_each(|_| std::hint::spin_loop());
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
                let half = PAGES / 2 * PAGE;
                // SAFETY: memory of the test's, which it does not touch there any more.
                let moved =
                    unsafe { libc::mremap(map.at(PAGES / 2).cast(), half, half, flags, 0_usize) };
                assert_ne!(moved, libc::MAP_FAILED);
                // SAFETY: the test is done with it.
                assert_eq!(unsafe { libc::munmap(moved, half) }, 0);
            });
            started.store(true, Ordering::Release);
            let view = mirror.view();
            for page in [0, PAGES - 1] {
                let at = map.at(page).addr();
                if let Err(error) = device.fault_in(view.region(), at, 1, Access::Read) {
                    let kind = error.device_fault().map(|fault| fault.kind);
                    assert_eq!(kind, Some(DeviceFaultKind::Unmapped), "{error}");
                }
            }
        });
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
        protect(READ_WRITE);
        assert_eq!(map.read(0), 1);
        map.unmap();
    }
}
