//! Spans that do not end in time.

use super::join;
use crate::world::{Setup, Style, World};
use std::time::Duration;

pub(super) fn late() -> Setup {
    Setup {
        nr_devices: 2,
        // A few looks at the clock.
        span_deadline: Duration::from_micros(2),
        ..Setup::default()
    }
}

/// Spans that outstay a shootdown: their pages are taken, their threads parked, and nobody sees what is not current.
pub(super) fn late_spans() {
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
pub(super) fn late_spans_shared() {
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
pub(super) fn late_span_and_reader() {
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
