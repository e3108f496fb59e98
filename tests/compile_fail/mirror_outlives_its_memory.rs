//! The mirror borrows the slice, so it cannot be returned without it.

fn leaky() -> svm::Mirror<'static, u64> {
    let mut data = vec![0_u64; 4096];
    svm::mirror(&mut data).unwrap()
}

fn main() {
    drop(leaky());
}
