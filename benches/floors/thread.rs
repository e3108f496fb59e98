//! F3: a thread that polls, reads one message and makes one ioctl.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Result;

use super::inline::{Memory, arm, turns};
use super::raw::{Area, Faults, Uffd};
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

/// The thread, until it is dropped.
#[derive(Debug)]
struct Service {
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

impl Service {
    /// Reads the faults of `fd`, which `resolve` keeps open, at `place`, and calls it with the address of each.
    fn start(fd: i32, place: Place, resolve: impl Fn(usize) + Send + 'static) -> Self {
        // SAFETY: eventfd takes no pointers.
        let stop = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        assert!(stop >= 0, "no eventfd");
        // SAFETY: a descriptor just made, which nobody else knows.
        let stop = Arc::new(unsafe { OwnedFd::from_raw_fd(stop) });
        let thread = std::thread::spawn({
            let stop = stop.clone();
            move || {
                match place {
                    Place::Free => machine::unpin(),
                    Place::Pinned(cpu) => machine::pin_to_cpu(cpu),
                }
                serve(fd, &stop, resolve);
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

fn serve(fd: i32, stop: &OwnedFd, resolve: impl Fn(usize)) {
    let event = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        let mut fds = [event(fd), event(stop.as_raw_fd())];
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
        let read = unsafe { libc::read(fd, (&raw mut message).cast(), size_of::<Message>()) };
        if read > 0 {
            resolve(message.address as usize);
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let one = 1_u64;
        // SAFETY: eight bytes of an initialised integer, as an eventfd wants them.
        unsafe { libc::write(self.stop.as_raw_fd(), (&raw const one).cast(), 8) };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub struct Reader {
    pair: Arc<Pair>,
    job: Job,
    granule: usize,
    _service: Service,
}

impl Reader {
    /// `len` bytes, of which a fault resolves `granule`, by a reader at `place`.
    ///
    /// # Panics
    /// If there is no descriptor or thread to be had.
    #[must_use]
    pub fn new(job: Job, len: usize, granule: usize, place: Place) -> Self {
        let pair = Arc::new(Pair::new(len, Faults::Message, false));
        let resolve = {
            let pair = pair.clone();
            move |addr| pair.resolve(job, addr, granule)
        };
        Self {
            _service: Service::start(pair.uffd.fd(), place, resolve),
            pair,
            job,
            granule,
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

/// Some areas of one userfaultfd: the memory, and what stands for a window.
#[derive(Debug)]
struct Areas {
    uffd: Uffd,
    areas: Vec<[Area; 2]>,
}

impl Areas {
    fn new(nr: usize, len: usize) -> Self {
        let uffd = Uffd::open(Faults::Message);
        let areas = (0..nr).map(|_| {
            let [host, frames] = [Area::new(len, false), Area::new(len, false)];
            host.populate();
            uffd.register(&host, true);
            uffd.register(&frames, false);
            [host, frames]
        });
        let areas = areas.collect();
        Self { uffd, areas }
    }

    /// Moves the granule around `addr` home.
    fn bring_home(&self, addr: usize, granule: usize) {
        let of_fault =
            |[host, _]: &&[Area; 2]| (host.addr()..host.addr() + host.len()).contains(&addr);
        if let Some([host, frames]) = self.areas.iter().find(of_fault) {
            let start = addr & !(granule - 1);
            let frame = frames.addr() + (start - host.addr());
            self.uffd.move_pages(start, frame, granule);
        }
    }
}

/// F5 and F3 by turns, on as many threads, with one userfaultfd and one reader for all: as
/// [`inline::ThereAndBack`](super::inline::ThereAndBack) is of F5 and F2.
#[derive(Debug)]
pub struct ThereAndBack {
    areas: Arc<Areas>,
    /// Bytes that one thread goes through.
    part: usize,
    granule: usize,
    _service: Service,
}

impl ThereAndBack {
    /// `threads` threads with `part` bytes each.
    ///
    /// # Panics
    /// If there is no descriptor or thread to be had.
    #[must_use]
    pub fn new(memory: Memory, threads: usize, part: usize, granule: usize) -> Self {
        let (nr, len) = memory.areas(threads, part);
        let areas = Arc::new(Areas::new(nr, len));
        let resolve = {
            let areas = areas.clone();
            move |addr| areas.bring_home(addr, granule)
        };
        Self {
            _service: Service::start(areas.uffd.fd(), Place::Free, resolve),
            areas,
            part,
            granule,
        }
    }
}

impl Subject for ThereAndBack {
    fn arm(&mut self) -> Result<()> {
        Ok(())
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let Areas { uffd, areas } = &*self.areas;
        let areas = areas.iter().map(|[host, frames]| (uffd, host, frames));
        turns(areas, self.part, self.granule, samples)
    }
}
