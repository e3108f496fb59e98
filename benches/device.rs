//! A device without workers: it faults pages in and gives them up, and does nothing else by itself. What is measured with it is the
//! runtime alone; what an accelerator adds is measured by the benches that use one.

use std::time::Duration;

use anyhow::Result;
use svm::{
    Access, AttachOptions, Attachment, Buffer, Device, DeviceLock, Error, Invalidation, Keep,
    MapInfo, MappedRef, Options, PageBits, Range, Stats, Valid, WouldBlock,
};

const TIMEOUT: Duration = Duration::from_secs(10);

/// The device the runtime sees: a lock, and two bitmaps per region.
#[derive(Debug, Default)]
pub struct Idle {
    lock: DeviceLock,
}

/// Translations of one region.
#[derive(Debug)]
pub struct Table {
    readable: PageBits,
    writable: PageBits,
}

// SAFETY: the device makes no access of its own: its table alone says what it could access. `invalidate` clears that under the
// device lock, takes no other and allocates nothing. What a bench does with the frames (`Rig::frames_addr`) it does on the one thread
// that fetches and releases them, so that no access is in flight while either goes on.
unsafe impl Device for Idle {
    type Table = Table;

    fn map(&self, map: &MapInfo) -> Result<Table, Error> {
        Ok(Table {
            readable: PageBits::new(map.nr_pages)?,
            writable: PageBits::new(map.nr_pages)?,
        })
    }

    fn lock(&self) -> &DeviceLock {
        &self.lock
    }

    fn invalidate(&self, table: &Table, inv: &Invalidation) -> Result<(), WouldBlock> {
        let _guard = self.lock.lock_for(inv.blocking())?;
        table.writable.remove(inv.block(), inv.pages());
        if inv.keep() == Keep::Nothing {
            table.readable.remove(inv.block(), inv.pages());
        }
        Ok(())
    }

    fn quiesced(&self, _table: &Table, _inv: &Invalidation) -> bool {
        true
    }
}

fn install(table: &Table, valid: &Valid) {
    table.readable.install(valid, Access::Read);
    table.writable.install(valid, Access::Write);
}

fn first_page(buffer: &Buffer<u8>) -> usize {
    let view = buffer.view();
    (view.addr() - view.region().base()) / svm::addr::PAGE_SIZE
}

fn fault(
    range: &mut Range<Idle>,
    mapped: &MappedRef<Idle>,
    pages: std::ops::Range<usize>,
    access: Access,
) -> Result<()> {
    range.fault_in(mapped, pages, access, 0, TIMEOUT, |valid, _guard| {
        install(mapped.table(), valid);
    })?;
    Ok(())
}

/// A mirrored buffer, the device on it, and one range to fault with.
#[derive(Debug)]
pub struct Rig {
    // In the order in which they go: the ranges and the mappings before what they refer to.
    range: Range<Idle>,
    /// For threads that fault side by side.
    ranges: Vec<Range<Idle>>,
    /// Other regions that the device maps, one page each, which it holds.
    regions: Vec<(MappedRef<Idle>, Buffer<u8>)>,
    mapped: MappedRef<Idle>,
    attachment: Attachment<Idle>,
    /// Other devices that map the memory.
    others: Vec<(Range<Idle>, MappedRef<Idle>, Attachment<Idle>)>,
    buffer: Buffer<u8>,
}

impl Rig {
    /// `len` bytes, every page populated.
    ///
    /// # Errors
    /// As [`svm::attach`] and [`Buffer::with_options`].
    pub fn new(len: usize, options: &Options) -> Result<Self> {
        Self::sparse(len, 0..len, options)
    }

