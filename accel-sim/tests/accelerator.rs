//! The accelerator on real memory: launches of each kind, their failures, and what memory is like afterwards.

mod common;

use std::cmp::Ordering as Cmp;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use accel_sim::{Accelerator, Error, Options, indices};
use bytemuck::{Pod, Zeroable};
use svm::{Access, Buffer, DeviceFaultKind, Ptr};

use crate::common::{accel, within_deadline};

#[test]
fn saxpy_over_slices_of_every_alignment() {
    within_deadline(|| {
        let accel = accel(2);
        for len in [0, 1, 3, 1000, 1024, 5000, 100_003] {
            for skip in [0, 1, 7] {
                let len = len.max(skip);
                let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
                let mut y: Vec<f32> = (0..len).map(|i| 2.0 * i as f32).collect();
                {
                    let x = svm::mirror_ref(&x[skip..]).expect("an input");
                    let mut y = svm::mirror(&mut y[skip..]).expect("a mirror");
                    accel
                        .run((y.view_mut(), x.view()), |(y, x)| {
                            for (y, x) in y.iter_mut().zip(x) {
                                *y += 3.0 * x;
                            }
                        })
                        .expect("the launch");
                    y.close().expect("all pages come home");
                }
                for (i, y) in y.iter().enumerate() {
                    let expected = if i < skip {
                        2.0 * i as f32
                    } else {
                        5.0 * i as f32
                    };
                    assert_eq!(*y, expected, "element {i} of {len}, from {skip}");
                }
            }
        }
    });
}

#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Twelve {
    a: u32,
    b: u32,
    c: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Forty([u64; 5]);

#[test]
fn elements_that_straddle_pages() {
    within_deadline(|| {
        let accel = accel(2);
        let mut data: Vec<Twelve> = (0..50_001)
            .map(|i| Twelve {
                a: i,
                b: i + 1,
                c: i + 2,
            })
            .collect();
        let mut mirror = svm::mirror(&mut data).expect("a mirror");
        accel
            .run((indices(), mirror.view_mut()), |(range, chunk)| {
                for (i, e) in range.zip(chunk) {
                    assert_eq!(e.a as usize, i);
                    e.c += 10;
                }
            })
            .expect("slices");
        let n = mirror.len();
        accel
            .run_items(n, mirror.view_mut(), |_lane, i, data| {
                let e = data.load(i)?;
                data.store(i, Twelve { b: e.b + e.c, ..e })
            })
            .expect("elements");
        for (i, e) in mirror.as_slice().iter().enumerate() {
            let i = i as u32;
            assert_eq!(
                *e,
                Twelve {
                    a: i,
                    b: 2 * i + 13,
                    c: i + 12
                }
            );
        }
        mirror.close().expect("home");

        let mut data: Vec<Forty> = (0..10_007).map(|i| Forty([i; 5])).collect();
        let mut mirror = svm::mirror(&mut data).expect("a mirror");
        let n = mirror.len();
        accel
            .run_items(n, mirror.view_mut(), |_lane, i, data| {
                let Forty(words) = data.load(i)?;
                data.store(i, Forty(words.map(|w| w * 3)))
            })
            .expect("elements");
        assert!(
            mirror
                .as_slice()
                .iter()
                .enumerate()
                .all(|(i, e)| e.0 == [3 * i as u64; 5])
        );
    });
}

#[test]
fn pages_move_there_and_back_and_are_counted() {
    within_deadline(|| {
        let accel = accel(2);
        let mut y = Buffer::<u64>::zeroed(1 << 18).expect("a buffer");
        y.as_mut_slice().fill(1);
        for round in 0..4 {
            accel
                .run(y.view_mut(), |y| y.iter_mut().for_each(|y| *y += 1))
                .expect("the launch");
            let resident = accel.resident_bytes();
            assert!(
                resident >= y.len() * 8,
                "all of it is on the device: {resident} bytes"
            );
            assert!(
                y.as_mut_slice()
                    .iter_mut()
                    .all(|y| std::mem::replace(y, round + 2) == round + 2)
            );
        }
        let stats = accel.stats();
        assert!(stats.total().far_faults > 0 && stats.total().items > 0);
        assert!(
            stats.runtime.to_device_pages() >= 4 * 512,
            "{:?}",
            stats.runtime
        );
        drop(accel);
        assert!(y.as_slice().iter().all(|&y| y == 5));
    });
}

