//! Ladders: the schedules of the protocol's text, and those of the hazards that broke earlier designs, rung by rung.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::thread::Scope;
use std::time::{Duration, Instant};

use svm::point::Point;
use svm::{Access, AttachOptions, Delivery, DeviceFaultKind, Granule, Interrupted, Mirror};

use crate::director::{Actor, Director, Part, Settled};
use crate::random::{has_met_marker, set_changing, set_late_zaps, set_marker, set_passing_border};
use crate::rig::{Memory, Op, PAGE, SUBJECT, Shape, Worker, attach, attach_with, options};

const DEVICE: Actor = Actor::Nr(0);
const CPU0: Actor = Actor::Nr(1);
const CPU2: Actor = Actor::Nr(2);
const DOORS: [Delivery; 2] = [Delivery::Inline, Delivery::Thread];
const PAGES_PER_BLOCK: usize = 512;
const SOON: Duration = Duration::from_millis(30);
const IN_TIME: Duration = Duration::from_secs(10);

/// Has `actor` do `work` in a thread of its own.
fn act<'scope, 'env, R: Send + 'scope>(
    scope: &'scope Scope<'scope, 'env>,
    actor: Actor,
    work: impl FnOnce() -> R + Send + 'scope,
) -> std::thread::ScopedJoinHandle<'scope, R> {
    scope.spawn(move || {
        let _part = Part::take(actor);
        work()
    })
}

/// protocol.md section 1, the bug that the sequence number removes: an invalidation begins *and ends* between snapshot and
/// commit.
///
/// ```text
/// device                          CPU
/// start_update
/// fault: the page is the device's
///                                 write: start, the page comes home, end
/// lock
/// end_update: Interrupted
/// ```
#[test]
fn an_invalidation_that_begins_and_ends_within_an_update() {
    let _watchdog = crate::watch("the seed's ladder");
    for delivery in DOORS.into_iter().filter(|_| crate::usable()) {
        let _director = Director::new();
        let memory = Memory::new();
        let mirror = memory.mirror(&options(delivery));
        let device = attach(None);
        let mut worker = Worker::new(&device, &mirror);
        let _signals = svm::worker_thread();
        let (mapped, range, index) = worker.parts(SUBJECT);
        let pages = index..index + 1;
        let mut update = range.start_update(&mapped, pages.clone(), IN_TIME).unwrap();
        update.fault(Access::Write).unwrap();
        memory.store(SUBJECT, 1, 3);
        // Nothing is pending any more, and it is the CPU's page: the old `valid` flag would say true again.
        assert!(svm::snapshot(memory.addr(SUBJECT), 1).unwrap()[0].is_present());
        assert!(update.needs_retry());
        let guard = device.device().lock_it();
        assert_eq!(update.end_update(&guard).err(), Some(Interrupted));
        drop(guard);
        // And of a mere look, which faults nothing in.
        let mut update = range.start_update(&mapped, pages, IN_TIME).unwrap();
        update.fault(Access::Write).unwrap();
        update.snapshot();
        memory.store(SUBJECT, 1, 4);
        let guard = device.device().lock_it();
        assert_eq!(update.end_update(&guard).err(), Some(Interrupted));
        drop(guard);
        drop(worker);
        mirror.close().unwrap();
        assert_eq!(memory.load(SUBJECT), [1, 4, 1]);
    }
}

