//! Rules of `runtime/HAZARDS.md` that no other test fails without.

#![cfg(target_os = "linux")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use svm::{
    Access, Capabilities, Capability, Delivery, DeviceFaultKind, ErrorKind, Granule, Options,
};
use tests::idle::{Idle, TIMEOUT, fault_in};
use tests::mapping::READ_WRITE;
use tests::{Map, TestDevice, Watchdog, in_own_process, usable};

const PAGE: usize = 4096;

fn both_doors(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::with_timeout(name, Duration::from_secs(30));
    if usable() {
        for delivery in [Delivery::Inline, Delivery::Thread] {
            test(&Options::new().delivery(delivery).granule(Granule::Page));
        }
    }
}

/// The same in a process of its own: a fork brings home what tests beside it count.
fn both_doors_alone(test: &str, name: &'static str, body: impl Fn(&Options)) {
    in_own_process(test, &[""], || both_doors(name, body));
}

fn second_word(map: &Map, page: usize) -> *mut u64 {
    map.word(page).wrapping_add(1)
}

/// G4: a page that the CPU shares with a device is emptied behind our back, by a call that posts no event. What the device holds is
/// what the page holds: the next touch brings it back, and brings it back protected.
#[test]
fn a_shared_page_that_was_emptied_unheard_comes_back_from_its_duplicate() {
    const GUARD_INSTALL: i32 = 102;
    const GUARD_REMOVE: i32 = 103;
    both_doors("emptied unheard", |options| {
        let map = Map::new(8);
        for page in 0..8 {
            // SAFETY: in the mapping.
            unsafe { second_word(&map, page).write_volatile(50) };
        }
        let mirror = map.mirror(&options.clone().read_mostly(true));
        let device = TestDevice::new().unwrap();
        let view = mirror.view();
        let mut out = [0; 8 * PAGE];
        device.read(view.region(), view.addr(), &mut out).unwrap();
        // SAFETY: the test's mapping: a marker that makes an access to the page fail, and away with it again.
        let marked = unsafe { libc::madvise(map.at(1).cast(), 2 * PAGE, GUARD_INSTALL) };
        if marked != 0 {
            tests::skip("no guard pages before Linux 6.13");
            return;
        }
        // SAFETY: as above.
        let cleared = unsafe { libc::madvise(map.at(1).cast(), 2 * PAGE, GUARD_REMOVE) };
        assert_eq!(cleared, 0);
        assert_eq!(map.read(1), 2, "zeros for what a device still holds");
        let read = |page: usize| {
            let mut word = [0; 8];
            device
                .read(view.region(), map.addr + page * PAGE, &mut word)
                .unwrap();
            u64::from_ne_bytes(word)
        };
        for page in [1, 2] {
            map.write(page, 9);
            assert_eq!(read(page), 9, "written, and the device was not told");
            // SAFETY: in the mapping.
            let second = unsafe { second_word(&map, page).read_volatile() };
            assert_eq!(second, 50, "a store to the page lost the rest of it");
        }
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
        map.unmap();
    });
}

/// M3: the kernel holds on to a page for DMA (a buffer registered with io_uring). It is not copied and dropped: what the kernel
/// writes there later arrives, for the CPU and the device.
#[test]
fn what_the_kernel_writes_to_a_page_it_holds_arrives() {
    both_doors("held for DMA", |options| {
        let map = Map::new(8);
        let Some(ring) = ring::Ring::holding(map.addr + 3 * PAGE, PAGE) else {
            tests::skip("no io_uring here");
            return;
        };
        let mirror = map.mirror(options);
        let device = TestDevice::new().unwrap();
        let region = mirror.view().region();
        for page in 0..8 {
            let second = map.addr + page * PAGE + 8;
            device.write(region, second, &7u64.to_ne_bytes()).unwrap();
        }
        ring.read_into(map.addr + 3 * PAGE, 77);
        let mut words = [0; 16];
        device
            .read(region, map.addr + 3 * PAGE, &mut words)
            .unwrap();
        let (first, second) = words.split_at(8);
        assert_eq!(
            first,
            77u64.to_ne_bytes(),
            "the device has not seen what the kernel wrote"
        );
        assert_eq!(second, 7u64.to_ne_bytes(), "the device's own write is lost");
        assert_eq!(map.read(3), 77, "what the kernel wrote is lost");
        assert!(mirror.stats().in_place_pages > 0, "{:?}", mirror.stats());
        drop(ring);
        mirror.close().unwrap();
        assert_eq!(map.read(3), 77);
        map.unmap();
    });
}

