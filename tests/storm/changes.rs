//! Changes: pages that are taken have their mapping changed by a call, bare or by wrapper; and what it must have made of them is
//! looked at, and written down.

use std::ptr;
use std::sync::atomic::Ordering;

use svm::Delivery;

use super::arena::{Reach, Record, Taken};
use super::work::{By, Work};
use super::{Checked, PAGE};
use crate::mapping::{Map, READ_WRITE};
use crate::rng::Rng;

fn sys(what: &str, result: libc::c_int) -> Checked {
    if result == 0 {
        Ok(())
    } else {
        Err(format!("{what}: {}", std::io::Error::last_os_error()))
    }
}

fn at(addr: usize) -> *mut u8 {
    ptr::with_exposed_provenance_mut(addr)
}

impl Work<'_> {
    /// Counts a call. After a bare one through the thread door, goes through the runtime, so that its event is applied; through the
    /// inline door nothing is stale anyway.
    fn made(&self, taken: &Taken, by: By, bare: &'static str, wrapper: &'static str) -> Checked {
        self.run.count(if by == By::Bare { bare } else { wrapper });
        if by == By::Bare && self.options.delivery == Some(Delivery::Thread) {
            self.mprotect(taken, By::Wrapper, READ_WRITE)?;
        }
        Ok(())
    }

    fn mprotect(&self, taken: &Taken, by: By, prot: i32) -> Checked {
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        match by {
            // SAFETY: pages that are taken.
            By::Bare => sys("mprotect", unsafe {
                libc::mprotect(at(addr).cast(), len, prot)
            }),
            // SAFETY: the same.
            By::Wrapper => unsafe { svm::mprotect(at(addr), len, prot) }.map_err(|e| e.to_string()),
        }
    }

    pub(super) fn discard(&self, taken: Taken, by: By, advice: i32) -> Checked {
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        match by {
            // SAFETY: pages that are taken.
            By::Bare => sys("madvise", unsafe {
                libc::madvise(at(addr).cast(), len, advice)
            })?,
            By::Wrapper => {
                // SAFETY: the same.
                unsafe { svm::madvise(at(addr), len, advice) }.map_err(|e| e.to_string())?;
            }
        }
        if advice == libc::MADV_DONTNEED {
            self.made(
                &taken,
                by,
                "madvise(DONTNEED), bare",
                "madvise(DONTNEED), wrapper",
            )?;
            self.arena.give_all(taken, |record| record.next(true));
            return Ok(());
        }
        self.made(&taken, by, "madvise(FREE), bare", "madvise(FREE), wrapper")?;
        for (page, record) in taken.pages().zip(&taken.records) {
            // The old contents or zeros, as the kernel likes; but by the wrapper, and of a mirror, zeros.
            let found = self
                .arena
                .word(self.arena.addr(page))
                .load(Ordering::Relaxed);
            let old =
                found == record.word(page) && (by == By::Bare || record.reach != Reach::Mirrored);
            if found != 0 && !old {
                return Err(format!("freed page {page} is {found:#x}: {record:?}"));
            }
            self.arena.write(page, record.next(false).word(page));
        }
        self.arena.give_all(taken, |record| record.next(false));
        Ok(())
    }

    fn left(record: Record) -> Record {
        Record {
            reach: Reach::Left,
            ..record
        }
    }

    pub(super) fn unmap(&self, taken: Taken, by: By) -> Checked {
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        match by {
            // SAFETY: pages that are taken.
            By::Bare => sys("munmap", unsafe { libc::munmap(at(addr).cast(), len) })?,
            // SAFETY: the same.
            By::Wrapper => unsafe { svm::munmap(at(addr), len) }.map_err(|e| e.to_string())?,
        }
        // At once: by a bare call, before anybody has heard of the unmapping.
        self.anew(&taken, libc::MAP_FIXED_NOREPLACE);
        self.made(
            &taken,
            by,
            "munmap, then mapped anew, bare",
            "munmap, then mapped anew, wrapper",
        )?;
        self.arena
            .give_all(taken, |record| Self::left(record.next(true)));
        Ok(())
    }

    fn anew(&self, taken: &Taken, flag: i32) {
        let _ = Map::at_hint(self.arena.addr(taken.first), taken.len(), READ_WRITE, flag);
    }

    pub(super) fn map_over(&self, taken: Taken) -> Checked {
        self.anew(&taken, libc::MAP_FIXED);
        self.made(&taken, By::Bare, "mmap(FIXED) over", "")?;
        self.arena
            .give_all(taken, |record| Self::left(record.next(true)));
        Ok(())
    }

    fn mremap(
        &self,
        by: By,
        from: usize,
        old: usize,
        new: usize,
        flags: i32,
        to: usize,
    ) -> Result<usize, String> {
        let bare = || {
            // SAFETY: pages that are taken, and room of the caller's.
            let now = unsafe { libc::mremap(at(from).cast(), old, new, flags, at(to)) };
            match now {
                libc::MAP_FAILED => Err(std::io::Error::last_os_error()),
                now => Ok(now.expose_provenance()),
            }
        };
        if by == By::Wrapper {
            // SAFETY: the same.
            return unsafe { svm::mremap(at(from), old, new, flags, at(to)) }
                .map(|now: *mut u8| now.expose_provenance())
                .map_err(|e| e.to_string());
        }
        let outcome = match bare() {
            // While a thread forks it may be two mappings for a moment, as the README says. While none does it is one.
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                self.run.refused.fetch_add(1, Ordering::Relaxed);
                let _nobody_forks = self.run.forks.write();
                bare()
            }
            outcome => outcome,
        };
        outcome.map_err(|e| format!("mremap: {e}"))
    }

    /// What a move makes of a page's reach: where the kernel tells of it, the page has left; where the wrapper alone knows, it may
    /// have been memory like any other at once.
    fn moved(&self, record: Record) -> Record {
        let reach = match record.reach {
            Reach::Mirrored if !self.run.hears_unmapping => Reach::Unknown,
            Reach::Mirrored => Reach::Left,
            reach => reach,
        };
        Record { reach, ..record }
    }

    /// Gives back those of `taken` that lie in another mapping than the first: a move takes one at a time.
    fn of_one_mapping(&self, mut taken: Taken) -> Result<Taken, String> {
        let maps = std::fs::read_to_string("/proc/self/maps").map_err(|e| e.to_string())?;
        let first = self.arena.addr(taken.first);
        let parse = |number: &str| usize::from_str_radix(number, 16).unwrap_or(0);
        let end = maps
            .lines()
            .filter_map(|line| line.split(' ').next()?.split_once('-'))
            .map(|(start, end)| (parse(start), parse(end)))
            .find(|&(start, end)| start <= first && first < end)
            .ok_or("a page that is taken is not mapped")?
            .1;
        let len = taken.len().min((end - first) / PAGE);
        for (n, record) in taken.records.drain(len..).enumerate() {
            self.arena.give(taken.first + len + n, record);
        }
        Ok(taken)
    }

    pub(super) fn move_away_and_back(&self, taken: Taken, by: By, room: usize) -> Checked {
        const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let taken = self.of_one_mapping(taken)?;
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        self.mremap(by, addr, len, len, MOVE, room)?;
        self.look_at_all(&taken, room, &format!("where it was moved to, {by:?}"))?;
        self.mremap(by, room, len, len, MOVE, addr)?;
        self.look_at_all(&taken, addr, "moved back")?;
        self.made(
            &taken,
            by,
            "mremap away and back, bare",
            "mremap away and back, wrapper",
        )?;
        self.write_all(&taken);
        self.arena
            .give_all(taken, |record| self.moved(record.next(false)));
        Ok(())
    }

    /// Away to where there is more room, and back at the old length: the grown part is zeros, and is cut off by the way back.
    pub(super) fn grow_and_shrink(
        &self,
        taken: Taken,
        by: By,
        room: usize,
        rng: &mut Rng,
    ) -> Checked {
        const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let taken = self.of_one_mapping(taken)?;
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        let more = (1 + rng.below(8)) * PAGE;
        self.mremap(by, addr, len, len + more, MOVE, room)?;
        self.look_at_all(
            &taken,
            room,
            &format!("where it was moved to and grew, {by:?}"),
        )?;
        for at in (room + len..room + len + more).step_by(PAGE) {
            let grown = self.arena.word(at).load(Ordering::Relaxed);
            if grown != 0 {
                return Err(format!("what has grown is {grown:#x}, {by:?}"));
            }
            self.arena.word(at).store(7, Ordering::Relaxed);
        }
        self.mremap(by, room, len + more, len, MOVE, addr)?;
        self.look_at_all(&taken, addr, "moved back and cut off")?;
        self.made(
            &taken,
            by,
            "mremap away growing and back shrinking, bare",
            "mremap away growing and back shrinking, wrapper",
        )?;
        self.write_all(&taken);
        self.arena
            .give_all(taken, |record| self.moved(record.next(false)));
        Ok(())
    }

    pub(super) fn move_and_leave(&self, taken: Taken, by: By, room: usize) -> Checked {
        const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP | libc::MREMAP_FIXED;
        let taken = self.of_one_mapping(taken)?;
        let (addr, len) = (self.arena.addr(taken.first), taken.len() * PAGE);
        let there = self.mremap(by, addr, len, len, MOVE, room)?;
        self.look_at_all(
            &taken,
            there,
            &format!("where it was moved to, {by:?}, the old range left"),
        )?;
        for page in taken.pages() {
            let left = self
                .arena
                .word(self.arena.addr(page))
                .load(Ordering::Relaxed);
            if left != 0 {
                return Err(format!(
                    "page {page} is {left:#x} in the range that was left"
                ));
            }
        }
        // SAFETY: nobody uses it any more.
        unsafe { svm::munmap(at(there), len) }.map_err(|e| e.to_string())?;
        self.made(
            &taken,
            by,
            "mremap(DONTUNMAP), bare",
            "mremap(DONTUNMAP), wrapper",
        )?;
        self.write_all(&taken);
        self.arena
            .give_all(taken, |record| self.moved(record.next(false)));
        Ok(())
    }

    pub(super) fn shrink(&self, taken: Taken, by: By, rng: &mut Rng) -> Checked {
        let taken = self.of_one_mapping(taken)?;
        if taken.len() == 1 {
            self.arena.give_all(taken, |record| record);
            return Ok(());
        }
        let (addr, old) = (self.arena.addr(taken.first), taken.len());
        let new = 1 + rng.below(old - 1);
        self.mremap(by, addr, old * PAGE, new * PAGE, 0, 0)?;
        let (mut head, tail) = (taken.records, taken.first + new);
        let tail = Taken {
            first: tail,
            records: head.split_off(new),
        };
        let head = Taken {
            first: taken.first,
            records: head,
        };
        self.anew(&tail, libc::MAP_FIXED_NOREPLACE);
        self.look_at_all(&head, addr, "what was not cut off")?;
        self.made(
            &tail,
            by,
            "mremap shrinking, bare",
            "mremap shrinking, wrapper",
        )?;
        self.write_all(&head);
        self.arena.give_all(head, |record| record.next(false));
        self.arena
            .give_all(tail, |record| Self::left(record.next(true)));
        Ok(())
    }

    pub(super) fn protect(&self, taken: Taken, by: By, prot: i32) -> Checked {
        self.mprotect(&taken, by, prot)?;
        if prot == libc::PROT_READ {
            self.look_at_all(&taken, self.arena.addr(taken.first), "protected")?;
        } else {
            std::thread::yield_now();
        }
        self.run.count(match (prot == libc::PROT_READ, by) {
            (true, By::Bare) => "mprotect(READ), bare",
            (true, By::Wrapper) => "mprotect(READ), wrapper",
            (false, By::Bare) => "mprotect(NONE), bare",
            (false, By::Wrapper) => "mprotect(NONE), wrapper",
        });
        self.mprotect(&taken, by, READ_WRITE)?;
        self.look_at_all(&taken, self.arena.addr(taken.first), "protected no more")?;
        self.write_all(&taken);
        self.arena.give_all(taken, |record| record.next(false));
        Ok(())
    }
}
