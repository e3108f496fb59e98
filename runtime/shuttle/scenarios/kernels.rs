//! Kernels that lie, refuse or lack something, and the other door.

use super::join;
use super::late::late;
use crate::kernel::Quirks;
use crate::options::{Delivery, Granule};
use crate::world::{Setup, Style, World};

/// MOVE says EEXIST or ENOENT of pages that it has moved.
pub(super) fn moves_that_lie() {
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
pub(super) fn changing_all_the_time() {
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
pub(super) fn shared_with_a_child() {
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

/// The same through the thread door: the late thread is sent a signal of its own.
pub(super) fn thread_door_late() {
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
pub(super) fn without_move() {
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
pub(super) fn without_move_shared() {
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
pub(super) fn without_move_evictions() {
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
pub(super) fn thread_door() {
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
pub(super) fn thread_door_shared() {
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
pub(super) fn thread_door_discard() {
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
