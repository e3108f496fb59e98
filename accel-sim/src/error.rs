//! Why the accelerator could not be had, or a launch did not end well.

use std::fmt;

use svm::DeviceFault;

/// Why an operation of the accelerator failed.
#[non_exhaustive]
pub enum Error {
    /// The runtime refused: mirroring, mapping or moving pages.
    Runtime(svm::Error),
    /// A kernel touched memory that its launch cannot have; the fault carries the address.
    Fault(DeviceFault),
    /// A kernel panicked, with this message. Memory is as the kernel left it.
    KernelPanicked(String),
    /// The views of a launch over slices differ in length.
    LengthMismatch {
        /// Elements of the first view.
        expected: usize,
        /// Elements of the one that differs.
        found: usize,
    },
    /// A launch over slices without a view: nothing says how many indices there are.
    NoViews,
    /// Zero workers, or more than [`MAX_WORKERS`](crate::MAX_WORKERS).
    BadWorkerCount(usize),
    /// The translation cache's size is not a power of two, or is out of range.
    BadCacheSize(usize),
    /// Device memory of zero bytes.
    NoDeviceMemory,
    /// The device's memory cannot hold the spans that its workers use at once.
    DeviceMemoryTooSmall {
        /// Bytes that would do.
        needed: usize,
        /// Bytes there are.
        available: usize,
    },
    /// A kernel launched on its own accelerator: its worker would wait for itself.
    Nested,
    /// This is a forked child: the accelerator and its workers are the parent's.
    Forked,
    /// A worker thread could not be started.
    Thread(std::io::Error),
}

impl Error {
    /// The device fault that ended a launch, if that is what this is.
    #[must_use]
    pub fn device_fault(&self) -> Option<DeviceFault> {
        match self {
            Error::Fault(fault) => Some(*fault),
            Error::Runtime(error) => error.device_fault(),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Runtime(error) => error.fmt(f),
            Error::Fault(fault) => fault.fmt(f),
            Error::KernelPanicked(message) => write!(f, "a kernel panicked: {message}"),
            Error::LengthMismatch { expected, found } => {
                write!(
                    f,
                    "the views of a launch over slices have {expected} and {found} elements; use run_items for views of different lengths"
                )
            }
            Error::NoViews => write!(
                f,
                "a launch over slices needs a view, which says how many elements there are; use run_items for none"
            ),
            Error::BadWorkerCount(n) => {
                write!(
                    f,
                    "{n} workers: an accelerator has 1 to {}",
                    crate::MAX_WORKERS
                )
            }
            Error::BadCacheSize(n) => {
                write!(
                    f,
                    "a translation cache of {n} entries: it has a power of two from {} to {}",
                    crate::MIN_CACHE_ENTRIES,
                    crate::MAX_CACHE_ENTRIES
                )
            }
            Error::NoDeviceMemory => write!(
                f,
                "an accelerator needs device memory: zero bytes were given"
            ),
            Error::DeviceMemoryTooSmall { needed, available } => write!(
                f,
                "the workers' spans need {needed} bytes of device memory and there are {available}; give it more, or fewer workers or views"
            ),
            Error::Nested => write!(
                f,
                "a kernel cannot launch on its own accelerator: its worker would wait for itself"
            ),
            Error::Forked => write!(
                f,
                "this is a forked child: the accelerator is the parent's; make one here"
            ),
            Error::Thread(error) => write!(f, "a worker thread could not be started: {error}"),
        }
    }
}

/// Like `Display`: it is what a `main` that returns an error shows.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Runtime(error) => Some(error),
            Error::Fault(fault) => Some(fault),
            Error::Thread(error) => Some(error),
            _ => None,
        }
    }
}

impl From<svm::Error> for Error {
    fn from(error: svm::Error) -> Error {
        Error::Runtime(error)
    }
}

impl From<DeviceFault> for Error {
    fn from(fault: DeviceFault) -> Error {
        Error::Fault(fault)
    }
}

/// So that a function which returns `svm::Error` can use `?` on launches. The text survives; match on [`Error`] for the cases.
impl From<Error> for svm::Error {
    fn from(error: Error) -> svm::Error {
        match error {
            Error::Runtime(error) => error,
            Error::Fault(fault) => fault.into(),
            other => svm::Error::kernel("launch", other.to_string()),
        }
    }
}
