//! The range protocol. (Prose follows.)
#![forbid(unsafe_code)]

mod active;
mod hub;
mod interval;
mod listener;
#[cfg(all(test, loom))]
pub(crate) mod models;
mod storage;
#[cfg(all(test, not(loom)))]
mod tests;
mod tree;
#[cfg(all(test, loom))]
mod wrong;

pub use hub::{BeginError, Bracket, Counters, Full, Hub, RangeKey, Subscription, Token};
pub use interval::Interval;
pub use listener::{
    Blocking, Change, Invalidation, Listener, WouldBlock, all_quiesced, invalidate_all,
};
