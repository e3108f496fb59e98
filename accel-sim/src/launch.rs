//! A launch: work items, taken by whichever worker is free.
//!
//! # Life of a launch
//!
//! 1. The launching thread resolves the views, begins the use of their regions (which copies edges into the windows), and
//!    puts the launch in the queue once per worker that can take part: its *tickets*.
//! 2. A worker that draws a ticket takes items by a shared counter until there are none left, or the launch is stopping.
//! 3. An item that fails or panics records the first failure and stops the launch: other workers end with the item they are
//!    in, and their next far fault or cache miss in it fails.
//!    A worker whose thread is parked (see [`relief`](crate::relief)) fails likewise; its ticket is given back for it.
//! 4. The worker that gives back the last ticket drops the work (the kernel's captures, and the region uses, which writes
//!    the edges back), and only then reports the launch as done. Who waited may therefore end the borrows at once.
//!
//! # Why borrows may be erased
//!
//! The work of a launch borrows the caller's data and is kept in the queue as if it were `'static`. Nobody touches it after
//! step 4, and each way to launch waits for that before its borrows end, also when unwinding: `run` before it
//! returns, a scope before it returns. A detached launch borrows nothing. (In a forked child nobody waits: no worker is there, and
//! a launch that was not over at the fork never touches or drops its work.) On a parked thread's stack references to it live on,
//! to the work, to what it has borrowed and to spans; but that thread never executes another instruction of it. (What threads of the
//! kernel's own may do with them is in the contract of [`Options::span_deadline`](crate::Options::span_deadline).)

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use svm::{DeviceFault, RegionRef, UseGuard};

use crate::device::Sim;
use crate::error::Error;
use crate::lane::access_of;
use crate::shootdown::Rights;
use crate::space::{Sharing, Space};
use crate::view::ViewSet;
use crate::worker::{Shared, Worker};

/// Why an item ended its launch.
#[derive(Debug)]
pub(crate) enum Failure {
    Fault(DeviceFault),
    Panicked(String),
    Runtime(svm::Error),
}

impl From<DeviceFault> for Failure {
    fn from(fault: DeviceFault) -> Failure {
        Failure::Fault(fault)
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        match failure {
            Failure::Fault(fault) => Error::Fault(fault),
            Failure::Panicked(message) => Error::KernelPanicked(message),
            Failure::Runtime(error) => Error::Runtime(error),
        }
    }
}

/// Runs a kernel's code, and makes a failure of its panic.
pub(crate) fn catch<R>(kernel: impl FnOnce() -> R) -> Result<R, Failure> {
    catch_unwind(AssertUnwindSafe(kernel)).map_err(|payload| {
        let failure = Failure::Panicked(message(&*payload));
        // A payload may panic when it is dropped, and what it panics with as well.
        if let Err(again) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
            std::mem::forget(again);
        }
        failure
    })
}

fn message(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "(a panic without a message)".to_owned()
    }
}

/// The items of a launch.
pub(crate) trait Work: Send + Sync {
    fn nr_items(&self) -> usize;

    /// Works on item `i`; called once for each.
    fn item(&self, worker: &Worker, launch: &Launch, i: usize) -> Result<(), Failure>;

    /// Ends the use of the regions: writes their edges back.
    fn finish(self: Box<Self>) -> Result<(), svm::Error>;
}

/// A launch in the queue.
pub(crate) struct Launch {
    id: u64,
    /// Taken out and dropped by the worker that gives back the last ticket; read by ticket holders before that.
    work: UnsafeCell<Option<Box<dyn Work>>>,
    nr_items: usize,
    next: AtomicUsize,
    stopping: AtomicBool,
    state: Mutex<State>,
    done: Condvar,
    /// The process whose workers work on it.
    process: u32,
}

#[derive(Debug)]
struct State {
    tickets: usize,
    failure: Option<Failure>,
}

// SAFETY: `work` is the one field that is not Sync by itself. Ticket holders share it (`Work` is Sync); it is taken out (`Work`
// is Send) by the one who gave back the last ticket, which the state's lock orders after all the others' use.
unsafe impl Sync for Launch {}
// SAFETY: all fields are Send.
unsafe impl Send for Launch {}

impl fmt::Debug for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launch")
            .field("id", &self.id)
            .field("nr_items", &self.nr_items)
            .finish_non_exhaustive()
    }
}

