//! A buffer and a device on it, which does nothing but what a test asks for.

use svm::{Access, AttachOptions, Attachment, Buffer, MappedRef, Options, Update};
use tests::idle::{Idle, TIMEOUT, fault_in};

use crate::PAGE;

/// A buffer, and a device that faults on it when told to: with what a driver keeps, so that nothing is made on the way.
pub(crate) struct Rig {
    pub(crate) range: svm::Range<Idle>,
    pub(crate) mapped: MappedRef<Idle>,
    pub(crate) attachment: Attachment<Idle>,
    pub(crate) buffer: Buffer<u8>,
    _signals: svm::WorkerThread,
}

impl Rig {
    pub(crate) fn new(len: usize, options: &Options) -> Self {
        Self::with_memory(len, options, AttachOptions::new())
    }

    pub(crate) fn with_memory(len: usize, options: &Options, attach: AttachOptions) -> Self {
        let mut buffer = Buffer::with_options(len, options).unwrap();
        buffer.as_mut_slice().fill(1);
        Self::on(buffer, attach)
    }

    pub(crate) fn on(buffer: Buffer<u8>, attach: AttachOptions) -> Self {
        let attachment = svm::attach(Idle::default(), attach).unwrap();
        let mapped = attachment.map(buffer.view().region()).unwrap();
        Self {
            range: attachment.range().unwrap(),
            mapped,
            attachment,
            buffer,
            _signals: svm::worker_thread(),
        }
    }

    /// The region's page at `byte` of the buffer.
    pub(crate) fn page(&self, byte: usize) -> usize {
        let view = self.buffer.view();
        (view.addr() + byte - view.region().base()) / PAGE
    }

    /// One device fault.
    pub(crate) fn fault(&mut self, byte: usize, access: Access) {
        let page = self.page(byte);
        fault_in(&mut self.range, &self.mapped, page..page + 1, access).unwrap();
    }

    /// One update over everything: a prefetch.
    pub(crate) fn prefetch(&mut self) {
        self.update(|update| update.fault(Access::Write).unwrap());
    }

    /// One update over everything: a migration.
    pub(crate) fn migrate(&mut self) {
        self.update(|update| update.migrate().unwrap());
    }

    fn update(&mut self, go: impl FnOnce(&mut Update<'_, Idle>)) {
        let pages = self.page(0)..self.page(0) + self.buffer.len() / PAGE;
        let mut update = self
            .range
            .start_update(&self.mapped, pages, TIMEOUT)
            .unwrap();
        go(&mut update);
        let guard = self.attachment.device().device_lock().lock();
        assert!(update.end_update(&guard).is_ok(), "nobody interrupts it");
    }

    /// The CPU writes a byte.
    pub(crate) fn write(&mut self, byte: usize) {
        write(&mut self.buffer, byte);
    }

    /// The CPU reads a byte.
    pub(crate) fn read(&self, byte: usize) -> u8 {
        // SAFETY: in the buffer; volatile, as the fault is what it is for.
        unsafe { (&raw const self.buffer.as_slice()[byte]).read_volatile() }
    }
}

/// The CPU writes a byte of a buffer.
pub(crate) fn write(buffer: &mut Buffer<u8>, byte: usize) {
    // SAFETY: in the buffer; volatile, as the fault is what it is for.
    unsafe { (&raw mut buffer.as_mut_slice()[byte]).write_volatile(7) };
}

/// The same by another thread. Through the thread door that is the end of a run of faults (`runtime/src/near.rs`), as populating a buffer
/// is: for some faults from then on the monitor neither looks where the thread is, nor goes there, nor waits to leave again.
pub(crate) fn write_by_another(buffer: &mut Buffer<u8>, byte: usize) {
    std::thread::scope(|scope| scope.spawn(|| write(buffer, byte)).join().unwrap());
}
