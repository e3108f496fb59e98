//! The SIGBUS handler, and masking signals.
//!
//! # The handler
//!
//! On an uffd with the SIGBUS feature a thread that touches a missing or write-protected page gets
//! SIGBUS, and resolves its own fault in the handler. There is one handler per process, installed once
//! and for ever, with these properties:
//!
//! 1. `SA_ONSTACK`: it runs on the alternate stack where the thread has one (Rust's threads do), and the resolver on one of
//!    ours if that is small ([`super::stack`]).
//! 2. Asynchronous signals are masked while it runs: a handler of theirs that touched mirrored memory
//!    would find the locks taken (hazard S1). Synchronous ones are not, `SA_NODEFER` included: a fault
//!    with its signal blocked kills the process without a word.
//! 3. `errno` is as before when it returns.
//! 4. A SIGBUS *inside our resolver* is our own bug, and would deadlock on the locks it holds: it aborts
//!    with a message. A SIGBUS inside a chained handler is a fault like any other.
//! 5. Only a fault with `BUS_ADRERR` is offered to the resolver, for that is what uffd raises. (So are
//!    accesses beyond the end of a file; and to poison, on kernels without CONFIG_MEMORY_FAILURE.) What
//!    the resolver declines, and everything else (poison, misalignment, kill(2)), goes to whatever was installed before, under the mask
//!    and flags it asked for and on the stack it expects, so that it can't tell it is chained. Where that was the default, the default is restored, and the instruction faults again: the
//!    core dump shows it where it was. An ignored SIGBUS is honoured where one was *sent*; one that was
//!    *raised* by an instruction can't be ignored, and the kernel does not either.
//!
//! # A thread that must not go on
//!
//! A thread that has lost the memory it works on ([`crate::overrun`]) is parked: it sleeps in its handler, for ever, with nothing
//! taken, not even a stack of ours. On a userfaultfd without the SIGBUS feature it sleeps in its fault instead, which a monitor
//! reads; [`send_late`] wakes it with a SIGBUS that says what it was, by a code of our own ([`LATE`]).
//!
//! # How a nested fault is recognised
//!
//! A thread-local flag is not fit: in a shared object that was loaded late the first access allocates.
//! Instead a thread that enters the resolver writes its thread pointer (the register that addresses its
//! thread-locals; unique among living threads, and read by one instruction) to a small hash table. Only
//! the thread itself ever looks for its own pointer, so nothing orders the accesses but program order.
//! If more than [`BUCKET_LEN`] threads are in the resolver *and* hash to one bucket the surplus goes
//! unguarded. The table is wiped in a forked child, where the threads in it do not exist.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicUsize,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use bytemuck::Zeroable;

use super::mmap::{Advice, MapBox, advise};
use super::process::abort_with_message;
use super::stack::Stacks;
use super::{check, errno, set_errno};

/// What the kernel says about a SIGBUS.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BusFault {
    /// The address that was accessed, exactly.
    pub(crate) addr: usize,
    /// What the access was, where the platform tells.
    pub(crate) access: Access,
    /// The instruction that faulted; 0 where unknown.
    pub(crate) pc: usize,
    /// The stack pointer at that instruction; 0 where unknown.
    pub(crate) sp: usize,
    /// Whether it is a monitor that says so, of a fault in which the thread slept.
    pub(crate) late: bool,
}

/// What an access wanted, and what it found. Where it is unknown the page's own state decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// A read of a page that is not there.
    ReadMissing,
    /// A write to a page that is not there.
    WriteMissing,
    /// A write to a page that is there, and protected.
    WriteProtected,
    /// The platform does not tell.
    Unknown,
}

/// What the resolver made of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Run the instruction again.
    Resolved,
    /// Not ours: the handler that was there before is called.
    NotOurs,
    /// The thread never runs again.
    Park,
}

/// Resolves faults. It runs under the fault-path law ([`super`]).
pub(crate) type Resolver = fn(&BusFault) -> Verdict;

/// What the handler needs; written once, before the handler can run.
struct Installed {
    resolver: Resolver,
    previous: libc::sigaction,
    /// Whether `previous` was used up (`SA_RESETHAND`).
    previous_spent: AtomicBool,
    resolving: &'static Resolving,
    stacks: Stacks,
}

