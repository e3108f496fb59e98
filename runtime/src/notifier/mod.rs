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
//! | `seq`, per range: odd, only grows, outlives the range | an atomic | under the hub's lock: += 2 by start, interrupt, release, move, remove | under the hub's lock by begin; under the device's by the commit |
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
//! 8. **Interrupt.** Where no slot is free and the caller may not come again: in one hold of the hub's lock add 2 to `seq` of each range
//!    that overlaps. It is a start that is not remembered: rules 2 and 3 hold for it, but no begin waits for its end. So the caller sees
//!    to it that from before the interrupt until the change is over no snapshot of these pages is taken.
//!
//! A bracket ends exactly once: it is a guard, and panics drop it. It may end on another thread than it started on, and be kept for
//! as long as the change takes. Rules 2 and 3 are the caller's, and so is the second half of 8; 6 asks it to hold the right lock.
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
//! *Without a bracket.* After an [`interrupt`](Hub::interrupt) (rule 8) a begin is not held up, and its token stays good. Take a commit
//! whose snapshot did not see the change. If its begin came before the interrupt, the case is that of the later start above. If it came
//! after, so did its snapshot, which is not taken before the change is over: it has seen it, and this is not the case we took. The one
//! caller is the reader of the kernel's events. It interrupts, tells and records inside the closed gate (`sync::gate`), inside whose
//! sections alone snapshots are taken; and what the kernel is at work on still when the gate opens is marked pending in the
//! directory, which gives no round these pages.
//!
//! # Each ordering, and its pair
//!
//! What is not here is relaxed, and says why where it is. *Model* is under which a weaker one fails (all in *What shows it*).
//!
//! | ordering | where | its pair | so that | model, mutation |
//! |---|---|---|---|---|
//! | Acquire | `Mutex::lock`: compare-exchange, and the two swaps of who has waited | Release, `Mutex::unlock` | a holder sees what the last one wrote: all of this module's state | `mutex_excludes`, `mutex_gives_up`: `MutexLockRelaxed`, `MutexContendedRelaxed`, `MutexTimedOutRelaxed`, `MutexUnlockRelaxed` |
//! | the device's lock | [`interrupted`](Subscription::interrupted) under it, `seq` relaxed | the callback takes it after the start | the commit sees the start, or the callback the translation | all: `wrong::Driver::ChecksBeforeLock`, `wrong::told_before_start` |
//! | the hub's lock | begin reads `seq` and `event` under it | start and end write them under it | a token is never older than what its begin saw; a sleeper's word is never newer | `fault_vs_one_registered`: `HubTokenReadLate`; `waiters_wake`: `HubEventReadLate` |
//! | the futex's bucket | "compare, then sleep" | "change, then wake" | no end is slept through | `waiters_wake`; by the kernel's word outside models |
//! | SeqCst fence (A) | `WaitQueue::wait_until`, between announcement and second look | SeqCst fence (B), `wake_all`, between condition and look for sleepers | one sees the other | `wait_queue_wakes`: `WaitWithoutFence`, `WaitWithoutSecondLook`, `WakeWithoutFence` |
//! | SeqCst ×2 | a section: count, then `state` | SeqCst ×2: closer or grace period: `state`, then counts | the section backs out, or is waited for | `gate_closes`, `gate_grace_period`: `GateEnterWithoutFence`, `GateEnterWithoutSecondLook`, `GateCloseWithoutFence`, `GateChangeWithoutFence` |
//! | SeqCst ×2 | a leaver: count, then `draining` | store of `draining`, fence (A), count | the closer sees it gone, or is woken | `gate_closes`: `GateLeaveWithoutFence`, `GateLeaveWithoutWake` |
//! | Release, within SeqCst | a section's leaving | Acquire, within SeqCst, of the drain | the closer sees what sections did | `gate_hands_over`: `GateLeaveRelaxed`, `GateDrainRelaxed` |
//! | Release | `Closed::drop` | Acquire, within SeqCst, of the section's second look | sections see what the closer did | `gate_closes`: `GateOpenRelaxed`, `GateEnterRelaxed` |
//! | Release | `Copiers::begin` | Acquire, `Copiers::let_go_on` | who holds a copier reads its range | `copiers_are_held`: `CopierBeginRelaxed` |
//! | Release | `Copiers::let_go_on` | Acquire, `Copier::let_go` | what was done while it was held comes before what the copier does next | `copiers_are_held`: `CopierHoldRelaxed`, `CopierEndRelaxed` |
//! | Release | `Copier::drop` | Acquire, `Copiers::begin` | a range is read before the next one is written | `copiers_are_held` has two; loom never has a store overtake a load, so no weaker one fails |
//! | `OnceLock` of `std` | a segment of ranges is published | `get` | who has an index finds its word | not modelled: loom does not see into `std` |
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
//! # What differs from the kernel's, and why
//!
//! *A userfaultfd gives half of each bracket.* In the kernel whoever changes a page table calls `invalidate_start` before and
//! `invalidate_end` after, on its own thread. A process that watches its own memory has that for changes which it makes itself: movements
//! of pages ([`Bracket`] in the fault path) and the calls [`madvise`](crate::madvise()), [`munmap`](crate::munmap()),
//! [`mremap`](crate::mremap()) and [`mprotect`](crate::mprotect()). Of what others do it is told once, by an event, and at the wrong time:
//!
//! | change | the event comes | missing | what stands for it |
//! |---|---|---|---|
//! | `MADV_DONTNEED`, `MADV_REMOVE`, `MADV_FREE` | before; its caller goes on when it is read | the end | the bracket stays open, and the pages are pending, until nothing of them is present, or for a bounded time |
//! | `munmap`, `mremap` | after; the address may have another owner already | the start | the gate: nobody acts on the old picture between the reading of the event and its application. A device may use a stale translation until then, for which it is [paused](crate::Device::pause) |
//! | `mprotect`, a guard marker, an edge's mapping | never | both | looked up at each fault, at the beginning of a launch, and by copies that answer with an error |
//!
//! *The rest is choice.* The kernel's counter of active invalidations makes every range wait for all of them, and here every CPU fault is
//! one; so the open ones are remembered with what they cover (I5), and a range has its own number (P3). No callback runs while the tree is
//! walked, so that nothing is deferred (I4, I6). A CPU fault, which the kernel serves without a bracket where no notifier is concerned, has
//! one always (P1), since the hub cannot know who is about to begin.
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
//! | I1: a sleeper wakes | `fault_vs_one`, `waiters_wake` | `HubSkipsEnd`, `HubEndWithoutWake` |
//! | I1: no token of no update is good | unit test `no_range_says_yes_to_no_token` | asserted |
//! | I2, I3 | `fault_vs_one`, `fault_vs_one_registered`, `fault_vs_two` | `HubStartWithoutBump`, `HubBumpAtEnd`, `HubTokenReadLate` |
//! | I3 | `ended_elsewhere`, `nested` | `HubBeginWithoutWait`, `HubEndEndsAll`; `wrong::changed_after_end` |
//! | rule 1: no slot free | `slots_run_out` | `HubFullGoesOn` |
//! | rule 2 before 3, after 1 | all | `wrong::told_before_start`; in rounds `RoundTellsNobody` |
//! | the seed's ladder of three | `three_cpu_ladder` | `HubStartBumpsAll`; `wrong::ValidFlag`, with and without its counter |
//! | I4, I6 | `insert_and_remove`, `growing` | `HubStartWithoutSlot`, `HubGrowsTwice`; `wrong::remover` |
//! | I5 | `fault_vs_one`, `moving` | `HubStartWithoutSlot`, `HubMoveWithoutTree`; `wrong::Rfc` |
//! | tokens are for one range and one place | `moving`, `slots_are_reused` | `HubMoveWithoutBump`, `HubRemoveWithoutBump` |
//! | I7 | `refusal` | `RefusalWithoutCancel`; `wrong::refused` |
//! | I8, P2 | `owner_filter`, `rounds::device_vs_device` | `HubExceptsEveryone` |
//! | I9 | `two_devices` | `PassesInterleaved` |
//! | P1 | `wrong::bracketed` | `wrong::unbracketed` |
//! | P3 | `token_is_not_reused` | `HubStartWithoutBump`; `wrong::CountPerRange` |
//! | rule 6 | all | `wrong::Driver::ChecksBeforeLock` |
//! | rule 7 | `teardown_vs_fault`, `teardown_wakes` | `HubReleaseWithoutBump`, `HubReleaseWithoutWake` |
//! | rule 8 | `interrupt_behind_a_gate` | `HubInterruptWithoutBump`, `GateStaysOpen` |
//! | no lost wake-up | `waiters_wake`, `two_wait_on_one_range` | `HubEndWithoutWake`, `HubWaiterNotCounted`, `HubEventReadLate`, `HubSkipsEnd`, `HubWakesOne` |
//! | disjoint: no wait, no retry | `disjoint_costs_nothing`, `token_is_not_reused` | `HubStartBumpsAll`, `HubBeginWaitsForAll` |
//! | a deadline leaves no trace | `deadline_passed` | `HubTimeoutStaysCounted` |
//! | W3: a bracket is kept where the block is let go of | `rounds::device_vs_cpu` | a bracket closed while waiting |
//! | a token older than its round | `rounds::update_vs_cpu` | `HubStartWithoutBump` |
//! | far faults coalesce: one round a block at a time | `rounds::worker_vs_worker` | `MovesAgain` |
//! | D1: one writer, or readers | `rounds::readers_vs_cpu`, `rounds::writer_vs_readers` | `HomeLeavesCopies`, `RoundTellsNobody` |
//! | D2, D3, and a look after the wait | `rounds::everybody` | `FinishWithoutLook` |
//!
//! `rounds` is on the real directory (`block.rs`: its plan and its transitions, under the real lock) and the real hub. What it has copies
//! of is the order of steps in `round`, `fault` and `movement`; these files themselves run under Shuttle, below.
//!
//! | primitive | model (`sync::models::`) | mutation that breaks it |
//! |---|---|---|
//! | lock: alone, ordered, nobody left asleep | `mutex_excludes` | `MutexLockRelaxed`, `MutexUnlockRelaxed`, `MutexContendedRelaxed`, `MutexForgetsSleepers` |
//! | lock: giving up | `mutex_gives_up` | `MutexTimedOutRelaxed` |
//! | wait queue: no lost wake-up | `wait_queue_wakes`, `wait_queue_wakes_all` | `WakeWithoutFence`, `WaitWithoutFence`, `WaitWithoutSecondLook` |
//! | gate, rules 1 to 3: closed is alone | `gate_closes`, `gate_has_one_closer` | `GateEnterWithoutSecondLook`, `GateEnterWithoutFence`, `GateCloseWithoutFence`, `MutexBarges` |
//! | gate: what one side wrote the other sees | `gate_closes`, `gate_hands_over` | `GateEnterRelaxed`, `GateOpenRelaxed`, `GateLeaveRelaxed`, `GateDrainRelaxed` |
//! | gate: nobody is left asleep | `gate_closes` | `GateLeaveWithoutWake`, `GateLeaveWithoutFence`, `GateOpenWithoutWake` |
//! | copies that are waited for: who looks at one holds it | `copiers_are_held` | `CopierEndsHeld`, `CopierBeginRelaxed`, `CopierHoldRelaxed`, `CopierEndRelaxed` |
//! | gate, rule 4: grace periods | `gate_grace_period`, `gate_grace_periods_follow` | `GateSynchronizeWithoutWait`, `GateChangeWithoutFence`, `GateEnterWithoutSecondLook` |
//!
//! The other half of an invalidation, that no access is in flight when the page goes, is the device's. `accel-sim` has it as the shootdown
//! handshake, with models of its own (`accel-sim/tests/models.rs`), whose rules are broken by `Rule`:
//!
//! | rule of `shootdown.rs`, `table.rs` | model | `Rule` that breaks it |
//! |---|---|---|
//! | S1 publish, fence, check; all spans or none | `span_against_shootdown`, `item_against_shootdown` | `PublishFirst`, `WorkerFence`, `Withdraws` |
//! | S2 clear, bump, fence, look | `span_against_shootdown`, `hits_against_shootdown`, `fill_against_shootdown`, `mode_against_shootdown` | `ShooterFence`, `BumpAfterClear`, `BumpRelease`, `GenerationAcquire`, `LightFence`, `ModeFence`, `ModeRelease`, `ModeAcquire` |
//! | S3 only what intersects is waited for | `unrelated_spans_do_not_wait` | `Intersects`, `WritersAlone` |
//! | S4 the epoch covers the access | `hits_against_shootdown`, `span_against_shootdown` | `CoverAccess`, `CloseRelease`, `AccessRelease`, `LookAcquire` |
//! | S5 the generation is read before the walk | `fill_against_shootdown` | `StampBeforeWalk` |
//! | S6 no access begins while paused | `span_against_pause`, `elements_against_pause` | `SeesPause` |
//! | T2 a right comes with its place and contents | `install_against_span`, `clear_against_span` | `InstallRelease`, `RightAcquire`, `PlaceFirst`, `PlaceStays` |
//!
//! Whole fault paths, which are too long for loom, run under Shuttle: all of the runtime's files but the system-call layer, over a model
//! of the kernel that acts page by page, says EAGAIN while an event is unread, zaps late, and may report an error of a page that it
//! has moved. Schedules are chosen at random and by priorities (PCT), each from a seed. `runtime/shuttle` says what is checked in each;
//! there a page has a sequential history, and an access that finds anything but what was written last fails the schedule.
//!
//! | what | scenario (`runtime/shuttle/scenarios/`) | mutation that breaks it |
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
//! | outcomes of the kernel | `moves_that_lie`, `changing_all_the_time` | `MoveErrorBelieved`, `ChangeHidesMove` |
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
