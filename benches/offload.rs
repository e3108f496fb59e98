//! Work that changes sides: data just written by the CPU, a triad on the accelerator, the result read by the CPU.
//!
//! Ours is the *overhead*: the time of all that, less the time of the same kernel on data that is in place and of the same
//! reading of data that is home. Its floor is what a program without shared memory pays around as many of the same workers: two arrays
//! copied in, one copied out, by the caller. Quiet, there is a worker for each CPU (unless the row says otherwise); beside company
//! everything has one CPU, and there is one worker.
//!
//! *Explicit* rows move by request: three arrays out in a call each, one home. They time the calls alone, and the kernel runs between them,
//! as it runs between the copies of their floor. No CPU faults, so that there is no door to them.
//!
//! `cargo bench -p benches --bench offload -- [--json FILE] [--plot DIR] [--quick] [FILTER]`

use std::hint::black_box;
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use accel_sim::Accelerator;
use anyhow::{Result, ensure};
use benches::device::Rig;
use benches::floors::Pair;
use benches::floors::raw::{Area, Faults};
use benches::harness::{Args, Case, Fresh, Progress, Samples, Subject, compare};
use benches::machine::{Company, Machine, Setting, pin_to_cpu, unpin};
use benches::report::{Note, Results, Target, publish};
use svm::addr::PAGE_SIZE;
use svm::{Access, Buffer, Delivery, Granule, Options, Stats};

const MIB: usize = 1 << 20;
const SCALE: f64 = 3.0;
/// The measuring thread's CPU, and the one of its company.
const HERE: usize = 0;
const THERE: usize = 1;

fn triad(a: &mut [f64], b: &[f64], c: &[f64]) {
    for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
        *a = b + SCALE * c;
    }
}

fn timed(f: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed())
}

/// The median of three.
fn usually(mut f: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut took = [timed(&mut f)?, timed(&mut f)?, timed(&mut f)?];
    took.sort_unstable();
    Ok(took[1])
}

fn sum(data: &[f64]) {
    // Eight partial sums, so that it reads as fast as memory gives.
    let mut sums = [0.0; 8];
    for chunk in data.chunks_exact(8) {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x);
    }
    black_box(sums);
}

/// The three arrays of ours, and the accelerator.
struct Offload {
    accel: Accelerator,
    a: Buffer<f64>,
    b: Buffer<f64>,
    c: Buffer<f64>,
    round: f64,
    /// What the last launch, and the reading of its result, came to.
    taken: Stats,
}

impl Offload {
    fn new(len: usize, workers: usize, options: &Options) -> Result<Self> {
        let buffer = || Buffer::with_options(len, options);
        let accel = Accelerator::with_options(accel_sim::Options::new().workers(workers))?;
        Ok(Self {
            accel,
            a: buffer()?,
            b: buffer()?,
            c: buffer()?,
            round: 0.0,
            taken: Stats::default(),
        })
    }

    fn run(&mut self) -> Result<()> {
        Ok(self.accel.run(
            (self.a.view_mut(), self.b.view(), self.c.view()),
            |(a, b, c)| triad(a, b, c),
        )?)
    }

    fn stats(&self) -> Stats {
        self.a.stats() + self.b.stats() + self.c.stats()
    }
}

impl Subject for Offload {
    fn arm(&mut self) -> Result<()> {
        self.round += 1.0;
        self.a.as_mut_slice().fill(0.0);
        self.b.as_mut_slice().fill(self.round);
        self.c.as_mut_slice().fill(1.0);
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let before = self.stats();
        let whole = timed(|| {
            self.run()?;
            sum(self.a.as_slice());
            Ok(())
        })?;
        self.taken = self.stats() - before;
        assert!(
            self.a.as_slice().iter().all(|&x| x == self.round + SCALE),
            "the accelerator computed something else"
        );
        let read = usually(|| {
            sum(self.a.as_slice());
            Ok(())
        })?;
        // Brings the result back to the device; then everything is in place.
        self.run()?;
        let kernel = usually(|| self.run())?;
        samples.record(u64::try_from(
            whole.saturating_sub(read + kernel).as_nanos(),
        )?);
        Ok(())
    }
}

