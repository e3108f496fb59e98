//! A device may leave any bits, and not any bits are a reference. `svm::Ptr` is what links nodes.

fn main() {
    let target = 7_u64;
    let _ = svm::mirror(&mut [&target; 4096]);
}
