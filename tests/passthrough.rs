//! `svm::{munmap, mremap, madvise, mprotect}` on memory that is not mirrored, and on memory that is mirrored in part, are the system
//! calls: the same answers, the same contents, the same holes.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]
#![cfg(target_os = "linux")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use svm::Access;
use tests::device::fault_in;
use tests::mapping::{READ_WRITE, each, errno};
use tests::{Map, TestDevice};

const PAGE: usize = 4096;

/// What a bare call and what a wrapper answered.
#[derive(Debug, PartialEq)]
struct Answer {
    errno: Option<i32>,
    pages: Vec<Option<u64>>,
}

/// The pages of a range, where there are any.
fn contents(addr: usize, pages: usize) -> Vec<Option<u64>> {
    (0..pages)
        .map(|page| {
            let mut word = 0u64;
            let local = libc::iovec {
                iov_base: (&raw mut word).cast(),
                iov_len: 8,
            };
            let at = ptr::with_exposed_provenance_mut(addr + page * PAGE);
            let remote = libc::iovec {
                iov_base: at,
                iov_len: 8,
            };
            // SAFETY: getpid has no preconditions.
            let pid = unsafe { libc::getpid() };
            // SAFETY: reads eight bytes of our own memory, if they are there, into `word`.
            let n = unsafe {
                libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0)
            };
            (n == 8).then_some(word)
        })
        .collect()
}

type Call<'a> = (
    &'a str,
    &'a dyn Fn(usize) -> i32,
    &'a dyn Fn(usize) -> svm::Result<()>,
);

fn bare(result: libc::c_long) -> i32 {
    if result == -1 {
        io::Error::last_os_error().raw_os_error().unwrap()
    } else {
        0
    }
}

/// The same calls on a mapping that is not mirrored, by system call; on one that is not, by wrapper; and on one that is mirrored in
/// part: the same error numbers, the same contents, the same holes.
#[test]
fn what_is_not_mirrored_or_half_is_called_as_it_is() {
    each(
        "what_is_not_mirrored_or_half_is_called_as_it_is",
        |options| {
            let at = |addr: usize| ptr::with_exposed_provenance_mut::<u8>(addr);
            macro_rules! both {
            ($name:expr, $number:expr, $wrapper:path, $offset:expr, $($arg:expr),*) => {(
                concat!($name, " ", stringify!($offset), " ", stringify!($($arg),*)),
                // SAFETY: memory of the test's.
                &|base: usize| bare(unsafe { libc::syscall($number, base + $offset, $($arg),*) }),
                // SAFETY: memory of the test's.
                &|base: usize| unsafe { $wrapper(at(base + $offset), $($arg),*) },
            )};
        }
            use libc::{SYS_madvise, SYS_mprotect, SYS_munmap};
            let (p, none) = (PAGE, 0usize);
            let calls: &[Call<'_>] = &[
                both!("munmap", SYS_munmap, svm::munmap, 0, 16 * p),
                both!("munmap", SYS_munmap, svm::munmap, 4 * p, 8 * p),
                both!("munmap", SYS_munmap, svm::munmap, 4 * p, 8 * p - 100),
                both!("munmap", SYS_munmap, svm::munmap, 12, p),
                both!("munmap", SYS_munmap, svm::munmap, 0, none),
                both!("munmap", SYS_munmap, svm::munmap, 0, usize::MAX - 5),
                both!(
                    "madvise",
                    SYS_madvise,
                    svm::madvise,
                    0,
                    16 * p,
                    libc::MADV_DONTNEED
                ),
                both!(
                    "madvise",
                    SYS_madvise,
                    svm::madvise,
                    4 * p,
                    8 * p,
                    libc::MADV_DONTNEED
                ),
                both!(
                    "madvise",
                    SYS_madvise,
                    svm::madvise,
                    4 * p,
                    7 * p + 1,
                    libc::MADV_DONTNEED
                ),
                both!(
                    "madvise",
                    SYS_madvise,
                    svm::madvise,
                    4 * p,
                    24 * p,
                    libc::MADV_DONTNEED
                ),
                both!(
                    "madvise",
                    SYS_madvise,
                    svm::madvise,
                    4 * p,
                    8 * p,
                    libc::MADV_REMOVE
                ),
                both!("madvise", SYS_madvise, svm::madvise, 4 * p, 8 * p, 12345),
                both!(
                    "madvise",
                    SYS_madvise,
                    svm::madvise,
                    4 * p,
                    8 * p,
                    libc::MADV_NORMAL
                ),
                both!(
                    "madvise",
                    SYS_madvise,
                    svm::madvise,
                    1,
                    p,
                    libc::MADV_DONTNEED
                ),
                both!(
                    "madvise",
                    SYS_madvise,
                    svm::madvise,
                    0,
                    none,
                    libc::MADV_DONTNEED
                ),
                both!(
                    "mprotect",
                    SYS_mprotect,
                    svm::mprotect,
                    0,
                    16 * p,
                    libc::PROT_READ
                ),
                both!(
                    "mprotect",
                    SYS_mprotect,
                    svm::mprotect,
                    4 * p,
                    8 * p,
                    libc::PROT_NONE
                ),
                both!(
                    "mprotect",
                    SYS_mprotect,
                    svm::mprotect,
                    4 * p,
                    24 * p,
                    libc::PROT_READ
                ),
                both!(
                    "mprotect",
                    SYS_mprotect,
                    svm::mprotect,
                    3,
                    p,
                    libc::PROT_READ
                ),
                both!("mprotect", SYS_mprotect, svm::mprotect, 0, p, 0x4000_0000),
            ];
            for (name, bare, wrapper) in calls {
                let layout = || {
                    let room = Map::apart(40, libc::PROT_NONE);
                    let map = Map::at_hint(room.addr, 16, READ_WRITE, libc::MAP_FIXED);
                    (0..16).for_each(|page| map.write(page, page as u64 + 1));
                    // A hole, and something behind it.
                    // SAFETY: memory of the test's.
                    unsafe { libc::munmap(map.at(16).cast(), 4 * PAGE) };
                    map
                };
                let plain = layout();
                let wanted = Answer {
                    errno: Some(bare(plain.addr)),
                    pages: contents(plain.addr, 16),
                };
                let other = layout();
                let found = Answer {
                    errno: Some(errno(wrapper(other.addr))),
                    pages: contents(other.addr, 16),
                };
                assert_eq!(found, wanted, "not mirrored: {name}");
                let half = layout();
                // SAFETY: memory of the test's.
                let mirror = unsafe { svm::mirror_raw(half.at(4), 6 * PAGE, options) }.unwrap();
                let device = TestDevice::new().unwrap();
                fault_in(&device, &mirror, 0, 6, Access::Write);
                assert_eq!(half.read(5), 6);
                let errno = Some(errno(wrapper(half.addr)));
                assert_eq!(mirror.stats().anomalies, 0, "{name}");
                mirror.close().unwrap();
                assert_eq!(
                    Answer {
                        errno,
                        pages: contents(half.addr, 16)
                    },
                    wanted,
                    "half mirrored: {name} {options:?}"
                );
                for map in [plain, other, half] {
                    Map { pages: 40, ..map }.unmap();
                }
            }
        },
    );
}

