//! Kernels that hold a page for longer than anybody waits (hazards W2): whoever needed it has it, with what the kernel wrote while
//! it was its own; a kernel that goes on with it loses its launch and its thread, and nothing else.

#![cfg(target_os = "linux")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

use std::mem::ManuallyDrop;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use accel_sim::{Accelerator, Error, ScopedLaunch};
use svm::{
    Access, AttachOptions, Buffer, Capabilities, Capability, Delivery, DeviceFaultKind, Granule,
    Mirror, Options,
};
use tests::idle::{Idle, fault_in};
use tests::{TestDevice, Watchdog, usable};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// Words of a mirror: one item of a launch, for they lie in one granule.
const LEN: usize = 4 * WORDS;
const GRANULE: usize = 64 << 10;
const DEADLINE: Duration = Duration::from_millis(60);
const WORKERS: usize = 3;

fn both_doors(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::with_timeout(name, Duration::from_secs(40));
    if usable() {
        for delivery in [Delivery::Inline, Delivery::Thread] {
            test(&Options::new().delivery(delivery).granule(Granule::Big));
        }
    }
}

fn shape() -> accel_sim::Options {
    accel_sim::Options::new()
        .workers(WORKERS)
        .span_deadline(DEADLINE)
        .fault_timeout(Duration::from_secs(10))
}

fn accel() -> Accelerator {
    Accelerator::with_options(shape()).unwrap()
}

/// A buffer of ones in one granule.
fn buffer(options: &Options) -> Buffer<u64> {
    let mut elsewhere = Vec::new();
    loop {
        let mut buffer = Buffer::with_options(LEN, options).unwrap();
        if buffer.view().addr() % GRANULE + LEN * 8 <= GRANULE {
            buffer.as_mut_slice().fill(1);
            return buffer;
        }
        elsewhere.push(buffer);
    }
}

fn wait_for(flag: &AtomicBool) {
    while !flag.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// How far a kernel is, and how far it may go.
#[derive(Default)]
struct Steps {
    holds: AtomicBool,
    go: AtomicBool,
    touched: AtomicBool,
}

/// A failed assertion is to be seen, not a hang.
struct ReleaseAtEnd<'a>(&'a [Steps]);

impl Drop for ReleaseAtEnd<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(Steps::release);
    }
}

impl Steps {
    fn release(&self) {
        self.go.store(true, Ordering::Release);
    }

    /// Writes 7 throughout, waits for leave with the span open, and if `again` then writes 8 to its word 5.
    fn hold(&self, span: &mut [u64], again: bool) {
        // Volatile: an exclusive borrow would let the compiler put the stores off until the end.
        for word in &mut *span {
            // SAFETY: a reference.
            unsafe { ptr::write_volatile(word, 7) };
        }
        self.holds.store(true, Ordering::Release);
        wait_for(&self.go);
        if again {
            // SAFETY: a reference.
            unsafe { ptr::write_volatile(&raw mut span[5], 8) };
            self.touched.store(true, Ordering::Release);
        }
    }
}

/// What a raw access of the CPU sees that no borrow permits, as a debugger's or another language's would.
fn peek(addr: usize) -> u64 {
    // SAFETY: the memory is mapped for as long as the test runs.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance::<u64>(addr)) }
}

fn poke(addr: usize, value: u64) {
    // SAFETY: as `peek`.
    unsafe { ptr::write_volatile(ptr::with_exposed_provenance_mut::<u64>(addr), value) };
}

/// Asserts that a launch ended because the kernel touched the page of word 5 of what begins at `start`.
#[track_caller]
fn assert_stuck(ended: Result<(), Error>, start: usize) {
    let fault = ended.unwrap_err().device_fault().expect("a device fault");
    assert_eq!(fault.kind, DeviceFaultKind::Stuck, "{fault}");
    assert_eq!(fault.addr, start + 5 * 8, "{fault}");
}

