//! One schedule's world: a mirrored range, the devices that map it, the CPUs that touch it, and an oracle.
//!
//! # The oracle
//! Every write puts a number into its page that no page has had before, and every access, by whomever, is one step. So there is a
//! sequential history per page, and an access must find the number that was written last: not one that was lost, not a stale copy's. A
//! discard ([`World::discard`]) makes two histories while it goes on, the doomed one and that of the zeros; when it has returned only the
//! second is left.
//!
//! # What is checked
//! | when | what |
//! |---|---|
//! | at each access | the oracle; a translation to a window leads to a page |
//! | after each operation | the directory is consistent (D2, D3), and says what the page tables say (D1, D4) |
//! | at the end | every page home, device memory accounted for to zero, no anomaly counted |
//! | throughout | no deadlock, which Shuttle reports; no operation takes more tries than [`MAX_TRIES`] |

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PageRange};
use crate::attachment::{AttachOptions, Attachment, attach};
use crate::block::DeviceId;
use crate::device::{
    Device, DeviceLock, Invalidation, Keep, LateAccess, MapInfo, Overrun, WouldBlock,
};
use crate::error::{Access, DeviceFault, DeviceFaultKind, Error};
use crate::kernel::{self, Killed, Outcome, Quirks};
use crate::mapped::{MappedRef, RegionRef};
use crate::mask::PageMask;
use crate::mirror::{Mirror, mirror_raw};
use crate::options::{Delivery, Granule, Options};
use crate::page_bits::PageBits;
use crate::pin::Meanwhile;
use crate::region::Region;
use crate::round::Valid;
use crate::space::AddressSpace;
use crate::sys::arc::MapArc;
use shuttle::thread::JoinHandle;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often an operation of a device may begin anew before it counts as starved.
const MAX_TRIES: usize = 300;

/// Longer than any schedule: a wait that comes to it has hung.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Where the mirrored range lies: far from the program's own memory, at the start of a block.
const BASE: usize = 0x10_0000_0000;

/// Where `mremap` takes pages.
const ELSEWHERE: usize = 0x18_0000_0000;

fn held<T>(lock: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a page's contents may be.
#[derive(Clone, Copy, Debug, Default)]
struct History {
    now: u64,
    /// What it was, and what was made of that, while a discard goes on.
    doomed: Option<u64>,
    /// A discard has ended: what was written meanwhile may have gone with it, or not.
    maybe_zero: bool,
    /// No device may have it any more.
    is_out_of_reach: bool,
}

#[derive(Debug, Default)]
struct Oracle {
    pages: Vec<History>,
    last: u64,
}

static ORACLE: Mutex<Oracle> = Mutex::new(Oracle {
    pages: Vec::new(),
    last: 0,
});

impl History {
    /// The history that `contents` is of, if it is current.
    fn current(&mut self, contents: u64) -> Option<&mut u64> {
        if self.maybe_zero && contents == 0 {
            self.now = 0;
        }
        self.maybe_zero = false;
        if self.doomed.is_some() && contents == 0 {
            self.now = 0;
        }
        if contents == self.now {
            return Some(&mut self.now);
        }
        self.doomed.as_mut().filter(|doomed| **doomed == contents)
    }
}

/// One access of `page` that finds `contents`: checks them, and returns what they are then.
fn witness(who: Who, page: usize, contents: u64, access: Access) -> u64 {
    let mut oracle = held(&ORACLE);
    let oracle = &mut *oracle;
    let history = &mut oracle.pages[page];
    let write = access == Access::Write;
    let value = if write { oracle.last + 1 } else { contents };
    kernel::note_step(
        if write { "WRITES" } else { "READS" },
        BASE + page * PAGE_SIZE,
        Outcome::Value(value),
    );
    assert!(
        !(who == Who::Device && history.is_out_of_reach),
        "page {page}: a device has it after its unmapping has returned"
    );
    let now = history.now;
    let Some(current) = history.current(contents) else {
        panic!("page {page}: {who:?} finds {contents}, and {now} was written last");
    };
    *current = value;
    oracle.last += u64::from(write);
    value
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Cpu,
    Device,
}

/// How a world is made.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) nr_pages: usize,
    pub(crate) nr_devices: usize,
    pub(crate) delivery: Delivery,
    pub(crate) granule: Granule,
    pub(crate) read_mostly: bool,
    /// How long a span may outstay a shootdown.
    pub(crate) span_deadline: Duration,
    /// Pages of memory of each device.
    pub(crate) memory: Option<usize>,
    /// Whether a launch goes on meanwhile: then a load of the CPU shares a device's page instead of taking it.
    pub(crate) in_use: bool,
    pub(crate) quirks: Quirks,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            nr_pages: 2,
            nr_devices: 1,
            delivery: Delivery::Inline,
            granule: Granule::Page,
            read_mostly: false,
            span_deadline: TIMEOUT,
            memory: None,
            in_use: false,
            quirks: Quirks::default(),
        }
    }
}

