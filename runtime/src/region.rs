//! [`Region`]: one mirrored range.
//!
//! A region covers the bytes of a slice. Only the pages lying *wholly* inside it, its *body*, are registered and move;
//! the two partial pages at its ends, the *edges*, stay where they are, for a neighbour on the heap lives in them too.
//!
//! Pages are counted from the region's *base*, its address rounded down to a block (2 MiB), so that page `i` of block
//! `b` lies at `base + b * 2 MiB + i * 4 KiB` for the CPU, and at the same distance from a window's base for a device.

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PAGES_PER_BLOCK, PageRange};
use crate::block::{Block, BlockState, DeviceId, MAX_DEVICES, OnRead};
use crate::door::Role;
use crate::error::{Error, ErrorKind, Result};
use crate::mapped::AnyMapped;
use crate::mask::PageMask;
use crate::movement::MAX_BLOCKS_AT_ONCE;
use crate::notifier::Hub;
use crate::options::Options;
use crate::space::{AddressSpace, Door, Gated, Inside, let_copiers_go_on};
use crate::stats::{Counters, Stats};
use crate::sync::{Deadline, Mutex, MutexGuard, PATIENCE};
use crate::sys::arc::{MapArc, MapSlice};
use crate::sys::mmap::MapArray;

/// How the pages of a region reach a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RegionKind {
    /// Registered with userfaultfd: pages move by fault, both ways.
    Managed,
    /// Memory that cannot be registered or moved: devices access it at the host's address.
    InPlace,
    /// An input that nobody writes while it lives: copied into windows, never registered.
    Input,
}

/// The devices that map a region, read on the fault path.
pub(crate) type DeviceTable = [Option<MapArc<dyn AnyMapped>>; MAX_DEVICES];

/// One mirrored range. See the [module](self).
pub(crate) struct Region {
    id: u64,
    addr: usize,
    len_bytes: usize,
    base: usize,
    body: Option<PageRange>,
    kind: RegionKind,
    writable: bool,
    door: &'static Door,
    hub: Hub,
    blocks: MapArray<Block>,
    devices: Gated<DeviceTable>,
    options: Options,
    read_mostly: AtomicBool,
    /// Launches in progress on some device: while there are any, a CPU read duplicates instead of migrating home.
    uses: AtomicU32,
    /// Faults that wait outside the gate and still refer to the region; it is not freed before they are gone.
    in_flight: AtomicU32,
    /// The mirror is going: no page goes to a device any more.
    closing: AtomicBool,
    /// Whether children of a fork are kept from the body, and given it: from when it is registered until it no longer is. Before and after
    /// that it is part of whatever mapping it lies in. Written and read under the fork bracket.
    shielded: AtomicBool,
    /// Some block may have severed pages.
    has_severed: AtomicBool,
    /// The device whose launches write the edges' copies, and how many of them there are.
    edge_writers: Mutex<(Option<DeviceId>, u32)>,
    pins: Mutex<Pins>,
    /// Held while the runtime pins pages for its own ends, and to unpin what the application has pinned.
    pins_of_ours: Mutex<()>,
    has_displacements: AtomicBool,
    /// In the order in which they came: where two overlap the later one is right.
    displacements: Mutex<MapSlice<Displacement>>,
    counters: Counters,
}

/// Part of a region that `mremap` has moved, by its original address.
#[derive(Clone, Copy, Debug)]
struct Displacement {
    from: PageRange,
    to: usize,
}

/// Page ranges under a pin. A handful at most: a list is enough.
#[derive(Debug, Default)]
struct Pins {
    ranges: Vec<Range<usize>>,
}

