//! `y += a * x`, over the caller's own slices.

use super::{Ran, accelerator, counters, mirroring};
use crate::input::arrays;
use crate::report::{Setup, Time, timed};

/// Runs saxpy over `n` elements.
pub(crate) fn run<V>(
    n: usize,
    setup: &Setup,
    time: &mut Time,
    verify: impl FnOnce(&[f32], &[f32]) -> V,
) -> anyhow::Result<Ran<V>> {
    let accel = accelerator(setup)?;
    let options = mirroring(setup);
    let (mut x, mut y) = (vec![0.0_f32; n], vec![0.0_f32; n]);
    timed(&mut time.build, || {
        arrays::saxpy(setup.seed, &mut x, &mut y);
    });

    let x = svm::mirror_ref_with(&x, &options)?;
    let mut y = svm::mirror_with(&mut y, &options)?;
    timed(&mut time.kernel, || {
        accel.run((y.view_mut(), x.view()), |(y, x)| {
            for (y, x) in y.iter_mut().zip(x) {
                *y += arrays::SAXPY_A * x;
            }
        })
    })?;
    let verdict = timed(&mut time.verify, || verify(x.as_slice(), y.as_slice()));
    Ok(Ran {
        verdict,
        counters: counters(&accel, &[x.stats(), y.stats()]),
    })
}
