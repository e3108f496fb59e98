//! The process's memory as the kernel's test device sees it: by address, mirrored where and when an operation names it.
//!
//! [`Mm`] mirrors what an operation needs and has no mirror yet; [`Dmirror`] is `lib/test_hmm.c`: its operations, its error
//! numbers, its snapshot flags, on ranges of pages that may lie in several mirrors, or in none.

use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use svm::{Access, AttachOptions, DeviceFaultKind, Error, ErrorKind, Mirror, Options};

use crate::TestDevice;
use crate::device::Session;

const PAGE: usize = 4096;

/// Flags of a snapshot, as in the kernel's `lib/test_hmm_uapi.h`.
pub mod prot {
    /// No mapping, or no access.
    pub const ERROR: u8 = 0xff;
    /// Nothing is there.
    pub const NONE: u8 = 0;
    /// May be read.
    pub const READ: u8 = 1;
    /// May be read and written.
    pub const WRITE: u8 = 2;
    /// Part of a huge page.
    pub const PMD: u8 = 4;
    /// The shared page of zeros.
    pub const ZERO: u8 = 0x10;
    /// In the memory of the device that was asked.
    pub const DEV_PRIVATE_LOCAL: u8 = 0x20;
}

/// What an operation did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Pages it was done for.
    pub cpages: usize,
    /// Fault rounds it took: one covers all that is left of the range.
    pub faults: usize,
}

/// An error number of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl From<Error> for Errno {
    fn from(error: Error) -> Self {
        Self(match error.kind() {
            ErrorKind::Device(fault) => errno_of(fault.kind),
            ErrorKind::Invalid(_) => libc::EINVAL,
            // Where the program has nothing mapped any more, a device's window may lie: not the program's memory.
            ErrorKind::Unmapped | ErrorKind::Overlap => libc::EFAULT,
            ErrorKind::Protection => libc::EPERM,
            ErrorKind::OutOfMemory => libc::ENOMEM,
            ErrorKind::Timeout => libc::EBUSY,
            ErrorKind::Forked => libc::ESRCH,
            _ => error.os_error().unwrap_or(libc::EIO),
        })
    }
}

impl From<svm::DeviceFault> for Errno {
    fn from(fault: svm::DeviceFault) -> Self {
        Self(errno_of(fault.kind))
    }
}

fn errno_of(kind: DeviceFaultKind) -> i32 {
    match kind {
        DeviceFaultKind::Unmapped | DeviceFaultKind::NoAccess | DeviceFaultKind::OutOfViews => {
            libc::EFAULT
        }
        DeviceFaultKind::Protection => libc::EPERM,
        DeviceFaultKind::OutOfMemory => libc::ENOMEM,
        DeviceFaultKind::Timeout => libc::EBUSY,
        DeviceFaultKind::Forked => libc::ESRCH,
        _ => libc::EIO,
    }
}

type Piece = (Arc<Mirror<'static, u8>>, Range<usize>);

/// The mirrors of a process, made on demand.
#[derive(Debug, Default)]
pub struct Mm {
    mirrors: Mutex<Vec<Arc<Mirror<'static, u8>>>>,
    options: Options,
}

impl Mm {
    /// No mirror yet; those to come are made with `options`.
    #[must_use]
    pub fn new(options: &Options) -> Arc<Self> {
        Arc::new(Self {
            mirrors: Mutex::default(),
            options: options.clone(),
        })
    }

    /// Sums of the counters of all mirrors that exist.
    #[must_use]
    pub fn stats(&self) -> svm::Stats {
        let mirrors = self.mirrors.lock().unwrap_or_else(PoisonError::into_inner);
        mirrors
            .iter()
            .fold(svm::Stats::default(), |sum, mirror| sum + mirror.stats())
    }

    /// The mirrors of `range`, in order; each part of it that has none gets one.
    fn pieces(&self, range: Range<usize>) -> Result<Vec<Piece>, Error> {
        let mut mirrors = self.mirrors.lock().unwrap_or_else(PoisonError::into_inner);
        // What was unmapped since is nobody's mirror any more.
        mirrors.retain(|mirror| span(mirror).step_by(PAGE).any(|at| is_live(mirror, at)));
        let mut pieces = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let live = mirrors.iter().find(|mirror| is_live(mirror, at)).cloned();
            let mirror = match live {
                Some(mirror) => mirror,
                None => {
                    let free = (at..range.end)
                        .step_by(PAGE)
                        .take_while(|&page| !mirrors.iter().any(|m| is_live(m, page)));
                    let end = end_of_kind(at).min(at + free.count() * PAGE);
                    // SAFETY: the process's memory, which it changes by system calls, and which is not accessed by it while
                    // an operation of a test device is writing it.
                    let new = unsafe {
                        svm::mirror_raw(
                            ptr::with_exposed_provenance_mut(at),
                            end - at,
                            &self.options,
                        )
                    }?;
                    let new = Arc::new(new);
                    if is_live(&new, at) {
                        mirrors.push(Arc::clone(&new));
                    } else {
                        // Memory that cannot move sends no word when it goes: such a mirror lasts for one operation.
                        pieces.push((new, at..end));
                        at = end;
                        continue;
                    }
                    new
                }
            };
            let live = (at..span(&mirror).end.min(range.end))
                .step_by(PAGE)
                .take_while(|&page| is_live(&mirror, page));
            let end = at + live.count() * PAGE;
            pieces.push((mirror, at..end));
            at = end;
        }
        Ok(pieces)
    }
}

