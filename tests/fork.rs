//! fork: the child has the memory of that moment, the parent goes on, and neither disturbs the other.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

use std::io::{Read, Write};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use accel_sim::{Accelerator, ElementsMut};
use svm::{
    Access, AttachOptions, Delivery, Device, DeviceLock, ErrorKind, Granule, Invalidation, MapInfo,
    Options, WouldBlock,
};
use tests::mapping::{READ_WRITE, assert_passed_alone};
use tests::{Map, TestDevice, Watchdog, in_own_process, usable};

const PAGE: usize = 4096;

/// How long a child may take. It is killed then: an alarm would wait for ever where it hangs with its signals masked.
const CHILD_LIMIT: Duration = Duration::from_secs(20);

/// In a child: ends it if the parent's thread ends first.
fn do_not_outlive_the_parent() {
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Forks; the child runs `child` and exits with 0 if it returned true.
fn spawn_child(child: impl FnOnce() -> bool) -> libc::pid_t {
    // SAFETY: the child runs test code and leaves by `_exit`; glibc keeps malloc usable in a child of a threaded process.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            do_not_outlive_the_parent();
            let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(false);
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(i32::from(!ok)) }
        }
        pid => pid,
    }
}

/// How a child ended, as `waitpid` says it.
fn wait_for(pid: libc::pid_t) -> i32 {
    let (begun, mut status) = (Instant::now(), 0);
    loop {
        // SAFETY: asks for a child of the test's.
        let outcome = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        if outcome == pid {
            return status;
        }
        assert_eq!(outcome, 0);
        if begun.elapsed() > CHILD_LIMIT {
            // SAFETY: a child of the test's, that nobody has waited for.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            panic!("the child hangs");
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Whether a forked child says so. That it was killed is no answer.
fn in_child(child: impl FnOnce() -> bool) -> bool {
    let status = wait_for(spawn_child(child));
    assert!(libc::WIFEXITED(status), "status {status:#x}");
    libc::WEXITSTATUS(status) == 0
}

/// Words of a buffer: some granules of those that are not huge, one that is and a part of the next.
fn nr_words(options: &Options) -> usize {
    let pages = if options.granule == Granule::Huge {
        520
    } else {
        64
    };
    pages * PAGE / 8
}

fn filled(options: &Options) -> svm::Buffer<u64> {
    let mut buffer = svm::Buffer::with_options(nr_words(options), options).unwrap();
    buffer
        .as_mut_slice()
        .iter_mut()
        .zip(0..)
        .for_each(|(x, i)| *x = i);
    buffer
}

fn take(device: &TestDevice, buffer: &mut svm::Buffer<u64>) {
    let view = buffer.view_mut();
    device
        .fault_in(view.region(), view.addr(), view.len_bytes(), Access::Write)
        .unwrap();
}

fn each(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::new(name);
    if usable() {
        for delivery in [Delivery::Inline, Delivery::Thread] {
            for granule in [Granule::Page, Granule::Big, Granule::Huge] {
                for read_mostly in [false, true] {
                    test(
                        &Options::new()
                            .delivery(delivery)
                            .granule(granule)
                            .read_mostly(read_mostly),
                    );
                }
            }
        }
    }
}

#[test]
fn the_child_has_the_contents_of_that_moment() {
    each("contents", |options| {
        let mut buffer = filled(options);
        let device = TestDevice::new().unwrap();
        take(&device, &mut buffer);
        assert!(in_child(|| {
            let same = buffer.as_slice().iter().zip(0..).all(|(&x, i)| x == i);
            buffer.as_mut_slice()[7] = 1000;
            same && buffer.as_slice()[7] == 1000
        }));
        assert!(buffer.as_slice().iter().zip(0..).all(|(&x, i)| x == i));
    });
}

#[test]
fn the_parent_goes_on_with_pages_shared_copy_on_write() {
    each("parent", |options| {
        let mut buffer = filled(options);
        let device = TestDevice::new().unwrap();
        take(&device, &mut buffer);
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        // SAFETY: the child waits for the parent's word and leaves.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            drop(writer);
            let _ = reader.read(&mut [0]);
            let same = buffer.as_slice().iter().zip(0..).all(|(&x, i)| x == i);
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!same)) }
        }
        // While the child lives, the device gets the pages and writes them.
        let view = buffer.view_mut();
        device
            .write(view.region(), view.addr() + 8 * 4096, &[255; 4096])
            .unwrap();
        let mut out = [0; 8];
        device
            .read(view.region(), view.addr() + 8 * 4096, &mut out)
            .unwrap();
        assert_eq!(out, [255; 8]);
        assert_eq!(buffer.as_slice()[4096], u64::MAX);
        writer.write_all(&[1]).unwrap();
        assert_eq!(wait_for(pid), 0, "the child saw the parent's writes");
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

#[test]
fn handles_answer_forked_in_the_child_which_can_start_its_own() {
    each("own", |options| {
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

#[test]
fn forks_from_several_threads_while_devices_work() {
    each("storm", |options| {
        let mut buffer = filled(options);
        let other = filled(options);
        let device = TestDevice::new().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        assert!(in_child(|| other
                            .as_slice()
                            .iter()
                            .zip(0..)
                            .all(|(&x, i)| x == i)));
                    }
                });
            }
            for i in 0..200u64 {
                let view = buffer.view_mut();
                device
                    .write(
                        view.region(),
                        view.addr() + (i as usize * 8),
                        &i.to_ne_bytes(),
                    )
                    .unwrap();
                let view = other.view();
                let mut out = [0; 8];
                device
                    .read(view.region(), view.addr() + i as usize * 64, &mut out)
                    .unwrap();
                assert_eq!(u64::from_ne_bytes(out), i * 8);
            }
        });
        assert!(buffer.as_slice().iter().zip(0..).all(|(&x, i)| x == i));
    });
}

