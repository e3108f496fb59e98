//! Messages of a userfaultfd: faults and events, and the doorbell that ends a wait for them.
//!
//! Reading an event is itself an act: the thread that caused it sleeps until somebody does, and goes on
//! the moment it is read, before the reader's next instruction. What the kernel has done by then differs
//! from event to event:
//!
//! | event | caused by | the page table has changed when it is read |
//! |---|---|---|
//! | [`Remove`](Event::Remove) | madvise DONTNEED, FREE, REMOVE | no: it will, soon |
//! | [`Unmap`](Event::Unmap) | munmap, MAP_FIXED, mremap that shrinks or moves | yes, and the range may be mapped anew |
//! | [`Remap`](Event::Remap) | mremap that moves; an Unmap of the old range follows, but for DONTUNMAP | yes |
//! | [`Fork`](Event::Fork) | fork, clone without CLONE_VM | yes: page tables are copied |
//!
//! `read` returns faults before events.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use userfaultfd_sys::{
    UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP,
    UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, uffd_msg,
};

use super::errno;
use super::uffd::Uffd;
use crate::addr::PageRange;

const _: () = assert!(size_of::<uffd_msg>() == 32);

/// What [`Uffd::poll`] saw.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ready {
    /// A fault or an event waits to be read.
    pub(crate) message: bool,
    /// The doorbell was rung.
    pub(crate) doorbell: bool,
    /// The descriptor will never again deliver anything.
    pub(crate) broken: bool,
}

/// An eventfd that wakes a thread out of [`Uffd::poll`].
#[derive(Debug)]
pub(crate) struct Doorbell(EventFd);

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Doorbell {
    /// Control path.
    ///
    /// # Errors
    ///
    /// `EMFILE` and the like.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_value_and_flags(0, flags)?))
    }

    /// Rings. Fault path: one write(2). It stays rung until [`Doorbell::silence`].
    pub(crate) fn ring(&self) {
        // Fails only where it is rung 2^64 - 2 times already.
        let _ = self.0.write(1);
    }

    /// Stops the ringing, and tells whether there was any.
    pub(crate) fn silence(&self) -> bool {
        self.0.read().is_ok()
    }
}

/// What was read from a descriptor.
#[derive(Debug)]
pub(crate) enum Event {
    /// A thread waits for a page.
    PageFault {
        /// The page, or with EXACT_ADDRESS the address.
        addr: usize,
        /// Whether it wanted to write.
        write: bool,
        /// Whether the page is there, but write-protected.
        wp: bool,
        /// The thread, with THREAD_ID; else 0.
        tid: u32,
    },
    /// madvise *is about to* drop these pages; its caller goes on now that this is read.
    Remove(PageRange),
    /// These pages are unmapped.
    Unmap(PageRange),
    /// The pages of a range are elsewhere.
    Remap {
        /// Where they were.
        from: usize,
        /// Where they are.
        to: usize,
        /// How many bytes (of the old range).
        len: usize,
    },
    /// The process forked; the child's descriptor.
    Fork(#[allow(dead_code, reason = "owned, so that it is closed")] OwnedFd),
    /// A message this version does not know, or one that makes no sense.
    Unknown(#[allow(dead_code, reason = "for whoever debugs it")] u8),
}

/// A buffer of messages, and the iterator over them. Reading and decoding do not allocate.
///
/// With more than one message room is made for several *events* to be read at once, whose callers then
/// all go on; where an event must be applied before the next is read (hazard G5) `N` is 1.
pub(crate) struct EventBuffer<const N: usize> {
    messages: [uffd_msg; N],
    /// `messages[next..filled]` are read and not yet given out.
    next: usize,
    filled: usize,
}

impl<const N: usize> EventBuffer<N> {
    /// An empty buffer.
    pub(crate) const fn new() -> Self {
        // SAFETY: uffd_msg is integers and unions of integers, for which all bytes zero is a value.
        let message = unsafe { std::mem::zeroed::<uffd_msg>() };
        Self {
            messages: [message; N],
            next: 0,
            filled: 0,
        }
    }

    /// Reads what is there, up to `N` messages, and returns how many. Zero: nothing is there (it is
    /// not an error that somebody else was faster). What an earlier `fill` left is dropped.
    ///
    /// # Errors
    ///
    /// `EINVAL` before the handshake; nothing a caller could act on.
    pub(crate) fn fill(&mut self, uffd: &Uffd) -> io::Result<usize> {
        self.by_ref().for_each(drop);
        // SAFETY: the buffer is valid for writes of its size, and any bytes are a value of uffd_msg.
        let bytes = unsafe {
            libc::read(
                uffd.as_fd().as_raw_fd(),
                self.messages.as_mut_ptr().cast(),
                size_of_val(&self.messages),
            )
        };
        let Ok(bytes) = usize::try_from(bytes) else {
            return match errno() {
                libc::EAGAIN | libc::EINTR => Ok(0),
                errno => Err(io::Error::from_raw_os_error(errno)),
            };
        };
        // The kernel returns whole messages only.
        self.filled = bytes / size_of::<uffd_msg>();
        self.next = 0;
        Ok(self.filled)
    }
}

impl<const N: usize> Iterator for EventBuffer<N> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        if self.next == self.filled {
            return None;
        }
        let message = *self.messages.get(self.next)?;
        self.next += 1;
        Some(decode(message))
    }
}

impl<const N: usize> Drop for EventBuffer<N> {
    fn drop(&mut self) {
        // A fork event that nobody took owns a descriptor.
        self.for_each(drop);
    }
}

impl<const N: usize> fmt::Debug for EventBuffer<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBuffer")
            .field("unread", &(self.filled - self.next))
            .finish_non_exhaustive()
    }
}

/// Decodes a message. It must be given each message once: a fork event's descriptor is owned by the
/// result.
fn decode(message: uffd_msg) -> Event {
    let arg = message.arg;
    match message.event {
        UFFD_EVENT_PAGEFAULT => {
            // SAFETY: the kernel fills this member for this event, and every member is plain
            // integers, so that any bytes are a value of it.
            let fault = unsafe { arg.pagefault };
            // SAFETY: the union has one member.
            let tid = unsafe { fault.feat.ptid };
            Event::PageFault {
                addr: fault.address as usize,
                write: fault.flags & UFFD_PAGEFAULT_FLAG_WRITE != 0,
                wp: fault.flags & UFFD_PAGEFAULT_FLAG_WP != 0,
                tid,
            }
        }
        UFFD_EVENT_FORK => {
            // SAFETY: as above.
            let fork = unsafe { arg.fork };
            // SAFETY: reading the event installed this descriptor, and by this function's contract
            // nobody else takes it.
            Event::Fork(unsafe { OwnedFd::from_raw_fd(fork.ufd.cast_signed()) })
        }
        UFFD_EVENT_REMAP => {
            // SAFETY: as above.
            let remap = unsafe { arg.remap };
            Event::Remap {
                from: remap.from as usize,
                to: remap.to as usize,
                len: remap.len as usize,
            }
        }
        kind @ (UFFD_EVENT_REMOVE | UFFD_EVENT_UNMAP) => {
            // SAFETY: as above; both events fill this member.
            let remove = unsafe { arg.remove };
            match PageRange::new(remove.start as usize, remove.end as usize) {
                Some(range) if kind == UFFD_EVENT_REMOVE => Event::Remove(range),
                Some(range) => Event::Unmap(range),
                None => Event::Unknown(kind),
            }
        }
        kind => Event::Unknown(kind),
    }
}
