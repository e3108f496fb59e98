//! Forward progress (protocol.md section 5): who wants a page gets it, in a bounded number of rounds, whatever others do; and who
//! wants another page does not even wait.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use svm::{Access, Buffer, Delivery, Granule, Options};
use tests::{TestDevice, Watchdog, usable};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
const DOORS: [Delivery; 2] = [Delivery::Inline, Delivery::Thread];

fn options(delivery: Delivery) -> Options {
    Options::new().delivery(delivery).granule(Granule::Page)
}

/// The words of a buffer, for several threads: relaxed atomics, as `Buffer::share` gives them to kernels.
fn words(buffer: &mut Buffer<u64>) -> Vec<&AtomicU64> {
    let (at, len) = (buffer.as_mut_slice().as_mut_ptr(), buffer.len());
    // SAFETY: inside the buffer, which is borrowed for as long; everybody uses them as atomics, the device one at a time.
    (0..len)
        .map(|i| unsafe { AtomicU64::from_ptr(at.add(i)) })
        .collect()
}

/// What a driver with `fault_in` needs, which is one round a fault: the token is taken and used inside it.
#[test]
fn a_storm_on_its_page_interrupts_no_fault_of_a_round() {
    const ACCESSES: u64 = 3000;
    for delivery in DOORS.into_iter().filter(|_| usable()) {
        let _watchdog = Watchdog::with_timeout("storm, rounds", Duration::from_secs(100));
        let mut buffer = Buffer::<u64>::with_options(WORDS, &options(delivery)).unwrap();
        let device = TestDevice::new().unwrap();
        let mapped = device.attachment().map(buffer.view().region()).unwrap();
        let first = (buffer.view().addr() - mapped.region().base()) / PAGE;
        let word = buffer.view().addr().wrapping_add_signed(mapped.offset());
        let words = words(&mut buffer);
        let (done, storm) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut commits = 0u64;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    words[1].fetch_add(1, Ordering::Relaxed);
                    storm.fetch_add(1, Ordering::Relaxed);
                }
            });
            let _worker = svm::worker_thread();
            let mut range = device.attachment().range().unwrap();
            for _ in 0..ACCESSES {
                let access = |valid: &svm::Valid, _: &svm::DeviceGuard<'_>| {
                    commits += 1;
                    assert!(valid.writable().contains(first % 512));
                    let word = std::ptr::with_exposed_provenance_mut::<u64>(word);
                    // SAFETY: the page is the device's to write, and the device lock is held.
                    unsafe { word.write_volatile(word.read_volatile() + 1) };
                };
                range
                    .fault_in(&mapped, first..first + 1, Access::Write, 0, TIMEOUT, access)
                    .unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        let stats = buffer.stats();
        println!(
            "{delivery:?}: {ACCESSES} accesses, {commits} commits, {} retries, {} waits, beside {} writes",
            stats.retries,
            stats.waits,
            storm.load(Ordering::Relaxed)
        );
        assert_eq!((commits, stats.retries), (ACCESSES, 0));
        assert_eq!(buffer.as_slice()[0], ACCESSES);
        assert_eq!(buffer.as_slice()[1], storm.into_inner());
        assert_eq!(stats.anomalies, 0);
    }
}

const TIMEOUT: Duration = Duration::from_secs(10);

/// A driver's own loop holds nothing between its steps, so a storm interrupts it; how often before it gets through is counted.
#[test]
fn a_storm_on_its_page_does_not_starve_a_drivers_loop() {
    const ACCESSES: u64 = 1000;
    for delivery in DOORS.into_iter().filter(|_| usable()) {
        let _watchdog = Watchdog::with_timeout("storm, updates", Duration::from_secs(100));
        let mut buffer = Buffer::<u64>::with_options(WORDS, &options(delivery)).unwrap();
        let device = TestDevice::new().unwrap();
        let mapped = device.attachment().map(buffer.view().region()).unwrap();
        let first = (buffer.view().addr() - mapped.region().base()) / PAGE;
        let word = buffer.view().addr().wrapping_add_signed(mapped.offset());
        let words = words(&mut buffer);
        let (done, storm) = (AtomicBool::new(false), AtomicU64::new(0));
        let (mut most, mut all) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    words[1].fetch_add(1, Ordering::Relaxed);
                    storm.fetch_add(1, Ordering::Relaxed);
                }
            });
            let _worker = svm::worker_thread();
            let mut range = device.attachment().range().unwrap();
            for _ in 0..ACCESSES {
                let mut rounds = 0;
                loop {
                    rounds += 1;
                    let mut update = range
                        .start_update(&mapped, first..first + 1, TIMEOUT)
                        .unwrap();
                    update.fault(Access::Write).unwrap();
                    let guard = svm::Device::lock(device.attachment().device()).lock();
                    if update.end_update(&guard).is_ok() {
                        let word = std::ptr::with_exposed_provenance_mut::<u64>(word);
                        // SAFETY: the page is the device's to write, and the device lock is held.
                        unsafe { word.write_volatile(word.read_volatile() + 1) };
                        break;
                    }
                }
                most = most.max(rounds);
                all += rounds;
            }
            done.store(true, Ordering::Relaxed);
        });
        println!(
            "{delivery:?}: {ACCESSES} accesses, {all} rounds, {most} at most, beside {} writes",
            storm.load(Ordering::Relaxed)
        );
        assert!(most <= MOST_ROUNDS, "{most} rounds for one access");
        assert_eq!(buffer.as_slice()[0], ACCESSES);
        assert_eq!(buffer.as_slice()[1], storm.into_inner());
        assert_eq!(buffer.stats().anomalies, 0);
    }
}

