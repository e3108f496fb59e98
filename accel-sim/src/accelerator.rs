//! The accelerator, and the ways to launch kernels on it.

use std::fmt;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Sender, unbounded};
use svm::addr::PAGE_SIZE;
use svm::{AttachOptions, DeviceFault};

use crate::chunk::Budget;
use crate::device::Sim;
use crate::error::Error;
use crate::items::ItemWork;
use crate::lane::Lane;
use crate::launch::{Launch, Operands, Work};
use crate::options::Options;
use crate::relief::Relief;
use crate::span::SpanWork;
use crate::stats::Stats;
use crate::view::{SpanSet, ViewSet};
use crate::worker::{Shared, Worker};

/// A simulated accelerator: worker threads with translation caches, and device memory that pages move into when touched.
///
/// Dropping it lets queued launches end, joins the workers, brings every page home and detaches. (The thread of a kernel that
/// went on with a page after it was taken from it is not joined: it sleeps for ever.)
pub struct Accelerator {
    shared: Arc<Shared>,
    options: Options,
    /// `None` only while it is being dropped.
    queue: Option<Sender<Arc<Launch>>>,
    /// `None` only while it is being built and dropped.
    relief: Option<Relief>,
    /// The process whose threads they are.
    process: u32,
}

impl Accelerator {
    /// An accelerator with a worker for each CPU and device memory without limit.
    ///
    /// # Errors
    ///
    /// As [`with_options`](Self::with_options).
    pub fn new() -> Result<Accelerator, Error> {
        Accelerator::with_options(Options::new())
    }

    /// An accelerator of the given shape.
    ///
    /// # Errors
    ///
    /// [`BadWorkerCount`](Error::BadWorkerCount), [`BadCacheSize`](Error::BadCacheSize) or
    /// [`NoDeviceMemory`](Error::NoDeviceMemory) for options that make no sense; a [`Runtime`](Error::Runtime) error where there is
    /// no userfaultfd or no room for another device; [`Thread`](Error::Thread) if a worker cannot be started.
    pub fn with_options(options: Options) -> Result<Accelerator, Error> {
        options.check()?;
        let mut attach = AttachOptions::new();
        attach = attach.span_deadline(options.span_deadline);
        if let Some(bytes) = options.memory_bytes {
            attach = attach.memory_bytes(bytes);
        }
        let attachment = svm::attach(Sim::new(options.workers), attach)?;
        let shared = Arc::new(Shared::new(
            attachment,
            options.workers,
            options.fault_timeout,
            options.cache_entries,
        ));
        let (sender, queue) = unbounded::<Arc<Launch>>();
        let mut accel = Accelerator {
            shared,
            options,
            queue: Some(sender),
            relief: None,
            process: std::process::id(),
        };
        accel.relief = Some(Relief::start(&accel.shared, queue.clone()).map_err(Error::Thread)?);
        for i in 0..accel.options.workers {
            accel.shared.enlist(i, &queue)?;
        }
        Ok(accel)
    }

