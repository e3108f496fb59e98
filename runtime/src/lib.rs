//! Shared virtual memory in userspace.

pub mod addr;
mod block;
mod buffer;
pub mod capabilities;
mod device;
mod door;
mod edge;
mod error;
mod events;
mod evict;
mod fault;
mod fork;
mod inline;
mod mask;
mod mirror;
mod monitor;
mod movement;
pub mod notifier;
mod options;
mod pin;
mod ptr;
mod range;
mod region;
mod rights;
mod scratch;
mod share;
mod snapshot;
mod space;
mod stats;
pub mod sync;
#[cfg_attr(
    any(not(target_os = "linux"), svm_unsupported),
    path = "sys/unsupported.rs"
)]
mod sys;
mod view;
mod window;
mod worker;

pub use block::MAX_DEVICES;
pub use buffer::Buffer;
pub use capabilities::{Capabilities, Capability, Support};
pub use device::{
    AttachOptions, Attachment, Blocking, Device, DeviceGuard, DeviceLock, DeviceMemory,
    Invalidation, Keep, MapInfo, Mapped, MappedRef, PageBits, RegionRef, WouldBlock, attach,
};
pub use edge::UseGuard;
pub use error::{Access, DeviceFault, DeviceFaultKind, Error, ErrorKind, Result};
pub use mask::{PageMask, Runs};
pub use mirror::{Mirror, MirrorRef, mirror, mirror_raw, mirror_ref, mirror_ref_with, mirror_with};
pub use options::{Delivery, Granule, Options};
pub use pin::Pin;
pub use ptr::Ptr;
pub use range::{Committed, Interrupted, Range, Update, Valid};
pub use share::Shared;
pub use snapshot::{PageSnapshot, snapshot};
pub use stats::{Cause, Stats};
pub use view::{SharedView, View, ViewMut};
pub use worker::{
    WorkerThread, barriers_are_asymmetric, heavy_barrier, light_barrier, worker_thread,
};
