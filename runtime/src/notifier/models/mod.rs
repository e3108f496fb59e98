//! The protocol under the model checker: the real hub, a device with a lock and a table, and pages.
//!
//! A *page* is a version number that each change replaces by a greater one; a device's table holds the version it has a
//! translation to. The invariant under all models is the reason for the protocol:
//!
//! > when everything is at rest, a device has no translation to a page, or one to what the page is now.
//!
//! Each model says below which of the rules it shows; the last part breaks the code on purpose, one way after another, and expects
//! the checker to say so.

mod rounds;

use super::*;
use crate::sync::checker::{Lane, expect_failure, models, reached};
use crate::sync::mutation::{Mutation, with_mutation};
use crate::sync::shim::atomic::AtomicU32;
use crate::sync::shim::atomic::Ordering::Relaxed;
use crate::sync::{Deadline, Gate, Mutex};
use loom::thread;
use std::sync::Arc;

const PAGES: usize = 2;

/// What the listeners of these models are told.
pub(super) struct Invalidation {
    interval: Interval,
    blocking: Blocking,
}

/// A device: what `Listener` and a driver's commit share.
pub(super) struct Device {
    /// The real lock, not loom's: loom sees no lock held by another when it tries one, for it does not switch threads between
    /// a lock and its unlock unless there is something to be seen in between; the real one's unlock is a write to be seen.
    table: Mutex<Table>,
    /// Of the devices in the world: how many have been told, over all invalidations; for I9.
    told: Arc<AtomicU32>,
    nr_devices: u32,
}

#[derive(Default)]
struct Table {
    /// Per page, the version there is a translation to.
    translations: [Option<u32>; PAGES],
    /// Invalidations taken part in that have neither quiesced nor been called off; for I7.
    taking_part: i32,
}

impl Listener<Invalidation> for Device {
    fn invalidate(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        let mut table = match invalidation.blocking {
            Blocking::Yes => self.table.lock(),
            Blocking::No => self.table.try_lock().ok_or(WouldBlock)?,
        };
        for (page, translation) in (0..).zip(&mut table.translations) {
            if invalidation.interval.overlaps(page_at(page)) {
                *translation = None;
            }
        }
        table.taking_part += 1;
        drop(table);
        self.told.fetch_add(1, Relaxed);
        Ok(())
    }

    fn quiesced(&self, _: &Invalidation) -> bool {
        assert_eq!(
            self.told.load(Relaxed) % self.nr_devices,
            0,
            "asked before all were told"
        );
        self.table.lock().taking_part -= 1;
        true
    }

    fn cancel(&self, _: &Invalidation) {
        self.table.lock().taking_part -= 1;
    }
}

pub(super) struct World {
    hub: Hub,
    pages: [AtomicU32; PAGES],
    devices: Vec<Device>,
}

fn page_at(page: u64) -> Interval {
    Interval::new(page, page + 1)
}

impl World {
    fn new(nr_devices: u32) -> Arc<Self> {
        let told = Arc::new(AtomicU32::new(0));
        let device = || Device {
            table: Mutex::new(Table::default()),
            told: Arc::clone(&told),
            nr_devices,
        };
        Arc::new(Self {
            hub: Hub::new(),
            pages: core::array::from_fn(|_| AtomicU32::new(0)),
            devices: core::iter::repeat_with(device)
                .take(nr_devices as usize)
                .collect(),
        })
    }

    fn listeners(&self) -> impl Iterator<Item = &dyn Listener<Invalidation>> + Clone {
        self.devices
            .iter()
            .map(|device| -> &dyn Listener<Invalidation> { device })
    }

    /// A device fault: the loop of the seed. Returns the version committed.
    fn fault(
        &self,
        lane: Lane,
        device: usize,
        range: &Subscription<&Hub>,
        page: usize,
    ) -> Result<u32, BeginError> {
        loop {
            let token = range.begin(Deadline::NEVER)?;
            lane.did("begin");
            let version = self.snapshot(lane, page);
            if self.commit(lane, device, range, page, token, version) {
                return Ok(version);
            }
        }
    }

