//! One fault of each kind against its floor: F1 to F5.
//!
//! `cargo bench -p benches --bench fault_latency -- [--json FILE] [--plot DIR] [--quick] [FILTER]`

use anyhow::Result;
use benches::device::Rig;
use benches::floors::Job;
use benches::floors::direct::{Move, ProtectAndCopy};
use benches::floors::inline::Inline;
use benches::floors::thread::{Place, Reader};
use benches::harness::{Args, Case, Progress, Samples, Subject, compare};
use benches::machine::{Company, Machine, Setting, pin_to_cpu};
use benches::report::{Results, Target, publish};
use clap::Parser;
use svm::addr::{PAGE_SIZE, PAGES_PER_BLOCK};
use svm::{Access, Delivery, Granule, Options};

const MIB: usize = 1 << 20;
/// The measuring thread's CPU, and the one of its company.
const HERE: usize = 0;
const THERE: usize = 1;

/// What ours does in each pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The CPU writes a page that it shares with the device.
    CpuWriteShared,
    /// The CPU writes a page that the device has.
    CpuTouchAway,
    /// The device reads: a copy for each.
    DeviceDuplicates,
    /// The device writes: the pages move.
    DeviceMigrates,
    /// The device gets everything in one call.
    Prefetch,
}

struct Ours {
    rig: Rig,
    kind: Kind,
    granule: usize,
}

impl Ours {
    fn new(
        kind: Kind,
        delivery: Delivery,
        len: usize,
        granule: Granule,
        huge: bool,
    ) -> Result<Self> {
        let duplicates = matches!(kind, Kind::CpuWriteShared | Kind::DeviceDuplicates);
        let options = Options::new()
            .delivery(delivery)
            .granule(granule)
            .huge_pages(huge)
            .read_mostly(duplicates);
        Ok(Self {
            rig: Rig::new(len, &options)?,
            kind,
            granule: granule.bytes(),
        })
    }

    /// One update over everything.
    fn all_to_device(&mut self, access: Access) -> Result<()> {
        let (first, nr_pages) = (self.rig.first_page(), self.rig.bytes().len() / PAGE_SIZE);
        self.rig.prefetch(first..first + nr_pages, access)
    }

    /// Everything home, by touching it.
    fn all_home(&mut self) {
        self.rig
            .bytes()
            .iter_mut()
            .step_by(PAGE_SIZE)
            .for_each(|byte| *byte = 2);
    }
}

impl Subject for Ours {
    fn arm(&mut self) -> Result<()> {
        match self.kind {
            Kind::CpuWriteShared => {
                self.all_to_device(Access::Read)?;
                std::hint::black_box(
                    self.rig
                        .bytes()
                        .iter()
                        .step_by(PAGE_SIZE)
                        .map(|&b| u64::from(b))
                        .sum::<u64>(),
                );
            }
            Kind::CpuTouchAway => self.all_to_device(Access::Write)?,
            Kind::DeviceDuplicates | Kind::DeviceMigrates => self.all_home(),
            Kind::Prefetch => {
                self.rig.release()?;
                self.all_home();
            }
        }
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let granule = self.granule;
        match self.kind {
            Kind::CpuWriteShared | Kind::CpuTouchAway => {
                for byte in self.rig.bytes().iter_mut().step_by(granule) {
                    // SAFETY: a unique reference; volatile, as the fault is what it is for.
                    samples.time(|| unsafe { std::ptr::from_mut(byte).write_volatile(3) });
                }
            }
            Kind::DeviceDuplicates | Kind::DeviceMigrates => {
                let access = if self.kind == Kind::DeviceDuplicates {
                    Access::Read
                } else {
                    Access::Write
                };
                let (first, nr_pages) = (self.rig.first_page(), self.rig.bytes().len() / PAGE_SIZE);
                for page in (first..first + nr_pages).step_by(granule / PAGE_SIZE) {
                    samples.time(|| self.rig.fault(page..page + 1, access))?;
                }
            }
            Kind::Prefetch => samples.time(|| self.all_to_device(Access::Write))?,
        }
        Ok(())
    }
}

/// A row of the table, before the settings.
struct Row {
    name: &'static str,
    kind: Kind,
    delivery: Delivery,
    len: usize,
    granule: Granule,
    huge: bool,
    floor: Floor,
    target: f64,
}

#[derive(Clone, Copy)]
enum Floor {
    Inline(Job),
    Thread(Job, Place),
    ProtectAndCopy,
    Move(usize),
}

impl Floor {
    fn name(self) -> &'static str {
        match self {
            Self::Inline(Job::Unprotect) => "F1",
            Self::Inline(Job::MoveHome) => "F2",
            Self::Thread(_, Place::Free) => "F3 free",
            Self::Thread(_, Place::Pinned(_)) => "F3 pinned",
            Self::ProtectAndCopy => "F4",
            Self::Move(_) => "F5",
        }
    }

    fn subject(self, row: &Row) -> Box<dyn Subject> {
        let (len, granule) = (row.len, row.granule.bytes());
        match self {
            Self::Inline(job) => Box::new(Inline::new(job, len, granule)),
            Self::Thread(job, place) => Box::new(Reader::new(job, len, granule, place)),
            Self::ProtectAndCopy => Box::new(ProtectAndCopy::new(len, granule)),
            Self::Move(bytes) => Box::new(Move::new(len, bytes, row.huge)),
        }
    }
}

