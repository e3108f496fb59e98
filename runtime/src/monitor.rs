//! The thread door: a monitor thread reads faults from the userfaultfd and resolves them.
//!
//! The monitor never waits for one fault: what has to wait, for an access in flight, a lease or a passing `EAGAIN`, is put
//! aside and looked at again, so that a worker whose own read fault would let it finish is not stuck behind a write fault
//! that waits for that worker (hazards W1).

use std::time::Duration;

use crate::error::{Access, Error, ErrorKind, Result};
use crate::fault::{self, Attempt, CpuFault, First, Pending, Verdict};
use crate::addr::page_floor;
use crate::addr::PAGE_SIZE;
use crate::options::Delivery;
use crate::space::{AddressSpace, Door};
use crate::sys::process;
use crate::sys::signal::AsyncSignalsBlocked;
use crate::sys::uffd::{Doorbell, Event, EventBuffer, Wake};
use crate::sys::clock;

/// Faults that can be put aside; when all are, the monitor waits for one of them before it reads on.
const ASIDE: usize = 256;

/// A fault put aside.
enum Aside {
    Retry(CpuFault, u64),
    Pending(CpuFault, Pending),
}

/// Starts the monitor of a door that needs one.
pub(crate) fn spawn(operation: &'static str, space: &'static AddressSpace, door: &'static Door) -> Result<()> {
    if door.delivery() != Delivery::Thread {
        return Ok(());
    }
    let failed = |e: std::io::Error| Error::new(operation, ErrorKind::System).errno(e.raw_os_error().unwrap_or(0));
    let doorbell = Doorbell::new().map_err(failed)?;
    let mut aside = Vec::with_capacity(ASIDE);
    std::thread::Builder::new()
        .name("svm-monitor".into())
        .spawn(move || {
            // The monitor holds runtime locks all the time: no asynchronous handler may ever run on it.
            let _signals = AsyncSignalsBlocked::new();
            let _bomb = AbortOnUnwind;
            run(space, door, &doorbell, &mut aside)
        })
        .map(drop)
        .map_err(failed)
}

/// If the monitor dies, every thread that faults would wait for ever: better a loud end (design rule 2).
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        process::abort_with_message(format_args!("svm: the fault monitor died; pages that are away cannot come home"));
    }
}

fn run(space: &'static AddressSpace, door: &'static Door, doorbell: &Doorbell, aside: &mut Vec<Aside>) {
    let mut messages = EventBuffer::<16>::new();
    loop {
        let timeout = (!aside.is_empty()).then_some(Duration::ZERO);
        let ready = door.uffd().poll(doorbell, timeout);
        if ready.broken {
            return;
        }
        if ready.message && aside.len() + 16 <= ASIDE && messages.fill(door.uffd()).is_ok() {
            for event in messages.by_ref() {
                if let Event::PageFault { addr, write, wp, tid } = event {
                    let access = if write { Access::Write } else { Access::Read };
                    let fault = CpuFault { addr, access: Some(access), protection: Some(wp), thread: tid as usize };
                    let attempt = fault::begin(space, &fault, First::Yes);
                    settle(door, fault, attempt, aside);
                }
            }
        }
        for _ in 0..aside.len() {
            match aside.swap_remove(0) {
                Aside::Retry(fault, at_ns) if clock::monotonic_ns() < at_ns => aside.push(Aside::Retry(fault, at_ns)),
                Aside::Retry(fault, _) => {
                    let attempt = fault::begin(space, &fault, First::No);
                    settle(door, fault, attempt, aside);
                }
                Aside::Pending(fault, pending) if !pending.is_ready(space) => aside.push(Aside::Pending(fault, pending)),
                Aside::Pending(fault, pending) => {
                    let attempt = pending.finish(space, &fault);
                    settle(door, fault, attempt, aside);
                }
            }
        }
        if !aside.is_empty() {
            process::sched_yield();
        }
    }
}

fn settle(door: &Door, fault: CpuFault, attempt: Attempt, aside: &mut Vec<Aside>) {
    let page = page_floor(fault.addr);
    match attempt {
        // Most resolutions have woken the thread already; the one that found nothing to do has not.
        Attempt::Done(Verdict::Resolved) => door.wake(page, PAGE_SIZE),
        // Nobody can serve it: an access to it must fail loudly rather than wait for ever.
        Attempt::Done(Verdict::NotOurs | Verdict::Window) => {
            if let Some(range) = crate::addr::PageRange::containing(page, 1) {
                // SAFETY: a fault is read from the descriptor that its page is registered with.
                let poisoned = unsafe { door.uffd().poison(range, Wake::Yes) };
                if !poisoned.is_complete() {
                    door.wake(page, PAGE_SIZE);
                }
            }
        }
        Attempt::Again => aside.push(Aside::Retry(fault, 0)),
        Attempt::WaitUntil(ns) => aside.push(Aside::Retry(fault, ns)),
        Attempt::Pending(pending) => aside.push(Aside::Pending(fault, pending)),
    }
}
