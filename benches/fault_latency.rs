//! One fault of each kind against its floor: F1 to F5; beside them F6, and where the time of a fault goes.
//!
//! `cargo bench -p benches --bench fault_latency -- [--json FILE] [--plot DIR] [--quick] [FILTER]`

use anyhow::Result;
use benches::device::Rig;
use benches::floors::Job;
use benches::floors::direct::{Memcpy, MinorFault, Move, Mprotect, ProtectAndCopy, Resolve};
use benches::floors::inline::Inline;
use benches::floors::thread::{Place, Reader};
use benches::harness::{Args, Case, Fresh, Progress, Samples, Subject, compare};
use benches::machine::{Company, Counter, Counters, Machine, Setting, pin_to_cpu, unpin};
use benches::report::{Count, Counted, Note, Results, Target, publish};
use svm::addr::{PAGE_SIZE, PAGES_PER_BLOCK};
use svm::notifier::{Hub, Interval};
use svm::sync::{Deadline, Gate, Mutex};
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

/// A subject, and where the thread that measures runs meanwhile.
struct At {
    cpu: Option<usize>,
    subject: Box<dyn Subject>,
}

impl Subject for At {
    fn arm(&mut self) -> Result<()> {
        run_on(self.cpu);
        self.subject.arm()
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        self.subject.pass(samples)
    }
}

/// The calling thread is on this CPU from now on; on any, if it is none.
fn run_on(cpu: Option<usize>) {
    match cpu {
        Some(cpu) => pin_to_cpu(cpu),
        None => unpin(),
    }
}

/// A row of the table, before the settings.
#[derive(Clone, Copy)]
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

impl Row {
    /// The floor's subject and ours.
    fn subjects(self) -> Result<[Box<dyn Subject>; 2]> {
        let floor = move || Ok(self.floor.subject(&self));
        let ours = move || Ours::new(self.kind, self.delivery, self.len, self.granule, self.huge);
        // Many pages a call: which they are is what the call costs.
        if self.granule == Granule::Huge && !self.huge {
            return Ok([Box::new(Fresh::new(floor)), Box::new(Fresh::new(ours))]);
        }
        Ok([floor()?, Box::new(ours()?)])
    }

