//! What is in the memory of a child, and in the parent's beside it: forked, cloned without libc's handlers, and of a command.

use std::io::{Read, Write};
use std::process::Command;

use svm::Options;
use tests::{TestDevice, each_option, in_own_process};

use crate::fixture::{filled, in_child, take, wait_for};

#[test]
fn the_child_has_the_contents_of_that_moment() {
    each_option("contents", |options| {
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
    each_option("parent", |options| {
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
fn forks_from_several_threads_while_devices_work() {
    each_option("storm", |options| {
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
    each_option("spawn", |options| {
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
    let name = "contents::a_raw_clone_faults_where_it_would_read_zeros";
    in_own_process(name, &[""], || each_option("clone", raw_clone));
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
