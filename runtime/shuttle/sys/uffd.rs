//! userfaultfd: names and outcomes as on Linux, answers of the model.

use crate::addr::{PAGE_SIZE, PageRange};
use crate::kernel;
use crate::sys::event::{Doorbell, Ready};
use std::time::Duration;
use std::{fmt, io};

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
        f.write_str("the model opens every userfaultfd")
    }
}

#[derive(Debug)]
pub(crate) struct Uffd {
    id: usize,
    enabled: Features,
    scope: FaultScope,
}

#[allow(
    clippy::missing_safety_doc,
    reason = "the contracts are those of Linux; model memory can be changed at will"
)]
impl Uffd {
    pub(crate) fn id(&self) -> usize {
        self.id
    }

    pub(crate) fn probe(_: FaultScope) -> Result<Features, OpenError> {
        Ok(kernel::features())
    }

    pub(crate) fn open(scope: FaultScope, wanted: Features) -> Result<Self, OpenError> {
        if scope == FaultScope::UserAndKernel {
            return Err(OpenError);
        }
        let enabled = wanted.intersection(kernel::features());
        Ok(Self {
            id: kernel::with(|kernel| kernel.open(enabled)),
            enabled,
            scope,
        })
    }

    pub(crate) unsafe fn disown_in_child(&self) {}

    pub(crate) fn enabled(&self) -> Features {
        self.enabled
    }

    pub(crate) fn scope(&self) -> FaultScope {
        self.scope
    }

    pub(crate) unsafe fn register(&self, range: PageRange, mode: Mode) -> io::Result<()> {
        kernel::register(self.id, range, mode).map_err(io::Error::from_raw_os_error)
    }

    pub(crate) fn unregister(&self, range: PageRange) -> io::Result<()> {
        kernel::unregister(self.id, range).map_err(io::Error::from_raw_os_error)
    }

    pub(crate) fn wake(&self, range: PageRange) {
        kernel::wake(self.id, range);
    }

    pub(crate) unsafe fn copy(
        &self,
        dst: PageRange,
        src: usize,
        protect: Protect,
        _: Wake,
    ) -> Moved {
        self.each("COPY", dst, |kernel, id, page| {
            kernel.copy_one(id, page, src + (page - dst.start()), protect)
        })
    }

    pub(crate) unsafe fn zeropage(&self, dst: PageRange, _: Wake) -> Moved {
        self.each("ZEROPAGE", dst, kernel::Kernel::zero_one)
    }

    pub(crate) unsafe fn move_pages(&self, dst: PageRange, src: usize, _: Wake) -> Moved {
        if let Err(stop) = kernel::with(|kernel| kernel.may_move(self.id, dst, src)) {
            return Moved { bytes: 0, stop };
        }
        self.each("MOVE", dst, |kernel, id, page| {
            kernel.move_one(id, page, src + (page - dst.start()))
        })
    }

    pub(crate) fn write_protect(&self, range: PageRange) -> Stop {
        self.each("PROTECT", range, |kernel, id, page| {
            kernel.protect_one(id, page, true)
        })
        .stop
    }

    pub(crate) fn write_unprotect(&self, range: PageRange, _: Wake) -> Stop {
        self.each("UNPROTECT", range, |kernel, id, page| {
            kernel.protect_one(id, page, false)
        })
        .stop
    }

    pub(crate) unsafe fn poison(&self, dst: PageRange, _: Wake) -> Moved {
        self.each("POISON", dst, kernel::Kernel::poison_one)
    }

    pub(crate) fn has_message(&self) -> bool {
        kernel::has_message(self.id)
    }

    pub(crate) fn poll(&self, _: &Doorbell, timeout: Option<Duration>) -> Ready {
        kernel::poll(self.id, timeout)
    }

    /// One call on `range`: page after page, others running in between, up to the first that stops it.
    fn each(
        &self,
        what: &'static str,
        range: PageRange,
        mut step: impl FnMut(&mut kernel::Kernel, usize, usize) -> Result<(), Stop>,
    ) -> Moved {
        let mut stop = Stop::Complete;
        let mut done = 0;
        for page in (range.start()..range.end()).step_by(PAGE_SIZE) {
            kernel::point();
            if let Err(why) = kernel::with(|kernel| {
                let result = step(kernel, self.id, page);
                kernel.note(what, page, result.err());
                result
            }) {
                stop = why;
                break;
            }
            done += PAGE_SIZE;
        }
        if done > 0
            && let Some(part) = PageRange::new(range.start(), range.start() + done)
        {
            kernel::wake(self.id, part);
        }
        Moved { bytes: done, stop }
    }
}
