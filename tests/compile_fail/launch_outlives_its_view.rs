//! A launch in a scope lasts until the scope ends, so its view must.

fn main() -> Result<(), accel_sim::Error> {
    let accel = accel_sim::Accelerator::new()?;
    accel.scope(|scope| {
        let mut data = vec![0_u64; 4096];
        let mut mirror = svm::mirror(&mut data)?;
        scope.launch(mirror.view_mut(), |chunk| chunk.fill(1))?;
        Ok(())
    })
}
