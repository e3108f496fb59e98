//! Descriptors and mappings run out at every step of what an application does: a typed error, nothing half done, and all works
//! again when there are some.

#![cfg(target_os = "linux")]

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use svm::{Access, Delivery, Error, ErrorKind, Options};
use tests::{Map, TestDevice, Watchdog, in_own_process, usable};

const PAGE: usize = 4096;
const PAGES: usize = 24;

/// Mirrors `map`, has a device write it, and closes the mirror.
fn use_it(map: &Map, options: &Options, round: u64) -> Result<(), Error> {
    // SAFETY: memory of the test's.
    let mirror = unsafe { svm::mirror_raw(map.at(0), PAGES * PAGE, options) }?;
    let device = TestDevice::new()?;
    let view = mirror.view();
    for page in 0..PAGES {
        let at = view.addr() + page * PAGE;
        device.write(view.region(), at, &(round + page as u64).to_ne_bytes())?;
    }
    assert_eq!(map.read(3), round + 3);
    // It is away again: the mirror's end brings it home.
    device.fault_in(view.region(), view.addr(), view.len(), Access::Write)?;
    mirror.close()
}

fn is_exhaustion(error: &Error) -> bool {
    let device = error
        .device_fault()
        .is_some_and(|fault| fault.kind == svm::DeviceFaultKind::OutOfMemory);
    let errno = matches!(
        error.os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN)
    );
    (device || errno || *error.kind() == ErrorKind::OutOfMemory) && !error.is_unsupported()
}

/// Uses a map while `limit` leaves room for less and less, then for more and more; what a failed attempt has written or left unwritten
/// is what the next one finds.
fn under(limit: impl Fn(usize), lift: impl Fn(), steps: usize, options: &Options) {
    let map = Map::new(PAGES);
    let (mut failures, mut successes, mut round) = (0, 0, 1000);
    for room in 0..steps {
        limit(room);
        let outcome = use_it(&map, options, round);
        lift();
        match outcome {
            Ok(()) => {
                successes += 1;
                (0..PAGES).for_each(|page| assert_eq!(map.read(page), round + page as u64));
            }
            Err(error) => {
                assert!(is_exhaustion(&error), "room for {room}: {error:?}");
                failures += 1;
                for page in 0..PAGES {
                    // Of this attempt or the last one: nothing is lost, whatever it came to.
                    let found = map.read(page);
                    let known = [round, round - 1000]
                        .iter()
                        .any(|r| found == r + page as u64);
                    assert!(
                        known || found == page as u64 + 1,
                        "room for {room}: page {page} is {found}"
                    );
                }
                // Nothing half done: it can be mirrored, and used, at once.
                use_it(&map, options, round)
                    .unwrap_or_else(|e| panic!("after room for {room}: {e:?}"));
            }
        }
        round += 1000;
    }
    assert!(
        failures > 0 && successes > 0,
        "{failures} failures, {successes} successes"
    );
    map.unmap();
}

fn both_doors(name: &'static str, test: impl Fn(&Options)) {
    let _watchdog = Watchdog::new(name);
    // In the process of its own nothing may have been used before.
    if std::env::var_os("SVM_TEST_OWN_PROCESS").is_some() || usable() {
        in_own_process(name, &[""], || {
            for delivery in [Delivery::Inline, Delivery::Thread] {
                test(&Options::new().delivery(delivery));
            }
        });
    }
}

fn set_nofile(limit: libc::rlim_t) {
    let mut now = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `now` is a valid rlimit.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut now) };
    assert_eq!(got, 0);
    now.rlim_cur = limit.min(now.rlim_max);
    // SAFETY: the same.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const now) };
    assert_eq!(set, 0);
}

#[test]
fn descriptors_run_out() {
    both_doors("descriptors_run_out", |options| {
        let limit = |room: usize| {
            // The lowest number that is free, and as many above it as there is to be room for.
            let next = File::open("/dev/null").unwrap();
            let first = std::os::fd::AsRawFd::as_raw_fd(&next);
            set_nofile(libc::rlim_t::try_from(first).unwrap() + room as libc::rlim_t);
        };
        // Nothing was ever mirrored through this door: its descriptors are made in the midst of this. Once they are there none is
        // needed any more, so it fails only in the first steps.
        under(limit, || set_nofile(1024), 12, options);
    });
}

/// Mappings that can be taken until there are no more.
struct Mappings {
    at: Map,
    taken: usize,
}

impl Mappings {
    fn new() -> Self {
        let max = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let max: usize = max.trim().parse().unwrap();
        let at = Map::at_hint(
            0x4567_0000_0000,
            2 * max,
            libc::PROT_NONE,
            libc::MAP_NORESERVE,
        );
        Self { at, taken: 0 }
    }

    fn take_all_but(&mut self, room: usize) {
        // Every other page with another protection is a mapping of its own, and one more beside it.
        while self.protect(self.taken, libc::PROT_READ) {
            self.taken += 1;
        }
        self.give(room.div_ceil(2));
    }

    fn give(&mut self, n: usize) {
        for _ in 0..n {
            self.taken -= 1;
            assert!(self.protect(self.taken, libc::PROT_NONE));
        }
    }

    fn protect(&self, n: usize, prot: i32) -> bool {
        // SAFETY: memory of the test's, which nobody touches.
        unsafe { libc::mprotect(self.at.at(2 * n + 1).cast(), PAGE, prot) == 0 }
    }
}

#[test]
fn mappings_run_out() {
    both_doors("mappings_run_out", |options| {
        const LIFTED: usize = 1000;
        let held = std::sync::Mutex::new(Mappings::new());
        let limit = |room| held.lock().unwrap().take_all_but(room);
        let lift = || held.lock().unwrap().give(LIFTED);
        // What ends a mirror waits for a mapping where it must not fail; so room comes after a while, as it would.
        let (stop, lifted) = (AtomicBool::new(false), AtomicBool::new(false));
        struct StopAtEnd<'a>(&'a AtomicBool);
        impl Drop for StopAtEnd<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut waited = 0;
                while !stop.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(5));
                    waited += 1;
                    if waited % 100 == 0 {
                        lift();
                        lifted.store(true, Ordering::SeqCst);
                    }
                }
            });
            let _stop = StopAtEnd(&stop);
            under(limit, lift, 40, options);
        });
        println!("lifted while it waited: {}", lifted.into_inner());
        held.into_inner().unwrap().at.unmap();
    });
}
