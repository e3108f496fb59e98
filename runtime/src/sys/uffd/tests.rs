//! The kernel facts this layer rests on, on the real kernel. No privilege is needed: where a fact
//! depends on one, both answers are asserted.

use std::os::fd::AsRawFd;
use std::time::Duration;

use super::super::event::{Event, EventBuffer};
use super::super::mmap::{Advice, Reservation, advise, discard};
use super::super::pagemap::{PageState, Pagemap};
use super::super::testing::{in_child, test_name};
use super::*;
use crate::addr::{BLOCK_SIZE, PAGE_SIZE};

const MISSING_WP: Mode = Mode::MISSING.union(Mode::WP);

/// What the runtime asks for, but for SIGBUS: nobody in these tests touches what is missing.
const WANTED: Features = Features::PAGEFAULT_FLAG_WP
    .union(Features::MOVE)
    .union(Features::POISON)
    .union(Features::SIGBUS);

/// Memory of a test's own, unregistered before it is unmapped.
struct Area<'a> {
    memory: Reservation,
    uffd: Option<&'a Uffd>,
}

impl<'a> Area<'a> {
    /// Not registered.
    fn plain(nr_pages: usize) -> Self {
        let like = PageRange::from_pages(BLOCK_SIZE, nr_pages).unwrap();
        let memory = Reservation::congruent_to(like).unwrap();
        // Runs are split by the page size they are mapped with; tests count in small pages.
        advise(memory.range(), Advice::NoHugePage).unwrap();
        Self { memory, uffd: None }
    }

    fn registered(uffd: &'a Uffd, nr_pages: usize) -> Self {
        let mut area = Self::plain(nr_pages);
        // SAFETY: the memory is the test's own and is accessed through raw pointers only.
        let ioctls = unsafe { uffd.register(area.memory.range(), MISSING_WP) }.unwrap();
        assert!(ioctls.contains(Ioctls::COPY | Ioctls::ZEROPAGE | Ioctls::WAKE));
        area.uffd = Some(uffd);
        area
    }

    fn uffd(&self) -> &'a Uffd {
        self.uffd.expect("only a registered area is filled")
    }

    fn copy(&self, pages: PageRange, src: usize, protect: Protect) -> Moved {
        // SAFETY: this area is registered with its descriptor, and only raw pointers lead there.
        unsafe { self.uffd().copy(pages, src, protect, Wake::Yes) }
    }

    fn zeropage(&self, pages: PageRange, wake: Wake) -> Moved {
        // SAFETY: as `copy`.
        unsafe { self.uffd().zeropage(pages, wake) }
    }

    fn poison(&self, pages: PageRange) -> Moved {
        // SAFETY: as `copy`.
        unsafe { self.uffd().poison(pages, Wake::Yes) }
    }

    /// Pages `first..first + nr`.
    fn pages(&self, first: usize, nr: usize) -> PageRange {
        let range = PageRange::from_pages(self.addr(first), nr).unwrap();
        assert!(self.memory.range().contains(range));
        range
    }

    fn addr(&self, page: usize) -> usize {
        self.memory.range().start() + page * PAGE_SIZE
    }

    /// The first byte of a page that is present.
    fn byte(&self, page: usize) -> *mut u8 {
        assert!(page < self.memory.range().nr_pages());
        self.memory.as_ptr().wrapping_add(page * PAGE_SIZE)
    }

    fn load(&self, page: usize) -> u8 {
        // SAFETY: in bounds, and the caller made the page present.
        unsafe { self.byte(page).read_volatile() }
    }

    fn store(&self, page: usize, value: u8) {
        // SAFETY: in bounds, and the caller made the page present and writable.
        unsafe { self.byte(page).write_volatile(value) };
    }
}

impl Drop for Area<'_> {
    fn drop(&mut self) {
        if let Some(uffd) = self.uffd {
            uffd.unregister(self.memory.range()).unwrap();
        }
    }
}