    fn snapshot(&self, lane: Lane, page: usize) -> u32 {
        let version = self.pages[page].load(Relaxed);
        lane.did_with("snapshot: version", version);
        version
    }

    /// Device lock, check, establish. `false`: interrupted.
    fn commit(
        &self,
        lane: Lane,
        device: usize,
        range: &Subscription<&Hub>,
        page: usize,
        token: Token,
        version: u32,
    ) -> bool {
        let mut table = self.devices[device].table.lock();
        if range.interrupted(token) {
            lane.did("interrupted: retry");
            return false;
        }
        table.translations[page] = Some(version);
        lane.did_with("establish translation to", version);
        true
    }

    /// From start to end on one thread. The pages in the interval get a new version.
    fn invalidate(&self, lane: Lane, interval: Interval, except: Option<RangeKey>) {
        let bracket = self.hub.start(interval, except).expect("a free slot");
        lane.did("start: overlapping ranges += 2");
        self.tell(lane, interval, Blocking::Yes).expect("may block");
        self.change(lane, interval);
        drop(bracket);
        lane.did("end");
    }

    /// Both passes.
    fn tell(&self, lane: Lane, interval: Interval, blocking: Blocking) -> Result<(), WouldBlock> {
        let invalidation = Invalidation { interval, blocking };
        invalidate_all(self.listeners(), &invalidation)?;
        lane.did("callback: wipe translations");
        assert!(all_quiesced(self.listeners(), &invalidation));
        Ok(())
    }

    fn change(&self, lane: Lane, interval: Interval) {
        for (at, page) in (0..).zip(&self.pages) {
            if interval.overlaps(page_at(at)) {
                // Changes of one page come one after another: the block's lock in the runtime, a read-modify-write here.
                let version = page.fetch_add(1, Relaxed) + 1;
                lane.did_with("page changes to version", version);
            }
        }
    }

    /// The invariant, once everything is at rest.
    fn check_at_rest(&self) {
        for device in &self.devices {
            let table = device.table.lock();
            assert_eq!(
                table.taking_part, 0,
                "a device still takes part in an invalidation that is over"
            );
            for (translation, page) in table.translations.iter().zip(&self.pages) {
                let version = page.load(Relaxed);
                assert!(
                    translation.is_none_or(|of| of == version),
                    "stale translation: to {translation:?}, page is {version}"
                );
            }
        }
        assert_eq!(self.hub.nr_open(), 0);
        let counters = self.hub.counters();
        for (what, nr) in [
            ("a wait", counters.waits),
            ("a wake", counters.wakes),
            ("full", counters.full),
        ] {
            if nr > 0 {
                reached(what);
            }
        }
    }
}

type Thread = thread::JoinHandle<()>;

/// A thread that faults page `page` on `device`.
fn faulter(world: &Arc<World>, lane: usize, device: usize, page: u64) -> Thread {
    let world = Arc::clone(world);
    thread::spawn(move || {
        let range = world.hub.insert(page_at(page));
        world
            .fault(Lane(lane), device, &range, page as usize)
            .expect("no deadline, no teardown");
    })
}

/// A thread that invalidates `interval`.
fn invalidator(world: &Arc<World>, lane: usize, interval: Interval) -> Thread {
    let world = Arc::clone(world);
    thread::spawn(move || world.invalidate(Lane(lane), interval, None))
}

fn join(world: &World, threads: impl IntoIterator<Item = Thread>) {
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    world.check_at_rest();
}

/// I2, I3, I5: a fault, range registration included, against one overlapping invalidation.
fn fault_vs_one() {
    let world = World::new(1);
    let fault = faulter(&world, 0, 0, 0);
    world.invalidate(Lane(1), page_at(0), None);
    join(&world, [fault]);
}

/// I2, I3: the fault's range is there from the start.
fn fault_vs_one_registered() {
    let world = World::new(1);
    let range = world.hub.insert(page_at(0));
    let invalidation = invalidator(&world, 1, page_at(0));
    let committed = world.fault(Lane(0), 0, &range, 0);
    assert!(committed.is_ok());
    join(&world, [invalidation]);
}

