//! The monotonic clock.

/// Nanoseconds on `CLOCK_MONOTONIC`. Fault path: a vDSO call, no system call where the platform has
/// one.
#[inline]
pub(crate) fn monotonic_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is valid for writes. CLOCK_MONOTONIC exists on every Linux, so the call can't
    // fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Sleeps until the monotonic clock shows `at_ns`. Fault path: one system call, async-signal-safe.
pub(crate) fn sleep_until(at_ns: u64) {
    let at = libc::timespec {
        tv_sec: libc::time_t::try_from(at_ns / 1_000_000_000).unwrap_or(libc::time_t::MAX),
        tv_nsec: i64::try_from(at_ns % 1_000_000_000).unwrap_or(0),
    };
    // SAFETY: `at` is a valid timespec; the remaining time is not asked for. An early return is no harm: callers look again.
    unsafe {
        libc::clock_nanosleep(
            libc::CLOCK_MONOTONIC,
            libc::TIMER_ABSTIME,
            &raw const at,
            core::ptr::null_mut(),
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advances_at_the_speed_of_time() {
        let before = monotonic_ns();
        std::thread::sleep(std::time::Duration::from_millis(5));
        let elapsed = monotonic_ns() - before;
        assert!((5_000_000..60_000_000_000).contains(&elapsed), "{elapsed}");
    }
}