/// How a device's worker gets at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// `fault_in`; accesses under the device lock.
    Locked,
    /// `fault_in`; accesses in a span, which a shootdown has to wait for.
    Span,
    /// As [`Self::Span`], of a kernel that is in no hurry, on a device that does not wait for it: the span's pages are taken from it,
    /// and its thread is parked at the next touch.
    Late,
    /// `start_update`, `fault`, `end_update`: the token is taken before the block's lock. Accesses under the device lock.
    Update,
    /// As [`Self::Update`], by `snapshot` if that is enough.
    Snapshot,
    /// As [`Self::Update`], by `migrate`.
    Migrate,
}

/// The device.
#[derive(Debug, Default)]
pub(crate) struct ModelDevice {
    lock: DeviceLock,
    paused: AtomicBool,
    nr_spans: AtomicUsize,
}

#[derive(Debug)]
pub(crate) struct Table {
    readable: PageBits,
    writable: PageBits,
    in_place: PageBits,
    /// Open spans: page, whether they write, and whose they are.
    spans: Mutex<Vec<(usize, Access, usize)>>,
}

impl Table {
    fn allows(&self, page: usize, access: Access) -> bool {
        let rights = match access {
            Access::Read => &self.readable,
            Access::Write => &self.writable,
        };
        rights.contains(page, Relaxed)
    }

    fn install(&self, valid: &Valid) {
        self.in_place.install_places(valid);
        self.readable.install(valid, Access::Read);
        self.writable.install(valid, Access::Write);
    }
}

// SAFETY: an access happens under the device lock, which `invalidate` takes, or within a span that is counted under that lock and
// that `quiesced` waits for.
unsafe impl Device for ModelDevice {
    type Table = Table;

    fn map(&self, map: &MapInfo) -> Result<Table, Error> {
        let bits = || PageBits::new(map.nr_pages);
        Ok(Table {
            readable: bits()?,
            writable: bits()?,
            in_place: bits()?,
            spans: Mutex::new(Vec::new()),
        })
    }

    fn lock(&self) -> &DeviceLock {
        &self.lock
    }

    fn invalidate(&self, table: &Table, inv: &Invalidation) -> Result<(), WouldBlock> {
        let _guard = self.lock.lock_for(inv.blocking())?;
        table.writable.remove(inv.block(), inv.pages());
        if inv.keep() == Keep::Nothing {
            table.readable.remove(inv.block(), inv.pages());
        }
        kernel::with(|kernel| {
            kernel.note("invalidate", BASE + inv.bounds().start * PAGE_SIZE, None);
        });
        Ok(())
    }

    fn quiesced(&self, table: &Table, inv: &Invalidation) -> bool {
        kernel::point();
        !held(&table.spans).iter().any(|&(page, access, _)| {
            inv.pages().contains(page) && (inv.keep() == Keep::Nothing || access == Access::Write)
        })
    }

