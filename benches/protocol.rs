//! The range protocol without page tables: what a bracket and a begin cost, and who has to retry; and the translation cache.
//!
//! Beside the hub stands the design of the RFC that it replaces: one list of ranges, one sequence number for all of them.
//!
//! What is pure code is also measured piece by piece with criterion. The directory of a block and the accelerator's shootdown
//! handshake, which are nobody's interface, are included here as their files are.
//!
//! `cargo bench -p benches --bench protocol -- [--json FILE] [--plot DIR] [--quick] [FILTER]`

use std::cell::RefCell;
use std::hint::black_box;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use accel_sim::Accelerator;
use anyhow::{Context, Result, ensure};
use benches::harness::{Args, Case, Progress, Samples, Subject, WARM_UP, compare};
use benches::machine::{Company, Machine, Setting, pin_to_cpu, unpin};
use benches::report::{Note, Outcome, Results, Target as Goal, publish};
use criterion::Criterion;
use svm::notifier::{Hub, Interval, Subscription};
use svm::sync::Deadline;
use svm::{Access, Buffer, Delivery};

use block::{BlockState, DeviceId, OnRead};
use mask::PageMask;
use watched::{Shootdown, Target, Use};

#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "the bench uses a part of the files it includes"
)]
#[path = "../runtime/src/block.rs"]
mod block;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "as above")]
#[path = "../accel-sim/src/device.rs"]
mod device;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "as above")]
#[path = "../accel-sim/src/sync.rs"]
mod fences;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "as above")]
#[path = "../runtime/src/mask.rs"]
mod mask;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "as above")]
#[path = "../accel-sim/src/shootdown.rs"]
mod shootdown;
#[allow(dead_code, unreachable_pub, unused_imports, reason = "as above")]
#[path = "../accel-sim/src/table.rs"]
mod table;

#[path = "watched.rs"]
mod watched;

// What the included files name of their crates.
mod addr {
    pub(crate) use svm::addr::PAGES_PER_BLOCK;
}
mod error {
    pub(crate) use svm::Access;
}
mod options {
    pub(crate) use accel_sim::MAX_WORKERS;
}
mod shim {
    pub(crate) use core::sync::atomic;
}
#[path = "../runtime/src/sync/mutation.rs"]
#[allow(dead_code, reason = "the directory asks for one of them")]
mod mutation;
mod sync {
    pub(crate) use crate::{fences::*, mutation};

    /// Names a lock; the bench has the directory to itself.
    pub(crate) struct Mutex<T>(core::marker::PhantomData<T>);
}

/// The measuring thread's CPU, and the one of its company or of the worker that it takes pages from.
const HERE: usize = 0;
const THERE: usize = 1;

/// Operations for each sample, so that the clock does not count.
const BATCH: u64 = 256;

/// The RFC's state: a list, and one number for all.
#[derive(Default)]
struct Rfc {
    inner: Mutex<RfcInner>,
    seq: AtomicU64,
}

#[derive(Default)]
struct RfcInner {
    ranges: Vec<Interval>,
    active: u32,
}

impl Rfc {
    fn of(ranges: impl Iterator<Item = Interval>) -> Self {
        let rfc = Self::default();
        rfc.inner
            .lock()
            .expect("nobody panics")
            .ranges
            .extend(ranges);
        rfc
    }

    fn start(&self, interval: Interval) {
        let mut inner = self.inner.lock().expect("nobody panics");
        inner.active += 1;
        // Its comparison was inverted; this is what it meant.
        if inner.ranges.iter().any(|range| range.overlaps(interval)) {
            self.seq.fetch_or(1, Ordering::Relaxed);
        }
    }

