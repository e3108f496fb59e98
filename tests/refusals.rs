//! What the kernel refuses, what a hanging kernel holds up, and what the runtime itself refuses: never silently, never for ever,
//! and never more than it has to.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]
#![cfg(target_os = "linux")]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use svm::{
    Access, AttachOptions, Buffer, Delivery, DeviceFaultKind, ErrorKind, Granule, MappedRef,
    Options,
};
use tests::idle::{Idle, TIMEOUT, fault_in};
use tests::{TestDevice, Watchdog, usable};

const PAGE: usize = 4096;
const PAGES: usize = 64;
const BLOCK: usize = 512;

fn both_doors(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::with_timeout(name, Duration::from_secs(30));
    if usable() {
        for delivery in [Delivery::Inline, Delivery::Thread] {
            test(&Options::new().delivery(delivery));
        }
    }
}

/// [`both_doors`] for tests that mostly wait: both at once.
fn both_doors_at_once(name: &'static str, test: impl Fn(&Options) + Sync) {
    let _watchdog = Watchdog::with_timeout(name, Duration::from_secs(30));
    if usable() {
        std::thread::scope(|scope| {
            for delivery in [Delivery::Inline, Delivery::Thread] {
                let test = &test;
                scope.spawn(move || test(&Options::new().delivery(delivery)));
            }
        });
    }
}

fn page_of(mapped: &MappedRef<Idle>, addr: usize) -> usize {
    (addr - mapped.region().base()) / PAGE
}

fn map_pages(pages: usize) -> *mut u8 {
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
    at.cast()
}

fn mirror(at: *mut u8, pages: usize, options: &Options) -> svm::Mirror<'static, u8> {
    // SAFETY: `at` is a mapping of the test's, of as many pages.
    unsafe { svm::mirror_raw(at, pages * PAGE, options) }.unwrap()
}

/// Runs `body` in a process of its own, where the environment makes the kernel lack something.
fn without(test: &str, lacking: impl AsRef<OsStr>, body: fn()) {
    const MARK: &str = "SVM_TEST_REFUSALS_CHILD";
    if std::env::var_os(MARK).is_some() {
        return body();
    }
    let itself = std::env::current_exe().unwrap();
    let mut command = Command::new(itself);
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(MARK, "1")
        .env("SVM_DISABLE", &lacking);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let said = format!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{test} without {:?}: {}\n{said}",
        lacking.as_ref(),
        output.status
    );
}

/// Where there is no MOVE a page is copied and the CPU's is discarded, which the kernel refuses for locked memory. The page is
/// then served in place: CPU and device see one memory.
#[test]
fn locked_memory_without_move_is_served_in_place() {
    without(
        "locked_memory_without_move_is_served_in_place",
        "move",
        || {
            both_doors("mlock", |options| {
                let at = map_pages(PAGES);
                // SAFETY: the test's own mapping.
                unsafe { at.write_bytes(7, PAGES * PAGE) };
                // SAFETY: the same.
                if unsafe { libc::mlock(at.cast(), PAGES * PAGE) } != 0 {
                    tests::skip(format_args!("mlock: {}", std::io::Error::last_os_error()));
                    return;
                }
                let mirror = mirror(at, PAGES, options);
                let device = Idle::attach().unwrap();
                let mapped = device.map(mirror.view().region()).unwrap();
                let page = page_of(&mapped, at.addr());
                let mut range = device.range().unwrap();
                let mut valid = None;
                let install = |v: &svm::Valid, _: &svm::DeviceGuard<'_>| {
                    let page = page % BLOCK;
                    valid = Some((v.writable().contains(page), v.in_place().contains(page)));
                };
                range
                    .fault_in(&mapped, page..page + 1, Access::Write, 0, TIMEOUT, install)
                    .unwrap();
                assert_eq!(valid, Some((true, true)), "writable, in place");
                // SAFETY: the page is there for both, and nobody else uses it.
                unsafe { at.write_volatile(42) };
                // SAFETY: as above.
                let outcome = unsafe { at.read_volatile() };
                assert_eq!(outcome, 42);
                mirror.close().unwrap();
                // SAFETY: as above.
                let outcome = unsafe { at.add(PAGE).read_volatile() };
                assert_eq!(outcome, 7);
                // SAFETY: the mapping is the test's, and nobody uses it any more.
                let outcome = unsafe { libc::munmap(at.cast(), PAGES * PAGE) };
                assert_eq!(outcome, 0);
            });
        },
    );
}

