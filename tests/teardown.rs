//! Mirrors and devices that end while others are busy with them: nothing is lost, nobody hangs, and who comes too late is told.

#![cfg(target_os = "linux")]

use std::ptr;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use svm::{Access, Buffer, Delivery, DeviceFaultKind, ErrorKind, MappedRef, Options};
use tests::idle::{Idle, fault_in};
use tests::mapping::{self, READ_WRITE};
use tests::{TestDevice, Watchdog, usable};

const PAGE: usize = 4096;
const PAGES: usize = 64;

fn both_doors(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::with_timeout(name, Duration::from_secs(30));
    if usable() {
        for delivery in [Delivery::Inline, Delivery::Thread] {
            test(&Options::new().delivery(delivery));
        }
    }
}

/// Page index, from the region's base, of the first page that lies wholly inside the region.
fn first_page(mapped: &MappedRef<Idle>) -> usize {
    let region = mapped.region();
    (region.addr().next_multiple_of(PAGE) - region.base()) / PAGE
}

/// Memory that devices use where it lies has nothing that would have to come home. They are told all the same, and waited for, before
/// its mirror is closed or they are detached: nobody would tell them of a change any more.
#[test]
fn translations_in_place_end_with_the_mirror_and_with_the_device() {
    both_doors("in place", |options| {
        for detach in [false, true] {
            let map = mapping::Map::at_hint(0, 4, READ_WRITE, libc::MAP_SHARED);
            let mirror = map.mirror(options);
            let device = Idle::attach().unwrap();
            device.device().busy.store(21, Ordering::SeqCst);
            let mapped = device.map(mirror.view().region()).unwrap();
            assert!(mapped.region().is_in_place());
            let first = (map.addr - mapped.region().base()) / PAGE;
            let mut range = device.range().unwrap();
            let signals = svm::worker_thread();
            let timeout = Duration::from_secs(3);
            range
                .fault_in(
                    &mapped,
                    first..first + 4,
                    Access::Write,
                    0,
                    timeout,
                    |_, _| {},
                )
                .unwrap();
            drop((signals, range));
            let seen = device.device().seen.clone();
            assert_eq!(seen.told.load(Ordering::SeqCst), 0);
            if detach {
                drop(device);
            }
            let before_close = seen.told.load(Ordering::SeqCst);
            mirror.close().unwrap();
            let (told, asked) = (&seen.told, &seen.asked);
            assert!(told.load(Ordering::SeqCst) >= 4, "it was not told");
            assert!(asked.load(Ordering::SeqCst) > 20, "it was not waited for");
            assert!(
                !detach || before_close >= 4,
                "told by the mirror, not by its own end"
            );
            map.unmap();
        }
    });
}

