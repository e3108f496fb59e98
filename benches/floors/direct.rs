//! F4, F5 and F6: no handler, the calls themselves.

use std::ptr;

use anyhow::Result;

use super::Pair;
use super::raw::{Area, Faults};
use crate::harness::{Samples, Subject};

/// F4: write-protect, then copy.
#[derive(Debug)]
pub struct ProtectAndCopy {
    pair: Pair,
    granule: usize,
}

impl ProtectAndCopy {
    /// `len` bytes, `granule` at a time.
    #[must_use]
    pub fn new(len: usize, granule: usize) -> Self {
        let uffd = super::raw::Uffd::open(Faults::Signal);
        let (host, frames) = (Area::new(len, false), Area::new(len, false));
        host.populate();
        frames.populate();
        uffd.register(&host, true);
        Self {
            pair: Pair { uffd, host, frames },
            granule,
        }
    }
}

impl Subject for ProtectAndCopy {
    fn arm(&mut self) -> Result<()> {
        let host = &self.pair.host;
        self.pair.uffd.write_protect(host.addr(), host.len(), false);
        host.populate();
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let Pair { uffd, host, frames } = &self.pair;
        let pid = std::process::id().cast_signed();
        for at in (0..host.len()).step_by(self.granule) {
            samples.time(|| {
                uffd.write_protect(host.addr() + at, self.granule, true);
                read_by_kernel(pid, frames.addr() + at, host.addr() + at, self.granule);
            });
        }
        Ok(())
    }
}

/// F5: MOVE, `granule` in one call.
#[derive(Debug)]
pub struct Move {
    pair: Pair,
    granule: usize,
}

impl Move {
    /// `len` bytes, `granule` at a time; with huge pages on both sides, or with none.
    #[must_use]
    pub fn new(len: usize, granule: usize, huge: bool) -> Self {
        Self {
            pair: Pair::new(len, Faults::Signal, huge),
            granule,
        }
    }
}

impl Subject for Move {
    fn arm(&mut self) -> Result<()> {
        self.pair.read_all();
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let Pair { uffd, host, frames } = &self.pair;
        for at in (0..host.len()).step_by(self.granule) {
            samples.time(|| uffd.move_pages(frames.addr() + at, host.addr() + at, self.granule));
        }
        // Home in pieces of the same size, so that what was whole stays whole.
        for at in (0..host.len()).step_by(self.granule) {
            uffd.move_pages(host.addr() + at, frames.addr() + at, self.granule);
        }
        Ok(())
    }
}

/// What F1 and F2 do in their handlers, without a fault.
#[derive(Debug)]
pub struct Resolve {
    pair: Pair,
    job: super::Job,
    granule: usize,
}

impl Resolve {
    /// `len` bytes, `granule` at a time.
    #[must_use]
    pub fn new(job: super::Job, len: usize, granule: usize) -> Self {
        Self {
            pair: Pair::new(len, Faults::Signal, false),
            job,
            granule,
        }
    }
}

impl Subject for Resolve {
    fn arm(&mut self) -> Result<()> {
        super::inline::arm(&self.pair, self.job);
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let host = &self.pair.host;
        for at in (0..host.len()).step_by(self.granule) {
            samples.time(|| self.pair.resolve(self.job, host.addr() + at, self.granule));
        }
        Ok(())
    }
}

/// Copies `len` bytes by the kernel; both sides are populated.
pub fn read_by_kernel(pid: i32, dst: usize, src: usize, len: usize) {
    let local = libc::iovec {
        iov_base: ptr::with_exposed_provenance_mut(dst),
        iov_len: len,
    };
    let remote = libc::iovec {
        iov_base: ptr::with_exposed_provenance_mut(src),
        iov_len: len,
    };
    // SAFETY: the destination is an area of the floor's own, of which no reference exists.
    let copied =
        unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    assert_eq!(copied, len as isize, "floor: process_vm_readv");
}

/// F6: the first write to a page of plain memory.
#[derive(Debug)]
pub struct MinorFault(Area);

impl MinorFault {
    /// `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self(Area::new(len, false))
    }
}

impl Subject for MinorFault {
    fn arm(&mut self) -> Result<()> {
        self.0.discard();
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        for at in (0..self.0.len()).step_by(svm::addr::PAGE_SIZE) {
            samples.time(|| self.0.write(at));
        }
        Ok(())
    }
}

/// F6: memcpy of `granule` bytes, source and destination populated.
#[derive(Debug)]
pub struct Memcpy {
    src: Area,
    dst: Area,
    granule: usize,
}

impl Memcpy {
    /// `len` bytes, `granule` at a time.
    #[must_use]
    pub fn new(len: usize, granule: usize) -> Self {
        let (src, dst) = (Area::new(len, false), Area::new(len, false));
        src.populate();
        dst.populate();
        Self { src, dst, granule }
    }
}

impl Subject for Memcpy {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        for at in (0..self.src.len()).step_by(self.granule) {
            let src = ptr::with_exposed_provenance::<u8>(self.src.addr() + at);
            let dst = ptr::with_exposed_provenance_mut::<u8>(self.dst.addr() + at);
            // SAFETY: two areas of the floor's own, of which no reference exists; `granule` divides their length.
            samples.time(|| unsafe { ptr::copy_nonoverlapping(src, dst, self.granule) });
        }
        Ok(())
    }
}

/// F6: memory protected by `mprotect`, and a `SIGSEGV` handler that lifts the protection of the page.
#[derive(Debug)]
pub struct Mprotect(Area);

impl Mprotect {
    /// `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let area = Area::new(len, false);
        area.populate();
        Self(area)
    }
}

extern "C" fn on_segv(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo_t that lives as long as this frame.
    let info = unsafe { &*info };
    // SAFETY: for SIGSEGV the kernel fills in the address.
    let addr = unsafe { info.si_addr() }.addr();
    let page = ptr::with_exposed_provenance_mut(addr & !(svm::addr::PAGE_SIZE - 1));
    // SAFETY: only the area's pages are protected; they become what they were.
    let result = unsafe {
        libc::mprotect(
            page,
            svm::addr::PAGE_SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
        )
    };
    if result != 0 {
        // Another fault than the floor's: it would be repeated for ever.
        std::process::abort();
    }
}

impl Subject for Mprotect {
    fn arm(&mut self) -> Result<()> {
        // SAFETY: the floor's own area.
        let result = unsafe {
            libc::mprotect(
                ptr::with_exposed_provenance_mut(self.0.addr()),
                self.0.len(),
                libc::PROT_READ,
            )
        };
        anyhow::ensure!(result == 0, "floor: mprotect");
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let _handler = super::inline::Handler::install(libc::SIGSEGV, on_segv);
        for at in (0..self.0.len()).step_by(svm::addr::PAGE_SIZE) {
            samples.time(|| self.0.write(at));
        }
        Ok(())
    }
}
