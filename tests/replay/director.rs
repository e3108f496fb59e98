//! Who goes next.
//!
//! An *actor* is a thread with a part: it has registered, and the director may have it stop at a point of the runtime. Threads
//! that have not registered, the reader of a userfaultfd above all, are one actor together, [`Actor::Reader`].
//!
//! The hook runs in signal handlers and under the runtime's locks, so it keeps their law: a system call for the thread's number,
//! atomics and a futex in this program's own statics, and nothing else. Nobody waits without a deadline: a stopped thread goes
//! on by itself after [`PATIENCE`], and the watchdog of the test is there for the rest.
//!
//! A thread that cannot go on because a stopped one holds what it needs is *blocked*. That is an outcome, not a failure:
//! [`Director::settle`] finds it out by looking at the process's threads, all of which sleep then (or, where something is polled
//! for, by patience), and the script lets the stopped one go.

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant};

use svm::point::Point;

/// How long anything that should happen may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// How much processor time a thread that polls for something has, before it counts as blocked.
const POLLING: Duration = Duration::from_millis(5);

/// Between two looks at the threads.
const LOOK: Duration = Duration::from_micros(500);

const NR_ACTORS: usize = 10;
const NR_POINTS: usize = 32;
const _: () = assert!(Point::ALL.len() <= NR_POINTS);

/// A part in a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Actor {
    /// Whoever has not registered: the readers of the userfaultfds.
    Reader,
    /// A thread of the test.
    Nr(usize),
}

impl Actor {
    fn index(self) -> usize {
        match self {
            Self::Reader => 0,
            Self::Nr(n) => n + 1,
        }
    }
}

/// One actor's words.
struct Seat {
    /// The thread that sits there; 0 if none.
    thread: AtomicU32,
    /// A bit per point at which it stops.
    stops: AtomicU32,
    /// Where it stands: [`RUNNING`], or the point's number plus one. A futex.
    place: AtomicU32,
    /// Whether it has done its part.
    done: AtomicBool,
    /// How often it has come by each point.
    visits: [AtomicU32; NR_POINTS],
}

const RUNNING: u32 = 0;

static SEATS: [Seat; NR_ACTORS] = [const {
    Seat {
        thread: AtomicU32::new(0),
        stops: AtomicU32::new(0),
        place: AtomicU32::new(RUNNING),
        done: AtomicBool::new(false),
        visits: [const { AtomicU32::new(0) }; NR_POINTS],
    }
}; NR_ACTORS];

fn this_thread() -> u32 {
    // SAFETY: no preconditions.
    let id = unsafe { libc::gettid() };
    id.cast_unsigned()
}

fn seat() -> &'static Seat {
    let me = this_thread();
    let taken = SEATS[1..]
        .iter()
        .find(|seat| seat.thread.load(SeqCst) == me);
    taken.unwrap_or(&SEATS[0])
}

/// Sleeps while `word` is `value`; whoever wakes it, and why, is the caller's to find out.
fn futex_wait(word: &AtomicU32, value: u32, timeout: Duration) {
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs().cast_signed(),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    let op = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word is a static's, the timeout outlives the call.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            op,
            value,
            &raw const timeout,
        )
    };
}

fn futex_wake(word: &AtomicU32) {
    let op = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word is a static's.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, i32::MAX) };
}

fn stop_at(seat: &Seat, bit: u32) {
    seat.place.store(bit + 1, SeqCst);
    futex_wake(&seat.place);
    let mut waits = 0;
    while seat.place.load(SeqCst) == bit + 1 && waits < PATIENCE.as_secs() {
        futex_wait(&seat.place, bit + 1, Duration::from_secs(1));
        waits += 1;
    }
    seat.place.store(RUNNING, SeqCst);
}

fn hook(point: Point, _addr: usize) {
    let seat = seat();
    let bit = point as u32;
    seat.visits[bit as usize].fetch_add(1, SeqCst);
    if seat.stops.load(SeqCst) & 1 << bit != 0 {
        stop_at(seat, bit);
    }
}

