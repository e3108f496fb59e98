//! The range protocol without page tables: what a bracket and a begin cost, and who has to retry; and the translation cache.
//!
//! Beside the hub stands the design of the RFC that it replaces: one list of ranges, one sequence number for all of them.
//!
//! `cargo bench -p benches --bench protocol -- [--json FILE] [--plot DIR] [--quick] [FILTER]`

use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use accel_sim::Accelerator;
use anyhow::Result;
use benches::harness::{Args, Case, Progress, Samples, Subject, compare};
use benches::machine::{Machine, Setting};
use benches::report::{Note, Results, Target, publish};
use clap::Parser;
use svm::Buffer;
use svm::notifier::{Hub, Interval, Subscription};
use svm::sync::Deadline;

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
    let note = |name: &str, value: f64, target| Note {
        name: name.into(),
        value,
        unit: "of 1000 updates",
        target,
    };
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
    let rfc = Rfc::default();
    rfc.inner
        .lock()
        .expect("nobody panics")
        .ranges
        .extend([nth(0), nth(1)]);
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
fn hits(quick: bool) -> Result<Vec<Note>> {
    const LEN: usize = 1 << 13;
    let repeats = if quick { 20 } else { 400 };
    let accel = Accelerator::with_options(accel_sim::Options::new().workers(1))?;
    let mut data = Buffer::<u64>::zeroed(LEN)?;
    // A cycle through all elements, far from one to the next.
    for (i, x) in data.as_mut_slice().iter_mut().enumerate() {
        *x = ((i + 1_579) % LEN) as u64;
    }
    let best = [const { AtomicU64::new(u64::MAX) }; 3];
    let keep = |slot: &AtomicU64, start: Instant| {
        // Hundredths of a nanosecond.
        let each = start.elapsed().as_nanos() as u64 * 100 / LEN as u64;
        slot.fetch_min(each, Ordering::Relaxed);
    };
    accel.run_items(1, data.view_mut(), |_lane, _item, data| {
        for _ in 0..repeats {
            let start = Instant::now();
            let mut sum = 0;
            for i in 0..LEN {
                sum += data.load(i)?;
            }
            black_box(sum);
            keep(&best[0], start);
            let start = Instant::now();
            let mut at = 0;
            for _ in 0..LEN {
                at = data.load(at as usize)?;
            }
            black_box(at);
            keep(&best[2], start);
        }
        for _ in 0..repeats {
            let start = Instant::now();
            for i in 0..LEN {
                data.store(i, i as u64)?;
            }
            keep(&best[1], start);
        }
        Ok(())
    })?;
    let rows = [("load", 2.0), ("store", 2.0), ("dependent load", 5.0)];
    Ok(rows
        .iter()
        .zip(&best)
        .map(|(&(name, target), best)| Note {
            name: format!("translation-cache hit, {name}, best pass"),
            value: best.load(Ordering::Relaxed) as f64 / 100.0,
            unit: "ns",
            target: Some(target),
        })
        .collect())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let machine = Machine::here();
    let rounds = args.rounds(21);
    let mut cases = Vec::new();
    for n in [1, 16, 256, 4096] {
        for (step, what) in [
            (Step::Bracket, "start and end"),
            (Step::Begin, "begin and look"),
        ] {
            cases.push((format!("{what} x 256, {n} ranges"), n, step));
        }
    }
    cases.retain(|case| args.wants(&case.0));
    let progress = Progress::new(cases.len(), rounds);
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
            rfc: Rfc::default(),
            n,
            step,
        };
        rfc.rfc
            .inner
            .lock()
            .expect("nobody panics")
            .ranges
            .extend((0..n).map(nth));
        // Of few ranges a list is as good as anything, and the RFC's begin is one load; the tree has to win where there are many.
        let target = (matches!(step, Step::Bracket) && n >= 256).then_some(Target::p50_alone(1.0));
        let case = Case {
            name,
            delivery: "-",
            setting: Setting::Quiet,
            floor: "RFC",
            target,
        };
        outcomes.push(compare(case, rounds, &mut rfc, &mut ours, &progress)?);
    }
    progress.finish();
    let mut notes = Vec::new();
    if args.wants("retries") {
        notes.extend(retries(20_000, args.quick));
    }
    if args.wants("hit") {
        notes.extend(hits(args.quick)?);
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
    )
}
