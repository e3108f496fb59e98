//! Accesses: [`access`] is what a CPU does: it faults as long as the entry does not allow it. Through a userfaultfd with SIGBUS the
//! handler runs in the thread; otherwise a message is queued and the thread sleeps until it is woken. [`touch`] is what a device
//! does through a translation: there must be a page, for nothing could serve a fault.

use super::{Kernel, Page, Queued, point, sleep_until, thread_id, wake_sleepers, with};
use crate::addr::page_floor;
use crate::sys::event::Event;
use crate::sys::signal::{self, BusFault};
use crate::sys::uffd::Features;

/// The access ends the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Killed {
    /// Nothing is mapped there, or nobody serves the fault.
    Killed,
    /// It never comes back from its handler.
    Parked,
}

/// How often one access may fault: beyond that the thread makes no progress.
const MAX_FAULTS: usize = 400;

enum Tried {
    Done,
    Killed,
    Handle(fn(&BusFault) -> signal::Verdict, signal::Access),
    Wait(u64),
}

/// An access of a CPU at `addr`: `act` is done to the contents of the page at once, when nothing stands in its way any more.
pub(crate) fn access(
    addr: usize,
    write: bool,
    mut act: impl FnMut(&mut Kernel, u64) -> u64,
) -> Result<(), Killed> {
    for _ in 0..MAX_FAULTS {
        point();
        let tried = with(|kernel| kernel.try_access(addr, write, &mut act));
        match tried {
            Tried::Done => return Ok(()),
            Tried::Killed => return Err(Killed::Killed),
            Tried::Handle(handler, access) => {
                point();
                let fault = BusFault {
                    addr,
                    access,
                    pc: 0,
                    sp: 0,
                    late: false,
                };
                match handler(&fault) {
                    signal::Verdict::Resolved => {}
                    signal::Verdict::Park => return Err(Killed::Parked),
                    signal::Verdict::NotOurs => {
                        with(|kernel| kernel.note("not ours", addr, None));
                        return Err(Killed::Killed);
                    }
                }
            }
            Tried::Wait(id) => {
                wake_sleepers();
                let me = thread_id();
                sleep_until(|kernel| {
                    !kernel.unanswered.contains(&id) || kernel.late.contains_key(&me)
                });
                if let (Some(late), Some(handler)) =
                    with(|kernel| (kernel.late.remove(&me), kernel.handler))
                    && handler(&late) == signal::Verdict::Park
                {
                    return Err(Killed::Parked);
                }
            }
        }
    }
    panic!("starved: {MAX_FAULTS} faults of one access at {addr:#x}");
}

impl Kernel {
    fn try_access(
        &mut self,
        addr: usize,
        write: bool,
        act: &mut impl FnMut(&mut Kernel, u64) -> u64,
    ) -> Tried {
        let at = page_floor(addr);
        let Some(mapping) = self.mapping(at).copied() else {
            self.note("SIGSEGV", at, None);
            return Tried::Killed;
        };
        let page = match self.pages.get(&at).copied() {
            Some(page) if page.poisoned => return Tried::Killed,
            None if mapping.registered.is_none() => {
                self.pages.insert(at, Page::default());
                Some(Page::default())
            }
            page => page,
        };
        let kind = match page {
            None if write => signal::Access::WriteMissing,
            None => signal::Access::ReadMissing,
            Some(page) if write && page.protected => signal::Access::WriteProtected,
            Some(page) => {
                let contents = act(self, page.contents);
                let page = self.pages.get_mut(&at).expect("it was there");
                page.contents = contents;
                page.shared &= !write;
                return Tried::Done;
            }
        };
        let Some((id, _)) = mapping.registered else {
            return Tried::Killed;
        };
        let what = match kind {
            signal::Access::WriteMissing => "faults (write, missing)",
            signal::Access::WriteProtected => "faults (write, protected)",
            signal::Access::ReadMissing | signal::Access::Unknown => "faults (read, missing)",
        };
        self.note(what, at, None);
        if self.uffds[id].features.contains(Features::SIGBUS) {
            return self
                .handler
                .map_or(Tried::Killed, |handler| Tried::Handle(handler, kind));
        }
        let message = self.new_id();
        self.unanswered.insert(message);
        let event = Event::PageFault {
            addr,
            write,
            wp: kind == signal::Access::WriteProtected,
            tid: u32::try_from(thread_id()).unwrap_or(0),
        };
        self.uffds[id]
            .faults
            .push_back(Queued { id: message, event });
        Tried::Wait(message)
    }
}

/// An access through a translation: there must be a page. `act` is done to its contents at once.
pub(crate) fn touch(addr: usize, write: bool, act: impl FnOnce(&mut Kernel, u64) -> u64) {
    point();
    with(|kernel| {
        let at = page_floor(addr);
        let Some(page) = kernel.pages.get(&at).copied() else {
            panic!("a translation leads to an empty page at {at:#x}");
        };
        assert!(
            !(write && page.protected),
            "a translation for writing leads to a write-protected page at {at:#x}"
        );
        let contents = act(kernel, page.contents);
        if let Some(page) = kernel.pages.get_mut(&at) {
            page.contents = contents;
        }
    });
}
