//! The hub: ranges, open invalidations, and who waits for whom.

use super::active::Active;
use super::interval::Interval;
use super::storage::{self, Shared};
use super::tree::Tree;
#[cfg(not(svm_loom))]
use crate::sync::Mutex;
#[cfg(svm_loom)]
use crate::sync::ideal::Mutex;
use crate::sync::mutation::{Mutation, mutated};
use crate::sync::shim::atomic::AtomicU64;
use crate::sync::shim::atomic::Ordering::Relaxed;
use crate::sync::shim::{Backoff, model_has_failed};
use crate::sync::{Deadline, Futex, Woken};
use core::fmt;
use core::ops::Deref;

/// The range protocol's state for one region. See the [module's text](super).
#[derive(Debug)]
pub struct Hub {
    inner: Mutex<Inner>,
    /// By the range's index: what is read without the hub's lock.
    words: Shared<RangeWord>,
}

/// Under the hub's lock.
#[derive(Debug)]
struct Inner {
    tree: Tree,
    active: Active,
    is_released: bool,
    /// Threads that sleep in `begin`, over all ranges.
    nr_waiting: u32,
    counters: Counters,
}

/// What of a range is read without the hub's lock. Written under it alone.
#[derive(Debug)]
struct RangeWord {
    /// Odd, and only ever grows: by 2 with each invalidation that overlaps the range, and with each change of the range
    /// itself. Outlives the range, so that a token of a former range in this slot is never good again.
    seq: AtomicU64,
    /// Changes when a thread that waits in `begin` should look again.
    event: Futex,
}

impl RangeWord {
    fn new() -> Self {
        Self {
            seq: AtomicU64::new(1),
            event: Futex::new(0),
        }
    }

    /// Makes every token of the range bad. Under the hub's lock.
    fn bump(&self) {
        // Relaxed: whoever compares holds the device lock, and so sees this or takes the lock before the callback does ("why it
        // is safe" in the module's text).
        self.seq.fetch_add(2, Relaxed);
    }

    /// Under the hub's lock; to be followed by a wake.
    fn signal(&self) {
        self.event
            .store(self.event.load(Relaxed).wrapping_add(1), Relaxed);
    }
}

/// Names a range of one hub, for ever: a later range in the same slot has another key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RangeKey {
    index: u32,
    generation: u32,
}

/// What a range was when an update began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an update that is begun is checked with its token"]
pub struct Token {
    seq: u64,
}

impl Token {
    /// No update: every range says "interrupted" to it.
    pub const NONE: Self = Self { seq: 0 };
}

/// Why an update could not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BeginError {
    /// An overlapping invalidation was still open at the deadline.
    Timeout,
    /// The hub's region is being torn down.
    Released,
}

impl fmt::Display for BeginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Timeout => "an overlapping invalidation was still open at the deadline",
            Self::Released => "the region is being torn down",
        })
    }
}

impl core::error::Error for BeginError {}

/// Every slot for open invalidations is in use; nothing has changed.
///
/// The caller lets go of all its locks, yields, and starts anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// There is no memory for one more range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMemory;

impl fmt::Display for NoMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no memory for one more range of a hub")
    }
}

impl core::error::Error for NoMemory {}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too many open invalidations of one region")
    }
}

impl core::error::Error for Full {}

/// How often what has happened in a hub.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Invalidations started.
    pub starts: u64,
    /// Starts refused because every slot was in use.
    pub full: u64,
    /// Ranges interrupted by a start.
    pub bumps: u64,
    /// Updates begun, or tried.
    pub begins: u64,
    /// Of these, how many had to wait for an overlapping invalidation.
    pub waits: u64,
    /// Of these, how many gave up.
    pub timeouts: u64,
    /// Ranges whose waiting threads the end of an invalidation woke.
    pub wakes: u64,
}

/// An open invalidation: from before a change of pages until after it. Dropping it is the end.
///
/// It may be ended on another thread than it was started on, and be kept for as long as the change takes; `H` says how it holds
/// on to its hub: `&Hub`, `Arc<Hub>`, or a handle of the caller's. One that is leaked (`mem::forget`) keeps a slot
/// and blocks overlapping ranges, each until its deadline.
#[must_use = "dropping the bracket ends the invalidation"]
pub struct Bracket<H: Deref<Target = Hub>> {
    hub: H,
    slot: u8,
    interval: Interval,
}

