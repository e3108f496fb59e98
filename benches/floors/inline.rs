//! F1 and F2: a bare `SIGBUS` handler that makes one ioctl.

use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicUsize, Ordering::Relaxed};

use anyhow::Result;

use super::raw::Faults;
use super::{Job, Pair, resolve};
use crate::harness::{Samples, Subject};

static FD: AtomicI32 = AtomicI32::new(-1);
static JOB: AtomicU8 = AtomicU8::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);
static OFFSET: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_bus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo_t that lives as long as this frame.
    let info = unsafe { &*info };
    // SAFETY: for SIGBUS the kernel fills in the address.
    let addr = unsafe { info.si_addr() }.addr();
    let bytes = BYTES.load(Relaxed);
    let job = if JOB.load(Relaxed) == 0 {
        Job::Unprotect
    } else {
        Job::MoveHome
    };
    resolve(
        FD.load(Relaxed),
        job,
        addr & !(bytes - 1),
        bytes,
        OFFSET.load(Relaxed),
    );
}

/// The bare handler in the place of whoever had the signal, until it is dropped.
struct Handler {
    before: libc::sigaction,
}

impl Handler {
    fn install() -> Self {
        // SAFETY: a sigaction is integers and an optional function: zero is a value.
        let (mut before, mut action): (libc::sigaction, libc::sigaction) =
            unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_bus as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: both are valid; the handler makes one system call and nothing else.
        unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut before) };
        Self { before }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // SAFETY: the action that was there before.
        unsafe { libc::sigaction(libc::SIGBUS, &raw const self.before, ptr::null_mut()) };
    }
}

/// See the [module](self).
#[derive(Debug)]
pub struct Inline {
    pair: Pair,
    job: Job,
    granule: usize,
}

impl Inline {
    /// `len` bytes, of which a fault resolves `granule`.
    #[must_use]
    pub fn new(job: Job, len: usize, granule: usize) -> Self {
        Self {
            pair: Pair::new(len, Faults::Signal, false),
            job,
            granule,
        }
    }
}

/// Write-protects or moves out all of `pair`, as a fault of `job` needs it.
pub(super) fn arm(pair: &Pair, job: Job) {
    match job {
        Job::Unprotect => {
            pair.uffd
                .write_protect(pair.host.addr(), pair.host.len(), true);
            pair.read_all();
        }
        Job::MoveHome => pair.move_out(),
    }
}

impl Subject for Inline {
    fn arm(&mut self) -> Result<()> {
        arm(&self.pair, self.job);
        FD.store(self.pair.uffd.fd(), Relaxed);
        JOB.store(u8::from(self.job == Job::MoveHome), Relaxed);
        BYTES.store(self.granule, Relaxed);
        OFFSET.store(
            self.pair.frames.addr().wrapping_sub(self.pair.host.addr()),
            Relaxed,
        );
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let _handler = Handler::install();
        for at in (0..self.pair.host.len()).step_by(self.granule) {
            samples.time(|| self.pair.host.write(at));
        }
        Ok(())
    }
}
