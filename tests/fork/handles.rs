//! Handles of the parent's in a child, which answer that they are forked: devices, jobs, scopes, regions, mirrors; and its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use accel_sim::{Accelerator, ElementsMut};
use svm::{
    Access, AttachOptions, Device, DeviceLock, ErrorKind, Invalidation, MapInfo, WouldBlock,
};
use tests::{TestDevice, each_option};

use crate::PAGE;
use crate::fixture::{
    do_not_outlive_the_parent, filled, in_child, nr_words, take, wait_for, wait_until,
};

#[test]
fn handles_answer_forked_in_the_child_which_can_start_its_own() {
    each_option("own", |options| {
        let mut buffer = filled(options);
        let device = TestDevice::new().unwrap();
        take(&device, &mut buffer);
        assert!(in_child(|| {
            let view = buffer.view_mut();
            let forked = device
                .read(view.region(), view.addr(), &mut [0; 8])
                .unwrap_err();
            if *forked.kind() != svm::ErrorKind::Forked || !device.attachment().is_forked() {
                return false;
            }
            let mut own = filled(options);
            let own_device = TestDevice::new().unwrap();
            let view = own.view_mut();
            own_device
                .write(view.region(), view.addr(), &[9; 8])
                .unwrap();
            let ok = own.as_slice()[0] == u64::from_ne_bytes([9; 8]) && own.as_slice()[1] == 1;
            drop((own, own_device, buffer, device));
            ok
        }));
    });
}

/// Lets a kernel go when it is dropped: a failed assertion is to be seen, not a hang.
struct LetGo<'a>(&'a AtomicBool);

impl Drop for LetGo<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn is_forked<T>(result: Result<T, accel_sim::Error>) -> bool {
    matches!(result, Err(accel_sim::Error::Forked))
}

#[test]
fn a_job_in_flight_is_not_the_childs() {
    each_option("job", |options| {
        let accel = Accelerator::with_options(accel_sim::Options::new().workers(2)).unwrap();
        let buffer = filled(options);
        let flags = Arc::new((AtomicBool::new(false), AtomicBool::new(false)));
        let _end = LetGo(&flags.1);
        let seen = flags.clone();
        let job = accel
            .spawn_items(2, buffer, move |_, i, words| {
                words.store(i, 77)?;
                seen.0.store(true, Ordering::Release);
                wait_until("the kernel was not let go", || {
                    seen.1.load(Ordering::Acquire)
                });
                words.store(i + 2, 78)
            })
            .unwrap();
        wait_until("the kernel did not begin", || {
            flags.0.load(Ordering::Acquire)
        });
        let (mut accel, mut job) = (Some(accel), Some(job));
        assert!(in_child(|| {
            let (accel, job) = (accel.take().unwrap(), job.take().unwrap());
            let finished = job.is_finished();
            let (mut buffer, result) = job.join();
            // As they were at the fork: the kernel wrote the first two words, or one of them.
            let words: &[u64] = buffer.as_slice();
            let same = words.iter().zip(0..).skip(2).all(|(&x, i)| x == i);
            let begun = words[..2].contains(&77);
            buffer.as_mut_slice().fill(3);
            let answers = [
                is_forked(result),
                is_forked(accel.release()),
                is_forked(accel.run(buffer.view_mut(), |x| x.fill(4))),
                is_forked(accel.scope(|_| Ok(()))),
            ];
            // They answer, whatever they say.
            let _ = (accel.stats(), accel.resident_bytes(), buffer.stats());
            let mine = buffer.as_slice().iter().all(|&x| x == 3);
            drop((buffer, accel));
            finished && same && begun && mine && answers == [true; 4]
        }));
        // A child may as well drop them unused, in either order.
        assert!(in_child(|| {
            drop(job.take());
            drop(accel.take());
            true
        }));
        assert!(in_child(|| {
            drop(accel.take());
            drop(job.take());
            true
        }));
        flags.1.store(true, Ordering::Release);
        let (buffer, result) = job.unwrap().join();
        result.unwrap();
        assert_eq!(buffer.as_slice()[..5], [77, 77, 78, 78, 4]);
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

#[test]
fn a_scope_ends_in_the_child() {
    each_option("scope", |options| {
        let accel = Accelerator::with_options(accel_sim::Options::new().workers(2)).unwrap();
        let (mut one, mut two) = (filled(options), filled(options));
        let (begun, go) = (AtomicBool::new(false), AtomicBool::new(false));
        let _end = LetGo(&go);
        let waits = |i: usize, words: &ElementsMut<'_, u64>| {
            begun.store(true, Ordering::Release);
            wait_until("the kernel was not let go", || go.load(Ordering::Acquire));
            words.store(i, 77)
        };
        let mut child = None;
        let result = accel.scope(|scope| {
            let _end = LetGo(&go);
            let first = scope.launch_items(2, one.view_mut(), |_, i, words| waits(i, words))?;
            let _second = scope.launch_items(2, two.view_mut(), |_, i, words| waits(i, words))?;
            wait_until("the kernel did not begin", || begun.load(Ordering::Acquire));
            // SAFETY: as in `spawn_child`; the child leaves below, when the scope has ended there too.
            let pid = unsafe { libc::fork() };
            assert_ne!(pid, -1);
            child = Some(pid);
            if pid == 0 {
                do_not_outlive_the_parent();
                let finished = first.is_finished();
                assert!(finished && is_forked(first.wait()));
                return Ok(());
            }
            go.store(true, Ordering::Release);
            first.wait()
        });
        if child == Some(0) {
            // The borrows are over, and the memory is the child's.
            let ok = is_forked(result) && one.as_slice()[..3] == [0, 1, 2];
            two.as_mut_slice()[1] = 9;
            let ok = ok && two.as_slice()[..3] == [0, 9, 2];
            drop((one, two));
            drop(accel);
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!ok)) }
        }
        assert_eq!(wait_for(child.unwrap()), 0);
        result.unwrap();
        assert_eq!(one.as_slice()[..3], [77, 77, 2]);
        assert_eq!(two.as_slice()[..3], [77, 77, 2]);
    });
}

