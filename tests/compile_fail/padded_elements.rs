//! Padding has no value that could be copied.

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Padded {
    flag: u8,
    value: u64,
}

fn main() {
    let _ = svm::mirror(&mut [Padded { flag: 0, value: 0 }; 64]);
}
