//! The graph as PageRank pulls it: compressed sparse rows over *in*-edges.
//!
//! ```text
//! offsets      n + 1   the in-edges of node v are sources[offsets[v]..offsets[v + 1]]
//! sources      m       where each comes from, in the order of the input
//! out_degrees  n       how many ways a node's rank is split; 0 marks a dangling node
//! ```
//!
//! Parallel edges stay parallel and self-loops stay: CSR is the input's edge list, sorted by
//! target, nothing lost. The arrays are the caller's, since in a run they are memory that the
//! device will share.

use crate::input::{Edges, Node};

/// Where the arrays are built.
#[derive(Debug)]
pub(crate) struct CsrMut<'a> {
    /// One longer than there are nodes.
    pub(crate) offsets: &'a mut [u64],
    /// As long as there are edges.
    pub(crate) sources: &'a mut [Node],
    /// As long as there are nodes.
    pub(crate) out_degrees: &'a mut [u32],
}

impl CsrMut<'_> {
    /// Sorts the edges by target (a counting sort, stable, linear time), whatever the arrays held
    /// before.
    ///
    /// # Panics
    /// If an array has not the length the graph asks for.
    pub(crate) fn fill(self, edges: &Edges) {
        let CsrMut {
            offsets,
            sources,
            out_degrees,
        } = self;
        assert_eq!(offsets.len(), edges.nr_nodes + 1);
        assert_eq!(sources.len(), edges.list.len());
        assert_eq!(out_degrees.len(), edges.nr_nodes);

        // Count: offsets[v + 1] is the in-degree of v …
        offsets.fill(0);
        out_degrees.fill(0);
        for &(from, to) in &edges.list {
            offsets[to as usize + 1] += 1;
            out_degrees[from as usize] += 1;
        }
        // … sum up: offsets[v + 1] is where v's in-edges start …
        let mut start = 0;
        for slot in &mut offsets[1..] {
            let in_degree = *slot;
            *slot = start;
            start += in_degree;
        }
        // … and place, which takes each start to its end.
        for &(from, to) in &edges.list {
            let slot = &mut offsets[to as usize + 1];
            sources[*slot as usize] = from;
            *slot += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_pcg::Pcg64Mcg;

    use super::*;
    use crate::input::Labels;

    struct Csr {
        offsets: Vec<u64>,
        sources: Vec<Node>,
        out_degrees: Vec<u32>,
    }

    fn build(edges: &Edges) -> Csr {
        // Arrays start with rubbish in them: `fill` may not count on zeros.
        let mut csr = Csr {
            offsets: vec![7; edges.nr_nodes + 1],
            sources: vec![7; edges.list.len()],
            out_degrees: vec![7; edges.nr_nodes],
        };
        CsrMut {
            offsets: &mut csr.offsets,
            sources: &mut csr.sources,
            out_degrees: &mut csr.out_degrees,
        }
        .fill(edges);
        csr
    }

    fn edges(nr_nodes: usize, list: &[(Node, Node)]) -> Edges {
        Edges {
            nr_nodes,
            list: list.to_vec(),
            labels: Labels::Position(0),
        }
    }

    #[test]
    fn a_small_graph() {
        let csr = build(&edges(4, &[(0, 2), (1, 2), (2, 0), (0, 2), (3, 3)]));
        assert_eq!(csr.offsets, [0, 1, 1, 4, 5]);
        assert_eq!(csr.sources, [2, 0, 1, 0, 3]);
        assert_eq!(csr.out_degrees, [2, 1, 1, 1]);
    }

    #[test]
    fn no_edges_and_no_nodes() {
        let csr = build(&edges(3, &[]));
        assert_eq!((csr.offsets, csr.out_degrees), (vec![0; 4], vec![0; 3]));
        assert_eq!(build(&edges(0, &[])).offsets, [0]);
    }

    /// Unrolling the CSR gives back the edge list, stably sorted by target, for many random graphs.
    #[test]
    fn edges_round_trip() {
        for seed in 0..500 {
            let mut rng = Pcg64Mcg::seed_from_u64(seed);
            let nr_nodes = rng.random_range(1..40);
            let nr_edges = rng.random_range(0..200);
            let mut end = || rng.random_range(0..nr_nodes as Node);
            let list: Vec<_> = (0..nr_edges).map(|_| (end(), end())).collect();
            let csr = build(&edges(nr_nodes, &list));

            let mut unrolled = Vec::new();
            for v in 0..nr_nodes {
                let run = csr.offsets[v] as usize..csr.offsets[v + 1] as usize;
                unrolled.extend(csr.sources[run].iter().map(|&from| (from, v as Node)));
            }
            let mut sorted = list.clone();
            sorted.sort_by_key(|&(_, to)| to);
            assert_eq!(unrolled, sorted, "seed {seed}");
            for v in 0..nr_nodes {
                let out = list.iter().filter(|&&(from, _)| from as usize == v).count();
                assert_eq!(csr.out_degrees[v] as usize, out, "seed {seed}, node {v}");
            }
        }
    }
}