const MOST_ROUNDS: u64 = 100;

/// One page, back and forth, in strict turns: each turn is one page each way, and none is lost.
#[test]
fn cpu_and_device_play_ping_pong() {
    for (delivery, turns) in [(Delivery::Inline, 100_000u64), (Delivery::Thread, 10_000)] {
        if !usable() {
            return;
        }
        let _watchdog = Watchdog::with_timeout("ping-pong", Duration::from_secs(120));
        let mut buffer = Buffer::<u64>::with_options(WORDS, &options(delivery)).unwrap();
        let device = TestDevice::new().unwrap();
        let mapped = device.attachment().map(buffer.view().region()).unwrap();
        let first = (buffer.view().addr() - mapped.region().base()) / PAGE;
        let word = buffer.view().addr().wrapping_add_signed(mapped.offset());
        let words = words(&mut buffer);
        // Whose turn it is: not in the page, so that looking moves nothing. Even: the device's.
        let turn = AtomicU64::new(0);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _worker = svm::worker_thread();
                let mut range = device.attachment().range().unwrap();
                for n in 0..turns {
                    wait_for(&turn, 2 * n);
                    let access = |_: &svm::Valid, _: &svm::DeviceGuard<'_>| {
                        let word = std::ptr::with_exposed_provenance_mut::<u64>(word);
                        // SAFETY: the page is the device's to write, and the device lock is held.
                        unsafe { word.write_volatile(word.read_volatile() + 1) };
                    };
                    range
                        .fault_in(&mapped, first..first + 1, Access::Write, 0, TIMEOUT, access)
                        .unwrap();
                    turn.store(2 * n + 1, Ordering::Release);
                }
            });
            for n in 0..turns {
                wait_for(&turn, 2 * n + 1);
                words[0].fetch_add(1, Ordering::Relaxed);
                turn.store(2 * n + 2, Ordering::Release);
            }
        });
        let took = begun.elapsed();
        let stats = buffer.stats();
        println!(
            "{delivery:?}: {turns} turns in {took:?}, {:.1} us each, {} waits",
            took.as_secs_f64() * 1e6 / turns as f64,
            stats.waits
        );
        assert_eq!(buffer.as_slice()[0], 2 * turns);
        assert_eq!(stats.device_write_faults, turns);
        // The CPU's first touch made the page; then each of its turns fetched it.
        assert_eq!(
            (stats.to_device_pages(), stats.to_host_demand_pages),
            (turns, turns)
        );
        assert_eq!((stats.retries, stats.anomalies), (0, 0));
    }
}

fn wait_for(turn: &AtomicU64, value: u64) {
    let mut looks = 0u32;
    while turn.load(Ordering::Acquire) != value {
        looks += 1;
        if looks > 200 {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

/// The same page, no turns: each side takes it when it can. When the first is done the other has had a fair part.
#[test]
fn neither_side_starves_where_both_want_a_page() {
    const EACH: u64 = 20_000;
    for delivery in DOORS.into_iter().filter(|_| usable()) {
        let each = if delivery == Delivery::Inline {
            EACH
        } else {
            EACH / 10
        };
        let _watchdog = Watchdog::with_timeout("free for all", Duration::from_secs(120));
        let mut buffer = Buffer::<u64>::with_options(WORDS, &options(delivery)).unwrap();
        let device = TestDevice::new().unwrap();
        let mapped = device.attachment().map(buffer.view().region()).unwrap();
        let first = (buffer.view().addr() - mapped.region().base()) / PAGE;
        let word = buffer.view().addr().wrapping_add_signed(mapped.offset());
        let words = words(&mut buffer);
        let (barrier, faults) = (Barrier::new(2), AtomicU64::new(0));
        // What the other had done when the first was done with half of its own.
        let (cpu, dev) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _worker = svm::worker_thread();
                let mut range = device.attachment().range().unwrap();
                barrier.wait();
                for n in 1..=each {
                    let access = |_: &svm::Valid, _: &svm::DeviceGuard<'_>| {
                        let word = std::ptr::with_exposed_provenance_mut::<u64>(word);
                        // SAFETY: the page is the device's to write, and the device lock is held.
                        unsafe { word.write_volatile(word.read_volatile() + 1) };
                    };
                    faults.fetch_add(1, Ordering::Relaxed);
                    range
                        .fault_in(&mapped, first..first + 1, Access::Write, 0, TIMEOUT, access)
                        .unwrap();
                    dev.store(n, Ordering::Relaxed);
                }
            });
            barrier.wait();
            for n in 1..=each {
                words[1].fetch_add(1, Ordering::Relaxed);
                cpu.store(n, Ordering::Relaxed);
                if n % 4 == 0 {
                    std::thread::yield_now();
                }
            }
        });
        assert_eq!(buffer.as_slice()[..2], [each, each]);
        let stats = buffer.stats();
        println!(
            "{delivery:?}: {each} each; {} pages out, {} home, {} waits",
            stats.to_device_pages(),
            stats.to_host_demand_pages,
            stats.waits
        );
        assert_eq!((stats.retries, stats.anomalies), (0, 0));
    }
}

