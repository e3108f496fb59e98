//! [`ValidList`]: what an update has found valid, block by block.
//!
//! It is written with a block locked, and read with the device locked. So it lies in a mapping of its own (hazards W6).

use core::ops::Deref;

use crate::round::Valid;
use crate::sys::mmap::MapArray;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct ValidList {
    /// `slots[..len]` are taken.
    slots: MapArray<Valid>,
    len: usize,
}

impl ValidList {
    /// An empty list; `Err` gives the errno.
    pub(crate) fn new() -> Result<Self, i32> {
        Ok(Self {
            slots: room_for(1)?,
            len: 0,
        })
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Makes room for `more` entries, where nothing is locked. `Err` gives the errno.
    pub(crate) fn reserve(&mut self, more: usize) -> Result<(), i32> {
        let needed = self.len + more;
        if needed > self.slots.len() {
            let mut grown = room_for(needed.next_power_of_two())?;
            for (slot, valid) in grown.iter_mut().zip(&**self) {
                *slot = valid.copy();
            }
            self.slots = grown;
        }
        Ok(())
    }

    /// Adds an entry, for which there is room.
    #[inline]
    pub(crate) fn push(&mut self, valid: Valid) {
        self.slots[self.len] = valid;
        self.len += 1;
    }
}

fn room_for(nr: usize) -> Result<MapArray<Valid>, i32> {
    MapArray::from_fn(nr, |_| Valid::nothing())
        .map_err(|e| e.raw_os_error().unwrap_or(libc::ENOMEM))
}

impl Deref for ValidList {
    type Target = [Valid];
    fn deref(&self) -> &[Valid] {
        &self.slots[..self.len]
    }
}
