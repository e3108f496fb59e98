//! Stacks for the SIGBUS handler, and for the handlers that it calls in its place.
//!
//! A thread's alternate signal stack, where it has one, is 8 KiB for a thread made by Rust, and the kernel's frame takes up to
//! half of it. Resolving a fault without optimisation needs more than the rest. So a handler that finds itself on such a stack
//! borrows one of ours for the resolver, and returns to the thread's own before anything else is called.
//!
//! The pool is one mapping, made before the handler is installed. A stack is taken by setting its bit: no lock, no system
//! call. Where all are taken the resolver runs where it is, which an optimised build has room for.
//!
//! # Somebody else's handler
//!
//! It runs where the kernel would have run it ([`Stacks::as_delivered`]): on the interrupted stack, unless it asked for the alternate one.
//! There it may do what our resolver never does: fault itself, and the kernel puts a second frame where one hardly fits (3.3 KiB
//! each with AVX-512, of Rust's 8). So a small alternate stack is replaced by one of ours here as well.
//!
//! The kernel begins a handler at the top of the alternate stack unless the stack pointer is on it: run elsewhere, a fault would
//! overwrite the very frames that we are to return to. So as long as somebody else's handler runs, the thread's alternate stack is
//! the one that it runs on, or none. Asynchronous signals stay masked until that is set. A handler that leaves by `siglongjmp`
//! leaves it like that: its thread goes on with one of ours for an alternate stack, or with none.

use core::ffi::c_void;
use core::sync::atomic::{AtomicU64, Ordering};
use std::io;

use bytemuck::Zeroable;

use super::mmap::{MapArray, MapBox};
use crate::addr::PAGE_SIZE;

/// Bytes of a stack; its lowest page is never needed, and stands between it and the next.
const STACK: usize = 64 << 10;
/// Alternate stacks of this size or more are good enough.
const ENOUGH: usize = 32 << 10;
/// As many as the bitmap has bits.
const NR_STACKS: usize = u64::BITS as usize;

/// All-zero bytes: every stack is free.
#[derive(Zeroable)]
struct Taken(AtomicU64);

/// See the [module](self).
pub(super) struct Stacks {
    taken: &'static Taken,
    memory: MapArray<u8>,
}

