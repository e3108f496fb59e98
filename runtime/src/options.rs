//! [`Options`]: how a range is mirrored.

/// How CPU faults on mirrored memory are delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Delivery {
    /// In the faulting thread, by `SIGBUS`: the fastest, and the same for root and for a plain user. A system call on a
    /// page that a device holds fails with `EFAULT`; [`pin`](crate::Mirror::pin) guards against that.
    Inline,
    /// By a monitor thread that reads the userfaultfd.
    Thread,
}

/// How many pages one fault moves at most, aligned to as many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Granule {
    /// 4 KiB: one page.
    Page,
    /// 64 KiB: 16 pages.
    #[default]
    Big,
    /// 2 MiB: 512 pages.
    Huge,
}

impl Granule {
    /// Pages in a granule.
    #[must_use]
    pub const fn pages(self) -> usize {
        match self {
            Self::Page => 1,
            Self::Big => 16,
            Self::Huge => 512,
        }
    }

    /// Bytes in a granule.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.pages() * crate::addr::PAGE_SIZE
    }
}

/// How a range is mirrored. `Options::default()` is right for most.
///
/// ```
/// use svm::{Granule, Options};
/// let options = Options::new().granule(Granule::Page).read_mostly(true);
/// assert_eq!(options.granule.bytes(), 4096);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// How CPU faults are delivered. `None`: [`Delivery::Inline`] where the kernel can, else [`Delivery::Thread`].
    pub delivery: Option<Delivery>,
    /// How many pages one fault moves.
    pub granule: Granule,
    /// Whether windows (and `Buffer`s) ask for transparent huge pages. Such a `Buffer` is populated when it is made.
    pub huge_pages: bool,
    /// Whether a device read duplicates at once instead of migrating.
    pub read_mostly: bool,
    /// Whether system calls on mirrored memory must work while pages are away.
    pub transparent_syscalls: bool,
}

impl Options {
    /// The defaults: inline delivery where the kernel can, 64 KiB granule.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses the door for CPU faults: this one, or mirroring fails.
    #[must_use]
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = Some(delivery);
        self
    }

    /// Chooses how many pages one fault moves.
    #[must_use]
    pub fn granule(mut self, granule: Granule) -> Self {
        self.granule = granule;
        self
    }

    /// Asks for transparent huge pages on both sides, so that a whole block can change owner in about a microsecond.
    #[must_use]
    pub fn huge_pages(mut self, yes: bool) -> Self {
        self.huge_pages = yes;
        self
    }

    /// Says that devices mostly read: they get duplicates, and CPU reads stay free.
    #[must_use]
    pub fn read_mostly(mut self, yes: bool) -> Self {
        self.read_mostly = yes;
        self
    }

    /// Demands that system calls may touch mirrored memory at any time. Implies [`Delivery::Thread`]; mirroring fails with
    /// an error where this process may not handle faults of the kernel.
    #[must_use]
    pub fn transparent_syscalls(mut self, yes: bool) -> Self {
        self.transparent_syscalls = yes;
        if yes {
            self.delivery = Some(Delivery::Thread);
        }
        self
    }
}
