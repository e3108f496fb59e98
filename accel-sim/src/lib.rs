//! A simulated accelerator on [`svm`]: worker threads that compute on the same addresses as the CPU.
//!
//! The workers stand for the cores of a device. Each has a translation cache; behind it are a device page table and device
//! memory of a configured size, into which pages move when they are touched, and out of which they move when the CPU touches
//! them or others need the room. To `svm` it is one more [`svm::Device`]; it knows nothing of userfaultfd.
//!
//! # Kernels
//!
//! | launch                     | kernel gets                                                | for |
//! |----------------------------|------------------------------------------------------------|-----|
//! | [`run`](Accelerator::run)  | disjoint chunks as `&mut [T]` and `&[T]`, at native speed  | arrays worked on index by index |
//! | [`run_items`](Accelerator::run_items) | handles to load and store single elements, atomics, pointers | gathers, graphs, lists |
//!
//! Each can also be launched in a [`scope`](Accelerator::scope), to overlap with CPU work, or detached on owned buffers
//! ([`spawn`](Accelerator::spawn)).
//!
//! # Trade-offs
//!
//! A kernel that panics ends its launch with an error that carries the message; the standard library's panic hook prints it first, as
//! for any thread.
//!
//! A slice kernel that holds a page which the CPU needs keeps it for [`Options::span_deadline`]; then the page is taken. A kernel that
//! touches it afterwards cannot be unwound from there: its launch ends with [`DeviceFaultKind::Stuck`](svm::DeviceFaultKind::Stuck),
//! its thread sleeps for ever with whatever it has locked or allocated, and a new thread takes its place.

mod accelerator;
mod cache;
mod chunk;
mod device;
mod elements;
mod error;
mod items;
mod lane;
mod launch;
mod ops;
mod options;
mod relief;
mod shootdown;
mod space;
mod span;
mod stats;
mod sync;
mod table;
#[cfg(test)]
mod table_tests;
mod view;
mod words;
mod worker;

pub use accelerator::{Accelerator, Job, Scope, ScopedLaunch};
pub use elements::{Elements, ElementsMut};
pub use error::Error;
pub use lane::Lane;
pub use options::{MAX_CACHE_ENTRIES, MAX_WORKERS, MIN_CACHE_ENTRIES, Options};
pub use stats::{Stats, WorkerStats};
pub use view::{Indices, MAX_VIEWS, SpanSet, ViewSet, indices};
pub use words::Atomic;
