//! `<linux/userfaultfd.h>` for the `userfaultfd` crate, written by hand.
//!
//! The crate of this name on crates.io runs bindgen over the installed kernel headers, and so needs
//! libclang, a C compiler and headers new enough. What it produces is a dozen structs and a page of
//! constants that are kernel ABI and never change. This is that output, with the sizes asserted
//! below; it has the names and types of 0.6.0 (bindgen's own names included) so that it can stand in
//! for it through `[patch.crates-io]`. What is newer than 0.6.0 (MOVE, POISON, …) is not here: it
//! belongs to the runtime's own `sys` layer.
//!
//! Field and constant names are the header's, and so are their meanings: see `ioctl_userfaultfd(2)`.

#![no_std]
#![allow(
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    reason = "names are the kernel header's, and so is their documentation"
)]

// ---- Feature-dependent constants -----------------------------------------------------------------
// 0.6.0 gives these three masks the value they had in the kernel version a cargo feature names.

/// All features of Linux 4.11.
const FEATURES_4_11: u64 = UFFD_FEATURE_EVENT_FORK
    | UFFD_FEATURE_EVENT_REMAP
    | UFFD_FEATURE_EVENT_REMOVE
    | UFFD_FEATURE_EVENT_UNMAP
    | UFFD_FEATURE_MISSING_HUGETLBFS
    | UFFD_FEATURE_MISSING_SHMEM;

#[cfg(not(feature = "linux4_14"))]
pub const UFFD_API_FEATURES: u64 = FEATURES_4_11;
#[cfg(feature = "linux4_14")]
pub const UFFD_API_FEATURES: u64 = FEATURES_4_11 | UFFD_FEATURE_SIGBUS | UFFD_FEATURE_THREAD_ID;

pub const UFFD_API_IOCTLS: u64 =
    (1 << _UFFDIO_REGISTER) | (1 << _UFFDIO_UNREGISTER) | (1 << _UFFDIO_API);

/// All range ioctls of Linux 4.11.
const RANGE_IOCTLS_4_11: u64 = (1 << _UFFDIO_WAKE) | (1 << _UFFDIO_COPY) | (1 << _UFFDIO_ZEROPAGE);

#[cfg(not(feature = "linux5_7"))]
pub const UFFD_API_RANGE_IOCTLS: u64 = RANGE_IOCTLS_4_11;
#[cfg(all(feature = "linux5_7", not(feature = "linux5_13")))]
pub const UFFD_API_RANGE_IOCTLS: u64 = RANGE_IOCTLS_4_11 | (1 << _UFFDIO_WRITEPROTECT);
#[cfg(feature = "linux5_13")]
pub const UFFD_API_RANGE_IOCTLS: u64 =
    RANGE_IOCTLS_4_11 | (1 << _UFFDIO_WRITEPROTECT) | (1 << _UFFDIO_CONTINUE);

#[cfg(not(feature = "linux4_14"))]
pub const UFFD_API_RANGE_IOCTLS_BASIC: u64 = 0;
#[cfg(feature = "linux4_14")]
pub const UFFD_API_RANGE_IOCTLS_BASIC: u64 = (1 << _UFFDIO_WAKE) | (1 << _UFFDIO_COPY);

// ---- Handshake, ioctl numbers --------------------------------------------------------------------

pub const UFFD_API: u64 = 0xAA;
pub const UFFDIO: u8 = 0xAA;
pub const USERFAULTFD_IOC: u32 = 0xAA;
pub const UFFD_USER_MODE_ONLY: u32 = 1;

pub const _UFFDIO_REGISTER: u64 = 0x00;
pub const _UFFDIO_UNREGISTER: u64 = 0x01;
pub const _UFFDIO_WAKE: u64 = 0x02;
pub const _UFFDIO_COPY: u64 = 0x03;
pub const _UFFDIO_ZEROPAGE: u64 = 0x04;
pub const _UFFDIO_WRITEPROTECT: u64 = 0x06;
pub const _UFFDIO_CONTINUE: u64 = 0x07;
pub const _UFFDIO_API: u64 = 0x3F;

pub const UFFDIO_API: u32 = 0xC018_AA3F;
pub const UFFDIO_REGISTER: u32 = 0xC020_AA00;
pub const UFFDIO_UNREGISTER: u32 = 0x8010_AA01;
pub const UFFDIO_WAKE: u32 = 0x8010_AA02;
pub const UFFDIO_COPY: u32 = 0xC028_AA03;
pub const UFFDIO_ZEROPAGE: u32 = 0xC020_AA04;
#[cfg(feature = "linux5_7")]
pub const UFFDIO_WRITEPROTECT: u32 = 0xC018_AA06;
#[cfg(feature = "linux5_13")]
pub const UFFDIO_CONTINUE: u32 = 0xC020_AA07;

// ---- Features, modes, events ---------------------------------------------------------------------

pub const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
pub const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
pub const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
pub const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
pub const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
pub const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;
pub const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
pub const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
pub const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
pub const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;
pub const UFFD_FEATURE_EXACT_ADDRESS: u64 = 1 << 11;
pub const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;

pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
#[cfg(feature = "linux5_13")]
pub const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;

pub const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1 << 0;
pub const UFFDIO_COPY_MODE_WP: u64 = 1 << 1;
pub const UFFDIO_ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;
#[cfg(feature = "linux5_7")]
pub const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
#[cfg(feature = "linux5_7")]
pub const UFFDIO_WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
#[cfg(feature = "linux5_13")]
pub const UFFDIO_CONTINUE_MODE_DONTWAKE: u64 = 1 << 0;

