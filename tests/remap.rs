//! Mirrored memory that grows, moves and is unmapped with more than the mirror, again and again: it stays memory.

#![cfg(target_os = "linux")]

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use svm::{Access, Delivery, Options};
use tests::idle::{Idle, fault_in};
use tests::{Map, TestDevice, Watchdog, in_own_process, usable};

const PAGE: usize = 4096;

fn both_doors(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::with_timeout(name, Duration::from_secs(30));
    if usable() {
        for delivery in [Delivery::Inline, Delivery::Thread] {
            test(&Options::new().delivery(delivery));
        }
    }
}

/// Reserves address space, or with `prot` memory.
fn map_at(addr: usize, pages: usize, prot: i32, flags: i32) -> *mut libc::c_void {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
    // SAFETY: a fresh mapping, or one over what the test reserved.
    unsafe {
        libc::mmap(
            ptr::with_exposed_provenance_mut(addr),
            pages * PAGE,
            prot,
            flags,
            -1,
            0,
        )
    }
}

fn reserve(pages: usize) -> usize {
    let at = map_at(0, pages, libc::PROT_NONE, libc::MAP_NORESERVE);
    assert_ne!(at, libc::MAP_FAILED);
    at.expose_provenance()
}

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn word(addr: usize, page: usize) -> *mut u64 {
    ptr::with_exposed_provenance_mut(addr + page * PAGE)
}

fn read(addr: usize, page: usize) -> u64 {
    // SAFETY: the test reads only what it has mapped.
    unsafe { word(addr, page).read_volatile() }
}

fn write(addr: usize, page: usize, value: u64) {
    // SAFETY: as above.
    unsafe { word(addr, page).write_volatile(value) }
}

fn remap(from: usize, pages: usize, new_pages: usize, to: Option<usize>) -> usize {
    let old = ptr::with_exposed_provenance_mut(from);
    let at = match to {
        // SAFETY: memory of the test's, over what it reserved.
        Some(to) => unsafe {
            let to: *mut libc::c_void = ptr::with_exposed_provenance_mut(to);
            libc::mremap(
                old,
                pages * PAGE,
                new_pages * PAGE,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                to,
            )
        },
        // SAFETY: memory of the test's.
        None => unsafe { libc::mremap(old, pages * PAGE, new_pages * PAGE, 0) },
    };
    assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    at.expose_provenance()
}

fn unmap(addr: usize, pages: usize) {
    // SAFETY: memory of the test's.
    let outcome = unsafe { libc::munmap(ptr::with_exposed_provenance_mut(addr), pages * PAGE) };
    assert_eq!(outcome, 0);
}

/// A mirror of `pages` pages at `addr`, page *i* holding *i* + 1, all of them with the device.
fn mirrored(
    addr: usize,
    pages: usize,
    device: &TestDevice,
    options: &Options,
) -> svm::Mirror<'static, u8> {
    (0..pages).for_each(|page| write(addr, page, page as u64 + 1));
    // SAFETY: memory of the test's; its changes are what the test is about.
    let mirror = unsafe { svm::mirror_raw(word(addr, 0).cast(), pages * PAGE, options) }.unwrap();
    let view = mirror.view();
    device
        .fault_in(view.region(), view.addr(), view.len(), Access::Write)
        .unwrap();
    mirror
}