/// A device thread is between two rounds, or in one, when the mirror is closed. What its last round moved comes home all the
/// same, and the next is told that the mirror is closed.
#[test]
fn a_mirror_closed_under_a_worker_loses_nothing() {
    both_doors("close", |options| {
        let device = Idle::attach().unwrap();
        let (end, mut delay) = (Instant::now() + Duration::from_millis(1500), 0);
        while Instant::now() < end {
            let mut bytes = vec![7u8; PAGES * PAGE];
            let mirror = svm::mirror_with(&mut bytes, options).unwrap();
            let mapped = device.map(mirror.view().region()).unwrap();
            let mut range = device.range().unwrap();
            let first = first_page(&mapped);
            let (begun, mapped) = (AtomicBool::new(false), &mapped);
            std::thread::scope(|scope| {
                let worker = scope.spawn(|| {
                    let _worker = svm::worker_thread();
                    begun.store(true, Ordering::SeqCst);
                    (0..).step_by(16).find_map(|n| {
                        let page = first + n % (PAGES - 4);
                        fault_in(&mut range, mapped, page..page + 1, Access::Write).err()
                    })
                });
                while !begun.load(Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
                (0..delay).for_each(|_| std::hint::spin_loop());
                delay = (delay + 37) % 3000;
                mirror.close().unwrap();
                assert_eq!(
                    worker.join().unwrap().unwrap().kind,
                    DeviceFaultKind::Closed
                );
            });
            assert_eq!(
                bytes.iter().filter(|&&b| b != 7).count(),
                0,
                "bytes lost by a close that said Ok"
            );
        }
        assert_eq!(device.resident_bytes(), 0);
    });
}

/// A driver's thread keeps its [`svm::Range`] when the device has been detached: no page goes to a device that is no more.
#[test]
fn a_range_that_outlives_its_attachment_is_told() {
    both_doors("detach", |options| {
        let mut bytes = vec![7u8; PAGES * PAGE];
        let device = Idle::attach().unwrap();
        let mut mirror = svm::mirror_with(&mut bytes, options).unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let mut range = device.range().unwrap();
        let page = first_page(&mapped);
        // Also one that has been used before.
        fault_in(&mut range, &mapped, page + 20..page + 21, Access::Write).unwrap();
        drop(device);
        for access in [Access::Read, Access::Write] {
            let fault = fault_in(&mut range, &mapped, page..page + 1, access).unwrap_err();
            assert_eq!(fault.kind, DeviceFaultKind::Closed);
            let mut update = range
                .start_update(&mapped, page..page + 1, Duration::from_secs(1))
                .unwrap();
            assert_eq!(
                update.fault(access).unwrap_err().kind,
                DeviceFaultKind::Closed
            );
        }
        assert!(mirror.as_slice().iter().all(|&b| b == 7));
        mirror.as_mut_slice()[5 * PAGE] = 8;
        mirror.close().unwrap();
        assert_eq!(
            bytes.iter().filter(|&&b| b != 7).count(),
            1,
            "bytes lost by a close that said Ok"
        );
    });
}

/// Detaching against a worker that goes on faulting.
#[test]
fn a_device_detached_under_a_worker_loses_nothing() {
    both_doors("detach under a worker", |options| {
        let end = Instant::now() + Duration::from_millis(800);
        let mut buffer = Buffer::<u8>::with_options(PAGES * PAGE, options).unwrap();
        buffer.as_mut_slice().fill(7);
        let mut delay = 0;
        while Instant::now() < end {
            let device = Idle::attach().unwrap();
            let mapped = device.map(buffer.view().region()).unwrap();
            let mut range = device.range().unwrap();
            let (first, mapped, begun) = (first_page(&mapped), &mapped, AtomicBool::new(false));
            std::thread::scope(|scope| {
                let worker = scope.spawn(|| {
                    let _worker = svm::worker_thread();
                    begun.store(true, Ordering::SeqCst);
                    (0..).step_by(16).find_map(|n| {
                        let page = first + n % (PAGES - 4);
                        fault_in(&mut range, mapped, page..page + 1, Access::Write).err()
                    })
                });
                while !begun.load(Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
                (0..delay).for_each(|_| std::hint::spin_loop());
                delay = (delay + 37) % 3000;
                drop(device);
                assert_eq!(
                    worker.join().unwrap().unwrap().kind,
                    DeviceFaultKind::Closed
                );
            });
            assert!(buffer.as_slice().iter().all(|&b| b == 7));
        }
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

/// An anonymous mapping.
#[derive(Clone, Copy)]
struct Map {
    addr: usize,
    pages: usize,
}

impl Map {
    fn new(pages: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                pages * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        Self {
            addr: at.expose_provenance(),
            pages,
        }
    }

    fn word(&self, page: usize) -> &AtomicU64 {
        assert!(page < self.pages);
        // SAFETY: inside a mapping that the test unmaps last; all accesses to it are atomic.
        unsafe { AtomicU64::from_ptr(ptr::with_exposed_provenance_mut(self.addr + page * PAGE)) }
    }

    fn mirror(&self, options: &Options) -> svm::Mirror<'static, u8> {
        // SAFETY: anonymous read-write memory, accessed by atomics only.
        unsafe {
            svm::mirror_raw(
                ptr::with_exposed_provenance_mut(self.addr),
                self.pages * PAGE,
                options,
            )
        }
        .unwrap()
    }

    fn discard(&self) {
        let at = ptr::with_exposed_provenance_mut(self.addr);
        // SAFETY: the test's own mapping.
        let outcome = unsafe { libc::madvise(at, self.pages * PAGE, libc::MADV_DONTNEED) };
        assert_eq!(outcome, 0);
    }

    fn unmap(self) {
        // SAFETY: the test's own mapping, which nobody uses any more.
        let outcome = unsafe {
            libc::munmap(
                ptr::with_exposed_provenance_mut(self.addr),
                self.pages * PAGE,
            )
        };
        assert_eq!(outcome, 0);
    }
}

/// Threads that fault on a mirror when it ends find memory: before, then, and after.
#[test]
fn a_mirror_closed_under_cpu_faults_stays_memory() {
    both_doors("close under faults", |options| {
        let (map, stop) = (Map::new(PAGES), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for page in 0..PAGES {
                        map.word(page).fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            let end = Instant::now() + Duration::from_millis(1000);
            while Instant::now() < end {
                map.discard();
                map.mirror(options).close().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        map.unmap();
    });
}

/// As before, and the pages are with a device: each increment survives, wherever it finds the page.
#[test]
fn a_mirror_closed_under_cpu_faults_on_device_pages_loses_no_write() {
    both_doors("close under device faults", |options| {
        let (map, stop) = (Map::new(PAGES), AtomicBool::new(false));
        let device = Idle::attach().unwrap();
        let rounds = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut rounds = 0;
                while !stop.load(Ordering::Relaxed) {
                    for page in 0..PAGES {
                        map.word(page).fetch_add(1, Ordering::Relaxed);
                    }
                    rounds += 1;
                }
                rounds
            });
            let end = Instant::now() + Duration::from_millis(1000);
            let mut range = device.range().unwrap();
            while Instant::now() < end {
                let mirror = map.mirror(options);
                let mapped = device.map(mirror.view().region()).unwrap();
                let first = first_page(&mapped);
                for page in (first..first + PAGES).step_by(16) {
                    // The writer may hold it for a while.
                    let (last, _) = (page + 1, mirror.stats());
                    let _ = range.fault_in(
                        &mapped,
                        page..last,
                        Access::Write,
                        0,
                        Duration::from_millis(20),
                        |_, _| {},
                    );
                }
                range.park();
                drop(mapped);
                mirror.close().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            writer.join().unwrap()
        });
        for page in 0..PAGES {
            assert_eq!(
                map.word(page).load(Ordering::Relaxed),
                rounds,
                "page {page}"
            );
        }
        map.unmap();
    });
}

/// A second device maps a region, by another device's mapping of it, while its mirror is closed: in time or refused, and
/// refused for good afterwards.
#[test]
fn mapping_a_mirror_that_is_being_closed_is_refused_or_in_time() {
    both_doors("map and close", |options| {
        let (first, second) = (Idle::attach().unwrap(), Idle::attach().unwrap());
        let mut bytes = vec![7u8; PAGES * PAGE];
        let end = Instant::now() + Duration::from_millis(1000);
        let (mut in_time, mut refused, mut delay) = (0, 0, 0u32);
        while Instant::now() < end {
            let mirror = svm::mirror_with(&mut bytes, options).unwrap();
            let known = first.map(mirror.view().region()).unwrap();
            let barrier = Barrier::new(2);
            std::thread::scope(|scope| {
                let mapper = scope.spawn(|| {
                    let _worker = svm::worker_thread();
                    barrier.wait();
                    let mapped = second.map(known.region())?;
                    let mut range = second.range()?;
                    let page = first_page(&mapped);
                    let fault = (0..).find_map(|_| {
                        fault_in(&mut range, &mapped, page..page + 1, Access::Write).err()
                    });
                    assert_eq!(fault.unwrap().kind, DeviceFaultKind::Closed);
                    Ok::<_, svm::Error>(())
                });
                barrier.wait();
                delay = (delay + 997) % 60_000;
                (0..delay).for_each(|_| std::hint::spin_loop());
                mirror.close().unwrap();
                match mapper.join().unwrap() {
                    Ok(()) => in_time += 1,
                    Err(_) => refused += 1,
                }
            });
            assert!(
                second.map(known.region()).is_err(),
                "a closed mirror was mapped"
            );
            assert_eq!((first.resident_bytes(), second.resident_bytes()), (0, 0));
            assert!(bytes.iter().all(|&b| b == 7));
        }
        assert!(in_time + refused > 0);
        // Both go on.
        let mut mirror = svm::mirror_with(&mut bytes, options).unwrap();
        let device = TestDevice::new().unwrap();
        let view = mirror.view_mut();
        device.write(view.region(), view.addr(), &[9]).unwrap();
        mirror.close().unwrap();
        assert_eq!(bytes[0], 9);
    });
}

/// A mirror ends while other threads fork. What is the application's alone again is inherited by children like any memory.
#[test]
fn memory_of_a_mirror_closed_beside_a_fork_is_inherited() {
    both_doors("close beside a fork", |options| {
        let map = Map::new(4);
        let stop = AtomicBool::new(false);
        let in_child = |child: &dyn Fn() -> i32| {
            // SAFETY: the child calls only what is async-signal-safe.
            let pid = unsafe { libc::fork() };
            if pid == 0 {
                let status = child();
                // SAFETY: ends the child.
                unsafe { libc::_exit(status) }
            }
            let mut status = 0;
            // SAFETY: waits for the child just made.
            let outcome = unsafe { libc::waitpid(pid, &raw mut status, 0) };
            assert_eq!(outcome, pid);
            status
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(in_child(&|| 0), 0);
                }
            });
            let end = Instant::now() + Duration::from_millis(1500);
            let mut status = 0;
            while status == 0 && Instant::now() < end {
                map.word(1).store(5, Ordering::Relaxed);
                map.mirror(options).close().unwrap();
                status = in_child(&|| i32::from(map.word(1).load(Ordering::Relaxed) != 5));
            }
            stop.store(true, Ordering::Relaxed);
            assert_eq!(status, 0, "the child has no such memory");
        });
        map.unmap();
    });
}