/// I2, I3: two overlapping invalidations on two threads.
fn fault_vs_two() {
    let world = World::new(1);
    let range = world.hub.insert(page_at(0));
    let invalidations = [
        invalidator(&world, 1, page_at(0)),
        invalidator(&world, 2, Interval::ALL),
    ];
    assert!(world.fault(Lane(0), 0, &range, 0).is_ok());
    join(&world, invalidations);
}

/// The seed's three-CPU ladder: an overlapping invalidation, and a disjoint one that starts and ends beside it.
fn three_cpu_ladder() {
    let world = World::new(1);
    let range = world.hub.insert(page_at(0));
    let invalidations = [
        invalidator(&world, 1, page_at(0)),
        invalidator(&world, 2, page_at(1)),
    ];
    assert!(world.fault(Lane(0), 0, &range, 0).is_ok());
    join(&world, invalidations);
    assert_eq!(
        world.hub.counters().bumps,
        1,
        "only the overlapping one interrupts"
    );
}

/// Liveness, "it waits for nothing else": no wait and no retry for disjoint invalidations, at any moment.
fn disjoint_costs_nothing() {
    let world = World::new(1);
    let range = world.hub.insert(page_at(0));
    let churn = [
        invalidator(&world, 1, page_at(1)),
        invalidator(&world, 2, page_at(1)),
    ];
    let token = range
        .begin(Deadline::PASSED)
        .expect("no wait for what does not overlap");
    let version = world.snapshot(Lane(0), 0);
    assert!(
        world.commit(Lane(0), 0, &range, 0, token, version),
        "interrupted by what does not overlap"
    );
    let counters = world.hub.counters();
    let costs = (counters.waits, counters.bumps, counters.wakes);
    assert_eq!(costs, (0, 0, 0), "pays for what does not overlap");
    join(&world, churn);
}

/// I3, rule 4: nested, a thread starts a second overlapping invalidation within the first; the end of one is not the other's, and what
/// changes after the inner end is inside the outer bracket still.
fn nested() {
    let world = World::new(1);
    let fault = faulter(&world, 0, 0, 0);
    let lane = Lane(1);
    let outer = world.hub.start(Interval::ALL, None).expect("a free slot");
    lane.did("start outer");
    world
        .tell(lane, Interval::ALL, Blocking::Yes)
        .expect("may block");
    world.invalidate(lane, page_at(0), None);
    world.change(lane, page_at(0));
    drop(outer);
    lane.did("end outer");
    join(&world, [fault]);
}

/// A bracket is started on one thread and ended on another; the device stays empty all the while (I3, strong form).
fn ended_elsewhere() {
    let world = World::new(1);
    let fault = faulter(&world, 0, 0, 0);
    let lane = Lane(1);
    let bracket = Bracket::start(HubOf(Arc::clone(&world)), page_at(0), None).expect("a free slot");
    lane.did("start");
    world
        .tell(lane, page_at(0), Blocking::Yes)
        .expect("may block");
    let ender = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            world.change(Lane(2), page_at(0));
            let translation = world.devices[0].table.lock().translations[0];
            assert_eq!(
                translation, None,
                "stale translation: established inside the bracket"
            );
            drop(bracket);
            Lane(2).did("end");
        })
    };
    join(&world, [fault, ender]);
}

/// A handle that keeps the world, and so the hub, alive.
struct HubOf(Arc<World>);

impl core::ops::Deref for HubOf {
    type Target = Hub;

    fn deref(&self) -> &Hub {
        &self.0.hub
    }
}

/// hazards P3: a disjoint invalidation is open throughout while two overlapping ones start and end. With a count per range and the
/// hub's seq as token, the second hands out the first's token.
fn token_is_not_reused() {
    let world = World::new(1);
    let range = world.hub.insert(page_at(0));
    let open = world.hub.start(page_at(1), None).expect("a free slot");
    let churn = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            world.invalidate(Lane(1), page_at(0), None);
            world.invalidate(Lane(1), page_at(0), None);
        })
    };
    assert!(world.fault(Lane(0), 0, &range, 0).is_ok());
    drop(open);
    join(&world, [churn]);
}

