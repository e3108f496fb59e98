//! userfaultfd: handshake, registration, and the fault-path ioctls. What is read from it is in
//! [`super::event`].
//!
//! # Life of a descriptor
//!
//! ```text
//! open ──► UFFDIO_API ──► register … unregister ──► drop
//!            │ on a second descriptor first, with no features asked for, to learn which exist:
//!            │ a handshake that succeeded can't be repeated on the same one
//! ```
//!
//! The descriptor is made by the system call, and through /dev/userfaultfd only where that is
//! refused: a process that may not open the device is then still served (with user-mode faults only).
//! Registration goes through the `userfaultfd` crate. The ioctls that resolve a fault are here: the
//! crate has neither MOVE nor POISON nor COPY's MODE_WP, and folds partial results into errors.
//!
//! Dropping releases every waiter, and pages that are missing then read as *zeros*: the owner brings
//! every page home first.
//!
//! # Outcomes
//!
//! The kernel's "no" is mostly not an error: somebody else was faster, or the address space is
//! changing. So each fault-path ioctl returns [`Moved`]: how many bytes it did, and what stopped it.
//! All of them work from the start of the range upwards. If the kernel stops midway it reports the
//! progress but not the reason; we then ask again for the rest, and so obtain both. Each such step
//! has made progress, so there are at most as many as there are pages.
//!
//! What the kernel means by each [`Stop`] is in the table; what to *do* about it is the caller's rule.
//!
//! | | COPY, ZEROPAGE, POISON | MOVE | WRITEPROTECT |
//! |---|---|---|---|
//! | [`Exists`](Stop::Exists) | page present; a marker, but for COPY, which overwrites it | destination not empty, or a marker | |
//! | [`NotPresent`](Stop::NotPresent) | no such mapping, or not registered here | source hole, or as left | part of it not registered |
//! | [`Changing`](Stop::Changing) | an event is pending: let go of everything, retry later | same | same |
//! | [`Busy`](Stop::Busy) | | not exclusively owned, pinned, split failed | |
//! | [`Invalid`](Stop::Invalid) | | not anonymous, access bits or mlock differ, crosses a mapping | |
//! | [`Fault`](Stop::Fault) | source unreadable | | |
//!
//! MOVE on some kernels (6.18 is one) can answer Exists or NotPresent *after* the page did move: look
//! at both ends ([`super::pagemap`]) before deciding.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout};
use userfaultfd::{IoctlFlags, RegisterMode};
use userfaultfd_sys::{
    UFFD_API, UFFD_USER_MODE_ONLY, UFFDIO_API, UFFDIO_COPY, UFFDIO_COPY_MODE_DONTWAKE,
    UFFDIO_COPY_MODE_WP, UFFDIO_WAKE, UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT_MODE_DONTWAKE,
    UFFDIO_WRITEPROTECT_MODE_WP, UFFDIO_ZEROPAGE, UFFDIO_ZEROPAGE_MODE_DONTWAKE, uffdio_api,
    uffdio_copy, uffdio_range, uffdio_writeprotect, uffdio_zeropage,
};

use super::disable::{Disabled, VARIABLE};
pub(crate) use super::event::{Doorbell, Ready};
use super::process::{Status, abort_with_message};
use super::{check, ioctl, iowr, replace_fd};
use crate::addr::PageRange;