#[test]
fn counters_by_fetch_add_add_up() {
    within_deadline(|| {
        let accel = accel(4);
        let data: Vec<u8> = (0..200_000_u32).map(|i| (i % 7 * 31) as u8).collect();
        let mut histogram = vec![0_u64; 256];
        let mut sum = vec![0_f64; 1];
        let data = svm::mirror_ref(&data).expect("an input");
        {
            let mut histogram = svm::mirror(&mut histogram).expect("a mirror");
            let mut sum = svm::mirror(&mut sum).expect("a mirror");
            accel
                .run_items(
                    data.len(),
                    (histogram.view_mut(), data.view(), sum.view_mut()),
                    |_lane, i, (h, d, s)| {
                        h.fetch_add(d.load(i)?.into(), 1)?;
                        s.fetch_add(0, 1.0)?;
                        Ok(())
                    },
                )
                .expect("the launch");
        }
        assert_eq!(sum[0], 200_000.0);
        let mut expected = vec![0_u64; 256];
        for &d in data.as_slice() {
            expected[d as usize] += 1;
        }
        assert_eq!(histogram, expected);
        let rate = accel.stats().tlb_hit_rate().expect("there were look-ups");
        assert!(rate > 0.99, "hit rate {rate}");
    });
}

#[test]
fn cpu_and_kernel_count_on_one_shared_page() {
    within_deadline(|| {
        const EACH: u64 = 20_000;
        let accel = accel(2);
        // A whole page, and one that is all edge.
        for len in [4096, 3] {
            let mut counters = vec![0_u64; len];
            {
                let mut mirror = svm::mirror(&mut counters).expect("a mirror");
                let shared = mirror.share();
                accel
                    .scope(|s| {
                        let launch =
                            s.launch_items(EACH as usize, shared.view(), |_lane, _i, c| {
                                c.fetch_add(1, 1)?;
                                Ok(())
                            })?;
                        for _ in 0..EACH {
                            shared.fetch_add(1, 1, Ordering::Relaxed);
                        }
                        launch.wait()
                    })
                    .expect("the launch");
            }
            assert_eq!(counters[1], 2 * EACH);
        }
    });
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Node {
    value: u64,
    next: Ptr<Node>,
}

/// A list that hops through all of `nodes`, whose addresses are fixed before they are mirrored.
fn link(nodes: &mut [Node]) -> Ptr<Node> {
    let n = nodes.len();
    let base = Ptr::to(&nodes[0]);
    let order: Vec<usize> = (0..n).map(|i| i * 7919 % n).collect();
    for (i, &at) in order.iter().enumerate() {
        nodes[at] = Node {
            value: i as u64,
            next: order.get(i + 1).map_or(Ptr::null(), |&to| base.add(to)),
        };
    }
    base.add(order[0])
}

#[test]
fn a_list_is_followed_through_two_mirrors() {
    within_deadline(|| {
        let accel = accel(2);
        let mut nodes = vec![Node::zeroed(); 10_007];
        let head = link(&mut nodes);
        let mut more = vec![Node {
            value: 1_000_000,
            next: head,
        }];
        let start = Ptr::to(&more[0]);
        let mut sum = vec![0_u64; 1];
        {
            let nodes = svm::mirror(&mut nodes).expect("a mirror");
            let more = svm::mirror(&mut more).expect("a mirror");
            let mut sum = svm::mirror(&mut sum).expect("a mirror");
            accel
                .run_items(
                    1,
                    (nodes.view(), more.view(), sum.view_mut()),
                    |lane, _i, (_, _, sum)| {
                        let (mut at, mut total) = (start, 0);
                        while !at.is_null() {
                            let node = lane.load(at)?;
                            total += node.value;
                            at = node.next;
                        }
                        sum.store(0, total)
                    },
                )
                .expect("the launch");
        }
        assert_eq!(sum[0], 1_000_000 + 10_006 * 10_007 / 2);
    });
}

#[test]
fn a_pointer_out_of_the_views_ends_the_launch_with_its_address() {
    within_deadline(|| {
        let accel = accel(2);
        let elsewhere = [7_u64; 4];
        let outside = Ptr::to(&elsewhere[2]);
        let mut data = vec![1_u64; 10_000];
        let (inside, last) = (Ptr::to(&data[0]), Ptr::to(&data[9_999]));
        let mirror = svm::mirror(&mut data).expect("a mirror");
        let fault = |error: Error| {
            let fault = error.device_fault().expect("a device fault");
            (fault.addr, fault.access, fault.kind)
        };

        let error = accel
            .run_items(1, mirror.view(), |lane, _, _| lane.load(outside).map(drop))
            .expect_err("a fault");
        let expected = (outside.addr(), Access::Read, DeviceFaultKind::OutOfViews);
        assert_eq!(fault(error), expected);
        let error = accel
            .run_items(1, mirror.view(), |lane, _, _| lane.store(outside, 5))
            .expect_err("a fault");
        let expected = (outside.addr(), Access::Write, DeviceFaultKind::OutOfViews);
        assert_eq!(fault(error), expected);
        let error = accel
            .run_items(1, mirror.view(), |lane, _, _| {
                lane.load(last.cast::<[u64; 2]>()).map(drop)
            })
            .expect_err("a value that ends outside");
        let expected = (last.addr(), Access::Read, DeviceFaultKind::OutOfViews);
        assert_eq!(fault(error), expected);
        let error = accel
            .run_items(1, mirror.view(), |lane, _, _| lane.store(inside, 5))
            .expect_err("a view that is read only");
        let expected = (inside.addr(), Access::Write, DeviceFaultKind::Protection);
        assert_eq!(fault(error), expected);
        mirror.close().expect("its pages are home");
        assert!(data.iter().all(|&word| word == 1) && elsewhere == [7; 4]);
    });
}

#[test]
fn the_whole_address_space_is_open_to_who_answers_for_it() {
    within_deadline(|| {
        let accel = accel(2);
        let mut elsewhere = vec![7_u64; 4];
        let outside = Ptr::from_addr(elsewhere.as_mut_ptr().expose_provenance()).add(2);
        let mut data = vec![1_u64; 10_000];
        let (first, middle, last) = (
            Ptr::to(&data[0]),
            Ptr::to(&data[5000]),
            Ptr::to(&data[9_999]),
        );
        let mut mirror = svm::mirror(&mut data).expect("a mirror");
        accel
            .run_items(1, mirror.view_mut(), |lane, _, data| {
                // SAFETY: of both vectors nobody else uses an element, and the launch ends before either.
                let load = |ptr| unsafe { lane.load_anywhere::<u64>(ptr) };
                // SAFETY: as above.
                let store = |ptr, word: u64| unsafe { lane.store_anywhere(ptr, word) };
                data.store(3, load(outside)?)?;
                store(outside, 8)?;
                store(first, load(outside)?)?;
                store(middle, 10)?;
                store(last, 9)
            })
            .expect("the unsafe door");
        // What lies in the views was stored by translation, and comes home with its page.
        let stats = mirror.stats();
        assert!(stats.to_device_pages() > 0, "{stats:?}");
        assert_eq!(mirror.as_slice()[..4], [8, 1, 1, 7]);
        assert_eq!((mirror.as_slice()[5000], mirror.as_slice()[9_999]), (10, 9));
        assert_eq!(elsewhere, [7, 7, 8, 7]);
        // Where a view permits no store, this is no way round it.
        let error = accel
            .run_items(1, mirror.view(), |lane, _, _| {
                // SAFETY: as above.
                unsafe { lane.store_anywhere(first, 5) }
            })
            .expect_err("a view that is read only");
        let fault = error.device_fault().expect("a device fault");
        assert_eq!(
            (fault.addr, fault.kind),
            (first.addr(), DeviceFaultKind::Protection)
        );
        assert_eq!(mirror.as_slice()[0], 8);
    });
}

#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Fork {
    /// Where to go on: below the key, and above it.
    children: [Ptr<Fork>; 2],
    key: u64,
    visits: u64,
}

