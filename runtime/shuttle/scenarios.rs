//! What the actors do, and which ways of breaking the code each scenario finds.

use crate::error::Access::{Read, Write};
use crate::kernel::Quirks;
use crate::options::{Delivery, Granule};
use crate::sync::mutation::Mutation;
use crate::world::{Setup, Style, World};
use shuttle::thread::JoinHandle;
use std::sync::Arc;
use std::time::Duration;

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

/// A CPU and a device write and read one page: it goes back and forth.
fn cpu_and_device() {
    let world = World::new(Setup::default());
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.write(0);
            w.read(0);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.read(0);
            d.write(0);
        }),
    ];
    join(world, threads);
}

/// The same with the token taken outside the block's lock, so that only the protocol keeps the commit right.
fn cpu_and_update() {
    let world = World::new(Setup::default());
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.write(0);
            w.read(0);
        }),
        world.worker(0, Style::Update, |d| {
            d.read(0);
            d.write(0);
            d.write(0);
        }),
    ];
    join(world, threads);
}

/// The same with accesses that a shootdown has to wait for, bracket open and no lock held.
fn cpu_and_span() {
    let world = World::new(Setup {
        granule: Granule::Big,
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.read(0);
        }),
        world.cpu(|w| {
            w.read(0);
            w.write(1);
        }),
        world.worker(0, Style::Span, |d| {
            d.write(0);
            d.read(1);
            d.write(0);
        }),
    ];
    join(world, threads);
}

/// Two CPUs and two devices on one page.
fn two_and_two() {
    let world = World::new(Setup {
        nr_devices: 2,
        nr_pages: 1,
        in_use: true,
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.read(0);
        }),
        world.cpu(|w| {
            w.read(0);
            w.write(0);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.read(0);
        }),
        world.worker(1, Style::Span, |d| {
            d.read(0);
            d.write(0);
            d.read(0);
        }),
    ];
    join(world, threads);
}

/// Devices that mostly read get duplicates; the CPU's writes collapse them; the device copies over what has become stale.
fn duplicates_and_collapse() {
    let world = World::new(Setup {
        nr_devices: 2,
        read_mostly: true,
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.write(0);
            w.write(0);
        }),
        world.worker(0, Style::Locked, |d| {
            d.read(0);
            d.read(0);
            d.read(0);
        }),
        world.worker(1, Style::Span, |d| {
            d.read(0);
            d.read(0);
        }),
    ];
    join(world, threads);
}

/// While a launch goes on, a load of the CPU shares the device's page, protected from its first instant.
fn shared_home() {
    let world = World::new(Setup {
        in_use: true,
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| {
            w.read(0);
            w.read(0);
        }),
        world.cpu(|w| {
            w.write(0);
            w.read(0);
            w.write(0);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.read(0);
            d.write(0);
        }),
    ];
    join(world, threads);
}

/// Workers of one device that fault on the same page: it moves once, and the others find it there.
fn far_faults_coalesce() {
    let world = World::new(Setup {
        nr_pages: 1,
        ..Setup::default()
    });
    world.write(0);
    let threads: Vec<_> = [Style::Locked, Style::Update, Style::Span]
        .into_iter()
        .map(|style| world.worker(0, style, |d| d.write(0)))
        .collect();
    for thread in threads {
        thread
            .join()
            .expect("a thread that panics ends the program");
    }
    let stats = world.stats();
    assert_eq!(stats.to_device_pages(), 1, "the page moved more than once");
    assert_eq!(stats.to_host_pages(), 0, "the page came home");
    join(world, []);
}

/// Faults move more than the page they are for.
fn granules() {
    let world = World::new(Setup {
        nr_pages: 4,
        granule: Granule::Big,
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.read(3);
            w.write(1);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(2);
            d.read(0);
        }),
        world.worker(0, Style::Update, |d| {
            d.read(1);
            d.write(3);
        }),
    ];
    join(world, threads);
}

/// A device with memory for less than it works on.
fn evictions() {
    let world = World::new(Setup {
        nr_pages: 3,
        memory: Some(2),
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.write(1);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.write(1);
            d.write(2);
            d.read(0);
        }),
    ];
    join(world, threads);
}

/// Two workers, memory for one page, and accesses that an eviction must not interrupt.
fn evictions_of_spans() {
    let world = World::new(Setup {
        memory: Some(1),
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| w.read(0)),
        world.worker(0, Style::Span, |d| {
            d.write(0);
            d.read(0);
        }),
        world.worker(0, Style::Span, |d| {
            d.write(1);
            d.write(0);
        }),
    ];
    join(world, threads);
}