pub const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub const UFFD_EVENT_FORK: u8 = 0x13;
pub const UFFD_EVENT_REMAP: u8 = 0x14;
pub const UFFD_EVENT_REMOVE: u8 = 0x15;
pub const UFFD_EVENT_UNMAP: u8 = 0x16;

pub const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
pub const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
pub const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

// ---- Arguments of the ioctls ---------------------------------------------------------------------

/// Declares kernel structs, and proves each one's size as it does.
macro_rules! kernel_structs {
    ($($name:ident: $bytes:literal { $($field:ident: $ty:ty),+ $(,)? })+) => {$(
        #[repr(C)]
        #[derive(Debug, Default, Clone, Copy)]
        pub struct $name { $(pub $field: $ty),+ }
        const _: () = assert!(size_of::<$name>() == $bytes);
    )+};
}

kernel_structs! {
    uffdio_api: 24 { api: u64, features: u64, ioctls: u64 }
    uffdio_range: 16 { start: u64, len: u64 }
    uffdio_register: 32 { range: uffdio_range, mode: u64, ioctls: u64 }
    uffdio_copy: 40 { dst: u64, src: u64, len: u64, mode: u64, copy: i64 }
    uffdio_zeropage: 32 { range: uffdio_range, mode: u64, zeropage: i64 }
    uffdio_writeprotect: 24 { range: uffdio_range, mode: u64 }
    uffdio_continue: 32 { range: uffdio_range, mode: u64, mapped: i64 }
}

// ---- The message read() returns ------------------------------------------------------------------

/// `struct uffd_msg`: what one `read` of the descriptor yields.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct uffd_msg {
    pub event: u8,
    pub reserved1: u8,
    pub reserved2: u16,
    pub reserved3: u32,
    pub arg: uffd_msg__bindgen_ty_1,
}

/// `uffd_msg.arg`; which member is live is told by `uffd_msg.event`.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg__bindgen_ty_1 {
    pub pagefault: uffd_msg__bindgen_ty_1__bindgen_ty_1,
    pub fork: uffd_msg__bindgen_ty_1__bindgen_ty_2,
    pub remap: uffd_msg__bindgen_ty_1__bindgen_ty_3,
    pub remove: uffd_msg__bindgen_ty_1__bindgen_ty_4,
    pub reserved: uffd_msg__bindgen_ty_1__bindgen_ty_5,
}

/// `uffd_msg.arg.pagefault`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct uffd_msg__bindgen_ty_1__bindgen_ty_1 {
    pub flags: u64,
    pub address: u64,
    pub feat: uffd_msg__bindgen_ty_1__bindgen_ty_1__bindgen_ty_1,
}

/// `uffd_msg.arg.pagefault.feat`.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg__bindgen_ty_1__bindgen_ty_1__bindgen_ty_1 {
    pub ptid: u32,
}

kernel_structs! {
    uffd_msg__bindgen_ty_1__bindgen_ty_2: 4 { ufd: u32 }
    uffd_msg__bindgen_ty_1__bindgen_ty_3: 24 { from: u64, to: u64, len: u64 }
    uffd_msg__bindgen_ty_1__bindgen_ty_4: 16 { start: u64, end: u64 }
    uffd_msg__bindgen_ty_1__bindgen_ty_5: 24 { reserved1: u64, reserved2: u64, reserved3: u64 }
}

const _: () = assert!(size_of::<uffd_msg>() == 32);
const _: () = assert!(core::mem::offset_of!(uffd_msg, arg) == 8);
const _: () = assert!(size_of::<uffd_msg__bindgen_ty_1__bindgen_ty_1>() == 24);
const _: () = assert!(size_of::<uffd_msg__bindgen_ty_1>() == 24);

// The numbers above are written out, as 0.6.0 has them. This is the kernel's `_IOC`, and it agrees.
const fn ioc(dir: u32, nr: u64, size: usize) -> u32 {
    (dir << 30) | ((size as u32) << 16) | ((UFFDIO as u32) << 8) | nr as u32
}
const READ: u32 = 2;
const READ_WRITE: u32 = 3;
const _: () = assert!(UFFDIO_API == ioc(READ_WRITE, _UFFDIO_API, size_of::<uffdio_api>()));
const _: () =
    assert!(UFFDIO_REGISTER == ioc(READ_WRITE, _UFFDIO_REGISTER, size_of::<uffdio_register>()));
const _: () =
    assert!(UFFDIO_UNREGISTER == ioc(READ, _UFFDIO_UNREGISTER, size_of::<uffdio_range>()));
const _: () = assert!(UFFDIO_WAKE == ioc(READ, _UFFDIO_WAKE, size_of::<uffdio_range>()));
const _: () = assert!(UFFDIO_COPY == ioc(READ_WRITE, _UFFDIO_COPY, size_of::<uffdio_copy>()));
const _: () =
    assert!(UFFDIO_ZEROPAGE == ioc(READ_WRITE, _UFFDIO_ZEROPAGE, size_of::<uffdio_zeropage>()));
#[cfg(feature = "linux5_7")]
const _: () = assert!(
    UFFDIO_WRITEPROTECT
        == ioc(
            READ_WRITE,
            _UFFDIO_WRITEPROTECT,
            size_of::<uffdio_writeprotect>()
        )
);
#[cfg(feature = "linux5_13")]
const _: () =
    assert!(UFFDIO_CONTINUE == ioc(READ_WRITE, _UFFDIO_CONTINUE, size_of::<uffdio_continue>()));