    fn end(&self) {
        let mut inner = self.inner.lock().expect("nobody panics");
        inner.active -= 1;
        if inner.active == 0 && self.seq.load(Ordering::Relaxed) & 1 == 1 {
            self.seq.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until nothing is active, as it did: whatever range it may be about.
    fn begin(&self) -> u64 {
        loop {
            let inner = self.inner.lock().expect("nobody panics");
            if inner.active == 0 {
                return self.seq.load(Ordering::Relaxed);
            }
            drop(inner);
            std::hint::spin_loop();
        }
    }

    fn interrupted(&self, seq: u64) -> bool {
        self.seq.load(Ordering::Relaxed) != seq
    }
}

/// Range `i` of a set of disjoint ones.
fn nth(i: u64) -> Interval {
    Interval::new(i * 0x20_0000, i * 0x20_0000 + 0x1_0000)
}

#[derive(Clone, Copy)]
enum Step {
    /// An invalidation that overlaps one range of the set.
    Bracket,
    /// A begin and the look before the commit.
    Begin,
}

struct OfHub<'h> {
    hub: &'h Hub,
    ranges: Vec<Subscription<&'h Hub>>,
    step: Step,
}

impl Subject for OfHub<'_> {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let n = self.ranges.len() as u64;
        for i in 0..64 {
            samples.time(|| {
                for k in 0..BATCH {
                    match self.step {
                        Step::Bracket => drop(self.hub.start(nth((i * 7 + k) % n), None)),
                        Step::Begin => {
                            let range = &self.ranges[((i * 7 + k) % n) as usize];
                            black_box(
                                range
                                    .begin(Deadline::NEVER)
                                    .map(|token| range.interrupted(token))
                                    .is_ok(),
                            );
                        }
                    }
                }
            });
        }
        Ok(())
    }
}

struct OfRfc {
    rfc: Rfc,
    n: u64,
    step: Step,
}

impl Subject for OfRfc {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        for i in 0..64 {
            samples.time(|| {
                for k in 0..BATCH {
                    match self.step {
                        Step::Bracket => {
                            self.rfc.start(nth((i * 7 + k) % self.n));
                            self.rfc.end();
                        }
                        Step::Begin => {
                            black_box(self.rfc.interrupted(self.rfc.begin()));
                        }
                    }
                }
            });
        }
        Ok(())
    }
}

/// Until the other thread is at work.
fn wait_until(mut holds: impl FnMut() -> bool) {
    while !holds() {
        std::thread::yield_now();
    }
}

/// Of `n` updates, how many an invalidation interrupts that overlaps another range, and no page of theirs.
fn retries(n: u64, quick: bool) -> Vec<Note> {
    let n = if quick { n / 10 } else { n };
    let stop = AtomicBool::new(false);
    let note = |name: &str, value: f64, target| Note::new(name, value, "of 1000 updates", target);
    let per_mille = |hits: u64| hits as f64 * 1000.0 / n as f64;
    let hub = Hub::new();
    let (mine, _other) = (hub.insert(nth(0)), hub.insert(nth(1)));
    let ours = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                drop(hub.start(nth(1), None));
            }
        });
        wait_until(|| hub.counters().starts > 1000);
        let hits = (0..n)
            .filter(|_| {
                mine.begin(Deadline::NEVER).is_ok_and(|token| {
                    std::thread::yield_now();
                    mine.interrupted(token)
                })
            })
            .count() as u64;
        stop.store(true, Ordering::Relaxed);
        hits
    });
    let waits = hub.counters().waits;
    stop.store(false, Ordering::Relaxed);
    let rfc = Rfc::of([nth(0), nth(1)].into_iter());
    let theirs = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                rfc.start(nth(1));
                rfc.end();
            }
        });
        wait_until(|| rfc.seq.load(Ordering::Relaxed) > 1000);
        let hits = (0..n)
            .filter(|_| {
                let seq = rfc.begin();
                std::thread::yield_now();
                rfc.interrupted(seq)
            })
            .count() as u64;
        stop.store(true, Ordering::Relaxed);
        hits
    });
    vec![
        note(
            "retries under disjoint invalidations",
            per_mille(ours),
            Some(0.0),
        ),
        note(
            "waits under disjoint invalidations",
            per_mille(waits),
            Some(0.0),
        ),
        note(
            "retries under disjoint invalidations, the RFC\'s global number",
            per_mille(theirs),
            None,
        ),
    ]
}

