//! Every pairing: a device fault, stopped at each of its stages, against each thing that can happen to its page meanwhile.
//!
//! The device's access is stopped; its rival is let run until it is done or can get no further; the device goes on; what came of
//! it is compared with `outcomes.txt`, line by line. A line is
//!
//! ```text
//! access          stage            rival         who went first, what the device got, whether it had to begin anew,
//!                                                what the rival got, the three words in the end, and who has the page
//! ```
//!
//! The words say the order: the device writes 2 to the first, the CPU 3 to the second, the other device 4 to the third. Where the
//! two doors differ there is a line for each. The file was not made by believing what came out: each cell is also held
//! against the rules in [`check`], which know nothing of it. `SVM_REPLAY_CELL="Update/Read AfterSnapshot"` plays only the cells that
//! contain that.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

use svm::point::Point;
use svm::{Delivery, DeviceFaultKind, Mirror};

use crate::director::{Actor, Director, OWN, Part, Settled};
use crate::rig::{BEFORE, Memory, Op, PAGE, SUBJECT, Shape, Words, Worker, attach, options};

const DEVICE: Actor = Actor::Nr(0);
const RIVAL: Actor = Actor::Nr(1);

/// What the device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Read,
    /// A read that duplicates the page instead of moving it.
    Share,
    Write,
}

/// Where it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    BeforeSnapshot,
    AfterSnapshot,
    BeforeCommit,
    AfterCommit,
    /// It takes the page from another device, which has been told.
    Shootdown,
    /// The same, and an access of the other device goes on.
    ShootdownInFlight,
}

/// What happens to the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rival {
    DeviceRead,
    DeviceWrite,
    CpuWrite,
    CpuTouch,
    Discard,
    Unmap,
    Remap,
    Fork,
    Evict,
    Close,
}

const SHAPES: [Shape; 2] = [Shape::Update, Shape::Round];
const ACCESSES: [Access; 3] = [Access::Read, Access::Share, Access::Write];
const STAGES: [Stage; 6] = [
    Stage::BeforeSnapshot,
    Stage::AfterSnapshot,
    Stage::BeforeCommit,
    Stage::AfterCommit,
    Stage::Shootdown,
    Stage::ShootdownInFlight,
];
const RIVALS: [Rival; 10] = [
    Rival::DeviceRead,
    Rival::DeviceWrite,
    Rival::CpuWrite,
    Rival::CpuTouch,
    Rival::Discard,
    Rival::Unmap,
    Rival::Remap,
    Rival::Fork,
    Rival::Evict,
    Rival::Close,
];

#[derive(Clone, Copy, Debug)]
struct Cell {
    shape: Shape,
    access: Access,
    stage: Stage,
    rival: Rival,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            shape,
            access,
            stage,
            rival,
        } = self;
        let (access, stage, rival) = (
            format!("{shape:?}/{access:?}"),
            format!("{stage:?}"),
            format!("{rival:?}"),
        );
        write!(f, "{access:<13} {stage:<17} {rival:<11}")
    }
}

type Got = Result<Words, DeviceFaultKind>;

/// What came of a cell.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome {
    /// Whether the rival was done before the device went on; and if it was an access of the other device's that it waited
    /// for, whether it was when that had ended.
    passed: bool,
    after_access: bool,
    device: Got,
    interrupted: bool,
    rival: Option<Got>,
    words: Option<Words>,
    holders: String,
}

struct Show<'a>(&'a Got);

impl fmt::Display for Show<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Ok([a, b, c]) => f.pad(&format!("{a}{b}{c}")),
            Err(kind) => f.pad(&format!("{kind:?}")),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = match (self.passed, self.after_access) {
            (true, false) => "passes",
            (true, true) => "passes, the access over",
            (false, _) => "waits",
        };
        let anew = if self.interrupted { "anew" } else { "at once" };
        let rival = self
            .rival
            .as_ref()
            .map_or("-".into(), |got| Show(got).to_string());
        let words = self
            .words
            .map_or("gone".into(), |w| Show(&Ok(w)).to_string());
        write!(
            f,
            "{order:<23} device {:<8} {anew:<7} rival {rival:<8} end {words:<4} {}",
            Show(&self.device),
            self.holders
        )
    }
}

