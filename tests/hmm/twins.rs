//! The twins of the kernel's, but for those that go by system calls (`pinned`) and those that migrate huge pages (`huge`).

use std::os::fd::AsRawFd;

use svm::Capability;
use tests::mm::{Errno, prot};

use crate::fixture::{Fixture, each, error, in_child, migrated, temporary_file, whole};
use crate::map::{Map, READ, WRITE, check, holds, hugetlb, init, ints, load, mirror, store};
use crate::{HUGE, NPAGES, PAGE, SIZE, has, sees_zero_pages};

const NTIMES: usize = 10;

#[test]
fn open_close() {
    each("open_close", |_| ());
}

#[test]
fn anon_read() {
    each("anon_read", |f| {
        let map = Map::new(SIZE, WRITE);
        // The first page stays a hole, the second will be the page of zeros.
        let first = 2 * PAGE / 4;
        ints(SIZE)
            .filter(|&k| k >= first)
            .for_each(|k| store(map.addr, k, k as i32));
        map.protect(0, NPAGES, READ);
        assert_eq!(load(map.page(1), 0), 0);
        let mut out = mirror(SIZE, |_| -1);
        assert_eq!(
            f.dev.read(map.addr, &mut out),
            whole(NPAGES),
            "{:?}",
            f.options
        );
        assert!(holds(&out, |k| if (k as usize) < first { 0 } else { k }));
        assert!(check(map.addr, SIZE, |k| if (k as usize) < first {
            0
        } else {
            k
        }));
    });
}

#[test]
fn anon_read_prot() {
    each("anon_read_prot", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = mirror(SIZE, |k| -k);
        map.protect(0, NPAGES, libc::PROT_NONE);
        assert_eq!(f.dev.read(map.addr, &mut out), error(libc::EFAULT));
        map.protect(0, NPAGES, READ);
        assert!(check(map.addr, SIZE, |k| k));
        assert!(holds(&out, |k| -k), "something was copied");
    });
}

#[test]
fn anon_write() {
    each("anon_write", |f| {
        let map = Map::new(SIZE, WRITE);
        assert_eq!(f.dev.write(map.addr, &mirror(SIZE, |k| k)), whole(NPAGES));
        assert!(check(map.addr, SIZE, |k| k));
    });
}

#[test]
fn anon_write_prot() {
    each("anon_write_prot", |f| {
        let map = Map::new(SIZE, READ);
        let mut one = vec![1; PAGE];
        assert_eq!(f.dev.read(map.addr, &mut one), whole(1));
        assert!(holds(&one, |_| 0));
        let data = mirror(SIZE, |k| k);
        assert_eq!(f.dev.write(map.addr, &data), error(libc::EPERM));
        assert!(check(map.addr, SIZE, |_| 0));
        map.protect(0, NPAGES, WRITE);
        assert_eq!(
            f.dev.write(map.addr, &data),
            whole(NPAGES),
            "{:?}",
            f.options
        );
        assert!(check(map.addr, SIZE, |k| k));
    });
}

#[test]
fn anon_write_child() {
    each("anon_write_child", |f| {
        for (migrate, thp) in [(false, false), (false, true), (true, false), (true, true)] {
            let (map, addr, len) = if thp {
                let (map, addr) = Map::huge(WRITE);
                (map, addr, HUGE)
            } else {
                let map = Map::new(SIZE, WRITE);
                let addr = map.addr;
                (map, addr, SIZE)
            };
            init(addr, len, |k| k);
            if migrate {
                let mut out = vec![0; len];
                assert_eq!(f.dev.migrate_to_dev(addr, &mut out), migrated(len / PAGE));
                assert!(holds(&out, |k| k));
            }
            let data = mirror(len, |k| -k);
            assert!(in_child(|| {
                let same = check(addr, len, |k| k);
                // Its own device, on its own memory.
                let own = Fixture::new(&f.options);
                let wrote = own.dev.write(addr, &data) == whole(len / PAGE);
                same && wrote && check(addr, len, |k| -k)
            }));
            assert!(
                check(addr, len, |k| k),
                "the child's device wrote to the parent"
            );
            drop(map);
        }
    });
}