    /// Its shape.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Number of workers.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.options.workers
    }

    /// What it did so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        Stats {
            workers: self.shared.counters.iter().map(|c| c.snapshot()).collect(),
            runtime: self.shared.attachment.stats(),
        }
    }

    /// Bytes of device memory in use.
    #[must_use]
    pub fn resident_bytes(&self) -> usize {
        self.shared.attachment.resident_bytes()
    }

    /// Brings home every page that it holds.
    ///
    /// # Errors
    ///
    /// If a page could not be brought home; [`Nested`](Error::Nested) in a kernel of its own, which would wait for itself;
    /// [`Forked`](Error::Forked).
    pub fn release(&self) -> Result<(), Error> {
        if self.is_inherited() {
            return Err(Error::Forked);
        }
        if self.shared.is_current() {
            return Err(Error::Nested);
        }
        Ok(self.shared.attachment.release()?)
    }

    /// Runs a kernel over slices: cuts the views into disjoint chunks of the same index range, calls `kernel` with the chunks of
    /// each range, on all workers, and waits.
    ///
    /// ```
    /// # fn demo(accel: &accel_sim::Accelerator) -> Result<(), svm::Error> {
    /// # let (x, mut y, a) = (vec![1.0_f32; 10_000], vec![2.0_f32; 10_000], 3.0);
    /// let x = svm::mirror_ref(&x)?;
    /// let mut y = svm::mirror(&mut y)?;
    /// accel.run((y.view_mut(), x.view()), |(y, x)| {
    ///     for (y, x) in y.iter_mut().zip(x) { *y += a * x }
    /// })?;
    /// # y.close()
    /// # }
    /// ```
    ///
    /// The slices are valid inside the call only, so they cannot be kept:
    ///
    /// ```compile_fail
    /// # fn demo(accel: &accel_sim::Accelerator, y: &mut svm::Mirror<'_, f32>) {
    /// let kept = std::sync::Mutex::new(Vec::new());
    /// accel.run(y.view_mut(), |y| kept.lock().unwrap().push(y));
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`LengthMismatch`](Error::LengthMismatch) unless all views have one length;
    /// [`DeviceMemoryTooSmall`](Error::DeviceMemoryTooSmall) for the spans of all workers; a [`Fault`](Error::Fault) for memory that cannot
    /// come, and for a kernel that went on with a page after it was taken from it ([`Options::span_deadline`]);
    /// [`KernelPanicked`](Error::KernelPanicked). After an error memory is as the kernel left it, and the accelerator lives on.
    pub fn run<V, K>(&self, views: V, kernel: K) -> Result<(), Error>
    where
        V: SpanSet,
        K: for<'s> Fn(<V as SpanSet>::Spans<'s>) + Sync,
    {
        let operands = self.operands(&views)?;
        let budget = self.budget(&operands);
        let work = SpanWork::<V, &K>::new(operands, &kernel, budget)?;
        self.run_work(Box::new(work))
    }

    /// Runs a kernel by items: calls `kernel(lane, i, handles)` for each `i` in `0..nr_items`, on all workers, and waits.
    ///
    /// Each view is a handle for single elements, at any index; views may differ in length. The [`Lane`] follows pointers
    /// within the views. Accesses are relaxed atomics, by words.
    ///
    /// ```
    /// # fn demo(accel: &accel_sim::Accelerator, histogram: &mut svm::Mirror<'_, u64>, data: &svm::MirrorRef<'_, u8>) -> Result<(), accel_sim::Error> {
    /// accel.run_items(data.len(), (histogram.view_mut(), data.view()), |_lane, i, (histogram, data)| {
    ///     histogram.fetch_add(data.load(i)?.into(), 1)?;
    ///     Ok(())
    /// })
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The first fault that the kernel returned; [`KernelPanicked`](Error::KernelPanicked). After an error memory is as the kernel left it, and
    /// the accelerator lives on.
    pub fn run_items<V, K>(&self, nr_items: usize, views: V, kernel: K) -> Result<(), Error>
    where
        V: ViewSet,
        K: for<'l, 's> Fn(
                &'l Lane<'s>,
                usize,
                &'l <V as ViewSet>::Elements<'s>,
            ) -> Result<(), DeviceFault>
            + Sync,
    {
        let operands = self.operands(&views)?;
        let work = ItemWork::<V, &K>::new(operands, nr_items, &kernel, self.workers());
        self.run_work(Box::new(work))
    }

    /// Opens a scope for launches that overlap with the caller's own work. All of them are over when it returns, also when
    /// `f` panics.
    ///
    /// ```
    /// # fn demo(accel: &accel_sim::Accelerator, a: &mut svm::Mirror<'_, u32>, b: &mut [u32]) -> Result<(), accel_sim::Error> {
    /// accel.scope(|s| {
    ///     let launch = s.launch(a.view_mut(), |a| a.fill(1))?;
    ///     b.fill(2); // meanwhile, here
    ///     launch.wait()
    /// })
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// What `f` returned, else the failure of a launch that `f` did not wait for. In a forked child [`Forked`](Error::Forked), in place
    /// of success.
    pub fn scope<'env, R, F>(&'env self, f: F) -> Result<R, Error>
    where
        F: for<'scope> FnOnce(&'scope Scope<'scope, 'env>) -> Result<R, Error>,
    {
        let scope = Scope {
            accel: self,
            launches: Mutex::default(),
            _scope: PhantomData,
            _env: PhantomData,
        };
        let result = catch_unwind(AssertUnwindSafe(|| f(&scope)));
        let ended = scope.wait_for_all();
        match result {
            Ok(result) => result.and_then(|r| ended.map(|()| r)),
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Launches a kernel over slices of owned buffers, and returns at once. [`Job::join`] hands the buffers back.
    ///
    /// ```
    /// # fn demo(accel: &accel_sim::Accelerator, y: svm::Buffer<f32>, x: svm::Buffer<f32>) -> Result<(), accel_sim::Error> {
    /// let job = accel.spawn((y, x), |(y, x)| for (y, x) in y.iter_mut().zip(x) { *y += *x })?;
    /// let ((y, x), result) = job.join();
    /// # let _ = (y, x);
    /// # result
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run), as far as they show before the kernel runs; the buffers are dropped then.
    pub fn spawn<B, K>(&self, buffers: B, kernel: K) -> Result<Job<B>, Error>
    where
        B: SpanSet + Send + 'static,
        K: for<'s> Fn(<B as SpanSet>::Spans<'s>) + Sync + Send + 'static,
    {
        let operands = self.operands(&buffers)?;
        let budget = self.budget(&operands);
        let work = SpanWork::<B, K>::new(operands, kernel, budget)?;
        self.spawn_work(buffers, work)
    }

    /// Launches a kernel by items on owned buffers, and returns at once.
    ///
    /// # Errors
    ///
    /// As [`spawn`](Self::spawn).
    pub fn spawn_items<B, K>(&self, nr_items: usize, buffers: B, kernel: K) -> Result<Job<B>, Error>
    where
        B: ViewSet + Send + 'static,
        K: for<'l, 's> Fn(
                &'l Lane<'s>,
                usize,
                &'l <B as ViewSet>::Elements<'s>,
            ) -> Result<(), DeviceFault>
            + Sync
            + Send
            + 'static,
    {
        let operands = self.operands(&buffers)?;
        let work = ItemWork::<B, K>::new(operands, nr_items, kernel, self.workers());
        self.spawn_work(buffers, work)
    }

    fn spawn_work<B: Send + 'static>(
        &self,
        buffers: B,
        work: impl Work + 'static,
    ) -> Result<Job<B>, Error> {
        let work = Owning::new(work, buffers);
        let buffers = work.owned.clone();
        // SAFETY: the work borrows nothing: it is 'static, and keeps the buffers alive itself.
        let launch = Arc::new(unsafe { Launch::new(Box::new(work), self.workers(), self.process) });
        self.enqueue(&launch);
        Ok(Job { launch, buffers })
    }

    /// Whether this is a forked child, where the workers are not.
    fn is_inherited(&self) -> bool {
        self.process != std::process::id()
    }

    fn run_work<'a>(&self, work: Box<dyn Work + 'a>) -> Result<(), Error> {
        // SAFETY: we wait below, and nothing between here and there unwinds but by a failure to allocate, which aborts.
        let launch = Arc::new(unsafe { Launch::new(work, self.workers(), self.process) });
        self.enqueue(&launch);
        launch.wait()
    }

    fn operands<V: ViewSet>(&self, views: &V) -> Result<Operands, Error> {
        if self.is_inherited() {
            return Err(Error::Forked);
        }
        if self.shared.is_current() {
            return Err(Error::Nested);
        }
        Operands::new(&self.shared, views)
    }

    fn budget(&self, operands: &Operands) -> Budget {
        Budget {
            nr_workers: self.workers(),
            granule: operands.granule_pages * PAGE_SIZE,
            memory_bytes: self.options.memory_bytes,
        }
    }

    fn enqueue(&self, launch: &Arc<Launch>) {
        let queue = self
            .queue
            .as_ref()
            .expect("the queue is there until the accelerator is dropped");
        for _ in 0..launch.tickets() {
            // Workers hold the other end until we hang up.
            queue
                .send(launch.clone())
                .expect("the workers are there until the accelerator is dropped");
        }
    }
}