fn span(mirror: &Mirror<'_, u8>) -> Range<usize> {
    let view = mirror.view();
    view.addr()..view.addr() + view.len()
}

fn is_live(mirror: &Mirror<'_, u8>, at: usize) -> bool {
    mirror.view().region().is_movable(at)
}

/// Up to where memory is of the kind that is at `addr`: private and anonymous, anything else, or nothing.
fn end_of_kind(addr: usize) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut end = addr;
    let mut first = None;
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(range), Some(perms), Some(inode)) = (words.next(), words.next(), words.nth(2))
        else {
            continue;
        };
        let Some((low, high)) = range.split_once('-') else {
            continue;
        };
        let parse = |n| usize::from_str_radix(n, 16).unwrap_or(0);
        let (low, high) = (parse(low), parse(high));
        if high <= end {
            continue;
        }
        let kind = perms.ends_with('p') && inode == "0";
        if low > end {
            // A hole: of no kind.
            return if first.is_none() { low } else { end };
        }
        if first.is_some_and(|first| first != kind) {
            return end;
        }
        first = Some(kind);
        end = high;
    }
    if first.is_none() { usize::MAX } else { end }
}

/// `lib/test_hmm.c`, on the calling process's memory.
#[derive(Debug)]
pub struct Dmirror {
    device: Arc<TestDevice>,
    mm: Arc<Mm>,
}

impl Dmirror {
    /// A device on `mm`.
    ///
    /// # Errors
    /// As [`svm::attach`].
    pub fn new(mm: &Arc<Mm>) -> Result<Self, Error> {
        Ok(Self {
            device: Arc::new(TestDevice::with_options(AttachOptions::new())?),
            mm: Arc::clone(mm),
        })
    }

    /// The same device on other mirrors.
    #[must_use]
    pub fn on(&self, mm: &Arc<Mm>) -> Self {
        Self {
            device: Arc::clone(&self.device),
            mm: Arc::clone(mm),
        }
    }

    /// The device underneath.
    #[must_use]
    pub fn device(&self) -> &TestDevice {
        &self.device
    }