/// Null at first. Not a `OnceLock`: in a child forked while it is written nobody would ever finish that.
static INSTALLED: AtomicPtr<Installed> = AtomicPtr::new(std::ptr::null_mut());

fn installed() -> Option<&'static Installed> {
    // Acquire pairs with the Release in `install`.
    let installed = INSTALLED.load(Acquire);
    // SAFETY: null, or a leaked box that is never freed.
    unsafe { installed.cast_const().as_ref() }
}

/// Whether the kernel calls the handler: a fork may come between that and [`INSTALLED`], and its child has to go on from there.
static ARMED: AtomicBool = AtomicBool::new(false);

/// In a forked child, before it uses anything here. Async-signal-safe.
///
/// The fork copies the table of actions before the memory (`copy_process` in `kernel/fork.c`), so what another thread did between is noted in
/// the child, and not done. An action that is neither ours nor one from before it is taken for one that was installed after ours and
/// calls it: there is no telling.
pub(crate) fn enter_child() {
    let Some(installed) = installed() else {
        return;
    };
    let before = [
        installed.previous.sa_sigaction,
        libc::SIG_DFL,
        libc::SIG_IGN,
    ];
    if before.contains(&current_action().sa_sigaction) {
        // Whoever is to be called after ours stays who it was: a handler that is installed here before ours is installed again may have
        // saved ours once, and would be called by what it calls. Relaxed: there is no other thread.
        ARMED.store(false, Relaxed);
    }
}

/// Installs the handler. Control path. Idempotent: a second call must name the same resolver.
///
/// # Errors
///
/// `ENOMEM`; `AlreadyExists` if another resolver is installed.
pub(crate) fn install(resolver: Resolver) -> io::Result<()> {
    if let Some(installed) = installed() {
        return if std::ptr::fn_addr_eq(installed.resolver, resolver) {
            arm()
        } else {
            Err(io::ErrorKind::AlreadyExists.into())
        };
    }
    let table = MapBox::<Resolving>::zeroed()?;
    if let Some(pages) = MapBox::pages(&table) {
        advise(pages, Advice::WipeOnFork)?;
    }
    let resolving = MapBox::leak(table);
    let stacks = Stacks::new()?;
    // The previous action is read before ours is installed, so that a SIGBUS in the first instant
    // finds it. (Another library that installs its own between the two steps is lost; sigaction(2) has
    // no compare-and-swap.)
    let new = MapBox::leak(MapBox::new(Installed {
        resolver,
        previous: current_action(),
        previous_spent: AtomicBool::new(false),
        resolving,
        stacks,
    })?);
    // If another thread was first it is that one's; whether that has had the kernel call the handler is seen there.
    let _ = INSTALLED.compare_exchange(std::ptr::null_mut(), new, AcqRel, Acquire);
    install(resolver)
}

/// Has the kernel call the handler, once.
fn arm() -> io::Result<()> {
    // Acquire pairs with the Release below. Two threads that both find it not done install the same handler.
    if ARMED.load(Acquire) {
        return Ok(());
    }
    let mut action = zeroed_action();
    action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
    action.sa_mask = asynchronous_signals();
    // SAFETY: `action` is initialised and outlives the call. The handler keeps the rules in the module
    // documentation: it is async-signal-safe if its resolver is, which `Resolver` demands.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    check(libc::c_long::from(result))?;
    ARMED.store(true, Release);
    Ok(())
}

#[cfg(test)]
/// Whether our handler is the one that SIGBUS calls now. Another library may have replaced it since;
/// it may call ours in turn, or not.
pub(crate) fn is_installed() -> bool {
    current_action().sa_sigaction == on_sigbus as *const () as libc::sighandler_t
}

fn zeroed_action() -> libc::sigaction {
    // SAFETY: sigaction is integers, a set of integers and an optional function: zero is a value.
    unsafe { std::mem::zeroed() }
}