impl fmt::Debug for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accelerator")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Drop for Accelerator {
    fn drop(&mut self) {
        if self.is_inherited() {
            // There is nobody to join, or to hang up on: the queue may be locked by a worker in the parent.
            std::mem::forget((self.queue.take(), self.relief.take()));
            return;
        }
        // Hanging up lets each worker end once the queue is empty; detached launches are therefore completed.
        self.queue = None;
        let Some(relief) = self.relief.take() else {
            // It was never complete.
            self.shared.join();
            return;
        };
        if self.shared.is_current() {
            // A kernel's captures held the last handle, and one of the workers, which nobody can wait for there, drops them.
            let _ = svm::spawn_thread("accel-end", move || relief.end());
            return;
        }
        relief.end();
        // The attachment goes with `shared`, of which ours is now the last: its pages come home.
    }
}

/// Work that keeps what it works on alive: its views, or buffers of its own.
struct Owning<W, B> {
    work: W,
    owned: Arc<Mutex<Option<B>>>,
}

impl<W, B> Owning<W, B> {
    fn new(work: W, owned: B) -> Self {
        let owned = Arc::new(Mutex::new(Some(owned)));
        Self { work, owned }
    }
}

impl<W: Work, B: Send> Work for Owning<W, B> {
    fn nr_items(&self) -> usize {
        self.work.nr_items()
    }

    fn item(
        &self,
        worker: &Worker,
        launch: &Launch,
        i: usize,
    ) -> Result<(), crate::launch::Failure> {
        self.work.item(worker, launch, i)
    }

    fn finish(self: Box<Self>) -> Result<(), svm::Error> {
        Box::new(self.work).finish()
    }
}

/// A detached launch. Dropping it leaves the launch to itself: it runs to its end, and the buffers are dropped then.
pub struct Job<B> {
    launch: Arc<Launch>,
    buffers: Arc<Mutex<Option<B>>>,
}

