//! Slice kernels: an item's chunks, as slices.
//!
//! # An item
//!
//! 1. Publish the spans of all views, and check that all their pages have translations. If one has not: withdraw all, fault in
//!    what is missing, and start over. An item holds nothing while it waits, so two of them never wait for each other; each
//!    attempt earns its pages a longer stay. The first attempt fetches what the view has in the same block along with it: so many
//!    workers with small items make no more far faults than one with large ones. It does so only if the device has room for all of
//!    the launch's views.
//! 2. With all spans open, every page of them stays until they are closed. A span whose pages are all in the window is a slice
//!    of the window; one whose pages are all in place is a slice of host memory. One with some of each is *bounced*: its bytes
//!    are gathered into a buffer, which the kernel works on, and scattered back if the view is mutable.
//! 3. Run the kernel, and close the spans, also when it panics.
//!
//! # When device memory is tight
//!
//! All spans of an item are needed at once, and where memory is full each page fetched for one may drive out a page fetched for another,
//! for ever. So after [`MAX_ATTEMPTS`] an item goes on *piecewise*: it copies its spans into buffers page by page, holding one
//! page at a time, runs the kernel on the copies with nothing held at all, and copies back page by page. That is sound for
//! the reason that bouncing is: the launch's borrows keep everyone else from the chunk meanwhile. It needs one page of
//! memory to make progress, as an element access does.

use std::ops::Range;
use std::ptr::{
    NonNull, copy_nonoverlapping, with_exposed_provenance, with_exposed_provenance_mut,
};

use svm::addr::{PAGE_SIZE, PAGES_PER_BLOCK};
use svm::{DeviceFault, DeviceFaultKind};

use crate::chunk::{self, Budget, Chunks, TooSmall};
use crate::error::Error;
use crate::lane::access_of;
use crate::launch::{Failure, Launch, Operand, Operands, Work, catch};
use crate::shootdown::{Rights, Slot};
use crate::space::Space;
use crate::table::{Extent, Place};
use crate::view::sealed::Chunk;
use crate::view::{MAX_VIEWS, SpanSet};
use crate::worker::Worker;

/// The work of a launch over slices.
pub(crate) struct SpanWork<V, K> {
    operands: Operands,
    chunks: Chunks,
    kernel: K,
    _views: std::marker::PhantomData<fn(V)>,
}

impl<V, K> SpanWork<V, K>
where
    V: SpanSet,
    K: for<'s> Fn(<V as SpanSet>::Spans<'s>) + Sync + Send,
{
    pub(crate) fn new(operands: Operands, kernel: K, budget: Budget) -> Result<Self, Error> {
        let views = || operands.views.iter().flatten();
        if views().next().is_none() {
            return Err(Error::NoViews);
        }
        let expected = views().next().map_or(0, |v| v.len);
        if let Some(other) = views().find(|v| v.len != expected) {
            return Err(Error::LengthMismatch {
                expected,
                found: other.len,
            });
        }
        let extents: Vec<chunk::Extent> = views()
            .map(|v| chunk::Extent {
                addr: v.addr,
                size: v.size,
                len: v.len,
            })
            .collect();
        let lead = views().position(|v| v.rights == Rights::Write).unwrap_or(0);
        let chunks = Chunks::new(&extents, lead, budget).map_err(|TooSmall { needed }| {
            Error::DeviceMemoryTooSmall {
                needed,
                available: budget.memory_bytes.unwrap_or(0),
            }
        })?;
        Ok(SpanWork {
            operands,
            chunks,
            kernel,
            _views: std::marker::PhantomData,
        })
    }
}

/// One view's span of one item.
struct Want<'a> {
    operand: &'a Operand,
    space: &'a Space,
    addr: usize,
    len_bytes: usize,
    pages: Range<usize>,
    /// The pages that a far fault may bring along: the view's, or the span's own.
    around: Range<usize>,
}

