//! What a userfaultfd does to one page: COPY, ZEROPAGE, POISON, MOVE, WRITEPROTECT.
//!
//! A call over several pages is made of these by `sys`, and stops at the first that stops it. As on Linux 6.18, MOVE may say EEXIST or
//! ENOENT of a page that it has moved ([`Quirks::stale_errors`](super::Quirks::stale_errors)); or EAGAIN, where `svm` has made the call again.

use super::{Kernel, Page, chance};
use crate::addr::PageRange;
use crate::sys::uffd::{Mode, Protect, Stop};
use shuttle::rand::{Rng, thread_rng};

impl Kernel {
    fn check_filling(&self, id: usize, dst: usize) -> Result<(), Stop> {
        if self.uffds[id].changing > 0 || chance(self.quirks.spurious_changing) {
            return Err(Stop::Changing);
        }
        if self.registration(dst).is_none_or(|(of, _)| of != id) {
            return Err(Stop::NotPresent);
        }
        if self.pages.contains_key(&dst) {
            return Err(Stop::Exists);
        }
        Ok(())
    }

    pub(crate) fn copy_one(
        &mut self,
        id: usize,
        dst: usize,
        src: usize,
        protect: Protect,
    ) -> Result<(), Stop> {
        self.check_filling(id, dst)?;
        let contents = match (self.pages.get(&src), self.mapping(src)) {
            (Some(page), _) if !page.poisoned => page.contents,
            // A hole that the kernel itself may not fill, or memory that is not there.
            (Some(_), _) => return Err(Stop::Fault),
            (None, Some(mapping)) if mapping.registered.is_some() => return Err(Stop::Fault),
            // A hole of ordinary memory; or memory of the runtime's own: its zeros.
            (None, _) => 0,
        };
        self.pages.insert(
            dst,
            Page {
                contents,
                protected: protect == Protect::Yes,
                ..Page::default()
            },
        );
        Ok(())
    }

    pub(crate) fn zero_one(&mut self, id: usize, dst: usize) -> Result<(), Stop> {
        self.check_filling(id, dst)?;
        self.pages.insert(dst, Page::default());
        Ok(())
    }

    pub(crate) fn poison_one(&mut self, id: usize, dst: usize) -> Result<(), Stop> {
        self.check_filling(id, dst)?;
        let page = Page {
            poisoned: true,
            ..Page::default()
        };
        self.pages.insert(dst, page);
        Ok(())
    }

    /// Whether a MOVE is one that the kernel begins: within one mapping on either side.
    pub(crate) fn may_move(&self, id: usize, dst: PageRange, src: usize) -> Result<(), Stop> {
        let src = PageRange::from_pages(src, dst.nr_pages()).ok_or(Stop::Invalid)?;
        if self.uffds[id].changing > 0 {
            return Err(Stop::Changing);
        }
        let within = |range: PageRange| {
            self.mapping(range.start())
                .filter(|m| range.end() <= m.range.end())
        };
        let to = within(dst).ok_or(Stop::Invalid)?;
        within(src).ok_or(Stop::Invalid)?;
        if to.registered.is_none_or(|(of, _)| of != id) {
            return Err(Stop::Invalid);
        }
        Ok(())
    }

    pub(crate) fn move_one(&mut self, id: usize, dst: usize, src: usize) -> Result<(), Stop> {
        if self.uffds[id].changing > 0 || chance(self.quirks.spurious_changing) {
            return Err(Stop::Changing);
        }
        // The mapping may have changed since the call began: then it would not have got here.
        if self.registration(dst).is_none_or(|(of, _)| of != id) || self.mapping(src).is_none() {
            return Err(Stop::Invalid);
        }
        if self.pages.contains_key(&dst) {
            return Err(Stop::Exists);
        }
        let Some(&page) = self.pages.get(&src) else {
            return Err(Stop::NotPresent);
        };
        if page.shared {
            return Err(Stop::Busy);
        }
        self.pages.remove(&src);
        self.pages.insert(
            dst,
            Page {
                contents: page.contents,
                ..Page::default()
            },
        );
        if chance(self.quirks.stale_errors) {
            // The last one where the call was made again, and a mapping was changing by then.
            let errors = [Stop::Exists, Stop::NotPresent, Stop::Changing];
            return Err(errors[thread_rng().gen_range(0..errors.len())]);
        }
        Ok(())
    }

    pub(crate) fn protect_one(&mut self, id: usize, at: usize, protect: bool) -> Result<(), Stop> {
        if self.uffds[id].changing > 0 || chance(self.quirks.spurious_changing) {
            return Err(Stop::Changing);
        }
        let wanted = |(of, mode): (usize, Mode)| of == id && mode.contains(Mode::WP);
        if !self.registration(at).is_some_and(wanted) {
            return Err(Stop::NotPresent);
        }
        if let Some(page) = self.pages.get_mut(&at) {
            page.protected = protect;
        }
        Ok(())
    }
}
