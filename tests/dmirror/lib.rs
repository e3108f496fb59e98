//! `libsvm_dmirror.so`: stands in for the device nodes of the kernel's `lib/test_hmm.c`, by `LD_PRELOAD`.
//!
//! It answers `open` of `/dev/hmm_dmirror0` and `1`, and `ioctl`, `mmap` and `close` of what that gave, by running each
//! operation of `lib/test_hmm_uapi.h` on the calling process's own memory, through `svm`'s public interface. Everything else
//! goes to the kernel as it came: what the process does to its memory is learnt from userfaultfd alone, as in any program.
//! The nodes `2` and `3`, memory that the CPU can reach while the device has it, do not exist here.
//!
//! `SVM_DMIRROR_DELIVERY` is `inline` (the default) or `thread`; `SVM_DMIRROR_GRANULE` is `page`, `big` (the default) or `huge`.
//!
//! The functions that are replaced are also the ones that `svm` itself calls, in a signal handler too. So what they do for
//! descriptors that are not ours is a few loads and the system call.

#![cfg(target_os = "linux")]

mod heap;

use std::ffi::{CStr, c_char, c_int, c_long, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use svm::{Delivery, Granule, Options};
use tests::mm::{Dmirror, Done, Errno, Mm};

const PAGE: usize = 4096;
const MAX_DEVICES: usize = svm::MAX_DEVICES;
/// What may be mapped of a device node.
const NODE_LEN: libc::off_t = 64 << 20;

/// `struct hmm_dmirror_cmd`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Command {
    addr: u64,
    ptr: u64,
    npages: u64,
    cpages: u64,
    faults: u64,
}

const fn iowr(nr: u32) -> u32 {
    3 << 30 | (size_of::<Command>() as u32) << 16 | (b'H' as u32) << 8 | nr
}

const READ: u32 = iowr(0);
const WRITE: u32 = iowr(1);
const MIGRATE_TO_DEV: u32 = iowr(2);
const MIGRATE_TO_SYS: u32 = iowr(3);
const SNAPSHOT: u32 = iowr(4);
const EXCLUSIVE: u32 = iowr(5);
const CHECK_EXCLUSIVE: u32 = iowr(6);
const RELEASE: u32 = iowr(7);
const _: () = assert!(READ == 0xC028_4800);

/// The open devices of one process. One that has forked since leaves its parent's behind.
struct State {
    pid: libc::pid_t,
    /// Opens the door, with the threads and the memory that takes, before the program has anything to mirror.
    _door: svm::Buffer<u8>,
    mm: Arc<Mm>,
    /// The descriptor of each open device, or -1: read in signal handlers.
    fds: [AtomicI32; MAX_DEVICES],
    devices: Mutex<[Option<Arc<Dmirror>>; MAX_DEVICES]>,
}

static STATE: AtomicPtr<State> = AtomicPtr::new(ptr::null_mut());

fn getpid() -> libc::pid_t {
    // SAFETY: no preconditions.
    unsafe { libc::getpid() }
}

/// The state of this process, if it has opened a device.
fn state() -> Option<&'static State> {
    // Acquire pairs with the Release in `make_state`.
    let state = STATE.load(Ordering::Acquire);
    // SAFETY: null, or leaked.
    let state = unsafe { state.cast_const().as_ref() }?;
    (state.pid == getpid()).then_some(state)
}

fn make_state() -> Result<&'static State, Errno> {
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(state) = state() {
        return Ok(state);
    }
    let options = options();
    let state = Box::leak(Box::new(State {
        pid: getpid(),
        _door: svm::Buffer::with_options(1, &options)?,
        mm: Mm::new(&options),
        fds: [const { AtomicI32::new(-1) }; MAX_DEVICES],
        devices: Mutex::default(),
    }));
    STATE.store(ptr::from_mut(state), Ordering::Release);
    Ok(state)
}

fn options() -> Options {
    let word = |name| std::env::var(name).unwrap_or_default();
    let delivery = if word("SVM_DMIRROR_DELIVERY") == "thread" {
        Delivery::Thread
    } else {
        Delivery::Inline
    };
    let granule = match word("SVM_DMIRROR_GRANULE").as_str() {
        "page" => Granule::Page,
        "huge" => Granule::Huge,
        _ => Granule::Big,
    };
    Options::new().delivery(delivery).granule(granule)
}

impl State {
    fn slot_of(&self, fd: c_int) -> Option<usize> {
        self.fds
            .iter()
            .position(|slot| fd >= 0 && slot.load(Ordering::Relaxed) == fd)
    }

    fn device(&self, fd: c_int) -> Option<Arc<Dmirror>> {
        let slot = self.slot_of(fd)?;
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)[slot].clone()
    }

    fn open_device(&self) -> Result<c_int, Errno> {
        let device = Dmirror::new(&self.mm)?;
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"hmm_dmirror".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: our own file.
        if fd < 0 || unsafe { libc::ftruncate(fd, NODE_LEN) } != 0 {
            return Err(Errno(errno()));
        }
        let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = devices.iter().position(Option::is_none) else {
            return Err(Errno(libc::EMFILE));
        };
        devices[slot] = Some(Arc::new(device));
        self.fds[slot].store(fd, Ordering::Relaxed);
        Ok(fd)
    }

    fn close(&self, slot: usize) {
        self.fds[slot].store(-1, Ordering::Relaxed);
        let device = self.devices.lock().unwrap_or_else(PoisonError::into_inner)[slot].take();
        // Brings its pages home, with no lock of ours held.
        drop(device);
    }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn fail(errno: i32) -> c_int {
    // SAFETY: no preconditions.
    let location = unsafe { libc::__errno_location() };
    // SAFETY: the calling thread's errno, valid while the thread lives.
    unsafe { location.write(errno) };
    -1
}

