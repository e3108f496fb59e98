//! Shared virtual memory in userspace.

pub mod notifier;
pub mod sync;
