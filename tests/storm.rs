//! The storm: several threads change mirrored mappings in every way there is, while devices and other threads read and write
//! tagged pages in them, and nothing may be lost.
//!
//! # Arenas and eras
//!
//! An *arena* is a range of addresses. It is mapped and mirrored, worked on for an *era*, closed and looked over, and mirrored
//! anew, each time with other options; now and then it is also unmapped and mapped again at the same place. Several arenas go
//! through their eras side by side, on the same accelerators.
//!
//! # What must be in a page
//!
//! Each page has a *record* in plain memory: how often its contents have changed (its generation), whether they are zeros since,
//! whether it still belongs to the mirror, and whether somebody has *taken* it. Otherwise a page holds, in its first and its last
//! word, a tag made of its address and its generation.
//!
//! - Who has taken a page, and only he, changes it: *workers* on the CPU and on devices write the next tag; *changers* take many in
//!   a row, change their mapping by a call, bare or by wrapper, and write down what it must have made of them. Taken and given back
//!   with Acquire and Release, a page must be exactly what its record says.
//! - *Watchers* are kernels that read pages without taking them, in the middle of everything. What one reads must have been
//!   current at some time between its look at the record before and its look after: no older tag, and no younger one. A fault is
//!   good if it is of the right kind, and if the record has changed meanwhile, or says that the page has left the mirror.
//!
//! Each kind of change is made at least once in a run of two seconds or more, before chance decides; what was never tried is a failure.
//! There is no `MADV_REMOVE` here, which is for shared memory, and that is served in place; the heap is grown and cut by children alone,
//! for in this process it is malloc's.
//!
//! Through the thread door a bare call is followed by a step through the runtime before the pages are given back: there a device
//! may use a stale translation for a moment.

use std::fmt;
use std::process::Command;
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use accel_sim::Accelerator;
use svm::{Capability, Delivery, DeviceFault, DeviceFaultKind, Granule, Options, Ptr};

use crate::TestDevice;
use crate::mapping::{Map, READ_WRITE};
use crate::stress::{Rng, mix};

const PAGE: usize = 4096;
/// From an arena to the rooms of its changers: more than an arena has pages.
const ROOM: usize = 1 << 32;
/// The words of a page that are used: the first and the last.
const LAST: usize = PAGE - 8;

/// What a storm does, and for how long.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// How long it starts new operations.
    pub time: Duration,
    /// Chooses the operations; the interleaving is the machine's.
    pub seed: u64,
    /// The door for CPU faults; both in turn if it is none.
    pub delivery: Option<Delivery>,
    /// Arenas side by side.
    pub arenas: usize,
    /// Pages of each.
    pub pages: usize,
    /// Bytes of memory of each of the two accelerators: less than the arenas have.
    pub device_memory: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(5),
            seed: 1,
            delivery: None,
            arenas: 2,
            pages: 700,
            device_memory: 2 << 20,
        }
    }
}

/// A run as long as this has tried everything.
const REASONABLE: Duration = Duration::from_secs(2);
/// How long such a run goes on after its time until each kind was tried: on a machine that has much else to do two seconds are few.
const GRACE: Duration = Duration::from_secs(30);

const KINDS: [&str; 28] = [
    "device pages checked and written",
    "device pages watched",
    "typed device faults",
    "CPU pages checked and written",
    "eras: a mirror made, looked over and closed",
    "madvise(DONTNEED), bare",
    "madvise(DONTNEED), wrapper",
    "madvise(FREE), bare",
    "madvise(FREE), wrapper",
    "munmap, then mapped anew, bare",
    "munmap, then mapped anew, wrapper",
    "mmap(FIXED) over",
    "mremap away and back, bare",
    "mremap away and back, wrapper",
    "mremap(DONTUNMAP), bare",
    "mremap(DONTUNMAP), wrapper",
    "mremap shrinking, bare",
    "mremap shrinking, wrapper",
    "mremap away growing and back shrinking, bare",
    "mremap away growing and back shrinking, wrapper",
    "mprotect(READ), bare",
    "mprotect(READ), wrapper",
    "mprotect(NONE), bare",
    "mprotect(NONE), wrapper",
    "forks, the child looking",
    "forks, the child with a mirror and a brk of its own",
    "processes spawned",
    "devices told to release all",
];

/// What a storm did.
#[derive(Debug, Default)]
pub struct Report {
    /// Operations by kind.
    pub ops: Vec<(&'static str, u64)>,
    /// What the mirrors report, all together.
    pub mirrors: svm::Stats,
    /// Pages that were what they had to be.
    pub looks: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, n) in &self.ops {
            writeln!(f, "  {n:>12}  {kind}")?;
        }
        let s = &self.mirrors;
        let cpu = s.cpu_read_faults + s.cpu_write_faults + s.cpu_protect_faults + s.cpu_zero_fills;
        let device = s.device_read_faults + s.device_write_faults;
        writeln!(
            f,
            "  {cpu:>12}  CPU faults, {} of them spurious beside",
            s.cpu_spurious_faults
        )?;
        writeln!(f, "  {device:>12}  device fault rounds")?;
        writeln!(f, "  {:>12}  retries", s.retries)?;
        writeln!(f, "  {:>12}  waits", s.waits)?;
        writeln!(
            f,
            "  {:>12}  pages to devices, {} home ({} evicted)",
            s.to_device_pages(),
            s.to_host_pages(),
            s.evicted_pages
        )?;
        writeln!(f, "  {:>12}  anomalies", s.anomalies)?;
        write!(
            f,
            "nothing lost: {} looks at pages, each as it had to be",
            self.looks
        )
    }
}

