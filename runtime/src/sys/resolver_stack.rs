//! Stacks for the resolver.
//!
//! The SIGBUS handler runs on the thread's alternate stack where it has one, and std gives its threads one of 8 KiB and a
//! little: enough for the signal frame and a few calls, not for a resolver in a debug build, and on a machine with large
//! vector registers not even for that. So the handler goes over to a stack of our own for the time it resolves.
//!
//! The stacks are mapped once and taken by a bit in a word; where all are in use, or the processor is one for which the
//! change is not written, the resolver runs where it is. Nothing unwinds across the change: the resolver does not panic.

use std::sync::atomic::{AtomicU64, Ordering};

use super::mmap::MapArray;

/// Bytes of a stack: several times what the deepest path takes in a debug build.
const STACK_BYTES: usize = 128 << 10;
/// How many: one for each thread that resolves at the same moment.
const STACKS: usize = 64;

/// The stacks. Pages are populated by use, so what is never used costs address space alone.
#[derive(Debug)]
pub(crate) struct ResolverStacks {
    memory: MapArray<u8>,
    taken: AtomicU64,
}

impl ResolverStacks {
    /// Maps them. Control path.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { memory: MapArray::zeroed(STACK_BYTES * STACKS)?, taken: AtomicU64::new(0) })
    }

    /// Runs `body` on one of the stacks, if one is free, and on the current one otherwise. Fault path.
    pub(crate) fn run<R>(&self, body: impl FnOnce() -> R) -> R {
        let Some(stack) = self.take() else { return body() };
        let top = self.memory.as_ptr().addr() + (stack + 1) * STACK_BYTES;
        let result = run_on(top, body);
        // Release: pairs with the Acquire of `take`: the next user finds the stack left.
        self.taken.fetch_and(!(1 << stack), Ordering::Release);
        result
    }

    fn take(&self) -> Option<usize> {
        if !cfg!(target_arch = "x86_64") {
            return None;
        }
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            let stack = taken.trailing_ones() as usize;
            if stack >= STACKS {
                return None;
            }
            match self.taken.compare_exchange_weak(taken, taken | 1 << stack, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(stack),
                Err(now) => taken = now,
            }
        }
    }
}

/// Calls `body` with the stack pointer at `top`, 16-aligned, of a stack that nobody else uses.
#[cfg(target_arch = "x86_64")]
fn run_on<R, F: FnOnce() -> R>(top: usize, body: F) -> R {
    struct Call<F, R> {
        body: Option<F>,
        result: Option<R>,
    }

    extern "C" fn trampoline<R, F: FnOnce() -> R>(call: *mut Call<F, R>) {
        // SAFETY: `run_on` passes its own local, which outlives the call and which nobody else refers to.
        let call = unsafe { &mut *call };
        if let Some(body) = call.body.take() {
            call.result = Some(body());
        }
    }

    let mut call = Call { body: Some(body), result: None };
    // SAFETY: `top` is the 16-aligned end of a stack of STACK_BYTES that the caller has taken for itself, so at the call the stack
    // pointer is aligned as the ABI asks. `r12` is preserved by the callee, so the old stack pointer is back afterwards; all that a
    // C call clobbers is declared. The trampoline does not unwind: the resolver does not panic, and an `extern "C"` function that
    // does aborts.
    unsafe {
        core::arch::asm!(
            "mov r12, rsp",
            "mov rsp, {top}",
            "call {trampoline}",
            "mov rsp, r12",
            top = in(reg) top,
            trampoline = sym trampoline::<R, F>,
            in("rdi") &raw mut call,
            out("r12") _,
            clobber_abi("C"),
        );
    }
    match call.result {
        Some(result) => result,
        None => super::process::abort_with_message(format_args!("the resolver did not return")),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn run_on<R, F: FnOnce() -> R>(_top: usize, body: F) -> R {
    body()
}

const _: () = assert!(STACKS <= 64 && STACK_BYTES.is_multiple_of(4096));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_elsewhere_and_comes_back() {
        let stacks = ResolverStacks::new().unwrap();
        let here = 0u8;
        let range = stacks.memory.as_ptr().addr()..stacks.memory.as_ptr().addr() + stacks.memory.len();
        let sum = stacks.run(|| {
            let there = [1u64; 4000];
            assert_eq!(range.contains(&(&raw const there).addr()), cfg!(target_arch = "x86_64"));
            // Nested: the next stack.
            there.iter().sum::<u64>() + stacks.run(|| 1)
        });
        assert_eq!(sum, 4001);
        assert!(!range.contains(&(&raw const here).addr()));
        assert_eq!(stacks.taken.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn goes_on_where_it_is_when_all_are_taken() {
        let stacks = ResolverStacks::new().unwrap();
        stacks.taken.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(stacks.run(|| 5), 5);
        assert_eq!(stacks.taken.load(Ordering::Relaxed), u64::MAX);
    }
}