/// I4, I6: ranges come and go while an invalidation walks the tree; each commits what is current.
fn insert_and_remove() {
    let world = World::new(1);
    let bystander = world.hub.insert(Interval::ALL);
    let fault = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            for _ in 0..2 {
                let range = world.hub.insert(page_at(0));
                assert!(world.fault(Lane(0), 0, &range, 0).is_ok());
            }
        })
    };
    let invalidation = invalidator(&world, 1, page_at(0));
    drop(bystander);
    join(&world, [fault, invalidation]);
}

/// I4: the storage grows under a running invalidation and a running fault, by two threads at once. Nothing moves, and every range that
/// was handed out is there for the walk, the commit and its own begin.
fn growing() {
    let world = World::new(1);
    let fault = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let ranges = [
                world.hub.insert(page_at(1)),
                world.hub.insert(page_at(1)),
                world.hub.insert(page_at(0)),
            ];
            let committed = world.fault(Lane(0), 0, &ranges[2], 0);
            assert!(committed.is_ok(), "a range has no place");
        })
    };
    let invalidation = invalidator(&world, 1, page_at(0));
    let range = world.hub.insert(page_at(0));
    let committed = world.fault(Lane(2), 0, &range, 0);
    assert!(committed.is_ok(), "a range has no place");
    join(&world, [fault, invalidation]);
}

/// I5, and a token is for one interval: a range is moved under an open invalidation of where it goes, and of where it was.
fn moving() {
    let world = World::new(1);
    let mut range = world.hub.insert(page_at(1));
    let invalidation = invalidator(&world, 1, page_at(0));
    let old = range.begin(Deadline::PASSED).expect("disjoint");
    range.move_to(page_at(0));
    assert!(range.interrupted(old), "a token is for one interval");
    assert!(world.fault(Lane(0), 0, &range, 0).is_ok());
    assert!(
        range.begin_at(page_at(1), Deadline::PASSED).is_ok(),
        "disjoint again"
    );
    join(&world, [invalidation]);
}

/// A former range's token is never good for its heir in the slot.
fn slots_are_reused() {
    let world = World::new(1);
    let range = world.hub.insert(page_at(0));
    let invalidation = invalidator(&world, 1, page_at(0));
    if let Ok(token) = range.begin(Deadline::PASSED) {
        drop(range);
        let heir = world.hub.insert(page_at(0));
        assert!(heir.interrupted(token), "a former range's token is good");
        let version = world.snapshot(Lane(0), 0);
        assert!(!world.commit(Lane(0), 0, &heir, 0, token, version));
    }
    join(&world, [invalidation]);
}

/// I7: an invalidation that may not block meets the device's lock held; it undoes itself and leaves no trace, or takes place.
fn refusal() {
    let world = World::new(2);
    let fault = faulter(&world, 0, 1, 0);
    let lane = Lane(1);
    let bracket = world.hub.start(page_at(0), None).expect("a free slot");
    lane.did("start");
    if world.tell(lane, page_at(0), Blocking::No).is_ok() {
        world.change(lane, page_at(0));
    } else {
        lane.did("refused: nothing changes");
        // What was told and called off is told again: for I9's count.
        let told = world.devices[0].told.load(Relaxed);
        world.devices[0].told.fetch_add(told % 2, Relaxed);
    }
    drop(bracket);
    lane.did("end");
    join(&world, [fault]);
}

/// I9, and each device's lock orders its own commits alone: two devices fault, one invalidation tells both.
fn two_devices() {
    let world = World::new(2);
    let faults = [faulter(&world, 0, 0, 0), faulter(&world, 1, 1, 0)];
    world.invalidate(Lane(2), page_at(0), None);
    join(&world, faults);
}

