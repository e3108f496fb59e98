//! Faults of CPUs and devices against each other, and what the runtime itself does beside them.

use super::join;
use crate::error::Access::{Read, Write};
use crate::options::Granule;
use crate::world::{Setup, Style, World};

/// A CPU and a device write and read one page: it goes back and forth.
pub(super) fn cpu_and_device() {
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
pub(super) fn cpu_and_update() {
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
pub(super) fn cpu_and_span() {
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
pub(super) fn two_and_two() {
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
pub(super) fn duplicates_and_collapse() {
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
pub(super) fn shared_home() {
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
pub(super) fn far_faults_coalesce() {
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
pub(super) fn granules() {
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
pub(super) fn evictions() {
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
pub(super) fn evictions_of_spans() {
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
pub(super) fn pin_and_rounds() {
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
pub(super) fn close_and_faults() {
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
pub(super) fn detach_and_faults() {
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

/// The other ways of an update: a look without a fault, and a migration whatever the policy; and the way back, on request.
pub(super) fn snapshots_and_migrations() {
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
