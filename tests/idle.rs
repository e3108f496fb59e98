//! [`Idle`]: a device that holds no translation, so that a test decides by itself what it faults in and when it lets go.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use svm::{
    Access, AttachOptions, Attachment, Device, DeviceFault, DeviceLock, Error, Invalidation,
    MapInfo, MappedRef, WouldBlock,
};

/// How long a fault may take without progress, unless the test says otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(3);

/// A device without a table. Its memory is read and written by the test, through the window.
#[derive(Debug, Default)]
pub struct Idle {
    lock: DeviceLock,
    /// Bit *b*: an access to block *b* never ends, as of a kernel that hangs in a span.
    pub stuck: AtomicU64,
    /// How often it says that an access goes on, before none does.
    pub busy: AtomicU64,
    /// Pauses less resumptions: 0 or 1, or somebody was forgotten.
    pub pauses: AtomicI64,
    /// What it has seen so far.
    pub seen: Arc<Seen>,
}

/// Of how many pages a device was told, and how often it was asked whether it is done. A test keeps it when the device is gone.
#[derive(Debug, Default)]
pub struct Seen {
    /// Pages.
    pub told: AtomicU64,
    /// Questions.
    pub asked: AtomicU64,
}

// SAFETY: it has no translations. A test that accesses a window itself does so where nothing takes the page from it.
unsafe impl Device for Idle {
    type Table = ();

    fn map(&self, _: &MapInfo) -> Result<(), Error> {
        Ok(())
    }

    fn lock(&self) -> &DeviceLock {
        &self.lock
    }

    fn invalidate(&self, (): &(), inv: &Invalidation) -> Result<(), WouldBlock> {
        let _guard = self.lock.lock_for(inv.blocking())?;
        let nr_pages = inv.pages().count() as u64;
        self.seen.told.fetch_add(nr_pages, Ordering::SeqCst);
        Ok(())
    }

    fn quiesced(&self, (): &(), inv: &Invalidation) -> bool {
        let asked = self.seen.asked.fetch_add(1, Ordering::SeqCst);
        let stuck = self.stuck.load(Ordering::SeqCst);
        let is_stuck = inv.block() < 64 && stuck >> inv.block() & 1 == 1;
        !is_stuck && asked >= self.busy.load(Ordering::SeqCst)
    }

    fn pause(&self) {
        self.pauses.fetch_add(1, Ordering::SeqCst);
    }

    /// Never: an event's reader waits for it as long as it ever does.
    fn is_paused(&self) -> bool {
        false
    }

    fn resume(&self) {
        self.pauses.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Idle {
    /// Its lock.
    #[must_use]
    pub fn device_lock(&self) -> &DeviceLock {
        &self.lock
    }

    /// Attaches one.
    ///
    /// # Errors
    /// As [`svm::attach`].
    pub fn attach() -> Result<Attachment<Self>, Error> {
        svm::attach(Self::default(), AttachOptions::new())
    }
}

/// Faults pages in and installs nothing.
///
/// # Errors
/// The fault that ended it.
pub fn fault_in(
    range: &mut svm::Range<Idle>,
    mapped: &MappedRef<Idle>,
    pages: Range<usize>,
    access: Access,
) -> Result<(), DeviceFault> {
    range.fault_in(mapped, pages, access, 0, TIMEOUT, |_, _| {})
}
