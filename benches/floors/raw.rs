//! userfaultfd without a runtime: system calls by name, and no outcome but success.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use svm::addr::PAGE_SIZE;

const BLOCK: usize = 2 << 20;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}
#[repr(C)]
struct Move {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

const UFFDIO_API: u64 = 0xC018_AA3F;
const UFFDIO_REGISTER: u64 = 0xC020_AA00;
const UFFDIO_UNREGISTER: u64 = 0x8010_AA01;
const UFFDIO_MOVE: u64 = 0xC028_AA05;
const UFFDIO_WRITEPROTECT: u64 = 0xC018_AA06;

const FEATURE_WP: u64 = 1;
const FEATURE_SIGBUS: u64 = 1 << 7;
const FEATURE_EXACT_ADDRESS: u64 = 1 << 11;
const FEATURE_MOVE: u64 = 1 << 16;

/// How a floor's faults come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    /// By `SIGBUS`.
    Signal,
    /// By messages.
    Message,
}

/// Ends the bench: a floor that fails measures nothing.
fn must(what: &str, result: i64) -> i64 {
    if result == -1 {
        let error = std::io::Error::last_os_error();
        // A floor may be in a signal handler, where nothing can unwind.
        eprintln!("floor: {what}: {error}");
        std::process::abort();
    }
    result
}

#[inline]
fn ioctl<T>(fd: i32, request: u64, arg: &mut T) -> i32 {
    // SAFETY: the requests in this file read and write the struct that their number says, which is what is passed. What
    // they do to memory is the floors' business: their areas hold no Rust objects.
    unsafe { libc::ioctl(fd, request as libc::Ioctl, ptr::from_mut(arg)) }
}

/// A descriptor.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Opens one for faults of user code.
    #[must_use]
    pub fn open(faults: Faults) -> Self {
        const USER_MODE_ONLY: libc::c_int = 1;
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: userfaultfd(2) takes no pointers.
        let fd = must("userfaultfd", unsafe {
            libc::syscall(libc::SYS_userfaultfd, flags)
        });
        // SAFETY: a descriptor just made, which nobody else knows.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let how = if faults == Faults::Signal {
            FEATURE_SIGBUS
        } else {
            FEATURE_EXACT_ADDRESS
        };
        let mut api = Api {
            api: 0xAA,
            features: FEATURE_WP | FEATURE_MOVE | how,
            ioctls: 0,
        };
        must(
            "UFFDIO_API",
            ioctl(fd.as_raw_fd(), UFFDIO_API, &mut api).into(),
        );
        Self(fd)
    }

    /// The number.
    #[must_use]
    pub fn fd(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// Registers an area for missing faults, and for write-protect faults too if asked.
    pub fn register(&self, area: &Area, write_protect: bool) {
        let mode = 1 | u64::from(write_protect) << 1;
        let mut arg = Register {
            start: area.addr() as u64,
            len: area.len() as u64,
            mode,
            ioctls: 0,
        };
        must(
            "UFFDIO_REGISTER",
            ioctl(self.fd(), UFFDIO_REGISTER, &mut arg).into(),
        );
    }

    /// Gives an area's faults back.
    pub fn unregister(&self, area: &Area) {
        let mut arg = [area.addr() as u64, area.len() as u64];
        must(
            "UFFDIO_UNREGISTER",
            ioctl(self.fd(), UFFDIO_UNREGISTER, &mut arg).into(),
        );
    }

    /// Moves pages.
    #[inline]
    pub fn move_pages(&self, dst: usize, src: usize, len: usize) {
        move_pages(self.fd(), dst, src, len);
    }

    /// Sets or lifts write-protection.
    #[inline]
    pub fn write_protect(&self, start: usize, len: usize, protect: bool) {
        write_protect(self.fd(), start, len, protect);
    }
}

