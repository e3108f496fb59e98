//! Shared virtual memory in userspace: mirror a slice, and a device works on the very same addresses.
//!
//! Pages move to a device when it touches them and come home when the CPU does, by page faults that this crate handles with
//! Linux userfaultfd: no kernel module, no special hardware, no copy calls, no root. At any moment each page has one writer or
//! many readers. It is the userspace twin of the kernel's HMM, with the same vocabulary.
//!
//! ```
//! # if !svm::Capabilities::probe().is_usable() { return Ok(()) }
//! let mut data = vec![1u32; 100_000];
//! let mut mirror = svm::mirror(&mut data)?; // devices may use it from here on
//! mirror.as_mut_slice()[0] = 2; //            so may the CPU, when no kernel has it
//! mirror.close()?; //                         every page home again
//! assert_eq!(data[0], 2);
//! # Ok::<(), svm::Error>(())
//! ```
//!
//! # For applications
//! [`mirror`], [`mirror_ref`] and [`Buffer`] give views ([`View`], [`ViewMut`], [`SharedView`]) that a device's launches borrow; the
//! package `accel-sim` has a device to launch kernels on. [`Options`] choose how faults are delivered ([`Delivery`]) and how much
//! moves at a time ([`Granule`]); [`Mirror::pin`] guards system calls; [`munmap`], [`mremap`], [`madvise`] and
//! [`mprotect`] change mirrored mappings with a bracket from start to end; [`Ptr`] links nodes that both sides follow;
//! [`Capabilities`] says what this process may have of the kernel, and which fallback is in force for the rest.
//!
//! # For authors of devices
//! Implement [`Device`] (a table of translations per region, and two callbacks that take translations away), [`attach`] it, and get
//! translations in through a [`Range`], the only way there is:
//!
//! ```
//! use std::time::Duration;
//! use svm::{Access, Device, DeviceLock, Invalidation, Keep, MapInfo, PageBits, WouldBlock};
//!
//! #[derive(Default)]
//! struct Minimal(DeviceLock);
//!
//! // SAFETY: accesses happen under the device lock (below), which `invalidate` takes: when it returns, none is in flight.
//! unsafe impl Device for Minimal {
//!     type Table = PageBits; // the pages that may be written
//!
//!     fn map(&self, map: &MapInfo) -> svm::Result<PageBits> {
//!         PageBits::new(map.nr_pages)
//!     }
//!     fn lock(&self) -> &DeviceLock {
//!         &self.0
//!     }
//!     fn invalidate(&self, table: &PageBits, inv: &Invalidation) -> Result<(), WouldBlock> {
//!         let _guard = self.0.lock_for(inv.blocking())?;
//!         table.remove(inv.block(), inv.pages());
//!         Ok(())
//!     }
//!     fn quiesced(&self, _: &PageBits, _: &Invalidation) -> bool {
//!         true
//!     }
//! }
//!
//! # if !svm::Capabilities::probe().is_usable() { return Ok(()) }
//! let mut buffer = svm::Buffer::<u64>::zeroed(512)?;
//! let device = svm::attach(Minimal::default(), svm::AttachOptions::new())?;
//! let mapped = device.map(buffer.view_mut().region())?;
//! let (mut range, first) = (device.range()?, buffer.view().addr());
//! let page = (first - mapped.region().base()) / 4096;
//! let _worker = svm::worker_thread();
//! loop {
//!     let mut update = range.start_update(&mapped, page..page + 1, Duration::from_secs(1))?;
//!     update.fault(Access::Write)?; //                         the page moves; nothing is held afterwards
//!     let guard = device.device().0.lock();
//!     let Ok(valid) = update.end_update(&guard) else { continue }; // interrupted: start over
//!     valid.iter().for_each(|v| mapped.table().install(v, Access::Write));
//!     let word = std::ptr::with_exposed_provenance_mut::<u64>(first.wrapping_add_signed(mapped.offset()));
//!     // SAFETY: the page is the device's, and the device lock, which is held, keeps it so.
//!     unsafe { word.write(7) };
//!     break;
//! }
//! assert_eq!(buffer.as_slice()[0], 7); //                      the CPU's touch brings the page home
//! # Ok::<(), svm::Error>(())
//! ```
//!
//! A device whose workers hit without a lock, one that maps pages first, and what each callback is for: [`writing_a_device`]. The
//! protocol behind it, with its proofs and models, is in [`notifier`]; the races it all has to stand, and what shows that it
//! does, in [`hazards`].
//!
//! Which memory moves, and what stays in place, is said at [`mirror`](mirror#which-memory-moves).
//!
//! # Limits
//! - Linux 5.7 on x86-64; aarch64 is written with care and untested; elsewhere every entry point answers that it is unsupported.
//! - A thread that blocks `SIGBUS` and touches a page that is away is killed by the kernel ([`Delivery::Inline`]).
//! - A system call on a page that a device holds fails with `EFAULT` unless the page is pinned, or the process may handle faults of
//!   the kernel and asked for it ([`Options::transparent_syscalls`]).
//! - Without `UFFDIO_MOVE` (Linux < 6.8) a bare `madvise` that discards mirrored memory is not seen; [`madvise`] is. See [`Capabilities`].
//! - A raw `mprotect` is seen when the next fault is served and when the next launch begins
//!   ([`revalidate_protections`](MappedRef::revalidate_protections)), not before; [`mprotect`] when it returns.
//! - Bare changes of memory that devices access in place (pinned, shared, of files) are not seen, or not in time: a device's access may
//!   then end as the CPU's would, in a signal. [`munmap`], [`mremap`] and [`mprotect`] take the translations first.