bitflags::bitflags! {
    /// `UFFD_FEATURE_*`, with the kernel version that brought each.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Features: u64 {
        /// Write-protection of private anonymous memory (5.7).
        const PAGEFAULT_FLAG_WP = 1 << 0;
        /// An event for fork; needs CAP_SYS_PTRACE (4.11).
        const EVENT_FORK = 1 << 1;
        /// An event for mremap (4.11).
        const EVENT_REMAP = 1 << 2;
        /// An event for madvise that drops pages (4.11).
        const EVENT_REMOVE = 1 << 3;
        /// MISSING on hugetlbfs (4.11).
        const MISSING_HUGETLBFS = 1 << 4;
        /// MISSING on shared memory (4.11).
        const MISSING_SHMEM = 1 << 5;
        /// An event for munmap (4.11).
        const EVENT_UNMAP = 1 << 6;
        /// Faults are SIGBUS in the faulting thread, not messages (4.14).
        const SIGBUS = 1 << 7;
        /// Fault messages carry the thread id (4.14).
        const THREAD_ID = 1 << 8;
        /// MINOR on hugetlbfs (5.13).
        const MINOR_HUGETLBFS = 1 << 9;
        /// MINOR on shared memory (5.14).
        const MINOR_SHMEM = 1 << 10;
        /// Fault messages carry the address, not its page (5.18).
        const EXACT_ADDRESS = 1 << 11;
        /// Write-protection of hugetlbfs and shared memory (5.19).
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Write-protection of pages never populated (6.4). Never asked for: hazard M2.
        const WP_UNPOPULATED = 1 << 13;
        /// UFFDIO_POISON (6.6).
        const POISON = 1 << 14;
        /// Write-protection the kernel resolves by itself, recorded in pagemap (6.7).
        const WP_ASYNC = 1 << 15;
        /// UFFDIO_MOVE (6.8).
        const MOVE = 1 << 16;
    }
}

bitflags::bitflags! {
    /// `UFFDIO_REGISTER_MODE_*`: which faults a registered range delivers.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Mode: u64 {
        /// An access to a page that is not there.
        const MISSING = 1 << 0;
        /// A write to a page that is write-protected.
        const WP = 1 << 1;
    }
}

bitflags::bitflags! {
    /// Which ioctls a registered range takes, as UFFDIO_REGISTER reports: bit n is ioctl n.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Ioctls: u64 {
        const WAKE = 1 << 2;
        const COPY = 1 << 3;
        const ZEROPAGE = 1 << 4;
        const MOVE = 1 << 5;
        const WRITEPROTECT = 1 << 6;
        const CONTINUE = 1 << 7;
        const POISON = 1 << 8;
    }
}

/// What a page is like the moment it appears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protect {
    /// Writable, as far as the mapping is.
    No,
    /// Write-protected from the first instant.
    Yes,
}

/// Whether a successful resolution wakes the threads that wait in the range. Those that fault by
/// SIGBUS do not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    Yes,
    #[cfg_attr(
        not(test),
        allow(dead_code, reason = "what waking costs is measured against it")
    )]
    No,
}

/// Why a fault-path ioctl went no further. See the table in the module documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It did the whole range.
    Complete,
    /// EEXIST.
    Exists,
    /// ENOENT.
    NotPresent,
    /// EAGAIN.
    Changing,
    /// EBUSY.
    Busy,
    /// EINVAL.
    Invalid,
    /// ENOMEM.
    NoMemory,
    /// EFAULT.
    Fault,
    /// Another errno; ESRCH is a process that is gone.
    Other(i32),
}

impl Stop {
    const fn from_errno(errno: i32) -> Self {
        match errno {
            0 => Self::Complete,
            libc::EEXIST => Self::Exists,
            libc::ENOENT => Self::NotPresent,
            libc::EAGAIN => Self::Changing,
            libc::EBUSY => Self::Busy,
            libc::EINVAL => Self::Invalid,
            libc::ENOMEM => Self::NoMemory,
            libc::EFAULT => Self::Fault,
            other => Self::Other(other),
        }
    }
}

/// What a fault-path ioctl did.
#[must_use = "a range may be resolved in part only"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Bytes resolved, from the start of the range upwards; whole pages.
    pub(crate) bytes: usize,
    /// Why it went no further; `Complete` iff `bytes` is the range's length.
    pub(crate) stop: Stop,
}

impl Moved {
    /// Whether the whole range was resolved.
    #[inline]
    pub(crate) const fn is_complete(self) -> bool {
        matches!(self.stop, Stop::Complete)
    }
}

