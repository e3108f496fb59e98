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

mod arena;
mod changes;
mod children;
mod era;
mod touches;
mod work;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use accel_sim::Accelerator;
use svm::{Capability, Delivery};

const PAGE: usize = 4096;

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
    /// Bare `mremap`s that the kernel refused while a thread forked, and that were made again.
    pub refused: u64,
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
        writeln!(
            f,
            "  {:>12}  bare calls of mremap refused beside a fork, and made again",
            self.refused
        )?;
        write!(
            f,
            "nothing lost: {} looks at pages, each as it had to be",
            self.looks
        )
    }
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
    refused: AtomicU64,
    /// Read while one forks; who writes has nobody fork.
    forks: RwLock<()>,
    mirrors: Mutex<svm::Stats>,
    /// Changes begun, of those that are made before chance decides.
    first: AtomicUsize,
    /// Whether bare calls of these kinds are heard of.
    hears_removal: bool,
    hears_unmapping: bool,
}

impl Run {
    fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    fn goes_on(&self) -> bool {
        let now = Instant::now();
        let has_time = now < self.ends
            || (now < self.ends + GRACE && self.config.time >= REASONABLE && self.untried() > 0);
        !self.has_failed() && has_time
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
/// What was lost, or failed; or an anomaly that the runtime counted; or that no page was looked at.
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
        refused: AtomicU64::new(0),
        forks: RwLock::new(()),
        mirrors: Mutex::new(svm::Stats::default()),
        first: AtomicUsize::new(0),
        hears_removal: capabilities.has(Capability::Events) && capabilities.has(Capability::Move),
        hears_unmapping: capabilities.has(Capability::Events),
    };
    std::thread::scope(|scope| {
        for n in 0..config.arenas {
            let run = &run;
            scope.spawn(move || run.check(&format!("arena {n}"), era::arena(run, n)));
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
        refused: run.refused.load(Ordering::Relaxed),
    };
    if let Some(failure) = failure {
        return Err(format!("{failure}\n{report:?}"));
    }
    if report.mirrors.anomalies != 0 {
        return Err(format!("the runtime counted anomalies: {report:?}"));
    }
    if report.looks == 0 {
        return Err("no page was looked at, and so nothing shown".into());
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