impl<B> fmt::Debug for Job<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("launch", &self.launch)
            .finish_non_exhaustive()
    }
}

impl<B> Job<B> {
    /// Whether it is over, so that [`join`](Self::join) does not wait.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.launch.is_done()
    }

    /// Waits until it is over, and gives the buffers back, with what it came to. In a forked child nothing is waited for and the result
    /// is [`Forked`](Error::Forked): the buffers are the child's own, with what they held when it was made.
    pub fn join(self) -> (B, Result<(), Error>) {
        let result = self.launch.wait();
        let buffers = self
            .buffers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        (buffers.expect("a job is joined once"), result)
    }
}

/// Launches kernels that borrow what outlives the scope. See [`Accelerator::scope`].
pub struct Scope<'scope, 'env: 'scope> {
    accel: &'env Accelerator,
    launches: Mutex<Vec<Arc<Launch>>>,
    _scope: PhantomData<&'scope mut &'scope ()>,
    _env: PhantomData<&'env mut &'env ()>,
}

impl fmt::Debug for Scope<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scope").finish_non_exhaustive()
    }
}

impl<'scope, 'env> Scope<'scope, 'env> {
    /// Waits for each launch, whatever the others came to. A kernel, or a thread that it has started, may launch more meanwhile: into
    /// the list, before the launch that it is part of is over.
    fn wait_for_all(&self) -> Result<(), Error> {
        if self.accel.is_inherited() {
            // Before the lock, which another thread of the parent may hold.
            return Err(Error::Forked);
        }
        let mut ended = Ok(());
        loop {
            let launches = std::mem::take(&mut *self.list());
            if launches.is_empty() {
                return ended;
            }
            for launch in launches {
                ended = ended.and(launch.wait());
            }
        }
    }

    fn list(&self) -> MutexGuard<'_, Vec<Arc<Launch>>> {
        self.launches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Launches a kernel over slices, as [`Accelerator::run`] does, and returns at once.
    ///
    /// # Errors
    ///
    /// As [`Accelerator::run`], as far as they show before the kernel runs.
    pub fn launch<V, K>(&'scope self, views: V, kernel: K) -> Result<ScopedLaunch<'scope>, Error>
    where
        V: SpanSet + Send + 'scope,
        K: for<'s> Fn(<V as SpanSet>::Spans<'s>) + Sync + Send + 'scope,
    {
        let operands = self.accel.operands(&views)?;
        let budget = self.accel.budget(&operands);
        let work = SpanWork::<V, K>::new(operands, kernel, budget)?;
        Ok(self.launch_work(Box::new(Owning::new(work, views))))
    }

    /// Launches a kernel by items, as [`Accelerator::run_items`] does, and returns at once.
    ///
    /// # Errors
    ///
    /// As [`Accelerator::run_items`], as far as they show before the kernel runs.
    pub fn launch_items<V, K>(
        &'scope self,
        nr_items: usize,
        views: V,
        kernel: K,
    ) -> Result<ScopedLaunch<'scope>, Error>
    where
        V: ViewSet + Send + 'scope,
        K: for<'l, 's> Fn(
                &'l Lane<'s>,
                usize,
                &'l <V as ViewSet>::Elements<'s>,
            ) -> Result<(), DeviceFault>
            + Sync
            + Send
            + 'scope,
    {
        let operands = self.accel.operands(&views)?;
        let work = ItemWork::<V, K>::new(operands, nr_items, kernel, self.accel.workers());
        Ok(self.launch_work(Box::new(Owning::new(work, views))))
    }

    fn launch_work(&'scope self, work: Box<dyn Work + 'scope>) -> ScopedLaunch<'scope> {
        let accel = self.accel;
        // SAFETY: `Accelerator::scope` waits for every launch in the list before it returns or unwinds, and 'scope lasts until then.
        // It is in the list before it is in the queue.
        let launch = Arc::new(unsafe { Launch::new(work, accel.workers(), accel.process) });
        self.list().push(launch.clone());
        self.accel.enqueue(&launch);
        ScopedLaunch {
            launch,
            _scope: PhantomData,
        }
    }
}

/// A launch in a scope. Not waiting for it leaves that to the scope.
#[derive(Debug)]
pub struct ScopedLaunch<'scope> {
    launch: Arc<Launch>,
    _scope: PhantomData<&'scope ()>,
}

impl ScopedLaunch<'_> {
    /// Waits until it is over.
    ///
    /// # Errors
    ///
    /// As [`Accelerator::run`]; [`Forked`](Error::Forked) in a forked child.
    pub fn wait(self) -> Result<(), Error> {
        self.launch.wait()
    }

    /// Whether it is over, so that [`wait`](Self::wait) does not wait.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.launch.is_done()
    }
}