/// What explicit copies cost around the same workers: the device's arrays are memory of its own, which nobody mirrors.
struct Copies {
    accel: Accelerator,
    view: Buffer<u8>,
    host: [Area; 3],
    device: [Area; 3],
}

impl Copies {
    fn new(len: usize, workers: usize, huge: bool) -> Result<Self> {
        let arrays = || {
            [(); 3].map(|()| {
                let area = Area::new(len * size_of::<f64>(), huge);
                area.populate();
                area
            })
        };
        Ok(Self {
            accel: Accelerator::with_options(accel_sim::Options::new().workers(workers))?,
            view: Buffer::zeroed(1)?,
            host: arrays(),
            device: arrays(),
        })
    }

    /// The triad by the workers, one part each.
    fn run(&mut self) -> Result<()> {
        let [a, b, c] = self.device.each_mut().map(floats);
        let part = a.len().div_ceil(self.accel.workers());
        let arrays = a.chunks_mut(part).zip(b.chunks(part)).zip(c.chunks(part));
        let parts: Vec<_> = arrays.map(|part| Mutex::new(Some(part))).collect();
        // A launch has views; this one's kernel does not look at it.
        self.accel
            .run_items(parts.len(), self.view.view(), |_lane, i, _| {
                let part = parts[i].lock().expect("nobody panics").take();
                if let Some(((a, b), c)) = part {
                    triad(a, b, c);
                }
                Ok(())
            })?;
        Ok(())
    }

    fn copy_in(&mut self) {
        for (device, host) in self.device[1..].iter_mut().zip(&mut self.host[1..]) {
            floats(device).copy_from_slice(floats(host));
        }
    }
}

impl Subject for Copies {
    fn arm(&mut self) -> Result<()> {
        let [a, b, c] = self.host.each_mut().map(floats);
        a.fill(0.0);
        b.fill(2.0);
        c.fill(1.0);
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let copy = timed(|| {
            self.copy_in();
            Ok(())
        })?;
        // The kernel, between, and the reading, after: so that the caches are as they are then.
        self.run()?;
        let back = timed(|| {
            floats(&mut self.host[0]).copy_from_slice(floats(&mut self.device[0]));
            Ok(())
        })?;
        let result = floats(&mut self.host[0]);
        sum(result);
        assert!(result.iter().all(|&x| x == 2.0 + SCALE), "copied wrongly");
        samples.record(u64::try_from((copy + back).as_nanos())?);
        Ok(())
    }
}

/// The floats of an area.
fn floats(area: &mut Area) -> &mut [f64] {
    // SAFETY: the area is populated, aligned, of as many bytes, and borrowed exclusively; any bits are a float.
    unsafe {
        std::slice::from_raw_parts_mut(
            std::ptr::with_exposed_provenance_mut(area.addr()),
            area.len() / size_of::<f64>(),
        )
    }
}

/// Three arrays out in one call each, before the kernel, and one home after it: what is then left of a launch is the kernel.
///
/// By the device of the other benches, which has no workers: the kernel is run by the thread that measures.
struct Explicit {
    rigs: [Rig; 3],
    round: f64,
}

impl Explicit {
    fn new(len: usize, huge: bool) -> Result<Self> {
        let options = Options::new().granule(Granule::Huge).huge_pages(huge);
        let rig = || Rig::new(len * size_of::<f64>(), &options);
        Ok(Self {
            rigs: [rig()?, rig()?, rig()?],
            round: 0.0,
        })
    }

    /// Writes all three.
    fn write(&mut self) {
        self.round += 1.0;
        for (rig, x) in self.rigs.iter_mut().zip([0.0, self.round, 1.0]) {
            host_floats(rig).fill(x);
        }
    }