fn current_action() -> libc::sigaction {
    let mut action = zeroed_action();
    // SAFETY: with a null new action, sigaction(2) writes the current one to `action`; it can't fail
    // for SIGBUS.
    unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut action) };
    action
}

/// The handler itself.
extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let saved_errno = errno();
    // `install` wrote it before the handler could run.
    let Some(installed) = installed() else {
        abort_with_message(format_args!("SIGBUS before its handler was installed"));
    };
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo_t that lives as long as this frame, and that
    // nobody writes before the chained handler runs.
    let details = unsafe { &*info };
    let code = details.si_code;
    let verdict = if code == libc::BUS_ADRERR || code == LATE {
        let context: *mut libc::ucontext_t = context.cast();
        let fault = if code == LATE {
            late_fault(details)
        } else {
            // SAFETY: for SIGBUS with a positive code the kernel fills in the address.
            let addr = unsafe { details.si_addr() }.addr();
            // SAFETY: with SA_SIGINFO the third argument is the interrupted context, valid for this frame.
            unsafe { decode(addr, context) }
        };
        let addr = fault.addr;
        // SAFETY: as above; the kernel says there which alternate stack the thread has.
        let alternate = unsafe { &(*context).uc_stack };
        let resolve = || {
            installed
                .stacks
                .with_room(alternate, || (installed.resolver)(&fault))
        };
        match installed.resolving.enter(thread_pointer()) {
            Entered::Nested => abort_with_message(format_args!(
                "a page fault at {addr:#x} inside the page-fault resolver (pc {:#x}, sp {:#x}): \
                 the runtime touched mirrored memory while it held its locks",
                fault.pc, fault.sp
            )),
            Entered::As(slot) => {
                let verdict = resolve();
                slot.store(0, Relaxed);
                verdict
            }
            Entered::Unguarded => resolve(),
        }
    } else {
        Verdict::NotOurs
    };
    if verdict == Verdict::Park {
        park();
    }
    if verdict == Verdict::NotOurs {
        // SAFETY: the arguments are the kernel's, unchanged.
        unsafe { chain(installed, code, info, context) };
    }
    set_errno(saved_errno);
}

/// Sleeps for ever. Asynchronous signals are masked here, and what libc sends its threads returns.
fn park() -> ! {
    loop {
        // SAFETY: no preconditions; async-signal-safe.
        unsafe { libc::pause() };
    }
}

/// The code of a SIGBUS that [`send_late`] sends: as of a signal that a process sends (negative), and none that the system uses.
const LATE: libc::c_int = -0x5356;

/// A `siginfo_t` of a signal that a process sends: `si_errno` says whether the access was a store, the value is its address.
#[repr(C)]
struct LateInfo {
    signo: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    #[cfg(target_pointer_width = "64")]
    _pad: libc::c_int,
    pid: libc::pid_t,
    uid: libc::uid_t,
    value: usize,
    _rest: [u64; 12],
}

const _: () =
    assert!(size_of::<LateInfo>() == size_of::<libc::siginfo_t>() || !cfg!(target_os = "linux"));

/// Wakes thread `tid` of this process out of a fault at `addr` that nobody will serve, into its handler. Fault path.
///
/// # Errors
///
/// `ESRCH` if there is no such thread; `EAGAIN` where too many signals are queued.
pub(crate) fn send_late(tid: usize, addr: usize, write: bool) -> io::Result<()> {
    // SAFETY: it is integers.
    let mut info: LateInfo = unsafe { std::mem::zeroed() };
    info.signo = libc::SIGBUS;
    info.errno = libc::c_int::from(write);
    info.code = LATE;
    info.value = addr;
    // SAFETY: `info` is laid out as the kernel's siginfo, and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            std::process::id(),
            tid,
            libc::SIGBUS,
            &raw const info,
        )
    };
    check(result).map(drop)
}

/// What [`send_late`] says.
fn late_fault(details: &libc::siginfo_t) -> BusFault {
    // SAFETY: a signal with a negative code carries a value.
    let value = unsafe { details.si_value() };
    BusFault {
        addr: value.sival_ptr.addr(),
        access: if details.si_errno == 0 {
            Access::ReadMissing
        } else {
            Access::WriteMissing
        },
        pc: 0,
        sp: 0,
        late: true,
    }
}