/// A translation-cache hit: nanoseconds for a load, a store, and a load that the next one's address depends on.
fn hits(criterion: &mut Criterion, setting: Setting) -> Result<()> {
    const LEN: usize = 1 << 13;
    // The worker, too: it starts with its maker's CPU.
    pin_to_cpu(HERE);
    let _company = Company::for_setting(setting, THERE);
    let accel = Accelerator::with_options(accel_sim::Options::new().workers(1))?;
    let mut data = Buffer::<u64>::zeroed(LEN)?;
    // A cycle through all elements, far from one to the next.
    for (i, x) in data.as_mut_slice().iter_mut().enumerate() {
        *x = ((i + 1_579) % LEN) as u64;
    }
    let data = std::cell::RefCell::new(data);
    // Each sample is one launch; a launch that failed has no time, and ends the bench.
    let timed = |nr: u64, step: HitStep| -> Duration {
        let elapsed = Mutex::new(None);
        let mut data = data.borrow_mut();
        let run = accel.run_items(1, data.view_mut(), |_lane, _item, data| {
            let start = Instant::now();
            match step {
                HitStep::Load => {
                    let mut sum = 0;
                    for lap in (0..nr as usize).step_by(LEN) {
                        for i in 0..LEN.min(nr as usize - lap) {
                            sum += data.load(i)?;
                        }
                    }
                    black_box(sum);
                }
                HitStep::Store => {
                    // The cycle as it is: what is stored changes nothing.
                    for lap in (0..nr as usize).step_by(LEN) {
                        for i in 0..LEN.min(nr as usize - lap) {
                            data.store(i, ((i + 1_579) % LEN) as u64)?;
                        }
                    }
                }
                HitStep::Chase => {
                    let mut at = 0;
                    for _ in 0..nr {
                        at = data.load(at as usize)?;
                    }
                    black_box(at);
                }
            }
            *elapsed.lock().expect("nobody panics") = Some(start.elapsed());
            Ok(())
        });
        run.expect("a launch on resident memory");
        elapsed
            .into_inner()
            .expect("nobody panics")
            .expect("the kernel ran")
    };
    let mut group = criterion.benchmark_group(group_of_hits(setting));
    for (name, step) in [
        ("load", HitStep::Load),
        ("store", HitStep::Store),
        ("dependent load", HitStep::Chase),
    ] {
        group.bench_function(name, |b| b.iter_custom(|nr| timed(nr, step)));
    }
    group.finish();
    unpin();
    Ok(())
}

fn group_of_hits(setting: Setting) -> &'static str {
    match setting {
        Setting::Quiet => "translation-cache hit",
        Setting::Busy => "translation-cache hit beside a busy CPU",
    }
}

#[derive(Clone, Copy)]
enum HitStep {
    Load,
    Store,
    Chase,
}