#[test]
fn anon_write_child_shared() {
    each("anon_write_child_shared", |f| {
        let map = Map::with(SIZE, WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).unwrap();
        init(map.addr, SIZE, |k| k);
        assert!(in_child(|| {
            let same = check(map.addr, SIZE, |k| k);
            let own = Fixture::new(&f.options);
            same && own.dev.write(map.addr, &mirror(SIZE, |k| -k)) == whole(NPAGES)
                && check(map.addr, SIZE, |k| -k)
        }));
        assert!(check(map.addr, SIZE, |k| -k));
    });
}

#[test]
fn anon_write_huge() {
    each("anon_write_huge", |f| {
        let (_map, addr) = Map::huge(WRITE);
        assert_eq!(f.dev.write(addr, &mirror(HUGE, |k| k)), whole(HUGE / PAGE));
        assert!(check(addr, HUGE, |k| k));
    });
}

#[test]
fn anon_write_hugetlbfs() {
    each("anon_write_hugetlbfs", |f| {
        let Some(map) = hugetlb() else {
            tests::skip("no huge pages are reserved");
            return;
        };
        assert_eq!(
            f.dev.write(map.addr, &mirror(HUGE, |k| k)),
            whole(HUGE / PAGE)
        );
        assert!(check(map.addr, HUGE, |k| k));
    });
}

#[test]
fn file_read() {
    each("file_read", |f| {
        let file = temporary_file(SIZE);
        let data = mirror(SIZE, |k| k);
        // SAFETY: writes the test's own bytes to its own file.
        let wrote = unsafe { libc::pwrite(file.as_raw_fd(), data.as_ptr().cast(), SIZE, 0) };
        assert_eq!(wrote, SIZE as isize);
        let map = Map::with(SIZE, READ, libc::MAP_SHARED, file.as_raw_fd()).unwrap();
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.read(map.addr, &mut out), whole(NPAGES));
        assert!(holds(&out, |k| k));
        assert_eq!(f.dev.write(map.addr, &data), error(libc::EPERM));
    });
}

#[test]
fn file_write() {
    each("file_write", |f| {
        let file = temporary_file(SIZE);
        let map = Map::with(SIZE, WRITE, libc::MAP_SHARED, file.as_raw_fd()).unwrap();
        assert_eq!(f.dev.write(map.addr, &mirror(SIZE, |k| k)), whole(NPAGES));
        assert!(check(map.addr, SIZE, |k| k));
        let mut out = vec![0; SIZE];
        // SAFETY: reads into the test's own bytes.
        let read = unsafe { libc::pread(file.as_raw_fd(), out.as_mut_ptr().cast(), SIZE, 0) };
        assert_eq!(read, SIZE as isize);
        assert!(holds(&out, |k| k));
    });
}

#[test]
fn migrate() {
    each("migrate", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        let snapshot = f.dev.snapshot(map.addr, NPAGES).unwrap();
        assert!(
            snapshot
                .iter()
                .all(|&m| m & !prot::PMD == prot::DEV_PRIVATE_LOCAL | prot::WRITE)
        );
    });
}

/// Private file mappings can be neither registered nor moved: they are served in place, and an explicit migration says so.
#[test]
fn migrate_file_private() {
    each("migrate_file_private", |f| {
        let file = temporary_file(SIZE);
        let map = Map::with(SIZE, WRITE, libc::MAP_PRIVATE, file.as_raw_fd()).unwrap();
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(
            f.dev.migrate_to_dev(map.addr, &mut out),
            error(libc::ENOENT)
        );
        assert_eq!(f.dev.read(map.addr, &mut out), whole(NPAGES));
        assert!(holds(&out, |k| k));
        assert_eq!(f.dev.write(map.addr, &mirror(SIZE, |k| -k)), whole(NPAGES));
        assert!(check(map.addr, SIZE, |k| -k));
    });
}

