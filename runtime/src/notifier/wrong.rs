//! Protocols that are known to be wrong, and one beside each that is right.
//!
//! Each was in a kernel tree, in the seed, or in a first design of ours. They are here so that the checker shows, on the same
//! scenarios that the right ones pass, the schedule in which each fails: a model that does not find these would not find a
//! mistake of ours.

use super::{Hub, Interval};
use crate::sync::Deadline;
use crate::sync::checker::{Lane, Watched, expect_failure, models, reached};
use crate::sync::ideal::Mutex;
use crate::sync::shim::atomic::{AtomicU32, AtomicU64, Ordering};
use Ordering::Relaxed;
use loom::sync::Condvar;
use loom::thread;
use std::sync::Arc;

/// A range protocol for one range, as a device fault and an invalidation use it.
trait Protocol: Send + Sync + 'static {
    /// What `begin` hands to the commit.
    type Token: Copy;

    fn new() -> Self;

    /// Registers the range.
    fn register(&self);

    /// `start_update`; `None` where the protocol says "come again".
    fn begin(&self) -> Option<Self::Token>;

    /// Whether the update is to be retried. The caller holds the device lock.
    fn interrupted(&self, token: Self::Token) -> bool;

    /// Runs `change` between start and end. `overlaps`: the range.
    fn invalidate(&self, overlaps: bool, change: impl FnOnce());

    /// What the device callback does to the range under the device lock.
    fn called_back(&self) {}
}

/// State under a lock, with a wait.
struct Monitor<S> {
    state: loom::sync::Mutex<S>,
    changed: Condvar,
}

impl<S> Monitor<S> {
    fn new(state: S) -> Self {
        Self {
            state: loom::sync::Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    fn with<R>(&self, access: impl FnOnce(&mut S) -> R) -> R {
        access(&mut self.state.lock().unwrap())
    }

    fn wait_until<R>(&self, mut ready: impl FnMut(&mut S) -> Option<R>) -> R {
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(ready) = ready(&mut state) {
                return ready;
            }
            state = self.changed.wait(state).unwrap();
        }
    }
}

/// The hub of this crate.
struct Ours {
    hub: Arc<Hub>,
    range: Mutex<Option<super::Subscription<Arc<Hub>>>>,
}

const PAGE: Interval = Interval::new(0, 1);
const ELSEWHERE: Interval = Interval::new(1, 2);

impl Protocol for Ours {
    type Token = super::Token;

    fn new() -> Self {
        Self {
            hub: Arc::new(Hub::new()),
            range: Mutex::new(None),
        }
    }

    fn register(&self) {
        *self.range.lock() = Some(super::Subscription::insert(Arc::clone(&self.hub), PAGE));
    }

    fn begin(&self) -> Option<super::Token> {
        self.range
            .lock()
            .as_ref()
            .expect("registered")
            .begin(Deadline::NEVER)
            .ok()
    }

    fn interrupted(&self, token: super::Token) -> bool {
        self.range
            .lock()
            .as_ref()
            .expect("registered")
            .interrupted(token)
    }

    fn invalidate(&self, overlaps: bool, change: impl FnOnce()) {
        let _bracket = self
            .hub
            .start(if overlaps { PAGE } else { ELSEWHERE }, None)
            .expect("a free slot");
        change();
    }
}

/// `mmu_interval_notifier` of Linux 5.5 and later, for one range (protocol.md, section 4).
struct Kernel(Monitor<KernelState>);

struct KernelState {
    seq: u64,
    nr_active: u32,
    is_registered: bool,
    range_seq: u64,
}

impl Protocol for Kernel {
    type Token = u64;

    fn new() -> Self {
        Self(Monitor::new(KernelState {
            seq: 2,
            nr_active: 0,
            is_registered: false,
            range_seq: 0,
        }))
    }

    fn register(&self) {
        self.0.with(|hub| {
            if hub.nr_active > 0 {
                hub.seq |= 1;
                hub.range_seq = hub.seq;
            } else {
                hub.range_seq = hub.seq - 1;
            }
            hub.is_registered = true;
        });
    }

    fn begin(&self) -> Option<u64> {
        let token = self.0.with(|hub| hub.range_seq);
        self.0.wait_until(|hub| (hub.seq != token).then_some(()));
        Some(token)
    }

    fn interrupted(&self, token: u64) -> bool {
        self.0.with(|hub| hub.range_seq != token)
    }

