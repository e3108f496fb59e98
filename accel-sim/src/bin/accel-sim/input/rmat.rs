//! R-MAT graphs: a skewed degree distribution out of a seed (Chakrabarti, Zhan, Faloutsos, SDM
//! 2004), with the parameters of Graph500.
//!
//! An edge's two ends are chosen bit by bit: each of `scale` levels picks a quadrant of the
//! adjacency matrix with probabilities A, B, C and D. Nodes are then renumbered at random, as
//! Graph500 demands, so that a node's number says nothing of its degree: low numbers would
//! otherwise be the hubs, and all of them would share a few pages.
//!
//! The generator is a named one (PCG, 128-bit state, multiplicative), so a seed means the same
//! graph for ever.

use indicatif::ProgressBar;
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::{Edges, Error, Labels, Node, graph_fits_memory};

/// Edges per node.
pub(crate) const EDGE_FACTOR: usize = 16;

/// The largest scale: 2^28 nodes, 2^32 edges. Memory gives out before.
pub(crate) const MAX_SCALE: u32 = 28;

/// The chances of the quadrants: top left, top right, bottom left; the fourth has the rest, 0.05.
const A: f64 = 0.57;
const B: f64 = 0.19;
const C: f64 = 0.19;

/// Generates 2^`scale` nodes and [`EDGE_FACTOR`] times as many edges, self-loops and parallel edges
/// among them.
///
/// `progress` counts edges; give a hidden one for silence.
pub(crate) fn generate(scale: u32, seed: u64, progress: &ProgressBar) -> Result<Edges, Error> {
    assert!(scale <= MAX_SCALE, "scale {scale} is beyond {MAX_SCALE}");
    let nr_nodes = 1_usize << scale;
    let nr_edges = nr_nodes * EDGE_FACTOR;
    if !graph_fits_memory(nr_nodes as u64, nr_edges as u64) {
        return Err(Error::TooLarge {
            what: format!("R-MAT scale {scale}, {nr_nodes} nodes and {nr_edges} edges"),
        });
    }
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let renumber = permutation(nr_nodes, &mut rng);

    progress.set_length(nr_edges as u64);
    const REPORT_EVERY: usize = 1 << 16;
    let mut list = Vec::with_capacity(nr_edges);
    for done in 0..nr_edges {
        if done % REPORT_EVERY == 0 {
            progress.set_position(done as u64);
        }
        let (from, to) = edge(scale, &mut rng);
        list.push((renumber[from], renumber[to]));
    }
    progress.finish_and_clear();
    Ok(Edges {
        nr_nodes,
        list,
        labels: Labels::Position(0),
    })
}

/// One edge, before renumbering.
fn edge(scale: u32, rng: &mut Pcg64Mcg) -> (usize, usize) {
    let (mut from, mut to) = (0, 0);
    for _ in 0..scale {
        let dice: f64 = rng.random();
        // By comparison, not by branch: no predictor guesses these.
        let down = usize::from(dice >= A + B);
        let right = usize::from(dice >= A) ^ down ^ usize::from(dice >= A + B + C);
        from = from << 1 | down;
        to = to << 1 | right;
    }
    (from, to)
}

/// A random order of `0..n` (Fisher and Yates).
fn permutation(n: usize, rng: &mut Pcg64Mcg) -> Vec<Node> {
    let mut order: Vec<Node> = (0..n as Node).collect();
    for last in (1..n).rev() {
        order.swap(last, rng.random_range(0..=last));
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generate(scale: u32, seed: u64) -> Edges {
        super::generate(scale, seed, &ProgressBar::hidden()).unwrap()
    }

    /// FNV-1a over the edges: one number for a whole graph.
    fn fingerprint(edges: &Edges) -> u64 {
        edges
            .list
            .iter()
            .fold(0xcbf2_9ce4_8422_2325, |hash, &(from, to)| {
                let edge = u64::from(from) << 32 | u64::from(to);
                (hash ^ edge).wrapping_mul(0x0100_0000_01b3)
            })
    }

    #[test]
    fn a_seed_is_a_graph_for_ever() {
        assert_eq!(fingerprint(&generate(10, 1)), fingerprint(&generate(10, 1)));
        assert_ne!(fingerprint(&generate(10, 1)), fingerprint(&generate(10, 2)));
        // If this changes, so does every figure published for a seed.
        assert_eq!(fingerprint(&generate(10, 1)), 7435179977096345505);
    }

    #[test]
    fn sizes_and_bounds() {
        for scale in [0, 1, 7] {
            let edges = generate(scale, 3);
            assert_eq!(edges.nr_nodes, 1 << scale);
            assert_eq!(edges.list.len(), EDGE_FACTOR << scale);
            assert!(
                edges
                    .list
                    .iter()
                    .all(|&(from, to)| from.max(to) < 1 << scale)
            );
        }
    }

    /// What R-MAT is for: a few nodes have most of the edges, and their numbers are spread.
    #[test]
    fn degrees_are_skewed_and_hubs_are_spread() {
        let edges = generate(12, 7);
        let mut degrees = vec![0_usize; edges.nr_nodes];
        for &(from, _) in &edges.list {
            degrees[from as usize] += 1;
        }
        let hubs_low = degrees[..edges.nr_nodes / 16].iter().sum::<usize>();
        degrees.sort_unstable_by(|a, b| b.cmp(a));
        let hubs = degrees[..edges.nr_nodes / 16].iter().sum::<usize>();
        // A sixteenth of the nodes has far more than a sixteenth of the edges, but not because of
        // their numbers.
        assert!(hubs * 3 > edges.list.len(), "{hubs}");
        assert!(hubs_low * 5 < edges.list.len(), "{hubs_low}");
    }
}
