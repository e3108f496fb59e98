//! The primitives under the model checker: each model names what it shows.

use super::checker::{Watched, expect_failure, models, reached};
use super::mutation::{Mutation, with_mutation};
use super::shim::atomic::AtomicU32;
use super::shim::atomic::Ordering::Relaxed;
use super::{Copiers, Deadline, Gate, Mutex, WaitQueue};
use crate::addr::PageRange;
use loom::thread;
use std::sync::Arc;

/// Mutual exclusion, ordering, and no sleeper left behind: three lockers.
fn mutex_excludes() {
    let lock = Arc::new(Mutex::new(0));
    let lockers: Vec<_> = (0..2)
        .map(|_| {
            let lock = Arc::clone(&lock);
            thread::spawn(move || *lock.lock() += 1)
        })
        .collect();
    *lock.lock() += 1;
    lockers
        .into_iter()
        .for_each(|locker| locker.join().unwrap());
    assert_eq!(*lock.lock(), 3, "a locker's write was lost");
    assert!(!lock.is_locked());
}

/// A locker that gives up at its deadline has the lock or not, and leaves the lock usable for the others.
fn mutex_gives_up() {
    let lock = Arc::new(Mutex::new(0));
    let lockers: Vec<_> = [Deadline::PASSED, Deadline::NEVER]
        .into_iter()
        .map(|deadline| {
            let lock = Arc::clone(&lock);
            thread::spawn(move || {
                lock.lock_until(deadline).map_or(0, |mut value| {
                    *value += 1;
                    1
                })
            })
        })
        .collect();
    let tried = lock.try_lock().map_or(0, |mut value| {
        *value += 1;
        1
    });
    let taken: u32 = lockers
        .into_iter()
        .map(|locker| locker.join().unwrap())
        .sum();
    assert_eq!(*lock.lock(), tried + taken);
    assert!(taken >= 1, "the one that waits for ever gets it");
    reached(if taken == 1 { "gave up" } else { "got it" });
}

/// No wake-up is lost: two waiters for one condition, made true in two steps by two threads.
fn wait_queue_wakes() {
    let shared = Arc::new((WaitQueue::new(), AtomicU32::new(0)));
    let wakers: Vec<_> = (0..2)
        .map(|_| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.1.fetch_add(1, Relaxed);
                shared.0.wake_all();
            })
        })
        .collect();
    assert!(
        shared
            .0
            .wait_until(Deadline::NEVER, || shared.1.load(Relaxed) == 2)
    );
    wakers.into_iter().for_each(|waker| waker.join().unwrap());
}

/// No wake-up is lost: two sleepers on one condition, one waker, which wakes both.
fn wait_queue_wakes_all() {
    let shared = Arc::new((WaitQueue::new(), AtomicU32::new(0)));
    let waiter = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || {
            shared
                .0
                .wait_until(Deadline::NEVER, || shared.1.load(Relaxed) == 1)
        })
    };
    let waker = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || {
            shared.1.store(1, Relaxed);
            shared.0.wake_all();
        })
    };
    assert!(
        shared
            .0
            .wait_until(Deadline::NEVER, || shared.1.load(Relaxed) == 1)
    );
    assert!(waiter.join().unwrap());
    waker.join().unwrap();
}

/// Closed means alone, both ways: no section reads while the closer writes, and each sees what the other wrote.
fn gate_closes() {
    let shared = Arc::new((Gate::new(), Watched::new(0)));
    let sections: Vec<_> = (0..2)
        .map(|shard| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let _section = shared.0.enter_in(shard);
                shared.1.read()
            })
        })
        .collect();
    {
        let _closed = shared.0.close();
        shared.1.write(1);
    }
    for section in sections {
        reached(
            ["read before the closer", "read after the closer"][section.join().unwrap() as usize],
        );
    }
}

/// Leaving is a Release and the drain an Acquire: a section's writes are seen by the closer.
fn gate_hands_over() {
    let shared = Arc::new((Gate::new(), Watched::new(0)));
    let section = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || {
            let _section = shared.0.enter_in(1);
            shared.1.write(1);
        })
    };
    let seen = {
        let _closed = shared.0.close();
        shared.1.read()
    };
    section.join().unwrap();
    reached(["closed before the section", "closed after the section"][seen as usize]);
}

/// Rule 3: two closers exclude each other, and a section both.
fn gate_has_one_closer() {
    let shared = Arc::new((Gate::new(), Watched::new(0)));
    let closer = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || {
            let _closed = shared.0.close();
            shared.1.write(1);
        })
    };
    let section = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || {
            let _section = shared.0.enter_in(0);
            shared.1.read();
        })
    };
    {
        let _closed = shared.0.close();
        shared.1.write(2);
    }
    closer.join().unwrap();
    section.join().unwrap();
}

/// Rule 4: what was unpublished is free after a grace period: a section reads the array that is current, the updater publishes another,
/// waits, and takes the old one back.
fn gate_grace_period() {
    let shared = Arc::new((
        Gate::new(),
        AtomicU32::new(0),
        [Watched::new(10), Watched::new(11)],
    ));
    let sections: Vec<_> = (0..2)
        .map(|shard| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let _section = shared.0.enter_in(shard);
                let current = shared.1.load(Relaxed);
                assert_eq!(
                    shared.2[current as usize].read(),
                    10 + current,
                    "read after it was freed"
                );
                reached(["read the old", "read the new"][current as usize]);
            })
        })
        .collect();
    shared.1.store(1, Relaxed);
    shared.0.synchronize();
    shared.2[0].write(0);
    sections
        .into_iter()
        .for_each(|section| section.join().unwrap());
}