/// protocol.md section 1, three CPUs: while an overlapping invalidation is open, one that does not overlap starts and ends. It
/// must make nothing valid: neither an update under way, nor one that begins.
///
/// ```text
/// CPU 0                    CPU 1 (device)                 CPU 2
///                          start_update, fault
/// write: start
///                                                         write elsewhere: start … end
///                          end_update: Interrupted
///                          start_update: waits
///                                                         write elsewhere: start … end
///                          start_update: waits still
/// end
///                          begins
/// ```
#[test]
fn an_invalidation_elsewhere_ends_while_one_here_is_open() {
    let _watchdog = crate::watch("the ladder of three CPUs");
    if !crate::usable() {
        return;
    }
    // The inline door: through the other one thread serves all faults, so that no two CPU faults are open at once.
    let director = Director::new();
    let memory = Memory::sized(3 * PAGES_PER_BLOCK);
    let elsewhere = SUBJECT + 2 * PAGES_PER_BLOCK;
    let mirror = memory.mirror(&options(Delivery::Inline));
    let (device, other) = (attach(None), attach(None));
    let (mut worker, mut helper) = (Worker::new(&device, &mirror), Worker::new(&other, &mirror));
    let mut away = |page| assert!(helper.access(Shape::Round, page, Op::Read, None).is_ok());
    let (mapped, range, index) = worker.parts(SUBJECT);
    let pages = index..index + 1;
    let _signals = svm::worker_thread();
    std::thread::scope(|scope| {
        let _free = director.frees_all();
        let mut update = range.start_update(&mapped, pages.clone(), IN_TIME).unwrap();
        update.fault(Access::Write).unwrap();
        director.stop(CPU0, Point::FaultExcluding);
        let cpu0 = act(scope, CPU0, || memory.store(SUBJECT, 1, 3));
        director.await_stop(CPU0);
        away(elsewhere);
        memory.store(elsewhere, 1, 5);
        let guard = device.device().lock_it();
        assert_eq!(update.end_update(&guard).err(), Some(Interrupted));
        drop(guard);
        // A collision is no timeout, and a timeout no collision: this one is open, and stays open for as long.
        let begun = Instant::now();
        let refused = range
            .start_update(&mapped, pages.clone(), SOON)
            .unwrap_err();
        assert_eq!(refused.kind, DeviceFaultKind::Timeout);
        assert!(begun.elapsed() >= SOON);
        director.stop(DEVICE, Point::UpdateBegun);
        let (mapped, range, pages) = (&mapped, &mut *range, pages.clone());
        let begins = act(scope, DEVICE, move || {
            let _signals = svm::worker_thread();
            drop(range.start_update(mapped, pages, IN_TIME).unwrap());
        });
        assert_eq!(director.settle(DEVICE, false), Settled::Blocked);
        away(elsewhere);
        memory.store(elsewhere, 1, 6);
        assert_eq!(director.settle(DEVICE, false), Settled::Blocked);
        director.release(CPU0);
        director.await_stop(DEVICE);
        cpu0.join().unwrap();
        director.release(DEVICE);
        begins.join().unwrap();
    });
    drop((worker, helper));
    mirror.close().unwrap();
    assert_eq!((memory.load(SUBJECT)[1], memory.load(elsewhere)[1]), (3, 6));
}

/// hazards.md P3, the count per range that would bring the ABA back: X elsewhere is open; Y here starts and ends; an update
/// begins; Z here starts and ends.
///
/// ```text
/// CPU 0                     device                   CPU 2
/// write elsewhere: start
///                                                    write here: start … end (Y)
///                           start_update, fault
///                                                    write here: start … end (Z)
///                           end_update: Interrupted
/// end
/// ```
#[test]
fn two_invalidations_here_around_a_begin_while_one_elsewhere_is_open() {
    let _watchdog = crate::watch("the ladder of the count");
    if !crate::usable() {
        return;
    }
    let director = Director::new();
    let memory = Memory::sized(3 * PAGES_PER_BLOCK);
    let elsewhere = SUBJECT + 2 * PAGES_PER_BLOCK;
    let mirror = memory.mirror(&options(Delivery::Inline));
    let (device, other) = (attach(None), attach(None));
    let (mut worker, mut helper) = (Worker::new(&device, &mirror), Worker::new(&other, &mirror));
    let mut away = |page| assert!(helper.access(Shape::Round, page, Op::Read, None).is_ok());
    let (mapped, range, index) = worker.parts(SUBJECT);
    let _signals = svm::worker_thread();
    std::thread::scope(|scope| {
        let _free = director.frees_all();
        away(elsewhere);
        away(SUBJECT);
        director.stop(CPU0, Point::FaultExcluding);
        let cpu0 = act(scope, CPU0, || memory.store(elsewhere, 1, 5));
        director.await_stop(CPU0);
        memory.store(SUBJECT, 1, 2);
        // No wait: what is open is elsewhere.
        let begun = Instant::now();
        let mut update = range
            .start_update(&mapped, index..index + 1, IN_TIME)
            .unwrap();
        assert!(begun.elapsed() < IN_TIME);
        update.fault(Access::Write).unwrap();
        memory.store(SUBJECT, 1, 3);
        let guard = device.device().lock_it();
        assert_eq!(update.end_update(&guard).err(), Some(Interrupted));
        drop(guard);
        assert_eq!(director.place(CPU0), Some(Point::FaultExcluding as u32));
        director.release(CPU0);
        cpu0.join().unwrap();
    });
    drop((worker, helper));
    mirror.close().unwrap();
    assert_eq!((memory.load(SUBJECT)[1], memory.load(elsewhere)[1]), (3, 5));
}