/// I8, hazards P2: a worker that holds the block's round migrates the page, telling the other device, without interrupting itself;
/// what both have in the end is current.
fn owner_filter() {
    let world = World::new(2);
    let round = Arc::new(Mutex::new(()));
    let mover = {
        let (world, round) = (Arc::clone(&world), Arc::clone(&round));
        thread::spawn(move || {
            let range = world.hub.insert(page_at(0));
            loop {
                let Ok(token) = range.begin(Deadline::NEVER) else {
                    unreachable!("no teardown")
                };
                Lane(0).did("begin (owner)");
                // The migration is part of this update: its own invalidation does not interrupt it.
                let held = round.lock();
                world.invalidate(Lane(0), page_at(0), Some(range.key()));
                let version = world.snapshot(Lane(0), 0);
                let committed = world.commit(Lane(0), 0, &range, 0, token, version);
                drop(held);
                if committed {
                    break;
                }
            }
        })
    };
    let range = world.hub.insert(page_at(0));
    loop {
        let Ok(token) = range.begin(Deadline::NEVER) else {
            unreachable!("no teardown")
        };
        Lane(1).did("begin");
        let held = round.lock();
        let version = world.snapshot(Lane(1), 0);
        drop(held);
        if world.commit(Lane(1), 1, &range, 0, token, version) {
            break;
        }
    }
    join(&world, [mover]);
}

/// No wake-up is lost: two waiters on two ranges, two invalidations that end in any order.
fn waiters_wake() {
    let world = World::new(1);
    let open = [page_at(0), Interval::ALL].map(|interval| {
        Bracket::start(HubOf(Arc::clone(&world)), interval, None).expect("a free slot")
    });
    let mut threads: Vec<_> = open
        .into_iter()
        .map(|bracket| thread::spawn(move || drop(bracket)))
        .collect();
    let waiter = Arc::clone(&world);
    threads.push(thread::spawn(move || {
        let range = waiter.hub.insert(page_at(1));
        assert!(range.begin(Deadline::NEVER).is_ok());
    }));
    let range = world.hub.insert(page_at(0));
    assert!(range.begin(Deadline::NEVER).is_ok());
    join(&world, threads);
}

/// No wake-up is lost: two threads wait on one range, and its one event is for both.
fn two_wait_on_one_range() {
    let world = World::new(1);
    let range = Arc::new(Subscription::insert(HubOf(Arc::clone(&world)), page_at(0)));
    let bracket = Bracket::start(HubOf(Arc::clone(&world)), page_at(0), None).expect("a free slot");
    let waiter = Arc::clone(&range);
    let threads = [
        thread::spawn(move || drop(bracket)),
        thread::spawn(move || assert!(waiter.begin(Deadline::NEVER).is_ok())),
    ];
    assert!(range.begin(Deadline::NEVER).is_ok());
    join(&world, threads);
}

/// Rule 7: the region goes while a fault is under way and another waits. Whatever had been committed is wiped, nothing
/// is committed afterwards, and nobody is left asleep; no bracket is needed.
fn teardown_vs_fault() {
    let world = World::new(1);
    let fault = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let range = world.hub.insert(page_at(0));
            if world.fault(Lane(0), 0, &range, 0) == Err(BeginError::Released) {
                Lane(0).did("released");
            }
        })
    };
    let lane = Lane(1);
    world.hub.release();
    lane.did("release: all ranges += 2, no more begin");
    world
        .tell(lane, Interval::ALL, Blocking::Yes)
        .expect("may block");
    world.change(lane, Interval::ALL);
    join(&world, [fault]);
    assert_eq!(
        world.devices[0].table.lock().translations,
        [None; PAGES],
        "stale translation: to memory that is gone"
    );
}

/// Rule 7: release wakes whoever waits, even for an invalidation that never ends.
fn teardown_wakes() {
    let world = World::new(1);
    let never_ends = world.hub.start(page_at(0), None);
    let waiter = {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let range = world.hub.insert(page_at(0));
            assert_eq!(range.begin(Deadline::NEVER), Err(BeginError::Released));
        })
    };
    world.hub.release();
    waiter.join().unwrap();
    drop(never_ends);
    world.check_at_rest();
}

