//! The range protocol: how a device maps a page that may be changing.
//!
//! A device fault reads the state of a page (the *snapshot*), and then, under the device's lock, establishes a translation from
//! what it read (the *commit*). In between the page may change, and change back, and everything that was to be told about
//! it may have been told. The protocol makes the commit notice. It is the one that Linux came to with the patch "mm/hmm:
//! Replace the range->valid with a seqcount" (2019) and has as `mmu_interval_notifier` since 5.5, with one step further: a
//! range waits for invalidations that overlap it, and for no others.
//!
//! The ladder that any flag instead of a number falls from (`ci/models.sh wrong::` prints this one and others):
//!
//! ```text
//! CPU 0 (device fault)                        CPU 1
//! begin
//! snapshot: version 0
//!                                             invalidate_start
//!                                             callback: wipe translations   (there are none yet)
//!                                             page changes to version 1
//!                                             invalidate_end
//! lock(device), establish translation to 0                                  <- stale
//! ```
//!
//! # Participants
//!
//! | who | what it is here | what it does |
//! |---|---|---|
//! | *range* | [`Subscription`], moved to the pages of each fault | begin → snapshot → device lock → interrupted? → commit |
//! | *invalidation* | [`Bracket`], from before a change of pages until after it | start → tell the devices → change → end |
//! | *device* | [`Listener`], or a driver's own equivalent | removes translations under the lock under which it commits them |
//! | *hub* | [`Hub`], one per region | knows the ranges and the open invalidations |
//!
//! # State
//!
//! | what | where | written | read |
//! |---|---|---|---|
//! | open invalidations: interval and `except`, 64 slots | hub, under its lock | start, end | begin, end |
//! | ranges: an interval tree | hub, under its lock | insert, remove, move | start, end, release |
//! | `is_released` | hub, under its lock | release, once | begin |
//! | `nr_waiting`, per range and in all | hub, under its lock | begin | end, release |
//! | `seq`, per range: odd, only grows, outlives the range | an atomic | under the hub's lock: += 2 by start, release, move, remove | under the hub's lock by begin; under the device's by the commit |
//! | `event`, per range: a futex word | an atomic | under the hub's lock by end and release | under the hub's lock by begin, then by the futex |
//!
//! # Rules
//!
//! 1. **Start.** In one hold of the hub's lock: remember the interval in a free slot, and add 2 to `seq` of each range that
//!    overlaps it, but `except`. With no slot free nothing is done and the caller comes again, without its locks.
//! 2. **Tell.** After the start, and before the change, every device that may have translations is told, and removes those in
//!    the interval under its lock. All are told before any is waited for.
//! 3. **Change.** Whatever makes a page present, writable or absent comes between a start and its end, even if no device
//!    maps the page.
//! 4. **End.** In one hold of the hub's lock: free the slot, and note those waiting ranges that nothing blocks any more. Then
//!    wake them; if none waits, nothing is done.
//! 5. **Begin.** In one hold of the hub's lock: if no open invalidation overlaps the range (one that excepts it aside), its
//!    `seq` is the token. Otherwise sleep until an end, and look again, until the deadline.
//! 6. **Commit.** With the device's lock held, compare `seq` with the token; equal: establish before the lock is let go of.
//! 7. **Release.** The region's teardown: in one hold of the hub's lock add 2 to every `seq`, refuse every later begin, wake all
//!    who wait. It is the start of an invalidation that does not end.
//!
//! A bracket ends exactly once: it is a guard, and panics drop it. It may end on another thread than it started on, and be kept for
//! as long as the change takes. Rules 2 and 3 are the caller's; 6 asks it to hold the right lock.
//!
//! # Why it is safe
//!
//! *Claim: at rest, a device has no translation to a page, or one to what the page is now.* Take a commit, and an
//! invalidation whose change the commit's snapshot did not see. They overlap, and the range is not its `except`. By rule 5 the
//! invalidation was not open when the range took its token:
//!
//! * It had **ended**. Then its end released the hub's lock to the begin, the change came before that end (3), and the snapshot
//!   after that begin: the snapshot saw the change. This is not the case we took.
//! * It **starts later**: in the hub lock's order its start comes after the begin, so it adds to `seq` what the token has not.
//!   Next its callback takes the device's lock (2), and the commit takes the device's lock (6), in one of two orders. The
//!   *callback first*: the addition happens before the callback, whose unlock releases it to the commit, which reads
//!   it or something later, and `seq` never returns to an earlier value; the commit does not take place. The *commit first*:
//!   the callback wipes what was committed.
//!
//! That is all the ordering there is: `seq` itself is read and written relaxed. The kernel writes `seq` in the callback, under
//! the device's lock; to write it before the callback, under the hub's, is as good, and takes each device's lock once.
//!
//! *The owner's filter.* A round that moves pages in order to commit them must not interrupt itself: it names its own range as
//! `except`. The argument above then fails for this one invalidation and this one range, and is not needed: the snapshot that
//! the range commits is taken after the round's own change, by the thread that made it. Any other invalidation in between, whoever's,
//! is an ordinary one to this range; hence a round need not even keep its lock while it waits for a device to fall quiet, so
//! long as it keeps its bracket and looks again afterwards (`models::rounds`).
//!
//! # Why it is live
//!
//! * *A begin that waits is woken.* It counts itself and reads `event` while it sees, under the hub's lock, that it is blocked.
//!   The end that unblocks it takes that lock later, sees the count and changes `event`; the futex does not sleep on a changed
//!   word, and whoever sleeps already is woken after the change.
//! * *It waits for nothing else.* A disjoint invalidation does not block a begin, nor touch `seq`, at any rate and however long it
//!   is open. Waits are counted ([`Counters`]), not only retries.
//! * *It cannot wait for ever.* Every begin has a deadline. What may keep it so long is a stream of overlapping invalidations
//!   without a gap, or a bracket that was leaked; against the former a fault excludes our own invalidations by making its round
//!   the block's only one.
//! * *A start never waits*, but for the hub's lock, which is held for the time of a search.
//! * *An interrupted commit means progress elsewhere*: an overlapping invalidation has started.
//!
//! # The invariants of the kernel's protocol, and what became of them
//!
//! | | kernel | here |
//! |---|---|---|
//! | I1 | `sub.seq` odd, idle hub even, so that a sleeper wakes | `seq` is odd, so that [`Token::NONE`] is never good; a sleeper wakes by `event`; the hub has no seq |
//! | I2 | `sub.seq` written and decided on under the device's lock | written before the callback, decided on under the device's lock: the argument above |
//! | I3 | the change is strictly inside | the same |
//! | I4 | the tree is frozen while odd; inserts and removes are deferred | start's walk of the tree is one hold of the hub's lock and calls nobody: no deferral, hence no remover that frees too early |
//! | I5 | inserted while any invalidation is active: counts as invalidated | the open ones are remembered with what they cover: a begin asks *these* |
//! | I6 | remove returns when no callback can run any more | no callback knows of ranges; who detaches a *device* waits for the open invalidations: a range over all, and its begin |
//! | I7 | a refused start undoes itself | [`invalidate_all`] calls off those told; the bracket ends by its drop |
//! | I8 | owner filter | `except`, one range |
//! | I9 | all invalidates, then all finishes | [`invalidate_all`], then [`all_quiesced`] |
//! | P1 | — | rule 3 |
//! | P3 | — | `seq` is the range's own; there is no other to take a token from |
//!
//! # What shows it
//!
//! `ci/models.sh` runs this code under loom: every schedule with up to three preemptions (two in `--quick`), the small models
//! with as many as they have use for, and every value a relaxed load may return. Each model also has to *reach* what it is
//! about. The mutation is the code broken at that place on purpose; the checker finds it, for the stated reason.
//!
//! | what | model (`models::`) | mutation that breaks it |
//! |---|---|---|
//! | I2, I3 | `fault_vs_one`, `fault_vs_one_registered`, `fault_vs_two` | `HubStartWithoutBump`, `HubBumpAtEnd`, `HubTokenReadLate` |
//! | I3 | `ended_elsewhere`, `nested` | `HubBeginWithoutWait`; `wrong::changed_after_end` |
//! | rule 2 before 3, after 1 | | `wrong::told_before_start` |
//! | the seed's ladder of three | `three_cpu_ladder` | `wrong::ValidFlag`, with and without its counter |
//! | I4, I6 | `insert_and_remove`, `growing` | `wrong::remover` |
//! | I5 | `fault_vs_one`, `moving` | `HubStartWithoutSlot`, `HubMoveWithoutTree`; `wrong::Rfc` |
//! | tokens are for one range and one place | `moving`, `slots_are_reused` | `HubMoveWithoutBump`, `HubRemoveWithoutBump` |
//! | I7 | `refusal` | `RefusalWithoutCancel`; `wrong::refused` |
//! | I8, P2 | `owner_filter`, `rounds::*` | `HubExceptsEveryone`; a bracket closed while waiting |
//! | I9 | `two_devices` | `PassesInterleaved` |
//! | P1 | `wrong::bracketed` | `wrong::unbracketed` |
//! | P3 | `token_is_not_reused` | `wrong::CountPerRange` |
//! | rule 6 | all | `wrong::Driver::ChecksBeforeLock` |
//! | rule 7 | `teardown_vs_fault`, `teardown_wakes` | `HubReleaseWithoutBump`, `HubReleaseWithoutWake` |
//! | no lost wake-up | `waiters_wake`, `two_wait_on_one_range` | `HubEndWithoutWake`, `HubWaiterNotCounted`, `HubEventReadLate`, `HubSkipsEnd` |
//! | disjoint: no wait, no retry | `disjoint_costs_nothing`, `token_is_not_reused` | asserted on the counters |
//! | no slot free | `slots_run_out` | asserted |
//! | a deadline leaves no trace | `deadline_passed` | asserted |
//!
//! Whole fault paths, which are too long for loom, run under Shuttle: all of the runtime's files but the system-call layer, over a model
//! of the kernel that acts page by page, says EAGAIN while an event is unread, zaps late, and may report an error of a page that it
//! has moved. Schedules are chosen at random and by priorities (PCT), each from a seed. `runtime/shuttle` says what is checked in each;
//! there a page has a sequential history, and an access that finds anything but what was written last fails the schedule.
//!
//! | what | scenario (`runtime/shuttle/scenarios.rs`) | mutation that breaks it |
//! |---|---|---|
//! | I2, I3, rule 3 in the fault path | `cpu_and_update`, `snapshots_and_migrations` | `CommitWithoutCheck`, `FaultWithoutBracket`, `HubStartWithoutBump` |
//! | D1: one writer, or readers | `cpu_and_device`, `two_and_two`, `shared_home`, `duplicates_and_collapse` | `InvalidateNobody`, `RoundTellsNobody`, `HomeLeavesCopies`, `ShareHomeWritable`, `UnprotectFirst`, `DuplicateUnprotected` |
//! | I9, W1: a shootdown is waited for, with no lock held | `cpu_and_span`, `granules` | `ShootdownNotAwaited`, `FinishWithoutLook` |
//! | W2: a span that outstays it | `late_spans`, `late_spans_shared`, `late_span_and_reader` | `SeveredRefilled` |
//! | W3: evictions wait for nobody, and are accounted for | `evictions`, `evictions_of_spans` | `EvictBusy`, `EvictUncounted` |
//! | far faults coalesce: one movement | `far_faults_coalesce` | `MovesAgain` |
//! | pins | `pin_and_rounds`, `unmap_shared` | `PinsAtOnce`, `UnpinTellsNobody` |
//! | teardown of a mirror, of a device | `close_and_faults`, `detach_and_faults`, `remap_and_close` | `CloseNotSeen`, `CloseWithoutGrace` |
//! | G1–G5: events | `discard`, `discard_beside_a_wait`, `unmap`, `remap`, `mapped_over`, and with pages shared | `GateStaysOpen`, `EventOverAtOnce`, `EventNotRecorded`, `GateLeaveWithoutWake`, `WaitedWithoutLook` |
//! | F1: a child finds what was written last | `fork`, `shared_with_a_child` | `ForkNotSeen` |
//! | outcomes of the kernel | `moves_that_lie`, `changing_all_the_time` | `MoveErrorBelieved` |
//! | without MOVE | `without_move`, `without_move_shared`, `without_move_evictions` | `CopyUnprotected` |
//! | the monitor | `thread_door`, `thread_door_shared`, `thread_door_discard`, `thread_door_late` | `MonitorForgetsFault` |
//! | no lost wake-up, no deadlock, no starvation | all | `HubEndWithoutWake`, `MutexForgetsSleepers` |
//!
//! Two limits of loom 0.7 that the models work around: where a thread loads and then stores it forgets the loads of others in
//! between (`sync::shim`), and it does not switch threads at an unlock, so that a lock seldom is found held.
//!
//! # What it costs
//!
//! Start: one hold of the hub's lock, a search in O(log n + overlaps). End: the same without the search unless somebody waits. Begin:
//! one hold, at most 64 comparisons. Nothing allocates but [`Subscription::insert`], and that outside the lock. No system call
//! but to sleep, and to wake one who sleeps. On a virtual machine with two x86-64 cores, uncontended: start and end together 26 ns
//! with one range, 45 ns among 64; begin 9–14 ns; move and begin 23 ns alone, 0.13 µs among 8 ranges, 0.3 µs among 64.
//!
//! # Example
//!
//! A device with one lock and a map from page to version, the complete loop:
//!
//! ```
//! use std::collections::HashMap;
//! use std::sync::Mutex;
//! use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
//! use svm::notifier::{Hub, Interval};
//! use svm::sync::Deadline;
//!
//! let hub = Hub::new();
//! let page = AtomicU32::new(0);
//! let translations = Mutex::new(HashMap::new());
//!
//! let fault = || {
//!     let range = hub.insert(Interval::new(7, 8));
//!     loop {
//!         let token = range.begin(Deadline::NEVER).expect("not torn down");
//!         let version = page.load(Relaxed); // the snapshot
//!         let mut translations = translations.lock().unwrap();
//!         if !range.interrupted(token) {
//!             translations.insert(7, version); // the commit
//!             break;
//!         }
//!     }
//! };
//! let invalidate = || {
//!     let _bracket = hub.start(Interval::new(0, 512), None).expect("a free slot");
//!     translations.lock().unwrap().retain(|page, _| *page >= 512); // the callback
//!     page.fetch_add(1, Relaxed); // the change
//! };
//!
//! std::thread::scope(|scope| {
//!     scope.spawn(|| (0..1000).for_each(|_| fault()));
//!     scope.spawn(|| (0..1000).for_each(|_| invalidate()));
//! });
//! let version = translations.lock().unwrap().get(&7).copied();
//! assert!(version.is_none() || version == Some(page.load(Relaxed)));
//! ```
#![forbid(unsafe_code)]

mod active;
mod hub;
mod interval;
mod listener;
#[cfg(all(test, svm_loom))]
pub(crate) mod models;
mod storage;
#[cfg(all(test, not(svm_loom)))]
mod tests;
mod tree;
#[cfg(all(test, svm_loom))]
mod wrong;

pub use hub::{BeginError, Bracket, Counters, Full, Hub, NoMemory, RangeKey, Subscription, Token};
pub use interval::Interval;
pub use listener::{Blocking, Listener, WouldBlock, all_quiesced, invalidate_all};
