//! The modules of `svm` that are model-checked, compiled against loom.
//!
//! These are the runtime's own source files, not copies: what is modelled is what runs. They make a crate of their own because
//! the rest of the runtime makes system calls, which no model has, and need not compile with loom's types in place of the
//! machine's. The directory (`block`) comes with what it is made of. Without `--cfg svm_loom` the crate is empty; `ci/models.sh` runs it.
#![cfg(svm_loom)]

#[allow(
    dead_code,
    unreachable_pub,
    reason = "a library's file: rounds have use for a part of it"
)]
#[path = "../src/addr.rs"]
mod addr;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "a library's file: rounds have use for a part of it"
)]
#[path = "../src/block.rs"]
mod block;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "a library's file: rounds have use for a part of it"
)]
#[path = "../src/error.rs"]
mod error;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "a library's file: rounds have use for a part of it"
)]
#[path = "../src/mask.rs"]
mod mask;
#[path = "../src/notifier/mod.rs"]
pub mod notifier;
#[path = "../src/sync/mod.rs"]
pub mod sync;
