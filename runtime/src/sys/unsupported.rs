//! The system-call layer where there is none to call: systems other than Linux, and Linux with `--cfg svm_unsupported`, where
//! CI tests it.
//!
//! Everything above [`sys`](super) is the same code everywhere. Here, what it needs first of the system (memory of its own, a
//! userfaultfd) is refused, with [`io::ErrorKind::Unsupported`], and what it would hold then is [`Never`]: the compiler knows that
//! no code behind it can run. So every entry point of the crate compiles and answers with an error that says so.
#![allow(
    dead_code,
    reason = "the same names as on Linux, of which not all have a user left"
)]

/// What cannot exist.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Never {}

fn unsupported<T>() -> std::io::Result<T> {
    Err(std::io::Error::new(
        std::io::ErrorKind::Unsupported,
        "userfaultfd is Linux's",
    ))
}

pub(crate) mod arc;
pub(crate) mod flight;
pub(crate) mod gated;

pub(crate) mod clock {
    use std::sync::OnceLock;
    use std::time::Instant;

    pub(crate) fn monotonic_ns() -> u64 {
        static START: OnceLock<Instant> = OnceLock::new();
        u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(crate) fn sleep_until(at_ns: u64) {
        let left = at_ns.saturating_sub(monotonic_ns());
        std::thread::sleep(std::time::Duration::from_nanos(left));
    }
}

/// The primitives of [`crate::sync`] are public, so they work; by spinning, since nobody waits long where nothing is shared.
pub(crate) mod futex {
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Waited {
        Woken,
        Changed,
        TimedOut,
        Interrupted,
    }

    pub(crate) fn wait(word: &AtomicU32, expected: u32, deadline_ns: Option<u64>) -> Waited {
        // Relaxed: the caller looks again, with the ordering it needs.
        if word.load(Ordering::Relaxed) != expected {
            return Waited::Changed;
        }
        if deadline_ns.is_some_and(|deadline| super::clock::monotonic_ns() >= deadline) {
            return Waited::TimedOut;
        }
        std::thread::yield_now();
        Waited::Interrupted
    }

    pub(crate) fn wake(_: &AtomicU32, _: u32) -> u32 {
        0
    }

    pub(crate) fn wake_all(_: &AtomicU32) -> u32 {
        0
    }
}

pub(crate) mod disable {
    pub(crate) fn check() -> std::io::Result<()> {
        Ok(())
    }
}

pub(crate) mod membarrier {
    use std::sync::atomic::{Ordering, fence};

    pub(crate) fn init() -> std::io::Result<()> {
        super::unsupported()
    }

    pub(crate) fn is_asymmetric() -> bool {
        false
    }

    #[inline]
    pub(crate) fn light() {
        fence(Ordering::SeqCst);
    }

    pub(crate) fn heavy() {
        fence(Ordering::SeqCst);
    }
}

pub(crate) mod sched {
    /// A set of CPUs.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Cpus;

    impl Cpus {
        pub(crate) fn all() -> Self {
            Self
        }

        pub(crate) fn one(_: usize) -> Option<Self> {
            None
        }

        pub(crate) fn of_this_thread() -> Option<Self> {
            None
        }

        pub(crate) fn has_several(&self) -> bool {
            false
        }

        pub(crate) fn confine_this_thread(&self) -> bool {
            false
        }
    }

    pub(crate) fn cpu_of_thread(_: usize) -> Option<usize> {
        None
    }
}

pub(crate) mod thread {
    use std::io;
    use std::thread::JoinHandle;

    #[derive(Debug)]
    pub(crate) struct Thread(JoinHandle<()>);

    pub(crate) fn enter_child() {}

    pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
        let thread = std::thread::Builder::new().name(name.into());
        thread.spawn(body).map(Thread)
    }

    impl Thread {
        pub(crate) fn join(self) {
            let _ = self.0.join();
        }
    }
}

pub(crate) mod process {
    use std::{fmt, io};

    pub(crate) fn sched_yield() {
        std::thread::yield_now();
    }

    /// # Safety
    ///
    /// None is needed: it copies nothing.
    pub(crate) unsafe fn copy_from_self(_: u32, _: usize, _: usize, _: usize) -> io::Result<usize> {
        super::unsupported()
    }

    /// # Safety
    ///
    /// None is needed: it copies nothing.
    pub(crate) unsafe fn copy_from(_: *mut u8, _: usize, _: usize) -> io::Result<usize> {
        super::unsupported()
    }

    /// # Safety
    ///
    /// None is needed: it copies nothing.
    pub(crate) unsafe fn copy_to(_: usize, _: *const u8, _: usize) -> io::Result<usize> {
        super::unsupported()
    }

