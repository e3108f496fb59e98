//! `svm::{munmap, mremap, madvise, mprotect}`: when they return no device holds a translation to what has changed, and nothing
//! of the old contents is seen. What they are on memory that is not mirrored: `passthrough.rs`.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]
#![cfg(target_os = "linux")]

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use svm::{Access, Delivery, DeviceFaultKind, ErrorKind, Granule, Mirror, Options, View};
use tests::device::fault_in;
use tests::mapping::{READ_WRITE, each, each_of, errno};
use tests::{Map, TestDevice};

const PAGE: usize = 4096;
const PAGES: usize = 64;

/// The kernel refuses it, whatever is mirrored there and whatever it tells of; and the call does not wait for itself.
#[test]
fn a_move_over_its_own_range_is_refused_at_once() {
    each("a_move_over_its_own_range_is_refused_at_once", |options| {
        let (map, mirror, device) = mirrored(options);
        let (len, flags) = (16 * PAGE, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        // SAFETY: nothing comes of it.
        let moved = unsafe { svm::mremap(map.at(0), len, len, flags, map.at(8)) };
        assert_eq!(moved.unwrap_err().os_error(), Some(libc::EINVAL));
        assert_eq!(read(&device, mirror.view(), 9), Ok(10));
        assert_eq!(map.read(20), 21);
        mirror.close().unwrap();
        map.unmap();
    });
}

/// A map, its mirror, and a device that has some of it to itself, some as duplicates, and has given some back.
fn mirrored(options: &Options) -> (Map, Mirror<'static, u8>, TestDevice) {
    let map = Map::new(PAGES);
    let mirror = map.mirror(options);
    let device = TestDevice::new().unwrap();
    fault_in(&device, &mirror, 0, PAGES, Access::Read);
    fault_in(&device, &mirror, 0, PAGES / 2, Access::Write);
    (0..PAGES)
        .step_by(7)
        .for_each(|page| assert_eq!(map.read(page), page as u64 + 1));
    (map, mirror, device)
}

fn read(device: &TestDevice, view: View<'_, u8>, page: usize) -> Result<u64, DeviceFaultKind> {
    let mut out = [0; 8];
    device
        .read(view.region(), view.addr() + page * PAGE, &mut out)
        .map_err(|e| e.device_fault().unwrap().kind)?;
    Ok(u64::from_ne_bytes(out))
}

fn write(
    device: &TestDevice,
    view: View<'_, u8>,
    page: usize,
    value: u64,
) -> Result<(), DeviceFaultKind> {
    device
        .write(
            view.region(),
            view.addr() + page * PAGE,
            &value.to_ne_bytes(),
        )
        .map_err(|e| e.device_fault().unwrap().kind)
}

fn nr_translated(device: &TestDevice, mirror: &Mirror<'_, u8>, first: usize, n: usize) -> usize {
    let view = mirror.view();
    device
        .nr_translated(view.region(), view.addr() + first * PAGE, n, Access::Read)
        .unwrap()
}

fn munmap(map: &Map, first: usize, pages: usize) {
    // SAFETY: memory of the test's.
    unsafe { svm::munmap(map.at(first), pages * PAGE) }.unwrap();
}

fn madvise(map: &Map, first: usize, pages: usize, advice: i32) {
    // SAFETY: memory of the test's.
    unsafe { svm::madvise(map.at(first), pages * PAGE, advice) }.unwrap();
}

fn mprotect(map: &Map, first: usize, pages: usize, prot: i32) {
    // SAFETY: memory of the test's, which touches what it may.
    unsafe { svm::mprotect(map.at(first), pages * PAGE, prot) }.unwrap();
}

#[test]
fn unmapping_a_part() {
    each("unmapping_a_part", |options| {
        for (first, pages) in [(0, 8), (PAGES - 8, 8), (20, 10), (0, PAGES)] {
            let (map, mirror, device) = mirrored(options);
            munmap(&map, first, pages);
            assert_eq!(nr_translated(&device, &mirror, first, pages), 0);
            for page in 0..PAGES {
                let gone = (first..first + pages).contains(&page);
                let found = read(&device, mirror.view(), page);
                if gone {
                    assert_eq!(found, Err(DeviceFaultKind::Unmapped));
                } else {
                    assert_eq!(found, Ok(page as u64 + 1), "{options:?}");
                    assert_eq!(map.read(page), page as u64 + 1);
                }
            }
            // What is mapped there now is nobody's mirror.
            let anew = Map::at_hint(
                map.addr + first * PAGE,
                pages,
                READ_WRITE,
                libc::MAP_FIXED_NOREPLACE,
            );
            (0..pages).for_each(|page| assert_eq!(anew.read(page), 0));
            anew.write(0, 9);
            assert_eq!(
                read(&device, mirror.view(), first),
                Err(DeviceFaultKind::Unmapped)
            );
            let again = anew.mirror(options);
            assert_eq!(read(&device, again.view(), 0), Ok(9));
            assert_eq!(mirror.stats().anomalies, 0);
            mirror.close().unwrap();
            again.close().unwrap();
            (0..PAGES)
                .filter(|p| !(first..first + pages).contains(p))
                .for_each(|page| {
                    assert_eq!(map.read(page), page as u64 + 1);
                });
            map.unmap();
        }
    });
}

#[test]
fn discarding() {
    each("discarding", |options| {
        for advice in [
            libc::MADV_DONTNEED,
            libc::MADV_FREE,
            24, /* DONTNEED_LOCKED */
        ] {
            let (map, mirror, device) = mirrored(options);
            for round in 1..4u64 {
                madvise(&map, 8, 40, advice);
                assert_eq!(
                    nr_translated(&device, &mirror, 8, 40),
                    0,
                    "advice {advice} {options:?}"
                );
                // At once: nothing pends, nothing waits.
                for page in 0..PAGES {
                    let kept = !(8..48).contains(&page);
                    let wanted = if kept { page as u64 + 1 } else { 0 };
                    if page % 2 == 0 {
                        assert_eq!(
                            read(&device, mirror.view(), page),
                            Ok(wanted),
                            "{page} {options:?}"
                        );
                    } else {
                        assert_eq!(map.read(page), wanted, "{page} {options:?}");
                    }
                }
                for page in 8..48 {
                    if page % 3 == 0 {
                        write(&device, mirror.view(), page, round).unwrap();
                    } else {
                        map.write(page, round);
                    }
                    assert_eq!(map.read(page), round);
                    assert_eq!(read(&device, mirror.view(), page), Ok(round));
                }
            }
            assert_eq!(mirror.stats().anomalies, 0);
            mirror.close().unwrap();
            assert_eq!((map.read(7), map.read(8), map.read(48)), (8, 3, 49));
            map.unmap();
        }
    });
}

#[test]
fn moving() {
    each("moving", |options| {
        // Elsewhere and larger; elsewhere by name over another mirror; smaller, in place; and larger, if there is room.
        let (map, mirror, device) = mirrored(options);
        // SAFETY: memory of the test's.
        let to = unsafe {
            svm::mremap(
                map.at(16),
                32 * PAGE,
                48 * PAGE,
                libc::MREMAP_MAYMOVE,
                ptr::null_mut(),
            )
        }
        .unwrap();
        let moved = Map {
            addr: to.expose_provenance(),
            pages: 48,
        };
        assert_eq!(nr_translated(&device, &mirror, 16, 32), 0);
        for page in 0..48 {
            assert_eq!(
                moved.read(page),
                if page < 32 { page as u64 + 17 } else { 0 },
                "{options:?}"
            );
            moved.write(page, 5);
            assert_eq!(moved.read(page), 5);
        }
        assert_eq!(
            read(&device, mirror.view(), 20),
            Err(DeviceFaultKind::Unmapped)
        );
        assert_eq!(read(&device, mirror.view(), 1), Ok(2));

        let (target, target_mirror, target_device) = mirrored(options);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: memory of the test's.
        let to =
            unsafe { svm::mremap(moved.at(0), 48 * PAGE, 8 * PAGE, flags, target.at(4)) }.unwrap();
        assert_eq!(to, target.at(4));
        assert_eq!(nr_translated(&target_device, &target_mirror, 4, 8), 0);
        assert_eq!(
            read(&target_device, target_mirror.view(), 4),
            Err(DeviceFaultKind::Unmapped)
        );
        assert_eq!(read(&target_device, target_mirror.view(), 12), Ok(13));
        (0..PAGES).for_each(|page| {
            let wanted = if (4..12).contains(&page) {
                5
            } else {
                page as u64 + 1
            };
            assert_eq!(target.read(page), wanted);
        });

        // SAFETY: memory of the test's.
        let same = unsafe { svm::mremap(target.at(12), 52 * PAGE, 20 * PAGE, 0, ptr::null_mut()) }
            .unwrap();
        assert_eq!(same, target.at(12));
        assert_eq!(
            read(&target_device, target_mirror.view(), 32),
            Err(DeviceFaultKind::Unmapped)
        );
        assert_eq!(read(&target_device, target_mirror.view(), 31), Ok(32));
        assert_eq!(target.read(31), 32);
        // SAFETY: memory of the test's, with room behind it, which somebody else may have taken.
        let grown = unsafe { svm::mremap(target.at(12), 20 * PAGE, 21 * PAGE, 0, ptr::null_mut()) };
        match grown {
            Ok(same) => {
                assert_eq!(same, target.at(12));
                assert_eq!(target.read(32), 0);
                target.write(32, 4);
                assert_eq!(target.read(32), 4);
            }
            Err(error) => assert_eq!(error.os_error(), Some(libc::ENOMEM)),
        }
        assert_eq!(
            mirror.stats().anomalies + target_mirror.stats().anomalies,
            0
        );
        target_mirror.close().unwrap();
        mirror.close().unwrap();
        assert_eq!((target.read(4), target.read(13), map.read(3)), (5, 14, 4));
    });
}

#[test]
fn moving_and_leaving_the_range_mapped() {
    each("moving_and_leaving_the_range_mapped", |options| {
        // By the wrapper, and by a bare call where it is heard of.
        for bare in [false, true] {
            if bare && !svm::Capabilities::probe().has(svm::Capability::Events) {
                continue;
            }
            let (map, mirror, device) = mirrored(options);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
            let len = 32 * PAGE;
            let to = if bare {
                // SAFETY: memory of the test's.
                unsafe { libc::mremap(map.at(16).cast(), len, len, flags, ptr::null_mut::<u8>()) }
                    .cast()
            } else {
                // SAFETY: memory of the test's.
                unsafe { svm::mremap(map.at(16), len, len, flags, ptr::null_mut()) }.unwrap()
            };
            assert_ne!(to.cast(), libc::MAP_FAILED);
            let moved = Map {
                addr: to.expose_provenance(),
                pages: 32,
            };
            assert_eq!(nr_translated(&device, &mirror, 16, 32), 0);
            for page in 0..32 {
                assert_eq!(map.read(16 + page), 0, "the old range, {bare} {options:?}");
                map.write(16 + page, 2);
                assert_eq!(
                    moved.read(page),
                    page as u64 + 17,
                    "the new range, {bare} {options:?}"
                );
                moved.write(page, 3);
                assert_eq!((map.read(16 + page), moved.read(page)), (2, 3));
            }
            // Where the move is not heard of the old range is still the mirror's; where it is, it has left it.
            match read(&device, mirror.view(), 20) {
                Ok(value) => assert_eq!(value, 2),
                Err(kind) => assert_eq!(kind, DeviceFaultKind::Unmapped),
            }
            assert_eq!(read(&device, mirror.view(), 1), Ok(2));
            assert_eq!(mirror.stats().anomalies, 0);
            mirror.close().unwrap();
            assert_eq!((map.read(20), moved.read(20), map.read(1)), (2, 3, 2));
            // It is memory like any other, and can be mirrored.
            let again = map.mirror(options);
            assert_eq!(read(&device, again.view(), 20), Ok(2));
            again.close().unwrap();
            map.unmap();
            moved.unmap();
        }
    });
}

/// Where the last access died of the protection, and how many have.
static DENIED_AT: AtomicUsize = AtomicUsize::new(0);
static DENIED: AtomicUsize = AtomicUsize::new(0);

/// Notes the denial and permits the access, which is then tried again.
extern "C" fn on_denial(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo of a SIGSEGV.
    let at = unsafe { (*info).si_addr() }.addr();
    DENIED_AT.store(at, Ordering::SeqCst);
    DENIED.fetch_add(1, Ordering::SeqCst);
    let page: *mut libc::c_void = ptr::with_exposed_provenance_mut(at & !(PAGE - 1));
    // SAFETY: a page of the test's, or the process dies of the next denial.
    if unsafe { libc::mprotect(page, PAGE, READ_WRITE) } != 0
        || DENIED.load(Ordering::SeqCst) > 10_000
    {
        // SAFETY: async-signal-safe.
        unsafe { libc::abort() };
    }
}

/// Whether `access` was denied by the protection; it is permitted from then on.
fn is_denied(map: &Map, page: usize, access: impl FnOnce()) -> bool {
    let before = DENIED.load(Ordering::SeqCst);
    access();
    let denied = DENIED.load(Ordering::SeqCst) != before;
    assert!(!denied || DENIED_AT.load(Ordering::SeqCst) & !(PAGE - 1) == map.at(page).addr());
    denied
}

#[test]
fn protecting() {
    each("protecting", |options| {
        // SAFETY: all bytes zero are a `sigaction`.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_denial as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: a handler that does what a handler may; Rust's own would only name the overflow of a stack.
        let set = unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, ptr::null_mut()) };
        assert_eq!(set, 0);

        let (map, mirror, device) = mirrored(options);
        let view = mirror.view();
        let (start, len) = (view.addr(), PAGES * PAGE);
        // An operation in progress, with its translations: nothing but the call revokes them.
        let mut session = device.begin(view.region(), Access::Write).unwrap();
        session.fault(start..start + len).unwrap();
        assert_eq!(
            session.copy_translated(start..start + len, |_, _, _| {}),
            len
        );
        mprotect(&map, 8, 16, libc::PROT_READ);
        mprotect(&map, 32, 16, libc::PROT_NONE);
        assert_eq!(
            session.copy_translated(start + 8 * PAGE..start + 24 * PAGE, |_, _, _| {}),
            0
        );
        assert_eq!(
            session.copy_translated(start + 32 * PAGE..start + 48 * PAGE, |_, _, _| {}),
            0
        );
        assert_eq!(
            session.copy_translated(start..start + 8 * PAGE, |_, _, _| {}),
            8 * PAGE
        );
        let kind = |session: &mut tests::device::Session<'_>, page: usize| {
            let at = start + page * PAGE;
            session.fault(at..at + PAGE).unwrap_err().kind
        };
        assert_eq!(kind(&mut session, 8), DeviceFaultKind::Protection);
        assert_eq!(kind(&mut session, 47), DeviceFaultKind::NoAccess);
        drop(session);
        // Reading goes on where reading is permitted, wherever the page is.
        assert_eq!(read(&device, view, 9), Ok(10), "{options:?}");
        assert_eq!(read(&device, view, 33), Err(DeviceFaultKind::NoAccess));
        assert_eq!(write(&device, view, 9, 1), Err(DeviceFaultKind::Protection));
        // The CPU, too, when the pages come home.
        for page in 8..24 {
            assert!(!is_denied(&map, page, || assert_eq!(
                map.read(page),
                page as u64 + 1
            )));
            assert!(
                is_denied(&map, page, || map.write(page, 100)),
                "page {page} {options:?}"
            );
            assert_eq!(map.read(page), 100);
        }
        for page in 32..48 {
            assert!(
                is_denied(&map, page, || assert_eq!(map.read(page), page as u64 + 1)),
                "page {page} {options:?}"
            );
            map.write(page, 200);
        }
        // What was permitted behind the device's back serves it again.
        assert_eq!(write(&device, view, 9, 7), Ok(()));
        assert_eq!((map.read(9), map.read(10)), (7, 100));
        // Protected while it is away, and brought home by the end of the mirror.
        fault_in(&device, &mirror, 0, PAGES, Access::Write);
        mprotect(&map, 0, 4, libc::PROT_READ);
        mprotect(&map, 4, 4, libc::PROT_NONE);
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
        assert_eq!(map.read(0), 1);
        assert!(is_denied(&map, 0, || map.write(0, 50)));
        assert!(is_denied(&map, 4, || assert_eq!(map.read(4), 5)));
        // Permitted again by the wrapper: nothing is denied.
        mprotect(&map, 0, PAGES, READ_WRITE);
        (0..PAGES).for_each(|page| assert!(!is_denied(&map, page, || map.write(page, 1))));
        map.unmap();
    });
}

