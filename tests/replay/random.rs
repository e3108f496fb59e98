//! Schedules from a seed.
//!
//! Some actors work on a few pages: the CPU reads and writes, discards, two devices read and write by both shapes of a fault,
//! pages are brought home and evicted. They all stop wherever they can, and a generator, seeded, says who takes the next step.
//! Each actor draws its work from the same seed. An actor that is blocked by another which is stopped is passed over until it
//! stops again; so one runs at a time, and where the kernel's readers or a poll leave something open, it is what the seed comes to as a rule.
//!
//! Half of the seeds choose among all that can go on, half by priorities that change at few steps. And each seed is played twice, the second
//! time with a kernel whose answers are drawn as well: what it may say by its documentation, and says rarely.
//!
//! What is seen is checked like this: each actor writes a word of its own in each page, counting up. A reader never sees a word
//! that was not written yet, nor one older than a write that was over before the read began; unless the page was discarded since.
//!
//! `SVM_REPLAY_SEED=N cargo test -p tests --test replay random` runs seed `N` alone; that is what a failure prints. With
//! `-- --nocapture` it also says who took each step, and from where.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use std::time::Instant;

use svm::point::{Call, Mood, Point};
use svm::{Attachment, Delivery, Mirror, Options};

use crate::director::{self, Actor, Director, Part};
use crate::rig::{Memory, Op, PAGE, Probe, Shape, Worker, attach, options};

/// Seeds of a run that names none.
const SEEDS: std::ops::Range<u64> = 1..7;
/// What each actor does.
const OPERATIONS: usize = 12;
const PAGES: usize = 3;
/// Actors that write: the CPU, and two devices. Each has its word.
const WRITERS: usize = 3;
const ACTORS: usize = 6;

/// A splitmix64 generator: no dependency, and the same for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// What is known of one page.
#[derive(Default)]
struct Ledger {
    /// The last value that each writer has begun to write.
    begun: [AtomicU64; WRITERS],
    /// The last value whose write was over, with no discard since or meanwhile.
    over: [AtomicU64; WRITERS],
    /// Discards begun.
    discards: AtomicU64,
}

impl Ledger {
    fn read(&self, read: impl FnOnce() -> [u64; WRITERS]) {
        let discards = self.discards.load(SeqCst);
        let over: [u64; WRITERS] = std::array::from_fn(|w| self.over[w].load(SeqCst));
        let seen = read();
        let kept = self.discards.load(SeqCst) == discards;
        for (w, seen) in seen.into_iter().enumerate() {
            // One that every page began with.
            let begun = self.begun[w].load(SeqCst).max(1);
            assert!(
                seen <= begun,
                "word {w}: {seen} was never written, {begun} was"
            );
            assert!(
                !kept || seen >= over[w],
                "word {w}: {seen} after {}",
                over[w]
            );
        }
    }

    fn write(&self, writer: usize, write: impl FnOnce(u64)) {
        let discards = self.discards.load(SeqCst);
        let value = self.begun[writer].load(SeqCst).max(1) + 1;
        self.begun[writer].store(value, SeqCst);
        write(value);
        self.over[writer].store(value, SeqCst);
        // A discard that came meanwhile may or may not have taken it.
        if self.discards.load(SeqCst) != discards {
            self.over[writer].store(0, SeqCst);
        }
    }

    fn discard(&self, discard: impl FnOnce()) {
        self.discards.fetch_add(1, SeqCst);
        self.over.iter().for_each(|over| over.store(0, SeqCst));
        discard();
        self.over.iter().for_each(|over| over.store(0, SeqCst));
        self.discards.fetch_add(1, SeqCst);
    }
}

struct Play<'a> {
    memory: &'a Memory,
    mirror: &'a Mirror<'static, u8>,
    other: &'a Mirror<'static, u8>,
    devices: &'a [Attachment<Probe>; 2],
    ledgers: &'a [Ledger; PAGES],
}

