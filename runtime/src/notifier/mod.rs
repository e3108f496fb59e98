//! The range protocol. (Prose follows.)
#![forbid(unsafe_code)]

mod active;
mod hub;
mod interval;
mod listener;
mod storage;
#[cfg(all(test, not(loom)))]
mod tests;
mod tree;

pub use hub::{BeginError, Bracket, Counters, Full, Hub, RangeKey, Subscription, Token};
pub use interval::Interval;
pub use listener::{
    Blocking, Change, Invalidation, Listener, WouldBlock, all_quiesced, invalidate_all,
};
