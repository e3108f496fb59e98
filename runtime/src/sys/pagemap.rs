//! Which pages are present, and in what state: PAGEMAP_SCAN, or /proc/self/pagemap read by hand.
//!
//! Both look at the page table of the process that opened the file: a forked child opens its own.
//! Neither populates anything. A scan is a snapshot of each page by itself: it says what was true at
//! one instant during the call, and only a lock of the caller's own can make that last.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::disable::Disabled;
use super::{check, iowr};
use crate::addr::{PAGE_SHIFT, PageRange};

bitflags::bitflags! {
    /// What a page-table entry says. No flag: nothing is there.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub(crate) struct PageState: u8 {
        /// Mapped: an access that the mapping allows, and that is not a write to a protected page,
        /// does not fault.
        const PRESENT = 1 << 0;
        /// Write-protected by a userfaultfd. With SWAPPED this may be a bare marker.
        const WRITE_PROTECTED = 1 << 1;
        /// Not mapped, but not empty: swapped out, migrating, or a marker (write-protect, poison,
        /// guard). COPY, MOVE and ZEROPAGE onto it say "exists".
        const SWAPPED = 1 << 2;
        /// A page of a file or of shared memory.
        const FILE = 1 << 3;
        /// The shared page of zeros. Known to PAGEMAP_SCAN only.
        const ZERO = 1 << 4;
        /// Part of a huge page mapped as one. Known to PAGEMAP_SCAN only.
        const HUGE = 1 << 5;
    }
}

/// A run of pages with the same state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// The pages.
    pub(crate) range: PageRange,
    /// Their state; never empty.
    pub(crate) state: PageState,
}

