//! While both sides write, there are no plain references: only the atomics of `Shared`.

fn main() -> Result<(), svm::Error> {
    let mut data = vec![0_u64; 4096];
    let mut mirror = svm::mirror(&mut data)?;
    let shared = mirror.share();
    let slice = mirror.as_slice();
    shared.store(0, 1);
    assert_eq!(slice[0], 0);
    Ok(())
}
