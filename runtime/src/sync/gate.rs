//! Sections that run side by side, against a closer that runs alone.
//!
//! This is the address space's twin of the kernel's `map_changing_lock`. The *shared side* is every section that looks up a
//! region or changes residency: many threads, very often, each for microseconds, and none sleeps in one. The *exclusive
//! side* is the event reader, from before it reads an event until it has applied it. And whoever has unpublished an array of
//! regions needs a *grace period*: all sections that may still hold the old one have left.
//!
//! # State
//!
//! `state`, one word:
//!
//! | bits | meaning |
//! |---|---|
//! | 0 `CLOSED` | no section may be entered |
//! | 1 `SLEEPERS` | somebody waits for the gate to open |
//! | 2 `PHASE` | which of the two counts of a shard newcomers count themselves in |
//!
//! Sixteen *shards*, each a pair of counts on its own cache line: the sections inside that were entered in phase 0 and in
//! phase 1. A thread's shard follows from its stack address, so there is no thread-local to initialise.
//!
//! # Rules
//!
//! 1. Enter: read `state`; count yourself in its phase; look at `state` again. Unchanged and open: you are inside. Otherwise
//!    take the count back and begin anew.
//! 2. Leave: take the count back; if the gate waits for sections to leave, wake it.
//! 3. Close: one closer at a time (a lock). Set `CLOSED`, wait until both counts of every shard have been seen at zero.
//! 4. Synchronize: under the same lock, turn the phase over and wait until the old phase's counts have been seen at zero.
//!    Newcomers go on in the new phase, unhindered. A change that precedes it is made under that lock too, so that nothing
//!    changes under a closer.
//!
//! # Safety
//!
//! Rule 1 against rules 3 and 4 is a store-buffering pair: the section writes its count and reads `state`, the closer writes
//! `state` and reads the counts. All four accesses are `SeqCst`, so they have one total order: either the closer's read
//! comes after the count, and it waits; or the section's second look comes after the closing, and it backs out. A
//! count taken back in vain can only delay a closer.
//!
//! A section that is inside when `synchronize` turns phase *p* over has counted itself in *p*: phase *not p* was
//! seen empty by the `synchronize` before, and since then nobody has got inside with it, because the second look compares
//! the phase too. (If the phase has turned twice in between, the look finds the phase the section did count itself in.)
//!
//! Leaving is a Release and the closer's read of zero an Acquire, so the closer sees all that sections did; opening is a
//! Release and the second look an Acquire, so sections see all that the closer did.
//!
//! # Liveness
//!
//! Sections do not sleep, so counts reach zero, but for one kind: a system call of a section may wait for whoever closes the gate. It is
//! known when it does ([`Gate::nudging`]), and got out of it while the gate is waited for. The closer sleeps on an event count that the last leaver wakes (leaver:
//! count, then look for a waiting closer; closer: say that it waits, then look at the counts). A newcomer that finds the
//! gate closed sleeps on `state`, which opening changes. A stream of newcomers cannot keep a closer out: they back out.
//!
//! Sections do not nest: a thread inside that enters again waits for a closer that waits for it.

use super::mutation::{Mutation, mutated, ordering};
use super::shim::atomic::AtomicU32;
use super::shim::atomic::Ordering::{Relaxed, Release, SeqCst};
use super::shim::{Backoff, fence_for_model, point};
use super::{Deadline, Futex, Mutex, MutexGuard, WaitQueue};
use core::marker::PhantomData;
use crossbeam_utils::CachePadded;

const CLOSED: u32 = 1;
const SLEEPERS: u32 = 2;
const PHASE: u32 = 4;

const SHARDS: usize = if cfg!(svm_loom) { 2 } else { 16 };

/// Sections that run side by side, against a closer that runs alone.
///
/// Sections are short and never sleep; a closer waits for those inside and keeps new ones out; a grace period
/// ([`synchronize`](Self::synchronize)) waits for those inside and keeps nobody out.
#[derive(Debug)]
pub struct Gate {
    state: CachePadded<Futex>,
    shards: [CachePadded<Shard>; SHARDS],
    /// Closers and grace periods, one at a time.
    exclusive: Mutex<()>,
    /// Where the one that waits for sections to leave sleeps.
    drained: WaitQueue,
    /// 1 while somebody waits for sections to leave.
    draining: AtomicU32,
    /// What is done each time that this has taken [`PATIENCE`](super::PATIENCE).
    nudge: Option<fn()>,
}

