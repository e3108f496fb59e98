//! Mappings at a fork: what has grown, what lies beside a mirror, and what a child unmaps.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use svm::{Access, Options};
use tests::mapping::READ_WRITE;
use tests::{Map, TestDevice, Watchdog, each_option, in_own_process, usable};

use crate::PAGE;
use crate::fixture::{SetOnDrop, at_fork_before_ours, in_child};

/// What lies beside a mirror in the same mapping, until that is registered and when it no longer is, is not the mirror's: children have it.
#[test]
fn what_lies_beside_a_mirror_is_inherited_as_it_comes_and_goes() {
    let _watchdog = Watchdog::new("beside");
    if !usable() {
        return;
    }
    let map = Map::new(64);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let part = map.at(8);
            while !over.load(Ordering::Relaxed) {
                // SAFETY: memory of the test's, which nobody changes.
                let mirror = unsafe { svm::mirror_raw(part, 16 * PAGE, &Options::new()) };
                mirror.unwrap().close().unwrap();
            }
        });
        let _over = SetOnDrop(&over);
        for _ in 0..300 {
            assert!(in_child(|| {
                (0..64).all(|page| map.read(page) == page as u64 + 1)
            }));
        }
    });
    map.unmap();
}

/// Pages of the memory that is looked at between the preparation of a fork and the fork: where it is, and how many, or none.
static GROWN: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];

extern "C" fn use_what_has_grown() {
    let [at, pages] = [0, 1].map(|i| GROWN[i].load(Ordering::SeqCst));
    if pages == 0 {
        return;
    }
    let map = Map { addr: at, pages };
    assert_eq!(map.read(pages - 1), 0);
    map.write(pages - 2, 7);
    // It is one mapping, so it can be moved by one call.
    let room = Map::apart(pages, libc::PROT_NONE);
    for (from, to) in [(at, room.addr), (room.addr, at)] {
        let [from, to] = [from, to].map(std::ptr::with_exposed_provenance_mut);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: memory of the test's, and room of its own.
        let moved = unsafe { libc::mremap(from, pages * PAGE, pages * PAGE, flags, to) };
        assert_eq!(moved, to, "{}", std::io::Error::last_os_error());
    }
}

/// Memory that a mirrored mapping has grown by belongs with it, also while a fork is under way: of such growth the kernel tells nobody.
#[test]
fn what_has_grown_is_inherited_with_what_it_grew_from() {
    let name = "grown::what_has_grown_is_inherited_with_what_it_grew_from";
    in_own_process(name, &["", "procmap_query"], || {
        at_fork_before_ours(Some(use_what_has_grown), None);
        each_option("grown", |options| {
            for is_left_behind in [false, true] {
                grow_and_fork(options, is_left_behind);
            }
        });
    });
}

fn grow_and_fork(options: &Options, is_left_behind: bool) {
    const PAGES: usize = 16;
    let reserved = Map::apart(4 * PAGES, libc::PROT_NONE);
    let map = Map::at_hint(reserved.addr, PAGES, READ_WRITE, libc::MAP_FIXED);
    (0..PAGES).for_each(|page| map.write(page, page as u64 + 1));
    let mut mirror = map.mirror(options);
    let device = TestDevice::new().unwrap();
    let view = mirror.view_mut();
    device
        .fault_in(view.region(), view.addr(), view.len(), Access::Write)
        .unwrap();
    let remap = |old: usize, new: usize, flags: i32, to: usize| {
        let [from, to] = [map.addr, to].map(std::ptr::with_exposed_provenance_mut);
        // SAFETY: memory of the test's, and room of its own.
        let now = unsafe { libc::mremap(from, old * PAGE, new * PAGE, flags, to) };
        assert_ne!(now, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        now.expose_provenance()
    };
    const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let room = Map::apart(2 * PAGES, libc::PROT_NONE);
    let addr = if is_left_behind {
        let elsewhere = Map::apart(PAGES, libc::PROT_NONE);
        remap(PAGES, PAGES, MOVE | libc::MREMAP_DONTUNMAP, elsewhere.addr);
        remap(PAGES, 2 * PAGES, MOVE, room.addr)
    } else {
        // SAFETY: what was reserved.
        let outcome = unsafe { libc::munmap(map.at(PAGES).cast(), 3 * PAGES * PAGE) };
        assert_eq!(outcome, 0);
        remap(PAGES, 2 * PAGES, 0, 0)
    };
    let pages = 2 * PAGES;
    let grown = Map { addr, pages };
    GROWN[0].store(addr, Ordering::SeqCst);
    GROWN[1].store(grown.pages, Ordering::SeqCst);
    let is_right = || {
        let word = |page| match page {
            _ if page < PAGES && !is_left_behind => page as u64 + 1,
            _ if page == pages - 2 => 7,
            _ => 0,
        };
        (0..pages).all(|page| grown.read(page) == word(page))
    };
    assert!(in_child(is_right));
    GROWN[1].store(0, Ordering::SeqCst);
    mirror.close().unwrap();
    // What was never touched while it was mirrored is memory like any other.
    assert!(is_right());
    assert!(in_child(is_right));
}

/// The address space of a map is the parent's, and its end is told to nobody, in the child: it can unmap what it has inherited.
#[test]
fn a_child_unmaps_what_was_mirrored() {
    each_option("unmap", |options| {
        let map = Map::new(16);
        let mirror = map.mirror(options);
        let device = TestDevice::new().unwrap();
        let view = mirror.view();
        let fault_in = || {
            device
                .fault_in(view.region(), view.addr(), view.len_bytes(), Access::Write)
                .unwrap();
        };
        fault_in();
        assert!(in_child(|| {
            let there = (0..16).all(|page| map.read(page) == page as u64 + 1);
            // SAFETY: the child's own copy of it.
            let discarded = unsafe { svm::madvise(map.at(0), 8 * PAGE, libc::MADV_DONTNEED) };
            let zero = map.read(0) == 0 && map.read(8) == 9;
            map.unmap();
            there && discarded.is_ok() && zero
        }));
        fault_in();
        assert!((0..16).all(|page| map.read(page) == page as u64 + 1));
        mirror.close().unwrap();
        map.unmap();
    });
}
