//! Work that changes sides: data just written by the CPU, a triad on the accelerator, the result read by the CPU.
//!
//! Ours is the *overhead*: the time of all that, less the time of the same kernel on data that is in place and of the same
//! reading of data that is home. Its floor is what a program without shared memory pays around the same workers: two arrays
//! copied in, one copied out.
//!
//! `cargo bench -p benches --bench offload -- [--json FILE] [--plot DIR] [--quick] [FILTER]`

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use accel_sim::Accelerator;
use anyhow::Result;
use benches::device::Rig;
use benches::floors::Pair;
use benches::floors::raw::{Area, Faults};
use benches::harness::{Args, Case, Progress, Samples, Subject, compare};
use benches::machine::{Machine, Setting};
use benches::report::{Note, Results, Target, publish};
use svm::addr::PAGE_SIZE;
use svm::{Access, Buffer, Granule, Options};

const MIB: usize = 1 << 20;
const SCALE: f64 = 3.0;

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
        let read = timed(|| {
            sum(self.a.as_slice());
            Ok(())
        })?;
        // Brings the result back to the device; then everything is in place.
        self.run()?;
        let kernel = timed(|| self.run())?;
        samples.record(u64::try_from(
            whole.saturating_sub(read + kernel).as_nanos(),
        )?);
        Ok(())
    }
}

/// What explicit copies cost around the same workers.
struct Copies {
    host: [Vec<f64>; 3],
    device: [Vec<f64>; 3],
}

impl Copies {
    fn new(len: usize) -> Self {
        let arrays = || std::array::from_fn(|_| vec![1.0; len]);
        Self {
            host: arrays(),
            device: arrays(),
        }
    }
}

impl Subject for Copies {
    fn arm(&mut self) -> Result<()> {
        self.host.iter_mut().for_each(|array| array.fill(2.0));
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let copy = timed(|| {
            self.device[1].copy_from_slice(&self.host[1]);
            self.device[2].copy_from_slice(&self.host[2]);
            Ok(())
        })?;
        // The kernel, between: so that the caches are as after it.
        let [a, b, c] = &mut self.device;
        triad(a, b, c);
        let back = timed(|| {
            self.host[0].copy_from_slice(&self.device[0]);
            Ok(())
        })?;
        sum(&self.host[0]);
        samples.record(u64::try_from((copy + back).as_nanos())?);
        Ok(())
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

    /// The floats of an array.
    fn floats(area: &mut Area) -> &mut [f64] {
        // SAFETY: the area is populated, aligned, of as many bytes, and borrowed exclusively; any bits are a float.
        unsafe {
            std::slice::from_raw_parts_mut(
                std::ptr::with_exposed_provenance_mut(area.addr()),
                area.len() / size_of::<f64>(),
            )
        }
    }
}

const PASSES: usize = 4;

impl Subject for Plain {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let [a, b, c] = self.arrays.each_mut().map(Self::floats);
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

/// Faults per granule of a scan by one worker: one, and none twice.
fn faults_per_granule() -> Result<Note> {
    const LEN: usize = 16 * MIB;
    let options = Options::new().granule(Granule::Big);
    let accel = Accelerator::with_options(accel_sim::Options::new().workers(1))?;
    let mut data = Buffer::<u8>::with_options(LEN, &options)?;
    data.as_mut_slice().fill(1);
    accel.run(data.view_mut(), |data: &mut [u8]| data.fill(2))?;
    let stats = data.stats();
    let pages = (stats.to_device_pages() as usize).max(LEN / PAGE_SIZE);
    let granules = pages / Granule::Big.pages();
    Ok(Note::new(
        "linear scan on demand, movements of a granule",
        stats.to_device_runs as f64 / granules as f64,
        "per granule",
        Some(1.0),
    ))
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
    let progress = Progress::new(cases.len(), rounds(0));
    let mut outcomes = Vec::new();
    for (name, len, what, granule, huge, target) in cases {
        let (mut floor, mut ours): (Box<dyn Subject>, Box<dyn Subject>) = match what {
            What::Demand(workers) => (
                Box::new(Copies::new(len)),
                Box::new(Offload::new(len, workers, granule, huge)?),
            ),
            What::Explicit => (
                Box::new(Copies::new(len)),
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
            name,
            delivery: "inline",
            setting: Setting::Quiet,
            floor: match what {
                What::InPlace(_) => "F7",
                What::ExplicitOverF5 => "F5",
                What::Demand(_) | What::Explicit => "copies",
            },
            target: Some(Target::p50_alone(target)),
        };
        outcomes.push(compare(
            case,
            rounds(len),
            &mut *floor,
            &mut *ours,
            &progress,
        )?);
    }
    progress.finish();
    let notes = if args.wants("scan") {
        vec![faults_per_granule()?]
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
