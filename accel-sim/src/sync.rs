//! What the shootdown handshake needs of the machine, in one place.
//!
//! [`shootdown`](crate::shootdown) and [`table`](crate::table) name their atomics and fences through this module alone.
//! The models in `tests/models.rs` include those two files as they are and put loom's types, and the switch that breaks
//! one rule at a time, behind the same names.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};

/// The hit path's half of the asymmetric fence, where [`heavy_fence`] is known to be a membarrier.
#[inline(always)]
pub(crate) fn compiler_fence() {
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
}

/// The hit path's half of the asymmetric fence: the compiler keeps the order, the processor need not. (Without membarrier(2) it is
/// a full fence.)
///
/// Pairs with [`heavy_fence`].
#[inline(always)]
pub(crate) fn light_fence() {
    svm::light_barrier();
}

/// The shootdown's half: every thread of the process passes through a full fence before this returns.
///
/// A thread that was before its [`light_fence`] then sees all that we wrote; one that was past it has its earlier
/// writes seen by us.
#[inline]
pub(crate) fn heavy_fence() {
    svm::heavy_barrier();
}

/// Whether the rule is broken on purpose: never, outside the models.
#[inline(always)]
pub(crate) const fn broken(_: Rule) -> bool {
    false
}

/// `right`, or a relaxed ordering where a model has broken the rule: never, outside the models.
#[inline(always)]
pub(crate) const fn ordering(right: Ordering, _: Rule) -> Ordering {
    right
}

/// The rules that the models break one at a time, to show that each is needed (and that the models can fail).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "what only the models break is named nowhere else")]
pub(crate) enum Rule {
    /// A worker publishes before it checks.
    PublishFirst,
    /// What was published for a check that failed is withdrawn.
    Withdraws,
    /// A fence stands between the publication and the check.
    WorkerFence,
    /// A fence stands between the clearing of the bits and the look at the workers.
    ShooterFence,
    /// The flush generation is bumped after the bits are cleared, not before.
    BumpAfterClear,
    /// The epoch covers the access, not only the look-up.
    CoverAccess,
    /// Element mode is entered with a fence.
    ModeFence,
    /// A cached translation carries the generation read before the walk, not after.
    StampBeforeWalk,
    /// A right is set with a Release, after what it leads to.
    InstallRelease,
    /// A right is read with an Acquire, before what it leads to.
    RightAcquire,
    /// A page's place is set before its right.
    PlaceFirst,
    /// A page's place stays when its right goes.
    PlaceStays,
    /// A span is closed with a Release.
    CloseRelease,
    /// An element access ends with a Release.
    AccessRelease,
    /// A shooter looks at the slots with an Acquire.
    LookAcquire,
    /// Element mode is left with a Release.
    ModeRelease,
    /// A shooter looks for element mode with an Acquire.
    ModeAcquire,
    /// The generation is bumped with a Release.
    BumpRelease,
    /// The generation is read with an Acquire.
    GenerationAcquire,
    /// A shooter waits for what intersects, and for nothing else.
    Intersects,
    /// A shooter that lets readers stay waits for writers alone.
    WritersAlone,
}
