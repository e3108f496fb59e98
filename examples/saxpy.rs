//! `y += a * x` on the accelerator, in place: no copies in the program, page faults instead.
//!
//! `cargo run --release -p examples --example saxpy`

use accel_sim::Accelerator;

fn saxpy(accel: &Accelerator, a: f32, x: &[f32], y: &mut [f32]) -> Result<(), svm::Error> {
    let x = svm::mirror_ref(x)?; // an input: duplicated, never moved
    let mut y = svm::mirror(y)?; // the same addresses on both sides from here on
    accel.run((y.view_mut(), x.view()), |(y, x)| {
        for (y, x) in y.iter_mut().zip(x) {
            *y += a * x;
        }
    })?; // disjoint chunks, plain slices, all workers
    y.close()
}

fn main() -> Result<(), svm::Error> {
    let accel = Accelerator::new()?;
    let x: Vec<f32> = (0..1 << 20).map(|i| i as f32).collect();
    let mut y = vec![1.0; x.len()];

    saxpy(&accel, 2.0, &x, &mut y)?;

    assert!(y.iter().zip(&x).all(|(y, x)| *y == 1.0 + 2.0 * x));
    let moved = accel.stats().runtime;
    println!(
        "{} workers; {} pages to the device in {} movements, {} home in {}; all {} sums are right",
        accel.workers(),
        moved.to_device_pages(),
        moved.to_device_runs,
        moved.to_host_pages(),
        moved.to_host_runs,
        y.len(),
    );
    Ok(())
}
