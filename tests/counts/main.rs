//! The regression guard for speed: counts, which are the same on every machine, and not times. One test per kind of fault, and
//! one per way to work through an array with one worker: how many faults, system calls, retries and bytes each takes.
//!
//! - `fault`: one fault; `runs`: one where not all of a granule is alike.
//! - `explicit`: what moves because it is asked for, or for want of room.
//! - `launch`: what the accelerator's launches take.
//! - `memory`: what the runtime keeps for itself.

#![cfg(target_os = "linux")]

use std::sync::Mutex;

use svm::{Access, Buffer, Granule, Options, Stats, View, ViewMut};
use tests::{TestDevice, Watchdog, usable};

mod explicit;
mod fault;
mod launch;
mod memory;
mod runs;

const PAGE: usize = 4096;
const BLOCK: usize = 512 * PAGE;
/// 64 KiB, what one fault moves unless told otherwise.
const GRANULE: usize = 16 * PAGE;

/// Options that have a fault move a page, 64 KiB, 2 MiB of pages, and a huge page.
fn granules() -> impl Iterator<Item = Options> {
    [
        (Granule::Page, false),
        (Granule::Big, false),
        (Granule::Huge, false),
        (Granule::Huge, true),
    ]
    .into_iter()
    .map(|(granule, huge)| Options::new().granule(granule).huge_pages(huge))
}

/// The tests count what a whole address space does, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

fn alone(name: &'static str, test: impl FnOnce()) {
    let _turn = TURN
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let _watchdog = Watchdog::new(name);
    if usable() {
        test();
    }
}

fn filled(len: usize, options: &Options) -> Buffer<u8> {
    let mut buffer = Buffer::with_options(len, options).unwrap();
    buffer.as_mut_slice().fill(1);
    buffer
}

/// What `job` takes of `buffer`.
fn taken(buffer: &mut Buffer<u8>, job: impl FnOnce(&mut Buffer<u8>)) -> Stats {
    let before = buffer.stats();
    job(buffer);
    buffer.stats() - before
}

/// One device fault at the beginning of `view`.
fn device_writes(device: &TestDevice, view: &ViewMut<'_, u8>) {
    device
        .fault_in(view.region(), view.addr(), 1, Access::Write)
        .unwrap();
}

/// One device fault for a load, at the beginning of `view`.
fn device_reads(device: &TestDevice, view: &View<'_, u8>) {
    device
        .fault_in(view.region(), view.addr(), 1, Access::Read)
        .unwrap();
}

/// CPU faults of every kind.
fn cpu_faults(s: &Stats) -> u64 {
    s.cpu_read_faults
        + s.cpu_write_faults
        + s.cpu_protect_faults
        + s.cpu_zero_fills
        + s.cpu_spurious_faults
}

#[track_caller]
fn assert_quiet(s: &Stats) {
    let wasted = (
        s.retries,
        s.waits,
        s.scan_calls,
        s.changing_outcomes,
        s.cpu_spurious_faults,
        s.device_spurious_faults,
        s.anomalies,
    );
    assert_eq!(wasted, (0, 0, 0, 0, 0, 0, 0), "{s:?}");
}
