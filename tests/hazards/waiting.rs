//! W: waiting, and what is done meanwhile: leases, and memory for whoever serves a fault.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use svm::{Access, Options};
use tests::idle::{Idle, TIMEOUT, fault_in};
use tests::{Map, Watchdog, in_own_process};

use crate::PAGE;
use crate::fixture::both_doors;

/// W6: what serves faults and applies events takes no memory of malloc's, whose locks the thread that faults, or the one whose event
/// it is, may hold.
#[test]
fn faults_and_events_are_served_without_malloc() {
    let _watchdog = Watchdog::new("without malloc");
    let name = "waiting::faults_and_events_are_served_without_malloc";
    in_own_process(name, &[""], || {
        both_doors("without malloc", |options| {
            const BLOCK: usize = 512;
            // The first whole block of many.
            let map = Map::new(4 * BLOCK);
            let lead = (map.addr.next_multiple_of(BLOCK * PAGE) - map.addr) / PAGE;
            let mirror = map.mirror(options);
            let device = Idle::attach().unwrap();
            let mapped = device.map(mirror.view().region()).unwrap();
            let mut range = device.range().unwrap();
            let base = (map.addr - mapped.region().base()) / PAGE + lead;
            let mut take = |pages: std::ops::Range<usize>, access| {
                fault_in(
                    &mut range,
                    &mapped,
                    base + pages.start..base + pages.end,
                    access,
                )
                .unwrap();
            };
            // The second time: what is made once, at first use, is there.
            for turn in 0..2 {
                let at = lead + turn * BLOCK;
                let from = turn * BLOCK;
                take(from..from + BLOCK, Access::Write);
                NR_ALLOCATIONS.store(0, Ordering::SeqCst);
                IS_COUNTING.store(turn == 1, Ordering::SeqCst);
                (0..10).for_each(|page| map.write(at + page, 3));
                (10..20).for_each(|page| assert!(map.read(at + page) > 0));
                take(from..from + 10, Access::Write);
                take(from + 10..from + 20, Access::Read);
                // SAFETY: the test's mapping.
                unsafe { libc::madvise(map.at(at + 40).cast(), 60 * PAGE, libc::MADV_DONTNEED) };
                (40..100).for_each(|page| assert_eq!(map.read(at + page), 0));
                // Each leaves a hole in the table of places.
                for page in (200..300).step_by(2) {
                    // SAFETY: the test's mapping; nobody touches these pages again.
                    unsafe { libc::munmap(map.at(at + page).cast(), PAGE) };
                }
                let room = ptr::with_exposed_provenance_mut::<libc::c_void>(ROOM + turn * PAGE);
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                // SAFETY: the test's mapping; the page goes where nothing else is.
                let moved =
                    unsafe { libc::mremap(map.at(at + 400).cast(), PAGE, PAGE, flags, room) };
                assert_eq!(moved, room);
                // SAFETY: mapped there now.
                let value = unsafe { moved.cast::<u64>().read_volatile() };
                IS_COUNTING.store(false, Ordering::SeqCst);
                assert_eq!(value, (at + 400) as u64 + 1);
            }
            assert_eq!(NR_ALLOCATIONS.load(Ordering::SeqCst), 0, "allocations");
            assert_eq!(mirror.stats().anomalies, 0);
            drop(range);
            mirror.close().unwrap();
            map.unmap();
            // SAFETY: where the moved pages are.
            unsafe { libc::munmap(ptr::with_exposed_provenance_mut(ROOM), 2 * PAGE) };
        });
    });
}

/// Where nothing else is.
const ROOM: usize = 0x2345_0000_0000;

static IS_COUNTING: AtomicBool = AtomicBool::new(false);
static NR_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
struct Counted;

// SAFETY: the system's.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note();
        // SAFETY: the caller's.
        unsafe { System.dealloc(at, layout) }
    }
}

fn note() {
    if IS_COUNTING.load(Ordering::SeqCst) {
        NR_ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// W4: a thread that fetches the same page again and again, for a device takes it each time at once, is left with it for a moment.
#[test]
fn a_thread_that_fetches_a_page_again_and_again_keeps_it_for_a_moment() {
    both_doors("fetched again", |options| {
        let map = Map::new(4);
        let mirror = map.mirror(options);
        let device = Idle::attach().unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let mut range = device.range().unwrap();
        let page = (map.addr - mapped.region().base()) / PAGE;
        let before = mirror.stats();
        // By count, and then by time: on a busy machine a turn may take longer than what counts as at once.
        let end = std::time::Instant::now() + Duration::from_secs(10);
        let mut turns = 0;
        let waits = loop {
            fault_in(&mut range, &mapped, page..page + 1, Access::Write).unwrap();
            map.write(0, turns);
            turns += 1;
            let waits = (mirror.stats() - before).waits;
            if waits > 0 || (turns >= 1000 && std::time::Instant::now() > end) {
                break waits;
            }
        };
        assert!(waits > 0, "the device has waited for none of {turns} turns");
        drop(range);
        mirror.close().unwrap();
        map.unmap();
    });
}

/// W4: a device that was promised its pages for a while keeps CPU faults and other devices out; not a pin, a fork, an unmapping or the end
/// of the mirror. Each of them is done, in some try, before the promise has ended.
#[test]
fn nothing_but_faults_waits_for_a_promised_page() {
    /// What the last but one of the attempts that count earns, the longest there is: 10 us, doubled twelve times.
    const PROMISED: Duration = Duration::from_micros(10 << 12);
    fn spared(what: &str, options: &Options, act: impl Fn(Map, svm::Mirror<'static, u8>)) {
        let in_time = (0..100).any(|_| {
            let map = Map::new(4);
            let mirror = map.mirror(options);
            let device = Idle::attach().unwrap();
            let mapped = device.map(mirror.view().region()).unwrap();
            let mut range = device.range().unwrap();
            let page = (map.addr - mapped.region().base()) / PAGE;
            let begun = std::time::Instant::now();
            range
                .fault_in(
                    &mapped,
                    page..page + 4,
                    Access::Write,
                    12,
                    TIMEOUT,
                    |_, _| {},
                )
                .unwrap();
            act(map, mirror);
            let took = begun.elapsed();
            map.unmap();
            took < PROMISED
        });
        assert!(in_time, "{what} has waited for a promised page");
    }
    let name = "waiting::nothing_but_faults_waits_for_a_promised_page";
    // A fork brings home what tests beside it count.
    in_own_process(name, &[""], || both_doors("promised", promised));
    fn promised(options: &Options) {
        spared("a pin", options, |_, mirror| {
            drop(mirror.pin(0..10).unwrap());
        });
        spared("a close", options, |_, mirror| mirror.close().unwrap());
        spared("an unmapping", options, |map, _| {
            // SAFETY: the test's mapping, which nobody touches any more.
            unsafe { svm::munmap(map.at(1), PAGE) }.unwrap();
        });
        spared("a fork", options, |_, _| {
            // SAFETY: the child ends at once.
            match unsafe { libc::fork() } {
                -1 => panic!("fork: {}", std::io::Error::last_os_error()),
                // SAFETY: ends the child, without the parent's destructors.
                0 => unsafe { libc::_exit(0) },
                // SAFETY: waits for the child just made.
                child => assert_eq!(unsafe { libc::waitpid(child, ptr::null_mut(), 0) }, child),
            }
        });
    }
}