/// What is open *here* is not waited for by what is elsewhere: a region's churn starves nobody in another block of it.
#[test]
fn an_open_invalidation_holds_up_nobody_elsewhere() {
    let _watchdog = crate::watch("an open invalidation elsewhere");
    if !crate::usable() {
        return;
    }
    let director = Director::new();
    let memory = Memory::sized(3 * PAGES_PER_BLOCK);
    let elsewhere = SUBJECT + 2 * PAGES_PER_BLOCK;
    let mirror = memory.mirror(&options(Delivery::Inline));
    let device = attach(None);
    let mut worker = Worker::new(&device, &mirror);
    let read = |worker: &mut Worker<'_>, page| worker.access(Shape::Round, page, Op::Read, None);
    read(&mut worker, SUBJECT).unwrap();
    std::thread::scope(|scope| {
        let _free = director.frees_all();
        director.stop(CPU0, Point::FaultExcluding);
        let cpu0 = act(scope, CPU0, || memory.store(SUBJECT, 1, 3));
        director.await_stop(CPU0);
        for value in 2..20 {
            for (i, shape) in [Shape::Update, Shape::Round].into_iter().enumerate() {
                // Another page each time: who fetches the same one again and again is lent it for a while.
                let page = elsewhere + 2 * value as usize + i;
                let got = worker.access(shape, page, Op::Write { word: 0, value }, None);
                assert_eq!(got, Ok([value, 1, 1]));
                memory.store(page, 1, value);
            }
        }
        assert_eq!(director.place(CPU0), Some(Point::FaultExcluding as u32));
        director.release(CPU0);
        cpu0.join().unwrap();
    });
    assert_eq!((worker.interrupted, mirror.stats().waits), (0, 0));
    drop(worker);
    mirror.close().unwrap();
    assert_eq!(memory.load(SUBJECT)[1], 3);
}

/// hazards.md P1: a device has copied a page, and a CPU write un-protects it before the device commits. There is a bracket
/// around that though no device maps the page yet, so the commit is refused.
///
/// ```text
/// device                                 CPU
/// start_update
/// fault: a copy, the CPU's protected
///                                        write: start, un-protect, end
/// end_update: Interrupted
/// ```
#[test]
fn a_page_is_written_again_between_its_copy_and_the_commit() {
    let _watchdog = crate::watch("the ladder of the copy");
    for delivery in DOORS.into_iter().filter(|_| crate::usable()) {
        let _director = Director::new();
        let memory = Memory::new();
        let mirror = memory.mirror(&options(delivery).read_mostly(true));
        let device = attach(None);
        let mut worker = Worker::new(&device, &mirror);
        let _signals = svm::worker_thread();
        let (mapped, range, index) = worker.parts(SUBJECT);
        let mut update = range
            .start_update(&mapped, index..index + 1, IN_TIME)
            .unwrap();
        update.fault(Access::Read).unwrap();
        assert!(svm::snapshot(memory.addr(SUBJECT), 1).unwrap()[0].is_held_by(&device));
        memory.store(SUBJECT, 1, 3);
        let guard = device.device().lock_it();
        assert_eq!(update.end_update(&guard).err(), Some(Interrupted));
        drop(guard);
        let seen = worker
            .access(Shape::Update, SUBJECT, Op::Read, None)
            .unwrap();
        assert_eq!(seen, [1, 3, 1]);
        drop(worker);
        mirror.close().unwrap();
    }
}

/// hazards.md G1: between the read of an event and its application its caller goes on and writes, and a device comes for the
/// page. Neither may get through while the picture is old: the write would be dropped with the page.
///
/// ```text
/// reader                 caller                          device
///                        madvise(DONTNEED)
/// read
///                        returns; writes 5: waits
///                                                        read: waits
/// apply, open
///                        writes 5                        reads 5, or the 0 before it
/// ```
#[test]
fn a_caller_writes_before_its_event_is_applied() {
    let _watchdog = crate::watch("the ladder of the gate");
    for delivery in DOORS.into_iter().filter(|_| crate::usable()) {
        let director = Director::new();
        let memory = Memory::new();
        let mirror = memory.mirror(&options(delivery));
        let device = attach(None);
        let mut worker = Worker::new(&device, &mirror);
        worker
            .access(Shape::Round, SUBJECT, Op::Write { word: 0, value: 2 }, None)
            .unwrap();
        director.stop(Actor::Reader, Point::EventRead);
        let seen = std::thread::scope(|scope| {
            let _free = director.frees_all();
            let caller = act(scope, CPU0, || {
                memory.discard(SUBJECT);
                memory.store(SUBJECT, 1, 5);
            });
            director.await_stop(Actor::Reader);
            assert_eq!(director.settle(CPU0, false), Settled::Blocked);
            // The device has a translation still, and nothing stops this one's hits: so its next fault, elsewhere in the block.
            let device = act(scope, DEVICE, || {
                worker
                    .access(Shape::Round, SUBJECT + 1, Op::Read, None)
                    .unwrap();
                worker
                    .access(Shape::Round, SUBJECT, Op::Read, None)
                    .unwrap()
            });
            assert_eq!(director.settle(DEVICE, false), Settled::Blocked);
            director.release(Actor::Reader);
            caller.join().unwrap();
            device.join().unwrap()
        });
        assert!(matches!(seen, [0, 5 | 0, 0]), "{seen:?}");
        assert_eq!(memory.load(SUBJECT), [0, 5, 0]);
        drop(worker);
        mirror.close().unwrap();
    }
}

