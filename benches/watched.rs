//! A part of the bench `protocol`: the accelerator's own device, watched. When its translations are taken away, when its last worker
//! was done with them, and when a worker last used one.
//!
//! The workers are the bench's, so that they do nothing else than use one page over and over: they go by the accelerator's handshake
//! (its files are included as they are), in spans as slice kernels do or by single elements.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use benches::harness::{Samples, Subject};
use benches::machine::{pin_to_cpu, unpin};
use benches::report::Note;
use svm::addr::PAGE_SIZE;
use svm::{
    Access, AttachOptions, Attachment, Delivery, Device, DeviceLock, Granule, Invalidation,
    LateAccess, MapInfo, MappedRef, Mirror, Options, Overrun, Range, WouldBlock,
};

use crate::device::{RegionTable, Sim};
use crate::fences;
use crate::shootdown::{Generation, Rights};
use crate::{HERE, THERE, wait_until};

const TIMEOUT: Duration = Duration::from_secs(10);
/// As of an accelerator.
const SPAN_DEADLINE: Duration = Duration::from_secs(2);

/// Nanoseconds of the monotonic clock.
fn now() -> u64 {
    // SAFETY: a timespec is integers: zero is a value.
    let mut time: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: writes the time.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

/// The device and what is noted about it.
struct Shared {
    sim: Sim,
    /// When the first invalidation since the page was given began, and when its last worker was clean; 0 until then.
    begun: AtomicU64,
    clean: AtomicU64,
    /// The page that the worker uses, counted from the region's base.
    page: AtomicUsize,
    /// How often it did, when it did last, and how often it had no translation.
    uses: AtomicU64,
    used: AtomicU64,
    misses: AtomicU64,
    /// Whether the call that gave the page up has returned, and uses that began after that.
    returned: AtomicBool,
    late: AtomicU64,
    /// The worker's thread, or 0 before it runs.
    tid: AtomicI32,
    stop: AtomicBool,
}

#[derive(Clone)]
struct Watched(Arc<Shared>);

// SAFETY: the accelerator's device does it all; what is added stores two words. (They are in memory that nobody mirrors.)
unsafe impl Device for Watched {
    type Table = RegionTable;

    fn map(&self, map: &MapInfo) -> Result<RegionTable, svm::Error> {
        self.0.sim.map(map)
    }

    fn lock(&self) -> &DeviceLock {
        self.0.sim.lock()
    }

    fn invalidate(&self, table: &RegionTable, inv: &Invalidation) -> Result<(), WouldBlock> {
        // Relaxed: the thread that reads it is the one that faults, or waits until a worker has missed.
        if self.0.begun.load(Ordering::Relaxed) == 0 {
            self.0.begun.store(now(), Ordering::Relaxed);
        }
        self.0.sim.invalidate(table, inv)
    }

    fn quiesced(&self, table: &RegionTable, inv: &Invalidation) -> bool {
        let is_clean = self.0.sim.quiesced(table, inv);
        if is_clean && self.0.clean.load(Ordering::Relaxed) == 0 {
            self.0.clean.store(now(), Ordering::Relaxed);
        }
        is_clean
    }

    fn overrun(&self, table: &RegionTable, late: &LateAccess) -> Overrun {
        self.0.sim.overrun(table, late)
    }

    fn pause(&self) {
        self.0.sim.pause();
    }

    fn is_paused(&self) -> bool {
        self.0.sim.is_paused()
    }

    fn resume(&self) {
        self.0.sim.resume();
    }
}

/// How a worker uses its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// There are workers, and they have nothing to do.
    Rests,
    /// A span of the page after the other: all of its words.
    Spans,
    /// One word after the other.
    Elements,
}

/// Memory that a worker uses, page by page.
pub(crate) struct Target {
    // In the order in which they go.
    range: Range<Watched>,
    mapped: MappedRef<Watched>,
    attachment: Attachment<Watched>,
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
    /// Of the worker, and of the thread that takes pages away.
    turns: [Turns; 2],
    _mirror: Mirror<'static, u8>,
    map: Map,
    page: usize,
}

/// An anonymous mapping. It stays: where a page of it was unmapped, somebody else's may be.
struct Map {
    addr: usize,
    nr_pages: usize,
}

impl Map {
    fn new(nr_pages: usize) -> Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, wherever the kernel likes.
        let at = unsafe { libc::mmap(ptr::null_mut(), nr_pages * PAGE_SIZE, prot, flags, -1, 0) };
        ensure!(at != libc::MAP_FAILED, "no memory");
        Ok(Self {
            addr: at.expose_provenance(),
            nr_pages,
        })
    }

    fn at(&self, page: usize) -> *mut u8 {
        ptr::with_exposed_provenance_mut(self.addr + page * PAGE_SIZE)
    }
}