/// Memory that is accessed where it is has no events at all: the calls alone can take the translations.
#[test]
fn memory_in_place_is_let_go_of() {
    each("memory_in_place_is_let_go_of", |options| {
        let map = Map::at_hint(0, PAGES, READ_WRITE, libc::MAP_SHARED);
        (0..PAGES).for_each(|page| map.write(page, page as u64 + 1));
        let mirror = map.mirror(options);
        assert!(mirror.is_in_place());
        let device = TestDevice::new().unwrap();
        fault_in(&device, &mirror, 0, PAGES, Access::Write);
        assert_eq!(nr_translated(&device, &mirror, 0, PAGES), PAGES);
        mprotect(&map, 0, 8, libc::PROT_NONE);
        assert_eq!(nr_translated(&device, &mirror, 0, PAGES), PAGES - 8);
        munmap(&map, 8, 8);
        assert_eq!(nr_translated(&device, &mirror, 0, PAGES), PAGES - 16);
        assert_eq!(
            read(&device, mirror.view(), 0),
            Err(DeviceFaultKind::NoAccess)
        );
        assert_eq!(
            read(&device, mirror.view(), 8),
            Err(DeviceFaultKind::Unmapped)
        );
        assert_eq!(read(&device, mirror.view(), 16), Ok(17));
        mirror.close().unwrap();
        map.unmap();
    });
}