/// A page is unmapped, and something else mapped at its address, before anybody has heard of the first: a round that holds the
/// reader up takes nothing of what is there now. Its call is made on the userfaultfd that the memory was registered with, which
/// says EAGAIN; any other descriptor would move the new page away.
///
/// ```text
/// device                  CPU 0                   CPU 2                   reader
/// round: gate, block
///                         munmap …                                        a message; the gate is taken
///                                                 mmap there, writes 5
/// MOVE: EAGAIN; let go                                                    reads, applies
/// round: unmapped                                 reads 5
/// ```
#[test]
fn a_round_takes_nothing_of_what_was_mapped_since() {
    let _watchdog = crate::watch("the ladder of one descriptor");
    for delivery in DOORS.into_iter().filter(|_| crate::usable()) {
        for access in [Op::Read, Op::Write { word: 0, value: 2 }] {
            let director = Director::new();
            let memory = Memory::new();
            let mirror = memory.mirror(&options(delivery));
            let device = attach(None);
            let mut worker = Worker::new(&device, &mirror);
            director.stop(DEVICE, Point::RoundLocked);
            let outcome = std::thread::scope(|scope| {
                let _free = director.frees_all();
                let device = act(scope, DEVICE, || {
                    worker.access(Shape::Round, SUBJECT, access, None)
                });
                director.await_stop(DEVICE);
                let caller = act(scope, CPU0, || memory.unmap(SUBJECT));
                assert_eq!(director.settle(CPU0, false), Settled::Blocked);
                memory.map_anew(SUBJECT);
                memory.store(SUBJECT, 1, 5);
                director.release(DEVICE);
                caller.join().unwrap();
                device.join().unwrap()
            });
            assert_eq!(
                memory.load(SUBJECT),
                [0, 5, 0],
                "another's page was moved away"
            );
            assert_eq!(outcome, Err(DeviceFaultKind::Unmapped));
            drop(worker);
            mirror.close().unwrap();
        }
    }
}

/// hazards.md G5: an `mremap` sends two events, and ioctls say EAGAIN until both are read. A device fault that comes in between
/// goes round without holding anything that the reader needs.
#[test]
fn a_device_fault_between_the_two_events_of_a_remap() {
    let _watchdog = crate::watch("the ladder of the two events");
    for delivery in DOORS.into_iter().filter(|_| crate::usable()) {
        let director = Director::new();
        let memory = Memory::new();
        let mirror = memory.mirror(&options(delivery));
        let device = attach(None);
        let mut worker = Worker::new(&device, &mirror);
        worker
            .access(Shape::Round, SUBJECT, Op::Write { word: 0, value: 2 }, None)
            .unwrap();
        let told = director.visits(Actor::Reader, Point::EventRead);
        director.stop(Actor::Reader, Point::EventRead);
        let target = std::thread::scope(|scope| {
            let _free = director.frees_all();
            let caller = act(scope, CPU0, || memory.remap(SUBJECT));
            // The first event, REMAP, goes through; the second, UNMAP of the old place, is read and not applied.
            director.await_stop(Actor::Reader);
            director.step(Actor::Reader);
            director.await_visit(Actor::Reader, Point::EventRead, told + 1);
            director.await_stop(Actor::Reader);
            let fault = act(scope, DEVICE, || {
                let near = worker.access(Shape::Round, SUBJECT + 1, Op::Read, None);
                (near, worker.access(Shape::Round, SUBJECT, Op::Read, None))
            });
            director.settle(DEVICE, false);
            director.release(Actor::Reader);
            let (near, gone) = fault.join().unwrap();
            assert_eq!(near, Ok([1, 1, 1]));
            assert_eq!(gone, Err(DeviceFaultKind::Unmapped));
            caller.join().unwrap()
        });
        // What the device wrote has gone along.
        assert_eq!(target.load(0), [2, 1, 1]);
        drop(worker);
        mirror.close().unwrap();
    }
}

