//! What grows with what: fault cost with the size of a region and their number, rates with threads, time with workers.
//!
//! Here the floor is ours in the small: the same thing with one of what there are many of.
//!
//! `cargo bench -p benches --bench scaling -- [--json FILE] [--plot DIR] [--quick] [FILTER]`

use accel_sim::Accelerator;
use anyhow::{Result, ensure};
use benches::device::Rig;
use benches::floors::raw::{Area, Faults, Uffd};
use benches::harness::{Args, Case, Progress, Samples, Subject, compare};
use benches::machine::{Machine, Setting};
use benches::report::{Note, Results, Target, publish};
use clap::Parser;
use svm::addr::PAGE_SIZE;
use svm::{Access, Buffer, Granule, Options};

const MIB: usize = 1 << 20;
/// What is faulted on, of a region of any size.
const PART: usize = 4 * MIB;

/// Device fault and CPU fault by turns over a part of a region.
struct Faults4MiB {
    rig: Rig,
    from: usize,
    /// Regions that are only there.
    _others: Vec<Buffer<u8>>,
}

impl Faults4MiB {
    fn new(len: usize, nr_others: usize) -> Result<Self> {
        let options = Options::new();
        let from = (len - PART) / 2 / (2 * MIB) * (2 * MIB);
        let others = (0..nr_others)
            .map(|_| Buffer::zeroed(PAGE_SIZE))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            rig: Rig::sparse(len, from..from + PART, &options)?,
            from,
            _others: others,
        })
    }
}

impl Subject for Faults4MiB {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let granule = Granule::Big;
        let first = self.rig.first_page() + self.from / PAGE_SIZE;
        for i in 0..PART / granule.bytes() {
            let page = first + i * granule.pages();
            samples.time(|| -> Result<()> {
                self.rig.fault(page..page + 1, Access::Write)?;
                self.rig.bytes()[self.from + i * granule.bytes()] = 2;
                Ok(())
            })?;
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

/// Two threads, each faulting on a region of its own, against one of them.
struct Threads(Vec<Faults4MiB>);

impl Subject for Threads {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let all: Vec<Result<Samples>> = std::thread::scope(|scope| {
            let run = |subject: &mut Faults4MiB| -> Result<Samples> {
                let _signals = svm::worker_thread();
                let mut samples = Samples::new();
                for _ in 0..4 {
                    subject.pass(&mut samples)?;
                }
                Ok(samples)
            };
            let threads: Vec<_> = self
                .0
                .iter_mut()
                .map(|subject| scope.spawn(move || run(subject)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        for of_one in all {
            samples.absorb(&of_one?);
        }
        Ok(())
    }
}

/// Resident bytes of this process.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<usize>().ok())
        .unwrap_or(0)
        * PAGE_SIZE
}

/// What the runtime keeps for each page: of a region whose blocks have all been away once, less the pages themselves.
fn bookkeeping() -> Result<Vec<Note>> {
    const LEN: usize = 256 * MIB;
    let before = resident();
    let mut rig = Rig::new(LEN, &Options::new().granule(Granule::Huge))?;
    let first = rig.first_page();
    rig.prefetch(first..first + LEN / PAGE_SIZE, Access::Write)?;
    rig.release()?;
    let kept = resident().saturating_sub(before + LEN);
    let per_page = kept as f64 / (LEN / PAGE_SIZE) as f64;
    drop(rig);
    // Ten million pages of address space, of which one in ten thousand is touched.
    const SPARSE: usize = 10_000_000 * PAGE_SIZE;
    let before = resident();
    let mut sparse = Buffer::<u8>::zeroed(SPARSE)?;
    let touched = (0..SPARSE)
        .step_by(10_000 * PAGE_SIZE)
        .map(|at| sparse.as_mut_slice()[at] = 1)
        .count();
    let kept = resident().saturating_sub(before) as f64 / MIB as f64;
    Ok(vec![
        Note {
            name: "bookkeeping, all blocks used".into(),
            value: per_page,
            unit: "bytes a page",
            target: Some(8.0),
        },
        Note {
            name: format!("10^7 pages reserved, {touched} touched: resident"),
            value: kept,
            unit: "MiB",
            target: None,
        },
    ])
}

fn main() -> Result<()> {
    let args = Args::parse();
    let machine = Machine::here();
    let _signals = svm::worker_thread();
    let rounds = args.rounds(21);
    type Make = fn() -> Result<Box<dyn Subject>>;
    let small: Make = || Ok(Box::new(Faults4MiB::new(PART, 0)?));
    let cases: [(&str, &str, Make, Make, f64); 5] = [
        (
            "fault there and back, region of 4 GiB",
            "4 MiB",
            small,
            || Ok(Box::new(Faults4MiB::new(4 * 1024 * MIB, 0)?)),
            1.1,
        ),
        (
            "fault there and back, 1000 regions",
            "1 region",
            small,
            || Ok(Box::new(Faults4MiB::new(PART, 1000)?)),
            1.2,
        ),
        (
            "fault there and back, 2 threads",
            "1 thread",
            || Ok(Box::new(Threads(vec![Faults4MiB::new(PART, 0)?]))),
            || {
                Ok(Box::new(Threads(vec![
                    Faults4MiB::new(PART, 0)?,
                    Faults4MiB::new(PART, 0)?,
                ])))
            },
            1.25,
        ),
        (
            "launch on 64 workers",
            "1 worker",
            || Ok(Box::new(Launch::new(1)?)),
            || Ok(Box::new(Launch::new(64)?)),
            2.0,
        ),
        (
            "mirror and drop, 64 MiB",
            "REGISTER",
            || {
                let area = Area::new(64 * MIB, false);
                area.populate();
                Ok(Box::new(Register(Uffd::open(Faults::Signal), area)))
            },
            || Ok(Box::new(Mirror(vec![1; 64 * MIB]))),
            1.5,
        ),
    ];
    let cases: Vec<_> = cases
        .into_iter()
        .filter(|case| args.wants(case.0))
        .collect();
    let progress = Progress::new(cases.len(), rounds);
    let mut outcomes = Vec::new();
    for (name, floor, make_floor, make_ours, target) in cases {
        let case = Case {
            name: name.into(),
            delivery: "inline",
            setting: Setting::Quiet,
            floor,
            target: Some(Target::p50_alone(target)),
        };
        outcomes.push(compare(
            case,
            rounds,
            &mut *make_floor()?,
            &mut *make_ours()?,
            &progress,
        )?);
    }
    progress.finish();
    let notes = if args.wants("bookkeeping") {
        bookkeeping()?
    } else {
        Vec::new()
    };
    publish(
        "scaling",
        &args,
        &machine,
        &Results {
            cases: outcomes,
            notes,
            ..Results::default()
        },
    )
}
