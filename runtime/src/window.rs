//! [`Window`]: a device's memory for one region.
//!
//! A window is reserved address space of the region's size, congruent with it modulo 2 MiB: page *i* of the region, when
//! the device has it, is page *i* of the window. A frame needs no allocator and no table, a run of any length moves in
//! one call, huge pages line up, and a translation is one offset per region. Reserved is not used: pages exist only
//! where something was moved or copied in, and they are counted against the device's memory.
//!
//! The body of a window is registered on the *same* userfaultfd as its region, since the kernel's protection against a
//! mapping that changes under a move holds only for the descriptor that is used (hazards M1). So a stray access to an
//! empty page traps instead of quietly reading zeros. The two edge pages are plain memory: a launch works on copies of
//! the edge bytes there, so that elements and spans run across them without a seam.
//!
//! Windows are `MADV_DONTFORK` for ever: a frame shared copy-on-write with a child could not move home (hazards F1).

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PageRange};
use crate::block::DeviceId;
use crate::door::{Door, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::region::{Region, RegionKind};
use crate::sys::mmap::{self, Advice, Reservation};

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Window {
    /// The address of page index 0; congruent with the region's base, and possibly below the reservation.
    base: usize,
    reservation: Option<Reservation>,
    registered: Option<PageRange>,
    door: &'static Door,
    device: DeviceId,
}

impl Window {
    /// Reserves and registers a window for `region`. A region that is served in place has none, and base 0 offset.
    pub(crate) fn new(region: &Region, device: DeviceId) -> Result<Self> {
        let door = region.door();
        if region.kind() == RegionKind::InPlace || region.len_bytes() == 0 {
            return Ok(Self {
                base: region.base(),
                reservation: None,
                registered: None,
                door,
                device,
            });
        }
        let failed = |errno| {
            Error::new("map", ErrorKind::OutOfMemory)
                .at(region.addr())
                .errno(errno)
        };
        let like = PageRange::containing(region.addr(), region.len_bytes())
            .ok_or_else(|| Error::invalid("map", "the range wraps"))?;
        let reservation =
            Reservation::congruent_to(like).map_err(|e| failed(e.raw_os_error().unwrap_or(0)))?;
        let base = reservation
            .range()
            .start()
            .wrapping_sub(like.start())
            .wrapping_add(region.base());
        if region.options().huge_pages {
            // Advice: without huge pages a block moves page by page.
            let _ = mmap::advise(reservation.range(), Advice::HugePage);
        }
        let mut window = Self {
            base,
            reservation: Some(reservation),
            registered: None,
            door,
            device,
        };
        if let Some(body) = region.body() {
            let offset = base.wrapping_sub(region.base());
            let body = PageRange::new(
                body.start().wrapping_add(offset),
                body.end().wrapping_add(offset),
            )
            .ok_or_else(|| Error::invalid("map", "the window wraps"))?;
            door.register(body, Role::Window).map_err(|errno| {
                Error::new("register window", ErrorKind::System)
                    .at(body.start())
                    .errno(errno)
            })?;
            window.registered = Some(body);
        }
        Ok(window)
    }

    /// The address of page index 0.
    pub(crate) fn base(&self) -> usize {
        self.base
    }

    /// Address of page `page` of block `block`.
    pub(crate) fn addr_of(&self, block: usize, page: usize) -> usize {
        self.base
            .wrapping_add(block * BLOCK_SIZE + page * PAGE_SIZE)
    }

    /// The registered part: where a fault is a bug of ours, or a worker that outstayed a shootdown.
    pub(crate) fn registered(&self) -> Option<PageRange> {
        self.registered
    }

    pub(crate) fn device(&self) -> DeviceId {
        self.device
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if self.door.is_disowned() {
            // In a forked child the window was never mapped; what is at its address now is somebody else's.
            core::mem::forget(self.reservation.take());
            return;
        }
        // Unregistered first: unmapping a registered range would post an event and wait for its reader.
        if let Some(body) = self.registered.take() {
            self.door.unregister(body);
        }
        self.reservation = None;
    }
}