/// hazards.md W1: a CPU write that waits for an access in flight holds nothing: a reader of the same page, in the same block,
/// is served meanwhile if it has what it needs, and a fault beside it goes through.
#[test]
fn a_fault_that_waits_for_an_access_holds_nothing() {
    let _watchdog = crate::watch("the ladder of the wait");
    if !crate::usable() {
        return;
    }
    let director = Director::new();
    let memory = Memory::new();
    let mirror = memory.mirror(&options(Delivery::Inline));
    let device = attach(None);
    let mut worker = Worker::new(&device, &mirror);
    for page in [SUBJECT, SUBJECT + 1] {
        worker
            .access(Shape::Round, page, Op::Write { word: 0, value: 2 }, None)
            .unwrap();
    }
    std::thread::scope(|scope| {
        let _free = director.frees_all();
        device.device().set_busy(true);
        director.stop(CPU0, Point::FaultWaiting);
        let begun = Instant::now();
        let cpu0 = act(scope, CPU0, || memory.store(SUBJECT, 1, 3));
        director.await_stop(CPU0);
        // An access has two seconds: this comes to let go of its locks without having waited for it.
        assert!(
            begun.elapsed() < Duration::from_millis(1500),
            "it has waited with its locks held"
        );
        // Same block, other pages: a device's fault and a hole of the CPU's.
        let cpu2 = act(scope, CPU2, || memory.store(SUBJECT + 2, 1, 7));
        director.await_done(CPU2);
        cpu2.join().unwrap();
        let mut second = Worker::new(&device, &mirror);
        assert_eq!(
            second.access(Shape::Round, SUBJECT + 3, Op::Read, None),
            Ok([1, 1, 1])
        );
        // And the page itself is nobody's until the access is over: its bracket is open.
        let (mapped, range, index) = second.parts(SUBJECT);
        let _signals = svm::worker_thread();
        let refused = range
            .start_update(&mapped, index..index + 1, SOON)
            .unwrap_err();
        assert_eq!(refused.kind, DeviceFaultKind::Timeout);
        device.device().set_busy(false);
        director.release(CPU0);
        cpu0.join().unwrap();
    });
    assert_eq!(memory.load(SUBJECT), [2, 3, 1]);
    drop(worker);
    mirror.close().unwrap();
}

/// A mirror closes while an update is under way (protocol.md section 2, release): the update is told, and so is one that waits.
#[test]
fn a_mirror_closes_while_one_update_is_open_and_another_waits() {
    let _watchdog = crate::watch("the ladder of the release");
    if !crate::usable() {
        return;
    }
    let director = Director::new();
    let memory = Memory::new();
    let mirror = memory.mirror(&options(Delivery::Inline));
    let device = attach(None);
    let (mut worker, mut second) = (Worker::new(&device, &mirror), Worker::new(&device, &mirror));
    worker
        .access(Shape::Round, SUBJECT, Op::Write { word: 0, value: 2 }, None)
        .unwrap();
    let _signals = svm::worker_thread();
    let (mapped, range, index) = worker.parts(SUBJECT + 1);
    let mut update = range
        .start_update(&mapped, index..index + 1, IN_TIME)
        .unwrap();
    update.fault(Access::Read).unwrap();
    std::thread::scope(|scope| {
        let _free = director.frees_all();
        device.device().set_busy(true);
        director.stop(CPU0, Point::FaultWaiting);
        let cpu0 = act(scope, CPU0, || memory.store(SUBJECT, 1, 3));
        director.await_stop(CPU0);
        let waits = act(scope, DEVICE, || {
            let _signals = svm::worker_thread();
            let (mapped, range, index) = second.parts(SUBJECT);
            let outcome = range.start_update(&mapped, index..index + 1, IN_TIME);
            outcome.map(drop).unwrap_err().kind
        });
        assert_eq!(director.settle(DEVICE, false), Settled::Blocked);
        director.stop(CPU2, Point::CloseReleased);
        let closes = act(scope, CPU2, || mirror.close().unwrap());
        director.await_stop(CPU2);
        // The access goes on, and the bracket is open still: the one that waited for its end has been told all the same.
        assert_eq!(waits.join().unwrap(), DeviceFaultKind::Closed);
        let guard = device.device().lock_it();
        assert_eq!(update.end_update(&guard).err(), Some(Interrupted));
        drop(guard);
        device.device().set_busy(false);
        director.release(CPU0);
        director.release(CPU2);
        cpu0.join().unwrap();
        closes.join().unwrap();
    });
    assert_eq!(memory.load(SUBJECT), [2, 3, 1]);
    assert_eq!(device.resident_bytes() / PAGE, 0);
}

