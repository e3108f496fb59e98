//! Every way a mapping changes behind a mirror's back, by bare system calls: nothing stale is seen afterwards.

use std::ptr;

use svm::{Access, Capabilities, Capability, DeviceFaultKind, Mirror, Options};
use tests::{TestDevice, Watchdog, each_option, in_own_process, usable};

const PAGE: usize = 4096;

/// An anonymous mapping, each page filled with its number (from 1), mirrored by address.
struct Map {
    addr: usize,
    pages: usize,
}

impl Map {
    /// Where nobody else maps anything, so that what is unmapped stays so.
    fn new(pages: usize) -> Self {
        let tests::Map { addr, pages } = tests::Map::new(pages);
        Self { addr, pages }
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

/// What a device finds at a page, or the kind of its fault.
fn found(
    device: &TestDevice,
    mirror: &Mirror<'static, u8>,
    page: usize,
) -> Result<u64, DeviceFaultKind> {
    device_read(device, mirror, page).map_err(|e| e.device_fault().unwrap().kind)
}

/// How many of the pages the device has translations to.
fn nr_translated(
    device: &TestDevice,
    mirror: &Mirror<'static, u8>,
    first: usize,
    pages: usize,
) -> usize {
    let view = mirror.view();
    device
        .nr_translated(
            view.region(),
            view.addr() + first * PAGE,
            pages,
            Access::Read,
        )
        .unwrap()
}

fn take_all(device: &TestDevice, mirror: &Mirror<'static, u8>) {
    let view = mirror.view();
    device
        .fault_in(view.region(), view.addr(), view.len(), Access::Write)
        .unwrap();
}

#[test]
fn dontneed_discards_wherever_the_page_is() {
    each_option("dontneed", |options| {
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
    each_option("munmap", |options| {
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
                assert_eq!(fault.kind, DeviceFaultKind::Unmapped);
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
    each_option("reuse", |options| {
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
    each_option("mremap", |options| {
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
    each_option("threads", |options| {
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

/// What is left of a mirror of `pages` pages, all of them a device's, when the kernel has cut it to `kept`.
fn assert_cut(
    device: &TestDevice,
    mirror: Mirror<'static, u8>,
    before: svm::Stats,
    map: &Map,
    kept: usize,
    options: &Options,
) {
    // Through the gate, which is closed until the event is applied: from then on nothing leads there.
    let cut = map.pages - kept;
    assert_eq!(nr_translated(device, &mirror, kept, cut), 0, "{options:?}");
    assert_eq!(nr_translated(device, &mirror, 0, kept), kept);
    let did = mirror.stats() - before;
    // Taken from the device once, and what went did not come home for that.
    assert!(did.invalidations > 0, "{did:?} {options:?}");
    assert_eq!((did.to_host_pages(), did.anomalies), (0, 0), "{did:?}");
    for page in kept..map.pages {
        assert_eq!(
            found(device, &mirror, page),
            Err(DeviceFaultKind::Unmapped),
            "page {page} {options:?}"
        );
    }
    for page in 0..kept {
        assert_eq!(found(device, &mirror, page), Ok(page as u64 + 1));
        assert_eq!(map.read(page), page as u64 + 1);
    }
    // What is mapped there now is nobody's mirror.
    let there = map.at(kept).cast::<libc::c_void>();
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: where nothing is mapped.
    let anew = unsafe { libc::mmap(there, cut * PAGE, 3, flags, -1, 0) };
    assert_eq!(anew, there, "{}", std::io::Error::last_os_error());
    assert_eq!(map.read(kept), 0);
    map.write(kept, 9);
    assert_eq!(found(device, &mirror, kept), Err(DeviceFaultKind::Unmapped));
    // SAFETY: anonymous read-write memory of the test's.
    let again = unsafe { svm::mirror_raw(anew.cast(), cut * PAGE, options) }.unwrap();
    assert_eq!(found(device, &again, 0), Ok(9));
    assert_eq!(mirror.stats().anomalies + again.stats().anomalies, 0);
    mirror.close().unwrap();
    again.close().unwrap();
    assert_eq!(map.read(kept), 9);
    (0..kept).for_each(|page| assert_eq!(map.read(page), page as u64 + 1));
    // The device holds nothing for anybody any more.
    assert_eq!(device.attachment().resident_bytes(), 0, "{options:?}");
    map.unmap(kept, cut);
}

#[test]
fn a_mapping_that_shrinks_is_cut_off() {
    each_option("shrink", |options| {
        let map = Map::new(64);
        let device = TestDevice::new().unwrap();
        let mirror = map.mirror(options);
        take_all(&device, &mirror);
        let before = mirror.stats();
        // SAFETY: the test's own mapping.
        let same = unsafe { libc::mremap(map.at(0).cast(), 64 * PAGE, 40 * PAGE, 0) };
        assert_eq!(same, map.at(0).cast());
        assert_cut(&device, mirror, before, &map, 40, options);
        map.unmap(0, 40);
    });
}

#[test]
fn all_of_a_live_mirror_is_unmapped() {
    each_option("whole munmap", |options| {
        let map = Map::new(64);
        let device = TestDevice::new().unwrap();
        let mirror = map.mirror(options);
        take_all(&device, &mirror);
        let before = mirror.stats();
        map.unmap(0, 64);
        assert_cut(&device, mirror, before, &map, 0, options);
    });
}

/// The end of the heap, and where it is to be.
fn brk(change: usize, up: bool) -> usize {
    let by = libc::intptr_t::try_from(change).unwrap();
    // SAFETY: what is added is the caller's, and so is what goes.
    let before = unsafe { libc::sbrk(if up { by } else { -by }) };
    assert_ne!(
        before.addr(),
        usize::MAX,
        "{}",
        std::io::Error::last_os_error()
    );
    before.expose_provenance()
}

/// In a process of its own, on a thread that `malloc` gives no memory of this heap: its end is where the test has put it.
#[test]
fn a_heap_that_shrinks_is_cut_off() {
    let name = "a_heap_that_shrinks_is_cut_off";
    if !usable() {
        return;
    }
    if !Capabilities::probe().has(Capability::Events) {
        return tests::skip("of a brk that nobody tells there is nothing to see");
    }
    in_own_process(name, &[""], || {
        let body = || {
            each_option(name, |options| {
                const PAGES: usize = 64;
                let old = brk(0, true);
                let pad = old.next_multiple_of(PAGE) - old;
                assert_eq!(brk(pad + PAGES * PAGE, true), old);
                let map = Map {
                    addr: old + pad,
                    pages: PAGES,
                };
                (0..PAGES).for_each(|page| map.write(page, page as u64 + 1));
                let device = TestDevice::new().unwrap();
                let mirror = map.mirror(options);
                assert!(!mirror.is_in_place());
                take_all(&device, &mirror);
                let before = mirror.stats();
                assert_eq!(brk(24 * PAGE, false), map.addr + PAGES * PAGE);
                assert_cut(&device, mirror, before, &map, 40, options);
                assert_eq!(brk(40 * PAGE + pad, false), map.addr + 40 * PAGE);
            });
        };
        std::thread::spawn(body).join().unwrap();
    });
}

/// Of a bare `mprotect` nobody tells: the next launch looks.
#[test]
fn a_launch_after_a_bare_mprotect_may_not_write() {
    each_option("mprotect", |options| {
        let workers = accel_sim::Options::new().workers(2);
        let accel = accel_sim::Accelerator::with_options(workers).unwrap();
        let map = Map::new(64);
        let mut mirror = map.mirror(options);
        let protect = |prot: i32| {
            // SAFETY: the test's own mapping, which it touches as it may.
            let outcome = unsafe { libc::mprotect(map.at(20).cast(), 2 * PAGE, prot) };
            assert_eq!(outcome, 0);
        };
        let fill = |mirror: &mut Mirror<'static, u8>, byte: u8| {
            accel.run(mirror.view_mut(), move |bytes| bytes.fill(byte))
        };
        // The workers have translations that permit everything.
        fill(&mut mirror, 1).unwrap();
        protect(libc::PROT_READ);
        let at = mirror.view().addr();
        let fault = fill(&mut mirror, 2).unwrap_err().device_fault();
        let fault = fault.expect("a typed fault");
        assert_eq!(
            (fault.kind, fault.access),
            (DeviceFaultKind::Protection, Access::Write),
            "{fault} {options:?}"
        );
        // Of an element beside the protected pages, at most: a chunk is faulted in as a whole.
        assert!(fault.addr < at + 22 * PAGE, "{fault}");
        let protected = at + 20 * PAGE..at + 22 * PAGE;
        let by_items = accel.run_items(64, mirror.view_mut(), |_, i, bytes| {
            bytes.store(i * PAGE, 3)
        });
        let fault = by_items.unwrap_err().device_fault().unwrap();
        assert_eq!(fault.kind, DeviceFaultKind::Protection);
        assert!(protected.contains(&fault.addr), "{fault} {options:?}");
        // It is what it was there, for kernels that read as for the CPU.
        let ones = |bytes: &[u8]| bytes.iter().all(|&byte| byte == 1);
        let pages = 20 * PAGE..22 * PAGE;
        assert!(ones(&mirror.as_slice()[pages.clone()]));
        accel
            .run_items(2 * PAGE, mirror.view(), |_, i, bytes| {
                assert_eq!(bytes.load(20 * PAGE + i)?, 1);
                Ok(())
            })
            .unwrap();
        // No access at all, then all of them.
        protect(libc::PROT_NONE);
        let fault = accel
            .run_items(1, mirror.view(), |_, _, bytes| {
                bytes.load(20 * PAGE).map(drop)
            })
            .unwrap_err()
            .device_fault()
            .unwrap();
        assert_eq!(fault.kind, DeviceFaultKind::NoAccess, "{options:?}");
        protect(libc::PROT_READ | libc::PROT_WRITE);
        assert!(ones(&mirror.as_slice()[pages]));
        fill(&mut mirror, 4).unwrap();
        assert!(mirror.as_slice().iter().all(|&byte| byte == 4));
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
    });
}
