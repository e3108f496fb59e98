//! Where a container's filter or an old kernel gives this process no userfaultfd: the error says what would help, by name. Each case
//! is a process of its own, under a real filter of system calls.

#![cfg(target_os = "linux")]

use std::os::unix::process::CommandExt;
use std::process::Command;

use svm::{Buffer, Capabilities, Capability, Delivery, Options};
use tests::seccomp::Filter;
use tests::{TestDevice, Watchdog};

const MARK: &str = "SVM_TEST_FILTERED";

const NONE: Filter = Filter {
    syscall: None,
    user_mode_only: None,
    device: None,
};

/// Runs `test` again under `filter`, with `lacking` disabled, where it does `body`.
fn under(test: &'static str, filter: Filter, lacking: &str, body: fn()) {
    let _watchdog = Watchdog::new(test);
    if std::env::var_os(MARK).is_some() {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(MARK, "1")
        .env("SVM_DISABLE", lacking);
    // SAFETY: the filter is installed by two system calls, without memory.
    unsafe { command.pre_exec(move || filter.install()) };
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{test} under {filter:?}: {}\n{said}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Everything that mirrors memory is refused, and the error, like the table, has all of `names`.
#[track_caller]
fn refused_naming(names: &[&str]) {
    let mut data = vec![1_u64; 10_000];
    let (start, len) = (data.as_mut_ptr().cast(), size_of_val(&*data));
    let mut errors = Vec::new();
    for delivery in [Delivery::Inline, Delivery::Thread] {
        let options = Options::new().delivery(delivery);
        errors.push(svm::mirror_with(&mut data, &options).map(drop));
        errors.push(svm::mirror_ref_with(&data, &options).map(drop));
        // SAFETY: the vector outlives the call, and with it any mirror.
        errors.push(unsafe { svm::mirror_raw(start, len, &options) }.map(drop));
        errors.push(Buffer::<u64>::with_options(100, &options).map(drop));
    }
    errors.push(svm::mirror(&mut data).map(drop));
    let capabilities = Capabilities::probe();
    assert!(!capabilities.is_usable(), "{capabilities}");
    let mut texts = vec![capabilities.to_string()];
    for error in errors {
        let error = error.unwrap_err();
        assert!(error.is_unsupported(), "{error:?}");
        texts.push(error.to_string());
    }
    for text in texts {
        for name in names {
            assert!(text.contains(name), "no word of {name}: {text}");
        }
    }
    assert!(data.iter().all(|&word| word == 1));
}

/// A page goes to a device and comes home.
fn works() {
    let mut buffer = Buffer::<u64>::zeroed(10_000).unwrap();
    buffer.as_mut_slice().fill(7);
    let device = TestDevice::new().unwrap();
    let view = buffer.view_mut();
    device
        .write(view.region(), view.addr(), &8_u64.to_ne_bytes())
        .unwrap();
    assert_eq!(buffer.as_slice()[..2], [8, 7]);
    assert!(Capabilities::probe().is_usable());
}

fn is_open(device: &str) -> bool {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open(device)
        .is_ok()
}

#[test]
fn a_filter_that_says_eperm() {
    let filter = Filter {
        syscall: Some(libc::EPERM),
        device: Some(libc::EPERM),
        ..NONE
    };
    under("a_filter_that_says_eperm", filter, "", || {
        refused_naming(&[
            "Operation not permitted",
            "seccomp",
            "profile",
            "/dev/userfaultfd",
            "setfacl",
            "CAP_SYS_PTRACE",
            "vm.unprivileged_userfaultfd=1",
        ]);
    });
}

#[test]
fn a_filter_that_says_enosys() {
    let filter = Filter {
        syscall: Some(libc::ENOSYS),
        device: Some(libc::EPERM),
        ..NONE
    };
    under("a_filter_that_says_enosys", filter, "", || {
        refused_naming(&[
            "Function not implemented",
            "seccomp",
            "profile",
            "/dev/userfaultfd",
            "setfacl",
            "CONFIG_USERFAULTFD",
        ]);
    });
}

/// What the error says of the device is so: access to it is enough.
#[test]
fn a_filter_does_not_look_at_the_device() {
    let filter = Filter {
        syscall: Some(libc::EPERM),
        ..NONE
    };
    under("a_filter_does_not_look_at_the_device", filter, "", || {
        if is_open("/dev/userfaultfd") {
            works();
        } else {
            refused_naming(&["seccomp", "/dev/userfaultfd", "setfacl"]);
        }
    });
}

/// Linux 5.7 to 5.10 as far as the system call goes: no flag for faults of user code alone, no device, and none of what came later.
#[test]
fn a_kernel_before_5_11_takes_the_right_to_all_faults() {
    let filter = Filter {
        user_mode_only: Some(libc::EINVAL),
        device: Some(libc::ENODEV),
        ..NONE
    };
    let test = "a_kernel_before_5_11_takes_the_right_to_all_faults";
    let later = "move,wp_async,poison,exact_address,pagemap_scan,procmap_query";
    under(test, filter, later, || {
        if Capabilities::probe().has(Capability::KernelFaults) {
            works();
        } else {
            refused_naming(&["5.11", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1"]);
        }
    });
}
