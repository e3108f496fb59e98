//! Pages with owner tokens: who takes one looks for the words that the last owner left, and leaves new ones.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{KINDS, Run, WORDS};
use crate::rng::{Rng, mix};

/// What word `i` of page `page` is in generation `generation`.
fn word(page: usize, generation: u64, i: usize) -> u64 {
    if generation == 0 {
        0
    } else {
        mix(generation << 32 | (page as u64) << 12 | i as u64)
    }
}

/// The owner tokens of the checked pages: in each, whether it is taken (bit 0), and the generation its words are of.
struct Tokens(Vec<AtomicU64>);

impl Tokens {
    /// Takes a page, unless it is taken; says its generation.
    fn take(&self, page: usize) -> Option<u64> {
        let token = self.0[page].load(Ordering::Relaxed);
        // Acquire pairs with the Release of `give`: the words that the last owner left are there.
        let free = token & 1 == 0
            && self.0[page]
                .compare_exchange(token, token | 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        free.then_some(token >> 1)
    }

    fn give(&self, page: usize, generation: u64) {
        self.0[page].store(generation << 1, Ordering::Release);
    }
}

/// CPU threads and launches take pages, look whether all words are as the last owner left them, and write new ones.
pub(super) fn pages(run: &Run) -> Result<u64, String> {
    let nr = run.config.shared_pages;
    // A mirror of a heap slice, so that there are edges too, and pages that nobody ever touched.
    let mut memory = vec![0u64; nr * WORDS];
    let mut mirror = svm::mirror_with(&mut memory, &run.options).map_err(|e| e.to_string())?;
    let tokens = Tokens((0..nr).map(|_| AtomicU64::new(0)).collect());
    let shared = mirror.share();
    std::thread::scope(|scope| {
        for t in 0..2u64 {
            let (shared, tokens) = (&shared, &tokens);
            let mut rng = Rng::new(mix(run.config.seed ^ mix(20 + t)));
            scope.spawn(move || {
                while run.goes_on() {
                    let page = rng.below(nr);
                    let Some(generation) = tokens.take(page) else { continue };
                    for i in 0..WORDS {
                        let (found, wanted) = (shared.load(page * WORDS + i), word(page, generation, i));
                        if found != wanted {
                            return run.fail(format!("CPU: page {page} word {i} of generation {generation}: {found:#x}, not {wanted:#x}"));
                        }
                    }
                    let write = rng.below(3) != 0;
                    for i in 0..if write { WORDS } else { 0 } {
                        shared.store(page * WORDS + i, word(page, generation + 1, i));
                    }
                    tokens.give(page, generation + u64::from(write));
                    run.count(KINDS[2], 1);
                }
            });
        }
        for (a, accel) in run.accels.iter().enumerate() {
            let (shared, tokens) = (&shared, &tokens);
            let mut rng = Rng::new(mix(run.config.seed ^ mix(30 + a as u64)));
            scope.spawn(move || {
                while run.goes_on() {
                    let (items, base) = (1 + rng.below(64), rng.next());
                    let done = accel.run_items(items, shared.view(), |_lane, item, words| {
                        let r = mix(base ^ item as u64);
                        let page = r as usize % nr;
                        let Some(generation) = tokens.take(page) else { return Ok(()) };
                        for i in 0..WORDS {
                            let (found, wanted) = (words.load(page * WORDS + i)?, word(page, generation, i));
                            if found != wanted {
                                run.fail(format!("device: page {page} word {i} of generation {generation}: {found:#x}, not {wanted:#x}"));
                                return Ok(());
                            }
                        }
                        let write = r >> 32 & 1 == 0;
                        for i in 0..if write { WORDS } else { 0 } {
                            words.store(page * WORDS + i, word(page, generation + 1, i))?;
                        }
                        tokens.give(page, generation + u64::from(write));
                        run.count(KINDS[3], 1);
                        Ok(())
                    });
                    if let Err(e) = done {
                        return run.fail(format!("pages, launch: {e}"));
                    }
                }
            });
        }
    });
    run.absorb(mirror.stats());
    mirror.close().map_err(|e| e.to_string())?;
    let mut total = 0;
    for (page, words) in memory.chunks(WORDS).enumerate() {
        let token = tokens.0[page].load(Ordering::Acquire);
        let (generation, taken) = (token >> 1, token & 1 == 1);
        let wrong = words
            .iter()
            .enumerate()
            .find(|&(i, &w)| w != word(page, generation, i));
        if let Some((i, w)) = wrong.filter(|_| !taken) {
            return Err(format!(
                "at home: page {page} word {i} of generation {generation} is {w:#x}"
            ));
        }
        total += generation;
    }
    Ok(total)
}