impl Target {
    pub(crate) fn new(nr_pages: usize, delivery: Delivery, how: Use) -> Result<Self> {
        let map = Map::new(nr_pages)?;
        for page in 0..nr_pages {
            // SAFETY: in the mapping.
            unsafe { map.at(page).write_volatile(1) };
        }
        let options = Options::new().delivery(delivery).granule(Granule::Page);
        // SAFETY: the mapping is the bench's own, of which no reference exists; it is changed as the bench says.
        let mirror = unsafe { svm::mirror_raw(map.at(0), nr_pages * PAGE_SIZE, &options) }?;
        let shared = Arc::new(Shared {
            sim: Sim::new(2),
            begun: AtomicU64::new(0),
            clean: AtomicU64::new(0),
            page: AtomicUsize::new(0),
            uses: AtomicU64::new(0),
            used: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            returned: AtomicBool::new(false),
            late: AtomicU64::new(0),
            tid: AtomicI32::new(0),
            stop: AtomicBool::new(false),
        });
        let attach = AttachOptions::new().span_deadline(SPAN_DEADLINE);
        let attachment = svm::attach(Watched(shared.clone()), attach)?;
        let mapped = attachment.map(mirror.view().region())?;
        let worker = (how != Use::Rests).then(|| {
            let (shared, mapped) = (shared.clone(), mapped.clone());
            std::thread::spawn(move || work(&shared, &mapped, how))
        });
        if worker.is_some() {
            wait_until(|| shared.tid.load(Ordering::Relaxed) != 0);
        }
        pin_to_cpu(HERE);
        Ok(Self {
            turns: [shared.tid.load(Ordering::Relaxed), tid()].map(Turns::of),
            range: attachment.range()?,
            mapped,
            attachment,
            shared,
            worker,
            _mirror: mirror,
            map,
            page: 0,
        })
    }

    /// The next page goes to the device, and its worker uses it.
    fn give_next(&mut self) -> Result<()> {
        self.page = (self.page + 1) % self.map.nr_pages;
        let region = self.mapped.region();
        let first = (self.map.addr - region.base()) / PAGE_SIZE;
        let page = first + self.page;
        // Populated, which a discarded page is not.
        // SAFETY: in the mapping.
        unsafe { self.map.at(self.page).write_volatile(1) };
        let mapped = &self.mapped;
        let _signals = svm::worker_thread();
        self.range.fault_in(
            mapped,
            page..page + 1,
            Access::Write,
            0,
            TIMEOUT,
            |valid, guard| mapped.table().install(valid, guard),
        )?;
        self.shared.begun.store(0, Ordering::Relaxed);
        self.shared.clean.store(0, Ordering::Relaxed);
        self.shared.returned.store(false, Ordering::Relaxed);
        // Release: who uses this page sees what was reset for it.
        self.shared.page.store(page, Ordering::Release);
        if self.worker.is_some() {
            let before = self.shared.uses.load(Ordering::Relaxed);
            wait_until(|| self.shared.uses.load(Ordering::Relaxed) > before + 1);
        }
        Ok(())
    }

    /// Takes the page from the device, by a touch: nanoseconds from the invalidation's beginning until its last worker is clean; and
    /// whether worker and waiter kept their CPUs meanwhile, as far as the kernel tells.
    fn shoot(&mut self) -> Result<(u64, bool)> {
        self.give_next()?;
        let turns = self.turns.each_ref().map(Turns::so_far);
        // SAFETY: in the mapping; volatile, as the fault is what it is for.
        unsafe { self.map.at(self.page).write_volatile(2) };
        let begun = self.shared.begun.load(Ordering::Relaxed);
        let clean = self.shared.clean.load(Ordering::Relaxed);
        ensure!(begun != 0, "the page was not taken away");
        ensure!(
            clean >= begun,
            "the page was taken from a worker that had no CPU for {SPAN_DEADLINE:?}: too much else runs here"
        );
        let kept_cpu = turns == self.turns.each_ref().map(Turns::so_far);
        Ok((clean - begun, kept_cpu))
    }

    /// Takes the page's contents, or the page, by a call of the application's: for how long after the call had returned the device
    /// went on using its translation, and how many uses began in that time. `None` if the call did not wait for an access in flight,
    /// whose thread was kept from running for longer than an event may be kept waiting (`PAUSE_NS` in `runtime/src/events.rs`).
    fn discard(&mut self, call: Call) -> Result<Option<(u64, u64)>> {
        self.give_next()?;
        let outstayed = self.attachment.stats().outstayed_pauses;
        call.make(self.map.at(self.page))?;
        self.shared.returned.store(true, Ordering::Release);
        let returned = now();
        let before = self.shared.misses.load(Ordering::Relaxed);
        // Two in a row: the first may be of a pause. From then on there is no use.
        wait_until(|| self.shared.misses.load(Ordering::Relaxed) > before + 1);
        // Acquire: pairs with the Release of the misses.
        let used = self.shared.used.load(Ordering::Acquire);
        let late = self.shared.late.swap(0, Ordering::Relaxed);
        // Ours wait for it all the same.
        let is_waited_for =
            call.is_of_svm() || self.attachment.stats().outstayed_pauses == outstayed;
        Ok(is_waited_for.then(|| (used.saturating_sub(returned), late)))
    }
}