/// Runs `step(done)`, an ioctl on what is left of the range beyond `done` bytes, until it has done
/// everything or says why not. A step returns its errno and its result field.
#[inline]
fn run_steps(len_bytes: usize, mut step: impl FnMut(usize) -> (i32, i64)) -> Moved {
    let mut done = 0;
    loop {
        let (errno, field) = step(done);
        if errno == 0 {
            return Moved {
                bytes: len_bytes,
                stop: Stop::Complete,
            };
        }
        // EAGAIN with a positive field: progress was made. (The field is zeroed beforehand, since
        // older kernels leave it alone on early errors, and holds -errno on newer ones.)
        match usize::try_from(field) {
            Ok(bytes) if errno == libc::EAGAIN && bytes > 0 && done + bytes < len_bytes => {
                done += bytes;
            }
            _ => {
                return Moved {
                    bytes: done,
                    stop: Stop::from_errno(errno),
                };
            }
        }
    }
}

/// `struct uffdio_move` (6.8).
#[repr(C)]
struct UffdioMove {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}
const UFFDIO_MOVE: u32 = iowr::<UffdioMove>(0xAA, 0x05);
const _: () = assert!(UFFDIO_MOVE == 0xC028_AA05);
const UFFDIO_MOVE_MODE_DONTWAKE: u64 = 1 << 0;

/// `struct uffdio_poison` (6.6).
#[repr(C)]
struct UffdioPoison {
    range: uffdio_range,
    mode: u64,
    updated: i64,
}
const UFFDIO_POISON: u32 = iowr::<UffdioPoison>(0xAA, 0x08);
const _: () = assert!(UFFDIO_POISON == 0xC020_AA08);
const UFFDIO_POISON_MODE_DONTWAKE: u64 = 1 << 0;

// These come from the in-tree userfaultfd-sys; that they are ours to rely on is asserted here.
const _: () = assert!(UFFDIO_API == iowr::<uffdio_api>(0xAA, 0x3F));
const _: () = assert!(UFFDIO_COPY == iowr::<uffdio_copy>(0xAA, 0x03) && UFFDIO_COPY == 0xC028_AA03);
const _: () = assert!(UFFDIO_ZEROPAGE == iowr::<uffdio_zeropage>(0xAA, 0x04));
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xC018_AA06);
const _: () = assert!(UFFDIO_WRITEPROTECT == iowr::<uffdio_writeprotect>(0xAA, 0x06));

/// `_IO(0xAA, 0)` on /dev/userfaultfd: a new descriptor (6.1).
const USERFAULTFD_IOC_NEW: u32 = 0xAA00;
/// The device's path.
pub(crate) const DEVICE: &str = "/dev/userfaultfd";

/// Whose faults a descriptor delivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultScope {
    /// Those of user code alone; needs no privilege. A system call that touches a page that is away
    /// fails with EFAULT.
    UserMode,
    /// Also those of system calls. Needs CAP_SYS_PTRACE, `vm.unprivileged_userfaultfd=1` or access to
    /// /dev/userfaultfd.
    UserAndKernel,
}

/// Why no descriptor could be had.
#[derive(Debug)]
pub(crate) struct OpenError {
    /// What the system call said.
    pub(crate) syscall: io::Error,
    /// What opening or asking the device said.
    pub(crate) device: io::Error,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "userfaultfd(2): {}; {DEVICE}: {}",
            self.syscall, self.device
        )
    }
}

impl OpenError {
    /// The error number of the system call.
    pub(crate) fn syscall_errno(&self) -> Option<i32> {
        self.syscall.raw_os_error()
    }
}

/// What makes the kernel let a process have faults of its system calls handled, or, before 5.11, any.
const PRIVILEGE: &str = "CAP_SYS_PTRACE or the sysctl vm.unprivileged_userfaultfd=1";

