//! [`snapshot`]: what the CPU's page tables and the directory say of some pages, without faulting anything in.
//!
//! Any addresses may be asked for, mirrored or not. Each page's answer was true at one moment; it may be old when it is read.

use core::ops::ControlFlow;

use crate::addr::{PAGE_SIZE, PageRange};
use crate::attachment::Attachment;
use crate::block::DeviceId;
use crate::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::region::RegionKind;
use crate::space::{AddressSpace, PlaceKind};
use crate::sys::pagemap::PageState;
use crate::sys::signal::AsyncSignalsBlocked;

bitflags::bitflags! {
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    struct Facts: u16 {
        const MAPPED = 1 << 0;
        const READABLE = 1 << 1;
        const WRITABLE = 1 << 2;
        const PRESENT = 1 << 3;
        const ZERO = 1 << 4;
        const HUGE = 1 << 5;
        const MIRRORED = 1 << 6;
        const FILE = 1 << 7;
        const SHARED = 1 << 8;
    }
}

/// One page as [`snapshot`] found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PageSnapshot {
    facts: Facts,
    holders: u8,
}

impl PageSnapshot {
    /// Whether something is mapped there.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        self.facts.contains(Facts::MAPPED)
    }

    /// Whether the mapping permits reading.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        self.facts.contains(Facts::READABLE)
    }

    /// Whether the mapping permits writing.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.facts.contains(Facts::WRITABLE)
    }

    /// Whether the CPU has the page: reading it would not fault.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.facts.contains(Facts::PRESENT)
    }

    /// Whether that is the kernel's shared page of zeros. Linux before 6.7 does not tell.
    #[must_use]
    pub fn is_zero_page(&self) -> bool {
        self.facts.contains(Facts::ZERO)
    }

    /// Whether it is part of a huge page mapped as one: on the CPU, or on the device that holds it. Linux before 6.7 does not
    /// tell.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.facts.contains(Facts::HUGE)
    }

    /// Whether it is a page of a file or of shared memory.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.facts.contains(Facts::FILE)
    }

    /// Whether it is the file's own page in a private mapping: the first write makes a copy of it.
    #[must_use]
    pub fn is_copy_on_write(&self) -> bool {
        self.facts.contains(Facts::FILE) && !self.facts.contains(Facts::SHARED)
    }

    /// Whether the page is mirrored and can move.
    #[must_use]
    pub fn is_mirrored(&self) -> bool {
        self.facts.contains(Facts::MIRRORED)
    }

    /// Whether `device` holds current contents of the page.
    #[must_use]
    pub fn is_held_by<D: Device>(&self, device: &Attachment<D>) -> bool {
        // In a forked child the slot is another's.
        !device.is_forked() && self.holders >> device.id().index() & 1 == 1
    }

    /// Whether any device holds current contents of the page.
    #[must_use]
    pub fn is_on_a_device(&self) -> bool {
        self.holders != 0
    }
}

/// Looks at the `nr_pages` pages from `addr` on, and faults nothing in.
///
/// # Errors
/// The range is empty, not aligned to pages, or wraps; or the kernel does not show this process its page tables; or there is no memory for so many.
pub fn snapshot(addr: usize, nr_pages: usize) -> Result<Vec<PageSnapshot>> {
    let range = nr_pages
        .checked_mul(PAGE_SIZE)
        .and_then(|len| addr.checked_add(len));
    let range = range.and_then(|end| PageRange::new(addr, end));
    let Some(range) = range else {
        return Err(Error::invalid("snapshot", "the range is empty, unaligned or wraps").at(addr));
    };
    let mut pages = Vec::new();
    pages
        .try_reserve_exact(range.nr_pages())
        .map_err(|_| Error::new("snapshot", ErrorKind::OutOfMemory).at(addr))?;
    pages.resize(range.nr_pages(), PageSnapshot::default());
    let _signals = AsyncSignalsBlocked::new();
    let space = AddressSpace::get("snapshot")?;
    for part in range.blocks() {
        let first = (part.start() - range.start()) / PAGE_SIZE;
        look(space, part, &mut pages[first..first + part.nr_pages()])?;
    }
    Ok(pages)
}

/// One block's worth, inside the gate and, where it is mirrored, with the block locked.
fn look(space: &AddressSpace, range: PageRange, pages: &mut [PageSnapshot]) -> Result<()> {
    let failed = |e: std::io::Error| {
        Error::new("snapshot", ErrorKind::System)
            .at(range.start())
            .errno(e.raw_os_error().unwrap_or(0))
    };
    let gate = space.gate().enter();
    let mut at = range.start();
    while at < range.end() {
        let index = |addr: usize| (addr - range.start()) / PAGE_SIZE;
        let place = space.lookup(&gate, at);
        let next = place.map_or_else(
            || {
                space
                    .places(&gate)
                    .iter()
                    .map(|p| p.range.start())
                    .find(|&s| s > at)
                    .unwrap_or(usize::MAX)
            },
            |place| place.range.end(),
        );
        let part = PageRange::new(at, next.min(range.end()));
        let Some(part) = part else { break };
        let held = place
            .filter(|p| p.kind == PlaceKind::Body && p.region.kind() == RegionKind::Managed)
            .map(|place| {
                let (block, page) = place.region.locate(at);
                (place, place.region.lock_block(block), page)
            });
        look_at_cpu(
            space,
            part,
            &mut pages[index(part.start())..index(part.end())],
        )
        .map_err(failed)?;
        if let Some((place, state, first)) = held {
            for (page, snapshot) in
                (first..).zip(&mut pages[index(part.start())..index(part.end())])
            {
                if state.gone().contains(page) {
                    continue;
                }
                snapshot.facts |= Facts::MIRRORED;
                for id in DeviceId::all().filter(|&id| state.frames(id).contains(page)) {
                    snapshot.holders |= 1 << id.index();
                    let frame = place
                        .region
                        .device(&gate, id)
                        .map(|d| d.window().addr_of(place.region.locate(at).0, page));
                    let huge = frame
                        .is_some_and(|frame| space.page_state(frame).contains(PageState::HUGE));
                    snapshot
                        .facts
                        .set(Facts::HUGE, huge || snapshot.facts.contains(Facts::HUGE));
                }
            }
        }
        at = part.end();
    }
    Ok(())
}

fn look_at_cpu(
    space: &AddressSpace,
    range: PageRange,
    pages: &mut [PageSnapshot],
) -> std::io::Result<()> {
    let mut each = |part: PageRange, facts: Facts| {
        let Some(part) = part.intersect(range) else {
            return;
        };
        let first = (part.start() - range.start()) / PAGE_SIZE;
        pages[first..first + part.nr_pages()]
            .iter_mut()
            .for_each(|page| page.facts |= facts);
    };
    space.maps().walk(range, |vma| {
        let mut facts = Facts::MAPPED;
        facts.set(Facts::READABLE, vma.readable);
        facts.set(Facts::WRITABLE, vma.writable);
        facts.set(Facts::SHARED, vma.shared);
        each(vma.range, facts);
        ControlFlow::Continue(())
    })?;
    space.pagemap().walk(range, |extent| {
        if extent.state.contains(PageState::PRESENT) {
            let mut facts = Facts::PRESENT;
            facts.set(Facts::ZERO, extent.state.contains(PageState::ZERO));
            facts.set(Facts::HUGE, extent.state.contains(PageState::HUGE));
            facts.set(Facts::FILE, extent.state.contains(PageState::FILE));
            each(extent.range, facts);
        }
        ControlFlow::Continue(())
    })
}
