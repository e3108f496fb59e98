//! Children, and how they end; the buffers and the devices of a test; and what each test is run with.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use svm::{Access, Granule, Options};
use tests::{TestDevice, each_option, in_own_process};

use crate::PAGE;

/// How long a child may take. It is killed then: an alarm would wait for ever where it hangs with its signals masked.
const CHILD_LIMIT: Duration = Duration::from_secs(20);

/// In a child: ends it if the parent's thread ends first.
pub(crate) fn do_not_outlive_the_parent() {
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Forks; the child runs `child` and exits with 0 if it returned true.
pub(crate) fn spawn_child(child: impl FnOnce() -> bool) -> libc::pid_t {
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
pub(crate) fn wait_for(pid: libc::pid_t) -> i32 {
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
pub(crate) fn in_child(child: impl FnOnce() -> bool) -> bool {
    let status = wait_for(spawn_child(child));
    assert!(libc::WIFEXITED(status), "status {status:#x}");
    libc::WEXITSTATUS(status) == 0
}

/// Words of a buffer: some granules of those that are not huge, one that is and a part of the next.
pub(crate) fn nr_words(options: &Options) -> usize {
    let pages = if options.granule == Granule::Huge {
        520
    } else {
        64
    };
    pages * PAGE / 8
}

pub(crate) fn filled(options: &Options) -> svm::Buffer<u64> {
    let mut buffer = svm::Buffer::with_options(nr_words(options), options).unwrap();
    buffer
        .as_mut_slice()
        .iter_mut()
        .zip(0..)
        .for_each(|(x, i)| *x = i);
    buffer
}

pub(crate) fn take(device: &TestDevice, buffer: &mut svm::Buffer<u64>) {
    let view = buffer.view_mut();
    device
        .fault_in(view.region(), view.addr(), view.len_bytes(), Access::Write)
        .unwrap();
}

/// [`each_option`], where nobody else forks: `test` is the test's name.
pub(crate) fn each_alone(test: &str, name: &'static str, body: impl Fn(&Options)) {
    in_own_process(test, &[""], || each_option(name, body));
}

pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what}");
        std::thread::yield_now();
    }
}

/// Has `prepare` called in the middle of each fork, between our preparation, whose handler is installed later, and the fork; and `child` at
/// the beginning of each child, before our handler there.
pub(crate) fn at_fork_before_ours(
    prepare: Option<extern "C" fn()>,
    child: Option<extern "C" fn()>,
) {
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

/// Ends what the others do, also where an assertion fails.
pub(crate) struct SetOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