/// What a page's record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    generation: u64,
    is_zero: bool,
    /// What a device's access must come to.
    reach: Reach,
    is_taken: bool,
}

/// Whether a page is in its mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    Mirrored,
    /// It has left it.
    Left,
    /// It depends on what the kernel tells.
    Unknown,
}

impl Record {
    const fn to_bits(self) -> u64 {
        self.generation << 4
            | (self.is_zero as u64) << 3
            | (self.reach as u64) << 1
            | self.is_taken as u64
    }

    const fn from_bits(bits: u64) -> Self {
        Self {
            generation: bits >> 4,
            is_zero: bits >> 3 & 1 == 1,
            reach: match bits >> 1 & 3 {
                0 => Reach::Mirrored,
                1 => Reach::Left,
                _ => Reach::Unknown,
            },
            is_taken: bits & 1 == 1,
        }
    }

    fn word(self, page: usize) -> u64 {
        if self.is_zero {
            0
        } else {
            tag(page, self.generation)
        }
    }

    /// With other contents: a tag, or zeros.
    const fn next(self, is_zero: bool) -> Self {
        Self {
            generation: self.generation + 1,
            is_zero,
            ..self
        }
    }
}

/// Never zero, and it tells the page and the generation.
const fn tag(page: usize, generation: u64) -> u64 {
    generation << 20 | (page as u64) << 1 | 1
}

type Checked = Result<(), String>;

/// What all have in common.
struct Run {
    config: Config,
    accels: Vec<Accelerator>,
    ends: Instant,
    failure: Mutex<Option<String>>,
    failed: AtomicBool,
    ops: [AtomicU64; KINDS.len()],
    looks: AtomicU64,
    mirrors: Mutex<svm::Stats>,
    /// Changes begun, of those that are made before chance decides.
    first: AtomicUsize,
    /// Whether bare calls of these kinds are heard of.
    hears_removal: bool,
    hears_unmapping: bool,
}

impl Run {
    fn goes_on(&self) -> bool {
        let now = Instant::now();
        let has_time = now < self.ends
            || (now < self.ends + GRACE && self.config.time >= REASONABLE && self.untried() > 0);
        !self.failed.load(Ordering::Relaxed) && has_time
    }

    /// How many kinds that could be were not tried yet.
    fn untried(&self) -> usize {
        let kinds = KINDS.iter().zip(&self.ops);
        kinds
            .filter(|(kind, n)| n.load(Ordering::Relaxed) == 0 && self.can_try(kind))
            .count()
    }

    fn count(&self, kind: &'static str) {
        self.count_n(kind, 1);
    }

    fn count_n(&self, kind: &'static str, n: u64) {
        let at = KINDS.iter().position(|k| *k == kind);
        self.ops[at.expect("a kind of the table")].fetch_add(n, Ordering::Relaxed);
    }

    /// Whether a kind can be tried at all: a bare call that nobody would hear of is not made.
    fn can_try(&self, kind: &str) -> bool {
        let of = |calls: &[&str]| calls.iter().any(|call| kind.starts_with(call));
        let is_heard = if of(&["madvise"]) {
            self.hears_removal
        } else {
            !of(&["munmap", "mmap", "mremap"]) || self.hears_unmapping
        };
        is_heard || kind.ends_with("wrapper")
    }

    fn check(&self, who: &str, result: Checked) {
        if let Err(what) = result {
            self.failed.store(true, Ordering::Relaxed);
            let mut failure = self.failure.lock().expect("no panic while it is held");
            failure.get_or_insert(format!("{who}: {what}"));
        }
    }
}

