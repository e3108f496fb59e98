//! [`Buffer`]: mirrored memory that owns its pages.

use core::fmt;
use core::ops::RangeBounds;

use bytemuck::Pod;

use crate::addr::{BLOCK_SIZE, PAGE_SIZE};
use crate::error::{Error, ErrorKind, Result};
use crate::mirror::{Mirror, PinMut, mirror_raw_typed};
use crate::options::{Granule, Options};
use crate::pin::Pin;
use crate::share::Shared;
use crate::space::AddressSpace;
use crate::stats::Stats;
use crate::sys::mmap::Memory;
use crate::view::{View, ViewMut};

/// A mirrored array in pages of its own: `'static`, zero at first, aligned to a page, to 64 KiB if it is as
/// large, and to a huge page from 2 MiB on.
///
/// No neighbour shares its pages, so there are no edges, and it can be moved into a launch that outlives the caller.
///
/// ```
/// # if !svm::Capabilities::probe().is_usable() { return Ok(()) }
/// let mut buffer = svm::Buffer::<f32>::zeroed(1000)?;
/// buffer.as_mut_slice()[999] = 1.5;
/// assert_eq!(buffer.as_slice()[999], 1.5);
/// # Ok::<(), svm::Error>(())
/// ```
pub struct Buffer<T: Pod> {
    /// Before the memory: it is closed, every page home, before the memory goes.
    mirror: Mirror<'static, T>,
    _memory: Memory,
}

impl<T: Pod> Buffer<T> {
    /// `len` zeroed elements.
    ///
    /// # Errors
    /// No memory or address space, or as [`mirror`](crate::mirror).
    pub fn zeroed(len: usize) -> Result<Self> {
        Self::with_options(len, &Options::default())
    }

    /// A copy of `elements`.
    ///
    /// # Errors
    /// As [`zeroed`](Self::zeroed).
    pub fn from_slice(elements: &[T]) -> Result<Self> {
        let mut buffer = Self::zeroed(elements.len())?;
        buffer.as_mut_slice().copy_from_slice(elements);
        Ok(buffer)
    }

    /// `len` zeroed elements, mirrored as `options` say.
    ///
    /// # Errors
    /// As [`zeroed`](Self::zeroed).
    pub fn with_options(len: usize, options: &Options) -> Result<Self> {
        const {
            assert!(
                align_of::<T>() <= PAGE_SIZE,
                "a buffer's elements are aligned to a page at most"
            );
        };
        AddressSpace::get("buffer")?;
        let no_room = |errno| Error::new("buffer", ErrorKind::OutOfMemory).errno(errno);
        let bytes = len
            .checked_mul(size_of::<T>())
            .ok_or_else(|| no_room(libc::ENOMEM))?;
        // Aligned as the largest granule that fits, so that no granule is cut.
        let align = [BLOCK_SIZE, Granule::Big.bytes()]
            .into_iter()
            .find(|&a| bytes >= a)
            .unwrap_or(PAGE_SIZE);
        let padded = bytes
            .max(1)
            .checked_next_multiple_of(PAGE_SIZE)
            .ok_or_else(|| no_room(libc::ENOMEM))?;
        let memory = Memory::aligned(padded, align)
            .map_err(|e| no_room(e.raw_os_error().unwrap_or(libc::ENOMEM)))?;
        if options.huge_pages {
            memory.huge_pages();
        }
        // The whole of its last page belongs to the buffer, so that page moves too.
        let mirror = mirror_raw_typed(memory.start(), padded, len, options)?;
        Ok(Self {
            mirror,
            _memory: memory,
        })
    }

    /// The elements, for reading on the CPU.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        self.mirror.as_slice()
    }

    /// The elements, for writing on the CPU.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        self.mirror.as_mut_slice()
    }

    /// Lends the elements to kernels that read them.
    #[must_use]
    pub fn view(&self) -> View<'_, T> {
        self.mirror.view()
    }

    /// Lends the elements to kernels that read and write them.
    #[must_use]
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        self.mirror.view_mut()
    }

    /// Opens the elements to both sides at once, by relaxed atomic accesses only.
    #[must_use]
    pub fn share(&mut self) -> Shared<'_, T> {
        self.mirror.share()
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mirror.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mirror.is_empty()
    }

    /// As [`Mirror::advise_read_mostly`].
    pub fn advise_read_mostly(&self, yes: bool) {
        self.mirror.advise_read_mostly(yes);
    }

    /// As [`Mirror::pin`].
    ///
    /// # Errors
    /// As there.
    pub fn pin(&self, elements: impl RangeBounds<usize>) -> Result<Pin<'_>> {
        self.mirror.pin(elements)
    }

    /// As [`Mirror::pin_mut`].
    ///
    /// # Errors
    /// As there.
    pub fn pin_mut(&mut self, elements: impl RangeBounds<usize>) -> Result<PinMut<'_, T>> {
        self.mirror.pin_mut(elements)
    }

    /// What was done with this memory so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.mirror.stats()
    }
}

impl<T: Pod> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("mirror", &self.mirror)
            .finish_non_exhaustive()
    }
}
