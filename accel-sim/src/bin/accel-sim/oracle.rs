//! The right answers, found another way.
//!
//! An oracle shares no code and no data structure with the kernel it judges. PageRank here *pushes*
//! along the plain edge list where the kernel *pulls* along a CSR, and it is sequential, in memory
//! no device has ever seen.

use crate::input::arrays::ORDER_PRIME;
use crate::input::{Edges, Node};

/// What to compute: the same for the oracle and the kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageRank {
    /// The chance of following an edge rather than jumping anywhere; in [0, 1).
    pub(crate) damping: f64,
    /// Stop when one iteration moves all ranks together by no more than this.
    pub(crate) tolerance: f64,
    /// Stop after so many in any case.
    pub(crate) max_iterations: u32,
}

/// Ranks, and how they were arrived at.
#[derive(Debug)]
pub(crate) struct Ranking<R> {
    /// One per node; they sum to 1.
    pub(crate) ranks: R,
    /// How many iterations were made.
    pub(crate) iterations: u32,
    /// By how much the last one moved them, in all (L1).
    pub(crate) residual: f64,
}

impl PageRank {
    /// Ranks a graph by power iteration. The rank of a dangling node is spread over all nodes.
    pub(crate) fn sequential(&self, edges: &Edges) -> Ranking<Vec<f64>> {
        let n = edges.nr_nodes;
        let mut out_degrees = vec![0_u64; n];
        for &(from, _) in &edges.list {
            out_degrees[from as usize] += 1;
        }

        let mut ranks = vec![1.0 / n as f64; n];
        let mut iterations = 0;
        let mut residual = f64::INFINITY;
        while residual > self.tolerance && iterations < self.max_iterations {
            let dangling: f64 = (0..n)
                .filter(|&v| out_degrees[v] == 0)
                .map(|v| ranks[v])
                .sum();
            let everywhere = (1.0 - self.damping + self.damping * dangling) / n as f64;
            let mut next = vec![everywhere; n];
            for &(from, to) in &edges.list {
                let share = ranks[from as usize] / out_degrees[from as usize] as f64;
                next[to as usize] += self.damping * share;
            }
            residual = distance(&ranks, &next).l1;
            ranks = next;
            iterations += 1;
        }
        Ranking {
            ranks,
            iterations,
            residual,
        }
    }

    /// How far apart (L1) two correct computations may end.
    ///
    /// An iteration is a contraction by `damping`, so one that stops when it moves by no more than
    /// `tolerance` is within `tolerance * damping / (1 - damping)` of the fixed point, and two such
    /// within twice that; to which comes what rounding in a different order may add.
    pub(crate) fn slack(&self) -> f64 {
        const ROUNDING: f64 = 1e-9;
        2.0 * self.tolerance * self.damping / (1.0 - self.damping) + ROUNDING
    }
}

/// How far apart two vectors are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Distance {
    /// The sum of all differences.
    pub(crate) l1: f64,
    /// The largest one.
    pub(crate) linf: f64,
}

/// Compares two vectors. A difference that is not a number makes both distances not a number.
pub(crate) fn distance(a: &[f64], b: &[f64]) -> Distance {
    assert_eq!(a.len(), b.len(), "vectors of different lengths");
    let mut distance = Distance { l1: 0.0, linf: 0.0 };
    for (a, b) in a.iter().zip(b) {
        let gap = (a - b).abs();
        distance.l1 += gap;
        // `f64::max` would drop a NaN.
        distance.linf = if gap > distance.linf || gap.is_nan() {
            gap
        } else {
            distance.linf
        };
    }
    if distance.l1.is_nan() {
        distance.linf = f64::NAN;
    }
    distance
}

/// The `k` nodes of the highest rank, highest first; of equal ranks the lower number comes first.
pub(crate) fn top(ranks: &[f64], k: usize) -> Vec<Node> {
    let by_rank = |a: &Node, b: &Node| {
        let (rank_a, rank_b) = (ranks[*a as usize], ranks[*b as usize]);
        rank_b.total_cmp(&rank_a).then(a.cmp(b))
    };
    let mut nodes: Vec<Node> = (0..ranks.len() as Node).collect();
    if k < nodes.len() {
        nodes.select_nth_unstable_by(k, by_rank);
        nodes.truncate(k);
    }
    nodes.sort_unstable_by(by_rank);
    nodes
}

/// What a walk along a list finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Walk {
    /// How many nodes.
    pub(crate) steps: u64,
    /// The sum of what they carry, modulo 2^64.
    pub(crate) sum: u64,
    /// A hash of what they carry that depends on the order.
    pub(crate) order: u64,
}

impl Walk {
    /// Visits one more node.
    fn visit(&mut self, payload: u64) {
        self.steps += 1;
        self.sum = self.sum.wrapping_add(payload);
        self.order = (self.order.rotate_left(5) ^ payload).wrapping_mul(ORDER_PRIME);
    }