    fn overrun(&self, table: &Table, late: &LateAccess) -> Overrun {
        let mut spans = held(&table.spans);
        let before = spans.len();
        spans.retain(|&(.., thread)| thread != late.thread.as_usize());
        if spans.len() == before {
            return Overrun::Stranger;
        }
        self.nr_spans.fetch_sub(1, Relaxed);
        Overrun::Park
    }

    fn pause(&self) {
        let _guard = self.lock.lock();
        self.paused.store(true, Relaxed);
    }

    fn is_paused(&self) -> bool {
        self.nr_spans.load(Relaxed) == 0
    }

    fn resume(&self) {
        self.paused.store(false, Relaxed);
    }
}

/// See the [module](self).
pub(crate) struct World {
    setup: Setup,
    devices: Mutex<Vec<Arc<Attachment<ModelDevice>>>>,
    mappings: Vec<MappedRef<ModelDevice>>,
    region: MapArc<Region>,
    mirror: Mutex<Option<Mirror<'static, u8>>>,
    /// Where each page is, for the CPU.
    places: Mutex<Vec<usize>>,
}

/// The address space of the schedule before, to be freed when it is the global one no more.
static PREVIOUS: AtomicPtr<AddressSpace> = AtomicPtr::new(std::ptr::null_mut());

impl World {
    /// Boots a machine, mirrors a range, attaches devices and maps the range.
    pub(crate) fn new(setup: Setup) -> Arc<Self> {
        // The next first use makes a new one, as in a forked child.
        AddressSpace::abandon_in_child();
        kernel::boot(setup.quirks);
        *held(&ORACLE) = Oracle {
            pages: vec![History::default(); setup.nr_pages],
            last: 0,
        };
        let range = PageRange::from_pages(BASE, setup.nr_pages).expect("an address");
        kernel::with(|kernel| kernel.map(range));
        let options = Options::new()
            .delivery(setup.delivery)
            .granule(setup.granule)
            .read_mostly(setup.read_mostly);
        let start = std::ptr::without_provenance_mut(BASE);
        // SAFETY: model memory; nothing refers to it.
        let mirror = unsafe { mirror_raw(start, range.len_bytes(), &options) }.expect("a mirror");
        let region = mirror.view().region().region.clone();
        let space = AddressSpace::existing().expect("made just now");
        let before = PREVIOUS.swap(std::ptr::from_ref(space).cast_mut(), Relaxed);
        if !before.is_null() && !std::ptr::eq(before, space) {
            // SAFETY: leaked from a box by the schedule before, all of whose threads have ended; nobody finds it any more.
            drop(unsafe { Box::from_raw(before) });
        }
        let mut attach_options = AttachOptions::new().span_deadline(setup.span_deadline);
        if let Some(pages) = setup.memory {
            attach_options = attach_options.memory_bytes(pages * PAGE_SIZE);
        }
        let devices: Vec<_> = (0..setup.nr_devices)
            .map(|_| {
                let device = attach(ModelDevice::default(), attach_options.clone());
                Arc::new(device.expect("a free slot"))
            })
            .collect();
        let mappings: Vec<_> = devices
            .iter()
            .map(|d| d.map(RegionRef { region: &region }).expect("a window"))
            .collect();
        if setup.in_use {
            region.begin_use();
        }
        let offsets = mappings.iter().map(|mapped: &MappedRef<_>| mapped.offset());
        for (place, name) in
            std::iter::once(0)
                .chain(offsets)
                .zip(["CPU's ", "device 0's ", "device 1's "])
        {
            let at = BASE.wrapping_add_signed(place);
            if let Some(range) = PageRange::from_pages(at, setup.nr_pages) {
                kernel::log().places.push((range, name.to_owned()));
            }
        }
        let places = (0..setup.nr_pages).map(|page| BASE + page * PAGE_SIZE);
        Arc::new(Self {
            devices: Mutex::new(devices),
            mappings,
            region,
            mirror: Mutex::new(Some(mirror)),
            places: Mutex::new(places.collect()),
            setup,
        })
    }

