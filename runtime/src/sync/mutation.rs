//! Faults that a model can switch on, to show that it would notice.
//!
//! A model that cannot fail proves nothing. Each variant of [`Mutation`] is one way to break the code, at the place that asks
//! [`mutated`]; `models::mutations` runs the models with each in turn and expects the checker to find a failing schedule.
//! Outside models the answer is a constant and the question compiles to nothing.

use super::shim::atomic::Ordering;

macro_rules! mutations {
    ($(#[$all_doc:meta])* $all:ident on [$cfg:meta] { $($(#[$doc:meta])* $name:ident,)* } $($rest:tt)*) => {
        mutations! { @ [$($(#[$doc])* $name,)*] [$(#[$all_doc])* $all on [$cfg] { $($name,)* }] $($rest)* }
    };
    (@ [$($variants:tt)*] [$($lists:tt)*]
     $(#[$all_doc:meta])* $all:ident on [$cfg:meta] { $($(#[$doc:meta])* $name:ident,)* } $($rest:tt)*) => {
        mutations! { @ [$($variants)* $($(#[$doc])* $name,)*] [$($lists)* $(#[$all_doc])* $all on [$cfg] { $($name,)* }] $($rest)* }
    };
    (@ [$($(#[$doc:meta])* $name:ident,)*]
       [$($(#[$all_doc:meta])* $all:ident on [$cfg:meta] { $($listed:ident,)* })*]) => {
        /// One way to break the code.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[cfg_attr(not(svm_shuttle), allow(dead_code, reason = "asked about in the code, set by models alone, and by each those it finds"))]
        pub(crate) enum Mutation {
            $($(#[$doc])* $name,)*
        }

        $(
            #[cfg($cfg)]
            impl Mutation {
                $(#[$all_doc])*
                pub(crate) const $all: &[Self] = &[$(Self::$listed),*];
            }
        )*
    };
}

mutations! {
    /// What loom finds.
    ALL on [all(test, svm_loom)] {
    /// `Mutex::lock` takes the word without acquiring what its last holder wrote.
    MutexLockRelaxed,
    /// `Mutex` unlocks without releasing what its holder wrote.
    MutexUnlockRelaxed,
    /// A locker that has waited takes the word without acquiring what its last holder wrote.
    MutexContendedRelaxed,
    /// The same of a locker that was just about to give up.
    MutexTimedOutRelaxed,
    /// A locker that finds the lock held goes on as though it were not.
    MutexBarges,
    /// A locker sleeps without marking the word, so that nobody wakes it.
    MutexForgetsSleepers,
    /// `WaitQueue::wake_all` looks for sleepers before the condition is sure to be seen.
    WakeWithoutFence,
    /// A waiter looks at the condition again before its announcement is sure to be seen.
    WaitWithoutFence,
    /// A waiter sleeps without looking at the condition again after it has announced itself.
    WaitWithoutSecondLook,
    /// `Gate::enter` does not look at the gate again after it has counted itself.
    GateEnterWithoutSecondLook,
    /// `Gate::enter` looks at the gate first and counts itself afterwards, unordered.
    GateEnterWithoutFence,
    /// `Gate::enter` goes on without acquiring what the last closer wrote.
    GateEnterRelaxed,
    /// `Gate::close` looks at the sections before the closing is sure to be seen.
    GateCloseWithoutFence,
    /// A section leaves without releasing what it wrote.
    GateLeaveRelaxed,
    /// A section leaves without waking the closer that waits for it.
    GateLeaveWithoutWake,
    /// A section looks for a closer that waits before its leaving is sure to be seen.
    GateLeaveWithoutFence,
    /// A closer sees that all sections have left without acquiring what they wrote.
    GateDrainRelaxed,
    /// A gate opens without releasing what its closer wrote.
    GateOpenRelaxed,
    /// A gate opens and leaves those asleep who wait for it.
    GateOpenWithoutWake,
    /// A grace period looks at the sections before the turn of the phase is sure to be seen.
    GateChangeWithoutFence,
    /// `Gate::synchronize` does not wait for the sections of the old phase.
    GateSynchronizeWithoutWait,
    /// A copier ends though somebody holds it.
    CopierEndsHeld,
    /// A copier ends without acquiring what was done while it was held.
    CopierEndRelaxed,
    /// A copier is let go of without releasing what was done while it was held.
    CopierHoldRelaxed,
    /// A copier begins without releasing its range.
    CopierBeginRelaxed,
    /// `Hub::start` does not bump the overlapping ranges.
    HubStartWithoutBump,
    /// `Hub::start` bumps all ranges.
    HubStartBumpsAll,
    /// `Hub::start` goes on without a slot where none is free.
    HubFullGoesOn,
    /// `Hub::interrupt` bumps nothing.
    HubInterruptWithoutBump,
    /// `Hub::start` does not remember the invalidation, so that `begin` does not wait for it.
    HubStartWithoutSlot,
    /// `Hub::start` skips the excepted range's neighbours as well.
    HubExceptsEveryone,
    /// The bump is made when the invalidation ends.
    HubBumpAtEnd,
    /// A bracket goes without its end.
    HubSkipsEnd,
    /// The end of one invalidation ends all that are open.
    HubEndEndsAll,
    /// Of the threads that wait on one range, one is woken.
    HubWakesOne,
    /// A waiter that has given up is counted still.
    HubTimeoutStaysCounted,
    /// `begin` waits for all open invalidations.
    HubBeginWaitsForAll,
    /// The storage is grown without a look whether somebody else has grown it meanwhile.
    HubGrowsTwice,
    /// The end of an invalidation wakes nobody.
    HubEndWithoutWake,
    /// A waiter is not counted, so that the end of an invalidation sees none.
    HubWaiterNotCounted,
    /// The waiter reads the event after it has let go of the hub, so that an end in between is lost.
    HubEventReadLate,
    /// `begin` does not wait.
    HubBeginWithoutWait,
    /// `begin` reads its token after it has let go of the hub.
    HubTokenReadLate,
    /// `move_to` keeps the old token good.
    HubMoveWithoutBump,
    /// `move_to` leaves the range in the tree where it was.
    HubMoveWithoutTree,
    /// A removed range's tokens stay good.
    HubRemoveWithoutBump,
    /// `release` leaves tokens good.
    HubReleaseWithoutBump,
    /// `release` leaves waiters asleep.
    HubReleaseWithoutWake,
    /// A refused invalidation does not undo the listeners that had taken part.
    RefusalWithoutCancel,
    /// The first pass goes on to the second before all have been told.
    PassesInterleaved,
    }

    /// What Shuttle finds, on whole fault paths.
    PATHS on [svm_shuttle] {
    /// A CPU fault changes the page table outside every bracket.
    FaultWithoutBracket,
    /// `end_update` does not look whether the update was interrupted.
    CommitWithoutCheck,
    /// Devices are not told of what happens to pages they hold.
    InvalidateNobody,
    /// A device round does not tell the other devices.
    RoundTellsNobody,
    /// Nobody waits for accesses in flight.
    ShootdownNotAwaited,
    /// A fault that has waited goes on without a look at what has changed meanwhile.
    FinishWithoutLook,
    /// A device round that has waited goes on though the kernel has begun to discard what it wants.
    WaitedWithoutLook,
    /// A page comes home, and other devices' copies of it stay current.
    HomeLeavesCopies,
    /// An EEXIST or ENOENT of MOVE is believed.
    MoveErrorBelieved,
    /// Where a movement stops for a change of mappings, it is not looked whether the page has moved.
    ChangeHidesMove,
    /// A collapse lets the CPU write before the devices' copies are invalidated.
    UnprotectFirst,
    /// A CPU read of a device's page gets a copy that it may write.
    ShareHomeWritable,
    /// A page is copied over a stale one without being write-protected first.
    DuplicateUnprotected,
    /// A page whose pin is not complete is given to devices in place.
    PinsAtOnce,
    /// A pin ends, and devices keep their translations in place.
    UnpinTellsNobody,
    /// A round does not see that the mirror is being closed.
    CloseNotSeen,
    /// A close does not wait for the rounds that have not seen it.
    CloseWithoutGrace,
    /// An eviction does not pass over a victim with an access in flight.
    EvictBusy,
    /// An eviction does not give the memory back.
    EvictUncounted,
    /// A page is copied to an empty place of the window without being write-protected first.
    CopyUnprotected,
    /// A round does not see that a fork is being prepared.
    ForkNotSeen,
    /// A round does not see that another has moved the page meanwhile.
    MovesAgain,
    /// The monitor does not put a fault aside that has to wait.
    MonitorForgetsFault,
    /// The directory is not told that pages were unmapped or moved.
    EventNotRecorded,
    /// Window pages that were taken from under a span are filled again while it is open.
    SeveredRefilled,
    /// The gate is not closed while an event is read and applied.
    GateStaysOpen,
    /// What an event was about counts as over before the kernel has done it.
    EventOverAtOnce,
    }
}

#[cfg(not(any(svm_loom, svm_shuttle, svm_points)))]
mod switch {
    use super::Mutation;

    #[inline(always)]
    pub(crate) const fn mutated(_: Mutation) -> bool {
        false
    }
}

#[cfg(svm_loom)]
mod switch {
    use super::Mutation;
    use std::cell::Cell;

    std::thread_local! {
        // All threads of a model are run by the one that runs the model; tests beside it are other threads.
        static ACTIVE: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    pub(crate) fn mutated(mutation: Mutation) -> bool {
        ACTIVE.get() == Some(mutation)
    }

    /// Runs `body` with `mutation` switched on.
    #[cfg(test)]
    pub(crate) fn with_mutation<R>(mutation: Mutation, body: impl FnOnce() -> R) -> R {
        struct Off;
        impl Drop for Off {
            fn drop(&mut self) {
                ACTIVE.set(None);
            }
        }
        let _off = Off;
        ACTIVE.set(Some(mutation));
        body()
    }
}

#[cfg(any(svm_shuttle, svm_points))]
mod switch {
    use super::Mutation;
    use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    /// The number of the active one, plus one.
    static ACTIVE: AtomicUsize = AtomicUsize::new(0);

    pub(crate) fn mutated(mutation: Mutation) -> bool {
        ACTIVE.load(Relaxed) == mutation as usize + 1
    }

    /// Switches `mutation` on, for good.
    pub(crate) fn mutate(mutation: Mutation) {
        ACTIVE.store(mutation as usize + 1, Relaxed);
    }
}

#[cfg(any(svm_shuttle, svm_points))]
pub(crate) use switch::mutate;
pub(crate) use switch::mutated;
#[cfg(all(test, svm_loom))]
pub(crate) use switch::with_mutation;

/// `right`, or `Relaxed` where a model has weakened it.
#[inline(always)]
pub(crate) fn ordering(right: Ordering, weakened_by: Mutation) -> Ordering {
    if mutated(weakened_by) {
        Ordering::Relaxed
    } else {
        right
    }
}
