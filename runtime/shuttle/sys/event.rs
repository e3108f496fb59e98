//! Messages of a userfaultfd.

use crate::addr::PageRange;
use crate::kernel;
use crate::sys::uffd::Uffd;
use std::io;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) message: bool,
    pub(crate) doorbell: bool,
    pub(crate) broken: bool,
}

/// Nobody rings in a model.
#[derive(Debug)]
pub(crate) struct Doorbell;

impl Doorbell {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self)
    }

    pub(crate) fn silence(&self) -> bool {
        false
    }
}

#[derive(Debug, Clone, Copy)]
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
    Fork(()),
    Unknown(u8),
}

#[derive(Debug)]
pub(crate) struct EventBuffer<const N: usize>(Option<Event>);

impl<const N: usize> EventBuffer<N> {
    pub(crate) const fn new() -> Self {
        Self(None)
    }

    /// Reads one message.
    pub(crate) fn fill(&mut self, uffd: &Uffd) -> io::Result<usize> {
        self.0 = kernel::read_message(uffd.id());
        match self.0 {
            Some(_) => Ok(1),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl<const N: usize> Iterator for EventBuffer<N> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.0.take()
    }
}