/// Asserts that all workers are there: an item of each waits for all the others.
#[track_caller]
fn assert_full_strength(accel: &Accelerator) {
    let arrived = AtomicUsize::new(0);
    let mut words = Buffer::<u64>::zeroed(WORKERS).unwrap();
    accel
        .run_items(WORKERS, words.view_mut(), |_, i, words| {
            arrived.fetch_add(1, Ordering::SeqCst);
            let begun = Instant::now();
            while arrived.load(Ordering::SeqCst) < WORKERS {
                assert!(
                    begun.elapsed() < Duration::from_secs(10),
                    "a worker is missing"
                );
                std::thread::yield_now();
            }
            words.store(i, 1)
        })
        .unwrap();
    assert_eq!(words.as_slice(), [1; WORKERS]);
}

/// Holds `buffer` in a kernel, runs `meanwhile` with its address, lets the kernel touch it again, and asserts how that ends.
fn overrun(accel: &Accelerator, buffer: &mut Buffer<u64>, meanwhile: impl FnOnce(usize)) {
    let start = buffer.view().addr();
    let steps = Steps::default();
    accel
        .scope(|scope| {
            let _end = ReleaseAtEnd(std::slice::from_ref(&steps));
            let launch = scope.launch(buffer.view_mut(), |span| steps.hold(span, true))?;
            wait_for(&steps.holds);
            meanwhile(start);
            steps.release();
            assert_stuck(launch.wait(), start);
            Ok(())
        })
        .unwrap();
    assert!(
        !steps.touched.load(Ordering::Acquire),
        "the store went somewhere"
    );
    assert_full_strength(accel);
}

/// Asserts that devices use the buffer as ever: its pages move, none is served in place.
#[track_caller]
fn assert_as_ever(accel: &Accelerator, buffer: &mut Buffer<u64>) {
    // Home first.
    assert!(buffer.as_slice().iter().all(|&x| x < 1000));
    let before = buffer.stats();
    accel
        .run(buffer.view_mut(), |x| x.iter_mut().for_each(|x| *x += 100))
        .unwrap();
    let did = buffer.stats() - before;
    assert_eq!(
        (did.to_device_pages(), did.in_place_pages),
        (4, 0),
        "{did:?}"
    );
}

#[track_caller]
fn assert_counts(buffer: &Buffer<u64>, overruns: u64) {
    let stats = buffer.stats();
    assert_eq!(
        (stats.overruns, stats.anomalies),
        (overruns, 0),
        "{stats:?}"
    );
}

/// Whether a discard is an event here.
fn sees_discards() -> bool {
    let has = Capabilities::probe();
    has.has(Capability::Events) && has.has(Capability::Move)
}

#[test]
fn a_cpu_read_has_the_page_and_the_kernel_that_goes_on_ends() {
    both_doors("cpu read", |options| {
        let accel = accel();
        let mut buffer = buffer(options);
        overrun(&accel, &mut buffer, |start| {
            let begun = Instant::now();
            assert_eq!(peek(start), 7);
            assert!(begun.elapsed() >= DEADLINE, "nobody waited for the span");
        });
        assert!(buffer.as_slice().iter().all(|&x| x == 7));
        assert_as_ever(&accel, &mut buffer);
        assert!(buffer.as_slice().iter().all(|&x| x == 107));
        assert_counts(&buffer, 1);
    });
}

#[test]
fn a_cpu_write_stays() {
    both_doors("cpu write", |options| {
        let accel = accel();
        let mut buffer = buffer(options);
        overrun(&accel, &mut buffer, |start| poke(start + 5 * 8, 9));
        let (word, others) = (buffer.as_slice()[5], buffer.as_slice());
        assert_eq!(word, 9);
        assert!(others.iter().enumerate().all(|(i, &x)| i == 5 || x == 7));
        assert_as_ever(&accel, &mut buffer);
        assert_counts(&buffer, 1);
    });
}

