//! Interleavings that went wrong once, each forced as far as a test can: what the stress found, made small.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use accel_sim::Accelerator;
use svm::{Access, Buffer, Delivery, Granule, Options};
use tests::{TestDevice, Watchdog, usable};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

fn both_doors(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::new(name);
    if usable() {
        for delivery in [Delivery::Inline, Delivery::Thread] {
            test(&Options::new().delivery(delivery));
        }
    }
}

fn accel(workers: usize) -> Accelerator {
    Accelerator::with_options(accel_sim::Options::new().workers(workers)).unwrap()
}

/// Two threads miss the same device page. The first one's fault shares it; the second one's is older than that copy and says
/// "missing" of a page that is present: that is resolved, not refused.
#[test]
fn two_readers_miss_the_same_page_at_once() {
    both_doors("two readers", |options| {
        let mut buffer = Buffer::<u64>::with_options(16 * WORDS, options).unwrap();
        let device = TestDevice::new().unwrap();
        for round in 1..1500u64 {
            let view = buffer.view_mut();
            device
                .fault_in(view.region(), view.addr(), view.len_bytes(), Access::Write)
                .unwrap();
            device
                .write(view.region(), view.addr(), &round.to_ne_bytes())
                .unwrap();
            // A launch is in progress: CPU readers duplicate.
            let mapped = device.attachment().map(buffer.view().region()).unwrap();
            // SAFETY: the buffer outlives the guard, and is only read while there is one.
            let in_use = unsafe { mapped.begin_use(Access::Read) }.unwrap();
            let (barrier, slice) = (Barrier::new(2), buffer.as_slice());
            std::thread::scope(|scope| {
                for page in [0, round as usize % 16] {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        barrier.wait();
                        std::hint::black_box(slice[page * WORDS + 1]);
                        assert_eq!(slice[0], round);
                    });
                }
            });
            in_use.finish().unwrap();
        }
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

/// A device evicts its copies of pages that it shared with the CPU. They stay write-protected, with nobody to share them with;
/// a pin has to undo that before a system call writes there.
#[test]
fn a_pin_clears_a_protection_that_outlived_its_sharing() {
    both_doors("stale protection", |options| {
        let mut buffer =
            Buffer::<u64>::with_options(16 * WORDS, &options.clone().read_mostly(true)).unwrap();
        buffer.as_mut_slice().fill(7);
        let device = TestDevice::new().unwrap();
        let view = buffer.view();
        device
            .fault_in(view.region(), view.addr(), view.len_bytes(), Access::Read)
            .unwrap();
        device.release().unwrap();
        let target = buffer.as_mut_slice().as_mut_ptr();
        let pin = buffer.pin(..).unwrap();
        let zero = std::fs::File::open("/dev/zero").unwrap();
        // SAFETY: the buffer is ours alone, and pinned.
        let n = unsafe {
            libc::read(
                std::os::fd::AsRawFd::as_raw_fd(&zero),
                target.cast(),
                16 * PAGE,
            )
        };
        assert_eq!(n, 16 * PAGE as isize, "{}", std::io::Error::last_os_error());
        drop(pin);
        assert!(buffer.as_slice().iter().all(|&x| x == 0));
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

/// While a page is pinned a worker uses it in place. When the pin has gone a fault beside the page moves it to the device; the
/// worker must not go on with the old translation: its store would be a CPU fault that waits for the worker itself.
#[test]
fn translations_in_place_end_with_the_pin() {
    both_doors("unpin", |options| {
        let mut buffer = Buffer::<u64>::with_options(16 * WORDS, options).unwrap();
        buffer.as_mut_slice().fill(1);
        let accel = accel(1);
        let pin = buffer.pin(..WORDS).unwrap();
        accel
            .run_items(1, buffer.view(), |_lane, _i, x| {
                x.load(0).map(|x| assert_eq!(x, 1))
            })
            .unwrap();
        assert!(buffer.stats().in_place_pages > 0);
        drop(pin);
        // What lay beside it went to the device, and comes home.
        buffer.as_mut_slice()[5 * WORDS] = 1;
        let begun = Instant::now();
        accel
            .run_items(1, buffer.view_mut(), |_lane, _i, x| {
                x.store(0, 2)?;
                x.store(5 * WORDS, 2)?;
                x.store(0, 3)
            })
            .unwrap();
        assert!(
            begun.elapsed() < Duration::from_secs(1),
            "a worker waited for itself: {:?}",
            begun.elapsed()
        );
        assert_eq!((buffer.as_slice()[0], buffer.as_slice()[5 * WORDS]), (3, 2));
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

/// A slice that begins in the edge of a mirror is in that mirror all the same: as an input it is looked at through it, for its
/// pages may be away, where the kernel finds nothing to copy.
#[test]
fn an_input_inside_a_mirror_that_is_away() {
    both_doors("input in a mirror", |options| {
        let mut memory: Vec<u64> = (0..40 * WORDS as u64).collect();
        let device = TestDevice::new().unwrap();
        for (skip, cut) in [(0, 0), (1, 0), (0, 1), (3, 5), (WORDS, WORDS)] {
            let mut mirror = svm::mirror_with(&mut memory[5..], options).unwrap();
            let view = mirror.view_mut();
            device
                .fault_in(view.region(), view.addr(), view.len_bytes(), Access::Write)
                .unwrap();
            let slice = &mirror.as_slice()[skip..mirror.len() - cut];
            let input = svm::mirror_ref_with(slice, options).unwrap();
            let mut out = vec![0; slice.len() * 8];
            let view = input.view();
            device.read(view.region(), view.addr(), &mut out).unwrap();
            assert!(
                out.chunks(8)
                    .zip(5 + skip as u64..)
                    .all(|(bytes, i)| bytes == i.to_ne_bytes())
            );
            input.close().unwrap();
            mirror.close().unwrap();
        }
        assert!(memory.iter().copied().eq(0..40 * WORDS as u64));
    });
}

/// Threads that the mirror knows nothing of read its memory while it is made and dropped. A fault may find the region gone,
/// the page home and the registration over: then the access is tried again, and nobody is killed (hazards G6).
#[test]
fn readers_beside_mirrors_that_come_and_go() {
    both_doors("readers beside drops", |options| {
        const PAGES: usize = 64;
        // SAFETY: a fresh mapping.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE,
                3,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(map, libc::MAP_FAILED);
        let start = map.expose_provenance();
        let at =
            move |page: usize| std::ptr::with_exposed_provenance_mut::<u64>(start + page * PAGE);
        // Every other page stays unpopulated.
        for page in (0..PAGES).step_by(2) {
            // SAFETY: inside the mapping.
            unsafe { at(page).write(page as u64) };
        }
        let device = TestDevice::new().unwrap();
        let (done, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for t in 0..2 {
                let (done, reads) = (&done, &reads);
                scope.spawn(move || {
                    let mut page = t * 7;
                    while !done.load(Ordering::Relaxed) {
                        page = (page + 5) % PAGES;
                        // SAFETY: inside the mapping, which outlives the scope; nobody writes it meanwhile.
                        let found = unsafe { at(page).read_volatile() };
                        assert_eq!(found, if page % 2 == 0 { page as u64 } else { 0 });
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let begun = Instant::now();
            let mut anomalies = 0;
            while begun.elapsed() < Duration::from_secs(3) {
                // SAFETY: the mapping stays until the end of the test; devices only read it.
                let mirror =
                    unsafe { svm::mirror_raw(at(0).cast(), PAGES * PAGE, options) }.unwrap();
                let view = mirror.view();
                for page in (0..PAGES).step_by(16) {
                    device
                        .fault_in(view.region(), view.addr() + page * PAGE, PAGE, Access::Read)
                        .unwrap();
                }
                anomalies += mirror.stats().anomalies;
                mirror.close().unwrap();
            }
            done.store(true, Ordering::Relaxed);
            assert_eq!(anomalies, 0);
        });
        assert!(reads.into_inner() > 0);
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(map, PAGES * PAGE) };
    });
}

/// Two accelerators add to the same words, page by page: whoever takes a page from the other waits for accesses in flight
/// outside every lock, and device memory is accounted for exactly all the same.
#[test]
fn two_accelerators_take_pages_from_each_other() {
    both_doors("two accelerators", |options| {
        let mut buffer =
            Buffer::<u64>::with_options(64 * WORDS, &options.clone().granule(Granule::Page))
                .unwrap();
        let accels = [accel(2), accel(2)];
        let shared = buffer.share();
        let begun = Instant::now();
        let mut launches = 0;
        while begun.elapsed() < Duration::from_secs(2) {
            launches += 1;
            std::thread::scope(|scope| {
                for accel in &accels {
                    scope.spawn(|| {
                        accel
                            .run_items(1000, shared.view(), |_lane, i, x| {
                                x.fetch_add(i * 37 % 64 * WORDS, 1).map(drop)
                            })
                            .unwrap();
                    });
                }
            });
        }
        assert_eq!(buffer.as_slice().iter().sum::<u64>(), launches * 2000);
        assert_eq!(buffer.stats().anomalies, 0);
        drop(buffer);
        assert!(accels.iter().all(|a| a.resident_bytes() == 0));
    });
}

/// Blocks are brought home, as many as nobody uses by one call, while kernels work on them: no increment is lost.
#[test]
fn huge_blocks_come_home_while_kernels_work_on_them() {
    const LEN: usize = (6 << 20) + PAGE;
    const ROUNDS: u64 = 40;
    both_doors("home beside kernels", |options| {
        let options = options.clone().granule(Granule::Huge).huge_pages(true);
        let mut buffer = Buffer::<u64>::with_options(LEN / 8, &options).unwrap();
        let accel = accel(3);
        let over = AtomicBool::new(false);
        std::thread::scope(|threads| {
            let home = threads.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    accel.release().unwrap();
                }
            });
            for round in 1..=ROUNDS {
                accel
                    .run(buffer.view_mut(), |words| {
                        words.iter_mut().for_each(|word| *word += 1);
                    })
                    .unwrap();
                if round % 8 == 0 {
                    assert!(buffer.as_slice().iter().all(|&word| word == round));
                }
            }
            over.store(true, Ordering::Relaxed);
            home.join().unwrap();
        });
        let stats = buffer.stats();
        assert_eq!((stats.anomalies, stats.overruns), (0, 0), "{stats:?}");
        assert!(stats.to_host_explicit_pages > 0, "{stats:?}");
    });
}
