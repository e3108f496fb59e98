//! The launch borrows the mirror until the scope ends; the CPU cannot write meanwhile.

fn main() -> Result<(), accel_sim::Error> {
    let accel = accel_sim::Accelerator::new()?;
    let mut data = vec![0_u64; 4096];
    let mut mirror = svm::mirror(&mut data)?;
    accel.scope(|scope| {
        let launch = scope.launch(mirror.view_mut(), |chunk| chunk.fill(1))?;
        mirror.as_mut_slice()[0] = 2;
        launch.wait()
    })
}
