//! Each movement of pages, on real memory, with its counters: one fault and one call per run, never one per page.

use std::time::Duration;

use svm::{Access, Delivery, Granule, Options};
use tests::{TestDevice, Watchdog, in_own_process, usable};

const PAGE: usize = 4096;

fn options(delivery: Delivery, granule: Granule) -> Options {
    Options::new().delivery(delivery).granule(granule)
}

fn filled(len: usize, options: &Options) -> svm::Buffer<u64> {
    let mut buffer = svm::Buffer::with_options(len, options).unwrap();
    for (i, x) in buffer.as_mut_slice().iter_mut().enumerate() {
        *x = i as u64;
    }
    buffer
}

fn bytes_of(elements: usize) -> usize {
    elements * 8
}

/// Runs `test` for both doors.
fn both_doors(name: &'static str, test: impl Fn(Delivery)) {
    let _watchdog = Watchdog::new(name);
    if usable() {
        test(Delivery::Inline);
        test(Delivery::Thread);
    }
}

#[test]
fn a_device_write_moves_a_granule_by_one_call_and_it_comes_home_by_one() {
    both_doors("write", |delivery| {
        let n = 16 * PAGE / 8;
        let mut buffer = filled(n, &options(delivery, Granule::Big));
        let device = TestDevice::new().unwrap();
        let before = buffer.stats();
        {
            let view = buffer.view_mut();
            device
                .write(view.region(), view.addr() + 8, &77u64.to_ne_bytes())
                .unwrap();
        }
        let out = buffer.stats() - before;
        assert_eq!(
            (out.device_write_faults, out.move_calls, out.copy_calls),
            (1, 1, 0),
            "{out:?}"
        );
        assert_eq!(
            (
                out.to_device_demand_pages,
                out.to_device_prefetch_pages,
                out.to_device_runs
            ),
            (1, 15, 1)
        );
        assert_eq!(buffer.as_slice()[1], 77);
        let home = buffer.stats() - before - out;
        assert_eq!(
            (home.cpu_read_faults, home.move_calls, home.copy_calls),
            (1, 1, 0),
            "{home:?}"
        );
        assert_eq!(home.to_host_pages(), 16);
        assert!(
            buffer
                .as_slice()
                .iter()
                .enumerate()
                .all(|(i, &x)| x == if i == 1 { 77 } else { i as u64 })
        );
        assert_eq!((buffer.stats() - before).cpu_read_faults, 1);
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

/// Whole blocks on huge pages come home from a device by one call for all of them; what keeps one from that keeps no other from home.
#[test]
fn huge_blocks_come_home_by_one_call() {
    const BLOCK: usize = 2 << 20;
    const NR: usize = 6;
    both_doors("huge blocks", |delivery| {
        let options = options(delivery, Granule::Huge).huge_pages(true);
        let mut buffer = filled(NR * BLOCK / 8, &options);
        let (device, other) = (TestDevice::new().unwrap(), TestDevice::new().unwrap());
        let fetch = |buffer: &mut svm::Buffer<u64>| {
            let view = buffer.view_mut();
            device
                .fault_in(view.region(), view.addr(), NR * BLOCK, Access::Write)
                .unwrap();
            assert_eq!(device.attachment().resident_bytes(), NR * BLOCK);
            buffer.stats()
        };
        let away = fetch(&mut buffer);
        device.release().unwrap();
        let home = buffer.stats() - away;
        assert_eq!(
            (home.move_calls, home.to_host_runs, home.movement_calls()),
            (1, 1, 1),
            "{home:?}"
        );
        assert_eq!(home.to_host_explicit_pages, (NR * BLOCK / PAGE) as u64);

        // The CPU has fetched one block of them, and another device reads another.
        let _ = fetch(&mut buffer);
        buffer.as_mut_slice()[BLOCK / 8] = BLOCK as u64 / 8;
        let view = buffer.view();
        let mut word = [0; 8];
        other
            .read(view.region(), view.addr() + 3 * BLOCK, &mut word)
            .unwrap();
        let away = buffer.stats();
        device.release().unwrap();
        let home = buffer.stats() - away;
        // All but the block that is home and the page that the other has: that one's goes there, and not here.
        let nr_alone = (5 * BLOCK / PAGE - 1) as u64;
        assert_eq!(home.to_host_explicit_pages, nr_alone);
        assert_eq!(device.attachment().resident_bytes(), 0);
        other.release().unwrap();

        // A part of them alone, and of the last a part.
        let away = fetch(&mut buffer);
        let region = buffer.view().region();
        let first = (buffer.view().addr() - region.base()) / PAGE;
        let pages = first + BLOCK / PAGE..first + 3 * BLOCK / PAGE + 1;
        let nr_pages = pages.len();
        device.attachment().bring_home(region, pages).unwrap();
        let home = buffer.stats() - away;
        assert_eq!((home.move_calls, home.to_host_runs), (2, 2), "{home:?}");
        assert_eq!(home.to_host_explicit_pages, nr_pages as u64);
        let left = NR * BLOCK - nr_pages * PAGE;
        assert_eq!(device.attachment().resident_bytes(), left);
        let mut elements = buffer.as_slice().iter().enumerate();
        assert!(elements.all(|(i, &x)| x == i as u64));
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

#[test]
fn a_whole_transfer_is_one_round() {
    both_doors("one round", |delivery| {
        let n = 4 << 20;
        let mut buffer = filled(n / 8, &options(delivery, Granule::Huge));
        let device = TestDevice::new().unwrap();
        let view = buffer.view_mut();
        let mut out = vec![0; n];
        device.read(view.region(), view.addr(), &mut out).unwrap();
        assert!(
            out.chunks(8)
                .enumerate()
                .all(|(i, c)| c == (i as u64).to_ne_bytes())
        );
        assert_eq!(device.rounds.load(std::sync::atomic::Ordering::Relaxed), 1);
        let stats = device.attachment().stats();
        assert_eq!(stats.to_device_pages(), 1024);
        assert_eq!(device.attachment().resident_bytes(), n);
        device.release().unwrap();
        assert_eq!(device.attachment().resident_bytes(), 0);
        assert_eq!(device.attachment().stats().to_host_explicit_pages, 1024);
        drop(device);
        assert!(
            buffer
                .as_slice()
                .iter()
                .enumerate()
                .all(|(i, &x)| x == i as u64)
        );
    });
}

#[test]
fn duplicates_are_shared_and_collapse_on_a_cpu_write() {
    both_doors("duplicate", |delivery| {
        let n = 16 * PAGE / 8;
        let mut buffer = filled(n, &options(delivery, Granule::Big).read_mostly(true));
        let device = TestDevice::new().unwrap();
        let mut out = [0; 8];
        let before = buffer.stats();
        let view = buffer.view();
        device
            .read(view.region(), view.addr() + 16, &mut out)
            .unwrap();
        assert_eq!(out, 2u64.to_ne_bytes());
        let after = buffer.stats();
        let dup = after - before;
        assert_eq!(
            (dup.duplicated_pages, dup.move_calls, dup.copy_calls),
            (16, 1, 1),
            "{dup:?}"
        );
        // CPU reads of shared pages are free.
        assert_eq!(buffer.as_slice().iter().sum::<u64>(), (0..n as u64).sum());
        assert_eq!(buffer.stats(), after);
        // A CPU write collapses them, by one fault and one call.
        buffer.as_mut_slice()[2] = 99;
        buffer.as_mut_slice()[3] = 98;
        let collapsed = buffer.stats() - after;
        assert_eq!(
            (collapsed.cpu_protect_faults, collapsed.write_protect_calls),
            (1, 1),
            "{collapsed:?}"
        );
        assert_eq!(collapsed.collapsed_pages, 16);
        let view = buffer.view();
        device
            .read(view.region(), view.addr() + 16, &mut out)
            .unwrap();
        assert_eq!(out, 99u64.to_ne_bytes());
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

#[test]
fn a_device_write_to_what_it_shares_drops_the_host_copy() {
    both_doors("upgrade", |delivery| {
        let n = 16 * PAGE / 8;
        let mut buffer = filled(n, &options(delivery, Granule::Big).read_mostly(true));
        let device = TestDevice::new().unwrap();
        let mut out = [0; 8];
        let before = buffer.stats();
        let view = buffer.view_mut();
        device.read(view.region(), view.addr(), &mut out).unwrap();
        device
            .write(view.region(), view.addr(), &5u64.to_ne_bytes())
            .unwrap();
        assert_eq!(buffer.as_slice()[0], 5);
        assert!(buffer.as_slice()[1..].iter().zip(1..).all(|(&x, i)| x == i));
        let stats = buffer.stats() - before;
        assert_eq!(
            (stats.copy_calls, stats.move_calls),
            (1, 3),
            "dup out and back, host to scratch, home: {stats:?}"
        );
        assert_eq!(stats.anomalies, 0);
    });
}

#[test]
fn pages_nobody_touched_read_as_zero_on_both_sides() {
    both_doors("holes", |delivery| {
        for granule in [Granule::Page, Granule::Big, Granule::Huge] {
            let n = (2 << 20) / 8;
            let mut buffer =
                svm::Buffer::<u64>::with_options(n, &options(delivery, granule)).unwrap();
            let device = TestDevice::new().unwrap();
            buffer.as_mut_slice()[n / 2] = 1;
            let before = buffer.stats();
            let mut out = vec![1; bytes_of(n)];
            let view = buffer.view_mut();
            device.read(view.region(), view.addr(), &mut out).unwrap();
            assert_eq!(out.chunks(8).filter(|c| *c != [0; 8]).count(), 1);
            device
                .write(view.region(), view.addr() + 8, &3u64.to_ne_bytes())
                .unwrap();
            let stats = buffer.stats() - before;
            assert!(
                stats.movement_calls() <= 2 * 512 / granule.pages() as u64 + 8,
                "{granule:?} {stats:?}"
            );
            assert_eq!(buffer.as_slice()[1], 3);
            assert_eq!(buffer.as_slice()[n / 2], 1);
            assert_eq!(buffer.as_slice().iter().filter(|&&x| x != 0).count(), 2);
            assert_eq!(buffer.stats().anomalies, 0);
        }
    });
}

#[test]
fn two_devices_share_a_page_and_one_writes() {
    both_doors("two devices", |delivery| {
        let n = 16 * PAGE / 8;
        let mut buffer = filled(n, &options(delivery, Granule::Big));
        let (a, b) = (TestDevice::new().unwrap(), TestDevice::new().unwrap());
        let mut out = [0; 8];
        {
            let view = buffer.view_mut();
            a.write(view.region(), view.addr(), &10u64.to_ne_bytes())
                .unwrap();
            b.read(view.region(), view.addr(), &mut out).unwrap();
            assert_eq!(out, 10u64.to_ne_bytes());
            a.read(view.region(), view.addr() + 8, &mut out).unwrap();
            assert_eq!(out, 1u64.to_ne_bytes());
            b.write(view.region(), view.addr(), &11u64.to_ne_bytes())
                .unwrap();
            a.read(view.region(), view.addr(), &mut out).unwrap();
            assert_eq!(out, 11u64.to_ne_bytes());
            a.write(view.region(), view.addr() + 8, &12u64.to_ne_bytes())
                .unwrap();
        }
        assert_eq!(buffer.as_slice()[..3], [11, 12, 2]);
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

#[test]
fn edges_never_move_and_are_written_back() {
    both_doors("edges", |delivery| {
        let device = TestDevice::new().unwrap();
        let mut words = vec![0u64; 3 * PAGE / 8];
        for (start, len) in [(1, 3), (100, 1000), (0, words.len()), (511, 2), (5, 0)] {
            words
                .iter_mut()
                .enumerate()
                .for_each(|(i, w)| *w = i as u64);
            let neighbours: Vec<u64> = words.clone();
            let mut mirror = svm::mirror_with(
                &mut words[start..start + len],
                &options(delivery, Granule::Big),
            )
            .unwrap();
            let mut out = vec![0; bytes_of(len)];
            let view = mirror.view_mut();
            device.read(view.region(), view.addr(), &mut out).unwrap();
            let expected: Vec<u8> = neighbours[start..start + len]
                .iter()
                .flat_map(|w| w.to_ne_bytes())
                .collect();
            assert_eq!(out, expected);
            let changed: Vec<u8> = neighbours[start..start + len]
                .iter()
                .flat_map(|w| (w + 1000).to_ne_bytes())
                .collect();
            device.write(view.region(), view.addr(), &changed).unwrap();
            mirror.close().unwrap();
            for (i, (&now, &was)) in words.iter().zip(&neighbours).enumerate() {
                let inside = (start..start + len).contains(&i);
                assert_eq!(
                    now,
                    if inside { was + 1000 } else { was },
                    "element {i} of {start}+{len}"
                );
            }
        }
    });
}

#[test]
fn an_input_is_copied_and_never_moved() {
    both_doors("input", |delivery| {
        let device = TestDevice::new().unwrap();
        let words: Vec<u64> = (0..100_000).collect();
        let (a, b) = (
            svm::mirror_ref_with(&words, &options(delivery, Granule::Big)).unwrap(),
            svm::mirror_ref_with(&words[10..], &options(delivery, Granule::Big)).unwrap(),
        );
        for mirror in [&a, &b] {
            let view = mirror.view();
            let mut out = vec![0; bytes_of(view.len())];
            device.read(view.region(), view.addr(), &mut out).unwrap();
            assert!(
                out.chunks(8)
                    .zip(mirror.as_slice())
                    .all(|(c, w)| c == w.to_ne_bytes())
            );
            assert_eq!(
                (mirror.stats().move_calls, mirror.stats().cpu_read_faults),
                (0, 0)
            );
            let fault = device
                .write(view.region(), view.addr(), &[0; 8])
                .unwrap_err()
                .device_fault()
                .unwrap();
            assert_eq!(fault.kind, svm::DeviceFaultKind::Protection);
        }
        assert!(words.iter().copied().eq(0..100_000));
    });
}

#[test]
fn a_pinned_page_is_accessed_in_place() {
    both_doors("pin", |delivery| {
        let n = 16 * PAGE / 8;
        let mut buffer = filled(n, &options(delivery, Granule::Big));
        let device = TestDevice::new().unwrap();
        let view = buffer.view_mut();
        let (region, addr) = (view.region(), view.addr());
        device.write(region, addr, &1u64.to_ne_bytes()).unwrap();
        let pin = buffer.pin(..PAGE / 8 * 2).unwrap();
        // A system call may read and write all of it now.
        let file = std::fs::File::open("/dev/zero").unwrap();
        // SAFETY: the range is inside the buffer and pinned.
        let n = unsafe {
            libc::read(
                std::os::fd::AsRawFd::as_raw_fd(&file),
                std::ptr::with_exposed_provenance_mut(addr),
                8,
            )
        };
        assert_eq!(n, 8);
        let view = buffer.view();
        let mut out = [1; 8];
        device.read(view.region(), view.addr(), &mut out).unwrap();
        assert_eq!(out, [0; 8]);
        assert!(buffer.stats().in_place_pages > 0);
        drop(pin);
        let view = buffer.view_mut();
        device
            .write(view.region(), view.addr(), &2u64.to_ne_bytes())
            .unwrap();
        assert_eq!(buffer.as_slice()[0], 2);
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

#[test]
fn device_memory_smaller_than_the_set_evicts() {
    both_doors("evict", |delivery| {
        for granule in [Granule::Page, Granule::Big, Granule::Huge] {
            let n = (4 << 20) / 8;
            let mut buffer = filled(n, &options(delivery, granule));
            let memory = if granule == Granule::Page {
                128 << 10
            } else {
                1 << 20
            };
            let device =
                TestDevice::with_options(svm::AttachOptions::new().memory_bytes(memory)).unwrap();
            for start in (0..bytes_of(n)).step_by(64 << 10) {
                let view = buffer.view_mut();
                device
                    .write(view.region(), view.addr() + start, &1u64.to_ne_bytes())
                    .unwrap();
                assert!(device.attachment().resident_bytes() <= memory);
            }
            assert!(device.attachment().stats().evicted_pages > 0);
            drop(device);
            for (i, &x) in buffer.as_slice().iter().enumerate() {
                assert_eq!(
                    x,
                    if i % ((64 << 10) / 8) == 0 {
                        1
                    } else {
                        i as u64
                    }
                );
            }
            assert_eq!(buffer.stats().anomalies, 0);
        }
    });
}

#[test]
fn a_forgotten_mirror_leaves_working_memory() {
    both_doors("forget", |delivery| {
        let device = TestDevice::new().unwrap();
        let mut words: Vec<u64> = (0..100_000).collect();
        let mut mirror = svm::mirror_with(&mut words, &options(delivery, Granule::Big)).unwrap();
        let view = mirror.view_mut();
        device
            .fault_in(
                view.region(),
                view.addr(),
                bytes_of(view.len()),
                Access::Write,
            )
            .unwrap();
        std::mem::forget(mirror);
        words[7] = 1;
        assert!(
            words
                .iter()
                .enumerate()
                .all(|(i, &w)| w == if i == 7 { 1 } else { i as u64 })
        );
        let again = svm::mirror(&mut words);
        assert!(again.unwrap_err().is_overlap());
        std::mem::forget(words);
    });
}

/// What a process has of what a cycle might leave behind: mappings, descriptors, threads, and pages of memory.
fn held() -> [usize; 4] {
    let lines = |path| std::fs::read_to_string(path).unwrap().lines().count();
    let entries = |path| std::fs::read_dir(path).unwrap().count();
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let resident = statm.split(' ').nth(1).unwrap().parse().unwrap();
    [
        lines("/proc/self/maps"),
        entries("/proc/self/fd"),
        entries("/proc/self/task"),
        resident,
    ]
}

/// In a process of its own, where nobody else maps or frees anything meanwhile.
#[test]
fn mirror_and_drop_ten_thousand_times() {
    in_own_process("mirror_and_drop_ten_thousand_times", &[""], || {
        let _watchdog = Watchdog::with_timeout("cycles", Duration::from_secs(120));
        if usable() {
            cycle_and_look(Delivery::Inline);
            cycle_and_look(Delivery::Thread);
        }
    });
}

fn cycle_and_look(delivery: Delivery) {
    let device = TestDevice::new().unwrap();
    let mut words = vec![7u64; 64 * PAGE / 8];
    let mut cycle = |i: u64| {
        let mut mirror = svm::mirror_with(&mut words, &options(delivery, Granule::Big)).unwrap();
        let view = mirror.view_mut();
        device
            .write(view.region(), view.addr() + 3 * PAGE, &i.to_ne_bytes())
            .unwrap();
        mirror.close().unwrap();
        assert!(words.contains(&i));
    };
    (0..1000).for_each(&mut cycle);
    let before = held();
    (1000..11_000).for_each(&mut cycle);
    let after = held();
    let ([maps, fds, threads, pages], [maps_now, fds_now, threads_now, pages_now]) =
        (before, after);
    let held = (fds_now, threads_now);
    assert_eq!(
        held,
        (fds, threads),
        "descriptors, threads through {delivery:?}"
    );
    assert!(maps_now <= maps + 2, "{maps} -> {maps_now} mappings");
    // 13 bytes a cycle: less than anything that could be forgotten each time.
    assert!(pages_now <= pages + 32, "{pages} -> {pages_now} pages");
}