/// The pure code, each piece alone: no page table, no other thread.
fn pure(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("hub");
    for n in [1, 16, 256, 4096] {
        let hub = Hub::new();
        let ranges: Vec<_> = (0..n).map(|i| hub.insert(nth(i))).collect();
        let mut i = 0;
        let mut next = move || {
            i = (i + 7) % n;
            i
        };
        group.bench_function(format!("begin and look, {n} ranges"), |b| {
            b.iter(|| {
                let range = &ranges[next() as usize];
                range
                    .begin(Deadline::NEVER)
                    .is_ok_and(|token| range.interrupted(token))
            });
        });
        group.bench_function(format!("start and end, {n} ranges, 1 overlap"), |b| {
            b.iter(|| drop(hub.start(nth(next()), None)));
        });
        group.bench_function(format!("start and end, {n} ranges, no overlap"), |b| {
            let beside = Interval::new(n * 0x20_0000, n * 0x20_0000 + 0x1000);
            b.iter(|| drop(hub.start(beside, None)));
        });
    }
    for n in [16, 256] {
        let hub = Hub::new();
        let _ranges: Vec<_> = (0..n).map(|_| hub.insert(nth(0))).collect();
        group.bench_function(format!("start and end, {n} overlaps"), |b| {
            b.iter(|| drop(hub.start(nth(0), None)));
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("rfc");
    for n in [1, 16, 256, 4096] {
        let rfc = Rfc::of((0..n).map(nth));
        group.bench_function(format!("begin and look, {n} ranges"), |b| {
            b.iter(|| rfc.interrupted(rfc.begin()));
        });
        group.bench_function(format!("start and end, {n} ranges, 1 overlap"), |b| {
            let mut i = 0;
            b.iter(|| {
                i = (i + 7) % n;
                rfc.start(nth(i));
                rfc.end();
            });
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("directory");
    let device = DeviceId::all().next().expect("there is a slot");
    let other = DeviceId::all().nth(1).expect("there are two slots");
    for (name, pages) in [
        ("4 KiB", PageMask::page(100)),
        ("64 KiB", PageMask::range(96..112)),
        ("2 MiB", PageMask::FULL),
    ] {
        let mut state: BlockState = bytemuck::Zeroable::zeroed();
        group.bench_function(format!("plan a migration of {name}"), |b| {
            b.iter(|| black_box(&state).plan(device, pages, Access::Write, OnRead::Migrate));
        });
        group.bench_function(format!("out and home, {name}"), |b| {
            b.iter(|| {
                let state = black_box(&mut state);
                state.moved_out(device, pages);
                state.moved_home(device, pages);
            });
        });
        group.bench_function(format!("duplicate for two and collapse, {name}"), |b| {
            b.iter(|| {
                let state = black_box(&mut state);
                state.filled(device, pages);
                state.filled(other, pages);
                state.revoked_all(pages, None);
                state.emptied(device, pages);
                state.emptied(other, pages);
            });
        });
        assert!(state.is_consistent(), "the directory lost a holder");
    }
    group.finish();
}

/// What criterion found, in nanoseconds, with the targets of those that have one.
fn found(dir: &Path) -> Result<Vec<Note>> {
    let mut notes = Vec::new();
    let hits = [Setting::Quiet, Setting::Busy].map(group_of_hits);
    for group in ["hub", "rfc", "directory"].into_iter().chain(hits) {
        let mut of_group = Vec::new();
        let Ok(entries) = std::fs::read_dir(dir.join(group)) else {
            continue;
        };
        for entry in entries {
            let entry = entry?.path();
            let Ok(text) = std::fs::read_to_string(entry.join("new/estimates.json")) else {
                continue;
            };
            let estimates: serde_json::Value = serde_json::from_str(&text)?;
            let id: serde_json::Value =
                serde_json::from_str(&std::fs::read_to_string(entry.join("new/benchmark.json"))?)?;
            let name = id["function_id"].as_str().context("criterion's id")?;
            let value = estimates["median"]["point_estimate"]
                .as_f64()
                .context("criterion's median")?;
            let target = match name {
                "load" | "store" => Some(2.0),
                "dependent load" => Some(5.0),
                _ => None,
            };
            of_group.push(Note::new(format!("{group}: {name}"), value, "ns", target));
        }
        of_group.sort_by(|a: &Note, b| a.name.cmp(&b.name));
        notes.extend(of_group);
    }
    Ok(notes)
}

/// From the call that takes translations away until the last worker is done with them: of the accelerator's device, by a CPU fault on
/// a page that a worker uses over and over, in spans or by elements, and of one whose workers rest. Beside it a bare membarrier, which is
/// one interrupt of each CPU that runs the process.
fn shootdowns(rounds: usize, progress: &Progress) -> Result<(Vec<Outcome>, Vec<Note>)> {
    let (mut outcomes, mut notes) = (Vec::new(), Vec::new());
    for (how, what, setting) in [
        (Use::Rests, "workers at rest", Setting::Quiet),
        (Use::Spans, "a worker in spans", Setting::Busy),
        (Use::Elements, "a worker by elements", Setting::Busy),
    ] {
        // As many pages as there are shots: nobody fetches the same one again and again, and is lent it for that.
        let target = RefCell::new(Target::new(watched::SHOTS, Delivery::Inline, how)?);
        let case = Case {
            name: format!("shootdown, {what}"),
            delivery: "-",
            setting,
            floor: "membarrier",
            // Not a ratio for the median: so much beyond it. See the notes.
            target: None,
        };
        let mut ours = Shootdown {
            target: &target,
            undisturbed: Samples::new(),
        };
        let outcome = compare(case, rounds, &mut Barrier(&target), &mut ours, progress)?;
        notes.extend(judged(&outcome));
        if setting == Setting::Busy {
            notes.extend(of_undisturbed(&outcome, &ours.undisturbed, rounds));
        }
        outcomes.push(outcome);
    }
    Ok((outcomes, notes))
}

/// A shootdown's median, beyond one interrupt where there is somebody to interrupt, and its 99th percentile over that of an interrupt.
fn judged(outcome: &Outcome) -> [Note; 2] {
    let (name, ours) = (&outcome.name, &outcome.ours);
    let (beyond, words) = match outcome.setting {
        Setting::Quiet => (ours.p50, ""),
        Setting::Busy => (
            ours.p50.saturating_sub(outcome.floor.p50),
            " beyond one interrupt",
        ),
    };
    [
        Note::new(
            format!("{name}, p50{words}"),
            beyond as f64,
            "ns",
            Some(2_000.0),
        ),
        Note::new(
            format!("{name}, p99 over one interrupt's"),
            outcome.ratio_p99,
            "x",
            Some(2.0),
        ),
    ]
}

/// How often the worker, or who waits for it, lost its CPU to another thread meanwhile, and what the others took. Who waits for an access
/// can do nothing about that: a thread in the middle of a span has to run to end it. (An interrupt needs the CPU alone, whoever runs there.)
fn of_undisturbed(outcome: &Outcome, undisturbed: &Samples, rounds: usize) -> [Note; 2] {
    let all = ((rounds + WARM_UP) * watched::SHOTS) as f64;
    let name = &outcome.name;
    [
        Note::new(
            format!("{name}: in which a thread lost its CPU"),
            (all - undisturbed.len() as f64) * 1000.0 / all,
            "of 1000",
            None,
        ),
        Note::new(
            format!("{name}: p99 of the others over one interrupt's"),
            undisturbed.quantile(0.99) as f64 / outcome.floor.p99 as f64,
            "x",
            None,
        ),
    ]
}

struct Barrier<'a>(#[allow(dead_code, reason = "keeps the worker there")] &'a RefCell<Target>);

impl Subject for Barrier<'_> {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        for _ in 0..watched::SHOTS {
            samples.time(svm::heavy_barrier);
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let args = Args::of_command_line(
        "protocol",
        "Measures the steps of the protocol, the path of a hit, the shootdown and the window of a bare call",
    );
    let mut cases = Vec::new();
    for n in [1, 16, 256, 4096] {
        for (step, what) in [
            (Step::Bracket, "start and end"),
            (Step::Begin, "begin and look"),
        ] {
            cases.push((format!("{what} x 256, {n} ranges"), n, step));
        }
    }
    let groups = ["shootdown", "window", "retries"];
    let cases = args.choose(cases, |case| &case.0, &groups);
    let machine = Machine::here();
    // Before anything is pinned: the runtime's threads start with their maker's CPUs.
    for delivery in [Delivery::Inline, Delivery::Thread] {
        drop(Buffer::<u8>::with_options(
            1,
            &svm::Options::new().delivery(delivery),
        )?);
    }
    let rounds = args.rounds(21);
    let progress = Progress::new(cases.len() + 3, rounds);
    let mut outcomes = Vec::new();
    for (name, n, step) in cases {
        let hub = Hub::new();
        let ranges = (0..n).map(|i| hub.insert(nth(i))).collect();
        let mut ours = OfHub {
            hub: &hub,
            ranges,
            step,
        };
        let mut rfc = OfRfc {
            rfc: Rfc::of((0..n).map(nth)),
            n,
            step,
        };
        // Of few ranges a list is as good as anything, and the RFC's begin takes a lock and looks at two words, whatever the ranges; the
        // tree has to win where there are many.
        let target = (matches!(step, Step::Bracket) && n >= 256).then_some(Goal::p50(1.0));
        let case = Case {
            name,
            delivery: "-",
            setting: Setting::Quiet,
            floor: "RFC",
            target,
        };
        outcomes.push(compare(case, rounds, &mut rfc, &mut ours, &progress)?);
    }
    let mut notes = Vec::new();
    if args.wants("shootdown") {
        let (cases, beyond) = shootdowns(rounds, &progress)?;
        outcomes.extend(cases);
        notes.extend(beyond);
    }
    progress.finish();
    let mut broken = Vec::new();
    if args.wants("window") {
        let (windows, late) = watched::windows(args.quick)?;
        notes.extend(windows);
        broken.extend(late);
    }
    if args.wants("retries") {
        notes.extend(retries(20_000, args.quick));
    }
    if args.filter.is_none() {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("criterion");
        let _ = std::fs::remove_dir_all(&dir);
        let time = |usual| Duration::from_millis(if args.quick { 20 } else { usual });
        let mut criterion = Criterion::default()
            .output_directory(&dir)
            .warm_up_time(time(200))
            .measurement_time(time(600))
            .sample_size(if args.quick { 10 } else { 50 });
        pure(&mut criterion);
        hits(&mut criterion, Setting::Quiet)?;
        hits(&mut criterion, Setting::Busy)?;
        notes.extend(found(&dir)?);
    }
    publish(
        "protocol",
        &args,
        &machine,
        &Results {
            cases: outcomes,
            notes,
            ..Results::default()
        },
    )?;
    // After the results, which show it too.
    ensure!(broken.is_empty(), "{}", broken.join("; "));
    Ok(())
}
