//! Threads, fault-tolerant copies, fork handlers, and the last words before an abort.

use std::fmt::{self, Write as _};
use std::io;

use super::check;
use super::disable::Disabled;

/// The calling thread's kernel id. Fault path.
#[cfg(any(test, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
pub(crate) fn gettid() -> u32 {
    // SAFETY: no preconditions, can't fail.
    let tid = unsafe { libc::gettid() };
    tid.cast_unsigned()
}

/// The kernel's page size.
pub(crate) fn page_size() -> usize {
    // SAFETY: no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(0)
}

/// Lets another thread run. Fault path.
pub(crate) fn sched_yield() {
    // SAFETY: no preconditions; on Linux it can't fail.
    unsafe { libc::sched_yield() };
}

/// Copies bytes as [`copy_from_fallible`] does; where process_vm_readv(2) is forbidden (seccomp), as any load would.
///
/// # Errors
///
/// `EFAULT` when not even the first byte could be copied.
///
/// # Safety
///
/// As [`copy_from_fallible`]; and `remote..remote + len` is readable memory that nobody writes meanwhile, or the process may die
/// of it where the system call is forbidden.
pub(crate) unsafe fn copy_from(local: *mut u8, remote: usize, len: usize) -> io::Result<usize> {
    // SAFETY: by the caller's contract.
    match unsafe { copy_from_fallible(local, remote, len) } {
        Err(error) if is_forbidden(&error) => {
            let remote = std::ptr::with_exposed_provenance(remote);
            // SAFETY: both are valid for `len` bytes by contract, and one is our own mapping: they do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(remote, local, len) };
            Ok(len)
        }
        copied => copied,
    }
}

/// The other direction of [`copy_from`].
///
/// # Errors
///
/// As [`copy_from`].
///
/// # Safety
///
/// As [`copy_to_fallible`]; and `remote..remote + len` is writable memory that nobody accesses meanwhile, or the process may die
/// of it where the system call is forbidden.
pub(crate) unsafe fn copy_to(remote: usize, local: *const u8, len: usize) -> io::Result<usize> {
    // SAFETY: by the caller's contract.
    match unsafe { copy_to_fallible(remote, local, len) } {
        Err(error) if is_forbidden(&error) => {
            let remote = std::ptr::with_exposed_provenance_mut(remote);
            // SAFETY: both are valid for `len` bytes by contract, and one is our own mapping: they do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(local, remote, len) };
            Ok(len)
        }
        copied => copied,
    }
}

/// Whether a filter, and not the memory, refused a copy.
fn is_forbidden(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM))
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
pub(crate) unsafe fn copy_from_fallible(
    local: *mut u8,
    remote: usize,
    len: usize,
) -> io::Result<usize> {
    process_vm(
        libc::SYS_process_vm_readv,
        std::process::id(),
        local,
        remote,
        len,
    )
}

/// [`copy_from_fallible`] between two addresses, for who knows the process's id. Fault path, under the same condition.
///
/// # Errors
///
/// As [`copy_from_fallible`].
///
/// # Safety
///
/// Writing `dst..dst + len` must be sound for as much of it as is mapped and writable.
pub(crate) unsafe fn copy_from_self(
    pid: u32,
    dst: usize,
    src: usize,
    len: usize,
) -> io::Result<usize> {
    process_vm(
        libc::SYS_process_vm_readv,
        pid,
        std::ptr::with_exposed_provenance_mut(dst),
        src,
        len,
    )
}

/// The other direction of [`copy_from_fallible`].
///
/// # Errors
///
/// As [`copy_from_fallible`].
///
/// # Safety
///
/// `local` must be valid for reads of `len` bytes. Writing `remote..remote + len` must be sound for
/// as much of it as is mapped and writable.
unsafe fn copy_to_fallible(remote: usize, local: *const u8, len: usize) -> io::Result<usize> {
    process_vm(
        libc::SYS_process_vm_writev,
        std::process::id(),
        local.cast_mut(),
        remote,
        len,
    )
}