/// The least of io_uring: a registered buffer, and a read into it.
mod ring {
    use std::ptr;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A ring that holds one buffer.
    pub(crate) struct Ring {
        fd: i32,
        rings: usize,
        entries: usize,
        params: Params,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Params {
        sq_entries: u32,
        cq_entries: u32,
        flags: [u32; 8],
        // head, tail, ring_mask, ring_entries, flags, dropped, array, reserved, user_addr
        sq: [u32; 10],
        // head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved, user_addr
        cq: [u32; 10],
    }

    #[repr(C)]
    #[derive(Default)]
    struct Entry {
        opcode: u8,
        flags: u8,
        ioprio: u16,
        fd: i32,
        offset: u64,
        addr: u64,
        len: u32,
        rw_flags: u32,
        user_data: u64,
        buf_index: u16,
        personality: u16,
        splice_fd: i32,
        rest: [u64; 2],
    }

    const _: () = assert!(size_of::<Params>() == 120 && size_of::<Entry>() == 64);

    fn map(fd: i32, len: usize, offset: i64) -> usize {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a fresh mapping of the ring's own memory.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, fd, offset) };
        assert_ne!(at, libc::MAP_FAILED);
        at.expose_provenance()
    }

    impl Ring {
        /// A ring with the buffer registered; `None` where the kernel has no io_uring, or gives none.
        pub(crate) fn holding(addr: usize, len: usize) -> Option<Self> {
            let mut params = Params::default();
            // SAFETY: the kernel fills `params`.
            let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, &raw mut params) };
            let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0)?;
            let buffer = libc::iovec {
                iov_base: ptr::with_exposed_provenance_mut(addr),
                iov_len: len,
            };
            // SAFETY: operation 0 registers buffers; the kernel holds the pages until the descriptor is closed.
            let held =
                unsafe { libc::syscall(libc::SYS_io_uring_register, fd, 0, &raw const buffer, 1) };
            assert_eq!(held, 0, "{}", std::io::Error::last_os_error());
            Some(Self {
                fd,
                rings: map(fd, 4096, 0),
                entries: map(fd, 4096, 0x1000_0000),
                params,
            })
        }

        fn word(&self, at: u32) -> &AtomicU32 {
            // SAFETY: a word of the rings, which are one mapping of less than a page for so few entries.
            unsafe {
                AtomicU32::from_ptr(ptr::with_exposed_provenance_mut(self.rings + at as usize))
            }
        }

        /// Has the kernel write `value` to the start of the buffer, through its own hold on it.
        pub(crate) fn read_into(&self, addr: usize, value: u64) {
            const READ_FIXED: u8 = 4;
            const GETEVENTS: u32 = 1;
            let mut pipe = [0; 2];
            // SAFETY: two descriptors are written.
            assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
            // SAFETY: eight bytes of a value on the stack.
            let written = unsafe { libc::write(pipe[1], (&raw const value).cast(), 8) };
            assert_eq!(written, 8);
            let entry = Entry {
                opcode: READ_FIXED,
                fd: pipe[0],
                offset: u64::MAX,
                addr: addr as u64,
                len: 8,
                ..Entry::default()
            };
            // SAFETY: the first entry, in a mapping of four.
            unsafe { ptr::with_exposed_provenance_mut::<Entry>(self.entries).write(entry) };
            self.word(self.params.sq[6]).store(0, Ordering::Relaxed);
            // Release: the kernel sees the entry with the tail.
            self.word(self.params.sq[1]).store(1, Ordering::Release);
            // SAFETY: no pointers.
            let taken =
                unsafe { libc::syscall(libc::SYS_io_uring_enter, self.fd, 1, 1, GETEVENTS, 0, 0) };
            assert_eq!(taken, 1);
            // Acquire: pairs with the kernel's store of the tail.
            assert_eq!(self.word(self.params.cq[1]).load(Ordering::Acquire), 1);
            // The first completion: its user data, and then the result.
            let result = self.word(self.params.cq[5] + 8).load(Ordering::Relaxed);
            assert_eq!(result, 8, "errno {}", result.cast_signed());
            for fd in pipe {
                // SAFETY: opened here.
                unsafe { libc::close(fd) };
            }
        }
    }

    impl Drop for Ring {
        fn drop(&mut self) {
            // SAFETY: opened by `holding`; the mappings stay until the process ends.
            unsafe { libc::close(self.fd) };
        }
    }
}

