//! [`Door`]: a userfaultfd, how faults on it are delivered, and the movements it can make.
//!
//! There are at most two per process, one per [`Delivery`], and they live as long as the process: closing a uffd releases
//! every waiter to read zeros (design rule 2). Each has its own regions, windows and scratch areas, for a page can only be
//! moved safely within one userfaultfd (hazards M1).

use core::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::addr::{PAGE_SIZE, PageRange, page_floor};
use crate::error::{Error, ErrorKind, Result};
use crate::options::Delivery;
use crate::sync::{Copier, Copiers};
use crate::sys::event::Doorbell;
use crate::sys::uffd::{FaultScope, Features, Mode, Moved, Protect, Stop, Uffd, Wake};
use crate::sys::{mmap, process};

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Door {
    uffd: Uffd,
    delivery: Delivery,
    /// Of the process that the descriptor is of.
    pid: u32,
    disowned: AtomicBool,
    /// Has the reader look again at what is pending.
    doorbell: Doorbell,
    copiers: Copiers,
}

/// What a range is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The body of a region: missing and write-protect faults.
    Body,
    /// A window: missing faults, which only a late access raises ([`crate::overrun`]). Where there is no MOVE, protection too.
    Window,
    /// A scratch area: missing faults, none of which should ever come.
    Scratch,
}

impl Door {
    /// Inline, unless the kernel does not deliver faults that way.
    pub(crate) fn usual_delivery() -> Delivery {
        const UNKNOWN: u8 = 0;
        const INLINE: u8 = 1;
        const THREAD: u8 = 2;
        // Threads that ask first at once find the same. Not a lock: in a child forked meanwhile nobody would ever give it back.
        static USUAL: AtomicU8 = AtomicU8::new(UNKNOWN);
        if USUAL.load(Ordering::Relaxed) == UNKNOWN {
            let usual = match Uffd::probe(FaultScope::UserMode) {
                Ok(has) if !has.contains(Features::SIGBUS) => THREAD,
                _ => INLINE,
            };
            USUAL.store(usual, Ordering::Relaxed);
        }
        if USUAL.load(Ordering::Relaxed) == THREAD {
            Delivery::Thread
        } else {
            Delivery::Inline
        }
    }