#[cfg(not(svm_points))]
#[macro_use]
mod point;
#[cfg(svm_points)]
#[macro_use]
pub mod point;

pub mod addr;
mod attachment;
mod block;
mod buffer;
mod calls;
pub mod capabilities;
mod device;
mod door;
mod edge;
mod error;
mod events;
mod evict;
mod fault;
mod fork;
#[doc = include_str!("../HAZARDS.md")]
pub mod hazards {}
mod inline;
mod mapped;
mod mask;
mod mirror;
mod monitor;
mod movement;
mod near;
pub mod notifier;
mod options;
mod overrun;
mod page_bits;
mod pin;
mod ptr;
mod range;
mod region;
mod release;
mod rights;
mod round;
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
#[doc = include_str!("../WRITING_A_DEVICE.md")]
pub mod writing_a_device {}

pub use attachment::{AttachOptions, Attachment, attach};
pub use block::MAX_DEVICES;
pub use buffer::Buffer;
pub use calls::{madvise, mprotect, mremap, munmap};
pub use capabilities::{Capabilities, Capability, Support};
pub use device::{
    Blocking, Device, DeviceGuard, DeviceLock, DeviceMemory, Invalidation, Keep, LateAccess,
    MapInfo, Overrun, ThreadId, WouldBlock,
};
pub use edge::UseGuard;
pub use error::{Access, DeviceFault, DeviceFaultKind, Error, ErrorKind, Result};
pub use mapped::{Mapped, MappedRef, RegionRef};
pub use mask::{PageMask, Runs};
pub use mirror::{
    Mirror, MirrorRef, PinMut, mirror, mirror_raw, mirror_ref, mirror_ref_with, mirror_with,
};
pub use options::{Delivery, Granule, Options};
pub use page_bits::PageBits;
pub use pin::Pin;
pub use ptr::Ptr;
pub use range::{Committed, Interrupted, NotMapped, PageMapper, Range, Update};
pub use round::Valid;
pub use share::Shared;
pub use snapshot::{PageSnapshot, snapshot};
pub use stats::{Cause, Stats};
pub use view::{SharedView, View, ViewMut};
pub use worker::{
    ThreadHandle, WorkerThread, barriers_are_asymmetric, heavy_barrier, light_barrier,
    spawn_thread, worker_thread,
};