#[test]
fn commands_are_spawned_while_pages_are_away() {
    each("spawn", |options| {
        let mut buffer = filled(options);
        let device = TestDevice::new().unwrap();
        take(&device, &mut buffer);
        let status = Command::new("true").status().unwrap();
        assert!(status.success());
        assert!(buffer.as_slice().iter().zip(0..).all(|(&x, i)| x == i));
    });
}

#[test]
fn a_raw_clone_faults_where_it_would_read_zeros() {
    // In a process of its own: while a test beside it forks, what is mirrored is at home and inherited.
    let name = "a_raw_clone_faults_where_it_would_read_zeros";
    in_own_process(name, &[""], || each("clone", raw_clone));
}

fn raw_clone(options: &Options) {
    let mut buffer = filled(options);
    let device = TestDevice::new().unwrap();
    take(&device, &mut buffer);
    let first = buffer.as_slice().as_ptr();
    // SAFETY: clone(SIGCHLD) with no flags is fork without libc's handlers; the child touches one address and exits.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if pid == 0 {
        // SAFETY: a volatile read of what was the parent's buffer; it is meant to raise SIGSEGV.
        let value = unsafe { first.add(9).read_volatile() };
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::try_from(value).unwrap_or(99)) }
    }
    let status = wait_for(libc::pid_t::try_from(pid).unwrap());
    assert!(
        libc::WIFSIGNALED(status),
        "status {status:#x}: the child went on, with {}",
        libc::WEXITSTATUS(status)
    );
    assert_eq!(buffer.as_slice()[9], 9);
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::yield_now();
    }
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
    each("job", |options| {
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
    each("scope", |options| {
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
    each("mapping", |options| {
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
    each("locks", |options| {
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
    each("child's own", |options| {
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

#[test]
fn a_child_is_killed_in_the_middle_of_its_work() {
    each("killed", |options| {
        let mut buffer = filled(options);
        let device = TestDevice::new().unwrap();
        take(&device, &mut buffer);
        for round in 0..3u64 {
            let (mut reader, mut writer) = std::io::pipe().unwrap();
            let pid = spawn_child(|| {
                let mut own = filled(options);
                let own_device = TestDevice::new().unwrap();
                for i in 1.. {
                    // To and fro, until it is killed.
                    take(&own_device, &mut own);
                    own.as_mut_slice()[0] = i;
                    let view = own.view();
                    let mut out = [0; 8];
                    own_device
                        .read(view.region(), view.addr(), &mut out)
                        .unwrap();
                    assert_eq!(u64::from_ne_bytes(out), i);
                    if i == 3 {
                        writer.write_all(&[1]).unwrap();
                    }
                }
                false
            });
            drop(writer);
            assert_eq!(reader.read(&mut [0]).unwrap(), 1, "the child never began");
            // The parent works beside it, before and after.
            let write = |buffer: &mut svm::Buffer<u64>, page: usize, value: u64| {
                let view = buffer.view_mut();
                let at = view.addr() + page * PAGE;
                device
                    .write(view.region(), at, &value.to_ne_bytes())
                    .unwrap();
            };
            write(&mut buffer, 5, 100 + round);
            // SAFETY: a child of the test's.
            assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
            write(&mut buffer, 6, 200 + round);
            let status = wait_for(pid);
            assert!(
                libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL,
                "{status:#x}"
            );
            write(&mut buffer, 7, 300 + round);
            for (i, &word) in buffer.as_slice().iter().enumerate() {
                let wanted = match (i / 512, i % 512) {
                    (page @ 5..8, 0) => (page as u64 - 4) * 100 + round,
                    _ => i as u64,
                };
                assert_eq!(word, wanted, "word {i} {options:?}");
            }
            take(&device, &mut buffer);
        }
        assert_eq!(buffer.stats().anomalies, 0);
    });
}

/// What a handler of the application's makes use of in the middle of a fork: after ours have run, which found nothing to do.
static LATE: std::sync::Mutex<Option<svm::Buffer<u64>>> = std::sync::Mutex::new(None);
static IS_CHILD: AtomicBool = AtomicBool::new(false);

extern "C" fn make_late_use() {
    if IS_CHILD.load(Ordering::Acquire) {
        LATE.lock()
            .unwrap()
            .get_or_insert_with(|| filled(&Options::new()));
    }
}

/// Has `prepare` called in the middle of each fork, between our preparation, whose handler is installed later, and the fork; and `child` at
/// the beginning of each child, before our handler there.
fn at_fork_before_ours(prepare: Option<extern "C" fn()>, child: Option<extern "C" fn()>) {
    unsafe extern "C" {
        fn pthread_atfork(
            prepare: Option<extern "C" fn()>,
            parent: Option<extern "C" fn()>,
            child: Option<extern "C" fn()>,
        ) -> libc::c_int;
    }
    // Those that prepare run in reverse order.
    // SAFETY: functions of that type.
    let outcome = unsafe { pthread_atfork(prepare, None, child) };
    assert_eq!(outcome, 0);
}

/// A process's first use of the runtime, between the preparation of a fork and the fork.
#[test]
fn a_first_use_in_the_middle_of_a_fork() {
    let name = "a_first_use_in_the_middle_of_a_fork";
    let _watchdog = Watchdog::new(name);
    // Not `usable`, which makes use of it.
    let capabilities = svm::Capabilities::probe();
    if !capabilities.is_usable() {
        return tests::skip("no userfaultfd");
    }
    in_own_process(name, &[""], || {
        at_fork_before_ours(Some(make_late_use), None);
        let _first = filled(&Options::new());
        // In a child our handlers are there, and there is nothing yet.
        assert!(in_child(|| {
            IS_CHILD.store(true, Ordering::Release);
            let right = |words: &[u64]| words.iter().zip(0..).all(|(&x, i)| x == i);
            let grandchild = in_child(|| {
                let late = LATE.lock().unwrap();
                right(late.as_ref().unwrap().as_slice())
            });
            let mut late = LATE.lock().unwrap();
            let buffer = late.as_mut().unwrap();
            let device = TestDevice::new().unwrap();
            take(&device, buffer);
            grandchild && right(buffer.as_slice())
        }));
    });
}

/// While one device's fault breaks the sharing of pages with a child, the others wait: memory that nobody has pinned may be unmapped at any
/// moment, and a translation in place would lead nowhere before anybody has heard of it.
#[test]
fn sharing_is_broken_with_no_device_in_place() {
    each("broken sharing", |options| {
        let buffer = filled(options);
        let devices = [TestDevice::new().unwrap(), TestDevice::new().unwrap()];
        for _ in 0..4 {
            // It has the pages, too, until it is told to go.
            let (mut here, there) = std::os::unix::net::UnixStream::pair().unwrap();
            let child = spawn_child(|| {
                let mut there = there;
                there.read(&mut [0]).is_ok()
            });
            let view = buffer.view();
            let (region, addr) = (view.region(), view.addr());
            std::thread::scope(|scope| {
                for device in &devices {
                    scope.spawn(move || {
                        for page in 0..32 {
                            device
                                .fault_in(region, addr + page * PAGE, 1, Access::Read)
                                .unwrap();
                        }
                    });
                }
            });
            here.write_all(&[1]).unwrap();
            assert_eq!(wait_for(child), 0);
        }
        assert_eq!(buffer.stats().in_place_pages, 0, "{options:?}");
        assert!(buffer.as_slice().iter().zip(0..).all(|(&x, i)| x == i));
    });
}

/// A page that has gone keeps nothing else from being parted from a child: in place the others would be in a bare `munmap`'s way.
#[test]
fn sharing_is_broken_beside_a_page_that_is_gone() {
    each("gone beside", |options| {
        let map = Map::new(32);
        let mut mirror = map.mirror(options);
        let device = TestDevice::new().unwrap();
        let (mut here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        // Of the same mapping still, but not the mirror's: what was there has moved.
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        // SAFETY: a page of the test's.
        let moved = unsafe { libc::mremap(map.at(5).cast(), PAGE, PAGE, flags, 0_usize) };
        assert_ne!(moved, libc::MAP_FAILED);
        let child = spawn_child(|| {
            let mut there = there;
            there.read(&mut [0]).is_ok()
        });
        let view = mirror.view_mut();
        for page in [4, 6] {
            device
                .fault_in(view.region(), map.at(page).addr(), 1, Access::Write)
                .unwrap();
        }
        here.write_all(&[1]).unwrap();
        assert_eq!(wait_for(child), 0);
        assert_eq!(mirror.stats().in_place_pages, 0, "{options:?}");
        mirror.close().unwrap();
        assert_eq!([4, 6].map(|page| map.read(page)), [5, 7]);
    });
}

extern "C" fn have_older_tables() {
    // As of a process in which nothing was mirrored yet.
    let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let is_uffd = |entry: &std::fs::DirEntry| {
        std::fs::read_link(entry.path()).is_ok_and(|to| to.ends_with("anon_inode:[userfaultfd]"))
    };
    for entry in links.filter(is_uffd).collect::<Vec<_>>() {
        let fd = entry.file_name().to_str().unwrap().parse().unwrap();
        // SAFETY: the child's own copy.
        assert_eq!(unsafe { libc::close(fd) }, 0);
    }
    let older = OLDER_ACTION.get().unwrap();
    // SAFETY: what the kernel had said, before there was ours.
    let outcome = unsafe { libc::sigaction(libc::SIGBUS, older, std::ptr::null_mut()) };
    assert_eq!(outcome, 0);
}

/// What was done about a SIGBUS before anything was mirrored.
static OLDER_ACTION: OnceLock<libc::sigaction> = OnceLock::new();

/// The kernel copies a process's descriptors and its signals' actions before its memory. Of what another thread opens and installs between,
/// the child knows, and does not have it.
#[test]
fn a_child_whose_tables_are_older_than_its_memory() {
    let name = "a_child_whose_tables_are_older_than_its_memory";
    in_own_process(name, &[""], || {
        OLDER_ACTION.get_or_init(|| {
            // SAFETY: integers.
            let mut action = unsafe { std::mem::zeroed() };
            // SAFETY: the kernel writes it, and is given none.
            let outcome =
                unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut action) };
            assert_eq!(outcome, 0);
            action
        });
        at_fork_before_ours(None, Some(have_older_tables));
        each("older tables", |options| {
            let parents = filled(options);
            assert!(in_child(|| {
                let mut buffer = filled(options);
                take(&TestDevice::new().unwrap(), &mut buffer);
                let is_right = |words: &[u64]| words.iter().zip(0..).all(|(&x, i)| x == i);
                is_right(buffer.as_slice()) && is_right(parents.as_slice())
            }));
        });
    });
}

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

/// Ends what the others do, also where an assertion fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A child starts its threads though another thread of the parent was starting one at the fork, and had what `std` locks for that.
#[test]
fn a_child_has_a_monitor_whatever_the_parents_threads_were_at() {
    let _watchdog = Watchdog::new("threads that start");
    if !usable() {
        return;
    }
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    std::thread::spawn(|| {}).join().unwrap();
                }
            });
        }
        let _over = SetOnDrop(&over);
        for round in 0..2_000 {
            assert!(in_child(|| {
                svm::spawn_thread("starts", || {}).unwrap().join();
                true
            }));
            if round % 20 == 0 {
                let delivery = [Delivery::Inline, Delivery::Thread][round / 20 % 2];
                assert!(in_child(|| {
                    let accel = Accelerator::with_options(accel_sim::Options::new().workers(1));
                    let mut buffer = filled(&Options::new().delivery(delivery));
                    let done = accel.unwrap().run(buffer.view_mut(), |x| x.fill(7));
                    done.is_ok() && buffer.as_slice().iter().all(|&x| x == 7)
                }));
            }
        }
    });
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
    let name = "what_has_grown_is_inherited_with_what_it_grew_from";
    in_own_process(name, &["", "procmap_query"], || {
        at_fork_before_ours(Some(use_what_has_grown), None);
        each("grown", |options| {
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

const FIRST_USE: &str = "SVM_TEST_FORK_AT_FIRST_USE";

/// Children of a process that is at its first use of the runtime can make theirs.
#[test]
fn a_fork_in_the_middle_of_a_first_use() {
    let name = "a_fork_in_the_middle_of_a_first_use";
    let _watchdog = Watchdog::new(name);
    if let Ok(nanos) = std::env::var(FIRST_USE) {
        let wait = Duration::from_nanos(nanos.parse().unwrap());
        let started = AtomicBool::new(false);
        return std::thread::scope(|threads| {
            threads.spawn(|| {
                started.store(true, Ordering::Release);
                drop(filled(&Options::new()));
            });
            wait_until("no thread", || started.load(Ordering::Acquire));
            let begun = Instant::now();
            while begun.elapsed() < wait {
                core::hint::spin_loop();
            }
            assert!(in_child(|| {
                let mut buffer = filled(&Options::new());
                take(&TestDevice::new().unwrap(), &mut buffer);
                buffer.as_slice().iter().zip(0..).all(|(&x, i)| x == i)
            }));
        });
    }
    if !usable() {
        return;
    }
    // Each process has one such moment, so it takes many.
    for i in 0..100 {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--test-threads=1"])
            .env(FIRST_USE, (i * 3000).to_string())
            .output()
            .unwrap();
        assert_passed_alone(name, format_args!("after {i} times 3 us"), &output);
    }
}

/// The address space of a map is the parent's, and its end is told to nobody, in the child: it can unmap what it has inherited.
#[test]
fn a_child_unmaps_what_was_mirrored() {
    each("unmap", |options| {
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

/// A use of a region whose mirror the test keeps, and whose edges nobody else touches.
fn begin_use<D: svm::Device>(
    mapped: &svm::MappedRef<D>,
    access: Access,
) -> svm::Result<svm::UseGuard<D>> {
    // SAFETY: as said.
    unsafe { mapped.begin_use(access) }
}