    fn invalidate(&self, overlaps: bool, change: impl FnOnce()) {
        self.0.with(|hub| {
            hub.nr_active += 1;
            if overlaps && hub.is_registered {
                hub.seq |= 1;
            }
        });
        change();
        self.0.with(|hub| {
            hub.nr_active -= 1;
            if hub.nr_active == 0 && hub.seq & 1 == 1 {
                hub.seq += 1;
            }
        });
        self.0.changed.notify_all();
    }

    fn called_back(&self) {
        self.0.with(|hub| hub.range_seq = hub.seq);
    }
}

/// What the seed replaces: `range->valid`. `COUNTED`: with the count of active invalidations that makes it "bool plus a counter".
struct ValidFlag<const COUNTED: bool>(Monitor<ValidFlagState>);

struct ValidFlagState {
    nr_active: u32,
    is_valid: bool,
}

impl<const COUNTED: bool> Protocol for ValidFlag<COUNTED> {
    type Token = ();

    fn new() -> Self {
        Self(Monitor::new(ValidFlagState {
            nr_active: 0,
            is_valid: false,
        }))
    }

    fn register(&self) {
        self.0.with(|hub| hub.is_valid = hub.nr_active == 0);
    }

    fn begin(&self) -> Option<()> {
        self.0.wait_until(|hub| hub.is_valid.then_some(()));
        Some(())
    }

    fn interrupted(&self, (): ()) -> bool {
        self.0.with(|hub| !hub.is_valid)
    }

    fn invalidate(&self, overlaps: bool, change: impl FnOnce()) {
        self.0.with(|hub| {
            hub.nr_active += 1;
            hub.is_valid &= !overlaps;
        });
        change();
        self.0.with(|hub| {
            hub.nr_active -= 1;
            hub.is_valid |= hub.nr_active == 0 || !COUNTED;
        });
        self.0.changed.notify_all();
    }
}

/// The seed's patch: one seqcount for all ranges. `RIGHT_OVERLAP`: with its overlap test put right; `WAITS`: with the result of
/// its wait looked at.
struct Rfc<const RIGHT_OVERLAP: bool, const WAITS: bool>(Monitor<RfcState>);

#[derive(Default)]
struct RfcState {
    seq: u64,
    nr_active: u32,
    range: Option<Interval>,
}

impl<const RIGHT_OVERLAP: bool, const WAITS: bool> Protocol for Rfc<RIGHT_OVERLAP, WAITS> {
    type Token = u64;

    fn new() -> Self {
        Self(Monitor::new(RfcState::default()))
    }

    fn register(&self) {
        self.0.with(|hub| hub.range = Some(PAGE));
    }

    fn begin(&self) -> Option<u64> {
        if WAITS {
            return Some(
                self.0
                    .wait_until(|hub| (hub.nr_active == 0).then_some(hub.seq)),
            );
        }
        // The wait has timed out, and nobody asks. `raw_seqcount_begin` masks the low bit; `start_update` returns
        // whether the seqcount still is what that gave.
        self.0.with(|hub| (hub.seq & 1 == 0).then_some(hub.seq))
    }

    fn interrupted(&self, token: u64) -> bool {
        self.0.with(|hub| hub.seq != token)
    }

    fn invalidate(&self, overlaps: bool, change: impl FnOnce()) {
        let update = if overlaps { PAGE } else { ELSEWHERE };
        self.0.with(|hub| {
            hub.nr_active += 1;
            let any_overlaps = hub.range.is_some_and(|range| {
                if RIGHT_OVERLAP {
                    range.overlaps(update)
                } else {
                    range.start <= update.end && range.end < update.start
                }
            });
            if hub.seq & 1 == 0 && any_overlaps {
                hub.seq += 1;
            }
        });
        change();
        self.0.with(|hub| {
            hub.nr_active -= 1;
            if hub.nr_active == 0 && hub.seq & 1 == 1 {
                hub.seq += 1;
            }
        });
        self.0.changed.notify_all();
    }
}

/// A first try at waiting for overlapping invalidations alone (hazards P3): a count per range, and the hub's seq as its token.
/// `BUMPS`: with a token of the range's own.
struct CountPerRange<const BUMPS: bool>(Monitor<CountState>);

struct CountState {
    seq: u64,
    nr_active: u32,
    range_seq: u64,
    range_count: u32,
}

impl<const BUMPS: bool> Protocol for CountPerRange<BUMPS> {
    type Token = u64;

    fn new() -> Self {
        Self(Monitor::new(CountState {
            seq: 2,
            nr_active: 0,
            range_seq: 1,
            range_count: 0,
        }))
    }

    /// Before all else, in every scenario this one is used in.
    fn register(&self) {}

