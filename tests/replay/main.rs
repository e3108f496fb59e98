//! Deterministic replay on the real kernel: threads are stopped at named points of the runtime, and a script, or a seed, decides
//! who goes next. `cargo test -p tests --test replay`; what the points are is told in `runtime/src/point.rs`.
//!
//! - `table`: a device fault stopped at each stage, against everything that can happen to its page, with the outcome of each.
//! - `ladders`: the schedules of the protocol's text, and of the hazards that broke earlier designs.
//! - `opaque`: a device behind copies, while calls stop half-way.
//! - `random`: schedules from a seed. `SVM_REPLAY_SEED=N cargo test -p tests --test replay random` runs the one again that failed.
//!
//! `svm` here is `svm-points`: the same sources with the points compiled in. The real one stays as it is.
#![cfg(target_os = "linux")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

extern crate svm_points as svm;

mod broken;
mod director;
mod ladders;
mod opaque;
mod random;
mod rig;
mod table;

use std::time::Duration;

/// A watchdog for as long as a table may take on a loaded machine, waiting for the stage included.
fn watch(name: &'static str) -> tests::Watchdog {
    tests::Watchdog::with_timeout(name, Duration::from_secs(240))
}

/// Whether this machine lets the process have a userfaultfd; by `svm_points`, for `svm` is not to be in this process as well.
fn usable() -> bool {
    let usable = svm::Capabilities::probe().is_usable();
    if !usable {
        tests::lacks_userfaultfd(&"no userfaultfd here");
    }
    usable
}
