//! Shared virtual memory in userspace.