impl OpenError {
    /// What would help, for who meets it without having asked. Control path: it reads /proc.
    pub(crate) fn help(&self) -> String {
        if Disabled::current().contains(Disabled::USERFAULTFD) {
            return format!("{VARIABLE} says not to use it");
        }
        let is_filtered = Status::read().is_seccomp_filtered;
        let device = format!(
            "access to {DEVICE} (Linux 6.1 or later; setfacl -m u:NAME:rw {DEVICE}, or its mode)"
        );
        match self.syscall_errno() {
            // What an old kernel or a security module says, a filter may say as well, and there is one.
            Some(errno) if is_filtered => {
                let otherwise = if errno == libc::ENOSYS {
                    "the kernel lacks it: CONFIG_USERFAULTFD=y".into()
                } else {
                    format!("it is a kernel before 5.11: {PRIVILEGE}")
                };
                format!(
                    "a seccomp filter is in force, as in a container: have its profile allow the system call userfaultfd, or have \
                     {device}, which needs no such call; or, if the filter is not to blame but {otherwise}"
                )
            }
            Some(libc::ENOSYS) => "the kernel needs CONFIG_USERFAULTFD=y".into(),
            _ => format!(
                "a kernel before 5.11, or a security module, refuses it; these may help: {PRIVILEGE}, {device}"
            ),
        }
    }
}

impl From<OpenError> for io::Error {
    /// The system call's error: it is what a caller can act on, and keeps its errno.
    fn from(error: OpenError) -> Self {
        error.syscall
    }
}

/// A descriptor before its handshake.
fn open_raw(scope: FaultScope) -> Result<OwnedFd, OpenError> {
    let disabled = Disabled::current();
    if disabled.contains(Disabled::USERFAULTFD)
        || (scope == FaultScope::UserAndKernel && disabled.contains(Disabled::KERNEL_FAULTS))
    {
        let refused = || io::Error::from_raw_os_error(libc::ENOSYS);
        return Err(OpenError {
            syscall: refused(),
            device: refused(),
        });
    }
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let syscall = match scope {
        FaultScope::UserAndKernel => open_by_syscall(flags),
        FaultScope::UserMode => {
            open_by_syscall(flags | UFFD_USER_MODE_ONLY.cast_signed()).or_else(|error| {
                // Linux < 5.11 does not know the flag; there, faults of both kinds come.
                match error.raw_os_error() {
                    Some(libc::EINVAL) => open_by_syscall(flags),
                    _ => Err(error),
                }
            })
        }
    };
    syscall.or_else(|syscall| {
        let flags = match scope {
            FaultScope::UserAndKernel => flags,
            FaultScope::UserMode => flags | UFFD_USER_MODE_ONLY.cast_signed(),
        };
        open_by_device(flags).map_err(|device| OpenError { syscall, device })
    })
}

fn open_by_syscall(flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: userfaultfd(2) takes no pointers.
    let fd = check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
    // SAFETY: a descriptor just made, which nobody else knows. (A c_long that is a c_int: truncation
    // is exact.)
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn open_by_device(flags: libc::c_int) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    // SAFETY: the request takes its flags by value and accesses no memory.
    let fd = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            USERFAULTFD_IOC_NEW as libc::Ioctl,
            flags,
        )
    };
    let fd = check(libc::c_long::from(fd))?;
    // SAFETY: a descriptor just made, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// The handshake: enables `features`, and returns all that the kernel has.
