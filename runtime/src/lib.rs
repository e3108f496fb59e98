//! Shared virtual memory in userspace.

pub mod addr;
#[cfg(target_os = "linux")]
mod sys;
pub mod notifier;
pub mod sync;
