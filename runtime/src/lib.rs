//! Shared virtual memory in userspace.

pub mod addr;
#[cfg(target_os = "linux")]
#[allow(
    dead_code,
    reason = "the layers that use all of it are merged after it"
)]
mod sys;
