//! Mirrors that overlap are refused, whatever kinds of memory they are of; slices side by side are not, though they share a page.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is what is meant"
)]
#![cfg(target_os = "linux")]

use std::ops::Range;

use svm::{Delivery, Error, Mirror, Options};
use tests::mapping::READ_WRITE;
use tests::{Map, TestDevice, Watchdog, usable};

const PAGE: usize = 4096;

/// Runs `test` with each door for the first mirror and each for the second.
fn each_two_doors(name: &'static str, test: impl Fn(&Options, &Options)) {
    let _watchdog = Watchdog::new(name);
    if !usable() {
        return;
    }
    for first in [Delivery::Inline, Delivery::Thread] {
        for second in [Delivery::Inline, Delivery::Thread] {
            test(
                &Options::new().delivery(first),
                &Options::new().delivery(second),
            );
        }
    }
}

/// Mirrors these bytes of the mapping.
fn mirror(map: &Map, bytes: Range<usize>, options: &Options) -> Result<Mirror<'static, u8>, Error> {
    // SAFETY: the mapping stays until the test is done with its mirrors.
    unsafe { svm::mirror_raw(map.at(0).add(bytes.start), bytes.len(), options) }
}

/// A mapping whose second half cannot move: mirrored over both it is accessed in place.
fn mixed(pages: usize) -> Map {
    let map = Map::new(pages);
    let (half, flags) = (
        map.addr + pages / 2 * PAGE,
        libc::MAP_FIXED | libc::MAP_SHARED,
    );
    let _ = Map::at_hint(half, pages / 2, READ_WRITE, flags);
    map
}

fn in_place(pages: usize) -> Map {
    let map = Map::new(pages);
    Map::at_hint(
        map.addr,
        pages,
        READ_WRITE,
        libc::MAP_FIXED | libc::MAP_SHARED,
    )
}

/// Each of `others` is refused beside a mirror of `bytes`, which works on as if nobody had tried; and is accepted when that has gone.
#[track_caller]
fn refuses(
    map: &Map,
    bytes: &Range<usize>,
    is_in_place: bool,
    others: &[Range<usize>],
    [first, second]: [&Options; 2],
) {
    let device = TestDevice::new().unwrap();
    for other in others {
        let mut kept = mirror(map, bytes.clone(), first).unwrap();
        assert_eq!(kept.is_in_place(), is_in_place);
        let view = kept.view_mut();
        device.write(view.region(), view.addr(), &[77]).unwrap();
        for _ in 0..2 {
            let refused = mirror(map, other.clone(), second).map(drop).unwrap_err();
            assert!(refused.is_overlap(), "{bytes:?}, {other:?}: {refused}");
            assert_eq!(refused.addr(), Some(map.addr + other.start));
        }
        assert_eq!(kept.as_slice()[0], 77);
        kept.as_mut_slice()[0] = 78;
        let view = kept.view();
        let mut out = [0];
        device.read(view.region(), view.addr(), &mut out).unwrap();
        assert_eq!(out, [78]);
        assert_eq!(kept.stats().anomalies, 0);
        kept.close().unwrap();
        let after = mirror(map, other.clone(), second).unwrap();
        after.close().unwrap();
    }
}

/// Ranges that share `bytes`' first or last pages, all of it, or lie within.
fn around(bytes: &Range<usize>, reach: usize) -> Vec<Range<usize>> {
    let Range { start, end } = *bytes;
    vec![
        start..end,
        start - reach..start + reach,
        end - reach..end + reach,
        start - reach..end + reach,
        start + reach..end - reach,
        start - reach..start + 1,
        end - 1..end + reach,
    ]
}

#[test]
fn two_mirrors_that_move() {
    each_two_doors("managed", |first, second| {
        let map = Map::new(16);
        let bytes = 4 * PAGE..12 * PAGE;
        refuses(
            &map,
            &bytes,
            false,
            &around(&bytes, 2 * PAGE),
            [first, second],
        );
        let bytes = 4 * PAGE + 100..12 * PAGE + 100;
        refuses(
            &map,
            &bytes,
            false,
            &around(&bytes, 2 * PAGE),
            [first, second],
        );
        // Of one the edge alone, of the other a page that moves; and two edges.
        refuses(&map, &bytes, false, &around(&bytes, 60), [first, second]);
        refuses(
            &map,
            &bytes,
            false,
            &[11 * PAGE + 4000..13 * PAGE],
            [first, second],
        );
        map.unmap();
    });
}