/// W6: what serves faults and applies events takes no memory of malloc's, whose locks the thread that faults, or the one whose event
/// it is, may hold.
#[test]
fn faults_and_events_are_served_without_malloc() {
    let _watchdog = Watchdog::new("without malloc");
    in_own_process("faults_and_events_are_served_without_malloc", &[""], || {
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

/// E1: an edge gets no event. A launch over one that has been unmapped is told so, when it begins or when it ends, and the mirror's body
/// goes on.
#[test]
fn an_edge_whose_mapping_has_gone_is_a_typed_error() {
    both_doors("edge unmapped", |options| {
        for gone_first in [true, false] {
            let map = Map::new(4);
            // SAFETY: the test's mapping, of which it unmaps the page with the edge.
            let mirror =
                unsafe { svm::mirror_raw(map.at(0).add(100), 4 * PAGE - 100, options) }.unwrap();
            let device = Idle::attach().unwrap();
            let mapped = device.map(mirror.view().region()).unwrap();
            // SAFETY: as above.
            let unmap = || assert_eq!(unsafe { libc::munmap(map.at(0).cast(), PAGE) }, 0);
            if gone_first {
                unmap();
            } else {
                // SAFETY: that the memory does not stay is what is tried; nothing else uses it.
                let begun = unsafe { mapped.begin_use(Access::Write) }.unwrap();
                unmap();
                let ended = begun.finish().unwrap_err();
                assert!(matches!(ended.kind(), ErrorKind::Unmapped), "{ended}");
            }
            // SAFETY: as above.
            let refused = unsafe { mapped.begin_use(Access::Write) }
                .map(drop)
                .unwrap_err();
            assert!(matches!(refused.kind(), ErrorKind::Unmapped), "{refused}");
            // Memory of somebody else's there is not written by a launch that began before.
            let mut range = device.range().unwrap();
            let page = (map.addr + PAGE - mapped.region().base()) / PAGE;
            fault_in(&mut range, &mapped, page..page + 3, Access::Write).unwrap();
            assert_eq!(map.read(1), 2);
            drop(range);
            mirror.close().unwrap();
            let _ = Map::at_hint(map.addr, 1, READ_WRITE, libc::MAP_FIXED_NOREPLACE);
            map.unmap();
        }
    });
}

/// S1: a fault comes between any two instructions, so `errno` is afterwards what it was before; here of one whose first system call
/// the kernel refuses.
#[test]
fn a_fault_leaves_errno_as_it_was() {
    both_doors("errno", |options| {
        let map = Map::new(4);
        let mirror = map.mirror(options);
        let device = Idle::attach().unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let mut range = device.range().unwrap();
        let page = (map.addr - mapped.region().base()) / PAGE;
        fault_in(&mut range, &mapped, page..page + 4, Access::Write).unwrap();
        // Pages are not moved between memory that is locked and memory that is not.
        // SAFETY: the test's mapping; nothing is populated.
        let locked = unsafe { libc::mlock2(map.at(0).cast(), PAGE, libc::MLOCK_ONFAULT) };
        assert_eq!(locked, 0);
        // SAFETY: this thread's own.
        unsafe { *libc::__errno_location() = 4242 };
        let value = map.read(0);
        // SAFETY: as above.
        let errno = unsafe { *libc::__errno_location() };
        assert_eq!((value, errno), (1, 4242));
        assert!(
            mirror.stats().copy_calls > 0,
            "nothing was refused: {:?}",
            mirror.stats()
        );
        drop(range);
        mirror.close().unwrap();
        map.unmap();
    });
}

/// S1: a signal handler that touches mirrored memory, as a profiler's may, finds no lock of the runtime taken by its own thread.
#[test]
fn a_profilers_handler_may_touch_what_the_thread_is_faulting_on() {
    static AT: AtomicUsize = AtomicUsize::new(0);
    static RAN: AtomicU32 = AtomicU32::new(0);
    extern "C" fn on_alarm(_: libc::c_int) {
        let at = AT.load(Ordering::Relaxed);
        if at != 0 {
            // SAFETY: the mirrored page that the test has named.
            unsafe {
                ptr::with_exposed_provenance_mut::<u64>(at + 8).write_volatile(1);
            };
            RAN.fetch_add(1, Ordering::Relaxed);
        }
    }
    both_doors("profiler", |options| {
        let map = Map::new(4);
        let mirror = map.mirror(options);
        let device = Idle::attach().unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let mut range = device.range().unwrap();
        let page = (map.addr - mapped.region().base()) / PAGE;
        // SAFETY: a handler that does what the test is about.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_alarm as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut());
        }
        // SAFETY: no preconditions.
        let this = unsafe { libc::pthread_self() };
        let stop = AtomicBool::new(false);
        AT.store(map.addr, Ordering::Relaxed);
        let before = RAN.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // SAFETY: the thread that waits at the end of this scope.
                    unsafe { libc::pthread_kill(this, libc::SIGALRM) };
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
            for turn in 0..2000 {
                {
                    let _worker = svm::worker_thread();
                    fault_in(&mut range, &mapped, page..page + 1, Access::Write).unwrap();
                }
                map.write(0, turn);
            }
            stop.store(true, Ordering::Relaxed);
        });
        AT.store(0, Ordering::Relaxed);
        assert!(
            RAN.load(Ordering::Relaxed) > before + 50,
            "the handler hardly ran"
        );
        drop(range);
        mirror.close().unwrap();
        map.unmap();
    });
}