impl Play<'_> {
    /// One actor's work.
    fn act(&self, actor: usize, seed: u64) {
        let mut random = Random(seed ^ (actor as u64 + 1) << 40);
        match actor {
            // Two threads of the CPU: one writes, one reads and sometimes discards.
            0 => (0..OPERATIONS).for_each(|_| {
                let page = random.below(PAGES);
                self.ledgers[page].write(0, |value| self.memory.store(page, 0, value));
                director::own_point();
            }),
            1 => (0..OPERATIONS).for_each(|_| {
                let page = random.below(PAGES);
                if random.below(4) == 0 {
                    self.ledgers[page].discard(|| self.memory.discard(page));
                } else {
                    self.ledgers[page].read(|| self.memory.load(page));
                }
                director::own_point();
            }),
            // Each device: one worker by updates, which writes too, and one by rounds, which reads, and on the first makes room.
            _ => {
                let device = (actor - 2) % 2;
                let writes = actor < 4;
                let mut worker = Worker::new(&self.devices[device], self.mirror);
                let mut away = Worker::new(&self.devices[device], self.other);
                for _ in 0..OPERATIONS {
                    let (page, what) = (random.below(PAGES), random.below(6));
                    let shape = [Shape::Update, Shape::Round][random.below(2)];
                    let ledger = &self.ledgers[page];
                    match (writes, what) {
                        (true, 0..4) => ledger.write(1 + device, |value| {
                            let op = Op::Write {
                                word: 1 + device,
                                value,
                            };
                            worker.access(shape, page, op, None).unwrap();
                        }),
                        (false, 0) => self.devices[device].release().unwrap(),
                        (false, 1) => drop(away.access(shape, page, Op::Read, None)),
                        _ => ledger.read(|| worker.access(shape, page, Op::Read, None).unwrap()),
                    }
                    director::own_point();
                }
            }
        }
    }
}

/// Whether a thread that stands there holds the gate, a block or a device lock.
fn holds_something(place: u32) -> bool {
    use Point::{
        CopyProtected, EvictExcluding, FaultExcluding, FaultLocked, FaultMoved, PinMarked,
        ReleaseExcluding, RoundCommitted, RoundCommitting, RoundExcluding, RoundLocked, RoundMoved,
        UpdateEnded, UpdateEnding,
    };
    let point = Point::ALL.get(place as usize);
    point.is_some_and(|point| {
        matches!(
            point,
            CopyProtected
                | EvictExcluding
                | FaultExcluding
                | FaultLocked
                | FaultMoved
                | PinMarked
                | ReleaseExcluding
                | RoundCommitted
                | RoundCommitting
                | RoundExcluding
                | RoundLocked
                | RoundMoved
                | UpdateEnded
                | UpdateEnding
        )
    })
}

/// State of the generator that draws the kernel's moods; 0 while it is left as it is.
static MOODS: AtomicU64 = AtomicU64::new(0);

/// Whether zaps are late from now on, all of them.
static LATE_ZAPS: AtomicBool = AtomicBool::new(false);

/// Has the kernel be late with every zap, or no more.
pub(crate) fn set_late_zaps(late: bool) {
    svm::point::set_mood(mood);
    LATE_ZAPS.store(late, SeqCst);
}

/// Of how many calls that move or copy one says "changing"; 0 for none of them.
static CHANGING: AtomicU64 = AtomicU64::new(0);
/// Calls so far.
static CALLS: AtomicU64 = AtomicU64::new(0);

/// Has one in `nth` calls that move or copy stop as if a mapping was changing; 0 for none.
pub(crate) fn set_changing(nth: u64) {
    svm::point::set_mood(mood);
    CALLS.store(0, SeqCst);
    CHANGING.store(nth, SeqCst);
}

/// Whether the next copy meets a border of mappings that has gone a moment later.
static BORDER: AtomicBool = AtomicBool::new(false);

/// Has the next copy meet such a border.
pub(crate) fn set_passing_border() {
    svm::point::set_mood(mood);
    BORDER.store(true, SeqCst);
}