impl<'a> Want<'a> {
    /// `None` where there are no bytes.
    fn new(
        operands: &'a Operands,
        operand: &'a Operand,
        elements: &Range<usize>,
        all_fit: bool,
    ) -> Option<Want<'a>> {
        let len_bytes = elements.len() * operand.size;
        if len_bytes == 0 {
            return None;
        }
        let space = operands.space(operand);
        let addr = operand.addr + elements.start * operand.size;
        let pages = space.pages(addr, len_bytes);
        let around = if all_fit {
            space.pages(operand.addr, operand.len_bytes)
        } else {
            pages.clone()
        };
        Some(Want {
            operand,
            space,
            addr,
            len_bytes,
            pages,
            around,
        })
    }

    /// The parts of the span that lie in one page each: host address and length.
    fn parts(&self) -> impl Iterator<Item = (usize, usize)> {
        let end = self.addr + self.len_bytes;
        self.pages.clone().map(move |page| {
            let start = self.space.addr_of(page).max(self.addr);
            (
                start,
                (self.space.addr_of(page) + PAGE_SIZE).min(end) - start,
            )
        })
    }
}

/// Closes the spans it stands for.
struct Open<'a> {
    slot: &'a Slot,
    nr: usize,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.slot.close(0, self.nr);
    }
}

impl<V, K> Work for SpanWork<V, K>
where
    V: SpanSet,
    K: for<'s> Fn(<V as SpanSet>::Spans<'s>) + Sync + Send,
{
    fn nr_items(&self) -> usize {
        self.chunks.nr_items()
    }

    fn item(&self, worker: &Worker, launch: &Launch, i: usize) -> Result<(), Failure> {
        let elements = self.chunks.elements(i);
        if elements.is_empty() {
            return Ok(());
        }
        let mut wants = [const { None }; MAX_VIEWS];
        for (want, operand) in wants.iter_mut().zip(self.operands.views.iter().flatten()) {
            *want = Want::new(&self.operands, operand, &elements, self.chunks.all_fit());
        }
        let bounce = &mut *worker.bounce().borrow_mut();
        let opened = open(worker, launch, &wants, bounce)?;
        let mut places = [0; MAX_VIEWS];
        for (v, want) in wants.iter().enumerate() {
            if let Some(want) = want {
                places[v] = match opened.as_ref().map(|(_, extents)| extents[v]) {
                    Some(Extent::Window) => want
                        .addr
                        .wrapping_add_signed(want.space.offset(Place::Window)),
                    Some(Extent::InPlace) => want.addr,
                    Some(Extent::Mixed) => {
                        worker.counters().bounced();
                        bounce.gather(v, want)
                    }
                    None => {
                        worker.counters().bounced();
                        bounce.gather_piecewise(v, want, worker, launch)?
                    }
                };
            }
        }
        // The kernel's arguments in order: a view without bytes has a dangling address, as an empty slice has.
        let mut views = self.operands.views.iter();
        let mut v = 0;
        let mut chunk = || {
            let addr = match views.next() {
                Some(Some(_)) => {
                    let addr = places[v];
                    v += 1;
                    if addr == 0 {
                        NonNull::<Page>::dangling().addr().get()
                    } else {
                        addr
                    }
                }
                _ => 0,
            };
            Chunk {
                addr,
                first: elements.start,
                len: elements.len(),
            }
        };
        // SAFETY: each address is that of the chunk's bytes for the device, or of a copy; exposed, and congruent to the host address
        // modulo the page size at least, so aligned. The pages stay where they are while `opened` lives, which is longer than
        // the kernel's call. Chunks of different items are disjoint, and so are the views, by their borrows; a mutable view's
        // borrow, which the launch outlives at no time, keeps everyone else from the chunk.
        let spans = unsafe { <V as SpanSet>::spans(&mut chunk) };
        let ran = catch(|| (self.kernel)(spans));
        for (v, want) in wants.iter().enumerate() {
            if let Some(want) = want
                && want.operand.rights == Rights::Write
            {
                match &opened {
                    Some((_, extents)) if extents[v] == Extent::Mixed => bounce.scatter(v, want),
                    Some(_) => {}
                    None => bounce.scatter_piecewise(v, want, worker)?,
                }
            }
        }
        drop(opened);
        ran
    }

    fn finish(self: Box<Self>) -> Result<(), svm::Error> {
        self.operands.finish()
    }
}

/// How often all spans of an item are tried to be opened at once.
const MAX_ATTEMPTS: u32 = 16;

