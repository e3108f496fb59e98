//! What grows with what: fault cost with the size of a region, the pages in it and their number, with devices and with
//! threads; time with workers; memory with pages.
//!
//! Here the floor is ours in the small: the same thing with one of what there are many of.
//!
//! `cargo bench -p benches --bench scaling -- [--json FILE] [--plot DIR] [--quick] [FILTER]`

use std::time::Duration;

use accel_sim::Accelerator;
use anyhow::{Result, ensure};
use benches::device::Rig;
use benches::floors::inline::{self, LAPS};
use benches::floors::raw::{Area, Faults, Uffd};
use benches::harness::{Args, Case, Progress, Samples, Subject, compare, side_by_side};
use benches::machine::{Company, Machine, Setting, pin_to_cpu, unpin};
use benches::report::{Note, Outcome, Results, Series, Target, publish};
use svm::addr::PAGE_SIZE;
use svm::{Access, Buffer, Granule, Options};

const MIB: usize = 1 << 20;
/// The measuring thread's CPU, and the one of its company.
const HERE: usize = 0;
const THERE: usize = 1;
/// What is faulted on, of a region of any size.
const PART: usize = 4 * MIB;
/// What one fault moves.
const GRANULE: usize = Granule::Big.bytes();
/// Ten million pages of address space.
const SPARSE: usize = 10_000_000;

/// Device fault and CPU fault by turns, at some places of a region.
struct ThereAndBack {
    rig: Rig,
    /// First byte, step and number of the places.
    from: usize,
    step: usize,
    nr: usize,
    /// Regions that are only there.
    _others: Vec<Buffer<u8>>,
}

impl ThereAndBack {
    /// Granule by granule over 4 MiB in the middle of a region of `len` bytes, of which those are populated, beside so many regions.
    fn new(len: usize, nr_others: usize) -> Result<Self> {
        let from = (len - PART) / 2 / (2 * MIB) * (2 * MIB);
        Self::in_part(len, from..from + PART, from, nr_others)
    }

    /// The same in a region of `nr_pages` pages, all populated.
    fn populated(nr_pages: usize) -> Result<Self> {
        let len = (nr_pages * PAGE_SIZE).max(PART);
        let from = (len - PART) / 2 / (2 * MIB) * (2 * MIB);
        Self::in_part(len, 0..len, from, 0)
    }

    fn in_part(
        len: usize,
        populated: std::ops::Range<usize>,
        from: usize,
        nr_others: usize,
    ) -> Result<Self> {
        let others = (0..nr_others)
            .map(|_| Buffer::zeroed(PAGE_SIZE))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            rig: Rig::sparse(len, populated, &Options::new())?,
            from,
            step: GRANULE,
            nr: PART / GRANULE,
            _others: others,
        })
    }

    /// One page in each of 64 places, evenly spread over a region of `nr_pages` pages; the rest is never touched.
    fn sparse(nr_pages: usize) -> Result<Self> {
        const PLACES: usize = 64;
        let step = nr_pages / PLACES * PAGE_SIZE;
        let options = Options::new().granule(Granule::Page);
        let mut rig = Rig::sparse(nr_pages * PAGE_SIZE, 0..PAGE_SIZE, &options)?;
        for place in 0..PLACES {
            rig.bytes()[place * step] = 1;
        }
        Ok(Self {
            rig,
            from: 0,
            step,
            nr: PLACES,
            _others: Vec::new(),
        })
    }
}

