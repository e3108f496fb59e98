//! Inputs of the workloads that need no file: arrays for saxpy, a permuted list to walk.

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::Node;

/// The factor of saxpy.
pub(crate) const SAXPY_A: f32 = 3.0;

/// The largest value in saxpy's arrays. All are whole numbers, small enough for every result to be
/// exact in an `f32`.
const SAXPY_LARGEST: u16 = 4095;

/// Fills saxpy's two arrays.
pub(crate) fn saxpy(seed: u64, x: &mut [f32], y: &mut [f32]) {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    for (x, y) in x.iter_mut().zip(y) {
        *x = f32::from(rng.random_range(0..=SAXPY_LARGEST));
        *y = f32::from(rng.random_range(0..=SAXPY_LARGEST));
    }
}

/// The successor of each of `n` nodes, such that all of them form one cycle in random order
/// (Sattolo).
pub(crate) fn cycle(n: usize, seed: u64) -> Vec<Node> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let mut next: Vec<Node> = (0..n as Node).collect();
    for last in (1..n).rev() {
        // Unlike Fisher and Yates: never with itself. That makes it one cycle.
        next.swap(last, rng.random_range(0..last));
    }
    next
}

/// What the hash of a list's order multiplies by at each step (the prime of FNV-1a).
pub(crate) const ORDER_PRIME: u64 = 0x0100_0000_01b3;

/// What list node `i` carries.
pub(crate) fn payload(i: Node) -> u64 {
    (u64::from(i) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cycle_visits_every_node_once() {
        for n in [1, 2, 3, 100, 1021] {
            let next = cycle(n, 5);
            let mut seen = vec![false; n];
            let mut node = 0;
            for _ in 0..n {
                assert!(!std::mem::replace(&mut seen[node], true));
                node = next[node] as usize;
            }
            assert_eq!(node, 0);
        }
    }

    #[test]
    fn saxpy_results_are_exact() {
        let largest = f32::from(SAXPY_LARGEST);
        let result = SAXPY_A * largest + largest;
        assert!(result < (1 << f32::MANTISSA_DIGITS) as f32);
        let (mut x, mut y) = ([0.5; 100], [0.5; 100]);
        saxpy(1, &mut x, &mut y);
        assert!(
            x.iter()
                .chain(&y)
                .all(|v| v.fract() == 0.0 && (0.0..=largest).contains(v))
        );
    }
}
