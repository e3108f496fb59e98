//! Forward progress (protocol.md section 5): who wants a page gets it, in a bounded number of rounds, whatever others do; and who
//! wants another page does not even wait.
//!
//! `cargo test -p tests --test progress -- --nocapture` prints what was counted.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use svm::{
    Access, AttachOptions, Attachment, Buffer, Delivery, Device, DeviceFault, DeviceFaultKind,
    DeviceGuard, Granule, MappedRef, Options, Range, Valid,
};
use tests::idle::fault_in;
use tests::{Dummy, Idle, TestDevice, Watchdog, usable};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
const DOORS: [Delivery; 2] = [Delivery::Inline, Delivery::Thread];
const TIMEOUT: Duration = Duration::from_secs(10);

/// One test at a time: while the kernel discards pages of one of them, those of every other get EAGAIN, and wait.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options(delivery: Delivery) -> Options {
    Options::new().delivery(delivery).granule(Granule::Page)
}

/// A device's worker that adds to the first word of one page, each time by a fault of its own.
struct Worker<'d> {
    device: &'d TestDevice,
    mapped: MappedRef<Dummy>,
    range: Range<Dummy>,
    page: usize,
    word: *mut u64,
}

// SAFETY: the word is the device's, and is touched under its lock alone.
unsafe impl Send for Worker<'_> {}

impl<'d> Worker<'d> {
    fn new(device: &'d TestDevice, buffer: &Buffer<u64>) -> Self {
        let mapped = device.attachment().map(buffer.view().region()).unwrap();
        let addr = buffer.view().addr();
        Self {
            device,
            range: device.attachment().range().unwrap(),
            page: (addr - mapped.region().base()) / PAGE,
            word: ptr::with_exposed_provenance_mut(addr.wrapping_add_signed(mapped.offset())),
            mapped,
        }
    }

    fn add(word: *mut u64) {
        // SAFETY: the page was just found valid for writing, and the device lock, which is held, keeps it so.
        let word = unsafe { &mut *word };
        *word += 1;
    }

    /// Adds by `fault_in`, whose token and commit are inside the block's round. Says how often it was handed the page.
    fn add_in_a_round(&mut self) -> u64 {
        let (handed, outcome) = self.try_to_add(TIMEOUT);
        outcome.unwrap();
        handed
    }

    /// The same, which may fail.
    fn try_to_add(&mut self, timeout: Duration) -> (u64, Result<(), DeviceFault>) {
        let (pages, word, mut handed) = (self.page..self.page + 1, self.word, 0);
        let access = |_: &Valid, _: &DeviceGuard<'_>| {
            handed += 1;
            Self::add(word);
        };
        let outcome = self
            .range
            .fault_in(&self.mapped, pages, Access::Write, 0, timeout, access);
        (handed, outcome)
    }

    /// Adds by a driver's own loop. Says how many rounds it took.
    fn add_in_updates(&mut self) -> u64 {
        for rounds in 1.. {
            let pages = self.page..self.page + 1;
            let mut update = self
                .range
                .start_update(&self.mapped, pages, TIMEOUT)
                .unwrap();
            update.fault(Access::Write).unwrap();
            let guard = self.device.attachment().device().lock().lock();
            if update.end_update(&guard).is_ok() {
                Self::add(self.word);
                return rounds;
            }
        }
        unreachable!("there are more numbers than that")
    }
}

/// The first two words, for the CPU.
fn words(buffer: &mut Buffer<u64>) -> [&AtomicU64; 2] {
    let at = buffer.as_mut_slice().as_mut_ptr();
    // SAFETY: the buffer's first two words, and it is borrowed for as long; whoever shares them uses them as atomics.
    let words: &[AtomicU64; 2] = unsafe { &*at.cast() };
    words.each_ref()
}

/// Has `work` done beside a CPU that writes to the same page all the time. Says how often that did.
fn beside_a_storm(word: &AtomicU64, work: impl FnOnce()) -> u64 {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let storm = scope.spawn(|| {
            let mut writes = 0;
            while !done.load(Ordering::Relaxed) {
                word.fetch_add(1, Ordering::Relaxed);
                writes += 1;
            }
            writes
        });
        let _worker = svm::worker_thread();
        work();
        done.store(true, Ordering::Relaxed);
        storm.join().unwrap()
    })
}

