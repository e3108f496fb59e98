//! Element accesses: a lane, what an element kernel gets from its worker.
//!
//! # From an index to a byte
//!
//! 1. *Hit*: the worker publishes the access, finds the page in its cache under the flush generation of now, makes the access and
//!    withdraws. No lock, no read-modify-write, no fence but the compiler's ([`Slot::access`](crate::shootdown::Slot::access)).
//! 2. *Walk*: the page has a translation in the device page table, and the cache did not know, or a shootdown has flushed it.
//! 3. *Far fault*: it has none. The worker leaves element mode, runs a round of the range protocol (or waits for another
//!    worker that is running it), and starts over.
//!
//! An element that lies across pages needs all of them at once and does not go through the cache: it opens a span.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use bytemuck::Pod;
use svm::addr::PAGE_SIZE;
use svm::{Access, DeviceFault, DeviceFaultKind, Ptr};

use crate::cache::Entry;
use crate::launch::{Launch, Operand};
use crate::ops::{Load, Op, Store, rmw};
use crate::shootdown::{Generation, Rights, STRADDLE, Slot};
use crate::space::Space;
use crate::sync::{AtomicU64, Ordering, compiler_fence, light_fence};
use crate::table::Place;
use crate::view::MAX_VIEWS;
use crate::words::{self, Atomic};
use crate::worker::Worker;

/// What an access to one region needs at hand.
#[derive(Clone, Copy)]
pub(crate) struct Reach<'s> {
    slot: &'s Slot,
    generation: &'s AtomicU64,
    /// The region's part of the cache.
    cached: &'s [Entry],
    /// What to add to a host address, where the page is where it usually is.
    offset: isize,
    space: usize,
}

impl<'s> Reach<'s> {
    pub(crate) fn new(worker: &'s Worker, spaces: &'s [Space], space: usize) -> Reach<'s> {
        Reach {
            slot: worker.slot(),
            generation: worker.generation(),
            cached: worker.cache().part(space, spaces.len()),
            offset: spaces[space].offset(spaces[space].usual_place()),
            space,
        }
    }

    #[inline(always)]
    fn entry(self, host_page: u64) -> &'s Entry {
        // A part is a power of two.
        &self.cached[host_page as usize & (self.cached.len() - 1)]
    }
}

/// One of the launch's views, for pointers to lead into.
#[derive(Clone, Copy)]
struct Target<'s> {
    addr: usize,
    /// 0 for an argument that is no view.
    len_bytes: usize,
    rights: Rights,
    reach: Reach<'s>,
}

/// What an element kernel gets from its worker, valid inside the call: follows pointers, and serves the launch's handles.
pub struct Lane<'s> {
    pub(crate) worker: &'s Worker,
    launch: &'s Launch,
    pub(crate) views: &'s [Option<Operand>],
    pub(crate) spaces: &'s [Space],
    targets: [Option<Target<'s>>; MAX_VIEWS],
    hits: Cell<u64>,
    misses: Cell<u64>,
}

impl fmt::Debug for Lane<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane")
            .field("worker", &self.worker.index())
            .finish_non_exhaustive()
    }
}