impl Stacks {
    /// The pool. Control path.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            // A forked child has it as it was: the thread that forked may be on one of them, in somebody else's handler. What the others
            // had taken stays taken.
            taken: MapBox::leak(MapBox::<Taken>::zeroed()?),
            memory: MapArray::zeroed(NR_STACKS * STACK)?,
        })
    }

    /// Runs `f`, on a stack of ours if this frame is on an alternate one that is small. Async-signal-safe if `f` is; `f` must
    /// not unwind (it aborts).
    pub(super) fn with_room<R, F: FnOnce() -> R>(&self, alternate: &libc::stack_t, f: F) -> R {
        let here = 0_u8;
        let used = (&raw const here)
            .addr()
            .wrapping_sub(alternate.ss_sp.addr());
        if used >= alternate.ss_size || alternate.ss_size >= ENOUGH {
            return f();
        }
        let Some(index) = self.take() else { return f() };
        let mut call = Call {
            f: Some(f),
            result: None,
        };
        let end = self.end_of(index);
        // SAFETY: the stack is ours alone until its bit is cleared, 64 KiB long, and its end is aligned to a page; `call`
        // outlives the call and is what `run` expects.
        unsafe { call_on(end, run::<F, R>, (&raw mut call).cast()) };
        self.give_back(index);
        match call.result {
            Some(result) => result,
            None => {
                super::process::abort_with_message(format_args!("the fault resolver did not run"))
            }
        }
    }

    /// Runs `handler`, which may fault, and may unmask what is masked, where the kernel would have run it: on the interrupted stack, or
    /// with `on_alternate` on the alternate one, or one of ours if that is small.
    ///
    /// # Safety
    /// `context` is the third argument of a signal handler whose frame this is called from. `handler` does not unwind.
    pub(super) unsafe fn as_delivered<F: FnOnce()>(
        &self,
        context: *const libc::ucontext_t,
        on_alternate: bool,
        handler: F,
    ) {
        // SAFETY: by contract; the kernel says there which alternate stack the thread has.
        let alternate = unsafe { (*context).uc_stack };
        // SAFETY: by contract.
        let interrupted = unsafe { stack_pointer(context) };
        let is_on = |at: usize| at.wrapping_sub(alternate.ss_sp.addr()) < alternate.ss_size;
        let here = 0_u8;
        if !is_on((&raw const here).addr()) {
            return handler();
        }
        let (taken, end, replaced) = match interrupted {
            // Interrupted there, it would have gone on there.
            Some(sp) if !on_alternate && !is_on(sp.addr()) => (None, below_red_zone(sp), NO_STACK),
            _ if alternate.ss_size >= ENOUGH => return handler(),
            _ => match self.take() {
                Some(index) => (Some(index), self.end_of(index), self.as_alternate(index)),
                None => return handler(),
            },
        };
        let mut call = Call {
            f: Some(|| {
                set_alternate(&replaced);
                handler();
            }),
            result: None,
        };
        // SAFETY: below the interrupted frames, and their red zone, the interrupted stack is free; a stack of ours is ours alone until its
        // bit is cleared. Both are aligned. `call` outlives the call and is what `run` expects.
        unsafe { call_on(end, run_of(&call), (&raw mut call).cast()) };
        // Back on the alternate stack, which the kernel has to know before a signal comes that finds it taken by somebody else; unless it
        // is one that the kernel forgets of for as long as a handler runs there, and arms again itself.
        let disarmed = alternate.ss_flags & SS_AUTODISARM != 0;
        set_alternate(if disarmed { &NO_STACK } else { &alternate });
        if let Some(index) = taken {
            self.give_back(index);
        }
    }

    fn end_of(&self, index: usize) -> *const u8 {
        self.memory.as_ptr().wrapping_add((index + 1) * STACK)
    }

    fn as_alternate(&self, index: usize) -> libc::stack_t {
        let start = self.memory.as_ptr().wrapping_add(index * STACK);
        libc::stack_t {
            ss_sp: start.cast_mut().cast(),
            ss_flags: 0,
            ss_size: STACK,
        }
    }

    fn give_back(&self, index: usize) {
        // Release pairs with the Acquire of `take`: the next owner's frames come after ours.
        self.taken.0.fetch_and(!(1 << index), Ordering::Release);
    }

    fn take(&self) -> Option<usize> {
        let mut taken = self.taken.0.load(Ordering::Relaxed);
        loop {
            let free = taken.trailing_ones();
            if free == u64::BITS || !cfg!(target_arch = "x86_64") {
                return None;
            }
            match self.taken.0.compare_exchange_weak(
                taken,
                taken | 1 << free,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(free as usize),
                Err(now) => taken = now,
            }
        }
    }
}

/// A closure and the place for its result.
struct Call<F, R> {
    f: Option<F>,
    result: Option<R>,
}

extern "C" fn run<F: FnOnce() -> R, R>(call: *mut c_void) {
    let call: *mut Call<F, R> = call.cast();
    // SAFETY: `with_room` and `as_delivered`, the only callers, pass such a `Call`, which nobody else uses meanwhile.
    let call = unsafe { &mut *call };
    call.result = call.f.take().map(|f| f());
}

/// [`run`] for what `call` holds, whose type has no name.
fn run_of<F: FnOnce() -> R, R>(_call: &Call<F, R>) -> extern "C" fn(*mut c_void) {
    run::<F, R>
}

/// Linux's flag; `libc` has it not on all its targets.
const SS_AUTODISARM: libc::c_int = 1 << 31;

const NO_STACK: libc::stack_t = libc::stack_t {
    ss_sp: core::ptr::null_mut(),
    ss_flags: libc::SS_DISABLE,
    ss_size: 0,
};

/// Async-signal-safe. Refused while the thread is on the stack that it has: then nothing has changed.
fn set_alternate(stack: &libc::stack_t) {
    // SAFETY: `stack` is initialised; what it names is a stack of the thread's own, or for it alone.
    unsafe { libc::sigaltstack(stack, core::ptr::null_mut()) };
}