/// The CPU and the device share the page; the CPU writes, and the reader's copy is stale.
#[test]
fn a_late_reader_of_a_duplicate_sees_nothing_stale() {
    both_doors("duplicate", |options| {
        let accel = accel();
        let buffer = buffer(options);
        buffer.advise_read_mostly(true);
        let start = buffer.view().addr();
        let steps = Steps::default();
        let seen = AtomicUsize::new(0);
        accel
            .scope(|scope| {
                let _end = ReleaseAtEnd(std::slice::from_ref(&steps));
                let launch = scope.launch(buffer.view(), |span| {
                    // SAFETY: a reference.
                    let first = unsafe { ptr::read_volatile(&raw const span[5]) };
                    seen.store(first as usize, Ordering::Release);
                    steps.holds.store(true, Ordering::Release);
                    wait_for(&steps.go);
                    // SAFETY: as above.
                    let again = unsafe { ptr::read_volatile(&raw const span[5]) };
                    seen.store(again as usize, Ordering::Release);
                })?;
                wait_for(&steps.holds);
                // A reader beside it is not in its way.
                let begun = Instant::now();
                assert_eq!(peek(start + 5 * 8), 1);
                assert!(begun.elapsed() < DEADLINE);
                poke(start + 5 * 8, 2);
                steps.release();
                assert_stuck(launch.wait(), start);
                Ok(())
            })
            .unwrap();
        assert_eq!(seen.load(Ordering::Acquire), 1);
        assert_eq!(peek(start + 5 * 8), 2);
        assert_full_strength(&accel);
        assert_counts(&buffer, 1);
    });
}

/// It was slow, and that is all: what it wrote came along when its pages were taken.
#[test]
fn a_kernel_that_does_not_touch_its_pages_again_ends_well() {
    both_doors("not again", |options| {
        let accel = accel();
        let mut buffer = buffer(options);
        let start = buffer.view().addr();
        let steps = Steps::default();
        accel
            .scope(|scope| {
                let _end = ReleaseAtEnd(std::slice::from_ref(&steps));
                let launch = scope.launch(buffer.view_mut(), |span| steps.hold(span, false))?;
                wait_for(&steps.holds);
                poke(start + 8, 9);
                steps.release();
                launch.wait()
            })
            .unwrap();
        assert_eq!(buffer.as_slice()[..3], [7, 9, 7]);
        assert_as_ever(&accel, &mut buffer);
        assert_eq!(buffer.as_slice()[..3], [107, 109, 107]);
        assert_counts(&buffer, 0);
    });
}

/// While the late span is open its own device works on the page: in place, for a window page that was filled again would be under
/// the late span too.
#[test]
fn the_same_device_works_on_the_page_and_the_late_span_does_not_get_it_back() {
    both_doors("same device", |options| {
        let accel = accel();
        let mut buffer = buffer(options);
        let alias: *mut Buffer<u64> = &raw mut buffer;
        overrun(&accel, &mut buffer, |start| {
            assert_eq!(peek(start), 7);
            // SAFETY: what is tested is what happens when nothing has kept the views apart.
            let again = unsafe { &mut *alias };
            let before = again.stats();
            for _ in 0..3 {
                accel
                    .run_items(LEN, again.view_mut(), |_, i, x| x.fetch_add(i, 1).map(drop))
                    .unwrap();
            }
            let did = again.stats() - before;
            // The page that was peeked at; the others are the late span's still, and its device's.
            assert!(did.in_place_pages >= 1, "{did:?}");
            assert_eq!(peek(start + 8), 10);
        });
        assert!(buffer.as_slice().iter().all(|&x| x == 10));
        assert_as_ever(&accel, &mut buffer);
        assert_counts(&buffer, 1);
    });
}

#[test]
fn another_device_gets_the_page() {
    both_doors("another device", |options| {
        let (accel, other) = (accel(), Idle::attach().unwrap());
        let mut buffer = buffer(options);
        let alias: *const Buffer<u64> = &raw const buffer;
        overrun(&accel, &mut buffer, |start| {
            // SAFETY: as above.
            let mapped = other.map(unsafe { &*alias }.view().region()).unwrap();
            let mut range = other.range().unwrap();
            let _worker = svm::worker_thread();
            let page = (start - mapped.region().base()) / PAGE;
            let begun = Instant::now();
            fault_in(&mut range, &mapped, page..page + 1, Access::Write).unwrap();
            assert!(begun.elapsed() >= DEADLINE, "nobody waited for the span");
            // In place, while the span is open.
            assert_eq!(other.resident_bytes(), 0);
            poke(start, 9);
        });
        assert_eq!(buffer.as_slice()[..2], [9, 7]);
        assert_as_ever(&accel, &mut buffer);
        assert_counts(&buffer, 1);
    });
}