impl Subject for ThereAndBack {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let first = self.rig.first_page();
        for i in 0..self.nr {
            let at = self.from + i * self.step;
            let page = first + at / PAGE_SIZE;
            samples.time(|| -> Result<()> {
                self.rig.fault(page..page + 1, Access::Write)?;
                self.rig.bytes()[at] = 2;
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// The CPU writes granules of which so many devices beside the first hold copies.
struct Collapse(Rig);

impl Collapse {
    fn new(nr_others: usize) -> Result<Self> {
        let options = Options::new().read_mostly(true);
        Ok(Self(Rig::new(2 * MIB, &options)?.with_others(nr_others)?))
    }
}

impl Subject for Collapse {
    fn arm(&mut self) -> Result<()> {
        let first = self.0.first_page();
        for page in (first..first + 2 * MIB / PAGE_SIZE).step_by(GRANULE / PAGE_SIZE) {
            self.0.fault(page..page + 1, Access::Read)?;
            self.0.others_read(&(page..page + 1))?;
        }
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        for byte in self.0.bytes().iter_mut().step_by(GRANULE) {
            samples.time(|| *std::hint::black_box(&mut *byte) = 3);
        }
        Ok(())
    }
}

/// REGISTER and UNREGISTER of populated memory.
struct Register(Uffd, Area);

impl Subject for Register {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        for _ in 0..16 {
            samples.time(|| {
                self.0.register(&self.1, true);
                self.0.unregister(&self.1);
            });
        }
        Ok(())
    }
}

/// `mirror()` and drop of populated memory.
struct Mirror(Vec<u8>);

impl Subject for Mirror {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        for _ in 0..16 {
            samples.time(|| svm::mirror(&mut self.0)?.close())?;
        }
        Ok(())
    }
}

/// A launch over an array that is at home, by so many workers.
struct Launch {
    accel: Accelerator,
    data: Buffer<u64>,
}

impl Launch {
    fn new(workers: usize) -> Result<Self> {
        let accel = Accelerator::with_options(accel_sim::Options::new().workers(workers))?;
        Ok(Self {
            accel,
            data: Buffer::zeroed(16 * MIB / size_of::<u64>())?,
        })
    }
}

impl Subject for Launch {
    fn arm(&mut self) -> Result<()> {
        self.data.as_mut_slice().fill(1);
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        samples.time(|| {
            self.accel.run(self.data.view_mut(), |data| {
                data.iter_mut().for_each(|x| *x += 1);
            })
        })?;
        ensure!(
            self.data.as_slice().iter().all(|&x| x == 2),
            "the accelerator computed something else"
        );
        Ok(())
    }
}

/// Threads that fault side by side, each on a region of its own.
struct Threads(Vec<ThereAndBack>);

impl Threads {
    fn new(nr: usize) -> Result<Self> {
        let threads: Result<_> = (0..nr).map(|_| ThereAndBack::new(PART, 0)).collect();
        Ok(Self(threads?))
    }
}

impl Subject for Threads {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        self.run(samples).map(drop)
    }
}

impl Threads {
    fn run(&mut self, samples: &mut Samples) -> Result<Duration> {
        side_by_side(&mut self.0, samples, |subject, samples| {
            let _signals = svm::worker_thread();
            (0..LAPS).try_for_each(|_| subject.pass(samples))
        })
    }
}

/// The same, where a sample is the time of a pass over the number of its turns: the inverse of the rate of all together.
struct Rate(Threads);

impl Subject for Rate {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let mut each = Samples::new();
        let took = self.0.run(&mut each)?;
        samples.record(u64::try_from(took.as_nanos())? / each.len());
        Ok(())
    }
}

/// Bytes of anonymous memory that this process has in RAM.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    kib.unwrap_or(0) * 1024
}

/// What the runtime keeps: for good, for each page of a region whose blocks have all been away once, and for a region that is
/// reserved and touched sparsely.
fn bookkeeping(fixed: usize) -> Result<Vec<Note>> {
    const LEN: usize = 256 * MIB;
    let mib = |bytes: usize| bytes as f64 / MIB as f64;
    let mut notes = vec![Note::new(
        "bookkeeping, fixed: resident for the first mirror and device",
        mib(fixed),
        "MiB",
        Some(1.0),
    )];
    let before = resident();
    let mut rig = Rig::new(LEN, &Options::new().granule(Granule::Huge))?;
    let first = rig.first_page();
    rig.prefetch(first..first + LEN / PAGE_SIZE, Access::Write)?;
    rig.release()?;
    let kept = resident().saturating_sub(before + LEN);
    drop(rig);
    notes.push(Note::new(
        "bookkeeping, all blocks used",
        kept as f64 / (LEN / PAGE_SIZE) as f64,
        "bytes a page",
        Some(8.0),
    ));
    let before = resident();
    let mut sparse = Buffer::<u8>::zeroed(SPARSE * PAGE_SIZE)?;
    let touched = (0..SPARSE)
        .step_by(10_000)
        .map(|page| sparse.as_mut_slice()[page * PAGE_SIZE] = 1)
        .count();
    let kept = resident().saturating_sub(before + touched * PAGE_SIZE);
    notes.push(Note::new(
        format!("bookkeeping, 10^7 pages reserved and {touched} touched"),
        kept as f64 / touched as f64,
        "bytes a touched page, its own contents apart",
        None,
    ));
    Ok(notes)
}

