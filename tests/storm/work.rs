//! [`Work`]: what is worked on in an era, and which change comes next.

use std::sync::atomic::Ordering;

use svm::Options;

use super::arena::{Arena, Taken};
use super::{Checked, PAGE, Run};
use crate::rng::Rng;

/// What is worked on in an era.
pub(super) struct Work<'a> {
    pub(super) run: &'a Run,
    pub(super) arena: &'a Arena,
    pub(super) options: &'a Options,
}

/// Kinds of changes, by their weights.
const CHOICES: usize = 40;

/// How a call is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    Bare,
    Wrapper,
}

impl Work<'_> {
    pub(super) fn looked(&self, n: usize) {
        self.run.looks.fetch_add(n as u64, Ordering::Relaxed);
    }

    /// Takes pages and changes their mapping.
    pub(super) fn change(&self, rng: &mut Rng, room: usize) -> Checked {
        let Some(taken) = self.arena.take_some(rng, 60) else {
            return Ok(());
        };
        // First each of them, by both, then as chance will have it.
        let first = self.run.first.fetch_add(1, Ordering::Relaxed);
        let (choice, by_wrapper, rarely) = if first < 2 * CHOICES {
            (first / 2, first % 2 == 1, true)
        } else {
            let odds = rng.below(8);
            (rng.below(CHOICES), rng.below(2) == 1, odds == 0)
        };
        let at_times = rarely || rng.below(2) == 0;
        let by = if by_wrapper { By::Wrapper } else { By::Bare };
        let heard = |hears: bool| if hears { by } else { By::Wrapper };
        let (removal, unmapping) = (
            heard(self.run.hears_removal),
            heard(self.run.hears_unmapping),
        );
        match choice {
            0..9 => self.discard(taken, removal, libc::MADV_DONTNEED),
            9..12 => self.discard(taken, removal, libc::MADV_FREE),
            12..15 => self.unmap(taken, unmapping),
            15 if self.run.hears_unmapping => self.map_over(taken),
            16..19 => self.move_away_and_back(taken, unmapping, room),
            19 => self.move_and_leave(taken, unmapping, room),
            20 => self.shrink(taken, unmapping, rng),
            21..25 => self.protect(taken, by, libc::PROT_READ),
            25..29 => self.protect(taken, by, libc::PROT_NONE),
            29 if at_times => self.fork(taken),
            30 if rarely => self.fork_with_a_mirror(taken),
            31 if at_times => self.spawn(taken),
            32 => self.grow_and_shrink(taken, unmapping, room, rng),
            34 if at_times => {
                self.arena.give_all(taken, |record| record);
                self.run.count("devices told to release all");
                let accel = &self.run.accels[rng.below(self.run.accels.len())];
                accel.release().map_err(|e| format!("release: {e}"))
            }
            _ => {
                self.arena.give_all(taken, |record| record);
                std::thread::yield_now();
                Ok(())
            }
        }
    }

    pub(super) fn look_at_all(&self, taken: &Taken, start: usize, what: &str) -> Checked {
        self.looked(taken.len());
        taken
            .pages()
            .zip(&taken.records)
            .try_for_each(|(page, &record)| {
                let there = start + (page - taken.first) * PAGE;
                self.arena.look_at(page, there, record, what)
            })
    }

    /// Writes the next generation, so that watchers know that something has happened.
    pub(super) fn write_all(&self, taken: &Taken) {
        for (page, record) in taken.pages().zip(&taken.records) {
            self.arena.write(page, record.next(false).word(page));
        }
    }
}
