//! The reader of a userfaultfd: one thread per door.
//!
//! Through the thread door it serves faults as [`crate::fault`] says; through both it reads the events of changed mappings
//! and hands them to [`crate::events`]. It reads one message at a time, with the gate closed: for an event that is the
//! rule (hazards G1, G5), and which of the two a message is shows only when it has been read.
//!
//! It never waits for one fault: what has to wait, for an access in flight, a lease or a passing `EAGAIN`, is put aside and
//! looked at again, so that a worker whose own read fault would let it finish is not stuck behind a write fault that waits
//! for that worker (hazards W1).
//!
//! Where it runs matters more than what it does: see [`crate::near`].

use std::cell::Cell;
use std::collections::VecDeque;
use std::time::Duration;

use crate::addr::PAGE_SIZE;
use crate::addr::page_floor;
use crate::error::{Access, Error, ErrorKind, Result};
use crate::events::{self, PendingList};
use crate::fault::{self, Attempt, CpuFault, First, Pending, Verdict};
use crate::near::{self, Near};
use crate::options::Delivery;
use crate::overrun;
use crate::space::{AddressSpace, Door};
use crate::sync::mutation::{Mutation, mutated};
use crate::sys::clock;
use crate::sys::event::{Event, EventBuffer};
use crate::sys::process;
use crate::sys::signal::{self, AsyncSignalsBlocked};
use crate::sys::thread;

/// Faults that can be put aside. It is more than there are threads to fault, as a rule; what comes beyond it is sent back to fault
/// anew. The monitor never stops reading: what the faults aside wait for may be an event, and faults are read before events.
const ASIDE: usize = 4096;

/// A fault put aside.
enum Aside {
    Retry(CpuFault, u64),
    Pending(CpuFault, Pending),
}

/// Starts the monitor of a door that needs one.
pub(crate) fn spawn(
    operation: &'static str,
    space: &'static AddressSpace,
    door: &'static Door,
) -> Result<()> {
    if door.delivery() != Delivery::Thread && !door.has_events() {
        return Ok(());
    }
    let failed = |e: std::io::Error| {
        Error::new(operation, ErrorKind::System).errno(e.raw_os_error().unwrap_or(0))
    };
    // Room for all that can be outstanding: the reader does not call malloc while somebody waits for it.
    let aside = VecDeque::with_capacity(ASIDE);
    let pending = PendingList::new().map_err(failed)?;
    let name = match door.delivery() {
        Delivery::Thread => "svm-monitor",
        Delivery::Inline => "svm-events",
    };
    thread::spawn(name, move || {
        // The monitor holds runtime locks all the time: no asynchronous handler may ever run on it.
        let _signals = AsyncSignalsBlocked::new();
        let _bomb = AbortOnEnd;
        Reader {
            space,
            door,
            aside,
            pending,
            near: Near::default(),
        }
        .run();
    })
    .map(drop)
    .map_err(failed)
}

/// If the monitor dies, every thread that faults would wait for ever: better a loud end (design rule 2).
struct AbortOnEnd;

impl Drop for AbortOnEnd {
    fn drop(&mut self) {
        process::abort_with_message(format_args!(
            "the fault monitor died; pages that are away cannot come home"
        ));
    }
}

struct Reader {
    space: &'static AddressSpace,
    door: &'static Door,
    /// In the order in which they are looked at again: every one of them, in each round.
    aside: VecDeque<Aside>,
    pending: PendingList,
    near: Near,
}

impl Reader {
    fn run(mut self) {
        let mut message = EventBuffer::<1>::new();
        let doorbell = self.door.doorbell();
        loop {
            let timeout = self.timeout();
            let ready = self.door.uffd().poll(doorbell, timeout);
            if ready.doorbell {
                doorbell.silence();
            } else if !ready.message && timeout == Some(near::IDLE) {
                self.near.idle();
            }
            if ready.broken {
                return;
            }
            if ready.message {
                self.read_one(&mut message);
            }
            self.look_again();
            if !self.aside.is_empty() {
                process::sched_yield();
            }
        }
    }

    /// How long to wait for a message: not at all while faults are aside, a moment while ranges are pending, and no longer than it
    /// makes sense to stay beside a thread.
    fn timeout(&self) -> Option<Duration> {
        if !self.aside.is_empty() {
            Some(Duration::ZERO)
        } else if !self.pending.is_empty() {
            Some(Duration::from_millis(1))
        } else if self.near.is_near() {
            Some(near::IDLE)
        } else {
            None
        }
    }

