//! Twins of the kernel's `tools/testing/selftests/mm/hmm-tests.c`, under the same names: real system calls on real memory, the
//! test device of [`tests::mm`], both doors, every granule; and again under each forced fallback (see [`fallbacks`]).
//!
//! Calls that unmap or move are bare where the kernel tells of them, and made through the wrappers where it does not
//! (`SVM_DISABLE=events`): that is what is promised there. What a bare call does then is [`unheard_calls`].

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use svm::{AttachOptions, Capabilities, Capability, Delivery, ErrorKind, Granule, Options};
use tests::mm::{Dmirror, Done, Errno, Mm, prot};
use tests::{TestDevice, Watchdog};

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
/// As in the kernel's suite.
const SIZE: usize = 4 << 20;
const NPAGES: usize = SIZE / PAGE;
const NTIMES: usize = 10;

const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// A mapping of the test's own.
struct Map {
    addr: usize,
    len: usize,
    /// Pages that were unmapped: somebody else's mapping may be there by now.
    holes: Mutex<Vec<std::ops::Range<usize>>>,
}

impl Map {
    fn with(len: usize, protection: i32, flags: i32, fd: i32) -> Option<Self> {
        // SAFETY: a fresh mapping.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, 0) };
        (at != libc::MAP_FAILED).then(|| Self {
            addr: at.expose_provenance(),
            len,
            holes: Mutex::default(),
        })
    }

    fn new(len: usize, protection: i32) -> Self {
        Self::with(len, protection, PRIVATE, -1).unwrap()
    }

    /// A huge page's worth, aligned, where the kernel was asked for one.
    fn huge(protection: i32) -> (Self, usize) {
        Self::aligned(2 * HUGE, protection, true)
    }

    /// A mapping, and where a huge page can begin in it; the kernel is asked for one there, or for none.
    fn aligned(len: usize, protection: i32, thp: bool) -> (Self, usize) {
        let map = Self::new(len, protection);
        let at = map.addr.next_multiple_of(HUGE);
        let advice = if thp {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        advise(at, HUGE, advice);
        (map, at)
    }

    fn page(&self, page: usize) -> usize {
        self.addr + page * PAGE
    }

    fn protect(&self, first: usize, pages: usize, protection: i32) {
        let at = ptr::with_exposed_provenance_mut(self.page(first));
        // SAFETY: the test's own mapping.
        assert_eq!(unsafe { libc::mprotect(at, pages * PAGE, protection) }, 0);
    }

    fn unmap(&self, first: usize, pages: usize) {
        self.holes.lock().unwrap().push(first..first + pages);
        unmap(self.page(first), pages * PAGE);
    }

    /// What is at `addr` has gone elsewhere.
    fn lost(&self, addr: usize, len: usize) {
        let first = (addr - self.addr) / PAGE;
        self.holes.lock().unwrap().push(first..first + len / PAGE);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        let holes = self.holes.get_mut().unwrap();
        holes.push(self.len.div_ceil(PAGE)..usize::MAX);
        holes.sort_by_key(|hole| hole.start);
        let mut page = 0;
        for hole in holes.drain(..) {
            if hole.start > page {
                unmap(self.addr + page * PAGE, (hole.start - page) * PAGE);
            }
            page = hole.end;
        }
    }
}

fn has(capability: Capability) -> bool {
    static PROBED: OnceLock<Capabilities> = OnceLock::new();
    PROBED.get_or_init(Capabilities::probe).has(capability)
}

/// Unmaps a part of the test's own mappings.
fn unmap(addr: usize, len: usize) {
    let at: *mut u8 = ptr::with_exposed_provenance_mut(addr);
    if has(Capability::Events) {
        // SAFETY: nobody uses it any more.
        assert_eq!(unsafe { libc::munmap(at.cast(), len) }, 0);
    } else {
        // SAFETY: the same.
        unsafe { svm::munmap(at, len) }.unwrap();
    }
}

/// Moves a huge page's worth of the test's own to `to`, where nothing is that anybody uses.
fn remap(from: usize, flags: i32, to: usize) {
    let flags = flags | libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (from, to): (*mut u8, *mut u8) = (
        ptr::with_exposed_provenance_mut(from),
        ptr::with_exposed_provenance_mut(to),
    );
    let now = if has(Capability::Events) {
        // SAFETY: by the caller's word.
        unsafe { libc::mremap(from.cast(), HUGE, HUGE, flags, to) }.cast()
    } else {
        // SAFETY: the same.
        unsafe { svm::mremap(from, HUGE, HUGE, flags, to) }.unwrap()
    };
    assert_eq!(now, to, "{}", std::io::Error::last_os_error());
}

/// Of how many ints one is written and looked at. Pages move as a whole, so that under fallbacks, and for all granules but one, a
/// sample does; a prime, for every place in a page to have its turn.
static STEP: AtomicUsize = AtomicUsize::new(1);
const SAMPLE: usize = 61;

/// The ints of `len` bytes that are used.
fn ints(len: usize) -> impl Iterator<Item = usize> {
    (0..len / 4).step_by(STEP.load(Ordering::Relaxed))
}

fn at(addr: usize, index: usize) -> *mut i32 {
    ptr::with_exposed_provenance_mut::<i32>(addr).wrapping_add(index)
}

fn advise(addr: usize, len: usize, advice: i32) {
    let at = ptr::with_exposed_provenance_mut(addr);
    // SAFETY: a mapping of the test's own.
    assert_eq!(unsafe { libc::madvise(at, len, advice) }, 0);
}

fn load(addr: usize, index: usize) -> i32 {
    // SAFETY: tests load what is mapped and readable.
    unsafe { at(addr, index).read_volatile() }
}

fn store(addr: usize, index: usize, value: i32) {
    // SAFETY: tests store to what is mapped and writable.
    unsafe { at(addr, index).write_volatile(value) }
}

/// `ptr[k] = f(k)` for the ints of `len` bytes from `first` on.
fn init(addr: usize, len: usize, f: impl Fn(i32) -> i32) {
    ints(len).for_each(|k| store(addr, k, f(k as i32)));
}

fn check(addr: usize, len: usize, f: impl Fn(i32) -> i32) -> bool {
    ints(len).all(|k| load(addr, k) == f(k as i32))
}

/// The device's bounce buffer.
fn mirror(len: usize, f: impl Fn(i32) -> i32) -> Vec<u8> {
    let mut mirror = vec![0; len];
    let words = mirror.as_chunks_mut().0;
    ints(len).for_each(|k| words[k] = f(k as i32).to_ne_bytes());
    mirror
}

fn holds(mirror: &[u8], f: impl Fn(i32) -> i32) -> bool {
    let words = mirror.as_chunks().0;
    ints(mirror.len()).all(|k| i32::from_ne_bytes(words[k]) == f(k as i32))
}

/// What `hmm` and `hmm2` set up: the memory, and up to two devices.
struct Fixture {
    mm: Arc<Mm>,
    options: Options,
    dev: Dmirror,
}

impl Fixture {
    fn new(options: &Options) -> Self {
        let mm = Mm::new(options);
        Self {
            dev: Dmirror::new(&mm).unwrap(),
            options: options.clone(),
            mm,
        }
    }

