//! What the runtime keeps for itself.

use accel_sim::Accelerator;
use svm::{Buffer, Options};
use tests::in_own_process;

use crate::{BLOCK, PAGE, alone};

/// Bytes of address space that this process has, to the page.
fn mapped() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').next().unwrap().parse::<usize>().unwrap() * PAGE
}

/// Bytes that this process has in RAM and not from a file. `status` says so, too, but counts in batches; this is what the page tables hold.
fn resident() -> usize {
    let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Anonymous:"))
        .unwrap();
    let kib = line.trim().strip_suffix(" kB").unwrap();
    kib.parse::<usize>().unwrap() * 1024
}

/// Bytes of address space that a mirror of `len` bytes takes, and the accelerator's part of it; beside its memory and its window.
fn state(accel: &Accelerator, len: usize) -> usize {
    let before = mapped();
    let mut buffer = Buffer::<u8>::with_options(len, &Options::new()).unwrap();
    accel
        .run_items(1, buffer.view_mut(), |_, _, _| Ok(()))
        .unwrap();
    mapped() - before - 2 * len
}

/// All there ever is of a page's state is reserved when it is mirrored, so address space is a bound of memory, and the same on every
/// machine. What a mirror has in any case goes out of the difference of two.
#[test]
fn a_mirrored_page_takes_at_most_eight_bytes() {
    let test = "memory::a_mirrored_page_takes_at_most_eight_bytes";
    in_own_process(test, &[""], || {
        // A thread's first allocation makes it an arena, of which the C library maps twice as much as it keeps: not in here.
        #[cfg(target_env = "gnu")]
        // SAFETY: no pointers.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1)
        };
        alone("bytes a page", || {
            let accel = Accelerator::with_options(accel_sim::Options::new().workers(1)).unwrap();
            // What is made once.
            state(&accel, BLOCK);
            let (less, more) = (64 * BLOCK, 576 * BLOCK);
            let bytes = state(&accel, more) - state(&accel, less);
            let pages = (more - less) / PAGE;
            assert!(bytes <= 8 * pages, "{bytes} bytes for {pages} pages");
        });
    });
}

/// In RAM: reserved for good are stacks of threads, of which little is ever used. With the pages of the C library and of this program
/// that were touched for the first time.
#[test]
fn the_first_mirror_and_device_take_at_most_a_mebibyte() {
    let test = "memory::the_first_mirror_and_device_take_at_most_a_mebibyte";
    in_own_process(test, &[""], || {
        // A stack that the kernel makes of a huge page is 2 MiB at once.
        // SAFETY: no pointers.
        unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
        let before = resident();
        alone("fixed bytes", || {
            let accel = Accelerator::with_options(accel_sim::Options::new().workers(1)).unwrap();
            state(&accel, PAGE);
            let fixed = resident() - before;
            assert!(fixed <= 1 << 20, "{fixed} bytes");
        });
    });
}