/// A userfaultfd with what is wanted of it, as far as the kernel has that; says so if the process may have none.
fn open_with(wanted: Features) -> Option<Uffd> {
    match Uffd::open(FaultScope::UserMode, wanted) {
        Ok(uffd) => Some(uffd),
        Err(error) => {
            let refused = [Some(libc::EPERM), Some(libc::ENOSYS)];
            assert!(refused.contains(&error.syscall.raw_os_error()), "{error}");
            println!("SKIPPED: {error}");
            None
        }
    }
}

fn open() -> Option<Uffd> {
    open_with(WANTED)
}

/// Whether `features` are among those that were had; says so if not.
fn lacks(uffd: &Uffd, features: Features) -> bool {
    let missing = features - uffd.available();
    if !missing.is_empty() {
        println!("SKIPPED: this kernel lacks {missing:?}");
    }
    !missing.is_empty()
}

#[track_caller]
fn check_moved(moved: Moved, nr_pages: usize, stop: Stop) {
    let expected = Moved {
        bytes: nr_pages * PAGE_SIZE,
        stop,
    };
    assert_eq!(moved, expected);
}

#[test]
fn open_enables_what_was_asked_for_and_exists() {
    let Some(uffd) = open() else { return };
    let available = Uffd::probe(FaultScope::UserMode).unwrap();
    assert_eq!(uffd.enabled(), available & WANTED);
    assert_eq!(uffd.available(), available);
    assert_eq!(uffd.scope(), FaultScope::UserMode);
    // SAFETY: F_GETFD takes no pointer.
    let flags = unsafe { libc::fcntl(uffd.as_fd().as_raw_fd(), libc::F_GETFD) };
    assert_eq!(flags, libc::FD_CLOEXEC);
}

#[test]
fn kernel_faults_and_fork_events_need_privilege() {
    if open().is_none() {
        return;
    }
    match Uffd::open(FaultScope::UserAndKernel, WANTED) {
        Ok(uffd) => assert_eq!(uffd.scope(), FaultScope::UserAndKernel),
        Err(error) => {
            let refused = [Some(libc::EPERM), Some(libc::ENOSYS)];
            assert!(refused.contains(&error.syscall.raw_os_error()), "{error}");
        }
    }
    match Uffd::open(FaultScope::UserMode, Features::EVENT_FORK) {
        Ok(uffd) => assert_eq!(uffd.enabled(), uffd.available() & Features::EVENT_FORK),
        Err(error) => assert_eq!(error.syscall.raw_os_error(), Some(libc::EPERM), "{error}"),
    }
}

#[test]
fn a_range_belongs_to_one_descriptor() {
    let (Some(first), Some(second)) = (open(), open()) else {
        return;
    };
    let area = Area::registered(&first, 4);
    // SAFETY: the memory is the test's own.
    let error = unsafe { second.register(area.pages(0, 1), MISSING_WP) }.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    // But that is all the kernel checks for those that fill a page. MOVE looks closer.
    // SAFETY: both descriptors and the memory are the test's own.
    let moved = unsafe { second.zeropage(area.pages(0, 1), Wake::No) };
    check_moved(moved, 1, Stop::Complete);
    if second.available().contains(Features::MOVE) {
        let source = Area::plain(1);
        source.store(0, 1);
        // SAFETY: as above.
        let moved = unsafe { second.move_pages(area.pages(1, 1), source.addr(0), Wake::No) };
        check_moved(moved, 0, Stop::Invalid);
        assert_eq!(source.load(0), 1);
    }
}