/// Devices pause while an event is read. One whose only mirror comes or goes meanwhile is resumed as often as it was paused.
#[test]
fn a_device_whose_mirror_goes_during_an_event_is_not_left_paused() {
    let _watchdog = Watchdog::with_timeout("paused", Duration::from_secs(20));
    if !usable() {
        return;
    }
    let (noisy, stop) = (Map::new(1), AtomicBool::new(false));
    let mirror = noisy.mirror(&Options::new());
    let device = Idle::attach().unwrap();
    let noise = std::thread::scope(|scope| {
        let noise = scope.spawn(|| {
            (0..)
                .take_while(|_| !stop.load(Ordering::Relaxed))
                .inspect(|_| noisy.discard())
                .count()
        });
        let mut bytes = vec![0u8; PAGES * PAGE];
        let end = Instant::now() + Duration::from_millis(1500);
        while Instant::now() < end {
            let mirror = svm::mirror(&mut bytes).unwrap();
            drop(device.map(mirror.view().region()).unwrap());
            mirror.close().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        noise.join().unwrap()
    });
    assert!(noise > 100, "no events: {noise}");
    mirror.close().unwrap();
    assert_eq!(
        device.device().pauses.load(Ordering::SeqCst),
        0,
        "pauses without a resumption, or the reverse"
    );
    noisy.unmap();
}

#[test]
fn a_snapshot_of_more_pages_than_there_is_memory_for_is_a_typed_error() {
    let refused = svm::snapshot(PAGE, 1 << 50).unwrap_err();
    assert!(
        matches!(refused.kind(), ErrorKind::OutOfMemory),
        "{refused}"
    );
}
