//! Rounds on one block, as the runtime runs them: the real directory (`block.rs`) under the real lock, and the real hub. Who holds a
//! page is changed under the block's lock, inside a bracket; where a round has to wait for accesses in flight it lets go of the
//! block's lock and keeps the bracket. What stands in here for `round`, `fault` and `movement` is their order of steps, without the
//! system calls; the steps are asked of the same plan and made by the same transitions.
//!
//! The invariants, in every model:
//!
//! * a page never goes away from a device that has a translation to it, nor gets a second holder while a device may write it (D1);
//! * it has a holder, and no copy of it is current and stale at once (D2, D3: `BlockState::is_consistent`);
//! * at rest a device's translations lead to what it holds.
//!
//! One page of the block is in play, which is all that two threads can meet at; the other 511 are with the CPU throughout.

use super::{STALE, page_at};
use crate::block::{Block, BlockState, DeviceId, DeviceSet, OnRead, Plan};
use crate::error::Access;
use crate::mask::PageMask;
use crate::notifier::{Hub, RangeKey, Subscription};
use crate::sync::checker::{Lane, expect_failure, models, reached};
use crate::sync::ideal;
use crate::sync::mutation::{Mutation, mutated, with_mutation};
use crate::sync::{Deadline, Mutex};
use loom::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

const A: DeviceId = DeviceId(0);
const B: DeviceId = DeviceId(1);

fn page() -> PageMask {
    PageMask::page(0)
}

/// What a device may do with the page, by its table or by a round's word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rights {
    read: bool,
    write: bool,
}

struct World {
    hub: Hub,
    block: Block,
    /// Per device, under its lock: its translation to the page.
    tables: [ideal::Mutex<Rights>; 2],
    /// Movements of the page into a device's window. The model's own: no thread waits for it or learns from it.
    nr_fetched: AtomicU32,
}

/// How a driver faults.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    /// `Range::fault_in`: token and commit with the block locked.
    Round,
    /// `Range::start_update`, `Update::fault`, `Update::end_update`: token before the round, commit after it.
    Update,
}

/// What a round does with its bracket while it waits without the block's lock.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WhileWaiting {
    Keep,
    Close,
}

impl World {
    /// The page is with the CPU, or with one device alone, which has a translation to it.
    fn new(holder: Option<DeviceId>) -> Arc<Self> {
        let mut state = BlockState::new();
        if let Some(device) = holder {
            state.moved_out(device, page());
        }
        let table = |device| {
            let has = holder == Some(device);
            ideal::Mutex::new(Rights {
                read: has,
                write: has,
            })
        };
        Arc::new(Self {
            hub: Hub::new(),
            block: Mutex::new(state),
            tables: [table(A), table(B)],
            nr_fetched: AtomicU32::new(0),
        })
    }

    /// First pass over `devices`: `keep_reads`, or nothing.
    fn tell(&self, devices: DeviceSet, keep_reads: bool) {
        for device in devices.iter() {
            let mut table = self.tables[device.index()].lock();
            table.write = false;
            table.read &= keep_reads;
        }
    }

    /// The devices of `devices` have no right to the page that what happens to it now would make a lie of.
    fn assert_told(&self, devices: DeviceSet, keep_reads: bool) {
        for device in devices.iter() {
            let table = *self.tables[device.index()].lock();
            let may_stay = Rights {
                read: keep_reads,
                write: false,
            };
            assert!(
                table.read <= may_stay.read && table.write <= may_stay.write,
                "stale translation: the page changes under device {device:?}, which has {table:?}"
            );
        }
    }

    /// `Round::valid`.
    fn valid(state: &BlockState, device: DeviceId) -> Rights {
        Rights {
            read: state.frames(device).contains(0),
            write: state.exclusive_to(device).contains(0),
        }
    }