    fn fetch(&mut self) -> Result<()> {
        self.rigs.iter_mut().try_for_each(|rig| {
            let (first, nr_pages) = (rig.first_page(), rig.bytes().len() / PAGE_SIZE);
            rig.prefetch(first..first + nr_pages, Access::Write)
        })
    }

    /// The kernel, on what has been fetched.
    fn run(&mut self) {
        let [a, b, c] = self.rigs.each_mut().map(device_floats);
        triad(a, b, c);
    }

    /// The inputs home too; then everything must be what was written, or computed.
    fn check(&mut self) -> Result<()> {
        self.rigs[1..].iter().try_for_each(Rig::release)?;
        let expected = [self.round + SCALE, self.round, 1.0];
        for (rig, expected) in self.rigs.iter_mut().zip(expected) {
            let is_right = host_floats(rig).iter().all(|&x| x == expected);
            ensure!(is_right, "something else came home than went out");
        }
        Ok(())
    }
}

/// Of both ways.
trait ThereAndBack {
    /// Out with three arrays, the kernel, home with one: how long either way took.
    fn there_and_back(&mut self) -> Result<[Duration; 2]>;
}

impl ThereAndBack for Explicit {
    fn there_and_back(&mut self) -> Result<[Duration; 2]> {
        let out = timed(|| self.fetch())?;
        self.run();
        // The result, and not the inputs.
        let home = timed(|| self.rigs[0].release())?;
        sum(host_floats(&mut self.rigs[0]));
        self.check()?;
        Ok([out, home])
    }
}

impl Subject for Explicit {
    fn arm(&mut self) -> Result<()> {
        self.write();
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        record_both(self.there_and_back()?, samples)
    }
}

fn record_both([out, home]: [Duration; 2], samples: &mut Samples) -> Result<()> {
    samples.record(u64::try_from((out + home).as_nanos())?);
    Ok(())
}

/// The floats of a device's memory, at home.
fn host_floats(rig: &mut Rig) -> &mut [f64] {
    let bytes = rig.bytes();
    // SAFETY: aligned to a page, of as many bytes, and borrowed exclusively; any bits are a float.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / 8) }
}

/// The same where the device has them. All of them have been fetched.
fn device_floats(rig: &mut Rig) -> &mut [f64] {
    let (addr, len) = (rig.frames_addr(), rig.bytes().len() / 8);
    // SAFETY: congruent to the memory, so aligned; all pages are in the window until they are released, which takes the rig that is
    // borrowed exclusively meanwhile; any bits are a float.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(addr), len) }
}

/// The bytes that one bare call moves, at most: as much as one of the runtime's does of huge pages (`MAX_BLOCKS_AT_ONCE`).
const PIECE: usize = 64 * MIB;

/// F5 for the same: bare moves of three areas out, and of one home.
struct Bare {
    pairs: [Pair; 3],
    piece: usize,
}

impl Bare {
    fn new(len: usize, huge: bool, piece: usize) -> Self {
        let bytes = (len * size_of::<f64>()).next_multiple_of(2 * MIB);
        Self {
            pairs: std::array::from_fn(|_| Pair::new(bytes, Faults::Signal, huge)),
            piece,
        }
    }
}

/// Bare moves of all of `pair`, `piece` bytes a call: by `call`, which is told where the host's and the window's begin, and how many.
fn by_pieces(pair: &Pair, piece: usize, call: impl Fn(usize, usize, usize)) {
    let len = pair.host.len();
    for at in (0..len).step_by(piece) {
        call(
            pair.host.addr() + at,
            pair.frames.addr() + at,
            piece.min(len - at),
        );
    }
}

fn move_out(pair: &Pair, piece: usize) {
    by_pieces(pair, piece, |host, frames, len| {
        pair.uffd.move_pages(frames, host, len);
    });
}