#[test]
fn copy_fills_holes_and_tells_where_it_stopped() {
    let Some(uffd) = open() else { return };
    let source = Area::plain(4);
    for page in 0..4 {
        source.store(page, 10 + page as u8);
    }
    let area = Area::registered(&uffd, 8);
    let copy = |first, nr, from| area.copy(area.pages(first, nr), source.addr(from), Protect::No);
    check_moved(copy(2, 1, 2), 1, Stop::Complete);
    check_moved(copy(2, 1, 2), 0, Stop::Exists);
    // Two holes, then the page that is present: the progress and the reason are both told.
    check_moved(copy(0, 4, 0), 2, Stop::Exists);
    check_moved(copy(3, 1, 3), 1, Stop::Complete);
    assert_eq!([0, 1, 2, 3].map(|page| area.load(page)), [10, 11, 12, 13]);
    // An unreadable source.
    check_moved(
        area.copy(area.pages(4, 1), PAGE_SIZE, Protect::No),
        0,
        Stop::Fault,
    );
    // A destination that is not registered.
    check_moved(
        area.copy(source.pages(0, 1), source.addr(1), Protect::No),
        0,
        Stop::NotPresent,
    );
}

#[test]
fn zeropage_maps_the_page_of_zeros() {
    let Some(uffd) = open() else { return };
    let area = Area::registered(&uffd, 4);
    check_moved(
        area.zeropage(area.pages(0, 3), Wake::Yes),
        3,
        Stop::Complete,
    );
    check_moved(area.zeropage(area.pages(2, 2), Wake::Yes), 0, Stop::Exists);
    assert_eq!(area.load(1), 0);
    let pagemap = Pagemap::open().unwrap();
    let state = pagemap.page(area.addr(1)).unwrap();
    assert!(state.contains(PageState::PRESENT));
    assert_eq!(state.contains(PageState::ZERO), pagemap.has_scan());
    assert!(pagemap.is_empty(area.pages(3, 1)).unwrap());
}

#[test]
fn write_protection_shows_in_the_page_map_and_is_lifted() {
    let Some(uffd) = open() else { return };
    if lacks(&uffd, Features::PAGEFAULT_FLAG_WP) {
        return;
    }
    let pagemap = Pagemap::open().unwrap();
    let source = Area::plain(1);
    source.store(0, 1);
    let area = Area::registered(&uffd, 4);
    let copy = |page, protect| area.copy(area.pages(page, 1), source.addr(0), protect);
    let state = |page| pagemap.page(area.addr(page)).unwrap() - PageState::ZERO;
    let protected = PageState::PRESENT | PageState::WRITE_PROTECTED;

    check_moved(copy(0, Protect::No), 1, Stop::Complete);
    assert_eq!(state(0), PageState::PRESENT);
    assert_eq!(uffd.write_protect(area.pages(0, 1)), Stop::Complete);
    assert_eq!(state(0), protected);
    assert_eq!(
        uffd.write_unprotect(area.pages(0, 1), Wake::Yes),
        Stop::Complete
    );
    assert_eq!(state(0), PageState::PRESENT);
    area.store(0, 2);

    // COPY with MODE_WP: protected from the first instant.
    check_moved(copy(1, Protect::Yes), 1, Stop::Complete);
    assert_eq!(state(1), protected);
    assert_eq!(area.load(1), 1);

    // Protecting a hole leaves nothing there, for WP_UNPOPULATED is never asked for.
    assert_eq!(uffd.write_protect(area.pages(2, 1)), Stop::Complete);
    assert_eq!(state(2), PageState::empty());

    // Not registered: no such range.
    assert_eq!(uffd.write_protect(source.pages(0, 1)), Stop::NotPresent);
}

