//! Where a monitor runs: beside the thread whose faults it serves, if that pays.
//!
//! A fault through the thread door is two wake-ups. Between two CPUs each is an interrupt, and the CPU that gets it may have gone to
//! sleep; on one CPU it is a switch: the thread that faults goes to sleep just when the monitor wakes. So a monitor that serves one thread
//! again and again confines itself to the CPU where that thread runs. It does so to nobody else.
//!
//! # Rules
//!
//! 1. A *run* is faults of one thread, one after the other. Another thread's fault ends it, and the monitor may run anywhere again:
//!    where several threads fault there is no one place to be.
//! 2. The first [`BEFORE`] faults of a run are timed, as a whole. If they come slowly the wake-ups do not matter. Otherwise the monitor
//!    goes near.
//! 3. From then on each [`AFTER`] faults are timed. If they do not come faster, by an eighth, it does not pay, whatever the cause: the
//!    CPU is busy with others, the thread is elsewhere now, or it was well where it was. The monitor leaves, and waits twice as long as the
//!    last time before it tries again; but no longer than until they come half as fast as they did near. If they do come faster it stays.
//!    Once in [`FOLLOW`] times it looks where the thread is now, and follows: a look takes as long as some faults, and the thread waits.
//! 4. When no fault comes for [`IDLE`] the monitor leaves, too.
//!
//! The clock is read once in so many faults. What is looked up and set by system calls is in [`crate::sys::sched`].

use std::time::Duration;

use crate::sys::clock;
use crate::sys::sched::{Cpus, cpu_of_thread};

/// Faults of a run that are timed before the monitor goes near.
const BEFORE: u32 = 16;
/// Faults that are timed to see whether it pays.
const AFTER: u32 = 64;
/// So many times that it pays the monitor looks for the thread once: rarely enough that the 99th percentile does not show it.
const FOLLOW: u32 = 16;
/// Slower than that on average, a wake-up or two do not matter.
const QUICK_NS: u64 = 500_000;
/// After so long without a fault it is over.
pub(crate) const IDLE: Duration = Duration::from_millis(10);
/// Runs of [`BEFORE`] faults that are let pass at most after it did not pay.
const MAX_PATIENCE: u32 = 1 << 12;

/// What a fault calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Stay,
    /// Go to where the thread runs, or follow it.
    Go,
    /// Run anywhere.
    Leave,
}

/// The rules, without the system.
#[derive(Debug, Default)]
struct Policy {
    thread: usize,
    /// Faults since the time was taken.
    nr: u32,
    since_ns: u64,
    /// Nanoseconds a fault, before the monitor went near; 0 while it is not.
    before_ns: u64,
    /// How often it has paid since it went.
    paid: u32,
    /// Windows to let pass.
    patience: u32,
    /// How many there were the last time.
    last_patience: u32,
    /// Nanoseconds a fault, when it was near last and it did not pay; 0 if that was never so in this run.
    near_ns: u64,
}

impl Policy {
    fn note(&mut self, thread: usize, now: impl FnOnce() -> u64) -> Step {
        if thread != self.thread {
            (self.thread, self.near_ns) = (thread, 0);
            return self.begin_anew();
        }
        let length = if self.before_ns == 0 { BEFORE } else { AFTER };
        if self.nr == 0 {
            // The first one's time is that of whatever came before it.
            (self.nr, self.since_ns) = (1, now());
            return Step::Stay;
        }
        if self.nr < length {
            self.nr += 1;
            return Step::Stay;
        }
        let now = now();
        let each_ns = (now - self.since_ns) / u64::from(length);
        (self.nr, self.since_ns) = (1, now);
        if self.before_ns == 0 {
            let was_better = self.near_ns != 0 && each_ns > 2 * self.near_ns;
            if self.patience > 0 && !was_better {
                self.patience -= 1;
                return Step::Stay;
            }
            if each_ns > QUICK_NS {
                return Step::Stay;
            }
            (self.before_ns, self.paid) = (each_ns.max(1), 0);
            return Step::Go;
        }
        if each_ns < self.before_ns - self.before_ns / 8 {
            self.last_patience = 0;
            self.paid += 1;
            return if self.paid.is_multiple_of(FOLLOW) {
                Step::Go
            } else {
                Step::Stay
            };
        }
        self.last_patience = (2 * self.last_patience).clamp(1, MAX_PATIENCE);
        (self.patience, self.near_ns) = (self.last_patience, each_ns);
        self.begin_anew()
    }

    /// The run is over, or it does not pay.
    fn begin_anew(&mut self) -> Step {
        self.nr = 0;
        let was_near = std::mem::take(&mut self.before_ns) != 0;
        if was_near { Step::Leave } else { Step::Stay }
    }
}

