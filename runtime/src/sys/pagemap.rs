//! Which pages are present, and in what state: PAGEMAP_SCAN, or /proc/self/pagemap read by hand.
//!
//! Both look at the page table of the process that opened the file: a forked child opens its own.
//! Neither populates anything. A scan is a snapshot of each page by itself: it says what was true at
//! one instant during the call, and only a lock of the caller's own can make that last.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
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

const PATH: &str = "/proc/self/pagemap";

const PAGEMAP_SCAN: u32 = iowr::<PmScanArg>(b'f', 16);
const _: () = assert!(PAGEMAP_SCAN == 0xC060_6610);
const _: () = assert!(size_of::<PageRegion>() == 24);

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_HUGE: u64 = 1 << 6;

/// Extents fetched by one PAGEMAP_SCAN. An alternate signal stack may be 8 KiB, of which the kernel's
/// frame takes up to half: these are 768 bytes of it.
const BATCH: usize = 32;
/// Words fetched by one read of the file: 512 bytes of stack.
const READ_BATCH: usize = 64;

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
            file: File::open(PATH)?,
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

    #[cfg(test)]
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
        let mut buffer = [0_u8; READ_BATCH * 8];
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
            for entry in chunk.get(..read).unwrap_or_default().as_chunks::<8>().0 {
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
unsafe fn scan(fd: BorrowedFd<'_>, arg: &mut PmScanArg) -> io::Result<usize> {
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

#[cfg(test)]
mod tests {
    use super::super::mmap::{Advice, Reservation, advise};
    use super::super::uffd::{FaultScope, Features, Mode, Protect, Stop, Uffd, Wake};
    use super::*;
    use crate::addr::PAGE_SIZE;

    /// Every page's state, by one way or the other.
    fn states(pagemap: &Pagemap, range: PageRange) -> Vec<PageState> {
        let mut states = vec![PageState::empty(); range.nr_pages()];
        pagemap
            .walk(range, |extent| {
                assert!(range.contains(extent.range) && !extent.state.is_empty());
                for page in extent.range.pages() {
                    states[(page - range.start()) / PAGE_SIZE] = extent.state;
                }
                ControlFlow::Continue(())
            })
            .unwrap();
        states
    }

    /// Both ways of reading; the second is forced.
    fn both() -> [Pagemap; 2] {
        let (first, mut second) = (Pagemap::open().unwrap(), Pagemap::open().unwrap());
        second.scan = false;
        [first, second]
    }

    fn small_pages(nr_pages: usize) -> Reservation {
        let like = PageRange::from_pages(PAGE_SIZE, nr_pages).unwrap();
        let memory = Reservation::congruent_to(like).unwrap();
        advise(memory.range(), Advice::NoHugePage).unwrap();
        memory
    }

    fn populate(memory: &Reservation, page: usize) {
        assert!(page < memory.range().nr_pages());
        // SAFETY: in bounds of memory that is the test's own.
        unsafe { memory.as_ptr().wrapping_add(page * PAGE_SIZE).write(1) };
    }

    #[test]
    fn both_ways_see_the_same_more_extents_than_a_batch() {
        let memory = small_pages(8 * BATCH);
        // Every third page, so that there are far more extents than one scan returns.
        for page in (0..8 * BATCH).step_by(3) {
            populate(&memory, page);
        }
        let expected: Vec<_> = (0..8 * BATCH)
            .map(|page| match page % 3 {
                0 => PageState::PRESENT,
                _ => PageState::empty(),
            })
            .collect();
        for pagemap in both() {
            assert_eq!(states(&pagemap, memory.range()), expected);
            let hole = PageRange::from_pages(memory.range().start() + PAGE_SIZE, 2).unwrap();
            assert!(pagemap.is_empty(hole).unwrap());
            assert!(!pagemap.is_empty(memory.range()).unwrap());
        }
    }

    #[test]
    fn a_walk_ends_when_told() {
        let memory = small_pages(6);
        for page in [0, 2, 4] {
            populate(&memory, page);
        }
        for pagemap in both() {
            let mut visits = 0;
            pagemap
                .walk(memory.range(), |_| {
                    visits += 1;
                    if visits == 2 {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                })
                .unwrap();
            assert_eq!(visits, 2);
        }
    }

    #[test]
    fn what_is_not_mapped_is_empty() {
        let range = PageRange::from_pages(PAGE_SIZE, 4).unwrap();
        let top = PageRange::from_pages(usize::MAX - 8 * PAGE_SIZE + 1, 4).unwrap();
        for pagemap in both() {
            assert!(pagemap.is_empty(range).unwrap());
            // Not a user address: no entry, or an error, but no page.
            assert!(pagemap.is_empty(top).unwrap_or(true));
        }
    }

    #[test]
    fn marks_of_write_protection_are_seen_both_ways() {
        let wanted = Features::PAGEFAULT_FLAG_WP | Features::SIGBUS;
        let uffd = Uffd::open(FaultScope::UserMode, wanted).unwrap();
        if !uffd.enabled().contains(Features::PAGEFAULT_FLAG_WP) {
            return;
        }
        let memory = small_pages(4);
        let source = small_pages(1);
        populate(&source, 0);
        for page in [0, 1] {
            populate(&memory, page);
        }
        let page = |n| PageRange::from_pages(memory.range().start() + n * PAGE_SIZE, 1).unwrap();
        // SAFETY: the memory is the test's own; only raw pointers lead there.
        unsafe { uffd.register(memory.range(), Mode::MISSING | Mode::WP) }.unwrap();
        assert_eq!(uffd.write_protect(page(1)), Stop::Complete);
        let start = source.range().start();
        // SAFETY: registered just now.
        let copied = unsafe { uffd.copy(page(2), start, Protect::Yes, Wake::No) };
        assert!(copied.is_complete());
        let protected = PageState::PRESENT | PageState::WRITE_PROTECTED;
        let expected = [PageState::PRESENT, protected, protected, PageState::empty()];
        for pagemap in both() {
            assert_eq!(states(&pagemap, memory.range()), expected);
        }
        uffd.unregister(memory.range()).unwrap();
    }

    #[test]
    fn zero_and_file_pages_are_told_apart() {
        let [scan, read] = both();
        let memory = small_pages(1);
        // SAFETY: the test's own memory; a read maps the page of zeros.
        let zero = unsafe { memory.as_ptr().read_volatile() };
        assert_eq!(zero, 0);
        let start = memory.range().start();
        assert_eq!(
            read.page(start).unwrap() & PageState::PRESENT,
            PageState::PRESENT
        );
        if scan.has_scan() {
            let expected = PageState::PRESENT | PageState::ZERO;
            assert_eq!(scan.page(start).unwrap(), expected);
        }
        // Code is a file's.
        let code = both as *const () as usize;
        for pagemap in both() {
            let expected = PageState::PRESENT | PageState::FILE;
            assert_eq!(pagemap.page(code).unwrap() & expected, expected);
        }
    }

    #[test]
    fn huge_pages_are_seen_where_there_are_any() {
        let like = PageRange::from_pages(crate::addr::BLOCK_SIZE, 512).unwrap();
        let memory = Reservation::congruent_to(like).unwrap();
        let pagemap = Pagemap::open().unwrap();
        // "never" in sysfs, or no free memory that lies right: then there is nothing to see.
        if advise(memory.range(), Advice::HugePage).is_err() || !pagemap.has_scan() {
            return;
        }
        populate(&memory, 0);
        if advise(memory.range(), Advice::Collapse).is_ok() {
            let states = states(&pagemap, memory.range());
            let expected = PageState::PRESENT | PageState::HUGE;
            assert!(states.iter().all(|&state| state == expected), "{states:?}");
        }
    }
}
