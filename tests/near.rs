//! Where the monitor of the thread door runs: beside a thread that faults again and again, and anywhere otherwise.

#![cfg(target_os = "linux")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;
use std::{fs, ptr, thread};

use svm::{Access, Attachment, Buffer, Delivery, Granule, MappedRef, Options};
use tests::idle::{Idle, TIMEOUT};
use tests::{Watchdog, usable};

const PAGE: usize = 4096;
const NR_PAGES: usize = 512;

/// There is one monitor of the door, so the tests take turns.
static TURN: Mutex<()> = Mutex::new(());

/// The CPUs that the monitor may run on, as the kernel writes them.
fn cpus_of_monitor() -> String {
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        if read("comm").trim() == "svm-monitor" {
            let status = read("status");
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            return line.unwrap().trim().to_owned();
        }
    }
    panic!("the door has no monitor");
}

struct Rig {
    range: svm::Range<Idle>,
    mapped: MappedRef<Idle>,
    attachment: Attachment<Idle>,
    buffer: Buffer<u8>,
}

impl Rig {
    /// `None` where the monitor has no choice.
    fn new() -> Option<Self> {
        if !usable() {
            return None;
        }
        let options = Options::new()
            .delivery(Delivery::Thread)
            .granule(Granule::Page);
        let mut buffer = Buffer::with_options(NR_PAGES * PAGE, &options).unwrap();
        buffer.as_mut_slice().fill(1);
        let attachment = svm::attach(Idle::default(), svm::AttachOptions::new()).unwrap();
        let mapped = attachment.map(buffer.view().region()).unwrap();
        until_it_is_anywhere();
        if is_one(&cpus_of_monitor()) {
            tests::skip("this process has one CPU");
            return None;
        }
        Some(Self {
            range: attachment.range().unwrap(),
            mapped,
            attachment,
            buffer,
        })
    }

    /// The device takes everything.
    fn take(&mut self) {
        let _signals = svm::worker_thread();
        let view = self.buffer.view();
        let first = (view.addr() - view.region().base()) / PAGE;
        let mut update = self
            .range
            .start_update(&self.mapped, first..first + NR_PAGES, TIMEOUT)
            .unwrap();
        update.fault(Access::Write).unwrap();
        let guard = self.attachment.device().device_lock().lock();
        assert!(update.end_update(&guard).is_ok(), "nobody interrupts it");
    }
}

fn is_one(cpus: &str) -> bool {
    cpus.parse::<u32>().is_ok()
}

/// It leaves when no fault comes.
fn until_it_is_anywhere() {
    // Longer than that takes, by far; on a machine with one CPU nothing changes.
    for _ in 0..2_000 {
        if !is_one(&cpus_of_monitor()) {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn touch(at: usize) {
    // SAFETY: in the buffer, whose owner waits meanwhile.
    unsafe { ptr::with_exposed_provenance_mut::<u8>(at).write_volatile(2) };
}

#[test]
fn the_monitor_goes_where_one_thread_faults_and_leaves_when_it_is_idle() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::new("near");
    let Some(mut rig) = Rig::new() else { return };
    let anywhere = cpus_of_monitor();
    let mut went = false;
    // Faults have to come quickly, which on a machine that is busy with others they need not.
    while !went {
        rig.take();
        let base = rig.buffer.as_mut_slice().as_mut_ptr().expose_provenance();
        for page in 0..NR_PAGES {
            touch(base + page * PAGE);
            went |= page % 8 == 7 && is_one(&cpus_of_monitor());
        }
    }
    until_it_is_anywhere();
    assert_eq!(cpus_of_monitor(), anywhere, "where it had been before");
}

#[test]
fn two_threads_that_fault_by_turns_leave_it_where_it_is() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::new("turns");
    let Some(mut rig) = Rig::new() else { return };
    let anywhere = cpus_of_monitor();
    rig.take();
    let base = rig.buffer.as_mut_slice().as_mut_ptr().expose_provenance();
    let (ask, asked) = mpsc::channel::<usize>();
    let (answer, done) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(move || {
            for at in asked {
                touch(at);
                answer.send(()).unwrap();
            }
        });
        for page in (0..NR_PAGES).step_by(2) {
            touch(base + page * PAGE);
            ask.send(base + (page + 1) * PAGE).unwrap();
            done.recv().unwrap();
            if page % 16 == 0 {
                assert_eq!(cpus_of_monitor(), anywhere);
            }
        }
        drop(ask);
    });
    assert_eq!(rig.buffer.stats().cpu_write_faults, NR_PAGES as u64);
}