/// Pages are pinned for a system call while devices work on them.
fn pin_and_rounds() {
    let world = World::new(Setup {
        nr_devices: 2,
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| {
            w.with_pinned(0..2);
            w.write(0);
        }),
        world.worker(0, Style::Span, |d| {
            d.write(0);
            d.read(1);
            d.write(0);
        }),
        world.worker(1, Style::Locked, |d| {
            d.write(1);
            d.write(0);
        }),
    ];
    join(world, threads);
}

/// The mirror is closed while the CPU faults and devices are at work.
fn close_and_faults() {
    let world = World::new(Setup {
        nr_devices: 2,
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| w.close()),
        world.cpu(|w| {
            w.write(0);
            w.read(1);
        }),
        world.worker(0, Style::Span, |d| {
            d.try_access(0, Write);
            d.try_access(1, Write);
        }),
        world.worker(1, Style::Update, |d| {
            d.try_access(0, Write);
            d.try_access(0, Read);
        }),
    ];
    join(world, threads);
}

/// A device is detached while the CPU and another device fault on what it has.
fn detach_and_faults() {
    let world = World::new(Setup {
        nr_devices: 2,
        ..Setup::default()
    });
    let first = world.worker(1, Style::Locked, |d| {
        d.write(0);
        d.write(1);
    });
    first.join().expect("a thread that panics ends the program");
    let threads = [
        world.cpu(|w| w.detach()),
        world.cpu(|w| {
            w.write(0);
            w.read(1);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(1);
            d.read(0);
        }),
    ];
    join(world, threads);
}

/// MOVE says EEXIST or ENOENT of pages that it has moved.
fn moves_that_lie() {
    let world = World::new(Setup {
        granule: Granule::Big,
        quirks: Quirks {
            stale_errors: 3,
            ..Quirks::default()
        },
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.write(1);
            w.read(0);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.write(1);
        }),
    ];
    join(world, threads);
}

/// Any call may stop half-way since something else has changed a mapping.
fn changing_all_the_time() {
    let world = World::new(Setup {
        nr_devices: 2,
        granule: Granule::Big,
        in_use: true,
        quirks: Quirks {
            spurious_changing: 4,
            ..Quirks::default()
        },
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.with_pinned(0..2);
            w.read(1);
            w.write(1);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.read(1);
        }),
        world.worker(1, Style::Update, |d| {
            d.read(0);
            d.write(1);
        }),
    ];
    join(world, threads);
}

/// Pages that a child shares: MOVE says EBUSY until the sharing is broken.
fn shared_with_a_child() {
    let world = World::new(Setup::default());
    world.write(0);
    world.write(1);
    world.share(0);
    world.share(1);
    let threads = [
        world.cpu(|w| {
            w.read(0);
            w.write(1);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.write(1);
        }),
    ];
    join(world, threads);
}

/// `madvise(MADV_DONTNEED)` against faults of both sides. The pages go late: after the event was read.
fn discard() {
    let world = World::new(Setup::default());
    world.write(0);
    let threads = [
        world.cpu(|w| {
            w.discard(0..1);
            w.write(0);
        }),
        world.cpu(|w| {
            w.write(0);
            w.read(0);
        }),
        world.worker(0, Style::Span, |d| {
            d.write(0);
            d.read(0);
            d.write(0);
        }),
    ];
    join(world, threads);
}

/// A round wants two pages: it waits for another device's access to one, and the other is discarded meanwhile.
fn discard_beside_a_wait() {
    let world = World::new(Setup {
        nr_devices: 2,
        ..Setup::default()
    });
    world.write(1);
    let first = world.worker(0, Style::Span, |d| d.write(0));
    first.join().expect("a thread that panics ends the program");
    let threads = [
        world.cpu(|w| {
            w.discard(1..2);
            w.read(1);
        }),
        world.worker(0, Style::Span, |d| {
            d.write(0);
            d.write(0);
            d.write(0);
        }),
        world.worker(1, Style::Locked, |d| {
            d.fetch(0..2, Write);
            d.read(1);
            d.read(1);
        }),
    ];
    join(world, threads);
}

/// `munmap` against faults of both sides.
fn unmap() {
    let world = World::new(Setup::default());
    let threads = [
        world.cpu(|w| w.unmap(0..1)),
        world.cpu(|w| {
            w.try_access(0, Write);
            w.read(1);
        }),
        world.worker(0, Style::Span, |d| {
            d.try_access(0, Write);
            d.try_access(0, Read);
            d.write(1);
        }),
    ];
    join(world, threads);
}

/// `mremap` against faults of both sides: what is away comes home at its new address.
fn remap() {
    let world = World::new(Setup::default());
    world.write(0);
    let threads = [
        world.cpu(|w| {
            w.remap(0..1);
            w.read(0);
            w.write(0);
        }),
        world.cpu(|w| w.write(1)),
        world.worker(0, Style::Span, |d| {
            d.try_access(0, Write);
            d.try_access(0, Read);
            d.write(1);
        }),
    ];
    join(world, threads);
}

