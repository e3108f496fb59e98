//! What the integration tests share: a watchdog, and a small device written as a driver author would write one, against
//! `svm::Device` and the public range API alone.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]
#![cfg(target_os = "linux")]

use std::fmt::Display;
use std::io::Write;

pub mod device;
pub mod idle;
pub mod mapping;
pub mod mm;
mod rng;
pub mod seccomp;
pub mod storm;
pub mod stress;
pub mod watchdog;

pub use device::{Dummy, TestDevice};
pub use idle::Idle;
pub use mapping::{Map, each_option, in_own_process};
pub use watchdog::Watchdog;

/// Whether this machine lets the process have a userfaultfd. If not, the test is skipped, and that is seen: see [`lacks_userfaultfd`].
#[must_use]
pub fn usable() -> bool {
    match svm::Buffer::<u8>::zeroed(1) {
        Ok(_) => true,
        Err(error) if error.is_unsupported() => {
            lacks_userfaultfd(&error);
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// A test cannot run for want of a userfaultfd: skips it.
///
/// # Panics
/// If `SVM_REQUIRE` says that there is one: then nothing passes by having been skipped.
pub fn lacks_userfaultfd(why: &dyn Display) {
    let required = std::env::var("SVM_REQUIRE").unwrap_or_default();
    let is_required = required.split(',').any(|word| word == "userfaultfd");
    assert!(
        !is_required,
        "SVM_REQUIRE={required}, and there is none: {why}"
    );
    skip(why);
}

/// Says that the rest of the test is skipped, past what keeps the output of tests that pass from being shown; and adds it to the file
/// that `SVM_SKIPPED` names.
///
/// # Panics
/// If that cannot be written: a skip must not pass unseen.
pub fn skip(why: impl Display) {
    let program = std::env::current_exe().unwrap_or_default();
    let program = program.file_stem().unwrap_or_default().display();
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a thread");
    let line = format!("SKIPPED: {program} {test}: {why}\n");
    let said = std::io::stderr().write_all(line.as_bytes());
    assert!(said.is_ok(), "{said:?}: {line}");
    let Some(path) = std::env::var_os("SVM_SKIPPED") else {
        return;
    };
    let file = std::fs::File::options().append(true).open(path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    assert!(written.is_ok(), "SVM_SKIPPED: {written:?}: {line}");
}
