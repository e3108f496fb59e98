//! Touches: pages are read and written by the CPU and by devices that have taken them, and read by watchers that have not.

use svm::{DeviceFault, DeviceFaultKind, Ptr};

use super::Checked;
use super::arena::{LAST, Reach, tag};
use super::work::Work;
use crate::rng::Rng;

/// A kernel's lane.
pub(super) struct Device<'a, 'l>(pub(super) &'a accel_sim::Lane<'l>);

impl Device<'_, '_> {
    fn load(&self, addr: usize) -> Result<u64, DeviceFault> {
        self.0.load(Ptr::<u64>::from_addr(addr))
    }

    fn store(&self, addr: usize, word: u64) -> Result<(), DeviceFault> {
        self.0.store(Ptr::<u64>::from_addr(addr), word)
    }
}

impl Work<'_> {
    pub(super) fn use_on_cpu(&self, rng: &mut Rng) -> Checked {
        let Some(taken) = self.arena.take_some(rng, 8) else {
            return Ok(());
        };
        for (page, &record) in taken.pages().zip(&taken.records) {
            self.arena
                .look_at(page, self.arena.addr(page), record, "on the CPU")?;
            self.arena.write(page, record.next(false).word(page));
        }
        self.looked(taken.len());
        self.run
            .count_n("CPU pages checked and written", taken.len() as u64);
        self.arena.give_all(taken, |record| record.next(false));
        Ok(())
    }

    /// Checks a page that was taken, and writes it.
    pub(super) fn use_on_device(
        &self,
        device: &Device<'_, '_>,
        page: usize,
        writes: bool,
    ) -> Checked {
        let Some(record) = self.arena.take(page) else {
            return Ok(());
        };
        let addr = self.arena.addr(page);
        let next = record.next(false);
        let used = (|| {
            let found = [device.load(addr)?, device.load(addr + LAST)?];
            if writes && found == [record.word(page); 2] {
                device.store(addr, next.word(page))?;
                device.store(addr + LAST, next.word(page))?;
            }
            Ok::<_, DeviceFault>(found)
        })();
        match used {
            Ok(found) if found != [record.word(page); 2] => {
                return Err(format!(
                    "page {page} is {found:#x?}, not {:#x}: {record:?}",
                    record.word(page)
                ));
            }
            Ok(_) if record.reach == Reach::Left => {
                return Err(format!(
                    "page {page} was used, which has left the mirror: {record:?}"
                ));
            }
            Ok(_) => {
                self.arena.give(page, if writes { next } else { record });
                self.run.count("device pages checked and written");
            }
            Err(fault) if record.reach == Reach::Mirrored => {
                return Err(format!("page {page}: {fault}: {record:?}"));
            }
            Err(fault) if fault.kind != DeviceFaultKind::Unmapped => {
                return Err(format!("page {page}: {fault}: {record:?}"));
            }
            Err(_) => {
                self.arena.give(page, record);
                self.run.count("typed device faults");
            }
        }
        self.looked(1);
        Ok(())
    }

    /// Reads a page that others may be changing.
    pub(super) fn watch(&self, device: &Device<'_, '_>, page: usize) -> Checked {
        let before = self.arena.record(page);
        let read = device.load(self.arena.addr(page));
        let after = self.arena.record(page);
        let same = before == after && !before.is_taken;
        let oldest = before.generation + u64::from(before.is_zero);
        let newest = after.generation + u64::from(after.is_taken);
        let good = match read {
            Ok(0) => !same || before.is_zero,
            Ok(word) => {
                let generation = word >> 20;
                word == tag(page, generation) && (oldest..=newest).contains(&generation)
            }
            Err(fault) => {
                self.run.count("typed device faults");
                let kind = matches!(
                    fault.kind,
                    DeviceFaultKind::Unmapped | DeviceFaultKind::NoAccess
                );
                kind && (!same || before.reach != Reach::Mirrored)
            }
        };
        self.looked(1);
        self.run.count("device pages watched");
        if good {
            Ok(())
        } else {
            Err(format!(
                "watched page {page}: {read:x?}, from {before:?} to {after:?}"
            ))
        }
    }
}