/// Does what would have been done had our handler not been there.
///
/// # Safety
///
/// `info` and `context` are the arguments of the handler that calls this.
unsafe fn chain(
    installed: &Installed,
    code: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    let previous = &installed.previous;
    let spent =
        previous.sa_flags & libc::SA_RESETHAND != 0 && installed.previous_spent.swap(true, Relaxed);
    let handler = if spent {
        libc::SIG_DFL
    } else {
        previous.sa_sigaction
    };
    // Raised by the instruction that the context points at: returning raises it again.
    let raised = matches!(
        code,
        libc::BUS_ADRALN | libc::BUS_ADRERR | libc::BUS_OBJERR | libc::BUS_MCEERR_AR
    );
    if handler == libc::SIG_IGN && !raised {
        return;
    }
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        let default = zeroed_action();
        // SAFETY: the zeroed action is SIG_DFL without flags.
        unsafe { libc::sigaction(libc::SIGBUS, &raw const default, std::ptr::null_mut()) };
        if !raised {
            // SAFETY: no preconditions. SIGBUS is not blocked here (SA_NODEFER): this does not return.
            unsafe { libc::raise(libc::SIGBUS) };
        }
        return;
    }
    // The mask the kernel would have given it: the interrupted one, its own, and SIGBUS.
    // SAFETY: `context` is the interrupted context, by contract.
    let mut mask = unsafe { interrupted_mask(context.cast()) };
    for signal in 1..=KERNEL_SIGNALS {
        // SAFETY: the set is initialised, and the number valid (or refused with an error).
        let wanted = unsafe { libc::sigismember(&raw const previous.sa_mask, signal) } == 1;
        let itself = signal == libc::SIGBUS && previous.sa_flags & libc::SA_NODEFER == 0;
        if wanted || itself {
            // SAFETY: as above.
            unsafe { libc::sigaddset(&raw mut mask, signal) };
        }
    }
    let call = || {
        // SAFETY: `mask` is initialised. The kernel restores the interrupted mask when we return.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) };
        if previous.sa_flags & libc::SA_SIGINFO != 0 {
            type Action = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: with SA_SIGINFO, and neither SIG_DFL nor SIG_IGN, it is such a function: that is
            // what whoever installed it promised sigaction(2).
            let action = unsafe { std::mem::transmute::<libc::sighandler_t, Action>(handler) };
            action(libc::SIGBUS, info, context);
        } else {
            type Action = extern "C" fn(libc::c_int);
            // SAFETY: as above, without SA_SIGINFO.
            let action = unsafe { std::mem::transmute::<libc::sighandler_t, Action>(handler) };
            action(libc::SIGBUS);
        }
    };
    let on_alternate = previous.sa_flags & libc::SA_ONSTACK != 0;
    // SAFETY: `context` is as it asks, by contract; a handler that is `extern "C"` does not unwind.
    unsafe {
        installed
            .stacks
            .as_delivered(context.cast(), on_alternate, call);
    }
}

/// Signals 1 to 64 exist for the kernel, whose mask is 8 bytes (on every platform but MIPS).
const KERNEL_SIGNALS: libc::c_int = 64;

/// The signal mask of an interrupted context. libc's `sigset_t` is larger than what the kernel writes
/// there, so that only as much is copied.
///
/// # Safety
///
/// `context` is the third argument of a signal handler.
unsafe fn interrupted_mask(context: *const libc::ucontext_t) -> libc::sigset_t {
    let mut mask = empty_set();
    // SAFETY: the field is in bounds of the context.
    let source: *const u8 = unsafe { &raw const (*context).uc_sigmask }.cast();
    let target: *mut u8 = (&raw mut mask).cast();
    // SAFETY: the kernel wrote 8 bytes at `source`; a sigset_t has at least as many, in the same
    // layout.
    unsafe { std::ptr::copy_nonoverlapping(source, target, KERNEL_SIGNALS as usize / 8) };
    mask
}