impl Region {
    pub(crate) fn new(
        addr: usize,
        len_bytes: usize,
        kind: RegionKind,
        writable: bool,
        door: &'static Door,
        options: &Options,
    ) -> Result<MapArc<Self>> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let no_memory = |errno| {
            Error::new("mirror", ErrorKind::OutOfMemory)
                .at(addr)
                .errno(errno)
        };
        let base = addr & !(BLOCK_SIZE - 1);
        let nr_blocks = (addr + len_bytes - base).div_ceil(BLOCK_SIZE);
        let region = Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            addr,
            len_bytes,
            base,
            body: PageRange::inside(addr, len_bytes),
            kind,
            writable,
            door,
            hub: Hub::new(),
            blocks: MapArray::zeroed(nr_blocks.max(1))
                .map_err(|e| no_memory(e.raw_os_error().unwrap_or(libc::ENOMEM)))?,
            devices: Gated::new([const { None }; MAX_DEVICES]).map_err(no_memory)?,
            options: options.clone(),
            read_mostly: AtomicBool::new(options.read_mostly),
            uses: AtomicU32::new(0),
            in_flight: AtomicU32::new(0),
            closing: AtomicBool::new(false),
            shielded: AtomicBool::new(false),
            has_severed: AtomicBool::new(false),
            edge_writers: Mutex::new((None, 0)),
            pins: Mutex::new(Pins::default()),
            pins_of_ours: Mutex::new(()),
            has_displacements: AtomicBool::new(false),
            displacements: Mutex::new(MapSlice::empty()),
            counters: Counters::default(),
        };
        MapArc::new(region).map_err(no_memory)
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn addr(&self) -> usize {
        self.addr
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    pub(crate) fn end(&self) -> usize {
        self.addr + self.len_bytes
    }

    /// The block-aligned address that page indices count from.
    pub(crate) fn base(&self) -> usize {
        self.base
    }

    /// The pages wholly inside the range, if there are any.
    pub(crate) fn body(&self) -> Option<PageRange> {
        self.body
    }

    /// The bytes that the kernel and other regions know nothing of: the edges of a body that is registered, all of anything else.
    pub(crate) fn outside_places(&self) -> [Range<usize>; 2] {
        match self.body.filter(|_| self.kind == RegionKind::Managed) {
            Some(body) => [self.addr..body.start(), body.end()..self.end()],
            None => [self.addr..self.end(), self.end()..self.end()],
        }
    }

    pub(crate) fn kind(&self) -> RegionKind {
        self.kind
    }

    /// Whether devices may write through this region at all.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    pub(crate) fn door(&self) -> &'static Door {
        self.door
    }

    pub(crate) fn hub(&self) -> &Hub {
        &self.hub
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    /// Pages that one fault moves at most: a power of two up to a block.
    pub(crate) fn granule(&self) -> usize {
        self.options.granule.pages()
    }

    pub(crate) fn nr_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Address of page `page` of block `block`.
    pub(crate) fn addr_of(&self, block: usize, page: usize) -> usize {
        self.base + block * BLOCK_SIZE + page * PAGE_SIZE
    }

    /// Where the CPU finds page `page` of block `block`: at its address, or where `mremap` has moved it.
    pub(crate) fn host_addr_of(&self, block: usize, page: usize) -> usize {
        let addr = self.addr_of(block, page);
        if !self.has_displacements.load(Ordering::Relaxed) {
            return addr;
        }
        let moved = self.displacements.lock();
        moved
            .iter()
            .rev()
            .find(|d| d.from.contains_addr(addr))
            .map_or(addr, |d| addr - d.from.start() + d.to)
    }

    /// Records that the kernel moved `from`, an original address, to `to`. `Err` gives the errno: there is no memory to remember it.
    pub(crate) fn displace(&self, from: PageRange, to: usize) -> Result<(), i32> {
        let mut moved = self.displacements.lock();
        // What lies wholly in `from` has moved on: only the newest place counts.
        let kept = moved
            .iter()
            .filter(|d| d.from.intersect(from) != Some(d.from));
        let displacement = Displacement { from, to };
        *moved = MapSlice::collect(kept.copied().chain([displacement]))?;
        // Relaxed: under the closed gate, and read inside it.
        self.has_displacements.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Block and page within it of `addr`, which lies in the range.
    pub(crate) fn locate(&self, addr: usize) -> (usize, usize) {
        let page = (addr - self.base) / PAGE_SIZE;
        (page / PAGES_PER_BLOCK, page % PAGES_PER_BLOCK)
    }

    /// Whether every page of `block` belongs to the body, as of all blocks but the first and the last.
    #[inline]
    pub(crate) fn is_whole(&self, block: usize) -> bool {
        let start = self.base + block * BLOCK_SIZE;
        self.body
            .is_some_and(|body| body.start() <= start && start + BLOCK_SIZE <= body.end())
    }

    /// The pages of `block` that belong to the body.
    pub(crate) fn body_mask(&self, block: usize) -> PageMask {
        let Some(body) = self.body else {
            return PageMask::EMPTY;
        };
        let first = (body.start() - self.base) / PAGE_SIZE;
        let end = (body.end() - self.base) / PAGE_SIZE;
        let origin = block * PAGES_PER_BLOCK;
        if first <= origin && end >= origin + PAGES_PER_BLOCK {
            return PageMask::FULL;
        }
        let clip = |page: usize| page.clamp(origin, origin + PAGES_PER_BLOCK) - origin;
        PageMask::range(clip(first)..clip(end))
    }

    /// The pages of `block` that hold bytes of the range: the body's, and the edges.
    pub(crate) fn cover_mask(&self, block: usize) -> PageMask {
        let first = (self.addr - self.base) / PAGE_SIZE;
        let end = (self.end() - self.base).div_ceil(PAGE_SIZE);
        let origin = block * PAGES_PER_BLOCK;
        let clip = |page: usize| page.clamp(origin, origin + PAGES_PER_BLOCK) - origin;
        PageMask::range(clip(first)..clip(end))
    }

    /// Byte addresses of the pages `pages` of `block`, as an interval of the hub.
    #[inline]
    pub(crate) fn interval(&self, block: usize, pages: Range<usize>) -> crate::notifier::Interval {
        crate::notifier::Interval::new(
            self.addr_of(block, pages.start) as u64,
            self.addr_of(block, pages.end) as u64,
        )
    }

    /// The block's directory, locked. Taken inside the gate.
    #[inline]
    pub(crate) fn lock_block(&self, block: usize) -> MutexGuard<'_, BlockState> {
        self.try_lock_block(block)
            .unwrap_or_else(|| self.lock_busy_block(block))
    }

    /// The holder may be at a copy that waits for the monitor, which may be who waits here: see `sync/copiers.rs`.
    #[cold]
    fn lock_busy_block(&self, block: usize) -> MutexGuard<'_, BlockState> {
        let lock = &self.blocks[block];
        if !self.door().is_transparent() {
            return lock.lock();
        }
        loop {
            if let Some(locked) = lock.lock_until(Deadline::after(PATIENCE)) {
                return locked;
            }
            let_copiers_go_on();
        }
    }

    /// Host memory of the body's of which the kernel was to forget part: what has not left, as far as one knows, is registered as before.
    pub(crate) fn register_again(&self, pages: Option<PageRange>) {
        if let Some(pages) = pages.filter(|_| !AddressSpace::global().is_changing()) {
            // What stays unregistered, because this fails or was not tried, is served in place: it cannot be protected.
            let _ = self.door().register(pages, Role::Body);
        }
    }

    #[inline]
    pub(crate) fn try_lock_block(&self, block: usize) -> Option<MutexGuard<'_, BlockState>> {
        self.blocks[block].try_lock()
    }

    /// The directories of whole blocks, from the first of `blocks` on, locked: as many as nobody else has and `takes` says yes to, up to
    /// what one movement is to take. Tried, not waited for (hazards W3).
    pub(crate) fn try_lock_blocks(
        &self,
        blocks: Range<usize>,
        mut takes: impl FnMut(&mut BlockState) -> bool,
    ) -> [Option<MutexGuard<'_, BlockState>>; MAX_BLOCKS_AT_ONCE] {
        let mut states = [const { None }; MAX_BLOCKS_AT_ONCE];
        for (slot, block) in states.iter_mut().zip(blocks) {
            let state = self.try_lock_block(block).filter(|_| self.is_whole(block));
            *slot = state.and_then(|mut state| takes(&mut state).then_some(state));
            if slot.is_none() {
                break;
            }
        }
        states
    }

    /// The devices that map this region.
    pub(crate) fn devices<'g>(&'g self, gate: &'g impl Inside) -> &'g DeviceTable {
        self.devices.load(gate)
    }

    pub(crate) fn devices_cell(&self) -> &Gated<DeviceTable> {
        &self.devices
    }

    /// What a device read of a page that only the CPU holds does.
    #[inline]
    pub(crate) fn on_read(&self) -> OnRead {
        if self.read_mostly.load(Ordering::Relaxed) {
            OnRead::Duplicate
        } else {
            OnRead::Migrate
        }
    }

    pub(crate) fn set_read_mostly(&self, read_mostly: bool) {
        self.read_mostly.store(read_mostly, Ordering::Relaxed);
    }

    /// Whether some launch is in progress on this region.
    pub(crate) fn in_use(&self) -> bool {
        self.uses.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn begin_use(&self) {
        self.uses.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn end_use(&self) {
        self.uses.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether forks see to its body: it is registered. Under the fork bracket.
    pub(crate) fn is_shielded(&self) -> bool {
        // Relaxed, like the store: the fork bracket orders them.
        self.shielded.load(Ordering::Relaxed)
    }

    pub(crate) fn set_shielded(&self, shielded: bool) {
        self.shielded.store(shielded, Ordering::Relaxed);
    }

    /// From here on no round moves a page to a device. Complete after a grace period of the gate.
    pub(crate) fn set_closing(&self) {
        // SeqCst: with the gate's, as `forking` of the address space.
        self.closing.store(true, Ordering::SeqCst);
    }

    /// Whether the mirror is going. Inside the gate.
    #[inline]
    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst)
    }

    /// A block has severed pages: after it was marked.
    pub(crate) fn set_has_severed(&self) {
        // Relaxed: where the block's lock does not order it, the next look sees it.
        self.has_severed.store(true, Ordering::Relaxed);
    }

    /// Whether some block may have severed pages; who asks looks at all blocks, and sets it again if one still has.
    pub(crate) fn take_has_severed(&self) -> bool {
        self.has_severed.load(Ordering::Relaxed) && self.has_severed.swap(false, Ordering::Relaxed)
    }

    /// Whether some page is with devices alone.
    pub(crate) fn has_away(&self) -> bool {
        (0..self.nr_blocks()).any(|block| !self.lock_block(block).away().is_empty())
    }

    /// Who writes copies of the edges: one device at a time, or the later copy back would undo the earlier one.
    pub(crate) fn edge_writers(&self) -> MutexGuard<'_, (Option<DeviceId>, u32)> {
        self.edge_writers.lock()
    }

    /// Counts a fault that will refer to the region outside the gate. Inside the gate only.
    pub(crate) fn enter_flight(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// The counterpart; the caller's last use of the region. Release pairs with the Acquire of `wait_landed`.
    pub(crate) fn leave_flight(&self) {
        self.in_flight.fetch_sub(1, Ordering::Release);
    }

    /// Waits until no fault refers to the region any more. After it was unpublished and a grace period has passed.
    pub(crate) fn wait_landed(&self) {
        while self.in_flight.load(Ordering::Acquire) != 0 {
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    pub(crate) fn pins_of_ours(&self) -> &Mutex<()> {
        &self.pins_of_ours
    }

    /// Records a pin of the pages `pages` (from the base). The caller marks the blocks.
    pub(crate) fn add_pin(&self, pages: Range<usize>) {
        self.pins.lock().ranges.push(pages);
    }

    /// Forgets one pin of `pages`; gives the pages that no other pin covers to `unpinned`, as runs.
    pub(crate) fn remove_pin(&self, pages: &Range<usize>, mut unpinned: impl FnMut(Range<usize>)) {
        let mut pins = self.pins.lock();
        if let Some(at) = pins.ranges.iter().position(|r| r == pages) {
            pins.ranges.swap_remove(at);
        }
        let mut at = pages.start;
        while at < pages.end {
            let covering = pins.ranges.iter().find(|r| r.contains(&at));
            if let Some(range) = covering {
                at = range.end;
                continue;
            }
            let next = pins
                .ranges
                .iter()
                .map(|r| r.start)
                .filter(|&s| s > at)
                .min()
                .unwrap_or(pages.end);
            let end = next.min(pages.end);
            unpinned(at..end);
            at = end;
        }
    }

    /// Totals of this region and of what its devices did to it. Waits for faults in progress: a thread is woken by the
    /// system call that serves it, a moment before its fault is counted.
    pub(crate) fn stats(&self, gate: &impl Inside) -> Stats {
        debug_assert!(
            crate::sys::signal::async_signals_blocked(),
            "block locks are taken with signals masked (hazards S1)"
        );
        // In a forked child there are none, and who had a block locked is not there.
        if !self.door.is_disowned() {
            self.blocks.iter().for_each(|block| drop(block.lock()));
        }
        let mut stats = self.counters.snapshot();
        for mapped in self.devices(gate).iter().flatten() {
            stats += mapped.counters().snapshot();
        }
        stats
    }

    /// The device of slot `id`, if it maps this region.
    pub(crate) fn device<'g>(
        &'g self,
        gate: &'g impl Inside,
        id: DeviceId,
    ) -> Option<&'g dyn AnyMapped> {
        self.devices(gate)[id.index()].as_deref()
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region")
            .field("id", &self.id)
            .field("addr", &format_args!("{:#x}", self.addr))
            .field("len_bytes", &self.len_bytes)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}