    fn delivery_name(&self) -> &'static str {
        match self.delivery {
            Delivery::Inline => "inline",
            Delivery::Thread => "thread",
        }
    }
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

    /// Where ours runs while it is measured against this: where the floor does, unless its reader is pinned to the faulter's CPU. That
    /// takes an application that pins itself, which ours is not to need.
    fn cpu_of_ours(self) -> Option<usize> {
        match self {
            Self::Thread(_, Place::Pinned(_)) => None,
            _ => Some(HERE),
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
            "cpu write, shared page, 64 KiB",
            CpuWriteShared,
            thread,
            4 * MIB,
            big,
            false,
            Floor::Thread(unprotect, free),
            1.25,
        ),
        row(
            "cpu touch, device page, 64 KiB",
            CpuTouchAway,
            thread,
            4 * MIB,
            big,
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

/// F6, for comparison: what other ways to learn of an access cost, and what a copy does.
fn context(rounds: usize) -> Result<Vec<Note>> {
    let mut subjects: [(&str, Box<dyn Subject>); 5] = [
        ("F6 plain minor fault", Box::new(MinorFault::new(MIB))),
        ("F6 mprotect and SIGSEGV", Box::new(Mprotect::new(MIB))),
        (
            "F6 memcpy, 4 KiB",
            Box::new(Memcpy::new(16 * MIB, PAGE_SIZE)),
        ),
        (
            "F6 memcpy, 64 KiB",
            Box::new(Memcpy::new(64 * MIB, Granule::Big.bytes())),
        ),
        (
            "F6 memcpy, 2 MiB",
            Box::new(Memcpy::new(64 * MIB, Granule::Huge.bytes())),
        ),
    ];
    let mut all: [Samples; 5] = std::array::from_fn(|_| Samples::new());
    for _ in 0..rounds {
        for ((_, subject), samples) in subjects.iter_mut().zip(&mut all) {
            subject.arm()?;
            subject.pass(samples)?;
        }
    }
    Ok(subjects
        .iter()
        .zip(&all)
        .map(|((name, _), samples)| Note::new(*name, samples.quantile(0.5) as f64, "ns", None))
        .collect())
}

/// Nanoseconds that `piece` takes, alone and over and over: the median of batches.
fn alone<R>(mut piece: impl FnMut() -> R) -> f64 {
    const BATCH: u32 = 1_000;
    let mut samples = Samples::new();
    for _ in 0..101 {
        samples.time(|| {
            for _ in 0..BATCH {
                std::hint::black_box(piece());
            }
        });
    }
    samples.quantile(0.5) as f64 / f64::from(BATCH)
}

/// The medians of subjects that take turns, in the other direction every second round.
fn medians<const N: usize>(rounds: usize, mut subjects: [Box<dyn Subject>; N]) -> Result<[f64; N]> {
    let mut all: [Samples; N] = std::array::from_fn(|_| Samples::new());
    for round in 0..rounds {
        let mut turns: Vec<_> = subjects.iter_mut().zip(&mut all).collect();
        if round % 2 == 1 {
            turns.reverse();
        }
        for (subject, samples) in turns {
            subject.arm()?;
            subject.pass(samples)?;
        }
    }
    Ok(all.map(|samples| samples.quantile(0.5) as f64))
}

/// Where the time of a fault on 4 KiB goes, nothing else running. What the kernel takes follows from floors that are measured here by
/// turns with ours, and are not those of the table; the rest is the runtime's.
fn breakdown(rounds: usize) -> Result<Vec<Note>> {
    let steps = steps_inline(rounds)?
        .into_iter()
        .chain(steps_thread(rounds)?)
        .chain(steps_alone());
    Ok(steps
        .map(|(name, ns)| Note::new(format!("step: {name}"), ns, "ns", None))
        .collect())
}

type Step = (&'static str, f64);

/// Of faults that the faulting thread resolves, the device's and the CPU's.
fn steps_inline(rounds: usize) -> Result<[Step; 10]> {
    const PAGE: Granule = Granule::Page;
    let ours = |kind| Ours::new(kind, Delivery::Inline, MIB, PAGE, false);
    let [
        unprotect,
        f1,
        cpu_write,
        move_home,
        f2,
        cpu_touch,
        f5,
        migration,
        f4,
        duplication,
    ] = medians(
        rounds,
        [
            Box::new(Resolve::new(Job::Unprotect, MIB, PAGE.bytes())),
            Box::new(Inline::new(Job::Unprotect, MIB, PAGE.bytes())),
            Box::new(ours(Kind::CpuWriteShared)?),
            Box::new(Resolve::new(Job::MoveHome, MIB, PAGE.bytes())),
            Box::new(Inline::new(Job::MoveHome, MIB, PAGE.bytes())),
            Box::new(ours(Kind::CpuTouchAway)?),
            Box::new(Move::new(MIB, PAGE.bytes(), false)),
            Box::new(ours(Kind::DeviceMigrates)?),
            Box::new(ProtectAndCopy::new(MIB, PAGE.bytes())),
            Box::new(ours(Kind::DeviceDuplicates)?),
        ],
    )?;
    Ok([
        ("cpu write: un-protecting, alone", unprotect),
        (
            "cpu write: exception, signal and return (F1 less that)",
            f1 - unprotect,
        ),
        ("cpu write: the runtime (ours less F1)", cpu_write - f1),
        ("cpu touch: MOVE home, alone", move_home),
        (
            "cpu touch: exception, signal and return (F2 less that)",
            f2 - move_home,
        ),
        ("cpu touch: the runtime (ours less F2)", cpu_touch - f2),
        ("migration: MOVE out, alone (F5)", f5),
        ("migration: the runtime (ours less F5)", migration - f5),
        ("duplication: protect and copy, alone (F4)", f4),
        ("duplication: the runtime (ours less F4)", duplication - f4),
    ])
}

/// Of a CPU touch that the monitor resolves: on the faulter's own CPU, and where the scheduler has both.
fn steps_thread(rounds: usize) -> Result<[Step; 4]> {
    const PAGE: Granule = Granule::Page;
    let ours = || Ours::new(Kind::CpuTouchAway, Delivery::Thread, MIB, PAGE, false);
    let at = |cpu, subject: Box<dyn Subject>| Box::new(At { cpu, subject });
    let floor = Reader::new(Job::MoveHome, MIB, PAGE.bytes(), Place::Pinned(HERE));
    let [move_home, f3, pinned, free] = medians(
        rounds,
        [
            at(
                Some(HERE),
                Box::new(Resolve::new(Job::MoveHome, MIB, PAGE.bytes())),
            ),
            at(Some(HERE), Box::new(floor)),
            at(Some(HERE), Box::new(ours()?)),
            at(None, Box::new(ours()?)),
        ],
    )?;
    pin_to_cpu(HERE);
    Ok([
        ("cpu touch, thread door: MOVE home, alone", move_home),
        (
            "cpu touch, thread door: exception, message, a switch there and one back (F3 pinned less that)",
            f3 - move_home,
        ),
        (
            "cpu touch, thread door: the runtime (ours, the faulter pinned too, less F3 pinned)",
            pinned - f3,
        ),
        (
            "cpu touch, thread door: a faulter left to the scheduler (ours, beyond that)",
            free - pinned,
        ),
    ])
}

/// Pieces that can be run alone: in a fault, where their code is not in the cache, they cost more.
fn steps_alone() -> [Step; 6] {
    let gate = Gate::new();
    let lock = Mutex::new(0_u64);
    let hub = Hub::new();
    let interval = Interval::new(0x10_0000, 0x10_1000);
    let range = hub.insert(interval);
    let begin_and_look = || {
        range
            .begin(Deadline::NEVER)
            .is_ok_and(|token| range.interrupted(token))
    };
    [
        (
            "the clock, read twice (in every figure)",
            2.0 * alone(std::time::Instant::now),
        ),
        (
            "an empty system call",
            // SAFETY: getppid takes nothing and changes nothing.
            alone(|| unsafe { libc::getppid() }),
        ),
        (
            "of the runtime, warm: gate, entered and left",
            alone(|| drop(gate.enter())),
        ),
        (
            "of the runtime, warm: a lock, taken and released",
            alone(|| drop(lock.lock())),
        ),
        (
            "of the runtime, warm: range, begin and look",
            alone(begin_and_look),
        ),
        (
            "of the runtime, warm: bracket, start and end",
            alone(|| drop(hub.start(interval, None))),
        ),
    ]
}

/// What the jobs of the table take of the kernel, counted; and a CPU touch of a whole block, which the table has not.
fn counts(rounds: usize) -> Result<Vec<Count>> {
    let whole = |name, huge| Row {
        name,
        kind: Kind::CpuTouchAway,
        delivery: Delivery::Inline,
        len: 16 * MIB,
        granule: Granule::Huge,
        huge,
        floor: Floor::Inline(Job::MoveHome),
        target: 1.25,
    };
    let whole = [
        whole("cpu touch, device page, 2 MiB", false),
        whole("cpu touch, device page, 2 MiB huge", true),
    ];
    let mut counts = Vec::new();
    for row in rows().iter().chain(&whole) {
        for setting in [Setting::Quiet, Setting::Busy] {
            counts.push(count(row, setting, rounds)?);
        }
    }
    Ok(counts)
}

fn count(row: &Row, setting: Setting, rounds: usize) -> Result<Count> {
    let _company = Company::for_setting(setting, THERE);
    let cpu = row.floor.cpu_of_ours();
    run_on(cpu);
    let mut ours = Ours::new(row.kind, row.delivery, row.len, row.granule, row.huge)?;
    // All threads are there, so that each can be counted.
    ours.arm()?;
    ours.pass(&mut Samples::new())?;
    let counters = Counters::of_this_process();
    let looking = difference(counters.read(), counters.read());
    let (mut moving, mut sums) = (0, [0; Counters::NR]);
    let mut samples = Samples::new();
    for _ in 0..rounds {
        ours.arm()?;
        // The runtime's outside the kernel's: they are read by system calls too.
        let (stats, before) = (ours.rig.stats(), counters.read());
        ours.pass(&mut samples)?;
        let after = counters.read();
        moving += (ours.rig.stats() - stats).movement_calls();
        for ((sum, n), looking) in sums.iter_mut().zip(difference(before, after)).zip(looking) {
            *sum += n.saturating_sub(looking);
        }
    }
    run_on(Some(HERE));
    let each = |n: u64| n as f64 / samples.len() as f64;
    let moving = Counted {
        counter: Counter {
            what: "system calls that move",
            source: "of the runtime's own count",
        },
        each: Some(each(moving)),
    };
    let kinds = counters.kinds().into_iter().zip(counters.read());
    let of_kernel = kinds.zip(sums).map(|((counter, offered), sum)| Counted {
        counter,
        each: offered.map(|_| each(sum)),
    });
    Ok(Count {
        name: row.name.to_owned(),
        delivery: row.delivery_name(),
        setting,
        is_free: cpu.is_none(),
        n: samples.len(),
        figures: std::iter::once(moving).chain(of_kernel).collect(),
    })
}

/// By how much each has grown; 0 for what is not counted.
fn difference(
    before: [Option<u64>; Counters::NR],
    after: [Option<u64>; Counters::NR],
) -> [u64; Counters::NR] {
    std::array::from_fn(|i| {
        let [before, after] = [before, after].map(|count| count[i].unwrap_or(0));
        after - before
    })
}

fn main() -> Result<()> {
    let args = Args::of_command_line(
        "fault_latency",
        "Measures one fault of each kind against its floor, the least code that could resolve it",
    );
    let rows = args.choose(rows(), |row| row.name, &["F6", "breakdown"]);
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
    let rounds = args.rounds(41);
    let progress = Progress::new(2 * rows.len(), rounds);
    let mut outcomes = Vec::new();
    for row in &rows {
        for setting in [Setting::Quiet, Setting::Busy] {
            let _company = Company::for_setting(setting, THERE);
            let [floor, ours] = row.subjects()?;
            let mut floor = At {
                cpu: Some(HERE),
                subject: floor,
            };
            let mut ours = At {
                cpu: row.floor.cpu_of_ours(),
                subject: ours,
            };
            let case = Case {
                name: row.name.to_owned(),
                delivery: row.delivery_name(),
                setting,
                floor: row.floor.name(),
                target: Some(Target::p50(row.target)),
            };
            outcomes.push(compare(case, rounds, &mut floor, &mut ours, &progress)?);
            pin_to_cpu(HERE);
        }
    }
    progress.finish();
    let (mut notes, mut counted) = (Vec::new(), Vec::new());
    if args.wants("F6") {
        notes.extend(context(rounds)?);
    }
    if args.wants("breakdown") {
        notes.extend(breakdown(rounds)?);
        counted = counts(if args.quick { 2 } else { 8 })?;
    }
    const { assert!(PAGES_PER_BLOCK * PAGE_SIZE == 2 * MIB) };
    publish(
        "fault_latency",
        &args,
        &machine,
        &Results {
            cases: outcomes,
            notes,
            counts: counted,
            ..Results::default()
        },
    )
}