#[test]
fn migrate_fault() {
    each("migrate_fault", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        assert!(check(map.addr, SIZE / 2, |k| k));
        // Half of it has come home: migrate a mix.
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        assert!(check(map.addr, SIZE, |k| k));
    });
}

#[test]
fn migrate_release() {
    each("migrate_release", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        f.dev.release().unwrap();
        assert_eq!(f.dev.device().attachment().resident_bytes(), 0);
        assert!(
            f.dev
                .snapshot(map.addr, NPAGES)
                .unwrap()
                .iter()
                .all(|&m| m & !prot::PMD == prot::WRITE)
        );
        assert!(check(map.addr, SIZE / 2, |k| k));
    });
}

#[test]
fn migrate_shared() {
    each("migrate_shared", |f| {
        let map = Map::with(SIZE, WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).unwrap();
        assert_eq!(
            f.dev.migrate_to_dev(map.addr, &mut vec![0; SIZE]),
            error(libc::ENOENT)
        );
    });
}

#[test]
fn migrate_mixed() {
    each("migrate_mixed", |f| {
        let map = Map::new(6 * PAGE, libc::PROT_NONE);
        let other = f.second();
        let mut out = vec![0; 6 * PAGE];
        assert_eq!(
            other.migrate_to_dev(map.addr, &mut out),
            error(libc::EINVAL),
            "no access"
        );
        map.unmap(1, 1);
        assert_eq!(
            other.migrate_to_dev(map.addr, &mut out[..3 * PAGE]),
            error(libc::EINVAL),
            "a hole"
        );
        // Page 2: read-only zeros. Page 3: read-only. Pages 4 and 5: read-write.
        map.protect(2, 1, READ);
        assert_eq!(load(map.page(2), 0), 0);
        map.protect(3, 1, WRITE);
        store(map.page(3), 0, 3);
        map.protect(3, 1, READ);
        map.protect(4, 2, WRITE);
        store(map.page(4), 0, 4);
        store(map.page(5), 0, 5);
        assert_eq!(
            other.migrate_to_dev(map.page(2), &mut out[..4 * PAGE]),
            migrated(4)
        );
        let first = |page: usize| i32::from_ne_bytes(*out[page * PAGE..].first_chunk().unwrap());
        assert_eq!([first(0), first(1), first(2), first(3)], [0, 3, 4, 5]);
        // What another device has is not taken from it.
        assert_eq!(
            f.dev.migrate_to_dev(map.page(5), &mut [0; PAGE]),
            error(libc::ENOENT)
        );
        assert_eq!((load(map.page(3), 0), load(map.page(5), 0)), (3, 5));
    });
}

/// As the kernel's against private memory: the pages come home by the CPU's faults.
#[test]
fn migrate_multiple() {
    each("migrate_multiple", |f| {
        for _ in 0..NTIMES {
            let map = Map::new(SIZE, WRITE);
            init(map.addr, SIZE, |k| k);
            let mut out = vec![0; SIZE];
            assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
            assert!(holds(&out, |k| k));
            assert_eq!(f.dev.device().attachment().resident_bytes(), SIZE);
            let before = f.mm.stats();
            assert!(check(map.addr, SIZE, |k| k));
            let home = f.mm.stats() - before;
            assert_eq!(
                home.to_host_demand_pages + home.to_host_prefetch_pages,
                NPAGES as u64
            );
            assert_eq!(home.to_host_pages(), NPAGES as u64);
            let snapshot = f.dev.snapshot(map.addr, NPAGES).unwrap();
            assert!(snapshot.iter().all(|&m| m & !prot::PMD == prot::WRITE));
            // Where pages are copied for want of MOVE, what the device has of them is stale, and its memory still.
            let stale = if has(Capability::Move) { 0 } else { SIZE };
            assert_eq!(f.dev.device().attachment().resident_bytes(), stale);
        }
    });
}