/// A stale window page that somebody has pinned is nobody's contents. It keeps its mirror neither from closing nor from being made anew.
#[test]
fn pinned_stale_frames_keep_no_mirror_from_closing() {
    // Many of both, so that what is discarded again and again would be more than there is room for.
    const NR_PAGES: usize = 512;
    const NR_PINNED: usize = 16;
    both_doors("stale and pinned", |options| {
        let map = Map::new(NR_PAGES);
        let device = TestDevice::new().unwrap();
        for round in 0..2 {
            let mirror = map.mirror(&options.clone().read_mostly(true));
            let view = mirror.view();
            let mut out = vec![0; NR_PAGES * PAGE];
            device.read(view.region(), view.addr(), &mut out).unwrap();
            let offset = device.attachment().map(view.region()).unwrap().offset();
            let frames = map.addr.wrapping_add_signed(offset) + 3 * PAGE;
            let Some(ring) = ring::Ring::holding(frames, NR_PINNED * PAGE) else {
                tests::skip("no io_uring here");
                return;
            };
            // What the device has of them is stale from here on.
            (0..NR_PAGES).for_each(|page| map.write(page, 40 + round));
            mirror.close().unwrap();
            assert!((0..NR_PAGES).all(|page| map.read(page) == 40 + round));
            assert_eq!(device.attachment().resident_bytes(), 0);
            drop(ring);
        }
        map.unmap();
    });
}

/// F1: what cannot come home is not inherited; and it keeps nothing else from coming home, not even behind it in the same region.
#[test]
fn a_child_reads_no_zeros_beside_a_page_that_cannot_come_home() {
    const NR_PAGES: usize = 3 * 512;
    let name = "a_child_reads_no_zeros_beside_a_page_that_cannot_come_home";
    both_doors_alone(name, "stuck at a fork", |options| {
        let map = Map::new(NR_PAGES);
        let mirror = map.mirror(options);
        let device = Idle::attach().unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let mut range = device.range().unwrap();
        let index = |page: usize| (map.addr - mapped.region().base()) / PAGE + page;
        for page in [1, 5, NR_PAGES - 1] {
            fault_in(
                &mut range,
                &mapped,
                index(page)..index(page) + 1,
                Access::Write,
            )
            .unwrap();
        }
        let frame =
            ptr::with_exposed_provenance_mut(map.at(1).addr().wrapping_add_signed(mapped.offset()));
        // SAFETY: a frame of the device's, which no code uses: it is lost, as it would be to a fault of the memory.
        let dropped = unsafe { libc::madvise(frame, PAGE, libc::MADV_DONTNEED) };
        assert_eq!(dropped, 0);
        // SAFETY: the child reads a word and ends, one way or another.
        let child = unsafe { libc::fork() };
        assert!(child >= 0, "{}", std::io::Error::last_os_error());
        if child == 0 {
            let found = map
                .read(NR_PAGES - 1)
                .min(map.read(5) + NR_PAGES as u64 - 6);
            // SAFETY: ends the child, without the parent's destructors.
            unsafe { libc::_exit(if found == NR_PAGES as u64 { 0 } else { 9 }) };
        }
        let mut status = 0;
        // SAFETY: waits for the child just made.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert!(
            libc::WIFSIGNALED(status) || libc::WEXITSTATUS(status) == 0,
            "the child read something else: {status:#x}"
        );
        // Behind the one that is lost, in the same block and in another, pages are home.
        assert_eq!(device.resident_bytes(), PAGE);
        assert_eq!(map.read(NR_PAGES - 1), NR_PAGES as u64);
        drop(range);
        let lost = mirror.close().unwrap_err();
        assert!(matches!(lost.kind(), ErrorKind::Lost), "{lost}");
    });
}

