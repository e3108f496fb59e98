//! The system calls that change mappings, as they are: for [`crate::calls`], which brackets them.
//!
//! By system call and not through libc, whose `mremap` passes a fifth argument only for the flags that it knows.

use std::io;

use super::check;

/// munmap(2).
///
/// # Errors
///
/// What the kernel says.
///
/// # Safety
///
/// As the system call: nobody refers to what goes.
pub(crate) unsafe fn munmap(addr: usize, len: usize) -> io::Result<()> {
    // SAFETY: by contract. The kernel checks the numbers.
    check(unsafe { libc::syscall(libc::SYS_munmap, addr, len) }).map(drop)
}

/// mremap(2); gives the new address.
///
/// # Errors
///
/// What the kernel says.
///
/// # Safety
///
/// As the system call: nobody refers to what moves or goes.
pub(crate) unsafe fn mremap(
    addr: usize,
    old_len: usize,
    new_len: usize,
    flags: i32,
    new_addr: usize,
) -> io::Result<usize> {
    // SAFETY: by contract. The kernel checks the numbers.
    let at = unsafe { libc::syscall(libc::SYS_mremap, addr, old_len, new_len, flags, new_addr) };
    // An address is below the sign bit; its bits are what counts.
    check(at).map(|at| at.cast_unsigned() as usize)
}

/// madvise(2).
///
/// # Errors
///
/// What the kernel says.
///
/// # Safety
///
/// As the system call: nobody counts on contents that go.
pub(crate) unsafe fn madvise(addr: usize, len: usize, advice: i32) -> io::Result<()> {
    // SAFETY: by contract. The kernel checks the numbers.
    check(unsafe { libc::syscall(libc::SYS_madvise, addr, len, advice) }).map(drop)
}

/// mprotect(2).
///
/// # Errors
///
/// What the kernel says.
///
/// # Safety
///
/// As the system call: nobody makes an access that is no longer permitted.
pub(crate) unsafe fn mprotect(addr: usize, len: usize, prot: i32) -> io::Result<()> {
    // SAFETY: by contract. The kernel checks the numbers.
    check(unsafe { libc::syscall(libc::SYS_mprotect, addr, len, prot) }).map(drop)
}