fn tid() -> i32 {
    // SAFETY: gettid takes nothing and changes nothing.
    unsafe { libc::gettid() }
}

/// How often a thread was given a CPU. More often than before: it had lost it.
struct Turns(Option<File>);

impl Turns {
    fn of(tid: i32) -> Self {
        Self(File::open(format!("/proc/self/task/{tid}/schedstat")).ok())
    }

    /// 0 where the kernel does not tell.
    fn so_far(&self) -> u64 {
        let mut line = [0; 96];
        let read = self
            .0
            .as_ref()
            .and_then(|file| file.read_at(&mut line, 0).ok());
        let line = std::str::from_utf8(&line[..read.unwrap_or(0)]).unwrap_or_default();
        let turns = line.split_whitespace().nth(2);
        turns.and_then(|turns| turns.parse().ok()).unwrap_or(0)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
        unpin();
    }
}

/// A worker: uses the page, while it has a translation for it.
fn work(shared: &Shared, mapped: &MappedRef<Watched>, how: Use) {
    pin_to_cpu(THERE);
    shared.tid.store(tid(), Ordering::Relaxed);
    let signals = svm::worker_thread();
    let (slot, generation) = (shared.sim.slot(0), shared.sim.generation());
    shared.sim.take_post(0, signals.id());
    if how == Use::Elements {
        slot.enter_element_mode();
    }
    let bits = mapped.table().bits();
    while !shared.stop.load(Ordering::Relaxed) {
        // Acquire: pairs with the Release in `give_next`.
        let page = shared.page.load(Ordering::Acquire);
        let count = |counter: &AtomicU64| {
            // Release: who sees a miss sees the last use before it.
            counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Release);
        };
        // Without a translation an accelerator's worker waits in its fault, and publishes nothing. One that tried again and again would be
        // taken for an access: what a shooter that looks at its slot sees is mostly what its last try has just published.
        if bits.place(page, Rights::Write).is_none() {
            count(&shared.misses);
            std::hint::spin_loop();
            continue;
        }
        let host = mapped.region().base() + page * PAGE_SIZE;
        let window = host.wrapping_add_signed(mapped.offset());
        let touch = |word: usize| {
            let at = ptr::with_exposed_provenance_mut::<u64>(window + word * size_of::<u64>());
            // SAFETY: a page that the device has, inside the epoch.
            let value = unsafe { at.read_volatile() };
            // SAFETY: as above.
            unsafe { at.write_volatile(value + 1) };
        };
        let number = (host / PAGE_SIZE) as u64;
        let done = match how {
            Use::Rests => return,
            Use::Spans => {
                let spans = [(number..number + 1, Rights::Write)];
                let opened = slot.try_open(0, &spans, || {
                    let is_paused = Generation::is_paused(generation.load(Ordering::Acquire));
                    let place = bits.place(page, Rights::Write);
                    place.filter(|_| !is_paused)
                });
                if opened.is_some() {
                    (0..PAGE_SIZE / size_of::<u64>()).for_each(touch);
                    shared.used.store(now(), Ordering::Relaxed);
                    slot.close(0, 1);
                }
                opened.is_some()
            }
            Use::Elements => {
                let check = |generation| {
                    let place = bits.place(page, Rights::Write);
                    place.filter(|_| !Generation::is_paused(generation))
                };
                let access = |_| {
                    // Acquire: a use that sees it begins after the call has returned, whatever clocks say.
                    if shared.returned.load(Ordering::Acquire) {
                        shared.late.fetch_add(1, Ordering::Relaxed);
                    }
                    touch(0);
                    shared.used.store(now(), Ordering::Relaxed);
                };
                let rights = Rights::Write;
                slot.access(
                    fences::light_fence,
                    generation,
                    number,
                    rights,
                    check,
                    access,
                )
                .is_some()
            }
        };
        count(if done { &shared.uses } else { &shared.misses });
    }
    slot.abandon();
    shared.sim.leave_post(0);
}

/// Shootdowns in a sample pass.
pub(crate) const SHOTS: usize = 200;

/// From the call that takes translations away until the last worker is done with them.
pub(crate) struct Shootdown<'a> {
    pub(crate) target: &'a std::cell::RefCell<Target>,
    /// Those in which worker and waiter kept their CPUs.
    pub(crate) undisturbed: Samples,
}