/// F2: a userfaultfd acts on the memory of the process that opened it, whoever holds it. So a forked child has none left.
#[test]
fn a_forked_child_holds_none_of_its_parents_userfaultfds() {
    fn nr_userfaultfds() -> usize {
        let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let targets = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        targets
            .filter(|target| target.to_string_lossy().contains("userfaultfd"))
            .count()
    }
    let name = "a_forked_child_holds_none_of_its_parents_userfaultfds";
    both_doors_alone(name, "descriptors of a child", |options| {
        let map = Map::new(4);
        let mirror = map.mirror(options);
        assert!(nr_userfaultfds() > 0, "the parent's own do not show");
        // SAFETY: the child looks at its descriptors and ends; glibc keeps malloc usable in it.
        match unsafe { libc::fork() } {
            -1 => panic!("fork: {}", std::io::Error::last_os_error()),
            // SAFETY: ends the child, without the parent's destructors.
            0 => unsafe { libc::_exit(nr_userfaultfds().min(100) as i32) },
            child => {
                let mut status = 0;
                // SAFETY: waits for the child just made.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert!(libc::WIFEXITED(status), "{status:#x}");
                assert_eq!(libc::WEXITSTATUS(status), 0, "userfaultfds in the child");
            }
        }
        mirror.close().unwrap();
        map.unmap();
    });
}

/// F1: a device's frames are not inherited, not even by a child that ran no handler of ours: shared with it, they could not be moved
/// home while it lives.
#[test]
fn frames_move_home_beside_a_child_that_nobody_has_prepared() {
    let name = "frames_move_home_beside_a_child_that_nobody_has_prepared";
    both_doors_alone(name, "raw clone", |options| {
        let map = Map::new(8);
        let mirror = map.mirror(options);
        let device = Idle::attach().unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let mut range = device.range().unwrap();
        let page = (map.addr - mapped.region().base()) / PAGE;
        fault_in(&mut range, &mapped, page..page + 8, Access::Write).unwrap();
        // SAFETY: a child like fork's, but no handler runs; it waits for its end and touches nothing.
        let child = unsafe {
            let child = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
            if child == 0 {
                loop {
                    libc::syscall(libc::SYS_pause);
                }
            }
            child as i32
        };
        assert!(child > 0, "{}", std::io::Error::last_os_error());
        let before = mirror.stats();
        let values: Vec<u64> = (0..8).map(|page| map.read(page)).collect();
        let after = mirror.stats() - before;
        // SAFETY: the child made above.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, ptr::null_mut(), 0);
        }
        assert_eq!(values, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!((after.move_calls, after.copy_calls), (8, 0), "{after:?}");
        drop(range);
        mirror.close().unwrap();
        map.unmap();
    });
}

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

/// H1: a huge page stays one on its way to a device, home, and to the device again, whose window has had pages there before.
#[test]
fn a_huge_page_stays_huge_wherever_it_goes() {
    const TRIES: usize = 5;
    both_doors("huge", |options| {
        // The kernel may split a huge page at any time, to compact memory or to look who uses it; but not each time.
        let mut lost = Vec::new();
        for _ in 0..TRIES {
            match moved_as_they_were(options) {
                Ok(()) => return,
                Err(what) => lost.push(what),
            }
        }
        panic!("{lost:?}");
    });
}

