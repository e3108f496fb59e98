//! The shootdown handshake under loom: every interleaving, and every weak-memory outcome, of the files that ship.
//!
//! `shootdown.rs` and `table.rs` are included as they are; only `sync` is replaced. Each model is run twice over: as it is, where
//! it must hold, and with one rule broken at a time, where loom must find the failing schedule.

#![allow(dead_code, reason = "the models use a part of the files they include")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

#[path = "../src/shootdown.rs"]
mod shootdown;
#[path = "../src/table.rs"]
mod table;

mod sync {
    use std::sync::atomic::{AtomicBool, AtomicU8};

    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};

    // loom knows no asymmetric fences. With `Fences::Full` both halves are full ones, as the membarrier makes them; with
    // `Fences::None` neither is there, and a model looks only at the schedules where the shooter found that it needs none.
    pub(crate) fn light_fence() {
        if FENCES.load(std::sync::atomic::Ordering::Relaxed) == Fences::Full as u8 {
            fence(Ordering::SeqCst);
        }
    }

    pub(crate) fn heavy_fence() {
        HEAVY.store(true, std::sync::atomic::Ordering::Relaxed);
        light_fence();
    }

    /// Whether `heavy_fence` was called since this was asked last.
    pub(crate) fn took_heavy_fence() -> bool {
        HEAVY.swap(false, std::sync::atomic::Ordering::Relaxed)
    }

    static HEAVY: AtomicBool = AtomicBool::new(false);
    static FENCES: AtomicU8 = AtomicU8::new(0);

    #[repr(u8)]
    pub(crate) enum Fences {
        Full,
        None,
    }

    pub(crate) fn set_fences(fences: Fences) {
        FENCES.store(fences as u8, std::sync::atomic::Ordering::Relaxed);
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(u8)]
    pub(crate) enum Rule {
        PublishFirst = 1,
        Withdraws,
        WorkerFence,
        ShooterFence,
        BumpAfterClear,
        CoverAccess,
        ModeFence,
        StampBeforeWalk,
        InstallRelease,
        RightAcquire,
        PlaceFirst,
        PlaceStays,
        CloseRelease,
        AccessRelease,
        LookAcquire,
        ModeRelease,
        ModeAcquire,
        BumpRelease,
        GenerationAcquire,
        Intersects,
        WritersAlone,
        // Of the files that are not included here: broken in the models' own stand-ins. The light fence is a full one only because of
        // the shooter's heavy one, so without either there is none: one rule for both.
        LightFence,
        SeesPause,
    }

    pub(crate) fn ordering(right: Ordering, weakened_by: Rule) -> Ordering {
        if broken(weakened_by) {
            Ordering::Relaxed
        } else {
            right
        }
    }

    static BROKEN: AtomicU8 = AtomicU8::new(0);

    pub(crate) fn broken(rule: Rule) -> bool {
        BROKEN.load(std::sync::atomic::Ordering::Relaxed) == rule as u8
    }

    pub(crate) fn break_rule(rule: Option<Rule>) {
        BROKEN.store(
            rule.map_or(0, |r| r as u8),
            std::sync::atomic::Ordering::Relaxed,
        );
    }
}

use shootdown::{Generation, Rights, STRADDLE, Slot, Users, quiesced};
use sync::{AtomicU64, Fences, Ordering, Rule, break_rule, broken, set_fences, took_heavy_fence};
use table::{Extent, Place, Table, Words};

impl Words for Vec<AtomicU64> {
    fn word(&self, i: usize) -> &AtomicU64 {
        &self[i]
    }
}

/// Pages 0..64 of a region at host page 0: page i of the table is host page i.
struct Machine {
    generation: Generation,
    workers: [Slot; 1],
    table: Table<Vec<AtomicU64>>,
    /// 0 while the page's frame is the device's; the shooter takes it once quiesced. Plain memory: loom fails the model where one side's
    /// access is not ordered before the other's.
    frame: UnsafeCell<usize>,
}