/// Rule 1: all slots in use is an outcome, which changes nothing. The starter lets go, yields and comes again; nobody is stuck and nothing is stale.
fn slots_run_out() {
    let world = World::new(1);
    let open: Vec<_> = core::iter::repeat_with(|| {
        Bracket::start(HubOf(Arc::clone(&world)), page_at(1), None).expect("free")
    })
    .take(active::SLOTS - 1)
    .collect();
    let starter = |lane: usize| {
        let world = Arc::clone(&world);
        thread::spawn(move || {
            let bracket = loop {
                match world.hub.start(page_at(0), None) {
                    Ok(bracket) => break bracket,
                    Err(Full) => thread::yield_now(),
                }
            };
            world
                .tell(Lane(lane), page_at(0), Blocking::Yes)
                .expect("may block");
            world.change(Lane(lane), page_at(0));
            drop(bracket);
        })
    };
    let starters = [starter(1), starter(2)];
    let range = world.hub.insert(page_at(0));
    assert!(world.fault(Lane(0), 0, &range, 0).is_ok());
    drop(open);
    join(&world, starters);
}

/// Rule 5: a deadline that has passed gives a token or a time-out, and no trace of the waiter.
fn deadline_passed() {
    let world = World::new(1);
    let range = world.hub.insert(page_at(0));
    let invalidation = invalidator(&world, 1, page_at(0));
    match range.begin(Deadline::PASSED) {
        Ok(token) => {
            let version = world.snapshot(Lane(0), 0);
            world.commit(Lane(0), 0, &range, 0, token, version);
        }
        Err(error) => assert_eq!(error, BeginError::Timeout),
    }
    join(&world, [invalidation]);
    let so_far = world.hub.counters().wakes;
    drop(world.hub.start(page_at(0), None));
    assert_eq!(world.hub.counters().wakes, so_far, "wakes one who has gone");
    assert!(range.begin(Deadline::PASSED).is_ok());
}

/// Rule 8: with no slot for a bracket, whoever has closed the gate interrupts, tells and changes before it opens; the snapshots of
/// this region are taken inside the gate. Then a commit is interrupted, or wiped, or has seen the change.
fn interrupt_behind_a_gate() {
    let shared = Arc::new((World::new(1), Gate::new()));
    let fault = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || {
            let (world, gate) = (&shared.0, &shared.1);
            let range = world.hub.insert(page_at(0));
            loop {
                let token = range.begin(Deadline::NEVER).expect("no teardown");
                Lane(0).did("begin");
                let version = {
                    let _section = gate.enter_in(0);
                    world.snapshot(Lane(0), 0)
                };
                if world.commit(Lane(0), 0, &range, 0, token, version) {
                    return;
                }
            }
        })
    };
    let (world, lane) = (&shared.0, Lane(1));
    {
        let _closed = shared.1.close();
        lane.did("the gate is closed");
        world.hub.interrupt(page_at(0));
        lane.did("interrupt: overlapping ranges += 2");
        world
            .tell(lane, page_at(0), Blocking::Yes)
            .expect("may block");
        world.change(lane, page_at(0));
    }
    lane.did("the gate is open");
    join(world, [fault]);
    assert_eq!(
        world.hub.counters().waits,
        0,
        "nobody waits for what is not open"
    );
}

