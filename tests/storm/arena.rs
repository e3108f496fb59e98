//! [`Arena`]: a range of addresses, with a [`Record`] for each page of what must be in it and of whether somebody has taken it.

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Checked, PAGE};
use crate::mapping::Map;
use crate::rng::Rng;

/// The words of a page that are used: the first and the last.
pub(super) const LAST: usize = PAGE - 8;

/// What a page's record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) generation: u64,
    pub(super) is_zero: bool,
    /// What a device's access must come to.
    pub(super) reach: Reach,
    pub(super) is_taken: bool,
}

/// Whether a page is in its mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    Mirrored,
    /// It has left it.
    Left,
    /// It depends on what the kernel tells.
    Unknown,
}

impl Record {
    pub(super) const fn to_bits(self) -> u64 {
        self.generation << 4
            | (self.is_zero as u64) << 3
            | (self.reach as u64) << 1
            | self.is_taken as u64
    }

    const fn from_bits(bits: u64) -> Self {
        Self {
            generation: bits >> 4,
            is_zero: bits >> 3 & 1 == 1,
            reach: match bits >> 1 & 3 {
                0 => Reach::Mirrored,
                1 => Reach::Left,
                _ => Reach::Unknown,
            },
            is_taken: bits & 1 == 1,
        }
    }

    pub(super) fn word(self, page: usize) -> u64 {
        if self.is_zero {
            0
        } else {
            tag(page, self.generation)
        }
    }

    /// With other contents: a tag, or zeros.
    pub(super) const fn next(self, is_zero: bool) -> Self {
        Self {
            generation: self.generation + 1,
            is_zero,
            ..self
        }
    }
}

/// Never zero, and it tells the page and the generation.
pub(super) const fn tag(page: usize, generation: u64) -> u64 {
    generation << 20 | (page as u64) << 1 | 1
}

/// A range of addresses, and what must be in its pages.
pub(super) struct Arena {
    pub(super) map: Map,
    pub(super) records: Vec<AtomicU64>,
}

/// Pages in a row that somebody has taken.
pub(super) struct Taken {
    pub(super) first: usize,
    pub(super) records: Vec<Record>,
}

impl Taken {
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    pub(super) fn pages(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.len()
    }
}

impl Arena {
    pub(super) fn addr(&self, page: usize) -> usize {
        self.map.addr + page * PAGE
    }

    pub(super) fn record(&self, page: usize) -> Record {
        // Acquire pairs with the Release of `give`.
        Record::from_bits(self.records[page].load(Ordering::Acquire))
    }

    /// Takes a page, unless somebody has.
    pub(super) fn take(&self, page: usize) -> Option<Record> {
        let record = self.record(page);
        if record.is_taken {
            return None;
        }
        let taken = Record {
            is_taken: true,
            ..record
        };
        self.records[page]
            .compare_exchange(
                record.to_bits(),
                taken.to_bits(),
                Ordering::Acquire,
                Ordering::Relaxed,
            )
            .ok()
            .map(|_| record)
    }

    pub(super) fn give(&self, page: usize, record: Record) {
        self.records[page].store(record.to_bits(), Ordering::Release);
    }

    /// Takes up to `max` pages in a row, as many as are free; none is waited for.
    pub(super) fn take_some(&self, rng: &mut Rng, max: usize) -> Option<Taken> {
        let first = rng.below(self.map.pages);
        let end = (first + 1 + rng.below(max)).min(self.map.pages);
        let records: Vec<Record> = (first..end).map_while(|page| self.take(page)).collect();
        (!records.is_empty()).then_some(Taken { first, records })
    }

    pub(super) fn give_all(&self, taken: Taken, now: impl Fn(Record) -> Record) {
        for (page, record) in taken.pages().zip(taken.records) {
            self.give(page, now(record));
        }
    }

    pub(super) fn for_each_record(&mut self, now: impl Fn(Record) -> Record) {
        for record in &mut self.records {
            *record = AtomicU64::new(now(Record::from_bits(*record.get_mut())).to_bits());
        }
    }

    pub(super) fn word(&self, addr: usize) -> &AtomicU64 {
        // SAFETY: in the arena's memory, which stays mapped for whoever has taken the page; accessed by atomics alone.
        unsafe { AtomicU64::from_ptr(ptr::with_exposed_provenance_mut(addr)) }
    }

    /// Whether the CPU finds in a page, at home or at `at`, what its record says.
    pub(super) fn look_at(&self, page: usize, at: usize, record: Record, what: &str) -> Checked {
        let wanted = record.word(page);
        let found = [at, at + LAST].map(|at| self.word(at).load(Ordering::Relaxed));
        if found != [wanted; 2] {
            return Err(format!(
                "{what}: page {page} is {found:#x?}, not {wanted:#x}: {record:?}"
            ));
        }
        Ok(())
    }

    pub(super) fn look(&self, page: usize, what: &str) -> Checked {
        self.look_at(page, self.addr(page), self.record(page), what)
    }

    pub(super) fn write(&self, page: usize, word: u64) {
        let at = self.addr(page);
        for at in [at, at + LAST] {
            self.word(at).store(word, Ordering::Relaxed);
        }
    }
}
