//! The mirror borrows the slice: it can only be written through the mirror.

fn main() -> Result<(), svm::Error> {
    let mut data = vec![0_u64; 4096];
    let mirror = svm::mirror(&mut data)?;
    data[0] = 1;
    mirror.close()
}