    /// The region: for what no interface of a mirror does.
    pub(crate) fn region(&self) -> &MapArc<Region> {
        &self.region
    }

    pub(crate) fn attachment(&self, device: usize) -> Arc<Attachment<ModelDevice>> {
        held(&self.devices)[device].clone()
    }

    /// Starts a thread that does `work`.
    pub(crate) fn spawn(
        self: &Arc<Self>,
        name: &str,
        work: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> JoinHandle<()> {
        let world = self.clone();
        shuttle::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&world))
            .expect("threads are free")
    }

    /// Starts a CPU.
    pub(crate) fn cpu(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> JoinHandle<()> {
        self.spawn("CPU", work)
    }

    /// Starts a worker of a device.
    pub(crate) fn worker(
        self: &Arc<Self>,
        device: usize,
        style: Style,
        work: impl FnOnce(&mut Worker) + Send + 'static,
    ) -> JoinHandle<()> {
        self.spawn(&format!("device {device}"), move |world| {
            let attachment = world.attachment(device);
            let range = attachment.range().expect("a scratch area");
            work(&mut Worker {
                world: world.clone(),
                attachment: attachment.clone(),
                range,
                device,
                style,
                is_parked: false,
            });
        })
    }

    fn place(&self, page: usize) -> usize {
        held(&self.places)[page]
    }

    /// Where `pages` are, which have not been torn apart.
    fn range(&self, pages: &std::ops::Range<usize>) -> PageRange {
        PageRange::from_pages(self.place(pages.start), pages.len()).expect("an address")
    }

    /// An access of the CPU to memory that may be unmapped meanwhile.
    pub(crate) fn try_access(&self, page: usize, access: Access) {
        let _ = self.access(page, access);
    }

    /// An access of the CPU.
    pub(crate) fn access(&self, page: usize, access: Access) -> Result<(), Killed> {
        let write = access == Access::Write;
        let result = kernel::access(self.place(page), write, |_, contents| {
            witness(Who::Cpu, page, contents, access)
        });
        self.check();
        result
    }

    /// A load of the CPU, which must be served.
    pub(crate) fn read(&self, page: usize) {
        assert_eq!(self.access(page, Access::Read), Ok(()), "a load is killed");
    }

    /// A store of the CPU, or rather a read-modify-write, which must be served.
    pub(crate) fn write(&self, page: usize) {
        assert_eq!(
            self.access(page, Access::Write),
            Ok(()),
            "a store is killed"
        );
    }

    /// `madvise(MADV_DONTNEED)` of pages.
    pub(crate) fn discard(&self, pages: std::ops::Range<usize>) {
        for history in &mut held(&ORACLE).pages[pages.clone()] {
            history.doomed = Some(history.now);
            history.now = 0;
        }
        kernel::madvise_dontneed(self.range(&pages));
        self.heard_of();
        for history in &mut held(&ORACLE).pages[pages] {
            history.doomed = None;
            history.maybe_zero = true;
        }
        self.check();
    }

    /// Through the thread door a device may use a translation for a moment after the call has returned: until its event is applied.
    fn heard_of(&self) {
        if self.setup.delivery == Delivery::Thread {
            AddressSpace::global().settle();
        }
    }

    /// `munmap` of pages.
    pub(crate) fn unmap(&self, pages: std::ops::Range<usize>) {
        kernel::munmap(self.range(&pages));
        self.heard_of();
        for history in &mut held(&ORACLE).pages[pages] {
            history.is_out_of_reach = true;
        }
        self.check();
    }

    /// `mremap` of pages to somewhere else.
    pub(crate) fn remap(&self, pages: std::ops::Range<usize>) {
        kernel::mremap(self.range(&pages), ELSEWHERE);
        for (i, page) in pages.clone().enumerate() {
            held(&self.places)[page] = ELSEWHERE + i * PAGE_SIZE;
        }
        self.heard_of();
        for history in &mut held(&ORACLE).pages[pages] {
            history.is_out_of_reach = true;
        }
        self.check();
    }

    /// Another process has the page too, copy-on-write, until somebody writes it.
    pub(crate) fn share(&self, page: usize) {
        kernel::with(|kernel| kernel.share(self.place(page)));
    }

    /// Pins pages, works on them as a system call would, and lets them go.
    pub(crate) fn with_pinned(&self, pages: std::ops::Range<usize>) {
        let bytes = self.range(&pages);
        let pinned = crate::pin::with_pinned(&self.region, bytes, Meanwhile::InPlace, || {
            for page in pages.clone() {
                // The kernel's own access: it does not fault.
                kernel::touch(self.place(page), true, |_, contents| {
                    witness(Who::Cpu, page, contents, Access::Write)
                });
            }
        });
        assert!(pinned.is_ok(), "a pin fails: {pinned:?}");
        self.check();
    }

    /// A child is made: it must find in its memory what was written last.
    pub(crate) fn fork(&self) {
        crate::sys::process::around_fork(|| {
            kernel::point();
            let range = self.range(&(0..self.setup.nr_pages));
            kernel::fork(range);
            for page in 0..self.setup.nr_pages {
                let there = kernel::with(|kernel| kernel.look(self.place(page)));
                let written = held(&ORACLE).pages[page].now;
                let found = there.map_or(0, |(contents, _)| contents);
                assert_eq!(found, written, "page {page}: what the child finds");
            }
        });
        self.check();
    }

    /// Other memory is mapped over the page `page`: it is the page `self.setup.nr_pages` from then on, and no device's.
    pub(crate) fn replace(&self, page: usize) {
        let place = self.place(page);
        let range = PageRange::from_pages(place, 1).expect("an address");
        kernel::mmap_fixed(range, || {
            held(&ORACLE).pages.push(History::default());
            held(&self.places).push(place);
        });
        held(&ORACLE).pages[page].is_out_of_reach = true;
        self.check();
    }

    /// The page that [`Self::replace`] has made, if it has already.
    pub(crate) fn replacement(&self) -> Option<usize> {
        (held(&self.places).len() > self.setup.nr_pages).then_some(self.setup.nr_pages)
    }

    /// Brings everything home that a device has.
    pub(crate) fn release(&self, device: usize) {
        let released = self.attachment(device).release();
        assert!(released.is_ok(), "the release fails: {released:?}");
        self.check();
    }

    /// Detaches a device whose workers have ended: every page it has comes home.
    pub(crate) fn detach(&self) {
        let device = held(&self.devices).pop().expect("a device");
        let device = Arc::into_inner(device).expect("its workers have ended");
        drop(device);
    }

    /// What the runtime has counted.
    pub(crate) fn stats(&self) -> crate::stats::Stats {
        held(&self.mirror).as_ref().expect("not closed").stats()
    }

    /// Ends the launch that [`Setup::in_use`] began.
    pub(crate) fn end_use(&self) {
        self.region.end_use();
    }

    /// Closes the mirror: every page home.
    pub(crate) fn close(&self) {
        let mirror = held(&self.mirror).take();
        if let Some(mirror) = mirror {
            let closed = mirror.close();
            assert!(closed.is_ok(), "the close fails: {closed:?}");
        }
    }

    /// Whether the directory says what the page tables say, where nobody is changing them.
    pub(crate) fn check(&self) {
        if self.region.is_closing() {
            return;
        }
        let Some(state) = self.region.try_lock_block(0) else {
            return;
        };
        assert!(state.is_consistent(), "the directory: {state:?}");
        kernel::with(|kernel| {
            let body = PageMask::range(0..self.setup.nr_pages);
            let settled = body - state.gone() - state.pending() - state.displaced();
            for page in settled.runs().flatten() {
                let place = BASE + page * PAGE_SIZE;
                // Other memory by now, of which nobody has read yet.
                let host = kernel.look(place).filter(|_| kernel.is_registered(place));
                let mut shared = false;
                for (i, mapped) in self.mappings.iter().enumerate() {
                    let id = DeviceId(u8::try_from(i).unwrap_or(u8::MAX));
                    let window = BASE.wrapping_add_signed(mapped.offset()) + page * PAGE_SIZE;
                    let there = kernel.look(window).is_some();
                    let known = state.resident(id).contains(page);
                    assert_eq!(there, known, "page {page} in the window of {id}: {state:?}");
                    shared |= state.frames(id).contains(page);
                }
                if state.away().contains(page) {
                    assert_eq!(host, None, "page {page} is away, and present");
                } else if let (true, Some((_, protected))) = (shared, host) {
                    assert!(protected, "page {page} is shared, and the CPU may write it");
                }
            }
        });
    }

    /// The end of the schedule: the mirror closed, every page home with what was written last, every device's memory empty.
    pub(crate) fn finish(self: Arc<Self>) {
        self.check();
        let anomalies = held(&self.mirror)
            .as_ref()
            .map_or(0, |mirror| mirror.stats().anomalies);
        assert_eq!(anomalies, 0, "anomalies were counted");
        self.close();
        let nr_pages = held(&self.places).len();
        let first = nr_pages - self.setup.nr_pages;
        for page in first..nr_pages {
            if !kernel::mappings(self.range(&(page..page + 1))).is_empty() {
                self.read(page);
            }
        }
        for device in std::mem::take(&mut *held(&self.devices)) {
            assert_eq!(
                device.resident_bytes(),
                0,
                "device memory is not given back"
            );
            let device = Arc::into_inner(device).expect("its workers have ended");
            drop(device);
        }
        kernel::shut_down();
    }
}

