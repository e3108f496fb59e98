//! What a kernel captures must outlive the scope of its launch.

fn main() -> Result<(), accel_sim::Error> {
    let accel = accel_sim::Accelerator::new()?;
    let mut data = vec![0_u64; 4096];
    let mut mirror = svm::mirror(&mut data)?;
    accel.scope(|scope| {
        let factor = 3;
        scope.launch(mirror.view_mut(), |chunk| chunk.fill(factor))?;
        Ok(())
    })
}