/// Reads what the platform tells about the fault out of the context.
///
/// # Safety
///
/// `context` is the third argument of a signal handler.
#[cfg(target_arch = "x86_64")]
unsafe fn decode(addr: usize, context: *const libc::ucontext_t) -> BusFault {
    // SAFETY: by contract it is valid for reads during the handler.
    let registers = unsafe { &(*context).uc_mcontext.gregs };
    let register = |index: libc::c_int| registers[index as usize];
    // The page-fault error code: bit 0, the page was present; bit 1, it was a write.
    let access = match register(libc::REG_ERR) & 0b11 {
        0b00 => Access::ReadMissing,
        0b10 => Access::WriteMissing,
        0b11 => Access::WriteProtected,
        _ => Access::Unknown,
    };
    BusFault {
        addr,
        access,
        pc: register(libc::REG_RIP).cast_unsigned() as usize,
        sp: register(libc::REG_RSP).cast_unsigned() as usize,
        late: false,
    }
}

/// As on x86-64, from the exception syndrome that the kernel appends to the context. Untested: no such
/// machine was at hand.
///
/// # Safety
///
/// `context` is the third argument of a signal handler.
#[cfg(target_arch = "aarch64")]
unsafe fn decode(addr: usize, context: *const libc::ucontext_t) -> BusFault {
    /// `struct esr_context` in asm/sigcontext.h.
    const ESR_MAGIC: u32 = 0x4553_5201;
    /// `sizeof(__reserved)` in `struct sigcontext`.
    const RESERVED_LEN: usize = 4096;
    // SAFETY: by contract it is valid for reads during the handler.
    let machine = unsafe { &(*context).uc_mcontext };
    let mut access = Access::Unknown;
    // `__reserved` is 16-aligned and follows `pstate`; it is a list of records, each with a magic
    // number and its size, closed by one of magic 0.
    let pstate: *const u8 = (&raw const machine.pstate).cast();
    let reserved = pstate.wrapping_add(8).map_addr(|a| a.next_multiple_of(16));
    let mut offset = 0;
    while offset + 16 <= RESERVED_LEN {
        let record: *const u32 = reserved.wrapping_add(offset).cast();
        // SAFETY: within the 4096 bytes of `__reserved`, aligned as records are.
        let magic = unsafe { record.read() };
        // SAFETY: as above.
        let size = unsafe { record.wrapping_add(1).read() } as usize;
        if magic == ESR_MAGIC {
            // SAFETY: as above; the record is 16 bytes.
            let esr = unsafe { record.wrapping_add(2).cast::<u64>().read() };
            let is_write = esr >> 6 & 1 != 0;
            // Bits 5..2 of a data abort's status: 0b0001 translation, 0b0011 permission fault.
            access = match (esr >> 2 & 0xF, is_write) {
                (0b0001, false) => Access::ReadMissing,
                (0b0001, true) => Access::WriteMissing,
                (0b0011, true) => Access::WriteProtected,
                _ => Access::Unknown,
            };
            break;
        }
        if magic == 0 || size < 16 {
            break;
        }
        offset += size;
    }
    BusFault {
        addr,
        access,
        pc: machine.pc as usize,
        sp: machine.sp as usize,
        late: false,
    }
}

/// Other platforms: the page's state decides.
///
/// # Safety
///
/// None; as on the others.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
unsafe fn decode(addr: usize, _context: *const libc::ucontext_t) -> BusFault {
    BusFault {
        addr,
        access: Access::Unknown,
        pc: 0,
        sp: 0,
        late: false,
    }
}

/// A number that no other living thread of the process has; never zero. Fault path.
#[inline]
pub(crate) fn thread_pointer() -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        let pointer: usize;
        // SAFETY: on x86-64 Linux the first word at fs is the thread control block's own address
        // (System V ABI, ELF handling for thread-local storage, variant II).
        unsafe {
            std::arch::asm!(
                "mov {}, fs:0",
                out(reg) pointer,
                options(nostack, preserves_flags, readonly)
            );
        }
        pointer
    }
    #[cfg(target_arch = "aarch64")]
    {
        let pointer: usize;
        // SAFETY: reads the register that user space keeps its thread pointer in.
        unsafe {
            std::arch::asm!(
                "mrs {}, tpidr_el0",
                out(reg) pointer,
                options(nomem, nostack, preserves_flags)
            );
        }
        pointer
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        super::process::gettid() as usize
    }
}