#[test]
fn two_mirrors_in_place() {
    each_two_doors("in place", |first, second| {
        let map = in_place(16);
        for bytes in [4 * PAGE..12 * PAGE, 4 * PAGE + 100..12 * PAGE + 100] {
            for reach in [2 * PAGE, 60] {
                refuses(&map, &bytes, true, &around(&bytes, reach), [first, second]);
            }
        }
        map.unmap();
    });
}

#[test]
fn one_that_moves_and_one_in_place() {
    each_two_doors("mixed", |first, second| {
        // Anonymous memory up to page 8, shared memory from there on.
        let map = mixed(16);
        let (moves, stays) = (2 * PAGE..8 * PAGE, 6 * PAGE..12 * PAGE);
        refuses(
            &map,
            &moves,
            false,
            std::slice::from_ref(&stays),
            [first, second],
        );
        refuses(
            &map,
            &stays,
            true,
            std::slice::from_ref(&moves),
            [first, second],
        );
        // By less than a page: the last of the one, the first of the other.
        let (moves, stays) = (2 * PAGE..7 * PAGE + 10, 7 * PAGE + 5..9 * PAGE);
        refuses(
            &map,
            &moves,
            false,
            std::slice::from_ref(&stays),
            [first, second],
        );
        refuses(
            &map,
            &stays,
            true,
            std::slice::from_ref(&moves),
            [first, second],
        );
        map.unmap();
    });
}

#[test]
fn ranges_without_a_whole_page() {
    each_two_doors("below a page", |first, second| {
        for map in [Map::new(4), in_place(4)] {
            let (doors, stays) = ([first, second], svm_is_in_place(&map));
            // Inside a page, and across a border without a whole page on either side.
            for bytes in [PAGE + 100..PAGE + 300, 2 * PAGE - 100..2 * PAGE + 100] {
                refuses(&map, &bytes, stays, &around(&bytes, 60), doors);
                refuses(&map, &bytes, stays, &[0..4 * PAGE, PAGE..2 * PAGE], doors);
            }
            refuses(
                &map,
                &(0..4 * PAGE),
                stays,
                &[PAGE + 100..PAGE + 300],
                doors,
            );
            map.unmap();
        }
    });
}

fn svm_is_in_place(map: &Map) -> bool {
    mirror(map, 0..PAGE, &Options::new()).unwrap().is_in_place()
}

/// Slices that have no byte in common, down to neighbours in one page, are mirrored at the same time, and each has its own.
#[test]
fn neighbours_are_no_overlap() {
    each_two_doors("neighbours", |first, second| {
        for map in [Map::new(16), in_place(16), mixed(16)] {
            let cuts = [
                0,
                100,
                101,
                PAGE,
                3 * PAGE,
                5 * PAGE + 100,
                7 * PAGE + 50,
                7 * PAGE + 60,
            ];
            let cuts = [&cuts[..], &[8 * PAGE, 12 * PAGE + 1, 16 * PAGE]].concat();
            let ranges: Vec<_> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
            let device = TestDevice::new().unwrap();
            let mut all: Vec<_> = ranges
                .iter()
                .zip([first, second].into_iter().cycle())
                .map(|(range, options)| mirror(&map, range.clone(), options).unwrap())
                .collect();
            // An empty range has no byte in common with anything, wherever it lies.
            let empty = mirror(&map, 200..200, first).unwrap();
            for (i, mirror) in all.iter_mut().enumerate() {
                let view = mirror.view_mut();
                let (region, addr) = (view.region(), view.addr());
                device
                    .write(region, addr, &vec![i as u8 + 1; view.len()])
                    .unwrap();
            }
            for (i, mirror) in all.iter().enumerate() {
                assert!(
                    mirror.as_slice().iter().all(|&byte| byte == i as u8 + 1),
                    "{i}"
                );
            }
            let refused = mirror(&map, 0..16 * PAGE, second).map(drop).unwrap_err();
            assert!(refused.is_overlap(), "{refused}");
            // One gone leaves its own bytes free, and no others.
            all.remove(2).close().unwrap();
            mirror(&map, ranges[2].clone(), second)
                .unwrap()
                .close()
                .unwrap();
            let more = mirror(&map, ranges[2].start..ranges[2].end + 1, second);
            assert!(more.map(drop).unwrap_err().is_overlap());
            drop((all, empty));
            mirror(&map, 0..16 * PAGE, second).unwrap().close().unwrap();
            map.unmap();
        }
    });
}