    pub(crate) fn at_fork(
        _: extern "C" fn(),
        _: extern "C" fn(),
        _: extern "C" fn(),
    ) -> io::Result<()> {
        super::unsupported()
    }

    #[cold]
    pub(crate) fn abort_with_message(message: fmt::Arguments<'_>) -> ! {
        eprintln!("{message}");
        std::process::abort()
    }
}

/// The unsafe ones have the contracts that they have on Linux, where they do something.
#[allow(clippy::missing_safety_doc, reason = "they do nothing")]
pub(crate) mod calls {
    use std::io;

    use super::unsupported;

    pub(crate) unsafe fn munmap(_: usize, _: usize) -> io::Result<()> {
        unsupported()
    }

    pub(crate) unsafe fn mremap(
        _: usize,
        _: usize,
        _: usize,
        _: i32,
        _: usize,
    ) -> io::Result<usize> {
        unsupported()
    }

    pub(crate) unsafe fn madvise(_: usize, _: usize, _: i32) -> io::Result<()> {
        unsupported()
    }

    pub(crate) unsafe fn mprotect(_: usize, _: usize, _: i32) -> io::Result<()> {
        unsupported()
    }
}

pub(crate) mod signal {
    use std::io;
    use std::marker::PhantomData;

    #[derive(Debug, Clone, Copy)]
    pub(crate) struct BusFault {
        pub(crate) addr: usize,
        pub(crate) access: Access,
        pub(crate) pc: usize,
        pub(crate) sp: usize,
        pub(crate) late: bool,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Access {
        ReadMissing,
        WriteMissing,
        WriteProtected,
        Unknown,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Verdict {
        Resolved,
        NotOurs,
        Park,
    }

    pub(crate) fn enter_child() {}

    pub(crate) fn send_late(_: usize, _: usize, _: bool) -> io::Result<()> {
        super::unsupported()
    }

    pub(crate) fn install(_: fn(&BusFault) -> Verdict) -> io::Result<()> {
        super::unsupported()
    }

    pub(crate) fn thread_pointer() -> usize {
        thread_local!(static HERE: u8 = const { 0 });
        HERE.with(|here| std::ptr::from_ref(here).addr())
    }

    /// Nothing of ours runs in a signal handler here, so there is nothing to keep out.
    #[must_use = "signals are unmasked again when it is dropped"]
    #[derive(Debug)]
    pub(crate) struct AsyncSignalsBlocked(PhantomData<*mut ()>);

    impl AsyncSignalsBlocked {
        pub(crate) fn new() -> Self {
            Self(PhantomData)
        }
    }

    pub(crate) fn async_signals_blocked() -> bool {
        true
    }
}

pub(crate) mod mmap {
    use std::io;
    use std::marker::PhantomData;
    use std::ops::{Deref, DerefMut};
    use std::ptr::NonNull;

    use bytemuck::Zeroable;

    use super::{Never, unsupported};
    use crate::addr::PageRange;

    pub(super) fn map_anonymous(_: usize) -> io::Result<NonNull<u8>> {
        unsupported()
    }

    /// # Safety
    ///
    /// None is needed: nothing was ever mapped.
    pub(super) unsafe fn unmap(_: usize, _: usize) {}

    pub(super) fn state_len(len_bytes: usize) -> Option<usize> {
        Some(len_bytes)
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Advice {
        HugePage,
        NoHugePage,
        DontFork,
        DoFork,
        PopulateRead,
        PopulateWrite,
        Collapse,
    }

    pub(crate) fn advise(_: PageRange, _: Advice) -> io::Result<()> {
        unsupported()
    }

    /// # Safety
    ///
    /// None is needed: it drops nothing.
    pub(crate) unsafe fn discard(_: PageRange) -> io::Result<()> {
        unsupported()
    }

    #[derive(Debug)]
    pub(crate) struct Reservation(Never);

    impl Reservation {
        pub(crate) fn congruent_to(_: PageRange) -> io::Result<Self> {
            unsupported()
        }

        pub(crate) fn range(&self) -> PageRange {
            match self.0 {}
        }

        pub(crate) fn as_ptr(&self) -> *mut u8 {
            match self.0 {}
        }
    }

    #[derive(Debug)]
    pub(crate) struct Memory(Never);

    impl Memory {
        pub(crate) fn aligned(_: usize, _: usize) -> io::Result<Self> {
            unsupported()
        }

        pub(crate) fn huge_pages(&self) {
            match self.0 {}
        }

        pub(crate) fn start(&self) -> NonNull<u8> {
            match self.0 {}
        }
    }

    #[derive(Debug)]
    pub(crate) struct MapArray<T>(Never, PhantomData<T>);

    impl<T> MapArray<T> {
        pub(crate) fn zeroed(_: usize) -> io::Result<Self>
        where
            T: Zeroable,
        {
            unsupported()
        }

        pub(crate) fn from_fn(_: usize, _: impl FnMut(usize) -> T) -> io::Result<Self> {
            unsupported()
        }
    }

    impl<T> Deref for MapArray<T> {
        type Target = [T];

        fn deref(&self) -> &[T] {
            match self.0 {}
        }
    }

    impl<T> DerefMut for MapArray<T> {
        fn deref_mut(&mut self) -> &mut [T] {
            match self.0 {}
        }
    }

    #[derive(Debug)]
    pub(crate) struct MapBox<T>(Never, PhantomData<T>);

    impl<T> MapBox<T> {
        pub(crate) fn new(_: T) -> io::Result<Self> {
            unsupported()
        }

        pub(crate) fn zeroed() -> io::Result<Self>
        where
            T: Zeroable,
        {
            unsupported()
        }

        pub(crate) fn leak(this: Self) -> &'static mut T {
            match this.0 {}
        }
    }

