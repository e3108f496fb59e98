//! A worker: one thread of the device.
//!
//! It takes launches from the queue and works on their items until none is left. What it publishes, caches and faults with is
//! its own (but for its thread, which it can lose: see [`relief`](crate::relief)); the far faults of one block take turns, so that pages one worker fetches are not fetched by the next one too.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::Receiver;
use svm::addr::{BLOCK_SIZE, PAGES_PER_BLOCK};
use svm::{Attachment, DeviceFault, ThreadHandle};

use crate::cache::Cache;
use crate::device::Sim;
use crate::error::Error;
use crate::lane::access_of;
use crate::launch::Launch;
use crate::shootdown::{Generation, Rights, Slot};
use crate::space::Space;
use crate::span::Bounce;
use crate::stats::Counters;
use crate::sync::{AtomicU64, Ordering};

/// Locks that far faults take turns on; two blocks that share one only wait a little longer.
const NR_TURNS: usize = 64;

/// What the workers and their accelerator share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) attachment: Attachment<Sim>,
    pub(crate) counters: Box<[Counters]>,
    pub(crate) fault_timeout: Duration,
    cache_entries: usize,
    /// What each worker works on.
    tasks: Box<[Mutex<Option<Arc<Launch>>>]>,
    crew: Mutex<Crew>,
    /// Nobody works any more.
    off: Condvar,
    turns: [Mutex<()>; NR_TURNS],
}

impl Shared {
    pub(crate) fn new(
        attachment: Attachment<Sim>,
        nr_workers: usize,
        fault_timeout: Duration,
        cache_entries: usize,
    ) -> Shared {
        Shared {
            attachment,
            counters: (0..nr_workers).map(|_| Counters::default()).collect(),
            fault_timeout,
            cache_entries,
            tasks: (0..nr_workers).map(|_| Mutex::default()).collect(),
            crew: Mutex::default(),
            off: Condvar::new(),
            turns: std::array::from_fn(|_| Mutex::new(())),
        }
    }

    /// A number for this accelerator, as long as it lives.
    fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Whether the calling thread is one of its workers.
    pub(crate) fn is_current(&self) -> bool {
        WORKER_OF.get() == self.id()
    }

    /// Makes the calling thread one of its own.
    pub(crate) fn mark_current(&self) {
        WORKER_OF.set(self.id());
    }

    fn crew(&self) -> MutexGuard<'_, Crew> {
        self.crew.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts worker `i`.
    pub(crate) fn enlist(
        self: &Arc<Shared>,
        i: usize,
        queue: &Receiver<Arc<Launch>>,
    ) -> Result<(), Error> {
        self.crew().at_work += 1;
        self.start(i, queue).inspect_err(|_| self.one_is_off())
    }

    /// Starts worker `i` anew, whose thread was lost and counts as at work until now.
    pub(crate) fn enlist_successor(
        self: &Arc<Shared>,
        i: usize,
        queue: &Receiver<Arc<Launch>>,
    ) -> Result<(), Error> {
        self.start(i, queue)
    }

    fn start(self: &Arc<Shared>, i: usize, queue: &Receiver<Arc<Launch>>) -> Result<(), Error> {
        let range = self.attachment.range()?;
        let (shared, queue) = (self.clone(), queue.clone());
        // Held over the start: a thread that is lost at once is not replaced before it is known.
        let mut crew = self.crew();
        // The worker's own cells never leave its thread.
        let work = move || Worker::new(i, shared, range).run(&queue);
        let thread = svm::spawn_thread(&format!("accel-{i}"), work).map_err(Error::Thread)?;
        if crew.threads.len() <= i {
            crew.threads.resize_with(i + 1, || None);
        }
        // In its predecessor's place, if it has one, which is never joined.
        crew.threads[i] = Some(thread);
        Ok(())
    }

    fn one_is_off(&self) {
        self.crew().at_work -= 1;
        self.off.notify_all();
    }

    /// Waits until every worker has found the queue empty and hung up, and ended.
    pub(crate) fn join(&self) {
        let mut crew = self.crew();
        while crew.at_work > 0 {
            crew = self.off.wait(crew).unwrap_or_else(PoisonError::into_inner);
        }
        let threads = std::mem::take(&mut crew.threads);
        drop(crew);
        for thread in threads.into_iter().flatten() {
            // A worker catches what its kernels panic with.
            thread.join();
        }
    }

    fn task(&self, i: usize) -> MutexGuard<'_, Option<Arc<Launch>>> {
        self.tasks[i].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What worker `i` worked on when its thread was lost.
    pub(crate) fn take_task(&self, i: usize) -> Option<Arc<Launch>> {
        self.task(i).take()
    }
}