    fn second(&self) -> Dmirror {
        Dmirror::new(&self.mm).unwrap()
    }
}

/// Runs a test for both doors and all granules.
///
/// One test at a time: they unmap and fork, and what one test's mapping leaves behind another's would be given at once, so that
/// a device told to read "what is at this address" would rightly read the other test's memory.
fn each(name: &'static str, test: impl Fn(&Fixture)) {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::with_timeout(name, Duration::from_secs(120));
    if !tests::usable() {
        return;
    }
    // Most fallbacks differ in how a page table is read or a thread is told, not in how many pages move.
    let disabled = std::env::var("SVM_DISABLE").unwrap_or_default();
    let granules: &[Granule] = if ["", "move", "events"].contains(&disabled.as_str()) {
        &[Granule::Page, Granule::Big, Granule::Huge]
    } else {
        &[Granule::Big]
    };
    for delivery in [Delivery::Inline, Delivery::Thread] {
        if delivery == Delivery::Inline && !has(Capability::Sigbus) {
            tests::skip("there is no inline door without SIGBUS delivery");
            continue;
        }
        for &granule in granules {
            let options = Options::new().delivery(delivery).granule(granule);
            let all = disabled.is_empty() && granule == Granule::Big;
            STEP.store(if all { 1 } else { SAMPLE }, Ordering::Relaxed);
            let fixture = Fixture::new(&options);
            test(&fixture);
            let stats = fixture.mm.stats();
            assert_eq!(stats.anomalies, 0, "{name} {options:?}: {stats:?}");
        }
    }
}

/// One round for all of it, as the kernel's suite demands.
fn whole(pages: usize) -> Result<Done, Errno> {
    Ok(Done {
        cpages: pages,
        faults: 1,
    })
}

fn migrated(pages: usize) -> Result<Done, Errno> {
    Ok(Done {
        cpages: pages,
        faults: 0,
    })
}

fn error(errno: i32) -> Result<Done, Errno> {
    Err(Errno(errno))
}

/// Runs `child` in a fork; it answers whether all was well.
fn in_child(child: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child runs test code and leaves by `_exit`.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(false);
            // SAFETY: ends the child without the parent's destructors.
            unsafe { libc::_exit(i32::from(!ok)) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: waits for the child just made.
            assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}

/// A file that is gone when it is closed.
fn temporary_file(len: usize) -> OwnedFd {
    // SAFETY: the path is a C string.
    let fd = unsafe {
        libc::open(
            c"/tmp".as_ptr(),
            libc::O_TMPFILE | libc::O_EXCL | libc::O_RDWR,
            0o600,
        )
    };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: just opened, and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a file of ours.
    assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), len as i64) }, 0);
    fd
}

#[test]
fn open_close() {
    each("open_close", |_| ());
}

#[test]
fn anon_read() {
    each("anon_read", |f| {
        let map = Map::new(SIZE, WRITE);
        // The first page stays a hole, the second will be the page of zeros.
        let first = 2 * PAGE / 4;
        ints(SIZE)
            .filter(|&k| k >= first)
            .for_each(|k| store(map.addr, k, k as i32));
        map.protect(0, NPAGES, READ);
        assert_eq!(load(map.page(1), 0), 0);
        let mut out = mirror(SIZE, |_| -1);
        assert_eq!(
            f.dev.read(map.addr, &mut out),
            whole(NPAGES),
            "{:?}",
            f.options
        );
        assert!(holds(&out, |k| if (k as usize) < first { 0 } else { k }));
        assert!(check(map.addr, SIZE, |k| if (k as usize) < first {
            0
        } else {
            k
        }));
    });
}

#[test]
fn anon_read_prot() {
    each("anon_read_prot", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = mirror(SIZE, |k| -k);
        map.protect(0, NPAGES, libc::PROT_NONE);
        assert_eq!(f.dev.read(map.addr, &mut out), error(libc::EFAULT));
        map.protect(0, NPAGES, READ);
        assert!(check(map.addr, SIZE, |k| k));
        assert!(holds(&out, |k| -k), "something was copied");
    });
}

#[test]
fn anon_write() {
    each("anon_write", |f| {
        let map = Map::new(SIZE, WRITE);
        assert_eq!(f.dev.write(map.addr, &mirror(SIZE, |k| k)), whole(NPAGES));
        assert!(check(map.addr, SIZE, |k| k));
    });
}

#[test]
fn anon_write_prot() {
    each("anon_write_prot", |f| {
        let map = Map::new(SIZE, READ);
        let mut one = vec![1; PAGE];
        assert_eq!(f.dev.read(map.addr, &mut one), whole(1));
        assert!(holds(&one, |_| 0));
        let data = mirror(SIZE, |k| k);
        assert_eq!(f.dev.write(map.addr, &data), error(libc::EPERM));
        assert!(check(map.addr, SIZE, |_| 0));
        map.protect(0, NPAGES, WRITE);
        assert_eq!(
            f.dev.write(map.addr, &data),
            whole(NPAGES),
            "{:?}",
            f.options
        );
        assert!(check(map.addr, SIZE, |k| k));
    });
}

