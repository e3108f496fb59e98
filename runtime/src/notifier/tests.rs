//! What the hub does, step by step, on one thread; and its waits on several. Every interleaving is `models`' business.

use super::*;
use crate::sync::Deadline;
use core::cell::RefCell;
use core::time::Duration;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

const LIMIT: Duration = Duration::from_secs(30);

fn pages(start: u64, end: u64) -> Interval {
    Interval::new(start, end)
}

#[test]
fn an_overlapping_invalidation_interrupts_and_a_disjoint_one_does_not() {
    let hub = Hub::new();
    let range = hub.insert(pages(10, 20));
    let token = range.begin(Deadline::PASSED).expect("idle");
    assert!(!range.interrupted(token));
    for disjoint in [pages(0, 10), pages(20, 30), pages(15, 15), Interval::EMPTY] {
        drop(hub.start(disjoint, None));
        assert!(!range.interrupted(token), "{disjoint:?}");
    }
    for overlapping in [pages(0, 11), pages(19, 20), pages(12, 13), Interval::ALL] {
        let token = range.begin(Deadline::PASSED).expect("idle");
        let bracket = hub.start(overlapping, None).expect("free slots");
        assert!(
            range.interrupted(token),
            "{overlapping:?}, while it is open"
        );
        drop(bracket);
        assert!(
            range.interrupted(token),
            "{overlapping:?}, after it began and ended"
        );
    }
}

/// Rule 8: the first half of an invalidation, and nothing that would have to be ended.
#[test]
fn an_interrupt_spoils_tokens_and_holds_nobody_up() {
    let hub = Hub::new();
    let (near, far) = (hub.insert(pages(10, 20)), hub.insert(pages(30, 40)));
    let open: Vec<_> = core::iter::from_fn(|| hub.start(pages(0, 1), None).ok()).collect();
    let tokens = [&near, &far].map(|range| range.begin(Deadline::PASSED).expect("idle"));
    let before = hub.counters();
    hub.interrupt(pages(19, 30));
    assert!(near.interrupted(tokens[0]) && !far.interrupted(tokens[1]));
    let token = near.begin(Deadline::PASSED).expect("nothing is open here");
    assert!(
        !near.interrupted(token),
        "interrupted by what was before it"
    );
    let after = hub.counters();
    assert_eq!(hub.nr_open() as usize, open.len());
    assert_eq!(
        (after.bumps, after.starts),
        (before.bumps + 1, before.starts)
    );
    // The owner's filter is a bracket's: an interrupt excepts nobody.
    hub.interrupt(Interval::ALL);
    assert!(near.interrupted(token) && far.interrupted(tokens[1]));
}

#[test]
fn no_range_says_yes_to_no_token() {
    let hub = Hub::new();
    let range = hub.insert(pages(0, 1));
    assert!(range.interrupted(Token::NONE));
    let token = range.begin(Deadline::PASSED).expect("idle");
    assert_ne!(token, Token::NONE);
}

#[test]
fn begin_waits_for_overlapping_invalidations_alone() {
    let hub = Hub::new();
    let range = hub.insert(pages(10, 20));
    let far = hub.start(pages(30, 40), None);
    assert!(
        range.begin(Deadline::PASSED).is_ok(),
        "a disjoint invalidation is open"
    );
    let near = hub.start(pages(15, 35), None);
    assert_eq!(range.begin(Deadline::PASSED), Err(BeginError::Timeout));
    let begun = Instant::now();
    assert_eq!(
        range.begin(Deadline::after(Duration::from_millis(20))),
        Err(BeginError::Timeout)
    );
    assert!(begun.elapsed() >= Duration::from_millis(20));
    drop(near);
    assert!(range.begin(Deadline::PASSED).is_ok());
    drop(far);
    let counters = hub.counters();
    assert_eq!(
        (counters.begins, counters.waits, counters.timeouts),
        (4, 2, 2)
    );
}