/// hazards.md G1: a round waits for an access to one of its pages, with no lock held, and another of them is discarded. Until the kernel
/// is done with that page the round leaves it where it is: it would take along what is being discarded, and bring it back.
///
/// ```text
/// device (pages 0 and 1)            CPU
/// tells the holder of page 0, waits
///                                   madvise(page 1): the event is applied, the zap is still to come
/// the access to page 0 is over
/// looks again: page 1 is pending
///                                   the zap
/// takes both: page 1 is zeros
/// ```
#[test]
fn a_page_is_discarded_while_its_round_waits_for_another() {
    let _watchdog = crate::watch("the ladder of the two pages");
    for delivery in DOORS.into_iter().filter(|_| crate::usable()) {
        let director = Director::new();
        let memory = Memory::new();
        let mirror = memory.mirror(&options(delivery));
        let (device, holder) = (attach(None), attach(None));
        let (mut worker, mut held) = (Worker::new(&device, &mirror), Worker::new(&holder, &mirror));
        held.access(Shape::Round, SUBJECT, Op::Write { word: 0, value: 2 }, None)
            .unwrap();
        memory.store(SUBJECT + 1, 1, 3);
        std::thread::scope(|scope| {
            let _free = director.frees_all();
            holder.device().set_busy(true);
            director.stop(DEVICE, Point::RoundWaiting);
            let fault = act(scope, DEVICE, || worker.fault_many(SUBJECT, 2));
            director.await_stop(DEVICE);
            set_late_zaps(true);
            memory.discard(SUBJECT + 1);
            holder.device().set_busy(false);
            director.release(DEVICE);
            assert_eq!(director.settle(DEVICE, false), Settled::Blocked);
            let taken = device.resident_bytes() / PAGE;
            set_late_zaps(false);
            assert_eq!(fault.join().unwrap(), Ok(vec![[2, 1, 1], [0, 0, 0]]));
            assert_eq!(taken, 0, "pages went to the device before the zap");
        });
        drop((worker, held));
        mirror.close().unwrap();
    }
}

/// M5: a call must not cross a border of mappings, and says so if it did. But `mprotect` splits a mapping and joins it again at any time:
/// who looks for the border may find none, and then nothing is wrong with the pages.
///
/// ```text
/// CPU reads page 0                  another thread
///                                   mprotect(page 1, PROT_READ)
/// COPY home: ENOENT
///                                   mprotect(page 1, PROT_READ | PROT_WRITE)
/// looks for the border: there is none
/// COPY home: there it is
/// ```
#[test]
fn a_border_of_mappings_that_has_gone_is_no_refusal() {
    let _watchdog = crate::watch("the ladder of the border");
    for delivery in DOORS.into_iter().filter(|_| crate::usable()) {
        let _director = Director::new();
        let memory = Memory::new();
        let mirror = memory.mirror(&options(delivery));
        let device = attach(None);
        let mut worker = Worker::new(&device, &mirror);
        worker
            .access(Shape::Round, SUBJECT, Op::Write { word: 0, value: 2 }, None)
            .unwrap();
        let mapped = device.map(mirror.view().region()).unwrap();
        // SAFETY: the memory outlives the guard, and has no edges.
        let in_use = unsafe { mapped.begin_use(Access::Read) }.unwrap();
        // While it is in use a load of the CPU copies.
        set_passing_border();
        assert_eq!(memory.load(SUBJECT), [2, 1, 1]);
        drop((worker, in_use));
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
    }
}