/// Whether the next copy, which is to be of several pages, meets a marker on the second.
static MARKER: AtomicBool = AtomicBool::new(false);

/// Has the next copy meet such a marker.
pub(crate) fn set_marker() {
    svm::point::set_mood(mood);
    MARKER.store(true, SeqCst);
}

/// Whether it has.
pub(crate) fn has_met_marker() -> bool {
    !MARKER.load(SeqCst)
}

/// The kernel as its documentation allows it to be: changing now and then, half-way or at once, late with its zaps, and with the
/// stale errors of Linux 6.18.
fn mood(call: Call) -> Mood {
    if call == Call::Zap && LATE_ZAPS.load(SeqCst) {
        return Mood::Changing;
    }
    if call == Call::Copy && BORDER.swap(false, SeqCst) {
        return Mood::Stale;
    }
    if call == Call::Copy && MARKER.swap(false, SeqCst) {
        return Mood::Marker;
    }
    let nth = CHANGING.load(SeqCst);
    if nth != 0 && call != Call::Zap {
        // Not each `nth` itself: what begins anew after as many calls would never come to its end.
        let draw = Random(CALLS.fetch_add(1, SeqCst) + 1).below(nth as usize);
        return if draw == 0 {
            Mood::Changing
        } else {
            Mood::Fair
        };
    }
    let state = MOODS.load(SeqCst);
    if state == 0 {
        return Mood::Fair;
    }
    let mut random = Random(state);
    let draw = random.below(16);
    MOODS.store(random.0 | 1, SeqCst);
    match (call, draw) {
        (Call::Zap, 0..8) | (_, 0..2) => Mood::Changing,
        (_, 2..4) => Mood::Part,
        (Call::Move | Call::Copy, 4..6) => Mood::Stale,
        (Call::Move, 6..7) => Mood::Lost,
        _ => Mood::Fair,
    }
}

/// Who takes the next step.
enum Choice {
    /// Anybody.
    Uniform,
    /// The one of the highest priority, who loses it at some steps that were drawn before: few, since few are enough for most
    /// bugs (PCT, Burckhardt et al. 2010).
    Pct {
        priorities: [u64; ACTORS],
        changes: [usize; 3],
    },
}

impl Choice {
    /// About how many steps a seed takes.
    const STEPS: usize = 450;

    fn new(random: &mut Random) -> Self {
        if random.below(2) == 0 {
            return Self::Uniform;
        }
        Self::Pct {
            // Above what a change leaves.
            priorities: std::array::from_fn(|_| random.next() | 1 << 63),
            changes: std::array::from_fn(|_| random.below(Self::STEPS)),
        }
    }

    fn choose(&mut self, random: &mut Random, stopped: &[usize], step: usize) -> usize {
        match self {
            Self::Uniform => stopped[random.below(stopped.len())],
            Self::Pct {
                priorities,
                changes,
            } => {
                let first = |priorities: &[u64; ACTORS]| {
                    let best = stopped.iter().max_by_key(|&&nr| priorities[nr]);
                    *best.expect("somebody is stopped")
                };
                if changes.contains(&step) {
                    priorities[first(priorities)] = (Self::STEPS.saturating_sub(step)) as u64;
                }
                first(priorities)
            }
        }
    }
}