fn move_home(pair: &Pair, piece: usize) {
    by_pieces(pair, piece, |host, frames, len| {
        pair.uffd.move_pages(host, frames, len);
    });
}

impl ThereAndBack for Bare {
    fn there_and_back(&mut self) -> Result<[Duration; 2]> {
        let piece = self.piece;
        let out = timed(|| {
            self.pairs.iter().for_each(|pair| move_out(pair, piece));
            Ok(())
        })?;
        let [a, b, c] = self.pairs.each_mut().map(|pair| floats(&mut pair.frames));
        triad(a, b, c);
        let home = timed(|| {
            move_home(&self.pairs[0], piece);
            Ok(())
        })?;
        self.pairs[1..].iter().for_each(Pair::move_home);
        sum(floats(&mut self.pairs[0].host));
        Ok([out, home])
    }
}

impl Subject for Bare {
    fn arm(&mut self) -> Result<()> {
        for (pair, x) in self.pairs.iter_mut().zip([0.0, 2.0, 1.0]) {
            floats(&mut pair.host).fill(x);
        }
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        record_both(self.there_and_back()?, samples)
    }
}

/// Each way by itself, ours and bare, with huge pages: which of them costs what.
fn each_way(len: usize, setting: Setting, rounds: usize) -> Result<Vec<Note>> {
    let bare = |piece| Box::new(Bare::new(len, true, piece));
    let mut subjects: [(&str, Box<dyn Both>); 3] = [
        ("svm", Box::new(Explicit::new(len, true)?)),
        ("bare", bare(PIECE)),
        ("bare, a call for each 2 MiB", bare(2 * MIB)),
    ];
    let mut took = [const { [Vec::new(), Vec::new()] }; 3];
    for _ in 0..rounds {
        for ((_, subject), took) in subjects.iter_mut().zip(&mut took) {
            subject.arm()?;
            let ways = subject.there_and_back()?;
            took.iter_mut().zip(ways).for_each(|(all, d)| all.push(d));
        }
    }
    let name = |who, way| {
        let (setting, mib) = (setting.name(), 3 * len * size_of::<f64>() / MIB);
        format!("explicit, huge pages, {mib} MiB, {setting}, {way}: {who}")
    };
    let mut notes = Vec::new();
    for ((who, _), took) in subjects.iter().zip(took) {
        for (way, mut all) in ["three arrays out", "one home"].into_iter().zip(took) {
            all.sort_unstable();
            let us = all[all.len() / 2].as_nanos() as f64 / 1e3;
            notes.push(Note::new(name(who, way), us, "us", None));
        }
    }
    Ok(notes)
}

/// What a call home takes that finds nothing to bring: a part of each way home that does not grow with what moves.
fn nothing_home(len: usize, rounds: usize) -> Result<Note> {
    let explicit = Explicit::new(len, true)?;
    let took: Result<Vec<_>> = (0..rounds)
        .map(|_| timed(|| explicit.rigs[0].release()))
        .collect();
    let mut took = took?;
    took.sort_unstable();
    let us = took[took.len() / 2].as_nanos() as f64 / 1e3;
    Ok(Note::new(
        "explicit, quiet, home with nothing to bring: svm",
        us,
        "us",
        None,
    ))
}

trait Both: Subject + ThereAndBack {}
impl<T: Subject + ThereAndBack> Both for T {}

/// F7 against spans: the triad on data in place.
struct Resident(Offload);

impl Subject for Resident {
    fn arm(&mut self) -> Result<()> {
        self.0.run()
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        for _ in 0..PASSES {
            samples.time(|| self.0.run())?;
        }
        Ok(())
    }
}

/// F7: as many plain threads on ordinary memory, with huge pages as ours. They stand ready, as an accelerator's workers do.
struct Plain {
    arrays: [Area; 3],
    threads: usize,
}

impl Plain {
    fn new(len: usize, threads: usize) -> Self {
        let array = || {
            let area = Area::new((len * size_of::<f64>()).next_multiple_of(2 * MIB), true);
            area.populate();
            area
        };
        Self {
            arrays: [array(), array(), array()],
            threads,
        }
    }
}

