//! Registration, and what a userfaultfd tells: page faults, which are read first, and events.
//!
//! From the posting of an event until the caller has run again after the read, every call that fills says EAGAIN.

use super::{Kernel, Queued, Userfaultfd, point, sleep_until, wake_sleepers, with};
use crate::addr::PageRange;
use crate::sys::event::{Event, Ready};
use crate::sys::uffd::{Features, Mode};
use std::time::Duration;

pub(crate) fn register(id: usize, range: PageRange, mode: Mode) -> Result<(), i32> {
    point();
    with(|kernel| {
        let inside = kernel.split(range);
        let covered: usize = inside
            .iter()
            .map(|&at| kernel.mappings[at].range.len_bytes())
            .sum();
        if covered == 0 {
            return Err(libc::EINVAL);
        }
        let taken = |&at: &usize| {
            kernel.mappings[at]
                .registered
                .is_some_and(|(of, _)| of != id)
        };
        if inside.iter().any(taken) {
            return Err(libc::EBUSY);
        }
        for at in inside {
            kernel.mappings[at].registered = Some((id, mode));
        }
        kernel.note("REGISTER", range.start(), None);
        Ok(())
    })
}

pub(crate) fn unregister(id: usize, range: PageRange) -> Result<(), i32> {
    point();
    with(|kernel| {
        for at in kernel.split(range) {
            if kernel.mappings[at]
                .registered
                .is_some_and(|(of, _)| of == id)
            {
                kernel.mappings[at].registered = None;
            }
        }
        for addr in kernel.populated(range) {
            if let Some(page) = kernel.pages.get_mut(&addr) {
                page.protected = false;
            }
        }
        kernel.note("UNREGISTER", range.start(), None);
    });
    wake(id, range);
    Ok(())
}

pub(crate) fn wake(id: usize, range: PageRange) {
    with(|kernel| {
        let Kernel {
            uffds, unanswered, ..
        } = kernel;
        let uffd = &mut uffds[id];
        uffd.faults.retain(|fault| {
            let woken =
                matches!(fault.event, Event::PageFault { addr, .. } if range.contains_addr(addr));
            if woken {
                unanswered.remove(&fault.id);
            }
            !woken
        });
        uffd.asleep.retain(|&(id, addr)| {
            let woken = range.contains_addr(addr);
            if woken {
                unanswered.remove(&id);
            }
            !woken
        });
    });
    wake_sleepers();
}

pub(crate) fn has_message(id: usize) -> bool {
    point();
    with(|kernel| kernel.uffds[id].has_message())
}

impl Userfaultfd {
    fn has_message(&self) -> bool {
        !self.faults.is_empty() || !self.events.is_empty()
    }
}

pub(crate) fn poll(id: usize, timeout: Option<Duration>) -> Ready {
    if timeout.is_some() {
        std::time::pass(Duration::from_micros(20));
        std::thread::yield_now();
    } else {
        sleep_until(|kernel| kernel.over || kernel.uffds[id].has_message());
    }
    with(|kernel| Ready {
        message: kernel.uffds[id].has_message(),
        doorbell: false,
        broken: kernel.over,
    })
}

/// Reads one message: page faults before events.
pub(crate) fn read_message(id: usize) -> Option<Event> {
    point();
    let event = with(|kernel| {
        let uffd = &mut kernel.uffds[id];
        let event = if let Some(fault) = uffd.faults.pop_front() {
            if let Event::PageFault { addr, .. } = fault.event {
                uffd.asleep.push((fault.id, addr));
            }
            fault.event
        } else {
            let event = uffd.events.pop_front()?;
            kernel.unanswered.remove(&event.id);
            event.event
        };
        let (what, at) = match event {
            Event::PageFault { addr, .. } => ("reads fault", addr),
            Event::Remove(range) => ("reads REMOVE", range.start()),
            Event::Unmap(range) => ("reads UNMAP", range.start()),
            Event::Remap { from, .. } => ("reads REMAP", from),
            Event::Fork(()) | Event::Unknown(_) => ("reads", 0),
        };
        kernel.note(what, at, None);
        Some(event)
    });
    wake_sleepers();
    event
}

/// Sleeps until the messages `ids` have been read.
fn wait_read(ids: &[u64]) {
    wake_sleepers();
    sleep_until(|kernel| ids.iter().all(|id| !kernel.unanswered.contains(id)));
    point();
}

impl Kernel {
    /// Posts an event to each userfaultfd that asked for it and has something registered in `range`; its part of the range goes with it.
    pub(super) fn post(
        &mut self,
        range: PageRange,
        feature: Features,
        event: impl Fn(PageRange) -> Event,
    ) -> Vec<(usize, u64)> {
        let mut posted = Vec::new();
        for at in 0..self.mappings.len() {
            let mapping = self.mappings[at];
            let (Some((id, _)), Some(part)) = (mapping.registered, mapping.range.intersect(range))
            else {
                continue;
            };
            if self.uffds[id].features.contains(feature) {
                posted.push((id, self.post_to(id, event(part))));
            }
        }
        posted
    }

    pub(super) fn post_to(&mut self, id: usize, event: Event) -> u64 {
        let message = self.new_id();
        self.unanswered.insert(message);
        self.uffds[id].changing += 1;
        self.uffds[id]
            .events
            .push_back(Queued { id: message, event });
        message
    }

    fn ran_again(&mut self, posted: &[(usize, u64)]) {
        for &(id, _) in posted {
            self.uffds[id].changing -= 1;
        }
    }
}

pub(super) fn wait_for_reader(posted: &[(usize, u64)]) {
    // One after the other, each ends when its sender has run.
    for &(id, message) in posted {
        wait_read(&[message]);
        with(|kernel| kernel.ran_again(&[(id, message)]));
    }
}
