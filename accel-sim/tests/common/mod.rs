//! What tests of the accelerator share: a watchdog, and an accelerator of so many workers.

use std::io::Write;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use accel_sim::{Accelerator, Error, Options};
use svm::ErrorKind;

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

/// An accelerator. Eight can be there at once, and a test beside this one may have them all for a moment.
pub(crate) fn accel(workers: usize) -> Accelerator {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match Accelerator::with_options(Options::new().workers(workers)) {
            Err(Error::Runtime(error))
                if is_for_want_of_a_device(&error) && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            made => return made.expect("an accelerator"),
        }
    }
}

fn is_for_want_of_a_device(error: &svm::Error) -> bool {
    matches!(error.kind(), ErrorKind::Invalid(why) if why.contains("attached already"))
}
