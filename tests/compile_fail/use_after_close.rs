//! `close` consumes the mirror.

fn main() -> Result<(), svm::Error> {
    let mut data = vec![0_u64; 4096];
    let mirror = svm::mirror(&mut data)?;
    mirror.close()?;
    assert_eq!(mirror.as_slice()[0], 0);
    Ok(())
}
