//! Children: one that is forked and looks, one that is forked and has a mirror of its own, and one that is spawned.

use std::process::Command;

use svm::{Capability, DeviceFaultKind, Options};

use super::arena::Taken;
use super::work::Work;
use super::{Checked, PAGE};
use crate::TestDevice;
use crate::mapping::Map;

impl Work<'_> {
    /// Runs `child` in a forked child, which says whether all is well.
    fn in_child(&self, which: &str, child: impl FnOnce() -> bool) -> Checked {
        let forking = self.run.forks.read();
        // SAFETY: the child leaves by `_exit`, and the C library keeps malloc usable in it.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: a child that hangs is to be heard of.
            unsafe { libc::alarm(20) };
            let well = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            // SAFETY: ends the child, without what is the parent's to do at its end.
            unsafe { libc::_exit(i32::from(!well.unwrap_or(false))) };
        }
        drop(forking);
        let mut status = 0;
        // SAFETY: waits for the child just made, if there is one.
        let ended = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if pid < 0 || ended != pid || status != 0 {
            return Err(format!(
                "{which}: a forked child found something else: status {status:#x}"
            ));
        }
        Ok(())
    }

    pub(super) fn fork(&self, taken: Taken) -> Checked {
        let addr = self.arena.addr(taken.first);
        self.in_child("looking", || {
            self.look_at_all(&taken, addr, "in the child").is_ok() && {
                self.write_all(&taken);
                true
            }
        })?;
        self.look_at_all(&taken, addr, "in the parent")?;
        self.run.count("forks, the child looking");
        self.arena.give_all(taken, |record| record);
        Ok(())
    }

    pub(super) fn fork_with_a_mirror(&self, taken: Taken) -> Checked {
        let addr = self.arena.addr(taken.first);
        self.in_child("with a mirror", || {
            self.look_at_all(&taken, addr, "in the child").is_ok() && {
                self.write_all(&taken);
                child_of_its_own(self.options)
            }
        })?;
        self.look_at_all(&taken, addr, "in the parent")?;
        self.run
            .count("forks, the child with a mirror and a brk of its own");
        self.arena.give_all(taken, |record| record);
        Ok(())
    }

    pub(super) fn spawn(&self, taken: Taken) -> Checked {
        let mut command = Command::new("true");
        if taken.len().is_multiple_of(2) {
            use std::os::unix::process::CommandExt;
            // SAFETY: does nothing; with it the child is forked, without it spawned like with vfork.
            unsafe { command.pre_exec(|| Ok(())) };
        }
        let forking = self.run.forks.read();
        let child = command.spawn();
        drop(forking);
        let status = child
            .and_then(|mut child| child.wait())
            .map_err(|e| format!("spawn: {e}"))?;
        if !status.success() {
            return Err(format!("a spawned process: {status}"));
        }
        self.look_at_all(
            &taken,
            self.arena.addr(taken.first),
            "after a process was spawned",
        )?;
        self.run.count("processes spawned");
        self.arena.give_all(taken, |record| record);
        Ok(())
    }
}

/// In a forked child: mirrors memory at the end of its heap, has a device write it, and cuts it down by `brk`.
fn child_of_its_own(options: &Options) -> bool {
    const PAGES: usize = 32;
    const KEPT: usize = 12;
    let device = TestDevice::new().expect("the parent could");
    // SAFETY: grows the heap by memory that malloc does not know.
    let old = unsafe { libc::sbrk(0) }.expose_provenance();
    let start = old.next_multiple_of(PAGE);
    let grown = start - old + PAGES * PAGE;
    // SAFETY: the same.
    if unsafe { libc::sbrk(libc::intptr_t::try_from(grown).expect("small")) }.addr() != old {
        // No room behind the heap: nothing to see here.
        return true;
    }
    let map = Map {
        addr: start,
        pages: PAGES,
    };
    (0..PAGES).for_each(|page| map.write(page, page as u64 + 1));
    let mirror = map.mirror(options);
    let view = mirror.view();
    let written = (0..PAGES).all(|page| {
        let word = (page as u64 + 100).to_ne_bytes();
        device
            .write(view.region(), map.addr + page * PAGE, &word)
            .is_ok()
    });
    // SAFETY: nothing is changed.
    if unsafe { libc::sbrk(0) }.addr() != map.addr + PAGES * PAGE {
        // malloc has grown the heap behind it.
        return written && (0..PAGES).all(|page| map.read(page) == page as u64 + 100);
    }
    if !svm::Capabilities::probe().has(Capability::Events) {
        // Nobody would hear of it.
        return written && mirror.close().is_ok();
    }
    let cut = libc::intptr_t::try_from((PAGES - KEPT) * PAGE).expect("small");
    // SAFETY: what is cut off is the test's own.
    if unsafe { libc::sbrk(-cut) }.addr() == usize::MAX {
        return false;
    }
    let gone = (KEPT..PAGES).all(|page| {
        let fault = device.read(view.region(), map.addr + page * PAGE, &mut [0; 8]);
        fault.is_err_and(|e| {
            e.device_fault()
                .is_some_and(|f| f.kind == DeviceFaultKind::Unmapped)
        })
    });
    let kept = (0..KEPT).all(|page| map.read(page) == page as u64 + 100);
    written && kept && gone && mirror.close().is_ok()
}
