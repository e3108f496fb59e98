//! The loop of a slice kernel, the same loop over plain slices, and an element kernel's load and store, for `benches/vectorised.sh` to look
//! at their machine code.

use accel_sim::{Accelerator, ElementsMut};
use anyhow::{Result, ensure};
use svm::{Buffer, DeviceFault};

/// What both are.
#[inline(always)]
fn triad(a: &mut [f64], b: &[f64], c: &[f64]) {
    for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
        *a = b + 3.0 * c;
    }
}

/// Over plain slices.
#[inline(never)]
fn plain_loop(a: &mut [f64], b: &[f64], c: &[f64]) {
    triad(a, b, c);
}

/// Over the chunks that a slice kernel is given. Here, so that its launch code has a name of its own.
#[inline(never)]
fn span_loop(
    accel: &Accelerator,
    a: &mut Buffer<f64>,
    b: &Buffer<f64>,
    c: &Buffer<f64>,
) -> Result<()> {
    Ok(accel.run((a.view_mut(), b.view(), c.view()), |(a, b, c)| {
        triad(a, b, c);
    })?)
}

/// One load of an element kernel, by itself: what it takes beside the call is the hit path.
#[inline(never)]
fn load_element(data: ElementsMut<'_, u64>, i: usize) -> Result<u64, DeviceFault> {
    data.load(i)
}

/// One store.
#[inline(never)]
fn store_element(data: ElementsMut<'_, u64>, i: usize, value: u64) -> Result<(), DeviceFault> {
    data.store(i, value)
}

fn elements(accel: &Accelerator) -> Result<()> {
    let mut data = Buffer::<u64>::zeroed(1)?;
    accel.run_items(1, data.view_mut(), |_lane, i, data| {
        let value = load_element(*data, i)?;
        store_element(*data, i, value + 1)
    })?;
    ensure!(
        data.as_slice() == [1],
        "the element kernel did something else"
    );
    Ok(())
}

fn main() -> Result<()> {
    const LEN: usize = 1 << 16;
    let accel = Accelerator::with_options(accel_sim::Options::new().workers(1))?;
    let array = |x: f64| -> Result<Buffer<f64>> {
        let mut array = Buffer::zeroed(LEN)?;
        array.as_mut_slice().fill(x);
        Ok(array)
    };
    let (mut a, b, c) = (array(0.0)?, array(1.0)?, array(2.0)?);
    span_loop(&accel, &mut a, &b, &c)?;
    let mut plain = vec![0.0; LEN];
    plain_loop(&mut plain, b.as_slice(), c.as_slice());
    ensure!(plain == a.as_slice(), "the loops differ");
    elements(&accel)
}