impl<H: Deref<Target = Hub>> Bracket<H> {
    /// Starts an invalidation of `interval`: every update of an overlapping range but `except` is interrupted, and none begins
    /// until the bracket is dropped.
    ///
    /// Next the devices are told, then the pages change, then the bracket is dropped.
    ///
    /// `except` is the owner's filter: legal only for the range whose holder makes the change, and keeps everybody else from
    /// changing these pages until it has committed (hazards P2).
    ///
    /// # Errors
    ///
    /// [`Full`] if every slot is in use; nothing has changed.
    #[inline]
    pub fn start(hub: H, interval: Interval, except: Option<RangeKey>) -> Result<Self, Full> {
        let slot = hub.start_slot(interval, except)?;
        Ok(Self {
            hub,
            slot,
            interval,
        })
    }

    /// What it covers.
    pub fn interval(&self) -> Interval {
        self.interval
    }
}

impl<H: Deref<Target = Hub>> Drop for Bracket<H> {
    fn drop(&mut self) {
        if !mutated(Mutation::HubSkipsEnd) && !model_has_failed() {
            self.hub.end_slot(self.slot);
        }
    }
}

impl<H: Deref<Target = Hub>> fmt::Debug for Bracket<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bracket")
            .field("slot", &self.slot)
            .field("interval", &self.interval)
            .finish_non_exhaustive()
    }
}

/// A range's place in the hub; dropping it removes the range.
///
/// One device thread has one and points it at the pages of each fault. `H` as for [`Bracket`].
#[must_use = "dropping the subscription removes the range"]
pub struct Subscription<H: Deref<Target = Hub>> {
    hub: H,
    key: RangeKey,
}

impl<H: Deref<Target = Hub>> Subscription<H> {
    /// Inserts a range; allocates when the hub has to grow, so not on the fault path.
    ///
    /// # Panics
    ///
    /// If there is no memory for it, or the hub holds some sixty million ranges.
    pub fn insert(hub: H, interval: Interval) -> Self {
        match Self::try_insert(hub, interval) {
            Ok(subscription) => subscription,
            Err(NoMemory) => panic!("no memory for the ranges of a hub"),
        }
    }

    /// [`insert`](Self::insert) for who can go on without.
    ///
    /// # Errors
    ///
    /// [`NoMemory`]; nothing has changed.
    ///
    /// # Panics
    ///
    /// If the hub holds some sixty million ranges.
    pub fn try_insert(hub: H, interval: Interval) -> Result<Self, NoMemory> {
        let key = hub.insert_range(interval)?;
        Ok(Self { hub, key })
    }

    /// The range's name, for `except`.
    pub fn key(&self) -> RangeKey {
        self.key
    }

    /// The hub the range is in.
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// What the range covers.
    pub fn interval(&self) -> Interval {
        self.hub.inner.lock().tree.at(self.key.index).interval
    }

    /// Points the range at another interval; tokens from before are no good. Never allocates.
    pub fn move_to(&mut self, interval: Interval) {
        self.hub
            .move_range(&mut self.hub.inner.lock(), self.key, interval);
    }

    /// Points the range at nothing, so that no invalidation meets it until it is moved again.
    pub fn park(&mut self) {
        self.move_to(Interval::EMPTY);
    }

    /// Begins an update of what the range covers, waiting while an overlapping invalidation is open.
    ///
    /// What is read of the page state from here on may be committed, if [`interrupted`](Self::interrupted) then still says no.
    /// The caller holds no lock that the end of an invalidation needs.
    ///
    /// # Errors
    ///
    /// [`BeginError`]; the range is as before.
    pub fn begin(&self, deadline: Deadline) -> Result<Token, BeginError> {
        self.hub
            .begin_range(self.hub.inner.lock(), self.key, deadline)
    }