fn handshake(fd: BorrowedFd<'_>, features: Features) -> io::Result<Features> {
    let mut api = uffdio_api {
        api: UFFD_API,
        features: features.bits(),
        ioctls: 0,
    };
    // SAFETY: UFFDIO_API reads and writes a uffdio_api, asserted by its number above.
    match unsafe { ioctl(fd, UFFDIO_API, &mut api) } {
        0 => Ok(Features::from_bits_retain(api.features)),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// A userfaultfd whose handshake is done.
#[derive(Debug)]
pub(crate) struct Uffd {
    inner: userfaultfd::Uffd,
    #[cfg(test)]
    available: Features,
    enabled: Features,
    scope: FaultScope,
}

impl Uffd {
    /// What the kernel offers, learned on a descriptor that is then thrown away; less what
    /// `SVM_DISABLE` takes away. Control path.
    ///
    /// # Errors
    ///
    /// No descriptor to be had.
    pub(crate) fn probe(scope: FaultScope) -> Result<Features, OpenError> {
        let fd = open_raw(scope)?;
        let features = handshake(fd.as_fd(), Features::empty()).map_err(|error| OpenError {
            syscall: error,
            device: io::ErrorKind::Unsupported.into(),
        })?;
        Ok(features.difference(Disabled::current().features()))
    }

    /// Opens a descriptor and enables those of `wanted` that the kernel has: look at
    /// [`Uffd::enabled`]. Control path.
    ///
    /// # Errors
    ///
    /// No descriptor to be had, or the kernel refuses a feature it has (EVENT_FORK without
    /// CAP_SYS_PTRACE: EPERM).
    pub(crate) fn open(scope: FaultScope, wanted: Features) -> Result<Self, OpenError> {
        let available = Self::probe(scope)?;
        let enabled = available & wanted;
        let fd = open_raw(scope)?;
        handshake(fd.as_fd(), enabled).map_err(|error| OpenError {
            syscall: error,
            device: io::ErrorKind::Unsupported.into(),
        })?;
        // SAFETY: the descriptor is a userfaultfd, and its ownership goes to the crate's type, which
        // closes it.
        let inner = unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) };
        Ok(Self {
            inner,
            #[cfg(test)]
            available,
            enabled,
            scope,
        })
    }

    /// In the child of a fork: lets go of the parent's userfaultfd.
    ///
    /// O_CLOEXEC does not keep a forked child from the descriptor, whose ioctls act on the *parent's*
    /// memory (hazard F2). Afterwards the value holds an inert descriptor: ioctls answer
    /// `Other(ENOTTY)`, and nothing is ever readable. Async-signal-safe; aborts where not even that
    /// can be had, for the alternative is to corrupt another process.
    ///
    /// The fork copies the table of descriptors before the memory (`copy_process` in `kernel/fork.c`):
    /// one that another thread opened between is not the child's, and its number is free there, or
    /// somebody's by now, who keeps it.
    ///
    /// # Safety
    ///
    /// The caller is a forked child with memory of its own: to close the descriptor of one's own memory
    /// makes what is missing there read as zeros.
    pub(crate) unsafe fn disown_in_child(&self) {
        // SAFETY: it takes no pointers.
        if unsafe { libc::fcntl(self.as_fd().as_raw_fd(), libc::F_GETFD) } != -1 {
            if is_other_file(self.as_fd()) {
                return;
            }
            // First, for there may be no other number to be had.
            // SAFETY: the child's own copy, whose number is taken again below.
            unsafe { libc::close(self.as_fd().as_raw_fd()) };
        }
        // SAFETY: eventfd takes no pointers.
        let inert = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        let replaced = check(libc::c_long::from(inert)).and_then(|_| {
            // SAFETY: made just now, and nobody else knows it.
            let inert = unsafe { OwnedFd::from_raw_fd(inert) };
            if inert.as_raw_fd() == self.as_fd().as_raw_fd() {
                let _ = inert.into_raw_fd();
                return Ok(());
            }
            replace_fd(self.as_fd(), inert.as_fd())
        });
        if let Err(error) = replaced {
            abort_with_message(format_args!(
                "a forked child can't let go of its parent's userfaultfd (errno {:?})",
                error.raw_os_error()
            ));
        }
    }

    #[cfg(test)]
    /// What the kernel has, whether enabled or not, less what `SVM_DISABLE` takes away.
    pub(crate) fn available(&self) -> Features {
        self.available
    }

    /// What was asked for and had.
    pub(crate) fn enabled(&self) -> Features {
        self.enabled
    }

    /// Whose faults it delivers.
    pub(crate) fn scope(&self) -> FaultScope {
        self.scope
    }

    /// Takes charge of a range's faults. Returns the ioctls that the range takes, less what
    /// `SVM_DISABLE` takes away. Control path.
    ///
    /// Pages that are present stay so, unprotected. Takes the mmap lock for writing.
    ///
    /// # Errors
    ///
    /// `EBUSY`: another userfaultfd has part of it. `EINVAL`: unsuitable memory, or part of it not
    /// mapped. `EPERM`: not writable.
    ///
    /// # Safety
    ///
    /// Until the range is unregistered every call on `self` may populate, empty, protect or poison any
    /// page of it, at any time. The caller answers for that: no reference into the range outlives the
    /// promises its type makes, and whoever touches the range meanwhile has somebody to resolve the
    /// fault.
    pub(crate) unsafe fn register(&self, range: PageRange, mode: Mode) -> io::Result<Ioctls> {
        let ioctls = self
            .inner
            .register_with_mode(
                std::ptr::with_exposed_provenance_mut(range.start()),
                range.len_bytes(),
                RegisterMode::from_bits_retain(mode.bits()),
            )
            .map_err(into_io)?;
        let disabled = Disabled::current();
        let mut ioctls = Ioctls::from_bits_retain(ioctls.bits());
        if disabled.contains(Disabled::MOVE) {
            ioctls.remove(Ioctls::MOVE);
        }
        if disabled.contains(Disabled::POISON) {
            ioctls.remove(Ioctls::POISON);
        }
        if disabled.contains(Disabled::WP) {
            ioctls.remove(Ioctls::WRITEPROTECT);
        }
        Ok(ioctls)
    }

    /// Gives a range's faults back to the kernel, which lifts write-protection and wakes those who
    /// wait for missing pages (they then read zeros: bring pages home first). Control path; takes the
    /// mmap lock for writing.
    ///
    /// # Errors
    ///
    /// `EINVAL`: part of it is unsuitable memory by now. Not registered is no error.
    pub(crate) fn unregister(&self, range: PageRange) -> io::Result<()> {
        self.inner
            .unregister(
                std::ptr::with_exposed_provenance_mut(range.start()),
                range.len_bytes(),
            )
            .map_err(into_io)
    }

    /// Wakes the threads that wait for faults in the range; they fault again unless it is resolved.
    /// Fault path.
    pub(crate) fn wake(&self, range: PageRange) {
        let mut arg = kernel_range(range);
        // SAFETY: UFFDIO_WAKE reads a uffdio_range. Waking makes a thread look at its page again,
        // which it may do at any time anyhow. It fails only for a malformed range.
        unsafe { ioctl(self.as_fd(), UFFDIO_WAKE, &mut arg) };
    }

    /// Fills the missing pages of `dst` with a copy of the memory at `src`, each appearing complete.
    /// Fault path, if `src` is not itself missing and waited for (hazard W5).
    ///
    /// # Safety
    ///
    /// `dst` lies in what the caller of [`Uffd::register`] registered with `self`.
    #[inline]
    pub(crate) unsafe fn copy(
        &self,
        dst: PageRange,
        src: usize,
        protect: Protect,
        wake: Wake,
    ) -> Moved {
        let mode = match protect {
            Protect::No => 0,
            Protect::Yes => UFFDIO_COPY_MODE_WP,
        } | match wake {
            Wake::Yes => 0,
            Wake::No => UFFDIO_COPY_MODE_DONTWAKE,
        };
        run_steps(dst.len_bytes(), |done| {
            let mut arg = uffdio_copy {
                dst: (dst.start() + done) as u64,
                src: (src + done) as u64,
                len: (dst.len_bytes() - done) as u64,
                mode,
                copy: 0,
            };
            // SAFETY: UFFDIO_COPY reads and writes a uffdio_copy. What appears at `dst` is answered for
            // by contract; `src` is read as a system call does it, with EFAULT where that can't be.
            let errno = unsafe { ioctl(self.as_fd(), UFFDIO_COPY, &mut arg) };
            (errno, arg.copy)
        })
    }

    /// Fills the missing pages of `dst` with zeros (the shared zero page, where the kernel can).
    /// Fault path.
    ///
    /// # Safety
    ///
    /// `dst` lies in what the caller of [`Uffd::register`] registered with `self`.
    #[inline]
    pub(crate) unsafe fn zeropage(&self, dst: PageRange, wake: Wake) -> Moved {
        let mode = match wake {
            Wake::Yes => 0,
            Wake::No => UFFDIO_ZEROPAGE_MODE_DONTWAKE,
        };
        run_steps(dst.len_bytes(), |done| {
            let mut arg = uffdio_zeropage {
                range: kernel_range_from(dst, done),
                mode,
                zeropage: 0,
            };
            // SAFETY: UFFDIO_ZEROPAGE reads and writes a uffdio_zeropage; as `copy` otherwise.
            let errno = unsafe { ioctl(self.as_fd(), UFFDIO_ZEROPAGE, &mut arg) };
            (errno, arg.zeropage)
        })
    }

    /// Takes the pages at `src` out of their place and puts them into the missing pages of `dst`,
    /// without a copy. A write-protection mark does not travel. Fault path.
    ///
    /// `src` becomes missing page by page, and on success no translation of it is left on any CPU:
    /// nobody can write to a page that has moved. Until the call returns nobody may read it at `dst`
    /// either (hazard M6).
    ///
    /// # Safety
    ///
    /// `dst` lies in what the caller of [`Uffd::register`] registered with `self`. `src` and the
    /// `dst.len_bytes()` bytes from there are the caller's to empty: registered likewise, or a mapping
    /// that nobody has references into.
    #[inline]
    pub(crate) unsafe fn move_pages(&self, dst: PageRange, src: usize, wake: Wake) -> Moved {
        let mode = match wake {
            Wake::Yes => 0,
            Wake::No => UFFDIO_MOVE_MODE_DONTWAKE,
        };
        run_steps(dst.len_bytes(), |done| {
            let mut arg = UffdioMove {
                dst: (dst.start() + done) as u64,
                src: (src + done) as u64,
                len: (dst.len_bytes() - done) as u64,
                mode,
                moved: 0,
            };
            // SAFETY: UFFDIO_MOVE reads and writes a UffdioMove, asserted by its number above. Both
            // ranges are answered for by contract.
            let errno = unsafe { ioctl(self.as_fd(), UFFDIO_MOVE, &mut arg) };
            (errno, arg.moved)
        })
    }

    /// Write-protects the present pages of a range; on return no CPU can write to them. Fault path.
    ///
    /// Pages that are missing get a marker that later answers Exists to a MOVE or ZEROPAGE: protect
    /// only runs whose pages are all present (hazard M2). On a [`Stop`] other than Complete some pages
    /// may be protected.
    #[inline]
    pub(crate) fn write_protect(&self, range: PageRange) -> Stop {
        self.writeprotect_ioctl(range, UFFDIO_WRITEPROTECT_MODE_WP)
    }

    /// Lifts write-protection, and wakes those who wait to write. Fault path.
    #[inline]
    pub(crate) fn write_unprotect(&self, range: PageRange, wake: Wake) -> Stop {
        self.writeprotect_ioctl(
            range,
            match wake {
                Wake::Yes => 0,
                Wake::No => UFFDIO_WRITEPROTECT_MODE_DONTWAKE,
            },
        )
    }

    #[inline]
    fn writeprotect_ioctl(&self, range: PageRange, mode: u64) -> Stop {
        let mut arg = uffdio_writeprotect {
            range: kernel_range(range),
            mode,
        };
        // SAFETY: UFFDIO_WRITEPROTECT reads a uffdio_writeprotect. It changes which accesses fault,
        // never contents, and only where `register`'s caller answers for it.
        Stop::from_errno(unsafe { ioctl(self.as_fd(), UFFDIO_WRITEPROTECT, &mut arg) })
    }

    /// Makes the missing pages of a range lethal: each access is a SIGBUS. Fault path.
    ///
    /// Its code is BUS_MCEERR_AR where the kernel has CONFIG_MEMORY_FAILURE; without, it is the same
    /// BUS_ADRERR as of a missing page, and only the runtime's own state tells the two apart. COPY
    /// overwrites the poison.
    ///
    /// # Safety
    ///
    /// `range` lies in what the caller of [`Uffd::register`] registered with `self`.
    #[inline]
    pub(crate) unsafe fn poison(&self, range: PageRange, wake: Wake) -> Moved {
        let mode = match wake {
            Wake::Yes => 0,
            Wake::No => UFFDIO_POISON_MODE_DONTWAKE,
        };
        run_steps(range.len_bytes(), |done| {
            let mut arg = UffdioPoison {
                range: kernel_range_from(range, done),
                mode,
                updated: 0,
            };
            // SAFETY: UFFDIO_POISON reads and writes a UffdioPoison, asserted by its number above; its
            // effect on missing pages is answered for by contract.
            let errno = unsafe { ioctl(self.as_fd(), UFFDIO_POISON, &mut arg) };
            (errno, arg.updated)
        })
    }

    /// Whether a message can be read, at this moment.
    pub(crate) fn has_message(&self) -> bool {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Sleeps until a message can be read, the doorbell rings, or `timeout` has passed.
    ///
    /// [`Ready::message`] is a hint: another reader may be faster, and a fault may be resolved before
    /// it is read.
    pub(crate) fn poll(&self, doorbell: &Doorbell, timeout: Option<std::time::Duration>) -> Ready {
        let mut fds = [
            PollFd::new(self.as_fd(), PollFlags::POLLIN),
            PollFd::new(doorbell.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
            PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)
        });
        if nix::poll::poll(&mut fds, timeout).is_err() {
            // EINTR, or ENOMEM for a moment: the caller polls again.
            return Ready::default();
        }
        let has = |fd: &PollFd<'_>, flags| fd.revents().is_some_and(|r| r.intersects(flags));
        let [uffd, bell] = &fds;
        Ready {
            message: has(uffd, PollFlags::POLLIN),
            doorbell: has(bell, PollFlags::POLLIN),
            broken: has(
                uffd,
                PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL,
            ),
        }
    }
}