const PASSES: usize = 4;

impl Subject for Plain {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let [a, b, c] = self.arrays.each_mut().map(floats);
        let part = a.len().div_ceil(self.threads);
        let barrier = &Barrier::new(self.threads + 1);
        std::thread::scope(|scope| {
            for ((a, b), c) in a.chunks_mut(part).zip(b.chunks(part)).zip(c.chunks(part)) {
                scope.spawn(move || {
                    for _ in 0..PASSES {
                        barrier.wait();
                        triad(a, b, c);
                        barrier.wait();
                    }
                });
            }
            for _ in 0..PASSES {
                samples.time(|| {
                    barrier.wait();
                    barrier.wait();
                });
            }
        });
        Ok(())
    }
}

/// One of ours.
trait Ours: Subject {
    /// What a round took, where somebody faults.
    fn taken(&self) -> Option<Stats> {
        None
    }
}

impl Ours for Offload {
    fn taken(&self) -> Option<Stats> {
        Some(self.taken)
    }
}

impl Ours for Explicit {}
impl<S: Subject> Ours for Fresh<S> {}
impl Ours for Resident {}

/// What a row does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Demand,
    Explicit,
    ExplicitOverF5,
    InPlace,
}

const QUIET: &[Setting] = &[Setting::Quiet];
const BOTH: &[Setting] = &[Setting::Quiet, Setting::Busy];

/// One comparison, in one setting or both.
#[derive(Clone)]
struct Row {
    name: String,
    /// Floats of an array.
    len: usize,
    what: What,
    /// With how many workers when quiet: as many as there are CPUs, or this one.
    one_worker: bool,
    options: Options,
    settings: &'static [Setting],
    /// Of the ratio of medians.
    target: f64,
}

impl Row {
    /// Beside company there is one CPU for all of ours.
    fn workers(&self, setting: Setting, nr_cpus: usize) -> usize {
        if self.one_worker || setting == Setting::Busy {
            1
        } else {
            nr_cpus
        }
    }

    fn huge(&self) -> bool {
        self.options.huge_pages
    }

    fn is_by_thread(&self) -> bool {
        self.options.delivery == Some(Delivery::Thread)
    }

    fn case(&self, setting: Setting) -> Case {
        Case {
            name: self.name.clone(),
            delivery: match self.what {
                What::Demand if self.is_by_thread() => "thread",
                What::Demand => "inline",
                What::Explicit | What::ExplicitOverF5 | What::InPlace => "-",
            },
            setting,
            floor: match self.what {
                What::Demand | What::Explicit => "copies",
                What::ExplicitOverF5 => "F5",
                What::InPlace => "F7",
            },
            target: Some(Target::p50(self.target)),
        }
    }

    fn floor(&self, workers: usize) -> Result<Box<dyn Subject>> {
        Ok(match self.what {
            What::Demand => Box::new(Copies::new(self.len, workers, self.huge())?),
            What::Explicit => Box::new(Copies::new(self.len, 1, self.huge())?),
            What::ExplicitOverF5 => {
                let (len, huge) = (self.len, self.huge());
                Box::new(Fresh::new(move || Ok(Bare::new(len, huge, PIECE))))
            }
            What::InPlace => Box::new(Plain::new(self.len, workers)),
        })
    }

    fn ours(&self, workers: usize) -> Result<Box<dyn Ours>> {
        let offload = || Offload::new(self.len, workers, &self.options);
        Ok(match self.what {
            What::Demand => Box::new(offload()?),
            What::Explicit => Box::new(Explicit::new(self.len, self.huge())?),
            What::ExplicitOverF5 => {
                let (len, huge) = (self.len, self.huge());
                Box::new(Fresh::new(move || Explicit::new(len, huge)))
            }
            What::InPlace => Box::new(Resident(offload()?)),
        })
    }
}

