//! Twins of the kernel's `tools/testing/selftests/mm/hmm-tests.c`, under the same names: real system calls on real memory, the
//! test device of [`tests::mm`], both doors, every granule; and again under each forced fallback.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use svm::{Delivery, Granule, Options};
use tests::Watchdog;
use tests::mm::{Dmirror, Done, Errno, Mm, prot};

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
        let map = Self::new(2 * HUGE, protection);
        let at = map.addr.next_multiple_of(HUGE);
        advise(at, HUGE, libc::MADV_HUGEPAGE);
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
        let at = ptr::with_exposed_provenance_mut(self.page(first));
        self.holes.lock().unwrap().push(first..first + pages);
        // SAFETY: the test's own mapping.
        assert_eq!(unsafe { libc::munmap(at, pages * PAGE) }, 0);
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
                let at = ptr::with_exposed_provenance_mut(self.addr + page * PAGE);
                // SAFETY: what is left of the test's mapping, and it is over.
                unsafe { libc::munmap(at, (hole.start - page) * PAGE) };
            }
            page = hole.end;
        }
    }
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
    (0..len / 4).for_each(|k| store(addr, k, f(k as i32)));
}

fn check(addr: usize, len: usize, f: impl Fn(i32) -> i32) -> bool {
    (0..len / 4).all(|k| load(addr, k) == f(k as i32))
}

/// The device's bounce buffer.
fn mirror(len: usize, f: impl Fn(i32) -> i32) -> Vec<u8> {
    (0..len / 4)
        .flat_map(|k| f(k as i32).to_ne_bytes())
        .collect()
}