    /// [`move_to`](Self::move_to), then [`begin`](Self::begin), under one hold of the hub's lock.
    ///
    /// # Errors
    ///
    /// [`BeginError`]; the range has moved all the same.
    pub fn begin_at(
        &mut self,
        interval: Interval,
        deadline: Deadline,
    ) -> Result<Token, BeginError> {
        let mut inner = self.hub.inner.lock();
        self.hub.move_range(&mut inner, self.key, interval);
        self.hub.begin_range(inner, self.key, deadline)
    }

    /// Whether an overlapping invalidation has started since the update with `token` began.
    ///
    /// `true` is always right. `false` is right only while the caller holds the lock under which the device's callback
    /// removes translations; elsewhere it is a hint.
    #[inline]
    pub fn interrupted(&self, token: Token) -> bool {
        // Relaxed: see `RangeWord::bump`.
        self.hub
            .words
            .get(self.key.index)
            .is_none_or(|word| word.seq.load(Relaxed) != token.seq)
    }
}

impl<H: Deref<Target = Hub>> Drop for Subscription<H> {
    fn drop(&mut self) {
        if !model_has_failed() {
            self.hub.remove_range(self.key);
        }
    }
}

impl<H: Deref<Target = Hub>> fmt::Debug for Subscription<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// Ranges to be woken once the hub's lock is released.
struct WakeList {
    indices: [u32; Self::LEN],
    len: usize,
}

impl WakeList {
    /// Woken outside the lock; were there ever more, the rest is woken inside.
    const LEN: usize = 16;

    const fn new() -> Self {
        Self {
            indices: [0; Self::LEN],
            len: 0,
        }
    }

    fn push(&mut self, words: &Shared<RangeWord>, index: u32) {
        match self.indices.get_mut(self.len) {
            Some(place) => {
                *place = index;
                self.len += 1;
            }
            None => wake(words, index),
        }
    }

    fn wake_all(&self, words: &Shared<RangeWord>) {
        self.indices[..self.len]
            .iter()
            .for_each(|&index| wake(words, index));
    }
}

#[cold]
fn wake(words: &Shared<RangeWord>, index: u32) {
    if let Some(word) = words.get(index) {
        if mutated(Mutation::HubWakesOne) {
            word.event.wake_one();
        } else {
            word.event.wake_all();
        }
    }
}

#[cfg(not(svm_loom))]
type InnerGuard<'a> = crate::sync::MutexGuard<'a, Inner>;
#[cfg(svm_loom)]
type InnerGuard<'a> = loom::sync::MutexGuard<'a, Inner>;

impl Hub {
    /// A hub with no range and no invalidation.
    #[cfg(not(svm_loom))]
    pub const fn new() -> Self {
        Self {
            inner: Mutex::new(Inner::new()),
            words: Shared::new(),
        }
    }

    /// A hub with no range and no invalidation.
    #[cfg(svm_loom)]
    pub fn new() -> Self {
        Self {
            inner: Mutex::new(Inner::new()),
            words: Shared::new(),
        }
    }

    /// [`Bracket::start`], by reference.
    ///
    /// # Errors
    ///
    /// [`Full`].
    #[inline]
    pub fn start(
        &self,
        interval: Interval,
        except: Option<RangeKey>,
    ) -> Result<Bracket<&Self>, Full> {
        Bracket::start(self, interval, except)
    }

    /// Interrupts the ranges that overlap, as a start does, and opens nothing: no token that was given is good any more. Rule 8.
    ///
    /// For a caller that may not wait for a slot. A range that begins afterwards is not held up, so the caller has to see to it by
    /// other means that its snapshot comes after the change. In the [`Counters`] it is no start; the ranges are counted.
    pub fn interrupt(&self, interval: Interval) {
        let mut inner = self.inner.lock();
        if !mutated(Mutation::HubInterruptWithoutBump) {
            self.bump_overlapping(&mut inner, interval, None);
        }
    }

    /// [`Subscription::insert`], by reference.
    pub fn insert(&self, interval: Interval) -> Subscription<&Self> {
        Subscription::insert(self, interval)
    }

