//! How the models are run: exhaustively, counted, and with a ladder diagram of what fails.
//!
//! A model is a closure that loom runs once per schedule, up to `LOOM_MAX_PREEMPTIONS` preemptions (default 2). [`check`] expects
//! every schedule to hold; [`find_failure`] expects one that does not, and looks for it with 0, 1, 2, … preemptions in turn,
//! so that the one it shows is among the shortest.

use super::shim::UnsafeCell;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

std::thread_local! {
    // All threads of a model are run by the one that runs the model.
    static STEPS: RefCell<Vec<(usize, &'static str, Option<u32>)>> = const { RefCell::new(Vec::new()) };
    static REACHED: RefCell<BTreeSet<&'static str>> = const { RefCell::new(BTreeSet::new()) };
    static IS_QUIET: Cell<bool> = const { Cell::new(false) };
    static LAST_COUNT: RefCell<Arc<AtomicU64>> = RefCell::new(Arc::new(AtomicU64::new(0)));
}

/// Notes that some schedule of the model has come to `what`: a model that cannot is about nothing.
pub(crate) fn reached(what: &'static str) {
    REACHED.with_borrow_mut(|reached| reached.insert(what));
}

/// A column of the ladder: one thread of the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lane(pub(crate) usize);

impl Lane {
    /// Notes that this thread has just done `what`.
    pub(crate) fn did(self, what: &'static str) {
        reached(what);
        STEPS.with_borrow_mut(|steps| steps.push((self.0, what, None)));
    }

    /// Notes that this thread has just done `what`, with `value`.
    pub(crate) fn did_with(self, what: &'static str, value: u32) {
        reached(what);
        STEPS.with_borrow_mut(|steps| steps.push((self.0, what, Some(value))));
    }
}

/// Memory that loom watches: two accesses at once, one of them a write, fail the model; so does a read of what was not
/// released to the reader.
pub(crate) struct Watched(UnsafeCell<u32>);

// SAFETY: whether it is shared rightly is what the models are there to find out; loom reports it where it is not.
unsafe impl Sync for Watched {}
// SAFETY: as above.
unsafe impl Send for Watched {}

impl Watched {
    pub(crate) fn new(value: u32) -> Self {
        Self(UnsafeCell::new(value))
    }

    pub(crate) fn read(&self) -> u32 {
        // SAFETY: loom stops the model before a race becomes one.
        self.0.with(|value| unsafe { *value })
    }

    pub(crate) fn write(&self, value: u32) {
        // SAFETY: as in `read`.
        self.0.with_mut(|place| unsafe { *place = value });
    }
}

/// A schedule that fails.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What the checker said.
    pub(crate) message: String,
    /// The schedule, a column per thread.
    pub(crate) ladder: String,
    pub(crate) nr_preemptions: usize,
    pub(crate) nr_schedules: u64,
}

fn builder(preemptions: usize) -> loom::model::Builder {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder
}

fn preemptions() -> usize {
    std::env::var("LOOM_MAX_PREEMPTIONS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(2)
}

/// More than any model here has use for: the count of schedules no longer grows.
const MOST_PREEMPTIONS: usize = 12;

/// A model that took less than this is run again with one preemption more: `MODELS_DEEPEN_BELOW_MS`, by default never.
fn deepen_below() -> Duration {
    let limit = std::env::var("MODELS_DEEPEN_BELOW_MS")
        .ok()
        .and_then(|ms| ms.parse().ok());
    Duration::from_millis(limit.unwrap_or(0))
}

/// Runs `model` in every schedule with at most `preemptions` preemptions; returns how many there were.
fn explore(preemptions: usize, model: fn()) -> u64 {
    let nr_schedules = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&nr_schedules);
    LAST_COUNT.with_borrow_mut(|last| *last = Arc::clone(&nr_schedules));
    builder(preemptions).check(move || {
        counter.fetch_add(1, Ordering::Relaxed);
        STEPS.with_borrow_mut(Vec::clear);
        model();
    });
    nr_schedules.load(Ordering::Relaxed)
}

/// Expects `model` to hold in every schedule, and each of `to_reach` to be reached in some.
pub(crate) fn check(name: &str, model: fn(), to_reach: &[&'static str]) {
    let mut bound = preemptions();
    loop {
        let begun = Instant::now();
        let nr_schedules = explore(bound, model);
        let took = begun.elapsed();
        println!("{name}: {nr_schedules} schedules, {bound} preemptions, {took:.1?}");
        assert!(nr_schedules > 1, "{name}: one schedule is no model");
        if took >= deepen_below() || bound == MOST_PREEMPTIONS {
            break;
        }
        bound += 1;
    }
    for what in to_reach {
        assert!(
            REACHED.with_borrow(|reached| reached.contains(what)),
            "{name}: no schedule reaches \"{what}\""
        );
    }
}

/// Runs `body`; a panic on this thread is not reported meanwhile.
fn quietly<R>(body: impl FnOnce() -> R) -> R {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        // Loom's coroutines put in a hook of their own when the first one runs; ours has to come after it.
        loom::model(|| ());
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !IS_QUIET.get() {
                report(panic);
            }
        }));
    });
    IS_QUIET.set(true);
    let result = body();
    IS_QUIET.set(false);
    result
}

/// Expects `model` to fail in some schedule, and returns one with as few preemptions as any.
pub(crate) fn find_failure(model: fn()) -> Option<Failure> {
    for bound in 0..=preemptions().max(3) {
        let found = quietly(|| catch_unwind(AssertUnwindSafe(|| explore(bound, model))));
        if let Err(payload) = found {
            let message = payload
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string))
                .unwrap_or_default();
            return Some(Failure {
                message,
                ladder: STEPS.with_borrow(|steps| ladder(steps)),
                nr_preemptions: bound,
                nr_schedules: LAST_COUNT.with_borrow(|last| last.load(Ordering::Relaxed)),
            });
        }
    }
    None
}

/// Expects `model` to fail, with `reason` in the checker's words, and prints how.
pub(crate) fn expect_failure(name: &str, reason: &str, model: fn()) {
    let Some(failure) = find_failure(model) else {
        panic!("{name}: holds in every schedule, and should not");
    };
    assert!(
        failure.message.contains(reason),
        "{name}: failed with another reason: {}",
        failure.message
    );
    println!(
        "{name}: caught in schedule {} with {} preemptions: {}\n\n{}",
        failure.nr_schedules,
        failure.nr_preemptions,
        failure.message.lines().next().unwrap_or_default(),
        failure.ladder
    );
}

/// Draws `steps` with a column per thread.
fn ladder(steps: &[(usize, &'static str, Option<u32>)]) -> String {
    const WIDTH: usize = 40;
    let mut drawn = String::new();
    let nr_lanes = steps.iter().map(|&(lane, ..)| lane + 1).max().unwrap_or(0);
    for lane in 0..nr_lanes {
        drawn += &format!("    {:WIDTH$}", format!("CPU {lane}"));
    }
    for &(lane, what, value) in steps {
        let text = value.map_or_else(|| what.to_owned(), |value| format!("{what} {value}"));
        drawn.truncate(drawn.trim_end().len());
        drawn += &format!("\n    {}{text}", " ".repeat(lane * (WIDTH + 4)));
    }
    drawn.push('\n');
    drawn
}

/// A test per model: `model reaches ["what some schedule must come to"]`.
macro_rules! models {
    ($($name:ident reaches [$($to_reach:literal),*])*) => {
        $(mod $name {
            #[test]
            fn holds() {
                                crate::sync::checker::check(stringify!($name), super::$name, &[$($to_reach),*]);
            }
        })*
    };
}
pub(crate) use models;