const BUCKETS: usize = 128;
/// Two cache lines of words.
const BUCKET_LEN: usize = 16;

/// Which threads are in the resolver: thread pointers, hashed; 0 is a free slot.
#[derive(Zeroable)]
#[repr(C)]
struct Resolving {
    buckets: [Bucket; BUCKETS],
}

#[derive(Zeroable)]
#[repr(C, align(128))]
struct Bucket {
    threads: [AtomicUsize; BUCKET_LEN],
}

/// What [`Resolving::enter`] found.
enum Entered<'a> {
    /// In a slot, which the thread clears when it leaves.
    As(&'a AtomicUsize),
    /// The thread was in there already.
    Nested,
    /// No slot was free.
    Unguarded,
}

impl Resolving {
    fn enter(&self, thread: usize) -> Entered<'_> {
        // Thread pointers are stack-sized strides apart: multiply, and take the high bits.
        let hash = (thread as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 57;
        let bucket = &self.buckets[hash as usize % BUCKETS].threads;
        if bucket.iter().any(|slot| slot.load(Relaxed) == thread) {
            return Entered::Nested;
        }
        // Relaxed throughout: a slot's value is compared only with that of the thread that wrote it.
        match bucket
            .iter()
            .find(|slot| slot.compare_exchange(0, thread, Relaxed, Relaxed).is_ok())
        {
            Some(slot) => Entered::As(slot),
            None => Entered::Unguarded,
        }
    }
}

/// The signals an instruction raises. They are never masked: raised while blocked, they kill.
const SYNCHRONOUS: [libc::c_int; 6] = [
    libc::SIGBUS,
    libc::SIGSEGV,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGSYS,
];

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised just now.
    unsafe { set.assume_init() }
}

fn asynchronous_signals() -> libc::sigset_t {
    let mut set = empty_set();
    // SAFETY: the set is initialised.
    unsafe { libc::sigfillset(&raw mut set) };
    for signal in SYNCHRONOUS {
        // SAFETY: the set is initialised and the number valid.
        unsafe { libc::sigdelset(&raw mut set, signal) };
    }
    set
}

/// While it lives, no asynchronous signal runs a handler on this thread.
///
/// Held by whoever holds a lock of the runtime: a profiler's or timer's handler that touched mirrored
/// memory would fault, and wait for that very lock (hazard S1). Two system calls; guards nest.
#[must_use = "signals are unmasked again when it is dropped"]
#[derive(Debug)]
pub(crate) struct AsyncSignalsBlocked {
    /// What to restore; `None` if somebody else will.
    previous: Option<libc::sigset_t>,
    /// A mask is the thread's that set it.
    _not_send: PhantomData<*mut ()>,
}

impl AsyncSignalsBlocked {
    /// Masks them. Fault path.
    pub(crate) fn new() -> Self {
        let set = asynchronous_signals();
        let mut previous = empty_set();
        // SAFETY: both sets are initialised. It can't fail with a valid `how`.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut previous) };
        Self {
            previous: Some(previous),
            _not_send: PhantomData,
        }
    }
}

impl Drop for AsyncSignalsBlocked {
    fn drop(&mut self) {
        if let Some(previous) = &self.previous {
            // SAFETY: the set is initialised; see `new`.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, previous, std::ptr::null_mut()) };
        }
    }
}

/// Whether asynchronous signals are masked on this thread: for assertions. Fault path.
pub(crate) fn async_signals_blocked() -> bool {
    let mut mask = empty_set();
    // SAFETY: with a null new set the current one is written to `mask`.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask) };
    // A few that every guard blocks and that can be blocked; libc reserves some real-time ones.
    [libc::SIGALRM, libc::SIGPROF, libc::SIGUSR1, libc::SIGTERM]
        .into_iter()
        // SAFETY: the set is initialised and the number valid.
        .all(|signal| unsafe { libc::sigismember(&raw const mask, signal) } == 1)
}

#[cfg(test)]
mod tests;