/// A point of the test's own, beside those of the runtime: the same rules.
pub(crate) const OWN: u32 = NR_POINTS as u32 - 1;

/// Whether the director wants the calling thread to stop at its [`own_point`].
pub(crate) fn is_wanted_at_own_point() -> bool {
    seat().stops.load(SeqCst) & 1 << OWN != 0
}

/// Stops here if the director wants it.
pub(crate) fn own_point() {
    if is_wanted_at_own_point() {
        stop_at(seat(), OWN);
    }
}

/// A thread's part, from registering to the end of the thread's work.
#[derive(Debug)]
pub(crate) struct Part(Actor);

impl Part {
    /// The calling thread is `actor` from now on.
    pub(crate) fn take(actor: Actor) -> Self {
        SEATS[actor.index()].thread.store(this_thread(), SeqCst);
        Self(actor)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let seat = &SEATS[self.0.index()];
        seat.thread.store(0, SeqCst);
        seat.done.store(true, SeqCst);
    }
}

/// Waits until `actor` has done its part: how a script lets one go first where the runtime would leave it to chance.
pub(crate) fn wait_done(actor: Actor) {
    let begun = Instant::now();
    while !SEATS[actor.index()].done.load(SeqCst) && begun.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// What has become of an actor that was let run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Settled {
    /// It has done its part.
    Done,
    /// It stands at a point.
    Stopped,
    /// It waits for somebody who is stopped.
    Blocked,
}

/// The one who decides; there is one at a time.
#[derive(Debug)]
pub(crate) struct Director(
    #[expect(dead_code, reason = "held for its exclusion")] MutexGuard<'static, ()>,
);

