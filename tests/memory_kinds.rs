//! Each kind of memory: what migrates, and what is served in place. The table in `svm::mirror`'s module is this test in words.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use svm::{Delivery, Granule, Mirror, Options};
use tests::{TestDevice, Watchdog, usable};

const PAGE: usize = 4096;
const LEN: usize = 64 * PAGE;
const HUGE: usize = 2 << 20;

const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// Pages go to the device's memory and come home.
    Migrates,
    /// The device works at the host's address, and no page moves.
    InPlace,
}

fn map(len: usize, protection: i32, flags: i32, fd: i32) -> Option<usize> {
    // SAFETY: a fresh mapping; tests leak it, but for what a process of tests has room.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, 0) };
    (at != libc::MAP_FAILED).then(|| at.expose_provenance())
}

fn each(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::new(name);
    if !usable() {
        return;
    }
    for delivery in [Delivery::Inline, Delivery::Thread] {
        for granule in [Granule::Page, Granule::Big, Granule::Huge] {
            test(&Options::new().delivery(delivery).granule(granule));
        }
    }
}

/// The device adds one to the first byte of each page and the CPU adds one more, twice over; contents and movements are checked.
fn exercise(mirror: &mut Mirror<'_, u8>, expected: Expected) {
    let device = TestDevice::new().unwrap();
    let before = mirror.as_slice()[0];
    for round in 0..2u8 {
        for page in (0..mirror.len()).step_by(PAGE) {
            let view = mirror.view_mut();
            let mut byte = [0];
            device
                .read(view.region(), view.addr() + page, &mut byte)
                .unwrap();
            assert_eq!(byte[0], before.wrapping_add(2 * round));
            device
                .write(
                    view.region(),
                    view.addr() + page,
                    &[byte[0].wrapping_add(1)],
                )
                .unwrap();
        }
        let stats = device.attachment().stats();
        match expected {
            Expected::Migrates => {
                assert!(stats.to_device_pages() > 0 && device.attachment().resident_bytes() > 0);
            }
            Expected::InPlace => {
                assert_eq!(
                    (
                        stats.to_device_pages(),
                        device.attachment().resident_bytes()
                    ),
                    (0, 0)
                );
                assert!(stats.in_place_pages > 0);
            }
        }
        for byte in mirror.as_mut_slice().iter_mut().step_by(PAGE) {
            assert_eq!(*byte, before.wrapping_add(2 * round + 1));
            *byte = byte.wrapping_add(1);
        }
        assert_eq!(mirror.is_in_place(), expected == Expected::InPlace);
    }
    assert_eq!(mirror.stats().anomalies, 0);
}

fn check(addr: usize, len: usize, options: &Options, expected: Expected) {
    // SAFETY: memory of the test's own, read-write.
    let mut mirror =
        unsafe { svm::mirror_raw(ptr::with_exposed_provenance_mut(addr), len, options) }.unwrap();
    exercise(&mut mirror, expected);
    mirror.close().unwrap();
}

fn unmap(addr: usize, len: usize) {
    // SAFETY: the test's own mapping.
    unsafe { libc::munmap(ptr::with_exposed_provenance_mut(addr), len) };
}

fn ask_for_huge_pages(addr: usize) {
    let at = ptr::with_exposed_provenance_mut(addr);
    // SAFETY: advice on the test's own mapping.
    assert_eq!(unsafe { libc::madvise(at, HUGE, libc::MADV_HUGEPAGE) }, 0);
}

fn protect(addr: usize, protection: i32) {
    let at = ptr::with_exposed_provenance_mut(addr);
    // SAFETY: the test's own mapping.
    assert_eq!(unsafe { libc::mprotect(at, LEN, protection) }, 0);
}

fn file() -> OwnedFd {
    // SAFETY: the path is a C string.
    let fd = unsafe { libc::open(c"/tmp".as_ptr(), libc::O_TMPFILE | libc::O_RDWR, 0o600) };
    sized(fd)
}

fn memfd() -> OwnedFd {
    // SAFETY: the name is a C string.
    sized(unsafe { libc::memfd_create(c"svm-test".as_ptr(), libc::MFD_CLOEXEC) })
}

fn sized(fd: i32) -> OwnedFd {
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: just opened, and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a file of ours.
    assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), LEN as i64) }, 0);
    fd
}

#[test]
fn private_anonymous_memory_migrates() {
    each("anonymous", |options| {
        let addr = map(LEN, WRITE, ANONYMOUS, -1).unwrap();
        check(addr, LEN, options, Expected::Migrates);
        unmap(addr, LEN);
    });
}

#[test]
fn transparent_huge_pages_migrate() {
    each("huge", |options| {
        let start = map(2 * HUGE, WRITE, ANONYMOUS, -1).unwrap();
        let addr = start.next_multiple_of(HUGE);
        let at = ptr::with_exposed_provenance_mut::<u8>(addr);
        ask_for_huge_pages(addr);
        // SAFETY: inside the mapping.
        unsafe { at.write_volatile(0) };
        check(addr, HUGE, options, Expected::Migrates);
        unmap(start, 2 * HUGE);
    });
}

#[test]
fn the_huge_zero_page_migrates() {
    each("huge zero", |options| {
        let start = map(2 * HUGE, WRITE, ANONYMOUS, -1).unwrap();
        let addr = start.next_multiple_of(HUGE);
        let at = ptr::with_exposed_provenance_mut::<u8>(addr);
        ask_for_huge_pages(addr);
        // SAFETY: inside the mapping.
        assert_eq!(unsafe { at.read_volatile() }, 0);
        check(addr, HUGE, options, Expected::Migrates);
        unmap(start, 2 * HUGE);
    });
}

