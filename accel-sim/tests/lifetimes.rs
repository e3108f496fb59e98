//! What a launch uses lives until it is over: launches begun by kernels, operands that are owned, handles that end in odd places.

mod common;

use std::panic::panic_any;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use accel_sim::{Accelerator, Error, Options, indices};
use svm::Buffer;

use crate::common::{accel, within_deadline};

/// The second launch is made by a thread that the first one's kernel has started: the scope's own thread never sees it.
#[test]
fn a_scope_waits_for_what_its_kernels_launch() {
    within_deadline(|| {
        let accel = accel(2);
        let (is_over, nr_items) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut first = Buffer::<u64>::zeroed(1).expect("memory");
        let mut second = Buffer::<u64>::zeroed(1).expect("memory");
        let late = second.view_mut();
        accel
            .scope(|s| {
                let late = std::sync::Mutex::new(Some(late));
                let (is_over, nr_items) = (&is_over, &nr_items);
                s.launch(first.view_mut(), move |_| {
                    std::thread::scope(|threads| {
                        threads.spawn(|| {
                            let late = late.lock().unwrap().take().expect("one item");
                            s.launch_items(1, late, move |_, _, late| {
                                std::thread::sleep(Duration::from_millis(100));
                                late.store(0, 7)?;
                                nr_items.fetch_add(1, Ordering::Relaxed);
                                is_over.store(true, Ordering::Relaxed);
                                Ok(())
                            })
                            .expect("a launch");
                        });
                    });
                })
                .map(drop)
            })
            .expect("both launches");
        assert!(
            is_over.load(Ordering::Relaxed),
            "the scope is over, and its launch is not"
        );
        assert_eq!(nr_items.load(Ordering::Relaxed), 1);
        assert_eq!(second.as_slice(), [7]);
    });
}

#[test]
fn a_scope_keeps_the_buffers_it_is_given() {
    within_deadline(|| {
        let accel = accel(2);
        let (sum, weighted) = (AtomicU64::new(0), AtomicU64::new(0));
        accel
            .scope(|s| {
                let spans = Buffer::from_slice(&[3_u64; 5000]).expect("memory");
                let items = Buffer::from_slice(&[5_u64; 5000]).expect("memory");
                let slow = s.launch(spans, |chunk: &mut [u64]| {
                    std::thread::sleep(Duration::from_millis(20));
                    sum.fetch_add(chunk.iter().sum(), Ordering::Relaxed);
                })?;
                s.launch_items(5000, items, |_, i, items| {
                    weighted.fetch_add(items.load(i)?, Ordering::Relaxed);
                    Ok(())
                })?;
                slow.wait()
            })
            .expect("both launches");
        assert_eq!(sum.load(Ordering::Relaxed), 15_000);
        assert_eq!(weighted.load(Ordering::Relaxed), 25_000);
    });
}

/// Its drop panics, with another of its kind.
struct Spiteful(u32);

impl Drop for Spiteful {
    fn drop(&mut self) {
        if self.0 > 0 {
            panic_any(Spiteful(self.0 - 1));
        }
    }
}

#[test]
fn a_panic_whose_payload_panics_ends_the_launch() {
    within_deadline(|| {
        let accel = accel(1);
        let mut data = [0_u32; 8];
        let mut mirror = svm::mirror(&mut data).expect("a mirror");
        let failed = accel.run(mirror.view_mut(), |_| panic_any(Spiteful(2)));
        assert!(
            matches!(failed, Err(Error::KernelPanicked(_))),
            "{failed:?}"
        );
        // Its worker is still there.
        accel
            .run(mirror.view_mut(), |chunk| chunk.fill(1))
            .expect("a launch");
        mirror.close().expect("all pages come home");
        assert_eq!(data, [1; 8]);
    });
}

#[test]
fn the_last_handle_may_be_dropped_by_a_kernels_captures() {
    within_deadline(|| {
        let accel = Arc::new(accel(2));
        let own = accel.clone();
        let (go, wait) = mpsc::channel::<()>();
        let wait = std::sync::Mutex::new(wait);
        let buffer = Buffer::<u32>::zeroed(1).expect("memory");
        let job = accel
            .spawn(buffer, move |chunk: &mut [u32]| {
                let _ = wait.lock().unwrap().recv();
                chunk[0] = u32::try_from(own.workers()).unwrap();
            })
            .expect("a launch");
        drop(accel);
        go.send(()).expect("the kernel waits");
        let (buffer, result) = job.join();
        result.expect("the launch");
        assert_eq!(buffer.as_slice(), [2]);
        // Nobody else ends the accelerator now but itself: its device slot comes free again.
        for _ in 0..1000 {
            if (0..8)
                .map(|_| Accelerator::with_options(Options::new().workers(1)))
                .collect::<Result<Vec<_>, _>>()
                .is_ok()
            {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the accelerator has not ended");
    });
}

#[test]
fn what_would_wait_for_itself_is_refused() {
    within_deadline(|| {
        let accel = accel(1);
        let mut data = [0_u32; 8];
        let mut mirror = svm::mirror(&mut data).expect("a mirror");
        let refused = AtomicBool::new(false);
        accel
            .run(mirror.view_mut(), |_| {
                let is_nested = matches!(accel.release(), Err(Error::Nested));
                refused.store(is_nested, Ordering::Relaxed);
            })
            .expect("the launch itself");
        assert!(refused.load(Ordering::Relaxed));
    });
}

#[test]
fn slices_of_nothing_but_indices_are_refused() {
    within_deadline(|| {
        let refused = accel(1).run(indices(), |_| {});
        assert!(matches!(refused, Err(Error::NoViews)), "{refused:?}");
    });
}