/// The kernel has to assume the worst of a range inserted during an invalidation; the table of open ones knows (I5).
#[test]
fn a_range_inserted_or_moved_during_an_invalidation_waits_only_if_it_overlaps() {
    let hub = Hub::new();
    let open = hub.start(pages(10, 20), None).expect("free slots");
    let inside = hub.insert(pages(19, 21));
    let beside = hub.insert(pages(20, 21));
    assert_eq!(inside.begin(Deadline::PASSED), Err(BeginError::Timeout));
    assert!(beside.begin(Deadline::PASSED).is_ok());
    let mut moved = hub.insert(pages(0, 5));
    let token = moved.begin(Deadline::PASSED).expect("disjoint");
    moved.move_to(pages(5, 11));
    assert!(moved.interrupted(token), "a token is for one interval");
    assert_eq!(moved.begin(Deadline::PASSED), Err(BeginError::Timeout));
    assert!(moved.begin_at(pages(40, 50), Deadline::PASSED).is_ok());
    assert_eq!(
        moved.begin_at(pages(12, 13), Deadline::PASSED),
        Err(BeginError::Timeout)
    );
    drop(open);
    assert!(moved.begin(Deadline::PASSED).is_ok());
    assert_eq!(moved.interval(), pages(12, 13));
    moved.park();
    let token = moved
        .begin(Deadline::PASSED)
        .expect("nothing overlaps a parked range");
    drop(hub.start(Interval::ALL, None));
    assert!(!moved.interrupted(token));
}

#[test]
fn the_owner_is_excepted_and_nobody_else() {
    let hub = Hub::new();
    let owner = hub.insert(pages(0, 10));
    let other = hub.insert(pages(0, 10));
    let (mine, its) = (owner.begin(Deadline::PASSED), other.begin(Deadline::PASSED));
    let open = hub
        .start(pages(3, 4), Some(owner.key()))
        .expect("free slots");
    assert!(!owner.interrupted(mine.expect("idle")));
    assert!(other.interrupted(its.expect("idle")));
    assert!(owner.begin(Deadline::PASSED).is_ok());
    assert_eq!(other.begin(Deadline::PASSED), Err(BeginError::Timeout));
    drop(open);

    let former = owner.key();
    drop(owner);
    let heir = hub.insert(pages(0, 10));
    assert_ne!(heir.key(), former, "a key names one range for ever");
    let token = heir.begin(Deadline::PASSED).expect("idle");
    let open = hub.start(pages(3, 4), Some(former)).expect("free slots");
    assert!(heir.interrupted(token), "excepted in a former range's name");
    drop(open);

    // The same of the only range, which is not searched for.
    let former = heir.key();
    drop((other, heir));
    let alone = hub.insert(pages(0, 10));
    let token = alone.begin(Deadline::PASSED).expect("idle");
    drop(hub.start(pages(3, 4), Some(alone.key())).expect("free"));
    assert!(!alone.interrupted(token));
    drop(hub.start(pages(3, 4), Some(former)).expect("free slots"));
    assert!(alone.interrupted(token), "excepted in another's name");

    // And where the one that is excepted is not the only one: parked, it is none.
    let mut parked = hub.insert(pages(0, 10));
    parked.park();
    let token = alone.begin(Deadline::PASSED).expect("idle");
    drop(hub.start(pages(3, 4), Some(parked.key())).expect("free"));
    assert!(alone.interrupted(token), "excepted in another's name");
}

#[test]
fn a_former_ranges_token_is_never_good_again() {
    let hub = Hub::new();
    let former = hub.insert(pages(0, 10));
    let token = former.begin(Deadline::PASSED).expect("idle");
    drop(former);
    for _ in 0..100 {
        let heir = hub.insert(pages(0, 10));
        assert!(heir.interrupted(token));
    }
}