/// Churn on one region, of each kind: what a fault in another has waited for is counted, and it is nothing.
#[test]
fn churn_on_one_region_makes_no_fault_in_another_wait() {
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Churn {
        Mirrors,
        Faults,
        Unmaps,
    }
    const PAGES: usize = 64;
    for delivery in DOORS.into_iter().filter(|_| usable()) {
        for churn in [Churn::Faults, Churn::Mirrors, Churn::Unmaps] {
            let _watchdog = Watchdog::new("churn elsewhere");
            let options = options(delivery);
            let mut quiet = Buffer::<u64>::with_options(PAGES * WORDS, &options).unwrap();
            let (near, far) = (TestDevice::new().unwrap(), TestDevice::new().unwrap());
            let (done, churned) = (AtomicBool::new(false), AtomicUsize::new(0));
            let mut rounds = 0u64;
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut memory = vec![0u64; 256 * WORDS];
                    while !done.load(Ordering::Relaxed) {
                        match churn {
                            Churn::Mirrors | Churn::Faults => {
                                let mut mirror = svm::mirror_with(&mut memory, &options).unwrap();
                                let turns = if churn == Churn::Faults { 50 } else { 1 };
                                for turn in 0..turns {
                                    let view = mirror.view_mut();
                                    let page = 1 + turn % 200;
                                    far.fault_in(
                                        view.region(),
                                        view.addr() + page * PAGE,
                                        PAGE,
                                        Access::Write,
                                    )
                                    .unwrap();
                                    mirror.as_mut_slice()[page * WORDS] += 1;
                                    churned.fetch_add(1, Ordering::Relaxed);
                                }
                                mirror.close().unwrap();
                            }
                            Churn::Unmaps => unmap_once(&far, &options, &churned),
                        }
                    }
                });
                let begun = Instant::now();
                while begun.elapsed() < Duration::from_secs(1) {
                    for page in 0..PAGES {
                        let view = quiet.view_mut();
                        near.write(
                            view.region(),
                            view.addr() + page * PAGE,
                            &rounds.to_ne_bytes(),
                        )
                        .unwrap();
                    }
                    for page in 0..PAGES {
                        assert_eq!(quiet.as_slice()[page * WORDS], rounds);
                    }
                    rounds += 1;
                }
                done.store(true, Ordering::Relaxed);
            });
            let stats = quiet.stats();
            println!(
                "{delivery:?}, {churn:?}: {} faults and {} device faults beside {} of churn; {} waits, {} times the kernel was changing",
                stats.cpu_read_faults,
                stats.device_write_faults,
                churned.into_inner(),
                stats.waits,
                stats.changing_outcomes,
            );
            assert!(rounds > 0 && stats.cpu_read_faults >= rounds);
            // EAGAIN is the kernel's word for a whole userfaultfd, whichever of its ranges is changing.
            assert!(stats.waits <= stats.changing_outcomes);
            if churn != Churn::Unmaps {
                assert_eq!(stats.waits, 0, "{churn:?}");
            }
            assert_eq!((stats.retries, stats.anomalies), (0, 0));
        }
    }
}

/// Mirrors a mapping, has a device take it, and unmaps it under both.
fn unmap_once(device: &TestDevice, options: &Options, count: &AtomicUsize) {
    const PAGES: usize = 16;
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: a fresh mapping.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), PAGES * PAGE, protection, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    // SAFETY: anonymous memory, which nobody touches once it is unmapped.
    let mirror = unsafe { svm::mirror_raw(at.cast(), PAGES * PAGE, options) }.unwrap();
    let view = mirror.view();
    device
        .fault_in(view.region(), view.addr(), PAGES * PAGE, Access::Write)
        .unwrap();
    for page in 0..PAGES {
        // SAFETY: as above.
        unsafe { libc::munmap(at.wrapping_byte_add(page * PAGE), PAGE) };
        count.fetch_add(1, Ordering::Relaxed);
    }
    mirror.close().unwrap();
}
