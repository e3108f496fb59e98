//! Telling devices, in two passes.
//!
//! Between the start of an invalidation and the change itself every device that may hold translations has to give them up:
//!
//! 1. *invalidate*: each is told to remove its translations, under its own lock, and to begin flushing its caches;
//! 2. *quiesce*: each is asked whether no access through an old translation is under way any more.
//!
//! All are told before any is asked, so that their shootdowns overlap in time and the caller waits for the slowest, not
//! for the sum (I9). The second pass is a poll: a caller that gets `false` keeps the invalidation open, lets go of its
//! locks, waits, and asks again.
//!
//! A device that may not block and would have to refuses, and then the invalidation does not take place: those told
//! before it are told that it is off (I7).

use crate::sync::mutation::{Mutation, mutated};

/// Whether the caller may be made to wait for a device's lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// It may.
    Yes,
    /// It may not: a listener that would have to wait answers [`WouldBlock`].
    No,
}

/// A listener would have had to wait; nothing has been invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WouldBlock;

impl core::fmt::Display for WouldBlock {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("a device would have had to wait for its lock")
    }
}

impl core::error::Error for WouldBlock {}

/// Somebody who holds translations: a device.
///
/// The functions run on the fault path, perhaps in a signal handler: no allocation, no panic, no lock that a thread touching
/// mirrored memory can hold. `I` is what they are told: where, what goes, and whether the caller may be made to wait.
pub trait Listener<I> {
    /// Removes (or downgrades) the translations in the interval, under the lock under which they are established, and begins
    /// to flush what caches them. Does not wait for accesses under way.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`] if it would have had to wait and may not; nothing has been done then.
    fn invalidate(&self, invalidation: &I) -> Result<(), WouldBlock>;

    /// Whether no access through a translation that `invalidate` removed is under way any more. Does not wait. Once true,
    /// true until the invalidation ends.
    fn quiesced(&self, invalidation: &I) -> bool;

    /// The invalidation, which this listener had taken part in, will not take place. Translations that were removed stay so:
    /// they come back by faults.
    fn cancel(&self, invalidation: &I);
}

/// The first pass: tells every listener.
///
/// The invalidation's bracket is open; the caller goes on to [`all_quiesced`], keeping the bracket open.
///
/// # Errors
///
/// [`WouldBlock`] if one refused. Those told before it have been told that the invalidation is off; the caller ends the
/// bracket without having changed anything.
pub fn invalidate_all<'a, I, L: Listener<I> + ?Sized + 'a>(
    listeners: impl IntoIterator<Item = &'a L, IntoIter: Clone>,
    invalidation: &I,
) -> Result<(), WouldBlock> {
    let listeners = listeners.into_iter();
    for (nr_told, listener) in listeners.clone().enumerate() {
        if let Err(refusal) = listener.invalidate(invalidation) {
            if !mutated(Mutation::RefusalWithoutCancel) {
                listeners
                    .take(nr_told)
                    .for_each(|told| told.cancel(invalidation));
            }
            return Err(refusal);
        }
        if mutated(Mutation::PassesInterleaved) {
            listener.quiesced(invalidation);
        }
    }
    Ok(())
}

/// One step of the second pass: whether every listener is quiet.
///
/// `false`: let go of every lock, keep the bracket open, wait a little, ask again.
pub fn all_quiesced<'a, I, L: Listener<I> + ?Sized + 'a>(
    listeners: impl IntoIterator<Item = &'a L>,
    invalidation: &I,
) -> bool {
    listeners
        .into_iter()
        .all(|listener| listener.quiesced(invalidation))
}
