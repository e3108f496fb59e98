//! A model of the kernel: what `kernel-facts` documents of pages, mappings, userfaultfd and its events, and no more.
//!
//! An address space of 4 KiB pages. A page-table entry is empty, or has contents (one number stands for all 4096 bytes) and may be
//! write-protected, or shared with another process, so that MOVE says EBUSY until it is written. Mappings may be registered with one
//! userfaultfd. Each call acts on one page after the other, and at each of them another thread may run in between ([`point`]).
//!
//! Here is the machine; what is done to it is in [`filling`], [`calls`], [`messages`] and [`access`].

mod access;
mod calls;
mod filling;
mod messages;

pub(crate) use access::{Killed, access, touch};
pub(crate) use calls::{
    copy_over, fork, madvise_dontneed, mmap_fixed, mremap, munmap, populate_write,
};
pub(crate) use messages::{has_message, poll, read_message, register, unregister, wake};

use crate::addr::{BLOCK_SIZE, PAGE_SIZE, PageRange, page_floor};
use crate::sys::event::Event;
use crate::sys::maps::{Kind, Vma};
use crate::sys::pagemap::{Extent, PageState};
use crate::sys::signal::{self, BusFault};
use crate::sys::uffd::{Features, Mode, Stop};
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