    /// The region is going: every update is interrupted, and none begins any more; whoever waits to begin one is told so.
    ///
    /// Invalidations start and end as before: the teardown's own comes next.
    pub fn release(&self) {
        let mut to_wake = WakeList::new();
        let mut inner = self.inner.lock();
        inner.is_released = true;
        inner
            .tree
            .for_each_overlapping(Interval::ALL, &mut |index, node| {
                let Some(word) = self.words.get(index) else {
                    return;
                };
                if !mutated(Mutation::HubReleaseWithoutBump) {
                    word.bump();
                }
                if node.nr_waiting > 0 && !mutated(Mutation::HubReleaseWithoutWake) {
                    word.signal();
                    to_wake.push(&self.words, index);
                }
            });
        drop(inner);
        to_wake.wake_all(&self.words);
    }

    /// How often what has happened so far.
    pub fn counters(&self) -> Counters {
        self.inner.lock().counters
    }

    /// How many invalidations are open at this moment.
    pub fn nr_open(&self) -> u32 {
        self.inner.lock().active.len()
    }

    fn start_slot(&self, interval: Interval, except: Option<RangeKey>) -> Result<u8, Full> {
        let mut inner = self.inner.lock();
        let remembered = if mutated(Mutation::HubStartWithoutSlot) {
            Interval::EMPTY
        } else {
            interval
        };
        let slot = match inner.active.insert(remembered, except) {
            Some(slot) => slot,
            None if mutated(Mutation::HubFullGoesOn) => 0,
            None => {
                inner.counters.full += 1;
                return Err(Full);
            }
        };
        inner.counters.starts += 1;
        let bumped = if mutated(Mutation::HubStartBumpsAll) {
            Interval::ALL
        } else {
            interval
        };
        if !mutated(Mutation::HubStartWithoutBump) && !mutated(Mutation::HubBumpAtEnd) {
            self.bump_overlapping(&mut inner, bumped, except);
        }
        Ok(slot)
    }

    #[inline]
    fn bump_overlapping(&self, inner: &mut Inner, interval: Interval, except: Option<RangeKey>) {
        // A worker that moves pages to itself, where nobody else does, as often: there is nothing to search.
        if !except.is_some_and(|except| inner.is_alone(except)) {
            self.bump_all_overlapping(inner, interval, except);
        }
    }

    fn bump_all_overlapping(
        &self,
        inner: &mut Inner,
        interval: Interval,
        except: Option<RangeKey>,
    ) {
        let mut nr_bumped = 0;
        inner
            .tree
            .for_each_overlapping(interval, &mut |index, node| {
                let is_excepted = except
                    == Some(RangeKey {
                        index,
                        generation: node.generation,
                    })
                    || except.is_some() && mutated(Mutation::HubExceptsEveryone);
                if let Some(word) = self.words.get(index)
                    && !is_excepted
                {
                    word.bump();
                    nr_bumped += 1;
                }
            });
        inner.counters.bumps += nr_bumped;
    }

    fn end_slot(&self, slot: u8) {
        let mut to_wake = WakeList::new();
        let mut inner = self.inner.lock();
        let interval = inner.active.remove(slot);
        if mutated(Mutation::HubBumpAtEnd) {
            self.bump_overlapping(&mut inner, interval, None);
        }
        if mutated(Mutation::HubEndWithoutWake) {
            return;
        }
        let Inner {
            tree,
            active,
            counters,
            nr_waiting,
            ..
        } = &mut *inner;
        if *nr_waiting > 0 {
            tree.for_each_overlapping(interval, &mut |index, node| {
                let key = RangeKey {
                    index,
                    generation: node.generation,
                };
                if node.nr_waiting > 0
                    && !active.blocks(node.interval, key)
                    && let Some(word) = self.words.get(index)
                {
                    word.signal();
                    to_wake.push(&self.words, index);
                }
            });
            counters.wakes += to_wake.len as u64;
        }
        drop(inner);
        to_wake.wake_all(&self.words);
    }

    fn insert_range(&self, interval: Interval) -> Result<RangeKey, NoMemory> {
        loop {
            let segment = {
                let mut inner = self.inner.lock();
                if let Some(index) = inner.tree.insert(interval) {
                    return Ok(RangeKey {
                        index,
                        generation: inner.tree.at(index).generation,
                    });
                }
                inner.tree.nr_segments()
            };
            assert!(segment < storage::SEGMENTS, "too many ranges in one hub");
            let nodes = Tree::allocate_segment(segment)?;
            let words = storage::allocate(segment, RangeWord::new)?;
            let mut inner = self.inner.lock();
            if inner.tree.nr_segments() == segment || mutated(Mutation::HubGrowsTwice) {
                inner.tree.grow(nodes);
                self.words.grow(segment, words);
            } else {
                // Somebody else has grown it; what was allocated in vain is freed without the lock.
                drop(inner);
            }
        }
    }