#[test]
fn all_slots_in_use_is_an_outcome() {
    let hub = Hub::new();
    let range = hub.insert(pages(0, 1));
    let token = range.begin(Deadline::PASSED).expect("idle");
    let mut open: Vec<_> = (0..active::SLOTS as u64)
        .map(|at| hub.start(pages(at + 1, at + 2), None).expect("free"))
        .collect();
    assert_eq!(hub.start(pages(0, 1), None).map(drop), Err(Full));
    assert!(
        !range.interrupted(token),
        "a start that failed changed nothing"
    );
    assert_eq!(hub.counters().full, 1);
    drop(open.swap_remove(7));
    assert!(hub.start(pages(0, 1), None).is_ok());
    assert!(range.interrupted(token));
    drop(open);
    assert_eq!(hub.nr_open(), 0);
}

#[test]
fn a_bracket_ends_on_another_thread_and_on_a_panic() {
    let hub = Arc::new(Hub::new());
    let range = Subscription::insert(Arc::clone(&hub), pages(0, 10));
    let bracket = Bracket::start(Arc::clone(&hub), pages(0, 1), None).expect("free slots");
    let ender = thread::spawn(move || {
        thread::sleep(Duration::from_millis(10));
        assert_eq!(bracket.interval(), pages(0, 1));
        drop(bracket);
    });
    assert!(range.begin(Deadline::after(LIMIT)).is_ok());
    ender.join().expect("no panic");

    let panicked = thread::scope(|scope| {
        let body = || {
            let _open = hub.start(Interval::ALL, None);
            std::panic::resume_unwind(Box::new(()))
        };
        scope.spawn(body).join().map(|(): ()| ())
    });
    assert!(panicked.is_err());
    assert_eq!(hub.nr_open(), 0);
}

#[test]
fn a_leaked_bracket_costs_a_slot_and_the_deadline() {
    let hub = Hub::new();
    core::mem::forget(hub.start(pages(0, 1), None));
    let range = hub.insert(pages(0, 2));
    assert_eq!(
        range.begin(Deadline::after(Duration::from_millis(5))),
        Err(BeginError::Timeout)
    );
    assert_eq!(hub.nr_open(), 1);
}

#[test]
fn release_interrupts_everybody_and_lets_nobody_begin() {
    let hub = Arc::new(Hub::new());
    let range = Subscription::insert(Arc::clone(&hub), pages(0, 10));
    let token = range.begin(Deadline::PASSED).expect("idle");
    let open = hub.start(pages(5, 6), None).expect("free slots");
    let waiter = thread::spawn({
        let hub = Arc::clone(&hub);
        move || hub.insert(pages(0, 10)).begin(Deadline::after(LIMIT))
    });
    let limit = Instant::now() + LIMIT;
    while hub.counters().waits == 0 {
        assert!(Instant::now() < limit, "the waiter never waited");
        thread::yield_now();
    }
    hub.release();
    assert_eq!(waiter.join().expect("no panic"), Err(BeginError::Released));
    assert!(range.interrupted(token));
    drop(open);
    assert_eq!(range.begin(Deadline::PASSED), Err(BeginError::Released));
    let late = hub.insert(pages(0, 10));
    assert_eq!(late.begin(Deadline::NEVER), Err(BeginError::Released));
    assert!(
        hub.start(Interval::ALL, None).is_ok(),
        "the teardown's own invalidation"
    );
}

#[test]
fn grows_while_it_is_used() {
    const N: u64 = 1_000;
    let hub = Hub::new();
    thread::scope(|scope| {
        for lane in 0..4 {
            let hub = &hub;
            scope.spawn(move || {
                let mine: Vec<_> = (0..N)
                    .map(|at| hub.insert(pages(4 * at + lane, 4 * at + lane + 1)))
                    .collect();
                for (at, range) in (0..N).zip(&mine) {
                    let token = range
                        .begin(Deadline::PASSED)
                        .expect("nobody invalidates these pages but this thread");
                    assert!(!range.interrupted(token));
                    drop(
                        hub.start(range.interval(), None)
                            .expect("four threads, four slots"),
                    );
                    assert!(range.interrupted(token), "page {at} of lane {lane}");
                }
            });
        }
    });
    assert_eq!(hub.counters().bumps, 4 * N);
}