impl AsFd for Uffd {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// Whether the descriptor is certainly no userfaultfd. Async-signal-safe.
fn is_other_file(fd: BorrowedFd<'_>) -> bool {
    const UFFD: &[u8] = b"anon_inode:[userfaultfd]";
    let mut path = [0; 40];
    let mut text = std::io::Cursor::new(&mut path[..]);
    // A number has ten digits at most.
    let _ = write!(text, "/proc/self/fd/{}\0", fd.as_raw_fd());
    let mut link = [0_u8; UFFD.len() + 1];
    // SAFETY: the path ends with a zero byte, and `link` has room for as many bytes as are said.
    let len = unsafe { libc::readlink(path.as_ptr().cast(), link.as_mut_ptr().cast(), link.len()) };
    usize::try_from(len).is_ok_and(|len| &link[..len] != UFFD)
}

fn kernel_range(range: PageRange) -> uffdio_range {
    kernel_range_from(range, 0)
}

fn kernel_range_from(range: PageRange, done: usize) -> uffdio_range {
    uffdio_range {
        start: (range.start() + done) as u64,
        len: (range.len_bytes() - done) as u64,
    }
}

/// The crate's error, as its errno.
fn into_io(error: userfaultfd::Error) -> io::Error {
    use userfaultfd::Error as E;
    match error {
        E::SystemError(errno) | E::CopyFailed(errno) | E::ZeropageFailed(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        other => io::Error::other(other),
    }
}

// The crate's view of REGISTER's answer is ours.
const _: () = assert!(IoctlFlags::COPY.bits() == Ioctls::COPY.bits());
const _: () = assert!(IoctlFlags::WRITE_PROTECT.bits() == Ioctls::WRITEPROTECT.bits());

#[cfg(test)]
mod tests;