impl Subject for Shootdown<'_> {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let mut target = self.target.borrow_mut();
        for _ in 0..SHOTS {
            let (ns, kept_cpu) = target.shoot()?;
            samples.record(ns);
            if kept_cpu {
                self.undisturbed.record(ns);
            }
        }
        Ok(())
    }
}

/// How an application gives memory up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Madvise,
    Munmap,
    SvmMadvise,
    SvmMunmap,
}

impl Call {
    fn name(self) -> &'static str {
        match self {
            Self::Madvise => "madvise",
            Self::Munmap => "munmap",
            Self::SvmMadvise => "svm::madvise",
            Self::SvmMunmap => "svm::munmap",
        }
    }

    fn is_of_svm(self) -> bool {
        matches!(self, Self::SvmMadvise | Self::SvmMunmap)
    }

    fn make(self, page: *mut u8) -> Result<()> {
        let advice = libc::MADV_DONTNEED;
        let result = match self {
            // SAFETY: the bench's own mapping, of which no reference exists. So with the others.
            Self::Madvise => unsafe { libc::madvise(page.cast(), PAGE_SIZE, advice) },
            // SAFETY: as above; the page is not touched again.
            Self::Munmap => unsafe { libc::munmap(page.cast(), PAGE_SIZE) },
            // SAFETY: as above.
            Self::SvmMadvise => return Ok(unsafe { svm::madvise(page, PAGE_SIZE, advice) }?),
            // SAFETY: as above.
            Self::SvmMunmap => return Ok(unsafe { svm::munmap(page, PAGE_SIZE) }?),
        };
        if result != 0 {
            bail!("{}: {}", self.name(), std::io::Error::last_os_error());
        }
        Ok(())
    }
}

/// For how long a device goes on using what an application has given up, after the call has returned. Only behind the thread door, and
/// only for a bare call, is there such a time (`runtime/src/events.rs`); what is to be zero is measured all the same. Beside the figures,
/// says where a use began after the return that must not: that is an error, not a figure.
pub(crate) fn windows(quick: bool) -> Result<(Vec<Note>, Vec<String>)> {
    let nr_calls: usize = if quick { 64 } else { 1_000 };
    let (mut notes, mut broken) = (Vec::new(), Vec::new());
    for (door, delivery) in [("thread", Delivery::Thread), ("inline", Delivery::Inline)] {
        for call in [
            Call::Madvise,
            Call::Munmap,
            Call::SvmMadvise,
            Call::SvmMunmap,
        ] {
            let name = format!("window of a call, {door} door, {}", call.name());
            let seen = Windows::of(call, delivery, nr_calls)?;
            if delivery == Delivery::Thread && !call.is_of_svm() {
                notes.extend(seen.distribution(&name));
                continue;
            }
            let longest = format!("{name}: longest");
            notes.push(Note::new(longest, seen.at(1.0), "ns", Some(0.0)));
            if !call.is_of_svm() {
                let what = "calls in which a worker without a CPU was not waited for";
                let nr = seen.nr_outstayed as f64;
                notes.push(Note::new(format!("{name}: {what}"), nr, "calls", None));
            }
            if seen.late > 0 {
                broken.push(format!("{name}: {} uses began after it", seen.late));
            }
        }
    }
    Ok((notes, broken))
}

/// What a device did after calls had returned.
struct Windows {
    /// For how long, from short to long.
    ns: Vec<u64>,
    /// How many uses began in them all.
    late: u64,
    /// Calls that did not wait for an access in flight: they are not among the others.
    nr_outstayed: usize,
}

impl Windows {
    fn of(call: Call, delivery: Delivery, nr_calls: usize) -> Result<Self> {
        let mut target = Target::new(nr_calls + 1, delivery, Use::Elements)?;
        let (mut ns, mut late) = (Vec::with_capacity(nr_calls), 0);
        for _ in 0..nr_calls {
            if let Some((window, began)) = target.discard(call)? {
                ns.push(window);
                late += began;
            }
        }
        ns.sort_unstable();
        ensure!(!ns.is_empty(), "no call waited for the worker");
        Ok(Self {
            nr_outstayed: nr_calls - ns.len(),
            ns,
            late,
        })
    }

    fn at(&self, q: f64) -> f64 {
        self.ns[((self.ns.len() - 1) as f64 * q) as usize] as f64
    }

    fn distribution(&self, name: &str) -> [Note; 4] {
        let note = |what, value, unit| Note::new(format!("{name}: {what}"), value, unit, None);
        let open = self.ns.iter().filter(|&&ns| ns > 0).count();
        [
            note(
                "calls that have one",
                open as f64 / self.ns.len() as f64,
                "of all",
            ),
            note("p50", self.at(0.5), "ns"),
            note("p99", self.at(0.99), "ns"),
            note("longest", self.at(1.0), "ns"),
        ]
    }
}
