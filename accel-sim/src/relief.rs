//! Relief: what becomes of a worker that has lost its thread.
//!
//! A kernel that holds a page past the deadline, after which the page was taken, and then touches it, cannot go on: the memory is
//! not its own any more. It cannot be unwound either, for it is arbitrary code, interrupted at a load or a store. So the
//! runtime parks its thread for ever ([`svm::Overrun::Park`]). In that thread's signal handler the [device](crate::device) has ended
//! what the worker had in flight, noted where it was lost, and rung the bell; everything that takes more than a few stores is
//! for this thread, the *relief*:
//!
//! 1. It ends the lost worker's part in its launch, with the fault: the others stop as after any failure, the last ticket drops
//!    the work, and who waits for the launch is told.
//! 2. It starts another thread in the worker's place, with the same slot, so that the accelerator keeps its strength.
//!
//! # What stays behind
//! The parked thread's stack and all that it owned: the worker's range, cache and buffers, and whatever the kernel had allocated or
//! locked. Nothing of that is ever used or freed; one count of the shared state, which the last owner must be able to
//! drop, is taken from it here.
//!
//! # Why nobody waits for a parked thread
//! Shootdowns look at its slot, which is its successor's. Launches count tickets, and its ticket is given back. The accelerator's end
//! waits until nobody is at work, and a parked thread's place is filled, so it is never joined. Its range and turns are taken
//! only while nothing of the worker's is published, hence not by a thread that is being lost.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::Receiver;

use svm::ThreadHandle;

use crate::launch::Launch;
use crate::worker::Shared;

/// The thread. It ends with [`Relief::end`].
#[derive(Debug)]
pub(crate) struct Relief {
    shared: Arc<Shared>,
    dismissed: Arc<AtomicBool>,
    thread: ThreadHandle,
}

impl Relief {
    /// Starts it.
    pub(crate) fn start(shared: &Arc<Shared>, queue: Receiver<Arc<Launch>>) -> io::Result<Relief> {
        let dismissed = Arc::new(AtomicBool::new(false));
        let (crew, over) = (shared.clone(), dismissed.clone());
        let thread = svm::spawn_thread("accel-relief", move || stand_by(&crew, &over, &queue))?;
        Ok(Relief {
            shared: shared.clone(),
            dismissed,
            thread,
        })
    }

    /// Waits until nobody is at work any more, the accelerator having hung up, and ends it.
    pub(crate) fn end(self) {
        self.shared.join();
        // Release: the wait that it ends has an order of its own.
        self.dismissed.store(true, Ordering::Release);
        self.shared.attachment.device().ring();
        // What a kernel captured may panic when it is dropped; that is caught where it is dropped.
        self.thread.join();
    }
}

fn stand_by(shared: &Arc<Shared>, dismissed: &AtomicBool, queue: &Receiver<Arc<Launch>>) {
    // It drops the work of launches, as workers do.
    let _signals = svm::worker_thread();
    shared.mark_current();
    let device = shared.attachment.device();
    while let Some((i, fault)) = device.wait_for_loss(|| dismissed.load(Ordering::Acquire)) {
        // SAFETY: the count is the lost worker's own. Its thread never runs again, so it neither uses the state nor gives the
        // count back; and ours keeps the state alive here.
        unsafe { Arc::decrement_strong_count(Arc::as_ptr(shared)) };
        // First, for who waits for the launch need not wait for a thread that the system will not give.
        if let Some(launch) = shared.take_task(i) {
            launch.give_up_part(fault);
        }
        while shared.enlist_successor(i, queue).is_err() {
            // No thread, or no memory, now: there will be.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