/// A round takes its token and commits under the block's lock, under which every change of ours starts its bracket: one round an
/// access, however hard the CPU wants the page.
#[test]
fn a_storm_on_its_page_interrupts_no_fault_of_a_round() {
    let _alone = alone();
    const ACCESSES: u64 = 3000;
    for delivery in DOORS.into_iter().filter(|_| usable()) {
        let _watchdog = Watchdog::with_timeout("storm, rounds", Duration::from_secs(100));
        let mut buffer = Buffer::<u64>::with_options(WORDS, &options(delivery)).unwrap();
        let device = TestDevice::new().unwrap();
        let mut worker = Worker::new(&device, &buffer);
        let mut handed = 0;
        let writes = beside_a_storm(words(&mut buffer)[1], || {
            handed = (0..ACCESSES).map(|_| worker.add_in_a_round()).sum();
        });
        let stats = buffer.stats();
        println!(
            "{delivery:?}: {ACCESSES} accesses beside {writes} writes: {handed} commits, {} retries, {} waits",
            stats.retries, stats.waits
        );
        assert_eq!((handed, stats.retries), (ACCESSES, 0));
        assert_eq!(buffer.as_slice()[..2], [ACCESSES, writes]);
        assert_eq!(stats.anomalies, 0);
    }
}

/// A driver's own loop holds nothing between its steps, so a storm interrupts it. After eight times it is granted the page for a while,
/// longer each time: twice as many rounds are plenty.
#[test]
fn a_storm_on_its_page_does_not_starve_a_drivers_loop() {
    let _alone = alone();
    const ACCESSES: u64 = 1000;
    const MOST_ROUNDS: u64 = 16;
    for delivery in DOORS.into_iter().filter(|_| usable()) {
        let _watchdog = Watchdog::with_timeout("storm, updates", Duration::from_secs(100));
        let mut buffer = Buffer::<u64>::with_options(WORDS, &options(delivery)).unwrap();
        let device = TestDevice::new().unwrap();
        let mut worker = Worker::new(&device, &buffer);
        let (mut most, mut all) = (0, 0);
        let writes = beside_a_storm(words(&mut buffer)[1], || {
            for _ in 0..ACCESSES {
                let rounds = worker.add_in_updates();
                most = most.max(rounds);
                all += rounds;
            }
        });
        let stats = buffer.stats();
        println!(
            "{delivery:?}: {ACCESSES} accesses beside {writes} writes: {all} rounds, {most} at most for one",
        );
        assert!(most <= MOST_ROUNDS, "{most} rounds for one access");
        assert_eq!(stats.retries, all - ACCESSES);
        assert_eq!(buffer.as_slice()[..2], [ACCESSES, writes]);
        assert_eq!(stats.anomalies, 0);
    }
}

/// The storm is the kernel's: the page is discarded all the time, and no lease keeps that out. Each fault ends, by one commit or by a
/// typed timeout, and never by both.
///
/// That it ends by a commit is not asserted, for it is not so: with more to do than processors the reader has closed the gate for the
/// next event before a thread that was woken for the last one has run, and a fault can sleep before the gate until its deadline.
#[test]
fn a_fault_beside_a_storm_of_discards_ends_by_a_commit_or_a_timeout() {
    let _alone = alone();
    const ACCESSES: u64 = 300;
    const ENOUGH: Duration = Duration::from_secs(10);
    const PATIENCE: Duration = Duration::from_secs(2);
    for delivery in DOORS.into_iter().filter(|_| usable()) {
        let _watchdog = Watchdog::with_timeout("discards", Duration::from_secs(100));
        let mut buffer = Buffer::<u64>::with_options(WORDS, &options(delivery)).unwrap();
        let device = TestDevice::new().unwrap();
        let mut worker = Worker::new(&device, &buffer);
        let page = words(&mut buffer)[0].as_ptr().expose_provenance();
        let done = AtomicBool::new(false);
        let (mut commits, mut timeouts, mut handed) = (0u64, 0u64, 0u64);
        let mut failed = None;
        let discards = std::thread::scope(|scope| {
            let storm = scope.spawn(|| {
                let mut discards = 0u64;
                while !done.load(Ordering::Relaxed) {
                    let page = ptr::with_exposed_provenance_mut(page);
                    // SAFETY: the buffer's own page, which only the device uses, and counts on nothing there.
                    let outcome = unsafe { libc::madvise(page, PAGE, libc::MADV_DONTNEED) };
                    assert_eq!(outcome, 0);
                    discards += 1;
                }
                discards
            });
            let _worker = svm::worker_thread();
            let begun = Instant::now();
            // Nothing panics in here: the storm would go on for ever.
            while commits + timeouts < ACCESSES && begun.elapsed() < ENOUGH && failed.is_none() {
                let (now, outcome) = worker.try_to_add(PATIENCE);
                handed += now;
                match outcome {
                    Ok(()) => commits += 1,
                    Err(fault) if fault.kind == DeviceFaultKind::Timeout => timeouts += 1,
                    Err(fault) => failed = Some(fault),
                }
            }
            done.store(true, Ordering::Relaxed);
            storm.join().unwrap()
        });
        let stats = buffer.stats();
        println!(
            "{delivery:?}: {commits} commits and {timeouts} timeouts beside {discards} discards; {} retries, {} waits",
            stats.retries, stats.waits
        );
        assert_eq!(failed, None);
        assert!(commits + timeouts > 0);
        assert_eq!((handed, stats.retries), (commits, 0));
        // The storm over, the next fault gets through.
        assert_eq!(worker.add_in_a_round(), 1);
        assert_eq!(stats.anomalies, 0);
    }
}