/// One thread of a device.
pub(crate) struct Worker {
    world: Arc<World>,
    attachment: Arc<Attachment<ModelDevice>>,
    range: crate::range::Range<ModelDevice>,
    device: usize,
    style: Style,
    /// It is in a handler that it never leaves: it does nothing any more.
    is_parked: bool,
}

impl Worker {
    /// A load, which must be served.
    pub(crate) fn read(&mut self, page: usize) {
        let done = self.access(page, Access::Read);
        assert!(done.is_ok(), "a device's load fails: {done:?}");
    }

    /// A store, which must be served.
    pub(crate) fn write(&mut self, page: usize) {
        let done = self.access(page, Access::Write);
        assert!(done.is_ok(), "a device's store fails: {done:?}");
    }

    /// A load or store of memory that may go away meanwhile, with the fault that says so.
    pub(crate) fn try_access(&mut self, page: usize, access: Access) {
        if let Err(fault) = self.access(page, access) {
            let expected = [DeviceFaultKind::Unmapped, DeviceFaultKind::Closed];
            assert!(
                expected.contains(&fault.kind),
                "a device's access fails: {fault:?}"
            );
        }
    }

    fn access(&mut self, page: usize, access: Access) -> Result<(), DeviceFault> {
        for attempt in 0..MAX_TRIES {
            if self.is_parked || self.through_table(page, access) {
                self.world.check();
                return Ok(());
            }
            self.fault_in(page..page + 1, access, attempt)?;
        }
        panic!(
            "starved: {MAX_TRIES} faults of one access of device {}",
            self.device
        );
    }

