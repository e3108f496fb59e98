//! [`Fixture`]: the memory and the devices of a test, through each door and with each granule; what an operation may say; and
//! children and files.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use svm::{Capability, Delivery, Granule, Options};
use tests::Watchdog;
use tests::mm::{Dmirror, Done, Errno, Mm};

use crate::has;
use crate::map::{SAMPLE, STEP};

/// What `hmm` and `hmm2` set up: the memory, and up to two devices.
pub(crate) struct Fixture {
    pub(crate) mm: Arc<Mm>,
    pub(crate) options: Options,
    pub(crate) dev: Dmirror,
}

impl Fixture {
    pub(crate) fn new(options: &Options) -> Self {
        let mm = Mm::new(options);
        Self {
            dev: Dmirror::new(&mm).unwrap(),
            options: options.clone(),
            mm,
        }
    }

    pub(crate) fn second(&self) -> Dmirror {
        Dmirror::new(&self.mm).unwrap()
    }
}

/// Runs a test for both doors and all granules.
///
/// One test at a time: they unmap and fork, and what one test's mapping leaves behind another's would be given at once, so that
/// a device told to read "what is at this address" would rightly read the other test's memory.
pub(crate) fn each(name: &'static str, test: impl Fn(&Fixture)) {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _watchdog = Watchdog::with_timeout(name, Duration::from_secs(120));
    if !tests::usable() {
        return;
    }
    // Most fallbacks differ in how a page table is read or a thread is told, not in how many pages move.
    let disabled = std::env::var("SVM_DISABLE").unwrap_or_default();
    let granules: &[Granule] = if ["", "move", "events"].contains(&disabled.as_str()) {
        &[Granule::Page, Granule::Big, Granule::Huge]
    } else {
        &[Granule::Big]
    };
    for delivery in [Delivery::Inline, Delivery::Thread] {
        if delivery == Delivery::Inline && !has(Capability::Sigbus) {
            tests::skip("there is no inline door without SIGBUS delivery");
            continue;
        }
        for &granule in granules {
            let options = Options::new().delivery(delivery).granule(granule);
            let all = disabled.is_empty() && granule == Granule::Big;
            STEP.store(if all { 1 } else { SAMPLE }, Ordering::Relaxed);
            let fixture = Fixture::new(&options);
            test(&fixture);
            let stats = fixture.mm.stats();
            assert_eq!(stats.anomalies, 0, "{name} {options:?}: {stats:?}");
        }
    }
}

/// One round for all of it, as the kernel's suite demands.
pub(crate) fn whole(pages: usize) -> Result<Done, Errno> {
    Ok(Done {
        cpages: pages,
        faults: 1,
    })
}

pub(crate) fn migrated(pages: usize) -> Result<Done, Errno> {
    Ok(Done {
        cpages: pages,
        faults: 0,
    })
}

pub(crate) fn error(errno: i32) -> Result<Done, Errno> {
    Err(Errno(errno))
}

/// Runs `child` in a fork; it answers whether all was well.
pub(crate) fn in_child(child: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child runs test code and leaves by `_exit`.
    match unsafe { libc::fork() } {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(false);
            // SAFETY: ends the child without the parent's destructors.
            unsafe { libc::_exit(i32::from(!ok)) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: waits for the child just made.
            assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}

/// A file that is gone when it is closed.
pub(crate) fn temporary_file(len: usize) -> OwnedFd {
    // SAFETY: the path is a C string.
    let fd = unsafe {
        libc::open(
            c"/tmp".as_ptr(),
            libc::O_TMPFILE | libc::O_EXCL | libc::O_RDWR,
            0o600,
        )
    };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: just opened, and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a file of ours.
    assert_eq!(unsafe { libc::ftruncate(fd.as_raw_fd(), len as i64) }, 0);
    fd
}
