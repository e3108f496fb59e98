//! The edges of a region: the partial pages at its ends, which never move.
//!
//! A launch that holds the borrow works on *copies* of the edge bytes, in the edge pages of the window, so that elements
//! and spans run across the seam between edge and body; when the launch ends, what it may have written is copied back.
//! Nobody else may touch those bytes meanwhile: the borrow says so. A launch over `share()` accesses them in place instead.
//!
//! The copies go through the kernel, which answers with an error where a mapping has gone (hazards E1).

use core::ops::Range;

use crate::addr::PAGE_SIZE;
use crate::device::Device;
use crate::error::{Access, DeviceFault, DeviceFaultKind, Error, ErrorKind, Result};
use crate::mapped::{Mapped, MappedRef};
use crate::overrun;
use crate::region::RegionKind;
use crate::sync::Mutex;
use crate::sys::process;
use crate::sys::signal::AsyncSignalsBlocked;

/// How many launches use the copies of a mapped region's edges.
#[derive(Debug)]
pub(crate) struct Edges {
    users: Mutex<u32>,
}

impl Edges {
    pub(crate) const fn new() -> Self {
        Self {
            users: Mutex::new(0),
        }
    }
}

/// A launch's use of a mapped region: its edge bytes are in the window. Ending it brings them back.
#[derive(Debug)]
pub struct UseGuard<D: Device> {
    mapped: MappedRef<D>,
    access: Access,
    open: bool,
}

/// Host byte ranges of the (at most two) edges of the region.
fn edges<D: Device>(mapped: &Mapped<D>) -> [Option<Range<usize>>; 2] {
    let region = mapped.shared_region();
    let (start, end) = (region.addr(), region.end());
    if region.kind() == RegionKind::InPlace || start == end {
        return [None, None];
    }
    match region.body() {
        None => {
            let middle = end.min((start / PAGE_SIZE + 1) * PAGE_SIZE);
            [Some(start..middle), (middle < end).then_some(middle..end)]
        }
        Some(body) => [
            (start < body.start()).then_some(start..body.start()),
            (body.end() < end).then_some(body.end()..end),
        ],
    }
}

impl<D: Device> MappedRef<D> {
    /// Begins a launch's use of the region: copies the edge bytes into the window. Until the guard is ended, CPU reads of
    /// pages that a device holds duplicate them.
    ///
    /// The guard is to be dropped or finished: while one that was leaked (`mem::forget`) counts as a user, later launches work on
    /// the copies it made.
    ///
    /// # Errors
    /// The edge's mapping is gone, a write to an input, a write while a launch of another device writes, or a forked child.
    ///
    /// # Safety
    /// Until the guard is ended the region's memory stays what it is, and nobody but launches uses its edges otherwise than the
    /// mirror's borrow allows: for a write nobody at all, for a read nobody writes them. A view that is kept as long as the guard
    /// says so.
    pub unsafe fn begin_use(&self, access: Access) -> Result<UseGuard<D>> {
        let region = self.shared_region();
        // Before any lock: its holder may have stayed in the parent.
        if region.door().is_disowned() {
            return Err(Error::new("begin use", ErrorKind::Forked).at(region.addr()));
        }
        if access == Access::Write && !region.is_writable() {
            return Err(
                DeviceFault::new(region.addr(), access, DeviceFaultKind::Protection).into(),
            );
        }
        let _signals = AsyncSignalsBlocked::new();
        let me = self.attached().id;
        if access == Access::Write {
            let mut writers = region.edge_writers();
            if writers.1 > 0 && writers.0 != Some(me) {
                return Err(Error::invalid(
                    "begin use",
                    "a launch of another device is writing this mirror",
                )
                .at(region.addr()));
            }
            *writers = (Some(me), writers.1 + 1);
        }
        let entered = self.enter_edges();
        if entered.is_err() && access == Access::Write {
            region.edge_writers().1 -= 1;
        }
        entered?;
        self.revalidate_protections();
        overrun::lift_all(region);
        region.begin_use();
        Ok(UseGuard {
            mapped: self.clone(),
            access,
            open: true,
        })
    }

    /// Counts a user of the copies; the first makes them.
    fn enter_edges(&self) -> Result<()> {
        let mut users = self.edges().users.lock();
        if *users == 0 {
            for edge in edges(self).into_iter().flatten() {
                self.copy_in(&edge)?;
            }
        }
        *users += 1;
        Ok(())
    }

    fn window_of(&self, addr: usize) -> usize {
        addr.wrapping_add_signed(self.offset())
    }

    fn copy_in(&self, edge: &Range<usize>) -> Result<()> {
        let window = core::ptr::with_exposed_provenance_mut(self.window_of(edge.start));
        // SAFETY: the window's edge page is our own writable reservation, and nobody uses it while `users` is zero.
        let copied = unsafe { process::copy_from(window, edge.start, edge.len()) };
        check("copy edge in", edge, copied)
    }

    fn copy_back(&self, edge: &Range<usize>) -> Result<()> {
        let window = core::ptr::with_exposed_provenance(self.window_of(edge.start));
        // SAFETY: the window's edge page is our own; the host's bytes are the launch's to write, by its exclusive borrow.
        let copied = unsafe { process::copy_to(edge.start, window, edge.len()) };
        check("copy edge back", edge, copied)
    }
}

fn check(
    operation: &'static str,
    edge: &Range<usize>,
    copied: std::io::Result<usize>,
) -> Result<()> {
    match copied {
        Ok(n) if n == edge.len() => Ok(()),
        Ok(n) => Err(Error::new(operation, ErrorKind::Unmapped).at(edge.start + n)),
        Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
            Err(Error::new(operation, ErrorKind::Unmapped).at(edge.start))
        }
        Err(e) => Err(Error::new(operation, ErrorKind::System)
            .at(edge.start)
            .errno(e.raw_os_error().unwrap_or(0))),
    }
}

impl<D: Device> UseGuard<D> {
    /// The mapped region.
    #[must_use]
    pub fn mapped(&self) -> &MappedRef<D> {
        &self.mapped
    }

    /// Page indices (from the region's base) of the edge pages, whose bytes are in the window while the guard lives: a
    /// device may treat them as readable, and for a writing use as writable, without faulting them in.
    pub fn edge_pages(&self) -> impl Iterator<Item = usize> + use<D> {
        let base = self.mapped.shared_region().base();
        edges(&self.mapped)
            .into_iter()
            .flatten()
            .map(move |edge| (edge.start - base) / PAGE_SIZE)
    }

    /// Ends the use, copying back what may have been written.
    ///
    /// # Errors
    /// The edge's mapping is gone or read-only; what was written to the edge is lost then. A forked child, in which the use is not.
    pub fn finish(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        if !core::mem::replace(&mut self.open, false) {
            return Ok(());
        }
        let region = self.mapped.shared_region();
        if region.door().is_disowned() {
            // The copies are the parent's, and the locks may be held there.
            return Err(Error::new("end use", ErrorKind::Forked).at(region.addr()));
        }
        let _signals = AsyncSignalsBlocked::new();
        region.end_use();
        let mut result = Ok(());
        // Copied back before anybody who comes next can find no user and copy in.
        let mut users = self.mapped.edges().users.lock();
        if self.access == Access::Write {
            for edge in edges(&self.mapped).into_iter().flatten() {
                result = result.and(self.mapped.copy_back(&edge));
            }
            region.edge_writers().1 -= 1;
        }
        *users -= 1;
        result
    }
}

impl<D: Device> Drop for UseGuard<D> {
    fn drop(&mut self) {
        // An error shows only through `finish`; there is nobody to tell here.
        let _ = self.end();
    }
}