/// What a first mirror, and a device on it, leave behind when they are gone.
fn first_mirror() -> Result<usize> {
    let before = resident();
    let mut rig = Rig::new(PAGE_SIZE, &Options::new())?;
    let page = rig.first_page();
    rig.fault(page..page + 1, Access::Write)?;
    rig.bytes()[0] = 1;
    Ok(resident().saturating_sub(before))
}

type Make = Box<dyn Fn() -> Result<Box<dyn Subject>>>;

/// One comparison: what is measured, of what size, against what, and the ratio that it may come to.
struct Row {
    name: String,
    floor: &'static str,
    make_floor: Make,
    make_ours: Make,
    target: Option<Target>,
    /// Whether it is measured beside a busy CPU too: what one thread's fault costs.
    busy: bool,
    /// Which curve it is a point of: its name, what grows, the smallest size and this one.
    curve: Option<Curve>,
}

/// A curve's name, what grows, the smallest size, and the one of the row.
type Curve = (&'static str, &'static str, f64, f64);

/// The row that is a rate.
const RATE: &str = "there and back, 64 KiB, 2 threads, time of a turn of either";
/// Of the floor's rate.
const LEAST_RATE: f64 = 0.8;

fn boxed<S: Subject + 'static>(make: impl Fn() -> Result<S> + 'static) -> Make {
    Box::new(move || Ok(Box::new(make()?)))
}

fn rows(quick: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut curve = |name: &'static str,
                     x: &'static str,
                     floor: &'static str,
                     smallest: f64,
                     make_floor: fn() -> Make,
                     sizes: &[usize],
                     make_ours: fn(usize) -> Make,
                     target: Option<f64>,
                     busy: bool| {
        for &size in sizes {
            rows.push(Row {
                name: format!("{name} {size} {x}"),
                floor,
                make_floor: make_floor(),
                make_ours: make_ours(size),
                target: target.map(Target::p50),
                busy,
                curve: Some((name, x, smallest, size as f64)),
            });
        }
    };
    let small = || boxed(|| ThereAndBack::new(PART, 0));
    curve(
        "there and back, 64 KiB, in a region of",
        "MiB",
        "4 MiB",
        4.0,
        small,
        if quick { &[4096] } else { &[64, 1024, 4096] },
        |mib| boxed(move || ThereAndBack::new(mib * MIB, 0)),
        Some(1.1),
        true,
    );
    curve(
        "there and back, 64 KiB, where there are",
        "regions",
        "1 region",
        1.0,
        small,
        if quick { &[100] } else { &[10, 100, 1000] },
        |regions| boxed(move || ThereAndBack::new(PART, regions - 1)),
        Some(1.2),
        true,
    );
    curve(
        "there and back, 64 KiB, in a region with",
        "pages populated",
        "10^3 pages",
        1e3,
        || boxed(|| ThereAndBack::populated(1_000)),
        if quick {
            &[10_000]
        } else {
            &[10_000, 100_000, 1_000_000]
        },
        |pages| boxed(move || ThereAndBack::populated(pages)),
        Some(1.1),
        true,
    );
    curve(
        "there and back, 4 KiB, 64 places in a region of",
        "pages reserved",
        "64 blocks",
        64.0 * 512.0,
        || boxed(|| ThereAndBack::sparse(64 * 512)),
        if quick {
            &[1_000_000]
        } else {
            &[1_000_000, SPARSE]
        },
        |pages| boxed(move || ThereAndBack::sparse(pages)),
        Some(1.1),
        true,
    );
    curve(
        "cpu write, 64 KiB that are shared by",
        "devices",
        "1 device",
        1.0,
        || boxed(|| Collapse::new(0)),
        if quick { &[2] } else { &[2, 4, 7] },
        |devices| boxed(move || Collapse::new(devices - 1)),
        None,
        true,
    );
    curve(
        "there and back, 64 KiB, at once by",
        "threads",
        "1 thread",
        1.0,
        || boxed(|| Threads::new(1)),
        if quick { &[2] } else { &[2, 4] },
        |threads| boxed(move || Threads::new(threads)),
        None,
        false,
    );
    curve(
        "launch over 16 MiB by",
        "workers",
        "1 worker",
        1.0,
        || boxed(|| Launch::new(1)),
        if quick { &[64] } else { &[2, 8, 64] },
        |workers| boxed(move || Launch::new(workers)),
        Some(2.0),
        false,
    );
    rows.push(Row {
        name: RATE.into(),
        floor: "F5 + F2, 2 threads",
        make_floor: boxed(|| Ok(inline::ThereAndBack::new(2, PART, GRANULE))),
        make_ours: boxed(|| Ok(Rate(Threads::new(2)?))),
        // 0.8 of the floor's rate.
        target: Some(Target::p50_alone(1.0 / LEAST_RATE)),
        busy: false,
        curve: None,
    });
    rows.push(Row {
        name: "mirror and drop, 64 MiB".into(),
        floor: "REGISTER + UNREGISTER",
        make_floor: boxed(|| {
            let area = Area::new(64 * MIB, false);
            area.populate();
            Ok(Register(Uffd::open(Faults::Signal), area))
        }),
        make_ours: boxed(|| Ok(Mirror(vec![1; 64 * MIB]))),
        target: Some(Target::p50(1.5)),
        busy: false,
        curve: None,
    });
    rows
}