/// The same, twice: the second grace period uses the phase that the first one left, and ends in a close.
fn gate_grace_periods_follow() {
    let shared = Arc::new((
        Gate::new(),
        AtomicU32::new(0),
        [Watched::new(10), Watched::new(11), Watched::new(12)],
    ));
    let section = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || {
            let _section = shared.0.enter_in(0);
            let current = shared.1.load(Relaxed);
            assert_eq!(
                shared.2[current as usize].read(),
                10 + current,
                "read after it was freed"
            );
            reached(["read the old", "read the new", "read the newest"][current as usize]);
        })
    };
    for next in 1..3 {
        shared.1.store(next, Relaxed);
        shared.0.synchronize();
        shared.2[next as usize - 1].write(0);
    }
    {
        let _closed = shared.0.close();
        shared.2[2].write(0);
        shared.2[2].write(12);
    }
    section.join().unwrap();
}

/// A page that is copied from under its block's lock, and moves under the same lock when the copy is over: who holds the copy looks at the
/// page before that, and at the page that is copied.
fn copiers_are_held() {
    const PAGE: usize = 1 << 12;
    let shared = Arc::new((Copiers::new(), Watched::new(0)));
    // Of the model's own, hidden from the checker.
    let forgotten = std::cell::Cell::new(false);
    let copier = {
        let shared = Arc::clone(&shared);
        thread::spawn(move || {
            let page = PageRange::new(7 * PAGE, 8 * PAGE).unwrap();
            let copier = shared.0.begin(page).expect("there is room for one");
            let is_told = copier.end();
            if is_told {
                reached("is told");
            }
            shared.1.write(1);
            let next = PageRange::new(8 * PAGE, 9 * PAGE).unwrap();
            drop(shared.0.begin(next).expect("there is room for one again"));
            is_told
        })
    };
    shared.0.let_go_on(
        |page| match page / PAGE {
            7 => shared.1.read() != 0,
            8 => {
                reached("held the next");
                true
            }
            _ => panic!("another page is looked at"),
        },
        |_| {
            reached("held");
            forgotten.set(true);
        },
    );
    let is_told = copier.join().unwrap();
    assert_eq!(is_told, forgotten.get(), "its copier is not told");
}

models! {
    mutex_excludes reaches []
    mutex_gives_up reaches ["gave up", "got it"]
    wait_queue_wakes reaches []
    wait_queue_wakes_all reaches []
    gate_closes reaches ["read before the closer", "read after the closer"]
    gate_hands_over reaches ["closed before the section", "closed after the section"]
    gate_has_one_closer reaches []
    gate_grace_period reaches ["read the old", "read the new"]
    gate_grace_periods_follow reaches ["read the old", "read the new", "read the newest"]
    copiers_are_held reaches ["held", "held the next", "is told"]
}

const RACE: &str = "Causality violation";
const STUCK: &str = "deadlock";

/// Each mutation of the primitives, the reason for which the checker rejects it, and the model that does.
const MUTATIONS: &[(Mutation, &str, fn())] = &[
    (Mutation::MutexLockRelaxed, RACE, mutex_excludes),
    (Mutation::MutexUnlockRelaxed, RACE, mutex_excludes),
    (Mutation::MutexContendedRelaxed, RACE, mutex_excludes),
    (Mutation::MutexTimedOutRelaxed, RACE, mutex_gives_up),
    (Mutation::MutexForgetsSleepers, STUCK, mutex_excludes),
    (Mutation::WakeWithoutFence, STUCK, wait_queue_wakes),
    (Mutation::WaitWithoutFence, STUCK, wait_queue_wakes),
    (Mutation::WaitWithoutSecondLook, STUCK, wait_queue_wakes),
    (Mutation::WakeWithoutFence, STUCK, wait_queue_wakes_all),
    (Mutation::GateEnterWithoutSecondLook, RACE, gate_closes),
    (Mutation::GateEnterWithoutFence, RACE, gate_closes),
    (Mutation::GateCloseWithoutFence, RACE, gate_closes),
    (Mutation::GateEnterRelaxed, RACE, gate_closes),
    (Mutation::GateOpenRelaxed, RACE, gate_closes),
    (Mutation::GateOpenWithoutWake, STUCK, gate_closes),
    (Mutation::GateLeaveRelaxed, RACE, gate_hands_over),
    (Mutation::GateDrainRelaxed, RACE, gate_hands_over),
    (Mutation::GateLeaveWithoutWake, STUCK, gate_closes),
    (Mutation::GateLeaveWithoutFence, STUCK, gate_closes),
    (Mutation::MutexBarges, RACE, gate_has_one_closer),
    (
        Mutation::GateSynchronizeWithoutWait,
        RACE,
        gate_grace_period,
    ),
    (Mutation::GateChangeWithoutFence, RACE, gate_grace_period),
    (Mutation::CopierEndsHeld, RACE, copiers_are_held),
    (Mutation::CopierEndRelaxed, RACE, copiers_are_held),
    (Mutation::CopierHoldRelaxed, RACE, copiers_are_held),
    (
        Mutation::CopierBeginRelaxed,
        "another page",
        copiers_are_held,
    ),
    (
        Mutation::GateEnterWithoutSecondLook,
        RACE,
        gate_grace_periods_follow,
    ),
];

#[test]
fn mutations_are_caught() {
    for &(mutation, reason, model) in MUTATIONS {
        let name = format!("{mutation:?}");
        with_mutation(mutation, || expect_failure(&name, reason, model));
    }
}

#[test]
fn every_mutation_is_tried() {
    let tried = || {
        MUTATIONS
            .iter()
            .chain(crate::notifier::models::MUTATIONS)
            .map(|&(mutation, ..)| mutation)
    };
    for &mutation in Mutation::ALL {
        assert!(
            tried().any(|tried| tried == mutation),
            "no model is run with {mutation:?}"
        );
    }
}
