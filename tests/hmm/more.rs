//! What the kernel's suite lacks: ranges that are none, a device that is busy, or forked, as many devices as there may be, and calls
//! that nobody tells of.

use std::sync::atomic::Ordering;
use std::time::Duration;

use svm::{AttachOptions, Capability, ErrorKind};
use tests::TestDevice;
use tests::mm::{Dmirror, Errno, Mm};

use crate::fixture::{Fixture, each, error, in_child, migrated, whole};
use crate::map::{Map, WRITE, check, holds, init, load, mirror, store};
use crate::{PAGE, has};

#[test]
fn bad_ranges() {
    each("bad_ranges", |f| {
        let map = Map::new(PAGE, WRITE);
        for (addr, len) in [
            (map.addr + 8, PAGE),
            (map.addr, 0),
            (usize::MAX - PAGE + 1, PAGE),
        ] {
            let mut out = vec![0; len];
            assert_eq!(f.dev.read(addr, &mut out), error(libc::EINVAL));
            assert_eq!(f.dev.write(addr, &out), error(libc::EINVAL));
            assert_eq!(f.dev.migrate_to_dev(addr, &mut out), error(libc::EINVAL));
            assert_eq!(f.dev.exclusive(addr, &mut out), error(libc::EINVAL));
            assert_eq!(f.dev.snapshot(addr, len / PAGE), Err(Errno(libc::EINVAL)));
        }
        // Nothing is mapped at the bottom of the address space.
        assert_eq!(f.dev.read(PAGE, &mut [0; PAGE]), error(libc::EFAULT));
        assert_eq!(f.dev.write(PAGE, &[0; PAGE]), error(libc::EFAULT));
        assert_eq!(
            f.dev.migrate_to_dev(PAGE, &mut [0; PAGE]),
            error(libc::EINVAL)
        );
    });
}

/// EBUSY: an invalidation that does not end before the deadline, for another device is in the middle of an access. And memory that
/// the device cannot have alone.
#[test]
fn busy() {
    each("busy", |f| {
        let map = Map::new(PAGE, WRITE);
        store(map.addr, 0, 5);
        let patient = AttachOptions::new().span_deadline(Duration::from_secs(60));
        let other = TestDevice::with_options(patient).unwrap();
        let mirror = f.dev.mirror_of(map.addr, 1).unwrap();
        let region = || mirror.view().region();
        other
            .write(region(), map.addr, &6i32.to_ne_bytes())
            .unwrap();
        let accesses = &other.attachment().device().never_quiet;
        accesses.store(true, Ordering::SeqCst);
        let waits = mirror.stats().waits;
        std::thread::scope(|scope| {
            let cpu = scope.spawn(|| load(map.addr, 0));
            while mirror.stats().waits == waits {
                std::thread::yield_now();
            }
            f.dev.device().set_timeout(Duration::from_millis(20));
            let mut out = [0; PAGE];
            let busy = error(libc::EBUSY);
            assert_eq!(f.dev.read(map.addr, &mut out), busy);
            assert_eq!(f.dev.write(map.addr, &[9; PAGE]), busy);
            assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), busy);
            assert_eq!(f.dev.exclusive(map.addr, &mut out), busy);
            assert_eq!(out, [0; PAGE], "nothing was copied");
            accesses.store(false, Ordering::SeqCst);
            assert_eq!(cpu.join().unwrap(), 6);
        });
        f.dev.device().set_timeout(Duration::from_secs(10));
        let mut out = vec![0; PAGE];
        assert_eq!(f.dev.read(map.addr, &mut out), whole(1));
        assert_eq!(out[..4], 6i32.to_ne_bytes());

        let shared = Map::with(PAGE, WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).unwrap();
        assert_eq!(
            f.dev.exclusive(shared.addr, &mut out),
            error(libc::EBUSY),
            "in place"
        );
        assert_eq!(f.dev.check_exclusive(shared.addr, 1), migrated(1));
    });
}

