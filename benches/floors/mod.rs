//! The floors: the least code that could do each job.
//!
//! | floor | what it does | where |
//! |---|---|---|
//! | F1 | `SIGBUS` handler: WRITEPROTECT(0), return | [`inline`] |
//! | F2 | `SIGBUS` handler: MOVE home, return | [`inline`] |
//! | F3 | a thread: poll, read, one ioctl; free to run anywhere, or pinned to the faulter's CPU | [`thread`] |
//! | F4 | WRITEPROTECT, process_vm_readv | [`direct`] |
//! | F5 | MOVE, in one call | [`direct`] |
//! | F6 | a plain minor fault; mprotect and `SIGSEGV`; memcpy | [`direct`] |
//! | F7 | the kernel as a plain loop on ordinary memory, by as many threads | `offload` |
//!
//! Each has a userfaultfd of its own, and no state but two addresses. They check what they must to be correct for the
//! bench (an ioctl that fails ends the process), and nothing that a runtime would have to.

pub mod direct;
pub mod inline;
pub mod raw;
pub mod thread;

use svm::addr::PAGE_SIZE;

/// What a floor's fault does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// Lifts the write-protection of the granule around the address.
    Unprotect,
    /// Moves the granule around the address home.
    MoveHome,
}

/// Two congruent areas of one userfaultfd: the memory, and what stands for a window.
#[derive(Debug)]
pub struct Pair {
    /// The descriptor.
    pub uffd: raw::Uffd,
    /// The memory.
    pub host: raw::Area,
    /// The window.
    pub frames: raw::Area,
}

impl Pair {
    /// `len` bytes populated and registered for missing and write-protect faults, and a window for them.
    #[must_use]
    pub fn new(len: usize, delivery: raw::Faults, huge: bool) -> Self {
        let uffd = raw::Uffd::open(delivery);
        let host = raw::Area::new(len, huge);
        host.populate();
        let frames = raw::Area::new(len, huge);
        uffd.register(&host, true);
        uffd.register(&frames, false);
        Self { uffd, host, frames }
    }

    /// Does `job` for the granule of `bytes` around `addr`. Async-signal-safe.
    #[inline]
    pub fn resolve(&self, job: Job, addr: usize, bytes: usize) {
        resolve(
            self.uffd.fd(),
            job,
            addr & !(bytes - 1),
            bytes,
            self.frames.addr().wrapping_sub(self.host.addr()),
        );
    }

    /// Moves everything out to the window.
    pub fn move_out(&self) {
        self.uffd
            .move_pages(self.frames.addr(), self.host.addr(), self.host.len());
    }

    /// Moves everything home.
    pub fn move_home(&self) {
        self.uffd
            .move_pages(self.host.addr(), self.frames.addr(), self.host.len());
    }

    /// Reads each page on this CPU, so that its translation is known.
    pub fn read_all(&self) {
        for page in 0..self.host.len() / PAGE_SIZE {
            self.host.read(page * PAGE_SIZE);
        }
    }
}

#[inline]
fn resolve(fd: i32, job: Job, start: usize, bytes: usize, offset: usize) {
    match job {
        Job::Unprotect => raw::write_protect(fd, start, bytes, false),
        Job::MoveHome => raw::move_pages(fd, start, start.wrapping_add(offset), bytes),
    }
}
