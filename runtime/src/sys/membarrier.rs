//! An asymmetric fence: nearly free on the side that runs often, a system call on the other.
//!
//! `light` and `heavy` together order like a pair of sequentially consistent fences:
//!
//! ```text
//! often (a translation hit)         seldom (a shootdown)
//! store my_epoch = busy             store translation = none
//! light()                           heavy()
//! load translation                  load my_epoch
//! ```
//!
//! At least one of the two loads sees the other side's store. With membarrier(2) `light` only keeps
//! the compiler from reordering, and `heavy` makes every running thread of the process execute a
//! full fence (PRIVATE_EXPEDITED). Without it (`SVM_DISABLE=membarrier`, seccomp, Linux < 4.14) both
//! are `fence(SeqCst)`: a hit then pays some 5 ns for it.
//!
//! The choice is made once, before either side's first use, for a `light` that relies on a `heavy`
//! which does not interrupt it would be no fence at all. Until it is made `light` is a full fence, and
//! `heavy` makes it.

use std::sync::atomic::{AtomicU8, Ordering, compiler_fence, fence};

use super::check;
use super::disable::Disabled;

const UNDECIDED: u8 = 0;
const SYMMETRIC: u8 = 1;
const ASYMMETRIC: u8 = 2;

/// Written once from UNDECIDED. Relaxed: the value alone matters, it publishes nothing.
static CHOICE: AtomicU8 = AtomicU8::new(UNDECIDED);

const CMD_PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const CMD_REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

fn membarrier(command: libc::c_int) -> std::io::Result<()> {
    // SAFETY: membarrier(2) takes no pointers; it only orders memory.
    check(unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }).map(drop)
}

/// Registers the process with membarrier(2) if that can be had. Control path; idempotent. Returns
/// whether `light` is free from now on, and if not, why.
pub(crate) fn init() -> std::io::Result<()> {
    let registered = if Disabled::current().contains(Disabled::MEMBARRIER) {
        Err(std::io::ErrorKind::Unsupported.into())
    } else {
        membarrier(CMD_REGISTER_PRIVATE_EXPEDITED)
    };
    let choice = if registered.is_ok() {
        ASYMMETRIC
    } else {
        SYMMETRIC
    };
    // The first decision stands: some `light` may rely on it already.
    let _ = CHOICE.compare_exchange(UNDECIDED, choice, Ordering::Relaxed, Ordering::Relaxed);
    registered
}

/// Whether `light` costs nothing and `heavy` is a system call.
pub(crate) fn is_asymmetric() -> bool {
    CHOICE.load(Ordering::Relaxed) == ASYMMETRIC
}

/// The cheap side. Pairs with [`heavy`]. Fault path.
#[inline]
pub(crate) fn light() {
    if is_asymmetric() {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

/// The dear side. Pairs with every [`light`] of every thread. Fault path once [`init`] has run.
pub(crate) fn heavy() {
    if CHOICE.load(Ordering::Relaxed) == UNDECIDED {
        let _ = init();
    }
    if is_asymmetric() {
        // The call itself is a full fence on this thread too (membarrier(2)).
        if let Err(error) = membarrier(CMD_PRIVATE_EXPEDITED) {
            super::process::abort_with_message(format_args!(
                "membarrier, registered before, now fails (errno {:?}): translation hits are unordered",
                error.raw_os_error()
            ));
        }
    } else {
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::AtomicU32;
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    /// The store-buffering litmus test of the module documentation: both loads reading zero is what
    /// the pair of fences forbids.
    #[test]
    fn one_side_always_sees_the_other() {
        let _ = init();
        let rounds = 20_000;
        let (x, y) = (AtomicU32::new(0), AtomicU32::new(0));
        let (saw_x, saw_y) = (AtomicU32::new(0), AtomicU32::new(0));
        let barrier = Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 1..=rounds {
                    barrier.wait();
                    x.store(round, Relaxed);
                    light();
                    saw_y.store(y.load(Relaxed), Relaxed);
                    barrier.wait();
                }
            });
            for round in 1..=rounds {
                barrier.wait();
                y.store(round, Relaxed);
                heavy();
                saw_x.store(x.load(Relaxed), Relaxed);
                barrier.wait();
                assert!(
                    saw_x.load(Relaxed) == round || saw_y.load(Relaxed) == round,
                    "round {round}: neither side saw the other's store"
                );
            }
        });
    }
}
