//! The directory: who holds the current contents of each page of one block.
//!
//! # State
//!
//! A block is 512 pages, and everything known of them is a handful of [`PageMask`]s under the block's lock:
//!
//! | mask | page in it means |
//! |---|---|
//! | `away` | the CPU holds no copy: its page-table entry is empty and the next touch is a missing fault |
//! | `frames` of device *d* | the page of *d*'s window holds a current copy |
//! | `junk` of device *d* | the page of *d*'s window is populated, but stale; it is discarded before the window page is filled again |
//! | `pinned` | a [`Pin`](crate::Pin) keeps the page with the CPU; devices access it in place |
//! | `pinning` | a pin of the page is not complete: nobody has it in place yet |
//! | `unmovable` | the kernel refused to move the page (pinned for DMA, protected): devices access it in place |
//! | `severed` | a span outstayed a shootdown of the page ([`crate::overrun`]): until it is over no window page is filled there; devices access it in place |
//! | `pending` | the kernel is discarding or unmapping the page, or accesses to a frame that was given up are in flight: nobody may touch it until that is over |
//! | `displaced` | `mremap` moved the page: it comes home at its new address, and is out of devices' reach |
//! | `lost` | the page is `away`, and the window that should hold it does not: an access is an error until the page is discarded |
//! | `gone` | the page left the region (unmapped, moved or discarded for good) and is no longer ours |
//!
//! The *holders* of a page are the CPU, unless it is `away`, and every device whose `frames` contain it. From them
//! follows everything else:
//!
//! | holders | name | CPU may | device *d* may |
//! |---|---|---|---|
//! | CPU | host | read, write | nothing |
//! | CPU and devices | shared | read (the entry is write-protected) | read, if it is a holder |
//! | *d* alone | device | nothing | read, write |
//! | several devices | device-shared | nothing | read, if it is a holder |
//!
//! **D1.** Whoever writes is the only holder. **D2.** A page has at least one holder. **D3.** `frames` and `junk` of one
//! device are disjoint. **D4.** The masks are changed directly after the system call that made them true, one run at a
//! time, under the block's lock; so an interrupted movement leaves them exact, and the next fault goes on from there.

use bytemuck::Zeroable;

use crate::addr::PAGES_PER_BLOCK;
use crate::error::Access;
use crate::mask::PageMask;
use crate::sync::Mutex;
use crate::sync::mutation::{Mutation, mutated};

/// How many devices may be attached at once.
pub const MAX_DEVICES: usize = 8;

/// The slot of an attached device, an index below [`MAX_DEVICES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceId(pub(crate) u8);

impl DeviceId {
    #[inline]
    pub(crate) const fn index(self) -> usize {
        self.0 as usize
    }

    #[inline]
    pub(crate) fn all() -> impl Iterator<Item = DeviceId> + Clone {
        (0..MAX_DEVICES as u8).map(DeviceId)
    }
}

impl core::fmt::Display for DeviceId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "device {}", self.0)
    }
}

/// A set of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct DeviceSet(u8);

impl DeviceSet {
    #[inline]
    pub(crate) fn insert(&mut self, device: DeviceId) {
        self.0 |= 1 << device.0;
    }

    #[inline]
    pub(crate) const fn contains(self, device: DeviceId) -> bool {
        self.0 >> device.0 & 1 == 1
    }

    /// Every device slot.
    #[inline]
    pub(crate) const fn all() -> Self {
        Self(!0)
    }

    /// The set of one device.
    #[inline]
    pub(crate) const fn one(device: DeviceId) -> Self {
        Self(1 << device.0)
    }

    #[inline]
    pub(crate) const fn without(self, device: DeviceId) -> Self {
        Self(self.0 & !(1 << device.0))
    }

