//! The stress: CPU threads and device workers on the same memory, every kind of operation, and an account that must
//! balance to the last write.
//!
//! # Who works on what
//!
//! | actors | memory | what is checked |
//! |---|---|---|
//! | *counters*: CPU threads and launches at once | one shared mirror, words spread over all its pages | the sum of all words is the number of additions |
//! | *pages*: CPU threads and launches at once | one shared mirror; each page has an owner token in plain memory | its taker finds the generation and the words that the last one left |
//! | *sessions*: each a CPU thread with mirrors of its own | odd sub-slices of a `Vec`, and `Buffer`s, of elements of 8, 12 and 40 bytes | a shadow copy in plain memory, element by element |
//! | *list*: one thread with a `Buffer` of linked nodes | pointers followed by a kernel | the sum along the list, and its length |
//! | *events*: one thread with mappings of its own | `madvise`, `munmap` and `fork` by bare calls under its mirrors | a number per page: what it was given last, or zero since it was discarded |
//!
//! All of it runs at once on the same accelerators, whose memory may be smaller than the set.
//!
//! A token is taken and given back with Acquire and Release, so whoever holds it knows what must be in the page: a write that
//! was lost, a stale copy or a zero page shows at the next look.

use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use accel_sim::{Accelerator, indices};
use bytemuck::{Pod, Zeroable};
use svm::{Buffer, Capability, Delivery, Granule, Mirror, Options, Ptr, View, ViewMut};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// What a stress does, and for how long.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// How long it starts new operations.
    pub time: Duration,
    /// Chooses the operations; the interleaving is the machine's.
    pub seed: u64,
    /// The door for CPU faults.
    pub delivery: Delivery,
    /// The granule of all mirrors.
    pub granule: Granule,
    /// Workers of each accelerator.
    pub workers: usize,
    /// Bytes of memory of each accelerator.
    pub device_memory: Option<usize>,
    /// Accelerators on the same memory.
    pub accelerators: usize,
    /// Threads with mirrors of their own.
    pub sessions: usize,
    /// Pages of each shared mirror.
    pub shared_pages: usize,
    /// Only these kinds of actors, if not empty: `counters`, `pages`, `sessions`, `list`, `events`.
    pub only: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(1),
            seed: 1,
            delivery: Delivery::Inline,
            granule: Granule::Big,
            workers: 2,
            device_memory: Some(4 << 20),
            accelerators: 2,
            sessions: 3,
            shared_pages: 96,
            only: Vec::new(),
        }
    }
}

/// What a stress did.
#[derive(Debug, Default)]
pub struct Report {
    /// Operations by kind.
    pub ops: Vec<(&'static str, u64)>,
    /// What the accelerators report, all together.
    pub devices: svm::Stats,
    /// What the mirrors report, all together.
    pub mirrors: svm::Stats,
    /// Additions to the counters, all of which were found again.
    pub additions: u64,
    /// Generations of the checked pages, none of which was lost.
    pub generations: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, n) in &self.ops {
            writeln!(f, "  {n:>12}  {kind}")?;
        }
        let s = &self.mirrors;
        let cpu = s.cpu_read_faults
            + s.cpu_write_faults
            + s.cpu_protect_faults
            + s.cpu_zero_fills
            + s.cpu_spurious_faults;
        let device = s.device_read_faults + s.device_write_faults;
        writeln!(f, "  {cpu:>12}  CPU faults")?;
        writeln!(
            f,
            "  {device:>12}  device fault rounds, {} retries, {} waits",
            s.retries, s.waits
        )?;
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
            "nothing lost: {} additions, {} page generations",
            self.additions, self.generations
        )
    }
}

const KINDS: [&str; 18] = [
    "counter additions, CPU",
    "counter additions, device",
    "checked pages, CPU",
    "checked pages, device",
    "chunk kernels, writing",
    "chunk kernels, reading",
    "element kernels",
    "launches beside CPU reads",
    "CPU reads",
    "CPU writes",
    "pins with read(2)",
    "pins with write(2)",
    "releases",
    "mirrors made and dropped",
    "lists walked",
    "ranges discarded",
    "ranges unmapped and mapped anew",
    "forks",
];

/// A generator of numbers that is good enough to choose by: SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

pub(crate) const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

type Checked = Result<(), String>;