/// ESRCH: a forked child has a copy of the parent's device, which is no device of its own.
#[test]
fn forked() {
    each("forked", |f| {
        let map = Map::new(2 * PAGE, WRITE);
        init(map.addr, 2 * PAGE, |k| k);
        let mut out = vec![0; PAGE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(1));
        let gone = error(libc::ESRCH);
        assert!(in_child(|| {
            let mut out = vec![0; PAGE];
            // Memory that was mirrored, and memory that was not.
            [map.page(0), map.page(1)].iter().all(|&at| {
                f.dev.read(at, &mut out) == gone
                    && f.dev.write(at, &out) == gone
                    && f.dev.migrate_to_dev(at, &mut out) == gone
                    && f.dev.exclusive(at, &mut out) == gone
                    && f.dev.check_exclusive(at, 1) == gone
                    && f.dev.migrate_to_sys(at, 1) == gone
            }) && f.dev.release() == Err(Errno(libc::ESRCH))
                && check(map.addr, 2 * PAGE, |k| k)
        }));
        assert_eq!(f.dev.read(map.addr, &mut out), whole(1));
        assert!(holds(&out, |k| k));
    });
}

/// Devices on the same memory, up to as many as there may be: duplicates with all, and one write that ends them.
#[test]
fn many_devices() {
    each("many_devices", |f| {
        for n in [3, svm::MAX_DEVICES] {
            for read_mostly in [false, true] {
                let mm = Mm::new(&f.options.clone().read_mostly(read_mostly));
                let mut devices = vec![f.dev.on(&mm)];
                devices.extend((1..n).map(|_| Dmirror::new(&mm).unwrap()));
                duplicates_on_all(&devices, read_mostly);
                if n == svm::MAX_DEVICES {
                    one_too_many(f, devices);
                }
                assert_eq!(mm.stats().anomalies, 0);
            }
        }
    });
}

fn duplicates_on_all(devices: &[Dmirror], read_mostly: bool) {
    const PAGES: usize = 20;
    const LEN: usize = PAGES * PAGE;
    let n = devices.len();
    let map = Map::new(LEN, WRITE);
    init(map.addr, LEN, |k| k);
    let all_read = |but: Option<usize>, want: i32| {
        for device in (0..n).filter(|&n| Some(n) != but) {
            let mut out = vec![0; LEN];
            assert_eq!(devices[device].read(map.addr, &mut out), whole(PAGES));
            assert!(holds(&out, |k| k + want), "device {device}");
        }
    };
    // Who holds the pages: the devices by number, and whether the CPU does.
    let holders = || {
        let snapshot = svm::snapshot(map.addr, PAGES).unwrap();
        let of = |page: &svm::PageSnapshot| {
            let held = |n: &usize| page.is_held_by(devices[*n].device().attachment());
            ((0..n).filter(held).collect::<Vec<_>>(), page.is_present())
        };
        assert!(snapshot.iter().all(|page| of(page) == of(&snapshot[0])));
        of(&snapshot[0])
    };
    let all: Vec<_> = (0..n).collect();
    all_read(None, 0);
    assert_eq!(holders(), (all.clone(), read_mostly));

    let mirror_of = devices[0].mirror_of(map.addr, PAGES).unwrap();
    let region = mirror_of.view().region();
    for (round, writer) in (1..).zip(0..n) {
        let data = mirror(LEN, |k| k + round);
        assert_eq!(devices[writer].write(map.addr, &data), whole(PAGES));
        assert_eq!(holders(), (vec![writer], false), "after one's write");
        for (n, device) in devices.iter().enumerate() {
            let want = if n == writer { PAGES } else { 0 };
            for access in [svm::Access::Read, svm::Access::Write] {
                let translated = device.device();
                let translated = translated.nr_translated(region, map.addr, PAGES, access);
                assert_eq!(translated.unwrap(), want, "device {n}, {access:?}");
            }
        }
        // For the next to end them.
        all_read(Some(writer), round);
        assert_eq!(holders().0, all);
    }
    // The CPU's write ends them as well.
    init(map.addr, LEN, |k| k - 5);
    assert_eq!(holders(), (vec![], true));
    all_read(None, -5);
}

