//! Era after era: an arena is mapped and mirrored, worked on by all who work there, closed and looked over.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use svm::{Delivery, Granule, Options};

use super::arena::{Arena, Reach, Record};
use super::touches::Device;
use super::work::Work;
use super::{Checked, PAGE, Run};
use crate::mapping::{Map, READ_WRITE};
use crate::rng::{Rng, mix};

/// From an arena to the rooms of its changers: more than an arena has pages.
const ROOM: usize = 1 << 32;

/// Era after era on one range of addresses.
pub(super) fn arena(run: &Run, n: usize) -> Checked {
    let mut rng = Rng::new(mix(run.config.seed ^ mix(n as u64 + 1)));
    let pages = run.config.pages;
    // Room on both sides, so that no other mapping joins.
    let room = Map::at_hint(
        0x2345_0000_0000 + n * (1 << 36),
        pages + 2,
        libc::PROT_NONE,
        0,
    );
    let addr = room.addr + PAGE;
    let map = || Map::at_hint(addr, pages, READ_WRITE, libc::MAP_FIXED);
    let mut arena = Arena {
        map: map(),
        records: (0..pages)
            .map(|_| {
                let record = Record {
                    generation: 0,
                    is_zero: true,
                    reach: Reach::Mirrored,
                    is_taken: false,
                };
                AtomicU64::new(record.to_bits())
            })
            .collect(),
    };
    while run.goes_on() {
        if rng.below(3) == 0 {
            // The address is reused.
            arena.map.unmap();
            arena.map = map();
            arena.for_each_record(|record| record.next(true));
        }
        // Whatever it has left: it is mirrored anew.
        arena.for_each_record(|record| Record {
            reach: Reach::Mirrored,
            ..record
        });
        let delivery = match run.config.delivery {
            Some(delivery) => delivery,
            None if rng.below(2) == 0 => Delivery::Inline,
            None => Delivery::Thread,
        };
        let options = Options::new()
            .delivery(delivery)
            .granule([Granule::Page, Granule::Big, Granule::Huge][rng.below(3)])
            .read_mostly(rng.below(3) == 0);
        era(run, &arena, &mut rng, &options).map_err(|e| format!("{options:?}: {e}"))?;
        run.count("eras: a mirror made, looked over and closed");
    }
    room.unmap();
    Ok(())
}

fn era(run: &Run, arena: &Arena, rng: &mut Rng, options: &Options) -> Checked {
    // SAFETY: the arena's memory, which is accessed by those who have taken its pages, or by atomics; and changed by system calls.
    let mut mirror = unsafe { svm::mirror_raw(arena.map.at(0), arena.map.pages * PAGE, options) }
        .map_err(|e| e.to_string())?;
    let over = AtomicBool::new(false);
    let ends = Instant::now() + Duration::from_millis(50 + rng.next() % 250);
    let goes_on = || !over.load(Ordering::Relaxed) && run.goes_on() && Instant::now() < ends;
    {
        let shared = mirror.share();
        let work = Work {
            run,
            arena,
            options,
        };
        std::thread::scope(|scope| {
            let (work, goes_on, shared) = (&work, &goes_on, &shared);
            for n in 0..2 {
                let mut rng = Rng::new(rng.next());
                // Where a changer moves mappings to. Its own: an address that another thread has just vacated cannot be told from
                // what was there.
                let room = arena.map.addr + (n + 1) * ROOM;
                scope.spawn(move || {
                    while goes_on() {
                        run.check("changer", work.change(&mut rng, room));
                    }
                });
            }
            let mut cpu = Rng::new(rng.next());
            scope.spawn(move || {
                while goes_on() {
                    run.check("CPU", work.use_on_cpu(&mut cpu));
                    std::thread::yield_now();
                }
            });
            for accel in &run.accels {
                let mut rng = Rng::new(rng.next());
                scope.spawn(move || {
                    while goes_on() {
                        let (items, base) = (1 + rng.below(96), rng.next());
                        let done = accel.run_items(items, shared.view(), |lane, i, _| {
                            let r = mix(base ^ i as u64);
                            let page = (r >> 8) as usize % arena.map.pages;
                            let device = Device(lane);
                            let checked = if r & 3 == 0 {
                                work.watch(&device, page)
                            } else {
                                work.use_on_device(&device, page, r & 4 == 0)
                            };
                            run.check("device", checked);
                            Ok(())
                        });
                        run.check("launch", done.map_err(|e| e.to_string()));
                    }
                });
            }
        });
    }
    *run.mirrors.lock().expect("no panic while it is held") += mirror.stats();
    mirror.close().map_err(|e| format!("close: {e}"))?;
    if run.has_failed() {
        // Somebody has given up in the middle of a change: not all is at home.
        return Ok(());
    }
    (0..arena.map.pages).try_for_each(|page| arena.look(page, "at home").map(drop))
}
