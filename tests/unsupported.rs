//! Where there is no userfaultfd at all, every entry point says so. `--cfg svm_unsupported` makes such a place of Linux.

#![cfg(any(not(target_os = "linux"), svm_unsupported))]

use accel_sim::Accelerator;
use svm::{
    AttachOptions, Buffer, Capabilities, Delivery, Device, DeviceLock, Error, Granule,
    Invalidation, MapInfo, Options, WouldBlock,
};

/// A device that never gets anywhere.
#[derive(Debug, Default)]
struct Nowhere(DeviceLock);

// SAFETY: it has no translations and accesses nothing.
unsafe impl Device for Nowhere {
    type Table = ();

    fn map(&self, _: &MapInfo) -> Result<(), Error> {
        Ok(())
    }

    fn lock(&self) -> &DeviceLock {
        &self.0
    }

    fn invalidate(&self, (): &(), _: &Invalidation) -> Result<(), WouldBlock> {
        Ok(())
    }

    fn quiesced(&self, (): &(), _: &Invalidation) -> bool {
        true
    }
}

fn refused<T>(result: Result<T, impl Into<Error>>) {
    let error: Error = match result {
        Ok(_) => panic!("it cannot work here"),
        Err(error) => error.into(),
    };
    assert!(error.is_unsupported(), "{error:?}");
    assert!(error.to_string().contains("Linux"), "{error}");
}

#[test]
fn every_entry_point_is_refused_by_name() {
    let mut data = vec![1_u64; 10_000];
    let (start, len) = (data.as_mut_ptr().cast::<u8>(), size_of_val(&*data));
    refused(svm::mirror(&mut data));
    refused(svm::mirror(&mut data[..1]));
    refused(svm::mirror(&mut data[..0]));
    refused(svm::mirror_ref(&data));
    refused(svm::snapshot(start.addr().next_multiple_of(4096), 1));
    refused(svm::attach(Nowhere::default(), AttachOptions::new()));
    refused(svm::attach(
        Nowhere::default(),
        AttachOptions::new().memory_bytes(1 << 20),
    ));
    refused(Buffer::<f32>::zeroed(100));
    refused(Buffer::<f32>::zeroed(0));
    refused(Buffer::from_slice(&data));
    refused(Accelerator::new());
    refused(Accelerator::with_options(
        accel_sim::Options::new().workers(2),
    ));
    for options in [
        Options::new(),
        Options::new().delivery(Delivery::Inline),
        Options::new()
            .delivery(Delivery::Thread)
            .granule(Granule::Huge),
        Options::new().huge_pages(true).read_mostly(true),
        Options::new().transparent_syscalls(true),
    ] {
        refused(svm::mirror_with(&mut data, &options));
        refused(svm::mirror_ref_with(&data, &options));
        refused(Buffer::<u64>::with_options(100, &options));
        // SAFETY: the vector outlives the call, and with it any mirror.
        refused(unsafe { svm::mirror_raw(start, len, &options) });
    }
    assert!(data.iter().all(|&e| e == 1));
}

/// Nor do the system calls happen that go through `svm`.
#[test]
fn no_mapping_is_changed() {
    let mut data = vec![1_u64; 10_000];
    let (start, len) = (data.as_mut_ptr().cast::<u8>(), size_of_val(&*data));
    // SAFETY: it is refused, and nothing happens.
    refused(unsafe { svm::munmap(start, len) });
    // SAFETY: as above.
    refused(unsafe { svm::mremap(start, len, 2 * len, 0, std::ptr::null_mut()) });
    for number in [0, 1, 4] {
        // SAFETY: as above.
        refused(unsafe { svm::madvise(start, len, number) });
        // SAFETY: as above.
        refused(unsafe { svm::mprotect(start, len, number) });
    }
    data.fill(2);
    assert!(data.iter().all(|&e| e == 2));
}

#[test]
fn nothing_is_said_to_be_there() {
    let capabilities = Capabilities::probe();
    assert!(!capabilities.is_usable());
    assert!(
        capabilities
            .iter()
            .all(|(_, support)| !support.is_available())
    );
}