/// G5: a page that leaves as it is copied holds up neither the copier nor the monitor, where that waits for the block that the copier has
/// locked: it is for the kernel's accesses, too, and the copy is one. (Seen with bare `mremap`s. Here it is a bare `madvise`,
/// which without MOVE is not heard of, and so can come where one wants it.)
///
/// ```text
/// CPU                     device                    monitor
/// reads page 4
///                                                   puts it aside: the device uses it
///                         protects page 2
///                         is done with page 4
///                                                   goes on with page 4: waits for the block
/// madvise(2, DONTNEED)
///                         COPY of page 2, which is
///                         missing
/// ```
#[test]
fn a_page_leaves_as_it_is_copied_while_the_monitor_waits_for_its_block() {
    let name = "ladders::a_page_leaves_as_it_is_copied_while_the_monitor_waits_for_its_block";
    tests::in_own_process(name, &["move"], || {
        let _watchdog = crate::watch("the ladder of the copier");
        if !crate::usable() {
            return;
        }
        let director = Director::new();
        let memory = Memory::new();
        let mirror = memory.mirror(&options(Delivery::Thread));
        let device = attach(None);
        let mut worker = Worker::new(&device, &mirror);
        let (other, op) = (SUBJECT + 2, Op::Write { word: 0, value: 2 });
        worker.access(Shape::Round, other, op, None).unwrap();
        std::thread::scope(|scope| {
            let _free = director.frees_all();
            device.device().set_busy(true);
            let faults = director.visits(Actor::Reader, Point::FaultLocked);
            let reader = act(scope, CPU0, || memory.load(other));
            director.await_visit(Actor::Reader, Point::FaultLocked, faults);
            director.stop(DEVICE, Point::CopyProtected);
            let round = act(scope, DEVICE, || {
                worker.access(Shape::Round, SUBJECT, Op::Read, None)
            });
            director.await_stop(DEVICE);
            device.device().set_busy(false);
            director.quiet();
            memory.discard(SUBJECT);
            director.release(DEVICE);
            assert_eq!(round.join().unwrap(), Ok([0, 0, 0]));
            assert_eq!(reader.join().unwrap(), [2, 1, 1]);
        });
        // The page is the mirror's still.
        let write = Op::Write { word: 0, value: 7 };
        worker.access(Shape::Round, SUBJECT, write, None).unwrap();
        assert_eq!(memory.load(SUBJECT), [7, 0, 0]);
        memory.store(SUBJECT, 1, 8);
        let read = worker.access(Shape::Round, SUBJECT, Op::Read, None);
        assert_eq!(read.unwrap(), [7, 8, 0]);
        drop(worker);
        assert_eq!(mirror.stats().anomalies, 0);
        assert_eq!(mirror.stats().in_place_pages, 0);
        mirror.close().unwrap();
        assert_eq!(memory.load(SUBJECT), [7, 8, 0]);
    });
}

/// W2: where pages are taken by being copied, a window is protected before; if the span ends before the copy could be made, the page is the
/// device's as it was, and it may write it.
///
/// ```text
/// device                    CPU
/// uses page 2, for writing
///                           reads page 2: past the deadline
///                           the window is protected;
///                           COPY home: EAGAIN
/// is done with page 2
///                           COPY home: both have it
/// gets page 2 for writing
/// two workers write
/// ```
///
/// Through the thread door the workers sleep, and what wakes one wakes the other: of whom the monitor must not have read yet, for it
/// would send a signal to a thread that has gone on.
#[test]
fn a_span_ends_when_its_window_is_protected_and_nothing_is_taken() {
    let name = "ladders::a_span_ends_when_its_window_is_protected_and_nothing_is_taken";
    tests::in_own_process(name, &["move"], || {
        let _watchdog = crate::watch("the ladder of the window");
        for delivery in DOORS.into_iter().filter(|_| crate::usable()) {
            let director = Director::new();
            let memory = Memory::new();
            let mirror = memory.mirror(&options(delivery));
            let device = attach_with(AttachOptions::new().span_deadline(SOON));
            let mut worker = Worker::new(&device, &mirror);
            let write = |value| Op::Write { word: 0, value };
            worker
                .access(Shape::Update, SUBJECT, write(2), None)
                .unwrap();
            let mapped = device.map(mirror.view().region()).unwrap();
            // SAFETY: the memory outlives the guard, and has no edges.
            let in_use = unsafe { mapped.begin_use(Access::Write) }.unwrap();
            std::thread::scope(|scope| {
                device.device().set_busy(true);
                set_changing(1);
                let reader = scope.spawn(|| memory.load(SUBJECT));
                while mirror.stats().changing_outcomes == 0 {
                    std::thread::yield_now();
                }
                device.device().set_busy(false);
                set_changing(0);
                assert_eq!(reader.join().unwrap(), [2, 1, 1]);
            });
            let (mapped, range, index) = worker.parts(SUBJECT);
            // The reader's bracket may have ended since.
            loop {
                let pages = index..index + 1;
                let mut update = range.start_update(&mapped, pages, IN_TIME).unwrap();
                update.fault(Access::Write).unwrap();
                let guard = device.device().lock_it();
                if update.end_update(&guard).is_ok() {
                    break;
                }
            }
            let window = memory.addr(SUBJECT).wrapping_add_signed(mapped.offset());
            two_workers_write(&director, &mirror, window);
            drop((worker, in_use));
            assert_eq!(memory.load(SUBJECT), [3, 1, 4]);
            assert_eq!(mirror.stats().anomalies, 0);
            mirror.close().unwrap();
        }
    });
}

