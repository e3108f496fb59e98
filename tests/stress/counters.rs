//! CPU threads and launches that add to the same words; every addition must be found again.

use std::sync::atomic::{AtomicU64, Ordering};

use svm::Buffer;

use super::{KINDS, LEAST_PAGES, Run, WORDS};
use crate::rng::{Rng, mix};

/// CPU threads and launches add to the same words.
pub(super) fn counters(run: &Run) -> Result<u64, String> {
    let n = run.config.shared_pages * WORDS;
    let mut buffer = Buffer::<u64>::with_options(n, &run.options).map_err(|e| e.to_string())?;
    let added = AtomicU64::new(0);
    let shared = buffer.share();
    // Half of the additions go to a few hot words, one page apart; the others anywhere.
    let place = |r: u64| {
        let r2 = mix(r) as usize;
        if r & 1 == 0 {
            r2 % LEAST_PAGES * WORDS + 3
        } else {
            r2 % n
        }
    };
    std::thread::scope(|scope| {
        for t in 0..2u64 {
            let (shared, added) = (&shared, &added);
            let mut rng = Rng::new(mix(run.config.seed ^ mix(t + 1)));
            scope.spawn(move || {
                while run.goes_on() {
                    for _ in 0..64 {
                        shared.fetch_add(place(rng.next()), 1, Ordering::Relaxed);
                    }
                    added.fetch_add(64, Ordering::Relaxed);
                    run.count(KINDS[0], 64);
                }
            });
        }
        for (a, accel) in run.accels.iter().enumerate() {
            let (shared, added) = (&shared, &added);
            let mut rng = Rng::new(mix(run.config.seed ^ mix(10 + a as u64)));
            scope.spawn(move || {
                while run.goes_on() {
                    let (items, base) = (1 + rng.below(2000), rng.next());
                    let done = accel.run_items(items, shared.view(), |_lane, i, words| {
                        words.fetch_add(place(mix(base ^ i as u64)), 1).map(drop)
                    });
                    if let Err(e) = done {
                        return run.fail(format!("counters, launch: {e}"));
                    }
                    added.fetch_add(items as u64, Ordering::Relaxed);
                    run.count(KINDS[1], items as u64);
                }
            });
        }
    });
    run.absorb(buffer.stats());
    let sum: u64 = buffer.as_slice().iter().sum();
    let added = added.into_inner();
    if sum != added && !run.failed.load(Ordering::Relaxed) {
        return Err(format!("{added} additions were made, and {sum} found"));
    }
    Ok(added)
}
