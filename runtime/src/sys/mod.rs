//! The system-call layer: the only syscalls of this crate and, as far as can be, its only `unsafe`.
//!
//! | module | what of Linux |
//! |---|---|
//! | [`uffd`], [`event`] | userfaultfd: handshake, registration, the fault-path ioctls; messages |
//! | [`signal`] | the SIGBUS handler and its chain; masking asynchronous signals |
//! | [`pagemap`] | which pages are present, write-protected, swapped (PAGEMAP_SCAN) |
//! | [`maps`] | which mapping covers an address (PROCMAP_QUERY) |
//! | [`calls`] | munmap, mremap, madvise, mprotect for an application |
//! | [`mmap`] | address-space reservations; memory of our own that malloc never sees |
//! | [`sched`] | which CPUs a thread may run on, and which it ran on |
//! | [`thread`] | threads of our own, also in a forked child |
//! | [`futex`], [`membarrier`], [`clock`], [`process`] | waiting, fences, time, and the rest |
//!
//! # The fault-path law
//!
//! A function whose documentation says *fault path* may run inside a signal handler that interrupted
//! malloc, or on the thread that every faulting thread waits for. It does not allocate, log, panic,
//! take a lock, touch mirrored memory or use a lazily initialised thread-local, and it reports
//! outcomes as small `Copy` values. Everything else here is *control path* and returns
//! [`std::io::Error`].
//!
//! # What is unsafe
//!
//! Through an ioctl a process writes its own memory as freely as through a pointer, so what fills,
//! empties or poisons a page is as unsafe as the pointer would be. The proof is given once, at
//! [`uffd::Uffd::register`], whose caller answers for every later change the descriptor makes in the
//! range; the later calls need only be inside such a range. The kernel does not check that for us: to
//! COPY and ZEROPAGE a range registered with *any* userfaultfd is good (a test shows it). Protecting,
//! waking and looking change no contents, and are safe.

pub(crate) mod arc;
pub(crate) mod calls;
pub(crate) mod clock;
pub(crate) mod disable;
pub(crate) mod event;
pub(crate) mod flight;
pub(crate) mod futex;
pub(crate) mod gated;
pub(crate) mod maps;
pub(crate) mod membarrier;
pub(crate) mod mmap;
pub(crate) mod pagemap;
pub(crate) mod process;
pub(crate) mod sched;
pub(crate) mod signal;
mod stack;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod thread;
pub(crate) mod uffd;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

// Addresses go to the kernel as 64-bit numbers, and windows need room.
const _: () = assert!(usize::BITS == 64);

/// The calling thread's `errno`, as the last failed libc call left it. Fault path.
#[inline]
fn errno() -> i32 {
    // SAFETY: __errno_location has no preconditions and returns a pointer that is valid for the
    // calling thread's lifetime.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: see above; errno is thread-local, so nobody else accesses it.
    unsafe { *location }
}

/// Sets the calling thread's `errno`. Fault path.
#[inline]
fn set_errno(value: i32) {
    // SAFETY: as in `errno`.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: as in `errno`.
    unsafe { *location = value };
}

/// Turns the -1-and-errno convention into a [`Result`].
#[inline]
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 {
        Err(io::Error::from_raw_os_error(errno()))
    } else {
        Ok(result)
    }
}

/// The number of an ioctl that reads and writes a `T`: the kernel's `_IOWR(kind, nr, T)`.
const fn iowr<T>(kind: u8, nr: u8) -> u32 {
    (3 << 30) | ((size_of::<T>() as u32) << 16) | ((kind as u32) << 8) | nr as u32
}

/// Calls `ioctl(fd, request, arg)` and returns 0 or the errno. Fault path.
///
/// # Safety
///
/// `request` must read and write at most a `T` through its argument, and what it does beyond that
/// must be sound.
#[inline]
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: u32, arg: &mut T) -> i32 {
    let arg: *mut T = arg;
    // SAFETY: `fd` is open, for it is borrowed; `arg` is valid for reads and writes of a `T`, which
    // by this function's contract is all that the request accesses through it; so are its effects.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::Ioctl, arg) };
    if result == -1 { errno() } else { 0 }
}

/// Makes the descriptor number of `old` refer to what `new` does; what it referred to is closed in this
/// process. Async-signal-safe.
fn replace_fd(old: BorrowedFd<'_>, new: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: dup3 takes no pointers. Both descriptors are open; the owner of `old` goes on owning a
    // descriptor of that number.
    let fd = unsafe { libc::dup3(new.as_raw_fd(), old.as_raw_fd(), libc::O_CLOEXEC) };
    check(libc::c_long::from(fd)).map(drop)
}
