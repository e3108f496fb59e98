//! What the benches share: the harness, the floors they are measured against, and a device without workers.
//!
//! An absolute time means little on a shared, virtual machine. So every figure is a *ratio to a floor measured in the same
//! run*: the least code that could do the job, raw ioctls in a loop or a bare signal handler, run in turns with ours, under
//! the same threads, on the same kind of memory. See [`harness`] for how, and [`floors`] for the floors.

#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]
#![cfg(target_os = "linux")]

pub mod device;
pub mod floors;
pub mod harness;
pub mod machine;
pub mod plot;
pub mod report;