fn point_of(shape: Shape, stage: Stage) -> Option<Point> {
    Some(match (stage, shape) {
        (Stage::BeforeSnapshot, Shape::Update) => Point::UpdateBegun,
        (Stage::AfterSnapshot, Shape::Update) => Point::UpdateFaulted,
        (Stage::BeforeCommit, Shape::Update) => Point::UpdateEnding,
        // The driver's own: installed, and the device lock let go of.
        (Stage::AfterCommit, Shape::Update) => return None,
        (Stage::BeforeSnapshot, Shape::Round) => Point::RoundLocked,
        (Stage::AfterSnapshot, Shape::Round) => Point::RoundMoved,
        (Stage::BeforeCommit, Shape::Round) => Point::RoundCommitting,
        (Stage::AfterCommit, Shape::Round) => Point::RoundCommitted,
        (Stage::Shootdown, _) => Point::RoundExcluding,
        (Stage::ShootdownInFlight, _) => Point::RoundWaiting,
    })
}

fn point_is_in_a_round(stage: Stage) -> bool {
    matches!(stage, Stage::Shootdown | Stage::ShootdownInFlight)
}

/// The rival's part. What it saw, if it looks at all; and where the page has gone, if it was moved away.
fn rival(
    cell: Cell,
    memory: &Memory,
    mirror: &Mutex<Option<Mirror<'static, u8>>>,
    far: &mut Worker<'_>,
    elsewhere: &mut Option<Worker<'_>>,
) -> (Option<Got>, Option<Memory>) {
    let got = match cell.rival {
        Rival::DeviceRead => Some(far.access(Shape::Update, SUBJECT, Op::Read, None)),
        Rival::DeviceWrite => {
            let op = Op::Write { word: 2, value: 4 };
            Some(far.access(Shape::Update, SUBJECT, op, None))
        }
        Rival::CpuWrite => {
            memory.store(SUBJECT, 1, 3);
            None
        }
        Rival::CpuTouch => Some(Ok(memory.load(SUBJECT))),
        Rival::Discard => {
            memory.discard(SUBJECT);
            None
        }
        Rival::Unmap => {
            memory.unmap(SUBJECT);
            None
        }
        Rival::Remap => return (None, Some(memory.remap(SUBJECT))),
        Rival::Fork => Some(Ok(in_a_child(memory))),
        Rival::Evict => {
            let worker = elsewhere.as_mut().expect("made for this rival");
            // The device has memory for one page: this is where the other goes.
            worker.fault(0).unwrap();
            None
        }
        Rival::Close => {
            let mirror = mirror.lock().unwrap().take().expect("closed once");
            mirror.close().unwrap();
            None
        }
    };
    (got, None)
}

/// What a forked child reads.
fn in_a_child(memory: &Memory) -> Words {
    // SAFETY: the child reads three words and exits, no more.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let [a, b, c] = memory.load(SUBJECT);
        // SAFETY: no preconditions. Each word is below 5.
        unsafe { libc::_exit((a + 5 * b + 25 * c) as i32) };
    }
    let mut status = 0;
    // Polled for: asleep in the wait, this thread would look blocked.
    // SAFETY: our own child.
    while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
        std::thread::yield_now();
    }
    assert!(libc::WIFEXITED(status), "the child died: {status:#x}");
    let code = u64::from(libc::WEXITSTATUS(status).cast_unsigned());
    [code % 5, code / 5 % 5, code / 25]
}