/// One page, back and forth, in strict turns: each turn is one page each way, and none is lost.
#[test]
fn cpu_and_device_play_ping_pong() {
    let _alone = alone();
    for (delivery, turns) in [(Delivery::Inline, 100_000u64), (Delivery::Thread, 10_000)] {
        if !usable() {
            return;
        }
        let _watchdog = Watchdog::with_timeout("ping-pong", Duration::from_secs(120));
        let mut buffer = Buffer::<u64>::with_options(WORDS, &options(delivery)).unwrap();
        let device = TestDevice::new().unwrap();
        let mut worker = Worker::new(&device, &buffer);
        let word = words(&mut buffer)[0];
        // Whose turn it is: not in the page, so that looking moves nothing. Even: the device's.
        let turn = AtomicU64::new(0);
        let begun = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _worker = svm::worker_thread();
                for n in 0..turns {
                    wait_for(&turn, 2 * n);
                    worker.add_in_a_round();
                    turn.store(2 * n + 1, Ordering::Release);
                }
            });
            for n in 0..turns {
                wait_for(&turn, 2 * n + 1);
                word.fetch_add(1, Ordering::Relaxed);
                turn.store(2 * n + 2, Ordering::Release);
            }
        });
        let took = begun.elapsed();
        let stats = buffer.stats();
        println!(
            "{delivery:?}: {turns} turns in {took:.1?}, {:.1} us each; {} waits",
            took.as_secs_f64() * 1e6 / turns as f64,
            stats.waits
        );
        assert_eq!(buffer.as_slice()[0], 2 * turns);
        assert_eq!(stats.device_write_faults, turns);
        assert_eq!(stats.to_device_pages(), turns);
        assert_eq!(stats.to_host_demand_pages, turns);
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

/// The same page, no turns: each side takes it when it can, and both get all their work done, the device in one round each time and
/// the CPU in as many faults as there were pages to fetch.
#[test]
fn neither_side_starves_where_both_want_a_page() {
    let _alone = alone();
    for (delivery, each) in [(Delivery::Inline, 20_000u64), (Delivery::Thread, 5_000)] {
        if !usable() {
            return;
        }
        let _watchdog = Watchdog::with_timeout("free for all", Duration::from_secs(120));
        let mut buffer = Buffer::<u64>::with_options(WORDS, &options(delivery)).unwrap();
        let device = TestDevice::new().unwrap();
        let mut worker = Worker::new(&device, &buffer);
        let word = words(&mut buffer)[1];
        let barrier = Barrier::new(2);
        let mut handed = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _worker = svm::worker_thread();
                barrier.wait();
                handed = (0..each).map(|_| worker.add_in_a_round()).sum();
            });
            barrier.wait();
            for n in 0..each {
                word.fetch_add(1, Ordering::Relaxed);
                if n % 4 == 0 {
                    std::thread::yield_now();
                }
            }
        });
        let stats = buffer.stats();
        println!(
            "{delivery:?}: {each} each; {} pages out, {} home, {} waits",
            stats.to_device_pages(),
            stats.to_host_demand_pages,
            stats.waits
        );
        assert_eq!(buffer.as_slice()[..2], [each, each]);
        assert_eq!((handed, stats.device_write_faults), (each, each));
        assert!(stats.cpu_write_faults <= stats.to_device_pages());
        assert_eq!((stats.retries, stats.anomalies), (0, 0));
    }
}

