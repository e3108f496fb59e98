//! What tests of the accelerator share: a watchdog, and an accelerator of so many workers.

use std::io::Write;
use std::sync::mpsc;
use std::time::Duration;

use accel_sim::{Accelerator, Options};

/// Runs `test` with a watchdog: a hang is a failure with a name, not a stuck run.
pub(crate) fn within_deadline(test: impl FnOnce() + Send + 'static) {
    let (done, watch) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    if let Err(mpsc::RecvTimeoutError::Timeout) = watch.recv_timeout(Duration::from_secs(60)) {
        // Not by a macro: the harness would keep it.
        let _ = writeln!(
            std::io::stderr(),
            "{:?}: no end within 60 s",
            std::thread::current().name()
        );
        std::process::abort();
    }
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

pub(crate) fn accel(workers: usize) -> Accelerator {
    Accelerator::with_options(Options::new().workers(workers)).expect("an accelerator")
}