/// A monitor's place. It is the thread's that made it.
#[derive(Debug, Default)]
pub(crate) struct Near {
    policy: Policy,
    /// Where the monitor may run when it is not near.
    home: Option<Cpus>,
    /// Where it is.
    at: usize,
}

impl Near {
    /// A fault of `thread`, by its kernel id, has been served. Fault path.
    pub(crate) fn note(&mut self, thread: usize) {
        match self.policy.note(thread, clock::monotonic_ns) {
            Step::Stay => {}
            Step::Go => self.go(thread),
            Step::Leave => self.leave(),
        }
    }

    /// Whether it is near somebody, and is to leave when nothing comes for [`IDLE`].
    pub(crate) fn is_near(&self) -> bool {
        self.home.is_some()
    }

    /// No fault has come for a while. Fault path.
    pub(crate) fn idle(&mut self) {
        let _ = self.policy.begin_anew();
        self.leave();
    }

    fn go(&mut self, thread: usize) {
        let Some(cpu) = cpu_of_thread(thread) else {
            return;
        };
        if self.home.is_some() && self.at == cpu {
            return;
        }
        // Asked for anew each time: whoever administers the process may have changed it.
        let Some(home) = self.home.or_else(Cpus::of_this_thread) else {
            return;
        };
        // Refused where this thread may not run: then it stays where it is.
        if home.has_several() && Cpus::one(cpu).is_some_and(|cpus| cpus.confine_this_thread()) {
            (self.home, self.at) = (Some(home), cpu);
        }
    }

    fn leave(&mut self) {
        if let Some(home) = self.home.take()
            && !home.confine_this_thread()
        {
            // None of them is left to this process; those that are, are the kernel's choice.
            let _ = Cpus::all().confine_this_thread();
        }
    }
}

#[cfg(all(test, not(svm_shuttle)))]
mod tests {
    use super::*;

    /// A policy, and the time.
    #[derive(Default)]
    struct Run {
        policy: Policy,
        now: u64,
        looks: u32,
    }

    impl Run {
        /// `nr` faults of `thread`, so far apart: what they called for, but for staying.
        fn faults(&mut self, thread: usize, nr: u32, ns: u64) -> Vec<Step> {
            let mut steps = Vec::new();
            for _ in 0..nr {
                self.now += ns;
                let (now, looks) = (self.now, &mut self.looks);
                let step = self.policy.note(thread, || {
                    *looks += 1;
                    now
                });
                steps.extend((step != Step::Stay).then_some(step));
            }
            steps
        }
    }

    #[test]
    fn a_run_that_comes_faster_near_is_followed() {
        let mut run = Run::default();
        assert_eq!(run.faults(1, BEFORE + 2, 50_000), [Step::Go]);
        assert_eq!(run.faults(1, 2 * FOLLOW * AFTER, 8_000), [Step::Go; 2]);
        // Of the clock, once in so many faults.
        assert_eq!(run.looks, 2 + 2 * FOLLOW);
        assert_eq!(run.faults(2, 1, 8_000), [Step::Leave]);
    }

    #[test]
    fn turns_of_two_threads_and_slow_faults_are_no_run() {
        let mut run = Run::default();
        for _ in 0..1_000 {
            assert_eq!(run.faults(1, 1, 5_000), []);
            assert_eq!(run.faults(2, 1, 5_000), []);
        }
        assert_eq!(run.looks, 0);
        assert_eq!(run.faults(1, 1_000, 2 * QUICK_NS), []);
    }

    #[test]
    fn where_it_was_well_is_left_as_soon_as_it_no_longer_is() {
        let mut run = Run::default();
        assert!(!run.faults(1, 100_000, 8_000).is_empty(), "never tried");
        assert!(run.policy.patience > 100 && run.policy.before_ns == 0);
        assert_eq!(run.faults(1, 2 * BEFORE, 50_000), [Step::Go]);
        assert_eq!(run.faults(1, FOLLOW * AFTER, 8_000), [Step::Go]);
    }

    #[test]
    fn what_does_not_pay_is_tried_ever_more_rarely() {
        let mut run = Run::default();
        let mut trials = Vec::new();
        for nr in 0..130_000 {
            for step in run.faults(1, 1, 50_000) {
                if step == Step::Go {
                    trials.push(nr);
                }
            }
        }
        assert!(trials.len() > 5 && trials.len() < 20, "{trials:?}");
        let gaps = trials.windows(2).map(|pair| pair[1] - pair[0]);
        let rest: Vec<_> = gaps.clone().skip(1).collect();
        assert!(gaps.zip(rest).all(|(a, b)| b > a), "{trials:?}");
    }
}