/// How many sections are inside, by the phase they were entered in.
#[derive(Debug)]
struct Shard {
    inside: [AtomicU32; 2],
}

#[cfg(not(svm_loom))]
impl Shard {
    const fn new() -> Self {
        Self {
            inside: [AtomicU32::new(0), AtomicU32::new(0)],
        }
    }
}

impl Shard {
    /// Whether nobody is inside with `phase`.
    #[inline]
    fn is_empty(&self, phase: usize) -> bool {
        // SeqCst, as in rule 1: the counts are read after `state` was written. And Acquire, of what those sections wrote.
        self.inside[phase].load(ordering(SeqCst, Mutation::GateDrainRelaxed)) == 0
    }
}

/// A section; dropping it leaves.
#[derive(Debug)]
#[must_use = "the section lasts only while the guard lives"]
pub struct GateGuard<'a> {
    gate: &'a Gate,
    inside: &'a AtomicU32,
    /// Not `Send`: a section is one thread's, and short.
    _here: PhantomData<*const ()>,
}

/// The gate is closed and nobody is inside; dropping it opens.
#[derive(Debug)]
#[must_use = "the gate is closed only while the guard lives"]
pub struct Closed<'a> {
    gate: &'a Gate,
    _alone: MutexGuard<'a, ()>,
}

impl Gate {
    /// An open gate with nobody inside; all bytes zero.
    #[cfg(not(svm_loom))]
    pub const fn new() -> Self {
        Self {
            state: CachePadded::new(Futex::new(0)),
            shards: [const { CachePadded::new(Shard::new()) }; SHARDS],
            exclusive: Mutex::new(()),
            drained: WaitQueue::new(),
            draining: AtomicU32::new(0),
            nudge: None,
        }
    }

    /// A gate that calls `nudge` again and again while it is waited for that sections leave: it gets those out of a system call that would
    /// not end before that. It may be called at any time, enters no section, and waits for nobody inside.
    #[cfg(not(svm_loom))]
    pub const fn nudging(nudge: fn()) -> Self {
        Self {
            nudge: Some(nudge),
            ..Self::new()
        }
    }

    /// An open gate with nobody inside.
    #[cfg(svm_loom)]
    pub fn new() -> Self {
        Self {
            state: CachePadded::new(Futex::new(0)),
            shards: core::array::from_fn(|_| {
                CachePadded::new(Shard {
                    inside: [AtomicU32::new(0), AtomicU32::new(0)],
                })
            }),
            exclusive: Mutex::new(()),
            drained: WaitQueue::new(),
            draining: AtomicU32::new(0),
            nudge: None,
        }
    }

