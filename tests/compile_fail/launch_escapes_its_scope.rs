//! The handle of a launch stays in its scope.

fn main() -> Result<(), accel_sim::Error> {
    let accel = accel_sim::Accelerator::new()?;
    let mut data = vec![0_u64; 4096];
    let mut mirror = svm::mirror(&mut data)?;
    let launch = accel.scope(|scope| scope.launch(mirror.view_mut(), |chunk| chunk.fill(1)))?;
    launch.wait()
}