/// Both calls have the same arguments. Its callers' contracts make the copy sound.
fn process_vm(
    call: libc::c_long,
    own_pid: u32,
    local: *mut u8,
    remote: usize,
    len: usize,
) -> io::Result<usize> {
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

/// Writes to stderr with write(2), as far as that works.
pub(crate) fn write_stderr(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: `bytes` is valid for reads of its length.
        let written =
            unsafe { libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(written) {
            Ok(written) if written > 0 => bytes = bytes.get(written..).unwrap_or_default(),
            _ => break,
        }
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
    write_stderr(text.bytes.get(..=last).unwrap_or_default());
    // SAFETY: no preconditions.
    unsafe { libc::abort() }
}

/// The lines of /proc/self/status that decide about userfaultfd.
pub(crate) struct Status {
    effective_capabilities: u64,
    /// Whether a filter looks at this process's system calls.
    pub(crate) is_seccomp_filtered: bool,
}

/// CAP_SYS_PTRACE's bit there.
const CAP_SYS_PTRACE: u32 = 19;

impl Status {
    /// Control path: it allocates.
    pub(crate) fn read() -> Self {
        let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                .map(str::trim)
        };
        Self {
            effective_capabilities: field("CapEff")
                .and_then(|hex| u64::from_str_radix(hex, 16).ok())
                .unwrap_or(0),
            is_seccomp_filtered: field("Seccomp") == Some("2"),
        }
    }

    pub(crate) fn has_ptrace(&self) -> bool {
        self.effective_capabilities >> CAP_SYS_PTRACE & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::super::mmap::{MapArray, Reservation};
    use super::super::testing::{in_child, test_name};
    use super::super::uffd::{FaultScope, Features, Mode, Uffd};
    use super::*;
    use crate::addr::{PAGE_SIZE, PageRange};

    #[test]
    fn copies_stop_where_memory_does() {
        let name = test_name!("copies_stop_where_memory_does");
        if let Some(ended) = in_child(name, &[], copy_both_ways) {
            ended.assert_passed();
        }
    }

    fn copy_both_ways() {
        let source = MapArray::<u8>::from_fn(2 * PAGE_SIZE, |i| i as u8).unwrap();
        let start = source.as_ptr().expose_provenance();
        let mut buffer = [0_u8; 100];
        // SAFETY: the buffer is valid for 100 bytes.
        let copied = unsafe { copy_from(buffer.as_mut_ptr(), start + 5, 100) };
        assert_eq!(copied.unwrap(), 100);
        assert_eq!(buffer[..], source[5..105]);
        // SAFETY: as above; and page 1 is not mapped.
        let error = unsafe { copy_from(buffer.as_mut_ptr(), PAGE_SIZE, 100) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        let mut target = MapArray::<u8>::zeroed(PAGE_SIZE).unwrap();
        let at = target.as_mut_ptr().expose_provenance();
        // SAFETY: both ends are the test's own.
        let copied = unsafe { copy_to(at + 7, buffer.as_ptr(), 100) };
        assert_eq!(copied.unwrap(), 100);
        assert_eq!(target[7..107], buffer);
    }

    #[test]
    fn a_copy_from_a_missing_page_fails_and_raises_nothing() {
        let name = test_name!("a_copy_from_a_missing_page_fails_and_raises_nothing");
        if let Some(ended) = in_child(name, &[], copy_from_a_missing_page) {
            ended.assert_passed();
        }
    }

    fn copy_from_a_missing_page() {
        let uffd = Uffd::open(FaultScope::UserMode, Features::empty()).unwrap();
        let like = PageRange::from_pages(PAGE_SIZE, 2).unwrap();
        let memory = Reservation::congruent_to(like).unwrap();
        let start = memory.range().start();
        // SAFETY: the first page is the test's own.
        unsafe { memory.as_ptr().write_bytes(3, PAGE_SIZE) };
        // SAFETY: the memory is the test's own; nobody touches the missing page but by system calls.
        unsafe { uffd.register(memory.range(), Mode::MISSING) }.unwrap();
        let mut buffer = [0_u8; 20];
        // SAFETY: the buffer is valid for 20 bytes.
        let copied = unsafe { copy_from(buffer.as_mut_ptr(), start + PAGE_SIZE - 10, 20) };
        // Short where the kernel reports it byte by byte, refused where only whole pieces count.
        match copied {
            Ok(copied) => assert_eq!((copied, &buffer[..10]), (10, &[3; 10][..])),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EFAULT)),
        }
        // SAFETY: as above.
        let error = unsafe { copy_from(buffer.as_mut_ptr(), start + PAGE_SIZE, 20) }.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        uffd.unregister(memory.range()).unwrap();
    }

    #[test]
    fn an_abort_says_why() {
        let body = || abort_with_message(format_args!("page {:#x} is {}", 0x1000, "x".repeat(600)));
        if let Some(ended) = in_child(test_name!("an_abort_says_why"), &[], body) {
            ended.assert_killed_by(libc::SIGABRT);
            let line = ended.stderr.lines().find(|line| line.starts_with("svm: "));
            let line = line.expect("a message");
            assert!(line.starts_with("svm: page 0x1000 is xxx"), "{line}");
            assert_eq!(line.len(), 511, "cut off to fit, newline included");
        }
    }

    #[test]
    fn fork_handlers_run_on_both_sides() {
        use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
        static CALLS: AtomicU32 = AtomicU32::new(0);
        extern "C" fn prepare() {
            CALLS.fetch_add(1, SeqCst);
        }
        extern "C" fn parent() {
            CALLS.fetch_add(10, SeqCst);
        }
        extern "C" fn child() {
            CALLS.fetch_add(100, SeqCst);
        }
        let body = || {
            at_fork(prepare, parent, child).unwrap();
            // SAFETY: the child calls only what is async-signal-safe.
            if unsafe { libc::fork() } == 0 {
                // SAFETY: no preconditions.
                unsafe { libc::_exit(CALLS.load(SeqCst) as i32) };
            }
            let mut status = 0;
            // SAFETY: `status` is valid for writes.
            unsafe { libc::wait(&raw mut status) };
            assert_eq!(libc::WEXITSTATUS(status), 101);
            assert_eq!(CALLS.load(SeqCst), 11);
        };
        let name = test_name!("fork_handlers_run_on_both_sides");
        if let Some(ended) = in_child(name, &[], body) {
            ended.assert_passed();
        }
    }

    #[test]
    fn threads_have_ids() {
        let own = gettid();
        sched_yield();
        assert_ne!(own, std::thread::spawn(gettid).join().unwrap());
    }
}