/// As the kernel's against coherent memory, which asks for the pages.
#[test]
fn migrate_multiple_to_sys() {
    each("migrate_multiple_to_sys", |f| {
        for _ in 0..NTIMES {
            let map = Map::new(SIZE, WRITE);
            init(map.addr, SIZE, |k| k);
            let mut out = vec![0; SIZE];
            assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
            assert!(holds(&out, |k| k));
            let before = f.mm.stats();
            assert_eq!(f.dev.migrate_to_sys(map.addr, NPAGES), migrated(NPAGES));
            assert_eq!(f.dev.device().attachment().resident_bytes(), 0);
            assert!(check(map.addr, SIZE, |k| k));
            let home = f.mm.stats() - before;
            assert_eq!(home.to_host_explicit_pages, NPAGES as u64);
            assert_eq!(home.to_host_pages(), NPAGES as u64, "no page by a fault");
        }
    });
}

#[test]
fn anon_read_multiple() {
    each("anon_read_multiple", |f| {
        for c in 0..NTIMES as i32 {
            let map = Map::new(SIZE, WRITE);
            init(map.addr, SIZE, |k| k + c);
            let mut out = vec![0; SIZE];
            assert_eq!(f.dev.read(map.addr, &mut out), whole(NPAGES));
            assert!(holds(&out, |k| k + c));
        }
    });
}

#[test]
fn anon_teardown() {
    each("anon_teardown", |f| {
        for c in 0..NTIMES as i32 {
            let map = Map::new(SIZE, WRITE);
            init(map.addr, SIZE, |k| k + c);
            std::thread::scope(|scope| {
                let mut out = vec![0; SIZE];
                scope.spawn(|| {
                    std::thread::sleep(std::time::Duration::from_micros(
                        u64::from(c.cast_unsigned()) * 300,
                    ));
                    map.unmap(NPAGES / 2, NPAGES / 2);
                });
                match f.dev.read(map.addr, &mut out) {
                    Ok(_) => assert!(holds(&out, |k| k + c)),
                    Err(errno) => assert_eq!(errno, Errno(libc::EFAULT)),
                }
            });
        }
    });
}

#[test]
fn snapshot() {
    each("snapshot", |f| {
        let map = Map::new(7 * PAGE, libc::PROT_NONE);
        let other = f.second();
        map.unmap(1, 1);
        map.protect(2, 1, READ);
        assert_eq!(load(map.page(2), 0), 0);
        map.protect(3, 1, WRITE);
        store(map.page(3), 0, 3);
        map.protect(3, 1, READ);
        map.protect(4, 3, WRITE);
        (4..7).for_each(|page| store(map.page(page), 0, page as i32));
        assert_eq!(
            f.dev.migrate_to_dev(map.page(5), &mut [0; PAGE]),
            migrated(1)
        );
        assert_eq!(
            other.migrate_to_dev(map.page(6), &mut [0; PAGE]),
            migrated(1)
        );
        let zero = if sees_zero_pages() {
            prot::ZERO | prot::READ
        } else {
            prot::READ
        };
        let want = [
            prot::ERROR,
            prot::ERROR,
            zero,
            prot::READ,
            prot::WRITE,
            prot::DEV_PRIVATE_LOCAL | prot::WRITE,
            prot::NONE,
        ];
        assert_eq!(f.dev.snapshot(map.addr, 7).unwrap(), want);
        assert_eq!((load(map.page(5), 0), load(map.page(6), 0)), (5, 6));
    });
}