#[test]
fn anon_write_child() {
    each("anon_write_child", |f| {
        for (migrate, thp) in [(false, false), (false, true), (true, false), (true, true)] {
            let (map, addr, len) = if thp {
                let (map, addr) = Map::huge(WRITE);
                (map, addr, HUGE)
            } else {
                let map = Map::new(SIZE, WRITE);
                let addr = map.addr;
                (map, addr, SIZE)
            };
            init(addr, len, |k| k);
            if migrate {
                let mut out = vec![0; len];
                assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(len / PAGE));
                assert!(holds(&out, |k| k));
            }
            let data = mirror(len, |k| -k);
            assert!(in_child(|| {
                let same = check(addr, len, |k| k);
                // Its own device, on its own memory.
                let own = Fixture::new(&f.options);
                let wrote = own.dev.write(addr, &data) == whole(len / PAGE);
                same && wrote && check(addr, len, |k| -k)
            }));
            assert!(
                check(addr, len, |k| k),
                "the child's device wrote to the parent"
            );
            drop(map);
        }
    });
}

#[test]
fn anon_write_child_shared() {
    each("anon_write_child_shared", |f| {
        let map = Map::with(SIZE, WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).unwrap();
        init(map.addr, SIZE, |k| k);
        assert!(in_child(|| {
            let same = check(map.addr, SIZE, |k| k);
            let own = Fixture::new(&f.options);
            same && own.dev.write(map.addr, &mirror(SIZE, |k| -k)) == whole(NPAGES)
                && check(map.addr, SIZE, |k| -k)
        }));
        assert!(check(map.addr, SIZE, |k| -k));
    });
}

#[test]
fn anon_write_huge() {
    each("anon_write_huge", |f| {
        let (_map, addr) = Map::huge(WRITE);
        assert_eq!(f.dev.write(addr, &mirror(HUGE, |k| k)), whole(HUGE / PAGE));
        assert!(check(addr, HUGE, |k| k));
    });
}

/// A mapping of one reserved huge page, reserving it if we may.
fn hugetlb() -> Option<Map> {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let map = || Map::with(HUGE, WRITE, PRIVATE | libc::MAP_HUGETLB, -1);
    map().or_else(|| {
        let _ = std::fs::write(POOL, "4");
        map()
    })
}

#[test]
fn anon_write_hugetlbfs() {
    each("anon_write_hugetlbfs", |f| {
        let Some(map) = hugetlb() else {
            tests::skip("no huge pages are reserved");
            return;
        };
        assert_eq!(
            f.dev.write(map.addr, &mirror(HUGE, |k| k)),
            whole(HUGE / PAGE)
        );
        assert!(check(map.addr, HUGE, |k| k));
    });
}

#[test]
fn file_read() {
    each("file_read", |f| {
        let file = temporary_file(SIZE);
        let data = mirror(SIZE, |k| k);
        // SAFETY: writes the test's own bytes to its own file.
        let wrote = unsafe { libc::pwrite(file.as_raw_fd(), data.as_ptr().cast(), SIZE, 0) };
        assert_eq!(wrote, SIZE as isize);
        let map = Map::with(SIZE, READ, libc::MAP_SHARED, file.as_raw_fd()).unwrap();
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.read(map.addr, &mut out), whole(NPAGES));
        assert!(holds(&out, |k| k));
        assert_eq!(f.dev.write(map.addr, &data), error(libc::EPERM));
    });
}

#[test]
fn file_write() {
    each("file_write", |f| {
        let file = temporary_file(SIZE);
        let map = Map::with(SIZE, WRITE, libc::MAP_SHARED, file.as_raw_fd()).unwrap();
        assert_eq!(f.dev.write(map.addr, &mirror(SIZE, |k| k)), whole(NPAGES));
        assert!(check(map.addr, SIZE, |k| k));
        let mut out = vec![0; SIZE];
        // SAFETY: reads into the test's own bytes.
        let read = unsafe { libc::pread(file.as_raw_fd(), out.as_mut_ptr().cast(), SIZE, 0) };
        assert_eq!(read, SIZE as isize);
        assert!(holds(&out, |k| k));
    });
}

#[test]
fn migrate() {
    each("migrate", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        let snapshot = f.dev.snapshot(map.addr, NPAGES).unwrap();
        assert!(
            snapshot
                .iter()
                .all(|&m| m & !prot::PMD == prot::DEV_PRIVATE_LOCAL | prot::WRITE)
        );
    });
}

/// Private file mappings can be neither registered nor moved: they are served in place, and an explicit migration says so.
#[test]
fn migrate_file_private() {
    each("migrate_file_private", |f| {
        let file = temporary_file(SIZE);
        let map = Map::with(SIZE, WRITE, libc::MAP_PRIVATE, file.as_raw_fd()).unwrap();
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(
            f.dev.migrate_to_dev(map.addr, &mut out),
            error(libc::ENOENT)
        );
        assert_eq!(f.dev.read(map.addr, &mut out), whole(NPAGES));
        assert!(holds(&out, |k| k));
        assert_eq!(f.dev.write(map.addr, &mirror(SIZE, |k| -k)), whole(NPAGES));
        assert!(check(map.addr, SIZE, |k| -k));
    });
}

#[test]
fn migrate_fault() {
    each("migrate_fault", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        assert!(check(map.addr, SIZE / 2, |k| k));
        // Half of it has come home: migrate a mix.
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        assert!(check(map.addr, SIZE, |k| k));
    });
}

#[test]
fn migrate_release() {
    each("migrate_release", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        f.dev.release().unwrap();
        assert_eq!(f.dev.device().attachment().resident_bytes(), 0);
        assert!(
            f.dev
                .snapshot(map.addr, NPAGES)
                .unwrap()
                .iter()
                .all(|&m| m & !prot::PMD == prot::WRITE)
        );
        assert!(check(map.addr, SIZE / 2, |k| k));
    });
}