impl<'s> Lane<'s> {
    pub(crate) fn new(
        worker: &'s Worker,
        launch: &'s Launch,
        views: &'s [Option<Operand>],
        spaces: &'s [Space],
    ) -> Lane<'s> {
        let mut targets = [None; MAX_VIEWS];
        for (target, view) in targets.iter_mut().zip(views.iter().flatten()) {
            *target = Some(Target {
                addr: view.addr,
                len_bytes: view.len_bytes,
                rights: view.rights,
                reach: Reach::new(worker, spaces, view.space),
            });
        }
        Lane {
            worker,
            launch,
            views,
            spaces,
            targets,
            hits: Cell::new(0),
            misses: Cell::new(0),
        }
    }

    /// Adds what this lane looked up to the worker's counters.
    pub(crate) fn flush_counts(&self) {
        self.worker
            .counters()
            .looked_up(self.hits.take(), self.misses.take());
    }

    /// Number of the worker that runs this lane, from 0.
    #[must_use]
    pub fn worker(&self) -> usize {
        self.worker.index()
    }

    /// Follows a pointer for a load. It may lead anywhere in the launch's views, to whatever type lies there.
    ///
    /// # Errors
    ///
    /// [`OutOfViews`](DeviceFaultKind::OutOfViews) with the address, if the value does not lie wholly in one of the launch's
    /// views or is not aligned; or what keeps its pages from coming.
    #[inline]
    pub fn load<T: Pod>(&self, ptr: Ptr<T>) -> Result<T, DeviceFault> {
        let reach = self.find::<T>(ptr, Rights::Read)?;
        self.access(reach, ptr.addr(), Load(PhantomData))
    }

    /// Follows a pointer for a store.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load); and [`Protection`](DeviceFaultKind::Protection) if it leads to a view that is only read.
    #[inline]
    pub fn store<T: Pod>(&self, ptr: Ptr<T>, value: T) -> Result<(), DeviceFault> {
        let reach = self.find::<T>(ptr, Rights::Write)?;
        self.access(reach, ptr.addr(), Store(value))
    }

    /// Follows a pointer and atomically adds to what it leads to; returns the value before.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    #[inline]
    pub fn fetch_add<T: Atomic>(&self, ptr: Ptr<T>, operand: T) -> Result<T, DeviceFault> {
        let reach = self.find::<T>(ptr, Rights::Write)?;
        self.access(
            reach,
            ptr.addr(),
            rmw::<T, _>(|at| {
                // SAFETY: `access` gives the address of an aligned element that is only accessed atomically.
                unsafe { T::fetch_add(at, operand) }
            }),
        )
    }

    /// Follows a pointer and replaces what it leads to, if that is `current`. `Ok(Err(value))` says what was there instead.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store).
    #[inline]
    pub fn compare_exchange<T: Atomic>(
        &self,
        ptr: Ptr<T>,
        current: T,
        new: T,
    ) -> Result<Result<T, T>, DeviceFault> {
        let reach = self.find::<T>(ptr, Rights::Write)?;
        self.access(
            reach,
            ptr.addr(),
            rmw::<T, _>(|at| {
                // SAFETY: `access` gives the address of an aligned element that is only accessed atomically.
                unsafe { T::compare_exchange(at, current, new) }
            }),
        )
    }

    /// Loads from anywhere in the process's memory. Inside the launch's views it is [`load`](Self::load); elsewhere the value is
    /// read in place, as a CPU thread would.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load), inside the views.
    ///
    /// # Safety
    ///
    /// The pointer is aligned and leads to a value that is mapped, lives for the whole call, and is written only atomically by
    /// others meanwhile, in words of `T`'s alignment.
    #[inline]
    pub unsafe fn load_anywhere<T: Pod>(&self, ptr: Ptr<T>) -> Result<T, DeviceFault> {
        match self.find::<T>(ptr, Rights::Read) {
            Ok(reach) => self.access(reach, ptr.addr(), Load(PhantomData)),
            // SAFETY: by contract.
            Err(_) => Ok(unsafe { words::load(|offset| ptr.addr() + offset) }),
        }
    }

    /// Stores anywhere in the process's memory, as [`load_anywhere`](Self::load_anywhere) loads.
    ///
    /// # Errors
    ///
    /// As [`store`](Self::store), inside the views.
    ///
    /// # Safety
    ///
    /// As [`load_anywhere`](Self::load_anywhere); and the value may be written: no reference to it is alive.
    #[inline]
    pub unsafe fn store_anywhere<T: Pod>(&self, ptr: Ptr<T>, value: T) -> Result<(), DeviceFault> {
        match self.find::<T>(ptr, Rights::Write) {
            Ok(reach) => self.access(reach, ptr.addr(), Store(value)),
            Err(fault) if fault.kind == DeviceFaultKind::Protection => Err(fault),
            Err(_) => {
                // SAFETY: by contract.
                unsafe { words::store(|offset| ptr.addr() + offset, value) };
                Ok(())
            }
        }
    }

    /// The view that the value lies wholly in, if it permits the access.
    #[inline(always)]
    fn find<T>(&self, ptr: Ptr<T>, rights: Rights) -> Result<Reach<'s>, DeviceFault> {
        let addr = ptr.addr();
        if addr.is_multiple_of(align_of::<T>()) {
            for target in &self.targets {
                let Some(target) = target else { break };
                let offset = addr.wrapping_sub(target.addr);
                if offset < target.len_bytes
                    && size_of::<T>() <= target.len_bytes - offset
                    && (rights == Rights::Read || target.rights == Rights::Write)
                {
                    return Ok(target.reach);
                }
            }
        }
        Err(self.stray(addr, rights))
    }

    /// Why a pointer leads to no view that permits the access.
    #[cold]
    fn stray(&self, addr: usize, rights: Rights) -> DeviceFault {
        let in_view = |t: &Target<'_>| addr.wrapping_sub(t.addr) < t.len_bytes;
        let read_only = rights == Rights::Write && self.targets.iter().flatten().any(in_view);
        let kind = if read_only {
            DeviceFaultKind::Protection
        } else {
            DeviceFaultKind::OutOfViews
        };
        DeviceFault::new(addr, access_of(rights), kind)
    }

    /// Ends the kernel here if its launch is over: another item failed, or a span of it outstayed a shootdown (hazards W2).
    fn check_stop(&self, addr: usize, rights: Rights) -> Result<(), DeviceFault> {
        if self.launch.is_stopping() {
            return Err(DeviceFault::new(
                addr,
                access_of(rights),
                DeviceFaultKind::Stuck,
            ));
        }
        Ok(())
    }
}