/// Puts a search tree over `keys` into the two slices, each level in the other than the one above, and returns its root.
fn grow(even: &mut Vec<Fork>, odd: &mut Vec<Fork>, keys: std::ops::Range<u64>) -> Ptr<Fork> {
    if keys.is_empty() {
        return Ptr::null();
    }
    let key = keys.start + (keys.end - keys.start) / 2;
    // The places are there already, so that no address changes.
    let (at, last) = (even.as_ptr().expose_provenance(), even.len());
    assert!(last < even.capacity(), "the vector would move");
    even.push(Fork::zeroed());
    let below = grow(odd, even, keys.start..key);
    let above = grow(odd, even, key + 1..keys.end);
    even[last] = Fork {
        children: [below, above],
        key,
        visits: 0,
    };
    Ptr::from_addr(at).add(last)
}

/// A tree whose nodes point from one mirror into the other and back. Kernels search it for every key and for none, by pointers alone, and
/// count their visits where they pass.
#[test]
fn a_tree_is_searched_across_two_mirrors() {
    const KEYS: u64 = 20_000;
    within_deadline(|| {
        let accel = accel(4);
        let mut levels = [0; 2].map(|_| Vec::with_capacity(KEYS as usize));
        let [even, odd] = &mut levels;
        let root = grow(even, odd, 0..KEYS);
        let mut found = vec![0_u64; KEYS as usize + 100];
        {
            let mut even = svm::mirror(even).expect("a mirror");
            let mut odd = svm::mirror(odd).expect("a mirror");
            let mut found = svm::mirror(&mut found).expect("a mirror");
            let nr_items = found.len();
            let views = (found.view_mut(), even.view_mut(), odd.view_mut());
            accel
                .run_items(nr_items, views, |lane, i, (found, ..)| {
                    let mut at = root;
                    while !at.is_null() {
                        let node = lane.load(at)?;
                        let visits = at.addr() + std::mem::offset_of!(Fork, visits);
                        lane.fetch_add(Ptr::<u64>::from_addr(visits), 1)?;
                        if node.key == i as u64 {
                            return found.store(i, at.addr() as u64);
                        }
                        at = node.children[usize::from(node.key < i as u64)];
                    }
                    Ok(())
                })
                .expect("a launch");
            for mirror in [&even, &odd] {
                assert!(mirror.stats().to_device_pages() > 0, "{:?}", mirror.stats());
            }
        }
        let nodes = levels.iter().flatten();
        for node in nodes.clone() {
            assert_eq!(found[node.key as usize], Ptr::to(node).addr() as u64);
        }
        assert!(found[KEYS as usize..].iter().all(|&addr| addr == 0));
        // The same search by the CPU, over keys instead of pointers, says how often each was passed.
        let mut passed = vec![0_u64; KEYS as usize];
        for wanted in 0..found.len() as u64 {
            let mut keys = 0..KEYS;
            while !keys.is_empty() {
                let key = keys.start + (keys.end - keys.start) / 2;
                passed[key as usize] += 1;
                match wanted.cmp(&key) {
                    Cmp::Equal => break,
                    Cmp::Less => keys.end = key,
                    Cmp::Greater => keys.start = key + 1,
                }
            }
        }
        assert_eq!(nodes.clone().count(), KEYS as usize);
        nodes.for_each(|node| assert_eq!(node.visits, passed[node.key as usize]));
    });
}

