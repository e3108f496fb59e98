//! What the actors do, and which ways of breaking the code each scenario finds. Here is the list.

mod changes;
mod kernels;
mod late;
mod rounds;

use crate::sync::mutation::Mutation;
use crate::world::World;
use changes::{
    discard, discard_beside_a_wait, discard_shared, fork, mapped_over, remap, remap_and_close,
    remap_shared, unmap, unmap_shared,
};
use kernels::{
    changing_all_the_time, moves_that_lie, shared_with_a_child, thread_door, thread_door_discard,
    thread_door_late, thread_door_shared, without_move, without_move_evictions,
    without_move_shared,
};
use late::{late_span_and_reader, late_spans, late_spans_shared};
use rounds::{
    close_and_faults, cpu_and_device, cpu_and_span, cpu_and_update, detach_and_faults,
    duplicates_and_collapse, evictions, evictions_of_spans, far_faults_coalesce, granules,
    pin_and_rounds, shared_home, snapshots_and_migrations, two_and_two,
};
use shuttle::thread::JoinHandle;
use std::sync::Arc;

/// What some threads do; each schedule of it must hold.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) run: fn(),
}

/// A way of breaking the code, where it is found, and as what.
pub(crate) struct Mutated {
    pub(crate) mutation: Mutation,
    pub(crate) scenario: &'static str,
    /// One of these is in what the failing schedule says.
    pub(crate) reasons: &'static [&'static str],
}

macro_rules! scenarios {
    ($($name:ident)*) => {
        pub(crate) const SCENARIOS: &[Scenario] =
            &[$(Scenario { name: stringify!($name), run: $name }),*];
    };
}

macro_rules! mutations {
    ($($mutation:ident in $scenario:ident: $($reason:literal)|*;)*) => {
        pub(crate) const MUTATIONS: &[Mutated] = &[$(Mutated {
            mutation: Mutation::$mutation,
            scenario: stringify!($scenario),
            reasons: &[$($reason),*],
        }),*];
    };
}

scenarios! {
    cpu_and_device
    cpu_and_update
    cpu_and_span
    two_and_two
    duplicates_and_collapse
    shared_home
    far_faults_coalesce
    granules
    evictions
    evictions_of_spans
    pin_and_rounds
    close_and_faults
    detach_and_faults
    moves_that_lie
    changing_all_the_time
    shared_with_a_child
    discard
    discard_shared
    discard_beside_a_wait
    unmap
    unmap_shared
    remap
    remap_shared
    remap_and_close
    mapped_over
    late_spans
    late_spans_shared
    late_span_and_reader
    thread_door_late
    fork
    snapshots_and_migrations
    without_move
    without_move_shared
    without_move_evictions
    thread_door
    thread_door_shared
    thread_door_discard
}

mutations! {
    FaultWithoutBracket in cpu_and_update: "was written last" | "empty page" | "write-protected page";
    CommitWithoutCheck in cpu_and_update: "was written last" | "empty page" | "write-protected page";
    InvalidateNobody in cpu_and_device: "was written last" | "empty page";
    RoundTellsNobody in two_and_two: "was written last" | "empty page";
    ShootdownNotAwaited in cpu_and_span: "was written last" | "empty page" | "write-protected page";
    WaitedWithoutLook in discard_beside_a_wait: "was written last" | "empty page" | "is away, and present";
    FinishWithoutLook in cpu_and_span: "anomalies" | "is killed" | "was written last" | "empty page";
    HomeLeavesCopies in two_and_two: "was written last" | "the CPU may write it";
    MoveErrorBelieved in moves_that_lie: "was written last" | "anomalies" | "is killed" | "fails" | "in the window" | "starved";
    ChangeHidesMove in moves_that_lie: "was written last" | "anomalies" | "is killed" | "in the window" | "empty page";
    UnprotectFirst in duplicates_and_collapse: "was written last" | "the CPU may write it";
    ShareHomeWritable in shared_home: "was written last" | "the CPU may write it";
    DuplicateUnprotected in duplicates_and_collapse: "was written last" | "the CPU may write it";
    PinsAtOnce in unmap_shared: "deadlock";
    UnpinTellsNobody in pin_and_rounds: "empty page" | "a pin fails" | "was written last";
    CloseNotSeen in close_and_faults: "the close fails" | "empty page" | "not given back" | "was written last" | "Lost";
    CloseWithoutGrace in close_and_faults: "the close fails" | "empty page" | "not given back" | "was written last" | "Lost";
    EvictBusy in evictions_of_spans: "empty page" | "was written last";
    EvictUncounted in evictions: "not given back" | "starved" | "steps";
    CopyUnprotected in without_move: "was written last" | "the CPU may write it";
    ForkNotSeen in fork: "what the child finds";
    MovesAgain in far_faults_coalesce: "moved more than once" | "below zero" | "empty page" | "was written last";
    MonitorForgetsFault in thread_door: "deadlock";
    EventNotRecorded in mapped_over: "a device has it" | "was written last" | "empty page" | "anomalies";
    SeveredRefilled in late_span_and_reader: "was written last" | "anomalies" | "empty page";
    GateStaysOpen in discard: "was written last" | "empty page";
    EventOverAtOnce in discard: "was written last" | "empty page" | "anomalies" | "is away, and present" | "is killed";
    // What loom finds in the small is found in the large as well.
    HubStartWithoutBump in cpu_and_update: "was written last" | "empty page";
    HubEndWithoutWake in cpu_and_update: "deadlock";
    MutexForgetsSleepers in cpu_and_device: "deadlock";
    GateLeaveWithoutWake in discard: "deadlock";
}

/// Waits for all of them, then ends the world.
fn join(world: Arc<World>, threads: impl IntoIterator<Item = JoinHandle<()>>) {
    for thread in threads {
        thread
            .join()
            .expect("a thread that panics ends the program");
    }
    world.finish();
}