/// One `mremap`: a range in pages from the layout's start, its new length, flags, and where to if they say so.
#[derive(Clone, Copy, Debug)]
struct Remap {
    from: usize,
    old: usize,
    new: usize,
    flags: i32,
    to: usize,
}

/// What became of it.
#[derive(Debug, PartialEq)]
struct Remapped {
    errno: i32,
    /// Where to, from the layout's start; none for a place of the kernel's choice.
    at: Option<usize>,
    /// What is there.
    there: Vec<Option<u64>>,
    layout: Vec<Option<u64>>,
}

/// Sixteen pages with a hole of four behind them, and room.
const LAYOUT: usize = 40;

fn layout() -> Map {
    let room = Map::apart(LAYOUT, libc::PROT_NONE);
    let map = Map::at_hint(room.addr, 16, READ_WRITE, libc::MAP_FIXED);
    (0..16).for_each(|page| map.write(page, page as u64 + 1));
    // SAFETY: memory of the test's.
    let outcome = unsafe { libc::munmap(map.at(16).cast(), 4 * PAGE) };
    assert_eq!(outcome, 0);
    map
}

/// Makes a part of a map for the kernel what a mirror makes of it: a mapping of its own, which is not inherited and a userfaultfd has.
/// (Of such it moves one at a time.) It is the returned one's, which nobody reads: no page of it is missing.
fn set_apart(map: &Map, first: usize, pages: usize) -> OwnedFd {
    const UFFD_USER_MODE_ONLY: i32 = 1;
    const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
    const MISSING: u64 = 1;
    let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY;
    let mut api = [0xaa_u64, 0, 0];
    let start = map.at(first).addr() as u64;
    let mut register = [start, (pages * PAGE) as u64, MISSING, 0];
    // SAFETY: the descriptor is new; the structures are as the kernel has them, and outlive the calls; the memory is the test's.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, flags);
        assert_ne!(fd, -1, "{}", io::Error::last_os_error());
        let fd = OwnedFd::from_raw_fd(i32::try_from(fd).unwrap());
        assert_eq!(libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api), 0);
        let registered = libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut register);
        assert_eq!(registered, 0, "{}", io::Error::last_os_error());
        let part = map.at(first).cast();
        assert_eq!(libc::madvise(part, pages * PAGE, libc::MADV_DONTFORK), 0);
        fd
    }
}

impl Remap {
    /// What has come of it: `outcome` gives the new address, or the error number.
    fn seen(self, map: &Map, outcome: Result<usize, i32>) -> Remapped {
        let in_layout = |at: usize| {
            at.checked_sub(map.addr)
                .filter(|&offset| offset < LAYOUT * PAGE)
        };
        Remapped {
            errno: outcome.err().unwrap_or(0),
            at: outcome.ok().and_then(in_layout),
            there: outcome.map_or(Vec::new(), |at| contents(at, self.new)),
            layout: contents(map.addr, LAYOUT),
        }
    }