    fn remove_range(&self, key: RangeKey) {
        let mut inner = self.inner.lock();
        inner.tree.remove(key.index);
        if let Some(word) = self.words.get(key.index)
            && !mutated(Mutation::HubRemoveWithoutBump)
        {
            word.bump();
        }
    }

    fn move_range(&self, inner: &mut Inner, key: RangeKey, interval: Interval) {
        if !mutated(Mutation::HubMoveWithoutTree) {
            inner.tree.set_interval(key.index, interval);
        }
        if let Some(word) = self.words.get(key.index)
            && !mutated(Mutation::HubMoveWithoutBump)
        {
            word.bump();
        }
    }

    fn begin_range<'a>(
        &'a self,
        mut inner: InnerGuard<'a>,
        key: RangeKey,
        deadline: Deadline,
    ) -> Result<Token, BeginError> {
        let Some(word) = self.words.get(key.index) else {
            return Err(BeginError::Released);
        };
        inner.counters.begins += 1;
        let mut last_look = false;
        let mut has_waited = false;
        loop {
            if inner.is_released {
                return Err(BeginError::Released);
            }
            let interval = if mutated(Mutation::HubBeginWaitsForAll) {
                Interval::ALL
            } else {
                inner.tree.at(key.index).interval
            };
            if !inner.active.blocks(interval, key) || mutated(Mutation::HubBeginWithoutWait) {
                if mutated(Mutation::HubTokenReadLate) {
                    drop(inner);
                }
                // Under the hub's lock: an invalidation that starts later bumps what is read here.
                return Ok(Token {
                    seq: word.seq.load(Relaxed),
                });
            }
            if last_look {
                inner.counters.timeouts += 1;
                return Err(BeginError::Timeout);
            }
            if !has_waited {
                has_waited = true;
                inner.counters.waits += 1;
            }
            if !mutated(Mutation::HubWaiterNotCounted) {
                inner.tree.at_mut(key.index).nr_waiting += 1;
                inner.nr_waiting += 1;
            }
            // Read under the hub's lock: an end that comes later changes it, and the futex does not sleep then.
            let mut event = word.event.load(Relaxed);
            drop(inner);
            if mutated(Mutation::HubEventReadLate) {
                event = word.event.load(Relaxed);
            }
            last_look = word.sleep(event, deadline) == Woken::TimedOut;
            inner = self.inner.lock();
            let stays = last_look && mutated(Mutation::HubTimeoutStaysCounted);
            if !mutated(Mutation::HubWaiterNotCounted) && !stays {
                inner.tree.at_mut(key.index).nr_waiting -= 1;
                inner.nr_waiting -= 1;
            }
        }
    }
}

impl RangeWord {
    /// Sleeps while `event` is the last, after spinning for as long as a short invalidation may take.
    #[cold]
    fn sleep(&self, event: u32, deadline: Deadline) -> Woken {
        let mut backoff = Backoff::default();
        while !backoff.spin() {
            if self.event.load(Relaxed) != event {
                return Woken::LookAgain;
            }
        }
        self.event.wait(event, deadline)
    }
}

impl Inner {
    const fn new() -> Self {
        Self {
            tree: Tree::new(),
            active: Active::new(),
            is_released: false,
            nr_waiting: 0,
            counters: Counters::ZERO,
        }
    }

    /// Whether no range but this is in the tree.
    #[inline]
    fn is_alone(&self, key: RangeKey) -> bool {
        self.tree.is_alone(key.index) && self.tree.at(key.index).generation == key.generation
    }
}

impl Counters {
    const ZERO: Self = Self {
        starts: 0,
        full: 0,
        bumps: 0,
        begins: 0,
        waits: 0,
        timeouts: 0,
        wakes: 0,
    };
}

impl Default for Hub {
    fn default() -> Self {
        Self::new()
    }
}
