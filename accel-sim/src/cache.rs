//! A worker's translation cache.

use std::cell::Cell;

use crate::shootdown::Rights;
use crate::view::MAX_VIEWS;

/// A worker's translation cache: direct-mapped, its own. Each region of a launch has an equal part of it, so that arrays which are
/// walked together do not drive each other out, and so that a page which is the edge of two regions is found in each.
#[derive(Debug)]
pub(crate) struct Cache {
    entries: Box<[Entry]>,
    /// The launch that the entries belong to: what a part stands for changes with it.
    launch: Cell<u64>,
}

/// One cached translation.
///
/// A *tag* is `host page << 1 | rare`. A translation is *rare* when its page is not where the pages of its region usually are, or when the
/// hit path would need a real fence; `Lane::access` then leaves it to the slow path, and needs to look for neither.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    /// The tag, if loads may use it.
    pub(crate) read: Cell<u64>,
    /// The tag, if stores may.
    pub(crate) write: Cell<u64>,
    /// The flush generation it was walked to under (shootdown rule S5). No generation is 0.
    pub(crate) generation: Cell<u64>,
    /// What to add to a host address.
    pub(crate) offset: Cell<isize>,
}

impl Entry {
    #[inline(always)]
    pub(crate) fn tag(&self, rights: Rights) -> u64 {
        match rights {
            Rights::Read => self.read.get(),
            Rights::Write => self.write.get(),
        }
    }
}

impl Cache {
    pub(crate) fn new(nr_entries: usize) -> Cache {
        assert!(nr_entries.is_power_of_two() && nr_entries >= MAX_VIEWS);
        Cache {
            entries: (0..nr_entries).map(|_| Entry::default()).collect(),
            launch: Cell::new(0),
        }
    }

    /// Prepares for items of a launch: empties the cache unless it is of that launch.
    pub(crate) fn use_for(&self, launch: u64) {
        if self.launch.replace(launch) != launch {
            for entry in &self.entries {
                // No generation is 0.
                entry.generation.set(0);
            }
        }
    }

    /// The part of region `space` out of `nr_spaces`: a power of two of entries.
    pub(crate) fn part(&self, space: usize, nr_spaces: usize) -> &[Entry] {
        let len = self.entries.len() / nr_spaces.next_power_of_two();
        &self.entries[space * len..][..len]
    }
}