models! {
    fault_vs_one reaches ["interrupted: retry", "a wait", "a wake"]
    fault_vs_one_registered reaches ["interrupted: retry", "a wait", "a wake"]
    fault_vs_two reaches ["interrupted: retry", "a wait", "a wake"]
    three_cpu_ladder reaches ["interrupted: retry", "a wait"]
    disjoint_costs_nothing reaches ["establish translation to"]
    nested reaches ["a wait"]
    ended_elsewhere reaches ["interrupted: retry", "a wait"]
    token_is_not_reused reaches ["interrupted: retry", "a wait"]
    insert_and_remove reaches ["interrupted: retry", "a wait"]
    growing reaches ["interrupted: retry", "a wait"]
    moving reaches ["interrupted: retry", "a wait"]
    slots_are_reused reaches ["interrupted: retry"]
    refusal reaches ["refused: nothing changes", "callback: wipe translations"]
    two_devices reaches ["interrupted: retry", "a wait"]
    owner_filter reaches ["interrupted: retry", "a wait"]
    waiters_wake reaches ["a wait", "a wake"]
    two_wait_on_one_range reaches ["a wait", "a wake"]
    teardown_vs_fault reaches ["interrupted: retry", "released", "establish translation to"]
    teardown_wakes reaches ["a wait"]
    slots_run_out reaches ["full", "interrupted: retry", "a wait"]
    deadline_passed reaches ["establish translation to", "a wait"]
    interrupt_behind_a_gate reaches ["interrupted: retry", "establish translation to"]
}

const STALE: &str = "stale translation";
const STUCK: &str = "deadlock";

/// Each mutation of the hub and of the two passes, the reason for which the checker rejects it, and the model that does.
pub(crate) const MUTATIONS: &[(Mutation, &str, fn())] = &[
    (
        Mutation::HubStartWithoutBump,
        STALE,
        fault_vs_one_registered,
    ),
    (Mutation::HubStartWithoutSlot, STALE, fault_vs_one),
    (Mutation::HubBumpAtEnd, STALE, fault_vs_one_registered),
    (Mutation::HubExceptsEveryone, STALE, owner_filter),
    (Mutation::HubSkipsEnd, STUCK, fault_vs_one),
    (Mutation::HubEndWithoutWake, STUCK, waiters_wake),
    (Mutation::HubWaiterNotCounted, STUCK, waiters_wake),
    (Mutation::HubEventReadLate, STUCK, waiters_wake),
    (Mutation::HubBeginWithoutWait, STALE, fault_vs_one),
    (Mutation::HubTokenReadLate, STALE, fault_vs_one_registered),
    (
        Mutation::HubMoveWithoutBump,
        "a token is for one interval",
        moving,
    ),
    (Mutation::HubMoveWithoutTree, STALE, moving),
    (
        Mutation::HubRemoveWithoutBump,
        "a former range's token",
        slots_are_reused,
    ),
    (Mutation::HubReleaseWithoutBump, STALE, teardown_vs_fault),
    (Mutation::HubReleaseWithoutWake, STUCK, teardown_wakes),
    (Mutation::RefusalWithoutCancel, "still takes part", refusal),
    (
        Mutation::PassesInterleaved,
        "asked before all were told",
        two_devices,
    ),
    (Mutation::HubBeginWithoutWait, STALE, ended_elsewhere),
    (Mutation::HubStartWithoutBump, STALE, token_is_not_reused),
    (Mutation::HubStartWithoutSlot, STALE, insert_and_remove),
    (
        Mutation::HubStartBumpsAll,
        "what does not overlap",
        disjoint_costs_nothing,
    ),
    (
        Mutation::HubBeginWaitsForAll,
        "no wait for what does not overlap",
        disjoint_costs_nothing,
    ),
    (
        Mutation::HubStartBumpsAll,
        "only the overlapping one",
        three_cpu_ladder,
    ),
    (Mutation::HubEndEndsAll, STALE, nested),
    (Mutation::HubGrowsTwice, "a range has no place", growing),
    (Mutation::HubFullGoesOn, STALE, slots_run_out),
    (
        Mutation::HubTimeoutStaysCounted,
        "wakes one who has gone",
        deadline_passed,
    ),
    (Mutation::HubWakesOne, STUCK, two_wait_on_one_range),
    (
        Mutation::HubInterruptWithoutBump,
        STALE,
        interrupt_behind_a_gate,
    ),
    (Mutation::GateStaysOpen, STALE, interrupt_behind_a_gate),
    (Mutation::HubStartWithoutBump, STALE, fault_vs_two),
];

#[test]
fn mutations_are_caught() {
    for &(mutation, reason, model) in MUTATIONS {
        let name = format!("{mutation:?}");
        with_mutation(mutation, || expect_failure(&name, reason, model));
    }
}
