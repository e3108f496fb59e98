//! A view borrows the mirror, and a dropped one cannot be borrowed.

fn main() -> Result<(), accel_sim::Error> {
    let accel = accel_sim::Accelerator::new()?;
    let mut data = vec![0_u64; 4096];
    let mut mirror = svm::mirror(&mut data)?;
    let view = mirror.view_mut();
    drop(mirror);
    accel.run(view, |chunk| chunk.fill(1))
}