/// `MADV_REMOVE` takes the pages out of the file under a shared mapping: no device has a translation when the call has returned, and
/// everybody finds zeros.
#[test]
fn what_is_removed_from_a_file_is_let_go_of() {
    each("what_is_removed_from_a_file_is_let_go_of", |options| {
        for in_memfd in [false, true] {
            let map = if in_memfd {
                shared_file(PAGES)
            } else {
                Map::at_hint(0, PAGES, READ_WRITE, libc::MAP_SHARED)
            };
            (0..PAGES).for_each(|page| map.write(page, page as u64 + 1));
            let mirror = map.mirror(options);
            assert!(mirror.is_in_place());
            let view = mirror.view();
            let device = TestDevice::new().unwrap();
            for round in 1..3u64 {
                fault_in(&device, &mirror, 0, PAGES, Access::Write);
                let before = mirror.stats();
                madvise(&map, 8, 16, libc::MADV_REMOVE);
                // Of these it has none, and of the others all.
                assert_eq!(nr_translated(&device, &mirror, 8, 16), 0, "{options:?}");
                assert_eq!(nr_translated(&device, &mirror, 0, PAGES), PAGES - 16);
                assert!((mirror.stats() - before).invalidations > 0);
                for page in 0..PAGES {
                    let gone = (8..24).contains(&page);
                    let wanted = if gone { 0 } else { page as u64 + 1 };
                    if page % 2 == 0 {
                        assert_eq!(read(&device, view, page), Ok(wanted), "{page} {options:?}");
                    }
                    assert_eq!(map.read(page), wanted, "{page} {options:?}");
                }
                // It is memory like any other, for both sides.
                for page in 8..24 {
                    write(&device, view, page, round).unwrap();
                    assert_eq!(map.read(page), round);
                }
            }
            assert_eq!(mirror.stats().anomalies, 0);
            mirror.close().unwrap();
            assert_eq!((map.read(7), map.read(8), map.read(24)), (8, 2, 25));
            map.unmap();
        }
    });
}

