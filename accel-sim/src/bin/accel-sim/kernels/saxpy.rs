//! `y += a * x`.

use super::{MISSING, Ran};
use crate::report::{Setup, Time};

/// Runs saxpy over `n` elements.
pub(crate) fn run<V>(
    _n: usize,
    _setup: &Setup,
    _time: &mut Time,
    _verify: impl FnOnce(&[f32], &[f32]) -> V,
) -> anyhow::Result<Ran<V>> {
    anyhow::bail!(MISSING)
}
