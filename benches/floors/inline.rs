//! F1 and F2: a bare `SIGBUS` handler that makes one ioctl.

use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicUsize, Ordering::Relaxed};

use anyhow::Result;

use super::raw::{Area, Faults, Uffd};
use super::{Job, Pair, resolve};
use crate::harness::{Samples, Subject, side_by_side};

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

/// A bare handler in the place of whoever had the signal, until it is dropped.
pub(super) struct Handler {
    signal: libc::c_int,
    before: libc::sigaction,
}

type OnSignal = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

impl Handler {
    pub(super) fn install(signal: libc::c_int, handler: OnSignal) -> Self {
        // SAFETY: a sigaction is integers and an optional function: zero is a value.
        let (mut before, mut action): (libc::sigaction, libc::sigaction) =
            unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: both are valid; the floors' handlers make one system call and nothing else.
        unsafe { libc::sigaction(signal, &raw const action, &raw mut before) };
        Self { signal, before }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // SAFETY: the action that was there before.
        unsafe { libc::sigaction(self.signal, &raw const self.before, ptr::null_mut()) };
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

impl Inline {
    /// Tells the handler what to do, and where.
    fn publish(&self) {
        FD.store(self.pair.uffd.fd(), Relaxed);
        JOB.store(u8::from(self.job == Job::MoveHome), Relaxed);
        BYTES.store(self.granule, Relaxed);
        OFFSET.store(
            self.pair.frames.addr().wrapping_sub(self.pair.host.addr()),
            Relaxed,
        );
    }
}

impl Subject for Inline {
    fn arm(&mut self) -> Result<()> {
        arm(&self.pair, self.job);
        self.publish();
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let _handler = Handler::install(libc::SIGBUS, on_bus);
        for at in (0..self.pair.host.len()).step_by(self.granule) {
            samples.time(|| self.pair.host.write(at));
        }
        Ok(())
    }
}

/// F5 and F2 by turns, on as many threads: what threads that fault side by side can reach. A sample is the time of a pass over the
/// number of its turns: the inverse of the rate of all together.
#[derive(Debug)]
pub struct ThereAndBack {
    pairs: Vec<Pair>,
    /// Bytes that one thread goes through.
    part: usize,
    granule: usize,
}

/// What threads that fault side by side have in common. In one mapping they meet in the kernel, whoever's the runtime is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Each has mappings of its own.
    Apart,
    /// Each has a part of the same mappings.
    Shared,
}

impl Memory {
    /// How many areas there are for `threads` threads with `part` bytes each, and how large one is.
    pub(super) fn areas(self, threads: usize, part: usize) -> (usize, usize) {
        match self {
            Self::Apart => (threads, part),
            Self::Shared => (1, threads * part),
        }
    }
}

/// How often each thread goes through its part in a pass.
pub const LAPS: usize = 4;

/// Areas of threads that fault side by side, at most.
const MAX_AREAS: usize = 8;

/// Where the handler looks for the area of a fault: its first and last byte, the descriptor and the way to the window.
static AREAS: [[AtomicUsize; 4]; MAX_AREAS] =
    [const { [const { AtomicUsize::new(0) }; 4] }; MAX_AREAS];

extern "C" fn on_bus_in_some_area(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: as in `on_bus`.
    let info = unsafe { &*info };
    // SAFETY: as in `on_bus`.
    let addr = unsafe { info.si_addr() }.addr();
    for [first, last, fd, offset] in &AREAS {
        if (first.load(Relaxed)..=last.load(Relaxed)).contains(&addr) {
            let bytes = BYTES.load(Relaxed);
            let (fd, offset) = (fd.load(Relaxed) as i32, offset.load(Relaxed));
            return resolve(fd, Job::MoveHome, addr & !(bytes - 1), bytes, offset);
        }
    }
    // Another fault than the floor's: it would be repeated for ever.
    std::process::abort();
}

impl ThereAndBack {
    /// `threads` threads with `part` bytes each. What is apart has a userfaultfd of its own.
    ///
    /// # Panics
    /// If the areas are more than the handler has room for.
    #[must_use]
    pub fn new(memory: Memory, threads: usize, part: usize, granule: usize) -> Self {
        let (nr, len) = memory.areas(threads, part);
        assert!(nr <= AREAS.len());
        let pair = |_| Pair::new(len, Faults::Signal, false);
        Self {
            pairs: (0..nr).map(pair).collect(),
            part,
            granule,
        }
    }
}

impl Subject for ThereAndBack {
    fn arm(&mut self) -> Result<()> {
        BYTES.store(self.granule, Relaxed);
        for (area, Pair { uffd, host, frames }) in AREAS.iter().zip(&self.pairs) {
            let offset = frames.addr().wrapping_sub(host.addr());
            let last = host.addr() + host.len() - 1;
            let values = [host.addr(), last, uffd.fd() as usize, offset];
            for (word, value) in area.iter().zip(values) {
                word.store(value, Relaxed);
            }
        }
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let _handler = Handler::install(libc::SIGBUS, on_bus_in_some_area);
        let areas = self.pairs.iter();
        let areas = areas.map(|pair| (&pair.uffd, &pair.host, &pair.frames));
        turns(areas, self.part, self.granule, samples)
    }
}

/// Of each area's memory granule by granule out to its window and, by a fault, home, by a thread for each `part` bytes.
pub(super) fn turns<'a>(
    areas: impl Iterator<Item = (&'a Uffd, &'a Area, &'a Area)>,
    part: usize,
    granule: usize,
    samples: &mut Samples,
) -> Result<()> {
    let parts = areas.flat_map(|(uffd, host, frames)| {
        let starts = (0..host.len()).step_by(part);
        starts.map(move |start| (uffd, host, frames, start))
    });
    let mut each = Samples::new();
    let took = side_by_side(parts, &mut each, |(uffd, host, frames, start), each| {
        for _ in 0..LAPS {
            for at in (start..start + part).step_by(granule) {
                each.time(|| {
                    uffd.move_pages(frames.addr() + at, host.addr() + at, granule);
                    host.write(at);
                });
            }
        }
        Ok(())
    })?;
    samples.record(u64::try_from(took.as_nanos())? / each.len());
    Ok(())
}
