//! The modules of `svm` that are model-checked, compiled against loom.
//!
//! These are the runtime's own source files, not copies: what is modelled is what runs. They make a crate of their own because
//! the rest of the runtime makes system calls, which no model has, and need not compile with loom's types in place of the
//! machine's. Without `--cfg svm_loom` the crate is empty; `ci/models.sh` runs it.
#![cfg(svm_loom)]

#[path = "../src/notifier/mod.rs"]
pub mod notifier;
#[path = "../src/sync/mod.rs"]
pub mod sync;
