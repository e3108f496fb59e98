//! Filters of system calls such as containers have, written by hand: what they leave of userfaultfd.
//!
//! Included by path in the tests of `accel-sim`, which run its binary under them.

#![allow(
    unreachable_pub,
    reason = "public in one of the crates that include it"
)]

use std::io;

/// What a filter answers.
#[derive(Clone, Copy, Debug)]
pub struct Filter {
    /// To the system call userfaultfd, whatever its flags: this error number.
    pub syscall: Option<i32>,
    /// To its flag for faults of user code alone, which kernels before 5.11 do not know.
    pub user_mode_only: Option<i32>,
    /// To `USERFAULTFD_IOC_NEW` on /dev/userfaultfd.
    pub device: Option<i32>,
}

const USER_MODE_ONLY: u32 = 1;
const IOC_NEW: u32 = 0xAA00;

/// Offsets in the kernel's `struct seccomp_data`: the number, and the low halves of the first two arguments (little endian).
const NUMBER: u32 = 0;
const FIRST: u32 = 16;
const SECOND: u32 = 24;

impl Filter {
    /// Puts it in force for this thread and what it makes or executes, for good. Async-signal-safe, for between fork and exec.
    ///
    /// # Errors
    /// The kernel has no filters.
    pub fn install(&self) -> io::Result<()> {
        let answer = |errno: Option<i32>| {
            errno.map_or(libc::SECCOMP_RET_ALLOW, |errno| {
                libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()
            })
        };
        let load = |at| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
        let unless = |value: u32, skip| {
            instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, value)
        };
        let unless_set =
            |bits, skip| instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 0, skip, bits);
        let say = |errno| instruction(libc::BPF_RET | libc::BPF_K, 0, 0, answer(errno));
        let mut program = [
            load(NUMBER),
            unless(libc::SYS_userfaultfd as u32, 4),
            load(FIRST),
            unless_set(USER_MODE_ONLY, 1),
            say(self.user_mode_only.or(self.syscall)),
            say(self.syscall),
            unless(libc::SYS_ioctl as u32, 3),
            load(SECOND),
            unless(IOC_NEW, 1),
            say(self.device),
            say(None),
        ];
        let program = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: sets a flag of this thread.
        let no_more = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        // SAFETY: the kernel copies the program.
        let installed = unsafe {
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
                0,
                0,
            )
        };
        if no_more == 0 && installed == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn instruction(code: u32, if_true: u8, if_false: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: if_true,
        jf: if_false,
        k,
    }
}
