//! [`Error`]: what went wrong on a control path, and [`DeviceFault`]: why a device access could not be served.
//!
//! Errors sort by who can act on them. An [`Error`] names the operation, the address and what to do; it is one word and
//! is built only where allocation is allowed. A [`DeviceFault`] is a small `Copy` value, for it is made on the fault path.

use core::fmt;
use std::borrow::Cow;

/// Result of this crate's control operations.
pub type Result<T, E = Error> = core::result::Result<T, E>;

/// Why an operation of the runtime failed.
///
/// The `Display` text names the operation, the address where there is one, and what would help. The `is_*` predicates
/// tell the classes apart that a program can act on.
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    operation: &'static str,
    addr: Option<usize>,
    errno: Option<i32>,
}

/// The class of an [`Error`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// This process cannot have what was asked for; the text says which sysctl, capability or kernel would help.
    Unsupported(String),
    /// The range shares a byte with one that is already mirrored, if only by a mirror that was leaked. (Two slices side by side may
    /// share a page.)
    Overlap,
    /// An argument makes no sense: empty, unaligned, wrapping, zero or too large; or `SVM_DISABLE` does. The text says which.
    Invalid(Cow<'static, str>),
    /// The memory has no mapping, or lost it meanwhile.
    Unmapped,
    /// The mapping forbids the access.
    Protection,
    /// The kernel or the device ran out of memory, descriptors or mappings.
    OutOfMemory,
    /// The deadline passed without progress.
    Timeout,
    /// This is a forked child; mirrors and devices belong to the parent.
    Forked,
    /// Contents could not be brought home; the text names the first address. The pages stay out of reach: to touch one is an error
    /// (SIGBUS, or the end of the process), and never reads a zero.
    Lost,
    /// A device access faulted for good.
    Device(DeviceFault),
    /// A device's kernel ended badly on its own account, a panic for one; the text says how.
    Kernel(String),
    /// A system call failed in a way that has no class of its own.
    System,
}

impl Error {
    pub(crate) fn new(operation: &'static str, kind: ErrorKind) -> Self {
        Self(Box::new(Inner {
            kind,
            operation,
            addr: None,
            errno: None,
        }))
    }

    pub(crate) fn at(mut self, addr: usize) -> Self {
        self.0.addr = Some(addr);
        self
    }

    pub(crate) fn errno(mut self, errno: i32) -> Self {
        self.0.errno = Some(errno);
        self
    }

    /// An error for a device author's own operations, with an explanation.
    #[must_use]
    pub fn invalid(operation: &'static str, why: impl Into<Cow<'static, str>>) -> Self {
        Self::new(operation, ErrorKind::Invalid(why.into()))
    }

    /// An error for a device author's launches: a kernel panicked, or the launch made no sense.
    #[must_use]
    pub fn kernel(operation: &'static str, how: String) -> Self {
        Self::new(operation, ErrorKind::Kernel(how))
    }

    /// The class.
    #[must_use]
    pub fn kind(&self) -> &ErrorKind {
        &self.0.kind
    }

    /// The operation that failed, e.g. `"mirror"`.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// The address concerned, where there is one.
    #[must_use]
    pub fn addr(&self) -> Option<usize> {
        self.0.addr
    }

    /// The system's error number, where a system call failed.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        self.0.errno
    }

    /// Whether this process or kernel lacks what was asked for.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        matches!(self.0.kind, ErrorKind::Unsupported(_))
    }

    /// Whether the range overlaps one that is mirrored already.
    #[must_use]
    pub fn is_overlap(&self) -> bool {
        self.0.kind == ErrorKind::Overlap
    }

    /// Whether a deadline passed.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        match self.0.kind {
            ErrorKind::Timeout => true,
            ErrorKind::Device(fault) => fault.kind == DeviceFaultKind::Timeout,
            _ => false,
        }
    }

    /// The device fault, if that is what this is.
    #[must_use]
    pub fn device_fault(&self) -> Option<DeviceFault> {
        match self.0.kind {
            ErrorKind::Device(fault) => Some(fault),
            _ => None,
        }
    }
}

