//! Whole fault paths under Shuttle: the runtime's own source files, over a model of the kernel.
//!
//! What is compiled here are the files of `runtime/src`, not copies, every one but the system-call layer: that is replaced by
//! `sys`, which has the same interface and asks `kernel`, a model of what `kernel-facts` documents, instead of Linux. Threads are
//! Shuttle's: one runs at a time, and which one goes on is decided by a seed at every *point*: before each lock, each entry of the
//! gate, each call of the kernel and each access of memory. So a schedule is a number, and a failing one is replayed by one command.
//!
//! | part | what it is |
//! |---|---|
//! | `kernel` | pages, mappings, userfaultfds, events: every call that the runtime makes, page by page |
//! | `world` | one schedule's actors: CPUs that fault, devices that check their tables, and the oracle that knows each page's contents |
//! | `scenarios` | what the actors do, and the faults of `sync::mutation` that must be found |
//! | `explore` | schedulers, seeds, counts, and the ladder of a schedule that fails |
//!
//! Checked in each schedule: no write is lost and nothing stale is read, the directory agrees with the page tables, no translation leads
//! to a page that has gone, no deadlock, no starvation, and memory accounted for to zero (`world`). Which invariant is whose is in the
//! table of `notifier`, with the mutation that breaks it.
//!
//! What it can not find: an ordering that is too weak (Shuttle is sequentially consistent; that is loom's part, `runtime/models`), and
//! what the kernel does beyond the model.
//!
//! Without `--cfg svm_shuttle` the program is empty; `ci/models.sh` runs it.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "a library's files in a program: not all of its interface has a user here"
)]
#![cfg_attr(not(svm_shuttle), allow(unused_crate_dependencies))]

#[cfg(svm_shuttle)]
extern crate std_for_models as std;

#[cfg(svm_shuttle)]
macro_rules! runtime {
    ($($name:ident $path:literal)*) => { $( #[path = $path] mod $name; )* };
}

#[cfg(svm_shuttle)]
#[macro_use]
#[path = "../src/point.rs"]
mod point;

#[cfg(svm_shuttle)]
mod explore;
#[cfg(svm_shuttle)]
mod kernel;
#[cfg(svm_shuttle)]
mod scenarios;
#[cfg(svm_shuttle)]
mod sys;
#[cfg(svm_shuttle)]
mod world;

#[cfg(svm_shuttle)]
runtime! {
    addr "../src/addr.rs"
    attachment "../src/attachment.rs"
    block "../src/block.rs"
    buffer "../src/buffer.rs"
    device "../src/device.rs"
    door "../src/door.rs"
    edge "../src/edge.rs"
    error "../src/error.rs"
    events "../src/events.rs"
    evict "../src/evict.rs"
    fault "../src/fault.rs"
    fork "../src/fork.rs"
    inline "../src/inline.rs"
    mapped "../src/mapped.rs"
    mask "../src/mask.rs"
    mirror "../src/mirror.rs"
    monitor "../src/monitor.rs"
    movement "../src/movement/mod.rs"
    near "../src/near.rs"
    notifier "../src/notifier/mod.rs"
    options "../src/options.rs"
    overrun "../src/overrun.rs"
    page_bits "../src/page_bits.rs"
    pin "../src/pin.rs"
    ptr "../src/ptr.rs"
    range "../src/range/mod.rs"
    region "../src/region.rs"
    release "../src/release.rs"
    rights "../src/rights.rs"
    round "../src/round/mod.rs"
    scratch "../src/scratch.rs"
    share "../src/share.rs"
    snapshot "../src/snapshot.rs"
    space "../src/space.rs"
    stats "../src/stats.rs"
    sync "../src/sync/mod.rs"
    view "../src/view.rs"
    window "../src/window.rs"
    worker "../src/worker.rs"
}

#[cfg(svm_shuttle)]
pub use {
    attachment::{AttachOptions, Attachment, attach},
    block::MAX_DEVICES,
    buffer::Buffer,
    device::{
        Blocking, Device, DeviceGuard, DeviceLock, DeviceMemory, Invalidation, Keep, LateAccess,
        MapInfo, Overrun, ThreadId, WouldBlock,
    },
    edge::UseGuard,
    error::{Access, DeviceFault, DeviceFaultKind, Error, ErrorKind, Result},
    mapped::{Mapped, MappedRef, RegionRef},
    mask::{PageMask, Runs},
    mirror::{
        Mirror, MirrorRef, PinMut, mirror, mirror_raw, mirror_ref, mirror_ref_with, mirror_with,
    },
    options::{Delivery, Granule, Options},
    page_bits::PageBits,
    pin::Pin,
    ptr::Ptr,
    range::{Committed, Interrupted, NotMapped, PageMapper, Range, Update},
    round::Valid,
    share::Shared,
    snapshot::{PageSnapshot, snapshot},
    stats::{Cause, Stats},
    view::{SharedView, View, ViewMut},
    worker::{WorkerThread, barriers_are_asymmetric, heavy_barrier, light_barrier, worker_thread},
};

#[cfg(svm_shuttle)]
fn main() -> std::process::ExitCode {
    explore::main()
}

#[cfg(not(svm_shuttle))]
fn main() {
    eprintln!("built without --cfg svm_shuttle: see ci/models.sh");
}