/// A shared mapping of a file in memory.
fn shared_file(pages: usize) -> Map {
    // SAFETY: a name that lives as long as the call.
    let fd = unsafe { libc::memfd_create(c"removed from".as_ptr(), libc::MFD_CLOEXEC) };
    assert_ne!(fd, -1, "{}", io::Error::last_os_error());
    // SAFETY: the file just made, and a mapping of it wherever there is room.
    let at = unsafe {
        assert_eq!(libc::ftruncate(fd, (pages * PAGE) as libc::off_t), 0);
        libc::mmap(
            ptr::null_mut(),
            pages * PAGE,
            READ_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    // SAFETY: the mapping keeps the file.
    unsafe { libc::close(fd) };
    Map {
        addr: at.expose_provenance(),
        pages,
    }
}

/// A pinned page is accessed in place. Unmapped all the same, by a bare call, no device may still reach it.
#[test]
fn a_pinned_page_that_is_unmapped_is_let_go_of() {
    each("a_pinned_page_that_is_unmapped_is_let_go_of", |options| {
        for bare in [true, false] {
            if bare && !svm::Capabilities::probe().has(svm::Capability::Events) {
                continue;
            }
            let (map, mirror, device) = mirrored(options);
            let pin = mirror.pin(0..8 * PAGE).unwrap();
            fault_in(&device, &mirror, 0, 8, Access::Write);
            assert_eq!(nr_translated(&device, &mirror, 0, 8), 8);
            if bare {
                // SAFETY: memory of the test's.
                assert_eq!(unsafe { libc::munmap(map.at(0).cast(), 4 * PAGE) }, 0);
                // Through the thread door the reader may be at it still; a round goes through the gate.
                assert_eq!(read(&device, mirror.view(), 20), Ok(21));
            } else {
                munmap(&map, 0, 4);
            }
            assert_eq!(
                nr_translated(&device, &mirror, 0, 4),
                0,
                "bare: {bare} {options:?}"
            );
            assert_eq!(
                read(&device, mirror.view(), 1),
                Err(DeviceFaultKind::Unmapped)
            );
            assert_eq!(read(&device, mirror.view(), 4), Ok(5));
            drop(pin);
            mirror.close().unwrap();
            map.unmap();
        }
    });
}

#[test]
fn memory_that_is_nowhere_is_no_mirror() {
    each("memory_that_is_nowhere_is_no_mirror", |options| {
        let at = ptr::with_exposed_provenance_mut::<u8>;
        let map = Map::new(PAGES);
        let wrapping = [
            (0, PAGE),
            (0, 0),
            (usize::MAX, 1),
            (usize::MAX - 5, PAGE),
            (!(PAGE - 1), PAGE),
            (map.addr, usize::MAX),
            (map.addr, usize::MAX - map.addr + 1),
        ];
        for (addr, len) in wrapping {
            // SAFETY: nothing comes of it.
            let error = unsafe { svm::mirror_raw(at(addr), len, options) }.unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::Invalid(_)),
                "{addr:#x} and {len:#x}: {error}"
            );
            assert_eq!((error.operation(), error.os_error()), ("mirror", None));
        }
        // Nothing has come of it: this is memory, and can be mirrored.
        let mirror = map.mirror(options);
        let device = TestDevice::new().unwrap();
        assert_eq!(read(&device, mirror.view(), 3), Ok(4));
        mirror.close().unwrap();
        map.unmap();
    });
}

