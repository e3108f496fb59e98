//! Every way a mapping changes behind a mirror's back, by bare system calls: nothing stale is seen afterwards.

use std::ptr;

use svm::{Access, Delivery, Granule, Mirror, Options};
use tests::{TestDevice, Watchdog, usable};

const PAGE: usize = 4096;

/// An anonymous mapping, each page filled with its number (from 1), mirrored by address.
struct Map {
    addr: usize,
    pages: usize,
}

impl Map {
    fn new(pages: usize) -> Self {
        // SAFETY: a fresh mapping.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                pages * PAGE,
                3,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        let map = Self {
            addr: at.expose_provenance(),
            pages,
        };
        (0..pages).for_each(|page| map.write(page, page as u64 + 1));
        map
    }

    fn at(&self, page: usize) -> *mut u64 {
        ptr::with_exposed_provenance_mut(self.addr + page * PAGE)
    }

    fn write(&self, page: usize, value: u64) {
        // SAFETY: inside the mapping; tests touch only pages that are mapped.
        unsafe { self.at(page).write_volatile(value) }
    }

    fn read(&self, page: usize) -> u64 {
        // SAFETY: as in `write`.
        unsafe { self.at(page).read_volatile() }
    }

    fn mirror(&self, options: &Options) -> Mirror<'static, u8> {
        // SAFETY: anonymous read-write memory; its changes are what the tests are about.
        unsafe { svm::mirror_raw(self.at(0).cast(), self.pages * PAGE, options) }.unwrap()
    }

    fn madvise(&self, first: usize, pages: usize, advice: i32) {
        // SAFETY: the mapping is the test's.
        let outcome = unsafe { libc::madvise(self.at(first).cast(), pages * PAGE, advice) };
        assert_eq!(outcome, 0);
    }

    fn unmap(&self, first: usize, pages: usize) {
        // SAFETY: the mapping is the test's.
        let outcome = unsafe { libc::munmap(self.at(first).cast(), pages * PAGE) };
        assert_eq!(outcome, 0);
    }
}

fn device_read(
    device: &TestDevice,
    mirror: &Mirror<'static, u8>,
    page: usize,
) -> Result<u64, svm::Error> {
    let view = mirror.view();
    let mut out = [0; 8];
    device.read(view.region(), view.addr() + page * PAGE, &mut out)?;
    Ok(u64::from_ne_bytes(out))
}

fn take_all(device: &TestDevice, mirror: &Mirror<'static, u8>) {
    let view = mirror.view();
    device
        .fault_in(view.region(), view.addr(), view.len(), Access::Write)
        .unwrap();
}

fn each(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::new(name);
    if usable() {
        for delivery in [Delivery::Inline, Delivery::Thread] {
            for granule in [Granule::Page, Granule::Big, Granule::Huge] {
                for read_mostly in [false, true] {
                    test(
                        &Options::new()
                            .delivery(delivery)
                            .granule(granule)
                            .read_mostly(read_mostly),
                    );
                }
            }
        }
    }
}

#[test]
fn dontneed_discards_wherever_the_page_is() {
    each("dontneed", |options| {
        let map = Map::new(64);
        let device = TestDevice::new().unwrap();
        let mirror = map.mirror(options);
        take_all(&device, &mirror);
        assert_eq!(map.read(20), 21);
        assert_eq!(device_read(&device, &mirror, 40).unwrap(), 41);
        for round in 0..20 {
            map.madvise(16, 32, libc::MADV_DONTNEED);
            for page in [16, 20, 40, 47] {
                assert_eq!(
                    device_read(&device, &mirror, page).unwrap(),
                    0,
                    "round {round} page {page} {options:?}"
                );
                assert_eq!(map.read(page), 0);
                map.write(page, 7);
                assert_eq!(device_read(&device, &mirror, page).unwrap(), 7);
            }
            assert_eq!((map.read(15), map.read(48)), (16, 49));
        }
        mirror.close().unwrap();
        assert_eq!((map.read(15), map.read(16), map.read(48)), (16, 7, 49));
    });
}

#[test]
fn an_unmapped_part_is_a_typed_fault_and_the_rest_lives() {
    each("munmap", |options| {
        for (first, pages) in [(0, 8), (56, 8), (20, 10)] {
            let map = Map::new(64);
            let device = TestDevice::new().unwrap();
            let mirror = map.mirror(options);
            take_all(&device, &mirror);
            map.unmap(first, pages);
            for page in first..first + pages {
                let fault = device_read(&device, &mirror, page)
                    .unwrap_err()
                    .device_fault()
                    .unwrap();
                assert_eq!(fault.kind, svm::DeviceFaultKind::Unmapped);
            }
            for page in (0..64).filter(|p| !(first..first + pages).contains(p)) {
                assert_eq!(map.read(page), page as u64 + 1);
                assert_eq!(
                    device_read(&device, &mirror, page).unwrap(),
                    page as u64 + 1
                );
            }
            mirror.close().unwrap();
            assert_eq!(
                map.read((first + pages) % 64),
                ((first + pages) % 64) as u64 + 1
            );
        }
    });
}

