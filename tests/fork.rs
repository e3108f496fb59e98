//! fork: the child has the memory of that moment, the parent goes on, and neither disturbs the other.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

use std::time::Duration;

use svm::{Access, Delivery, Granule, Options};
use tests::{TestDevice, Watchdog, usable};

const N: usize = 64 * 4096 / 8;

/// Forks; the child runs `child` and exits with 0 if it returned true. Returns the parent's answer to "did it?".
fn in_child(child: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child runs test code and leaves by `_exit`; glibc keeps malloc usable in a child of a threaded process.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(false);
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(i32::from(!ok)) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: waits for the child just made.
            let outcome = unsafe { libc::waitpid(pid, &raw mut status, 0) };
            assert_eq!(outcome, pid);
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}

fn filled(options: &Options) -> svm::Buffer<u64> {
    let mut buffer = svm::Buffer::with_options(N, options).unwrap();
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
            for granule in [Granule::Page, Granule::Big] {
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
            let _ = std::io::Read::read(&mut reader, &mut [0]);
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
        std::io::Write::write_all(&mut writer, &[1]).unwrap();
        let mut status = 0;
        // SAFETY: waits for the child.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert_eq!(status, 0, "the child saw the parent's writes");
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
        let status = std::process::Command::new("true").status().unwrap();
        assert!(status.success());
        assert!(buffer.as_slice().iter().zip(0..).all(|(&x, i)| x == i));
    });
}

#[test]
fn a_raw_clone_faults_where_it_would_read_zeros() {
    each("clone", |options| {
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
        let (mut status, pid) = (0, libc::pid_t::try_from(pid).unwrap());
        // SAFETY: waits for the child.
        let outcome = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert_eq!(outcome, pid);
        assert!(
            libc::WIFSIGNALED(status),
            "status {status:#x}: the child went on, with {}",
            libc::WEXITSTATUS(status)
        );
        assert_eq!(buffer.as_slice()[9], 9);
        std::thread::sleep(Duration::from_millis(1));
    });
}