#[test]
fn errors_are_typed() {
    each("errors_are_typed", |options| {
        let (map, mirror, _device) = mirrored(options);
        // SAFETY: nothing comes of these calls.
        let refused = unsafe {
            [
                svm::munmap(map.at(0).wrapping_add(1), PAGE).unwrap_err(),
                svm::madvise(map.at(0), PAGE, -1).unwrap_err(),
                svm::mremap(map.at(0), PAGE, 0, 0, ptr::null_mut()).unwrap_err(),
                svm::mprotect(map.at(0).wrapping_add(1), PAGE, 0).unwrap_err(),
            ]
        };
        for (error, name) in refused
            .iter()
            .zip(["munmap", "madvise", "mremap", "mprotect"])
        {
            assert!(matches!(error.kind(), ErrorKind::Invalid(_)), "{error}");
            assert_eq!(
                (error.os_error(), error.operation()),
                (Some(libc::EINVAL), name)
            );
        }
        munmap(&map, 8, 1);
        // SAFETY: it fails at the hole, and has done the rest.
        let hole = unsafe { svm::madvise(map.at(0), 16 * PAGE, libc::MADV_DONTNEED) }.unwrap_err();
        assert_eq!(
            (hole.kind(), hole.os_error()),
            (&ErrorKind::Unmapped, Some(libc::ENOMEM))
        );
        assert_eq!((map.read(0), map.read(15), map.read(16)), (0, 0, 17));
        // SAFETY: as above; nothing is mapped there.
        let hole = unsafe {
            svm::mremap(
                map.at(8),
                PAGE,
                2 * PAGE,
                libc::MREMAP_MAYMOVE,
                ptr::null_mut(),
            )
        }
        .unwrap_err();
        assert_eq!(
            (hole.kind(), hole.os_error()),
            (&ErrorKind::Unmapped, Some(libc::EFAULT))
        );
        mirror.close().unwrap();
        map.unmap();
    });
}

