//! A read view has no stores.

fn main() -> Result<(), accel_sim::Error> {
    let accel = accel_sim::Accelerator::new()?;
    let data = vec![0_u64; 4096];
    let input = svm::mirror_ref(&data)?;
    accel.run_items(1, input.view(), |_, i, elements| elements.store(i, 1))
}
