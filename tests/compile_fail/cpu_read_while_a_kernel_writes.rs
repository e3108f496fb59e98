//! A kernel that may write excludes readers, too.

fn main() -> Result<(), accel_sim::Error> {
    let accel = accel_sim::Accelerator::new()?;
    let mut data = vec![0_u64; 4096];
    let mut mirror = svm::mirror(&mut data)?;
    accel.scope(|scope| {
        let launch = scope.launch(mirror.view_mut(), |chunk| chunk.fill(1))?;
        let first = mirror.as_slice()[0];
        launch.wait()?;
        assert_eq!(first, 0);
        Ok(())
    })
}
