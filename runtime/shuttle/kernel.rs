//! A model of the kernel: what `kernel-facts` documents of pages, mappings, userfaultfd and its events, and no more.
//!
//! # Memory
//! An address space of 4 KiB pages. A page-table entry is empty, or has contents (one number stands for all 4096 bytes) and may be
//! write-protected, or shared with another process, so that MOVE says EBUSY until it is written. Mappings may be registered with one userfaultfd.
//!
//! # Calls
//! Each call acts on one page after the other, and at each of them another thread may run in between ([`point`]). COPY, ZEROPAGE and
//! MOVE stop at the first page that stops them and report how far they came. As on Linux 6.18, MOVE may say EEXIST or ENOENT of a
//! page that it has moved ([`Quirks::stale_errors`]).
//!
//! # Events
//! | call | what happens, in this order |
//! |---|---|
//! | `madvise(DONTNEED)` | REMOVE posted; sleeps until it is read; *later* the pages go; *later* the caller returns |
//! | `munmap` | the pages go; UNMAP posted; sleeps until it is read; returns |
//! | `mremap` | the entries are at the new address; REMAP and UNMAP posted; sleeps until each is read; returns |
//!
//! From the posting until the caller has run again after the read, every call that fills says EAGAIN. Page faults are read before events.
//!
//! # Accesses
//! [`access`] is what a CPU does: it faults as long as the entry does not allow it. Through a userfaultfd with SIGBUS the
//! handler runs in the thread; otherwise a message is queued and the thread sleeps until it is woken. [`touch`] is what a device
//! does through a translation: there must be a page, for nothing could serve a fault.

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PageRange, page_floor};
use crate::sys::event::{Event, Ready};
use crate::sys::maps::{Kind, Vma};
use crate::sys::pagemap::{Extent, PageState};
use crate::sys::signal::{self, BusFault};
use crate::sys::uffd::{Features, Mode, Protect, Stop};
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread::{self, Thread};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the kernel may do, but need not: each is decided by the schedule's seed where it is on.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Quirks {
    /// MOVE reports an error of a page that it did move, once in so many times (0: never).
    pub(crate) stale_errors: u32,
    /// A call stops before its end with "changing", as if an event had come, once in so many times.
    pub(crate) spurious_changing: u32,
    /// A kernel before 6.8: no MOVE.
    pub(crate) no_move: bool,
}

/// A page-table entry that is not empty.
#[derive(Clone, Copy, Debug, Default)]
struct Page {
    contents: u64,
    protected: bool,
    /// Copy-on-write with another process, until it is written.
    shared: bool,
    /// A touch is a bus error.
    poisoned: bool,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    range: PageRange,
    registered: Option<(usize, Mode)>,
}

#[derive(Debug)]
struct Queued {
    id: u64,
    event: Event,
}

#[derive(Debug)]
struct Userfaultfd {
    features: Features,
    faults: VecDeque<Queued>,
    /// Read, and nobody has woken the thread yet.
    asleep: Vec<(u64, usize)>,
    events: VecDeque<Queued>,
    /// Changes whose cause has not run again since.
    changing: u32,
}

/// One step of a schedule: who, what, where, and with which outcome.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) thread: usize,
    pub(crate) what: &'static str,
    pub(crate) at: usize,
    pub(crate) outcome: Outcome,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome {
    Done,
    Stopped(Stop),
    Value(u64),
}

/// The state of the machine.
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    mappings: Vec<Mapping>,
    pages: BTreeMap<usize, Page>,
    uffds: Vec<Userfaultfd>,
    /// Messages whose sender sleeps.
    unanswered: BTreeSet<u64>,
    next_id: u64,
    next_reservation: usize,
    handler: Option<fn(&BusFault) -> signal::Verdict>,
    sleepers: Vec<Thread>,
    /// Signals that threads have not taken yet.
    late: BTreeMap<usize, BusFault>,
    futexes: BTreeMap<usize, VecDeque<Thread>>,
    quirks: Quirks,
    over: bool,
}