impl Director {
    /// Everybody goes on, and nobody stops any more, when the guard is dropped.
    pub(crate) fn frees_all(&self) -> FreesAll<'_> {
        FreesAll(self)
    }

    /// Waits for the stage, and clears it.
    pub(crate) fn new() -> Self {
        static STAGE: Mutex<()> = Mutex::new(());
        static HOOKED: Once = Once::new();
        let stage = STAGE.lock().unwrap_or_else(PoisonError::into_inner);
        HOOKED.call_once(|| assert!(svm::point::set_hook(hook)));
        for seat in &SEATS {
            seat.thread.store(0, SeqCst);
            seat.stops.store(0, SeqCst);
            seat.done.store(false, SeqCst);
            seat.visits.iter().for_each(|n| n.store(0, SeqCst));
        }
        Self(stage)
    }

    /// `actor` stops at `point` from now on.
    pub(crate) fn stop(&self, actor: Actor, point: Point) {
        SEATS[actor.index()]
            .stops
            .fetch_or(1 << point as u32, SeqCst);
    }

    /// `actor` stops at its [`own_point`].
    pub(crate) fn stop_at_own_point(&self, actor: Actor) {
        SEATS[actor.index()].stops.fetch_or(1 << OWN, SeqCst);
    }

    /// `actor` stops wherever it can.
    pub(crate) fn stop_everywhere(&self, actor: Actor) {
        SEATS[actor.index()].stops.store(u32::MAX, SeqCst);
    }

    /// Where `actor` stands, if it is stopped.
    pub(crate) fn place(&self, actor: Actor) -> Option<u32> {
        match SEATS[actor.index()].place.load(SeqCst) {
            RUNNING => None,
            place => Some(place - 1),
        }
    }

    /// Whether `actor` has done its part.
    pub(crate) fn is_done(&self, actor: Actor) -> bool {
        SEATS[actor.index()].done.load(SeqCst)
    }

    /// How often `actor` has come by `point`.
    pub(crate) fn visits(&self, actor: Actor, point: Point) -> u32 {
        SEATS[actor.index()].visits[point as usize].load(SeqCst)
    }

    /// Waits until `actor` is stopped.
    #[track_caller]
    pub(crate) fn await_stop(&self, actor: Actor) {
        let begun = Instant::now();
        while self.place(actor).is_none() {
            assert!(!self.is_done(actor), "{actor:?} is done and never stopped");
            assert!(
                begun.elapsed() < PATIENCE,
                "{actor:?} never got to its point"
            );
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Waits until `actor` has come by `point` more than `before` times.
    #[track_caller]
    pub(crate) fn await_visit(&self, actor: Actor, point: Point, before: u32) {
        let begun = Instant::now();
        while self.visits(actor, point) <= before {
            assert!(
                begun.elapsed() < PATIENCE,
                "{actor:?} never came by {point:?}"
            );
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Waits until `actor` has done its part.
    #[track_caller]
    pub(crate) fn await_done(&self, actor: Actor) {
        wait_done(actor);
        assert!(self.is_done(actor), "{actor:?} is stuck");
    }

    /// `actor` stops nowhere any more, and goes on if it is stopped.
    pub(crate) fn release(&self, actor: Actor) {
        SEATS[actor.index()].stops.store(0, SeqCst);
        self.step(actor);
    }

    /// `actor` stops at `point` next, and nowhere before.
    pub(crate) fn release_to(&self, actor: Actor, point: Point) {
        SEATS[actor.index()].stops.store(1 << point as u32, SeqCst);
        self.step(actor);
    }

    /// `actor` goes on to its next stop.
    pub(crate) fn step(&self, actor: Actor) {
        let seat = &SEATS[actor.index()];
        seat.place.store(RUNNING, SeqCst);
        futex_wake(&seat.place);
    }

    /// Lets `actor` run until it is done, is stopped, or can get no further: every thread that is not stopped sleeps, or has
    /// polled for a while. A `patient` look takes nobody for blocked.
    pub(crate) fn settle(&self, actor: Actor, patient: bool) -> Settled {
        let begun = Instant::now();
        let mut stillness = Stillness::default();
        loop {
            if self.is_done(actor) {
                return Settled::Done;
            }
            if self.place(actor).is_some() {
                return Settled::Stopped;
            }
            if !patient && stillness.look() || begun.elapsed() > PATIENCE {
                return Settled::Blocked;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until every thread that is not stopped sleeps, or has polled for a while.
    pub(crate) fn quiet(&self) {
        let begun = Instant::now();
        let mut stillness = Stillness::default();
        while !stillness.look() && begun.elapsed() < PATIENCE {
            std::thread::sleep(LOOK);
        }
    }
}

/// Lets everybody go on when it is dropped: a script that fails must not wait for threads that wait for it.
#[derive(Debug)]
pub(crate) struct FreesAll<'d>(#[expect(dead_code, reason = "what it is of")] &'d Director);

impl Drop for FreesAll<'_> {
    fn drop(&mut self) {
        for seat in &SEATS {
            seat.stops.store(0, SeqCst);
            seat.place.store(RUNNING, SeqCst);
            futex_wake(&seat.place);
        }
    }
}

/// Whether anybody gets any further. It goes by the processor time that threads have had, not by the clock: on a loaded machine a
/// thread that could run may not have run for long.
#[derive(Default)]
struct Stillness {
    /// What each thread had used when it was first seen to run.
    used: HashMap<OsString, u64>,
    /// Looks in a row that found all of them asleep or polling.
    still: u32,
}

impl Stillness {
    /// One look more; says whether there were enough.
    fn look(&mut self) -> bool {
        let me = OsString::from(this_thread().to_string());
        let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten();
        let mut is_still = true;
        for task in tasks.flatten().filter(|task| task.file_name() != me) {
            let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
            // "id (name) S …": the name may hold anything, so from the right.
            let stat = read("stat");
            let state = stat.rsplit(')').next().unwrap_or("").trim_start();
            if state.starts_with('R') {
                let used = read("schedstat");
                let Some(now) = used.split(' ').next().and_then(|ns| ns.parse().ok()) else {
                    // It has ended since.
                    continue;
                };
                let first: &mut u64 = self.used.entry(task.file_name()).or_insert(now);
                // Less than before is another thread's, which has the number now.
                *first = now.min(*first);
                is_still &= now - *first > POLLING.as_nanos() as u64;
            }
        }
        self.still = if is_still { self.still + 1 } else { 0 };
        self.still >= 4
    }
}