#[test]
fn migrate_shared() {
    each("migrate_shared", |f| {
        let map = Map::with(SIZE, WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).unwrap();
        assert_eq!(
            f.dev.migrate_to_dev(map.addr, &mut vec![0; SIZE]),
            error(libc::ENOENT)
        );
    });
}

#[test]
fn migrate_mixed() {
    each("migrate_mixed", |f| {
        let map = Map::new(6 * PAGE, libc::PROT_NONE);
        let other = f.second();
        let mut out = vec![0; 6 * PAGE];
        assert_eq!(
            other.migrate_to_dev(map.addr, &mut out),
            error(libc::EINVAL),
            "no access"
        );
        map.unmap(1, 1);
        assert_eq!(
            other.migrate_to_dev(map.addr, &mut out[..3 * PAGE]),
            error(libc::EINVAL),
            "a hole"
        );
        // Page 2: read-only zeros. Page 3: read-only. Pages 4 and 5: read-write.
        map.protect(2, 1, READ);
        assert_eq!(load(map.page(2), 0), 0);
        map.protect(3, 1, WRITE);
        store(map.page(3), 0, 3);
        map.protect(3, 1, READ);
        map.protect(4, 2, WRITE);
        store(map.page(4), 0, 4);
        store(map.page(5), 0, 5);
        assert_eq!(
            other.migrate_to_dev(map.page(2), &mut out[..4 * PAGE]),
            migrated(4)
        );
        let first = |page: usize| i32::from_ne_bytes(*out[page * PAGE..].first_chunk().unwrap());
        assert_eq!([first(0), first(1), first(2), first(3)], [0, 3, 4, 5]);
        // What another device has is not taken from it.
        assert_eq!(
            f.dev.migrate_to_dev(map.page(5), &mut [0; PAGE]),
            error(libc::ENOENT)
        );
        assert_eq!((load(map.page(3), 0), load(map.page(5), 0)), (3, 5));
    });
}

/// As the kernel's against private memory: the pages come home by the CPU's faults.
#[test]
fn migrate_multiple() {
    each("migrate_multiple", |f| {
        for _ in 0..NTIMES {
            let map = Map::new(SIZE, WRITE);
            init(map.addr, SIZE, |k| k);
            let mut out = vec![0; SIZE];
            assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
            assert!(holds(&out, |k| k));
            assert_eq!(f.dev.device().attachment().resident_bytes(), SIZE);
            let before = f.mm.stats();
            assert!(check(map.addr, SIZE, |k| k));
            let home = f.mm.stats() - before;
            assert_eq!(
                home.to_host_demand_pages + home.to_host_prefetch_pages,
                NPAGES as u64
            );
            assert_eq!(home.to_host_pages(), NPAGES as u64);
            let snapshot = f.dev.snapshot(map.addr, NPAGES).unwrap();
            assert!(snapshot.iter().all(|&m| m & !prot::PMD == prot::WRITE));
            // Where pages are copied for want of MOVE, what the device has of them is stale, and its memory still.
            let stale = if has(Capability::Move) { 0 } else { SIZE };
            assert_eq!(f.dev.device().attachment().resident_bytes(), stale);
        }
    });
}

/// As the kernel's against coherent memory, which asks for the pages.
#[test]
fn migrate_multiple_to_sys() {
    each("migrate_multiple_to_sys", |f| {
        for _ in 0..NTIMES {
            let map = Map::new(SIZE, WRITE);
            init(map.addr, SIZE, |k| k);
            let mut out = vec![0; SIZE];
            assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
            assert!(holds(&out, |k| k));
            let before = f.mm.stats();
            assert_eq!(f.dev.migrate_to_sys(map.addr, NPAGES), migrated(NPAGES));
            assert_eq!(f.dev.device().attachment().resident_bytes(), 0);
            assert!(check(map.addr, SIZE, |k| k));
            let home = f.mm.stats() - before;
            assert_eq!(home.to_host_explicit_pages, NPAGES as u64);
            assert_eq!(home.to_host_pages(), NPAGES as u64, "no page by a fault");
        }
    });
}

#[test]
fn anon_read_multiple() {
    each("anon_read_multiple", |f| {
        for c in 0..NTIMES as i32 {
            let map = Map::new(SIZE, WRITE);
            init(map.addr, SIZE, |k| k + c);
            let mut out = vec![0; SIZE];
            assert_eq!(f.dev.read(map.addr, &mut out), whole(NPAGES));
            assert!(holds(&out, |k| k + c));
        }
    });
}

#[test]
fn anon_teardown() {
    each("anon_teardown", |f| {
        for c in 0..NTIMES as i32 {
            let map = Map::new(SIZE, WRITE);
            init(map.addr, SIZE, |k| k + c);
            std::thread::scope(|scope| {
                let mut out = vec![0; SIZE];
                scope.spawn(|| {
                    std::thread::sleep(std::time::Duration::from_micros(
                        u64::from(c.cast_unsigned()) * 300,
                    ));
                    map.unmap(NPAGES / 2, NPAGES / 2);
                });
                match f.dev.read(map.addr, &mut out) {
                    Ok(_) => assert!(holds(&out, |k| k + c)),
                    Err(errno) => assert_eq!(errno, Errno(libc::EFAULT)),
                }
            });
        }
    });
}

/// Writes `len` bytes from `addr` to a new file and reads the file back: what a system call finds there.
fn through_a_file(addr: usize, len: usize) -> std::io::Result<Vec<u8>> {
    let file = std::fs::File::from(temporary_file(0));
    let bytes: *const u8 = ptr::with_exposed_provenance(addr);
    // SAFETY: the kernel reads the test's own mapping, or says that it cannot.
    let wrote = unsafe { libc::write(file.as_raw_fd(), bytes.cast(), len) };
    if wrote < 0 {
        return Err(std::io::Error::last_os_error());
    }
    assert_eq!(wrote, len as isize, "a short write");
    let mut found = vec![0; len];
    file.read_exact_at(&mut found, 0)?;
    Ok(found)
}

