//! What moves because it is asked for.

use svm::{Granule, Options};

use crate::rig::Rig;
use crate::tracer::{ByThread, step, traced};
use crate::{BLOCK, LEN, PAGE};

/// The one look at the clock is the caller's timeout.
#[test]
fn a_prefetch_is_one_call_a_block_and_one_in_all_for_huge_pages() {
    traced(
        "explicit::a_prefetch_is_one_call_a_block_and_one_in_all_for_huge_pages",
        || {
            for huge in [false, true] {
                let options = Options::new().granule(Granule::Huge).huge_pages(huge);
                let mut rig = Rig::new(LEN, &options);
                rig.prefetch();
                rig.attachment.release().unwrap();
                rig.buffer.as_mut_slice().fill(2);
                step(|| rig.prefetch());
            }
        },
        &[
            &[("caller", &["clock_gettime", "MOVE", "MOVE", "MOVE", "MOVE"])],
            &[("caller", &["clock_gettime", "MOVE"])],
        ],
    );
}

/// Around each move it is looked what the mapping permits: whether the page may be taken for writing, and what translations it may have.
#[test]
fn a_migration_on_request_is_one_move_a_block_between_two_looks() {
    const MIGRATION: ByThread = &[(
        "caller",
        &[
            "clock_gettime",
            "PROCMAP_QUERY",
            "MOVE",
            "PROCMAP_QUERY",
            "PROCMAP_QUERY",
            "MOVE",
            "PROCMAP_QUERY",
        ],
    )];
    traced(
        "explicit::a_migration_on_request_is_one_move_a_block_between_two_looks",
        || {
            for huge in [false, true] {
                let options = Options::new().granule(Granule::Huge).huge_pages(huge);
                let mut rig = Rig::new(2 * BLOCK, &options);
                // The first one makes room in the range.
                rig.migrate();
                rig.attachment.release().unwrap();
                rig.buffer.as_mut_slice().fill(2);
                step(|| rig.migrate());
            }
        },
        &[MIGRATION; 2],
    );
}

/// Asynchronous signals are masked meanwhile. An area for stale pages is not made, for there are none.
#[test]
fn a_way_home_on_request_is_one_move_a_block_and_one_in_all_for_huge_pages() {
    traced(
        "explicit::a_way_home_on_request_is_one_move_a_block_and_one_in_all_for_huge_pages",
        || {
            for huge in [false, true] {
                let options = Options::new().granule(Granule::Huge).huge_pages(huge);
                let mut rig = Rig::new(2 * BLOCK, &options);
                rig.prefetch();
                step(|| rig.attachment.release().unwrap());
            }
        },
        &[
            &[(
                "caller",
                &["rt_sigprocmask", "MOVE", "MOVE", "rt_sigprocmask"],
            )],
            &[("caller", &["rt_sigprocmask", "MOVE", "rt_sigprocmask"])],
        ],
    );
}

/// The same for some pages, but that the region is looked up first, under a mask of its own.
#[test]
fn bringing_some_pages_home_is_one_move_a_block() {
    const HOME: ByThread = &[(
        "caller",
        &[
            "rt_sigprocmask",
            "rt_sigprocmask",
            "rt_sigprocmask",
            "MOVE",
            "MOVE",
            "rt_sigprocmask",
        ],
    )];
    traced(
        "explicit::bringing_some_pages_home_is_one_move_a_block",
        || {
            let mut rig = Rig::new(2 * BLOCK, &Options::new());
            rig.prefetch();
            let pages = rig.page(BLOCK - PAGE)..rig.page(BLOCK + PAGE);
            step(|| {
                let region = rig.buffer.view().region();
                rig.attachment.bring_home(region, pages).unwrap();
            });
        },
        &[HOME],
    );
}

/// What is away moves home. Of all pages what protection there is is lifted, and it is looked whether somebody has populated them.
#[test]
fn a_pin_is_three_calls_a_block_and_its_end_none() {
    const AWAY: ByThread = &[(
        "caller",
        &[
            "rt_sigprocmask",
            "MOVE",
            "WRITEPROTECT",
            "PAGEMAP_SCAN",
            "MOVE",
            "WRITEPROTECT",
            "PAGEMAP_SCAN",
            "rt_sigprocmask",
        ],
    )];
    const HOME: ByThread = &[(
        "caller",
        &[
            "rt_sigprocmask",
            "WRITEPROTECT",
            "PAGEMAP_SCAN",
            "WRITEPROTECT",
            "PAGEMAP_SCAN",
            "rt_sigprocmask",
        ],
    )];
    const UNPIN: ByThread = &[("caller", &["rt_sigprocmask", "rt_sigprocmask"])];
    traced(
        "explicit::a_pin_is_three_calls_a_block_and_its_end_none",
        || {
            let mut rig = Rig::new(2 * BLOCK, &Options::new());
            rig.prefetch();
            for _ in 0..2 {
                let mut pin = None;
                step(|| pin = Some(rig.buffer.pin(BLOCK - PAGE..BLOCK + PAGE).unwrap()));
                step(|| drop(pin.take()));
            }
        },
        &[AWAY, UNPIN, HOME, UNPIN],
    );
}