/// The threads of the workers.
#[derive(Debug, Default)]
struct Crew {
    /// Workers that have not ended, whatever has become of their threads.
    at_work: usize,
    /// Of each worker the newest.
    threads: Vec<Option<ThreadHandle>>,
}

thread_local! {
    /// The accelerator whose worker this thread is, or 0.
    static WORKER_OF: Cell<usize> = const { Cell::new(0) };
}

/// The state of one worker thread.
pub(crate) struct Worker {
    index: usize,
    shared: Arc<Shared>,
    range: RefCell<svm::Range<Sim>>,
    cache: Cache,
    bounce: RefCell<Bounce>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.attachment.device().leave_post(self.index);
        self.shared.one_is_off();
    }
}

impl Worker {
    pub(crate) fn new(index: usize, shared: Arc<Shared>, range: svm::Range<Sim>) -> Worker {
        Worker {
            index,
            range: RefCell::new(range),
            cache: Cache::new(shared.cache_entries),
            shared,
            bounce: RefCell::default(),
        }
    }

    /// The thread's main loop: ends when the accelerator has hung up and the queue is empty.
    pub(crate) fn run(self, queue: &Receiver<Arc<Launch>>) {
        let signals = svm::worker_thread();
        self.shared.mark_current();
        self.shared
            .attachment
            .device()
            .take_post(self.index, signals.id());
        for launch in queue {
            *self.shared.task(self.index) = Some(launch.clone());
            launch.take_part(&self);
            *self.shared.task(self.index) = None;
        }
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }

    #[inline(always)]
    pub(crate) fn slot(&self) -> &Slot {
        self.shared.attachment.device().slot(self.index)
    }

    #[inline(always)]
    pub(crate) fn generation(&self) -> &AtomicU64 {
        self.shared.attachment.device().generation()
    }

    /// Whether the device is paused (shootdown rule S6): what is checked while this says no is good.
    #[inline]
    pub(crate) fn is_paused(&self) -> bool {
        // Acquire: as in `Slot::access`.
        Generation::is_paused(self.generation().load(Ordering::Acquire))
    }

    /// Lets others run until the device is not paused: microseconds. Nothing of this worker's is published.
    pub(crate) fn wait_while_paused(&self) {
        while self.is_paused() {
            std::thread::yield_now();
        }
    }

    #[inline(always)]
    pub(crate) fn cache(&self) -> &Cache {
        &self.cache
    }

    pub(crate) fn bounce(&self) -> &RefCell<Bounce> {
        &self.bounce
    }

    /// Lets go of the regions of a launch that is over.
    pub(crate) fn park(&self) {
        self.range.borrow_mut().park();
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.shared.counters[self.index]
    }

    /// A far fault: gets translations for `pages`, or for those of them in the first one's block; and along with them, where that
    /// meets no difficulty, for what is in that block of `around`, which has them.
    ///
    /// The caller has nothing published (hazards W1). On return the pages were there for a moment; whoever needs them checks again.
    pub(crate) fn fetch(
        &self,
        region: &Space,
        pages: Range<usize>,
        around: Range<usize>,
        rights: Rights,
        attempt: u32,
    ) -> Result<(), DeviceFault> {
        let block = pages.start / PAGES_PER_BLOCK;
        let (start, end) = (block * PAGES_PER_BLOCK, (block + 1) * PAGES_PER_BLOCK);
        let in_block =
            |pages: Range<usize>| region.body_of(&(pages.start.max(start)..pages.end.min(end)));
        let (needed, along) = (in_block(pages), in_block(around));
        let turn = (region.addr_of(block * PAGES_PER_BLOCK) / BLOCK_SIZE) % NR_TURNS;
        let _turn = self.shared.turns[turn]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if region.nr_missing(&needed, rights) == 0 {
            self.counters().coalesced();
            return Ok(());
        }
        self.counters().far_fault();
        // Those along with them as long as it gets on: nobody waits for them.
        if along != needed
            && self
                .fault_in(region, along, rights, attempt, Duration::ZERO)
                .is_ok()
        {
            return Ok(());
        }
        self.fault_in(region, needed, rights, attempt, self.shared.fault_timeout)
    }

    fn fault_in(
        &self,
        region: &Space,
        pages: Range<usize>,
        rights: Rights,
        attempt: u32,
        timeout: Duration,
    ) -> Result<(), DeviceFault> {
        let table = region.mapped().table();
        self.range.borrow_mut().fault_in(
            region.mapped(),
            pages,
            access_of(rights),
            attempt,
            timeout,
            |valid, device| table.install(valid, device),
        )
    }
}