/// While kernels hammer a page through every way a device has, a thread changes its mapping by the wrappers, and says what it has
/// done only when they have returned: whoever reads it then sees nothing older. Through both doors: there is no window.
#[test]
fn nothing_stale_is_seen_after_a_call_has_returned() {
    each(
        "nothing_stale_is_seen_after_a_call_has_returned",
        |options| {
            if options != &Options::new().delivery(Delivery::Inline)
                && options != &Options::new().delivery(Delivery::Thread)
            {
                return;
            }
            let accel =
                accel_sim::Accelerator::with_options(accel_sim::Options::new().workers(2)).unwrap();
            let map = Map::at_hint(0, 2 * 16, READ_WRITE, 0);
            let mut mirror = map.mirror(options);
            // What was discarded last, and whether there is more to come.
            let (discarded, stop) = (AtomicU64::new(0), AtomicBool::new(false));
            let shared = mirror.share();
            std::thread::scope(|scope| {
                let (discarded, stop) = (&discarded, &stop);
                scope.spawn(move || {
                    let end = Instant::now() + Duration::from_millis(400);
                    for round in 1.. {
                        map.write(3, round << 8);
                        std::thread::yield_now();
                        madvise(
                            &map,
                            0,
                            16,
                            if round % 2 == 0 {
                                libc::MADV_DONTNEED
                            } else {
                                libc::MADV_FREE
                            },
                        );
                        discarded.store(round, Ordering::SeqCst);
                        if Instant::now() > end {
                            break;
                        }
                    }
                    stop.store(true, Ordering::SeqCst);
                });
                let (seen, looks) = (AtomicU64::new(0), AtomicU64::new(0));
                while !stop.load(Ordering::SeqCst) {
                    accel
                        .run_items(2, shared.view(), |lane, _, _| {
                            let at = svm::Ptr::<u64>::from_addr(map.addr + 3 * PAGE);
                            for _ in 0..200 {
                                let gone = discarded.load(Ordering::SeqCst);
                                let value = lane.load(at)? >> 8;
                                assert!(
                                    value == 0 || value > gone,
                                    "round {value} after {gone} was discarded"
                                );
                                seen.fetch_max(value, Ordering::Relaxed);
                                looks.fetch_add(1, Ordering::Relaxed);
                            }
                            Ok(())
                        })
                        .unwrap();
                }
                assert!(
                    seen.into_inner() > 0,
                    "no kernel ever saw a value in {looks:?} looks: the test tested nothing"
                );
                assert!(
                    discarded.load(Ordering::SeqCst) > 20,
                    "{discarded:?} rounds"
                );
            });
            mirror.close().unwrap();
            map.unmap();
        },
    );
}

