//! A chunk is valid inside the kernel's call only: the page may leave the device right after.

fn main() -> Result<(), accel_sim::Error> {
    let accel = accel_sim::Accelerator::new()?;
    let mut data = vec![0_u64; 4096];
    let mut mirror = svm::mirror(&mut data)?;
    let stash = std::sync::Mutex::new(Vec::new());
    accel.run(mirror.view_mut(), |chunk| stash.lock().unwrap().push(chunk))
}