/// What a vector does whose mirror was forgotten: it grows in place where there is room.
#[test]
fn memory_that_grew_in_place_is_memory() {
    both_doors("grown in place", |options| {
        let at = reserve(64);
        unmap(at + 16 * PAGE, 48);
        assert_eq!(map_at(at, 16, READ_WRITE, libc::MAP_FIXED).addr(), at);
        let device = TestDevice::new().unwrap();
        let mirror = mirrored(at, 16, &device, options);
        if map_at(
            at + 16 * PAGE,
            1,
            libc::PROT_NONE,
            libc::MAP_FIXED_NOREPLACE,
        ) == libc::MAP_FAILED
        {
            tests::skip("somebody else took the room to grow");
            return;
        }
        unmap(at + 16 * PAGE, 1);
        remap(at, 16, 32, None);
        for page in 16..32 {
            assert_eq!(read(at, page), 0);
            write(at, page, 9);
        }
        (0..16).for_each(|page| assert_eq!(read(at, page), page as u64 + 1));
        mirror.close().unwrap();
        (0..32).for_each(|page| {
            assert_eq!(read(at, page), if page < 16 { page as u64 + 1 } else { 9 });
        });
        unmap(at, 32);
    });
}

/// What is protected in the middle of what has grown is a mapping of its own, and so is what lies behind that.
#[test]
fn memory_that_grew_and_is_protected_in_part_is_memory() {
    let name = "memory_that_grew_and_is_protected_in_part_is_memory";
    in_own_process(name, &["", "procmap_query"], || {
        both_doors("grown and protected", |options| {
            let reserved = Map::apart(64, libc::PROT_NONE);
            let at = reserved.addr;
            unmap(at + 16 * PAGE, 48);
            assert_eq!(map_at(at, 16, READ_WRITE, libc::MAP_FIXED).addr(), at);
            let device = TestDevice::new().unwrap();
            let mirror = mirrored(at, 16, &device, options);
            remap(at, 16, 32, None);
            let protect = |prot: i32| {
                let middle = ptr::with_exposed_provenance_mut(at + 20 * PAGE);
                // SAFETY: memory of the test's.
                let outcome = unsafe { libc::mprotect(middle, 4 * PAGE, prot) };
                assert_eq!(outcome, 0);
            };
            protect(libc::PROT_NONE);
            for page in (16..20).chain(24..28) {
                assert_eq!(read(at, page), 0);
                write(at, page, 9);
            }
            mirror.close().unwrap();
            assert_eq!(read(at, 29), 0);
            protect(READ_WRITE);
            (16..32).for_each(|page| {
                let is_written = (16..20).contains(&page) || (24..28).contains(&page);
                assert_eq!(read(at, page), if is_written { 9 } else { 0 });
            });
            unmap(at, 32);
        });
    });
}

/// A page of it is touched for the first time while the mirror ends: before it is unregistered, or after.
#[test]
fn memory_that_grew_is_memory_while_its_mirror_ends() {
    both_doors("grown and ending", |options| {
        let device = TestDevice::new().unwrap();
        for round in 0..300 {
            let reserved = Map::apart(64, libc::PROT_NONE);
            let at = reserved.addr;
            unmap(at + 16 * PAGE, 48);
            assert_eq!(map_at(at, 16, READ_WRITE, libc::MAP_FIXED).addr(), at);
            let mirror = mirrored(at, 16, &device, options);
            remap(at, 16, 32, None);
            let touched = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for page in 16..32 {
                        touched.store(page, Ordering::Release);
                        assert_eq!(read(at, page), 0);
                    }
                });
                while touched.load(Ordering::Acquire) < 16 + round % 16 {
                    std::hint::spin_loop();
                }
                mirror.close().unwrap();
            });
            unmap(at, 32);
        }
    });
}

/// It grows and moves, and grows and moves again: what each step added is memory, touched at once or steps later.
#[test]
fn what_several_moves_added_is_memory() {
    both_doors("grown and moved", |options| {
        let at = map_at(0, 16, READ_WRITE, 0).expose_provenance();
        let device = TestDevice::new().unwrap();
        let mirror = mirrored(at, 16, &device, options);
        let (mut addr, mut pages) = (at, 16);
        for _ in 0..3 {
            let target = reserve(2 * pages);
            addr = remap(addr, pages, 2 * pages, Some(target));
            pages *= 2;
        }
        for page in 0..pages {
            assert_eq!(
                read(addr, page),
                if page < 16 { page as u64 + 1 } else { 0 },
                "page {page}"
            );
            write(addr, page, 3);
        }
        mirror.close().unwrap();
        (0..pages).for_each(|page| assert_eq!(read(addr, page), 3));
        unmap(addr, pages);
    });
}