    impl<T> Deref for MapBox<T> {
        type Target = T;

        fn deref(&self) -> &T {
            match self.0 {}
        }
    }

    impl<T> DerefMut for MapBox<T> {
        fn deref_mut(&mut self) -> &mut T {
            match self.0 {}
        }
    }
}

pub(crate) mod pagemap {
    use std::io;
    use std::ops::ControlFlow;

    use super::{Never, unsupported};
    use crate::addr::PageRange;

    bitflags::bitflags! {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub(crate) struct PageState: u8 {
            const PRESENT = 1 << 0;
            const WRITE_PROTECTED = 1 << 1;
            const SWAPPED = 1 << 2;
            const FILE = 1 << 3;
            const ZERO = 1 << 4;
            const HUGE = 1 << 5;
        }
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Extent {
        pub(crate) range: PageRange,
        pub(crate) state: PageState,
    }

    #[derive(Debug)]
    pub(crate) struct Pagemap(Never);

    impl Pagemap {
        pub(crate) fn open() -> io::Result<Self> {
            unsupported()
        }

        pub(crate) fn walk(
            &self,
            _: PageRange,
            _: impl FnMut(Extent) -> ControlFlow<()>,
        ) -> io::Result<()> {
            match self.0 {}
        }

        pub(crate) fn page(&self, _: usize) -> io::Result<PageState> {
            match self.0 {}
        }

        pub(crate) fn is_empty(&self, _: PageRange) -> io::Result<bool> {
            match self.0 {}
        }
    }
}

pub(crate) mod maps {
    use std::io;
    use std::ops::ControlFlow;

    use super::{Never, unsupported};
    use crate::addr::PageRange;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Kind(Never);

    impl PartialEq for Never {
        fn eq(&self, _: &Self) -> bool {
            match *self {}
        }
    }

    impl Eq for Never {}

    impl Kind {
        pub(crate) const fn is_anonymous(self) -> bool {
            match self.0 {}
        }
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Vma {
        pub(crate) range: PageRange,
        pub(crate) readable: bool,
        pub(crate) writable: bool,
        pub(crate) executable: bool,
        pub(crate) shared: bool,
        pub(crate) kind: Kind,
    }

    #[derive(Debug)]
    pub(crate) struct Maps(Never);

    impl Maps {
        pub(crate) fn open() -> io::Result<Self> {
            unsupported()
        }

        pub(crate) fn end_of(&self, _: usize) -> Option<usize> {
            match self.0 {}
        }

        pub(crate) fn covering(&self, _: usize) -> io::Result<Option<Vma>> {
            match self.0 {}
        }

        pub(crate) fn walk(
            &self,
            _: PageRange,
            _: impl FnMut(Vma) -> ControlFlow<()>,
        ) -> io::Result<()> {
            match self.0 {}
        }
    }
}

pub(crate) mod event {
    use std::io;

    use super::uffd::Uffd;
    use super::{Never, unsupported};
    use crate::addr::PageRange;

    #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Ready {
        pub(crate) message: bool,
        pub(crate) doorbell: bool,
        pub(crate) broken: bool,
    }

    #[derive(Debug)]
    pub(crate) struct Doorbell(Never);

    impl Doorbell {
        pub(crate) fn new() -> io::Result<Self> {
            unsupported()
        }

        pub(crate) fn ring(&self) {
            match self.0 {}
        }

        pub(crate) fn silence(&self) -> bool {
            match self.0 {}
        }
    }

