//! Where there is no userfaultfd at all, every entry point says so. `--cfg svm_unsupported` makes such a place of Linux.

#![cfg(any(not(target_os = "linux"), svm_unsupported))]

use accel_sim::Accelerator;
use svm::{Buffer, Capabilities, Error, Options};

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
    refused(svm::mirror(&mut data));
    refused(svm::mirror(&mut data[..1]));
    refused(svm::mirror_ref(&data));
    let (start, len) = (data.as_mut_ptr().cast(), size_of_val(&*data));
    // SAFETY: the vector outlives the call, and with it any mirror.
    refused(unsafe { svm::mirror_raw(start, len, &Options::new()) });
    refused(svm::mirror_with(
        &mut data,
        &Options::new().transparent_syscalls(true),
    ));
    refused(Buffer::<f32>::zeroed(100));
    refused(Buffer::from_slice(&data));
    refused(Accelerator::new());
    assert!(data.iter().all(|&e| e == 1));
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