    /// `Round::run_with`: `begin` and `commit` with the block locked. `None`: again.
    fn round<T, R>(
        &self,
        lane: Lane,
        device: DeviceId,
        access: Access,
        key: RangeKey,
        begin: impl FnOnce() -> Option<T>,
        commit: impl FnOnce(Rights, T) -> R,
    ) -> Option<R> {
        let mut state = self.block.lock();
        let begun = begin()?;
        if access == Access::Write
            && (state.is_plain_for(device, &page()) || mutated(Mutation::MovesAgain))
        {
            let _bracket = self.hub.start(page_at(0), Some(key)).ok()?;
            self.fetched(lane);
            state.moved_out(device, page());
            return Some(commit(Self::valid(&state, device), begun));
        }
        let plan = state.plan(device, page(), access, OnRead::Duplicate);
        if plan.is_empty() {
            lane.did("finds the page");
            return Some(commit(Self::valid(&state, device), begun));
        }
        let _bracket = self.hub.start(page_at(0), Some(key)).ok()?;
        let holders = state
            .holders(&(plan.revoke | plan.downgrade))
            .without(device);
        if !holders.is_empty() {
            if !mutated(Mutation::RoundTellsNobody) {
                self.tell(holders, plan.revoke.is_empty());
            }
            lane.did("start, tell; unlock and wait");
            drop(state);
            state = self.block.lock();
            let same = state.plan(device, page(), access, OnRead::Duplicate) == plan;
            if !same && !mutated(Mutation::FinishWithoutLook) {
                lane.did("the block has changed: again");
                return None;
            }
        }
        self.execute(lane, &mut state, device, &plan, access);
        assert!(state.is_consistent(), "the directory: {state:?}");
        Some(commit(Self::valid(&state, device), begun))
    }

    /// `Round::execute`, without what moves the bytes.
    fn execute(
        &self,
        lane: Lane,
        state: &mut BlockState,
        device: DeviceId,
        plan: &Plan,
        access: Access,
    ) {
        let others = state.holders(&page()).without(device);
        if plan.duplicate.contains(0) {
            self.fetched(lane);
            state.filled(device, page());
        }
        if plan.from_device.contains(0) {
            self.fetched(lane);
            self.assert_told(others, access == Access::Read);
            if access == Access::Write {
                let Some(from) = others.iter().next() else {
                    panic!("the page has no holder: {state:?}");
                };
                state.emptied(from, page());
                state.filled(device, page());
                state.revoked_all(page(), Some(device));
            } else {
                state.filled(device, page());
            }
        }
        let revoked = plan.revoke & state.frames(device);
        if revoked.contains(0) {
            self.assert_told(others, false);
            state.revoked_all(revoked, Some(device));
        }
        if plan.take.contains(0) {
            self.fetched(lane);
            self.assert_told(others, false);
            let is_there = !state.away().contains(0);
            assert!(is_there, "moved from where it is not: {state:?}");
            state.revoked_all(page(), Some(device));
            state.moved_out(device, page());
        }
        if plan.drop_host.contains(0) {
            state.host_dropped(page());
        }
    }

    fn fetched(&self, lane: Lane) {
        self.nr_fetched.fetch_add(1, Relaxed);
        lane.did("the page comes to the device");
    }

    /// A device's fault.
    fn device_fault(
        &self,
        lane: Lane,
        device: DeviceId,
        range: &Subscription<&Hub>,
        access: Access,
        style: Style,
    ) {
        loop {
            let establish = |valid: Rights, token| {
                let mut table = self.tables[device.index()].lock();
                if range.interrupted(token) {
                    lane.did("interrupted: again");
                    return false;
                }
                table.read |= valid.read;
                table.write |= valid.write;
                lane.did("establish");
                true
            };
            let done = match style {
                Style::Round => {
                    let begin = || range.begin(Deadline::PASSED).ok();
                    let round = self.round(lane, device, access, range.key(), begin, establish);
                    if round.is_none() {
                        // What is in the way is waited for with nothing held.
                        let _ = range.begin(Deadline::NEVER).expect("no teardown");
                    }
                    round == Some(true)
                }
                Style::Update => {
                    let token = range.begin(Deadline::NEVER).expect("no teardown");
                    let begin = || Some(());
                    let valid =
                        self.round(lane, device, access, range.key(), begin, |valid, ()| valid);
                    valid.is_some_and(|valid| establish(valid, token))
                }
            };
            if done {
                return;
            }
        }
    }