/// Whether the kernel's own accesses to pages that are away are served.
fn is_transparent(options: &Options) -> bool {
    options.delivery == Some(Delivery::Thread) && has(Capability::KernelFaults)
}

/// The kernel's has a page that its driver inserted, and takes a snapshot of it. Ours has a page of a file; and one that a device
/// holds, which system calls reach under a pin.
#[test]
fn mixedmap() {
    each("mixedmap", |f| {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"mixedmap".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: just opened.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: our own file.
        assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), PAGE as i64) }, 0);
        let map = Map::with(PAGE, WRITE, libc::MAP_PRIVATE, fd.as_raw_fd()).unwrap();
        assert_eq!(load(map.addr, 0), 0);
        assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), [prot::READ]);
        store(map.addr, 0, 1);
        assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), [prot::WRITE]);

        let map = Map::new(PAGE, WRITE);
        init(map.addr, PAGE, |k| k + 1);
        let mut out = vec![0; PAGE];
        let held = [prot::DEV_PRIVATE_LOCAL | prot::WRITE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(1));
        assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), held);
        match through_a_file(map.addr, PAGE) {
            Ok(found) => {
                assert!(is_transparent(&f.options), "{:?}", f.options);
                assert!(holds(&found, |k| k + 1));
                assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), [prot::WRITE]);
                assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(1));
            }
            Err(error) => {
                assert!(!is_transparent(&f.options), "{:?}: {error}", f.options);
                assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
                assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), held);
            }
        }
        let mirror = f.dev.mirror_of(map.addr, 1).unwrap();
        let pin = mirror.pin(..).unwrap();
        assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), [prot::WRITE]);
        assert!(holds(&through_a_file(map.addr, PAGE).unwrap(), |k| k + 1));
        drop(pin);
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(1));
        assert!(holds(&out, |k| k + 1));
        assert_eq!(f.dev.snapshot(map.addr, 1).unwrap(), held);
    });
}

#[test]
fn snapshot() {
    each("snapshot", |f| {
        let map = Map::new(7 * PAGE, libc::PROT_NONE);
        let other = f.second();
        map.unmap(1, 1);
        map.protect(2, 1, READ);
        assert_eq!(load(map.page(2), 0), 0);
        map.protect(3, 1, WRITE);
        store(map.page(3), 0, 3);
        map.protect(3, 1, READ);
        map.protect(4, 3, WRITE);
        (4..7).for_each(|page| store(map.page(page), 0, page as i32));
        assert_eq!(
            f.dev.migrate_to_dev(map.page(5), &mut [0; PAGE]),
            migrated(1)
        );
        assert_eq!(
            other.migrate_to_dev(map.page(6), &mut [0; PAGE]),
            migrated(1)
        );
        let zero = if sees_zero_pages() {
            prot::ZERO | prot::READ
        } else {
            prot::READ
        };
        let want = [
            prot::ERROR,
            prot::ERROR,
            zero,
            prot::READ,
            prot::WRITE,
            prot::DEV_PRIVATE_LOCAL | prot::WRITE,
            prot::NONE,
        ];
        assert_eq!(f.dev.snapshot(map.addr, 7).unwrap(), want);
        assert_eq!((load(map.page(5), 0), load(map.page(6), 0)), (5, 6));
    });
}

/// Without PAGEMAP_SCAN nobody tells zero pages and huge pages from others.
fn sees_zero_pages() -> bool {
    !std::env::var("SVM_DISABLE").is_ok_and(|words| words.contains("pagemap_scan"))
}

#[test]
fn compound() {
    each("compound", |f| {
        let Some(map) = hugetlb() else {
            tests::skip("no huge pages are reserved");
            return;
        };
        init(map.addr, HUGE, |k| k);
        let pmd = if sees_zero_pages() { prot::PMD } else { 0 };
        let snapshot = f.dev.snapshot(map.addr, HUGE / PAGE).unwrap();
        assert!(
            snapshot.iter().all(|&m| m == prot::WRITE | pmd),
            "{:x}",
            snapshot[0]
        );
        map.protect(0, HUGE / PAGE, READ);
        let snapshot = f.dev.snapshot(map.addr, HUGE / PAGE).unwrap();
        assert!(
            snapshot.iter().all(|&m| m == prot::READ | pmd),
            "{:x}",
            snapshot[0]
        );
    });
}

#[test]
fn double_map() {
    each("double_map", |f| {
        let map = Map::new(SIZE, WRITE);
        let other = f.second();
        init(map.addr, SIZE, |k| k);
        map.protect(0, NPAGES, READ);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.read(map.addr, &mut out), whole(NPAGES));
        assert!(holds(&out, |k| k));
        assert_eq!(
            other.read(map.addr, &mut out),
            whole(NPAGES),
            "{:?}",
            f.options
        );
        assert!(holds(&out, |k| k));
        // Migrating to one device takes the pages from the other, which faults for them again.
        assert_eq!(other.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        assert_eq!(f.dev.read(map.addr, &mut out), whole(NPAGES));
        assert!(holds(&out, |k| k));
        // Punch a hole after the first page address, as the kernel's does.
        map.unmap(1, 1);
        drop(out);
        assert_eq!(
            other.read(map.addr, &mut vec![0; SIZE]),
            error(libc::EFAULT)
        );
        assert!(
            ints(SIZE)
                .filter(|&k| k >= 2 * PAGE / 4)
                .all(|k| load(map.addr, k) == k as i32)
        );
    });
}

#[test]
fn exclusive() {
    each("exclusive", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.exclusive(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        assert_eq!(
            f.dev.check_exclusive(map.addr, NPAGES),
            error(libc::EPERM),
            "still the device's"
        );
        for k in ints(SIZE) {
            assert_eq!(load(map.addr, k), k as i32);
            store(map.addr, k, k as i32 + 1);
        }
        assert!(check(map.addr, SIZE, |k| k + 1));
        assert_eq!(f.dev.check_exclusive(map.addr, NPAGES), migrated(NPAGES));
    });
}