/// Like `Display`: it is what a `main` that returns an error shows. The parts are `{:#?}`.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            fmt::Debug::fmt(&self.0, f)
        } else {
            fmt::Display::fmt(self, f)
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.operation)?;
        if let Some(addr) = self.0.addr {
            write!(f, " at {addr:#x}")?;
        }
        match &self.0.kind {
            ErrorKind::Unsupported(why) => write!(f, ": not available here: {why}")?,
            ErrorKind::Overlap => write!(
                f,
                ": the range overlaps memory that is already mirrored; drop that mirror first"
            )?,
            ErrorKind::Invalid(why) => write!(f, ": {why}")?,
            ErrorKind::Unmapped => write!(f, ": no memory is mapped there")?,
            ErrorKind::Protection => write!(f, ": the mapping's protection forbids this access")?,
            ErrorKind::OutOfMemory => write!(f, ": out of memory, descriptors or mappings")?,
            ErrorKind::Timeout => write!(f, ": the deadline passed without progress")?,
            ErrorKind::Forked => {
                write!(f, ": this is a forked child; mirror and attach anew here")?;
            }
            ErrorKind::Lost => write!(
                f,
                ": contents could not be brought home; to touch such a page is an error (SIGBUS)"
            )?,
            ErrorKind::Device(fault) => write!(f, ": {fault}")?,
            ErrorKind::Kernel(how) => write!(f, ": {how}")?,
            ErrorKind::System => write!(f, ": the system call failed")?,
        }
        if let Some(errno) = self.0.errno {
            write!(f, " ({})", std::io::Error::from_raw_os_error(errno))?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<DeviceFault> for Error {
    fn from(fault: DeviceFault) -> Self {
        Self::new("device access", ErrorKind::Device(fault))
    }
}

/// How a device (or the CPU) touches a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Loads only.
    Read,
    /// Stores, or atomics.
    Write,
}

/// A device access that cannot be served, with the address it was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFault {
    /// The address the device touched.
    pub addr: usize,
    /// What it wanted.
    pub access: Access,
    /// Why it cannot be served.
    pub kind: DeviceFaultKind,
}

/// Why a [`DeviceFault`] is final.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceFaultKind {
    /// Nothing is mapped there.
    Unmapped,
    /// The mapping permits no access at all (`PROT_NONE`).
    NoAccess,
    /// The mapping, or the view, permits reading but not this access.
    Protection,
    /// The address lies in none of the launch's views.
    OutOfViews,
    /// Device memory is exhausted and nothing could be evicted.
    OutOfMemory,
    /// The deadline passed without progress.
    Timeout,
    /// The page's contents were lost.
    Lost,
    /// The mirror was closed, or the device detached.
    Closed,
    /// This is a forked child, and the memory the device knows is the parent's.
    Forked,
    /// The launch was abandoned: a span of it outstayed the shootdown deadline.
    Stuck,
}

impl DeviceFault {
    /// A fault of `kind` at `addr`.
    #[must_use]
    pub const fn new(addr: usize, access: Access, kind: DeviceFaultKind) -> Self {
        Self { addr, access, kind }
    }
}

impl fmt::Display for DeviceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = match self.access {
            Access::Read => "read",
            Access::Write => "write",
        };
        let why = match self.kind {
            DeviceFaultKind::Unmapped => "no memory is mapped there",
            DeviceFaultKind::NoAccess => "the mapping permits no access",
            DeviceFaultKind::Protection => "the mapping or the view does not permit it",
            DeviceFaultKind::OutOfViews => "the address lies in none of the launch's views",
            DeviceFaultKind::OutOfMemory => {
                "device memory is exhausted; give the device more, or use fewer workers or views"
            }
            DeviceFaultKind::Timeout => "the deadline passed without progress",
            DeviceFaultKind::Lost => "the page's contents were lost",
            DeviceFaultKind::Closed => "the mirror was closed, or the device detached",
            DeviceFaultKind::Forked => "this is a forked child; mirror and attach anew here",
            DeviceFaultKind::Stuck => {
                "the launch was abandoned after its span outstayed a shootdown"
            }
        };
        write!(f, "device {access} fault at {:#x}: {why}", self.addr)
    }
}

impl std::error::Error for DeviceFault {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_is_one_word() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        assert!(size_of::<DeviceFault>() <= 2 * size_of::<usize>());
    }

    #[test]
    fn message_names_operation_address_and_cause() {
        let e = Error::new("mirror", ErrorKind::Unmapped)
            .at(0x1000)
            .errno(22);
        let text = e.to_string();
        assert!(
            text.starts_with("mirror at 0x1000: no memory is mapped there ("),
            "{text}"
        );
    }
}