#[test]
fn a_failing_kernel_ends_its_launch_and_nothing_else() {
    within_deadline(|| {
        let accel = accel(2);
        let mut data = vec![1_u32; 500_000];
        let mut mirror = svm::mirror(&mut data).expect("a mirror");
        let error = accel
            .run((indices(), mirror.view_mut()), |(range, _)| {
                assert!(!range.contains(&77_777), "seventy-seven");
            })
            .expect_err("a panic");
        assert!(
            matches!(&error, Error::KernelPanicked(m) if m == "seventy-seven"),
            "{error:?}"
        );
        let error = accel
            .run_items(10_000, mirror.view(), |_, i, data| {
                data.load(i + 495_000).map(drop)
            })
            .expect_err("an index out of range");
        assert!(error.to_string().contains("out of range"), "{error}");
        let text = svm::Error::from(error).to_string();
        assert!(
            text.contains("out of range for a view of 500000 elements"),
            "{text}"
        );

        let short = vec![0_u32; 3];
        let short = svm::mirror_ref(&short).expect("an input");
        let error = accel
            .run((mirror.view_mut(), short.view()), |_| {})
            .expect_err("lengths differ");
        assert!(
            matches!(
                error,
                Error::LengthMismatch {
                    expected: 500_000,
                    found: 3
                }
            ),
            "{error}"
        );

        let nested = Mutex::new(None);
        accel
            .run(short.view(), |_| {
                *nested.lock().expect("unpoisoned") = Some(accel.run(short.view(), |_| {}));
            })
            .expect("the outer launch");
        assert!(matches!(nested.into_inner(), Ok(Some(Err(Error::Nested)))));

        accel
            .run(mirror.view_mut(), |d| d.fill(9))
            .expect("it lives on");
        mirror.close().expect("home");
        assert!(data.iter().all(|&d| d == 9));
    });
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let with = |options| Accelerator::with_options(options).expect_err("refused");
    assert!(matches!(
        with(Options::new().workers(0)),
        Error::BadWorkerCount(0)
    ));
    assert!(matches!(
        with(Options::new().workers(100_000)),
        Error::BadWorkerCount(100_000)
    ));
    assert!(matches!(
        with(Options::new().memory_bytes(0)),
        Error::NoDeviceMemory
    ));
    assert!(matches!(
        with(Options::new().cache_entries(3)),
        Error::BadCacheSize(3)
    ));
}