/// Plays one seed; `says` prints who took each step, and from where.
fn run(seed: u64, moody: bool, says: bool) {
    let mut random = Random(seed);
    let director = Director::new();
    let options: Options = options([Delivery::Inline, Delivery::Thread][random.below(2)])
        .read_mostly(random.below(2) == 0);
    let (memory, other_memory) = (Memory::sized(PAGES), Memory::sized(PAGES));
    let (mirror, other) = (memory.mirror(&options), other_memory.mirror(&options));
    // The first device has to evict.
    let devices = [attach(Some(2 * PAGE)), attach(None)];
    let ledgers: [Ledger; PAGES] = Default::default();
    let failed = AtomicBool::new(false);
    let mut choice = Choice::new(&mut random);
    let play = Play {
        memory: &memory,
        mirror: &mirror,
        other: &other,
        devices: &devices,
        ledgers: &ledgers,
    };
    if moody {
        MOODS.store(random.next() | 1, SeqCst);
    }
    std::thread::scope(|scope| {
        let _free = director.frees_all();
        let actors: [Actor; ACTORS] = std::array::from_fn(Actor::Nr);
        actors
            .into_iter()
            .for_each(|actor| director.stop_everywhere(actor));
        for (nr, &actor) in actors.iter().enumerate() {
            let (play, failed) = (&play, &failed);
            scope.spawn(move || {
                let _part = Part::take(actor);
                director::own_point();
                let acts = std::panic::AssertUnwindSafe(|| play.act(nr, seed));
                if std::panic::catch_unwind(acts).is_err() {
                    failed.store(true, SeqCst);
                }
            });
            director.settle(actor, true);
        }
        // One takes a step at a time. Who is neither stopped nor done is blocked, and may stop again when others have gone on.
        let (mut idle, mut step) = (Instant::now(), 0);
        while !failed.load(SeqCst) && !actors.iter().all(|&actor| director.is_done(actor)) {
            let places = actors.map(|actor| (actor, director.place(actor)));
            let mut stopped: Vec<usize> = Vec::new();
            for (nr, (_, place)) in places.into_iter().enumerate() {
                // Whoever holds something goes first: the others would only queue for it, and who is first then is chance.
                match place {
                    Some(place) if holds_something(place) => {
                        stopped = vec![nr];
                        break;
                    }
                    Some(_) => stopped.push(nr),
                    None => {}
                }
            }
            if stopped.is_empty() {
                // Somebody who was blocked is on the way.
                assert!(
                    idle.elapsed() < director::PATIENCE,
                    "nobody is stopped, and nobody goes on"
                );
                director.quiet();
                continue;
            }
            idle = Instant::now();
            step += 1;
            let next = actors[choice.choose(&mut random, &stopped, step)];
            if says {
                let place = director.place(next).unwrap_or_default() as usize;
                let place = Point::ALL.get(place).map(|point| format!("{point:?}"));
                println!(
                    "{next:?} goes on from {}",
                    place.as_deref().unwrap_or("its own point")
                );
            }
            director.step(next);
            director.quiet();
        }
        actors.into_iter().for_each(|actor| director.release(actor));
    });
    MOODS.store(0, SeqCst);
    assert!(!failed.load(SeqCst), "an actor failed");
    for (page, ledger) in ledgers.iter().enumerate() {
        ledger.read(|| memory.load(page));
    }
    assert_eq!(mirror.stats().anomalies, 0);
    mirror.close().unwrap();
    other.close().unwrap();
}

#[test]
fn random_schedules() {
    play(false);
}

/// The same, and the kernel's answers are drawn too.
#[test]
fn random_schedules_and_a_moody_kernel() {
    play(true);
}

fn play(moody: bool) {
    if !crate::usable() {
        return;
    }
    crate::broken::break_what_is_asked_for();
    // Once a process, and asked for no mood it is none.
    svm::point::set_mood(mood);
    let one = std::env::var("SVM_REPLAY_SEED");
    let seeds = match one.as_deref().map(str::parse::<u64>) {
        Ok(Ok(seed)) => seed..seed + 1,
        Ok(Err(_)) => panic!("SVM_REPLAY_SEED is no number"),
        Err(_) => SEEDS,
    };
    for seed in seeds {
        let again = format!("SVM_REPLAY_SEED={seed} cargo test -p tests --test replay random");
        // Not captured: should the process die, it is the last line.
        let _ = writeln!(std::io::stderr(), "{again}");
        let _watchdog = crate::watch(again.clone().leak());
        if std::panic::catch_unwind(|| run(seed, moody, one.is_ok())).is_err() {
            panic!("seed {seed} failed; run it again with\n    {again}");
        }
    }
}