fn holds(mirror: &[u8], f: impl Fn(i32) -> i32) -> bool {
    mirror
        .as_chunks::<4>()
        .0
        .iter()
        .zip(0..)
        .all(|(bytes, k)| i32::from_ne_bytes(*bytes) == f(k))
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
    let _watchdog = Watchdog::with_timeout(name, std::time::Duration::from_secs(120));
    if !tests::usable() {
        return;
    }
    // Fallbacks differ in how a page moves, not in how many.
    let granules: &[Granule] =
        if std::env::var_os("SVM_DISABLE").is_some_and(|words| !words.is_empty()) {
            &[Granule::Big]
        } else {
            &[Granule::Page, Granule::Big, Granule::Huge]
        };
    for delivery in [Delivery::Inline, Delivery::Thread] {
        for &granule in granules {
            let options = Options::new().delivery(delivery).granule(granule);
            if let Err(error) = svm::Buffer::<u8>::with_options(1, &options) {
                // Without SIGBUS delivery the other door is left.
                let is_left = delivery == Delivery::Thread;
                assert!(error.is_unsupported() && !is_left, "{error}");
                continue;
            }
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
        (first..SIZE / 4).for_each(|k| store(map.addr, k, k as i32));
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

#[test]
fn migrate_multiple() {
    each("migrate_multiple", |f| {
        for _ in 0..NTIMES {
            let map = Map::new(SIZE, WRITE);
            init(map.addr, SIZE, |k| k);
            let mut out = vec![0; SIZE];
            assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
            assert!(holds(&out, |k| k));
            assert_eq!(f.dev.migrate_to_sys(map.addr, NPAGES), migrated(NPAGES));
            assert_eq!(f.dev.device().attachment().resident_bytes(), 0);
            assert!(check(map.addr, SIZE, |k| k));
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

/// The kernel's has a page that its driver inserted; ours one of a memfd, and the system calls that a pin guards.
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
        assert!(check(map.page(2), SIZE - 2 * PAGE, |k| k + 2 * PAGE as i32 / 4));
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
        for k in 0..SIZE / 4 {
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

/// What `get_user_pages` is to the kernel's, a system call and a pin are here.
#[test]
fn hmm_gup_test() {
    each("hmm_gup_test", |f| {
        let map = Map::new(4 * PAGE, WRITE);
        init(map.addr, 4 * PAGE, |k| k);
        let mut out = vec![0; 4 * PAGE];
        // SAFETY: the test's own mapping.
        let whole = unsafe {
            svm::mirror_raw(
                ptr::with_exposed_provenance_mut(map.addr),
                4 * PAGE,
                &f.options,
            )
        }
        .unwrap();
        let device = f.dev.device();
        let (region, addr) = (whole.view().region(), whole.view().addr());
        assert!(device.migrate_to_device(region, addr, 4).unwrap());
        let pin = whole.pin(..).unwrap();
        let file = temporary_file(4 * PAGE);
        // SAFETY: the pages are the test's, and pinned.
        let wrote = unsafe {
            libc::write(
                file.as_raw_fd(),
                ptr::with_exposed_provenance(map.addr),
                4 * PAGE,
            )
        };
        assert_eq!(
            wrote,
            4 * PAGE as isize,
            "{}",
            std::io::Error::last_os_error()
        );
        // A pinned page does not migrate; the device works on it in place, and the system call sees that.
        assert!(!device.migrate_to_device(region, addr, 4).unwrap());
        device.write(region, addr, &7i32.to_ne_bytes()).unwrap();
        // SAFETY: as above.
        let read = unsafe { libc::pread(file.as_raw_fd(), out.as_mut_ptr().cast(), 4 * PAGE, 0) };
        assert_eq!(read, 4 * PAGE as isize);
        assert!(holds(&out, |k| k));
        assert_eq!(f.dev.snapshot(map.addr, 4).unwrap(), [prot::WRITE; 4]);
        assert_eq!(load(map.addr, 0), 7);
        drop(pin);
        assert!(device.migrate_to_device(region, addr, 4).unwrap());
        whole.close().unwrap();
        assert_eq!((load(map.addr, 0), load(map.addr, 1)), (7, 1));
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

#[test]
fn migrate_anon_huge_fault() {
    each("migrate_anon_huge_fault", |f| {
        let (_map, addr) = Map::huge(WRITE);
        init(addr, HUGE, |k| k);
        let mut out = vec![0; HUGE];
        assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
        assert!(holds(&out, |k| k));
        let snapshot = f.dev.snapshot(addr, HUGE / PAGE).unwrap();
        assert!(
            snapshot
                .iter()
                .all(|&m| m & !prot::PMD == prot::DEV_PRIVATE_LOCAL | prot::WRITE)
        );
        assert!(
            svm::snapshot(addr, HUGE / PAGE)
                .unwrap()
                .iter()
                .all(|page| !page.is_present())
        );
        assert!(check(addr, HUGE, |k| k));
    });
}

/// Allocation of device memory fails: small pages, then in place; never an error, never lost data.
fn under_failures(f: &Fixture, failures: usize, touch: bool) {
    let (_map, addr) = Map::huge(WRITE);
    if touch {
        init(addr, HUGE, |k| k);
    }
    let want = |k: i32| if touch { k } else { 0 };
    f.dev.device().attachment().fail_next_allocations(failures);
    let mut out = vec![0xff; HUGE];
    let done = f.dev.migrate_to_dev(addr, &mut out);
    if failures == 1 {
        assert_eq!(done, migrated(HUGE / PAGE));
        assert!(holds(&out, want));
    } else {
        assert_eq!(
            done,
            error(libc::ENOENT),
            "a page that got no frame is not migrated"
        );
        assert_eq!(f.dev.read(addr, &mut out).unwrap().cpages, HUGE / PAGE);
        assert!(holds(&out, want));
    }
    f.dev.device().attachment().fail_next_allocations(0);
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

/// This whole suite again, once for each fallback. (Not without events: a kernel without them does not tell what this suite is
/// about.)
#[test]
fn fallbacks() {
    if std::env::var_os("SVM_DISABLE").is_some() {
        return;
    }
    for words in ["move", "sigbus", "pagemap_scan,procmap_query"] {
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