#[test]
fn a_scope_overlaps_and_ends_everything() {
    within_deadline(|| {
        let accel = accel(2);
        let (mut a, mut b) = (vec![0_u32; 300_000], vec![0_u32; 300_000]);
        {
            let mut a = svm::mirror(&mut a).expect("a mirror");
            let mut b = svm::mirror(&mut b).expect("a mirror");
            let here = AtomicUsize::new(0);
            accel
                .scope(|s| {
                    let first = s.launch(a.view_mut(), |a| a.fill(1))?;
                    s.launch(b.view_mut(), |b| b.fill(2))?;
                    here.fetch_add(1, Ordering::Relaxed);
                    first.wait()
                })
                .expect("both launches");
            assert_eq!(here.load(Ordering::Relaxed), 1);
            assert!(a.as_slice().iter().all(|&a| a == 1) && b.as_slice().iter().all(|&b| b == 2));

            // A launch that nobody waited for still fails the scope.
            let error = accel
                .scope(|s| s.launch(a.view_mut(), |_| panic!("unwatched")).map(drop))
                .expect_err("a failure");
            assert!(
                matches!(&error, Error::KernelPanicked(m) if m == "unwatched"),
                "{error:?}"
            );

            // Unwinding waits, too.
            let ended = AtomicBool::new(false);
            let unwound = catch_unwind(AssertUnwindSafe(|| {
                let _ = accel.scope::<(), _>(|s| {
                    s.launch_items(1, b.view_mut(), |_, i, b| {
                        std::thread::sleep(Duration::from_millis(50));
                        b.store(i, 77)?;
                        ended.store(true, Ordering::Relaxed);
                        Ok(())
                    })?;
                    panic!("in the scope");
                });
            }));
            assert!(unwound.is_err() && ended.load(Ordering::Relaxed));
            assert_eq!(b.as_slice()[0], 77);
        }
    });
}

