//! The kernels: what runs on the accelerator.
//!
//! Each lays its input out in shared memory, works on it there, and hands the result to a `verify`
//! closure while that memory is still shared.

pub(crate) mod list;
pub(crate) mod pagerank;
pub(crate) mod saxpy;

use std::process::ExitCode;

use crate::report::Counters;

/// What a kernel leaves behind.
#[derive(Debug)]
pub(crate) struct Ran<V> {
    /// What `verify` returned.
    pub(crate) verdict: V,
    /// As of the end of `verify`.
    pub(crate) counters: Counters,
}

/// Says what this machine lets us do.
pub(crate) fn doctor() -> anyhow::Result<ExitCode> {
    anyhow::bail!(MISSING)
}

/// What this build says instead of running anything.
const MISSING: &str = "this build has no accelerator in it yet; nothing was run";
