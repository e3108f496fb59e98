//! F: forks, each in a process of its own.

use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use svm::{Access, ErrorKind};
use tests::idle::{Idle, fault_in};
use tests::mapping::READ_WRITE;
use tests::{Map, in_own_process};

use crate::PAGE;
use crate::fixture::{both_doors, both_doors_alone};

/// F1: what cannot come home is not inherited; and it keeps nothing else from coming home, not even behind it in the same region.
#[test]
fn a_child_reads_no_zeros_beside_a_page_that_cannot_come_home() {
    const NR_PAGES: usize = 3 * 512;
    let name = "forks::a_child_reads_no_zeros_beside_a_page_that_cannot_come_home";
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
    let name = "forks::a_forked_child_holds_none_of_its_parents_userfaultfds";
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
    let name = "forks::frames_move_home_beside_a_child_that_nobody_has_prepared";
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
        "forks::what_another_fork_handler_touches_is_served",
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