    /// The access, if there is a translation.
    fn through_table(&mut self, page: usize, access: Access) -> bool {
        let mapped = self.world.mappings[self.device].clone();
        let (device, table) = (self.attachment.device(), mapped.table());
        let write = access == Access::Write;
        let guard = loop {
            let guard = device.lock.lock();
            if !device.paused.load(Relaxed) {
                break guard;
            }
            drop(guard);
            std::thread::yield_now();
        };
        if !table.allows(page, access) {
            return false;
        }
        let in_place = table.in_place.contains(page, Relaxed);
        let mut at = BASE + page * PAGE_SIZE;
        if !in_place {
            at = at.wrapping_add_signed(mapped.offset());
        }
        let witness =
            |_: &mut kernel::Kernel, contents| witness(Who::Device, page, contents, access);
        // In place a device's thread is like any other of the process: a store may fault, and is served.
        let touch = || {
            if in_place {
                let is_there = kernel::with(|kernel| kernel.look(at).is_some());
                assert!(is_there, "a translation in place leads to an empty page");
                let done = kernel::access(at, write, witness);
                assert_eq!(done, Ok(()), "an access in place");
            } else {
                kernel::touch(at, write, witness);
            }
        };
        if matches!(self.style, Style::Span | Style::Late) {
            let span = (page, access, kernel::thread_id());
            held(&table.spans).push(span);
            device.nr_spans.fetch_add(1, Relaxed);
            drop(guard);
            // A span outlives the lock: twice, for what is between.
            let late = self.style == Style::Late;
            for _ in 0..if late { 8 } else { 2 } {
                if !late {
                    touch();
                    continue;
                }
                std::thread::sleep(Duration::from_micros(1));
                let touched = kernel::access(at, write, witness);
                if touched == Err(Killed::Parked) {
                    kernel::note_step("is parked", at, Outcome::Done);
                    self.is_parked = true;
                    return true;
                }
                assert_eq!(touched, Ok(()), "an access of a late span");
            }
            let mut spans = held(&table.spans);
            let ours = spans.iter().position(|&open| open == span);
            spans.swap_remove(ours.expect("pushed above"));
            drop(spans);
            device.nr_spans.fetch_sub(1, Relaxed);
        } else {
            touch();
            drop(guard);
        }
        true
    }

