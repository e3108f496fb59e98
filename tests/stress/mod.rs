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

mod counters;
mod events;
mod list;
mod pages;
mod sessions;

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use accel_sim::Accelerator;
use svm::{Capability, Delivery, Granule, Options};

use self::counters::counters;
use self::events::events;
use self::list::list;
use self::pages::pages;
use self::sessions::{Forty, Twelve, Word, sessions};
use crate::rng::{Rng, mix};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// The kinds of actors.
pub const ACTORS: [&str; 5] = ["counters", "pages", "sessions", "list", "events"];

/// Pages that a shared mirror has at least: as many as there are words to which half of the additions go.
pub const LEAST_PAGES: usize = 8;

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
    /// Pages of each shared mirror: [`LEAST_PAGES`] or more.
    pub shared_pages: usize,
    /// Only these of the [`ACTORS`], if not empty.
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
/// What was lost, or failed; or an anomaly that the runtime counted; or that nothing was done.
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
            let rng = Rng::new(mix(config.seed ^ mix(100 + i as u64)));
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
    if report.ops.iter().all(|(_, n)| *n == 0) {
        return Err("nothing was done, and so nothing shown".into());
    }
    let resident: usize = run.accels.iter().map(Accelerator::resident_bytes).sum();
    if resident != 0 {
        return Err(format!(
            "{resident} bytes are resident on devices after every mirror was dropped"
        ));
    }
    Ok(report)
}