    fn bare(self, map: &Map) -> Result<usize, i32> {
        // SAFETY: memory of the test's.
        let at = unsafe {
            libc::syscall(
                libc::SYS_mremap,
                map.addr + self.from * PAGE,
                self.old * PAGE,
                self.new * PAGE,
                self.flags,
                map.addr + self.to * PAGE,
            )
        };
        match bare(at) {
            0 => Ok(usize::try_from(at).unwrap()),
            errno => Err(errno),
        }
    }

    fn wrapped(self, map: &Map) -> Result<usize, i32> {
        let (old, new) = (self.old * PAGE, self.new * PAGE);
        // SAFETY: memory of the test's.
        unsafe { svm::mremap(map.at(self.from), old, new, self.flags, map.at(self.to)) }
            .map(<*mut u8>::expose_provenance)
            .map_err(|error| error.os_error().unwrap())
    }
}

/// As the other calls: on what is not mirrored, and on what is in part, `mremap` does as the system call does.
#[test]
fn mremap_of_what_is_not_mirrored_or_half_is_called_as_it_is() {
    use libc::{MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE};
    let fixed = MREMAP_MAYMOVE | MREMAP_FIXED;
    let kept = MREMAP_MAYMOVE | MREMAP_DONTUNMAP;
    let remap = |from, old, new, flags, to| Remap {
        from,
        old,
        new,
        flags,
        to,
    };
    // Pages 4 to 10 are the mirrored ones.
    let calls = [
        // Cut off: across the mirror, in it, behind it.
        remap(0, 16, 8, 0, 0),
        remap(4, 6, 3, 0, 0),
        remap(4, 6, 3, MREMAP_MAYMOVE, 0),
        remap(10, 6, 1, 0, 0),
        // Grown: where there is room, where there is none, and away from there.
        remap(10, 6, 8, 0, 0),
        remap(10, 6, 12, 0, 0),
        remap(4, 6, 8, 0, 0),
        remap(4, 6, 8, MREMAP_MAYMOVE, 0),
        remap(10, 6, 12, MREMAP_MAYMOVE, 0),
        // Moved: the mirror, a part of it, what is beside it, what it is only a part of, and over it.
        remap(4, 6, 6, fixed, 24),
        remap(6, 2, 4, fixed, 24),
        remap(4, 6, 2, fixed, 24),
        remap(0, 4, 4, fixed, 24),
        remap(2, 4, 4, fixed, 24),
        remap(0, 16, 16, fixed, 24),
        remap(0, 4, 4, fixed, 5),
        remap(12, 4, 2, fixed, 3),
        // Moved, and left mapped.
        remap(4, 6, 6, kept, 0),
        remap(5, 2, 2, kept | MREMAP_FIXED, 24),
        remap(11, 2, 2, kept | MREMAP_FIXED, 24),
        remap(4, 6, 4, kept, 0),
        // Refused: flags, lengths, overlaps, holes, and what wraps.
        remap(4, 6, 6, MREMAP_FIXED, 24),
        remap(4, 6, 0, 0, 0),
        remap(4, 6, 6, 64, 0),
        remap(4, 6, 6, fixed, 6),
        remap(17, 1, 2, MREMAP_MAYMOVE, 0),
        remap(12, 6, 6, fixed, 24),
        remap(4, usize::MAX / PAGE, 6, 0, 0),
    ];
    each(
        "mremap_of_what_is_not_mirrored_or_half_is_called_as_it_is",
        |options| {
            for call in calls {
                let plain = layout();
                let wanted = call.seen(&plain, call.bare(&plain));
                let other = layout();
                let found = call.seen(&other, call.wrapped(&other));
                assert_eq!(found, wanted, "not mirrored: {call:?}");

                let apart = layout();
                let uffd = set_apart(&apart, 4, 6);
                let outcome = call.bare(&apart);
                // What it has left empty is zeros from here on.
                drop(uffd);
                let wanted = call.seen(&apart, outcome);
                let half = layout();
                // SAFETY: memory of the test's.
                let mirror = unsafe { svm::mirror_raw(half.at(4), 6 * PAGE, options) }.unwrap();
                let device = TestDevice::new().unwrap();
                fault_in(&device, &mirror, 0, 6, Access::Write);
                assert_eq!(half.read(5), 6);
                let outcome = call.wrapped(&half);
                assert_eq!(mirror.stats().anomalies, 0, "{call:?}");
                mirror.close().unwrap();
                let found = call.seen(&half, outcome);
                assert_eq!(found, wanted, "half mirrored: {call:?} {options:?}");
                for map in [plain, other, apart, half] {
                    Map {
                        pages: LAYOUT,
                        ..map
                    }
                    .unmap();
                }
            }
        },
    );
}
