//! The mirror has its memory until it is dropped, not until it is last used.

fn main() {
    let mut data = vec![0_u64; 4096];
    let mirror = svm::mirror(&mut data).unwrap();
    drop(data);
    let input = vec![0_u64; 4096];
    let mirrored = svm::mirror_ref(&input).unwrap();
    drop(input);
    let mut other = vec![0_u64; 4096];
    let first = svm::mirror(&mut other).unwrap();
    let second = svm::mirror(&mut other).unwrap();
    drop(second);
}