    /// Enters a section, waiting while the gate is closed.
    ///
    /// Nothing sleeps inside a section, and a section is not entered within another.
    #[inline]
    pub fn enter(&self) -> GateGuard<'_> {
        self.enter_in(shard_of_this_stack())
    }

    /// [`enter`](Self::enter), counted in the shard the caller names.
    #[inline]
    pub(crate) fn enter_in(&self, shard: usize) -> GateGuard<'_> {
        match self.try_enter(&self.shards[shard % SHARDS]) {
            Ok(guard) => guard,
            Err(state) => self.enter_contended(&self.shards[shard % SHARDS], state),
        }
    }

    /// Rule 1. Fails with a state in which it could not be entered, or that has changed since.
    #[inline]
    fn try_enter<'a>(&'a self, shard: &'a Shard) -> Result<GateGuard<'a>, u32> {
        point();
        // Relaxed: a guess, which the second look confirms.
        let state = self.state.load(Relaxed);
        if state & CLOSED != 0 {
            return Err(state);
        }
        let inside = &shard.inside[phase_of(state)];
        inside.fetch_add(1, SeqCst);
        if !mutated(Mutation::GateEnterWithoutFence) {
            fence_for_model();
        }
        // Acquire, within SeqCst: pairs with the Release in `Closed::drop`.
        let now = if mutated(Mutation::GateEnterWithoutSecondLook) {
            state
        } else {
            self.state
                .load(ordering(SeqCst, Mutation::GateEnterRelaxed))
        };
        let guard = GateGuard {
            gate: self,
            inside,
            _here: PhantomData,
        };
        if now == state { Ok(guard) } else { Err(now) }
    }

    #[cold]
    fn enter_contended<'a>(&'a self, shard: &'a Shard, mut state: u32) -> GateGuard<'a> {
        let mut backoff = Backoff::default();
        loop {
            if state & CLOSED != 0 && backoff.spin() {
                self.sleep_while_closed(state);
            }
            match self.try_enter(shard) {
                Ok(guard) => return guard,
                Err(now) => state = now,
            }
        }
    }

    fn sleep_while_closed(&self, state: u32) {
        let sleeping = state | SLEEPERS;
        if state == sleeping
            || self
                .state
                .compare_exchange(state, sleeping, Relaxed, Relaxed)
                .is_ok()
        {
            self.state.wait(sleeping, Deadline::NEVER);
        }
    }

    /// Closes the gate: waits until every section has left; newcomers wait until it opens.
    ///
    /// The caller is in no section. One closer at a time; others wait.
    pub fn close(&self) -> Closed<'_> {
        let alone = self.exclusive.lock();
        if mutated(Mutation::GateStaysOpen) {
            return Closed {
                gate: self,
                _alone: alone,
            };
        }
        // SeqCst: rule 3, against rule 1.
        let was = self.state.fetch_or(CLOSED, SeqCst);
        if !mutated(Mutation::GateCloseWithoutFence) {
            fence_for_model();
        }
        // The other phase has been empty since the last grace period.
        self.drain(phase_of(was));
        Closed {
            gate: self,
            _alone: alone,
        }
    }

    /// Waits until every section that is inside now has left. Newcomers go on meanwhile.
    ///
    /// The caller is in no section.
    pub fn synchronize(&self) {
        let Ok(()) = self.change(|| Ok::<_, core::convert::Infallible>(()));
    }

    /// Makes a change while no closer is at work, and waits until every section that may have missed it has left.
    ///
    /// So a closer sees nothing change but what it changes itself. If `change` fails there is nothing to wait for. The caller is
    /// in no section, and `change` neither enters one nor waits for anybody who might.
    ///
    /// # Errors
    ///
    /// What `change` says.
    pub fn change<R, E>(&self, change: impl FnOnce() -> Result<R, E>) -> Result<R, E> {
        let _alone = self.exclusive.lock();
        let changed = change()?;
        // SeqCst: rule 4, against rule 1.
        let was = self.state.fetch_xor(PHASE, SeqCst);
        if !mutated(Mutation::GateChangeWithoutFence) {
            fence_for_model();
        }
        if !mutated(Mutation::GateSynchronizeWithoutWait) {
            self.drain(phase_of(was));
        }
        Ok(changed)
    }

    /// Waits until every shard's count for `phase` has been seen at zero; acquires what those sections wrote.
    fn drain(&self, phase: usize) {
        if self.shards.iter().all(|shard| shard.is_empty(phase)) {
            return;
        }
        self.drain_contended(phase);
    }

    #[cold]
    fn drain_contended(&self, phase: usize) {
        // Relaxed: who sleeps has a fence, (A) of the wait queue, between this and its last look at the count. So either a leaver
        // sees that somebody waits, or that look sees that it has left.
        self.draining.store(1, Relaxed);
        for shard in &self.shards {
            let is_empty = || shard.is_empty(phase);
            let mut backoff = Backoff::default();
            while !is_empty() {
                if backoff.spin() {
                    let deadline = self
                        .nudge
                        .map_or(Deadline::NEVER, |_| Deadline::after(super::PATIENCE));
                    let is_over = self.drained.wait_until(deadline, is_empty);
                    if let Some(nudge) = self.nudge.filter(|_| !is_over) {
                        nudge();
                    }
                }
            }
        }
        self.draining.store(0, Relaxed);
    }

    /// Whether the gate is closed at this moment: for assertions and reports.
    pub fn is_closed(&self) -> bool {
        self.state.load(Relaxed) & CLOSED != 0
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for GateGuard<'_> {
    /// Rule 2.
    #[inline]
    fn drop(&mut self) {
        // Release: pairs with the Acquire, within SeqCst, of the drain that reads the zero.
        self.inside
            .fetch_sub(1, ordering(SeqCst, Mutation::GateLeaveRelaxed));
        if !mutated(Mutation::GateLeaveWithoutFence) {
            fence_for_model();
        }
        // SeqCst, like the count: whoever sleeps has stored `draining`, then passed a fence, then seen the count.
        if self.gate.draining.load(SeqCst) != 0 && !mutated(Mutation::GateLeaveWithoutWake) {
            self.gate.drained.wake_all();
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        // Release: pairs with the second look of `try_enter`.
        let was = self.gate.state.fetch_and(
            !(CLOSED | SLEEPERS),
            ordering(Release, Mutation::GateOpenRelaxed),
        );
        if was & SLEEPERS != 0 && !mutated(Mutation::GateOpenWithoutWake) {
            self.gate.state.wake_all();
        }
    }
}

#[inline]
fn phase_of(state: u32) -> usize {
    usize::from(state & PHASE != 0)
}

/// Threads' stacks lie megabytes apart: the address of a local tells them apart without a thread-local.
#[inline]
fn shard_of_this_stack() -> usize {
    if cfg!(svm_loom) {
        return 0;
    }
    let local = 0_u8;
    let stack = core::ptr::from_ref(&local).addr() >> 21;
    // Fibonacci hashing: the upper bits of the product depend on all bits of the address.
    stack.wrapping_mul(0x9E37_79B9_7F4A_7C15_u64 as usize) >> (usize::BITS - SHARDS.ilog2())
}

#[cfg(all(test, not(svm_loom)))]
mod tests {
    use super::*;
    use core::sync::atomic::{AtomicBool, AtomicU64};
    use core::time::Duration;
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn a_closer_is_alone() {
        let gate = Gate::new();
        let (inside, done) = (AtomicU64::new(0), AtomicBool::new(false));
        thread::scope(|scope| {
            let sections: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let mut nr_entered = 0_u64;
                        while !done.load(Relaxed) || nr_entered == 0 {
                            let _section = gate.enter();
                            inside.fetch_add(1, Relaxed);
                            inside.fetch_sub(1, Relaxed);
                            nr_entered += 1;
                        }
                        nr_entered
                    })
                })
                .collect();
            for round in 0..2_000 {
                if round % 3 == 0 {
                    gate.synchronize();
                }
                let _closed = gate.close();
                assert_eq!(inside.load(Relaxed), 0, "a section beside the closer");
            }
            done.store(true, Relaxed);
            for section in sections {
                assert!(
                    section.join().expect("no panic") > 0,
                    "a section never got in"
                );
            }
        });
        assert!(!gate.is_closed());
    }

    #[test]
    fn a_grace_period_waits_for_those_inside_and_stalls_nobody() {
        let gate = Gate::new();
        let (over, is_over) = mpsc::channel();
        thread::scope(|scope| {
            let old = gate.enter();
            scope.spawn(|| {
                gate.synchronize();
                over.send(()).expect("the test listens");
            });
            let limit = std::time::Instant::now() + Duration::from_secs(30);
            while gate.state.load(Relaxed) & PHASE == 0 {
                assert!(
                    std::time::Instant::now() < limit,
                    "the grace period never began"
                );
                thread::yield_now();
            }
            // In the new phase.
            for _ in 0..100 {
                drop(gate.enter());
            }
            assert!(
                is_over.recv_timeout(Duration::from_millis(20)).is_err(),
                "did not wait for the old section"
            );
            drop(old);
            is_over
                .recv_timeout(Duration::from_secs(30))
                .expect("ends when the section has left");
        });
    }

    #[test]
    fn sections_in_several_shards_hold_the_closer_back() {
        let gate = Gate::new();
        for shard in 0..SHARDS {
            let section = gate.enter_in(shard);
            thread::scope(|scope| {
                let closer = scope.spawn(|| drop(gate.close()));
                let limit = std::time::Instant::now() + Duration::from_secs(30);
                while !gate.is_closed() {
                    assert!(std::time::Instant::now() < limit, "the closer never came");
                    thread::yield_now();
                }
                thread::sleep(Duration::from_millis(1));
                assert!(
                    !closer.is_finished(),
                    "closed beside a section in shard {shard}"
                );
                drop(section);
            });
        }
    }
}