fn run(cell: Cell, delivery: Delivery, passes: Option<bool>) -> Outcome {
    let director = Director::new();
    let memory = Memory::new();
    let other_memory = Memory::new();
    let mut options = options(delivery);
    options.read_mostly = cell.access == Access::Share;
    let mirror = memory.mirror(&options);
    let evicts = cell.rival == Rival::Evict;
    let other_mirror = other_memory.mirror(&options);
    let (near, far) = (attach(evicts.then_some(PAGE)), attach(None));
    let (mut near_worker, mut far_worker) =
        (Worker::new(&near, &mirror), Worker::new(&far, &mirror));
    let mut elsewhere = evicts.then(|| Worker::new(&near, &other_mirror));
    if matches!(cell.stage, Stage::Shootdown | Stage::ShootdownInFlight) {
        // The page is the other device's alone; it has written what was there.
        let op = Op::Write { word: 2, value: 1 };
        far_worker.access(Shape::Round, SUBJECT, op, None).unwrap();
    }
    if cell.stage == Stage::ShootdownInFlight {
        far.device().set_busy(true);
    }
    match point_of(cell.shape, cell.stage) {
        Some(point) => director.stop(DEVICE, point),
        None => director.stop_at_own_point(DEVICE),
    }
    let mirror = Mutex::new(Some(mirror));
    let op = match cell.access {
        Access::Read | Access::Share => Op::Read,
        Access::Write => Op::Write { word: 0, value: 2 },
    };
    let mut passed = false;
    let mut after_access = false;
    let (device, (rival_got, moved)) = std::thread::scope(|scope| {
        let _free = director.frees_all();
        let (near_worker, far_worker) = (&mut near_worker, &mut far_worker);
        let device = scope.spawn(move || {
            let _part = Part::take(DEVICE);
            near_worker.access(cell.shape, SUBJECT, op, Some(RIVAL))
        });
        director.await_stop(DEVICE);
        let told = director.visits(Actor::Reader, Point::EventTold);
        let (memory, mirror, elsewhere) = (&memory, &mirror, &mut elsewhere);
        let rival = scope.spawn(move || {
            let _part = Part::take(RIVAL);
            rival(cell, memory, mirror, far_worker, elsewhere)
        });
        let in_flight = cell.stage == Stage::ShootdownInFlight;
        passed = director.settle(RIVAL, passes == Some(true) && !in_flight) == Settled::Done;
        if in_flight {
            far.device().set_busy(false);
            if !passed {
                passed = director.settle(RIVAL, passes == Some(true)) == Settled::Done;
                after_access = passed;
            }
        }
        let is_event = matches!(cell.rival, Rival::Discard | Rival::Unmap | Rival::Remap);
        if passed && is_event {
            // Its caller is back, and the event is being applied: to the end before the device goes on, or to where that needs
            // the device lock, which the device holds.
            if cell.stage != Stage::BeforeCommit {
                director.await_visit(Actor::Reader, Point::EventTold, told);
            }
            director.quiet();
        }
        if cell.shape == Shape::Update && point_is_in_a_round(cell.stage) {
            // The device goes on to the end of its round, and the rival then to its own.
            director.release_to(DEVICE, Point::UpdateFaulted);
            if director.settle(DEVICE, true) == Settled::Stopped {
                director.settle(RIVAL, true);
            }
        }
        director.release(DEVICE);
        (device.join().unwrap(), rival.join().unwrap())
    });
    let target = moved.as_ref().unwrap_or(&memory);
    let page = if moved.is_some() { 0 } else { SUBJECT };
    let snapshot = svm::snapshot(target.addr(page), 1).unwrap()[0];
    let mut holders = String::new();
    for (holds, name) in [
        (snapshot.is_present(), "cpu"),
        (snapshot.is_held_by(&near), "device"),
        (snapshot.is_held_by(&far), "other"),
    ] {
        if holds {
            holders.push_str(if holders.is_empty() { "" } else { "+" });
            holders.push_str(name);
        }
    }
    let words = snapshot.is_mapped().then(|| target.load(page));
    let interrupted = near_worker.interrupted > 0;
    drop((near_worker, far_worker, elsewhere));
    if let Some(mirror) = mirror.into_inner().unwrap() {
        assert_eq!(mirror.stats().anomalies, 0, "{cell} {delivery:?}");
        mirror.close().unwrap();
    }
    other_mirror.close().unwrap();
    Outcome {
        passed,
        after_access,
        device,
        interrupted,
        rival: rival_got,
        words,
        holders,
    }
}

/// What must be so whatever the file says: nothing is lost, nothing stale is seen.
fn check(cell: Cell, outcome: &Outcome) -> Result<(), String> {
    let fail = |what: &str| Err(format!("{cell}: {what}"));
    let wrote = cell.access == Access::Write && outcome.device.is_ok();
    let mut all = BEFORE;
    if wrote {
        all[0] = 2;
    }
    match cell.rival {
        Rival::CpuWrite => all[1] = 3,
        Rival::DeviceWrite => all[2] = 4,
        _ => {}
    }
    let before_access = cell.stage != Stage::AfterCommit || cell.shape == Shape::Update;
    match (cell.rival, outcome.words) {
        (Rival::Unmap, None) => {}
        (Rival::Unmap, Some(_)) => return fail("an unmapped page is there"),
        (_, None) => return fail("the page is gone"),
        (Rival::Discard, Some(words)) => {
            // Discarded, then written by the device, or the other way round.
            let late = outcome.passed && before_access && wrote;
            let expected = if late { [2, 0, 0] } else { [0, 0, 0] };
            if words != expected && !(wrote && !outcome.passed && words == [2, 0, 0]) {
                return fail("what was discarded is there again, or a later write is not");
            }
        }
        (_, Some(words)) if words != all => return fail("a write was lost"),
        _ => {}
    }
    // The rival was done before the device's access: the device must have seen it.
    if outcome.passed && before_access {
        let seen = match (cell.rival, outcome.device) {
            (Rival::CpuWrite, Ok(words)) => words[1] == 3,
            (Rival::DeviceWrite, Ok(words)) => words[2] == 4,
            (Rival::Discard, Ok(words)) => words[1] == 0,
            (Rival::Unmap | Rival::Remap, got) => got == Err(DeviceFaultKind::Unmapped),
            (Rival::Close, got) => got == Err(DeviceFaultKind::Closed),
            _ => true,
        };
        if !seen {
            return fail("the device saw what was no longer so");
        }
    }
    // And the other way round: what was done before is seen.
    if !outcome.passed && !outcome.interrupted && wrote {
        let seen = match (cell.rival, &outcome.rival) {
            (
                Rival::DeviceRead | Rival::CpuTouch | Rival::Fork | Rival::DeviceWrite,
                Some(Ok(words)),
            ) => words[0] == 2 || outcome.rival_may_be_first(cell),
            _ => true,
        };
        if !seen {
            return fail("the rival saw what was no longer so");
        }
    }
    Ok(())
}