// SAFETY: whether `frame` is shared rightly is what the models are there to find out.
unsafe impl Sync for Machine {}

const PAGE: usize = 5;

/// Whether a span uses this page.
fn on(page: usize) -> impl Fn(std::ops::Range<u64>) -> bool {
    move |pages| pages.contains(&(page as u64))
}

impl Machine {
    fn new() -> Machine {
        let words = || vec![AtomicU64::new(0)];
        let table = Table::new(words(), words(), words());
        table.install(0, 1 << PAGE | 1 << (PAGE + 1), 1 << PAGE, 0);
        Machine {
            generation: Generation::new(),
            workers: [Slot::new()],
            table,
            frame: UnsafeCell::new(0),
        }
    }

    /// A device access: fails the model if the frame was taken.
    fn use_frame(&self) {
        assert_eq!(self.frame(), 0, "an access after the frame was taken");
    }

    fn frame(&self) -> usize {
        // SAFETY: loom stops the model before a race becomes one.
        self.frame.with(|frame| unsafe { *frame })
    }

    fn set_frame(&self, to: usize) {
        // SAFETY: as in `frame`.
        self.frame.with_mut(|frame| unsafe { *frame = to });
    }

    /// Shoots the page down; with `light_only`, gives up where the shooter thinks it needs the heavy fence.
    fn shoot_if(&self, users: Users, light_only: bool) {
        took_heavy_fence();
        self.generation
            .take_away(|| self.table.clear(0, 1 << PAGE, users));
        self.generation.announce(&self.workers);
        if took_heavy_fence() && light_only {
            return;
        }
        while !quiesced(&self.workers, users, on(PAGE)) {
            thread::yield_now();
        }
        self.set_frame(1);
    }

    fn shoot(&self, users: Users) {
        self.shoot_if(users, false);
    }
}

/// S1, S2, S4: a worker opens a span for the page while it is shot down.
fn span_against_shootdown(rights: Rights, users: Users) {
    let m = Arc::new(Machine::new());
    let worker = thread::spawn({
        let m = m.clone();
        move || {
            let pages = PAGE..PAGE + 1;
            let spans = [(PAGE as u64..PAGE as u64 + 1, rights)];
            let slot = &m.workers[0];
            if slot
                .try_open(0, &spans, || m.table.extent(&pages, rights).ok())
                .is_some()
            {
                m.use_frame();
                slot.close(0, 1);
            }
        }
    });
    m.shoot(users);
    worker
        .join()
        .expect("the worker saw no frame that was taken");
}

/// S1: two spans of one item, of which one loses its page: all or nothing, and what was published is withdrawn.
fn item_against_shootdown() {
    let m = Arc::new(Machine::new());
    let worker = thread::spawn({
        let m = m.clone();
        move || {
            let page = PAGE as u64;
            let spans = [
                (page + 1..page + 2, Rights::Read),
                (page..page + 1, Rights::Write),
            ];
            let slot = &m.workers[0];
            let valid = || {
                m.table.extent(&(PAGE + 1..PAGE + 2), Rights::Read).ok()?;
                m.table.extent(&(PAGE..PAGE + 1), Rights::Write).ok()
            };
            if slot.try_open(0, &spans, valid) == Some(Extent::Window) {
                m.use_frame();
                slot.close(0, 2);
            }
            assert!(
                !slot.uses(Users::All, |_| true),
                "nothing is published outside an item"
            );
        }
    });
    m.shoot(Users::All);
    worker
        .join()
        .expect("the worker saw no frame that was taken");
}