/// Both at once, the reader of their faults stopped with the first; then the page goes home, and they are there still.
fn two_workers_write(director: &Director, mirror: &Mirror<'static, u8>, window: usize) {
    let (written, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let wait_until = |is_so: &dyn Fn() -> bool| {
        while !is_so() {
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        let _free = director.frees_all();
        director.stop(Actor::Reader, Point::FaultEntering);
        for (word, value) in [(0, 3), (2, 4)] {
            let (written, over, wait_until) = (&written, &over, &wait_until);
            scope.spawn(move || {
                let words: *mut u64 = std::ptr::with_exposed_provenance_mut(window);
                // SAFETY: the page is the device's for writing, and nobody takes it before both have written.
                unsafe { words.add(word).write_volatile(value) };
                written.fetch_add(1, SeqCst);
                wait_until(&|| over.load(SeqCst));
            });
        }
        std::thread::sleep(SOON);
        director.step(Actor::Reader);
        wait_until(&|| written.load(SeqCst) == 2);
        let pinned = mirror.pin(..).unwrap();
        director.release(Actor::Reader);
        std::thread::sleep(SOON);
        drop(pinned);
        over.store(true, SeqCst);
    });
}

/// D4: a copy in a window that translations lead to is not given up before they are taken: not either where the kernel, without MOVE, will
/// not discard the CPU's (it is locked, or unmapped this moment), so that the device is to work in place.
///
/// ```text
/// device                          CPU
/// writes page 2
///                                 reads it: both have it
///                                 mlock
/// writes: madvise(DONTNEED) is
/// refused
/// told to stop reading the window
/// writes in place
/// ```
#[test]
fn a_copy_that_is_read_is_not_given_up_for_one_in_place() {
    let name = "ladders::a_copy_that_is_read_is_not_given_up_for_one_in_place";
    tests::in_own_process(name, &["move"], || {
        let _watchdog = crate::watch("the ladder of the locked page");
        for delivery in DOORS.into_iter().filter(|_| crate::usable()) {
            let _director = Director::new();
            let memory = Memory::new();
            let mirror = memory.mirror(&options(delivery));
            let device = attach(None);
            let mut worker = Worker::new(&device, &mirror);
            let write = |value| Op::Write { word: 0, value };
            worker
                .access(Shape::Update, SUBJECT, write(2), None)
                .unwrap();
            let mapped = device.map(mirror.view().region()).unwrap();
            // SAFETY: the memory outlives the guard, and has no edges.
            let in_use = unsafe { mapped.begin_use(Access::Write) }.unwrap();
            assert_eq!(memory.load(SUBJECT), [2, 1, 1]);
            if !memory.lock(SUBJECT) {
                return;
            }
            let told = device.device().invalidations.load(SeqCst);
            worker
                .access(Shape::Update, SUBJECT, write(3), None)
                .unwrap();
            assert!(device.device().invalidations.load(SeqCst) > told);
            assert_eq!(memory.load(SUBJECT), [3, 1, 1]);
            drop((worker, in_use));
            assert_eq!(mirror.stats().anomalies, 0);
            mirror.close().unwrap();
        }
    });
}

/// M2: a marker on an empty page is lifted, and the page copied, also where it is not the first of a run.
///
/// ```text
/// CPU reads page 0: COPY home of a granule: page 0, then EEXIST
/// page 1 is not there: what protects it is lifted
/// COPY home of the rest
/// ```
#[test]
fn a_marker_in_the_middle_of_a_run_is_lifted() {
    let _watchdog = crate::watch("the ladder of the marker");
    for delivery in DOORS.into_iter().filter(|_| crate::usable()) {
        let _director = Director::new();
        let memory = Memory::sized(16);
        let mirror = memory.mirror(&options(delivery).granule(Granule::Big));
        let device = attach(None);
        let mut worker = Worker::new(&device, &mirror);
        for page in 0..16 {
            let op = Op::Write { word: 0, value: 2 };
            worker.access(Shape::Round, page, op, None).unwrap();
        }
        let mapped = device.map(mirror.view().region()).unwrap();
        // SAFETY: the memory outlives the guard, and has no edges.
        let in_use = unsafe { mapped.begin_use(Access::Read) }.unwrap();
        // While it is in use a load of the CPU copies. The memory may lie across the border of two granules, but not of more: with page 8
        // come at least the pages on one side of it.
        set_marker();
        for page in [8].into_iter().chain(0..16) {
            assert_eq!(memory.load(page), [2, 1, 1]);
        }
        assert!(has_met_marker());
        drop((worker, in_use));
        assert_eq!(mirror.stats().anomalies, 0);
        mirror.close().unwrap();
    }
}