/// The rows of one size, that of the three arrays together.
fn rows(mib: usize) -> Vec<Row> {
    let len = mib * MIB / 3 / size_of::<f64>() / (MIB / 4) * (MIB / 4);
    let row = |name: &str, what, granule, target| Row {
        name: format!("offload, {mib} MiB, {name}"),
        len,
        what,
        one_worker: false,
        options: Options::new().granule(granule),
        settings: BOTH,
        target,
    };
    let huge = |mut row: Row| {
        row.options.huge_pages = true;
        row
    };
    let by_thread = |mut row: Row| {
        row.options.delivery = Some(Delivery::Thread);
        row.settings = QUIET;
        row
    };
    let blocks = row("2 MiB granule", What::Demand, Granule::Huge, 0.5);
    let mut granules = row("64 KiB granule, 1 worker", What::Demand, Granule::Big, 1.0);
    granules.one_worker = true;
    let explicit = |name, what, target| row(name, what, Granule::Huge, target);
    let over_bare = What::ExplicitOverF5;
    // What explicit movement can come to: where a bare move costs more than the target allows, that is why it is missed.
    let mut over = [
        explicit("explicit both ways, over bare moves", over_bare, 1.25),
        huge(explicit(
            "explicit both ways, huge pages, over bare moves",
            over_bare,
            1.25,
        )),
    ];
    let mut rows = vec![
        blocks.clone(),
        huge(row(
            "2 MiB granule, huge pages",
            What::Demand,
            Granule::Huge,
            0.2,
        )),
        granules.clone(),
        explicit("explicit both ways", What::Explicit, 0.1),
        huge(explicit(
            "explicit both ways, huge pages",
            What::Explicit,
            0.02,
        )),
    ];
    if is_large(len) {
        // A case of this size takes some seconds, and here it would say what the small one does.
        over.iter_mut().for_each(|row| row.settings = QUIET);
    } else {
        rows.extend([by_thread(blocks), by_thread(granules)]);
    }
    rows.extend(over);
    rows.push(huge(Row {
        // A loop over what is in place asks nothing of the kernel.
        settings: QUIET,
        // 0.95 of the bandwidth.
        ..row("triad in place", What::InPlace, Granule::Huge, 1.0 / 0.95)
    }));
    rows
}

fn is_large(len: usize) -> bool {
    len * size_of::<f64>() > 256 * MIB
}

/// Faults and movements of a round, of which there are as many in each.
fn movements(case: &Case, taken: &Stats) -> [Note; 4] {
    let door = if case.delivery == "thread" {
        ", thread door"
    } else {
        ""
    };
    [
        (
            "device faults",
            taken.device_read_faults + taken.device_write_faults,
        ),
        ("moves out", taken.to_device_runs),
        ("CPU faults", taken.cpu_read_faults + taken.cpu_write_faults),
        ("moves home", taken.to_host_runs),
    ]
    .map(|(what, nr)| {
        let name = format!("{}{door}, {what}", case.name);
        Note::new(name, nr as f64, "a round", None)
    })
}

/// A scan of an array by one worker: device faults for each of its granules, and movements of each of its pages. One, and none twice.
fn scan(
    name: &str,
    run: impl FnOnce(&Accelerator, &mut Buffer<u8>) -> Result<()>,
) -> Result<[Note; 2]> {
    const LEN: usize = 16 * MIB;
    const GRANULES: usize = LEN / Granule::Big.bytes();
    let options = Options::new().granule(Granule::Big);
    let accel = Accelerator::with_options(accel_sim::Options::new().workers(1))?;
    let mut data = Buffer::<u8>::with_options(LEN, &options)?;
    data.as_mut_slice().fill(1);
    let before = data.stats();
    run(&accel, &mut data)?;
    let stats = data.stats() - before;
    let every_page = |data: &Buffer<u8>| data.as_slice().iter().step_by(PAGE_SIZE).all(|&x| x == 2);
    ensure!(every_page(&data), "the scan has left something out");
    let faults = stats.device_read_faults + stats.device_write_faults;
    let note = |what, value, unit| {
        Note::new(
            format!("linear scan {name}, {what}"),
            value,
            unit,
            Some(1.0),
        )
    };
    Ok([
        note(
            "device faults",
            faults as f64 / GRANULES as f64,
            "per granule",
        ),
        note(
            "pages moved to the device",
            stats.to_device_pages() as f64 / (LEN / PAGE_SIZE) as f64,
            "per page",
        ),
    ])
}