/// Advice alone makes a border between two mappings, which one MOVE must not cross: pages on both sides go to the device, by
/// runs.
#[test]
fn pages_beside_a_border_of_advice_migrate() {
    both_doors("border", |options| {
        let at = map_pages(PAGES);
        // SAFETY: the test's own mapping.
        unsafe { at.write_bytes(7, PAGES * PAGE) };
        // SAFETY: part of the test's own mapping.
        let advised = unsafe {
            libc::madvise(
                at.add(24 * PAGE).cast(),
                (PAGES - 24) * PAGE,
                libc::MADV_DONTDUMP,
            )
        };
        assert_eq!(advised, 0);
        let mirror = mirror(at, PAGES, &options.clone().granule(Granule::Huge));
        let device = Idle::attach().unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let first = page_of(&mapped, at.addr());
        let mut range = device.range().unwrap();
        let mut at_page = first;
        while at_page < first + PAGES {
            let end = (first + PAGES).min((at_page / BLOCK + 1) * BLOCK);
            fault_in(&mut range, &mapped, at_page..end, Access::Write).unwrap();
            at_page = end;
        }
        let out = mirror.stats();
        assert_eq!(
            (out.in_place_pages, out.to_device_pages()),
            (0, PAGES as u64),
            "{out:?}"
        );
        // A call for each side, one that found the border, and the same where a block ends.
        assert!(out.move_calls <= 6, "{out:?}");
        assert_eq!(device.resident_bytes(), PAGES * PAGE);
        mirror.close().unwrap();
        // SAFETY: the test's own mapping; nobody writes it.
        assert!((0..PAGES * PAGE).all(|i| unsafe { at.add(i).read_volatile() } == 7));
        // SAFETY: the mapping is the test's, and nobody uses it any more.
        let outcome = unsafe { libc::munmap(at.cast(), PAGES * PAGE) };
        assert_eq!(outcome, 0);
    });
}

/// An input that is the mirror's own slice, edges and all, is the mirror: its pages may be with a device.
#[test]
fn an_input_made_of_a_mirrors_own_slice_is_that_mirror() {
    both_doors("input of a mirror", |options| {
        let mut bytes = vec![7u8; PAGES * PAGE + 100];
        for (start, end) in [(0, PAGES * PAGE), (13, PAGES * PAGE + 13), (0, 50)] {
            let mirror = svm::mirror_with(&mut bytes[start..end], options).unwrap();
            let device = TestDevice::new().unwrap();
            let view = mirror.view();
            if end - start > PAGE {
                device
                    .fault_in(view.region(), view.addr(), view.len(), Access::Write)
                    .unwrap();
            }
            for part in [mirror.as_slice(), &mirror.as_slice()[10..40]] {
                let input = svm::mirror_ref_with(part, options).unwrap();
                if end - start > PAGE {
                    assert_eq!(input.view().region().id(), view.region().id());
                }
                let mut out = vec![0; part.len()];
                device
                    .read(input.view().region(), input.view().addr(), &mut out)
                    .unwrap();
                assert!(out.iter().all(|&b| b == 7), "{start}..{end}");
                input.close().unwrap();
            }
            mirror.close().unwrap();
        }
    });
}