    fn begin(&self) -> Option<u64> {
        Some(
            self.0
                .wait_until(|hub| (hub.range_count == 0).then_some(hub.range_seq)),
        )
    }

    fn interrupted(&self, token: u64) -> bool {
        self.0.with(|hub| hub.range_seq != token)
    }

    fn invalidate(&self, overlaps: bool, change: impl FnOnce()) {
        self.0.with(|hub| {
            hub.nr_active += 1;
            // The hub is odd while any invalidation meets any range: the disjoint one meets another's.
            hub.seq |= 1;
            hub.range_count += u32::from(overlaps);
        });
        change();
        self.0.with(|hub| {
            hub.nr_active -= 1;
            hub.range_count -= u32::from(overlaps);
            if hub.nr_active == 0 {
                hub.seq += 1;
            }
        });
        self.0.changed.notify_all();
    }

    fn called_back(&self) {
        self.0
            .with(|hub| hub.range_seq = if BUMPS { hub.range_seq + 2 } else { hub.seq });
    }
}

/// One page, one device.
struct World<P> {
    protocol: P,
    page: AtomicU32,
    translation: Mutex<Option<u32>>,
}

/// How a driver uses the protocol.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Driver {
    Right,
    /// Checks, and then takes the device lock.
    ChecksBeforeLock,
}

impl<P: Protocol> World<P> {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            protocol: P::new(),
            page: AtomicU32::new(0),
            translation: Mutex::new(None),
        })
    }

    fn fault(&self, lane: Lane, driver: Driver) {
        loop {
            let Some(token) = self.protocol.begin() else {
                thread::yield_now();
                continue;
            };
            lane.did("begin");
            // A read-modify-write reads the latest: these protocols are wrong even where memory is not weak.
            let version = self.page.fetch_or(0, Relaxed);
            lane.did_with("snapshot: version", version);
            if driver == Driver::ChecksBeforeLock && !self.protocol.interrupted(token) {
                lane.did("not interrupted");
                *self.translation.lock() = Some(version);
                lane.did_with("lock(device), establish translation to", version);
                return;
            }
            let mut translation = self.translation.lock();
            if driver == Driver::Right && !self.protocol.interrupted(token) {
                *translation = Some(version);
                lane.did_with("lock(device), establish translation to", version);
                return;
            }
            lane.did("interrupted: retry");
        }
    }

    fn invalidate(&self, lane: Lane) {
        self.protocol.invalidate(true, || {
            lane.did("invalidate_start");
            self.call_back(lane);
            self.change(lane);
        });
        lane.did("invalidate_end");
    }

    fn call_back(&self, lane: Lane) {
        let mut translation = self.translation.lock();
        self.protocol.called_back();
        *translation = None;
        lane.did("callback: wipe translations");
    }

    fn change(&self, lane: Lane) {
        let version = self.page.fetch_add(1, Relaxed) + 1;
        lane.did_with("page changes to version", version);
    }

    fn check_at_rest(&self) {
        let (translation, version) = (*self.translation.lock(), self.page.load(Relaxed));
        assert!(
            translation.is_none_or(|of| of == version),
            "stale translation: to {translation:?}, page is {version}"
        );
    }
}

/// The ABA: an overlapping invalidation begins and ends between the snapshot and the commit.
fn aba<P: Protocol>() {
    aba_with::<P>(Driver::Right);
}

fn aba_with<P: Protocol>(driver: Driver) {
    let world = World::<P>::new();
    world.protocol.register();
    let invalidation = {
        let world = Arc::clone(&world);
        thread::spawn(move || world.invalidate(Lane(1)))
    };
    world.fault(Lane(0), driver);
    invalidation.join().unwrap();
    world.check_at_rest();
}

fn commit_checks_before_lock() {
    aba_with::<Ours>(Driver::ChecksBeforeLock);
}

/// The range is registered after the invalidation has started.
fn registered_late<P: Protocol>() {
    let world = World::<P>::new();
    let fault = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            world.protocol.register();
            Lane(0).did("register");
            world.fault(Lane(0), Driver::Right);
        })
    };
    world.invalidate(Lane(1));
    fault.join().unwrap();
    world.check_at_rest();
}

