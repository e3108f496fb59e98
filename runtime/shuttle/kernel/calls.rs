//! The calls that change mappings and what is in them, with their events:
//!
//! | call | what happens, in this order |
//! |---|---|
//! | `madvise(DONTNEED)` | REMOVE posted; sleeps until it is read; *later* the pages go; *later* the caller returns |
//! | `munmap` | the pages go; UNMAP posted; sleeps until it is read; returns |
//! | `mremap` | the entries are at the new address; REMAP and UNMAP posted; sleeps until each is read; returns |

use super::messages::wait_for_reader;
use super::{Kernel, Page, point, with};
use crate::addr::{PAGE_SIZE, PageRange};
use crate::sys::event::Event;
use crate::sys::uffd::{Features, Stop};

/// Points between the moment at which a caller of `madvise` goes on and its zap.
const LATE_ZAP: usize = 6;

/// `madvise(MADV_DONTNEED)`.
pub(crate) fn madvise_dontneed(range: PageRange) {
    point();
    let posted = with(|kernel| {
        kernel.note("madvise DONTNEED", range.start(), None);
        kernel.post(range, Features::EVENT_REMOVE, Event::Remove)
    });
    wait_for_reader(&posted);
    // The zap is late, by as much as it takes others to get something done.
    (0..LATE_ZAP).for_each(|_| point());
    for page in (range.start()..range.end()).step_by(PAGE_SIZE) {
        point();
        with(|kernel| {
            kernel.pages.remove(&page);
            kernel.note("zap", page, None);
        });
    }
    point();
}

/// `munmap`.
pub(crate) fn munmap(range: PageRange) {
    point();
    let posted = with(|kernel| {
        kernel.note("munmap", range.start(), None);
        let posted = kernel.post(range, Features::EVENT_UNMAP, Event::Unmap);
        kernel.forget(range);
        posted
    });
    wait_for_reader(&posted);
}

/// `mmap(MAP_FIXED)` of ordinary memory over `range`. `is_mapped` is called the moment it is there: before the caller goes on,
/// and before the event is read.
pub(crate) fn mmap_fixed(range: PageRange, is_mapped: impl FnOnce()) {
    point();
    let posted = with(|kernel| {
        kernel.note("mmap FIXED", range.start(), None);
        let posted = kernel.post(range, Features::EVENT_UNMAP, Event::Unmap);
        kernel.forget(range);
        kernel.map(range);
        posted
    });
    is_mapped();
    wait_for_reader(&posted);
}

/// `fork`: what is present in `range` is shared with the child from now on.
pub(crate) fn fork(range: PageRange) {
    with(|kernel| {
        kernel.note("fork", range.start(), None);
        for addr in kernel.populated(range) {
            kernel.share(addr);
        }
    });
}

impl Kernel {
    /// Unmaps without a word.
    fn forget(&mut self, range: PageRange) {
        for addr in self.populated(range) {
            self.pages.remove(&addr);
        }
        self.split(range);
        self.mappings.retain(|m| !m.range.overlaps(range));
    }
}

/// `mremap` that moves `range`, of one mapping, to `to`, where nothing is.
pub(crate) fn mremap(range: PageRange, to: usize) {
    point();
    let posted = with(|kernel| {
        kernel.note("mremap", range.start(), None);
        let target = PageRange::from_pages(to, range.nr_pages()).expect("an address");
        let registered = kernel.registration(range.start());
        let mut posted = Vec::new();
        if let Some((id, _)) = registered {
            let (from, len) = (range.start(), range.len_bytes());
            posted.push((id, kernel.post_to(id, Event::Remap { from, to, len })));
            posted.push((id, kernel.post_to(id, Event::Unmap(range))));
        }
        let moved: Vec<(usize, Page)> = kernel
            .populated(range)
            .into_iter()
            .filter_map(|addr| Some((addr - range.start() + to, kernel.pages.remove(&addr)?)))
            .collect();
        kernel.forget(range);
        kernel.map(target);
        if let Some(mapping) = kernel.mappings.last_mut() {
            mapping.registered = registered;
        }
        kernel.pages.extend(moved);
        posted
    });
    wait_for_reader(&posted);
}

/// `MADV_POPULATE_WRITE`: breaks sharing; a registered hole is left.
pub(crate) fn populate_write(range: PageRange) {
    for page in (range.start()..range.end()).step_by(PAGE_SIZE) {
        point();
        with(|kernel| {
            kernel.note("POPULATE_WRITE", page, None);
            if let Some(page) = kernel.pages.get_mut(&page)
                && !page.protected
            {
                page.shared = false;
            }
        });
    }
}

/// `process_vm_readv` from ourselves, page by page: how many it came to.
pub(crate) fn copy_over(dst: usize, src: usize, nr_pages: usize) -> usize {
    for page in 0..nr_pages {
        point();
        let (dst, src) = (dst + page * PAGE_SIZE, src + page * PAGE_SIZE);
        let copied = with(|kernel| {
            let contents = kernel.pages.get(&src).map(|page| page.contents);
            let copied = match (contents, kernel.pages.get_mut(&dst)) {
                (Some(contents), Some(to)) if !to.protected => {
                    to.contents = contents;
                    true
                }
                _ => false,
            };
            kernel.note("copy over", dst, (!copied).then_some(Stop::Fault));
            copied
        });
        if !copied {
            return page;
        }
    }
    nr_pages
}