/// A mirror in more pieces than its hub has slots for invalidations, and two calls over all of it at once.
#[test]
fn a_mirror_in_many_pieces() {
    // Pieces are taken one by one, whatever a granule is.
    each_of(&[Granule::Big], "a_mirror_in_many_pieces", |options| {
        const PIECES: usize = 70;
        let map = Map::new(2 * PIECES);
        let mirror = map.mirror(options);
        let device = TestDevice::new().unwrap();
        fault_in(&device, &mirror, 0, 2 * PIECES, Access::Write);
        (0..PIECES).for_each(|piece| munmap(&map, 2 * piece + 1, 1));
        let all = |call: &dyn Fn(*mut u8, usize) -> svm::Result<()>| {
            // There are holes, which each of these says and goes on.
            assert_eq!(errno(call(map.at(0), 2 * PIECES * PAGE)), libc::ENOMEM);
        };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..3 {
                        // SAFETY: memory of the test's, which counts on nothing there.
                        all(&|at, len| unsafe { svm::madvise(at, len, libc::MADV_DONTNEED) });
                    }
                });
            }
        });
        for page in (0..2 * PIECES).step_by(2) {
            assert_eq!(read(&device, mirror.view(), page), Ok(0));
            assert_eq!(map.read(page), 0);
        }
        // All of it goes at once.
        munmap(&map, 0, 2 * PIECES);
        assert_eq!(
            read(&device, mirror.view(), 0),
            Err(DeviceFaultKind::Unmapped)
        );
        mirror.close().unwrap();
    });
}