impl Lane<'_> {
    /// Makes one access to the element at host address `addr`, which lies in a view of this region that permits it.
    #[inline(always)]
    pub(crate) fn access<O: Op>(
        &self,
        reach: Reach<'_>,
        addr: usize,
        op: O,
    ) -> Result<O::Out, DeviceFault> {
        // An element that is one word never lies across pages, which the compiler knows here.
        if O::SIZE == O::WORD || (O::SIZE != 0 && addr % PAGE_SIZE + O::SIZE <= PAGE_SIZE) {
            let host_page = (addr / PAGE_SIZE) as u64;
            let entry = reach.entry(host_page);
            let done = reach.slot.access(
                compiler_fence,
                reach.generation,
                host_page,
                O::RIGHTS,
                |now| {
                    (entry.generation.get() == now && entry.tag(O::RIGHTS) == host_page << 1)
                        .then_some(())
                },
                |()| {
                    let device = addr.wrapping_add_signed(reach.offset);
                    // SAFETY: the element lies in this page, inside a view of the launch, which keeps it mapped; the translation is valid until
                    // the access is withdrawn (shootdown S1-S5), and the compiler's fence suffices, as the tag is not rare. Elements are
                    // only accessed by atomic words of their alignment: spans of this memory would need the exclusive borrow that
                    // this launch holds.
                    unsafe { op.at(|o| device + o) }
                },
            );
            if let Some(out) = done {
                self.hits.set(self.hits.get() + 1);
                return Ok(out);
            }
        }
        self.access_slow(reach, addr, op)
    }

    /// All but a usual hit.
    #[cold]
    #[inline(never)]
    fn access_slow<O: Op>(
        &self,
        reach: Reach<'_>,
        addr: usize,
        op: O,
    ) -> Result<O::Out, DeviceFault> {
        if O::SIZE == 0 {
            // SAFETY: there is no word to find.
            return Ok(unsafe { op.at(|_| addr) });
        }
        if addr % PAGE_SIZE + O::SIZE > PAGE_SIZE {
            return self.access_across_pages(reach, addr, op);
        }
        let host_page = (addr / PAGE_SIZE) as u64;
        let counter = |attempt| {
            if attempt == 0 {
                &self.hits
            } else {
                &self.misses
            }
        };
        for attempt in 0.. {
            let entry = reach.entry(host_page);
            let done = reach.slot.access(
                light_fence,
                reach.generation,
                host_page,
                O::RIGHTS,
                |now| {
                    let known =
                        entry.generation.get() == now && entry.tag(O::RIGHTS) >> 1 == host_page;
                    known.then(|| entry.offset.get())
                },
                |offset| {
                    let device = addr.wrapping_add_signed(offset);
                    // SAFETY: as in `access`, with a fence that suffices always.
                    unsafe { op.at(|o| device + o) }
                },
            );
            if let Some(out) = done {
                counter(attempt).set(counter(attempt).get() + 1);
                return Ok(out);
            }
            self.miss(reach, host_page, O::RIGHTS, attempt)?;
        }
        unreachable!("the loop ends by returning")
    }

    /// Fills the cache entry of a page, by a walk or after a far fault.
    fn miss(
        &self,
        reach: Reach<'_>,
        host_page: u64,
        rights: Rights,
        attempt: u32,
    ) -> Result<(), DeviceFault> {
        let region = &self.spaces[reach.space];
        let page = region.page(host_page);
        for round in 0.. {
            self.check_stop(region.addr_of(page), rights)?;
            // S5: the generation is read before the walk. Acquire: as in `Slot::access`.
            let generation = reach.generation.load(Ordering::Acquire);
            if Generation::is_paused(generation) {
                reach.slot.leave_element_mode();
                self.worker.wait_while_paused();
                reach.slot.enter_element_mode();
                continue;
            }
            if let Some(place) = region.place(page, rights) {
                let entry = reach.entry(host_page);
                let rare = place != region.usual_place() || !svm::barriers_are_asymmetric();
                let tag = |rights| {
                    let there = region.place(page, rights) == Some(place);
                    if there {
                        host_page << 1 | u64::from(rare)
                    } else {
                        0
                    }
                };
                entry.read.set(tag(Rights::Read));
                entry.write.set(tag(Rights::Write));
                entry.offset.set(region.offset(place));
                entry.generation.set(generation);
                return Ok(());
            }
            // W1: nothing of this worker's is published while it waits.
            reach.slot.leave_element_mode();
            let fetched = self.worker.fetch(
                region,
                page..page + 1,
                page..page + 1,
                rights,
                attempt + round,
            );
            reach.slot.enter_element_mode();
            fetched?;
        }
        unreachable!("the loop ends by returning")
    }

    /// An element that lies across pages: all of them are needed at once.
    fn access_across_pages<O: Op>(
        &self,
        reach: Reach<'_>,
        addr: usize,
        op: O,
    ) -> Result<O::Out, DeviceFault> {
        const {
            assert!(
                O::SIZE <= 63 * PAGE_SIZE,
                "an element lies on 64 pages at most"
            );
        };
        let region = &self.spaces[reach.space];
        let pages = region.pages(addr, O::SIZE);
        let spans = [(region.host_pages(&pages), O::RIGHTS)];
        let slot = reach.slot;
        for attempt in 0.. {
            self.check_stop(addr, O::RIGHTS)?;
            let mut missing = pages.start;
            let mut on_host = [0];
            self.worker.wait_while_paused();
            let extent = slot.try_open(STRADDLE, &spans, || {
                if self.worker.is_paused() {
                    return None;
                }
                match region.places(&pages, O::RIGHTS, &mut on_host) {
                    Ok(extent) => Some(extent),
                    Err(page) => {
                        missing = page;
                        None
                    }
                }
            });
            if extent.is_some() {
                // SAFETY: as in `access`; each word lies in one page, and all pages of the element are held by the open span.
                let out = unsafe {
                    op.at(|o| {
                        let host = addr + o;
                        let page = region.page((host / PAGE_SIZE) as u64) - pages.start;
                        let place = if on_host[0] >> page & 1 == 1 {
                            Place::Host
                        } else {
                            Place::Window
                        };
                        host.wrapping_add_signed(region.offset(place))
                    })
                };
                slot.close(STRADDLE, 1);
                return Ok(out);
            }
            slot.leave_element_mode();
            let fetched = self.worker.fetch(
                region,
                missing..pages.end,
                missing..pages.end,
                O::RIGHTS,
                attempt,
            );
            slot.enter_element_mode();
            fetched?;
        }
        unreachable!("the loop ends by returning")
    }
}

pub(crate) fn access_of(rights: Rights) -> Access {
    match rights {
        Rights::Read => Access::Read,
        Rights::Write => Access::Write,
    }
}