/// A pin waits for a kernel that hangs in a span, but not for ever; and while it does, a device is not told that it has pages it
/// has not.
#[test]
fn a_pin_outwaits_a_stuck_span_by_its_deadline_only() {
    both_doors_at_once("pin", |options| {
        let mut buffer = Buffer::<u8>::with_options(PAGES * PAGE, options).unwrap();
        buffer.as_mut_slice().fill(7);
        let device = Idle::attach().unwrap();
        let mapped = device.map(buffer.view().region()).unwrap();
        let page = page_of(&mapped, buffer.view().addr());
        let mut range = device.range().unwrap();
        fault_in(&mut range, &mapped, page..page + 1, Access::Read).unwrap();
        device.device().stuck.store(!0, Ordering::SeqCst);
        std::thread::scope(|scope| {
            let pinner = scope.spawn(|| {
                let start = Instant::now();
                let pin = buffer.pin(0..10).unwrap();
                let waited = start.elapsed();
                // A system call may use the page now.
                let n =
                    std::io::Write::write(&mut std::io::sink(), &buffer.as_slice()[..10]).unwrap();
                device.device().stuck.store(0, Ordering::SeqCst);
                drop(pin);
                (waited, n)
            });
            std::thread::sleep(Duration::from_millis(200));
            let mut readable = None;
            let install = |v: &svm::Valid, _: &svm::DeviceGuard<'_>| {
                readable = Some(v.readable().contains(page % BLOCK));
            };
            let mut range = device.range().unwrap();
            let faulted = range.fault_in(
                &mapped,
                page..page + 1,
                Access::Read,
                0,
                Duration::from_millis(300),
                install,
            );
            match faulted {
                Ok(()) => assert_eq!(readable, Some(true), "told Ok, and given nothing"),
                Err(fault) => assert_eq!(fault.kind, DeviceFaultKind::Timeout),
            }
            let (waited, n) = pinner.join().unwrap();
            assert!(
                waited < Duration::from_millis(3500),
                "the span's deadline is 2 s, and the pin took {waited:?}"
            );
            assert_eq!(n, 10);
        });
        assert!(buffer.as_slice().iter().all(|&b| b == 7));
    });
}

/// CPU faults on the very page, as fast as they go: a device's round excludes our own invalidations, so it never has to be
/// tried again because of one.
#[test]
fn a_storm_of_cpu_faults_interrupts_no_round() {
    both_doors("storm", |options| {
        let mut buffer = Buffer::<u64>::with_options(16 * PAGE / 8, options).unwrap();
        let device = Idle::attach().unwrap();
        let shared = buffer.share();
        let mapped = device.map(shared.view().region()).unwrap();
        let page = page_of(&mapped, shared.view().addr());
        let mut range = device.range().unwrap();
        let stop = AtomicBool::new(false);
        let (rounds, worst) = std::thread::scope(|scope| {
            scope.spawn(|| {
                (0..)
                    .take_while(|_| !stop.load(Ordering::Relaxed))
                    .for_each(|i| shared.store(3, i));
            });
            // By count, not by time: on a busy machine each turn can take a scheduler's slice.
            let end = Instant::now() + Duration::from_secs(20);
            let (mut rounds, mut worst) = (0, Duration::ZERO);
            while (rounds < 200 || device.stats().to_host_runs < 200) && Instant::now() < end {
                let start = Instant::now();
                fault_in(&mut range, &mapped, page..page + 1, Access::Write).unwrap();
                worst = worst.max(start.elapsed());
                rounds += 1;
            }
            stop.store(true, Ordering::Relaxed);
            (rounds, worst)
        });
        let stats = buffer.stats();
        assert!(
            rounds > 100 && stats.cpu_write_faults > 10,
            "no storm: {rounds} rounds, {stats:?}"
        );
        assert_eq!(
            stats.retries, 0,
            "{rounds} rounds, the longest {worst:?}: {stats:?}"
        );
        assert_eq!(stats.anomalies, 0, "{stats:?}");
    });
}