/// One thread mirrors a range while another unmaps half of it. Whoever comes first, the device has no translation to that half
/// afterwards, and nothing is lost of the other.
#[test]
fn mirroring_beside_an_unmapping() {
    const HALF: usize = 8;
    each("mirroring_beside_an_unmapping", |options| {
        let device = TestDevice::new().unwrap();
        let fault_in = |addr: usize, pages: usize, mirror: &Mirror<'_, u8>| {
            device.fault_in(mirror.view().region(), addr, pages * PAGE, Access::Write)
        };
        for n in 0..40 {
            let map = Map::new(2 * HALF);
            let gone = map.addr + HALF * PAGE;
            let start = std::sync::Barrier::new(2);
            let mirror = std::thread::scope(|scope| {
                scope.spawn(|| {
                    start.wait();
                    for _ in 0..n * 50 {
                        std::hint::spin_loop();
                    }
                    // SAFETY: the CPU does not use it any more.
                    unsafe { svm::munmap(map.at(HALF), HALF * PAGE) }.unwrap();
                });
                start.wait();
                let mirror = map.mirror(options);
                // As much of it as is there still.
                let _ = fault_in(map.addr, 2 * HALF, &mirror);
                mirror
            });
            let fault = fault_in(gone, 1, &mirror).unwrap_err();
            assert_eq!(
                fault.device_fault().unwrap().kind,
                DeviceFaultKind::Unmapped
            );
            let held = svm::snapshot(gone, HALF).unwrap();
            assert!(held.iter().all(|page| !page.is_on_a_device()));
            assert!((0..HALF).all(|page| map.read(page) == page as u64 + 1));
            mirror.close().unwrap();
            // SAFETY: the test is done with it.
            let unmapped = unsafe { libc::munmap(map.at(0).cast(), HALF * PAGE) };
            assert_eq!(unmapped, 0);
        }
    });
}
