//! Workers and CPU threads on the same memory for a while, for each door, granule and size of device memory: nothing is lost, nothing hangs.
//!
//! `SVM_STRESS_SECONDS` is how long all of it takes (default 3); `SVM_DISABLE` forces fallbacks, as everywhere; a failure
//! names its case and seed, and `SVM_STRESS_SEED` repeats it.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use accel_sim::{Accelerator, Options, indices};
use svm::{Buffer, Delivery, Granule};

#[derive(Clone, Copy, Debug)]
struct Case {
    delivery: Delivery,
    granule: Granule,
    memory_bytes: Option<usize>,
    seed: u64,
}

impl Case {
    fn options(&self) -> svm::Options {
        svm::Options::new()
            .delivery(self.delivery)
            .granule(self.granule)
    }

    fn accelerator(&self, workers: usize) -> Accelerator {
        let mut options = Options::new().workers(workers);
        if let Some(bytes) = self.memory_bytes {
            options = options.memory_bytes(bytes);
        }
        Accelerator::with_options(options).expect("an accelerator")
    }
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A small generator of numbers that differ (splitmix64).
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Runs `test` on every case, for equal parts of the time, each with a watchdog.
fn for_each_case(test: fn(Case, Instant)) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let seconds = env("SVM_STRESS_SECONDS").unwrap_or(3);
    let seed = env("SVM_STRESS_SEED").unwrap_or_else(|| std::process::id().into());
    let mut deliveries = vec![Delivery::Inline];
    let mut word = [0_u64; 1024];
    let threaded = svm::Options::new().delivery(Delivery::Thread);
    if svm::mirror_with(&mut word, &threaded).is_ok() {
        deliveries.push(Delivery::Thread);
    }
    let cases: Vec<Case> = deliveries
        .into_iter()
        .flat_map(|delivery| {
            [Granule::Page, Granule::Big, Granule::Huge].map(|granule| (delivery, granule))
        })
        .flat_map(|(delivery, granule)| {
            [None, Some(1 << 20)].map(|memory_bytes| Case {
                delivery,
                granule,
                memory_bytes,
                seed,
            })
        })
        .collect();
    // Two tests share the time.
    let each = Duration::from_secs(seconds) / (2 * u32::try_from(cases.len()).expect("few"));
    for case in cases {
        let (done, watch) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            test(case, Instant::now() + each);
            let _ = done.send(());
        });
        if let Err(mpsc::RecvTimeoutError::Timeout) =
            watch.recv_timeout(each + Duration::from_secs(30))
        {
            // Not by a macro: the harness would keep it.
            let _ = writeln!(std::io::stderr(), "no end: {case:?}");
            std::process::abort();
        }
        assert!(thread.join().is_ok(), "failed: {case:?}");
    }
}

/// Two CPU threads and the workers add to counters spread over a megabyte, edges included; the sums come out exactly.
#[test]
fn shared_counters() {
    for_each_case(|case, until| {
        const COUNTERS: usize = (1 << 17) + 5;
        let accel = case.accelerator(2);
        let mut counters = vec![0_u64; COUNTERS];
        let mut added = 0;
        {
            let mut mirror = svm::mirror_with(&mut counters, &case.options()).expect("a mirror");
            let shared = mirror.share();
            let round = AtomicU64::new(case.seed);
            loop {
                let by_cpu = AtomicU64::new(0);
                let over = AtomicBool::new(false);
                let base = round.fetch_add(1, Ordering::Relaxed);
                let at = |i: u64| mix(base << 32 | i) as usize % COUNTERS;
                let launched = std::thread::scope(|threads| {
                    for t in 0..2 {
                        let (by_cpu, over, shared) = (&by_cpu, &over, &shared);
                        threads.spawn(move || {
                            let mut i = 0;
                            while !over.load(Ordering::Relaxed) {
                                shared.fetch_add(
                                    mix(base ^ t << 60 ^ i) as usize % COUNTERS,
                                    1,
                                    Ordering::Relaxed,
                                );
                                i += 1;
                            }
                            by_cpu.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                    let launched = accel.run_items(300, shared.view(), |_, i, c| {
                        c.fetch_add(at(i as u64), 1).map(drop)
                    });
                    over.store(true, Ordering::Relaxed);
                    launched
                });
                launched.expect("the launch");
                added += 300 + by_cpu.into_inner();
                if Instant::now() > until {
                    break;
                }
            }
        }
        assert_eq!(counters.iter().sum::<u64>(), added, "{case:?}");
    });
}

/// Slices are written by the CPU and by kernels in turns, each checking what the other left, while a third array is read by both
/// at once.
#[test]
fn checked_pages() {
    for_each_case(|case, until| {
        const LEN: usize = 200_003;
        let accel = case.accelerator(3);
        let tag = |turn: u64, i: usize| mix(turn ^ case.seed << 32).wrapping_add(i as u64);
        let input: Vec<u64> = (0..LEN as u64).map(mix).collect();
        let input = svm::mirror_ref_with(&input, &case.options()).expect("an input");
        let mut vec = vec![0_u64; LEN];
        let mut edgy = svm::mirror_with(&mut vec, &case.options()).expect("a mirror");
        let mut whole = Buffer::<u64>::with_options(LEN, &case.options()).expect("a buffer");
        for turn in 0.. {
            edgy.as_mut_slice()
                .iter_mut()
                .enumerate()
                .for_each(|(i, y)| *y = tag(turn, i));
            // Part of it stays on the device from turn to turn.
            whole.as_mut_slice()[..LEN / 2]
                .iter_mut()
                .enumerate()
                .for_each(|(i, y)| *y = tag(turn, i));
            let captured = input.as_slice();
            accel
                .scope(|s| {
                    let launch = s.launch(
                        (indices(), edgy.view_mut(), whole.view_mut(), input.view()),
                        |(range, edgy, whole, input)| {
                            for (((i, e), w), x) in range.zip(edgy).zip(whole).zip(input) {
                                assert_eq!(*e, tag(turn, i), "element {i} in turn {turn}");
                                if i < LEN / 2 {
                                    assert_eq!(*w, tag(turn, i), "element {i} in turn {turn}");
                                }
                                assert_eq!(*x, captured[i]);
                                *e = e.wrapping_add(*x);
                                *w = tag(turn, i);
                            }
                        },
                    )?;
                    assert!(
                        captured
                            .iter()
                            .enumerate()
                            .all(|(i, x)| *x == mix(i as u64))
                    );
                    launch.wait()
                })
                .expect("the launch");
            for (i, (e, w)) in edgy.as_slice().iter().zip(whole.as_slice()).enumerate() {
                assert_eq!(
                    *e,
                    tag(turn, i).wrapping_add(mix(i as u64)),
                    "element {i} in turn {turn}"
                );
                assert_eq!(*w, tag(turn, i), "element {i} in turn {turn}");
            }
            if Instant::now() > until {
                break;
            }
        }
        edgy.close().expect("home");
    });
}
