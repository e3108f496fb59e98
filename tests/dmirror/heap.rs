//! The library's own heap.
//!
//! A kernel module allocates nothing in the process it serves, and the kernel's suite depends on that: it has a device write a page
//! to a buffer of seven bytes, over whatever lies behind it in the heap.
//!
//! Sizes are rounded to powers of two; what is freed is kept in a list per size. From 64 KiB on every allocation is a mapping.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

#[global_allocator]
static HEAP: Heap = Heap {
    locked: AtomicBool::new(false),
    free: UnsafeCell::new(Free {
        lists: [ptr::null_mut(); CLASSES],
    }),
};

const SMALLEST: usize = 16;
const LARGE: usize = 64 << 10;
const CLASSES: usize = (LARGE / SMALLEST).ilog2() as usize;

/// A free piece: its first word leads to the next.
struct Piece(*mut Piece);

struct Free {
    lists: [*mut Piece; CLASSES],
}

struct Heap {
    locked: AtomicBool,
    free: UnsafeCell<Free>,
}

// SAFETY: `free` is used under the lock alone.
unsafe impl Sync for Heap {}

impl Heap {
    fn with<R>(&self, f: impl FnOnce(&mut Free) -> R) -> R {
        // Acquire pairs with the Release below.
        while self
            .locked
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            std::thread::yield_now();
        }
        // SAFETY: the lock is held, and `f` does not allocate.
        let result = f(unsafe { &mut *self.free.get() });
        self.locked.store(false, Ordering::Release);
        result
    }
}

/// The size a layout takes, if that is not a mapping of its own.
fn class_of(layout: Layout) -> Option<usize> {
    let size = layout
        .size()
        .max(layout.align())
        .max(SMALLEST)
        .next_power_of_two();
    (size < LARGE).then(|| (size / SMALLEST).ilog2() as usize)
}

fn map(len: usize) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a fresh mapping.
    let at = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        ptr::null_mut()
    } else {
        at.cast()
    }
}

// SAFETY: pieces are as large as their class says, aligned to their size (chunks are aligned to a page, and pieces to their size
// within, up to a page), and belong to one owner at a time.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() > 4096 {
            return ptr::null_mut();
        }
        let Some(class) = class_of(layout) else {
            return map(layout.size());
        };
        self.with(|free| {
            if free.lists[class].is_null() {
                let size = SMALLEST << class;
                let chunk = map(LARGE);
                if chunk.is_null() {
                    return ptr::null_mut();
                }
                for offset in (0..LARGE).step_by(size) {
                    let piece: *mut Piece = chunk.wrapping_add(offset).cast();
                    // SAFETY: inside the chunk just mapped, aligned to 16 bytes.
                    unsafe { piece.write(Piece(free.lists[class])) };
                    free.lists[class] = piece;
                }
            }
            let piece = free.lists[class];
            // SAFETY: a free piece, whose first word was written when it was freed.
            free.lists[class] = unsafe { piece.read() }.0;
            piece.cast()
        })
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        let Some(class) = class_of(layout) else {
            // SAFETY: a mapping made by `alloc` with this length, whose owner gives it up.
            unsafe { libc::munmap(at.cast(), layout.size()) };
            return;
        };
        self.with(|free| {
            let piece: *mut Piece = at.cast();
            // SAFETY: a piece of this class that its owner gives up.
            unsafe { piece.write(Piece(free.lists[class])) };
            free.lists[class] = piece;
        });
    }
}