/// Two launches of one device on a mirror with edges: the first to end does not undo what the second writes.
#[test]
fn two_launches_share_the_edges() {
    both_doors("edges", |options| {
        for len in [100, PAGE + 200] {
            let mut bytes = vec![7u8; 3 * PAGE];
            let start = bytes.as_ptr().align_offset(PAGE) + 50;
            let mirror = svm::mirror_with(&mut bytes[start..start + len], options).unwrap();
            let device = Idle::attach().unwrap();
            let mapped = device.map(mirror.view().region()).unwrap();
            let addr = mirror.view().addr();
            let edge: *mut u8 =
                ptr::with_exposed_provenance_mut(addr.wrapping_add_signed(mapped.offset()));
            let write = |at: usize, value: u8| {
                // SAFETY: an edge page of the window, while a writing use is open.
                unsafe { edge.add(at).write_volatile(value) }
            };
            let first = begin_write(&mapped).unwrap();
            write(0, 1);
            let second = begin_write(&mapped).unwrap();
            write(1, 2);
            first.finish().unwrap();
            write(2, 3);
            second.finish().unwrap();
            // A third finds what the two have left.
            let third = begin_write(&mapped).unwrap();
            write(3, 4);
            third.finish().unwrap();
            mirror.close().unwrap();
            assert_eq!(
                bytes[start - 1..start + 5],
                [7, 1, 2, 3, 4, 7],
                "length {len}"
            );
            assert!(bytes[start + 5..].iter().all(|&b| b == 7));
        }
    });
}

/// The edges' bytes are copied per device: two devices that write them at once would undo each other's work.
#[test]
fn a_second_device_may_not_write_a_mirror_that_one_is_writing() {
    both_doors("second writer", |options| {
        let mut bytes = vec![7u8; PAGES * PAGE];
        let mirror = svm::mirror_with(&mut bytes[50..], options).unwrap();
        let (a, b) = (Idle::attach().unwrap(), Idle::attach().unwrap());
        let (on_a, on_b) = (
            a.map(mirror.view().region()).unwrap(),
            b.map(mirror.view().region()).unwrap(),
        );
        let writes = begin_write(&on_a).unwrap();
        let also = begin_write(&on_a).unwrap();
        assert!(begin_write(&on_b).is_err());
        writes.finish().unwrap();
        assert!(begin_write(&on_b).is_err(), "one of two is still writing");
        also.finish().unwrap();
        // A refused use has left nothing behind.
        begin_write(&on_b).unwrap().finish().unwrap();
        begin_write(&on_a).unwrap().finish().unwrap();
        mirror.close().unwrap();
        assert!(bytes.iter().all(|&b| b == 7));
    });
}

/// A worker that tried an access several times has been promised its pages for a while: eviction takes others.
#[test]
fn eviction_spares_what_a_worker_was_promised() {
    both_doors("lease", |options| {
        const MEMORY: usize = 8;
        // A lease of tries beyond the twelfth: 10 µs doubled that often.
        const LEASE: Duration = Duration::from_millis(40);
        let spared = (0..50).any(|_| {
            let buffer = Buffer::<u8>::with_options(
                2 * BLOCK * PAGE,
                &options.clone().granule(Granule::Page),
            )
            .unwrap();
            let device = svm::attach(
                Idle::default(),
                AttachOptions::new().memory_bytes(MEMORY * PAGE),
            )
            .unwrap();
            let mapped = device.map(buffer.view().region()).unwrap();
            let mut range = device.range().unwrap();
            let start = Instant::now();
            range
                .fault_in(&mapped, 0..1, Access::Write, 12, TIMEOUT, |_, _| {})
                .unwrap();
            for page in BLOCK..BLOCK + 3 * MEMORY {
                fault_in(&mut range, &mapped, page..page + 1, Access::Write).unwrap();
            }
            let mut update = range.start_update(&mapped, 0..1, TIMEOUT).unwrap();
            update.snapshot();
            let guard = device.device().device_lock().lock();
            let there = update
                .end_update(&guard)
                .is_ok_and(|valid| valid[0].writable().contains(0));
            if start.elapsed() > LEASE / 2 {
                return false; // Too slow for an answer.
            }
            assert!(device.stats().evicted_pages > 0);
            assert!(there, "the leased page was evicted");
            true
        });
        assert!(spared, "no try was fast enough: the test tested nothing");
    });
}