/// What has happened: apart from the machine, so that a step which fails half-way can still be shown.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) steps: Vec<Step>,
    /// What the threads are called.
    pub(crate) names: BTreeMap<usize, String>,
    /// What stretches of the address space are called.
    pub(crate) places: Vec<(PageRange, String)>,
}

impl Log {
    /// What an address is called.
    pub(crate) fn name_of(&self, addr: usize) -> String {
        let place = self
            .places
            .iter()
            .find(|(range, _)| range.contains_addr(addr));
        match place {
            Some((range, name)) => format!("{name}{}", (addr - range.start()) / PAGE_SIZE),
            None => format!("{addr:#x}"),
        }
    }
}

static LOG: Mutex<Log> = Mutex::new(Log {
    steps: Vec::new(),
    names: BTreeMap::new(),
    places: Vec::new(),
});

/// The schedule so far.
pub(crate) fn log() -> MutexGuard<'static, Log> {
    LOG.lock().unwrap_or_else(PoisonError::into_inner)
}

static KERNEL: Mutex<Option<Box<Kernel>>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<Box<Kernel>>> {
    KERNEL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks at the machine, or changes it: at once, nobody else runs meanwhile.
pub(crate) fn with<R>(f: impl FnOnce(&mut Kernel) -> R) -> R {
    f(lock().get_or_insert_default())
}

/// A new machine.
pub(crate) fn boot(quirks: Quirks) {
    std::time::restart();
    // The handler is the process's, and installed once.
    let handler = with(|kernel| kernel.handler);
    *log() = Log {
        steps: Vec::new(),
        names: BTreeMap::new(),
        places: Vec::new(),
    };
    *lock() = Some(Box::new(Kernel {
        next_reservation: 0x20_0000_0000,
        quirks,
        handler,
        ..Kernel::default()
    }));
}

/// A point: here another thread may run.
pub(crate) fn point() {
    thread::sleep(Duration::ZERO);
}

/// What every userfaultfd may have.
pub(crate) fn features() -> Features {
    let all = Features::all() - Features::EVENT_FORK;
    if with(|kernel| kernel.quirks.no_move) {
        all - Features::MOVE
    } else {
        all
    }
}

/// The calling thread's number, from 0 in the order in which threads are made.
pub(crate) fn thread_id() -> usize {
    usize::from(thread::current().id())
}

fn chance(one_in: u32) -> bool {
    one_in != 0 && thread_rng().gen_range(0..one_in) == 0
}

// Sleeping.

/// Sleeps until `is_so`, which is asked again after each [`wake_sleepers`].
fn sleep_until(mut is_so: impl FnMut(&mut Kernel) -> bool) {
    let me = thread::current();
    while !with(|kernel| {
        let is_so = is_so(kernel);
        if !is_so && kernel.sleepers.iter().all(|s| s.id() != me.id()) {
            kernel.sleepers.push(me.clone());
        }
        is_so
    }) {
        thread::park();
    }
}

/// Sends a thread that sleeps in a fault the signal of a late access.
pub(crate) fn send_late(thread: usize, addr: usize, write: bool) {
    let access = if write {
        signal::Access::WriteMissing
    } else {
        signal::Access::ReadMissing
    };
    let fault = BusFault {
        addr,
        access,
        pc: 0,
        sp: 0,
        late: true,
    };
    with(|kernel| kernel.late.insert(thread, fault));
    wake_sleepers();
}

fn wake_sleepers() {
    for sleeper in with(|kernel| std::mem::take(&mut kernel.sleepers)) {
        sleeper.unpark();
    }
}

pub(crate) fn futex_sleep(word: usize) {
    let me = thread::current();
    with(|kernel| {
        kernel
            .futexes
            .entry(word)
            .or_default()
            .push_back(me.clone());
    });
    thread::park();
    with(|kernel| {
        if let Some(queue) = kernel.futexes.get_mut(&word) {
            queue.retain(|sleeper| sleeper.id() != me.id());
        }
    });
}

pub(crate) fn futex_wake(word: usize, nr: usize) {
    let woken: Vec<Thread> = with(|kernel| {
        let queue = kernel.futexes.entry(word).or_default();
        let nr = nr.min(queue.len());
        queue.drain(..nr).collect()
    });
    for sleeper in woken {
        sleeper.unpark();
    }
}

/// Ends the schedule: readers of messages return.
pub(crate) fn shut_down() {
    with(|kernel| kernel.over = true);
    wake_sleepers();
}

pub(crate) fn is_over() -> bool {
    with(|kernel| kernel.over)
}

/// Notes what the calling thread does.
pub(crate) fn note_step(what: &'static str, at: usize, outcome: Outcome) {
    let thread = thread::current();
    let id = usize::from(thread.id());
    let mut log = log();
    log.names
        .entry(id)
        .or_insert_with(|| thread.name().unwrap_or("main").to_owned());
    log.steps.push(Step {
        thread: id,
        what,
        at,
        outcome,
    });
}

// Setting up.

impl Kernel {
    pub(crate) fn set_handler(&mut self, handler: fn(&BusFault) -> signal::Verdict) {
        self.handler = Some(handler);
    }

    pub(crate) fn open(&mut self, features: Features) -> usize {
        self.uffds.push(Userfaultfd {
            features,
            faults: VecDeque::new(),
            asleep: Vec::new(),
            events: VecDeque::new(),
            changing: 0,
        });
        self.uffds.len() - 1
    }

    /// `mmap` of a range that nothing uses, congruent to `like` modulo 2 MiB.
    pub(crate) fn reserve(&mut self, like: PageRange) -> PageRange {
        let start = self.next_reservation + like.start() % BLOCK_SIZE;
        self.next_reservation = (start + like.len_bytes() + BLOCK_SIZE) & !(BLOCK_SIZE - 1);
        let range = PageRange::from_pages(start, like.nr_pages()).expect("far below the end");
        self.map(range);
        range
    }

    pub(crate) fn map(&mut self, range: PageRange) {
        assert!(self.mappings.iter().all(|m| !m.range.overlaps(range)));
        self.mappings.push(Mapping {
            range,
            registered: None,
        });
    }

    /// Shares a page with another process, as a fork does.
    pub(crate) fn share(&mut self, addr: usize) {
        if let Some(page) = self.pages.get_mut(&addr) {
            page.shared = true;
        }
    }

    /// Contents of the entry of `addr`, if it is not empty, and whether it is write-protected: for checks.
    pub(crate) fn look(&self, addr: usize) -> Option<(u64, bool)> {
        let page = self.pages.get(&page_floor(addr))?;
        Some((page.contents, page.protected))
    }

    pub(crate) fn note(&self, what: &'static str, at: usize, stop: Option<Stop>) {
        let outcome = stop.map_or(Outcome::Done, Outcome::Stopped);
        note_step(what, at, outcome);
    }

    fn mapping(&self, addr: usize) -> Option<&Mapping> {
        self.mappings.iter().find(|m| m.range.contains_addr(addr))
    }

    fn registration(&self, addr: usize) -> Option<(usize, Mode)> {
        self.mapping(addr)?.registered
    }

    /// Splits mappings so that `range` begins and ends at borders; those inside it.
    fn split(&mut self, range: PageRange) -> Vec<usize> {
        for border in [range.start(), range.end()] {
            let cut = self
                .mappings
                .iter()
                .position(|m| m.range.start() < border && border < m.range.end());
            if let Some(at) = cut {
                let whole = self.mappings[at];
                let part = |start, end| PageRange::new(start, end).expect("not empty");
                self.mappings[at].range = part(whole.range.start(), border);
                self.mappings.push(Mapping {
                    range: part(border, whole.range.end()),
                    ..whole
                });
            }
        }
        self.mappings.sort_by_key(|m| m.range.start());
        (0..self.mappings.len())
            .filter(|&at| self.mappings[at].range.overlaps(range))
            .collect()
    }

    /// Whether faults at `addr` go to a userfaultfd: for checks.
    pub(crate) fn is_registered(&self, addr: usize) -> bool {
        self.registration(addr).is_some()
    }

    fn populated(&self, range: PageRange) -> Vec<usize> {
        let keys = self.pages.range(range.start()..range.end());
        keys.map(|(&addr, _)| addr).collect()
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

// What a userfaultfd does to one page.

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
            return Err(if thread_rng().gen_bool(0.5) {
                Stop::Exists
            } else {
                Stop::NotPresent
            });
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

pub(crate) fn register(id: usize, range: PageRange, mode: Mode) -> Result<(), i32> {
    point();
    with(|kernel| {
        let inside = kernel.split(range);
        let covered: usize = inside
            .iter()
            .map(|&at| kernel.mappings[at].range.len_bytes())
            .sum();
        if covered == 0 {
            return Err(libc::EINVAL);
        }
        let taken = |&at: &usize| {
            kernel.mappings[at]
                .registered
                .is_some_and(|(of, _)| of != id)
        };
        if inside.iter().any(taken) {
            return Err(libc::EBUSY);
        }
        for at in inside {
            kernel.mappings[at].registered = Some((id, mode));
        }
        kernel.note("REGISTER", range.start(), None);
        Ok(())
    })
}

pub(crate) fn unregister(id: usize, range: PageRange) -> Result<(), i32> {
    point();
    with(|kernel| {
        for at in kernel.split(range) {
            if kernel.mappings[at]
                .registered
                .is_some_and(|(of, _)| of == id)
            {
                kernel.mappings[at].registered = None;
            }
        }
        for addr in kernel.populated(range) {
            if let Some(page) = kernel.pages.get_mut(&addr) {
                page.protected = false;
            }
        }
        kernel.note("UNREGISTER", range.start(), None);
    });
    wake(id, range);
    Ok(())
}

pub(crate) fn wake(id: usize, range: PageRange) {
    with(|kernel| {
        let Kernel {
            uffds, unanswered, ..
        } = kernel;
        let uffd = &mut uffds[id];
        uffd.faults.retain(|fault| {
            let woken =
                matches!(fault.event, Event::PageFault { addr, .. } if range.contains_addr(addr));
            if woken {
                unanswered.remove(&fault.id);
            }
            !woken
        });
        uffd.asleep.retain(|&(id, addr)| {
            let woken = range.contains_addr(addr);
            if woken {
                unanswered.remove(&id);
            }
            !woken
        });
    });
    wake_sleepers();
}

// Messages.

pub(crate) fn has_message(id: usize) -> bool {
    point();
    with(|kernel| kernel.uffds[id].has_message())
}

impl Userfaultfd {
    fn has_message(&self) -> bool {
        !self.faults.is_empty() || !self.events.is_empty()
    }
}

pub(crate) fn poll(id: usize, timeout: Option<Duration>) -> Ready {
    if timeout.is_some() {
        std::time::pass(Duration::from_micros(20));
        std::thread::yield_now();
    } else {
        sleep_until(|kernel| kernel.over || kernel.uffds[id].has_message());
    }
    with(|kernel| Ready {
        message: kernel.uffds[id].has_message(),
        doorbell: false,
        broken: kernel.over,
    })
}

/// Reads one message: page faults before events.
pub(crate) fn read_message(id: usize) -> Option<Event> {
    point();
    let event = with(|kernel| {
        let uffd = &mut kernel.uffds[id];
        let event = if let Some(fault) = uffd.faults.pop_front() {
            if let Event::PageFault { addr, .. } = fault.event {
                uffd.asleep.push((fault.id, addr));
            }
            fault.event
        } else {
            let event = uffd.events.pop_front()?;
            kernel.unanswered.remove(&event.id);
            event.event
        };
        let (what, at) = match event {
            Event::PageFault { addr, .. } => ("reads fault", addr),
            Event::Remove(range) => ("reads REMOVE", range.start()),
            Event::Unmap(range) => ("reads UNMAP", range.start()),
            Event::Remap { from, .. } => ("reads REMAP", from),
            Event::Fork(()) | Event::Unknown(_) => ("reads", 0),
        };
        kernel.note(what, at, None);
        Some(event)
    });
    wake_sleepers();
    event
}

/// Sleeps until the messages `ids` have been read.
fn wait_read(ids: &[u64]) {
    wake_sleepers();
    sleep_until(|kernel| ids.iter().all(|id| !kernel.unanswered.contains(id)));
    point();
}

impl Kernel {
    /// Posts an event to each userfaultfd that asked for it and has something registered in `range`; its part of the range goes with it.
    fn post(
        &mut self,
        range: PageRange,
        feature: Features,
        event: impl Fn(PageRange) -> Event,
    ) -> Vec<(usize, u64)> {
        let mut posted = Vec::new();
        for at in 0..self.mappings.len() {
            let mapping = self.mappings[at];
            let (Some((id, _)), Some(part)) = (mapping.registered, mapping.range.intersect(range))
            else {
                continue;
            };
            if self.uffds[id].features.contains(feature) {
                posted.push((id, self.post_to(id, event(part))));
            }
        }
        posted
    }

    fn post_to(&mut self, id: usize, event: Event) -> u64 {
        let message = self.new_id();
        self.unanswered.insert(message);
        self.uffds[id].changing += 1;
        self.uffds[id]
            .events
            .push_back(Queued { id: message, event });
        message
    }

    fn ran_again(&mut self, posted: &[(usize, u64)]) {
        for &(id, _) in posted {
            self.uffds[id].changing -= 1;
        }
    }
}

fn wait_for_reader(posted: &[(usize, u64)]) {
    // One after the other, each ends when its sender has run.
    for &(id, message) in posted {
        wait_read(&[message]);
        with(|kernel| kernel.ran_again(&[(id, message)]));
    }
}

/// Points between the moment at which a caller of `madvise` goes on and its zap.
const LATE_ZAP: usize = 6;

/// `madvise(MADV_DONTNEED)`.
pub(crate) fn madvise_dontneed(range: PageRange) {
    point();
    let posted = with(|kernel| {
        kernel.note("madvise DONTNEED", range.start(), None);
        kernel.post(range, Features::EVENT_REMOVE, Event::Remove)
    });
    wait_for_reader(&posted);
    // The zap is late, by as much as it takes others to get something done.
    (0..LATE_ZAP).for_each(|_| point());
    for page in (range.start()..range.end()).step_by(PAGE_SIZE) {
        point();
        with(|kernel| {
            kernel.pages.remove(&page);
            kernel.note("zap", page, None);
        });
    }
    point();
}

/// `munmap`.
pub(crate) fn munmap(range: PageRange) {
    point();
    let posted = with(|kernel| {
        kernel.note("munmap", range.start(), None);
        let posted = kernel.post(range, Features::EVENT_UNMAP, Event::Unmap);
        kernel.forget(range);
        posted
    });
    wait_for_reader(&posted);
}

/// `mmap(MAP_FIXED)` of ordinary memory over `range`. `is_mapped` is called the moment it is there: before the caller goes on,
/// and before the event is read.
pub(crate) fn mmap_fixed(range: PageRange, is_mapped: impl FnOnce()) {
    point();
    let posted = with(|kernel| {
        kernel.note("mmap FIXED", range.start(), None);
        let posted = kernel.post(range, Features::EVENT_UNMAP, Event::Unmap);
        kernel.forget(range);
        kernel.map(range);
        posted
    });
    is_mapped();
    wait_for_reader(&posted);
}

/// `fork`: what is present in `range` is shared with the child from now on.
pub(crate) fn fork(range: PageRange) {
    with(|kernel| {
        kernel.note("fork", range.start(), None);
        for addr in kernel.populated(range) {
            kernel.share(addr);
        }
    });
}

impl Kernel {
    /// Unmaps without a word.
    fn forget(&mut self, range: PageRange) {
        for addr in self.populated(range) {
            self.pages.remove(&addr);
        }
        self.split(range);
        self.mappings.retain(|m| !m.range.overlaps(range));
    }
}

/// `mremap` that moves `range`, of one mapping, to `to`, where nothing is.
pub(crate) fn mremap(range: PageRange, to: usize) {
    point();
    let posted = with(|kernel| {
        kernel.note("mremap", range.start(), None);
        let target = PageRange::from_pages(to, range.nr_pages()).expect("an address");
        let registered = kernel.registration(range.start());
        let mut posted = Vec::new();
        if let Some((id, _)) = registered {
            let (from, len) = (range.start(), range.len_bytes());
            posted.push((id, kernel.post_to(id, Event::Remap { from, to, len })));
            posted.push((id, kernel.post_to(id, Event::Unmap(range))));
        }
        let moved: Vec<(usize, Page)> = kernel
            .populated(range)
            .into_iter()
            .filter_map(|addr| Some((addr - range.start() + to, kernel.pages.remove(&addr)?)))
            .collect();
        kernel.forget(range);
        kernel.map(target);
        if let Some(mapping) = kernel.mappings.last_mut() {
            mapping.registered = registered;
        }
        kernel.pages.extend(moved);
        posted
    });
    wait_for_reader(&posted);
}

/// `MADV_POPULATE_WRITE`: breaks sharing; a registered hole is left.
pub(crate) fn populate_write(range: PageRange) {
    for page in (range.start()..range.end()).step_by(PAGE_SIZE) {
        point();
        with(|kernel| {
            kernel.note("POPULATE_WRITE", page, None);
            if let Some(page) = kernel.pages.get_mut(&page)
                && !page.protected
            {
                page.shared = false;
            }
        });
    }
}

/// `process_vm_readv` from ourselves, page by page: how many it came to.
pub(crate) fn copy_over(dst: usize, src: usize, nr_pages: usize) -> usize {
    for page in 0..nr_pages {
        point();
        let (dst, src) = (dst + page * PAGE_SIZE, src + page * PAGE_SIZE);
        let copied = with(|kernel| {
            let contents = kernel.pages.get(&src).map(|page| page.contents);
            let copied = match (contents, kernel.pages.get_mut(&dst)) {
                (Some(contents), Some(to)) if !to.protected => {
                    to.contents = contents;
                    true
                }
                _ => false,
            };
            kernel.note("copy over", dst, (!copied).then_some(Stop::Fault));
            copied
        });
        if !copied {
            return page;
        }
    }
    nr_pages
}

// Looking.

/// `PAGEMAP_SCAN`.
pub(crate) fn extents(range: PageRange) -> Vec<Extent> {
    point();
    with(|kernel| {
        let mut extents: Vec<Extent> = Vec::new();
        for (&addr, page) in kernel.pages.range(range.start()..range.end()) {
            let mut state = PageState::PRESENT;
            if page.poisoned {
                state = PageState::SWAPPED;
            }
            if page.protected {
                state |= PageState::WRITE_PROTECTED;
            }
            let before = extents.pop_if(|e| e.state == state && e.range.end() == addr);
            let start = before.map_or(addr, |e| e.range.start());
            if let Some(range) = PageRange::new(start, addr + PAGE_SIZE) {
                extents.push(Extent { range, state });
            }
        }
        extents
    })
}

/// `PROCMAP_QUERY`, of each mapping in `range`.
pub(crate) fn mappings(range: PageRange) -> Vec<Vma> {
    point();
    with(|kernel| {
        let mut inside: Vec<Vma> = kernel
            .mappings
            .iter()
            .filter(|m| m.range.overlaps(range))
            .map(|m| Vma {
                range: m.range,
                readable: true,
                writable: true,
                executable: false,
                shared: false,
                kind: Kind,
            })
            .collect();
        inside.sort_by_key(|vma| vma.range.start());
        inside
    })
}

// Accesses.

/// The access ends the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Killed {
    /// Nothing is mapped there, or nobody serves the fault.
    Killed,
    /// It never comes back from its handler.
    Parked,
}

/// How often one access may fault: beyond that the thread makes no progress.
const MAX_FAULTS: usize = 400;

enum Tried {
    Done,
    Killed,
    Handle(fn(&BusFault) -> signal::Verdict, signal::Access),
    Wait(u64),
}

/// An access of a CPU at `addr`: `act` is done to the contents of the page at once, when nothing stands in its way any more.
pub(crate) fn access(
    addr: usize,
    write: bool,
    mut act: impl FnMut(&mut Kernel, u64) -> u64,
) -> Result<(), Killed> {
    for _ in 0..MAX_FAULTS {
        point();
        let tried = with(|kernel| kernel.try_access(addr, write, &mut act));
        match tried {
            Tried::Done => return Ok(()),
            Tried::Killed => return Err(Killed::Killed),
            Tried::Handle(handler, access) => {
                point();
                let fault = BusFault {
                    addr,
                    access,
                    pc: 0,
                    sp: 0,
                    late: false,
                };
                match handler(&fault) {
                    signal::Verdict::Resolved => {}
                    signal::Verdict::Park => return Err(Killed::Parked),
                    signal::Verdict::NotOurs => {
                        with(|kernel| kernel.note("not ours", addr, None));
                        return Err(Killed::Killed);
                    }
                }
            }
            Tried::Wait(id) => {
                wake_sleepers();
                let me = thread_id();
                sleep_until(|kernel| {
                    !kernel.unanswered.contains(&id) || kernel.late.contains_key(&me)
                });
                if let (Some(late), Some(handler)) =
                    with(|kernel| (kernel.late.remove(&me), kernel.handler))
                    && handler(&late) == signal::Verdict::Park
                {
                    return Err(Killed::Parked);
                }
            }
        }
    }
    panic!("starved: {MAX_FAULTS} faults of one access at {addr:#x}");
}

impl Kernel {
    fn try_access(
        &mut self,
        addr: usize,
        write: bool,
        act: &mut impl FnMut(&mut Kernel, u64) -> u64,
    ) -> Tried {
        let at = page_floor(addr);
        let Some(mapping) = self.mapping(at).copied() else {
            self.note("SIGSEGV", at, None);
            return Tried::Killed;
        };
        let page = match self.pages.get(&at).copied() {
            Some(page) if page.poisoned => return Tried::Killed,
            None if mapping.registered.is_none() => {
                self.pages.insert(at, Page::default());
                Some(Page::default())
            }
            page => page,
        };
        let kind = match page {
            None if write => signal::Access::WriteMissing,
            None => signal::Access::ReadMissing,
            Some(page) if write && page.protected => signal::Access::WriteProtected,
            Some(page) => {
                let contents = act(self, page.contents);
                let page = self.pages.get_mut(&at).expect("it was there");
                page.contents = contents;
                page.shared &= !write;
                return Tried::Done;
            }
        };
        let Some((id, _)) = mapping.registered else {
            return Tried::Killed;
        };
        let what = match kind {
            signal::Access::WriteMissing => "faults (write, missing)",
            signal::Access::WriteProtected => "faults (write, protected)",
            signal::Access::ReadMissing | signal::Access::Unknown => "faults (read, missing)",
        };
        self.note(what, at, None);
        if self.uffds[id].features.contains(Features::SIGBUS) {
            return self
                .handler
                .map_or(Tried::Killed, |handler| Tried::Handle(handler, kind));
        }
        let message = self.new_id();
        self.unanswered.insert(message);
        let event = Event::PageFault {
            addr,
            write,
            wp: kind == signal::Access::WriteProtected,
            tid: u32::try_from(thread_id()).unwrap_or(0),
        };
        self.uffds[id]
            .faults
            .push_back(Queued { id: message, event });
        Tried::Wait(message)
    }
}

/// An access through a translation: there must be a page. `act` is done to its contents at once.
pub(crate) fn touch(addr: usize, write: bool, act: impl FnOnce(&mut Kernel, u64) -> u64) {
    point();
    with(|kernel| {
        let at = page_floor(addr);
        let Some(page) = kernel.pages.get(&at).copied() else {
            panic!("a translation leads to an empty page at {at:#x}");
        };
        assert!(
            !(write && page.protected),
            "a translation for writing leads to a write-protected page at {at:#x}"
        );
        let contents = act(kernel, page.contents);
        if let Some(page) = kernel.pages.get_mut(&at) {
            page.contents = contents;
        }
    });
}