    #[derive(Debug)]
    pub(crate) enum Event {
        PageFault {
            addr: usize,
            write: bool,
            wp: bool,
            tid: u32,
        },
        Remove(PageRange),
        Unmap(PageRange),
        Remap {
            from: usize,
            to: usize,
            len: usize,
        },
        Fork(Never),
        Unknown(u8),
    }

    pub(crate) struct EventBuffer<const N: usize>;

    impl<const N: usize> EventBuffer<N> {
        pub(crate) const fn new() -> Self {
            Self
        }

        pub(crate) fn fill(&mut self, uffd: &Uffd) -> io::Result<usize> {
            uffd.never()
        }
    }

    impl<const N: usize> Iterator for EventBuffer<N> {
        type Item = Event;

        fn next(&mut self) -> Option<Event> {
            None
        }
    }
}

pub(crate) mod uffd {
    use std::{fmt, io};

    use super::Never;
    use super::event::{Doorbell, Ready};
    use crate::addr::PageRange;

    bitflags::bitflags! {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) struct Features: u64 {
            const PAGEFAULT_FLAG_WP = 1 << 0;
            const EVENT_FORK = 1 << 1;
            const EVENT_REMAP = 1 << 2;
            const EVENT_REMOVE = 1 << 3;
            const EVENT_UNMAP = 1 << 6;
            const SIGBUS = 1 << 7;
            const THREAD_ID = 1 << 8;
            const EXACT_ADDRESS = 1 << 11;
            const POISON = 1 << 14;
            const MOVE = 1 << 16;
        }
    }

    bitflags::bitflags! {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) struct Mode: u64 {
            const MISSING = 1 << 0;
            const WP = 1 << 1;
        }
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Protect {
        No,
        Yes,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Wake {
        Yes,
        No,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Stop {
        Complete,
        Exists,
        NotPresent,
        Changing,
        Busy,
        Invalid,
        NoMemory,
        Fault,
        Other(i32),
    }

    #[must_use = "a range may be resolved in part only"]
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Moved {
        pub(crate) bytes: usize,
        pub(crate) stop: Stop,
    }

    impl Moved {
        pub(crate) const fn is_complete(self) -> bool {
            matches!(self.stop, Stop::Complete)
        }
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum FaultScope {
        UserMode,
        UserAndKernel,
    }

    #[derive(Debug)]
    pub(crate) struct OpenError;

    impl OpenError {
        pub(crate) fn syscall_errno(&self) -> Option<i32> {
            None
        }

        pub(crate) fn help(&self) -> String {
            String::new()
        }
    }

    impl fmt::Display for OpenError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("this is not Linux")
        }
    }

    #[derive(Debug)]
    pub(crate) struct Uffd(Never);

    /// The unsafe ones have the contracts that they have on Linux, where they can be called.
    #[allow(clippy::missing_safety_doc, reason = "none of them can be called")]
    impl Uffd {
        pub(super) fn never(&self) -> ! {
            match self.0 {}
        }

        pub(crate) fn probe(_: FaultScope) -> Result<Features, OpenError> {
            Err(OpenError)
        }

        pub(crate) fn open(_: FaultScope, _: Features) -> Result<Self, OpenError> {
            Err(OpenError)
        }

        pub(crate) unsafe fn disown_in_child(&self) {
            self.never()
        }

        pub(crate) fn enabled(&self) -> Features {
            self.never()
        }

        pub(crate) fn scope(&self) -> FaultScope {
            self.never()
        }

        pub(crate) unsafe fn register(&self, _: PageRange, _: Mode) -> io::Result<()> {
            self.never()
        }

        pub(crate) fn unregister(&self, _: PageRange) -> io::Result<()> {
            self.never()
        }

        pub(crate) fn wake(&self, _: PageRange) {
            self.never()
        }

        pub(crate) unsafe fn copy(&self, _: PageRange, _: usize, _: Protect, _: Wake) -> Moved {
            self.never()
        }

        pub(crate) unsafe fn zeropage(&self, _: PageRange, _: Wake) -> Moved {
            self.never()
        }

        pub(crate) unsafe fn move_pages(&self, _: PageRange, _: usize, _: Wake) -> Moved {
            self.never()
        }

        pub(crate) fn write_protect(&self, _: PageRange) -> Stop {
            self.never()
        }

        pub(crate) fn write_unprotect(&self, _: PageRange, _: Wake) -> Stop {
            self.never()
        }

        pub(crate) unsafe fn poison(&self, _: PageRange, _: Wake) -> Moved {
            self.never()
        }

        pub(crate) fn has_message(&self) -> bool {
            self.never()
        }

        pub(crate) fn poll(&self, _: &Doorbell, _: Option<std::time::Duration>) -> Ready {
            self.never()
        }
    }
}
