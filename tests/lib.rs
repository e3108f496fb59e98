//! What the integration tests share: a watchdog, and a small device written as a driver author would write one, against
//! `svm::Device` and the public range API alone.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]
#![cfg(target_os = "linux")]

pub mod device;
pub mod idle;
pub mod mapping;
pub mod mm;
pub mod seccomp;
pub mod storm;
pub mod stress;
pub mod watchdog;

pub use device::{Dummy, TestDevice};
pub use idle::Idle;
pub use mapping::{Map, in_own_process};
pub use watchdog::Watchdog;

/// Whether this machine lets the process have a userfaultfd; says so if not, so that a skipped test is seen.
#[must_use]
pub fn usable() -> bool {
    match svm::Buffer::<u8>::zeroed(1) {
        Ok(_) => true,
        Err(error) if error.is_unsupported() => {
            println!("SKIPPED: {error}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}