    /// A CPU's fault: `fault::begin`, `fault::act`.
    fn cpu_fault(&self, lane: Lane, access: Access, waiting: WhileWaiting) {
        loop {
            let mut state = self.block.lock();
            let what = classify(&state, access);
            if what == Class::Nothing {
                reached("nothing to do for the CPU");
                return;
            }
            let mut bracket = Some(self.hub.start(page_at(0), None).expect("a free slot"));
            let holders = state.holders(&page());
            let keep_reads = matches!(what, Class::Share(_));
            self.tell(holders, keep_reads);
            lane.did("start, tell; unlock and wait");
            drop(state);
            if waiting == WhileWaiting::Close {
                bracket = None;
                lane.did("end, too early");
            }
            state = self.block.lock();
            if classify(&state, access) != what && !mutated(Mutation::FinishWithoutLook) {
                lane.did("the block has changed: again");
                continue;
            }
            self.assert_told(holders, keep_reads);
            match what {
                Class::Nothing => {}
                Class::MoveHome(device) => {
                    let is_there = state.frames(device).contains(0);
                    assert!(is_there, "moved from where it is not: {state:?}");
                    state.moved_home(device, page());
                    if !mutated(Mutation::HomeLeavesCopies) {
                        state.revoked_all(page(), None);
                    }
                }
                Class::Share(_) => state.copied_home(page()),
                Class::Collapse => state.revoked_all(page(), None),
            }
            lane.did("the page is home");
            assert!(state.is_consistent(), "the directory: {state:?}");
            assert!(
                access == Access::Read || state.holders(&page()).is_empty(),
                "the CPU writes what devices hold as well: {state:?}"
            );
            drop(bracket);
            return;
        }
    }

    fn check_at_rest(&self) {
        let state = self.block.lock();
        for device in [A, B] {
            let (table, valid) = (
                *self.tables[device.index()].lock(),
                Self::valid(&state, device),
            );
            assert!(
                table.read <= valid.read && table.write <= valid.write,
                "stale translation: device {device:?} has {table:?}, and holds {valid:?}"
            );
        }
        assert!(state.is_consistent(), "the directory: {state:?}");
        assert_eq!(self.hub.nr_open(), 0);
    }
}

/// `fault::Class`, of a page that is simply somebody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Nothing,
    MoveHome(DeviceId),
    Share(DeviceId),
    Collapse,
}

fn classify(state: &BlockState, access: Access) -> Class {
    match state.holder_of(0) {
        Some(device) if state.away().contains(0) && access == Access::Write => {
            Class::MoveHome(device)
        }
        Some(device) if state.away().contains(0) => Class::Share(device),
        Some(_) if access == Access::Write => Class::Collapse,
        Some(_) | None => Class::Nothing,
    }
}

fn faulter(
    world: &Arc<World>,
    lane: usize,
    device: DeviceId,
    access: Access,
    style: Style,
) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || {
        let range = world.hub.insert(page_at(0));
        world.device_fault(Lane(lane), device, &range, access, style);
    })
}

fn join(world: &World, devices: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    devices
        .into_iter()
        .for_each(|device| device.join().unwrap());
    world.check_at_rest();
}

fn device_and_cpu(style: Style, waiting: WhileWaiting) {
    let world = World::new(Some(A));
    let device = faulter(&world, 0, A, Access::Write, style);
    world.cpu_fault(Lane(1), Access::Write, waiting);
    join(&world, [device]);
}

/// I3, P2, W3: the device faults on its own page, or on one just taken from it, while the CPU takes it home. The bracket that is kept
/// while nothing else is held keeps the device out.
fn device_vs_cpu() {
    device_and_cpu(Style::Round, WhileWaiting::Keep);
}

/// The same of a driver's own loop, whose token is older than its round.
fn update_vs_cpu() {
    device_and_cpu(Style::Update, WhileWaiting::Keep);
}

fn device_vs_cpu_without_bracket() {
    device_and_cpu(Style::Round, WhileWaiting::Close);
}