/// Moves huge pages to a device and home again, and says when there were fewer of them.
fn moved_as_they_were(options: &Options) -> Result<(), String> {
    const BLOCK_BYTES: usize = 2 << 20;
    let options = options.clone().granule(Granule::Huge).huge_pages(true);
    let mut buffer = svm::Buffer::<u8>::with_options(4 * BLOCK_BYTES, &options).unwrap();
    buffer.as_mut_slice().fill(7);
    let device = TestDevice::new().unwrap();
    let addr = buffer.view().addr();
    let nr_huge = || {
        let pages = svm::snapshot(addr, 4 * BLOCK_BYTES / PAGE).unwrap();
        pages.iter().filter(|page| page.is_huge()).count()
    };
    let at_first = nr_huge();
    if at_first == 0 {
        tests::skip("no huge pages here, or the kernel does not say");
        return Ok(());
    }
    let as_they_were = |what: &str, turn: usize| match nr_huge() {
        now if now == at_first => Ok(()),
        now => Err(format!("{what}, turn {turn}: {now} of {at_first}")),
    };
    for turn in 0..3 {
        let view = buffer.view_mut();
        device
            .fault_in(view.region(), addr, 4 * BLOCK_BYTES, Access::Write)
            .unwrap();
        assert!(buffer.stats().to_device_pages() > 0);
        as_they_were("with the device", turn)?;
        device.release().unwrap();
        as_they_were("home again", turn)?;
    }
    assert!(buffer.as_slice().iter().all(|&byte| byte == 7));
    Ok(())
}

/// G2: before an event is read the devices are paused, for a moment. What outstays that is counted, for the event's cause may be a kernel
/// itself, and then it is nobody's fault.
#[test]
fn an_access_that_outstays_a_pause_is_counted() {
    let _watchdog = Watchdog::with_timeout("outstayed", Duration::from_secs(30));
    let capabilities = Capabilities::probe();
    if !usable() || !capabilities.has(Capability::Events) || !capabilities.has(Capability::Move) {
        return;
    }
    for delivery in [Delivery::Inline, Delivery::Thread] {
        let map = Map::new(4);
        let mirror = map.mirror(&Options::new().delivery(delivery));
        // Its accesses never end, by its own word.
        let device = Idle::attach().unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let before = mirror.stats().outstayed_pauses;
        discard(&map, 1..2);
        let after = mirror.stats().outstayed_pauses;
        // Through the thread door nobody is paused. Through the other it is also for what tests beside this one discard.
        assert_eq!(after > before, delivery == Delivery::Inline, "{delivery:?}");
        drop(mapped);
        mirror.close().unwrap();
        map.unmap();
    }
}

fn discard(map: &Map, pages: std::ops::Range<usize>) {
    let (at, len) = (map.at(pages.start), pages.len() * PAGE);
    // SAFETY: the test's mapping, whose contents nobody counts on.
    let outcome = unsafe { libc::madvise(at.cast(), len, libc::MADV_DONTNEED) };
    assert_eq!(outcome, 0);
}