/// `struct pm_scan_arg` (6.7).
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` (6.7).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: u32 = iowr::<PmScanArg>(b'f', 16);
const _: () = assert!(PAGEMAP_SCAN == 0xC060_6610);
const _: () = assert!(size_of::<PageRegion>() == 24);

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_HUGE: u64 = 1 << 6;

/// Extents fetched by one call of [`Pagemap::walk`]: 1.5 KiB of stack.
const BATCH: usize = 64;

/// The process's page table, as the kernel shows it.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: File,
    /// Whether PAGEMAP_SCAN works; decided at open.
    scan: bool,
}

impl Pagemap {
    /// Opens the calling process's page map. Control path.
    ///
    /// # Errors
    ///
    /// No /proc, or no descriptor left.
    pub(crate) fn open() -> io::Result<Self> {
        let mut pagemap = Self {
            file: File::open("/proc/self/pagemap")?,
            scan: true,
        };
        let stack = 0_u8;
        pagemap.scan = !Disabled::current().contains(Disabled::PAGEMAP_SCAN)
            && PageRange::containing((&raw const stack).addr(), 1).is_some_and(|page| {
                pagemap
                    .scan_ioctl(page, &mut [PageRegion::default()])
                    .is_ok()
            });
        Ok(pagemap)
    }

    /// Whether PAGEMAP_SCAN is in use. If not, ZERO and HUGE are never reported.
    pub(crate) fn has_scan(&self) -> bool {
        self.scan
    }

    /// Visits the extents of a range, ascending; pages that are not visited have nothing. Runs of
    /// equal state may come in several extents. Fault path, if `visit` is.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or the scan was interrupted by a fatal signal.
    pub(crate) fn walk(
        &self,
        range: PageRange,
        visit: impl FnMut(Extent) -> ControlFlow<()>,
    ) -> io::Result<()> {
        if self.scan {
            self.walk_by_scan(range, visit)
        } else {
            self.walk_by_read(range, visit)
        }
    }

    /// The state of one page. Fault path.
    ///
    /// # Errors
    ///
    /// As [`Pagemap::walk`].
    pub(crate) fn page(&self, addr: usize) -> io::Result<PageState> {
        let mut state = PageState::empty();
        if let Some(page) = PageRange::containing(addr, 1) {
            self.walk(page, |extent| {
                state = extent.state;
                ControlFlow::Break(())
            })?;
        }
        Ok(state)
    }

    /// Whether every page of the range has nothing: neither a page nor a marker. Fault path.
    ///
    /// # Errors
    ///
    /// As [`Pagemap::walk`].
    pub(crate) fn is_empty(&self, range: PageRange) -> io::Result<bool> {
        let mut empty = true;
        self.walk(range, |_| {
            empty = false;
            ControlFlow::Break(())
        })?;
        Ok(empty)
    }

    /// One PAGEMAP_SCAN from `range.start()`: how many regions it filled in, and where it stopped.
    fn scan_ioctl(
        &self,
        range: PageRange,
        regions: &mut [PageRegion],
    ) -> io::Result<(usize, usize)> {
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start: range.start() as u64,
            end: range.end() as u64,
            vec: regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: regions.len() as u64,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_WRITTEN
                | PAGE_IS_FILE
                | PAGE_IS_PRESENT
                | PAGE_IS_SWAPPED
                | PAGE_IS_PFNZERO
                | PAGE_IS_HUGE,
            ..PmScanArg::default()
        };
        let fd = self.file.as_fd();
        // SAFETY: PAGEMAP_SCAN reads and writes a PmScanArg, asserted by its number above, and writes
        // at most `vec_len` regions to `vec`, which is `regions`. Without flags it changes nothing
        // else. The result is a count, not an error number: it is taken from the call itself.
        let filled = unsafe { scan(fd, &mut arg) }?;
        Ok((filled, arg.walk_end as usize))
    }

    fn walk_by_scan(
        &self,
        range: PageRange,
        mut visit: impl FnMut(Extent) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let mut regions = [PageRegion::default(); BATCH];
        let mut rest = Some(range);
        while let Some(range) = rest {
            let (filled, walked_to) = self.scan_ioctl(range, &mut regions)?;
            for region in regions.iter().take(filled) {
                let Some(range) = PageRange::new(region.start as usize, region.end as usize) else {
                    continue;
                };
                let state = state_from_categories(region.categories);
                if visit(Extent { range, state }).is_break() {
                    return Ok(());
                }
            }
            // It stops short of the end only where the vector was full, which is progress.
            rest = if walked_to > range.start() {
                PageRange::new(walked_to, range.end())
            } else {
                None
            };
        }
        Ok(())
    }

    /// Reads eight bytes per page.
    fn walk_by_read(
        &self,
        range: PageRange,
        mut visit: impl FnMut(Extent) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let mut buffer = [0_u8; 4096];
        let mut open: Option<Extent> = None;
        let mut addr = range.start();
        while addr < range.end() {
            let wanted = ((range.end() - addr) >> PAGE_SHIFT) * 8;
            let length = wanted.min(buffer.len());
            let Some(chunk) = buffer.get_mut(..length) else {
                break;
            };
            let read = self.file.read_at(chunk, (addr >> PAGE_SHIFT) as u64 * 8)?;
            if read < 8 {
                // Beyond the highest user address there is nothing.
                break;
            }
            for entry in chunk[..read].as_chunks::<8>().0 {
                let state = state_from_entry(u64::from_ne_bytes(*entry));
                let next = addr + (1 << PAGE_SHIFT);
                match &mut open {
                    Some(extent) if extent.state == state => {
                        if let Some(longer) = PageRange::new(extent.range.start(), next) {
                            extent.range = longer;
                        }
                    }
                    _ => {
                        if let Some(extent) = open.take()
                            && visit(extent).is_break()
                        {
                            return Ok(());
                        }
                        if !state.is_empty() {
                            open = PageRange::new(addr, next).map(|range| Extent { range, state });
                        }
                    }
                }
                addr = next;
            }
        }
        if let Some(extent) = open {
            let _ = visit(extent);
        }
        Ok(())
    }
}

/// PAGEMAP_SCAN itself: returns the number of regions.
///
/// # Safety
///
/// `arg.vec` must be valid for writes of `arg.vec_len` regions.
unsafe fn scan(fd: std::os::fd::BorrowedFd<'_>, arg: &mut PmScanArg) -> io::Result<usize> {
    use std::os::fd::AsRawFd;
    let arg: *mut PmScanArg = arg;
    // SAFETY: by contract, and see the caller.
    let filled = unsafe { libc::ioctl(fd.as_raw_fd(), PAGEMAP_SCAN as libc::Ioctl, arg) };
    Ok(check(libc::c_long::from(filled))?.cast_unsigned() as usize)
}

fn state_from_categories(categories: u64) -> PageState {
    let table = [
        (PAGE_IS_PRESENT, PageState::PRESENT),
        (PAGE_IS_SWAPPED, PageState::SWAPPED),
        (PAGE_IS_FILE, PageState::FILE),
        (PAGE_IS_PFNZERO, PageState::ZERO),
        (PAGE_IS_HUGE, PageState::HUGE),
    ];
    let mut state = PageState::empty();
    for (category, flag) in table {
        state.set(flag, categories & category != 0);
    }
    // "Written" is the kernel's word for "present or swapped, and not uffd-write-protected".
    state.set(
        PageState::WRITE_PROTECTED,
        categories & PAGE_IS_WRITTEN == 0,
    );
    state
}

/// Decodes a word of /proc/pid/pagemap (Documentation/admin-guide/mm/pagemap.rst).
fn state_from_entry(entry: u64) -> PageState {
    let bit = |n: u32| entry >> n & 1 != 0;
    let mut state = PageState::empty();
    state.set(PageState::PRESENT, bit(63));
    state.set(PageState::SWAPPED, bit(62));
    if !state.is_empty() {
        state.set(PageState::FILE, bit(61));
        state.set(PageState::WRITE_PROTECTED, bit(57));
    }
    state
}