    /// Opens a userfaultfd for `delivery`, with faults of the kernel where this process may have them.
    pub(crate) fn open(operation: &'static str, delivery: Delivery) -> Result<Self> {
        let mut wanted = Features::PAGEFAULT_FLAG_WP | Features::MOVE | Features::POISON;
        match delivery {
            Delivery::Inline => wanted |= Features::SIGBUS,
            Delivery::Thread => wanted |= Features::EXACT_ADDRESS | Features::THREAD_ID,
        }
        wanted |= Features::EVENT_REMAP | Features::EVENT_UNMAP;
        let probed = Uffd::probe(FaultScope::UserMode);
        if let Err(error) = &probed
            && let errno @ Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM) = error.syscall_errno()
        {
            // Not to be taken for a kernel without: the door lasts as long as the process.
            return Err(exhausted(operation, errno));
        }
        if probed.is_ok_and(|has| has.contains(Features::MOVE)) {
            // Without MOVE our own discards are `madvise`, which would wait for our own reader (hazards M4).
            wanted |= Features::EVENT_REMOVE;
        }
        let scopes: &[FaultScope] = match delivery {
            // In SIGBUS mode the kernel's own accesses fail in any case.
            Delivery::Inline => &[FaultScope::UserMode],
            Delivery::Thread => &[FaultScope::UserAndKernel, FaultScope::UserMode],
        };
        let mut refused = None;
        for &scope in scopes {
            match Uffd::open(scope, wanted) {
                Ok(uffd) => return Self::checked(operation, uffd, delivery),
                Err(error) => {
                    let errno = error.syscall_errno();
                    if matches!(errno, Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) {
                        return Err(exhausted(operation, errno));
                    }
                    refused = Some(error);
                }
            }
        }
        let why = refused.map_or_else(String::new, |error| format!("{error}; {}", error.help()));
        let why = format!("no userfaultfd: {why}");
        Err(Error::new(operation, ErrorKind::Unsupported(why)))
    }

    fn checked(operation: &'static str, uffd: Uffd, delivery: Delivery) -> Result<Self> {
        let mut needed = Features::PAGEFAULT_FLAG_WP;
        if delivery == Delivery::Inline {
            needed |= Features::SIGBUS;
        }
        if !uffd.enabled().contains(needed) {
            let missing = needed - uffd.enabled();
            let lacks = if missing.contains(Features::PAGEFAULT_FLAG_WP) {
                "write-protect pages; Linux 5.7 can, on x86-64"
            } else {
                "deliver faults as SIGBUS; Linux 4.14 can, and Delivery::Thread needs no such thing"
            };
            let why = format!("userfaultfd cannot {lacks} (unless SVM_DISABLE says not to use it)");
            return Err(Error::new(operation, ErrorKind::Unsupported(why)));
        }
        let failed = |e: std::io::Error| {
            Error::new(operation, ErrorKind::System).errno(e.raw_os_error().unwrap_or(0))
        };
        Ok(Self {
            uffd,
            delivery,
            doorbell: Doorbell::new().map_err(failed)?,
            pid: std::process::id(),
            disowned: AtomicBool::new(false),
            copiers: Copiers::new(),
        })
    }

    pub(crate) fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Has the reader look again at what is pending: it would otherwise do so within a millisecond.
    pub(crate) fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    pub(crate) fn delivery(&self) -> Delivery {
        self.delivery
    }

    /// In the child of a fork: the descriptor was the parent's, and an ioctl on it would reach the parent's memory.
    pub(crate) fn disown_in_child(&self) {
        self.disowned.store(true, Ordering::Relaxed);
        // SAFETY: in the child's handler, where no other thread exists that could be using the descriptor.
        unsafe { self.uffd.disown_in_child() };
    }

    /// Whether this door was left behind by a fork: windows behind it are not mapped here.
    #[inline]
    pub(crate) fn is_disowned(&self) -> bool {
        self.disowned.load(Ordering::Relaxed)
    }

    /// Whether pages can be moved, or must be copied.
    #[inline]
    pub(crate) fn has_move(&self) -> bool {
        self.uffd.enabled().contains(Features::MOVE)
    }

    /// Whether system calls that touch an absent page wait for it instead of failing.
    pub(crate) fn is_transparent(&self) -> bool {
        self.delivery == Delivery::Thread && self.uffd.scope() == FaultScope::UserAndKernel
    }

    /// Whether changes of the mappings arrive as events.
    pub(crate) fn has_events(&self) -> bool {
        self.uffd
            .enabled()
            .intersects(Features::EVENT_REMAP | Features::EVENT_UNMAP | Features::EVENT_REMOVE)
    }

    /// Whether the removal of pages arrives as an event.
    pub(crate) fn hears_of_removal(&self) -> bool {
        self.uffd.enabled().contains(Features::EVENT_REMOVE)
    }

    /// Whether the unmapping and the moving of mappings arrive as events.
    pub(crate) fn hears_of_unmapping(&self) -> bool {
        self.uffd
            .enabled()
            .contains(Features::EVENT_UNMAP | Features::EVENT_REMAP)
    }

    /// Whether a fault or an event waits to be read.
    pub(crate) fn has_message(&self) -> bool {
        self.uffd.has_message()
    }

    /// Whether a mapping has changed whose event is unread, or whose cause has not run since. `elsewhere` is a page of ours that
    /// is registered with nobody.
    pub(crate) fn is_changing(&self, elsewhere: usize) -> bool {
        // The kernel looks for a change first, and only then finds that there is nothing to do.
        self.unprotect(elsewhere, PAGE_SIZE) == Stop::Changing
    }

    /// Makes an access to a missing page fail, now and later; false if that cannot be, or the page is not missing any more.
    pub(crate) fn poison(&self, page: usize) -> bool {
        PageRange::from_pages(page, 1).is_some_and(|range| {
            // SAFETY: `crate::monitor`, the only caller, has read a fault on the page from this descriptor, which it is registered with.
            self.can_poison() && unsafe { self.uffd.poison(range, Wake::Yes) }.is_complete()
        })
    }

    /// Whether the kernel can do so.
    pub(crate) fn can_poison(&self) -> bool {
        self.uffd.enabled().contains(Features::POISON)
    }

    /// Index of this door, below 2.
    pub(crate) fn index(&self) -> usize {
        index_of(self.delivery)
    }

    /// Takes charge of the faults of `range`. `Err` gives the errno.
    pub(crate) fn register(&self, range: PageRange, role: Role) -> Result<(), i32> {
        let mode = match role {
            Role::Body => Mode::MISSING | Mode::WP,
            Role::Window if !self.has_move() => Mode::MISSING | Mode::WP,
            Role::Window | Role::Scratch => Mode::MISSING,
        };
        // SAFETY: a body is memory that a mirror has borrowed or that its maker answers for (`mirror_raw`), published
        // before this call, so that its faults are resolved; a window or scratch area is our own reservation.
        unsafe { self.uffd.register(range, mode) }
            .map(drop)
            .map_err(|e| e.raw_os_error().unwrap_or(libc::EINVAL))
    }

    /// Gives the faults of `range` back to the kernel.
    pub(crate) fn unregister(&self, range: PageRange) {
        // Fails only where part of the range is no longer what it was; then the rest has no faults of ours either.
        let _ = self.uffd.unregister(range);
    }

    /// Whether somebody may sleep in a fault: behind the inline door each gets its signal at once, and there is nobody to look for.
    #[inline]
    fn wakes(&self) -> Wake {
        match self.delivery {
            Delivery::Inline => Wake::No,
            Delivery::Thread => Wake::Yes,
        }
    }

    /// Moves `len` bytes of pages.
    #[inline]
    pub(crate) fn move_pages(&self, dst: usize, src: usize, len: usize) -> Moved {
        meddled!(Move, len, |len| self.move_whole(dst, src, len))
    }

    #[inline]
    fn move_whole(&self, dst: usize, src: usize, len: usize) -> Moved {
        let Some(dst) = PageRange::new(dst, dst + len) else {
            return Moved {
                bytes: 0,
                stop: Stop::Invalid,
            };
        };
        // SAFETY: `crate::movement`, `crate::round` and `crate::release`, the only callers, move between bodies, windows and
        // scratch areas, all of which `register` answers for.
        unsafe { self.uffd.move_pages(dst, src, self.wakes()) }
    }

    /// Asks whether the page at `addr` is registered with this door's descriptor, which of all calls MOVE alone looks at: `Invalid` if not, or
    /// where there is no MOVE, or where it refuses the mapping for another reason (not writable, locked). `hole` is an
    /// empty page, so nothing comes of it: where `addr` is empty, too, the answer is `NotPresent`, and `Exists` where it is not.
    pub(crate) fn ask(&self, addr: usize, hole: usize) -> Stop {
        let page = PageRange::from_pages(page_floor(addr), 1);
        let Some(page) = page.filter(|_| self.has_move()) else {
            return Stop::Invalid;
        };
        // SAFETY: nothing moves, for there is nothing at `hole`; or a page of zeros, to one that reads as zeros, for it is in no place.
        unsafe { self.uffd.move_pages(page, hole, self.wakes()) }.stop
    }

    /// Fills `len` bytes of missing pages with copies.
    pub(crate) fn copy(&self, dst: usize, src: usize, len: usize, protect: Protect) -> Moved {
        let whole = |len| {
            let Some(dst) = PageRange::new(dst, dst + len) else {
                return Moved {
                    bytes: 0,
                    stop: Stop::Invalid,
                };
            };
            // SAFETY: `crate::movement` fills pages of bodies and windows, and `crate::fault` those of what has grown behind bodies: they
            // are registered with this door's descriptor, and `register` answers for them.
            unsafe { self.uffd.copy(dst, src, protect, self.wakes()) }
        };
        meddled!(Copy, len, whole)
    }

    /// Copies `len` bytes over pages that are there; says how many bytes of whole pages it came to. Not where the kernel's
    /// accesses wait for a monitor.
    pub(crate) fn copy_over(&self, dst: usize, src: usize, len: usize) -> usize {
        debug_assert!(!self.is_transparent());
        // SAFETY: `crate::movement`, the only caller, copies over stale pages of windows, which nobody refers to.
        let copied = unsafe { process::copy_from_self(self.pid, dst, src, len) };
        copied.unwrap_or(0) & !(crate::addr::PAGE_SIZE - 1)
    }

    /// Before a copy from `pages` of the application, of one block, which is locked: `Err` if it must be tried later. See
    /// `sync/copiers.rs`.
    pub(crate) fn begin_copy_from(
        &self,
        pages: Option<PageRange>,
    ) -> core::result::Result<Option<Copier<'_>>, Stop> {
        match pages.filter(|_| self.is_transparent()) {
            Some(pages) => self.copiers.begin(pages).map(Some).ok_or(Stop::Changing),
            None => Ok(None),
        }
    }

    /// Has copies go on that wait for somebody to bring a page which has left.
    pub(crate) fn let_copiers_go_on(&self, is_there: impl Fn(usize) -> bool) {
        self.copiers
            .let_go_on(is_there, |page| self.unregister(page));
    }

    /// Fills `len` bytes of missing pages with the shared page of zeros.
    pub(crate) fn zeropage(&self, dst: usize, len: usize) -> Moved {
        let Some(dst) = PageRange::new(dst, dst + len) else {
            return Moved {
                bytes: 0,
                stop: Stop::Invalid,
            };
        };
        // SAFETY: as `copy`.
        unsafe { self.uffd.zeropage(dst, self.wakes()) }
    }

    /// Write-protects present pages.
    pub(crate) fn protect(&self, at: usize, len: usize) -> Stop {
        PageRange::new(at, at + len).map_or(Stop::Invalid, |range| self.uffd.write_protect(range))
    }

    /// Lifts write-protection, and clears markers.
    pub(crate) fn unprotect(&self, at: usize, len: usize) -> Stop {
        PageRange::new(at, at + len).map_or(Stop::Invalid, |range| {
            self.uffd.write_unprotect(range, self.wakes())
        })
    }

    /// Wakes who waits for faults in the range.
    pub(crate) fn wake(&self, at: usize, len: usize) {
        if let Some(range) = PageRange::new(at, at + len) {
            self.uffd.wake(range);
        }
    }

    /// Drops pages by `madvise`: only for scratch areas outside every lock, and where there is no MOVE.
    /// False if the kernel would not: the pages are as they were.
    #[must_use]
    pub(crate) fn discard(&self, at: usize, len: usize) -> bool {
        PageRange::new(at, at + len).is_some_and(|range| {
            // SAFETY: `crate::movement` and `crate::scratch` discard only stale copies, in windows and scratch areas that
            // are ours, or a CPU page whose current contents a device holds.
            unsafe { mmap::discard(range) }.is_ok()
        })
    }
}

fn exhausted(operation: &'static str, errno: Option<i32>) -> Error {
    Error::new(operation, ErrorKind::OutOfMemory).errno(errno.unwrap_or(libc::ENOMEM))
}

/// Index of the door for `delivery`, below 2.
pub(crate) fn index_of(delivery: Delivery) -> usize {
    match delivery {
        Delivery::Inline => 0,
        Delivery::Thread => 1,
    }
}
