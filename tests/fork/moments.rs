//! Moments at which there is a fork: a first use, and within it; threads that start; tables older than memory; and the child's end.

use std::io::{Read, Write};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use accel_sim::Accelerator;
use svm::{Delivery, Options};
use tests::mapping::assert_passed_alone;
use tests::{TestDevice, Watchdog, each_option, in_own_process, usable};

use crate::PAGE;
use crate::fixture::{
    SetOnDrop, at_fork_before_ours, filled, in_child, spawn_child, take, wait_for, wait_until,
};

#[test]
fn a_child_is_killed_in_the_middle_of_its_work() {
    each_option("killed", |options| {
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

/// A process's first use of the runtime, between the preparation of a fork and the fork.
#[test]
fn a_first_use_in_the_middle_of_a_fork() {
    let name = "moments::a_first_use_in_the_middle_of_a_fork";
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
    // The numbers are another library's now.
    for fd in &TAKEN {
        // It answers a request that it does not know as a userfaultfd answers one that is not valid.
        // SAFETY: the path is a C string.
        let opened = unsafe { libc::open(c"/dev/urandom".as_ptr(), libc::O_RDONLY) };
        assert!(opened >= 0);
        fd.store(opened, Ordering::Relaxed);
    }
    let older = OLDER_ACTION.get().unwrap();
    // SAFETY: what the kernel had said, before there was ours.
    let outcome = unsafe { libc::sigaction(libc::SIGBUS, older, std::ptr::null_mut()) };
    assert_eq!(outcome, 0);
}

/// Descriptors of a library that opens its own in a child, before anything else is done there.
static TAKEN: [AtomicI32; 4] = [const { AtomicI32::new(-1) }; 4];

/// Whether what is behind the descriptor is still what was opened there.
fn is_its_own(fd: &AtomicI32) -> bool {
    let link = format!("/proc/self/fd/{}", fd.load(Ordering::Relaxed));
    std::fs::read_link(link).is_ok_and(|to| to.ends_with("/dev/urandom"))
}

/// How often a handler was called that a child installed before anything else.
static CALLED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count_call(_: libc::c_int) {
    CALLED.fetch_add(1, Ordering::Relaxed);
}

/// What was done about a SIGBUS before anything was mirrored.
static OLDER_ACTION: OnceLock<libc::sigaction> = OnceLock::new();

/// The kernel copies a process's descriptors and its signals' actions before its memory. Of what another thread opens and installs between,
/// the child knows, and does not have it.
#[test]
fn a_child_whose_tables_are_older_than_its_memory() {
    let name = "moments::a_child_whose_tables_are_older_than_its_memory";
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
        each_option("older tables", |options| {
            let parents = filled(options);
            assert!(in_child(|| {
                assert!(TAKEN.iter().all(is_its_own));
                // SAFETY: it counts.
                unsafe { libc::signal(libc::SIGBUS, count_call as *const () as usize) };
                let mut buffer = filled(options);
                take(&TestDevice::new().unwrap(), &mut buffer);
                let is_right = |words: &[u64]| words.iter().zip(0..).all(|(&x, i)| x == i);
                assert!(is_right(buffer.as_slice()) && is_right(parents.as_slice()));
                CALLED.load(Ordering::Relaxed) == 0 && TAKEN.iter().all(is_its_own)
            }));
        });
    });
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

const FIRST_USE: &str = "SVM_TEST_FORK_AT_FIRST_USE";

/// Children of a process that is at its first use of the runtime can make theirs.
#[test]
fn a_fork_in_the_middle_of_a_first_use() {
    let name = "moments::a_fork_in_the_middle_of_a_first_use";
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