impl Launch {
    /// A launch with as many tickets as workers of `process`, this one, can be of use.
    ///
    /// # Safety
    ///
    /// What `work` borrows outlives the launch: the caller [waits](Launch::wait) before `'a` ends, on every path.
    pub(crate) unsafe fn new<'a>(
        work: Box<dyn Work + 'a>,
        nr_workers: usize,
        process: u32,
    ) -> Launch {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let nr_items = work.nr_items();
        let tickets = nr_items.min(nr_workers);
        // SAFETY: the types differ in a lifetime only, and by contract the work is dropped before that ends.
        let work =
            unsafe { std::mem::transmute::<Box<dyn Work + 'a>, Box<dyn Work + 'static>>(work) };
        Launch {
            // Relaxed: only uniqueness matters.
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            work: UnsafeCell::new((tickets > 0).then_some(work)),
            nr_items,
            next: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            state: Mutex::new(State {
                tickets,
                failure: None,
            }),
            done: Condvar::new(),
            process,
        }
    }

    /// A number that no other launch has.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// How often it is to be put in the queue.
    pub(crate) fn tickets(&self) -> usize {
        self.state().tickets
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the launch ends early.
    #[inline]
    pub(crate) fn is_stopping(&self) -> bool {
        // Relaxed: it hurries others along and orders nothing.
        self.stopping.load(Ordering::Relaxed)
    }

    /// One ticket's part of the work.
    pub(crate) fn take_part(&self, worker: &Worker) {
        {
            // SAFETY: this worker holds a ticket, so nobody takes the work out, and all others share it as well.
            let work = unsafe { &*self.work.get() };
            let work = work
                .as_deref()
                .expect("the work is there while tickets are out");
            while !self.is_stopping() {
                // Relaxed: each index goes to one worker, and what the items touch was published with the queue.
                let i = self.next.fetch_add(1, Ordering::Relaxed);
                if i >= self.nr_items {
                    break;
                }
                let done = work.item(worker, self, i);
                worker.counters().item();
                if let Err(failure) = done {
                    self.fail(failure);
                }
            }
        }
        worker.park();
        self.return_ticket();
    }

    /// Records why the launch ends, unless something has ended it before, and stops it.
    fn fail(&self, failure: Failure) {
        // The failure first: what others come to because the launch is stopping is not its cause.
        self.state().failure.get_or_insert(failure);
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Gives back the ticket of a worker whose thread was parked in an item, which it will never end.
    pub(crate) fn give_up_part(&self, fault: DeviceFault) {
        self.fail(Failure::Fault(fault));
        self.return_ticket();
    }

    fn return_ticket(&self) {
        {
            let mut state = self.state();
            if state.tickets > 1 {
                state.tickets -= 1;
                return;
            }
        }
        // The last ticket is ours, so nobody else is in the work, and it is not yet reported as done.
        // SAFETY: the others gave their tickets back, under the lock, and touch the work no more.
        let work = unsafe { &mut *self.work.get() }.take();
        // What a kernel captured may panic when it is dropped; the launch ends all the same.
        let finished =
            catch(|| work.map_or(Ok(()), |work| work.finish().map_err(Failure::Runtime)));
        let mut state = self.state();
        if let Err(failure) = finished.and_then(|finished| finished) {
            state.failure.get_or_insert(failure);
        }
        state.tickets = 0;
        // Unlocked first: who is woken wants the lock.
        drop(state);
        self.done.notify_all();
    }

    /// Whether this is a forked child: nobody here works on it or ever will, and the state may be locked by a worker in the parent.
    /// What it borrows is therefore free; the work itself is never dropped here.
    fn is_inherited(&self) -> bool {
        self.process != std::process::id()
    }

    /// Whether the work is over and dropped, or not of this process: there is nothing to wait for.
    pub(crate) fn is_done(&self) -> bool {
        self.is_inherited() || self.state().tickets == 0
    }

    /// Waits until the work is over and dropped. The first call after that gets the failure, if there was one.
    pub(crate) fn wait(&self) -> Result<(), Error> {
        if self.is_inherited() {
            return Err(Error::Forked);
        }
        let mut state = self.state();
        while state.tickets > 0 {
            state = self
                .done
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state
            .failure
            .take()
            .map_or(Ok(()), |failure| Err(failure.into()))
    }
}

/// A view of a launch, without its type and its borrow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    pub(crate) addr: usize,
    pub(crate) len: usize,
    pub(crate) size: usize,
    pub(crate) len_bytes: usize,
    pub(crate) rights: Rights,
    /// Index of its region among the launch's.
    pub(crate) space: usize,
}

/// The views of a launch, their regions mapped and in use.
pub(crate) struct Operands {
    /// `None` for an argument that is no view.
    pub(crate) views: Vec<Option<Operand>>,
    pub(crate) spaces: Vec<Space>,
    /// Pages that a far fault brings at least, of the region with the largest.
    pub(crate) granule_pages: usize,
    /// The edges' copies. Ended with the work; dropped, where the launch never began.
    uses: Vec<UseGuard<Sim>>,
}

impl Operands {
    /// Maps the regions of `views` and begins their use.
    pub(crate) fn new<V: ViewSet>(shared: &Shared, set: &V) -> Result<Operands, Error> {
        let mut views = Vec::new();
        let mut spaces: Vec<Space> = Vec::new();
        let mut uses = Vec::new();
        let mut granule_pages = 1;
        let mut result = Ok(());
        let mut add =
            |region: RegionRef<'_>, rights: Rights, sharing: Sharing| -> Result<usize, Error> {
                let mapped = shared.attachment.map(region)?;
                // Shared views use the edges in place: there are no copies to write back.
                let written = if sharing == Sharing::Shared {
                    Rights::Read
                } else {
                    rights
                };
                // SAFETY: the views are borrowed, and so is what they are of, until the work is dropped, and the guard with it.
                uses.push(unsafe { mapped.begin_use(access_of(written)) }?);
                granule_pages = granule_pages.max(region.granule_pages());
                let known = spaces.iter().position(|s| {
                    s.mapped().region().id() == region.id() && s.sharing() == sharing
                });
                Ok(known.unwrap_or_else(|| {
                    spaces.push(Space::new(mapped, region, sharing));
                    spaces.len() - 1
                }))
            };
        set.for_each(&mut |view| {
            let Some(view) = view else {
                return views.push(None);
            };
            match add(view.region, view.rights, view.sharing) {
                Ok(space) => views.push(Some(Operand {
                    addr: view.addr,
                    len: view.len,
                    size: view.size,
                    len_bytes: view.len * view.size,
                    rights: view.rights,
                    space,
                })),
                Err(error) => result = Err(error),
            }
        });
        result?;
        Ok(Operands {
            views,
            spaces,
            granule_pages,
            uses,
        })
    }

    /// The region of a view.
    pub(crate) fn space(&self, operand: &Operand) -> &Space {
        &self.spaces[operand.space]
    }

    /// Ends the use of the regions.
    pub(crate) fn finish(self) -> Result<(), svm::Error> {
        self.uses
            .into_iter()
            .map(UseGuard::finish)
            .fold(Ok(()), Result::and)
    }
}