/// The kernel moves no page of a read-only mapping: devices get duplicates, and the CPU keeps its own.
#[test]
fn read_only_anonymous_memory_is_duplicated() {
    each("read-only", |options| {
        let addr = map(LEN, WRITE, ANONYMOUS, -1).unwrap();
        let at = ptr::with_exposed_provenance_mut::<u8>(addr);
        for page in (0..LEN).step_by(PAGE) {
            // SAFETY: inside the mapping.
            unsafe { at.wrapping_add(page).write_volatile((page / PAGE) as u8) };
        }
        protect(addr, libc::PROT_READ);
        // SAFETY: as above.
        let mirror = unsafe { svm::mirror_raw(at, LEN, options) }.unwrap();
        assert!(!mirror.is_in_place());
        let device = TestDevice::new().unwrap();
        let view = mirror.view();
        let mut out = vec![0; LEN];
        device.read(view.region(), addr, &mut out).unwrap();
        assert_eq!(out, mirror.as_slice());
        assert!(device.attachment().resident_bytes() == LEN);
        assert!(
            svm::snapshot(addr, 64)
                .unwrap()
                .iter()
                .all(|p| p.is_present() && p.is_on_a_device())
        );
        // Made writable, of which nobody is told, and written: the device does not see the old contents.
        protect(addr, WRITE);
        // SAFETY: inside the mapping.
        unsafe { at.write_volatile(99) };
        device.read(view.region(), addr, &mut out[..1]).unwrap();
        assert_eq!(out[0], 99);
        mirror.close().unwrap();
        unmap(addr, LEN);
    });
}

#[test]
fn reserved_huge_pages_are_served_in_place() {
    each("hugetlb", |options| {
        let flags = ANONYMOUS | libc::MAP_HUGETLB;
        let addr = map(HUGE, WRITE, flags, -1).or_else(|| {
            let _ = std::fs::write("/proc/sys/vm/nr_hugepages", "4");
            map(HUGE, WRITE, flags, -1)
        });
        let Some(addr) = addr else {
            tests::skip("no huge pages are reserved, and this process may not reserve them");
            return;
        };
        check(addr, HUGE, options, Expected::InPlace);
        unmap(addr, HUGE);
    });
}

#[test]
fn shared_memory_is_served_in_place() {
    each("shared", |options| {
        let addr = map(LEN, WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).unwrap();
        check(addr, LEN, options, Expected::InPlace);
        unmap(addr, LEN);
        let memfd = memfd();
        for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
            let addr = map(LEN, WRITE, flags, memfd.as_raw_fd()).unwrap();
            check(addr, LEN, options, Expected::InPlace);
            unmap(addr, LEN);
        }
    });
}

#[test]
fn file_mappings_are_served_in_place() {
    each("file", |options| {
        let file = file();
        for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
            let addr = map(LEN, WRITE, flags, file.as_raw_fd()).unwrap();
            check(addr, LEN, options, Expected::InPlace);
            unmap(addr, LEN);
        }
    });
}

#[test]
fn the_stack_is_served_in_place() {
    each("stack", |options| {
        let mut array = [0u8; 16 * PAGE];
        let mut mirror = svm::mirror_with(&mut array, options).unwrap();
        exercise(&mut mirror, Expected::InPlace);
        mirror.close().unwrap();
        assert!(array.iter().step_by(PAGE).all(|&byte| byte == 4));
    });
}

/// Initialised statics lie in a private file mapping.
#[test]
fn initialised_statics_are_served_in_place() {
    each("data", |options| {
        static mut DATA: [u8; 16 * PAGE] = [1; 16 * PAGE];
        let data = &raw mut DATA;
        // SAFETY: this test is its one user, and runs its variants one after another.
        let data: &mut [u8] = unsafe { &mut *data };
        let before = data[0];
        let mut mirror = svm::mirror_with(data, options).unwrap();
        exercise(&mut mirror, Expected::InPlace);
        mirror.close().unwrap();
        assert!(
            data.iter()
                .step_by(PAGE)
                .all(|&byte| byte == before.wrapping_add(4))
        );
    });
}

/// A mirror over a hole: what is mapped into it later is not the mirror's.
#[test]
fn a_hole_is_left_out() {
    each("hole", |options| {
        let addr = map(LEN, WRITE, ANONYMOUS, -1).unwrap();
        unmap(addr + 8 * PAGE, 8 * PAGE);
        // SAFETY: the test's own mapping.
        let mirror =
            unsafe { svm::mirror_raw(ptr::with_exposed_provenance_mut(addr), LEN, options) }
                .unwrap();
        let device = TestDevice::new().unwrap();
        let view = mirror.view();
        let fault = device
            .read(view.region(), addr + 8 * PAGE, &mut [0])
            .unwrap_err();
        assert_eq!(
            fault.device_fault().unwrap().kind,
            svm::DeviceFaultKind::Unmapped
        );
        device.write(view.region(), addr, &[1]).unwrap();
        device.write(view.region(), addr + 16 * PAGE, &[2]).unwrap();
        mirror.close().unwrap();
        unmap(addr, 8 * PAGE);
        unmap(addr + 16 * PAGE, LEN - 16 * PAGE);
    });
}