    /// A far fault for several pages at once, which must be served; nothing is accessed.
    pub(crate) fn fetch(&mut self, pages: std::ops::Range<usize>, access: Access) {
        let done = self.fault_in(pages, access, 0);
        assert!(done.is_ok(), "a device's fault fails: {done:?}");
        self.world.check();
    }

    fn fault_in(
        &mut self,
        pages: std::ops::Range<usize>,
        access: Access,
        attempt: usize,
    ) -> Result<(), DeviceFault> {
        let mapped = self.world.mappings[self.device].clone();
        let first = BASE + pages.start * PAGE_SIZE;
        kernel::with(|kernel| kernel.note("device fault", first, None));
        if matches!(self.style, Style::Update | Style::Snapshot | Style::Migrate) {
            let mut update = self.range.start_update(&mapped, pages, TIMEOUT)?;
            match self.style {
                Style::Snapshot if attempt.is_multiple_of(2) => update.snapshot(),
                Style::Migrate if attempt.is_multiple_of(2) => update.migrate()?,
                _ => update.fault(access)?,
            }
            let guard = self.attachment.device().lock.lock();
            if let Ok(valid) = update.end_update(&guard) {
                valid.iter().for_each(|valid| mapped.table().install(valid));
                kernel::with(|kernel| kernel.note("commit", first, None));
            }
            return Ok(());
        }
        let attempt = u32::try_from(attempt).unwrap_or(u32::MAX);
        self.range
            .fault_in(&mapped, pages, access, attempt, TIMEOUT, |valid, _| {
                mapped.table().install(valid);
                kernel::with(|kernel| kernel.note("commit", first, None));
            })
    }
}

const _: () = assert!(BASE.is_multiple_of(BLOCK_SIZE) && ELSEWHERE.is_multiple_of(BLOCK_SIZE));