/// A device that takes its time to map a region, as a driver may that programs a table.
#[derive(Default)]
struct Slow {
    lock: DeviceLock,
    mapping: AtomicBool,
    go: AtomicBool,
}

// SAFETY: it has no translations, so none is used.
unsafe impl Device for Slow {
    type Table = ();

    fn map(&self, _: &MapInfo) -> Result<(), svm::Error> {
        self.mapping.store(true, Ordering::Release);
        wait_until("the driver was not let go", || {
            self.go.load(Ordering::Acquire)
        });
        Ok(())
    }

    fn lock(&self) -> &DeviceLock {
        &self.lock
    }

    fn invalidate(&self, (): &(), _: &Invalidation) -> Result<(), WouldBlock> {
        Ok(())
    }

    fn quiesced(&self, (): &(), _: &Invalidation) -> bool {
        true
    }
}

#[test]
fn a_region_that_is_being_mapped_at_the_fork() {
    each_option("mapping", |options| {
        let (mut buffer, mut other) = (filled(options), filled(options));
        let attachment = svm::attach(Slow::default(), AttachOptions::new()).unwrap();
        let mut attachment = Some(attachment);
        let device = attachment.as_ref().unwrap();
        std::thread::scope(|threads| {
            let _end = LetGo(&device.device().go);
            let view = buffer.view_mut();
            threads.spawn(move || device.map(view.region()).map(drop).unwrap());
            wait_until("the driver was not asked", || {
                device.device().mapping.load(Ordering::Acquire)
            });
            assert!(in_child(|| {
                let forked = |error: Option<svm::Error>| {
                    error.is_some_and(|error| *error.kind() == ErrorKind::Forked)
                };
                let region = other.view_mut().region().addr();
                let answers = [
                    forked(device.map(other.view_mut().region()).err()),
                    forked(device.bring_home(other.view_mut().region(), 0..1).err()),
                    forked(device.range().err()),
                    forked(device.release().err()),
                ];
                answers == [true; 4]
                    && device.stats() == svm::Stats::default()
                    && !other.view_mut().region().is_movable(region)
            }));
        });
        // In the child an attachment ends without a word.
        assert!(in_child(|| {
            drop(attachment.take());
            true
        }));
        let device = attachment.as_ref().unwrap();
        device.map(buffer.view_mut().region()).map(drop).unwrap();
    });
}

