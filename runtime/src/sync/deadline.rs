//! Moments on the monotonic clock after which a wait gives up.

use core::time::Duration;

/// A moment on the monotonic clock after which a wait gives up.
///
/// Absolute, so that a wait which is woken early and sleeps again cannot stretch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline {
    /// Nanoseconds of `CLOCK_MONOTONIC`; `u64::MAX` never comes.
    at_ns: u64,
}

impl Deadline {
    /// The wait ends only with what it waits for.
    pub const NEVER: Self = Self { at_ns: u64::MAX };

    /// Has passed already: "only if it needs no waiting".
    pub const PASSED: Self = Self { at_ns: 0 };

    /// The moment `timeout` from now; one too far away to count is [`NEVER`](Self::NEVER).
    #[must_use]
    pub fn after(timeout: Duration) -> Self {
        match u64::try_from(timeout.as_nanos()) {
            Ok(ns) => Self::at_ns(super::futex::monotonic_ns().saturating_add(ns)),
            Err(_) => Self::NEVER,
        }
    }

    /// The moment `at_ns` nanoseconds on `CLOCK_MONOTONIC`.
    #[must_use]
    pub const fn at_ns(at_ns: u64) -> Self {
        Self { at_ns }
    }

    /// Nanoseconds of `CLOCK_MONOTONIC`, or `None` if it never comes.
    #[must_use]
    pub const fn as_ns(self) -> Option<u64> {
        if self.at_ns == u64::MAX {
            None
        } else {
            Some(self.at_ns)
        }
    }

    /// Whether the moment has come. Reads the clock only where the answer is not known without.
    #[must_use]
    pub fn has_passed(self) -> bool {
        match self.as_ns() {
            None => false,
            Some(0) => true,
            Some(at_ns) => super::futex::monotonic_ns() >= at_ns,
        }
    }
}
