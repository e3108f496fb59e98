//! A detached launch may outlive the caller: it takes owned buffers, not views.

fn main() -> Result<(), accel_sim::Error> {
    let accel = accel_sim::Accelerator::new()?;
    let mut data = vec![0_u64; 4096];
    let mut mirror = svm::mirror(&mut data)?;
    let job = accel.spawn(mirror.view_mut(), |chunk| chunk.fill(1))?;
    job.join().1
}