#[test]
fn detached_launches_hand_their_buffers_back() {
    within_deadline(|| {
        let accel = accel(2);
        let y = Buffer::from_slice(&[1_u32; 100_000]).expect("a buffer");
        let x = Buffer::from_slice(&[2_u32; 100_000]).expect("a buffer");
        let job = accel
            .spawn((y, x), |(y, x)| {
                for (y, x) in y.iter_mut().zip(x) {
                    *y += *x;
                }
            })
            .expect("the launch");
        let ((y, x), result) = job.join();
        result.expect("no failure");
        assert!(y.as_slice().iter().all(|&y| y == 3) && x.as_slice().iter().all(|&x| x == 2));

        let job = accel
            .spawn_items(1, y, |_, _, _| panic!("detached"))
            .expect("the launch");
        let (y, result) = job.join();
        assert!(matches!(result, Err(Error::KernelPanicked(m)) if m == "detached"));
        assert_eq!(y.len(), 100_000);

        // Nobody joins: it runs to its end all the same, before the accelerator goes.
        let (sender, receiver) = mpsc::channel();
        let sender = Mutex::new(sender);
        drop(accel.spawn(y, move |y| {
            std::thread::sleep(Duration::from_millis(1));
            sender
                .lock()
                .expect("unpoisoned")
                .send(y.len())
                .expect("someone listens");
        }));
        drop(accel);
        assert_eq!(receiver.iter().sum::<usize>(), 100_000);
    });
}

/// What a fault brings along is a convenience: where it cannot be had, the items before it are worked on all the same.
#[test]
fn a_page_that_may_not_be_read_ends_the_item_that_needs_it() {
    const PAGE: usize = 4096;
    within_deadline(|| {
        for is_write in [false, true] {
            let accel = accel(1);
            // Items of 256 KiB, whose borders are at multiples of it, one after the other.
            let mut data = Buffer::<u64>::zeroed((1 << 20) / 8).expect("a buffer");
            data.as_mut_slice().fill(1);
            let base = data.as_slice().as_ptr().addr();
            let forbidden = base + (1 << 20) - PAGE;
            let last_item = forbidden & !((256 << 10) - 1);
            let protect = |prot| {
                let at = std::ptr::with_exposed_provenance_mut(forbidden);
                // SAFETY: a page of the buffer's own, which nobody touches until it may be touched again.
                unsafe { svm::mprotect(at, PAGE, prot) }.expect("a page of ours");
            };
            protect(libc::PROT_NONE);
            let done = std::sync::atomic::AtomicUsize::new(0);
            let error = if is_write {
                accel.run(data.view_mut(), |part| {
                    done.fetch_add(part.len(), Ordering::Relaxed);
                    part.fill(2);
                })
            } else {
                accel.run(data.view(), |part| {
                    done.fetch_add(part.len(), Ordering::Relaxed);
                    assert!(part.iter().all(|&x| x == 1));
                })
            };
            let error = error.expect_err("a page that may not be touched");
            let fault = error.device_fault().expect("a device fault");
            let expected = (forbidden, DeviceFaultKind::NoAccess);
            assert_eq!((fault.addr, fault.kind), expected);
            let done = done.into_inner();
            assert_eq!(done, (last_item - base) / 8, "all items but the last");
            protect(libc::PROT_READ | libc::PROT_WRITE);
            let (first, rest) = data.as_slice().split_at(done);
            let written = if is_write { 2 } else { 1 };
            assert!(first.iter().all(|&x| x == written) && rest.iter().all(|&x| x == 1));
        }
    });
}