#[test]
fn another_device_reads_the_page() {
    both_doors("another device reads", |options| {
        let (accel, other) = (accel(), accel());
        let mut buffer = buffer(options);
        let alias: *const Buffer<u64> = &raw const buffer;
        overrun(&accel, &mut buffer, |_| {
            // SAFETY: as above.
            let again = unsafe { &*alias };
            other
                .run(again.view(), |x| assert!(x.iter().all(|&x| x == 7)))
                .unwrap();
        });
        assert!(buffer.as_slice().iter().all(|&x| x == 7));
        assert_counts(&buffer, 1);
    });
}

#[test]
fn release_and_pin_have_the_pages() {
    both_doors("release, pin", |options| {
        let accel = accel();
        let mut buffer = buffer(options);
        overrun(&accel, &mut buffer, |start| {
            accel.release().unwrap();
            assert_eq!(accel.resident_bytes(), 0);
            let begun = Instant::now();
            assert_eq!(peek(start), 7);
            assert!(begun.elapsed() < DEADLINE);
        });
        let alias: *const Buffer<u64> = &raw const buffer;
        overrun(&accel, &mut buffer, |start| {
            // SAFETY: as above.
            let pin = unsafe { &*alias }.pin(..).unwrap();
            assert_eq!(peek(start), 7);
            drop(pin);
        });
        assert!(buffer.as_slice().iter().all(|&x| x == 7));
        assert_as_ever(&accel, &mut buffer);
        assert_counts(&buffer, 2);
    });
}

/// Memory is full of a page that a kernel holds. Eviction passes it over, and never takes it.
#[test]
fn eviction_spares_a_span() {
    both_doors("eviction", |options| {
        let accel = Accelerator::with_options(shape().memory_bytes(16 * LEN * 8)).unwrap();
        let mut held = buffer(options);
        let mut other = Buffer::<u64>::with_options(64 * LEN, options).unwrap();
        let steps = Steps::default();
        accel
            .scope(|scope| {
                let _end = ReleaseAtEnd(std::slice::from_ref(&steps));
                let launch = scope.launch(held.view_mut(), |span| steps.hold(span, true))?;
                wait_for(&steps.holds);
                let begun = Instant::now();
                while begun.elapsed() < 3 * DEADLINE {
                    accel.run(other.view_mut(), |x| x.iter_mut().for_each(|x| *x += 1))?;
                }
                steps.release();
                launch.wait()
            })
            .unwrap();
        assert!(steps.touched.load(Ordering::Acquire));
        assert!(
            held.as_slice()
                .iter()
                .enumerate()
                .all(|(i, &x)| x == if i == 5 { 8 } else { 7 })
        );
        let rounds = other.as_slice()[0];
        assert!(rounds > 0 && other.as_slice().iter().all(|&x| x == rounds));
        assert!(other.stats().evicted_pages > 0);
        assert_counts(&held, 0);
    });
}