/// Inputs are copied, so that they may be mirrored twice and within a mirror; but not across the border of one, whose pages may be
/// away from where they would be copied.
#[test]
fn inputs_overlap_inputs_but_no_part_of_a_mirror() {
    each_two_doors("inputs", |first, second| {
        let mut bytes = vec![7u8; 16 * PAGE];
        {
            let [a, b] = [first, second].map(|o| svm::mirror_ref_with(&bytes, o).unwrap());
            let part = svm::mirror_ref_with(&bytes[100..5 * PAGE], second).unwrap();
            let device = TestDevice::new().unwrap();
            for input in [&a, &b, &part] {
                let (view, mut out) = (input.view(), vec![0; input.len()]);
                device.read(view.region(), view.addr(), &mut out).unwrap();
                assert!(out.iter().all(|&byte| byte == 7));
            }
        }
        let mirror = svm::mirror_with(&mut bytes[..8 * PAGE], first).unwrap();
        // As the borrow checker does not see it: a leaked mirror is one still.
        std::mem::forget(mirror);
        for range in [0..16 * PAGE, 4 * PAGE..9 * PAGE] {
            let refused = svm::mirror_ref_with(&bytes[range], second).map(drop);
            assert!(refused.unwrap_err().is_overlap());
        }
        let rest = svm::mirror_ref_with(&bytes[8 * PAGE..], second).unwrap();
        let within = svm::mirror_ref_with(&bytes[PAGE..4 * PAGE], second).unwrap();
        assert_eq!((rest.as_slice()[0], within.as_slice()[0]), (7, 7));
        drop((rest, within));
        // Its pages stay registered: nobody else may get them.
        std::mem::forget(bytes);
    });
}

/// Memory that is gone is mirrored by nobody: what comes to lie there is free, though the old mirror lives.
#[test]
fn what_was_unmapped_is_free_again() {
    each_two_doors("unmapped", |first, second| {
        let map = Map::new(16);
        let old = map.mirror(first);
        map.unmap();
        for flags in [0, libc::MAP_SHARED] {
            let new = Map::at_hint(map.addr, 16, READ_WRITE, flags | libc::MAP_FIXED_NOREPLACE);
            let again = mirror(&new, 0..16 * PAGE, second).unwrap();
            assert_eq!(again.is_in_place(), flags == libc::MAP_SHARED);
            again.close().unwrap();
            new.unmap();
        }
        old.close().unwrap();
    });
}

/// Of threads that mirror one range at the same time one has it.
#[test]
fn of_many_at_once_one_has_it() {
    each_two_doors("at once", |first, second| {
        for map in [Map::new(4), in_place(4), mixed(4)] {
            for bytes in [0..4 * PAGE, 100..200, PAGE..2 * PAGE + 1] {
                let start = std::sync::Barrier::new(4);
                let try_once = |options: &Options| {
                    start.wait();
                    let mine = mirror(&map, bytes.clone(), options);
                    start.wait();
                    match mine {
                        Ok(_) => 1,
                        Err(error) if error.is_overlap() => 0,
                        Err(error) => panic!("{error}"),
                    }
                };
                let had: u32 = std::thread::scope(|scope| {
                    let try_once = &try_once;
                    let tries = [first, second, first, second];
                    let tries = tries.map(|options| scope.spawn(move || try_once(options)));
                    tries.into_iter().map(|thread| thread.join().unwrap()).sum()
                });
                assert_eq!(had, 1, "{bytes:?}");
            }
            map.unmap();
        }
    });
}