    #[inline]
    pub(crate) const fn minus(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    #[inline]
    pub(crate) const fn union(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    #[inline]
    pub(crate) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[inline]
    pub(crate) fn iter(self) -> impl Iterator<Item = DeviceId> + Clone {
        DeviceId::all().filter(move |d| self.0 >> d.0 & 1 == 1)
    }
}

/// One block: its lock, and under it the directory.
///
/// All-zero bytes are a valid block: every page with the CPU, nobody else a holder.
pub(crate) type Block = Mutex<BlockState>;

// SAFETY: zero bytes are an unlocked mutex (see `crate::sync::Mutex`) around a `BlockState`, itself `Zeroable`.
unsafe impl Zeroable for Block {}

/// What one device's window holds of a block.
#[derive(Clone, Copy, Debug, Zeroable)]
#[repr(C)]
struct Holding {
    frames: PageMask,
    junk: PageMask,
}

/// The directory of one block. See the [module](self).
#[derive(Clone, Debug, Zeroable)]
#[repr(C)]
pub(crate) struct BlockState {
    /// Devices whose `frames` or `junk` are not empty; keeps the common case from walking all eight.
    occupied: u8,
    /// Whether `gone`, `pinned`, `unmovable`, `severed`, `pending`, `displaced` or `lost` has a page; keeps the common case from looking at them.
    exceptional: u8,
    /// Until when (monotonic ns) pages that a device fetched are not taken from it, and pages the CPU fetched from it.
    lease: Lease,
    away: PageMask,
    gone: PageMask,
    pinned: PageMask,
    pinning: PageMask,
    unmovable: PageMask,
    severed: PageMask,
    pending: PageMask,
    displaced: PageMask,
    lost: PageMask,
    holdings: [Holding; MAX_DEVICES],
}

/// Minimum residencies: until when a contended page stays with the side that fetched it (hazards W4).
#[derive(Clone, Copy, Debug, Default, Zeroable)]
#[repr(C)]
pub(crate) struct Lease {
    pub(crate) device_until_ns: u64,
    pub(crate) cpu_until_ns: u64,
    /// The CPU thread (its identity while it lives) that last fetched a page home, the page, when, and how often in a row.
    pub(crate) cpu_thread: usize,
    pub(crate) cpu_page: u16,
    pub(crate) cpu_repeats: u16,
    pub(crate) cpu_fetched_ns: u64,
}

impl BlockState {
    /// A block whose pages are all with the CPU.
    #[cfg(test)]
    pub(crate) fn new() -> Self {
        const NONE: Holding = Holding {
            frames: PageMask::EMPTY,
            junk: PageMask::EMPTY,
        };
        Self {
            away: PageMask::EMPTY,
            gone: PageMask::EMPTY,
            pinned: PageMask::EMPTY,
            pinning: PageMask::EMPTY,
            unmovable: PageMask::EMPTY,
            severed: PageMask::EMPTY,
            pending: PageMask::EMPTY,
            displaced: PageMask::EMPTY,
            lost: PageMask::EMPTY,
            holdings: [NONE; MAX_DEVICES],
            occupied: 0,
            exceptional: 0,
            lease: Lease::default(),
        }
    }

    #[inline]
    pub(crate) fn away(&self) -> PageMask {
        self.away
    }

    /// Pages out of devices' reach for good.
    #[inline]
    pub(crate) fn gone(&self) -> PageMask {
        self.gone | self.displaced
    }

    #[inline]
    pub(crate) fn pending(&self) -> PageMask {
        self.pending
    }

    #[inline]
    pub(crate) fn displaced(&self) -> PageMask {
        self.displaced
    }

    #[inline]
    pub(crate) fn lost(&self) -> PageMask {
        self.lost
    }

    /// Pages that devices access in place: pinned, unmovable or severed.
    #[inline]
    pub(crate) fn in_place(&self) -> PageMask {
        self.pinned | self.unmovable | self.severed
    }

    #[inline]
    pub(crate) fn severed(&self) -> PageMask {
        self.severed
    }

    /// Pinned pages that are not with the CPU alone yet, or are write-protected still: an access in place might fault.
    pub(crate) fn pins_in_progress(&self) -> PageMask {
        self.pinned & (self.pinning | self.away | self.held_by_devices(None))
    }

    #[inline]
    pub(crate) fn frames(&self, device: DeviceId) -> PageMask {
        self.holdings[device.index()].frames
    }

    #[inline]
    pub(crate) fn junk(&self, device: DeviceId) -> PageMask {
        self.holdings[device.index()].junk
    }

    /// Window pages of `device` that are populated, current or not: what counts against its memory.
    #[inline]
    pub(crate) fn resident(&self, device: DeviceId) -> PageMask {
        self.frames(device) | self.junk(device)
    }

    /// Whether every page of `pages` is the CPU's alone, so that `device` may be given them without a look at anybody else: nobody
    /// else's window holds anything of the block, and this one's nothing of these pages.
    #[inline]
    pub(crate) fn is_plain_for(&self, device: DeviceId, pages: &PageMask) -> bool {
        self.is_only_with_cpu(device, pages) && !self.junk(device).intersects(pages)
    }

    /// Whether every page is the CPU's alone, and no device's window holds anything of the block.
    #[inline]
    pub(crate) fn is_at_rest(&self) -> bool {
        self.occupied == 0 && self.exceptional == 0 && self.away.is_empty()
    }

    /// Whether every page is `device`'s alone.
    #[inline]
    pub(crate) fn is_all_with(&self, device: DeviceId) -> bool {
        self.occupied == 1 << device.0
            && self.exceptional == 0
            && self.away == PageMask::FULL
            && self.frames(device) == PageMask::FULL
    }

    /// As [`is_plain_for`](Self::is_plain_for), of the pages `bits` of one word.
    #[inline]
    pub(crate) fn is_plain_word(&self, device: DeviceId, word: usize, bits: u64) -> bool {
        let Holding { frames, junk } = &self.holdings[device.index()];
        let held = self.away.word(word) | frames.word(word) | junk.word(word);
        held & bits == 0
            && self.occupied & !(1 << device.0) == 0
            && (self.exceptional == 0 || self.exceptions().word(word) & bits == 0)
    }

    /// As [`is_plain_for`](Self::is_plain_for), but that `device`'s window still holds a stale copy of each of `pages`.
    #[inline]
    pub(crate) fn is_stale_for(&self, device: DeviceId, pages: &PageMask) -> bool {
        self.is_only_with_cpu(device, pages) && self.junk(device).contains_all(pages)
    }

    #[inline]
    fn is_only_with_cpu(&self, device: DeviceId, pages: &PageMask) -> bool {
        self.occupied & !(1 << device.0) == 0
            && !self.away.intersects(pages)
            && !self.frames(device).intersects(pages)
            && (self.exceptional == 0 || !self.exceptions().intersects(pages))
    }

    /// Whether some page is not simply somebody's.
    #[inline]
    pub(crate) fn has_exceptions(&self) -> bool {
        self.exceptional != 0
    }

    /// Pages that are not simply somebody's.
    #[cold]
    fn exceptions(&self) -> PageMask {
        let in_place = self.pinned | self.unmovable | self.severed;
        in_place | self.gone | self.pending | self.displaced | self.lost
    }

    /// After a change of one of these.
    #[cold]
    fn exceptions_changed(&mut self) {
        self.exceptional = u8::from(!self.exceptions().is_empty());
    }

    #[inline]
    pub(crate) fn lease(&mut self) -> &mut Lease {
        &mut self.lease
    }

    #[inline]
    fn occupants(&self) -> impl Iterator<Item = DeviceId> + use<> {
        DeviceSet(self.occupied).iter()
    }

    /// Pages of which some device other than `except` holds a copy.
    #[inline]
    pub(crate) fn held_by_devices(&self, except: Option<DeviceId>) -> PageMask {
        let mut held = PageMask::EMPTY;
        for device in self.occupants() {
            if Some(device) != except {
                held |= self.frames(device);
            }
        }
        held
    }

    /// Pages that the CPU and some device hold: write-protected for the CPU.
    #[inline]
    pub(crate) fn shared(&self) -> PageMask {
        self.held_by_devices(None) - self.away
    }

    /// Pages whose only holder is `device`.
    #[inline]
    pub(crate) fn exclusive_to(&self, device: DeviceId) -> PageMask {
        (self.frames(device) & self.away) - self.held_by_devices(Some(device))
    }

    /// Devices that hold some page of `pages`.
    #[inline]
    pub(crate) fn holders(&self, pages: &PageMask) -> DeviceSet {
        let mut set = DeviceSet::default();
        for device in self.occupants() {
            if self.frames(device).intersects(pages) {
                set.insert(device);
            }
        }
        set
    }

    /// A device that holds `page`.
    #[inline]
    pub(crate) fn holder_of(&self, page: usize) -> Option<DeviceId> {
        self.occupants().find(|&d| self.frames(d).contains(page))
    }

    #[cfg(test)]
    pub(crate) fn is_home(&self) -> bool {
        self.away.is_empty() && self.occupied == 0
    }

    // Transitions. Each is called directly after the system call that made it true (D4).

    /// The CPU's page moved into `device`'s window.
    #[inline]
    pub(crate) fn moved_out(&mut self, device: DeviceId, pages: PageMask) {
        self.away |= pages;
        self.filled(device, pages);
    }

    /// [`moved_out`](Self::moved_out), of the pages `bits` of one word, which were [plain](Self::is_plain_word).
    #[inline]
    pub(crate) fn moved_out_word(&mut self, device: DeviceId, word: usize, bits: u64) {
        self.away.insert_word(word, bits);
        self.holdings[device.index()].frames.insert_word(word, bits);
        self.occupied |= 1 << device.0;
    }

    /// [`moved_out`](Self::moved_out), of the whole block, which was [at rest](Self::is_at_rest).
    #[inline]
    pub(crate) fn moved_out_whole(&mut self, device: DeviceId) {
        self.away = PageMask::FULL;
        self.holdings[device.index()].frames = PageMask::FULL;
        self.occupied |= 1 << device.0;
    }

    /// `device`'s window page moved to the CPU, which holds it alone or with the other frames.
    #[inline]
    pub(crate) fn moved_home(&mut self, device: DeviceId, pages: PageMask) {
        self.away -= pages;
        self.emptied(device, pages);
    }

    /// The CPU was given a write-protected copy of a page that stays where it is.
    #[inline]
    pub(crate) fn copied_home(&mut self, pages: PageMask) {
        self.away -= pages;
    }

    /// `device`'s window was given a copy.
    #[inline]
    pub(crate) fn filled(&mut self, device: DeviceId, pages: PageMask) {
        let holding = &mut self.holdings[device.index()];
        holding.frames |= pages;
        holding.junk -= pages;
        self.occupied |= u8::from(!pages.is_empty()) << device.0;
    }

    /// `device`'s window pages were emptied, whatever they held.
    #[inline]
    pub(crate) fn emptied(&mut self, device: DeviceId, pages: PageMask) {
        let holding = &mut self.holdings[device.index()];
        holding.frames -= pages;
        holding.junk -= pages;
        if holding.frames.is_empty() && holding.junk.is_empty() {
            self.occupied &= !(1 << device.0);
        }
    }

    /// `device` is no longer a holder; what its window has is stale. Its translations are gone already.
    #[inline]
    pub(crate) fn revoked(&mut self, device: DeviceId, pages: PageMask) {
        let holding = &mut self.holdings[device.index()];
        let stale = holding.frames & pages;
        holding.frames -= stale;
        holding.junk |= stale;
    }

    /// Every device but `except` ceases to hold `pages`.
    #[inline]
    pub(crate) fn revoked_all(&mut self, pages: PageMask, except: Option<DeviceId>) {
        for device in self.occupants() {
            if Some(device) != except {
                self.revoked(device, pages);
            }
        }
    }

    /// The CPU's copy was thrown away; a device holds the page.
    #[inline]
    pub(crate) fn host_dropped(&mut self, pages: PageMask) {
        self.away |= pages;
    }

    /// The pages' contents were discarded: nobody's copy is current, and the CPU holds what zero-fill will give.
    #[inline]
    pub(crate) fn discarded(&mut self, pages: PageMask) {
        self.revoked_all(pages, None);
        self.away -= pages;
        self.lost -= pages;
        self.exceptions_changed();
    }

    /// The page, which is `away`, is nowhere. The CPU's entry may be given a poison marker, which looks like a page (hazards M2): from here
    /// on nobody looks there.
    pub(crate) fn set_lost(&mut self, page: usize) {
        self.lost |= PageMask::page(page) & self.away;
        self.exceptions_changed();
    }

    /// The pages left the region.
    #[inline]
    pub(crate) fn left(&mut self, pages: PageMask) {
        self.discarded(pages);
        self.displaced -= pages;
        self.gone |= pages;
        self.exceptions_changed();
    }

    /// The pages were moved to another address; what is away comes home there.
    #[inline]
    pub(crate) fn displaced_to_new_address(&mut self, pages: PageMask) {
        self.displaced |= pages - self.gone;
        self.exceptions_changed();
    }

    #[inline]
    pub(crate) fn set_pending(&mut self, pages: PageMask, pending: bool) {
        if pending {
            self.pending |= pages;
        } else {
            self.pending -= pages;
        }
        self.exceptions_changed();
    }

    #[inline]
    pub(crate) fn set_pinned(&mut self, pages: PageMask, pinned: bool) {
        if pinned {
            self.pinned |= pages;
            if !mutated(Mutation::PinsAtOnce) {
                self.pinning |= pages;
            }
        } else {
            self.pinned -= pages;
            self.pinning -= pages;
        }
        self.exceptions_changed();
    }

    /// The pages are home, un-protected and populated, as a pin promises; or the pin has failed.
    #[inline]
    pub(crate) fn end_pinning(&mut self, pages: PageMask) {
        self.pinning -= pages;
    }

    #[inline]
    pub(crate) fn set_severed(&mut self, pages: PageMask, severed: bool) {
        if severed {
            self.severed |= pages;
        } else {
            self.severed -= pages;
        }
        self.exceptions_changed();
    }

    #[inline]
    pub(crate) fn set_unmovable(&mut self, pages: PageMask) {
        self.unmovable |= pages;
        self.exceptions_changed();
    }

    /// What has to happen so that `device` may access `want`.
    pub(crate) fn plan(
        &self,
        device: DeviceId,
        want: PageMask,
        access: Access,
        read: OnRead,
    ) -> Plan {
        let in_place = want & (self.pinned | ((self.unmovable | self.severed) - self.away));
        let want = want - in_place - self.gone();
        let mine = self.frames(device);
        let others = self.held_by_devices(Some(device));
        match access {
            Access::Write => {
                let need = want - self.exclusive_to(device);
                Plan {
                    in_place,
                    revoke: need & others,
                    downgrade: PageMask::EMPTY,
                    drop_host: (need & mine) - self.away,
                    take: need - mine - self.away,
                    duplicate: PageMask::EMPTY,
                    from_device: (need - mine) & self.away,
                }
            }
            Access::Read => {
                let need = want - mine;
                let alone = need - self.away - others;
                let (take, duplicate) = match read {
                    OnRead::Migrate => (alone, PageMask::EMPTY),
                    OnRead::Duplicate => (PageMask::EMPTY, alone),
                };
                Plan {
                    in_place,
                    revoke: PageMask::EMPTY,
                    downgrade: need & self.away & others,
                    drop_host: PageMask::EMPTY,
                    take,
                    duplicate,
                    from_device: need & others,
                }
            }
        }
    }

    /// Checks D2 and D3; for debug builds and tests.
    pub(crate) fn is_consistent(&self) -> bool {
        let held = self.held_by_devices(None) | !self.away;
        let disjoint = DeviceId::all().all(|d| !self.frames(d).intersects(&self.junk(d)));
        let is_occupied = |d| DeviceSet(self.occupied).contains(d);
        let noted = (self.exceptional == 0) == self.exceptions().is_empty()
            && DeviceId::all().all(|d| is_occupied(d) != self.resident(d).is_empty());
        disjoint && noted && (held | self.gone()) == PageMask::FULL
    }
}

/// What a device read does with a page that only the CPU holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnRead {
    /// Move it: no copy, and no second fault if a write follows.
    Migrate,
    /// Copy it and write-protect the CPU's.
    Duplicate,
}

/// The work of one device round on one block. The masks are disjoint but for `revoke` and `downgrade`, which come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Served at the host address: pinned.
    pub(crate) in_place: PageMask,
    /// Other devices lose their copies.
    pub(crate) revoke: PageMask,
    /// Other devices keep their copies but may no longer write.
    pub(crate) downgrade: PageMask,
    /// The device has a copy; the CPU's is thrown away.
    pub(crate) drop_host: PageMask,
    /// The CPU's page moves into the window.
    pub(crate) take: PageMask,
    /// The CPU's page is duplicated into the window.
    pub(crate) duplicate: PageMask,
    /// The page comes from another device's window: moved for a write, copied for a read.
    pub(crate) from_device: PageMask,
}