fn rows() -> Vec<Row> {
    let row = |name, kind, delivery, len, granule, huge, floor, target| Row {
        name,
        kind,
        delivery,
        len,
        granule,
        huge,
        floor,
        target,
    };
    let (inline, thread) = (Delivery::Inline, Delivery::Thread);
    let (page, big, block) = (Granule::Page, Granule::Big, Granule::Huge);
    let (unprotect, home) = (Job::Unprotect, Job::MoveHome);
    let (free, pinned) = (Place::Free, Place::Pinned(HERE));
    use Kind::{CpuTouchAway, CpuWriteShared, DeviceDuplicates, DeviceMigrates, Prefetch};
    vec![
        row(
            "cpu write, shared page, 4 KiB",
            CpuWriteShared,
            inline,
            MIB,
            page,
            false,
            Floor::Inline(unprotect),
            1.25,
        ),
        row(
            "cpu write, shared page, 64 KiB",
            CpuWriteShared,
            inline,
            4 * MIB,
            big,
            false,
            Floor::Inline(unprotect),
            1.25,
        ),
        row(
            "cpu touch, device page, 4 KiB",
            CpuTouchAway,
            inline,
            MIB,
            page,
            false,
            Floor::Inline(home),
            1.25,
        ),
        row(
            "cpu touch, device page, 64 KiB",
            CpuTouchAway,
            inline,
            4 * MIB,
            big,
            false,
            Floor::Inline(home),
            1.25,
        ),
        row(
            "device duplicates, 4 KiB",
            DeviceDuplicates,
            inline,
            MIB,
            page,
            false,
            Floor::ProtectAndCopy,
            1.25,
        ),
        row(
            "device duplicates, 64 KiB",
            DeviceDuplicates,
            inline,
            4 * MIB,
            big,
            false,
            Floor::ProtectAndCopy,
            1.25,
        ),
        row(
            "device migrates, 4 KiB",
            DeviceMigrates,
            inline,
            MIB,
            page,
            false,
            Floor::Move(page.bytes()),
            1.25,
        ),
        row(
            "device migrates, 64 KiB",
            DeviceMigrates,
            inline,
            4 * MIB,
            big,
            false,
            Floor::Move(big.bytes()),
            1.25,
        ),
        row(
            "device migrates, 2 MiB",
            DeviceMigrates,
            inline,
            16 * MIB,
            block,
            false,
            Floor::Move(block.bytes()),
            1.25,
        ),
        row(
            "device migrates, 2 MiB huge",
            DeviceMigrates,
            inline,
            16 * MIB,
            block,
            true,
            Floor::Move(block.bytes()),
            1.25,
        ),
        row(
            "prefetch, 64 MiB",
            Prefetch,
            inline,
            64 * MIB,
            block,
            false,
            Floor::Move(64 * MIB),
            1.25,
        ),
        row(
            "prefetch, 64 MiB huge",
            Prefetch,
            inline,
            64 * MIB,
            block,
            true,
            Floor::Move(64 * MIB),
            1.25,
        ),
        row(
            "cpu write, shared page, 4 KiB",
            CpuWriteShared,
            thread,
            MIB,
            page,
            false,
            Floor::Thread(unprotect, free),
            1.25,
        ),
        row(
            "cpu touch, device page, 4 KiB",
            CpuTouchAway,
            thread,
            MIB,
            page,
            false,
            Floor::Thread(home, free),
            1.25,
        ),
        row(
            "cpu write, shared page, 4 KiB",
            CpuWriteShared,
            thread,
            MIB,
            page,
            false,
            Floor::Thread(unprotect, pinned),
            1.5,
        ),
        row(
            "cpu touch, device page, 4 KiB",
            CpuTouchAway,
            thread,
            MIB,
            page,
            false,
            Floor::Thread(home, pinned),
            1.5,
        ),
    ]
}

fn main() -> Result<()> {
    let args = Args::parse();
    let machine = Machine::here();
    // Before anything is pinned: the runtime's threads start with their maker's CPUs.
    for delivery in [Delivery::Inline, Delivery::Thread] {
        drop(svm::Buffer::<u8>::with_options(
            PAGE_SIZE,
            &Options::new().delivery(delivery),
        )?);
    }
    pin_to_cpu(HERE);
    let _signals = svm::worker_thread();
    let rows: Vec<_> = rows()
        .into_iter()
        .filter(|row| args.wants(row.name))
        .collect();
    let rounds = args.rounds(41);
    let progress = Progress::new(2 * rows.len(), rounds);
    let mut outcomes = Vec::new();
    for row in &rows {
        for setting in [Setting::Quiet, Setting::Busy] {
            let _company = Company::for_setting(setting, THERE);
            let mut floor = row.floor.subject(row);
            let mut ours = Ours::new(row.kind, row.delivery, row.len, row.granule, row.huge)?;
            let case = Case {
                name: row.name.to_owned(),
                delivery: if row.delivery == Delivery::Inline {
                    "inline"
                } else {
                    "thread"
                },
                setting,
                floor: row.floor.name(),
                target: Some(Target::p50(row.target)),
            };
            outcomes.push(compare(case, rounds, &mut *floor, &mut ours, &progress)?);
        }
    }
    progress.finish();
    const { assert!(PAGES_PER_BLOCK * PAGE_SIZE == 2 * MIB) };
    publish(
        "fault_latency",
        &args,
        &machine,
        &Results {
            cases: outcomes,
            ..Results::default()
        },
    )
}
