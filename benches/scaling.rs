//! What grows with what: fault cost with the size of a region, the pages in it and their number, with devices and with
//! threads; time with workers; memory with pages.
//!
//! Here the floor is ours in the small: the same thing with one of what there are many of, by the same door.
//!
//! `cargo bench -p benches --bench scaling -- [--json FILE] [--plot DIR] [--quick] [FILTER]`

use std::time::Duration;

use accel_sim::Accelerator;
use anyhow::{Result, ensure};
use benches::device::{Part, Rig};
use benches::floors::inline::{self, LAPS, Memory};
use benches::floors::raw::{Area, Faults, Uffd};
use benches::floors::thread;
use benches::harness::{Args, Case, Progress, Samples, Subject, compare, side_by_side};
use benches::machine::{Company, Machine, Setting, pin_to_cpu, unpin};
use benches::report::{Note, Outcome, Results, Series, Target, publish};
use svm::addr::PAGE_SIZE;
use svm::{Access, Buffer, Delivery, Granule, Options};

const MIB: usize = 1 << 20;
/// The measuring thread's CPU, and the one of its company.
const HERE: usize = 0;
const THERE: usize = 1;
/// What is faulted on, of a region of any size.
const PART: usize = 4 * MIB;
/// What one fault moves.
const GRANULE: usize = Granule::Big.bytes();
/// The two doors.
const INLINE: Delivery = Delivery::Inline;
const THREAD: Delivery = Delivery::Thread;
/// Ten million pages of address space.
const SPARSE: usize = 10_000_000;

fn by(door: Delivery) -> Options {
    Options::new().delivery(door)
}

/// Device fault and CPU fault by turns, at some places of a region.
struct ThereAndBack {
    rig: Rig,
    /// First byte, step and number of the places.
    from: usize,
    step: usize,
    nr: usize,
}

/// The middle 4 MiB of a region of `len` bytes.
fn middle(len: usize) -> usize {
    (len - PART) / 2 / (2 * MIB) * (2 * MIB)
}

impl ThereAndBack {
    /// Granule by granule over 4 MiB in the middle of a region of `len` bytes, of which those are populated.
    fn new(len: usize, door: Delivery) -> Result<Self> {
        let from = middle(len);
        Self::in_part(Rig::sparse(len, from..from + PART, &by(door))?, from)
    }

    /// The same beside `nr` other regions, which the device has mapped and used.
    fn beside(nr: usize, door: Delivery) -> Result<Self> {
        let rig = Rig::new(PART, &by(door))?.with_regions(nr, &by(door))?;
        Self::in_part(rig, 0)
    }

    /// The same in a region of `nr_pages` pages, all populated.
    fn populated(nr_pages: usize) -> Result<Self> {
        let len = (nr_pages * PAGE_SIZE).max(PART);
        Self::in_part(Rig::new(len, &Options::new())?, middle(len))
    }