#[test]
fn an_address_is_reused_at_once() {
    each("reuse", |options| {
        let device = TestDevice::new().unwrap();
        let map = Map::new(64);
        let mirror = map.mirror(options);
        take_all(&device, &mirror);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: over part of the test's own mapping.
        let over = unsafe { libc::mmap(map.at(32).cast(), 16 * PAGE, 3, flags, -1, 0) };
        assert_eq!(over, map.at(32).cast());
        // The new mapping is nobody's mirror: plain memory.
        assert_eq!(map.read(33), 0);
        map.write(33, 5);
        assert!(device_read(&device, &mirror, 33).is_err());
        assert_eq!(map.read(33), 5);
        // And it can be mirrored, while the rest of the old one still is.
        // SAFETY: anonymous read-write memory of the test's.
        let again = unsafe { svm::mirror_raw(over.cast(), 16 * PAGE, options) }.unwrap();
        assert_eq!(device_read(&device, &again, 1).unwrap(), 5);
        assert_eq!(device_read(&device, &mirror, 31).unwrap(), 32);
        mirror.close().unwrap();
        assert_eq!(device_read(&device, &again, 1).unwrap(), 5);
        again.close().unwrap();
        assert_eq!((map.read(31), map.read(33), map.read(48)), (32, 5, 49));
    });
}

#[test]
fn moved_pages_come_home_at_their_new_address() {
    each("mremap", |options| {
        let device = TestDevice::new().unwrap();
        let map = Map::new(64);
        let mirror = map.mirror(options);
        take_all(&device, &mirror);
        // SAFETY: the test's own mapping; nobody else refers to it.
        let to = unsafe {
            libc::mremap(
                map.at(16).cast(),
                32 * PAGE,
                48 * PAGE,
                libc::MREMAP_MAYMOVE,
            )
        };
        assert_ne!(to, libc::MAP_FAILED);
        let moved = Map {
            addr: to.expose_provenance(),
            pages: 48,
        };
        for page in 0..32 {
            assert_eq!(moved.read(page), page as u64 + 17, "{options:?}");
        }
        moved.write(40, 3);
        assert_eq!(moved.read(40), 3);
        assert!(device_read(&device, &mirror, 20).is_err());
        assert_eq!(device_read(&device, &mirror, 1).unwrap(), 2);
        mirror.close().unwrap();
        assert_eq!((moved.read(31), moved.read(40), map.read(0)), (48, 3, 1));
    });
}

#[test]
fn several_threads_change_mappings_while_the_device_reads() {
    each("threads", |options| {
        let device = TestDevice::new().unwrap();
        let map = Map::new(256);
        let mirror = map.mirror(options);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let map = &map;
                scope.spawn(move || {
                    for round in 1..=20u64 {
                        map.madvise(thread * 128, 64, libc::MADV_DONTNEED);
                        for page in thread * 128..thread * 128 + 64 {
                            assert_eq!(map.read(page), 0);
                            map.write(page, round);
                        }
                        for page in thread * 128..thread * 128 + 64 {
                            assert_eq!(map.read(page), round);
                        }
                    }
                });
            }
            for page in (0..256).cycle().take(2000) {
                let value = device_read(&device, &mirror, page).unwrap();
                let quiet = page % 128 >= 64;
                assert!(if quiet {
                    value == page as u64 + 1
                } else {
                    value <= 20 || value == page as u64 + 1
                });
            }
        });
        mirror.close().unwrap();
        assert!((0..64).all(|page| map.read(page) == 20));
    });
}

#[test]
fn no_kernel_sees_discarded_contents_after_the_call_returned() {
    use std::sync::atomic::{AtomicU64, Ordering};
    let _watchdog = Watchdog::new("pause");
    if !usable() {
        return;
    }
    let accel = accel_sim::Accelerator::with_options(accel_sim::Options::new().workers(1)).unwrap();
    let map = Map::new(16);
    let mut mirror = map.mirror(&Options::new());
    // Even: being prepared; odd: the contents are of this round; each round discards them.
    let (discarded, stop) = (AtomicU64::new(0), AtomicU64::new(0));
    let shared = mirror.share();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=500u64 {
                map.write(3, round);
                std::thread::yield_now();
                map.madvise(0, 16, libc::MADV_DONTNEED);
                discarded.store(round, Ordering::SeqCst);
                std::thread::yield_now();
            }
            stop.store(1, Ordering::SeqCst);
        });
        let seen = AtomicU64::new(0);
        while stop.load(Ordering::SeqCst) == 0 {
            accel
                .run_items(1, shared.view(), |_, _, bytes| {
                    for _ in 0..200 {
                        let gone = discarded.load(Ordering::SeqCst);
                        let mut value = [0u8; 8];
                        for (i, byte) in value.iter_mut().enumerate() {
                            *byte = bytes.load(3 * PAGE + i)?;
                        }
                        let value = u64::from_le_bytes(value);
                        // Bytes of two rounds can mix, for the CPU writes meanwhile; below 256 they cannot.
                        if gone < 255 && value < 256 {
                            assert!(
                                value == 0 || value > gone,
                                "round {value} after {gone} was discarded"
                            );
                        }
                        seen.fetch_max(value, Ordering::Relaxed);
                    }
                    Ok(())
                })
                .unwrap();
        }
        assert!(
            seen.load(Ordering::Relaxed) > 0,
            "the kernel never saw a value: the test tested nothing"
        );
    });
}
