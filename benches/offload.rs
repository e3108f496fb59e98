//! Work that changes sides: data just written by the CPU, a triad on the accelerator, the result read by the CPU.
//!
//! Ours is the *overhead*: the time of all that, less the time of the same kernel on data that is in place and of the same
//! reading of data that is home. Its floor is what a program without shared memory pays around as many of the same workers: two arrays
//! copied in, one copied out, by the caller.
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
use benches::harness::{Args, Case, Progress, Samples, Subject, compare};
use benches::machine::{Company, Machine, Setting, pin_to_cpu, unpin};
use benches::report::{Note, Results, Target, publish};
use svm::addr::PAGE_SIZE;
use svm::{Access, Buffer, Granule, Options};

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
}

impl Offload {
    fn new(len: usize, workers: usize, granule: Granule, huge: bool) -> Result<Self> {
        let options = Options::new().granule(granule).huge_pages(huge);
        let buffer = || Buffer::with_options(len, &options);
        let accel = Accelerator::with_options(accel_sim::Options::new().workers(workers))?;
        Ok(Self {
            accel,
            a: buffer()?,
            b: buffer()?,
            c: buffer()?,
            round: 0.0,
        })
    }

    fn run(&mut self) -> Result<()> {
        Ok(self.accel.run(
            (self.a.view_mut(), self.b.view(), self.c.view()),
            |(a, b, c)| triad(a, b, c),
        )?)
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
        let whole = timed(|| {
            self.run()?;
            sum(self.a.as_slice());
            Ok(())
        })?;
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

/// Everything in one call each way, before the kernel and after it: what is then left of a launch is the kernel.
///
/// By the device of the other benches, which has no workers: the movement is the whole overhead.
struct Explicit {
    rigs: [Rig; 3],
}

impl Explicit {
    fn new(len: usize, huge: bool) -> Result<Self> {
        let options = Options::new().granule(Granule::Huge).huge_pages(huge);
        let rig = || Rig::new(len * size_of::<f64>(), &options);
        Ok(Self {
            rigs: [rig()?, rig()?, rig()?],
        })
    }
}

impl Subject for Explicit {
    fn arm(&mut self) -> Result<()> {
        for rig in &mut self.rigs {
            rig.release()?;
            rig.bytes().fill(1);
        }
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let out = timed(|| {
            for rig in &mut self.rigs {
                let (first, nr_pages) = (rig.first_page(), rig.bytes().len() / PAGE_SIZE);
                rig.prefetch(first..first + nr_pages, Access::Write)?;
            }
            Ok(())
        })?;
        // The result, and not the inputs.
        let home = timed(|| self.rigs[0].release())?;
        samples.record(u64::try_from((out + home).as_nanos())?);
        Ok(())
    }
}

/// F5 for the same: bare moves of three areas out, and of one home.
struct Bare([Pair; 3]);

impl Bare {
    fn new(len: usize, huge: bool) -> Self {
        let bytes = (len * size_of::<f64>()).next_multiple_of(2 * MIB);
        Self(std::array::from_fn(|_| {
            Pair::new(bytes, Faults::Signal, huge)
        }))
    }
}

impl Subject for Bare {
    fn arm(&mut self) -> Result<()> {
        self.0.iter().for_each(|pair| pair.host.populate());
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        samples.time(|| {
            self.0.iter().for_each(Pair::move_out);
            self.0[0].move_home();
        });
        self.0[1..].iter().for_each(Pair::move_home);
        Ok(())
    }
}

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

/// What a case does; with how many workers.
#[derive(Clone, Copy)]
enum What {
    Demand(usize),
    Explicit,
    ExplicitOverF5,
    InPlace(usize),
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

fn main() -> Result<()> {
    let args = Args::of_command_line();
    let machine = Machine::here();
    let sizes: &[usize] = if args.quick { &[16] } else { &[64, 1024] };
    let mut cases: Vec<(String, usize, What, Granule, bool, f64)> = Vec::new();
    for &mib in sizes {
        // The size is of the three arrays together.
        let len = mib * MIB / 3 / size_of::<f64>() / (MIB / 4) * (MIB / 4);
        let mut add = |name: &str, what, granule, huge, target| {
            let name = format!("offload, {mib} MiB, {name}");
            cases.push((name, len, what, granule, huge, target));
        };
        let all = What::Demand(machine.nr_cpus);
        add("2 MiB granule", all, Granule::Huge, false, 0.5);
        add("2 MiB granule, huge pages", all, Granule::Huge, true, 0.2);
        add(
            "64 KiB granule, 1 worker",
            What::Demand(1),
            Granule::Big,
            false,
            1.0,
        );
        add(
            "explicit both ways",
            What::Explicit,
            Granule::Huge,
            false,
            0.1,
        );
        add(
            "explicit both ways, huge pages",
            What::Explicit,
            Granule::Huge,
            true,
            0.02,
        );
        // What these can come to: where a bare move costs more than the target allows, that is why it is missed.
        add(
            "explicit both ways, over bare moves",
            What::ExplicitOverF5,
            Granule::Huge,
            false,
            1.25,
        );
        // 0.95 of the bandwidth.
        add(
            "triad in place",
            What::InPlace(machine.nr_cpus),
            Granule::Huge,
            true,
            1.0 / 0.95,
        );
    }
    cases.retain(|case| args.wants(&case.0));
    // A round of the large size takes a second.
    let rounds = |len: usize| {
        args.rounds(if len * size_of::<f64>() > 256 * MIB {
            7
        } else {
            15
        })
    };
    // Where all CPUs are workers', they are each other's company; and a loop over what is in place asks nothing of the kernel.
    let settings = |what: What| -> &[Setting] {
        match what {
            What::Demand(1) | What::Explicit | What::ExplicitOverF5 => {
                &[Setting::Quiet, Setting::Busy]
            }
            What::Demand(_) | What::InPlace(_) => &[Setting::Quiet],
        }
    };
    let cases: Vec<_> = cases
        .iter()
        .flat_map(|case| settings(case.2).iter().map(move |&setting| (case, setting)))
        .collect();
    let progress = Progress::new(cases.len(), rounds(0));
    let mut outcomes = Vec::new();
    for (&(ref name, len, what, granule, huge, target), setting) in cases {
        // Beside company the rest, the workers made here among it, has a CPU of its own.
        if setting == Setting::Busy {
            pin_to_cpu(HERE);
        }
        let _company = Company::for_setting(setting, THERE);
        let (mut floor, mut ours): (Box<dyn Subject>, Box<dyn Subject>) = match what {
            What::Demand(workers) => (
                Box::new(Copies::new(len, workers, huge)?),
                Box::new(Offload::new(len, workers, granule, huge)?),
            ),
            What::Explicit => (
                Box::new(Copies::new(len, 1, huge)?),
                Box::new(Explicit::new(len, huge)?),
            ),
            What::ExplicitOverF5 => (
                Box::new(Bare::new(len, huge)),
                Box::new(Explicit::new(len, huge)?),
            ),
            What::InPlace(workers) => (
                Box::new(Plain::new(len, workers)),
                Box::new(Resident(Offload::new(len, workers, granule, huge)?)),
            ),
        };
        let case = Case {
            name: name.clone(),
            delivery: "inline",
            setting,
            floor: match what {
                What::InPlace(_) => "F7",
                What::ExplicitOverF5 => "F5",
                What::Demand(_) | What::Explicit => "copies",
            },
            target: Some(Target::p50(target)),
        };
        outcomes.push(compare(
            case,
            rounds(len),
            &mut *floor,
            &mut *ours,
            &progress,
        )?);
        unpin();
    }
    progress.finish();
    let notes = if args.wants("scan") {
        scans()?
    } else {
        Vec::new()
    };
    publish(
        "offload",
        &args,
        &machine,
        &Results {
            cases: outcomes,
            notes,
            ..Results::default()
        },
    )
}