/// A worker in element mode makes accesses while it is shot down. `cached` is the generation its cached translation is good for: 1, filled
/// before the shootdown began; 0, none yet.
fn elements_against_shootdown(mut cached: u64, accesses: usize, light_only: bool) {
    let m = Arc::new(Machine::new());
    let worker = thread::spawn({
        let m = m.clone();
        move || {
            let slot = &m.workers[0];
            slot.enter_element_mode();
            for _ in 0..accesses {
                // The look-up and the walk, as in `lane.rs`.
                let check = |generation: u64| {
                    if cached == generation {
                        return Some(());
                    }
                    let walked = m.table.place(PAGE, Rights::Write).map(drop);
                    let stamp = if broken(Rule::StampBeforeWalk) {
                        m.generation.word().load(Ordering::Acquire)
                    } else {
                        generation
                    };
                    cached = if walked.is_some() { stamp } else { 0 };
                    walked
                };
                slot.access(
                    light_fence,
                    m.generation.word(),
                    PAGE as u64,
                    Rights::Write,
                    check,
                    |()| m.use_frame(),
                );
            }
            slot.leave_element_mode();
        }
    });
    m.shoot_if(Users::All, light_only);
    worker
        .join()
        .expect("the worker saw no frame that was taken");
}

fn light_fence() {
    if !broken(Rule::LightFence) {
        sync::light_fence();
    }
}

/// S1, S2, S4: a cached translation is used while the page is shot down.
fn hits_against_shootdown() {
    elements_against_shootdown(1, 2, false);
}

/// S2, S5: a translation that was never cached is walked to and cached while a shootdown runs; the next hit must not use it.
fn fill_against_shootdown() {
    elements_against_shootdown(0, 2, false);
}

/// S2: a shooter that finds no worker in element mode takes no heavy fence.
fn mode_against_shootdown() {
    elements_against_shootdown(1, 1, true);
}

/// S3: a reader's open span never holds up a shooter that lets readers stay, nor a shooter of other pages.
fn unrelated_spans_do_not_wait() {
    let m = Arc::new(Machine::new());
    let slot = &m.workers[0];
    let spans = [(PAGE as u64..PAGE as u64 + 1, Rights::Read)];
    slot.try_open(STRADDLE, &spans, || Some(()))
        .expect("the check passes");
    let shooter = thread::spawn({
        let m = m.clone();
        move || {
            m.shoot(Users::Writers);
            m.generation
                .take_away(|| m.table.clear(0, 2 << PAGE, Users::All));
            m.generation.announce(&m.workers);
            assert!(quiesced(&m.workers, Users::All, on(PAGE + 1)));
            assert!(!quiesced(&m.workers, Users::All, on(PAGE)));
        }
    });
    shooter
        .join()
        .expect("the shooter returned while the span was open");
    slot.close(STRADDLE, 1);
}

/// S6: the device is paused while `work` is done by a worker; what the pauser changes meanwhile, and changes back, no access meets.
fn pause_against(work: impl FnOnce(&Machine) + Send + 'static) {
    let m = Arc::new(Machine::new());
    let worker = thread::spawn({
        let m = m.clone();
        move || work(&m)
    });
    m.generation.toggle_pause();
    m.generation.announce(&m.workers);
    while !quiesced(&m.workers, Users::All, |_| true) {
        thread::yield_now();
    }
    m.set_frame(1);
    m.set_frame(0);
    m.generation.toggle_pause();
    worker.join().expect("no access while it was paused");
}

fn sees_pause(generation: u64) -> bool {
    Generation::is_paused(generation) && !broken(Rule::SeesPause)
}

/// S6: the opening of a span looks for a pause, as in `span.rs`.
fn span_against_pause() {
    pause_against(|m| {
        let pages = PAGE..PAGE + 1;
        let spans = [(PAGE as u64..PAGE as u64 + 1, Rights::Write)];
        let slot = &m.workers[0];
        let valid = || {
            if sees_pause(m.generation.word().load(Ordering::Acquire)) {
                return None;
            }
            m.table.extent(&pages, Rights::Write).ok()
        };
        if slot.try_open(0, &spans, valid).is_some() {
            m.use_frame();
            slot.close(0, 1);
        }
    });
}

