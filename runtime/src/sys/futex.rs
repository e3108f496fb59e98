//! Waiting on a word of memory.
//!
//! Both sides are single system calls that touch nothing but the word, so they are fit for a signal
//! handler. The word must not lie in mirrored memory.

use std::sync::atomic::AtomicU32;

use super::errno;

/// Why [`wait`] returned. None of these says anything about the word: look at it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    /// Somebody called [`wake`], or the kernel woke us for no reason.
    Woken,
    /// The word did not have the expected value.
    Changed,
    /// The deadline passed.
    TimedOut,
    /// A signal handler ran.
    Interrupted,
}

/// Sleeps while `*word == expected`, until woken or until the monotonic clock
/// ([`super::clock::monotonic_ns`]) reads `deadline_ns`. Fault path.
///
/// The comparison and the falling asleep are one step with respect to [`wake`] (futex(2)): a waker
/// that changes the word and then calls `wake` can't be missed. It orders no other memory.
pub(crate) fn wait(word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> Waited {
    let deadline = deadline_ns.map(|ns| libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    });
    let deadline_ptr = deadline
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `word` is aligned and live for the call; the kernel only reads it, atomically. The
    // deadline is null or a timespec that outlives the call. WAIT_BITSET takes an absolute
    // CLOCK_MONOTONIC time and ignores the fifth argument.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG,
            expected,
            deadline_ptr,
            std::ptr::null::<u32>(),
            libc::FUTEX_BITSET_MATCH_ANY,
        )
    };
    if result == 0 {
        return Waited::Woken;
    }
    match errno() {
        libc::EAGAIN => Waited::Changed,
        libc::ETIMEDOUT => Waited::TimedOut,
        _ => Waited::Interrupted,
    }
}

/// Wakes up to `nr_waiters` threads that sleep on `word`, and returns how many it woke. Fault path.
pub(crate) fn wake(word: &AtomicU32, nr_waiters: u32) -> u32 {
    // SAFETY: FUTEX_WAKE does not access the word, only uses its address as a key.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            nr_waiters.min(i32::MAX as u32),
        )
    };
    u32::try_from(result).unwrap_or(0)
}

/// Wakes every thread that sleeps on `word`. Fault path.
pub(crate) fn wake_all(word: &AtomicU32) -> u32 {
    wake(word, u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::{Acquire, Release};

    use super::super::clock::monotonic_ns;
    use super::*;

    #[test]
    fn wait_returns_at_once_when_the_word_differs() {
        assert_eq!(wait(&AtomicU32::new(1), 0, None), Waited::Changed);
    }

    #[test]
    fn wait_times_out_at_its_deadline() {
        let word = AtomicU32::new(0);
        let deadline = monotonic_ns() + 3_000_000;
        loop {
            match wait(&word, 0, Some(deadline)) {
                Waited::TimedOut => break,
                Waited::Woken | Waited::Interrupted => {}
                Waited::Changed => panic!("nobody changed the word"),
            }
        }
        assert!(monotonic_ns() >= deadline);
    }

    #[test]
    fn a_waker_is_never_missed() {
        let word = AtomicU32::new(0);
        let deadline = monotonic_ns() + 20_000_000_000;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for turn in 0..1000 {
                    while word.load(Acquire) != turn * 2 + 1 {
                        let seen = word.load(Acquire);
                        if seen != turn * 2 + 1 {
                            wait(&word, seen, Some(deadline));
                        }
                        assert!(monotonic_ns() < deadline, "lost wake-up");
                    }
                    word.store(turn * 2 + 2, Release);
                    wake_all(&word);
                }
            });
            for turn in 0..1000 {
                word.store(turn * 2 + 1, Release);
                wake_all(&word);
                while word.load(Acquire) != turn * 2 + 2 {
                    wait(&word, turn * 2 + 1, Some(deadline));
                    assert!(monotonic_ns() < deadline, "lost wake-up");
                }
            }
        });
        assert_eq!(word.load(Acquire), 2000);
        assert_eq!(wake(&word, 1), 0);
    }
}