    /// `len` bytes, of which those of `populated` are.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn sparse(
        len: usize,
        populated: std::ops::Range<usize>,
        options: &Options,
    ) -> Result<Self> {
        let mut buffer = Buffer::with_options(len, options)?;
        buffer.as_mut_slice()[populated].fill(1);
        let attachment = svm::attach(Idle::default(), AttachOptions::new())?;
        let mapped = attachment.map(buffer.view().region())?;
        let range = attachment.range()?;
        Ok(Self {
            range,
            ranges: Vec::new(),
            regions: Vec::new(),
            mapped,
            attachment,
            others: Vec::new(),
            buffer,
        })
    }

    /// Attaches `nr` other devices, which map the memory too.
    ///
    /// # Errors
    /// As [`svm::attach`].
    pub fn with_others(mut self, nr: usize) -> Result<Self> {
        for _ in 0..nr {
            let attachment = svm::attach(Idle::default(), AttachOptions::new())?;
            let mapped = attachment.map(self.buffer.view().region())?;
            self.others.push((attachment.range()?, mapped, attachment));
        }
        Ok(self)
    }

    /// Mirrors `nr` other regions of one page, which the device maps and faults in: each has been away once, and home again, and away.
    ///
    /// # Errors
    /// As [`Buffer::with_options`], and the fault that ended it.
    pub fn with_regions(mut self, nr: usize, options: &Options) -> Result<Self> {
        for _ in 0..nr {
            let mut buffer = Buffer::<u8>::with_options(svm::addr::PAGE_SIZE, options)?;
            let mapped = self.attachment.map(buffer.view().region())?;
            let page = first_page(&buffer);
            for _ in 0..2 {
                buffer.as_mut_slice()[0] += 1;
                fault(&mut self.range, &mapped, page..page + 1, Access::Write)?;
            }
            self.regions.push((mapped, buffer));
        }
        Ok(self)
    }

    /// Makes ranges for `nr` threads.
    ///
    /// # Errors
    /// As [`Attachment::range`].
    pub fn with_threads(mut self, nr: usize) -> Result<Self> {
        let ranges = (0..nr).map(|_| self.attachment.range());
        self.ranges = ranges.collect::<Result<_, _>>()?;
        Ok(self)
    }

    /// A part of the region for each thread, as large as the others'.
    pub fn parts(&mut self) -> impl Iterator<Item = Part<'_>> {
        let (first_page, mapped) = (first_page(&self.buffer), &self.mapped);
        let bytes = self.buffer.as_mut_slice();
        let len = bytes.len() / self.ranges.len().max(1);
        let parts = self.ranges.iter_mut().zip(bytes.chunks_exact_mut(len));
        parts.enumerate().map(move |(i, (range, bytes))| Part {
            range,
            mapped,
            bytes,
            first_page: first_page + i * len / svm::addr::PAGE_SIZE,
        })
    }

    /// The other devices read `pages` of one block.
    ///
    /// # Errors
    /// The fault that ended it.
    pub fn others_read(&mut self, pages: &std::ops::Range<usize>) -> Result<()> {
        let mut others = self.others.iter_mut();
        others.try_for_each(|(range, mapped, _)| fault(range, mapped, pages.clone(), Access::Read))
    }

    /// One device fault on `pages` of one block, as a worker makes it.
    ///
    /// # Errors
    /// The fault that ended it.
    pub fn fault(&mut self, pages: std::ops::Range<usize>, access: Access) -> Result<()> {
        fault(&mut self.range, &self.mapped, pages, access)
    }

    /// One update over all of `pages`: what a prefetch is.
    ///
    /// # Errors
    /// The fault that ended it.
    pub fn prefetch(&mut self, pages: std::ops::Range<usize>, access: Access) -> Result<()> {
        loop {
            let mut update = self
                .range
                .start_update(&self.mapped, pages.clone(), TIMEOUT)?;
            update.fault(access)?;
            let guard = self.attachment.device().lock.lock();
            if let Ok(valid) = update.end_update(&guard) {
                valid
                    .iter()
                    .for_each(|valid| install(self.mapped.table(), valid));
                return Ok(());
            }
        }
    }

    /// Brings everything home.
    ///
    /// # Errors
    /// As [`Attachment::release`].
    pub fn release(&self) -> Result<()> {
        Ok(self.attachment.release()?)
    }

    /// Where the device finds the memory: in its window. What was fetched, and not released since, may be accessed there.
    #[must_use]
    pub fn frames_addr(&self) -> usize {
        let view = self.buffer.view();
        view.addr().wrapping_add_signed(self.mapped.offset())
    }

    /// The memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        self.buffer.as_mut_slice()
    }

    /// What was done with it so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.buffer.stats()
    }

    /// Index of the first page, from the region's base.
    #[must_use]
    pub fn first_page(&self) -> usize {
        first_page(&self.buffer)
    }
}

/// A part of a region, and what one thread needs to fault on it beside others.
#[derive(Debug)]
pub struct Part<'r> {
    range: &'r mut Range<Idle>,
    mapped: &'r MappedRef<Idle>,
    /// Its memory.
    pub bytes: &'r mut [u8],
    /// Index of its first page, from the region's base.
    pub first_page: usize,
}

impl Part<'_> {
    /// As [`Rig::fault`].
    ///
    /// # Errors
    /// The fault that ended it.
    pub fn fault(&mut self, pages: std::ops::Range<usize>, access: Access) -> Result<()> {
        fault(self.range, self.mapped, pages, access)
    }
}