/// S6: a hit needs no look for it, and a walk has one, as in `lane.rs`.
fn elements_against_pause() {
    pause_against(|m| {
        let slot = &m.workers[0];
        let mut cached = 2;
        slot.enter_element_mode();
        for _ in 0..2 {
            let check = |generation: u64| {
                if cached == generation {
                    return Some(());
                }
                if sees_pause(generation) {
                    return None;
                }
                let walked = m.table.place(PAGE, Rights::Write).map(drop);
                cached = if walked.is_some() { generation } else { 0 };
                walked
            };
            let word = m.generation.word();
            let page = PAGE as u64;
            slot.access(light_fence, word, page, Rights::Write, check, |()| {
                m.use_frame();
            });
        }
        slot.leave_element_mode();
    });
}

const NEW_PAGE: usize = 9;

/// T2: a translation is established while a worker looks. With the right it sees the page's place, and what was put there.
fn install_against_span() {
    let m = Arc::new(Machine::new());
    let worker = thread::spawn({
        let m = m.clone();
        move || {
            let spans = [(NEW_PAGE as u64..NEW_PAGE as u64 + 1, Rights::Read)];
            let slot = &m.workers[0];
            let place = slot.try_open(0, &spans, || m.table.place(NEW_PAGE, Rights::Read));
            if let Some(place) = place {
                assert_eq!(place, Place::Host, "a right with the wrong place");
                assert_eq!(m.frame(), 2, "a right without contents");
                slot.close(0, 1);
            }
        }
    });
    m.set_frame(2);
    m.table.install(0, 1 << NEW_PAGE, 0, 1 << NEW_PAGE);
    worker.join().expect("the worker saw all or nothing");
}

/// T2: a translation in place is taken away while a worker looks. It sees the right with its place, or none.
fn clear_against_span() {
    let m = Arc::new(Machine::new());
    m.table.install(0, 1 << NEW_PAGE, 0, 1 << NEW_PAGE);
    let worker = thread::spawn({
        let m = m.clone();
        move || {
            let spans = [(NEW_PAGE as u64..NEW_PAGE as u64 + 1, Rights::Read)];
            let slot = &m.workers[0];
            let place = slot.try_open(0, &spans, || m.table.place(NEW_PAGE, Rights::Read));
            if let Some(place) = place {
                assert_eq!(place, Place::Host, "a right with the wrong place");
                slot.close(0, 1);
            }
        }
    });
    m.generation
        .take_away(|| m.table.clear(0, 1 << NEW_PAGE, Users::All));
    m.generation.announce(&m.workers);
    worker.join().expect("the worker saw all or nothing");
}

/// The rule broken is one for the process: models take turns.
static TURN: Mutex<()> = Mutex::new(());

/// Runs every schedule of `model`, with `rule` broken or none, and says whether one failed.
fn some_schedule_fails(
    rule: Option<Rule>,
    fences: Fences,
    model: impl Fn() + Sync + Send + 'static,
) -> bool {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    break_rule(rule);
    set_fences(fences);
    let found = catch_unwind(AssertUnwindSafe(|| loom::model(model)));
    break_rule(None);
    set_fences(Fences::Full);
    found.is_err()
}

#[track_caller]
fn holds(model: impl Fn() + Sync + Send + 'static) {
    assert!(
        !some_schedule_fails(None, Fences::Full, model),
        "a schedule fails, see above"
    );
}

#[track_caller]
fn fails_without(rule: Rule, model: impl Fn() + Sync + Send + 'static) {
    let found = some_schedule_fails(Some(rule), Fences::Full, model);
    assert!(
        found,
        "no schedule fails without {rule:?}: the model is too weak, or the rule is not needed"
    );
}

#[test]
fn a_span_is_never_used_after_its_frame_was_taken() {
    holds(|| span_against_shootdown(Rights::Write, Users::All));
    holds(|| span_against_shootdown(Rights::Read, Users::All));
    holds(|| span_against_shootdown(Rights::Write, Users::Writers));
}

#[test]
fn an_item_opens_all_its_spans_or_none() {
    holds(item_against_shootdown);
}

#[test]
fn an_element_access_is_never_made_after_its_frame_was_taken() {
    holds(hits_against_shootdown);
}

