//! The least of io_uring: a registered buffer, and a read into it.

use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

/// A ring that holds one buffer.
pub(crate) struct Ring {
    fd: i32,
    rings: usize,
    entries: usize,
    params: Params,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: [u32; 8],
    // head, tail, ring_mask, ring_entries, flags, dropped, array, reserved, user_addr
    sq: [u32; 10],
    // head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved, user_addr
    cq: [u32; 10],
}

#[repr(C)]
#[derive(Default)]
struct Entry {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    offset: u64,
    addr: u64,
    len: u32,
    rw_flags: u32,
    user_data: u64,
    buf_index: u16,
    personality: u16,
    splice_fd: i32,
    rest: [u64; 2],
}

const _: () = assert!(size_of::<Params>() == 120 && size_of::<Entry>() == 64);

fn map(fd: i32, len: usize, offset: i64) -> usize {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: a fresh mapping of the ring's own memory.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, prot, flags, fd, offset) };
    assert_ne!(at, libc::MAP_FAILED);
    at.expose_provenance()
}

impl Ring {
    /// A ring with the buffer registered; `None` where the kernel has no io_uring, or gives none.
    pub(crate) fn holding(addr: usize, len: usize) -> Option<Self> {
        let mut params = Params::default();
        // SAFETY: the kernel fills `params`.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, &raw mut params) };
        let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0)?;
        let buffer = libc::iovec {
            iov_base: ptr::with_exposed_provenance_mut(addr),
            iov_len: len,
        };
        // SAFETY: operation 0 registers buffers; the kernel holds the pages until the descriptor is closed.
        let held =
            unsafe { libc::syscall(libc::SYS_io_uring_register, fd, 0, &raw const buffer, 1) };
        assert_eq!(held, 0, "{}", std::io::Error::last_os_error());
        Some(Self {
            fd,
            rings: map(fd, 4096, 0),
            entries: map(fd, 4096, 0x1000_0000),
            params,
        })
    }

    fn word(&self, at: u32) -> &AtomicU32 {
        // SAFETY: a word of the rings, which are one mapping of less than a page for so few entries.
        unsafe { AtomicU32::from_ptr(ptr::with_exposed_provenance_mut(self.rings + at as usize)) }
    }

    /// Has the kernel write `value` to the start of the buffer, through its own hold on it.
    pub(crate) fn read_into(&self, addr: usize, value: u64) {
        const READ_FIXED: u8 = 4;
        const GETEVENTS: u32 = 1;
        let mut pipe = [0; 2];
        // SAFETY: two descriptors are written.
        assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
        // SAFETY: eight bytes of a value on the stack.
        let written = unsafe { libc::write(pipe[1], (&raw const value).cast(), 8) };
        assert_eq!(written, 8);
        let entry = Entry {
            opcode: READ_FIXED,
            fd: pipe[0],
            offset: u64::MAX,
            addr: addr as u64,
            len: 8,
            ..Entry::default()
        };
        // SAFETY: the first entry, in a mapping of four.
        unsafe { ptr::with_exposed_provenance_mut::<Entry>(self.entries).write(entry) };
        self.word(self.params.sq[6]).store(0, Ordering::Relaxed);
        // Release: the kernel sees the entry with the tail.
        self.word(self.params.sq[1]).store(1, Ordering::Release);
        // SAFETY: no pointers.
        let taken =
            unsafe { libc::syscall(libc::SYS_io_uring_enter, self.fd, 1, 1, GETEVENTS, 0, 0) };
        assert_eq!(taken, 1);
        // Acquire: pairs with the kernel's store of the tail.
        assert_eq!(self.word(self.params.cq[1]).load(Ordering::Acquire), 1);
        // The first completion: its user data, and then the result.
        let result = self.word(self.params.cq[5] + 8).load(Ordering::Relaxed);
        assert_eq!(result, 8, "errno {}", result.cast_signed());
        for fd in pipe {
            // SAFETY: opened here.
            unsafe { libc::close(fd) };
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for at in [self.rings, self.entries] {
            // They hold the ring as the descriptor does.
            // SAFETY: a page that `holding` mapped, and nobody refers to any more.
            unsafe { libc::munmap(ptr::with_exposed_provenance_mut(at), 4096) };
        }
        // SAFETY: opened by `holding`.
        unsafe { libc::close(self.fd) };
    }
}
