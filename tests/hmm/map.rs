//! [`Map`]: a mapping of the test's own; and its ints, written and looked at, there and in the device's buffer.

use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use svm::Capability;

use crate::{HUGE, PAGE, has};

pub(crate) const READ: i32 = libc::PROT_READ;
pub(crate) const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// A mapping of the test's own.
pub(crate) struct Map {
    pub(crate) addr: usize,
    len: usize,
    /// Pages that were unmapped: somebody else's mapping may be there by now.
    holes: Mutex<Vec<std::ops::Range<usize>>>,
}

impl Map {
    pub(crate) fn with(len: usize, protection: i32, flags: i32, fd: i32) -> Option<Self> {
        // SAFETY: a fresh mapping.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, 0) };
        (at != libc::MAP_FAILED).then(|| Self {
            addr: at.expose_provenance(),
            len,
            holes: Mutex::default(),
        })
    }

    pub(crate) fn new(len: usize, protection: i32) -> Self {
        Self::with(len, protection, PRIVATE, -1).unwrap()
    }

    /// A huge page's worth, aligned, where the kernel was asked for one.
    pub(crate) fn huge(protection: i32) -> (Self, usize) {
        Self::aligned(2 * HUGE, protection, true)
    }

    /// A mapping, and where a huge page can begin in it; the kernel is asked for one there, or for none.
    pub(crate) fn aligned(len: usize, protection: i32, thp: bool) -> (Self, usize) {
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

    pub(crate) fn page(&self, page: usize) -> usize {
        self.addr + page * PAGE
    }

    pub(crate) fn protect(&self, first: usize, pages: usize, protection: i32) {
        let at = ptr::with_exposed_provenance_mut(self.page(first));
        // SAFETY: the test's own mapping.
        assert_eq!(unsafe { libc::mprotect(at, pages * PAGE, protection) }, 0);
    }

    pub(crate) fn unmap(&self, first: usize, pages: usize) {
        self.holes.lock().unwrap().push(first..first + pages);
        unmap(self.page(first), pages * PAGE);
    }

    /// What is at `addr` has gone elsewhere.
    pub(crate) fn lost(&self, addr: usize, len: usize) {
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

/// Unmaps a part of the test's own mappings.
pub(crate) fn unmap(addr: usize, len: usize) {
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
pub(crate) fn remap(from: usize, flags: i32, to: usize) {
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
pub(crate) static STEP: AtomicUsize = AtomicUsize::new(1);
pub(crate) const SAMPLE: usize = 61;

/// The ints of `len` bytes that are used.
pub(crate) fn ints(len: usize) -> impl Iterator<Item = usize> {
    (0..len / 4).step_by(STEP.load(Ordering::Relaxed))
}

fn at(addr: usize, index: usize) -> *mut i32 {
    ptr::with_exposed_provenance_mut::<i32>(addr).wrapping_add(index)
}

pub(crate) fn advise(addr: usize, len: usize, advice: i32) {
    let at = ptr::with_exposed_provenance_mut(addr);
    // SAFETY: a mapping of the test's own.
    assert_eq!(unsafe { libc::madvise(at, len, advice) }, 0);
}

pub(crate) fn load(addr: usize, index: usize) -> i32 {
    // SAFETY: tests load what is mapped and readable.
    unsafe { at(addr, index).read_volatile() }
}

pub(crate) fn store(addr: usize, index: usize, value: i32) {
    // SAFETY: tests store to what is mapped and writable.
    unsafe { at(addr, index).write_volatile(value) }
}

/// `ptr[k] = f(k)` for the ints of `len` bytes from `first` on.
pub(crate) fn init(addr: usize, len: usize, f: impl Fn(i32) -> i32) {
    ints(len).for_each(|k| store(addr, k, f(k as i32)));
}

pub(crate) fn check(addr: usize, len: usize, f: impl Fn(i32) -> i32) -> bool {
    ints(len).all(|k| load(addr, k) == f(k as i32))
}

/// The device's bounce buffer.
pub(crate) fn mirror(len: usize, f: impl Fn(i32) -> i32) -> Vec<u8> {
    let mut mirror = vec![0; len];
    let words = mirror.as_chunks_mut().0;
    ints(len).for_each(|k| words[k] = f(k as i32).to_ne_bytes());
    mirror
}

pub(crate) fn holds(mirror: &[u8], f: impl Fn(i32) -> i32) -> bool {
    let words = mirror.as_chunks().0;
    ints(mirror.len()).all(|k| i32::from_ne_bytes(words[k]) == f(k as i32))
}

/// A mapping of one reserved huge page, reserving it if we may.
pub(crate) fn hugetlb() -> Option<Map> {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let map = || Map::with(HUGE, WRITE, PRIVATE | libc::MAP_HUGETLB, -1);
    map().or_else(|| {
        let _ = std::fs::write(POOL, "4");
        map()
    })
}
