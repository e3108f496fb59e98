//! Elements that must stay with their thread keep their mirror there.

use std::marker::PhantomData;
use std::rc::Rc;

/// A count that only its own thread may change.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Local(u64, PhantomData<Rc<u64>>);

// SAFETY: a word, and nothing.
unsafe impl bytemuck::Zeroable for Local {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Local {}

fn main() -> Result<(), svm::Error> {
    let mut data = vec![Local(0, PhantomData); 4096];
    let mut mirror = svm::mirror(&mut data)?;
    std::thread::scope(|scope| {
        scope.spawn(|| mirror.as_mut_slice()[0].0 += 1);
    });
    mirror.close()
}