/// Opens all spans, faulting in what is missing as often as makes sense. `None`: they do not stay together, see the module.
fn open<'a>(
    worker: &'a Worker,
    launch: &Launch,
    wants: &[Option<Want<'_>>; MAX_VIEWS],
    bounce: &mut Bounce,
) -> Result<Option<(Open<'a>, [Extent; MAX_VIEWS])>, DeviceFault> {
    let mut spans = [const { (0..0, Rights::Read) }; MAX_VIEWS];
    let mut nr = 0;
    for want in wants.iter().flatten() {
        spans[nr] = (want.space.host_pages(&want.pages), want.operand.rights);
        nr += 1;
    }
    for attempt in 0..MAX_ATTEMPTS {
        for (v, want) in wants.iter().enumerate() {
            if let Some(want) = want {
                bounce.make_room(v, want);
            }
        }
        let mut extents = [Extent::Window; MAX_VIEWS];
        worker.wait_while_paused();
        let opened = worker.slot().try_open(0, &spans[..nr], || {
            if worker.is_paused() {
                return None;
            }
            for (v, want) in wants.iter().enumerate() {
                if let Some(want) = want {
                    extents[v] = want.space.extent(&want.pages, want.operand.rights).ok()?;
                    if extents[v] == Extent::Mixed {
                        bounce.note_places(v, want)?;
                    }
                }
            }
            Some(())
        });
        if opened.is_some() {
            return Ok(Some((
                Open {
                    slot: worker.slot(),
                    nr,
                },
                extents,
            )));
        }
        for want in wants.iter().flatten() {
            let rights = want.operand.rights;
            let mut from = want.pages.start;
            while let Err(missing) = want.space.extent(&(from..want.pages.end), rights) {
                if launch.is_stopping() {
                    return Err(DeviceFault::new(
                        want.addr,
                        access_of(rights),
                        DeviceFaultKind::Stuck,
                    ));
                }
                // The first time the pages of other items along with ours: one move for all of the view that lies in the block.
                let pages = missing..want.pages.end;
                let around = if attempt == 0 {
                    want.around.clone()
                } else {
                    pages.clone()
                };
                worker.fetch(want.space, pages, around, rights, attempt)?;
                // On to the next block; what was lost again meanwhile is the next attempt's.
                from = (missing / PAGES_PER_BLOCK + 1) * PAGES_PER_BLOCK;
                if from >= want.pages.end {
                    break;
                }
            }
        }
    }
    Ok(None)
}

/// Aligned for any element.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE_SIZE]);

/// A worker's buffers for spans that lie partly in the window and partly in place.
#[derive(Default)]
pub(crate) struct Bounce([Buffer; MAX_VIEWS]);

#[derive(Default)]
struct Buffer {
    pages: Vec<Page>,
    /// One bit per page of the span: whether it is at its host address.
    on_host: Vec<u64>,
    /// Whether a span of this view has been bounced, or was about to be.
    wanted: bool,
}

impl Bounce {
    /// Makes room for view `v`, before anything is published: nothing is allocated while spans are held.
    fn make_room(&mut self, v: usize, want: &Want<'_>) {
        let buffer = &mut self.0[v];
        buffer.on_host.resize(want.pages.len().div_ceil(64), 0);
        if buffer.wanted && buffer.pages.len() < want.pages.len() {
            buffer.pages.resize(want.pages.len(), Page([0; PAGE_SIZE]));
        }
    }

    /// Notes where each page is, while the span is published. `None` if one has gone, or there was no room to bounce the span.
    fn note_places(&mut self, v: usize, want: &Want<'_>) -> Option<()> {
        let buffer = &mut self.0[v];
        buffer.wanted = true;
        if buffer.pages.len() < want.pages.len() {
            return None;
        }
        want.space
            .places(&want.pages, want.operand.rights, &mut buffer.on_host)
            .ok()
            .map(drop)
    }

    /// Copies the span's bytes into the buffer page by page, holding one page at a time, and says where they are.
    fn gather_piecewise(
        &mut self,
        v: usize,
        want: &Want<'_>,
        worker: &Worker,
        launch: &Launch,
    ) -> Result<usize, DeviceFault> {
        let buffer = &mut self.0[v];
        buffer.wanted = true;
        self.make_room(v, want);
        let (addr, copies) = self.copies(v, want);
        for ((host, len), copy) in want.parts().zip(copies) {
            with_page(want, host, worker, Some(launch), |device| {
                let (from, to) = (
                    with_exposed_provenance::<u8>(device),
                    with_exposed_provenance_mut::<u8>(copy),
                );
                // SAFETY: as in `gather`, with the page held by its own span.
                unsafe { copy_nonoverlapping(from, to, len) };
            })?;
        }
        Ok(addr)
    }