/// Handles are used and dropped in children that are forked while other threads hold whatever locks the same handles take.
#[test]
fn no_handle_waits_for_a_thread_of_the_parent() {
    each_option("locks", |options| {
        // Edges, for a use of the region to copy.
        let mut memory = vec![0u64; 64 * 512 + 300];
        let mirror = svm::mirror_with(&mut memory, options).unwrap();
        let device = TestDevice::new().unwrap();
        let attachment = device.attachment();
        let mapped = attachment.map(mirror.view().region()).unwrap();
        let stop = AtomicBool::new(false);
        let work = |step: &dyn Fn()| {
            while !stop.load(Ordering::Acquire) {
                step();
            }
        };
        std::thread::scope(|threads| {
            let _end = LetGo(&stop);
            // Block locks; the hub's; those of edges; and the gate, closed.
            threads.spawn(|| {
                work(&|| assert!(mirror.stats().anomalies + attachment.stats().anomalies == 0));
            });
            threads.spawn(|| {
                let mut range = attachment.range().unwrap();
                while !stop.load(Ordering::Acquire) {
                    let update = range.start_update(&mapped, 1..2, Duration::from_secs(10));
                    update.map(drop).unwrap();
                    range.park();
                }
            });
            threads.spawn(|| {
                work(&|| begin_use(&mapped, Access::Write).unwrap().finish().unwrap());
            });
            let (mut range, mut in_use) = (None, None);
            for _ in 0..25 {
                let mut update = attachment.range().unwrap();
                update
                    .start_update(&mapped, 1..2, Duration::from_secs(10))
                    .map(drop)
                    .unwrap();
                (range, in_use) = (
                    Some(update),
                    Some(begin_use(&mapped, Access::Read).unwrap()),
                );
                assert!(in_child(|| {
                    let forked = |error: svm::Error| *error.kind() == ErrorKind::Forked;
                    let view = mirror.view();
                    let (mut range, in_use) = (range.take().unwrap(), in_use.take().unwrap());
                    let update = range.start_update(&mapped, 1..2, Duration::from_secs(10));
                    let ok = update.is_err_and(|fault| fault.kind == svm::DeviceFaultKind::Forked)
                        && begin_use(&mapped, Access::Write).is_err_and(forked)
                        && in_use.finish().is_err_and(forked)
                        && mirror.pin(..).is_err_and(forked)
                        && !view.region().is_movable(view.addr() + PAGE);
                    mapped.revalidate_protections();
                    let _ = (mirror.stats(), attachment.stats());
                    drop(range);
                    ok
                }));
            }
            drop((range, in_use));
        });
        let mut mirror = Some(mirror);
        assert!(in_child(|| mirror.take().unwrap().close().is_ok()));
    });
}

#[test]
fn a_child_has_an_accelerator_and_mirrors_of_its_own() {
    each_option("child's own", |options| {
        let accel = Accelerator::new().unwrap();
        let mut buffer = filled(options);
        let mut plain: Vec<u64> = (0..nr_words(options) as u64).collect();
        let double = |x: &mut [u64]| x.iter_mut().for_each(|x| *x *= 2);
        accel.run(buffer.view_mut(), double).unwrap();
        // More than one, one after the other and each with a child of its own.
        for generation in 0..2 {
            assert!(in_child(|| {
                let own = Accelerator::new().unwrap();
                let run = |memory: &mut [u64]| {
                    let before: Vec<u64> = memory.to_vec();
                    let mut mirror = svm::mirror_with(memory, options).unwrap();
                    own.run(mirror.view_mut(), double).unwrap();
                    let moved = mirror.stats().to_device_pages() > 0;
                    let right =
                        |now: &[u64]| now.iter().zip(&before).all(|(&now, &was)| now == 2 * was);
                    let ok = right(mirror.as_slice()) && mirror.stats().anomalies == 0;
                    mirror.close().unwrap();
                    ok && moved && right(memory)
                };
                // Its own; what it has inherited; and what was mirrored in the parent.
                let mut fresh: Vec<u64> = (0..nr_words(options) as u64).collect();
                let ok = run(&mut fresh) && run(&mut plain) && run(buffer.as_mut_slice());
                let mut own_buffer = filled(options);
                own.run(own_buffer.view_mut(), double).unwrap();
                let child_of_child = in_child(|| {
                    own_buffer
                        .as_slice()
                        .iter()
                        .zip(0..)
                        .all(|(&x, i)| x == 2 * i)
                });
                // The parent's, while the child has its own.
                let refused = is_forked(accel.run(buffer.view_mut(), double));
                ok && refused && child_of_child
            }));
            let factor = 2 << generation;
            let right = |words: &[u64], by: u64| words.iter().zip(0..).all(|(&x, i)| x == by * i);
            assert!(right(buffer.as_slice(), factor) && right(&plain, 1));
            accel.run(buffer.view_mut(), double).unwrap();
        }
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

/// A use of a region whose mirror the test keeps, and whose edges nobody else touches.
fn begin_use<D: svm::Device>(
    mapped: &svm::MappedRef<D>,
    access: Access,
) -> svm::Result<svm::UseGuard<D>> {
    // SAFETY: as said.
    unsafe { mapped.begin_use(access) }
}
