//! Memory that both sides write is never a slice of a kernel.

fn main() -> Result<(), accel_sim::Error> {
    let accel = accel_sim::Accelerator::new()?;
    let mut data = vec![0_u64; 4096];
    let mut mirror = svm::mirror(&mut data)?;
    let shared = mirror.share();
    accel.run(shared.view(), |chunk| chunk.fill(1))
}