fn shared() -> Setup {
    Setup {
        nr_devices: 2,
        in_use: true,
        read_mostly: true,
        granule: Granule::Big,
        ..Setup::default()
    }
}

/// A discard of what both devices and the CPU share, against updates, which take their tokens early.
fn discard_shared() {
    let world = World::new(shared());
    world.write(0);
    let threads = [
        world.cpu(|w| {
            w.discard(0..2);
            w.write(0);
            w.discard(0..1);
        }),
        world.cpu(|w| {
            w.write(1);
            w.read(0);
        }),
        world.worker(0, Style::Update, |d| {
            d.read(0);
            d.write(0);
        }),
        world.worker(1, Style::Snapshot, |d| {
            d.read(0);
            d.read(1);
        }),
    ];
    join(world, threads);
}

/// An unmapping of what is shared, with a pin beside it.
fn unmap_shared() {
    let world = World::new(shared());
    world.write(0);
    let threads = [
        world.cpu(|w| w.unmap(0..1)),
        world.cpu(|w| {
            w.read(1);
            w.with_pinned(1..2);
        }),
        world.worker(0, Style::Update, |d| {
            d.try_access(0, Read);
            d.try_access(0, Write);
        }),
        world.worker(1, Style::Locked, |d| {
            d.try_access(0, Read);
            d.write(1);
        }),
    ];
    join(world, threads);
}

/// A move of what is shared.
fn remap_shared() {
    let world = World::new(shared());
    world.write(0);
    world.write(1);
    let threads = [
        world.cpu(|w| {
            w.remap(0..2);
            w.read(0);
            w.write(1);
            w.write(0);
        }),
        world.worker(0, Style::Update, |d| {
            d.try_access(0, Write);
            d.try_access(1, Read);
        }),
        world.worker(1, Style::Span, |d| {
            d.try_access(1, Write);
            d.try_access(0, Read);
        }),
    ];
    join(world, threads);
}

/// A move, and the mirror is closed meanwhile: what is away comes home to its new place.
fn remap_and_close() {
    let world = World::new(Setup::default());
    let first = world.worker(0, Style::Locked, |d| {
        d.write(0);
        d.write(1);
    });
    first.join().expect("a thread that panics ends the program");
    let threads = [
        world.cpu(|w| {
            w.remap(0..1);
            w.write(0);
        }),
        world.cpu(|w| w.close()),
        world.worker(0, Style::Span, |d| {
            d.try_access(0, Write);
            d.try_access(1, Write);
        }),
    ];
    join(world, threads);
}

/// Other memory is mapped over a page while its event is unread: nothing of ours may touch it.
fn mapped_over() {
    let world = World::new(Setup::default());
    world.write(0);
    let threads = [
        world.cpu(|w| {
            w.replace(0);
            let page = w.replacement().expect("just now");
            w.read(page);
            w.write(page);
        }),
        world.cpu(|w| {
            if let Some(page) = w.replacement() {
                w.write(page);
                w.write(page);
            }
            w.write(1);
        }),
        world.worker(0, Style::Locked, |d| {
            d.try_access(0, Write);
            d.try_access(0, Read);
            d.write(1);
        }),
        world.worker(0, Style::Update, |d| {
            d.try_access(0, Write);
            d.read(1);
        }),
    ];
    join(world, threads);
}

fn late() -> Setup {
    Setup {
        nr_devices: 2,
        // A few looks at the clock.
        span_deadline: Duration::from_micros(2),
        ..Setup::default()
    }
}

/// Spans that outstay a shootdown: their pages are taken, their threads parked, and nobody sees what is not current.
fn late_spans() {
    let world = World::new(late());
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.read(0);
            w.write(0);
        }),
        world.worker(0, Style::Late, |d| {
            d.write(0);
            d.read(0);
        }),
        world.worker(0, Style::Locked, |d| d.write(0)),
        world.worker(1, Style::Late, |d| d.write(0)),
    ];
    join(world, threads);
}

/// The same, with readers on all sides.
fn late_spans_shared() {
    let world = World::new(Setup {
        in_use: true,
        read_mostly: true,
        ..late()
    });
    let threads = [
        world.cpu(|w| {
            w.read(0);
            w.write(0);
            w.read(0);
        }),
        world.worker(0, Style::Late, |d| {
            d.read(0);
            d.write(0);
        }),
        world.worker(0, Style::Locked, |d| {
            d.read(0);
            d.read(0);
        }),
        world.worker(1, Style::Late, |d| {
            d.write(0);
            d.read(0);
        }),
    ];
    join(world, threads);
}