/// UFFDIO_MOVE. Async-signal-safe.
#[inline]
pub fn move_pages(fd: i32, dst: usize, src: usize, len: usize) {
    let mut arg = Move {
        dst: dst as u64,
        src: src as u64,
        len: len as u64,
        mode: 0,
        moved: 0,
    };
    if ioctl(fd, UFFDIO_MOVE, &mut arg) != 0 {
        finish_move(fd, dst, src, len);
    }
}

/// The rest of a MOVE that met compaction: Linux 6.18 then says how far it has counted, which is not how far it has got. Page by page: one
/// that is not there any more has moved.
#[cold]
fn finish_move(fd: i32, dst: usize, src: usize, len: usize) {
    const PAGE: usize = 4096;
    let mut at = 0;
    while at < len {
        let mut arg = Move {
            dst: (dst + at) as u64,
            src: (src + at) as u64,
            len: PAGE as u64,
            mode: 0,
            moved: 0,
        };
        if ioctl(fd, UFFDIO_MOVE, &mut arg) != 0 {
            match std::io::Error::last_os_error().raw_os_error() {
                Some(libc::EAGAIN) => continue,
                Some(libc::ENOENT | libc::EEXIST) => {}
                _ => {
                    must("UFFDIO_MOVE", -1);
                }
            }
        }
        at += PAGE;
    }
}

/// UFFDIO_WRITEPROTECT. Async-signal-safe.
#[inline]
pub fn write_protect(fd: i32, start: usize, len: usize, protect: bool) {
    let mut arg = WriteProtect {
        start: start as u64,
        len: len as u64,
        mode: u64::from(protect),
    };
    must(
        "UFFDIO_WRITEPROTECT",
        ioctl(fd, UFFDIO_WRITEPROTECT, &mut arg).into(),
    );
}

/// Private anonymous memory, aligned to 2 MiB.
#[derive(Debug)]
pub struct Area {
    mapping: usize,
    mapped: usize,
    start: usize,
    len: usize,
}

impl Area {
    /// Reserves it; `huge` asks for huge pages, else there are none.
    #[must_use]
    pub fn new(len: usize, huge: bool) -> Self {
        let mapped = len + BLOCK;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, wherever the kernel likes.
        let mapping = unsafe { libc::mmap(ptr::null_mut(), mapped, prot, flags, -1, 0) };
        must("mmap", if mapping == libc::MAP_FAILED { -1 } else { 0 });
        let mapping = mapping.expose_provenance();
        let start = mapping.next_multiple_of(BLOCK);
        let advice = if huge {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        // SAFETY: advice on our own mapping, which changes no contents.
        unsafe { libc::madvise(ptr::with_exposed_provenance_mut(start), len, advice) };
        Self {
            mapping,
            mapped,
            start,
            len,
        }
    }

    /// First byte.
    #[must_use]
    #[inline]
    pub fn addr(&self) -> usize {
        self.start
    }

    /// Bytes.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes every page once.
    pub fn populate(&self) {
        for at in (0..self.len).step_by(PAGE_SIZE) {
            self.write(at);
        }
    }

    /// Loads the byte at `offset`.
    #[inline]
    pub fn read(&self, offset: usize) -> u8 {
        debug_assert!(offset < self.len);
        // SAFETY: inside the area, which lives as long as `self`; volatile, as a fault is what it is for.
        unsafe { ptr::with_exposed_provenance::<u8>(self.start + offset).read_volatile() }
    }

    /// Stores a byte at `offset`.
    #[inline]
    pub fn write(&self, offset: usize) {
        debug_assert!(offset < self.len);
        // SAFETY: as in `read`; one thread uses an area, or a part of it.
        unsafe { ptr::with_exposed_provenance_mut::<u8>(self.start + offset).write_volatile(1) }
    }

    /// Empties it.
    pub fn discard(&self) {
        // SAFETY: our own mapping, of which no reference exists.
        unsafe {
            libc::madvise(
                ptr::with_exposed_provenance_mut(self.start),
                self.len,
                libc::MADV_DONTNEED,
            )
        };
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, of which no reference exists.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(self.mapping), self.mapped) };
    }
}