#[test]
fn exclusive_mprotect() {
    each("exclusive_mprotect", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.exclusive(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        map.protect(0, NPAGES, READ);
        assert_eq!(f.dev.write(map.addr, &out), error(libc::EPERM));
        assert!(check(map.addr, SIZE, |k| k));
    });
}

#[test]
fn exclusive_cow() {
    each("exclusive_cow", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.exclusive(map.addr, &mut out), migrated(NPAGES));
        let count_up = || {
            let same = check(map.addr, SIZE, |k| k);
            init(map.addr, SIZE, |k| k + 1);
            same && check(map.addr, SIZE, |k| k + 1)
        };
        assert!(in_child(count_up));
        assert!(count_up());
        assert_eq!(f.dev.check_exclusive(map.addr, NPAGES), migrated(NPAGES));
    });
}

/// Copies between `local` and the page at `addr` by `process_vm_readv`, or `process_vm_writev`.
fn by_process_vm(addr: usize, local: &mut [u8], writes: bool) {
    let here = libc::iovec {
        iov_base: local.as_mut_ptr().cast(),
        iov_len: local.len(),
    };
    let there = libc::iovec {
        iov_base: ptr::with_exposed_provenance_mut(addr),
        iov_len: local.len(),
    };
    // SAFETY: it has no preconditions.
    let pid = unsafe { libc::getpid() };
    let call = if writes {
        libc::process_vm_writev
    } else {
        libc::process_vm_readv
    };
    // SAFETY: `local` is the caller's, and the page at `addr` the test's own.
    let copied = unsafe { call(pid, &raw const here, 1, &raw const there, 1, 0) };
    let error = std::io::Error::last_os_error();
    assert_eq!(copied, local.len() as isize, "{error}");
}

/// What `get_user_pages` is to the kernel's, system calls under a pin are here: one way for each page, and only that page comes
/// home for it.
#[test]
fn hmm_gup_test() {
    each("hmm_gup_test", |f| {
        const HELD: u8 = prot::DEV_PRIVATE_LOCAL | prot::WRITE;
        let map = Map::new(4 * PAGE, WRITE);
        let ints_per_page = PAGE as i32 / 4;
        (0..4).for_each(|page| init(map.page(page), PAGE, |k| k + page as i32 * ints_per_page));
        let contents = |page: i32| move |k: i32| k + page * ints_per_page;
        let mut out = vec![0; 4 * PAGE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(4));
        let mirror = f.dev.mirror_of(map.addr, 4).unwrap();
        let pinned = |page: usize| mirror.pin(page * PAGE..(page + 1) * PAGE).unwrap();
        let snapshot = || f.dev.snapshot(map.addr, 4).unwrap();
        assert_eq!(snapshot(), [HELD; 4]);

        // write(2) of a page; and of what the device writes to it in place, while it is pinned.
        let pin = pinned(0);
        assert_eq!(snapshot(), [prot::WRITE, HELD, HELD, HELD]);
        assert!(holds(&through_a_file(map.addr, PAGE).unwrap(), contents(0)));
        let by_device = self::mirror(PAGE, |k| k + 7);
        assert_eq!(f.dev.write(map.addr, &by_device), whole(1));
        assert!(holds(&through_a_file(map.addr, PAGE).unwrap(), |k| k + 7));
        assert_eq!(
            f.dev.migrate_to_dev(map.addr, &mut out[..PAGE]),
            error(libc::ENOENT),
            "a pinned page does not migrate"
        );
        assert_eq!(snapshot(), [prot::WRITE, HELD, HELD, HELD]);
        drop(pin);

        // process_vm_readv and process_vm_writev.
        let pin = pinned(1);
        let mut copy = vec![0; PAGE];
        by_process_vm(map.page(1), &mut copy, false);
        assert!(holds(&copy, contents(1)));
        let mut copy = self::mirror(PAGE, |k| -k);
        by_process_vm(map.page(1), &mut copy, true);
        assert!(check(map.page(1), PAGE, |k| -k));
        drop(pin);

        // read(2) into a page; the device sees it in place, and takes it along afterwards.
        let pin = pinned(2);
        let file = std::fs::File::from(temporary_file(PAGE));
        file.write_all_at(&self::mirror(PAGE, |k| k * 3), 0)
            .unwrap();
        let into = ptr::with_exposed_provenance_mut::<u8>(map.page(2));
        // SAFETY: the kernel writes the test's own page, which is home while it is pinned.
        let read = unsafe { libc::read(file.as_raw_fd(), into.cast(), PAGE) };
        assert_eq!(read, PAGE as isize, "{}", std::io::Error::last_os_error());
        assert_eq!(f.dev.read(map.page(2), &mut copy), whole(1));
        assert!(holds(&copy, |k| k * 3));
        drop(pin);

        // As long as anybody likes: nothing the device does takes the page.
        let pin = pinned(3);
        assert_eq!(snapshot()[3], prot::WRITE);
        assert_eq!(f.dev.read(map.page(3), &mut copy), whole(1));
        assert!(holds(&copy, contents(3)));
        assert_eq!(
            f.dev.migrate_to_dev(map.addr, &mut out),
            error(libc::ENOENT)
        );
        assert_eq!(snapshot(), [HELD, HELD, HELD, prot::WRITE]);
        drop(pin);

        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(4));
        assert!(holds(&out[..PAGE], |k| k + 7));
        assert!(check(map.addr, PAGE, |k| k + 7));
        assert!(check(map.page(1), PAGE, |k| -k));
        assert!(check(map.page(2), PAGE, |k| k * 3));
        assert!(check(map.page(3), PAGE, contents(3)));
    });
}

