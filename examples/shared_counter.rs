//! One counter, incremented by the CPU and by the accelerator at the same time. No increment is lost: before either side
//! writes, it owns the page.
//!
//! `cargo run --release -p examples --example shared_counter`

use std::sync::atomic::Ordering::Relaxed;

use accel_sim::Accelerator;
use svm::Buffer;

const BY_CPU: u64 = 100_000;
const BY_DEVICE: usize = 100_000;

fn main() -> Result<(), accel_sim::Error> {
    let accel = Accelerator::new()?;
    let mut counter = Buffer::<u64>::zeroed(1)?;
    {
        let counter = counter.share(); // from here on by atomics only, and by both sides
        accel.scope(|scope| {
            let device = scope.launch_items(BY_DEVICE, counter.view(), |_, _, counter| {
                counter.fetch_add(0, 1)?;
                Ok(())
            })?;
            for _ in 0..BY_CPU {
                counter.fetch_add(0, 1, Relaxed);
            }
            device.wait()
        })?;
    }

    let total = counter.as_slice()[0];
    assert_eq!(total, BY_CPU + BY_DEVICE as u64);
    let moved = accel.stats().runtime;
    println!(
        "{BY_CPU} + {BY_DEVICE} = {total}; the page went to the device {} times",
        moved.to_device_pages()
    );
    Ok(())
}