/// `devices`, of which the first is the fixture's, are as many as there may be.
fn one_too_many(f: &Fixture, mut devices: Vec<Dmirror>) {
    let refused = Dmirror::new(&f.mm).unwrap_err();
    assert!(matches!(refused.kind(), ErrorKind::Invalid(_)), "{refused}");
    assert!(
        refused.to_string().contains("8 devices are attached"),
        "{refused}"
    );
    assert_eq!(Errno::from(refused), Errno(libc::EINVAL));
    drop(devices.pop());
    let again = f.second();
    let map = Map::new(PAGE, WRITE);
    store(map.addr, 0, 3);
    let mut out = [0; PAGE];
    assert_eq!(again.read(map.addr, &mut out), whole(1));
    assert_eq!(out[..4], 3i32.to_ne_bytes());
}

/// A bare munmap in the middle of an operation. Where the kernel tells of it, the device's translations are gone when it returns.
/// Where it does not (`SVM_DISABLE=events`) they last until the next operation begins, which looks at the mappings; the wrapper takes
/// them at once; and pages that a device alone had are lost, of which the wrapper and `close` tell.
#[test]
fn unheard_calls() {
    each("unheard_calls", |f| {
        let heard = has(Capability::Events);
        for by_wrapper in [false, true] {
            // Apart, so that nobody else's mapping comes there.
            let map = tests::Map::new(1);
            let mirror = map.mirror(&f.options.clone().read_mostly(true));
            let region = mirror.view().region();
            let device = f.dev.device();
            let page = map.addr..map.addr + PAGE;
            device
                .fault_in(region, map.addr, PAGE, svm::Access::Read)
                .unwrap();
            let mut operation = device.begin(region, svm::Access::Read).unwrap();
            assert_eq!(operation.copy_translated(page.clone(), |_, _, _| ()), PAGE);
            if by_wrapper {
                // SAFETY: the CPU does not use it any more.
                unsafe { svm::munmap(map.at(0), PAGE) }.unwrap();
            } else {
                map.unmap();
            }
            let kept = if heard || by_wrapper { 0 } else { PAGE };
            // A step through the runtime: through the thread door a bare call's event may be read, but not applied yet.
            assert!(!svm::snapshot(map.addr, 1).unwrap()[0].is_mapped());
            assert_eq!(operation.copy_translated(page.clone(), |_, _, _| ()), kept);
            let fault = operation.fault(page).unwrap_err();
            assert_eq!(fault.kind, svm::DeviceFaultKind::Unmapped);
            operation.finish().unwrap();
            let fault = device.read(region, map.addr, &mut [0; 8]).unwrap_err();
            assert_eq!(Errno::from(fault), Errno(libc::EFAULT));
            // SAFETY: nothing is there.
            unsafe { svm::munmap(map.at(0), PAGE) }.unwrap();
            assert_eq!(mirror.stats().anomalies, 0);
            mirror.close().unwrap();
        }
        // In a child, for what is lost stays where it is.
        assert!(in_child(|| {
            let own = Fixture::new(&f.options);
            let map = tests::Map::new(1);
            let mirror = map.mirror(&f.options);
            let region = mirror.view().region();
            own.dev.device().write(region, map.addr, &[1; 8]).unwrap();
            map.unmap();
            let lost = |result: Result<(), svm::Error>| match result {
                Ok(()) => heard,
                Err(error) => !heard && *error.kind() == ErrorKind::Lost,
            };
            // SAFETY: nothing is there.
            lost(unsafe { svm::munmap(map.at(0), PAGE) }) && lost(mirror.close())
        }));
    });
}