#[test]
fn a_translation_filled_during_a_shootdown_is_not_kept() {
    holds(fill_against_shootdown);
}

#[test]
fn a_shooter_waits_only_for_what_intersects() {
    holds(unrelated_spans_do_not_wait);
}

#[test]
fn s1_publish_before_the_check() {
    fails_without(Rule::PublishFirst, || {
        span_against_shootdown(Rights::Write, Users::All);
    });
}

#[test]
fn s1_nothing_is_published_while_a_worker_waits() {
    fails_without(Rule::Withdraws, item_against_shootdown);
}

#[test]
fn s1_fence_before_the_check() {
    fails_without(Rule::WorkerFence, || {
        span_against_shootdown(Rights::Write, Users::All);
    });
}

#[test]
fn s2_fence_before_the_look() {
    fails_without(Rule::ShooterFence, || {
        span_against_shootdown(Rights::Write, Users::All);
    });
    fails_without(Rule::ShooterFence, hits_against_shootdown);
}

#[test]
fn s2_bump_after_the_clear() {
    fails_without(Rule::BumpAfterClear, fill_against_shootdown);
}

#[test]
fn s2_a_shooter_skips_the_heavy_fence_only_when_it_may() {
    assert!(!some_schedule_fails(
        None,
        Fences::None,
        mode_against_shootdown
    ));
    assert!(some_schedule_fails(
        Some(Rule::ModeFence),
        Fences::None,
        mode_against_shootdown
    ));
}

#[test]
fn s4_the_epoch_covers_the_access() {
    fails_without(Rule::CoverAccess, hits_against_shootdown);
}

#[test]
fn s5_stamp_before_the_walk() {
    fails_without(Rule::StampBeforeWalk, fill_against_shootdown);
}

#[test]
fn no_access_is_made_while_the_device_is_paused() {
    holds(span_against_pause);
    holds(elements_against_pause);
}

#[test]
fn a_right_comes_with_its_place_and_contents() {
    holds(install_against_span);
    holds(clear_against_span);
}

#[test]
fn s2_heavy_and_light_fence_for_element_accesses() {
    fails_without(Rule::LightFence, hits_against_shootdown);
}

#[test]
fn s2_the_generation_is_ordered_after_the_bits() {
    fails_without(Rule::BumpRelease, fill_against_shootdown);
    fails_without(Rule::GenerationAcquire, fill_against_shootdown);
}

#[test]
fn s2_element_mode_is_left_after_its_accesses() {
    for rule in [Rule::ModeRelease, Rule::ModeAcquire] {
        let found = some_schedule_fails(Some(rule), Fences::None, mode_against_shootdown);
        assert!(found, "no schedule fails without {rule:?}");
    }
}

#[test]
fn s3_a_shooter_that_waited_for_more_would_wait_for_itself() {
    fails_without(Rule::Intersects, unrelated_spans_do_not_wait);
    fails_without(Rule::WritersAlone, unrelated_spans_do_not_wait);
}

#[test]
fn s4_the_end_of_an_access_is_ordered_before_what_follows() {
    fails_without(Rule::CloseRelease, || {
        span_against_shootdown(Rights::Write, Users::All);
    });
    fails_without(Rule::AccessRelease, hits_against_shootdown);
    fails_without(Rule::LookAcquire, || {
        span_against_shootdown(Rights::Write, Users::All);
    });
    fails_without(Rule::LookAcquire, hits_against_shootdown);
}

#[test]
fn s6_a_pause_is_looked_for() {
    fails_without(Rule::SeesPause, span_against_pause);
    fails_without(Rule::SeesPause, elements_against_pause);
}

#[test]
fn t2_a_right_is_set_last_and_read_first() {
    fails_without(Rule::InstallRelease, install_against_span);
    fails_without(Rule::RightAcquire, install_against_span);
    fails_without(Rule::PlaceFirst, install_against_span);
}

#[test]
fn t2_a_place_stays_when_its_right_goes() {
    fails_without(Rule::PlaceStays, clear_against_span);
}
