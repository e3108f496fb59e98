//! The twins that migrate huge pages: empty ones, zeros, freed ones, without device memory for them; and ranges that are moved, or
//! unmapped in part, meanwhile.

use std::os::unix::fs::FileExt;
use std::ptr;

use svm::Capability;
use tests::mm::prot;

use crate::fixture::{Fixture, each, error, migrated};
use crate::map::{Map, READ, WRITE, advise, check, holds, init, ints, load, remap, unmap};
use crate::{HUGE, PAGE, has, sees_zero_pages};

#[test]
fn migrate_anon_huge_empty() {
    each("migrate_anon_huge_empty", |f| {
        let (_map, addr) = Map::huge(READ);
        let mut out = vec![0xff; HUGE];
        assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
        assert!(holds(&out, |_| 0));
        assert!(check(addr, HUGE, |_| 0));
    });
}

#[test]
fn migrate_anon_huge_zero() {
    each("migrate_anon_huge_zero", |f| {
        let (_map, addr) = Map::huge(READ);
        assert_eq!(load(addr, 0), 0);
        let mut out = vec![0xff; HUGE];
        assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
        assert!(holds(&out, |_| 0));
        assert!(check(addr, HUGE, |_| 0));
    });
}

#[test]
fn migrate_anon_huge_free() {
    each("migrate_anon_huge_free", |f| {
        let (_map, addr) = Map::huge(WRITE);
        init(addr, HUGE, |k| k);
        let mut out = vec![0; HUGE];
        assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
        assert!(holds(&out, |k| k));
        advise(addr, HUGE, libc::MADV_FREE);
        // The old contents or zeros, as after any MADV_FREE. (Where the kernel tells of it, what the device held is gone.)
        let pages = || (0..HUGE / 4).step_by(PAGE / 4);
        assert!(pages().all(|k| [k as i32, 0].contains(&load(addr, k))));
        init(addr, HUGE, |k| k + 1);
        assert!(check(addr, HUGE, |k| k + 1), "{:?}", f.options);
    });
}

/// Whether the page table has something at each page, swapped or not, by the kernel's word.
fn in_page_table(addr: usize, npages: usize) -> Vec<bool> {
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut entries = vec![0; npages * 8];
    pagemap
        .read_exact_at(&mut entries, (addr / PAGE * 8) as u64)
        .unwrap();
    let entries = entries.as_chunks().0.iter();
    entries
        .map(|entry| u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0)
        .collect()
}

/// Has the kernel make a huge page of what is there; says so if it will not.
fn collapse(addr: usize) -> bool {
    let at = ptr::with_exposed_provenance_mut(addr);
    // SAFETY: advice on a mapping of the test's own.
    if unsafe { libc::madvise(at, HUGE, libc::MADV_COLLAPSE) } == 0 {
        return true;
    }
    tests::skip(format!(
        "MADV_COLLAPSE: {}",
        std::io::Error::last_os_error()
    ));
    false
}

#[test]
fn migrate_anon_huge_fault() {
    each("migrate_anon_huge_fault", |f| {
        let (_map, addr) = Map::huge(WRITE);
        init(addr, HUGE, |k| k);
        let collapsed = collapse(addr);
        let snapshot = || f.dev.snapshot(addr, HUGE / PAGE).unwrap();
        // Without PAGEMAP_SCAN the kernel does not say; and where pages are copied for want of MOVE, they are small ones.
        let pmd = if collapsed && sees_zero_pages() {
            assert_eq!(snapshot(), [prot::WRITE | prot::PMD; HUGE / PAGE]);
            prot::PMD
        } else {
            0
        };
        let moved = if has(Capability::Move) { pmd } else { 0 };
        let mut out = vec![0; HUGE];
        assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
        assert!(holds(&out, |k| k));
        let held = prot::DEV_PRIVATE_LOCAL | prot::WRITE | moved;
        assert_eq!(snapshot(), [held; HUGE / PAGE], "{:?}", f.options);
        assert_eq!(in_page_table(addr, HUGE / PAGE), [false; HUGE / PAGE]);
        assert!(check(addr, HUGE, |k| k));
        assert_eq!(in_page_table(addr, HUGE / PAGE), [true; HUGE / PAGE]);
    });
}