/// What all actors share.
struct Run {
    config: Config,
    options: Options,
    accels: Vec<Accelerator>,
    ends: Instant,
    failed: AtomicBool,
    failure: Mutex<Option<String>>,
    ops: [AtomicU64; KINDS.len()],
    mirrors: Mutex<svm::Stats>,
}

impl Run {
    fn goes_on(&self) -> bool {
        !self.failed.load(Ordering::Relaxed) && Instant::now() < self.ends
    }

    fn has(&self, actor: &str) -> bool {
        self.config.only.is_empty() || self.config.only.iter().any(|o| o == actor)
    }

    fn count(&self, kind: &'static str, n: u64) {
        let at = KINDS
            .iter()
            .position(|k| *k == kind)
            .expect("a kind of the table");
        self.ops[at].fetch_add(n, Ordering::Relaxed);
    }

    fn fail(&self, what: String) {
        self.failed.store(true, Ordering::Relaxed);
        self.failure
            .lock()
            .expect("no panic while it is held")
            .get_or_insert(what);
    }

    fn check(&self, actor: &str, result: Checked) {
        if let Err(what) = result {
            self.fail(format!("{actor}: {what}"));
        }
    }

    fn accel(&self, rng: &mut Rng) -> &Accelerator {
        &self.accels[rng.below(self.accels.len())]
    }

    fn absorb(&self, stats: svm::Stats) {
        *self.mirrors.lock().expect("no panic while it is held") += stats;
    }
}

fn error(what: &'static str) -> impl Fn(accel_sim::Error) -> String {
    move |e| format!("{what}: {e}")
}