/// The mirror goes while the kernel holds its pages. (No safe program can do that: the launch has borrowed it.)
#[test]
fn a_mirror_is_closed_under_a_span() {
    both_doors("close", |options| {
        let accel = accel();
        let granule = GRANULE / 8;
        let mut memory = vec![1u64; LEN + granule];
        for round in 0..2 {
            let begin = granule - (memory.as_ptr().addr() / 8) % granule;
            let slice = &mut memory[begin..begin + LEN];
            let start = slice.as_ptr().addr();
            let mirror = ManuallyDrop::new(svm::mirror_with(slice, options).unwrap());
            let alias: *mut Mirror<'_, u64> = (&raw const *mirror).cast_mut();
            let steps = Steps::default();
            accel
                .scope(|scope| {
                    let _end = ReleaseAtEnd(std::slice::from_ref(&steps));
                    // SAFETY: what is tested is what happens when nothing has kept the mirror.
                    let lent = unsafe { &mut *alias };
                    let launch: ScopedLaunch<'_> =
                        scope.launch(lent.view_mut(), |span| steps.hold(span, true))?;
                    wait_for(&steps.holds);
                    // SAFETY: it is not used, or dropped, again.
                    unsafe { ptr::read(alias) }.close().unwrap();
                    for i in 0..LEN {
                        assert_eq!(peek(start + i * 8), 7);
                        poke(start + i * 8, 20 + round);
                    }
                    steps.release();
                    assert_stuck(launch.wait(), start);
                    Ok(())
                })
                .unwrap();
            assert!(!steps.touched.load(Ordering::Acquire));
            let slice = &memory[begin..begin + LEN];
            assert!(slice.iter().all(|&x| x == 20 + round));
            assert_full_strength(&accel);
        }
        // The same memory, mirrored again, is as any other.
        let mut mirror = svm::mirror_with(&mut memory, options).unwrap();
        accel
            .run(mirror.view_mut(), |x| x.iter_mut().for_each(|x| *x = 3))
            .unwrap();
        mirror.close().unwrap();
        assert!(memory.iter().all(|&x| x == 3));
    });
}

/// Discarded and unmapped under the span: nobody sees what was there, the late access is told.
#[test]
fn the_memory_goes_under_a_span() {
    both_doors("events", |options| {
        if !sees_discards() {
            return println!("SKIPPED: a discard is no event here");
        }
        let accel = accel();
        let mut buffer = buffer(options);
        overrun(&accel, &mut buffer, |start| {
            let page = ptr::with_exposed_provenance_mut(start);
            // SAFETY: a page of the buffer's, which is for this.
            let result = unsafe { libc::madvise(page, PAGE, libc::MADV_DONTNEED) };
            assert_eq!(result, 0);
            // Pending until the span had its time.
            assert_eq!(peek(start), 0);
            poke(start, 3);
        });
        assert_eq!(buffer.as_slice()[0], 3);
        assert_eq!(buffer.as_slice()[1..WORDS], [0; WORDS - 1]);
        assert!(buffer.as_slice()[WORDS..].iter().all(|&x| x == 7));
        assert_as_ever(&accel, &mut buffer);
        assert_counts(&buffer, 1);
    });
}

#[test]
fn a_fork_under_a_span() {
    both_doors("fork", |options| {
        let accel = accel();
        let mut buffer = buffer(options);
        overrun(&accel, &mut buffer, |start| {
            // SAFETY: the child calls nothing but what is async-signal-safe.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let right = (0..LEN).all(|i| peek(start + i * 8) == 7);
                // SAFETY: ends the child.
                unsafe { libc::_exit(i32::from(!right)) };
            }
            let mut status = 0;
            // SAFETY: the child is ours, `status` an integer.
            let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
            assert_eq!((waited, status), (child, 0));
        });
        assert!(buffer.as_slice().iter().all(|&x| x == 7));
        assert_as_ever(&accel, &mut buffer);
        assert_counts(&buffer, 1);
    });
}

/// The accelerator goes while a detached kernel is being lost; its buffers come back, and devices can be attached for ever after.
#[test]
fn an_accelerator_is_dropped_over_a_lost_kernel() {
    both_doors("drop", |options| {
        for _ in 0..10 {
            let accel = accel();
            let steps = std::sync::Arc::new(Steps::default());
            let buffer = buffer(options);
            let start = buffer.view().addr();
            let job = {
                let steps = steps.clone();
                accel
                    .spawn(buffer, move |span| steps.hold(span, true))
                    .unwrap()
            };
            wait_for(&steps.holds);
            poke(start, 9);
            std::thread::scope(|threads| {
                threads.spawn(|| {
                    std::thread::sleep(Duration::from_millis(5));
                    steps.release();
                });
                drop(accel);
            });
            let (buffer, ended) = job.join();
            assert_stuck(ended, start);
            assert_eq!(buffer.as_slice()[..6], [9, 7, 7, 7, 7, 7]);
            assert_counts(&buffer, 1);
        }
    });
}