/// The seed's ladder: an overlapping invalidation is in progress from before the fault begins; a disjoint one starts and ends
/// beside it.
fn three_cpus<P: Protocol>() {
    let world = World::<P>::new();
    world.protocol.register();
    let mut others = None;
    world.protocol.invalidate(true, || {
        Lane(0).did("invalidate_start (overlaps)");
        world.call_back(Lane(0));
        let (faulting, disjoint) = (Arc::clone(&world), Arc::clone(&world));
        others = Some([
            thread::spawn(move || faulting.fault(Lane(1), Driver::Right)),
            thread::spawn(move || {
                disjoint
                    .protocol
                    .invalidate(false, || Lane(2).did("invalidate_start (disjoint)"));
                Lane(2).did("invalidate_end (disjoint)");
            }),
        ]);
        world.change(Lane(0));
    });
    Lane(0).did("invalidate_end (overlaps)");
    others
        .into_iter()
        .flatten()
        .for_each(|other| other.join().unwrap());
    world.check_at_rest();
}

/// An unrelated invalidation is open throughout, while two overlapping ones start and end.
fn unrelated_open<P: Protocol>() {
    let world = World::<P>::new();
    world.protocol.register();
    let mut churn = None;
    world.protocol.invalidate(false, || {
        churn = Some({
            let world = Arc::clone(&world);
            thread::spawn(move || {
                world.invalidate(Lane(1));
                world.invalidate(Lane(1));
            })
        });
        world.fault(Lane(0), Driver::Right);
    });
    churn.expect("was spawned").join().unwrap();
    world.check_at_rest();
}

/// A change of page state by ourselves that is no "invalidation", since no device maps the page: where it leaves the bracket out
/// (hazards P1), the update under way does not see it.
fn unbracketed<const BRACKETED: bool>() {
    let world = World::<Ours>::new();
    world.protocol.register();
    let writer = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            if BRACKETED {
                return world.invalidate(Lane(1));
            }
            if world.translation.lock().is_none() {
                Lane(1).did("no sharers: no bracket");
                world.change(Lane(1));
            } else {
                world.invalidate(Lane(1));
            }
        })
    };
    world.fault(Lane(0), Driver::Right);
    writer.join().unwrap();
    world.check_at_rest();
}

/// The devices are told before the invalidation starts.
fn told_before_start() {
    let world = World::<Ours>::new();
    world.protocol.register();
    let invalidation = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            world.call_back(Lane(1));
            world.protocol.invalidate(true, || world.change(Lane(1)));
            Lane(1).did("invalidate_start, change, invalidate_end");
        })
    };
    world.fault(Lane(0), Driver::Right);
    invalidation.join().unwrap();
    world.check_at_rest();
}

/// The page changes after the invalidation has ended (I3).
fn changed_after_end() {
    let world = World::<Ours>::new();
    world.protocol.register();
    let invalidation = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            world.protocol.invalidate(true, || world.call_back(Lane(1)));
            Lane(1).did("invalidate_start, invalidate_end");
            world.change(Lane(1));
        })
    };
    world.fault(Lane(0), Driver::Right);
    invalidation.join().unwrap();
    world.check_at_rest();
}

/// The seed's refused invalidation: it returns without taking back its count (protocol.md, section 3, 5).
fn refused<const UNDONE: bool>() {
    let world = World::<Rfc<true, true>>::new();
    world.protocol.register();
    let refusal = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            world.protocol.0.with(|hub| hub.nr_active += 1);
            Lane(1).did("invalidate_start: would block");
            if UNDONE {
                world.protocol.0.with(|hub| hub.nr_active -= 1);
                world.protocol.0.changed.notify_all();
                Lane(1).did("undone");
            }
        })
    };
    world.fault(Lane(0), Driver::Right);
    refusal.join().unwrap();
    world.check_at_rest();
}

/// Removing a subscription while an invalidation holds the tree frozen: the removal is deferred to the end of the invalidation,
/// and the remover waits until it is over before it frees. `LOCKED`: it compares the seq under the hub's lock; as it was until
/// 2022, without ("mm/mmu_notifier.c: fix race in mmu_interval_notifier_remove()").
struct Removal {
    hub: Mutex<RemovalState>,
    seq: AtomicU64,
    /// The subscription's memory.
    subscription: Watched,
}

#[derive(Default)]
struct RemovalState {
    is_deferred: bool,
}

