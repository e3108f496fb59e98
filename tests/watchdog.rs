//! A hang becomes a failure, with the stacks of all threads, within a minute.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Aborts the process if it is not dropped in time.
#[derive(Debug)]
#[must_use = "the watchdog watches while it lives"]
pub struct Watchdog {
    done: Arc<AtomicBool>,
}

impl Watchdog {
    /// Watches for 50 seconds.
    pub fn new(name: &'static str) -> Self {
        Self::with_timeout(name, Duration::from_secs(50))
    }

    /// Watches for `timeout`.
    pub fn with_timeout(name: &'static str, timeout: Duration) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&done);
        std::thread::spawn(move || {
            let start = Instant::now();
            while start.elapsed() < timeout {
                if seen.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            eprintln!("watchdog: {name} has not finished after {timeout:?}; threads:");
            print_threads();
            std::process::abort();
        });
        Self { done }
    }
}

/// Where each thread is in the kernel; and by gdb, where there is one, in user space.
fn print_threads() {
    let pid = std::process::id();
    if let Ok(tasks) = std::fs::read_dir("/proc/self/task") {
        for task in tasks.flatten() {
            let read =
                |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
            let (comm, wchan) = (read("comm"), read("wchan"));
            eprintln!(
                "  {} {} in {wchan}",
                task.file_name().display(),
                comm.trim()
            );
        }
    }
    // A debugger has to stop every thread, and one that waits in the kernel for a thread that is stopped already never does. This
    // thread is among those that it stops, so somebody else has to see to it that it ends, and that they go on.
    let script = "timeout -s KILL 10 gdb -p $1 -batch -ex 'handle SIGBUS nostop noprint pass' -ex 'thread apply all bt 12'; kill -CONT $1";
    let limited = Command::new("sh")
        .args(["-c", script, "sh", &pid.to_string()])
        .stdin(Stdio::null())
        .status();
    drop(limited);
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
    }
}