/// Pages that are with a device while their memory moves many times come home where it is then.
#[test]
fn pages_follow_their_memory_however_often_it_moves() {
    both_doors("moved often", |options| {
        const PAGES: usize = 16;
        let device = TestDevice::new().unwrap();
        let mut addr = map_at(0, PAGES, READ_WRITE, 0).expose_provenance();
        let mirror = mirrored(addr, PAGES, &device, options);
        for _ in 0..25 {
            // Reserved anew each time: what it has left may be anybody's, the runtime's own included.
            addr = remap(addr, PAGES, PAGES, Some(reserve(PAGES)));
        }
        for page in 0..PAGES {
            assert_eq!(read(addr, page), page as u64 + 1);
        }
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
        (0..PAGES).for_each(|page| assert_eq!(read(addr, page), page as u64 + 1));
        unmap(addr, PAGES);
    });
}

/// A mapping is unmapped of which a part was mirrored. Another thread has the address anew, and mirrors another part of it,
/// before anybody has read of the unmapping: that concerns the old memory only (hazards G7).
#[test]
fn an_unmapping_read_late_spares_what_was_mirrored_since() {
    both_doors("late unmapping", |options| {
        const PAGES: usize = 32;
        let device = Idle::attach().unwrap();
        // Where nobody else maps anything: not where the kernel looks for room.
        let at = 0x1234_5670_0000;
        let (stop, tries, taken) = (
            AtomicBool::new(false),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        // 1: mapped, to be unmapped by the first thread; 0: that is under way or over.
        let mapped = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    if mapped.swap(false, Ordering::SeqCst) {
                        unmap(at, PAGES);
                        tries.fetch_add(1, Ordering::SeqCst);
                    }
                    std::hint::spin_loop();
                }
            });
            let end = Instant::now() + Duration::from_millis(1500);
            let mut range = device.range().unwrap();
            while Instant::now() < end {
                let old = map_at(at, PAGES, READ_WRITE, libc::MAP_FIXED_NOREPLACE);
                if old.addr() != at {
                    continue;
                }
                // SAFETY: memory of the test's; the first thread unmaps it.
                let first =
                    unsafe { svm::mirror_raw(word(at, 0).cast(), 4 * PAGE, options) }.unwrap();
                mapped.store(true, Ordering::SeqCst);
                let until = Instant::now() + Duration::from_millis(50);
                while Instant::now() < until {
                    let new = map_at(at + 16 * PAGE, 8, READ_WRITE, libc::MAP_FIXED_NOREPLACE);
                    if new.addr() == at + 16 * PAGE {
                        // SAFETY: memory of the test's.
                        let second =
                            unsafe { svm::mirror_raw(new.cast(), 8 * PAGE, options) }.unwrap();
                        (0..8).for_each(|page| write(at, 16 + page, 5));
                        let known = device.map(second.view().region()).unwrap();
                        let page = (at + 16 * PAGE - known.region().base()) / PAGE;
                        std::thread::sleep(Duration::from_micros(200));
                        fault_in(&mut range, &known, page..page + 1, Access::Write).unwrap();
                        (0..8).for_each(|page| assert_eq!(read(at, 16 + page), 5));
                        range.park();
                        second.close().unwrap();
                        unmap(at + 16 * PAGE, 8);
                        taken.fetch_add(1, Ordering::SeqCst);
                        break;
                    }
                }
                while mapped.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                first.close().unwrap();
            }
            stop.store(true, Ordering::SeqCst);
        });
        assert!(
            taken.load(Ordering::SeqCst) > 20,
            "{tries:?} unmappings, {taken:?} taken anew"
        );
    });
}