/// Runs the storm.
///
/// # Errors
/// What was lost, or failed; or an anomaly that the runtime counted.
pub fn run(config: &Config) -> Result<Report, String> {
    let accels = (0..2)
        .map(|_| {
            let options = accel_sim::Options::new()
                .workers(2)
                .memory_bytes(config.device_memory)
                .fault_timeout(Duration::from_secs(20));
            Accelerator::with_options(options).map_err(|e| format!("accelerator: {e}"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let capabilities = svm::Capabilities::probe();
    let run = Run {
        config: config.clone(),
        accels,
        ends: Instant::now() + config.time,
        failure: Mutex::new(None),
        failed: AtomicBool::new(false),
        ops: [const { AtomicU64::new(0) }; KINDS.len()],
        looks: AtomicU64::new(0),
        mirrors: Mutex::new(svm::Stats::default()),
        first: AtomicUsize::new(0),
        hears_removal: capabilities.has(Capability::Events) && capabilities.has(Capability::Move),
        hears_unmapping: capabilities.has(Capability::Events),
    };
    std::thread::scope(|scope| {
        for n in 0..config.arenas {
            let run = &run;
            scope.spawn(move || run.check(&format!("arena {n}"), arena(run, n)));
        }
    });
    let failure = run
        .failure
        .lock()
        .expect("no panic while it is held")
        .take();
    let report = Report {
        ops: KINDS
            .iter()
            .zip(&run.ops)
            .map(|(kind, n)| (*kind, n.load(Ordering::Relaxed)))
            .collect(),
        mirrors: *run.mirrors.lock().expect("no panic while it is held"),
        looks: run.looks.load(Ordering::Relaxed),
    };
    if let Some(failure) = failure {
        return Err(format!("{failure}\n{report:?}"));
    }
    if report.mirrors.anomalies != 0 {
        return Err(format!("the runtime counted anomalies: {report:?}"));
    }
    if config.time >= REASONABLE {
        let never = report.ops.iter().filter(|(_, n)| *n == 0);
        let never: Vec<_> = never.filter(|(kind, _)| run.can_try(kind)).collect();
        if !never.is_empty() {
            return Err(format!("never tried: {never:?}\n{report}"));
        }
    }
    Ok(report)
}

/// Era after era on one range of addresses.
fn arena(run: &Run, n: usize) -> Checked {
    let mut rng = Rng::new(mix(run.config.seed ^ mix(n as u64 + 1)));
    let pages = run.config.pages;
    // Room on both sides, so that no other mapping joins.
    let room = Map::at_hint(
        0x2345_0000_0000 + n * (1 << 36),
        pages + 2,
        libc::PROT_NONE,
        0,
    );
    let addr = room.addr + PAGE;
    let map = || Map::at_hint(addr, pages, READ_WRITE, libc::MAP_FIXED);
    let mut arena = Arena {
        map: map(),
        records: (0..pages)
            .map(|_| {
                let record = Record {
                    generation: 0,
                    is_zero: true,
                    reach: Reach::Mirrored,
                    is_taken: false,
                };
                AtomicU64::new(record.to_bits())
            })
            .collect(),
    };
    while run.goes_on() {
        if rng.below(3) == 0 {
            // The address is reused.
            arena.map.unmap();
            arena.map = map();
            arena.for_each_record(|record| record.next(true));
        }
        // Whatever it has left: it is mirrored anew.
        arena.for_each_record(|record| Record {
            reach: Reach::Mirrored,
            ..record
        });
        let delivery = match run.config.delivery {
            Some(delivery) => delivery,
            None if rng.below(2) == 0 => Delivery::Inline,
            None => Delivery::Thread,
        };
        let options = Options::new()
            .delivery(delivery)
            .granule([Granule::Page, Granule::Big, Granule::Huge][rng.below(3)])
            .read_mostly(rng.below(3) == 0);
        era(run, &arena, &mut rng, &options).map_err(|e| format!("{options:?}: {e}"))?;
        run.count("eras: a mirror made, looked over and closed");
    }
    room.unmap();
    Ok(())
}

fn era(run: &Run, arena: &Arena, rng: &mut Rng, options: &Options) -> Checked {
    // SAFETY: the arena's memory, which is accessed by those who have taken its pages, or by atomics; and changed by system calls.
    let mut mirror = unsafe { svm::mirror_raw(arena.map.at(0), arena.map.pages * PAGE, options) }
        .map_err(|e| e.to_string())?;
    let over = AtomicBool::new(false);
    let ends = Instant::now() + Duration::from_millis(50 + rng.next() % 250);
    let goes_on = || !over.load(Ordering::Relaxed) && run.goes_on() && Instant::now() < ends;
    {
        let shared = mirror.share();
        let work = Work {
            run,
            arena,
            options,
        };
        std::thread::scope(|scope| {
            let (work, goes_on, shared) = (&work, &goes_on, &shared);
            for n in 0..2 {
                let mut rng = Rng::new(rng.next());
                // Where a changer moves mappings to. Its own: an address that another thread has just vacated cannot be told from
                // what was there.
                let room = arena.map.addr + (n + 1) * ROOM;
                scope.spawn(move || {
                    while goes_on() {
                        run.check("changer", work.change(&mut rng, room));
                    }
                });
            }
            let mut cpu = Rng::new(rng.next());
            scope.spawn(move || {
                while goes_on() {
                    run.check("CPU", work.use_on_cpu(&mut cpu));
                    std::thread::yield_now();
                }
            });
            for accel in &run.accels {
                let mut rng = Rng::new(rng.next());
                scope.spawn(move || {
                    while goes_on() {
                        let (items, base) = (1 + rng.below(96), rng.next());
                        let done = accel.run_items(items, shared.view(), |lane, i, _| {
                            let r = mix(base ^ i as u64);
                            let page = (r >> 8) as usize % arena.map.pages;
                            let device = Device(lane);
                            let checked = if r & 3 == 0 {
                                work.watch(&device, page)
                            } else {
                                work.use_on_device(&device, page, r & 4 == 0)
                            };
                            run.check("device", checked);
                            Ok(())
                        });
                        run.check("launch", done.map_err(|e| e.to_string()));
                    }
                });
            }
        });
    }
    *run.mirrors.lock().expect("no panic while it is held") += mirror.stats();
    mirror.close().map_err(|e| format!("close: {e}"))?;
    (0..arena.map.pages).try_for_each(|page| arena.look(page, "at home").map(drop))
}

/// A kernel's lane.
struct Device<'a, 'l>(&'a accel_sim::Lane<'l>);

impl Device<'_, '_> {
    fn load(&self, addr: usize) -> Result<u64, DeviceFault> {
        self.0.load(Ptr::<u64>::from_addr(addr))
    }

    fn store(&self, addr: usize, word: u64) -> Result<(), DeviceFault> {
        self.0.store(Ptr::<u64>::from_addr(addr), word)
    }
}

/// A range of addresses, and what must be in its pages.
struct Arena {
    map: Map,
    records: Vec<AtomicU64>,
}

/// Pages in a row that somebody has taken.
struct Taken {
    first: usize,
    records: Vec<Record>,
}

impl Taken {
    fn len(&self) -> usize {
        self.records.len()
    }

    fn pages(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.len()
    }
}

impl Arena {
    fn addr(&self, page: usize) -> usize {
        self.map.addr + page * PAGE
    }

    fn record(&self, page: usize) -> Record {
        // Acquire pairs with the Release of `give`.
        Record::from_bits(self.records[page].load(Ordering::Acquire))
    }

    /// Takes a page, unless somebody has.
    fn take(&self, page: usize) -> Option<Record> {
        let record = self.record(page);
        if record.is_taken {
            return None;
        }
        let taken = Record {
            is_taken: true,
            ..record
        };
        self.records[page]
            .compare_exchange(
                record.to_bits(),
                taken.to_bits(),
                Ordering::Acquire,
                Ordering::Relaxed,
            )
            .ok()
            .map(|_| record)
    }

    fn give(&self, page: usize, record: Record) {
        self.records[page].store(record.to_bits(), Ordering::Release);
    }

    /// Takes up to `max` pages in a row, as many as are free; none is waited for.
    fn take_some(&self, rng: &mut Rng, max: usize) -> Option<Taken> {
        let first = rng.below(self.map.pages);
        let end = (first + 1 + rng.below(max)).min(self.map.pages);
        let records: Vec<Record> = (first..end).map_while(|page| self.take(page)).collect();
        (!records.is_empty()).then_some(Taken { first, records })
    }

    fn give_all(&self, taken: Taken, now: impl Fn(Record) -> Record) {
        for (page, record) in taken.pages().zip(taken.records) {
            self.give(page, now(record));
        }
    }

    fn for_each_record(&mut self, now: impl Fn(Record) -> Record) {
        for record in &mut self.records {
            *record = AtomicU64::new(now(Record::from_bits(*record.get_mut())).to_bits());
        }
    }

    fn word(&self, addr: usize) -> &AtomicU64 {
        // SAFETY: in the arena's memory, which stays mapped for whoever has taken the page; accessed by atomics alone.
        unsafe { AtomicU64::from_ptr(ptr::with_exposed_provenance_mut(addr)) }
    }

    /// Whether the CPU finds in a page, at home or at `at`, what its record says.
    fn look_at(&self, page: usize, at: usize, record: Record, what: &str) -> Checked {
        let wanted = record.word(page);
        let found = [at, at + LAST].map(|at| self.word(at).load(Ordering::Relaxed));
        if found != [wanted; 2] {
            return Err(format!(
                "{what}: page {page} is {found:#x?}, not {wanted:#x}: {record:?}"
            ));
        }
        Ok(())
    }

    fn look(&self, page: usize, what: &str) -> Checked {
        self.look_at(page, self.addr(page), self.record(page), what)
    }

    fn write(&self, page: usize, word: u64) {
        let at = self.addr(page);
        for at in [at, at + LAST] {
            self.word(at).store(word, Ordering::Relaxed);
        }
    }
}

/// What is worked on in an era.
struct Work<'a> {
    run: &'a Run,
    arena: &'a Arena,
    options: &'a Options,
}

/// Kinds of changes, by their weights.
const CHOICES: usize = 40;

/// How a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Bare,
    Wrapper,
}

fn sys(what: &str, result: libc::c_int) -> Checked {
    if result == 0 {
        Ok(())
    } else {
        Err(format!("{what}: {}", std::io::Error::last_os_error()))
    }
}

fn at(addr: usize) -> *mut u8 {
    ptr::with_exposed_provenance_mut(addr)
}

impl Work<'_> {
    fn looked(&self, n: usize) {
        self.run.looks.fetch_add(n as u64, Ordering::Relaxed);
    }

    fn use_on_cpu(&self, rng: &mut Rng) -> Checked {
        let Some(taken) = self.arena.take_some(rng, 8) else {
            return Ok(());
        };
        for (page, &record) in taken.pages().zip(&taken.records) {
            self.arena
                .look_at(page, self.arena.addr(page), record, "on the CPU")?;
            self.arena.write(page, record.next(false).word(page));
        }
        self.looked(taken.len());
        self.run
            .count_n("CPU pages checked and written", taken.len() as u64);
        self.arena.give_all(taken, |record| record.next(false));
        Ok(())
    }

    /// Checks a page that was taken, and writes it.
    fn use_on_device(&self, device: &Device<'_, '_>, page: usize, writes: bool) -> Checked {
        let Some(record) = self.arena.take(page) else {
            return Ok(());
        };
        let addr = self.arena.addr(page);
        let next = record.next(false);
        let used = (|| {
            let found = [device.load(addr)?, device.load(addr + LAST)?];
            if writes && found == [record.word(page); 2] {
                device.store(addr, next.word(page))?;
                device.store(addr + LAST, next.word(page))?;
            }
            Ok::<_, DeviceFault>(found)
        })();
        match used {
            Ok(found) if found != [record.word(page); 2] => {
                return Err(format!(
                    "page {page} is {found:#x?}, not {:#x}: {record:?}",
                    record.word(page)
                ));
            }
            Ok(_) if record.reach == Reach::Left => {
                return Err(format!(
                    "page {page} was used, which has left the mirror: {record:?}"
                ));
            }
            Ok(_) => {
                self.arena.give(page, if writes { next } else { record });
                self.run.count("device pages checked and written");
            }
            Err(fault) if record.reach == Reach::Mirrored => {
                return Err(format!("page {page}: {fault}: {record:?}"));
            }
            Err(fault) if fault.kind != DeviceFaultKind::Unmapped => {
                return Err(format!("page {page}: {fault}: {record:?}"));
            }
            Err(_) => {
                self.arena.give(page, record);
                self.run.count("typed device faults");
            }
        }
        self.looked(1);
        Ok(())
    }

    /// Reads a page that others may be changing.
    fn watch(&self, device: &Device<'_, '_>, page: usize) -> Checked {
        let before = self.arena.record(page);
        let read = device.load(self.arena.addr(page));
        let after = self.arena.record(page);
        let same = before == after && !before.is_taken;
        let oldest = before.generation + u64::from(before.is_zero);
        let newest = after.generation + u64::from(after.is_taken);
        let good = match read {
            Ok(0) => !same || before.is_zero,
            Ok(word) => {
                let generation = word >> 20;
                word == tag(page, generation) && (oldest..=newest).contains(&generation)
            }
            Err(fault) => {
                self.run.count("typed device faults");
                let kind = matches!(
                    fault.kind,
                    DeviceFaultKind::Unmapped | DeviceFaultKind::NoAccess
                );
                kind && (!same || before.reach != Reach::Mirrored)
            }
        };
        self.looked(1);
        self.run.count("device pages watched");
        if good {
            Ok(())
        } else {
            Err(format!(
                "watched page {page}: {read:x?}, from {before:?} to {after:?}"
            ))
        }
    }

    /// Takes pages and changes their mapping.
    fn change(&self, rng: &mut Rng, room: usize) -> Checked {
        let Some(taken) = self.arena.take_some(rng, 60) else {
            return Ok(());
        };
        // First each of them, by both, then as chance will have it.
        let first = self.run.first.fetch_add(1, Ordering::Relaxed);
        let (choice, by_wrapper, rarely) = if first < 2 * CHOICES {
            (first / 2, first % 2 == 1, true)
        } else {
            let odds = rng.below(8);
            (rng.below(CHOICES), rng.below(2) == 1, odds == 0)
        };
        let at_times = rarely || rng.below(2) == 0;
        let by = if by_wrapper { By::Wrapper } else { By::Bare };
        let heard = |hears: bool| if hears { by } else { By::Wrapper };
        let (removal, unmapping) = (
            heard(self.run.hears_removal),
            heard(self.run.hears_unmapping),
        );
        match choice {
            0..9 => self.discard(taken, removal, libc::MADV_DONTNEED),
            9..12 => self.discard(taken, removal, libc::MADV_FREE),
            12..15 => self.unmap(taken, unmapping),
            15 if self.run.hears_unmapping => self.map_over(taken),
            16..19 => self.move_away_and_back(taken, unmapping, room),
            19 => self.move_and_leave(taken, unmapping, room),
            20 => self.shrink(taken, unmapping, rng),
            21..25 => self.protect(taken, by, libc::PROT_READ),
            25..29 => self.protect(taken, by, libc::PROT_NONE),
            29 if at_times => self.fork(taken),
            30 if rarely => self.fork_with_a_mirror(taken),
            31 if at_times => self.spawn(taken),
            32 => self.grow_and_shrink(taken, unmapping, room, rng),
            34 if at_times => {
                self.arena.give_all(taken, |record| record);
                self.run.count("devices told to release all");
                let accel = &self.run.accels[rng.below(self.run.accels.len())];
                accel.release().map_err(|e| format!("release: {e}"))
            }
            _ => {
                self.arena.give_all(taken, |record| record);
                std::thread::yield_now();
                Ok(())
            }
        }
    }

    /// Counts a call. After a bare one through the thread door, goes through the runtime, so that its event is applied; through the
    /// inline door nothing is stale anyway.
    fn made(&self, taken: &Taken, by: By, bare: &'static str, wrapper: &'static str) -> Checked {
        self.run.count(if by == By::Bare { bare } else { wrapper });
        if by == By::Bare && self.options.delivery == Some(Delivery::Thread) {
            self.mprotect(taken, By::Wrapper, READ_WRITE)?;
        }
        Ok(())
    }

    fn mprotect(&self, taken: &Taken, by: By, prot: i32) -> Checked {
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        match by {
            // SAFETY: pages that are taken.
            By::Bare => sys("mprotect", unsafe {
                libc::mprotect(at(addr).cast(), len, prot)
            }),
            // SAFETY: the same.
            By::Wrapper => unsafe { svm::mprotect(at(addr), len, prot) }.map_err(|e| e.to_string()),
        }
    }

    fn discard(&self, taken: Taken, by: By, advice: i32) -> Checked {
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        match by {
            // SAFETY: pages that are taken.
            By::Bare => sys("madvise", unsafe {
                libc::madvise(at(addr).cast(), len, advice)
            })?,
            By::Wrapper => {
                // SAFETY: the same.
                unsafe { svm::madvise(at(addr), len, advice) }.map_err(|e| e.to_string())?;
            }
        }
        if advice == libc::MADV_DONTNEED {
            self.made(
                &taken,
                by,
                "madvise(DONTNEED), bare",
                "madvise(DONTNEED), wrapper",
            )?;
            self.arena.give_all(taken, |record| record.next(true));
            return Ok(());
        }
        self.made(&taken, by, "madvise(FREE), bare", "madvise(FREE), wrapper")?;
        for (page, record) in taken.pages().zip(&taken.records) {
            // The old contents or zeros, as the kernel likes; but by the wrapper, and of a mirror, zeros.
            let found = self
                .arena
                .word(self.arena.addr(page))
                .load(Ordering::Relaxed);
            let old =
                found == record.word(page) && (by == By::Bare || record.reach != Reach::Mirrored);
            if found != 0 && !old {
                return Err(format!("freed page {page} is {found:#x}: {record:?}"));
            }
            self.arena.write(page, record.next(false).word(page));
        }
        self.arena.give_all(taken, |record| record.next(false));
        Ok(())
    }

    fn left(record: Record) -> Record {
        Record {
            reach: Reach::Left,
            ..record
        }
    }

    fn unmap(&self, taken: Taken, by: By) -> Checked {
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        match by {
            // SAFETY: pages that are taken.
            By::Bare => sys("munmap", unsafe { libc::munmap(at(addr).cast(), len) })?,
            // SAFETY: the same.
            By::Wrapper => unsafe { svm::munmap(at(addr), len) }.map_err(|e| e.to_string())?,
        }
        // At once: by a bare call, before anybody has heard of the unmapping.
        self.anew(&taken, libc::MAP_FIXED_NOREPLACE);
        self.made(
            &taken,
            by,
            "munmap, then mapped anew, bare",
            "munmap, then mapped anew, wrapper",
        )?;
        self.arena
            .give_all(taken, |record| Self::left(record.next(true)));
        Ok(())
    }

    fn anew(&self, taken: &Taken, flag: i32) {
        let _ = Map::at_hint(self.arena.addr(taken.first), taken.len(), READ_WRITE, flag);
    }

    fn map_over(&self, taken: Taken) -> Checked {
        self.anew(&taken, libc::MAP_FIXED);
        self.made(&taken, By::Bare, "mmap(FIXED) over", "")?;
        self.arena
            .give_all(taken, |record| Self::left(record.next(true)));
        Ok(())
    }

    fn mremap(
        &self,
        by: By,
        from: usize,
        old: usize,
        new: usize,
        flags: i32,
        to: usize,
    ) -> Result<usize, String> {
        let now = match by {
            // SAFETY: pages that are taken, and room of the caller's.
            By::Bare => unsafe { libc::mremap(at(from).cast(), old, new, flags, at(to)) }.cast(),
            // SAFETY: the same.
            By::Wrapper => unsafe { svm::mremap(at(from), old, new, flags, at(to)) }
                .map_err(|e| e.to_string())?,
        };
        if now.cast() == libc::MAP_FAILED {
            return Err(format!("mremap: {}", std::io::Error::last_os_error()));
        }
        Ok(now.expose_provenance())
    }

    /// What a move makes of a page's reach: where the kernel tells of it, the page has left; where the wrapper alone knows, it may
    /// have been memory like any other at once.
    fn moved(&self, record: Record) -> Record {
        let reach = match record.reach {
            Reach::Mirrored if !self.run.hears_unmapping => Reach::Unknown,
            Reach::Mirrored => Reach::Left,
            reach => reach,
        };
        Record { reach, ..record }
    }

    /// Gives back those of `taken` that lie in another mapping than the first: a move takes one at a time.
    fn of_one_mapping(&self, mut taken: Taken) -> Result<Taken, String> {
        let maps = std::fs::read_to_string("/proc/self/maps").map_err(|e| e.to_string())?;
        let first = self.arena.addr(taken.first);
        let parse = |number: &str| usize::from_str_radix(number, 16).unwrap_or(0);
        let end = maps
            .lines()
            .filter_map(|line| line.split(' ').next()?.split_once('-'))
            .map(|(start, end)| (parse(start), parse(end)))
            .find(|&(start, end)| start <= first && first < end)
            .ok_or("a page that is taken is not mapped")?
            .1;
        let len = taken.len().min((end - first) / PAGE);
        for (n, record) in taken.records.drain(len..).enumerate() {
            self.arena.give(taken.first + len + n, record);
        }
        Ok(taken)
    }

    fn look_at_all(&self, taken: &Taken, start: usize, what: &str) -> Checked {
        self.looked(taken.len());
        taken
            .pages()
            .zip(&taken.records)
            .try_for_each(|(page, &record)| {
                let there = start + (page - taken.first) * PAGE;
                self.arena.look_at(page, there, record, what)
            })
    }

    /// Writes the next generation, so that watchers know that something has happened.
    fn write_all(&self, taken: &Taken) {
        for (page, record) in taken.pages().zip(&taken.records) {
            self.arena.write(page, record.next(false).word(page));
        }
    }

    fn move_away_and_back(&self, taken: Taken, by: By, room: usize) -> Checked {
        const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let taken = self.of_one_mapping(taken)?;
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        self.mremap(by, addr, len, len, MOVE, room)?;
        self.look_at_all(&taken, room, &format!("where it was moved to, {by:?}"))?;
        self.mremap(by, room, len, len, MOVE, addr)?;
        self.look_at_all(&taken, addr, "moved back")?;
        self.made(
            &taken,
            by,
            "mremap away and back, bare",
            "mremap away and back, wrapper",
        )?;
        self.write_all(&taken);
        self.arena
            .give_all(taken, |record| self.moved(record.next(false)));
        Ok(())
    }

    /// Away to where there is more room, and back at the old length: the grown part is zeros, and is cut off by the way back.
    fn grow_and_shrink(&self, taken: Taken, by: By, room: usize, rng: &mut Rng) -> Checked {
        const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let taken = self.of_one_mapping(taken)?;
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        let more = (1 + rng.below(8)) * PAGE;
        self.mremap(by, addr, len, len + more, MOVE, room)?;
        self.look_at_all(
            &taken,
            room,
            &format!("where it was moved to and grew, {by:?}"),
        )?;
        for at in (room + len..room + len + more).step_by(PAGE) {
            let grown = self.arena.word(at).load(Ordering::Relaxed);
            if grown != 0 {
                return Err(format!("what has grown is {grown:#x}, {by:?}"));
            }
            self.arena.word(at).store(7, Ordering::Relaxed);
        }
        self.mremap(by, room, len + more, len, MOVE, addr)?;
        self.look_at_all(&taken, addr, "moved back and cut off")?;
        self.made(
            &taken,
            by,
            "mremap away growing and back shrinking, bare",
            "mremap away growing and back shrinking, wrapper",
        )?;
        self.write_all(&taken);
        self.arena
            .give_all(taken, |record| self.moved(record.next(false)));
        Ok(())
    }

    fn move_and_leave(&self, taken: Taken, by: By, room: usize) -> Checked {
        const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP | libc::MREMAP_FIXED;
        let taken = self.of_one_mapping(taken)?;
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        let there = self.mremap(by, addr, len, len, MOVE, room)?;
        self.look_at_all(
            &taken,
            there,
            &format!("where it was moved to, {by:?}, the old range left"),
        )?;
        for page in taken.pages() {
            let left = self
                .arena
                .word(self.arena.addr(page))
                .load(Ordering::Relaxed);
            if left != 0 {
                return Err(format!(
                    "page {page} is {left:#x} in the range that was left"
                ));
            }
        }
        // SAFETY: nobody uses it any more.
        unsafe { svm::munmap(at(there), len) }.map_err(|e| e.to_string())?;
        self.made(
            &taken,
            by,
            "mremap(DONTUNMAP), bare",
            "mremap(DONTUNMAP), wrapper",
        )?;
        self.write_all(&taken);
        self.arena
            .give_all(taken, |record| self.moved(record.next(false)));
        Ok(())
    }

    fn shrink(&self, taken: Taken, by: By, rng: &mut Rng) -> Checked {
        let taken = self.of_one_mapping(taken)?;
        if taken.len() == 1 {
            self.arena.give_all(taken, |record| record);
            return Ok(());
        }
        let (addr, old) = (self.arena.addr(taken.first), taken.len());
        let new = 1 + rng.below(old - 1);
        self.mremap(by, addr, old * PAGE, new * PAGE, 0, 0)?;
        let (mut head, tail) = (taken.records, taken.first + new);
        let tail = Taken {
            first: tail,
            records: head.split_off(new),
        };
        let head = Taken {
            first: taken.first,
            records: head,
        };
        self.anew(&tail, libc::MAP_FIXED_NOREPLACE);
        self.look_at_all(&head, addr, "what was not cut off")?;
        self.made(
            &tail,
            by,
            "mremap shrinking, bare",
            "mremap shrinking, wrapper",
        )?;
        self.write_all(&head);
        self.arena.give_all(head, |record| record.next(false));
        self.arena
            .give_all(tail, |record| Self::left(record.next(true)));
        Ok(())
    }

    fn protect(&self, taken: Taken, by: By, prot: i32) -> Checked {
        self.mprotect(&taken, by, prot)?;
        if prot == libc::PROT_READ {
            self.look_at_all(&taken, self.arena.addr(taken.first), "protected")?;
        } else {
            std::thread::yield_now();
        }
        self.run.count(match (prot == libc::PROT_READ, by) {
            (true, By::Bare) => "mprotect(READ), bare",
            (true, By::Wrapper) => "mprotect(READ), wrapper",
            (false, By::Bare) => "mprotect(NONE), bare",
            (false, By::Wrapper) => "mprotect(NONE), wrapper",
        });
        self.mprotect(&taken, by, READ_WRITE)?;
        self.look_at_all(&taken, self.arena.addr(taken.first), "protected no more")?;
        self.write_all(&taken);
        self.arena.give_all(taken, |record| record.next(false));
        Ok(())
    }

    /// Runs `child` in a forked child, which says whether all is well.
    fn in_child(which: &str, child: impl FnOnce() -> bool) -> Checked {
        // SAFETY: the child leaves by `_exit`, and the C library keeps malloc usable in it.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: a child that hangs is to be heard of.
            unsafe { libc::alarm(20) };
            let well = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            // SAFETY: ends the child, without what is the parent's to do at its end.
            unsafe { libc::_exit(i32::from(!well.unwrap_or(false))) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made, if there is one.
        let ended = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if pid < 0 || ended != pid || status != 0 {
            return Err(format!(
                "{which}: a forked child found something else: status {status:#x}"
            ));
        }
        Ok(())
    }

    fn fork(&self, taken: Taken) -> Checked {
        let addr = self.arena.addr(taken.first);
        Self::in_child("looking", || {
            self.look_at_all(&taken, addr, "in the child").is_ok() && {
                self.write_all(&taken);
                true
            }
        })?;
        self.look_at_all(&taken, addr, "in the parent")?;
        self.run.count("forks, the child looking");
        self.arena.give_all(taken, |record| record);
        Ok(())
    }

    fn fork_with_a_mirror(&self, taken: Taken) -> Checked {
        let addr = self.arena.addr(taken.first);
        Self::in_child("with a mirror", || {
            self.look_at_all(&taken, addr, "in the child").is_ok() && {
                self.write_all(&taken);
                child_of_its_own(self.options)
            }
        })?;
        self.look_at_all(&taken, addr, "in the parent")?;
        self.run
            .count("forks, the child with a mirror and a brk of its own");
        self.arena.give_all(taken, |record| record);
        Ok(())
    }

    fn spawn(&self, taken: Taken) -> Checked {
        let mut command = Command::new("true");
        if taken.len().is_multiple_of(2) {
            use std::os::unix::process::CommandExt;
            // SAFETY: does nothing; with it the child is forked, without it spawned like with vfork.
            unsafe { command.pre_exec(|| Ok(())) };
        }
        let status = command.status().map_err(|e| format!("spawn: {e}"))?;
        if !status.success() {
            return Err(format!("a spawned process: {status}"));
        }
        self.look_at_all(
            &taken,
            self.arena.addr(taken.first),
            "after a process was spawned",
        )?;
        self.run.count("processes spawned");
        self.arena.give_all(taken, |record| record);
        Ok(())
    }
}

/// In a forked child: mirrors memory at the end of its heap, has a device write it, and cuts it down by `brk`.
fn child_of_its_own(options: &Options) -> bool {
    const PAGES: usize = 32;
    const KEPT: usize = 12;
    let device = TestDevice::new().expect("the parent could");
    // SAFETY: grows the heap by memory that malloc does not know.
    let old = unsafe { libc::sbrk(0) }.expose_provenance();
    let start = old.next_multiple_of(PAGE);
    let grown = start - old + PAGES * PAGE;
    // SAFETY: the same.
    if unsafe { libc::sbrk(libc::intptr_t::try_from(grown).expect("small")) }.addr() != old {
        // No room behind the heap: nothing to see here.
        return true;
    }
    let map = Map {
        addr: start,
        pages: PAGES,
    };
    (0..PAGES).for_each(|page| map.write(page, page as u64 + 1));
    let mirror = map.mirror(options);
    let view = mirror.view();
    let written = (0..PAGES).all(|page| {
        let word = (page as u64 + 100).to_ne_bytes();
        device
            .write(view.region(), map.addr + page * PAGE, &word)
            .is_ok()
    });
    // SAFETY: nothing is changed.
    if unsafe { libc::sbrk(0) }.addr() != map.addr + PAGES * PAGE {
        // malloc has grown the heap behind it.
        return written && (0..PAGES).all(|page| map.read(page) == page as u64 + 100);
    }
    if !svm::Capabilities::probe().has(Capability::Events) {
        // Nobody would hear of it.
        return written && mirror.close().is_ok();
    }
    let cut = libc::intptr_t::try_from((PAGES - KEPT) * PAGE).expect("small");
    // SAFETY: what is cut off is the test's own.
    if unsafe { libc::sbrk(-cut) }.addr() == usize::MAX {
        return false;
    }
    let gone = (KEPT..PAGES).all(|page| {
        let fault = device.read(view.region(), map.addr + page * PAGE, &mut [0; 8]);
        fault.is_err_and(|e| {
            e.device_fault()
                .is_some_and(|f| f.kind == DeviceFaultKind::Unmapped)
        })
    });
    let kept = (0..KEPT).all(|page| map.read(page) == page as u64 + 100);
    written && kept && gone && mirror.close().is_ok()
}
