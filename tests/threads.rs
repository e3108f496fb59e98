//! Threads of every kind on mirrored memory, and the ends that launches, accelerators and mirrors can come to.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use accel_sim::{Accelerator, indices};
use rayon::prelude::*;
use svm::{Access, Buffer, Delivery, Granule, Options};
use tests::{TestDevice, Watchdog, usable};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

fn every_way(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::new(name);
    if !usable() {
        return;
    }
    for delivery in [Delivery::Inline, Delivery::Thread] {
        for granule in [Granule::Page, Granule::Big, Granule::Huge] {
            test(&Options::new().delivery(delivery).granule(granule));
        }
    }
}

fn accel(workers: usize) -> Accelerator {
    Accelerator::with_options(
        accel_sim::Options::new()
            .workers(workers)
            .fault_timeout(Duration::from_secs(10)),
    )
    .unwrap()
}

#[test]
fn three_mirrors_and_four_workers_with_cpu_writers() {
    every_way("three mirrors", |options| {
        let accel = accel(4);
        const N: usize = 100_001;
        let mut memory = [vec![1u64; N], vec![1u64; N], vec![1u64; N]];
        let [a, b, c] = &mut memory;
        let mut a = svm::mirror_with(&mut a[1..], options).unwrap();
        let mut b = svm::mirror_with(&mut b[1..], options).unwrap();
        let mut c = svm::mirror_with(&mut c[1..], options).unwrap();
        let mut rounds = 0;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(500) {
            rounds += 1;
            // Two are the device's, one is the CPU's, and the roles go round.
            accel
                .scope(|scope| {
                    scope.launch((a.view_mut(), b.view()), |(a, b)| {
                        a.iter_mut()
                            .zip(b)
                            .for_each(|(a, b)| *a = a.wrapping_add(*b));
                    })?;
                    let chunk = c.len().div_ceil(3);
                    std::thread::scope(|threads| {
                        for part in c.as_mut_slice().chunks_mut(chunk) {
                            threads.spawn(|| part.iter_mut().for_each(|c| *c = c.wrapping_mul(3)));
                        }
                    });
                    // A reader shares what the device reads.
                    assert!(b.as_slice().iter().all(|&x| x == b.as_slice()[0]));
                    Ok(())
                })
                .unwrap();
            std::mem::swap(&mut a, &mut b);
            std::mem::swap(&mut b, &mut c);
        }
        for mirror in [a, b, c] {
            assert!(
                mirror.as_slice().iter().all(|&x| x == mirror.as_slice()[0]),
                "after {rounds} rounds"
            );
            assert_eq!(mirror.stats().anomalies, 0);
            mirror.close().unwrap();
        }
        let mut model = [1u64; 3];
        for _ in 0..rounds {
            let [a, b, c] = model;
            // What the swaps leave: the second first, then the third, then the first.
            model = [b, c.wrapping_mul(3), a.wrapping_add(b)];
        }
        let mut found: Vec<u64> = memory.iter().map(|m| m[1]).collect();
        let mut wanted = model.to_vec();
        found.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(found, wanted);
        assert!(memory.iter().all(|m| m[0] == 1), "the edge's neighbour");
    });
}