impl Outcome {
    /// Where the round lets go of everything to wait, or is told to begin anew by the kernel, the two race once it goes on.
    fn rival_may_be_first(&self, cell: Cell) -> bool {
        matches!(cell.stage, Stage::ShootdownInFlight | Stage::BeforeSnapshot)
    }
}

/// The lines of `outcomes.txt`, by cell and, where the doors differ, door.
fn expected() -> BTreeMap<String, String> {
    let lines = include_str!("outcomes.txt").lines();
    let lines = lines.filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .map(|line| {
            let (cell, outcome) = line.split_once('|').expect("a cell, a bar, an outcome");
            (words_of(cell), words_of(outcome))
        })
        .collect()
}

fn words_of(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn door_name(delivery: Delivery) -> &'static str {
    match delivery {
        Delivery::Inline => "inline",
        Delivery::Thread => "thread",
    }
}

/// Runs the cells of one shape and one access, through both doors, and prints the table.
fn play(shape: Shape, accesses: &[Access]) {
    if !crate::usable() {
        return;
    }
    crate::broken::break_what_is_asked_for();
    let expected = expected();
    let only = std::env::var("SVM_REPLAY_CELL").unwrap_or_default();
    let mut wrong = Vec::new();
    // Said at once, too: what goes wrong next may end the process.
    let mut say = |text: String| {
        println!("WRONG {text}");
        wrong.push(text);
    };
    let mut nr = 0;
    for &access in accesses {
        for stage in STAGES {
            for rival in RIVALS {
                let cell = Cell {
                    shape,
                    access,
                    stage,
                    rival,
                };
                let mut lines = [Delivery::Inline, Delivery::Thread].map(|delivery| {
                    let door = door_name(delivery);
                    let both = words_of(&cell.to_string());
                    let one = format!("{both} {door}");
                    if !both.contains(&words_of(&only)) {
                        return None;
                    }
                    nr += 1;
                    let should = expected.get(&one).or_else(|| expected.get(&both));
                    let passes = should.map(|line| line.starts_with("passes"));
                    if crate::broken::is_anything() {
                        println!("PLAYS {cell} {door}");
                    }
                    let played = std::panic::catch_unwind(|| run(cell, delivery, passes));
                    let Ok(outcome) = played else {
                        say(format!("{cell} {door}: a panic"));
                        return None;
                    };
                    if let Err(rule) = check(cell, &outcome) {
                        say(format!("{rule}: {outcome} ({door})"));
                    }
                    let line = outcome.to_string();
                    if should.is_none_or(|should| *should != words_of(&line)) {
                        let should = should.map_or("nothing", String::as_str);
                        say(format!(
                            "{cell} {door}: {}; expected {should}",
                            words_of(&line)
                        ));
                    }
                    Some(line)
                });
                if lines[0] == lines[1] {
                    if let Some(line) = lines[0].take() {
                        println!("{cell}        | {line}");
                    }
                } else {
                    for (line, door) in lines.iter().zip(["inline", "thread"]) {
                        let line = line.as_deref().unwrap_or("-");
                        println!("{cell} {door} | {line}");
                    }
                }
            }
        }
    }
    assert!(nr > 0, "no such cell: {only}");
    assert!(
        wrong.is_empty(),
        "{} of {nr} cells went otherwise than they should:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn pairings_of_a_drivers_reads() {
    let _watchdog = crate::watch("pairings of a driver's reads");
    play(SHAPES[0], &ACCESSES[..2]);
}

#[test]
fn pairings_of_a_drivers_writes() {
    let _watchdog = crate::watch("pairings of a driver's writes");
    play(SHAPES[0], &ACCESSES[2..]);
}

#[test]
fn pairings_of_a_rounds_reads() {
    let _watchdog = crate::watch("pairings of a round's reads");
    play(SHAPES[1], &ACCESSES[..2]);
}

#[test]
fn pairings_of_a_rounds_writes() {
    let _watchdog = crate::watch("pairings of a round's writes");
    play(SHAPES[1], &ACCESSES[2..]);
}

const _: () = assert!(OWN as usize >= Point::ALL.len());