/// Churn on other pages makes nobody wait or retry, at any rate (protocol.md, last part of section 4).
#[test]
fn churn_elsewhere_costs_no_wait_and_no_retry() {
    let hub = Hub::new();
    let done = core::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        for lane in 0..2 {
            let (hub, done) = (&hub, &done);
            scope.spawn(move || {
                let mut nr_started = 0_u64;
                while !done.load(core::sync::atomic::Ordering::Relaxed) || nr_started == 0 {
                    let at = 100 + 10 * lane + nr_started % 10;
                    drop(
                        hub.start(pages(at, at + 1), None)
                            .expect("two threads, two slots"),
                    );
                    nr_started += 1;
                }
            });
        }
        let range = hub.insert(pages(0, 100));
        for _ in 0..20_000 {
            let token = range.begin(Deadline::PASSED).expect("nothing overlaps");
            assert!(!range.interrupted(token));
        }
        done.store(true, core::sync::atomic::Ordering::Relaxed);
    });
    let counters = hub.counters();
    assert_eq!((counters.waits, counters.bumps, counters.wakes), (0, 0, 0));
    assert!(counters.starts > 0);
}

/// What the listeners of these tests are told.
struct Invalidation {
    blocking: Blocking,
}

struct Recorder<'a> {
    name: &'a str,
    refuses: bool,
    polls_left: RefCell<u32>,
    log: &'a RefCell<Vec<String>>,
}

impl Recorder<'_> {
    fn note(&self, what: &str) {
        self.log.borrow_mut().push(format!("{what} {}", self.name));
    }
}

impl Listener<Invalidation> for Recorder<'_> {
    fn invalidate(&self, invalidation: &Invalidation) -> Result<(), WouldBlock> {
        if self.refuses && invalidation.blocking == Blocking::No {
            return Err(WouldBlock);
        }
        self.note("invalidate");
        Ok(())
    }

    fn quiesced(&self, _: &Invalidation) -> bool {
        self.note("poll");
        let mut left = self.polls_left.borrow_mut();
        let is_quiet = *left == 0;
        *left = left.saturating_sub(1);
        is_quiet
    }

    fn cancel(&self, _: &Invalidation) {
        self.note("cancel");
    }
}

#[test]
fn all_are_told_before_any_is_asked() {
    let log = RefCell::default();
    let device = |name, polls| Recorder {
        name,
        refuses: false,
        polls_left: RefCell::new(polls),
        log: &log,
    };
    let (a, b) = (device("a", 1), device("b", 0));
    let listeners: [&dyn Listener<Invalidation>; 2] = [&a, &b];
    let all = || listeners.iter().copied();
    let invalidation = Invalidation {
        blocking: Blocking::No,
    };
    assert_eq!(invalidate_all(all(), &invalidation), Ok(()));
    assert!(!all_quiesced(all(), &invalidation));
    assert!(all_quiesced(all(), &invalidation));
    assert_eq!(
        log.take(),
        ["invalidate a", "invalidate b", "poll a", "poll a", "poll b"]
    );
}

#[test]
fn a_refusal_undoes_those_told_before_it() {
    let log = RefCell::default();
    let device = |name, refuses| Recorder {
        name,
        refuses,
        polls_left: RefCell::new(0),
        log: &log,
    };
    let (a, b, c, d) = (
        device("a", false),
        device("b", false),
        device("c", true),
        device("d", false),
    );
    let listeners: [&dyn Listener<Invalidation>; 4] = [&a, &b, &c, &d];
    let mut invalidation = Invalidation {
        blocking: Blocking::No,
    };
    assert_eq!(
        invalidate_all(listeners.iter().copied(), &invalidation),
        Err(WouldBlock)
    );
    assert_eq!(
        log.take(),
        ["invalidate a", "invalidate b", "cancel a", "cancel b"]
    );
    invalidation.blocking = Blocking::Yes;
    assert_eq!(
        invalidate_all(listeners.iter().copied(), &invalidation),
        Ok(())
    );
}