#[test]
fn rayon_over_pages_that_are_away() {
    every_way("rayon", |options| {
        let accel = accel(2);
        let mut buffer = Buffer::<u64>::with_options(400_000, options).unwrap();
        for round in 0..4u64 {
            accel
                .run((indices(), buffer.view_mut()), |(i, x)| {
                    x.iter_mut().zip(i).for_each(|(x, i)| *x += i as u64);
                })
                .unwrap();
            buffer.as_mut_slice().par_iter_mut().for_each(|x| *x += 1);
            let wrong = buffer
                .as_slice()
                .par_iter()
                .enumerate()
                .find_any(|&(i, &x)| x != (round + 1) * (i as u64 + 1));
            assert_eq!(wrong, None, "round {round}");
        }
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

/// What a thread made by `pthread_create` works on.
struct Job {
    words: *mut u64,
    len: usize,
    alternate_stack: bool,
    own_stack: Option<Options>,
}

extern "C" fn foreign(job: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: the creator passes a job and joins before it ends.
    let job = unsafe { &*job.cast::<Job>() };
    let mut stack = vec![0u8; 64 << 10];
    if job.alternate_stack {
        let alternate = libc::stack_t {
            ss_sp: stack.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: stack.len(),
        };
        // SAFETY: the memory stays until the stack is given up below.
        let outcome = unsafe { libc::sigaltstack(&raw const alternate, std::ptr::null_mut()) };
        assert_eq!(outcome, 0);
    }
    if let Some(options) = &job.own_stack {
        // Its own stack stays where it is: without an alternate one its handler has nowhere else to run.
        let device = TestDevice::new().unwrap();
        let mut array = [7u64; 6 * WORDS];
        let mut mirror = svm::mirror_with(&mut array, options).unwrap();
        let view = mirror.view_mut();
        device
            .write(view.region(), view.addr() + 8, &9u64.to_ne_bytes())
            .unwrap();
        drop(mirror);
        assert_eq!((array[0], array[1], array[6 * WORDS - 1]), (7, 9, 7));
    }
    // SAFETY: the words are this thread's alone until it is joined.
    let words = unsafe { std::slice::from_raw_parts_mut(job.words, job.len) };
    words.iter_mut().for_each(|word| *word += 1);
    let none = libc::stack_t {
        ss_sp: std::ptr::null_mut(),
        ss_flags: libc::SS_DISABLE,
        ss_size: 0,
    };
    // SAFETY: no handler runs on it.
    unsafe { libc::sigaltstack(&raw const none, std::ptr::null_mut()) };
    std::ptr::null_mut()
}

#[test]
fn threads_that_rust_has_not_made() {
    every_way("foreign threads", |options| {
        let device = TestDevice::new().unwrap();
        let mut memory: Vec<u64> = (0..60_000).collect();
        for (alternate_stack, own_stack) in [(false, false), (true, false), (false, true)] {
            let mut mirror = svm::mirror_with(&mut memory, options).unwrap();
            let view = mirror.view_mut();
            device
                .fault_in(view.region(), view.addr(), view.len_bytes(), Access::Write)
                .unwrap();
            let own_stack = own_stack.then(|| options.clone());
            let slice = mirror.as_mut_slice();
            let job = Job {
                words: slice.as_mut_ptr(),
                len: slice.len(),
                alternate_stack,
                own_stack,
            };
            let mut thread = 0;
            // SAFETY: the job outlives the thread, which is joined below; the default attributes.
            let made = unsafe {
                libc::pthread_create(
                    &raw mut thread,
                    std::ptr::null(),
                    foreign,
                    (&raw const job).cast_mut().cast(),
                )
            };
            assert_eq!(made, 0);
            // SAFETY: a thread just made, joined once.
            let outcome = unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
            assert_eq!(outcome, 0);
            assert_eq!(mirror.stats().anomalies, 0);
            mirror.close().unwrap();
        }
        assert!(memory.iter().enumerate().all(|(i, &x)| x == i as u64 + 3));
    });
}

#[test]
fn a_working_set_of_twice_the_device_memory() {
    every_way("twice the memory", |options| {
        let options = options.clone();
        for memory in [1 << 20, 4 << 20] {
            let shape = accel_sim::Options::new()
                .workers(2)
                .memory_bytes(memory)
                .fault_timeout(Duration::from_secs(10));
            let accel = Accelerator::with_options(shape).unwrap();
            let n = 2 * memory / 8 / 2;
            let mut x = Buffer::<u64>::with_options(n, &options).unwrap();
            let mut y = Buffer::<u64>::with_options(n, &options).unwrap();
            for round in 1..4u64 {
                accel
                    .run((x.view_mut(), y.view_mut()), |(x, y)| {
                        x.iter_mut().zip(y).for_each(|(x, y)| {
                            *x += 1;
                            *y += *x;
                        });
                    })
                    .unwrap();
                assert!(
                    accel.resident_bytes() <= memory,
                    "{} of {memory}",
                    accel.resident_bytes()
                );
                accel
                    .run_items(n / 7, x.view_mut(), |_lane, i, x| {
                        x.fetch_add(i * 7, round).map(drop)
                    })
                    .unwrap();
                accel
                    .run_items(n / 7, x.view_mut(), |_lane, i, x| {
                        x.fetch_add(i * 7, 0u64.wrapping_sub(round)).map(drop)
                    })
                    .unwrap();
                assert!(x.as_slice().iter().all(|&x| x == round));
                assert!(y.as_slice().iter().all(|&y| y == round * (round + 1) / 2));
            }
            assert!(accel.stats().runtime.evicted_pages > 0);
            assert_eq!(x.stats().anomalies + y.stats().anomalies, 0);
            drop((x, y));
            assert_eq!(accel.resident_bytes(), 0);
        }
    });
}

#[test]
fn a_kernel_that_panics_leaves_memory_and_accelerator_alive() {
    every_way("panics", |options| {
        let accel = accel(3);
        let mut buffer = Buffer::<u64>::with_options(200_000, options).unwrap();
        for round in 0..5 {
            buffer.as_mut_slice().fill(1);
            let ended = accel.run((indices(), buffer.view_mut()), |(range, chunk)| {
                chunk.fill(2);
                if range.contains(&(round * 40_000)) {
                    // Not `panic!`: its message on stderr is of no use here.
                    std::panic::resume_unwind(Box::new("on purpose"));
                }
            });
            assert!(matches!(ended, Err(accel_sim::Error::KernelPanicked(m)) if m == "on purpose"));
            assert!(buffer.as_slice().iter().all(|&x| x == 1 || x == 2));
            let ended = accel.run_items(1000, buffer.view_mut(), |_lane, i, x| {
                x.store(i, 3)?;
                if i == 500 {
                    std::panic::resume_unwind(Box::new("on purpose"));
                }
                Ok(())
            });
            assert!(ended.is_err());
            accel.run(buffer.view_mut(), |chunk| chunk.fill(4)).unwrap();
            assert!(buffer.as_slice().iter().all(|&x| x == 4));
        }
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

#[test]
fn an_accelerator_that_goes_first_brings_its_pages_home() {
    every_way("accelerator first", |options| {
        let mut memory: Vec<u64> = (0..100_000).collect();
        let mut mirror = svm::mirror_with(&mut memory[3..], options).unwrap();
        let keeps = accel(1);
        for round in 1..4u64 {
            let goes = accel(2);
            goes.run(mirror.view_mut(), |x| x.iter_mut().for_each(|x| *x += 1))
                .unwrap();
            keeps
                .run((indices(), mirror.view()), |(i, x)| {
                    assert!(x.iter().zip(i).all(|(&x, i)| x == i as u64 + 3 + round));
                })
                .unwrap();
            goes.run(mirror.view(), |x| assert!(x[0] > 0)).unwrap();
            drop(goes);
            assert!(
                mirror
                    .as_slice()
                    .iter()
                    .enumerate()
                    .all(|(i, &x)| x == i as u64 + 3 + round)
            );
        }
        assert_eq!(mirror.stats().anomalies, 0);
        drop(keeps);
        drop(mirror);
        assert!(
            memory
                .iter()
                .enumerate()
                .all(|(i, &x)| x == i as u64 + if i < 3 { 0 } else { 3 })
        );
    });
}

/// An accelerator goes while mirrors that it has mapped are dropped by others.
#[test]
fn accelerators_and_mirrors_that_go_at_once() {
    every_way("going at once", |options| {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(400) {
            let accel = accel(2);
            let mut buffers: Vec<_> = (0..3)
                .map(|_| Buffer::<u64>::with_options(20_000, options).unwrap())
                .collect();
            for buffer in &mut buffers {
                accel.run(buffer.view_mut(), |x| x.fill(5)).unwrap();
            }
            std::thread::scope(|scope| {
                for buffer in buffers.drain(..) {
                    scope.spawn(move || {
                        assert!(buffer.as_slice().iter().step_by(700).all(|&x| x == 5));
                        drop(buffer);
                    });
                }
                scope.spawn(move || drop(accel));
            });
        }
    });
}

#[test]
fn two_accelerators_on_the_same_memory() {
    every_way("two accelerators", |options| {
        let accels = [accel(2), accel(2)];
        let mut memory = vec![0u64; 50_000];
        let mut mirror = svm::mirror_with(&mut memory, options).unwrap();
        let n = mirror.len();
        {
            // All four workers and this thread on the same words, at once.
            let shared = mirror.share();
            std::thread::scope(|scope| {
                for accel in &accels {
                    scope.spawn(|| {
                        accel
                            .run_items(n, shared.view(), |_lane, i, x| x.fetch_add(i, 1).map(drop))
                            .unwrap();
                    });
                }
                for i in (0..n).rev() {
                    shared.fetch_add(i, 1, Ordering::Relaxed);
                }
            });
        }
        assert!(mirror.as_slice().iter().all(|&x| x == 3));
        // Both read at once; then each writes in turn.
        std::thread::scope(|scope| {
            for accel in &accels {
                scope.spawn(|| {
                    accel
                        .run(mirror.view(), |x| assert!(x.iter().all(|&x| x == 3)))
                        .unwrap();
                });
            }
            assert!(mirror.as_slice().iter().all(|&x| x == 3));
        });
        for (i, accel) in accels.iter().enumerate() {
            accel
                .run(mirror.view_mut(), |x| x.iter_mut().for_each(|x| *x += 1))
                .unwrap();
            accels[1 - i]
                .run(mirror.view(), |x| {
                    assert!(x.iter().all(|&x| x == 4 + i as u64));
                })
                .unwrap();
        }
        assert!(mirror.as_slice().iter().all(|&x| x == 5));
        assert_eq!(mirror.stats().anomalies, 0);
    });
}

/// Which types may go to other threads, and be shared with them, is exactly what their elements permit: of `Mirror`, `Buffer` and `ViewMut` as
/// of `&mut [T]`, of `MirrorRef` and `View` as of `&[T]`, of `Shared` and `SharedView` as of atomics of `T`. All of it when this compiles.
mod auto_traits {
    use std::cell::Cell;
    use std::marker::PhantomData;
    use std::sync::MutexGuard;

    use bytemuck::{Pod, Zeroable};
    use svm::{Buffer, Mirror, MirrorRef, Pin, Shared, SharedView, View, ViewMut};

    fn is_send<T: Send>() {}
    fn is_sync<T: Sync>() {}

    /// Whatever `T` is.
    #[expect(dead_code, reason = "it compiles, which says it all")]
    fn where_the_elements_are<S: Pod + Send, Y: Pod + Sync>() {
        is_send::<(Mirror<'_, S>, Buffer<S>, ViewMut<'_, S>)>();
        is_sync::<(Mirror<'_, Y>, Buffer<Y>, ViewMut<'_, Y>)>();
        is_send::<(MirrorRef<'_, Y>, View<'_, Y>)>();
        is_sync::<(MirrorRef<'_, Y>, View<'_, Y>)>();
        is_send::<(Shared<'_, S>, SharedView<'_, S>)>();
        is_sync::<(Shared<'_, S>, SharedView<'_, S>)>();
        is_send::<Pin<'_>>();
        is_sync::<Pin<'_>>();
    }

    /// Elements that are plain data, and bound to their thread by what they stand for.
    macro_rules! elements {
        ($($name:ident $like:ty;)*) => { $(
            #[derive(Clone, Copy)]
            #[repr(transparent)]
            struct $name(u64, PhantomData<$like>);
            // SAFETY: a word, and nothing.
            unsafe impl Zeroable for $name {}
            // SAFETY: as above.
            unsafe impl Pod for $name {}
        )* };
    }

    elements! {
        NotSend MutexGuard<'static, ()>;
        NotSync Cell<u64>;
    }

    /// Compiles only if the types are none that implement the trait: else `of` could mean either of two.
    macro_rules! are_not {
        ($trait:ident: $($type:ty),* $(,)?) => { $(
            const _: fn() = || {
                trait Ambiguous<A> {
                    fn of() {}
                }
                struct Implementor;
                impl<T: ?Sized> Ambiguous<()> for T {}
                impl<T: ?Sized + $trait> Ambiguous<Implementor> for T {}
                let _ = <$type as Ambiguous<_>>::of;
            };
        )* };
    }

    are_not!(Send: NotSend, Mirror<'_, NotSend>, Buffer<NotSend>, ViewMut<'_, NotSend>);
    are_not!(Send: Shared<'_, NotSend>, SharedView<'_, NotSend>);
    are_not!(Sync: Shared<'_, NotSend>, SharedView<'_, NotSend>);
    are_not!(Sync: NotSync, Mirror<'_, NotSync>, Buffer<NotSync>, ViewMut<'_, NotSync>);
    are_not!(Send: MirrorRef<'_, NotSync>, View<'_, NotSync>);
    are_not!(Sync: MirrorRef<'_, NotSync>, View<'_, NotSync>);
}