/// Runs one operation. The buffer at `ptr` is the caller's and may be anything: it is only copied from and to.
fn run(device: &Dmirror, request: u32, command: &mut Command) -> Result<(), Errno> {
    let (addr, npages) = (command.addr as usize, command.npages as usize);
    if addr % PAGE != 0 || npages == 0 || npages > 1 << 24 {
        return Err(Errno(libc::EINVAL));
    }
    let user = ptr::with_exposed_provenance_mut::<u8>(command.ptr as usize);
    let mut bounce = vec![0u8; npages * PAGE];
    let mut filled = 0;
    let done: Done = match request {
        READ => {
            filled = bounce.len();
            device.read(addr, &mut bounce)?
        }
        WRITE => {
            // SAFETY: the caller's buffer, as long as the command says.
            unsafe { ptr::copy_nonoverlapping(user, bounce.as_mut_ptr(), bounce.len()) };
            device.write(addr, &bounce)?
        }
        MIGRATE_TO_DEV => {
            filled = bounce.len();
            device.migrate_to_dev(addr, &mut bounce)?
        }
        MIGRATE_TO_SYS => device.migrate_to_sys(addr, npages)?,
        SNAPSHOT => {
            let flags = device.snapshot(addr, npages)?;
            filled = npages;
            bounce[..npages].copy_from_slice(&flags);
            Done {
                cpages: npages,
                faults: 0,
            }
        }
        EXCLUSIVE => {
            filled = bounce.len();
            device.exclusive(addr, &mut bounce)?
        }
        CHECK_EXCLUSIVE => device.check_exclusive(addr, npages)?,
        RELEASE => {
            device.release()?;
            Done {
                cpages: npages,
                faults: 0,
            }
        }
        _ => return Err(Errno(libc::EINVAL)),
    };
    // SAFETY: the caller's buffer, as long as the command says.
    unsafe { ptr::copy_nonoverlapping(bounce.as_ptr(), user, filled) };
    command.cpages = done.cpages as u64;
    command.faults = done.faults as u64;
    Ok(())
}

/// What a path names, if it is one of our nodes.
fn is_node(path: *const c_char) -> bool {
    // SAFETY: `open`'s caller passes a C string.
    let path = unsafe { CStr::from_ptr(path) };
    matches!(path.to_bytes(), b"/dev/hmm_dmirror0" | b"/dev/hmm_dmirror1")
}

/// `open(2)`. The mode is an argument only where a file is made; reading it anyway reads a register.
///
/// # Safety
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    if is_node(path) {
        return make_state()
            .and_then(State::open_device)
            .unwrap_or_else(|Errno(errno)| fail(errno));
    }
    // SAFETY: the caller's arguments.
    unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags, mode) as c_int }
}

/// [`open`], as large-file programs call it.
///
/// # Safety
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    // SAFETY: the caller's arguments.
    unsafe { open(path, flags, mode) }
}

/// `close(2)`.
///
/// # Safety
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    if let Some((state, slot)) = state().and_then(|state| Some((state, state.slot_of(fd)?))) {
        state.close(slot);
    }
    // SAFETY: the caller's argument.
    unsafe { libc::syscall(libc::SYS_close, fd) as c_int }
}

/// `ioctl(2)`.
///
/// # Safety
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: libc::c_ulong, argument: *mut c_void) -> c_int {
    if state().is_some_and(|state| state.slot_of(fd).is_some()) {
        let Some(device) = state().and_then(|state| state.device(fd)) else {
            return fail(libc::EBADF);
        };
        let command: *mut Command = argument.cast();
        // SAFETY: the caller passes a command, which is its own.
        let mut copy = unsafe { command.read() };
        return match run(&device, request as u32, &mut copy) {
            Ok(()) => {
                // SAFETY: as above.
                unsafe { command.write(copy) };
                0
            }
            Err(Errno(errno)) => fail(errno),
        };
    }
    // SAFETY: the caller's arguments.
    unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) as c_int }
}

/// `mmap(2)`. The kernel's driver inserts a page into what is mapped of its node; so it is there at once.
///
/// # Safety
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    addr: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off_t,
) -> *mut c_void {
    // SAFETY: the caller's arguments.
    let at: c_long =
        unsafe { libc::syscall(libc::SYS_mmap, addr, len, protection, flags, fd, offset) };
    let at: *mut c_void = ptr::with_exposed_provenance_mut(at as usize);
    if at != libc::MAP_FAILED && state().is_some_and(|state| state.slot_of(fd).is_some()) {
        // SAFETY: the mapping just made; a read of it changes nothing. Where it fails the caller finds the page absent.
        unsafe { libc::madvise(at, len, libc::MADV_POPULATE_READ) };
    }
    at
}

/// [`mmap`], as large-file programs call it.
///
/// # Safety
/// As the system call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    addr: *mut c_void,
    len: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: libc::off_t,
) -> *mut c_void {
    // SAFETY: the caller's arguments.
    unsafe { mmap(addr, len, protection, flags, fd, offset) }
}
