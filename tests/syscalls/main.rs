//! The regression guard for what a fault asks of the kernel: the system calls of each kind, by name and in order, of every thread.
//!
//! `counts` asserts what the runtime says it did. Here the kernel says it: each test runs once more, in a process of its own, under a
//! tracer (ptrace, which a process may always do to its children), and every call between two marks is on the list. So a futex, a
//! yield, a barrier or a look at the clock that somebody adds to a fault shows. The clock usually is no system call, since the
//! kernel lends its code to the process (the vDSO); the tracer hides that from the C library, so that it is one.
//!
//! - `cpu`, `device`: a fault of either.
//! - `explicit`: what moves because it is asked for.
//! - `mirror`: its beginning and its end.
//! - `growth`: the same where there is much more memory, or there are many more mirrors.
//! - `launch`: what the accelerator's threads do.
//! - `rig`: a buffer and a device; `tracer`: how the calls are seen.

#![cfg(target_os = "linux")]
#![allow(
    clippy::multiple_unsafe_ops_per_block,
    reason = "a pointer and its use, under one proof"
)]

use svm::{Granule, Options};

mod cpu;
mod device;
mod explicit;
mod growth;
mod launch;
mod mirror;
mod rig;
mod tracer;

const PAGE: usize = 4096;
const BLOCK: usize = 512 * PAGE;

/// What one fault moves: a page, 64 KiB, 2 MiB of pages, and a huge page.
const MOVED: [(Granule, bool); 4] = [
    (Granule::Page, false),
    (Granule::Big, false),
    (Granule::Huge, false),
    (Granule::Huge, true),
];

/// Long enough for a few of each.
const LEN: usize = 4 * BLOCK;

/// Options that have a fault move so much, and what that is in bytes.
fn moved() -> impl Iterator<Item = (Options, usize)> {
    MOVED.into_iter().map(|(granule, huge)| {
        let options = Options::new().granule(granule).huge_pages(huge);
        (options, granule.bytes())
    })
}
