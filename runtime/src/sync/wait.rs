//! Sleeping until a condition holds.
//!
//! The word is an *event count*: its low bit says that somebody may sleep, the rest counts wake-ups.
//!
//! ```text
//! waiter                                  waker
//!   condition? no                           make the condition true
//!   word |= SLEEPERS                        fence            (B)
//!   fence               (A)                 word has SLEEPERS? no: done
//!   condition? no                           word = next count, SLEEPERS off
//!   sleep while the word is unchanged       wake all
//! ```
//!
//! Of the fences (A) and (B) one comes first in the total order of `SeqCst` fences. If (A) does, the waker sees SLEEPERS, and
//! its change of the word or its wake gets the waiter out. If (B) does, the waiter's second look sees the condition. So no
//! wake-up is lost, and a waker with nobody to wake pays a fence and a load. The condition needs at least relaxed atomics or a
//! lock of its own; the queue adds no other ordering than this.
//!
//! The count has 31 bits: a waiter would be left asleep if exactly 2^31 wake-ups came between its two reads of the word.

use super::mutation::{Mutation, mutated};
use super::shim::atomic::Ordering::{Relaxed, SeqCst};
use super::shim::atomic::fence;
use super::{Deadline, Futex, Woken};

const SLEEPERS: u32 = 1;
const ONE_EVENT: u32 = 2;

/// Threads that sleep until a condition, which is the caller's, holds.
#[derive(Debug)]
pub struct WaitQueue {
    word: Futex,
}

impl WaitQueue {
    /// A queue with nobody in it; all bytes zero.
    #[cfg(not(svm_loom))]
    pub const fn new() -> Self {
        Self {
            word: Futex::new(0),
        }
    }

    /// A queue with nobody in it.
    #[cfg(svm_loom)]
    pub fn new() -> Self {
        Self {
            word: Futex::new(0),
        }
    }

    /// Sleeps until `condition` holds or `deadline` has passed; returns what `condition` said last.
    ///
    /// `condition` may be asked any number of times. Whoever can make it true calls [`wake_all`](Self::wake_all) afterwards.
    pub fn wait_until(&self, deadline: Deadline, mut condition: impl FnMut() -> bool) -> bool {
        loop {
            if condition() {
                return true;
            }
            // Relaxed: the fence below orders it.
            let seen = self.word.fetch_or(SLEEPERS, Relaxed) | SLEEPERS;
            // (A) Pairs with (B) in `wake_all`.
            if !mutated(Mutation::WaitWithoutFence) {
                fence(SeqCst);
            }
            if !mutated(Mutation::WaitWithoutSecondLook) && condition() {
                return true;
            }
            if self.word.wait(seen, deadline) == Woken::TimedOut {
                return condition();
            }
        }
    }

    /// Wakes every thread that waits, so that it looks at its condition again. No system call if none does.
    #[inline]
    pub fn wake_all(&self) {
        // (B) Pairs with (A) in `wait_until`: what made the condition true comes before the look for sleepers.
        if !mutated(Mutation::WakeWithoutFence) {
            fence(SeqCst);
        }
        if self.word.load(Relaxed) & SLEEPERS != 0 {
            self.wake_sleepers();
        }
    }

    #[cold]
    fn wake_sleepers(&self) {
        let mut seen = self.word.load(Relaxed);
        while seen & SLEEPERS != 0 {
            let next = (seen & !SLEEPERS).wrapping_add(ONE_EVENT);
            // Relaxed: the futex orders the word against its own sleepers (F1, F2 in `futex`).
            match self
                .word
                .compare_exchange_weak(seen, next, Relaxed, Relaxed)
            {
                Ok(_) => return self.word.wake_all(),
                // Another waker took SLEEPERS off, and wakes; or another waiter came.
                Err(now) => seen = now,
            }
        }
    }
}

impl Default for WaitQueue {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(all(test, not(svm_loom)))]
mod tests {
    use super::*;
    use core::sync::atomic::AtomicU32;
    use core::time::Duration;
    use std::thread;
    use std::time::Instant;

    #[test]
    fn a_passed_deadline_asks_once_more_and_does_not_sleep() {
        let queue = WaitQueue::new();
        assert!(!queue.wait_until(Deadline::PASSED, || false));
        assert!(queue.wait_until(Deadline::PASSED, || true));
        let begun = Instant::now();
        assert!(!queue.wait_until(Deadline::after(Duration::from_millis(20)), || false));
        assert!(begun.elapsed() >= Duration::from_millis(20));
    }

    #[test]
    fn ping_pong_loses_no_wake_up() {
        const ROUNDS: u32 = 2_000;
        let (queue, turn) = (WaitQueue::new(), AtomicU32::new(0));
        let limit = Deadline::after(Duration::from_secs(30));
        thread::scope(|scope| {
            for me in 0..2 {
                let (queue, turn) = (&queue, &turn);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let mine = 2 * round + me;
                        assert!(
                            queue.wait_until(limit, || turn.load(Relaxed) == mine),
                            "stuck in round {round}"
                        );
                        turn.store(mine + 1, Relaxed);
                        queue.wake_all();
                    }
                });
            }
        });
        assert_eq!(turn.load(Relaxed), 2 * ROUNDS);
    }
}