impl Plan {
    /// Whether nothing has to change.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.changes().is_empty() && self.revoke.is_empty()
    }

    /// Pages whose holders change.
    #[inline]
    pub(crate) fn changes(&self) -> PageMask {
        self.drop_host
            | self.take
            | self.duplicate
            | self.from_device
            | self.revoke
            | self.downgrade
    }
}

const _: () = assert!(
    size_of::<Block>() <= 4 * PAGES_PER_BLOCK,
    "a block's directory must stay below 4 bytes a page"
);

#[cfg(test)]
mod tests {
    use super::*;

    const A: DeviceId = DeviceId(0);
    const B: DeviceId = DeviceId(3);

    fn pages(start: usize, end: usize) -> PageMask {
        PageMask::range(start..end)
    }

    #[test]
    fn a_fresh_block_is_with_the_cpu() {
        let block = BlockState::new();
        assert!(block.is_home() && block.is_consistent());
        assert!(block.shared().is_empty());
    }

    #[test]
    fn write_takes_from_the_cpu_and_comes_home() {
        let mut block = BlockState::new();
        let plan = block.plan(A, pages(0, 16), Access::Write, OnRead::Migrate);
        assert_eq!(plan.take, pages(0, 16));
        assert_eq!(plan.changes(), pages(0, 16));
        block.moved_out(A, plan.take);
        assert_eq!(block.exclusive_to(A), pages(0, 16));
        assert!(
            block
                .plan(A, pages(0, 16), Access::Write, OnRead::Migrate)
                .is_empty()
        );
        block.moved_home(A, pages(4, 8));
        assert_eq!(block.exclusive_to(A), pages(0, 4) | pages(8, 16));
        assert!(block.is_consistent());
    }