/// Allocation of device memory fails: small pages first, then in place; never an error, never lost data.
fn under_failures(f: &Fixture, failures: usize, touch: bool) {
    let npages = HUGE / PAGE;
    // The first failure is the huge page's; each further one costs a small page.
    let in_place = failures - 1;
    let (_map, addr) = Map::huge(WRITE);
    if touch {
        init(addr, HUGE, |k| k);
    }
    let want = |k: i32| if touch { k } else { 0 };
    let attachment = f.dev.device().attachment();
    let before = attachment.stats();
    attachment.fail_next_allocations(failures);
    let mut out = vec![0xff; HUGE];
    let done = f.dev.migrate_to_dev(addr, &mut out);
    if in_place == 0 {
        assert_eq!(done, migrated(npages));
    } else {
        assert_eq!(
            done,
            error(libc::ENOENT),
            "a page that got no frame is not migrated"
        );
    }
    let stats = attachment.stats() - before;
    let moved = npages - in_place;
    assert_eq!(attachment.resident_bytes(), moved * PAGE);
    assert_eq!(stats.to_device_explicit_pages, moved as u64);
    assert_eq!(
        stats.to_device_runs, moved as u64,
        "each by itself: small pages"
    );
    let snapshot = svm::snapshot(addr, npages).unwrap();
    let (left, gone) = snapshot.split_at(in_place);
    assert!(left.iter().all(|page| !page.is_on_a_device()));
    assert!(gone.iter().all(|page| page.is_held_by(attachment)));

    // The device reads and writes them all, those that are left where the CPU has them.
    assert_eq!(f.dev.read(addr, &mut out).unwrap().cpages, npages);
    assert!(holds(&out, want));
    assert_eq!(f.dev.write(addr, &out).unwrap().cpages, npages);
    assert_eq!(attachment.resident_bytes(), moved * PAGE);
    let mirror = f.dev.mirror_of(addr, npages).unwrap();
    let region = mirror.view().region();
    let first = (addr - region.base()) / PAGE;
    let blocks = f.dev.device().snapshot(region, first..first + npages);
    let [(writable, used_in_place)] = blocks.unwrap()[..] else {
        panic!("more than a block");
    };
    assert_eq!(writable.count(), npages);
    assert_eq!(used_in_place, svm::PageMask::range(0..in_place));
    let snapshot = f.dev.snapshot(addr, npages).unwrap();
    assert!(snapshot[..in_place].iter().all(|&m| m == prot::WRITE));
    attachment.fail_next_allocations(0);
    assert!(check(addr, HUGE, want));
}

#[test]
fn migrate_anon_huge_err() {
    each("migrate_anon_huge_err", |f| {
        under_failures(f, 1, true);
        under_failures(f, 3, true);
    });
}

#[test]
fn migrate_anon_huge_zero_err() {
    each("migrate_anon_huge_zero_err", |f| {
        under_failures(f, 1, false);
        under_failures(f, 3, false);
    });
}

/// Of later kernels: what is left of a range that was unmapped in part comes home.
#[test]
fn migrate_partial_unmap_fault() {
    each("migrate_partial_unmap_fault", |f| {
        for (thp, offset) in thp_and_offsets() {
            let (map, addr) = Map::aligned(2 * HUGE, WRITE, thp);
            init(addr, HUGE, |k| k);
            let mut out = vec![0xff; HUGE];
            assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(HUGE / PAGE));
            assert!(holds(&out, |k| k));
            let hole = offset..offset + HUGE / 2;
            map.unmap((addr - map.addr + hole.start) / PAGE, hole.len() / PAGE);
            // To the device it is a hole at once; the rest is its own still.
            assert_eq!(f.dev.read(addr, &mut out), error(libc::EFAULT));
            let hole_at = addr + hole.start;
            assert_eq!(
                f.dev.read(hole_at, &mut out[..PAGE]),
                error(libc::EFAULT),
                "{:?}",
                f.options
            );
            for part in [0..hole.start, hole.end..HUGE] {
                if !part.is_empty() {
                    let out = &mut out[part.clone()];
                    out.fill(0xff);
                    assert_eq!(
                        f.dev.read(addr + part.start, out).unwrap().cpages,
                        part.len() / PAGE
                    );
                }
            }
            let left = || ints(HUGE).filter(|&k| !hole.contains(&(4 * k)));
            let words = out.as_chunks().0;
            assert!(left().all(|k| i32::from_ne_bytes(words[k]) == k as i32));
            assert!(left().all(|k| load(addr, k) == k as i32));
        }
    });
}

/// Whether the kernel is asked for a huge page, and where in it something happens.
fn thp_and_offsets() -> impl Iterator<Item = (bool, usize)> {
    [false, true]
        .into_iter()
        .flat_map(|thp| [0, HUGE / 4, HUGE / 2].map(|offset| (thp, offset)))
}

/// Of later kernels: a range moves to other addresses before it migrates, or after; what is away comes home where its mapping is.
#[test]
fn migrate_remap_fault() {
    each("migrate_remap_fault", |f| {
        for (before, dont_unmap) in [(false, false), (false, true), (true, false), (true, true)] {
            for (thp, offset) in thp_and_offsets() {
                let case =
                    format!("before {before}, DONTUNMAP {dont_unmap}, thp {thp}, {offset:#x}");
                let (map, addr) = Map::aligned(8 * HUGE, WRITE, thp);
                map.unmap((addr - map.addr + HUGE) / PAGE, 2 * HUGE / PAGE);
                init(addr, HUGE, |k| k);
                let (flags, to) = if dont_unmap {
                    (libc::MREMAP_DONTUNMAP, addr + HUGE + offset)
                } else {
                    map.lost(addr, HUGE);
                    (0, addr + HUGE + offset)
                };
                if before {
                    remap(addr, flags, to);
                }
                let at = if before { to } else { addr };
                let mut out = vec![0xff; HUGE];
                assert_eq!(f.dev.migrate_to_dev(at, &mut out), migrated(HUGE / PAGE));
                assert!(holds(&out, |k| k), "{case}");
                if !before {
                    remap(addr, flags, to);
                }
                assert!(check(to, HUGE, |k| k), "{case} {:?}", f.options);
                if dont_unmap {
                    assert!(check(addr, HUGE, |_| 0), "{case}: what was left behind");
                }
                // And migrates again from there.
                init(to, HUGE, |k| k + 1);
                assert_eq!(f.dev.migrate_to_dev(to, &mut out), migrated(HUGE / PAGE));
                assert!(holds(&out, |k| k + 1), "{case}");
                assert!(check(to, HUGE, |k| k + 1), "{case}");
                unmap(to, HUGE);
            }
        }
    });
}
