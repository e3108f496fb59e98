//! Each kind of memory: what migrates, and what is served in place. The table in `svm::mirror`'s module is this test in words.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::{Mutex, PoisonError};

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
    /// The same, but found out at each page, when it is asked for: the mirror itself does not know.
    InPlaceByPage,
}

fn map(len: usize, protection: i32, flags: i32, fd: i32) -> Option<usize> {
    // SAFETY: a fresh mapping; tests leak it, but for what a process of tests has room.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, 0) };
    (at != libc::MAP_FAILED).then(|| at.expose_provenance())
}

/// Runs a test for both doors and all granules, one test at a time: no more devices at once than there may be, and no mapping of
/// one test's where another has made a hole.
fn each(name: &'static str, test: impl Fn(&Options)) {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::new(name);
    if !usable() {
        return;
    }
    // What decides under a fallback is the kind, not how much of it.
    let granules: &[Granule] = if std::env::var_os("SVM_DISABLE").is_some() {
        &[Granule::Big]
    } else {
        &[Granule::Page, Granule::Big, Granule::Huge]
    };
    let has_inline = svm::Capabilities::probe().has(svm::Capability::Sigbus);
    for delivery in [Delivery::Inline, Delivery::Thread] {
        if delivery == Delivery::Inline && !has_inline {
            tests::skip("there is no inline door without SIGBUS delivery");
            continue;
        }
        for &granule in granules {
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
            Expected::InPlace | Expected::InPlaceByPage => {
                assert_eq!(stats.to_device_pages(), 0);
                assert!(stats.in_place_pages > 0);
                let addr = mirror.as_slice().as_ptr().addr() & !(PAGE - 1);
                let pages = svm::snapshot(addr, mirror.len() / PAGE).unwrap();
                assert!(pages.iter().all(|page| !page.is_on_a_device()));
                // Where pages are copied for want of MOVE it is found out too late: a copy was made, and is stale.
                if expected == Expected::InPlace {
                    assert_eq!(device.attachment().resident_bytes(), 0);
                }
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

fn kind_of(fault: Result<(), svm::Error>) -> svm::DeviceFaultKind {
    fault.unwrap_err().device_fault().unwrap().kind
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

/// KiB of transparent huge pages in the mapping that `addr` is in.
fn huge_kib(addr: usize) -> usize {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start_and_end = |line: &str| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        let parse = |number| usize::from_str_radix(number, 16).ok();
        Some(parse(start)?..parse(end)?)
    };
    let mut lines = smaps.lines();
    lines.find(|line| start_and_end(line).is_some_and(|range| range.contains(&addr)));
    let huge = lines.find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = huge.and_then(|kib| kib.trim().strip_suffix(" kB")?.parse().ok());
    kib.expect("smaps has the mapping")
}

/// Whether the kernel's huge page of zeros is mapped at `addr`. Root looks where the frames are, and what they are; others at what the
/// runtime is told by PAGEMAP_SCAN.
fn is_huge_zero_page(addr: usize) -> bool {
    const FRAME: u64 = (1 << 55) - 1;
    const ZERO_PAGE: u64 = 1 << 24;
    let word = |file: &str, index: u64| {
        let mut word = [0; 8];
        let file = std::fs::File::open(file).ok()?;
        file.read_exact_at(&mut word, index * 8).ok()?;
        Some(u64::from_ne_bytes(word))
    };
    let frame = |page: usize| {
        let entry = word("/proc/self/pagemap", (addr / PAGE + page) as u64)?;
        Some(entry & FRAME).filter(|&frame| frame != 0)
    };
    if let (Some(first), Some(last)) = (frame(0), frame(HUGE / PAGE - 1)) {
        let flags = word("/proc/kpageflags", last).unwrap_or(0);
        return last == first + (HUGE / PAGE - 1) as u64 && flags & ZERO_PAGE != 0;
    }
    let pages = svm::snapshot(addr, HUGE / PAGE).unwrap();
    pages
        .iter()
        .all(|page| page.is_zero_page() && page.is_huge())
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
        if huge_kib(addr) < HUGE / 1024 {
            tests::skip("the kernel gave no huge page");
        } else {
            check(addr, HUGE, options, Expected::Migrates);
        }
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
        if is_huge_zero_page(addr) {
            check(addr, HUGE, options, Expected::Migrates);
        } else {
            tests::skip("no huge page of zeros, or nobody says so");
        }
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
        for sharing in [libc::MAP_PRIVATE, libc::MAP_SHARED] {
            let flags = sharing | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
            let addr = map(HUGE, WRITE, flags, -1).or_else(|| {
                let _ = std::fs::write("/proc/sys/vm/nr_hugepages", "4");
                map(HUGE, WRITE, flags, -1)
            });
            let Some(addr) = addr else {
                tests::skip("no huge pages are reserved, and none can be reserved here");
                return;
            };
            check(addr, HUGE, options, Expected::InPlace);
            unmap(addr, HUGE);
        }
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
        let hole = || kind_of(device.read(view.region(), addr + 8 * PAGE, &mut [0]));
        assert_eq!(hole(), svm::DeviceFaultKind::Unmapped);
        // Unless another test's mapping has come there.
        let flags = ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let at = ptr::with_exposed_provenance_mut(addr + 8 * PAGE);
        // SAFETY: a fresh mapping, and nothing is replaced.
        let late = unsafe { libc::mmap(at, 8 * PAGE, WRITE, flags, -1, 0) };
        assert_eq!(hole(), svm::DeviceFaultKind::Unmapped, "{late:?}");
        device.write(view.region(), addr, &[1]).unwrap();
        device.write(view.region(), addr + 16 * PAGE, &[2]).unwrap();
        mirror.close().unwrap();
        unmap(addr, 8 * PAGE);
        if late == at {
            unmap(addr + 8 * PAGE, 8 * PAGE);
        }
        unmap(addr + 16 * PAGE, LEN - 16 * PAGE);
    });
}

/// What somebody else's userfaultfd is told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Faults {
    Missing,
    Protected,
}

/// A userfaultfd of somebody else's, which has registered the range: its faults are his.
fn others_userfaultfd(addr: usize, len: usize, faults: Faults) -> Option<OwnedFd> {
    const USER_MODE_ONLY: libc::c_int = 1;
    const API: libc::Ioctl = 0xC018_AA3F_u32 as libc::Ioctl;
    const REGISTER: libc::Ioctl = 0xC020_AA00_u32 as libc::Ioctl;
    let flags = libc::O_CLOEXEC | USER_MODE_ONLY;
    // SAFETY: it takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as i32;
    if fd < 0 {
        tests::skip(format!("userfaultfd: {}", std::io::Error::last_os_error()));
        return None;
    }
    // SAFETY: just made, and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // The features asked for (the faults of protected pages), and the mode of registration.
    let (features, mode) = match faults {
        Faults::Missing => (0, 1),
        Faults::Protected => (1, 2),
    };
    let mut api = [0xAAu64, features, 0];
    // SAFETY: `struct uffdio_api` is three words.
    assert_eq!(unsafe { libc::ioctl(fd.as_raw_fd(), API, &raw mut api) }, 0);
    let mut register = [addr as u64, len as u64, mode, 0];
    // SAFETY: `struct uffdio_register` is four words: the range, the mode, the answer.
    let outcome = unsafe { libc::ioctl(fd.as_raw_fd(), REGISTER, &raw mut register) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    Some(fd)
}

#[test]
fn what_another_userfaultfd_has_is_served_in_place() {
    each("another's", |options| {
        let addr = map(LEN, WRITE, ANONYMOUS, -1).unwrap();
        let at = ptr::with_exposed_provenance_mut::<u8>(addr);
        // SAFETY: the test's own mapping. Populated, so that nobody waits for the other's handler.
        unsafe { at.write_bytes(3, LEN) };
        let Some(other) = others_userfaultfd(addr, LEN, Faults::Missing) else {
            return;
        };
        check(addr, LEN, options, Expected::InPlace);
        // It is his still: a page that he has not filled is waited for, by an access of the kernel in vain.
        // SAFETY: nobody needs the contents.
        let discarded = unsafe { libc::madvise(at.cast(), PAGE, libc::MADV_DONTNEED) };
        assert_eq!(discarded, 0);
        let file = memfd();
        // SAFETY: the kernel reads the test's memory, or says that it cannot.
        let wrote = unsafe { libc::write(file.as_raw_fd(), at.cast(), PAGE) };
        assert_eq!(wrote, -1, "the mirror took the range from its owner");
        drop(other);
        unmap(addr, LEN);
    });
}

/// Somebody who takes a snapshot, say, or collects garbage, counts on every write to what he has protected.
#[test]
fn what_another_userfaultfd_protects_beside_a_mirror_stays_protected() {
    const PROTECT: libc::Ioctl = 0xC018_AA06_u32 as libc::Ioctl;
    each("protected beside", |options| {
        let addr = map(LEN, WRITE, ANONYMOUS, -1).unwrap();
        let at = ptr::with_exposed_provenance_mut::<u8>(addr);
        // SAFETY: the test's own mapping.
        unsafe { at.write_bytes(3, LEN) };
        let (beside, len) = (addr + LEN / 2, LEN / 2);
        let Some(other) = others_userfaultfd(beside, len, Faults::Protected) else {
            return;
        };
        let mut protect = [beside as u64, len as u64, 1];
        // SAFETY: `struct uffdio_writeprotect` is three words: the range and the mode.
        let outcome = unsafe { libc::ioctl(other.as_raw_fd(), PROTECT, &raw mut protect) };
        assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
        let check = |after| {
            assert!(
                (0..len / PAGE).all(|page| is_protected(beside + page * PAGE)),
                "after {after}"
            );
        };
        // SAFETY: the test's own mapping, of which the other half is nobody's but the other's.
        let mirror = unsafe { svm::mirror_raw(at, LEN / 2, options) }.unwrap();
        check("the beginning of a mirror");
        // SAFETY: the child does nothing.
        match unsafe { libc::fork() } {
            // SAFETY: it ends the process.
            0 => unsafe { libc::_exit(0) },
            // SAFETY: no status is asked for.
            child => assert_eq!(unsafe { libc::waitpid(child, ptr::null_mut(), 0) }, child),
        }
        check("a fork");
        mirror.close().unwrap();
        check("the end of the mirror");
        drop(other);
        unmap(addr, LEN);
    });
}

/// Whether writes to the page, which is there, fault to a userfaultfd: bit 57 of its entry in the pagemap.
fn is_protected(addr: usize) -> bool {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entry = [0; 8];
    let at = (addr / PAGE * entry.len()) as u64;
    pagemap.read_exact_at(&mut entry, at).unwrap();
    u64::from_ne_bytes(entry) >> 57 & 1 == 1
}

fn lock(addr: usize, len: usize, flags: libc::c_uint) -> bool {
    // SAFETY: locks pages of the test's own.
    if unsafe { libc::mlock2(ptr::with_exposed_provenance(addr), len, flags) } == 0 {
        return true;
    }
    tests::skip(format!("mlock2: {}", std::io::Error::last_os_error()));
    false
}

/// The kernel moves no page between a mapping that is locked and one that is not (EINVAL): each page turns out to be unmovable when a
/// device asks for it, and is accessed in place from then on.
#[test]
fn locked_memory_is_served_in_place_page_by_page() {
    each("locked", |options| {
        let addr = map(LEN, WRITE, ANONYMOUS, -1).unwrap();
        if lock(addr, LEN, 0) {
            check(addr, LEN, options, Expected::InPlaceByPage);
        }
        unmap(addr, LEN);
        // One half of it: the other moves.
        let addr = map(LEN, WRITE, ANONYMOUS, -1).unwrap();
        if lock(addr + LEN / 2, LEN / 2, 0) {
            let at = ptr::with_exposed_provenance_mut::<u8>(addr);
            // SAFETY: the test's own mapping.
            let mirror = unsafe { svm::mirror_raw(at, LEN, options) }.unwrap();
            let device = TestDevice::new().unwrap();
            device
                .write(mirror.view().region(), addr, &[8; LEN])
                .unwrap();
            let pages = svm::snapshot(addr, LEN / PAGE).unwrap();
            let (free, locked) = pages.split_at(LEN / PAGE / 2);
            assert!(free.iter().all(|p| p.is_held_by(device.attachment())));
            assert!(locked.iter().all(|p| p.is_present() && !p.is_on_a_device()));
            assert!(mirror.as_slice().iter().all(|&byte| byte == 8));
            mirror.close().unwrap();
        }
        unmap(addr, LEN);
    });
}

/// Locked while they are away, pages come home by copies, and stay.
#[test]
fn pages_locked_while_they_are_away_come_home() {
    each("locked away", |options| {
        let addr = map(LEN, WRITE, ANONYMOUS, -1).unwrap();
        let at = ptr::with_exposed_provenance_mut::<u8>(addr);
        // SAFETY: the test's own mapping.
        let mirror = unsafe { svm::mirror_raw(at, LEN, options) }.unwrap();
        let device = TestDevice::new().unwrap();
        let region = mirror.view().region();
        device.write(region, addr, &[5; LEN]).unwrap();
        assert_eq!(device.attachment().resident_bytes(), LEN);
        // As they are touched, so that the kernel populates nothing now.
        if lock(addr, LEN, libc::MLOCK_ONFAULT) {
            let before = mirror.stats();
            assert!(
                mirror
                    .as_slice()
                    .iter()
                    .step_by(PAGE)
                    .all(|&byte| byte == 5)
            );
            let home = mirror.stats() - before;
            assert_eq!(home.to_host_pages(), (LEN / PAGE) as u64);
            assert!(home.copy_calls > 0);
            let pages = svm::snapshot(addr, LEN / PAGE).unwrap();
            assert!(pages.iter().all(|page| page.is_present()));
            device.write(region, addr, &[6; LEN]).unwrap();
            assert!(
                mirror
                    .as_slice()
                    .iter()
                    .step_by(PAGE)
                    .all(|&byte| byte == 6)
            );
            let pages = svm::snapshot(addr, LEN / PAGE).unwrap();
            assert!(pages.iter().all(|page| !page.is_on_a_device()));
        }
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
        unmap(addr, LEN);
    });
}

/// What is no memory to mirror, by the error's kind.
#[test]
fn refused() {
    use svm::ErrorKind;
    each("refused", |options| {
        let mirror = |addr: usize, len: usize| {
            // SAFETY: refused, or the test's own memory.
            unsafe { svm::mirror_raw(ptr::with_exposed_provenance_mut(addr), len, options) }
        };
        let kind = |addr: usize, len: usize| mirror(addr, len).unwrap_err().kind().clone();
        assert!(matches!(kind(0, PAGE), ErrorKind::Invalid(_)), "null");
        let end = usize::MAX - PAGE + 1;
        assert!(
            matches!(kind(end, 2 * PAGE), ErrorKind::Invalid(_)),
            "wraps"
        );

        let addr = map(LEN, WRITE, ANONYMOUS, -1).unwrap();
        let whole = mirror(addr + 8 * PAGE, LEN - 16 * PAGE).unwrap();
        for (first, pages) in [(0, 9), (8, 1), (9, 4), (55, 9), (0, 64)] {
            assert_eq!(
                kind(addr + first * PAGE, pages * PAGE),
                ErrorKind::Overlap,
                "pages {first} and {pages} more"
            );
        }
        whole.close().unwrap();
        mirror(addr, LEN).unwrap().close().unwrap();
        unmap(addr, LEN);
        // Nothing is ever mapped there, nor is that refused: it is a hole.
        let nothing = mirror(PAGE, PAGE).unwrap();
        let device = TestDevice::new().unwrap();
        let fault = device.read(nothing.view().region(), PAGE, &mut [0]);
        assert_eq!(kind_of(fault), svm::DeviceFaultKind::Unmapped);
        nothing.close().unwrap();
    });
}

#[test]
fn memory_without_access_faults() {
    each("no access", |options| {
        let addr = map(LEN, libc::PROT_NONE, ANONYMOUS, -1).unwrap();
        let at = ptr::with_exposed_provenance_mut(addr);
        // SAFETY: the test's own mapping.
        let mirror = unsafe { svm::mirror_raw(at, LEN, options) }.unwrap();
        let device = TestDevice::new().unwrap();
        let region = mirror.view().region();
        let no_access = svm::DeviceFaultKind::NoAccess;
        assert_eq!(kind_of(device.read(region, addr, &mut [0])), no_access);
        assert_eq!(kind_of(device.write(region, addr, &[1])), no_access);
        protect(addr, WRITE);
        device.write(region, addr, &[1]).unwrap();
        assert_eq!(mirror.as_slice()[0], 1);
        mirror.close().unwrap();
        unmap(addr, LEN);
    });
}

#[test]
fn several_kinds_in_one_range_are_served_in_place() {
    each("several kinds", |options| {
        let addr = map(LEN, WRITE, ANONYMOUS, -1).unwrap();
        let last = ptr::with_exposed_provenance_mut(addr + LEN - PAGE);
        let (flags, memfd) = (libc::MAP_SHARED | libc::MAP_FIXED, memfd());
        // SAFETY: replaces the last page of the test's own mapping.
        let at = unsafe { libc::mmap(last, PAGE, WRITE, flags, memfd.as_raw_fd(), 0) };
        assert_eq!(at, last);
        check(addr, LEN, options, Expected::InPlace);
        unmap(addr, LEN);
    });
}

/// All of these again, where the kernel lacks something that decides how a page moves or how its kind is found out.
#[test]
fn fallbacks() {
    if std::env::var_os("SVM_DISABLE").is_some() {
        return;
    }
    for words in ["move", "sigbus", "events,pagemap_scan,procmap_query"] {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command
            .env("SVM_DISABLE", words)
            .args(["--skip", "fallbacks"]);
        let out = command.output().unwrap();
        assert!(
            out.status.success(),
            "SVM_DISABLE={words}:\n{}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }
}