#[test]
fn a_working_set_larger_than_the_device() {
    within_deadline(|| {
        let memory = 2 << 20;
        let accel = Accelerator::with_options(Options::new().workers(2).memory_bytes(memory))
            .expect("an accelerator");
        let len = 2 * memory / 4;
        let mut y = Buffer::<u32>::zeroed(len).expect("a buffer");
        let x: Vec<u32> = (0..len as u32).collect();
        let x = svm::mirror_ref(&x).expect("an input");
        for _ in 0..3 {
            accel
                .run((y.view_mut(), x.view()), |(y, x)| {
                    for (y, x) in y.iter_mut().zip(x) {
                        *y += *x;
                    }
                })
                .expect("the launch");
            assert!(
                accel.resident_bytes() <= memory,
                "{} bytes",
                accel.resident_bytes()
            );
        }
        // Every page is touched about ten times, in an order that suits no cache.
        let touched = 10_000;
        accel
            .run_items(touched, y.view_mut(), |_, i, y| {
                y.fetch_add(i * 7919 % len, 1).map(drop)
            })
            .expect("elements");
        let mut expected: Vec<u32> = (0..len as u32).map(|i| 3 * i).collect();
        (0..touched).for_each(|i| expected[i * 7919 % len] += 1);
        assert!(y.as_slice() == expected);

        let error = Accelerator::with_options(Options::new().workers(8).memory_bytes(16 << 10))
            .and_then(|tiny| tiny.run((y.view_mut(), x.view()), |_| {}))
            .expect_err("eight workers with two spans each do not fit");
        assert!(
            matches!(
                error,
                Error::DeviceMemoryTooSmall {
                    available: 16384,
                    ..
                }
            ),
            "{error:?}"
        );
    });
}

/// The spans of one item just fit, so each page that comes drives another one out.
#[test]
fn a_device_of_a_few_pages() {
    within_deadline(|| {
        for pages in [6, 7, 12] {
            let accel =
                Accelerator::with_options(Options::new().workers(1).memory_bytes(pages * 4096))
                    .expect("an accelerator");
            let len = 20_001;
            let (mut a, mut b, c) = (vec![1_u32; len], vec![2_u32; len], vec![3_u32; len]);
            {
                let mut a = svm::mirror(&mut a[1..]).expect("a mirror");
                let mut b = svm::mirror(&mut b[1..]).expect("a mirror");
                let c = svm::mirror_ref(&c[1..]).expect("an input");
                accel
                    .run(
                        (indices(), a.view_mut(), b.view_mut(), c.view()),
                        |(range, a, b, c)| {
                            for (((i, a), b), c) in range.zip(a).zip(b).zip(c) {
                                *a += *b * *c + i as u32;
                                *b = 0;
                            }
                        },
                    )
                    .expect("the launch");
                assert!(accel.resident_bytes() <= pages * 4096);
                a.close().and(b.close()).expect("home");
            }
            assert!(
                a[1..].iter().enumerate().all(|(i, &a)| a == 7 + i as u32) && a[0] == 1,
                "{pages} pages"
            );
            assert!(b[1..].iter().all(|&b| b == 0) && b[0] == 2, "{pages} pages");
        }
    });
}

#[test]
fn a_forked_child_is_refused_and_does_not_hang() {
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, alarm, fork};

    let accel = accel(2);
    let mut data = Buffer::<u64>::zeroed(10_000).expect("a buffer");
    accel
        .run(data.view_mut(), |d| d.fill(1))
        .expect("the launch");
    // SAFETY: the child allocates little, takes no lock that another thread of this test can hold, and ends by `_exit`.
    match unsafe { fork() }.expect("a child") {
        ForkResult::Child => {
            alarm::set(20);
            let refused = matches!(
                accel.run(data.view_mut(), |d| d.fill(2)),
                Err(Error::Forked)
            );
            drop(accel);
            // SAFETY: ends the child without the harness's exit handlers.
            unsafe { nix::libc::_exit(if refused { 0 } else { 1 }) };
        }
        ForkResult::Parent { child } => {
            assert_eq!(
                waitpid(child, None).expect("it ends"),
                WaitStatus::Exited(child, 0)
            );
        }
    }
    accel
        .run(data.view_mut(), |d| d.iter_mut().for_each(|d| *d += 1))
        .expect("the parent goes on");
    assert!(data.as_slice().iter().all(|&d| d == 2));
}