    fn read_one(&mut self, message: &mut EventBuffer<1>) {
        let closed = self.space.gate().close();
        events::pause(self.space, self.door, &closed);
        let event = message
            .fill(self.door.uffd())
            .ok()
            .and_then(|_| message.next());
        if let Some(event) = &event {
            events::apply(self.space, &closed, event, &mut self.pending);
        }
        events::resume(self.space, self.door, &closed);
        drop(closed);
        if let Some(Event::PageFault {
            addr,
            write,
            wp,
            tid,
        }) = event
        {
            let access = if write { Access::Write } else { Access::Read };
            let fault = CpuFault {
                addr,
                access: Some(access),
                protection: Some(wp),
                thread: tid as usize,
                door: Some(self.door),
                kept_since_ns: Cell::new(0),
            };
            let thread = fault.thread;
            let attempt = fault::begin(self.space, &fault, First::Yes);
            self.settle(fault, attempt);
            self.near.note(thread);
        }
    }

    /// Looks at everything that was put aside once more.
    fn look_again(&mut self) {
        let space = self.space;
        if !self.pending.is_empty() {
            self.pending
                .poll(space, self.door.is_changing(space.zeros()));
        }
        for _ in 0..self.aside.len() {
            // From the front, and back to the end: each is seen once, whatever becomes of the others.
            let Some(next) = self.aside.pop_front() else {
                return;
            };
            match next {
                Aside::Retry(fault, at_ns) if clock::monotonic_ns() < at_ns => {
                    self.aside.push_back(Aside::Retry(fault, at_ns));
                }
                Aside::Retry(fault, _) => {
                    let attempt = fault::begin(space, &fault, First::No);
                    self.settle(fault, attempt);
                }
                Aside::Pending(fault, pending) if !pending.is_ready(space) => {
                    self.aside.push_back(Aside::Pending(fault, pending));
                }
                Aside::Pending(fault, pending) => {
                    let attempt = pending.finish(space, &fault);
                    self.settle(fault, attempt);
                }
            }
        }
    }

    fn settle(&mut self, fault: CpuFault, attempt: Attempt) {
        let door = self.door;
        let page = page_floor(fault.addr);
        match attempt {
            Attempt::Done(Verdict::Woken) => {}
            // What found nothing to do has woken nobody.
            Attempt::Done(Verdict::Resolved) => door.wake(page, PAGE_SIZE),
            Attempt::Done(Verdict::NotOurs) => self.refuse(&fault),
            Attempt::Done(Verdict::Window) => self.settle_window(fault),
            Attempt::Again => self.put_aside(page, Aside::Retry(fault, 0)),
            Attempt::WaitUntil(ns) => self.put_aside(page, Aside::Retry(fault, ns)),
            Attempt::Pending(_) if mutated(Mutation::MonitorForgetsFault) => {}
            Attempt::Pending(pending) => self.put_aside(page, Aside::Pending(fault, pending)),
        }
    }

    /// An access to an empty or protected page of a window.
    fn settle_window(&mut self, fault: CpuFault) {
        let space = self.space;
        let lifted =
            overrun::lift_protection(space, &space.gate().enter(), fault.addr, fault.access);
        match lifted {
            Some(true) => {}
            None => self.put_aside(page_floor(fault.addr), Aside::Retry(fault, 0)),
            Some(false) => {
                let write = fault.access == Some(Access::Write);
                if signal::send_late(fault.thread, fault.addr, write).is_err() {
                    self.refuse(&fault);
                }
            }
        }
    }

    /// Nobody can serve the access: it must fail loudly rather than wait for ever.
    fn refuse(&self, fault: &CpuFault) {
        let (space, door, page) = (self.space, self.door, page_floor(fault.addr));
        if door.poison(page) {
            return;
        }
        // Populated by somebody meanwhile, or not registered any more: then the access, tried again, does not come here again. If it
        // does, only poison would end that.
        let again = space.has_missed_before(&space.gate().enter(), fault.addr, fault.thread);
        if again && !door.can_poison() && !space.is_populated(page) {
            process::abort_with_message(format_args!(
                "an access to {:#x} cannot be served: no page can be brought there",
                fault.addr
            ));
        }
        door.wake(page, PAGE_SIZE);
    }

    fn put_aside(&mut self, page: usize, what: Aside) {
        // Not beyond its capacity: growing would allocate while somebody waits.
        if self.aside.len() < ASIDE {
            self.aside.push_back(what);
        } else {
            self.door.wake(page, PAGE_SIZE);
        }
    }
}