    /// The mirror of the pages, for what is done with one: a pin, its counters.
    ///
    /// # Errors
    /// EINVAL for a bad range, or one that no single mirror has.
    pub fn mirror_of(&self, addr: usize, npages: usize) -> Result<Arc<Mirror<'static, u8>>, Errno> {
        let mut pieces = self.mm.pieces(Self::range(addr, npages)?)?;
        match (pieces.pop(), pieces.is_empty()) {
            (Some((mirror, _)), true) => Ok(mirror),
            _ => Err(Errno(libc::EINVAL)),
        }
    }

    fn range(addr: usize, npages: usize) -> Result<Range<usize>, Errno> {
        let end = npages
            .checked_mul(PAGE)
            .and_then(|len| addr.checked_add(len));
        end.filter(|&end| addr.is_multiple_of(PAGE) && end > addr)
            .map(|end| addr..end)
            .ok_or(Errno(libc::EINVAL))
    }

    /// Reads the pages into `mirror`.
    ///
    /// # Errors
    /// EFAULT where nothing is mapped or no access permitted; nothing was copied then. EINVAL for a bad range.
    pub fn read(&self, addr: usize, mirror: &mut [u8]) -> Result<Done, Errno> {
        self.copy(
            addr,
            mirror.len() / PAGE,
            Access::Read,
            |at, offset, len| {
                // SAFETY: the table says the page is readable, and the device lock keeps it so; `mirror` has room.
                unsafe {
                    ptr::copy_nonoverlapping(
                        ptr::with_exposed_provenance(at),
                        mirror.as_mut_ptr().add(offset),
                        len,
                    );
                }
            },
        )
    }

    /// Writes `mirror` to the pages.
    ///
    /// # Errors
    /// As [`read`](Self::read), and EPERM where the mapping is read-only.
    pub fn write(&self, addr: usize, mirror: &[u8]) -> Result<Done, Errno> {
        self.copy(
            addr,
            mirror.len() / PAGE,
            Access::Write,
            |at, offset, len| {
                // SAFETY: the table says the page is writable, and the device lock keeps it so.
                unsafe {
                    ptr::copy_nonoverlapping(
                        mirror.as_ptr().add(offset),
                        ptr::with_exposed_provenance_mut(at),
                        len,
                    );
                }
            },
        )
    }

    fn copy(
        &self,
        addr: usize,
        npages: usize,
        access: Access,
        mut bytes: impl FnMut(usize, usize, usize),
    ) -> Result<Done, Errno> {
        let range = Self::range(addr, npages)?;
        let pieces = self.mm.pieces(range.clone())?;
        let begin = |(mirror, part): &Piece| {
            Ok((
                self.device.begin(mirror.view().region(), access)?,
                part.clone(),
            ))
        };
        let mut sessions: Vec<(Session<'_>, Range<usize>)> =
            pieces.iter().map(begin).collect::<Result<_, Error>>()?;
        let (mut at, mut faults) = (range.start, 0);
        while at < range.end {
            for (session, part) in &mut sessions {
                if part.contains(&at) {
                    let start = at - addr;
                    at += session.copy_translated(at..part.end, |host, offset, len| {
                        bytes(host, start + offset, len);
                    });
                }
            }
            if at < range.end {
                faults += 1;
                for (session, part) in &mut sessions {
                    if part.end > at {
                        session.fault(part.start.max(at)..part.end)?;
                    }
                }
            }
        }
        for (session, _) in sessions {
            session.finish()?;
        }
        Ok(Done {
            cpages: npages,
            faults,
        })
    }

    /// Moves the pages to the device, and gives what it has then.
    ///
    /// # Errors
    /// EINVAL where nothing is mapped or no access permitted; ENOENT where a page could not be moved.
    pub fn migrate_to_dev(&self, addr: usize, mirror: &mut [u8]) -> Result<Done, Errno> {
        let range = Self::range(addr, mirror.len() / PAGE)?;
        let snapshot = svm::snapshot(addr, range.len() / PAGE)?;
        if snapshot.iter().any(|page| !page.is_readable()) {
            return Err(Errno(libc::EINVAL));
        }
        let mut all = true;
        for (mirror, part) in self.mm.pieces(range.clone())? {
            all &= self.device.migrate_to_device(
                mirror.view().region(),
                part.start,
                part.len() / PAGE,
            )?;
        }
        if !all {
            return Err(Errno(libc::ENOENT));
        }
        let done = self.read(addr, mirror)?;
        Ok(Done { faults: 0, ..done })
    }

    /// Brings the pages home.
    ///
    /// # Errors
    /// EINVAL for a bad range.
    pub fn migrate_to_sys(&self, addr: usize, npages: usize) -> Result<Done, Errno> {
        let range = Self::range(addr, npages)?;
        for (mirror, part) in self.mm.pieces(range)? {
            self.device
                .migrate_to_system(mirror.view().region(), part.start, part.len() / PAGE)?;
        }
        Ok(Done {
            cpages: npages,
            faults: 0,
        })
    }

    /// Takes the pages for atomics, and gives their contents.
    ///
    /// # Errors
    /// As [`write`](Self::write); EBUSY where the memory is of a kind that the device cannot have alone.
    pub fn exclusive(&self, addr: usize, mirror: &mut [u8]) -> Result<Done, Errno> {
        let range = Self::range(addr, mirror.len() / PAGE)?;
        for (mirror, part) in self.mm.pieces(range)? {
            if !self
                .device
                .make_exclusive(mirror.view().region(), part.start, part.len() / PAGE)?
            {
                return Err(Errno(libc::EBUSY));
            }
        }
        let done = self.read(addr, mirror)?;
        Ok(Done { faults: 0, ..done })
    }

    /// Whether the device has lost all the pages since it took them.
    ///
    /// # Errors
    /// EPERM while it still has one to itself.
    pub fn check_exclusive(&self, addr: usize, npages: usize) -> Result<Done, Errno> {
        let range = Self::range(addr, npages)?;
        for (mirror, part) in self.mm.pieces(range)? {
            if self
                .device
                .nr_exclusive(mirror.view().region(), part.start, part.len() / PAGE)?
                > 0
            {
                return Err(Errno(libc::EPERM));
            }
        }
        Ok(Done {
            cpages: npages,
            faults: 0,
        })
    }

    /// Per page, what is there: flags of [`prot`].
    ///
    /// # Errors
    /// EINVAL for a bad range.
    pub fn snapshot(&self, addr: usize, npages: usize) -> Result<Vec<u8>, Errno> {
        let pages = svm::snapshot(addr, npages)?;
        Ok(pages.iter().map(|page| self.flags(page)).collect())
    }

    fn flags(&self, page: &svm::PageSnapshot) -> u8 {
        let rights = if page.is_writable() && !page.is_copy_on_write() {
            prot::WRITE
        } else {
            prot::READ
        };
        let huge = if page.is_huge() { prot::PMD } else { 0 };
        if !page.is_readable() {
            prot::ERROR
        } else if page.is_held_by(self.device.attachment()) {
            prot::DEV_PRIVATE_LOCAL | rights | huge
        } else if !page.is_present() {
            // A hole, or with another device.
            prot::NONE
        } else if page.is_zero_page() {
            prot::ZERO | prot::READ | huge
        } else {
            rights | huge
        }
    }

    /// Evicts all that the device holds.
    ///
    /// # Errors
    /// As [`svm::Attachment::release`].
    pub fn release(&self) -> Result<(), Errno> {
        Ok(self.device.release()?)
    }

    /// Has the next allocation of device memory fail.
    pub fn fail_alloc(&self) {
        self.device.attachment().fail_next_allocations(1);
    }
}