/// All workers are lost at once, over and over.
#[test]
fn every_worker_is_lost_and_replaced() {
    both_doors("every worker", |options| {
        let accel = accel();
        for _ in 0..3 {
            let mut buffers: Vec<_> = (0..WORKERS).map(|_| buffer(options)).collect();
            let steps: Vec<_> = (0..WORKERS).map(|_| Steps::default()).collect();
            let starts: Vec<_> = buffers.iter().map(|b| b.view().addr()).collect();
            accel
                .scope(|scope| {
                    let _end = ReleaseAtEnd(&steps);
                    let mut launches = Vec::new();
                    for (buffer, steps) in buffers.iter_mut().zip(&steps) {
                        launches
                            .push(scope.launch(buffer.view_mut(), |span| steps.hold(span, true))?);
                    }
                    steps.iter().for_each(|steps| wait_for(&steps.holds));
                    std::thread::scope(|threads| {
                        for &start in &starts {
                            threads.spawn(move || assert_eq!(peek(start), 7));
                        }
                    });
                    steps
                        .iter()
                        .for_each(|s| s.go.store(true, Ordering::Release));
                    for (launch, &start) in launches.into_iter().zip(&starts) {
                        assert_stuck(launch.wait(), start);
                    }
                    Ok(())
                })
                .unwrap();
            assert_full_strength(&accel);
            for buffer in &buffers {
                assert!(buffer.as_slice().iter().all(|&x| x == 7));
                assert_counts(buffer, 1);
            }
        }
    });
}

/// All of this once more where pages leave a window by being copied. What is disabled is read once: in a process of its own.
#[test]
fn without_move() {
    let _watchdog = Watchdog::new("without move");
    if !usable() || std::env::var_os("SVM_DISABLE").is_some() {
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--test-threads=2", "--skip", "without_move"])
        .env("SVM_DISABLE", "move")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("15 passed"), "{text}");
}

/// A device's round takes a page from another device whose access does not end. Its own copy is taken as well, so its own workers lose
/// their translations: what the CPU writes then they see.
#[test]
fn who_severs_another_device_is_told_too() {
    both_doors("own translations", |options| {
        let mut buffer = buffer(&options.clone().read_mostly(true));
        let mine = TestDevice::new().unwrap();
        let deadline = AttachOptions::new().span_deadline(Duration::from_millis(20));
        let other = svm::attach(Idle::default(), deadline).unwrap();
        let shared = buffer.share();
        let (region, addr) = (shared.view().region(), shared.view().addr());
        // All three share the page, and the other's access to it does not end.
        let mut out = [0; 8];
        mine.read(region, addr, &mut out).unwrap();
        assert_eq!(out, 1u64.to_ne_bytes());
        let its = other.map(region).unwrap();
        let page = (addr - region.base()) / PAGE;
        let _worker = svm::worker_thread();
        let mut range = other.range().unwrap();
        fault_in(&mut range, &its, page..page + 1, Access::Read).unwrap();
        other.device().stuck.store(!0, Ordering::SeqCst);
        // A round of mine that wants it for itself severs the other, and gives up then.
        let mapped = mine.attachment().map(region).unwrap();
        let mut range = mine.attachment().range().unwrap();
        let never = |_: &svm::Valid, _: &svm::DeviceGuard<'_>| panic!("there is no time for it");
        let gave_up = range.fault_in(
            &mapped,
            page..page + 1,
            Access::Write,
            0,
            Duration::ZERO,
            never,
        );
        assert_eq!(gave_up.unwrap_err().kind, DeviceFaultKind::Timeout);
        shared.store(0, 9);
        mine.read(region, addr, &mut out).unwrap();
        assert_eq!(u64::from_ne_bytes(out), 9, "what was there before");
        other.device().stuck.store(0, Ordering::SeqCst);
        assert!(buffer.stats().severed_pages > 0, "nothing was severed");
    });
}