#[test]
fn move_out_and_home_carries_the_page_itself() {
    let Some(uffd) = open() else { return };
    if lacks(&uffd, Features::MOVE) {
        return;
    }
    let pagemap = Pagemap::open().unwrap();
    let host = Area::plain(32);
    for page in 0..16 {
        host.store(page, page as u8 + 1);
    }
    // SAFETY: the memory is the test's own and is accessed through raw pointers only.
    unsafe { uffd.register(host.memory.range(), MISSING_WP) }.unwrap();
    let window = Area::registered(&uffd, 32);
    // SAFETY: both areas are the test's own, and only raw pointers lead there.
    let moves = |dst, src| unsafe { uffd.move_pages(dst, src, Wake::Yes) };

    // Out in one run; the source is empty, the destination has the contents.
    check_moved(moves(window.pages(0, 16), host.addr(0)), 16, Stop::Complete);
    assert!(pagemap.is_empty(host.pages(0, 16)).unwrap());
    assert_eq!((window.load(0), window.load(15)), (1, 16));

    // A source hole, with and without progress before it. (The kernel may tell a stale reason after
    // partial progress, but never a wrong count; see the module documentation.)
    check_moved(
        moves(window.pages(20, 1), host.addr(20)),
        0,
        Stop::NotPresent,
    );
    window.store(3, 99);
    check_moved(moves(host.pages(0, 4), window.addr(0)), 4, Stop::Complete);
    assert_eq!(host.load(3), 99);

    // A destination that is not empty.
    check_moved(moves(host.pages(0, 1), window.addr(5)), 0, Stop::Exists);
    assert_eq!((host.load(0), window.load(5)), (1, 6));

    // A write-protected page moves, and arrives unprotected.
    assert_eq!(uffd.write_protect(host.pages(0, 1)), Stop::Complete);
    check_moved(moves(window.pages(0, 1), host.addr(0)), 1, Stop::Complete);
    assert_eq!(pagemap.page(window.addr(0)).unwrap(), PageState::PRESENT);

    check_moved(moves(host.pages(4, 12), window.addr(4)), 12, Stop::Complete);
    check_moved(moves(host.pages(0, 1), window.addr(0)), 1, Stop::Complete);
    let contents: Vec<_> = (0..16).map(|page| host.load(page)).collect();
    assert_eq!(
        contents,
        [1, 2, 3, 99, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    );
    uffd.unregister(host.memory.range()).unwrap();
}

#[test]
fn move_reports_progress_up_to_a_hole() {
    let Some(uffd) = open() else { return };
    if lacks(&uffd, Features::MOVE) {
        return;
    }
    let host = Area::plain(8);
    for page in [0, 1, 2, 4] {
        host.store(page, 7);
    }
    let window = Area::registered(&uffd, 8);
    // SAFETY: both areas are the test's own, and only raw pointers lead there.
    let moved = unsafe { uffd.move_pages(window.pages(0, 8), host.addr(0), Wake::Yes) };
    check_moved(moved, 3, Stop::NotPresent);
    assert_eq!(host.load(4), 7);
}

#[test]
fn poison_fills_holes_only() {
    let Some(uffd) = open() else { return };
    if lacks(&uffd, Features::POISON) {
        return;
    }
    let area = Area::registered(&uffd, 4);
    check_moved(area.poison(area.pages(0, 2)), 2, Stop::Complete);
    check_moved(area.zeropage(area.pages(0, 1), Wake::Yes), 0, Stop::Exists);
    let state = Pagemap::open().unwrap().page(area.addr(0)).unwrap();
    assert!(state.contains(PageState::SWAPPED), "a marker: {state:?}");
}

/// Polls until there is a message, and returns the first.
fn next_event(uffd: &Uffd) -> Event {
    let doorbell = Doorbell::new().unwrap();
    let mut buffer = EventBuffer::<1>::new();
    for _ in 0..100 {
        uffd.poll(&doorbell, Some(Duration::from_millis(100)));
        if buffer.fill(uffd).unwrap() > 0 {
            return buffer.next().unwrap();
        }
    }
    panic!("no event within ten seconds");
}

const EVENTS: Features = Features::EVENT_REMOVE
    .union(Features::EVENT_UNMAP)
    .union(Features::EVENT_REMAP);

#[test]
fn events_tell_what_happened_where() {
    let Some(uffd) = open_with(WANTED | EVENTS) else {
        return;
    };
    if lacks(&uffd, EVENTS) {
        return;
    }
    let area = Area::plain(8);
    for page in 0..8 {
        area.store(page, 1);
    }
    let whole = area.memory.range();
    // SAFETY: the memory is the test's own and is accessed through raw pointers only.
    unsafe { uffd.register(whole, MISSING_WP) }.unwrap();

    let removed = area.pages(1, 2);
    std::thread::scope(|scope| {
        // SAFETY: the contents are the test's own, and nobody reads them any more.
        let caller = scope.spawn(move || unsafe { discard(removed) });
        assert!(matches!(next_event(&uffd), Event::Remove(range) if range == removed));
        caller.join().unwrap().unwrap();
    });

    // Elsewhere, and its old place unmapped: two events, in this order.
    let to = Area::plain(2);
    let (from, target) = (area.pages(4, 2), to.memory.range());
    std::thread::scope(|scope| {
        let caller = scope.spawn(move || {
            // SAFETY: both ranges are the test's own; the target's pages are replaced.
            let moved = unsafe {
                libc::mremap(
                    std::ptr::with_exposed_provenance_mut(from.start()),
                    from.len_bytes(),
                    from.len_bytes(),
                    libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                    std::ptr::with_exposed_provenance_mut::<libc::c_void>(target.start()),
                )
            };
            moved.addr()
        });
        match next_event(&uffd) {
            Event::Remap { from: old, to, len } => {
                assert_eq!(
                    (old, to, len),
                    (from.start(), target.start(), from.len_bytes())
                );
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(next_event(&uffd), Event::Unmap(range) if range == from));
        assert_eq!(caller.join().unwrap(), target.start());
    });
    assert_eq!(to.load(0), 1);

    let gone = area.pages(6, 2);
    std::thread::scope(|scope| {
        let caller = scope.spawn(move || {
            // SAFETY: the range is the test's own; nobody uses it any more.
            unsafe {
                libc::munmap(
                    std::ptr::with_exposed_provenance_mut(gone.start()),
                    gone.len_bytes(),
                )
            }
        });
        assert!(matches!(next_event(&uffd), Event::Unmap(range) if range == gone));
        assert_eq!(caller.join().unwrap(), 0);
    });
    // What was moved is registered still; unregister all before it is unmapped.
    uffd.unregister(target).unwrap();
    uffd.unregister(area.pages(0, 4)).unwrap();
}

/// The kernel's "mmap changing": from an event until its caller has run again after the reading, whatever changes a page says EAGAIN
/// and does nothing; the answer is `Changing`, not an error. Afterwards each works.
#[test]
fn nothing_changes_a_page_while_an_event_waits() {
    const TESTED: Features = Features::PAGEFAULT_FLAG_WP
        .union(Features::MOVE)
        .union(Features::POISON);
    let Some(uffd) = open_with(WANTED | EVENTS) else {
        return;
    };
    if lacks(&uffd, EVENTS | TESTED) {
        return;
    }
    let pagemap = Pagemap::open().unwrap();
    let source = Area::plain(2);
    (0..2).for_each(|page| source.store(page, 7 + page as u8));
    let area = Area::registered(&uffd, 8);
    let area = &area;
    // Pages: 0 goes, 1 is there, 2 to 5 are to be filled.
    check_moved(area.zeropage(area.pages(0, 2), Wake::No), 2, Stop::Complete);
    let copy = || area.copy(area.pages(2, 1), source.addr(0), Protect::No);
    let zeropage = || area.zeropage(area.pages(3, 1), Wake::No);
    // SAFETY: both areas are the test's own, and only raw pointers lead there.
    let moves = || unsafe { uffd.move_pages(area.pages(4, 1), source.addr(1), Wake::No) };
    let poison = || area.poison(area.pages(5, 1));
    let protect = || uffd.write_protect(area.pages(1, 1));
    let unprotect = || uffd.write_unprotect(area.pages(1, 1), Wake::No);
    let is_protected = || {
        let state = pagemap.page(area.addr(1)).unwrap();
        state.contains(PageState::WRITE_PROTECTED)
    };

    let gone = area.pages(0, 1);
    std::thread::scope(|scope| {
        // SAFETY: the contents are the test's own, and nobody reads them any more.
        let caller = scope.spawn(move || unsafe { discard(gone) });
        while !uffd.has_message() {
            assert!(!caller.is_finished(), "no event");
            std::thread::yield_now();
        }
        // More than once: no probe ends it.
        for _ in 0..3 {
            check_moved(copy(), 0, Stop::Changing);
            check_moved(zeropage(), 0, Stop::Changing);
            check_moved(moves(), 0, Stop::Changing);
            check_moved(poison(), 0, Stop::Changing);
            assert_eq!(protect(), Stop::Changing);
            assert_eq!(unprotect(), Stop::Changing);
        }
        assert!(!caller.is_finished(), "it sleeps until the event is read");
        assert!(pagemap.is_empty(area.pages(2, 6)).unwrap());
        assert!(!is_protected());
        assert_eq!(source.load(1), 8);
        assert!(matches!(next_event(&uffd), Event::Remove(range) if range == gone));
        caller.join().unwrap().unwrap();
    });
    check_moved(copy(), 1, Stop::Complete);
    check_moved(zeropage(), 1, Stop::Complete);
    check_moved(moves(), 1, Stop::Complete);
    check_moved(poison(), 1, Stop::Complete);
    assert_eq!([2, 3, 4].map(|page| area.load(page)), [7, 0, 8]);
    assert_eq!(protect(), Stop::Complete);
    assert!(is_protected());
    assert_eq!(unprotect(), Stop::Complete);
    assert!(!is_protected());
}

#[test]
fn faults_are_messages_without_sigbus() {
    let wanted = (WANTED - Features::SIGBUS) | Features::THREAD_ID;
    let Some(uffd) = open_with(wanted) else {
        return;
    };
    let area = Area::registered(&uffd, 4);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| area.load(2));
        match next_event(&uffd) {
            Event::PageFault {
                addr,
                write,
                wp,
                tid,
            } => {
                assert_eq!((addr, write, wp), (area.addr(2), false, false));
                if uffd.enabled().contains(Features::THREAD_ID) {
                    assert_ne!(tid, 0);
                }
            }
            other => panic!("{other:?}"),
        }
        check_moved(area.zeropage(area.pages(2, 1), Wake::No), 1, Stop::Complete);
        uffd.wake(area.pages(2, 1));
        assert_eq!(reader.join().unwrap(), 0);

        if lacks(&uffd, Features::PAGEFAULT_FLAG_WP) {
            return;
        }
        assert_eq!(uffd.write_protect(area.pages(2, 1)), Stop::Complete);
        let writer = scope.spawn(|| area.store(2, 5));
        match next_event(&uffd) {
            Event::PageFault {
                addr, write, wp, ..
            } => {
                assert_eq!((addr, write, wp), (area.addr(2), true, true));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(
            uffd.write_unprotect(area.pages(2, 1), Wake::Yes),
            Stop::Complete
        );
        writer.join().unwrap();
        assert_eq!(area.load(2), 5);
    });
}

#[test]
fn the_doorbell_ends_a_wait_and_stays_rung_until_silenced() {
    let Some(uffd) = open() else { return };
    let doorbell = Doorbell::new().unwrap();
    let poll = |timeout| uffd.poll(&doorbell, Some(timeout));
    assert_eq!(poll(Duration::ZERO), Ready::default());
    assert!(!doorbell.silence());
    std::thread::scope(|scope| {
        scope.spawn(|| doorbell.ring());
        let rung = Ready {
            doorbell: true,
            ..Ready::default()
        };
        assert_eq!(poll(Duration::from_secs(10)), rung);
        assert_eq!(poll(Duration::ZERO), rung);
    });
    assert!(doorbell.silence());
    assert_eq!(poll(Duration::ZERO), Ready::default());
}

#[test]
fn an_empty_descriptor_reads_as_zero_messages() {
    let Some(uffd) = open() else { return };
    let mut buffer = EventBuffer::<8>::new();
    assert_eq!(buffer.fill(&uffd).unwrap(), 0);
    assert!(buffer.next().is_none());
}

#[test]
fn disabled_features_are_gone() {
    let variables = [("SVM_DISABLE", "move,poison,events,sigbus")];
    let body = || {
        let Some(uffd) = open_with(Features::all() - Features::EVENT_FORK) else {
            return;
        };
        let gone = Features::MOVE | Features::POISON | Features::SIGBUS | EVENTS;
        assert!(!uffd.available().intersects(gone) && !uffd.enabled().intersects(gone));
        let area = Area::plain(1);
        // SAFETY: the memory is the test's own.
        let ioctls = unsafe { uffd.register(area.pages(0, 1), Mode::MISSING) }.unwrap();
        assert!(!ioctls.intersects(Ioctls::MOVE | Ioctls::POISON));
        uffd.unregister(area.pages(0, 1)).unwrap();
    };
    if let Some(ended) = in_child(test_name!("disabled_features_are_gone"), &variables, body) {
        ended.assert_passed();
    }
}

#[test]
fn a_forked_child_lets_go_of_its_parents_descriptor() {
    let body = || {
        let Some(uffd) = open() else { return };
        let area = Area::registered(&uffd, 4);
        let pagemap = Pagemap::open().unwrap();
        // SAFETY: the child calls only what is async-signal-safe.
        if unsafe { libc::fork() } == 0 {
            // SAFETY: this is the child.
            unsafe { uffd.disown_in_child() };
            let filled = area.zeropage(area.pages(0, 1), Wake::No);
            let inert = filled.stop == Stop::Other(libc::ENOTTY)
                && matches!(EventBuffer::<1>::new().fill(&uffd), Ok(0));
            // SAFETY: no preconditions.
            unsafe { libc::_exit(i32::from(inert)) };
        }
        let mut status = 0;
        // SAFETY: `status` is valid for writes.
        unsafe { libc::wait(&raw mut status) };
        assert_eq!(libc::WEXITSTATUS(status), 1);
        // The parent's is as it was, and the child did nothing to its page.
        assert!(pagemap.is_empty(area.pages(0, 1)).unwrap());
        check_moved(area.zeropage(area.pages(0, 1), Wake::No), 1, Stop::Complete);
    };
    let name = test_name!("a_forked_child_lets_go_of_its_parents_descriptor");
    if let Some(ended) = in_child(name, &[], body) {
        ended.assert_passed();
    }
}

#[test]
fn outcomes_of_partial_steps_are_folded_into_one() {
    #[track_caller]
    fn check(steps: &[(i32, i64)], nr_pages: usize, stop: Stop) {
        let mut steps = steps.iter();
        let mut at = Vec::new();
        let moved = run_steps(8 * PAGE_SIZE, |done| {
            at.push(done / PAGE_SIZE);
            *steps.next().unwrap()
        });
        check_moved(moved, nr_pages, stop);
        assert!(at.is_sorted() && steps.next().is_none());
    }
    let page = PAGE_SIZE as i64;
    check(&[(0, 8 * page)], 8, Stop::Complete);
    check(
        &[(libc::EAGAIN, 3 * page), (0, 5 * page)],
        8,
        Stop::Complete,
    );
    check(
        &[(libc::EAGAIN, 3 * page), (libc::EEXIST, -17)],
        3,
        Stop::Exists,
    );
    // Nothing done: the address space is changing. The field says so, or is left at zero.
    check(&[(libc::EAGAIN, -11)], 0, Stop::Changing);
    check(&[(libc::EAGAIN, 0)], 0, Stop::Changing);
    check(
        &[(libc::EAGAIN, 2 * page), (libc::EAGAIN, -11)],
        2,
        Stop::Changing,
    );
    check(&[(libc::EBUSY, -16)], 0, Stop::Busy);
    check(&[(libc::ESRCH, 0)], 0, Stop::Other(libc::ESRCH));
    // A field that makes no sense is not believed.
    check(&[(libc::EAGAIN, 9 * page)], 0, Stop::Changing);
}