#[test]
fn compound() {
    each("compound", |f| {
        let Some(map) = hugetlb() else {
            tests::skip("no huge pages are reserved");
            return;
        };
        init(map.addr, HUGE, |k| k);
        let pmd = if sees_zero_pages() { prot::PMD } else { 0 };
        let snapshot = f.dev.snapshot(map.addr, HUGE / PAGE).unwrap();
        assert!(
            snapshot.iter().all(|&m| m == prot::WRITE | pmd),
            "{:x}",
            snapshot[0]
        );
        map.protect(0, HUGE / PAGE, READ);
        let snapshot = f.dev.snapshot(map.addr, HUGE / PAGE).unwrap();
        assert!(
            snapshot.iter().all(|&m| m == prot::READ | pmd),
            "{:x}",
            snapshot[0]
        );
    });
}

#[test]
fn double_map() {
    each("double_map", |f| {
        let map = Map::new(SIZE, WRITE);
        let other = f.second();
        init(map.addr, SIZE, |k| k);
        map.protect(0, NPAGES, READ);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.read(map.addr, &mut out), whole(NPAGES));
        assert!(holds(&out, |k| k));
        assert_eq!(
            other.read(map.addr, &mut out),
            whole(NPAGES),
            "{:?}",
            f.options
        );
        assert!(holds(&out, |k| k));
        // Migrating to one device takes the pages from the other, which faults for them again.
        assert_eq!(other.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        assert_eq!(f.dev.read(map.addr, &mut out), whole(NPAGES));
        assert!(holds(&out, |k| k));
        // Punch a hole after the first page address, as the kernel's does.
        map.unmap(1, 1);
        drop(out);
        assert_eq!(
            other.read(map.addr, &mut vec![0; SIZE]),
            error(libc::EFAULT)
        );
        assert!(
            ints(SIZE)
                .filter(|&k| k >= 2 * PAGE / 4)
                .all(|k| load(map.addr, k) == k as i32)
        );
    });
}

#[test]
fn exclusive() {
    each("exclusive", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.exclusive(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        assert_eq!(
            f.dev.check_exclusive(map.addr, NPAGES),
            error(libc::EPERM),
            "still the device's"
        );
        for k in ints(SIZE) {
            assert_eq!(load(map.addr, k), k as i32);
            store(map.addr, k, k as i32 + 1);
        }
        assert!(check(map.addr, SIZE, |k| k + 1));
        assert_eq!(f.dev.check_exclusive(map.addr, NPAGES), migrated(NPAGES));
    });
}

#[test]
fn exclusive_mprotect() {
    each("exclusive_mprotect", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.exclusive(map.addr, &mut out), migrated(NPAGES));
        assert!(holds(&out, |k| k));
        map.protect(0, NPAGES, READ);
        assert_eq!(f.dev.write(map.addr, &out), error(libc::EPERM));
        assert!(check(map.addr, SIZE, |k| k));
    });
}

#[test]
fn exclusive_cow() {
    each("exclusive_cow", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.exclusive(map.addr, &mut out), migrated(NPAGES));
        let count_up = || {
            let same = check(map.addr, SIZE, |k| k);
            init(map.addr, SIZE, |k| k + 1);
            same && check(map.addr, SIZE, |k| k + 1)
        };
        assert!(in_child(count_up));
        assert!(count_up());
        assert_eq!(f.dev.check_exclusive(map.addr, NPAGES), migrated(NPAGES));
    });
}

#[test]
fn hmm_cow_in_device() {
    each("hmm_cow_in_device", |f| {
        let map = Map::new(SIZE, WRITE);
        init(map.addr, SIZE, |k| k);
        let mut out = vec![0; SIZE];
        assert_eq!(f.dev.migrate_to_dev(map.addr, &mut out), migrated(NPAGES));
        assert!(in_child(|| {
            init(map.addr, SIZE, |k| -k);
            check(map.addr, SIZE, |k| -k)
        }));
        // The pages that were shared with the child still migrate.
        init(map.addr, SIZE, |k| k + 2);
        assert_eq!(
            f.dev.migrate_to_dev(map.addr, &mut out),
            migrated(NPAGES),
            "{:?}",
            f.options
        );
        assert!(holds(&out, |k| k + 2));
    });
}
