//! S: signals, of which a fault is one.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use svm::Access;
use tests::Map;
use tests::idle::{Idle, fault_in};

use crate::PAGE;
use crate::fixture::both_doors;

/// S1: a fault comes between any two instructions, so `errno` is afterwards what it was before; here of one whose first system call
/// the kernel refuses.
#[test]
fn a_fault_leaves_errno_as_it_was() {
    both_doors("errno", |options| {
        let map = Map::new(4);
        let mirror = map.mirror(options);
        let device = Idle::attach().unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let mut range = device.range().unwrap();
        let page = (map.addr - mapped.region().base()) / PAGE;
        fault_in(&mut range, &mapped, page..page + 4, Access::Write).unwrap();
        // Pages are not moved between memory that is locked and memory that is not.
        // SAFETY: the test's mapping; nothing is populated.
        let locked = unsafe { libc::mlock2(map.at(0).cast(), PAGE, libc::MLOCK_ONFAULT) };
        assert_eq!(locked, 0);
        // SAFETY: this thread's own.
        unsafe { *libc::__errno_location() = 4242 };
        let value = map.read(0);
        // SAFETY: as above.
        let errno = unsafe { *libc::__errno_location() };
        assert_eq!((value, errno), (1, 4242));
        assert!(
            mirror.stats().copy_calls > 0,
            "nothing was refused: {:?}",
            mirror.stats()
        );
        drop(range);
        mirror.close().unwrap();
        map.unmap();
    });
}

/// S1: a signal handler that touches mirrored memory, as a profiler's may, finds no lock of the runtime taken by its own thread.
#[test]
fn a_profilers_handler_may_touch_what_the_thread_is_faulting_on() {
    static AT: AtomicUsize = AtomicUsize::new(0);
    static RAN: AtomicU32 = AtomicU32::new(0);
    extern "C" fn on_alarm(_: libc::c_int) {
        let at = AT.load(Ordering::Relaxed);
        if at != 0 {
            // SAFETY: the mirrored page that the test has named.
            unsafe {
                ptr::with_exposed_provenance_mut::<u64>(at + 8).write_volatile(1);
            };
            RAN.fetch_add(1, Ordering::Relaxed);
        }
    }
    both_doors("profiler", |options| {
        let map = Map::new(4);
        let mirror = map.mirror(options);
        let device = Idle::attach().unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        let mut range = device.range().unwrap();
        let page = (map.addr - mapped.region().base()) / PAGE;
        // SAFETY: a handler that does what the test is about.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_alarm as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut());
        }
        // SAFETY: no preconditions.
        let this = unsafe { libc::pthread_self() };
        let stop = AtomicBool::new(false);
        AT.store(map.addr, Ordering::Relaxed);
        let before = RAN.load(Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // SAFETY: the thread that waits at the end of this scope.
                    unsafe { libc::pthread_kill(this, libc::SIGALRM) };
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
            for turn in 0..2000 {
                {
                    let _worker = svm::worker_thread();
                    fault_in(&mut range, &mapped, page..page + 1, Access::Write).unwrap();
                }
                map.write(0, turn);
            }
            stop.store(true, Ordering::Relaxed);
        });
        AT.store(0, Ordering::Relaxed);
        assert!(
            RAN.load(Ordering::Relaxed) > before + 50,
            "the handler hardly ran"
        );
        drop(range);
        mirror.close().unwrap();
        map.unmap();
    });
}
