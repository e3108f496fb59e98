//! The first mirrors of a process, made by several threads at once: nobody may get a door that is not open yet.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use svm::{Delivery, Options};
use tests::mapping::assert_passed_alone;
use tests::{TestDevice, Watchdog};

const THREADS: usize = 16;
const MARK: &str = "SVM_TEST_FIRST_USE_CHILD";

/// What handles SIGBUS. (The standard library does, from the start.)
fn handler() -> usize {
    // SAFETY: a sigaction is integers, a set of integers and an optional function: zero is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: with a null new action, the current one is written to `action`.
    let asked = unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut action) };
    assert_eq!(asked, 0);
    action.sa_sigaction
}

/// Of a process that has used nothing of ours. The threads come one after the other, `step` apart, so that some find the door
/// half open. Who has a mirror is served, so our handler is there.
fn first_use(delivery: Delivery, step: Duration) {
    let _watchdog = Watchdog::new("first use");
    let options = Options::new().delivery(delivery);
    let _device = TestDevice::new().unwrap();
    let before = handler();
    let here = AtomicUsize::new(0);
    let body = |i: u32| {
        let input = [7u8; 100];
        here.fetch_add(1, Ordering::Relaxed);
        while here.load(Ordering::Relaxed) < THREADS {
            std::thread::yield_now();
        }
        let begun = Instant::now();
        while begun.elapsed() < step * i {
            core::hint::spin_loop();
        }
        let mirror = svm::mirror_ref_with(&input, &options);
        let handled = handler() != before;
        match mirror {
            Ok(_) => assert!(handled, "thread {i} has a mirror that nobody serves"),
            Err(error) => assert!(error.is_unsupported(), "{error}"),
        }
    };
    std::thread::scope(|scope| {
        for i in 0..THREADS {
            let body = &body;
            scope.spawn(move || body(i as u32));
        }
    });
}

#[test]
fn several_threads_open_a_door_at_once() {
    if let Ok(of_child) = std::env::var(MARK) {
        let step = Duration::from_micros(of_child.parse().unwrap());
        return first_use(Delivery::Inline, step);
    }
    // Each process has one such moment, so it takes many.
    let name = "several_threads_open_a_door_at_once";
    for i in 0..100 {
        let out = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(MARK, (i % 10 * 3).to_string())
            .output()
            .unwrap();
        assert_passed_alone(name, format_args!("process {i}"), &out);
    }
}