/// The monitor puts faults aside whose pages a device still uses, and looks at each of them again: the one that can go on does,
/// whoever came before or after it (hazards W1).
#[test]
fn a_fault_aside_does_not_wait_for_the_others() {
    let _watchdog = Watchdog::with_timeout("aside", Duration::from_secs(30));
    if !usable() {
        return;
    }
    const FAULTS: usize = 5;
    let options = Options::new()
        .delivery(Delivery::Thread)
        .granule(Granule::Page);
    let mut buffer = Buffer::<u64>::with_options(FAULTS * BLOCK * PAGE / 8, &options).unwrap();
    let device = Idle::attach().unwrap();
    let shared = buffer.share();
    let mapped = device.map(shared.view().region()).unwrap();
    let mut range = device.range().unwrap();
    let first = page_of(&mapped, shared.view().addr()) / BLOCK;
    for freed in 0..FAULTS {
        for block in first..first + FAULTS {
            fault_in(
                &mut range,
                &mapped,
                block * BLOCK..block * BLOCK + 1,
                Access::Write,
            )
            .unwrap();
        }
        device.device().stuck.store(!0, Ordering::SeqCst);
        let done: [AtomicBool; FAULTS] = [const { AtomicBool::new(false) }; FAULTS];
        std::thread::scope(|scope| {
            for (i, done) in done.iter().enumerate() {
                let shared = &shared;
                scope.spawn(move || {
                    shared.store(i * BLOCK * PAGE / 8, 1);
                    done.store(true, Ordering::SeqCst);
                });
                // One after the other, so that each round tries another place in the line.
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(
                done.iter().all(|d| !d.load(Ordering::SeqCst)),
                "nothing was stuck"
            );
            device
                .device()
                .stuck
                .store(!(1 << (first + freed)), Ordering::SeqCst);
            let start = Instant::now();
            while !done[freed].load(Ordering::SeqCst)
                && start.elapsed() < Duration::from_millis(700)
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            let waited = start.elapsed();
            device.device().stuck.store(0, Ordering::SeqCst);
            assert!(
                waited < Duration::from_millis(700),
                "fault {freed} could go on, and was not looked at for {waited:?}"
            );
        });
    }
    assert_eq!(buffer.stats().anomalies, 0);
}

/// Who asks for no door in particular gets the one that is there; who asks for the other is told.
#[test]
fn without_sigbus_delivery_the_monitor_serves() {
    without(
        "without_sigbus_delivery_the_monitor_serves",
        "sigbus",
        || {
            let _watchdog = Watchdog::new("without SIGBUS");
            let asked = Options::new().delivery(Delivery::Inline);
            let refused = svm::Buffer::<u8>::with_options(1, &asked).map(drop);
            assert!(refused.is_err_and(|error| error.is_unsupported()));
            let mut words = vec![1_u64; 10_000];
            let mut mirror = match svm::mirror(&mut words) {
                Ok(mirror) => mirror,
                Err(error) if error.is_unsupported() => return tests::lacks_userfaultfd(&error),
                Err(error) => panic!("{error}"),
            };
            let accel = accel_sim::Accelerator::new().unwrap();
            accel.run(mirror.view_mut(), |words| words.fill(2)).unwrap();
            assert!(mirror.as_slice().iter().all(|&word| word == 2));
            let stats = mirror.stats();
            assert!(stats.to_host_pages() > 0, "{stats:?}");
        },
    );
}

/// A device may ask for anything: pages that are not the region's are a typed fault, not a panic.
#[test]
fn pages_outside_the_region_are_refused() {
    both_doors("outside", |options| {
        let mut buffer = Buffer::<u8>::with_options(PAGES * PAGE, options).unwrap();
        let idle = Idle::attach().unwrap();
        let mapped = idle.map(buffer.view_mut().region()).unwrap();
        let mut range = idle.range().unwrap();
        for pages in [
            0..100_000,
            99_999..100_000,
            usize::MAX - 1..usize::MAX,
            9..usize::MAX,
        ] {
            let fault = range
                .start_update(&mapped, pages.clone(), TIMEOUT)
                .map(drop)
                .unwrap_err();
            assert_eq!(fault.kind, DeviceFaultKind::OutOfViews, "{pages:?}");
        }
        let far = BLOCK * 100..BLOCK * 100 + 1;
        let fault = fault_in(&mut range, &mapped, far, Access::Write).unwrap_err();
        assert_eq!(fault.kind, DeviceFaultKind::OutOfViews);
        // Nothing is asked for, and nothing is given.
        let nothing = std::ops::Range { start: 3, end: 1 };
        let mut update = range.start_update(&mapped, nothing, TIMEOUT).unwrap();
        update.fault(Access::Write).unwrap();
    });
}

/// A word of `SVM_DISABLE` that is none takes nothing away: a test of a fallback would pass without it.
#[test]
fn an_unknown_word_of_svm_disable_is_refused() {
    without(
        "an_unknown_word_of_svm_disable_is_refused",
        "move,wp_asink",
        || {
            let _watchdog = Watchdog::new("unknown word");
            let refused = [
                svm::mirror(&mut [1_u8; 3 * PAGE]).map(drop),
                Idle::attach().map(drop),
                svm::mirror(&mut [1_u8; 3 * PAGE]).map(drop),
            ];
            for error in refused.map(Result::unwrap_err) {
                assert!(matches!(error.kind(), ErrorKind::Invalid(_)), "{error}");
                let text = error.to_string();
                assert!(text.contains("`wp_asink` is unknown"), "{text}");
                assert!(text.contains("wp_async"), "{text}");
            }
        },
    );
}

/// Nor is what is no text passed over.
#[test]
fn svm_disable_that_is_no_text_is_refused() {
    without(
        "svm_disable_that_is_no_text_is_refused",
        OsStr::from_bytes(b"mov\xffe"),
        || {
            let _watchdog = Watchdog::new("no text");
            let error = svm::mirror(&mut [1_u8; 3 * PAGE]).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Invalid(_)), "{error}");
            assert!(!svm::Capabilities::probe().is_usable());
        },
    );
}