fn remover<const LOCKED: bool>() {
    let world = Arc::new(Removal {
        hub: Mutex::new(RemovalState::default()),
        seq: AtomicU64::new(3),
        subscription: Watched::new(0),
    });
    let ender = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let lane = Lane(1);
            let mut hub = world.hub.lock();
            world.seq.store(4, Ordering::Release);
            lane.did("invalidate_end: lock, seq += 1");
            if core::mem::take(&mut hub.is_deferred) {
                world.subscription.write(1);
                lane.did("interval_tree_remove(subscription)");
            }
        })
    };
    let lane = Lane(0);
    let seq = {
        let mut hub = world.hub.lock();
        let seq = world.seq.load(Relaxed);
        hub.is_deferred = seq & 1 == 1;
        lane.did("remove: deferred if odd");
        seq
    };
    if seq & 1 == 1 {
        reached("deferred");
        loop {
            let is_over = if LOCKED {
                let _hub = world.hub.lock();
                world.seq.load(Relaxed) != seq
            } else {
                world.seq.load(Ordering::Acquire) != seq
            };
            if is_over {
                break;
            }
            thread::yield_now();
        }
        lane.did("seq has changed: it is over");
    }
    world.subscription.write(2);
    lane.did("free(subscription)");
    ender.join().unwrap();
}

fn ours_aba() {
    aba::<Ours>();
}
fn ours_registered_late() {
    registered_late::<Ours>();
}
fn ours_three_cpus() {
    three_cpus::<Ours>();
}
/// "No, this can not happen", says the seed's thread of the counter; the ABA can.
fn valid_flag_with_a_counter_three_cpus() {
    three_cpus::<ValidFlag<true>>();
}
fn ours_unrelated_open() {
    unrelated_open::<Ours>();
}
fn kernel_aba() {
    aba::<Kernel>();
}
fn kernel_registered_late() {
    registered_late::<Kernel>();
}
fn rfc_corrected_aba() {
    aba::<Rfc<true, true>>();
}
fn count_with_own_token() {
    unrelated_open::<CountPerRange<true>>();
}
fn bracketed() {
    unbracketed::<true>();
}
fn refused_and_undone() {
    refused::<true>();
}
fn remover_compares_under_the_lock() {
    remover::<true>();
}

models! {
    ours_aba reaches ["interrupted: retry"]
    ours_registered_late reaches ["interrupted: retry"]
    ours_three_cpus reaches ["invalidate_end (overlaps)"]
    valid_flag_with_a_counter_three_cpus reaches ["invalidate_end (overlaps)"]
    ours_unrelated_open reaches ["interrupted: retry"]
    kernel_aba reaches ["interrupted: retry"]
    kernel_registered_late reaches ["interrupted: retry"]
    rfc_corrected_aba reaches ["interrupted: retry"]
    count_with_own_token reaches ["interrupted: retry"]
    bracketed reaches ["interrupted: retry"]
    refused_and_undone reaches ["undone"]
    remover_compares_under_the_lock reaches ["deferred"]
}

const STALE: &str = "stale translation";

#[test]
fn a_valid_flag_with_a_counter_is_an_aba() {
    expect_failure("valid flag with a counter", STALE, aba::<ValidFlag<true>>);
}

#[test]
fn a_valid_flag_alone_falls_from_the_ladder_of_three() {
    expect_failure("valid flag", STALE, three_cpus::<ValidFlag<false>>);
}

#[test]
fn the_inverted_overlap_test_sees_no_overlap() {
    expect_failure("RFC, overlap test inverted", STALE, aba::<Rfc<false, true>>);
}

#[test]
fn a_wait_whose_result_is_ignored_says_valid() {
    expect_failure(
        "RFC, result of the wait ignored",
        STALE,
        registered_late::<Rfc<true, false>>,
    );
}

#[test]
fn a_refusal_that_is_not_undone_hangs_the_next_reader() {
    expect_failure(
        "RFC, refused start leaks its count",
        "deadlock",
        refused::<false>,
    );
}

#[test]
fn a_remover_that_compares_without_the_lock_frees_too_early() {
    expect_failure(
        "remover compares without the lock",
        "Causality violation",
        remover::<false>,
    );
}

#[test]
fn a_commit_that_checks_before_it_locks_is_stale() {
    expect_failure(
        "commit checks outside the device lock",
        STALE,
        commit_checks_before_lock,
    );
}

#[test]
fn a_count_per_range_with_the_hubs_seq_is_an_aba_again() {
    expect_failure(
        "count per range, token from the hub",
        STALE,
        unrelated_open::<CountPerRange<false>>,
    );
}

#[test]
fn a_change_without_a_bracket_is_missed() {
    expect_failure("change without a bracket", STALE, unbracketed::<false>);
}

#[test]
fn devices_told_before_the_start_commit_again() {
    expect_failure("devices told before the start", STALE, told_before_start);
}

#[test]
fn a_change_after_the_end_is_missed() {
    expect_failure("change after the end", STALE, changed_after_end);
}