/// Runs the stress.
///
/// # Errors
/// What was lost, or failed; or an anomaly that the runtime counted.
pub fn run(config: &Config) -> Result<Report, String> {
    let accels = (0..config.accelerators)
        .map(|_| {
            let mut options = accel_sim::Options::new()
                .workers(config.workers)
                .fault_timeout(Duration::from_secs(20));
            if let Some(bytes) = config.device_memory {
                options = options.memory_bytes(bytes);
            }
            Accelerator::with_options(options).map_err(error("accelerator"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let run = Run {
        options: Options::new()
            .delivery(config.delivery)
            .granule(config.granule),
        config: config.clone(),
        accels,
        ends: Instant::now() + config.time,
        failed: AtomicBool::new(false),
        failure: Mutex::new(None),
        ops: [const { AtomicU64::new(0) }; KINDS.len()],
        mirrors: Mutex::new(svm::Stats::default()),
    };
    let mut report = Report::default();
    std::thread::scope(|scope| {
        let run = &run;
        let counters = run
            .has("counters")
            .then(|| scope.spawn(move || counters(run)));
        let pages = run.has("pages").then(|| scope.spawn(move || pages(run)));
        if run.has("list") {
            scope.spawn(move || run.check("list", list(run)));
        }
        // Without MOVE no word of a discard is asked for, and without events of nothing at all.
        let capabilities = svm::Capabilities::probe();
        if run.has("events")
            && capabilities.has(Capability::Events)
            && capabilities.has(Capability::Move)
        {
            scope.spawn(move || run.check("events", events(run)));
        }
        for i in 0..if run.has("sessions") {
            config.sessions
        } else {
            0
        } {
            let rng = Rng(mix(config.seed ^ mix(100 + i as u64)));
            scope.spawn(move || match i % 3 {
                0 => run.check("sessions of 8 bytes", sessions::<Word>(run, rng)),
                1 => run.check("sessions of 12 bytes", sessions::<Twelve>(run, rng)),
                _ => run.check("sessions of 40 bytes", sessions::<Forty>(run, rng)),
            });
        }
        let joined = |thread: Option<std::thread::ScopedJoinHandle<'_, Result<u64, String>>>,
                      actor: &str| {
            match thread.map(|t| t.join().unwrap_or_else(|_| Err("panicked".into()))) {
                None => 0,
                Some(Ok(n)) => n,
                Some(Err(what)) => {
                    run.fail(format!("{actor}: {what}"));
                    0
                }
            }
        };
        report.additions = joined(counters, "counters");
        report.generations = joined(pages, "pages");
    });
    report.ops = KINDS
        .iter()
        .zip(&run.ops)
        .map(|(kind, n)| (*kind, n.load(Ordering::Relaxed)))
        .collect();
    for accel in &run.accels {
        report.devices += accel.stats().runtime;
    }
    report.mirrors = *run.mirrors.lock().expect("no panic while it is held");
    let failure = run
        .failure
        .lock()
        .expect("no panic while it is held")
        .take();
    if let Some(failure) = failure {
        return Err(format!("{failure}\n{report:?}"));
    }
    if report.mirrors.anomalies + report.devices.anomalies != 0 {
        return Err(format!("the runtime counted anomalies: {report:?}"));
    }
    let resident: usize = run.accels.iter().map(Accelerator::resident_bytes).sum();
    if resident != 0 {
        return Err(format!(
            "{resident} bytes are resident on devices after every mirror was dropped"
        ));
    }
    Ok(report)
}

/// CPU threads and launches add to the same words.
fn counters(run: &Run) -> Result<u64, String> {
    let n = run.config.shared_pages * WORDS;
    let mut buffer = Buffer::<u64>::with_options(n, &run.options).map_err(|e| e.to_string())?;
    let added = AtomicU64::new(0);
    let shared = buffer.share();
    // Half of the additions go to a few hot words, one page apart; the others anywhere.
    let place = |r: u64| {
        let r2 = mix(r) as usize;
        if r & 1 == 0 {
            r2 % 8 * WORDS + 3
        } else {
            r2 % n
        }
    };
    std::thread::scope(|scope| {
        for t in 0..2u64 {
            let (shared, added) = (&shared, &added);
            let mut rng = Rng(mix(run.config.seed ^ mix(t + 1)));
            scope.spawn(move || {
                while run.goes_on() {
                    for _ in 0..64 {
                        shared.fetch_add(place(rng.next()), 1, Ordering::Relaxed);
                    }
                    added.fetch_add(64, Ordering::Relaxed);
                    run.count(KINDS[0], 64);
                }
            });
        }
        for (a, accel) in run.accels.iter().enumerate() {
            let (shared, added) = (&shared, &added);
            let mut rng = Rng(mix(run.config.seed ^ mix(10 + a as u64)));
            scope.spawn(move || {
                while run.goes_on() {
                    let (items, base) = (1 + rng.below(2000), rng.next());
                    let done = accel.run_items(items, shared.view(), |_lane, i, words| {
                        words.fetch_add(place(mix(base ^ i as u64)), 1).map(drop)
                    });
                    if let Err(e) = done {
                        return run.fail(format!("counters, launch: {e}"));
                    }
                    added.fetch_add(items as u64, Ordering::Relaxed);
                    run.count(KINDS[1], items as u64);
                }
            });
        }
    });
    run.absorb(buffer.stats());
    let sum: u64 = buffer.as_slice().iter().sum();
    let added = added.into_inner();
    if sum != added && !run.failed.load(Ordering::Relaxed) {
        return Err(format!("{added} additions were made, and {sum} found"));
    }
    Ok(added)
}

/// What word `i` of page `page` is in generation `generation`.
fn word(page: usize, generation: u64, i: usize) -> u64 {
    if generation == 0 {
        0
    } else {
        mix(generation << 32 | (page as u64) << 12 | i as u64)
    }
}

/// The owner tokens of the checked pages: in each, whether it is taken (bit 0), and the generation its words are of.
struct Tokens(Vec<AtomicU64>);

impl Tokens {
    /// Takes a page, unless it is taken; says its generation.
    fn take(&self, page: usize) -> Option<u64> {
        let token = self.0[page].load(Ordering::Relaxed);
        // Acquire pairs with the Release of `give`: the words that the last owner left are there.
        let free = token & 1 == 0
            && self.0[page]
                .compare_exchange(token, token | 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        free.then_some(token >> 1)
    }

    fn give(&self, page: usize, generation: u64) {
        self.0[page].store(generation << 1, Ordering::Release);
    }
}

/// CPU threads and launches take pages, look whether all words are as the last owner left them, and write new ones.
fn pages(run: &Run) -> Result<u64, String> {
    let nr = run.config.shared_pages;
    // A mirror of a heap slice, so that there are edges too, and pages that nobody ever touched.
    let mut memory = vec![0u64; nr * WORDS];
    let mut mirror = svm::mirror_with(&mut memory, &run.options).map_err(|e| e.to_string())?;
    let tokens = Tokens((0..nr).map(|_| AtomicU64::new(0)).collect());
    let shared = mirror.share();
    std::thread::scope(|scope| {
        for t in 0..2u64 {
            let (shared, tokens) = (&shared, &tokens);
            let mut rng = Rng(mix(run.config.seed ^ mix(20 + t)));
            scope.spawn(move || {
                while run.goes_on() {
                    let page = rng.below(nr);
                    let Some(generation) = tokens.take(page) else { continue };
                    for i in 0..WORDS {
                        let (found, wanted) = (shared.load(page * WORDS + i), word(page, generation, i));
                        if found != wanted {
                            return run.fail(format!("CPU: page {page} word {i} of generation {generation}: {found:#x}, not {wanted:#x}"));
                        }
                    }
                    let write = rng.below(3) != 0;
                    for i in 0..if write { WORDS } else { 0 } {
                        shared.store(page * WORDS + i, word(page, generation + 1, i));
                    }
                    tokens.give(page, generation + u64::from(write));
                    run.count(KINDS[2], 1);
                }
            });
        }
        for (a, accel) in run.accels.iter().enumerate() {
            let (shared, tokens) = (&shared, &tokens);
            let mut rng = Rng(mix(run.config.seed ^ mix(30 + a as u64)));
            scope.spawn(move || {
                while run.goes_on() {
                    let (items, base) = (1 + rng.below(64), rng.next());
                    let done = accel.run_items(items, shared.view(), |_lane, item, words| {
                        let r = mix(base ^ item as u64);
                        let page = r as usize % nr;
                        let Some(generation) = tokens.take(page) else { return Ok(()) };
                        for i in 0..WORDS {
                            let (found, wanted) = (words.load(page * WORDS + i)?, word(page, generation, i));
                            if found != wanted {
                                run.fail(format!("device: page {page} word {i} of generation {generation}: {found:#x}, not {wanted:#x}"));
                                return Ok(());
                            }
                        }
                        let write = r >> 32 & 1 == 0;
                        for i in 0..if write { WORDS } else { 0 } {
                            words.store(page * WORDS + i, word(page, generation + 1, i))?;
                        }
                        tokens.give(page, generation + u64::from(write));
                        run.count(KINDS[3], 1);
                        Ok(())
                    });
                    if let Err(e) = done {
                        return run.fail(format!("pages, launch: {e}"));
                    }
                }
            });
        }
    });
    run.absorb(mirror.stats());
    mirror.close().map_err(|e| e.to_string())?;
    let mut total = 0;
    for (page, words) in memory.chunks(WORDS).enumerate() {
        let token = tokens.0[page].load(Ordering::Acquire);
        let (generation, taken) = (token >> 1, token & 1 == 1);
        let wrong = words
            .iter()
            .enumerate()
            .find(|&(i, &w)| w != word(page, generation, i));
        if let Some((i, w)) = wrong.filter(|_| !taken) {
            return Err(format!(
                "at home: page {page} word {i} of generation {generation} is {w:#x}"
            ));
        }
        total += generation;
    }
    Ok(total)
}

/// An element of a session's memory.
trait Element: Pod + PartialEq + fmt::Debug + Send + Sync {
    fn new(seed: u64) -> Self;
    fn step(self, by: u64) -> Self;
}

#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(transparent)]
struct Word(u64);

#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Twelve([u32; 3]);

#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Forty([u64; 5]);

impl Element for Word {
    fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    fn step(self, by: u64) -> Self {
        Self(self.0.wrapping_mul(3).wrapping_add(by))
    }
}

impl Element for Twelve {
    fn new(seed: u64) -> Self {
        Self([0, 1, 2].map(|i| mix(seed ^ i << 40) as u32))
    }

    fn step(self, by: u64) -> Self {
        Self(self.0.map(|x| x.wrapping_mul(3).wrapping_add(by as u32)))
    }
}

impl Element for Forty {
    fn new(seed: u64) -> Self {
        Self([0, 1, 2, 3, 4].map(|i| mix(seed ^ i << 40)))
    }

    fn step(self, by: u64) -> Self {
        Self(self.0.map(|x| x.wrapping_mul(3).wrapping_add(by)))
    }
}

/// What a `Mirror` and a `Buffer` have in common.
trait Mirrored<T: Pod> {
    fn view(&self) -> View<'_, T>;
    fn view_mut(&mut self) -> ViewMut<'_, T>;
    fn as_slice(&self) -> &[T];
    fn as_mut_slice(&mut self) -> &mut [T];
    fn pin(&self, range: std::ops::Range<usize>) -> svm::Result<svm::Pin<'_>>;
    fn advise_read_mostly(&self, yes: bool);
}

macro_rules! mirrored {
    ($($type:ty),*) => { $(
        impl<T: Pod> Mirrored<T> for $type {
            fn view(&self) -> View<'_, T> { self.view() }
            fn view_mut(&mut self) -> ViewMut<'_, T> { self.view_mut() }
            fn as_slice(&self) -> &[T] { self.as_slice() }
            fn as_mut_slice(&mut self) -> &mut [T] { self.as_mut_slice() }
            fn pin(&self, range: std::ops::Range<usize>) -> svm::Result<svm::Pin<'_>> { self.pin(range) }
            fn advise_read_mostly(&self, yes: bool) { self.advise_read_mostly(yes); }
        }
    )* };
}

mirrored!(Mirror<'_, T>, Buffer<T>);

/// Mirrors memory of its own again and again, and works on it from both sides.
fn sessions<T: Element>(run: &Run, mut rng: Rng) -> Checked {
    let size = size_of::<T>();
    let mut memory: Vec<T> = (0..(5 << 20) / size).map(|i| T::new(i as u64)).collect();
    while run.goes_on() {
        // Below a page, some pages, a good part of a block, more than one block.
        let bytes = [PAGE / 2, 3 * PAGE, 40 * PAGE, 1 << 20, 3 << 20][rng.below(5)];
        let len = rng.below(bytes / size) + 1;
        let start = rng.below(memory.len() - len);
        if rng.below(2) == 0 {
            let mut shadow = memory[start..start + len].to_vec();
            let around = (
                memory[..start].last().copied(),
                memory.get(start + len).copied(),
            );
            let mut mirror = svm::mirror_with(&mut memory[start..start + len], &run.options)
                .map_err(|e| e.to_string())?;
            session(run, &mut rng, &mut mirror, &mut shadow)?;
            run.absorb(mirror.stats());
            mirror.close().map_err(|e| e.to_string())?;
            same("at home", &memory[start..start + len], &shadow, 0)?;
            let now = (
                memory[..start].last().copied(),
                memory.get(start + len).copied(),
            );
            if now != around {
                return Err("a neighbour of the slice has changed".into());
            }
        } else {
            let mut buffer = Buffer::with_options(len, &run.options).map_err(|e| e.to_string())?;
            let mut shadow = vec![T::zeroed(); len];
            session(run, &mut rng, &mut buffer, &mut shadow)?;
            run.absorb(buffer.stats());
        }
        run.count(KINDS[13], 1);
    }
    Ok(())
}

fn same<T: Element>(what: &str, found: &[T], wanted: &[T], first: usize) -> Checked {
    match found.iter().zip(wanted).position(|(f, w)| f != w) {
        None => Ok(()),
        Some(i) => {
            let wrong = found.iter().zip(wanted).filter(|(f, w)| f != w).count();
            let at = (&raw const found[i]).addr();
            Err(format!(
                "{what}: element {} ({at:#x}) is {:x?}, not {:x?}; {wrong} of {} differ",
                first + i,
                found[i],
                wanted[i],
                found.len()
            ))
        }
    }
}

fn session<T: Element>(
    run: &Run,
    rng: &mut Rng,
    memory: &mut impl Mirrored<T>,
    shadow: &mut [T],
) -> Checked {
    let len = shadow.len();
    for _ in 0..2 + rng.below(30) {
        if !run.goes_on() {
            return Ok(());
        }
        let accel = run.accel(rng);
        let from = rng.below(len);
        let range = from..from + 1 + rng.below(len - from);
        let by = rng.next();
        match rng.below(14) {
            0 | 1 => {
                accel
                    .run(memory.view_mut(), |chunk| {
                        chunk.iter_mut().for_each(|x| *x = x.step(by));
                    })
                    .map_err(error("chunk kernel, writing"))?;
                shadow.iter_mut().for_each(|x| *x = x.step(by));
                run.count(KINDS[4], 1);
            }
            2 => {
                let wrong = Mutex::new(Ok(()));
                let wanted = &*shadow;
                accel
                    .run((indices(), memory.view()), |(i, chunk)| {
                        if let Err(what) = same("in a chunk", chunk, &wanted[i.clone()], i.start) {
                            *wrong.lock().expect("no panic while it is held") = Err(what);
                        }
                    })
                    .map_err(error("chunk kernel, reading"))?;
                wrong.into_inner().expect("no panic while it is held")?;
                run.count(KINDS[5], 1);
            }
            3 | 4 => {
                let stride = 1 + rng.below(200);
                accel
                    .run_items(
                        len.div_ceil(stride),
                        memory.view_mut(),
                        |_lane, i, elements| {
                            let x = elements.load(i * stride)?;
                            elements.store(i * stride, x.step(by))
                        },
                    )
                    .map_err(error("element kernel"))?;
                shadow
                    .iter_mut()
                    .step_by(stride)
                    .for_each(|x| *x = x.step(by));
                run.count(KINDS[6], 1);
            }
            5 => {
                let wrong = Mutex::new(Ok(()));
                let wanted = &*shadow;
                let on_cpu = memory.as_slice();
                accel
                    .scope(|scope| {
                        let launch = scope.launch((indices(), memory.view()), |(i, chunk)| {
                            // The kernel reads the same memory as a CPU too (hazards W1).
                            let mirrored = &on_cpu[i.clone()];
                            let checked = same("in a chunk", chunk, &wanted[i.clone()], i.start)
                                .and_then(|()| {
                                    same(
                                        "on the worker's CPU",
                                        mirrored,
                                        &wanted[i.clone()],
                                        i.start,
                                    )
                                });
                            if let Err(what) = checked {
                                *wrong.lock().expect("no panic while it is held") = Err(what);
                            }
                        })?;
                        let here = same(
                            "beside a launch",
                            &on_cpu[range.clone()],
                            &wanted[range.clone()],
                            range.start,
                        );
                        if let Err(what) = here {
                            *wrong.lock().expect("no panic while it is held") = Err(what);
                        }
                        launch.wait()
                    })
                    .map_err(error("launch beside CPU reads"))?;
                wrong.into_inner().expect("no panic while it is held")?;
                run.count(KINDS[7], 1);
            }
            6 | 7 => {
                same(
                    "on the CPU",
                    &memory.as_slice()[range.clone()],
                    &shadow[range.clone()],
                    range.start,
                )?;
                run.count(KINDS[8], 1);
            }
            8 | 9 => {
                for (i, x) in memory.as_mut_slice()[range.clone()].iter_mut().enumerate() {
                    *x = T::new(by ^ i as u64);
                }
                shadow[range]
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, x)| *x = T::new(by ^ i as u64));
                run.count(KINDS[9], 1);
            }
            10 => {
                let zero = std::fs::File::open("/dev/zero").map_err(|e| e.to_string())?;
                let target = memory.as_mut_slice()[range.clone()].as_mut_ptr();
                let pin = memory.pin(range.clone()).map_err(|e| e.to_string())?;
                let bytes = range.len() * size_of::<T>();
                // SAFETY: the range is inside the mirror, which is exclusively ours, and pinned.
                let n = unsafe { libc::read(zero.as_raw_fd(), target.cast(), bytes) };
                if usize::try_from(n) != Ok(bytes) {
                    return Err(format!(
                        "read(2) of {bytes} pinned bytes: {n}, {}",
                        std::io::Error::last_os_error()
                    ));
                }
                drop(pin);
                shadow[range].fill(T::zeroed());
                run.count(KINDS[10], 1);
            }
            11 => {
                let wanted: &[u8] = bytemuck::cast_slice(&shadow[range.clone()]);
                let found = accel
                    .scope(|scope| {
                        let launch = scope.launch(memory.view(), |chunk| {
                            std::hint::black_box(chunk);
                        })?;
                        let found = written(&*memory, range.clone());
                        launch.wait()?;
                        Ok(found)
                    })
                    .map_err(error("launch beside a pin"))??;
                if found != wanted {
                    return Err("write(2) of pinned memory wrote something else".into());
                }
                run.count(KINDS[11], 1);
            }
            12 => {
                accel.release().map_err(error("release"))?;
                run.count(KINDS[12], 1);
            }
            _ => memory.advise_read_mostly(rng.below(2) == 0),
        }
    }
    same("at the end of a session", memory.as_slice(), shadow, 0)
}

/// The bytes of `range`, as a system call sees them while they are pinned.
fn written<T: Pod>(
    memory: &impl Mirrored<T>,
    range: std::ops::Range<usize>,
) -> Result<Vec<u8>, String> {
    // SAFETY: the name is a C string; a new descriptor, or -1.
    let fd = unsafe { libc::memfd_create(c"stress".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error().to_string());
    }
    // SAFETY: the descriptor is new, and nobody else's.
    let file = std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let source: &[u8] = bytemuck::cast_slice(&memory.as_slice()[range.clone()]);
    let pin = memory.pin(range).map_err(|e| e.to_string())?;
    let mut out = vec![0; source.len()];
    // SAFETY: the source is a slice, and pinned.
    let n = unsafe { libc::write(file.as_raw_fd(), source.as_ptr().cast(), source.len()) };
    if usize::try_from(n) != Ok(source.len()) {
        return Err(format!(
            "write(2) of {} pinned bytes: {n}, {}",
            source.len(),
            std::io::Error::last_os_error()
        ));
    }
    drop(pin);
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut out, 0).map_err(|e| e.to_string())?;
    Ok(out)
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Node {
    value: u64,
    next: Ptr<Node>,
    _pad: [u64; 6],
}

/// A list in random order that a kernel walks, one node after the other, while the CPU relinks it between walks.
fn list(run: &Run) -> Checked {
    let n = 3000;
    let mut rng = Rng(mix(run.config.seed ^ mix(40)));
    let mut nodes = Buffer::<Node>::with_options(n, &run.options).map_err(|e| e.to_string())?;
    while run.goes_on() {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let length = 1 + rng.below(n);
        let at = nodes.view().addr();
        let slice = nodes.as_mut_slice();
        for (k, &i) in order.iter().enumerate() {
            let next = order.get(k + 1).filter(|_| k + 1 < length);
            let next = next.map_or(Ptr::null(), |&j| Ptr::from_addr(at + j * size_of::<Node>()));
            slice[i] = Node {
                value: rng.next() >> 24,
                next,
                _pad: [0; 6],
            };
        }
        let wanted: u64 = order[..length].iter().map(|&i| slice[i].value).sum();
        let head: Ptr<Node> = Ptr::from_addr(at + order[0] * size_of::<Node>());
        let found = Mutex::new((0, 0));
        run.accel(&mut rng)
            .run_items(1, nodes.view_mut(), |lane, _, _| {
                let (mut ptr, mut sum, mut steps) = (head, 0u64, 0);
                while !ptr.is_null() {
                    let node = lane.load(ptr)?;
                    lane.store(
                        ptr,
                        Node {
                            value: node.value + 1,
                            ..node
                        },
                    )?;
                    sum += node.value;
                    steps += 1;
                    ptr = node.next;
                }
                *found.lock().expect("no panic while it is held") = (sum, steps);
                Ok(())
            })
            .map_err(error("list"))?;
        let found = found.into_inner().expect("no panic while it is held");
        if found != (wanted, length) {
            return Err(format!(
                "sum and length {found:?}, not {:?}",
                (wanted, length)
            ));
        }
        let after: u64 = order[..length]
            .iter()
            .map(|&i| nodes.as_slice()[i].value)
            .sum();
        if after != wanted + length as u64 {
            return Err(format!(
                "the kernel's stores: sum {after}, not {}",
                wanted + length as u64
            ));
        }
        run.count(KINDS[14], 1);
    }
    run.absorb(nodes.stats());
    Ok(())
}

/// Changes mappings under mirrors by bare system calls. A page holds one number; zero once it was discarded or mapped anew.
fn events(run: &Run) -> Checked {
    const PAGES: usize = 600;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let mut rng = Rng(mix(run.config.seed ^ mix(50)));
    while run.goes_on() {
        // SAFETY: a fresh mapping.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE,
                protection,
                anonymous,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().to_string());
        }
        let start = map.expose_provenance();
        let at = |page: usize| std::ptr::with_exposed_provenance_mut::<u64>(start + page * PAGE);
        let mut wanted = [0u64; PAGES];
        let mut mapped_anew = [false; PAGES];
        // SAFETY: the mapping stays until the end of the loop, but for what is done to it by system calls.
        let mut mirror = unsafe { svm::mirror_raw(map.cast(), PAGES * PAGE, &run.options) }
            .map_err(|e| e.to_string())?;
        for _ in 0..40 {
            if !run.goes_on() {
                break;
            }
            let first = rng.below(PAGES);
            let pages = first..first + 1 + rng.below((PAGES - first).min(70));
            let number = rng.next() | 1;
            match rng.below(9) {
                0 | 1 => {
                    for page in pages {
                        // SAFETY: inside the mapping, used by this thread alone.
                        unsafe { at(page).write_volatile(number) };
                        wanted[page] = number;
                    }
                }
                2..=4 => {
                    let write = rng.below(2) == 0;
                    let (accel, first) = (run.accel(&mut rng), pages.start);
                    // What was mapped anew is no part of the mirror any more, and a fault to the device.
                    let inside = !mapped_anew[pages.clone()].contains(&true);
                    let (expected, base) = (&wanted, Ptr::<u64>::from_addr(start));
                    let wrong = AtomicU64::new(u64::MAX);
                    let done = accel.run_items(pages.len(), mirror.view_mut(), |lane, i, _| {
                        let ptr = base.add((first + i) * WORDS);
                        if lane.load(ptr)? != expected[first + i] {
                            wrong.store((first + i) as u64, Ordering::Relaxed);
                        }
                        if write {
                            lane.store(ptr, number)
                        } else {
                            Ok(())
                        }
                    });
                    let wrong = wrong.into_inner();
                    if wrong != u64::MAX {
                        return Err(format!("the device found something else in page {wrong}"));
                    }
                    match done {
                        Ok(()) if !inside => {
                            return Err(format!(
                                "the device used pages {pages:?}, some of which were unmapped"
                            ));
                        }
                        Ok(()) => wanted[pages]
                            .iter_mut()
                            .filter(|_| write)
                            .for_each(|w| *w = number),
                        Err(e) if inside => return Err(format!("events, launch: {e}")),
                        // It wrote some of them, or none.
                        Err(_) => {
                            for page in pages {
                                // SAFETY: inside the mapping.
                                let found = unsafe { at(page).read_volatile() };
                                let known = found == wanted[page]
                                    || (write && !mapped_anew[page] && found == number);
                                if !known {
                                    return Err(format!(
                                        "after a failed launch page {page} is {found:#x}, not {:#x}",
                                        wanted[page]
                                    ));
                                }
                                wanted[page] = found;
                            }
                        }
                    }
                }
                5 | 6 => {
                    // SAFETY: the mapping is this thread's.
                    let done = unsafe {
                        libc::madvise(
                            at(pages.start).cast(),
                            pages.len() * PAGE,
                            libc::MADV_DONTNEED,
                        )
                    };
                    if done != 0 {
                        return Err(format!("madvise: {}", std::io::Error::last_os_error()));
                    }
                    wanted[pages].fill(0);
                    run.count(KINDS[15], 1);
                }
                7 => {
                    let flags = anonymous | libc::MAP_FIXED;
                    // SAFETY: over this thread's own mapping.
                    let anew = unsafe {
                        libc::mmap(
                            at(pages.start).cast(),
                            pages.len() * PAGE,
                            protection,
                            flags,
                            -1,
                            0,
                        )
                    };
                    if anew == libc::MAP_FAILED {
                        return Err(format!("mmap: {}", std::io::Error::last_os_error()));
                    }
                    wanted[pages.clone()].fill(0);
                    mapped_anew[pages].fill(true);
                    run.count(KINDS[16], 1);
                }
                _ if rng.below(4) == 0 => {
                    // SAFETY: the child only reads memory and exits.
                    let child = unsafe { libc::fork() };
                    if child == 0 {
                        // SAFETY: inside the mapping, which the child has a copy of.
                        let same = (0..PAGES)
                            .all(|page| unsafe { at(page).read_volatile() } == wanted[page]);
                        // SAFETY: ends the child without running what is the parent's to run.
                        unsafe { libc::_exit(i32::from(!same)) };
                    }
                    let mut status = 0;
                    // SAFETY: waits for the child just made, if there is one.
                    let ended = unsafe { libc::waitpid(child, &raw mut status, 0) };
                    if child < 0 || ended != child || status != 0 {
                        return Err(format!(
                            "a forked child found something else: status {status:#x}"
                        ));
                    }
                    run.count(KINDS[17], 1);
                }
                _ => {}
            }
            let page = rng.below(PAGES);
            // SAFETY: inside the mapping.
            let found = unsafe { at(page).read_volatile() };
            if found != wanted[page] {
                return Err(format!(
                    "page {page} is {found:#x}, not {:#x}",
                    wanted[page]
                ));
            }
        }
        run.absorb(mirror.stats());
        mirror.close().map_err(|e| e.to_string())?;
        for (page, &wanted) in wanted.iter().enumerate() {
            // SAFETY: inside the mapping.
            let found = unsafe { at(page).read_volatile() };
            if found != wanted {
                return Err(format!(
                    "at home: page {page} is {found:#x}, not {wanted:#x}"
                ));
            }
        }
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(map, PAGES * PAGE) };
    }
    Ok(())
}