    #[test]
    fn duplicate_then_write_by_each_side() {
        let mut block = BlockState::new();
        let plan = block.plan(A, pages(0, 8), Access::Read, OnRead::Duplicate);
        assert_eq!((plan.take, plan.duplicate), (PageMask::EMPTY, pages(0, 8)));
        block.moved_out(A, pages(0, 8));
        block.copied_home(pages(0, 8));
        assert_eq!(block.shared(), pages(0, 8));
        // A device write drops the CPU's copy of what it already holds.
        let plan = block.plan(A, pages(0, 4), Access::Write, OnRead::Migrate);
        assert_eq!((plan.drop_host, plan.take), (pages(0, 4), PageMask::EMPTY));
        block.host_dropped(pages(0, 4));
        assert_eq!(block.exclusive_to(A), pages(0, 4));
        // A CPU write leaves junk behind.
        block.revoked_all(pages(4, 8), None);
        assert_eq!(
            (block.junk(A), block.shared()),
            (pages(4, 8), PageMask::EMPTY)
        );
        assert!(block.is_consistent());
    }

    #[test]
    fn two_devices_share_and_one_writes() {
        let mut block = BlockState::new();
        block.moved_out(A, pages(0, 4));
        let plan = block.plan(B, pages(0, 4), Access::Read, OnRead::Migrate);
        assert_eq!(
            (plan.downgrade, plan.from_device),
            (pages(0, 4), pages(0, 4))
        );
        block.filled(B, pages(0, 4));
        assert!(block.exclusive_to(A).is_empty() && block.exclusive_to(B).is_empty());
        let plan = block.plan(B, pages(0, 2), Access::Write, OnRead::Migrate);
        assert_eq!(plan.revoke, pages(0, 2));
        assert!(plan.take.is_empty() && plan.drop_host.is_empty() && plan.from_device.is_empty());
        block.revoked_all(pages(0, 2), Some(B));
        assert_eq!(block.exclusive_to(B), pages(0, 2));
        assert_eq!(block.junk(A), pages(0, 2));
        assert!(block.is_consistent());
    }

    #[test]
    fn pinned_pages_are_served_in_place() {
        let mut block = BlockState::new();
        block.set_pinned(pages(3, 5), true);
        let plan = block.plan(A, pages(0, 8), Access::Write, OnRead::Migrate);
        assert_eq!(plan.in_place, pages(3, 5));
        assert_eq!(plan.take, pages(0, 3) | pages(5, 8));
    }
}