/// A point of the curve that the row belongs to.
fn add_to_curve(
    series: &mut Vec<Series>,
    (name, x, smallest, size): Curve,
    target: Option<Target>,
    outcome: &Outcome,
) {
    if series
        .last()
        .is_none_or(|s| (s.name.as_str(), s.x) != (name, x))
    {
        series.push(Series::new(name, x, target.map(|target| target.p50)));
    }
    if let Some(series) = series.last_mut() {
        series.push(smallest, size, outcome);
    }
}

/// Two threads' rate, as such.
fn rate(outcome: &Outcome) -> [Note; 3] {
    let a_second = |ns: u64| 1e9 / ns as f64;
    [
        Note::at_least(
            "concurrency, the rate of 2 faulting threads over the floor's",
            1.0 / outcome.ratio,
            "x",
            LEAST_RATE,
        ),
        Note::new(
            "concurrency, 2 faulting threads",
            a_second(outcome.ours.p50),
            "turns a second (there and back, 64 KiB)",
            None,
        ),
        Note::new(
            "concurrency, the floor with 2",
            a_second(outcome.floor.p50),
            "turns a second",
            None,
        ),
    ]
}

fn main() -> Result<()> {
    let args = Args::of_command_line();
    let machine = Machine::here();
    let fixed = first_mirror()?;
    let _signals = svm::worker_thread();
    let rounds = args.rounds(15);
    let rows: Vec<_> = rows(args.quick)
        .into_iter()
        .filter(|row| args.wants(&row.name))
        .collect();
    let settings = |row: &Row| -> &[Setting] {
        if row.busy {
            &[Setting::Quiet, Setting::Busy]
        } else {
            &[Setting::Quiet]
        }
    };
    let progress = Progress::new(rows.iter().map(|row| settings(row).len()).sum(), rounds);
    let mut results = Results::default();
    for row in &rows {
        for &setting in settings(row) {
            // What one thread does is done on a CPU of its own; several go where they like.
            if row.busy {
                pin_to_cpu(HERE);
            } else {
                unpin();
            }
            let _company = Company::for_setting(setting, THERE);
            let case = Case {
                name: row.name.clone(),
                delivery: "inline",
                setting,
                floor: row.floor,
                target: row.target,
            };
            let (mut floor, mut ours) = ((row.make_floor)()?, (row.make_ours)()?);
            let outcome = compare(case, rounds, &mut *floor, &mut *ours, &progress)?;
            if let Some(curve) = row.curve.filter(|_| setting == Setting::Quiet) {
                add_to_curve(&mut results.series, curve, row.target, &outcome);
            }
            if row.name == RATE {
                results.notes.extend(rate(&outcome));
            }
            results.cases.push(outcome);
        }
    }
    unpin();
    progress.finish();
    if args.wants("bookkeeping") {
        results.notes.extend(bookkeeping(fixed)?);
    }
    publish("scaling", &args, &machine, &results)
}