    fn in_part(rig: Rig, from: usize) -> Result<Self> {
        Ok(Self {
            rig,
            from,
            step: GRANULE,
            nr: PART / GRANULE,
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
struct Mirror(Vec<u8>, Options);

impl Subject for Mirror {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        for _ in 0..16 {
            samples.time(|| svm::mirror_with(&mut self.0, &self.1)?.close())?;
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

/// Threads that fault side by side.
trait SideBySide {
    /// All their turns, each recorded; says how long they took together.
    fn run(&mut self, samples: &mut Samples) -> Result<Duration>;
}

/// Each on a region of its own, on a device of its own.
struct Threads(Vec<ThereAndBack>);

impl Threads {
    fn new(nr: usize, door: Delivery) -> Result<Self> {
        let threads: Result<_> = (0..nr).map(|_| ThereAndBack::new(PART, door)).collect();
        Ok(Self(threads?))
    }
}

impl SideBySide for Threads {
    fn run(&mut self, samples: &mut Samples) -> Result<Duration> {
        side_by_side(&mut self.0, samples, |subject, samples| {
            let _signals = svm::worker_thread();
            (0..LAPS).try_for_each(|_| subject.pass(samples))
        })
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

/// Each on a part of one region, on one device.
struct Together(Rig);

impl Together {
    fn new(nr: usize, door: Delivery) -> Result<Self> {
        Ok(Self(Rig::new(nr * PART, &by(door))?.with_threads(nr)?))
    }
}

impl SideBySide for Together {
    fn run(&mut self, samples: &mut Samples) -> Result<Duration> {
        side_by_side(self.0.parts(), samples, |mut part, samples| {
            let _signals = svm::worker_thread();
            (0..LAPS).try_for_each(|_| turns(&mut part, samples))
        })
    }
}

/// Granule by granule over the part.
fn turns(part: &mut Part<'_>, samples: &mut Samples) -> Result<()> {
    for at in (0..part.bytes.len()).step_by(GRANULE) {
        let page = part.first_page + at / PAGE_SIZE;
        samples.time(|| -> Result<()> {
            part.fault(page..page + 1, Access::Write)?;
            part.bytes[at] = 2;
            Ok(())
        })?;
    }
    Ok(())
}

/// The same, where a sample is the time of a pass over the number of its turns: the inverse of the rate of all together.
struct Rate<S>(S);

impl<S: SideBySide> Subject for Rate<S> {
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

/// Bytes of anonymous memory that this process has in RAM, page tables not among them.
fn resident() -> usize {
    of_status("RssAnon:")
}

/// Bytes of this process's page tables.
fn page_tables() -> usize {
    of_status("VmPTE:")
}

fn of_status(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
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
    let (before, tables) = (resident(), page_tables());
    let mut rig = Rig::new(LEN, &Options::new().granule(Granule::Huge))?;
    let first = rig.first_page();
    rig.prefetch(first..first + LEN / PAGE_SIZE, Access::Write)?;
    rig.release()?;
    let kept = resident().saturating_sub(before + LEN);
    // The application's own are eight bytes a page.
    let of_window = page_tables().saturating_sub(tables + LEN / PAGE_SIZE * 8);
    drop(rig);
    let a_page = |bytes: usize| bytes as f64 / (LEN / PAGE_SIZE) as f64;
    notes.push(Note::new(
        "bookkeeping, all blocks used (RssAnon beyond the data)",
        a_page(kept),
        "bytes a page",
        Some(8.0),
    ));
    notes.push(Note::new(
        "bookkeeping, the kernel's: page tables of the window beside it (VmPTE beyond the data's own)",
        a_page(of_window),
        "bytes a page",
        None,
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
    /// The door of its CPU faults.
    door: Delivery,
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

/// What the names of the rows that are rates begin with.
const RATE: &str = "there and back, 64 KiB, 2 threads";
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
                door: INLINE,
                floor,
                make_floor: make_floor(),
                make_ours: make_ours(size),
                target: target.map(Target::p50),
                busy,
                curve: Some((name, x, smallest, size as f64)),
            });
        }
    };
    let small = || boxed(|| ThereAndBack::new(PART, INLINE));
    curve(
        "there and back, 64 KiB, in a region of",
        "MiB",
        "4 MiB",
        4.0,
        small,
        if quick { &[4096] } else { &[64, 1024, 4096] },
        |mib| boxed(move || ThereAndBack::new(mib * MIB, INLINE)),
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
        |regions| boxed(move || ThereAndBack::beside(regions - 1, INLINE)),
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
        || boxed(|| Threads::new(1, INLINE)),
        if quick { &[2] } else { &[2, 4] },
        |threads| boxed(move || Threads::new(threads, INLINE)),
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
    rows.extend(by_thread(quick));
    rows.extend([INLINE, THREAD].into_iter().flat_map(rates));
    rows.extend([INLINE, THREAD].map(mirror_and_drop));
    rows
}

/// The largest of two curves by the thread door.
fn by_thread(quick: bool) -> [Row; 2] {
    let regions: usize = if quick { 100 } else { 1000 };
    let row = |name, floor, make_ours, target| Row {
        name,
        door: THREAD,
        floor,
        make_floor: boxed(|| ThereAndBack::new(PART, THREAD)),
        make_ours,
        target: Some(Target::p50(target)),
        busy: true,
        curve: None,
    };
    [
        row(
            "there and back, 64 KiB, in a region of 4096 MiB".into(),
            "4 MiB",
            boxed(|| ThereAndBack::new(4096 * MIB, THREAD)),
            1.1,
        ),
        row(
            format!("there and back, 64 KiB, where there are {regions} regions"),
            "1 region",
            boxed(move || ThereAndBack::beside(regions - 1, THREAD)),
            1.2,
        ),
    ]
}

/// Two threads at once, in two regions on two devices, and in one on one. The floor's memory is apart, or shared, likewise.
fn rates(door: Delivery) -> [Row; 2] {
    let row = |name: &str, memory, make_ours| Row {
        name: format!("{RATE}{name}, time of a turn of either"),
        door,
        floor: match (door, memory) {
            (Delivery::Inline, Memory::Apart) => "F5 + F2, 2 threads",
            (Delivery::Inline, Memory::Shared) => "F5 + F2, 2 threads in one mapping",
            (Delivery::Thread, Memory::Apart) => "F5 + F3, 2 threads",
            (Delivery::Thread, Memory::Shared) => "F5 + F3, 2 threads in one mapping",
        },
        make_floor: match door {
            Delivery::Inline => {
                boxed(move || Ok(inline::ThereAndBack::new(memory, 2, PART, GRANULE)))
            }
            Delivery::Thread => {
                boxed(move || Ok(thread::ThereAndBack::new(memory, 2, PART, GRANULE)))
            }
        },
        make_ours,
        // 0.8 of the floor's rate.
        target: Some(Target::p50_alone(1.0 / LEAST_RATE)),
        busy: false,
        curve: None,
    };
    [
        row(
            "",
            Memory::Apart,
            boxed(move || Ok(Rate(Threads::new(2, door)?))),
        ),
        row(
            " in one region",
            Memory::Shared,
            boxed(move || Ok(Rate(Together::new(2, door)?))),
        ),
    ]
}

fn mirror_and_drop(door: Delivery) -> Row {
    Row {
        name: "mirror and drop, 64 MiB".into(),
        door,
        floor: "REGISTER + UNREGISTER",
        make_floor: boxed(move || {
            let area = Area::new(64 * MIB, false);
            area.populate();
            let faults = match door {
                Delivery::Inline => Faults::Signal,
                Delivery::Thread => Faults::Message,
            };
            Ok(Register(Uffd::open(faults), area))
        }),
        make_ours: boxed(move || Ok(Mirror(vec![1; 64 * MIB], by(door)))),
        target: Some(Target::p50(1.5)),
        busy: true,
        curve: None,
    }
}

fn door_name(door: Delivery) -> &'static str {
    match door {
        Delivery::Inline => "inline",
        Delivery::Thread => "thread",
    }
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
    let place = if outcome.name.contains("in one region") {
        " in one region"
    } else {
        ""
    };
    let door = if outcome.delivery == "thread" {
        ", thread door"
    } else {
        ""
    };
    let threads = format!("2 faulting threads{place}");
    [
        Note::at_least(
            format!("concurrency, the rate of {threads} over the floor's{door}"),
            1.0 / outcome.ratio,
            "x",
            LEAST_RATE,
        ),
        Note::new(
            format!("concurrency, {threads}{door}"),
            a_second(outcome.ours.p50),
            "turns a second (there and back, 64 KiB)",
            None,
        ),
        Note::new(
            format!("concurrency, the floor of {threads}{door}"),
            a_second(outcome.floor.p50),
            "turns a second",
            None,
        ),
    ]
}

fn main() -> Result<()> {
    let args = Args::of_command_line(
        "scaling",
        "Measures what a cost does as sizes, regions, devices and threads grow",
    );
    let rows = args.choose(rows(args.quick), |row| &row.name, &["bookkeeping"]);
    let machine = Machine::here();
    let fixed = first_mirror()?;
    let _signals = svm::worker_thread();
    let rounds = args.rounds(15);
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
                delivery: door_name(row.door),
                setting,
                floor: row.floor,
                target: row.target,
            };
            let (mut floor, mut ours) = ((row.make_floor)()?, (row.make_ours)()?);
            let outcome = compare(case, rounds, &mut *floor, &mut *ours, &progress)?;
            if let Some(curve) = row.curve.filter(|_| setting == Setting::Quiet) {
                add_to_curve(&mut results.series, curve, row.target, &outcome);
            }
            if row.name.starts_with(RATE) {
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
