//! F3: a thread that polls, reads one message and makes one ioctl.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Result;

use super::inline::arm;
use super::raw::Faults;
use super::{Job, Pair};
use crate::harness::{Samples, Subject};
use crate::machine;

/// Where the reader runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Wherever the scheduler likes.
    Free,
    /// On this CPU, the faulter's.
    Pinned(usize),
}

/// See the [module](self).
#[derive(Debug)]
pub struct Reader {
    pair: Arc<Pair>,
    job: Job,
    granule: usize,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// The part of `struct uffd_msg` that a page fault has.
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    tail: u64,
}

impl Reader {
    /// `len` bytes, of which a fault resolves `granule`, by a reader at `place`.
    ///
    /// # Panics
    /// If there is no descriptor or thread to be had.
    #[must_use]
    pub fn new(job: Job, len: usize, granule: usize, place: Place) -> Self {
        let pair = Arc::new(Pair::new(len, Faults::Message, false));
        // SAFETY: eventfd takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        assert!(fd >= 0, "no eventfd");
        // SAFETY: a descriptor just made, which nobody else knows.
        let stop = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        let thread = std::thread::spawn({
            let (pair, stop) = (pair.clone(), stop.clone());
            move || {
                match place {
                    Place::Free => machine::unpin(),
                    Place::Pinned(cpu) => machine::pin_to_cpu(cpu),
                }
                serve(&pair, &stop, job, granule);
            }
        });
        Self {
            pair,
            job,
            granule,
            stop,
            thread: Some(thread),
        }
    }
}

fn serve(pair: &Pair, stop: &OwnedFd, job: Job, granule: usize) {
    let event = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        let mut fds = [event(pair.uffd.fd()), event(stop.as_raw_fd())];
        // SAFETY: an array of two initialised entries.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        if fds[1].revents != 0 {
            return;
        }
        let mut message = Message {
            event: 0,
            reserved: [0; 7],
            flags: 0,
            address: 0,
            tail: 0,
        };
        // SAFETY: the kernel writes at most as many bytes as it is told, which is a whole message of plain integers.
        let read = unsafe {
            libc::read(
                pair.uffd.fd(),
                (&raw mut message).cast(),
                size_of::<Message>(),
            )
        };
        if read > 0 {
            pair.resolve(job, message.address as usize, granule);
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let one = 1_u64;
        // SAFETY: eight bytes of an initialised integer, as an eventfd wants them.
        unsafe { libc::write(self.stop.as_raw_fd(), (&raw const one).cast(), 8) };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Subject for Reader {
    fn arm(&mut self) -> Result<()> {
        arm(&self.pair, self.job);
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        for at in (0..self.pair.host.len()).step_by(self.granule) {
            samples.time(|| self.pair.host.write(at));
        }
        Ok(())
    }
}
