//! Help for tests that need a process of their own: handlers and masks are the process's, and a test
//! that goes wrong hangs or dies.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::mmap::MapArray;

/// Set in a child to the name of the test it runs.
const CHILD: &str = "SVM_TEST_CHILD";

/// How a child ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Its exit code, if it exited.
    pub(crate) code: Option<i32>,
    /// The signal that killed it, if one did.
    pub(crate) signal: Option<i32>,
    /// All it wrote to stderr.
    pub(crate) stderr: String,
}

impl Ended {
    /// Panics unless the body ran to its end.
    #[track_caller]
    pub(crate) fn assert_passed(&self) {
        assert_eq!((self.code, self.signal), (Some(0), None), "{}", self.stderr);
    }

    /// Panics unless the child was killed by `signal`.
    #[track_caller]
    pub(crate) fn assert_killed_by(&self, signal: i32) {
        assert_eq!(
            (self.code, self.signal),
            (None, Some(signal)),
            "{}",
            self.stderr
        );
    }
}

/// Runs `body` in a new process, which is this test binary, told to run the test `name` alone with
/// `variables` in its environment (and no SVM_DISABLE but one among them). `name` is the calling test's full path, and the call is all that the
/// test does before it looks at the result; in the child the call returns `None`.
///
/// A child that takes 30 seconds is killed, which fails the assertions above.
pub(crate) fn in_child(name: &str, variables: &[(&str, &str)], body: fn()) -> Option<Ended> {
    if std::env::var(CHILD).is_ok_and(|child| child == name) {
        body();
        return None;
    }
    let mut child = Command::new(std::env::current_exe().expect("the test binary has a path"))
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, name)
        .env_remove(super::disable::VARIABLE)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the test binary can be run again");
    let mut pipe = child.stderr.take().expect("stderr is piped");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = pipe.read_to_string(&mut text);
        text
    });
    let deadline = Instant::now() + Duration::from_secs(30);
    let status = loop {
        if let Some(status) = child.try_wait().expect("the child is ours") {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().expect("the child is ours");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    Some(Ended {
        code: status.code(),
        signal: status.signal(),
        stderr: reader.join().expect("the reader does not panic"),
    })
}

/// Runs `body` on a thread whose alternate signal stack is large and painted, and returns how many bytes
/// of it the handlers that ran meanwhile used, the kernel's frame included.
///
/// The standard library gives its threads `max(8 KiB, AT_MINSIGSTKSZ)`: that is what must suffice.
pub(crate) fn alternate_stack_used(body: impl FnOnce() + Send) -> usize {
    const LEN: usize = 256 * 1024;
    const PAINT: u8 = 0xA5;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut stack = MapArray::<u8>::from_fn(LEN, |_| PAINT).expect("memory");
            let ours = libc::stack_t {
                ss_sp: stack.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: LEN,
            };
            let mut theirs = ours;
            // SAFETY: both are initialised; the memory is this thread's own until theirs is restored.
            let set = unsafe { libc::sigaltstack(&raw const ours, &raw mut theirs) };
            assert_eq!(set, 0);
            body();
            // SAFETY: as above; what is restored is what the standard library had set.
            let restored = unsafe { libc::sigaltstack(&raw const theirs, std::ptr::null_mut()) };
            assert_eq!(restored, 0);
            LEN - stack.iter().take_while(|&&byte| byte == PAINT).count()
        });
        thread.join().expect("the body does not panic")
    })
}

/// The calling thread's alternate signal stack.
pub(crate) fn current_alternate_stack() -> libc::stack_t {
    let mut stack = libc::stack_t {
        ss_sp: std::ptr::null_mut(),
        ss_flags: 0,
        ss_size: 0,
    };
    // SAFETY: with a null new stack the current one is written to `stack`.
    unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
    stack
}

/// The full path of a test in the calling module, as the test harness knows it.
macro_rules! test_name {
    ($name:literal) => {
        concat!(module_path!(), "::", $name)
            .split_once("::")
            .expect("a module path has a crate")
            .1
    };
}
pub(crate) use test_name;