/// Churn on one region, of each kind: what a fault in another has waited for is counted, and of ours it is nothing.
///
/// Of the kernel's it is something where memory is unmapped: until the unmapping thread has run again, ioctls on the whole userfaultfd
/// say EAGAIN (`ARCHITECTURE.md`, failure), whichever of its ranges they are for. These are counted too, and are all there is.
#[test]
fn churn_on_one_region_makes_no_fault_in_another_wait() {
    let _alone = alone();
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

/// A device of so many pages of memory, and a buffer on it.
fn small_device(memory: usize, pages: usize) -> (Attachment<Idle>, Buffer<u64>) {
    let options = Options::new().granule(Granule::Page);
    let buffer = Buffer::<u64>::with_options(pages * WORDS, &options).unwrap();
    let attach = AttachOptions::new().memory_bytes(memory * PAGE);
    (svm::attach(Idle::default(), attach).unwrap(), buffer)
}

/// The page indices of the buffer.
fn pages_of(mapped: &MappedRef<Idle>, buffer: &Buffer<u64>) -> std::ops::Range<usize> {
    let first = (buffer.view().addr() - mapped.region().base()) / PAGE;
    first..first + buffer.len() / WORDS
}

/// A deadline starts anew with each progress (protocol.md section 5): with no time at all, an update over several blocks gets all its
/// work done, since each of its steps is progress, evictions and refused allocations among them.
#[test]
fn an_update_that_gets_on_does_not_time_out() {
    let _alone = alone();
    if !usable() {
        return;
    }
    let _watchdog = Watchdog::new("patience");
    const PAGES: usize = 2 * 512;
    for migrates in [false, true] {
        let (device, buffer) = small_device(PAGES, PAGES + 512);
        let (_worker, mut range) = (svm::worker_thread(), device.range().unwrap());
        // What is in the way first: device memory full of other pages.
        let other = Buffer::<u64>::zeroed(PAGES * WORDS).unwrap();
        let full = device.map(other.view().region()).unwrap();
        for page in pages_of(&full, &other) {
            fault_in(&mut range, &full, page..page + 1, Access::Write).unwrap();
        }
        assert_eq!(device.resident_bytes(), PAGES * PAGE);
        let mapped = device.map(buffer.view().region()).unwrap();
        // A few on either side of a border of blocks.
        let border = pages_of(&mapped, &buffer).start.next_multiple_of(512) + 512;
        let pages = border - 8..border + 8;
        device.fail_next_allocations(1);
        let mut update = range
            .start_update(&mapped, pages.clone(), Duration::ZERO)
            .unwrap();
        let outcome = if migrates {
            update.migrate()
        } else {
            update.fault(Access::Write)
        };
        outcome.unwrap();
        let guard = device.device().device_lock().lock();
        let committed = update.end_update(&guard).unwrap();
        let valid: usize = committed.iter().map(|v| v.writable().count()).sum();
        assert_eq!(valid, pages.len());
        assert!(device.stats().evicted_pages > 0);
    }
}

/// The same of the loop that commits inside its rounds: an allocation is refused, and the pages come one by one.
#[test]
fn a_fault_that_gets_on_does_not_time_out() {
    let _alone = alone();
    if !usable() {
        return;
    }
    let _watchdog = Watchdog::new("patience of a round");
    const PAGES: usize = 8;
    let (device, buffer) = small_device(PAGES, PAGES);
    let (_worker, mut range) = (svm::worker_thread(), device.range().unwrap());
    let mapped = device.map(buffer.view().region()).unwrap();
    let pages = pages_of(&mapped, &buffer);
    let mut handed = Vec::new();
    device.fail_next_allocations(1);
    range
        .fault_in(&mapped, pages, Access::Write, 0, Duration::ZERO, |v, _| {
            handed.push(v.writable().count());
        })
        .unwrap();
    assert_eq!(handed, [1; PAGES]);
}

/// The whole loop over many blocks: each in order, all of the pages in the end, though the device has no room for all of them at once;
/// an update, which is to have them at once, is told so.
#[test]
fn a_fault_over_many_blocks_is_served_block_by_block() {
    let _alone = alone();
    if !usable() {
        return;
    }
    let _watchdog = Watchdog::new("many blocks");
    const PAGES: usize = 3 * 512 + 100;
    let (device, buffer) = small_device(600, PAGES);
    let (_worker, mut range) = (svm::worker_thread(), device.range().unwrap());
    let mapped = device.map(buffer.view().region()).unwrap();
    let pages = pages_of(&mapped, &buffer);
    let mut handed = Vec::new();
    let blocks = pages.start / 512..pages.end.div_ceil(512);
    assert!(blocks.len() > 3);
    range
        .fault_in(&mapped, pages.clone(), Access::Write, 0, TIMEOUT, |v, _| {
            handed.extend(v.writable().runs().flatten().map(|p| v.block() * 512 + p));
        })
        .unwrap();
    assert!(handed.iter().copied().eq(pages.clone()));
    assert_eq!(buffer.stats().device_write_faults, blocks.len() as u64);
    let mut update = range.start_update(&mapped, pages.clone(), TIMEOUT).unwrap();
    let refused = update.fault(Access::Write).unwrap_err();
    assert_eq!(refused.kind, DeviceFaultKind::OutOfMemory);
    // Nothing of a range that is not all the region's; nothing to do for none.
    let mut never = |_: &Valid, _: &DeviceGuard<'_>| panic!("handed out");
    let beyond = pages.start..blocks.end * 512 + 1;
    let refused = range
        .fault_in(&mapped, beyond, Access::Write, 0, TIMEOUT, &mut never)
        .unwrap_err();
    assert_eq!(refused.kind, DeviceFaultKind::OutOfViews);
    range
        .fault_in(&mapped, 0..0, Access::Write, 0, TIMEOUT, &mut never)
        .unwrap();
}
