//! A mirror's beginning and its end. All state of the runtime's lies in mappings of its own, hence the many.

use svm::Options;
use tests::{Idle, Map};

use crate::tracer::{ByThread, step, traced};
use crate::{LEN, PAGE};

const BEGINNING: ByThread = &[(
    "caller",
    &[
        "rt_sigprocmask",
        // Of what kind the memory is.
        "PROCMAP_QUERY",
        // The region's own state.
        "mmap",
        "mmap",
        "mmap",
        // Whether events are on their way, and until when they are waited for.
        "clock_gettime",
        "WRITEPROTECT",
        // Where something is mapped, which is published.
        "PROCMAP_QUERY",
        "mmap",
        "mmap",
        "munmap",
        "REGISTER",
        // Whether the same is mapped still.
        "PROCMAP_QUERY",
        // Not for children, until a fork is prepared.
        "madvise",
        "WRITEPROTECT",
        "rt_sigprocmask",
    ],
)];

#[test]
fn a_mirror_is_registered_and_unregistered_once() {
    const END: ByThread = &[(
        "caller",
        &[
            "rt_sigprocmask",
            // Whether the mapping has grown: what is behind it is asked, too. And once more under the lock.
            "PROCMAP_QUERY",
            "PROCMAP_QUERY",
            "PROCMAP_QUERY",
            "PROCMAP_QUERY",
            "UNREGISTER",
            "madvise",
            // It is not published any more.
            "mmap",
            "munmap",
            "munmap",
            "rt_sigprocmask",
            // The region's own state.
            "munmap",
            "munmap",
            "munmap",
        ],
    )];
    traced(
        "mirror::a_mirror_is_registered_and_unregistered_once",
        || {
            let map = Map::new(LEN / PAGE);
            drop(map.mirror(&Options::new()));
            let mut mirror = None;
            step(|| mirror = Some(map.mirror(&Options::new())));
            step(|| drop(mirror.take()));
        },
        &[BEGINNING, END],
    );
}

/// Beside the mirror's own memory its window is registered and unregistered.
#[test]
fn a_device_adds_a_window_to_a_mirror() {
    const MAP: ByThread = &[(
        "caller",
        &[
            "rt_sigprocmask",
            // The window.
            "mmap",
            "madvise",
            "REGISTER",
            // What the device keeps of the region.
            "mmap",
            "mmap",
            // The window is published, among the device's regions and among the region's devices.
            "mmap",
            "mmap",
            "mmap",
            "munmap",
            "munmap",
            "mmap",
            "mmap",
            "munmap",
            "mmap",
            "munmap",
            "rt_sigprocmask",
        ],
    )];
    const END: ByThread = &[(
        "caller",
        &[
            "rt_sigprocmask",
            "PROCMAP_QUERY",
            "PROCMAP_QUERY",
            "PROCMAP_QUERY",
            "PROCMAP_QUERY",
            "UNREGISTER",
            "madvise",
            // Published are neither the region, nor its window, nor either of the device and the region as the other's.
            "mmap",
            "mmap",
            "munmap",
            "munmap",
            "mmap",
            "munmap",
            "munmap",
            "mmap",
            "munmap",
            "munmap",
            "mmap",
            "munmap",
            // The window, and what the device has kept of the region.
            "UNREGISTER",
            "munmap",
            "munmap",
            "munmap",
            "munmap",
            "rt_sigprocmask",
            // The region's own state.
            "munmap",
            "munmap",
            "munmap",
        ],
    )];
    traced(
        "mirror::a_device_adds_a_window_to_a_mirror",
        || {
            let map = Map::new(LEN / PAGE);
            let attachment = Idle::attach().unwrap();
            let used = |mirror: &svm::Mirror<'_, u8>| {
                drop(attachment.map(mirror.view().region()).unwrap());
            };
            used(&map.mirror(&Options::new()));
            let mut mirror = Some(map.mirror(&Options::new()));
            step(|| used(mirror.as_ref().unwrap()));
            step(|| drop(mirror.take()));
        },
        &[MAP, END],
    );
}
