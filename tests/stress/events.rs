//! Mappings that change under their mirrors, by bare system calls.

use std::sync::atomic::{AtomicU64, Ordering};

use svm::Ptr;

use super::{Checked, KINDS, PAGE, Run, WORDS};
use crate::rng::{Rng, mix};

/// Changes mappings under mirrors by bare system calls. A page holds one number; zero once it was discarded or mapped anew.
pub(super) fn events(run: &Run) -> Checked {
    const PAGES: usize = 600;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let mut rng = Rng::new(mix(run.config.seed ^ mix(50)));
    while run.goes_on() {
        // SAFETY: a fresh mapping.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE,
                protection,
                anonymous,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().to_string());
        }
        let start = map.expose_provenance();
        let at = |page: usize| std::ptr::with_exposed_provenance_mut::<u64>(start + page * PAGE);
        let mut wanted = [0u64; PAGES];
        let mut mapped_anew = [false; PAGES];
        // SAFETY: the mapping stays until the end of the loop, but for what is done to it by system calls.
        let mut mirror = unsafe { svm::mirror_raw(map.cast(), PAGES * PAGE, &run.options) }
            .map_err(|e| e.to_string())?;
        for _ in 0..40 {
            if !run.goes_on() {
                break;
            }
            let first = rng.below(PAGES);
            let pages = first..first + 1 + rng.below((PAGES - first).min(70));
            let number = rng.next() | 1;
            match rng.below(9) {
                0 | 1 => {
                    for page in pages {
                        // SAFETY: inside the mapping, used by this thread alone.
                        unsafe { at(page).write_volatile(number) };
                        wanted[page] = number;
                    }
                }
                2..=4 => {
                    let write = rng.below(2) == 0;
                    let (accel, first) = (run.accel(&mut rng), pages.start);
                    // What was mapped anew is no part of the mirror any more, and a fault to the device.
                    let inside = !mapped_anew[pages.clone()].contains(&true);
                    let (expected, base) = (&wanted, Ptr::<u64>::from_addr(start));
                    let wrong = AtomicU64::new(u64::MAX);
                    let done = accel.run_items(pages.len(), mirror.view_mut(), |lane, i, _| {
                        let ptr = base.add((first + i) * WORDS);
                        if lane.load(ptr)? != expected[first + i] {
                            wrong.store((first + i) as u64, Ordering::Relaxed);
                        }
                        if write {
                            lane.store(ptr, number)
                        } else {
                            Ok(())
                        }
                    });
                    let wrong = wrong.into_inner();
                    if wrong != u64::MAX {
                        return Err(format!("the device found something else in page {wrong}"));
                    }
                    match done {
                        Ok(()) if !inside => {
                            return Err(format!(
                                "the device used pages {pages:?}, some of which were unmapped"
                            ));
                        }
                        Ok(()) => wanted[pages]
                            .iter_mut()
                            .filter(|_| write)
                            .for_each(|w| *w = number),
                        Err(e) if inside => return Err(format!("events, launch: {e}")),
                        // It wrote some of them, or none.
                        Err(_) => {
                            for page in pages {
                                // SAFETY: inside the mapping.
                                let found = unsafe { at(page).read_volatile() };
                                let known = found == wanted[page]
                                    || (write && !mapped_anew[page] && found == number);
                                if !known {
                                    return Err(format!(
                                        "after a failed launch page {page} is {found:#x}, not {:#x}",
                                        wanted[page]
                                    ));
                                }
                                wanted[page] = found;
                            }
                        }
                    }
                }
                5 | 6 => {
                    // SAFETY: the mapping is this thread's.
                    let done = unsafe {
                        libc::madvise(
                            at(pages.start).cast(),
                            pages.len() * PAGE,
                            libc::MADV_DONTNEED,
                        )
                    };
                    if done != 0 {
                        return Err(format!("madvise: {}", std::io::Error::last_os_error()));
                    }
                    wanted[pages].fill(0);
                    run.count(KINDS[15], 1);
                }
                7 => {
                    let flags = anonymous | libc::MAP_FIXED;
                    // SAFETY: over this thread's own mapping.
                    let anew = unsafe {
                        libc::mmap(
                            at(pages.start).cast(),
                            pages.len() * PAGE,
                            protection,
                            flags,
                            -1,
                            0,
                        )
                    };
                    if anew == libc::MAP_FAILED {
                        return Err(format!("mmap: {}", std::io::Error::last_os_error()));
                    }
                    wanted[pages.clone()].fill(0);
                    mapped_anew[pages].fill(true);
                    run.count(KINDS[16], 1);
                }
                _ if rng.below(4) == 0 => {
                    // SAFETY: the child only reads memory and exits.
                    let child = unsafe { libc::fork() };
                    if child == 0 {
                        // SAFETY: inside the mapping, which the child has a copy of.
                        let same = (0..PAGES)
                            .all(|page| unsafe { at(page).read_volatile() } == wanted[page]);
                        // SAFETY: ends the child without running what is the parent's to run.
                        unsafe { libc::_exit(i32::from(!same)) };
                    }
                    let mut status = 0;
                    // SAFETY: waits for the child just made, if there is one.
                    let ended = unsafe { libc::waitpid(child, &raw mut status, 0) };
                    if child < 0 || ended != child || status != 0 {
                        return Err(format!(
                            "a forked child found something else: status {status:#x}"
                        ));
                    }
                    run.count(KINDS[17], 1);
                }
                _ => {}
            }
            let page = rng.below(PAGES);
            // SAFETY: inside the mapping.
            let found = unsafe { at(page).read_volatile() };
            if found != wanted[page] {
                return Err(format!(
                    "page {page} is {found:#x}, not {:#x}",
                    wanted[page]
                ));
            }
        }
        run.absorb(mirror.stats());
        mirror.close().map_err(|e| e.to_string())?;
        for (page, &wanted) in wanted.iter().enumerate() {
            // SAFETY: inside the mapping.
            let found = unsafe { at(page).read_volatile() };
            if found != wanted {
                return Err(format!(
                    "at home: page {page} is {found:#x}, not {wanted:#x}"
                ));
            }
        }
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(map, PAGES * PAGE) };
    }
    Ok(())
}
