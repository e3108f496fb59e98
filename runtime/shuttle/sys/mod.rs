//! The system-call layer of the models: the interface of `runtime/src/sys`, answered by [`kernel`](crate::kernel).
//!
//! What is memory and nothing else is the runtime's own: [`arc`], [`flight`], [`gated`]. The rest is here.

#[path = "../../src/sys/arc.rs"]
pub(crate) mod arc;
#[path = "../../src/sys/flight.rs"]
pub(crate) mod flight;
#[path = "../../src/sys/gated.rs"]
pub(crate) mod gated;

pub(crate) mod event;
pub(crate) mod mmap;
pub(crate) mod uffd;

pub(crate) mod clock {
    pub(crate) use std::time::monotonic_ns;

    /// Time is at least that late when it goes on; the others run meanwhile.
    pub(crate) fn sleep_until(at_ns: u64) {
        std::time::pass_until(at_ns);
        std::thread::yield_now();
    }
}

pub(crate) mod futex {
    use crate::kernel;
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Waited {
        Woken,
        Changed,
        TimedOut,
        Interrupted,
    }

    /// A wait with a deadline is one without: deadlines are there for what should not happen, and here that is a deadlock, which
    /// Shuttle reports.
    pub(crate) fn wait(word: &AtomicU32, expected: u32, _deadline_ns: Option<u64>) -> Waited {
        if word.load(Relaxed) != expected {
            return Waited::Changed;
        }
        kernel::futex_sleep(std::ptr::from_ref(word).addr());
        Waited::Woken
    }

    pub(crate) fn wake(word: &AtomicU32, nr: u32) -> u32 {
        kernel::futex_wake(std::ptr::from_ref(word).addr(), nr as usize);
        0
    }

    pub(crate) fn wake_all(word: &AtomicU32) -> u32 {
        wake(word, u32::MAX)
    }
}

pub(crate) mod disable {
    pub(crate) fn check() -> std::io::Result<()> {
        Ok(())
    }
}

pub(crate) mod membarrier {
    pub(crate) fn init() -> std::io::Result<()> {
        Ok(())
    }

    pub(crate) fn is_asymmetric() -> bool {
        true
    }

    /// Nothing is reordered in a model.
    pub(crate) fn light() {}

    pub(crate) fn heavy() {
        crate::kernel::point();
    }
}

/// CPUs are not modelled: a monitor stays where it is.
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
    use crate::addr::PAGE_SIZE;
    use crate::kernel;
    use std::sync::OnceLock;
    use std::{fmt, io};

    pub(crate) fn sched_yield() {
        std::thread::yield_now();
    }

    /// # Safety
    ///
    /// None is needed: it copies model memory.
    pub(crate) unsafe fn copy_from_self(
        _: u32,
        dst: usize,
        src: usize,
        len: usize,
    ) -> io::Result<usize> {
        Ok(kernel::copy_over(dst, src, len / PAGE_SIZE) * PAGE_SIZE)
    }

    /// # Safety
    ///
    /// None is needed: the models' ranges have no edges, and nothing is copied.
    pub(crate) unsafe fn copy_from(_: *mut u8, _: usize, len: usize) -> io::Result<usize> {
        Ok(len)
    }

    /// # Safety
    ///
    /// As `copy_from`.
    pub(crate) unsafe fn copy_to(_: usize, _: *const u8, len: usize) -> io::Result<usize> {
        Ok(len)
    }

    /// What libc calls before a fork, and after it in the parent.
    static HANDLERS: OnceLock<[extern "C" fn(); 2]> = OnceLock::new();

    pub(crate) fn at_fork(
        prepare: extern "C" fn(),
        parent: extern "C" fn(),
        _: extern "C" fn(),
    ) -> io::Result<()> {
        HANDLERS.get_or_init(|| [prepare, parent]);
        Ok(())
    }

    /// A fork: `fork` is what the kernel does of it.
    pub(crate) fn around_fork(fork: impl FnOnce()) {
        let [prepare, parent] = HANDLERS.get().expect("installed with the first mirror");
        prepare();
        fork();
        parent();
    }

    /// The end of a schedule ends the monitor, which takes that for its death.
    pub(crate) fn abort_with_message(message: fmt::Arguments<'_>) -> ! {
        if kernel::is_over() {
            std::panic::resume_unwind(Box::new(std::thread::Over));
        }
        panic!("{message}");
    }
}

pub(crate) mod signal {
    use crate::kernel;
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

    /// A signal of ours to a thread that sleeps in a fault.
    pub(crate) fn send_late(thread: usize, addr: usize, write: bool) -> io::Result<()> {
        kernel::send_late(thread, addr, write);
        Ok(())
    }

    pub(crate) fn install(handler: fn(&BusFault) -> Verdict) -> io::Result<()> {
        kernel::with(|kernel| kernel.set_handler(handler));
        Ok(())
    }

    pub(crate) fn thread_pointer() -> usize {
        kernel::thread_id()
    }

    /// No signal comes in a model but the one that an access raises.
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

pub(crate) mod pagemap {
    use crate::addr::PageRange;
    use crate::kernel;
    use std::io;
    use std::ops::ControlFlow;

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
    pub(crate) struct Pagemap;

    impl Pagemap {
        pub(crate) fn open() -> io::Result<Self> {
            Ok(Self)
        }

        pub(crate) fn walk(
            &self,
            range: PageRange,
            mut each: impl FnMut(Extent) -> ControlFlow<()>,
        ) -> io::Result<()> {
            for extent in kernel::extents(range) {
                if each(extent).is_break() {
                    break;
                }
            }
            Ok(())
        }

        pub(crate) fn page(&self, addr: usize) -> io::Result<PageState> {
            let page = PageRange::containing(addr, 1).ok_or(io::ErrorKind::InvalidInput)?;
            let extent = kernel::extents(page).into_iter().next();
            Ok(extent.map_or_else(PageState::empty, |extent| extent.state))
        }

        pub(crate) fn is_empty(&self, range: PageRange) -> io::Result<bool> {
            Ok(kernel::extents(range).is_empty())
        }
    }
}

pub(crate) mod maps {
    use crate::addr::PageRange;
    use crate::kernel;
    use std::io;
    use std::ops::ControlFlow;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Kind;

    impl Kind {
        /// All memory of the models is.
        pub(crate) const fn is_anonymous(self) -> bool {
            true
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
    pub(crate) struct Maps;

    impl Maps {
        pub(crate) fn open() -> io::Result<Self> {
            Ok(Self)
        }

        pub(crate) fn end_of(&self, addr: usize) -> Option<usize> {
            Some(self.covering(addr).ok()??.range.end())
        }

        pub(crate) fn covering(&self, addr: usize) -> io::Result<Option<Vma>> {
            let page = PageRange::containing(addr, 1).ok_or(io::ErrorKind::InvalidInput)?;
            Ok(kernel::mappings(page).into_iter().next())
        }

        pub(crate) fn walk(
            &self,
            range: PageRange,
            mut each: impl FnMut(Vma) -> ControlFlow<()>,
        ) -> io::Result<()> {
            for vma in kernel::mappings(range) {
                if each(vma).is_break() {
                    break;
                }
            }
            Ok(())
        }
    }
}
