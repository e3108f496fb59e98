//! Threads, fault-tolerant copies, fork handlers, and the last words before an abort.

use std::fmt::{self, Write as _};
use std::io;

use super::check;
use super::disable::Disabled;

/// The calling thread's kernel id. Fault path.
pub(crate) fn gettid() -> u32 {
    // SAFETY: no preconditions, can't fail.
    let tid = unsafe { libc::gettid() };
    tid.cast_unsigned()
}

/// Lets another thread run. Fault path.
pub(crate) fn sched_yield() {
    // SAFETY: no preconditions; on Linux it can't fail.
    unsafe { libc::sched_yield() };
}

/// Copies bytes as the kernel would on our behalf: an address that is not mapped, not accessible or
/// missing from a registered range ends the copy instead of raising a signal. Returns how much was
/// copied, which is short only where a page could not be accessed.
///
/// Not for the fault path where the range may be registered on an uffd that handles kernel faults:
/// the call then waits for the monitor.
///
/// # Errors
///
/// `EFAULT` when not even the first byte could be copied; `EPERM` or `ENOSYS` under a seccomp filter.
///
/// # Safety
///
/// `local` must be valid for writes of `len` bytes.
pub(crate) unsafe fn copy_from(local: *mut u8, remote: usize, len: usize) -> io::Result<usize> {
    process_vm(libc::SYS_process_vm_readv, local, remote, len)
}

/// The other direction of [`copy_from`].
///
/// # Errors
///
/// As [`copy_from`].
///
/// # Safety
///
/// `local` must be valid for reads of `len` bytes. Writing `remote..remote + len` must be sound for
/// as much of it as is mapped and writable.
pub(crate) unsafe fn copy_to(remote: usize, local: *const u8, len: usize) -> io::Result<usize> {
    process_vm(libc::SYS_process_vm_writev, local.cast_mut(), remote, len)
}

/// Both calls have the same arguments. Its callers' contracts make the copy sound.
fn process_vm(call: libc::c_long, local: *mut u8, remote: usize, len: usize) -> io::Result<usize> {
    if Disabled::current().contains(Disabled::PROCESS_VM) {
        return Err(io::Error::from_raw_os_error(libc::ENOSYS));
    }
    let local = libc::iovec {
        iov_base: local.cast(),
        iov_len: len,
    };
    let remote = libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(remote),
        iov_len: len,
    };
    let own_pid = std::process::id();
    // SAFETY: the iovecs outlive the call. The local buffer is valid by the callers' contracts; the
    // kernel checks every remote page, and for writing the callers' contract covers the effect.
    let copied = check(unsafe {
        libc::syscall(
            call,
            own_pid,
            &raw const local,
            1_usize,
            &raw const remote,
            1_usize,
            0_usize,
        )
    })?;
    Ok(copied.cast_unsigned() as usize)
}

/// Has libc call `prepare` in the parent before each fork, `parent` there and `child` in the child
/// after it. For the rest of the process's life: this can't be undone.
///
/// # Errors
///
/// `ENOMEM`.
pub(crate) fn at_fork(
    prepare: extern "C" fn(),
    parent: extern "C" fn(),
    child: extern "C" fn(),
) -> io::Result<()> {
    unsafe extern "C" {
        // POSIX, and in every libc this crate supports; the libc crate declares it for few targets.
        fn pthread_atfork(
            prepare: Option<extern "C" fn()>,
            parent: Option<extern "C" fn()>,
            child: Option<extern "C" fn()>,
        ) -> libc::c_int;
    }
    // SAFETY: the three are functions of the declared type and live as long as the code they are in;
    // glibc drops the handlers of a shared object that is unloaded.
    match unsafe { pthread_atfork(Some(prepare), Some(parent), Some(child)) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// A formatter's target that is a buffer on the stack; what does not fit is cut off.
struct StackText {
    bytes: [u8; 512],
    len: usize,
}

impl fmt::Write for StackText {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            let Some(slot) = self.bytes.get_mut(self.len) else {
                break;
            };
            *slot = byte;
            self.len += 1;
        }
        Ok(())
    }
}

/// Writes `svm: <message>` to stderr with write(2), and aborts. Fault path: formatting integers and
/// strings does not allocate, and no lock of the standard streams is taken.
#[cold]
pub(crate) fn abort_with_message(message: fmt::Arguments<'_>) -> ! {
    let mut text = StackText {
        bytes: [0; 512],
        len: 0,
    };
    let _ = write!(text, "svm: {message}");
    // The newline replaces the last byte of a message that was cut off.
    let last = text.len.min(text.bytes.len() - 1);
    if let Some(slot) = text.bytes.get_mut(last) {
        *slot = b'\n';
    }
    let mut rest = text.bytes.get(..=last).unwrap_or_default();
    while !rest.is_empty() {
        // SAFETY: `rest` is valid for reads of its length.
        let written = unsafe { libc::write(libc::STDERR_FILENO, rest.as_ptr().cast(), rest.len()) };
        match usize::try_from(written) {
            Ok(written) if written > 0 => rest = rest.get(written..).unwrap_or_default(),
            _ => break,
        }
    }
    // SAFETY: no preconditions.
    unsafe { libc::abort() }
}