#[test]
fn hmm_cow_in_device() {
    each("hmm_cow_in_device", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(in_child(|| {
            init(map.addr, SIZE, |k| -k);
            check(map.addr, SIZE, |k| -k)
        }));
        // The pages that were shared with the child still migrate.
        init(map.addr, SIZE, |k| k + 2);
        assert_eq!(
            f.dev.migrate_to_dev(map.addr, &mut out),
            migrated(NPAGES),
            "{:?}",
            f.options
        );
        assert!(holds(&out, |k| k + 2));
    });
}

#[test]
fn migrate_anon_huge_empty() {
    each("migrate_anon_huge_empty", |f| {
        let (_map, addr) = Map::huge(READ);
        let mut out = vec![0xff; HUGE];
        assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
        assert!(holds(&out, |_| 0));
        assert!(check(addr, HUGE, |_| 0));
    });
}

#[test]
fn migrate_anon_huge_zero() {
    each("migrate_anon_huge_zero", |f| {
        let (_map, addr) = Map::huge(READ);
        assert_eq!(load(addr, 0), 0);
        let mut out = vec![0xff; HUGE];
        assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
        assert!(holds(&out, |_| 0));
        assert!(check(addr, HUGE, |_| 0));
    });
}

#[test]
fn migrate_anon_huge_free() {
    each("migrate_anon_huge_free", |f| {
        let (_map, addr) = Map::huge(WRITE);
        init(addr, HUGE, |k| k);
        let mut out = vec![0; HUGE];
        assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
        assert!(holds(&out, |k| k));
        advise(addr, HUGE, libc::MADV_FREE);
        // The old contents or zeros, as after any MADV_FREE. (Where the kernel tells of it, what the device held is gone.)
        let pages = || (0..HUGE / 4).step_by(PAGE / 4);
        assert!(pages().all(|k| [k as i32, 0].contains(&load(addr, k))));
        init(addr, HUGE, |k| k + 1);
        assert!(check(addr, HUGE, |k| k + 1), "{:?}", f.options);
    });
}

/// Whether the page table has something at each page, swapped or not, by the kernel's word.
fn in_page_table(addr: usize, npages: usize) -> Vec<bool> {
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entries = vec![0; npages * 8];
    pagemap
        .read_exact_at(&mut entries, (addr / PAGE * 8) as u64)
        .unwrap();
    let entries = entries.as_chunks().0.iter();
    entries
        .map(|entry| u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0)
        .collect()
}

/// Has the kernel make a huge page of what is there; says so if it will not.
fn collapse(addr: usize) -> bool {
    let at = ptr::with_exposed_provenance_mut(addr);
    // SAFETY: advice on a mapping of the test's own.
    if unsafe { libc::madvise(at, HUGE, libc::MADV_COLLAPSE) } == 0 {
        return true;
    }
    tests::skip(format!(
        "MADV_COLLAPSE: {}",
        std::io::Error::last_os_error()
    ));
    false
}

#[test]
fn migrate_anon_huge_fault() {
    each("migrate_anon_huge_fault", |f| {
        let (_map, addr) = Map::huge(WRITE);
        init(addr, HUGE, |k| k);
        let collapsed = collapse(addr);
        let snapshot = || f.dev.snapshot(addr, HUGE / PAGE).unwrap();
        // Without PAGEMAP_SCAN the kernel does not say; and where pages are copied for want of MOVE, they are small ones.
        let pmd = if collapsed && sees_zero_pages() {
            assert_eq!(snapshot(), [prot::WRITE | prot::PMD; HUGE / PAGE]);
            prot::PMD
        } else {
            0
        };
        let moved = if has(Capability::Move) { pmd } else { 0 };
        let mut out = vec![0; HUGE];
        assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
        assert!(holds(&out, |k| k));
        let held = prot::DEV_PRIVATE_LOCAL | prot::WRITE | moved;
        assert_eq!(snapshot(), [held; HUGE / PAGE], "{:?}", f.options);
        assert_eq!(in_page_table(addr, HUGE / PAGE), [false; HUGE / PAGE]);
        assert!(check(addr, HUGE, |k| k));
        assert_eq!(in_page_table(addr, HUGE / PAGE), [true; HUGE / PAGE]);
    });
}

/// Allocation of device memory fails: small pages first, then in place; never an error, never lost data.
fn under_failures(f: &Fixture, failures: usize, touch: bool) {
    let npages = HUGE / PAGE;
    // The first failure is the huge page's; each further one costs a small page.
    let in_place = failures - 1;
    let (_map, addr) = Map::huge(WRITE);
    if touch {
        init(addr, HUGE, |k| k);
    }
    let want = |k: i32| if touch { k } else { 0 };
    let attachment = f.dev.device().attachment();
    let before = attachment.stats();
    attachment.fail_next_allocations(failures);
    let mut out = vec![0xff; HUGE];
    let done = f.dev.migrate_to_dev(addr, &mut out);
    if in_place == 0 {
        assert_eq!(done, migrated(npages));
    } else {
        assert_eq!(
            done,
            error(libc::ENOENT),
            "a page that got no frame is not migrated"
        );
    }
    let stats = attachment.stats() - before;
    let moved = npages - in_place;
    assert_eq!(attachment.resident_bytes(), moved * PAGE);
    assert_eq!(stats.to_device_explicit_pages, moved as u64);
    assert_eq!(
        stats.to_device_runs, moved as u64,
        "each by itself: small pages"
    );
    let snapshot = svm::snapshot(addr, npages).unwrap();
    let (left, gone) = snapshot.split_at(in_place);
    assert!(left.iter().all(|page| !page.is_on_a_device()));
    assert!(gone.iter().all(|page| page.is_held_by(attachment)));

    // The device reads and writes them all, those that are left where the CPU has them.
    assert_eq!(f.dev.read(addr, &mut out).unwrap().cpages, npages);
    assert!(holds(&out, want));
    assert_eq!(f.dev.write(addr, &out).unwrap().cpages, npages);
    assert_eq!(attachment.resident_bytes(), moved * PAGE);
    let mirror = f.dev.mirror_of(addr, npages).unwrap();
    let region = mirror.view().region();
    let first = (addr - region.base()) / PAGE;
    let blocks = f.dev.device().snapshot(region, first..first + npages);
    let [(writable, used_in_place)] = blocks.unwrap()[..] else {
        panic!("more than a block");
    };
    assert_eq!(writable.count(), npages);
    assert_eq!(used_in_place, svm::PageMask::range(0..in_place));
    let snapshot = f.dev.snapshot(addr, npages).unwrap();
    assert!(snapshot[..in_place].iter().all(|&m| m == prot::WRITE));
    attachment.fail_next_allocations(0);
    assert!(check(addr, HUGE, want));
}

