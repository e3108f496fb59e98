//! A device may leave any bits; a `bool` has two values.

fn main() {
    let _ = svm::mirror(&mut [false; 4096]);
}