    /// Walks the cycle of successors from node 0 until it is back there.
    pub(crate) fn along(next: &[Node], payload: impl Fn(Node) -> u64) -> Walk {
        let mut walk = Walk::default();
        let mut node = 0;
        loop {
            walk.visit(payload(node));
            node = next[node as usize];
            if node == 0 {
                return walk;
            }
        }
    }
}

/// How many elements of a saxpy are wrong, in integer arithmetic: inputs and results are whole
/// numbers.
pub(crate) fn saxpy_errors(a: f32, x: &[f32], y_before: &[f32], y: &[f32]) -> usize {
    let inputs = x.iter().zip(y_before);
    let expected = inputs.map(|(&x, &y)| a as i64 * x as i64 + y as i64);
    expected
        .zip(y)
        .filter(|&(expected, &found)| f64::from(found) != expected as f64)
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::{Labels, arrays};

    #[test]
    fn saxpy_errors_are_counted() {
        assert_eq!(saxpy_errors(3.0, &[1.0, 2.0], &[5.0, 7.0], &[8.0, 13.0]), 0);
        assert_eq!(
            saxpy_errors(3.0, &[1.0, 2.0], &[5.0, 7.0], &[8.5, f32::NAN]),
            2
        );
    }

    #[test]
    fn a_walk_knows_the_order() {
        let walk = |next: &[Node]| Walk::along(next, arrays::payload);
        let (one, other) = (walk(&[1, 2, 0]), walk(&[2, 0, 1]));
        assert_eq!((one.steps, one.sum), (other.steps, other.sum));
        assert_ne!(one.order, other.order);
        assert_eq!(walk(&[0]).sum, arrays::payload(0));
    }

    const USUAL: PageRank = PageRank {
        damping: 0.85,
        tolerance: 1e-12,
        max_iterations: 1000,
    };

    fn rank(nr_nodes: usize, list: &[(Node, Node)]) -> Vec<f64> {
        let edges = Edges {
            nr_nodes,
            list: list.to_vec(),
            labels: Labels::Position(0),
        };
        let Ranking {
            ranks, residual, ..
        } = USUAL.sequential(&edges);
        assert!(residual <= USUAL.tolerance);
        ranks
    }

    fn assert_near(found: &[f64], expected: &[f64]) {
        let distance = distance(found, expected);
        assert!(distance.l1 < 1e-9, "{found:?} is not {expected:?}");
    }

    #[test]
    fn a_ring_is_even() {
        assert_near(&rank(4, &[(0, 1), (1, 2), (2, 3), (3, 0)]), &[0.25; 4]);
    }

    /// By hand: b = (1 - d)/2 + d (a + b/2), a = (1 - d)/2 + d b/2, where b dangles. So a = 1/(2 +
    /// d).
    #[test]
    fn a_dangling_node_gives_to_all() {
        let a = 1.0 / (2.0 + USUAL.damping);
        assert_near(&rank(2, &[(0, 1)]), &[a, 1.0 - a]);
    }

    /// By hand: two leaves give all they have to the hub, the hub halves it; h = (1 - d)/3 + d (1 -
    /// h).
    #[test]
    fn a_star_ranks_its_hub() {
        let d = USUAL.damping;
        let hub = ((1.0 - d) / 3.0 + d) / (1.0 + d);
        let leaf = (1.0 - hub) / 2.0;
        assert_near(
            &rank(3, &[(1, 0), (2, 0), (0, 1), (0, 2)]),
            &[hub, leaf, leaf],
        );
    }

    /// A parallel edge weighs twice: h gets 2/3 of what node 0 has.
    #[test]
    fn parallel_edges_count() {
        let ranks = rank(3, &[(0, 1), (0, 1), (0, 2), (1, 0), (2, 0)]);
        let jump = (1.0 - USUAL.damping) / 3.0;
        assert!(((ranks[1] - jump) / (ranks[2] - jump) - 2.0).abs() < 1e-9);
    }

    #[test]
    fn iterations_are_bounded() {
        let edges = Edges {
            nr_nodes: 2,
            list: vec![(0, 1)],
            labels: Labels::Position(0),
        };
        let ranking = PageRank {
            max_iterations: 3,
            ..USUAL
        }
        .sequential(&edges);
        assert_eq!(ranking.iterations, 3);
        assert!(ranking.residual > USUAL.tolerance);
    }

    #[test]
    fn distances() {
        assert_eq!(
            distance(&[1.0, 2.0], &[1.5, 1.0]),
            Distance { l1: 1.5, linf: 1.0 }
        );
        let lost = distance(&[f64::NAN, 2.0, 0.0], &[1.5, 1.0, 0.0]);
        assert!(lost.l1.is_nan() && lost.linf.is_nan());
    }

    #[test]
    fn the_top() {
        let ranks = [0.1, 0.4, 0.1, 0.3, 0.1];
        assert_eq!(top(&ranks, 3), [1, 3, 0]);
        assert_eq!(top(&ranks, 9), [1, 3, 0, 2, 4]);
        assert!(top(&ranks, 0).is_empty());
    }
}