/// Neither beyond the end nor backwards, and the error says what was asked for, and of how many.
#[test]
fn a_pin_of_what_is_no_range_of_the_mirror_is_refused() {
    both_doors("pin of no range", |options| {
        let mut words = vec![1_u32; 10_000];
        let mut mirror = svm::mirror_with(&mut words, options).unwrap();
        let backwards = std::ops::Range { start: 7, end: 3 };
        for range in [5000..20_000, 10_001..10_001, backwards] {
            let texts = [
                mirror.pin(range.clone()).unwrap_err().to_string(),
                mirror.pin_mut(range.clone()).unwrap_err().to_string(),
            ];
            for text in texts {
                assert!(text.contains(&format!("{range:?}")), "{text}");
                assert!(text.contains("10000"), "{text}");
            }
        }
        let nothing = mirror.pin(10_000..);
        assert!(nothing.is_ok(), "of no element, at the end");
    });
}

/// A writing use of a region whose mirror the test keeps, and whose edges it touches through the window alone.
fn begin_write<D: svm::Device>(mapped: &svm::MappedRef<D>) -> Result<svm::UseGuard<D>, svm::Error> {
    // SAFETY: as said, here and where it is called.
    unsafe { mapped.begin_use(Access::Write) }
}

#[test]
#[should_panic(expected = "its own attachment")]
fn a_range_refuses_what_another_attachment_has_mapped() {
    let _watchdog = Watchdog::new("another attachment's region");
    assert!(usable(), "its own attachment has no userfaultfd to be of");
    let mirror = Buffer::<u8>::zeroed(PAGE).unwrap();
    let (a, b) = (Idle::attach().unwrap(), Idle::attach().unwrap());
    let mapped = b.map(mirror.view().region()).unwrap();
    let page = (mirror.view().addr() - mapped.region().base()) / PAGE;
    let mut range = a.range().unwrap();
    let _ = range.start_update(&mapped, page..page + 1, Duration::from_secs(1));
}