/// Where the interrupted code's stack ended, where that can be told and used.
///
/// # Safety
/// `context` is the third argument of a signal handler.
unsafe fn stack_pointer(context: *const libc::ucontext_t) -> Option<*const u8> {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: by contract it is valid for reads during the handler.
        let sp = unsafe { (*context).uc_mcontext.gregs[libc::REG_RSP as usize] };
        Some(core::ptr::with_exposed_provenance(
            sp.cast_unsigned() as usize
        ))
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = context;
        None
    }
}

/// The first place below `sp` that a handler may use, aligned as at a call: the x86-64 ABI leaves functions 128 bytes below it.
fn below_red_zone(sp: *const u8) -> *const u8 {
    sp.map_addr(|sp| sp.wrapping_sub(128) & !15)
}

/// Calls `f(arg)` with the stack pointer at `stack_end`.
///
/// # Safety
/// `stack_end` is the aligned end of memory that nobody else uses, with room for all that `f` needs; `arg` is what `f` expects;
/// `f` does not unwind.
#[cfg(target_arch = "x86_64")]
unsafe fn call_on(stack_end: *const u8, f: extern "C" fn(*mut c_void), arg: *mut c_void) {
    // SAFETY: the old stack pointer is kept in a register that a callee preserves, and restored; all registers that a callee
    // may change are declared; at the call the stack is aligned to 16 bytes, as the ABI has it. By contract, the rest.
    unsafe {
        core::arch::asm!(
            "mov r12, rsp",
            "mov rsp, {stack_end}",
            "call {f}",
            "mov rsp, r12",
            stack_end = in(reg) stack_end,
            f = in(reg) f,
            in("rdi") arg,
            out("r12") _,
            clobber_abi("C"),
        );
    }
}

/// Elsewhere no stack is ever taken.
///
/// # Safety
/// As on x86-64.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn call_on(_stack_end: *const u8, f: extern "C" fn(*mut c_void), arg: *mut c_void) {
    f(arg);
}

const _: () = assert!(STACK.is_multiple_of(PAGE_SIZE) && ENOUGH < STACK);

#[cfg(test)]
mod tests {
    use super::*;

    /// As on a signal stack that ends where this frame does.
    fn small_stack_here() -> libc::stack_t {
        let here = 0_u8;
        let start = (&raw const here).wrapping_sub(4096).cast_mut();
        libc::stack_t {
            ss_sp: start.cast(),
            ss_flags: 0,
            ss_size: 8192,
        }
    }

    #[inline(never)]
    fn deep(n: usize) -> (usize, usize) {
        let frame = [n as u8; 256];
        let frame = core::hint::black_box(&frame);
        let here = core::ptr::from_ref(frame).addr();
        if n == 0 {
            (here, 0)
        } else {
            (deep(n - 1).0, usize::from(frame[7]) + n)
        }
    }

    #[test]
    fn a_small_alternate_stack_is_left_and_returned_to() {
        let stacks = Stacks::new().unwrap();
        let (lowest, _) = stacks.with_room(&small_stack_here(), || deep(100));
        let pool = stacks.memory.as_ptr().addr()..stacks.memory.as_ptr().addr() + NR_STACKS * STACK;
        assert_eq!(pool.contains(&lowest), cfg!(target_arch = "x86_64"));
        assert_eq!(stacks.taken.0.load(Ordering::Relaxed), 0);
        let large = libc::stack_t {
            ss_size: 1 << 20,
            ..small_stack_here()
        };
        assert!(!pool.contains(&stacks.with_room(&large, || deep(1)).0));
    }

    #[test]
    fn without_a_free_stack_it_runs_where_it_is() {
        let stacks = Stacks::new().unwrap();
        stacks.taken.0.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(stacks.with_room(&small_stack_here(), || 7), 7);
        assert_eq!(stacks.taken.0.load(Ordering::Relaxed), u64::MAX);
    }
}