/// G3: a marker looks like a page that is swapped out, and no discard takes it away. So a discard that waited for every entry to be
/// empty would wait for ever; it waits for a moment.
#[test]
fn a_marker_holds_a_discard_up_for_a_moment_only() {
    const GUARD_INSTALL: i32 = 102;
    both_doors("marker", |options| {
        let map = Map::new(8);
        let mirror = map.mirror(options);
        let device = TestDevice::new().unwrap();
        // SAFETY: the test's mapping: a marker that makes an access to the page fail.
        if unsafe { libc::madvise(map.at(3).cast(), PAGE, GUARD_INSTALL) } != 0 {
            tests::skip("no guard pages before Linux 6.13");
            return;
        }
        discard(&map, 0..8);
        let (view, mut out) = (mirror.view(), [1; PAGE]);
        device
            .read(view.region(), view.addr() + 2 * PAGE, &mut out)
            .unwrap();
        assert_eq!(out, [0; PAGE], "a discarded page reads as zeros");
        assert_eq!(map.read(4), 0);
        let marked = svm::snapshot(map.addr, 8).unwrap()[3];
        assert!(!marked.is_present(), "the discard took the marker away");
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
    let name = "nothing_but_faults_waits_for_a_promised_page";
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

/// F1: between our prepare handler and the fork other handlers run, and what they touch is served: a hole, and what has just come home.
#[test]
fn what_another_fork_handler_touches_is_served() {
    unsafe extern "C" {
        fn pthread_atfork(
            prepare: Option<extern "C" fn()>,
            parent: Option<extern "C" fn()>,
            child: Option<extern "C" fn()>,
        ) -> i32;
    }
    static PAGES: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn touch() {
        let pages = PAGES.load(Ordering::Relaxed);
        for page in 0..if pages == 0 { 0 } else { 4 } {
            let word = ptr::with_exposed_provenance_mut::<u64>(pages + page * PAGE);
            // SAFETY: the test's mapping, which it names here while it is there.
            unsafe { word.write_volatile(word.read_volatile() + 10) };
        }
    }
    in_own_process(
        "what_another_fork_handler_touches_is_served",
        &["", "move"],
        || {
            // Prepare handlers run in the reverse order of their registration: before ours is registered, so that it runs after it.
            // SAFETY: the handler lives as long as the process.
            assert_eq!(unsafe { pthread_atfork(Some(touch), None, None) }, 0);
            both_doors("another handler", |options| {
                let map = Map::new(2);
                let holes = Map::at_hint(map.addr + 2 * PAGE, 2, READ_WRITE, 0);
                assert_eq!(holes.addr, map.addr + 2 * PAGE);
                let map = Map { pages: 4, ..map };
                let mirror = map.mirror(options);
                let device = Idle::attach().unwrap();
                let mapped = device.map(mirror.view().region()).unwrap();
                let mut range = device.range().unwrap();
                let page = (map.addr - mapped.region().base()) / PAGE;
                fault_in(&mut range, &mapped, page..page + 2, Access::Write).unwrap();
                PAGES.store(map.addr, Ordering::Relaxed);
                let values = || (0..4).map(|page| map.read(page));
                // SAFETY: the child reads its memory and ends.
                match unsafe { libc::fork() } {
                    -1 => panic!("fork: {}", std::io::Error::last_os_error()),
                    0 => {
                        let same = values().eq([11, 12, 10, 10]);
                        // SAFETY: ends the child, without the parent's destructors.
                        unsafe { libc::_exit(i32::from(!same)) }
                    }
                    child => {
                        let mut status = 0;
                        // SAFETY: waits for the child just made.
                        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                        assert_eq!(status, 0, "the child finds what the handler wrote");
                    }
                }
                PAGES.store(0, Ordering::Relaxed);
                assert!(values().eq([11, 12, 10, 10]));
                mirror.close().unwrap();
                map.unmap();
            });
        },
    );
}

/// G5: whoever copies pages inside the gate does not wait for the monitor, which waits for the gate. A page that the kernel takes away in
/// the middle of the copy is missing, and where the monitor serves the kernel's accesses, too, the copy is such an access.
#[test]
fn a_page_that_leaves_as_it_is_copied_holds_nobody_up() {
    // Others count calls, which a mapping that changes makes more of.
    in_own_process(
        "a_page_that_leaves_as_it_is_copied_holds_nobody_up",
        &[""],
        || both_doors("leaves as it is copied", leave_as_it_is_copied),
    );
}

fn leave_as_it_is_copied(options: &Options) {
    const PAGES: usize = 512;
    let device = TestDevice::new().unwrap();
    for round in 0..200 {
        let map = Map::new(PAGES);
        let mirror = map.mirror(&options.clone().granule(Granule::Huge));
        // What may not be written is copied, not moved.
        let protect = |prot| {
            // SAFETY: memory of the test's.
            let outcome = unsafe { libc::mprotect(map.at(0).cast(), PAGES * PAGE, prot) };
            assert_eq!(outcome, 0);
        };
        protect(libc::PROT_READ);
        let started = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !started.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                (0..round * 100).for_each(|_| std::hint::spin_loop());
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
                let half = PAGES / 2 * PAGE;
                // SAFETY: memory of the test's, which it does not touch there any more.
                let moved =
                    unsafe { libc::mremap(map.at(PAGES / 2).cast(), half, half, flags, 0_usize) };
                assert_ne!(moved, libc::MAP_FAILED);
                // SAFETY: the test is done with it.
                assert_eq!(unsafe { libc::munmap(moved, half) }, 0);
            });
            started.store(true, Ordering::Release);
            let view = mirror.view();
            for page in [0, PAGES - 1] {
                let at = map.at(page).addr();
                if let Err(error) = device.fault_in(view.region(), at, 1, Access::Read) {
                    let kind = error.device_fault().map(|fault| fault.kind);
                    assert_eq!(kind, Some(DeviceFaultKind::Unmapped), "{error}");
                }
            }
        });
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
        protect(READ_WRITE);
        assert_eq!(map.read(0), 1);
        map.unmap();
    }
}