#[test]
fn kernels_read_captured_cpu_memory() {
    within_deadline(|| {
        let accel = accel(3);
        let len = 200_000;
        let mut x = Buffer::<u64>::zeroed(len).expect("a buffer");
        x.as_mut_slice()
            .iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x = i as u64);
        // On the device, and there to be written.
        accel
            .run(x.view_mut(), |x| x.iter_mut().for_each(|x| *x += 1))
            .expect("the launch");
        let mut y = Buffer::<u64>::zeroed(len).expect("a buffer");
        let captured = x.as_slice();
        accel
            .run((indices(), y.view_mut(), x.view()), |(range, y, x)| {
                for ((i, y), x) in range.zip(y).zip(x) {
                    *y = *x + captured[len - 1 - i];
                }
            })
            .expect("the launch");
        assert!(y.as_slice().iter().all(|&y| y == len as u64 + 1));
    });
}

#[test]
fn three_mirrors_four_workers_and_cpu_writers() {
    within_deadline(|| {
        let accel = accel(4);
        let n = 3 << 16;
        let mut data = [vec![0_u64; n], vec![0_u64; n], vec![0_u64; n]];
        let [a, b, c] = &mut data;
        {
            let (mut a, mut b, mut c) = (
                svm::mirror(a).expect("a mirror"),
                svm::mirror(b).expect("a mirror"),
                svm::mirror(c).expect("a mirror"),
            );
            let (a, b, c) = (a.share(), b.share(), c.share());
            let stop = AtomicBool::new(false);
            let mut written = 0;
            accel
                .scope(|s| {
                    let launch =
                        s.launch_items(n, (a.view(), b.view(), c.view()), |_, i, (a, b, c)| {
                            a.fetch_add(i, 1)?;
                            b.fetch_add(i * 7 % n, 1)?;
                            c.fetch_add(i * 7919 % n, 1)?;
                            Ok(())
                        })?;
                    while !launch.is_finished() && !stop.load(Ordering::Relaxed) {
                        for shared in [&a, &b, &c] {
                            shared.fetch_add(written * 4099 % n, 1 << 32, Ordering::Relaxed);
                        }
                        written += 1;
                    }
                    launch.wait()
                })
                .expect("the launch");
            assert!(written > 0);
            let mut cpu = vec![0_u64; n];
            (0..written).for_each(|w| cpu[w * 4099 % n] += 1);
            for shared in [&a, &b, &c] {
                for (i, cpu) in cpu.iter().enumerate() {
                    assert_eq!(shared.load(i), (cpu << 32) + 1, "element {i}");
                }
            }
        }
    });
}

#[test]
fn a_system_call_writes_to_pages_that_the_device_had() {
    within_deadline(|| {
        use std::io::Read;
        let accel = accel(1);
        let mut data = vec![7_u8; 100_000];
        let mut mirror = svm::mirror(&mut data).expect("a mirror");
        let mut zeros = std::fs::File::open("/dev/zero").expect("a file");
        for pinned in [false, true] {
            accel
                .run(mirror.view_mut(), |chunk| chunk.fill(1))
                .expect("the launch");
            if pinned {
                let mut elements = mirror.pin_mut(10_000..90_000).expect("all pages come home");
                zeros
                    .read_exact(&mut elements)
                    .expect("they are there, and writable");
            } else {
                let refused = zeros.read_exact(mirror.as_mut_slice()).unwrap_err();
                assert_eq!(refused.raw_os_error(), Some(14), "EFAULT: {refused}");
            }
        }
        assert!(mirror.pin_mut(0..100_001).is_err(), "out of bounds");
        mirror.close().expect("all pages come home");
        assert!((10_000..90_000).all(|i| data[i] == 0));
        assert!((0..10_000).chain(90_000..100_000).all(|i| data[i] == 1));
    });
}