    /// Copies the buffer's bytes back page by page.
    fn scatter_piecewise(
        &mut self,
        v: usize,
        want: &Want<'_>,
        worker: &Worker,
    ) -> Result<(), DeviceFault> {
        let (_, copies) = self.copies(v, want);
        for ((host, len), copy) in want.parts().zip(copies) {
            with_page(want, host, worker, None, |device| {
                let (from, to) = (
                    with_exposed_provenance::<u8>(copy),
                    with_exposed_provenance_mut::<u8>(device),
                );
                // SAFETY: as in `scatter`, with the page held by its own span.
                unsafe { copy_nonoverlapping(from, to, len) };
            })?;
        }
        Ok(())
    }

    /// The address of the span's copy, and of the copy of each of its parts.
    fn copies(
        &mut self,
        v: usize,
        want: &Want<'_>,
    ) -> (usize, impl Iterator<Item = usize> + use<>) {
        let base = self.0[v].pages.as_mut_ptr().expose_provenance();
        let first = base + want.addr % PAGE_SIZE;
        let nr = want.pages.len();
        (
            first,
            (0..nr).map(move |i| if i == 0 { first } else { base + i * PAGE_SIZE }),
        )
    }

    /// The address of the span's copy, and for each part of the span: where it is for the device, where in the copy, and its length.
    fn parts(
        &mut self,
        v: usize,
        want: &Want<'_>,
    ) -> (usize, impl Iterator<Item = (usize, usize, usize)>) {
        let (addr, copies) = self.copies(v, want);
        let on_host = &self.0[v].on_host;
        let parts = want
            .parts()
            .zip(copies)
            .enumerate()
            .map(move |(i, ((host, len), copy))| {
                let place = if on_host[i / 64] >> (i % 64) & 1 == 1 {
                    Place::Host
                } else {
                    Place::Window
                };
                (
                    host.wrapping_add_signed(want.space.offset(place)),
                    copy,
                    len,
                )
            });
        (addr, parts)
    }

    /// Copies the span's bytes into the buffer, and says where they are.
    fn gather(&mut self, v: usize, want: &Want<'_>) -> usize {
        let (addr, parts) = self.parts(v, want);
        for (device, copy, len) in parts {
            let (from, to) = (
                with_exposed_provenance::<u8>(device),
                with_exposed_provenance_mut::<u8>(copy),
            );
            // SAFETY: the device's bytes are valid while the span is open, and nobody writes them: the view borrows them. The buffer has
            // a page for each page of the span, and is this worker's own.
            unsafe { copy_nonoverlapping(from, to, len) };
        }
        addr
    }

    /// Copies the buffer's bytes back.
    fn scatter(&mut self, v: usize, want: &Want<'_>) {
        let (_, parts) = self.parts(v, want);
        for (device, copy, len) in parts {
            let (from, to) = (
                with_exposed_provenance::<u8>(copy),
                with_exposed_provenance_mut::<u8>(device),
            );
            // SAFETY: as in `gather`; the view is mutable, so its chunk is this item's alone.
            unsafe { copy_nonoverlapping(from, to, len) };
        }
    }
}

/// Calls `f` with the device's address of host address `host`, whose page stays there during the call. Gives up early if `launch` stops.
fn with_page(
    want: &Want<'_>,
    host: usize,
    worker: &Worker,
    launch: Option<&Launch>,
    f: impl FnOnce(usize),
) -> Result<(), DeviceFault> {
    let rights = want.operand.rights;
    let page = want.space.pages(host, 1);
    let spans = [(want.space.host_pages(&page), rights)];
    for attempt in 0.. {
        worker.wait_while_paused();
        let place = || {
            if worker.is_paused() {
                return None;
            }
            want.space.place(page.start, rights)
        };
        if let Some(place) = worker.slot().try_open(0, &spans, place) {
            let open = Open {
                slot: worker.slot(),
                nr: 1,
            };
            f(host.wrapping_add_signed(want.space.offset(place)));
            drop(open);
            return Ok(());
        }
        if launch.is_some_and(Launch::is_stopping) {
            return Err(DeviceFault::new(
                host,
                access_of(rights),
                DeviceFaultKind::Stuck,
            ));
        }
        worker.fetch(want.space, page.clone(), page.clone(), rights, attempt)?;
    }
    unreachable!("the loop ends by returning")
}