/// I8, P2: one device takes the page from another, which has just been served and commits. The bracket of a round excepts its own range,
/// and no other.
fn device_vs_device() {
    let world = World::new(Some(A));
    let other = faulter(&world, 0, B, Access::Write, Style::Round);
    let range = world.hub.insert(page_at(0));
    world.device_fault(Lane(1), A, &range, Access::Write, Style::Update);
    join(&world, [other]);
}

/// Coalescing: two workers of one device fault on a page of the CPU's. One round a block at a time; the second finds the page, which
/// comes once.
fn worker_vs_worker() {
    let world = World::new(None);
    let other = faulter(&world, 0, A, Access::Write, Style::Round);
    let range = world.hub.insert(page_at(0));
    world.device_fault(Lane(1), A, &range, Access::Write, Style::Update);
    join(&world, [other]);
    assert_eq!(world.nr_fetched.load(Relaxed), 1, "the page came again");
    assert!(world.tables[0].lock().write);
}

/// D1: readers on both devices, of a page that the CPU has and then writes. Whoever writes is alone.
fn readers_vs_cpu() {
    let world = World::new(Some(A));
    let reader = faulter(&world, 0, B, Access::Read, Style::Round);
    world.cpu_fault(Lane(1), Access::Write, WhileWaiting::Keep);
    join(&world, [reader]);
}

/// D1: a device writes what it shares with another and the CPU, while that reads.
fn writer_vs_readers() {
    let world = World::new(Some(A));
    let reader = faulter(&world, 0, B, Access::Read, Style::Update);
    world.cpu_fault(Lane(1), Access::Read, WhileWaiting::Keep);
    let range = world.hub.insert(page_at(0));
    world.device_fault(Lane(1), A, &range, Access::Write, Style::Round);
    join(&world, [reader]);
}

/// All of it at once: two devices and the CPU want the page for themselves.
fn everybody() {
    let world = World::new(Some(A));
    let devices = [
        faulter(&world, 0, A, Access::Write, Style::Round),
        faulter(&world, 1, B, Access::Write, Style::Update),
    ];
    world.cpu_fault(Lane(2), Access::Write, WhileWaiting::Keep);
    join(&world, devices);
}

models! {
    device_vs_cpu reaches ["finds the page", "the page is home", "the page comes to the device"]
    update_vs_cpu reaches ["interrupted: again", "the page is home", "the page comes to the device"]
    device_vs_device reaches ["interrupted: again", "finds the page", "the page comes to the device"]
    worker_vs_worker reaches ["interrupted: again", "finds the page"]
    readers_vs_cpu reaches ["the block has changed: again", "the page comes to the device"]
    writer_vs_readers reaches ["interrupted: again", "the block has changed: again"]
    everybody reaches ["interrupted: again", "the block has changed: again"]
}

/// The mutations of rounds, as they are made under Shuttle, and that of the hub which rounds alone would suffer from.
const MUTATIONS: &[(Mutation, &str, fn())] = &[
    (Mutation::HubStartWithoutBump, STALE, update_vs_cpu),
    (Mutation::HubExceptsEveryone, STALE, device_vs_device),
    (Mutation::RoundTellsNobody, STALE, device_vs_device),
    (
        Mutation::MovesAgain,
        "the page came again",
        worker_vs_worker,
    ),
    (
        Mutation::HomeLeavesCopies,
        "the CPU writes what devices hold",
        readers_vs_cpu,
    ),
    (Mutation::RoundTellsNobody, STALE, writer_vs_readers),
    (
        Mutation::FinishWithoutLook,
        "moved from where it is not",
        everybody,
    ),
];

#[test]
fn mutations_of_rounds_are_caught() {
    for &(mutation, reason, model) in MUTATIONS {
        let name = format!("{mutation:?}");
        with_mutation(mutation, || expect_failure(&name, reason, model));
    }
}

#[test]
fn a_bracket_closed_while_waiting_lets_the_device_back_in() {
    expect_failure(
        "bracket closed while the round waits",
        STALE,
        device_vs_cpu_without_bracket,
    );
}
