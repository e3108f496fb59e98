//! Mappings that are changed from outside: discarded, unmapped, moved, mapped over; and a fork.

use super::join;
use crate::error::Access::{Read, Write};
use crate::options::Granule;
use crate::world::{Setup, Style, World};

/// `madvise(MADV_DONTNEED)` against faults of both sides. The pages go late: after the event was read.
pub(super) fn discard() {
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
pub(super) fn discard_beside_a_wait() {
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
pub(super) fn unmap() {
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
pub(super) fn remap() {
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
pub(super) fn discard_shared() {
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
pub(super) fn unmap_shared() {
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
pub(super) fn remap_shared() {
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
pub(super) fn remap_and_close() {
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
pub(super) fn mapped_over() {
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

/// A fork while everybody is at work: the child must find what was written last, and afterwards the pages are shared with it.
pub(super) fn fork() {
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