/// By slices, which ask for whole blocks, and by single elements, which ask for what they touch.
fn scans() -> Result<Vec<Note>> {
    let slices = scan("by slices", |accel, data| {
        Ok(accel.run(data.view_mut(), |data: &mut [u8]| data.fill(2))?)
    })?;
    let elements = scan("by elements", |accel, data| {
        let len = data.len();
        Ok(accel.run_items(1, data.view_mut(), |_lane, _, data| {
            (0..len).step_by(64).try_for_each(|i| data.store(i, 2))
        })?)
    })?;
    Ok([slices, elements].concat())
}

/// Runs the row in `setting`. What is counted is the same in either.
fn measure(
    row: &Row,
    setting: Setting,
    (machine, args, progress): (&Machine, &Args, &Progress),
    results: &mut Results,
) -> Result<()> {
    // Beside company the rest, the workers made here among it, has a CPU of its own.
    if setting == Setting::Busy {
        pin_to_cpu(HERE);
    }
    let _company = Company::for_setting(setting, THERE);
    let workers = row.workers(setting, machine.nr_cpus);
    let (mut floor, mut ours) = (row.floor(workers)?, row.ours(workers)?);
    let (case, rounds) = (row.case(setting), rounds(args, row.len));
    let outcome = compare(case.clone(), rounds, &mut *floor, &mut *ours, progress)?;
    results.cases.push(outcome);
    if let Some(taken) = ours.taken().filter(|_| setting == Setting::Quiet) {
        results.notes.extend(movements(&case, &taken));
    }
    unpin();
    Ok(())
}

fn rounds(args: &Args, len: usize) -> usize {
    // A round of the large size takes the better part of a second.
    args.rounds(if is_large(len) { 7 } else { 15 })
}

/// Explicit movement with huge pages, each way by itself.
fn ways(args: &Args, row: &Row) -> Result<Vec<Note>> {
    let mut notes = Vec::new();
    pin_to_cpu(HERE);
    for &setting in BOTH {
        let _company = Company::for_setting(setting, THERE);
        notes.extend(each_way(row.len, setting, args.rounds(15))?);
    }
    notes.push(nothing_home(row.len, args.rounds(15))?);
    unpin();
    Ok(notes)
}

fn main() -> Result<()> {
    let args = Args::of_command_line(
        "offload",
        "Measures work that changes sides against copying in and out, and against bare moves",
    );
    let sizes: &[usize] = if args.quick { &[16] } else { &[64, 1024] };
    let rows = sizes.iter().flat_map(|&mib| rows(mib)).collect();
    let rows = args.choose(rows, |row| &row.name, &["scan"]);
    let machine = Machine::here();
    let nr_cases = rows.iter().map(|row| row.settings.len()).sum();
    let progress = Progress::new(nr_cases, rounds(&args, 0));
    let mut results = Results::default();
    for row in &rows {
        for &setting in row.settings {
            measure(row, setting, (&machine, &args, &progress), &mut results)?;
        }
    }
    progress.finish();
    let explicit = |row: &&Row| row.what == What::Explicit && row.huge();
    if let Some(row) = rows.iter().find(explicit) {
        results.notes.extend(ways(&args, row)?);
    }
    if args.wants("scan") {
        results.notes.extend(scans()?);
    }
    publish("offload", &args, &machine, &results)
}
