//! The table of invalidations that have started and not ended.

use super::RangeKey;
use super::interval::Interval;
use crate::sync::mutation::{Mutation, mutated};

/// How many invalidations of one region can be open at a time.
pub(super) const SLOTS: usize = if cfg!(svm_loom) { 3 } else { 64 };

const ALL_USED: u64 = u64::MAX >> (64 - SLOTS);

/// One invalidation that has started and not ended.
#[derive(Clone, Copy, Debug)]
struct Slot {
    interval: Interval,
    except: Option<RangeKey>,
}

/// The invalidations of a region that have started and not ended, with what each covers.
///
/// That they are remembered, interval and all, is what the kernel's counter lacks: with the table a range can ask whether it
/// has to wait *for these*, whenever it was inserted or moved.
#[derive(Debug)]
pub(super) struct Active {
    /// Bit *i*: slot *i* is in use.
    used: u64,
    slots: [Slot; SLOTS],
}

impl Active {
    pub(super) const fn new() -> Self {
        Self {
            used: 0,
            slots: [Slot {
                interval: Interval::EMPTY,
                except: None,
            }; SLOTS],
        }
    }

    /// Remembers an invalidation; `None` if all slots are in use.
    pub(super) fn insert(&mut self, interval: Interval, except: Option<RangeKey>) -> Option<u8> {
        if self.used == ALL_USED {
            return None;
        }
        let slot = self.used.trailing_ones();
        self.used |= 1 << slot;
        self.slots[slot as usize] = Slot { interval, except };
        u8::try_from(slot).ok()
    }

    /// Forgets an invalidation; returns what it covered.
    pub(super) fn remove(&mut self, slot: u8) -> Interval {
        debug_assert_ne!(self.used & 1 << slot, 0, "slot {slot} ended twice");
        self.used &= if mutated(Mutation::HubEndEndsAll) {
            0
        } else {
            !(1 << slot)
        };
        self.slots[usize::from(slot)].interval
    }

    /// Whether the range `key`, which covers `interval`, has to wait for any of them.
    pub(super) fn blocks(&self, interval: Interval, key: RangeKey) -> bool {
        let mut left = self.used;
        while left != 0 {
            let slot = &self.slots[left.trailing_zeros() as usize];
            if slot.interval.overlaps(interval) && slot.except != Some(key) {
                return true;
            }
            left &= left - 1;
        }
        false
    }

    /// How many there are.
    pub(super) fn len(&self) -> u32 {
        self.used.count_ones()
    }
}