#[test]
fn migrate_anon_huge_err() {
    each("migrate_anon_huge_err", |f| {
        under_failures(f, 1, true);
        under_failures(f, 3, true);
    });
}

#[test]
fn migrate_anon_huge_zero_err() {
    each("migrate_anon_huge_zero_err", |f| {
        under_failures(f, 1, false);
        under_failures(f, 3, false);
    });
}

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

/// Of later kernels: what is left of a range that was unmapped in part comes home.
#[test]
fn migrate_partial_unmap_fault() {
    each("migrate_partial_unmap_fault", |f| {
        for (thp, offset) in thp_and_offsets() {
            let (map, addr) = Map::aligned(2 * HUGE, WRITE, thp);
            init(addr, HUGE, |k| k);
            let mut out = vec![0xff; HUGE];
            assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
            assert!(holds(&out, |k| k));
            let hole = offset..offset + HUGE / 2;
            map.unmap((addr - map.addr + hole.start) / PAGE, hole.len() / PAGE);
            // To the device it is a hole at once; the rest is its own still.
            assert_eq!(f.dev.read(addr, &mut out), error(libc::EFAULT));
            let hole_at = addr + hole.start;
            assert_eq!(
                f.dev.read(hole_at, &mut out[..PAGE]),
                error(libc::EFAULT),
                "{:?}",
                f.options
            );
            for part in [0..hole.start, hole.end..HUGE] {
                if !part.is_empty() {
                    let out = &mut out[part.clone()];
                    out.fill(0xff);
                    assert_eq!(
                        f.dev.read(addr + part.start, out).unwrap().cpages,
                        part.len() / PAGE
                    );
                }
            }
            let left = || ints(HUGE).filter(|&k| !hole.contains(&(4 * k)));
            let words = out.as_chunks().0;
            assert!(left().all(|k| i32::from_ne_bytes(words[k]) == k as i32));
            assert!(left().all(|k| load(addr, k) == k as i32));
        }
    });
}

/// Whether the kernel is asked for a huge page, and where in it something happens.
fn thp_and_offsets() -> impl Iterator<Item = (bool, usize)> {
    [false, true]
        .into_iter()
        .flat_map(|thp| [0, HUGE / 4, HUGE / 2].map(|offset| (thp, offset)))
}

/// Of later kernels: a range moves to other addresses before it migrates, or after; what is away comes home where its mapping is.
#[test]
fn migrate_remap_fault() {
    each("migrate_remap_fault", |f| {
        for (before, dont_unmap) in [(false, false), (false, true), (true, false), (true, true)] {
            for (thp, offset) in thp_and_offsets() {
                let case =
                    format!("before {before}, DONTUNMAP {dont_unmap}, thp {thp}, {offset:#x}");
                let (map, addr) = Map::aligned(8 * HUGE, WRITE, thp);
                map.unmap((addr - map.addr + HUGE) / PAGE, 2 * HUGE / PAGE);
                init(addr, HUGE, |k| k);
                let (flags, to) = if dont_unmap {
                    (libc::MREMAP_DONTUNMAP, addr + HUGE + offset)
                } else {
                    map.lost(addr, HUGE);
                    (0, addr + HUGE + offset)
                };
                if before {
                    remap(addr, flags, to);
                }
                let at = if before { to } else { addr };
                let mut out = vec![0xff; HUGE];
                assert_eq!(f.dev.migrate_to_dev(at, &mut out), migrated(HUGE / PAGE));
                assert!(holds(&out, |k| k), "{case}");
                if !before {
                    remap(addr, flags, to);
                }
                assert!(check(to, HUGE, |k| k), "{case} {:?}", f.options);
                if dont_unmap {
                    assert!(check(addr, HUGE, |_| 0), "{case}: what was left behind");
                }
                // And migrates again from there.
                init(to, HUGE, |k| k + 1);
                assert_eq!(f.dev.migrate_to_dev(to, &mut out), migrated(HUGE / PAGE));
                assert!(holds(&out, |k| k + 1), "{case}");
                assert!(check(to, HUGE, |k| k + 1), "{case}");
                unmap(to, HUGE);
            }
        }
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

/// This whole suite again, with what is forced: a process for each, since it is read once.
fn without(words: &str) {
    if std::env::var_os("SVM_DISABLE").is_some() {
        return;
    }
    let _watchdog = Watchdog::with_timeout("hmm under a fallback", Duration::from_secs(300));
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command
        .env("SVM_DISABLE", words)
        .args(["--skip", "fallbacks::"]);
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && said.contains("test result: ok."),
        "SVM_DISABLE={words}:\n{said}{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

macro_rules! fallbacks {
    ($($name:ident: $words:literal,)*) => {
        /// Both doors each, but for the inline one where there is no SIGBUS delivery.
        mod fallbacks {
            $(#[test] fn $name() { super::without($words) })*
        }
    };
}

fallbacks! {
    no_move: "move",
    no_events: "events",
    no_sigbus: "sigbus",
    no_kernel_faults: "kernel_faults",
    no_poison: "poison",
    no_wp_async: "wp_async",
    no_membarrier: "membarrier",
    no_process_vm: "process_vm",
    no_pagemap_scan: "pagemap_scan",
    no_procmap_query: "procmap_query",
    no_details: "thread_id,exact_address",
    nothing_of_later_kernels: "move,wp_async,poison,events,pagemap_scan,procmap_query,membarrier,process_vm",
}
