//! Counters that both sides count: bounced back and forth page by page against a shadow, and by atomics on both sides at once.

#![cfg(target_os = "linux")]

use std::sync::atomic::{AtomicBool, Ordering};

use accel_sim::Accelerator;
use svm::{Access, Buffer, Delivery, Granule, Options};
use tests::{TestDevice, Watchdog, in_own_process, usable};

const WORDS: usize = 4096 / 8;
const PAGES: usize = 40;

fn each(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::new(name);
    if !usable() {
        return;
    }
    in_own_process(name, &["", "move"], || {
        for delivery in [Delivery::Inline, Delivery::Thread] {
            for granule in [Granule::Page, Granule::Big, Granule::Huge] {
                for read_mostly in [false, true] {
                    let options = Options::new().delivery(delivery).granule(granule);
                    test(&options.read_mostly(read_mostly));
                }
            }
        }
    });
}

/// uffd-stress's pattern: in each page a counter and a copy of it at the page's end, counted by one side after the other, in an order
/// that differs from round to round; a shadow knows.
#[test]
fn counters_bounce() {
    each("counters_bounce", |options| {
        let mut buffer = Buffer::<u64>::with_options(PAGES * WORDS, options).unwrap();
        let devices = [TestDevice::new().unwrap(), TestDevice::new().unwrap()];
        let mut shadow = [0u64; PAGES];
        for round in 0..30 {
            for k in 0..PAGES {
                // Each page once: 7 and their number have no divisor in common.
                let page = (k * 7 + round) % PAGES;
                let turn = (round * 5 + page) % 4;
                if turn == 3 {
                    let words = &mut buffer.as_mut_slice()[page * WORDS..][..WORDS];
                    assert_eq!(words[0], words[WORDS - 1]);
                    words[0] += 1;
                    words[WORDS - 1] += 1;
                } else {
                    let device = &devices[turn % 2];
                    let view = buffer.view_mut();
                    let (at, last) = (view.addr() + page * 4096, (WORDS - 1) * 8);
                    let mut word = [0; 8];
                    device.read(view.region(), at, &mut word).unwrap();
                    let next = (u64::from_ne_bytes(word) + 1).to_ne_bytes();
                    device.write(view.region(), at, &next).unwrap();
                    device.write(view.region(), at + last, &next).unwrap();
                }
            }
            shadow.iter_mut().for_each(|count| *count += 1);
        }
        for (page, &count) in shadow.iter().enumerate() {
            let words = &buffer.as_slice()[page * WORDS..][..WORDS];
            assert_eq!(
                [words[0], words[WORDS - 1]],
                [count; 2],
                "page {page} {options:?}"
            );
        }
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

/// Atomics of the CPU and of two accelerators on one counter, and on one beside it in the same page: no addition is lost, and each
/// compare-and-exchange succeeds for one only.
#[test]
fn atomics_of_both_sides_add_up() {
    each("atomics_of_both_sides_add_up", |options| {
        const EACH: u64 = 1500;
        let accels = [(); 2]
            .map(|()| Accelerator::with_options(accel_sim::Options::new().workers(2)).unwrap());
        let mut buffer = Buffer::<u64>::with_options(2 * WORDS, options).unwrap();
        let shared = buffer.share();
        std::thread::scope(|scope| {
            for accel in &accels {
                let shared = &shared;
                scope.spawn(move || {
                    for _ in 0..3 {
                        accel
                            .run_items(EACH as usize / 3, shared.view(), |_, _, words| {
                                words.fetch_add(5, 1)?;
                                loop {
                                    let seen = words.load(6)?;
                                    if words.compare_exchange(6, seen, seen + 2)?.is_ok() {
                                        return Ok(());
                                    }
                                }
                            })
                            .unwrap();
                    }
                });
            }
            for _ in 0..EACH {
                shared.fetch_add(5, 1, Ordering::Relaxed);
                let second = shared.atomic(6);
                let added =
                    second.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| Some(n + 2));
                assert!(added.is_ok());
            }
        });
        assert_eq!(
            &buffer.as_slice()[5..7],
            [3 * EACH, 2 * 3 * EACH],
            "{options:?}"
        );
    });
}

/// A device that took pages for its atomics has them to itself until the CPU touches them, and not a moment longer.
#[test]
fn exclusive_access_ends_with_the_first_touch() {
    each("exclusive_access_ends_with_the_first_touch", |options| {
        let mut buffer = Buffer::<u64>::with_options(4 * WORDS, options).unwrap();
        let device = TestDevice::new().unwrap();
        for round in 1..=20u64 {
            let view = buffer.view_mut();
            let (region, at) = (view.region(), view.addr());
            assert!(device.make_exclusive(region, at, 4).unwrap());
            assert_eq!(device.nr_exclusive(region, at, 4).unwrap(), 4);
            device
                .write(region, at + 4096, &(2 * round - 1).to_ne_bytes())
                .unwrap();
            assert_eq!(device.nr_exclusive(region, at, 4).unwrap(), 4);
            assert_eq!(buffer.as_slice()[WORDS], 2 * round - 1);
            buffer.as_mut_slice()[WORDS] = 2 * round;
            let view = buffer.view();
            let left = device.nr_exclusive(view.region(), view.addr(), 4).unwrap();
            assert!(
                left < 4 && (left == 3 || options.granule != Granule::Page),
                "{left} {options:?}"
            );
            device
                .fault_in(view.region(), view.addr(), 8, Access::Read)
                .unwrap();
        }
    });
}

/// Processes are spawned, forked and vforked without end while kernels run on what the parent has: no kernel loses a count.
#[test]
fn processes_come_and_go_while_kernels_run() {
    extern "C" fn child(_: *mut libc::c_void) -> i32 {
        // SAFETY: ends the child, which shares the parent's memory, at once.
        unsafe { libc::_exit(7) }
    }
    each("processes_come_and_go_while_kernels_run", |options| {
        if options.read_mostly || options.granule == Granule::Huge {
            return;
        }
        let accel = Accelerator::with_options(accel_sim::Options::new().workers(2)).unwrap();
        let mut buffer = Buffer::<u64>::with_options(PAGES * WORDS, options).unwrap();
        let shared = buffer.share();
        let over = AtomicBool::new(false);
        let mut rounds = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for i in 0..8 {
                    let mut command = std::process::Command::new("true");
                    if i % 2 == 0 {
                        use std::os::unix::process::CommandExt;
                        // SAFETY: it does nothing, but has the child be forked rather than spawned.
                        unsafe { command.pre_exec(|| Ok(())) };
                    }
                    assert!(command.status().unwrap().success());
                    let mut stack = vec![0u64; 8192];
                    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
                    let top = stack.as_mut_ptr_range().end.cast();
                    // SAFETY: what vfork(2) is, on a stack of its own; the child ends at once, and the parent waits for that.
                    let pid = unsafe { libc::clone(child, top, flags, std::ptr::null_mut()) };
                    let mut status = 0;
                    // SAFETY: waits for the child just made.
                    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
                    assert_eq!(libc::WEXITSTATUS(status), 7);
                }
                over.store(true, Ordering::SeqCst);
            });
            while !over.load(Ordering::SeqCst) {
                accel
                    .run_items(PAGES * 4, shared.view(), |_, i, words| {
                        words.fetch_add(i / 4 * WORDS, 1).map(drop)
                    })
                    .unwrap();
                shared.fetch_add((rounds % PAGES) * WORDS + 1, 1, Ordering::Relaxed);
                rounds += 1;
            }
        });
        for page in 0..PAGES {
            assert_eq!(
                buffer.as_slice()[page * WORDS],
                4 * rounds as u64,
                "page {page} {options:?}"
            );
        }
        let sum: u64 = (0..PAGES)
            .map(|page| buffer.as_slice()[page * WORDS + 1])
            .sum();
        assert_eq!(sum, rounds as u64);
    });
}