/// A late writer, and another worker of the same device that has the page back meanwhile, to read.
fn late_span_and_reader() {
    let world = World::new(Setup {
        nr_devices: 1,
        in_use: true,
        read_mostly: true,
        ..late()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.read(0);
        }),
        world.worker(0, Style::Late, |d| d.write(0)),
        world.worker(0, Style::Locked, |d| d.read(0)),
    ];
    join(world, threads);
}

/// The same through the thread door: the late thread is sent a signal of its own.
fn thread_door_late() {
    let world = World::new(Setup {
        delivery: Delivery::Thread,
        ..late()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.read(0);
        }),
        world.cpu(|w| w.write(0)),
        world.worker(0, Style::Late, |d| {
            d.write(0);
            d.read(0);
        }),
        world.worker(1, Style::Locked, |d| d.write(0)),
    ];
    join(world, threads);
}

/// A fork while everybody is at work: the child must find what was written last, and afterwards the pages are shared with it.
fn fork() {
    let world = World::new(Setup::default());
    let threads = [
        world.cpu(|w| w.fork()),
        world.cpu(|w| {
            w.write(0);
            w.read(1);
        }),
        world.worker(0, Style::Span, |d| {
            d.write(0);
            d.write(1);
            d.read(0);
        }),
    ];
    join(world, threads);
}

/// The other ways of an update: a look without a fault, and a migration whatever the policy; and the way back, on request.
fn snapshots_and_migrations() {
    let world = World::new(Setup {
        nr_devices: 2,
        in_use: true,
        ..Setup::default()
    });
    let threads = [
        world.cpu(|w| {
            w.read(0);
            w.write(0);
        }),
        world.cpu(|w| w.release(0)),
        world.worker(0, Style::Snapshot, |d| {
            d.write(0);
            d.read(0);
            d.write(0);
        }),
        world.worker(1, Style::Migrate, |d| {
            d.read(0);
            d.write(0);
        }),
    ];
    join(world, threads);
}

fn no_move() -> Setup {
    Setup {
        quirks: Quirks {
            no_move: true,
            ..Quirks::default()
        },
        ..Setup::default()
    }
}

/// A kernel without MOVE: pages are protected, copied and discarded.
fn without_move() {
    let world = World::new(no_move());
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.write(0);
            w.read(0);
        }),
        world.cpu(|w| w.write(0)),
        world.worker(0, Style::Span, |d| {
            d.write(0);
            d.read(0);
            d.write(0);
        }),
    ];
    join(world, threads);
}

/// The same with duplicates, and two devices.
fn without_move_shared() {
    let world = World::new(Setup {
        nr_devices: 2,
        in_use: true,
        read_mostly: true,
        ..no_move()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.read(0);
        }),
        world.worker(0, Style::Locked, |d| {
            d.read(0);
            d.write(0);
        }),
        world.worker(1, Style::Update, |d| {
            d.read(0);
            d.write(0);
            d.read(0);
        }),
    ];
    join(world, threads);
}

/// The same with little memory.
fn without_move_evictions() {
    let world = World::new(Setup {
        memory: Some(1),
        ..no_move()
    });
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.write(1);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.write(1);
            d.read(0);
        }),
    ];
    join(world, threads);
}

fn by_thread() -> Setup {
    Setup {
        delivery: Delivery::Thread,
        ..Setup::default()
    }
}

/// The monitor resolves the faults.
fn thread_door() {
    let world = World::new(by_thread());
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.write(0);
            w.read(0);
        }),
        world.cpu(|w| {
            w.write(1);
            w.read(0);
        }),
        world.worker(0, Style::Span, |d| {
            d.write(0);
            d.read(1);
            d.write(0);
        }),
    ];
    join(world, threads);
}

/// The monitor shares and collapses.
fn thread_door_shared() {
    let world = World::new(Setup {
        nr_devices: 2,
        in_use: true,
        ..by_thread()
    });
    let threads = [
        world.cpu(|w| {
            w.read(0);
            w.write(0);
        }),
        world.cpu(|w| {
            w.write(0);
            w.read(0);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.read(0);
        }),
        world.worker(1, Style::Update, |d| {
            d.read(0);
            d.write(0);
        }),
    ];
    join(world, threads);
}

/// The monitor reads faults and events.
fn thread_door_discard() {
    let world = World::new(by_thread());
    let threads = [
        world.cpu(|w| {
            w.write(0);
            w.discard(0..1);
            w.write(0);
        }),
        world.cpu(|w| {
            w.write(0);
            w.read(0);
        }),
        world.worker(0, Style::Locked, |d| {
            d.write(0);
            d.read(0);
        }),
    ];
    join(world, threads);
}
